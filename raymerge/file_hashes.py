"""SHA-256 of large files, which are not read again while they stay as they are: weights are hashed by the driver, and
workers of its machine, as often as they start, are told."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_SETTLED_NS = 2_000_000_000  # within a file system's clock tick a file may change without a new time

_known: dict[FileState, str] = {}


class FileState(NamedTuple):
    """What a file is told from others and from itself, changed, by: host and device (with the inode its place), size
    in bytes, and the times of its last changes, of which a user cannot set the second (ns)."""

    host: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hex digits; one that is known to be as it was when it was hashed is not
    read. Raises OSError.

    One change leaves no trace: what is written through a shared mapping (np.memmap) into a page that was written so
    before, until the page is on disk, some 30 seconds, or on a tmpfs for good.
    """
    with file.open("rb") as stream:
        before = _state(stream.fileno())
        if before not in _known:
            settled = time.time_ns() - max(before.modified, before.changed) > _SETTLED_NS
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            if not settled or _state(stream.fileno()) != before:
                return found
            _known[before] = found
    return _known[before]


def known_hashes(files: Iterable[Path]) -> tuple[tuple[FileState, str], ...]:
    """The hashes that this process knows of these files, for another one to `learn`; of what has changed since, or is
    gone, there are none."""
    states = []
    for file in files:
        with suppress(OSError):
            states.append(_state(file))
    return tuple((state, _known[state]) for state in states if state in _known)


def learn(hashes: Iterable[tuple[FileState, str]]) -> None:
    """Take over hashes that another process knows; those of another machine's files fit none here."""
    _known.update(hashes)


def _state(file: Path | int) -> FileState:
    found = os.stat(file)
    times = found.st_mtime_ns, found.st_ctime_ns
    return FileState(socket.gethostname(), found.st_dev, found.st_ino, found.st_size, *times)
