"""plan.py: closed forms, the sequential definition of merging, and everything that is refused."""

import hashlib
import math
import os
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from raymerge.plan import (
    MergePlan,
    MergeStep,
    PlanError,
    Refit,
    base_plan,
    before_last_plan,
    block_pairs,
    block_plan,
    block_starts,
    coefficients_to_alphas,
    drop_block_plan,
    drop_layers_plan,
    drop_plan,
    pairs_plan,
    tail_coefficients,
    tail_pairs,
    tail_plan,
)

REFERENCE = os.environ.get("RAYMERGE_REFERENCE")
EPS = np.finfo(np.float64).eps


def plan_of(n_layers, steps, **options):
    return MergePlan(n_layers, tuple(MergeStep(*step) for step in steps), **options)


def sequential(n_layers, steps, matrices):
    """The published definition: average in place, delete the removed one. Returns {layer: matrix}."""
    alive = {layer: matrices[layer].copy() for layer in range(n_layers)}
    for into, remove, alpha in steps:
        alive[into] = alpha * alive[into] + (1 - alpha) * alive[remove]
        del alive[remove]
    return alive


# -- coefficients ----------------------------------------------------------------------------------------------------


def test_tail_coefficients_follow_the_stick_breaking_formula():
    # By hand for K = 3: alphas a0, a1, a2 merge L-1, then L-2, then L-3 (the kept layer L-4 has the last word).
    a0, a1, a2 = 0.9, 0.2, 0.5
    expected = [a2, (1 - a2) * a1, (1 - a2) * (1 - a1) * a0, (1 - a2) * (1 - a1) * (1 - a0)]
    np.testing.assert_allclose(tail_coefficients([a0, a1, a2]), expected, rtol=8 * EPS)


def test_equal_alphas_give_a_geometric_sequence():
    alpha, merges = 0.6225, 13
    expected = [alpha * (1 - alpha) ** j for j in range(merges)] + [(1 - alpha) ** merges]
    found = tail_coefficients([alpha] * merges)
    np.testing.assert_allclose(found, expected, rtol=32 * EPS)
    # What method.md states: only about four of the thirteen do anything.
    np.testing.assert_allclose(found[:5], [0.6225, 0.2350, 0.0887, 0.0335, 0.0126], atol=5e-5)
    assert (found[5:] < 0.005).all()


@pytest.mark.parametrize("merges", [1, 2, 13])
def test_tail_coefficients_sum_to_one_and_take_batches(merges):
    alphas = np.random.default_rng(merges).random((7, 3, merges))
    found = tail_coefficients(alphas)
    assert found.shape == (7, 3, merges + 1) and found.dtype == np.float64
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=0, atol=4 * merges * EPS)
    for row in np.ndindex(7, 3):
        np.testing.assert_array_equal(found[row], tail_coefficients(list(alphas[row])))


def test_tail_coefficients_are_those_of_the_plan():
    alphas = [0.3, 0.8, 0.55, 0.1]
    (merged,) = [layer for layer in tail_plan(9, alphas, name="x", kind="found").kept if not layer.unchanged]
    assert merged.index == 4
    assert [source for source, _ in merged.coefficients] == [4, 5, 6, 7, 8]
    np.testing.assert_allclose([weight for _, weight in merged.coefficients], tail_coefficients(alphas), rtol=8 * EPS)


