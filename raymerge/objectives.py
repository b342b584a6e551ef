"""What a candidate is judged by: from its answer logits, and where asked from its loss on plain text."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax

from raymerge.errors import UserError
from raymerge.statistics import answer_nll

TEXT_WINDOW = 1024  # tokens in one window of plain text; windows do not overlap

ACCURACIES = ("micro_accuracy", "macro_accuracy")
LOSSES = ("answer_nll", "answer_kl", "text_nll")
OF_SUBJECTS = ("accuracy", "answer_nll", "answer_kl")
NAMED = f"{', '.join(ACCURACIES)}, {', '.join(LOSSES)}, or of subjects and domains {', '.join(OF_SUBJECTS)}:NAME[,NAME]"

_WORST_LETTERS = 5.0  # nats; guessing costs log 4 = 1.39. Beside a ceiling a letter loss counts as no more than this


class ObjectiveError(UserError):
    """A text that is no objective; the message names it and what is allowed."""


class Score(NamedTuple):
    """`value` in the objective's own unit (see `is_minimised`); micro accuracy; mean answer NLL in nats; perplexity of
    the search text. What was not asked for is None."""

    value: float
    accuracy: float | None
    nll: float | None
    perplexity: float | None = None


@dataclass(frozen=True)
class Term:
    """One part of an objective: weight, what is measured, and on which subjects (or domains, see `Objective.over`),
    where it names some."""

    weight: float
    measure: str
    subjects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Objective:
    """A weighted sum of measures, all of them accuracies or all of them losses."""

    terms: tuple[Term, ...]

    @property
    def minimised(self) -> bool:
        """Whether a smaller value is better (losses) or a larger one (accuracies)."""
        return self.terms[0].measure in LOSSES

    @property
    def weight(self) -> float:
        """The sum of the weights: of accuracies, the largest value that there can be."""
        return sum(term.weight for term in self.terms)

    @property
    def needs_text(self) -> bool:
        """Whether the loss on plain text is part of it."""
        return any(term.measure == "text_nll" for term in self.terms)

    @property
    def needs_answers(self) -> bool:
        """Whether it takes questions: text_nll alone does not."""
        return bool(self.answered)

    @property
    def needs_reference(self) -> bool:
        """Whether the unmerged model's answers are part of it."""
        return any(term.measure == "answer_kl" for term in self.terms)

    def over(self, subjects: Collection[str], domains: Mapping[str, Sequence[str]]) -> Objective:
        """The same with its domains' names replaced by their subjects.

        A name that is in `subjects` means that subject, even if a domain has it too; a name of neither stays.
        """

        def members(name: str) -> Sequence[str]:
            return [name] if name in subjects else domains.get(name, [name])

        return Objective(
            tuple(
                replace(term, subjects=tuple(dict.fromkeys(one for name in term.subjects for one in members(name))))
                for term in self.terms
            )
        )

    @property
    def subjects(self) -> list[str]:
        """Every subject that a term names, in order."""
        return list(dict.fromkeys(name for term in self.terms for name in term.subjects))

    @property
    def judged_on(self) -> list[str]:
        """The subjects whose questions alone it takes: those named if every term that takes answers names some."""
        return self.subjects if all(term.subjects for term in self.answered) else []

    @property
    def of_one_set(self) -> bool:
        """Whether all terms that take answers name the same subjects, so that they are means over one set of
        questions."""
        return len({frozenset(term.subjects) for term in self.answered}) < 2

    @property
    def answered(self) -> list[Term]:
        """The terms that take answers."""
        return [term for term in self.terms if term.measure != "text_nll"]


def parse_objective(text: str) -> Objective:
    """Read an objective: one measure, or several joined by +, each with a weight before * where it is not 1.

    Measures, over the search questions (letters: the distribution over the four answer letters):

    - micro_accuracy, macro_accuracy, accuracy:a,b: shares of right answers; of all questions, averaged over subjects,
      of the subjects, or domains, a and b
    - answer_nll: mean negative log-likelihood (nats) of the right letter
    - answer_kl: mean KL(unmerged || merged) of the letters (nats): nothing is lost that the unmerged model knew,
      whether or not it was right
    - answer_nll:a,b and answer_kl:a,b: the same of the subjects a and b
    - text_nll: mean next-token negative log-likelihood (nats) of the plain text search.text

    There is no KL of next tokens: it takes both models' logits over the whole vocabulary at every token, twice the
    cost of text_nll, which already costs more than all answers do.

    Raises ObjectiveError for an unknown measure, a weight that is not above 0, and a sum of accuracies and losses.
    """
    terms = tuple(_term(part.strip(), text) for part in text.split("+"))
    if len({term.measure in LOSSES for term in terms}) == 2:
        raise ObjectiveError(
            f"{text!r} adds accuracies, of which more is better, to losses, of which less is: "
            "take answer_nll for the accuracy, or a ceiling (search.perplexity_ceiling) for the loss"
        )
    return Objective(terms)


