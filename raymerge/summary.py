"""What a run found, as lines and tables of text: the closing summary, which a user sees first."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from raymerge.config import BLOCK_METHODS
from raymerge.findings import (
    chosen_on,
    comparison_rows,
    degenerate_layers,
    judges_answers,
    labels_of,
    objective_value,
    of_plan,
    plan_lines,
    searched_names,
    verdict,
)
from raymerge.objectives import above_ceiling, is_minimised, parse_objective
from raymerge.schemas import PLAIN, Row, correlation_ceiling
from raymerge.tables import RunDirectory


def proof_line(proof: Mapping[str, Any]) -> str:
    """What `proof.prove` found when a saved model was loaded again."""
    return (
        f"Reloaded in a fresh process: logits within {proof['max_difference']:.2g} of the scored ones (rounding "
        f"explains {proof['tolerance']:.2g}), {proof['predictions_equal']} of {proof['positions']} next tokens the "
        f"same, {proof['generated_tokens']} tokens generated."
    )


def budget_lines(run: RunDirectory) -> list[str]:
    """Where a search has a control of random coefficients: how many each side is the best of, if these differ."""
    if "random" not in run.read("plans", ["kind"])["kind"].to_pylist():
        return []
    tried = [row["searcher"] for row in run.read("trials").to_pylist() if row["status"] == "ok"]
    drawn = tried.count("random")
    descents = sum(searcher.startswith("gradient") for searcher in tried)
    candidates = len(tried) - drawn - descents - tried.count("controls")
    if not drawn or (candidates <= drawn and not descents):
        return []
    counts = ((candidates, "candidate"), (descents, "descent"))
    what = " and ".join(f"{count} {noun}{'s' if count != 1 else ''}" for count, noun in counts if count)
    return [
        f"The found plan is the best of {what}, the random control the best of {drawn}. The best of more is better by "
        "chance alone, so a difference between the two is not due to the search alone"
    ]


def plan_table(lines: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the plans' table, as text; without columns of questions where none were asked."""
    asked = any(line["accuracy"] is not None for line in lines)
    own_tokens, read = _perplexities_in(lines)
    header = ["plan", "layers", *(_ANSWERED if asked else []), *own_tokens, *read]
    header += ["picks A-D %", "letter %"] if asked else []
    rows = []
    for line in lines:
        cells = [line["label"], str(line["layers"] if line["layers"] is not None else "–")]
        if asked:
            cells += _answered(line)
        cells += [_of_questions(line)] if own_tokens else []
        cells += [number(line["perplexity"], line["perplexity_interval"])] if read else []
        if asked:
            cells.append("/".join(f"{100 * picked:.0f}" for picked in line["picked"]))
            cells.append("–" if line["top_is_letter"] is None else f"{100 * line['top_is_letter']:.0f}")
        rows.append(cells)
    return header, rows


#: What `plan_table` cannot say in its header.
PICKS = "picks A-D %: share of each letter among the answers; letter %: questions whose most probable token is a letter"
_ANSWERED = ["accuracy [95 %]", "macro", "answer NLL"]
_QUESTION, _TEXT = "question ppl [95 %]", "text ppl [95 %]"
#: What these two are, for those who have no other explanation beside the table.
MEANT = {_QUESTION: "perplexity on the questions' own tokens", _TEXT: "perplexity on plain text"}


def _perplexities_in(lines: Collection[Row]) -> tuple[list[str], list[str]]:
    """The column of the questions' own perplexity and that of plain text's, each where any line has one."""
    asked, read = (any(line[key] is not None for line in lines) for key in ("question_perplexity", "perplexity"))
    return [_QUESTION] * asked, [_TEXT] * read


def _of_questions(line: Row) -> str:
    """The cell of `_QUESTION`, of a line of `findings.plan_lines`."""
    return number(line["question_perplexity"], line["question_interval"])


def _answered(line: Row) -> list[str]:
    """The cells of `_ANSWERED`, of a line of `findings.plan_lines`."""
    return [share(line["accuracy"], None, line["interval"]), f"{line['macro']:.4f}", f"{line['nll']:.4f}"]


