"""Merge a model by a plan and save it: an ordinary checkpoint, with the plan, receipts and a model card beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import raymerge
from raymerge import hub, rows
from raymerge.alignment import Aligner
from raymerge.alpha_files import alpha_file_text
from raymerge.card import model_card
from raymerge.checkpoint import Checkpoint
from raymerge.config import CalibrationConfig, PlanConfig
from raymerge.forward import LayerRunner
from raymerge.fusion import Refits, fused_tensors, receipts
from raymerge.identity import without_folders, without_secrets
from raymerge.mergekit import NotExpressible, mergekit_yaml
from raymerge.plan import KeptLayer, MergePlan, PlanError, Refit
from raymerge.plan_files import RECORD_FILE, plan_fields
from raymerge.plan_prompts import PlanPrompts
from raymerge.plan_source import MEASURED, plan_to_merge
from raymerge.progress import Progress, Silent, step
from raymerge.proof import check_proof, proof_finished, prove
from raymerge.refit import Refitter
from raymerge.saving import check_room, check_writable, save_checkpoint
from raymerge.storage import Storage, clear_scratch, scratch_folder


def merge(
    model: str | Path,
    source: str | Path | PlanConfig,
    out: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    alignment: str | None = None,
    norms: str | None = None,
    biases: str | None = None,
    refit: Refit | None = None,
    calibration: str | Path | CalibrationConfig | None = None,
    cache_folder: str | Path | None = None,
    verify: bool = True,
    push: str | None = None,
    private: bool = True,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge a model and save it as an ordinary Hugging Face checkpoint; what was done, in figures.

    source: what the model is merged by: a plan file or an alpha file (`plan_files`), or the plan section of a
    configuration. revision: of a hub model. trust_remote_code: run the model repository's own Python. alignment, norms,
    biases: as a MergePlan has them, for an alpha file, which has none of them (the published way by default), or in
    place of the section's. refit: how the seams are fitted, if the source does not say so; its own `calibration` is
    filled in here. calibration: a plain text (`texts`), or a calibration section that names one, on whose first tokens
    seams are fitted, and blocks chosen where the section's `block` is cosine or angular; a plan file that lies in a run
    has the run's, if none is given. cache_folder: where permutations and fits are kept for another merge of the same
    model. verify: prove the saved model (see `save_merged`). push: a hub repository, OWNER/NAME, to upload it to when
    it is saved and proved; private or public. command: what the card says that made it, of which folders outside the
    working directory are left out.
    Beside what fails in reading and merging, raises ProofError and HubError; the saved model stays.
    """
    out = Path(out).expanduser()
    unproved = _unproved_record(out) if verify else None
    if out.exists() and unproved is None:
        raise PlanError(f"{out} exists already: give another --out, or delete it")
    check_writable(out)
    checkpoint = Checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    if push is not None:
        hub.check_push(push, private=private)
    told = progress or Silent()
    if isinstance(calibration, str | Path):
        calibration = CalibrationConfig(text=str(calibration))
    elif calibration is not None and calibration.text is None:
        calibration = None
    prompts = PlanPrompts(checkpoint, source, calibration)
    options = {"alignment": alignment, "norms": norms, "biases": biases, "refit": refit}
    given = {name: value for name, value in options.items() if value is not None}
    plan = plan_to_merge(source, checkpoint, given, prompts, told)
    chosen = isinstance(source, PlanConfig) and source.selection == "block" and source.block in MEASURED
    if calibration is not None and plan.refit is None and not chosen:
        raise PlanError(
            "--calibration is of a refit, or of a block chosen by cosine or angular distance, but neither is asked "
            "for: the model would be the same without it"
        )
    plan = _fitted_on_prompts(plan, source, prompts, told)
    if unproved is None:  # before fits, which take minutes
        check_room(checkpoint, [kept.index for kept in plan.kept], out)
    elif unproved["plan_id"] != plan.plan_id(checkpoint.identity):
        raise PlanError(f"{out} exists already, of another merge: give another --out, or delete it")
    with _matches_and_fits(checkpoint, plan, prompts, cache_folder, told) as (aligner, refits):
        if unproved is None:
            record = save_merged(
                checkpoint, plan, out, aligner=aligner, refits=refits, verify=verify, command=command, progress=told
            )
        else:
            clear_scratch(out)
            _prove(checkpoint, plan, out, unproved, aligner=aligner, refits=refits, progress=told)
            written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            record = unproved | {"bytes": written, "folder": str(out)}
    if push is None:
        return record | {"pushed": None}
    with step(told, "pushing to the hub"):
        return record | {"pushed": hub.push(out, push, private=private)}


