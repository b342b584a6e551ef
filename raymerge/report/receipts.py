"""What merging changed, tensor by tensor: the receipts."""

from __future__ import annotations

from raymerge.report import figures
from raymerge.report.asked import figure_of
from raymerge.report.content import ROLES, Notice, Section, role_of
from raymerge.report.reached import Reached, missing
from raymerge.report.wording import finite, listed, percent, plural


def receipts(reached: Reached) -> Section:
    """Which tensors every plan changed, and by how much: the proof that a merge is one."""
    run, title = reached.run, "Receipts: what was changed"
    stored = run.read("receipts").to_pylist()
    unchanged = [
        line["label"]
        for line in reached.lines
        if line["kind"] != "base" and line["plan_id"] not in {row["plan_id"] for row in stored}
    ]
    silent = (
        f" No tensor changed under {listed(unchanged)}: layers are left out there, and nothing is averaged."
        if unchanged
        else ""
    )
    if not stored:
        return Section(title, (Notice(silent.strip()) if silent else missing(run, "receipts"),))
    rows = []
    for row in stored:
        matrix, layer = tensor_name(row["tensor"])
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
    told = (
        f"{plural(len({row['tensor'] for row in changed}), 'tensor name')} with a difference under "
        f"{plural(len({row['plan'] for row in changed}), 'plan')}, of at most "
        f"{percent(max((row['relative'] for row in changed), default=0.0))} of the original's norm.{silent}"
    )
    figure = figure_of(
        run,
        "Change of every tensor that a plan touches",
        "The norm of the difference between a tensor and the original's of the same name, over the latter's. Behind "
        f"layers that are left out the others have new numbers, and so differ though they are whole. {told}",
        [figures.changes(rows, f"Relative change of tensors, a row for each matrix. {told}")],
        rows,
        "receipts",
    )
    return Section(title, (figure,))


def tensor_name(tensor: str) -> tuple[str, str]:
    """A tensor's name within its layer, and the layer's number as text ("" outside any)."""
    parts = tensor.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return tensor, ""
    return ".".join(parts[at + 1 :]).removesuffix(".weight") or tensor, parts[at]
