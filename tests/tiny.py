"""Tiny random checkpoints and questions, and what they must answer by other means than raymerge's.

The reference merges one step after the other in float64, as the published method is written, builds an ordinary
transformers model of the result with strict loading, and runs whole prompts one at a time with eager attention.
"""

import copy
import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GPTNeoXForCausalLM,
)
from transformers.initialization import no_init_weights

from raymerge.architectures import permute_tensor
from raymerge.demo import MODEL_PATH
from raymerge.families import ARCHITECTURES
from raymerge.fusion import fused_tensors
from raymerge.questions import LETTERS, Question, QuestionSet
from raymerge.saving import save_checkpoint

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
N_LAYERS = 5

#: How reference models compute: plainly. Other implementations leave softcaps out, or know no float64.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}

_SLIDING, _FULL = ["sliding_attention"], ["full_attention"]

_GRANITE4 = {
    "model_type": "granitemoehybrid",
    "num_local_experts": 0,
    "intermediate_size": 7,  # which the family does not read
    "shared_intermediate_size": 48,
    "layer_types": 5 * ["attention"],  # as published
    "mamba_n_heads": 4,  # which the config wants to divide its width
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 5.0,
}

#: What differs from the common shape below; together they have every feature that a supported family may have.
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "llama3_rope": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    # As plain up to max_position_embeddings.
    "llama_dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
    # The window is shorter than every question of `questions`, so that the last position sees no prefix key.
    "mistral_window": {"model_type": "mistral", "sliding_window": 11, "head_dim": 12},
    "ministral": {
        "model_type": "ministral",
        "head_dim": 8,
        "sliding_window": 40,
        "layer_types": _FULL + _SLIDING + 3 * _FULL,
    },
    "cwm": {
        "model_type": "cwm",
        "head_dim": 12,
        "sliding_window": 40,
        "mlp_bias": True,
        "layer_types": _FULL + _SLIDING + 3 * _FULL,
    },
    # The queries of every prompt's last positions are scaled.
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 12,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "seed_oss": {"model_type": "seed_oss", "head_dim": 12, "attention_out_bias": True},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 12, "use_bias": True},
    "helium": {"model_type": "helium", "head_dim": 8, "pad_token_id": 0},
    "arcee": {"model_type": "arcee"},
    # Gains are stored less 1; half of each head's dimensions are rotated, which configs as published say so.
    "nemotron": {"model_type": "nemotron", "head_dim": 12, "partial_rotary_factor": 0.5},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 60, "tie_word_embeddings": True},
    "starcoder2_no_biases": {"model_type": "starcoder2", "use_bias": False, "num_key_value_heads": 1},
    # Attention and MLP side by side, behind one norm; biases everywhere, in the unembedding too.
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    # The same behind a norm each; queries, keys and values of a head one after another, in tensors of other names. Of a
    # number of key/value heads, which configs below have, the family reads nothing.
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "gpt_neox_sequential": {"model_type": "gpt_neox", "use_parallel_residual": False, "attention_bias": False},
    # Both behind one norm without a bias.
    "cohere": {"model_type": "cohere", "logit_scale": 0.3, "tie_word_embeddings": True, "attention_bias": True},
    # Its layers without a window have no rotary embedding.
    "cohere2": {
        "model_type": "cohere2",
        "logit_scale": 0.3,
        "tie_word_embeddings": True,
        "sliding_window": 40,
        "layer_types": _SLIDING[:1] + _FULL + 3 * _SLIDING,
    },
    # Norms without gains.
    "olmo": {"model_type": "olmo", "num_key_value_heads": 4},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "stablelm_parallel": {"model_type": "stablelm", "use_parallel_residual": True, "partial_rotary_factor": 0.25},
    # Its activation has parameters.
    "apertus": {"model_type": "apertus", "pad_token_id": 0},
    # The last layers, which most plans average, have no rotary embedding, the layers before them have.
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 0, 0, 0],
        "use_sliding_window": True,
        "sliding_window": 40,
        "pad_token_id": 0,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 5.0,
        "mlp_bias": True,
    },
    "granite4": {**_GRANITE4, "position_embedding_type": "rope"},
    # Without any rotary embedding.
    "granite4_nope": {**_GRANITE4, "attention_bias": True, "num_key_value_heads": 1},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", "head_dim": 12, "attention_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "qwen3_biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "num_key_value_heads": 1},
    "gemma": {"model_type": "gemma", "head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    # Scores and logits reach far beyond their caps. The last layers are of one kind, so that they can be averaged.
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 12,
        "query_pre_attn_scalar": 5,
        "sliding_window": 40,
        "layer_types": _SLIDING[:1] + _FULL + 3 * _SLIDING,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": True,
    },
    "vaultgemma": {
        "model_type": "vaultgemma",
        "head_dim": 12,
        "query_pre_attn_scalar": 5,
        "sliding_window": 40,
        "layer_types": _SLIDING[:1] + _FULL + 3 * _SLIDING,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": None,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 12,
        "query_pre_attn_scalar": 5,
        "sliding_window": 40,
        "layer_types": _SLIDING[:1] + _FULL + 3 * _SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
        "attention_bias": True,
    },
    "phi3": {
        "model_type": "phi3",
        "sliding_window": 60,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "glm": {
        "model_type": "glm",
        "head_dim": 12,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    # As Phi-4-mini: short factors up to original_max_position_embeddings, an attention factor of 1.13 throughout.
    "phi3_longrope": {
        "model_type": "phi3",
        "sliding_window": 262_144,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.3, 2.0],
            "long_factor": [1.5, 4.0, 9.0],
        },
    },
    "glm4": {
        "model_type": "glm4",
        "head_dim": 12,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 40,
        "layer_types": _SLIDING[:1] + _FULL + 3 * _SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    },
    # Its layers without a window have no rotary embedding.
    "exaone4": {
        "model_type": "exaone4",
        "head_dim": 12,
        "sliding_window": 40,
        "layer_types": _SLIDING[:1] + _FULL + 3 * _SLIDING,
    },
    # And no layer a window.
    "exaone4_full": {"model_type": "exaone4", "sliding_window": None, "layer_types": 5 * _FULL},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, "intermediate_size": 24},
    # Sizes in multiples of 8: half-precision experts are multiplied in rows of 16 bytes.
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    # Beside the experts one that every token goes through, of another width.
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 12,
    },
}


