"""alignment.py: planted permutations, exhaustive search on small layers, chains, the cache, and published rows."""

import errno
from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from test_architectures import one_layer, random_permutations, rounding

import raymerge.tensorfiles
from raymerge.alignment import (
    Aligner,
    AlignmentError,
    _match_inside,
    align_pair,
    compose,
    fuse_rows,
    invert,
    layer_tensors,
    match_rows,
)
from raymerge.checkpoint import Checkpoint
from raymerge.errors import UserError
from raymerge.families import architecture_of
from raymerge.forward import LayerRunner
from raymerge.plan import MergePlan, MergeStep, base_plan, drop_plan, tail_plan
from raymerge.prompts import Group, Shard
from raymerge.saving import save_checkpoint

torch.set_num_threads(1)


def same(one, two):
    return set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)


def plan_of(*steps, n_layers=5, **options):
    return MergePlan(n_layers, tuple(MergeStep(*step) for step in steps), **options)


# -- one pair --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_planted_permutation_is_found_and_undone(family, noise):
    """All groups at once; the noise is a fifth of the weights' own size."""
    config, arch, run, tensors = one_layer(family)
    planted = random_permutations(config, seed=5)
    generator = torch.Generator().manual_seed(0)
    other = {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if tensor.ndim == 2
        else tensor
        for name, tensor in tiny.permute_layer(arch, tensors, planted).items()
    }
    found = align_pair(tensors, other, arch)
    assert same(compose(planted, found, arch), compose(found, invert(found, arch), arch))  # both the identity
    aligned = tiny.permute_layer(arch, other, found)
    if noise == 0.0:
        assert all(torch.equal(aligned[name], tensors[name]) for name in tensors)
    assert (run(aligned) - run(other)).abs().max() < rounding(arch) * run(other).abs().max()


def cosine_sum(reference, other, folded):
    """What aligning maximises, from its definition: cosines of all rows and columns that lie on each other."""
    total = 0.0
    for name in ("q", "k", "v", "o"):
        one, two = (layer[f"self_attn.{name}_proj.weight"].double() for layer in (reference, other))
        if name in folded:
            one, two = (w * layer["input_layernorm.weight"].double() for w, layer in ((one, reference), (two, other)))
        one, two = (one, two) if name != "o" else (one.T, two.T)
        total += torch.nn.functional.cosine_similarity(one, two, dim=1).sum().item()
    return total


def test_heads_of_a_small_layer_against_every_order():
    """Unrelated layers: the exact maximum over key/value heads and all inside them, of 2 · (2! · 4!)² orders."""
    config = tiny.config_of("llama", hidden_size=16, num_hidden_layers=2, head_dim=4)
    arch = architecture_of(config)
    state = tiny.random_model(config).state_dict()
    one, two = (layer_tensors(state, arch, n) for n in (0, 1))
    found = align_pair(one, two, arch)

    def value(heads):
        return cosine_sum(one, tiny.permute_layer(arch, two, heads), "qkv")

    heads = {name: found[name] for name in ("kv_heads", "query_heads", "value_channels")}
    reached = value(heads)
    inside = list(product(permutations(range(2)), permutations(range(4))))
    scores = {}  # by pair of key/value heads: the other pair's share is constant, so it cancels
    for kv in ((0, 1), (1, 0)):
        for place in range(2):
            scores[kv, place] = []
            for queries, channels in inside:
                tried = {
                    "kv_heads": np.array(kv),
                    "query_heads": np.array([queries if i == place else (0, 1) for i in range(2)]),
                    "value_channels": np.array([channels if i == place else (0, 1, 2, 3) for i in range(2)]),
                }
                scores[kv, place].append(value(tried))
    plain = {kv: scores[kv, 0][0] for kv in ((0, 1), (1, 0))}
    best = max(sum(max(scores[kv, p]) for p in range(2)) - plain[kv] for kv in plain)
    assert plain[0, 1] + 1.0 < reached == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("groups", "channels"), [(1, 8), (2, 4), (3, 6), (5, 6)])
