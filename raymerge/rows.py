"""From results to table rows: plans, answers, perplexities, costs and receipts, as tables.py stores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from raymerge.checkpoint import Checkpoint
from raymerge.comparisons import PASSAGE, pooled
from raymerge.context import TextLosses
from raymerge.evaluation import Answers
from raymerge.fusion import Receipt
from raymerge.gradient import Epoch
from raymerge.objectives import TEXT_WINDOW, perplexity
from raymerge.plan import MergePlan
from raymerge.quantisation import quantised_bytes
from raymerge.questions import QuestionSet
from raymerge.schemas import SCHEMAS, Row
from raymerge.statistics import MeanInterval, ratio_interval
from raymerge.tasks import Task
from raymerge.tensorfiles import ITEM_BYTES
from raymerge.texts import text_hash


def plan_rows(plan: MergePlan, plan_id: str) -> list[Row]:
    """Rows of `plans`: one a step, and one a step for each matrix that has alphas of its own; a plan without steps has
    one with nulls."""
    common = {
        "plan_id": plan_id,
        "name": plan.name,
        "kind": plan.kind,
        "selection": plan.selection,
        "alignment": plan.alignment,
        "norms": plan.norms,
    }
    return [
        common | {"matrix": matrix, "step": number, "into": step.into, "remove": step.remove, "alpha": alpha}
        for matrix, alphas in ((None, plan.alphas), *plan.matrix_alphas)
        for number, (step, alpha) in enumerate(zip(plan.steps, alphas, strict=True))
    ] or [common]


def coefficient_rows(plan: MergePlan, plan_id: str) -> list[Row]:
    """Rows of `coefficients`: the effective weight of every original layer in every kept one.

    `matrix` is null in the rows that hold for all matrices without rows of their own.
    """
    return [
        {
            "plan_id": plan_id,
            "matrix": matrix,
            "kept_layer": kept.index,
            "source_layer": source,
            "coefficient": coefficient,
        }
        for kept in plan.kept
        for matrix, coefficients in ((None, kept.coefficients), *kept.matrices)
        for source, coefficient in coefficients
    ]


def answer_table(plan_id: str, questions: QuestionSet, answers: Answers, *, partial: bool = False) -> pa.Table:
    """Rows of `answers` for all questions of a set, in its order; `answers` must cover it exactly, unless `partial`."""
    count = len(questions.questions)
    if not partial and not np.array_equal(answers.rows, np.arange(count)):
        raise ValueError(f"answers cover {len(answers.rows)} of {count} questions of {questions.split}")
    members = [questions.questions[row] for row in answers.rows]
    asked, whole = ~np.isnan(answers.prompt_nll), ~np.isnan(answers.logsumexp)
    columns = {
        "plan_id": [plan_id] * len(members),
        "split": [questions.split] * len(members),
        "language": [question.language for question in members],
        "subject": [question.subject for question in members],
        "question_id": [question.question_id for question in members],
        "content_hash": [question.content_hash for question in members],
        **{f"logit_{letter}": answers.logits[:, i].astype(np.float32) for i, letter in enumerate("abcd")},
        "logsumexp_all": pa.array(answers.logsumexp.astype(np.float32), mask=~whole),
        "top_is_letter": pa.array(answers.top_is_letter.astype(bool), mask=~whole),
        "answer": np.array([question.answer for question in members], dtype=np.int8),
        "predicted": answers.logits.argmax(-1).astype(np.int8),
        "prompt_nll": pa.array(answers.prompt_nll, pa.float64(), mask=~asked),
        "prompt_tokens": pa.array(np.where(asked, answers.prompt_tokens, 0).astype(np.int64), mask=~asked),
    }
    return pa.table(columns)


def question_perplexity_rows(answers: pa.Table) -> list[Row]:
    """Rows of `perplexity` with target "question", one a subject and one (subject null) for all, of one plan's rows of
    `answers`.

    As published: exp of the mean over questions of the loss on the question's own prompt tokens.
    """
    subjects = np.array(answers["subject"].to_pylist())
    losses = answers["prompt_nll"].to_numpy(zero_copy_only=False)
    tokens = answers["prompt_tokens"].to_numpy(zero_copy_only=False)
    (plan_id,) = set(answers["plan_id"].to_pylist())
    rows = []
    for subject in [None, *sorted(set(subjects.tolist()))]:
        chosen = slice(None) if subject is None else subjects == subject
        own, count = losses[chosen], int(np.nansum(tokens[chosen]))
        nll = ratio_interval(own, np.ones(len(own)))
        rows.append(_perplexity_row(plan_id, "question", nll, count, subject=subject))
    return rows


def task_answer_table(plan_id: str, task: Task, items: np.ndarray, log_likelihoods: np.ndarray) -> pa.Table:
    """Rows of `task_answers` for some items of a task (their numbers), from the log-likelihoods of all their choices,
    one item after the other. Ties go to the first choice, as in lm-evaluation-harness."""
    asked = [task.items[number] for number in items]
    choices = sum(len(item.choices) for item in asked)
    if choices != len(log_likelihoods):
        raise ValueError(f"{len(log_likelihoods)} log-likelihoods for {len(items)} items with {choices} choices")
    rows, start = [], 0
    for item in asked:
        found = log_likelihoods[start : start + len(item.choices)]
        start += len(item.choices)
        lengths = np.array([len(choice) for choice in item.choices], dtype=np.float64)
        with np.errstate(divide="ignore"):  # an empty choice is never the likeliest per character
            normalised = int(np.argmax(found / lengths))
        rows.append(
            {
                "plan_id": plan_id,
                "task": task.name,
                "item_id": item.item_id,
                "content_hash": item.content_hash,
                "log_likelihoods": found.tolist(),
                "lengths": lengths.tolist(),
                "answer": item.answer,
                "predicted": int(np.argmax(found)),
                "predicted_norm": normalised if task.normalised else None,
            }
        )
    return pa.Table.from_pylist(rows, SCHEMAS["task_answers"].remove(0))


def _perplexity_row(
    plan_id: str, target: str, nll: MeanInterval, tokens: int, *, subject: str | None = None, of: str | None = None
) -> Row:
    """One row of `perplexity`; nll in nats, whose exp is infinity where it overflows; of: the text's hash."""
    limits = [None if math.isnan(limit) else perplexity(limit) for limit in (nll.low, nll.high)]
    return {
        "plan_id": plan_id,
        "target": target,
        "subject": subject,
        "tokens": tokens,
        "nll": nll.mean,
        "perplexity": perplexity(nll.mean),
        "ci_low": limits[0],
        "ci_high": limits[1],
        "text_hash": of,
    }


