"""What a decoder layer of each supported family is made of, as data.

Everything that differs between families lives here; the code that loads, fuses, scores and saves asks this module and
names no family itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ArchitectureError(ValueError):
    """A model whose family, or whose options, raymerge does not support; the message says which are."""


@dataclass(frozen=True)
class Architecture:
    """Names of a family's tensors, relative to a decoder layer unless they start with "model." or "lm_head".

    matrices: the projections that a merge averages, in a fixed order.
    norm_inputs: for each input norm, the matrices that read its output (they see W diag(gain)).
    head_norms: norms over one head's query or key dimensions, applied before the rotary embedding.
    """

    name: str
    matrices: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    norm_inputs: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }
    )
    head_norms: tuple[str, ...] = ()
    layer_prefix: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    unembedding: str = "lm_head.weight"

    def layer_name(self, layer: int, tensor: str) -> str:
        """Full name of a layer's tensor in the state dict."""
        return self.layer_prefix.format(layer) + tensor


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", head_norms=("self_attn.q_norm", "self_attn.k_norm")),
}

# Rotary embeddings whose frequencies do not depend on the length of the prompt. The others ("dynamic", "longrope")
# would give the few-shot prefix other frequencies alone than together with its question.
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def architecture_of(config: Any) -> Architecture:
    """The Architecture of a transformers config; ArchitectureError names what is unsupported and what is."""
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ArchitectureError(
            f"model type {model_type!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in FIXED_ROPE_TYPES:
        raise ArchitectureError(
            f"rotary embedding type {rope_type!r} depends on the prompt's length, so a few-shot prefix cannot be "
            f"shared; supported are {', '.join(sorted(FIXED_ROPE_TYPES))}"
        )
    return ARCHITECTURES[model_type]


def attention_windows(config: Any) -> list[int | None]:
    """For each decoder layer, how many positions back a query sees, itself included; None where all of them.

    Follows transformers: a layer's entry in `layer_types` decides, and without such a list `sliding_window` holds
    for every layer.
    """
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    known = {"full_attention", "sliding_attention"}
    if unknown := sorted(set(types) - known):
        raise ArchitectureError(f"layer types {unknown} are not supported; supported are {', '.join(sorted(known))}")
    return [window if kind == "sliding_attention" else None for kind in types]


def trimmed_config(values: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """A config's values for the model that keeps the layers `kept` (original numbers, in order).

    `num_hidden_layers` is set, and every per-layer list (one entry a layer, and "layer" in its key, such as
    `layer_types` or `no_rope_layers`) keeps the entries of the kept layers.
    """
    n_layers = values["num_hidden_layers"]
    trimmed = dict(values, num_hidden_layers=len(kept))
    for key, value in values.items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == n_layers:
            trimmed[key] = [value[index] for index in kept]
    return trimmed
