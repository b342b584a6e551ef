"""gguf_input.py: a llama.cpp file becomes the checkpoint that transformers makes of it, once, named by content."""

import hashlib
import importlib.util
import json

import gguf
import pytest
import tiny
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file

import raymerge.gguf_input
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.gguf_input import GgufError, converted_gguf
from raymerge.merging import save_merged
from raymerge.plan import tail_plan


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "raymerge" / "gguf"


@pytest.fixture
def model():
    config = tiny.config_of("llama", intermediate_size=64, vocab_size=64, num_hidden_layers=3)
    return tiny.random_model(config)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path, cache, model, quantised, monkeypatch):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "tiny.gguf"
    exact = write_gguf(path, model, quantised)
    checkpoint = Checkpoint(str(path))
    assert checkpoint.dtype == (torch.bfloat16 if quantised else torch.float32)
    assert set(checkpoint) == set(exact)
    for name, values in exact.items():
        assert torch.equal(checkpoint[name], values.to(checkpoint.dtype)), name
    assert not checkpoint.tied and checkpoint.n_layers == 3
    assert checkpoint.tokenizer("ab")["input_ids"] == [61]
    source = checkpoint.source
    assert source["file"] == "tiny.gguf" and source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert next(iter(source["values_by_type"])) == ("Q8_0" if quantised else "F32")
    # Once: by the folder, and by a copy under another name, the same conversion is found.
    monkeypatch.setattr(raymerge.gguf_input, "_convert", None)
    assert Checkpoint(str(path.parent)).directory == checkpoint.directory == cache / source["sha256"][:16]
    assert converted_gguf(path.rename(tmp_path / "renamed.gguf")) == checkpoint.directory
    assert sorted(file.name for file in cache.iterdir()) == [source["sha256"][:16], f"{source['sha256'][:16]}.lock"]


def test_a_merge_of_it_says_where_it_came_from(tmp_path, model):
    write_gguf(tmp_path / "tiny.gguf", model, True)
    checkpoint = Checkpoint(str(tmp_path / "tiny.gguf"))
    plan = tail_plan(3, [0.5], name="x", kind="found")
    record = save_merged(checkpoint, plan, tmp_path / "merged", verify=False)
    assert record["gguf_source"] == checkpoint.source
    assert json.loads((tmp_path / "merged" / "merge_plan.json").read_text())["gguf_source"] == checkpoint.source
    card = (tmp_path / "merged" / "README.md").read_text()
    assert checkpoint.source["sha256"] in card and "# tiny.gguf, 1 layers" in card
    assert "mergekit reads no GGUF" in record["mergekit"]
    # The merge itself is no GGUF file.
    assert Checkpoint(str(tmp_path / "merged")).source is None
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_without_the_package_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GgufError, match=r"x.gguf needs the package gguf.*pip install 'raymerge\[gguf\]'"):
        Checkpoint(str(tmp_path / "x.gguf"))


def test_several_files_in_a_folder_are_not_chosen_among(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(GgufError, match=r"2 GGUF files \(a.gguf, b.gguf\): name one"):
        Checkpoint(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 4, 200, -100])
def test_a_damaged_file_is_refused_by_name_and_nothing_is_kept(tmp_path, cache, model, keep):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, True)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises((GgufError, CheckpointError), match=r"tiny.gguf cannot be read as GGUF"):
        Checkpoint(str(path))
    assert all(file.suffix == ".lock" for file in cache.iterdir())


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GgufError, match="x.gguf cannot be read as GGUF"):
        Checkpoint(str(tmp_path / "x.gguf"))