@pytest.mark.parametrize(
    ("n_layers", "steps"),
    [
        (6, [(4, 5, 0.3), (3, 4, 0.9), (2, 3, 0.45)]),  # tail
        (6, [(5, 4, 0.3), (5, 3, 0.6)]),  # towards the last
        (7, [(2, 3, 0.7), (5, 4, 0.2)]),  # pairs in the middle, one upwards
        (7, [(2, 3, 0.7), (2, 1, 0.4), (5, 4, 0.2), (2, 5, 0.35)]),  # merged ones merged again
        (4, [(1, 0, 0.25), (2, 1, 0.5), (3, 2, 0.75)]),  # all into the last
    ],
    ids=["tail", "last", "middle", "list", "upwards"],
)
def test_folded_steps_equal_merging_one_after_the_other(n_layers, steps):
    rng = np.random.default_rng(3)
    matrices = rng.normal(size=(n_layers, 4, 3))
    expected = sequential(n_layers, steps, matrices)
    kept = plan_of(n_layers, steps).kept
    assert [layer.index for layer in kept] == sorted(expected)
    for layer in kept:
        folded = sum(weight * matrices[source] for source, weight in layer.coefficients)
        # A handful of products and sums of values below 4: each rounds by at most 4 eps.
        np.testing.assert_allclose(folded, expected[layer.index], rtol=0, atol=32 * EPS)
        assert math.isclose(sum(weight for _, weight in layer.coefficients), 1.0, abs_tol=8 * EPS)


def test_the_order_of_steps_counts():
    steps = [(2, 3, 0.5), (1, 2, 0.25)]
    (first,) = [k for k in plan_of(4, steps).kept if not k.unchanged]
    assert first.coefficients == ((1, 0.25), (2, 0.375), (3, 0.375))
    with pytest.raises(PlanError, match="layer 2 .into. was already removed"):
        plan_of(4, steps[::-1])


# -- corners ---------------------------------------------------------------------------------------------------------


def test_drop_is_tail_merging_with_every_alpha_one():
    plan = drop_plan(6, 2)
    assert [(layer.index, layer.coefficients) for layer in plan.kept] == [(i, ((i, 1.0),)) for i in range(4)]
    assert plan.first_changed == 4  # none of the four layers that remain differs
    assert plan.alphas == [1.0, 1.0] and plan.kind == "drop"


def test_before_last_keeps_the_last_layer():
    plan = before_last_plan(6, 2)
    assert [layer.index for layer in plan.kept] == [0, 1, 2, 5]
    assert plan.kept[3].coefficients == ((5, 1.0),)
    assert plan.kept[3].unchanged  # its own tensors,
    assert plan.first_changed == 3  # though not in their own place


def test_all_but_one_layer_can_go():
    assert [layer.index for layer in drop_plan(4, 3).kept] == [0]
    assert [layer.index for layer in before_last_plan(4, 3).kept] == [3]
    assert before_last_plan(4, 3).first_changed == 0


@pytest.mark.parametrize(
    ("plan", "first"),
    [
        (base_plan(5), 5),
        (tail_plan(5, [0.5], name="x", kind="found"), 3),
        (tail_plan(5, [0.5, 1.0], name="x", kind="found"), 3),  # alpha 1 last: layer 2 keeps its own weights
        (tail_plan(5, [0.5, 0.0], name="x", kind="found"), 2),
        (plan_of(5, [(1, 2, 0.5)]), 1),
        (plan_of(5, [(2, 1, 1.0)]), 1),
    ],
)
def test_first_changed(plan, first):
    assert plan.first_changed == first


def test_weights_of_zero_are_left_out():
    plan = tail_plan(4, [0.0, 1.0], name="x", kind="found")
    assert plan.kept[1].coefficients == ((1, 1.0),)
    (merged,) = tail_plan(3, [0.5, 0.0], name="x", kind="found").kept
    assert merged.coefficients == ((1, 0.5), (2, 0.5)) and merged.index == 0


@pytest.mark.parametrize("merges", [0, 5, 6])
def test_merges_must_leave_a_layer(merges):
    for make in (drop_plan, before_last_plan, tail_pairs):
        with pytest.raises(PlanError, match=f"cannot merge {merges} layers of a model that has 5.*1 to 4"):
            make(5, merges)
    with pytest.raises(PlanError, match="cannot merge 5 layers"):
        tail_plan(5, [0.5] * 5, name="x", kind="found")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([(2, 3, 1.5)], r"step 0 \(2 <- 3\): alpha is 1.5, but it must lie in \[0, 1\]"),
        ([(2, 3, -1e-9)], "alpha is -1e-09"),
        ([(2, 3, float("nan"))], "alpha is nan"),
        ([(2, 3, float("inf"))], "alpha is inf"),
        ([(2, 4, 0.5)], r"layer 4 \(remove\) does not exist, the model has 0 to 3"),
        ([(-1, 0, 0.5)], r"layer -1 \(into\) does not exist"),
        ([(2, 2, 0.5)], "cannot be merged into itself"),
        ([(0, 2, 0.5)], r"layers \[1\] still stand between"),
        ([(3, 0, 0.5)], r"layers \[1, 2\] still stand between"),
        ([(2, 3, 0.5), (1, 3, 0.5)], r"step 1 \(1 <- 3\): layer 3 \(remove\) was already removed"),
        ([(2, 3, 0.5)] * 4, "4 merges need more than 4 layers.*merge at most 3"),
    ],
)
def test_refused_steps(steps, message):
    with pytest.raises(PlanError, match=message):
        plan_of(4, steps)


