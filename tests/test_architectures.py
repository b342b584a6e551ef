"""architectures.py: families as data, attention windows and trimmed configs, against transformers' own modules."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig

from raymerge.architectures import (
    ARCHITECTURES,
    FIXED_ROPE_TYPES,
    ArchitectureError,
    architecture_of,
    attention_windows,
    permute_layer,
    permute_tensor,
    source_tensor,
    trimmed_config,
)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_of_a_family_is_accounted_for(family):
    """What the data names, with biases, is exactly what transformers' model has: a new tensor would be noticed."""
    config = tiny.config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = architecture_of(config)
    there = set(model.state_dict())
    norms = (*arch.norm_inputs, *arch.head_norms)
    layer = {f"{name}.weight" for name in (*arch.matrices, *norms)}
    biases = {f"{name}.bias" for name in arch.matrices}
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        found = {name.removeprefix(prefix) for name in there if name.startswith(prefix)}
        assert found - biases == layer
        assert arch.layer_name(number, "mlp.up_proj.weight") == f"{prefix}mlp.up_proj.weight"
    outside = {name for name in there if not name.startswith("model.layers.")}
    assert outside == {arch.embedding, arch.final_norm, arch.unembedding}


def test_matrices_that_read_a_norm_have_its_width():
    config = tiny.config_of("qwen3")
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    arch = architecture_of(config)
    readers = [matrix for matrices in arch.norm_inputs.values() for matrix in matrices]
    for norm, matrices in arch.norm_inputs.items():
        for matrix in matrices:
            assert layer.get_submodule(matrix).weight.shape[1] == layer.get_submodule(norm).weight.shape[0]
    assert set(arch.matrices) - set(readers) == {"self_attn.o_proj", "mlp.down_proj"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_windows_are_those_of_transformers(family):
    """Read off the model: with window w, the gradient of position t reaches back to t - w + 1 in one layer."""
    length = 64
    config = tiny.config_of(family)
    for number, window in enumerate(attention_windows(config)):
        single = copy.deepcopy(config)
        single.num_hidden_layers = 1
        if getattr(single, "layer_types", None):
            single.layer_types = [config.layer_types[number]]
        model = tiny.random_model(single)
        embedded = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, -1].sum().backward()
        reached = int((embedded.grad[0].abs().sum(-1) > 0).sum())
        assert reached == min(length, window or length)


def test_windows_by_layer():
    assert attention_windows(tiny.config_of("llama")) == [None] * 5
    assert attention_windows(tiny.config_of("qwen2")) == [None] * 5
    assert attention_windows(tiny.config_of("mistral")) == [None] * 5
    assert attention_windows(tiny.config_of("mistral", sliding_window=7)) == [7] * 5
    assert attention_windows(tiny.config_of("qwen2_windows")) == [None, None, 40, 40, 40]
    # Qwen2's configs carry a window that `use_sliding_window: false` turns off.
    off = tiny.config_of("qwen2", use_sliding_window=False, sliding_window=7, max_window_layers=2)
    assert attention_windows(off) == [None] * 5


def test_unknown_layer_types_are_refused():
    config = SimpleNamespace(layer_types=["full_attention", "linear_attention"], num_hidden_layers=2)
    with pytest.raises(
        ArchitectureError, match=r"\['linear_attention'\] are not supported; supported are full_attention"
    ):
        attention_windows(config)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "mixtral", None])
def test_unsupported_families_are_named_with_the_supported_ones(model_type):
    with pytest.raises(ArchitectureError, match=f"model type {model_type!r} is not .* llama, mistral, qwen2, qwen3"):
        architecture_of(SimpleNamespace(model_type=model_type))
    with pytest.raises(ArchitectureError, match="model type None"):
        architecture_of(object())


def test_rotary_embeddings_that_depend_on_length_are_refused():
    for rope_type in ("dynamic", "longrope"):
        config = SimpleNamespace(model_type="llama", rope_parameters={"rope_type": rope_type})
        with pytest.raises(ArchitectureError, match=f"rotary embedding type '{rope_type}' depends on .*length"):
            architecture_of(config)
    for rope_type in FIXED_ROPE_TYPES:
        config = SimpleNamespace(model_type="llama", rope_parameters={"rope_type": rope_type})
        assert architecture_of(config) is ARCHITECTURES["llama"]
    assert architecture_of(SimpleNamespace(model_type="qwen3", rope_parameters=None)) is ARCHITECTURES["qwen3"]


def test_old_configs_name_their_rotary_type_too():
    """Written by transformers 4: rope_scaling instead of rope_parameters, "type" instead of "rope_type"."""
    for scaling in ({"rope_type": "dynamic", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}):
        with pytest.raises(ArchitectureError, match="'dynamic'"):
            architecture_of(LlamaConfig.from_dict({"model_type": "llama", "rope_scaling": scaling}))


