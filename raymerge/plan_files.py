"""Plan files: a merge plan with all of its options, as a JSON object from which the same model can be made again.

A run has one of every plan that it reports on, plans/NAME.json; merge_plan.json, beside a saved model, is another. An
alpha file (`alpha_files`), the published format, holds the steps alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raymerge.alpha_files import alpha_file_plan, plan_name, read_json
from raymerge.plan import MergePlan, MergeStep, PlanError, Refit
from raymerge.storage import located

RECORD_FILE = "merge_plan.json"  # beside a saved model, the plan that it was merged by

_TEXTS = ("name", "selection", "alignment", "norms", "biases")
#: What a plan file says beside the plan itself, and a saved model's record more than others.
_ABOUT = frozenset(
    "raymerge command plan_id base_model base_model_revision base_model_identity gguf_source towers alphas "
    "layers layers_before layers_after parameters parameters_removed tensors_changed largest_relative_change mergekit "
    "proof receipts".split()
)


def plan_fields(plan: MergePlan) -> dict[str, Any]:
    """What a plan file has of the plan itself."""
    fields: dict[str, Any] = {key: getattr(plan, key) for key in _TEXTS}
    fields["steps"] = [[step.into, step.remove, step.alpha] for step in plan.steps]
    if plan.matrix_alphas:
        fields["matrix_alphas"] = {matrix: list(alphas) for matrix, alphas in plan.matrix_alphas}
    if plan.refit is not None:
        fields["refit"] = asdict(plan.refit)
    return fields


def plan_file_text(plan: MergePlan, base_model: str, base_model_identity: str) -> str:
    """The plan as the text of a plan file of that base."""
    about: dict[str, str | int] = {"plan_id": plan.plan_id(base_model_identity), "base_model": base_model}
    about |= {"base_model_identity": base_model_identity, "layers_before": plan.n_layers}
    return json.dumps(about | plan_fields(plan), indent=2, ensure_ascii=False) + "\n"


def read_plan(path: str | Path, n_layers: int) -> tuple[MergePlan, dict[str, Any] | None]:
    """The plan of a plan file or an alpha file, for a model of so many layers, and what a plan file says beside it;
    None for an alpha file, whose plan has the published options.

    Raises PlanError where the file is neither, is for another number of layers, has a key that no plan file has, holds
    a plan that cannot be carried out, or another one than that of its plan_id.
    """
    path = located(path)
    found = read_json(path, "plan or alpha file")
    if not isinstance(found, dict):
        return alpha_file_plan(found, path, n_layers), None
    unknown = sorted(set(found) - _ABOUT - {*_TEXTS, "steps", "matrix_alphas", "refit"})
    if unknown:
        raise PlanError(f"{path}: unknown keys {', '.join(unknown)}; a plan has {', '.join((*_TEXTS, 'steps'))}, …")
    if (layers := found.get("layers_before", n_layers)) != n_layers:
        raise PlanError(f"{path} is of a model of {layers} layers, this one has {n_layers}: give its own base")
    try:
        plan = _plan_of(found, plan_name(path), n_layers)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    identity, known = found.get("base_model_identity"), found.get("plan_id")
    if known is not None and identity is not None and plan.plan_id(identity) != known:
        raise PlanError(
            f"{path}: the plan is not that of its plan_id, {known}: it was changed since; delete plan_id to have it so"
        )
    return plan, found


def made_for_another(about: dict[str, Any], identity: str) -> str | None:
    """That what a plan file says beside the plan names another base than the model of this identity, if it does."""
    if about.get("base_model_identity", identity) == identity:
        return None
    return f"was made for another model, {about.get('base_model', 'whose name it does not say')}"


def _plan_of(found: dict[str, Any], name: str, n_layers: int) -> MergePlan:
    options: dict[str, Any] = {"name": name, "kind": "file"}
    for key in _TEXTS:
        value = found.get(key, options.get(key, getattr(MergePlan, key, None)))
        if not isinstance(value, str):
            raise PlanError(f"{key} is {value!r}, but must be a text")
        options[key] = value
    steps = found.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, list) and len(step) == 3 for step in steps):
        raise PlanError(f"steps is {steps!r:.200}, but must be a list of [into, remove, alpha], and at least one")
    for layer in (layer for step in steps for layer in step[:2]):
        if type(layer) is not int:
            raise PlanError(f"a step names layer {layer!r}, but must name whole numbers")
    own = found.get("matrix_alphas", {})
    if not isinstance(own, dict) or not all(isinstance(alphas, list) for alphas in own.values()):
        raise PlanError(f"matrix_alphas is {own!r:.200}, but must have a list of alphas for each matrix")
    refit = found.get("refit")
    return MergePlan(
        n_layers,
        tuple(MergeStep(into, remove, _alpha(alpha)) for into, remove, alpha in steps),
        matrix_alphas=tuple((matrix, tuple(map(_alpha, alphas))) for matrix, alphas in own.items()),
        refit=None if refit is None else _refit_of(refit),
        **options,
    )


def _refit_of(found: Any) -> Refit:
    try:
        return Refit(**found)
    except TypeError as error:
        raise PlanError(f"refit is {found!r}, but must have method, ridge, layers and calibration") from error


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise PlanError(f"an alpha is {value!r:.200}, but must be a number in [0, 1]")
    return float(value)
