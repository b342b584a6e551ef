"""What plans reached: the answer, its table and its figures; for every run that has evaluated plans."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raymerge import summary
from raymerge.objectives import is_minimised
from raymerge.report import figures
from raymerge.report.asked import command_of, sources
from raymerge.report.content import Block, Fact, Facts, Figure, Notice, Rows, Section, Table, Text
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
    signed,
    value,
)
from raymerge.schemas import TEXT_SPLIT
from raymerge.statistics import paired_difference, wilson_interval
from raymerge.tables import RunDirectory

_SHOWN = 16  # plans of which the coefficients are drawn
_AGAINST = 8  # plans that the best is compared with subject by subject

_KINDS = {
    "base": "unmerged",
    "found": "found by the search",
    "random": "best of random ones",
    "drop": "layers left out",
    "fixed": "one coefficient for all steps",
    "file": "given coefficients",
}
_NAMES = {
    "drop": "last layers left out",
    "before_last": "layers before the last left out",
    "drop_block": "the same layers left out",
    "similarity_shuffled": "those of a shuffled similarity",
}


class Reached:
    """The plans of one run and what each reached on its report split. Reads the tables once.

    lines: those of `summary.plan_lines`, with `label`, `role`, `costs` (its row or {}). best: the line of the plan that
    the run is about, None where it has none. base: the line of the unmerged model, or None.
    """

    def __init__(self, run: RunDirectory):
        self.run = run
        self.split = str(run.config.get("data", {}).get("report_split", "test"))
        self.plans = run.read("plans").to_pylist()
        names: dict[str, list[str]] = {}
        for row in self.plans:
            known = names.setdefault(row["plan_id"], [])
            if row["name"] not in known:
                known.append(row["name"])
        self.labels = {plan_id: " = ".join(known) for plan_id, known in names.items()}
        self.kinds = {row["plan_id"]: row["kind"] for row in self.plans}  # the last: found before the control it equals
        costs = {row["plan_id"]: row for row in run.read("costs").to_pylist()}
        options = {row["plan_id"]: {key: row[key] for key in ("alignment", "norms")} for row in self.plans}
        self.lines = [
            line
            | options[line["plan_id"]]
            | {
                "label": self.labels[line["plan_id"]],
                "role": figures.role_of(line["kind"]),
                "costs": costs.get(line["plan_id"], {}),
                "interval": _known_interval(line),
            }
            for line in summary.plan_lines(run, self.split)
        ]
        self.lines.sort(key=lambda line: -line["accuracy"])
        chosen = ((run.manifest() or {}).get("best") or {}).get("plan_id")
        found = [line for line in self.lines if line["kind"] == "found"]
        self.best = next((line for line in self.lines if line["plan_id"] == chosen), found[0] if found else None)
        self.base = next((line for line in self.lines if line["kind"] == "base"), None)
        splits = (self.split, TEXT_SPLIT)
        self.comparisons = [row for row in run.read("comparisons").to_pylist() if row["split"] in splits]

    def against(self, plan_id: str, measure: str = "accuracy") -> dict[str, dict]:
        """Rows of `comparisons` of one plan by a measure, by the other, signs turned where it stands second."""
        found = {}
        for row in self.comparisons:
            if row["measure"] != measure:
                continue
            if row["plan_a"] == plan_id:
                found[row["plan_b"]] = row
            elif row["plan_b"] == plan_id:
                low, high = -row["ci_high"], -row["ci_low"]
                found[row["plan_a"]] = row | {"difference": -row["difference"], "ci_low": low, "ci_high": high}
        return found


def _known_interval(line: dict) -> tuple[float, float]:
    """A line's interval; of runs of earlier versions, whose tables have none, from the counts."""
    if None not in line["interval"]:
        return line["interval"]
    return wilson_interval(round(line["accuracy"] * line["n"]), line["n"])


def described(line: dict) -> str:
    """What a plan is, in words."""
    words = [_NAMES.get(line["name"], _KINDS.get(line["kind"], line["kind"]))]
    if line["alignment"] in ("neurons", "rows"):
        words.append(f"{line['alignment']} aligned")
    return ", ".join(words + (["norms folded"] if line["norms"] == "fold" else []))


