"""towers.py: language models inside multimodal checkpoints, against transformers' whole models.

The reference merges the language model's tensors step by step (tiny.py) and loads them strictly into the whole model.
"""

import copy
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging

import raymerge.proof
import raymerge.towers
from raymerge import experiments
from raymerge.architectures import ArchitectureError
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.config_file import load_config
from raymerge.evaluation import generation_speed
from raymerge.families import MULTIMODAL
from raymerge.forward import LayerRunner
from raymerge.fusion import check_mergeable, receipts
from raymerge.mergekit import NotExpressible, mergekit_yaml
from raymerge.merging import merge, save_merged
from raymerge.plan import PlanError, Refit, base_plan, block_plan, drop_block_plan, tail_plan
from raymerge.prompts import Group, Shard, encode_questions
from raymerge.proof import prove
from raymerge.refit import RefitError, check_refittable
from raymerge.reload import reload
from raymerge.scoring import TailScorer
from raymerge.trunk import TrunkCache

torch.set_num_threads(1)

LIMIT = 2e-5  # of the largest value, float32 against float64: as in test_forward.py and test_scoring.py
N = tiny.N_LAYERS
KINDS = tuple(tiny.MULTIMODAL)
SPELLINGS = ("published", "modules")
PLAN = tail_plan(N, [0.3, 0.8], name="x", kind="found")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A checkpoint of every kind in every spelling; the weights of a kind are the same in both."""
    root = tmp_path_factory.mktemp("bases")
    return {
        (kind, spelling): tiny.make_multimodal(root / f"{kind}-{spelling}", kind, spelling=spelling)
        for kind in KINDS
        for spelling in SPELLINGS
    }


@pytest.fixture
def in_process(monkeypatch):
    """A proof without the seconds that a process of its own takes."""

    def run(folder, work):
        reload(str(folder), work)
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(raymerge.proof, "_run_fresh", run)


@pytest.fixture
def spoiled(bases, tmp_path):
    """A copy whose tensors a test may change; a function that takes the change of a state dict and of the config."""

    def change(kind="gemma3", spelling="published", tensors=None, config=None):
        folder = shutil.copytree(bases[kind, spelling], tmp_path / "spoiled", dirs_exist_ok=True)
        state, values = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        for values_of, edit in ((state, tensors), (values, config)):
            if edit is not None:
                edit(values_of)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return change


def whole(folder):
    """transformers' whole model in float64, which computes plainly."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def merged_whole(folder, steps):
    """The whole model in float64 of which the language model's layers are merged by the reference."""
    base = whole(folder)
    root = next(f"model.{part}." for part in ("language_model", "text_model") if hasattr(base.model, part))
    own = {f"model.{name.removeprefix(root)}": t for name, t in base.state_dict().items() if name.startswith(root)}
    state, alive = tiny.published_merge(own, N, steps)
    config = copy.deepcopy(base.config)
    text = config.text_config
    text.num_hidden_layers = len(alive)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in alive]
    merged = AutoModelForImageTextToText.from_config(config, dtype=torch.float64, attn_implementation="eager")
    beside = {name: t for name, t in base.state_dict().items() if not name.startswith(root)}
    merged.load_state_dict(
        beside | {f"{root}{name.removeprefix('model.')}": t for name, t in state.items()}, strict=True
    )
    return merged.eval()


def root_of(state):
    """What the names of the language model's tensors begin with in a file."""
    return next(name for name in state if name.endswith("layers.0.input_layernorm.weight")).partition("layers.0.")[0]


def close(found, expected, limit=LIMIT):
    assert (found.double() - expected).abs().max() < limit * expected.abs().max()


def ids_of(seed, n):
    return np.random.default_rng(seed).integers(10, 800, n)


