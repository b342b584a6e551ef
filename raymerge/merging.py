"""Merge a model by a plan and save it: an ordinary checkpoint, with the plan, receipts and a model card beside it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import raymerge
from raymerge import rows
from raymerge.alignment import Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.config import CalibrationConfig
from raymerge.forward import LayerRunner
from raymerge.fusion import Refits, check_mergeable, fused_tensors, receipts
from raymerge.identity import digest
from raymerge.plan import KeptLayer, MergePlan, PlanError, Refit, alpha_file_text, read_alpha_file
from raymerge.prompts import encode_text
from raymerge.refit import Refitter, check_refittable


def merge(
    model: str,
    alpha_file: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    alignment: str = "none",
    norms: str = "keep",
    biases: str = "keep",
    refit: Refit | None = None,
    calibration: str | Path | None = None,
    cache_folder: str | Path | None = None,
) -> dict[str, Any]:
    """Merge a model by an alpha file and save it as an ordinary Hugging Face checkpoint; what was done, in figures.

    alignment, norms, biases: as a MergePlan has them; the published way by default. refit: how the seams are fitted on
    the plain text in file `calibration`, the first tokens of it; its own `calibration` is filled in here. cache_folder:
    where permutations and fits are kept for another merge of the same model.
    """
    if Path(out).exists():
        raise PlanError(f"{out} exists already: give another --out, or delete it")
    checkpoint = Checkpoint(model, revision=revision)
    plan = read_alpha_file(alpha_file, checkpoint.n_layers)
    plan = replace(plan, alignment=alignment, norms=norms, biases=biases)
    check_mergeable(checkpoint, plan)
    aligner = Aligner(checkpoint, cache_folder)
    if refit is None:
        return save_merged(checkpoint, plan, Path(out), aligner=aligner)
    with tempfile.TemporaryDirectory() as scratch:
        plan, refits = _refitted(checkpoint, plan, refit, calibration, aligner, cache_folder or scratch)
        return save_merged(checkpoint, plan, Path(out), aligner=aligner, refits=refits)


def _refitted(
    checkpoint: Checkpoint,
    plan: MergePlan,
    refit: Refit,
    calibration: str | Path | None,
    aligner: Aligner,
    cache: str | Path,
) -> tuple[MergePlan, Refits]:
    """The plan with its refit on the calibration text, and what gives its tensors. Raises PlanError, RefitError."""
    if calibration is None:
        raise PlanError(f"refit {refit.method} needs a plain text to fit on: give --calibration")
    try:
        text = Path(calibration).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"calibration {calibration} cannot be read as UTF-8 text: {error}") from error
    shards = encode_text(text, checkpoint.tokenizer, limit=CalibrationConfig().tokens)
    plan = replace(plan, refit=replace(refit, calibration=digest([shard.identity for shard in shards])))
    check_refittable(checkpoint, plan)
    return plan, Refitter(LayerRunner(checkpoint, aligner=aligner), cache, lambda: shards).tensors


def save_merged(
    checkpoint: Checkpoint,
    plan: MergePlan,
    folder: Path,
    *,
    aligner: Aligner | None = None,
    refits: Refits | None = None,
) -> dict[str, Any]:
    """Write the merged checkpoint with alphas.json, merge_plan.json (plan, receipts) and a model card."""
    aligner = aligner or Aligner(checkpoint)  # one for both passes, so that nothing is matched twice
    architecture = checkpoint.architecture
    found = receipts(checkpoint, architecture, plan, aligner=aligner, refits=refits)
    plan_id = plan.plan_id(checkpoint.identity)
    cost = rows.cost_row(plan, plan_id, checkpoint)
    changed = [receipt for receipt in found if receipt.max_abs_change > 0.0]
    record = {
        "raymerge": raymerge.__version__,
        "plan_id": plan_id,
        "name": plan.name,
        "base_model_identity": checkpoint.identity,
        "selection": plan.selection,
        "alignment": plan.alignment,
        "norms": plan.norms,
        "biases": plan.biases,
        "alphas": plan.alphas,
        "layers": [_layer_record(kept) for kept in plan.kept],
        "layers_before": plan.n_layers,
        "layers_after": len(plan.kept),
        "parameters_removed": cost["parameters_removed"],
        "tensors_changed": len(changed),
        "largest_relative_change": max((receipt.relative_change for receipt in changed), default=0.0),
        "receipts": [rows.receipt_rows(plan_id, [receipt])[0] for receipt in found],
    }
    if plan.refit is not None:
        record["refit"] = asdict(plan.refit)
    if plan.matrix_alphas:
        record["matrix_alphas"] = dict(plan.matrix_alphas)
    written = checkpoint.save(
        fused_tensors(checkpoint, architecture, plan, aligner=aligner, refits=refits),
        [kept.index for kept in plan.kept],
        folder,
        extra_files={
            "merge_plan.json": json.dumps(record, indent=2) + "\n",
            "alphas.json": alpha_file_text(plan.steps),
            "README.md": _model_card(checkpoint, plan, record),
        },
    )
    return record | {"bytes": written, "folder": str(folder)}


def _layer_record(kept: KeptLayer) -> dict[str, Any]:
    record: dict[str, Any] = {"kept": kept.index, "coefficients": dict(kept.coefficients)}
    if kept.matrices:
        record["matrices"] = {matrix: dict(coefficients) for matrix, coefficients in kept.matrices}
    return record


def _model_card(checkpoint: Checkpoint, plan: MergePlan, record: dict[str, Any]) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "tags: [layer-merging, raymerge]",
        "---",
        f"# {checkpoint.directory.name}, {record['layers_before'] - record['layers_after']} layers merged away",
        "",
        f"Made by raymerge {record['raymerge']} from a model with identity `{record['base_model_identity']}`: "
        f"{record['layers_before']} decoder layers became {record['layers_after']} "
        f"(plan `{record['plan_id']}`, {plan.name}; norms {plan.norms}, biases {plan.biases}, "
        f"alignment {plan.alignment}).",
        "",
        f"{record['tensors_changed']} tensors differ from those of the layer that they are named after; "
        "`merge_plan.json` lists by how much, and the effective coefficient of every original layer.",
        "",
        "| step | into | removed | alpha |",
        "|---:|---:|---:|---:|",
        *(f"| {number} | {s.into} | {s.remove} | {s.alpha:.6f} |" for number, s in enumerate(plan.steps)),
        "",
        *(
            [
                "Some matrices have alphas of their own, which `alphas.json` cannot hold: `merge_plan.json` does.",
                "",
            ]
            if plan.matrix_alphas
            else []
        ),
        "Merging layers costs quality: measure it with `raymerge evaluate` before use.",
    ]
    return "\n".join(lines) + "\n"
