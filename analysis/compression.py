"""Draw quality against layers removed for a sweep: compression.png, context.png, compression.md.

    python analysis/compression.py RUN [--beside RUN …] [--published] [--out DIR]

Reads tables sweep, accuracy, costs, perplexity, comparisons and context; the last three may be empty, and without
context there is no context.png. Accuracies are of the report split; a run with several languages gets one
compression-LANGUAGE.png each, one that asked no questions (data.mmlu null) perplexities alone.

  compression.png  accuracy and plain-text perplexity against layers removed, one line a method and one row of panels
                   an alignment and treatment of norms; of the published model (its name in model.path, and its number
                   of layers), or with --published of any, also accuracy against the share of layers removed beside the
                   published points
  perplexity.png   perplexity alone, a panel for each run: --beside names sweeps of the same plans on other texts
  context.png      NLL of text by position in the window, and retrieval by distance, of the plans measured
  compression.md   every point, the stability of each method's curve, and the context table

Published points are in published/compression.csv, each with its source.
"""

from __future__ import annotations

import csv
import math
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from context_panels import describe_context, draw_context
from matplotlib.ticker import MaxNLocator
from plotting import (
    BASE,
    CHANCE,
    DOTTED,
    STYLE,
    curve_style,
    interval_bars,
    markdown,
    need,
    number,
    plain_log,
    run_main,
    save,
    save_text,
    with_interval,
)

from raymerge.tables import MACRO, MICRO, RUINED, RunDirectory, RunError, way_of

_PUBLISHED = Path(__file__).parent / "published" / "compression.csv"
_PUBLISHED_LAYERS = 32  # of the model that the published points are of


class Point(NamedTuple):
    """One row of `sweep` with what was measured of its plan; None where it was not."""

    plan_id: str
    method: str
    alignment: str
    norms: str
    merges: int
    removed: int  # layers
    layers: int  # of the unmerged model
    parameters_removed: float  # share
    micro: dict | None  # row of `accuracy`
    macro: dict | None
    text: dict | None  # row of `perplexity` of plain text
    difference: dict | None  # row of `comparisons`, signed as this plan - drop of the same merges

    @property
    def perplexity(self) -> float | None:
        """Of plain text."""
        return self.text and self.text["perplexity"]

    @property
    def share(self) -> float:
        """Share of the model's layers removed."""
        return self.removed / self.layers


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_main(draw, __doc__, argv, add_options)


def add_options(parser) -> None:
    """The script's own options."""
    parser.add_argument("--beside", metavar="RUN", nargs="+", default=[], help="sweeps on other texts: perplexity.png")
    parser.add_argument("--published", action="store_true", help="draw the published points beside any model's")


def draw(run: RunDirectory, out: Path, beside: list[str] = (), published: bool = False) -> list[Path]:
    """Write the figures and compression.md into `out`; return their paths. RunError if a table is missing."""
    with plt.rc_context(STYLE):
        others = [draw_texts([run, *map(RunDirectory.load, beside)], out / "perplexity.png")] if beside else []
    return [*draw_run(run, out, published), *others]


def swept(run: RunDirectory) -> tuple[list[dict], dict[str, dict], dict[str, dict]]:
    """Rows of `sweep`, each refit a method of its own; by plan, those of `costs` and of `perplexity` of plain text."""
    sweep = [{**row, "method": way_of(row)} for row in need(run, "sweep", "the compression curve")]
    costs = {row["plan_id"]: row for row in need(run, "costs", "the layers that each plan removes")}
    if missing := sorted({row["plan_id"] for row in sweep} - costs.keys()):
        raise RunError(f"{run.path_of()}: table costs lacks plan {missing[0]} and {len(missing) - 1} more of the sweep")
    return sweep, costs, {r["plan_id"]: r for r in run.read("perplexity").to_pylist() if r["target"] == "text"}


