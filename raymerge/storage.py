"""Files that appear whole or not at all, on a local disk or any file system pyarrow opens."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pyarrow as pa
import pyarrow.fs as pafs

from raymerge.errors import UserError

#: How temporary names begin. Readers of data sets skip names that begin with '_'.
TEMPORARY = "_tmp."

#: Seconds after which what has a temporary name is no longer being written, where no lock says so.
LEFT_S = 86400.0

#: The file that the process which writes a run holds locked, or where there are no locks names it.
LOCK = ".lock"

_SCRATCH = "raymerge."  # how folders among the user's temporary ones begin

_PROCESS = uuid.uuid4().hex[:8]  # hosts and process numbers are alike in containers

_AT_A_TIME = 32  # requests to a store that is not on this machine: each waits for the network

_LOCK_S = 3.0  # for another process to end that has just been told to

_ONE_PUT = frozenset({"s3", "gcs", "abfs"})  # pyarrow file systems where an object appears when its PUT ends
#: What another process's last words say of a disk that takes no more.
NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))

_FULL = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota used up", errno.EFBIG: "file size limit reached"}


class RunError(UserError):
    """A run directory cannot be used or written; the message says where, why and what to do."""


class NoScratchError(UserError):
    """No temporary folder can be made; the message says why and what to do."""


class Storage:
    """A folder; names inside it are relative, with '/' between them.

    Every method raises RunError where the folder cannot be reached, read or changed: no network, no rights, no bucket.

    Attributes
    ----------
    name : str
        The folder's path, or its URI, as messages show it.
    is_local : bool
        Whether `name` is a path on this machine.
    """

    def __init__(self, path: str | os.PathLike[str], filesystem: pafs.FileSystem | None = None):
        """Attach to a local path or a URI; nothing is read or created.

        Parameters
        ----------
        path : str or path
        filesystem : pyarrow.fs.FileSystem, optional
            The file system `path` lies in, where a URI cannot say it.
        """
        text = os.fspath(path)
        if not text:
            raise RunError("the path of a run is empty; give --out a folder")
        if filesystem is not None:
            self._fs, self._base, self.name = filesystem, text.rstrip("/"), text.rstrip("/")
        elif "://" not in text:
            self._fs, self._base = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
            self.name = self._base
        else:
            try:
                self._fs, inside = pafs.FileSystem.from_uri(text)
            except (pa.ArrowException, OSError, ValueError, ImportError) as error:
                cure = "give a folder, or a URI that pyarrow knows, such as s3://bucket/run"
                raise RunError(f"{text} cannot be opened ({error}); {cure}") from error
            self._base = inside.rstrip("/")
            self.name = self._base if self._fs.type_name == "local" else text.rstrip("/")
        try:
            self._base.encode()
        except UnicodeEncodeError as error:  # a relative path may be fine, and the working folder not
            raise RunError(
                f"the path {self._base!r} is not UTF-8, as Arrow needs it: rename the folder, or choose another --out"
            ) from error
        self.is_local = self._fs.type_name == "local"
        self._claim = b""
        self._one_put = self._fs.type_name in _ONE_PUT

    def show(self, inside: str) -> str:
        """Return the path or URI of something inside, a URI's query (endpoint, region) kept."""
        if "://" not in self.name:
            return f"{self.name}/{inside}"
        path, mark, query = self.name.partition("?")
        return f"{path.rstrip('/')}/{inside}{mark}{query}"

    def is_file(self) -> bool:
        """Return whether the folder is in truth a file."""
        with self._reached():
            return self._fs.get_file_info(self._base).type == pafs.FileType.File

    def names(self, folder: str = "") -> list[str]:
        """Return the names in a folder, sorted; [] if there is no such folder."""
        selector = pafs.FileSelector(self._at(folder), recursive=False, allow_not_found=True)
        with self._reached(folder):
            return sorted(info.base_name for info in self._fs.get_file_info(selector))

    def open(self, inside: str) -> pa.NativeFile:
        """Return a file open for random reading; FileNotFoundError if there is none."""
        with self._reached(inside):
            return self._fs.open_input_file(self._at(inside))

    def read(self, inside: str) -> bytes:
        """Return a file's content; FileNotFoundError if there is none."""
        with self._reached(inside), self._fs.open_input_file(self._at(inside)) as file:
            return file.read()

    def each(self, act: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
        """Return [act(name) for every name]; of a folder that is not on this machine many at a time."""
        if self.is_local:  # where threads gain nothing: reading a small file is all computation
            return [act(name) for name in names]
        with ThreadPoolExecutor(_AT_A_TIME) as threads:
            return list(threads.map(act, names))

    def delete(self, inside: str) -> None:
        """Delete a file, if it is there."""
        with self._reached(inside), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._at(inside))

    def publish(self, inside: str, data: bytes | pa.Buffer) -> None:
        """Make a file appear with this content, whole or not at all, in place of one that was there.

        Parameters
        ----------
        inside : str
        data : bytes or pyarrow.Buffer

        Raises
        ------
        RunError
            Where the disk is full or the write fails, or another process has taken the right to
            write (`lock`). The temporary file is gone then, and an earlier file of that name is as
            it was.
        """
        self._check_claim()
        path = self._at(inside)
        target = path if self._one_put else _temporary(path)
        try:
            if self.is_local:
                try:
                    _put(path, target, data)
                except FileNotFoundError:  # swept by one that takes up the run that, say, a page is written into
                    _put(path, target, data)
                return
            if not self._one_put:
                self._fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
            with self._fs.open_output_stream(target, compression=None) as stream:
                stream.write(data)
            if not self._one_put:
                self._fs.move(target, path)
        except BaseException as error:
            if not self._one_put:
                with contextlib.suppress(OSError):
                    self._fs.delete_file(target)
            if isinstance(error, OSError):
                raise self._write_error(error, inside, len(data)) from error
            raise

    def upload(self, source: str | os.PathLike[str], inside: str, *, move: bool = False) -> None:
        """Copy a local folder. On disks it appears whole; an object store gets it file by file.

        move: the source is of no more use; where it lies on the same disk it is renamed, which takes neither the time
        nor the room of a copy.
        """
        files = [file for file in Path(source).rglob("*") if file.is_file()]
        if not files:
            raise RunError(f"{source} is not a folder with files, so there is nothing to copy to {self.show(inside)}")
        self._check_claim()
        path = self._at(inside)
        target = path if self._one_put else _temporary(path)
        try:
            if self._one_put:
                self._delete_folder(path)
            else:
                self._fs.create_dir(target, recursive=True)
            if not (move and self.is_local and _renamed(source, target)):
                pafs.copy_files(os.fspath(source), target, pafs.LocalFileSystem(), self._fs)
            if not self._one_put:
                self._delete_folder(path)
                self._fs.move(target, path)
        except BaseException as error:
            self._delete_folder(target)
            if isinstance(error, OSError):
                raise self._write_error(error, inside, sum(file.stat().st_size for file in files)) from error
            raise

    def lock(self) -> Lock | None:
        """Take the right to write here.

        On a disk one process has it at a time. Elsewhere no process can be kept out, since pyarrow
        creates no file only where there is none; there the last process that took it has it, and
        what an earlier one writes next is refused. One that is writing at that moment ends its write.

        Raises
        ------
        RunError
            Where another process has it, on a disk; or has taken it since this one did, elsewhere.
        """
        if self.is_local:
            return Lock(self._base)
        if not self._claim:
            claim = f"{_this_process()}, {_PROCESS}".encode()
            self.publish(LOCK, claim)
            self._claim = claim
        self._check_claim()
        return None

    def _check_claim(self) -> None:
        if not self._claim:
            return
        try:
            there = self.read(LOCK)
        except FileNotFoundError:  # deleted: nobody has taken it
            return
        if there != self._claim:
            raise RunError(
                f"another process is writing {self.name} ({there.decode('utf-8', 'replace')}): it continued from "
                "what this one had stored. Wait for it or stop it, then run the same command again; two runs need two "
                "--out"
            )

    def clear_temporary(self, older_s: float = 0.0) -> None:
        """Delete what a killed process left under temporary names.

        older_s: only what was made so many seconds ago, where processes that live may be writing.
        """
        selector = pafs.FileSelector(self._base, recursive=True, allow_not_found=True)
        latest = time.time() - older_s if older_s else math.inf
        with self._reached():
            for info in self._fs.get_file_info(selector):
                if info.base_name.startswith(TEMPORARY) and (info.mtime_ns or time.time_ns()) / 1e9 <= latest:
                    if info.type == pafs.FileType.Directory:
                        self._delete_folder(info.path)
                    else:
                        with contextlib.suppress(FileNotFoundError):  # went with its folder
                            self._fs.delete_file(info.path)

    def _at(self, inside: str) -> str:
        return f"{self._base}/{inside}" if inside else self._base

    @contextlib.contextmanager
    def _reached(self, inside: str = "") -> Iterator[None]:
        """What a file system raises as a RunError, but for what is not there."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RunError(
                f"could not reach {self.show(inside) if inside else self.name}: {error}; check the path, the network "
                "and your permissions there, then run the same command again"
            ) from error

    def _delete_folder(self, path: str) -> None:
        with contextlib.suppress(OSError):
            self._fs.delete_dir(path)

    def _write_error(self, error: OSError, inside: str, needed: int) -> RunError:
        what = _FULL.get(error.errno or 0)  # some of pyarrow's errors have no number
        if what is None:
            return RunError(
                f"could not write {self.show(inside)}: {error}; nothing half-written is left there. Check the path and "
                "your permissions there, then run the same command again"
            )
        free = ""
        if self.is_local:
            with contextlib.suppress(OSError):
                disk = os.statvfs(self._base)
                free = f", {size_text(disk.f_bavail * disk.f_frsize)} free"
                free += " but no inode for another file (df -i)" if disk.f_files and not disk.f_favail else ""
        return RunError(
            f"{what}: {self.show(inside)} needs about {size_text(needed)}{free}; nothing half-written is left. Free "
            "space and run the same command again: what is finished is stored"
        )


def located(source: str | os.PathLike[str]) -> Path | str:
    """A path with its ~ expanded; a URI as it is."""
    return source if isinstance(source, str) and "://" in source else Path(source).expanduser()


def folder_of(source: Path | str) -> tuple[Path | str, str]:
    """The folder that a `located` file lies in, and the file's name."""
    if isinstance(source, Path):
        return source.absolute().parent, source.name
    path, mark, query = source.partition("?")
    folder, _, name = path.rstrip("/").rpartition("/")
    root = "/" if folder.endswith("://") else ""  # of a disk, as of file:///plan.json
    return f"{folder}{root}{mark}{query}", name


