"""How far samples lie from one another at every layer, collected in one pass.

The published code runs one full forward a layer a sample. Here all samples go through layer l, the distances of layer
l are taken, and then they go through layer l+1, so that every layer is run once a sample and the states of one layer
are all that is held. Everything that similarity needs later follows from the distances (L, N, N), or for measures on
vectors from the pooled states (L, N, d).

The hidden state of layer l is that decoder layer's output, before the final norm (Liu et al. 2024, "Pruning via
Merging", stage 1; the released code reads the layer's input instead).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raymerge.errors import UserError
from raymerge.forward import Batch, GroupStates, Layer, LayerRunner, joined
from raymerge.fusion import check_mergeable
from raymerge.identity import digest
from raymerge.plan import MergePlan, base_plan
from raymerge.prompts import Group, Shard
from raymerge.tensorfiles import is_whole, read_tensors, write_tensors

POOLINGS = ("sequence", "last", "mean")

_WHAT = "the activations"  # what a file holds, for error messages
_BLOCK_VALUES = 4 * 2**20  # float64 values of one block of token positions of all samples (34 MB)
_ATTENDED_TOKENS = 16384  # keys of the sequences run together, each with the whole prefix before it


class ActivationError(UserError):
    """Samples or options that activations cannot be collected with; the message names the value and the cure."""


@dataclass(frozen=True)
class Activations:
    """What N samples look like at the output of each of L layers.

    distances: (L, N, N) float64, symmetric with a zero diagonal: Frobenius (for vectors Euclidean) norm of the
    difference of two samples' pooled states. states: (L, N, d) float32 pooled states; None for pooling "sequence".
    block_influence: (L,) float64, 1 minus the mean over all tokens of all samples of the cosine between the state that
    enters the layer and the one that leaves it (Men et al. 2024, ShortGPT, arXiv:2403.03853, section 3.2).
    """

    distances: np.ndarray
    states: np.ndarray | None
    block_influence: np.ndarray


@torch.inference_mode()
def collect(
    runner: LayerRunner,
    shards: Sequence[Shard],
    *,
    pooling: str,
    max_tokens: int = 512,
    plan: MergePlan | None = None,
) -> Activations:
    """Distances, pooled states and block influence of every layer.

    Sample n is the sequence whose entry in `group.rows` is n, with its group's prefix before it.

    Parameters
    ----------
    pooling : "sequence" compares the (T, d) states of the first `max_tokens` tokens, position by position, with zeros
        where a sample is shorter. "last" takes the state at the last token, "mean" the mean over all tokens, prefix
        included.
    max_tokens : only for "sequence". What follows is not run at all, since no earlier token depends on it, so that
        block influence is then a mean over the first `max_tokens` tokens of each sample. Samples that do not differ
        before that have distance 0 up to rounding, as those of one subject after a long few-shot prefix do; see
        `distinct_samples`.
    plan : run the merged model's layers; L is then the number of kept layers. None is the unmerged model.

    Memory beyond the weights (of which one layer's are converted at a time) grows with the number of tokens run times
    d, not with L, with N^2 d or with N max_tokens d in float64. For 57 samples of up to 2,048 tokens on an 8B model
    (d = 4,096, float32) the states are at most 1.9 GB (0.48 GB for 512 tokens), one group's new states beside its old
    ones 0.2 GB, the largest intermediates of a batch (the MLP's, or keys and values repeated for every query head)
    under 1 GB, and a block of positions in float64 34 MB: below 4 GB in all. Measured at these shapes: 0.51 GB for 8
    samples of 512 tokens (0.07 GB of states), 0.77 GB for 57 samples of 36 tokens after 1,500 that they share.

    Raises
    ------
    ActivationError : an unknown pooling, max_tokens below 1, fewer than 2 samples, rows other than 0 to N-1, samples
        that are all the same, or a layer whose output is not finite.
    PlanError : a plan that does not fit the model.
    """
    _check_options(pooling, max_tokens)
    plan = plan or base_plan(runner.checkpoint.n_layers)
    check_mergeable(runner.checkpoint, plan)
    n = _count_samples(shards)
    kept = max_tokens if pooling == "sequence" else None
    if distinct_samples(shards, max_tokens=kept) == 1:
        within = f" in their first {kept} tokens: raise max_tokens, use fewer shots, or" if kept else ":"
        raise ActivationError(f"all {n} samples are the same{within} choose other samples")
    if kept:
        shards = truncate(shards, kept)
    states = [state for shard in shards for state in runner.embed(shard)]
    if not runner.accelerated:  # an accelerator's batches are planned by its memory
        states = [_narrowed(state) for state in states]

    distances, pooled, influence = [], [], []
    for layer in runner.plan_layers(plan):
        influence.append(1.0 - _run_layer(runner, layer, states))
        if pooling == "sequence":
            distances.append(_distances(_blocks(states, n)))
        else:
            vectors = _POOLED[pooling](states, n)
            pooled.append(vectors.float().cpu().numpy())
            distances.append(_distances([vectors.double()]))
    return Activations(np.stack(distances), np.stack(pooled) if pooled else None, np.array(influence))


def truncate(shards: Sequence[Shard], max_tokens: int) -> tuple[Shard, ...]:
    """The same samples without the tokens after the first `max_tokens` of each.

    A group's sequences must have a token each, so a prefix that would fill `max_tokens` gives its last one to them.
    """

    def cut(group: Group) -> Group:
        shared = min(len(group.prefix), max_tokens - 1)
        own = tuple(np.concatenate([group.prefix[shared:], ids])[: max_tokens - shared] for ids in group.sequences)
        return Group(group.subject, group.prefix[:shared], own, group.rows)

    return tuple(Shard(tuple(cut(group) for group in shard.groups)) for shard in shards)


def distinct_samples(shards: Sequence[Shard], *, max_tokens: int | None = None) -> int:
    """How many of the samples differ in their tokens, or in their first `max_tokens`; N if no two are alike."""
    return len(
        {
            np.concatenate([group.prefix, ids])[:max_tokens].astype("<i8").tobytes()
            for shard in shards
            for group in shard.groups
            for ids in group.sequences
        }
    )


def _check_options(pooling: str, max_tokens: int) -> None:
    if pooling not in POOLINGS:
        raise ActivationError(f"pooling is {pooling!r}, but must be one of {', '.join(POOLINGS)}")
    if max_tokens < 1:
        raise ActivationError(f"max_tokens is {max_tokens}, but must be at least 1")


def _count_samples(shards: Sequence[Shard]) -> int:
    rows = sorted(row for shard in shards for group in shard.groups for row in group.rows)
    if len(rows) < 2:
        raise ActivationError(f"{len(rows)} samples have no distances: give at least 2")
    if rows != list(range(len(rows))):
        missing = sorted(set(range(len(rows))) - set(rows))
        raise ActivationError(
            f"the rows of {len(rows)} samples must be 0 to {len(rows) - 1}, each once, but {missing[:3]} are missing: "
            "give all shards of a question set, and each once"
        )
    return len(rows)


def _narrowed(state: GroupStates) -> GroupStates:
    """Cut batches of many short sequences after a long prefix.

    Attention repeats the prefix's keys and values for every sequence and every query head: the runner's batch of 2,048
    tokens, 57 sequences of 36 after 1,500 shared ones, would take 3.6 GB of them on an 8B model in float32.
    """
    batches = []
    for members, lengths, x in state.batches:
        size = max(1, _ATTENDED_TOKENS // (state.prefix.shape[1] + x.shape[1]))
        for start in range(0, len(members), size):
            part = slice(start, start + size)
            batches.append(Batch(members[part], lengths[part], x[part]))
    return GroupStates(state.group, state.prefix, batches)


def _run_layer(runner: LayerRunner, layer: Layer, states: Sequence[GroupStates]) -> float:
    """Run all groups through one layer; the mean cosine between what enters and what leaves.

    The layer's weights live in this call only, so that two layers' are never held together.
    """
    index, load = layer
    weights = load()
    # Summed on the device and read once: every read waits for all work that the device was given so far.
    total = torch.zeros((), dtype=torch.float64, device=runner.device)
    finite = torch.ones((), dtype=torch.bool, device=runner.device)
    tokens = 0
    for state in states:
        entering = list(_tokens(state))
        runner.run([state], [(index, lambda: weights)])
        for (count, before), (_, after) in zip(entering, _tokens(state), strict=True):
            finite &= torch.isfinite(after).all()
            total += count * torch.cosine_similarity(before.double(), after.double(), dim=-1).sum()
            tokens += count * len(after)
    if not finite:
        raise ActivationError(runner.overflow(f"layer {index} gives values that are"))
    return float(total) / tokens


def _tokens(state: GroupStates) -> Iterator[tuple[int, Tensor]]:
    """(samples it belongs to, (T, d) states without padding) of the prefix and of each sequence, as views."""
    yield len(state.group.sequences), state.prefix[0]
    for _, lengths, x in state.batches:
        for row, length in enumerate(lengths):
            yield 1, x[row, :length]


def _samples(state: GroupStates) -> Iterator[tuple[int, Tensor]]:
    """(sample number, (T, d) states of its own tokens without padding), as views."""
    for members, lengths, x in state.batches:
        for row, (i, length) in enumerate(zip(members, lengths, strict=True)):
            yield state.group.rows[i], x[row, :length]


def _last(states: Sequence[GroupStates], n: int) -> Tensor:
    """(N, d) states at each sample's last token."""
    first = states[0].prefix
    vectors = first.new_empty(n, first.shape[-1])
    for state in states:
        for row, own in _samples(state):
            vectors[row] = own[-1]
    return vectors


def _mean(states: Sequence[GroupStates], n: int) -> Tensor:
    """(N, d) float64 means over all tokens of each sample."""
    first = states[0].prefix
    vectors = first.new_empty(n, first.shape[-1], dtype=torch.float64)
    for state in states:
        shared, length = state.prefix[0].sum(0, dtype=torch.float64), state.prefix.shape[1]
        for row, own in _samples(state):
            vectors[row] = (shared + own.sum(0, dtype=torch.float64)) / (length + len(own))
    return vectors


_POOLED = {"last": _last, "mean": _mean}


def _blocks(states: Sequence[GroupStates], n: int) -> Iterator[Tensor]:
    """The samples' whole sequences, a few token positions at a time: (N, positions * d) float64, zero-padded."""
    first = states[0].prefix
    width = first.shape[-1]
    longest = max(state.prefix.shape[1] + max(batch.lengths) for state in states for batch in state.batches)
    step = max(1, _BLOCK_VALUES // (n * width))
    for start in range(0, longest, step):
        stop = min(start + step, longest)
        block = first.new_zeros(n, stop - start, width, dtype=torch.float64)
        for state in states:
            length = state.prefix.shape[1]
            shared = state.prefix[0, start:stop]
            for row, own in _samples(state):
                # Row by row: indexing with a list of rows would copy the list to the device and wait for it.
                block[row, : len(shared)] = shared
                own = own[max(start - length, 0) : max(stop - length, 0)]
                block[row, len(shared) : len(shared) + len(own)] = own
        yield block.view(n, -1)


def _distances(blocks: Iterable[Tensor]) -> np.ndarray:
    """(N, N) float64 distances between samples: row n of all blocks (N, any) float64 together is sample n's vector.
    Blocks are overwritten.

    From Gram matrices, |x - y|^2 = x.x + y.y - 2 x.y. The mean over the samples changes no difference and is taken off
    first: language models have activations in the thousands that are nearly the same for every sample, whose squares
    would swallow the differences.
    """
    total = None
    for block in blocks:
        block -= block.mean(0)
        part = block @ block.T
        total = part if total is None else total.add_(part)
    assert total is not None  # a sample has a token
    gram = ((total + total.T) / 2).cpu().numpy()
    norms = np.diag(gram)
    return np.sqrt(np.maximum(norms[:, None] + norms[None, :] - 2.0 * gram, 0.0))


@torch.inference_mode()
def state_distances(runner: LayerRunner, shard: Shard) -> tuple[np.ndarray, np.ndarray, int]:
    """Summed cosine distances and angular distances between the states of every two depths, and how many tokens.

    Both sums are (L+1, L+1) float64; row i stands for the states that enter layer i, row L for those that leave the
    last. Cosine: 1 - cos, over all tokens (ShortGPT, Men et al. 2024, arXiv:2403.03853, section 3.2, for any number of
    layers). Angular: arccos(cos) / pi (Gromov et al. 2024, arXiv:2403.17887, equation 7, who take each sequence's last
    token alone; here all). Every token that is run counts once, also of a prefix that sequences share.

    The shard's states at all depths are held in the compute dtype: 0.4 GB for 8,192 tokens of a 0.5B model in bfloat16,
    2.2 GB of an 8B model. Raises ActivationError where a layer gives values that are not finite.
    """
    plan, states = base_plan(runner.checkpoint.n_layers), runner.embed(shard)
    depths = [joined(runner.pack(states))]
    for layer in runner.plan_layers(plan):
        runner.run(states, [layer])
        depths.append(joined(runner.pack(states)))
        if not torch.isfinite(depths[-1]).all():
            raise ActivationError(runner.overflow(f"layer {layer[0]} gives values that are"))
    tokens = len(depths[0])
    step = max(1, _BLOCK_VALUES // (len(depths) * depths[0].shape[1]))
    cosine = torch.zeros(len(depths), len(depths), dtype=torch.float64, device=runner.device)
    angular = torch.zeros_like(cosine)
    for start in range(0, tokens, step):
        # (tokens, depths, d)
        block = torch.stack([x[start : start + step].double() for x in depths], dim=1)
        block /= torch.linalg.vector_norm(block, dim=-1, keepdim=True)
        cosines = (block @ block.mT).clamp_(-1.0, 1.0)
        cosine += (1.0 - cosines).sum(0)
        angular += cosines.acos().sum(0) / torch.pi
    sums = []
    for values in (cosine, angular):
        values.fill_diagonal_(0.0)  # the angle of a state with itself is the root of a rounding error
        sums.append(((values + values.T) / 2).cpu().numpy())
    return sums[0], sums[1], tokens


class ActivationCache:
    """Collected activations, one file each, named by content: model, plan, dtype, pooling and token ids.

    A file is written under a temporary name and renamed, so that a reader never sees half of one. runner, pooling,
    max_tokens: those of `collect`.
    """

    def __init__(self, folder: Path, runner: LayerRunner, *, pooling: str, max_tokens: int = 512):
        _check_options(pooling, max_tokens)
        self.folder, self.runner, self.pooling, self.max_tokens = Path(folder), runner, pooling, max_tokens

    def path(self, shards: Sequence[Shard], plan: MergePlan | None = None) -> Path:
        """The file of these samples, whether it exists or not."""
        runner, merged = self.runner, plan if plan is not None and plan.steps else None
        key = [
            *runner.cache_key,
            None if merged is None else merged.plan_id(runner.checkpoint.identity),
            *([] if merged is None else runner.aligner.data(merged.alignment)),
            self.pooling,
            self.max_tokens if self.pooling == "sequence" else None,
            # A shard's identity says nothing of which sample is which.
            [[shard.identity, [list(group.rows) for group in shard.groups]] for shard in shards],
        ]
        return self.folder / f"activations-{digest(key)}.safetensors"

    def get(self, shards: Sequence[Shard], plan: MergePlan | None = None) -> Activations:
        """What `collect` gives, from the file if it is there, else collected and stored.

        Raises UserError for a file that cannot be written or lacks something, and whatever `collect` raises.
        """
        path = self.path(shards, plan)
        if not is_whole(path, _WHAT):
            found = collect(self.runner, shards, pooling=self.pooling, max_tokens=self.max_tokens, plan=plan)
            values = {name: torch.from_numpy(v) for name, v in vars(found).items() if v is not None}
            write_tensors(path, values, _WHAT)
            return found
        names = [name for name in Activations.__dataclass_fields__ if name != "states" or self.pooling != "sequence"]
        stored = {name: tensor.numpy() for name, tensor in read_tensors(path, _WHAT, names).items()}
        return Activations(stored["distances"], stored.get("states"), stored["block_influence"])
