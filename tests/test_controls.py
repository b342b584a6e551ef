"""controls.py: which plans a search is held against, and which single layer is the best to keep."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from test_heuristics import planted

from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.experiments.controls import best_kept, controls_of, keeping_one
from raymerge.plan import (
    alphas_that_keep,
    base_plan,
    before_last_plan,
    block_plan,
    drop_block_plan,
    drop_plan,
    pairs_plan,
    tail_coefficients,
    tail_plan,
)
from raymerge.plan_section import SHUFFLE_SEED, Similarity, starting_plan
from raymerge.progress import Silent

CHECKPOINT = Checkpoint("demo")
N_LAYERS = CHECKPOINT.n_layers
SIMILARITY = Similarity(planted(N_LAYERS, {(7, 8): 0.9, (8, 9): 0.8, (18, 19): 0.3}), np.arange(N_LAYERS) / 100)
FIRST, FIXED = ["base", "drop", "before_last"], "fixed_0.6225"
BY_SIMILARITY = ["plan.similarity_run=x", "plan.base=similarity"]


def controls_in(*settings, similarity=None, first=None):
    """The start of a search of two merges, and its controls."""
    plan = load_config(None, ["plan.merges=2", *settings]).plan
    start = starting_plan(plan, N_LAYERS, similarity, first)
    return start, controls_of(plan, CHECKPOINT, start, similarity, Silent())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], [*FIRST, FIXED]),  # which is the start too
        (["plan.ratio=0.7"], [*FIRST, FIXED, "fixed_0.7"]),
        (["plan.alignment=neurons"], [*FIRST, FIXED, f"{FIXED}_plain"]),
        (["plan.norms=fold", "plan.ratio=0.7"], [*FIRST, FIXED, "fixed_0.7_plain", "fixed_0.7"]),
        (["plan.selection=block"], [*FIRST, "drop_block", FIXED]),
        (["plan.similarity_run=x"], [*FIRST, "block_influence", FIXED]),  # whose similarity nothing is made of
        (BY_SIMILARITY, [*FIRST, "block_influence", FIXED, "similarity_shuffled", "similarity"]),
        (
            ["plan.similarity_run=x", "plan.base=similarity_ratio"],
            [*FIRST, "block_influence", FIXED, "similarity_shuffled", "similarity_ratio"],
        ),
        (
            ["plan.similarity_run=x", "plan.selection=most_similar"],
            [*FIRST, "block_influence", FIXED, "similarity_shuffled"],
        ),
        (
            ["plan.similarity_run=x", "plan.selection=most_similar", "plan.threshold=0.2"],  # that two exceed
            [*FIRST, "block_influence", FIXED, "similarity_shuffled"],
        ),
    ],
)
def test_every_control_that_there_can_be_is_one_and_none_twice(settings, expected):
    similarity = SIMILARITY if "plan.similarity_run=x" in settings else None
    start, controls = controls_in(*settings, similarity=similarity)
    assert [plan.name for plan in controls] == expected
    assert len({plan.plan_id("") for plan in controls}) == len(controls)
    assert all(not plan.steps or len(plan.steps) == 2 for plan in controls)
    plain = [(plan.alignment, plan.norms) for plan in controls if plan.name.endswith("_plain")]
    assert plain in ([], [("none", "keep")])
    # The constant differs from the start by its coefficients alone.
    assert controls[expected.index(FIXED)].alphas == [0.6225, 0.6225]
    assert controls[expected.index(FIXED)].alignment == start.alignment


def test_the_shuffled_control_of_a_block_is_of_the_same_block():
    for block in ("7", "cosine"):  # which may begin at any layer, and the first that is allowed is 1
        settings = ["plan.selection=block", f"plan.block={block}", *BY_SIMILARITY]
        controls = {plan.name: plan for plan in controls_in(*settings, similarity=SIMILARITY, first=7)[1]}
        for name in ("drop_block", "similarity_shuffled", "similarity"):
            assert [step.remove for step in controls[name].steps] == [8, 7]


def test_no_control_merges_what_cannot_be_merged(tmp_path):
    """Of a similarity's shuffles, the first that puts the likest layers where the attention is the same."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "base", "gemma2")))
    assert checkpoint.windows == [40, None, 40, 40, 40]
    plan = load_config(None, ["plan.merges=1", "plan.selection=most_similar", "plan.similarity_run=x"]).plan
    first = []
    for pair in ((2, 3), (3, 4)):
        similarity = Similarity(planted(5, {pair: 0.9}), None)
        start = starting_plan(plan, 5, similarity)
        (shuffled,) = (own for own in controls_of(plan, checkpoint, start, similarity, Silent()) if "shuf" in own.name)
        assert (shuffled.steps[0].into, shuffled.steps[0].remove) in {(2, 3), (3, 4)}
        first.append(starting_plan(plan, 5, similarity.shuffled(SHUFFLE_SEED)).steps[0].into)
    assert min(first) < 2  # which the first shuffle alone would not have kept to


def test_no_control_drops_a_layer_that_features_of_images_are_added_to(tmp_path):
    checkpoint = Checkpoint(str(tiny.make_multimodal(tmp_path / "base", "qwen3_vl")))
    plan = load_config(None, ["plan.merges=1", "plan.similarity_run=x"]).plan
    similarity = Similarity(planted(5, {}), np.arange(5) / 10, checkpoint.deepstack_layers)
    start = starting_plan(plan, 5, similarity)
    controls = {own.name: own for own in controls_of(plan, checkpoint, start, similarity, Silent())}
    assert [layer.index for layer in controls["block_influence"].kept] == [0, 1, 3, 4]


