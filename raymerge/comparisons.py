"""Paired comparisons of plans, from their answers and losses: rows of `comparisons` and of the tables like it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymerge.objectives import TEXT_WINDOW
from raymerge.schemas import TASK_MEASURES, TEXT_SPLIT, Row, letter_logits
from raymerge.statistics import answer_nll, holm, mcnemar, paired_difference

PASSAGE = 64  # tokens of plain text whose loss is stored as one
# Passages that follow each other are of one topic, and what a merge does to them is alike (docs/results.md, 2026-11-28:
# correlations of .1 to .2 at the least distance, up to .17 at the fourth). Taken for independent they would make
# intervals too narrow and tests too sure. So as many passages as possible, up to a window, are pooled into one item, as
# long as there are at least so many items; a short text gains little by it.
_LEAST_ITEMS = 16
#: Resamples of a paired test, at the least. No p is below 1 over their number, so that a large family of comparisons
#: takes more, for a p to be small enough for Holm's correction.
_RESAMPLES = 10_000
_TESTS_AT_ONCE = 8  # each holds some 80 MB of resampled values


def comparison_rows(split: str, answers: pa.Table, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Rows of `comparisons` of pairs of plans on the same questions: accuracy (exact McNemar p) and answer NLL.

    Differences are those of a pair's first plan minus its second, with intervals of 95 % (`paired_difference`). The
    pairs are one family: p_holm is adjusted for all of them, measure by measure. `answers` holds the plans' rows of
    `split`.
    """
    return _compared({"split": split}, pairs, lambda plan_id: _side(answers, plan_id))


def subject_comparison_rows(
    split: str, answers: pa.Table, subjects: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> list[Row]:
    """Rows of `subject_comparisons`: those of `comparison_rows` on the questions of some subjects, none where there are
    no such questions."""
    own = answers.filter(pc.is_in(answers["subject"], pa.array(subjects, pa.string())))
    if not own.num_rows:
        return []
    common = {"split": split, "subjects": ",".join(subjects), "n": len(pc.unique(own["question_id"]))}
    return _compared(common, pairs, lambda plan_id: _side(own, plan_id))


def text_comparison_rows(losses: pa.Table, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Rows of `comparisons` with split "text": the mean loss of a token of plain text, pooled passages as the items.

    losses: rows of `text_losses`. Pairs are left out if one of the plans has no rows, or losses that are not finite, as
    its perplexity then says.
    """
    there = set(losses["plan_id"].to_pylist())
    pairs = [pair for pair in pairs if there.issuperset(pair)]
    return _compared({"split": TEXT_SPLIT}, pairs, lambda plan_id: _text_side(losses, plan_id))


def task_comparison_rows(answers: pa.Table, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Rows of `task_comparisons`, by task and measure as `comparison_rows`. answers: rows of `task_answers`."""
    found = []
    for task in pc.unique(answers["task"]).to_pylist():
        own = answers.filter(pc.equal(answers["task"], task))
        found += _compared({"task": task}, pairs, partial(_task_side, own))
    return found


class _Side(NamedTuple):
    """A plan's part of a comparison. ids: what was asked, in order, which both sides must have alike. measures: by
    name, (items,) bool or float. counts: (items,), of how many values an item's measure is the sum; None: of one."""

    ids: list[str]
    measures: dict[str, np.ndarray]
    counts: np.ndarray | None = None


def _compared(common: Row, pairs: Sequence[tuple[str, str]], side: Callable[[str], _Side]) -> list[Row]:
    """One row a pair and measure, with Holm's p for each measure by itself; side(plan_id) gives what is compared.

    A pair has no row of a measure by which one of the two has a value that is not finite, as a broken model's loss.
    """
    sides = {plan: side(plan) for plan in dict.fromkeys(plan for pair in pairs for plan in pair)}
    n_resamples = max(_RESAMPLES, 40 * len(pairs))
    named, tested = [], []
    for plan_a, plan_b in pairs:
        side_a, side_b = sides[plan_a], sides[plan_b]
        if side_a.ids != side_b.ids:
            raise ValueError(f"plans {plan_a} and {plan_b} did not answer the same questions of {[*common.values()]}")
        for measure, a in side_a.measures.items():
            b = side_b.measures[measure]
            if np.isfinite(a).all() and np.isfinite(b).all():
                named.append({"plan_a": plan_a, "plan_b": plan_b, **common, "measure": measure})
                tested.append((a, b, side_a.counts, n_resamples))
    # numpy releases the GIL while it draws and sums: a test of 14,042 losses takes a second.
    with ThreadPoolExecutor(min(_TESTS_AT_ONCE, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda each: _tested(*each), tested)
        rows = [name | row for name, row in zip(named, found, strict=True)]
    for measure in {row["measure"] for row in rows}:
        family = [row for row in rows if row["measure"] == measure]
        for row, adjusted in zip(family, holm([row["p_value"] for row in family]), strict=True):
            row["p_holm"] = float(adjusted)
    return rows


def _tested(a: np.ndarray, b: np.ndarray, counts: np.ndarray | None, n_resamples: int) -> Row:
    """The paired difference a - b and its p: of right and wrong answers McNemar's, else that of sign flips."""
    found = paired_difference(a, b, counts=counts, n_resamples=n_resamples)
    if a.dtype == bool:
        return found._asdict() | {"p_value": mcnemar(a, b).p_value, "test": "mcnemar_exact"}
    return found._asdict() | {"test": "paired_sign_flip"}


def _side(answers: pa.Table, plan_id: str) -> _Side:
    """A plan's question ids in order, which of them it got right, and their answer NLL."""
    rows = answers.filter(pc.equal(answers["plan_id"], plan_id)).sort_by("question_id")
    answer = rows["answer"].to_numpy()
    nll = answer_nll(letter_logits(rows), answer)
    measures = {"accuracy": rows["predicted"].to_numpy() == answer, "answer_nll": nll}
    return _Side(rows["question_id"].to_pylist(), measures)


def _text_side(losses: pa.Table, plan_id: str) -> _Side:
    """A plan's passages in order, and of the items pooled from them the summed losses and the tokens."""
    rows = losses.filter(pc.equal(losses["plan_id"], plan_id)).sort_by(
        [("window", "ascending"), ("position", "ascending")]
    )
    windows, positions, *sums = (rows[name].to_numpy() for name in ("window", "position", "tokens", "nll"))
    ids = [f"{window}/{position}" for window, position in zip(windows.tolist(), positions.tolist(), strict=True)]
    tokens, nll = pooled(windows, positions, *sums)
    return _Side(ids, {"text_nll": nll}, tokens)


def _task_side(answers: pa.Table, plan_id: str) -> _Side:
    """A plan's items in order, and which of them it got right by each measure that the task has."""
    rows = answers.filter(pc.equal(answers["plan_id"], plan_id)).sort_by("item_id")
    right = {
        measure: rows[column].to_numpy(zero_copy_only=False) == rows["answer"].to_numpy()
        for measure, column in TASK_MEASURES.items()
        if not rows[column].null_count
    }
    return _Side(rows["item_id"].to_pylist(), right)


def pooled(
    windows: np.ndarray, positions: np.ndarray, tokens: np.ndarray, nll: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and summed losses of neighbouring passages (P,) together, at least `_LEAST_ITEMS` if there are as many."""
    size = TEXT_WINDOW
    while True:
        _, item = np.unique(windows * TEXT_WINDOW + positions // size * size, return_inverse=True)
        if item.max() + 1 >= _LEAST_ITEMS or size == PASSAGE:
            return np.bincount(item, weights=tokens), np.bincount(item, weights=nll)
        size //= 2
