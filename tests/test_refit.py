"""Refits against least squares on a transformers model's own activations, and what must not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_checkpoint, plain_logits
from transformers import AutoModelForCausalLM

from raymerge.alignment import Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.evaluation import merged_states
from raymerge.forward import LayerRunner
from raymerge.fusion import fused_layer, receipts
from raymerge.merging import save_merged
from raymerge.plan import PlanError, Refit, base_plan, block_plan, drop_block_plan, drop_plan
from raymerge.prompts import Group, Shard
from raymerge.refit import RefitError, Refitter, Sums, _held_out, check_refittable, observe, steps_of, token_weights

N = 5
TINY = 1e-10  # a ridge that holds nothing back


def windows(seed=0, count=6, length=60, vocabulary=800):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, vocabulary, length) for _ in range(count)]


def shard_of(sequences, prefix=()):
    return Shard((Group("text", np.array(prefix, dtype=np.int64), tuple(sequences), tuple(range(len(sequences)))),))


CALIBRATION = (shard_of(windows(0, 4)), shard_of(windows(1, 3, 45), prefix=range(7, 20)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama_biases", hidden_size=16, intermediate_size=40)


def refitter_of(folder, cache, shards=CALIBRATION):
    checkpoint = Checkpoint(str(folder))
    found = Refitter(LayerRunner(checkpoint, refits=lambda *of: found.tensors(*of)), cache, lambda: shards)
    return found


@pytest.fixture
def refitter(folder, tmp_path):
    return refitter_of(folder, tmp_path / "cache")


def refitted(plan, method, **options):
    return replace(plan, refit=Refit(method, **{"ridge": 0.01, "calibration": "c", **options}))


def final_states(refitter, plan, shards=CALIBRATION):
    """(tokens, d): states that leave the last layer of the merged model."""
    packed = [refitter.runner.pack(merged_states(refitter.runner, plan, shard, None)) for shard in shards]
    return torch.cat([part for shard in packed for pair in shard for part in pair])


def down_of(block):
    names = ("c_proj", "dense_4h_to_h", "down_proj")
    return next(getattr(block.mlp, name) for name in names if hasattr(block.mlp, name))


def inside(folder, layer, sequences):
    """By transformers alone, float64, sequence by sequence: what down_proj reads, the state before the MLP, and the
    states that leave every layer; (tokens, ·)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    found = {"units": [], "middle": [], **{n: [] for n in range(model.config.num_hidden_layers)}}
    block = model.base_model.layers[layer]
    down_of(block).register_forward_pre_hook(lambda _, inputs: found["units"].append(inputs[0][0]))
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: found["middle"].append(inputs[0][0]))
    for number, module in enumerate(model.base_model.layers):
        module.register_forward_hook(
            lambda _m, _i, out, n=number: found[n].append((out[0] if isinstance(out, tuple) else out).squeeze(0))
        )
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.as_tensor(ids)[None], use_cache=False)
    return model, {name: torch.cat(values) for name, values in found.items()}


@pytest.mark.parametrize("family", ["llama_biases", "starcoder2", "nemotron"])
def test_the_linear_replacement_is_a_least_squares_solution(folder, tmp_path, family):
    """ReplaceMe as written: T minimises |M T + Y - L|; M is the MLP's output, Y the state before it, L what leaves."""
    if family != "llama_biases":
        options = {"num_key_value_heads": 4, "head_dim": 4} if family == "nemotron" else {}
        folder = make_checkpoint(tmp_path / "m", family, hidden_size=16, intermediate_size=40, **options)
    sequences = windows(0, 5)
    refitter = refitter_of(folder, tmp_path, (shard_of(sequences[:2]), shard_of(sequences[2:])))
    plan = refitted(drop_block_plan(N, 2, 2), "linear", ridge=TINY)
    found = refitter.tensors(plan, 1)
    (name,) = found
    model, seen = inside(folder, 1, sequences)
    down = down_of(model.model.layers[1])
    assert name == f"mlp.{'c_proj' if family == 'starcoder2' else 'down_proj'}.weight"
    down.requires_grad_(False)
    m = seen["units"] @ down.weight.T  # the bias stays as it is
    wanted = seen[3] - seen["middle"] - (0 if down.bias is None else down.bias)
    t = np.linalg.lstsq(m.numpy(), wanted.numpy())[0]
    expected = torch.from_numpy(t).T @ down.weight
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-4)
    # And it is better than nothing by as much as least squares says.
    (record,) = refitter.records(plan)
    left = (wanted - m @ torch.from_numpy(t)).square().sum() / (wanted - m).square().sum()
    assert record["error"] == pytest.approx(float(left), rel=1e-3) and record["tokens"] == len(m)
    assert record["layer"] == 1 and record["part"] == "mlp" and record["ridge"] == TINY


