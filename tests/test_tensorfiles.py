"""Files that several processes share: written by two at once, also by two of different machines."""

import os

import pytest
import torch
from safetensors.torch import save_file

from raymerge import tensorfiles
from raymerge.tensorfiles import is_whole, read_tensors, write_tensors

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
