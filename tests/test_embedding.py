"""Embeddings from distances against scikit-learn's from coordinates."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.decomposition import PCA

from raymerge.diffusion import SimilarityError, diffusion_map
from raymerge.embedding import EMBEDDINGS, centred_gram, embed, embed_layers

OPTIONS = {"dimensions": 2, "sigma": 8.0, "anisotropy": 0.5, "random_state": 0}


def between(points):
    return np.linalg.norm(points[:, None] - points, axis=-1)


def points(n=25, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1)


@pytest.mark.parametrize("method", ["diffusion", "diffusion_gaussian"])
def test_diffusion_maps_are_passed_through_with_their_degeneracy(method):
    kernel = {"diffusion": "published", "diffusion_gaussian": "gaussian"}[method]
    found = embed(between(points()), method=method, **{**OPTIONS, "dimensions": 3, "anisotropy": 0.8})
    expected = diffusion_map(between(points()), kernel=kernel, dimensions=3, anisotropy=0.8)
    np.testing.assert_array_equal(found.coordinates, expected.coordinates)
    assert found[1:] == (expected.effective_rank, expected.off_diagonal_mass)


def test_pca_of_distances_is_pca_of_coordinates():
    x = points() + 100
    found = embed(between(x), method="pca", **{**OPTIONS, "dimensions": 4})
    expected = PCA(4, svd_solver="full").fit_transform(x)
    np.testing.assert_allclose(np.abs(found.coordinates), np.abs(expected), rtol=1e-8, atol=1e-8)
    assert found[1:] == (None, None)


def test_the_gram_matrix_of_distances_is_that_of_centred_coordinates():
    x = points()
    centred = x - x.mean(axis=0)
    np.testing.assert_allclose(centred_gram(between(x)[None])[0], centred @ centred.T, atol=1e-10)


def test_tsne_keeps_clusters_apart_and_repeats_itself():
    x = points(24)
    x[12:] += 60
    first, second = (embed(between(x), method="tsne", **OPTIONS).coordinates for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.float64 and first.shape == (24, 2)
    assert embed(between(x), method="tsne", **{**OPTIONS, "dimensions": 4}).coordinates.shape == (24, 4)
    distances = between(first)
    assert np.median(distances[:12, :12]) < 0.5 * np.median(distances[:12, 12:])


def test_umap_missing_is_an_error_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(SimilarityError, match=r"pip install 'raymerge\[umap\]'"):
        embed(between(points()), method="umap", **OPTIONS)


@pytest.mark.parametrize(("n", "neighbors"), [(25, 15), (9, 8)])
def test_umap_is_asked_for_distances(monkeypatch, n, neighbors):
    asked = {}

    class Fake:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, distances):
            asked["shape"] = distances.shape
            return points(n, 2).astype(np.float32)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Fake))
    found = embed(between(points(n)), method="umap", **{**OPTIONS, "random_state": 7})
    expected = {"n_components": 2, "metric": "precomputed", "n_neighbors": neighbors, "random_state": 7}
    assert asked == {**expected, "shape": (n, n)}
    assert found.coordinates.dtype == np.float64


def test_layers_are_embedded_one_by_one():
    distances = np.stack([between(points(seed=seed)) for seed in range(3)])
    coordinates, rank, mass = embed_layers(distances, method="diffusion", **OPTIONS)
    assert coordinates.shape == (3, 25, 2)
    for layer in range(3):
        alone = embed(distances[layer], method="diffusion", **OPTIONS)
        np.testing.assert_array_equal(coordinates[layer], alone.coordinates)
        assert (rank[layer], mass[layer]) == alone[1:]
    _, rank, mass = embed_layers(distances, method="pca", **OPTIONS)
    assert np.isnan(rank).all() and np.isnan(mass).all() and rank.dtype == np.float64


def test_a_coordinate_without_spread_is_refused_by_its_layer():
    line = points()[:, :1] * np.ones(6)  # one dimension only: the second component is rounding
    with pytest.raises(SimilarityError, match="layer 1: embedding pca has no spread in coordinate 1"):
        embed_layers(np.stack([between(points()), between(line)]), method="pca", **OPTIONS)
    with pytest.raises(SimilarityError, match="layer 0: all distances are 0"):
        embed_layers(np.zeros((2, 6, 6)), method="diffusion", **OPTIONS)


@pytest.mark.parametrize("method", EMBEDDINGS)
def test_every_method_refuses_the_same(method):
    with pytest.raises(SimilarityError, match="dimensions is 4, but 5 samples"):
        embed(between(points(5)), method=method, **{**OPTIONS, "dimensions": 4})
    with pytest.raises(SimilarityError, match="not finite"):
        embed(np.full((5, 5), np.nan), method=method, **OPTIONS)


def test_an_unknown_method_is_refused():
    with pytest.raises(SimilarityError, match="embedding is 'isomap', but should be one of diffusion"):
        embed(between(points()), method="isomap", **OPTIONS)
