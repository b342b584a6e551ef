"""fusion.py: the fused state dict against merging step by step as published, and receipts."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from transformers import AutoModelForCausalLM

from raymerge import fusion
from raymerge.alignment import Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.families import architecture_of
from raymerge.fusion import Receipt, check_mergeable, fused_layer, fused_tensors, receipts
from raymerge.plan import MergePlan, MergeStep, PlanError, Refit, base_plan, before_last_plan, drop_plan, tail_plan
from raymerge.positions import NO_ROTARY

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
    fused = tiny.fuse_state_dict(state, architecture_of(model.config), plan)
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
    fused = tiny.fuse_state_dict(state, architecture_of(biased.config), plan)
    changed = {name for name in fused if not torch.equal(fused[name], state[name])}
    averaged = {f"model.layers.2.self_attn.{p}_proj.weight" for p in "qkvo"}
    averaged |= {f"model.layers.2.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert changed == averaged
    merged_too = tiny.fuse_state_dict(
        state, architecture_of(biased.config), plan_of(tiny.steps_of(plan), biases="merge")
    )
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
    fused = tiny.fuse_state_dict(state, architecture_of(model.config), plan)
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
        tiny.fuse_state_dict(state, arch, tail_plan(5, [0.5], name="x", kind="found"))
    del state["model.layers.4.mlp.up_proj.weight"]
    with pytest.raises(PlanError, match="model.layers.4.mlp.up_proj.weight is missing"):
        fused_layer(state, arch, tail_plan(5, [0.5], name="x", kind="found"), 3)


# -- norms and alignment ---------------------------------------------------------------------------------------------

OPTIONS = [(alignment, norms) for alignment in ("none", "rows", "neurons") for norms in ("keep", "fold")]


@pytest.fixture(scope="module", params=["llama_biases", "qwen3_biases", "qwen2", "mistral"])
def checkpoint(request, tmp_path_factory):
    return Checkpoint(str(tiny.make_checkpoint(tmp_path_factory.mktemp("m"), request.param)))


@pytest.fixture(scope="module")
def aligner(checkpoint):
    return Aligner(checkpoint)


def with_options(plan, alignment, norms, biases="keep"):
    return MergePlan(plan.n_layers, plan.steps, alignment=alignment, norms=norms, biases=biases)


def fold(state, layer, config):
    """Gains into the columns of what reads them, and what these make of biases into theirs, written out."""
    prefix = f"{tiny.root_of(config.model_type)}{layer}."
    offset = 1 if tiny.offset_gains(config.model_type) else 0
    before_mlp = "pre_feedforward_layernorm" if "gemma" in config.model_type[:-1] else "post_attention_layernorm"
    before_mlp = "input_layernorm" if config.model_type in ("cohere", "cohere2", "phi") else before_mlp
    before_attention = "input_layernorm"
    if config.model_type == "apertus":
        before_attention, before_mlp = "attention_layernorm", "feedforward_layernorm"
    gone = []
    ups = ("gate_proj", "up_proj", "gate_up_proj", "input_linear", "gate", "w1", "w3", "c_fc", "fc1", "dense_h_to_4h")
    ups += ("shared_expert_gate",)
    for norm, readers in (
        (before_attention, ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")),
        (before_mlp, ups),
    ):
        gain = state[f"{prefix}{norm}.weight"].double() + offset
        if (shift := f"{prefix}{norm}.bias") in state:
            for name in state:
                if name.startswith(prefix) and name.endswith(tuple(f".{reader}.bias" for reader in readers)):
                    matrix = state[name.replace("bias", "weight")].double()
                    state[name] = state[name].double() + torch.einsum("oi,i->o", matrix, state[shift].double())
            gone.append(shift)
        for name in state:
            if name.startswith(prefix) and name.endswith(tuple(f".{reader}.weight" for reader in readers)):
                state[name] = torch.einsum("oi,i->oi", state[name].double(), gain)
        gone.append(f"{prefix}{norm}.weight")
    for name in gone:
        state[name] = torch.full_like(state[name], 0 if name.endswith("bias") else 1 - offset)


def reorder(state, layer, config, order):
    """Units of one layer moved by loops over heads and experts, without the product's tables."""
    kv = config.num_attention_heads if config.model_type == "gpt_neox" else config.num_key_value_heads
    group = config.num_attention_heads // kv
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, k, v, o = [], [], [], []
    for a in range(kv):
        b = int(order["kv_heads"][a])
        k += range(b * size, (b + 1) * size)
        channels = [int(c) for c in order["value_channels"][a]]
        v += [b * size + c for c in channels]
        for p in range(group):
            head = b * group + int(order["query_heads"][a, p])
            q += range(head * size, (head + 1) * size)
            o += [head * size + c for c in channels]
    prefix, (heads, kv_rows) = f"{tiny.root_of(config.model_type)}{layer}.", (len(q), len(k))
    rows = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
    rows["self_attn.qkv_proj"] = [*q, *(heads + i for i in k), *(heads + kv_rows + i for i in v)]
    rows["attention.query_key_value"] = [  # of each head its queries, keys and values
        3 * size * (i // size) + part * size + i % size
        for head in range(kv)
        for part, of in enumerate((q, k, v))
        for i in of[head * size : (head + 1) * size]
    ]
    columns = {{"phi": "self_attn.dense", "gpt_neox": "attention.dense"}.get(config.model_type, "self_attn.o_proj"): o}
    old = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if "experts" in order:
        router, *names = tiny.expert_names(config.model_type)
        rows[router] = order["experts"].tolist()
        for number, (expert, units) in enumerate(zip(order["experts"].tolist(), order["units"], strict=True)):
            for name in names:
                state[f"{prefix}{name.format(number)}.weight"] = old[f"{prefix}{name.format(expert)}.weight"]
            gate, up, down = (name.format(number) for name in names)
            rows[gate] = rows[up] = columns[down] = units.tolist()
        if "shared_units" in order:
            gate, up, down = (f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down"))
            rows[gate] = rows[up] = columns[down] = order["shared_units"].tolist()
    else:
        units = order["units"].tolist()
        down = {"granitemoehybrid": "shared_mlp.output_linear", "starcoder2": "mlp.c_proj", "phi": "mlp.fc2"}
        down["gpt_neox"] = "mlp.dense_4h_to_h"
        for up in ("gate_proj", "up_proj", "c_fc", "fc1", "dense_h_to_4h"):
            rows[f"mlp.{up}"] = units
        columns[down.get(config.model_type, "mlp.down_proj")] = units
        rows["mlp.gate_up_proj"] = rows["shared_mlp.input_linear"] = [*units, *(len(units) + i for i in units)]
    for matrix, index in rows.items():
        for kind in ("weight", "bias"):
            if (name := f"{prefix}{matrix}.{kind}") in state:
                state[name] = state[name][index]
    for matrix, index in columns.items():
        state[f"{prefix}{matrix}.weight"] = state[f"{prefix}{matrix}.weight"][:, index]


def rows_matched_merge(state, plan):
    """(state dict, kept layers): as published_merge, every matrix's rows matched and moved before each step."""
    state, alive = dict(state), list(range(plan.n_layers))
    root = next(name for name in state if ".layers.0." in name).partition("0.")[0]
    first = f"{root}0."
    averaged = [n.removeprefix(first)[:-7] for n, tensor in state.items() if n.startswith(first) and tensor.ndim > 1]
    # Rows of tiny models that are matched by themselves.
    blocks = {"self_attn.qkv_proj": (range(32), range(32, 48), range(48, 64))}
    blocks["mlp.gate_up_proj"] = blocks["shared_mlp.input_linear"] = (range(48), range(48, 96))
    blocks["attention.query_key_value"] = [[i for i in range(96) if i // 8 % 3 == part] for part in range(3)]
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    for step in plan.steps:
        for matrix in averaged:
            into, remove = (f"{root}{layer}.{matrix}" for layer in (step.into, step.remove))
            one, two = (state[f"{name}.weight"].double() for name in (into, remove))
            order = [0] * len(one)
            for rows in map(list, blocks.get(matrix, [range(len(one))])):
                unit = [(w / (w.norm(dim=1, keepdim=True) + 1e-12)).numpy() for w in (one[rows], two[rows])]
                for place, other in zip(rows, linear_sum_assignment(cdist(*unit))[1], strict=True):
                    order[place] = rows[other]
            for kind in ("weight", "bias") if plan.biases == "merge" else ("weight",):
                if f"{into}.{kind}" in state:
                    merged = step.alpha * state[f"{into}.{kind}"].double()
                    state[f"{into}.{kind}"] = merged + (1 - step.alpha) * state[f"{remove}.{kind}"].double()[order]
        alive.remove(step.remove)
    merged, _ = tiny.published_merge(state, plan.n_layers, [])
    chosen = {}
    for name, tensor in merged.items():
        parts = name.split(".")
        if name.startswith(root):
            if int(parts[2]) not in alive:
                continue
            parts[2] = str(alive.index(int(parts[2])))
        chosen[".".join(parts)] = tensor.to(dtypes[name])
    return chosen, alive


def reference(checkpoint, plan, aligner):
    """The merged state dict by other means: groups folded and reordered as wholes, then merged step by step."""
    state = {name: checkpoint[name] for name in checkpoint}
    permutations = tiny.permutations(aligner, plan) if plan.alignment == "neurons" else {}
    for layer, order in permutations.items():
        reorder(state, layer, checkpoint.config, order)
    if plan.norms == "fold":
        group_of = {layer: layer for layer in range(plan.n_layers)}
        for step in reversed(plan.steps):
            group_of[step.remove] = group_of[step.into]
        changed = {kept.index for kept in plan.kept if not kept.unchanged}
        for layer, kept in group_of.items():
            if kept in changed:
                fold(state, layer, checkpoint.config)
    if plan.alignment == "rows":
        return rows_matched_merge(state, plan)
    return tiny.published_merge(state, plan.n_layers, tiny.steps_of(plan), biases=plan.biases)


@pytest.mark.parametrize("biases", ["keep", "merge"])
@pytest.mark.parametrize(("alignment", "norms"), OPTIONS)
def test_every_alignment_with_every_norm(checkpoint, aligner, alignment, norms, biases):
    for name in ("tail", "all", "middle", "pairs"):
        plan = with_options(PLANS[name], alignment, norms, biases)
        fused = tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan, aligner=aligner)
        expected, alive = reference(checkpoint, plan, aligner)
        assert [kept.index for kept in plan.kept] == alive and set(fused) == set(expected)
        for key, tensor in fused.items():
            assert tensor.dtype == torch.float32
            # As above, and a product with a gain that is rounded too.
            assert (tensor - expected[key]).abs().max() <= 20 * EPS * max(1, expected[key].abs().max()), (name, key)
        again = tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan)  # without an aligner it makes its own
        assert all(torch.equal(fused[key], again[key]) for key in fused)


@pytest.mark.parametrize(
    ("family", "alignment", "norms"),
    [
        ("gemma2", "neurons", "fold"),
        ("gemma", "neurons", "fold"),
        ("gemma3", "rows", "fold"),
        ("glm4", "neurons", "fold"),
        ("granite4", "neurons", "fold"),
        ("granite4_nope", "rows", "fold"),
        ("phi3", "neurons", "fold"),
        ("phi3", "rows", "keep"),
        ("olmo2", "neurons", "keep"),
        ("mixtral", "neurons", "fold"),
        ("olmoe", "neurons", "fold"),
        ("qwen2_moe", "neurons", "fold"),
        ("qwen3_moe", "none", "fold"),
        ("qwen3_moe", "neurons", "keep"),
        ("nemotron", "neurons", "keep"),
        ("starcoder2", "neurons", "fold"),
        ("starcoder2", "rows", "fold"),
        ("olmo", "neurons", "keep"),
        ("cohere", "neurons", "fold"),
        ("phi", "neurons", "fold"),
        ("stablelm", "rows", "keep"),
        ("gpt_neox", "neurons", "fold"),
        ("gpt_neox", "rows", "fold"),
        ("apertus", "neurons", "fold"),
    ],
)
def test_every_family_is_merged_as_written_out(tmp_path, family, alignment, norms):
    """Fused projections, experts with their router's rows, offset gains; receipts name what is stored."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family)))
    plan = with_options(PLANS["tail"], alignment, norms, "merge")
    check_mergeable(checkpoint, plan)
    aligner = Aligner(checkpoint)
    fused = tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan, aligner=aligner)
    expected, _ = reference(checkpoint, plan, aligner)
    assert set(fused) == set(expected)
    for key, tensor in fused.items():
        assert (tensor - expected[key]).abs().max() <= 20 * EPS * max(1, expected[key].abs().max()), key
    found = {r.tensor for r in receipts(checkpoint, checkpoint.architecture, plan, aligner=aligner) if r.max_abs_change}
    assert found == set(by_name_differences(checkpoint, fused))
    assert {name for name in expected if ".layers.2." in name and expected[name].ndim > 1} <= found


@pytest.mark.parametrize("alignment", ["none", "rows", "neurons"])
def test_biases_that_stay_take_up_their_norm_s(tmp_path, alignment):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "starcoder2")))
    for name in ("tail", "all", "pairs"):
        plan, aligner = with_options(PLANS[name], alignment, "fold"), Aligner(checkpoint)
        fused = tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan, aligner=aligner)
        expected, _ = reference(checkpoint, plan, aligner)
        assert set(fused) == set(expected)
        for key, tensor in fused.items():
            assert (tensor - expected[key]).abs().max() <= 20 * EPS * max(1, expected[key].abs().max()), (name, key)


@pytest.mark.parametrize(("alignment", "norms"), OPTIONS[1:])
def test_options_change_what_is_merged_and_nothing_else(checkpoint, aligner, alignment, norms):
    arch, plan = checkpoint.architecture, PLANS["tail"]
    plain = tiny.fuse_state_dict(checkpoint, arch, plan)
    fused = tiny.fuse_state_dict(checkpoint, arch, with_options(plan, alignment, norms), aligner=aligner)
    changed = {name for name in plain if not torch.equal(plain[name], fused[name])}
    if checkpoint.config.num_key_value_heads < 4 and norms == "keep":  # so few may well stay in their order
        changed.add("model.layers.2.self_attn.k_proj.weight")
    if alignment == "none":  # what reads no gain stays
        matrices = {m for readers in arch.norm_inputs.values() for m in readers}
    else:
        matrices = set(arch.matrices)
    expected = {f"model.layers.2.{matrix}.weight" for matrix in matrices}
    if norms == "fold":
        expected |= {f"model.layers.2.{norm}.weight" for norm in arch.norm_inputs}
    assert changed == expected


@pytest.mark.parametrize(("alignment", "norms"), OPTIONS)
def test_corners_keep_their_layers_as_they_are(checkpoint, aligner, alignment, norms):
    """Nothing is averaged, so that gains are not folded and the function is the same to the last bit."""
    arch = checkpoint.architecture
    for name in ("drop", "before_last"):
        plain = tiny.fuse_state_dict(checkpoint, arch, PLANS[name])
        fused = tiny.fuse_state_dict(checkpoint, arch, with_options(PLANS[name], alignment, norms), aligner=aligner)
        assert all(torch.equal(plain[key], fused[key]) for key in plain)


def model_of(checkpoint, state, n_layers):
    config = copy.deepcopy(checkpoint.config)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **tiny.PLAIN)
    state = tiny.of_layers(tiny.loaded_layer, config.model_type, state)
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("family", ["llama_biases", "qwen2", "phi3", "mixtral"])
def test_all_weight_on_a_deeper_layer_computes_that_layer(tmp_path, family):
    """Folded, in its units' new order and with its own biases it is the last layer: the "before last" model.

    Of families whose norms are all folded: query and key norms and those of outputs are the kept layer's.
    """
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family)))
    aligner = Aligner(checkpoint)
    arch, ids = checkpoint.architecture, np.random.default_rng(0).integers(5, 800, 30)
    plan = with_options(PLANS["always_last"], "neurons", "fold", "merge")
    fused = tiny.fuse_state_dict(checkpoint, arch, plan, aligner=aligner)
    before_last = tiny.fuse_state_dict(checkpoint, arch, PLANS["before_last"])
    name = arch.layer_name(2, f"{arch.matrices[-1]}.weight")
    assert not torch.equal(fused[name], before_last[name])
    found, expected = (tiny.plain_logits(model_of(checkpoint, s, 3), ids) for s in (fused, before_last))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    # The published way it is not: other units, gains and biases meet.
    plain = tiny.fuse_state_dict(checkpoint, arch, PLANS["always_last"])
    assert (tiny.plain_logits(model_of(checkpoint, plain, 3), ids) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("norms", ["keep", "fold"])
def test_neurons_stay_linear_in_the_effective_coefficients(checkpoint, aligner, norms):
    """The same permutations whatever the alphas: each plan is the sum of three matrices, found from three plans."""
    arch = checkpoint.architecture

    def fused(alphas):
        plan = with_options(tail_plan(5, alphas, name="x", kind="found"), "neurons", norms)
        (kept,) = [kept for kept in plan.kept if kept.index == 2]
        layer = fused_layer(checkpoint, arch, plan, 2, aligner=aligner)
        weights = dict(kept.coefficients)
        return torch.tensor([weights.get(n, 0.0) for n in (2, 3, 4)]), layer

    probes = [fused(alphas) for alphas in ([0.5, 0.5], [0.2, 0.9], [0.7, 0.1])]
    target, layer = fused([0.35, 0.6])
    share = torch.linalg.solve(torch.stack([c for c, _ in probes]).T, target)
    for matrix in arch.matrices:
        name = f"{matrix}.weight"
        combined = sum(s * probe[name] for s, (_, probe) in zip(share, probes, strict=True))
        assert (combined - layer[name]).abs().max() < 1e-5 * layer[name].abs().max()


def test_weights_that_are_no_checkpoint_need_an_aligner():
    model = tiny.random_model(tiny.config_of("llama"))
    plan = with_options(PLANS["tail"], "neurons", "keep")
    with pytest.raises(PlanError, match="needs an aligner"):
        tiny.fuse_state_dict(model.state_dict(), architecture_of(model.config), plan)


def test_rounding_to_another_dtype(checkpoint):
    plan = with_options(PLANS["tail"], "none", "fold")
    plain = fused_layer(checkpoint, checkpoint.architecture, plan, 2)
    rounded = fused_layer(checkpoint, checkpoint.architecture, plan, 2, dtype=torch.bfloat16)
    for name in plain:
        if "_proj.weight" in name:
            assert torch.equal(rounded[name], plain[name].bfloat16())
        else:
            assert torch.equal(rounded[name], plain[name])


def test_norms_and_biases_that_are_folded_keep_their_dtype():
    config = tiny.config_of("starcoder2")
    state = tiny.random_model(config, dtype=torch.bfloat16).state_dict()
    fused = fused_layer(state, architecture_of(config), with_options(PLANS["tail"], "none", "fold"), 2)
    assert {tensor.dtype for tensor in fused.values()} == {torch.bfloat16}


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
    expected = by_name_differences(state, tiny.fuse_state_dict(state, arch, plan))
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


def test_alternating_attention_is_refused_with_what_may_be_merged(tmp_path):
    """Gemma's layers take turns; a tail merge may average every other one, those between are left out."""
    sliding, full = "sliding_attention", "full_attention"
    for family in ("gemma2", "gemma3"):
        folder = tiny.make_checkpoint(tmp_path / family, family, layer_types=[sliding, full, sliding, full, sliding])
        checkpoint = Checkpoint(str(folder))
        with pytest.raises(PlanError, match=r"only layers of its kind, \[1, 3\]; in an alpha file, alpha 1 leaves"):
            check_mergeable(checkpoint, tail_plan(5, [0.5], name="x", kind="found"))
        check_mergeable(checkpoint, plan_of([(3, 4, 1.0), (2, 3, 1.0)]))
        check_mergeable(checkpoint, plan_of([(1, 2, 1.0), (1, 3, 0.5)]))


def test_layers_of_other_rotary_embeddings_are_not_averaged_where_all_windows_are_alike(tmp_path):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "gemma3")))
    checkpoint.windows = [None] * 5
    assert len(set(checkpoint.rotary_types)) == 2
    with pytest.raises(PlanError, match=r"rotary embeddings differ: .* layer 1 only layers of its kind, \[1\];"):
        check_mergeable(checkpoint, plan_of([(1, 2, 0.5)]))
    check_mergeable(checkpoint, plan_of([(3, 4, 0.5), (2, 3, 0.5)]))


