"""Coefficients of a tail merge by gradient descent through the frozen trunk.

Only the merged layer depends on the coefficients. Its fused weights are the leaves of the backward pass, and the
gradient by coefficient j is then <W_j, dW>, one product with the stacked sources, however many pieces (questions,
windows of text) the loss was summed over. The published way (Liu et al.: alphas alone, Adam at 1e-3, batches of 4
questions, 500 epochs) differentiates through the whole fused model instead and comes to the same gradient.

While descending, weights are float32 and unrounded, so that the loss is smooth; what is reported of the result is
computed from weights rounded to the stored dtype, as they would be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raymerge.config import Config
from raymerge.errors import UserError
from raymerge.evaluation import Answers, answer_shard
from raymerge.forward import LayerRunner
from raymerge.fusion import check_mergeable
from raymerge.identity import digest
from raymerge.objectives import parse_objective
from raymerge.plan import MergePlan, base_plan, coefficients_to_alphas, tail_pairs
from raymerge.prompts import Group, Prompts, Shard
from raymerge.scoring import SourceLayers, TailScorer, TrunkCache

PARAMETRISATIONS = ("alphas", "simplex", "per_matrix")
OPTIMIZERS = ("adam", "sgd")

_TEXT_POSITIONS = 512  # positions whose whole-vocabulary logits are computed at once
_SMALLEST = 1e-4  # a coefficient or a share of the bounds' width from which a start can move away
_EVALUATION = 2**31  # stands for a step's number in the seed of the text sample that losses are compared on


class GradientError(UserError):
    """A descent that cannot be made or that failed; the message names the value and the cure."""


# -- the loss --------------------------------------------------------------------------------------------------------


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
        values = [self.answer_nll, self.answer_kl, self.text_nll, self.text_kl]
        if not all(math.isfinite(value) and value >= 0.0 for value in values) or not any(values):
            raise GradientError(f"the weights of a loss are not negative and not all 0: {self}")

    @property
    def of_answers(self) -> bool:
        return self.answer_nll > 0.0 or self.answer_kl > 0.0

    @property
    def of_text(self) -> bool:
        return self.text_nll > 0.0 or self.text_kl > 0.0


def unmerged_logits(runner: LayerRunner, prompts: Prompts, trunk: TrunkCache | None = None) -> Tensor:
    """Answer logits (n, 4) float32 of the unmerged model, in question order: what `answer_kl` measures from."""
    plan = base_plan(runner.checkpoint.n_layers)
    parts = [answer_shard(runner, plan, prompts, shard, trunk=trunk) for shard in prompts.shards]
    return torch.from_numpy(Answers.join(parts).logits)


class _LogSumExp(torch.autograd.Function):
    """logsumexp (n,) of the vocabulary's logits of (n, d) states; no (n, vocabulary) values are kept for backward."""

    @staticmethod
    def forward(ctx, normalised: Tensor, runner: LayerRunner) -> Tensor:
        found, mean = runner.vocabulary_mean(normalised)
        ctx.save_for_backward(mean)
        return found

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
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
        self._drawn_windows, self._drawn_positions = windows, positions
        self._ids: list[np.ndarray] = []
        self._states: list[Tensor] = []
        self._reference: list[tuple[Tensor, Tensor]] = []
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
                raise GradientError(f"{value} {name} of text are to be drawn: it must be 1 to {most or 'all'}")
        self.has_reference = reference
        self.identity = digest([[shard.identity for shard in shards], windows, positions])

    @property
    def sampled(self) -> bool:
        return self._drawn_windows is not None or self._drawn_positions is not None

    @torch.no_grad()
    def _unmerged(self, trunk: TrunkCache, shard: Shard) -> list[tuple[Tensor, Tensor]]:
        layers = self.runner.plan_layers(base_plan(self.runner.checkpoint.n_layers), self.first)
        packed = self.runner.pack(self.runner.run(trunk.states(shard), layers))
        reference = []
        for group, (_, own) in zip(shard.groups, packed, strict=True):
            for states in own.split([len(ids) for ids in group.sequences]):
                means, entropies = [], []
                for part in states[:-1].split(_TEXT_POSITIONS):
                    hidden = self.runner.normalise(part)
                    logsumexp, mean = self.runner.vocabulary_mean(hidden)
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
        ids, runner = self._ids[window][: int(positions.max()) + 1], self.runner
        group = Group("text", np.zeros(0, dtype=np.int64), (ids,), (0,))
        states = runner.from_packed(Shard((group,)), [(self._states[window][:0], self._states[window][: len(ids)])])
        weights = {name: tensor.to(runner.dtype) for name, tensor in layer.items()}
        (state,) = runner.run(states, [(self.first, lambda: weights)])
        out = state.batches[0][2][0][positions.to(runner.device)]
        targets = torch.from_numpy(self._ids[window])[positions + 1]
        nll = kl = out.new_zeros((), dtype=torch.float32)
        for start in range(0, len(positions), _TEXT_POSITIONS):
            part = slice(start, start + _TEXT_POSITIONS)
            hidden = runner.normalise(out[part])
            # Without a gradient to prepare for it costs half as much.
            differentiable = hidden.requires_grad
            logsumexp = _LogSumExp.apply(hidden, runner) if differentiable else runner.vocabulary(hidden)[0]
            nll = nll + (logsumexp - (hidden * runner.unembedding_rows(targets[part])).sum(-1)).sum()
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
    """A loss, that of held-out questions beside it, and the first one's gradient by coefficients, float64."""

    loss: Loss
    held_out: Loss | None
    gradient: Tensor | None