def test_scale_is_one_factor_a_channel(folder, tmp_path):
    sequences = windows(0, 5)
    refitter = refitter_of(folder, tmp_path, (shard_of(sequences),))
    found = refitter.tensors(refitted(drop_block_plan(N, 2, 1), "scale", ridge=TINY), 1)["mlp.down_proj.weight"]
    model, seen = inside(folder, 1, sequences)
    down = model.model.layers[1].mlp.down_proj
    m, wanted = seen["units"] @ down.weight.T, seen[2] - seen["middle"] - down.bias
    factor = (m * wanted).sum(0) / m.square().sum(0)
    torch.testing.assert_close(found.double(), factor[:, None] * down.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["outputs", "linear"])
def test_a_weak_ridge_on_few_tokens_fits_what_float64_fits(folder, tmp_path, method):
    """A ridge far below what float32 products round off, on fewer tokens than there are features."""
    plan, shards, found = refitted(drop_block_plan(N, 2, 2), method, ridge=1e-6), (shard_of(windows(0, 1, 12)),), []
    for dtype in (torch.float32, torch.float64):
        checkpoint = Checkpoint(str(folder))
        refitter = Refitter(LayerRunner(checkpoint, dtype=dtype), tmp_path / str(dtype), lambda: shards)
        found.append((refitter.tensors(plan, 1)["mlp.down_proj.weight"], refitter.records(plan)[-1]["error"]))
    (own, error), (wanted, least) = found
    before = fused_layer(checkpoint, checkpoint.architecture, replace(plan, refit=None), 1)["mlp.down_proj.weight"]
    assert float((own - wanted).norm() / (wanted - before).norm()) < 0.01
    assert error == pytest.approx(least, rel=0.05)


@pytest.mark.parametrize("family", ["llama_biases", "starcoder2", "stablelm", "gpt_neox_sequential"])
def test_outputs_reproduce_what_the_matrices_can(folder, tmp_path, family):
    """The MLP's fit alone, o_proj as it was fitted: weighted least squares on units, towards the weights there were."""
    if family != "llama_biases":
        folder = make_checkpoint(tmp_path / "m", family, hidden_size=16, intermediate_size=40)
    sequences = windows(0, 5)
    refitter = refitter_of(folder, tmp_path, (shard_of(sequences),))
    plan = refitted(block_plan(N, 2, [0.6], name="b", kind="fixed"), "outputs", ridge=0.05)
    assert [(step.position, step.target, step.part) for step in steps_of(plan)] == [(1, 2, "attention"), (1, 2, "mlp")]
    found = refitter.tensors(plan, 1)
    before = fused_layer(
        refitter.runner.checkpoint, refitter.runner.checkpoint.architecture, replace(plan, refit=None), 1
    )
    model, seen = inside(folder, 1, sequences)
    target = seen[2]
    # The merged layer with its new o_proj, by transformers.
    output = "attention.dense" if family == "gpt_neox_sequential" else "self_attn.o_proj"
    layer = before | {f"{output}.weight": found[f"{output}.weight"]}
    units, reached = [], []
    block = model.base_model.layers[1]
    block.load_state_dict({name: tensor.double() for name, tensor in layer.items()})
    down_of(block).register_forward_pre_hook(lambda _, inputs: units.append(inputs[0][0]))
    block.register_forward_hook(
        lambda _m, _i, out: reached.append((out[0] if isinstance(out, tuple) else out).squeeze(0))
    )
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.as_tensor(ids)[None], use_cache=False)
    u, residual = torch.cat(units), target - torch.cat(reached)
    w = 1 / target.square().mean(1, keepdim=True)
    gram = u.T @ (w * u)
    gram += 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    change = torch.linalg.solve(gram, u.T @ (w * residual)).T
    down = {"starcoder2": "c_proj", "gpt_neox_sequential": "dense_4h_to_h"}.get(family, "down_proj")
    name = f"mlp.{down}.weight"
    expected = before[name].double() + change
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-4)
    # Both fits leave less error than none, and together less than the linear replacement's.
    errors = [record["error"] for record in refitter.records(plan)]
    assert all(error < 1 for error in errors)


