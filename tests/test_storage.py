"""Files appear whole or not at all, on disks and on other file systems."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs as pafs
import pytest

from raymerge import storage as storage_module
from raymerge.storage import LOCK, Lock, NoScratchError, RunError, Storage, clear_scratch, scratch_folder
from raymerge.tables import RunDirectory


@pytest.fixture(params=["path", "uri", "subtree", "mock", "one_put"])
def storage(request, tmp_path, monkeypatch):
    """One storage of every kind: own code for local disks, pyarrow with renames, pyarrow with one PUT."""
    if request.param == "path":
        return Storage(tmp_path / "run")
    if request.param == "uri":
        return Storage((tmp_path / "run").as_uri())
    if request.param == "subtree":
        return Storage("run", pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    if request.param == "one_put":
        monkeypatch.setattr(storage_module, "_ONE_PUT", frozenset({"mock"}))
    filesystem = pafs._MockFileSystem()
    for folder in (
        "tables/x",
        "tables/t",
        "models/m",
        "models/_tmp.3.m",
        "models/best",
    ):  # object stores know no folders; this does
        filesystem.create_dir(f"run/{folder}")
    return Storage("run", filesystem)


def test_publish_read_list_delete(storage):
    assert storage.names("tables/x") == []
    storage.publish("tables/x/a", b"one")
    storage.publish("tables/x/b", b"two")
    storage.publish("tables/x/a", b"three")
    assert storage.read("tables/x/a") == b"three"
    assert storage.names("tables/x") == ["a", "b"]  # and no temporary file
    storage.delete("tables/x/a")
    storage.delete("tables/x/a")
    assert storage.names("tables/x") == ["b"]
    with pytest.raises(FileNotFoundError):
        storage.read("tables/x/a")


def test_upload_replaces_a_folder(storage, tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "old").write_bytes(b"1")
    storage.upload(source, "models/best")
    (source / "old").unlink()
    (source / "sub" / "new").write_bytes(b"2")
    storage.upload(source, "models/best")
    assert storage.read("models/best/sub/new") == b"2"
    assert not [name for name in storage.names("models") if name.endswith(".best")]  # a temporary name
    assert "old" not in storage.names("models/best")
    with pytest.raises(RunError, match="nothing to copy"):
        storage.upload(tmp_path / "absent", "models/other")


@pytest.mark.parametrize("one_disk", [True, False])
def test_a_folder_of_no_more_use_is_moved_on_its_own_disk_and_copied_to_another(tmp_path, monkeypatch, one_disk):
    storage, source = Storage(tmp_path / "run"), tmp_path / "_tmp.0" / "best"
    (tmp_path / "run" / "models" / "best").mkdir(parents=True)
    (tmp_path / "run" / "models" / "best" / "old").write_bytes(b"0")
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_bytes(b"1")
    file = (source / "sub" / "weights").stat().st_ino
    if not one_disk:

        def rename(*_):
            raise OSError(errno.EXDEV, "another disk")

        monkeypatch.setattr(os, "rename", rename)
    storage.upload(source, "models/best", move=True)
    monkeypatch.undo()
    assert ((tmp_path / "run/models/best/sub/weights").stat().st_ino == file) == one_disk != source.exists()
    assert storage.names("models") == ["best"] and storage.names("models/best") == ["sub"]


def test_clear_temporary_leaves_the_rest(storage):
    for name in (
        "a",
        "_a",
        "_tmp.1.a",
        "tables/t/_tmp.2.p",
        "tables/t/p",
        "models/_tmp.3.m/weights",
        "models/m/weights",
    ):
        storage.publish(name, b"x")
    storage.clear_temporary()
    assert storage.names() == ["_a", "a", "models", "tables"]
    assert storage.names("tables/t") == ["p"]
    assert "m" in storage.names("models") and "_tmp.3.m" not in storage.names("models")
    assert storage.names("models/m") == ["weights"]


def test_of_two_processes_on_one_object_store_the_earlier_ends_at_its_next_write(monkeypatch, tmp_path):
    filesystem = pafs._MockFileSystem()
    filesystem.create_dir("run/models")
    (tmp_path / "model").write_bytes(b"weights")
    earlier, beside = Storage("run", filesystem), Storage("run", filesystem)
    for one in (earlier, beside, earlier):  # of one process, which may take it twice
        assert one.lock() is None
        one.publish("part-1", b"x")
    monkeypatch.setattr(storage_module, "_PROCESS", "another")
    later = Storage("run", filesystem)
    later.publish("part-2", b"of no right, which was not asked for")
    later.lock()
    for refused in (
        lambda: earlier.publish("part-2", b"y"),
        lambda: earlier.upload(tmp_path, "models/m"),
        earlier.lock,
    ):
        with pytest.raises(RunError, match=rf"another process is writing run \(.*, process {os.getpid()}, another\)"):
            refused()
    later.publish("part-2", b"z")
    later.upload(tmp_path, "models/m")
    assert earlier.read("part-2") == b"z"  # reading is anyone's
    later.delete(LOCK)
    earlier.publish("part-3", b"x")


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder, seconds):
    """Another process that has a folder's lock for so long, or none at once."""
    arguments = [sys.executable, "-S", "-c", HOLD, str(folder / LOCK), str(seconds)]
    other = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return other, other.stdout.readline() == "held\n"


