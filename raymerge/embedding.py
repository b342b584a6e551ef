"""Samples as points in few dimensions, from their distances alone: diffusion maps and what they are compared with."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import NamedTuple, TypedDict, Unpack

import numpy as np

from raymerge.diffusion import Bandwidth, Kernel, SimilarityError, checked_distances, diffusion_map, fixed_signs

EMBEDDINGS = ("diffusion", "diffusion_gaussian", "pca", "tsne", "umap")

_NO_UMAP = "embedding umap needs a package: pip install 'raymerge[umap]'"
_KERNELS: dict[str, Kernel] = {"diffusion": "published", "diffusion_gaussian": "gaussian"}


class Embedding(NamedTuple):
    """`coordinates` (N, d) float64; the two signs of degeneracy (see DiffusionMap) are None for other methods."""

    coordinates: np.ndarray
    effective_rank: float | None
    off_diagonal_mass: float | None


class EmbeddingOptions(TypedDict):
    """How samples are embedded; see `embed`."""

    method: str
    dimensions: int
    sigma: Bandwidth
    anisotropy: float
    random_state: int


def embed(
    distances: np.ndarray,
    *,
    method: str,
    dimensions: int,
    sigma: Bandwidth,
    anisotropy: float,
    random_state: int,
) -> Embedding:
    """Embed N samples, given their (N, N) Euclidean distances, by one of EMBEDDINGS.

    diffusion, diffusion_gaussian: `diffusion_map` with its published or its Gaussian kernel, `sigma`, `anisotropy`.
    pca: classical scaling, which for Euclidean distances equals the principal component scores.
    tsne: scikit-learn's, random start from `random_state`, perplexity min(30, (N - 1) / 3).
    umap: umap-learn's, an extra package; 15 neighbours, or N - 1 where that is less; `random_state`.

    Raises SimilarityError for unfit distances, an unknown method, dimensions outside 1..N-2, a missing package, and
    for a coordinate without any spread.
    """
    if method not in EMBEDDINGS:
        raise SimilarityError(f"embedding is {method!r}, but should be one of {', '.join(EMBEDDINGS)}")
    rank = mass = None
    if method in _KERNELS:
        found = diffusion_map(
            distances, kernel=_KERNELS[method], sigma=sigma, anisotropy=anisotropy, dimensions=dimensions
        )
        coordinates, rank, mass = found.coordinates, found.effective_rank, found.off_diagonal_mass
    else:
        distances = checked_distances(distances)
        n = len(distances)
        if not 1 <= dimensions < n - 1:
            raise SimilarityError(f"dimensions is {dimensions}, but {n} samples allow 1 to {n - 2}: use more samples")
        if method == "pca":
            coordinates = _classical_scaling(distances, dimensions)
        else:
            coordinates = {"tsne": _tsne, "umap": _umap}[method](distances, dimensions, random_state)
    # A spread of rounding size would be stretched to a full scale of ranks, that is, to noise.
    flat = np.flatnonzero(np.ptp(coordinates, axis=0) <= 1e-12 * np.abs(coordinates).max(axis=0))
    if flat.size:
        raise SimilarityError(
            f"embedding {method} has no spread in coordinate {flat[0]} of {dimensions}: use fewer dimensions, "
            "another sigma, or samples that differ"
        )
    return Embedding(coordinates, rank, mass)


def embed_layers(
    distances: np.ndarray,
    **options: Unpack[EmbeddingOptions],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embed each layer of (L, N, N) distances; `options` are those of `embed`.

    Returns coordinates (L, N, d), effective rank (L,) and off-diagonal mass (L,), all float64; the latter two are NaN
    for an embedding without them. A layer that cannot be embedded raises SimilarityError with its number.
    """
    embeddings = []
    for layer, matrix in enumerate(distances):
        try:
            embeddings.append(embed(matrix, **options))
        except SimilarityError as error:
            raise SimilarityError(f"layer {layer}: {error}") from error
    coordinates, rank, mass = zip(*embeddings, strict=True)
    return np.stack(coordinates), np.array(rank, dtype=np.float64), np.array(mass, dtype=np.float64)


def centred_gram(distances: np.ndarray) -> np.ndarray:
    """Inner products (..., N, N) of the centred samples: -D^2 / 2 with its row and column means taken out.

    Exact for Euclidean distances (..., N, N) (Torgerson, Psychometrika 17, 1952).
    """
    b = -0.5 * np.square(distances, dtype=np.float64)
    b -= b.mean(axis=-1, keepdims=True)
    b -= b.mean(axis=-2, keepdims=True)
    return b


def _classical_scaling(distances: np.ndarray, dimensions: int) -> np.ndarray:
    values, vectors = np.linalg.eigh(centred_gram(distances))
    values, vectors = values[::-1][:dimensions], vectors[:, ::-1][:, :dimensions]
    # the root would lift an eigenvalue of rounding size, 1e-16, to a visible 1e-8
    values = np.where(values > len(distances) * np.finfo(np.float64).eps * values[0], values, 0)
    return fixed_signs(vectors * np.sqrt(values))


def check_installed(method: str) -> None:
    """Raise SimilarityError where the method's package is missing, before states are computed for nothing."""
    if method == "umap" and find_spec("umap") is None:
        raise SimilarityError(_NO_UMAP)


def _tsne(distances: np.ndarray, dimensions: int, random_state: int) -> np.ndarray:
    from sklearn.manifold import TSNE  # seconds to import, and rarely wanted

    model = TSNE(
        dimensions,
        metric="precomputed",
        init="random",
        perplexity=min(30.0, (len(distances) - 1) / 3),
        method="barnes_hut" if dimensions < 4 else "exact",  # Barnes-Hut trees stop at 3 dimensions
        random_state=random_state,
    )
    return model.fit_transform(distances).astype(np.float64)


def _umap(distances: np.ndarray, dimensions: int, random_state: int) -> np.ndarray:
    with warnings.catch_warnings():
        # umap warns of what is not used here: TensorFlow at its import, inverse transforms, threads under a seed
        warnings.simplefilter("ignore")
        try:
            import umap
        except ImportError as error:
            raise SimilarityError(_NO_UMAP) from error
        model = umap.UMAP(
            n_components=dimensions,
            metric="precomputed",
            n_neighbors=min(15, len(distances) - 1),
            random_state=random_state,
        )
        return model.fit_transform(distances).astype(np.float64)
