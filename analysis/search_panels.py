"""What alphas.py shows of a search: which alphas its candidates had, what they were worth, and what its best one is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from plotting import COLOURS, GREY, grouped, markdown, number, save, spread, style_of

from raymerge.tables import Row, RunDirectory, above_ceiling, is_minimised, rank, wilson_interval, without_far_worse

_ABOVE = "above ceiling"


def candidates_of(run: RunDirectory, trials: list[Row]) -> tuple[dict[str, list[Row]], list[Row]]:
    """Searcher -> its candidates in order, and the controls; those above the search's ceiling have no value."""
    tried = sorted(held_to(run, trials), key=lambda row: row["iteration"])
    searchers = grouped(tried, lambda row: row["searcher"])
    controls = searchers.pop("controls", [])
    return searchers, controls


def held_to(run: RunDirectory, trials: list[Row]) -> list[Row]:
    """The trials, those above the search's ceiling of perplexity without a value: theirs is a penalty."""
    ceiling = run.config.get("search", {}).get("perplexity_ceiling")
    return [
        row | {"value": None, "status": _ABOVE} if row["status"] == "ok" and above_ceiling(row, ceiling) else row
        for row in trials
    ]


def usable(rows: list[Row]) -> list[Row]:
    """The trials that gave a finite value."""
    return [row for row in rows if row["status"] == "ok" and row["value"] is not None and math.isfinite(row["value"])]


def without_value(rows: list[Row]) -> str:
    """What is said of those trials that gave no value."""
    return "failed or above the ceiling" if any(row["status"] == _ABOVE for row in rows) else "failed"


def best_of(rows: list[Row]) -> Row | None:
    """The best usable trial, by what the search ranks them by."""
    return max(usable(rows), key=rank, default=None)


def interval_of(row: Row) -> str | None:
    """The 95 % interval (Wilson's) of a trial's micro accuracy as text; None for other objectives."""
    if row["objective"] != "micro_accuracy":
        return None
    low, high = wilson_interval(round(row["value"] * row["n_questions"]), row["n_questions"])
    return f"of {row['n_questions']:,} questions {row['value']:.3f} has a 95 % interval of {low:.3f} to {high:.3f}"


def standard_error(row: Row) -> float | None:
    """Binomial standard error of a trial's micro accuracy; None for other objectives, which need the answers."""
    if row["objective"] != "micro_accuracy" or row["n_questions"] < 2:
        return None
    return math.sqrt(row["value"] * (1 - row["value"]) / (row["n_questions"] - 1))


def draw_distribution(searchers: dict[str, list[Row]], path: Path) -> Path:
    """Histogram of all alphas tried with the best candidate's as ticks, and the same by step, coloured by value."""
    shown = {name: usable(rows) for name, rows in searchers.items() if usable(rows)}
    figure, axes = plt.subplots(
        1, 1 + len(shown), figsize=(4.0 + 4.4 * len(shown), 3.9), width_ratios=[1] + [1.15] * len(shown), squeeze=False
    )
    draw_histograms(axes[0, 0], shown)
    values = [row["value"] for rows in shown.values() for row in rows]
    objective = next(iter(shown.values()))[0]["objective"]
    lower = is_minimised(objective)
    kept = without_far_worse(values, lower=lower)
    scale = Normalize(min(kept), max(kept))  # one scale, so that colours compare between searchers
    rng = np.random.default_rng(0)
    for axis, (name, rows) in zip(axes[0, 1:], shown.items(), strict=True):
        dots = draw_tried(axis, rows, scale, rng)
        if name.endswith("per_matrix"):
            axis.set(xlabel="merge step, then each matrix's own", title=f"α tried ({name})")
        else:
            axis.set(xlabel="merge step", title=f"α tried at each step ({name})")
    (handles, names), (ring, its) = (axis.get_legend_handles_labels() for axis in axes[0, :2])
    columns = min(len(names + its), 1 + len(shown))
    figure.legend(handles + ring, names + its, loc="outside lower center", ncols=columns, fontsize=8)
    beyond = "neither" if len(kept) == len(values) else "max" if lower else "min"
    label = f"{objective} ({'lower' if lower else 'higher'} is better)"
    figure.colorbar(dots, ax=axes[0, -1], label=label, fraction=0.05, pad=0.02, extend=beyond)
    figure.draw_without_rendering()  # lay out twice: the bar's ticks change with its size, and its label was cut off
    return save(figure, path)


