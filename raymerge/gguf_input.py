"""GGUF files as input: dequantised once by transformers into an ordinary checkpoint, which is kept by content.

A GGUF file is a quantised model as llama.cpp runs it. What is merged are its dequantised values, so a merge of it is
never better than one of the checkpoint that it was made from.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

from raymerge.errors import UserError
from raymerge.file_hashes import sha256_of
from raymerge.storage import NO_ROOM, TEMPORARY, put_on_disk, user_cache
from raymerge.tensorfiles import new_file

#: Stands in a converted checkpoint: which file it was made from.
SOURCE_FILE = "gguf_source.json"
_VERSION = 3  # of how files are checked and converted; another value makes conversions of earlier versions unused
# Files of these types keep them. Others are stored as bfloat16, whose rounding (2^-9) is below a quantised value's own
# step, and whose range, unlike float16's, holds every activation.
_KEPT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_PLAIN = frozenset(
    f"{name}.weight" for name in "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
)
_FUSED = _PLAIN - {f"{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
_HEAD_NORMS = {"attn_q_norm.weight", "attn_k_norm.weight"}
_OUTPUT_NORMS = {"post_attention_norm.weight", "post_ffw_norm.weight"}
# What transformers reads of a layer, by llama.cpp's name of the architecture, which is Llama's for Mistral and Mixtral
# too. Anything else it drops without a word (experts' tensors it reads, but not their width).
_LAYER = {
    "llama": _PLAIN,
    "qwen2": _PLAIN | {"attn_q.bias", "attn_k.bias", "attn_v.bias"},
    "qwen3": _PLAIN | _HEAD_NORMS,
    "gemma2": _PLAIN | _OUTPUT_NORMS,
    "gemma3": _PLAIN | _HEAD_NORMS | _OUTPUT_NORMS,
    "phi3": _FUSED | {"attn_qkv.weight"},
}
_ENDS = {"token_embd.weight", "output_norm.weight", "output.weight"}
# The one width of a head with which transformers reads an architecture. A file does not state the scale of Gemma's
# scores, which transformers takes for 256: that of every size but 27B, whose heads are 128 wide.
_HEAD_WIDTH = {"qwen3": 128, "gemma2": 256, "gemma3": 256}
_WINDOWED = ("gemma2", "gemma3")
# What files state of a family and transformers takes for this.
_TAKEN_FOR = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"final_logit_softcapping": 0.0, "rope.freq_base_swa": 10_000.0},
}
_DAMAGE = (ValueError, LookupError, TypeError, ImportError, StopIteration, RuntimeError, AssertionError)


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

    It lies under $XDG_CACHE_HOME/raymerge/gguf (~/.cache without it), named by the file's SHA-256 and the version of
    the conversion; a process that finds another one at work waits for it. Takes about the memory of the dequantised
    model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise GgufError(f"reading {file} needs the package gguf, which is not installed: pip install 'raymerge[gguf]'")
    sha256 = sha256_of(file)
    cache = user_cache() / "gguf"
    folder = cache / f"{sha256[:16]}-{_VERSION}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _convert(file, sha256, folder)
    except Exception as error:
        # safetensors and tokenizers report a full disk by errors of their own, the latter by a bare Exception.
        if not isinstance(error, OSError) and not any(words in str(error) for words in NO_ROOM):
            raise
        raise GgufError(
            f"{file} could not be dequantised into {folder}: {error}; free space there, or set XDG_CACHE_HOME to a "
            "folder on another disk, and run the same command again"
        ) from error
    return folder


def _convert(file: Path, sha256: str, folder: Path) -> None:
    import transformers
    from gguf import GGUFReader
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unfinished = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        reader = GGUFReader(file)
        _check_read_whole(file, reader)
        sizes: Counter[str] = Counter()
        for tensor in reader.tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        types = dict(sizes.most_common())
        dtype = _KEPT.get(next(iter(types)), torch.bfloat16)
        named = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
        # From transformers 5.2x on a file's blocks are kept as they are unless this says otherwise.
        packed = getattr(transformers, "GgufConfig", None)
        options = named if packed is None else named | {"quantization_config": packed(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options)
        if (saved := _save_dense(model, unfinished)) != sizes.total():
            raise ValueError(f"transformers makes {saved} values of the {sizes.total()} that are there")
        tokenizer.save_pretrained(unfinished)
        source = {"file": file.name, "sha256": sha256, "values_by_type": types, "stored_as": str(dtype)}
        (unfinished / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        put_on_disk(unfinished)
        os.replace(unfinished, folder)
    except GgufError:
        raise
    # What a damaged file makes the readers do: they check little.
    except (*_DAMAGE, StrictDataclassError) as error:
        raise GgufError(
            f"{file} cannot be read as GGUF: {type(error).__name__}: {error}. Fetch it again, or give the checkpoint "
            "it was made from"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_read_whole(file: Path, reader: Any) -> None:
    """Refuse, before it is converted, a file of which transformers would leave something out: it says nothing then.

    Raises GgufError; KeyError for a file without the metadata that each has.
    """

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(key)
        return default if field is None else field.contents()

    def refuse(what: str) -> NoReturn:
        raise GgufError(f"{file} {what}: give the checkpoint that it was made from, as safetensors")

    kind = reader.fields["general.architecture"].contents()
    if kind not in _LAYER or value(f"{kind}.expert_count", 0):
        experts = " with experts" if kind in _LAYER else ""
        refuse(f"is of architecture {kind}{experts}, but only {', '.join(_LAYER)} without experts are read from GGUF")
    for tensor in reader.tensors:
        name = tensor.name.split(".", 2)[2] if tensor.name.startswith("blk.") else tensor.name
        if name not in (_LAYER[kind] if name != tensor.name else _ENDS):
            refuse(f"holds {tensor.name}, which transformers does not read of {kind}")
    # Files of 2023 name a factor alone, which llama.cpp takes for a linear one.
    factors = [value(f"{kind}.rope.{key}", 0) for key in ("scaling.factor", "scale_linear")]
    scaled = "linear" if any(factor not in (0, 1) for factor in factors) else "none"
    if value(f"{kind}.rope.scaling.type", scaled) != "none":
        refuse("scales its rotary frequencies, which transformers does not read")
    width = value(f"{kind}.attention.key_length")
    if width is None:
        width = value(f"{kind}.embedding_length") // value(f"{kind}.attention.head_count")
    if width != _HEAD_WIDTH.get(kind, width):
        refuse(f"has heads of width {width}, but transformers reads {kind} with {_HEAD_WIDTH[kind]} alone")
    if value(f"{kind}.rope.dimension_count", width) != width:
        refuse("rotates a part of each head, which transformers does not read")
    for key, only in _TAKEN_FOR.get(kind, {}).items():
        if (stated := value(f"{kind}.{key}", only)) != only:
            refuse(f"has {key} = {stated:g}, which transformers takes for {only:g} in {kind}")
    window = value(f"{kind}.attention.sliding_window", 0)
    if kind not in _WINDOWED and 0 < window < value(f"{kind}.context_length"):
        refuse(f"has a sliding window of {window} tokens, which transformers does not read of {kind}")


def _save_dense(model: Any, folder: Path) -> int:
    """Write a model as an ordinary checkpoint, which transformers refuses for one from GGUF, dequantised or not.

    Returns how many values it has; a tied unembedding is not counted twice.
    """
    folder.mkdir(parents=True)
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr(), (name, tensor.contiguous()))  # a tied unembedding comes second
    with new_file(folder / "model.safetensors"):
        save_file(dict(tensors.values()), folder / "model.safetensors", metadata={"format": "pt"})
    # Without the class's name llama.cpp's converter and vLLM refuse what they read, and what is merged of it.
    values = model.config.to_dict() | {"architectures": [type(model).__name__]}
    for key in ("quantization_config", "_model_name_or_path"):  # the latter is the name, or path, that the file states
        values.pop(key, None)
    type(model.config).from_dict(values).save_pretrained(folder)
    return sum(tensor.numel() for _, tensor in tensors.values())