def answer(reached: Reached) -> Section:
    """The best plan against base and controls, in a sentence, in large figures and in a table."""
    run, best, base = reached.run, reached.best, reached.base
    if not reached.lines:
        return Section("The answer", (missing(run, "accuracy", "answers", "plans"),))
    if best is None:
        return Section("The answer", (plan_table(reached),))
    blocks: list[Block] = [Text(_sentence(reached)), Facts(tuple(_tiles(best, base)), large=True)]
    found = reached.against(best["plan_id"])
    if found:
        blocks.append(_verdicts(reached, found))
    blocks += [plan_table(reached), *_overview(reached)]
    blocks += chosen_layers(run)
    optimism = summary.optimism_lines(run, reached.split)
    if optimism:
        blocks.append(Text(f"How far the search flatters itself. {'. '.join(optimism)}."))
    return Section("The answer", tuple(blocks))


def chosen_layers(run: RunDirectory) -> list[Block]:
    """Which layers go, where a block of them was chosen, and by what."""
    lines = summary.block_lines(run)
    return [Text(f"Layers that go. {'. '.join(lines)}.")] if lines else []


def missing(run: RunDirectory, *tables: str) -> Notice:
    """What stands where tables have no rows."""
    empty = [table for table in tables if not run.has(table)]
    where = f"table{'s' if len(empty) > 1 else ''} {listed(empty)}" if empty else "what it was to be drawn from"
    return Notice(f"Left out: the run has no rows in {where}. The same command again goes on where it stopped.")


def _sentence(reached: Reached) -> str:
    best, base = reached.best, reached.base
    questions = plural(best["n"], f"{reached.split} question")
    sentence = f"The best plan, {best['label']}, answers {percent(best['accuracy'])} of {questions}"
    told = _told(reached, reached.against(best["plan_id"]))
    sentence += f": {told}." if told else "."
    told = _told(reached, reached.against(best["plan_id"], "answer_nll"))
    if told:
        sentence += f" By the probability of the right letter (answer NLL, finer than accuracy) it is {told}."
    if best["perplexity"] is not None:
        sentence += f" Its perplexity on plain text is {perplexity(best['perplexity'])}"
        if base is not None and base["perplexity"] is not None:
            sentence += f", the unmerged model's {perplexity(base['perplexity'])}"
        sentence += "."
    return sentence


_LINKS = {"better": "better than", "indistinguishable": "indistinguishable from", "worse": "worse than"}


def _told(reached: Reached, found: dict[str, dict]) -> str:
    """Comparisons of the best plan as half a sentence: better than ..., indistinguishable from ..., worse than ...

    What an uncorrected p alone tells apart counts as indistinguishable.
    """
    parts = []
    for said, link in _LINKS.items():
        names = [
            "the unmerged model" if line["kind"] == "base" else line["label"]
            for line in sorted(reached.lines, key=lambda line: line["kind"] != "base")
            if line["plan_id"] in found and _firm(found[line["plan_id"]]) == said
        ]
        if names:
            parts.append(f"{link} {listed(names)}")
    return "; ".join(parts)


def _firm(row: dict) -> str:
    said = summary.verdict(row)
    return said if said in _LINKS else "indistinguishable"


def _tiles(best: dict, base: dict | None) -> list[Fact]:
    tiles = [Fact("Accuracy", percent(best["accuracy"]), f"95 % interval {interval(*best['interval'])}")]
    if base is not None:
        tiles.append(Fact("Unmerged", percent(base["accuracy"]), f"95 % interval {interval(*base['interval'])}"))
    unmerged = "" if base is None else f"unmerged {perplexity(base['perplexity'])}"
    tiles.append(Fact("Perplexity, plain text", perplexity(best["perplexity"]), unmerged))
    costs = best["costs"]
    if costs:
        whole = costs["layers"] + costs["layers_removed"]
        share = costs["parameters_removed"] / (costs["parameters"] + costs["parameters_removed"])
        gone = f"{percent(share)} of {millions(costs['parameters'] + costs['parameters_removed'])} parameters removed"
        tiles.append(Fact("Layers", f"{costs['layers']} of {whole}", gone))
    return tiles


