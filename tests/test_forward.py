"""forward.py: layers run one at a time over shared prefixes, against transformers' hidden states of whole prompts."""

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import raymerge.forward
from raymerge.activations import ActivationCache
from raymerge.alignment import Aligner, AlignmentError
from raymerge.checkpoint import Checkpoint
from raymerge.forward import LayerRunner, visible
from raymerge.plan import base_plan, drop_block_plan, tail_plan
from raymerge.prompts import Group, PromptError, Shard
from raymerge.refit import Refitter
from raymerge.trunk import TrunkCache

torch.set_num_threads(1)

# Float32 against float64: unit roundoff 6e-8, amplified by five layers whose weights are large on purpose (tiny.py).
# Measured at most 3e-6 of the largest value; a wrong mask, position or norm moves it by more than 1e-2.
LIMIT = 2e-5


def ids_of(seed, n):
    return np.random.default_rng(seed).integers(5, 800, n)


@pytest.fixture(scope="module")
def shard():
    """Prefixes of several lengths (one empty), sequences from 1 to 90 tokens, in no order of length."""
    # Of 12 and 41 tokens, since windows are of 11 and 40.
    lengths = [(30, (5, 61, 1)), (0, (17, 1, 40)), (12, (90, 2)), (41, (3,)), (120, (9,))]
    groups, seed, row = [], 0, 0
    for n_prefix, own in lengths:
        prefix, seed = ids_of(seed, n_prefix), seed + 1
        sequences = tuple(ids_of(seed + i, n) for i, n in enumerate(own))
        groups.append(Group(f"s{seed}", prefix, sequences, tuple(range(row, row + len(own)))))
        seed, row = seed + len(own), row + len(own)
    return Shard(tuple(groups))


def whole(shard):
    return {
        row: np.concatenate([group.prefix, ids])
        for group in shard.groups
        for row, ids in zip(group.rows, group.sequences, strict=True)
    }


@torch.no_grad()
def hidden_states(folder, ids):
    """Float64 states that enter layers 0 … L-1, and that leave the last one: L + 1 of (T, d), before the final norm."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **tiny.PLAIN)
    found = {}
    for row, prompt in ids.items():
        states = []
        hooks = [
            layer.register_forward_hook(lambda module, args, out, s=states: s.append((args[0][0], out[0])))
            for layer in model.base_model.layers
        ]
        model(input_ids=torch.from_numpy(prompt)[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        found[row] = [before for before, _ in states] + [states[-1][1]]
    return found


#: Gemma 2 as some train it on: without a cap, but still of a class that transformers does not run with SDPA.
UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in tiny.FAMILIES), pytest.param("gemma2", UNCAPPED, id="uncapped")],
)
def test_every_state_is_that_of_the_whole_prompt(tmp_path, shard, family, options):
    folder = tiny.make_checkpoint(tmp_path / "m", family, **options)
    runner = LayerRunner(Checkpoint(str(folder)))
    expected = hidden_states(folder, whole(shard))
    layers = runner.plan_layers(base_plan(tiny.N_LAYERS))
    states = runner.embed(shard)
    for number in range(tiny.N_LAYERS + 1):
        for group, (prefix, own) in zip(shard.groups, runner.pack(states), strict=True):
            starts = np.cumsum([0, *map(len, group.sequences)])
            for row, start, stop in zip(group.rows, starts, starts[1:], strict=False):
                found = torch.cat([prefix, own[start:stop]]).double()
                scale = expected[row][number].abs().max()
                assert (found - expected[row][number]).abs().max() < LIMIT * scale, (number, row)
        if number < tiny.N_LAYERS:
            states = runner.run(states, layers[number : number + 1])


def test_batches_do_not_change_anything(tmp_path, shard, monkeypatch):
    runner = LayerRunner(Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "mistral_window"))))
    layers = runner.plan_layers(base_plan(tiny.N_LAYERS))
    results = []
    for tokens in (1, 100, 10**6):
        monkeypatch.setattr(raymerge.forward, "_BATCH_TOKENS", tokens)
        states = runner.embed(shard)
        for state in states:
            sizes = [len(members) * max(lengths) for members, lengths, _ in state.batches]
            assert all(size <= tokens or len(state.batches[i][0]) == 1 for i, size in enumerate(sizes))
            assert sorted(i for members, _, _ in state.batches for i in members) == list(range(len(state.group.rows)))
            assert all(x.shape[1] == max(lengths) for _, lengths, x in state.batches)
        results.append((sum(len(state.batches) for state in states), runner.pack(runner.run(states, layers))))
    assert results[0][0] > results[1][0] > results[2][0]
    for _, packed in results[:2]:
        for pair, other in zip(packed, results[2][1], strict=True):
            for a, b in zip(pair, other, strict=True):
                assert a.shape == b.shape
                if len(b):
                    assert (a - b).abs().max() < LIMIT * b.abs().max()


def test_states_that_other_code_computed_are_not_read(tmp_path, monkeypatch):
    """A family's layer that a release of transformers, or of raymerge, mends gives other states."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "llama")))
    shard = Shard((Group("s", np.arange(5), (np.arange(3),), (0,)),))
    plan = drop_block_plan(tiny.N_LAYERS, 1, 1)

    def paths():
        runner = LayerRunner(checkpoint)
        refit = Refitter(runner, tmp_path)
        cached = ActivationCache(tmp_path, runner, pooling="last").path([shard])
        return [TrunkCache(runner, 1, tmp_path).path(shard), cached, refit.path(plan, 0)]

    found = [paths(), paths()]
    monkeypatch.setattr(raymerge.forward, "version", lambda package: f"{package} of tomorrow")
    found.append(paths())
    monkeypatch.setattr(raymerge.forward, "_VERSION", 0)
    found.append(paths())
    assert found[0] == found[1] and len({path for each in found for path in each}) == 3 * 3