def test_that_no_shuffle_makes_a_control_is_said():
    """Of all neighbours only those that are merged have a similarity."""
    matrix = np.full((N_LAYERS, N_LAYERS), np.nan)
    for i, j in ((18, 19), (19, 20)):
        matrix[i, j] = matrix[j, i] = 0.5
    np.fill_diagonal(matrix, 1.0)
    plan = load_config(None, ["plan.merges=2", *BY_SIMILARITY]).plan
    similarity, said = Similarity(matrix, None), []
    start = starting_plan(plan, N_LAYERS, similarity)
    found = controls_of(plan, CHECKPOINT, start, similarity, SimpleNamespace(message=said.append))
    assert [own.name for own in found] == [*FIRST, FIXED, "similarity"]
    assert said == ["Warning: no shuffle of the similarity makes a plan that can be a control."]


# -- one layer kept --------------------------------------------------------------------------------------------------


def judged(plan, value, iteration, **more):
    row = {"searcher": "controls", "status": "ok", "plan_id": plan.plan_id("m"), "objective": "micro_accuracy"}
    return row | {"value": value, "nll": 1.0, "iteration": iteration} | more


def test_each_merged_layer_is_kept_alone_once():
    start = tail_plan(9, [0.5] * 3, name="start", kind="fixed")
    controls = drop, last, _ = [drop_plan(9, 3), before_last_plan(9, 3), base_plan(9)]
    keeping = keeping_one(start, controls)
    assert list(keeping) == [5, 6, 7, 8]
    for layer, plan in keeping.items():
        assert [kept.index for kept in plan.kept] == [0, 1, 2, 3, 4, layer]
        assert all(kept.unchanged for kept in plan.kept) and plan.resumes_at == 5
    assert [plan.name for plan in keeping.values()] == ["drop", "keep_6", "keep_7", "before_last"]
    assert {plan.kind for plan in (keeping[6], keeping[7])} == {"keep_one"} and {drop, last} <= set(keeping.values())


def test_a_control_keeps_one_layer_only_if_it_averages_nothing_and_the_first_such_is_taken():
    start = tail_plan(9, [1.0, 0.5], name="half", kind="file")
    assert keeping_one(start, [start])[6].name == "keep_6" == keeping_one(start, [base_plan(9)])[6].name
    dropping = tail_plan(9, [1.0, 1.0], name="fixed_1", kind="fixed", alignment="neurons")
    assert keeping_one(dropping, [drop_plan(9, 2), dropping])[6].name == "drop"


def test_of_a_block_the_layer_that_takes_it_in_may_be_kept_too():
    start = block_plan(9, 3, [0.5, 0.5], name="start", kind="fixed")
    keeping = keeping_one(start, [drop_plan(9, 2), drop_block_plan(9, 3, 2)])
    assert {layer: plan.name for layer, plan in keeping.items()} == {2: "drop_block", 3: "keep_3", 4: "keep_4"}
    assert [kept.index for kept in keeping[4].kept] == [0, 1, 4, 5, 6, 7, 8] and keeping[4].resumes_at == 2


def test_layers_to_keep_are_in_their_order_whatever_that_of_the_steps():
    start = block_plan(9, 3, [0.5, 0.5], name="start", kind="fixed", survivor="after")
    assert list(keeping_one(start, [])) == [3, 4, 5] and keeping_one(base_plan(9), []) == {}


def test_where_layers_are_merged_in_several_places_no_single_one_can_be_kept():
    start = pairs_plan(9, [(2, 3), (6, 7)], [0.5, 0.5], name="start", kind="fixed")
    assert keeping_one(start, []) == {} and best_kept({}, [], "m") is None


def test_the_best_layer_to_keep_is_the_one_that_the_search_would_choose():
    start = tail_plan(9, [0.5] * 2, name="start", kind="fixed")
    keeping = keeping_one(start, [drop_plan(9, 2)])
    rows = [judged(keeping[6], 0.5, 1), judged(keeping[7], 0.5, 2, nll=0.9), judged(keeping[8], 0.4, 3)]
    assert best_kept(keeping, rows, "m") == 7  # of equals the one with the lower loss
    assert best_kept(keeping, [row | {"nll": 1.0} for row in rows], "m") == 6  # or else the first
    losses = [row | {"objective": "answer_nll"} for row in rows]
    assert best_kept(keeping, losses, "m") == 8
    failed = [rows[0], rows[1] | {"status": "failed", "value": None}, rows[2] | {"searcher": "bayes", "value": 0.9}]
    assert best_kept(keeping, failed, "m") == 6
    assert best_kept(keeping, rows, "another model") is None


@pytest.mark.parametrize("survivor", ["tail", "before", "after"])
def test_alphas_that_keep_a_layer_give_it_all_of_the_weight(survivor):
    alphas = [0.3, 0.5, 0.9]
    start = (
        tail_plan(9, alphas, name="x", kind="file")
        if survivor == "tail"
        else block_plan(9, 2, alphas, name="x", kind="file", survivor=survivor)
    )
    (group,) = start.groups.values()
    for layer in group:
        kept = start.with_alphas(alphas_that_keep(start, layer), name="x", kind="file")
        assert [own.coefficients for own in kept.kept if own.index in group] == [((layer, 1.0),)]
    if survivor == "tail":
        np.testing.assert_array_equal(tail_coefficients(alphas_that_keep(start, 6)), [0, 1, 0, 0])