def draw_run(run: RunDirectory, out: Path, asked: bool) -> list[Path]:
    """The figures and the text of one run; asked: for the published points, also beside another model's."""
    need(run, "sweep", "the compression curve")  # what a run that has not begun lacks is named first
    if (run.config.get("data") or {}).get("mmlu", "") is None:
        return draw_unasked(run, out)
    accuracy = need(run, "accuracy", "the accuracy of the sweep's plans")
    sweep, costs, texts = swept(run)
    split = report_split(run, accuracy)
    accuracy = [row for row in accuracy if row["split"] == split]
    comparisons = [row for row in run.read("comparisons").to_pylist() if row["split"] == split]
    published = read_published()
    if not asked and not is_published_model(run, costs, published):
        published = []
    languages = list(dict.fromkeys(row["language"] for row in accuracy))
    paths, text = [], [f"# Compression curve of run {run.run_id} ({run.experiment})"]
    with plt.rc_context(STYLE):
        for language in languages:
            mine = {(row["plan_id"], row["subject"]): row for row in accuracy if row["language"] == language}
            points = points_of(sweep, mine, costs, texts, comparisons)
            name = "compression.png" if len(languages) == 1 else f"compression-{language}.png"
            paths.append(draw_curves(points, published, split, language, out / name))
            text += describe(points, published, split, language)
    return paths + finish(run, sweep, text, out)


def draw_unasked(run: RunDirectory, out: Path) -> list[Path]:
    """The figures and the text of a run that asked no questions: perplexities, where there are any."""
    sweep, costs, texts = swept(run)
    points = points_of(sweep, {}, costs, texts, [])
    text = [f"# Compression curve of run {run.run_id} ({run.experiment})", *describe_texts(points)]
    with plt.rc_context(STYLE):
        paths = [draw_texts([run], out / "compression.png")] if texts else []
    return paths + finish(run, sweep, text, out)


def finish(run: RunDirectory, sweep: list[dict], text: list[str], out: Path) -> list[Path]:
    """context.png where anything was measured for it, and compression.md of `text`."""
    paths, context = [], run.read("context").to_pylist()
    if context:
        names = plan_names(sweep)
        with plt.rc_context(STYLE):
            paths.append(draw_context(context, names, sweep, out / "context.png"))
        text = [*text, *describe_context(context, names)]
    return [*paths, save_text("\n\n".join(text) + "\n", out / "compression.md")]


def report_split(run: RunDirectory, accuracy: list[dict]) -> str:
    """The config's data.report_split if it has accuracies, else "test", else the only split there is."""
    there = list(dict.fromkeys(row["split"] for row in accuracy))
    for split in ((run.config.get("data") or {}).get("report_split"), "test"):
        if split in there:
            return split
    if len(there) > 1:
        raise RunError(f"{run.path_of()} has accuracies for {', '.join(there)}, none of them the config's report_split")
    return there[0]


def read_published() -> list[dict]:
    """Rows of published/compression.csv with numbers as numbers."""
    with _PUBLISHED.open(encoding="utf-8", newline="") as file:
        return [
            {
                **row,
                "layers": int(row["layers"]),
                "compression_percent": float(row["compression_percent"]),
                "accuracy": float(row["accuracy"]),
            }
            for row in csv.DictReader(file)
        ]


def is_published_model(run: RunDirectory, costs: dict[str, dict], published: list[dict]) -> bool:
    """Whether the run is plausibly of the model of the published points: it has as many layers, and its path, or a
    folder of it such as the hub's cache, ends in the name; fine-tuned and later ones of the same shape have others."""
    path = str((run.config.get("model") or {}).get("path") or "").lower()
    names = [part.rpartition("--")[2] for part in path.replace("\\", "/").split("/")]
    layers = {row["layers"] + row["layers_removed"] for row in costs.values()}
    return published[0]["model"].lower() in names and layers == {_PUBLISHED_LAYERS}


