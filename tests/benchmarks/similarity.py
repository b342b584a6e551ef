"""Activations and layer similarity against the published way, in one process and one run; prints two JSON lines.

collect: every layer once a sample, against one full forward a layer a sample with that layer's output hooked, which is
how the published code does it. Both in float32 with the same number of threads, on the same truncated prompts; the
reference is timed on a few samples (all their layers) and scaled to all by tokens.

npib: all pairs of layers of seeded random walks (57, 2), against a loop over pairs that calls scikit-learn.

    python tests/benchmarks/similarity.py --model DIR --mmlu DIR --samples 57
"""

from __future__ import annotations

import argparse
import json
import random
import time

import numpy as np
import torch

from raymerge.activations import collect, distinct_samples, truncate
from raymerge.checkpoint import Checkpoint
from raymerge.forward import LayerRunner
from raymerge.prompts import Shard, encode_questions
from raymerge.questions import load_questions


def whole_samples(shards: tuple[Shard, ...]) -> list[np.ndarray]:
    samples = {
        row: np.concatenate([group.prefix, ids])
        for shard in shards
        for group in shard.groups
        for row, ids in zip(group.rows, group.sequences, strict=True)
    }
    return [samples[row] for row in sorted(samples)]


def published_states(model: torch.nn.Module, ids: np.ndarray, layer: int) -> torch.Tensor:
    """(T, d) output of one decoder layer, from one whole forward."""
    kept = []
    hook = model.model.layers[layer].register_forward_hook(lambda _, args, out: kept.append(out))
    model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    hook.remove()
    return (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0]


def pooled(x: torch.Tensor, pooling: str, max_tokens: int) -> torch.Tensor:
    if pooling == "sequence":
        return torch.nn.functional.pad(x, (0, 0, 0, max_tokens - len(x))).flatten()
    return x[-1] if pooling == "last" else x.mean(0)


def benchmark_collect(options: argparse.Namespace) -> dict:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(options.model)
    names = load_questions(options.mmlu, split="test", shots=0).subjects[: options.subjects]
    questions = load_questions(
        options.mmlu,
        split="test",
        subjects=list(names),
        shots=options.shots,
    ).sampled(-(-options.samples // len(names)), 0)
    shards = encode_questions(questions, checkpoint.tokenizer).shards
    n = len(questions.questions)
    if options.pooling == "sequence":
        shards = truncate(shards, options.max_tokens)
    samples = whole_samples(shards)

    runner = LayerRunner(checkpoint, dtype=torch.float32)
    began, began_cpu = time.perf_counter(), time.process_time()
    found = collect(runner, shards, pooling=options.pooling, max_tokens=options.max_tokens)
    one_pass, one_pass_cpu = time.perf_counter() - began, time.process_time() - began_cpu
    del runner

    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    timed = sorted(random.Random(0).sample(range(n), min(options.reference_samples, n)))
    states = np.zeros((checkpoint.n_layers, len(timed)), dtype=object)
    began, began_cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for layer in range(checkpoint.n_layers):
            for column, row in enumerate(timed):
                x = published_states(model, samples[row], layer)
                states[layer, column] = pooled(x, options.pooling, options.max_tokens)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    tokens, timed_tokens = sum(map(len, samples)), sum(len(samples[row]) for row in timed)
    published = seconds * tokens / timed_tokens
    expected = np.array([[[(a - b).double().norm().item() for b in line] for a in line] for line in states])
    difference = np.abs(found.distances[:, timed][:, :, timed] - expected)
    return {
        "benchmark": "collect",
        "published_seconds": round(published, 3),
        "one_pass_seconds": round(one_pass, 3),
        "ratio": round(published / one_pass, 1),
        # Processor time says the same on a machine that others use too.
        "cpu_ratio": round(cpu_seconds * tokens / timed_tokens / one_pass_cpu, 1),
        "max_abs_difference": float(difference.max()),
        "max_relative_difference": float((difference / expected.max((1, 2), keepdims=True)).max()),
        "largest_distance": float(expected.max()),
        "layers": checkpoint.n_layers,
        "samples": n,
        "samples_timed": len(timed),
        "published_seconds_measured": round(seconds, 3),
        "scaled_by": "tokens",
        "tokens": tokens,
        "tokens_run_once_a_layer": sum(shard.tokens for shard in shards),
        "distinct_samples": distinct_samples(shards),
        "pooling": options.pooling,
        "max_tokens": options.max_tokens,
        "shots": options.shots,
        "threads": options.threads,
    }


def plain_npib(embeddings: np.ndarray, neighbors: int = 5, entropy_neighbors: int = 50) -> np.ndarray:
    """As published: for every pair of layers and every column of the second, one call of scikit-learn."""
    from scipy.spatial import cKDTree
    from scipy.stats import rankdata
    from sklearn.feature_selection import mutual_info_regression

    n_layers, n, d = embeddings.shape
    ranks = rankdata(embeddings, axis=1) / n
    information = np.zeros((n_layers, n_layers))
    for i in range(n_layers):
        for j in range(n_layers):
            columns = [
                mutual_info_regression(ranks[i], ranks[j][:, b], n_neighbors=neighbors, random_state=0).mean()
                for b in range(d)
            ]
            information[i, j] = np.mean(columns)
    entropy = np.zeros(n_layers)
    for i in range(n_layers):
        radius = cKDTree(ranks[i]).query(ranks[i], entropy_neighbors + 1)[0][:, -1]
        entropy[i] = -np.mean(np.log(entropy_neighbors / (n * radius**d)))
    values = information / np.sqrt(entropy[:, None] * entropy[None, :])
    return (values + values.T) / 2


def benchmark_npib(options: argparse.Namespace) -> dict:
    from raymerge.similarity import npib

    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((32, 57, 2)), axis=0)
    npib(walk[:2])  # imports and first calls
    began = time.perf_counter()
    found = npib(walk)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    expected = plain_npib(walk)
    plain_seconds = time.perf_counter() - began
    defined = np.isfinite(found.values)
    return {
        "benchmark": "npib",
        "plain_seconds": round(plain_seconds, 3),
        "raymerge_seconds": round(seconds, 4),
        "ratio": round(plain_seconds / seconds, 1),
        "max_abs_difference": float(np.abs(found.values - expected)[defined].max()),
        "entries": int(defined.size),
        "entries_left_undefined": int(defined.size - defined.sum()),
        "layers": 32,
        "samples": 57,
        "dimensions": 2,
        "threads": options.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mmlu", default="demo")
    parser.add_argument("--samples", type=int, default=57, help="questions, rounded up to the same number a subject")
    parser.add_argument("--subjects", type=int, default=3, help="so many of the data set's subjects, in order")
    parser.add_argument("--shots", type=int, default=0, help="few-shot examples before each question")
    parser.add_argument("--pooling", default="sequence")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--reference-samples", type=int, default=4, help="samples that the reference is timed on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--part", choices=("collect", "npib", "both"), default="both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part != "npib":
        print(json.dumps(benchmark_collect(options)), flush=True)
    if options.part != "collect":
        print(json.dumps(benchmark_npib(options)), flush=True)


if __name__ == "__main__":
    main()
