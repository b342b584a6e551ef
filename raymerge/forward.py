"""Decoder layers run one at a time over prompts that share prefixes.

The layers are transformers' own modules, called functionally with whatever weights are given, so that each family
computes exactly what its published code computes. One layer's weights are converted at a time; hidden states of one
shard are all that is held.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from raymerge.alignment import Aligner, AlignmentError
from raymerge.architectures import module_layer
from raymerge.checkpoint import Checkpoint
from raymerge.device import attempt, device_memory, is_accelerator, moved
from raymerge.fusion import Refits, fused_layer
from raymerge.memory import LayerSize, keeps_layer, plan_batches
from raymerge.plan import MergePlan
from raymerge.positions import NO_ROTARY, fixed_limit
from raymerge.prompts import Group, PromptError, Shard
from raymerge.quantisation import quantise_layer
from raymerge.skeleton import skeleton_of
from raymerge.vocabulary import Vocabulary

_BATCH_TOKENS = 2048  # padded tokens of the sequences run together on a CPU, where more gains nothing
# What one more call of a layer costs: so many tokens (matrices of few rows multiply slower, on a GPU far slower), and
# on a CPU torch's own work, worth so many multiply-adds. Padding that costs more is not computed.
_CALL_TOKENS, _CALL_TOKENS_ACCELERATED, _CALL_OPERATIONS = 16, 256, 100e6
version = cache(importlib.metadata.version)  # read from a package's files, 4 ms; every shard's path asks for it
_VERSION = 2  # of how layers are run; another value makes cached outputs of earlier versions unused


class Batch(NamedTuple):
    """Sequences of one group that are run together: their numbers in it, their lengths and their states (B, T, d),
    padded on the right."""

    members: list[int]
    lengths: list[int]
    states: Tensor


@dataclass
class GroupStates:
    """Hidden states of one group: those of its prefix, (1, P, d), and those of its sequences."""

    group: Group
    prefix: Tensor
    batches: list[Batch]

    def last(self) -> tuple[list[int], Tensor]:
        """Rows and states (n, d) at the last token of every sequence."""
        rows = [self.group.rows[i] for members, _, _ in self.batches for i in members]
        states = [
            x[torch.arange(len(lengths), device=x.device), torch.tensor(lengths, device=x.device) - 1]
            for _, lengths, x in self.batches
        ]
        return rows, torch.cat(states)


class _SharedPrefix:
    """What a transformers attention layer needs of a cache: keeps the prefix's keys and values, then prepends them."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
            return keys, values
        batch = keys.shape[0]
        return (
            torch.cat([self.keys.expand(batch, -1, -1, -1), keys], dim=2),
            torch.cat([self.values.expand(batch, -1, -1, -1), values], dim=2),
        )


