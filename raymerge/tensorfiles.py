"""Files of tensors that several processes share: written whole or not at all, read back mapped from disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raymerge.errors import UserError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], what: str) -> None:
    """Write tensors (of any device) as safetensors under a temporary name, then rename; `what` is named in errors.

    Two processes that write the same file write it one after the other, and a reader never sees half of one.
    """
    unfinished = path.with_name(f"_tmp.{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise UserError(f"{what} {path} cannot be written: {error}; free space on that disk") from error
    finally:
        if unfinished.exists():
            unfinished.unlink()


def read_tensors(path: Path, what: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors `names` of a file (all by default), mapped, not read. UserError for a file that lacks one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}; delete the file") from error