def points_of(sweep, accuracy, costs, texts, comparisons) -> list[Point]:
    """One Point a row of `sweep`, methods in order of appearance, each by merges."""
    drops: dict[int, list[str]] = {}
    for row in sweep:
        if row["method"] == "drop":
            drops.setdefault(row["merges"], []).append(row["plan_id"])
    paired = {}
    for row in comparisons:
        if row["measure"] == "accuracy":
            paired[row["plan_a"], row["plan_b"]] = row
            flipped = {"difference": -row["difference"], "ci_low": -row["ci_high"], "ci_high": -row["ci_low"]}
            paired.setdefault((row["plan_b"], row["plan_a"]), {**row, **flipped})
    order = {key: i for i, key in enumerate(dict.fromkeys(line_of(row) for row in sweep))}
    points = []
    for row in sorted(sweep, key=lambda row: (order[line_of(row)], row["merges"])):
        plan, cost = row["plan_id"], costs[row["plan_id"]]
        found = [paired[plan, drop] for drop in drops.get(row["merges"], []) if (plan, drop) in paired]
        points.append(
            Point(
                plan,
                *line_of(row),
                row["merges"],
                cost["layers_removed"],
                cost["layers"] + cost["layers_removed"],
                cost["parameters_removed"] / (cost["parameters"] + cost["parameters_removed"]),
                accuracy.get((plan, MICRO)),
                accuracy.get((plan, MACRO)),
                texts.get(plan),
                found[0] if found else None,
            )
        )
    return points


def line_of(row: dict) -> tuple[str, str, str]:
    """(method, alignment, norms): what one line of the figure shows."""
    return row["method"], row["alignment"], row["norms"]


def curves_of(points: list[Point]) -> dict[str, list[Point]]:
    """Label -> the points of one line by layers removed; the unmerged model is no line."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        if point.removed:
            curves.setdefault(label_of(*point[1:4]), []).append(point)
    return {label: sorted(mine, key=lambda point: point.removed) for label, mine in curves.items()}


def label_of(method: str, alignment: str, norms: str) -> str:
    """The method as tables and page call it, with alignment and norms where they are not "none" and "keep"."""
    parts = [method]
    parts += [f"{alignment} aligned"] if alignment != "none" else []
    parts += [f"norms {norms}"] if norms != "keep" else []
    return ", ".join(parts)


def plan_names(sweep: list[dict]) -> dict[str, str]:
    """plan_id -> "drop, K = 4" of 4 merges, several methods of one plan joined by " = "."""
    names: dict[str, list[str]] = {}
    for row in sweep:
        merges = f", K = {row['merges']}" if row["merges"] else ""
        known = names.setdefault(row["plan_id"], [])
        if (name := label_of(*line_of(row)) + merges) not in known:
            known.append(name)
    return {plan: " = ".join(known) for plan, known in names.items()}


def base_of(points: list[Point]) -> Point | None:
    """The unmerged model's point."""
    return next((point for point in points if not point.removed), None)