def _unproved_record(out: Path) -> dict[str, Any] | None:
    """The record of a model that an earlier call saved in `out` and did not prove, most often because it was ended;
    None where there is none."""
    if not (out / RECORD_FILE).is_file() or saved_proof(out) is not None:
        return None
    return saved_record(out)


def _fitted_on_prompts(plan: MergePlan, source: object, prompts: PlanPrompts, told: Progress) -> MergePlan:
    """The plan with the identity of the tokens that its seams are fitted on here, where it has a refit."""
    if plan.refit is None:
        return plan
    tokens = prompts.calibration_identity
    if plan.refit.calibration not in ("", tokens):
        told.message(f"Warning: {source} has a refit on other tokens than these of {prompts.calibration_name}.")
    return replace(plan, refit=replace(plan.refit, calibration=tokens))


@contextmanager
def _matches_and_fits(
    checkpoint: Checkpoint, plan: MergePlan, prompts: PlanPrompts, folder: str | Path | None, told: Progress
) -> Iterator[tuple[Aligner, Refits | None]]:
    """Where a merge takes permutations and, once they are made here, fitted tensors from.

    folder: where they are kept; by default what needs one has a temporary one, which is gone when this ends.
    """
    computes = plan.refit is not None or plan.alignment == "activations"
    with scratch_folder() if computes and folder is None else nullcontext(folder) as cache:
        aligner = prompts.aligner(plan, cache)
        if plan.refit is None:
            yield aligner, None
            return
        assert cache is not None  # since it computes
        runner = LayerRunner(checkpoint, dtype=prompts.dtype, aligner=aligner)
        refitter = Refitter(runner, cache, lambda: prompts.calibration)
        with step(told, f"refit ({plan.refit.method}) on the calibration tokens"):
            refitter.fit(plan)
        yield aligner, refitter.tensors