def _term(part: str, text: str) -> Term:
    stated, star, measure = part.rpartition("*")
    try:
        weight = float(stated) if star else 1.0
    except ValueError:
        raise ObjectiveError(f"{text!r}: {stated!r} is no number: write a sum as answer_nll+0.1*text_nll") from None
    if not (math.isfinite(weight) and weight > 0):
        raise ObjectiveError(f"{text!r}: the weight {weight:g} should be above 0; leave the measure out instead")
    measure = measure.strip()
    kind, colon, names = measure.partition(":")
    if kind in OF_SUBJECTS and colon:
        subjects = tuple(name.strip() for name in names.split(",") if name.strip())
        if not subjects:
            raise ObjectiveError(f"{kind}: must be followed by subjects or domains, such as {kind}:anatomy")
        return Term(weight, kind, subjects)
    if measure not in (*ACCURACIES, *LOSSES):
        raise ObjectiveError(f"{measure!r} is not one of {NAMED}, or a sum such as answer_nll+0.1*text_nll")
    return Term(weight, measure)


def is_minimised(objective: str) -> bool:
    """Whether a smaller value of this objective is better (losses) or a larger one (accuracies)."""
    return parse_objective(objective).minimised


def descended(objective: str, text_kl: float = 0.0) -> str:
    """The loss that descents minimise for an objective: answer_nll for accuracies, which have no gradient, and what the
    configuration adds to it (gradient.text_kl)."""
    loss = objective if is_minimised(objective) else "answer_nll"
    return f"{loss}+{text_kl:g}*text_kl" if text_kl else loss


def above_ceiling(trial: Mapping[str, Any], ceiling: float | None) -> bool:
    """Whether the value of a row of `trials` is a penalty, as that of a perplexity above the search's ceiling is."""
    return ceiling is not None and trial["perplexity"] is not None and trial["perplexity"] > ceiling


def rank(trial: Mapping[str, Any]) -> tuple[float, float, int]:
    """What finished rows of `trials` are ranked by, the larger the better: the objective, of equals the lower NLL of
    answers, of these the earlier. Above a ceiling a value is worse than any candidate's that keeps to it."""
    sign = -1.0 if is_minimised(trial["objective"]) else 1.0
    # Where no questions are asked there is no NLL of answers.
    return sign * trial["value"], -(trial["nll"] or 0.0), -trial["iteration"]


def score_text(objective: str, text_nll: float, *, ceiling: float | None = None) -> Score:
    """Judge by the mean NLL (nats) of plain text alone, for an objective that needs no answers; see `score_answers`."""
    parsed = parse_objective(objective)
    if parsed.needs_answers:
        raise ValueError(f"objective {objective} needs answers to questions")
    if not math.isfinite(text_nll):
        return Score(math.nan, None, None, math.nan)
    value = parsed.weight * text_nll
    return Score(
        value if ceiling is None else _held_to(ceiling, parsed, value, text_nll), None, None, perplexity(text_nll)
    )


