"""Files of tensors: those that several processes share, written whole or not at all and read back mapped from disk,
and those too large to be held, written tensor by tensor."""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raymerge.errors import UserError
from raymerge.storage import TEMPORARY

#: torch's dtype by safetensors' name of it.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Bytes of a value, by safetensors' name of its dtype.
ITEM_BYTES = {kind: dtype.itemsize for kind, dtype in DTYPES.items()}
#: What a file will hold: for each tensor, safetensors' name of its dtype, and its shape.
Layout = dict[str, tuple[str, tuple[int, ...]]]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN is both the least and the greatest. 0.04 s for 467 MB of bfloat16, where isfinite takes seconds and a copy.
    return all(math.isfinite(value.item()) for value in torch.aminmax(tensor))


class OpenTensorFile:
    """A safetensors file whose header is written first and whose tensors follow one by one, in any order.

    safetensors itself writes from a dict of all tensors. The format (huggingface.co/docs/safetensors): the header's
    length in 8 bytes, little-endian; the header, JSON of dtype, shape and offsets behind it by tensor; the tensors'
    bytes without gaps. A context manager: leaving it without an exception while a tensor is missing raises ValueError.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str]):
        self._layout, self._starts = dict(layout), {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (kind, shape) in layout.items():
            self._starts[name], begin = end, end
            end += math.prod(shape) * ITEM_BYTES[kind]
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # as safetensors pads it, so that tensors lie aligned
        self._first = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor (of the CPU) into its place; ValueError where the layout has another or none left."""
        kind, shape = self._layout.pop(name, (None, ()))
        if kind is None or DTYPES[kind] != tensor.dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but the file has room for {kind} {shape}"
            )
        self._file.seek(self._first + self._starts[name])
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> OpenTensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._layout:
            raise ValueError(f"{len(self._layout)} tensors were not written, such as {next(iter(self._layout))}")


@contextmanager
def new_file(path: Path) -> Iterator[None]:
    """Give what is saved at a path the mode of any new file: from 0.8 on safetensors lets nobody else read its own."""
    path.touch()
    mode = path.stat().st_mode  # by the umask, which cannot be asked for without setting it
    yield
    path.chmod(mode)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], what: str) -> None:
    """Write tensors (of any device) as safetensors under a temporary name, then rename; `what` is named in errors.

    Of processes that write the same file, on one machine or several, each writes its own and the last one's stays; a
    reader never sees half of one.
    """
    # Not by the process's number: on a disk that machines share, two have the same one, above all in containers.
    unfinished = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(unfinished):
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut can leave the new name with fewer bytes behind it
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise UserError(
            f"{what} {path} cannot be written: {error}; free space on that disk or have it in another folder (of an "
            "experiment output.cache, of raymerge merge the environment's TMPDIR), then run the same command again"
        ) from error
    finally:
        if unfinished.exists():
            unfinished.unlink()


def is_whole(path: Path, what: str) -> bool:
    """Whether a cached file is there and as long as its header says; only the header is read.

    One that is there but short or no safetensors is to be made anew, which replaces it: it is logged, as a warning.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError) as error:
        logging.getLogger(__name__).warning("%s %s cannot be read and is made anew: %s", what, path, error)
        return False


def read_tensors(path: Path, what: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors `names` of a file (all by default), mapped, not read. UserError for a file that lacks one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}; delete the file") from error
