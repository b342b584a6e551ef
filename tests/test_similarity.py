"""Similarities against scikit-learn, closed forms and plain loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import multivariate_normal, rankdata
from sklearn.feature_selection import mutual_info_regression

from raymerge.diffusion import SimilarityError
from raymerge.embedding import embed_layers
from raymerge.similarity import (
    MEASURES,
    Recipe,
    cka,
    compute,
    cosine,
    features,
    gaussian,
    knn_entropy,
    mutual_information,
    npib,
    pearson,
    smallest_sample,
)

RECIPE = Recipe("npib", "diffusion", 2, "median", 0.5, 5, 20, 0)


def related(n_layers=4, n=30, d=2, seed=0, noise=0.5):
    """Layers (L, N, d), each the one before plus noise."""
    steps = np.random.default_rng(seed).normal(size=(n_layers, n, d))
    steps[1:] *= noise
    return np.cumsum(steps, axis=0)


def between(layers):
    return np.linalg.norm(layers[:, :, None] - layers[:, None], axis=-1)


def with_(**changes):
    return dataclasses.replace(RECIPE, **changes)


# --- mutual information and entropy -------------------------------------------------------------------------------


def looped_information(first, second, k, seed):
    n_layers, _, d = first.shape
    found = np.zeros((n_layers, n_layers))
    for i in range(n_layers):
        for j in range(n_layers):
            found[i, j] = np.mean(
                [mutual_info_regression(first[i], second[j][:, b], n_neighbors=k, random_state=seed) for b in range(d)]
            )
    return found


@pytest.mark.parametrize(
    ("n", "d", "k", "seed"), [(57, 2, 5, 0), (40, 3, 3, 11), (20, 1, 12, 5), (200, 2, 5, 1), (7, 2, 6, 2)]
)
def test_mutual_information_is_scikit_learns(n, d, k, seed):
    """Ranks, whose distances tie, and plain values; k above and below N / 2, where scikit-learn changes its method."""
    layers = related(3, n, d, seed)
    ranks = rankdata(layers, axis=1) / n
    for values in (layers, ranks, np.round(layers, 1)):
        found = mutual_information(values, values, neighbors=k, random_state=seed)
        np.testing.assert_allclose(found, looped_information(values, values, k, seed), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        mutual_information(ranks, ranks[:, ::-1], neighbors=k, random_state=seed),
        looped_information(ranks, ranks[:, ::-1], k, seed),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("rho", [0.3, 0.8, 0.95])
def test_mutual_information_of_a_bivariate_normal(rho):
    found = []
    for seed in range(4):
        sample = multivariate_normal([0, 0], [[1, rho], [rho, 1]], seed=seed).rvs(1500)
        x, y = (rankdata(column)[None, :, None] / 1500 for column in sample.T)  # ranks keep the information
        found.append(mutual_information(x, y, neighbors=5, random_state=0)[0, 0])
    assert np.mean(found) == pytest.approx(-0.5 * np.log(1 - rho**2), abs=0.03)


def test_knn_entropy_is_its_definition():
    x = np.random.default_rng(0).normal(size=(20, 3))
    radii = [sorted(np.linalg.norm(x - x[i], axis=1))[7] for i in range(20)]  # the 7th neighbour: 0 is itself
    expected = -np.mean([np.log(7 / (20 * r**3)) for r in radii])
    assert knn_entropy(x, neighbors=7) == pytest.approx(expected, rel=1e-12)


def test_knn_entropy_of_a_normal_but_for_the_unit_disc():
    x = np.random.default_rng(1).normal(size=(3000, 2))
    assert knn_entropy(x, neighbors=10) + np.log(np.pi) == pytest.approx(1 + np.log(2 * np.pi), abs=0.1)
    assert knn_entropy(np.ones((9, 2)), neighbors=3) == -np.inf


# --- npib ---------------------------------------------------------------------------------------------------------


def test_npib_is_a_plain_double_loop():
    layers = related(4, 57)
    ranks = rankdata(layers, axis=1) / 57
    information = looped_information(ranks, ranks, 5, 3)
    expected = np.zeros((4, 4))
    h = [knn_entropy(layer, neighbors=50) for layer in ranks]
    for i in range(4):
        for j in range(4):
            expected[i, j] = (information[i, j] + information[j, i]) / 2 / np.sqrt(h[i] * h[j])
    found = npib(layers, random_state=3)
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.values, found.values.T)
    assert found.notes == {}
    np.testing.assert_allclose(npib(np.exp(layers), random_state=3).values, expected, rtol=1e-12)  # ranks alone count


def test_npib_of_independent_embeddings_is_where_the_method_says():
    layers = np.random.default_rng(0).normal(size=(24, 57, 2))
    found = npib(layers).values
    entropies = [knn_entropy(rankdata(layer, axis=0) / 57, neighbors=50) for layer in layers]
    assert -0.36 < min(entropies) and max(entropies) < -0.12
    assert np.diag(found).mean() == pytest.approx(3.7, abs=0.3)
    assert found[np.triu_indices(24, 1)].mean() == pytest.approx(0.07, abs=0.015)


def test_npib_undefined_entries_carry_notes():
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(3, 40, 1))
    ranks = rankdata(layers, axis=1) / 40
    # one column: entropies hang on k alone, so that they are all near 0 at the right k
    entropies = [abs(knn_entropy(ranks[0], neighbors=k)) for k in range(1, 40)]
    k = 1 + int(np.argmin(entropies))
    assert min(entropies) < 0.05
    found = npib(layers, entropy_neighbors=k)
    assert np.isnan(found.values).all() and len(found.notes) == 9
    assert "nearer to 0 than 0.05" in found.notes[0, 1]
    # a diagonal line has points farther apart than a circle
    theta = rng.permutation(2 * np.pi * (np.arange(60) + 0.3) / 60)
    pair = np.stack([np.stack([theta, theta], axis=1), np.stack([np.cos(theta), np.sin(theta)], axis=1)])
    values = [knn_entropy(rankdata(layer, axis=0) / 60, neighbors=59) for layer in pair]
    assert values[0] > 0.05 and values[1] < -0.05
    found = npib(pair, entropy_neighbors=59)
    assert np.isnan(found.values[0, 1]) and np.isfinite(np.diag(found.values)).all()
    assert set(found.notes) == {(0, 1), (1, 0)} and "signs differ" in found.notes[0, 1]


def test_npib_refuses():
    layers = related(2, 40)
    with pytest.raises(SimilarityError, match="entropy_neighbors is 50, but 40 .*at most 39.*k <= 56.*similarity.ent"):
        npib(layers)
    with pytest.raises(SimilarityError, match="neighbors is 40, but 40 samples allow 1 to 39"):
        npib(layers, neighbors=40, entropy_neighbors=30)
    with pytest.raises(SimilarityError, match="3 samples are too few"):
        npib(layers[:, :3], neighbors=1, entropy_neighbors=1)
    layers[1, :, 1] = 3.0
    with pytest.raises(SimilarityError, match="layer 1: coordinate 1 of the embedding has no spread"):
        npib(layers, entropy_neighbors=30)
    layers[1, 7, 0] = np.nan
    with pytest.raises(SimilarityError, match="sample 7 at layer 1 are not finite"):
        npib(layers, entropy_neighbors=30)


# --- gaussian -----------------------------------------------------------------------------------------------------


def test_gaussian_of_single_columns_is_a_function_of_correlation_and_variance():
    layers = 5 * related(3, 30, 1)
    r = np.corrcoef(layers[:, :, 0])
    h = 0.5 * np.log(layers[:, :, 0].var(axis=1, ddof=1))
    off = ~np.eye(3, dtype=bool)
    expected = np.ones((3, 3))
    expected[off] = (-0.5 * np.log(1 - r[off] ** 2) / np.sqrt(np.outer(h, h)[off])).ravel()
    np.testing.assert_allclose(gaussian(layers).values, expected, rtol=1e-10)


def test_gaussian_is_the_published_formula():
    layers = 0.1 * related(4, 40, 3)
    found = gaussian(layers).values
    for i in range(4):
        for j in range(4):
            joint = np.cov(np.hstack([layers[i], layers[j]]).T)
            a, b = (np.linalg.slogdet(np.cov(layers[m].T))[1] for m in (i, j))
            if i == j:
                assert found[i, j] == 1
            else:
                expected = 0.5 * (a + b - np.linalg.slogdet(joint)[1]) / np.sqrt(0.25 * a * b)
                assert found[i, j] == pytest.approx(expected, rel=1e-9)


def test_gaussian_leaves_out_entropies_of_unlike_sign_and_near_zero():
    layers = related(3, 50, 2, noise=1.0)
    layers -= layers.mean(axis=1, keepdims=True)
    for layer, volume in enumerate((0.1, 1.0, 10.0)):  # |covariance| below, at and above 1
        root = np.linalg.cholesky(np.cov(layers[layer].T))
        layers[layer] = np.linalg.solve(root, layers[layer].T).T * np.sqrt(volume)
    found = gaussian(layers)
    defined = np.diag([True, False, True])
    np.testing.assert_array_equal(np.isfinite(found.values), defined)
    assert set(found.notes) == {(i, j) for i in range(3) for j in range(3) if not defined[i, j]}
    assert "signs differ" in found.notes[0, 2] and "nearer to 0" in found.notes[1, 1]


def test_gaussian_is_undefined_between_layers_that_determine_each_other():
    layers = 5 * related(4, 30, 2)
    layers[2] = layers[0] @ np.array([[1, 2], [0, 1]])
    found = gaussian(layers)
    expected = np.ones((4, 4), dtype=bool)
    expected[0, 2] = expected[2, 0] = False
    np.testing.assert_array_equal(np.isfinite(found.values), expected)
    assert set(found.notes) == {(0, 2), (2, 0)} and "infinite information" in found.notes[0, 2]
    others = gaussian(layers[[0, 1, 3]]).values
    np.testing.assert_allclose(found.values[np.ix_([0, 1, 3], [0, 1, 3])], others, rtol=1e-12)


def test_gaussian_needs_samples_for_its_covariances():
    with pytest.raises(SimilarityError, match="4 samples cannot fill.*at least 5"):
        gaussian(related(2, 4, 2))
    gaussian(related(2, 5, 2))


# --- cosine and cka -----------------------------------------------------------------------------------------------


def test_cosine_is_the_mean_over_samples():
    states = related(3, 10, 7)
    found = cosine(states.astype(np.float32)).values
    for i in range(3):
        for j in range(3):
            cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(states[i], states[j], strict=True)]
            assert found[i, j] == pytest.approx(np.mean(cosines), rel=1e-6)
    states[1, 4] = 0
    with pytest.raises(SimilarityError, match="sample 4 at layer 1 is 0"):
        cosine(states)


def test_cka_of_distances_is_cka_of_states():
    states = related(3, 20, 7) + 10
    found = cka(between(states)).values
    for i in range(3):
        for j in range(3):
            x, y = (states[m] - states[m].mean(axis=0) for m in (i, j))
            usual = np.sum((y.T @ x) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
            assert found[i, j] == pytest.approx(usual, rel=1e-9)
    distances = between(states)
    distances[1] = 0
    with pytest.raises(SimilarityError, match="layer 1: all distances are 0"):
        cka(distances)


# --- compute ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_a_permutation_reorders_the_deeper_layer_of_each_pair(measure):
    """Against the unpermuted measure of two layers at a time, of which the deeper is reordered by hand."""
    rng = np.random.default_rng(0)
    layers = related(3, 30, 4)
    recipe = with_(measure=measure, embedding="diffusion_gaussian")
    orders = np.stack([rng.permutation(30) for _ in range(3)])
    found = compute(recipe, between(layers), layers, permutations=orders).values
    for i in range(3):
        for j in range(3):
            first, second = sorted((i, j))
            pair = np.stack([layers[first], layers[second][orders[second]]])
            # as they stand, but in one order: the mean of npib's two is over ties broken either way
            as_they_are = np.tile(np.arange(30), (2, 1))
            expected = compute(recipe, between(pair), pair, permutations=as_they_are).values[0, 1]
            assert found[i, j] == pytest.approx(expected, rel=1e-6)
    same = compute(recipe, between(layers), layers).values
    identity = np.tile(np.arange(30), (3, 1))
    if measure != "gaussian":  # whose diagonal is infinite then
        orders = [
            compute(recipe, between(turned), turned, permutations=identity).values for turned in (layers, layers[::-1])
        ]
        np.testing.assert_allclose((orders[0] + orders[1][::-1, ::-1]) / 2, same, rtol=1e-12)


def test_permuted_layers_are_unrelated():
    layers = related(6, 57, 3, noise=0.1)
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(57) for _ in range(6)])
    recipe = with_(embedding="pca", entropy_neighbors=50)
    plain = compute(recipe, between(layers)).values
    null = compute(recipe, between(layers), permutations=orders).values
    assert plain.min() > 1 and null.mean() < 0.2


@pytest.mark.parametrize("measure", MEASURES)
def test_rows_are_all_there_is(measure):
    layers, rows = related(3, 30, 4), np.random.default_rng(0).permutation(30)[:21]
    recipe = with_(measure=measure, embedding="diffusion_gaussian", entropy_neighbors=20)
    found = compute(recipe, between(layers), layers, rows=rows).values
    fewer = dataclasses.replace(recipe, entropy_neighbors=14)  # 20 of 30, 14 of 21
    np.testing.assert_allclose(found, compute(fewer, between(layers[:, rows]), layers[:, rows]).values, rtol=1e-9)


def test_the_share_of_entropy_neighbours_stays_below_the_sample():
    layers = related(2, 40)
    recipe = with_(embedding="pca", entropy_neighbors=39)
    assert compute(recipe, between(layers), rows=np.arange(20)).values.shape == (2, 2)  # 39 / 2 rounds to 20
    with pytest.raises(SimilarityError, match="entropy_neighbors is 40"):
        compute(with_(entropy_neighbors=40), between(layers), rows=np.arange(20))


def test_compute_is_features_then_measure():
    distances = between(related(3, 25))
    embeddings = embed_layers(
        distances, method="diffusion", dimensions=2, sigma="median", anisotropy=0.5, random_state=0
    )[0]
    np.testing.assert_array_equal(features(RECIPE, distances), embeddings)
    np.testing.assert_array_equal(
        compute(RECIPE, distances).values, npib(embeddings, neighbors=5, entropy_neighbors=20).values
    )


def test_compute_refuses():
    layers = related(3, 30)
    distances = between(layers)
    with pytest.raises(SimilarityError, match="cosine needs pooling last or mean"):
        compute(with_(measure="cosine"), distances)
    with pytest.raises(SimilarityError, match="measure is 'cca', but should be one of npib, gaussian"):
        with_(measure="cca")
    with pytest.raises(SimilarityError, match="embedding is 'isomap'"):
        with_(embedding="isomap")
    with pytest.raises(SimilarityError, match=r"shape \(30, 30\)"):
        compute(RECIPE, distances[0])
    with pytest.raises(SimilarityError, match="0 to 29"):
        compute(RECIPE, distances, rows=[0, 1, 2, 30])
    with pytest.raises(SimilarityError, match="twice"):
        compute(RECIPE, distances, rows=[0, 1, 2, 3, 3])
    with pytest.raises(SimilarityError, match="3 orders of the numbers 0 to 29"):
        compute(RECIPE, distances, permutations=np.zeros((3, 30), dtype=int))
    distances[2, 4, 5] = np.nan
    for measure in ("npib", "cka"):
        with pytest.raises(SimilarityError, match="layer 2: 1 distances are not finite"):
            compute(with_(measure=measure), distances)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dimensions", [1, 3])
def test_the_smallest_sample_is_enough_and_one_less_is_not(measure, dimensions):
    layers = related(2, 30, 6)
    recipe = with_(measure=measure, embedding="pca", dimensions=dimensions)
    least = smallest_sample(recipe)
    compute(recipe, between(layers), layers, rows=np.arange(least))
    with pytest.raises(SimilarityError):
        compute(recipe, between(layers), layers, rows=np.arange(least - 1))


# --- matrices -----------------------------------------------------------------------------------------------------


def test_pearson_is_numpys_over_the_chosen_entries():
    rng = np.random.default_rng(0)
    a, b = (m + m.T for m in rng.normal(size=(2, 6, 6)))
    above = np.triu_indices(6, 1)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], rel=1e-12)
    assert pearson(a, b, off_diagonal=True) == pytest.approx(np.corrcoef(a[above], b[above])[0, 1], rel=1e-12)
    assert pearson(a, 1e-9 * a) == pytest.approx(1) and pearson(a, 3 - a) == pytest.approx(-1)
    holed = a.copy()
    holed[1, 2] = holed[2, 1] = np.nan
    kept = [i != 1 or j != 2 for i, j in zip(*above, strict=True)]
    assert pearson(holed, b, off_diagonal=True) == pytest.approx(np.corrcoef(a[above][kept], b[above][kept])[0, 1])


def test_pearson_refuses():
    a = np.arange(9.0).reshape(3, 3)
    with pytest.raises(SimilarityError, match="same value everywhere"):
        pearson(a, np.full((3, 3), 0.1))
    with pytest.raises(SimilarityError, match="only 1 entries"):
        pearson(a[:2, :2], a[:2, :2], off_diagonal=True)
    with pytest.raises(SimilarityError, match=r"\(3, 3\) and \(2, 2\)"):
        pearson(a, a[:2, :2])
