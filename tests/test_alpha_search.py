"""alpha_search.py without workers: which controls there are, what is searched and stored, and which plan is best."""

import errno
import os
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import tiny
from test_heuristics import planted

from raymerge.alpha_files import read_alpha_file
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.config import ConfigError, SearcherName
from raymerge.config_file import load_config
from raymerge.errors import UserError
from raymerge.evaluation import Answers
from raymerge.experiments import alpha_search, common, found_models
from raymerge.experiments.alpha_search import _check, _Search
from raymerge.experiments.common import Inputs
from raymerge.experiments.controls import controls_of, keeping_one
from raymerge.experiments.found_models import FoundModels
from raymerge.experiments.reporting import Reporter
from raymerge.gradient import Epoch
from raymerge.inputs import CALIBRATION, SEARCH, read_material
from raymerge.plan import PlanError, base_plan, block_plan, drop_plan, pairs_plan, tail_plan
from raymerge.plan_files import read_plan
from raymerge.plan_section import Similarity, starting_plan
from raymerge.progress import Silent
from raymerge.proposers import BayesProposer, RandomProposer
from raymerge.refit import RefitError
from raymerge.search import SearchOutcome
from raymerge.tables import RunDirectory, RunError

CHECKPOINT = Checkpoint("demo")
N_LAYERS = CHECKPOINT.n_layers
SIMILARITY = Similarity(planted(N_LAYERS, {(7, 8): 0.9, (8, 9): 0.8, (18, 19): 0.3}), np.arange(N_LAYERS) / 100)
BLOCK = ["plan.selection=block", "plan.block=search", "plan.starts=[4, 9, 11]"]


def searching(folder, *settings, similarity=None, first=None, roles=(), command=("test",)):
    """A search of two merges, begun but for its workers."""
    few = ["data.subjects=number_words", "data.limit_per_subject=3"]
    config = load_config(None, ["plan.merges=2", *few, *settings])
    inputs = Inputs(**vars(read_material(config, roles)), checkpoint=CHECKPOINT, text="a text")
    run = RunDirectory.open(folder, {}, "search")
    start = starting_plan(config.plan, N_LAYERS, similarity, first)
    return _Search(config, inputs, run, str(folder / "cache"), start, similarity, Silent(), command)


def trial(searcher="bayes", iteration=0, value=0.5, **more):
    """A row of `trials`; a candidate without a value has failed."""
    return {
        "searcher": searcher, "iteration": iteration, "batch": 0, "tune_trial": "t", "actor": "worker-0", "seed": 0,
        "plan_id": "p", "alphas": [0.25, 0.75], "objective": "micro_accuracy", "value": value, "nll": 1.0,
        "n_questions": 3, "seconds": 1.0, "status": "failed" if value is None else "ok", **more,
    }  # fmt: skip


def found_in(trials, name, *columns):
    rows = sorted((row for row in trials if row["searcher"] == name), key=lambda row: row["iteration"])
    return [tuple(row[column] for column in columns) for row in rows]


# -- controls --------------------------------------------------------------------------------------------------------

ANSWERS = Answers.of_letters(np.eye(4, dtype=np.float32)[:3])
FIRST, FIXED = ["base", "drop", "before_last"], "fixed_0.6225"
BY_SIMILARITY = ["plan.similarity_run=x", "plan.base=similarity"]


def test_states_are_kept_where_any_candidate_or_control_starts(tmp_path):
    assert searching(tmp_path / "tail").firsts == (N_LAYERS - 3,)
    assert searching(tmp_path / "block", *BLOCK[:1], "plan.block=7").firsts == (6, N_LAYERS - 3)
    assert searching(tmp_path / "blocks", *BLOCK).firsts == (3, 8, 10, N_LAYERS - 3)


class Judges:
    """Workers that judge a control by its name; two of them time a candidate."""

    count = 2

    def __init__(self, results=None, answers=None):
        self.results, self.answers, self.timed = results or {}, answers, None

    def map(self, method, plans, on_result=lambda *_: None):
        assert method == "judge"
        self.judged = plans
        found = [
            ({"value": self.results.get(plan.name, 0.5), "nll": 1.0, "n_questions": 3}, self.answers) for plan in plans
        ]
        for number, result in enumerate(found):
            on_result(number, result)
        return found

    def broadcast(self, method, candidates):
        self.timed = method, candidates
        return [[{"seconds": 0.25}], [{"seconds": 0.75}]]