def draw_curves(points: list[Point], published: list[dict], split: str, language: str, path: Path) -> Path:
    """One row of panels an alignment and treatment of norms, so that a row has few lines; one colour a method.

    Methods with one variant only, where others have several, are controls (dropping averages nothing, so nothing can
    be aligned); they are drawn in every row, thinner.
    """
    base, curves = base_of(points), list(curves_of(points).values())
    variants = list(dict.fromkeys((point.alignment, point.norms) for mine in curves for point in mine[:1]))
    methods = list(dict.fromkeys(mine[0].method for mine in curves))
    counts = {method: sum(mine[0].method == method for mine in curves) for method in methods}
    controls = {method for method in methods if counts[method] == 1 < max(counts.values())}
    known = any(point.perplexity is not None for point in points)
    n, wide = max(1, len(variants)), 1 + known + bool(published)
    figure, axes = plt.subplots(
        n,
        wide,
        figsize=(max(6.0, 4.7 * wide), (4.0 if n == 1 else 3.1 * n) + 1.5),
        squeeze=False,
        sharex="col",
        sharey="col",
    )
    handles: dict[str, object] = {}
    for line, variant in zip(axes, variants or [("none", "keep")], strict=True):
        shown = [mine for mine in curves if variant == mine[0][2:4] or mine[0].method in controls]
        spacing = 0.3 / max(1, len(shown))
        for i, mine in enumerate(shown):
            method, x, y = mine[0].method, *measured_of(mine)
            control = method in controls
            look = {**curve_style(methods.index(method)), "lw": 0.8 if control else 1.3, "ms": 3.5 if control else 4.5}
            error = interval_bars([point.micro for point in mine if point.micro])
            shift = spacing * (i - (len(shown) - 1) / 2)  # so that error bars of equal points stay apart
            handle = line[0].errorbar(x + shift, y, yerr=error, **look, elinewidth=0.8)
            handles.setdefault(method, handle)
            if published:
                thin = {**look, "ms": 3.2, "lw": 0.9, "elinewidth": 0.6}
                line[-1].errorbar(100 * (x + shift) / mine[0].layers, y, yerr=error, **thin, alpha=0.6)
            if known:
                draw_perplexities(line[1], mine, shift, look)
        draw_levels(line, base, known, bool(published))
        line[0].set_title("Accuracy" if n == 1 else f"Alignment {variant[0]}, norms {variant[1]}")
        line[0].set_ylabel("micro accuracy")
        if known:
            line[1].set_title("Plain text, lower is better")
            scale_perplexities(line[1], base, points)
        if published:
            line[-1].set_title(f"Beside published points of {published[0]['model']}")
            line[-1].set_ylabel("micro accuracy")
    for axis in axes[-1, : 1 + known]:
        axis.set_xlabel("layers removed")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles |= {BASE: plt.Line2D([], [], color="black", lw=1), "chance": plt.Line2D([], [], **DOTTED)}
    if published:
        axes[-1, -1].set_xlabel("share of the model's layers removed (%)")
        for axis in axes[:, -1]:
            handles |= draw_published(axis, published)
    questions = next((point.micro["n"] for point in points if point.micro), 0)
    note = f"{questions:,} questions, {split} split, language {language}; model of {points[0].layers} layers"
    note += "; bars: 95 % intervals" + ("; published points: their model's, without intervals" if published else "")
    note = textwrap.fill(note, int(13 * figure.get_figwidth()))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=(3, 4, 6)[wide - 1],
                  fontsize=8, title=note, title_fontsize=8)  # fmt: skip
    return save(figure, path)


def measured_of(points: list[Point]) -> tuple[np.ndarray, list[float]]:
    """Layers removed and micro accuracy of the points that have one."""
    answered = [point for point in points if point.micro]
    return np.array([float(point.removed) for point in answered]), [point.micro["accuracy"] for point in answered]


def draw_texts(runs: list[RunDirectory], path: Path) -> Path:
    """Perplexity against layers removed, a panel a run; methods have the same colour in all of them."""
    found = []
    for run in runs:
        sweep, costs, texts = swept(run)
        found.append(points_of(sweep, {}, costs, texts, []))
    labels = list(dict.fromkeys(label for points in found for label in curves_of(points)))
    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 5.6), squeeze=False, sharex=True)
    handles = {}
    for axis, run, points in zip(axes[0], runs, found, strict=True):
        curves = curves_of(points)
        for label, mine in curves.items():
            shift = 0.3 / len(labels) * (labels.index(label) - (len(labels) - 1) / 2)
            look = {**curve_style(labels.index(label)), "lw": 1.3, "ms": 4.5}
            handles[label] = draw_perplexities(axis, mine, shift, look)
        base, text = base_of(points), (run.config.get("data") or {}).get("perplexity_text")
        if base and base.perplexity is not None:
            handles[BASE] = axis.axhline(base.perplexity, color="black", lw=1)
        axis.set_title(Path(str(text)).name)
        axis.set_xlabel("layers removed")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        scale_perplexities(axis, base, points)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, 2 * len(runs)), fontsize=8)
    return save(figure, path)


def draw_perplexities(axis, mine: list[Point], shift: float, look: dict):
    """One method's perplexities with their intervals; returns what a legend shows."""
    texts = [point for point in mine if point.perplexity is not None]
    x, y = ([getattr(point, name) for point in texts] for name in ("removed", "perplexity"))
    error = interval_bars([point.text for point in texts], "perplexity")
    return axis.errorbar(np.array(x) + shift, y, yerr=error, **look, elinewidth=0.8)


