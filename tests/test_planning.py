"""planning.py without a model run: choices from what workers would have measured."""

from contextlib import nullcontext

import numpy as np
import pytest
from test_heuristics import planted

from raymerge.actors import NoRoomError
from raymerge.checkpoint import Checkpoint
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.experiments import planning
from raymerge.experiments.common import settings_of
from raymerge.experiments.planning import choose_blocks, choose_one_by_one, recomputed_plan
from raymerge.inputs import CALIBRATION, REPORT, SEARCH
from raymerge.plan import PlanError
from raymerge.progress import Silent
from raymerge.report.reached import chosen_layers
from raymerge.summary import removal_table
from raymerge.tables import RunDirectory

CHECKPOINT = Checkpoint("demo")
N_LAYERS = CHECKPOINT.n_layers


def steps_of(plan):
    return [(step.into, step.remove, pytest.approx(step.alpha)) for step in plan.steps]


class Measured(nullcontext):
    """A pool whose workers answer by the given functions; `asked` holds the items by method."""

    def __init__(self, **answers):
        super().__init__(self)
        self.answers, self.asked, self.options, self.room = answers, {}, None, (0, 1, "cache")

    def broadcast(self, method, names):
        assert (method, names) == ("trunk_room", [CALIBRATION])
        return [self.room]

    def map(self, method, items, on_result=lambda *_: None):
        results = []
        for number, item in enumerate(items):
            self.asked.setdefault(method, []).append(item)
            results.append(self.answers[method](item))
            on_result(number, results[-1])
        return results


@pytest.fixture
def measured(monkeypatch):
    """Opens the next pool with the given answers."""

    def prepare(**answers):
        pool = Measured(**answers)

        def opened(config, inputs, cache, **options):
            pool.options, pool.calibration = options, inputs.calibration
            return pool

        monkeypatch.setattr(planning, "open_pool", opened)
        monkeypatch.setattr(planning, "describe_workers", lambda *_: [])
        return pool

    return prepare


def blocks(tmp_path, *settings):
    """The first layers chosen for blocks of 1 and of 3, and the rows of table `blocks`."""
    run = RunDirectory.open(tmp_path / "-".join(settings), {}, "search")
    options = ["plan.selection=block", "plan.starts=[2, 5, 9]", "calibration.text=demo", "data.perplexity_text=null"]
    config = load_config(None, [*options, *settings])
    chosen = choose_blocks(config, CHECKPOINT, [1, 3], run, "", None, Silent())
    rows = run.read("blocks").to_pylist()
    assert [row["last"] - row["first"] + 1 for row in rows] == [row["merges"] for row in rows]
    assert {row["merges"]: row["first"] for row in rows if row["chosen"]} == chosen
    # What the table says is not measured again, as when a run that was cut short goes on.
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(planning, "open_pool")
        assert choose_blocks(config, CHECKPOINT, [3], run, "", None, Silent()) == {3: chosen[3]}
    return chosen, rows


def test_blocks_of_a_search_are_chosen_on_the_subjects_that_it_is_for(tmp_path, measured):
    config = load_config(None, ["plan.selection=block", "search.objective=accuracy:colour_mixing"])
    subjects = {}
    for roles in ((CALIBRATION,), (SEARCH, REPORT, CALIBRATION)):
        pool = measured(shard_tokens=lambda _: [3], state_distances=lambda _: (np.eye(22), np.eye(22), 3))
        run = RunDirectory.open(tmp_path / str(len(roles)), {}, "search")
        choose_blocks(config, CHECKPOINT, [3], run, "", None, Silent(), roles=roles)
        subjects[len(roles)] = pool.calibration.subjects
    assert len(subjects[1]) == 12 and subjects[3] == ("colour_mixing",)


