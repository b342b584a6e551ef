"""The proof that a saved merge is what was scored: reload it in a fresh process, and compare every logit.

One side is the layerwise forward that plans are judged by, on the base weights and the plan; the other transformers
alone, on the saved folder. They share no code but the families' own layers, and both compute in float32 on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from raymerge.alignment import Aligner
from raymerge.architectures import ArchitectureError
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.errors import UserError
from raymerge.families import language_config
from raymerge.forward import LayerRunner
from raymerge.fusion import Refits
from raymerge.memory import VOCABULARY_ROWS
from raymerge.plan import MergePlan
from raymerge.positions import attention_windows, rotary_types
from raymerge.prompts import Group, Shard
from raymerge.storage import NO_ROOM, NoScratchError, scratch_folder
from raymerge.tensorfiles import read_tensors

#: Prose, figures and code, and another language: what is compared, beside what the model generates after the first.
PROMPTS = (
    "The capital of France is the city of Paris, which lies on the river",
    "def area(radius):\n    return 3.14159 * radius ** 2  # 12 + 34 = 46",
    "Der Hund schläft unter dem Tisch, und 猫在椅子上睡觉。",
)
NEW_TOKENS = 8
_PRODUCTS = 4  # matrix products that follow one another in a layer: values, output, gate or up, down
_ROUNDOFF = 2.0**-24  # half the distance of neighbouring float32 numbers near 1


class ProofError(UserError):
    """A saved model that, reloaded, is not the one that was merged, or whose reloading was ended; the message says by
    how much, or by what."""


def prove(
    checkpoint: Checkpoint,
    plan: MergePlan,
    folder: Path,
    *,
    aligner: Aligner | None = None,
    refits: Refits | None = None,
) -> dict[str, Any]:
    """Compare the model saved in `folder` with the layerwise forward of `plan` on `checkpoint`; what was found.

    Logits of PROMPTS, which are shorter than most attention windows; so each layer's window and rotary embedding are
    compared as the saved config has them. What lies beside a multimodal model's language model has the base's
    values. Tensors of the base that are no model's, as a reward head's, are left aside.
    passed; finished: whether the fresh process came to an end of its own, with room for what it found; max_difference,
    tolerance (see `_tolerance`) and largest_logit (logits); positions, and predictions_equal (how many of them have the
    same most probable token); generated_tokens and generated_text of NEW_TOKENS greedy tokens; seconds, peak_bytes of
    the fresh process; error: why it did not pass, else None.
    Nothing is raised for a model that does not pass (`check_proof` does), and nothing is deleted.
    """
    began = time.monotonic()
    texts, ids = _prompts(checkpoint)
    expected = _layerwise_logits(checkpoint, plan, ids, aligner, refits)
    largest = max(float(logits.abs().max()) for logits in expected)
    record: dict[str, Any] = {
        "passed": False,
        "finished": True,
        "max_difference": None,
        "tolerance": _tolerance(checkpoint, len(plan.kept), largest),
        "largest_logit": largest,
        "positions": sum(map(len, ids)),
        "predictions_equal": None,
        "generated_tokens": None,
        "generated_text": None,
        "seconds": None,
        "peak_bytes": None,
        "error": None,
    }
    request = {
        "texts": texts,
        "ids": [list(map(int, sequence)) for sequence in ids],
        "new_tokens": NEW_TOKENS,
        "class": "AutoModelForImageTextToText" if checkpoint.multimodal else "AutoModelForCausalLM",
        "dtype": _loaded_dtype(checkpoint),
        "trust_remote_code": checkpoint.trust_remote_code,
        # transformers before 5.22 loads Gemma 2 with SDPA, which leaves its softcap out.
        "attention": "eager" if checkpoint.architecture.attention_softcap else None,
    }
    room = sum(logits.nbytes for logits in expected)
    try:
        with scratch_folder() as work:
            (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
            done = _run_fresh(folder, work)
            record["seconds"] = round(time.monotonic() - began, 2)
            if done.returncode:
                record["finished"], record["error"] = _reason(done, folder, checkpoint.dtype.itemsize, room)
                return record
            result = json.loads((work / "result.json").read_text(encoding="utf-8"))
            found = read_tensors(work / "logits.safetensors", "the reloaded model's logits")
    except NoScratchError as error:
        return record | {"finished": False, "error": _no_room(str(error.__cause__), room)}
    except OSError as error:  # of the temporary folder: what is read of the model is the fresh process's to say
        return record | {"finished": False, "error": _no_room(str(error), room)}
    result["problems"] = _own_problems(checkpoint, plan, result["problems"])
    result["attention"] = _attention_error(checkpoint, plan, folder) or _towers_error(checkpoint, folder)
    _compare(record, request, result, expected, [found[str(number)] for number in range(len(ids))])
    return record


def check_proof(record: dict[str, Any], folder: Path | str) -> None:
    """Raise ProofError for a record of `prove` that did not pass."""
    if not proof_finished(record):
        raise ProofError(
            f"the model saved in {folder} could not be proved: {record['error']}. It was left there; the same "
            "command again retries the proof; output.verify: false, or --no-verify, skips it"
        )
    if not record["passed"]:
        raise ProofError(
            f"the model saved in {folder} is not the one that was merged: {record['error']}. It was left there, and "
            "its merge_plan.json says so (proof); do not use it. Please report it with the model's name and that file"
        )


def proof_finished(record: dict[str, Any]) -> bool:
    """Whether a record of `prove` says anything of the model; of earlier versions all are taken to."""
    return record.get("finished", True)


def _prompts(checkpoint: Checkpoint) -> tuple[list[str] | None, list[np.ndarray]]:
    """The texts and their token ids; without a tokenizer no texts, and ids spread over the vocabulary."""
    try:
        tokenizer = checkpoint.tokenizer
    except CheckpointError:
        vocabulary = checkpoint[checkpoint.architecture.embedding].shape[0]
        return None, [np.arange(1, 25) * step % vocabulary for step in (7, 611, 7919)]
    return list(PROMPTS), [np.array(tokenizer(text)["input_ids"], dtype=np.int64) for text in PROMPTS]


@torch.inference_mode()
def _layerwise_logits(
    checkpoint: Checkpoint,
    plan: MergePlan,
    ids: Sequence[np.ndarray],
    aligner: Aligner | None,
    refits: Refits | None,
) -> list[Tensor]:
    """(T, vocabulary) float32 logits of each sequence, by what plans are judged with."""
    runner = LayerRunner(checkpoint, device="cpu", dtype=torch.float32, aligner=aligner, refits=refits)
    empty = np.empty(0, dtype=np.int64)
    shard = Shard(tuple(Group("", empty, (sequence,), (row,)) for row, sequence in enumerate(ids)))
    states = runner.run(runner.embed(shard), runner.plan_layers(plan))
    hidden = [runner.vocabulary.normalise(state.batches[0].states[0]) for state in states]
    vocabulary = checkpoint[checkpoint.architecture.unembedding].shape[0]
    chunks = []
    for start in range(0, vocabulary, VOCABULARY_ROWS):
        rows = runner.vocabulary.unembedding_rows(torch.arange(start, min(start + VOCABULARY_ROWS, vocabulary)))
        chunks.append([runner.vocabulary.capped(x @ rows.T) for x in hidden])
    return [torch.cat(parts, dim=-1) for parts in zip(*chunks, strict=True)]


def _tolerance(checkpoint: Checkpoint, layers: int, largest_logit: float) -> float:
    """By how much the logits of the same model of so many layers may differ, of which the largest is given.

    Both sides add the same products in another order. The sum of n products of float32 has a rounding error near
    sqrt(n) u, u = 2^-24, of the sum's own size (Higham and Mary 2019, doi:10.1137/18M1226312); with n the longest row
    of any matrix and 4 (L + 1) products that follow one another, errors that add up without cancelling give
    4 (L + 1) sqrt(n) u of the largest logit. A weight rounded otherwise (2^-9 in bfloat16) is far above that.
    """
    return _PRODUCTS * (layers + 1) * math.sqrt(_longest_row(checkpoint)) * _ROUNDOFF * largest_logit


def _longest_row(checkpoint: Checkpoint) -> int:
    architecture, layer = checkpoint.architecture, 0
    names = [rel for rel in checkpoint.layer_tensors(layer) if rel.endswith(".weight")]
    return max(checkpoint[architecture.layer_name(layer, rel)].shape[-1] for rel in names)


def _loaded_dtype(checkpoint: Checkpoint) -> str:
    """The dtype to reload in: the saved config's own, or where several are stored one that holds every value."""
    dtypes = checkpoint.stored_dtypes
    return "auto" if len(dtypes) == 1 else str(reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def _own_problems(checkpoint: Checkpoint, plan: MergePlan, problems: dict[str, list[str]]) -> dict[str, list[str]]:
    """What transformers reports of the saved tensors, but for those that are no model's in the base's files either."""
    names = checkpoint.merged_names([kept.index for kept in plan.kept])
    foreign = {name for name in names if not checkpoint.architecture.has_tensor(name)}
    spelled: Callable[[str], str] = str
    if checkpoint.multimodal:  # whose towers are the model's, and named in the report as transformers names them
        # With the base's numbers of layers, which a merge counts anew.
        spelled, foreign = _without_numbers, set(map(_without_numbers, checkpoint.unknown))
    unexpected = [name for name in problems.get("unexpected_keys", []) if spelled(name) not in foreign]
    own = problems | {"unexpected_keys": unexpected}
    return {kind: found for kind, found in own.items() if found}


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", name)


def _attention_error(checkpoint: Checkpoint, plan: MergePlan, folder: Path) -> str | None:
    """Where a layer has not the window and rotary embedding of the one kept, which no short prompt tells; else None."""
    from transformers import AutoConfig

    config = language_config(AutoConfig.from_pretrained(folder, trust_remote_code=checkpoint.trust_remote_code))
    try:
        found = list(zip(attention_windows(config), rotary_types(config), strict=True))
    except ArchitectureError as error:
        return str(error)
    expected = [(checkpoint.windows[kept.index], checkpoint.rotary_types[kept.index]) for kept in plan.kept]
    differ = [number for number, (own, kept) in enumerate(zip(found, expected, strict=False)) if own != kept]
    if not differ:
        return None
    return (
        f"the attention of its layers {differ} is not that of the layers kept: window and rotary embedding of layer "
        f"{differ[0]} are {found[differ[0]]} instead of {expected[differ[0]]}"
    )


def _towers_error(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Which of the tensors beside the language model, that no text tells, are not the base's; else None."""
    differ = set(checkpoint.towers)
    for file in folder.glob("*.safetensors") if differ else ():
        with safe_open(file, framework="pt") as saved:
            for name in differ & set(saved.keys()):
                own, base = saved.get_tensor(name), checkpoint[name]
                if own.dtype == base.dtype and torch.equal(own, base):
                    differ.remove(name)
    if not differ:
        return None
    return f"{len(differ)} tensors beside its language model are not the base's, such as {sorted(differ)[:3]}"


def _run_fresh(folder: Path, work: Path) -> subprocess.CompletedProcess[str]:
    # Nothing may be fetched for a folder that is to stand on its own; and no GPU, whose products are rounded otherwise.
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-P", "-m", "raymerge.reload", str(folder), str(work), str(os.getpid())],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | quiet
        | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def _reason(done: subprocess.CompletedProcess[str], folder: Path, itemsize: int, room: int) -> tuple[bool, str]:
    """Whether a process that failed says anything of the model, and why it failed. room: bytes that it was to write."""
    if done.returncode < 0:
        needed = 4 / itemsize * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return False, (
            f"the process that reloaded it was ended by signal {-done.returncode} (9: most often out of memory; in "
            f"float32 its weights take {needed / 1e9:.3g} GB)"
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    if any(words in lines[-1] for words in NO_ROOM):
        return False, _no_room(lines[-1], room)
    return True, f"transformers could not reload and run it: {lines[-1]}"


def _no_room(error: str, room: int) -> str:
    try:
        where = tempfile.gettempdir()
        free = f"{where} has {shutil.disk_usage(where).free / 1e6:.1f} MB free"
    except OSError:  # no folder for temporary files takes any
        free = "no folder for temporary files can be written"
    return (
        f"{error}; {free}, where its logits take {room / 1e6:.1f} MB: free space, or set TMPDIR to a folder on another "
        "disk, and run the same command again"
    )


def _compare(
    record: dict[str, Any],
    request: dict[str, Any],
    result: dict[str, Any],
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
) -> None:
    """Fill in the record from what the fresh process found; `expected` and `found` are (T, vocabulary) each."""
    generated = result["generated_ids"]
    record |= {
        "generated_tokens": len(generated),
        "generated_text": result["generated_text"],
        "peak_bytes": result["peak_bytes"],
    }
    errors = []
    if result["problems"]:
        errors.append(f"its tensors are not those that its config asks for: {result['problems']}")
    if result["attention"]:
        errors.append(result["attention"])
    if request["texts"] is not None and result["ids"] != request["ids"]:
        errors.append("its tokenizer gives other token ids than the base model's")
    if len(generated) != request["new_tokens"]:
        errors.append(f"it generated {len(generated)} tokens of {request['new_tokens']}")
    if [x.shape for x in found] != [x.shape for x in expected]:
        errors.append(f"its logits are {list(found[0].shape)}, not {list(expected[0].shape)}")
    else:
        # Python's own max would pass over a NaN that is not the first.
        difference = torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)]).max().item()
        record["max_difference"] = difference if math.isfinite(difference) else None
        record["predictions_equal"] = sum(
            int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(found, expected, strict=True)
        )
        if not difference <= record["tolerance"]:
            errors.append(
                f"its logits differ by up to {difference:.3g} where rounding explains {record['tolerance']:.3g}, and "
                f"{record['predictions_equal']} of {record['positions']} predictions are the same"
            )
    record["passed"], record["error"] = not errors, "; ".join(errors) or None