def test_the_order_of_query_heads_is_the_best_of_all(groups, channels):
    """Of likenesses that are noise, the hardest case. Turns from the query heads' own match alone end below it in most
    (what they miss of real layers: results, 2026-11-29)."""
    g, c = np.arange(groups), np.arange(channels)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        shapes = (groups, groups), (channels, channels), (groups, channels, groups, channels)
        queries, values, outputs = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

        def with_heads(heads, queries=queries, values=values, outputs=outputs):
            """The exact maximum over value channels, which are one assignment where the heads are given."""
            likeness = values + outputs[g, :, list(heads)].sum(0)
            return queries[g, list(heads)].sum() + likeness[linear_sum_assignment(-likeness)].sum()

        score, heads, order = _match_inside(queries, values, outputs)
        assert sorted(order) == list(c) and score == pytest.approx(with_heads(heads), abs=1e-4)
        assert score == pytest.approx(max(map(with_heads, permutations(range(groups)))), abs=1e-4)


def test_mlp_units_of_a_small_layer_against_every_order():
    config = tiny.config_of("llama", intermediate_size=6)
    arch = architecture_of(config)
    state = tiny.random_model(config).state_dict()
    one, two = (layer_tensors(state, arch, n) for n in (1, 3))
    parts = []
    for layer in (one, two):
        gain = layer["post_attention_layernorm.weight"].double()
        rows = [
            layer["mlp.gate_proj.weight"] * gain,
            layer["mlp.up_proj.weight"] * gain,
            layer["mlp.down_proj.weight"].T,
        ]
        parts.append([(w / w.norm(dim=1, keepdim=True)).double().numpy() for w in rows])
    likeness = sum(a @ b.T for a, b in zip(*parts, strict=True))
    best = max(permutations(range(6)), key=lambda order: likeness[range(6), order].sum())
    assert tuple(align_pair(one, two, arch)["units"]) == best


def test_units_are_matched_by_their_activations():
    """Weights unrelated, activations permuted, scaled, shifted and noisy; a dead unit does no harm."""
    config = tiny.config_of("qwen2")
    arch = architecture_of(config)
    state = tiny.random_model(config).state_dict()
    layers = [layer_tensors(state, arch, n) for n in (0, 1)]
    rng = np.random.default_rng(0)
    values, order = rng.standard_normal((200, 48)), rng.permutation(48)
    other = values[:, order] * rng.uniform(0.1, 10, 48) + rng.standard_normal(48) + 0.3 * rng.standard_normal((200, 48))
    values[:, order[3]], other[:, 3] = 2.0, -1.0
    pair = torch.from_numpy(values).float(), torch.from_numpy(other).float()
    found = align_pair(*layers, arch, activations=pair)
    assert np.array_equal(found["units"], np.argsort(order))
    by_weights = align_pair(*layers, arch)
    assert not np.array_equal(found["units"], by_weights["units"])
    assert all(np.array_equal(found[name], by_weights[name]) for name in found if name != "units")


def test_a_shared_expert_s_units_are_matched_like_a_dense_layer_s():
    """Of unrelated layers, exactly: cosines of gate's and up's rows, behind their norm, and of down's columns."""
    config = tiny.config_of("qwen2_moe", num_hidden_layers=2)
    arch, state = architecture_of(config), tiny.random_model(config).state_dict()
    state = tiny.of_layers(tiny.stored_layer, "qwen2_moe", state)
    layers = [layer_tensors(state, arch, number) for number in (0, 1)]
    rows = []
    for layer in layers:
        gain = layer["post_attention_layernorm.weight"]
        gate, up, down = (layer[f"mlp.shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down"))
        rows.append([part.double().numpy() for part in (gate * gain, up * gain, down.T)])
    cost = sum(cdist(one, two, "cosine") for one, two in zip(*rows, strict=True))
    found = align_pair(*layers, arch)["shared_units"]
    assert np.array_equal(found, linear_sum_assignment(cost)[1]) and len(found) == 40


