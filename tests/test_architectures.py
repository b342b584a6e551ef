"""architectures.py: families as data, attention windows and trimmed configs, against transformers' own modules."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raymerge.architectures import (
    ARCHITECTURES,
    FIXED_ROPE_TYPES,
    ArchitectureError,
    architecture_of,
    attention_windows,
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