_SIGNS = {"better": "▲", "worse": "▼", "indistinguishable": "≈"}


def _said(row: dict) -> str:
    said = summary.verdict(row)
    if said not in _LINKS:
        said = f"indistinguishable (uncorrected: {said.split(',')[0]})"
    return f"{_SIGNS[_firm(row)]}\u00a0{said}"


def _verdicts(reached: Reached, found: dict[str, dict]) -> Table:
    finer, read = (reached.against(reached.best["plan_id"], measure) for measure in ("answer_nll", "text_nll"))
    cells = []
    for line in reached.lines:
        row, nll, text = (rows.get(line["plan_id"]) for rows in (found, finer, read))
        if row is None:
            continue
        cells.append(
            (
                line["label"],
                difference(row),
                f"{p_value(row['p_value'])} ({p_value(row['p_holm'])})",
                _said(row),
                *(
                    (NONE, NONE, NONE)
                    if nll is None
                    else (difference(nll), f"{p_value(nll['p_value'])} ({p_value(nll['p_holm'])})", _said(nll))
                ),
                perplexity(line["perplexity"], line["perplexity_interval"]),
                NONE if text is None else _said(text),
            )
        )
    return Table(
        f"{reached.best['label']} minus every other plan on the same questions, with 95 % intervals (paired "
        "bootstrap). Accuracy in percentage points, p of McNemar's exact test; answer NLL in nats (lower is better), p "
        f"of a sign-flip test. Holm's p, in brackets, allows for all {plural(len(cells), 'comparison')}. Perplexity: "
        "the other plan's, and what the same test says of the text's passages",
        ("against", "accuracy", "p (Holm)", "verdict", "answer NLL", "p (Holm)", "verdict", "perplexity", "verdict"),
        tuple(cells),
        words=(0, 3, 6, 8),
    )


def plan_table(reached: Reached) -> Table:
    """Every plan, the most accurate first."""
    best = reached.best["plan_id"] if reached.best else None
    cells = tuple(
        (
            line["label"],
            described(line),
            NONE if line["layers"] is None else str(line["layers"]),
            f"{percent(line['accuracy'])} {interval(*line['interval'])}".strip(),
            f"{percent(line['macro'])} {interval(*line['macro_interval'])}".strip(),
            value(line["nll"]),
            perplexity(line["perplexity"], line["perplexity_interval"]),
            "/".join(f"{100 * share:.0f}" for share in line["picked"]) if None not in line["picked"] else NONE,
        )
        for line in reached.lines
    )
    n = reached.lines[0]["n"] if reached.lines else 0
    return Table(
        f"Every plan on {plural(n, f'{reached.split} question')}, the most accurate first; intervals of 95 % (Wilson). "
        f"Always answering A would score {percent(_always_a(reached))}",
        (
            "plan",
            "what it is",
            "layers",
            "accuracy",
            "mean over subjects",
            "answer NLL",
            "perplexity",
            "picks A/B/C/D, %",
        ),
        cells,
        words=(0, 1),
        marked=tuple(i for i, line in enumerate(reached.lines) if line["plan_id"] == best),
        folded=len(cells) > 20,
    )


def _always_a(reached: Reached) -> float | None:
    return summary.always_a_share(reached.run, reached.split) if reached.run.has("answers") else None