def test_layers_with_and_without_a_rotary_embedding_are_not_averaged(tmp_path):
    """Every fourth layer of SmolLM3 has none; a merge may average those, or those between."""
    options = {"no_rope_layers": [1, 1, 0, 1, 0], "use_sliding_window": False}
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "smollm3", **options)))
    assert checkpoint.windows == [None] * 5 and checkpoint.rotary_types == [None, None, NO_ROTARY, None, NO_ROTARY]
    refused = r"would be averaged, but their rotary embeddings differ \(layers \[2, 4\] have none\): .* \[2, 4\]; in"
    with pytest.raises(PlanError, match=refused):
        check_mergeable(checkpoint, tail_plan(5, [0.5, 0.5], name="x", kind="found"))
    check_mergeable(checkpoint, plan_of([(0, 1, 0.5)]))
    check_mergeable(checkpoint, plan_of([(2, 3, 1.0), (2, 4, 0.5)]))


@pytest.mark.parametrize(
    ("family", "alignment", "norms", "message"),
    [
        ("olmo2", "none", "fold", "olmo2 normalises outputs, whose gains no matrix can take up: use norms keep"),
        ("olmo", "none", "fold", "olmo has norms without gains: use norms keep"),
        ("nemotron", "none", "fold", "nemotron has a bias in input_layernorm too, for which self_attn.q_proj would"),
        ("stablelm", "none", "fold", "stablelm has a bias in post_attention_layernorm too, for which mlp.gate_proj"),
        ("mixtral", "rows", "keep", "alignment rows permutes each matrix alone, .* use neurons or none for mixtral"),
        ("qwen2_moe", "rows", "keep", "rows permutes each matrix alone, .* use neurons or none for qwen2_moe"),
        ("qwen2_moe", "activations", "keep", "a router sends each expert tokens of its own: use neurons or none"),
        ("qwen3_moe", "activations", "keep", "a router sends each expert tokens of its own: use neurons or none"),
    ],
)
def test_options_that_mean_nothing_in_a_family_are_refused(tmp_path, family, alignment, norms, message):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family)))
    with pytest.raises(PlanError, match=message):
        check_mergeable(checkpoint, with_options(PLANS["tail"], alignment, norms))


