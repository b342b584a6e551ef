"""What workers answer on an accelerator, against the same workers on the CPU; and what is said to its driver.

Without an accelerator the workers run on the stand-in of fake_device.py, which shows that the code holds together and
nothing of a card's arithmetic; what only a card can show is skipped. On a machine that has one, without Ray:

    python -m pytest tests/test_accelerator.py       # RAYMERGE_REAL_MODEL and RAYMERGE_MMLU: the same on a real model
"""

import contextlib
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_device import fake_device
from test_gpu_benchmark import load

from raymerge import device as driver
from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.evaluation import Answers
from raymerge.forward import LayerRunner, visible
from raymerge.inputs import CALIBRATION, REPORT, SEARCH, SUBSETS, TEXT
from raymerge.memory import ScoringPlan
from raymerge.plan import Refit, base_plan, before_last_plan, block_plan, drop_plan, tail_plan
from raymerge.scoring import TailScorer
from raymerge.trunk import TrunkCache
from raymerge.worker import ModelWorker

REAL_MODEL, MMLU = os.environ.get("RAYMERGE_REAL_MODEL"), os.environ.get("RAYMERGE_MMLU")
CARD = torch.cuda.is_available()
needs_card = pytest.mark.skipif(not CARD, reason="torch sees no CUDA device")
needs_model = pytest.mark.skipif(
    not (REAL_MODEL and MMLU), reason="RAYMERGE_REAL_MODEL (a checkpoint) and RAYMERGE_MMLU (its CSVs) are not both set"
)

SETTINGS = [
    "data.perplexity_tokens=600",
    "calibration.tokens=600",
    "similarity.samples=12",
    "similarity.entropy_neighbors=4",
    "similarity.null_draws=20",
    "similarity.interval_draws=10",
    "gradient.epochs=2",
    "output.store_candidate_answers=true",
]


DEMO = ["data.limit_per_subject=2", "data.report_limit_per_subject=2"]
FEW = ["data.subjects=['word_opposites','colour_mixing','number_words']"]
FLOAT32 = 2e-4  # of logits: sums in another order, through every layer


@pytest.fixture
def on_device(monkeypatch):
    """A function that calls another on the card, or on its stand-in."""

    def call(function, *arguments, **options):
        with contextlib.nullcontext() if CARD else fake_device(monkeypatch):
            return function(*arguments, **options)

    return call


def plans_of(n_layers, merges, middle):
    alphas = np.linspace(0.3, 0.8, merges).tolist()
    found = {"kind": "found"}
    refit = Refit("outputs", ridge=0.1, calibration="of this test")
    plans = [
        base_plan(n_layers),
        tail_plan(n_layers, alphas, name="merged", **found),
        replace(block_plan(n_layers, middle, alphas, name="outputs", **found), refit=refit),
        drop_plan(n_layers, merges),
        before_last_plan(n_layers, merges),
        tail_plan(n_layers, alphas, name="aligned", alignment="neurons", **found),
        block_plan(n_layers, middle, alphas, name="middle", **found),
        replace(block_plan(n_layers, middle, alphas, name="units", **found), refit=replace(refit, method="units")),
    ]
    return plans if CARD else plans[:3]  # the stand-in takes its time


def answers_of(settings, cache, merges, *, gpus):
    """Everything that the command line makes a worker do, by name, as arrays."""
    config = load_config(None, [*settings, f"workers.gpus_per_worker={gpus}"])
    n_layers = Checkpoint(config.model.path).n_layers
    template = tail_plan(n_layers, [0.5] * merges, name="candidate", kind="found")
    first, middle = template.resumes_at, n_layers // 2 - merges // 2
    roles = (SEARCH, REPORT, SUBSETS, CALIBRATION)
    worker = ModelWorker(config, roles=roles, cache=cache, template=template, firsts=[middle - 1, first])
    assert (worker.describe()["device"] == "cpu") == (gpus == 0)
    found = {}
    for plan in plans_of(n_layers, merges, middle):
        parts = [worker.answers((plan, REPORT, number, True)) for number in range(len(worker.prompts.shards(REPORT)))]
        answers = Answers.join(parts)
        losses = [worker.text_nll((plan, number)) for number in range(len(worker.prompts.shards(TEXT)))]
        changes = [receipt.relative_change for receipt in worker.receipts(plan)]
        found |= {
            f"logits of {plan.name}": answers.logits,
            f"logsumexp of {plan.name}": answers.logsumexp,
            f"loss of {plan.name}'s prompts": answers.prompt_nll,
            f"loss of {plan.name}'s text": np.array([part.nll.sum() / part.tokens.sum() for part in losses]),
            f"changes of {plan.name}": np.array([0.0, *changes]),
        }
    found["collapsed"] = worker.answers((plans_of(n_layers, merges, middle)[1], REPORT, None, False)).logits
    vectors = np.random.default_rng(0).uniform(size=(9, merges))  # more than are scored at once
    found["candidates"] = np.concatenate([result["logits"] for result in worker.score(vectors.tolist())])
    (descent,) = worker.descend([[0.5] * merges], "simplex")
    found["descent"] = np.array([epoch.loss for epoch in descent["history"]])
    found["similarity"] = worker.similarity(0).study.matrix.values
    found["distances"] = worker.activations(0).distances
    found["depths"] = worker.state_distances(0)[0]
    return found