def test_after_the_seam_attention_and_mlp_have_targets_of_their_own(refitter):
    """What is left to the unmerged layer's state before its MLP, and to what leaves it, is uncorrelated with what
    o_proj and down_proj read: nothing more can be got."""
    plan = refitted(drop_block_plan(N, 2, 1), "outputs", layers=1, ridge=TINY)
    (step,) = [step for step in steps_of(plan) if not step.seam and step.part == "attention"]
    runner, products = refitter.runner, {}
    merged, unmerged = (list(runner.plan_layers(p)) for p in (plan, base_plan(N)))
    for shard in CALIBRATION:
        seen = []
        for layers, at in ((merged, step.position), (unmerged, step.target)):
            states = runner.run(runner.embed(shard), layers[:at])
            seen.append(observe(runner, states, layers[at][0], layers[at][1]()))
        counts = token_weights(seen[1]["leaving"])[:, None]
        for read, given in (("self_attn.o_proj", "middle"), ("mlp.down_proj", "leaving")):
            left, features = counts * (seen[1][given] - seen[0][given]), seen[0][read]
            size = features.norm() * left.norm()
            total = products.setdefault(read, [0.0, 0.0])
            total[0], total[1] = total[0] + features.T @ left, total[1] + size
    for read, (product, size) in products.items():
        assert product.norm() < 1e-3 * size, read


