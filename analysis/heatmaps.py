"""Draw the similarity matrices of a run beside their shuffled null: heatmaps.png, block_influence.png, heatmaps.md.

    python analysis/heatmaps.py RUN [--out DIR]

Reads tables similarity, degeneracy and block_influence; the last two may be empty. A run with several
measures or embeddings gets one figure each, heatmaps-MEASURE-EMBEDDING.png.

  heatmaps.png         similarity of every pair of layers, one panel a subset, all on one colour scale; below each,
                       how far a pair exceeds the 95 % quantile of its null (samples shuffled), grey where it does not
  block_influence.png  1 - mean cosine of the states entering and leaving each layer; of more than 12 subsets their
                       median, lowest and highest
  heatmaps.md          the same as tables
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from plotting import (
    COLOURS,
    STYLE,
    entry,
    grouped,
    markdown,
    need,
    number,
    plain_log,
    run_main,
    save,
    save_text,
    show_layers,
    style_of,
    subset_name,
)

from raymerge.tables import Row, RunDirectory, colour_scale, degeneracy, layer_ranges

_PANELS = 5  # subsets beside each other; more go on a new line
_LINES = 12  # subsets told apart in one plot; of more a legend leaves it no room
_TITLE = 26  # letters above a panel; of more they are smaller, not to run into the next panel's
_NOTES = 5  # different ones written out a subset


class View(NamedTuple):
    """The matrices of one subset under one measure and embedding; (L, L) float64, NaN where undefined."""

    name: str
    layers: list[int]
    value: np.ndarray
    null_mean: np.ndarray
    null_p95: np.ndarray
    width: np.ndarray  # of the intervals; NaN without one
    n_samples: int
    notes: list[str]
    degenerate: list[int] | None  # layers whose diffusion map is noise; None if not stored

    @property
    def off_diagonal(self) -> np.ndarray:
        """Boolean (L, L)."""
        return ~np.eye(len(self.layers), dtype=bool)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_main(draw, __doc__, argv)


def draw(run: RunDirectory, out: Path) -> list[Path]:
    """Write the figures and heatmaps.md into `out`; return their paths. RunError if there is no similarity."""
    figures = grouped(need(run, "similarity", "the heat maps"), lambda row: (row["measure"], row["embedding"]))
    ranks, influence = run.read("degeneracy").to_pylist(), run.read("block_influence").to_pylist()
    paths, text = [], [f"# Similarity of layers in run {run.run_id} ({run.experiment})", _EXPLAINED]
    with plt.rc_context(STYLE):
        for (measure, embedding), rows in figures.items():
            views = views_of(rows, ranks)
            name = "heatmaps.png" if len(figures) == 1 else f"heatmaps-{measure}-{embedding}.png"
            paths.append(draw_matrices(views, measure, embedding, out / name))
            text += describe(views, measure, embedding)
        if influence:
            paths.append(draw_influence(influence, out / "block_influence.png"))
            text += describe_influence(influence)
    paths.append(save_text(text, out / "heatmaps.md"))
    return paths


def views_of(rows: list[Row], ranks: Sequence[Row] = ()) -> list[View]:
    """One View a subset, in order of appearance; a pair stored in one order only counts for both. ranks: rows of
    degeneracy."""
    views = []
    for name, mine in grouped(rows, subset_name).items():
        layers = sorted({row[side] for row in mine for side in ("layer_i", "layer_j")})
        at = {layer: i for i, layer in enumerate(layers)}
        matrices = np.full((4, len(layers), len(layers)), np.nan)
        stored = np.zeros(matrices.shape[1:], dtype=bool)
        for row in mine:
            cell = at[row["layer_i"]], at[row["layer_j"]]
            interval = (row["ci_low"], row["ci_high"])
            width = math.nan if None in interval else interval[1] - interval[0]
            value = math.nan if row["value"] is None else row["value"]
            null = [math.nan if row[name] is None else row[name] for name in ("null_mean", "null_p95")]
            matrices[:, *cell] = value, *null, width
            stored[cell] = True
        other = ~stored & stored.T
        matrices[:, other] = matrices.transpose(0, 2, 1)[:, other]
        notes = sorted({row["note"] for row in mine if row["note"]})
        n_samples = max(row["n_samples"] for row in mine)
        value, null_mean, null_p95, width = matrices
        degenerate = degenerate_layers(name, n_samples, ranks)
        views.append(View(name, layers, value, null_mean, null_p95, width, n_samples, notes, degenerate))
    return views


def colour_range(views: list[View]) -> tuple[float, float, bool, bool]:
    """(low, high, low clips, high clips): 0 or the 1st percentile to the 99th, both of the off-diagonal values."""
    values = np.concatenate([view.value[view.off_diagonal] for view in views])
    every = np.concatenate([view.value.ravel() for view in views])
    values, every = values[np.isfinite(values)], every[np.isfinite(every)]
    if not values.size:
        values = every
    if not values.size:
        return 0.0, 1.0, False, False
    low, high = colour_scale(values)
    return low, high, bool(every.min() < low), bool(every.max() > high)


def draw_matrices(views: list[View], measure: str, embedding: str, path: Path) -> Path:
    """Bands of at most five subsets, each with its matrix and, below, its excess over the null if one is stored."""
    bands = math.ceil(len(views) / _PANELS)
    wide = math.ceil(len(views) / bands)
    kinds = 1 + any(np.isfinite(view.null_p95).any() for view in views)
    if len(views) == 1:  # its two panels beside each other
        figure, axes = plt.subplots(1, kinds, figsize=(4.4 * kinds, 4.6), squeeze=False)
        axes = axes.T
    else:
        size = max(6.4, 2.35 * wide + 1.5), 2.45 * kinds * bands + 1.1
        figure, axes = plt.subplots(kinds * bands, wide, figsize=size, squeeze=False)
    low, high, low_clips, high_clips = colour_range(views)
    excess = [view.value - view.null_p95 for view in views]
    off = np.concatenate([part[view.off_diagonal] for part, view in zip(excess, views, strict=True)])
    off = off[np.isfinite(off)]
    top = max(float(np.percentile(off, 99)) if off.size else 0.0, 1e-9)
    undefined = any(np.isnan(view.value).any() for view in views)
    images: dict[int, AxesImage] = {}  # by kind
    for place, axis in enumerate(axes.T.ravel()):
        column, row = divmod(place, kinds * bands)
        band, kind = divmod(row, kinds)
        index = band * wide + column
        if index >= len(views):
            axis.set_visible(False)
            continue
        view = views[index]
        if kind == 0:
            images[0] = axis.imshow(view.value, cmap="viridis", norm=Normalize(low, high), interpolation="nearest")
            size = plt.rcParams["axes.titlesize"] * min(1, _TITLE / len(view.name))
            axis.set_title(view.name, fontsize=size)
        else:
            images[1] = draw_excess(axis, excess[index], top)
            axis.set_title(null_title(view), fontsize=8, fontweight="normal")
        dress(axis, view.layers)
        if column == 0:
            axis.set_ylabel("layer")
        if kind == kinds - 1 or len(views) == 1:
            axis.set_xlabel("layer")
    clips = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    for band in range(bands):
        for kind, label, extend in (
            (0, "similarity", clips[low_clips, high_clips]),
            (1, "above null's 95 % quantile", "max"),
        )[:kinds]:
            line = list(axes[kinds * band + kind])
            bar = figure.colorbar(images[kind], ax=line, label=label, extend=extend, fraction=0.04, pad=0.01)
            bar.outline.set_visible(False)
    handles = [Patch(facecolor="#D4D4D4", label="not above the null's 95 % quantile")] if kinds == 2 else []
    if undefined:
        handles.append(Patch(facecolor="white", hatch="//////", edgecolor="#8C8C8C", lw=0, label="undefined"))
    note = textwrap.fill(caption(views), int(13 * figure.get_figwidth()))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, title=note, title_fontsize=8)
    sizes = sorted({view.n_samples for view in views})
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    known = f", n = {n} samples" if sizes[-1] else ""  # foreign matrices do not say
    figure.suptitle(f"Similarity of layers: {title_of(measure, embedding)}{known}", fontweight="bold")
    return save(figure, path)


def draw_excess(axis: Axes, excess: np.ndarray, top: float) -> AxesImage:
    """How far similarities lie above their null: grey where they do not, else coloured up to `top`; the image."""
    axis.imshow(np.where(excess <= 0, 0.0, np.nan), cmap=ListedColormap(["#D4D4D4"]), interpolation="nearest")
    positive = np.where(excess > 0, excess, np.nan)
    return axis.imshow(positive, cmap="YlGnBu", norm=Normalize(0, top), interpolation="nearest")


def dress(axis: Axes, layers: list[int]) -> None:
    """A matrix's ticks, without a frame; what imshow leaves out (NaN) shows the axes' own patch, hatched."""
    axis.patch.set(facecolor="white", hatch="//////", edgecolor="#8C8C8C", lw=0)
    show_layers(axis, layers)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=2)


def title_of(measure: str, embedding: str) -> str:
    """The measure, and the embedding where it needs one."""
    return measure if embedding in ("none", measure) else f"{measure}, {embedding} embedding"


def caption(views: list[View]) -> str:
    """How the colours were chosen."""
    low, high, low_clips, high_clips = colour_range(views)
    start = "to" if low == 0 else "from the 1st to"
    text = f"one scale for all panels, {start} the 99th percentile off the diagonal"
    diagonal = np.concatenate([np.diag(view.value) for view in views])
    diagonal = diagonal[np.isfinite(diagonal)]
    if high_clips and diagonal.size and diagonal.max() > high:
        largest = f"{diagonal.max():.2f}"
        above = ": it is not bounded by 1" if diagonal.max() > 1 + 1e-9 else ""
        text += f"; the diagonal goes up to {largest} and is clipped{above}"
    return text


def above_null(view: View) -> float | None:
    """Share of the defined off-diagonal cells that exceed their null's 95 % quantile, those of degenerate layers left
    out; None without such cells."""
    cells = view.off_diagonal & np.isfinite(view.value) & np.isfinite(view.null_p95)
    noise = np.isin(view.layers, view.degenerate or [])
    cells &= ~(noise[:, None] | noise)
    return float((view.value > view.null_p95)[cells].mean()) if cells.any() else None


def null_title(view: View) -> str:
    """What the map of a subset's excess over the null is called."""
    share = above_null(view)
    if share is not None:
        return f"{100 * share:.0f} % of pairs above null"
    return f"noise: degenerate in layers {layer_ranges(view.degenerate)}" if view.degenerate else "no defined pair"