#: Where the buckets of a token's position in its window of plain text begin, as tables have them; the last ends with
#: the window.
_POSITIONS = (1, 16, 64, 256, 512, TEXT_WINDOW)
_PASSAGES = (1, *range(PASSAGE, TEXT_WINDOW + 1, PASSAGE))
#: Edges of the buckets in which workers give the losses of plain text: those that passages and positions need.
EDGES = tuple(sorted({*_POSITIONS, *_PASSAGES}))


def text_perplexity_row(plan_id: str, losses: TextLosses, text: str) -> Row:
    """The row of `perplexity` of plain text, with the interval that other passages of the same text would give."""
    passages = losses.coarser(_PASSAGES)
    window, number = np.nonzero(passages.tokens)
    tokens, nll = pooled(
        passages.windows[window],
        np.array(_PASSAGES)[number],
        passages.tokens[window, number],
        passages.nll[window, number],
    )
    return _perplexity_row(plan_id, "text", ratio_interval(nll, tokens), int(passages.tokens.sum()), of=text_hash(text))


def text_loss_rows(plan_id: str, losses: TextLosses) -> list[Row]:
    """Rows of `text_losses`, one a passage."""
    passages = losses.coarser(_PASSAGES)
    return [
        {
            "plan_id": plan_id,
            "window": int(passages.windows[window]),
            "position": _PASSAGES[number],
            "tokens": int(passages.tokens[window, number]),
            "nll": float(passages.nll[window, number]),
        }
        for window, number in np.argwhere(passages.tokens)
    ]


def position_rows(plan_id: str, losses: TextLosses) -> list[Row]:
    """Rows of `context`: the mean loss of text tokens by position, buckets without tokens left out."""
    found = losses.coarser(_POSITIONS)
    return [
        {
            "plan_id": plan_id,
            "measure": "position_nll",
            "bucket": bucket,
            "n": int(count),
            "value": float(loss) / int(count),
        }
        for bucket, loss, count in zip(_POSITIONS[:-1], found.nll.sum(0), found.tokens.sum(0), strict=True)
        if count
    ]


def cost_row(plan: MergePlan, plan_id: str, checkpoint: Checkpoint, quantise: str = "none") -> Row:
    """The row of `costs`: layers and parameters, and the weights' bytes as stored, or with quantised matrices."""
    kept = [layer.index for layer in plan.kept]
    parameters, stored = checkpoint.size(kept)
    if quantise != "none":
        arch = checkpoint.architecture
        quantised = [matrix for matrix in arch.matrices if matrix not in arch.routers]
        # Shapes come from the files' headers: indexing the checkpoint would read each tensor to see that it is finite.
        for kind, (rows, columns) in (
            checkpoint.stored(arch.layer_name(layer, f"{m}.weight")) for layer in kept for m in quantised
        ):
            stored += quantised_bytes(rows, columns, quantise) - rows * columns * ITEM_BYTES[kind]
    return {
        "plan_id": plan_id,
        "layers": len(kept),
        "layers_removed": plan.n_layers - len(kept),
        "parameters": parameters,
        "parameters_removed": checkpoint.size()[0] - parameters,
        "bytes": stored,
    }


def receipt_rows(plan_id: str, found: Sequence[Receipt]) -> list[Row]:
    """Rows of `receipts`."""
    return [{"plan_id": plan_id, **asdict(receipt)} for receipt in found]


def history_rows(searcher: str, start: int, history: Sequence[Epoch]) -> list[Row]:
    """Rows of `gradient_history`, one an epoch; alphas step by step, per matrix one matrix after the other."""
    return [
        {
            "searcher": searcher,
            "start": start,
            "epoch": epoch.epoch,
            "loss": epoch.loss,
            "held_out_loss": epoch.held_out_loss,
            "alphas": epoch.alphas.ravel().tolist(),
        }
        for epoch in history
    ]
