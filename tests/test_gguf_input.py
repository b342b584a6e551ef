"""gguf_input.py: a llama.cpp file becomes the checkpoint that transformers makes of it, once, named by content."""

import errno
import hashlib
import importlib.util
import json
import os

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf_files import write_gguf
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import raymerge.gguf_input
from raymerge import file_hashes
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.gguf_input import GgufError, _check_read_whole, converted_gguf
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
    assert Checkpoint(str(path.parent)).directory == checkpoint.directory
    assert converted_gguf(path.rename(tmp_path / "renamed.gguf")) == checkpoint.directory
    name = f"{source['sha256'][:16]}-{raymerge.gguf_input._VERSION}"
    assert sorted(file.name for file in cache.iterdir()) == [name, f"{name}.lock"]


def test_what_earlier_code_converted_is_not_used(tmp_path, model, cache, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", model, False)
    first = converted_gguf(tmp_path / "tiny.gguf")
    unversioned = cache / first.name.partition("-")[0]  # as it was called when nothing was checked
    first.rename(unversioned)
    assert converted_gguf(tmp_path / "tiny.gguf") == first and (first / "config.json").is_file()
    monkeypatch.setattr(raymerge.gguf_input, "_VERSION", raymerge.gguf_input._VERSION + 1)
    later = converted_gguf(tmp_path / "tiny.gguf")
    assert later != first and (later / "config.json").is_file()


def test_the_hash_of_the_file_is_told_with_those_of_what_was_made_of_it(tmp_path, model, monkeypatch):
    monkeypatch.setattr(file_hashes, "_known", {})
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", -1)
    write_gguf(tmp_path / "tiny.gguf", model, False)
    checkpoint = Checkpoint(str(tmp_path / "tiny.gguf"))
    assert checkpoint.identity and len(checkpoint.known_hashes) == 2
    assert checkpoint.source["sha256"] in dict(checkpoint.known_hashes).values()


def test_a_merge_of_it_says_where_it_came_from(tmp_path, model):
    write_gguf(tmp_path / "tiny.gguf", model, True)
    checkpoint = Checkpoint(str(tmp_path / "tiny.gguf"))
    plan = tail_plan(3, [0.5], name="x", kind="found")
    record = save_merged(checkpoint, plan, tmp_path / "merged", verify=False)
    assert record["gguf_source"] == checkpoint.source
    assert json.loads((tmp_path / "merged" / "merge_plan.json").read_text())["gguf_source"] == checkpoint.source
    card = (tmp_path / "merged" / "README.md").read_text()
    assert checkpoint.source["sha256"] in card and "# tiny.gguf, 1 layer merged" in card
    assert "mergekit reads no GGUF" in record["mergekit"]
    # The merge itself is no GGUF file.
    assert Checkpoint(str(tmp_path / "merged")).source is None
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    # What llama.cpp's converter and vLLM choose a model's code by, and nothing of where the file was made.
    assert config["architectures"] == ["LlamaForCausalLM"] and "tiny" not in config.values()
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
    assert raymerge.gguf_input.gguf_file_of(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "config.json").write_text("{}")  # a checkpoint, beside which they were made
    assert raymerge.gguf_input.gguf_file_of(tmp_path) is None


@pytest.mark.parametrize("keep", [0, 4, 200, -100])
def test_a_damaged_file_is_refused_by_name_and_nothing_is_kept(tmp_path, cache, model, keep):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, True)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises((GgufError, CheckpointError), match=r"tiny.gguf cannot be read as GGUF"):
        Checkpoint(str(path))
    assert all(file.suffix == ".lock" for file in cache.iterdir())


