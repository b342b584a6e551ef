"""reporting.py without workers: what is asked for, in what order and once, and which plans are compared with which."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from report_runs import answer_rows

from raymerge import rows
from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.context import TextLosses
from raymerge.evaluation import Answers
from raymerge.experiments.common import Inputs
from raymerge.experiments.reporting import Reporter
from raymerge.inputs import REPORT, SEARCH, TEXT, read_material, task_role
from raymerge.plan import base_plan, pairs_plan, tail_plan
from raymerge.progress import Silent
from raymerge.tables import RunDirectory
from raymerge.tasks import Item, Task

CHECKPOINT = Checkpoint("demo")
TAIL = tail_plan(CHECKPOINT.n_layers, [0.2, 0.3], name="tail", kind="found")
MIDDLE = pairs_plan(CHECKPOINT.n_layers, [(3, 4)], [0.5], name="middle", kind="found")
IDS = {plan: plan.plan_id(CHECKPOINT.identity) for plan in (TAIL, MIDDLE)}
SHARDS = {REPORT: 2, TEXT: 1, task_role("t"): 3, task_role("u"): 1}


def reporter(folder, *settings, **material):
    config = load_config(None, ["data.subjects=number_words", "data.report_limit_per_subject=6", *settings])
    questions = read_material(config, (REPORT,)).questions
    inputs = Inputs(**{"questions": questions, **material}, checkpoint=CHECKPOINT, text="a text")
    return Reporter(config, inputs, RunDirectory.open(folder, {}, "sweep"))


class Asked:
    """A pool whose workers answer by the given function until it raises."""

    def __init__(self, answer=None):
        self.items, self.answer = [], answer

    def map(self, method, items, on_result):
        assert method == "run"
        self.items = items
        for number, item in enumerate(items if self.answer else ()):
            on_result(number, self.answer(*item))


def asked(reporter, plans, firsts=(), answer=None):
    pool = Asked(answer)
    reporter.report(pool, plans, SHARDS, firsts, Silent())
    return pool.items


def test_only_what_no_table_holds_is_asked_for_and_plans_of_one_first_layer_together(tmp_path):
    task = SimpleNamespace(identity="t")
    found = reporter(tmp_path / "run", tasks={"t": task, "u": task})
    every = {
        plan: [
            *(("answers", (plan, REPORT, number, False)) for number in numbers),
            ("receipts", plan),
            *(("score_choices", (plan, task_role("t"), number)) for number in range(3)),
            ("score_choices", (plan, task_role("u"), 0)),
            ("text_nll", (plan, 0)),
        ]
        for plan, numbers in ((TAIL, [None]), (MIDDLE, [0, 1]))
    }

    def jobs(reporter, firsts=(MIDDLE.resumes_at, TAIL.resumes_at)):
        return asked(reporter, [TAIL, MIDDLE], firsts)

    assert jobs(found) == every[MIDDLE] + every[TAIL]
    # One layer at the last positions goes in one piece, where its inputs are cached and no prompt is judged.
    whole = [("answers", (TAIL, REPORT, number, False)) for number in (0, 1)]
    assert jobs(found, firsts=(MIDDLE.resumes_at,)) == every[MIDDLE] + whole + every[TAIL][1:]
    prompts = reporter(tmp_path / "prompts", "data.question_perplexity=true")
    assert [item for name, item in jobs(prompts) if name == "answers"] == [
        (plan, REPORT, number, True) for plan in (MIDDLE, TAIL) for number in (0, 1)
    ]

    nothing_asked = reporter(tmp_path / "text", questions={})
    assert {name for name, _ in jobs(nothing_asked)} == {"receipts", "text_nll"}

    # Answers on the search's split are none on the report's, nor is a question's perplexity that of the text.
    run, tail = found.run, IDS[TAIL]
    answers = [answer_rows(tail, 0.5, np.zeros(2, int), np.random.default_rng(0), subjects=["a"], split=split)
               for split in ("validation", "test")]  # fmt: skip
    perplexity = {"plan_id": tail, "tokens": 3, "nll": 1.0, "perplexity": 2.7}
    run.append("answers", answers[0])
    run.append("perplexity", [perplexity | {"target": "question"}], part="question")
    assert jobs(found) == every[MIDDLE] + every[TAIL]
    run.append("answers", answers[1])
    run.append("perplexity", [perplexity | {"target": "text"}], part="text")
    run.append("receipts", [{"plan_id": tail, "tensor": "x", "max_abs_change": 0.0, "relative_change": 0.0}])
    scored = {"item_id": "0", "content_hash": "0", "log_likelihoods": [0.0], "lengths": [1.0], "answer": 0}
    run.append("task_answers", [scored | {"plan_id": tail, "task": "t", "predicted": 0}])
    assert jobs(found) == every[MIDDLE] + [("score_choices", (TAIL, task_role("u"), 0))]


def test_a_plan_s_shares_are_stored_together_and_a_cut_report_goes_on(tmp_path):
    task = Task("t", False, tuple(Item(f"t/{number}", f"c{number}", ("a", "b"), 1) for number in range(3)), ())
    found = reporter(tmp_path / "run", "data.question_perplexity=true", tasks={"t": task})
    questions = found.inputs.questions[REPORT]
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    whole = replace(Answers.of_letters(logits), prompt_nll=np.full(6, 0.7), prompt_tokens=np.full(6, 5))
    tokens = np.full((1, len(rows.EDGES) - 1), 2)

    def answer(method, item):
        if method == "receipts":
            return []
        if method == "text_nll":
            return TextLosses(rows.EDGES, np.zeros(1, int), tokens * 0.5, tokens)
        if method == "score_choices":
            return np.array([[2], [0], [1]][item[2]]), np.array([-2.0, -1.0 - item[2]])
        members = np.array([[4, 1, 3], [0, 2, 5]][item[2]])
        columns = {name: values[members] for name, values in vars(whole).items()}
        return Answers(**columns)

    def cut(method, item):
        if method == "answers" and item[2] == 1:
            raise KeyboardInterrupt
        return answer(method, item)

    with pytest.raises(KeyboardInterrupt):
        asked(found, [MIDDLE], answer=cut)
    assert not found.run.has("answers")
    asked(found, [MIDDLE], answer=answer)
    stored = found.run.read("answers")
    assert stored["question_id"].to_pylist() == [question.question_id for question in questions.questions]
    np.testing.assert_array_equal(np.stack([stored[f"logit_{letter}"] for letter in "abcd"], 1), logits)
    assert sum(found.run.read("text_losses")["tokens"].to_pylist()) == tokens.sum()
    perplexities = {
        (row["target"], row["subject"]): row["perplexity"] for row in found.run.read("perplexity").to_pylist()
    }
    assert perplexities == {
        ("text", None): pytest.approx(np.exp(0.5)),
        ("question", None): pytest.approx(np.exp(0.7)),
        ("question", "number_words"): pytest.approx(np.exp(0.7)),
    }
    chosen = [(row["item_id"], row["predicted"]) for row in found.run.read("task_answers").to_pylist()]
    assert chosen == [("t/0", 0), ("t/1", 0), ("t/2", 1)]
    assert [method for method, _ in asked(found, [MIDDLE])] == ["receipts"]  # there was none to store


def test_what_is_stored_is_not_made_an_object_an_answer_to_see_which_plans_have_some(tmp_path):
    """Of 200 plans there are 2.8 million answers to MMLU's test questions: as objects 1 GB."""
    found, count = reporter(tmp_path / "run"), 20_000
    one = answer_rows(IDS[TAIL], 1.0, np.zeros(1, int), np.random.default_rng(0), subjects=["number_words"])
    one = pa.Table.from_pylist(one)
    answers = one.take(np.zeros(count, dtype=int))
    answers = answers.set_column(
        answers.schema.get_field_index("question_id"), "question_id", pa.array(map(str, range(count)))
    )
    found.run.append("answers", answers, part="many")
    tracemalloc.start()
    try:
        items = asked(found, [TAIL, MIDDLE])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [item[0] for method, item in items if method == "answers"] == [MIDDLE, MIDDLE]
    assert peak < 50 * count, f"{peak / count:.0f} bytes an answer"


