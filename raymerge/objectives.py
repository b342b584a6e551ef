"""What a candidate is judged by, from its answer logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raymerge.statistics import answer_nll


class Score(NamedTuple):
    """`value` in the objective's own unit (see `is_minimised`); micro accuracy; mean answer NLL in nats."""

    value: float
    accuracy: float
    nll: float


def is_minimised(objective: str) -> bool:
    """Whether a smaller value of this objective is better (an NLL) or a larger one (an accuracy)."""
    return objective.endswith("nll")


def objective_subjects(objective: str) -> list[str] | None:
    """The subjects that an objective of the form accuracy:a,b names, else None."""
    kind, _, names = objective.partition(":")
    return [name.strip() for name in names.split(",")] if kind == "accuracy" else None


def score_answers(objective: str, logits: np.ndarray, answers: np.ndarray, subjects: Sequence[str]) -> Score:
    """Judge answer logits (n, 4) against the right letters (n,), given each question's subject.

    micro_accuracy: share of all questions; macro_accuracy: mean of the subjects' shares; answer_nll: mean NLL of the
    right letter among the four; accuracy:a,b: share of the questions of subjects a and b. Accuracy and NLL of the
    result are over the same questions as the value. Logits that are not finite give NaN everywhere.
    """
    subjects = np.asarray(subjects)
    if (named := objective_subjects(objective)) is not None:
        chosen = np.isin(subjects, named)
        if not chosen.any():
            raise ValueError(f"objective {objective}: none of its subjects is among {sorted(set(subjects.tolist()))}")
        logits, answers, subjects = logits[chosen], answers[chosen], subjects[chosen]
    if not np.isfinite(logits).all():
        return Score(float("nan"), float("nan"), float("nan"))
    correct = logits.argmax(-1) == answers
    accuracy, nll = float(correct.mean()), float(answer_nll(logits, answers).mean())
    if objective == "answer_nll":
        return Score(nll, accuracy, nll)
    if objective == "macro_accuracy":
        names, which = np.unique(subjects, return_inverse=True)
        shares = np.bincount(which, weights=correct) / np.bincount(which, minlength=len(names))
        return Score(float(shares.mean()), accuracy, nll)
    if objective == "micro_accuracy" or named is not None:
        return Score(accuracy, accuracy, nll)
    raise ValueError(
        f"objective {objective!r} is not one of micro_accuracy, macro_accuracy, answer_nll, accuracy:SUBJECT"
    )
