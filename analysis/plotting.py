"""What the analysis scripts share: arguments, plan labels, colours, Markdown tables."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from raymerge.tables import IMPORTED, Row, RunDirectory, RunError

# Okabe & Ito (2008) without yellow, which is too faint on white; the last is Paul Tol's wine
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#7F7F7F"  # of lines that others are held against
DOTTED: dict[str, Any] = {"color": GREY, "ls": ":", "lw": 1.2}  # the line of chance
BASE = "base (unmerged)"
_MOST_TICKS = 8  # of layers, a side of an image
STYLE = matplotlib.RcParams(
    {
        "text.parse_math": False,  # names of files and subsets may have two $, and what is between them is no formula
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 150,
    }
)


def style_of(number: int) -> dict[str, Any]:
    """Colour and marker of the number-th series; 56 combinations before one repeats."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[(number + number // 8) % len(MARKERS)]}


def curve_style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the index-th method: seven colours, black being the unmerged model's, four lines."""
    return {
        "color": COLOURS[1 + index % (len(COLOURS) - 1)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": ("-", "--", ":", "-.")[(index // (len(COLOURS) - 1)) % 4],
    }


def entry(name: str) -> str:
    """A legend's entry for a name of a user's: matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def spread(values: list[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Positions near ascending `values` at least `gap` apart, moved as little as pushing clusters about their mean, and
    from there into low … high, where these have room for all."""
    clusters: list[tuple[float, int]] = []  # (sum of values, how many)
    for value in values:
        clusters.append((value, 1))
        while len(clusters) > 1:
            (s0, n0), (s1, n1) = clusters[-2:]
            if s1 / n1 - s0 / n0 >= gap * (n0 + n1) / 2:
                break
            clusters[-2:] = [(s0 + s1, n0 + n1)]
    found = [total / n + gap * (i - (n - 1) / 2) for total, n in clusters for i in range(n)]
    found = [max(at, low + gap * i) for i, at in enumerate(found)]
    return [min(at, high - gap * (len(found) - 1 - i)) for i, at in enumerate(found)]


_Row = TypeVar("_Row")
_Key = TypeVar("_Key", bound=Hashable)


def grouped(rows: Iterable[_Row], key: Callable[[_Row], _Key]) -> dict[_Key, list[_Row]]:
    """key(row) -> the rows that have it, in order of appearance."""
    found: dict[_Key, list[_Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def interval_bars(rows: list[Row], value: str = "accuracy", *, scale: float = 1.0) -> np.ndarray:
    """(2, n) lengths from each row's value to the ends of its 95 % interval (columns ci_low, ci_high), for errorbar;
    rows without an interval, or empty, have none."""
    ends = [[row.get("ci_low"), row.get(value), row.get("ci_high")] for row in rows]
    ends = [[math.nan if end is None else end for end in each] for each in ends]
    low, middle, high = scale * np.array(ends, dtype=float).reshape(-1, 3).T
    return np.nan_to_num(np.stack([middle - low, high - middle])).clip(min=0)


def with_interval(row: Row | None, value: str = "accuracy", *, digits: int = 3, sign: str = "") -> str | None:
    """A row's value and its 95 % interval as text, such as 0.640 [0.611, 0.668]; None for no row."""
    if row is None or not np.isfinite(row[value]):
        return None
    low, high = (number(row.get(name), digits) for name in ("ci_low", "ci_high"))
    return f"{row[value]:{sign}.{digits}f}" + (f" [{low}, {high}]" if low and high else "")


def plain_log(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic x or y axis (axis.xaxis, axis.yaxis) that shows values from `low` to `high`, written out:
    round numbers far enough from each other, where powers of ten would be too few; else those."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    if high >= 100 * low:
        return
    wide = high > 5 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: Path) -> Path:
    """Write a figure and close it."""
    try:
        return _written(path, lambda temporary: figure.savefig(temporary, format="png"))
    finally:
        plt.close(figure)


def save_text(sections: list[str], path: Path) -> Path:
    """Write a Markdown file of these sections."""
    return _written(path, lambda temporary: temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8"))


def _written(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file under a temporary name first, so that no viewer opens half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"_tmp.{path.name}")
    try:
        write(temporary)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_SEARCH = "raymerge search CONFIG --out RUN"
_SIMILARITY = "raymerge similarity CONFIG --out RUN"
_SWEEP = "raymerge sweep CONFIG --out RUN"
_COMMANDS = {
    **dict.fromkeys(("plans", "coefficients", "trials"), _SEARCH),
    **dict.fromkeys(
        ("similarity", "similarity_correlation", "embeddings", "degeneracy", "samples", "block_influence"), _SIMILARITY
    ),
    "sensitivity": "raymerge sensitivity CONFIG --out RUN",
    **dict.fromkeys(("sweep", "context"), _SWEEP),
}


def need(run: RunDirectory, table: str, why: str) -> list[Row]:
    """Return a table's rows; RunError names the table and the command that writes it if there are none.

    A table that several commands write is named with the one that made this run, where that is known.
    """
    rows = run.read(table).to_pylist()
    if not rows:
        command = _COMMANDS.get(table) or (
            _SWEEP if run.experiment == "sweep" else f"{_SEARCH} or raymerge evaluate MODEL --mmlu DIR --out RUN"
        )
        what = f"{run.path_of()} has no rows in table {table}, needed for {why}"
        # Of a run that is going on or was interrupted, the table may be the last that is written.
        unfinished = "" if run.complete else "; the run is unfinished: repeat its command to continue it"
        raise RunError(f"{what}; {command} writes it{unfinished}")
    return rows


def report_split(run: RunDirectory, there: list[str], what: str) -> str:
    """Of the splits there are, the config's data.report_split, else "test", else the only one; what: they have."""
    for split in ((run.config.get("data") or {}).get("report_split"), "test"):
        if split in there:
            return split
    if len(there) > 1:
        raise RunError(f"{run.path_of()} has {what} for {', '.join(there)}, but not for the config's report_split")
    return there[0]


def subset_name(row: Row, suffix: str = "") -> str:
    """How a figure calls a row's subset: "medical en", or "medical" where the matrix was imported without a language.

    The columns may carry a suffix such as "_a".
    """
    subset, language = row[f"subset{suffix}"], row[f"language{suffix}"]
    return subset if language == IMPORTED else f"{subset} {language}"


def ink(image: ScalarMappable, value: float) -> str:
    """Black or white, whichever stands out more (WCAG's contrast) from the colour that an image gives a value."""
    channels = np.array(image.to_rgba(np.array(value))[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.179 else "black"


def show_layers(axis: Axes, layers: list[int]) -> None:
    """Ticks of an image whose rows and columns are layers: a few a side, evenly spaced, the first included."""
    stride = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 50, len(layers)) if -(-len(layers) // s) <= _MOST_TICKS)
    at = range(0, len(layers), stride)
    names = [str(layers[i]) for i in at]
    axis.set_xticks(at, names, fontsize=7.5)
    axis.set_yticks(at, names, fontsize=7.5)


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, first column to the left, the others to the right; None becomes an en dash, and strokes in
    names end no cell."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    cells = [["–" if cell is None else str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def number(value: float | None, digits: int = 3) -> str | None:
    """Fixed digits; None (an en dash in a table) for a missing or undefined value."""
    return None if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def perplexity(value: float | None) -> str | None:
    """A perplexity with four significant figures and no exponent below 10^9; an overflow is infinite."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "∞"
    return f"{value:.3e}" if value >= 1e9 else f"{value:,.{max(0, 3 - math.floor(math.log10(value)))}f}"


def run_main(
    draw: Callable[..., list[Path]],
    description: str | None,
    argv: list[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    without_run: Callable[..., list[Path]] | None = None,
) -> int:
    """Command line of one analysis script: RUN [--out DIR]; returns the exit code: 0, or 2 for a wrong input.

    `add_options(parser)` may add a script's own options; `draw` gets them by keyword. `without_run(out, **options)`,
    where it is given, is called in place of `draw` when there is no RUN.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    nargs = None if without_run is None else "?"
    parser.add_argument("run", metavar="RUN", nargs=nargs, help="a run directory (folder or URI) that raymerge wrote")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for the files (default: RUN/figures)")
    if add_options is not None:
        add_options(parser)
    options = vars(parser.parse_args(argv))
    path, out = options.pop("run"), options.pop("out")
    try:
        if without_run is not None and path is None:
            paths = without_run(out, **options)
        else:
            run = RunDirectory.load(path)
            if out is None and not run.is_local:
                raise RunError(f"{path} is not on this machine; say with --out where the figures should go")
            paths = draw(run, out or Path(run.path_of("figures")), **options)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0
