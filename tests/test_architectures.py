"""architectures.py: every family's data, and layers reordered and folded, against transformers' own modules."""

import numpy as np
import pytest
import tiny
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from raymerge.architectures import ArchitectureError, permute_tensor, source_tensor
from raymerge.families import architecture_of
from raymerge.positions import NO_ROTARY, attention_windows, rotary_types

BOTH = ("weight", "bias")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_of_a_family_is_accounted_for(family):
    """What the data names, with biases, is exactly what transformers' model has: a new tensor would be noticed. Of an
    OLMo it names norms that have no tensors."""
    config = tiny.config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = architecture_of(config)
    there = set(tiny.of_layers(tiny.stored_layer, config.model_type, model.state_dict()))
    norms = (*arch.norm_inputs, *arch.head_norms, *arch.projection_norms, *arch.output_norms.values())
    kinds = () if config.model_type == "olmo" else BOTH[:1]
    kinds = BOTH if config.model_type in ("nemotron", "starcoder2", "stablelm", "phi", "gpt_neox") else kinds
    layer = {f"{name}.weight" for name in arch.matrices} | {f"{name}.{kind}" for name in norms for kind in kinds}
    scalars = ("alpha_p", "alpha_n", "beta", "eps") if family == "apertus" else ()
    layer |= {f"mlp.act_fn.{name}" for name in scalars}
    biases = {f"{name}.bias" for name in arch.matrices}
    for number in range(config.num_hidden_layers):
        prefix = f"{tiny.root_of(config.model_type)}{number}."
        found = {name.removeprefix(prefix) for name in there if name.startswith(prefix)}
        assert found - biases == layer
        assert arch.layer_name(number, "self_attn.q_proj.weight") == f"{prefix}self_attn.q_proj.weight"
        assert all(arch.has_tensor(f"{prefix}{name}") for name in layer)
    outside = {name for name in there if not name.startswith(tiny.root_of(config.model_type))}
    norm, bias = {
        "phi": ("model.final_layernorm", ["lm_head.bias"]),
        "gpt_neox": ("gpt_neox.final_layer_norm", []),
    }.get(config.model_type, ("model.norm", []))
    unembedding = "embed_out" if config.model_type == "gpt_neox" else "lm_head"
    ends = {f"{unembedding}.weight", *(f"{norm}.{kind}" for kind in kinds), *bias}
    assert outside == {arch.embedding, *ends} and arch.unembedding == f"{unembedding}.weight"
    assert arch.ends == (f"{norm}.weight", f"{norm}.bias", f"{unembedding}.bias")
    assert all(map(arch.has_tensor, outside))
    loaded = {name for name in model.state_dict() if not name.startswith(tiny.root_of(config.model_type))}
    assert {arch.stored_name(name) for name in loaded} == outside
    assert all(arch.stored_name(arch.loaded_name(name)) == name for name in there)


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


# -- what may be reordered -------------------------------------------------------------------------------------------


