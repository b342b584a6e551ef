"""Diffusion maps of a distance matrix, and how far a map is from meaning anything (NumPy only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from raymerge.errors import UserError

#: Fewest samples that a map, or a similarity, is computed from.
SMALLEST_N = 4

Kernel = Literal["published", "gaussian"]
KERNELS = get_args(Kernel)
#: A kernel's sigma in units of the distances, or their median.
Bandwidth = float | Literal["median"]

_IDENTITY = 0.9  # effective rank as a share of N from which a kernel is all but the identity
_CONSTANT = 1.05  # effective rank below which a kernel is all but constant


class SimilarityError(UserError):
    """A similarity, or a step on the way to one, that cannot be computed from what was given."""


@dataclass(frozen=True)
class DiffusionMap:
    """`coordinates` (N, d) float64, and the signs of a bandwidth that does not suit the distances.

    effective_rank: exp(entropy) of the normalised |eigenvalues|, in [1, N]. Near N every sample is alone (the kernel
        is the identity), near 1 all samples look the same; in both cases the coordinates are rounding noise.
    off_diagonal_mass: share of the diffusion matrix's total mass off its diagonal, in [0, (N - 1) / N].
    sigma: the bandwidth used, in units of the distances.
    """

    coordinates: np.ndarray
    effective_rank: float
    off_diagonal_mass: float
    sigma: float


def diffusion_map(
    distances: np.ndarray,
    *,
    kernel: Kernel = "published",
    sigma: Bandwidth = 8.0,
    anisotropy: float = 0.5,
    dimensions: int = 2,
) -> DiffusionMap:
    """The first `dimensions` non-trivial diffusion coordinates of N samples.

    published: K = exp(-(D / sigma)^(1/2)), K1 = K / (p p')^anisotropy with p the row sums of K, A = K1 / (v v') with
        v^2 the row sums of K1, U its eigenvectors by |eigenvalue|; coordinates U[:, 1:d+1] / U[:, :1]. (MKA,
        arXiv:2406.16330, where U comes from an SVD: A is symmetric, so that |eigenvalues| are its singular values.)
    gaussian: K = exp(-D^2 / (2 sigma^2)), P = K / row sums; coordinates are P's right eigenvectors of norm 1, the
        constant one skipped, times |eigenvalue|^anisotropy (the published experiment on tasks and languages).

    Signs are free and fixed here: a column's entry of largest magnitude is positive. Equal eigenvalues leave a rotation
    free that nothing fixes.

    Parameters
    ----------
    distances : array of float, shape (N, N)
        Symmetric, zero on the diagonal; N at least 4 and above dimensions + 1.
    sigma : positive float, or "median" for the median off-diagonal distance

    Raises
    ------
    SimilarityError
        Not such distances, all distances 0, or an option out of its range.
    """
    distances = checked_distances(distances)
    n = len(distances)
    if kernel not in KERNELS:
        raise SimilarityError(f"kernel is {kernel!r}, but should be one of {', '.join(KERNELS)}")
    if not 1 <= dimensions < n - 1:
        raise SimilarityError(f"dimensions is {dimensions}, but {n} samples allow 1 to {n - 2}: use more samples")
    if not np.isfinite(anisotropy):
        raise SimilarityError(f"anisotropy is {anisotropy}, but should be a finite number, for example 0.5")
    sigma = _bandwidth(distances, sigma)
    if kernel == "published":
        k = np.exp(-np.sqrt(distances / sigma))
        p = k.sum(axis=1)
        k /= np.outer(p, p) ** anisotropy
    else:
        k = np.exp(-0.5 * (distances / sigma) ** 2)
    mass = k.sum(axis=1)
    v = np.sqrt(mass)
    a = k / np.outer(v, v)  # shares its eigenvalues with P = K / mass; P's right eigenvectors are a's over v
    # The first eigenvector is v, with eigenvalue 1. Taking it out by hand keeps the others orthogonal to it, and the
    # quotient below finite, even where every eigenvalue is 1 and a solver's "first" is any vector.
    first = v / np.linalg.norm(v)
    values, vectors = np.linalg.eigh(a - np.outer(first, first))
    order = np.argsort(-np.abs(values), kind="stable")
    values, vectors = np.abs(values[order]), vectors[:, order]
    u = vectors[:, :dimensions]
    if kernel == "published":
        coordinates, total = u / first[:, None], a
    else:
        right = u / v[:, None]
        coordinates = right / np.linalg.norm(right, axis=0) * values[:dimensions] ** anisotropy
        total = k / mass[:, None]
    spectrum = np.append(values[:-1], 1.0)  # the last is the 0 that the first eigenvector left behind
    return DiffusionMap(
        coordinates=fixed_signs(coordinates),
        effective_rank=_effective_rank(spectrum),
        off_diagonal_mass=float(1 - np.trace(total) / total.sum()),
        sigma=sigma,
    )


def degeneracy(effective_rank: float, n: int) -> Literal["below", "above"] | None:
    """On which side of the distances the bandwidth is so far that a map of n samples, and all that is made of it, is
    noise; None where it is not.

    below: the kernel is all but the identity, its effective rank (see DiffusionMap) above 90 % of n; above: it is all
    but constant, its effective rank under 1.05.
    """
    if effective_rank > _IDENTITY * n:
        return "below"
    return "above" if effective_rank < _CONSTANT else None


def checked_distances(distances: np.ndarray) -> np.ndarray:
    """A float64 copy, exactly symmetric, of (N, N) distances between at least 4 samples, else SimilarityError."""
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise SimilarityError(f"distances have shape {distances.shape}, but should be (N, N)")
    if len(distances) < SMALLEST_N:
        raise SimilarityError(f"{len(distances)} samples are too few: at least {SMALLEST_N} are needed")
    if not np.isfinite(distances).all():
        raise SimilarityError(f"{np.sum(~np.isfinite(distances))} distances are not finite: were the states finite?")
    if distances.min() < 0:
        raise SimilarityError(f"the smallest distance is {distances.min()}, but a distance is never negative")
    largest = distances.max()
    if largest == 0:
        raise SimilarityError(f"all distances are 0: the {len(distances)} samples are the same here")
    skew, own = np.abs(distances - distances.T).max(), np.diagonal(distances).max()
    if skew > 1e-6 * largest:  # rounding of float32 distances is below
        raise SimilarityError(f"distances are not symmetric: D - D' reaches {skew}, of a largest distance {largest}")
    if own > 1e-6 * largest:
        raise SimilarityError(f"a sample has distance {own} from itself: the diagonal should be 0")
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    return distances


def fixed_signs(columns: np.ndarray) -> np.ndarray:
    """The (N, d) columns with signs flipped such that each one's entry of largest magnitude is positive."""
    largest = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)
    return columns * np.where(largest < 0, -1.0, 1.0)


def _bandwidth(distances: np.ndarray, sigma: float | str) -> float:
    if isinstance(sigma, str):
        if sigma != "median":
            raise SimilarityError(f"sigma is {sigma!r}, but should be a positive number or median")
        sigma = float(np.median(distances[np.triu_indices_from(distances, k=1)]))
        if sigma == 0:
            raise SimilarityError("the median distance is 0, as most samples are the same: set sigma to a number")
    if not (np.isfinite(sigma) and sigma > 0):
        raise SimilarityError(f"sigma is {sigma}, but should be a positive number or median")
    return float(sigma)


def _effective_rank(spectrum: np.ndarray) -> float:
    """exp of the entropy of a spectrum >= 0 taken as probabilities (Roy and Vetterli, EUSIPCO 2007)."""
    p = spectrum / spectrum.sum()
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))