def _overview(reached: Reached) -> list[Block]:
    if len(reached.lines) < 2 or len(reached.lines) > 40:
        return []
    rows = [
        {
            "plan": line["label"],
            "role": line["role"],
            "accuracy": line["accuracy"],
            "low": line["interval"][0],
            "high": line["interval"][1],
            "perplexity": _finite(line["perplexity"]),
            "answer_nll": line["nll"],
            "layers": line["layers"],
            "questions": line["n"],
        }
        for line in reached.lines
    ]
    tips = [("plan", "plan"), ("accuracy", "accuracy", ".1%"), ("low", "95 % from", ".1%"), ("high", "to", ".1%"),
            ("perplexity", "perplexity", ",.4~g"), ("answer_nll", "answer NLL", ".3f")]  # fmt: skip
    always = _always_a(reached)
    top, bottom = rows[0], rows[-1]
    views = [
        figures.intervals(
            rows,
            f"Accuracy of {len(rows)} plans with 95 % intervals, from {percent(top['accuracy'])} ({top['plan']}) to "
            f"{percent(bottom['accuracy'])} ({bottom['plan']}).",
            name="plan",
            value="accuracy",
            low="low",
            high="high",
            axis="accuracy",
            form=".0%",
            tips=tips,
            title="Accuracy",
            rule=None if always is None else (always, "always A"),
        )
    ]
    known = [row for row in rows if row["perplexity"]]
    if known:
        least, most = (f(known, key=lambda row: row["perplexity"]) for f in (min, max))
        views.append(
            figures.named_values(
                rows,
                f"Perplexity on plain text, from {perplexity(least['perplexity'])} ({least['plan']}) to "
                f"{perplexity(most['perplexity'])} ({most['plan']}).",
                name="plan",
                value="perplexity",
                axis="perplexity on plain text (log scale)",
                tips=tips,
                title="Perplexity, lower is better",
            )
        )
    return [
        Figure(
            "Accuracy and perplexity of every plan",
            "Accuracy alone can hide a lost language model: a plan may pick the right letters and no longer predict "
            "text. "
            "The two panels have the same order. Bars are 95 % intervals of each plan on its own; which plans differ "
            "is "
            "said by the paired comparisons above, not by whether bars overlap.",
            tuple(views),
            Rows.of(rows, sources(reached.run, "accuracy", "perplexity", "plans")),
            command_of(reached.run),
            columns=2,
        )
    ]


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else number


# -- coefficients, search, subjects, receipts


def coefficients(reached: Reached) -> Section:
    """Alpha by step, and the share that every original layer has in the merged one."""
    run, title = reached.run, "The merge coefficients"
    steps = [row for row in reached.plans if row["step"] is not None]
    if not steps or not run.has("coefficients"):
        return Section(title, (missing(run, "plans", "coefficients"),))
    shown = list(dict.fromkeys(row["plan_id"] for row in steps))[-_SHOWN:]
    alphas = [
        {
            "plan": reached.labels[row["plan_id"]],
            "matrix": row["matrix"] or "",
            "series": f"{row['plan_id']} {row['matrix'] or ''}",
            "step": row["step"],
            "merge": f"{row['remove']} into {row['into']}",
            "alpha": row["alpha"],
            "role": figures.role_of(reached.kinds[row["plan_id"]]),
            "label": "",
        }
        for row in _once(steps)
        if row["plan_id"] in shown
    ]
    _label_ends(alphas)
    alphas.sort(key=lambda row: -figures.ROLES.index(row["role"]))  # what was found is drawn last, on top
    best = reached.best
    text = ""
    if best is not None:
        own = [row["alpha"] for row in _once(steps) if row["plan_id"] == best["plan_id"] and row["matrix"] is None]
        text = f" {best['label']}: {', '.join(f'{alpha:.2f}' for alpha in own[:20])}." if own else ""
    weights = _weights(reached, shown)
    blocks: list[Block] = [
        Figure(
            "Alpha of every merge step",
            "A step merges one layer into another: alpha times the kept layer's weights plus (1 - alpha) times the "
            "removed "
            "layer's. Alpha 1 drops the removed layer, alpha 0 drops the other. Fainter lines: coefficients of single "
            "matrices." + text,
            (figures.alpha_lines(alphas, f"Alpha by merge step for {len(shown)} plans.{text}"),),
            Rows.of(alphas, sources(run, "plans")),
            command_of(run),
        )
    ]
    if weights:
        heavy = _heaviest(weights, best)
        blocks.append(
            Figure(
                "How much of each original layer is left in the merged layer",
                "The steps multiply: after all of them every original layer has one effective coefficient in the layer "
                "that it was merged into, and they sum to 1. Layers that no plan merges are left out." + heavy,
                (figures.weight_cells(weights, f"Effective coefficient of each original layer, a row a plan.{heavy}"),),
                Rows.of(weights, sources(run, "coefficients")),
                command_of(run),
            )
        )
    return Section(title, tuple(blocks))


