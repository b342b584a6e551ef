"""What alphas.py draws of single methods: the published figure of learned coefficients, losses of gradient descent, and
coefficients read from alpha files instead of a run."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator
from plotting import COLOURS, GREY, number, save, spread, style_of

from raymerge.tables import Row, RunDirectory, RunError

MOST_METHODS = 8  # rows of the figure
_KEYS = ("layer_to_merge_into", "layer_to_remove", "ratio_i_alpha")


#: Beside every table of correlations along depth; simulated, 20,000 draws (docs/results.md, 2026-11-28).
NO_INTERVAL = (
    "r has no interval or p: coefficients and similarities both change gradually with depth, so even unrelated ones "
    "correlate. In simulations of 13 steps with independent series, Fisher's interval excluded 0 in 17 % of cases if "
    "neighbouring steps correlate at .7, in 28 % at .9 and in 36 % for random walks, not in 5 %. A test by circular "
    "shifts has no p below 1/13, and with 40 steps it errs in 5, 9 and 21 % of cases."
)


def correlation(x: list[float], y: list[float]) -> float:
    """Pearson's r; NaN for fewer than 3 pairs or where one side does not vary. Why alone: NO_INTERVAL."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


# -- alpha files -----------------------------------------------------------------------------------------------------


def read_alpha_files(paths: list[Path]) -> tuple[list[Row], list[Row]]:
    """Rows as those of tables plans and coefficients, one plan a file, named as the file is.

    The order in a file counts, and `step` is only informative, as in the published ones. RunError for a file that is
    no list of steps, or merges a layer that is gone.
    """
    plans, coefficients = [], []
    stems = [path.stem for path in paths]
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            steps = [(int(e[_KEYS[0]]), int(e[_KEYS[1]]), float(e[_KEYS[2]])) for e in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            wanted = "a JSON list of steps with " + ", ".join(_KEYS)
            raise RunError(f"{path} cannot be read as {wanted}: {type(error).__name__} {error}") from error
        weights: dict[int, dict[int, float]] = {
            layer: {layer: 1.0} for into, gone, _ in steps for layer in (into, gone)
        }
        for number_, (into, gone, alpha) in enumerate(steps):
            if into == gone or into not in weights or gone not in weights:
                raise RunError(f"{path}, step {number_}: layer {gone} into {into}, but one of them is merged before")
            plans.append({"plan_id": name, "name": name, "kind": "file", "matrix": None, "step": number_, "into": into,
                          "remove": gone, "alpha": alpha})  # fmt: skip
            kept, removed = weights[into], weights.pop(gone)
            weights[into] = {
                layer: alpha * kept.get(layer, 0.0) + (1 - alpha) * removed.get(layer, 0.0)
                for layer in sorted({*kept, *removed})
            }
        coefficients += [
            {"plan_id": name, "matrix": None, "kept_layer": kept, "source_layer": source, "coefficient": value}
            for kept, sources in weights.items()
            for source, value in sources.items()
        ]
    return plans, coefficients


# -- similarity ------------------------------------------------------------------------------------------------------


def read_similarity(path: str, subset: str | None, language: str | None = None) -> dict[tuple[int, int], float]:
    """(layer, layer) -> similarity, both ways round, from a similarity run; pairs without a value are left out.

    subset: NAME or NAME/LANGUAGE where there are several matrices. RunError where it is not one matrix.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in RunDirectory.load(path).read("similarity").to_pylist():
        whole = f"{row['subset']}/{row['language']}"
        if subset == whole or (subset or row["subset"]) == row["subset"] and language in (None, row["language"]):
            found.setdefault((row["subset"], row["language"], row["measure"], row["embedding"]), []).append(row)
    if len(found) != 1:
        names = ", ".join(f"{key[0]}/{key[1]} ({key[2]})" for key in found) or "none"
        raise RunError(f"{path} holds {len(found)} similarity matrices ({names}), not one: name it with --subset")
    (rows,) = found.values()
    values = {(row["layer_i"], row["layer_j"]): row["value"] for row in rows if row["value"] is not None}
    return {(j, i): value for (i, j), value in values.items()} | values


def pairs_of(rows: list[Row], similarity: dict[tuple[int, int], float]) -> tuple[list[float], list[float]]:
    """Similarity of the two layers of every step that has one, and the step's alpha."""
    known = [row for row in rows if (row["into"], row["remove"]) in similarity]
    return [similarity[row["into"], row["remove"]] for row in known], [row["alpha"] for row in known]


# -- figures ---------------------------------------------------------------------------------------------------------


def draw_methods(methods: dict[str, list[Row]], similarity: dict[tuple[int, int], float] | None, path: Path) -> Path:
    """The study's Figure 1, one row a method: distribution of alpha, alpha by step, alpha against similarity; of the
    first MOST_METHODS."""
    methods = dict(list(methods.items())[:MOST_METHODS])
    columns = 2 if similarity is None else 3
    figure, axes = plt.subplots(len(methods), columns, figsize=(4.3 * columns, 2.9 * len(methods) + 0.3), squeeze=False)
    for i, (row_axes, (name, rows)) in enumerate(zip(axes, methods.items(), strict=True)):
        look, alphas = style_of(i), np.array([row["alpha"] for row in rows])
        first = row_axes[0]
        first.hist(alphas, bins=np.linspace(0, 1, 26), color=look["color"], alpha=0.55)
        first.axvline(alphas.mean(), color=look["color"], ls="--", lw=1.4)
        # The name has a line of its own, as wide as the panel: it ran into the next panel's title.
        title = f"{textwrap.fill(name, 44)}\ndistribution of α, dashed: mean {alphas.mean():.3f}"
        first.set(xlim=(0, 1), xlabel="α", ylabel="merge steps")
        first.set_title(title, fontsize=9)
        first.yaxis.get_major_locator().set_params(integer=True)
        second = row_axes[1]
        x = [row["step"] for row in rows]
        second.plot(x, alphas, **look, ms=4.5, lw=1.2)
        second.axhline(alphas.mean(), color=GREY, ls=(0, (4, 3)), lw=0.9)
        stride = math.ceil(len(rows) / 16)
        ticks = [f"{row['remove']}→{row['into']}" for row in rows[::stride]]
        second.set_xticks(x[::stride], ticks, fontsize=7, rotation=90 if len(ticks) > 5 else 0)
        second.set(ylim=(-0.03, 1.03), xlabel="merge step: removed → into", ylabel="α")
        second.set_title("α by merge step", fontsize=9)
        if similarity is not None:
            draw_against(row_axes[2], *pairs_of(rows, similarity), look)
    return save(figure, path)


def draw_against(axis: Axes, x: list[float], y: list[float], look: dict[str, Any]) -> None:
    """Alpha against the similarity of the merged layers, with Pearson's r and the least-squares line."""
    r = correlation(x, y)
    axis.plot(x, y, ls="none", **look, ms=5)
    if math.isfinite(r):
        slope, intercept = np.polyfit(x, y, 1)
        ends = np.array([min(x), max(x)])
        axis.plot(ends, slope * ends + intercept, color=GREY, lw=1)
    shown = f"r = {r:.3f}" if math.isfinite(r) else "r undefined"
    axis.margins(y=0.22)  # room for the text above the points
    axis.text(0.03, 0.96, f"{shown}, n = {len(x)}", transform=axis.transAxes, va="top", fontsize=8)
    axis.set_xlabel("similarity $S_{lm}$", parse_math=True)
    axis.set_ylabel("α")
    axis.set_title("α against similarity", fontsize=9)


def starts_of(history: list[Row]) -> dict[str, list[Row]]:
    """Start, with its searcher where there are several -> its rows by epoch."""
    several = len({row["searcher"] for row in history}) > 1
    starts: dict[str, list[Row]] = {}
    for row in sorted(history, key=lambda row: (row["searcher"], row["start"], row["epoch"])):
        name = (
            f"{row['searcher'].removeprefix('gradient_')}, start {row['start']}" if several else f"start {row['start']}"
        )
        starts.setdefault(name, []).append(row)
    return starts


def lowest(rows: list[Row]) -> Row:
    """The epoch of the lowest held-out loss, or without one of the lowest loss."""
    held = [row for row in rows if row["held_out_loss"] is not None and math.isfinite(row["held_out_loss"])]
    return min(held, key=lambda row: row["held_out_loss"]) if held else min(rows, key=lambda row: row["loss"])


def best_start(starts: dict[str, list[Row]]) -> str:
    """The start that came lowest, by held-out loss where there is one."""

    def reached(start: str) -> float:
        row = lowest(starts[start])
        return row["loss"] if row["held_out_loss"] is None else row["held_out_loss"]

    return min(starts, key=reached)


_NUMBERED = 26  # coefficients whose numbers stand beside their lines without covering each other


def draw_history(history: list[Row], path: Path, of_what: str = "") -> Path:
    """Losses by epoch, held-out ones dashed, one colour a start, or a searcher where there are several; and the alphas
    of the best start as they move."""
    starts = starts_of(history)
    best = best_start(starts)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    draw_losses(left, starts, best, of_what)
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, fontsize=8, ncols=min(6, len(handles)), loc="outside lower center")
    draw_moves(right, starts[best], best)
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return save(figure, path)