def draw_histograms(axis: Axes, shown: dict[str, list[Row]]) -> None:
    """The shares of all alphas that each searcher tried, its best candidate's as ticks below; shown: usable trials."""
    bins = np.linspace(0, 1, 26).tolist()
    for i, (name, rows) in enumerate(shown.items()):
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        alphas, best = np.concatenate([row["alphas"] for row in rows]), max(rows, key=rank)["alphas"]
        axis.hist(
            alphas,
            bins=bins,
            weights=np.full(alphas.size, 100 / alphas.size),
            histtype="step",
            lw=1.6,
            color=colour,
            label=f"{name}: all {len(rows)} tried (mean {alphas.mean():.2f})",
        )
        axis.plot(
            best,
            np.full(len(best), -(0.03 + 0.045 * i)),
            "|",
            ms=9,
            mew=1.6,
            color=colour,
            clip_on=False,
            transform=axis.get_xaxis_transform(),
            label=f"{name}: best (mean {np.mean(best):.2f})",
        )
    axis.tick_params(axis="x", pad=6 + 8 * len(shown))
    axis.set(xlim=(0, 1), xlabel="α", ylabel=f"share of alphas (% per bin of {bins[1]:.2f})", title="Distribution of α")


def draw_tried(axis: Axes, rows: list[Row], scale: Normalize, rng: np.random.Generator) -> PathCollection:
    """One searcher's alphas by step, coloured by their candidate's value on `scale`, the best candidate's ringed;
    rows: usable trials. Returns what a colour bar is of."""
    lower = is_minimised(rows[0]["objective"])
    rows = sorted(rows, key=lambda row: row["value"], reverse=lower)  # the better on top
    x = np.concatenate([np.arange(len(row["alphas"])) for row in rows])
    dots = axis.scatter(
        x + rng.uniform(-0.25, 0.25, size=x.size),
        np.concatenate([row["alphas"] for row in rows]),
        c=np.concatenate([np.full(len(row["alphas"]), row["value"]) for row in rows]),
        cmap="cividis_r" if lower else "cividis",
        norm=scale,
        s=11,
        lw=0,
    )
    best = max(rows, key=rank)["alphas"]
    axis.plot(range(len(best)), best, "o", ms=8, mfc="none", mec="#D55E00", mew=1.6, label="best candidate")
    axis.set(ylim=(-0.03, 1.03), ylabel="α")
    axis.set_xticks(range(0, x.max() + 1, math.ceil((x.max() + 1) / 16)))
    return dots


def draw_progress(searchers: dict[str, list[Row]], controls: list[Row], labels: dict[str, str], path: Path) -> Path:
    """Value of every candidate, running best of each searcher, controls as labelled lines."""
    every = usable([row for rows in searchers.values() for row in rows])
    objective = every[0]["objective"]
    lower = is_minimised(objective)
    figure, axis = plt.subplots(figsize=(7.6, 4.7))
    for i, (name, rows) in enumerate(searchers.items()):
        if usable(rows):
            draw_running_best(axis, name, rows, style_of(i + 1))
    last = max(row["iteration"] for row in every) + 1
    axis.set_xlim(0, last + 1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    levels = sorted(
        {
            (row["value"], labels[row["plan_id"]])
            for row in usable(controls)
            if row["objective"] == objective and row["plan_id"] in labels  # of those that keep one layer only the best
        }
    )
    values = [row["value"] for row in every]
    kept = without_far_worse(values, lower=lower)
    shown = [*kept, *(value for value, _ in levels)]
    room = 0.06 * (max(shown) - min(shown) or abs(max(shown)) or 1)
    low, high = min(shown) - room, max(shown) + room
    axis.set_ylim(low, high)
    far = sum(not low <= value <= high for value in values)  # none where a control is as bad
    weighed = "+" in objective or "*" in objective  # a sum of shares is none
    unit = " (nats)" if lower else "" if weighed else " (share of questions)"
    axis.set(
        xlabel="candidates evaluated",
        ylabel=f"{objective}{unit}, {'lower' if lower else 'higher'} is better",
        title="Search progress (marks: single candidates; dashed: controls"
        + (f"; {far} far worse not shown)" if far else ")"),
    )
    draw_levels(axis, levels, last + 1)
    note = interval_of(max(every, key=rank))  # the axis shows what lies within it many times enlarged
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, title=note, title_fontsize=8)
    return save(figure, path)