def test_a_lock_is_waited_for_and_lasts_until_the_last_of_its_objects_is_gone(tmp_path, monkeypatch):
    other, held = holder(tmp_path, 0.5)
    with other:
        mine = Lock(str(tmp_path))
    assert held
    again = Lock(str(tmp_path))
    for one in ("mine", "again"):
        other, held = holder(tmp_path, 0)
        with other:
            assert not held
        if one == "mine":
            del mine  # a process that closes a locked file unlocks it, whichever of its objects that file was
    del again
    other, held = holder(tmp_path, 30)
    with other:
        monkeypatch.setattr(storage_module, "_LOCK_S", 0.0)
        with pytest.raises(RunError, match="another process is writing"):
            Lock(str(tmp_path))
        assert held
        other.kill()


def test_a_lock_names_its_process_and_no_other(tmp_path):
    """The name of an earlier one was longer."""
    (tmp_path / LOCK).write_text("a.host.of.a.long.name.example.org, process 1234567890")
    lock = Storage(tmp_path).lock()
    assert (tmp_path / LOCK).read_text().endswith(f", process {os.getpid()}") and lock is not None


def test_a_file_whose_temporary_one_was_swept_is_written_again(tmp_path, monkeypatch):
    """Another process takes up the run that a page is written into, and deletes what is being written."""
    swept, replace = [], os.replace

    def sweep(source, target):
        if not swept:
            swept.append(source)
            Storage(tmp_path).clear_temporary()
        replace(source, target)

    monkeypatch.setattr(os, "replace", sweep)
    Storage(tmp_path).publish("report.html", b"a page")
    assert swept and (tmp_path / "report.html").read_bytes() == b"a page" and len(list(tmp_path.iterdir())) == 1


def test_what_belongs_to_another_user_is_left_among_temporary_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "raymerge.killed").mkdir()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with scratch_folder():
        assert (tmp_path / "raymerge.killed").exists()
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with scratch_folder():
        assert not (tmp_path / "raymerge.killed").exists()


def test_where_no_lock_can_be_made_there_is_none(tmp_path):
    (tmp_path / "file").touch()
    lock = Lock(str(tmp_path / "file" / "run"))
    output = os.fstat(1)
    del lock  # closes no other file
    assert os.fstat(1) == output