def logits_of(checkpoint, plan, prefix, own):
    """(T, V) of a prompt that is run in two parts, a shared prefix and a sequence of its own."""
    runner = LayerRunner(checkpoint)
    shard = Shard((Group("", prefix, (own,), (0,)),))
    state = runner.run(runner.embed(shard), runner.plan_layers(plan))[0]
    hidden = runner.vocabulary.normalise(torch.cat([state.prefix[0], state.batches[0].states[0]]))
    rows = checkpoint[checkpoint.architecture.unembedding].shape[0]
    return runner.vocabulary.capped(hidden @ runner.vocabulary.unembedding_rows(torch.arange(rows)).T)


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_whole_models(bases, kind, spelling):
    checkpoint = Checkpoint(str(bases[kind, spelling]))
    assert checkpoint.multimodal and checkpoint.architecture.name == checkpoint.config.model_type
    prefix, own = ids_of(1, 70), ids_of(2, 60)
    for plan, model in (
        (base_plan(N), whole(bases[kind, spelling])),
        (PLAN, merged_whole(bases[kind, spelling], tiny.steps_of(PLAN))),
    ):
        close(logits_of(checkpoint, plan, prefix, own), tiny.plain_logits(model, np.concatenate([prefix, own])))


OTHERS = [
    (kind, family)
    for kind, families in MULTIMODAL.items()
    for family in families
    if family in ("llama", "mistral", "qwen2", "qwen3") and not tiny.MULTIMODAL[kind][0].startswith(family)
]


