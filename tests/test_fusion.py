"""fusion.py: the fused state dict against merging step by step as published, and receipts."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from raymerge.architectures import architecture_of
from raymerge.checkpoint import Checkpoint
from raymerge.fusion import Receipt, check_mergeable, fuse_state_dict, fused_layer, fused_tensors, receipts
from raymerge.plan import KeptLayer, MergePlan, MergeStep, PlanError, base_plan, before_last_plan, drop_plan, tail_plan

torch.set_num_threads(1)
EPS = torch.finfo(torch.float32).eps


def plan_of(steps, n_layers=tiny.N_LAYERS, **options):
    return MergePlan(n_layers, tuple(MergeStep(*step) for step in steps), **options)


PLANS = {
    "tail": tail_plan(5, [0.3, 0.8], name="x", kind="found"),
    "all": tail_plan(5, [0.5, 0.7, 0.2, 0.9], name="x", kind="found"),
    "drop": drop_plan(5, 2),
    "before_last": before_last_plan(5, 2),
    "always_last": tail_plan(5, [0.0, 0.0], name="x", kind="found"),
    "middle": plan_of([(1, 2, 0.35)], selection="list"),
    "pairs": plan_of([(0, 1, 0.6), (3, 2, 0.1), (3, 4, 0.5)], selection="list"),
}


@pytest.fixture(scope="module", params=["llama", "llama_biases", "qwen2", "qwen3_biases"])
def model(request):
    return tiny.random_model(tiny.config_of(request.param))


@pytest.fixture(scope="module")
def biased():
    return tiny.random_model(tiny.config_of("llama_biases"))


@pytest.mark.parametrize("biases", ["keep", "merge"])
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_published_merging_step_by_step(model, name, biases):
    plan = MergePlan(5, PLANS[name].steps, biases=biases)
    state = model.state_dict()
    untouched = {key: tensor.clone() for key, tensor in state.items()}
    fused = fuse_state_dict(state, architecture_of(model.config), plan)
    expected, alive = tiny.published_merge(state, 5, tiny.steps_of(plan), biases=biases)

    assert [kept.index for kept in plan.kept] == alive
    assert set(fused) == set(expected)
    largest = max(tensor.abs().max() for tensor in state.values())
    for key, tensor in fused.items():
        assert tensor.dtype == torch.float32
        # Up to five products, each with a rounded coefficient, and as many sums.
        assert (tensor - expected[key]).abs().max() <= 8 * EPS * largest, key
    assert all(torch.equal(state[key], untouched[key]) for key in untouched), "the base was modified"

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(alive)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in alive]
    AutoModelForCausalLM.from_config(config).load_state_dict(fused, strict=True)


def test_only_the_seven_matrices_of_the_merged_layer_change(biased):
    state, plan = biased.state_dict(), PLANS["tail"]
    fused = fuse_state_dict(state, architecture_of(biased.config), plan)
    changed = {name for name in fused if not torch.equal(fused[name], state[name])}
    averaged = {f"model.layers.2.self_attn.{p}_proj.weight" for p in "qkvo"}
    averaged |= {f"model.layers.2.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert changed == averaged
    merged_too = fuse_state_dict(state, architecture_of(biased.config), plan_of(tiny.steps_of(plan), biases="merge"))
    changed = {name for name in merged_too if not torch.equal(merged_too[name], state[name])}
    assert changed == averaged | {name.replace("weight", "bias") for name in averaged}


def test_sums_in_float32_and_rounds_once():
    """0.1 W + 0.9 W rounded once is W; rounding each step of many merges to bfloat16 is not."""
    model = tiny.random_model(tiny.config_of("llama"), dtype=torch.bfloat16)
    state = model.state_dict()
    for layer in range(1, 5):  # all layers alike, so that any average of them is the layer
        for name in list(state):
            if name.startswith("model.layers.0."):
                state[name.replace("layers.0.", f"layers.{layer}.")] = state[name]
    plan = tail_plan(5, [0.3, 0.1, 0.7, 0.9], name="x", kind="found")
    fused = fuse_state_dict(state, architecture_of(model.config), plan)
    assert all(torch.equal(fused[name], state[name]) for name in fused)
    assert all(tensor.dtype == torch.bfloat16 for tensor in fused.values())


def test_one_layer_is_in_memory_at_a_time():
    """The whole model is an iterator, and the base is only ever asked for single tensors."""
    model = tiny.random_model(tiny.config_of("llama"))
    state, arch = model.state_dict(), architecture_of(model.config)
    stream = fused_tensors(state, arch, PLANS["tail"])
    assert iter(stream) is stream
    names = [name for name, _ in stream]
    assert len(names) == len(set(names)) == 3 + 3 * 9


def test_layers_of_other_shapes_are_not_merged():
    model = tiny.random_model(tiny.config_of("llama"))
    state, arch = dict(model.state_dict()), architecture_of(model.config)
    state["model.layers.4.mlp.up_proj.weight"] = torch.zeros(40, 32)
    with pytest.raises(PlanError, match=r"model.layers.4.mlp.up_proj.weight is missing or not \(48, 32\) as"):
        fuse_state_dict(state, arch, tail_plan(5, [0.5], name="x", kind="found"))
    del state["model.layers.4.mlp.up_proj.weight"]
    with pytest.raises(PlanError, match="model.layers.4.mlp.up_proj.weight is missing"):
        fused_layer(state, arch, KeptLayer(3, ((3, 0.5), (4, 0.5))))


# -- receipts --------------------------------------------------------------------------------------------------------


def by_name_differences(base, fused):
    """Receipts by their definition: each merged tensor against the base's tensor of the same name."""
    expected = {}
    for name, tensor in fused.items():
        change = tensor.double() - base[name].double()
        if change.any():
            expected[name] = (change.abs().max().item(), (change.norm() / base[name].double().norm()).item())
    return expected


