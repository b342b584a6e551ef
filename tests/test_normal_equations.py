"""Streamed least squares against solutions of the whole problem at once."""

import pickle

import numpy as np
import pytest
import torch

from raymerge.normal_equations import NormalEquations, RefitError, choose_ridge, products_for

N, D, TOKENS = 12, 5, 400


def problem(tokens=TOKENS, noise=0.3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, N, dtype=torch.float64)
    x = torch.randn(tokens, N, generator=generator, dtype=torch.float64) * scales
    truth = torch.linspace(-1, 1, N * D, dtype=torch.float64).reshape(N, D)
    r = x @ truth + noise * torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    w = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1
    return x.to(dtype), r.to(dtype), w.to(dtype)


def equations(x, r, w):
    found = NormalEquations.empty(x.shape[1], r.shape[1])
    found.add(x, r, w)
    return found


def direct(x, r, w, ridge):
    """The ridge solution as an ordinary one: rows sqrt(ridge * mean diagonal) * I with residual 0 appended."""
    root = w.double().sqrt()[:, None].numpy()
    a, b = root * x.double().numpy(), root * r.double().numpy()
    extra = np.sqrt(ridge * (a**2).sum() / a.shape[1]) * np.eye(a.shape[1])
    return np.linalg.lstsq(np.concatenate([a, extra]), np.concatenate([b, np.zeros((len(extra), b.shape[1]))]))[0]


@pytest.mark.parametrize("ridge", [1e-9, 0.1, 10.0])
def test_the_solution_is_that_of_least_squares(ridge):
    x, r, w = problem()
    np.testing.assert_allclose(equations(x, r, w).solve(ridge).numpy(), direct(x, r, w, ridge), rtol=1e-6, atol=1e-9)