@pytest.mark.parametrize("method", ["linear", "scale", "outputs", "units"])
def test_a_layer_that_is_what_it_was_stays_as_it_was(tmp_path, method):
    """Layer 2 does nothing, so what its predecessor stands for without it is what that gave: nothing is to fit."""
    folder = make_checkpoint(tmp_path / "m", "qwen2", hidden_size=16, intermediate_size=40)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    refitter = refitter_of(folder, tmp_path / "cache")
    plan = refitted(drop_block_plan(N, 2, 1), method, layers=1 if method in ("outputs", "units") else 0)
    base = refitter.runner.checkpoint
    for position, layer in ((1, 1), (2, 3)):
        found = refitter.tensors(plan, position) if plan.kept[position].refitted else {}
        for name, tensor in found.items():
            if method != "units":  # which multiplies gains into the matrices
                own = base[base.architecture.layer_name(layer, name)]
                torch.testing.assert_close(tensor, own, rtol=0, atol=1e-4 * float(own.abs().max()))
    torch.testing.assert_close(final_states(refitter, plan), final_states(refitter, base_plan(N)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["linear", "outputs", "units"])
def test_shares_of_the_calibration_sum_up_to_the_whole(folder, tmp_path, method):
    plan = refitted(drop_block_plan(N, 2, 2), method, ridge=None)
    whole, shared = refitter_of(folder, tmp_path / "a"), refitter_of(folder, tmp_path / "b")
    whole.fit(plan)
    workers = [shared, refitter_of(folder, tmp_path / "b")]  # two workers of one cache
    for number in range(len(steps_of(plan))):
        parts = [worker.sums(plan, number, (share, 2)).pack() for share, worker in enumerate(workers)]
        shared.store(plan, number, workers[1].solve(plan, number, Sums.total(parts)))
    for name, tensor in whole.tensors(plan, 1).items():
        torch.testing.assert_close(shared.tensors(plan, 1)[name], tensor, rtol=1e-4, atol=1e-5)
    assert [r["ridge"] for r in shared.records(plan)] == pytest.approx(
        [r["ridge"] for r in whole.records(plan)], nan_ok=True
    )


def error_of(refitter, plan, shards=CALIBRATION):
    """Mean squared error of the last layer's states against the unmerged model's, relative to these."""
    target = final_states(refitter, base_plan(N), shards)
    return float((final_states(refitter, plan, shards) - target).square().mean() / target.square().mean())


def test_each_further_fit_brings_the_model_nearer_to_the_unmerged_one(refitter):
    dropped = drop_block_plan(N, 1, 2)
    plans = [dropped, *(refitted(dropped, "outputs", layers=layers, ridge=1e-4) for layers in (0, 1, 2))]
    errors = [error_of(refitter, plan) for plan in plans]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors
    linear = error_of(refitter, refitted(dropped, "linear", ridge=1e-4))
    assert errors[1] < linear < errors[0]


@pytest.mark.parametrize(("family", "offset"), [("llama", 0), ("gemma", 1), ("vaultgemma", 1), ("olmo", None)])
def test_units_are_those_that_contribute(tmp_path, family, offset):
    """Layer 2's MLP is all that counts: the seam takes its units, and with them layer 2's function."""
    folder = make_checkpoint(tmp_path / "m", family, hidden_size=16, intermediate_size=24, attention_bias=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-6)
    model.save_pretrained(folder)
    refitter = refitter_of(folder, tmp_path / "cache")
    plan = refitted(drop_block_plan(N, 2, 1), "units")
    found, deeper = refitter.tensors(plan, 1), Checkpoint(str(folder)).layer(2, dtype=torch.float32)
    norm = "pre_feedforward_layernorm.weight" if family == "vaultgemma" else "post_attention_layernorm.weight"
    gain = torch.ones(16) if family == "olmo" else deeper[norm] + offset
    torch.testing.assert_close(found["mlp.up_proj.weight"], deeper["mlp.up_proj.weight"] * gain)
    assert norm not in found if family == "olmo" else torch.equal(found[norm], torch.full((16,), 1.0 - offset))
    torch.testing.assert_close(found["mlp.down_proj.weight"], deeper["mlp.down_proj.weight"], rtol=0, atol=0.01)
    assert error_of(refitter, plan) < 1e-6
    assert error_of(refitter, replace(plan, refit=None)) > 0.01


def test_what_is_run_is_what_is_saved_and_proved(refitter, tmp_path):
    plan = refitted(block_plan(N, 2, [0.7, 0.4], name="b", kind="fixed"), "outputs", layers=1)
    checkpoint = refitter.runner.checkpoint
    record = save_merged(checkpoint, plan, tmp_path / "out", refits=refitter.tensors)
    assert record["refit"]["method"] == "outputs"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float64)
    ids = windows(9, 1)[0]
    states = merged_states(refitter.runner, plan, shard_of([ids]), None)
    normalised = refitter.runner.vocabulary.normalise(states[0].batches[0].states[0])
    logits = normalised @ checkpoint[checkpoint.architecture.unembedding].T
    torch.testing.assert_close(logits.double(), plain_logits(merged, ids), rtol=1e-3, atol=1e-3)
    found = receipts(checkpoint, checkpoint.architecture, plan, refits=refitter.tensors)
    after_the_seam = {r.tensor for r in found if r.max_abs_change and r.tensor.startswith("model.layers.1.")}
    assert len(after_the_seam) == 7  # the merged layer's matrices, two of them refitted
    with pytest.raises(PlanError, match="refitted on calibration tokens, which have not been given"):
        receipts(checkpoint, checkpoint.architecture, plan)


def test_fits_are_read_from_the_cache_and_belong_to_their_plan(refitter, folder, tmp_path):
    plan = refitted(drop_block_plan(N, 2, 1), "linear")
    found = refitter.tensors(plan, 1)
    again = Refitter(refitter.runner, refitter.cache)  # without calibration: it can only read
    assert torch.equal(again.tensors(plan, 1)["mlp.down_proj.weight"], found["mlp.down_proj.weight"])
    for other in (
        refitted(drop_block_plan(N, 2, 1), "linear", calibration="other"),
        refitted(drop_plan(N, 1), "linear"),
    ):
        with pytest.raises(RefitError, match="needs calibration tokens"):
            again.tensors(other, other.first_changed)


