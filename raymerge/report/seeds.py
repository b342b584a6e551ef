"""One search with several seeds: how much of what it finds is chance, by what plans reach and by their coefficients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean, stdev

from raymerge.identity import canonical_json
from raymerge.objectives import above_ceiling
from raymerge.plan import MergePlan, MergeStep
from raymerge.report import figures
from raymerge.report.asked import command_of, sources
from raymerge.report.content import Figure, Rows, Section, Table, Text
from raymerge.report.reached import Reached
from raymerge.report.wording import finite, percent, perplexity, plural, value
from raymerge.schemas import Row

_RANDOM = 40  # random candidates of a run whose coefficients are compared, pair by pair


def seeds(reached: Sequence[Reached]) -> list[Section]:
    """A section for each search that stands on the page with more than one seed; none where there is no such search."""
    groups: dict[str, dict[int, Reached]] = {}
    for one in reached:
        if one.run.experiment == "search" and one.run.complete and one.best is not None:
            # Of runs with one seed the first: statistics over seeds would count what is the same run more than once.
            groups.setdefault(_asked(one), {}).setdefault(_seed(one), one)
    return [_section([*group.values()]) for group in groups.values() if len(group) > 1]


def _seed(one: Reached) -> int:
    return one.run.config["search"]["seed"]


def _asked(one: Reached) -> str:
    """Everything that a search was asked but its seed, and the files that it was asked with."""
    config = {key: section for key, section in one.run.config.items() if key not in ("workers", "output")}
    config["search"] = {key: chosen for key, chosen in config["search"].items() if key != "seed"}
    manifest = one.run.manifest() or {}
    held = [(manifest.get("model") or {}).get("identity"), manifest.get("data"), manifest.get("text_hash")]
    return canonical_json([config, held])


def _section(group: Sequence[Reached]) -> Section:
    title = f"One search, {plural(len(group), 'seed')}: {', '.join(one.name for one in group)}"
    return Section(title, (_table(group), Text(_difference(group)), _figure(group)))


def _table(group: Sequence[Reached]) -> Table:
    """What each seed found, their mean and standard deviation, and the control that all of them have."""
    objective = group[0].run.config["search"]["objective"]
    rows = [(f"seed {_seed(one)} ({one.name})", _figures_of(one, one.the_best["plan_id"])) for one in group]
    found = [figures for _, figures in rows]
    for name, of in (("mean", fmean), ("standard deviation", stdev)):
        rows.append((name, [None if None in column else of(column) for column in zip(*found, strict=True)]))
    # Of the rows, since what was found may be a control, and then has one line; an alpha file may have any name.
    stored = {row["name"]: row["plan_id"] for row in group[0].plans if row["name"] == row["kind"]}
    rows += [
        (f"for comparison: {control}", _figures_of(group[0], stored[control]))
        for control in ("drop", "base")
        if control in stored
    ]
    cells = tuple(
        (name, value(objective_value, 4), percent(accuracy), value(nll, 4), perplexity(read))
        for name, (objective_value, accuracy, nll, read) in rows
    )
    return Table(
        f"The best plan of each seed: {objective} on the search questions or text, and what the report measured. The "
        "standard deviation is over seeds; it is not the uncertainty of a figure, which the questions give",
        ("", f"{objective}, searched", "accuracy", "answer NLL", "perplexity"),
        cells,
    )


def _figures_of(one: Reached, plan_id: str) -> list[float | None]:
    """Objective on what was searched on, accuracy, answer NLL and perplexity of one plan of a run."""
    line = next(line for line in one.lines if line["plan_id"] == plan_id)
    ceiling = one.run.config["search"].get("perplexity_ceiling")
    # Above a ceiling the value is a penalty, no value of the objective.
    searched = (row for row in _trials(one) if row["plan_id"] == plan_id and not above_ceiling(row, ceiling))
    return [next(searched, {}).get("value"), line["accuracy"], line["nll"], finite(line["perplexity"])]


def _trials(one: Reached) -> list[Row]:
    return [row for row in one.run.read("trials").to_pylist() if row["status"] == "ok"]


def _difference(group: Sequence[Reached]) -> str:
    """How far the seeds' coefficients lie from each other, beside how far random ones do."""
    found = [_coefficients(one) for one in group]
    apart = fmean(_apart(a, b) for a, b in itertools.combinations(found, 2))
    of = "coefficients, the mean over matrices" if any(map(_own, found)) else "coefficients"
    said = (
        f"On average the coefficients of two seeds differ in {percent(apart, 0)} of the merged layer's weight (total "
        f"variation of the effective {of})"
    )
    # Within a run, since seeds share no random candidates but those of a start.
    drawn = [_random(one) for one in group]
    pairs = [_distance(a, b) for own in drawn for a, b in itertools.combinations(own, 2)]
    if not pairs:
        return f"{said}."
    return (
        f"{said}, those of two random candidates in {percent(fmean(pairs), 0)}. Where the first is as large as the "
        "second, the search has not determined the coefficients, whatever it has found in accuracy or loss."
    )