class _OnDevice(Mapping[str, Tensor]):
    """A checkpoint whose tensors are moved to a device when they are asked for, so that layers are fused there.

    kept: tensors that are on the device already; those of another dtype than the stored one are not used.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, kept: Mapping[str, Tensor]):
        self._checkpoint, self._device, self._kept = checkpoint, device, kept

    def __getitem__(self, name: str) -> Tensor:
        stored, kept = self._checkpoint[name], self._kept.get(name)
        return stored.to(self._device) if kept is None or kept.dtype != stored.dtype else kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    def __len__(self) -> int:
        return len(self._checkpoint)


#: A layer to run: the original layer whose module (attention type) is used, and a function that gives its weights.
Layer = tuple[int, Callable[[], Mapping[str, Tensor]]]


class LayerRunner:
    """Runs a checkpoint's decoder layers on `device` in `dtype`; `vocabulary` is what lies before and after them.

    On an accelerator, layers stay in its memory while half of it is free; batches are as large as `memory.plan_batches`
    says, and one that runs out of memory is run in halves. Sequences longer than `positions.fixed_limit` are refused.
    Those longer than the model's context are not: whoever makes prompts must see to that.
    aligner: where plans that align layers take permutations from; by default one that computes what it is asked for.
    refits: where plans that are refitted take their fitted tensors from.
    quantise: round the matrices of every layer, merged ones after merging, to int8 or int4 (see `quantisation`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        aligner: Aligner | None = None,
        refits: Refits | None = None,
        quantise: str = "none",
    ):
        from transformers import AutoModelForCausalLM

        self.checkpoint = checkpoint
        self.aligner = aligner or Aligner(checkpoint)
        self.refits = refits
        self.quantise = quantise
        self.device = torch.device(device)
        self.accelerated = is_accelerator(self.device)
        self.dtype = dtype or (checkpoint.dtype if self.accelerated else torch.float32)
        arch, config = checkpoint.architecture, checkpoint.config
        # SDPA cannot cap scores: with it transformers leaves the cap out, or refuses the family even without a cap.
        self._eager = arch.attention_softcap is not None
        softcap = arch.attention_softcap
        self.attention_softcap: float | None = getattr(config, softcap) if softcap else None
        skeleton = skeleton_of(
            AutoModelForCausalLM,
            config,
            attn_implementation="eager" if self._eager else "sdpa",
            dtype=self.dtype,
            trust_remote_code=checkpoint.trust_remote_code,
        ).eval()
        root, _, norm_name = arch.loaded.final_norm.removesuffix(".weight").rpartition(".")
        inside = skeleton.get_submodule(root)
        self.modules = inside.layers
        # transformers 5.24 renamed the argument, and warns of the old name; GPT-NeoX has one of its own.
        accepted = inspect.signature(self.modules[0].forward).parameters
        names = ("cache", "layer_past", "past_key_values")
        self._cache_argument = next(name for name in names if name in accepted)
        norm = inside.get_submodule(norm_name)
        self.vocabulary = Vocabulary(checkpoint, norm, device=self.device, dtype=self.dtype)
        # Rotary frequencies are computed, not stored: they must not stay on the meta device.
        rotary = inside.rotary_emb  # None where no layer has one
        self._rotary = None if rotary is None else type(rotary)(config=config).to(self.device)
        self._limit = fixed_limit(config)
        if self._rotary is not None and self._limit is not None:
            # The module begins with the frequencies of this length, and sequences need no others. transformers would
            # choose them anew in every call, by the largest position, padding included, and wait for the device for it.
            types = self._rotary.rope_type
            self._rotary.rope_type = "default" if isinstance(types, str) else dict.fromkeys(types, "default")
        #: What the layers multiply a block's output by.
        self.residual_multiplier: float = getattr(config, arch.residual_multiplier) if arch.residual_multiplier else 1.0
        # Layers that are kept on an accelerator: original ones by number, merged ones of one plan by position.
        self._resident: dict[int, dict[str, Tensor]] = {}
        self._fused: dict[int, dict[str, Tensor]] = {}
        self._fused_plan: MergePlan | None = None

    @cached_property
    def layer_size(self) -> LayerSize:
        """The size of the last layer, for the memory planner."""
        checkpoint, config = self.checkpoint, self.checkpoint.config
        arch, last = checkpoint.architecture, checkpoint.n_layers - 1
        names = (arch.layer_name(last, name) for name in checkpoint.layer_tensors(last))
        sizes = arch.sizes
        kv_width = sizes["kv_heads"] * sizes["rotary"]
        return LayerSize(
            parameters=sum(checkpoint[name].numel() for name in names),
            hidden=config.hidden_size,
            query=sizes["query_heads"] * kv_width,
            key=kv_width,
            mlp=sizes["units"] * (config.num_experts_per_tok if arch.experts else 1) + sizes.get("shared_units", 0),
            heads=config.num_attention_heads,
        )

    def weights(self, layer: int) -> dict[str, Tensor]:
        """An original layer's weights in the compute dtype; kept on an accelerator while there is room, converted anew
        on a CPU."""

        def load() -> dict[str, Tensor]:
            return self.deployed(self.checkpoint.layer(layer, dtype=self.dtype, device=self.device))

        return self._kept(self._resident, layer, load)

    def _kept(
        self, layers: dict[int, dict[str, Tensor]], number: int, load: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """A layer, loaded if it is not among those kept, and then kept while there is room. Where there is no room even
        to load it, what is kept is given up first."""
        if number in layers:
            return layers[number]
        fits, layer = attempt(load)
        if not fits:
            self.release()
            layer = load()
        if self._may_keep():
            layers[number] = layer
        return layer

    def _may_keep(self) -> bool:
        if not self.accelerated:
            return False
        free, total = device_memory(self.device)
        return keeps_layer(self.layer_size.parameters * self.dtype.itemsize, device_free=free, device_total=total)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the layers that `release` gives up."""
        layers = [*self._resident.values(), *self._fused.values()]
        return sum(tensor.nbytes for layer in layers for tensor in layer.values())

    def release(self) -> None:
        """Give up the layers that are kept on an accelerator; they are converted again when they are needed."""
        self._resident.clear()
        self._fused.clear()

    @property
    def cache_key(self) -> list[str]:
        """What names cached outputs of layers: all that they depend on beside their input, transformers' version
        included. Once a release mends a family's layer, outputs of the release before must not be read."""
        weights = [self.checkpoint.identity, str(self.dtype), *([] if self.quantise == "none" else [self.quantise])]
        return [*weights, f"transformers {version('transformers')}", f"raymerge {_VERSION}"]

    def deployed(self, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's weights as the deployed model has them."""
        return quantise_layer(self.checkpoint.architecture, layer, self.quantise)

    def overflow(self, what: str) -> str:
        """The error message for values that are not finite; `what` names them, with the verb ("the logits are")."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{what} not finite in {dtype}: compute in bfloat16 or float32 (model.dtype), or check the weights"

    def plan_layers(self, plan: MergePlan, start: int = 0) -> list[Layer]:
        """The layers of the merged model from position `start` on, as `run` takes them."""
        return [(kept.index, self._plan_layer(plan, position)) for position, kept in enumerate(plan.kept)][start:]

    def _plan_layer(self, plan: MergePlan, position: int) -> Callable[[], Mapping[str, Tensor]]:
        kept = plan.kept[position]
        if kept.unchanged:
            return lambda: self.weights(kept.index)

        def load() -> dict[str, Tensor]:
            layer = self.fused(plan, position)
            return self.deployed({name: tensor.to(self.device, self.dtype) for name, tensor in layer.items()})

        def kept_or_loaded() -> dict[str, Tensor]:
            # Every shard of a plan asks for the same few layers; a CPU's memory may not hold them besides.
            if self._fused_plan != plan:
                self._fused_plan, self._fused = plan, {}
            return self._kept(self._fused, position, load)

        return kept_or_loaded if self.accelerated else load

    def fused(self, plan: MergePlan, position: int, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The merged model's layer `position` as `fusion.fused_layer` gives it, summed on an accelerator if it has room
        for all of the layer's sources."""
        arch = self.checkpoint.architecture

        def fuse(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return fused_layer(base, arch, plan, position, aligner=self.aligner, dtype=dtype, refits=self.refits)

        if self.accelerated:
            kept = plan.kept[position]
            fits, layer = attempt(lambda: fuse(self._on_device({*kept.sources, kept.index})))
            if fits:
                return layer
        return fuse(self.checkpoint)

    def _on_device(self, layers: Iterable[int]) -> _OnDevice:
        """The checkpoint, with those of the layers that may stay on the device kept there: plan after plan is made of
        the same few."""
        kept: dict[str, Tensor] = {}
        if self.quantise == "none" and self.dtype == self.checkpoint.dtype:
            for layer in layers:
                if layer in self._resident or self._may_keep():
                    name = partial(self.checkpoint.architecture.layer_name, layer)
                    kept |= {name(relative): tensor for relative, tensor in self.weights(layer).items()}
        return _OnDevice(self.checkpoint, self.device, kept)

    def rotary(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (1, T, rotated dimensions), of positions (T,) in an original layer, in the dtype that the
        family gives them; 0 rotated dimensions where the layer has no rotary embedding."""
        like, kind = torch.empty(0, dtype=self.dtype, device=self.device), self.checkpoint.rotary_types[layer]
        if kind == NO_ROTARY or self._rotary is None:
            return like.new_empty(1, len(positions), 0), like.new_empty(1, len(positions), 0)
        return self._rotary(like, positions[None].to(self.device), *(() if kind is None else (kind,)))

    def embed(self, shard: Shard) -> list[GroupStates]:
        """The states that enter layer 0."""
        return [self._layout(group, lambda ids, _start: self.vocabulary.embedded(ids)) for group in shard.groups]

    def from_packed(self, shard: Shard, packed: list[tuple[Tensor, Tensor]]) -> list[GroupStates]:
        """The inverse of `pack`: states laid out in batches again."""

        def laid_out(group: Group, prefix: Tensor, own: Tensor) -> GroupStates:
            both = moved(torch.cat([prefix, own]), self.device, self.dtype)
            return self._layout(group, lambda ids, start: both[start : start + len(ids)])

        return [laid_out(group, *pair) for group, pair in zip(shard.groups, packed, strict=True)]

    def _layout(self, group: Group, states_of: Callable[[np.ndarray, int], Tensor]) -> GroupStates:
        """A group's states in padded batches; `states_of(ids, start)` gives those of ids packed from `start` on.

        Raises PromptError for a sequence beyond `positions.fixed_limit`."""
        length = len(group.prefix) + max(map(len, group.sequences))
        if self._limit is not None and length > self._limit.tokens:
            raise PromptError(
                f"a prompt of {group.subject} has {length} tokens, but those of {self.checkpoint.directory.name} have "
                f"at most {self._limit}: give shorter ones"
            )
        prefix = states_of(group.prefix, 0)[None]
        starts = len(group.prefix) + np.concatenate([[0], np.cumsum([len(ids) for ids in group.sequences])])
        batches = []
        for members in self._batched(group):
            lengths = [len(group.sequences[i]) for i in members]
            padded = prefix.new_zeros(len(members), max(lengths), prefix.shape[-1])
            for row, i in enumerate(members):
                padded[row, : lengths[row]] = states_of(group.sequences[i], int(starts[i]))
            batches.append(Batch(members, lengths, padded))
        return GroupStates(group, prefix, batches)

    def _batched(self, group: Group) -> list[list[int]]:
        """The group's sequences, by number, as they are run together: the shortest first, as many as fit into a batch,
        as long as their padding costs less than one more call."""
        lengths = [len(ids) for ids in group.sequences]
        # Padded tokens, and keys that all its sequences together attend to.
        most, attended = self._planned_batches if self.accelerated else (_BATCH_TOKENS, float("inf"))
        batches: list[list[int]] = [[]]
        own = 0  # tokens of the last batch, without its padding
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            count, length = len(batches[-1]) + 1, lengths[i]
            too_many = count * length > most or count * (len(group.prefix) + length) > attended
            too_padded = count * length - (own + length) > self._call_tokens
            if batches[-1] and (too_many or too_padded):
                batches.append([])
                own = 0
            batches[-1].append(i)
            own += length
        return batches

    @cached_property
    def _call_tokens(self) -> float:
        """How much padding of a batch costs as much as one more call."""
        if self.accelerated:
            return _CALL_TOKENS_ACCELERATED
        return _CALL_TOKENS + _CALL_OPERATIONS / self.layer_size.parameters

    @cached_property
    def _planned_batches(self) -> tuple[int, int]:
        # Once: batches that changed from shard to shard would change the states' last bits.
        free = device_memory(self.device).free
        return plan_batches(self.layer_size, compute=self.dtype.itemsize, device_free=free)

    @staticmethod
    def pack(states: list[GroupStates]) -> list[tuple[Tensor, Tensor]]:
        """For each group, the prefix's states (P, d) and the sequences' own (N, d), unpadded, in the group's order."""
        packed = []
        for state in states:
            own: list[Tensor] = [torch.empty(0)] * len(state.group.sequences)
            for members, lengths, x in state.batches:
                for row, i in enumerate(members):
                    own[i] = x[row, : lengths[row]]
            packed.append((state.prefix[0], torch.cat(own)))
        return packed

    def run(self, states: list[GroupStates], layers: Iterable[Layer]) -> list[GroupStates]:
        """Run the layers in order; each layer's weights are asked for once. States are replaced in place."""
        for index, load in layers:
            weights = module_layer(self.checkpoint.architecture, load())
            for state in states:
                self._run_group(index, weights, state)
        return states

    def mlp_units(self, states: list[GroupStates], layer: int) -> Tensor:
        """Run an original layer on the states, replacing them, and return its MLP units' values (tokens, n).

        They are what the down projection reads, at every token once and in the same order for every layer.
        """
        if self.checkpoint.architecture.experts:
            raise AlignmentError(
                f"the MLP units of {self.checkpoint.architecture.name} see only the tokens that are routed to their "
                "expert, which differ between layers: alignment activations cannot match them; use alignment neurons"
            )
        down = self.checkpoint.architecture.holder_of("down")
        points = {"units": self.modules[layer].get_submodule(down)}
        parts: list[Tensor] = []
        for state in self.observed(states, layer, self.weights(layer), points)["units"]:
            parts.append(state.prefix[0])
            parts += [x[row, :length] for _, lengths, x in state.batches for row, length in enumerate(lengths)]
        return torch.cat(parts)

    def observed(
        self,
        states: list[GroupStates],
        index: int,
        weights: Mapping[str, Tensor],
        points: Mapping[str, torch.nn.Module],
    ) -> dict[str, list[GroupStates]]:
        """Run a layer on the states, replacing them; what each of its submodules `points` reads, laid out as the states
        are."""
        seen: dict[str, Tensor] = {}
        ended: list[dict[str, Tensor]] = []  # what was seen in each call; one that ran out of memory does not end
        hooks = [
            module.register_forward_pre_hook(lambda _module, inputs, name=name: seen.update({name: inputs[0]}))
            for name, module in points.items()
        ]
        hooks.append(self.modules[index].register_forward_hook(lambda *_: ended.append(seen.copy())))
        try:
            self.run(states, [(index, lambda: weights)])
        finally:
            for hook in hooks:
                hook.remove()
        return {name: _laid_out((call[name] for call in ended), states) for name in points}

    def _run_group(self, index: int, weights: dict[str, Tensor], state: GroupStates) -> None:
        n_prefix = state.prefix.shape[1]
        shared = None
        if n_prefix:
            shared = _SharedPrefix()
            state.prefix = self._call(index, weights, state.prefix, 0, shared)
        for number, batch in enumerate(state.batches):
            leaving = self._run_batch(index, weights, batch.states, n_prefix, shared)
            state.batches[number] = batch._replace(states=leaving)

    def _run_batch(
        self, index: int, weights: dict[str, Tensor], x: Tensor, start: int, shared: _SharedPrefix | None
    ) -> Tensor:
        """`_call` of a batch of sequences, in halves where it runs out of memory."""
        if len(x) == 1:
            return self._call(index, weights, x, start, shared)
        fits, out = attempt(lambda: self._call(index, weights, x, start, shared))
        if not fits:
            halves = x.split((len(x) + 1) // 2)
            out = torch.cat([self._run_batch(index, weights, half, start, shared) for half in halves])
        return out

    def _call(
        self, index: int, weights: dict[str, Tensor], x: Tensor, start: int, shared: _SharedPrefix | None
    ) -> Tensor:
        length = x.shape[1]
        if length == 1 and start and self.checkpoint.architecture.sizes["kv_heads"] == 1:
            # CUDA's memory-efficient attention can be wrong for one query under a mask where all heads read the same
            # keys (pytorch/pytorch#191937): a second query, whose answer is not read, keeps it from that path.
            return self._call(index, weights, x.expand(-1, 2, -1), start, shared)[:, :1]
        positions = torch.arange(start, start + length, device=self.device)
        keys = positions if shared is None or shared.keys is None else torch.arange(start + length, device=self.device)
        window = self.checkpoint.windows[index]
        mask = None
        # Without a prefix and with all positions inside the window, attention's own causal path is faster.
        if len(keys) > length or (window is not None and len(keys) > window) or self._eager:
            mask = visible(positions, keys, window)[None, None]
            if self._eager:  # eager attention adds its mask
                added = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
                mask = added.masked_fill_(~mask, torch.finfo(x.dtype).min)
        out = functional_call(
            self.modules[index],
            weights,
            (x,),
            {
                "attention_mask": mask,
                "position_ids": positions[None],
                # Layers of a model without the module ask whether there is any; others leave theirs unused.
                "position_embeddings": None if self._rotary is None else self.rotary(positions, index),
                self._cache_argument: shared,
                "use_cache": shared is not None,
            },
        )
        return out[0] if isinstance(out, tuple) else out


def _laid_out(calls: Iterator[Tensor], states: list[GroupStates]) -> list[GroupStates]:
    """What calls of a layer have seen, (B, T, n) each, in the batches of the states that were run: a group's prefix,
    where it has one, then its sequences, also those of a batch that was run in halves."""
    found = []
    for state in states:
        prefix = next(calls) if state.prefix.shape[1] else None
        batches = []
        for batch in state.batches:
            seen = next(calls)
            while len(seen) < len(batch.members):
                seen = torch.cat([seen, next(calls)])
            batches.append(batch._replace(states=seen))
        found.append(GroupStates(state.group, batches[0].states[:1, :0] if prefix is None else prefix, batches))
    return found


def joined(packed: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """(tokens, d) of all groups that `LayerRunner.pack` gives, prefixes included, without padding."""
    return torch.cat([part for pair in packed for part in pair])


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """(Q, K) bool: which key positions each query position attends to, causal and within `window` positions."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