FAMILIES = {
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {
        "attention_bias": False,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        "layer_types": ["sliding_attention"] * 2,
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "sliding_window": None},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dense_family_is_the_model_that_it_was_made_from(tmp_path, family):
    options = {"vocab_size": 64, "num_hidden_layers": 2} | FAMILIES[family]
    if family.startswith("gemma"):
        options |= {"head_dim": 256, "query_pre_attn_scalar": 256}
    model = tiny.random_model(tiny.config_of(family, **options))
    exact = write_gguf(tmp_path / "x.gguf", model, False, further=lambda writer: writer.add_pad_token_id(0))
    checkpoint = Checkpoint(str(tmp_path / "x.gguf"))
    assert set(checkpoint) == set(exact)
    assert all(torch.equal(checkpoint[name], values) for name, values in exact.items())
    again = AutoModelForCausalLM.from_pretrained(checkpoint.directory, attn_implementation="eager").eval()
    ids = torch.arange(60)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, again(ids).logits
    # Float32 both, but a file has the norms' epsilon in float32.
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def architecture(kind):
    return lambda path, _: closed(gguf.GGUFWriter(path, kind))


def closed(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def with_further(further):
    return lambda path, model: write_gguf(path, model, False, further=further)


def tensor(name):
    return with_further(lambda writer: writer.add_tensor(name, np.ones(4, np.float32)))


def half_rotated(path, model):
    whole = gguf.GGUFWriter.add_rope_dimension_count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_rope_dimension_count", lambda writer, width: whole(writer, width // 2))
        write_gguf(path, model, False)


REFUSED = {
    "rotation": (half_rotated, "rotates a part of each head"),
    "clip": (architecture("clip"), "is of architecture clip, but only llama, qwen2, "),
    "qwen3moe": (architecture("qwen3moe"), "is of architecture qwen3moe, but only"),
    "olmo2": (architecture("olmo2"), "is of architecture olmo2, but only"),
    "smollm3": (architecture("smollm3"), "is of architecture smollm3, but only llama, .* without experts are read"),
    "mixtral": (with_further(lambda w: w.add_expert_count(8)), "is of architecture llama with experts, but only"),
    "older_mixtral": (tensor("blk.0.ffn_gate.0.weight"), "holds blk.0.ffn_gate.0.weight, which transformers does not"),
    # Llama 3.1 and later: transformers would read another rotation from it.
    "rope_freqs": (tensor("rope_freqs.weight"), "holds rope_freqs.weight, which transformers does not read of llama"),
    "mistral3": (architecture("mistral3"), "is of architecture mistral3, but only"),
    "biases": (tensor("blk.2.attn_q.bias"), "holds blk.2.attn_q.bias, which"),
    "scaling": (
        with_further(lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)),
        "scales its rotary frequencies",
    ),
    "factor": (with_further(lambda w: w.add_rope_scaling_factor(4.0)), "scales its rotary frequencies"),
    "old_factor": (
        with_further(lambda w: w.add_float32("llama.rope.scale_linear", 4.0)),
        "scales its rotary frequencies",
    ),
    "window": (with_further(lambda w: w.add_sliding_window(11)), "has a sliding window of 11 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_read_as_another_model_is_refused_before_it_is_converted(
    tmp_path, cache, model, case, monkeypatch
):
    write, message = REFUSED[case]
    write(tmp_path / "x.gguf", model)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(GgufError, match=f"x.gguf {message}.*: give the checkpoint that it was made from") as caught:
        Checkpoint(str(tmp_path / "x.gguf"))
    assert "cannot be read as GGUF" not in str(caught.value)
    assert all(file.suffix == ".lock" for file in cache.iterdir())


@pytest.mark.parametrize("which", ["LONG", "SHORT"])
def test_long_rotary_embeddings_of_phi_are_refused(tmp_path, which):
    """llama.cpp stores Phi-3.5's factors as tensors, from which transformers would read the plain embedding."""
    name = f"{gguf.TENSOR_NAMES[getattr(gguf.MODEL_TENSOR, f'ROPE_FACTORS_{which}')]}.weight"
    options = {"vocab_size": 64, "num_hidden_layers": 2} | FAMILIES["phi3"]
    model = tiny.random_model(tiny.config_of("phi3", **options))
    tensor(name)(tmp_path / "x.gguf", model)
    with pytest.raises(GgufError, match=f"x.gguf holds {name}, which transformers does not read of phi3: give the"):
        Checkpoint(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    "further",
    [
        lambda writer: writer.add_rope_scaling_factor(1.0),
        lambda writer: writer.add_float32("llama.rope.scale_linear", 0.0),
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE),
        lambda writer: writer.add_sliding_window(10**6),
    ],
)
def test_what_changes_nothing_is_not_refused(tmp_path, model, further):
    """A factor of one, and a window that no context is longer than."""
    write_gguf(tmp_path / "x.gguf", model, False, further=further)
    _check_read_whole(tmp_path / "x.gguf", gguf.GGUFReader(tmp_path / "x.gguf"))
    shown = model.config.max_position_embeddings
    write_gguf(tmp_path / "y.gguf", model, False, further=lambda writer: writer.add_sliding_window(shown))
    _check_read_whole(tmp_path / "y.gguf", gguf.GGUFReader(tmp_path / "y.gguf"))


@pytest.mark.parametrize(("family", "width", "only"), [("qwen3", 12, 128), ("gemma2", 128, 256), ("gemma3", 12, 256)])
def test_widths_that_transformers_does_not_read(tmp_path, family, width, only):
    options = {"attention_bias": False} if family == "gemma3" else {}
    config = tiny.config_of(family, vocab_size=64, num_hidden_layers=2, head_dim=width, **options)
    write_gguf(tmp_path / "x.gguf", tiny.random_model(config), False)
    with pytest.raises(
        GgufError, match=f"has heads of width {width}, but transformers reads {family} with {only} alone"
    ):
        Checkpoint(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("family", "key", "stated", "only"),
    [
        ("gemma2", "attn_logit_softcapping", 20, 50),
        ("gemma2", "final_logit_softcapping", 0, 30),
        ("gemma3", "final_logit_softcapping", 30, 0),
        ("gemma3", "rope.freq_base_swa", 500, 10000),
    ],
)
def test_what_transformers_does_not_read_of_gemma_is_refused_where_it_is_not_the_usual(
    tmp_path, family, key, stated, only
):
    options = {"attention_bias": False} if family == "gemma3" else {}
    config = tiny.config_of(family, vocab_size=64, num_hidden_layers=2, head_dim=256, **options)
    stating = lambda writer: writer.add_float32(f"{family}.{key}", stated)  # noqa: E731
    write_gguf(tmp_path / "x.gguf", tiny.random_model(config), False, further=stating)
    with pytest.raises(GgufError, match=f"has {key} = {stated}, which transformers takes for {only} in {family}"):
        Checkpoint(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("change", ["less", "other"])
def test_a_conversion_that_transformers_fills_up_or_fails_is_not_kept(tmp_path, cache, model, change):
    """A tensor that is not there it makes up; one of another shape is its RuntimeError."""
    state = dict(model.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = torch.ones(7, 32)
    if change == "less":
        del state[name]
    model.state_dict = lambda: state
    write_gguf(tmp_path / "x.gguf", model, False)
    words = "ValueError: transformers makes .* values of the" if change == "less" else "RuntimeError"
    with pytest.raises(GgufError, match=f"x.gguf cannot be read as GGUF: {words}"):
        Checkpoint(str(tmp_path / "x.gguf"))
    assert all(file.suffix == ".lock" for file in cache.iterdir())


@pytest.mark.parametrize("which", ["weights", "config", "tokenizer"])
def test_a_full_cache_is_not_held_against_the_file(tmp_path, cache, model, monkeypatch, which):
    """safetensors and tokenizers write in Rust, whose errors are neither OSErrors nor have a number."""
    write_gguf(tmp_path / "x.gguf", model, False)

    def full(*_, **__):
        said = f"{os.strerror(errno.ENOSPC)} (os error 28)"
        raise {"weights": SafetensorError(said), "tokenizer": Exception(said)}.get(which, OSError(errno.ENOSPC, said))

    where = {
        "weights": "raymerge.gguf_input.save_file",
        "config": "transformers.PretrainedConfig.save_pretrained",
        "tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
    }
    monkeypatch.setattr(where[which], full)
    with pytest.raises(GgufError, match=f"x.gguf could not be dequantised into {cache}.*No space.*XDG_CACHE_HOME"):
        converted_gguf(tmp_path / "x.gguf")
    assert all(file.suffix == ".lock" for file in cache.iterdir())


def test_a_conversion_is_on_the_disk_before_it_has_its_name(tmp_path, model, put_on_disk):
    """It is never made again: what a power cut left of it was read from then on."""
    write_gguf(tmp_path / "a.gguf", model, False)
    folder = converted_gguf(tmp_path / "a.gguf")
    assert {path.stat().st_ino for path in folder.iterdir()} == put_on_disk and len(put_on_disk) > 3


def test_a_conversion_is_readable_as_the_umask_says(tmp_path, model):
    write_gguf(tmp_path / "x.gguf", model, False)
    before = os.umask(0o022)
    try:
        folder = converted_gguf(tmp_path / "x.gguf")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
