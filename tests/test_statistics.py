"""Statistics against closed forms, scipy and exact enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from raymerge.statistics import (
    accuracy_summary,
    answer_nll,
    holm,
    macro_interval,
    macro_summary,
    mcnemar,
    paired_difference,
    ratio_interval,
    wilson_interval,
    without_far_worse,
)


def test_accuracy_summary_is_the_standard_error_of_the_mean():
    correct = np.random.default_rng(0).uniform(size=137) < 0.6
    summary = accuracy_summary(correct)
    assert (summary.n, summary.correct) == (137, correct.sum())
    assert summary.accuracy == pytest.approx(correct.mean(), rel=1e-15)
    assert summary.standard_error == pytest.approx(scipy.stats.sem(correct, ddof=1), rel=1e-12)


def test_accuracy_summary_at_the_edges():
    assert accuracy_summary(np.ones(5, bool)) == (5, 5, 1.0, 0.0)
    assert math.isnan(accuracy_summary(np.array([True])).standard_error)
    with pytest.raises(ValueError, match="at least one"):
        accuracy_summary(np.array([], dtype=bool))
    with pytest.raises(ValueError, match="should be bool"):
        accuracy_summary(np.array([0, 3, 1]))  # predicted letters passed by mistake


def test_macro_standard_error_is_that_of_a_mean_of_independent_means():
    mean, error = macro_summary([0.5, 0.7, 0.9], [0.03, 0.04, 0.12])
    assert mean == pytest.approx(0.7)
    assert error == pytest.approx(0.13 / 3)
    rng = np.random.default_rng(1)  # simulated: three subjects of 40, 60 and 100 questions
    p, n = np.array([0.3, 0.6, 0.9]), np.array([40, 60, 100])
    simulated = (rng.binomial(n, p, size=(200_000, 3)) / n).mean(axis=1).std()
    assert macro_summary(p, np.sqrt(p * (1 - p) / n))[1] == pytest.approx(simulated, rel=0.01)
    with pytest.raises(ValueError, match="2 accuracies but 1"):
        macro_summary([0.5, 0.6], [0.1])


def test_answer_nll_is_the_log_softmax_over_four_letters():
    logits = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    answer = np.random.default_rng(3).integers(4, size=50).astype(np.int8)
    exact = [-math.log(math.exp(row[k]) / math.fsum(map(math.exp, row))) for row, k in zip(logits, answer, strict=True)]
    nll = answer_nll(logits, answer)
    assert nll.dtype == np.float64
    np.testing.assert_allclose(nll, exact, rtol=1e-12)


def test_answer_nll_of_equal_and_of_huge_logits():
    assert answer_nll(np.zeros((1, 4)), [2]) == pytest.approx(math.log(4))
    np.testing.assert_allclose(answer_nll([[1e4, 0, 0, 0], [1e4, 0, 0, 0]], [0, 1]), [0, 1e4])


@pytest.mark.parametrize(
    ("logits", "answer", "message"),
    [
        (np.zeros((2, 3)), [0, 0], "should be"),
        (np.zeros((2, 4)), [0], "should be"),
        (np.zeros((1, 4)), [4], "0..3"),
        (np.zeros((1, 4)), [-1], "0..3"),
    ],
)
def test_answer_nll_refuses(logits, answer, message):
    with pytest.raises(ValueError, match=message):
        answer_nll(logits, answer)


def test_a_ratio_of_equal_clusters_is_a_mean_with_students_interval():
    sums = np.random.default_rng(0).exponential(size=9)
    mean, low, high = ratio_interval(sums * 4, np.full(9, 4))
    expected = scipy.stats.t.interval(0.95, 8, loc=sums.mean(), scale=sums.std(ddof=1) / 3)
    assert mean == pytest.approx(sums.mean()) and (low, high) == pytest.approx(expected)


def test_a_ratios_interval_holds_the_truth_as_often_as_it_says():
    """Clusters of unequal size whose values have a mean of their own, so that values are no independent draws."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(2000):
        counts = rng.integers(20, 64, size=16)
        sums = counts * (3.0 + rng.normal(0, 0.4, 16)) + rng.normal(0, 1, 16) * np.sqrt(counts)
        _, low, high = ratio_interval(sums, counts)
        hits += low <= 3.0 <= high
    assert 0.93 < hits / 2000 < 0.965