def test_plans_are_immutable_and_can_be_shipped():
    plan = tail_plan(6, [0.3, 0.9], name="x", kind="found", biases="merge")
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan and copy.kept == plan.kept and hash(copy) == hash(plan)
    with pytest.raises(FrozenInstanceError):
        plan.biases = "keep"


# -- effective coefficients to alphas --------------------------------------------------------------------------------


@pytest.mark.parametrize("merges", [1, 2, 5, 13])
def test_alphas_give_back_their_coefficients(merges):
    rng = np.random.default_rng(merges)
    coefficients = rng.dirichlet([0.5] * (merges + 1), 200)
    alphas = coefficients_to_alphas(coefficients)
    assert alphas.shape == (200, merges) and (alphas >= 0).all() and (alphas <= 1).all()
    np.testing.assert_allclose(tail_coefficients(alphas), coefficients, atol=4 * merges * EPS)
    alphas = rng.uniform(0.05, 0.95, (200, merges))
    np.testing.assert_allclose(coefficients_to_alphas(tail_coefficients(alphas)), alphas, rtol=1e-9)
    one = coefficients_to_alphas(coefficients[0])
    np.testing.assert_array_equal(one, coefficients_to_alphas(coefficients)[0])


@pytest.mark.parametrize(
    ("coefficients", "alphas"),
    [
        ([1, 0, 0, 0], [1, 1, 1]),  # drop: below it there is nothing to share
        ([0, 0, 0, 1], [0, 0, 0]),
        ([0, 1, 0, 0], [1, 1, 0]),
        ([0, 0.25, 0, 0.75], [0, 0.25, 0]),
        ([0.5, 0, 0.5, 0], [1, 0, 0.5]),
        ([0.25, 0.25, 0.25, 0.25], [0.5, 1 / 3, 0.25]),
    ],
)
def test_coefficients_of_zero(coefficients, alphas):
    np.testing.assert_allclose(coefficients_to_alphas(coefficients), alphas, atol=EPS)
    np.testing.assert_allclose(tail_coefficients(coefficients_to_alphas(coefficients)), coefficients, atol=EPS)
    plan = tail_plan(6, coefficients_to_alphas(coefficients), name="x", kind="found")
    assert [layer for layer, _ in plan.kept[2].coefficients] == [2 + j for j, c in enumerate(coefficients) if c]


def test_the_corner_of_the_first_layer_is_dropping():
    alphas = coefficients_to_alphas([1.0, 0.0, 0.0])
    assert tail_plan(5, alphas, name="x", kind="found").plan_id("m") == drop_plan(5, 2).plan_id("m")


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([0.5, 0.6], "must add up to 1.*add up to 1.1"),
        ([[0.5, 0.5], [0.5, 0.4]], "must add up to 1"),
        ([1.5, -0.5], "finite and not negative"),
        ([float("nan"), 1.0], "finite and not negative"),
    ],
)
def test_refused_coefficients(coefficients, message):
    with pytest.raises(PlanError, match=message):
        coefficients_to_alphas(coefficients)


# -- alphas of single matrices ---------------------------------------------------------------------------------------

OWN = (("mlp.up_proj", (0.2, 0.7)), ("mlp.down_proj", (1.0, 1.0)))


