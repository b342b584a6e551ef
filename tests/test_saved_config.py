"""saved_config.py: the base's config.json with what fewer layers change, as transformers and older readers find it."""

import copy
import json

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raymerge.checkpoint import Checkpoint
from raymerge.plan import drop_plan, tail_plan
from raymerge.positions import NO_ROTARY, attention_windows, rotary_types
from raymerge.saved_config import saved_config, trimmed_config

PLAN = tail_plan(tiny.N_LAYERS, [0.3, 0.8], name="x", kind="found")
PER_LAYER = {"num_hidden_layers", "layer_types", "no_rope_layers", "max_window_layers"}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, values):
    (folder / "config.json").write_text(json.dumps(values))


def as_transformers_4(values):
    """What transformers 4.57 wrote for the same model."""
    old = {key: value for key, value in values.items() if key not in ("rope_parameters", "dtype")}
    rope = values["rope_parameters"]
    main = rope.get("full_attention", rope)
    scaling = {key: value for key, value in main.items() if key not in ("rope_theta", "partial_rotary_factor")}
    old |= {"rope_theta": main["rope_theta"], "torch_dtype": values["dtype"], "transformers_version": "4.57.6"}
    old["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    if "sliding_attention" in rope and values["model_type"] == "gemma3_text":
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in main:
        old["partial_rotary_factor"] = main["partial_rotary_factor"]
    if values["model_type"] == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    return old


def saved(folder, plan, out):
    checkpoint = Checkpoint(str(folder))
    tiny.save_merge(checkpoint, plan, out)
    return read_config(out)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_config_of_transformers_4_stays_one(tmp_path, family):
    """Its readers know no rope_parameters, and take 10000 for a rope_theta that they do not find."""
    folder = tiny.make_checkpoint(tmp_path / "base", family)
    write_config(folder, as_transformers_4(read_config(folder)))
    before, after = read_config(folder), saved(folder, PLAN, tmp_path / "merged")
    patterns = {"sliding_window_pattern", "_sliding_window_pattern"}  # which the tiny Gemma 3 does not follow
    assert set(before) - patterns == set(after) - patterns
    assert after["rope_theta"] == before["rope_theta"] and after["torch_dtype"] == "float32"
    assert {key for key in after if after[key] != before[key]} <= PER_LAYER and after["num_hidden_layers"] == 3
    # And transformers 5 finds what it made of the base, for fewer layers.
    config = AutoConfig.from_pretrained(folder)
    expected = type(config).from_dict(trimmed_config(config.to_dict(), [0, 1, 2])).to_dict()
    found = AutoConfig.from_pretrained(tmp_path / "merged").to_dict()
    assert found | {"_name_or_path": str(folder)} == expected


def layer_types_written(config, declared, kept):
    """Whether layer types are in the saved config; in any case it must be read as the kept layers are."""
    values = saved_config(declared, config, kept, torch.float32)
    read = type(config).from_dict(copy.deepcopy(values))
    assert attention_windows(read) == [attention_windows(config)[layer] for layer in kept]
    assert rotary_types(read) == [rotary_types(config)[layer] for layer in kept]
    assert read.num_hidden_layers == len(kept)
    return "layer_types" in values, values


def test_layer_types_that_transformers_derives_are_written_where_fewer_layers_get_others():
    """Published Gemma 2 and Gemma 3 configs hold none, Qwen2's count the leading layers of full attention."""
    declared = {"model_type": "gemma2", "num_hidden_layers": 6, "sliding_window": 9}
    config = AutoConfig.for_model(**declared)
    assert not layer_types_written(config, declared, [0, 1, 2, 3])[0]
    assert not layer_types_written(config, declared, [0, 1, 4, 5])[0]
    assert layer_types_written(config, declared, [0, 1, 3, 4])[0]

    declared = {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 9, "sliding_window_pattern": 3}
    config = AutoConfig.for_model(**declared)
    written, values = layer_types_written(config, declared, [0, 1, 2, 3])
    assert not written and values["sliding_window_pattern"] == 3
    for kept in ([0, 1, 3, 4, 5], [2, 3], [0, 1, 3, 4]):
        written, values = layer_types_written(config, declared, kept)
        assert written and "sliding_window_pattern" not in values

    declared = {"model_type": "qwen2", "num_hidden_layers": 32, "sliding_window": 9, "use_sliding_window": True}
    config = AutoConfig.for_model(**declared)
    assert attention_windows(config) == [None] * 28 + [9] * 4
    kept = [*range(20), 30, 31]  # 28, the default of max_window_layers, is no longer true
    written, values = layer_types_written(config, declared, kept)
    assert written and values["max_window_layers"] == 20
    declared |= {"max_window_layers": 28}
    written, values = layer_types_written(config, declared, kept)
    assert not written and values["max_window_layers"] == 20

    declared = {"model_type": "olmo3", "num_hidden_layers": 8, "sliding_window": 9}
    config = AutoConfig.for_model(**declared)
    assert attention_windows(config) == [9, 9, 9, None] * 2
    assert not layer_types_written(config, declared, [0, 1, 2, 3, 4, 5])[0]
    assert layer_types_written(config, declared, [0, 1, 2, 4, 5, 6, 7])[0]

    declared = {"model_type": "qwen3", "num_hidden_layers": 4, "layer_types": None}
    written, values = layer_types_written(AutoConfig.for_model(**declared), declared, [0, 3])
    assert values == declared | {"num_hidden_layers": 2}


def test_a_pattern_of_letters_stays_only_where_the_kept_layers_follow_it():
    """EXAONE 4's: L slides, G does not. transformers says that the last layer never does; others go by the letter."""
    declared = {"model_type": "exaone4", "num_hidden_layers": 8, "sliding_window": 9, "sliding_window_pattern": "LLLG"}
    declared["layer_types"] = (3 * ["sliding_attention"] + ["full_attention"]) * 2
    config = AutoConfig.for_model(**declared)
    for kept, follows in (
        ([0, 1, 2, 3, 4, 5, 6, 7], True),
        ([4, 5, 6, 7], True),
        ([0, 1, 2, 3, 4, 5], False),
        ([0, 1, 3, 4, 5, 6, 7], False),
    ):
        written, values = layer_types_written(config, declared, kept)
        assert written and ("sliding_window_pattern" in values) == follows
    # 1.2B has no windows; saved again, transformers writes a pattern of 0.
    declared |= {"sliding_window": None, "layer_types": 8 * ["full_attention"], "sliding_window_pattern": 0}
    for pattern in (None, 0):
        declared |= {"sliding_window_pattern": pattern}
        _, values = layer_types_written(AutoConfig.for_model(**declared), declared, [0, 3])
        assert values == declared | {"num_hidden_layers": 2, "layer_types": 2 * ["full_attention"]}


def test_rotary_layers_that_transformers_derives_are_written_where_fewer_layers_get_others():
    """SmolLM3 has none in every fourth layer; its configs hold one entry a layer, an interval, or neither."""
    for options in ({}, {"no_rope_layer_interval": 4}):
        declared = {"model_type": "smollm3", "num_hidden_layers": 8} | options
        config = AutoConfig.for_model(**declared)
        assert rotary_types(config) == [None, None, None, NO_ROTARY] * 2
        for kept, follows in (([0, 1, 2, 3, 4, 5], True), ([0, 1, 2, 4, 5, 6], False), ([3, 4], False)):
            written, values = layer_types_written(config, declared, kept)
            assert not follows or not written
            assert ("no_rope_layers" in values) != follows
    # With the list itself, which may be longer than the layers are many.
    declared = {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1, 0]}
    written, values = layer_types_written(AutoConfig.for_model(**declared), declared, [0, 2])
    assert not written and values["no_rope_layers"] == [1, 1]