def test_a_fit_whose_file_is_cut_short_is_made_anew(refitter, caplog):
    plan = refitted(drop_block_plan(N, 2, 1), "linear")
    refitter.fit(plan)
    path = refitter.path(plan, 0)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert refitter.done(plan) == 0
    refitter.tensors(plan, 1)
    assert path.read_bytes() == content and f"the refit {path} cannot be read" in caplog.text


def test_states_that_are_held_are_not_another_plan_s_nor_a_later_layer_s(folder, tmp_path):
    """A worker is asked for the fits of one plan after another, and for those that its cache has lost."""
    shards = (shard_of(windows(0, 2, 30)),)
    refitter, fresh = (refitter_of(folder, tmp_path / name, shards) for name in ("cache", "other"))
    first, second = refitted(drop_block_plan(N, 2, 1), "outputs", layers=1), refitted(drop_block_plan(N, 3, 1), "scale")
    refitter.fit(first)
    path = refitter.path(first, 0)
    content = path.read_bytes()
    path.unlink()
    refitter.fit(first)
    assert path.read_bytes() == content
    found, expected = (each.tensors(second, 2)["mlp.down_proj.weight"] for each in (refitter, fresh))
    assert torch.equal(found, expected)


def test_a_fit_belongs_to_what_its_layers_were_matched_on(refitter):
    for alignment, differ in (("activations", True), ("neurons", False)):
        plan = refitted(replace(drop_block_plan(N, 2, 1), alignment=alignment), "outputs")
        paths = set()
        for data in ("one text", "another"):
            refitter.runner.aligner = Aligner(refitter.runner.checkpoint, data=data)
            paths.add(refitter.path(plan, 0))
        assert (len(paths) == 2) == differ


@pytest.mark.parametrize("method", ["linear", "units"])
def test_tokens_weigh_alike_where_a_fit_is_of_the_mlp_alone(refitter, method):
    plan = refitted(drop_block_plan(N, 2, 1), method)
    number, step = next((n, step) for n, step in enumerate(steps_of(plan)) if step.part != "units")
    (sums,) = refitter.sums(plan, number).equations
    targets = [refitter._target(step.target + 1, shard) for shard in CALIBRATION]
    expected = sum(len(t) if method == "linear" else token_weights(t).sum().item() for t in targets)
    assert sums.weight == pytest.approx(expected, rel=1e-6)


def test_massive_activations_do_not_count():
    target = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    target[3] *= 100
    weights = token_weights(target)
    assert weights[3] == 0 and (weights > 0).sum() == 49
    torch.testing.assert_close(weights[:3], 1 / target[:3].square().mean(1))


def test_families_without_the_algebra_are_refused_by_name(refitter):
    checkpoint = refitter.runner.checkpoint
    plan = refitted(drop_block_plan(N, 2, 1), "outputs")
    check_refittable(checkpoint, plan)
    with pytest.raises(RefitError, match="MLP units with biases, which llama has here"):
        check_refittable(checkpoint, refitted(drop_block_plan(N, 2, 1), "units"))
    with pytest.raises(RefitError, match="merges nothing"):
        check_refittable(checkpoint, refitted(base_plan(N), "outputs"))
    checkpoint.architecture = replace(checkpoint.architecture, name="sandwich", norm_inputs={})
    with pytest.raises(RefitError, match="does not have: do without it .plan.refit: none, no --refit; in a sweep"):
        check_refittable(checkpoint, plan)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("stablelm", "biases, which stablelm has here: post_attention_layernorm.bias; use refit outputs"),
        ("nemotron", "own for o and down and gate and up write .*, which nemotron does not have: use refit outputs"),
    ],
)
def test_units_behind_a_norm_with_a_bias_or_without_gates_are_refused(tmp_path, family, message):
    """Its share in what a unit reads would be another under another layer's norm."""
    checkpoint = Checkpoint(str(make_checkpoint(tmp_path / "m", family)))
    with pytest.raises(RefitError, match=message):
        check_refittable(checkpoint, refitted(drop_block_plan(N, 2, 1), "units"))
    check_refittable(checkpoint, refitted(drop_block_plan(N, 2, 1), "outputs"))