def test_matrices_have_coefficients_of_their_own():
    plan = replace(tail_plan(5, [0.5, 0.25], name="x", kind="found"), matrix_alphas=OWN)
    merged = plan.kept[2]
    assert merged.coefficients == merged.coefficients_of("mlp.gate_proj") == ((2, 0.25), (3, 0.375), (4, 0.375))
    up = tail_plan(5, [0.2, 0.7], name="x", kind="found").kept[2].coefficients
    assert merged.coefficients_of("mlp.up_proj") == up
    assert merged.coefficients_of("mlp.down_proj") == ((2, 1.0),)
    assert merged.sources == [2, 3, 4] and not merged.unchanged
    assert all(layer.matrices == () and layer.unchanged for layer in plan.kept[:2])
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_layer_is_unchanged_only_if_every_matrix_is():
    dropped = drop_plan(5, 2)
    assert replace(dropped, matrix_alphas=(("mlp.up_proj", (0.3, 1.0)),)).kept[2].unchanged
    plan = replace(dropped, matrix_alphas=(("mlp.up_proj", (1.0, 0.5)),))
    assert not plan.kept[2].unchanged and plan.first_changed == 2 and plan.kept[2].sources == [2, 3]
    assert plan.kept[2].coefficients_of("mlp.down_proj") == ((2, 1.0),)


def test_matrix_alphas_are_part_of_the_identity_where_there_are_any():
    plan = tail_plan(5, [0.5, 0.25], name="x", kind="found")
    own = replace(plan, matrix_alphas=OWN)
    others = [own, replace(plan, matrix_alphas=OWN[:1]), replace(plan, matrix_alphas=((OWN[0][0], OWN[1][1]),))]
    assert len({p.plan_id("m") for p in (plan, *others)}) == 4
    assert replace(plan, matrix_alphas=OWN[::-1]) == own
    assert replace(plan, matrix_alphas=OWN[::-1]).plan_id("m") == own.plan_id("m")
    assert replace(own, matrix_alphas=()).plan_id("m") == plan.plan_id("m")
    assert own.with_alphas([0.5, 0.25], name="x", kind="found") == plan
    assert plan.with_alphas([0.5, 0.25], name="x", kind="found", matrix_alphas=dict(OWN)) == own


@pytest.mark.parametrize(
    ("matrix_alphas", "message"),
    [
        ((("mlp.up_proj", (0.5,)),), "1 alphas are given for mlp.up_proj in a plan of 2 steps"),
        ((("mlp.up_proj", (0.5, 1.5)),), r"mlp.up_proj: step 1 \(2 <- 3\): alpha is 1.5, but it must lie in"),
        ((("mlp.up_proj", (0.5, float("nan"))),), "mlp.up_proj: step 1 .*alpha is nan"),
        ((("mlp.up_proj", (0.5, 0.5)), ("mlp.up_proj", (0.5, 0.4))), "name a matrix twice: mlp.up_proj, mlp.up_proj"),
    ],
)
def test_refused_matrix_alphas(matrix_alphas, message):
    with pytest.raises(PlanError, match=message):
        replace(tail_plan(5, [0.5, 0.25], name="x", kind="found"), matrix_alphas=matrix_alphas)


# -- identity --------------------------------------------------------------------------------------------------------


def test_plan_id_is_the_digest_of_the_documented_text():
    plan = tail_plan(4, [1, 0.25], name="ignored", kind="found")
    text = (
        '{"alignment":"none","alphas":[1.0,0.25],"biases":"keep","model":"0123abcd","norms":"keep",'
        '"selection":"tail","steps":[[2,3],[1,2]]}'
    )
    assert plan.plan_id("0123abcd") == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert plan.plan_id("0123abcd") == "4aafe56fc44ede12"


