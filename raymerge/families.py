"""The supported families, and which of them a config is of: a model's tensors (`positions`: what its tokens see).

A family, or an option of one, that an Architecture cannot describe is refused with what it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raymerge.architectures import ATTENTION, GATE_UP, HEAD_GROUPS, QKV, Architecture, ArchitectureError, Names

_Q_K_NORMS = {"self_attn.q_norm": "q", "self_attn.k_norm": "k"}
_QWEN_EXPERTS = {
    "gate": "mlp.experts.{}.gate_proj",
    "up": "mlp.experts.{}.up_proj",
    "down": "mlp.experts.{}.down_proj",
}
_QWEN_SHARED = {
    "mlp.shared_expert.gate_proj": ("shared_gate",),
    "mlp.shared_expert.up_proj": ("shared_up",),
    "mlp.shared_expert.down_proj": ("shared_down",),
    "mlp.shared_expert_gate": ("shared_router",),
}
_QWEN_SHARED_READERS = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate")
# Layers without experts among those with them could not be averaged.
_QWEN_EXPERTS_EVERYWHERE: Mapping[str, tuple[Any, ...]] = {"mlp_only_layers": (None, []), "decoder_sparse_step": (1,)}
_EXPERT_GROUPS = {"experts": None, "units": "experts", **HEAD_GROUPS}
_GATE_UP_FUSED = {"mlp.gate_up_proj": ("gate", "up"), "mlp.down_proj": ("down",)}
# Its MLP has no gate: the square of what is above 0 of up.
_ARCEE = Architecture(
    "arcee",
    windows="none",
    projections=ATTENTION | {"mlp.up_proj": ("up",), "mlp.down_proj": ("down",)},
    norm_inputs={"input_layernorm": QKV, "post_attention_layernorm": ("mlp.up_proj",)},
)
_PHI = Names(final_norm="model.final_layernorm.weight")
_NEOX = Names(
    layer_prefix="gpt_neox.layers.{}.",
    embedding="gpt_neox.embed_in.weight",
    final_norm="gpt_neox.final_layer_norm.weight",
)
_COHERE = Architecture(
    "cohere",
    windows="none",
    norm_inputs={"input_layernorm": (*QKV, *GATE_UP)},
    parallel=True,
    logit_multiplier="logit_scale",
    rotary_interleaved=True,
    rotary_neighbours=True,
    required={"use_qk_norm": (None, False)},
)
_GLM = Architecture(
    "glm",
    windows="none",
    projections=ATTENTION | _GATE_UP_FUSED,
    norm_inputs={"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_up_proj",)},
    rotary_neighbours=True,
)
_OLMO2 = Architecture(
    "olmo2",
    norm_inputs={},
    output_norms={"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    projection_norms=_Q_K_NORMS,
    windows="none",
)
_GEMMA2 = Architecture(
    "gemma2",
    norm_inputs={"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP},
    output_norms={"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    gain_offset=1.0,
    scaled_embedding=True,
    windows="layer_types",
    attention_softcap="attn_logit_softcapping",
    logit_softcap="final_logit_softcapping",
    required={"use_bidirectional_attention": (None, False)},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    family.name: family
    for family in (
        Architecture("llama", windows="none"),
        Architecture("mistral"),
        Architecture("ministral", windows="layer_types"),
        Architecture("ministral3", query_scaling="llama_4_scaling_beta"),
        Architecture("seed_oss", windows="none"),
        Architecture("cwm", windows="layer_types"),
        Architecture("ernie4_5", windows="none", rotary_neighbours=True),
        Architecture("helium", windows="none", rotary_neighbours=True),
        _ARCEE,
        replace(_ARCEE, name="nemotron", gain_offset=1.0),
        # Of its activation (xIELU) the first two are learned.
        replace(
            _ARCEE,
            name="apertus",
            norm_inputs={"attention_layernorm": QKV, "feedforward_layernorm": ("mlp.up_proj",)},
            head_norms=_Q_K_NORMS,
            scalars=tuple(f"mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")),
        ),
        Architecture(
            "starcoder2",
            projections=ATTENTION | {"mlp.c_fc": ("up",), "mlp.c_proj": ("down",)},
            norm_inputs={"input_layernorm": QKV, "post_attention_layernorm": ("mlp.c_fc",)},
        ),
        Architecture(
            "phi",
            windows="none",
            projections={name: (part,) for name, part in zip((*QKV, "self_attn.dense"), "qkvo", strict=True)}
            | {"mlp.fc1": ("up",), "mlp.fc2": ("down",)},
            norm_inputs={"input_layernorm": (*QKV, "mlp.fc1")},
            parallel=True,
            required={"qk_layernorm": (False,)},
            loaded=_PHI,
            **vars(_PHI),
        ),
        Architecture(
            "gpt_neox",
            windows="none",
            projections={
                "attention.query_key_value": ("q", "k", "v"),
                "attention.dense": ("o",),
                "mlp.dense_h_to_4h": ("up",),
                "mlp.dense_4h_to_h": ("down",),
            },
            head_by_head=frozenset({"attention.query_key_value"}),
            norm_inputs={
                "input_layernorm": ("attention.query_key_value",),
                "post_attention_layernorm": ("mlp.dense_h_to_4h",),
            },
            options={"use_parallel_residual": {"parallel": True}},
            kv_heads=None,
            attention="attention",
            # Masks, which published files hold.
            buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
            loaded=_NEOX,
            **vars(replace(_NEOX, unembedding="embed_out.weight")),
        ),
        _COHERE,
        replace(_COHERE, name="cohere2", windows="layer_types", rotary_windows="always"),
        Architecture("olmo", windows="none", required={"clip_qkv": (None,)}),
        Architecture(
            "stablelm",
            windows="none",
            options={"use_parallel_residual": {"parallel": True, "norm_inputs": {"input_layernorm": (*QKV, *GATE_UP)}}},
            required={"qk_layernorm": (False,)},
        ),
        Architecture("smollm3", windows="layer_types", rotary_layers="no_rope_layers"),
        Architecture(
            "granite",
            windows="none",
            embedding_multiplier="embedding_multiplier",
            residual_multiplier="residual_multiplier",
            logit_divisor="logits_scaling",
        ),
        # Granite 4 without state-space layers and without experts.
        Architecture(
            "granitemoehybrid",
            windows="none",
            projections=ATTENTION | {"shared_mlp.input_linear": ("gate", "up"), "shared_mlp.output_linear": ("down",)},
            norm_inputs={"input_layernorm": QKV, "post_attention_layernorm": ("shared_mlp.input_linear",)},
            mlp="shared_mlp",
            width="shared_intermediate_size",
            embedding_multiplier="embedding_multiplier",
            residual_multiplier="residual_multiplier",
            logit_divisor="logits_scaling",
            rotary_if={"position_embedding_type": "rope"},
            required={"num_local_experts": (0,)},
            generates_since=(5, 15),
        ),
        Architecture(
            "hunyuan_v1_dense",
            windows="none",
            head_norms={"self_attn.query_layernorm": "q", "self_attn.key_layernorm": "k"},
            rotated_head_norms=True,
        ),
        Architecture("qwen2", windows="layer_types"),
        Architecture("qwen3", windows="layer_types", head_norms=_Q_K_NORMS),
        Architecture(
            "gemma",
            windows="none",
            gain_offset=1.0,
            scaled_embedding=True,
            required={"use_bidirectional_attention": (None, False)},
        ),
        _GEMMA2,
        replace(_GEMMA2, name="vaultgemma", output_norms={}),
        # Its config has a softcap of attention scores too, which its code does not apply.
        replace(_GEMMA2, name="gemma3_text", head_norms=_Q_K_NORMS, attention_softcap=None),
        Architecture(
            "phi3",
            projections={"self_attn.qkv_proj": ("q", "k", "v"), "self_attn.o_proj": ("o",)} | _GATE_UP_FUSED,
            norm_inputs={
                "input_layernorm": ("self_attn.qkv_proj",),
                "post_attention_layernorm": ("mlp.gate_up_proj",),
            },
        ),
        _GLM,
        replace(
            _GLM,
            name="glm4",
            output_norms={"self_attn": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"},
        ),
        _OLMO2,
        replace(_OLMO2, name="olmo3", windows="layer_types"),
        replace(
            _OLMO2,
            name="exaone4",
            windows="layer_types",
            rotary_windows="gives",
            projection_norms={},
            head_norms=_Q_K_NORMS,
        ),
        Architecture(
            "mixtral",
            projections=ATTENTION | {"block_sparse_moe.gate": ("router",)},
            experts={
                "gate": "block_sparse_moe.experts.{}.w1",
                "up": "block_sparse_moe.experts.{}.w3",
                "down": "block_sparse_moe.experts.{}.w2",
            },
            norm_inputs={"input_layernorm": QKV, "post_attention_layernorm": ("block_sparse_moe.gate",)},
            unit_groups=_EXPERT_GROUPS,
        ),
        Architecture(
            "olmoe",
            windows="none",
            projections=ATTENTION | {"mlp.gate": ("router",)},
            experts=_QWEN_EXPERTS,
            norm_inputs={"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate",)},
            projection_norms=_Q_K_NORMS,
            unit_groups=_EXPERT_GROUPS,
            required={"clip_qkv": (None,)},
        ),
        Architecture(
            "qwen2_moe",
            projections=ATTENTION | {"mlp.gate": ("router",)} | _QWEN_SHARED,
            experts=_QWEN_EXPERTS,
            norm_inputs={"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate", *_QWEN_SHARED_READERS)},
            unit_groups=_EXPERT_GROUPS | {"shared_units": None},
            windows="layer_types",
            width="moe_intermediate_size",
            shared_width="shared_expert_intermediate_size",
            required=_QWEN_EXPERTS_EVERYWHERE,
        ),
        Architecture(
            "qwen3_moe",
            projections=ATTENTION | {"mlp.gate": ("router",)},
            experts=_QWEN_EXPERTS,
            norm_inputs={"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate",)},
            head_norms=_Q_K_NORMS,
            unit_groups=_EXPERT_GROUPS,
            width="moe_intermediate_size",
            required=_QWEN_EXPERTS_EVERYWHERE,
        ),
    )
}


#: Rotary embeddings whose frequencies do not depend on the length of the prompt.
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
#: Those whose frequencies are fixed up to a length (`positions.fixed_limit`): a few-shot prefix would have other
#: frequencies alone than with a question that reaches beyond it.
BOUNDED_ROPE_TYPES = frozenset({"dynamic", "longrope"})
#: Key of the length that a model was trained on before its rotary embedding was scaled.
TRAINED_LENGTH = "original_max_position_embeddings"

#: What layers are that are no attention.
STATE_SPACE = "layers that are no attention (state-space, linear-attention, recurrent or convolution layers)"
# What raymerge cannot merge in a family, told by a config key that only such families have, or by the family's name.
_FOREIGN: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("vision_config", "audio_config", "thinker_config"),
        "towers for images or sound beside the language model, of a kind that is not known",
    ),
    (
        (
            *("state_size", "ssm_state_size", "mamba_d_state", "mamba_d_ssm", "ssm_cfg", "linear_num_value_heads"),
            *("attention_hidden_size", "conv_L_cache", "lru_width", "layers_block_type", "linear_conv_kernel_dim"),
        ),
        STATE_SPACE,
    ),
    (("kv_lora_rank",), "attention over compressed keys and values (multi-head latent attention)"),
    (("encoder_layers", "num_encoder_layers", "num_decoder_layers"), "an encoder beside the decoder"),
    (
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "experts whose tensors or routing are not those of mixtral, olmoe, qwen2_moe and qwen3_moe",
    ),
)
_SHARING = "embeddings of each layer's own (per-layer embeddings) and layers that share keys and values"
_GEMMA4 = "layers whose heads differ in size and number, a scale of each layer, and in some models " + _SHARING
_FOREIGN_NAMES: Mapping[str, str] = {
    **dict.fromkeys(
        ("mamba", "mamba2", "jamba", "bamba", "zamba", "zamba2", "falcon_mamba", "falcon_h1", "nemotron_h", "rwkv")
        + ("qwen3_next", "recurrent_gemma", "lfm2", "lfm2_moe", "minimax", "xlstm", "plamo2")
        + ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "lfm2_vl"),
        STATE_SPACE,
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _SHARING),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _GEMMA4),
    **dict.fromkeys(("mllama", "mllama_text_model"), "layers of cross-attention to images, which text never runs"),
    "paligemma": "a prompt whose tokens see those after them (a bidirectional prefix)",
    "qwen3_vl_moe": "experts beside towers for images",
}


#: Multimodal families whose language model is merged, each with the model types that one is known to have inside it.
MULTIMODAL: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "idefics3": ("llama",),
    "internvl": ("llama", "qwen2", "qwen3"),
    "llava": ("llama", "mistral", "qwen2"),
    "llava_next": ("llama", "mistral", "qwen2"),
    "llava_onevision": ("qwen2",),
    "mistral3": ("mistral", "ministral3"),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "qwen2_vl": ("qwen2_vl_text",),
    "qwen3_vl": ("qwen3_vl_text",),
    "smolvlm": ("llama",),
}
#: Those whose published config.json has the language model's keys at its top level, not in a text_config.
FLAT_CONFIGS = frozenset({"qwen2_vl", "qwen2_5_vl"})
# Language models that are other families' but for three positions of each token (time, height, width), which are one
# in text.
_IN_TEXT: Mapping[str, str] = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


def language_config(config: Any) -> Any:
    """The config of the language model that a config describes, or that is inside the multimodal model it describes, of
    the family that it is in text; ArchitectureError for a multimodal family with another than it is known to have."""
    if (known := MULTIMODAL.get(getattr(config, "model_type", ""))) is None:
        return config
    if (found := config.text_config.model_type) not in known:
        raise ArchitectureError(
            f"model type {config.model_type!r} with a language model of type {found!r} is not supported; supported in "
            f"it is {' or '.join(known)}"
        )
    return _in_text(config.text_config)


def _in_text(config: Any) -> Any:
    """A language model's config, as that of the family whose model gives the same logits of text."""
    from transformers import AutoConfig

    if (family := _IN_TEXT.get(config.model_type)) is None:
        return config
    # Of other keys that a config may hold (head_dim), these models read nothing.
    names = {field.name for field in dataclasses.fields(config)} - {"model_type"}
    values = {key: value for key, value in config.to_dict().items() if key in names}
    of_positions = ("type", "mrope_section", "mrope_interleaved")
    values["rope_parameters"] = {k: v for k, v in config.rope_parameters.items() if k not in of_positions}
    return AutoConfig.for_model(family, **values)