def test_a_run_goes_on_in_the_dtype_in_which_its_blocks_were_chosen(tmp_path, measured, monkeypatch):
    """A run that was cut short there would otherwise go on in another one, where model.dtype is auto."""
    told = []
    for block, answers in (
        ("cosine", {"state_distances": lambda _: (np.eye(22), np.eye(22), 3)}),
        ("loss", {"calibration_nll": lambda _: (1.0, 3), "compute_trunk": lambda _: 3}),
    ):
        measured(shard_tokens=lambda _: [3], **answers)
        monkeypatch.setattr(planning, "describe_workers", lambda *of: told.append(of[3]))
        options = ["plan.selection=block", "calibration.text=demo", "data.perplexity_text=null"]
        config = load_config(None, [*options, f"plan.block={block}"])
        run = RunDirectory.open(tmp_path / block, {}, "search")
        choose_blocks(config, CHECKPOINT, [3], run, "", None, Silent())
        assert told.pop() is run


def test_blocks_are_chosen_by_means_over_all_tokens(tmp_path, measured):
    """Two shards of 3 and of 5 tokens, whose sums of distances differ."""
    rng = np.random.default_rng(0)
    sums = [(rng.random((22, 22)), rng.random((22, 22)), tokens) for tokens in (3, 5)]
    for chooser, place in (("cosine", 0), ("angular", 1), ("search", 0)):
        pool = measured(shard_tokens=lambda _: [3, 5], state_distances=sums.__getitem__)
        chosen, rows = blocks(tmp_path, f"plan.block={chooser}")
        means = [(sums[0][each] + sums[1][each]) / 8 for each in range(2)]
        assert chosen == {k: min((2, 5, 9), key=lambda first, k=k: means[place][first, first + k]) for k in (1, 3)}
        assert {(row["measure"], row["merges"], row["first"]): row["score"] for row in rows} == {
            (name, k, first): pytest.approx(means[each][first, first + k])
            for each, name in enumerate(("cosine", "angular"))
            for k in (1, 3)
            for first in (2, 5, 9)  # what plan.starts leaves out is no rival of the block chosen
        }
        assert {row["tokens"] for row in rows} == {8} and pool.asked["shard_tokens"] == [CALIBRATION]


def test_blocks_are_chosen_by_the_loss_of_every_token(tmp_path, measured):
    """Two shards of 2 and of 6 scored tokens: the mean of their means would choose block 9 to 11."""
    losses = {(1, 2): (1.0, 12.0), (1, 5): (2.0, 6.6), (1, 9): (9.0, 9.0)}
    losses |= {(3, 2): (5.0, 4.0), (3, 5): (4.0, 7.0), (3, 9): (1.0, 8.8)}

    def loss(item):
        plan, shard = item
        kept = {layer.index for layer in plan.kept}
        gone = [layer for layer in range(N_LAYERS) if layer not in kept]
        return losses[len(gone), gone[0]][shard], (2, 6)[shard]

    pool = measured(shard_tokens=lambda _: [3, 7], compute_trunk=lambda item: 3, calibration_nll=loss)
    chosen, rows = blocks(tmp_path, "plan.block=loss")
    assert chosen == {1: 5, 3: 2}
    assert {(row["merges"], row["first"]): row["score"] for row in rows} == {
        key: pytest.approx(sum(parts) / 8) for key, parts in losses.items()
    }
    assert {row["tokens"] for row in rows} == {8} and {row["measure"] for row in rows} == {"loss"}
    # The states that enter each block are computed before, shard by shard.
    assert pool.options["firsts"] == [2, 5, 9]
    assert pool.asked["compute_trunk"] == [(CALIBRATION, 0), (CALIBRATION, 1)]


def removed_of(plan):
    return sorted({*range(plan.n_layers)} - {layer.index for layer in plan.kept})


