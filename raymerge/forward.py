"""Decoder layers run one at a time over prompts that share prefixes.

The layers are transformers' own modules, called functionally with whatever weights are given, so that each family
computes exactly what its published code computes. One layer's weights are converted at a time; hidden states of one
shard are all that is held.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from raymerge.alignment import Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.fusion import Refits, fused_layer
from raymerge.plan import MergePlan
from raymerge.prompts import Group, Shard
from raymerge.quantisation import quantise_layer

_BATCH_TOKENS = 2048  # padded tokens of the sequences run together; larger gains nothing on a CPU
_VOCABULARY_CHUNK = 16384  # rows of the unembedding converted to float32 at a time (58 MB at hidden size 896)


@dataclass
class GroupStates:
    """Hidden states of one group: `prefix` (1, P, d); `batches` of sequences padded on the right, (B, T, d)."""

    group: Group
    prefix: Tensor
    batches: list[tuple[list[int], list[int], Tensor]]  # (sequence numbers, lengths, states)

    def last(self) -> tuple[list[int], Tensor]:
        """Rows and states (n, d) at the last token of every sequence."""
        rows = [self.group.rows[i] for members, _, _ in self.batches for i in members]
        states = [
            x[torch.arange(len(lengths)), torch.tensor(lengths, device=x.device) - 1] for _, lengths, x in self.batches
        ]
        return rows, torch.cat(states)


class _SharedPrefix:
    """What a transformers attention layer needs of a cache: keeps the prefix's keys and values, then prepends them."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self.keys, self.values = keys, values
            return keys, values
        batch = keys.shape[0]
        return (
            torch.cat([self.keys.expand(batch, -1, -1, -1), keys], dim=2),
            torch.cat([self.values.expand(batch, -1, -1, -1), values], dim=2),
        )


#: A layer to run: the original layer whose module (attention type) is used, and a function that gives its weights.
Layer = tuple[int, Callable[[], dict[str, Tensor]]]