@pytest.mark.parametrize("name", PLANS)
def test_receipts_tell_which_tensors_changed_and_by_how_much(biased, name):
    state, arch, plan = biased.state_dict(), architecture_of(biased.config), PLANS[name]
    found = {receipt.tensor: receipt for receipt in receipts(state, arch, plan)}
    expected = by_name_differences(state, fuse_state_dict(state, arch, plan))
    assert {key for key, receipt in found.items() if receipt.max_abs_change > 0} == set(expected)
    for key, (largest, relative) in expected.items():
        assert found[key].max_abs_change == pytest.approx(largest, rel=1e-5)  # float32 differences
        assert found[key].relative_change == pytest.approx(relative, rel=1e-5)
    assert all(receipt.relative_change == 0 for key, receipt in found.items() if key not in expected)


def test_receipts_of_the_controls(biased):
    state, arch = biased.state_dict(), architecture_of(biased.config)
    assert receipts(state, arch, base_plan(5)) == []
    assert receipts(state, arch, drop_plan(5, 2)) == []  # dropping changes nothing that remains
    names = {receipt.tensor for receipt in receipts(state, arch, before_last_plan(5, 2))}
    assert names == {name for name in state if name.startswith("model.layers.2.")}


def test_a_receipt_of_a_tensor_that_was_zero():
    model = tiny.random_model(tiny.config_of("llama"))
    state, arch = dict(model.state_dict()), architecture_of(model.config)
    name = "model.layers.3.mlp.up_proj.weight"
    state[name] = torch.zeros_like(state[name])
    found = {receipt.tensor: receipt for receipt in receipts(state, arch, tail_plan(5, [0.5], name="x", kind="found"))}
    half = state["model.layers.4.mlp.up_proj.weight"].abs().max().item() / 2
    assert found[name] == Receipt(name, half, 1.0)


# -- what may be merged ----------------------------------------------------------------------------------------------


def test_layers_with_other_attention_windows_are_not_averaged(tmp_path):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "qwen2_windows")))
    assert checkpoint.windows == [None, None, 40, 40, 40]
    check_mergeable(checkpoint, tail_plan(5, [0.5, 0.5], name="x", kind="found"))
    check_mergeable(checkpoint, plan_of([(0, 1, 0.5)]))
    for plan in (tail_plan(5, [0.5, 0.5, 0.5], name="x", kind="found"), plan_of([(2, 1, 0.5)])):
        with pytest.raises(PlanError, match="would be averaged, but their attention windows differ"):
            check_mergeable(checkpoint, plan)
    # All weight on one source, but in a layer of the other kind: it would compute something else.
    with pytest.raises(PlanError, match="windows differ"):
        check_mergeable(checkpoint, plan_of([(1, 2, 0.0)]))
    # Dropping across the border averages nothing.
    check_mergeable(checkpoint, drop_plan(5, 4))
    check_mergeable(checkpoint, before_last_plan(5, 4))


def test_plans_of_other_models_are_refused():
    checkpoint = SimpleNamespace(n_layers=5, windows=[None] * 5)
    with pytest.raises(PlanError, match="the plan is for 6 layers, the model has 5"):
        check_mergeable(checkpoint, drop_plan(6, 2))
    check_mergeable(checkpoint, drop_plan(5, 2))