def deepstack_layers(config: Any) -> int:
    """How many of the first decoder layers a multimodal model adds features of images to (DeepStack, Meng et al. 2024,
    arXiv 2406.04334), by their position: what leaves layer i is added the i-th of them."""
    return len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def architecture_of(config: Any) -> Architecture:
    """The Architecture of a transformers config, sizes filled in; ArchitectureError names what is unsupported."""
    model_type: Any = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        found = _FOREIGN_NAMES.get(model_type) or next(
            (what for keys, what in _FOREIGN if any(getattr(config, key, None) is not None for key in keys)), None
        )
        reason = f"it has {found}" if found else "its layers' tensors are not described"
        supported = ", ".join(sorted({*ARCHITECTURES, *MULTIMODAL}))
        raise ArchitectureError(f"model type {model_type!r} is not supported: {reason}; supported are {supported}")
    family = ARCHITECTURES[model_type]
    for option, fields in family.options.items():
        if getattr(config, option):
            family = replace(family, **fields)
    for rope_type in sorted({rope.get("rope_type", "default") for rope in rotary_parameters(config).values()}):
        if rope_type not in (types := FIXED_ROPE_TYPES | BOUNDED_ROPE_TYPES):
            raise ArchitectureError(
                f"rotary embedding type {rope_type!r} is not supported; supported are {', '.join(sorted(types))}"
            )
    if family.query_scaling is not None:
        rope = config.rope_parameters
        if missing := [key for key in (family.query_scaling, TRAINED_LENGTH) if rope.get(key) is None]:
            raise ArchitectureError(
                f"rope_parameters of {model_type} without {' and '.join(missing)} do not say by what queries are "
                f"multiplied: correct the config ({family.query_scaling}: 0 for nothing)"
            )
    for key, known in family.required.items():
        if (value := getattr(config, key, None)) not in known:
            raise ArchitectureError(
                f"{model_type} with {key} = {value!r} is not supported; supported is {' or '.join(map(repr, known))}"
            )
    for scale, how in ((family.logit_divisor, "divided"), (family.logit_multiplier, "multiplied")):
        if scale and not getattr(config, scale):
            raise ArchitectureError(
                f"{model_type} with {scale} = 0 has no logits, which are {how} by it: correct the config"
            )
    heads = config.num_attention_heads
    kv_heads = heads if family.kv_heads is None else getattr(config, family.kv_heads)
    if kv_heads is None:  # of which some families' code makes nothing either
        raise ArchitectureError(
            f"{model_type} without {family.kv_heads} is not supported: add it to the config, {heads} if each query "
            "head has keys of its own"
        )
    if kv_heads < 1 or heads % kv_heads:  # each serves as many query heads
        raise ArchitectureError(
            f"{model_type} with {family.kv_heads} = {kv_heads} is not supported: it must divide num_attention_heads, "
            f"which is {heads}: correct the config"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "kv_heads": kv_heads,
        "query_heads": heads // kv_heads,
        "rotary": size,
        "value_channels": size,
        "units": getattr(config, family.width),
    }
    if family.shared_width:
        sizes["shared_units"] = getattr(config, family.shared_width)
    if not family.experts:
        return replace(family, sizes=sizes)
    count, chosen = config.num_experts, config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise ArchitectureError(f"num_experts_per_tok is {chosen}, but of {count} experts it must be 1 to {count}")
    projections, norm_inputs = dict(family.projections), dict(family.norm_inputs)
    for number in range(count):
        projections |= {name.format(number): (projection,) for projection, name in family.experts.items()}
    for norm, readers in norm_inputs.items():
        if family.router in readers:
            inputs = (family.experts[which].format(number) for number in range(count) for which in ("gate", "up"))
            norm_inputs[norm] = (*readers, *inputs)
    return replace(family, projections=projections, norm_inputs=norm_inputs, sizes=sizes | {"experts": count})


def rotary_parameters(config: Any) -> dict[str | None, Mapping[str, Any]]:
    """The rotary embeddings of a config: one, under None, or one for each of its layer types."""
    parameters = getattr(config, "rope_parameters", None) or {}
    types = {kind: own for kind, own in parameters.items() if isinstance(own, Mapping)}
    return types or {None: parameters}