def test_plan_id_changes_with_each_ingredient_and_with_nothing_else():
    plan = tail_plan(6, [0.3, 0.9], name="x", kind="found")
    one_more_bit = math.nextafter(0.3, 1)
    changes = {
        "alignment": "rows",
        "norms": "fold",
        "biases": "merge",
        "selection": "list",
        "matrix_alphas": (("mlp.up_proj", (0.3, 0.8)),),
        "refit": Refit("linear"),
    }
    # Every field that decides what is saved: one that plan_id forgets gives two models the same results.
    assert {f.name for f in fields(plan) if f.init} == {"n_layers", "steps", "name", "kind", *changes}
    others = [
        plan_of(6, [(4, 5, one_more_bit), (3, 4, 0.9)], selection="tail"),
        plan_of(6, [(4, 5, 0.9), (3, 4, 0.3)], selection="tail"),
        plan_of(6, [(5, 4, 0.3), (3, 5, 0.9)], selection="tail"),
        *(replace(plan, **{name: value}) for name, value in changes.items()),
        tail_plan(6, [0.3], name="x", kind="found"),
    ]
    ids = [p.plan_id("m") for p in (plan, *others)] + [plan.plan_id("other model")]
    assert len(set(ids)) == len(ids)
    same = replace(plan, name="another", kind="random")
    assert same.plan_id("m") == plan.plan_id("m")
    assert tail_plan(6, np.array([0.3, 0.9]), name="x", kind="found").plan_id("m") == plan.plan_id("m")


# -- further plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[4], [0], [1, 2], [0, 1, 4], [0, 3, 4], [0, 1, 2, 3], [1, 3]])
def test_dropping_any_layers_leaves_the_others_as_they_are(layers):
    plan = drop_layers_plan(5, layers, name="x")
    assert [kept.index for kept in plan.kept] == [layer for layer in range(5) if layer not in layers]
    assert all(kept.unchanged for kept in plan.kept) and plan.kind == "drop"


def test_a_layer_that_is_named_twice_is_dropped_once_and_a_block_may_be_all_but_the_first():
    assert drop_layers_plan(5, [2, 2, 4], name="x") == drop_layers_plan(5, [4, 2], name="x")
    assert [kept.index for kept in drop_block_plan(5, 1, 4).kept] == [0]
    assert [kept.index for kept in drop_block_plan(5, 0, 4).kept] == [4]


def test_where_a_merged_model_can_resume_from_the_unmerged_states():
    tail = tail_plan(8, [0.5, 0.2, 0.7], name="x", kind="found")
    assert (tail.resumes_at, tail.ends_at_once) == (4, True)
    for plan in (drop_plan(8, 3), before_last_plan(8, 3), tail_plan(8, [0.5, 0.5, 1.0], name="x", kind="found")):
        assert (plan.resumes_at, plan.ends_at_once) == (4, True)
    assert (base_plan(8).resumes_at, base_plan(8).ends_at_once) == (7, False)
    middle = pairs_plan(8, [(2, 3), (6, 7)], [0.5, 0.5], name="x", kind="file")
    assert (middle.resumes_at, middle.ends_at_once) == (2, False)


def test_flat_alphas_hold_those_of_single_matrices_too():
    matrices = ("mlp.down_proj", "mlp.up_proj")
    plan = tail_plan(6, [0.3, 0.9], name="x", kind="found")
    assert plan.flat_alphas == [0.3, 0.9]
    own = plan.with_alphas([0.5, 0.6], name="x", kind="found", matrix_alphas=dict.fromkeys(matrices, (0.1, 0.2)))
    assert own.flat_alphas == [0.5, 0.6, 0.1, 0.2, 0.1, 0.2]
    for each in (plan, own):
        assert plan.with_flat_alphas(each.flat_alphas, matrices, name="x", kind="found") == each
    with pytest.raises(PlanError, match="3 alphas are given for 2 steps and 2 matrices"):
        plan.with_flat_alphas([0.1] * 3, matrices, name="x", kind="found")


def test_flat_alphas_go_back_to_their_own_matrices_in_whatever_order_these_are_named():
    """Those of down_proj went to q_proj, and so on: a plan that was found by descent was not the one reported."""
    matrices = ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    plan = tail_plan(6, [0.3, 0.9], name="x", kind="found")
    own = plan.with_alphas(
        [0.5, 0.6], name="x", kind="found", matrix_alphas={m: (0.1 * i, 0.2) for i, m in enumerate(matrices)}
    )
    assert own.flat_alphas == [0.5, 0.6, 0.2, 0.2, 0.1, 0.2, 0.0, 0.2], "down, up, v"
    for named in (matrices, matrices[::-1], sorted(matrices)):
        assert plan.with_flat_alphas(own.flat_alphas, named, name="x", kind="found") == own