def test_one_cluster_has_no_interval_and_wrong_ones_are_refused():
    mean, low, high = ratio_interval([6.0], [3])
    assert mean == 2.0 and math.isnan(low) and math.isnan(high)
    mean, low, high = ratio_interval([6.0, math.inf], [3, 3])
    assert mean == math.inf and math.isnan(low) and math.isnan(high)
    for counts in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="2 sums and .* every count above 0"):
            ratio_interval([1.0, 2.0], counts)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 5), (7, 1), (4, 4), (30, 12)])
def test_mcnemar_is_the_exact_binomial(only_a, only_b):
    a = np.array([True] * only_a + [False] * only_b + [True] * 20 + [False] * 10)
    b = np.array([False] * only_a + [True] * only_b + [True] * 20 + [False] * 10)
    n, smaller = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n  # p = 1/2 is symmetric: twice one tail
    result = mcnemar(a, b)
    assert result[:2] == (only_a, only_b)
    assert result.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-12)
    assert mcnemar(b, a).p_value == result.p_value


def test_mcnemar_refuses_different_questions():
    with pytest.raises(ValueError, match="same questions"):
        mcnemar(np.ones(3, bool), np.ones(4, bool))


@pytest.mark.parametrize("kind", ["correctness", "nll"])  # few distinct values, and all distinct
def test_interval_agrees_with_scipys_paired_bootstrap(kind):
    rng = np.random.default_rng(4)
    if kind == "correctness":
        a, b = rng.uniform(size=300) < 0.7, rng.uniform(size=300) < 0.6
    else:
        a = rng.exponential(size=300)
        b = a + rng.normal(0.1, 0.5, size=300)
    a, b = a.astype(float), b.astype(float)
    ours = paired_difference(a, b, n_resamples=20_000)
    scipys = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), paired=True, method="percentile", n_resamples=20_000,
        rng=np.random.default_rng(5), batch=1000,
    ).confidence_interval  # fmt: skip
    width = scipys.high - scipys.low
    assert ours.difference == pytest.approx((a - b).mean())
    assert ours.ci_low == pytest.approx(scipys.low, abs=0.05 * width)
    assert ours.ci_high == pytest.approx(scipys.high, abs=0.05 * width)


@pytest.mark.parametrize("repeat", [1, 12])  # 12 questions with distinct values, and 84 sharing 7 of them
def test_p_value_is_that_of_sign_flips(repeat):
    rng = np.random.default_rng(6)
    if repeat == 1:
        d = rng.normal(0.5, 1.0, size=12)
        flips = np.array(list(itertools.product([-1, 1], repeat=12)))
        exact = np.mean(np.abs(flips @ d) >= abs(d.sum()) - 1e-12)  # all 4,096 of them
    else:
        d = np.repeat([1.0, 0.0, 0.0, -1.0, 1.0, 0.0, 0.0], repeat)
        exact = scipy.stats.binomtest(24, 36).pvalue  # 24 ups, 12 downs: the exact McNemar p
    assert paired_difference(d, np.zeros(d.size), n_resamples=40_000).p_value == pytest.approx(exact, abs=0.01)


def test_chunks_do_not_change_the_law(monkeypatch):
    d = np.random.default_rng(7).normal(0.05, 1, size=400)
    whole = paired_difference(d, np.zeros(400))
    monkeypatch.setattr("raymerge.statistics._CHUNK", 400 * 300)
    parts = paired_difference(d, np.zeros(400))
    assert parts.ci_low == pytest.approx(whole.ci_low, abs=0.01)
    assert parts.p_value == pytest.approx(whole.p_value, abs=0.02)


