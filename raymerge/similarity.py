"""Similarity between layers from their samples' distances, embeddings or states (NumPy and SciPy only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import digamma

from raymerge.diffusion import SMALLEST_N, Bandwidth, SimilarityError, checked_distances
from raymerge.embedding import EMBEDDINGS, centred_gram, embed_layers

#: What each measure is computed on: embeddings (L, N, d) of the samples, pooled states (L, N, d), distances (L, N, N).
MEASURES: Mapping[str, str] = {"npib": "embeddings", "gaussian": "embeddings", "cosine": "states", "cka": "distances"}

#: A quotient by an entropy nearer to 0 than this is no number worth keeping; entropies have no unit to scale it by.
SMALLEST_ENTROPY = 0.05

_SINGULAR = 1e-12  # a joint covariance (unit variances) with an eigenvalue up to this is singular but for rounding

_CHUNK = 250_000  # distances held at once, 2 MB of float64: what a core's cache holds


@dataclass(frozen=True)
class SimilarityMatrix:
    """`values` (L, L) float64, symmetric, NaN where undefined; `notes` says why, for (i, j) and for (j, i)."""

    values: np.ndarray
    notes: dict[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How a matrix is computed: a measure and, for one of embeddings, the embedding it is computed on."""

    measure: str
    embedding: str
    dimensions: int
    sigma: Bandwidth
    anisotropy: float
    neighbors: int
    entropy_neighbors: int
    random_state: int

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise SimilarityError(f"measure is {self.measure!r}, but should be one of {', '.join(MEASURES)}")
        if self.embedding not in EMBEDDINGS:
            raise SimilarityError(f"embedding is {self.embedding!r}, but should be one of {', '.join(EMBEDDINGS)}")


def compute(
    recipe: Recipe,
    distances: np.ndarray | None,
    states: np.ndarray | None = None,
    *,
    rows: np.ndarray | None = None,
    permutations: np.ndarray | None = None,
) -> SimilarityMatrix:
    """The similarity of every pair of L layers over N samples.

    Parameters
    ----------
    distances : array of float, shape (L, N, N)
        Each layer's distances between samples; unused, and may be None, for a measure of states.
    states : array of float, shape (L, N, d)
        Pooled hidden states, for a measure of states alone.
    rows : array of int, shape (m,)
        Use these samples only, as if there were no others: embeddings are computed anew. `entropy_neighbors` is
        multiplied by m / N and rounded, so that the estimate looks as far as the one over all N.
    permutations : array of int, shape (L, N) or (L, m)
        Row j reorders the samples of layer j against those of layers 0 to j, itself included: the null model "these
        two layers have nothing to do with each other".

    Raises SimilarityError for anything that cannot be computed; the message says what to change.
    """
    values = features(recipe, distances, states, rows=rows)
    if rows is not None:
        recipe = replace(recipe, entropy_neighbors=_scaled(recipe, len(rows), distances))
    return measure(recipe, values, permutations=permutations)


def features(
    recipe: Recipe, distances: np.ndarray | None, states: np.ndarray | None = None, *, rows: np.ndarray | None = None
) -> np.ndarray:
    """What `measure` computes on (see `MEASURES`), from the arguments of `compute`: axis 0 is layers, axis 1 samples (m
    of them where rows are given)."""
    if MEASURES[recipe.measure] == "states":
        if states is None:
            raise SimilarityError(f"{recipe.measure} needs pooling last or mean: sequences have no one state a sample")
        states = _checked(states, "states")
        return states if rows is None else states[:, _checked_rows(rows, states.shape[1])]
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 3 or distances.shape[1] != distances.shape[2]:
        raise SimilarityError(f"distances have shape {distances.shape}, but should be (layers, samples, samples)")
    if rows is not None:
        rows = _checked_rows(rows, distances.shape[1])
        distances = distances[:, rows[:, None], rows]
    if MEASURES[recipe.measure] == "distances":
        return distances
    return embedded(recipe, distances)[0]