def test_controls_are_trials_of_their_own_name_and_the_slowest_worker_says_what_a_candidate_takes(tmp_path):
    search = searching(tmp_path, "plan.ratio=0.7", "search.seed=3", roles=(SEARCH,))
    search.pool = Judges({"drop": float("nan")}, ANSWERS)
    controls = controls_of(search.config.plan, CHECKPOINT, search.start, None, Silent())
    assert search._try_controls(controls) == 0.75 and search.pool.timed == ("score", [[0.7, 0.7]])
    # The unmerged model is evaluated on the report's questions alone.
    assert [plan.name for plan in search.pool.judged] == ["drop", "before_last", FIXED, "fixed_0.7"]
    trials = search.run.read("trials").to_pylist()
    columns = ("plan_id", "alphas", "status", "value", "seed", "batch", "seconds")
    assert found_in(trials, "controls", *columns) == [
        (plan.plan_id(CHECKPOINT.identity), plan.alphas, *outcome, 3, 0, 0.0)
        for plan, outcome in zip(controls[1:], [("failed", None)] + 3 * [("ok", 0.5)], strict=True)
    ]
    stored = search.run.read("answers", ["plan_id"])["plan_id"].to_pylist()
    assert {each: stored.count(each) for each in stored} == {
        plan.plan_id(CHECKPOINT.identity): 3 for plan in controls[1:]
    }
    # When the search goes on, what was judged is not judged again.
    search.pool = Judges(answers=search.pool.answers)
    assert search._try_controls(controls) == 0.75 and [plan.name for plan in search.pool.judged] == ["drop"]
    again = search.run.read("trials").to_pylist()
    assert found_in(again, "controls", "status") == 4 * [("ok",)]
    assert found_in(again, "controls", *columns)[1:] == found_in(trials, "controls", *columns)[1:]


# -- what a searcher is given ----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What each search is asked for: (proposer, the options of its batches and of run_search)."""
    calls = []

    def run_search(batches, **options):
        proposer, of_batches = batches
        calls.append((proposer, of_batches | options))
        return SearchOutcome(4, 2.0004, 0.25, ({"worker": "worker-0"},))

    monkeypatch.setattr(alpha_search, "BatchSearcher", lambda proposer, **options: (proposer, options))
    monkeypatch.setattr(alpha_search, "run_search", run_search)
    return calls


KNOWN = [[0.6225, 0.6225], [0.25, 0.75], [1.0, 1.0], [0.0, 0.0]]


def test_a_searcher_begins_with_what_is_known_within_its_bounds(asked, tmp_path):
    search = searching(tmp_path, "search.bounds=[0.25, 0.75]", "search.seed=5", "search.batch=3", "search.initial=2")
    search.pool = Judges()
    rows = [trial("bayes", 7, None), trial("bayes", 2), trial("random", 3), trial("controls", 0)]
    search.run.append("trials", rows, part="a")
    search._search_coefficients("bayes", 9, KNOWN, 0.12345678)
    ((proposer, options),) = asked
    assert isinstance(proposer, BayesProposer) and proposer.ask(2) == KNOWN[:2]
    drawn = proposer.ask(2)
    assert all(0.25 <= value <= 0.75 for point in drawn for value in point)
    assert BayesProposer(dimensions=2, bounds=(0.25, 0.75), seed=5, initial=2).ask(2) == drawn
    assert {key: options[key] for key in ("name", "candidates", "batch", "minimise")} == {
        "name": "bayes", "candidates": 9, "batch": 3, "minimise": False,
    }  # fmt: skip
    assert [(row["iteration"], row["alphas"]) for row in options["replayed"]] == [(7, [0.25, 0.75]), (2, [0.25, 0.75])]
    plan = search.start.with_alphas([0.3, 0.4], name="x", kind="found")
    assert options["describe"]([0.3, 0.4]) == {
        "searcher": "bayes", "seed": 5, "objective": "micro_accuracy", "plan_id": plan.plan_id(CHECKPOINT.identity),
    }  # fmt: skip
    assert Path(options["storage_path"]) == tmp_path / "cache" / "tune"
    assert search.facts["bayes_search"] == {
        "batch": 3, "concurrent": 2, "wall_seconds": 2.0, "share_not_scoring": 0.25,
        "workers": [{"worker": "worker-0"}], "candidates_this_call": 4, "seconds_per_candidate": 0.12346,
    }  # fmt: skip


def test_a_search_begins_where_the_last_candidate_before_has_taken_the_only_worker_along(asked, tmp_path):
    """Three times, so that it failed and the search before ended, while the worker is restarting."""
    search = searching(tmp_path, "search.concurrent=auto", "search.batch=auto")
    search.pool = SimpleNamespace(count=0)
    search._search_coefficients("bayes", 60, KNOWN, 0.01)
    ((_, options),) = asked
    assert options["batch"] == 6 and search.facts["bayes_search"]["concurrent"] == 1


def test_the_random_control_has_no_points_of_the_search_and_losses_are_minimised(asked, tmp_path):
    search = searching(tmp_path, "search.objective=answer_nll", "search.concurrent=1")
    search.pool = Judges()
    search._search_coefficients("random", 200, [], 0.02)
    ((proposer, options),) = asked
    assert type(proposer) is RandomProposer and options["minimise"]
    assert options["batch"] == alpha_search.choose_batch(0.02, 200, 1)


def test_no_two_searchers_propose_alike(asked, tmp_path):
    """A name that config.py has and alpha_search.py does not would else be a random search under that name."""
    names = [name for name in get_args(SearcherName) if name != "gradient"]
    search = searching(tmp_path)
    search.pool = Judges()
    for name in names:
        search._search_coefficients(name, 9, KNOWN, 1.0)
    assert len({type(proposer) for proposer, _ in asked}) == len(names)


