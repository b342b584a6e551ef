"""What a decoder layer of each supported family is made of, as data.

Everything that differs between families lives here; the code that loads, fuses, scores and saves asks this module and
names no family itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymerge.errors import UserError

#: For each group of interchangeable units, where its units come from: `order[p]` is the old unit that stands at p.
#: A group's array is (n,) int64, that of a group inside another (outer units, n): one order for each outer unit.
Permutations = Mapping[str, np.ndarray]

#: For each projection the axis along which its units lie (0 rows, 1 columns), and how that axis is made up of units,
#: outermost first. What is no family's group ("rotary": each dimension has a frequency of its own) stays in its order.
PROJECTIONS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "q": (0, ("kv_heads", "query_heads", "rotary")),
    "k": (0, ("kv_heads", "rotary")),
    "v": (0, ("kv_heads", "value_channels")),
    "o": (1, ("kv_heads", "query_heads", "value_channels")),
    "gate": (0, ("units",)),
    "up": (0, ("units",)),
    "down": (1, ("units",)),
    "router": (0, ("experts",)),
}

_ATTENTION = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
}
_MLP = {"mlp.gate_proj": ("gate",), "mlp.up_proj": ("up",), "mlp.down_proj": ("down",)}
_QKV, _GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
_HEAD_GROUPS = {"kv_heads": None, "query_heads": "kv_heads", "value_channels": "kv_heads"}
_Q_K_NORMS = {"self_attn.q_norm": "q", "self_attn.k_norm": "k"}


class ArchitectureError(UserError):
    """A model whose family, or whose options, raymerge does not support; the message says which are."""


@dataclass(frozen=True)
class Architecture:
    """Names of a family's tensors, relative to a decoder layer unless they start with "model." or "lm_head".

    Tensors are named as published checkpoints store them. `architecture_of` fills in what a config decides: `sizes`,
    and the names that stand once for each expert.

    projections: for each matrix that a merge averages, in a fixed order, the projections (see PROJECTIONS) whose rows
    it holds one after another: one, or several where the family fuses them. A bias has its matrix's rows.
    experts: in a mixture of experts the names of an expert's projections, with {} for its number; beside them stands
    the "router", whose rows move with the experts.
    norm_inputs: for each input norm, the matrices that read its output (they see W diag(gain)).
    output_norms: for each block ("self_attn", "mlp") whose output is normalised before it is added, that norm. Its
    gain comes after a normalisation of its own, so it belongs to no matrix.
    head_norms: norms over one head's query or key dimensions, applied before the rotary embedding. Their gains are
    every head's, so they stay as they are when heads move.
    projection_norms: norms over a whole projection, with the projection: their gains move with its rows.
    gain_offset: what is added to a norm's stored weight to give its gain.
    unit_groups: groups of units whose order does not matter to the layer's function, each with the group inside whose
    units it lies, or None. The dimensions of a query or key head form none: each has its own rotary frequency.
    sizes: how many units each name of PROJECTIONS stands for, of those inside another inside one unit of it.
    scaled_embedding: whether embeddings are multiplied by the root of their width.
    embedding_multiplier, residual_multiplier, logit_divisor: config keys of what embeddings, and what a block adds to
    the residual stream, are multiplied by, and of what logits are divided by.
    windows: which layers have the window that a config gives: "none", "all", or those that its `layer_types` name.
    rotary_layers: config key of a list with 1 for each layer that has a rotary embedding, and 0 for one without.
    rotary_neighbours: whether a rotary embedding turns dimensions (0, 1), (2, 3), … of a head together, instead of each
    of the first half with its counterpart of the second; in families without norms of queries and keys.
    attention_softcap, logit_softcap: config keys of c where attention scores, or logits, s become c tanh(s / c).
    width: config key of the MLP's width, or an expert's.
    required: config options that raymerge knows with some values only.
    since: the first release of transformers whose code computes the family as it was published, where that is younger
    than the oldest that raymerge runs with.
    """

    name: str
    projections: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _ATTENTION | _MLP)
    experts: Mapping[str, str] = field(default_factory=dict)
    norm_inputs: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"input_layernorm": _QKV, "post_attention_layernorm": _GATE_UP}
    )
    output_norms: Mapping[str, str] = field(default_factory=dict)
    head_norms: tuple[str, ...] = ()
    projection_norms: Mapping[str, str] = field(default_factory=dict)
    gain_offset: float = 0.0
    unit_groups: Mapping[str, str | None] = field(default_factory=lambda: {"units": None, **_HEAD_GROUPS})
    sizes: Mapping[str, int] = field(default_factory=dict)
    scaled_embedding: bool = False
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logit_divisor: str | None = None
    windows: str = "all"
    rotary_layers: str | None = None
    rotary_neighbours: bool = False
    attention_softcap: str | None = None
    logit_softcap: str | None = None
    width: str = "intermediate_size"
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    since: tuple[int, int] | None = None
    layer_prefix: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    unembedding: str = "lm_head.weight"

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices that a merge averages, in a fixed order."""
        return tuple(self.projections)

    @cached_property
    def router(self) -> str | None:
        """The matrix that chooses experts; None in a family that has none."""
        return next((matrix for matrix, parts in self.projections.items() if parts == ("router",)), None)

    @cached_property
    def expert_matrices(self) -> dict[str, tuple[str, int]]:
        """(name with {} for the expert's number, its number) of every matrix of an expert."""
        numbers = range(self.sizes.get("experts", 0))
        return {name.format(number): (name, number) for name in self.experts.values() for number in numbers}

    def layer_name(self, layer: int, tensor: str) -> str:
        """Full name of a layer's tensor in the state dict."""
        return self.layer_prefix.format(layer) + tensor

    def has_tensor(self, name: str) -> bool:
        """Whether a model of the family may have a tensor of this full name; files may hold others, as reward heads."""
        root, _, end = self.layer_prefix.partition("{}")
        if not name.startswith(root):
            return name in (self.embedding, self.final_norm, self.unembedding)
        part, _, kind = name.removeprefix(root).partition(end)[2].rpartition(".")
        norms = {*self.norm_inputs, *self.output_norms.values(), *self.head_norms, *self.projection_norms}
        return (kind == "weight" and part in norms) or (kind in ("weight", "bias") and part in self.projections)

    def gain_of(self, matrix: str) -> str | None:
        """The norm weight (a tensor of the layer) through which a matrix sees its input; None where there is none."""
        return next((f"{norm}.weight" for norm, readers in self.norm_inputs.items() if matrix in readers), None)

    def rows_of(self, projection: str, expert: int | None = None) -> tuple[str, slice]:
        """The matrix that holds a projection, and which of its rows (all where columns are its units)."""
        if expert is not None:
            return self.experts[projection].format(expert), slice(None)
        matrix = next(matrix for matrix, parts in self.projections.items() if projection in parts)
        parts = self.projections[matrix]
        if len(parts) == 1:
            return matrix, slice(None)
        lengths, number = self.row_blocks(matrix), parts.index(projection)
        return matrix, slice(sum(lengths[:number]), sum(lengths[: number + 1]))

    def row_blocks(self, matrix: str) -> list[int]:
        """Lengths of the projections that a matrix holds, along the axis of their units."""
        return [math.prod(self.sizes[unit] for unit in PROJECTIONS[part][1]) for part in self.projections[matrix]]

    @property
    def fused_blocks(self) -> dict[str, list[int]]:
        """For each matrix that holds several projections, how many rows each has."""
        return {matrix: self.row_blocks(matrix) for matrix, parts in self.projections.items() if len(parts) > 1}

    def origin(self, tensor: str, permutations: Permutations) -> str:
        """The tensor whose values come to stand in another: an expert's, where experts are reordered, else itself."""
        matrix, _, kind = tensor.rpartition(".")
        if matrix not in self.expert_matrices or "experts" not in permutations:
            return tensor
        name, number = self.expert_matrices[matrix]
        return f"{name.format(int(permutations['experts'][number]))}.{kind}"

    def unit_order(self, tensor: str, length: int, permutations: Permutations) -> tuple[int, np.ndarray] | None:
        """(axis, order (length,) int64) in which a tensor's slices stand after the permutations; None if unmoved.

        An expert's matrix is given by the expert's new number, and its slices are those of its origin.
        """
        matrix, _, kind = tensor.rpartition(".")
        parts = self.projections.get(matrix) or (self.projection_norms.get(matrix),)
        if parts == (None,):
            return None
        axis = PROJECTIONS[parts[0]][0]
        if (kind == "bias" and axis == 1) or not any(set(PROJECTIONS[part][1]) & set(permutations) for part in parts):
            return None
        _, expert = self.expert_matrices.get(matrix, (None, None))
        orders, start = [], 0
        for part in parts:
            names = PROJECTIONS[part][1]
            known = [self.sizes[name] for name in names]
            order = np.full(known, start, dtype=np.int64)
            for place, name in enumerate(names):
                own = permutations.get(name, np.arange(known[place]))
                outer = self.unit_groups.get(name)
                if own.shape[-1] != known[place] or (own.ndim == 2 and len(own) != self.sizes[outer]):
                    raise ArchitectureError(
                        f"{tensor} has {names} of {known}, but the permutation of {name} is for {list(own.shape)}"
                    )
                shape = [1] * len(known)
                shape[place] = known[place]
                if own.ndim == 2 and outer in names:
                    shape[names.index(outer)] = len(own)
                elif own.ndim == 2:  # inside experts, each of which has matrices of its own
                    own = own[expert]
                order += math.prod(known[place + 1 :]) * own.reshape(shape)
            orders.append(order.ravel())
            start += math.prod(known)
        if start != length:
            raise ArchitectureError(f"{tensor} has {length} slices, but its family's config gives it {start}")
        return axis, np.concatenate(orders)


