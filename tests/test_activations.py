"""activations.py: against transformers' own forwards of whole prompts, one at a time, with hooks on decoder layers.

The reference runs in float64 with eager attention and takes differences between samples directly, where the module
batches, shares prefixes and uses Gram matrices.
"""

import json

import numpy as np
import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import raymerge.activations
import raymerge.forward
import raymerge.tensorfiles
from raymerge.activations import (
    POOLINGS,
    ActivationCache,
    ActivationError,
    collect,
    distinct_samples,
    state_distances,
    truncate,
)
from raymerge.checkpoint import Checkpoint
from raymerge.errors import UserError
from raymerge.forward import LayerRunner
from raymerge.plan import MergePlan, MergeStep, PlanError, base_plan, tail_plan
from raymerge.prompts import Group, Shard

torch.set_num_threads(1)

# Float32 against float64 through five layers whose weights are large on purpose: test_forward measures 3e-6 of a
# state's largest value; differences between samples are as large as the states.
RTOL = 2e-5


def ids_of(seed, n):
    return np.random.default_rng(seed).integers(5, 800, n)


def make_shards(lengths, *, seed=0):
    """One shard for each list of (prefix length, own lengths); rows count backwards, so that none is where it lies."""
    total = sum(len(own) for groups in lengths for _, own in groups)
    shards, row = [], total
    for groups in lengths:
        made = []
        for n_prefix, own in groups:
            seed += 100
            row -= len(own)
            sequences = tuple(ids_of(seed + 1 + i, n) for i, n in enumerate(own))
            made.append(Group(f"s{seed}", ids_of(seed, n_prefix), sequences, tuple(range(row, row + len(own)))))
        shards.append(Shard(tuple(made)))
    return shards


# With and without a prefix, own parts from 1 to 60 tokens, 3 to 75 tokens in all, in no order.
SHARDS = make_shards([[(30, (5, 45, 1)), (0, (17, 3))], [(12, (60, 2))]])
N = 7


def whole(shards):
    samples = {
        row: np.concatenate([group.prefix, ids])
        for shard in shards
        for group in shard.groups
        for row, ids in zip(group.rows, group.sequences, strict=True)
    }
    return [samples[row] for row in sorted(samples)]