#: Those with rotary frequencies that depend on the length of longer sequences, also layer type by layer type.
BOUNDED = ("llama_dynamic", "llama_longrope", "phi3_longrope", "gemma3_dynamic", "gemma3_longrope")


def bounded(name, limit):
    """Options of `make_checkpoint` for one of BOUNDED whose frequencies are fixed up to so many tokens."""
    family, kind = name.split("_")
    if kind == "dynamic":
        own, options = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}, {"max_position_embeddings": limit}
    else:
        factors = {"short_factor": [1.0, 1.3, 2.0, 2.5], "long_factor": [1.5, 4.0, 9.0, 12.0]}
        own = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": limit, **factors}
        options = {"original_max_position_embeddings": limit} if family == "phi3" else {}
    if family == "gemma3":
        plain = {"rope_type": "default", "rope_theta": 1000.0}
        return {"family": family, "head_dim": 8, **options, "rope_parameters": {_SLIDING[0]: own, _FULL[0]: plain}}
    return {"family": family, **options, "rope_parameters": own}


def _folds(family):
    return not (family.output_norms or family.head_norms or family.projection_norms)


#: Those whose norms have a bias that some matrix has none to take up.
UNFOLDABLE = ("nemotron", "starcoder2_no_biases", "stablelm", "stablelm_parallel", "gpt_neox_sequential")
#: Those whose norms all stand before the matrices that read them, so that folding takes up every gain and bias.
FOLDABLE = [
    name
    for name, options in FAMILIES.items()
    if _folds(ARCHITECTURES[options["model_type"]]) and name not in (*UNFOLDABLE, "olmo")
]