@pytest.mark.parametrize(
    ("settings", "warped"),
    [([], True), (BLOCK, True), (["plan.selection=most_similar", "plan.similarity_run=x"], False)],
)
def test_distances_are_of_effective_coefficients_where_layers_are_merged_in_a_row(asked, settings, warped, tmp_path):
    search = searching(tmp_path, *settings, similarity=SIMILARITY)
    search.pool = Judges()
    search._search_coefficients("bayes", 9, KNOWN, 1.0)
    ((proposer, _),) = asked
    assert (proposer._warp is alpha_search.tail_coefficients) == warped


def test_a_block_that_is_searched_too_stands_before_the_coefficients(asked, tmp_path):
    search = searching(tmp_path, *BLOCK, first=9)
    search.pool = Judges()
    search._record("bayes-000000", [trial(alphas=[11.0, 0.25, 0.75])], [{}])
    (row,) = search.run.read("trials").to_pylist()
    assert (row["block"], row["alphas"]) == (11, [0.25, 0.75])
    search._search_coefficients("bayes", 9, KNOWN[:2], 1.0)
    ((proposer, options),) = asked
    assert proposer.choices == [4.0, 9.0, 11.0]
    assert proposer.ask(2) == [[9.0, *known] for known in KNOWN[:2]]
    assert [row["alphas"] for row in options["replayed"]] == [[11.0, 0.25, 0.75]]
    plan = search.start.moved_to(11).with_alphas([0.25, 0.75], name="x", kind="found")
    assert options["describe"]([11.0, 0.25, 0.75])["plan_id"] == plan.plan_id(CHECKPOINT.identity)
    (_, best) = search._best("bayes", "found_bayes", "found")
    assert [step.remove for step in best.steps] == [12, 11] and best.alphas == [0.25, 0.75]


def test_descents_start_at_what_is_known_near_both_corners_and_at_random(asked, tmp_path):
    search = searching(
        tmp_path, "gradient.starts=5", "gradient.parametrisations=[simplex, per_matrix]", "search.seed=2"
    )
    search.pool = Judges()
    search.run.append("trials", [trial("gradient_simplex", 1), trial("gradient_per_matrix", 0, None)], part="a")
    search._descend_all([[0.6225, 0.6225]])
    drawn = np.random.default_rng(2).uniform(size=(5, 2)).tolist()
    starts = [[0.6225, 0.6225], [0.95, 0.95], [0.05, 0.05], *drawn[:2]]
    for (proposer, options), kind, left in zip(
        asked, ("simplex", "per_matrix"), (starts[:1] + starts[2:], starts[1:]), strict=True
    ):
        assert (options["method"], options["arguments"], options["name"]) == ("descend", (kind,), f"gradient_{kind}")
        assert (options["candidates"], options["batch"], len(options["replayed"])) == (5, 1, 1)
        assert proposer.ask(9) == left


def test_descents_of_alphas_start_inside_the_bounds(asked, tmp_path):
    """They started at the edges, from which a few epochs lead nowhere: of six starts three were one."""
    search = searching(tmp_path, "gradient.starts=5", "gradient.parametrisations=[alphas]", "search.bounds=[0.4, 0.6]")
    search.pool = Judges()
    search._descend_all([[0.6225, 0.6225]])
    ((proposer, _),) = asked
    base, last, first, *drawn = proposer.ask(9)
    assert base == [0.6225, 0.6225] and last == pytest.approx([0.59, 0.59]) and first == pytest.approx([0.41, 0.41])
    drawn = (np.array(drawn) - 0.4) / 0.2
    np.testing.assert_allclose(drawn, np.random.default_rng(0).uniform(size=(5, 2))[:2])


def test_the_best_single_layer_to_keep_is_a_control_and_a_start_of_every_searcher(stand_ins, tmp_path, monkeypatch):
    results = {"keep_19": 0.75, "drop": 0.6}
    monkeypatch.setattr(
        Judges, "__init__", lambda self: vars(self).update(results=results, answers=ANSWERS, timed=None)
    )
    searchers = ["search.searcher=[bayes, gradient]", "gradient.parametrisations=[simplex]", "gradient.starts=3"]
    search = searching(tmp_path / "run", *QUIET, *searchers, roles=(SEARCH,))
    search.execute([])
    asked = {entry[0]: entry[-1] for entry in stand_ins if entry[0] in ("bayes", "gradient_simplex")}
    assert asked["bayes"] == [[0.6225, 0.6225], [1.0, 0.0], [1.0, 1.0]]
    assert asked["gradient_simplex"] == [[0.6225, 0.6225], [0.95, 0.05], [0.95, 0.95]]
    (reported,) = (entry[1] for entry in stand_ins if entry[0] == "report")
    assert reported == [*FIRST, FIXED, "keep_19", "random", "found_gradient_simplex", "found_bayes"]
    assert search.run.manifest()["keep_one"] == {"best": "keep_19", "of": 3}
    # Its answers to the search questions are stored as the other controls' are; all that could be kept are trials.
    stored = set(search.run.read("answers", ["plan_id"])["plan_id"].to_pylist())
    controls = [row for row in search.run.read("trials").to_pylist() if row["searcher"] == "controls"]
    assert len(controls) == 4 and stored == {row["plan_id"] for row in controls}
    files = {path.stem: read_alpha_file(path, N_LAYERS) for path in (tmp_path / "run" / "alphas").iterdir()}
    assert set(files) == set(reported) - {"base"} and files["found_bayes"].alphas == [VALUES["bayes"]] * 2
    assert [layer.index for layer in files["keep_19"].kept] == [*range(18), 19]
    # Where a control keeps it already there is nothing more.
    results["before_last"] = 0.875
    again = searching(tmp_path / "again", *QUIET, *searchers, roles=(SEARCH,))
    stand_ins.clear()
    again.execute([])
    (reported,) = (entry[1] for entry in stand_ins if entry[0] == "report")
    assert "keep_19" not in reported and again.run.manifest()["keep_one"] == {"best": "before_last", "of": 3}
    kept = set(again.run.read("answers", ["plan_id"])["plan_id"].to_pylist())
    assert len(kept) == 3 and kept < stored


