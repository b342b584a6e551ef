"""Canonical text, digests and what the software says of itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path

import numpy as np
import pytest

from raymerge import identity
from raymerge.identity import canonical_json, digest, git_state, plain, software, without_folders, without_secrets
from raymerge.tables import RunDirectory


def test_canonical_text_does_not_depend_on_order_or_container():
    assert canonical_json({"b": (1, 2.0), "a": {"y": None, "x": True}}) == '{"a":{"x":true,"y":null},"b":[1,2.0]}'
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})


def test_numbers_are_float64_in_shortest_form():
    assert canonical_json([0.1, 1 / 3, 1e-7, -0.0, 1]) == "[0.1,0.3333333333333333,1e-07,0.0,1]"
    assert canonical_json(np.float32(0.1)) == "0.10000000149011612"
    assert canonical_json({"a": np.arange(3), "b": np.bool_(True)}) == '{"a":[0,1,2],"b":true}'


def test_text_stays_unicode_and_paths_become_text():
    assert canonical_json({"frage": "größer", "p": Path("a/b")}) == '{"frage":"größer","p":"a/b"}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-np.inf]])
def test_numbers_json_cannot_hold_are_refused(value):
    with pytest.raises(ValueError, match="only finite"):
        canonical_json(value)


def test_nan_can_become_none():
    assert plain({"a": [float("nan"), 1.0]}, nan_as_none=True) == {"a": [None, 1.0]}
    assert plain((np.array([[np.inf, 1.0]]), np.float32("nan")), nan_as_none=True) == [[[None, 1.0]], None]


@pytest.mark.parametrize("value", [{1: "a"}, {1, 2}, object()])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError):
        canonical_json(value)


def test_digest_is_sha256_of_the_utf8_text():
    assert digest({"a": "é"}) == hashlib.sha256('{"a":"é"}'.encode()).hexdigest()[:16]
    assert digest([1], length=64) == hashlib.sha256(b"[1]").hexdigest()
    with pytest.raises(ValueError, match="length is 65"):
        digest([1], length=65)


def test_the_code_s_identity_is_its_text_s_wherever_it_lies(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "sub/b.py").write_text("y = 2\n")
    ours = identity.code_identity()
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "a.py"))
    found = identity.code_identity()
    assert found == digest({"a.py": "x = 1\n", "sub/b.py": "y = 2\n"}) != ours
    (tmp_path / "_analysis").mkdir()
    (tmp_path / "_analysis/figure.py").write_text("z = 3\n")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / ".#a.py").symlink_to("anna@host.1234:1700000000")  # Emacs', while a.py is being edited
    (tmp_path / "sub/._b.py").write_bytes(b"\x00\x05\x16\x07\xff")  # of an archive that was packed on a Mac
    assert identity.code_identity() == found
    (tmp_path / "sub/b.py").write_text("y = 3\n")
    assert identity.code_identity() != found


def test_a_package_inside_somebody_elses_repository_has_no_commit(tmp_path):
    package = tmp_path / "venv" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_state(package) == (None, None)  # no repository at all

    def git(*arguments):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "readme").write_text("x")
    git("add", "readme")
    git("commit", "-m", "one")
    assert git_state(package) == (None, None)  # a repository that does not track the package
    git("add", "venv")
    git("commit", "-m", "two")
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert git_state(package) == (head, False)
    (package / "new.py").write_text("")
    assert git_state(package) == (head, True)


def test_git_missing_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) == (None, None)


def test_software_names_versions():
    known = software()
    assert known["packages"]["numpy"] == np.__version__
    assert set(known) == {"raymerge_version", "git_commit", "git_dirty", "python", "platform", "packages"}


def test_a_package_that_is_not_there_has_no_version(monkeypatch):
    asked = []

    def version(name):
        asked.append(name)
        if name == "ray":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert software()["packages"] == {name: None if name == "ray" else "1" for name in asked} and len(asked) > 5


@pytest.mark.parametrize(
    "text, shown",
    [
        ("s3://AKIA:wJal%2FrX+bPx@bucket/run?region=eu", "s3://***@bucket/run?region=eu"),
        ("--set=output.run=s3://KEY:SECRET@bucket/run", "--set=output.run=s3://***@bucket/run"),
        ("abfs://c@account/run?sas_token=sv%3D2&x=1", "abfs://c@account/run?sas_token=***&x=1"),
        ("s3://b/r?access_key=A&secret_key=B&region=eu", "s3://b/r?access_key=***&secret_key=***&region=eu"),
        ("'s3://AKIA:wJal/rX+bPx@bucket/run' cannot be parsed", "'s3://***@bucket/run' cannot be parsed"),
        ("s3://bucket/run@2", "s3://bucket/run@2"),
        ("http://host:9000/run@2", "http://host:9000/run@2"),
        ("sftp://:SECRET@host/run", "sftp://***@host/run"),
        ("OWNER/NAME@REVISION:FILE me@example.org", "OWNER/NAME@REVISION:FILE me@example.org"),
    ],
)
def test_credentials_in_uris_are_not_shown(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets({"a": [text, 1, None], "b": (text, {"c": text})}) == {
        "a": [shown, 1, None],
        "b": [shown, {"c": shown}],
    }


def test_no_table_of_a_run_tells_credentials(tmp_path):
    config = {"plan": {"similarity_run": "s3://KEY:SECRET@bucket/a"}, "output": {"run": "s3://KEY:SECRET@bucket/run"}}
    for _ in range(2):
        run = RunDirectory.open(tmp_path / "run", config, "search")
    run.write_manifest(command=["raymerge", "search", "--out", "s3://KEY:SECRET@bucket/run"])
    written = [file.read_text() for file in (tmp_path / "run").iterdir()]
    assert len(written) >= 2 and not any("SECRET" in text for text in written)


def test_arguments_without_folders_keep_their_names():
    said = {
        "/home/anna/secret/models/x": "x",
        "/home/anna/a b/c d.json": "c d.json",
        "~/models/x": "x",
        "~anna/x": "x",
        "../../anna/x": "x",
        "--model=/home/anna/x": "--model=x",
        "data.tasks=[/home/anna/a.json, '/b/c.yaml',d/e.json]": "data.tasks=[a.json, 'c.yaml',d/e.json]",
        'data.mmlu="/home/anna/mmlu"': 'data.mmlu="mmlu"',
        "file:///home/anna/run": "run",
        "fsspec+file:///home/anna/run": "run",
        "owner/name": "owner/name",
        "runs/demo/alphas.json": "runs/demo/alphas.json",
        "s3://bucket/run/x": "s3://bucket/run/x",
        "hf://datasets/a/b/c.txt": "hf://datasets/a/b/c.txt",
        "plan.merges=4": "plan.merges=4",
        "0.5": "0.5",
    }
    assert without_folders(list(said)) == list(said.values())
