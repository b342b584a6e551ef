"""The layers at the seams of a merge, fitted in closed form to what the unmerged model computes on calibration tokens.

A merge leaves seams: layers that stand for several. What leaves a seam is to be what left the last of the layers that
it stands for. Only the matrices that write into the residual stream are fitted, o_proj and down_proj. Their outputs are
linear in them, so that least squares finds the best ones, and nothing is added to the model. They are fitted to what
they read in the merged model: layers in order, each on the states that the layers fitted before it give.

`linear`: the MLP's output of the seam is multiplied by a matrix, absorbed into down_proj (ReplaceMe, Shopkhoev et al.
2025, arXiv:2505.02819, equation 5), each token counting alike. `scale`: by a diagonal one: the part of LinearPatch's
channel scaling at the seam (Chen et al. 2025, arXiv:2505.24680) that needs no further matrix. `outputs` (ours): o_proj
and then down_proj. `units` (ours): the MLP units of the seam are first chosen among those of all layers that it stands
for, by what they contribute, then fitted like `outputs`. The last two weight a token by the inverse of its target's
mean square, since what follows normalises it, and leave out tokens with massive activations (Sun et al. 2024,
arXiv:2402.17762), which would dominate a squared error. With `layers` the kept layers after a seam are fitted likewise,
each to the state that left it in the unmerged model (o_proj to the one between attention and MLP), and repair what the
seam could not.

A fit is cached by content, and `fusion` puts it in place of merged tensors, so that evaluation, checkpoints, receipts
and quantisation see the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from raymerge.alignment import layer_tensors
from raymerge.architectures import source_tensor
from raymerge.checkpoint import Checkpoint
from raymerge.device import moved
from raymerge.forward import GroupStates, LayerRunner, joined
from raymerge.identity import digest
from raymerge.normal_equations import NormalEquations, PackedEquations, RefitError, choose_ridge, products_for
from raymerge.plan import MergePlan, Refit
from raymerge.prompts import Shard
from raymerge.tensorfiles import is_whole, read_tensors, write_tensors
from raymerge.trunk import TrunkCache, compute_trunks

#: The ridges to choose from where a plan gives none.
RIDGES = (0.01, 0.1, 1.0, 10.0)

_VERSION = 2  # of what is fitted to what; another value makes cached fits of earlier versions unused
_WHAT = "the refit"  # what a file holds, for error messages
_UNITS = ("gate", "up", "down")  # projections whose matrices hold MLP units
_MASSIVE = 50.0  # times the median mean square of a shard's target states: tokens above are left out
_WITHOUT = "do without it (plan.refit: none, no --refit; in a sweep, nothing but none in sweep.refits)"
_HELD_OUT = 5  # every fifth sequence, or the last fifth of each where there are fewer, is for choosing the ridge


@dataclass(frozen=True)
class Step:
    """One fit: `part` (units, attention or mlp) of the merged model's layer `position`, whose output is to be that of
    original layer `target`; `seam`: it stands for several layers."""

    position: int
    target: int
    part: str
    seam: bool


@dataclass
class Sums:
    """What a step is solved from: normal equations of tokens to fit and, where the ridge is to be chosen, then those of
    tokens to choose it on; or for units their weighted sum of squares (sources, n)."""

    equations: list[NormalEquations] = field(default_factory=list)
    squares: Tensor | None = None

    def pack(self) -> PackedSums:
        """The same to be sent to another process, which may have no accelerator to unpack tensors on."""
        squares = None if self.squares is None else self.squares.cpu()
        return PackedSums([equations.pack() for equations in self.equations], squares)

    @staticmethod
    def total(parts: Sequence[Sums | PackedSums]) -> Sums:
        """The sums of several workers' shares, packed or not."""
        squares = [part.squares for part in parts if part.squares is not None]
        equations = [NormalEquations.total(own) for own in zip(*(part.equations for part in parts), strict=True)]
        return Sums(equations, torch.stack(squares).sum(0) if squares else None)


