"""Draw the accuracy of a run's plans: accuracy.png, accuracy_by_subject*.png, letters.png, accuracy.md.

    python analysis/accuracy.py RUN [--out DIR]

Reads tables answers, plans and perplexity; accuracies are derived from answers, so a run that has
not ended can be looked at. Shows the report split; a run with several languages gets one set of
files a language.

  accuracy.png             micro and macro average, paired difference to the reference plan, perplexity, all with 95 %
                           intervals
  accuracy_by_subject.png  every subject with its 95 % interval, one column a plan, the reference in grey
  letters.png              which letters each plan predicts
  accuracy.md              the same as tables
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from plotting import (
    COLOURS,
    DOTTED,
    GREY,
    STYLE,
    interval_bars,
    markdown,
    need,
    number,
    perplexity,
    plain_log,
    report_split,
    run_main,
    save,
    save_text,
    with_interval,
)

from raymerge.tables import (
    CHANCE,
    MACRO,
    MICRO,
    Row,
    RunDirectory,
    derive_accuracy,
    paired_difference,
    plan_labels,
    wilson_interval,
)

_COLUMNS = ["plan_id", "split", "language", "subject", "question_id", "logit_a", "logit_b", "logit_c", "logit_d",
            "top_is_letter", "answer", "predicted"]  # fmt: skip
_PANELS = 5  # plans beside each other in one figure by subject


class View(NamedTuple):
    """What one set of figures shows: one split and language of a run."""

    split: str
    language: str
    plans: dict[str, str]  # plan_id -> label, in order; those that have answers
    reference: str  # plan_id
    accuracy: dict[tuple[str, str], Row]  # (plan_id, subject) -> row of `accuracy`
    subjects: list[str]  # best first under the reference
    difference: dict[str, dict[str, float]]  # plan_id -> mean paired difference, ci_low, ci_high
    letters: dict[str, np.ndarray]  # plan_id -> share of predictions that are A, B, C, D
    truth: np.ndarray  # share of questions whose answer is A, B, C, D
    top_is_letter: dict[str, float | None]
    text: dict[str, Row]  # plan_id -> row of `perplexity` of plain text
    asked: dict[tuple[str, str | None], float]  # (plan_id, subject or None) -> perplexity of the questions' own tokens


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_main(draw, __doc__, argv)


def draw(run: RunDirectory, out: Path) -> list[Path]:
    """Write the figures and accuracy.md into `out`; return their paths. RunError if a table is missing."""
    views = views_of(run)
    paths, text = [], [f"# Accuracy of run {run.run_id} ({run.experiment})"]
    with plt.rc_context(STYLE):
        for view in views:
            suffix = f"_{view.language}" if len(views) > 1 else ""
            paths.append(draw_overview(view, out / f"accuracy{suffix}.png"))
            others = [plan for plan in view.plans if plan != view.reference] or [view.reference]
            wide = math.ceil(len(others) / math.ceil(len(others) / _PANELS))  # pages of nearly equal width
            for page, start in enumerate(range(0, len(others), wide), start=1):
                name = f"accuracy_by_subject{suffix}{f'_{page}' if page > 1 else ''}.png"
                paths.append(draw_subjects(view, others[start : start + wide], out / name))
            paths.append(draw_letters(view, out / f"letters{suffix}.png"))
            text += describe(view)
    paths.append(save_text(text, out / "accuracy.md"))
    return paths


def views_of(run: RunDirectory) -> list[View]:
    """One View a language of the report split."""
    plans = need(run, "plans", "the names of the plans")
    answers = run.read("answers", columns=_COLUMNS)
    if not answers.num_rows:
        need(run, "answers", "accuracies")
    split = report_split(run, answers["split"].unique().to_pylist(), "answers")
    answers = answers.filter(pc.equal(answers["split"], split))
    rows = derive_accuracy(answers)  # not table accuracy, which is written at the end and may be older
    read = run.read("perplexity").to_pylist()
    text = {row["plan_id"]: row for row in read if row["target"] == "text"}
    asked = {(row["plan_id"], row["subject"]): row["perplexity"] for row in read if row["target"] == "question"}
    labels = plan_labels(plans, run.read("trials").to_pylist())
    if run.experiment == "evaluate":  # which may have been merged before
        labels = dict.fromkeys(labels, "the model")
    views = []
    for language in answers["language"].unique().to_pylist():
        part = answers.filter(pc.equal(answers["language"], language))
        answered: list[str] = part["plan_id"].unique().to_pylist()
        order = [plan for plan in labels if plan in answered] + [plan for plan in answered if plan not in labels]
        reference = reference_plan(plans, order)
        accuracy = {(row["plan_id"], row["subject"]): row for row in rows if row["language"] == language}
        subjects = [subject for plan, subject in accuracy if plan == reference and subject not in (MICRO, MACRO)]
        subjects.sort(key=lambda subject: -accuracy[reference, subject]["accuracy"])
        given = {plan: Given.of(part.filter(pc.equal(part["plan_id"], plan))) for plan in order}
        views.append(
            View(
                split,
                language,
                {plan: labels.get(plan, plan) for plan in order},
                reference,
                accuracy,
                subjects,
                {plan: difference_of(given[plan], given[reference]) for plan in order},
                {plan: one.letters for plan, one in given.items()},
                given[reference].truth,
                {plan: one.top_is_letter for plan, one in given.items()},
                text,
                asked,
            )
        )
    return views


class Given(NamedTuple):
    """What one plan answered: (subject, question_id) -> whether it is right; the shares of A, B, C, D among its
    predictions and among the right answers; and how often the most likely token is a letter."""

    correct: dict[tuple[str, str], bool]
    letters: np.ndarray
    truth: np.ndarray
    top_is_letter: float | None

    @classmethod
    def of(cls, answers: pa.Table) -> Given:
        """From one plan's rows of `answers`."""
        keys = zip(answers["subject"].to_pylist(), answers["question_id"].to_pylist(), strict=True)
        predicted, answer = answers["predicted"].to_numpy(), answers["answer"].to_numpy()
        correct = dict(zip(keys, (predicted == answer).tolist(), strict=True))
        letters, truth = (np.bincount(each, minlength=4) / each.size for each in (predicted, answer))
        return cls(correct, letters, truth, pc.mean(answers["top_is_letter"]).as_py())


