"""rows.py and comparisons.py: what tables say of plain text whose losses are known."""

import math

import numpy as np
import pyarrow as pa
import pytest
import tiny

from raymerge import comparisons, rows
from raymerge.context import TextLosses
from raymerge.evaluation import Answers
from raymerge.schemas import conform
from raymerge.statistics import ratio_interval
from raymerge.tasks import Item, Task


def losses(per_token, *, windows=(1, 0), last=1024):
    """A loss a token, of windows the first of which has `last` tokens."""
    edges = np.array(rows.EDGES)
    tokens = np.stack([np.diff(np.minimum(edges, length)) for length in (last, 1024)])
    return TextLosses(rows.EDGES, np.array(windows), tokens * np.asarray(per_token), tokens)


def test_passages_are_64_tokens_and_positions_those_of_the_context_table():
    found = losses(2.0, last=100)
    passages = rows.text_loss_rows("p", found)
    assert [row["position"] for row in passages if row["window"] == 1] == [1, 64]
    assert [row["tokens"] for row in passages if row["window"] == 1] == [63, 36]
    assert [row["tokens"] for row in passages if row["window"] == 0] == [63, *15 * [64]]
    assert all(row["nll"] == 2.0 * row["tokens"] for row in passages)
    positions = rows.position_rows("p", found)
    assert [(row["bucket"], row["n"]) for row in positions] == [(1, 30), (16, 96), (64, 228), (256, 256), (512, 512)]
    assert {row["value"] for row in positions} == {2.0}
    perplexity = rows.text_perplexity_row("p", found, "text")
    assert perplexity["tokens"] == 99 + 1023 and perplexity["perplexity"] == pytest.approx(math.exp(2))
    assert perplexity["ci_low"] == pytest.approx(perplexity["ci_high"])  # every passage is as hard


def test_passages_of_one_topic_are_no_independent_ones():
    """Windows that differ in their loss, passages inside them that hardly do: the doubt is that of the windows."""
    rng, held, found = np.random.default_rng(1), 0, []
    for _ in range(200):
        topics = rng.normal(0, 0.1, (2, 16, 1))
        edges = np.array(rows.EDGES)
        tokens = np.tile(np.diff(edges), (16, 1))
        own = [(3 + topic + rng.normal(0, 0.05, tokens.shape)) * tokens for topic in topics]
        row = rows.text_perplexity_row("p", TextLosses(rows.EDGES, np.arange(16), own[0], tokens), "text")
        held += row["ci_low"] <= math.exp(3) <= row["ci_high"]
        found.append([TextLosses(rows.EDGES, np.arange(16), values, tokens) for values in own])
    assert held > 0.9 * 200
    wrong = 0
    for a, b in found[:60]:
        table = [row for plan, one in (("a", a), ("b", b)) for row in rows.text_loss_rows(plan, one)]
        (row,) = comparisons.text_comparison_rows(conform("text_losses", table, "r"), [("a", "b")])
        wrong += row["p_value"] < 0.05
    assert wrong <= 0.1 * 60  # 0.05, and 1.8 standard errors of 60 draws; with passages of 64 tokens 0.6


def test_short_texts_are_cut_into_at_least_16_items():
    for windows, expected in ((16, 16), (15, 30), (4, 16), (2, 16), (1, 16)):
        numbers, positions = (part.ravel() for part in np.meshgrid(np.arange(windows), [1, *range(64, 1024, 64)]))
        tokens, nll = comparisons.pooled(numbers, positions, np.full(numbers.size, 64), np.arange(numbers.size) * 1.0)
        assert len(tokens) == expected and tokens.sum() == 64 * numbers.size and nll.sum() == sum(range(numbers.size))