def scale_perplexities(axis, base: Point | None, points: list[Point]) -> None:
    """A logarithmic axis, cut where `limit_perplexity` says."""
    cut = limit_perplexity(axis, base, points)
    axis.set(ylabel=f"perplexity (log scale{cut}; bars: 95 %)", yscale="log")
    plain_log(axis.yaxis, *axis.get_ylim())


def limit_perplexity(axis, base: Point | None, points: list[Point]) -> str:
    """Cut the axis where a language model is none any more, so that the others can be told apart; what to say of it."""
    known = [point.perplexity for point in points if point.perplexity is not None]
    if base is None or base.perplexity is None or not known or max(known) <= RUINED * base.perplexity:
        return ""
    texts = [point.text for point in points if point.perplexity is not None]
    lowest = [row["perplexity"] if row["ci_low"] is None else row["ci_low"] for row in texts]
    axis.set_ylim(0.8 * min(lowest), RUINED * base.perplexity)
    return f", up to {RUINED:g} × unmerged"


def draw_levels(line, base: Point | None, known: bool, published: bool) -> None:
    """The unmerged model and chance as horizontal lines."""
    for axis in (line[0], line[-1]) if published else (line[0],):
        axis.axhline(CHANCE, **DOTTED)
        if base and base.micro:
            axis.axhline(base.micro["accuracy"], color="black", lw=1)
    if known and base and base.perplexity is not None:
        line[1].axhline(base.perplexity, color="black", lw=1)


def draw_published(axis, published: list[dict]) -> dict[str, object]:
    """Published curves in black and grey, single points as crosses; returns label -> artist for the legend."""
    handles, singles, model = {}, [], published[0]["model"]
    for method, mine in published_curves(published).items():
        x, y = zip(*mine, strict=True)
        if len(mine) == 1:
            (cross,) = axis.plot(x, y, "x", color="#9A9A9A", ms=6, mew=1.4)
            singles.append((method, cross))
        else:
            look = ({"color": "#000000", "marker": "*", "ls": "-"}, {"color": "#6B6B6B", "marker": "P", "ls": "--"})
            (handles[f"published {method}, {model}"],) = axis.plot(x, y, **look[len(handles) % 2], lw=1.4, ms=7)
    if singles:
        words = [method.removeprefix("fixed ") for method, _ in singles]
        handles[f"published fixed {', '.join(words)}, {model}"] = singles[0][1]
    return handles