def compare(found, expected, limit):
    """Each by the largest of its own values; answers also by what is chosen, where the two best are not a tie."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        here, there = np.nan_to_num(found[name]), np.nan_to_num(values)
        assert here.shape == there.shape, name
        error = np.abs(here - there).max()
        assert error <= limit * np.abs(there).max(), f"{name}: {error} apart, of at most {np.abs(there).max()}"
        if values.ndim == 2 and values.shape[1] == 4:
            best = np.sort(there, axis=1)
            clear = best[:, -1] - best[:, -2] > 2 * error
            assert clear.any() and (here.argmax(1) == there.argmax(1))[clear].all(), name


def test_a_worker_answers_as_on_the_cpu(tmp_path, on_device):
    settings = [*SETTINGS, *DEMO, "model.dtype=float32", *([] if CARD else FEW)]
    expected = answers_of(settings, tmp_path / "cpu", 3, gpus=0)
    compare(on_device(answers_of, settings, tmp_path / "device", 3, gpus=1), expected, FLOAT32)


@needs_card
def test_half_precision_on_the_card_answers_as_single_on_the_cpu(tmp_path):
    settings = [*SETTINGS, *DEMO]
    expected = answers_of(settings, tmp_path / "cpu", 3, gpus=0)
    found = answers_of([*settings, "model.dtype=bfloat16"], tmp_path / "card", 3, gpus=1)
    del expected["similarity"], found["similarity"]  # of nearest neighbours, which rounding may change
    compare(found, expected, 0.05)


@needs_card
@needs_model
@pytest.mark.real_model
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_a_real_model_answers_as_on_the_cpu(tmp_path, dtype, limit):
    """Predictions of every plan and candidate; losses, fits and changes within what sums in another order explain."""
    settings = [*SETTINGS, f"model.path={REAL_MODEL}", f"data.mmlu={MMLU}", "data.limit_per_subject=4"]
    settings += ["data.report_limit_per_subject=4", "data.subjects=['anatomy','astronomy','marketing']"]
    expected = answers_of([*settings, "model.dtype=float32"], tmp_path / "cpu", 6, gpus=0)
    found = answers_of([*settings, f"model.dtype={dtype}"], tmp_path / "card", 6, gpus=1)
    if dtype == "bfloat16":
        del expected["similarity"], found["similarity"]
    compare(found, expected, limit)


# -- what is said to the driver --------------------------------------------------------------------------------------


@needs_card
def test_spans_arrive_whole_while_others_are_computed_with():
    """Copies ahead of the computation must neither come late nor overwrite what is still being read."""
    source = driver.host_buffer((4096, 4096), torch.float32, driver.choose_device())
    assert source.is_pinned()
    source.copy_(torch.arange(4096.0)[:, None].expand(-1, 4096))
    card, busy = driver.choose_device(), torch.randn(4096, 4096, device=driver.choose_device())
    spans = [(start, min(start + 300, 4096)) for start in range(0, 4096, 300)]
    for _ in range(5):
        seen = []
        for part in driver.streamed(source, spans, card):
            busy = torch.nn.functional.normalize(busy @ busy)  # the computation lags far behind the copies
            seen.append((part * 1.0).mean(1) + 0.0 * busy[0, 0])
        assert torch.equal(torch.cat(seen).cpu(), torch.arange(4096.0))
    # A caller that leaves early leaves nothing half copied behind.
    for part in driver.streamed(source, spans, card):
        first = part.clone()
        break
    filled = [torch.full((300, 4096), 7.0, device=card) for _ in range(8)]
    torch.cuda.synchronize()
    assert (first.cpu() == source[:300]).all() and all((tensor == 7.0).all() for tensor in filled)


@needs_card
def test_memory_that_torch_holds_without_using_counts_as_free():
    card = driver.choose_device()
    driver.release_cached()
    before = driver.device_memory(card)
    assert 0 < before.free <= before.total
    taken = torch.empty(2**30, dtype=torch.uint8, device=card)
    assert before.free - driver.device_memory(card).free == pytest.approx(2**30, rel=0.05)
    del taken
    assert driver.device_memory(card).free == pytest.approx(before.free, rel=0.01)


@needs_card
def test_a_share_of_the_card_bounds_what_is_taken_and_running_out_of_it_is_survived():
    whole = driver.device_memory(driver.choose_device())
    try:
        card = driver.choose_device(0.25)
        share = driver.device_memory(card)
        assert share.total == pytest.approx(whole.total / 4, rel=0.01) and share.free <= share.total
        ended, _ = driver.attempt(lambda: torch.empty(share.total + 2**28, dtype=torch.uint8, device=card))
        assert not ended
        assert driver.device_memory(card).free == pytest.approx(share.free, rel=0.05)
        ended, made = driver.attempt(lambda: torch.empty(share.free // 2, dtype=torch.uint8, device=card))
        assert ended and made.is_cuda
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_card
def test_librarys_kernels_are_right_at_shapes_that_others_failed_at():
    """More products at once than a grid's third side has blocks; and one head of keys, repeated without a copy under a
    mask, as a family with one has it behind a prefix (pytorch/pytorch#191937: wrong where 32 divides all keys but one).
    """
    card = driver.choose_device()
    one, two = (torch.randn(70_000, *shape, device=card) for shape in ((4, 32), (32, 8)))
    assert torch.allclose(torch.bmm(one, two), (one[:, :, :, None] * two[:, None]).sum(2), atol=1e-4)
    for count in range(30, 100):
        query = torch.randn(2, 4, 8, 64, device=card, dtype=torch.bfloat16)
        keys, values = torch.randn(2, 2, 1, count, 64, device=card, dtype=torch.bfloat16)
        mask = visible(torch.arange(count - 8, count), torch.arange(count), None)[None, None].to(card)
        repeated = [x.expand(-1, 4, -1, -1) for x in (keys, values)]
        found = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask)
        scores = (query.float() @ repeated[0].float().mT / 8).masked_fill(~mask, -torch.inf)
        assert torch.allclose(found.float(), scores.softmax(-1) @ repeated[1].float(), atol=0.05), count


@needs_card
@pytest.mark.parametrize(
    "how",
    [
        ScoringPlan("host", "recompute", 8, 512),  # pinned, copied a piece ahead
        ScoringPlan("host", "recompute", 1, 10**6),
        ScoringPlan("device", "linear", 8, 4096),
        ScoringPlan("device", "recompute", 3, 256),
    ],
)
def test_every_plan_of_memory_gives_the_same_answers(tmp_path, how):
    worker, vectors = scoring_worker(tmp_path, "model.dtype=float32")
    plans = [worker.template.with_flat_alphas(vector, (), name="x", kind="found") for vector in vectors]
    trunk = worker._trunk_of(worker.template)
    options = {"fused_dtype": torch.float32}  # unrounded, so that keys may be summed
    expected = list(TailScorer(trunk, worker.prompts.of(SEARCH), **options).score_many(plans))
    found = list(TailScorer(trunk, worker.prompts.of(SEARCH), plan=how, **options).score_many(plans))
    compare({"candidates": torch.cat(found).numpy()}, {"candidates": torch.cat(expected).numpy()}, FLOAT32)


def scoring_worker(cache, *settings):
    """A worker that scores candidates of the demo model, and coefficients of more than are scored at once."""
    template = tail_plan(Checkpoint("demo").n_layers, [0.5] * 3, name="candidate", kind="found")
    options = {"cache": cache, "template": template, "firsts": [template.resumes_at]}
    worker = ModelWorker(load_config(None, [*SETTINGS, *DEMO, *settings]), roles=(SEARCH,), **options)
    return worker, np.random.default_rng(0).uniform(size=(9, 3)).tolist()


@needs_card
def test_memory_that_is_gone_makes_the_plan_smaller_and_changes_no_answer(tmp_path):
    """Real errors of the allocator, not injected ones: half of what the plan counts on is taken once it is made."""
    gpu, card = load(), driver.choose_device()
    checkpoint = gpu.RandomCheckpoint("1b", card, torch.float32)
    first = checkpoint.n_layers - 5
    trunk = TrunkCache(LayerRunner(checkpoint, device=card), first, tmp_path)
    scorer = TailScorer(trunk, gpu.make_prompts(200, 128000, longest=200))
    alphas = np.random.default_rng(0).uniform(0.3, 0.7, (8, 4)).tolist()
    plans = [tail_plan(checkpoint.n_layers, each, name="x", kind="found") for each in alphas]
    list(scorer.score_many(plans))  # what is made once stays
    torch.cuda.reset_peak_memory_stats(card)
    whole, held, total = scorer.plan, torch.cuda.memory_allocated(card), driver.device_memory(card).total
    expected = torch.cat(list(scorer.score_many(plans)))
    taken = torch.cuda.max_memory_allocated(card) - held
    driver.release_cached()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(card) + taken // 2) / total, card)
        found = torch.cat(list(scorer.score_many(plans)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)
    assert scorer.plan != whole
    compare({"candidates": found.numpy()}, {"candidates": expected.numpy()}, FLOAT32)