@pytest.mark.parametrize(
    ("steps", "influence", "best", "begins"),
    [
        # Of the last three layers, the one in the middle has the most influence: dropping by influence keeps it.
        ([(19, 20), (18, 19)], [0.5] * 18 + [0.1, 0.4, 0.2], "block_influence", [1.0, 0.0]),
        # In this order no step's alpha of 0 everywhere keeps the last layer, as before_last does.
        ([(20, 19), (18, 20)], None, "before_last", [1.0, 0.0]),
        ([(19, 20), (18, 19)], None, "before_last", [0.0, 0.0]),
        ([(19, 20), (18, 19)], None, "drop", [1.0, 1.0]),
    ],
)
def test_searchers_begin_at_the_best_layer_also_where_another_control_keeps_it(
    tmp_path, steps, influence, best, begins
):
    similarity = None if influence is None else Similarity(SIMILARITY.matrix, np.array(influence))
    search = searching(tmp_path, similarity=similarity)
    search.start = pairs_plan(N_LAYERS, steps, [0.5] * 2, name="start", kind="file", selection="list")
    search.pool = Judges({best: 0.75})
    controls = controls_of(search.config.plan, CHECKPOINT, search.start, similarity, Silent())
    keeping = keeping_one(search.start, controls)
    search._try_controls([*controls, *(plan for plan in keeping.values() if plan not in controls)])
    assert search._take_kept(keeping, controls) == [] and search.facts["keep_one"]["best"] == best
    assert search.corners[0] == begins and len({*map(tuple, search.corners)}) == len(search.corners)
    (kept,) = (plan for plan in controls if plan.name == best)
    found = search.start.with_alphas(search.corners[0], name="x", kind="found").kept[-1].coefficients
    assert found == kept.kept[-1].coefficients


@pytest.mark.parametrize("stem", ["drop", "_tmp.x", "..", "a\\b", "x" * 245, "🦙" * 60, "ü 1"])
def test_every_plan_with_alphas_has_a_file_whatever_the_start_is_called(tmp_path, stem):
    """At the end of a search a name that no file of a run may have ended it with an error, each time anew."""
    search = searching(tmp_path / "run")
    start = tail_plan(N_LAYERS, [0.25, 0.5], name=stem, kind="file")
    own = start.with_alphas([0.5] * 2, name="found", kind="found", matrix_alphas={"mlp.up_proj": [0.1, 0.2]})
    search.reporter.write_plans([base_plan(N_LAYERS), drop_plan(N_LAYERS, 2), start, own], alpha_files=True)
    files = [read_alpha_file(path, N_LAYERS) for path in (tmp_path / "run" / "alphas").iterdir()]
    assert sorted(plan.alphas for plan in files) == [[0.25, 0.5], [1.0, 1.0]]
    assert all(not plan.name.startswith("_tmp.") for plan in files)
    if stem == "ü 1":
        assert {plan.name for plan in files} == {"drop", stem}
    plans = [read_plan(path, N_LAYERS)[0].flat_alphas for path in (tmp_path / "run" / "plans").iterdir()]
    assert sorted(plans) == [[0.25, 0.5], [0.5, 0.5, 0.1, 0.2], [1.0, 1.0]]


# -- what is stored, and which is best -------------------------------------------------------------------------------


def test_a_finished_batch_is_stored_with_its_answers_and_histories_but_nothing_of_what_failed(tmp_path):
    search = searching(tmp_path, "output.store_candidate_answers=true", roles=(SEARCH,))
    rows = [
        trial("gradient_simplex", 3),
        trial("gradient_simplex", 4, None, alphas=[0.5, 0.5]),
        trial("gradient_simplex", 5, alphas=[0.1, 0.2]),
    ]
    epochs = [Epoch(0, 2.0, None, np.array([0.5, 0.5]), None), Epoch(1, 1.5, 1.75, np.array([0.25, 0.75]), None)]
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    results = [{"logits": logits, "history": epochs}, {"logits": logits, "history": epochs}, {}]
    search._record("gradient_simplex-000000", rows, results)
    assert found_in(search.run.read("trials").to_pylist(), "gradient_simplex", "iteration", "block") == [
        (3, None), (4, None), (5, None),
    ]  # fmt: skip
    history = search.run.read("gradient_history").to_pylist()
    assert [(row["start"], row["epoch"], row["loss"], row["alphas"]) for row in history] == [
        (3, 0, 2.0, [0.5, 0.5]),
        (3, 1, 1.5, [0.25, 0.75]),
    ]
    answers = search.run.read("answers").to_pylist()
    plan = search.start.with_alphas([0.25, 0.75], name="x", kind="found")
    assert {row["plan_id"] for row in answers} == {plan.plan_id(CHECKPOINT.identity)}
    assert [row["logit_b"] for row in answers] == [1.0, 5.0, 9.0]