def test_other_coefficients_for_the_same_merges():
    plan = tail_plan(6, [0.3, 0.9], name="x", kind="found", norms="fold")
    other = plan.with_alphas([0.1, 0.2], name="y", kind="random")
    assert (other.alphas, other.norms, other.name, other.kind) == ([0.1, 0.2], "fold", "y", "random")
    assert other.kept != plan.kept and [(s.into, s.remove) for s in other.steps] == [(4, 5), (3, 4)]
    with pytest.raises(PlanError, match="3 alphas are given for a plan of 2 steps"):
        plan.with_alphas([0.1, 0.2, 0.3], name="y", kind="random")


# -- blocks anywhere -------------------------------------------------------------------------------------------------


def test_the_tail_is_the_last_block_and_before_last_the_block_before_it():
    alphas = [0.2, 0.9, 0.4]
    assert block_pairs(9, 6, 3) == tail_pairs(9, 3)
    block = block_plan(9, 6, alphas, name="b", kind="file")
    assert block.kept == tail_plan(9, alphas, name="b", kind="file").kept
    assert drop_block_plan(9, 6, 3).kept == drop_plan(9, 3).kept
    after = block_plan(9, 5, [1.0] * 3, name="b", kind="file", survivor="after")
    assert after.kept == before_last_plan(9, 3).kept


@pytest.mark.parametrize(("survivor", "index"), [("before", 3), ("after", 7)])
def test_a_block_folds_into_its_survivor_with_the_tail_s_coefficients(survivor, index):
    """Layers 4 to 6 go; the survivor's coefficient is the product rule's first, the farthest layer's the last."""
    alphas = [0.2, 0.9, 0.4]
    plan = block_plan(10, 4, alphas, name="b", kind="file", survivor=survivor, norms="fold")
    (merged,) = (layer for layer in plan.kept if not layer.unchanged)
    order = [3, 4, 5, 6] if survivor == "before" else [7, 6, 5, 4]
    assert merged.index == index and [layer.index for layer in plan.kept] == [0, 1, 2, 3, 7, 8, 9]
    found = dict(merged.coefficients)
    np.testing.assert_allclose([found[layer] for layer in order], tail_coefficients(alphas), rtol=1e-14)
    assert plan.selection == "block" and plan.norms == "fold" and not plan.ends_at_once
    # From the states that enter the first layer that differs.
    assert plan.resumes_at == (3 if survivor == "before" else 4)


@pytest.mark.parametrize("first", [0, 1, 4, 6])
def test_a_dropped_block_leaves_the_others_as_they_are(first):
    plan = drop_block_plan(9, first, 3)
    assert [layer.index for layer in plan.kept] == [n for n in range(9) if not first <= n < first + 3]
    assert all(layer.unchanged for layer in plan.kept) and plan.kind == "drop"
    assert plan.resumes_at == min(first, 5)
    # What block merging gives with every alpha 1, whichever neighbour survives.
    for survivor in ("before", "after"):
        if first in block_starts(9, 3, survivor):
            assert block_plan(9, first, [1.0] * 3, name="b", kind="file", survivor=survivor).kept == plan.kept


def test_a_block_moves_and_takes_points_of_a_search_over_blocks():
    alphas = [0.3, 0.8]
    plan = block_plan(8, 2, [0.5, 0.5], name="b", kind="file", survivor="after", norms="fold")
    moved = plan.with_flat_alphas([4.0, *alphas], ["mlp.up_proj"], name="x", kind="found")
    expected = block_plan(8, 4, alphas, name="x", kind="found", survivor="after", norms="fold")
    assert moved == expected and moved.plan_id("m") == expected.plan_id("m")  # 4.0 is no other layer than 4
    assert plan.with_flat_alphas(alphas, [], name="x", kind="found").steps[0].remove == 2
    assert len(plan.with_flat_alphas([*alphas, *alphas], ["mlp.up_proj"], name="x", kind="found").matrix_alphas) == 1
    with pytest.raises(PlanError, match="layer 8 .* does not exist"):
        plan.moved_to(6)
    with pytest.raises(PlanError, match="3 alphas are given"):
        tail_plan(8, alphas, name="t", kind="file").with_flat_alphas([4.0, *alphas], ["a", "b"], name="x", kind="found")