def read_file(source: Path | str) -> bytes:
    """The content of a `located` file. Raises OSError, for a URI RunError unless there is just no such file."""
    if isinstance(source, Path):
        return source.read_bytes()
    folder, name = folder_of(source)
    return Storage(folder).read(name)


def user_cache() -> Path:
    """The folder of raymerge in the user's cache: $XDG_CACHE_HOME, or ~/.cache without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raymerge"


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes free on the disk of a folder of this machine's, also of one that is still to be made. Of a disk that does
    not say how large it is, as a tmpfs without limits or a FUSE folder of a bucket, there is no end to them."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    disk = shutil.disk_usage(there)
    return disk.free if disk.total else sys.maxsize


def put_on_disk(folder: Path) -> None:
    """Wait until the disk has all files of a folder: else a power cut can leave its name with fewer bytes behind it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def size_text(number: float) -> str:
    """Bytes as a person reads them."""
    for unit, digits in (("bytes", 0), ("kB", 1), ("MB", 1)):
        if number < 1000:
            return f"{number:.{digits}f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def clear_scratch(folder: str | os.PathLike[str], older_s: float = 0.0) -> None:
    """Delete what killed processes left under temporary names right in a local folder, files and folders.

    older_s: only what was made so many seconds ago, where processes that live may be writing there.
    """
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # another process was faster, or in a shared cache it is another user's
            if time.time() - path.stat().st_mtime < older_s:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder among the user's temporary ones (TMPDIR) for as long as the context lasts.

    Its process holds it locked, so that the next one to make such a folder can tell those of killed processes, and
    deletes them. Raises NoScratchError where none can be made.
    """
    try:
        for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
            _clear_left(left)
        folder, held = _new_scratch()
    except OSError as error:
        raise NoScratchError(
            f"no temporary folder can be made: {error}; free space, or set TMPDIR to a folder that can be written"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _clear_left(folder: Path) -> None:
    """Delete a temporary folder of the user's own unless a process that lives holds it."""
    with contextlib.suppress(OSError):  # another process was faster, it is another user's, or the disk knows no locks
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(held).st_uid == os.geteuid():
                # Not POSIX's lock, which would be of the process, and end with any closing of the folder.
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        finally:
            os.close(held)


