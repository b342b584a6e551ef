"""Which layers to merge and with what coefficients, by what a similarity run says of the layers.

Ratios: Liu et al. 2024, "Pruning via Merging", stage 5, as its code computes them (`similarity_ratio`) and as the paper
writes them (`similarity_alpha`). Selection: the most similar neighbours, the layers of least block influence, or the
block of layers that changes the states least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from scipy.special import expit

from raymerge.plan import FIXED_RATIO, MergePlan, PlanError, check_merges, drop_layers_plan

_UNDEFINED = "take another subset or measure (column note of table similarity says why there is none)"


def similarity_ratio(similarity: np.ndarray, into: int, remove: int, *, beta: float = 1.0) -> float:
    """The published code's alpha for merging layer `remove` into `into`, from an (L, L) similarity matrix.

    s_i is the mean of row i, diagonal included; r = s_i / (s_i + s_j); alpha = sigmoid(beta r). For non-negative
    similarities it lies in [0.5, 0.731], 0.6225 for equal rows. Raises PlanError for rows with missing values.
    """
    means = []
    for layer in (into, remove):
        row = similarity[layer]
        if not np.all(np.isfinite(row)):
            missing = np.flatnonzero(~np.isfinite(row))
            raise PlanError(
                f"similarity row {layer} has no value at {len(missing)} of {len(row)} layers, the first is "
                f"{missing[0]}: a ratio needs the whole row; {_UNDEFINED}"
            )
        means.append(float(row.mean()))
    total = means[0] + means[1]
    if total == 0.0:
        raise PlanError(f"similarity rows {into} and {remove} have means that add up to 0: their ratio is undefined")
    return float(expit(beta * means[0] / total))  # of any size: means of unlike signs nearly cancel


def similarity_alpha(similarity: np.ndarray, into: int, remove: int) -> float:
    """The paper's alpha: the normalised similarity, clipped to [0, 1]."""
    return min(1.0, max(0.0, normalised_similarity(similarity, into, remove)))


def normalised_similarity(similarity: np.ndarray, into: int, remove: int) -> float:
    """S_ij / sqrt(S_ii S_jj) of an (L, L) matrix; PlanError where it is undefined."""
    value, scale = similarity[into, remove], similarity[into, into] * similarity[remove, remove]
    if not (math.isfinite(value) and math.isfinite(scale)):
        raise PlanError(f"layers {into} and {remove} have no similarity, or none with themselves; {_UNDEFINED}")
    if scale <= 0.0:
        raise PlanError(
            f"layers {into} and {remove} cannot be compared: the product of their similarities with themselves is "
            f"{scale:g}, but must be positive; {_UNDEFINED}"
        )
    return float(value / math.sqrt(scale))


def pair_alphas(
    pairs: Iterable[tuple[int, int]],
    base: str,
    *,
    ratio: float = FIXED_RATIO,
    similarity: np.ndarray | None = None,
    beta: float = 1.0,
) -> list[float]:
    """The starting coefficient of each merge (into, remove).

    `base`: "fixed" gives `ratio` everywhere; "similarity_ratio" and "similarity" compute them from `similarity`,
    an (L, L) matrix, the first with `beta`.
    """
    pairs = list(pairs)
    if base == "fixed":
        return [ratio] * len(pairs)
    rules: dict[str, Callable[[np.ndarray, int, int], float]] = {
        "similarity_ratio": partial(similarity_ratio, beta=beta),
        "similarity": similarity_alpha,
    }
    if base not in rules:
        raise PlanError(f"base {base!r} is not one of fixed, {', '.join(rules)}")
    if similarity is None:
        raise PlanError(f"base {base!r} needs a similarity matrix")
    deepest = max((layer for pair in pairs for layer in pair), default=0)
    if similarity.shape != (len(similarity),) * 2 or len(similarity) <= deepest:
        raise PlanError(f"the similarity matrix is {similarity.shape}, but layer {deepest} is to be merged")
    return [rules[base](similarity, into, remove) for into, remove in pairs]


