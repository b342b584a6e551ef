"""saving.py: a merge that plain transformers loads, files of any number, and folders that are whole or not there."""

import errno
import json
import resource
import shutil
import sys
import weakref

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import raymerge.saving
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.forward import LayerRunner
from raymerge.fusion import fused_tensors
from raymerge.plan import base_plan, before_last_plan, tail_plan
from raymerge.saving import _not_written, check_room, check_writable, save_checkpoint
from raymerge.tensorfiles import OpenTensorFile

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the checkpoint that a test may spoil."""
    return shutil.copytree(llama, tmp_path / "copy")


SAVED = {
    "llama": {},
    "llama_biases": {},
    "llama3_rope": {},
    "mistral_window": {},
    "qwen2": {},
    "qwen2_untied": {"tie_word_embeddings": False},
    "qwen2_windows": {},
    "qwen2_windows_before_last": {"max_window_layers": 4},
    "qwen3": {},
    "qwen3_biases": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", SAVED)
def test_a_saved_merge_is_an_ordinary_checkpoint(tmp_path, case):
    """transformers' reload, the strictly loaded fused state dict and the published merging give the same logits."""
    family = case if case in tiny.FAMILIES else next(f for f in sorted(tiny.FAMILIES, key=len)[::-1] if f in case)
    folder = tiny.make_checkpoint(tmp_path / "base", family, **SAVED[case])
    checkpoint = Checkpoint(str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    if case.endswith("before_last"):
        plan = before_last_plan(5, 2)
    else:
        plan = tail_plan(5, [0.3, 0.8], name="x", kind="found")
    written = tiny.save_merge(checkpoint, plan, tmp_path / "merged")

    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.config.num_hidden_layers == 3 and merged.dtype == torch.float32
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert written == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert (checkpoint.architecture.unembedding in stored) is not base.config.tie_word_embeddings

    fused = tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan)
    assert set(fused) == set(stored) and all(torch.equal(fused[name], stored[name]) for name in fused)

    ids = torch.arange(70) * 7 % base.config.vocab_size
    with torch.no_grad():
        found = merged(input_ids=ids[None]).logits[0].double()
    expected = tiny.plain_logits(tiny.merged_model(base, tiny.steps_of(plan)), ids)
    # Float32 against float64: unit roundoff 6e-8, amplified by three layers of large weights.
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()

    out = merged.generate(ids[None, :12], max_new_tokens=5, do_sample=False, use_cache=True)
    slow = merged.generate(ids[None, :12], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(out, slow)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("the red cat")["input_ids"] == checkpoint.tokenizer("the red cat")["input_ids"]
    # A merged model can be merged again.
    again = Checkpoint(str(tmp_path / "merged"))
    kept = [layer.index for layer in plan.kept]
    assert again.size() == checkpoint.size(kept) == (written // 4, written)
    assert again.n_layers == 3 and again.windows == [checkpoint.windows[layer] for layer in kept]


def test_the_unmerged_plan_saves_the_model_itself(llama, tmp_path):
    tiny.save_merge(Checkpoint(str(llama)), base_plan(5), tmp_path / "same")
    one, two = load_file(llama / "model.safetensors"), load_file(tmp_path / "same" / "model.safetensors")
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    first, second = (json.loads((f / "config.json").read_text()) for f in (llama, tmp_path / "same"))
    assert first == second


def test_the_stored_dtype_is_kept_whatever_computed(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    checkpoint = Checkpoint(str(folder))
    LayerRunner(checkpoint, dtype=torch.float32)  # must not change what the config says
    tiny.save_merge(checkpoint, tail_plan(5, [0.4], name="x", kind="found"), tmp_path / "merged")
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_several_shards(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(raymerge.saving, "_SHARD_BYTES", 50_000)
    checkpoint, plan = Checkpoint(str(llama)), tail_plan(5, [0.4], name="x", kind="found")
    written = tiny.save_merge(checkpoint, plan, tmp_path / "merged")
    files = sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    sizes = 0
    for file in files:
        with safe_open(tmp_path / "merged" / file, framework="pt") as opened:
            names = set(opened.keys())
            held = sum(opened.get_tensor(n).numel() * 4 for n in names)
        assert names == {name for name, where in index["weight_map"].items() if where == file}
        assert held <= 50_000 or len(names) == 1
        sizes += held
    assert sizes == written == index["metadata"]["total_size"]
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    fused = tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan)
    assert all(torch.equal(state[name], fused[name]) for name in fused)


def test_two_shards_have_an_index_and_one_has_none(llama, tmp_path, monkeypatch):
    checkpoint, plan = Checkpoint(str(llama)), tail_plan(5, [0.4], name="x", kind="found")
    written = tiny.save_merge(checkpoint, plan, tmp_path / "one")
    monkeypatch.setattr(raymerge.saving, "_SHARD_BYTES", int(0.7 * written))
    tiny.save_merge(checkpoint, plan, tmp_path / "two")
    found = [sorted(file.name for file in (tmp_path / name).glob("model*")) for name in ("one", "two")]
    assert found == [["model.safetensors"], ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                                             "model.safetensors.index.json"]]  # fmt: skip
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_tokenizer_generation_config_and_chat_template_are_carried(copy, tmp_path):
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.5, "do_sample": true}')
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "special_tokens_map.json").write_text("{}")
    (copy / "README.md").write_text("about the base")
    tiny.save_merge(
        Checkpoint(str(copy)),
        tail_plan(5, [0.4], name="x", kind="found"),
        tmp_path / "merged",
        extra_files={"README.md": "about the merge, größer", "plan.json": "[]"},
    )
    merged = tmp_path / "merged"
    for name in ("generation_config.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer.json"):
        assert (merged / name).read_bytes() == (copy / name).read_bytes()
    assert (merged / "README.md").read_text(encoding="utf-8") == "about the merge, größer"
    assert (merged / "plan.json").read_text() == "[]"
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.generation_config.eos_token_id == [2, 3] and model.generation_config.temperature == 0.5