def test_a_batch_is_closed_before_its_padding_costs_more_than_a_call(tmp_path, monkeypatch):
    """Sequences of 1 to 40 tokens in one batch would be padded to nearly twice their tokens."""
    runner = LayerRunner(Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "llama"))))
    layers = runner.plan_layers(base_plan(tiny.N_LAYERS))
    ids = np.random.default_rng(0).integers(0, 90, (41, 40))
    sequences = tuple(ids[length, :length] for length in range(1, 41))
    shard = Shard((Group("s", ids[0, :20], sequences, tuple(range(40))),))
    batches, found = {}, {}
    for name, operations in {"a call costs 16 tokens": 0.0, "a call costs far more": 1e12}.items():
        monkeypatch.setattr(raymerge.forward, "_CALL_OPERATIONS", operations)
        runner.__dict__.pop("_call_tokens", None)
        (state,) = runner.embed(shard)
        batches[name] = [(len(members) * max(lengths), sum(lengths)) for members, lengths, _ in state.batches]
        found[name] = runner.pack(runner.run([state], layers))[0][1]
    cheap, dear = batches["a call costs 16 tokens"], batches["a call costs far more"]
    assert dear == [(40 * 40, 820)]
    assert all(padded - own <= 16 for padded, own in cheap) and len(cheap) < 15
    one, other = found.values()
    assert (one - other).abs().max() < LIMIT * other.abs().max()


def test_packing_and_unpacking_are_inverse(tmp_path, shard):
    runner = LayerRunner(Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "llama"))))
    packed = runner.pack(runner.embed(shard))
    table = runner.checkpoint["model.embed_tokens.weight"]
    for group, (prefix, own) in zip(shard.groups, packed, strict=True):
        assert torch.equal(prefix, table[torch.from_numpy(group.prefix)])
        assert torch.equal(own, table[torch.from_numpy(np.concatenate(group.sequences))])
    again = runner.pack(runner.from_packed(shard, packed))
    assert all(torch.equal(a, b) for one, two in zip(packed, again, strict=True) for a, b in zip(one, two, strict=True))


def test_last_states_and_their_rows(tmp_path, shard):
    runner = LayerRunner(Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "llama"))))
    table, prompts = runner.checkpoint["model.embed_tokens.weight"], whole(shard)
    seen = []
    for state in runner.embed(shard):
        rows, last = state.last()
        assert torch.equal(last, table[torch.tensor([prompts[row][-1] for row in rows])])
        seen += rows
    assert sorted(seen) == sorted(prompts)


def test_a_layer_s_weights_are_asked_for_once_a_shard(tmp_path, shard, monkeypatch):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "llama")))
    runner = LayerRunner(checkpoint)
    asked = []
    original = Checkpoint.layer
    monkeypatch.setattr(Checkpoint, "layer", lambda self, n, **kw: asked.append(n) or original(self, n, **kw))
    layers = runner.plan_layers(tail_plan(5, [0.5], name="x", kind="found"), 1)
    assert [index for index, _ in layers] == [1, 2, 3] and not asked
    runner.run(runner.embed(shard), layers)
    assert asked == [1, 2]  # layer 3 is fused, not loaded


