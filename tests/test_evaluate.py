"""model_evaluation.py and refitting.py without workers: what is asked for, in what order, and what is stored of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from raymerge import rows
from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.context import TextLosses
from raymerge.evaluation import Answers
from raymerge.experiments.common import Inputs
from raymerge.experiments.model_evaluation import _Evaluation
from raymerge.experiments.refitting import fit, refit_of
from raymerge.inputs import CALIBRATION, REPORT, TEXT, read_material, task_role
from raymerge.plan import base_plan, tail_plan
from raymerge.progress import Silent
from raymerge.refit import RefitError, steps_of
from raymerge.tables import RunDirectory
from raymerge.tasks import Item, Task

CHECKPOINT = Checkpoint("demo")
PLAN = base_plan(CHECKPOINT.n_layers)
TASKS = {
    name: Task(name, False, tuple(Item(f"{name}/{n}", "q", ("a", "bc"), 1) for n in range(3)), ()) for name in "tu"
}
LOGITS = np.arange(24, dtype=np.float32).reshape(6, 4)


class Pool:
    """Workers that answer a model's questions, in shards of these members and tokens; a call may be cut short."""

    def __init__(self, shards, cut=None):
        self.shards, self.cut, self.asked = shards, cut, []

    def map(self, method, items, on_result=None):
        if method == "shard_rows":
            return [[members for members, _ in self.shards[role]] for role in items]
        if method == "shard_tokens":
            return [[tokens for _, tokens in self.shards[name]] for name in items]
        assert method == "run"
        for number, (name, item) in enumerate(items):
            if (name, item[1:]) == self.cut:
                raise KeyboardInterrupt
            self.asked.append((name, item[1:]))
            on_result(number, getattr(self, name)(*item))
        return None

    def answers(self, plan, role, number, prompt_nll):
        members = np.array(self.shards[role][number][0])
        n = len(members)
        nll = np.full(n, 0.5) if prompt_nll else np.full(n, np.nan)
        return Answers(members, LOGITS[members], np.zeros(n), np.ones(n, bool), nll, np.full(n, 7))

    def score_choices(self, plan, role, number):
        members = np.array(self.shards[role][number][0])
        return members, np.stack([-members, -members - 0.5], axis=1).ravel().astype(float)

    def text_nll(self, plan, number):
        tokens = np.array([[number + 1] * (len(rows.EDGES) - 1)])
        return TextLosses(rows.EDGES, np.array([number]), tokens * 0.25, tokens)


def evaluation(folder, *settings, tasks=TASKS, text="a text", asks=True):
    config = load_config(None, ["data.subjects=number_words", "data.report_limit_per_subject=6", *settings])
    questions = read_material(config, (REPORT,)).questions if asks else {}
    inputs = Inputs(questions=questions, tasks=tasks, checkpoint=CHECKPOINT, text=text)
    return _Evaluation(config, inputs, RunDirectory.open(folder, {}, "evaluate"), PLAN, "its plan")


SHARDS = {
    REPORT: [([4, 1, 3], 50), ([0, 2, 5], 90)],
    task_role("t"): [([1, 0], 40), ([2], 60)],
    task_role("u"): [([0, 1, 2], 70)],
    TEXT: [(None, 80), (None, 30)],
}
CALLS = [
    ("answers", (REPORT, 1, False)),
    ("text_nll", (0,)),
    ("score_choices", (task_role("u"), 0)),
    ("score_choices", (task_role("t"), 1)),
    ("answers", (REPORT, 0, False)),
    ("score_choices", (task_role("t"), 0)),
    ("text_nll", (1,)),
]  # the largest first


def check(run):
    answers = run.read("answers")
    np.testing.assert_array_equal(np.stack([answers[f"logit_{letter}"] for letter in "abcd"], 1), LOGITS)
    asked = run.read("task_answers").to_pylist()
    assert [(row["task"], row["item_id"], row["log_likelihoods"][0]) for row in asked] == [
        (name, f"{name}/{n}", -float(n)) for name in "tu" for n in range(3)
    ]
    (text,) = run.read("perplexity").to_pylist()
    assert (text["target"], text["nll"], text["tokens"]) == ("text", pytest.approx(0.25), 3 * (len(rows.EDGES) - 1))