def test_search_answers_are_not_stored_where_the_report_asks_the_same_split(tmp_path):
    for split, stored in (("validation", True), ("test", False)):
        found = reporter(tmp_path / split, f"data.search_split={split}", "data.search_on_test=true")
        found.inputs.questions[SEARCH] = found.inputs.questions[REPORT]
        found.store_answers(TAIL, SEARCH, Answers.of_letters(np.zeros((6, 4), np.float32)))
        assert found.run.has("answers") == stored


def derived(folder, n_plans, n_questions, compared, **options):
    """A reporter whose plans have answered both splits, the plans by their names, and what was derived twice."""
    found, rng = reporter(folder), np.random.default_rng(0)
    plans = [base_plan(CHECKPOINT.n_layers)]
    plans += [
        tail_plan(CHECKPOINT.n_layers, [share / 20], name=f"p{share}", kind="found") for share in range(1, n_plans)
    ]
    answer = rng.integers(4, size=n_questions)
    names = {}
    for number, plan in enumerate(plans):
        names[plan.plan_id(found.identity)] = plan.name
        for split, right in (("test", 0.3 + number / 40), ("validation", 0.1)):
            made = answer_rows(plan.plan_id(found.identity), right, answer, rng, subjects=("a", "b"), split=split)
            found.run.append("answers", made)
    pairs = [(plans[a], plans[b]) for a, b in compared]
    for _ in range(2):
        found.derive(plans, pairs, **options)
    return found.run, names


