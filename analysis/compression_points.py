"""The points of a compression curve: those of a run, put together from its tables, and the published ones."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from plotting import grouped, need

from raymerge.tables import MACRO, MICRO, Row, RunDirectory, RunError, turned, way_of

_PUBLISHED = Path(__file__).parent / "published" / "compression.csv"
PUBLISHED_LAYERS = 32  # of the model that the published points are of


class Point(NamedTuple):
    """One row of `sweep` with what was measured of its plan; None where it was not."""

    plan_id: str
    method: str
    alignment: str
    norms: str
    merges: int
    removed: int  # layers
    layers: int  # of the unmerged model
    parameters_removed: float  # share
    micro: Row | None  # row of `accuracy`
    macro: Row | None
    text: Row | None  # row of `perplexity` of plain text
    difference: Row | None  # row of `comparisons`, signed as this plan - drop of the same merges

    @property
    def perplexity(self) -> float | None:
        """Of plain text."""
        return None if self.text is None else self.text["perplexity"]

    @property
    def share(self) -> float:
        """Share of the model's layers removed."""
        return self.removed / self.layers


def swept(run: RunDirectory) -> tuple[list[Row], dict[str, Row], dict[str, Row]]:
    """Rows of `sweep`, each refit a method of its own; by plan, those of `costs` and of `perplexity` of plain text."""
    sweep = [{**row, "method": way_of(row)} for row in need(run, "sweep", "the compression curve")]
    costs = {row["plan_id"]: row for row in need(run, "costs", "the layers that each plan removes")}
    if missing := sorted({row["plan_id"] for row in sweep} - costs.keys()):
        raise RunError(f"{run.path_of()}: table costs lacks plan {missing[0]} and {len(missing) - 1} more of the sweep")
    return sweep, costs, {r["plan_id"]: r for r in run.read("perplexity").to_pylist() if r["target"] == "text"}


def points_of(
    sweep: list[Row],
    accuracy: dict[tuple[str, str], Row],
    costs: dict[str, Row],
    texts: dict[str, Row],
    comparisons: list[Row],
) -> list[Point]:
    """One Point a row of `sweep`, methods in order of appearance, each by merges."""
    drops: dict[int, list[str]] = {}
    for row in sweep:
        if row["method"] == "drop":
            drops.setdefault(row["merges"], []).append(row["plan_id"])
    paired = {}
    for row in comparisons:
        if row["measure"] == "accuracy":
            paired[row["plan_a"], row["plan_b"]] = row
            paired.setdefault((row["plan_b"], row["plan_a"]), turned(row))
    order = {key: i for i, key in enumerate(dict.fromkeys(line_of(row) for row in sweep))}
    points = []
    for row in sorted(sweep, key=lambda row: (order[line_of(row)], row["merges"])):
        plan, cost = row["plan_id"], costs[row["plan_id"]]
        found = [paired[plan, drop] for drop in drops.get(row["merges"], []) if (plan, drop) in paired]
        points.append(
            Point(
                plan,
                *line_of(row),
                row["merges"],
                cost["layers_removed"],
                cost["layers"] + cost["layers_removed"],
                cost["parameters_removed"] / (cost["parameters"] + cost["parameters_removed"]),
                accuracy.get((plan, MICRO)),
                accuracy.get((plan, MACRO)),
                texts.get(plan),
                found[0] if found else None,
            )
        )
    return points


def line_of(row: Row) -> tuple[str, str, str]:
    """(method, alignment, norms): what one line of the figure shows."""
    return row["method"], row["alignment"], row["norms"]


def curves_of(points: list[Point]) -> dict[str, list[Point]]:
    """Label -> the points of one line by layers removed; the unmerged model is no line."""
    curves = grouped((point for point in points if point.removed), lambda point: label_of(*point[1:4]))
    return {label: sorted(mine, key=lambda point: point.removed) for label, mine in curves.items()}


def base_of(points: list[Point]) -> Point | None:
    """The unmerged model's point."""
    return next((point for point in points if not point.removed), None)


def label_of(method: str, alignment: str, norms: str) -> str:
    """The method as tables and page call it, with alignment and norms where they are not "none" and "keep"."""
    parts = [method]
    parts += [f"{alignment} aligned"] if alignment != "none" else []
    parts += [f"norms {norms}"] if norms != "keep" else []
    return ", ".join(parts)


def plan_names(sweep: list[Row]) -> dict[str, str]:
    """plan_id -> "drop, K = 4" of 4 merges, several methods of one plan joined by " = "."""
    names: dict[str, list[str]] = {}
    for row in sweep:
        merges = f", K = {row['merges']}" if row["merges"] else ""
        known = names.setdefault(row["plan_id"], [])
        if (name := label_of(*line_of(row)) + merges) not in known:
            known.append(name)
    return {plan: " = ".join(known) for plan, known in names.items()}


def read_published() -> list[Row]:
    """Rows of published/compression.csv with numbers as numbers."""
    with _PUBLISHED.open(encoding="utf-8", newline="") as file:
        return [
            {
                **row,
                "layers": int(row["layers"]),
                "compression_percent": float(row["compression_percent"]),
                "accuracy": float(row["accuracy"]),
            }
            for row in csv.DictReader(file)
        ]


def is_published_model(run: RunDirectory, costs: dict[str, Row], published: list[Row]) -> bool:
    """Whether the run is plausibly of the model of the published points: it has as many layers, and its path, or a
    folder of it such as the hub's cache, ends in the name; fine-tuned and later ones of the same shape have others."""
    path = str((run.config.get("model") or {}).get("path") or "").lower()
    names = [part.rpartition("--")[2] for part in path.replace("\\", "/").split("/")]
    layers = {row["layers"] + row["layers_removed"] for row in costs.values()}
    return published[0]["model"].lower() in names and layers == {PUBLISHED_LAYERS}


def published_curves(published: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """Method -> (percent of layers removed, accuracy) in order; points that several tables repeat count once."""
    curves: dict[str, dict[int, tuple[float, float]]] = {}
    for row in published:
        curves.setdefault(row["method"], {})[row["layers"]] = row["compression_percent"], row["accuracy"]
    return {method: [mine[layers] for layers in sorted(mine)] for method, mine in curves.items()}