def _label_ends(alphas: list[dict]) -> None:
    """Write the plans' names beside the last step of their lines, those of lines that end together in one label."""
    last = max(row["step"] for row in alphas)
    ends = [row for row in alphas if row["step"] == last and not row["matrix"]]
    for names, _ in _together([(row["plan"], row["alpha"]) for row in ends], [0.0, 2.4]):
        next(row for row in ends if row["plan"] == names.split(", ")[0])["label"] = names


def _once(steps: list[dict]) -> list[dict]:
    """Rows of `plans` without those that stand there again under another name of the same plan."""
    return list({(row["plan_id"], row["matrix"], row["step"]): row for row in steps}.values())


def _weights(reached: Reached, shown: list[str]) -> list[dict[str, Any]]:
    rows = [row for row in reached.run.read("coefficients").to_pylist() if row["plan_id"] in shown]
    n_layers = max((row["source_layer"] for row in rows), default=-1) + 1
    touched = {
        row["source_layer"] for row in rows if row["coefficient"] < 1 or row["kept_layer"] != row["source_layer"]
    }
    for plan_id in shown:  # a dropped layer has no row
        mine = {row["source_layer"] for row in rows if row["plan_id"] == plan_id}
        touched |= {layer for layer in range(n_layers) if layer not in mine}
    # beside the layers that a plan merges, those into which it merges them
    touched |= {row["kept_layer"] for row in rows if row["source_layer"] in touched}
    own = {(row["plan_id"], row["source_layer"], row["matrix"]): row for row in rows}
    series = dict.fromkeys((row["plan_id"], row["matrix"]) for row in rows)
    split_up = {plan_id for plan_id, matrix in series if matrix is not None}
    cells = []
    for plan_id, matrix in sorted(series, key=lambda key: (shown.index(key[0]), key[1] or "")):
        name = reached.labels[plan_id]
        if matrix is not None or plan_id in split_up:
            name = f"{matrix.rsplit('.', 1)[-1] if matrix else 'others'}, {name}"
        for layer in sorted(touched):
            row = own.get((plan_id, layer, matrix))
            if row is None and matrix is not None and (plan_id, layer, None) in own:
                row = own[plan_id, layer, None]
            weight = 0.0 if row is None else row["coefficient"]
            cells.append(
                {
                    "series": name,
                    "layer": layer,
                    "weight": weight,
                    "kept": NONE if row is None else str(row["kept_layer"]),
                    "percent": f"{100 * weight:.0f}" if weight >= 0.005 else "",
                    "plan_id": plan_id,
                }
            )
    return cells


def _heaviest(weights: list[dict], best: dict | None) -> str:
    if best is None:
        return ""
    own: dict[int, float] = {}
    for row in weights:
        if row["plan_id"] == best["plan_id"]:
            own.setdefault(row["layer"], row["weight"])
    top = sorted(own.items(), key=lambda item: -item[1])[:3]
    return f" Most of {best['label']}: " + ", ".join(f"layer {k} {percent(v, 0)}" for k, v in top if v >= 0.005) + "."


