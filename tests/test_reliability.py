"""Noise around matrices, against exact standard errors and planted structure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from raymerge.diffusion import SimilarityError
from raymerge.reliability import Study, correlate, correlate_matrices, jackknife_variance, study
from raymerge.similarity import Recipe, SimilarityMatrix, compute, pearson


def recipe(measure="cosine", embedding="pca", k=15):
    return Recipe(measure, embedding, 2, "median", 0.5, 3, k, 0)


def between(layers):
    return np.linalg.norm(layers[:, :, None] - layers[:, None], axis=-1)


def sample(n, strength, *, n_layers=10, d=8, seed=0, noise=0):
    """Layers (L, N, d): `strength` times a walk that is the same for every sample, plus noise of 1 a value.

    `noise` seeds the samples and `seed` the walk, so that samples of the same kind can be drawn again.
    """
    walk = np.cumsum(np.random.default_rng(seed).normal(size=(n_layers, 1, d)), axis=0)
    return strength * walk + np.random.default_rng([seed, noise]).normal(size=(n_layers, n, d))


def test_the_jackknife_over_all_subsets_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=7)
    for m in (1, 3, 5, 6):
        draws = np.array([np.mean(x[list(chosen)]) for chosen in itertools.combinations(range(7), m)])
        all_of_them = (len(draws) - 1) / len(draws)  # no draw but these: the plain variance
        assert all_of_them * jackknife_variance(draws, m, 7) == pytest.approx(x.var(ddof=1) / 7, rel=1e-12)


def test_the_jackknife_leaves_undefined_draws_out():
    draws = np.random.default_rng(0).normal(size=(20, 2, 2))
    holed = draws.copy()
    holed[5:, 0, 1] = np.nan
    holed[2:, 1, 1] = np.nan
    holed[1:, 1, 0] = np.nan
    found = jackknife_variance(holed, 8, 10)
    assert found[0, 0] == pytest.approx(4 * draws[:, 0, 0].var(ddof=1))
    assert found[0, 1] == pytest.approx(4 * draws[:5, 0, 1].var(ddof=1))
    assert found[1, 1] == pytest.approx(4 * draws[:2, 1, 1].var(ddof=1))
    assert np.isnan(found[1, 0])


def test_intervals_of_a_mean_have_its_exact_width():
    states = sample(30, 0.3, n_layers=4)
    unit = states / np.linalg.norm(states, axis=2, keepdims=True)
    cosines = np.einsum("isd,jsd->sij", unit, unit)
    found = study(recipe(), None, states, null_draws=1, interval_draws=3000, half_draws=0)
    assert found.draw_size == 24 and found.n_samples == 30
    np.testing.assert_allclose(found.matrix.values, cosines.mean(axis=0), rtol=1e-12)
    off = np.triu_indices(4, 1)
    exact = 1.959964 * cosines.std(axis=0, ddof=1) / np.sqrt(30)
    np.testing.assert_allclose((found.ci_high - found.ci_low)[off] / 2, exact[off], rtol=0.06)
    np.testing.assert_allclose((found.ci_high + found.ci_low)[off] / 2, found.matrix.values[off], rtol=1e-9)


def test_the_null_is_what_unrelated_layers_score():
    shared = np.random.default_rng(1).normal(size=(1, 25, 3))
    layers = shared + 0.2 * np.random.default_rng(2).normal(size=(5, 25, 3))
    unrelated = np.random.default_rng(3).normal(size=(5, 25, 3))
    for measure in ("npib", "cka"):
        found = study(recipe(measure), between(layers), interval_draws=5, half_draws=0)
        assert np.all(found.matrix.values > found.null_p95)
        assert np.all(found.null_p95 >= found.null_mean)
        expected = compute(recipe(measure), between(unrelated)).values[np.triu_indices(5, 1)].mean()
        assert found.null_mean.mean() == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("measure", ["cka", "gaussian"])
def test_unrelated_layers_exceed_the_nulls_95th_percentile_in_5_percent_of_pairs(measure):
    above = []
    for seed in range(40):
        layers = 3 * np.random.default_rng(seed).normal(size=(8, 30, 2))  # entropies of gaussian well above 0
        found = study(recipe(measure), between(layers), null_draws=20, interval_draws=2, half_draws=0)
        pairs = np.triu_indices(8, 1)
        above.append(np.mean(found.matrix.values[pairs] > found.null_p95[pairs]))
    # 1,120 pairs, of which those of one seed are nearly independent: a standard error of 0.7 %
    assert 0.03 < np.mean(above) < 0.07


@pytest.mark.parametrize("measure", ["npib", "gaussian", "cka"])
def test_a_study_has_its_shapes_and_repeats_itself(measure):
    layers = 3 * sample(24, 1.0, n_layers=3)
    options = {"null_draws": 3, "interval_draws": 4, "half_draws": 2}
    first, second = (study(recipe(measure), between(layers), **options) for _ in range(2))
    assert first.draws.shape == (4, 3, 3) and first.halves.shape == (2, 2, 3, 3)
    assert first.draw_size == 20 and first.n_samples == 24
    for name in ("null_mean", "null_p95", "ci_low", "ci_high", "draws", "halves"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert np.isfinite(getattr(first, name)).all()
    np.testing.assert_array_equal(first.matrix.values, compute(recipe(measure), between(layers)).values)
    more = study(recipe(measure), between(layers), **{**options, "null_draws": 5})
    np.testing.assert_array_equal(more.draws, first.draws)  # subsets hang on N and seed alone
    other = study(recipe(measure), between(layers), **options, random_state=1)
    assert not np.array_equal(other.draws, first.draws)


def test_undefined_entries_have_no_interval_and_no_null():
    layers = 5 * np.random.default_rng(0).normal(size=(4, 20, 2))
    layers[2] -= layers[2].mean(axis=0)
    layers[2] = np.linalg.solve(np.linalg.cholesky(np.cov(layers[2].T)), layers[2].T).T  # covariance 1: entropy 0
    found = study(recipe("gaussian"), between(layers))
    undefined = np.zeros((4, 4), dtype=bool)
    undefined[2], undefined[:, 2] = True, True
    for values in (found.matrix.values, found.null_mean, found.null_p95, found.ci_low, found.ci_high):
        np.testing.assert_array_equal(np.isnan(values), undefined)
    assert correlate(found, found).pearson_off_diagonal == pytest.approx(1)


def test_reliability_rises_with_samples_between_noise_and_structure():
    def mean(n):
        return np.mean([study(recipe(), None, sample(n, 0.2, seed=s), null_draws=1).reliability for s in range(4)])

    rising = [mean(n) for n in (8, 40, 200)]
    assert rising[0] + 0.1 < rising[1] < rising[2] - 0.1 and rising[2] > 0.8, rising
    assert study(recipe(), None, sample(60, 3.0), null_draws=1).reliability > 0.99
    noise = [study(recipe(), None, sample(60, 0.0, noise=seed), null_draws=1).reliability for seed in range(6)]
    assert abs(np.mean(noise)) < 0.2


def test_reliability_foretells_the_correlation_with_other_samples():
    """What Spearman and Brown's step promises: the correlation of N samples' matrix with another N samples'."""
    foretold, found = [], []
    for seed in range(8):
        a, b = (sample(24, 0.2, noise=noise, seed=seed) for noise in (1, 2))
        foretold.append(study(recipe(), None, a, null_draws=1).reliability)
        found.append(pearson(compute(recipe(), None, a).values, compute(recipe(), None, b).values, off_diagonal=True))
    assert np.mean(foretold) == pytest.approx(np.mean(found), abs=0.06)


