"""Draw the merge coefficients of a run, or of alpha files, as figures and as tables.

    python analysis/alphas.py RUN [--out DIR] [--similarity RUN [--subset NAME[/LANGUAGE]]]
    python analysis/alphas.py --files FILE.json… --out DIR [--similarity RUN [--subset NAME[/LANGUAGE]]]

Reads tables plans, coefficients, trials and gradient_history, and draws those of which there are rows. --similarity
names a run of `raymerge similarity`; without it the one that the run itself took its coefficients from is used.

  alphas.png              alpha of every merge step (thin: of single matrices, where they have their own), and the
                          weight each original layer ends up with (of up to 24 layers with numbers)
  alpha_distribution.png  all alphas the search tried, beside the best candidate's
  search_progress.png     objective by candidate, running best, controls as horizontal lines; of a share of questions
                          the 95 % interval of the best
  learned_alphas.png      the published figure, a row for each method that was found, or whose alphas differ from step
                          to step and are not computed from a similarity: their distribution with its mean, alpha by
                          merge step, alpha against the merged layers' similarity (where there is one) with Pearson's r
  gradient_history.png    loss and held-out loss by epoch, the alphas of the best start
  alphas.md               the same as tables
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from alpha_panels import (
    MOST_METHODS,
    NO_INTERVAL,
    correlation,
    draw_history,
    draw_methods,
    history_rows,
    pairs_of,
    read_alpha_files,
    read_similarity,
)
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from plotting import STYLE, entry, ink, markdown, need, number, run_main, save, save_text, style_of
from search_panels import candidates_of, describe_search, draw_distribution, draw_progress, usable

from raymerge.tables import Row, RunDirectory, RunError, descended, plan_labels


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_main(draw, __doc__, argv, add_options, draw_files)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The script's own options."""
    parser.add_argument("--files", metavar="FILE", nargs="+", type=Path, help="alpha files to draw in place of a run")
    parser.add_argument("--similarity", metavar="RUN", help="a similarity run, to draw alphas against")
    parser.add_argument("--subset", metavar="NAME[/LANGUAGE]", help="which of its matrices, where it has several")


def draw_files(
    out: Path | None, *, files: list[Path] | None, similarity: str | None = None, subset: str | None = None
) -> list[Path]:
    """Write alphas.png, learned_alphas.png and alphas.md of alpha files into `out`. RunError for what is no alpha
    file."""
    if not files or out is None:
        raise RunError("name a RUN, or alpha files with --files FILE.json… and their folder with --out DIR")
    plans, coefficients = read_alpha_files(files)
    labels, known = plan_labels(plans, []), None if similarity is None else read_similarity(similarity, subset)
    methods = {label_of(key, labels): rows for key, rows in steps_of(plans).items()}
    with plt.rc_context(STYLE):
        paths = [draw_plans(plans, coefficients, labels, out / "alphas.png")]
        paths.append(draw_methods(methods, known, out / "learned_alphas.png"))
    text = ["# Merge coefficients of alpha files", *describe_plans(plans, coefficients, labels)]
    text += describe_methods(methods, known)
    return [*paths, save_text(text, out / "alphas.md")]