@pytest.mark.parametrize("family", ["llama", "llama3_rope", "gemma3", "phi3", "qwen3_moe"])
def test_a_base_without_a_config_of_its_own_gets_both_spellings(family):
    config = tiny.config_of(family, dtype="bfloat16")
    declared = config.to_dict()
    values = saved_config(declared, config, [0, 1], torch.bfloat16, both_spellings=True)
    old = as_transformers_4(values)
    del old["transformers_version"]
    assert {key: values.get(key) for key in old} == old
    expected = type(config).from_dict(trimmed_config(declared, [0, 1]))
    read = type(config).from_dict(copy.deepcopy(values))
    assert read.rope_parameters == expected.rope_parameters and read.dtype == expected.dtype == torch.bfloat16
    assert set(saved_config(declared, config, [0, 1], torch.bfloat16)) <= set(declared)


def test_a_rotation_of_no_named_kind_is_the_usual_one():
    """What transformers 4 reads in rope_scaling changes the rotation."""
    config = tiny.config_of("llama")
    for rotary, scaling in (
        ({"rope_theta": 5e5}, None),
        ({"rope_theta": 5e5, "rope_type": "default"}, None),
        ({"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ):
        values = saved_config({"rope_parameters": rotary}, config, [0, 1], None, both_spellings=True)
        assert values["rope_theta"] == 5e5 and values.get("rope_scaling") == scaling


def test_the_stored_dtype_is_written_under_every_name_that_there_is():
    config = tiny.config_of("llama")
    for declared, found in (
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, {"torch_dtype": "float32", "dtype": "float32"}),
        ({"torch_dtype": "torch.float32"}, {"torch_dtype": "torch.float32"}),  # says so already
        ({"dtype": None}, {"dtype": "float32"}),
        ({}, {}),
    ):
        values = saved_config({"model_type": "llama", **declared}, config, [0], torch.float32)
        assert values == {"model_type": "llama", "num_hidden_layers": 1, **found}


def test_code_that_is_not_copied_is_not_named(tmp_path):
    """Published Phi-3 configs name modules of their repository, though transformers has the family."""
    folder = tiny.make_checkpoint(tmp_path / "base", "phi3")
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    write_config(folder, read_config(folder) | {"auto_map": code})
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}))
    assert "auto_map" not in saved(folder, drop_plan(5, 2), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / path.name).read_text()) == tokenizer
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(model).__module__ == "transformers.models.phi3.modeling_phi3"
    AutoTokenizer.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    # Code of another repository is found wherever the model is.
    elsewhere = json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["owner/name--tokenization_x.X", None]}})
    path.write_text(elsewhere)
    saved(folder, drop_plan(5, 2), tmp_path / "again")
    assert (tmp_path / "again" / path.name).read_text() == elsewhere