def difference_of(plan: Given, reference: Given) -> dict[str, float]:
    """The paired difference in accuracy on the questions that both answered; NaN where there are none."""
    common = plan.correct.keys() & reference.correct.keys()
    pair = [np.array([side.correct[key] for key in common], dtype=float) for side in (plan, reference)]
    return paired_difference(*pair)._asdict() if common else {"difference": math.nan}


def reference_plan(plans: list[Row], order: list[str]) -> str:
    """The unmerged model if it was evaluated, else the plan of kind base, else the first."""
    base = [row for row in plans if row["kind"] == "base" and row["plan_id"] in order]
    return next((row["plan_id"] for row in sorted(base, key=lambda row: row["step"] is not None)), order[0])


def draw_overview(view: View, path: Path) -> Path:
    """Rows are plans; panels are the averages and, where there are some, paired differences and perplexities of plain
    text."""
    plans = list(view.plans)
    y = np.arange(len(plans))
    known = [plan for plan in plans if plan in view.text and math.isfinite(view.text[plan]["perplexity"])]
    panels: list[Callable[[Axes, View], None]] = [partial(draw_averages, y=y)]
    panels += [draw_change] if len(plans) > 1 else []
    panels += [partial(draw_texts, known=known)] if known else []
    size = {1: 5.5, 2: 8, 3: 10.5}[len(panels)], 1.75 + 0.3 * len(plans)
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=size, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis, view)
    averages = axes[0, 0]
    n = view.accuracy[view.reference, MICRO]["n"]
    note = f"bars: 95 % intervals; {n:,} questions, {len(view.subjects)} subjects, language {view.language}"
    handles = averages.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8, title=note, title_fontsize=8)
    return save(figure, path)


def draw_averages(axis: Axes, view: View, y: np.ndarray) -> None:
    """Micro and macro accuracy of every plan, and of always answering A."""
    for subject, shift, fill, name in (
        (MICRO, -0.13, True, "micro (per question)"),
        (MACRO, 0.13, False, "macro (per subject)"),
    ):
        rows = [view.accuracy[plan, subject] for plan in view.plans]
        axis.errorbar(
            [100 * row["accuracy"] for row in rows],
            y + shift,
            fmt="o" if fill else "D",
            color="#0072B2",
            xerr=interval_bars(rows, scale=100),
            mfc=None if fill else "white",
            ms=5,
            lw=1.2,
            label=name,
        )
    axis.axvline(100 * CHANCE, **DOTTED, label="chance")
    axis.plot(100 * view.truth[0], len(y), "x", color=GREY, ms=6)
    axis.set_yticks([*y, len(y)], [*view.plans.values(), "always A"])
    axis.set_ylim(len(y) + 0.6, -0.6)
    axis.set(xlabel="accuracy (%)", title=f"Accuracy, {view.split} split")


