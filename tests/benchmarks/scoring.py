"""The frozen trunk against the published way, in one process and one run; prints one JSON line.

The published way: deep copy the model, merge step by step, one full forward a question. Both in float32 with the same
number of threads, on the same questions; the reference may be timed on the first few questions and is scaled to all.

    python tests/benchmarks/scoring.py --model DIR --mmlu DIR --merges 9 --subjects 3 --questions 20
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time

import torch

from raymerge.checkpoint import Checkpoint
from raymerge.forward import LayerRunner
from raymerge.plan import tail_plan
from raymerge.prompts import encode_questions
from raymerge.questions import load_questions, prefix_text, question_text
from raymerge.scoring import TailScorer
from raymerge.trunk import TrunkCache

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MATRICES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def published_merge(model: torch.nn.Module, alphas: list[float]) -> torch.nn.Module:
    """A deep copy whose last layers are averaged one into the next."""
    merged = copy.deepcopy(model)
    for alpha in alphas:
        into, remove = merged.model.layers[-2], merged.model.layers[-1]
        for name in MATRICES:
            weight = into.get_submodule(name).weight
            weight.data = alpha * weight.data + (1 - alpha) * remove.get_submodule(name).weight.data
        merged.model.layers = merged.model.layers[:-1]
        merged.config.num_hidden_layers -= 1
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mmlu", default="demo")
    parser.add_argument("--merges", type=int, default=13)
    parser.add_argument("--subjects", type=int, default=3, help="so many of the data set's subjects, in order")
    parser.add_argument("--questions", type=int, default=20, help="questions of each subject")
    parser.add_argument("--reference-questions", type=int, default=12, help="questions that the reference is timed on")
    parser.add_argument("--candidates", type=int, default=5, help="candidates that the trunk is timed on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(options.model)
    names = load_questions(options.mmlu, split="test").subjects[: options.subjects]
    questions = load_questions(options.mmlu, split="test", subjects=list(names)).sampled(options.questions, 0)
    prompts = encode_questions(questions, checkpoint.tokenizer)
    generator = random.Random(0)
    candidates = [[generator.uniform(0.3, 0.7) for _ in range(options.merges)] for _ in range(options.candidates)]
    plans = [tail_plan(checkpoint.n_layers, alphas, name="candidate", kind="random") for alphas in candidates]

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        runner = LayerRunner(checkpoint, dtype=torch.float32)
        trunk = TrunkCache(runner, checkpoint.n_layers - 1 - options.merges, folder)
        # Unrounded: the reference merges in float32 and keeps float32.
        scorer = TailScorer(trunk, prompts, fused_dtype=torch.float32)
        setup_seconds = time.perf_counter() - began
        list(scorer.score_many(plans[:1]))
        began = time.perf_counter()
        scores = list(scorer.score_many(plans))
        trunk_seconds = (time.perf_counter() - began) / len(plans)
    del scorer

    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        began = time.perf_counter()
        merged = published_merge(model, candidates[0])
        merge_seconds = time.perf_counter() - began
        n = len(questions.questions)
        timed = generator.sample(range(n), min(options.reference_questions, n))
        reference, began = [], time.perf_counter()
        for row in timed:
            question = questions.questions[row]
            text = prefix_text(question.subject, questions.examples[question.subject]) + question_text(question)
            ids = checkpoint.tokenizer(text, return_tensors="pt").input_ids
            reference.append(merged(ids).logits[0, -1, list(prompts.letters)])
        forward_seconds = (time.perf_counter() - began) / len(timed)
    reference_seconds = merge_seconds + forward_seconds * n
    found, expected = scores[0][timed], torch.stack(reference)
    print(
        json.dumps(
            {
                "reference_seconds": round(reference_seconds, 3),
                "trunk_seconds": round(trunk_seconds, 5),
                "ratio": round(reference_seconds / trunk_seconds, 1),
                "max_abs_logit_difference": float((found - expected).abs().max()),
                "predictions_agree": bool((found.argmax(-1) == expected.argmax(-1)).all()),
                "questions": n,
                "questions_timed": len(timed),
                "setup_seconds_once": round(setup_seconds, 2),
                "merges": options.merges,
                "threads": options.threads,
                "candidates_timed": len(plans),
            }
        )
    )


if __name__ == "__main__":
    main()
