"""Draw how similar the similarity matrices of subsets are: correlations.png, correlations.md.

    python analysis/correlations.py RUN [--out DIR]

Reads table similarity_correlation. A run with several measures gets one figure each, correlations-MEASURE.png.

  correlations.png  Pearson correlation of the flattened matrices (as published, diagonal included), the same off
                    the diagonal with its interval and ceiling, and every pair's correlation against its ceiling; of
                    more than 20 subsets colours alone, of more than 60 pairs the 30 highest and the 30 lowest
  correlations.md   the same as a table, with every pair

The ceiling is sqrt(reliability of a x reliability of b): what two subsets without any difference would reach, given
how well each one's few samples determine its own matrix.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from plotting import COLOURS, GREY, STYLE, grouped, ink, markdown, need, number, run_main, save, save_text, subset_name

from raymerge.tables import IMPORTED, Row, RunDirectory, correlation_ceiling, correlation_digits

_KINDS = {
    "subsets in one language": COLOURS[1],
    "languages of one subset": COLOURS[2],
    "both differ": GREY,
    "imported matrices": COLOURS[1],
}
_NONE = "#EDEDED"  # cells without a value
_DETAILED = 12  # subsets up to which there is room for intervals and ceilings in the cells
_WRITTEN = 20  # subsets up to which there is room for numbers in the cells
_PAIRS = 60  # drawn with their intervals: of 57 subsets' 1,596 pairs a figure would be 300 inches high


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_main(draw, __doc__, argv)


def draw(run: RunDirectory, out: Path) -> list[Path]:
    """Write the figures and correlations.md into `out`; return their paths. RunError if there are no correlations."""
    rows = need(run, "similarity_correlation", "correlations between subsets (a run of one subset has none)")
    measures = grouped(rows, lambda row: row["measure"])
    paths, text = [], [f"# Correlations between similarity matrices of run {run.run_id} ({run.experiment})", _EXPLAINED]
    with plt.rc_context(STYLE):
        for measure, rows in measures.items():
            name = "correlations.png" if len(measures) == 1 else f"correlations-{measure}.png"
            paths.append(draw_correlations(rows, measure, out / name))
            text += describe(rows, measure)
    paths.append(save_text(text, out / "correlations.md"))
    return paths


def names_of(rows: list[Row]) -> list[str]:
    """Subsets in order of appearance, those of the first language first."""
    seen = {subset_name(row, side): row[f"language{side}"] for side in ("_a", "_b") for row in rows}
    languages = list(dict.fromkeys(seen.values()))
    return sorted(seen, key=lambda name: languages.index(seen[name]))


def pairs_of(rows: list[Row]) -> list[Row]:
    """Rows that compare two different subsets, highest off-diagonal correlation first, undefined ones (of a constant
    matrix) last; a pair counts once."""
    found: dict[frozenset[str], Row] = {}
    for row in rows:
        pair = frozenset((subset_name(row, "_a"), subset_name(row, "_b")))
        if len(pair) == 2:
            found.setdefault(pair, row)
    # A sort by NaN leaves the others in no order.
    return sorted(found.values(), key=lambda row: -row["pearson_off_diagonal"] if is_defined(row) else math.inf)


def kind_of(row: Row) -> str:
    """Which of `_KINDS` a pair is."""
    if row["language_a"] == row["language_b"] == IMPORTED:
        return "imported matrices"
    if row["language_a"] == row["language_b"]:
        return "subsets in one language"
    return "languages of one subset" if row["subset_a"] == row["subset_b"] else "both differ"


def draw_correlations(rows: list[Row], measure: str, path: Path) -> Path:
    """Two matrices, annotated where there is room, and a dot plot of the pairs."""
    names, pairs = names_of(rows), pairs_of(rows)
    n, written, detailed = len(names), len(names) <= _WRITTEN, len(names) <= _DETAILED
    defined = [row for row in pairs if is_defined(row)]
    shown = defined if len(defined) <= _PAIRS else [*defined[: _PAIRS // 2], *defined[-_PAIRS // 2 :]]
    digits = correlation_digits(row["pearson_off_diagonal"] for row in defined)
    cell = (0.58, 0.56 + 0.12 * digits) if detailed else (0.4, 0.4) if written else (0.17, 0.17)
    left, middle, right = max(2.6, cell[0] * n + 1.1), max(2.8, cell[1] * n + 0.6), 5.6
    height = max(3.8, cell[0] * n + 1.6, 0.19 * len(shown) + 1.7)
    figure, axes = plt.subplots(1, 3, figsize=(left + middle + right, height), width_ratios=[left, middle, right])
    grids = np.full((2, n, n), np.nan)
    grids[:, np.arange(n), np.arange(n)] = 1.0
    detail: dict[tuple[int, int], Row] = {}
    for row in pairs:
        i, j = names.index(subset_name(row, "_a")), names.index(subset_name(row, "_b"))
        grids[:, [i, j], [j, i]] = np.array([[row["pearson"]], [row["pearson_off_diagonal"]]])
        detail[i, j] = detail[j, i] = row
    low = min(0.8, math.floor(5 * float(np.nanmin(grids))) / 5)  # from 0, matrices that all agree look alike
    # Of imported matrices there is neither.
    beside = [
        what
        for what, known in (("[95 % interval]", any(map(has_interval, pairs))), ("ceiling", has_ceilings(pairs)))
        if known
    ]
    titles = (
        "Flattened matrices\n(as published)",
        "Off the diagonal" + (f"\n{', '.join(beside)}" if detailed and beside else ""),
    )
    for axis, grid, title, rows_of in zip(axes, grids, titles, ({}, detail if detailed else {}), strict=False):
        image = draw_grid(axis, grid, low)
        if written:
            write_cells(axis, grid, image, rows_of, digits)
        turned = {"rotation": 45 if written else 90, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(n), names, **turned, va="top" if written else "center", fontsize=8)
        axis.set_yticks(range(n), names if axis is axes[0] else [""] * n, fontsize=8)
        axis.set_title(title)
    if not written:
        figure.colorbar(image, ax=axes[1], fraction=0.03, pad=0.02).outline.set_visible(False)
    draw_pairs(axes[2], shown, len(defined))
    figure.suptitle(f"Correlation of layer similarity between subsets ({measure})", fontweight="bold")
    return save(figure, path)


def is_defined(row: Row) -> bool:
    """Whether a pair has a correlation off the diagonal."""
    return math.isfinite(row["pearson_off_diagonal"])


def has_interval(row: Row) -> bool:
    """Whether a pair has an interval."""
    return row["ci_low"] is not None and row["ci_high"] is not None


def has_ceilings(pairs: list[Row]) -> bool:
    """Whether any pair has a ceiling."""
    return any(correlation_ceiling(row) is not None for row in pairs)


def draw_grid(axis: Axes, grid: np.ndarray, low: float) -> AxesImage:
    """A matrix of correlations as colours from `low` to 1; the image."""
    axis.patch.set_facecolor(_NONE)
    image = axis.imshow(np.ma.masked_invalid(grid), cmap="Blues", vmin=low, vmax=1, aspect="auto")
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return image


def write_cells(
    axis: Axes, grid: np.ndarray, image: AxesImage, detail: dict[tuple[int, int], Row], digits: int
) -> None:
    """A matrix's numbers; detail: by cell, the row whose interval and ceiling are added; digits: of these."""
    for (i, j), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        text = "1" if i == j else f"{value:.{max(3, digits)}f}"
        if row := detail.get((i, j)):
            text = f"{value:.{digits}f}"
            if has_interval(row):
                text += f"\n[{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"
            if (ceiling := correlation_ceiling(row)) is not None:
                text += f"\nceiling {ceiling:.{digits}f}"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=ink(image, value))


