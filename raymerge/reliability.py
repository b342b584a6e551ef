"""How much of a similarity matrix, and of the correlation of two, is the choice of the samples (layer 0)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import ndtri

from raymerge.diffusion import SimilarityError
from raymerge.similarity import Recipe, SimilarityMatrix, compute, features, measure, pearson, smallest_sample

#: Samples from which on a reliability can be believed; see `Study.reliability`.
RELIABLE_N = 20


_ARRAYS = ("null_mean", "null_p95", "ci_low", "ci_high", "draws", "halves")  # of a Study


@dataclass(frozen=True)
class Study:
    """A matrix with its noise. All arrays float64; where the matrix is undefined, null and interval are NaN.

    matrix: over all `n_samples` samples.
    null_mean, null_p95: (L, L), mean and 95th percentile of what unrelated layers score.
    ci_low, ci_high: (L, L), the interval.
    draws: (B, L, L), matrices over random subsets of `draw_size` samples.
    halves: (H, 2, L, L), matrices over two halves of the samples; H is 0 where halves are too small to compute.
    """

    matrix: SimilarityMatrix
    null_mean: np.ndarray
    null_p95: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    draws: np.ndarray
    draw_size: int
    halves: np.ndarray
    n_samples: int

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays, for a file; `from_arrays` reads them."""
        found = {name: getattr(self, name) for name in _ARRAYS}
        found["notes"] = np.array([[i, j] for i, j in self.matrix.notes], dtype=np.int64).reshape(-1, 2)
        texts = json.dumps(list(self.matrix.notes.values())).encode()
        found["texts"] = np.frombuffer(texts, dtype=np.uint8).copy()
        return found | {"values": self.matrix.values, "sizes": np.array([self.draw_size, self.n_samples])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Study:
        """What `arrays` gave."""
        places, texts = map(tuple, arrays["notes"].tolist()), json.loads(arrays["texts"].tobytes())
        draw_size, n_samples = arrays["sizes"].tolist()
        matrix = SimilarityMatrix(arrays["values"], dict(zip(places, texts, strict=True)))
        arrays = {name: arrays[name] for name in _ARRAYS}
        return cls(matrix=matrix, draw_size=draw_size, n_samples=n_samples, **arrays)

    @cached_property
    def patterns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`unit_pattern` of the whole matrix, of its entries above the diagonal, and of each draw's entries above the
        diagonal: what correlations with other studies need of this one."""
        values = self.matrix.values
        above = np.triu_indices(len(values), k=1)
        return unit_pattern(values.ravel()), unit_pattern(values[above]), unit_pattern(self.draws[:, *above])

    @cached_property
    def reliability(self) -> float | None:
        """Correlation that this matrix would have, off the diagonal, with one over N other samples of the same kind.

        The mean correlation r of two halves' matrices, stepped up from N / 2 to N samples by Spearman and Brown's 2 r /
        (1 + r). 1: the samples do not matter; 0: the pattern between layers is noise. None where the study has no
        halves or none that can be correlated. From `RELIABLE_N` samples on it is what matrices of other samples show,
        to some .05; of 10 it is up to .1 too low, since halves of 5 are noisier than the formula takes them for
        (results, 2026-11-29).

        Noise weakens correlations: two matrices whose true patterns agree fully still correlate by no more than
        sqrt(reliability_a reliability_b) in expectation (Spearman, 1904). That is the ceiling against which the
        correlation of two subsets is to be read: at the ceiling they do not differ as far as these samples can tell.
        """
        r = [_off_diagonal(first, second) for first, second in self.halves]
        r = [value for value in r if np.isfinite(value)]
        if not r or np.mean(r) <= -1:
            return None
        return float(2 * np.mean(r) / (1 + np.mean(r)))


@dataclass(frozen=True)
class Correlation:
    """Pearson correlations of two matrices; None where there are no samples to judge by, or nothing is defined.

    pearson: over the flattened matrices, diagonal included (as published). pearson_off_diagonal: each pair of
    different layers once; `ci_low` and `ci_high` are its interval. reliability_a, reliability_b: `Study.reliability`.
    """

    pearson: float
    pearson_off_diagonal: float
    ci_low: float | None
    ci_high: float | None
    reliability_a: float | None
    reliability_b: float | None


def study(
    recipe: Recipe,
    distances: np.ndarray | None,
    states: np.ndarray | None = None,
    *,
    null_draws: int = 20,
    interval_draws: int = 40,
    half_draws: int = 20,
    confidence: float = 0.95,
    random_state: int = 0,
) -> Study:
    """Compute a matrix (see `similarity.compute`) with a null model, intervals and halves.

    Null: the samples of the deeper layer of each pair are shuffled, each layer by an order of its own. Its 95th
    percentile is the one that a further draw exceeds with a chance of 5 % (numpy's default, of 20 draws, with 9 %).
    Intervals: normal-theory, around the matrix, by the delete-d jackknife with d = N // 5 (`jackknife_variance`). No
    bootstrap, as duplicated samples are neighbours at distance 0. The same N, interval_draws and random_state give the
    same subsets: where the samples of two studies are translations of one another, so are those of each draw.
    Halves: random splits into two times N // 2 samples.

    A subset is computed as if it were all there is. Too few samples for a subset's matrix raise SimilarityError
    (`check_samples`); too few for a half's leave `halves` empty.
    """
    if null_draws < 1 or interval_draws < 2 or half_draws < 0:
        raise SimilarityError(
            f"null_draws {null_draws}, interval_draws {interval_draws} and half_draws {half_draws} should be at least "
            "1, 2 and 0"
        )
    quantile = _quantile(confidence)
    values = features(recipe, distances, states)
    matrix = measure(recipe, values)
    n_layers, n = values.shape[:2]
    check_samples(recipe, n)
    streams = [np.random.default_rng(seed) for seed in np.random.SeedSequence(random_state).spawn(3)]
    orders = np.tile(np.arange(n), (n_layers, 1))
    null = [measure(recipe, values, permutations=streams[0].permuted(orders, axis=1)).values for _ in range(null_draws)]

    def of(rows: np.ndarray) -> np.ndarray:
        return compute(recipe, distances, states, rows=rows).values

    size = _draw_size(n)
    draws = np.stack([of(streams[1].permutation(n)[:size]) for _ in range(interval_draws)])
    half = n // 2
    splits = [streams[2].permutation(n) for _ in range(half_draws if half >= smallest_sample(recipe) else 0)]
    halves = [[of(order[:half]), of(order[half : 2 * half])] for order in splits]

    undefined = np.isnan(matrix.values)
    margin = quantile * np.sqrt(jackknife_variance(draws, size, n))
    margin[undefined] = np.nan
    null_mean, null_p95 = np.mean(null, axis=0), np.percentile(null, 95, axis=0, method="weibull")
    null_mean[undefined] = null_p95[undefined] = np.nan
    return Study(
        matrix=matrix,
        null_mean=null_mean,
        null_p95=null_p95,
        ci_low=matrix.values - margin,
        ci_high=matrix.values + margin,
        draws=draws,
        draw_size=size,
        halves=np.array(halves).reshape(len(halves), 2, n_layers, n_layers),
        n_samples=n,
    )


def check_samples(recipe: Recipe, n_samples: int) -> None:
    """Raise SimilarityError where the subsets that `study` draws of so many samples are too small for the recipe."""
    least = smallest_sample(recipe)
    if _draw_size(n_samples) >= least:
        return
    enough = next(n for n in itertools.count(least) if _draw_size(n) >= least)
    raise SimilarityError(
        f"{n_samples} samples are too few: intervals are computed from {_draw_size(n_samples)} of them at a time, and "
        f"measure {recipe.measure} of {recipe.dimensions} dimensions needs {least}; take at least {enough} samples"
    )


def _draw_size(n_samples: int) -> int:
    return n_samples - max(1, n_samples // 5)


def jackknife_variance(draws: np.ndarray, draw_size: int, n_samples: int) -> np.ndarray:
    """Variance of a statistic over N samples, from `draws` (B, ...) of it over random subsets of m of them.

    m / (N - m) times the variance of the draws: the delete-d jackknife of Shao and Wu (Annals of Statistics 17, 1989,
    p. 1176), d = N - m, with B random subsets instead of all. For a mean its expectation is s^2 / N exactly: a mean of
    m out of N has variance s^2 (1/m - 1/N). The draws' variance is unbiased (over B - 1), as the mean that they scatter
    around is their own. A NaN leaves its draw out; fewer than 2 draws give NaN.
    """
    defined = np.isfinite(draws)
    count = defined.sum(axis=0)
    mean = np.where(defined, draws, 0).sum(axis=0) / np.maximum(count, 1)
    scatter = np.sum(np.where(defined, draws - mean, 0) ** 2, axis=0) / np.maximum(count - 1, 1)
    return np.where(count >= 2, draw_size / (n_samples - draw_size) * scatter, np.nan)


def correlate(a: Study, b: Study, *, confidence: float = 0.95) -> Correlation:
    """Correlate two studies' matrices, with an interval off the diagonal and both reliabilities.

    The interval is the jackknife's on Fisher's z, transformed back. It is of the correlation of N samples' matrices,
    which noise weakens (see `Study.reliability`), not of the patterns behind them. Draw s of one study is correlated
    with draw s of the other, so that samples common to both (translations) vary together; of unrelated samples, the
    variances add up either way. If numbers of samples or draws differ, two variances are added: each of one study's
    draws against the other's whole matrix.
    """
    flat, above = (_products(x, y) for x, y in zip(a.patterns[:2], b.patterns[:2], strict=True))
    bare = Correlation(float(flat), float(above), None, None, None, None)
    if np.isnan(flat) or np.isnan(above):
        bare = correlate_matrices(a.matrix, b.matrix)
    if (a.n_samples, a.draw_size, len(a.draws)) == (b.n_samples, b.draw_size, len(b.draws)):
        pairs = [(a, _drawn(a, b))]
    else:
        pairs = [(a, _drawn(a, b, whole=True)), (b, _drawn(b, a, whole=True))]
    variance = sum(jackknife_variance(_z(drawn), source.draw_size, source.n_samples) for source, drawn in pairs)
    margin = _quantile(confidence) * np.sqrt(variance)
    low, high = np.tanh(_z(np.array(bare.pearson_off_diagonal)) + np.array([-margin, margin]))
    known = bool(np.isfinite(margin))
    return replace(
        bare,
        ci_low=float(low) if known else None,
        ci_high=float(high) if known else None,
        reliability_a=a.reliability,
        reliability_b=b.reliability,
    )


def unit_pattern(values: np.ndarray) -> np.ndarray:
    """Values (..., P) minus their mean, of length 1: products of two such are correlations. All P are NaN where only
    `pearson` can tell: where one is not finite, all are nearly equal, or there are fewer than 3."""
    found = values - values.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(found, axis=-1, keepdims=True)
    varied = np.ptp(values, axis=-1, keepdims=True) > 1e-12 * np.abs(values).max(axis=-1, keepdims=True, initial=0.0)
    known = varied & np.isfinite(norm) & (values.shape[-1] >= 3)
    return np.where(known, found / np.where(known, norm, 1.0), np.nan)


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(np.einsum("...p,...p->...", a, b), -1, 1)


def _drawn(a: Study, b: Study, *, whole: bool = False) -> np.ndarray:
    """Correlations (B,) of each of a's draws with b's of the same number, or with b's whole matrix; NaN where there is
    none."""
    # All draws in one product, and only NaN ones by themselves: 2,394 subsets (57 subjects, 42 languages) are 2.9
    # million pairs, each of 40 draws.
    found = _products(a.patterns[2], b.patterns[1 if whole else 2])
    for draw in np.flatnonzero(np.isnan(found)):
        found[draw] = _off_diagonal(a.draws[draw], b.matrix.values if whole else b.draws[draw])
    return found


def correlate_matrices(a: SimilarityMatrix | np.ndarray, b: SimilarityMatrix | np.ndarray) -> Correlation:
    """Correlate two matrices (L, L) whose samples are not at hand: no interval, no reliabilities."""
    a, b = (m.values if isinstance(m, SimilarityMatrix) else m for m in (a, b))
    return Correlation(pearson(a, b), pearson(a, b, off_diagonal=True), None, None, None, None)


def _quantile(confidence: float) -> float:
    """Half the width, in standard errors, of a normal-theory interval."""
    if not 0 < confidence < 1:
        raise SimilarityError(f"confidence is {confidence}, but should lie between 0 and 1, for example 0.95")
    return float(ndtri((1 + confidence) / 2))


def _off_diagonal(a: np.ndarray, b: np.ndarray) -> float:
    try:
        return pearson(a, b, off_diagonal=True)
    except SimilarityError:
        return float("nan")  # a draw without a correlation is left out


def _z(r: np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))  # finite for equal matrices
