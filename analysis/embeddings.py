"""Draw the samples as each layer embeds them: embeddings.png.

    python analysis/embeddings.py RUN [--out DIR] [--layers 0,5,10]

Reads tables embeddings, samples and degeneracy; the last two may be empty. One line of panels a subset, coloured by
the samples' subject, or by MMLU's category where a subset has more than eight subjects. Each panel has its own
scale: only the arrangement means something. A run with several embeddings gets one figure each, embeddings-NAME.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from plotting import GREY, STYLE, grouped, need, run_main, save, style_of, subset_name

from raymerge.tables import CATEGORY_OF, Row, RunDirectory, RunError

_LAYERS, _SUBJECTS = 6, 8  # shown by default; told apart by colour


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--layers", metavar="I,J,…", help="layers to show (default: six, evenly spaced)")

    return run_main(draw, __doc__, argv, add_options)


def draw(run: RunDirectory, out: Path, layers: str | None = None) -> list[Path]:
    """Write the figures into `out`; return their paths. RunError if there are no embeddings, or not of these layers."""
    rows = need(run, "embeddings", "maps of the samples")
    shown = chosen_layers(sorted({row["layer"] for row in rows}), layers)
    groups = groups_of(run.read("samples").to_pylist())
    ranks = {(subset_name(row), row["layer"]): row for row in run.read("degeneracy").to_pylist()}
    embeddings = grouped((row for row in rows if row["layer"] in shown), lambda row: row["embedding"])
    paths = []
    with plt.rc_context(STYLE):
        for embedding, mine in embeddings.items():
            name = "embeddings.png" if len(embeddings) == 1 else f"embeddings-{embedding}.png"
            paths.append(draw_maps(mine, embedding, shown, groups, ranks, out / name))
    return paths


def chosen_layers(there: list[int], asked: str | None) -> list[int]:
    """The layers asked for as "0,5,10", else six evenly spaced ones with the first and the last."""
    if asked is None:
        at = np.linspace(0, len(there) - 1, min(_LAYERS, len(there))).round().astype(int)
        return [there[i] for i in at]
    try:
        layers = list(dict.fromkeys(int(word) for word in asked.split(",")))
    except ValueError:
        raise RunError(f"--layers is {asked!r}, but should be whole numbers with commas, such as 0,5,10") from None
    if missing := [str(layer) for layer in layers if layer not in there]:
        raise RunError(f"--layers: no embeddings of layer {', '.join(missing)}; there are {there[0]} to {there[-1]}")
    return layers


def groups_of(samples: list[Row]) -> dict[str, dict[int, str]]:
    """Subset -> {sample: what its colour stands for}; empty without samples."""
    subjects: dict[str, dict[int, str]] = {}
    for row in samples:
        subjects.setdefault(subset_name(row), {})[row["sample"]] = row["subject"]
    return {
        name: {
            sample: subject.replace("_", " ")
            if len(set(mine.values())) <= _SUBJECTS
            else CATEGORY_OF.get(subject, "other").removeprefix("mmlu_").replace("_", " ")
            for sample, subject in mine.items()
        }
        for name, mine in subjects.items()
    }


def points_of(rows: list[Row]) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """(subset, layer) -> sample numbers (N,) and their first two coordinates (N, 2), 0 where there is only one."""
    cells: dict[tuple[str, int], dict[int, list[float]]] = {}
    for row in rows:
        if row["coordinate"] < 2:
            point = cells.setdefault((subset_name(row), row["layer"]), {}).setdefault(row["sample"], [0.0, 0.0])
            point[row["coordinate"]] = row["value"]
    return {key: (np.array(list(mine)), np.array(list(mine.values()))) for key, mine in cells.items()}


def draw_maps(
    rows: list[Row],
    embedding: str,
    layers: list[int],
    groups: dict[str, dict[int, str]],
    ranks: dict[tuple[str, int], Row],
    path: Path,
) -> Path:
    """One row of panels a subset, one column a layer; a legend at the end of each row."""
    points = points_of(rows)
    names = list(dict.fromkeys(name for name, _ in points))
    figure, axes = plt.subplots(
        len(names), len(layers), squeeze=False, figsize=(1.75 * len(layers) + 2.6, 1.95 * len(names) + 0.7)
    )
    for line, name in zip(axes, names, strict=True):
        mine = groups.get(name, {})
        everyone = {int(sample) for key, (samples, _) in points.items() if key[0] == name for sample in samples}
        kinds = sorted({mine.get(sample, "unknown") for sample in everyone}) if mine else [""]
        for axis, layer in zip(line, layers, strict=True):
            axis.grid(False)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(True)
            axis.spines[:].set_color("#BBBBBB")
            if (name, layer) not in points:
                axis.text(0.5, 0.5, "not stored", transform=axis.transAxes, ha="center", fontsize=8, color=GREY)
                continue
            samples, xy = points[name, layer]
            kind = np.array([mine.get(int(sample), "unknown" if mine else "") for sample in samples])
            for i, value in enumerate(kinds):
                axis.plot(
                    *xy[kind == value].T, ls="none", **style_of(i + bool(mine)), ms=3.8, mew=0, alpha=0.85, label=value
                )
            rank = ranks.get((name, layer))
            note = "" if rank is None else f"effective rank {rank['effective_rank']:.1f} of {len(samples)}"
            axis.set_title(f"layer {layer}", fontsize=8.5)
            axis.set_xlabel(note, fontsize=7, color="#555555")
            axis.margins(0.08)
        line[0].set_ylabel(name, fontsize=9, fontweight="bold")
        if mine:
            shown = next(axis for axis in line if axis.get_legend_handles_labels()[0])
            line[-1].legend(
                *shown.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.03, 0.5), fontsize=7.5
            )
    figure.suptitle(f"Samples as embedded by each layer ({embedding}); each panel has its own scale", fontweight="bold")
    return save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
