"""The frozen trunk's states, on disk by content: what enters a layer, for every token of a shard.

Merges of the last layers share everything before them, so it is run once, whatever comes after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raymerge.forward import GroupStates, LayerRunner
from raymerge.identity import digest
from raymerge.plan import base_plan
from raymerge.prompts import Shard
from raymerge.tensorfiles import is_whole, read_tensors, write_tensors

_WHAT = "the trunk states"  # what a file holds, for error messages


class TrunkCache:
    """States entering layer `first`, one file a shard, named by content: model, layer, dtype, code and token ids.

    A file is written under a temporary name and renamed, so that a reader never sees half of one; two workers that
    compute the same shard write the same bytes.
    """

    def __init__(self, runner: LayerRunner, first: int, folder: Path):
        self.runner = runner
        self.first = first
        self.folder = Path(folder)

    def path(self, shard: Shard) -> Path:
        return self.folder / f"trunk-{digest([*self.runner.cache_key, self.first, shard.identity])}.safetensors"

    def compute(self, shard: Shard) -> Path:
        """Run the trunk on a shard, unless its file is there already; return the file."""
        compute_trunks([self], shard)
        return self.path(shard)

    def load(self, shard: Shard) -> list[tuple[Tensor, Tensor]]:
        """For each group of the shard the states (P, d) of the prefix and (N, d) of its sequences, packed.

        Computed first if they are not on this machine's disk yet. The tensors are mapped, not read.
        """
        pairs = [(f"{i}.prefix", f"{i}.own") for i in range(len(shard.groups))]
        tensors = read_tensors(self.compute(shard), _WHAT, [name for pair in pairs for name in pair])
        return [(tensors[prefix], tensors[own]) for prefix, own in pairs]

    def store(self, shard: Shard, states: list[GroupStates]) -> None:
        """Write a shard's states."""
        tensors = {}
        for i, (prefix, own) in enumerate(self.runner.pack(states)):
            tensors[f"{i}.prefix"], tensors[f"{i}.own"] = prefix, own
        write_tensors(self.path(shard), tensors, _WHAT)

    def states(self, shard: Shard) -> list[GroupStates]:
        """The states laid out to be run on from layer `first`."""
        return self.runner.from_packed(shard, self.load(shard))


@torch.inference_mode()
def compute_trunks(caches: Sequence[TrunkCache], shard: Shard) -> None:
    """Write a shard's states for several caches of one runner, where they are missing, in one pass over the layers.

    The pass goes on from the deepest states that are there already.
    """
    states: list[GroupStates] | None = None  # those of `reached`; None: on disk, to be read if deeper ones are missing
    reached: TrunkCache | None = None
    for cache in sorted(caches, key=lambda cache: cache.first):
        if is_whole(cache.path(shard), _WHAT):
            states = None
        else:
            if states is None:
                states = cache.runner.embed(shard) if reached is None else reached.states(shard)
            layers = cache.runner.plan_layers(base_plan(cache.runner.checkpoint.n_layers))
            states = cache.runner.run(states, layers[0 if reached is None else reached.first : cache.first])
            cache.store(shard, states)
        reached = cache


def mlp_units(entering: TrunkCache, shard: Shard, others: Iterable[TrunkCache] = ()) -> Tensor:
    """MLP units (tokens, n) of the unmerged layer that the states enter, on a shard (`LayerRunner.mlp_units`); from
    the deepest states of the caches that are on disk already."""
    first = entering.first
    compute_trunks([*(trunk for trunk in others if trunk.first < first), entering], shard)
    return entering.runner.mlp_units(entering.states(shard), first)
