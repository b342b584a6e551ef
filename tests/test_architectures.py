"""architectures.py: families as data, attention windows and trimmed configs, against transformers' own modules."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import raymerge.architectures
from raymerge.architectures import (
    FIXED_ROPE_TYPES,
    NO_ROTARY,
    ArchitectureError,
    architecture_of,
    attention_windows,
    permute_tensor,
    rotary_types,
    source_tensor,
)
from raymerge.saved_config import trimmed_config


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_of_a_family_is_accounted_for(family):
    """What the data names, with biases, is exactly what transformers' model has: a new tensor would be noticed."""
    config = tiny.config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = architecture_of(config)
    there = set(tiny.of_layers(tiny.stored_layer, config.model_type, model.state_dict()))
    norms = (*arch.norm_inputs, *arch.head_norms, *arch.projection_norms, *arch.output_norms.values())
    layer = {f"{name}.weight" for name in (*arch.matrices, *norms)}
    biases = {f"{name}.bias" for name in arch.matrices}
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        found = {name.removeprefix(prefix) for name in there if name.startswith(prefix)}
        assert found - biases == layer
        assert arch.layer_name(number, "self_attn.o_proj.weight") == f"{prefix}self_attn.o_proj.weight"
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


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_windows_are_those_of_transformers(family, window):
    """Read off the model: with window w, the gradient of position t reaches back to t - w + 1 in one layer. A config
    may have a window that the family's masks do not."""
    length = 64
    config = tiny.config_of(family)
    if window is not None:
        config.sliding_window = window
        if not getattr(config, "layer_types", None):  # a list that the family does not read
            config.layer_types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
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


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", "its layers' tensors are not described"),
        ("mamba", "it has layers that are no attention"),
        ("jamba", "it has layers that are no attention"),
        ("qwen3_next", "it has layers that are no attention"),
        ("granitemoehybrid", "it has a shared MLP of other tensors"),
        ("gemma3", "it has towers for images or sound beside the language model"),
        ("qwen2_5_vl", "it has towers for images"),
        ("deepseek_v3", "it has attention over compressed keys and values"),
        ("qwen2_moe", "it has experts whose tensors or routing are not those of mixtral, olmoe and qwen3_moe"),
        ("t5", "it has an encoder"),
    ],
)
def test_unsupported_families_are_named_with_what_they_have_and_the_supported_ones(model_type, reason):
    with pytest.raises(ArchitectureError, match=f"'{model_type}' is not supported: {reason}.* gemma2, .*, smollm3$"):
        architecture_of(AutoConfig.for_model(model_type))
    with pytest.raises(ArchitectureError, match="model type None"):
        architecture_of(object())


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "olmoe with clip_qkv = 8.0 is not supported; supported is None"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] is not supported; supported is None or \[\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported; supported is 1"),
        ("gemma3", {"use_bidirectional_attention": True}, "supported is None or False"),
    ],
)
def test_unsupported_options_of_families_are_named(family, options, message):
    with pytest.raises(ArchitectureError, match=message):
        architecture_of(tiny.config_of(family, **options))


def test_a_family_that_the_installed_transformers_computes_otherwise_is_refused(monkeypatch):
    """Before 5.13 OLMo 3's sliding layers had the full ones' scaled rotary embedding (transformers#45945)."""
    config = AutoConfig.for_model("olmo3")
    for installed in ("5.12.1", "4.57.6"):
        monkeypatch.setattr(raymerge.architectures, "version", lambda package, installed=installed: installed)
        with pytest.raises(ArchitectureError, match=f"'olmo3' needs transformers 5.13 or later, and {installed} is"):
            architecture_of(config)
        assert architecture_of(tiny.config_of("olmo2")).name == "olmo2"
    for installed in ("5.13.0.dev0", "6.0"):
        monkeypatch.setattr(raymerge.architectures, "version", lambda package, installed=installed: installed)
        assert architecture_of(config).name == "olmo3"


def test_rotary_embeddings_that_depend_on_length_are_refused():
    config = tiny.config_of("llama")
    for rope_type in ("dynamic", "longrope"):
        config.rope_parameters = {"rope_type": rope_type}
        with pytest.raises(ArchitectureError, match=f"rotary embedding type '{rope_type}' depends on .*length"):
            architecture_of(config)
    for parameters in (None, *({"rope_type": rope_type} for rope_type in FIXED_ROPE_TYPES)):
        config.rope_parameters = parameters
        assert architecture_of(config).name == "llama"
    config = tiny.config_of("gemma3")
    config.rope_parameters["full_attention"] = {"rope_type": "longrope"}
    with pytest.raises(ArchitectureError, match="'longrope'"):
        architecture_of(config)


