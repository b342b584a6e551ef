"""What compression.py draws: accuracy and perplexity against layers removed, beside published points or other texts."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from compression_points import Point, base_of, curves_of, points_of, published_curves, swept
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from plotting import BASE, DOTTED, curve_style, interval_bars, plain_log, save

from raymerge.tables import CHANCE, RUINED, Row, RunDirectory


def draw_curves(points: list[Point], published: list[Row], split: str, language: str, path: Path) -> Path:
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
    handles: dict[str, Any] = {}  # Any: to matplotlib's stubs an ErrorbarContainer is no artist
    for line, variant in zip(axes, variants or [("none", "keep")], strict=True):
        shown = [mine for mine in curves if variant == mine[0][2:4] or mine[0].method in controls]
        spacing = 0.3 / max(1, len(shown))
        for i, mine in enumerate(shown):
            method = mine[0].method
            size = {"lw": 0.8, "ms": 3.5} if method in controls else {"lw": 1.3, "ms": 4.5}
            look = curve_style(methods.index(method)) | size
            shift = spacing * (i - (len(shown) - 1) / 2)  # so that error bars of equal points stay apart
            handle = draw_accuracies(line, mine, shift, look, bool(published))
            handles.setdefault(method, handle)
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
    handles |= {BASE: Line2D([], [], color="black", lw=1), "chance": Line2D([], [], **DOTTED)}
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


def draw_texts(runs: list[RunDirectory], path: Path) -> Path:
    """Perplexity against layers removed, a panel a run; methods have the same colour in all of them."""
    found = []
    for run in runs:
        sweep, costs, texts = swept(run)
        found.append(points_of(sweep, {}, costs, texts, []))
    labels = list(dict.fromkeys(label for points in found for label in curves_of(points)))
    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 5.6), squeeze=False, sharex=True)
    handles: dict[str, Any] = {}  # Any: to matplotlib's stubs an ErrorbarContainer is no artist
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


def draw_accuracies(
    line: np.ndarray, mine: list[Point], shift: float, look: dict[str, Any], published: bool
) -> ErrorbarContainer:
    """One method's accuracies with their intervals in a row's first panel, and by share of layers in its last beside
    published points; returns what a legend shows."""
    x = np.array([float(point.removed) for point in mine if point.micro])
    rows = [point.micro for point in mine if point.micro]
    y, error = [row["accuracy"] for row in rows], interval_bars(rows)
    handle = line[0].errorbar(x + shift, y, yerr=error, **look, elinewidth=0.8)
    if published:
        thin = {**look, "ms": 3.2, "lw": 0.9, "elinewidth": 0.6}
        line[-1].errorbar(100 * (x + shift) / mine[0].layers, y, yerr=error, **thin, alpha=0.6)
    return handle


def draw_perplexities(axis: Axes, mine: list[Point], shift: float, look: dict[str, Any]) -> ErrorbarContainer:
    """One method's perplexities with their intervals; returns what a legend shows."""
    x = np.array([float(point.removed) for point in mine if point.text])
    rows = [point.text for point in mine if point.text]
    y, error = [row["perplexity"] for row in rows], interval_bars(rows, "perplexity")
    return axis.errorbar(x + shift, y, yerr=error, **look, elinewidth=0.8)


def scale_perplexities(axis: Axes, base: Point | None, points: list[Point]) -> None:
    """A logarithmic axis, cut where `limit_perplexity` says."""
    cut = limit_perplexity(axis, base, points)
    label = f"perplexity (log scale{cut};\nbars: 95 %)" if cut else "perplexity (log scale; bars: 95 %)"
    axis.set(ylabel=label, yscale="log")  # in one line the longer one is higher than a panel
    plain_log(axis.yaxis, *axis.get_ylim())


def limit_perplexity(axis: Axes, base: Point | None, points: list[Point]) -> str:
    """Cut the axis where a language model is none any more, so that the others can be told apart; what to say of it."""
    known = [point.perplexity for point in points if point.perplexity is not None]
    if base is None or base.perplexity is None or not known or max(known) <= RUINED * base.perplexity:
        return ""
    texts = [point.text for point in points if point.text]
    lowest = [row["perplexity"] if row["ci_low"] is None else row["ci_low"] for row in texts]
    axis.set_ylim(0.8 * min(lowest), RUINED * base.perplexity)
    return f", up to {RUINED:g} × unmerged"


def draw_levels(line: np.ndarray, base: Point | None, known: bool, published: bool) -> None:
    """The unmerged model and chance as horizontal lines."""
    for axis in (line[0], line[-1]) if published else (line[0],):
        axis.axhline(CHANCE, **DOTTED)
        if base and base.micro:
            axis.axhline(base.micro["accuracy"], color="black", lw=1)
    if known and base and base.perplexity is not None:
        line[1].axhline(base.perplexity, color="black", lw=1)


def draw_published(axis: Axes, published: list[Row]) -> dict[str, Line2D]:
    """Published curves in black and grey, single points as crosses; returns label -> artist for the legend."""
    looks: list[dict[str, Any]] = [
        {"color": "#000000", "marker": "*", "ls": "-"},
        {"color": "#6B6B6B", "marker": "P", "ls": "--"},
    ]
    handles: dict[str, Line2D] = {}
    singles, model = [], published[0]["model"]
    for method, mine in published_curves(published).items():
        x, y = zip(*mine, strict=True)
        if len(mine) == 1:
            (cross,) = axis.plot(x, y, "x", color="#9A9A9A", ms=6, mew=1.4)
            singles.append((method, cross))
        else:
            (handles[f"published {method}, {model}"],) = axis.plot(x, y, **looks[len(handles) % 2], lw=1.4, ms=7)
    if singles:
        words = [method.removeprefix("fixed ") for method, _ in singles]
        handles[f"published fixed {', '.join(words)}, {model}"] = singles[0][1]
    return handles
