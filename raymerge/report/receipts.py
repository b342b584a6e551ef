"""What merging changed, tensor by tensor: the receipts."""

from __future__ import annotations

import math
import re

from raymerge.report import figures
from raymerge.report.asked import figure_of
from raymerge.report.content import ROLES, Notice, Section, role_of
from raymerge.report.reached import Reached, missing
from raymerge.report.wording import finite, listed, percent, plural
from raymerge.schemas import Row

_EXPERT = re.compile(r"\.experts\.\d+\.")


def receipts(reached: Reached) -> Section:
    """Which tensors every plan changed, and by how much: the proof that a merge is one."""
    run, title = reached.run, "Receipts: what was changed"
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
        return Section(title, (Notice(silent.strip()) if silent else missing(run, "receipts"),))
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
    return Section(title, (figure,))


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
