"""What the coefficients of a tail merge are descended on: losses of answers and of text, with their gradient.

Only the merged layer depends on the coefficients. Its fused weights are the leaves of the backward pass, and the
gradient by coefficient j is then <W_j, dW>, one product with the stacked sources, however many pieces (questions,
windows of text) the loss was summed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raymerge.device import attempt, device_memory
from raymerge.errors import UserError
from raymerge.fusion import check_mergeable
from raymerge.identity import digest
from raymerge.memory import plan_gradient
from raymerge.plan import MergePlan, base_plan, tail_pairs
from raymerge.prompts import Group, Shard
from raymerge.scoring import TailScorer
from raymerge.sources import SourceLayers
from raymerge.trunk import TrunkCache
from raymerge.vocabulary import Vocabulary

_TEXT_POSITIONS = 512  # positions whose whole-vocabulary logits are computed at once


class GradientError(UserError):
    """A descent that cannot be made or that failed; the message names the value and the cure."""


@dataclass(frozen=True)
class LossWeights:
    """What is minimised: a weighted sum of means, each in nats.

    answer_nll: of the right letter among the four; answer_kl: KL from the unmerged model's distribution over the four
    letters to the merged model's; text_nll, text_kl: the same of the next token of plain text, over the whole
    vocabulary.
    """

    answer_nll: float = 1.0
    answer_kl: float = 0.0
    text_nll: float = 0.0
    text_kl: float = 0.0

    def __post_init__(self) -> None:
        values = astuple(self)
        if not all(math.isfinite(value) and value >= 0.0 for value in values) or not any(values):
            raise GradientError(f"the weights of a loss must be not negative and not all 0: {self}")

    @property
    def of_answers(self) -> bool:
        return self.answer_nll > 0.0 or self.answer_kl > 0.0

    @property
    def of_text(self) -> bool:
        return self.text_nll > 0.0 or self.text_kl > 0.0


class _LogSumExp(torch.autograd.Function):
    """logsumexp (n,) of the vocabulary's logits of (n, d) states; no (n, vocabulary) values are kept for backward."""

    @staticmethod
    def forward(ctx: Any, normalised: Tensor, vocabulary: Vocabulary) -> Tensor:
        found, mean = vocabulary.logsumexp_and_mean(normalised)
        ctx.save_for_backward(mean)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mean,) = ctx.saved_tensors
        return gradient[:, None] * mean, None


#: Windows of text, in order, each with those of its positions (n,) whose next token is scored.
Drawn = list[tuple[int, Tensor]]


