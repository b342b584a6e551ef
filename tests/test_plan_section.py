"""plan_section.py: the merges and base coefficients of the plan section, with similarities of our own."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from test_heuristics import planted

from raymerge.alpha_files import alpha_file_text
from raymerge.config import PlanConfig
from raymerge.config_file import load_config
from raymerge.plan import MergePlan, PlanError, tail_plan
from raymerge.plan_section import (
    SHUFFLE_SEED,
    Similarity,
    allowed_starts,
    influence_plan,
    options_of,
    shuffled_plan,
    similarity_of,
    starting_plan,
)
from raymerge.tables import RunDirectory

N_LAYERS = 21
NEIGHBOURS = {(2, 3): 0.9, (3, 4): 0.2, (7, 8): 0.8, (19, 20): 0.3, (18, 19): 0.4}


def plan_config(*settings):
    return load_config(None, [f"plan.{setting}" for setting in settings])


def steps_of(plan):
    return [(step.into, step.remove, pytest.approx(step.alpha)) for step in plan.steps]


@pytest.mark.parametrize(
    ("settings", "first", "steps", "name", "kind"),
    [
        (["ratio=0.7"], None, [(19, 20, 0.7), (18, 19, 0.7)], "fixed_0.7", "fixed"),
        (["base=similarity"], None, [(19, 20, 0.3), (18, 19, 0.4)], "similarity", "file"),
        (["selection=most_similar", "base=similarity"], None, [(2, 3, 0.9), (7, 8, 0.8)], "similarity", "file"),
        (["selection=block", "starts=[9, 5]"], None, [(5, 6, 0.6225), (4, 5, 0.6225)], "fixed_0.6225", "fixed"),
        (["selection=block", "base=similarity"], 3, [(3, 4, 0.2), (2, 3, 0.9)], "similarity", "file"),
        (["selection=block", "survivor=after", "ratio=0.5"], 3, [(4, 3, 0.5), (5, 4, 0.5)], "fixed_0.5", "fixed"),
    ],
)
def test_a_starting_plan_is_named_after_where_its_coefficients_come_from(settings, first, steps, name, kind):
    options = ["merges=2", "similarity_run=x", "alignment=neurons", "norms=fold", "biases=merge", *settings]
    config = plan_config(*options).plan
    plan = starting_plan(config, N_LAYERS, Similarity(planted(N_LAYERS, NEIGHBOURS), None), first)
    assert steps_of(plan) == steps and (plan.name, plan.kind, plan.selection) == (name, kind, config.selection)
    assert (plan.alignment, plan.norms, plan.biases) == ("neurons", "fold", "merge")


def test_beta_is_how_much_similarity_ratio_makes_of_the_similarities():
    matrix = planted(N_LAYERS, NEIGHBOURS) + 1.0
    shares = [matrix[into].mean() / (matrix[into].mean() + matrix[into + 1].mean()) for into in (19, 18)]
    for beta in (1.0, 2.5, 0.0):
        plan = plan_config("base=similarity_ratio", "similarity_run=x", "merges=2", f"beta={beta}").plan
        found = starting_plan(plan, N_LAYERS, Similarity(matrix, None))
        assert found.alphas == pytest.approx([1 / (1 + np.exp(-beta * share)) for share in shares])


def test_every_option_of_a_plan_that_the_section_has_is_passed_on():
    """But for which layers are merged, and refits, which are made of what was found."""
    both = {field.name for field in fields(MergePlan)} & set(PlanConfig.model_fields)
    assert set(options_of(PlanConfig())) == both - {"selection", "refit"}


def test_a_plan_from_a_file_has_the_section_s_options(tmp_path):
    (tmp_path / "a.json").write_text(alpha_file_text(tail_plan(N_LAYERS, [0.3, 0.8], name="x", kind="file").steps))
    plan = starting_plan(
        plan_config("base=file", f"alpha_file={tmp_path / 'a.json'}", "norms=fold").plan, N_LAYERS, None
    )
    assert steps_of(plan) == [(19, 20, 0.3), (18, 19, 0.8)] and plan.norms == "fold"
    unused = plan_config("merges=2", f"alpha_file={tmp_path / 'a.json'}").plan  # whose base is fixed
    assert steps_of(starting_plan(unused, N_LAYERS, None)) == [(19, 20, 0.6225), (18, 19, 0.6225)]


def test_a_shuffled_similarity_merges_as_many_layers_by_the_values_of_others():
    matrix = planted(N_LAYERS, NEIGHBOURS) + np.diag(np.arange(N_LAYERS))
    similarity = Similarity(matrix, np.arange(N_LAYERS) / 100)
    shuffled = similarity.shuffled(0)
    order = np.diag(shuffled.matrix).astype(int) - 1
    assert sorted(order) == list(range(N_LAYERS)) and (order != range(N_LAYERS)).sum() > N_LAYERS / 2
    np.testing.assert_array_equal(shuffled.matrix, matrix[np.ix_(order, order)])
    assert shuffled.block_influence is None

    # Where a threshold stops the merging, the control has as many merges, whether or not they exceed it.
    config = plan_config("selection=most_similar", "similarity_run=x", "merges=null", "threshold=0.5").plan
    similarity = Similarity(planted(N_LAYERS, NEIGHBOURS), None)
    (control,) = shuffled_plan(config, N_LAYERS, similarity, 2)
    assert len(starting_plan(config, N_LAYERS, similarity).steps) == 2 == len(control.steps)
    assert control.name == "similarity_shuffled"
    block = plan_config("selection=block", "base=similarity", "similarity_run=x", "merges=2").plan
    (control,) = shuffled_plan(block, N_LAYERS, similarity, 2, 7)
    assert [step.remove for step in control.steps] == [8, 7]


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_a_shuffled_control_merges_as_many_layers_where_a_threshold_stops_before_the_merges(recompute):
    """plan.merges is 13 unless it is said to be null; merging with similarities collected anew may stop elsewhere."""
    settings = ["selection=most_similar", "similarity_run=x", "threshold=0.85", f"recompute={recompute}"]
    similarity = Similarity(planted(N_LAYERS, NEIGHBOURS), None)
    config = plan_config(*settings).plan
    assert config.merges == 13 and len(starting_plan(config, N_LAYERS, similarity).steps) == 1
    for merges in (1, 3):
        (control,) = shuffled_plan(config, N_LAYERS, similarity, merges)
        assert len(control.steps) == merges


def test_a_shuffle_that_makes_no_plan_gives_way_to_another():
    """The start needs two rows of 21, and has them; of the shuffles some put the row without values among them."""
    matrix = planted(N_LAYERS, NEIGHBOURS)
    matrix[0, 5] = np.nan
    config = plan_config("base=similarity_ratio", "similarity_run=x", "merges=12").plan
    similarity = Similarity(matrix, None)
    assert len(starting_plan(config, N_LAYERS, similarity).steps) == 12
    with pytest.raises(PlanError, match="has no value at 1 of 21 layers"):
        starting_plan(config, N_LAYERS, similarity.shuffled(SHUFFLE_SEED))
    (control,) = shuffled_plan(config, N_LAYERS, similarity, 12)
    assert len(control.steps) == 12 and control.name == "similarity_shuffled"

    def only(plan):
        if plan.alphas != wanted:
            raise PlanError("layers that differ")

    wanted = starting_plan(config, N_LAYERS, similarity.shuffled(SHUFFLE_SEED + 8)).alphas
    assert [plan.alphas for plan in shuffled_plan(config, N_LAYERS, similarity, 12, check=only)] == [wanted]
    wanted = None
    assert shuffled_plan(config, N_LAYERS, similarity, 12, check=only) == []


def test_block_influence_makes_a_plan_where_a_run_has_measured_it():
    matrix, influence = planted(N_LAYERS, {}), np.arange(N_LAYERS)[::-1] / 100
    (plan,) = influence_plan(Similarity(matrix, influence), 2)
    assert {layer.index for layer in plan.kept} == set(range(N_LAYERS - 2))
    assert influence_plan(Similarity(matrix, None), 2) == [] == influence_plan(None, 2)


def test_a_similarity_chooses_only_layers_that_may_be_merged():
    """Others are given features of images; with a shuffled similarity too."""
    planned = planted(6, {(0, 1): 0.9, (1, 2): 0.8, (3, 4): 0.5, (2, 3): 0.4})
    similarity = Similarity(planned, np.arange(6) / 10, 2)
    config = plan_config("selection=most_similar", "similarity_run=x", "merges=2").plan
    found = [starting_plan(config, 6, similarity), *shuffled_plan(config, 6, similarity, 2)]
    assert [(step.into, step.remove) for step in found[0].steps] == [(3, 4), (2, 3)]
    assert min(step.into for step in found[1].steps) >= 2
    assert {layer.index for layer in influence_plan(similarity, 2)[0].kept} == {0, 1, 4, 5}
    by_threshold = plan_config("selection=most_similar", "similarity_run=x", "merges=null", "threshold=-1").plan
    assert len(starting_plan(by_threshold, 6, similarity).steps) == 3
    with pytest.raises(PlanError, match="4 layers of a model that has 6 and whose first 2 stay, .* in 1 to 3"):
        starting_plan(config.model_copy(update={"merges": 4}), 6, similarity)


def test_blocks_that_are_averaged_have_layers_of_one_attention():
    kinds = {"windows": [40, None, 40, 40, 40, 40], "rotary_types": ["a"] * 5 + ["b"]}
    checkpoint = SimpleNamespace(**kinds, deepstack_layers=0)

    def allowed(merges, *settings):
        return allowed_starts(plan_config("selection=block", *settings).plan, 6, merges, checkpoint)

    # The layer that takes the block in is one of them: the one before it, or the one after.
    assert allowed(1) == [3, 4] and allowed(2) == [3]
    assert allowed(1, "survivor=after") == [2, 3] and allowed(2, "survivor=after") == [2]
    assert allowed_starts(plan_config("selection=block").plan, 6, 2) == [1, 2, 3, 4]
    # What is asked for by its number is refused where it is merged, with the layers that differ.
    assert allowed(2, "block=1") == [1] and allowed(2, "starts=[1, 3]") == [1, 3]
    with pytest.raises(PlanError, match="no 4 layers in a row of this model have the same attention, so that 3 could"):
        allowed(3)
    # None has a layer to which features of images are added, nor is averaged with one.
    checkpoint = SimpleNamespace(**kinds, deepstack_layers=3)
    assert allowed(1) == [4] and allowed(1, "survivor=after") == [3]
    dropped = allowed_starts(plan_config("selection=block").plan, 6, 2, checkpoint, averaged=False)
    assert dropped == [3, 4]
    with pytest.raises(PlanError, match="every block of 4 layers .* one of its first 3, to whose outputs it adds feat"):
        allowed_starts(plan_config("selection=block").plan, 6, 4, checkpoint, averaged=False)


def test_of_a_similarity_run_the_matrix_and_influence_that_are_named_are_read(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, "similarity")
    number, model = {}, SimpleNamespace(n_layers=2, deepstack_layers=1)
    for subset in ("a", "b"):
        for language in ("en", "de"):
            number[subset, language] = value = len(number) + 1.0
            names = {"subset": subset, "language": language, "n_samples": 3}
            pairs = [{"layer_i": i, "layer_j": j, "value": value + i - j} for i in range(2) for j in range(2)]
            run.append("similarity", [names | {"measure": "npib", "embedding": "pca"} | pair for pair in pairs])
            run.append("block_influence", [names | {"layer": i, "value": value / 8 + i} for i in range(2)])
    run.write_manifest()
    for (subset, language), value in number.items():
        named = [f"similarity_subset={subset}", f"similarity_language={language}"]
        found = similarity_of(plan_config(f"similarity_run={tmp_path / 'run'}", *named).plan, model)
        assert found.matrix.tolist() == [[value, value - 1], [value + 1, value]]
        assert found.block_influence.tolist() == [value / 8, value / 8 + 1]
        assert found.first == 1
    assert similarity_of(plan_config().plan, model) is None
