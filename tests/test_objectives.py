"""Objectives against sums done by hand."""

import math

import numpy as np
import pytest
from scipy.stats import entropy

from raymerge.config import SearchConfig
from raymerge.objectives import (
    ACCURACIES,
    LOSSES,
    OF_SUBJECTS,
    ObjectiveError,
    above_ceiling,
    answer_kl,
    descended,
    is_minimised,
    parse_objective,
    perplexity,
    score_answers,
    score_text,
    trial_outcome,
)

# Two subjects of 1 and 3 questions; the model is right on the first two.
LOGITS = np.array([[2.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 0.5]], dtype=np.float32)
ANSWERS = np.array([0, 1, 1, 0], dtype=np.int8)
SUBJECTS = ["a", "b", "b", "b"]
REFERENCE = np.array([[1.0, 0, 0, 2], [0, 1.0, 0, 0], [0, 2.0, 3.0, 0], [4, 0, 0, 0.5]], dtype=np.float32)


def nll(row: int) -> float:
    values = [float(v) for v in LOGITS[row]]
    return math.log(sum(math.exp(v) for v in values)) - values[ANSWERS[row]]


def softmax(logits):
    exps = np.exp(logits.astype(np.float64))
    return exps / exps.sum(axis=1, keepdims=True)


def score(objective, **options):
    return score_answers(objective, LOGITS, ANSWERS, SUBJECTS, **options)


def test_micro_accuracy_counts_questions_and_macro_counts_subjects():
    assert score("micro_accuracy").value == 0.5
    assert score("macro_accuracy").value == pytest.approx((1 + 1 / 3) / 2)


@pytest.mark.parametrize("measure", [*ACCURACIES, *LOSSES, *(f"{measure}:a" for measure in OF_SUBJECTS)])
def test_every_measure_has_its_best_value_where_all_is_right_and_is_explained(measure):
    right = np.where(np.arange(4) == ANSWERS[:, None], 50.0, 0.0)
    found = score_answers(measure, right, ANSWERS, SUBJECTS, reference=right, text_nll=0.0)
    assert found.value == pytest.approx(0.0 if is_minimised(measure) else 1.0)
    assert all(measure.removesuffix("a") in explained for explained in (parse_objective.__doc__, SearchConfig.__doc__))


def test_answer_nll_is_the_mean_over_questions_and_is_minimised():
    found = score("answer_nll")
    assert found.value == found.nll == pytest.approx(sum(nll(row) for row in range(4)) / 4, rel=1e-12)
    assert is_minimised("answer_nll") and not is_minimised("micro_accuracy")


def test_named_subjects_restrict_value_accuracy_and_nll():
    found = score("accuracy:b")
    assert found.value == found.accuracy == pytest.approx(1 / 3)
    assert found.nll == pytest.approx(sum(nll(row) for row in (1, 2, 3)) / 3)
    assert parse_objective("accuracy:b, a").subjects == ["b", "a"]
    assert parse_objective("micro_accuracy").subjects == []


def test_a_loss_of_named_subjects_is_the_mean_over_their_questions():
    """Beside others each term has its own; alone, with text or not, nothing else is judged."""
    of_b = sum(nll(row) for row in (1, 2, 3)) / 3
    assert score("answer_nll:b").value == score("answer_nll:b").nll == pytest.approx(of_b)
    found = score("answer_nll:b+0.1*text_nll", text_nll=3.0)
    assert found.value == pytest.approx(of_b + 0.3) and found.accuracy == pytest.approx(1 / 3)
    kl = entropy(softmax(REFERENCE), softmax(LOGITS), axis=1)
    assert score("answer_kl:a", reference=REFERENCE).value == pytest.approx(kl[0], rel=1e-6)
    assert score("answer_nll:b+2*answer_kl:a", reference=REFERENCE).value == pytest.approx(of_b + 2 * kl[0])
    assert score("answer_nll+answer_nll:b").value == pytest.approx(sum(nll(row) for row in range(4)) / 4 + of_b)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("accuracy:a", ["a"]),
        ("answer_nll:a,b+0.1*text_nll", ["a", "b"]),
        ("answer_nll:a+answer_kl:b", ["a", "b"]),
        ("accuracy:a+micro_accuracy", []),
        ("answer_nll", []),
        ("text_nll", []),
    ],
)
def test_an_objective_is_judged_on_the_subjects_that_all_its_terms_name(objective, expected):
    assert parse_objective(objective).judged_on == expected


def test_a_domain_stands_for_its_subjects_and_a_subject_goes_before_a_domain_of_its_name():
    domains = {"most": ["b"], "all": ["a", "b"], "a": ["b"]}
    of_b = score("accuracy:b")
    assert score("accuracy:most", domains=domains) == score("accuracy:b,most", domains=domains) == of_b
    assert score("answer_nll:all", domains=domains) == score("answer_nll")
    assert score("accuracy:a", domains=domains) == score("accuracy:a") != of_b
    found = parse_objective("answer_nll:all,b+0.1*text_nll").over({"a", "b"}, domains)
    assert found.judged_on == ["a", "b"] and [term.weight for term in found.terms] == [1.0, 0.1]
    with pytest.raises(ValueError, match=r"none of its subjects is among \['a', 'b'\]"):
        score("accuracy:law", domains={"law": ["contracts"]})