def test_parts_of_batches_are_gathered_again_and_again_and_no_row_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(alpha_search, "_LOOSE", 3)
    search, parts = searching(tmp_path), []
    for number in range(7):
        search._record(f"bayes-{number:06d}", [trial(iteration=number)], [{}])
        parts.append(len(search.run._tables.part_names("trials")))
    assert parts == [1, 2, 1, 2, 3, 1, 2]
    assert found_in(search.run.read("trials").to_pylist(), "bayes", "iteration") == [(n,) for n in range(7)]


def test_the_best_of_a_searcher_is_its_own_best_finished_candidate(tmp_path):
    search = searching(tmp_path)
    rows = [
        trial("bayes", 0, 0.5),
        trial("bayes", 1, 0.75, nll=1.5),
        trial("bayes", 2, 0.75, nll=1.25, alphas=[0.1, 0.9]),
        trial("bayes", 3, None),
        trial("random", 0, 0.9),
    ]
    search.run.append("trials", [*rows, trial("failing", 0, None)], part="a")
    ranked, plan = search._best("bayes", "found_bayes", "found")
    assert ranked == (0.75, -1.25) and (plan.alphas, plan.name, plan.kind) == ([0.1, 0.9], "found_bayes", "found")
    assert search._best("failing", "x", "found") is None is search._best("nobody", "x", "found")


def test_what_was_found_for_single_matrices_is_reported_as_the_descent_left_it(tmp_path):
    search = searching(tmp_path, "search.searcher=gradient", "gradient.parametrisations=[per_matrix]")
    matrices = CHECKPOINT.architecture.matrices
    own = {matrix: [0.1 * number, 0.9] for number, matrix in enumerate(matrices)}
    left = search.start.with_alphas([0.25, 0.75], name="gradient", kind="found", matrix_alphas=own)
    search.run.append("trials", [trial("gradient_per_matrix", alphas=left.flat_alphas)], part="a")
    (found,) = search._reported([])
    assert dict(found.matrix_alphas) == {matrix: tuple(alphas) for matrix, alphas in own.items()}
    assert found.plan_id("m") == left.plan_id("m")


def test_reported_are_the_controls_the_random_control_and_the_best_of_each_searcher_the_best_last(tmp_path):
    search = searching(tmp_path, "search.searcher=[bayes, gradient]", "gradient.parametrisations=[simplex]")
    errors = ["ValueError: x", "value is nan", "value is nan"]
    failed = [trial("bayes", number, None, error=error) for number, error in enumerate(errors)]
    search.run.append("trials", failed, part="failed")
    with pytest.raises(UserError, match=r"every candidate .*, 2 of them by this: value is nan\. .* another --out"):
        search._reported([])
    rows = [trial("bayes", 0, 0.75), trial("gradient_simplex", 0, 0.5), trial("random", 0, 0.9)]
    search.run.append("trials", rows, part="a")
    names = [plan.name for plan in search._reported([search.start])]
    assert names == [FIXED, "random", "found_gradient_simplex", "found_bayes"]
    again = searching(tmp_path / "random", "search.searcher=random")
    again.run.append("trials", rows, part="a")
    assert [(plan.name, plan.kind) for plan in again._reported([])] == [("found_random", "found")]