def one_layer(family):
    """(config, architecture, function of a layer's tensors, the tensors), all in float64."""
    config = tiny.config_of(family, num_hidden_layers=1)
    model = tiny.random_model(config, dtype=torch.float64)
    layer = model.base_model.layers[0]
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions = torch.arange(70)[None]
    window = attention_windows(config)[0]
    behind = torch.arange(70)[:, None] - torch.arange(70)
    mask = ((behind >= 0) & (behind < (window or 70)))[None, None]
    kind = [kind for kind in rotary_types(config) if kind not in (None, NO_ROTARY)]
    rotary = model.base_model.rotary_emb and model.base_model.rotary_emb(x, positions, *kind)

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
    heads = config.num_attention_heads
    kv = heads if config.model_type == "gpt_neox" else config.num_key_value_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    widths = ("moe_intermediate_size", "shared_intermediate_size", "intermediate_size")
    units = next(getattr(config, width) for width in widths if hasattr(config, width))
    experts = getattr(config, "num_experts", 0)
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    return {
        **({"experts": rng.permutation(experts)} if experts else {}),
        "units": np.stack([rng.permutation(units) for _ in range(experts)]) if experts else rng.permutation(units),
        **({"shared_units": rng.permutation(shared)} if shared else {}),
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
    """Nor does a part of an expert alone, or of that which every token goes through."""
    config, arch, run, tensors = one_layer("qwen2_moe")
    expected, every = run(tensors), random_permutations(config)
    moved = tiny.permute_layer(arch, tensors, every)
    shared = (f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down"))
    for part in ("mlp.gate.weight", "mlp.experts.0.up_proj.weight", *shared):
        assert (run(moved | {part: tensors[part]}) - expected).abs().max() > 1e-2


def test_what_scales_a_shared_expert_counts():
    """Its one row is read, behind the norm before the MLP, and no reordering moves it."""
    config, arch, run, tensors = one_layer("qwen2_moe")
    name = "mlp.shared_expert_gate.weight"
    assert arch.routers == ("mlp.gate", "mlp.shared_expert_gate") and arch.router == "mlp.gate"
    assert arch.norm_before("mlp.shared_expert_gate") == "post_attention_layernorm"
    assert (run(tensors | {name: -tensors[name]}) - run(tensors)).abs().max() > 1e-2
    assert permute_tensor(arch, name, tensors[name], random_permutations(config)) is tensors[name]


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in tiny.UNFOLDABLE])
def test_folded_gains_compute_the_same(family):
    config, arch, run, tensors = one_layer(family)
    folded = {name: source_tensor(arch, tensors, name, norms="fold") for name in tensors}
    expected = run({name: tensor.float().double() for name, tensor in tensors.items()})
    found = run({name: tensor.double() for name, tensor in folded.items()})
    # Products of float32 weights and gains, rounded to float32 once.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    plain = {"weight": 0 if tiny.offset_gains(config.model_type) else 1, "bias": 0}
    norms = {name for name in tensors if name.rpartition(".")[0] in arch.norm_inputs}
    for name in norms:
        value = plain[name.rpartition(".")[2]]
        assert (folded[name] == value).all() and not (tensors[name] == value).any()
    readers = {matrix for matrices in arch.norm_inputs.values() for matrix in matrices}
    changed = {f"{matrix}.{kind}" for matrix in readers for kind in BOTH if any(n.endswith(kind) for n in norms)}
    assert len(tensors.keys() - changed - norms) >= 2
    for name in tensors:
        assert torch.equal(folded[name], tensors[name].float()) == (name not in changed | norms)
        assert torch.equal(source_tensor(arch, tensors, name), tensors[name].float())


def test_rows_of_a_fused_matrix_are_those_of_its_projections():
    """Four query heads and two of keys and values, of 8 or 12 dimensions; an MLP of as many units as down reads."""
    phi3, glm4 = (architecture_of(tiny.config_of(family)) for family in ("phi3", "glm4"))
    units = tiny.config_of("phi3").intermediate_size
    qkv = "self_attn.qkv_proj"
    assert [phi3.holder_of(name) for name in ("q", "k", "v", "o")] == [qkv, qkv, qkv, "self_attn.o_proj"]
    halves = [[*range(units)], [*range(units, 2 * units)]]
    thirds = [[*range(32)], [*range(32, 48)], [*range(48, 64)]]
    found = {matrix: [rows.tolist() for rows in parts] for matrix, parts in phi3.fused_rows.items()}
    assert found == {qkv: thirds, "mlp.gate_up_proj": halves}
    assert [rows.tolist() for rows in glm4.fused_rows.pop("mlp.gate_up_proj")] == halves
    assert glm4.fused_rows.keys() == {"mlp.gate_up_proj"} and glm4.holder_of("k") == "self_attn.k_proj"
    for arch, name, rows in ((phi3, "v", slice(48, 64)), (phi3, "o", slice(0, 64)), (glm4, "k", slice(0, 64))):
        part = arch.part_of(name, torch.arange(64.0)[:, None])
        assert torch.equal(part, torch.arange(64.0)[rows, None])