def pairs_of(table, names, measure="accuracy"):
    return {(names[row["plan_a"]], names[row["plan_b"]]): row for row in table.to_pylist() if row["measure"] == measure}


def test_what_is_asked_for_is_one_family_of_tests_and_all_other_pairs_another(tmp_path):
    run, names = derived(tmp_path / "run", 4, 60, [(1, 0), (1, 1), (2, 1), (1, 0)], subjects=("b",))
    found = pairs_of(run.read("comparisons"), names)
    # Each pair once, as it was asked for; a plan with itself not at all.
    assert list(found) == [("p1", "base"), ("p2", "p1"), ("base", "p2"), ("base", "p3"), ("p1", "p3"), ("p2", "p3")]
    assert run.read("comparisons").num_rows == 2 * len(found)
    for family in (list(found)[:2], list(found)[2:]):
        ordered = sorted(family, key=lambda pair: found[pair]["p_value"])
        assert found[ordered[0]]["p_holm"] == pytest.approx(min(1.0, len(family) * found[ordered[0]]["p_value"]))
    accuracy = run.read("accuracy")
    assert accuracy.num_rows == 4 * 2 * 4  # plans, splits; two subjects and two averages
    chosen = accuracy.filter(pc.and_(pc.equal(accuracy["split"], "test"), pc.equal(accuracy["subject"], "_micro")))
    share = {names[row["plan_id"]]: row["accuracy"] for row in chosen.to_pylist()}
    assert found["p2", "p1"]["difference"] == pytest.approx(share["p2"] - share["p1"])
    own = pairs_of(run.read("subject_comparisons"), names)
    assert list(own) == list(found) and {(row["subjects"], row["n"]) for row in own.values()} == {("b", 30)}
    for table in ("plans", "costs"):
        assert sorted(names[key] for key in run.read(table)["plan_id"].to_pylist()) == sorted(names.values())
    assert set(run.read("coefficients")["plan_id"].to_pylist()) == set(names)


def test_accuracies_on_tasks_are_compared_as_those_on_questions_are(tmp_path):
    found = reporter(tmp_path / "run", tasks={"t": SimpleNamespace(identity="t")}, questions={})
    plans = [base_plan(CHECKPOINT.n_layers), TAIL, MIDDLE]
    row = {"task": "t", "content_hash": "0", "log_likelihoods": [0.0], "lengths": [1.0], "answer": 0}
    for number, plan in enumerate(plans):
        named = row | {"plan_id": plan.plan_id(found.identity)}
        answered = [named | {"item_id": f"{item}", "predicted": int(item < 2 * number)} for item in range(8)]
        found.run.append("task_answers", answered)
    found.derive(plans, [(TAIL, plans[0])])
    accuracy = {row["plan_id"]: row["accuracy"] for row in found.run.read("task_accuracy").to_pylist()}
    assert accuracy == {plan.plan_id(found.identity): 1 - number / 4 for number, plan in enumerate(plans)}
    compared = found.run.read("task_comparisons").to_pylist()
    assert [(row["plan_a"], row["plan_b"], row["difference"]) for row in compared] == [
        (IDS[TAIL], plans[0].plan_id(found.identity), -0.25),
        (plans[0].plan_id(found.identity), IDS[MIDDLE], 0.5),
        (IDS[TAIL], IDS[MIDDLE], 0.25),
    ]


def test_of_more_than_twelve_plans_only_the_pairs_asked_for_are_compared(tmp_path):
    for count, pairs in ((12, 66), (13, 1)):
        run, names = derived(tmp_path / f"{count}", count, 4, [(1, 0)])
        assert len(pairs_of(run.read("comparisons"), names)) == pairs