def draw_losses(axis: Axes, starts: dict[str, list[Row]], best: str, of_what: str) -> None:
    """Losses by epoch, the best start's thicker, held-out ones dashed with a ring at their minimum."""
    names = list(dict.fromkeys(start.split(", ")[0] for start in starts))
    held_out = False
    for start, rows in starts.items():
        i, epochs = names.index(start.split(", ")[0]), [row["epoch"] for row in rows]
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        mark = "o" if len(rows) == 1 else None
        width = 2.0 if start == best else 1.1
        label = start if start == best or len(names) == len(starts) else names[i]
        axis.plot(epochs, [row["loss"] for row in rows], color=colour, lw=width, marker=mark, label=label)
        held = [(row["epoch"], row["held_out_loss"]) for row in rows if row["held_out_loss"] is not None]
        if held:
            held_out = True
            axis.plot(*zip(*held, strict=True), color=colour, lw=width, ls="--", marker=mark)
            least = lowest(rows)
            axis.plot(least["epoch"], least["held_out_loss"], "o", ms=6, mfc="none", color=colour)
    title = "Loss by epoch" + (" (dashed: held out; ring: its minimum)" if held_out else "")
    axis.set(xlabel="epoch", ylabel="loss" + (f" ({of_what})" if of_what else ""), title=title)


