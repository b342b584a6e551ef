"""What a decoder layer of each supported family is made of, as data.

Everything that differs between families lives here; the code that loads, fuses, scores and saves asks this module and
names no family itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymerge.errors import UserError

#: For each group of interchangeable units, where its units come from: `order[p]` is the old unit that stands at p.
#: A group's array is (n,) int64, that of a group inside another (outer units, n): one order for each outer unit.
Permutations = Mapping[str, np.ndarray]


class ArchitectureError(UserError):
    """A model whose family, or whose options, raymerge does not support; the message says which are."""


@dataclass(frozen=True)
class Architecture:
    """Names of a family's tensors, relative to a decoder layer unless they start with "model." or "lm_head".

    matrices: the projections that a merge averages, in a fixed order.
    norm_inputs: for each input norm, the matrices that read its output (they see W diag(gain)).
    head_norms: norms over one head's query or key dimensions, applied before the rotary embedding. Their gains are
    every head's, so they stay as they are when heads move.
    unit_groups: groups of units whose order does not matter to the layer's function, each with the group inside whose
    units it lies, or None. The dimensions of a query or key head form none: each has its own rotary frequency.
    unit_axes: for each matrix with such units, the axis along which they lie (0 rows, 1 columns) and how that axis is
    made up of units, outermost first; a name that is no group's ("rotary") stays in its order. A bias has its
    matrix's rows.
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
    unit_groups: Mapping[str, str | None] = field(
        default_factory=lambda: {
            "units": None,
            "kv_heads": None,
            "query_heads": "kv_heads",
            "value_channels": "kv_heads",
        }
    )
    unit_axes: Mapping[str, tuple[int, tuple[str, ...]]] = field(
        default_factory=lambda: {
            "self_attn.q_proj": (0, ("kv_heads", "query_heads", "rotary")),
            "self_attn.k_proj": (0, ("kv_heads", "rotary")),
            "self_attn.v_proj": (0, ("kv_heads", "value_channels")),
            "self_attn.o_proj": (1, ("kv_heads", "query_heads", "value_channels")),
            "mlp.gate_proj": (0, ("units",)),
            "mlp.up_proj": (0, ("units",)),
            "mlp.down_proj": (1, ("units",)),
        }
    )
    layer_prefix: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    unembedding: str = "lm_head.weight"

    def layer_name(self, layer: int, tensor: str) -> str:
        """Full name of a layer's tensor in the state dict."""
        return self.layer_prefix.format(layer) + tensor

    def gain_of(self, matrix: str) -> str | None:
        """The gain (a tensor of the layer) through which a matrix sees its input; None where there is none."""
        return next((f"{norm}.weight" for norm, readers in self.norm_inputs.items() if matrix in readers), None)

    def unit_order(self, tensor: str, length: int, permutations: Permutations) -> tuple[int, np.ndarray] | None:
        """(axis, order (length,) int64) in which a tensor's slices stand after the permutations; None if unmoved."""
        matrix, _, kind = tensor.rpartition(".")
        axis, names = self.unit_axes.get(matrix, (0, ()))
        if not set(names) & set(permutations) or (kind == "bias" and axis == 1):
            return None
        sizes: dict[str, int] = {}
        for name, own in permutations.items():
            sizes[name] = own.shape[-1]
            if own.ndim == 2:
                sizes[self.unit_groups[name]] = own.shape[0]
        # What stays in its order need not be known by name: neighbours that stay are one block.
        blocks: list[str] = []
        for name in names:
            if name in sizes or not blocks or blocks[-1] in sizes:
                blocks.append(name)
        known = [sizes.get(name) for name in blocks]
        if None in known:
            known[known.index(None)] = length // math.prod(size for size in known if size is not None)
        if None in known or math.prod(known) != length:
            raise ArchitectureError(f"{tensor} has {length} slices, but the permutations are for {blocks} of {known}")
        order = np.zeros(known, dtype=np.int64)
        for place, name in enumerate(blocks):
            own = permutations.get(name, np.arange(known[place]))
            shape = [1] * len(known)
            shape[place] = known[place]
            if own.ndim == 2:
                shape[blocks.index(self.unit_groups[name])] = own.shape[0]
            order += math.prod(known[place + 1 :]) * own.reshape(shape)
        return axis, order.ravel()


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", head_norms=("self_attn.q_norm", "self_attn.k_norm")),
}


def permute_tensor(architecture: Architecture, name: str, tensor: Tensor, permutations: Permutations) -> Tensor:
    """A layer's tensor (relative name) with its units reordered; the tensor itself where none of them moves."""
    matrix = name.rpartition(".")[0]
    if matrix not in architecture.unit_axes:
        return tensor
    axis = architecture.unit_axes[matrix][0] if tensor.ndim > 1 else 0
    found = architecture.unit_order(name, tensor.shape[axis], permutations)
    return tensor if found is None else tensor.index_select(found[0], torch.from_numpy(found[1]).to(tensor.device))


def permute_layer(
    architecture: Architecture, layer: Mapping[str, Tensor], permutations: Permutations
) -> dict[str, Tensor]:
    """A decoder layer with its units reordered, tensors by relative name: the same function, to rounding."""
    return {name: permute_tensor(architecture, name, tensor, permutations) for name, tensor in layer.items()}


def source_tensor(
    architecture: Architecture,
    layer: Mapping[str, Tensor],
    name: str,
    *,
    norms: str = "keep",
    permutations: Permutations | None = None,
) -> Tensor:
    """What a layer brings to an average for one of its tensors (relative name): float32, its units reordered.

    norms="fold": an input norm's gain is multiplied into the matrices that read it, and the two input norms are ones,
    so that the folded layer computes what the layer does. Norms of single heads stay in any case: between them and
    their matrix lies a normalisation.
    """
    tensor = layer[name].float()
    if norms == "fold":
        matrix, _, kind = name.rpartition(".")
        if matrix in architecture.norm_inputs:
            tensor = torch.ones_like(tensor)
        elif kind == "weight" and (gain := architecture.gain_of(matrix)):
            tensor = tensor * layer[gain].float()
    return tensor if permutations is None else permute_tensor(architecture, name, tensor, permutations)


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
