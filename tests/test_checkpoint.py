"""checkpoint.py: opening, identity and refusals."""

import errno
import json
import re
import shutil
import sys

import huggingface_hub
import pytest
import tiny
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raymerge.architectures import ArchitectureError
from raymerge.checkpoint import Checkpoint, CheckpointError, is_on_hub, resolve_model
from raymerge.demo import MODEL_PATH
from raymerge.plan import tail_plan

torch.set_num_threads(1)

# The hub's HTTP client, whose own errors some failures are: httpx, or httpx2 from huggingface_hub 2 on.
http_client = sys.modules[next(c.__module__ for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError").split(".")[0]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the checkpoint that a test may spoil."""
    return shutil.copytree(llama, tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


# -- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_that_transformers_loads(tmp_path, family):
    folder = tiny.make_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16)
    checkpoint = Checkpoint(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    for name in state:
        assert checkpoint[name].dtype == torch.bfloat16
        assert torch.equal(checkpoint[name], state[name])
    assert checkpoint.dtype == torch.bfloat16 and checkpoint.n_layers == 5
    assert set(checkpoint) == set(state) - ({"lm_head.weight"} if family == "qwen2" else set())
    assert checkpoint.tied == (family == "qwen2")
    assert len(checkpoint) == len(set(checkpoint))
    parameters = sum(tensor.numel() for tensor in model.parameters())
    assert checkpoint.size() == (parameters, 2 * parameters)
    with pytest.raises(KeyError, match="nothing"):
        checkpoint["nothing"]


def test_a_layer_is_converted_and_the_stored_one_is_not(llama):
    checkpoint = Checkpoint(str(llama))
    layer = checkpoint.layer(3, dtype=torch.float64)
    state = load_file(llama / "model.safetensors")
    expected = {name for name in state if name.startswith("model.layers.3.")}
    assert {f"model.layers.3.{name}" for name in layer} == expected
    assert sorted(checkpoint.layer_tensors(3)) == sorted(layer)
    assert all(torch.equal(value, state[f"model.layers.3.{name}"].double()) for name, value in layer.items())
    assert checkpoint["model.layers.3.mlp.up_proj.weight"].dtype == torch.float32


def test_layer_one_is_not_layer_ten(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "m", "llama", num_hidden_layers=11)
    checkpoint = Checkpoint(str(folder))
    assert len(checkpoint.layer_tensors(1)) == len(checkpoint.layer_tensors(10)) == 9


def test_shards_are_read_through_their_index(llama, tmp_path):
    sharded = tiny.make_checkpoint(tmp_path / "m", "llama", shard="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one, many = Checkpoint(str(llama)), Checkpoint(str(sharded))
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert one.identity != many.identity  # other files, though the same weights


def test_other_safetensors_beside_the_model_are_not_the_model(copy):
    """As Mistral publishes them: the same weights again under other names in consolidated.safetensors."""
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, copy / "consolidated.safetensors")
    assert "layers.0.attention.wq.weight" not in Checkpoint(str(copy))


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "m", "llama", shard="60KB")
    single = tiny.make_checkpoint(tmp_path / "single", "llama", seed=5)
    shutil.copy(single / "model.safetensors", folder)
    found, loaded = Checkpoint(str(folder)), AutoModelForCausalLM.from_pretrained(folder, **tiny.PLAIN).state_dict()
    assert all(torch.equal(found[name], loaded[name]) for name in found)


def test_an_index_names_files_of_its_folder(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "m", "llama", shard="60KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../m/model-00001'))
    with pytest.raises(
        CheckpointError, match=r"index.json names '../m/model-00001.*', which is not a file in its folder"
    ):
        Checkpoint(str(folder))


def test_rotary_buffers_of_old_checkpoints_are_no_weights(copy, tmp_path):
    """Llama 2's files hold them; transformers computes them."""
    state = load_file(copy / "model.safetensors")
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(5)}
    save_file(state | buffers, copy / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(str(copy))
    assert set(checkpoint) == set(state)
    assert "self_attn.rotary_emb.inv_freq" not in checkpoint.layer(0, dtype=torch.float32)


def test_demo_and_folders_and_tilde(llama, monkeypatch):
    assert resolve_model("demo") == MODEL_PATH
    assert resolve_model(str(llama)) == llama
    monkeypatch.setenv("HOME", str(llama.parent))
    assert resolve_model(f"~/{llama.name}") == llama


# -- identity --------------------------------------------------------------------------------------------------------


def test_identity_is_of_the_content_not_of_the_place(llama, copy):
    one = Checkpoint(str(llama)).identity
    assert len(one) == 16 and int(one, 16) >= 0
    edit_config(copy, _name_or_path="elsewhere", transformers_version="4.40.0")
    (copy / "README.md").write_text("a note")
    assert Checkpoint(str(copy)).identity == one


def test_identity_changes_with_one_weight_and_with_the_config(llama, copy):
    one = Checkpoint(str(llama)).identity
    edit_config(copy, rms_norm_eps=2e-5)
    assert Checkpoint(str(copy)).identity != one
    shutil.copyfile(llama / "config.json", copy / "config.json")
    state = load_file(copy / "model.safetensors")
    state["model.layers.4.mlp.down_proj.weight"][3, 7] += 2**-20
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(str(copy)).identity != one


def test_identity_changes_with_the_models_own_code_where_that_is_run(copy, tmp_path, monkeypatch):
    """A run was continued, and cached states were taken, that other code had made."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    plain = Checkpoint(str(copy)).identity
    assert Checkpoint(str(copy), trust_remote_code=True).identity == plain
    (copy / "convert.py").write_text("")  # which nothing runs
    assert Checkpoint(str(copy), trust_remote_code=True).identity == plain
    code = "from transformers import LlamaConfig, LlamaForCausalLM\nclass OwnConfig(LlamaConfig):\n    pass\n"
    code += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    edit_config(copy, auto_map={"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"})
    found = []
    for text in (code, code + "# otherwise\n"):
        (copy / "own_code.py").write_text(text)
        found.append([Checkpoint(str(copy), trust_remote_code=trusted).identity for trusted in (False, True)])
    (untrusted, one), (still, another) = found
    assert untrusted == still and len({plain, untrusted, one, another}) == 4


def test_a_models_own_code_with_other_modules_is_refused(copy, tmp_path, monkeypatch):
    """As Phi-3's, whose attention holds the rotary embedding; the first worker ended with an AttributeError."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = "from transformers import LlamaConfig, LlamaForCausalLM\nclass OtherConfig(LlamaConfig):\n    pass\n"
    code += "class OtherModel(LlamaForCausalLM):\n    config_class = OtherConfig\n    def __init__(self, config):\n"
    code += "        super().__init__(config)\n        del self.model.rotary_emb\n"
    edit_config(copy, auto_map={"AutoConfig": "other.OtherConfig", "AutoModelForCausalLM": "other.OtherModel"})
    (copy / "other.py").write_text(code)
    assert Checkpoint(str(copy)).n_layers == tiny.N_LAYERS
    with pytest.raises(CheckpointError, match="without model.rotary_emb.*leave trust_remote_code off, since .* llama"):
        Checkpoint(str(copy), trust_remote_code=True)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_missing_folders(tmp_path):
    for path in (str(tmp_path / "absent"), "./absent", "absent", "a/b/c", "~/absent-folder/x"):
        with pytest.raises(CheckpointError, match="there is no model folder .*give a folder, a hub id"):
            resolve_model(path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=f"there is no model folder {tmp_path}/nothing"):
        Checkpoint(tmp_path / "nothing")  # Python's users have paths
    with pytest.raises(CheckpointError, match="there is no model folder"):
        resolve_model(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        Checkpoint(str(tmp_path / "empty"))
    model = tmp_path / "empty" / "models" / "found_bayes"  # of a run's folder, what is meant is the model in it
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"did you mean a run's model, {model}\\?"):
        Checkpoint(str(tmp_path / "empty"))
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="but an adapter; merge it into its base first"):
        Checkpoint(str(tmp_path / "empty"))


def test_missing_shard(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "m", "llama", shard="60KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"weight files are missing: {gone}"):
        Checkpoint(str(folder))


def test_missing_tensors(copy):
    state = load_file(copy / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"):
        del state[name]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 3 tensors .*embed_tokens.*model.layers.2.mlp.up_proj.*lm_head"):
        Checkpoint(str(copy))


def test_a_config_of_more_layers_than_there_are(copy):
    edit_config(copy, num_hidden_layers=6)
    with pytest.raises(CheckpointError, match="lacks 7 tensors .*model.layers.5"):
        Checkpoint(str(copy))


def test_pickles_are_never_loaded(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no .safetensors weights$"):
        Checkpoint(str(copy))
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle, which raymerge never loads"):
        Checkpoint(str(copy))


def test_a_config_of_fewer_layers_than_there_are(copy):
    edit_config(copy, num_hidden_layers=4)
    with pytest.raises(
        CheckpointError, match=r"says 4 layers, but there are tensors of layer 4, such as model.layers.4"
    ):
        Checkpoint(str(copy))


def test_a_config_that_transformers_cannot_build(copy):
    edit_config(copy, hidden_act="nothing_known")
    with pytest.raises(CheckpointError, match="transformers cannot (build|read).*nothing_known"):
        Checkpoint(str(copy))


@pytest.mark.parametrize("family", ["gpt_neox", "stablelm"])
def test_a_width_of_heads_that_the_familys_code_does_not_read(tmp_path, family):
    """Scoring would have cut states by it, and ended with a trace."""
    folder = tiny.make_checkpoint(tmp_path / "m", family)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"head_dim": 64}))
    with pytest.raises(
        CheckpointError, match=f"head_dim = 64, but a {family} of 4 heads has 8 dimensions in each: take"
    ):
        Checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.3.mlp.down_proj.weight", (48, 32)),
        ("model.layers.0.self_attn.k_proj.weight", (32, 32)),
        ("model.layers.4.input_layernorm.weight", (31,)),
        ("lm_head.weight", (7, 32)),
    ],
)
def test_a_tensor_of_another_shape(copy, name, shape):
    state = load_file(copy / "model.safetensors") | {name: torch.ones(shape)}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: {name} has shape \({shape[0]}, ?.*but the config .* expects"
    ):
        Checkpoint(str(copy))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_no_number_is_refused_when_its_tensor_is_read(copy, tmp_path, value, dtype):
    state = {name: tensor.to(dtype) for name, tensor in load_file(copy / "model.safetensors").items()}
    state["model.layers.1.mlp.up_proj.weight"][47, 31] = value
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(str(copy))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="model.layers.1.mlp.up_proj.weight holds NaN or infinite values"):
            _ = checkpoint["model.layers.1.mlp.up_proj.weight"]
    assert checkpoint["model.layers.0.mlp.up_proj.weight"].isfinite().all()
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight holds NaN"):
        tiny.save_merge(checkpoint, tail_plan(5, [0.4], name="x", kind="found"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "_tmp.merged").exists()


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_unembedding_that_is_stored_all_the_same(tmp_path, equal):
    """As transformers does: the same matrix is one matrix, another one is used."""
    folder = tiny.make_checkpoint(tmp_path / "m", "qwen2")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1 if equal else 2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(str(folder))
    tiny.save_merge(checkpoint, tail_plan(5, [0.4], name="x", kind="found"), tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not equal
    assert torch.equal(checkpoint["lm_head.weight"], state["lm_head.weight"])
    if equal:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_unembedding_of_its_own_may_be_the_embedding_once_more(copy):
    state = load_file(copy / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(str(copy))
    assert not checkpoint.tied and "lm_head.weight" in set(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: .*; fetch it again"):
        Checkpoint(str(copy))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.2.input_layernorm.weight"),
        ("nemotron", "model.layers.2.input_layernorm.bias"),
        ("nemotron", "model.norm.bias"),
        ("phi", "lm_head.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias"),
        ("gpt_neox", "gpt_neox.final_layer_norm.bias"),
        ("gpt_neox", "embed_out.weight"),
        ("apertus", "model.layers.2.mlp.act_fn.alpha_n"),
        ("qwen2", "model.layers.4.self_attn.q_proj.bias"),
        ("qwen2_moe", "model.layers.3.self_attn.k_proj.bias"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("qwen3_moe", "model.layers.1.self_attn.k_norm.weight"),
        ("mixtral", "model.layers.1.post_attention_layernorm.weight"),
    ],
)
def test_a_layer_without_a_norm_or_bias_of_the_configs_model_is_no_trace(tmp_path, family, name):
    """transformers makes one up, and says so in a warning."""
    folder = tiny.make_checkpoint(tmp_path / "m", family)
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors .*{name}.*: fetch it again"):
        Checkpoint(str(folder))


def test_a_layer_with_biases_that_the_configs_model_has_not_is_refused(tmp_path):
    """As where attention_bias was lost from a config: transformers would leave them out."""
    folder = tiny.make_checkpoint(tmp_path / "m", "llama_biases")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"attention_bias": False}))
    with pytest.raises(CheckpointError, match=r"there are 20 tensors that .* has not, such as .*k_proj.bias"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_a_layer_with_a_tensor_of_no_module_is_refused(tmp_path, family):
    """It was opened, and the first prompt ended with a trace: AttributeError: LlamaMLP has no attribute `scale`.
    One that a module would have is carried over (test_proof)."""
    folder = tiny.make_checkpoint(tmp_path / "m", family)
    state = load_file(folder / "model.safetensors")
    strange = {"model.layers.1.mlp.scale.weight": torch.ones(3)}
    save_file(state | strange, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"there are 1 tensors that .* has not, .*layers.1.mlp.scale.weight"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("name", ["model.layers.3.input_layernorm.bias", "model.norm.bias", "lm_head.bias"])
def test_a_bias_that_the_family_has_not_is_refused(tmp_path, name):
    """transformers would leave it out, and answer otherwise than whatever the file was written for."""
    folder = tiny.make_checkpoint(tmp_path / "m", "qwen3")
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: torch.ones(32)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"there are 1 tensors that .* has not, such as \['{name}'\]"):
        Checkpoint(str(folder))


def test_experts_that_the_config_does_not_count_are_refused(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "m", "mixtral")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_local_experts": 2}))
    with pytest.raises(CheckpointError, match=r"there are 15 tensors that .* has not, such as .*experts.2.w1.weight"):
        Checkpoint(str(folder))


def test_half_a_character_in_a_config_is_no_trace(copy):
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"note": "\ud83d"}))
    with pytest.raises(CheckpointError, match="config.json cannot be read: .*surrogates not allowed; fetch it again"):
        Checkpoint(str(copy))


