"""Merge plans: which decoder layer is merged into which, and with what weight.

A plan is a few hundred bytes, and everything about a candidate follows from it and the base weights, so plans are
shipped to workers and tensors are not. Layers are numbered from 0 and always by their number in the unmerged model,
as the published alpha files do; `into` names the layer that survives and `remove` the one that goes.

Merging layer j into i: theta = alpha * theta_i + (1 - alpha) * theta_j  (Liu et al. 2024, "Pruning via Merging",
stage 5). Chained merges multiply out to effective coefficients, one for each original layer, that sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TypedDict, Unpack

import numpy as np

from raymerge.errors import UserError
from raymerge.identity import digest

#: Which layer takes a block in, and keeps its norms and biases: the one before it, as in tail merging, or after it.
SURVIVORS = ("before", "after")

#: The published heuristic's value for equal similarities: sigmoid(1/2). See `similarity_ratio`.
FIXED_RATIO = 1.0 / (1.0 + math.exp(-0.5))

#: Ways to fit the layers at the seams to the unmerged model's states; see `refit`.
REFITS = ("linear", "scale", "outputs", "units")
#: The ways that can also fit layers after a seam.
REFITS_BEYOND = ("outputs", "units")


class PlanError(UserError):
    """A plan, or an alpha file with one, that cannot be carried out; the message names the value and the limit."""


@dataclass(frozen=True, slots=True)
class MergeStep:
    """One merge: layer `remove` is averaged into its surviving neighbour `into`, which keeps weight `alpha`."""

    into: int
    remove: int
    alpha: float


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """One layer of the merged model; `refitted` says that its output projections are fitted after merging.

    `index` is the original layer whose norms, biases and attention type it keeps; `coefficients` maps original
    layers to their weight in its projection matrices (they sum to 1; layers with weight 0 are left out). `matrices`
    holds (matrix, coefficients) for each matrix that the plan gives alphas of its own.
    """

    index: int
    coefficients: tuple[tuple[int, float], ...]
    matrices: tuple[tuple[str, tuple[tuple[int, float], ...]], ...] = ()
    refitted: bool = False

    def coefficients_of(self, matrix: str) -> tuple[tuple[int, float], ...]:
        """The coefficients of one projection matrix, which is named as in `MergePlan.matrix_alphas`."""
        return dict(self.matrices).get(matrix, self.coefficients)

    @property
    def sources(self) -> list[int]:
        """The original layers that have a weight in any matrix."""
        own = (self.coefficients, *(coefficients for _, coefficients in self.matrices))
        return sorted({source for coefficients in own for source, _ in coefficients})

    @property
    def unchanged(self) -> bool:
        itself = ((self.index, 1.0),)
        return not self.refitted and self.coefficients == itself and all(own == itself for _, own in self.matrices)


@dataclass(frozen=True, slots=True)
class Refit:
    """How the layers at the seams of a merge are fitted to what the unmerged model computes on calibration tokens.

    method: one of REFITS. ridge: how strongly the fitted weights are pulled to those before the fit, relative to the
    features' mean square; None chooses it layer by layer on held-out tokens. layers: how many layers after each seam
    are fitted too (REFITS_BEYOND), each to the states that leave it in the unmerged model. calibration: identity of the
    tokens.
    """

    method: str
    ridge: float | None = None
    layers: int = 0
    calibration: str = ""

    def __post_init__(self) -> None:
        if self.method not in REFITS:
            raise PlanError(f"refit is {self.method!r}, but must be one of {', '.join(REFITS)}")
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge > 0.0):
            raise PlanError(f"the ridge of a refit is {self.ridge}, but must be above 0")
        if self.layers < 0:
            raise PlanError(f"{self.layers} layers after a seam cannot be refitted: give 0 or more")
        if self.layers and self.method not in REFITS_BEYOND:
            raise PlanError(
                f"refit {self.method} is of a seam alone, but {self.layers} layers after it are to be fitted: give 0, "
                f"or use {' or '.join(REFITS_BEYOND)}"
            )


class Averaging(TypedDict, total=False):
    """The options of merges that average; see MergePlan."""

    alignment: str
    norms: str
    biases: str


@dataclass(frozen=True)
class MergePlan:
    """An ordered list of merges on a model of `n_layers` decoder layers.

    `biases`: "keep" leaves the biases of the surviving layer (published), "merge" averages them like the matrices.
    `alignment`: "none", "rows" (each matrix's rows re-ordered, as published), or whole units re-ordered so that each
    layer's function stays, matched by weights ("neurons") or by what they do on prompts ("activations"). `norms`:
    "keep" leaves the survivor's norms (published), "fold" multiplies every layer's input-norm gains into its matrices
    before averaging. `kind` is one of base, drop, before_last, keep_one, fixed, random, file, found. `selection` says
    how the layers were chosen: none, tail, before_last, block, most_similar or list.
    `matrix_alphas`: alphas, one a step, of those projection matrices (relative names, "mlp.up_proj") that are not
    averaged with the steps' own; a matrix's bias follows it where biases are merged. `refit`: the layers at the seams
    are fitted after merging.
    """

    n_layers: int
    steps: tuple[MergeStep, ...]
    name: str = "plan"
    kind: str = "file"
    selection: str = "tail"
    alignment: str = "none"
    norms: str = "keep"
    biases: str = "keep"
    matrix_alphas: tuple[tuple[str, tuple[float, ...]], ...] = ()
    refit: Refit | None = None
    _kept: tuple[KeptLayer, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.steps) >= self.n_layers:
            raise PlanError(
                f"{len(self.steps)} merges need more than {len(self.steps)} layers, the model has {self.n_layers}: "
                f"merge at most {self.n_layers - 1}"
            )
        own = sorted((matrix, tuple(float(alpha) for alpha in alphas)) for matrix, alphas in self.matrix_alphas)
        object.__setattr__(self, "matrix_alphas", tuple(own))
        object.__setattr__(self, "_kept", self._fold())

    def _fold(self) -> tuple[KeptLayer, ...]:
        kept = _multiply_out(self.n_layers, self.steps)
        names = [matrix for matrix, _ in self.matrix_alphas]
        if len(set(names)) < len(names):
            raise PlanError(f"matrix_alphas name a matrix twice: {', '.join(names)}")
        merged = {step.into for step in self.steps}
        for matrix, alphas in self.matrix_alphas:
            if len(alphas) != len(self.steps):
                raise PlanError(f"{len(alphas)} alphas are given for {matrix} in a plan of {len(self.steps)} steps")
            steps = [MergeStep(step.into, step.remove, alpha) for step, alpha in zip(self.steps, alphas, strict=True)]
            try:
                folded = _multiply_out(self.n_layers, steps)
            except PlanError as error:
                raise PlanError(f"{matrix}: {error}") from error
            kept = tuple(
                replace(layer, matrices=(*layer.matrices, (matrix, own.coefficients)))
                if layer.index in merged
                else layer
                for layer, own in zip(kept, folded, strict=True)
            )
        if self.refit is None:
            return kept
        fitted = _refit_targets(kept, self.groups, self.refit.layers)
        return tuple(replace(layer, refitted=position in fitted) for position, layer in enumerate(kept))

    @property
    def groups(self) -> dict[int, list[int]]:
        """For each kept layer that others are merged into, all layers of its group, itself included."""
        groups: dict[int, list[int]] = {}
        for step in self.steps:
            groups.setdefault(step.into, [step.into]).extend(groups.pop(step.remove, [step.remove]))
        return groups

    @property
    def refit_targets(self) -> dict[int, int]:
        """For each position that is refitted, in order, the original layer whose output it is to reproduce."""
        return {} if self.refit is None else _refit_targets(self._kept, self.groups, self.refit.layers)

    @property
    def kept(self) -> tuple[KeptLayer, ...]:
        """The merged model's layers, in order."""
        return self._kept

    @property
    def alphas(self) -> list[float]:
        return [step.alpha for step in self.steps]

    @property
    def resumes_at(self) -> int:
        """The deepest position from which the merged model can be run on states of the unmerged one.

        It is the first changed layer, or the last layer if none that is kept has changed (plain dropping), so that
        there is always a layer to run.
        """
        return min(self.first_changed, len(self._kept) - 1)

    @property
    def ends_at_once(self) -> bool:
        """Whether a single layer, which is not refitted, follows the unchanged trunk, as after a tail merge."""
        return bool(self.steps) and self.resumes_at == len(self._kept) - 1 and self.refit is None

    def with_alphas(
        self,
        alphas: Sequence[float],
        *,
        name: str,
        kind: str,
        matrix_alphas: Mapping[str, Sequence[float]] | None = None,
    ) -> MergePlan:
        """The same merges with other alphas, one a step; only matrices in `matrix_alphas` have alphas of their own."""
        if len(alphas) != len(self.steps):
            raise PlanError(f"{len(alphas)} alphas are given for a plan of {len(self.steps)} steps")
        steps = (MergeStep(step.into, step.remove, float(a)) for step, a in zip(self.steps, alphas, strict=True))
        own = tuple((matrix, tuple(values)) for matrix, values in (matrix_alphas or {}).items())
        return replace(self, steps=tuple(steps), name=name, kind=kind, matrix_alphas=own)

    @property
    def flat_alphas(self) -> list[float]:
        """The steps' alphas, followed by those of each matrix that has its own; `with_flat_alphas` takes them back."""
        return [*self.alphas, *(alpha for _, own in self.matrix_alphas for alpha in own)]

    @property
    def first_removed(self) -> int:
        """The shallowest layer that goes: of a block, its first; `n_layers` where none does."""
        return min((step.remove for step in self.steps), default=self.n_layers)

    def moved_to(self, first: int) -> MergePlan:
        """The same merges shifted to other layers, so that `first` is the first layer that goes."""
        shift = first - self.first_removed
        steps = (MergeStep(step.into + shift, step.remove + shift, step.alpha) for step in self.steps)
        return replace(self, steps=tuple(steps))

    def with_flat_alphas(self, values: Sequence[float], matrices: Sequence[str], *, name: str, kind: str) -> MergePlan:
        """The same merges with `flat_alphas` of another plan: one a step, or these and one a step for each matrix.

        `values` of a block's plan may also be a point of a search over blocks and coefficients: the number of the
        block's first layer, then one alpha a step.
        """
        steps = len(self.steps)
        if self.selection == "block" and len(values) == steps + 1:
            return self.moved_to(round(values[0])).with_alphas(values[1:], name=name, kind=kind)
        if len(values) == steps:
            return self.with_alphas(values, name=name, kind=kind)
        if len(values) != steps * (1 + len(matrices)):
            raise PlanError(f"{len(values)} alphas are given for {steps} steps and {len(matrices)} matrices")
        # In the order of `matrix_alphas`, which is that of `flat_alphas`, and not the architecture's.
        own = {matrix: values[steps * (i + 1) : steps * (i + 2)] for i, matrix in enumerate(sorted(matrices))}
        return self.with_alphas(values[:steps], name=name, kind=kind, matrix_alphas=own)

    @property
    def first_changed(self) -> int:
        """Position of the first layer that differs from the unmerged model; `n_layers` for the empty plan.

        Everything before it, the trunk, computes what the unmerged model computes.
        """
        for position, layer in enumerate(self._kept):
            if layer.index != position or not layer.unchanged:
                return position
        return len(self._kept)

    def plan_id(self, model_identity: str) -> str:
        """First 16 hex digits of SHA-256 over everything that determines the merged weights, and how the merges were
        selected: the same merges chosen in two ways have two ids."""
        return digest(
            {
                "model": model_identity,
                "steps": [[step.into, step.remove] for step in self.steps],
                "alphas": [float(step.alpha) for step in self.steps],
                "alignment": self.alignment,
                "norms": self.norms,
                "biases": self.biases,
                "selection": self.selection,
            }
            # Left out where there are none, so that plans keep the id that they had before matrices could differ.
            | ({"matrix_alphas": dict(self.matrix_alphas)} if self.matrix_alphas else {})
            | ({} if self.refit is None else {"refit": asdict(self.refit)})
        )


def _refit_targets(kept: Sequence[KeptLayer], groups: Mapping[int, list[int]], layers: int) -> dict[int, int]:
    """What `MergePlan.refit_targets` gives: the seams are the layers that stand for several."""
    last = [max(groups.get(layer.index, [layer.index])) for layer in kept]
    seams = [position for position, layer in enumerate(kept) if layer.index in groups]
    positions = {position for seam in seams for position in range(seam, min(seam + layers + 1, len(kept)))}
    return {position: last[position] for position in sorted(positions)}


def _multiply_out(n_layers: int, steps: Sequence[MergeStep]) -> tuple[KeptLayer, ...]:
    """The layers that remain, with the effective coefficients of each; PlanError where the steps do not chain."""
    alive: dict[int, dict[int, float]] = {layer: {layer: 1.0} for layer in range(n_layers)}
    for number, step in enumerate(steps):
        where = f"step {number} ({step.into} <- {step.remove})"
        if not (math.isfinite(step.alpha) and 0.0 <= step.alpha <= 1.0):
            raise PlanError(f"{where}: alpha is {step.alpha}, but it must lie in [0, 1]")
        for role, layer in (("into", step.into), ("remove", step.remove)):
            if not 0 <= layer < n_layers:
                raise PlanError(f"{where}: layer {layer} ({role}) does not exist, the model has 0 to {n_layers - 1}")
            if layer not in alive:
                raise PlanError(f"{where}: layer {layer} ({role}) was already removed by an earlier step")
        if step.into == step.remove:
            raise PlanError(f"{where}: a layer cannot be merged into itself")
        low, high = sorted((step.into, step.remove))
        between = [layer for layer in alive if low < layer < high]
        if between:
            raise PlanError(
                f"{where}: layers {between} still stand between the two, and only neighbours can be merged: "
                "order the steps so that they chain"
            )
        removed = alive.pop(step.remove)
        merged = {layer: step.alpha * weight for layer, weight in alive[step.into].items()}
        for layer, weight in removed.items():
            merged[layer] = merged.get(layer, 0.0) + (1.0 - step.alpha) * weight
        alive[step.into] = merged
    return tuple(
        KeptLayer(index, tuple((layer, weight) for layer, weight in sorted(alive[index].items()) if weight != 0.0))
        for index in sorted(alive)
    )


def tail_coefficients(alphas: np.ndarray | Sequence[float]) -> np.ndarray:
    """Effective coefficients of tail merging: (..., K) alphas to (..., K + 1) coefficients, float64.

    `alphas[..., s]` is the alpha of step s, which merges layer L-1-s into L-2-s. Column j of the result belongs to
    original layer L-1-K+j. The coefficients are a stick-breaking product and sum to 1.
    """
    reverse = np.asarray(alphas, dtype=np.float64)[..., ::-1]
    ones = np.ones((*reverse.shape[:-1], 1))
    return np.concatenate([reverse, ones], axis=-1) * np.concatenate([ones, np.cumprod(1.0 - reverse, -1)], axis=-1)


def coefficients_to_alphas(coefficients: np.ndarray | Sequence[float]) -> np.ndarray:
    """The inverse of `tail_coefficients`: (..., K + 1) effective coefficients to (..., K) alphas, float64.

    Each alpha is its layer's share of the summed coefficients of that layer and the deeper ones; where that sum is 0,
    the alpha has no effect and is 1. Coefficients that do not add up to 1 to 1e-6 or are negative raise PlanError.
    """
    values = np.asarray(coefficients, dtype=np.float64)
    if not np.all(np.isfinite(values)) or np.any(values < 0.0):
        raise PlanError(f"effective coefficients must be finite and not negative: {values.tolist()}")
    totals = values.sum(-1)
    if np.any(np.abs(totals - 1.0) > 1e-6):
        raise PlanError(f"effective coefficients must add up to 1: {values.tolist()} add up to {totals.tolist()}")
    left = np.cumsum(values[..., ::-1], -1)[..., ::-1]
    shares = np.divide(values, left, out=np.ones_like(values), where=left > 0.0)
    return shares[..., -2::-1]


def tail_pairs(n_layers: int, merges: int) -> list[tuple[int, int]]:
    """(into, remove) of merging the last `merges` layers one into the next, deepest first: L-1 into L-2, L-2 into
    L-3, …"""
    check_merges(n_layers, merges)
    return [(n_layers - 2 - s, n_layers - 1 - s) for s in range(merges)]


def block_starts(n_layers: int, merges: int, survivor: str) -> range:
    """The first layers of the blocks of `merges` layers that have a survivor on that side."""
    check_merges(n_layers, merges)
    if survivor not in SURVIVORS:
        raise PlanError(f"survivor is {survivor!r}, but must be one of {', '.join(SURVIVORS)}")
    return range(1, n_layers - merges + 1) if survivor == "before" else range(n_layers - merges)


def block_pairs(n_layers: int, first: int, merges: int, survivor: str = "before") -> list[tuple[int, int]]:
    """(into, remove) of merging the layers first … first + merges - 1 one into the next, towards the survivor.

    The survivor, layer first - 1 or first + merges, comes on top: merges + 1 layers become one. The block of the last
    layers with its survivor before it is the tail. On either side the effective coefficients are `tail_coefficients`,
    the survivor's first; with every alpha 1 the block is dropped.
    """
    starts = block_starts(n_layers, merges, survivor)
    if first not in starts:
        raise PlanError(
            f"a block of {merges} layers from layer {first} on has no layer {survivor} it in a model of {n_layers}: "
            f"its first layer must lie in {starts[0]} to {starts[-1]}"
        )
    if survivor == "after":
        return [(first + 1 + s, first + s) for s in range(merges)]
    last = first + merges - 1
    return [(last - 1 - s, last - s) for s in range(merges)]


def pairs_plan(
    n_layers: int,
    pairs: Iterable[tuple[int, int]],
    alphas: Iterable[float],
    *,
    name: str,
    kind: str,
    selection: str = "tail",
    **options: Unpack[Averaging],
) -> MergePlan:
    """Merge each pair (into, remove) in order, with one alpha a pair; options are MergePlan's."""
    steps = tuple(MergeStep(into, remove, float(a)) for (into, remove), a in zip(pairs, alphas, strict=True))
    return MergePlan(n_layers, steps, name=name, kind=kind, selection=selection, **options)


def tail_plan(
    n_layers: int, alphas: Sequence[float], *, name: str, kind: str, **options: Unpack[Averaging]
) -> MergePlan:
    """Merge the last K = len(alphas) layers one into the next, deepest first; options are MergePlan's."""
    return pairs_plan(n_layers, tail_pairs(n_layers, len(alphas)), alphas, name=name, kind=kind, **options)


def block_plan(
    n_layers: int,
    first: int,
    alphas: Sequence[float],
    *,
    name: str,
    kind: str,
    survivor: str = "before",
    **options: Unpack[Averaging],
) -> MergePlan:
    """Merge the K = len(alphas) layers from `first` on into the layer before or after them; see `block_pairs`."""
    pairs = block_pairs(n_layers, first, len(alphas), survivor)
    return pairs_plan(n_layers, pairs, alphas, name=name, kind=kind, selection="block", **options)


def base_plan(n_layers: int) -> MergePlan:
    """The unmerged model."""
    return MergePlan(n_layers, (), name="base", kind="base", selection="none")


def drop_plan(n_layers: int, merges: int) -> MergePlan:
    """Drop the last `merges` layers: tail merging with every alpha 1. What released MKA code really does."""
    return tail_plan(n_layers, [1.0] * merges, name="drop", kind="drop")


def before_last_plan(n_layers: int, merges: int) -> MergePlan:
    """Keep the last layer, with its norms and biases, and drop the `merges` layers before it."""
    check_merges(n_layers, merges)
    last = n_layers - 1
    pairs = [(last, last - 1 - s) for s in range(merges)]
    return pairs_plan(n_layers, pairs, [1.0] * merges, name="before_last", kind="before_last", selection="before_last")


def drop_block_plan(n_layers: int, first: int, merges: int) -> MergePlan:
    """Drop the `merges` layers from `first` on, anywhere, as block merging with every alpha 1."""
    survivor = "before" if first else "after"
    return block_plan(n_layers, first, [1.0] * merges, name="drop_block", kind="drop", survivor=survivor)


def drop_layers_plan(n_layers: int, layers: Iterable[int], *, name: str) -> MergePlan:
    """Drop any layers: each is merged with alpha 1 into the nearest layer before it that stays, or after it."""
    gone = sorted(set(layers))
    check_merges(n_layers, len(gone))
    stays = [layer for layer in range(n_layers) if layer not in gone]
    # The nearest first on either side, so that only neighbours are merged.
    pairs = [(max(layer for layer in stays if layer < drop), drop) for drop in gone if drop > stays[0]]
    pairs += [(stays[0], drop) for drop in reversed(gone) if drop < stays[0]]
    return pairs_plan(n_layers, pairs, [1.0] * len(gone), name=name, kind="drop", selection="list")


def keep_one_plans(plan: MergePlan) -> dict[int, MergePlan]:
    """Where a plan merges layers in a row into one: for each of these the plan that keeps it whole, with its norms and
    biases, and drops the others. Empty where layers are merged in several places."""
    if len(plan.groups) != 1:
        return {}
    group = sorted(*plan.groups.values())
    found = {}
    for layer in group:
        others = [other for other in group if other != layer]
        found[layer] = replace(drop_layers_plan(plan.n_layers, others, name=f"keep_{layer}"), kind="keep_one")
    return found


def alphas_that_keep(plan: MergePlan, layer: int) -> list[float]:
    """The alphas, 0 or 1, with which a plan's steps give all of the weight to one of the layers that they merge."""
    groups = {each: [each] for each in range(plan.n_layers)}
    alphas = []
    for step in plan.steps:
        removed = groups.pop(step.remove)
        alphas.append(0.0 if layer in removed else 1.0)
        groups[step.into] += removed
    return alphas


def check_merges(n_layers: int, merges: int, first: int = 0) -> None:
    """Raise PlanError unless so many of the layers from `first` on can be merged into one of them."""
    most = n_layers - first - 1
    if not 1 <= merges <= most:
        stay = f" and whose first {first} stay, to which features of images are added" if first else ""
        raise PlanError(
            f"cannot merge {merges} layers of a model that has {n_layers}{stay}: merges must lie in 1 to {most}"
        )
