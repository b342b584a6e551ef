"""Objectives against sums done by hand."""

import math

import numpy as np
import pytest

from raymerge.objectives import is_minimised, objective_subjects, score_answers

# Two subjects of 1 and 3 questions; the model is right on the first two.
LOGITS = np.array([[2.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 0.5]], dtype=np.float32)
ANSWERS = np.array([0, 1, 1, 0], dtype=np.int8)
SUBJECTS = ["a", "b", "b", "b"]


def nll(row: int) -> float:
    values = [float(v) for v in LOGITS[row]]
    return math.log(sum(math.exp(v) for v in values)) - values[ANSWERS[row]]


def test_micro_accuracy_counts_questions_and_macro_counts_subjects():
    assert score_answers("micro_accuracy", LOGITS, ANSWERS, SUBJECTS).value == 0.5
    assert score_answers("macro_accuracy", LOGITS, ANSWERS, SUBJECTS).value == pytest.approx((1 + 1 / 3) / 2)


def test_answer_nll_is_the_mean_over_questions_and_is_minimised():
    score = score_answers("answer_nll", LOGITS, ANSWERS, SUBJECTS)
    assert score.value == score.nll == pytest.approx(sum(nll(row) for row in range(4)) / 4, rel=1e-12)
    assert is_minimised("answer_nll") and not is_minimised("micro_accuracy")


def test_named_subjects_restrict_value_accuracy_and_nll():
    score = score_answers("accuracy:b", LOGITS, ANSWERS, SUBJECTS)
    assert score.value == score.accuracy == pytest.approx(1 / 3)
    assert score.nll == pytest.approx(sum(nll(row) for row in (1, 2, 3)) / 3)
    assert objective_subjects("accuracy:b, a") == ["b", "a"]
    assert objective_subjects("micro_accuracy") is None


def test_a_subject_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"accuracy:c.*\['a', 'b'\]"):
        score_answers("accuracy:c", LOGITS, ANSWERS, SUBJECTS)


def test_logits_that_are_not_finite_score_nan_not_zero():
    broken = LOGITS.copy()
    broken[3, 0] = np.nan
    assert all(math.isnan(value) for value in score_answers("micro_accuracy", broken, ANSWERS, SUBJECTS))
    # A question outside the named subjects cannot spoil them.
    broken = LOGITS.copy()
    broken[0, 0] = np.inf
    assert score_answers("accuracy:b", broken, ANSWERS, SUBJECTS).value == pytest.approx(1 / 3)