def test_the_end_of_a_text_does_not_widen_the_interval_of_a_difference():
    """Sixteen windows, the last of one passage: the interval of perplexity's law, ratios of losses to tokens."""
    rng, windows = np.random.default_rng(2), np.repeat(np.arange(17), [16] * 16 + [1])
    table = [
        {"plan_id": plan, "window": int(w), "position": 64 * k, "tokens": 64, "nll": 64 * (mean + 0.1 * rng.normal())}
        for plan, mean in (("a", 4.0), ("b", 3.0))
        for w, k in zip(windows, [*range(16)] * 16 + [0], strict=True)
    ]
    (row,) = comparisons.text_comparison_rows(conform("text_losses", table, "r"), [("a", "b")])
    sums, counts = np.zeros(17), np.bincount(windows) * 64
    for line in table:
        sums[line["window"]] += line["nll"] * (1 if line["plan_id"] == "a" else -1)
    exact = ratio_interval(sums, counts)
    assert row["difference"] == pytest.approx(exact.mean)
    assert row["ci_high"] - row["ci_low"] == pytest.approx(exact.high - exact.low, rel=0.2)  # sums: twelve times


def test_one_passage_has_no_interval():
    tokens = np.diff(np.minimum(rows.EDGES, 50))[None]
    row = rows.text_perplexity_row("p", TextLosses(rows.EDGES, np.arange(1), tokens * 1.0, tokens), "text")
    assert row["perplexity"] == pytest.approx(math.e) and row["ci_low"] is None and row["ci_high"] is None


def test_a_model_without_a_loss_is_compared_with_none():
    """Its perplexity says so; the others are compared all the same."""
    rng = np.random.default_rng(0)
    plans = {"a": 2.0, "b": 3.0, "nan": math.nan, "inf": math.inf}
    found = {plan: losses(loss * rng.uniform(0.9, 1.1, (2, len(rows.EDGES) - 1))) for plan, loss in plans.items()}
    table = conform("text_losses", [row for plan, own in found.items() for row in rows.text_loss_rows(plan, own)], "r")
    compared = comparisons.text_comparison_rows(table, [("a", "b"), ("a", "nan"), ("inf", "b"), ("a", "unknown")])
    assert [(row["plan_a"], row["plan_b"]) for row in compared] == [("a", "b")]
    (row,) = compared
    mean = {plan: own.nll.sum() / own.tokens.sum() for plan, own in found.items()}
    assert row["difference"] == pytest.approx(mean["a"] - mean["b"]) and row["measure"] == "text_nll"
    assert row["ci_low"] < row["difference"] < row["ci_high"] < 0 and row["p_value"] < 0.001
    for plan in ("nan", "inf"):
        broken = rows.text_perplexity_row(plan, found[plan], "text")
        assert not math.isfinite(broken["perplexity"]) and broken["ci_low"] is None and broken["ci_high"] is None


def test_answers_to_some_of_the_questions_are_taken_only_where_that_is_meant():
    questions = tiny.make_questions({"a": 3, "b": 2})
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    whole = Answers.of_letters(logits)
    table = rows.answer_table("p", questions, whole)
    assert table["question_id"].to_pylist() == [question.question_id for question in questions.questions]
    assert table["answer"].to_pylist() == [question.answer for question in questions.questions]
    assert table["predicted"].to_pylist() == [max(range(4), key=own.__getitem__) for own in logits]
    assert np.array_equal(np.stack([table[f"logit_{letter}"] for letter in "abcd"], axis=1), logits)
    for order in ([0, 1, 2, 4], [0, 1, 2, 4, 3]):
        some = Answers(**{name: values[order] for name, values in vars(whole).items()})
        with pytest.raises(ValueError, match=f"answers cover {len(order)} of 5 questions of test"):
            rows.answer_table("p", questions, some)
        partial = rows.answer_table("p", questions, some, partial=True)
        assert partial.to_pylist() == table.take(order).to_pylist()