def test_damaged_json(copy):
    (copy / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        Checkpoint(str(copy))


def test_damaged_index(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "m", "llama", shard="60KB")
    null, nested = (json.dumps({"weight_map": {"lm_head.weight": value}}) for value in (None, ["x"]))
    for text in ('{"weight_map": ', "{}", "[]", null, nested):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="index.json cannot be read"):
            Checkpoint(str(folder))


def test_quantised_checkpoints(copy):
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="is quantised: merge the unquantised checkpoint"):
        Checkpoint(str(copy))


def test_a_checkpoint_that_says_that_it_is_not_quantised(copy, tmp_path):
    edit_config(copy, quantization_config=None)
    tiny.save_merge(Checkpoint(str(copy)), tail_plan(5, [0.4], name="x", kind="found"), tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen2", {"layer_types": ["full_attention"] * 7}, "num_hidden_layers.*layer_types"),
        ("llama", {"hidden_size": "32"}, "hidden_size.*expected int"),
        ("llama", {"rope_parameters": ["default"]}, "rope|list"),
    ],
)
def test_a_config_whose_values_transformers_refuses(tmp_path, family, changes, words):
    folder = tiny.make_checkpoint(tmp_path / "m", family)
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"(?s)transformers cannot read {folder} \(model type .*{words}"):
        Checkpoint(str(folder))