def published_curves(published: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Method -> (percent of layers removed, accuracy) in order; points that several tables repeat count once."""
    curves: dict[str, dict[int, tuple[float, float]]] = {}
    for row in published:
        curves.setdefault(row["method"], {})[row["layers"]] = row["compression_percent"], row["accuracy"]
    return {method: [mine[layers] for layers in sorted(mine)] for method, mine in curves.items()}


def stability(values: list[float]) -> tuple[float, float | None]:
    """(population standard deviation, largest drop to the next point) of accuracies by layers removed; None for one."""
    drops = [before - after for before, after in zip(values, values[1:], strict=False)]
    return float(np.std(values)), max(drops, default=None)


def stability_rows(points: list[Point], published: list[dict]) -> list[list]:
    """Cells of the stability table: every published series that is shown, then every method of the run.

    A method is judged on the published numbers of merges as far as the run has at least two of them, and, where that
    leaves points out, on all of its points as well; without published points on all.
    """
    rows = []
    series: dict[tuple[str, str], dict[int, float]] = {}
    for row in published:
        series.setdefault((row["source"], row["method"]), {})[row["layers"]] = row["accuracy"]
    compared = max((set(mine) for mine in series.values()), key=len, default=set())
    for (source, method), mine in series.items():
        if len(mine) > 1:
            rows.append([f"{method} ({source})", *stability_cells(mine)])
    for label, mine in curves_of(points).items():
        by_merges: dict[int, list[float]] = {}
        for point in mine:
            if point.micro:
                by_merges.setdefault(point.merges, []).append(point.micro["accuracy"])
        every = {merges: float(np.mean(by_merges[merges])) for merges in sorted(by_merges)}
        same = {merges: value for merges, value in every.items() if merges in compared}
        if len(same) > 1:
            rows.append([label, *stability_cells(same)])
        if every and every != same:
            rows.append([f"{label} (all points)" if published else label, *stability_cells(every)])
    return rows


def stability_cells(accuracy: dict[int, float]) -> list:
    """Merges, standard deviation, largest drop and where it is."""
    merges = sorted(accuracy)
    values = [accuracy[m] for m in merges]
    deviation, drop = stability(values)
    where = None
    if drop is not None:
        i = next(i for i in range(len(values) - 1) if values[i] - values[i + 1] == drop)
        where = f"{merges[i]} → {merges[i + 1]}"
    return [", ".join(map(str, merges)), number(deviation, 4), number(drop, 4), where]


def describe(points: list[Point], published: list[dict], split: str, language: str) -> list[str]:
    """The sections of compression.md for one language."""
    rows = []
    for point in points:
        difference = point.difference
        rows.append(
            [
                point.method,
                point.alignment,
                point.norms,
                point.merges,
                number(100 * point.share, 2),
                number(100 * point.parameters_removed, 2),
                with_interval(point.micro, digits=4),
                with_interval(point.macro, digits=4),
                point.micro and number(point.micro["nll"]),
                figures(point.perplexity),
                with_interval(difference, "difference", digits=4, sign="+"),
                difference and probability(difference["p_value"]),
                difference and probability(difference["p_holm"]),
            ]
        )
    header = ["method", "alignment", "norms", "K", "layers removed %", "parameters removed %", "micro accuracy",
              "macro accuracy", "answer NLL", "text perplexity", "difference to drop", "p", "p (Holm)"]  # fmt: skip
    text = [
        f"## {split} split, language {language}",
        "K merges; accuracies with 95 % intervals. The difference to `drop` of the same K is paired, question by "
        "question (exact McNemar p, and Holm's for all comparisons of accuracy that the sweep makes). Answer NLL in "
        f"nats: of the right letter among the four. Chance is {CHANCE}.",
        markdown(header, rows),
    ]
    if stable := stability_rows(points, published):
        text += [
            "### Stability\n\nPopulation standard deviation of the accuracies over the merges named, and the largest "
            "drop from one to the next; the unmerged model is not counted. A method that is uniformly bad is stable "
            "too.",
            markdown(["curve", "K", "standard deviation", "largest drop", "at K"], stable),
        ]
    if not published:
        return text
    cited = [
        [row["source"], row["method"], row["layers"], number(row["compression_percent"], 3), number(row["accuracy"], 4)]
        for row in published
    ]
    return [
        *text,
        f"### Published points\n\n{published[0]['model']}, {_PUBLISHED_LAYERS} layers; layers removed % is layers / "
        f"{_PUBLISHED_LAYERS}. Beyond Naive Merging: "
        "Borate et al., the study of alignment and similarity that follows arXiv 2406.16330; the MKA and fixed points "
        "are quoted as it gives them.",
        markdown(["source", "method", "layers removed", "layers removed %", "accuracy"], cited),
    ]


def describe_texts(points: list[Point]) -> list[str]:
    """The sections of compression.md where no questions were asked."""
    rows = []
    for point in points:
        limits = [point.text and figures(point.text[name]) for name in ("ci_low", "ci_high")]
        removed = [number(100 * share, 2) for share in (point.share, point.parameters_removed)]
        rows.append([*point[1:5], *removed, figures(point.perplexity), *limits])
    header = ["method", "alignment", "norms", "K", "layers removed %", "parameters removed %", "text perplexity",
              "95 % from", "to"]  # fmt: skip
    return ["## Plain text\n\nK merges. No questions were asked.", markdown(header, rows)]


def probability(p: float | None) -> str | None:
    """A p-value with as many digits as say something."""
    if p is None:
        return None
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}" if p > 0 else "0"


def figures(value: float | None) -> str | None:
    """A perplexity with four significant figures and no exponent below 10^9; an overflow is infinite."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "∞"
    return f"{value:.3e}" if value >= 1e9 else f"{value:,.{max(0, 3 - math.floor(math.log10(value)))}f}"


if __name__ == "__main__":
    sys.exit(main())