def search(reached: Reached) -> Section:
    """Every candidate in order, the best so far, the controls; and the descents, where there are some."""
    run, title = reached.run, "The search"
    trials = run.read("trials").to_pylist()
    ceiling = run.config.get("search", {}).get("perplexity_ceiling")
    judged = [
        row for row in trials if row["status"] == "ok" and row["value"] is not None and not _above_ceiling(row, ceiling)
    ]
    if not any(row["searcher"] != "controls" for row in judged):
        return Section(title, (missing(run, "trials"),))
    objective = judged[0]["objective"]
    better = min if is_minimised(objective) else max
    rows = []
    for searcher in dict.fromkeys(row["searcher"] for row in judged):
        if searcher == "controls":
            continue
        best = None
        for row in sorted((r for r in judged if r["searcher"] == searcher), key=lambda r: r["iteration"]):
            best = row["value"] if best is None else better(best, row["value"])
            rows.append(
                {
                    "kind": "candidate",
                    "searcher": searcher,
                    "number": row["iteration"] + 1,
                    "value": row["value"],
                    "best": best,
                    "label": "",
                    "plan_id": row["plan_id"],
                    "block": row["block"],
                    "alphas": ", ".join(f"{alpha:.3f}" for alpha in row["alphas"]),
                    "perplexity": row["perplexity"],
                    "seconds": row["seconds"],
                }
            )
    # the searchers proper come first: the accent is theirs
    rows.sort(key=lambda row: row["searcher"] == "random")
    candidates = list(rows)
    empty = dict.fromkeys(rows[0], None)
    for label, number in _together(
        [
            (reached.labels.get(row["plan_id"], row["plan_id"]), row["value"])
            for row in judged
            if row["searcher"] == "controls"
        ],
        [row["value"] for row in judged],
    ):
        rows.append(empty | {"kind": "control", "searcher": "controls", "value": number, "label": label})
    lines = "; ".join(summary.search_lines(run))
    way = "lower" if is_minimised(objective) else "higher"
    blocks: list[Block] = [
        Figure(
            "Objective of every candidate",
            f"Measured on the search questions, which the report does not use ({way} is better). Steps: the best so "
            "far. "
            f"Dashed: controls. {lines}.",
            (
                figures.progress(
                    rows,
                    f"{objective} of {plural(len(candidates), 'candidate')} in the order in which they were tried. "
                    f"{lines}.",
                    objective=objective,
                ),
            ),
            Rows.of(rows, sources(run, "trials")),
            command_of(run),
        )
    ]
    history = run.read("gradient_history").to_pylist()
    if history:
        blocks.append(_descents(run, history, objective))
    return Section(title, tuple(blocks))


def _above_ceiling(row: dict, ceiling: float | None) -> bool:
    return ceiling is not None and row["perplexity"] is not None and row["perplexity"] > ceiling


def _together(controls: list[tuple[str, float]], every: list[float]) -> list[tuple[str, float]]:
    """Controls whose labels would cover each other under one label, at the mean of their values."""
    near = 0.03 * (max(every) - min(every))
    groups: list[list[tuple[str, float]]] = []
    for name, number in sorted(controls, key=lambda item: item[1]):
        if groups and number - groups[-1][0][1] <= near:
            groups[-1].append((name, number))
        else:
            groups.append([(name, number)])
    return [
        (", ".join(dict.fromkeys(name for name, _ in group)), sum(number for _, number in group) / len(group))
        for group in groups
    ]


def _descents(run: RunDirectory, history: list[dict], objective: str) -> Figure:
    rows = []
    for row in history:
        for of, loss in (("search questions", row["loss"]), ("held out", row["held_out_loss"])):
            if loss is not None:
                rows.append(
                    {
                        "searcher": row["searcher"],
                        "start": row["start"],
                        "series": f"{row['searcher']} {row['start']} {of}",
                        "epoch": row["epoch"],
                        "of": of,
                        "loss": loss,
                    }
                )
    count = len({(row["searcher"], row["start"]) for row in history})
    return Figure(
        "Loss of the descents",
        "One line a start. The state kept of a descent is that of the lowest loss on questions that it did not "
        "descend on.",
        (figures.descents(rows, f"Loss by epoch of {plural(count, 'descent')}.", objective=objective),),
        Rows.of(rows, sources(run, "gradient_history")),
        command_of(run),
    )


