"""What plans reached: the answer, its table and its figures; for every run that has evaluated plans."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge import findings, summary
from raymerge.report import figures
from raymerge.report.answer import LINKS, firm, in_words, told
from raymerge.report.asked import figure_of
from raymerge.report.content import UNMERGED, Block, Fact, Facts, Section, Table, Text, View
from raymerge.report.reached import TEXT_TEST, Reached, chosen_layers, described, drawn, missing, removed_share
from raymerge.report.vega import Tip
from raymerge.report.wording import (
    NONE,
    difference,
    interval,
    listed,
    millions,
    p_value,
    percent,
    perplexity,
    plural,
    value,
)
from raymerge.schemas import Row

NBSP = "\u00a0"


def answer(reached: Reached) -> Section:
    """The best plan against base and controls, in a sentence, in large figures and in a table."""
    run, best, base = reached.run, reached.best, reached.base
    if not reached.lines:
        return Section("The answer", (missing(run, "accuracy", "answers", "plans"),))
    if best is None:
        return Section("The answer", (plan_table(reached),))
    blocks: list[Block] = [*map(Text, in_words(reached)), Facts(tuple(_tiles(best, base)), large=True)]
    found = reached.against(best["plan_id"], "accuracy" if reached.asks else "text_nll")
    if found:
        blocks.append((_verdicts if reached.asks else _text_verdicts)(reached, found))
    blocks += [*_on_subjects(reached), plan_table(reached), *_overview(reached)]
    blocks += chosen_layers(run)
    optimism = summary.optimism_lines(run, reached.split)
    if optimism:
        blocks.append(Text(f"Optimism of the search. {'. '.join(optimism)}."))
    return Section("The answer", tuple(blocks))


def _tiles(best: Row, base: Row | None) -> list[Fact]:
    tiles = []
    if best["accuracy"] is not None:
        tiles.append(Fact("Accuracy", percent(best["accuracy"]), _interval(best)))
    if base is not None and base["accuracy"] is not None:
        tiles.append(Fact("Unmerged", percent(base["accuracy"]), _interval(base)))
    if best["perplexity"] is not None:
        unmerged = "" if base is None else f"unmerged {perplexity(base['perplexity'])}"
        tiles.append(Fact("Perplexity, plain text", perplexity(best["perplexity"]), unmerged))
    costs = best["costs"]
    if costs:
        whole = costs["layers"] + costs["layers_removed"]
        parameters = millions(costs["parameters"] + costs["parameters_removed"])
        gone = f"{percent(removed_share(costs))} of {parameters} parameters removed"
        tiles.append(Fact("Layers", f"{costs['layers']} of {whole}", gone))
    return tiles


def _interval(line: Row) -> str:
    """The interval of a line's accuracy, which runs of earlier versions have not."""
    known = interval(*line["interval"])
    return known and f"95 % interval {known}"


_SIGNS = {"better": "▲", "worse": "▼", "indistinguishable": "≈"}


def _said(row: Row) -> str:
    said = findings.verdict(row)
    if said not in LINKS:
        said = f"indistinguishable (uncorrected: {said.split(',')[0]})"
    return f"{_SIGNS[firm(row)]}{NBSP}{said}"


def _verdicts(reached: Reached, found: dict[str, Row]) -> Table:
    best = reached.the_best
    finer, read = (reached.against(best["plan_id"], measure) for measure in ("answer_nll", "text_nll"))
    texts = any(line["perplexity"] is not None for line in reached.lines)
    cells = []
    for line in reached.lines:
        row, nll, text = (rows.get(line["plan_id"]) for rows in (found, finer, read))
        if row is None:
            continue
        on_text = (
            perplexity(line["perplexity"], line["perplexity_interval"]),
            NONE if text is None else _judged(text),
        )
        cells.append((line["label"], *compared_cells(row), *compared_cells(nll), *(on_text if texts else ())))
    told = (
        f". Perplexity: the other plan's, and a sign-flip test of the two plans on the text's passages"
        f"{f'. {TEXT_TEST}' if read else ''}"
    ) if texts else ""  # fmt: skip
    header = ("against", "accuracy", VERDICT, "answer NLL", VERDICT)
    return Table(
        f"{best['label']} minus every other plan on the same questions, with 95 % intervals of the paired "
        "difference. Accuracy: percentage points, p of McNemar's exact test. Answer NLL: nats (lower is better), p of "
        f"a sign-flip test. {_holm(cells)}{told}",
        header + (("perplexity", VERDICT) if texts else ()),
        tuple(cells),
        words=(0, 2, 4, *((6,) if texts else ())),
    )


VERDICT = "verdict, p (Holm)"


def _judged(row: Row) -> str:
    """What a comparison says, with its p: in one cell, which breaks between the two where there is little room."""
    p = f"p {p_value(row['p_value'])} ({p_value(row['p_holm'])})"
    return f"{_said(row)}, {p.replace(' ', NBSP)}"