def test_what_is_being_written_is_left_alone(tmp_path):
    for name, age in (("_tmp.1", 0.0), ("_tmp.2.safetensors", 100.0), ("trunk.safetensors", 100.0)):
        path = tmp_path / name
        path.mkdir() if name == "_tmp.1" else path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    clear_scratch(tmp_path, older_s=50.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_tmp.1", "trunk.safetensors"]
    clear_scratch(tmp_path)
    clear_scratch(tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["trunk.safetensors"]


def test_what_another_user_left_in_a_shared_cache_stops_nobody(tmp_path, monkeypatch):
    for name in ("_tmp.1", "_tmp.2"):
        (tmp_path / name).write_bytes(b"x")

    def refused(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr("pathlib.Path.unlink", refused)
    clear_scratch(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


HOLD_SCRATCH = """
import sys
from raymerge.storage import scratch_folder
with scratch_folder() as folder:
    (folder / "fits").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_process_left_among_temporary_folders_goes_with_the_next_and_what_is_in_use_stays(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("raymerge.file", "another"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "target").mkdir()
    (tmp_path / "raymerge.link").symlink_to("target")
    others = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD_SCRATCH],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    folders = [Path(other.stdout.readline().strip()) for other in others]
    others[0].kill()
    others[0].wait()
    assert [folder.exists() for folder in folders] == [True, True]
    with scratch_folder() as mine, scratch_folder() as second:
        assert mine != second and mine.exists() and second.exists()
        assert [folder.exists() for folder in folders] == [False, True]
    assert (folders[1] / "fits").exists() and not mine.exists() and not second.exists()
    others[1].communicate("\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "raymerge.file", "raymerge.link", "target"]
    for other in others:
        other.stdin.close()
        other.stdout.close()


def test_a_temporary_folder_that_another_process_takes_for_a_killed_one_s_is_made_again(tmp_path, monkeypatch):
    """Between the making of a folder and its locking."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, mkdtemp = [], tempfile.mkdtemp

    def swept(prefix):
        made.append(Path(mkdtemp(prefix=prefix)))
        if len(made) == 1:
            storage_module._clear_left(made[0])
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    with scratch_folder() as folder:
        assert folder == made[1] and folder.exists() and not made[0].exists()


def test_where_there_are_no_temporary_folders_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(NoScratchError, match="no temporary folder can be made: .*set TMPDIR"), scratch_folder():
        pass


class Unreachable(pafs._MockFileSystem):
    """Answers every request as S3 does where there is no network, or no right to the bucket."""

    type_name = "s3"

    def __getattribute__(self, name):
        if name in ("get_file_info", "open_input_file", "delete_file"):
            raise OSError("When getting information for bucket 'b': AWS Error ACCESS_DENIED")
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "asked",
    [
        lambda storage: storage.is_file(),
        lambda storage: storage.names("tables"),
        lambda storage: storage.open("tables/a"),
        lambda storage: storage.read("tables/a"),
        lambda storage: storage.delete("tables/a"),
        lambda storage: storage.clear_temporary(),
        lambda storage: RunDirectory.load("b/run", filesystem=storage._fs),
    ],
)
def test_a_store_that_cannot_be_reached_is_the_users_to_mend(asked):
    with pytest.raises(RunError, match="could not reach b/run.*ACCESS_DENIED; check the path, the network"):
        asked(Storage("b/run", Unreachable()))


def test_a_path_that_no_disk_has_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match=f"could not reach {path}"):
            RunDirectory.check(path, {}, "search")


def test_a_process_that_holds_a_run_to_its_end_ends_without_a_word(tmp_path):
    code = f"from raymerge.storage import Lock; lock = Lock({str(tmp_path)!r}); keep = [lock, lambda: keep]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_names_of_the_places():
    assert (
        Storage("s3://bucket/runs/a?region=eu-west-1").show("models/b")
        == "s3://bucket/runs/a/models/b?region=eu-west-1"
    )
    assert Storage("/tmp/x/").show("models") == "/tmp/x/models"
    assert Storage("fsspec+file:///tmp/x").show("models") == "fsspec+file:///tmp/x/models"
    assert Storage("~/x").name == os.path.expanduser("~/x") and os.path.isabs(Storage("x").name)
    sizes = [storage_module.size_text(number) for number in (999, 1000, 1_550_000, 999_900_000, 1_234_000_000_000)]
    assert sizes == ["999 bytes", "1.0 kB", "1.6 MB", "999.9 MB", "1234.0 GB"]
    assert Storage("file:///tmp/x").is_local and Storage("file:///tmp/x").name == "/tmp/x"
    with pytest.raises(RunError, match="cannot be opened"):
        Storage("nosuch://bucket/run")
    with pytest.raises(RunError, match="empty"):
        Storage("")
    with pytest.raises(RunError, match=r"the path '/tmp/x\\udcff' is not UTF-8.*another --out"):
        Storage(b"/tmp/x\xff".decode(errors="surrogateescape"))


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk full"), (errno.EDQUOT, "quota"), (errno.EACCES, "could not write")]
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_write_on_a_disk_leaves_the_old_file(tmp_path, monkeypatch, number, words, step):
    storage = Storage(tmp_path)
    storage.publish("f", b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(RunError, match=words) as caught:
        storage.publish("f", b"new" * 1000)
    assert str(tmp_path / "f") in str(caught.value)
    if number != errno.EACCES:
        assert all(words in str(caught.value) for words in ("3.0 kB", " free", "run the same command"))
        assert "inode" not in str(caught.value)
    else:
        assert "your permissions there, then run the same command again" in str(caught.value)
    assert storage.names() == ["f"] and storage.read("f") == b"old"


def test_a_disk_with_room_and_without_inodes_is_said_to_have_none(tmp_path, monkeypatch):
    """12 GB are free, 1.4 kB do not fit: only `df -i` shows why."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(f_bavail=3_000_000, f_frsize=4096, f_files=100, f_favail=0)
    )
    with pytest.raises(
        RunError, match=r"disk full: .*/f needs about 3 bytes, 12\.3 GB free but no inode .*\(df -i\); "
    ):
        Storage(tmp_path).publish("f", b"new")


def test_a_disk_that_really_ends_midway(tmp_path):
    storage = Storage(tmp_path)
    storage.publish("f", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(RunError, match="file size limit reached"):
            storage.publish("f", b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert storage.names() == ["f"] and storage.read("f") == b"old"


class FullHandler(pafs.FileSystemHandler):
    """A local file system through Python whose renames fail as on a full disk."""

    def __init__(self):
        self.disk = pafs.LocalFileSystem()

    def get_type_name(self):
        return "full"

    def normalize_path(self, path):
        return path

    def get_file_info(self, paths):
        return self.disk.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.disk.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.disk.create_dir(path, recursive=recursive)

    def open_output_stream(self, path, metadata):
        return self.disk.open_output_stream(path)

    def open_input_file(self, path):
        return self.disk.open_input_file(path)

    def delete_file(self, path):
        self.disk.delete_file(path)

    def move(self, source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    def delete_dir(self, path):
        self.disk.delete_dir(path)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        raise NotImplementedError

    def delete_root_dir_contents(self):
        raise NotImplementedError

    def copy_file(self, source, target):
        raise NotImplementedError

    def open_input_stream(self, path):
        return self.disk.open_input_stream(path)

    def open_append_stream(self, path, metadata):
        raise NotImplementedError


def test_failing_rename_elsewhere_leaves_no_temporary_file(tmp_path):
    storage = Storage(str(tmp_path), pafs.PyFileSystem(FullHandler()))
    with pytest.raises(RunError, match="disk full"):
        storage.publish("f", b"new")
    source = tmp_path / "source"
    source.mkdir()
    (source / "w").write_bytes(b"1")
    with pytest.raises(RunError, match="disk full"):
        storage.upload(source, "m")
    assert storage.names() == ["source"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    storage = Storage(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.publish("f", b"new")
    assert storage.names() == []


@pytest.mark.parametrize(("total", "free", "said"), [(100, 0, 0), (100, 7, 7), (0, 0, sys.maxsize)])
def test_a_disk_that_does_not_say_how_large_it_is_is_not_full(tmp_path, monkeypatch, total, free, said):
    """As a tmpfs mounted with size=0 and some FUSE file systems: statvfs gives 0 blocks, of which none is free."""
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda of: asked.append(of) or SimpleNamespace(total=total, free=free))
    assert storage_module.free_bytes(tmp_path / "still" / "to be made") == said
    assert asked == [tmp_path]
