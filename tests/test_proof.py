"""proof.py and reload.py: a saved merge is found to be what was scored, and one that is not is found out."""

import copy
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import raymerge.proof
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.forward import LayerRunner
from raymerge.merging import save_merged, saved_proof, saved_record
from raymerge.plan import PlanError, base_plan, before_last_plan, tail_plan
from raymerge.positions import ContextLimit, context_limit
from raymerge.prompts import Group, Shard
from raymerge.proof import NEW_TOKENS, PROMPTS, ProofError, check_proof, prove
from raymerge.reload import reload
from raymerge.storage import RunError

PLAN = tail_plan(tiny.N_LAYERS, [0.3, 0.8], name="x", kind="found")


@pytest.fixture
def in_process(monkeypatch):
    """The same steps without the seconds that a process of its own takes."""

    def run(folder, work):
        try:
            reload(str(folder), work)
        except (OSError, ValueError, RuntimeError) as error:
            return subprocess.CompletedProcess([], 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(raymerge.proof, "_run_fresh", run)


def merged(tmp_path, family="llama", plan=PLAN, **options):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "base", family, **options)))
    save_merged(checkpoint, plan, tmp_path / "merged", verify=False)
    return checkpoint, tmp_path / "merged"


def test_the_fresh_process_ends_with_the_one_that_asked(tmp_path):
    """One that is killed or stopped leaves no process behind that fills the machine's memory with a model."""
    os.mkfifo(tmp_path / "request.json")  # which it would wait for
    code = (
        "import os, subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-P', '-m', 'raymerge.reload', *sys.argv[1:], str(os.getpid())])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(raymerge.__file__).parents[1])}
    command = [sys.executable, "-c", code, "folder", str(tmp_path)]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    with pytest.raises(subprocess.TimeoutExpired):
        asking.communicate(timeout=2.0)
    asking.kill()
    asking.communicate(timeout=60.0)  # both have closed the pipe


def test_in_a_fresh_process_the_saved_model_is_the_one_that_was_scored(tmp_path):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "base", "qwen2", dtype=torch.bfloat16)))
    record = save_merged(checkpoint, PLAN, tmp_path / "merged", command=["raymerge", "merge"])
    proof = record["proof"]
    assert proof["passed"] and proof["error"] is None
    assert proof["predictions_equal"] == proof["positions"] > 50
    assert proof["max_difference"] <= proof["tolerance"] < 1e-4 * proof["largest_logit"]
    assert proof["generated_tokens"] == NEW_TOKENS and proof["generated_text"]
    assert json.loads((tmp_path / "merged" / "merge_plan.json").read_text())["proof"] == proof
    assert saved_proof(tmp_path / "merged") == proof
    assert "66 of 66" not in (card := (tmp_path / "merged" / "README.md").read_text())
    assert f"{proof['positions']} of {proof['positions']} next tokens are the same" in card


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_passes_with_room_to_spare(tmp_path, in_process, family):
    if family.startswith("granite4") and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 15):
        pytest.skip("transformers before 5.15 generates nothing by a Granite 4 without state-space layers")
    checkpoint, folder = merged(tmp_path, family, dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    proof = prove(checkpoint, PLAN, folder)
    assert proof["passed"], proof["error"]
    assert proof["max_difference"] < proof["tolerance"] / 4
    assert all(torch.equal(before[n], t) for n, t in load_file(folder / "model.safetensors").items())


#: What config.json of Phi-3.5-mini and Phi-4-mini says, but for sizes, and for the number of factors, which follows.
_PUBLISHED = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 4,
    "num_hidden_layers": tiny.N_LAYERS,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
PUBLISHED = {
    "phi-3.5-mini": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 4,
        "pad_token_id": 2,
        "rope_scaling": {
            "long_factor": [1.08, 1.5, 9.1, 64.5],
            "short_factor": [1.0, 1.02, 1.7, 2.8],
            "type": "longrope",
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.43.3",
    },
    "phi-4-mini": {
        "bos_token_id": 1,
        "eos_token_id": 1,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        "pad_token_id": 1,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": [1.0, 9.1, 47.7], "short_factor": [1.0, 1.4, 2.1], "type": "longrope"},
        "tie_word_embeddings": True,
        "transformers_version": "4.45.0",
    },
}


def published(folder, name):
    """A tiny checkpoint with a published config.json, and weights of the model that transformers makes of it."""
    tiny.make_checkpoint(folder, "phi3", num_hidden_layers=1)
    values = _PUBLISHED | PUBLISHED[name] | {"vocab_size": len(tiny.demo_tokenizer())}
    (folder / "config.json").write_text(json.dumps(values))
    state = tiny.random_model(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).state_dict()
    if values["tie_word_embeddings"]:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, values


def test_a_merge_of_a_published_pythia_has_no_masks(tmp_path, in_process):
    """Its files hold them beside the weights, in float16 with an infinite number; transformers makes its own."""
    before = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 4,
        "num_hidden_layers": tiny.N_LAYERS,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": len(tiny.demo_tokenizer()),
    }
    folder = tiny.make_checkpoint(tmp_path / "base", "gpt_neox", dtype=torch.float16)
    (folder / "config.json").write_text(json.dumps(before))
    state, masks = load_file(folder / "model.safetensors"), {}
    for layer in range(tiny.N_LAYERS):
        prefix = f"gpt_neox.layers.{layer}.attention."
        masks[f"{prefix}bias"] = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
        masks[f"{prefix}masked_bias"] = torch.tensor(-torch.inf, dtype=torch.float16)
        masks[f"{prefix}rotary_emb.inv_freq"] = torch.ones(1)
    save_file(state | masks, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(str(folder))
    assert set(checkpoint) == set(state) and checkpoint.stored_dtypes == {torch.float16}
    save_merged(checkpoint, PLAN, tmp_path / "merged", verify=False)
    after = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert after == before | {"num_hidden_layers": len(PLAN.kept)}
    kept = [name for name in state if not name.startswith(("gpt_neox.layers.3.", "gpt_neox.layers.4."))]
    assert len(PLAN.kept) == 3 and set(load_file(tmp_path / "merged" / "model.safetensors")) == set(kept)
    proof = prove(checkpoint, PLAN, tmp_path / "merged")
    assert proof["passed"], proof["error"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_merge_of_a_published_phi_keeps_its_long_rotary_embedding(tmp_path, in_process, name):
    folder, before = published(tmp_path / "base", name)
    checkpoint = Checkpoint(str(folder))
    assert context_limit(checkpoint.config) == ContextLimit(4096, "original_max_position_embeddings", "longrope")
    save_merged(checkpoint, PLAN, tmp_path / "merged", verify=False)
    after = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert after == {k: v for k, v in before.items() if k != "auto_map"} | {"num_hidden_layers": len(PLAN.kept)}
    proof = prove(checkpoint, PLAN, tmp_path / "merged")
    assert proof["passed"], proof["error"]
    # Logits of transformers' own model, in which the factors, and the one that multiplies cos and sin, count for much.
    merged = Checkpoint(str(tmp_path / "merged"))
    ids = np.random.default_rng(0).integers(5, 800, 200)
    shard = Shard((Group("x", ids[:120], (ids[120:],), (0,)),))
    runner = LayerRunner(merged)
    (state,) = runner.run(runner.embed(shard), runner.plan_layers(base_plan(merged.n_layers)))
    found = runner.vocabulary.normalise(state.last()[1]) @ runner.vocabulary.unembedding_rows(torch.arange(800)).T

    def last_logits(**rope):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64, **tiny.PLAIN)
        model.model.rotary_emb = type(model.model.rotary_emb)(changed(model.config, **rope))
        return tiny.plain_logits(model, ids)[-1, :800]

    expected = last_logits()
    assert (found[0] - expected).abs().max() < 2e-5 * expected.abs().max()
    for other in ({"attention_factor": 1.0}, {"short_factor": [1.0] * len(before["rope_scaling"]["short_factor"])}):
        assert (last_logits(**other) - expected).abs().max() > 1e-2 * expected.abs().max()


def changed(config, **rope):
    config = copy.deepcopy(config)
    config.rope_parameters |= rope
    return config


def test_the_oldest_spelling_of_phis_rotary_embedding_is_refused(tmp_path):
    """transformers 5.24 means to read it, and then lacks a key of its own."""
    folder, values = published(tmp_path / "m", "phi-3.5-mini")
    edit_config(folder, rope_scaling=values["rope_scaling"] | {"type": "su"})
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*m \(model type phi3\): "):
        Checkpoint(str(folder))


def spoil_weight(folder, name, change):
    state = load_file(folder / "model.safetensors")
    state[name] = change(state[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def drop_tensor(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def drop_token(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"] = None
    path.write_text(json.dumps(values))


def spoil_a_token_of_the_last_prompt(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    *others, last = (set(tokenizer(text)["input_ids"]) for text in PROMPTS)
    token = min(last.difference(*others))
    spoil_weight(folder, "model.embed_tokens.weight", lambda w: w.index_fill(0, torch.tensor([token]), torch.nan))


def swap_layer_types(folder):
    """Windows as published ones are: far longer than the prompts, so that no logit tells."""
    types = json.loads((folder / "config.json").read_text())["layer_types"]
    other = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
    edit_config(folder, layer_types=[other[kind] for kind in types])


SPOILED = {
    # One matrix rounded as bfloat16 would: the least that a wrong dtype does.
    "rounding": (
        lambda f: spoil_weight(f, "model.layers.2.mlp.down_proj.weight", lambda w: w.bfloat16().float()),
        "logits differ",
    ),
    "one_gain": (lambda f: spoil_weight(f, "model.norm.weight", lambda w: w * 1.001), "logits differ"),
    "not_a_number": (lambda f: spoil_weight(f, "model.norm.weight", lambda w: w * torch.nan), "differ by up to nan"),
    "not_a_number_in_one_prompt": (spoil_a_token_of_the_last_prompt, "differ by up to nan"),
    "epsilon": (lambda f: edit_config(f, rms_norm_eps=1e-3), "logits differ"),
    "fewer_layers": (lambda f: edit_config(f, num_hidden_layers=2), "tensors are not those"),
    "a_tensor_less": (drop_tensor, "tensors are not those that its config asks for.*layers.1.mlp.up_proj"),
    "another_tokenizer": (drop_token, "tokenizer gives other token ids"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "could not reload and run it: OSError"),
}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            swap_layer_types,
            r"attention of its layers \[0, 1, 2\] .* layer 0 are \(None, None\) instead of \(4096, None\)",
        ),
        (lambda f: edit_config(f, sliding_window=2048), r"layers \[0, 2\] .*\(2048, None\) instead of \(4096, None\)"),
    ],
)
def test_another_attention_window_is_found_out_though_no_logit_differs(tmp_path, in_process, spoil, message):
    checkpoint, folder = merged(tmp_path, "gemma2", sliding_window=4096)
    assert prove(checkpoint, PLAN, folder)["passed"]
    spoil(folder)
    proof = prove(checkpoint, PLAN, folder)
    assert proof["max_difference"] < proof["tolerance"] and re.search(message, proof["error"])


def with_wide_norms(state):
    return {name: tensor.float() + 2**-12 if "norm" in name else tensor for name, tensor in state.items()}


STORED = {
    # As fine-tuning leaves them: the config is the base's, the weights are what was trained.
    "wide_weights": (torch.float32, "bfloat16", lambda state: state, "float32"),
    "narrow_weights": (torch.bfloat16, "float16", lambda state: state, "bfloat16"),
    "wide_norms": (torch.bfloat16, "bfloat16", with_wide_norms, "bfloat16"),
    "two_narrow_ones": (
        torch.bfloat16,
        "bfloat16",
        lambda state: state | {"lm_head.weight": state["lm_head.weight"].half()},
        "bfloat16",
    ),
    "wide_value_head": (
        torch.bfloat16,
        "bfloat16",
        lambda state: state | {"v_head.summary.weight": torch.ones(1, 32)},
        "bfloat16",
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_stored_values_are_what_is_proved_whatever_dtype_the_config_says(tmp_path, in_process, case):
    dtype, declared, change, saved = STORED[case]
    folder = tiny.make_checkpoint(tmp_path / "base", dtype=dtype)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, dtype=declared, torch_dtype=declared)
    proof = save_merged(Checkpoint(str(folder)), PLAN, tmp_path / "merged")["proof"]
    assert proof["passed"] and proof["max_difference"] < proof["tolerance"] / 4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == saved


def test_tensors_that_no_model_has_are_the_base_s_own_affair(tmp_path, in_process):
    """A value head, as reward models keep one; but a tensor that the family has and its config denies is none."""
    folder = tiny.make_checkpoint(tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    state |= {f"model.layers.{n}.self_attn.k_scale": torch.tensor([float(n)]) for n in range(5)}
    save_file(state | {"v_head.summary.weight": torch.ones(1, 32)}, folder / "model.safetensors")
    save_merged(checkpoint := Checkpoint(str(folder)), PLAN, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored["v_head.summary.weight"].shape == (1, 32)
    save_file(stored | {"w_head.weight": torch.ones(1)}, tmp_path / "merged" / "model.safetensors")
    error = prove(checkpoint, PLAN, tmp_path / "merged")["error"]
    assert "w_head" in error and "v_head" not in error and "k_scale" not in error
    save_file(stored | {"model.layers.1.mlp.up_proj.bias": torch.zeros(48)}, tmp_path / "merged" / "model.safetensors")
    error = prove(checkpoint, PLAN, tmp_path / "merged")["error"]
    assert re.search("not those that its config asks for.*layers.1.mlp.up_proj.bias", error)


@pytest.mark.parametrize(
    "options",
    [
        {"stop_strings": ["a"]},
        {"num_return_sequences": 3, "do_sample": True},
        {"return_dict_in_generate": True},
        {"max_time": 0.0},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
)
def test_how_the_base_generates_by_default_is_its_own_affair(tmp_path, in_process, options):
    checkpoint, folder = merged(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(options))
    assert prove(checkpoint, PLAN, folder)["error"] is None


@pytest.mark.parametrize("case", SPOILED)
def test_a_model_that_is_not_the_plan_s_is_found_out_and_kept(tmp_path, in_process, case):
    spoil, message = SPOILED[case]
    checkpoint, folder = merged(tmp_path)
    spoil(folder)
    files = sorted(file.name for file in folder.iterdir())
    proof = prove(checkpoint, PLAN, folder)
    assert not proof["passed"]
    with pytest.raises(ProofError, match=f"(?s){folder} is not the one that was merged: .*{message}.*was left there"):
        check_proof(proof, folder)
    assert sorted(file.name for file in folder.iterdir()) == files
    json.dumps(proof, allow_nan=False)


def test_another_plan_is_found_out(tmp_path, in_process):
    checkpoint, folder = merged(tmp_path)
    assert prove(checkpoint, PLAN, folder)["passed"]
    for other in (
        before_last_plan(5, 2),
        replace(PLAN, norms="fold"),
        PLAN.with_alphas([0.3, 0.79], name="y", kind="x"),
    ):
        assert "logits differ" in prove(checkpoint, other, folder)["error"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_failed_proof_fails_the_save_and_leaves_the_model_with_its_record(tmp_path, monkeypatch, finished):
    """One that was ended, as where memory is short, says nothing of the model."""
    done = subprocess.CompletedProcess([], 1 if finished else -9, "", "ValueError: no such thing")
    monkeypatch.setattr(raymerge.proof, "_run_fresh", lambda *_: done)
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)))
    size = 2 * (tmp_path / "base" / "model.safetensors").stat().st_size / 1e9
    words = (
        "is not the one that was merged: .*no such thing" if finished else "could not be proved: .*ended by signal 9"
    )
    with pytest.raises(ProofError, match=words) as caught:
        save_merged(checkpoint, PLAN, tmp_path / "merged")
    if not finished:
        (needed,) = re.findall(r"its weights take (\S+) GB", str(caught.value))
        assert 0.5 * size < float(needed) < size and "do not use it" not in str(caught.value)
    record = json.loads((tmp_path / "merged" / "merge_plan.json").read_text())
    assert record["proof"]["passed"] is False and record["proof"]["max_difference"] is None
    card = (tmp_path / "merged" / "README.md").read_text()
    assert ("**Failed**" in card) == finished and ("**Not finished**" in card) != finished
    assert Checkpoint(str(tmp_path / "merged")).n_layers == 3
    if finished:
        with pytest.raises(ProofError, match="no such thing"):
            saved_proof(tmp_path / "merged")
    else:
        assert saved_proof(tmp_path / "merged") is None


@pytest.mark.parametrize("where", ["no folder", "request", "logits"])
def test_a_full_temporary_folder_is_no_fault_of_the_model(tmp_path, monkeypatch, where):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "base")))
    if where == "no folder":
        monkeypatch.setattr(raymerge.proof.tempfile, "tempdir", str(tmp_path / "absent"))
    elif where == "request":
        write = Path.write_text

        def full(path, *args, **options):
            if path.name == "request.json":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, *args, **options)

        monkeypatch.setattr(Path, "write_text", full)
    else:  # as safetensors says it
        said = "SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)\n"
        done = subprocess.CompletedProcess([], 1, "", f"Traceback (most recent call last):\n{said}")
        monkeypatch.setattr(raymerge.proof, "_run_fresh", lambda *_: done)
    with pytest.raises(ProofError, match="could not be proved: .*its logits take 0.5 MB: free space, or set TMPDIR"):
        save_merged(checkpoint, PLAN, tmp_path / "merged")
    assert saved_proof(tmp_path / "merged") is None  # the same command proves it


@pytest.mark.parametrize("name", ["merge_plan.json", "README.md"])
def test_what_a_write_that_broke_off_was_to_replace_is_still_there(tmp_path, in_process, monkeypatch, name):
    checkpoint, replace_file = Checkpoint(str(tiny.make_checkpoint(tmp_path / "base"))), os.replace

    def break_off(source, target):
        if str(target).endswith(f"merged/{name}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", break_off)
    with pytest.raises(RunError, match=f"disk full: .*merged/{name}"):
        save_merged(checkpoint, PLAN, tmp_path / "merged")
    assert saved_record(tmp_path / "merged")["proof"] is None and saved_proof(tmp_path / "merged") is None
    assert "was not reloaded" in (tmp_path / "merged" / "README.md").read_text() or name == "merge_plan.json"
    assert not list((tmp_path / "merged").glob("_tmp*"))


@pytest.mark.parametrize("text", [None, "", '{"plan_id": "12', "[]", "{}", "\udcff"])
def test_a_record_that_was_cut_off_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "merge_plan.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    for read in (saved_record, saved_proof):
        with pytest.raises(PlanError, match=f"{tmp_path}/merge_plan.json cannot be read: .*; delete {tmp_path}, and"):
            read(tmp_path)


def test_a_vocabulary_of_several_pieces_is_compared_as_one(tmp_path, in_process, monkeypatch):
    checkpoint, folder = merged(tmp_path)
    whole = prove(checkpoint, PLAN, folder)
    monkeypatch.setattr(raymerge.proof, "VOCABULARY_ROWS", 300)
    pieces = prove(checkpoint, PLAN, folder)
    assert pieces["passed"] and pieces["largest_logit"] == pytest.approx(whole["largest_logit"], rel=1e-5)


def test_without_a_tokenizer_the_prompts_are_token_ids(tmp_path, in_process):
    folder = tiny.make_checkpoint(tmp_path / "base")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    checkpoint = Checkpoint(str(folder))
    save_merged(checkpoint, PLAN, tmp_path / "merged", verify=False)
    proof = prove(checkpoint, PLAN, tmp_path / "merged")
    assert proof["passed"] and proof["positions"] == 72
    assert proof["generated_tokens"] == NEW_TOKENS and proof["generated_text"] is None


def test_the_fresh_process_reads_nothing_but_the_folder(tmp_path):
    """Where the folder is not one, the process ends with transformers' reason."""
    checkpoint, folder = merged(tmp_path)
    shutil.rmtree(folder)
    proof = prove(checkpoint, PLAN, folder)
    assert "could not reload and run it" in proof["error"] and proof["passed"] is False