def test_layers_go_one_by_one_each_the_one_that_costs_least_without_those_before_it(tmp_path, measured):
    """Alone 4 costs least; beside 4 it is 2, and not 3, which is the next best alone. Shards count by their tokens."""
    alone = np.array([9, 9, 0.5, 0.4, 0.3, 9])

    def loss(item):
        plan, shard = item
        gone = removed_of(plan)
        cost = alone[gone].sum() + (5.0 if {3, 4} <= set(gone) else 0.0)
        return (cost * 2, 2) if shard == 0 else ((cost + (gone == [2])) * 6 - 3 * (gone == [2]), 6)

    answers = {"shard_tokens": lambda _: [3, 7], "compute_trunk": lambda item: 3, "calibration_nll": loss}
    pool = measured(**answers)
    run = RunDirectory.open(tmp_path / "run", {}, "sweep")
    config = load_config(None, ["calibration.text=demo", "data.perplexity_text=null"])
    assert choose_one_by_one(config, 6, 3, run, "", Silent()) == [4, 2, 3]
    assert pool.options["firsts"] == [1, 2, 3, 4]
    assert [removed_of(plan) for plan, _ in pool.asked["calibration_nll"][12::2]] == [
        *([0, 4], [1, 4], [2, 4], [3, 4], [4, 5]), *([0, 2, 4], [1, 2, 4], [2, 3, 4], [2, 4, 5])
    ]  # fmt: skip
    rows = run.read("removals").to_pylist()
    assert [row["step"] for row in rows] == [0] * 6 + [1] * 5 + [2] * 4
    assert {row["layer"]: row["loss"] for row in rows[6:11]} == pytest.approx({0: 9.3, 1: 9.3, 2: 0.8, 3: 5.7, 5: 9.3})
    assert rows[2]["loss"] == pytest.approx(0.5 + 6 / 8 - 3 / 8) and {row["tokens"] for row in rows} == {8}
    assert removal_table(run)[1:] == (
        ["layers", "removed last", "loss", "next best"],
        [["1", "4", "0.3", "3 (0.4), 2 (0.875)"], ["2", "2", "0.8", "3 (5.7), 0 (9.3)"],
         ["3", "3", "6.2", "0 (9.8), 1 (9.8)"]],
    )  # fmt: skip
    (table,) = chosen_layers(run)
    assert table.cells[1] == ("2", "2", "0.8", "3 (5.7), 0 (9.3)") and "(drop_greedy)" in table.caption
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(planning, "open_pool")
        assert choose_one_by_one(config, 6, 2, run, "", Silent()) == [4, 2]
    # A run that was cut short goes on after the last whole step, and from no deeper states than those steps leave.
    pool = measured(**answers)
    assert choose_one_by_one(config, 6, 4, run, "", Silent()) == [4, 2, 3, 5]
    assert pool.options["firsts"] == [1]
    assert len(pool.asked["calibration_nll"]) == 2 * 3


def test_layers_without_which_the_loss_is_not_finite_stay(tmp_path, measured):
    answers = {"shard_tokens": lambda _: [3], "compute_trunk": lambda item: 3}
    config = load_config(None, ["calibration.text=demo", "data.perplexity_text=null"])
    run = RunDirectory.open(tmp_path / "run", {}, "sweep")
    measured(**answers, calibration_nll=lambda item: (np.nan if removed_of(item[0]) == [0] else 7.0, 7))
    assert choose_one_by_one(config, 3, 1, run, "", Silent()) == [2], "of equal ones the deepest"
    assert run.read("removals")["loss"].to_pylist() == [None, 1.0, 1.0]
    measured(**answers, calibration_nll=lambda item: (np.inf, 7))
    with pytest.raises(PlanError, match=r"without layers \[2\] and any further one .* not finite"):
        choose_one_by_one(config, 3, 2, run, "", Silent())