def save_merged(
    checkpoint: Checkpoint,
    plan: MergePlan,
    folder: Path,
    *,
    aligner: Aligner | None = None,
    refits: Refits | None = None,
    verify: bool = True,
    command: Sequence[str] | None = None,
    results: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the merged checkpoint with alphas.json, merge_plan.json (plan, receipts, proof), a model card and, where
    mergekit has terms for the plan, mergekit.yaml; the record, with the folder and its weights' bytes.

    verify: reload the saved model in a fresh process, compare its logits with the plan's and let it generate (`proof`).
    One that does not pass stays, with the finding in its record, and ProofError is raised.
    command, results (lines of markdown): what the card says of how the model was made, and of what it reaches.
    """
    aligner = aligner or Aligner(checkpoint)  # one for both passes, so that nothing is matched twice
    architecture = checkpoint.architecture
    progress = progress or Silent()
    check_room(checkpoint, [kept.index for kept in plan.kept], folder)  # before receipts, which take minutes
    with step(progress, "receipts of the merge"):
        found = receipts(checkpoint, architecture, plan, aligner=aligner, refits=refits)
    with step(progress, "hashing the model's files"):
        plan_id = plan.plan_id(checkpoint.identity)
    record = _record(checkpoint, plan, rows.receipt_rows(plan_id, found), command)
    extra = {"alphas.json": alpha_file_text(plan.steps)}
    try:
        extra["mergekit.yaml"] = mergekit_yaml(checkpoint, plan)
    except NotExpressible as error:
        record["mergekit"] = str(error)
    layers = sum(len(checkpoint.layer_tensors(layer)) for layer in range(plan.n_layers))
    total = len(checkpoint) - layers + sum(len(checkpoint.layer_tensors(kept.index)) for kept in plan.kept)
    written = save_checkpoint(
        checkpoint,
        _counted(fused_tensors(checkpoint, architecture, plan, aligner=aligner, refits=refits), total, progress),
        [kept.index for kept in plan.kept],
        folder,
        extra_files=extra | _described(checkpoint, record, results),
    )
    if verify:
        _prove(checkpoint, plan, folder, record, results, aligner=aligner, refits=refits, progress=progress)
    return record | {"bytes": written, "folder": str(folder)}


def _prove(
    checkpoint: Checkpoint,
    plan: MergePlan,
    folder: Path,
    record: dict[str, Any],
    results: Sequence[str] = (),
    *,
    aligner: Aligner,
    refits: Refits | None,
    progress: Progress,
) -> None:
    """Prove the model saved in `folder`, and write what was found into its record and its files."""
    with step(progress, "proof: the saved model, loaded in a fresh process"):
        record["proof"] = prove(checkpoint, plan, folder, aligner=aligner, refits=refits)
    for name, text in _described(checkpoint, record, results).items():
        Storage(folder).publish(name, text.encode())
    check_proof(record["proof"], folder)


def _counted(tensors: Iterator[tuple[str, Tensor]], total: int, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, counted as they are taken."""
    progress.stage("saving the merged model (tensors)", total)
    for done, tensor in enumerate(tensors, 1):
        yield tensor
        progress.advance(done)


def saved_record(folder: Path) -> dict[str, Any]:
    """What `save_merged` wrote beside a model saved earlier; PlanError where it cannot be read."""
    path = folder / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "plan_id" not in record:
            raise ValueError("it names no plan")
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read: {error}; delete {folder}, and the model is saved again") from error
    return record


def saved_proof(folder: Path) -> dict[str, Any] | None:
    """The proof of a model saved earlier, None where it had none or its reloading was ended; ProofError where it did
    not pass."""
    proof = saved_record(folder).get("proof")
    if proof is None or not proof_finished(proof):
        return None
    check_proof(proof, folder)
    return proof


def _record(
    checkpoint: Checkpoint, plan: MergePlan, found: list[dict[str, Any]], command: Sequence[str] | None
) -> dict[str, Any]:
    plan_id = plan.plan_id(checkpoint.identity)
    cost = rows.cost_row(plan, plan_id, checkpoint)
    changed = [receipt for receipt in found if receipt["max_abs_change"] > 0.0]
    return {
        "raymerge": raymerge.__version__,
        # The folder is published as it lies: it says what the files were called, not where they lay.
        "command": None if command is None else without_folders(without_secrets(list(command))),
        "plan_id": plan_id,
        "base_model": checkpoint.public_name,
        "base_model_revision": checkpoint.revision,
        "base_model_identity": checkpoint.identity,
        "gguf_source": checkpoint.source,
        "towers": _towers_record(checkpoint),
        **plan_fields(plan),
        "alphas": plan.alphas,
        "layers": [_layer_record(kept) for kept in plan.kept],
        "layers_before": plan.n_layers,
        "layers_after": len(plan.kept),
        "parameters": cost["parameters"],
        "parameters_removed": cost["parameters_removed"],
        "tensors_changed": len(changed),
        "largest_relative_change": max((receipt["relative_change"] for receipt in changed), default=0.0),
        "mergekit": None,
        "proof": None,
        "receipts": found,
    }


def _towers_record(checkpoint: Checkpoint) -> dict[str, int] | None:
    """How much lies beside the language model of a multimodal one; None where it is alone."""
    if not checkpoint.multimodal:
        return None
    shapes = [checkpoint.stored(name)[1] for name in checkpoint.towers]
    return {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes))}


def _layer_record(kept: KeptLayer) -> dict[str, Any]:
    record: dict[str, Any] = {"kept": kept.index, "coefficients": dict(kept.coefficients)}
    if kept.matrices:
        record["matrices"] = {matrix: dict(coefficients) for matrix, coefficients in kept.matrices}
    return record


def _described(checkpoint: Checkpoint, record: dict[str, Any], results: Sequence[str]) -> dict[str, str]:
    """The files that say what the model is: they are written again when it has been proved, the record last."""
    return {
        "README.md": model_card(record, checkpoint, results=results),
        RECORD_FILE: json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
