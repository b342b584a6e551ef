"""The plan to merge by, from what names it: a plan file, an alpha file, or the plan section of a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from raymerge.activations import state_distances
from raymerge.alignment import NEEDS_PROMPTS
from raymerge.checkpoint import Checkpoint
from raymerge.config import Config, PlanConfig
from raymerge.forward import LayerRunner
from raymerge.fusion import check_mergeable
from raymerge.heuristics import best_block, block_scores, similar_block_scores
from raymerge.plan import MergePlan, PlanError, Refit
from raymerge.plan_files import RECORD_FILE, made_for_another, read_plan
from raymerge.plan_prompts import PlanPrompts
from raymerge.plan_section import (
    Similarity,
    allowed_starts,
    alpha_file_of,
    block_name,
    check_selected,
    merges_of,
    similarity_of,
    similarity_warnings,
    starting_plan,
)
from raymerge.progress import Progress, step
from raymerge.refit import check_refittable
from raymerge.storage import Storage, folder_of, located, read_file

MEASURED = ("cosine", "angular")  # values of plan.block that a merge measures itself


def plan_to_merge(
    source: object,
    checkpoint: Checkpoint,
    given: dict[str, Any],
    prompts: PlanPrompts,
    told: Progress,
) -> MergePlan:
    """The plan that `source` names, with the options given beside it; `told` hears what speaks against it.

    source: a path or a plan section; anything else is refused. given: fields of a MergePlan, which a plan file must
    leave open. prompts: read only where a block is chosen on them. Raises PlanError, RefitError, ConfigError (what a
    section or a run names cannot be read).
    """
    if not isinstance(source, str | PathLike | PlanConfig):
        cure = ", such as config.plan" if isinstance(source, Config) else ""
        raise PlanError(
            f"a merge is by a plan file, an alpha file or a plan section, not by a {type(source).__name__}: give one "
            f"of these{cure}"
        )
    if isinstance(source, PlanConfig):
        plan = _of_section(source, checkpoint, given, prompts, told)
        file, about = alpha_file_of(source), None
        path = None if file is None else located(file)
    else:
        path = located(source)
        plan, about = _of_file(path, checkpoint.n_layers, given)
    warnings = [] if path is None else _unlike_record(path, about, checkpoint, plan)
    _check(checkpoint, plan, prompts)
    for warning in warnings:
        told.message(f"Warning: {warning}.")
    return plan


def keys_without_effect(section: PlanConfig) -> list[tuple[str, str]]:
    """Keys of a merge's plan section that were given and change nothing, each with what it goes with. A run's section
    may have them for a sweep, which takes other layers too."""
    by_block, run = section.selection == "block", [key for key in PlanConfig.model_fields if "similarity" in key]
    by_similarity = (
        section.base.startswith("similarity")
        or section.selection == "most_similar"
        or (by_block and section.block == "similarity")
    )
    uses = (
        (["block", "starts", "survivor"], by_block, "plan.selection=block"),
        (["starts"], not isinstance(section.block, int), "a block that is chosen"),
        (["merges"], section.selection != "list", "a selection but list"),
        (["ratio"], section.base == "fixed", "plan.base=fixed"),
        (["beta"], section.base == "similarity_ratio", "plan.base=similarity_ratio"),
        (["alpha_file"], section.base == "file", "plan.base=file"),
        (run, by_similarity, "a base, a selection or a block by similarity"),
        (["ridge", "refit_layers"], section.refit != "none", "plan.refit"),
    )
    given = section.model_fields_set
    return [(key, of) for keys, used, of in uses if not used for key in keys if key in given]


def _check(checkpoint: Checkpoint, plan: MergePlan, prompts: PlanPrompts) -> None:
    """Refuse what a merge cannot carry out before it measures or fits anything. Raises PlanError, RefitError."""
    check_mergeable(checkpoint, plan)
    if plan.alignment == "activations" and not all(kept.unchanged for kept in plan.kept) and prompts.run is None:
        raise PlanError(NEEDS_PROMPTS)
    if plan.refit is not None:
        check_refittable(checkpoint, plan)


def _of_section(
    section: PlanConfig,
    checkpoint: Checkpoint,
    given: dict[str, Any],
    prompts: PlanPrompts,
    told: Progress,
) -> MergePlan:
    by_block = section.selection == "block"
    if section.recompute or (by_block and section.block in ("loss", "search")):
        key = "recompute" if section.recompute else "block"
        other = "false" if section.recompute else f"a layer's number, similarity, {' or '.join(MEASURED)}"
        raise PlanError(
            f"plan.{key} is {str(getattr(section, key)).lower()}, which only a run's workers can do: set plan.{key} to "
            f"{other}, or search or sweep, and then merge by RUN/plans/NAME.json"
        )
    similarity = similarity_of(section, checkpoint)
    for warning in similarity_warnings(section, checkpoint.identity):  # before what takes minutes
        told.message(f"Warning: {warning}.")
    if section.refit != "none":
        given = {"refit": Refit(section.refit, ridge=section.ridge, layers=section.refit_layers)} | given

    def from_layer(first: int | None) -> MergePlan:
        return replace(starting_plan(section, checkpoint.n_layers, similarity, first), **given)

    first = _first_of_block(section, checkpoint, similarity, from_layer, prompts, told) if by_block else None
    plan = from_layer(first)
    check_selected(section, plan)
    return plan


def _first_of_block(
    section: PlanConfig,
    checkpoint: Checkpoint,
    similarity: Similarity | None,
    from_layer: Callable[[int], MergePlan],
    prompts: PlanPrompts,
    told: Progress,
) -> int:
    averages = section.base != "fixed" or section.ratio < 1
    merges = merges_of(section)
    starts = allowed_starts(section, checkpoint.n_layers, merges, checkpoint, averaged=averages)
    if isinstance(section.block, int):
        return starts[0]
    if section.block == "similarity":
        assert similarity is not None  # PlanConfig asks for a similarity run
        scores = similar_block_scores(similarity.matrix, merges)
    else:
        _check(checkpoint, from_layer(starts[0]), prompts)  # what can be refused is before what takes minutes
        shards = prompts.calibration
        with step(told, f"{section.block} distances between layers on the calibration text"):
            runner = LayerRunner(checkpoint)
            parts = [state_distances(runner, shard) for shard in shards]
        distances = [(cosine, angular)[MEASURED.index(section.block)] for cosine, angular, _ in parts]
        scores = block_scores(np.sum(distances, axis=0) / sum(tokens for _, _, tokens in parts), merges)
    first = best_block(scores, starts)
    told.message(f"Block to remove, chosen by {section.block}: {block_name(first, merges)}")
    return first


def _of_file(path: Path | str, n_layers: int, given: dict[str, Any]) -> tuple[MergePlan, dict[str, Any] | None]:
    """The plan of a file with the options given beside it, and what `read_plan` has read. Raises PlanError."""
    plan, record = read_plan(path, n_layers)
    for key, value in given.items():
        own = getattr(plan, key)
        if record is not None and own not in (None, value):
            raise PlanError(f"{path} has a plan with its own {key}, {own}: leave out --{key}")
    return replace(plan, **given), record


def _unlike_record(
    path: Path | str, about: dict[str, Any] | None, checkpoint: Checkpoint, plan: MergePlan
) -> list[str]:
    """What a plan file, or the record beside an alpha file, says against merging by it.

    Either may be of another model. The record may also be of a merge with the alpha file's steps but other options:
    without these the steps make another model than the one that was measured.
    """
    beside = (
        path.parent / RECORD_FILE if isinstance(path, Path) else located(Storage(folder_of(path)[0]).show(RECORD_FILE))
    )
    try:
        record = about or json.loads(read_file(beside).decode("utf-8"))
        another = made_for_another(record, checkpoint.identity)
    except (OSError, ValueError, AttributeError):  # alone, or beside something else of that name
        return []
    if another is not None:
        return [f"{path} {another}"]
    if about is not None:
        return []
    try:
        recorded, _ = read_plan(beside, checkpoint.n_layers)
    except PlanError:
        return []
    if recorded.steps != plan.steps:
        return []
    averages = not all(kept.unchanged for kept in recorded.kept)  # else only a refit makes a difference
    biased = any(name.endswith(".bias") for name in checkpoint.layer_tensors(0))
    matter = {"alignment": averages, "norms": averages, "biases": averages and biased, "matrix_alphas": True}
    differing = [key for key, does in matter.items() if does and getattr(recorded, key) != getattr(plan, key)]
    if _of_any_text(recorded.refit) != _of_any_text(plan.refit):
        differing.append("refit")
    if not differing:
        return []
    return [
        f"{path} has the steps of {beside}, a merge with other {', '.join(differing)}: this is another model; --plan "
        f"{beside} makes that one again"
    ]


def _of_any_text(refit: Refit | None) -> Refit | None:
    """A refit but for the tokens: its text may lie elsewhere now."""
    return None if refit is None else replace(refit, calibration="")