class LayerRunner:
    """Runs a checkpoint's embedding, decoder layers and unembedding on `device` in `dtype`.

    aligner: where plans that align layers take permutations from; by default one that computes what it is asked for.
    quantise: round the matrices of every layer, merged ones after merging, to int8 or int4 (see `quantisation`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        aligner: Aligner | None = None,
        quantise: str = "none",
    ):
        from transformers import AutoModelForCausalLM

        self.checkpoint = checkpoint
        self.aligner = aligner or Aligner(checkpoint)
        self.refits: Refits | None = None  # of plans that are refitted; set later, since fits need a runner
        self.quantise = quantise
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else checkpoint.dtype)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                copy.deepcopy(checkpoint.config),  # from_config writes the compute dtype into it
                attn_implementation="sdpa",
                dtype=self.dtype,
                trust_remote_code=checkpoint.trust_remote_code,
            ).eval()
        self.modules = skeleton.model.layers
        # transformers 5.24 renamed the argument, and warns of the old name.
        accepted = inspect.signature(self.modules[0].forward).parameters
        self._cache_argument = "cache" if "cache" in accepted else "past_key_values"
        self._norm = skeleton.model.norm
        # Rotary frequencies are computed, not stored: they must not stay on the meta device.
        self._rotary = type(skeleton.model.rotary_emb)(config=checkpoint.config).to(self.device)
        self._resident: dict[int, dict[str, Tensor]] = {}

    def weights(self, layer: int) -> dict[str, Tensor]:
        """An original layer's weights in the compute dtype; kept on an accelerator, converted anew on a CPU."""
        if layer in self._resident:
            return self._resident[layer]
        weights = self.deployed(self.checkpoint.layer(layer, dtype=self.dtype, device=self.device))
        if self.device.type != "cpu":
            self._resident[layer] = weights
        return weights

    @property
    def identity(self) -> list[str]:
        """What decides a layer's output beside its input: names caches."""
        options = [] if self.quantise == "none" else [self.quantise]
        return [self.checkpoint.identity, str(self.dtype), *options]

    def deployed(self, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's weights as the deployed model has them."""
        return quantise_layer(self.checkpoint.architecture, layer, self.quantise)

    def plan_layers(self, plan: MergePlan, start: int = 0) -> list[Layer]:
        """The layers of the merged model from position `start` on, as `run` takes them."""
        return [(kept.index, self._plan_layer(plan, position)) for position, kept in enumerate(plan.kept)][start:]

    def _plan_layer(self, plan: MergePlan, position: int) -> Callable[[], dict[str, Tensor]]:
        kept = plan.kept[position]
        if kept.unchanged:
            return lambda: self.weights(kept.index)

        def load() -> dict[str, Tensor]:
            arch = self.checkpoint.architecture
            layer = fused_layer(self.checkpoint, arch, plan, position, aligner=self.aligner, refits=self.refits)
            return self.deployed({name: tensor.to(self.device, self.dtype) for name, tensor in layer.items()})

        return load

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (1, T, head_dim) in the compute dtype, of positions (T,)."""
        return self._rotary(torch.empty(0, dtype=self.dtype, device=self.device), positions[None].to(self.device))

    def embed(self, shard: Shard) -> list[GroupStates]:
        """The states that enter layer 0."""
        return [self._layout(group, self._rows_of_embedding) for group in shard.groups]

    def _rows_of_embedding(self, ids: np.ndarray, _start: int) -> Tensor:
        table = self.checkpoint[self.checkpoint.architecture.embedding]
        return table[torch.from_numpy(np.ascontiguousarray(ids))].to(self.device, self.dtype)

    def from_packed(self, shard: Shard, packed: list[tuple[Tensor, Tensor]]) -> list[GroupStates]:
        """The inverse of `pack`: states laid out in batches again."""
        states = []
        for group, (prefix, own) in zip(shard.groups, packed, strict=True):
            both = torch.cat([prefix, own]).to(self.device, self.dtype)
            states.append(self._layout(group, lambda ids, start, both=both: both[start : start + len(ids)]))
        return states

    def _layout(self, group: Group, states_of: Callable[[np.ndarray, int], Tensor]) -> GroupStates:
        """Batches of similar lengths; `states_of(ids, start)` gives the states of ids packed from `start` on."""
        prefix = states_of(group.prefix, 0)[None]
        starts = len(group.prefix) + np.concatenate([[0], np.cumsum([len(ids) for ids in group.sequences])])
        order = sorted(range(len(group.sequences)), key=lambda i: len(group.sequences[i]))
        batches, members = [], []

        def close() -> None:
            lengths = [len(group.sequences[i]) for i in members]
            padded = prefix.new_zeros(len(members), max(lengths), prefix.shape[-1])
            for row, i in enumerate(members):
                padded[row, : lengths[row]] = states_of(group.sequences[i], int(starts[i]))
            batches.append((list(members), lengths, padded))

        for i in order:
            if members and (len(members) + 1) * len(group.sequences[i]) > _BATCH_TOKENS:
                close()
                members = []
            members.append(i)
        close()
        return GroupStates(group, prefix, batches)

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
            weights = load()
            for state in states:
                self._run_group(index, weights, state)
        return states

    def mlp_units(self, states: list[GroupStates], layer: int) -> Tensor:
        """Run an original layer on the states, replacing them, and return its MLP units' values (tokens, n).

        They are what the down projection reads, at every token once and in the same order for every layer.
        """
        found: list[Tensor] = []
        down = self.modules[layer].mlp.down_proj
        hook = down.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0]))
        try:
            self.run(states, [(layer, lambda: self.weights(layer))])
        finally:
            hook.remove()
        calls, units = iter(found), []
        for state in states:
            if state.prefix.shape[1]:
                units.append(next(calls)[0])
            for _, lengths, _ in state.batches:
                values = next(calls)
                units.extend(values[row, :length] for row, length in enumerate(lengths))
        return torch.cat(units)

    def _run_group(self, index: int, weights: dict[str, Tensor], state: GroupStates) -> None:
        n_prefix = state.prefix.shape[1]
        shared = None
        if n_prefix:
            shared = _SharedPrefix()
            state.prefix = self._call(index, weights, state.prefix, 0, shared)
        for number, (members, lengths, x) in enumerate(state.batches):
            state.batches[number] = (members, lengths, self._call(index, weights, x, n_prefix, shared))

    def _call(
        self, index: int, weights: dict[str, Tensor], x: Tensor, start: int, shared: _SharedPrefix | None
    ) -> Tensor:
        length = x.shape[1]
        positions = torch.arange(start, start + length, device=self.device)
        keys = positions if shared is None or shared.keys is None else torch.arange(start + length, device=self.device)
        window = self.checkpoint.windows[index]
        mask = None
        # Without a prefix and with all positions inside the window, attention's own causal path is faster.
        if len(keys) > length or (window is not None and len(keys) > window):
            mask = visible(positions, keys, window)[None, None]
        out = functional_call(
            self.modules[index],
            weights,
            (x,),
            {
                "attention_mask": mask,
                "position_ids": positions[None],
                "position_embeddings": self.rotary(positions),
                self._cache_argument: shared,
                "use_cache": shared is not None,
            },
        )
        return out[0] if isinstance(out, tuple) else out

    def normalise(self, x: Tensor) -> Tensor:
        """The final norm, in float32: (…, d) to (…, d) float32."""
        name = self.checkpoint.architecture.final_norm
        weight = self.checkpoint[name].to(self.device, torch.float32)
        return functional_call(self._norm, {"weight": weight}, (x.float(),))

    def unembedding_rows(self, ids: Tensor | list[int]) -> Tensor:
        """Rows (n, d) float32 of the unembedding matrix."""
        table = self.checkpoint[self.checkpoint.architecture.unembedding]
        return table[torch.as_tensor(ids, device="cpu")].to(self.device, torch.float32)

    def vocabulary(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """logsumexp (n,) float32 and the most probable token (n,) over the whole vocabulary.

        In float32, converting a part of the unembedding at a time: bfloat16 logits tie (3 of 48 in a prototype).
        """
        table = self.checkpoint[self.checkpoint.architecture.unembedding]
        total = best = top = None
        for start in range(0, table.shape[0], _VOCABULARY_CHUNK):
            logits = normalised @ table[start : start + _VOCABULARY_CHUNK].to(self.device, torch.float32).T
            part, (value, token) = torch.logsumexp(logits, -1), logits.max(-1)
            if total is None:
                total, best, top = part, value, token
                continue
            total, better = torch.logaddexp(total, part), value > best
            best, top = torch.where(better, value, best), torch.where(better, token + start, top)
        return total, top

    def vocabulary_mean(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """logsumexp (n,) float32 over the whole vocabulary, and the unembedding's mean row (n, d) float32 under its
        softmax: the gradient of the first by `normalised`.

        One pass over the unembedding, as `vocabulary`; what is summed so far is scaled by the largest logit so far.
        """
        table = self.checkpoint[self.checkpoint.architecture.unembedding]
        top = normalised.new_full((len(normalised), 1), -torch.inf)
        total, weighted = torch.zeros_like(top), torch.zeros_like(normalised)
        for start in range(0, table.shape[0], _VOCABULARY_CHUNK):
            rows = table[start : start + _VOCABULARY_CHUNK].to(self.device, torch.float32)
            logits = normalised @ rows.T
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            scale, exponentials = torch.exp(top - higher), logits.sub_(higher).exp_()
            total = total * scale + exponentials.sum(-1, keepdim=True)
            weighted = (weighted * scale).addmm_(exponentials, rows)
            top = higher
        return (total.log() + top)[:, 0], weighted / total


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """(Q, K) bool: which key positions each query position attends to, causal and within `window` positions."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