def test_npib_tells_structure_from_noise():
    rng = np.random.default_rng(0)
    block = np.repeat(rng.normal(size=(3, 40, 2)), [3, 3, 2], axis=0)  # layers 0-2, 3-5 and 6-7 are alike
    planted, noise = block + 0.1 * rng.normal(size=block.shape), rng.normal(size=block.shape)
    options = {"null_draws": 1, "interval_draws": 2, "half_draws": 10}
    assert study(recipe("npib", k=30), between(planted), **options).reliability > 0.9
    assert abs(study(recipe("npib", k=30), between(noise), **options).reliability) < 0.5


def test_a_correlation_with_paired_samples_is_surer_than_with_others():
    """Translations: the second subset is the first with a little noise of its own."""
    states = sample(40, 0.3)
    a = study(recipe(), None, states)
    close = study(recipe(), None, states + 0.1 * np.random.default_rng(5).normal(size=states.shape))
    apart = study(recipe(), None, sample(40, 0.3, noise=1))
    paired, single = correlate(a, close), correlate(a, apart)
    for found, other in ((paired, close), (single, apart)):
        assert found.ci_low < found.pearson_off_diagonal < found.ci_high < 1
        assert found.pearson == pytest.approx(pearson(a.matrix.values, other.matrix.values))
        assert (found.reliability_a, found.reliability_b) == (a.reliability, other.reliability)
    assert np.ptp(np.arctanh([paired.ci_low, paired.ci_high])) < 0.9 * np.ptp(
        np.arctanh([single.ci_low, single.ci_high])
    )
    itself = correlate(a, a)
    assert itself.ci_low == pytest.approx(1) and itself.ci_high == pytest.approx(1)