def subjects(reached: Reached) -> Section:
    """Differences of the best plan by subject, against the unmerged model and the controls, one at a time."""
    title, best = "Subject by subject", reached.best
    rows = subject_rows(reached)
    if not rows:
        return Section(title, (missing(reached.run, "answers", "accuracy"),))
    against = list(dict.fromkeys(row["against"] for row in rows))
    first = sorted((row for row in rows if row["against"] == against[0]), key=lambda row: -row["difference"])
    clear = [row for row in first if row["clear"] == "yes"]
    told = (
        f"Against {against[0]}: from {signed(first[0]['difference'], 1)} points ({first[0]['subject']}) to "
        f"{signed(first[-1]['difference'], 1)} ({first[-1]['subject']}); {len(clear)} of {len(first)} intervals leave "
        "out 0."
    )
    return Section(
        title,
        (
            Figure(
                f"Difference in accuracy of {best['label']} by subject",
                f"{told} Intervals of 95 % (paired bootstrap) are of each subject alone: by chance alone about one in "
                "twenty leaves out 0.",
                (figures.subject_differences(rows, f"Differences by subject, sorted. {told}", against=against),),
                Rows.of(rows, sources(reached.run, "answers", "plans")),
                command_of(reached.run),
            ),
        ),
    )


def subject_rows(reached: Reached) -> list[dict[str, Any]]:
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


def receipts(reached: Reached) -> Section:
    """Which tensors every plan changed, and by how much: the proof that a merge is one."""
    run, title = reached.run, "Receipts: what was changed"
    stored = run.read("receipts").to_pylist()
    unchanged = [
        line["label"]
        for line in reached.lines
        if line["kind"] != "base" and line["plan_id"] not in {row["plan_id"] for row in stored}
    ]
    silent = (
        f" No tensor changed under {listed(unchanged)}: layers are left out there, and nothing is averaged."
        if unchanged
        else ""
    )
    if not stored:
        return Section(title, (Notice(silent.strip()) if silent else missing(run, "receipts"),))
    rows = []
    for row in stored:
        matrix, layer = tensor_name(row["tensor"])
        rows.append(
            {
                "matrix": matrix,
                "layer": layer,
                "plan": reached.labels.get(row["plan_id"], row["plan_id"]),
                "role": figures.role_of(reached.kinds.get(row["plan_id"], "")),
                "relative": _finite(row["relative_change"]),
                "largest": _finite(row["max_abs_change"]),
                "tensor": row["tensor"],
            }
        )
    rows.sort(key=lambda row: (row["matrix"], -figures.ROLES.index(row["role"])))
    changed = [row for row in rows if row["relative"]]
    told = (
        f"{plural(len({row['tensor'] for row in changed}), 'tensor')} changed under "
        f"{plural(len({row['plan'] for row in changed}), 'plan')}, by at most "
        f"{percent(max((row['relative'] for row in changed), default=0.0))} of the tensor's norm.{silent}"
    )
    return Section(
        title,
        (
            Figure(
                "Change of every tensor that a plan touches",
                f"The norm of the difference between merged and original tensor over the original's norm. {told}",
                (figures.changes(rows, f"Relative change of tensors, a row for each matrix. {told}"),),
                Rows.of(rows, sources(run, "receipts")),
                command_of(run),
            ),
        ),
    )


def tensor_name(tensor: str) -> tuple[str, str]:
    """A tensor's name within its layer, and the layer's number as text ("" outside any)."""
    parts = tensor.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return tensor, ""
    return ".".join(parts[at + 1 :]).removesuffix(".weight") or tensor, parts[at]


def subject_accuracies(run: RunDirectory, stored: list[dict]) -> list[Block]:
    """A figure of one plan's accuracies by subject; stored: rows of `accuracy`, in the order to be drawn."""
    if not stored:
        return []
    rows = [
        {
            "subject": row["subject"],
            "role": figures.UNMERGED,
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
        low="low",
        high="high",
        axis="accuracy",
        form=".0%",
        tips=tips,
        rule=(0.25, "chance"),
    )
    source = Rows.of(rows, sources(run, "accuracy"))
    return [Figure("Accuracy by subject", f"{told} Bars: 95 % intervals.", (view,), source, command_of(run))]