# -- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "phi3", "olmoe", "qwen2_moe"])
def test_composing_and_inverting_are_what_they_say(family):
    config, arch, _, tensors = one_layer(family)
    first, then = random_permutations(config, 1), random_permutations(config, 2)
    stepwise = tiny.permute_layer(arch, tiny.permute_layer(arch, tensors, first), then)
    at_once = tiny.permute_layer(arch, tensors, compose(first, then, arch))
    back = tiny.permute_layer(arch, tiny.permute_layer(arch, tensors, first), invert(first, arch))
    assert all(torch.equal(stepwise[name], at_once[name]) for name in tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    name = f"{arch.matrices[-1]}.weight"
    assert not torch.equal(stepwise[name], tensors[name])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint(str(tiny.make_checkpoint(tmp_path_factory.mktemp("m"), "llama_biases")))


@pytest.fixture
def computed(monkeypatch):
    """How many pairs were matched so far."""
    calls = []
    monkeypatch.setattr(raymerge.alignment, "align_pair", lambda *a, **k: calls.append(k) or align_pair(*a, **k))
    return calls


def test_pairs_are_the_neighbours_inside_each_group():
    pairs = Aligner.pairs
    assert pairs(base_plan(5)) == []
    assert pairs(tail_plan(5, [0.5, 0.5], name="x", kind="found")) == [(2, 3), (3, 4)]
    assert pairs(plan_of((0, 1, 0.6), (3, 2, 0.1), (3, 4, 0.5))) == [(0, 1), (2, 3), (3, 4)]
    assert pairs(plan_of((4, 3, 0.2), (4, 2, 0.2))) == [(2, 3), (3, 4)]
    # They do not depend on alpha, so that the same ones serve every candidate of a search.
    for alphas in ([1.0, 0.3], [0.0, 0.0], [1.0, 1.0]):
        assert pairs(tail_plan(5, alphas, name="x", kind="found")) == [(2, 3), (3, 4)]


def test_matches_are_composed_along_the_chain_towards_the_kept_layer(checkpoint):
    arch, aligner = checkpoint.architecture, Aligner(checkpoint)
    layers = [layer_tensors(checkpoint, arch, n) for n in range(5)]
    neighbours = {n: align_pair(layers[n], layers[n + 1], arch) for n in range(4)}
    found = tiny.permutations(aligner, plan_of((2, 3, 0.4), (2, 4, 1.0), (2, 1, 0.3)))
    assert set(found) == {1, 3, 4}
    assert same(found[3], neighbours[2]) and same(found[1], invert(neighbours[1], arch))
    # Layer 4 laid on 3, and the result as 3 is laid on 2.
    laid = tiny.permute_layer(arch, tiny.permute_layer(arch, layers[4], neighbours[3]), neighbours[2])
    direct = tiny.permute_layer(arch, layers[4], found[4])
    assert all(torch.equal(laid[name], direct[name]) for name in laid)
    # Towards layer 4 it is the same alignment: laid on 4, layer 2 has its units where 4 on 2 has them.
    away = tiny.permutations(aligner, plan_of((4, 3, 0.4), (4, 2, 0.4)))
    assert same(compose(found[4], away[2], arch), compose(away[2], found[4], arch))
    assert same(invert(found[4], arch), away[2])


def test_a_second_aligner_computes_nothing(checkpoint, tmp_path, computed):
    plan = tail_plan(5, [0.5, 0.5, 0.1], name="x", kind="found")
    one = Aligner(checkpoint, tmp_path)
    found = tiny.permutations(one, plan)
    assert len(computed) == 3
    tiny.permutations(one, tail_plan(5, [0.1, 0.9], name="y", kind="found"))
    again = tiny.permutations(Aligner(Checkpoint(str(checkpoint.directory)), tmp_path), plan)
    assert len(computed) == 3
    assert all(same(found[layer], again[layer]) for layer in found) and set(found) == set(again) == {2, 3, 4}
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and all(f.name.startswith("alignment-") and f.suffix == ".safetensors" for f in files)
    tiny.permutations(Aligner(checkpoint), plan)  # without a folder nothing is shared
    assert len(computed) == 6


def test_files_are_named_by_what_they_depend_on(checkpoint, tmp_path):
    other = Checkpoint(str(tiny.make_checkpoint(tmp_path / "other", "llama_biases", seed=1)))
    units = lambda layer: torch.randn(60, 48, generator=torch.Generator().manual_seed(layer))  # noqa: E731
    aligners = [
        Aligner(checkpoint, tmp_path / "cache"),
        Aligner(other, tmp_path / "cache"),
        Aligner(checkpoint, tmp_path / "cache", units=units, data="a"),
        Aligner(checkpoint, tmp_path / "cache", units=units, data="b"),
    ]
    for aligner, alignment in zip(aligners, ("neurons", "neurons", "activations", "activations"), strict=True):
        aligner.compute((0, 1), alignment)
        aligner.compute((1, 2), alignment)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(aligners)
    by_weights, by_activations = (aligners[2].compute((0, 1), name)["units"] for name in ("neurons", "activations"))
    assert not np.array_equal(by_weights, by_activations)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(aligners), "prompts do not matter to weights"


def test_activations_without_prompts_are_refused(checkpoint):
    with pytest.raises(AlignmentError, match="needs the prompts of a run: .* or use alignment neurons"):
        Aligner(checkpoint).compute((0, 1), "activations")


def test_a_file_cut_short_is_made_anew(checkpoint, tmp_path, caplog):
    Aligner(checkpoint, tmp_path).compute((0, 1))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    Aligner(checkpoint, tmp_path).compute((0, 1))
    assert path.read_bytes() == content and f"the alignment {path} cannot be read" in caplog.text


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def fail(tensors, path):
        save_file(tensors, path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(raymerge.tensorfiles, "save_file", fail)
    with pytest.raises(UserError, match="cannot be written: .*No space left on device"):
        Aligner(checkpoint, tmp_path).compute((0, 1))
    assert list(tmp_path.iterdir()) == []


def test_activations_of_a_runner_match_a_planted_permutation(tmp_path):
    """End to end: layer 1 is layer 0 with its units reordered, and both read the same states."""
    folder = tiny.make_checkpoint(tmp_path / "m", "llama")
    checkpoint = Checkpoint(str(folder))
    arch, order = checkpoint.architecture, np.random.default_rng(0).permutation(48)
    tensors = {name: checkpoint[name].clone() for name in checkpoint}
    for name, tensor in tiny.permute_layer(arch, layer_tensors(checkpoint, arch, 0), {"units": order}).items():
        tensors[arch.layer_name(1, name)] = tensor
    save_checkpoint(checkpoint, tensors.items(), list(range(5)), tmp_path / "planted")
    planted = Checkpoint(str(tmp_path / "planted"))
    runner = LayerRunner(planted)
    ids = np.random.default_rng(1).integers(5, 800, 60)
    shard = Shard((Group("a", ids[:20], (ids[20:50], ids[50:]), (0, 1)), Group("b", ids[:0], (ids,), (2,))))
    aligner = Aligner(planted, units=lambda layer: runner.mlp_units(runner.embed(shard), layer))
    assert np.array_equal(aligner.compute((0, 1), "activations")["units"], np.argsort(order))


# -- rows, as published ----------------------------------------------------------------------------------------------


def published_order(reference, other):
    one, two = (
        w.double().numpy() / (np.linalg.norm(w.double().numpy(), axis=1) + 1e-12)[:, None] for w in (reference, other)
    )
    return linear_sum_assignment(cdist(one, two))[1]


def test_rows_are_matched_by_the_distance_of_normalised_rows():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((30, 8), (8, 30), (25, 25)):
        one, two = (torch.randn(n, m, generator=generator) * torch.rand(n, 1, generator=generator) for _ in range(2))
        two[3] = 0  # a row without a direction
        assert np.array_equal(match_rows(one, two), published_order(one, two))
        order = np.random.default_rng(0).permutation(n)
        assert np.array_equal(match_rows(one, 7 * one[order]), np.argsort(order))


def test_rows_do_not_keep_a_layer_s_function():
    """Published: o's and down's rows are the residual stream, and q, k, v and heads do not fit any more."""
    config, arch, run, tensors = one_layer("llama")
    other = dict(tiny.random_model(config, seed=3, dtype=torch.float64).model.layers[0].state_dict())
    expected = run(other)
    whole = dict(other)
    for matrix in arch.matrices:
        name = f"{matrix}.weight"
        whole[name] = other[name][match_rows(tensors[name], other[name])]
        assert (run(other | {name: whole[name]}) - expected).abs().max() > 0.1
    assert (run(whole) - expected).abs().max() > 0.1
    units = align_pair(tensors, other, arch)
    assert (run(tiny.permute_layer(arch, other, units)) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_rows_are_matched_again_at_every_step():
    generator = torch.Generator().manual_seed(0)
    layers = [{"a.weight": torch.randn(12, 5, generator=generator), "a.bias": torch.randn(12)} for _ in range(3)]
    steps = (MergeStep(1, 2, 0.4), MergeStep(0, 1, 0.7))
    found = list(fuse_rows(lambda n: layers[n], ["a"], steps))
    w, b = ([layer[f"a.{kind}"].double() for layer in layers] for kind in ("weight", "bias"))
    first = published_order(w[1], w[2])
    middle, middle_bias = 0.4 * w[1] + 0.6 * w[2][first], 0.4 * b[1] + 0.6 * b[2][first]
    second = published_order(w[0], middle)
    last = 0.7 * w[0] + 0.3 * middle[second]
    assert [match["a"].tolist() for _, match in found] == [first.tolist(), second.tolist()]
    assert (found[-1][0]["a.weight"] - last).abs().max() < 1e-6
    assert (found[-1][0]["a.bias"] - (0.7 * b[0] + 0.3 * middle_bias[second])).abs().max() < 1e-6
    # They depend on alpha: with another first step, the second meets other rows.
    other = list(fuse_rows(lambda n: layers[n], ["a"], (MergeStep(1, 2, 0.1), steps[1])))
    assert other[1][1]["a"].tolist() != second.tolist()
    # Given matches are used as they are, and give the same layer.
    again = list(fuse_rows(lambda n: layers[n], ["a"], steps, [match for _, match in found]))
    assert all(torch.equal(again[-1][0][name], found[-1][0][name]) for name in layers[0])
    # A removed layer of which nothing is used is not matched.
    assert next(fuse_rows(lambda n: layers[n], ["a"], (MergeStep(1, 2, 1.0),)))[1]["a"].tolist() == list(range(12))


def test_row_matches_are_kept_for_the_plans_seen_last(checkpoint, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(raymerge.alignment, "match_rows", lambda *a: calls.append(1) or match_rows(*a))
    aligner = Aligner(checkpoint, tmp_path)
    plans = [tail_plan(5, [a], name="x", kind="found", alignment="rows") for a in np.linspace(0.1, 0.9, 9)]
    one = aligner.row_matches(plans[0])
    assert len(calls) == 7 and aligner.row_matches(plans[0]) is one and len(calls) == 7
    folded = aligner.row_matches(SimpleNamespace(steps=plans[0].steps, norms="fold"))
    assert len(calls) == 14
    assert any(not np.array_equal(one[0][name], folded[0][name]) for name in one[0])
    for plan in plans[1:]:
        aligner.row_matches(plan)
    assert len(aligner._rows) == raymerge.alignment._PLANS_HELD
    assert list(tmp_path.iterdir()) == []
    assert aligner.row_matches(drop_plan(5, 2))[0]["mlp.up_proj"].tolist() == list(range(48))


def test_row_matches_of_a_plan_that_is_reported_are_made_once_for_all_processes(checkpoint, tmp_path, monkeypatch):
    plan = tail_plan(5, [0.6, 0.3], name="x", kind="found", alignment="rows")
    found = Aligner(checkpoint, tmp_path).row_matches(plan, keep=True)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(raymerge.alignment, "match_rows", lambda *_: pytest.fail("matched again"))
    read = Aligner(checkpoint, tmp_path).row_matches(plan)
    taking = Aligner(checkpoint)
    taking.take_rows(plan, found)
    for other in (read, taking.row_matches(plan)):
        assert len(other) == 2 and all(same(*pair) for pair in zip(found, other, strict=True))
    # Of a candidate that comes to be reported, matched before and only in memory: kept then.
    path.unlink()
    taken = Aligner(checkpoint, tmp_path)
    taken.take_rows(plan, found)
    taken.row_matches(plan, keep=True)
    assert list(tmp_path.iterdir()) == [path]