@pytest.mark.parametrize("choose", ["blocks", "one by one"])
def test_a_disk_without_room_for_the_states_is_refused_before_they_are_written(choose, tmp_path, measured):
    """They are as many as layers that may go first: of 32,768 tokens and an 8B model 8 GB in bfloat16."""
    pool = measured(shard_tokens=lambda _: [3, 7], compute_trunk=lambda item: 3)
    pool.room = (3_000_000, 2_000_000, "/small")
    config = load_config(None, ["calibration.text=demo", "data.perplexity_text=null"])
    with pytest.raises(NoRoomError, match=r"states of the calibration.* 3.0 MB .*/small.* 2.0 MB .*calibration.tok"):
        if choose == "blocks":
            blocks(tmp_path, "plan.block=loss")
        else:
            choose_one_by_one(config, 6, 1, RunDirectory.open(tmp_path / "run", {}, "sweep"), "", Silent())
    assert "compute_trunk" not in pool.asked


COLLECTED = [{(3, 4): 0.9}, {(3, 5): 0.8, (0, 1): 0.7}, {(17, 18): 0.75}, {}]


def collected(item):
    """Similarities of the kept layers after each merge, by the layers' numbers in the unmerged model."""
    _, plan = item
    kept = [layer.index for layer in plan.kept]
    pairs = {tuple(map(kept.index, pair)): value for pair, value in COLLECTED[len(plan.steps)].items()}
    return planted(len(kept), pairs)


@pytest.fixture
def recompute(tmp_path):
    """The plan of a section that recomputes, by a similarity run of two subsets."""
    domains = "data.domains={letters: [number_words], places: [country_capitals]}"
    samples = ["similarity.samples=12", "similarity.entropy_neighbors=5"]
    source = load_config(None, [domains, "similarity.subsets=[letters, places]", *samples])
    RunDirectory.open(tmp_path / "run", settings_of(source, "model", "data", "similarity"), "similarity")

    def plan(*settings):
        options = ["plan.selection=most_similar", "plan.recompute=true", f"plan.similarity_run={tmp_path / 'run'}"]
        return recomputed_plan(load_config(None, [*options, *settings]), N_LAYERS, str(tmp_path), Silent())

    return plan


def test_each_merge_and_its_coefficient_follow_from_what_the_one_before_left(recompute, measured):
    pool = measured(similarity_after=collected)
    settings = ["plan.similarity_subset=places", "plan.base=similarity", "plan.norms=fold"]
    plan = recompute(*settings, "plan.merges=null", "plan.threshold=0.5")
    expected = [(3, 4, 0.9), (3, 5, 0.8), (17, 18, 0.75)]
    assert steps_of(plan) == expected and (plan.name, plan.selection) == ("similarity", "most_similar")
    # It was collected from the model merged so far, as it would be saved.
    assert [(number, len(so_far.steps)) for number, so_far in pool.asked["similarity_after"]] == [
        (1, merges) for merges in range(4)
    ]
    assert {each.norms for _, each in pool.asked["similarity_after"]} == {"fold"} == {plan.norms}
    assert pool.options["most"] == 1
    measured(similarity_after=collected)
    assert steps_of(recompute(*settings, "plan.merges=2")) == expected[:2]
    with pytest.raises(PlanError, match="no neighbouring layers are more similar than plan.threshold = 0.95"):
        recompute(*settings, "plan.merges=2", "plan.threshold=0.95")


def test_similarity_collected_anew_has_the_plan_s_beta(recompute, measured):
    measured(similarity_after=collected)
    plan = recompute("plan.similarity_subset=places", "plan.base=similarity_ratio", "plan.beta=0", "plan.merges=2")
    assert [step.alpha for step in plan.steps] == pytest.approx([0.5, 0.5])


def test_similarity_is_collected_anew_of_one_subset_and_the_same_model(recompute, measured):
    measured(similarity_after=collected)
    with pytest.raises(ConfigError, match="has 2 subsets for plan.similarity_subset = None .*needs exactly one"):
        recompute("plan.merges=1")
    with pytest.raises(ConfigError, match="has 0 subsets for plan.similarity_subset = places and .*language = de"):
        recompute("plan.merges=1", "plan.similarity_subset=places", "plan.similarity_language=de")
    with pytest.raises(ConfigError, match=r"run was made with model.path 'demo', not '/m'"):
        recompute("plan.merges=1", "model.path=/m")