def draw(
    run: RunDirectory,
    out: Path,
    *,
    files: list[Path] | None = None,
    similarity: str | None = None,
    subset: str | None = None,
) -> list[Path]:
    """Write the figures and alphas.md into `out`; return their paths. RunError if plans are missing."""
    if files:
        raise RunError("give a RUN or --files, not both")
    plans = need(run, "plans", "the alphas")
    coefficients = need(run, "coefficients", "the effective weight of each layer")
    every = run.read("trials").to_pylist()
    searchers, controls = candidates_of(run, every)
    history = run.read("gradient_history").to_pylist()
    labels = plan_labels(plans, every)
    known = similarity_of(run, similarity, subset)
    methods = learned(run, plans, labels)
    with plt.rc_context(STYLE):
        paths = [draw_plans(plans, coefficients, labels, out / "alphas.png")]
        if any(usable(rows) for rows in searchers.values()):
            paths.append(draw_distribution(searchers, out / "alpha_distribution.png"))
            paths.append(draw_progress(searchers, controls, labels, out / "search_progress.png"))
        if methods:
            paths.append(draw_methods(methods, known, out / "learned_alphas.png"))
        if history:
            paths.append(draw_history(history, out / "gradient_history.png", loss_of(run)))
    text = [f"# Merge coefficients of run {run.run_id} ({run.experiment})"]
    text += describe_plans(plans, coefficients, labels) + describe_search(searchers, labels)
    text += describe_methods(methods, known)
    if history:
        header = ["start", "epochs", "first loss", "last loss", "lowest held-out loss", "at epoch"]
        text += ["## Gradient descent", markdown(header, history_rows(history))]
    paths.append(save_text(text, out / "alphas.md"))
    return paths


def loss_of(run: RunDirectory) -> str:
    """What the descents of a run minimise; "" where its configuration does not say."""
    objective = (run.config.get("search") or {}).get("objective")
    return descended(objective, (run.config.get("gradient") or {}).get("text_kl", 0.0)) if objective else ""


def similarity_of(run: RunDirectory, path: str | None, subset: str | None) -> dict[tuple[int, int], float] | None:
    """The similarity that is asked for, or the one that the run's coefficients come from, where it can be read."""
    if path is not None:
        return read_similarity(path, subset)
    plan = run.config.get("plan", {})
    if plan.get("similarity_run") is None:
        return None
    try:
        return read_similarity(plan["similarity_run"], plan.get("similarity_subset"), plan.get("similarity_language"))
    except RunError:  # moved, or of another machine: the run's own figures are drawn without it
        return None


def learned(run: RunDirectory, plans: list[Row], labels: dict[str, str]) -> dict[str, list[Row]]:
    """Name -> steps of the plans that were found, first, and of those whose alphas are not the same at every step, and
    after them those that single matrices have of their own, which would fill the figure; those computed from a
    similarity, whose correlation with it says nothing, are left out."""
    best = {row["plan_id"] for row in plans if row["kind"] in _FOUND}  # whatever else they are called, as a control
    computed = {row["plan_id"] for row in plans if computed_from_similarity(run, row)}
    found = {
        key: rows
        for key, rows in steps_of(plans).items()
        if key[0] not in computed and (key[0] in best or np.ptp([row["alpha"] for row in rows]) > 1e-9)
    }
    order = sorted(found, key=lambda key: (key[1] is not None, key[0] not in best))
    return {label_of(key, labels): found[key] for key in order}


def computed_from_similarity(run: RunDirectory, row: Row) -> bool:
    """Whether a plan's alphas, where they differ, are a function of a similarity matrix (or of a shuffled one): in a
    search its start and the start's variants, in a sweep those of methods whose pairs or alphas come from one."""
    if run.experiment == "search" and run.config.get("plan", {}).get("base") == "file":
        return False  # named as the user's file is
    return row["kind"] == "file" and row["name"].startswith(("similarity", "most_similar", "merge_block"))


def describe_methods(methods: dict[str, list[Row]], similarity: dict[tuple[int, int], float] | None) -> list[str]:
    """Mean and spread of each method's alphas, and their correlation with the similarity of the layers merged."""
    if not methods:
        return []
    header = ["method", "steps", "mean", "sd", "min", "max"]
    table = []
    for name, rows in methods.items():
        alphas = [row["alpha"] for row in rows]
        cells = [np.mean(alphas), np.std(alphas), min(alphas), max(alphas)]
        table.append([name, len(alphas), *[number(value) for value in cells]])
        if similarity is not None:
            x, y = pairs_of(rows, similarity)
            table[-1] += [number(correlation(x, y)), len(x)]
    text = ["## α of each method"]
    if similarity is not None:
        header += ["Pearson's r with similarity", "pairs"]
        text.append(NO_INTERVAL)
    text.append(markdown(header, table))
    if len(methods) > MOST_METHODS:
        text.append(f"The figure shows the first {MOST_METHODS}.")
    return text


