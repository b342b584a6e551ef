"""Files that several processes share: written by two at once, also by two of different machines."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge import tensorfiles
from raymerge.errors import UserError
from raymerge.tensorfiles import OpenTensorFile, is_finite, is_whole, read_tensors, write_tensors

ONE = {"x": torch.arange(6.0)}


@pytest.mark.parametrize("before", [True, False])
def test_two_machines_whose_processes_have_one_number_write_the_same_file(tmp_path, monkeypatch, before):
    """On a shared disk process numbers are no names: in containers they are small and alike."""
    path = tmp_path / "cache" / "trunk.safetensors"
    monkeypatch.setattr("os.getpid", lambda: 87)

    def save(tensors, unfinished):
        monkeypatch.setattr(tensorfiles, "save_file", save_file)
        if not before:
            save_file(tensors, unfinished)
        write_tensors(path, ONE, "the other's")  # from beginning to end, while this one writes
        if before:
            save_file(tensors, unfinished)

    monkeypatch.setattr(tensorfiles, "save_file", save)
    write_tensors(path, ONE, "this one's")
    assert torch.equal(read_tensors(path, "it")["x"], ONE["x"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_shared_file_is_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "x.safetensors", ONE, "it")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut can leave the name with fewer bytes behind it than its header says."""
    path, done = tmp_path / "trunk.safetensors", []
    fsync, replace = tensorfiles.os.fsync, tensorfiles.os.replace

    def synced(file):
        done.append(tensorfiles.os.fstat(file).st_ino)
        fsync(file)

    def replaced(source, target):
        assert done == [source.stat().st_ino]
        replace(source, target)

    monkeypatch.setattr(tensorfiles.os, "fsync", synced)
    monkeypatch.setattr(tensorfiles.os, "replace", replaced)
    write_tensors(path, ONE, "it")
    assert path.stat().st_ino in done and is_whole(path, "it")
    assert not is_whole(tmp_path / "none.safetensors", "it")


def test_a_file_filled_tensor_by_tensor_is_read_as_any_other(tmp_path):
    """In any order, and with names of several lengths, so that headers are padded, as safetensors pads its own."""
    for name in ("a", "a.b", "a.longer.name"):
        tensors = {name: torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.bfloat16),
                   "c": torch.tensor(7), "none": torch.empty(0, 3)}  # fmt: skip
        kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
        layout = {key: (kinds[each.dtype], tuple(each.shape)) for key, each in tensors.items()}
        with OpenTensorFile(tmp_path / "ours", layout, {"format": "pt"}) as file:
            for key in reversed(tensors):
                file.write(key, tensors[key])
        found, content = load_file(tmp_path / "ours"), (tmp_path / "ours").read_bytes()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], each) and found[key].dtype == each.dtype for key, each in tensors.items())
        assert int.from_bytes(content[:8], "little") % 8 == 0


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("x", torch.zeros(2, dtype=torch.bfloat16), "room for F32"),
        ("x", torch.zeros(3), r"\(3,\), but the file has room for F32 \(2,\)"),
        ("y", torch.zeros(2), "room for None"),
    ],
)
def test_what_a_file_has_no_room_for_is_refused(tmp_path, name, tensor, said):
    with pytest.raises(ValueError, match=said), OpenTensorFile(tmp_path / "x", {"x": ("F32", (2,))}, {}) as file:
        file.write(name, tensor)
    with pytest.raises(ValueError, match="1 tensors were not written, such as x"):
        OpenTensorFile(tmp_path / "x", {"x": ("F32", (2,))}, {}).__exit__(None)


def test_a_file_that_cannot_be_written_leaves_no_part_of_it(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(tensorfiles, "save_file", full)
    with pytest.raises(
        UserError, match="it .* cannot be written: no space left; free space on that disk .*output.cache, "
    ):
        write_tensors(tmp_path / "x.safetensors", ONE, "it")
    assert not list(tmp_path.iterdir())


def test_finite_is_what_has_neither_nan_nor_infinity():
    values = [torch.tensor([1.0, end, -2.0]) for end in (float("inf"), float("-inf"), float("nan"))]
    assert not any(is_finite(each.to(kind)) for each in values for kind in (torch.float32, torch.bfloat16))
    assert is_finite(torch.ones(3)) and is_finite(torch.empty(0)) and is_finite(torch.tensor([2**62]))