def test_rows_of_a_matrix_with_one_head_after_another():
    """Four heads of 8 dimensions: three times 8 rows of each, as transformers' module cuts them."""
    neox = architecture_of(tiny.config_of("gpt_neox"))
    cut = torch.arange(96).view(4, 24).chunk(3, dim=-1)
    (parts,) = neox.fused_rows.values()
    assert [rows.tolist() for rows in parts] == [part.flatten().tolist() for part in cut]
    tensor = torch.randn(96, 5, requires_grad=True)
    assert torch.equal(neox.part_of("k", tensor), tensor[parts[1]])
    assert torch.equal(torch.func.vmap(lambda x: neox.part_of("v", x))(tensor[None])[0], tensor[parts[2]])


def test_what_stands_alone_is_told_from_what_is_one_of_several():
    phi3, olmoe, qwen3 = (architecture_of(tiny.config_of(family)) for family in ("phi3", "olmoe", "qwen3"))
    assert (phi3.matrix_of("down"), phi3.matrix_of("up"), phi3.matrix_of("router")) == ("mlp.down_proj", None, None)
    assert (olmoe.matrix_of("router"), olmoe.matrix_of("down")) == ("mlp.gate", None)
    assert olmoe.holder_of("up", 0) == "mlp.experts.0.up_proj"
    qwen2 = architecture_of(tiny.config_of("qwen2_moe"))  # whose shared expert is not all of the MLP
    assert (qwen2.matrix_of("down"), qwen2.matrix_of("shared_down")) == (None, "mlp.shared_expert.down_proj")
    assert qwen2.norm_before_mlp == "post_attention_layernorm" and olmoe.routers == ("mlp.gate",) and not phi3.routers
    norms = [f"self_attn.{which}_norm" for which in "qk"]
    for arch, of_heads, of_projections in ((qwen3, norms, [None] * 2), (olmoe, [None] * 2, norms)):
        assert [arch.head_norm_of(which) for which in "qk"] == of_heads
        assert [arch.projection_norm_of(which) for which in "qk"] == of_projections


def test_names_that_a_family_may_have_are_no_others():
    arch = architecture_of(tiny.config_of("qwen3"))
    there = ("model.norm.weight", "lm_head.weight", "model.layers.3.self_attn.q_norm.weight",
             "model.layers.0.mlp.up_proj.bias", "model.layers.1.input_layernorm.bias", "model.norm.bias")  # fmt: skip
    others = ("score.weight", "lm_head.scale", "model.layers.3.self_attn.q_norm.scale", "model.layers.0.mlp.bias",
              "model.layers.0.mlp.up_proj.scale")  # fmt: skip
    assert all(map(arch.has_tensor, there)) and not any(map(arch.has_tensor, others))


def test_orders_for_another_number_of_heads_or_slices_are_refused():
    config, arch, *_ = one_layer("llama")
    every = random_permutations(config)
    with pytest.raises(ArchitectureError, match="self_attn.v_proj.weight has 17 slices, but .* gives it 16"):
        permute_tensor(arch, "self_attn.v_proj.weight", torch.zeros(17, 32), every)
    wrong = every | {"value_channels": np.tile(np.arange(8), (3, 1))}
    with pytest.raises(ArchitectureError, match=r"the permutation of value_channels is for \[3, 8\]"):
        permute_tensor(arch, "self_attn.v_proj.weight", torch.zeros(16, 32), wrong)


def test_each_expert_s_units_have_their_own_order():
    """A layer computes the same whatever these are, but what it is averaged with depends on them."""
    config, arch, _, _ = one_layer("qwen3_moe")
    experts, units = config.num_experts, config.moe_intermediate_size
    orders = np.array([np.roll(np.arange(units), shift) for shift in range(experts)])
    tensor = torch.arange(units * 3.0).reshape(units, 3)
    for number in range(experts):
        moved = permute_tensor(arch, f"mlp.experts.{number}.up_proj.weight", tensor, {"units": orders})
        assert torch.equal(moved, torch.roll(tensor, number, 0))
        moved = permute_tensor(arch, f"mlp.experts.{number}.down_proj.weight", tensor.T, {"units": orders})
        assert torch.equal(moved, torch.roll(tensor.T, number, 1))