def share(value: float, error: float | None, interval: tuple[float | None, float | None]) -> str:
    """A share, its standard error if it is asked for - a subject of one question leaves it undefined, NaN - and its
    interval, as text; runs of earlier versions have no interval."""
    low, high = interval
    doubt = "" if error is None or math.isnan(error) else f" ± {error:.4f}"
    return f"{value:.4f}{doubt}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


_COMPARED = ["against", "difference", "95 % interval", "p", "p (Holm)", "verdict"]


def comparison_table(run: RunDirectory, plan_id: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a plan minus every other one, by accuracy, or by the loss on plain text where no questions are
    asked, saying where two plans cannot be told apart."""
    names = labels_of(run)
    return _COMPARED, [_compared(names, row) for row in of_plan(comparison_rows(run), plan_id)]


def _compared(names: dict[str, str], row: Row) -> list[str]:
    other: str = row["plan_b"]
    return [
        names.get(other, other),
        f"{row['difference']:+.4f}",
        f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]",
        _p(row["p_value"]),
        "–" if row["p_holm"] is None else _p(row["p_holm"]),
        verdict(row),
    ]


def _p(p: float) -> str:
    """Three significant digits, which do not lift what is below 0.05, as the verdict says, to it."""
    text = f"{p:.3g}"
    return "<0.05" if p < 0.05 <= float(text) else text


def task_table(run: RunDirectory) -> tuple[list[str], list[list[str]]]:
    """Header and cells: every plan's accuracy on every task, by each measure that the task's convention has."""
    names = labels_of(run)
    header = ["plan", "task", "n", "measure", "accuracy ± se [95 %]"]
    cells = []
    for row in sorted(run.read("task_accuracy").to_pylist(), key=lambda row: (row["task"], row["measure"])):
        found = share(row["accuracy"], row["standard_error"], (row["ci_low"], row["ci_high"]))
        cells.append([names[row["plan_id"]], row["task"], str(row["n"]), row["measure"], found])
    return header, cells


def task_comparison_table(run: RunDirectory, plan_id: str | None = None) -> tuple[list[str], list[list[str]]]:
    """`comparison_table` on every task, by the measure that its convention prefers: acc_norm where it has one."""
    names = labels_of(run)
    rows, cells = run.read("task_comparisons").to_pylist(), []
    for task in dict.fromkeys(row["task"] for row in rows):
        measure = max(row["measure"] for row in rows if row["task"] == task)
        own = [row for row in rows if (row["task"], row["measure"]) == (task, measure)]
        for row in own if plan_id is None else of_plan(own, plan_id):
            cells.append([task, measure, names.get(row["plan_a"], row["plan_a"]), *_compared(names, row)])
    return ["task", "measure", "plan", *_COMPARED], cells


def subject_table(run: RunDirectory, plan_id: str) -> tuple[str, list[str], list[list[str]]]:
    """Caption, header and cells: a plan against the others on the subjects that the search was for, by accuracy and
    answer NLL; no cells where it was for all."""
    rows = of_plan(run.read("subject_comparisons").to_pylist(), plan_id)
    header = ["measure", *_COMPARED]
    if not rows:
        return "", header, []
    names = labels_of(run)
    subjects, own = textwrap.shorten(", ".join(searched_names(run)), 120, placeholder=" …"), rows[0]
    caption = (
        f"Subjects of the search, {subjects}: paired differences on {own['n']} of the {own['split']} questions, with "
        "95 % intervals; Holm's p corrects for the comparisons by one measure"
    )
    return caption, header, [[row["measure"], *_compared(names, row)] for row in rows]


def comparison_notes(run: RunDirectory, plan_id: str) -> list[str]:
    """What the p-values of `comparison_table` are, and how many comparisons stand elsewhere."""
    rows, notes = comparison_rows(run), []
    shown, every = len(of_plan(rows, plan_id)), len(rows)
    if shown > 1:
        family = "them"
        if run.read("plans", ["plan_id"])["plan_id"][-1].as_py() != plan_id:  # stored last: the best found
            family = "those that are not the best found's, and in the one with the best found for all of its own"
        told = f"p and intervals are uncorrected; Holm's p corrects for all of {family}, on this measure"
        notes.append(f"({shown} comparisons: {told}.)")
    if every > shown:
        notes.append(f"(Table comparisons has {every - shown} further pairs of plans.)")
    return notes


def block_table(run: RunDirectory) -> tuple[str, list[str], list[list[str]]]:
    """Caption, header and cells: which block of layers was chosen for each number of them, by what score, and how the
    next best and the deepest block compare; no cells where none was chosen."""
    rows, cells = run.read("blocks").to_pylist(), []
    for chosen in (row for row in rows if row["chosen"]):
        if chosen["score"] is None:
            cells.append([str(chosen["merges"]), _span(chosen), chosen["measure"], "–", "–", "–"])
            continue
        alike = [row for row in rows if (row["merges"], row["measure"]) == (chosen["merges"], chosen["measure"])]
        others = sorted((row for row in alike if not row["chosen"]), key=lambda row: (row["score"], -row["first"]))
        next_best = ", ".join(map(_scored, others[:2])) or "none"
        deepest = _scored(max(alike, key=lambda row: row["first"]))
        cells.append(
            [str(chosen["merges"]), _span(chosen), chosen["measure"], f"{chosen['score']:.4g}", next_best, deepest]
        )
    scored = {row["measure"] for row in rows if row["score"] is not None}
    meant = ["loss is in nats per token of the calibration text without them"] if "loss" in scored else []
    meant += ["distances are between the states that enter and leave them"] if scored - {"loss"} else []
    plan = run.config.get("plan", {})
    # A search of blocks may end elsewhere: what was chosen is where it begins.
    begins = run.experiment == "search" and (plan.get("selection"), plan.get("block")) == ("block", "search")
    caption = "Layers that the search starts from, and that the controls merge or drop" if begins else "Layers removed"
    if methods := [name for name in BLOCK_METHODS if name in run.config.get("sweep", {}).get("methods", [])]:
        caption = f"Layers that {' and '.join(methods)} remove{'s' * (len(methods) == 1)}"
    caption += f"; the lowest score is best: {'; '.join(meant)}" if meant else ""
    return caption, ["layers", "removed", "chosen by", "score", "next best", "deepest"], cells


def removal_table(run: RunDirectory) -> tuple[str, list[str], list[list[str]]]:
    """Caption, header and cells: the layers that were dropped one by one, with the loss without them; no cells where
    none were."""
    rows, cells = run.read("removals").sort_by("step").to_pylist(), []
    for chosen in (row for row in rows if row["chosen"]):
        others = [
            row for row in rows if row["step"] == chosen["step"] and not row["chosen"] and row["loss"] is not None
        ]
        others.sort(key=lambda row: row["loss"])
        next_best = ", ".join(f"{row['layer']} ({row['loss']:.4g})" for row in others[:2]) or "none"
        cells.append([str(chosen["step"] + 1), str(chosen["layer"]), f"{chosen['loss']:.4g}", next_best])
    caption = (
        "Layers removed one by one (drop_greedy): each is the one without which the loss, in nats per token of the "
        "calibration text, is lowest"
    )
    return caption, ["layers", "removed last", "loss", "next best"], cells


def _scored(row: Row) -> str:
    return f"{_span(row)} ({row['score']:.4g})"


def _span(row: Row) -> str:
    return str(row["first"]) if row["first"] == row["last"] else f"{row['first']}-{row['last']}"


def optimism_lines(run: RunDirectory, split: str) -> list[str]:
    """What was found, on the questions that chose it and on those of the report. The best of many noisy values is too
    good; the controls, which nothing chose, show how much of the difference is only a harder split. Where both are the
    same split (`chosen_on`) nothing tells the two apart."""
    trials = [row for row in run.read("trials").to_pylist() if row["status"] == "ok"]
    best = (run.manifest() or {}).get("best") or {}
    found = next((row for row in trials if row["plan_id"] == best.get("plan_id")), None)
    if found is None:
        return []
    objective, ceiling = found["objective"], run.config.get("search", {}).get("perplexity_ceiling")
    if above_ceiling(found, ceiling):
        return [
            f"{best['name']}: its perplexity on the search text, {number(found['perplexity'])}, is above the ceiling "
            f"of {ceiling:g}, as is every candidate's; it comes closest"
        ]
    if chosen_on(run, split):
        return [
            f"{best['name']}: it was chosen on {split} questions, the split of the report too, so all of its figures "
            "are too good; nothing here shows by how much"
        ]
    kept = {row["plan_id"] for row in run.read("plans", ["plan_id", "kind"]).to_pylist() if row["kind"] == "keep_one"}
    controls = [row for row in trials if row["searcher"] == "controls" and row["plan_id"] not in kept]
    controls = [row for row in controls if not above_ceiling(row, ceiling)]
    gaps = _gaps(run, split, [*controls, found], objective)
    if found["plan_id"] not in gaps:
        return []
    gap, reported = gaps.pop(found["plan_id"])
    asked = judges_answers(run)
    chosen = f"the {found['n_questions']} questions it was chosen on" if asked else "the text it was chosen on"
    lines = [
        f"{best['name']}: {objective} {found['value']:.4f} on {chosen}, {reported:.4f} on the report's: optimism "
        f"{gap:+.4f}"
    ]
    if gaps:
        mean = sum(gap for gap, _ in gaps.values()) / len(gaps)
        lines.append(
            f"{'The control' if len(gaps) == 1 else f'The {len(gaps)} controls'}, not chosen by the search: "
            f"{mean:+.4f} on average, which is the difference between the two {_what_differs(asked, objective)}"
        )
    return lines


def _gaps(run: RunDirectory, split: str, trials: list[Row], objective: str) -> dict[str, tuple[float, float]]:
    """By plan, how much better the objective was on the search questions than on the report's, and the latter."""
    sign = -1.0 if is_minimised(objective) else 1.0
    gaps = {}
    for row in trials:
        reported = objective_value(run, split, row["plan_id"], objective)
        if reported is not None:
            gaps[row["plan_id"]] = sign * (row["value"] - reported), reported
    return gaps


def _what_differs(asked: bool, objective: str) -> str:
    if not asked:
        return "texts"
    return "sets of questions" + (" and texts" if parse_objective(objective).needs_text else "")


def search_lines(run: RunDirectory) -> list[str]:
    """What the searchers found on the search questions, one line each."""
    lines = []
    ceiling = run.config.get("search", {}).get("perplexity_ceiling")
    trials = run.read("trials").to_pylist()
    for searcher in dict.fromkeys(row["searcher"] for row in trials):
        rows = [row for row in trials if row["searcher"] == searcher]
        judged = [row for row in rows if row["status"] == "ok"]
        tried = _candidates(len(rows))
        failed = f", {len(rows) - len(judged)} failed" if len(judged) < len(rows) else ""
        if not judged:
            lines.append(f"{searcher}: {tried}, all failed")
            continue
        # Above a ceiling the value is a penalty, no value of the objective.
        values = [row["value"] for row in judged if not above_ceiling(row, ceiling)]
        if len(values) < len(judged):
            failed += f", {len(judged) - len(values)} above the perplexity ceiling of {ceiling:g}"
        if not values:
            lines.append(f"{searcher}: {tried}{failed}")
            continue
        objective = rows[0]["objective"]
        best, worst = (min, max) if is_minimised(objective) else (max, min)
        lines.append(
            f"{searcher}: {tried}{failed}; {objective} best {best(values):.4f}, "
            f"mean {sum(values) / len(values):.4f}, worst {worst(values):.4f}{_seconds(rows)}"
        )
    return lines


def _candidates(count: int) -> str:
    return f"{count} candidate{'' if count == 1 else 's'}"


def _seconds(trials: list[Row]) -> str:
    """What the candidates took, where it was measured; controls are not timed."""
    wall, cpu = sum(row["seconds"] for row in trials), [row["cpu_seconds"] for row in trials]
    if not wall:
        return ""
    return f"; {wall:.1f} s of worker time" + ("" if None in cpu else f", {sum(cpu):.1f} s of CPU time")


def incident_lines(run: RunDirectory) -> list[str]:
    """What befell a run, one line a kind, from table `incidents`: restarts of the run, and of its workers."""
    rows = run.read("incidents").to_pylist()
    rows.sort(key=lambda row: row["time"])
    lines = []
    for kind, (one, several) in _INCIDENTS.items():
        details = [row["detail"] or "" for row in rows if row["kind"] == kind]
        if details:
            what = f"1 {one}" if len(details) == 1 else f"{len(details)} {several}, the last"
            lines.append(f"{what}: {textwrap.shorten(details[-1], 200, placeholder=' …')}")
    return lines


_INCIDENTS = {
    "resumed": ("start with stored results", "starts with stored results"),
    "lost": ("worker lost", "workers lost"),
    "back": ("worker came back", "workers came back"),
    "replaced": ("worker replaced by a new one", "workers replaced by new ones"),
    "joined": ("worker joined late", "workers joined late"),
    "gone": ("worker given up", "workers given up"),
    "refused": ("worker joined late and refused to take part", "workers joined late and refused to take part"),
}


def pace_lines(run: RunDirectory) -> list[str]:
    """How long each search of the last call took, and how much of it its workers scored, from the manifest."""
    return [
        f"{key.removesuffix('_search')}: {_candidates(facts['candidates_this_call'])} in {facts['wall_seconds']:.1f} s "
        f"({facts['batch']} per trial, {facts['concurrent']} at a time); workers spent "
        f"{100 * (1 - facts['share_not_scoring']):.0f} % of it scoring"
        for key, facts in (run.manifest() or {}).items()
        if key.endswith("_search") and facts["share_not_scoring"] is not None
    ]


def worker_table(run: RunDirectory) -> tuple[list[str], list[list[str]]]:
    """Header and cells: how much of its time each worker scored, by search, as the manifest of the last call has it."""
    cells = []
    for key, facts in (run.manifest() or {}).items():
        for row in facts.get("workers", ()) if key.endswith("_search") else ():
            cells.append(
                [
                    key.removesuffix("_search"),
                    row["worker"],
                    str(row["candidates"]),
                    f"{row['scoring_seconds']:.1f}",
                    f"{row['present_seconds']:.1f}",
                    f"{100 * row['utilisation']:.0f}",
                ]
            )
    return ["search", "worker", "candidates", "scoring s", "present s", "used %"], cells


def similarity_table(run: RunDirectory) -> tuple[list[str], list[list[str]]]:
    """Header and cells: each subset's matrix off the diagonal, against what unrelated layers score; the share of pairs
    above these is of those whose maps mean something (`degenerate_layers`)."""
    degenerate = degenerate_layers(run)
    keys = ["subset", "language", "measure", "embedding"]
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in run.read("similarity").to_pylist():
        if row["layer_i"] < row["layer_j"]:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    header = [
        "subset",
        "language",
        "measure",
        "embedding",
        "n",
        "mean",
        "neighbours",
        "null",
        "above null %",
        "undefined",
        "degenerate",
    ]
    cells = []
    for key, rows in found.items():
        known = [row for row in rows if row["value"] is not None]
        null = [row for row in known if row["null_p95"] is not None]
        noise = degenerate[key[0], key[1]]
        sound = [row for row in null if noise.isdisjoint((row["layer_i"], row["layer_j"]))]
        cells.append(
            [
                *key,
                str(rows[0]["n_samples"] or "–"),
                _mean([row["value"] for row in known]),
                _mean([row["value"] for row in known if row["layer_j"] == row["layer_i"] + 1]),
                _mean([row["null_mean"] for row in null]),
                _percent([row["value"] > row["null_p95"] for row in sound]),
                str(len(rows) - len(known)),
                str(len(noise)) if run.has("degeneracy") else "–",  # without a diffusion map there is none to be so
            ]
        )
    return header, cells


def correlation_table(run: RunDirectory, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the correlations between subsets, as published and off the diagonal, with the ceiling.

    most: of more pairs only so many, those whose correlation is the smallest share of its ceiling (of 1, without one).
    """
    header = ["subsets", "as published", "off the diagonal", "95 % interval", "ceiling"]
    cells, rows = [], run.read("similarity_correlation").to_pylist()
    if most is not None and len(rows) > most:
        shares = [row["pearson_off_diagonal"] / (correlation_ceiling(row) or 1.0) for row in rows]
        known = [i for i, share in enumerate(shares) if math.isfinite(share)]  # a constant matrix correlates with none
        rows = [rows[i] for i in sorted(known, key=shares.__getitem__)[:most]]
    for row in rows:
        names = [f"{row[f'subset_{side}']}/{row[f'language_{side}']}" for side in "ab"]
        interval = "–" if row["ci_low"] is None else f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
        bound = correlation_ceiling(row)
        found = [f"{row['pearson']:.4f}", f"{row['pearson_off_diagonal']:.4f}"]
        cells.append([" – ".join(names), *found, interval, "–" if bound is None else f"{bound:.4f}"])
    return header, cells


def sensitivity_table(run: RunDirectory) -> tuple[list[str], list[list[str]]]:
    """Header and cells: each setting's agreement with the reference, averaged over the subsets that have it."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in run.read("sensitivity").to_pylist():
        if not row["reference"]:
            found.setdefault((row["parameter"], row["setting"]), []).append(row)
    header = ["parameter", "setting", "off-diagonal r", "same merges %", "alpha change", "note"]
    cells = []
    for key, rows in found.items():
        shares = [row["plan_overlap"] for row in rows if row["plan_overlap"] is not None]
        cells.append(
            [
                *key,
                _mean([row["pearson_off_diagonal"] for row in rows]),
                _percent(shares),
                _mean([row["alpha_max_difference"] for row in rows]),
                _notes_of([row["note"] for row in rows]),
            ]
        )
    return header, cells


def _notes_of(notes: list[str | None]) -> str:
    """One setting's notes on its subsets: numbers of merges as a range, else the first, and how many have one."""
    known = [note for note in notes if note]
    if not known:
        return ""
    counts = sorted({int(note.removesuffix(" merges")) for note in known if note.removesuffix(" merges").isdigit()})
    if counts and len(known) == len(notes):
        return f"{counts[0]} merges" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} merges"
    return known[0] if len(known) == len(notes) else f"{len(known)} of {len(notes)} subsets: {known[0]}"


def sweep_table(run: RunDirectory, split: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the compression curve, one line a point; of alignment, norms and refit what differs."""
    lines = {line["plan_id"]: line for line in plan_lines(run, split)}
    asks = any(line["accuracy"] is not None for line in lines.values())
    points = [row | {"refit": row["refit"] or "none"} for row in run.read("sweep").to_pylist()]
    varied = [key for key, plain in PLAIN.items() if any(row[key] != plain for row in points)]
    header = ["merged", "method", *varied]
    own_tokens, text = _perplexities_in(lines.values())
    header += [*(_ANSWERED if asks else []), *own_tokens, *text]
    cells = []
    for row in sorted(points, key=lambda row: row["merges"]):
        line = lines[row["plan_id"]]
        answered = (_answered(line) if asks else []) + ([_of_questions(line)] if own_tokens else [])
        read = [number(line["perplexity"], line["perplexity_interval"])] if text else []
        cells.append([str(row["merges"]), row["method"], *(row[key] for key in varied), *answered, *read])
    return header, cells


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "–"


def _percent(shares: list[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.0f}" if shares else "–"


def number(value: float | None, interval: tuple[float | None, float | None] = (None, None)) -> str:
    """A perplexity as text, with its interval where there is one: four significant digits, of millions two, or a
    dash."""
    if value is None or math.isnan(value):
        return "–"
    digits = sum(value < limit for limit in (10, 100, 1000))
    text = f"{value:,.{digits}f}" if value < 1e6 else f"{value:.1e}"  # "inf" of infinity
    return text if None in interval else f"{text} [{number(interval[0])}, {number(interval[1])}]"
