"""What compression.py shows of table context: loss by position in the window, and retrieval by distance."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from plotting import BASE, DOTTED, curve_style, interval_bars, markdown, save, style_of, with_interval

from raymerge.tables import CHANCE, Row, wilson_interval

_FEW = 10  # plans that the figure can tell apart
_TITLES = {
    "position_nll": "Mean NLL (nats per token) of plain text by position in the window. A column starts at its "
    "position and ends before the next.",
    "retrieval": "Accuracy on synthetic key-value prompts by distance in tokens, with 95 % intervals; chance is "
    f"{CHANCE}.",
}


def draw_context(context: list[Row], names: dict[str, str], sweep: list[Row], path: Path) -> Path:
    """NLL by position and retrieval by distance; the unmerged model, and the plans of one number of merges if many."""
    shown = few_plans(context, sweep)
    panels = [measure for measure in ("position_nll", "retrieval") if any(row["measure"] == measure for row in context)]
    figure, axes = plt.subplots(1, len(panels), figsize=(1.6 + 5.2 * len(panels), 4.6), squeeze=False)
    base = {row["plan_id"] for row in sweep if not row["merges"]}
    for axis, measure in zip(axes[0], panels, strict=True):
        buckets = sorted({row["bucket"] for row in context if row["measure"] == measure})
        for i, plan in enumerate(shown):
            mine = [row for row in context if (row["plan_id"], row["measure"]) == (plan, measure)]
            mine.sort(key=lambda row: row["bucket"])
            shares = measure == "retrieval"  # which have intervals, whose bars are not to cover each other
            shift = 0.05 * (i - (len(shown) - 1) / 2) if shares else 0.0
            error = interval_bars([row | limits_of(row) for row in mine], "value") if shares else None
            look = style_of(0) if plan in base else curve_style(i - len(base.intersection(shown[:i])))
            axis.errorbar(
                [buckets.index(row["bucket"]) + shift for row in mine], [row["value"] for row in mine],
                yerr=error, **look, ms=4.5, lw=1.1, elinewidth=0.8,
                label=BASE if plan in base else names.get(plan, plan),
            )  # fmt: skip
        every = range(0, len(buckets), math.ceil(len(buckets) / 12))
        axis.set_xticks(every, [f"{buckets[i]:,}" for i in every])
        if measure == "position_nll":
            axis.set(xlabel="position in the window (first of the bucket)", ylabel="NLL (nats per token)",
                     title="Plain text by position")  # fmt: skip
        else:
            axis.axhline(CHANCE, **DOTTED, label="chance of retrieval")
            axis.set(xlabel="distance of the key (tokens)", ylabel="accuracy", ylim=(-0.03, 1.03),
                     title="Retrieval by distance (bars: 95 % intervals)")  # fmt: skip
    handles: dict[str, Artist] = {}
    for axis in axes[0]:
        for artist, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, artist)
    n = len({row["plan_id"] for row in context})
    note = f"{len(shown)} of the {n} plans measured; compression.md has all" if len(shown) < n else None
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, title=note, title_fontsize=8
    )
    return save(figure, path)


def few_plans(context: list[Row], sweep: list[Row]) -> list[str]:
    """Plans to draw: all if few, else the unmerged model and those of one number of merges.

    That number is the middle one of those that most plans have; if it still has too many plans, those with neither
    alignment nor folded norms.
    """
    there = list(dict.fromkeys(row["plan_id"] for row in context))
    if len(there) <= _FEW:
        return there
    merges: dict[int, dict[str, bool]] = {}  # merges -> {plan: whether it is plain}
    for row in sweep:
        if row["plan_id"] in there:
            plain = (row["alignment"], row["norms"]) == ("none", "keep")
            merges.setdefault(row["merges"], {}).setdefault(row["plan_id"], plain)
    base = list(merges.pop(0, {}))[:1]
    most = max(map(len, merges.values()), default=0)
    widest = sorted(number_ for number_, mine in merges.items() if len(mine) == most)
    mine = merges[widest[len(widest) // 2]] if widest else {}
    chosen = [plan for plan, plain in mine.items() if plain or len(mine) + len(base) <= _FEW]
    return [*base, *chosen][:_FEW] or there[:_FEW]


def describe_context(context: list[Row], names: dict[str, str]) -> list[str]:
    """The context section of compression.md."""
    text = ["## Context"]
    for measure in dict.fromkeys(row["measure"] for row in context):
        mine = [row for row in context if row["measure"] == measure]
        buckets = sorted({row["bucket"] for row in mine})
        cells = {(row["plan_id"], row["bucket"]): row for row in mine}
        rows = []
        there = {row["plan_id"] for row in mine}
        for plan in [*(plan for plan in names if plan in there), *sorted(there - names.keys())]:
            line = [cells.get((plan, bucket)) for bucket in buckets]
            rows.append(
                [names.get(plan, plan), *[cell and with_interval(cell | limits_of(cell), "value") for cell in line]]
            )
        text += [f"### {measure}\n\n{_TITLES.get(measure, '')}".rstrip(), markdown(["plan", *buckets], rows)]
    return text


def limits_of(row: Row) -> dict[str, float]:
    """ci_low and ci_high (Wilson's, 95 %) of an accuracy of `context`; none of a loss, whose mean alone is stored."""
    if row["measure"] != "retrieval":
        return {}
    low, high = wilson_interval(round(row["value"] * row["n"]), row["n"])
    return {"ci_low": low, "ci_high": high}
