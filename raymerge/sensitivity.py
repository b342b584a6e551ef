"""How much a similarity matrix, and the merges that it chooses, depend on each of its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from raymerge.config import SensitivityConfig, SimilarityConfig
from raymerge.heuristics import most_similar_pairs, pair_alphas
from raymerge.plan import PlanError, tail_pairs
from raymerge.schemas import Row
from raymerge.similarity import Recipe, SimilarityError, SimilarityMatrix, compute, pearson


def recipe_of(settings: SimilarityConfig) -> Recipe:
    """The mathematics that a similarity section asks for."""
    return Recipe(
        measure=settings.measure,
        embedding=settings.embedding,
        dimensions=settings.dimensions,
        sigma=settings.sigma,
        anisotropy=settings.anisotropy,
        neighbors=settings.neighbors,
        entropy_neighbors=settings.entropy_neighbors,
        random_state=settings.seed,
    )


def vary(
    settings: SimilarityConfig,
    ranges: SensitivityConfig,
    distances: np.ndarray,
    states: np.ndarray | None,
    *,
    first: int = 0,
) -> list[Row]:
    """Rows of table `sensitivity`, without subset and language: one a setting, and the reference itself first.

    distances (L, N, N) float64 and states (L, N, d) or None are one subset's activations. Each row varies one
    parameter around `settings` and says how well the matrix agrees with the reference (Pearson over all entries and
    off the diagonal), which share of the reference's `ranges.merges` most similar pairs is chosen again, and by how
    much the tail merge's similarity_ratio alphas move. first: the first layer that may be merged. A setting that cannot
    be computed has a note instead.
    """
    reference = compute(recipe_of(settings), distances, states)
    chosen = _Choice.of(reference, first, ranges.merges)
    rows = [_row("reference", "", reference, chosen, reference, chosen) | {"reference": True}]
    for parameter, setting, recipe, picked in _variations(settings, ranges, distances.shape[1]):
        if recipe == recipe_of(settings) and picked is None:
            found: SimilarityMatrix | str = reference
        else:
            try:
                found = compute(recipe, distances, states, rows=picked)
            except SimilarityError as error:
                found = str(error)
        if isinstance(found, str):
            rows.append({"parameter": parameter, "setting": setting, "reference": False, "note": found})
            continue
        own = _Choice.of(found, first, ranges.merges)
        rows.append(_row(parameter, setting, reference, chosen, found, own))
    for threshold in ranges.thresholds:
        own = _Choice.of(reference, first, None, threshold)
        rows.append(_row("threshold", f"{threshold:g}", reference, chosen, reference, own))
    return rows


class _Choice:
    """What a matrix decides: the most similar pairs, and the alphas of a tail merge; None where it cannot."""

    def __init__(self, pairs: list[tuple[int, int]] | None, alphas: np.ndarray | None, note: str | None):
        self.pairs, self.alphas, self.note = pairs, alphas, note

    @classmethod
    def of(cls, matrix: SimilarityMatrix, first: int, merges: int | None, threshold: float | None = None) -> _Choice:
        values, notes = matrix.values, []
        pairs = alphas = None
        try:
            pairs = most_similar_pairs(values, merges=merges, threshold=threshold, first=first)
            notes += [f"{len(pairs)} merges"] if threshold is not None else []
        except PlanError as error:
            notes.append(str(error))
        if merges is not None:
            try:
                alphas = np.array(pair_alphas(tail_pairs(len(values), merges), "similarity_ratio", similarity=values))
            except PlanError as error:
                notes.append(str(error))
        return cls(pairs, alphas, "; ".join(notes) or None)


def _row(
    parameter: str,
    setting: str,
    reference: SimilarityMatrix,
    chosen: _Choice,
    found: SimilarityMatrix,
    own: _Choice,
) -> Row:
    overlap = difference = None
    if chosen.pairs is not None and own.pairs is not None:
        overlap = len(set(chosen.pairs) & set(own.pairs)) / len(chosen.pairs)
    if chosen.alphas is not None and own.alphas is not None:
        difference = float(np.abs(chosen.alphas - own.alphas).max())
    return {
        "parameter": parameter,
        "setting": setting,
        "reference": False,
        "pearson": _agreement(reference, found, off_diagonal=False),
        "pearson_off_diagonal": _agreement(reference, found, off_diagonal=True),
        "plan_overlap": overlap,
        "alpha_max_difference": difference,
        "note": own.note,
    }


def _agreement(reference: SimilarityMatrix, found: SimilarityMatrix, *, off_diagonal: bool) -> float | None:
    try:
        return pearson(reference.values, found.values, off_diagonal=off_diagonal)
    except SimilarityError:  # too few entries are defined in both, or one of them is constant
        return None


def _variations(
    settings: SimilarityConfig, ranges: SensitivityConfig, n_samples: int
) -> Iterator[tuple[str, str, Recipe, np.ndarray | None]]:
    """(parameter, setting, recipe, samples used or None for all), one parameter at a time."""
    base = recipe_of(settings)
    for name in ("sigma", "dimensions", "neighbors", "entropy_neighbors", "embedding", "measure"):
        for value in getattr(ranges, name):
            yield name, str(value), replace(base, **{name: value}), None
    order = np.random.default_rng(settings.seed).permutation(n_samples)
    for count in ranges.samples:
        yield "samples", str(count), base, np.sort(order[:count])