def test_rotary_types_by_layer():
    assert rotary_types(tiny.config_of("gemma2")) == [None] * 5
    full, sliding = "full_attention", "sliding_attention"
    assert rotary_types(tiny.config_of("gemma3")) == [sliding, full, sliding, sliding, sliding]
    assert rotary_types(tiny.config_of("olmo3")) == [sliding, full, sliding, sliding, sliding]
    config = tiny.config_of("smollm3")
    assert rotary_types(config) == [NO_ROTARY, None, NO_ROTARY, NO_ROTARY, NO_ROTARY]
    config.no_rope_layers = [1, 0, 1]
    with pytest.raises(ArchitectureError, match="no_rope_layers has 3 entries for 5 layers: it needs one for each"):
        rotary_types(config)


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
        "max_window_layers": 3,
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
        "max_window_layers": 1,
        "layer_norm_eps": 1e-5,
        "hidden_size": 8,
    }
    assert values == before


def test_a_trimmed_config_has_the_windows_of_the_kept_layers():
    config = tiny.config_of("qwen2_windows")
    trimmed = type(config).from_dict(trimmed_config(config.to_dict(), [0, 1, 4]))
    assert attention_windows(trimmed) == [None, None, 40]
    assert trimmed.max_window_layers == 2 and trimmed.layer_types.count("full_attention") == 2


def test_a_sliding_window_pattern_stays_only_where_the_kept_layers_follow_it():
    """Gemma 3's published configs hold it instead of layer types; a reader of either finds the kept layers."""
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=7, sliding_window=9, sliding_window_pattern=3)
    assert attention_windows(config) == [9, 9, None, 9, 9, None, 9]
    for kept, follows in (([0, 1, 2, 3], True), ([0, 1, 3, 4, 5], False), ([3, 4, 5, 6], True), ([2, 3], False)):
        values = trimmed_config(config.to_dict(), kept)
        assert ("sliding_window_pattern" in values) == follows
        trimmed = type(config).from_dict(values)
        assert attention_windows(trimmed) == [attention_windows(config)[layer] for layer in kept]
        bare = {key: value for key, value in values.items() if key != "layer_types"}
        if follows:
            assert type(config).from_dict(bare).layer_types == trimmed.layer_types


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
    kind = [kind for kind in rotary_types(config) if kind not in (None, NO_ROTARY)]
    rotary = model.model.rotary_emb(x, positions, *kind)

    def run(tensors):
        with torch.no_grad():
            loaded = tiny.loaded_layer(config.model_type, tensors)
            return functional_call(
                layer, loaded, (x,), {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
            )

    return config, architecture_of(config), run, tiny.stored_layer(config.model_type, layer.state_dict())


def rounding(arch):
    """Of what a reordered layer computes in float64: norms and routers that see reordered sums work in float32."""
    return 1e-6 if arch.output_norms or arch.projection_norms or arch.experts else 1e-10


def random_permutations(config, seed=0):
    rng = np.random.default_rng(seed)
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    units = getattr(config, "moe_intermediate_size", config.intermediate_size)
    experts = getattr(config, "num_experts", 0)
    return {
        **({"experts": rng.permutation(experts)} if experts else {}),
        "units": np.stack([rng.permutation(units) for _ in range(experts)]) if experts else rng.permutation(units),
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
    limit = rounding(arch)
    for permutations in (every, *({name: order} for name, order in every.items())):
        permuted = tiny.permute_layer(arch, tensors, permutations)
        assert (run(permuted) - expected).abs().max() < limit * expected.abs().max()
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
    message = r"self_attn.v_proj.weight has .* of \[2, 8\], but the permutation of value_channels is for \[2, 5\]"
    with pytest.raises(ArchitectureError, match=message):
        tiny.permute_layer(arch, tensors, wrong)
    with pytest.raises(ArchitectureError, match="self_attn.v_proj.weight has 15 slices, but .* gives it 16"):
        permute_tensor(arch, "self_attn.v_proj.weight", torch.zeros(15, 32), random_permutations(config))


def test_a_router_without_its_experts_does_not_compute_the_same():
    config, arch, run, tensors = one_layer("qwen3_moe")
    expected, every = run(tensors), random_permutations(config)
    moved = tiny.permute_layer(arch, tensors, every)
    for part in ("mlp.gate.weight", "mlp.experts.0.up_proj.weight"):
        assert (run(moved | {part: tensors[part]}) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folded_gains_compute_the_same(family):
    config, arch, run, tensors = one_layer(family)
    folded = {name: source_tensor(arch, tensors, name, norms="fold") for name in tensors}
    expected = run({name: tensor.float().double() for name, tensor in tensors.items()})
    found = run({name: tensor.double() for name, tensor in folded.items()})
    # Products of float32 weights and gains, rounded to float32 once.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    offset = 1 if config.model_type.startswith("gemma") else 0
    for norm in arch.norm_inputs:
        assert (folded[f"{norm}.weight"] == 1 - offset).all() and not (tensors[f"{norm}.weight"] == 1 - offset).any()
    readers = {f"{matrix}.weight" for matrices in arch.norm_inputs.values() for matrix in matrices}
    kept = [name for name in tensors if name not in readers and name.removesuffix(".weight") not in arch.norm_inputs]
    assert len(kept) >= 2
    for name in tensors:
        assert torch.equal(folded[name], tensors[name].float()) == (name in kept)
        assert torch.equal(source_tensor(arch, tensors, name), tensors[name].float())