def test_the_interval_has_the_width_of_repeated_sampling():
    """Fisher's z of two fresh subsets, many times over, against the interval that one pair of studies gives."""
    fresh, widths = [], []
    for seed in range(60):
        a, b = sample(40, 0.4, noise=2 * seed), sample(40, 0.4, noise=2 * seed + 1)
        fresh.append(correlate_matrices(compute(recipe(), None, a), compute(recipe(), None, b)).pearson_off_diagonal)
        if seed < 8:
            found = correlate(*(study(recipe(), None, x, null_draws=1, half_draws=0) for x in (a, b)))
            widths.append(np.ptp(np.arctanh([found.ci_low, found.ci_high])) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(np.std(np.arctanh(fresh), ddof=1), rel=0.4)


def test_unlike_numbers_of_samples_can_be_correlated():
    def of(n, draws=40, noise=0):
        return study(recipe(), None, sample(n, 0.3, noise=noise), null_draws=1, half_draws=0, interval_draws=draws)

    found = correlate(of(40), of(24, noise=1))
    assert found.ci_low < found.pearson_off_diagonal < found.ci_high
    # variances of unrelated samples add up, whether drawn together (equal numbers of draws) or one by one
    widths = [
        np.ptp(np.arctanh([each.ci_low, each.ci_high]))
        for each in (correlate(of(40, 400), of(40, n_draws, noise=1)) for n_draws in (400, 401))
    ]
    assert widths[0] == pytest.approx(widths[1], rel=0.2)


def test_bare_matrices_are_correlated_without_an_interval():
    a, b = (compute(recipe(), None, sample(20, 0.3, noise=noise)) for noise in (0, 1))
    found = correlate_matrices(a, b.values)
    assert found.pearson == pearson(a.values, b.values)
    assert found.pearson_off_diagonal == pearson(a.values, b.values, off_diagonal=True)
    assert (found.ci_low, found.ci_high, found.reliability_a, found.reliability_b) == (None,) * 4


def test_halves_too_small_are_left_out_and_draws_too_small_refused():
    layers = sample(9, 1.0, n_layers=4)
    found = study(recipe("gaussian"), between(3 * layers), null_draws=2, interval_draws=3)  # 4 samples, but 5 needed
    assert found.halves.shape == (0, 2, 4, 4) and found.reliability is None
    with pytest.raises(
        SimilarityError, match="4 samples are too few: .* from 3 of them .* needs 4; take at least 5 samples"
    ):
        study(recipe("npib", k=3), between(layers[:, :4]), null_draws=2, interval_draws=3)


def test_halves_are_equally_large_and_share_no_sample(monkeypatch):
    """Of 21 samples one is left out each time."""
    asked = []

    def recorded(*args, rows=None):
        asked.append(rows)
        return compute(*args, rows=rows)

    monkeypatch.setattr("raymerge.reliability.compute", recorded)
    states = sample(21, 1.0, n_layers=3)
    found = study(recipe(), None, states, interval_draws=2, half_draws=5)
    halves = np.array(asked[2:]).reshape(5, 2, 10)
    assert all(len(set(pair.ravel())) == 20 for pair in halves) and len({tuple(pair.ravel()) for pair in halves}) == 5
    for values, rows in zip(found.halves.reshape(10, 3, 3), halves.reshape(10, 10), strict=True):
        np.testing.assert_array_equal(values, compute(recipe(), None, states[:, rows]).values)


def test_of_two_layers_there_is_no_correlation_off_the_diagonal():
    found = study(recipe("gaussian"), between(3 * sample(20, 0.3, n_layers=2)), interval_draws=3)
    with pytest.raises(SimilarityError, match="only 1 entries are defined in both matrices"):
        correlate(found, found)


def test_options_out_of_range_are_refused():
    states = sample(20, 1.0)
    for options in ({"null_draws": 0}, {"interval_draws": 1}, {"half_draws": -1}):
        with pytest.raises(SimilarityError, match="at least"):
            study(recipe(), None, states, **options)
    with pytest.raises(SimilarityError, match="confidence is 95"):
        study(recipe(), None, states, confidence=95)
    found = study(recipe(), None, states)
    with pytest.raises(SimilarityError, match="confidence is 1,"):
        correlate(found, found, confidence=1)


@pytest.mark.parametrize("half_draws", [0, 2])
def test_a_study_comes_back_from_its_arrays(half_draws):
    found = study(recipe(), None, sample(12, 0.3, n_layers=3), interval_draws=2, half_draws=half_draws)
    found.matrix.notes[0, 1] = "an entropy near 0: é"
    arrays = {name: np.array(array) for name, array in found.arrays().items()}
    again = Study.from_arrays(arrays)
    assert again.matrix.notes == found.matrix.notes and (again.draw_size, again.n_samples) == (10, 12)
    for name in ("null_mean", "null_p95", "ci_low", "ci_high", "draws", "halves"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    np.testing.assert_array_equal(again.matrix.values, found.matrix.values)
    assert again.reliability == found.reliability


def test_two_studies_are_correlated_by_products_and_undefined_draws_as_matrices_are(monkeypatch):
    """2,394 subsets are 2.9 million pairs: looked at draw by draw they took hours of the driver."""
    rng = np.random.default_rng(0)

    def made(*, n_draws=6, n_samples=40):
        values = rng.normal(size=(7, 7))
        draws = values + values.T + rng.normal(0, 0.1, (n_draws, 7, 7))
        matrix = SimilarityMatrix(values + values.T, {})
        return Study(matrix, *[values] * 4, draws=draws, draw_size=32, halves=draws[:0, None], n_samples=n_samples)

    def slowly(a, b):
        if len(a.draws) == len(b.draws):
            drawn = [(a, [(x, y) for x, y in zip(a.draws, b.draws, strict=True)])]
        else:
            whole_a, whole_b = a.matrix.values, b.matrix.values
            drawn = [(a, [(x, whole_b) for x in a.draws]), (b, [(whole_a, y) for y in b.draws])]
        z = [np.arctanh([pearson(x, y, off_diagonal=True) for x, y in each]) for _, each in drawn]
        variance = sum(jackknife_variance(r, of.draw_size, of.n_samples) for r, (of, _) in zip(z, drawn, strict=True))
        whole = pearson(a.matrix.values, b.matrix.values, off_diagonal=True)
        margin = 1.959963984540054 * np.sqrt(variance)
        return [pearson(a.matrix.values, b.matrix.values), whole, *np.tanh(np.arctanh(whole) + [-margin, margin])]

    def values(found):
        return [found.pearson, found.pearson_off_diagonal, found.ci_low, found.ci_high]

    a, b, fewer, patchy = made(), made(), made(n_draws=5), made()
    patchy.draws[2, 1, 3] = patchy.draws[2, 3, 1] = patchy.draws[4, 0, 1] = np.nan
    patchy.matrix.values[5, 6] = patchy.matrix.values[6, 5] = np.nan
    for first, second in ((a, b), (a, fewer), (fewer, a), (a, patchy), (patchy, fewer)):
        assert values(correlate(first, second)) == pytest.approx(slowly(first, second), rel=1e-9)

    def one_by_one(*_, **__):
        raise AssertionError("looked at one by one")

    monkeypatch.setattr("raymerge.reliability.pearson", one_by_one)
    correlate(a, b), correlate(fewer, b)
