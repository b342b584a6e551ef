"""Draw how much the similarity matrix and its plans depend on the method's settings: sensitivity.png, sensitivity.md.

    python analysis/sensitivity.py RUN [--out DIR]

Reads table sensitivity: one row varies one parameter and compares with the reference setting.

  sensitivity.png  agreement of the matrices off the diagonal, share of the same layer pairs chosen for merging, and
                   largest difference of a merge coefficient; one line a setting, one mark a subset (more than 12:
                   marks alike, and their median)
  sensitivity.md   the same as tables
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from plotting import GREY, STYLE, entry, markdown, need, number, run_main, save, save_text, style_of, subset_name

from raymerge.tables import Row, RunDirectory

_PANELS = {
    "pearson_off_diagonal": "Agreement of the matrices\n(off-diagonal Pearson)",
    "plan_overlap": "Same pairs chosen\n(share of the merges)",
    "alpha_max_difference": "Coefficients\n(largest difference of an α)",
}


_LINES = 12  # subsets told apart by their marks; of more a legend leaves the panels no room

#: The parameter of the row that compares the reference with itself: it says only whether it can be computed.
_REFERENCE = "reference"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_main(draw, __doc__, argv)


def draw(run: RunDirectory, out: Path) -> list[Path]:
    """Write the figure and sensitivity.md into `out`; return their paths. RunError if there are no rows."""
    rows = need(run, "sensitivity", "the dependence on settings")
    settings = run.config.get("similarity") or {}
    varied = [
        {**row, "reference": row["reference"] or row["setting"] == str(settings.get(row["parameter"]))}
        for row in rows
        if row["parameter"] != _REFERENCE
    ]
    paths = []
    if varied:
        with plt.rc_context(STYLE):
            paths.append(draw_settings(varied, out / "sensitivity.png"))
    text = [f"# Sensitivity of layer similarity in run {run.run_id} ({run.experiment})"]
    notes = [f"- {subset_name(row)}: {row['note']}" for row in rows if row["parameter"] == _REFERENCE and row["note"]]
    text += ["The reference setting itself:\n\n" + "\n".join(notes)] if notes else []
    return [*paths, save_text([*text, *describe(varied)], out / "sensitivity.md")]


def settings_of(rows: list[Row]) -> dict[str, list[str]]:
    """Parameter -> its settings, numbers in order, else in order of appearance."""
    found: dict[str, list[str]] = {}
    for row in rows:
        known = found.setdefault(row["parameter"], [])
        if row["setting"] not in known:
            known.append(row["setting"])
    for known in found.values():
        known.sort(key=lambda setting: (amount(setting) is None, amount(setting) or 0.0))
    return found


def amount(setting: str) -> float | None:
    """The number a setting is, None for words."""
    try:
        return float(setting)
    except ValueError:
        return None


def draw_settings(rows: list[Row], path: Path) -> Path:
    """Lines are settings grouped by parameter, panels what is compared, marks subsets."""
    names = list(dict.fromkeys(subset_name(row) for row in rows))
    lines, labels, heads, y = {}, [], [], 0.0
    references = {(row["parameter"], row["setting"]) for row in rows if row["reference"]}
    for parameter, settings in settings_of(rows).items():
        heads.append((y, parameter))
        y += 1
        for setting in settings:
            lines[parameter, setting] = y
            labels.append(setting + ("  (reference)" if (parameter, setting) in references else ""))
            y += 1
        y += 0.4
    panels = [column for column in _PANELS if any(row[column] is not None for row in rows)] or list(_PANELS)[:1]
    figure, axes = plt.subplots(
        1, len(panels), sharey=True, squeeze=False, figsize=(2.3 + 3.1 * len(panels), max(3.0, 0.21 * y + 1.7))
    )
    gap = 0.5 / max(1, len(names) - 1)
    for axis, column in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            shift = gap * (i - (len(names) - 1) / 2)  # equal values stay apart
            mine = [row for row in rows if subset_name(row) == name and row[column] is not None]
            heights = [lines[row["parameter"], row["setting"]] + shift for row in mine]
            values = [row[column] for row in mine]
            if len(names) <= _LINES:
                style = style_of(i) | {"ms": 4.5, "alpha": 0.85, "label": entry(name)}
            else:
                style = style_of(1) | {"ms": 3, "alpha": 0.5, "label": None if i else f"one of {len(names)} subsets"}
            axis.plot(values, heights, ls="none", mew=0, **style)
        axis.set_title(_PANELS[column], fontsize=9)
        for (parameter, setting), at in lines.items():
            mine = [row for row in rows if (row["parameter"], row["setting"]) == (parameter, setting)]
            absent = sum(row[column] is None for row in mine)
            if len(names) > _LINES and absent < len(mine):
                median = np.median([row[column] for row in mine if row[column] is not None])
                axis.plot(median, at, ls="none", marker="|", ms=11, mew=1.6, color="black", label="median")
            trivial = parameter == "threshold" and column == "alpha_max_difference"  # it changes the pairs alone
            if absent and not trivial and (parameter, setting) not in references:
                text = "undefined" if absent == len(mine) else f"{absent} of {len(mine)}\nundefined"
                axis.text(1.01, at, text, transform=axis.get_yaxis_transform(), fontsize=6.5, color="#5B5B5B",
                          va="center", ha="left", linespacing=0.9)  # fmt: skip
        for at, _ in heads[1:]:
            axis.axhline(at - 0.7, color="#9A9A9A", lw=0.7)
    first = axes[0, 0]
    first.set_yticks(list(lines.values()), labels, fontsize=8)
    first.set_ylim(y - 0.6, -0.7)
    for at, parameter in heads:
        first.annotate(parameter.replace("_", " "), (0, at), xycoords=("axes fraction", "data"), xytext=(-4, 0),
                       textcoords="offset points", ha="right", va="center", fontsize=8.5, fontweight="bold",
                       annotation_clip=False)  # fmt: skip
    for axis, column in zip(axes[0], panels, strict=True):
        if column != "alpha_max_difference":
            axis.set_xlim(right=1.04)
            axis.axvline(1, color=GREY, lw=0.8, ls=":")
        else:
            axis.axvline(0, color=GREY, lw=0.8, ls=":")
    handles, texts = first.get_legend_handles_labels()
    shown = dict(zip(texts, handles, strict=True))  # each once
    room = figure.get_figwidth() / (0.5 + 0.075 * max(map(len, shown)))  # a column in inches, at this font size
    columns = max(1, min(6, len(shown), int(room)))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns, fontsize=8)
    return save(figure, path)


def describe(rows: list[Row]) -> list[str]:
    """The sections of sensitivity.md: means over subsets, then every row."""
    columns = ("pearson", "pearson_off_diagonal", "plan_overlap", "alpha_max_difference")
    summary = []
    for parameter, settings in settings_of(rows).items():
        for setting in settings:
            mine = [row for row in rows if (row["parameter"], row["setting"]) == (parameter, setting)]
            means = []
            for column in columns:
                values = [row[column] for row in mine if row[column] is not None]
                worst = max if column == "alpha_max_difference" else np.mean
                means.append(number(worst(values), 3) if values else None)
            undefined = sum(row["pearson_off_diagonal"] is None for row in mine)
            reference = "reference" if any(row["reference"] for row in mine) else ""
            summary.append([parameter, setting, reference, *means, undefined])
    header = ["parameter", "setting", "", "Pearson", "off-diagonal", "plan overlap", "largest α difference",
              "undefined"]  # fmt: skip
    text = [
        "Each setting is compared with the reference. Plan overlap is the share of layer pairs chosen by "
        "`most_similar` that are the same; the α are those of `similarity_ratio`. Values are means over subsets, "
        "except the largest α difference, which is the maximum.",
        markdown(header, summary),
    ]
    every = [
        [subset_name(row), row["parameter"], row["setting"], *[number(row[column]) for column in columns], row["note"]]
        for row in rows
    ]
    header = ["subset", "parameter", "setting", "Pearson", "off-diagonal", "plan overlap", "largest α difference",
              "note"]  # fmt: skip
    return [*text, "## Every subset", markdown(header, every)]


if __name__ == "__main__":
    sys.exit(main())