def demo_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def config_of(family, **options):
    values = (
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(demo_tokenizer()),
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | copy.deepcopy(FAMILIES[family])
        | options
    )
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    if "rope_parameters" not in values:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def offset_gains(model_type):
    """Whether a family stores its norms' gains less 1."""
    return "gemma" in model_type or model_type == "nemotron"


def empty_model(config, dtype=torch.float64, kind=AutoModelForCausalLM, **options):
    """A transformers model whose parameters are to be set: drawing them takes most of the time of building it."""
    with no_init_weights():
        model = kind.from_config(config, **(PLAIN | options), dtype=dtype)
    model.tie_weights()  # as the drawing ends
    return model.eval()  # some have dropout


def random_model(config, *, seed=0, dtype=torch.float32, kind=AutoModelForCausalLM):
    """A transformers model with weights so large that attention is far from uniform and layers matter."""
    model = empty_model(config, dtype, kind, attn_implementation=None)  # of transformers' choice
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                value = 0.3 * noise + (0 if offset_gains(config.model_type) else 1)
            elif name.endswith("bias"):
                value = 0.5 * noise
            elif "embed" in name or "lm_head" in name:
                value = noise
            else:
                value = 1.5 * noise / tensor.shape[-1] ** 0.5
            tensor.copy_(value)
    return model


def make_checkpoint(folder, family="llama", *, seed=0, dtype=torch.float32, shard="5GB", **options):
    """Write a random checkpoint with the demo's tokenizer; returns the folder."""
    model = random_model(config_of(family, **options), seed=seed, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return _with_tokenizer(folder)


def _with_tokenizer(folder):
    for file in MODEL_PATH.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


# -- language models inside multimodal ones --------------------------------------------------------------------------

_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "image_size": 32,
    "patch_size": 8,
}
IMAGE_TOKEN = 9
_PIXTRAL = {"vision_config": _TOWER | {"model_type": "pixtral", "head_dim": 8}, "tie_word_embeddings": False}
_CLIP = _TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
_QWEN_TOWER = {"depth": 3, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen_text(kind, **rotary):
    own = {"rope_type": "default", "rope_theta": 100.0, **rotary}
    return {"model_type": f"{kind}_text", "rope_parameters": own}


#: By model type, with "+" and more behind it where there are several, the family of the language model, and what else
#: the whole config has; of a text_config what differs from the family's.
MULTIMODAL = {
    "gemma3": ("gemma3", {"vision_config": _SIGLIP, "mm_tokens_per_image": 4, "tie_word_embeddings": True}),
    "mistral3": ("mistral", _PIXTRAL),
    "mistral3+ministral3": ("ministral3", _PIXTRAL),
    "llava": ("llama_biases", {"vision_config": _CLIP, "vision_feature_layer": -2}),
    "llava_next": ("mistral_window", {"vision_config": _CLIP, "image_grid_pinpoints": [[32, 64]]}),
    "llava_onevision": (
        "qwen2",
        {"vision_config": _SIGLIP, "image_grid_pinpoints": [[32, 64]], "tie_word_embeddings": True},
    ),
    "internvl": (
        "qwen3",
        {
            "vision_config": _TOWER
            | {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8], "hidden_act": "gelu"},
            "tie_word_embeddings": False,
        },
    ),
    "idefics3": (
        "llama3_rope",
        {
            "vision_config": _TOWER | {"model_type": "idefics3_vision"},
            "scale_factor": 2,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
        },
    ),
    "smolvlm": ("llama", {"vision_config": _TOWER | {"model_type": "smolvlm_vision"}, "scale_factor": 2}),
    "qwen2_vl": (
        "qwen2",
        {
            "text_config": _qwen_text("qwen2_vl", mrope_section=[1, 1, 2]),
            "vision_config": _QWEN_TOWER | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_windows",
        {
            "text_config": _qwen_text("qwen2_5_vl", mrope_section=[1, 1, 2]),
            "vision_config": _QWEN_TOWER
            | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16}
            | {"fullatt_block_indexes": [1]},
        },
    ),
    # Features of images are added to what the first two layers give.
    "qwen3_vl": (
        "qwen3",
        {
            "text_config": _qwen_text("qwen3_vl", mrope_section=[2, 2, 2], mrope_interleaved=True),
            "vision_config": _QWEN_TOWER
            | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16}
            | {"deepstack_visual_indexes": [0, 2]},
        },
    ),
}