def test_templates_terms_and_every_tokenizer_s_files_are_carried_and_no_credentials(copy, tmp_path):
    carried = [
        "additional_chat_templates/tool_use.jinja",
        *("tekken.json", "tokenizer.model.v3", "LICENSE", "LICENSE-MODEL", "Notice.txt", "license.md"),
    ]
    left = ["token", "token.txt", "tokens.json", "token.json", "special", "vocabulary.bak", "licenses.db", "notices"]
    (copy / "additional_chat_templates").mkdir()
    for name in [*carried, *left]:
        (copy / name).write_text("{}")
    tiny.save_merge(Checkpoint(str(copy)), tail_plan(5, [0.4], name="x", kind="found"), tmp_path / "merged")
    files = [file for file in (tmp_path / "merged").rglob("*") if file.is_file()]
    ours = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {str(file.relative_to(tmp_path / "merged")) for file in files} == ours | set(carried)
    assert set(AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template) == {"tool_use"}


def test_tensors_come_in_any_order_and_none_may_be_missing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(raymerge.saving, "_SHARD_BYTES", 50_000)
    checkpoint, plan = Checkpoint(str(llama)), tail_plan(5, [0.4], name="x", kind="found")
    fused = tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan)
    kept = [layer.index for layer in plan.kept]
    save_checkpoint(checkpoint, reversed(fused.items()), kept, tmp_path / "merged")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(state[name], fused[name]) for name in fused)
    gone = fused.pop("model.layers.2.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="1 tensors were not written, such as model.layers.2.mlp.up_proj.weight"):
        save_checkpoint(checkpoint, fused.items(), kept, tmp_path / "less")
    with pytest.raises(ValueError, match=r"up_proj.weight is torch.float32 \(48, 31\), but the file has room for F32"):
        save_checkpoint(checkpoint, [("model.layers.2.mlp.up_proj.weight", gone[:, 1:])], kept, tmp_path / "less")
    assert not list(tmp_path.glob("*less"))


def test_no_tensor_is_held_once_it_is_written(llama, tmp_path):
    checkpoint, plan = Checkpoint(str(llama)), tail_plan(5, [0.4], name="x", kind="found")
    written = []

    def tensors():
        for name, tensor in fused_tensors(checkpoint, checkpoint.architecture, plan):
            own = tensor.clone()
            written.append(weakref.ref(own))
            del tensor
            yield name, own
            del own
            assert sum(tensor() is not None for tensor in written) <= 1  # the loop that writes still names the last

    save_checkpoint(checkpoint, tensors(), [layer.index for layer in plan.kept], tmp_path / "merged")
    assert len(written) == len(Checkpoint(str(tmp_path / "merged")))


def test_an_existing_folder_is_not_touched(llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="mine exists already: give another folder"):
        tiny.save_merge(Checkpoint(str(llama)), base_plan(5), tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_nothing(llama, tmp_path, monkeypatch):
    calls = []
    write = OpenTensorFile.write

    def fill(self, name, tensor):
        calls.append(name)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(OpenTensorFile, "write", fill)
    monkeypatch.setattr(raymerge.saving, "_SHARD_BYTES", 50_000)
    with pytest.raises(CheckpointError, match=r"could not write .*merged: .*No space left.*left behind. Free"):
        tiny.save_merge(Checkpoint(str(llama)), base_plan(5), tmp_path / "sub" / "merged")
    assert len(calls) == 2
    assert not list((tmp_path / "sub").iterdir())


def test_a_disk_without_room_for_the_weights_is_said_before_it_is_filled(llama, tmp_path, monkeypatch):
    tensors = list(fused_tensors(checkpoint := Checkpoint(str(llama)), checkpoint.architecture, base_plan(5)))
    needed = sum(tensor.nbytes for _, tensor in tensors)
    taken, kept = iter(tensors), list(range(5))
    monkeypatch.setattr(raymerge.saving, "free_bytes", lambda folder: needed - 1)
    with pytest.raises(
        CheckpointError,
        match=rf"could not write .*merged: .*No space left.* take {needed / 1e3:.1f} kB, its .* kB free; ",
    ):
        save_checkpoint(checkpoint, taken, kept, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(raymerge.saving, "free_bytes", lambda folder: needed)
    assert save_checkpoint(checkpoint, taken, kept, tmp_path / "merged") == needed  # none of which was taken before


def test_what_a_killed_call_has_left_on_the_disk_is_room(llama, tmp_path, monkeypatch):
    """As many blocks as it takes, not as long as it is, since a file is laid out before it is filled."""
    checkpoint, kept, out = Checkpoint(str(llama)), list(range(5)), tmp_path / "merged"
    needed, left = checkpoint.size()[1], tmp_path / "_tmp.merged"
    monkeypatch.setattr(raymerge.saving, "free_bytes", lambda folder: needed - 4096)
    left.mkdir()
    (left / "gone.safetensors").symlink_to("nowhere")  # as one that another process has just renamed
    with pytest.raises(CheckpointError, match="No space left"):
        check_room(checkpoint, kept, out)
    (left / "gone.safetensors").unlink()
    with (left / "laid_out.safetensors").open("wb") as file:
        file.truncate(1 << 20)
    with pytest.raises(CheckpointError, match="No space left"):
        check_room(checkpoint, kept, out)
    (left / "written.safetensors").write_bytes(b"x" * 4096)
    check_room(checkpoint, kept, out)
    monkeypatch.setattr(raymerge.saving, "free_bytes", lambda folder: sys.maxsize)  # of a disk that does not say
    assert "take" in (said := str(_not_written(out, needed, "why"))) and "free" not in said.partition("; nothing")[0]


def test_a_write_that_the_system_refuses(llama, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="could not write .*merged: .*too large.*nothing was left behind"):
            tiny.save_merge(Checkpoint(str(llama)), base_plan(5), tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_nothing(llama, tmp_path):
    checkpoint = Checkpoint(str(llama))

    def tensors():
        yield "model.norm.weight", checkpoint["model.norm.weight"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(checkpoint, tensors(), [0], tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_two_saves_into_one_folder_do_not_mix(llama, tmp_path):
    """The one that began later has taken the unfinished folder; what it has written so far must not become a model."""
    checkpoint = Checkpoint(str(llama))
    tensors = list(fused_tensors(checkpoint, checkpoint.architecture, base_plan(checkpoint.n_layers)))

    def overtaken():
        yield from tensors
        shutil.rmtree(tmp_path / "_tmp.merged")
        (tmp_path / "_tmp.merged").mkdir()
        (tmp_path / "_tmp.merged" / "model.safetensors").write_text("half of the other's")

    with pytest.raises(CheckpointError, match="another process is saving"):
        save_checkpoint(checkpoint, overtaken(), list(range(checkpoint.n_layers)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert [file.name for file in (tmp_path / "_tmp.merged").iterdir()] == ["model.safetensors"], "not ours to delete"


def test_what_a_killed_process_left_does_not_stay(llama, tmp_path):
    (tmp_path / "_tmp.merged").mkdir()
    (tmp_path / "_tmp.merged" / "shard-9.safetensors").write_text("half")
    tiny.save_merge(Checkpoint(str(llama)), base_plan(5), tmp_path / "merged")
    assert not (tmp_path / "_tmp.merged").exists()
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == ["model.safetensors"]


def test_a_damaged_tokenizer_config_is_named_where_it_lies(copy, tmp_path):
    (copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"{copy}/tokenizer_config.json cannot be read: .*; fetch it again"):
        tiny.save_merge(Checkpoint(str(copy)), base_plan(5), tmp_path / "merged")


@pytest.mark.parametrize("declared", ["float32", "bfloat16"])
def test_a_base_of_several_dtypes_is_read_in_the_one_that_it_says_and_its_merge_too(tmp_path, declared):
    """In bfloat16, that of the matrices, norms that the base's readers have in float32 would be rounded."""
    folder = tiny.make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.float() + 2**-12 if "norm" in name else tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"dtype": declared}))
    tiny.save_merge(Checkpoint(str(folder)), tail_plan(5, [0.4], name="x", kind="found"), tmp_path / "merged")
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "merged"))
    assert merged.dtype == base.dtype == getattr(torch, declared)
    assert torch.equal(merged.model.norm.weight, base.model.norm.weight)


def test_a_merge_that_the_stored_dtype_cannot_hold(copy, tmp_path):
    state = {name: tensor.half() for name, tensor in load_file(copy / "model.safetensors").items()}
    for layer in (3, 4):
        state[f"model.layers.{layer}.input_layernorm.weight"] *= 1000
        state[f"model.layers.{layer}.self_attn.q_proj.weight"] *= 1000
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    plan = tail_plan(5, [0.4], name="x", kind="found", norms="fold")
    with pytest.raises(
        CheckpointError, match=r"layers.3.self_attn.q_proj.weight of the merged .* torch.float16 cannot"
    ):
        tiny.save_merge(Checkpoint(str(copy)), plan, tmp_path / "merged")


def test_where_nothing_can_be_written_is_told_and_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new" / "deeper" / "merged")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write .*file/merged: .*Not a directory.*give another folder"):
        check_writable(tmp_path / "file" / "merged")


def test_a_model_is_on_the_disk_before_it_has_its_name(tmp_path, llama, put_on_disk):
    """A record that says that it was proved is no proof of what a power cut left."""
    checkpoint = Checkpoint(str(llama))
    tensors = fused_tensors(checkpoint, checkpoint.architecture, base_plan(5))
    save_checkpoint(checkpoint, tensors, list(range(5)), tmp_path / "out", extra_files={"merge_plan.json": "{}"})
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} == put_on_disk and len(put_on_disk) > 3