def test_bfloat16_storage_is_computed_in_float32_on_a_cpu(tmp_path, shard):
    """Converting is exact, so the states are those of the float32 copy of the stored model."""
    folder = tiny.make_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16)
    runner = LayerRunner(Checkpoint(str(folder)))
    assert runner.dtype == torch.float32
    expected = hidden_states(folder, whole(shard))
    states = runner.run(runner.embed(shard), runner.plan_layers(base_plan(5)))
    for state in states:
        rows, last = state.last()
        for row, found in zip(rows, last, strict=True):
            target = expected[row][-1][-1]
            assert (found.double() - target).abs().max() < LIMIT * target.abs().max()


def test_half_precision_on_request(tmp_path, shard):
    folder = tiny.make_checkpoint(tmp_path / "m", "qwen3", dtype=torch.bfloat16)
    runner = LayerRunner(Checkpoint(str(folder)), dtype=torch.bfloat16)
    states = runner.run(runner.embed(shard), runner.plan_layers(base_plan(5)))
    expected = hidden_states(folder, whole(shard))
    for state in states:
        rows, last = state.last()
        assert last.dtype == torch.bfloat16
        for row, found in zip(rows, last, strict=True):
            target = expected[row][-1][-1]
            # bfloat16's unit roundoff is 4e-3, amplified as float32's is above (50 times).
            assert (found.double() - target).abs().max() < 0.2 * target.abs().max()
        hidden = runner.vocabulary.normalise(last)
        assert hidden.dtype == torch.float32


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_layer_s_size_is_that_of_transformers_module(tmp_path, family):
    """By which memory is planned; configs have widths and numbers of experts that their family does not read."""
    runner = LayerRunner(Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family))))
    size, layer, config = runner.layer_size, runner.modules[-1], runner.checkpoint.config
    assert size.parameters == sum(tensor.numel() for tensor in layer.state_dict().values())
    attention = layer.attention if "neox" in family else layer.self_attn
    out = attention.dense if family == "phi" or "neox" in family else attention.o_proj
    assert (size.hidden, size.heads) == (32, 4) and size.query == out.in_features
    assert size.key * 4 == size.query * (4 if "neox" in family else config.num_key_value_heads)
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in layer.named_parameters() if "experts" in name}
    if tensors:
        shared = layer.mlp.shared_expert.down_proj.in_features if family == "qwen2_moe" else 0
        assert size.mlp == config.num_experts_per_tok * tensors["down_proj"].shape[-1] + shared
    else:
        names = ("shared_mlp.output_linear", "mlp.c_proj", "mlp.fc2", "mlp.down_proj", "mlp.dense_4h_to_h")
        (down,) = (module for name, module in layer.named_modules() if name in names)
        assert size.mlp == down.in_features


@pytest.mark.parametrize("family", ["llama_biases", "mistral_window", "granite4"])
def test_mlp_units_are_what_the_down_projection_reads(tmp_path, shard, family):
    """At every token once, prefixes first in their group, in the same order for every layer; states move on."""
    folder = tiny.make_checkpoint(tmp_path / "m", family)
    runner = LayerRunner(Checkpoint(str(folder)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **tiny.PLAIN)
    states = runner.embed(shard)
    with torch.inference_mode():
        found = [runner.mlp_units(states, layer) for layer in (0, 1)]
    # Hooks that stayed would hold the units of every later run.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in runner.modules.modules())
    after = runner.run(runner.embed(shard), runner.plan_layers(base_plan(5))[:2])
    assert all(torch.equal(a.prefix, b.prefix) for a, b in zip(states, after, strict=True))
    prompts = whole(shard)
    for layer in (0, 1):
        seen = {}
        for row, ids in prompts.items():
            block = model.model.layers[layer]
            down = block.shared_mlp.output_linear if family == "granite4" else block.mlp.down_proj
            hook = down.register_forward_pre_hook(lambda _m, args, s=seen, row=row: s.__setitem__(row, args[0][0]))
            with torch.no_grad():
                model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
            hook.remove()
        expected = []
        for state in states:
            n_prefix = len(state.group.prefix)
            expected.append(seen[state.group.rows[0]][:n_prefix])
            expected += [seen[state.group.rows[i]][n_prefix:] for members, _, _ in state.batches for i in members]
        expected = torch.cat(expected)
        assert found[layer].shape == (sum(group.tokens for group in shard.groups), 48)
        assert (found[layer] - expected).abs().max() < LIMIT * expected.abs().max()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_units_of_experts_have_no_values_at_every_token(tmp_path, shard, family):
    runner = LayerRunner(Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family))))
    with pytest.raises(AlignmentError, match=f"units of {family} see only the tokens .*use alignment neurons"):
        runner.mlp_units(runner.embed(shard), 0)