@pytest.mark.parametrize(("kind", "family"), OTHERS)
def test_other_language_models_inside_are_run_as_the_whole_models(tmp_path, kind, family):
    folder = tiny.make_multimodal(tmp_path / "m", kind, inside=family)
    checkpoint = Checkpoint(str(folder))
    assert checkpoint.config.model_type == family
    prefix, own = ids_of(1, 30), ids_of(2, 20)
    expected = tiny.plain_logits(merged_whole(folder, tiny.steps_of(PLAN)), np.concatenate([prefix, own]))
    close(logits_of(checkpoint, PLAN, prefix, own), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scorer_answers_as_the_merged_whole_model(bases, tmp_path, kind):
    folder = bases[kind, "published"]
    checkpoint = Checkpoint(str(folder))
    questions = tiny.make_questions({"chess": 4, "law": 3})
    prompts = encode_questions(questions, tiny.demo_tokenizer(), add_bos=True, shard_tokens=500)
    runner = LayerRunner(checkpoint)
    scorer = TailScorer(TrunkCache(runner, PLAN.resumes_at, tmp_path), prompts)
    (found,) = scorer.score_many([PLAN])
    model = merged_whole(folder, tiny.steps_of(PLAN))
    ids = tiny.whole_prompts(questions, tiny.demo_tokenizer(), bos=1)
    expected, _, _ = tiny.plain_answers(model, ids, prompts.letters)
    close(found, torch.from_numpy(expected))


def test_a_cap_of_logits_that_the_whole_model_does_not_apply_is_not_applied(tmp_path):
    """transformers' Gemma3ForConditionalGeneration has an unembedding of its own, without the text model's softcap."""
    folder = tiny.make_multimodal(tmp_path / "m", "gemma3", final_logit_softcapping=0.5)
    ids = ids_of(3, 30)
    found = logits_of(Checkpoint(str(folder)), base_plan(N), ids[:0], ids)
    assert found.abs().max() > 0.5
    close(found, tiny.plain_logits(whole(folder), ids))


@pytest.mark.parametrize("kind", ["mistral3", "qwen2_vl", "qwen3_vl"])
def test_speed_is_of_the_language_model(bases, monkeypatch, kind):
    read = []
    checkpoint = Checkpoint(str(bases[kind, "published"]))
    own = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: read.append(name) or own(self, name))
    assert generation_speed(checkpoint, 2, tokens=2, dtype=torch.float32) > 0
    assert read and not set(read) & set(checkpoint.towers)
    assert {name.partition(".layers.")[2].partition(".")[0] for name in read if ".layers." in name} == {"0", "1"}


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "spelling"), [(kind, s) for kind in KINDS for s in SPELLINGS])
def test_a_saved_merge_is_a_whole_multimodal_model(bases, tmp_path, kind, spelling):
    folder, out = bases[kind, spelling], tmp_path / "merged"
    checkpoint = Checkpoint(str(folder))
    save_merged(checkpoint, PLAN, out, verify=False)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    root = root_of(before)
    beside = {name for name in before if not name.startswith(f"{root}layers.")}
    assert {name for name in after if not name.startswith(f"{root}layers.")} == beside
    text = {f"{root}embed_tokens.weight", f"{root}norm.weight", "lm_head.weight", "language_model.lm_head.weight"}
    assert beside - text == set(checkpoint.towers)
    for name in beside:
        assert before[name].dtype == after[name].dtype
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes()
    config, old = (json.loads((place / "config.json").read_text()) for place in (out, folder))
    new_text, old_text = config.get("text_config", config), old.get("text_config", old)
    assert (new_text is config) == (spelling == "published" and kind in ("qwen2_vl", "qwen2_5_vl"))
    assert new_text.pop("num_hidden_layers") == N - 2 and old_text.pop("num_hidden_layers") == N
    if types := old_text.pop("layer_types", None):
        assert new_text.pop("layer_types") == [types[kept.index] for kept in PLAN.kept]
        old_text.pop("_sliding_window_pattern", None)  # which the base's layers do not follow either
    for part in (new_text, old_text):
        if (leading := part.pop("max_window_layers", None)) is not None:
            assert leading == 2 or (not part["use_sliding_window"] and leading in (3, 28))
    assert config == old
    processors = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    for name in (*processors, "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()

    saved, expected = whole(out), merged_whole(folder, tiny.steps_of(PLAN))
    inputs = tiny.image_inputs(kind, ids_of(4, 40))
    pixels = {key: value for key, value in inputs.items() if key in ("pixel_values", "image_sizes", "image_grid_thw")}
    with torch.no_grad():
        images = [model.model.get_image_features(**pixels).pooler_output for model in (saved, whole(folder))]
        logits = [model(**inputs).logits for model in (saved, expected, whole(folder))]
        blind = saved(**inputs | {"pixel_values": torch.ones_like(inputs["pixel_values"])}).logits
    assert all(torch.equal(own, base) for own, base in zip(*images, strict=True))
    close(logits[0], logits[1])
    assert (logits[0] - blind).abs().max() > 1e-3  # it sees
    assert (logits[0] - logits[2]).abs().max() > 1e-3  # and the merge changes what it says of what it sees


def test_what_merges_nothing_sees_as_the_base(bases, tmp_path):
    checkpoint = Checkpoint(str(bases["gemma3", "published"]))
    save_merged(checkpoint, base_plan(N), tmp_path / "merged", verify=False)
    inputs = tiny.image_inputs("gemma3", ids_of(4, 40))
    with torch.no_grad():
        one, other = (whole(folder)(**inputs).logits for folder in (checkpoint.directory, tmp_path / "merged"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_proved_with_the_class_that_its_users_load(bases, tmp_path, kind, in_process):
    record = save_merged(Checkpoint(str(bases[kind, "published"])), PLAN, tmp_path / "merged")
    assert record["proof"]["passed"] and record["proof"]["generated_tokens"] == 8
    towers = Checkpoint(str(bases[kind, "published"])).towers
    assert record["towers"]["tensors"] == len(towers)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"beside its language model, {len(towers)} tensors of" in card and "carried over unchanged" in card
    assert "writes plans of language models alone" in record["mergekit"]
    # It is a base as any other, and its plan file makes it again.
    again = Checkpoint(str(tmp_path / "merged"))
    assert again.n_layers == N - 2 and again.towers == towers
    merge(str(bases[kind, "published"]), tmp_path / "merged" / "merge_plan.json", tmp_path / "twice", verify=False)
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


def test_a_proof_finds_layers_of_the_wrong_kind(bases, tmp_path, in_process):
    checkpoint = Checkpoint(str(bases["gemma3", "published"]))
    save_merged(checkpoint, PLAN, tmp_path / "merged", verify=False)
    path = tmp_path / "merged" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["layer_types"][-1] = "full_attention"
    path.write_text(json.dumps(config))
    found = prove(checkpoint, PLAN, tmp_path / "merged")
    assert not found["passed"] and "the attention of its layers [2] is not that" in found["error"]


def test_a_dtype_that_is_written_down_is_that_of_the_weights(spoiled, tmp_path):
    """Also inside: transformers 4 writes it into every part, and reads a part's own."""

    def declare(config):
        config.pop("dtype", None)
        config["torch_dtype"] = "bfloat16"
        for part in ("text_config", "vision_config"):
            config[part] = {"torch_dtype": "float16", "_name_or_path": "/home/me"} | config[part]
            config[part].pop("dtype", None)

    folder = spoiled(config=declare)
    save_merged(Checkpoint(str(folder)), PLAN, tmp_path / "merged", verify=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        assert part["torch_dtype"] == "float32" and "_name_or_path" not in part and "dtype" not in part


@pytest.mark.parametrize("every", [6, 2])
def test_a_sparse_published_config_keeps_its_spelling(spoiled, tmp_path, every):
    """Gemma 3's as Google publishes it: defaults left out, and the layers' types given by their pattern at most; they
    are written down where the layers that are kept do not follow it."""
    plan = PLAN if every == 6 else drop_block_plan(N, 3, 1)

    def published(config):
        text = config["text_config"]
        for key in ("layer_types", "rope_parameters", "attention_bias", "num_hidden_layers"):
            text.pop(key, None)
        text |= {"num_hidden_layers": N, "rope_theta": 1000.0, "rope_local_base_freq": 100.0}
        text["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
        text.pop("_sliding_window_pattern", None)
        if every != 6:
            text["sliding_window_pattern"] = every

    def without_biases(state):
        for name in [name for name in state if name.startswith("language_model") and name.endswith("bias")]:
            del state[name]

    checkpoint = Checkpoint(str(folder := spoiled(config=published, tensors=without_biases)))
    assert checkpoint.windows == [None if (n + 1) % every == 0 else 40 for n in range(N)]
    save_merged(checkpoint, plan, tmp_path / "merged", verify=False)
    old = json.loads((folder / "config.json").read_text())
    new = json.loads((tmp_path / "merged" / "config.json").read_text())
    old["text_config"]["num_hidden_layers"] = len(plan.kept)
    if every != 6:
        types = new["text_config"].pop("layer_types")
        assert types == [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding")]
        del old["text_config"]["sliding_window_pattern"]
    assert new == old
    ids = ids_of(5, 90)
    close(logits_of(checkpoint, plan, ids[:0], ids), tiny.plain_logits(whole(tmp_path / "merged"), ids))


_QWEN25 = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "vision_token_id": 5,
    "image_token_id": 9,
    "video_token_id": 7,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 128000,
    "max_window_layers": 5,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 100.0,
    "sliding_window": 40,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "vocab_size": 900,
}
_QWEN3 = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 9,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"},
        "rope_theta": 100,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 900,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 7,
    "vision_config": {
        "deepstack_visual_indexes": [0, 1],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 16,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "model_type": "qwen3_vl",
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 32,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 4,
    "vision_start_token_id": 3,
}
# A text_config that leaves out what is Mistral's default, its number of layers too.
_LLAVA_NEXT = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336]],
    "image_token_index": 9,
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 56,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "vocab_size": 900,
    },
    "torch_dtype": "float16",
    "transformers_version": "4.39.0.dev0",
    "use_image_newline_parameter": True,
    "vision_config": {
        "hidden_size": 16,
        "image_size": 336,
        "intermediate_size": 24,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 14,
        "projection_dim": 16,
        "vocab_size": 900,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 900,
}


@pytest.mark.parametrize("published", [_QWEN25, _QWEN3, _LLAVA_NEXT], ids=lambda config: config["model_type"])
def test_configs_as_published_lose_layers_alone(tmp_path, published):
    """The keys that these have, none more; sizes are smaller."""
    folder, out = tmp_path / "base", tmp_path / "merged"
    config = AutoConfig.for_model(**copy.deepcopy(published))
    model = tiny.random_model(config, kind=AutoModelForImageTextToText)
    model.save_pretrained(folder)
    n_layers = config.text_config.num_hidden_layers
    (folder / "config.json").write_text(json.dumps(published))
    checkpoint = Checkpoint(str(folder))
    assert checkpoint.n_layers == n_layers and checkpoint.tied == published.get("tie_word_embeddings", False)
    plan = drop_block_plan(n_layers, 2, 2)
    save_merged(checkpoint, plan, out, verify=False)
    expected = copy.deepcopy(published)
    expected.get("text_config", expected)["num_hidden_layers"] = n_layers - 2
    if "max_window_layers" in expected:
        expected["max_window_layers"] = n_layers - 2
    expected.get("text_config", {}).pop("_name_or_path", None)
    for part in (expected, expected.get("text_config", {})):
        part |= {"torch_dtype": "float32"} if "torch_dtype" in part else {}
    assert json.loads((out / "config.json").read_text()) == expected
    ids = ids_of(9, 60)
    for plan_of, place in ((base_plan(n_layers), folder), (plan, out)):
        close(logits_of(checkpoint, plan_of, ids[:20], ids[20:]), tiny.plain_logits(whole(place), ids))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_keys_of_the_language_model_in_two_places_say_the_same(bases, tmp_path, kind):
    """transformers 4.52 to 4.57 wrote them at the top level and in text_config, of which others read either."""
    folder = shutil.copytree(bases[kind, "published"], tmp_path / "both")
    flat = json.loads((folder / "config.json").read_text())
    text = {key: value for key, value in flat.items() if key not in ("vision_config", "model_type", "architectures")}
    both = flat | {"text_config": text | {"model_type": f"{kind}_text"}}
    (folder / "config.json").write_text(json.dumps(both))
    plan = drop_block_plan(N, 1, 1)
    save_merged(Checkpoint(str(folder)), plan, tmp_path / "merged", verify=False)
    save_merged(Checkpoint(str(bases[kind, "published"])), plan, tmp_path / "flat", verify=False)
    found, alone = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("merged", "flat"))
    own = found.pop("text_config")
    assert (
        found == alone and own["num_hidden_layers"] == N - 1 and own["max_window_layers"] == alone["max_window_layers"]
    )
    first, other = (whole(tmp_path / place) for place in ("merged", "flat"))
    ids = ids_of(7, 90)
    assert torch.equal(tiny.plain_logits(first, ids), tiny.plain_logits(other, ids))


def test_scaled_rotary_embeddings_beside_sections_of_positions(bases, tmp_path):
    """Qwen2.5-VL's own advice for long prompts: yarn, with mrope_section in the same rope_scaling."""
    folder = shutil.copytree(bases["qwen2_5_vl", "published"], tmp_path / "yarn")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"type": "yarn", "mrope_section": [1, 1, 2], "factor": 4.0}
    config["rope_scaling"]["original_max_position_embeddings"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint, ids = Checkpoint(str(folder)), ids_of(8, 90)
    found = logits_of(checkpoint, base_plan(N), ids[:40], ids[40:])
    close(found, tiny.plain_logits(whole(folder), ids))
    plain = tiny.plain_logits(whole(bases["qwen2_5_vl", "published"]), ids)
    assert (found - plain).abs().max() > 0.1
    save_merged(checkpoint, PLAN, tmp_path / "merged", verify=False)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["rope_scaling"] == config["rope_scaling"]


def test_costs_and_receipts_are_of_the_whole_model(bases):
    checkpoint = Checkpoint(str(bases["llava", "published"]))
    sizes = {name: t.numel() for name, t in load_file(checkpoint.directory / "model.safetensors").items()}
    assert checkpoint.size() == (sum(sizes.values()), 4 * sum(sizes.values()))
    layer = sum(size for name, size in sizes.items() if name.startswith("language_model.model.layers.3."))
    assert checkpoint.size([0, 1, 2])[0] == sum(sizes.values()) - 2 * layer
    found = receipts(checkpoint, checkpoint.architecture, PLAN)
    assert {receipt.tensor.rpartition(".layers.")[0] for receipt in found} == {"language_model.model"}
    with pytest.raises(NotExpressible, match="writes plans of language models alone"):
        mergekit_yaml(checkpoint, drop_block_plan(N, 1, 2))


# -- experiments -----------------------------------------------------------------------------------------------------

FEW = ["data.subjects=number_words", "data.limit_per_subject=4", "data.report_limit_per_subject=4", "data.shots=1"]
FEW += ["output.figures=false", "calibration.text=demo"]


def test_it_is_searched_and_evaluated_like_any_other(bases, tmp_path, local_searches, in_process):
    base = bases["gemma3", "published"]
    few = [*FEW, f"model.path={base}", "plan.merges=2", "search.candidates=6", "search.initial=3"]
    few += ["search.random_candidates=1", "data.perplexity_text=demo", "data.perplexity_tokens=300"]
    run = experiments.search(load_config(None, [*few, f"output.run={tmp_path / 'run'}"]))
    (best,) = [path for path in (tmp_path / "run" / "models").iterdir() if path.is_dir()]
    assert json.loads((best / "merge_plan.json").read_text())["proof"]["passed"]
    asked = [f"model.path={best}", f"output.run={tmp_path / 'evaluated'}"]
    again = experiments.evaluate(load_config(None, [*FEW, *few[-2:], *asked]))
    plan_id = run.read("plans").filter(pc.field("kind") == "found").to_pylist()[0]["plan_id"]
    ours = {row["question_id"]: row for row in run.read("answers").to_pylist() if row["plan_id"] == plan_id}
    theirs = {row["question_id"]: row for row in again.read("answers").to_pylist()}
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for key, row in ours.items():
        for column in ("logit_a", "logit_b", "logit_c", "logit_d", "logsumexp_all"):
            assert theirs[key][column] == pytest.approx(row[column], abs=1e-3)


# -- features of images in the first layers --------------------------------------------------------------------------


def test_layers_that_features_of_images_are_added_to_stay_as_and_where_they_are(bases):
    """DeepStack adds them by a layer's number: with layer 1 gone those after layer 1 would follow layer 2."""
    checkpoint = Checkpoint(str(bases["qwen3_vl", "published"]))
    assert checkpoint.deepstack_layers == 2
    for plan in (drop_block_plan(N, 1, 1), drop_block_plan(N, 0, 1), tail_plan(N, [0.5] * 3, name="x", kind="found")):
        with pytest.raises(PlanError, match=r"layer [01] .* first 2 layers .* from 2 on, with plan.starts from 3 "):
            check_mergeable(checkpoint, plan)
    averaged = block_plan(N, 2, [0.0], name="x", kind="found")  # which keeps layer 2 in the place of layer 1
    with pytest.raises(PlanError, match="layer 1 would be merged or removed"):
        check_mergeable(checkpoint, averaged)
    plan = replace(drop_block_plan(N, 2, 2), refit=Refit("outputs"))  # the seam's layer, 1, stays where it is
    check_mergeable(checkpoint, plan)
    assert Checkpoint(str(bases["qwen2_5_vl", "published"])).deepstack_layers == 0


def test_a_sweep_chooses_no_layer_that_features_of_images_are_added_to(bases, tmp_path, local_pools):
    few = [*FEW, "data.subjects=[number_words,colour_mixing]", "data.limit_per_subject=8"]
    few += [f"model.path={bases['qwen3_vl', 'published']}"]
    alike = tmp_path / "alike"
    asked = ["similarity.samples=8", "similarity.measure=cka", "similarity.embedding=pca", "similarity.dimensions=2"]
    asked += [f"output.run={alike}"]
    experiments.similarity(load_config(None, [*few, *asked]))
    asked = [
        "sweep.methods=[drop_greedy,drop_block,most_similar,block_influence]",
        "sweep.merges=[2]",
        "sweep.alignments=[none]",
        "sweep.norms=[keep]",
        "plan.block=cosine",
        "plan.selection=most_similar",
        "plan.recompute=true",
        f"plan.similarity_run={alike}",
        "calibration.tokens=200",
        "sweep.speed_tokens=0",
        "data.perplexity_text=demo",
        "data.perplexity_tokens=300",
        f"output.run={tmp_path / 'run'}",
    ]
    run = experiments.sweep(load_config(None, [*few, *asked]))
    measured = {(row["step"], row["layer"]) for row in run.read("removals").to_pylist()}
    assert {layer for _, layer in measured} == {2, 3, 4} and len(measured) == 5
    assert {row["first"] for row in run.read("blocks").to_pylist()} == {2, 3}
    merged = [row for row in run.read("plans").to_pylist() if row["name"].startswith("most_similar")]
    assert len(merged) == 2 and min(row["into"] for row in merged) >= 2


# -- what is refused -------------------------------------------------------------------------------------------------


def test_names_and_shapes_of_towers_are_checked(spoiled, caplog, capfd):
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that its config requires, .*vision_tower.*patch_embed"):
        Checkpoint(str(spoiled(tensors=lambda s: s.pop("vision_tower.vision_model.embeddings.patch_embedding.bias"))))

    def misshape(state):
        state["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(5)

    with pytest.raises(
        CheckpointError, match=r"mm_soft_emb_norm.weight has shape \(5,\), but its config expects \(16,"
    ):
        Checkpoint(str(spoiled(tensors=misshape)))
    with pytest.raises(CheckpointError, match="model.layers.4.mlp.up_proj.weight.*fetch it again"):
        Checkpoint(str(spoiled(tensors=lambda s: s.pop("language_model.model.layers.4.mlp.up_proj.weight"))))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*'language_model.model.embed_tokens.weight'.*fetch"):
        Checkpoint(str(spoiled(tensors=lambda s: s.pop("language_model.model.embed_tokens.weight"))))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*layers.4.self_attn.q_norm.weight"):
        Checkpoint(str(spoiled(tensors=lambda s: s.pop("language_model.model.layers.4.self_attn.q_norm.weight"))))
    with pytest.raises(CheckpointError, match="says 4 layers, but there are tensors of layer 4"):
        Checkpoint(str(spoiled(config=lambda c: c["text_config"].update(num_hidden_layers=4, layer_types=None))))
    with pytest.raises(CheckpointError, match="layers.0.self_attn.k_norm.weight has shape .*expects"):
        Checkpoint(str(spoiled(config=lambda c: c["text_config"].update(head_dim=16))))
    quantised = {"multi_modal_projector.odd": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match="odd is stored as F8_E4M3"):
        Checkpoint(str(spoiled(tensors=lambda s: s.update(quantised))))
    told = capfd.readouterr()
    assert "LOAD REPORT" not in told.err + told.out and "Loading weights" not in told.err
    assert "LOAD REPORT" not in caplog.text


def test_transformers_is_quiet_while_it_looks_and_no_longer():
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    for shown, switch in ((False, logging.disable_progress_bar), (True, logging.enable_progress_bar)):
        logging.set_verbosity_info()
        switch()
        with raymerge.towers._quiet():
            assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() == shown
    logging.set_verbosity(level)
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()


def test_opening_a_checkpoint_leaves_its_config_alone(spoiled):
    """transformers' from_config writes the dtype of the whole into the config's parts."""
    folder = spoiled("mistral3", config=lambda c: c["text_config"].update(dtype="bfloat16"))
    assert Checkpoint(str(folder)).whole_config.to_dict() == AutoConfig.from_pretrained(folder).to_dict()


def test_a_proof_finds_changed_weights_and_towers(bases, tmp_path, in_process):
    checkpoint = Checkpoint(str(bases["llava", "published"]))
    save_merged(checkpoint, PLAN, tmp_path / "merged", verify=False)
    file = tmp_path / "merged" / "model.safetensors"
    state = load_file(file)

    def nudged(name):
        changed = state[name].clone()
        changed.view(-1)[3] *= 1.01
        return changed

    up, tower = "language_model.model.layers.1.mlp.up_proj.weight", "multi_modal_projector.linear_2.bias"
    beside = "1 tensors beside its language model are not the base's, .*'multi_mod"
    for name, changed, problem in (
        (up, nudged(up), "its logits differ by up to"),
        (tower, nudged(tower), beside),
        (tower, state[tower].double(), beside),  # the same values, but of another dtype
    ):
        save_file(state | {name: changed}, file, metadata={"format": "pt"})
        found = prove(checkpoint, PLAN, tmp_path / "merged")
        assert not found["passed"] and re.match(problem, found["error"])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_tensor_that_belongs_nowhere_is_carried_over(spoiled, tmp_path, spelling, in_process):
    root = {"published": "language_model.model", "modules": "model.language_model"}[spelling]
    odd = {"score.weight": torch.ones(3, 32), "vision_tower.further": torch.ones(2)}
    odd["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(16)[None]  # transformers 4 stored them
    scales = {f"{root}.layers.{layer}.self_attn.k_scale": torch.ones(1) for layer in range(N)}
    checkpoint = Checkpoint(str(spoiled(spelling=spelling, tensors=lambda state: state.update(odd | scales))))
    assert odd.keys() <= set(checkpoint.towers) and not scales.keys() & set(checkpoint.towers)
    assert checkpoint.stored_dtypes == {torch.float32}  # whatever positions are counted in
    record = save_merged(checkpoint, PLAN, tmp_path / "merged")
    assert record["proof"]["passed"]
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(saved["score.weight"], odd["score.weight"]) and "vision_tower.further" in saved
    # Others than the base's own are still found.
    surplus = {f"{root}.layers.1.mlp.odder.weight": torch.ones(2)}
    save_file(saved | surplus, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    found = prove(checkpoint, PLAN, tmp_path / "merged")
    assert not found["passed"] and "odder" in found["error"] and "score" not in found["error"]


def test_what_some_layers_hold_that_no_model_has_may_move_to_other_layers(spoiled, tmp_path, in_process):
    """As a merge counts its layers anew: layer N - 1 alone has a scale here, and becomes layer N - 2."""
    scale = {f"language_model.model.layers.{N - 1}.self_attn.k_scale": torch.ones(1)}
    checkpoint = Checkpoint(str(spoiled(tensors=lambda state: state.update(scale))))
    assert save_merged(checkpoint, drop_block_plan(N, 1, 1), tmp_path / "merged")["proof"]["passed"]


def test_an_unembedding_is_tied_as_the_whole_config_says(bases, spoiled):
    def declare(whole_ties, part_ties):
        def edit(config):
            config["tie_word_embeddings"] = whole_ties
            config["text_config"]["tie_word_embeddings"] = part_ties

        return edit

    assert Checkpoint(str(spoiled(config=declare(True, False)))).tied
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*language_model.lm_head.weight"):
        Checkpoint(str(spoiled(config=declare(False, True))))
    # A stored unembedding of its own counts even so.
    checkpoint = Checkpoint(str(spoiled("mistral3", config=declare(True, True))))
    assert "language_model.lm_head.weight" in set(checkpoint)
    ids = ids_of(6, 20)
    expected = tiny.plain_logits(whole(bases["mistral3", "published"]), ids)
    close(logits_of(checkpoint, base_plan(N), ids[:0], ids), expected)


def test_a_refit_of_units_with_biases_is_refused_inside_too(bases):
    plan = replace(PLAN, refit=Refit("units"))
    with pytest.raises(RefitError, match="cannot choose among MLP units with biases"):
        check_refittable(Checkpoint(str(bases["llava", "published"])), plan)


def test_other_language_models_inside_are_refused(spoiled):
    with pytest.raises(ArchitectureError, match="'mistral3' with a language model of type 'llama' is not supported; "):
        Checkpoint(str(spoiled("mistral3", config=lambda c: c["text_config"].update(model_type="llama"))))