def draw_change(axis: Axes, view: View) -> None:
    """Every plan's paired difference to the reference."""
    moved = {i: view.difference[plan] for i, plan in enumerate(view.plans) if plan != view.reference}
    rows = list(moved.values())
    axis.errorbar(
        [100 * row["difference"] for row in rows],
        list(moved),
        fmt="o",
        color="#D55E00",
        ms=5,
        lw=1.2,
        xerr=interval_bars(rows, "difference", scale=100),
    )
    axis.axvline(0, color="black", lw=1)
    axis.set(xlabel="percentage points", title=f"Difference to {view.plans[view.reference]}")


def draw_texts(axis: Axes, view: View, known: list[str]) -> None:
    """The perplexities of the plans that have one."""
    rows, plans = [view.text[plan] for plan in known], list(view.plans)
    at, values = [plans.index(plan) for plan in known], [row["perplexity"] for row in rows]
    axis.errorbar(values, at, fmt="s", color="#009E73", xerr=interval_bars(rows, "perplexity"), ms=5, lw=1.2)
    axis.set_xscale("log")
    axis.set(xlabel="perplexity (log scale)", title="Plain text, lower is better")
    for i, value in zip(at, values, strict=True):
        axis.annotate(perplexity(value) or "", (value, i), xytext=(0, 4), textcoords="offset points", ha="center",
                      fontsize=7.5)  # fmt: skip
    axis.margins(x=0.12)  # room for the numbers
    plain_log(axis.xaxis, *axis.get_xlim())


def draw_subjects(view: View, plans: list[str], path: Path) -> Path:
    """One column a plan, one line a subject: the reference in grey, the plan in colour, its 95 % interval."""
    lines = [MICRO, MACRO, *view.subjects]
    y = np.arange(len(lines), dtype=float)
    y[:2] -= 0.8  # the averages stand apart
    figure, axes = plt.subplots(
        1,
        len(plans),
        squeeze=False,
        figsize=(2.4 + 1.95 * len(plans), 1.5 + 0.185 * len(lines)),
    )
    for axis, plan in zip(axes[0], plans, strict=True):
        base = np.array([100 * view.accuracy[view.reference, subject]["accuracy"] for subject in lines])
        rows = [view.accuracy.get((plan, subject), {}) for subject in lines]  # a plan may lack a subject: a gap
        mine = np.array([100 * row.get("accuracy", math.nan) for row in rows])
        if plan != view.reference:
            axis.plot(base, y, "o", ms=6.5, mfc="white", mec="#6B6B6B", mew=1, zorder=2)  # a ring around an equal one
            axis.hlines(y, base, mine, color="#C4C4C4", lw=1.1, zorder=1)
        axis.errorbar(
            mine, y, xerr=interval_bars(rows, scale=100), fmt="o", ms=4, elinewidth=0.9, color=COLOURS[1], zorder=3
        )
        axis.axvline(100 * CHANCE, color=GREY, ls=":", lw=1)
        axis.set_xlim(-3, 103)
        axis.set_xticks([0, 25, 50, 75, 100])
        axis.set_title(view.plans[plan].replace(" = ", "\n= "), fontsize=9)
        # lines instead of ticks: 57 tick objects a panel take longer to lay out than all else to draw
        axis.set_yticks([])
        axis.hlines(y, -3, 103, color=STYLE["grid.color"], lw=STYLE["grid.linewidth"], zorder=0)
        axis.set_ylim(y[-1] + 0.7, y[0] - 0.7)
    names = ["micro average", "macro average", *(subject.replace("_", " ") for subject in view.subjects)]
    axes[0, 0].set_yticks(y, names, fontsize=8)
    for label in axes[0, 0].get_yticklabels()[:2]:
        label.set_fontweight("bold")
    axes[0, 0].tick_params(axis="y", length=0)
    note = "" if plans == [view.reference] else f"; open circles: {view.plans[view.reference]}"
    figure.supxlabel(
        f"accuracy (%), {view.split} split, {view.language}; bars: 95 % intervals; dotted: chance{note}",
        fontsize=8.5,
    )
    return save(figure, path)