def test_a_tensor_that_layers_share(copy):
    state = load_file(copy / "model.safetensors") | {"model.layers.shared.weight": torch.ones(2)}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="safetensors: model.layers.shared.weight belongs to no numbered layer"):
        Checkpoint(str(copy))


def test_unknown_architectures(copy):
    edit_config(copy, model_type="gpt2")
    with pytest.raises(ArchitectureError, match="'gpt2' is not supported: its layers' tensors are not described"):
        Checkpoint(str(copy))
    edit_config(copy, model_type="from_the_future")
    with pytest.raises(CheckpointError, match="transformers cannot read .*model type from_the_future"):
        Checkpoint(str(copy))


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_without_its_files(copy, name):
    """transformers makes an empty one, by which every text has no tokens."""
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(CheckpointError, match=rf"tokenizer without a vocabulary \({name}.*: put the tokenizer's files"):
        _ = Checkpoint(str(copy)).tokenizer


def test_no_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        _ = Checkpoint(str(copy)).tokenizer


def response(code):
    return http_client.Response(code, request=http_client.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no connection and nothing cached"),
        OfflineModeIsEnabled("offline mode is enabled"),
        RepositoryNotFoundError("404 Client Error", response=response(404)),
        GatedRepoError("403 Client Error", response=response(403)),
        HFValidationError("Repo id must use alphanumeric chars"),
        http_client.ProxyError("503 from the proxy"),
        ConnectionResetError("reset by peer"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_does_not_give_the_model(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"no local folder 'owner/name', .*\(revision v2\) could not") as caught:
        Checkpoint("owner/name", revision="v2")
    assert type(error).__name__ in str(caught.value) and "local path" in str(caught.value)


def test_only_safetensors_and_text_are_fetched(monkeypatch, llama):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Checkpoint("owner/name", revision="v2").directory == llama
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])
    wanted = ["model-00001-of-00003.safetensors", "model.safetensors.index.json", "tekken.json", "tokenizer.model.v3"]
    wanted += ["additional_chat_templates/tool_use.jinja", "LICENSE", "NOTICE", "README.md", "merges.txt"]
    # Mistral's, Meta's and other runtimes' files are the same weights once more.
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/params.json"]
    others += ["original/consolidated.00.safetensors", "onnx/config.json", "modeling_phi3.py", "pytorch_model.bin"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted
    # Its own Python, which transformers asks for then, only where it may be run.
    Checkpoint("owner/name", trust_remote_code=True)
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == [*wanted, "modeling_phi3.py"]


def test_a_revision_of_what_is_not_the_hub_s_is_refused(llama):
    """It would be ignored, and recorded as the model's."""
    for path in (str(llama), "demo"):
        with pytest.raises(CheckpointError, match=f"revision 'v2' is for hub models, but {path} is local: leave"):
            Checkpoint(path, revision="v2")


def test_offline_mode_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="the model 'owner/name' .* could not be read from the hub"):
        resolve_model("owner/name")