def multimodal_config(kind, *, inside=None, **text):
    """inside: another family than the kind's."""
    family, options = MULTIMODAL[kind]
    options = copy.deepcopy(options)
    own = config_of(inside or family, **text).to_dict() | options.pop("text_config", {})
    return AutoConfig.for_model(kind.partition("+")[0], text_config=own, image_token_id=IMAGE_TOKEN, **options)


def make_multimodal(folder, kind="gemma3", *, spelling="published", seed=0, dtype=torch.float32, **text):
    """Write a random multimodal checkpoint with the demo's tokenizer, text alone in its processor files; the folder.

    spelling: of tensors' names and of the config, as files are published, or as transformers 5 calls its modules and
    writes configs.
    """
    model = random_model(multimodal_config(kind, **text), seed=seed, dtype=dtype, kind=AutoModelForImageTextToText)
    model.save_pretrained(folder)
    if spelling == "modules":
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
    else:
        tensors = load_file(folder / "model.safetensors")
        if kind in ("gemma3", "llava", "llava_next", "llava_onevision"):  # whose towers have a module more
            tensors = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): t for name, t in tensors.items()}
        if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            written = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(_published_qwen(written)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text(f'{{"image_seq_length": 4, "of": "{kind}"}}\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return _with_tokenizer(folder)


def _published_qwen(written):
    """A config of Qwen2-VL or later as Qwen has published it; until Qwen3-VL with the language model's keys among the
    others."""
    kind, text = written["model_type"], dict(written.pop("text_config"))
    rotary = text.pop("rope_parameters")
    text.pop("layer_types", None)
    text["rope_theta"] = rotary.pop("rope_theta")
    if kind == "qwen3_vl":
        del text["use_sliding_window"], text["sliding_window"], text["max_window_layers"]
        return written | {"text_config": text | {"rope_scaling": rotary}}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rotary["mrope_section"]}
    text["torch_dtype"] = text.pop("dtype")
    del written["dtype"], text["model_type"]
    return text | written


def image_inputs(kind, ids, dtype=torch.float64):
    """What the whole model reads of a prompt with an image, of 32 by 32 or 64 pixels, after its first token."""
    kind = kind.partition("+")[0]
    patches = {"llava": 16, "llava_next": 52, "llava_onevision": 52}.get(kind, 4)
    tokens = torch.tensor([[ids[0], *[IMAGE_TOKEN] * patches, *ids[1:]]])
    shape = {
        "llava_next": (1, 3, 3, 32, 32),  # the whole, and two halves
        "llava_onevision": (1, 3, 3, 32, 32),
        "idefics3": (1, 1, 3, 32, 32),
        "smolvlm": (1, 1, 3, 32, 32),
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), (16, 3 * 2 * 8 * 8)),
    }.get(kind, (1, 3, 32, 32))
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    further = {"image_sizes": torch.tensor([[32, 32 if kind == "mistral3" else 64]])}
    if kind == "gemma3":
        further = {"token_type_ids": (tokens == IMAGE_TOKEN).long()}
    elif kind.startswith("qwen"):
        further = {
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (tokens == IMAGE_TOKEN).int(),
        }
    elif not kind.startswith(("llava_", "mistral3")):
        further = {}
    return {"input_ids": tokens, "pixel_values": pixels, **further}


# -- experts ---------------------------------------------------------------------------------------------------------