class PackedSums(NamedTuple):
    """Sums in transit."""

    equations: list[PackedEquations]
    squares: Tensor | None


def check_refittable(checkpoint: Checkpoint, plan: MergePlan) -> None:
    """Refuse a refit of a family for which its algebra does not hold, or of a plan that merges nothing."""
    if plan.refit is None:
        return
    architecture, method = checkpoint.architecture, plan.refit.method
    needed = ("o", "down", "gate", "up") if method == "units" else ("o", "down")
    if architecture.parallel:
        raise RefitError(
            f"refit {method} needs layers whose MLP follows their attention, and in {architecture.name} both read the "
            f"layer's input: {_WITHOUT}"
        )
    # A norm between MLP and residual stream or a scaled residual is not linear, or another map.
    scale = architecture.residual_multiplier
    scaled = scale is not None and getattr(checkpoint.config, scale) != 1
    another = architecture.output_norms or scaled or architecture.norm_before_mlp is None
    missing = [projection for projection in needed if architecture.matrix_of(projection) is None]
    if missing or another:
        cure = _WITHOUT if another or {"o", "down"} & set(missing) else "use refit outputs"
        raise RefitError(
            f"refit {method} needs layers in which matrices of their own for {' and '.join(needed)} write straight "
            f"into the residual stream or feed what does, which {architecture.name} does not have: {cure}"
        )
    units = (architecture.norm_before_mlp, architecture.matrix_of("gate"), architecture.matrix_of("up"))
    biased = [name for name in (f"{module}.bias" for module in units) if name in checkpoint.layer_tensors(0)]
    if method == "units" and biased:
        raise RefitError(
            f"refit units cannot choose among MLP units with biases, which {architecture.name} has here: "
            f"{' and '.join(biased)}; use refit outputs"
        )
    if not plan.groups:
        raise RefitError(f"plan {plan.name} merges nothing, so that it has no seam to refit")


def _is_seam(plan: MergePlan, position: int) -> bool:
    """Whether the merged model's layer at a position stands for several."""
    return plan.kept[position].index in plan.groups


def _refit(plan: MergePlan) -> Refit:
    """How a plan is refitted; nothing else here is asked of plans that are not."""
    assert plan.refit is not None
    return plan.refit


def _features_are_outputs(plan: MergePlan) -> bool:
    """Whether the features of a fit are what its matrix gives, not what it reads."""
    return _refit(plan).method in ("linear", "scale")


def _chooses_ridge(plan: MergePlan) -> bool:
    """Whether tokens are held out to choose the ridge on; if not, the sums take half the memory."""
    return _refit(plan).ridge is None and _refit(plan).method != "scale"


def steps_of(plan: MergePlan) -> list[Step]:
    """The fits of a plan in the order in which they are made."""
    method = _refit(plan).method
    parts = ("mlp",) if method in ("linear", "scale") else ("attention", "mlp")
    steps = []
    for position, target in plan.refit_targets.items():
        seam = _is_seam(plan, position)
        if seam and method == "units":
            steps.append(Step(position, target, "units", seam))
        steps += [Step(position, target, part, seam) for part in parts]
    return steps


class _Entering(NamedTuple):
    """States of one shard, as `LayerRunner.pack` gives them, that enter a position of the merged model."""

    position: int
    packed: list[tuple[Tensor, Tensor]]