def draw_pairs(axis: Axes, pairs: list[Row], count: int) -> None:
    """One line a pair: its interval, its correlation as a dot, its ceiling as a bar; count: how many pairs there are,
    of which `pairs` may be the highest and the lowest."""
    for y, row in enumerate(pairs):
        colour = _KINDS[kind_of(row)]
        if has_interval(row):
            axis.hlines(y, row["ci_low"], row["ci_high"], color=colour, lw=1.4)
        axis.plot(row["pearson_off_diagonal"], y, "o", ms=5, color=colour)
        if (ceiling := correlation_ceiling(row)) is not None:
            axis.plot(ceiling, y, "|", ms=10, mew=1.8, color="black")
    labels = [f"{subset_name(row, '_a')} – {subset_name(row, '_b')}" for row in pairs]
    axis.set_yticks(range(len(pairs)), labels, fontsize=7.5)
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    left, right = axis.get_xlim()
    # Near 1 no more room than the pairs themselves take.
    axis.set_xlim(right=max(right, 1 + min(0.02, 0.1 * (1 - left))))
    bounded = has_ceilings(pairs)
    title = "Every pair" + "\nagainst its ceiling" * bounded
    if len(pairs) < count:
        title = f"The {len(pairs) // 2} highest and {len(pairs) // 2} lowest\nof {count:,} pairs"
        title += ", against their ceilings" * bounded
        axis.axhline(len(pairs) / 2 - 0.5, color=GREY, lw=0.8)
    axis.set(xlabel="off-diagonal Pearson correlation", title=title)
    for kind in dict.fromkeys(kind_of(row) for row in pairs):
        axis.plot([], [], "o-", ms=5, lw=1.4, color=_KINDS[kind], label=kind)
    if bounded:
        axis.plot([], [], "|", ms=10, mew=1.8, color="black", label="ceiling")
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize=8)