# -- a whole search over stand-ins -----------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Workers that answer anything, searchers that find what they are told to, and a report of nothing: what was done
    is in the list, in its order."""
    done = []

    class Workers(Judges):
        def map(self, method, items, *on_result):
            if method == "judge":
                return super().map(method, items, *on_result)
            done.append((method, [getattr(item, "name", item) for item in items]))
            return ["fitted"] * len(items)

    def run_search(batches, *, name, **_):
        proposer, options = batches
        done.append((name, options["candidates"], [] if name == "random" else proposer.ask(3)))
        options["record"](f"{name}-000000", [trial(name, 0, VALUES[name], alphas=[VALUES[name]] * 2)], [{}])
        return SearchOutcome(1, 1.0, 0.0)

    def named(plans):
        return [plan.name for plan in plans]

    monkeypatch.setattr(alpha_search, "open_pool", lambda *_, **__: nullcontext(Workers()))
    monkeypatch.setattr(alpha_search, "describe_workers", lambda *_: ["its worker"])
    monkeypatch.setattr(alpha_search, "compute_trunk", lambda *_: done.append("trunk") or {"report": 1})
    monkeypatch.setattr(alpha_search, "align", lambda _, plans, __: done.append(("align", named(plans))))
    monkeypatch.setattr(alpha_search, "align_rows", lambda _, plans, __: done.append(("rows", named(plans))))
    monkeypatch.setattr(alpha_search, "fit", lambda _, plans, *__: done.append(("fit", named(plans))))
    monkeypatch.setattr(alpha_search, "BatchSearcher", lambda proposer, **options: (proposer, options))
    monkeypatch.setattr(alpha_search, "run_search", run_search)
    monkeypatch.setattr(common, "draw_figures", lambda *_: pytest.fail("none were asked for"))

    class Reporting(Reporter):
        def report(self, pool, plans, shards, firsts, progress):
            done.append(("report", named(plans), shards, firsts))

        def derive(self, plans, compared, *, subjects=()):
            done.append(("derive", named(plans), [(a.name, b.name) for a, b in compared], subjects))

    monkeypatch.setattr(alpha_search, "Reporter", Reporting)
    save = lambda _, plan, fitted=None: done.append(("save", plan.name, fitted)) or (f"models/{plan.name}", None)  # noqa: E731
    monkeypatch.setattr(FoundModels, "save", save)
    return done


VALUES = {"bayes": 0.75, "random": 0.875, "gradient_simplex": 0.5}
QUIET = ["output.figures=false"]


def test_a_search_tries_reports_compares_and_saves_in_this_order(stand_ins, tmp_path):
    searchers = ["search.searcher=[bayes, gradient]", "gradient.parametrisations=[simplex]", "gradient.starts=3"]
    search = searching(tmp_path, *QUIET, *searchers, "search.candidates=9", "search.random_candidates=4")
    probe = search.start.with_alphas([0.25, 0.75], name="probe", kind="file")
    assert search.execute([probe]) is search.run and search.run.complete
    known, plans = [[0.6225, 0.6225], [0.25, 0.75]], [*FIRST, FIXED, "random", "found_gradient_simplex", "found_bayes"]
    assert stand_ins == [
        "trunk",
        ("align", ["candidate"]),
        ("random", 4, []),
        ("bayes", 9, [*known, [1.0, 1.0]]),
        ("gradient_simplex", 3, [*known, [0.95, 0.95]]),
        ("rows", plans),
        ("fit", []),
        ("refit_tensors", []),
        ("report", plans, {"report": 1}, (N_LAYERS - 3,)),
        ("match", []),
        ("match_rows", []),
        ("derive", plans, [("found_bayes", name) for name in plans[:-1]], ()),
        ("save", "found_bayes", None),
    ]
    manifest = search.run.manifest()
    best = search.start.with_alphas([0.75, 0.75], name="found_bayes", kind="found")
    assert manifest["best"] == {
        "name": "found_bayes", "plan_id": best.plan_id(CHECKPOINT.identity), "alphas": [0.75, 0.75],
        "model": "models/found_bayes", "proof": None,
    }  # fmt: skip
    assert manifest["workers"] == ["its worker"] and manifest["figures"] == [] and "refitted" not in manifest
    assert 0.0 <= manifest["trunk_seconds"] < 60.0


def test_what_was_found_is_fitted_reported_and_saved_beside_itself_unfitted(stand_ins, tmp_path):
    more = ["search.searcher=random", "plan.refit=outputs", "calibration.text=demo", "calibration.tokens=50"]
    search = searching(tmp_path, *QUIET, *more, roles=(CALIBRATION,))
    search.execute([])
    refitted = ["dropped_linear", "dropped_outputs", f"{FIXED}_outputs", "found_random_outputs"]
    plans = [*FIRST, FIXED, *refitted, "found_random"]
    assert [entry[0] for entry in stand_ins].count("random") == 1, "no smaller control beside it"
    named = {entry[0]: entry[1:] for entry in stand_ins if isinstance(entry, tuple)}
    assert named["fit"] == (refitted,) and named["refit_tensors"] == (["found_random_outputs"],)
    assert named["rows"] == ([*FIRST, FIXED, "found_random", *refitted],) and named["report"][0] == plans
    assert named["derive"][:2] == (plans, [("found_random", name) for name in plans[:-1]])
    saved = [entry[1:] for entry in stand_ins if entry[0] == "save"]
    assert saved == [("found_random", None), ("found_random_outputs", "fitted")]
    found = search.run.manifest()["refitted"]
    assert (found["name"], found["model"]) == ("found_random_outputs", "models/found_random_outputs")
    assert found["plan_id"] != search.run.manifest()["best"]["plan_id"]


def test_nothing_is_saved_where_it_is_not_asked_for_and_plans_are_compared_on_what_is_searched_for(stand_ins, tmp_path):
    more = ["search.searcher=random", "output.save_best=false", "search.objective=accuracy:number_words"]
    search = searching(tmp_path, *QUIET, *more, roles=(SEARCH,))
    search.execute([])
    assert "save" not in [entry[0] for entry in stand_ins]
    assert [entry[3] for entry in stand_ins if entry[0] == "derive"] == [("number_words",)]
    best = search.run.manifest()["best"]
    assert (best["name"], best["model"], best["proof"]) == ("found_random", None, None)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def of_two_kinds(tmp_path):
    """A checkpoint one of whose layers has another attention."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "base", "gemma2")))
    assert checkpoint.windows == [40, None, 40, 40, 40]
    return checkpoint