def expert_names(model_type):
    """Names of the router and of an expert's projections (gate, up, down) in a published checkpoint; None: no expert"""
    if model_type == "mixtral":
        return "block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2"))
    if model_type in ("olmoe", "qwen2_moe", "qwen3_moe"):
        return "mlp.gate", *(f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down"))
    return None


def stored_layer(model_type, layer):
    """A layer of transformers' module, tensors by relative name, as checkpoints store it."""
    if (names := expert_names(model_type)) is None:
        return dict(layer)
    layer = dict(layer)
    router, gate, up, down = names
    stored = {f"{router}.weight": layer.pop("mlp.gate.weight")}
    gate_up, downs = layer.pop("mlp.experts.gate_up_proj"), layer.pop("mlp.experts.down_proj")
    for number in range(len(downs)):
        half = gate_up.shape[1] // 2
        stored[f"{gate.format(number)}.weight"] = gate_up[number, :half].contiguous()
        stored[f"{up.format(number)}.weight"] = gate_up[number, half:].contiguous()
        stored[f"{down.format(number)}.weight"] = downs[number].contiguous()
    return layer | stored


def loaded_layer(model_type, layer):
    """The inverse of `stored_layer`."""
    if (names := expert_names(model_type)) is None:
        return dict(layer)
    router, *projections = (f"{name}.weight" for name in names)
    count = len(layer[router])
    gate, up, down = (torch.stack([layer[name.format(n)] for n in range(count)]) for name in projections)
    experts = {name.format(n) for n in range(count) for name in projections}
    loaded = {name: tensor for name, tensor in layer.items() if name not in (router, *experts)}
    loaded["mlp.gate.weight"] = layer[router]
    return loaded | {"mlp.experts.gate_up_proj": torch.cat([gate, up], 1), "mlp.experts.down_proj": down}


def root_of(model_type):
    """What a layer's full names begin with, before its number, in files and in transformers' model."""
    return f"{'gpt_neox' if model_type == 'gpt_neox' else 'model'}.layers."


def of_layers(change, model_type, state):
    """A whole state dict with `stored_layer` or `loaded_layer` applied to its layers, and its unembedding named as
    these name it; with `loaded_layer` it has one, tied or not."""
    changed, layers, root = {}, {}, root_of(model_type)
    names = {}
    if model_type == "gpt_neox":
        (loaded,) = GPTNeoXForCausalLM._tied_weights_keys  # embed_out in transformers 5.13, lm_head in 5.24
        names = {"embed_out.weight": loaded} if change is loaded_layer else {loaded: "embed_out.weight"}
    for name, tensor in state.items():
        if name.startswith(root):
            number, relative = name.removeprefix(root).split(".", 1)
            layers.setdefault(number, {})[relative] = tensor
        else:
            changed[names.get(name, name)] = tensor
    for number, layer in layers.items():
        changed |= {f"{root}{number}.{name}": tensor for name, tensor in change(model_type, layer).items()}
    if change is loaded_layer and "model.embed_tokens.weight" in changed:
        changed = {"lm_head.weight": changed["model.embed_tokens.weight"]} | changed
    return changed


# -- the reference ---------------------------------------------------------------------------------------------------


def published_merge(state, n_layers, steps, *, biases="keep"):
    """(state dict, kept layers): merge (into, remove, alpha) steps one after the other, as the paper writes it.

    theta_into = alpha theta_into + (1 - alpha) theta_remove over all matrices, in float64, rounded at the end.
    """
    state = {name: tensor.clone() for name, tensor in state.items()}
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    root = next(name for name in state if ".layers.0." in name).partition("0.")[0]
    averaged = [
        name.removeprefix(f"{root}0.")
        for name, tensor in state.items()
        if name.startswith(f"{root}0.")
        and (tensor.ndim > 1 or (biases == "merge" and name.endswith(".bias") and "norm" not in name))
    ]
    alive = list(range(n_layers))
    for into, remove, alpha in steps:
        for relative in averaged:
            name, other = f"{root}{into}.{relative}", f"{root}{remove}.{relative}"
            if name in state:
                state[name] = alpha * state[name].double() + (1 - alpha) * state[other].double()
        alive.remove(remove)
    merged = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if name.startswith(root):
            if int(parts[2]) not in alive:
                continue
            parts[2] = str(alive.index(int(parts[2])))
        merged[".".join(parts)] = tensor.to(dtypes[name])
    return merged, alive


def steps_of(plan):
    return [(step.into, step.remove, step.alpha) for step in plan.steps]


def merged_model(model, steps, *, biases="keep"):
    """The merged transformers model in float64, from the reference's own merging, loaded strictly."""
    config = copy.deepcopy(model.config)
    state, alive = published_merge(model.state_dict(), config.num_hidden_layers, steps, biases=biases)
    for key in ("layer_types", "no_rope_layers"):
        if getattr(config, key, None):
            setattr(config, key, [getattr(config, key)[layer] for layer in alive])
    config.num_hidden_layers = len(alive)
    merged = empty_model(config)
    merged.load_state_dict(state, strict=True)
    return merged


@torch.no_grad()
def plain_logits(model, ids, *, last=0):
    """(T, V) float64 logits of one whole prompt; last: of so many positions, where it is not 0."""
    ids = torch.as_tensor(np.asarray(ids))[None]
    return model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0].double()


