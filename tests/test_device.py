"""The path of an accelerator, on a CPU: a fake device under which two devices must not meet (fake_device.py), what it
answers against the CPU's own path, and what happens when its memory runs out."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from fake_device import DEVICE, MixedDevices, fake_device
from torch.utils._python_dispatch import TorchDispatchMode

import raymerge.device
from raymerge.activations import POOLINGS, collect
from raymerge.alignment import Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.context import position_nll, retrieval_prompts, retrieve
from raymerge.evaluation import answer_shard, text_nll
from raymerge.forward import LayerRunner
from raymerge.gradient import Settings, descend
from raymerge.memory import MemoryPlanError, ScoringPlan
from raymerge.plan import Refit, base_plan, before_last_plan, drop_plan, tail_plan
from raymerge.prompts import encode_questions, encode_text
from raymerge.refit import Refitter, Sums, observe, steps_of
from raymerge.scoring import TailScorer
from raymerge.sources import SourceLayers
from raymerge.tail_layer import _Rotated
from raymerge.tail_loss import GradientError, LossWeights, TailLoss, TextWindows
from raymerge.tail_states import Layout
from raymerge.trunk import TrunkCache

torch.set_num_threads(1)

N = tiny.N_LAYERS
FIRST = N - 3
LIMIT = 2e-5  # float32 sums in another order
TEXT = "the red cat has a small box and two old birds in water near that long road of stone by night. " * 12


def found(*alphas, biases="keep", **options):
    return replace(tail_plan(N, alphas, name="x", kind="found", biases=biases), **options)


PLANS = [
    found(0.35, 0.8),
    found(0.2, 0.6),
    found(0.9, 0.1),
    drop_plan(N, 2),
    found(0.2, 0.6, biases="merge"),
    found(0.7, 0.6, biases="merge"),
    before_last_plan(N, 2),
    found(0.5, 0.5, norms="fold"),
    found(0.4, 0.9, matrix_alphas=(("self_attn.k_proj", (0.1, 0.9)), ("mlp.up_proj", (0.3, 0.3)))),
    found(0.3, 0.2, matrix_alphas=(("self_attn.v_proj", (0.6, 0.4)),)),
]


def close(one, other, limit=LIMIT):
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    assert one.shape == other.shape
    assert np.abs(one - other).max() <= limit * np.abs(other).max()


@pytest.fixture(scope="module")
def prompts():
    questions = tiny.make_questions({"cats": 5, "roads": 4, "boxes": 1})
    return encode_questions(questions, tiny.demo_tokenizer(), shard_tokens=250)


@pytest.fixture(scope="module")
def together():
    """The same kind of prompts with several sequences in a batch."""
    questions = tiny.make_questions({"cats": 4}, longest=6)
    return encode_questions(questions, tiny.demo_tokenizer())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(family, dtype=torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = tiny.make_checkpoint(tmp_path_factory.mktemp(family), family, dtype=dtype)
        return Checkpoint(str(made[family, dtype]))

    return make


@pytest.fixture
def device(monkeypatch):
    with fake_device(monkeypatch) as fake:
        yield fake


# -- the helper finds what it is for ---------------------------------------------------------------------------------


def test_two_devices_may_not_meet(device):
    here, away = torch.ones(3, device=DEVICE), torch.ones(3)
    assert here.device == DEVICE and away.device.type == "cpu" and away.to(DEVICE).device == DEVICE
    assert torch.cat([here[1:], here * 2]).device == DEVICE and here.cpu().device.type == "cpu"
    for mix in (
        lambda: here + away,
        lambda: torch.cat([here, away]),
        lambda: here[torch.tensor([0])],
        lambda: away[torch.tensor([0], device=DEVICE)],
        lambda: torch.nn.functional.linear(here, away[None]),
        lambda: torch.func.vmap(lambda row: row + away)(here[None]),
    ):
        with pytest.raises(MixedDevices):
            mix()
    with pytest.raises(TypeError):
        here.numpy()
    assert (here + torch.tensor(1.0)).tolist() == [2.0] * 3 and device.syncs == 1
    here[[0, 1]], here[None, np.array([2])]  # indices that torch moves to the device
    here[[2]] = 1.0
    here[0], here[:2], here[torch.tensor([0], device=DEVICE)]
    assert device.syncs == 4
    here[:2] = away[:2]  # copies
    here.copy_(away)
    assert here.numpy(force=True).tolist() == [1.0] * 3
    leaf = torch.ones(2, device=DEVICE, requires_grad=True)
    (leaf * 3).sum().backward()
    assert leaf.grad.device == DEVICE


def test_memory_runs_out_when_it_is_told_to(device):
    device.fail_above = 10
    assert raymerge.device.attempt(lambda: torch.ones(10, device=DEVICE))[0]
    assert raymerge.device.attempt(lambda: torch.ones(11, device=DEVICE)) == (False, None)
    with pytest.raises(ZeroDivisionError):
        raymerge.device.attempt(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("kind", "message", "lost"),
    [
        (getattr(torch, "AcceleratorError", RuntimeError), "CUDA error: an illegal memory access was", True),
        (RuntimeError, "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be", True),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa`", True),
        (RuntimeError, 'ok INTERNAL ASSERT FAILED at "/c10/cuda/CUDACachingAllocator.cpp":1, please report', True),
        (getattr(torch, "AcceleratorError", RuntimeError), "CUDA error: out of memory\nSearch for `cudaErrorMe", False),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB", False),
        (RuntimeError, "CUDA driver error: device not ready", True),
        (RuntimeError, "CUDA driver error: out of memory", False),
        (RuntimeError, "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", False),
        (ValueError, "CUDA error: unspecified launch failure", False),
    ],
)
def test_what_says_that_a_process_can_use_its_device_no_more(kind, message, lost):
    assert raymerge.device.is_lost(kind(message)) == lost


@pytest.mark.parametrize(
    ("kind", "message", "is_memory"),
    [
        (RuntimeError, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        (getattr(torch, "AcceleratorError", RuntimeError), "CUDA error: out of memory\nSearch for `cudaErrorMe", True),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa`", False),
        (RuntimeError, "CUDA driver error: out of memory", True),  # of expandable segments
        (RuntimeError, "CUDA driver error: invalid argument", False),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa`", False),
        (RuntimeError, "CUDA error: an illegal memory access was encountered", False),
        (RuntimeError, "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)", False),
        (ValueError, "CUDA error: out of memory", False),
    ],
)
def test_what_else_says_that_memory_ran_out(monkeypatch, kind, message, is_memory):
    """Page-locked host memory and cuBLAS's workspace are not torch's allocator's, nor are their errors. What is kept
    unused is given back then, and then alone."""
    released = []
    monkeypatch.setattr(raymerge.device, "release_cached", lambda: released.append(1))

    def call():
        raise kind(message)

    assert raymerge.device.attempt(lambda: 5) == (True, 5) and not released
    if is_memory:
        assert raymerge.device.attempt(call) == (False, None)
    else:
        with pytest.raises(kind):
            raymerge.device.attempt(call)
    assert len(released) == is_memory


@pytest.mark.parametrize(("share", "free"), [(0.9, 30), (0.5, 20)])
def test_what_is_free_of_a_card_is_within_this_process_s_share(monkeypatch, share, free):
    """Of 100 bytes 10 are free, and 50 torch's, of which 30 are in use: 20 more are for the taking."""
    for name, value in (("mem_get_info", (10, 100)), ("memory_allocated", 30), ("memory_reserved", 50),
                        ("get_per_process_memory_fraction", share)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert raymerge.device.device_memory(DEVICE) == (free, int(100 * share))


# -- scoring ---------------------------------------------------------------------------------------------------------

HOW = [
    ScoringPlan("device", "recompute", 8, 10**6),
    ScoringPlan("host", "recompute", 3, 64),
    ScoringPlan("device", "linear", 8, 64),
    ScoringPlan("host", "linear", 1, 10**6),
    ScoringPlan("device", "recompute", 1, 1),
]


def plans_for(checkpoint):
    """Those of PLANS that name no matrix which the family has fused."""
    matrices = set(checkpoint.architecture.matrices)
    return [plan for plan in PLANS if matrices.issuperset(matrix for matrix, _ in plan.matrix_alphas)]


@pytest.mark.parametrize(
    "family",
    ["llama", "llama_biases", "qwen3", "mistral_window", "glm4", "smollm3", "ministral3", "hunyuan_v1_dense"]
    + ["starcoder2", "cohere2", "phi", "gpt_neox"],
)
def test_every_plan_gives_the_cpus_answers(checkpoint, prompts, tmp_path, monkeypatch, family):
    """Wherever states lie and however many are scored at once; all in float32, so that only sums' order differs."""
    checkpoint = checkpoint(family)
    plans = plans_for(checkpoint)
    expected = list(TailScorer(TrunkCache(LayerRunner(checkpoint), FIRST, tmp_path / "cpu"), prompts).score_many(plans))
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        trunk, sources = TrunkCache(runner, FIRST, tmp_path / "device"), SourceLayers(runner, FIRST)
        for how in HOW if family == "llama" else HOW[:2]:
            scorer = TailScorer(trunk, prompts, sources=sources, plan=how)
            assert scorer.layer.states.tokens.device.type == {"device": "cuda", "host": "cpu"}[how.states]
            before = device.syncs
            for one, other in zip(scorer.score_many(plans), expected, strict=True):
                close(one, other)
            assert device.syncs == before  # nothing but the answers' copy waits
            assert scorer.plan == how
            few = scorer.select([7, 2, 4])
            close(few.score(PLANS[0])[0], expected[0][[7, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_moved_to_the_device_is_widened_there(checkpoint, prompts, tmp_path, monkeypatch, dtype):
    """Twice the bytes would travel, converted by one core: 25 GB for all of MMLU's states on an 8B model."""
    checkpoint = checkpoint("llama", torch.bfloat16)
    with fake_device(monkeypatch) as device:
        assert torch.ones(3, dtype=torch.bfloat16).to(DEVICE, torch.float32).dtype == torch.float32
        assert device.widened == 3  # the helper sees it
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=dtype)
        scorer = TailScorer(TrunkCache(runner, FIRST, tmp_path), prompts)
        list(scorer.score_many(PLANS[:2]))
        assert device.widened < 100  # coefficients


def test_short_prefixes_share_their_calls(checkpoint, tmp_path, monkeypatch):
    """Keys and values of 57 subjects' prefixes, one by one, would keep a GPU waiting for the CPU's calls."""
    subjects = {name: 2 for name in ("cats", "roads", "boxes", "birds", "hills", "lamps", "doors", "maps")}
    many = encode_questions(tiny.make_questions(subjects), tiny.demo_tokenizer())
    with fake_device(monkeypatch):
        runner = LayerRunner(checkpoint("llama"), device=DEVICE, dtype=torch.float32)
        scorer = TailScorer(TrunkCache(runner, FIRST, tmp_path), many)
        for chunk, groups in ((100_000, 1), (1, len(subjects))):
            layout = scorer.layer.states.layout
            found = layout.chunks(chunk, together=runner.accelerated).groups
            assert [prefix for group in found for prefix in group] == layout.prefixes
            assert len(found) == groups


def test_buckets_are_of_aligned_widths(device):
    """Rows of bfloat16 products begin at multiples of 16 bytes, and little is padding; a CPU's layout stays."""
    rng = np.random.default_rng(0)
    lengths = sorted(np.clip(rng.lognormal(np.log(73), 0.88, 14042), 20, 996).astype(int).tolist())  # as MMLU's
    found = {}
    for where, most in ((DEVICE, 32768), (torch.device("cpu"), 16384)):
        whole = Layout(range(14042), lengths, [0] * 14042, [600], bucket_tokens=most, device=where)
        buckets = whole.buckets
        assert [b.first for b in buckets] == np.cumsum([0, *(b.count for b in buckets[:-1])]).tolist()
        assert all(b.count * b.width <= most and b.width >= max(lengths[b.places]) for b in buckets)
        found[where.type] = {b.width % 8 for b in buckets}, whole.tokens - 600, len(buckets)
    assert found["cpu"][0] == set(range(8))
    aligned, tokens, count = found["cuda"]
    assert aligned == {0} and tokens < 1.04 * sum(lengths) and count < 80
    few = Layout([0], [20], [0], [600], bucket_tokens=16, device=DEVICE)  # one question is a bucket, however long
    assert [(b.count, b.width) for b in few.buckets] == [(1, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("still", [0, 4])
def test_heads_are_rotated_alike(dtype, still):
    """An accelerator's rotation against the products that a CPU computes: plain, of several candidates, and backwards;
    with heads before tokens."""
    candidates, n, t, heads, rotated = 3, 4, 5, 2, 6
    x = torch.randn(candidates, n * t, heads, rotated + still).to(dtype)
    cos, sin = torch.randn(2, n * t, 1, rotated)

    def products(x):
        turning, rest = x[..., :rotated].float(), x[..., rotated:].float()
        first, second = turning.chunk(2, -1)
        turned = turning * cos + torch.cat([-second, first], -1) * sin
        return torch.cat([turned, rest], -1).unflatten(0, (n, t)).transpose(1, 2)

    def fused(x):
        return _Rotated.apply(x, cos, sin, n, t)

    for one, other in ((fused(x[0]), products(x[0])), (torch.func.vmap(fused)(x), torch.func.vmap(products)(x))):
        assert one.dtype == torch.float32 and one.is_contiguous()
        close(one, other, 1e-6)
    close(torch.func.vmap(fused, 1)(x.movedim(0, 1)), torch.func.vmap(products)(x), 1e-6)
    pulled = []
    for rotate in (fused, products):
        leaf = x[0].clone().requires_grad_()
        rotate(leaf).mul(torch.arange(float(rotated + still))).square().sum().backward()
        pulled.append(leaf.grad)
    assert pulled[0].dtype == dtype
    close(pulled[0].float(), pulled[1].float(), 1e-6 if dtype == torch.float32 else 0.01)
    if dtype == torch.float32:
        assert torch.autograd.gradcheck(lambda x: _Rotated.apply(x, cos.double(), sin.double(), n, t), leaf.double())


class Copies(TorchDispatchMode):
    """Counts the values that are copied within for the sake of their order in memory."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "clone":
            self.most = max(self.most, found.numel())
        return found


@pytest.mark.parametrize("keys", ["recompute", "linear"])
def test_keys_are_not_copied_to_be_multiplied(checkpoint, prompts, tmp_path, monkeypatch, keys):
    """A product of each head wants its tokens side by side: keys are written so."""
    with fake_device(monkeypatch):
        runner = LayerRunner(checkpoint("llama"), device=DEVICE, dtype=torch.float32)
        scorer = TailScorer(TrunkCache(runner, FIRST, tmp_path), prompts, plan=ScoringPlan("device", keys, 3, 10**6))
        list(scorer.score_many(PLANS[:3]))
        with Copies() as copies:
            list(scorer.score_many(PLANS[:3]))
    pieces = scorer.layer._chunks().pieces
    assert copies.most < 3 * max(piece.count * piece.width for piece in pieces) * scorer.runner.layer_size.key


def test_what_is_summed_and_what_is_not(checkpoint, prompts, tmp_path, device):
    def linear(family, **options):
        runner = LayerRunner(checkpoint(family), device=DEVICE, dtype=options.pop("runner_dtype", torch.float32))
        return TailScorer(TrunkCache(runner, FIRST, tmp_path / family), prompts, **options)

    scorer = linear("llama")
    assert scorer.plan == ScoringPlan("device", "linear", 8, 32768) and not scorer.layer.holds_keys
    list(scorer.score_many([PLANS[6]]))
    ones = torch.ones(1, 3)
    assert scorer._key_coefficients(ones, 0).shape == (1, 3) and scorer._key_coefficients(ones, 2) is None
    # Biases, norms of keys, and merged matrices that are rounded more than the computation.
    unlike = ("llama_biases", "qwen3", "olmo3", "hunyuan_v1_dense")
    assert [linear(family).plan.keys for family in unlike] == ["recompute"] * 4
    # Not a norm's bias: what each source's matrix makes of it is summed with the rest.
    assert linear("nemotron").plan.keys == "linear"
    assert linear("llama", fused_dtype=torch.bfloat16).plan.keys == "recompute"
    assert linear("llama", fused_dtype=torch.bfloat16, compute_dtype=torch.bfloat16).plan.keys == "linear"


@pytest.mark.parametrize(
    ("family", "keys"),
    [("llama", "linear"), ("smollm3", "linear"), ("nemotron", "linear"), ("granite4_nope", "recompute")]
    + [(family, "recompute") for family in ("llama", "qwen2", "granite", "glm4", "olmo3", "hunyuan_v1_dense")]
    + [(family, "recompute") for family in ("starcoder2", "olmo", "stablelm", "cohere", "phi", "gpt_neox", "apertus")],
)
def test_bfloat16_agrees_with_float32(checkpoint, prompts, tmp_path, family, keys):
    """Same trunk, same rounded weights: states and products in bfloat16 move logits by its rounding and no answer."""
    runner = LayerRunner(checkpoint(family, torch.bfloat16))
    trunk, plans = TrunkCache(runner, FIRST, tmp_path), [p for p in plans_for(runner.checkpoint) if p.norms == "keep"]
    exact = torch.stack(list(TailScorer(trunk, prompts).score_many(plans)))
    how = ScoringPlan("device", keys, 4, 4096)
    scorer = TailScorer(trunk, prompts, compute_dtype=torch.bfloat16, plan=how)
    assert scorer.layer.states.tokens.dtype == torch.bfloat16
    narrow = torch.stack(list(scorer.score_many(plans)))
    # Five roundings to 8 bits (2^-9 each) in a row, of which weights this large pass on a multiple.
    assert (narrow - exact).norm() < 0.02 * exact.norm()
    first, second = exact.sort(-1, descending=True).values[..., :2].unbind(-1)
    clear = first - second > 0.02 * exact.abs().max()
    assert clear.float().mean() > 0.8
    assert (narrow.argmax(-1) == exact.argmax(-1))[clear].all()
    assert not torch.equal(narrow, exact)


def test_coefficients_are_not_rounded_to_the_stack(checkpoint, device):
    """The stack is bfloat16 on a device, coefficients and sums are not; a folded stack is float32."""
    weights = checkpoint("llama", torch.bfloat16)
    cpu = SourceLayers(LayerRunner(weights), FIRST)
    runner = LayerRunner(weights, device=DEVICE)
    narrow = SourceLayers(runner, FIRST)
    assert narrow.stack.dtype == torch.bfloat16 and narrow.stack.device == DEVICE
    assert SourceLayers(runner, FIRST, norms="fold").stack.dtype == torch.float32
    coefficients = torch.tensor([[0.6171, 0.2713, 0.1116], [0.3001, 0.3002, 0.3997]], dtype=torch.float64)
    for given in (coefficients, coefficients[:, None].expand(2, 7, 3)):
        close(narrow.mix(given, torch.float32).cpu(), cpu.mix(given, torch.float32), 1e-6)
    gradients = {"mlp.up_proj.weight": torch.randn(48, 32), "self_attn.q_proj.weight": torch.randn(32, 32)}
    pulled = narrow.pull_back({name: value.to(DEVICE) for name, value in gradients.items()})
    close(pulled, cpu.pull_back(gradients), 1e-6)


# -- everything else on the device -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_text_and_retrieval(checkpoint, prompts, tmp_path, monkeypatch, dtype):
    checkpoint, tokenizer = checkpoint("mistral_window", dtype), tiny.demo_tokenizer()
    text = encode_text(TEXT, tokenizer)
    plans = [PLANS[0], PLANS[3], found(0.4), found(0.3, 0.8, alignment="neurons"), found(0.3, 0.8, alignment="rows")]

    def everything(runner, folder):
        trunk, results = TrunkCache(runner, FIRST, folder), []
        for plan, cache in [(plan, cache) for plan in plans for cache in (trunk, None)]:
            shard = prompts.shards[0]
            answers = answer_shard(runner, plan, prompts, shard, trunk=cache, prompt_nll=True)
            results += [answers.logits, answers.logsumexp, answers.prompt_nll]
            results.append(text_nll(runner, plan, text[0], trunk=cache)[0])
            results.append(position_nll(runner, plan, text[0], trunk=cache, edges=[1, 64, 4096]).nll)
        asked = retrieval_prompts(tokenizer, distances=[20], per_distance=2, seed=0)
        return [*results, retrieve(runner, plans[0], asked, asked.shards[0]).logits]

    options = {"dtype": dtype}
    expected = everything(LayerRunner(checkpoint, **options), tmp_path / "cpu")
    with fake_device(monkeypatch):
        aligner = Aligner(checkpoint, device=DEVICE)
        results = everything(LayerRunner(checkpoint, device=DEVICE, aligner=aligner, **options), tmp_path / "device")
    for one, other in zip(results, expected, strict=True):
        close(one, other, LIMIT if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_activations(checkpoint, prompts, monkeypatch, pooling):
    checkpoint = checkpoint("llama")
    expected = collect(LayerRunner(checkpoint), prompts.shards, pooling=pooling)
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        device.syncs = 0
        results = collect(runner, prompts.shards, pooling=pooling)
        assert device.syncs <= 2 * N  # one look a layer at whether it is finite, one at its influence
    close(results.distances, expected.distances)
    close(results.block_influence, expected.block_influence)


def test_units_for_alignment(checkpoint, together, monkeypatch):
    checkpoint = checkpoint("llama")

    def units(runner):
        return runner.mlp_units(runner.embed(together.shards[0]), 0)

    expected = units(LayerRunner(checkpoint))
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        close(units(runner).cpu(), expected)
        # In the middle of a layer: MLP units of several sequences.
        device.fail_next, device.fail_when = 3, lambda t: t.dim() == 3 and len(t) > 1 and t.shape[-1] == 48
        close(units(runner).cpu(), expected)
        assert device.failures == 3


def losses(runner, prompts, folder, **options):
    trunk = TrunkCache(runner, FIRST, folder)
    text = TextWindows(trunk, encode_text(TEXT, tiny.demo_tokenizer()), reference=True, windows=1, positions=40)
    weights = LossWeights(1.0, 0.5, 0.1, 0.1)
    template = found(0.6, 0.6)
    scorer = TailScorer(trunk, prompts, **options)
    reference = torch.randn(len(prompts.answers), 4, generator=torch.Generator().manual_seed(0))
    return TailLoss(scorer, template, weights, reference=reference, text=text)


@pytest.mark.parametrize("states", ["device", "host"])
def test_gradients_in_parts(checkpoint, prompts, tmp_path, monkeypatch, states):
    checkpoint = checkpoint("llama_biases")
    coefficients = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rows, held_out = [0, 2, 3, 5, 6, 9], [1, 4, 7, 8]

    def evaluate(loss):
        drawn = loss.text.draw(0)
        return [
            loss(coefficients, drawn=drawn),
            loss(coefficients, rows=rows, held_out=held_out, drawn=drawn),
            loss(coefficients, rows=rows[:2], drawn=drawn),
        ]

    expected = evaluate(losses(LayerRunner(checkpoint), prompts, tmp_path / "cpu"))
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        loss = losses(runner, prompts, tmp_path / "device", plan=ScoringPlan(states, "recompute", 2, 64))
        device.fail_when = lambda t: t.dim() == 2 and t.shape[-1] == 4 and len(t) > 1  # logits
        for at_once, failures in ((100, 0), (3, 0), (4, 1)):
            loss._at_once, device.fail_next = at_once, failures
            for one, other in zip(evaluate(loss), expected, strict=True):
                close(one.loss, other.loss)
                if other.held_out is not None:
                    close(one.held_out, other.held_out)
                if other.gradient is not None:
                    close(one.gradient, other.gradient, 10 * LIMIT)
        settings = Settings("simplex", learning_rate=0.1, epochs=2, held_out=0.3)
        assert descend(loss, settings).history[-1].loss < descend(loss, settings).history[0].loss
        device.fail_next, loss._at_once = 10**6, None
        device.fail_when = lambda t: t.dim() == 2 and t.shape[-1] == 4
        with pytest.raises(GradientError, match="a single question runs out"):
            evaluate(loss)


# -- memory that runs out --------------------------------------------------------------------------------------------


def test_scoring_goes_on_with_less(checkpoint, prompts, tmp_path, monkeypatch):
    checkpoint = checkpoint("llama")
    expected = list(TailScorer(TrunkCache(LayerRunner(checkpoint), FIRST, tmp_path / "cpu"), prompts).score_many(PLANS))
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        trunk = TrunkCache(runner, FIRST, tmp_path / "device")
        # Errors out of the blue.
        scorer = TailScorer(trunk, prompts)
        start = scorer.plan
        for failures in (1, 2, 3, 5):
            device.fail_next = failures
            for one, other in zip(scorer.score_many(PLANS), expected, strict=True):
                close(one, other)
            assert device.fail_next == 0
        assert scorer.plan != start and scorer.plan.chunk_tokens <= 8192
        # A limit that one candidate's chunk keeps and several candidates' do not.
        scorer = TailScorer(trunk, prompts)
        device.fail_above = max(scorer.sources.stack.numel(), 1024 * 32)
        for one, other in zip(scorer.score_many(PLANS), expected, strict=True):
            close(one, other)
        assert scorer.plan.candidates < 8
        # None at all.
        device.fail_above = 1000
        with pytest.raises(MemoryPlanError, match=r"on 10 questions .*256 tokens at a time.*take fewer questions"):
            list(scorer.score_many(PLANS))
        assert scorer.plan == ScoringPlan("host", "recompute", 1, 256)
        device.fail_above = float("inf")
        close(next(scorer.score_many(PLANS)), expected[0])  # and it goes on when there is room again


def test_the_host_is_asked_before_states_move_there(checkpoint, prompts, tmp_path, monkeypatch):
    """Page-locked memory that the machine does not have would take it from everything else, or end the process."""
    checkpoint = checkpoint("llama")
    expected = list(TailScorer(TrunkCache(LayerRunner(checkpoint), FIRST, tmp_path / "cpu"), prompts).score_many(PLANS))
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        trunk = TrunkCache(runner, FIRST, tmp_path / "device")
        last = ScoringPlan("device", "recompute", 1, 8192)

        def pinned(*_):
            raise RuntimeError("CUDA error: out of memory")

        for name, stand_in in (("scoring.host_free", lambda: 10**4), ("tail_states.host_buffer", pinned)):
            with monkeypatch.context() as patched:
                scorer = TailScorer(trunk, prompts, plan=last)
                patched.setattr(f"raymerge.{name}", stand_in)
                # It goes on with smaller chunks instead.
                device.fail_next = 2
                for one, other in zip(scorer.score_many(PLANS), expected, strict=True):
                    close(one, other)
                assert scorer.plan == replace(last, chunk_tokens=2048) and device.fail_next == 0
                device.fail_above = 1000
                with pytest.raises(MemoryPlanError, match=r"256 tokens .* the host has no room .*fewer questions"):
                    list(scorer.score_many(PLANS))
                # And what was planned for more than there is.
                with pytest.raises(MemoryPlanError, match=r"scoring 10 questions .* of host memory, which has .*"):
                    TailScorer(trunk, prompts, sources=scorer.sources, plan=last)
                device.fail_above = float("inf")


def test_layers_are_kept_given_up_and_run_in_halves(checkpoint, together, monkeypatch):
    checkpoint, prompts = checkpoint("qwen2"), together
    (shard,) = prompts.shards
    expected = answer_shard(LayerRunner(checkpoint), PLANS[0], prompts, shard).logits
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        answers = answer_shard(runner, PLANS[0], prompts, shard).logits
        close(answers, expected)
        # Those before the merged layer, and those that it is made of: what other plans are made of as well.
        assert set(runner._resident) == set(range(N))
        assert runner.kept_bytes == (N + 1) * runner.layer_size.parameters * 4
        loads = []
        monkeypatch.setattr(runner, "fused", lambda *a, **k: loads.append(a) or LayerRunner.fused(runner, *a, **k))
        answer_shard(runner, PLANS[0], prompts, shard)
        assert not loads
        answer_shard(runner, PLANS[1], prompts, shard)
        assert len(loads) == 1
        before = device.moved
        merged, saved = runner.fused(PLANS[2], FIRST), LayerRunner(checkpoint).fused(PLANS[2], FIRST)
        assert all(torch.equal(tensor.cpu(), saved[name]) for name, tensor in merged.items())
        assert device.moved == before
        rounding = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32, quantise="int8")
        found, before = rounding.fused(PLANS[2], FIRST), device.moved  # of layers that are not rounded
        assert all(torch.equal(tensor.cpu(), saved[name]) for name, tensor in found.items())
        runner.release()
        assert not runner.kept_bytes
        runner.fused(PLANS[2], FIRST)
        assert device.moved == before + 3 * runner.layer_size.parameters and set(runner._resident) == {2, 3, 4}
        held = []

        def load():
            held.append(len(runner._resident))
            if len(held) == 1:
                raise torch.OutOfMemoryError
            return {}

        assert runner._kept({}, 0, load) == {} and held == [3, 0]
        runner.release()
        device.free = device.total // 3  # a third is free: nothing stays
        close(answer_shard(runner, PLANS[0], prompts, shard).logits, expected)
        assert not runner._resident and not runner.kept_bytes
        device.fail_when = lambda t: t.dim() == 3 and len(t) > 1 and t.shape[-1] == 48
        for failures in (1, 2, 4):
            device.fail_next = failures
            close(answer_shard(runner, PLANS[0], prompts, shard).logits, expected)
        assert device.fail_next == 0
        device.fail_next = 10**6  # there is never room for two
        close(answer_shard(runner, PLANS[0], prompts, shard).logits, expected)


@pytest.mark.parametrize("family", ["llama_dynamic", "phi3_longrope", "ministral3"])
def test_layers_wait_for_nothing(checkpoint, together, monkeypatch, family):
    """By themselves `dynamic`, and before transformers 5.24 `longrope`, ask in every call which position is largest."""
    checkpoint, (shard,) = checkpoint(family), together.shards
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        states, layers = runner.embed(shard), runner.plan_layers(base_plan(N))
        before = device.syncs
        runner.run(states, layers)
        assert device.syncs == before


def test_layers_that_the_runner_keeps_make_room_for_states(checkpoint, prompts, tmp_path, monkeypatch):
    checkpoint = checkpoint("llama")
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        trunk = TrunkCache(runner, FIRST, tmp_path)
        for shard in prompts.shards:
            trunk.compute(shard)
        assert runner.kept_bytes
        TailScorer(trunk, prompts)
        assert runner.kept_bytes  # there is room for both
        device.free = 10**6
        with pytest.raises(MemoryPlanError):
            TailScorer(trunk, prompts)
        assert runner.kept_bytes  # which would not have helped
        monkeypatch.setattr(LayerRunner, "kept_bytes", 10**9)
        TailScorer(trunk, prompts)
        assert not runner._resident


def test_what_the_driver_is_told(monkeypatch):
    """Products keep their digits whatever a container's environment asks for, attention is not cuDNN's, and pinned
    memory is given back with the rest."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("device"))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: told.append("host"), raising=False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: told.append(share))
    products = torch.backends.cuda.matmul
    cut = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
    attention, before = torch.backends.cuda.cudnn_sdp_enabled(), [getattr(products, name) for name in cut]
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(True)
    for name in cut:
        setattr(products, name, True)
    try:
        assert raymerge.device.choose_device(0.25) == DEVICE
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not any(getattr(products, name) for name in cut)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_cudnn_sdp(attention)
        for name, value in zip(cut, before, strict=True):
            setattr(products, name, value)
    raymerge.device.release_cached()
    assert told == [0.25, "device", "host"]


def test_a_cpu_takes_what_it_always_did(checkpoint, prompts, tmp_path):
    scorer = TailScorer(TrunkCache(LayerRunner(checkpoint("llama")), FIRST, tmp_path), prompts)
    assert (
        scorer.plan == ScoringPlan("device", "recompute", 1, 16384)
        and scorer.layer.states.tokens.dtype == torch.float32
    )
    assert raymerge.device.host_free() > 0
    assert raymerge.device.choose_device(0) == torch.device("cpu")


def test_files_that_were_read_take_no_memory_of_a_container(tmp_path, monkeypatch):
    """After 100 GB of weights all of a container's memory may be in use, by pages that go when something needs them."""
    monkeypatch.setattr(raymerge.device, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("10000000\n")
    (tmp_path / "memory.current").write_text("9900000\n")
    (tmp_path / "memory.stat").write_text("anon 900000\nfile 9000000\nshmem 2000000\nactive_file 4000000\n"
                                          "inactive_file 3000000\nslab 100\n")  # fmt: skip
    assert raymerge.device.host_free() == 7100000
    (tmp_path / "memory.max").write_text("max\n")
    assert raymerge.device.host_free() > 10000000
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 300 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(raymerge.device, "Path", lambda _: tmp_path / "meminfo")
    assert raymerge.device.host_free() == 5000 * 1024
    (tmp_path / "memory.max").write_text("1000000000\n")  # of a machine that has less
    assert raymerge.device.host_free() == 5000 * 1024


def test_spans_come_as_they_are_on_a_cpu():
    source = torch.arange(20.0).view(10, 2)
    parts = list(raymerge.device.streamed(source, [(0, 3), (3, 10), (2, 2)], torch.device("cpu")))
    assert [part.tolist() for part in parts] == [source[:3].tolist(), source[3:].tolist(), []]


class _Stream:
    """A queue of a device: what is put into it runs when something makes it, in its order."""

    def __init__(self, at_once):
        self.queue, self.done, self.at_once = [], 0, at_once

    def put(self, call):
        self.queue.append(call)
        if self.at_once:
            self.run(len(self.queue))

    def run(self, until):
        while self.done < until:
            self.done += 1
            self.queue[self.done - 1]()

    def record_event(self):
        return self, len(self.queue)

    def wait_event(self, event):
        self.put(lambda: event[0].run(event[1]))

    def wait_stream(self, other):
        self.wait_event(other.record_event())


@pytest.mark.parametrize("early", ["copies", "computing"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 6])
def test_copies_that_overlap_with_computing_are_neither_late_nor_early(monkeypatch, early, count):
    """Of two queues one runs at once and the other only when it is waited for: what is read of a span is always its
    own, and when all is done no copy is left to be made."""
    computing, copying = (_Stream(at_once=early == name) for name in ("computing", "copies"))
    current, source = [computing], torch.arange(40.0).view(20, 2)

    class Buffer:
        def __init__(self, values):
            self.values = values

        def __getitem__(self, rows):
            return Buffer(self.values[rows])

        def copy_(self, rows, non_blocking):
            assert non_blocking
            current[-1].put(lambda: self.values.copy_(rows))

    class Source:
        shape = source.shape

        def new_empty(self, shape, *, device, pin_memory):
            assert device == DEVICE and not pin_memory
            return Buffer(torch.full(tuple(shape), torch.nan))

        def __getitem__(self, rows):
            return source[rows]

    @contextmanager
    def within(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "stream", within)
    spans, read = [(3 * i, 3 * i + 1 + i % 3) for i in range(count)], []
    for part in raymerge.device.streamed(Source(), spans, DEVICE):
        computing.put(lambda part=part: read.append(part.values.tolist()))
    computing.run(len(computing.queue))
    assert read == [source[start:stop].tolist() for start, stop in spans]
    assert copying.done == len(copying.queue)


# -- refits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "scale", "outputs", "units"])
def test_refits(checkpoint, prompts, tmp_path, monkeypatch, method):
    """What workers send each other are tensors of the CPU: the driver may have no device to unpack others on."""
    checkpoint = checkpoint("llama")
    ridge = {"ridge": None if method == "outputs" else 0.01, "layers": int(method == "outputs")}
    plan = replace(drop_plan(N, 2), refit=Refit(method, calibration="c", **ridge))

    def fitted(runner, folder):
        refitter = Refitter(runner, folder, lambda: prompts.shards)
        runner.refits, sent = refitter.tensors, []
        for number in range(len(steps_of(plan))):
            parts = [refitter.sums(plan, number, (start, 2)).pack() for start in range(2)]
            sent += [part.squares for part in parts if part.squares is not None]
            found = refitter.solve(plan, number, Sums.total(parts))
            sent += found.values()
            refitter.store(plan, number, found)
        tensors = [sorted(refitter.tensors(plan, position).items()) for position in plan.refit_targets]
        return sum(tensors, []), sent, answer_shard(runner, plan, prompts, prompts.shards[0]).logits

    expected, _, logits = fitted(LayerRunner(checkpoint), tmp_path / "cpu")
    with fake_device(monkeypatch) as device:
        runner, fused = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32), []
        monkeypatch.setattr(runner, "fused", lambda *a, **k: fused.append(a[1]) or LayerRunner.fused(runner, *a, **k))
        found, sent, answers = fitted(runner, tmp_path / "device")
        assert not any(device.on(tensor) for tensor in sent)
        # On the device, and a layer that states pass on their way once for each share, not for each of its shards.
        assert len(prompts.shards) > 2
        assert 3 * len(steps_of(plan)) <= len(fused) <= 3 * len(steps_of(plan)) + 2 * len(plan.refit_targets)
    for (name, one), (other_name, other) in zip(found, expected, strict=True):
        assert name == other_name
        close(one, other, 1e-3)
    close(answers, logits, 1e-3)


def test_what_a_layer_reads_is_seen_also_where_a_batch_runs_out_of_memory(checkpoint, together, monkeypatch):
    checkpoint, shard = checkpoint("llama"), together.shards[0]

    def seen(runner):
        return observe(runner, runner.embed(shard), 0, runner.weights(0))

    expected = seen(LayerRunner(checkpoint))
    with fake_device(monkeypatch) as device:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.float32)
        # In the middle of a layer, when attention and the norm after it have been seen.
        device.fail_next, device.fail_when = 3, lambda t: t.dim() == 3 and len(t) > 1 and t.shape[-1] == 48
        found = seen(runner)
        assert device.failures == 3 and found.keys() == expected.keys()
        for name, values in found.items():
            close(values.cpu(), expected[name])