class Refitter:
    """Fits plans on one runner's model, and gives `fusion` the fitted tensors.

    shards: the calibration's, asked for when first needed; None where there are none. cache: folder of the fits and
    of the unmerged model's states. Fits can be made here in one go (`fit`; `tensors` makes those that it needs) or step
    by step from partial sums of several workers (`sums`, `solve`, `store`).
    """

    def __init__(self, runner: LayerRunner, cache: str | Path, shards: Callable[[], Sequence[Shard]] | None = None):
        self.runner, self.cache, self._shards = runner, Path(cache), shards
        # The plan last worked on (its id), and the states held for it, by number of the shard.
        self._held_plan: str = ""
        self._held: dict[int, _Entering] = {}

    # -- what fusion asks ---------------------------------------------------------------------------------------

    def tensors(self, plan: MergePlan, position: int) -> dict[str, Tensor]:
        """The fitted tensors of one layer of the merged model by relative name, in the stored dtype."""
        found: dict[str, Tensor] = {}
        for number, step in enumerate(steps_of(plan)):
            if step.position == position:
                found |= self._read(plan, number)
        return found

    def fit(self, plan: MergePlan) -> None:
        """Make every fit of a plan that is not in the cache yet."""
        self._make(plan, len(steps_of(plan)))

    def _make(self, plan: MergePlan, count: int) -> None:
        """Make those of a plan's first `count` fits that this machine's cache lacks, even if another machine's has."""
        for number in range(self.done(plan), count):
            self.store(plan, number, self.solve(plan, number, self.sums(plan, number)))

    def done(self, plan: MergePlan) -> int:
        """How many of the plan's steps are in the cache, from the first on."""
        numbers = range(len(steps_of(plan)))
        return next((number for number in numbers if not is_whole(self.path(plan, number), _WHAT)), len(numbers))

    def path(self, plan: MergePlan, number: int) -> Path:
        """The file of one step of a plan; the plan's identity says on which tokens it is fitted."""
        key = [_VERSION, *self.runner.cache_key, plan.plan_id(self.runner.checkpoint.identity), number]
        key += self.runner.aligner.data(plan.alignment)
        return self.cache / f"refit-{digest(key)}.safetensors"

    def _read(self, plan: MergePlan, number: int) -> dict[str, Tensor]:
        self._make(plan, number + 1)
        tensors = read_tensors(self.path(plan, number), _WHAT)
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("_")}

    def records(self, plan: MergePlan) -> list[dict[str, float | int | str]]:
        """How each fit went: layer (original number), part, tokens, ridge, and the error left on the tokens fitted and
        on those held out, relative to the layer as it stood."""
        self.fit(plan)
        rows = []
        for number, step in enumerate(steps_of(plan)):
            figures = read_tensors(self.path(plan, number), _WHAT, ["_tokens", "_ridge", "_error", "_held_out_error"])
            values = {name.lstrip("_"): tensor.item() for name, tensor in figures.items()}
            rows.append({"layer": plan.kept[step.position].index, "part": step.part, **values})
        return rows

    # -- one step -----------------------------------------------------------------------------------------------

    @property
    def shards(self) -> Sequence[Shard]:
        if self._shards is None:
            raise RefitError("a refit needs calibration tokens, which this command has not been given")
        return self._shards()

    def prepare(self, plan: MergePlan, number: int) -> int:
        """Compute the unmerged model's states that a plan's fits need, for one shard, where they are not on disk yet;
        return the shard's tokens."""
        shard = self.shards[number]
        compute_trunks(self._caches(plan), shard)
        return shard.tokens

    def _caches(self, plan: MergePlan) -> list[TrunkCache]:
        targets = plan.refit_targets
        entering = {target for position, target in targets.items() if not _is_seam(plan, position)}
        depths = {plan.first_changed, *(target + 1 for target in targets.values()), *entering}
        return [TrunkCache(self.runner, depth, self.cache) for depth in sorted(depths)]

    @torch.inference_mode()
    def sums(self, plan: MergePlan, number: int, share: tuple[int, int] = (0, 1)) -> Sums:
        """A step's sums over the calibration's shards share[0], share[0] + share[1], …, given the steps before it."""
        step, shards, found = steps_of(plan)[number], self.shards, None
        weights = self._layer(plan, step.position, number)
        counts = [sum(len(group.sequences) for group in shard.groups) for shard in shards]
        numbers = range(share[0], len(shards), share[1])
        self._advance(plan, step.position, numbers)
        for n in numbers:
            entering = self.runner.from_packed(shards[n], self._held[n].packed)
            if step.part == "units":
                part = Sums(squares=self._squares(plan, step, entering, shards[n], weights))
                found = part if found is None else Sums.total([found, part])
            else:
                held_out = _held_out(shards[n], first=sum(counts[:n]), sequences=sum(counts))
                found = self._add(found, plan, step, entering, shards[n], weights, held_out)
        if found is None:
            raise RefitError(f"share {share[0]} of {share[1]} has none of the {len(shards)} shards of the calibration")
        return found

    def solve(self, plan: MergePlan, number: int, total: Sums) -> dict[str, Tensor]:
        """The tensors of a step in the stored dtype, by relative name, with its figures (names beginning with _).

        total: the sums over all shards.
        """
        step = steps_of(plan)[number]
        own = self._stored(plan, step.position, number)
        if total.squares is not None:
            return self._chosen(plan, step, own, total.squares)
        name = f"{self._fitted(step)}.weight"
        weight = moved(own[name], self.runner.device, torch.float64)
        parts = [part.to(self.runner.device) for part in total.equations]
        ridge, everything = _refit(plan).ridge, NormalEquations.total(parts)
        held_out_error = float("nan")
        if _refit(plan).method == "scale":
            ridge = RIDGES[0] if ridge is None else ridge
            found = torch.diag(everything.scale(ridge))
        else:
            if ridge is None:
                fitted, held_out = parts
                ridge, held_out_error = choose_ridge(fitted, held_out, RIDGES)
            found = everything.solve(ridge)
        error = everything.error(found) / (everything.power / everything.weight or 1.0)
        change = found.T @ weight if _features_are_outputs(plan) else found.T
        tensors = {name: (weight + change).to(own[name].dtype).cpu()}
        return tensors | _figures(everything.tokens, ridge, error, held_out_error)

    def _fitted(self, step: Step) -> str:
        """The matrix that a step fits."""
        return self.runner.checkpoint.architecture.holder_of("o" if step.part == "attention" else "down")

    def store(self, plan: MergePlan, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what `solve` gave."""
        write_tensors(self.path(plan, number), tensors, _WHAT)

    # -- the layer and its states -------------------------------------------------------------------------------

    def _stored(self, plan: MergePlan, position: int, before: int) -> dict[str, Tensor]:
        """A layer of the merged model in the stored dtype, with the fits of the steps before number `before`; what is
        fitted lies on the CPU, all else where the runner fuses."""
        layer = self.runner.fused(replace(plan, refit=None), position)
        for number, step in enumerate(steps_of(plan)[:before]):
            if step.position == position:
                layer |= self._read(plan, number)
        return layer

    def _layer(self, plan: MergePlan, position: int, before: int) -> dict[str, Tensor]:
        """The same layer as it is run: on the runner's device, in its dtype, quantised if it quantises."""
        runner, stored = self.runner, self._stored(plan, position, before)
        return runner.deployed({name: moved(tensor, runner.device, runner.dtype) for name, tensor in stored.items()})

    def _advance(self, plan: MergePlan, position: int, numbers: Sequence[int]) -> None:
        """Hold the states that enter a position of the merged model, all fits before it made, of these shards.

        Layer by layer, all shards through one before the next, since fusing a layer costs more than running one shard.
        """
        plan_id, start = plan.plan_id(self.runner.checkpoint.identity), plan.first_changed
        if self._held_plan != plan_id:
            self._held_plan, self._held = plan_id, {}
        held = self._held
        for number in numbers:
            if number not in held or held[number].position > position:
                compute_trunks(self._caches(plan), self.shards[number])
                packed = TrunkCache(self.runner, start, self.cache).load(self.shards[number])
                held[number] = _Entering(start, packed)
        for before in range(min((held[number].position for number in numbers), default=position), position):
            self._advance_by_one(plan, before, [number for number in numbers if held[number].position == before])

    def _advance_by_one(self, plan: MergePlan, position: int, numbers: Sequence[int]) -> None:
        """Run the merged model's layer at a position on the states that are held of these shards."""
        weights = self._layer(plan, position, len(steps_of(plan)))
        for number in numbers:
            states = self.runner.from_packed(self.shards[number], self._held[number].packed)
            self.runner.run(states, [(plan.kept[position].index, lambda: weights)])
            self._held[number] = _Entering(position + 1, self.runner.pack(states))

    def _target(self, depth: int, shard: Shard) -> Tensor:
        """(tokens, d): the unmerged model's states that enter layer `depth`."""
        return joined(TrunkCache(self.runner, depth, self.cache).load(shard)).to(self.runner.device)

    def _add(
        self,
        sums: Sums | None,
        plan: MergePlan,
        step: Step,
        states: list[GroupStates],
        shard: Shard,
        weights: Mapping[str, Tensor],
        held_out: Tensor,
    ) -> Sums:
        """The sums with one shard's tokens added; held-out tokens go into the second if the ridge is chosen on them."""
        features, residual, counts = self._equations(plan, step, states, shard, weights)
        shape = features.shape[1], residual.shape[1], self.runner.device
        if not _chooses_ridge(plan):
            sums = sums or Sums([NormalEquations.empty(*shape)])
            products = products_for(_refit(plan).ridge, features.shape[1])
            sums.equations[0].add(features, residual, counts, products=products)
            return sums
        sums = sums or Sums([NormalEquations.empty(*shape) for _ in range(2)])
        for part, chosen in zip(sums.equations, (~held_out, held_out), strict=True):
            chosen = chosen.to(counts.device)
            part.add(features[chosen], residual[chosen], counts[chosen])
        return sums

    def _equations(
        self, plan: MergePlan, step: Step, states: list[GroupStates], shard: Shard, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each token of a shard: features (tokens, n) of the fitted matrix, residual to the target (tokens, d), and
        weight (tokens,)."""
        index = plan.kept[step.position].index
        matrix = self._fitted(step)
        seen = observe(self.runner, states, index, weights)
        target = self._target(step.target + 1, shard)
        reached, aim = seen["leaving"], target
        if step.part == "attention" and not step.seam:
            # The state between attention and MLP has a target of its own where the layer is one of the unmerged model.
            original = TrunkCache(self.runner, step.target, self.cache).states(shard)
            reached = seen["middle"]
            aim = observe(self.runner, original, step.target, self.runner.weights(step.target))["middle"]
        features = seen[matrix]
        if _features_are_outputs(plan):
            features = (features.to(weights[f"{matrix}.weight"].dtype) @ weights[f"{matrix}.weight"].T).float()
        counts = token_weights(target) if _refit(plan).method in ("outputs", "units") else torch.ones(len(target))
        return features, aim.float() - reached.float(), counts.to(target.device)

    # -- units --------------------------------------------------------------------------------------------------

    def _candidates(self, plan: MergePlan, step: Step) -> list[tuple[int, dict[str, Tensor]]]:
        """For each layer that a seam stands for, its MLP as units, float32: gains in the rows of gate and up."""
        architecture, base = self.runner.checkpoint.architecture, self.runner.checkpoint
        found = []
        for source in sorted(plan.groups[plan.kept[step.position].index]):
            layer = layer_tensors(base, architecture, source)
            names = [f"{architecture.holder_of(part)}.weight" for part in _UNITS]
            found.append((source, {n: source_tensor(architecture, layer, n, norms="fold") for n in names}))
        return found

    def _squares(
        self, plan: MergePlan, step: Step, states: list[GroupStates], shard: Shard, weights: Mapping[str, Tensor]
    ) -> Tensor:
        """(layers, n) float64: the units' weighted sums of squares on the states that the seam's MLP reads."""
        index, rows = plan.kept[step.position].index, []
        down = self.runner.checkpoint.architecture.holder_of("down")
        packed, counts = self.runner.pack(states), token_weights(self._target(step.target + 1, shard)).double()
        for _, units in self._candidates(plan, step):
            own = {name: units[name].to(self.runner.device, self.runner.dtype) for name in units if down not in name}
            layer = {**weights, **own, **self._unit_gain(weights)}
            seen = observe(self.runner, self.runner.from_packed(shard, packed), index, layer)[down]
            rows.append((counts[:, None] * seen.double().square()).sum(0))
        return torch.stack(rows)

    def _chosen(self, plan: MergePlan, step: Step, own: Mapping[str, Tensor], squares: Tensor) -> dict[str, Tensor]:
        """The seam's MLP of the units that contribute most: root mean square times the length of their column."""
        candidates, architecture = self._candidates(plan, step), self.runner.checkpoint.architecture
        down = f"{architecture.holder_of('down')}.weight"
        columns = torch.stack([units[down].double().norm(dim=0) for _, units in candidates])
        n = columns.shape[1]
        best = (squares.cpu().sqrt() * columns).flatten().topk(n).indices.sort().values
        found = {}
        for name in (f"{architecture.holder_of(part)}.weight" for part in _UNITS):
            axis = 1 if name == down else 0
            every = torch.cat([units[name] for _, units in candidates], dim=axis)
            found[name] = every.index_select(axis, best).to(own[name].dtype)
        return found | {name: tensor.cpu() for name, tensor in self._unit_gain(own).items()} | _figures()

    def _unit_gain(self, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer's norm before the MLP, by relative name, with a gain of 1; nothing where it has none."""
        architecture = self.runner.checkpoint.architecture
        name = f"{architecture.norm_before_mlp}.weight"
        return {name: architecture.plain(name, layer[name])} if name in layer else {}


def _figures(
    tokens: int = 0, ridge: float = math.nan, error: float = math.nan, held_out_error: float = math.nan
) -> dict[str, Tensor]:
    """A fit's figures beside its tensors, as `Refitter.records` reads them."""
    figures = {"_tokens": tokens, "_ridge": ridge, "_error": error, "_held_out_error": held_out_error}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def token_weights(target: Tensor) -> Tensor:
    """(tokens,) float32: the inverse mean square of the target states (tokens, d); 0 for massive activations."""
    squares = target.float().square().mean(-1)
    usual = squares <= _MASSIVE * squares.median()
    return torch.where(usual & (squares > 0), 1.0 / squares.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def _held_out(shard: Shard, *, first: int, sequences: int) -> Tensor:
    """(tokens,) bool, in the order in which states are packed: the tokens that a ridge is chosen on.

    first: how many sequences other shards have before this one's, sequences: how many there are in all. Prefixes that
    sequences share are always fitted.
    """
    parts, number = [], first
    for group in shard.groups:
        parts.append(torch.zeros(len(group.prefix), dtype=torch.bool))
        for ids in group.sequences:
            if sequences >= _HELD_OUT:
                own = torch.full((len(ids),), number % _HELD_OUT == _HELD_OUT - 1)
            else:
                own = torch.arange(len(ids)) >= len(ids) - len(ids) // _HELD_OUT
            parts.append(own)
            number += 1
    return torch.cat(parts)


@torch.inference_mode()
def observe(
    runner: LayerRunner, states: list[GroupStates], index: int, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run a layer on the states, replacing them; what its matrices read, (tokens, n), packed order.

    index: the original layer whose module is used. Keys: the names of the matrices of o and down, for what they read;
    "middle", the state between attention and MLP; "leaving", the layer's output.
    """
    architecture = runner.checkpoint.architecture
    norm = architecture.norm_before_mlp  # which the state between attention and MLP enters
    assert norm is not None  # by `check_refittable`
    module, matrices = runner.modules[index], (architecture.holder_of("o"), architecture.holder_of("down"))
    points = {matrix: module.get_submodule(matrix) for matrix in matrices} | {"middle": module.get_submodule(norm)}
    found = runner.observed(states, index, weights, points) | {"leaving": states}
    return {name: joined(runner.pack(group)) for name, group in found.items()}