def test_aligned_plans_take_permutations_from_the_runner_s_aligner(tmp_path, shard):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "llama")))
    asked = []

    class Spy(Aligner):
        def towards(self, kept, sources, alignment):
            asked.append((kept, sorted(sources)))
            return super().towards(kept, sources, alignment)

    plan = tail_plan(5, [0.5], name="x", kind="found", alignment="neurons")
    results = []
    for runner in (LayerRunner(checkpoint, aligner=Spy(checkpoint)), LayerRunner(checkpoint)):
        results.append(runner.pack(runner.run(runner.embed(shard), runner.plan_layers(plan))))
    assert asked == [(3, [3, 4])]
    assert all(torch.equal(a, b) for one, two in zip(*results, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
def test_visible_positions(window):
    queries, keys = torch.arange(3, 9), torch.arange(9)
    found = visible(queries, keys, window)
    for i, q in enumerate(queries.tolist()):
        for j, k in enumerate(keys.tolist()):
            assert found[i, j] == (k <= q and (window is None or q - k < window))


def test_one_query_is_never_attended_under_a_mask_with_one_head_of_keys(tmp_path, monkeypatch):
    """CUDA's memory-efficient kernel answers it wrongly (pytorch/pytorch#191937), and no CPU shows that."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path, num_key_value_heads=1)))
    runner = LayerRunner(checkpoint)
    attend, asked = torch.nn.functional.scaled_dot_product_attention, []

    def attended(query, key, value, attn_mask=None, **options):
        asked.append((query.shape[2], attn_mask is not None, key.stride(1)))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    def last(prefix, own):
        group = Group("cats", np.array(prefix, dtype=np.int64), (np.array(own),), (0,))
        states = runner.run(runner.embed(Shard((group,))), runner.plan_layers(base_plan(tiny.N_LAYERS)))
        return states[0].last()[1]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attended)
    found = last([7, 8, 9], [10])
    assert (2, True, 0) in asked and not any(length == 1 for length, _, _ in asked)
    expected = last([], [7, 8, 9, 10])
    assert (found - expected).abs().max() < LIMIT * expected.abs().max()


@pytest.mark.parametrize("family", [*tiny.BOUNDED])
def test_up_to_the_limit_rotary_frequencies_are_those_of_whole_prompts(tmp_path, family):
    """Whatever is padded beyond it, as a single token is where all heads read the same keys; and no further."""
    folder = tiny.make_checkpoint(tmp_path / "m", **tiny.bounded(family, 40), num_key_value_heads=1)
    runner = LayerRunner(Checkpoint(str(folder)))
    groups = Group("a", ids_of(0, 39), (ids_of(1, 1),), (0,)), Group("b", ids_of(2, 8), (ids_of(3, 32),), (1,))
    states = runner.run(runner.embed(Shard(groups)), runner.plan_layers(base_plan(tiny.N_LAYERS)))
    prompts = whole(Shard(groups))
    for state, expected in zip(states, hidden_states(folder, prompts).values(), strict=True):
        found = torch.cat([state.prefix[0], state.batches[0].states[0]])
        assert (found - expected[-1]).abs().max() < LIMIT * expected[-1].abs().max()
    longer = Group("cats", ids_of(0, 9), (ids_of(1, 32), ids_of(2, 2)), (0, 1))
    said = r"a prompt of cats has 41 tokens, but those of m have at most 40 \(.* may have other rotary frequencies"
    for enter in (runner.embed, lambda shard: runner.from_packed(shard, [(torch.zeros(9, 32), torch.zeros(34, 32))])):
        with pytest.raises(PromptError, match=said):
            enter(Shard((longer,)))
    # For transformers gives the same tokens other states where more follow them.
    more = hidden_states(folder, {0: np.concatenate([prompts[0], ids_of(4, 1)])})[0]
    before = hidden_states(folder, {0: prompts[0]})[0]
    assert (more[-1][:40] - before[-1]).abs().max() > 1e-2 * before[-1].abs().max()


def test_a_runner_leaves_the_config_alone(tmp_path):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "qwen2", dtype=torch.bfloat16)))
    before = checkpoint.config.to_dict()
    LayerRunner(checkpoint, dtype=torch.float32)
    assert checkpoint.config.to_dict() == before