@pytest.mark.parametrize("family", ["glm4", "granite", "granitemoehybrid", "olmo3", "mixtral", "qwen2_moe"])
def test_a_refit_of_outputs_that_are_normalised_scaled_or_of_experts_is_refused(tmp_path, family):
    """They are not what is added to the residual stream, which a fit would take them for; an expert's are a share."""
    checkpoint = Checkpoint(str(make_checkpoint(tmp_path / "m", {"granitemoehybrid": "granite4"}.get(family, family))))
    with pytest.raises(RefitError, match=f"write straight into the residual .* which {family} does not have: do w"):
        check_refittable(checkpoint, refitted(drop_block_plan(N, 2, 1), "outputs"))


def test_a_scale_of_1_is_none(tmp_path):
    checkpoint = Checkpoint(str(make_checkpoint(tmp_path / "m", "granite", residual_multiplier=1.0)))
    check_refittable(checkpoint, refitted(drop_block_plan(N, 2, 1), "outputs"))


@pytest.mark.parametrize("family", ["cohere2", "gpt_neox"])
def test_a_refit_of_attention_and_mlp_side_by_side_is_refused(tmp_path, family):
    checkpoint = Checkpoint(str(make_checkpoint(tmp_path / "m", family)))
    for method in ("linear", "outputs"):
        with pytest.raises(RefitError, match=f"MLP follows their attention, and in {family} both read the layer's inp"):
            check_refittable(checkpoint, refitted(drop_plan(N, 1), method))


def test_units_are_weighed_by_tokens_however_these_are_cut_into_shards(folder, tmp_path):
    sequences, plan = windows(0, 3), refitted(drop_block_plan(N, 2, 1), "units")
    whole = refitter_of(folder, tmp_path / "a", (shard_of(sequences),)).sums(plan, 0)
    cut = refitter_of(folder, tmp_path / "b", (shard_of(sequences[:1]), shard_of(sequences[1:]))).sums(plan, 0)
    torch.testing.assert_close(cut.squares, whole.squares, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("sequences", "first", "expected"),
    [(5, 0, [0] * 15), (5, 4, [0] * 3 + [1] * 4 + [0] * 8), (4, 0, [0] * 14 + [1])],
    ids=["none_of_these", "a_whole_sequence", "the_last_fifth_of_few"],
)
def test_every_fifth_sequence_is_held_out_and_of_few_their_ends(sequences, first, expected):
    shard = shard_of([np.arange(4), np.arange(8)], prefix=range(3))
    assert _held_out(shard, first=first, sequences=sequences).tolist() == [bool(x) for x in expected]


def test_sums_of_units_add_up():
    total = Sums.total([Sums(squares=torch.ones(2, 3)), Sums(squares=torch.full((2, 3), 2.0))])
    assert torch.equal(total.squares, torch.full((2, 3), 3.0))


@pytest.mark.parametrize("asked", ["sums", "solve", "records"])
def test_a_worker_on_another_machine_makes_the_fits_that_it_lacks(refitter, folder, tmp_path, asked):
    """One that is restarted on another node, or joins in mid-fit, has none of them on its disk."""
    plan = refitted(drop_block_plan(N, 2, 2), "outputs", layers=1)
    sums = []
    for number in range(len(steps_of(plan))):
        sums.append(refitter.sums(plan, number))
        refitter.store(plan, number, refitter.solve(plan, number, sums[number]))
    last, other = len(sums) - 1, refitter_of(folder, tmp_path / "another machine's cache")
    near = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
    if asked == "sums":
        torch.testing.assert_close(other.sums(plan, last).equations[0].gram, sums[last].equations[0].gram, **near)
    elif asked == "solve":
        torch.testing.assert_close(other.solve(plan, last, sums[last]), refitter.solve(plan, last, sums[last]), **near)
    else:
        assert [row["layer"] for row in other.records(plan)] == [row["layer"] for row in refitter.records(plan)]