def test_paired_difference_is_seeded_and_antisymmetric_in_the_mean():
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=100), rng.normal(size=100)
    assert paired_difference(a, b) == paired_difference(a, b)
    assert paired_difference(a, b) != paired_difference(a, b, random_state=1)
    assert paired_difference(b, a).difference == -paired_difference(a, b).difference
    narrow = paired_difference(a, b, confidence=0.5)
    wide = paired_difference(a, b, confidence=0.99)
    assert wide.ci_low < narrow.ci_low < narrow.ci_high < wide.ci_high


@pytest.mark.parametrize(
    ("n", "drawn", "least"), [(2, 3000, 0.94), (3, 3000, 0.94), (5, 3000, 0.94), (7, 3000, 0.94), (10, 1000, 0.925)]
)
def test_the_interval_of_few_losses_holds_the_mean_about_as_often_as_it_says(n, drawn, least):
    """Of normal losses; the standard error of 3,000 draws is .004. Expanded percentiles alone hold the mean in .51,
    .74, .93 and .95 of cases at n = 2, 3, 5 and 7; those that are not expanded in .84 at 5 and .90 at 10."""
    draws = np.random.default_rng(12).normal(size=(drawn, n))
    found = [paired_difference(d, np.zeros(n), n_resamples=1 if n < 8 else 1000) for d in draws]
    assert least < np.mean([one.ci_low <= 0 <= one.ci_high for one in found]) < 0.96


