"""Schemas match design.md; rows that do not fit are refused; accuracies follow from answers."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from raymerge.schemas import (
    SCHEMAS,
    conform,
    correlation_ceiling,
    derive_accuracy,
    derive_task_accuracy,
    layer_ranges,
    plan_labels,
    schema_of,
)
from raymerge.statistics import macro_interval

TRIAL = {
    "searcher": "bayes", "iteration": 3, "batch": 1, "tune_trial": "t", "actor": "w", "seed": 0, "plan_id": "p",
    "alphas": [0.5, 0.25], "objective": "answer_nll", "n_questions": 20, "seconds": 0.5, "status": "failed",
}  # fmt: skip


def test_tables_of_the_contract():
    assert sorted(SCHEMAS) == sorted(
        "similarity similarity_correlation embeddings degeneracy plans coefficients trials answers accuracy "
        "blocks comparisons perplexity costs receipts gradient_history samples block_influence sensitivity sweep "
        "removals context refits incidents task_answers task_accuracy task_comparisons subject_comparisons "
        "text_losses".split()
    )
    for schema in SCHEMAS.values():
        assert schema.field(0).equals(pa.field("run_id", pa.string(), nullable=False))
    nullable = {name: [f.name for f in schema if f.nullable] for name, schema in SCHEMAS.items()}
    assert nullable["plans"] == ["matrix", "step", "into", "remove", "alpha"]
    assert nullable["trials"] == ["block", "value", "accuracy", "nll", "perplexity", "cpu_seconds", "error"]
    assert nullable["answers"] == ["logsumexp_all", "top_is_letter", "prompt_nll", "prompt_tokens"]
    assert nullable["task_answers"] == ["predicted_norm"] and nullable["task_comparisons"] == ["p_holm"]
    assert nullable["similarity"] == ["value", "null_mean", "null_p95", "ci_low", "ci_high", "note"]
    assert nullable["accuracy"] == ["ci_low", "ci_high"] and nullable["comparisons"] == ["p_holm"]
    assert nullable["receipts"] == []
    assert SCHEMAS["answers"].field("logit_d").type == pa.float32()
    assert SCHEMAS["answers"].field("predicted").type == pa.int8()
    assert SCHEMAS["trials"].field("alphas").type == pa.list_(pa.float64())
    assert SCHEMAS["plans"].field("alpha").type == pa.float64()  # plan_id is of the digits


def test_conform_fills_nullable_columns_and_run_id():
    table = conform("trials", [TRIAL], "r")
    assert table.schema.equals(SCHEMAS["trials"])
    assert table.to_pylist() == [
        {
            "run_id": "r",
            **TRIAL,
            **dict.fromkeys(("block", "value", "accuracy", "nll", "perplexity", "cpu_seconds", "error")),
        }
    ]
    assert conform("trials", pa.Table.from_pylist([TRIAL]), "r").equals(table)
    assert conform("trials", table, "r").equals(table)


def test_conform_takes_numpy_values():
    row = {**TRIAL, "alphas": np.array([0.5, 0.25]), "iteration": np.int64(3), "seconds": np.float32(0.5)}
    assert conform("trials", [row], "r").equals(conform("trials", [TRIAL], "r"))


def test_conform_of_nothing():
    assert conform("trials", [], "r").equals(SCHEMAS["trials"].empty_table())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valeu": 1.0}, "no column valeu; it has run_id, searcher"),
        ({"status": None}, "column status: 1 of 2 rows have no value, the first is row 1"),
        ({"iteration": 1.5}, r"column iteration \(int32\)"),
        ({"iteration": 2**40}, r"column iteration \(int32\)"),
        ({"searcher": 7}, r"column searcher \(string\)"),
        ({"run_id": "another"}, "another run's run_id"),
    ],
)
def test_conform_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        conform("trials", [TRIAL, {**TRIAL, **change}], "r")


def test_conform_names_missing_columns_and_tables():
    with pytest.raises(ValueError, match="lack objective, seconds"):
        conform("trials", [{k: v for k, v in TRIAL.items() if k not in ("objective", "seconds")}], "r")
    with pytest.raises(ValueError, match="lack objective"):
        conform("trials", pa.Table.from_pylist([TRIAL]).drop_columns("objective"), "r")
    with pytest.raises(ValueError, match="no table 'trial'; tables are similarity"):
        schema_of("trial")


def answers_table(rows):
    """Rows (plan, split, language, subject, answer, predicted) as an answers table, logit 1 on the prediction."""
    return conform(
        "answers",
        [
            {"plan_id": p, "split": s, "language": g, "subject": t, "question_id": f"{t}/{i}", "content_hash": "",
             "answer": a, "predicted": q, **{f"logit_{c}": float(k == q) for k, c in enumerate("abcd")}}
            for i, (p, s, g, t, a, q) in enumerate(rows)
        ],
        "r",
    )  # fmt: skip


def test_derived_accuracy_by_hand():
    rows = [("p", "test", "en", "b", 0, 0), ("p", "test", "en", "b", 1, 1), ("p", "test", "en", "b", 2, 0),
            ("p", "test", "en", "b", 3, 3), ("p", "test", "en", "a", 0, 1), ("p", "test", "en", "a", 0, 0)]  # fmt: skip
    result = {row["subject"]: row for row in derive_accuracy(answers_table(rows))}
    assert list(result) == ["_micro", "_macro", "a", "b"]
    right = math.log(math.e + 3) - 1  # nll where the prediction is right, and where it is wrong
    wrong = math.log(math.e + 3)
    expect = {
        "a": (2, 1, 0.5, 0.5, (right + wrong) / 2),
        "b": (4, 3, 0.75, 0.25, (3 * right + wrong) / 4),
        "_micro": (6, 4, 4 / 6, math.sqrt(4 / 6 * 2 / 6 / 5), (4 * right + 2 * wrong) / 6),
        "_macro": (6, 4, 0.625, math.sqrt(0.5**2 + 0.25**2) / 2, (5 * right + 3 * wrong) / 8),
    }
    for subject, values in expect.items():
        row = result[subject]
        got = [row[name] for name in ("n", "correct", "accuracy", "standard_error", "nll")]
        assert got == pytest.approx(values, rel=1e-12), subject
    assert conform("accuracy", list(result.values()), "r").num_rows == 4
    # Wilson's interval of 3 of 4
    assert (result["b"]["ci_low"], result["b"]["ci_high"]) == pytest.approx((0.3006418, 0.9544127), abs=1e-6)
    assert (result["_macro"]["ci_low"], result["_macro"]["ci_high"]) == macro_interval([1, 3], [2, 4])
    assert result["_micro"]["ci_low"] < 4 / 6 < result["_micro"]["ci_high"]


def test_derived_accuracy_keeps_groups_apart_in_any_order():
    rng = np.random.default_rng(0)
    rows = [
        (p, s, g, t, int(rng.integers(4)), int(rng.integers(4)))
        for p in ("z", "a") for s in ("validation", "test") for g in ("en", "es") for t in ("x", "y", "w")
        for _ in range(9)
    ]  # fmt: skip
    table = answers_table(rows)
    straight = derive_accuracy(table)
    assert len(straight) == 2 * 2 * 2 * 5
    for row in straight:
        inside = [r for r in rows if r[:3] == (row["plan_id"], row["split"], row["language"])]
        if not row["subject"].startswith("_"):
            inside = [r for r in inside if r[3] == row["subject"]]
        assert (row["n"], row["correct"]) == (len(inside), sum(r[4] == r[5] for r in inside))
    shuffled = derive_accuracy(table.take(rng.permutation(table.num_rows)))

    def key(row):
        return row["plan_id"], row["split"], row["language"], row["subject"]

    for one, other in zip(sorted(straight, key=key), sorted(shuffled, key=key), strict=True):
        assert key(one) == key(other)
        for name in ("n", "correct", "accuracy", "standard_error", "nll"):
            assert one[name] == pytest.approx(other[name], rel=1e-12)


def test_derived_accuracy_refuses_a_question_twice():
    table = answers_table([("p", "test", "en", "a", 0, 0), ("p", "test", "en", "a", 1, 0)])
    with pytest.raises(ValueError, match="1 rows twice, for example .*a/1"):
        derive_accuracy(pa.concat_tables([table, table.slice(1)]))


def test_derived_accuracy_of_nothing_and_of_one_question():
    assert derive_accuracy(SCHEMAS["answers"].empty_table()) == []
    rows = derive_accuracy(answers_table([("p", "test", "en", "a", 0, 0)]))
    assert all(math.isnan(row["standard_error"]) for row in rows) and rows[0]["accuracy"] == 1.0


def test_derived_accuracy_of_tasks_by_hand():
    rows = [
        {"plan_id": plan, "task": task, "item_id": f"{task}/{i}", "content_hash": "", "log_likelihoods": [],
         "lengths": [],
         "answer": 1, "predicted": p, "predicted_norm": n}
        for plan, task, answers in (("a", "x", [(1, 0), (1, 1), (0, 1), (1, 1)]), ("b", "x", [(0, 0)] * 4),
                                    ("a", "y", [(1, None), (0, None)]))
        for i, (p, n) in enumerate(answers)
    ]  # fmt: skip
    found = derive_task_accuracy(conform("task_answers", rows, "r"))
    assert [(r["plan_id"], r["task"], r["measure"], r["n"], r["correct"]) for r in found] == [
        ("a", "x", "acc", 4, 3), ("a", "x", "acc_norm", 4, 3), ("b", "x", "acc", 4, 0), ("b", "x", "acc_norm", 4, 0),
        ("a", "y", "acc", 2, 1),
    ]  # fmt: skip
    assert found[0]["standard_error"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert 0 == found[2]["ci_low"] < found[2]["ci_high"] < 0.5
    conform("task_accuracy", found, "r")
    with pytest.raises(ValueError, match="item x/0 of task x is there twice for plan a"):
        derive_task_accuracy(conform("task_answers", [*rows, rows[0]], "r"))


def test_accuracies_of_tasks_are_derived_without_a_python_object_for_every_answer():
    """A sweep of 150 points has 1.5 million answers to HellaSwag: as objects 1.7 GB."""
    plans, items = 4, 2000
    count = plans * items
    answers = pa.table(
        {
            "plan_id": np.repeat([f"{plan:016x}" for plan in range(plans)], items),
            "task": ["hellaswag"] * count,
            "item_id": [f"hellaswag/{item}" for item in range(items)] * plans,
            "log_likelihoods": [[1.0, 2.0, 3.0, 4.0]] * count,
            "answer": np.zeros(count, dtype=np.int8),
            **dict.fromkeys(("predicted", "predicted_norm"), np.zeros(count, dtype=np.int8)),
        }
    )
    tracemalloc.start()
    try:
        found = derive_task_accuracy(answers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [(row["measure"], row["n"], row["correct"]) for row in found] == [
        (measure, items, items) for _ in range(plans) for measure in ("acc", "acc_norm")
    ]
    assert peak < 200 * count, f"{peak / count:.0f} bytes a row"


def test_labels_join_a_plans_names_and_count_the_random_ones_that_were_scored():
    named = [("a", "base", "base"), ("b", "random", "random"), ("a", "found", "found"), ("a", "found", "found")]
    plans = [{"plan_id": plan, "name": name, "kind": kind} for plan, name, kind in named]
    drawn = [("random", "ok"), ("random", "failed"), ("bayes", "ok"), ("random", "ok")]
    trials = [{"searcher": searcher, "status": status} for searcher, status in drawn]
    assert plan_labels(plans, trials) == {"a": "base = found", "b": "best of 2 random"}
    assert plan_labels(plans, trials[:1])["b"] == "best of 1 random"
    assert plan_labels(plans, [])["b"] == "best of random"


def test_no_two_plans_are_called_alike():
    """The published base.json was called as the unmerged model is, and figures drew both on one line."""
    named = [("a", "base", "base"), ("b", "drop", "drop"), ("c", "base", "file"), ("d", "half", "fixed"),
             ("e", "half", "fixed"), ("f", "mine", "file")]  # fmt: skip
    plans = [{"plan_id": plan, "name": name, "kind": kind} for plan, name, kind in named]
    assert [*plan_labels(plans, []).values()] == [
        "base", "drop", "base (alpha file)", "half (d)", "half (e)", "mine"
    ]  # fmt: skip


def test_layers_are_written_as_ranges():
    assert layer_ranges([5, 1, 2, 0, 8, 7]) == "0-2, 5, 7-8" and layer_ranges([]) == ""


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(0.9, 0.4, 0.6), (None, 0.4, None), (0.9, -0.1, None), (-0.75, -18.0, None), (0, 0.5, None)],
)
def test_matrices_of_noise_have_no_ceiling(a, b, expected):
    assert correlation_ceiling({"reliability_a": a, "reliability_b": b}) == (expected and pytest.approx(expected))
