"""MMLU with a subject's examples run once against every prompt run whole, on one thread; prints one JSON line.

Both by the same code on the same questions; without sharing every prompt is a sequence of its own, of a group without a
prefix. CPU seconds, which a busy machine changes little. `prompt_tokens` are those of whole prompts, so that their rate
says what sharing is worth. The full data set is extrapolated by the tokens that it has to run, not measured.

    python tests/benchmarks/evaluation.py --model DIR --mmlu DIR --subjects anatomy,marketing --questions 20
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import torch

from raymerge.checkpoint import Checkpoint
from raymerge.evaluation import Answers, answer_shard
from raymerge.forward import LayerRunner
from raymerge.plan import base_plan
from raymerge.prompts import Group, Prompts, Shard, encode_questions
from raymerge.questions import load_questions


def apart(prompts: Prompts) -> Prompts:
    """The same prompts, each whole."""
    empty = np.zeros(0, dtype=np.int64)

    def whole(group: Group) -> Group:
        return replace(group, prefix=empty, sequences=tuple(np.concatenate([group.prefix, x]) for x in group.sequences))

    return replace(prompts, shards=tuple(Shard(tuple(map(whole, shard.groups))) for shard in prompts.shards))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mmlu", default="demo")
    parser.add_argument("--subjects", default="all")
    parser.add_argument("--questions", type=int, default=20, help="at most so many of each subject")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)

    checkpoint = Checkpoint(options.model)
    runner, plan = LayerRunner(checkpoint, dtype=getattr(torch, options.dtype)), base_plan(checkpoint.n_layers)
    questions = load_questions(options.mmlu, subjects=options.subjects).sampled(options.questions, 0)
    whole = encode_questions(load_questions(options.mmlu), checkpoint.tokenizer)
    shared = encode_questions(questions, checkpoint.tokenizer)
    sides = {"shared": shared, "apart": apart(shared)}
    seconds, answers = {}, {}
    for name, prompts in sides.items():
        began = time.process_time()
        answers[name] = Answers.join(answer_shard(runner, plan, prompts, shard) for shard in prompts.shards)
        seconds[name] = time.process_time() - began
    predicted = {name: found.logits.argmax(-1) for name, found in answers.items()}
    rate = shared.tokens / seconds["shared"]
    print(
        json.dumps(
            {
                "questions": len(questions.questions),
                "prompt_tokens": sides["apart"].tokens,
                "tokens_run": shared.tokens,
                "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()},
                "prompt_tokens_per_cpu_second": {
                    name: round(sides["apart"].tokens / value, 1) for name, value in seconds.items()
                },
                "times_faster": round(seconds["apart"] / seconds["shared"], 2),
                "predictions_that_differ": int((predicted["shared"] != predicted["apart"]).sum()),
                "max_abs_logit_difference": float(np.abs(answers["shared"].logits - answers["apart"].logits).max()),
                "all_questions": len(whole.answers),
                "all_prompt_tokens": apart(whole).tokens,
                "all_tokens_to_run": whole.tokens,
                "all_cpu_hours_extrapolated": round(whole.tokens / rate / 3600, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
