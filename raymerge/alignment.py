"""Which unit of a deeper layer corresponds to which unit of a shallower one, before the two are averaged.

`neurons`: only reorderings that leave a layer's function as it is (the groups that `architectures` declares), found
by matching. What is maximised is one number: the sum of the cosines of all rows (of q, k, v, gate, up, a router) and
columns (of o, down) that come to lie on each other. Input norms' gains are multiplied in, whatever the plan does with
norms, since what a unit computes does not depend on the plan. Biases do not take part.

- MLP units: the maximum is exact.
- Key/value heads: exact given the scores of their pairs. A pair's score is over the order of its query heads and of its
  value channels together, since their columns of o depend on both. It is the best of several local maxima: each order
  is exact given the other, and no exchange of two query heads leads higher.
- Experts, with their rows of the router: by bounds of what their units could score, then units inside the pairs that
  this gives, exactly. An assignment of units for every pair of experts would take Mixtral 8x7B half an hour a layer (64
  of 14,336 units, 30 s each).
- The units of an expert that every token goes through: like a dense layer's.

`activations`: the same reorderings, MLP units matched by the correlation of their values on some prompts
instead.

Each layer is matched to its neighbour, once, and matches are composed along the chain, so that they do not depend on
alpha and a merged layer stays linear in its coefficients.

`rows` (published: Liu et al. 2024, stage 4 of the reference): each matrix on its own, its rows matched by Euclidean
distance and permuted alone. It is not the same function afterwards, it is matched anew at every step against what has
been fused so far, and so depends on alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raymerge.architectures import PROJECTIONS, Architecture, Permutations, source_tensor
from raymerge.assignment import assign
from raymerge.checkpoint import Checkpoint
from raymerge.errors import UserError
from raymerge.identity import digest
from raymerge.plan import MergePlan, MergeStep
from raymerge.tensorfiles import is_whole, read_tensors, write_tensors

#: Alignments that keep every layer's function: whole units are reordered.
REORDERED = ("neurons", "activations")
#: Why a merge outside a run cannot match by activations.
NEEDS_PROMPTS = (
    "alignment activations needs the prompts of a run: merge by RUN/plans/NAME.json of a search or a sweep, or use "
    "alignment neurons"
)

_WHAT = "the alignment"  # of a file, in errors
_VERSION = 2  # of what is matched with what; another value makes cached permutations of earlier versions unused
_EPSILON = 1e-12  # added to a row's norm (published)
_SWEEPS = 20  # alternations between query heads and value channels; two or three are usual
_PLANS_HELD = 8  # plans whose row matches an Aligner keeps in memory


class AlignmentError(UserError):
    """Layers that cannot be aligned as asked; the message says what is missing."""


def align_pair(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    activations: tuple[Tensor, Tensor] | None = None,
) -> Permutations:
    """The order in which the other layer's units match the reference layer's, and its experts with their own units.

    reference, other: two layers' tensors by relative name. activations: the MLP units' values (tokens, n) in both
    layers on the same tokens; units are then matched by their correlation (a constant unit correlates with nothing),
    and heads still by weights.
    """
    heads = _match_heads(*(_head_features(layer, architecture) for layer in (reference, other)))
    if architecture.experts:
        experts = _match_experts(reference, other, architecture)
        if "shared_units" in architecture.unit_groups:
            likeness = unit_likeness(reference, other, architecture, shared=True)
            experts["shared_units"] = assign(-likeness.numpy(force=True))
        return {**experts, **heads}
    if activations is None:
        likeness = unit_likeness(reference, other, architecture)
    else:
        centred = [F.normalize(values.double() - values.double().mean(0), dim=0) for values in activations]
        likeness = centred[0].T @ centred[1]
    return {"units": assign(-likeness.numpy(force=True)), **heads}


def unit_likeness(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    architecture: Architecture,
    experts: tuple[int, int] | None = None,
    *,
    shared: bool = False,
) -> Tensor:
    """(n, n) float32: for each pair of MLP units, the sum of the cosines of their rows of gate, where there is one, and
    of up and columns of down. experts: whose units, of the reference's and of the other's experts; shared: those of the
    expert that every token goes through."""
    held = {part for parts in architecture.projections.values() for part in parts} | set(architecture.experts)
    total = None
    names = (f"shared_{part}" if shared else part for part in ("gate", "up", "down"))
    for projection in (name for name in names if name in held):
        one, two = (
            _unit_rows(layer, architecture, projection, expert)
            for layer, expert in zip((reference, other), experts or (None, None), strict=True)
        )
        total = one @ two.T if total is None else total.addmm_(one, two.T)
    assert total is not None  # every family has up and down
    return total


def _unit_rows(
    layer: Mapping[str, Tensor], architecture: Architecture, projection: str, expert: int | None = None
) -> Tensor:
    """Unit-norm rows, or columns where units lie along those, of a projection with its gain, float32."""
    matrix = architecture.holder_of(projection, expert)
    weight = source_tensor(architecture, layer, f"{matrix}.weight", norms="fold")
    weight = architecture.part_of(projection, weight)
    return F.normalize(weight if PROJECTIONS[projection][0] == 0 else weight.T, dim=1)


def _match_experts(
    reference: Mapping[str, Tensor], other: Mapping[str, Tensor], architecture: Architecture
) -> dict[str, np.ndarray]:
    """Experts (E,), and the units inside each (E, n).

    A pair of experts scores its router rows' cosine and, for its units, the mean of two bounds of what matching them
    can reach: each reference unit on the other expert's likest, and each of the other's on the reference's.
    """
    one, two = (_unit_rows(layer, architecture, "router") for layer in (reference, other))
    scores = (one @ two.T).numpy(force=True)
    for a in range(len(scores)):
        for b in range(len(scores)):
            likeness = unit_likeness(reference, other, architecture, (a, b))
            scores[a, b] += 0.5 * float(likeness.amax(1).sum() + likeness.amax(0).sum())
    order = assign(-scores)
    units = [
        assign(-unit_likeness(reference, other, architecture, (a, b)).numpy(force=True))
        for a, b in enumerate(order.tolist())
    ]
    return {"experts": order, "units": np.stack(units)}


def _head_features(layer: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Unit-norm rows of heads, columns of o: q (kv, groups, r, d), k (kv, r, d), v (kv, c, d), o (kv, groups, c, d)."""
    kv, groups = (architecture.sizes[name] for name in ("kv_heads", "query_heads"))
    return {
        name: _unit_rows(layer, architecture, name).unflatten(0, (kv, groups, -1) if name in "qo" else (kv, -1))
        for name in "qkvo"
    }