def compared_cells(row: Row | None) -> tuple[str, str]:
    """A difference with its interval, and what it says with its p; of no row, nothing."""
    return (NONE, NONE) if row is None else (difference(row), _judged(row))


def _on_subjects(reached: Reached) -> list[Block]:
    """The best plan against the others on the subjects that the search was for, where it was not for all."""
    best = reached.the_best
    found, finer = (reached.against(best["plan_id"], measure, searched=True) for measure in ("accuracy", "answer_nll"))
    cells = [
        (line["label"], *compared_cells(found[line["plan_id"]]), *compared_cells(finer.get(line["plan_id"])))
        for line in reached.lines
        if line["plan_id"] in found
    ]
    if not cells:
        return []
    row = next(iter(found.values()))
    subjects = listed(findings.searched_names(reached.run))
    questions = f"{plural(row['n'], row['split'] + ' question')} of {subjects}"
    by_nll = told(reached, finer)
    return [
        Text(
            f"The search asked only questions of {subjects}. By accuracy on the {questions}, {best['label']} "
            f"is {told(reached, found)}." + (f" By answer NLL it is {by_nll}." if by_nll else "")
        ),
        Table(
            f"The same comparison on the {questions} only. {_holm(cells)}",
            ("against", "accuracy", VERDICT, "answer NLL", VERDICT),
            tuple(cells),
            words=(0, 2, 4),
        ),
    ]


def _holm(cells: Sequence[tuple[str, ...]]) -> str:
    return f"Holm's p, in brackets, corrects for all {plural(len(cells), 'comparison')}, separately for each measure"


def _text_verdicts(reached: Reached, found: dict[str, Row]) -> Table:
    """`_verdicts` where no questions were asked."""
    cells = [
        (
            line["label"],
            *compared_cells(row),
            perplexity(line["perplexity"], line["perplexity_interval"]),
        )
        for line in reached.lines
        if (row := found.get(line["plan_id"])) is not None
    ]
    return Table(
        f"{reached.the_best['label']} minus every other plan on the same text: nats per token (lower is better), with "
        f"95 % intervals over passages and p of a sign-flip test. {TEXT_TEST}. {_holm(cells)}",
        ("against", "loss per token", VERDICT, "perplexity"),
        tuple(cells),
        words=(0, 2),
    )


def _layers(reached: Reached) -> str:
    """What stands in brackets behind the plans, where a plan has any."""
    if all(line["role"] == UNMERGED for line in reached.lines):
        return ""
    return (
        ". In brackets: which of the original layers, counted from 0, are averaged into one (merged), have whole "
        "matrices in another, and are dropped"
    )


def plan_table(reached: Reached) -> Table:
    """Every plan, of a run that has any: the most accurate first, or without questions the one of the least
    perplexity."""
    if not reached.asks:
        return _text_plan_table(reached)
    best = reached.best["plan_id"] if reached.best else None
    texts = any(line["perplexity"] is not None for line in reached.lines)
    asked = any(line["question_perplexity"] is not None for line in reached.lines)
    cells = tuple(
        (
            *_named(line),
            percent(line["accuracy"], limits=line["interval"]),
            percent(line["macro"], limits=line["macro_interval"]),
            value(line["nll"]),
            *([perplexity(line["question_perplexity"], line["question_interval"])] if asked else []),
            *([perplexity(line["perplexity"], line["perplexity_interval"])] if texts else []),
            "/".join(f"{100 * share:.0f}" for share in line["picked"]) if None not in line["picked"] else NONE,
        )
        for line in reached.lines
    )
    n = reached.lines[0]["n"]
    return Table(
        f"{_of_plans(reached, plural(n, f'{reached.split} question'), 'the most accurate')}, with 95 % intervals "
        f"(accuracies: Wilson's). Always answering A would score {percent(_always_a(reached))}{_layers(reached)}",
        (
            "plan",
            "what it is",
            "layers",
            "accuracy",
            "mean over subjects",
            "answer NLL",
            *(["question perplexity"] if asked else []),
            *(["perplexity"] if texts else []),
            "picks A/B/C/D, %",
        ),
        cells,
        words=(0, 1),
        marked=tuple(i for i, line in enumerate(reached.lines) if line["plan_id"] == best),
        folded=len(cells) > 20,
    )


def _text_plan_table(reached: Reached) -> Table:
    read = any(line["perplexity"] is not None for line in reached.lines)
    if not read:
        told = "No questions were asked, and no plain text was read: the tasks below are all that there is"
        return Table(
            f"{_of_plans(reached)}. {told}{_layers(reached)}",
            ("plan", "what it is", "layers"),
            tuple(map(_named, reached.lines)),
            words=(0, 1),
        )
    told = f"{_of_plans(reached, 'plain text', 'the lowest perplexity')}, with 95 % intervals. No questions were asked"
    return Table(
        f"{told}{_layers(reached)}",
        ("plan", "what it is", "layers", "perplexity"),
        tuple((*_named(line), perplexity(line["perplexity"], line["perplexity_interval"])) for line in reached.lines),
        words=(0, 1),
    )