def _layers(one: Reached) -> int:
    """How many layers the unmerged model has."""
    return one.the_best["costs"]["layers"] + one.the_best["costs"]["layers_removed"]


Weights = dict[tuple[int, int], float]  # (kept layer, original layer) -> effective coefficient, of merged layers


def _coefficients(one: Reached) -> dict[str | None, Weights]:
    """The best plan's, by the matrix that has its own; of None those of all others."""
    own: dict[str | None, Weights] = {None: {}}
    for row in one.run.read("coefficients").to_pylist():
        if row["plan_id"] == one.the_best["plan_id"]:
            own.setdefault(row["matrix"], {})[row["kept_layer"], row["source_layer"]] = row["coefficient"]
    # A matrix has rows of the merged layers alone; in all others it is the layer's.
    merged = {matrix: {kept for kept, _ in weights} for matrix, weights in own.items()}
    return {
        matrix: {key: weight for key, weight in own[None].items() if key[0] not in merged[matrix]} | weights
        for matrix, weights in own.items()
    }


def _own(coefficients: dict[str | None, Weights]) -> bool:
    """Whether matrices have coefficients of their own."""
    return len(coefficients) > 1


def _apart(a: dict[str | None, Weights], b: dict[str | None, Weights]) -> float:
    """The distance of two plans, the mean over the matrices that have coefficients of their own in either."""
    matrices = ({*a, *b} - {None}) or {None}
    return fmean(_distance(a.get(matrix, a[None]), b.get(matrix, b[None])) for matrix in matrices)


def _random(one: Reached) -> list[Weights]:
    """Effective coefficients of a run's random candidates, the first of them."""
    steps = [row for row in one.plans if row["plan_id"] == one.the_best["plan_id"] and row["matrix"] is None]
    steps = list({row["step"]: row for row in steps}.values())
    found = []
    for trial in [row for row in _trials(one) if row["searcher"] == "random"][:_RANDOM]:
        moved = 0 if trial["block"] is None else trial["block"] - min(row["remove"] for row in steps)
        merges = [
            MergeStep(row["into"] + moved, row["remove"] + moved, alpha)
            for row, alpha in zip(steps, trial["alphas"], strict=True)
        ]
        kept = MergePlan(_layers(one), tuple(merges)).kept
        found.append({(layer.index, source): weight for layer in kept for source, weight in layer.coefficients})
    return found


def _distance(a: Weights, b: Weights) -> float:
    """Total variation between two plans' coefficients, the mean over the layers that either merges others into: 1 where
    they share no weight, or where one of them removes that layer."""
    merged = {kept for own in (a, b) for kept, source in own if kept != source}
    total = 0.0
    for kept in merged:
        sources = {source for own in (a, b) for layer, source in own if layer == kept}
        differences = [a.get((kept, source), 0.0) - b.get((kept, source), 0.0) for source in sources]
        total += max(sum(d for d in differences if d > 0), sum(-d for d in differences if d < 0))
    return total / len(merged) if merged else 0.0


def _figure(group: Sequence[Reached]) -> Figure:
    by_matrix = [_coefficients(one) for one in group]
    found = [own[None] for own in by_matrix]
    of = " Where matrices have coefficients of their own, their mean is drawn." if any(map(_own, by_matrix)) else ""
    layers = range(_layers(group[0]))
    shown = [layer for layer in layers if any(own.get((layer, layer)) != 1.0 for own in found)]
    rows = []
    for one, own in zip(group, found, strict=True):
        for layer in shown:
            kept, weight = next(((k, w) for (k, source), w in own.items() if source == layer), (None, 0.0))
            series = f"seed {_seed(one)} ({one.name})"
            rows.append(figures.weight_row(series, layer, weight, kept, one.the_best["plan_id"]))
    told = "Effective coefficients of original layers in what each seed found, a row per seed."
    return Figure(
        "Effective coefficients by seed",
        "The share of every original layer in the merged layer. Layers that no seed merges are not shown. Where these "
        "agree alphas may still differ: a step counts for little where a later one leaves little of its result." + of,
        (figures.weight_cells(rows, told),),
        Rows.of(rows, tuple(source for one in group for source in sources(one.run, "coefficients"))),
        "; ".join(command_of(one.run) for one in group),
    )