def _match_heads(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Key/value heads, query heads inside each and value channels inside each."""
    kv, groups, channels = one["o"].shape[:3]
    keys = torch.einsum("ard,brd->ab", one["k"], two["k"]).numpy(force=True)
    queries = torch.einsum("apld,bqld->abpq", one["q"], two["q"]).numpy(force=True)
    scores = np.empty((kv, kv))
    inner = {}
    for a in range(kv):
        values = torch.einsum("cd,bed->bce", one["v"][a], two["v"]).numpy(force=True)
        outputs = one["o"][a].flatten(0, 1) @ two["o"].flatten(0, 2).T  # (groups c, kv groups c)
        outputs = outputs.unflatten(1, (kv, groups, channels)).unflatten(0, (groups, channels)).numpy(force=True)
        for b in range(kv):
            score, *inner[a, b] = _match_inside(queries[a, b], values[b], outputs[:, :, b])
            scores[a, b] = keys[a, b] + score
    order = assign(-scores)
    query_heads, value_channels = zip(*(inner[a, b] for a, b in enumerate(order.tolist())), strict=True)
    return {"kv_heads": order, "query_heads": np.stack(query_heads), "value_channels": np.stack(value_channels)}


def _match_inside(queries: np.ndarray, values: np.ndarray, outputs: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(score, order of query heads, order of value channels) of one pair of key/value heads.

    queries (g, g), values (c, c), outputs (g, c, g, c): cosines, the reference's units first. The best of what the
    query heads' own match and its cyclic shifts lead to.
    """
    g, c = np.arange(len(queries)), np.arange(len(values))

    def in_turn(heads: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Value channels and query heads matched in turn, each exactly given the other, while the score rises."""
        best = -np.inf, heads, c
        for _ in range(_SWEEPS):
            channels = assign(-(values + outputs[g, :, best[1]].sum(0)))
            head_scores = queries + outputs[:, c, :, channels].sum(0)
            heads = assign(-head_scores)
            score = float(values[c, channels].sum() + head_scores[g, heads].sum())
            if score <= best[0]:
                break
            best = score, heads, channels
        return best

    def exchanged(heads: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The same, from there on with two query heads exchanged, while that leads higher."""
        best, rises = in_turn(heads), True
        while rises:
            rises = False
            for pair in combinations(g, 2):
                heads = best[1].copy()
                heads[list(pair)] = heads[list(pair[::-1])]
                if (found := in_turn(heads))[0] > best[0]:
                    best, rises = found, True
        return best

    start = assign(-queries)
    return max((exchanged(np.roll(start, shift)) for shift in g), key=lambda found: found[0])


# -- chains ----------------------------------------------------------------------------------------------------------


def compose(first: Permutations, then: Permutations, architecture: Architecture) -> Permutations:
    """One reordering that does what `first` and, on its result, `then` do."""
    combined = {}
    for name, outer in architecture.unit_groups.items():
        if name not in first:
            continue
        if outer is None:
            combined[name] = first[name][then[name]]
        else:
            combined[name] = np.take_along_axis(first[name][then[outer]], then[name], axis=1)
    return combined


def invert(permutations: Permutations, architecture: Architecture) -> Permutations:
    """The reordering that undoes another."""
    undone = {}
    for name, outer in architecture.unit_groups.items():
        if name in permutations:
            order = permutations[name]
            undone[name] = np.argsort(order, axis=-1)
            if outer is not None:
                undone[name] = undone[name][np.argsort(permutations[outer])]
    return undone


class Aligner:
    """Permutations of a checkpoint's layers for merge plans: each computed once, in memory and, with a folder, on disk.

    Files are named by content (model, layers, how matched) and appear whole, so that several processes may share a
    folder. device: where costs are computed. Alignment "activations" needs `units`, a function that gives a layer's
    MLP units (tokens, n) on some prompts (see `LayerRunner.mlp_units`), and `data`, which names those prompts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache_folder: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        units: Callable[[int], Tensor] | None = None,
        data: str = "",
    ):
        self.checkpoint = checkpoint
        self._device = device
        self._folder = None if cache_folder is None else Path(cache_folder)
        self._units = units
        self._data = data
        self._pairs: dict[tuple[str, int, int], Permutations] = {}
        self._rows: dict[str, list[dict[str, np.ndarray]]] = {}

    def data(self, alignment: str) -> list[str]:
        """The name of the prompts that alignment "activations" is matched on, as a list; empty for other alignments.
        Names of cached files that depend on it have it, since a plan's identity does not say."""
        return [self._data] if alignment == "activations" else []

    @staticmethod
    def pairs(plan: MergePlan) -> list[tuple[int, int]]:
        """The neighbouring layers (reference, other) whose matches `permutations(plan)` is composed of.

        The reference is always the shallower of the two; towards a kept layer that is the deeper, the match is
        inverted. They are independent of each other, so `compute` may be called for each by another process.
        """
        groups = plan.groups
        return sorted({(n, n + 1) for layers in groups.values() for n in range(min(layers), max(layers))})

    def compute(self, pair: tuple[int, int], alignment: str = "neurons") -> Permutations:
        """The match of two neighbouring layers (reference, other), from memory, from disk or from the model."""
        key = alignment, *pair
        if key not in self._pairs:
            path = self._file(*pair, alignment, self._data if alignment == "activations" else "")
            if path is not None and is_whole(path, _WHAT):
                self._pairs[key] = {name: order.numpy() for name, order in read_tensors(path, _WHAT).items()}
            else:
                self._pairs[key] = self._match(pair, alignment)
                if path is not None:
                    found = {name: torch.from_numpy(order) for name, order in self._pairs[key].items()}
                    write_tensors(path, found, _WHAT)
        return self._pairs[key]

    def take(self, pair: tuple[int, int], alignment: str, found: Permutations) -> None:
        """Use for two neighbouring layers what another process has computed."""
        self._pairs[alignment, *pair] = found

    def _match(self, pair: tuple[int, int], alignment: str) -> Permutations:
        architecture = self.checkpoint.architecture
        reference, other = (self._tensors(layer) for layer in pair)
        activations = None
        if alignment == "activations":
            if self._units is None:
                raise AlignmentError(NEEDS_PROMPTS)
            activations = self._units(pair[0]), self._units(pair[1])
        return align_pair(reference, other, architecture, activations=activations)

    def _tensors(self, layer: int) -> dict[str, Tensor]:
        stored = layer_tensors(self.checkpoint, self.checkpoint.architecture, layer)
        return {name: tensor.to(self._device) for name, tensor in stored.items()}

    def towards(self, kept: int, sources: Iterable[int], alignment: str = "neurons") -> dict[int, Permutations]:
        """For each source layer other than `kept`, the reordering that lays its units on those of layer `kept`."""
        architecture, found = self.checkpoint.architecture, {}
        for source in sources:
            total = None
            step = 1 if kept < source else -1
            for layer in range(source, kept, -step):  # from the source towards the kept layer
                nearer = layer - step
                match = self.compute((min(layer, nearer), max(layer, nearer)), alignment)
                match = match if nearer < layer else invert(match, architecture)
                total = match if total is None else compose(total, match, architecture)
            if total is not None:
                found[source] = total
        return found

    def row_matches(self, plan: MergePlan, *, keep: bool = False) -> list[dict[str, np.ndarray]]:
        """For each step of the plan, each matrix's order of the removed layer's rows ("rows"), from memory, from disk
        or from the model.

        keep: on disk too, for other processes. They depend on alpha, so a search would leave a file a candidate.
        """
        key = _row_key(plan)
        path = self._file(key)
        if key not in self._rows:
            if path is not None and is_whole(path, _WHAT):
                self.take_rows(plan, _read_rows(path, len(plan.steps)))
            else:
                self.take_rows(plan, self._match_rows(plan))
        if keep and path is not None and not is_whole(path, _WHAT):
            found = {
                f"{number}.{matrix}": torch.from_numpy(order)
                for number, match in enumerate(self._rows[key])
                for matrix, order in match.items()
            }
            write_tensors(path, found, _WHAT)
        return self._rows[key]

    def take_rows(self, plan: MergePlan, found: list[dict[str, np.ndarray]]) -> None:
        """Use for a plan what another process has matched."""
        while len(self._rows) >= _PLANS_HELD:
            del self._rows[next(iter(self._rows))]
        self._rows[_row_key(plan)] = found

    def _match_rows(self, plan: MergePlan) -> list[dict[str, np.ndarray]]:
        architecture = self.checkpoint.architecture

        def load(layer: int) -> dict[str, Tensor]:
            stored = self._tensors(layer)
            names = [f"{matrix}.weight" for matrix in architecture.matrices]
            return {name: source_tensor(architecture, stored, name, norms=plan.norms) for name in names}

        blocks = architecture.fused_rows
        return [match for _, match in fuse_rows(load, architecture.matrices, plan.steps, blocks=blocks)]

    def _file(self, *key: int | str) -> Path | None:
        """Where what is matched by this key is kept; None without a folder."""
        if self._folder is None:
            return None
        return self._folder / f"alignment-{digest([_VERSION, self.checkpoint.identity, *key])}.safetensors"


def _row_key(plan: MergePlan) -> str:
    """What the order of rows depends on."""
    steps = [[step.into, step.remove, float(step.alpha)] for step in plan.steps]
    return digest([steps, plan.norms])


def _read_rows(path: Path, n_steps: int) -> list[dict[str, np.ndarray]]:
    found: list[dict[str, np.ndarray]] = [{} for _ in range(n_steps)]
    for name, order in read_tensors(path, _WHAT).items():
        number, _, matrix = name.partition(".")
        found[int(number)][matrix] = order.numpy()
    return found


def layer_tensors(base: Mapping[str, Tensor], architecture: Architecture, layer: int) -> dict[str, Tensor]:
    """A layer's tensors by relative name, as they are stored."""
    prefix = architecture.layer_name(layer, "")
    return {name.removeprefix(prefix): base[name] for name in base if name.startswith(prefix)}


# -- rows ------------------------------------------------------------------------------------------------------------


def match_rows(reference: Tensor, other: Tensor) -> np.ndarray:
    """The order of the other matrix's rows (n, m) that is nearest to the reference's, row by row (published).

    Rows are divided by their norm + 1e-12; the cost is the Euclidean distance.
    """
    one, two = (w.float() / (w.float().norm(dim=1, keepdim=True) + _EPSILON) for w in (reference, other))
    return assign(torch.cdist(one, two, compute_mode="use_mm_for_euclid_dist").numpy(force=True))


def _match_in_blocks(reference: Tensor, other: Tensor, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """`match_rows` inside each of these sets of rows, the projections that a matrix holds; no sets: it is one."""
    if not blocks:
        return match_rows(reference, other)
    order = np.empty(len(reference), dtype=np.int64)
    for rows in blocks:
        order[rows] = rows[match_rows(*(matrix[torch.from_numpy(rows)] for matrix in (reference, other)))]
    return order


def fuse_rows(
    load: Callable[[int], dict[str, Tensor]],
    matrices: Sequence[str],
    steps: Sequence[MergeStep],
    matches: Sequence[Mapping[str, np.ndarray]] | None = None,
    *,
    blocks: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> Iterator[tuple[dict[str, Tensor], dict[str, np.ndarray]]]:
    """Merge step by step, matching the removed layer's rows anew each time against what is fused so far.

    load(layer): its tensors by relative name, float32: the matrices' weights and those biases that are merged, which
    follow their matrix's rows. matches: those of an earlier call, used instead of matching again. blocks: of matrices
    that hold several projections, the numbers of each one's rows; rows are matched inside them.
    Yields for each step the layer that it gives and the order of rows of each matrix.
    """
    alive: dict[int, dict[str, Tensor]] = {}
    for number, step in enumerate(steps):
        into = alive.get(step.into) or load(step.into)
        removed = alive.pop(step.remove, None) or load(step.remove)
        found = {}
        for matrix in matrices:
            weight = f"{matrix}.weight"
            if matches is not None:
                found[matrix] = matches[number][matrix]
            elif step.alpha == 1.0:  # nothing of it is used
                found[matrix] = np.arange(len(removed[weight]))
            else:
                found[matrix] = _match_in_blocks(into[weight], removed[weight], (blocks or {}).get(matrix, ()))
        fused = {}
        for name, own in into.items():
            order = torch.from_numpy(found[name.rpartition(".")[0]]).to(own.device)
            fused[name] = step.alpha * own + (1.0 - step.alpha) * removed[name][order]
        alive[step.into] = fused
        yield fused, found