def test_everything_is_asked_for_once_the_largest_first_and_stored_in_the_order_of_the_questions(tmp_path):
    of, pool = evaluation(tmp_path), Pool(SHARDS)
    of.answer(pool, Silent())
    assert pool.asked == CALLS
    check(of.run)
    again = Pool(SHARDS)
    of.answer(again, Silent())
    assert again.asked == []
    check(of.run)


@pytest.mark.parametrize("at", range(len(CALLS)))
def test_an_evaluation_goes_on_with_what_no_part_holds(at, tmp_path):
    of = evaluation(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        of.answer(Pool(SHARDS, cut=CALLS[at]), Silent())
    pool = Pool(SHARDS)
    of.answer(pool, Silent())
    # A text is stored whole.
    assert pool.asked == [call for n, call in enumerate(CALLS) if n >= at or call[0] == "text_nll"]
    check(of.run)


def test_with_another_number_of_workers_the_shards_are_others_and_no_answer_stands_twice(tmp_path):
    of = evaluation(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        of.answer(Pool(SHARDS, cut=CALLS[4]), Silent())
    other = SHARDS | {REPORT: [([0, 2], 5), ([1, 5], 6), ([3, 4], 7)], task_role("t"): [([0], 1), ([1], 2), ([2], 3)]}
    pool = Pool(other)
    of.answer(pool, Silent())
    assert [call for call in pool.asked if call[0] != "text_nll"] == [
        ("answers", (REPORT, 2, False)),
        ("answers", (REPORT, 1, False)),
        ("score_choices", (task_role("t"), 1)),
        ("score_choices", (task_role("t"), 0)),
    ]
    check(of.run)


def test_perplexities_of_questions_stand_before_that_of_the_text(tmp_path):
    of, pool = evaluation(tmp_path, "data.question_perplexity=true"), Pool(SHARDS)
    of.answer(pool, Silent())
    assert pool.asked[0] == ("answers", (REPORT, 1, True))
    found = [(row["target"], row["subject"], row["nll"]) for row in of.run.read("perplexity").to_pylist()]
    assert sorted(found, key=str) == sorted(
        [("question", None, pytest.approx(0.5)), ("question", "number_words", pytest.approx(0.5)),
         ("text", None, pytest.approx(0.25))], key=str,
    )  # fmt: skip
    assert found[-1][0] == "text"


def test_an_evaluation_may_be_of_text_or_tasks_alone(tmp_path):
    of, pool = evaluation(tmp_path / "text", tasks={}, asks=False), Pool(SHARDS)
    of.answer(pool, Silent())
    assert pool.asked == [("text_nll", (0,)), ("text_nll", (1,))]
    assert sorted(of.run.row_counts()) == ["context", "perplexity", "text_losses"]
    of, pool = evaluation(tmp_path / "tasks", tasks={"u": TASKS["u"]}, asks=False, text=None), Pool(SHARDS)
    of.answer(pool, Silent())
    assert sorted(of.run.row_counts()) == ["task_answers"]


# -- refits ----------------------------------------------------------------------------------------------------------


def inputs_of(calibration=("a text", 100)):
    return Inputs(checkpoint=CHECKPOINT, calibration=calibration)


def test_a_refit_is_named_by_its_method_and_the_tokens_that_it_is_made_on():
    config = load_config(None, ["plan.ridge=0.5", "plan.refit_layers=2"])
    assert refit_of(config, inputs_of(), "none") is None
    found = {method: refit_of(config, inputs_of(), method) for method in ("linear", "scale", "outputs", "units")}
    assert {name: (refit.method, refit.ridge, refit.layers) for name, refit in found.items()} == {
        "linear": ("linear", 0.5, 0), "scale": ("scale", 0.5, 0), "outputs": ("outputs", 0.5, 2),
        "units": ("units", 0.5, 2),
    }  # fmt: skip
    assert len({refit.calibration for refit in found.values()}) == 1
    others = [
        refit_of(config, inputs_of(("another text", 100)), "linear"),
        refit_of(config, inputs_of(("a text", 101)), "linear"),
        *(
            refit_of(load_config(None, [setting]), inputs_of(), "linear")
            for setting in ("calibration.tokens=77", "calibration.seed=5", "model.add_bos=true", "model.add_bos=false")
        ),
    ]
    assert len({refit.calibration for refit in (found["linear"], *others)}) == 7


class Fitters:
    """Workers, some of which have some fits of a plan on their disks."""

    def __init__(self, count, done, shards=3):
        self.count, self.done, self.shards, self.calls = count, done, shards, []

    def broadcast(self, method, plan, *args):
        self.calls.append((method, plan.name, *args))
        return self.done

    def map(self, method, items):
        if method == "shard_tokens":
            return [[10] * self.shards]
        self.calls.append((method, *((item[0].name, *item[1:]) if isinstance(item, tuple) else item.name
                                     for item in items)))  # fmt: skip
        if method == "refit_records":
            return [[{"layer": 7, "part": "mlp", "tokens": 30, "ridge": 0.5, "error": 0.25, "held_out_error": np.nan}]]
        return [f"{method} {number}" for number in range(len(items))]


def fitted(run, pool, *plans):
    fit(pool, plans, inputs_of(), run, Silent())
    return pool.calls


def test_each_fit_is_made_of_all_shares_before_the_next_one_and_kept_everywhere(tmp_path):
    plain = tail_plan(CHECKPOINT.n_layers, [0.5, 0.5], name="p", kind="fixed")
    fit_of = replace(plain, refit=refit_of(load_config(None, []), inputs_of(), "outputs"))
    assert len(steps_of(fit_of)) == 2
    run = RunDirectory.open(tmp_path, {}, "sweep")

    def made(number, shares):
        parts = [f"refit_sums {n}" for n in range(shares)]
        return [
            ("refit_sums", *(("p", number, (share, shares)) for share in range(shares))),
            ("refit_solve", ("p", number, parts)),
            ("refit_store", "p", number, "refit_solve 0"),
        ]

    prepared = ("refit_prepare", ("p", 0), ("p", 1), ("p", 2))
    assert fitted(run, Fitters(2, [0, 1]), plain, fit_of) == [
        ("refit_done", "p"), prepared, *made(0, 2), *made(1, 2), ("refit_records", "p"),
    ]  # fmt: skip
    (row,) = run.read("refits").to_pylist()
    assert row["seconds"] >= 0 and row["held_out_error"] is None and (row["layer"], row["tokens"]) == (7, 30)
    assert (row["method"], row["error"], row["plan_id"]) == ("outputs", 0.25, fit_of.plan_id(CHECKPOINT.identity))
    # What every worker has is not made again; no more shares than shards; what is in the table is not stored twice.
    assert fitted(run, Fitters(8, [1, 2]), fit_of) == [("refit_done", "p"), prepared, *made(1, 3)]
    assert fitted(run, Fitters(2, [2, 2]), fit_of) == [("refit_done", "p")]
    assert len(run.read("refits")) == 1 and fitted(run, Fitters(2, [0]), plain) == []
    told = []
    shown = SimpleNamespace(stage=lambda *_: None, advance=lambda *done: told.append(done))
    fit(Fitters(2, [2, 2]), [fit_of], inputs_of(), run, shown)
    assert told[-1] == (2, "p"), "fits that are there count as made"
    other = RunDirectory.open(tmp_path / "other", {}, "sweep")
    fitted(other, Fitters(2, [1, 2]), fit_of)
    assert other.read("refits")["seconds"].to_pylist() == [None], "some of it was made before"


def test_what_cannot_be_refitted_is_refused_before_anything_is_fitted(tmp_path):
    plan = replace(PLAN, refit=refit_of(load_config(None, []), inputs_of(), "outputs"))
    pool = Fitters(1, [0])
    with pytest.raises(RefitError, match="merges nothing"):
        fitted(RunDirectory.open(tmp_path, {}, "sweep"), pool, plan)
    assert pool.calls == []


def test_a_calibration_of_prompts_is_named_by_them():
    config = load_config(None, ["data.subjects=number_words", "data.limit_per_subject=2"])
    prompts = read_material(config, (CALIBRATION,)).calibration
    one = refit_of(config, inputs_of(prompts), "linear").calibration
    assert one != refit_of(config, inputs_of(), "linear").calibration