def test_sums_of_parts_are_the_sums_of_the_whole():
    x, r, w = problem(5000)  # more than two tiles
    whole = equations(x, r, w)
    cuts = [0, 1, 700, 2900, 5000]
    parts = [equations(x[a:b], r[a:b], w[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    before = parts[0].gram.clone()
    total = NormalEquations.total(parts)
    torch.testing.assert_close(total.gram, whole.gram, rtol=1e-12, atol=0)
    torch.testing.assert_close(total.cross, whole.cross, rtol=1e-10, atol=1e-10)
    assert total.tokens == 5000 and total.weight == pytest.approx(float(w.sum()))
    torch.testing.assert_close(total.solve(0.01), whole.solve(0.01), rtol=1e-9, atol=1e-9)
    assert torch.equal(parts[0].gram, before)  # a part may be used again
    # One part after the other into the same sums, too.
    streamed = NormalEquations.empty(N, D)
    for a, b in zip(cuts, cuts[1:], strict=False):
        streamed.add(x[a:b], r[a:b], w[a:b])
    torch.testing.assert_close(streamed.gram, whole.gram, rtol=1e-12, atol=0)


def test_sums_are_the_same_after_a_journey_and_half_as_large():
    x, r, w = problem()
    whole, parts = equations(x, r, w), [equations(x[:150], r[:150], w[:150]), equations(x[150:], r[150:], w[150:])]
    packed = [pickle.loads(pickle.dumps(part.pack())) for part in parts]
    total = NormalEquations.total(packed)
    torch.testing.assert_close(total.gram, whole.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.cross, whole.cross, rtol=1e-10, atol=1e-10)
    assert (total.power, total.weight, total.tokens) == (
        pytest.approx(whole.power),
        pytest.approx(whole.weight),
        TOKENS,
    )
    assert packed[0].triangle.size == N * (N + 1) // 2
    packed[0].triangle.flags.writeable = packed[0].cross.flags.writeable = False  # as Ray hands them out
    torch.testing.assert_close(NormalEquations.total(packed[:1]).gram, parts[0].gram, rtol=1e-12, atol=1e-12)
    assert NormalEquations.total(parts[:1]) is parts[0]  # nothing is copied in vain


def test_bfloat16_tokens_are_multiplied_in_float32_and_summed_in_float64():
    x, r, w = problem(6000, dtype=torch.bfloat16)
    found, exact = equations(x, r, w), equations(x.double(), r.double(), w.double())
    assert found.gram.dtype == torch.float64
    torch.testing.assert_close(found.gram, exact.gram, rtol=1e-5, atol=1e-4 * float(exact.gram.diagonal().mean()))


@pytest.mark.parametrize(("ridge", "features"), [(1e-6, 192), (1e-4, 192), (1e-3, 1024)])
def test_a_weak_ridge_is_not_drowned_by_what_products_round_off(ridge, features):
    """Where there are fewer tokens than features the ridge alone decides in the other directions: noise of float32
    products took its place there, and of several ridges it made a matrix that could not be factorised."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(137, features, generator=generator) + 2 * torch.randn(features, generator=generator)
    r, w = torch.randn(137, D, generator=generator), torch.ones(137)
    found = NormalEquations.empty(features, D)
    found.add(x, r, w, products=products_for(ridge, features))
    solution, wanted = found.solve(ridge), torch.from_numpy(direct(x, r, w, ridge))
    assert float((solution - wanted).norm() / wanted.norm()) < 1e-3
    left = (r.double() - x.double() @ wanted).square().sum() / 137
    assert found.error(solution) == pytest.approx(float(left), rel=0.02)


def test_ridges_that_are_chosen_need_no_float64_products():
    assert products_for(0.01, 18_944) == products_for(None, 18_944) == torch.float32
    assert products_for(1e-6, 192) == products_for(0.001, 8_960) == torch.float64


def test_an_error_is_never_below_zero():
    """It is a sum of squares, computed as a difference of sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 60, generator=generator)
    r, w = x @ torch.randn(60, D, generator=generator), torch.ones(40)
    sums = equations(x, r, w)
    errors = [sums.error(sums.solve(ridge)) for ridge in np.geomspace(1e-6, 1e-3, 20)]
    assert min(errors) >= 0.0
    assert np.isnan(sums.error(torch.full((60, D), np.nan, dtype=torch.float64)))


def test_the_error_is_that_of_the_tokens():
    x, r, w = problem()
    other, (y, s, v) = torch.randn(N, D, dtype=torch.float64), problem(70, seed=3)
    expected = (v[:, None] * (s - y @ other) ** 2).sum() / v.sum()
    assert equations(y, s, v).error(other) == pytest.approx(float(expected))
    # Least squares has the least error on its own tokens.
    sums = equations(x, r, w)
    assert sums.error(sums.solve(1e-9)) < sums.error(sums.solve(0.5)) < sums.error(torch.zeros(N, D).double())


def test_the_chosen_ridge_is_that_of_the_least_held_out_error():
    x, r, w = problem(20, noise=8.0)
    y, s, v = problem(200, noise=8.0, seed=1)
    ridges = (1e-6, 1e-3, 1e-1, 10.0)
    errors = []
    for ridge in ridges:
        left = s.numpy() - y.numpy() @ direct(x, r, w, ridge)
        errors.append((v[:, None].numpy() * left**2).sum() / float((v[:, None] * s**2).sum()))
    ridge, error = choose_ridge(equations(x, r, w), equations(y, s, v), ridges)
    assert ridge == ridges[int(np.argmin(errors))] != ridges[0] and error == pytest.approx(min(errors))


def test_a_diagonal_map_fits_each_feature_to_its_own_residual():
    x, _, w = problem()
    scales = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    sums = equations(x, x * scales, w)
    torch.testing.assert_close(sums.scale(1e-12), scales, rtol=1e-7, atol=0)
    assert sums.scale(1.0)[0] < 0.01  # a feature far below the mean square is held where it is


def test_no_tokens_are_refused_and_features_that_are_zero_change_nothing():
    with pytest.raises(RefitError, match="no calibration token"):
        NormalEquations.empty(3, 2).solve(0.1)
    with pytest.raises(RefitError, match="of 400 calibration tokens none is left to choose the ridge on"):
        choose_ridge(equations(*problem()), NormalEquations.empty(N, D), (0.1, 1.0))
    x, r, w = problem(tokens=30)
    with pytest.raises(RefitError, match="of 430 calibration tokens none is left"):  # there are some, of no weight
        choose_ridge(equations(*problem()), equations(x, r, 0.0 * w), (0.1, 1.0))
    silent = equations(torch.zeros(10, 3), torch.ones(10, 3), torch.ones(10))
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(silent.solve(0.1), nothing) and torch.equal(silent.scale(0.1), nothing[0])
    # A feature that is zero next to others, whatever the ridge.
    x, r, w = problem()
    x[:, 3] = 0.0
    assert equations(x, r, w).solve(1e-9)[3].abs().max() == 0