def draw_running_best(axis: Axes, name: str, rows: list[Row], look: dict[str, Any]) -> None:
    """One searcher's values as marks and the best so far as a line; how many candidates gave none stands in its
    label."""
    ok = usable(rows)
    values = np.array([row["value"] for row in ok])
    x = np.array([row["iteration"] for row in ok]) + 1
    running = np.minimum.accumulate(values) if is_minimised(ok[0]["objective"]) else np.maximum.accumulate(values)
    failed = len(rows) - len(ok)
    tried = f"{len(ok)} candidate" + ("s" if len(ok) > 1 else "")
    axis.plot(x, values, ls="none", marker=look["marker"], ms=4, color=look["color"], alpha=0.45, mew=0)
    axis.step(
        [*x, x[-1]],
        [*running, running[-1]],
        where="post",
        **look,
        ms=4,
        markevery=[len(x)],  # its mark in the legend, and something to see of a single candidate
        lw=1.8,
        label=f"{name}, running best ({tried}{f', {failed} {without_value(rows)}' if failed else ''})",
    )


def draw_levels(axis: Axes, levels: list[tuple[float, str]], right: float) -> None:
    """Controls (value, label), ascending: dashed lines, labelled beside the axis, which ends at `right`."""
    low, high = axis.get_ylim()
    heights = spread([value for value, _ in levels], 0.042 * (high - low))
    for (value, name), y in zip(levels, heights, strict=True):
        axis.axhline(value, color=GREY, ls=(0, (4, 3)), lw=0.9, zorder=1)
        axis.annotate(
            f"{name}  {value:.3f}",
            xy=(right, value),
            xytext=(1.035, (y - low) / (high - low)),
            textcoords="axes fraction",
            fontsize=7.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 1, "shrinkB": 0},
        )
    axis.set_ylim(low, high)


def describe_search(searchers: dict[str, list[Row]], labels: dict[str, str]) -> list[str]:
    """The sections of alphas.md on the search: each searcher's best candidate, and the alphas that it tried."""
    summary, spreads = [], []
    for name, rows in searchers.items():
        ok, best = usable(rows), best_of(rows)
        if best is None:
            continue
        summary.append(
            [
                name,
                best["objective"],
                len(rows),
                len(rows) - len(ok),
                best["n_questions"],
                number(best["value"], 4),
                number(standard_error(best), 4),
                number(best["accuracy"], 4),
                number(best["nll"], 4),
                best["iteration"] + 1,
                labels.get(best["plan_id"]),
            ]
        )
        for what, alphas in (("all tried", [a for row in ok for a in row["alphas"]]), ("best", best["alphas"])):
            quartiles = np.percentile(alphas, [0, 25, 50, 75, 100])
            spreads.append(
                [
                    f"{name}, {what}",
                    len(alphas),
                    number(float(np.mean(alphas))),
                    number(float(np.std(alphas))),
                    *[number(q) for q in quartiles],
                ]
            )
    if not summary:
        return []
    every = [row for rows in searchers.values() for row in rows]
    header = ["searcher", "objective", "candidates", without_value(every),
              "questions", "best value", "± s.e.", "accuracy", "NLL", "found at candidate", "plan"]  # fmt: skip
    return [
        "## Search",
        markdown(header, summary),
        "The best value is the best of many noisy ones on the search questions, so it is too good; "
        "judge by the report split (accuracy.md).",
        "## Distribution of α",
        markdown(["α of", "values", "mean", "sd", "min", "25 %", "median", "75 %", "max"], spreads),
    ]
