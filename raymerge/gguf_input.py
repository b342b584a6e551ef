"""GGUF files as input: dequantised once by transformers into an ordinary checkpoint, which is kept by content.

A GGUF file is a quantised model as llama.cpp runs it. What is merged are its dequantised values, so a merge of it is
never better than one of the checkpoint that it was made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from raymerge.errors import UserError

#: Stands in a converted checkpoint: which file it was made from.
SOURCE_FILE = "gguf_source.json"
# Files of these types keep them. Others are stored as bfloat16, whose rounding (2^-9) is below a quantised value's own
# step, and whose range, unlike float16's, holds every activation.
_KEPT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufError(UserError):
    """A GGUF file that cannot be read; the message names it and the cure."""


def gguf_file_of(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without a config; None for others."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise GgufError(f"{path} holds {len(found)} GGUF files ({', '.join(file.name for file in found)}): name one")
    return found[0] if found else None


def converted_gguf(file: Path) -> Path:
    """The folder of an ordinary checkpoint with a GGUF file's dequantised weights, made unless it is there.

    It lies under $XDG_CACHE_HOME/raymerge/gguf (~/.cache without it), named by the file's SHA-256; a process that finds
    another one at work waits for it. Takes about the memory of the dequantised model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise GgufError(f"reading {file} needs the package gguf, which is not installed: pip install 'raymerge[gguf]'")
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raymerge" / "gguf"
    folder = cache / sha256[:16]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{sha256[:16]}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _convert(file, sha256, folder)
    except OSError as error:
        raise GgufError(f"{file} could not be dequantised into {folder}: {error}") from error
    return folder


def _convert(file: Path, sha256: str, folder: Path) -> None:
    import transformers
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished = folder.with_name(f"_tmp.{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        sizes: Counter[str] = Counter()
        for tensor in GGUFReader(file).tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        types = dict(sizes.most_common())
        dtype = _KEPT.get(next(iter(types)), torch.bfloat16)
        named = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
        # From transformers 5.2x on a file's blocks are kept as they are unless this says otherwise.
        packed = getattr(transformers, "GgufConfig", None)
        options = named if packed is None else named | {"quantization_config": packed(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options)
        _save_dense(model, unfinished)
        tokenizer.save_pretrained(unfinished)
        source = {"file": file.name, "sha256": sha256, "values_by_type": types, "stored_as": str(dtype)}
        (unfinished / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, folder)
    # What a damaged file makes the readers do: they check little.
    except (ValueError, KeyError, IndexError, TypeError, ImportError, StopIteration, NotImplementedError) as error:
        raise GgufError(
            f"{file} cannot be read as GGUF: {type(error).__name__}: {error}. Fetch it again, or give the checkpoint "
            "it was made from"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _save_dense(model: Any, folder: Path) -> None:
    """Write a model as an ordinary checkpoint, which transformers refuses for one from GGUF, dequantised or not."""
    folder.mkdir(parents=True)
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr(), (name, tensor.contiguous()))  # a tied unembedding comes second
    save_file(dict(tensors.values()), folder / "model.safetensors", metadata={"format": "pt"})
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    type(model.config).from_dict(values).save_pretrained(folder)
