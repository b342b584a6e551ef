"""What merging changed, tensor by tensor: the receipts."""

from __future__ import annotations

import math
import re
from collections.abc import Container

from raymerge.report import curve, figures
from raymerge.report.asked import figure_of
from raymerge.report.content import ROLES, Notice, Section, role_of
from raymerge.report.reached import Reached, missing
from raymerge.report.wording import finite, listed, percent, plural
from raymerge.schemas import Row
from raymerge.tables import layer_ranges

_TITLE = "Receipts: what was changed"
_EXPERT = re.compile(r"\.experts\.\d+\.")


def receipts(reached: Reached) -> Section:
    """Which tensors every plan changed, and by how much: the proof that a merge is one."""
    run = reached.run
    every = run.read("receipts").to_pylist()
    stored, experts = _largest_of_experts(every)
    touched = {row["plan_id"] for row in stored}
    unchanged = [line["label"] for line in reached.lines if line["kind"] != "base" and line["plan_id"] not in touched]
    silent = (
        f" No tensor changed under {listed(unchanged)}: layers are dropped there, and nothing is averaged."
        if unchanged
        else ""
    )
    if not stored:
        return Section(_TITLE, (Notice(silent.strip()) if silent else missing(run, "receipts"),))
    rows = []
    for row in stored:
        matrix, layer = tensor_name(_EXPERT.sub(".experts.*.", row["tensor"]))
        rows.append(
            {
                "matrix": matrix,
                "layer": layer,
                "plan": reached.labels.get(row["plan_id"], row["plan_id"]),
                "role": role_of(reached.kinds.get(row["plan_id"], "")),
                "relative": finite(row["relative_change"]),
                "largest": finite(row["max_abs_change"]),
                "tensor": row["tensor"],
            }
        )
    rows.sort(key=lambda row: (row["matrix"], -ROLES.index(row["role"])))
    changed = [row for row in rows if row["relative"]]
    names = {row["tensor"] for row in every if finite(row["relative_change"])}
    told = (
        f"Differences in {plural(len(names), 'tensor name')} under "
        f"{plural(len({row['plan'] for row in changed}), 'plan')}, at most "
        f"{percent(max((row['relative'] for row in changed), default=0.0))} of the original's norm.{silent}"
    )
    pooled = " Of a layer's experts the one that changed most is shown; the table has all." if experts else ""
    figure = figure_of(
        run,
        "Change of every tensor that a plan touches",
        "The norm of the difference between a tensor and the original tensor of the same name, divided by the "
        "original's norm. Layers after a dropped layer are renumbered, so their tensors differ from those of the same "
        f"name although nothing changed them.{pooled} {told}",
        [figures.changes(rows, f"Relative change of tensors, one row per matrix. {told}")],
        rows,
        "receipts",
    )
    return Section(_TITLE, (figure,))


def receipts_of_points(reached: Reached) -> Section:
    """The largest change of each point, since a curve has too many tensors to draw."""
    run = reached.run
    points = {point["plan_id"]: point for point in curve.curve(reached)}
    largest: dict[str, Row] = {}
    for row in run.read("receipts").to_pylist():
        known = largest.get(row["plan_id"])
        if row["plan_id"] in points and (known is None or row["relative_change"] > known["relative_change"]):
            largest[row["plan_id"]] = row
    if not largest:
        return Section(_TITLE, (missing(run, "receipts"),))
    rows = [
        {
            "method": point["method"],
            "variant": point["variant"],
            "merges": point["merges"],
            "relative": largest[plan_id]["relative_change"],
            "tensor": _layer_and_matrix(largest[plan_id]["tensor"]),
            "plan": point["plan"],
        }
        for plan_id, point in points.items()
        if plan_id in largest
    ]
    shown = curve.merged([*points.values()])
    still = _still(shown, largest)
    silent = f" Under {', '.join(still)} nothing is averaged and no tensor changes." if still else ""
    view = figures.lines(
        rows,
        f"Largest relative change of a tensor against merged layers.{silent}",
        x=("merges", "layers merged (K)"),
        y=("relative", "change relative to the norm"),
        series="method",
        dash="variant",
        tips=[("plan", "plan"), ("tensor", "tensor"), ("relative", "change", ".1%")],
        form=figures.SHARES,
        order=list(dict.fromkeys(point["method"] for point in shown)),
        height=240,
    )
    figure = figure_of(
        run,
        "Largest change of a tensor, by number of merged layers",
        "The norm of the difference between the merged and the original tensor, divided by the original's norm; the "
        "largest value of each plan. Layers after a dropped layer are renumbered, so their tensors differ from those "
        f"of the same name although nothing changed them.{silent}",
        [view],
        rows,
        "receipts",
        "sweep",
    )
    return Section(_TITLE, (figure,))


def _still(points: list[Row], changed: Container[str]) -> list[str]:
    """The methods whose plans changed no tensor, with the numbers of layers where at others they did: a block that is
    dropped can be the last layers, or others, and then the layers behind it move."""
    found = []
    for method in sorted({point["method"] for point in points}):
        own = [point for point in points if point["method"] == method]
        merges = {point["merges"] for point in own if point["plan_id"] not in changed}
        every = merges == {point["merges"] for point in own}
        found += [method if every else f"{method} (K = {layer_ranges(merges)})"] if merges else []
    return found


def _layer_and_matrix(tensor: str) -> str:
    matrix, layer = tensor_name(tensor)
    return f"layer {layer} {matrix}"


def _largest_of_experts(stored: list[Row]) -> tuple[list[Row], bool]:
    """Rows of `receipts`, of a layer's experts that of the largest change alone, and whether there were others: 128
    experts of 48 layers are 18,432 tensors a plan, and 384 rows of a drawing."""
    largest: dict[tuple[str, str], Row] = {}
    for row in stored:
        key = row["plan_id"], _EXPERT.sub(".experts.*.", row["tensor"])
        known = largest.setdefault(key, row)
        if _change(row) > _change(known):
            largest[key] = row
    return list(largest.values()), len(largest) < len(stored)


def _change(row: Row) -> float:
    """A change that is no number is the largest."""
    return math.inf if math.isnan(row["relative_change"]) else row["relative_change"]


def tensor_name(tensor: str) -> tuple[str, str]:
    """A tensor's name within its layer, and the layer's number as text ("" outside any)."""
    parts = tensor.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return tensor, ""
    return ".".join(parts[at + 1 :]).removesuffix(".weight") or tensor, parts[at]
