"""Saving a merged model as an ordinary Hugging Face checkpoint, without ever holding it.

The files are laid out beforehand, by the shapes of the layers that are kept; then each tensor is written into its place
when it comes. What else belongs to a checkpoint (config, tokenizer, terms of use) comes from the unmerged one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from torch import Tensor

from raymerge.checkpoint import TOKENIZER_FILES, WEIGHT_INDEX, Checkpoint, CheckpointError, files_named, read_json
from raymerge.saved_config import names_absent_code, saved_config
from raymerge.storage import TEMPORARY, free_bytes, put_on_disk, size_text
from raymerge.tensorfiles import ITEM_BYTES, Layout, OpenTensorFile, is_finite

_SHARD_BYTES = 5 * 10**9
_TERMS = ("license", "licence", "notice")
# What belongs to a tokenizer, to a multimodal model's processor or to generation, and the terms of use: carried over to
# a merged checkpoint as it is.
_CARRIED = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "additional_chat_templates/*.jinja",
    *(name + end for word in _TERMS for name in (word, word.upper(), word.title()) for end in ("", ".*", "-*")),
)


def check_writable(destination: Path) -> None:
    """CheckpointError where `save_checkpoint` could not make its folder: before the minutes that come first."""
    try:
        there = next(folder for folder in destination.absolute().parents if folder.exists())
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=there).cleanup()
    except OSError as error:
        raise CheckpointError(f"cannot write {destination}: {error.strerror or error}; give another folder") from error


def check_room(base: Checkpoint, kept: list[int], destination: Path) -> None:
    """CheckpointError where the disk says that it has no room for the weights that `save_checkpoint` is to write, once
    what a killed call has left of them is gone."""
    needed = _bytes(_layout(base, kept))
    left = 0
    with suppress(FileNotFoundError):  # it may be another process's, which gives it its name
        left = sum(path.stat().st_blocks * 512 for path in _unfinished(destination).glob("*.safetensors"))
    if needed > free_bytes(destination.parent) + left:
        raise _not_written(destination, needed, os.strerror(errno.ENOSPC))


def _unfinished(destination: Path) -> Path:
    return destination.with_name(f"{TEMPORARY}{destination.name}")


def _not_written(destination: Path, needed: int, why: object) -> CheckpointError:
    there = free_bytes(destination.parent)
    free = "" if there == sys.maxsize else f", its disk has {size_text(there)} free"
    return CheckpointError(
        f"could not write {destination}: {why}. Its weights take {size_text(needed)}{free}; nothing was left behind. "
        "Free space and run the same command again, or give another folder"
    )


def save_checkpoint(
    base: Checkpoint,
    tensors: Iterable[tuple[str, Tensor]],
    kept: list[int],
    destination: str | Path,
    *,
    extra_files: Mapping[str, str] | None = None,
) -> int:
    """Write what `base` was merged to as a checkpoint of its own, and return its weights' bytes.

    tensors: (name, tensor) of the whole merged model, in any order, each written when it comes and not kept. kept:
    the original layers whose shapes the merged ones have and whose per-layer config entries remain. extra_files:
    name -> text.
    The folder appears under its own name only when it is complete; an existing one is never overwritten.
    CheckpointError where it is there, where a value is not finite, or where it cannot be written: before anything is,
    where the disk says that it has no room for the weights, lest it be full for others meanwhile.
    """
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination} exists already: give another folder, or delete it")
    unfinished, layout = _unfinished(destination), _layout(base, kept)
    needed = _bytes(layout)
    shutil.rmtree(unfinished, ignore_errors=True)
    check_room(base, kept, destination)
    try:
        with _UnfinishedFolder(unfinished) as own:
            _write_shards(layout, tensors, unfinished)
            own.check()  # writing takes minutes, in which another process may have come
            _write_companions(base, kept, unfinished)
            for name, text in (extra_files or {}).items():
                (unfinished / name).write_text(text, encoding="utf-8")
            put_on_disk(unfinished)
            own.check()
            os.replace(unfinished, destination)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise _not_written(destination, needed, error) from error
    return needed


class _UnfinishedFolder:
    """A new folder that goes when its context is left by an exception, unless another process has put its own there.

    It stays open, so that it is told from another of the same name: its inode's number is not given away meanwhile.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True)
        self._opened = os.open(folder, os.O_RDONLY)

    def _is_own(self) -> bool:
        return self._folder.is_dir() and os.path.samestat(os.fstat(self._opened), self._folder.stat())

    def check(self) -> None:
        """Raise CheckpointError where the folder is another process's by now."""
        if not self._is_own():
            raise CheckpointError(f"another process is saving into {self._folder}: let it end, or give another folder")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is not None and self._is_own():
                shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            os.close(self._opened)


def _layout(base: Checkpoint, kept: list[int]) -> Layout:
    """Dtype and shape of every tensor of the model that keeps the layers `kept`, in the order of its files."""
    return {name: base.stored(source) for name, source in base.merged_names(kept).items()}


def _write_shards(layout: Layout, tensors: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Write tensors into files of at most 5 GB, laid out beforehand.

    A single file gets the plain name and no index.
    """
    shards = _shards(layout)
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(OpenTensorFile(directory / file, shard, {"format": "pt"}))
            for file, shard in shards.items()
        }
        for name, tensor in tensors:
            if not is_finite(tensor):
                raise CheckpointError(
                    f"{name} of the merged model holds values that {tensor.dtype} cannot: nothing was saved; merge a "
                    "checkpoint stored in bfloat16 or float32"
                )
            opened[weight_map[name]].write(name, tensor)
    if len(shards) > 1:
        _write_json(directory / WEIGHT_INDEX, {"metadata": {"total_size": _bytes(layout)}, "weight_map": weight_map})


def _shards(layout: Layout) -> dict[str, Layout]:
    """The files of a layout, by name, each of tensors that follow one another."""
    shards: list[Layout] = [{}]
    held = 0
    for name, stored in layout.items():
        size = _bytes({name: stored})
        if shards[-1] and held + size > _SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = stored
        held += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * ITEM_BYTES[kind] for kind, shape in layout.values())


def _write_companions(base: Checkpoint, kept: list[int], directory: Path) -> None:
    """The config, of fewer layers, and what is carried over."""
    config = saved_config(
        read_json(base.directory / "config.json"),
        base.whole_config,
        kept,
        base.dtype if len(base.stored_dtypes) == 1 else None,
        both_spellings=base.source is not None,
    )
    _write_json(directory / "config.json", config)
    for file in files_named(base.directory, _CARRIED):
        copied = directory / file.relative_to(base.directory)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)
    _clean_tokenizer_config(base.directory, directory)


def _clean_tokenizer_config(source: Path, directory: Path) -> None:
    """Take out of a tokenizer's config where it was once loaded from, as transformers does when it saves one, and an
    auto_map whose code was not copied: its class is transformers' own then."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    values = read_json(source / path.name)  # whose name an error gives
    dropped = set(values) & {"name_or_path", "special_tokens_map_file", "tokenizer_file"}
    if "auto_map" in values and names_absent_code(values["auto_map"], path.parent):
        dropped.add("auto_map")
    if dropped:
        _write_json(path, {key: value for key, value in values.items() if key not in dropped})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