def trial_outcome(found: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of `trials` that say what a candidate or a control reached, of what a worker found or (`error`) of
    why it did not. A score that is not finite has failed."""
    values = {key: found.get(key) for key in ("value", "accuracy", "nll")}
    error = found.get("error")
    # Where no questions are asked there is no accuracy and no NLL of answers.
    measured = [value for value in values.values() if value is not None]
    if error is None and (values["value"] is None or not all(map(math.isfinite, measured))):
        error = f"the score is not finite: {values}"
    if error is not None:
        values = dict.fromkeys(values)
    return {
        **values,
        "perplexity": found.get("perplexity") if error is None else None,
        "n_questions": found.get("n_questions", 0),
        "status": "ok" if error is None else "failed",
        "error": error,
    }


def score_answers(
    objective: str,
    logits: np.ndarray,
    answers: np.ndarray,
    subjects: Sequence[str],
    *,
    reference: np.ndarray | None = None,
    text_nll: float | None = None,
    ceiling: float | None = None,
    domains: Mapping[str, Sequence[str]] | None = None,
) -> Score:
    """Judge answer logits (n, 4) against the right letters (n,), given each question's subject.

    Parameters
    ----------
    domains : what subjects there are in each domain that the objective may name.
    reference : array of float, shape (n, 4), optional
        The unmerged model's logits on the same questions; answer_kl needs them.
    text_nll : float, optional
        Mean NLL (nats) of the search text; text_nll and a ceiling need it.
    ceiling : float, optional
        Perplexity of the text above which a candidate may not be chosen. The value of such a candidate says nothing but
        how far above it is, e = text_nll - log(ceiling) > 0 nats. With w the sum of the weights it is, for accuracies,
        -w e / (1 + e), which is below 0, the least accuracy. For losses it is B + w e / (1 + e), where B is the
        weighted sum of 5 nats for each letter loss and log(ceiling) for the text; feasible values above B count as B
        (guessing costs 1.39 nats a letter). So every feasible candidate beats it, the further above the worse, and
        the steps stay small enough for a searcher's model.

    Accuracy and NLL of the result are over the questions of the named subjects where every term of answers names some,
    else over all. What is not finite, logits of those questions or text, gives NaN everywhere.
    """
    parsed = parse_objective(objective).over(set(subjects), domains or {})
    subject_of = np.asarray(subjects)
    if parsed.judged_on:
        chosen = _of(parsed.judged_on, subject_of, objective)
        logits, answers, subject_of = logits[chosen], answers[chosen], subject_of[chosen]
        reference = None if reference is None else reference[chosen]
    if (parsed.needs_text or ceiling is not None) and text_nll is None:
        raise ValueError(f"objective {objective} with ceiling {ceiling} needs the loss on a plain text (search.text)")
    if not np.isfinite(logits).all() or not (text_nll is None or math.isfinite(text_nll)):
        return Score(math.nan, math.nan, math.nan, None if text_nll is None else math.nan)
    correct, nll = logits.argmax(-1) == answers, answer_nll(logits, answers)

    def measured(measure: str, own: np.ndarray) -> float:
        """One measure, over the questions that `own` chooses; macro_accuracy and text_nll take no such choice."""
        if measure == "text_nll":
            assert text_nll is not None  # else refused above, as it is for a ceiling
            return text_nll
        if measure == "answer_nll":
            return float(nll[own].mean())
        if measure == "answer_kl":
            if reference is None:
                raise ValueError(f"objective {objective} needs the unmerged model's answers")
            return float(answer_kl(reference[own], logits[own]).mean())
        if measure == "macro_accuracy":
            names, which = np.unique(subject_of, return_inverse=True)
            shares = np.bincount(which, weights=correct) / np.bincount(which, minlength=len(names))
            return float(shares.mean())
        assert measure in ("micro_accuracy", "accuracy"), f"{measure} is not computed here"
        return float(correct[own].mean())

    value = 0.0
    for term in parsed.terms:
        own = _of(term.subjects, subject_of, objective) if term.subjects else np.ones(len(subject_of), dtype=bool)
        value += term.weight * measured(term.measure, own)
    if ceiling is not None:
        assert text_nll is not None
        value = _held_to(ceiling, parsed, value, text_nll)
    return Score(value, float(correct.mean()), float(nll.mean()), None if text_nll is None else perplexity(text_nll))


def _of(named: Sequence[str], subjects: np.ndarray, objective: str) -> np.ndarray:
    """(n,) bool: which questions are of the named subjects."""
    chosen = np.isin(subjects, named)
    if not chosen.any():
        raise ValueError(f"objective {objective}: none of its subjects is among {sorted(set(subjects.tolist()))}")
    return chosen


def _held_to(ceiling: float, objective: Objective, value: float, text_nll: float) -> float:
    """The value of a candidate beside a ceiling; see `score_answers`."""
    excess = text_nll - math.log(ceiling)
    penalty = objective.weight * excess / (1 + excess) if excess > 0 else 0.0
    if not objective.minimised:
        return -penalty if penalty else value
    worst = sum(
        term.weight * (math.log(ceiling) if term.measure == "text_nll" else _WORST_LETTERS) for term in objective.terms
    )
    return worst + penalty if penalty else min(value, worst)


def answer_kl(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) in nats (n,) float64 between distributions over the letters, given logits (n, 4)."""
    p, q = (log_softmax(np.asarray(values, dtype=np.float64), axis=-1) for values in (reference, logits))
    return (np.exp(p) * (p - q)).sum(-1)


def perplexity(nll: float) -> float:
    """exp of a mean NLL in nats; infinity rather than an overflow."""
    return math.exp(nll) if nll < 700 else math.inf