def _of_plans(reached: Reached, judged_by: str = "", first: str = "") -> str:
    """How the caption of all plans begins, or of the one model of an evaluation; judged_by: what they are ranked by,
    and which stands first, where there is any."""
    alone = all(line["as_is"] for line in reached.lines)
    on = f" on {judged_by}" if judged_by else ""
    return f"{'The model' if alone else 'Every plan'}{on}{f', {first} first' if first and not alone else ''}"


def _named(line: Row) -> tuple[str, str, str]:
    """A plan's name, what it is, and its layers."""
    return line["label"], described(line), NONE if line["layers"] is None else str(line["layers"])


def tasks(reached: Reached) -> list[Section]:
    """Every plan on the further tasks, and comparisons of the plan that the run is about; nothing without tasks."""
    header, cells = summary.task_table(reached.run)
    if not cells:
        return []
    found = [
        Table.of(
            "acc takes the choice of highest log-likelihood, acc_norm the one of highest log-likelihood per character; "
            "95 % intervals (Wilson)",
            header,
            cells,
            words=(0, 1, 3),
            folded=len(cells) > 40,
        )
    ]
    best = None if reached.best is None else reached.best["plan_id"]
    header, cells = summary.task_comparison_table(reached.run, best)
    if cells:
        found.append(
            Table.of(
                "Paired differences on the tasks' items, with 95 % intervals and p of McNemar's exact test",
                header,
                cells,
                words=(0, 1, 2, 3, 8),
                folded=len(cells) > 40,
            )
        )
    return [Section("Further tasks", tuple(found))]


def _always_a(reached: Reached) -> float | None:
    return findings.always_a_share(reached.run, reached.split) if reached.run.has("answers") else None


def _overview(reached: Reached) -> list[Block]:
    if len(reached.lines) < 2 or len(reached.lines) > 40:
        return []
    rows = [
        {
            "plan": line["label"],
            "role": line["role"],
            **drawn(line),
            "answer_nll": line["nll"],
            "layers": line["layers"],
            "questions": line["n"],
        }
        for line in reached.lines
    ]
    tips = [("plan", "plan"), ("accuracy", "accuracy", ".1%"), ("low", "95 % from", ".1%"), ("high", "to", ".1%"),
            ("perplexity", "perplexity", ",.4~g"), ("perplexity_low", "95 % from", ",.4~g"),
            ("perplexity_high", "to", ",.4~g"), ("answer_nll", "answer NLL", ".3f")]  # fmt: skip
    if not reached.asks:
        tips = [tips[0], *tips[4:7]]
    views = [_accuracies(rows, tips, _always_a(reached))] if reached.asks else []
    known = [row for row in rows if row["perplexity"]]
    if known:
        views.append(_perplexities(rows, known, tips, legend=not reached.asks))
    if not views:
        return []
    shown = [name for name, there in (("accuracy", reached.asks), ("perplexity", known)) if there]
    caption = (
        "Bars are 95 % intervals of each plan on its own. To see which plans differ, use the paired comparisons above, "
        "not the overlap of the bars."
    )
    if len(shown) == 2:
        caption = (
            "Accuracy alone can hide a ruined language model: a plan may pick the right letters but no longer predict "
            f"text. Both panels list the plans in the same order. {caption}"
        )
    title = f"{' and '.join(shown).capitalize()} of every plan"
    return [figure_of(reached.run, title, caption, views, rows, *shown, "plans", columns=len(views))]


def _accuracies(rows: list[Row], tips: list[Tip], always_a: float | None) -> View:
    top, bottom = rows[0], rows[-1]
    return figures.intervals(
        rows,
        f"Accuracy of {len(rows)} plans with 95 % intervals, from {percent(top['accuracy'])} ({top['plan']}) to "
        f"{percent(bottom['accuracy'])} ({bottom['plan']}).",
        name="plan",
        value="accuracy",
        axis="accuracy",
        form=figures.SHARES,
        tips=tips,
        title="Accuracy",
        rule=None if always_a is None else (always_a, "always A"),
    )


def _perplexities(rows: list[Row], known: list[Row], tips: list[Tip], *, legend: bool) -> View:
    """In the order of all rows; known: those that have one."""
    least, most = (extreme(known, key=lambda row: row["perplexity"]) for extreme in (min, max))
    return figures.named_values(
        rows,
        f"Perplexity on plain text with 95 % intervals, from {perplexity(least['perplexity'])} ({least['plan']}) to "
        f"{perplexity(most['perplexity'])} ({most['plan']}).",
        name="plan",
        value="perplexity",
        axis="perplexity on plain text (log scale)",
        tips=tips,
        title="Perplexity, lower is better",
        legend=legend,
    )