def degenerate_layers(name: str, n_samples: int, ranks: Sequence[Row]) -> list[int] | None:
    """Layers of a subset whose diffusion map is noise; None if not stored."""
    mine = [row for row in ranks if subset_name(row) == name]
    if not mine:
        return None
    return sorted(row["layer"] for row in mine if degeneracy(row["effective_rank"], n_samples))


def draw_influence(rows: list[Row], path: Path) -> Path:
    """One line a subset; of many subsets the median of all, and how far they go."""
    subsets = grouped(rows, subset_name)
    figure, axis = plt.subplots(figsize=(7.6, 4.0))
    if len(subsets) > _LINES:
        layers = grouped(rows, lambda row: row["layer"])
        x = sorted(layers)
        each = [[row["value"] for row in layers[layer]] for layer in x]
        low, middle, high = (np.array([find(own) for own in each]) for find in (np.min, np.median, np.max))
        axis.fill_between(
            x, low, high, color=COLOURS[5], alpha=0.4, lw=0, label=f"lowest to highest of {len(subsets)} subsets"
        )
        axis.plot(x, middle, **style_of(0), ms=3.5, lw=1.1, label="median")
    for i, (name, mine) in enumerate(subsets.items() if len(subsets) <= _LINES else ()):
        mine = sorted(mine, key=lambda row: row["layer"])
        x, y = [row["layer"] for row in mine], [row["value"] for row in mine]
        axis.plot(x, y, **style_of(i), ms=3.5, lw=1.1, label=entry(f"{name} (n = {mine[0]['n_samples']})"))
    values = [row["value"] for row in rows]
    if min(values) > 0:
        axis.set_yscale("log")
        plain_log(axis.yaxis, min(values), max(values))
    axis.set(xlabel="decoder layer", ylabel="1 - mean cosine", title="Block influence (low: the layer changes little)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return save(figure, path)


_EXPLAINED = (
    "Means are over defined cells off the diagonal. The null shuffles the samples of one layer against the other; "
    "noise alone puts a share of 0.05 above its 95 % quantile. A layer's embedding is called degenerate if the "
    "effective rank of its kernel is above 0.9 n or below 1.05: the kernel is then nearly the identity, or nearly "
    "constant, and similarities are noise that layers share. The share above the null does not count such layers."
)


def describe(views: list[View], measure: str, embedding: str) -> list[str]:
    """The section of heatmaps.md for one measure and embedding."""
    rows, notes = [], []
    for view in views:
        cells = view.off_diagonal & np.isfinite(view.value)
        null = (cells & np.isfinite(view.null_mean)).any()
        widths = view.width[cells & np.isfinite(view.width)]
        rows.append(
            [
                view.name,
                view.n_samples or None,
                number(view.value[cells].mean() if cells.any() else None),
                number(view.null_mean[cells & np.isfinite(view.null_mean)].mean() if null else None),
                number(above_null(view)),
                number(np.median(widths) if widths.size else None),
                number(float(np.nanmean(np.diag(view.value))) if np.isfinite(np.diag(view.value)).any() else None),
                int((view.off_diagonal & np.isnan(view.value)).sum()),
                None if view.degenerate is None else layer_ranges(view.degenerate) or "none",
            ]
        )
        notes += [f"- {view.name}: {note}" for note in view.notes[:_NOTES]]
        notes += [f"- {view.name}: {len(view.notes) - _NOTES} more"] if len(view.notes) > _NOTES else []
    header = ["subset", "n", "mean off-diagonal", "null mean", "share above null p95", "median interval width",
              "mean diagonal", "undefined cells", "degenerate layers"]  # fmt: skip
    text = [f"## {title_of(measure, embedding)}", markdown(header, rows), f"Colours: {caption(views)}."]
    return text + (["Notes on undefined or unusual cells:\n\n" + "\n".join(notes)] if notes else [])


def describe_influence(rows: list[Row]) -> list[str]:
    """The section of heatmaps.md on block influence."""
    values = {(row["layer"], subset_name(row)): row["value"] for row in rows}
    names = list(dict.fromkeys(subset_name(row) for row in rows))
    table = [
        [layer, *[number(values.get((layer, name)), 4) for name in names]]
        for layer in sorted({row["layer"] for row in rows})
    ]
    return [
        "## Block influence\n\n1 - mean cosine between the states that enter and leave a layer.",
        markdown(["layer", *names], table),
    ]


if __name__ == "__main__":
    sys.exit(main())
