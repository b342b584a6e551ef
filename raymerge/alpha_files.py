"""Alpha files: the steps of a merge plan in the JSON format that published merge coefficients come in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from raymerge.plan import SURVIVORS, MergePlan, MergeStep, PlanError, block_pairs, block_starts, tail_pairs
from raymerge.storage import RunError, folder_of, located, read_file

_REQUIRED = ("layer_to_merge_into", "layer_to_remove", "ratio_i_alpha")
_ALLOWED = frozenset(("step", "ratio_j", *_REQUIRED))


def read_alpha_file(path: str | Path, n_layers: int) -> MergePlan:
    """Read the published alpha file format: a JSON list of
    {"step", "layer_to_merge_into", "layer_to_remove", "ratio_i_alpha"[, "ratio_j"]}.

    The order in the file counts and `step` is only informative (the published base file numbers them -18 to -6).
    Raises PlanError where the file is not of that form, an alpha lies outside [0, 1], or the layers do not chain.
    """
    path = located(path)
    return alpha_file_plan(read_json(path, "alpha file"), path, n_layers)


def read_json(path: Path | str, what: str) -> object:
    """What a JSON file, a `storage.located` one, holds; PlanError, which says what it should be, where there is none,
    RunError where a URI cannot be reached."""
    try:
        return json.loads(read_file(path).decode("utf-8"))
    except FileNotFoundError:
        raise PlanError(f"there is no {what} {path}") from None
    except RunError:  # a ValueError too
        raise
    except (IsADirectoryError, NotADirectoryError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not a JSON {what}: {error}") from error


def plan_name(path: Path | str) -> str:
    """What a plan is called after its file, a `storage.located` one."""
    return Path(folder_of(path)[1]).stem


def alpha_file_plan(entries: object, path: Path | str, n_layers: int) -> MergePlan:
    """The plan of what an alpha file holds; see `read_alpha_file`."""
    if not isinstance(entries, list) or not entries:
        raise PlanError(f"{path} must hold a JSON list of merge steps, and at least one")
    steps = [_read_step(entry, f"{path}, entry {number}") for number, entry in enumerate(entries)]
    try:
        selection = _selection(n_layers, steps)
        return MergePlan(n_layers, tuple(steps), name=plan_name(path), kind="file", selection=selection)
    except PlanError as error:
        deeper = any(max(step.into, step.remove) >= n_layers for step in steps)
        hint = "; the file is for a deeper model, as a merged model's own alphas.json is for its base" if deeper else ""
        raise PlanError(f"{path}: {error}{hint}") from error


def _selection(n_layers: int, steps: Sequence[MergeStep]) -> str:
    """What the steps are: those of a tail merge, of another block, or any list."""
    pairs, merges = [(step.into, step.remove) for step in steps], len(steps)
    first = min(step.remove for step in steps)
    if merges >= n_layers:
        return "list"
    if pairs == tail_pairs(n_layers, merges):
        return "tail"
    blocks = [side for side in SURVIVORS if first in block_starts(n_layers, merges, side)]
    return "block" if pairs in [block_pairs(n_layers, first, merges, side) for side in blocks] else "list"


def _read_step(entry: object, where: str) -> MergeStep:
    if not isinstance(entry, dict):
        raise PlanError(f"{where} is {entry!r}: each entry must be an object with {', '.join(_REQUIRED)}")
    unknown, missing = sorted(set(entry) - _ALLOWED), [key for key in _REQUIRED if key not in entry]
    if unknown or missing:
        raise PlanError(f"{where}: unknown keys {unknown}, missing keys {missing}; the keys are {sorted(_ALLOWED)}")
    for key in ("layer_to_merge_into", "layer_to_remove"):
        if type(entry[key]) is not int:
            raise PlanError(f"{where}: {key} is {entry[key]!r}, but must be a whole number")
    for key in ("ratio_i_alpha", "ratio_j"):
        if key in entry and (isinstance(entry[key], bool) or not isinstance(entry[key], int | float)):
            raise PlanError(f"{where}: {key} is {entry[key]!r}, but must be a number")
        if isinstance(entry.get(key), int) and not 0 <= entry[key] <= 1:  # of any length, which no float may hold
            raise PlanError(f"{where}: {key} is {entry[key]}, but must lie in [0, 1]")
    alpha = float(entry["ratio_i_alpha"])
    if "ratio_j" in entry and not math.isclose(entry["ratio_j"], 1.0 - alpha, abs_tol=1e-6):
        raise PlanError(f"{where}: ratio_j is {entry['ratio_j']}, but 1 - ratio_i_alpha is {1.0 - alpha}")
    return MergeStep(entry["layer_to_merge_into"], entry["layer_to_remove"], alpha)


def alpha_file_text(steps: Iterable[MergeStep]) -> str:
    """The steps as the text of an alpha file; `read_alpha_file` gives back the same float64 values."""
    entries = [
        {
            "step": number,
            "layer_to_merge_into": step.into,
            "layer_to_remove": step.remove,
            "ratio_i_alpha": step.alpha,
            "ratio_j": 1.0 - step.alpha,
        }
        for number, step in enumerate(steps)
    ]
    return json.dumps(entries, indent=2) + "\n"
