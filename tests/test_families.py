"""families.py: which models are refused, and with what words."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoConfig

from raymerge.architectures import ArchitectureError
from raymerge.families import ARCHITECTURES, BOUNDED_ROPE_TYPES, FIXED_ROPE_TYPES, architecture_of, language_config
from raymerge.positions import attention_windows

torch.set_num_threads(1)


def test_every_supported_family_is_tested():
    """By whatever takes its families from tiny.py."""
    assert {options["model_type"] for options in tiny.FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_more_experts_per_token_than_there_are_are_refused(family):
    for chosen in (0, 9):
        with pytest.raises(ArchitectureError, match=f"num_experts_per_tok is {chosen}, but of . experts it must be 1"):
            architecture_of(tiny.config_of(family, num_experts_per_tok=chosen))


def test_as_many_experts_per_token_as_there_are_is_a_model():
    config = tiny.config_of("olmoe")
    config.num_experts_per_tok = config.num_experts
    assert architecture_of(config).sizes["experts"] == config.num_experts


@pytest.mark.parametrize("spelled", ["mamba", "linear_attention"])
def test_granite_4_with_state_space_layers_or_experts_is_refused(spelled):
    mixed = tiny.config_of("granite4", layer_types=[spelled, *4 * ["attention"]])
    with pytest.raises(ArchitectureError, match="'linear_attention'. are not supported: those are layers that are no"):
        attention_windows(mixed)
    with pytest.raises(ArchitectureError, match="granitemoehybrid with num_local_experts = 8 is not supported"):
        architecture_of(tiny.config_of("granite4", num_local_experts=8))
    with pytest.raises(ArchitectureError, match="'linear_attention'. are not supported"):
        attention_windows(AutoConfig.for_model("granitemoehybrid", num_local_experts=0))


def test_logits_divided_by_nothing_are_refused():
    with pytest.raises(ArchitectureError, match="granite with logits_scaling = 0 has no logits, which are divided by"):
        architecture_of(tiny.config_of("granite", logits_scaling=0.0))
    for none in (0.0, None):
        with pytest.raises(ArchitectureError, match="cohere with logit_scale = 0 has no logits, which are multiplied"):
            architecture_of(tiny.config_of("cohere", logit_scale=none))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", "its layers' tensors are not described"),
        ("mamba", "it has layers that are no attention"),
        ("jamba", "it has layers that are no attention"),
        ("qwen3_next", "it has layers that are no attention"),
        ("llama4", "it has towers for images or sound beside the language model"),
        ("qwen2_5_omni", "it has towers for images or sound beside the language model"),
        ("qwen3_vl_moe", "it has experts beside towers for images"),
        ("qwen3_5", "it has layers that are no attention"),
        ("gemma3n", r"it has embeddings of each layer's own \(per-layer embeddings\)"),
        ("gemma4", "it has layers whose heads differ in size and number"),
        ("mllama", "it has layers of cross-attention to images"),
        ("paligemma", r"it has a prompt whose tokens see those after them \(a bidirectional prefix\)"),
        ("deepseek_v3", "it has attention over compressed keys and values"),
        ("granitemoe", "it has experts whose tensors or routing are not those of mixtral, olmoe, qwen2_moe and qwen3_"),
        ("t5", "it has an encoder"),
    ],
)
def test_unsupported_families_are_named_with_what_they_have_and_the_supported_ones(model_type, reason):
    with pytest.raises(
        ArchitectureError,
        match=f"'{model_type}' is not supported: {reason}.* gemma2, .*, smollm3, smolvlm, .*, vaultgemma$",
    ):
        architecture_of(AutoConfig.for_model(model_type))
    with pytest.raises(ArchitectureError, match="model type None"):
        architecture_of(object())


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "olmoe with clip_qkv = 8.0 is not supported; supported is None"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] is not supported; supported is None or \[\]"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported; supported is 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] is not supported; supported is None or \[\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported; supported is 1"),
        ("nemotron", {"num_key_value_heads": None}, "nemotron without num_key_value_heads is not supported: .* 4 if"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 is not supported: it must divide .* which is 4"),
        ("llama", {"num_key_value_heads": 8}, "num_key_value_heads = 8 is not supported: it must divide"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads = 0 is not supported: it must divide"),
        ("olmo", {"clip_qkv": 8.0}, "olmo with clip_qkv = 8.0 is not supported; supported is None"),
        ("stablelm", {"qk_layernorm": True}, "stablelm with qk_layernorm = True is not supported; supported is False"),
        ("phi", {"qk_layernorm": True}, "phi with qk_layernorm = True is not supported; supported is False"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm = True is not supported; supported is None or False"),
        ("gemma", {"use_bidirectional_attention": True}, "gemma with use_bidirectional_attention = True is not supp"),
        ("gemma3", {"use_bidirectional_attention": True}, "supported is None or False"),
    ],
)
def test_unsupported_options_of_families_are_named(family, options, message):
    with pytest.raises(ArchitectureError, match=message):
        architecture_of(tiny.config_of(family, **options))


def test_rotary_embeddings_whose_length_is_not_known_are_refused():
    config = tiny.config_of("llama")
    config.rope_parameters = {"rope_type": "proportional"}
    said = "rotary embedding type 'proportional' is not supported; supported are default, dynamic, linear, llama3, "
    with pytest.raises(ArchitectureError, match=said):
        architecture_of(config)
    for parameters in (None, *({"rope_type": rope_type} for rope_type in (*FIXED_ROPE_TYPES, *BOUNDED_ROPE_TYPES))):
        config.rope_parameters = parameters
        assert architecture_of(config).name == "llama"
    config = tiny.config_of("gemma3")
    config.rope_parameters["full_attention"] = {"rope_type": "proportional"}
    with pytest.raises(ArchitectureError, match="'proportional'"):
        architecture_of(config)


@pytest.mark.parametrize("key", ["llama_4_scaling_beta", "original_max_position_embeddings"])
def test_queries_of_no_known_scale_are_refused(key):
    """transformers can load such a model, and cannot run it."""
    config = tiny.config_of("ministral3")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0, "llama_4_scaling_beta": 0.1} | {
        "original_max_position_embeddings": 32
    }
    assert architecture_of(config).name == "ministral3"
    config.rope_parameters["llama_4_scaling_beta"] = 0  # which says that they are not
    assert architecture_of(config).name == "ministral3"
    del config.rope_parameters[key]
    with pytest.raises(TypeError):
        tiny.random_model(config)(torch.arange(3)[None], use_cache=False)
    with pytest.raises(
        ArchitectureError, match=f"rope_parameters of ministral3 without {key} do not say by what queries"
    ):
        architecture_of(config)


def test_a_key_that_a_config_leaves_empty_says_nothing_of_a_model():
    for value, reason in ((None, "its layers' tensors are not described"), (64, "multi-head latent attention")):
        with pytest.raises(ArchitectureError, match=f"model type 'new' is not supported: .*{reason}"):
            architecture_of(SimpleNamespace(model_type="new", kv_lora_rank=value))


def test_a_language_model_inside_has_of_its_config_what_it_reads_there():
    """Qwen2-VL's makes nothing of head_dim, which Qwen2 reads; sections of positions are no part of Qwen2's rotary."""
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    rotary = {"rope_type": "default", "rope_theta": 100.0}
    sections = {"type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    config = AutoConfig.for_model("qwen2_vl", text_config=text | {"rope_parameters": rotary | sections})
    inside = language_config(config)
    assert inside.model_type == "qwen2" and inside.rope_parameters == rotary
    assert architecture_of(inside).sizes["rotary"] == architecture_of(inside).sizes["value_channels"] == 8
    assert config.text_config.rope_parameters.keys() >= sections.keys()  # which the whole model reads
    llama = AutoConfig.for_model("llama")
    assert language_config(llama) is llama
