"""An 8B-shaped model with random weights on one accelerator: what a trunk, candidates, gradients and the rest cost.

    export PYTORCH_ALLOC_CONF=expandable_segments:True  # as workers have it
    PYTHONPATH=. python tests/benchmarks/gpu.py --shape 8b --goals
    PYTHONPATH=. python tests/benchmarks/gpu.py --shape tiny --device cpu --questions 40

Nothing is downloaded: weights are drawn on the device, a layer at a time, and questions are random tokens of MMLU's
lengths (57 subjects; prefixes 29,323 tokens; questions of median 73, mean 107, at most 996 tokens). It needs torch,
transformers, safetensors, numpy, scipy, pyarrow and pyyaml (pip packages; torch built for the card), neither Ray nor
pydantic, 60 GB of disk and 40 GB of host memory at 8b, and well under ten minutes on an H100.

Prints one JSON line a measurement; `seconds` are wall-clock, the device waited for. "share_of_matrix_rate" and
"share_of_bandwidth" are of the rates measured at the start: operations counted as the fewest that the method needs,
bytes as each input read once. The published way (deep copy, merge step by step, one full forward a question) is timed
on a few questions and scaled to all. --goals: exit with 1 unless a candidate takes under 100 ms for the most questions,
at least 1,000 times less than the published way, with the predictions of the whole fused model wherever that one's two
best letters are further apart than twice the largest difference.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from raymerge.activations import collect
from raymerge.alignment import unit_likeness
from raymerge.checkpoint import Checkpoint
from raymerge.device import device_memory, device_name, is_accelerator, release_cached, set_arithmetic
from raymerge.families import architecture_of
from raymerge.forward import LayerRunner
from raymerge.plan import tail_coefficients, tail_plan
from raymerge.positions import attention_windows, rotary_types
from raymerge.prompts import Group, Prompts, Shard
from raymerge.scoring import TailScorer
from raymerge.sources import SourceLayers
from raymerge.tail_loss import TailLoss
from raymerge.trunk import TrunkCache

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
MERGES = {"8b": 13, "1b": 7, "tiny": 3}
LETTERS = (362, 426, 356, 423)

# Questions of MMLU's test subjects, and tokens that their few-shot prefixes have together, least and most.
SUBJECT_SIZES = [1534, 895, 783, 612, 545, 390, 378, 346, 324, 311, 310, 306, 282, 272, 270, 265, 245, 238, 237, 235]
SUBJECT_SIZES += [234, 223, 216, 204, 203, 201, 198, 193, 173, 171, 166, 165, 163, 152, 151, 145, 144, 135, 131, 126]
SUBJECT_SIZES += [121, 114, 112, 110, 108, 103, 102] + [100] * 10
PREFIX_TOKENS, PREFIX_RANGE = 29_323, (212, 2446)
QUESTION_MEDIAN, QUESTION_P95, QUESTION_RANGE = 73, 311, (20, 996)
SHARD_TOKENS = 8192
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name


class RandomCheckpoint(Checkpoint):
    """A Llama of a given shape whose tensors are drawn when they are asked for, the same each time, on a device."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype):
        self.config = AutoConfig.for_model(
            "llama",
            **SHAPES[shape],
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
        self.trust_remote_code = False
        self.architecture = architecture_of(self.config)
        self.n_layers = self.config.num_hidden_layers
        self.windows, self.rotary_types = attention_windows(self.config), rotary_types(self.config)
        self.deepstack_layers = 0
        self._name, self._device, self._stored = shape, device, dtype
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(copy.deepcopy(self.config)).state_dict()
        self._where = {name: tensor.shape for name, tensor in state.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._where[name]
        options = {"device": self._device, "dtype": self._stored}
        if len(shape) == 1:
            return torch.ones(shape, **options)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        # Residual branches of a trained model add little to their input; so do these.
        scale = 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        fan_in = 1 if "embed" in name else shape[1]
        return torch.randn(shape, generator=generator, **options).mul_(scale / fan_in**0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self._stored

    @cached_property
    def identity(self) -> str:
        return f"random-{self._name}-{self._stored}"


def make_prompts(count: int, vocabulary: int, *, longest: int | None = None) -> Prompts:
    """`count` questions over MMLU's 57 subjects in its proportions, of its lengths; longest cuts all lengths."""
    rng = np.random.default_rng(0)
    weights = np.array(SUBJECT_SIZES) / sum(SUBJECT_SIZES)
    sizes = np.floor(weights * count).astype(int)
    sizes[: count - sizes.sum()] += 1
    low, high = PREFIX_RANGE
    prefixes = np.clip(rng.lognormal(np.log(400), 0.6, len(sizes)), low, high)
    prefixes = np.clip(prefixes * PREFIX_TOKENS / prefixes.sum(), low, high).astype(int)
    sigma = np.log(QUESTION_P95 / QUESTION_MEDIAN) / 1.645
    lengths = np.clip(rng.lognormal(np.log(QUESTION_MEDIAN), sigma, count), *QUESTION_RANGE).astype(int)
    if longest is not None:
        prefixes, lengths = np.minimum(prefixes, longest), np.minimum(lengths, longest)
    rows, groups = iter(range(count)), []
    for number, (size, prefix) in enumerate(zip(sizes, prefixes, strict=True)):
        prefix_ids = rng.integers(3, vocabulary, prefix)
        own = [(row, rng.integers(3, vocabulary, lengths[row])) for row in (next(rows) for _ in range(size))]
        # As `encode_questions` does: pieces of about 8,192 tokens, each with the subject's prefix.
        piece, held = [], 0
        for item in own:
            if piece and held + len(item[1]) > SHARD_TOKENS:
                groups.append((number, prefix_ids, piece))
                piece, held = [], 0
            piece.append(item)
            held += len(item[1])
        if piece:
            groups.append((number, prefix_ids, piece))
    shards, pending, held = [], [], 0
    for number, prefix_ids, piece in groups:
        group = Group(f"s{number}", prefix_ids, tuple(ids for _, ids in piece), tuple(row for row, _ in piece))
        if pending and held + group.tokens > SHARD_TOKENS:
            shards.append(Shard(tuple(pending)))
            pending, held = [], 0
        pending.append(group)
        held += group.tokens
    shards.append(Shard(tuple(pending)))
    answers = rng.integers(0, 4, count).astype(np.int8)
    return Prompts(tuple(shards), LETTERS, answers)


def whole_prompts(prompts: Prompts) -> dict[int, np.ndarray]:
    groups = [group for shard in prompts.shards for group in shard.groups]
    return {r: np.concatenate([g.prefix, ids]) for g in groups for r, ids in zip(g.rows, g.sequences, strict=True)}


class Recomputing(TailScorer):
    """A scorer that never sums keys, whose plan has for everything else what their memory leaves."""

    _is_linear = False


class Bench:
    """One run: what is measured goes to standard output, and what goals are checked on is kept."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)
        self.cuda = is_accelerator(self.device)
        if self.cuda:
            set_arithmetic()
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.checkpoint = RandomCheckpoint(options.shape, self.device, self.dtype)
        self.vocabulary = min(self.checkpoint.config.vocab_size, 128000)
        self.merges = MERGES[options.shape]
        self.first = self.checkpoint.n_layers - 1 - self.merges
        rng = np.random.default_rng(1)
        self.plans = [
            tail_plan(self.checkpoint.n_layers, alphas.tolist(), name="candidate", kind="random")
            for alphas in rng.uniform(0.3, 0.7, (8, self.merges))
        ]
        self.rates: dict[str, float] = {}
        self.goals: dict[str, Any] = {}

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clock(self, call: Callable[[], Any], *, repeat: int = 1, warm: bool = True) -> tuple[float, Any]:
        """Median seconds of a call, and what it returned; `warm` calls it once before."""
        if warm:
            call()
        times = []
        for _ in range(repeat):
            self.wait()
            began = time.perf_counter()
            found = call()
            self.wait()
            times.append(time.perf_counter() - began)
        return float(np.median(times)), found

    def report(self, measure: str, **values: Any) -> None:
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps({"measure": measure, **rounded}), flush=True)

    def held(self) -> dict[str, int]:
        """Bytes that are held now, and the most that were since this was last asked."""
        if not self.cuda:
            return {}
        held, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"bytes_held": held, "bytes_at_most": most}

    # -- what is measured -----------------------------------------------------------------------------------------

    def card(self) -> None:
        """The rates that everything else is held against."""
        n, values = (8192, 2**31) if self.cuda else (512, 2**22)
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        seconds, _ = self.clock(lambda: a @ b, repeat=10)
        self.rates["matrix"] = 2 * n**3 / seconds
        source = torch.randn(values // 2, device=self.device).to(self.dtype)
        target = torch.empty_like(source)
        seconds, _ = self.clock(lambda: target.copy_(source), repeat=10)
        self.rates["bandwidth"] = 2 * source.nbytes / seconds
        self.report(
            "card",
            device=device_name(self.device),
            torch=torch.__version__,
            dtype=str(self.dtype),
            allocator={name: os.environ[name] for name in _ALLOCATOR if name in os.environ},
            matrix_tflops=self.rates["matrix"] / 1e12,
            bandwidth_gb_s=self.rates["bandwidth"] / 1e9,
            **(device_memory(self.device)._asdict() if self.cuda else {}),
        )

    def scoring(self, count: int, folder: Path) -> None:
        """Trunk, candidates one and eight at a time, and gradients, for `count` questions."""
        runner = LayerRunner(self.checkpoint, device=self.device, dtype=self.dtype)
        prompts = make_prompts(count, self.vocabulary, longest=self.options.longest)
        trunk = TrunkCache(runner, self.first, folder / str(count))
        began = time.perf_counter()
        for shard in prompts.shards:
            trunk.compute(shard)
        self.wait()
        seconds = time.perf_counter() - began
        size = runner.layer_size
        run_tokens = sum(shard.tokens for shard in prompts.shards)
        operations = 2 * run_tokens * size.parameters * self.first
        share = operations / seconds / self.rates["matrix"]
        self.report(
            "trunk", questions=count, tokens=run_tokens, seconds=seconds, share_of_matrix_rate=share, **self.held()
        )
        sources, answers = SourceLayers(runner, self.first), None
        for kind in (TailScorer, Recomputing):
            scorer = score = None  # which frees the last one's states and keys
            release_cached()
            began = time.perf_counter()
            scorer = kind(trunk, prompts, sources=sources)
            list(scorer.score_many(self.plans[:1]))
            self.wait()
            seconds, planned = time.perf_counter() - began, scorer.plan
            self.report("setup", questions=count, seconds=seconds, plan=asdict(planned), **self.held())
            for together in (1, 8):
                at_once = min(together, planned.candidates) if self.cuda else together
                scorer.layer.plan = replace(planned, candidates=at_once)
                repeat = 3 if self.cuda else 1
                score = partial(scorer.score_many, self.plans[:together])
                total, logits = self.clock(lambda score=score: list(score()), repeat=repeat)
                seconds = total / together
                answers = logits[0] if answers is None else answers
                self.report(
                    "candidate",
                    questions=count,
                    at_once=scorer.plan.candidates,
                    keys=scorer.plan.keys,
                    states=scorer.plan.states,
                    chunk_tokens=scorer.plan.chunk_tokens,
                    seconds=seconds,
                    **self.shares(scorer, seconds, count),
                    largest_difference=float((logits[0] - answers).abs().max()),
                    **self.held(),
                )
                if count == max(self.options.questions):
                    best = self.goals.get("seconds_a_candidate", float("inf"))
                    self.goals["seconds_a_candidate"] = min(best, seconds)
            if planned.keys == "recompute":
                break
        scorer.layer.plan = planned
        self.gradient(scorer, count)
        if count == max(self.options.questions):
            self.kept = prompts, answers

    def shares(self, scorer: TailScorer, seconds: float, questions: int) -> dict[str, float]:
        """What of the card's rates a candidate's least work comes to."""
        size, tokens = scorer.runner.layer_size, scorer.layer.states.layout.tokens
        width = 2 if self.cuda else 4
        at_once, sources = scorer.plan.candidates, scorer.sources.count
        # Queries, values and the attention's output a question; states weighted by every query head a token.
        operations = 2 * questions * (3 * size.hidden * size.query + 3 * size.hidden * size.mlp)
        operations += 2 * tokens * size.hidden * size.heads
        moved = sources * size.parameters * width / at_once + size.parameters * width
        moved += tokens * size.hidden * width / at_once
        if scorer.plan.keys == "recompute":
            operations += 2 * tokens * size.hidden * size.key
        else:
            operations += 2 * tokens * sources * size.key
            moved += tokens * sources * size.key * width / at_once
        return {
            "share_of_matrix_rate": operations / seconds / self.rates["matrix"],
            "share_of_bandwidth": moved / seconds / self.rates["bandwidth"],
        }

    def gradient(self, scorer: TailScorer, count: int) -> None:
        template = tail_plan(self.checkpoint.n_layers, [0.62] * self.merges, name="template", kind="fixed")
        loss = TailLoss(scorer, template)
        coefficients = torch.from_numpy(tail_coefficients(template.alphas))
        rows = np.unique(np.linspace(0, count - 1, 4).astype(int)).tolist()
        for name, chosen in (("4", rows), ("all", None)):
            seconds, _ = self.clock(lambda chosen=chosen: loss(coefficients, rows=chosen), repeat=3 if self.cuda else 1)
            self.report("gradient_step", questions=count, differentiated=name, seconds=seconds, **self.held())

    def activations(self) -> None:
        runner = LayerRunner(self.checkpoint, device=self.device, dtype=self.dtype)
        prompts = make_prompts(57, self.vocabulary, longest=self.options.longest)
        seconds, _ = self.clock(lambda: collect(runner, prompts.shards, pooling="sequence"), warm=False)
        tokens = sum(shard.tokens for shard in prompts.shards)
        self.report("activations", samples=57, tokens=tokens, seconds=seconds, **self.held())

    def assignment(self) -> None:
        """The costs that an assignment of MLP units is made from; the solver runs on the CPU."""
        arch = self.checkpoint.architecture
        layers = []
        for layer in (self.checkpoint.n_layers - 2, self.checkpoint.n_layers - 1):
            names = self.checkpoint.layer_tensors(layer)
            layers.append({name: self.checkpoint[arch.layer_name(layer, name)] for name in names})
        seconds, costs = self.clock(lambda: unit_likeness(*layers, arch), repeat=3)
        self.report("assignment_costs", units=len(costs), seconds=seconds, **self.held())

    def published(self) -> None:
        """Deep copy, step-by-step merge, one full forward a question; then the fused model's own predictions."""
        prompts, answers = self.kept
        whole = whole_prompts(prompts)
        n = len(whole)
        rng = np.random.default_rng(2)
        timed = sorted(rng.choice(n, min(self.options.reference_questions, n), replace=False).tolist())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self.checkpoint.config), dtype=self.dtype)
        model = model.to_empty(device=self.device).eval()
        model.model.rotary_emb = type(model.model.rotary_emb)(config=self.checkpoint.config).to(self.device)
        with torch.inference_mode():
            for name, parameter in model.state_dict().items():
                parameter.copy_(self.checkpoint[name])
            merge_seconds, merged = self.clock(lambda: published_merge(model, self.plans[0]), warm=False)

            def forward(row: int) -> Tensor:
                ids = torch.from_numpy(whole[row])[None].to(self.device)
                return merged(ids, use_cache=False).logits[0, -1, list(LETTERS)].float()

            # Warm in every length that is timed: kernels are chosen, and may be made, by shape.
            forward_seconds, _ = self.clock(lambda: [forward(row) for row in timed])
            # What is scored is the merge rounded once; the steps above round each time.
            runner = LayerRunner(self.checkpoint, device=self.device, dtype=self.dtype)
            fused = runner.fused(self.plans[0], self.first)
            last = merged.model.layers[-1].state_dict()
            for name, tensor in fused.items():
                last[name].copy_(tensor)
            expected = torch.stack([forward(row) for row in timed]).cpu()
        found = answers[timed]
        total = merge_seconds + forward_seconds / len(timed) * n
        difference = (found - expected).abs().max()
        first, second = expected.sort(-1, descending=True).values[:, :2].unbind(-1)
        clear = first - second > 2 * difference
        equal = found.argmax(-1) == expected.argmax(-1)
        self.goals["ratio"] = total / self.goals["seconds_a_candidate"]
        self.goals["equal"] = bool(equal[clear].all()) and bool(clear.any())
        self.report(
            "published",
            questions=n,
            questions_timed=len(timed),
            seconds_scaled=total,
            merge_seconds=merge_seconds,
            ratio=self.goals["ratio"],
            largest_difference=float(difference),
            logit_spread=float(expected.std()),
            predictions_equal=float(equal.float().mean()),
            predictions_clear=float(clear.float().mean()),
            clear_predictions_equal=self.goals["equal"],
            **self.held(),
        )


def published_merge(model: torch.nn.Module, plan: Any) -> torch.nn.Module:
    """A deep copy whose last layers are averaged one into the next."""
    merged = copy.deepcopy(model)
    for alpha in plan.alphas:
        into, remove = merged.model.layers[-2], merged.model.layers[-1]
        for (name, weight), (_, other) in zip(into.named_parameters(), remove.named_parameters(), strict=True):
            if "proj" in name:
                weight.data = alpha * weight.data + (1 - alpha) * other.data
        merged.model.layers = merged.model.layers[:-1]
        merged.config.num_hidden_layers -= 1
    return merged


def failed(goals: dict[str, Any]) -> Iterator[str]:
    """The goals that were missed."""
    if not goals["seconds_a_candidate"] < 0.1:
        yield f"a candidate takes {goals['seconds_a_candidate']:.3f} s, not under 0.1"
    if not goals["ratio"] >= 1000:
        yield f"the published way takes {goals['ratio']:.0f} times as long, not 1,000"
    if not goals["equal"]:
        yield "predictions differ from the whole fused model's where these are clear"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, nargs="+", default=[1412, 14042])
    parser.add_argument("--longest", type=int, help="cut prefixes and questions to so many tokens")
    parser.add_argument("--reference-questions", type=int, default=24, help="that the published way is timed on")
    parser.add_argument("--goals", action="store_true", help="exit with 1 if one is missed")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    bench = Bench(options)
    bench.card()
    bench.assignment()
    bench.activations()
    release_cached()
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(options.questions):
            bench.scoring(count, Path(folder))
            release_cached()
        bench.published()
    missed = list(failed(bench.goals))
    bench.report("goals", **bench.goals, missed=missed)
    return 1 if options.goals and missed else 0


if __name__ == "__main__":
    sys.exit(main())