@pytest.mark.parametrize("settings", [["plan.merges=3"], ["plan.merges=2", "plan.selection=block", "plan.block=1"]])
def test_layers_that_only_an_alpha_of_1_leaves_out_are_refused_before_anything_is_computed(settings, of_two_kinds):
    """Every candidate averages them; the fixed control was the first to fail, when the trunk had been computed."""
    config, inputs = load_config(None, ["plan.ratio=1", *settings]), Inputs(questions={}, checkpoint=of_two_kinds)
    start = starting_plan(config.plan, 5, None)
    with pytest.raises(PlanError, match="attention windows differ .*; but a search moves every alpha, also one that"):
        _check(config, inputs, start, [])
    config = load_config(None, ["plan.ratio=1", "plan.merges=2"])
    _check(config, inputs, starting_plan(config.plan, 5, None), [])


def test_a_block_is_chosen_among_those_whose_layers_have_the_same_attention(of_two_kinds, local_searches, tmp_path):
    """Layer 1 alone has another: it can neither be in a block that is averaged nor take one in."""
    data = ["data.subjects=number_words", "data.limit_per_subject=3", "data.report_limit_per_subject=3", "data.shots=0"]
    few = ["search.candidates=4", "search.initial=2", "search.random_candidates=1", "data.perplexity_text=null"]
    few += [f"model.path={of_two_kinds.directory}", "output.figures=false", "output.save_best=false", *data]
    for block, firsts in (("cosine", [3, 4]), ("search", [3, 4])):
        settings = ["plan.merges=1", "plan.selection=block", f"plan.block={block}", "calibration.text=demo"]
        run = alpha_search.search(load_config(None, [*few, *settings, f"output.run={tmp_path / block}"]))
        assert {row["first"] for row in run.read("blocks").to_pylist()} == set(firsts)
        assert {row["status"] for row in run.read("trials").to_pylist()} == {"ok"}


def test_plans_that_cannot_be_searched_are_refused():
    def check(start, *settings, probes=()):
        config = load_config(None, ["plan.merges=2", *settings])
        _check(config, Inputs(questions={}, checkpoint=CHECKPOINT), start, probes)

    tail = tail_plan(N_LAYERS, [0.5, 0.5], name="mine", kind="file")
    longer = tail_plan(N_LAYERS, [0.5] * 3, name="longer", kind="file")
    block = block_plan(N_LAYERS, 7, [0.5, 0.5], name="block", kind="file")
    gradient = "search.searcher=gradient"
    listed = ("plan.selection=list", "plan.base=file", "plan.alpha_file=x", "plan.merges=null")
    check(tail, gradient, probes=[tail.with_alphas([0.1, 0.2], name="probe", kind="file")])
    check(block, "plan.selection=block")
    for start in (longer, block):
        with pytest.raises(
            PlanError, match=r"not a tail merge of plan.merges = 2 layers; to use .* plan.selection: list"
        ):
            check(start)
    check(longer, *listed)
    last = N_LAYERS - 1
    for probe, difference in (
        (longer, rf"step 2 layer {last - 2} into {last - 3} instead of nothing"),
        (block, rf"step 0 layer 8 into 7 instead of layer {last} into {last - 1}"),
    ):
        said = (
            rf"probe {probe.name} merges other layers than mine, in {difference}: a probe needs the steps of the search"
        )
        with pytest.raises(PlanError, match=said):
            check(tail, probes=[probe])
    check(replace(tail, selection="list"), *listed)
    with pytest.raises(ConfigError, match="gradient needs a tail merge, but plan.selection is list"):
        check(replace(tail, selection="list"), *listed, gradient)


def test_a_refit_that_the_family_does_not_allow_is_refused_before_the_search(tmp_path):
    """It was when everything had been searched."""
    of_text = ["calibration.text=demo", "calibration.tokens=50"]
    config = load_config(None, ["plan.merges=2", "plan.refit=outputs", *of_text])
    start = starting_plan(config.plan, 5, None)
    for family, allowed in (("starcoder2", True), ("phi", False), ("olmo2", False)):
        checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / family, family)))
        inputs = Inputs(**vars(read_material(config, (CALIBRATION,))), checkpoint=checkpoint)
        with nullcontext() if allowed else pytest.raises(RefitError, match=f"refit outputs needs layers .*{family}"):
            _check(config, inputs, start, [])


def test_a_disk_without_room_for_another_folder_is_said_where_the_model_is_to_be_saved(tmp_path, monkeypatch):
    """On ext4 a folder takes a block of its own; on the tmpfs of tests/benchmarks/chaos.py it does not."""
    search = searching(tmp_path)

    def full(*_, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(options["dir"]))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(RunError, match=f"can be made in {tmp_path}: .*No space left on device.* free space"):
        search.models.save(search.start)


def test_a_model_that_cannot_be_written_is_named_as_the_run_has_it(tmp_path, monkeypatch):
    """Not by the temporary folder, which is gone."""
    search = searching(tmp_path)
    monkeypatch.setattr("raymerge.saving.free_bytes", lambda folder: 1000)
    monkeypatch.setattr(found_models, "search_results", lambda *_: [])
    where = search.run.path_of("models", search.start.name)
    with pytest.raises(
        CheckpointError, match=f"could not write {where}: .* its disk has 1.0 kB free; nothing was left"
    ):
        search.models.save(search.start)
    assert list(tmp_path.glob("**/_tmp*")) == [] and not Path(where).parent.exists()


class Awaited:
    """A pool of one worker that more will join."""

    count = 1