def test_a_subject_that_is_not_there_is_named():
    for objective in ("accuracy:c", "micro_accuracy+accuracy:c"):
        with pytest.raises(ValueError, match=r"accuracy:c.*\['a', 'b'\]"):
            score(objective)


def test_logits_that_are_not_finite_score_nan_not_zero():
    broken = LOGITS.copy()
    broken[3, 0] = np.nan
    found = score_answers("micro_accuracy", broken, ANSWERS, SUBJECTS)
    assert all(math.isnan(value) for value in found[:3]) and found.perplexity is None
    # A question outside the named subjects cannot spoil them.
    broken = LOGITS.copy()
    broken[0, 0] = np.inf
    assert score_answers("accuracy:b", broken, ANSWERS, SUBJECTS).value == pytest.approx(1 / 3)
    assert math.isnan(score("micro_accuracy", text_nll=math.nan, ceiling=10).value)


def test_answer_kl_is_from_the_unmerged_model_to_the_merged():
    expected = entropy(softmax(REFERENCE), softmax(LOGITS), axis=1)  # SciPy's relative entropy
    np.testing.assert_allclose(answer_kl(REFERENCE, LOGITS), expected, rtol=1e-6)
    assert score("answer_kl", reference=REFERENCE).value == pytest.approx(expected.mean(), rel=1e-6)
    assert score("answer_kl", reference=LOGITS).value == pytest.approx(0, abs=1e-15)
    # Adding the same to all four logits of a question changes no distribution.
    assert score("answer_kl", reference=REFERENCE + 7).value == pytest.approx(expected.mean(), rel=1e-6)
    with pytest.raises(ValueError, match="unmerged model's answers"):
        score("answer_kl")


def test_a_sum_is_its_weighted_terms():
    found = score("answer_nll + 0.1*text_nll+2 * answer_kl", reference=REFERENCE, text_nll=3.0)
    kl = score("answer_kl", reference=REFERENCE).value
    assert found.value == pytest.approx(found.nll + 0.3 + 2 * kl) and found.perplexity == pytest.approx(math.exp(3))
    assert score("0.5*micro_accuracy+accuracy:a").value == pytest.approx(0.25 + 1)
    # Accuracy and NLL are over the questions that the value is over.
    assert score("accuracy:a+0.5*accuracy:b").accuracy == 0.5 and score("0.5*accuracy:b").accuracy == pytest.approx(
        1 / 3
    )
    assert score("0.5*micro_accuracy+accuracy:a").accuracy == 0.5


def test_descents_on_an_accuracy_are_descents_on_the_loss_of_answers():
    assert [descended(each) for each in ("micro_accuracy+accuracy:a", "answer_kl", "text_nll")] == [
        "answer_nll",
        "answer_kl",
        "text_nll",
    ]
    assert descended("macro_accuracy", 0.5) == "answer_nll+0.5*text_kl"


def test_what_an_objective_needs():
    parsed = parse_objective("answer_kl+0.1*text_nll")
    assert parsed.needs_text and parsed.needs_reference and parsed.minimised and parsed.weight == 1.1
    plain = parse_objective("micro_accuracy+accuracy:a")
    assert not (plain.needs_text or plain.needs_reference or plain.minimised)
    with pytest.raises(ValueError, match="search.text"):
        score("text_nll")
    with pytest.raises(ValueError, match="search.text"):
        score("micro_accuracy", ceiling=10.0)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("accurcy", "'accurcy' is not one of micro_accuracy, macro_accuracy, answer_nll"),
        ("answer_nll+", "'' is not one of"),
        ("accuracy: ,", "must be followed by subjects"),
        ("answer_nll:", "answer_nll: must be followed by subjects or domains, such as answer_nll:anatomy"),
        ("macro_accuracy:a", "'macro_accuracy:a' is not one of"),
        ("text_nll:a", "'text_nll:a' is not one of.*or of subjects and domains accuracy, answer_nll, answer_kl:NAME"),
        ("accuracy", "'accuracy' is not one of"),
        ("micro_accuracy+0.1*text_nll", "adds accuracies.*to losses.*perplexity_ceiling"),
        ("answer_nll+0*text_nll", "weight 0 should be above 0"),
        ("-1*answer_nll", "weight -1 should be above 0"),
        ("inf*answer_nll", "weight inf"),
        ("x*answer_nll", "'x' is no number"),
        ("answer_nll*text_nll", "'answer_nll' is no number"),
    ],
)
def test_what_is_no_objective_is_refused(objective, message):
    with pytest.raises(ObjectiveError, match=message):
        parse_objective(objective)