_FOUND = ("found", "gradient")  # kinds of plans


def steps_of(plans: list[Row]) -> dict[tuple[str, str | None], list[Row]]:
    """(plan_id, matrix) -> its steps in order, for plans that have steps; each plan once, whatever its names."""
    found: dict[tuple[str, str | None], dict[int, Row]] = {}
    for row in plans:
        if row["step"] is not None:
            found.setdefault((row["plan_id"], row["matrix"]), {})[row["step"]] = row
    return {key: [steps[step] for step in sorted(steps)] for key, steps in found.items()}


def label_of(key: tuple[str, str | None], labels: dict[str, str]) -> str:
    """Name of a plan, with the matrix where a plan's coefficients depend on it."""
    plan_id, matrix = key
    return labels.get(plan_id, plan_id) + (f" · {matrix}" if matrix else "")


def weights_of(
    plans: list[Row], coefficients: list[Row]
) -> tuple[dict[tuple[str, str | None], dict[int, float]], list[int]]:
    """(plan, matrix) -> {original layer: weight in the layer that keeps it}, and the layers that any plan merges.

    A layer that a plan merges and that has no row weighs 0, also one that others are merged into with alpha 0; one
    that it leaves alone weighs 1.
    """
    merged = sorted({row[side] for row in plans if row["step"] is not None for side in ("into", "remove")})
    weights: dict[tuple[str, str | None], dict[int, float]] = {}
    for key, steps in steps_of(plans).items():
        touched = {row[side] for row in steps for side in ("into", "remove")}
        weights[key] = {layer: 0.0 if layer in touched else 1.0 for layer in merged}
        for row in coefficients:
            if (row["plan_id"], row["matrix"]) == key and row["source_layer"] in touched:
                weights[key][row["source_layer"]] = row["coefficient"]
    return weights, merged


_NUMBERED = 24  # layers whose weights stand in the cells; 41 made a figure of 5,365 pixels in width


def draw_plans(plans: list[Row], coefficients: list[Row], labels: dict[str, str], path: Path) -> Path:
    """Alphas by merge step as lines, effective weights by original layer as a heat map: with numbers beside the lines,
    or of many layers without, below them."""
    steps = steps_of(plans)
    weights, layers = weights_of(plans, coefficients)
    n = max(1, len(steps))
    steps_wide = 2.2 + 0.27 * max([row["step"] for rows in steps.values() for row in rows], default=0)
    longest = 0.08 * max((len(label_of(key, labels)) for key in steps), default=0)  # inches, at the labels' size
    left_width, right_width = max(4.2, steps_wide), max(4.2, 0.48 * len(layers) + 1.6) + longest
    width, height = left_width + right_width, max(3.6, 0.34 * n + 1.6)
    if len(layers) <= _NUMBERED:
        figure, (left, right) = plt.subplots(1, 2, figsize=(width, height), width_ratios=[left_width, right_width])
    else:
        width, heights = max(left_width, 8.0 + longest), [3.6, 0.22 * n + 1.2]
        figure, (left, right) = plt.subplots(2, 1, figsize=(width, sum(heights)), height_ratios=heights)
    draw_steps(left, steps, labels)
    columns = max(1, int(width / (longest + 0.7)))
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(n, columns), fontsize=8)
    draw_weights(right, weights, layers, [label_of(key, labels) for key in weights])
    return save(figure, path)


