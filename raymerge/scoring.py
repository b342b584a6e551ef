"""Scoring thousands of merges for little more than the price of one: plans in, answers to every question out.

All candidates of a search share the layers before the first merged one. Their states are computed once, kept on disk
by content, and for each candidate only what follows is run. After a tail merge that is one layer, of which only the
last position of each question matters (`tail_layer`), and the unembedding of the four answer letters. The result equals
a full forward pass of the merged model to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raymerge.device import attempt, device_memory, host_free, release_cached
from raymerge.fusion import check_mergeable
from raymerge.memory import (
    MOST_TOKENS,
    MemoryPlanError,
    ScoringPlan,
    ScoringWork,
    fits_host,
    no_room,
    pinned_bytes,
    plan_scoring,
)
from raymerge.plan import MergePlan
from raymerge.prompts import Prompts
from raymerge.sources import SourceLayers
from raymerge.tail_layer import TailLayer
from raymerge.tail_states import Layout, TailStates
from raymerge.trunk import TrunkCache

_MIXED_TOGETHER = 4  # candidates whose weights are mixed in one pass on a CPU and held at once (60 MB each at 0.5B)
_BUCKET_TOKENS = 16384  # padded tokens of the questions whose own attention a CPU computes in one call


class _Alike(NamedTuple):
    """What candidates that are scored at once have in common: they differ in their coefficients alone."""

    axes: int  # of a candidate's coefficients, (sources,) or (matrices, sources); 0: fused by itself (`is_stacked`)
    survivor: int  # the source layer that gives norms, attention window and, unless they are merged, biases
    merge_biases: bool


class TailScorer:
    """Answer logits of models whose layers from `first` on are collapsed into one.

    What entered the merged layer is held in memory for every token (`tail_states`).

    fused_dtype: the dtype to which merged matrices are rounded before scoring. By default the checkpoint's stored
    dtype, so that what is scored is exactly what would be saved; torch.float32 leaves them unrounded.
    sources: the stacked weights, where several scorers share them; plans with their norms and alignment are scored
    fastest (`is_stacked`), and all others are fused one by one.
    compute_dtype: of the states and of what is multiplied with the merged matrices; float32 on a CPU, on an accelerator
    the runner's. Attention, the residual stream, the final norm and the logits are float32 in any case: letters tie in
    bfloat16.
    plan: where the states lie and how much is done at once; on an accelerator chosen by its free memory. Whatever runs
    out of memory there is done again with the plan's next smaller one.
    """

    def __init__(
        self,
        trunk: TrunkCache,
        prompts: Prompts,
        *,
        fused_dtype: torch.dtype | None = None,
        sources: SourceLayers | None = None,
        compute_dtype: torch.dtype | None = None,
        plan: ScoringPlan | None = None,
    ):
        self.runner = trunk.runner
        self.first = trunk.first
        self.prompts = prompts
        self.fused_dtype = fused_dtype or self.runner.checkpoint.dtype
        self.compute_dtype = compute_dtype or (self.runner.dtype if self.runner.accelerated else torch.float32)
        self.sources = sources or SourceLayers(self.runner, self.first)
        self._architecture = self.runner.checkpoint.architecture
        if self.runner.accelerated:  # there buckets are cut up into chunks, which are smaller where memory is short
            bucket_tokens = MOST_TOKENS
        else:
            bucket_tokens = _BUCKET_TOKENS if plan is None else plan.chunk_tokens
        layout = Layout.of(prompts, bucket_tokens=bucket_tokens, device=self.runner.device)
        plan = plan or self._planned(layout)

        def laid_out(plan: ScoringPlan) -> TailLayer:
            on_host = plan.states == "host"
            states = TailStates(trunk, prompts, layout, dtype=self.compute_dtype, on_host=on_host)
            return TailLayer(self.runner, self.first, states, plan)

        fits, self.layer = attempt(lambda: laid_out(plan))
        if not fits:  # less than the plan counted on: others may have taken memory since
            size, work, room = self.runner.layer_size, self._work(layout), host_free()
            if fits_host(size, work, room):
                fits, self.layer = attempt(lambda: laid_out(replace(plan, states="host", keys="recompute")))
            if not fits:
                raise no_room(size, work, device_free=device_memory(self.runner.device).free, host_free=room)
        self._letters = self.runner.vocabulary.unembedding_rows(list(prompts.letters))

    @property
    def plan(self) -> ScoringPlan:
        """Where the states lie and how much is done at once, as it is now."""
        return self.layer.plan

    def _work(self, layout: Layout) -> ScoringWork:
        return ScoringWork(
            tokens=layout.tokens,
            questions=len(layout.rows),
            sources=self.sources.count,
            stack=self.sources.stack_dtype.itemsize,
            compute=self.compute_dtype.itemsize,
        )

    def _planned(self, layout: Layout) -> ScoringPlan:
        """The plan for these questions, in what is free; layers that the runner keeps make room if that helps."""
        if not self.runner.accelerated:
            return ScoringPlan("device", "recompute", 1, _BUCKET_TOKENS)
        work = self._work(layout)
        options = {"linear": self._is_linear, "batched": self._is_batched}
        planned = partial(plan_scoring, self.runner.layer_size, work, host_free=host_free(), **options)
        free, kept = device_memory(self.runner.device).free, self.runner.kept_bytes
        if "stack" in vars(self.sources):  # another scorer made it: it is no longer among the free bytes
            free += self.sources.stack.nbytes
        with_room = planned(device_free=free + kept)
        try:
            if planned(device_free=free) == with_room:
                return with_room
        except MemoryPlanError:
            pass
        self.runner.release()
        release_cached()
        return with_room

    @property
    def tokens_a_question(self) -> float:
        """Cached tokens, those of prefixes and padding included, for each question."""
        return self.layer.states.layout.tokens / self.n_questions

    @property
    def n_questions(self) -> int:
        return len(self.layer.states.layout.rows)

    def select(self, rows: Sequence[int]) -> TailScorer:
        """A scorer of these questions alone, which it answers in the order given; no row may occur twice.

        Their states are copied out of this one's, with the prefixes that they need: for a few questions it costs a few
        megabytes and no forward pass. Everything else is shared; `prompts` stays that of all questions.
        """
        part = copy.copy(self)
        part.layer = self.layer.select(rows)
        return part

    def accepts(self, plan: MergePlan) -> bool:
        """Whether the plan leaves the trunk as it is and collapses all that follows into one layer."""
        return (
            plan.n_layers == self.runner.checkpoint.n_layers
            and len(plan.kept) == self.first + 1
            and plan.first_changed >= self.first
        )

    def coefficients(self, plan: MergePlan) -> Tensor:
        """The merged layer's coefficients as (sources,) float64; column j belongs to original layer first + j.

        Where the plan gives matrices coefficients of their own it is (matrices, sources).
        """
        kept = plan.kept[self.first]
        matrices = self.runner.checkpoint.architecture.matrices
        values = np.zeros((len(matrices), self.sources.count))
        for row, matrix in zip(values, matrices, strict=True):
            for source, weight in kept.coefficients_of(matrix):
                row[source - self.first] = weight
        return torch.from_numpy(values if kept.matrices else values[0])

    @torch.inference_mode()
    def score(self, plan: MergePlan) -> tuple[Tensor, Tensor, Tensor]:
        """What the merged model answers, in question order.

        Answer logits (n, 4) float32, and over the whole vocabulary logsumexp (n,) and the most probable token (n,).
        """
        (hidden,) = self._hidden_of([plan])
        found = (self._answers(hidden), *self.runner.vocabulary.logsumexp_and_top(hidden))
        logits, logsumexp, top = (self._unsort(values).cpu() for values in found)
        return logits, logsumexp, top

    @torch.inference_mode()
    def score_many(self, plans: Sequence[MergePlan]) -> Iterator[Tensor]:
        """Answer logits (n, 4) float32 of each plan in turn, in question order."""
        for hidden in self._hidden_of(plans):
            yield self._unsort(self._answers(hidden)).cpu()

    def _hidden_of(self, plans: Sequence[MergePlan]) -> Iterator[Tensor]:
        for plan in plans:
            check_mergeable(self.runner.checkpoint, plan)
            if not self.accepts(plan):
                raise ValueError(f"plan {plan.name!r} does not collapse the layers from {self.first} on into one")

        def hidden_at_once(together: Sequence[MergePlan]) -> list[Tensor]:
            return list(self._hidden_together(together))

        start = 0
        while start < len(plans):
            if not self.runner.accelerated:
                together = plans[start : start + max(_MIXED_TOGETHER, self.plan.candidates)]
                yield from self._hidden_together(together)
            else:
                together = plans[start : start + self.plan.candidates]
                fits, found = attempt(partial(hidden_at_once, together))
                if not fits:
                    self._shrink()
                    continue
                yield from found
            start += len(together)

    def _shrink(self) -> None:
        """Go on with the next smaller plan, after the device ran out of memory."""
        size, work, room = self.runner.layer_size, self._work(self.layer.states.layout), host_free()
        smaller = self.plan.smaller(host=fits_host(size, work, room))
        if smaller is not None and smaller.states != self.plan.states:
            # Page-locked memory can be bounded below what is free.
            moved, _ = attempt(self.layer.states.to_host)
            smaller = smaller if moved else self.plan.smaller(host=False)
        if smaller is None:
            where = "host memory"
            if self.plan.states == "device":
                where = (
                    f"its own, since the host has no room for their {pinned_bytes(size, work)} bytes ({room} are free)"
                )
            raise MemoryPlanError(
                f"scoring one candidate on {self.n_questions} questions runs out of the memory of "
                f"{self.runner.device}, {self.plan.chunk_tokens} tokens at a time and with the states in {where}: "
                "take fewer questions (data.limit_per_subject) or fewer merges"
            )
        if smaller.keys == "recompute":
            self.layer.drop_keys()
        self.layer.plan = smaller
        release_cached()

    def _hidden_together(self, plans: Sequence[MergePlan]) -> Iterator[Tensor]:
        """`TailLayer.hidden` of each plan in turn: weights mixed in one pass, then `plan.candidates` scored at once."""
        if self.plan.keys == "linear" and not self.layer.holds_keys:
            sources = [self.sources.weights(own, 0, False) for own in self.sources.stack]
            if not attempt(lambda: self.layer.hold_keys(sources))[0]:
                self.layer.plan = replace(self.plan, keys="recompute")
        batches = self._batches(plans)
        pieces = {}
        # Plans with coefficients for each matrix are mixed apart, so that the products for the others stay the same.
        for axes in {alike.axes for alike, _ in batches} - {0}:
            own = [batch for alike, batch in batches if alike.axes == axes]
            coefficients = torch.stack([self.coefficients(plan) for batch in own for plan in batch])
            mixed = self.sources.mix(coefficients, self.fused_dtype, self.compute_dtype)
            sizes = [len(batch) for batch in own]
            pieces[axes] = zip(mixed.split(sizes), coefficients.split(sizes), strict=True)
        for alike, batch in batches:
            if alike.axes == 0:
                (plan,) = batch
                yield self.layer.hidden(self.runner.deployed(self._fused(plan)), alike.survivor)
                continue
            mixed, coefficients = next(pieces[alike.axes])
            of_keys = self._key_coefficients(coefficients, alike.survivor)
            if len(batch) == 1:
                weights = self.sources.weights(mixed[0], alike.survivor, alike.merge_biases)
                yield self.layer.hidden(
                    self.runner.deployed(weights), alike.survivor, None if of_keys is None else of_keys[0]
                )
            else:
                yield from self._hidden_of_several(mixed, alike.survivor, alike.merge_biases, of_keys)

    def _batches(self, plans: Sequence[MergePlan]) -> list[tuple[_Alike, list[MergePlan]]]:
        """Plans in their order, cut into those that are scored at once, with what these have in common."""
        most, batches = self.plan.candidates if self._is_batched else 1, []
        for alike, group in groupby(plans, self._alike):
            own = list(group)
            size = most if alike.axes else 1
            batches += [(alike, own[start : start + size]) for start in range(0, len(own), size)]
        return batches

    def _alike(self, plan: MergePlan) -> _Alike:
        kept = plan.kept[self.first]
        axes = 0 if not self.is_stacked(plan) else 2 if kept.matrices else 1
        return _Alike(axes, kept.index - self.first, plan.biases == "merge")

    def _hidden_of_several(self, mixed: Tensor, survivor: int, merge_biases: bool, of_keys: Tensor | None) -> Tensor:
        """`TailLayer.hidden`, (candidates, n, d), of several candidates with mixed weights (candidates, parameters).

        The states, and the weights that are not averaged, are read once for all of them.
        """
        weights = self.sources.weights(mixed, survivor, merge_biases)
        averaged = {name: weights.pop(name) for name in self.sources.averaged(merge_biases)}
        dimensions = (0, None if of_keys is None else 0)
        hidden = torch.func.vmap(lambda own, of_keys: self.layer.hidden(weights | own, survivor, of_keys), dimensions)
        return hidden(averaged, of_keys)

    @property
    def _is_batched(self) -> bool:
        """Whether several candidates can be scored at once: not quantised ones, since quantising takes one matrix at a
        time, nor experts, since each candidate routes tokens its own way."""
        return self.runner.quantise == "none" and not self._architecture.experts

    def is_stacked(self, plan: MergePlan) -> bool:
        """Whether the plan's merged layer is a weighted sum of the stacked sources; else it is fused by itself.

        A layer that nothing is averaged into is saved as it is, whatever the plan's norms and alignment, and rounding
        folded gains would not give it back exactly.
        """
        if plan.kept[self.first].unchanged:
            return self.sources.norms == "keep" and self.sources.alignment == "none"
        return (plan.norms, plan.alignment) == (self.sources.norms, self.sources.alignment)

    def _fused(self, plan: MergePlan) -> dict[str, Tensor]:
        """The merged layer of a plan as `fusion` gives it, float32."""
        layer = self.runner.fused(plan, self.first, dtype=self.fused_dtype)
        return {name: tensor.to(self.runner.device, torch.float32) for name, tensor in layer.items()}

    def logits(self, coefficients: Tensor, *, survivor: int = 0, merge_biases: bool = False) -> Tensor:
        """Answer logits (n, 4) in question order, differentiable in `coefficients`, (sources,) or (matrices, sources).

        survivor: which source layer gives norms, attention window and, unless they are merged, biases.
        """
        (mixed,) = self.sources.mix(coefficients[None], self.fused_dtype)
        return self.answer_logits(self.sources.weights(mixed, survivor, merge_biases), survivor)

    def answer_logits(self, weights: Mapping[str, Tensor], survivor: int) -> Tensor:
        """Answer logits (n, 4) in question order of a merged layer, differentiable in its weights."""
        return self._unsort(self._answers(self.layer.hidden(weights, survivor)))

    def _answers(self, hidden: Tensor) -> Tensor:
        return self.runner.vocabulary.capped(hidden @ self._letters.T)

    def _unsort(self, values: Tensor) -> Tensor:
        return values[self.layer.states.layout.question_order]

    @property
    def _is_linear(self) -> bool:
        """Whether a candidate's keys may be computed as sums of the sources' keys.

        Keys must be linear in the averaged matrix: no key norm, and no bias (which may be kept or merged). Sums leave
        out the rounding of the merged matrix, so that must be below the compute dtype's own or not asked for.
        """
        arch = self._architecture
        names = self.runner.checkpoint.layer_tensors(self.first)
        between = [f"{norm}.weight" for norm in (arch.head_norm_of("k"), arch.projection_norm_of("k")) if norm]
        between.append(f"{arch.holder_of('k')}.bias")
        narrow = self.compute_dtype != torch.float32 or self.fused_dtype == torch.float32
        return narrow and self._is_batched and not set(between) & set(names)

    def _key_coefficients(self, coefficients: Tensor, survivor: int) -> Tensor | None:
        """The coefficients of keys, (candidates, sources), out of (candidates, sources) or (candidates, matrices,
        sources). None where keys are to be projected from the states: the plan says so, or the keys held do not serve,
        since layer first + survivor has another norm gain or rotary embedding than the first source."""
        kinds = self.runner.checkpoint.rotary_types
        unlike = survivor and (self.sources.norms == "keep" or kinds[self.first + survivor] != kinds[self.first])
        if self.plan.keys != "linear" or unlike:
            return None
        coefficients = coefficients.to(self.runner.device, torch.float32)
        if coefficients.ndim == 2:
            return coefficients
        return coefficients[:, list(self._architecture.matrices).index(self._architecture.holder_of("k"))]