@pytest.mark.parametrize("objective", ["micro_accuracy", "2*macro_accuracy+accuracy:a", "answer_nll", "answer_kl",
                                       "text_nll", "answer_nll+0.1*text_nll"])  # fmt: skip
def test_any_candidate_under_the_ceiling_beats_any_above_and_the_further_above_the_worse(objective):
    ceiling, rng = 20.0, np.random.default_rng(0)
    sign = -1 if is_minimised(objective) else 1
    right = np.zeros((4, 4))
    right[np.arange(4), ANSWERS] = 1
    # From all right to as wrong as logits of 1000 are, and texts from far under to far above the ceiling.
    models = [right * size for size in (20.0, 1.0, 0.0, -1.0, -1000.0)] + [rng.normal(size=(4, 4)) for _ in range(20)]

    def value(logits, text):
        found = score_answers(objective, logits, ANSWERS, SUBJECTS, reference=REFERENCE, text_nll=text, ceiling=ceiling)
        return sign * found.value

    edge = math.log(ceiling)
    feasible = [value(logits, text) for logits in models for text in (0.5, edge - 1e-9)]
    above = [[value(logits, text) for logits in models] for text in (edge + 1e-6, edge + 0.1, edge + 3, edge + 1000)]
    assert min(feasible) > max(above[0])
    for nearer, further in zip(above, above[1:], strict=False):
        assert min(nearer) > max(further)
    # A searcher's model sees steps of the size of the values: no more than twice the range of what is feasible.
    assert max(feasible) - above[-1][0] < 2 * (max(feasible) - min(feasible)) + parse_objective(objective).weight


@pytest.mark.parametrize("objective", ["text_nll", "0.5*text_nll"])
def test_text_alone_is_judged_as_beside_questions(objective):
    for text in (1.5, 2.9, 3.1, 8.0):
        for ceiling in (None, 20.0):
            beside, alone = (
                score(objective, text_nll=text, ceiling=ceiling),
                score_text(objective, text, ceiling=ceiling),
            )
            assert (alone.value, alone.perplexity) == (beside.value, beside.perplexity)
            assert alone.accuracy is alone.nll is None
    assert math.isnan(score_text(objective, math.inf).value)
    assert not parse_objective(objective).needs_answers and parse_objective("answer_nll+text_nll").needs_answers
    with pytest.raises(ValueError, match="answer_nll needs answers to questions"):
        score_text("answer_nll", 1.0)


def test_a_ceiling_leaves_the_values_under_it_alone():
    found = score("micro_accuracy", text_nll=2.0, ceiling=20.0)
    assert found[:3] == score("micro_accuracy")[:3] and found.perplexity == pytest.approx(math.e**2)
    found = score("answer_nll", text_nll=2.0, ceiling=20.0)
    assert found.value == found.nll == score("answer_nll").value
    excess = math.log(30 / 20)
    penalised = score("answer_nll", text_nll=math.log(30), ceiling=20.0)
    assert penalised.value == pytest.approx(5 + excess / (1 + excess)) and penalised.nll == found.nll
    assert score("micro_accuracy", text_nll=math.log(30), ceiling=20.0).value == pytest.approx(-excess / (1 + excess))


def test_a_perplexity_beyond_floats_is_infinite():
    assert perplexity(800.0) == math.inf and perplexity(math.log(12)) == pytest.approx(12)


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ({"value": 0.5, "accuracy": 0.5, "nll": 1.25, "perplexity": 9.0, "n_questions": 8}, None),
        ({"value": 2.0, "accuracy": None, "nll": None, "perplexity": 7.4}, None),  # of text alone
        ({"value": 0.5, "accuracy": 0.5, "nll": math.nan, "n_questions": 8}, "the score is not finite"),
        ({"value": math.inf, "accuracy": None, "nll": None, "perplexity": math.inf}, "the score is not finite"),
        ({"n_questions": 8}, "the score is not finite"),  # of a worker that said nothing
        ({"error": "three workers were lost", "n_questions": 8}, "three workers were lost"),
        ({"value": 0.5, "accuracy": 0.5, "nll": 1.25, "error": "three workers were lost"}, "three workers were lost"),
    ],
)
def test_a_trial_keeps_what_was_reached_or_why_nothing_was(found, error):
    outcome = trial_outcome(found)
    assert outcome["n_questions"] == found.get("n_questions", 0)
    reached = {name: outcome[name] for name in ("value", "accuracy", "nll", "perplexity")}
    if error is None:
        assert (outcome["status"], outcome["error"]) == ("ok", None)
        assert reached == {name: found.get(name) for name in reached}
    else:
        assert outcome["status"] == "failed" and outcome["error"].startswith(error)
        assert set(reached.values()) == {None}


def test_a_value_is_a_penalty_above_the_ceiling_alone():
    assert [above_ceiling({"perplexity": found}, 6.5) for found in (6.4, 6.5, 6.6, None)] == [False, False, True, False]
    assert not above_ceiling({"perplexity": 6.6}, None)