@pytest.mark.parametrize(("n", "confidence"), [(8, 0.95), (30, 0.8)])
def test_expanded_percentiles_of_a_normal_law_of_resampled_means_are_students_interval(n, confidence, monkeypatch):
    """Resampled means of n items have the mean and, over n, the variance (ddof 0) of the items."""
    d = np.random.default_rng(n).normal(size=n)
    law = scipy.stats.norm(d.mean(), d.std() / math.sqrt(n)).ppf((np.arange(200_000) + 0.5) / 200_000)
    monkeypatch.setattr("raymerge.statistics._bootstrap_means", lambda *_: law)
    found = paired_difference(d, np.zeros(n), confidence=confidence, n_resamples=10)
    expected = scipy.stats.t.interval(confidence, n - 1, loc=d.mean(), scale=scipy.stats.sem(d))
    assert (found.ci_low, found.ci_high) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_interval_of_very_few_losses_is_students(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    expected = scipy.stats.t.interval(0.9, n - 1, loc=np.mean(a - b), scale=scipy.stats.sem(a - b))
    assert paired_difference(a, b, confidence=0.9)[1:3] == pytest.approx(expected)


@pytest.mark.parametrize("n", [7, 25])
@pytest.mark.parametrize("last", [1, 64, 128])
def test_a_short_last_passage_is_no_outlier(n, last):
    """Sums of losses of 128 tokens and of fewer: without `counts` the intervals are 1.2 to 3.4 times as wide and hold
    the mean in .98 to 1.00 of cases."""
    rng, counts = np.random.default_rng(3), np.array([128.0] * (n - 1) + [last])
    sums = counts + rng.normal(0, 1.5, (400, n)) * np.sqrt(counts)
    found = [paired_difference(d, np.zeros(n), counts=counts, n_resamples=400) for d in sums]
    exact = [ratio_interval(d, counts) for d in sums]
    assert [one.difference for one in found] == pytest.approx([one.mean for one in exact])
    assert 0.92 < np.mean([one.ci_low <= 1 <= one.ci_high for one in found]) < 0.98
    widths = (np.mean([one[2] - one[1] for one in values]) for values in (found, exact))
    assert next(widths) == pytest.approx(next(widths), rel=0.1)


def test_equal_counts_are_those_of_values():
    a, b = np.random.default_rng(0).normal(size=(2, 12))
    assert paired_difference(8 * a, 8 * b, counts=np.full(12, 8)) == pytest.approx(paired_difference(a, b))


@pytest.mark.parametrize("counts", [[1.0, 0.0], [1.0, np.nan], [1.0]])
def test_counts_are_one_a_passage_and_above_zero(counts):
    with pytest.raises(ValueError, match=r"above 0|the same questions"):
        paired_difference([0.5, 0.7], [0.1, 0.2], counts=counts)


def test_one_loss_has_no_limits():
    assert paired_difference([0.7], [0.2]) == (pytest.approx(0.5), -math.inf, math.inf, 1.0)


def test_equal_plans_have_no_difference():
    losses = np.full(10, 0.3)
    assert paired_difference(losses, losses) == (0.0, 0.0, 0.0, 1.0)


def test_ten_questions_without_a_disagreement_do_not_show_that_there_is_none():
    right = np.ones(10, dtype=bool)
    difference, low, high, p_value = paired_difference(right, right)
    # shares of 1 / 12 each way: 1.96 sqrt((2 / 12) / 12)
    assert (difference, p_value) == (0.0, 1.0) and high == pytest.approx(1.959964 / math.sqrt(72)) and low == -high
    assert paired_difference([1.0], [0.0])[:3] == (1.0, pytest.approx(1 / 3 - 1.959964 * math.sqrt(8 / 27)), 1.0)


@pytest.mark.parametrize("n", [3, 5, 10, 20, 57, 135])
@pytest.mark.parametrize("discordant", [(0.05, 0.05), (0.15, 0.05), (0.15, 0.15), (0.45, 0.15)])
def test_the_interval_of_a_paired_difference_of_shares_holds_it_as_often_as_it_says(n, discordant):
    """Every outcome of n questions with its probability. A bootstrap at 0.15 and 0.05: 0.38 at n = 3, 0.93 at 10."""
    a, b = (part.ravel() for part in np.mgrid[: n + 1, : n + 1])
    a, b = a[a + b <= n], b[a + b <= n]
    weights = scipy.stats.multinomial.pmf(np.stack([a, b, n - a - b], 1), n, [*discordant, 1 - sum(discordant)])
    likely = weights > 1e-7
    held = 0.0
    for only_a, only_b, weight in zip(a[likely], b[likely], weights[likely], strict=True):
        x, y = np.arange(n) < only_a, (only_a <= np.arange(n)) & (np.arange(n) < only_a + only_b)
        _, low, high, _ = paired_difference(x, y, n_resamples=1)
        held += weight * (low - 1e-12 <= discordant[0] - discordant[1] <= high + 1e-12)
    assert held > 0.949


@pytest.mark.parametrize(
    ("options", "message"), [({"confidence": 95}, "confidence is 95"), ({"n_resamples": 0}, "n_resamples is 0")]
)
def test_paired_difference_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(np.ones(3), np.zeros(3), **options)


def test_paired_difference_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        paired_difference([1.0, np.nan], [0.0, 0.0])


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (13, 20), (91, 135), (9000, 14042)])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_wilson_is_scipys(correct, n, confidence):
    expected = scipy.stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, n, confidence=confidence) == pytest.approx(
        (expected.low, expected.high), rel=1e-12, abs=1e-15
    )


def test_wilson_at_the_edges_is_inside_and_holds_the_share():
    assert wilson_interval(0, 7)[0] == 0.0 and wilson_interval(7, 7)[1] == 1.0
    for correct, n, message in ((3, 2, "3.* right answers of .*2"), (-1, 2, "-1"), (0, 0, "at least 1")):
        with pytest.raises(ValueError, match=message):
            wilson_interval(correct, n)
    with pytest.raises(ValueError, match="confidence is 95"):
        wilson_interval(1, 2, confidence=95)


