"""What plans reached subject by subject: the best against each other one, a single plan's accuracies, and MMLU's
categories of subjects."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from raymerge import findings
from raymerge.domains import CATEGORIES, CATEGORY_OF
from raymerge.report import figures
from raymerge.report.asked import figure_of
from raymerge.report.content import UNMERGED, Block, Section, Table
from raymerge.report.reached import Reached, missing
from raymerge.report.wording import NONE, count, percent, perplexity, signed, value
from raymerge.schemas import CHANCE, Row
from raymerge.statistics import paired_difference, wilson_interval
from raymerge.tables import MACRO, MICRO, RunDirectory

_AGAINST = 8  # plans that the best is compared with


def differences(reached: Reached) -> Section:
    """Differences of the best plan by subject, against the unmerged model and the controls, one at a time."""
    title, rows = "Subject by subject", difference_rows(reached)
    if not rows:
        return Section(title, (missing(reached.run, "answers", "accuracy"),))
    against = list(dict.fromkeys(row["against"] for row in rows))
    first = sorted((row for row in rows if row["against"] == against[0]), key=lambda row: -row["difference"])
    clear = [row for row in first if row["clear"] == "yes"]
    told = (
        f"Against {against[0]}: from {signed(first[0]['difference'], 1)} points ({first[0]['subject']}) to "
        f"{signed(first[-1]['difference'], 1)} ({first[-1]['subject']}); {len(clear)} of {len(first)} intervals "
        "exclude 0."
    )
    figure = figure_of(
        reached.run,
        f"Difference in accuracy of {reached.the_best['label']} by subject",
        f"{told} Each 95 % interval (of the paired difference) is of one subject alone: by chance alone up to one in "
        "twenty excludes 0.",
        [figures.subject_differences(rows, f"Differences by subject, sorted. {told}", against=against)],
        rows,
        "answers",
        "plans",
    )
    plans = [line for line in (reached.base, reached.the_best) if line is not None]
    return Section(title, (figure, *every_subject(reached, plans, folded=True), *categories(reached)))


def stored_subjects(reached: Reached, plan_id: str) -> list[Row]:
    """A plan's rows of `accuracy` by subject on the report split, the most accurate first."""
    rows = reached.run.read("accuracy").to_pylist()
    own = [row for row in rows if (row["plan_id"], row["split"]) == (plan_id, reached.split)]
    return sorted((row for row in own if row["subject"] not in (MICRO, MACRO)), key=lambda row: -row["accuracy"])


def every_subject(reached: Reached, plans: list[Row], *, folded: bool = False) -> list[Block]:
    """What plans reached in every subject, beside each other; the most accurate of the first one's first."""
    plans = list({line["plan_id"]: line for line in plans}.values())
    own = [{row["subject"]: row for row in stored_subjects(reached, line["plan_id"])} for line in plans]
    asked = findings.question_perplexities(reached.run)
    read = [
        {subject: asked.get((line["plan_id"], subject)) for subject in rows}
        for line, rows in zip(plans, own, strict=True)
    ]
    measures: list[tuple[str, list[dict[str, str]]]] = [
        ("accuracy [95 %]", [{subject: _accuracy(row) for subject, row in rows.items()} for rows in own]),
        ("answer NLL", [{subject: value(row["nll"]) for subject, row in rows.items()} for rows in own]),
    ]
    if any(row is not None for rows in read for row in rows.values()):
        shown = [{subject: _perplexity(row) for subject, row in rows.items()} for rows in read]
        measures.append(("question perplexity", shown))
    names = [f", {line['label']}" if len(plans) > 1 else "" for line in plans]
    header = ("subject", "questions", *(f"{measure}{name}" for measure, _ in measures for name in names))
    cells = [
        (subject, str(row["n"]), *(shown.get(subject, NONE) for _, columns in measures for shown in columns))
        for subject, row in own[0].items()
    ]
    whose = f" of {plans[0]['label']}" if len(plans) > 1 else ""
    caption = f"Every subject, the most accurate{whose} first, with 95 % intervals of each subject alone"
    return [Table.of(caption, header, cells, folded=folded)] if cells else []


def _accuracy(row: Row) -> str:
    return percent(row["accuracy"], limits=(row["ci_low"], row["ci_high"]))