class TextWindows:
    """Plain text as it enters the merged layer: states of windows, and what follows each position.

    A window's first token is not scored, as everywhere. reference: also keep what `text_kl` measures from, the
    unmerged model's mean unembedding row and entropy at each position: KL(p || q) = logsumexp(q's logits) -
    <q's state, sum_v p_v E_v> - H(p), so that no distribution over the vocabulary is kept.
    windows, positions: how many are drawn for a step; None for all. One step's cost grows with the windows' tokens and
    the positions' share of the vocabulary.
    """

    def __init__(
        self,
        trunk: TrunkCache,
        shards: Sequence[Shard],
        *,
        reference: bool = False,
        windows: int | None = None,
        positions: int | None = None,
    ):
        self.runner, self.first = trunk.runner, trunk.first
        self._vocabulary = self.runner.vocabulary
        self._drawn_windows, self._drawn_positions = windows, positions
        self._ids: list[np.ndarray] = []
        self._states: list[Tensor] = []
        self._reference: list[tuple[Tensor, Tensor]] = []
        if reference and self._vocabulary.logit_softcap is not None:
            raise GradientError(
                f"text_kl sums over the vocabulary by the mean unembedding row, but the logits of "
                f"{self.runner.checkpoint.architecture.name} are capped at {self._vocabulary.logit_softcap}: set "
                "gradient.text_kl to 0; text_nll works"
            )
        for shard in shards:
            if any(len(group.prefix) for group in shard.groups):
                raise ValueError("windows of plain text share no prefix")
            for group, (_, own) in zip(shard.groups, trunk.load(shard), strict=True):
                self._ids += group.sequences
                self._states += own.split([len(ids) for ids in group.sequences])
            if reference:
                self._reference += self._unmerged(trunk, shard)
        for name, value, most in (("windows", windows, len(self._ids)), ("positions", positions, None)):
            if value is not None and (value < 1 or (most is not None and value > most)):
                raise GradientError(
                    f"{value} {name} of text are to be drawn for a step: gradient.text_{name} must be null for all, or "
                    f"1 to {most or 'as many as there are'}"
                )
        self.has_reference = reference
        self.identity = digest([[shard.identity for shard in shards], windows, positions])

    @property
    def sampled(self) -> bool:
        return self._drawn_windows is not None or self._drawn_positions is not None

    @torch.no_grad()
    def _unmerged(self, trunk: TrunkCache, shard: Shard) -> list[tuple[Tensor, Tensor]]:
        """Of each window, at each position but the last, what the unmerged model predicts: mean unembedding row
        (positions, d) and entropy (positions,)."""
        layers = self.runner.plan_layers(base_plan(self.runner.checkpoint.n_layers), self.first)
        packed = self.runner.pack(self.runner.run(trunk.states(shard), layers))
        reference = []
        for group, (_, own) in zip(shard.groups, packed, strict=True):
            for states in own.split([len(ids) for ids in group.sequences]):
                means, entropies = [], []
                for part in states[:-1].split(_TEXT_POSITIONS):
                    hidden = self._vocabulary.normalise(part)
                    logsumexp, mean = self._vocabulary.logsumexp_and_mean(hidden)
                    means.append(mean)
                    entropies.append(logsumexp - (hidden * mean).sum(-1))
                reference.append((torch.cat(means), torch.cat(entropies)))
        return reference

    def draw(self, *seed: int) -> Drawn:
        """The text of one step: all of it, or a sample that follows from the seed."""
        rng = np.random.default_rng(seed)
        chosen = np.arange(len(self._ids))
        if self._drawn_windows is not None:
            chosen = np.sort(rng.choice(len(self._ids), self._drawn_windows, replace=False))
        counts = [len(self._ids[window]) - 1 for window in chosen]
        where = np.arange(sum(counts))
        if self._drawn_positions is not None and self._drawn_positions < len(where):
            where = np.sort(rng.choice(len(where), self._drawn_positions, replace=False))
        starts = np.cumsum([0, *counts])
        drawn = []
        for number, window in enumerate(chosen.tolist()):
            inside = where[(where >= starts[number]) & (where < starts[number + 1])] - starts[number]
            if len(inside):
                drawn.append((window, torch.from_numpy(inside)))
        return drawn

    def everything(self) -> Drawn:
        """All positions of all windows."""
        return [(window, torch.arange(len(ids) - 1)) for window, ids in enumerate(self._ids) if len(ids) > 1]

    def losses(self, layer: Mapping[str, Tensor], window: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Summed NLL and KL (0 without a reference) at some positions of one window, differentiable in the weights.

        layer: the merged layer's tensors by relative name.
        """
        ids = self._ids[window][: int(positions.max()) + 1]
        runner, vocabulary = self.runner, self._vocabulary
        group = Group("text", np.zeros(0, dtype=np.int64), (ids,), (0,))
        states = runner.from_packed(Shard((group,)), [(self._states[window][:0], self._states[window][: len(ids)])])
        weights = {name: tensor.to(runner.dtype) for name, tensor in layer.items()}
        (state,) = runner.run(states, [(self.first, lambda: weights)])
        out = state.batches[0].states[0][positions.to(runner.device)]
        targets = torch.from_numpy(self._ids[window])[positions + 1]
        nll = kl = out.new_zeros((), dtype=torch.float32)
        for start in range(0, len(positions), _TEXT_POSITIONS):
            part = slice(start, start + _TEXT_POSITIONS)
            hidden = vocabulary.normalise(out[part])
            # Without a gradient to prepare for it costs half as much.
            if hidden.requires_grad:
                logsumexp = _LogSumExp.apply(hidden, vocabulary)
            else:
                logsumexp, _ = vocabulary.logsumexp_and_top(hidden)
            logits = vocabulary.capped((hidden * vocabulary.unembedding_rows(targets[part])).sum(-1))
            nll = nll + (logsumexp - logits).sum()
            if self.has_reference:
                mean, entropy = (values[positions[part].to(values.device)] for values in self._reference[window])
                kl = kl + (logsumexp - (hidden * mean).sum(-1) - entropy).sum()
        return nll, kl


class Loss(NamedTuple):
    """Means in nats; `total` is their weighted sum. What was not computed is NaN."""

    total: float
    answer_nll: float
    answer_kl: float
    text_nll: float
    text_kl: float


class Evaluation(NamedTuple):
    """The loss, the loss of the held-out questions, and the gradient of the first by the coefficients, float64."""

    loss: Loss
    held_out: Loss | None
    gradient: Tensor | None


_Means = tuple[float, float]  # NLL and KL
_NOTHING: _Means = (math.nan, math.nan)  # of no questions, or no text


class TailLoss:
    """The loss of a template's merges as a differentiable function of the merged layer's coefficients.

    scorer: of all questions, with sources stacked as the template merges them; None where no questions are asked, with
    `sources` instead. reference: answer logits (n, 4) float32 of the unmerged model, needed for answer_kl.
    text: needed for the terms of text; with reference for text_kl.
    Raises GradientError where something that a term needs is missing, or the template cannot be descended on.
    """

    def __init__(
        self,
        scorer: TailScorer | None,
        template: MergePlan,
        weights: LossWeights | None = None,
        *,
        sources: SourceLayers | None = None,
        reference: Tensor | None = None,
        text: TextWindows | None = None,
    ):
        # Checked with all layers in use: where an alpha is 0 or 1, layers that cannot be averaged would go unnoticed.
        inside = template.with_alphas([0.5] * len(template.steps), name=template.name, kind="found")
        if scorer is not None:
            sources = scorer.sources
        assert sources is not None, "a scorer or sources"
        self.scorer, self.sources = scorer, sources
        self.runner = runner = sources.runner
        check_mergeable(runner.checkpoint, inside)
        weights = weights or LossWeights()
        tail = [(step.into, step.remove) for step in template.steps]
        if not tail or tail != tail_pairs(template.n_layers, len(tail)) or len(template.kept) != sources.first + 1:
            raise GradientError(
                f"plan {template.name!r} does not merge the layers from {sources.first} on one into the next: "
                "descend on a tail plan"
            )
        if (template.norms, template.alignment) != (sources.norms, sources.alignment):
            raise GradientError(
                f"the template has norms {template.norms} and alignment {template.alignment}, the stacked sources "
                f'{sources.norms} and {sources.alignment}; alignment "rows" has no gradient'
            )
        if weights.of_answers and scorer is None:
            raise GradientError("answer_nll and answer_kl need questions: give them, or set their weights to 0")
        if weights.answer_kl and reference is None:
            raise GradientError("answer_kl needs the unmerged model's logits")
        if weights.of_text and text is None:
            raise GradientError("text_nll and text_kl need a text: give one, or set their weights to 0")
        if weights.text_kl and text is not None and not text.has_reference:
            raise GradientError("text_kl needs windows of text with a reference")
        self.template, self.weights = template, weights
        #: None where the loss has no term of text.
        self.text = text if weights.of_text else None
        self.matrices = runner.checkpoint.architecture.matrices
        self._at_once: int | None = None  # questions differentiated together on an accelerator
        answers = np.zeros(0) if scorer is None else scorer.prompts.answers
        self._answers = torch.from_numpy(answers.astype(np.int64)).to(runner.device)
        self._reference: Tensor | None = None  # where answer_kl counts
        if weights.answer_kl and reference is not None:
            self._reference = F.log_softmax(reference.to(runner.device, torch.float32), -1)

    @property
    def n_questions(self) -> int:
        return len(self._answers)

    @property
    def identity(self) -> str:
        """16 hex digits over everything that the loss depends on."""
        return digest(
            [
                self.template.plan_id(self.runner.checkpoint.identity),
                self.runner.cache_key,
                "" if self.scorer is None else self.scorer.prompts.identity,
                list(astuple(self.weights)),
                "" if self.text is None else self.text.identity,
                *self.runner.aligner.data(self.template.alignment),
            ]
        )

    def __call__(
        self,
        coefficients: Tensor,
        *,
        rows: Sequence[int] | None = None,
        held_out: Sequence[int] = (),
        drawn: Drawn | None = None,
        gradient: bool = True,
    ) -> Evaluation:
        """The loss with unrounded weights, and its gradient by `coefficients`, (sources,) or (matrices, sources).

        rows: the questions it is over, all by default; if they are few, only their tokens and prefixes are run.
        held_out: questions whose loss is also computed, at little cost, but not differentiated. drawn: the text, all
        of it by default.
        """
        (mixed,) = self.sources.mix(coefficients.detach()[None], torch.float32)
        merge_biases = self.template.biases == "merge"
        layer = self.sources.weights(mixed, 0, merge_biases)
        leaves = {}
        if gradient:
            leaves = {name: layer[name].detach().requires_grad_() for name in self.sources.averaged(merge_biases)}
            layer |= leaves
        with torch.set_grad_enabled(gradient):
            answers, beside = self._of_questions(layer, rows, held_out, list(leaves.values()))
            text = self._of_text(layer, drawn)
        pulled = None
        if gradient:
            pulled = self.sources.pull_back({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
            pulled = pulled if coefficients.ndim == 2 else pulled.sum(0)
        return Evaluation(self._total(answers, text), self._total(beside, text) if held_out else None, pulled)

    def _of_questions(
        self,
        layer: Mapping[str, Tensor],
        rows: Sequence[int] | None,
        held_out: Sequence[int],
        leaves: Sequence[Tensor],
    ) -> tuple[_Means, _Means]:
        """`_of_answers` of the questions `rows`, and of those held out, the latter without a gradient."""
        scorer = self.scorer
        if scorer is None or not self.weights.of_answers:
            return _NOTHING, _NOTHING
        if self.runner.accelerated:
            answers = self._in_parts(scorer, layer, range(self.n_questions) if rows is None else rows, leaves)
            with torch.no_grad():
                return answers, self._in_parts(scorer, layer, held_out) if held_out else _NOTHING
        if rows is not None and not held_out and 2 * len(rows) <= self.n_questions:
            return self._of_chosen(scorer, layer, rows, leaves), _NOTHING
        # Where most questions are chosen, a copy of their tokens would cost more than it spares.
        logits = scorer.answer_logits(layer, 0)
        answers = self._of_answers(logits if rows is None else logits[list(rows)], rows, leaves)
        with torch.no_grad():
            return answers, self._of_answers(logits[list(held_out)], held_out) if held_out else _NOTHING

    def _in_parts(
        self, scorer: TailScorer, layer: Mapping[str, Tensor], rows: Sequence[int], leaves: Sequence[Tensor] = ()
    ) -> _Means:
        """`_of_answers` of so many questions at a time as the accelerator has room for."""
        if self._at_once is None:
            runner = self.runner
            free = device_memory(runner.device).free
            tokens = plan_gradient(runner.layer_size, compute=scorer.compute_dtype.itemsize, device_free=free)
            self._at_once = max(1, int(tokens / scorer.tokens_a_question))
        rows, sums, start = list(rows), [0.0, 0.0], 0
        while start < len(rows):
            part = rows[start : start + self._at_once]
            share = len(part) / len(rows)
            fits, found = attempt(partial(self._of_chosen, scorer, layer, part, leaves, share))
            if not fits:
                if len(part) == 1:
                    raise GradientError(
                        "differentiating the loss of a single question runs out of the device's memory: free some of "
                        "it, or take fewer merges"
                    )
                self._at_once = len(part) // 2
                continue
            sums = [total + share * value for total, value in zip(sums, found, strict=True)]
            start += len(part)
        return sums[0], sums[1]

    def _of_chosen(
        self,
        scorer: TailScorer,
        layer: Mapping[str, Tensor],
        rows: Sequence[int],
        leaves: Sequence[Tensor],
        share: float = 1.0,
    ) -> _Means:
        """`_of_answers` where only the questions' own tokens are run, with their prefixes."""
        return self._of_answers(scorer.select(rows).answer_logits(layer, 0), rows, leaves, share)

    def _of_answers(
        self,
        logits: Tensor,
        rows: Sequence[int] | None,
        leaves: Sequence[Tensor] = (),
        share: float = 1.0,
    ) -> _Means:
        """Means (NLL, KL) over the questions `rows`, None for all, of which these are the logits (rows, 4).

        The gradient of the weighted sum, times share, is added to the leaves' gradients: to those of all leaves or, if
        memory runs out, of none.
        """
        weights = self.weights
        asked = slice(None) if rows is None else list(rows)
        nll = F.cross_entropy(logits, self._answers[asked])
        kl, total = math.nan, weights.answer_nll * nll
        if self._reference is not None:
            log = F.log_softmax(logits, -1)
            divergence = F.kl_div(log, self._reference[asked], reduction="batchmean", log_target=True)
            kl, total = divergence.item(), total + weights.answer_kl * divergence
        if leaves:
            gradients = torch.autograd.grad(share * total, leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
        return nll.item(), kl

    def _of_text(self, layer: Mapping[str, Tensor], drawn: Drawn | None) -> _Means:
        """Means over positions, (NLL, KL), one window at a time, so that one window's graph is all that is held."""
        weights, text = self.weights, self.text
        if text is None:
            return _NOTHING
        drawn = text.everything() if drawn is None else drawn
        count = sum(len(positions) for _, positions in drawn)
        sums = [0.0, 0.0]
        for window, positions in drawn:
            nll, kl = text.losses(layer, window, positions)
            if torch.is_grad_enabled():
                ((weights.text_nll * nll + weights.text_kl * kl) / count).backward()
            sums[0] += nll.item()
            sums[1] += kl.item()
        return sums[0] / count, sums[1] / count if text.has_reference else math.nan

    def _total(self, answers: _Means, text: _Means) -> Loss:
        pairs = zip(astuple(self.weights), (*answers, *text), strict=True)
        return Loss(sum(weight * value for weight, value in pairs if weight), *answers, *text)