@pytest.mark.parametrize("asked, expected", [("8", 8), ("auto", None)])
def test_workers_that_join_a_search_get_work_up_to_what_was_asked_for(tmp_path, monkeypatch, asked, expected):
    seen = []
    monkeypatch.setattr(alpha_search, "BatchSearcher", lambda _, **options: seen.append(options))
    monkeypatch.setattr(alpha_search, "run_search", lambda *_, **__: SearchOutcome(0, 0.0, None))
    search = searching(tmp_path, f"search.concurrent={asked}")
    search.pool = Awaited()
    search._search_coefficients("random", 4, [], 1.0)
    assert seen[0]["concurrent"] == expected


# -- the layer that is kept, and alpha files -------------------------------------------------------------------------


def test_where_no_layer_that_is_kept_could_be_judged_there_is_no_best_of_them(tmp_path):
    search = searching(tmp_path, roles=(SEARCH,))
    search.pool = Judges(dict.fromkeys(("drop", "before_last", "keep_19"), float("nan")), ANSWERS)
    controls = controls_of(search.config.plan, CHECKPOINT, search.start, None, Silent())
    keeping = keeping_one(search.start, controls)
    search._try_controls([*controls, keeping[19]])
    assert search._take_kept(keeping, controls) == [] and "keep_one" not in search.facts
    assert search.corners == [[1.0, 1.0], [0.0, 0.0]]


def test_a_control_that_is_another_plan_than_the_one_judged_in_its_place_is_judged_again(tmp_path):
    """As where the merges are chosen anew, by states that differ in their last digits."""
    search = searching(tmp_path, roles=(SEARCH,))
    search.pool = Judges(answers=ANSWERS)
    controls = controls_of(search.config.plan, CHECKPOINT, search.start, None, Silent())
    search._try_controls(controls)
    moved = [*controls[:2], tail_plan(N_LAYERS, [1.0, 0.5], name="another", kind="drop"), controls[3]]
    search._try_controls(moved)
    assert [plan.name for plan in search.pool.judged] == ["another"]
    ids = found_in(search.run.read("trials").to_pylist(), "controls", "plan_id")
    assert ids == [(plan.plan_id(CHECKPOINT.identity),) for plan in moved[1:]]


def test_every_plan_that_an_alpha_file_can_hold_has_one_and_plans_of_one_name_have_one_each(tmp_path):
    search = searching(tmp_path)
    drop, mine, found = (
        tail_plan(N_LAYERS, alphas, name=name, kind="file")
        for alphas, name in (([1.0, 1.0], "drop"), ([0.5, 0.25], "drop"), ([0.125, 0.75], "found"))
    )
    matrices = found.with_alphas([0.5, 0.5], name="own", kind="found", matrix_alphas={"mlp.up_proj": [0.1, 0.2]})
    search.reporter.write_plans([base_plan(N_LAYERS), drop, mine, found, matrices], alpha_files=True)
    files = {path.name: read_alpha_file(path, N_LAYERS).alphas for path in (tmp_path / "alphas").iterdir()}
    assert files == {
        "found.json": [0.125, 0.75],
        **{f"drop-{plan.plan_id(CHECKPOINT.identity)}.json": plan.alphas for plan in (drop, mine)},
    }
    plans = {path.name: read_plan(path, N_LAYERS)[0] for path in (tmp_path / "plans").iterdir()}
    assert {plan.plan_id("x") for plan in plans.values()} == {
        plan.plan_id("x") for plan in (drop, mine, found, matrices)
    }
    assert plans.keys() - files.keys() == {"own.json"}


def test_the_best_found_is_so_by_the_search_questions_however_many_its_coefficients_and_only_searches_fail(tmp_path):
    searchers = ["search.searcher=gradient", "gradient.parametrisations=[simplex, per_matrix]"]
    search = searching(tmp_path, *searchers)
    own = [0.5] * 2 * (1 + len(CHECKPOINT.architecture.matrices))
    rows = [trial("gradient_simplex", 0, None, error="its own"), trial("random", 0, None, error="another's"),
            trial("controls", 0, None, error="another's")]  # fmt: skip
    search.run.append("trials", rows, part="failed")
    with pytest.raises(UserError, match="every candidate of the search failed, 1 of them by this: its own"):
        search._reported([])
    rows = [trial("gradient_simplex", 1, 0.5), trial("gradient_per_matrix", 0, 0.9, alphas=own)]
    search.run.append("trials", rows, part="a")
    assert [plan.name for plan in search._reported([])] == ["found_gradient_simplex", "found_gradient_per_matrix"]


def test_of_a_block_that_was_found_its_own_layers_are_dropped_beside_it(tmp_path):
    search = searching(tmp_path, *BLOCK, "plan.refit=outputs", "calibration.text=demo", first=4, roles=(CALIBRATION,))
    linear, dropped, start, best = search._refitted(search._candidate([11.0, 0.25, 0.75], "found"))
    for plan in (linear, dropped, best):
        assert [step.remove for step in plan.steps] == [12, 11]
    assert linear.alphas == dropped.alphas == [1.0, 1.0] and best.alphas == [0.25, 0.75]
    assert [step.remove for step in start.steps] == [5, 4]