@torch.no_grad()
def plain_states(model, samples):
    """[sample][layer] -> (entering, leaving), each (T, d) float64, before the final norm."""
    found = []
    for ids in samples:
        pairs = []
        hooks = [
            layer.register_forward_hook(lambda _, args, out, p=pairs: p.append((args[0][0].numpy(), out[0].numpy())))
            for layer in model.model.layers
        ]
        model(input_ids=torch.from_numpy(np.asarray(ids))[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        found.append(pairs)
    return found


def expected_of(states, pooling, max_tokens):
    """(distances, pooled, block influence) by the definitions, from `plain_states`."""
    distances, pooled, influence = [], [], []
    for layer in range(len(states[0])):
        leaving = [sample[layer][1] for sample in states]
        if pooling == "sequence":
            vectors = np.zeros((len(states), max_tokens, leaving[0].shape[1]))
            for n, x in enumerate(leaving):
                vectors[n, : min(len(x), max_tokens)] = x[:max_tokens]
        else:
            vectors = np.stack([x[-1] if pooling == "last" else x.mean(0) for x in leaving])
        distances.append([[np.linalg.norm(a - b) for b in vectors] for a in vectors])
        pooled.append(vectors)
        limit = max_tokens if pooling == "sequence" else None
        before, after = (np.concatenate([sample[layer][k][:limit] for sample in states]) for k in (0, 1))
        cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        influence.append(1 - cosines.mean())
    return np.array(distances), np.array(pooled), np.array(influence)


def check(found, expected):
    distances, pooled, influence = expected
    assert found.distances.dtype == np.float64 and found.distances.shape == distances.shape
    assert np.array_equal(found.distances, found.distances.transpose(0, 2, 1))
    assert not found.distances[:, np.arange(len(distances[0])), np.arange(len(distances[0]))].any()
    np.testing.assert_allclose(found.distances, distances, rtol=RTOL)
    assert found.block_influence.dtype == np.float64
    np.testing.assert_allclose(found.block_influence, influence, atol=1e-6)
    if found.states is not None:
        assert found.states.dtype == np.float32
        np.testing.assert_allclose(found.states, pooled, atol=RTOL * np.abs(pooled).max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        family: tiny.make_checkpoint(root / family, family)
        for family in ("llama", "qwen2_windows", "qwen3", "mistral_window")
    }


@pytest.fixture(scope="module")
def runners(folders):
    return {family: LayerRunner(Checkpoint(str(folder))) for family, folder in folders.items()}


@pytest.fixture
def llama(runners):
    return runners["llama"]


@pytest.fixture(scope="module")
def references(folders):
    samples = whole(SHARDS)
    return {
        family: plain_states(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager"), samples
        )
        for family, folder in folders.items()
    }


@pytest.mark.parametrize("family", ["llama", "qwen2_windows", "qwen3", "mistral_window"])
@pytest.mark.parametrize(
    ("pooling", "max_tokens"),
    # Longer than all; shorter than some; inside one prefix and as long as the other; a single token.
    [("sequence", 512), ("sequence", 40), ("sequence", 12), ("sequence", 1), ("last", 512), ("mean", 512)],
)
def test_what_is_collected_is_what_plain_forwards_give(runners, references, family, pooling, max_tokens):
    found = collect(runners[family], SHARDS, pooling=pooling, max_tokens=max_tokens)
    distances, *others = expected_of(references[family], pooling, max_tokens)
    assert (found.states is None) == (pooling == "sequence")
    if pooling == "sequence":
        # Samples that do not differ yet: both ways leave rounding there.
        first = [ids[:max_tokens].tolist() for ids in whole(SHARDS)]
        same = np.tile([[a == b for b in first] for a in first], (len(distances), 1, 1))
        assert same.sum() == 5 * {512: N, 40: N, 12: 9 + 4 + 1 + 1, 1: 9 + 4 + 1 + 1}[max_tokens]
        for values in (found.distances, distances):
            assert values[same].max() < 1e-5 * distances.max()
            values[same] = 0.0
    check(found, (distances, *others))


def test_narrow_blocks_and_batches_do_not_change_anything(llama, references, monkeypatch):
    expected = expected_of(references["llama"], "sequence", 40)
    for values, attended, batch in ((1, 1, 1), (5 * N * 32, 90, 100), (7 * N * 32, 10**6, 10**6)):
        monkeypatch.setattr(raymerge.activations, "_BLOCK_VALUES", values)
        monkeypatch.setattr(raymerge.activations, "_ATTENDED_TOKENS", attended)
        monkeypatch.setattr(raymerge.forward, "_BATCH_TOKENS", batch)
        check(collect(llama, SHARDS, pooling="sequence", max_tokens=40), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_merged_model(folders, runners, pooling):
    """Its kept layers, fused as the published method merges them step by step."""
    plan = tail_plan(5, [0.6, 0.3], name="x", kind="found")
    model = AutoModelForCausalLM.from_pretrained(folders["qwen3"], dtype=torch.float32)
    reference = plain_states(tiny.merged_model(model, tiny.steps_of(plan)), whole(SHARDS))
    found = collect(runners["qwen3"], SHARDS, pooling=pooling, plan=plan)
    assert len(found.distances) == len(found.block_influence) == 3
    check(found, expected_of(reference, pooling, 512))


def test_a_merge_inside_keeps_what_is_before_it(llama):
    base = collect(llama, SHARDS, pooling="last")
    merged = collect(llama, SHARDS, pooling="last", plan=MergePlan(5, (MergeStep(2, 3, 0.5),)))
    assert np.array_equal(base.distances[:2], merged.distances[:2]) and len(merged.states) == 4
    assert not np.allclose(base.distances[2], merged.distances[2], rtol=1e-2)


def test_massive_activations_do_not_swallow_the_differences(tmp_path):
    """One dimension of 1e8 for all: the squares lose 1e-16 of 1e16 a token, about what samples differ by."""
    folder = tiny.make_checkpoint(tmp_path / "m", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 1e8
    model.save_pretrained(folder)
    runner = LayerRunner(Checkpoint(str(folder)))
    shards = [Shard((Group("s", ids_of(0, 4), tuple(ids_of(i, 20) for i in range(1, 5)), (0, 1, 2, 3)),))]
    # The very states that are collected, one layer after the other.
    states, layers = runner.embed(shards[0]), runner.plan_layers(base_plan(5))
    found = collect(runner, shards, pooling="sequence").distances
    for number in range(5):
        ((_, own),) = runner.pack(runner.run(states, layers[number : number + 1]))
        x = own.double().view(4, -1)
        assert x.abs().max() > 1e7
        expected = [[(a - b).norm().item() for b in x] for a in x]
        np.testing.assert_allclose(found[number], expected, rtol=1e-6)


def test_how_samples_are_grouped_does_not_matter(llama):
    """Padding, batches and shared prefixes leave no trace: each sample alone in a shard of its own."""
    alone = [Shard((Group("s", np.zeros(0, dtype=np.int64), (ids,), (row,)),)) for row, ids in enumerate(whole(SHARDS))]
    for pooling in POOLINGS:
        together, apart = (collect(llama, shards, pooling=pooling) for shards in (SHARDS, alone))
        np.testing.assert_allclose(together.distances, apart.distances, rtol=RTOL)
        np.testing.assert_allclose(together.block_influence, apart.block_influence, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 2, 29, 30, 31, 33, 512])
def test_truncation_keeps_the_first_tokens_and_the_rows(max_tokens):
    cut = truncate(SHARDS, max_tokens)
    for before, after in zip(whole(SHARDS), whole(cut), strict=True):
        assert np.array_equal(after, before[:max_tokens])
    assert all(len(ids) for shard in cut for group in shard.groups for ids in group.sequences)
    assert [g.rows for s in cut for g in s.groups] == [g.rows for s in SHARDS for g in s.groups]


def test_tokens_beyond_the_limit_are_not_run(llama, monkeypatch):
    seen = []
    original = LayerRunner.embed
    monkeypatch.setattr(LayerRunner, "embed", lambda self, shard: seen.append(shard.tokens) or original(self, shard))
    collect(llama, SHARDS, pooling="sequence", max_tokens=32)
    # Prefix 30 and at most 2 of each of its own; 17 and 3; prefix 12, 20 and 2.
    assert seen == [30 + 2 + 2 + 1 + 17 + 3, 12 + 20 + 2]


def test_each_layer_is_loaded_once_and_run_once(llama, monkeypatch):
    loaded, run = [], []
    load, call = Checkpoint.layer, LayerRunner.run
    monkeypatch.setattr(Checkpoint, "layer", lambda self, n, **kw: loaded.append(n) or load(self, n, **kw))

    def spy(self, states, layers):
        run.extend((state.group.subject, index) for state in states for index, _ in layers)
        return call(self, states, layers)

    monkeypatch.setattr(LayerRunner, "run", spy)
    collect(llama, SHARDS, pooling="mean")
    assert loaded == [0, 1, 2, 3, 4]
    subjects = [group.subject for shard in SHARDS for group in shard.groups]
    assert run == [(subject, layer) for layer in range(5) for subject in subjects]


def test_distinct_samples():
    assert distinct_samples(SHARDS) == N
    assert distinct_samples(SHARDS, max_tokens=30) == N - 2  # three share a prefix of 30
    assert distinct_samples(SHARDS, max_tokens=31) == N


# -- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(call):
    """The most bytes that torch's allocator held at once on top of what it held before, temporaries included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    assert len(held)
    return int(held.max())


def test_memory_grows_with_tokens_times_width_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(raymerge.activations, "_BLOCK_VALUES", 2000)
    monkeypatch.setattr(raymerge.forward, "_BATCH_TOKENS", 64)
    runners = {}
    for layers in (2, 8):  # stored in bfloat16, so that converting a layer's weights takes memory
        folder = tiny.make_checkpoint(tmp_path / str(layers), "llama", dtype=torch.bfloat16, num_hidden_layers=layers)
        runners[layers] = LayerRunner(Checkpoint(str(folder)))

    def peak(n, length, *, layers=2, pooling="sequence", max_tokens=512):
        # Without a prefix: the mask that one asks for takes T^2 values, which do not matter at a model's width.
        shards = make_shards([[(0, (length,) * 4)] for _ in range(n // 4)])
        return peak_bytes(lambda: collect(runners[layers], shards, pooling=pooling, max_tokens=max_tokens))

    for pooling in POOLINGS:
        small, states = peak(12, 200, pooling=pooling), 12 * 200 * 32 * 4
        # Six more layers add their pooled states, which are part of the result.
        assert peak(12, 200, layers=8, pooling=pooling) <= small + 1.1 * 6 * 12 * 32 * 4, pooling
        # Beside one copy of all states: a layer's weights (37 KB), one group's new states (0.1 MB), a batch of 200
        # tokens' intermediates, a block of positions (16 KB). Only the group and the batch grow with T.
        assert small < states + 450_000, pooling
        assert peak(24, 200, pooling=pooling) - small < 1.1 * states, pooling
        assert peak(12, 400, pooling=pooling) < 2.05 * small, pooling
    # N^2 values are held (0.3 MB each), but not 512 padded positions in float64 (26 MB) nor N^2 d differences (10 MB).
    assert peak(200, 10) < 200 * 10 * 32 * 4 + 2_500_000
    assert peak(12, 60, max_tokens=10**9) == peak(12, 60, max_tokens=64)


def test_short_sequences_after_a_long_prefix_are_run_a_few_at_a_time(llama, monkeypatch):
    """Else the prefix's keys and values are held once for every sequence of a batch, and for every query head."""
    shards = make_shards([[(400, (3,) * 60)]])
    monkeypatch.setattr(raymerge.activations, "_ATTENDED_TOKENS", 10**9)
    wide = peak_bytes(lambda: collect(llama, shards, pooling="last"))
    monkeypatch.setattr(raymerge.activations, "_ATTENDED_TOKENS", 403 * 6)
    narrow = peak_bytes(lambda: collect(llama, shards, pooling="last"))
    # 60 or 6 sequences, 403 positions, 32 values: keys and values, float32.
    assert wide > 60 * 403 * 32 * 4 * 2 and narrow < wide / 4


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_hit_is_the_same_and_runs_no_layer(tmp_path, llama, monkeypatch, pooling):
    cache = ActivationCache(tmp_path / "cache", llama, pooling=pooling)
    first = cache.get(SHARDS)
    monkeypatch.setattr(LayerRunner, "run", None)
    monkeypatch.setattr(LayerRunner, "embed", None)
    second = cache.get(SHARDS)
    for name in ("distances", "states", "block_influence"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
    path = cache.path(SHARDS)
    assert list(cache.folder.iterdir()) == [path]


def test_the_name_changes_with_everything_that_changes_the_content(tmp_path, runners, llama):
    def path(runner, shards, plan=None, **options):
        return ActivationCache(tmp_path, runner, **options).path(shards, plan)

    plan, other = (tail_plan(5, [alpha], name="x", kind="found") for alpha in (0.5, 0.6))
    group = SHARDS[1].groups[0]
    swapped = [SHARDS[0], Shard((Group(group.subject, group.prefix, group.sequences, group.rows[::-1]),))]
    half = LayerRunner(llama.checkpoint, dtype=torch.bfloat16)
    names = [
        path(llama, SHARDS, pooling="last"),
        path(llama, SHARDS, pooling="mean"),
        path(llama, SHARDS, pooling="sequence"),
        path(llama, SHARDS, pooling="sequence", max_tokens=40),
        path(llama, SHARDS, pooling="last", plan=plan),
        path(llama, SHARDS, pooling="last", plan=other),
        path(llama, SHARDS[:1], pooling="last"),
        path(llama, swapped, pooling="last"),
        path(half, SHARDS, pooling="last"),
        path(runners["qwen3"], SHARDS, pooling="last"),
    ]
    assert len(set(names)) == len(names)
    same = [
        path(llama, SHARDS, pooling="last", max_tokens=3),  # not used there
        path(llama, SHARDS, pooling="last", plan=base_plan(5)),
        path(LayerRunner(Checkpoint(str(llama.checkpoint.directory))), tuple(SHARDS), pooling="last"),
    ]
    assert set(same) == {names[0]}


def test_a_file_cut_short_is_made_anew(tmp_path, llama, caplog):
    cache = ActivationCache(tmp_path, llama, pooling="last")
    cache.get(SHARDS)
    path = cache.path(SHARDS)
    content = path.read_bytes()
    for broken in (content[:-9], b"", b"nothing"):
        path.write_bytes(broken)
        cache.get(SHARDS)
        assert path.read_bytes() == content
    assert caplog.text.count(f"{path.name} cannot be read and is made anew") == 3


def test_a_folder_that_cannot_be_written(tmp_path, llama):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UserError, match="cannot be written"):
        ActivationCache(tmp_path / "file" / "cache", llama, pooling="last").get(SHARDS)


def test_nothing_is_left_of_an_interrupted_write(tmp_path, llama, monkeypatch):
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(raymerge.tensorfiles, "save_file", fail)
    with pytest.raises(UserError, match="No space left on device.*free space"):
        ActivationCache(tmp_path, llama, pooling="last").get(SHARDS)
    assert not list(tmp_path.iterdir())


# -- errors ----------------------------------------------------------------------------------------------------------


def test_options_and_samples_that_are_refused(tmp_path, llama):
    with pytest.raises(ActivationError, match="pooling is 'max', but must be one of sequence, last, mean"):
        collect(llama, SHARDS, pooling="max")
    with pytest.raises(ActivationError, match="max_tokens is 0, but must be at least 1"):
        ActivationCache(tmp_path, llama, pooling="sequence", max_tokens=0)
    for count in (0, 1):
        with pytest.raises(ActivationError, match=f"{count} samples have no distances: give at least 2"):
            collect(llama, make_shards([[(3, (4,))]])[:count], pooling="last")
    # The second shard has rows 0 and 1, the first 2 to 6; twice the same shard; only the first.
    for shards, missing in ((SHARDS[:1], "0, 1"), (SHARDS[1:] * 2, "2, 3")):
        with pytest.raises(ActivationError, match=f"must be 0 to .*, each once, but .{missing}. are missing"):
            collect(llama, shards, pooling="last")
    with pytest.raises(PlanError, match="the plan is for 4 layers, the model has 5"):
        collect(llama, SHARDS, pooling="last", plan=base_plan(4))


def test_samples_that_cannot_be_told_apart_are_refused(llama):
    shards = make_shards([[(20, (4, 7))]])
    with pytest.raises(ActivationError, match="all 2 samples are the same in their first 20 tokens: raise max_tokens"):
        collect(llama, shards, pooling="sequence", max_tokens=20)
    collect(llama, shards, pooling="sequence", max_tokens=21)
    collect(llama, shards, pooling="last", max_tokens=20)
    twice = [Shard((Group("s", ids_of(0, 3), (ids_of(1, 2), ids_of(1, 2)), (0, 1)),))]
    with pytest.raises(ActivationError, match="all 2 samples are the same: choose other samples"):
        collect(llama, twice, pooling="mean")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(folders, monkeypatch, value):
    """Weights that are not finite are refused when they are read; here they are sound, and what is computed is not."""
    runner = LayerRunner(Checkpoint(folders["llama"]))
    weights = runner.weights

    def spoiled(layer):
        found = weights(layer)
        if layer == 3:
            found["mlp.down_proj.weight"] = found["mlp.down_proj.weight"].clone()
            found["mlp.down_proj.weight"][0, 0] = value
        return found

    monkeypatch.setattr(runner, "weights", spoiled)
    for pooling in POOLINGS:
        with pytest.raises(ActivationError, match="layer 3 gives values that are not finite in float32"):
            collect(runner, SHARDS, pooling=pooling)
    # The merged model without that layer is sound.
    assert len(collect(runner, SHARDS, pooling="last", plan=MergePlan(5, (MergeStep(2, 3, 1.0),))).distances) == 4


def test_half_precision(folders, references):
    """bfloat16 keeps 8 bits: distances agree to a few per cent after the first layer, and sums are not bfloat16."""
    runner = LayerRunner(Checkpoint(str(folders["llama"])), dtype=torch.bfloat16)
    for pooling in POOLINGS:
        found = collect(runner, SHARDS, pooling=pooling)
        distances = expected_of(references["llama"], pooling, 512)[0][0]
        np.testing.assert_allclose(found.distances[0], distances, rtol=0.05)
        assert found.states is None or found.states.dtype == np.float32


# -- distances between depths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_distances_between_depths_are_means_over_every_token_that_is_run(folders, family):
    """Token by token in float64 from plain forwards, a prefix that sequences share counted once; in two shards."""
    runner = LayerRunner(Checkpoint(folders[family]))
    model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float64, attn_implementation="eager")
    expected = [np.zeros((tiny.N_LAYERS + 1,) * 2) for _ in range(2)]
    cosine, angular, tokens = (sum(parts) for parts in zip(*(state_distances(runner, s) for s in SHARDS), strict=True))
    for shard in SHARDS:
        for group in shard.groups:
            for i, ids in enumerate(group.sequences):
                (layers,) = plain_states(model, [np.concatenate([group.prefix, ids])])
                depths = [layers[0][0], *(leaving for _, leaving in layers)]
                for token in range(0 if i == 0 else len(group.prefix), len(depths[0])):
                    unit = np.stack([x[token] / np.linalg.norm(x[token]) for x in depths])
                    cosines = np.clip(unit @ unit.T, -1, 1)
                    expected[0] += 1 - cosines
                    expected[1] += np.arccos(cosines) / np.pi
    assert tokens == sum(len(group.prefix) + sum(map(len, group.sequences)) for s in SHARDS for group in s.groups)
    for found, value in zip((cosine, angular), expected, strict=True):
        assert found.shape == (tiny.N_LAYERS + 1,) * 2 and not np.diag(found).any()
        assert np.array_equal(found, found.T)
        np.fill_diagonal(value, 0.0)
        np.testing.assert_allclose(found / tokens, value / tokens, atol=2e-6)


def test_neighbouring_depths_are_block_influence(folders):
    """Without a prefix that counts for several samples, the first off-diagonal is what `collect` gives."""
    runner = LayerRunner(Checkpoint(folders["llama"]))
    shards = make_shards([[(0, (9, 20, 4))]], seed=3)
    cosine, _, tokens = state_distances(runner, shards[0])
    influence = collect(runner, shards, pooling="last").block_influence
    np.testing.assert_allclose(np.diagonal(cosine, 1) / tokens, influence, atol=1e-9)


def test_depths_that_are_not_finite_have_no_distances(folders, monkeypatch):
    runner = LayerRunner(Checkpoint(folders["llama"]))
    weights = runner.weights
    broken = lambda layer: {k: v * float("inf") if layer == 2 else v for k, v in weights(layer).items()}  # noqa: E731
    monkeypatch.setattr(runner, "weights", broken)
    with pytest.raises(ActivationError, match="layer 2 gives values that are not finite in float32"):
        state_distances(runner, SHARDS[0])
