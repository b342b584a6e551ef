"""Diffusion maps against closed forms and plain linear algebra."""

from __future__ import annotations

import numpy as np
import pytest

from raymerge.diffusion import SimilarityError, degeneracy, diffusion_map, fixed_signs

KERNELS = ("published", "gaussian")


def between(points):
    return np.linalg.norm(points[:, None] - points, axis=-1)


def cloud(n=30, d=5, seed=0):
    return between(np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(1, 3, d))


@pytest.mark.parametrize("n", [7, 12, 57])
@pytest.mark.parametrize("sigma", [0.7, 8.0, "median"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_circle_gives_its_first_fourier_modes(kernel, sigma, n):
    """A circulant matrix has them as eigenvectors whatever the kernel; the first pair has the largest eigenvalues."""
    theta = 2 * np.pi * np.arange(n) / n
    modes = np.stack([np.cos(theta), np.sin(theta)], axis=1) * np.sqrt(2 / n)
    for anisotropy in (0.0, 0.5, 1.0):
        found = diffusion_map(between(modes), kernel=kernel, sigma=sigma, anisotropy=anisotropy).coordinates
        assert np.linalg.matrix_rank(found) == 2
        np.testing.assert_allclose(modes @ (modes.T @ found), found, atol=1e-10 * np.abs(found).max())


def test_the_published_map_is_the_singular_value_decomposition_of_its_authors():
    distances = cloud()
    k = np.exp(-((distances / 3.0) ** 0.5))
    p = k.sum(axis=1)
    k1 = k / np.outer(p, p) ** 0.3
    v = np.sqrt(k1.sum(axis=1))
    a = k1 / np.outer(v, v)
    u, s, _ = np.linalg.svd(a)
    expected = u[:, 1:4] / u[:, :1]
    found = diffusion_map(distances, sigma=3.0, anisotropy=0.3, dimensions=3)
    np.testing.assert_allclose(np.abs(found.coordinates), np.abs(expected), rtol=1e-9)
    probabilities = s / s.sum()
    assert found.effective_rank == pytest.approx(np.exp(-np.sum(probabilities * np.log(probabilities))), rel=1e-12)
    assert found.off_diagonal_mass == pytest.approx(1 - np.trace(a) / a.sum(), rel=1e-12)
    assert found.sigma == 3.0


def test_the_gaussian_map_is_the_right_eigenvectors_of_a_random_walk():
    distances = cloud()
    k = np.exp(-(distances**2) / (2 * 4.0**2))
    walk = k / k.sum(axis=1, keepdims=True)
    values, vectors = np.linalg.eig(walk)
    order = np.argsort(-values.real)
    values, vectors = values.real[order], vectors.real[:, order]
    assert values[0] == pytest.approx(1) and np.ptp(vectors[:, 0]) < 1e-12  # what is skipped is constant
    expected = vectors[:, 1:4] * values[1:4] ** 0.7
    found = diffusion_map(distances, kernel="gaussian", sigma=4.0, anisotropy=0.7, dimensions=3)
    np.testing.assert_allclose(np.abs(found.coordinates), np.abs(expected), rtol=1e-8)
    assert found.off_diagonal_mass == pytest.approx(1 - np.trace(walk) / 30, rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_carry_their_coordinates_along(kernel):
    distances, order = cloud(), np.random.default_rng(1).permutation(30)
    first = diffusion_map(distances, kernel=kernel, sigma="median")
    second = diffusion_map(distances[np.ix_(order, order)], kernel=kernel, sigma="median")
    np.testing.assert_allclose(second.coordinates, first.coordinates[order], rtol=1e-9)
    assert second.effective_rank == pytest.approx(first.effective_rank)
    rows = np.abs(first.coordinates).argmax(axis=0)
    assert np.all(first.coordinates[rows, [0, 1]] > 0)
    # Of either sign: the solver's own may be the right one by chance.
    np.testing.assert_array_equal(fixed_signs(first.coordinates * [1, -1]), first.coordinates)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_median_bandwidth_knows_no_unit(kernel):
    distances = cloud()
    first = diffusion_map(distances, kernel=kernel, sigma="median")
    second = diffusion_map(1000 * distances, kernel=kernel, sigma="median")
    np.testing.assert_allclose(second.coordinates, first.coordinates, rtol=1e-8)
    assert first.sigma == np.median(distances[np.triu_indices(30, 1)])
    assert second.sigma == pytest.approx(1000 * first.sigma)


@pytest.mark.parametrize("kernel", KERNELS)
def test_degeneracy_is_seen_at_both_ends(kernel):
    distances = cloud()
    alone = diffusion_map(distances, kernel=kernel, sigma=1e-6)  # the kernel is the identity to the last bit
    assert alone.effective_rank == pytest.approx(30, rel=1e-6)
    assert alone.off_diagonal_mass == pytest.approx(0, abs=1e-12)
    assert np.isfinite(alone.coordinates).all()
    alike = diffusion_map(distances, kernel=kernel, sigma=1e12)
    assert alike.effective_rank == pytest.approx(1, abs=0.01)
    assert alike.off_diagonal_mass == pytest.approx(29 / 30, rel=1e-4)
    ranks = [diffusion_map(distances, kernel=kernel, sigma=s).effective_rank for s in (0.01, 0.1, 1, 10, 100)]
    assert ranks == sorted(ranks, reverse=True)
    assert degeneracy(alone.effective_rank, 30) == "below" and degeneracy(alike.effective_rank, 30) == "above"
    fit = diffusion_map(distances, kernel=kernel, sigma="median")
    assert degeneracy(fit.effective_rank, 30) is None


def test_it_refuses_what_are_no_distances():
    good = cloud(8)

    def refuses(distances, message, **options):
        with pytest.raises(SimilarityError, match=message):
            diffusion_map(distances, **options)

    skew, lone, negative, infinite = (good.copy() for _ in range(4))
    skew[2, 5] += 0.1
    lone[3, 3] = 0.5
    negative[1, 2] = negative[2, 1] = -1
    infinite[1, 2] = np.inf
    refuses(good[:4], r"\(4, 8\).*\(N, N\)")
    refuses(good[:3, :3], "3 samples are too few: at least 4")
    refuses(skew, "not symmetric")
    refuses(lone, "distance 0.5 from itself")
    refuses(negative, "-1.0, but a distance is never negative")
    refuses(infinite, "1 distances are not finite")
    refuses(np.zeros((8, 8)), "all distances are 0")
    refuses(good, "dimensions is 7, but 8 samples allow 1 to 6", dimensions=7)
    refuses(good, "dimensions is 0", dimensions=0)
    refuses(good, "sigma is 0.0, but should be a positive", sigma=0.0)
    refuses(good, "sigma is nan", sigma=float("nan"))
    refuses(good, "sigma is 'mean'", sigma="mean")
    refuses(good, "anisotropy is inf", anisotropy=np.inf)
    refuses(good, "kernel is 'cubic'", kernel="cubic")
    twins = between(np.repeat(np.eye(2), [7, 1], axis=0))
    refuses(twins, "median distance is 0", sigma="median")


def test_float32_distances_are_taken_and_left_alone():
    distances = cloud().astype(np.float32)
    before = distances.copy()
    distances[1, 0] *= 1 + 1e-7
    before[1, 0] = distances[1, 0]
    found = diffusion_map(distances)
    assert found.coordinates.dtype == np.float64
    np.testing.assert_array_equal(distances, before)