def test_trimmed_config_keeps_the_entries_of_the_kept_layers():
    values = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "no_rope_layers": (1, 0, 1, 0),
        "mlp_layer_types": ["x", "y", "z", "w"],
        "eos_token_id": [1, 2, 3, 4],  # as long as the layers are many, but no per-layer list
        "some_layers": [1, 2],  # names layers, but is not one entry a layer
        "max_window_layers": 3,
        "layer_norm_eps": 1e-5,
        "hidden_size": 8,
    }
    before = copy.deepcopy(values)
    assert trimmed_config(values, [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "d"],
        "no_rope_layers": [1, 0],
        "mlp_layer_types": ["x", "w"],
        "eos_token_id": [1, 2, 3, 4],
        "some_layers": [1, 2],
        "max_window_layers": 1,
        "layer_norm_eps": 1e-5,
        "hidden_size": 8,
    }
    assert values == before


def test_a_trimmed_config_has_the_windows_of_the_kept_layers():
    config = tiny.config_of("qwen2_windows")
    trimmed = type(config).from_dict(trimmed_config(config.to_dict(), [0, 1, 4]))
    assert attention_windows(trimmed) == [None, None, 40]
    assert trimmed.max_window_layers == 2 and trimmed.layer_types.count("full_attention") == 2


def test_a_sliding_window_pattern_stays_only_where_the_kept_layers_follow_it():
    """Gemma 3's published configs hold it instead of layer types; a reader of either finds the kept layers."""
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=7, sliding_window=9, sliding_window_pattern=3)
    assert attention_windows(config) == [9, 9, None, 9, 9, None, 9]
    for kept, follows in (([0, 1, 2, 3], True), ([0, 1, 3, 4, 5], False), ([3, 4, 5, 6], True), ([2, 3], False)):
        values = trimmed_config(config.to_dict(), kept)
        assert ("sliding_window_pattern" in values) == follows
        trimmed = type(config).from_dict(values)
        assert attention_windows(trimmed) == [attention_windows(config)[layer] for layer in kept]
        bare = {key: value for key, value in values.items() if key != "layer_types"}
        if follows:
            assert type(config).from_dict(bare).layer_types == trimmed.layer_types


def test_layer_types_keep_the_spelling_of_the_base(tmp_path):
    """Granite 4's are published as "attention", which transformers 5 reads as full_attention."""
    folder = tiny.make_checkpoint(tmp_path / "base", "granite4")
    values = read_config(folder)
    write_config(folder, values | {"layer_types": 5 * ["attention"]})
    after = saved(folder, PLAN, tmp_path / "merged")
    assert after == values | {"layer_types": 3 * ["attention"], "num_hidden_layers": 3}
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.layer_types == 3 * ["full_attention"] and attention_windows(config) == 3 * [None]


def test_a_multimodal_config_that_says_nothing_of_its_language_model_keeps_its_defaults():
    """A part that is left out has other defaults (hidden_size 5120) than one that is there (4096)."""
    config = AutoConfig.for_model("mistral3")
    values = saved_config({"model_type": "mistral3"}, config, [0, 1, 5], None)
    read = AutoConfig.for_model(**json.loads(json.dumps(values))).text_config
    assert read.num_hidden_layers == 3 and config.text_config.num_hidden_layers == 40
    assert {k: v for k, v in read.to_dict().items() if v != config.text_config.to_dict()[k]} == {"num_hidden_layers": 3}