@pytest.mark.parametrize("family", ["llama", "llama3_rope"])  # the latter is tied
def test_what_some_layers_cost_and_what_they_are_called_in_the_merged_model(tmp_path, family):
    """Against transformers' parameters, counted once each."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path, family)))
    tensors = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").named_parameters())
    layer_of = {name: int(name.split(".")[2]) if ".layers." in name else None for name in tensors}
    assert checkpoint.stored_dtypes == {torch.float32}
    for kept in ([0, 2, 3], [4], list(range(tiny.N_LAYERS))):
        wanted = {name for name, layer in layer_of.items() if layer is None or layer in kept}
        parameters = sum(tensors[name].numel() for name in wanted)
        assert checkpoint.size(kept) == (parameters, 4 * parameters)
        named = checkpoint.merged_names(kept)
        assert set(named.values()) == wanted
        for new, old in named.items():
            here, there = (re.sub(r"layers\.\d+\.", "layers.", name) for name in (new, old))
            assert here == there
            assert layer_of[old] is None or kept[int(new.split(".")[2])] == layer_of[old]
    assert checkpoint.public_name == tmp_path.name


def test_where_one_stands_has_a_name_and_a_file_is_no_hub_id(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(llama)
    assert Checkpoint(".").public_name == llama.name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("x")
    with pytest.raises(CheckpointError, match="there is no model folder owner/name"):
        is_on_hub("owner/name")


def test_a_folder_below_the_user_s_is_no_hub_id_and_only_a_snapshot_is_of_the_hub_s_cache(tmp_path):
    with pytest.raises(CheckpointError, match="there is no model folder ~/no-such-model"):
        Checkpoint("~/no-such-model")
    for inside, known in (
        ("models--owner--name/snapshots", "owner/name"),
        ("models--owner--name/blobs", None),
        ("models/snapshots", None),
    ):
        folder = tmp_path / inside / "0123"
        tiny.make_checkpoint(folder)
        checkpoint = Checkpoint(str(folder))
        assert (checkpoint.hub_id, checkpoint.public_name) == (known, known or "0123")
        assert checkpoint.revision == ("0123" if known else None)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8"), (torch.int32, "I32")]
)
def test_a_quantised_tensor_without_a_word_in_the_config_is_refused(copy, dtype, kind):
    """Eight-bit integers were averaged, cut to integers, saved, and proved to be what had been scored."""
    name = "model.layers.1.mlp.up_proj.weight"
    state = load_file(copy / "model.safetensors")
    buffer = {"score.counts": torch.ones(3, dtype=torch.int64)}  # of what is not the model's anything may be there
    save_file(state | buffer, copy / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(str(copy)).stored("score.counts") == ("I64", (3,))
    save_file(state | {name: state[name].to(dtype)}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} is stored as {kind}: merge the unquantised checkpoint"):
        Checkpoint(str(copy))