def test_plans_of_other_models_are_refused():
    checkpoint = SimpleNamespace(n_layers=5, windows=[None] * 5, rotary_types=[None] * 5, deepstack_layers=0)
    with pytest.raises(PlanError, match="alignment is 'columns', but must be one of none, rows, neurons"):
        check_mergeable(checkpoint, with_options(drop_plan(5, 2), "columns", "keep"))
    with pytest.raises(PlanError, match="norms is 'drop', but must be one of keep, fold"):
        check_mergeable(checkpoint, with_options(drop_plan(5, 2), "none", "drop"))
    with pytest.raises(PlanError, match="the plan is for 6 layers, the model has 5"):
        check_mergeable(checkpoint, drop_plan(6, 2))
    check_mergeable(checkpoint, drop_plan(5, 2))


# -- alphas of single matrices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", ["keep", "merge"])
def test_each_matrix_is_merged_by_its_own_alphas(biased, biases):
    """Each tensor is that of the published merge with its matrix's alphas; a matrix's bias follows it if merged."""
    own = {"self_attn.q_proj": (0.9, 0.1), "mlp.down_proj": (0.0, 0.0), "mlp.up_proj": (1.0, 1.0)}
    plan = replace(PLANS["tail"], biases=biases, matrix_alphas=tuple(own.items()))
    state, architecture = biased.state_dict(), architecture_of(biased.config)
    fused = tiny.fuse_state_dict(state, architecture, plan)
    largest = max(tensor.abs().max() for tensor in state.values())
    for matrix in architecture.matrices:
        steps = tiny.steps_of(PLANS["tail"].with_alphas(own.get(matrix, (0.3, 0.8)), name="x", kind="found"))
        expected, _ = tiny.published_merge(state, 5, steps, biases=biases)
        for kind in ("weight", "bias"):
            name = f"model.layers.2.{matrix}.{kind}"
            assert (fused[name] - expected[name]).abs().max() <= 8 * EPS * largest, name
    assert torch.equal(fused["model.layers.2.mlp.up_proj.weight"], state["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(fused["model.layers.2.mlp.down_proj.weight"], state["model.layers.4.mlp.down_proj.weight"])


def test_matrix_alphas_go_with_folded_norms_and_aligned_neurons(checkpoint, aligner):
    """Linear as ever: each tensor is that of the plan whose alphas are all the matrix's."""
    plan = with_options(PLANS["tail"], "neurons", "fold")
    arch = checkpoint.architecture
    own = fused_layer(
        checkpoint, arch, replace(plan, matrix_alphas=(("mlp.gate_proj", (0.1, 0.2)),)), 2, aligner=aligner
    )
    other = fused_layer(
        checkpoint,
        arch,
        replace(plan, steps=plan.with_alphas((0.1, 0.2), name="x", kind="found").steps),
        2,
        aligner=aligner,
    )
    plain = fused_layer(checkpoint, arch, plan, 2, aligner=aligner)
    for name, tensor in own.items():
        assert torch.equal(tensor, (other if name == "mlp.gate_proj.weight" else plain)[name]), name


def test_matrix_alphas_that_cannot_be_carried_out_are_refused(checkpoint):
    plan = replace(PLANS["tail"], matrix_alphas=(("mlp.sideways_proj", (0.5, 0.5)),))
    rows = replace(PLANS["tail"], alignment="rows", matrix_alphas=(("mlp.up_proj", (0.5, 0.5)),))
    for refused, message in (
        (plan, "name mlp.sideways_proj, but the matrices of .* are self_attn.q_proj"),
        (rows, 'alignment "rows" .*has no matrix_alphas; use alignment "none" or "neurons"'),
    ):
        with pytest.raises(PlanError, match=message):
            check_mergeable(checkpoint, refused)
        with pytest.raises(PlanError, match=message):
            fused_layer(checkpoint, checkpoint.architecture, refused, 2)


def test_receipts_of_large_matrices_have_all_their_digits():
    """torch's own norm of float32 is .07 % too small here, and .5 % of an 8B's matrices."""
    change = torch.randn(8960, 1536, generator=torch.Generator().manual_seed(0))
    before = torch.full_like(change, 0.5)
    expected = change.double().square().mean().sqrt().item() / 0.5
    assert fusion._relative_size(change, before) == pytest.approx(expected, rel=1e-9)
    none = torch.zeros(3)
    assert (fusion._relative_size(before, none), fusion._relative_size(none, none)) == (1.0, 0.0)


@pytest.mark.parametrize("alignment", ["none", "rows", "neurons"])
def test_a_layer_that_is_only_refitted_keeps_its_gains_in_its_matrices(tmp_path, alignment):
    """With rows its norms became 1 while its matrices stayed as they were."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "gemma")))
    arch, plan = checkpoint.architecture, MergePlan(5, (MergeStep(1, 2, 0.4),), alignment=alignment, norms="fold")
    plan = replace(plan, refit=Refit("outputs", layers=1, ridge=0.01, calibration="c"))
    kept = plan.kept[2]
    assert kept.index == 3 and kept.refitted and kept.index not in plan.groups
    found = fused_layer(checkpoint, arch, plan, 2, aligner=Aligner(checkpoint), refits=lambda *_: {})
    own = checkpoint.layer(3, dtype=torch.float32)
    for norm, readers in arch.norm_inputs.items():
        assert torch.equal(found[f"{norm}.weight"], torch.zeros_like(own[f"{norm}.weight"]))
        for matrix in readers:
            gain = own[f"{norm}.weight"] + arch.gain_offset
            assert torch.allclose(found[f"{matrix}.weight"], own[f"{matrix}.weight"] * gain)