def test_the_macro_interval_of_large_subjects_is_the_normal_one_and_of_few_questions_wider():
    correct, n = np.array([60_000, 30_000, 45_000]), np.array([100_000, 90_000, 50_000])
    p = correct / n
    mean, error = macro_summary(p, np.sqrt(p * (1 - p) / (n - 1)))
    assert macro_interval(correct, n) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=2e-5)
    # A normal interval or a bootstrap would be [1, 1]: here it is that of 9 / (1/5 + 1/5 + 1) questions.
    low, high = macro_interval([5, 5, 1], [5, 5, 1])
    z2, effective = 1.959964**2, 9 / 1.4
    assert low == pytest.approx(effective / (effective + z2), rel=1e-6) and high == 1.0
    # One subject is a share; subjects alike are nearly one of all their questions.
    assert macro_interval([8], [11]) == pytest.approx(wilson_interval(8, 11), rel=1e-12)
    assert macro_interval([8, 8], [11, 11]) == pytest.approx(_wilson(8 / 11, 22), rel=0.02)
    with pytest.raises(ValueError, match="2 counts .* but 1"):
        macro_interval([1, 2], [3])
    for correct, n in (([1, 3], [2, 2]), ([1, -1], [2, 2]), ([1, 0], [2, 0])):  # one subject of two is wrong
        with pytest.raises(ValueError, match="each from 0 to n, n at least 1"):
            macro_interval(correct, n)


def _wilson(share, n):
    """The two solutions of |share - p| = z sqrt(p (1 - p) / n)."""
    z2 = 1.959964**2
    return sorted(np.roots([1 + z2 / n, -(2 * share + z2 / n), share**2]))


@pytest.mark.parametrize("questions", [(5, 40), (1, 6), (100, 300)])
def test_the_macro_interval_holds_the_mean_as_often_as_it_says(questions):
    rng = np.random.default_rng(9)
    n = rng.integers(*questions, size=57)
    p = rng.uniform(0.25, 0.95, size=57)
    draws = rng.binomial(n, p, size=(2000, 57))
    held = np.mean([low <= p.mean() <= high for low, high in (macro_interval(row, n) for row in draws)])
    assert 0.935 < held < 0.975  # the normal interval holds it in 0.83 of cases with 1 to 5 questions a subject


@pytest.mark.parametrize(
    ("n", "p"),
    [((3, 100), (0.9, 0.6)), ((2, 100), (0.8, 0.4)), ((10, 500), (0.95, 0.6)), ((3, 100, 100), (0.9, 0.6, 0.6))],
)
def test_the_macro_interval_holds_where_one_subject_has_few_questions(n, p):
    """All right in three questions is likely at 0.9, and no reason to take that subject's accuracy for known."""
    draws = np.random.default_rng(11).binomial(n, p, size=(20_000, len(n)))
    seen, counts = np.unique(draws, axis=0, return_counts=True)
    limits = np.array([macro_interval(row, np.array(n)) for row in seen])
    held = (limits[:, 0] <= np.mean(p)) & (np.mean(p) <= limits[:, 1])
    assert np.average(held, weights=counts) > 0.95


def test_far_worse_is_beyond_three_interquartile_ranges_on_the_worse_side():
    # Quartiles of the first are 2 and 4, fences -4 and 10; of the second 2 and 4 too.
    for values, lower, far in (([1, 2, 3, 4, 10.1], True, 10.1), ([-4.1, 2, 3, 4, 5], False, -4.1)):
        assert without_far_worse(values, lower=lower) == [value for value in values if value != far]
        assert without_far_worse(values, lower=not lower) == values
    assert without_far_worse([1, 2, 3, 4, 10], lower=True) == [1, 2, 3, 4, 10]
    assert without_far_worse([0.5, 0.5, 0.5, 0.5, 9], lower=True) == [0.5, 0.5, 0.5, 0.5, 9]


def test_holm_by_hand_and_against_its_step_down_rule():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])
    p = np.random.default_rng(10).uniform(size=12) ** 4
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected, left = set(), np.argsort(p)
        for rank, index in enumerate(left):
            if p[index] > level / (len(p) - rank):
                break
            rejected.add(index)
        assert rejected == set(np.flatnonzero(adjusted <= level + 1e-12))
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.2, np.nan])