@pytest.mark.parametrize(
    ("first", "merges", "survivor", "words"),
    [
        (0, 3, "before", "no layer before it in a model of 8: its first layer must lie in 1 to 5"),
        (6, 3, "before", "from layer 6 on has no layer before it"),
        (5, 3, "after", "its first layer must lie in 0 to 4"),
        (1, 8, "before", "cannot merge 8 layers"),
        (1, 2, "beside", "survivor is 'beside', but must be one of before, after"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(first, merges, survivor, words):
    with pytest.raises(PlanError, match=words):
        block_plan(8, first, [0.5] * merges, name="b", kind="file", survivor=survivor)


# -- refits ----------------------------------------------------------------------------------------------------------


def test_a_refit_is_of_the_seams_and_of_the_layers_after_them():
    plan = block_plan(10, 4, [0.5, 1.0, 0.5], name="b", kind="file")
    assert plan.refit_targets == {} and not any(layer.refitted for layer in plan.kept)
    assert replace(plan, refit=Refit("linear")).refit_targets == {3: 6}
    # Layers 7 to 9 stand at 4 to 6; more than there are is all.
    assert replace(plan, refit=Refit("outputs", layers=2)).refit_targets == {3: 6, 4: 7, 5: 8}
    assert replace(plan, refit=Refit("outputs", layers=9)).refit_targets == {3: 6, 4: 7, 5: 8, 6: 9}
    after = block_plan(10, 4, [0.5, 0.5], name="b", kind="file", survivor="after")
    assert replace(after, refit=Refit("units")).refit_targets == {4: 6}
    two = drop_layers_plan(10, [2, 6, 7], name="d")
    assert replace(two, refit=Refit("outputs", layers=1)).refit_targets == {1: 2, 2: 3, 4: 7, 5: 8}


def test_a_dropped_block_that_is_refitted_is_changed_where_its_seam_is():
    plan = drop_block_plan(9, 4, 3)
    fitted = replace(plan, refit=Refit("linear"))
    assert [layer.unchanged for layer in fitted.kept] == [True, True, True, False, True, True]
    assert (plan.first_changed, fitted.first_changed, fitted.resumes_at) == (4, 3, 3)
    assert [layer.coefficients for layer in fitted.kept] == [layer.coefficients for layer in plan.kept]
    tail = tail_plan(9, [0.5], name="t", kind="file")
    assert tail.ends_at_once and not replace(tail, refit=Refit("linear")).ends_at_once


def test_refits_are_told_apart_by_their_plan_s_identity():
    plan = drop_block_plan(9, 4, 3)
    refits = [Refit("linear"), Refit("outputs"), Refit("outputs", 0.1), Refit("outputs", 0.1, 2)]
    refits.append(Refit("outputs", 0.1, 2, "other tokens"))
    assert len({plan.plan_id("m"), *(replace(plan, refit=refit).plan_id("m") for refit in refits)}) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "cubic"}, "refit is 'cubic', but must be one of linear, scale, outputs, units"),
        ({"method": "linear", "ridge": 0.0}, "the ridge of a refit is 0.0, but must be above 0"),
        ({"method": "linear", "ridge": math.nan}, "the ridge of a refit is nan"),
        ({"method": "linear", "layers": -1}, "-1 layers after a seam"),
        ({"method": "linear", "layers": 2}, "refit linear is of a seam alone, but 2 layers .* use outputs or units"),
    ],
)
def test_refits_that_are_none_are_refused(options, words):
    with pytest.raises(PlanError, match=words):
        Refit(**options)