def draw_moves(axis: Axes, rows: list[Row], start: str) -> None:
    """The alphas of one start by epoch, numbered beside their ends, or many of them by a bar of colours."""
    alphas = np.array([row["alphas"] for row in rows])
    n = len(alphas.T)
    matrices = rows[0]["searcher"].endswith("per_matrix")  # those of one matrix after those of another
    colourmap = LinearSegmentedColormap.from_list("", plt.get_cmap("viridis")(np.linspace(0, 0.85, 64)))
    for step, colour in enumerate(colourmap(np.linspace(0, 1, n))):
        axis.plot([row["epoch"] for row in rows], alphas[:, step], color=colour, lw=1.2 if n <= _NUMBERED else 0.8)
    if n <= _NUMBERED:
        ends = np.argsort(alphas[-1], kind="stable")
        heights = spread(alphas[-1, ends].tolist(), min(0.036, 1 / n), 0, 1)
        for step, height in zip(ends.tolist(), heights, strict=True):
            axis.annotate(
                str(step), (rows[-1]["epoch"], height), xytext=(3, 0), textcoords="offset points", fontsize=7,
                va="center",
            )  # fmt: skip
    else:
        scale = plt.cm.ScalarMappable(plt.Normalize(0, n - 1), colourmap)
        label = "coefficient: by matrix, then by step" if matrices else "step"
        axis.figure.colorbar(scale, ax=axis, label=label)
    numbered = "by matrix, then by step" if matrices else "by step"
    what = f"α of {start}, numbered {numbered}" if n <= _NUMBERED else f"The {n} α of {start}"
    axis.set(ylim=(-0.03, 1.03), xlabel="epoch", ylabel="α", title=what)


def history_rows(history: list[Row]) -> list[list[Any]]:
    """For each start: epochs, first and last loss, the lowest held-out loss and its epoch."""
    table = []
    for start, rows in starts_of(history).items():
        least = lowest(rows)
        first, last = number(rows[0]["loss"], 4), number(rows[-1]["loss"], 4)
        table.append([start, rows[-1]["epoch"], first, last, number(least["held_out_loss"], 4), least["epoch"]])
    return table
