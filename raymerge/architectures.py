"""What a decoder layer is made of, as data, and the operations that follow from it alone.

An Architecture says everything in which families differ, so that the code that loads, fuses, scores and saves names no
family itself; `families` has one for each that is supported. By its data a layer's units are reordered, its norms'
gains folded into its matrices, and its experts stacked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
    "shared_gate": (0, ("shared_units",)),
    "shared_up": (0, ("shared_units",)),
    "shared_down": (1, ("shared_units",)),
    "shared_router": (0, ()),  # one row: how much of the shared expert a token gets
}

# Llama's names, which most families share, and which are an Architecture's defaults.
ATTENTION = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
}
_MLP = {"mlp.gate_proj": ("gate",), "mlp.up_proj": ("up",), "mlp.down_proj": ("down",)}
QKV, GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
HEAD_GROUPS = {"kv_heads": None, "query_heads": "kv_heads", "value_channels": "kv_heads"}


class ArchitectureError(UserError):
    """A model whose family, or whose options, raymerge does not support; the message says which are."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Full names of a language model's tensors, of a layer's what stands before its own ({}: its number)."""

    layer_prefix: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    unembedding: str = "lm_head.weight"


@dataclass(frozen=True)
class Architecture(Names):
    """Names of a family's tensors, relative to a decoder layer but for those of `Names`.

    Tensors are named as published checkpoints store them. `families.architecture_of` fills in what a config decides:
    `sizes`, the names that stand once for each expert, and what `options` say. `towers.names_inside` gives the full
    names that they have in a multimodal checkpoint.

    loaded: the full names that they have in the newest transformers' model of the language model alone.
    projections: for each matrix that a merge averages, in a fixed order, the projections (see PROJECTIONS) whose rows
    it holds one after another: one, or several where the family fuses them. A bias has its matrix's rows.
    head_by_head: matrices that hold these for one key/value head after another: each one's query heads, then its key
    head, then its value head.
    scalars: further tensors of a layer, as the learned numbers of an activation: the kept layer's own.
    buffers: how the names of tensors end that files may hold and the family's code computes; they are left aside.
    options: for config options, those fields that have other values where the option is true.
    experts: in a mixture of experts the names of an expert's projections, with {} for its number; beside them stands
    the "router", whose rows move with the experts, and in some families an expert that every token goes through, of
    projections of its own ("shared_gate", …), with a "shared_router" that scales it.
    attention, mlp: transformers' modules of attention, and of the MLP or of router and experts.
    norm_inputs: for each input norm, the matrices that read its output (they see W diag(gain) and, where the norm has a
    bias b, add W b). What a norm has, a gain and a bias, a gain alone or neither, its tensors say.
    parallel: whether attention and MLP both read the layer's input, so that what they give is added once, through one
    norm or through one each.
    output_norms: for each block ("self_attn", "mlp") whose output is normalised before it is added, that norm. Its
    gain comes after a normalisation of its own, so it belongs to no matrix.
    head_norms: norms over one head's query or key dimensions, with the projection ("q" or "k"), applied before the
    rotary embedding or, with rotated_head_norms, after it. Their gains are every head's, so they stay as they are when
    heads move.
    projection_norms: norms over a whole projection, with the projection: their gains move with its rows.
    gain_offset: what is added to a norm's stored weight to give its gain.
    unit_groups: groups of units whose order does not matter to the layer's function, each with the group inside whose
    units it lies, or None. The dimensions of a query or key head form none: each has its own rotary frequency.
    sizes: how many units each name of PROJECTIONS stands for, of those inside another inside one unit of it.
    scaled_embedding: whether embeddings are multiplied by the root of their width.
    embedding_multiplier, residual_multiplier, logit_multiplier, logit_divisor: config keys of what embeddings, what a
    block adds to the residual stream, and logits are multiplied by, and of what logits are divided by.
    windows: which layers have the window that a config gives: "none", "all", or those that its `layer_types` name.
    rotary_if: config options with the values with which there is a rotary embedding; with others no layer has one.
    rotary_windows: whether only layers with a window have a rotary embedding: "never", "always", or where the config
    "gives" a window.
    rotary_layers: config key of a list with 1 for each layer that has a rotary embedding, and 0 for one without.
    rotary_interleaved: whether transformers' module gives the angles of a head's dimensions in the order of these, and
    not those of the first of each pair before those of the second.
    rotary_neighbours: whether a rotary embedding turns dimensions (0, 1), (2, 3), … of a head together, instead of each
    of the first half with its counterpart of the second; in families without norms of queries and keys.
    query_scaling: key of rope_parameters of b, where a query at position p is multiplied, after its rotation, by
    1 + b log(1 + floor(p / original_max_position_embeddings)).
    attention_softcap, logit_softcap: config keys of c where attention scores, or logits, s become c tanh(s / c).
    kv_heads: config key of the number of key/value heads; None where each query head has its own.
    width, shared_width: config keys of the MLP's width, or an expert's, and of that of the expert that every token goes
    through; None where there is none.
    required: config options that raymerge knows with some values only.
    generates_since: the first release of transformers that generates by the family, which all the supported ones run.
    """

    name: str
    loaded: Names = Names()
    projections: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ATTENTION | _MLP)
    head_by_head: frozenset[str] = frozenset()
    scalars: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)  # of old Llama files
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    attention: str = "self_attn"
    mlp: str = "mlp"
    norm_inputs: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}
    )
    parallel: bool = False
    output_norms: Mapping[str, str] = field(default_factory=dict)
    head_norms: Mapping[str, str] = field(default_factory=dict)
    rotated_head_norms: bool = False
    projection_norms: Mapping[str, str] = field(default_factory=dict)
    gain_offset: float = 0.0
    unit_groups: Mapping[str, str | None] = field(default_factory=lambda: {"units": None, **HEAD_GROUPS})
    sizes: Mapping[str, int] = field(default_factory=dict)
    scaled_embedding: bool = False
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    windows: str = "all"
    rotary_if: Mapping[str, Any] = field(default_factory=dict)
    rotary_windows: str = "never"
    rotary_layers: str | None = None
    rotary_interleaved: bool = False
    rotary_neighbours: bool = False
    query_scaling: str | None = None
    attention_softcap: str | None = None
    logit_softcap: str | None = None
    kv_heads: str | None = "num_key_value_heads"
    width: str = "intermediate_size"
    shared_width: str | None = None
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    generates_since: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[str, str, str]:
        """Names of the final norm's gain and bias and of the unembedding's bias; a model has some of these, or none."""
        norm, unembedding = (name.removesuffix("weight") for name in (self.final_norm, self.unembedding))
        return self.final_norm, f"{norm}bias", f"{unembedding}bias"

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices that a merge averages, in a fixed order."""
        return tuple(self.projections)

    @cached_property
    def router(self) -> str | None:
        """The matrix that chooses experts; None in a family that has none."""
        return self.matrix_of("router")

    @cached_property
    def routers(self) -> tuple[str, ...]:
        """The matrices that say which experts a token goes through, and how much of each counts."""
        return tuple(filter(None, map(self.matrix_of, ("router", "shared_router"))))

    @cached_property
    def expert_matrices(self) -> dict[str, tuple[str, int]]:
        """(name with {} for the expert's number, its number) of every matrix of an expert that a router chooses."""
        numbers = range(self.sizes.get("experts", 0))
        return {name.format(number): (name, number) for name in self.experts.values() for number in numbers}

    def layer_name(self, layer: int, tensor: str) -> str:
        """Full name of a layer's tensor in the state dict."""
        return self.layer_prefix.format(layer) + tensor

    def stored_name(self, loaded: str) -> str:
        """The checkpoint's full name of what transformers' model of the language model alone calls `loaded`."""
        return _renamed(loaded, self.loaded, self)

    def loaded_name(self, stored: str) -> str:
        """The inverse of `stored_name`."""
        return _renamed(stored, self, self.loaded)

    def has_tensor(self, name: str) -> bool:
        """Whether a model of the family may have a tensor of this full name; files may hold others, as reward heads."""
        root, _, end = self.layer_prefix.partition("{}")
        if not name.startswith(root):
            return name in (self.embedding, self.unembedding, *self.ends)
        relative = name.removeprefix(root).partition(end)[2]
        part, _, kind = relative.rpartition(".")
        norms = {*self.norm_inputs, *self.output_norms.values(), *self.head_norms, *self.projection_norms}
        is_own = kind in ("weight", "bias") and (part in norms or part in self.projections)
        return is_own or relative in self.scalars

    def norm_before(self, matrix: str) -> str | None:
        """The norm (a module of the layer) through which a matrix sees its input; None where there is none."""
        return next((norm for norm, readers in self.norm_inputs.items() if matrix in readers), None)

    @property
    def norm_before_mlp(self) -> str | None:
        """The norm that the MLP, or router and experts, read; None where there is none."""
        return self.norm_before(self.holder_of("up"))

    def plain(self, name: str, tensor: Tensor) -> Tensor:
        """What a norm's tensor of this name is where the norm does nothing but normalise: a gain of 1, a bias of 0."""
        return torch.full_like(tensor, 0.0 if name.endswith("bias") else 1.0 - self.gain_offset)

    def matrix_of(self, projection: str) -> str | None:
        """The matrix that holds this projection and no other; None where there is none, or each expert has its own."""
        if projection in self.experts:
            return None
        return next((matrix for matrix, parts in self.projections.items() if parts == (projection,)), None)

    def head_norm_of(self, projection: str) -> str | None:
        """The norm of each head of queries ("q") or keys ("k"); None where there is none."""
        return next((norm for norm, of in self.head_norms.items() if of == projection), None)

    def projection_norm_of(self, projection: str) -> str | None:
        """The norm of a whole projection; None where there is none."""
        return next((norm for norm, of in self.projection_norms.items() if of == projection), None)

    def holder_of(self, projection: str, expert: int | None = None) -> str:
        """The matrix that holds a projection, alone or with others."""
        if expert is not None:
            return self.experts[projection].format(expert)
        return next(matrix for matrix, parts in self.projections.items() if projection in parts)

    def part_of(self, projection: str, tensor: Tensor) -> Tensor:
        """A projection's own of the rows of its holder's tensor (rows, …), in its order; all of them where it is alone.

        A view, or where the holder has heads one by one a copy; differentiable, and nothing is copied to a device.
        """
        matrix = next((matrix for matrix, parts in self.projections.items() if projection in parts), None)
        parts = self.projections.get(matrix or "", ())
        if len(parts) < 2:
            return tensor[:]  # whose gradient has the tensor's own layout, as leaves are to have
        number, heads = parts.index(projection), self.sizes["kv_heads"] if matrix in self.head_by_head else 1
        widths = [math.prod(self.sizes[unit] for unit in PROJECTIONS[part][1]) // heads for part in parts]
        return tensor.unflatten(0, (heads, -1))[:, sum(widths[:number]) : sum(widths[: number + 1])].flatten(0, 1)

    def row_numbers(self, matrix: str) -> list[np.ndarray]:
        """For each projection that a matrix holds, the numbers (n,) int64 of its rows (or columns) there."""
        parts = self.projections[matrix]
        total = sum(math.prod(self.sizes[unit] for unit in PROJECTIONS[part][1]) for part in parts)
        return [self.part_of(part, torch.arange(total)).numpy() for part in parts]

    @property
    def fused_rows(self) -> dict[str, list[np.ndarray]]:
        """`row_numbers` of each matrix that holds several projections."""
        return {matrix: self.row_numbers(matrix) for matrix, parts in self.projections.items() if len(parts) > 1}

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
        normed = self.projection_norms.get(matrix)
        parts = self.projections.get(matrix) or ((normed,) if normed else ())
        if not parts:
            return None
        axis = PROJECTIONS[parts[0]][0]
        if (kind == "bias" and axis == 1) or not any(set(PROJECTIONS[part][1]) & set(permutations) for part in parts):
            return None
        _, expert = self.expert_matrices.get(matrix, (None, None))
        orders = [self._projection_order(tensor, part, expert, permutations) for part in parts]
        if (known := sum(map(len, orders))) != length:
            raise ArchitectureError(f"{tensor} has {length} slices, but its family's config gives it {known}")
        if len(orders) == 1:
            return axis, orders[0]
        whole = np.empty(length, dtype=np.int64)
        for numbers, order in zip(self.row_numbers(matrix), orders, strict=True):
            whole[numbers] = numbers[order]
        return axis, whole

    def _projection_order(self, tensor: str, part: str, expert: int | None, permutations: Permutations) -> np.ndarray:
        """The order (slices,) int64 of one projection, from 0. expert: whose units; tensor: as errors name it."""
        names = PROJECTIONS[part][1]
        known = [self.sizes[name] for name in names]
        order = np.zeros(known, dtype=np.int64)
        for place, name in enumerate(names):
            own = permutations.get(name, np.arange(known[place]))
            outer = self.unit_groups.get(name)
            around = [self.sizes[outer]] if outer and own.ndim == 2 else []
            if list(own.shape) != [*around, known[place]]:
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
        return order.ravel()


def _renamed(name: str, before: Names, after: Names) -> str:
    """A full name in one's spelling as the other spells it."""
    root, _, _ = before.layer_prefix.partition("{}")
    if name.startswith(root):
        return after.layer_prefix.partition("{}")[0] + name.removeprefix(root)
    ends = {
        before.embedding: after.embedding,
        before.final_norm: after.final_norm,
        before.unembedding: after.unembedding,
    }
    return ends.get(name, name)


def permute_tensor(architecture: Architecture, name: str, tensor: Tensor, permutations: Permutations) -> Tensor:
    """A layer's tensor (relative name) with its units reordered; the tensor itself where none of them moves.

    Where experts are reordered it is the tensor of the expert that comes to stand at `name` (`Architecture.origin`).
    """
    if tensor.ndim == 0:
        return tensor
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

    norms="fold": an input norm's gain is multiplied into the matrices that read it, what they make of its bias is added
    to theirs, and the gains of the input norms are one and their biases 0, so that the folded layer computes what the
    layer does (`fusion` refuses matrices without a bias that would need one). Other norms stay in any case: between
    them and a matrix lies a normalisation.
    """
    origin = name if permutations is None else architecture.origin(name, permutations)
    tensor = layer[origin].float()
    if norms == "fold":
        matrix, _, kind = origin.rpartition(".")
        gain, bias = (layer.get(f"{architecture.norm_before(matrix)}.{part}") for part in ("weight", "bias"))
        if matrix in architecture.norm_inputs:
            tensor = architecture.plain(name, tensor)
        elif kind == "weight" and gain is not None:
            tensor = tensor * (gain.float() + architecture.gain_offset)
        elif kind == "bias" and bias is not None:
            tensor = tensor + layer[f"{matrix}.weight"].float() @ bias.float()
    return tensor if permutations is None else permute_tensor(architecture, name, tensor, permutations)


def module_layer(architecture: Architecture, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors under the names, and in the shapes, of transformers' module; differentiable.

    Only experts that a router chooses differ: transformers stacks theirs to (experts, 2 units, d) and (experts, d,
    units).
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