def draw_letters(view: View, path: Path) -> Path:
    """Stacked bars: the share of each letter among a plan's predictions, and among the right answers."""
    names = ["right answers", *view.plans.values()]
    shares = 100 * np.stack([view.truth, *view.letters.values()])
    y = np.arange(len(names), dtype=float)
    y[0] -= 0.4
    figure, axis = plt.subplots(figsize=(7.2, 1.5 + 0.29 * len(names)))
    start = np.zeros(len(names))
    for k, (letter, colour) in enumerate(zip("ABCD", ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True)):
        axis.barh(y, shares[:, k], left=start, height=0.76, color=colour, edgecolor="white", lw=0.8, label=letter)
        for i in range(len(names)):
            if shares[i, k] >= 5:
                axis.text(
                    start[i] + shares[i, k] / 2,
                    y[i],
                    f"{shares[i, k]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if letter == "A" else "black",
                )
        start += shares[:, k]
    axis.set_yticks(y, names)
    axis.set_ylim(y[-1] + 0.6, y[0] - 0.6)
    axis.set_xlim(0, 100)
    axis.grid(False)
    axis.set(xlabel="share of questions (%)", title=f"Letters predicted, {view.split} split, {view.language}")
    figure.legend(loc="outside right center", title="letter")
    return save(figure, path)


def describe(view: View) -> list[str]:
    """The sections of accuracy.md for one view."""
    letters = [["right answers", *[number(share) for share in view.truth], None]]
    for plan, label in view.plans.items():
        letters.append([label, *[number(share) for share in view.letters[plan]], number(view.top_is_letter[plan])])
    subjects, losses = [], []
    for subject in [MICRO, MACRO, *view.subjects]:
        rows = [view.accuracy.get((plan, subject)) for plan in view.plans]
        name = subject.strip("_")
        subjects.append([name, view.accuracy[view.reference, subject]["n"], *map(with_interval, rows)])
        losses.append([name, *[number((row or {}).get("nll")) for row in rows]])
    return [
        f"## {view.split} split, language {view.language}",
        "Accuracies have 95 % intervals (Wilson's). The difference is that of the micro averages, paired by question "
        "(interval of Bonett and Price). NLL is in nats: for the right letter among the four, and per token of plain "
        "text.",
        plan_table(view),
        "### Letters\n\nShare of each letter among the predictions, and share of questions for which the most likely "
        "token of the whole vocabulary is a letter.",
        markdown(["plan", "A", "B", "C", "D", "top token is a letter"], letters),
        "### By subject",
        markdown(["subject", "n", *view.plans.values()], subjects),
        "### Answer NLL by subject",
        markdown(["subject", *view.plans.values()], losses),
        *asked_perplexities(view),
    ]


def asked_perplexities(view: View) -> list[str]:
    """The section on the perplexity of the questions' own tokens, where it was measured."""
    if not view.asked:
        return []
    rows = [["all questions", *[perplexity(view.asked.get((plan, None))) for plan in view.plans]]]
    each = [[view.asked.get((plan, subject)) for plan in view.plans] for subject in view.subjects]
    means = [None if None in column else float(np.mean(column)) for column in zip(*each, strict=True)]
    rows.append(["mean of subjects", *map(perplexity, means)])
    rows += [[subject, *map(perplexity, row)] for subject, row in zip(view.subjects, each, strict=True)]
    return [
        "### Perplexity of the questions' own tokens\n\nOf all questions and of each subject: exp of the mean loss of "
        "their prompts, examples not counted. The mean of the subjects' perplexities is the average that the published "
        "evaluation gives; it is governed by the worst subjects.",
        markdown(["subject", *view.plans.values()], rows),
    ]


def plan_table(view: View) -> str:
    """Every plan's averages, difference to the reference and losses, and always answering A, as Markdown."""
    rows = []
    for plan, label in view.plans.items():
        micro, text = view.accuracy[plan, MICRO], view.text.get(plan, {})
        rows.append(
            [
                label,
                micro["n"],
                with_interval(micro),
                with_interval(view.accuracy[plan, MACRO]),
                with_interval(view.difference[plan], "difference", sign="+") if plan != view.reference else None,
                number(micro["nll"]),
                perplexity(text.get("perplexity")),
                number(text.get("nll")),
            ]
        )
    n = view.accuracy[view.reference, MICRO]["n"]
    low, high = wilson_interval(round(n * view.truth[0]), n)
    always = {"accuracy": view.truth[0], "ci_low": low, "ci_high": high}
    rows.append(["always A", n, with_interval(always), None, None, None, None, None])
    header = ["plan", "n", "micro accuracy", "macro accuracy", f"difference to {view.plans[view.reference]}",
              "answer NLL", "text perplexity", "text NLL"]  # fmt: skip
    return markdown(header, rows)


if __name__ == "__main__":
    sys.exit(main())