def embedded(recipe: Recipe, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The recipe's embedding of samples at distances (L, N, N): what `embed_layers` gives."""
    return embed_layers(
        distances,
        method=recipe.embedding,
        dimensions=recipe.dimensions,
        sigma=recipe.sigma,
        anisotropy=recipe.anisotropy,
        random_state=recipe.random_state,
    )


def measure(recipe: Recipe, values: np.ndarray, *, permutations: np.ndarray | None = None) -> SimilarityMatrix:
    """The recipe's measure of what `features` returned; `permutations` as in `compute`."""
    if recipe.measure == "npib":
        return npib(
            values,
            neighbors=recipe.neighbors,
            entropy_neighbors=recipe.entropy_neighbors,
            random_state=recipe.random_state,
            permutations=permutations,
        )
    return {"gaussian": gaussian, "cosine": cosine, "cka": cka}[recipe.measure](values, permutations=permutations)


def smallest_sample(recipe: Recipe) -> int:
    """Fewest samples that `compute` takes as `rows`."""
    least = [SMALLEST_N]
    if MEASURES[recipe.measure] == "embeddings":
        least.append(recipe.dimensions + 2)
    if recipe.measure == "npib":
        least.append(recipe.neighbors + 1)
    if recipe.measure == "gaussian":
        least.append(2 * recipe.dimensions + 1)
    return max(least)


def npib(
    embeddings: np.ndarray,
    *,
    neighbors: int = 5,
    entropy_neighbors: int = 50,
    random_state: int = 0,
    permutations: np.ndarray | None = None,
) -> SimilarityMatrix:
    """S_ij = I(i; j) / sqrt(Hi Hj) of every pair of layers, symmetrised as (S + S') / 2 (MKA, Liu et al. 2024).

    Every column is first replaced by its ranks / N. I(i; j) is the mean over the columns of layer j of the mean over
    those of layer i of the mutual information of two columns; H is `knn_entropy` of a layer's columns together. Entries
    are undefined where the two entropies differ in sign or one is nearer to 0 than 0.05. S has no upper bound: at
    N = 57 entropies are about -0.3, a layer scores about 3.7 with itself and 0.07 with an unrelated one.

    Parameters
    ----------
    embeddings : array of float, shape (L, N, d)
    neighbors : int
        Of the mutual information; below N.
    entropy_neighbors : int
        Of the entropy; below N.
    random_state : int
        Of the noise of size 1e-10 that breaks the ties of distances between ranks.
    """
    from scipy.stats import rankdata  # half a second to import, in every worker, of which few compare layers

    embeddings = _checked_embeddings(embeddings)
    n = embeddings.shape[1]
    if not 1 <= neighbors < n:
        raise SimilarityError(f"neighbors is {neighbors}, but {n} samples allow 1 to {n - 1}: use more samples")
    if not 1 <= entropy_neighbors < n:
        raise SimilarityError(
            f"entropy_neighbors is {entropy_neighbors}, but {n} samples allow at most {n - 1} (the published 50 needs "
            "51 samples; N = 57 needs k <= 56): set similarity.entropy_neighbors, or use more samples"
        )
    ranks = rankdata(embeddings, axis=1) / n
    second = _permuted(ranks, permutations)
    information = mutual_information(ranks, second, neighbors=neighbors, random_state=random_state)
    entropies = np.array([knn_entropy(layer, neighbors=entropy_neighbors) for layer in ranks])
    return _over_entropies(_symmetric(information, permutations), entropies)


def gaussian(embeddings: np.ndarray, *, permutations: np.ndarray | None = None) -> SimilarityMatrix:
    """1/2 (log|Si| + log|Sj| - log|Sij|) / sqrt(Hi Hj) with H = 1/2 log|S|, S the covariances of the columns.

    The mutual information of Gaussians, over what is left of their entropies without the constants (the published
    experiment on tasks and languages). A layer's information about itself is infinite; as published, the diagonal is 1.
    With `permutations` it is computed like any other entry. Entries are undefined as in `npib`: nearly all are on the
    `diffusion` embedding, whose columns have a variance near 1 by construction, so that H is near 0. The published
    experiment used `diffusion_gaussian`. Two layers that are linear functions of one another have infinite
    information, which is undefined too.

    Raises SimilarityError where N is not above 2 d.

    Parameters
    ----------
    embeddings : array of float, shape (L, N, d)
    """
    embeddings = _checked_embeddings(embeddings)
    n_layers, n, d = embeddings.shape
    if n <= 2 * d:
        raise SimilarityError(
            f"{n} samples cannot fill the covariance of two layers of {d} dimensions: use fewer dimensions, or at "
            f"least {2 * d + 1} samples"
        )
    # Every column at unit variance: what is singular then shows, and the volumes are put back below.
    centred = embeddings - embeddings.mean(axis=1, keepdims=True)
    scale = np.sqrt(np.sum(centred**2, axis=1, keepdims=True) / (n - 1))
    centred /= scale
    own = centred.swapaxes(1, 2) @ centred / (n - 1)
    cross = np.einsum("isa,jsb->ijab", centred, _permuted(centred, permutations), optimize=True) / (n - 1)
    joint = np.empty((n_layers, n_layers, 2 * d, 2 * d))
    joint[..., :d, :d], joint[..., d:, d:] = own[:, None], own[None]
    joint[..., :d, d:], joint[..., d:, :d] = cross, cross.swapaxes(-1, -2)
    trivial = np.eye(n_layers, dtype=bool) & (permutations is None)
    joint[trivial] = np.eye(2 * d)  # singular by nature, and replaced below
    singular = np.linalg.eigvalsh(joint)[..., 0] <= _SINGULAR
    joint[singular] = np.eye(2 * d)
    volumes = np.linalg.slogdet(own)[1]
    information = 0.5 * (volumes[:, None] + volumes - np.linalg.slogdet(joint)[1])
    entropies = 0.5 * volumes + np.log(scale).sum(axis=(1, 2))
    information[singular] = np.nan
    found = _over_entropies(_symmetric(information, permutations), entropies)
    found.values[trivial & np.isfinite(found.values)] = 1.0
    for i, j in np.argwhere((singular | singular.T) & ~trivial).tolist():
        found.notes.setdefault((i, j), "the layers are linear functions of one another: infinite information")
    return found


def cosine(states: np.ndarray, *, permutations: np.ndarray | None = None) -> SimilarityMatrix:
    """Mean over samples of the cosine between a sample's states at two layers: 1 - block influence (ShortGPT,
    arXiv:2403.03853) for neighbours. `states`: array of float, shape (L, N, d).
    """
    states = _checked(states, "states")
    lengths = np.linalg.norm(states, axis=2, keepdims=True)
    if not np.all(lengths > 0):
        layer, sample = np.argwhere(lengths[..., 0] == 0)[0]
        raise SimilarityError(f"the state of sample {sample} at layer {layer} is 0 and has no direction")
    unit = states / lengths
    flat, second = (x.reshape(len(x), -1) for x in (unit, _permuted(unit, permutations)))
    return SimilarityMatrix(_symmetric(flat @ second.T / states.shape[1], permutations))


def cka(distances: np.ndarray, *, permutations: np.ndarray | None = None) -> SimilarityMatrix:
    """Linear centred kernel alignment (Kornblith et al., ICML 2019) from each layer's Euclidean distances alone.

    <Gi, Gj> / (|Gi| |Gj|) of the centred Gram matrices; in [0, 1]. `distances`: array of float, shape (L, N, N).
    """
    found = []
    for layer, matrix in enumerate(distances):
        try:
            found.append(centred_gram(checked_distances(matrix)))
        except SimilarityError as error:
            raise SimilarityError(f"layer {layer}: {error}") from error
    grams = np.stack(found)
    grams /= np.linalg.norm(grams, axis=(1, 2), keepdims=True)
    second = grams
    if permutations is not None:
        order = _checked_permutations(permutations, *grams.shape[:2])
        second = np.stack([gram[np.ix_(o, o)] for gram, o in zip(grams, order, strict=True)])
    flat, second = (x.reshape(len(x), -1) for x in (grams, second))
    return SimilarityMatrix(_symmetric(flat @ second.T, permutations))


def mutual_information(first: np.ndarray, second: np.ndarray, *, neighbors: int, random_state: int) -> np.ndarray:
    """I[i, j] in nats: mean over columns b of `second[j]`, of the mean over columns a of `first[i]`, of I(a; b).

    Each I(a; b) is the number that scikit-learn's `mutual_info_regression(first[i], second[j][:, b])` gives for a: the
    k-nearest-neighbour estimate of Kraskov et al. (Phys. Rev. E 69, 2004), columns scaled to unit variance, noise of
    1e-10 added from `random_state`, negative estimates replaced by 0. All pairs of columns are done at once here, some
    sixty times faster.

    Parameters
    ----------
    first, second : array of float, shape (L, N, d)
        Columns must not be constant.
    neighbors : int
        1 to N - 1.

    Returns
    -------
    array of float64, shape (L, L)
    """
    n_layers, n, d = first.shape
    # One call of mutual_info_regression draws noise for its features, then for its target; every call starts anew.
    rng = np.random.RandomState(random_state)
    of_features, of_target = rng.standard_normal((n, d)), rng.standard_normal((n, 1))
    x, y = (_noisy(part, noise) for part, noise in ((first, of_features), (second, of_target)))
    found = np.maximum(_knn_information(x, y, neighbors), 0)
    return found.reshape(n_layers, d, n_layers, d).mean(axis=(1, 3))


def knn_entropy(points: np.ndarray, *, neighbors: int) -> float:
    """-mean log(k / (N r^d)) in nats, r the distance from a point (N, d) to its k-th neighbour, itself not counted.

    As published: without the unit ball's volume, so that it is off an entropy by a constant. -inf where k points fall
    on one another.
    """
    n, d = points.shape
    radius = np.partition(cdist(points, points), neighbors, axis=1)[:, neighbors]  # 0 is the point itself
    with np.errstate(divide="ignore"):
        return float(d * np.mean(np.log(radius)) - np.log(neighbors / n))


def pearson(a: np.ndarray, b: np.ndarray, *, off_diagonal: bool = False) -> float:
    """Pearson correlation of two (L, L) similarity matrices, entries with a NaN in either left out.

    Over the flattened matrices, diagonal included, as published (Table 6); or, `off_diagonal`, over the entries above
    the diagonal, each pair of layers once. Raises SimilarityError for fewer than 3 entries or where one is constant.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise SimilarityError(f"matrices of shapes {a.shape} and {b.shape} cannot be correlated: both must be (L, L)")
    chosen = np.triu_indices(len(a), k=1) if off_diagonal else slice(None)
    x, y = a[chosen].ravel(), b[chosen].ravel()
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if x.size < 3:
        raise SimilarityError(f"only {x.size} entries are defined in both matrices: a correlation needs at least 3")
    if any(np.ptp(v) <= 1e-12 * np.abs(v).max() for v in (x, y)):
        raise SimilarityError("a matrix has the same value everywhere: its correlation is undefined")
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def _noisy(columns: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Columns (L, N, d) at unit variance with noise (N, d or 1), as (L d, N)."""
    scaled = columns / columns.std(axis=1, keepdims=True)
    scaled += 1e-10 * np.maximum(1, np.abs(scaled).mean(axis=1, keepdims=True)) * noise
    return np.ascontiguousarray(scaled.swapaxes(1, 2).reshape(-1, columns.shape[1]))


def _knn_information(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """Kraskov's estimate (P, Q) for the columns x (P, N) and y (Q, N), which have no ties."""
    n = x.shape[1]
    psi = digamma(np.arange(n + 1))  # psi[m] is digamma(m); psi[0] is not used
    total = np.zeros((len(x), len(y)))
    block = max(1, min(n, _CHUNK // (8 * n)))  # points whose neighbours are sought at once, for 8 or more columns of y
    chunk = max(1, _CHUNK // (n * block))
    for low in range(0, n, block):
        of_x = [np.abs(column[low : low + block, None] - column) for column in x]
        for start in range(0, len(y), chunk):
            part = y[start : start + chunk]
            of_y = np.abs(part[:, low : low + block, None] - part[:, None])
            for p, distances in enumerate(of_x):
                nearest = np.partition(np.maximum(distances, of_y), k, axis=2)[..., k]  # 0 is the point itself
                radius = np.nextafter(nearest, 0)[..., None]  # the k-th neighbour lies on the rim and is not inside
                within = [np.count_nonzero(d <= radius, axis=2) for d in (distances, of_y)]
                total[p, start : start + chunk] += psi[within[0]].sum(axis=1) + psi[within[1]].sum(axis=1)
    return psi[n] + psi[k] - total / n


def _over_entropies(information: np.ndarray, entropies: np.ndarray) -> SimilarityMatrix:
    """information (L, L) over sqrt(Hi Hj), with notes where the quotient is undefined."""
    product = np.outer(entropies, entropies)
    small = ~(np.isfinite(entropies) & (np.abs(entropies) >= SMALLEST_ENTROPY))
    undefined = (product < 0) | small[:, None] | small
    values = information / np.sqrt(np.where(undefined, np.nan, product))
    notes = {}
    for i, j in np.argwhere(undefined).tolist():
        pair = f"{entropies[i]:.3f} and {entropies[j]:.3f}"
        why = f"one is nearer to 0 than {SMALLEST_ENTROPY}" if small[i] or small[j] else "their signs differ"
        notes[i, j] = f"entropies {pair}: {why}" if np.isfinite(product[i, j]) else f"entropies {pair}: not finite"
    return SimilarityMatrix(values, notes)


def _symmetric(values: np.ndarray, permutations: np.ndarray | None) -> np.ndarray:
    """The mean of both orders of each pair, which differ by rounding and ties alone.

    With permutations they are two draws, of which one is kept: the mean of both would scatter by a root of 2 less than
    what a pair of unrelated layers scores.
    """
    if permutations is None:
        return (values + values.T) / 2
    return np.triu(values) + np.triu(values, 1).T


def _scaled(recipe: Recipe, m: int, distances: np.ndarray | None) -> int:
    """entropy_neighbors for m samples, from that for all N; too large a number for N is kept, and then refused."""
    if distances is None or recipe.entropy_neighbors >= len(distances[0]):
        return recipe.entropy_neighbors
    return min(m - 1, max(1, round(recipe.entropy_neighbors * m / len(distances[0]))))


def _checked(values: np.ndarray, name: str) -> np.ndarray:
    """A float64 (L, N, d) array of finite numbers with N >= 4, else SimilarityError."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 3 or 0 in values.shape:
        raise SimilarityError(f"{name} have shape {values.shape}, but should be (layers, samples, dimensions)")
    if values.shape[1] < SMALLEST_N:
        raise SimilarityError(f"{values.shape[1]} samples are too few: at least {SMALLEST_N} are needed")
    if not np.isfinite(values).all():
        layer, sample, _ = np.argwhere(~np.isfinite(values))[0]
        raise SimilarityError(f"{name} of sample {sample} at layer {layer} are not finite")
    return values


def _checked_embeddings(embeddings: np.ndarray) -> np.ndarray:
    embeddings = _checked(embeddings, "embeddings")
    flat = np.argwhere(np.ptp(embeddings, axis=1) == 0)
    if flat.size:
        raise SimilarityError(f"layer {flat[0, 0]}: coordinate {flat[0, 1]} of the embedding has no spread")
    return embeddings


def _checked_rows(rows: np.ndarray, n: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or np.any((rows < 0) | (rows >= n)):
        raise SimilarityError(f"rows should be numbers of samples, 0 to {n - 1}")
    if len(np.unique(rows)) < len(rows):
        raise SimilarityError(
            "rows name a sample twice, which breaks distances to neighbours: draw them without replacement"
        )
    return rows


def _checked_permutations(permutations: np.ndarray, n_layers: int, n: int) -> np.ndarray:
    permutations = np.asarray(permutations)
    if permutations.shape != (n_layers, n) or np.any(np.sort(permutations, axis=1) != np.arange(n)):
        raise SimilarityError(f"permutations should hold {n_layers} orders of the numbers 0 to {n - 1}")
    return permutations


def _permuted(values: np.ndarray, permutations: np.ndarray | None) -> np.ndarray:
    """values (L, N, d) with each layer's samples in its order of permutations (L, N)."""
    if permutations is None:
        return values
    order = _checked_permutations(permutations, *values.shape[:2])
    return np.take_along_axis(values, order[..., None], axis=1)