def _new_scratch() -> tuple[Path, int]:
    """A new temporary folder, and what holds it locked until that is closed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        try:
            held = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # before it was locked, another process took it for a killed one's
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # which is deleting it
            pass
        except OSError:  # a disk without locks, where none is deleted either
            return folder, held
        else:
            if folder.exists():
                return folder, held
        os.close(held)


class Lock:
    """The right to write in a folder of this machine's, or of a disk that it shares: one process's at a time.

    It ends with the object or the process. Objects of one process share it. Where the disk knows no locks, or cannot
    be written, there is none.
    """

    _mine: WeakValueDictionary[str, _Held] = WeakValueDictionary()

    def __init__(self, folder: str):
        """Raises RunError, after a few seconds, where another process has it."""
        key = os.path.realpath(folder)
        self._held = Lock._mine.get(key) or _Held(folder)
        Lock._mine[key] = self._held


class _Held:
    """A lock on a file, by POSIX: of the process, whose every closing of the file would end it."""

    def __init__(self, folder: str):
        self._file = -1
        path = os.path.join(folder, LOCK)
        try:
            os.makedirs(folder, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError) as error:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"another process is writing {folder} ({self._owner()}): wait for it, stop it, or choose "
                        "another --out"
                    ) from error
                time.sleep(0.1)
            except OSError:  # a disk without locks
                return
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, _this_process().encode(), 0)

    def _owner(self) -> str:
        return os.pread(self._file, 200, 0).decode("utf-8", "replace") or "which does not say"

    def __del__(self) -> None:
        if self._file >= 0 and not sys.is_finalizing():  # the process's end closes it, and os may be gone by then
            os.close(self._file)


def _this_process() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _temporary(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{TEMPORARY}{uuid.uuid4().hex[:8]}.{name}"


def _put(path: str, target: str, data: bytes | pa.Buffer) -> None:
    """Write a file of this machine's under a temporary name, and rename it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(target, "wb") as file:  # not pyarrow's stream, which has no fsync
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut can leave the new name with no bytes behind it
    os.replace(target, path)


def _renamed(source: str | os.PathLike[str], target: str) -> bool:
    """Whether a folder could take the place of an empty one; on another disk it has to be copied."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True
