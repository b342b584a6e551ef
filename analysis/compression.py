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

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from compression_panels import draw_curves, draw_texts
from compression_points import (
    PUBLISHED_LAYERS,
    Point,
    curves_of,
    is_published_model,
    plan_names,
    points_of,
    read_published,
    swept,
)
from context_panels import describe_context, draw_context
from plotting import (
    STYLE,
    markdown,
    need,
    number,
    perplexity,
    report_split,
    run_main,
    save_text,
    with_interval,
)

from raymerge.tables import CHANCE, Row, RunDirectory


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_main(draw, __doc__, argv, add_options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The script's own options."""
    parser.add_argument("--beside", metavar="RUN", nargs="+", default=[], help="sweeps on other texts: perplexity.png")
    parser.add_argument("--published", action="store_true", help="draw the published points beside any model's")


def draw(run: RunDirectory, out: Path, beside: Sequence[str] = (), published: bool = False) -> list[Path]:
    """Write the figures and compression.md into `out`; return their paths. RunError if a table is missing."""
    with plt.rc_context(STYLE):
        others = [draw_texts([run, *map(RunDirectory.load, beside)], out / "perplexity.png")] if beside else []
    return [*draw_run(run, out, published), *others]


def draw_run(run: RunDirectory, out: Path, asked: bool) -> list[Path]:
    """The figures and the text of one run; asked: for the published points, also beside another model's."""
    need(run, "sweep", "the compression curve")  # what a run that has not begun lacks is named first
    if (run.config.get("data") or {}).get("mmlu", "") is None:
        return draw_unasked(run, out)
    accuracy = need(run, "accuracy", "the accuracy of the sweep's plans")
    sweep, costs, texts = swept(run)
    split = report_split(run, list(dict.fromkeys(row["split"] for row in accuracy)), "accuracies")
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


def finish(run: RunDirectory, sweep: list[Row], text: list[str], out: Path) -> list[Path]:
    """context.png where anything was measured for it, and compression.md of `text`."""
    paths, context = [], run.read("context").to_pylist()
    if context:
        names = plan_names(sweep)
        with plt.rc_context(STYLE):
            paths.append(draw_context(context, names, sweep, out / "context.png"))
        text = [*text, *describe_context(context, names)]
    return [*paths, save_text(text, out / "compression.md")]


def stability(values: list[float]) -> tuple[float, float | None]:
    """(population standard deviation, largest drop to the next point) of accuracies by layers removed; None for one."""
    drops = [before - after for before, after in zip(values, values[1:], strict=False)]
    return float(np.std(values)), max(drops, default=None)


def stability_rows(points: list[Point], published: list[Row]) -> list[list[Any]]:
    """Cells of the stability table: every published series that is shown, then every method of the run.

    A method is judged on the published numbers of merges as far as the run has at least two of them, and, where that
    leaves points out, on all of its points as well; without published points on all.
    """
    rows = []
    series: dict[tuple[str, str], dict[int, float]] = {}
    for row in published:
        series.setdefault((row["source"], row["method"]), {})[row["layers"]] = row["accuracy"]
    compared = max((set(mine) for mine in series.values()), key=len, default=set())
    for (source, method), accuracies in series.items():
        if len(accuracies) > 1:
            rows.append([f"{method} ({source})", *stability_cells(accuracies)])
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


def stability_cells(accuracy: dict[int, float]) -> list[Any]:
    """Merges, standard deviation, largest drop and where it is."""
    merges = sorted(accuracy)
    values = [accuracy[m] for m in merges]
    deviation, drop = stability(values)
    where = None
    if drop is not None:
        i = next(i for i in range(len(values) - 1) if values[i] - values[i + 1] == drop)
        where = f"{merges[i]} → {merges[i + 1]}"
    return [", ".join(map(str, merges)), number(deviation, 4), number(drop, 4), where]


def describe(points: list[Point], published: list[Row], split: str, language: str) -> list[str]:
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
                perplexity(point.perplexity),
                with_interval(difference, "difference", digits=4, sign="+"),
                difference and probability(difference["p_value"]),
                difference and probability(difference["p_holm"]),
            ]
        )
    header = ["method", "alignment", "norms", "K", "layers removed %", "parameters removed %", "micro accuracy",
              "macro accuracy", "answer NLL", "text perplexity", "difference to drop", "p", "p (Holm)"]  # fmt: skip
    text = [
        f"## {split} split, language {language}",
        "K is the number of merges; accuracies have 95 % intervals. The difference to `drop` at the same K is paired "
        "by question (p of McNemar's exact test, and Holm's p over the comparisons of accuracy that the sweep is "
        "about). "
        f"Answer NLL is that of the right letter among the four, in nats. Chance is {CHANCE}.",
        markdown(header, rows),
    ]
    if stable := stability_rows(points, published):
        text += [
            "### Stability\n\nPopulation standard deviation of the accuracies over the given K, and the largest drop "
            "from one K to the next; the unmerged model does not count. A method that is uniformly bad is stable too.",
            markdown(["curve", "K", "standard deviation", "largest drop", "at K"], stable),
        ]
    return [*text, *describe_published(published)]


def describe_published(published: list[Row]) -> list[str]:
    """The section of compression.md on the published points that are shown, if any are."""
    if not published:
        return []
    cited = [
        [row["source"], row["method"], row["layers"], number(row["compression_percent"], 3), number(row["accuracy"], 4)]
        for row in published
    ]
    return [
        f"### Published points\n\n{published[0]['model']}, {PUBLISHED_LAYERS} layers; layers removed % is layers / "
        f"{PUBLISHED_LAYERS}. Beyond Naive Merging: "
        "Borate et al., the study of alignment and similarity that follows arXiv 2406.16330; the MKA and fixed points "
        "are quoted from it.",
        markdown(["source", "method", "layers removed", "layers removed %", "accuracy"], cited),
    ]


def describe_texts(points: list[Point]) -> list[str]:
    """The sections of compression.md where no questions were asked."""
    rows = []
    for point in points:
        limits = [point.text and perplexity(point.text[name]) for name in ("ci_low", "ci_high")]
        removed = [number(100 * share, 2) for share in (point.share, point.parameters_removed)]
        rows.append([*point[1:5], *removed, perplexity(point.perplexity), *limits])
    header = ["method", "alignment", "norms", "K", "layers removed %", "parameters removed %", "text perplexity",
              "95 % from", "to"]  # fmt: skip
    return ["## Plain text\n\nK is the number of merges. No questions were asked.", markdown(header, rows)]


def probability(p: float | None) -> str | None:
    """A p-value with as many digits as say something."""
    if p is None:
        return None
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}" if p > 0 else "0"


if __name__ == "__main__":
    sys.exit(main())
