"""assignment.py: against all permutations, against scipy's dense solver, and what is refused."""

from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import raymerge.assignment
from raymerge.assignment import AssignmentError, assign


def total(cost, order):
    return cost[np.arange(len(cost)), order].astype(np.float64).sum()


@pytest.fixture(params=["plain", "reduced"])
def way(request, monkeypatch):
    """Both ways on matrices of any size: scipy's solver alone, and on reduced costs."""
    monkeypatch.setattr(raymerge.assignment, "_DENSE", 10**9 if request.param == "plain" else 0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_no_permutation_is_cheaper(way, n):
    rng = np.random.default_rng(n)
    orders = np.array(list(permutations(range(n))))
    for cost in (
        rng.standard_normal((n, n)),
        rng.standard_normal((n, n)).astype(np.float32),
        rng.integers(0, 3, (n, n)).astype(float),  # ties
        np.outer(rng.random(n), rng.random(n)),
        np.zeros((n, n)),
        np.full((n, n), -7.25) + rng.random((n, 1)),  # each row's costs alike
        rng.standard_normal((n, n)) * 10.0 ** rng.integers(-8, 8, (n, 1)),
        1e6 + rng.standard_normal((n, n)),
        rng.standard_normal((n, n)) * 10.0 ** rng.integers(-8, 8, n),
        rng.random((n, n)) + 1e9 * (rng.random((n, 1)) < 0.3) * (rng.random(n) < 0.3),  # far beyond the temperature
        *(scale * rng.standard_normal((n, n)) for scale in (1e-200, 1e-35, 1e-30, 1e30, 1e37, 1e200)),
    ):
        found = assign(cost)
        assert found.dtype == np.int64 and sorted(found) == list(range(n))
        best = cost[np.arange(n), orders].astype(np.float64).sum(1).min()
        assert total(cost, found) <= best + 1e-12 * n * np.abs(cost).max()


def features(rng, n, d, noise):
    base = rng.standard_normal((n, d))
    order = rng.permutation(n)
    one, two = base + noise * rng.standard_normal((n, d)), base[order] + noise * rng.standard_normal((n, d))
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, two))
    return -(one @ two.T), np.argsort(order)


@pytest.mark.parametrize("noise", [0.0, 1.0, 1e3])
def test_large_matrices_cost_what_scipy_s_cost(noise):
    """Units that are the same, alike and unrelated, at a size where costs are reduced."""
    n = raymerge.assignment._DENSE + 40
    cost, planted = features(np.random.default_rng(0), n, 60, noise)
    cost = cost.astype(np.float32)
    before = cost.copy()
    found = assign(cost)
    assert np.array_equal(cost, before), "the argument was changed"
    rows, columns = linear_sum_assignment(cost)
    assert total(cost, found) == pytest.approx(cost[rows, columns].astype(np.float64).sum(), abs=1e-9)
    if noise == 0.0:
        assert np.array_equal(found, planted)


def test_reducing_leaves_scipy_less_to_do(monkeypatch):
    """The duals are what makes it fast: nearly every row then has its match among its cheapest few columns."""
    cost, _ = features(np.random.default_rng(0), 1200, 60, 1.0)
    row_dual, column_dual = raymerge.assignment._entropic_duals(cost)
    reduced = cost - row_dual[:, None] - column_dual
    found = assign(cost)
    place = (reduced < reduced[np.arange(1200), found][:, None]).sum(1)
    assert np.quantile(place, 0.95) <= 3


def test_what_has_no_assignment_is_refused():
    with pytest.raises(AssignmentError, match=r"the cost matrix is \(2, 3\), but must be square"):
        assign(np.zeros((2, 3)))
    with pytest.raises(AssignmentError, match=r"is \(4,\), but must be square"):
        assign(np.zeros(4))
    with pytest.raises(AssignmentError, match="holds int64, but must hold floats"):
        assign(np.zeros((2, 2), dtype=np.int64))
    for value in (np.nan, np.inf, -np.inf):
        cost = np.zeros((3, 3))
        cost[1, 2] = value
        with pytest.raises(AssignmentError, match=rf"cost \(1, 2\) is {value}, but costs must be finite"):
            assign(cost)


def test_nothing_to_assign():
    assert assign(np.zeros((0, 0))).shape == (0,)