def test_a_model_whose_logits_are_no_numbers_has_accuracy_comparisons_alone():
    rng = np.random.default_rng(0)
    columns = [f"logit_{letter}" for letter in "abcd"]
    table = []
    for plan in ("sound", "other", "broken"):
        for number, logits in enumerate(rng.normal(size=(30, 4))):
            logits = np.full(4, np.nan) if plan == "broken" and number == 3 else logits
            own = {"plan_id": plan, "split": "test", "language": "en", "subject": "a", "question_id": f"{number:02}"}
            own |= {"content_hash": "", "answer": number % 4, "predicted": int(np.argmax(logits))}
            table.append(own | dict(zip(columns, logits.tolist(), strict=True)))
    answers = conform("answers", table, "r")
    found = comparisons.comparison_rows("test", answers, [("sound", "other"), ("sound", "broken")])
    assert [(row["plan_b"], row["measure"]) for row in found] == [
        ("other", "accuracy"), ("other", "answer_nll"), ("broken", "accuracy")
    ]  # fmt: skip
    assert found[1]["p_holm"] == found[1]["p_value"]  # a family of one


def test_a_plain_difference_stays_one_among_very_many_comparisons(monkeypatch):
    """p is never below 1 / (resamples + 1): with 10,000 of them Holm's over 501 pairs would be above 0.05 for any.

    Here with 200 and 11 pairs, which is 50 times sooner.
    """
    monkeypatch.setattr(comparisons, "_RESAMPLES", 200)
    rng = np.random.default_rng(0)
    found = [row for plan, loss in (("a", 2.0), ("b", 9.0)) for row in rows.text_loss_rows(
        plan, losses(loss * rng.uniform(0.9, 1.1, (2, len(rows.EDGES) - 1)))
    )]  # fmt: skip
    compared = comparisons.text_comparison_rows(conform("text_losses", found, "r"), [("a", "b")] * 11)
    assert max(row["p_holm"] for row in compared) < 0.05


@pytest.mark.parametrize("normalised", [True, False])
def test_a_task_s_answers_are_the_likeliest_choices_whole_and_per_character(normalised):
    """Items have as many choices as they have, and their log-likelihoods follow each other."""
    items = (Item("t/0", "a", ("yes", "no"), 1), Item("t/1", "b", ("a choice of many letters", "b", "cd"), 2))
    task = Task("t", normalised, items, ())
    found = np.array([-2.0, -1.5, -4.0, -3.0, -6.5])
    first, second = rows.task_answer_table("p", task, np.array([0, 1]), found).to_pylist()
    assert (first["log_likelihoods"], second["log_likelihoods"]) == ([-2.0, -1.5], [-4.0, -3.0, -6.5])
    assert (first["lengths"], second["lengths"]) == ([3, 2], [24, 1, 2])
    assert [(row["predicted"], row["answer"]) for row in (first, second)] == [(1, 1), (1, 2)]
    # Per character: -.67 against -.75, and -.17 against -3 and -3.25.
    assert [row["predicted_norm"] for row in (first, second)] == ([0, 0] if normalised else [None, None])
    (alone,) = rows.task_answer_table("p", task, np.array([1]), found[2:]).to_pylist()
    assert alone == second
    with pytest.raises(ValueError, match="4 log-likelihoods for 2 items with 5 choices"):
        rows.task_answer_table("p", task, np.array([0, 1]), found[:4])


def test_perplexity_of_questions_is_of_every_subject_and_of_all():
    answers = {"plan_id": ["p"] * 4, "subject": ["b", "a", "b", "a"], "prompt_tokens": [5, 7, 9, 11]}
    table = pa.table(answers | {"prompt_nll": [1.0, 2.0, 3.0, 6.0]})
    found = rows.question_perplexity_rows(table)
    assert [(row["subject"], row["nll"], row["tokens"]) for row in found] == [
        (None, 3.0, 32),
        ("a", 4.0, 18),
        ("b", 2.0, 14),
    ]
    assert [row["perplexity"] for row in found] == pytest.approx([math.exp(3), math.exp(4), math.exp(2)])
    assert {row["target"] for row in found} == {"question"}