def test_trimmed_config_keeps_the_entries_of_the_kept_layers():
    values = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "no_rope_layers": (1, 0, 1, 0),
        "mlp_layer_types": ["x", "y", "z", "w"],
        "eos_token_id": [1, 2, 3, 4],  # as long as the layers are many, but no per-layer list
        "some_layers": [1, 2],  # names layers, but is not one entry a layer
        "max_window_layers": 4,
        "layer_norm_eps": 1e-5,
        "hidden_size": 8,
    }
    before = copy.deepcopy(values)
    assert trimmed_config(values, [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "d"],
        "no_rope_layers": [1, 0],
        "mlp_layer_types": ["x", "w"],
        "eos_token_id": [1, 2, 3, 4],
        "some_layers": [1, 2],
        "max_window_layers": 4,
        "layer_norm_eps": 1e-5,
        "hidden_size": 8,
    }
    assert values == before


def test_a_trimmed_config_has_the_windows_of_the_kept_layers():
    config = tiny.config_of("qwen2_windows")
    trimmed = type(config).from_dict(trimmed_config(config.to_dict(), [0, 1, 4]))
    assert attention_windows(trimmed) == [None, None, 40]


# -- what may be reordered -------------------------------------------------------------------------------------------


def one_layer(family):
    """(config, architecture, function of a layer's tensors, the tensors), all in float64."""
    config = tiny.config_of(family, num_hidden_layers=1)
    model = tiny.random_model(config, dtype=torch.float64)
    layer = model.model.layers[0]
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions = torch.arange(70)[None]
    window = attention_windows(config)[0]
    behind = torch.arange(70)[:, None] - torch.arange(70)
    mask = ((behind >= 0) & (behind < (window or 70)))[None, None]
    rotary = model.model.rotary_emb(x, positions)

    def run(tensors):
        with torch.no_grad():
            return functional_call(
                layer, tensors, (x,), {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
            )

    return config, architecture_of(config), run, dict(layer.state_dict())


def random_permutations(config, seed=0):
    rng = np.random.default_rng(seed)
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "units": rng.permutation(config.intermediate_size),
        "kv_heads": rng.permutation(kv),
        "query_heads": np.stack([rng.permutation(heads // kv) for _ in range(kv)]),
        "value_channels": np.stack([rng.permutation(channels) for _ in range(kv)]),
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_permuted_layer_computes_the_same(family):
    """Every group of every family, alone and all at once, grouped queries and biases included."""
    config, arch, run, tensors = one_layer(family)
    expected = run(tensors)
    every = random_permutations(config)
    assert set(every) == set(arch.unit_groups)
    for permutations in (every, *({name: order} for name, order in every.items())):
        permuted = permute_layer(arch, tensors, permutations)
        assert (run(permuted) - expected).abs().max() < 1e-10 * expected.abs().max()
        moves = any((order != np.arange(order.shape[-1])).any() for order in permutations.values())
        assert moves == any(not torch.equal(permuted[name], tensors[name]) for name in tensors)


def test_what_is_no_group_does_not_compute_the_same():
    """Half of a permutation, and the dimensions of query and key heads together: the checks above can fail."""
    config, arch, run, tensors = one_layer("qwen2")
    expected, every = run(tensors), random_permutations(config)
    for name in ("self_attn.q_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight", "mlp.up_proj.weight"):
        half = tensors | {name: permute_tensor(arch, name, tensors[name], every)}
        assert (run(half) - expected).abs().max() > 1e-2
    rotary = dict(tensors)
    order = np.random.default_rng(3).permutation(8)
    for which, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            name = f"self_attn.{which}_proj.{kind}"
            rotary[name] = tensors[name].unflatten(0, (heads, 8))[:, order].flatten(0, 1)
    assert (run(rotary) - expected).abs().max() > 1e-2


def test_permutations_of_another_size_are_refused():
    config, arch, _, tensors = one_layer("llama")
    wrong = random_permutations(config) | {"value_channels": np.tile(np.arange(5), (2, 1))}
    with pytest.raises(ArchitectureError, match="self_attn.v_proj.weight has 16 slices, but the permutations are for"):
        permute_layer(arch, tensors, wrong)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folded_gains_compute_the_same(family):
    _, arch, run, tensors = one_layer(family)
    folded = {name: source_tensor(arch, tensors, name, norms="fold") for name in tensors}
    expected = run({name: tensor.float().double() for name, tensor in tensors.items()})
    found = run({name: tensor.double() for name, tensor in folded.items()})
    # Products of float32 weights and gains, rounded to float32 once.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    for norm in arch.norm_inputs:
        assert (folded[f"{norm}.weight"] == 1).all() and not (tensors[f"{norm}.weight"] == 1).any()
    for name in tensors:
        if "o_proj" in name or "down_proj" in name or "_norm" in name or name.endswith("bias"):
            assert torch.equal(folded[name], tensors[name].float())
        assert torch.equal(source_tensor(arch, tensors, name), tensors[name].float())