def _perplexity(row: Row | None) -> str:
    return NONE if row is None else perplexity(row["perplexity"], (row["ci_low"], row["ci_high"]))


def categories(reached: Reached) -> list[Block]:
    """Every plan's accuracy in MMLU's categories of subjects; nothing where fewer than two were asked of."""
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for row in reached.run.read("accuracy").to_pylist():
        category = CATEGORY_OF.get(row["subject"])
        if row["split"] == reached.split and category is not None:
            correct, n = counts.setdefault(row["plan_id"], {}).get(category, (0, 0))
            counts[row["plan_id"]][category] = correct + row["correct"], n + row["n"]
    lines = [line for line in reached.lines if line["plan_id"] in counts]
    there = [name for name in CATEGORIES if any(name in counts[line["plan_id"]] for line in lines)]
    if len(there) < 2:
        return []
    asked = counts[lines[0]["plan_id"]]
    cells = [(line["label"], *(_share(counts[line["plan_id"]].get(name)) for name in there)) for line in lines]
    caption = (
        "Accuracy in MMLU's categories of subjects, over all questions of each, with 95 % intervals. Questions: "
        + ", ".join(f"{name} {count(asked[name][1])}" for name in there if name in asked)
    )
    return [Table.of(caption, ("plan", *there), cells, folded=len(cells) > _AGAINST + 4)]


def _share(counted: tuple[int, int] | None) -> str:
    if counted is None:
        return NONE
    correct, n = counted
    return percent(correct / n, limits=wilson_interval(correct, n))


def difference_rows(reached: Reached) -> list[Row]:
    """Paired differences (percentage points) of the best plan and each other, subject by subject; the unmerged model
    first, then the controls in the order of their accuracy."""
    best = reached.best
    if best is None:
        return []
    answers = reached.run.read("answers", ["plan_id", "split", "subject", "question_id", "answer", "predicted"])
    answers = answers.filter(pc.equal(answers["split"], reached.split))
    others = sorted((line for line in reached.lines if line is not best), key=lambda line: line["kind"] != "base")

    def right(plan_id: str) -> dict[tuple[str, str], bool]:
        mine = answers.filter(pc.equal(answers["plan_id"], plan_id)).to_pylist()
        return {(row["subject"], row["question_id"]): row["predicted"] == row["answer"] for row in mine}

    own, rows = right(best["plan_id"]), []
    names = sorted({subject for subject, _ in own})
    for line in others[:_AGAINST]:
        other = right(line["plan_id"])
        if other.keys() != own.keys():
            continue
        for subject in names:
            keys = [key for key in own if key[0] == subject]
            pair = [np.array([side[key] for key in keys], dtype=np.float64) for side in (own, other)]
            found = paired_difference(*pair, n_resamples=4000)
            rows.append(
                {
                    "subject": subject,
                    "against": line["label"],
                    "difference": 100 * found.difference,
                    "low": 100 * found.ci_low,
                    "high": 100 * found.ci_high,
                    "clear": "yes" if found.ci_low > 0 or found.ci_high < 0 else "no",
                    "n": len(keys),
                }
            )
    return rows


def accuracies(run: RunDirectory, stored: list[Row]) -> list[Block]:
    """A figure of one plan's accuracies by subject; stored: rows of `accuracy`, in the order to be drawn."""
    if not stored:
        return []
    rows = [
        {
            "subject": row["subject"],
            "role": UNMERGED,
            "accuracy": row["accuracy"],
            "low": row["ci_low"],
            "high": row["ci_high"],
            "n": row["n"],
        }
        for row in stored
    ]
    first, last = rows[0], rows[-1]
    told = f"From {percent(first['accuracy'])} ({first['subject']}) to {percent(last['accuracy'])} ({last['subject']})."
    tips = [("subject", "subject"), ("accuracy", "accuracy", ".1%"), ("low", "95 % from", ".1%"), ("high", "to", ".1%"),
            ("n", "questions", ",d")]  # fmt: skip
    view = figures.intervals(
        rows,
        f"Accuracy by subject with 95 % intervals. {told}",
        name="subject",
        value="accuracy",
        axis="accuracy",
        form=figures.SHARES,
        tips=tips,
        rule=(CHANCE, "chance"),
    )
    return [figure_of(run, "Accuracy by subject", f"{told} Bars: 95 % intervals.", [view], rows, "accuracy")]
