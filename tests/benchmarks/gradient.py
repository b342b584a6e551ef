"""One gradient step through the frozen trunk against one through the whole fused model, in one run; one JSON line.

Whole model: weights of the merged layer as differentiable sums of the sources, `functional_call` on an ordinary
transformers model over each whole prompt, backpropagation through everything. Both in float32, with the same number of
threads, over the same questions, at the same coefficients (those of alphas 0.62, one set a matrix).

A second line for each optimiser: the evaluations of the loss, with its gradient, that a descent of one set of
coefficients takes from there, by the defaults of raymerge.config but that nothing is held out, and what it reaches;
to_lowest: after how many it was within 1e-3 of the lowest loss that any of them reached.

    python tests/benchmarks/gradient.py --model DIR --mmlu DIR --merges 9 --subjects 3 --questions 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import numpy as np
import torch
from torch.func import functional_call

from raymerge.checkpoint import Checkpoint
from raymerge.config import GradientConfig
from raymerge.forward import LayerRunner
from raymerge.gradient import Settings, descend
from raymerge.plan import tail_coefficients, tail_plan
from raymerge.prompts import bos_token, encode_questions, encode_text
from raymerge.questions import load_questions, prefix_text, question_text
from raymerge.scoring import TailScorer
from raymerge.tail_loss import LossWeights, TailLoss, TextWindows
from raymerge.trunk import TrunkCache

PUBLISHED_QUESTIONS, PUBLISHED_EPOCHS, BATCH = 1000, 500, 4


def whole_model_step(model, checkpoint, coefficients, first, prompts, letters, answers):
    """(loss, gradient by the coefficients (matrices, sources)), one backward pass a prompt, as memory demands."""
    matrices = checkpoint.architecture.matrices
    coefficients = coefficients.float().requires_grad_()
    total = 0.0
    for ids, answer in zip(prompts, answers, strict=True):
        layers = [model.model.layers[first + j] for j in range(coefficients.shape[1])]
        weights = {}
        for row, matrix in zip(coefficients, matrices, strict=True):
            sources = [layer.get_submodule(matrix).weight.detach() for layer in layers]
            weights[f"model.layers.{first}.{matrix}.weight"] = sum(c * w for c, w in zip(row, sources, strict=True))
        out = functional_call(model, weights, (ids,), {"use_cache": False, "logits_to_keep": 1})
        loss = -torch.log_softmax(out.logits[0, -1, letters], -1)[answer] / len(prompts)
        loss.backward()
        total += loss.item()
    return total, coefficients.grad


def descents(loss):
    """A line for each optimiser; see above."""
    own, found = GradientConfig(), {}
    for optimizer in ("adam", "lbfgs"):
        settings = Settings(
            "simplex", optimizer=optimizer, learning_rate=own.learning_rate, epochs=own.epochs, patience=own.patience
        )
        counting, losses = Counting(loss), []
        began = time.perf_counter()
        descent = descend(
            counting, settings, on_epoch=lambda row, _, c=counting, to=losses: to.append((c.calls, row.loss))
        )
        found[optimizer] = (losses, len(descent.history) - 1, time.perf_counter() - began)
    lowest = min(loss for losses, *_ in found.values() for _, loss in losses)
    return [
        {
            "optimizer": optimizer,
            "evaluations": losses[-1][0],
            "epochs": epochs,
            "seconds": round(seconds, 2),
            "start": round(losses[0][1], 5),
            "lowest": round(min(loss for _, loss in losses), 5),
            "to_lowest": next((calls for calls, loss in losses if loss < lowest + 1e-3), None),
        }
        for optimizer, (losses, epochs, seconds) in found.items()
    ]


class Counting:
    """A loss that counts its evaluations."""

    def __init__(self, loss):
        self._loss, self.calls = loss, 0

    def __getattr__(self, name):
        return getattr(self._loss, name)

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self._loss(*arguments, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--mmlu", default="demo")
    parser.add_argument("--merges", type=int, default=13)
    parser.add_argument("--subjects", type=int, default=3, help="so many of the data set's subjects, in order")
    parser.add_argument("--questions", type=int, default=4, help="questions of each subject")
    parser.add_argument("--reference-questions", type=int, default=4, help="questions that the whole model is timed on")
    parser.add_argument("--steps", type=int, default=5, help="steps that the trunk is timed on, after one for warmth")
    parser.add_argument("--text", help="file of plain text, for the time of a step's terms of text")
    parser.add_argument("--text-tokens", type=int, default=2048)
    parser.add_argument("--text-positions", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(options.model)
    names = load_questions(options.mmlu, split="test").subjects[: options.subjects]
    questions = load_questions(options.mmlu, split="test", subjects=list(names)).sampled(options.questions, 0)
    prompts = encode_questions(questions, checkpoint.tokenizer)
    first, n = checkpoint.n_layers - 1 - options.merges, len(prompts.answers)
    template = tail_plan(checkpoint.n_layers, [0.62] * options.merges, name="template", kind="fixed")
    row = torch.from_numpy(tail_coefficients(template.alphas))
    coefficients = row.repeat(len(checkpoint.architecture.matrices), 1)
    # Spread over the run's questions, so that subjects are mixed.
    timed = np.unique(np.linspace(0, n - 1, min(options.reference_questions, n)).astype(int)).tolist()

    def clock(call):
        call()
        began = time.perf_counter()
        for _ in range(options.steps):
            found = call()
        return (time.perf_counter() - began) / options.steps, found

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        runner = LayerRunner(checkpoint, dtype=torch.float32)
        trunk = TrunkCache(runner, first, folder)
        loss = TailLoss(TailScorer(trunk, prompts), template)
        setup_seconds = time.perf_counter() - began
        full_seconds, _ = clock(lambda: loss(coefficients))
        trunk_seconds, ours = clock(lambda: loss(coefficients, rows=timed))
        settings = Settings("alphas", learning_rate=1e-3, batch_size=BATCH, epochs=1)
        began = time.perf_counter()
        descend(loss, settings)
        epoch_seconds = time.perf_counter() - began
        lines = descents(loss)
        text_seconds = None
        if options.text:
            with open(options.text, encoding="utf-8") as file:
                shards = encode_text(file.read(), checkpoint.tokenizer, limit=options.text_tokens)
            text = TextWindows(trunk, shards, reference=True, windows=1, positions=options.text_positions)
            weights = LossWeights(answer_nll=0.0, text_nll=1.0, text_kl=1.0)
            of_text = TailLoss(loss.scorer, template, weights, text=text)
            text_seconds, _ = clock(lambda: of_text(coefficients, drawn=text.draw(0)))

    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    model.model.config.num_hidden_layers = first + 1  # the forward pass runs as many
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bos = [] if (token := bos_token(checkpoint.tokenizer, None)) is None else [token]
    whole, answers = [], []
    for number in timed:
        question = questions.questions[number]
        text = prefix_text(question.subject, questions.examples[question.subject]) + question_text(question)
        ids = checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole.append(torch.tensor([bos + ids]))
        answers.append(int(question.answer))
    began = time.perf_counter()
    total, theirs = whole_model_step(model, checkpoint, coefficients, first, whole, list(prompts.letters), answers)
    whole_seconds = time.perf_counter() - began
    scale = theirs.abs().max().item()
    print(
        json.dumps(
            {
                "trunk_seconds": round(trunk_seconds, 5),
                "whole_model_seconds": round(whole_seconds, 3),
                "ratio": round(whole_seconds / trunk_seconds, 1),
                "max_gradient_difference": float((ours.gradient - theirs.double()).abs().max() / scale),
                "loss_difference": abs(ours.loss.total - total),
                "questions_a_step": len(timed),
                "full_batch_questions": n,
                "full_batch_seconds": round(full_seconds, 5),
                "epoch_seconds": round(epoch_seconds, 3),
                "published_hours_scaled": round(epoch_seconds / n * PUBLISHED_QUESTIONS * PUBLISHED_EPOCHS / 3600, 3),
                "text_step_seconds": None if text_seconds is None else round(text_seconds, 3),
                "setup_seconds_once": round(setup_seconds, 2),
                "merges": options.merges,
                "threads": options.threads,
                "steps_timed": options.steps,
            }
        )
    )

    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
