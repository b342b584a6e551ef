"""file_hashes.py: a file is read again exactly where it may have changed."""

import hashlib
import os

import pytest

from raymerge import file_hashes
from raymerge.file_hashes import known_hashes, learn, sha256_of


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Nothing is known, and what was just written counts as settled."""
    monkeypatch.setattr(file_hashes, "_known", {})
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", -1)


@pytest.fixture
def reads(monkeypatch):
    """The files that were read."""
    found, digest = [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda stream, name: (found.append(stream.name), digest(stream, name))[1]
    )
    return found


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once(tmp_path, reads):
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"weights"), other.write_bytes(b"others")
    assert [sha256_of(file), sha256_of(file), sha256_of(other)] == [sha256(b"weights")] * 2 + [sha256(b"others")]
    assert reads == [str(file), str(other)]
    (tmp_path / "link").symlink_to(file)
    assert sha256_of(tmp_path / "link") == sha256(b"weights") and len(reads) == 2


def test_a_changed_file_is_read_again_though_its_size_and_its_time_are_set_back(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    times = file.stat()
    assert sha256_of(file) == sha256(b"weights")
    before = times.st_ctime_ns
    while file.stat().st_ctime_ns == before:  # within a tick of the file system's clock it has the same times
        file.write_bytes(b"WEIGHTS")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns and file.stat().st_size == times.st_size
    assert sha256_of(file) == sha256(b"WEIGHTS")


def test_what_was_just_written_is_read_again(tmp_path, monkeypatch):
    """The next change may come within a tick of the file system's clock."""
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 2_000_000_000)
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    assert sha256_of(file) == sha256(b"weights") and not known_hashes([file])


def test_what_changes_while_it_is_read_is_not_known(tmp_path, monkeypatch):
    file, digest = tmp_path / "a", hashlib.file_digest
    file.write_bytes(b"weights")

    def changing(stream, name):
        file.write_bytes(b"weights and more")
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", changing)
    sha256_of(file)
    assert not file_hashes._known


def test_another_process_is_told_and_another_machine_not_deceived(tmp_path, reads, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"weights")
    sha256_of(file)
    ((state, found),) = known_hashes([file])
    monkeypatch.setattr(file_hashes, "_known", {})
    learn([(state._replace(host="elsewhere"), "0" * 64)])
    assert sha256_of(file) == found and len(reads) == 2
    monkeypatch.setattr(file_hashes, "_known", {})
    learn([(state, found)])
    assert sha256_of(file) == found and len(reads) == 2


def test_only_what_is_known_of_files_as_they_are_is_told(tmp_path):
    files = [tmp_path / name for name in ("told", "changed", "gone", "never read")]
    for file in files:
        file.write_bytes(b"weights")
    for file in files[:3]:
        sha256_of(file)
    files[1].write_bytes(b"other weights")
    files[2].unlink()
    assert [found for _, found in known_hashes(files)] == [sha256(b"weights")]


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "none")
