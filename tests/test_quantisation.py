"""quantisation.py: rounding by closed form, and the same quantised model by the runner, the scorer and transformers."""

import sys

import numpy as np
import pytest
import tiny
import torch

from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.families import architecture_of
from raymerge.inputs import SEARCH
from raymerge.plan import base_plan, tail_plan
from raymerge.quantisation import QuantisationError, quantise_layer, quantised_bytes
from raymerge.rows import cost_row
from raymerge.worker import ModelWorker

CONFIG = tiny.config_of("llama", hidden_size=64, intermediate_size=96)
ARCHITECTURE = architecture_of(CONFIG)


def layer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 64, generator=generator)
    return {"mlp.gate_proj.weight": weight, "mlp.gate_proj.bias": weight[:, 0], "input_layernorm.weight": weight[0]}


def rounded(weight, levels, group):
    """Symmetric rounding with one scale a group of columns, by its definition."""
    groups = weight.reshape(len(weight), -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / ((levels - 1) / 2)
    return ((groups / scale).round().clamp(-levels / 2, levels / 2 - 1) * scale).reshape(weight.shape)


@pytest.mark.parametrize("scheme, levels, group", [("int8", 256, 64), ("int4", 16, 32)])
def test_matrices_are_rounded_to_the_scheme_s_levels_and_nothing_else_is(scheme, levels, group):
    before = layer()
    after = quantise_layer(ARCHITECTURE, before, scheme)
    error = (after["mlp.gate_proj.weight"] - before["mlp.gate_proj.weight"]).abs()
    scale = before["mlp.gate_proj.weight"].reshape(48, -1, group).abs().amax(-1) / ((levels - 1) / 2)
    steps = (error.reshape(48, -1, group) / scale[..., None]).max()
    assert 0.4 < steps <= 0.5 + 1e-3, "at most half a step away, and some value nearly so"
    assert len(after["mlp.gate_proj.weight"][0, :group].unique()) <= levels
    expected = rounded(before["mlp.gate_proj.weight"], levels, group)
    assert (after["mlp.gate_proj.weight"] - expected).abs().max() <= 1.001 * scale.max()
    for name in ("mlp.gate_proj.bias", "input_layernorm.weight"):
        assert after[name] is before[name]
    assert quantise_layer(ARCHITECTURE, before, "none") == before


def test_experts_are_rounded_and_their_router_is_not():
    """Nor is what scales the expert that every token goes through, which is rounded like the others."""
    architecture, weight = architecture_of(tiny.config_of("qwen2_moe")), layer()["mlp.gate_proj.weight"]
    routers, experts = ("mlp.gate", "mlp.shared_expert_gate"), ("mlp.experts.0.up_proj", "mlp.shared_expert.up_proj")
    before = {f"{name}.weight": weight for name in routers + experts}
    after = quantise_layer(architecture, before, "int8")
    assert all(after[f"{name}.weight"] is weight for name in routers)
    for name in experts:
        assert (after[f"{name}.weight"] - rounded(weight, 256, 64)).abs().max() < 1e-1 * weight.abs().max()
        assert not torch.equal(after[f"{name}.weight"], weight)


def test_what_cannot_be_quantised_is_refused(monkeypatch):
    for columns in (40, 48):
        odd = {"mlp.gate_proj.weight": torch.randn(4, columns)}
        refused = f"mlp.gate_proj.weight has {columns} columns, but int4 needs a multiple of 32"
        with pytest.raises(QuantisationError, match=refused):
            quantise_layer(ARCHITECTURE, odd, "int4")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(QuantisationError, match=r"needs torchao: pip install 'raymerge\[quant\]'"):
        quantise_layer(ARCHITECTURE, odd, "int8")


def test_bytes_of_routers_are_as_they_are_stored(tmp_path):
    """Of 5 layers with 4 experts (24 units), a shared one (40) and heads of 32 and 16 rows: a byte less 3 of float32 an
    entry, and a scale of 2 bytes a row, but not of the router's 4 rows and of the one that scales the shared expert."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "qwen2_moe")))
    plain, int8 = (cost_row(base_plan(5), "x", checkpoint, scheme)["bytes"] for scheme in ("none", "int8"))
    rows = 32 + 16 + 16 + 32 + 4 * (24 + 24 + 32) + 40 + 40 + 32
    entries = 32 * (32 + 16 + 16 + 32) + 4 * 3 * 24 * 32 + 3 * 40 * 32
    assert plain - int8 == 5 * (3 * entries - 2 * rows)


def test_bytes_count_weights_and_scales(monkeypatch):
    assert quantised_bytes(10, 64, "int8") == 640 + 20
    assert quantised_bytes(10, 64, "int4") == 320 + 40
    checkpoint = Checkpoint("demo")
    plan = base_plan(checkpoint.n_layers)
    monkeypatch.delattr(Checkpoint, "__getitem__")  # shapes are in the files' headers: nothing is read
    sizes = [cost_row(plan, "x", checkpoint, scheme)["bytes"] for scheme in ("none", "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[0] / 4


def test_trunk_scorer_and_whole_model_answer_as_one_quantised_model(tmp_path):
    """Merged first, rounded after: the scorer's one layer, the runner's and transformers' model of the same weights."""
    options = ["model.quantise=int8", "data.subjects=colour_mixing", "data.limit_per_subject=3"]
    config = load_config(None, options)
    n_layers = Checkpoint("demo").n_layers
    template = tail_plan(n_layers, [0.5] * 3, name="candidate", kind="found")
    common = {"roles": (SEARCH,), "cache": tmp_path, "template": template}
    worker, whole = ModelWorker(config, firsts=[template.resumes_at], **common), ModelWorker(config, **common)
    plan = tail_plan(n_layers, [0.3, 0.9, 0.6], name="x", kind="found")
    found, expected = (each.answers((plan, SEARCH, None, False)).logits for each in (worker, whole))
    np.testing.assert_allclose(found, expected, atol=2e-4)

    runner = whole.runner
    state = {name: tensor.float() for name, tensor in worker.checkpoint.items()}
    arch = worker.checkpoint.architecture
    for position, (_, load) in enumerate(runner.plan_layers(plan)):
        state.update({arch.layer_name(position, name): tensor for name, tensor in load().items()})
    config_values = worker.checkpoint.config.to_dict() | {"num_hidden_layers": len(plan.kept)}
    model = type(tiny.random_model(CONFIG))(type(worker.checkpoint.config).from_dict(config_values)).float().eval()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    groups = [group for shard in worker.prompts.of(SEARCH).shards for group in shard.groups]
    rows = [row for group in groups for row in group.rows]
    prompts = [np.concatenate([group.prefix, ids]) for group in groups for ids in group.sequences]
    logits, _, _ = tiny.plain_answers(model, prompts, worker.prompts.of(SEARCH).letters)
    np.testing.assert_allclose(found[rows], logits, atol=1e-3)
    plain = ModelWorker(load_config(None, options[1:]), firsts=[template.resumes_at], **common)
    assert np.abs(plain.answers((plan, SEARCH, None, False)).logits - found).max() > 1e-2