_QWEN_EXPERTS = {
    "gate": "mlp.experts.{}.gate_proj",
    "up": "mlp.experts.{}.up_proj",
    "down": "mlp.experts.{}.down_proj",
}
_EXPERT_GROUPS = {"experts": None, "units": "experts", **_HEAD_GROUPS}
_GATE_UP_FUSED = {"mlp.gate_up_proj": ("gate", "up"), "mlp.down_proj": ("down",)}
_OLMO_NORMS = {
    "norm_inputs": {},
    "output_norms": {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    "projection_norms": _Q_K_NORMS,
}
_GEMMA_NORMS = {
    "norm_inputs": {"input_layernorm": _QKV, "pre_feedforward_layernorm": _GATE_UP},
    "output_norms": {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    "gain_offset": 1.0,
    "scaled_embedding": True,
    "windows": "layer_types",
    "required": {"use_bidirectional_attention": (None, False)},
}

ARCHITECTURES: Mapping[str, Architecture] = {
    family.name: family
    for family in (
        Architecture("llama", windows="none"),
        Architecture("mistral"),
        Architecture("ministral", windows="layer_types"),
        Architecture("seed_oss", windows="none"),
        Architecture("smollm3", windows="layer_types", rotary_layers="no_rope_layers"),
        Architecture(
            "granite",
            windows="none",
            embedding_multiplier="embedding_multiplier",
            residual_multiplier="residual_multiplier",
            logit_divisor="logits_scaling",
        ),
        Architecture("qwen2", windows="layer_types"),
        Architecture("qwen3", windows="layer_types", head_norms=tuple(_Q_K_NORMS)),
        Architecture(
            "gemma2",
            attention_softcap="attn_logit_softcapping",
            logit_softcap="final_logit_softcapping",
            **_GEMMA_NORMS,
        ),
        # Its config has a softcap of attention scores too, which its code does not apply.
        Architecture(
            "gemma3_text",
            head_norms=tuple(_Q_K_NORMS),
            logit_softcap="final_logit_softcapping",
            **_GEMMA_NORMS,
        ),
        Architecture(
            "phi3",
            projections={"self_attn.qkv_proj": ("q", "k", "v"), "self_attn.o_proj": ("o",)} | _GATE_UP_FUSED,
            norm_inputs={
                "input_layernorm": ("self_attn.qkv_proj",),
                "post_attention_layernorm": ("mlp.gate_up_proj",),
            },
        ),
        Architecture(
            "glm4",
            windows="none",
            projections=_ATTENTION | _GATE_UP_FUSED,
            norm_inputs={"input_layernorm": _QKV, "post_attention_layernorm": ("mlp.gate_up_proj",)},
            output_norms={"self_attn": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"},
            rotary_neighbours=True,
        ),
        Architecture("olmo2", windows="none", **_OLMO_NORMS),
        # Before, its sliding layers had the scaled rotary embedding of the full ones.
        Architecture("olmo3", windows="layer_types", since=(5, 13), **_OLMO_NORMS),
        Architecture(
            "mixtral",
            projections=_ATTENTION | {"block_sparse_moe.gate": ("router",)},
            experts={
                "gate": "block_sparse_moe.experts.{}.w1",
                "up": "block_sparse_moe.experts.{}.w3",
                "down": "block_sparse_moe.experts.{}.w2",
            },
            norm_inputs={"input_layernorm": _QKV, "post_attention_layernorm": ("block_sparse_moe.gate",)},
            unit_groups=_EXPERT_GROUPS,
        ),
        Architecture(
            "olmoe",
            windows="none",
            projections=_ATTENTION | {"mlp.gate": ("router",)},
            experts=_QWEN_EXPERTS,
            norm_inputs={"input_layernorm": _QKV, "post_attention_layernorm": ("mlp.gate",)},
            projection_norms=_Q_K_NORMS,
            unit_groups=_EXPERT_GROUPS,
            required={"clip_qkv": (None,)},
        ),
        Architecture(
            "qwen3_moe",
            projections=_ATTENTION | {"mlp.gate": ("router",)},
            experts=_QWEN_EXPERTS,
            norm_inputs={"input_layernorm": _QKV, "post_attention_layernorm": ("mlp.gate",)},
            head_norms=tuple(_Q_K_NORMS),
            unit_groups=_EXPERT_GROUPS,
            width="moe_intermediate_size",
            # Layers without experts among those with them could not be averaged.
            required={"mlp_only_layers": (None, []), "decoder_sparse_step": (1,)},
        ),
    )
}


def permute_tensor(architecture: Architecture, name: str, tensor: Tensor, permutations: Permutations) -> Tensor:
    """A layer's tensor (relative name) with its units reordered; the tensor itself where none of them moves.

    Where experts are reordered it is the tensor of the expert that comes to stand at `name` (`Architecture.origin`).
    """
    parts = architecture.projections.get(name.rpartition(".")[0])
    axis = PROJECTIONS[parts[0]][0] if parts and tensor.ndim > 1 else 0
    found = architecture.unit_order(name, tensor.shape[axis], permutations)
    return tensor if found is None else tensor.index_select(found[0], torch.from_numpy(found[1]).to(tensor.device))


def source_tensor(
    architecture: Architecture,
    layer: Mapping[str, Tensor],
    name: str,
    *,
    norms: str = "keep",
    permutations: Permutations | None = None,
) -> Tensor:
    """What a layer brings to an average for one of its tensors (relative name): float32, its units reordered.

    norms="fold": an input norm's gain is multiplied into the matrices that read it, and the gains of the input norms
    are one, so that the folded layer computes what the layer does. Other norms stay in any case: between them and a
    matrix lies a normalisation.
    """
    origin = name if permutations is None else architecture.origin(name, permutations)
    tensor = layer[origin].float()
    if norms == "fold":
        matrix, _, kind = origin.rpartition(".")
        if matrix in architecture.norm_inputs:
            tensor = torch.full_like(tensor, 1.0 - architecture.gain_offset)
        elif kind == "weight" and (gain := architecture.gain_of(matrix)):
            tensor = tensor * (layer[gain].float() + architecture.gain_offset)
    return tensor if permutations is None else permute_tensor(architecture, name, tensor, permutations)


def module_layer(architecture: Architecture, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors under the names, and in the shapes, of transformers' module; differentiable.

    Only experts differ: transformers stacks theirs to (experts, 2 units, d) and (experts, d, units).
    """
    if not architecture.experts:
        return dict(layer)
    stacked = {
        projection: torch.stack([layer[f"{name.format(n)}.weight"] for n in range(architecture.sizes["experts"])])
        for projection, name in architecture.experts.items()
    }
    moved = architecture.expert_matrices
    own = {name: tensor for name, tensor in layer.items() if name.rpartition(".")[0] not in moved}
    own["mlp.gate.weight"] = own.pop(f"{architecture.router}.weight")
    own["mlp.experts.gate_up_proj"] = torch.cat([stacked["gate"], stacked["up"]], 1)
    own["mlp.experts.down_proj"] = stacked["down"]
    return own


# Rotary embeddings whose frequencies do not depend on the length of the prompt. The others ("dynamic", "longrope")
# would give the few-shot prefix other frequencies alone than together with its question.
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})

_STATE_SPACE = "layers that are no attention (state-space, linear-attention, recurrent or convolution layers)"
# What raymerge cannot merge in a family, told by a config key that only such families have, or by the family's name.
_FOREIGN: tuple[tuple[tuple[str, ...], str], ...] = (
    (("vision_config", "audio_config", "thinker_config"), "towers for images or sound beside the language model"),
    (
        (
            *("state_size", "ssm_state_size", "mamba_d_state", "mamba_d_ssm", "ssm_cfg", "linear_num_value_heads"),
            *("attention_hidden_size", "conv_L_cache", "lru_width", "layers_block_type", "linear_conv_kernel_dim"),
        ),
        _STATE_SPACE,
    ),
    (("kv_lora_rank",), "attention over compressed keys and values (multi-head latent attention)"),
    (("encoder_layers", "num_encoder_layers", "num_decoder_layers"), "an encoder beside the decoder"),
    (
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "experts whose tensors or routing are not those of mixtral, olmoe and qwen3_moe",
    ),
)
_FOREIGN_NAMES = dict.fromkeys(
    ("mamba", "mamba2", "jamba", "bamba", "zamba", "zamba2", "falcon_mamba", "falcon_h1", "nemotron_h", "rwkv")
    + ("qwen3_next", "recurrent_gemma", "lfm2", "lfm2_moe", "minimax", "xlstm", "plamo2"),
    _STATE_SPACE,
) | {"granitemoehybrid": "a shared MLP of other tensors, in most sizes beside layers that are no attention"}


def architecture_of(config: Any) -> Architecture:
    """The Architecture of a transformers config, sizes filled in; ArchitectureError names what is unsupported."""
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        found = _FOREIGN_NAMES.get(model_type) or next(
            (what for keys, what in _FOREIGN if any(getattr(config, key, None) is not None for key in keys)), None
        )
        reason = f"it has {found}" if found else "its layers' tensors are not described"
        raise ArchitectureError(
            f"model type {model_type!r} is not supported: {reason}; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    family = ARCHITECTURES[model_type]
    installed = version("transformers")
    if family.since and tuple(map(int, installed.split(".")[:2])) < family.since:
        needed = ".".join(map(str, family.since))
        raise ArchitectureError(
            f"model type {model_type!r} needs transformers {needed} or later, and {installed} is installed, whose code "
            f"computes another model from its files: pip install 'transformers>={needed}'"
        )
    for rope_type in sorted({rope.get("rope_type", "default") for rope in _rotary_parameters(config).values()}):
        if rope_type not in FIXED_ROPE_TYPES:
            raise ArchitectureError(
                f"rotary embedding type {rope_type!r} depends on the prompt's length, so a few-shot prefix cannot be "
                f"shared; supported are {', '.join(sorted(FIXED_ROPE_TYPES))}"
            )
    for key, known in family.required.items():
        if (value := getattr(config, key, None)) not in known:
            raise ArchitectureError(
                f"{model_type} with {key} = {value!r} is not supported; supported is {' or '.join(map(repr, known))}"
            )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "kv_heads": kv_heads,
        "query_heads": heads // kv_heads,
        "rotary": size,
        "value_channels": size,
        "units": getattr(config, family.width),
    }
    if not family.experts:
        return replace(family, sizes=sizes)
    count = config.num_experts
    projections, norm_inputs = dict(family.projections), dict(family.norm_inputs)
    for number in range(count):
        projections |= {name.format(number): (projection,) for projection, name in family.experts.items()}
    for norm, readers in norm_inputs.items():
        if family.router in readers:
            inputs = (family.experts[which].format(number) for number in range(count) for which in ("gate", "up"))
            norm_inputs[norm] = (*readers, *inputs)
    return replace(family, projections=projections, norm_inputs=norm_inputs, sizes=sizes | {"experts": count})


def _rotary_parameters(config: Any) -> dict[str | None, Mapping[str, Any]]:
    """The rotary embeddings of a config: one, under None, or one for each of its layer types."""
    parameters = getattr(config, "rope_parameters", None) or {}
    types = {kind: own for kind, own in parameters.items() if isinstance(own, Mapping)}
    return types or {None: parameters}


#: What `rotary_types` says of a layer without a rotary embedding.
NO_ROTARY = "none"


def rotary_types(config: Any) -> list[str | None]:
    """For each decoder layer, the layer type whose rotary embedding it has; None where all layers that have one have
    the same, and NO_ROTARY of a layer that has none."""
    count = config.num_hidden_layers
    types = [None] * count if None in _rotary_parameters(config) else list(config.layer_types)
    key = ARCHITECTURES[config.model_type].rotary_layers
    if key is None:
        return types
    rotary = getattr(config, key)
    if len(rotary) < count:
        raise ArchitectureError(f"{key} has {len(rotary)} entries for {count} layers: it needs one for each")
    return [kind if has else NO_ROTARY for kind, has in zip(types, rotary, strict=False)]


def attention_windows(config: Any) -> list[int | None]:
    """For each decoder layer, how many positions back a query sees, itself included; None where all of them.

    As transformers builds the family's masks: without any window, with `sliding_window` in every layer, or in those
    that `layer_types` names.
    """
    types = getattr(config, "layer_types", None) or []
    known = {"full_attention", "sliding_attention"}
    if unknown := sorted(set(types) - known):
        raise ArchitectureError(f"layer types {unknown} are not supported; supported are {', '.join(sorted(known))}")
    window, windows = getattr(config, "sliding_window", None), ARCHITECTURES[config.model_type].windows
    if windows == "layer_types":
        return [window if kind == "sliding_attention" else None for kind in types]
    return [window if windows == "all" else None] * config.num_hidden_layers