_EXPLAINED = (
    "Pearson is over the flattened matrices, diagonal included, as published. The interval, the reliabilities and the "
    "ceiling are for the correlation off the diagonal. The ceiling is the square root of the product of the "
    "reliabilities: a ratio near 1 means that the two matrices differ no more than sampling noise explains."
)


def describe(rows: list[Row], measure: str) -> list[str]:
    """The section of correlations.md for one measure."""
    table = []
    for row in pairs_of(rows):
        ceiling = correlation_ceiling(row)
        table.append(
            [
                f"{subset_name(row, '_a')} – {subset_name(row, '_b')}",
                kind_of(row),
                number(row["pearson"], 4),
                number(row["pearson_off_diagonal"], 4),
                f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]" if has_interval(row) else None,
                number(row["reliability_a"], 4),
                number(row["reliability_b"], 4),
                number(ceiling, 4),
                number(None if ceiling is None else row["pearson_off_diagonal"] / ceiling, 4),
            ]
        )
    header = ["pair", "kind", "Pearson", "off-diagonal", "95 % interval", "reliability a", "reliability b", "ceiling",
              "off-diagonal / ceiling"]  # fmt: skip
    text = [f"## {measure}", markdown(header, table)]
    means = []
    for kind in _KINDS:
        mine = [row for row in pairs_of(rows) if kind_of(row) == kind and is_defined(row)]
        bounded = [(row, ceiling) for row in mine if (ceiling := correlation_ceiling(row)) is not None]
        ratios = [row["pearson_off_diagonal"] / ceiling for row, ceiling in bounded]
        if mine:
            means.append(
                [
                    kind,
                    len(mine),
                    number(np.mean([row["pearson"] for row in mine]), 4),
                    number(np.mean([row["pearson_off_diagonal"] for row in mine]), 4),
                    number(np.mean(ratios) if ratios else None, 4),
                ]
            )
    header = ["mean of", "pairs", "Pearson", "off-diagonal", "off-diagonal / ceiling"]
    return [*text, markdown(header, means)]


if __name__ == "__main__":
    sys.exit(main())