class TailLoss:
    """The loss of a template's merges as a differentiable function of the merged layer's coefficients.

    scorer: of all questions, with sources stacked as the template merges them. reference: `unmerged_logits` of its
    prompts, needed for answer_kl. text: needed for the terms of text; with reference for text_kl.
    Raises GradientError where something that a term needs is missing, or the template cannot be descended on.
    """

    def __init__(
        self,
        scorer: TailScorer,
        template: MergePlan,
        weights: LossWeights | None = None,
        *,
        reference: Tensor | None = None,
        text: TextWindows | None = None,
    ):
        # With all layers in use: at a corner, layers that cannot be averaged go unnoticed.
        inside = template.with_alphas([0.5] * len(template.steps), name=template.name, kind="found")
        check_mergeable(scorer.runner.checkpoint, inside)
        weights = weights or LossWeights()
        tail = [(step.into, step.remove) for step in template.steps]
        if not tail or tail != tail_pairs(template.n_layers, len(tail)) or len(template.kept) != scorer.first + 1:
            raise GradientError(
                f"plan {template.name!r} does not merge the layers from {scorer.first} on one into the next: descend "
                "on a tail plan"
            )
        if (template.norms, template.alignment) != (scorer.sources.norms, scorer.sources.alignment):
            raise GradientError(
                f"the template has norms {template.norms} and alignment {template.alignment}, the stacked sources "
                f'{scorer.sources.norms} and {scorer.sources.alignment}; alignment "rows" has no gradient'
            )
        if weights.answer_kl and reference is None:
            raise GradientError("answer_kl needs the unmerged model's logits")
        if weights.of_text and text is None:
            raise GradientError("text_nll and text_kl need a text: give one, or set their weights to 0")
        if weights.text_kl and not text.has_reference:
            raise GradientError("text_kl needs windows of text with a reference")
        self.scorer, self.template, self.weights, self.text = scorer, template, weights, text
        self.sources: SourceLayers = scorer.sources
        self.matrices = scorer.runner.checkpoint.architecture.matrices
        device = scorer.runner.device
        self._answers = torch.from_numpy(scorer.prompts.answers.astype(np.int64)).to(device)
        self._reference = None if reference is None else F.log_softmax(reference.to(device, torch.float32), -1)

    @property
    def n_questions(self) -> int:
        return len(self._answers)

    @property
    def identity(self) -> str:
        """16 hex digits over everything that the loss depends on."""
        checkpoint = self.scorer.runner.checkpoint
        weights = self.weights
        return digest(
            [
                self.template.plan_id(checkpoint.identity),
                self.scorer.prompts.identity,
                [weights.answer_nll, weights.answer_kl, weights.text_nll, weights.text_kl],
                self.text.identity if weights.of_text else "",
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

        rows: the questions it is over, all by default; of few ones only their tokens are run, with their prefixes.
        held_out: questions whose loss is computed beside, for little, but not differentiated. drawn: the text, all of
        it by default.
        """
        (mixed,) = self.sources.mix(coefficients.detach()[None], torch.float32)
        merge_biases = self.template.biases == "merge"
        layer = self.sources.weights(mixed, 0, merge_biases)
        leaves = {}
        if gradient:
            leaves = {name: layer[name].detach().requires_grad_() for name in self.sources.averaged(merge_biases)}
            layer |= leaves
        with torch.set_grad_enabled(gradient):
            answers = beside = (math.nan, math.nan)
            if self.weights.of_answers:
                if rows is not None and not held_out and 2 * len(rows) <= self.n_questions:
                    answers = self._of_answers(self.scorer.select(rows).answer_logits(layer, 0), rows, chosen=True)
                else:  # a copy of most tokens would cost more than it spares
                    logits = self.scorer.answer_logits(layer, 0)
                    answers = self._of_answers(logits, rows)
                    beside = self._held_out(logits, held_out)
            text = self._of_text(layer, drawn)
        pulled = None
        if gradient:
            pulled = self.sources.pull_back({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
            pulled = pulled if coefficients.ndim == 2 else pulled.sum(0)
        return Evaluation(self._total(answers, text), self._total(beside, text) if held_out else None, pulled)

    @torch.no_grad()
    def of_plan(
        self, plan: MergePlan, *, rows: Sequence[int] | None = None, held_out: Sequence[int] = ()
    ) -> Evaluation:
        """The loss of a merge as it would be saved, rounded to the stored dtype, with the whole text; no gradient."""
        (logits,) = self.scorer.score_many([plan])
        logits = logits.to(self._answers.device)
        text = (math.nan, math.nan)
        if self.weights.of_text:
            ((_, load),) = self.scorer.runner.plan_layers(plan, self.scorer.first)
            text = self._of_text(load(), None)
        beside = self._total(self._held_out(logits, held_out), text) if held_out else None
        return Evaluation(self._total(self._of_answers(logits, rows), text), beside, None)

    def _held_out(self, logits: Tensor, rows: Sequence[int]) -> tuple[float, float]:
        with torch.no_grad():
            return self._of_answers(logits.detach(), rows) if rows else (math.nan, math.nan)

    def _of_answers(self, logits: Tensor, rows: Sequence[int] | None, *, chosen: bool = False) -> tuple[float, float]:
        """Means (NLL, KL) over the questions `rows` of all logits, or, where they are chosen already, of just these.

        Where gradients are on, that of the weighted sum goes to the leaves.
        """
        weights = self.weights
        rows = slice(None) if rows is None else list(rows)
        logits = logits if chosen else logits[rows]
        nll = F.cross_entropy(logits, self._answers[rows])
        kl, total = math.nan, weights.answer_nll * nll
        if weights.answer_kl:
            log = F.log_softmax(logits, -1)
            divergence = F.kl_div(log, self._reference[rows], reduction="batchmean", log_target=True)
            kl, total = divergence.item(), total + weights.answer_kl * divergence
        if torch.is_grad_enabled():
            total.backward()
        return nll.item(), kl

    def _of_text(self, layer: Mapping[str, Tensor], drawn: Drawn | None) -> tuple[float, float]:
        """Means over positions, (NLL, KL), one window at a time, so that one window's graph is all that is held."""
        weights = self.weights
        if not weights.of_text:
            return math.nan, math.nan
        drawn = self.text.everything() if drawn is None else drawn
        count = sum(len(positions) for _, positions in drawn)
        sums = [0.0, 0.0]
        for window, positions in drawn:
            nll, kl = self.text.losses(layer, window, positions)
            if torch.is_grad_enabled():
                ((weights.text_nll * nll + weights.text_kl * kl) / count).backward()
            sums[0] += nll.item()
            sums[1] += kl.item()
        return sums[0] / count, sums[1] / count if self.text.has_reference else math.nan

    def _total(self, answers: tuple[float, float], text: tuple[float, float]) -> Loss:
        weights = self.weights
        pairs = zip(
            (weights.answer_nll, weights.answer_kl, weights.text_nll, weights.text_kl), (*answers, *text), strict=True
        )
        return Loss(sum(weight * value for weight, value in pairs if weight), *answers, *text)


# -- what is descended on --------------------------------------------------------------------------------------------


class Parametrisation:
    """How free parameters become the coefficients of a tail template, and a plan again.

    "alphas": one for each step, bounds (low, high) kept by a logistic function. "simplex": the effective coefficients,
    by a softmax. "per_matrix": a softmax for each of `matrices`. Parameters are (size,) float64.
    With norms="fold" and biases="merge" in the template the corners of the simplex are the models that keep the first
    or the last of the merged layers whole (but for norms of single heads).
    """

    def __init__(
        self, kind: str, template: MergePlan, matrices: Sequence[str], *, bounds: tuple[float, float] = (0.0, 1.0)
    ):
        if kind not in PARAMETRISATIONS:
            raise GradientError(f"parametrisation {kind!r} is not one of {', '.join(PARAMETRISATIONS)}")
        low, high = bounds
        if not 0.0 <= low < high <= 1.0:
            raise GradientError(f"bounds of alpha are {low} and {high}: they must rise and lie in [0, 1]")
        self.kind, self.template, self.matrices, self.bounds = kind, template, tuple(matrices), (low, high)

    def start(self) -> Tensor:
        """The parameters (size,) of the template's own coefficients.

        Where an alpha lies outside or at the edge of the bounds, or a coefficient is nearly 0, the start is a little
        inside: at the edge itself the gradient is 0.
        """
        low, high = self.bounds
        if self.kind == "alphas":
            share = (torch.tensor(self.template.alphas, dtype=torch.float64) - low) / (high - low)
            return torch.logit(share.clamp(_SMALLEST, 1.0 - _SMALLEST))
        own = dict(self.template.matrix_alphas)
        names = self.matrices if self.kind == "per_matrix" else (None,)
        alphas = torch.tensor([own.get(name, self.template.alphas) for name in names], dtype=torch.float64)
        return _tail_coefficients(alphas).clamp_min(_SMALLEST).log().flatten()

    def alphas(self, parameters: Tensor) -> Tensor:
        """(K,) of the parametrisation "alphas", step by step."""
        low, high = self.bounds
        return low + (high - low) * torch.sigmoid(parameters)

    def coefficients(self, parameters: Tensor) -> Tensor:
        """(K + 1,) or, per matrix, (matrices, K + 1), differentiable."""
        if self.kind == "alphas":
            return _tail_coefficients(self.alphas(parameters))
        if self.kind == "simplex":
            return torch.softmax(parameters, -1)
        return torch.softmax(parameters.unflatten(0, (len(self.matrices), -1)), -1)

    def plan(self, parameters: Tensor, *, name: str = "gradient") -> MergePlan:
        """The template's merges with these coefficients; the steps' own alphas of "per_matrix" are of their mean."""
        with torch.no_grad():
            if self.kind == "alphas":
                return self.template.with_alphas(self.alphas(parameters).tolist(), name=name, kind="found")
            return self.plan_of(self.coefficients(parameters).numpy(), name=name)

    def plan_of(self, coefficients: np.ndarray, *, name: str = "gradient") -> MergePlan:
        """The plan of effective coefficients (K + 1,) or (matrices, K + 1)."""
        alphas = coefficients_to_alphas(coefficients)
        if alphas.ndim == 1:
            return self.template.with_alphas(alphas.tolist(), name=name, kind="found")
        common = coefficients_to_alphas(coefficients.mean(0)).tolist()
        own = dict(zip(self.matrices, alphas.tolist(), strict=True))
        return self.template.with_alphas(common, name=name, kind="found", matrix_alphas=own)


def _tail_coefficients(alphas: Tensor) -> Tensor:
    """`plan.tail_coefficients`, differentiable: (..., K) to (..., K + 1)."""
    reverse = alphas.flip(-1)
    ones = torch.ones_like(reverse[..., :1])
    return torch.cat([reverse, ones], -1) * torch.cat([ones, torch.cumprod(1.0 - reverse, -1)], -1)


# -- descending ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to descend. The published way: adam, 1e-3, batches of 4 questions, 500 epochs, nothing held out.

    batch_size: questions of a step, None for all. held_out: share of the questions, drawn by the seed, that no step
    sees and that the best point is chosen by. patience: stop after so many epochs without a lower loss (of the
    held-out questions, or without any of the others). seed: of that draw, the batches and the text drawn for a step.
    """

    parametrisation: str = "alphas"
    bounds: tuple[float, float] = (0.0, 1.0)
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    epochs: int = 500
    batch_size: int | None = None
    held_out: float = 0.0
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, limit in (
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("learning_rate", math.isfinite(self.learning_rate) and self.learning_rate > 0.0, "greater than 0"),
            ("epochs", self.epochs >= 0, "0 or more"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "1 or more, or none for all questions"),
            ("held_out", 0.0 <= self.held_out < 1.0, "at least 0 and less than 1"),
            ("patience", self.patience is None or self.patience >= 1, "1 or more, or none"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise GradientError(f"{name} is {getattr(self, name)!r}, but it must be {limit}")


def descent_settings(config: Config, parametrisation: str) -> Settings:
    """The settings of the gradient section."""
    own = config.gradient
    return Settings(
        parametrisation=parametrisation,
        bounds=config.search.bounds,
        optimizer=own.optimizer,
        learning_rate=own.learning_rate,
        epochs=own.epochs,
        batch_size=own.batch_size,
        held_out=own.held_out,
        patience=own.patience,
        seed=config.search.seed,
    )


def loss_weights(config: Config) -> LossWeights:
    """What is descended on: the terms of search.objective, or for accuracies, which have no gradient, answer_nll."""
    objective = parse_objective(config.search.objective)
    terms = {term.measure: term.weight for term in objective.terms} if objective.minimised else {"answer_nll": 1.0}
    return LossWeights(**{"answer_nll": 0.0, **terms, "text_kl": config.gradient.text_kl})


class Epoch(NamedTuple):
    """The point after `epoch` epochs (0 is the start): its loss over the questions that are descended on and over the
    held-out ones (None without any), weights unrounded, and where it lies.

    alphas: step by step; per matrix (matrices, K). coefficients: (K + 1,) or (matrices, K + 1) float64. Text that is
    drawn step by step is, for these losses, one draw that is the same for all epochs.
    """

    epoch: int
    loss: float
    held_out_loss: float | None
    alphas: np.ndarray
    coefficients: np.ndarray


@dataclass(frozen=True)
class Descent:
    """What a descent found.

    plan: the best point, that of `best_epoch`. loss, held_out_loss: of that plan with weights rounded as they would be
    saved, over the questions descended on and the held-out ones, and all of the text. history: every epoch.
    held_out_rows: the rows of the held-out questions. stopped_early: patience ran out.
    """

    plan: MergePlan
    best_epoch: int
    loss: Loss
    held_out_loss: Loss | None
    history: tuple[Epoch, ...]
    held_out_rows: tuple[int, ...]
    stopped_early: bool


def descend(
    loss: TailLoss,
    settings: Settings | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    on_epoch: Callable[[Epoch, dict[str, Tensor]], None] | None = None,
) -> Descent:
    """Descend from the template's coefficients.

    on_epoch: called with each epoch's row, the start's included, and the state after it: plain tensors, to be saved as
    safetensors. state: one of these, from which the descent goes on to the same result, bit by bit on the same
    machine; it must be of the same loss and settings (epochs may differ).
    """
    settings = settings or Settings()
    run = _Run(loss, settings)
    if state is not None:
        run.restore(state)
    else:
        run.record(on_epoch)
    while not run.finished:
        run.advance()
        run.record(on_epoch)
    return run.result()


class _Run:
    """One descent: parameters, optimiser and history; everything that changes is in `state`."""

    def __init__(self, loss: TailLoss, settings: Settings):
        self.loss, self.settings = loss, settings
        self.shape = Parametrisation(
            settings.parametrisation, loss.template, loss.matrices, bounds=tuple(settings.bounds)
        )
        order = np.random.default_rng([settings.seed, 0]).permutation(loss.n_questions)
        count = 0
        if settings.held_out:
            count = max(1, round(settings.held_out * loss.n_questions))
            if count >= loss.n_questions:
                raise GradientError(f"held_out = {settings.held_out} leaves none of {loss.n_questions} questions")
        self.held_out, self.rows = sorted(order[:count].tolist()), sorted(order[count:].tolist())
        if count and not loss.weights.of_answers:
            raise GradientError("questions can be held out only of a loss that questions have a part in")
        size = settings.batch_size or len(self.rows)
        # Without questions in the loss an epoch is one step, whatever the batch size.
        self._batch = min(size, len(self.rows)) if loss.weights.of_answers else len(self.rows)
        self._drawn = loss.text.draw(settings.seed, _EVALUATION) if loss.weights.of_text else None
        self.parameters = torch.nn.Parameter(self.shape.start())
        make = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
        self.optimizer = make([self.parameters], lr=settings.learning_rate)
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []
        self.points: list[Tensor] = []
        self._gradient: Tensor | None = None  # of the latest point by its parameters, where it is known already
        matters = {name: getattr(settings, name) for name in Settings.__dataclass_fields__ if name != "epochs"}
        self._identity = int(digest([loss.identity, matters])[:15], 16)

    # -- one epoch --------------------------------------------------------------------------------------------------

    @property
    def _one_step(self) -> bool:
        """Whether an epoch is a single step on the very loss that is recorded: its gradient comes with the loss."""
        return self._batch == len(self.rows) and not (self.loss.weights.of_text and self.loss.text.sampled)

    def _evaluate(self) -> Evaluation:
        """The loss at the present point, and where it is a step's gradient too, that by the parameters."""
        coefficients = self.shape.coefficients(self.parameters)
        rows = self.rows if self.held_out else None
        found = self.loss(coefficients, rows=rows, held_out=self.held_out, drawn=self._drawn, gradient=self._one_step)
        return found._replace(gradient=self._pull_back(coefficients, found.gradient))

    def _pull_back(self, coefficients: Tensor, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else torch.autograd.grad(coefficients, self.parameters, gradient)[0]

    def record(self, on_epoch: Callable[[Epoch, dict[str, Tensor]], None] | None) -> None:
        """Add the present point to the history."""
        found = self._evaluate()
        losses = [found.loss.total, math.nan if found.held_out is None else found.held_out.total]
        if not all(math.isfinite(value) for value in losses[: 1 + bool(self.held_out)]):
            raise GradientError(
                f"the loss after epoch {len(self.points)} is {losses[0]} (held out: {losses[1]}): lower the learning "
                f"rate, which is {self.settings.learning_rate}"
            )
        self._gradient = found.gradient
        self.losses.append(losses[0])
        self.held_out_losses.append(losses[1])
        self.points.append(self.parameters.detach().clone())
        if on_epoch is not None:
            on_epoch(self.epoch(len(self.points) - 1), self.state())

    def advance(self) -> None:
        """Do the steps of one epoch."""
        settings, number = self.settings, len(self.points)
        if self._one_step:
            # Computed with the loss, unless this run goes on from a state.
            self._step(self._evaluate().gradient if self._gradient is None else self._gradient)
            return
        order = np.random.default_rng([settings.seed, number]).permutation(self.rows).tolist()
        for step, start in enumerate(range(0, len(order), self._batch)):
            rows = order[start : start + self._batch]
            drawn = self.loss.text.draw(settings.seed, number, step) if self.loss.weights.of_text else None
            coefficients = self.shape.coefficients(self.parameters)
            found = self.loss(coefficients, rows=rows, drawn=drawn)
            self._step(self._pull_back(coefficients, found.gradient))

    def _step(self, gradient: Tensor) -> None:
        self.parameters.grad = gradient
        self.optimizer.step()

    # -- history ----------------------------------------------------------------------------------------------------

    @property
    def best(self) -> int:
        """The first epoch of the lowest loss that points are judged by."""
        return int(np.argmin(self.held_out_losses if self.held_out else self.losses))

    @property
    def stopped_early(self) -> bool:
        patience = self.settings.patience
        return patience is not None and len(self.points) - 1 - self.best >= patience

    @property
    def finished(self) -> bool:
        return len(self.points) > self.settings.epochs or self.stopped_early

    def epoch(self, number: int) -> Epoch:
        with torch.no_grad():
            point = self.points[number]
            coefficients = self.shape.coefficients(point).numpy()
            is_alphas = self.shape.kind == "alphas"
            alphas = self.shape.alphas(point).numpy() if is_alphas else coefficients_to_alphas(coefficients)
        held_out = self.held_out_losses[number] if self.held_out else None
        return Epoch(number, self.losses[number], held_out, alphas, coefficients)

    def state(self) -> dict[str, Tensor]:
        """Everything that goes on from here depends on."""
        found = {
            "identity": torch.tensor(self._identity, dtype=torch.int64),
            "points": torch.stack(self.points),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "held_out_losses": torch.tensor(self.held_out_losses, dtype=torch.float64),
        }
        for name, value in self.optimizer.state_dict()["state"].get(0, {}).items():
            if isinstance(value, Tensor):
                found[f"optimizer.{name}"] = value.clone()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if int(state["identity"]) != self._identity:
            raise GradientError(
                "the saved descent is one of other questions, weights or settings: only the number of epochs may differ"
            )
        self.points = list(state["points"].clone())
        self.losses, self.held_out_losses = state["losses"].tolist(), state["held_out_losses"].tolist()
        with torch.no_grad():
            self.parameters.copy_(self.points[-1])
        own = {n.removeprefix("optimizer."): t.clone() for n, t in state.items() if n.startswith("optimizer.")}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: own} if own else {}, "param_groups": groups})

    def result(self) -> Descent:
        best, held_out = self.best, self.held_out
        plan = self.shape.plan(self.points[best])
        found = self.loss.of_plan(plan, rows=self.rows if held_out else None, held_out=held_out)
        history = tuple(self.epoch(number) for number in range(len(self.points)))
        return Descent(plan, best, found.loss, found.held_out, history, tuple(held_out), self.stopped_early)