def most_similar_pair(
    similarity: np.ndarray, alive: Sequence[int] | None = None, *, threshold: float | None = None
) -> tuple[int, int] | None:
    """The neighbouring layers (into, remove) of highest normalised similarity, the deeper one removed.

    alive: layers still there, in order (all by default); rows of `similarity` are numbered as they are. None where no
    pair exceeds `threshold` (Liu et al. 2024, stage 5: merging goes on until none does). Equal pairs: the deepest.
    """
    alive = list(range(len(similarity))) if alive is None else list(alive)
    best: tuple[float, tuple[int, int]] | None = None
    for into, remove in zip(alive, alive[1:], strict=False):
        value = normalised_similarity(similarity, into, remove)
        if (threshold is None or value > threshold) and (best is None or value >= best[0]):
            best = value, (into, remove)
    return None if best is None else best[1]


def most_similar_pairs(
    similarity: np.ndarray, *, merges: int | None = None, threshold: float | None = None, first: int = 0
) -> list[tuple[int, int]]:
    """Repeatedly the most similar neighbours from layer `first` on, until `merges` merges or until no pair exceeds
    `threshold`.

    A merged layer keeps the number, and the row of `similarity` (L, L), of the layer that it was merged into.
    Raises PlanError where neither limit is given, `merges` is too large, or no pair exceeds the threshold.
    """
    n_layers = len(similarity)
    if merges is None and threshold is None:
        raise PlanError("most_similar needs plan.merges or plan.threshold, or both")
    if merges is not None:
        check_merges(n_layers, merges, first)
    alive = list(range(first, n_layers))
    pairs: list[tuple[int, int]] = []
    while merges is None or len(pairs) < merges:
        pair = most_similar_pair(similarity, alive, threshold=threshold)
        if pair is None:
            break
        pairs.append(pair)
        alive.remove(pair[1])
    if not pairs:
        raise PlanError(f"no neighbouring layers are more similar than plan.threshold = {threshold}: lower it")
    return pairs


def block_scores(distances: np.ndarray, merges: int) -> dict[int, float]:
    """How far the states that enter a block of `merges` layers are from those that leave it, by its first layer.

    distances: (L+1, L+1), row i for the states that enter layer i, row L for those that leave the last one.
    """
    check_merges(len(distances) - 1, merges)
    return dict(enumerate(np.diagonal(distances, merges).astype(float).tolist()))


def similar_block_scores(similarity: np.ndarray, merges: int) -> dict[int, float]:
    """1 - the normalised similarity of what enters a block of `merges` layers and what leaves it, by its first layer;
    NaN where that is undefined.

    similarity: (L, L) of the layers' outputs, so that a block that begins with layer 0 has no score.
    """
    n_layers = len(similarity)
    check_merges(n_layers, merges)
    scores = {}
    for first in range(1, n_layers - merges + 1):
        try:
            scores[first] = 1.0 - normalised_similarity(similarity, first - 1, first + merges - 1)
        except PlanError:  # of a block that plan.starts may leave out
            scores[first] = math.nan
    return scores


def best_block(scores: Mapping[int, float], starts: Iterable[int]) -> int:
    """The first layer, among `starts`, of the block of least score; of equal ones the deepest. Raises PlanError."""
    starts = sorted(starts)
    if missing := [first for first in starts if not math.isfinite(scores.get(first, math.nan))]:
        raise PlanError(f"the blocks from layers {missing} on have no finite score: set plan.starts to leave them out")
    if not starts:
        raise PlanError("there is no block to choose from")
    return min(starts, key=lambda first: (scores[first], -first))


def least_influence_plan(block_influence: np.ndarray, merges: int, first: int = 0) -> MergePlan:
    """Drop the `merges` layers of least block influence (ShortGPT, Men et al. 2024, arXiv 2403.03853) from layer
    `first` on.

    block_influence: (L,), 1 - mean cosine between the states entering and leaving each layer.
    """
    n_layers = len(block_influence)
    check_merges(n_layers, merges, first)
    if not np.all(np.isfinite(block_influence)):
        raise PlanError(f"block influence has no value for layers {np.flatnonzero(~np.isfinite(block_influence))}")
    least = first + np.argsort(block_influence[first:], kind="stable")[:merges]
    return drop_layers_plan(n_layers, least.tolist(), name="block_influence")