def plain_answers(model, prompts_ids, letters):
    """Last-position figures of whole prompts, one at a time: letters' logits (n, 4), logsumexp (n,), top token (n,)."""
    last = torch.stack([plain_logits(model, ids, last=1)[-1] for ids in prompts_ids])
    return last[:, list(letters)].numpy(), torch.logsumexp(last, -1).numpy(), last.argmax(-1).numpy()


# -- questions -------------------------------------------------------------------------------------------------------

WORDS = "the red cat has a small box and two old birds in water near that long road of stone by night".split()


def make_questions(counts, *, shots=2, seed=0, longest=40):
    """A QuestionSet of `counts` {subject: questions} with texts of 1 to `longest` words."""
    rng = np.random.default_rng(seed)

    def words(n):
        return " ".join(rng.choice(WORDS, n))

    def question(subject, split, row, n):
        options = tuple(words(1 + int(rng.integers(3))) for _ in range(4))
        return Question(f"{subject}/{split}/{row}", subject, split, "en", words(n) + "?", options, int(rng.integers(4)))

    subjects = sorted(counts)
    lengths = {s: rng.integers(1, longest + 1, counts[s]) for s in subjects}
    for s in subjects:  # the extremes occur for certain
        lengths[s][:2] = [longest, 1][: counts[s]]
    asked = tuple(question(s, "test", row, int(n)) for s in subjects for row, n in enumerate(lengths[s]))
    examples = {s: tuple(question(s, "dev", row, 6) for row in range(shots)) for s in subjects}
    return QuestionSet("tiny", "en", "test", asked, examples)


def permutations(aligner, plan):
    """By layer that the plan merges into another, whatever its coefficient, its reordering."""
    groups = [aligner.towards(kept, layers, plan.alignment) for kept, layers in plan.groups.items()]
    return {layer: order for found in groups for layer, order in found.items()}


def whole_prompts(questions, tokenizer, *, bos=None):
    """The token ids of every whole prompt, in question order, from text assembled here."""
    prompts = []
    for question in questions.questions:
        subject = question.subject.replace("_", " ")
        text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        for q in (*questions.examples[question.subject], question):
            text += q.text + "".join(f"\n{letter}. {o}" for letter, o in zip(LETTERS, q.options, strict=True))
            text += "\nAnswer:" + ("" if q is question else f" {LETTERS[q.answer]}\n\n")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(([] if bos is None else [bos]) + ids)
    return prompts


def fuse_state_dict(base, architecture, plan, *, aligner=None):
    """The merged model's whole state dict."""
    return dict(fused_tensors(base, architecture, plan, aligner=aligner))


def save_merge(checkpoint, plan, destination, **options):
    """The model that a plan makes of a checkpoint, saved; returns what `save_checkpoint` does."""
    tensors = fused_tensors(checkpoint, checkpoint.architecture, plan)
    return save_checkpoint(checkpoint, tensors, [layer.index for layer in plan.kept], destination, **options)


def permute_layer(architecture, layer, permutations):
    """A decoder layer with its units reordered, tensors by relative name: the same function, to rounding."""
    return {
        name: permute_tensor(architecture, name, layer[architecture.origin(name, permutations)], permutations)
        for name in layer
    }