def draw_steps(axis: Axes, steps: dict[tuple[str, str | None], list[Row]], labels: dict[str, str]) -> None:
    """Alphas by merge step, a line a plan, thin ones for single matrices."""
    ends = sorted({(row["step"], row["remove"], row["into"]) for rows in steps.values() for row in rows})
    shared = len({step for step, _, _ in ends}) == len(ends)  # every plan merges the same layers at a step
    own = list(dict.fromkeys(plan_id for plan_id, _ in steps))
    title = "α by merge step" + (" (thin: single matrices)" if any(matrix for _, matrix in steps) else "")
    for (plan_id, matrix), rows in steps.items():
        i = own.index(plan_id)
        shift = 0.30 * (i - (len(own) - 1) / 2) / len(own)  # equal plans stay apart
        x = [row["step"] + shift for row in rows]
        look: dict[str, Any] = {"ms": 4.5, "lw": 1, "label": entry(label_of((plan_id, None), labels))}
        if matrix is not None:
            look = {"ms": 0, "lw": 0.6, "alpha": 0.5, "label": None if (plan_id, None) in steps else look["label"]}
        axis.plot(x, [row["alpha"] for row in rows], **style_of(i), **look)
    axis.set(ylim=(-0.04, 1.04), ylabel="α (weight of the layer merged into)", title=title)
    if shared and ends:
        stride = math.ceil(len(ends) / 20)
        names = [f"{step}: {remove}→{into}" for step, remove, into in ends[::stride]]
        axis.set_xticks([e[0] for e in ends[::stride]], names, fontsize=7.5, rotation=90 if len(names) > 5 else 0)
        axis.set_xlabel("merge step: layer removed → layer it merges into")
    else:
        axis.set_xlabel("merge step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_weights(
    axis: Axes, weights: dict[tuple[str, str | None], dict[int, float]], layers: list[int], names: list[str]
) -> None:
    """The weight that each original layer ends up with, a row a plan; names: of the rows."""
    grid = np.array([[row[layer] for layer in layers] for row in weights.values()]).reshape(len(weights), len(layers))
    image = axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(grid) if len(layers) <= _NUMBERED else ():
        text = "0" if value == 0 else "1" if value == 1 else "<.001" if value < 0.0005 else f"{value:.3f}".lstrip("0")
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=ink(image, value))
    stride = math.ceil(len(layers) / _NUMBERED)
    axis.set_xticks(range(0, len(layers), stride), [str(layer) for layer in layers[::stride]])
    axis.set_yticks(range(len(weights)), names)
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="original decoder layer", title="Effective coefficient of each original layer")
    bar = axis.figure.colorbar(image, ax=axis, label="weight", fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)


def describe_plans(plans: list[Row], coefficients: list[Row], labels: dict[str, str]) -> list[str]:
    """Alphas by merge step and effective coefficients of every plan."""
    steps = steps_of(plans)
    text = [
        "Step s merges a layer into another: θ = α θ(into) + (1 - α) θ(removed). Layers count from 0. "
        "The effective coefficient is the weight an original layer ends up with."
    ]
    if steps:
        ends = sorted({(row["step"], row["remove"], row["into"]) for rows in steps.values() for row in rows})
        values = {key: {(r["step"], r["remove"], r["into"]): r["alpha"] for r in rows} for key, rows in steps.items()}
        names = [label_of(key, labels) for key in steps]
        table = [
            [f"{step}", f"{remove} → {into}", *[number(values[key].get((step, remove, into)), 4) for key in steps]]
            for step, remove, into in ends
        ]
        text += ["## α by merge step", markdown(["step", "layers", *names], table)]
        weights, layers = weights_of(plans, coefficients)
        rows = [[layer, *[number(weights[key][layer], 4) for key in weights]] for layer in layers]
        text += ["## Effective coefficients", markdown(["original layer", *names], rows)]
    bare = [labels[row["plan_id"]] for row in plans if row["step"] is None]
    if bare:
        text.append(f"Without merge steps: {', '.join(dict.fromkeys(bare))}.")
    return text


if __name__ == "__main__":
    sys.exit(main())
