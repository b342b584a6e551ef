"""Coefficients of a tail merge by gradient descent through the frozen trunk.

The published way (alphas alone, Adam at 1e-3, batches of 4 questions, 500 epochs) differentiates through the whole
fused model; `tail_loss` comes to the same gradient from the merged layer alone.

While descending, weights are float32 and unrounded, so that the loss is smooth; what is reported of the result is
computed from weights rounded to the stored dtype, as they would be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raymerge.config import Config
from raymerge.identity import digest
from raymerge.objectives import parse_objective
from raymerge.parametrisation import Parametrisation
from raymerge.plan import MergePlan, coefficients_to_alphas
from raymerge.tail_loss import Evaluation, GradientError, LossWeights, TailLoss

_EVALUATION = 2**31  # stands for a step's number in the seed of the text sample that losses are compared on
_HISTORIES = ("old_dirs", "old_stps", "ro")  # what L-BFGS keeps lists of
_LINE_SEARCH = 20  # evaluations of the loss in one step of L-BFGS, at most


@dataclass(frozen=True)
class Settings:
    """How to descend; `GradientConfig` has the limits. The published way: adam, 1e-3, batches of 4 questions, 500
    epochs, nothing held out.

    optimizer: adam or sgd, with steps of learning_rate; or lbfgs (Liu and Nocedal 1989, with a line search by the
    strong Wolfe conditions), for which learning_rate does not count and an epoch is one step, on all questions and on
    the text that losses are compared on. batch_size: questions of a step, None for all. held_out: share of the
    questions, drawn by the seed, that no step sees and that the best point is chosen by. patience: stop after so many
    epochs without a lower loss (of the held-out questions, if there are any). seed: of that draw, the batches and the
    text drawn for a step.
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


def descent_settings(config: Config, parametrisation: str) -> Settings:
    """The settings of the gradient section. A loss on text alone holds out no questions."""
    own = config.gradient
    return Settings(
        parametrisation=parametrisation,
        bounds=config.search.bounds,
        optimizer=own.optimizer,
        learning_rate=own.learning_rate,
        epochs=own.epochs,
        batch_size=own.batch_size,
        held_out=own.held_out if loss_weights(config).of_answers else 0.0,
        patience=own.patience,
        seed=config.search.seed,
    )


def loss_weights(config: Config) -> LossWeights:
    """What is descended on: the terms of search.objective, or answer_nll for accuracies, which have no gradient; on the
    search questions, which are those of the subjects that the objective names."""
    objective = parse_objective(config.search.objective)
    weights = {"answer_nll": 0.0 if objective.minimised else 1.0, "text_kl": config.gradient.text_kl}
    for term in objective.terms if objective.minimised else ():
        weights[term.measure] = weights.get(term.measure, 0.0) + term.weight
    return LossWeights(**weights)


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

    plan: the best point, that of `best_epoch`. history: every epoch. held_out_rows: the rows of the held-out questions.
    stopped_early: patience ran out, or a step of L-BFGS no longer moved.
    """

    plan: MergePlan
    best_epoch: int
    history: tuple[Epoch, ...]
    held_out_rows: tuple[int, ...]
    stopped_early: bool


def descend(
    loss: TailLoss,
    settings: Settings | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    on_epoch: Callable[[Epoch, dict[str, Tensor]], None] | None = None,
    stops: Callable[[], bool] | None = None,
) -> Descent | None:
    """Descend from the template's coefficients.

    on_epoch: called with each epoch's row, the start's included, and the state after it: plain tensors, to be saved as
    safetensors. state: one of these, from which the descent goes on to the same result, bit by bit on the same
    machine; it must be of the same loss and settings (epochs may differ). stops: asked after each epoch whether to stop
    before the end, to go on from its state; the result is then None.
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
        if stops is not None and not run.finished and stops():
            return None
    return run.result()


def _optimizer(settings: Settings, parameters: torch.nn.Parameter) -> torch.optim.Optimizer:
    if settings.optimizer == "lbfgs":
        # torch's tolerances would end a descent from an alpha of 0 or 1, where gradients are a ten-thousandth.
        return torch.optim.LBFGS(
            [parameters],
            max_iter=1,
            max_eval=_LINE_SEARCH,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
    make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[settings.optimizer]
    return make([parameters], lr=settings.learning_rate)


class _Run:
    """One descent: parameters, optimiser and history; everything that changes is in `state`."""

    def __init__(self, loss: TailLoss, settings: Settings):
        self.loss, self.settings = loss, settings
        self.parametrisation = Parametrisation(
            settings.parametrisation, loss.template, loss.matrices, bounds=settings.bounds
        )
        order = np.random.default_rng([settings.seed, 0]).permutation(loss.n_questions)
        count = 0
        if settings.held_out and not loss.weights.of_answers:
            raise GradientError("questions can be held out only of a loss that questions have a part in")
        if settings.held_out:
            count = max(1, round(settings.held_out * loss.n_questions))
            if count >= loss.n_questions:
                raise GradientError(
                    f"held_out = {settings.held_out} leaves none of {loss.n_questions} questions to descend on: set "
                    "gradient.held_out to 0, or search on more questions"
                )
        self.held_out, self.rows = sorted(order[:count].tolist()), sorted(order[count:].tolist())
        size = settings.batch_size or len(self.rows)
        # Without questions in the loss an epoch is one step, whatever the batch size.
        self._batch = min(size, len(self.rows)) if loss.weights.of_answers else len(self.rows)
        self._drawn = None if loss.text is None else loss.text.draw(settings.seed, _EVALUATION)
        self.parameters = torch.nn.Parameter(self.parametrisation.start())
        self.optimizer = _optimizer(settings, self.parameters)
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []
        self.points: list[Tensor] = []
        self._evaluated: dict[bytes, Evaluation] = {}  # the latest point's, and of those that a line search tries
        matters = {name: value for name, value in asdict(settings).items() if name != "epochs"}
        self._identity = int(digest([loss.identity, matters])[:15], 16)

    # -- one epoch --------------------------------------------------------------------------------------------------

    @property
    def _one_step(self) -> bool:
        """Whether an epoch is a single step on the very loss that is recorded: its gradient comes with the loss."""
        sampled = self.loss.text is not None and self.loss.text.sampled
        return self.settings.optimizer == "lbfgs" or (self._batch == len(self.rows) and not sampled)

    def _evaluate(self) -> Evaluation:
        """The loss at the present point, with its gradient by the parameters if an epoch is one step on that loss."""
        key = self.parameters.detach().numpy().tobytes()
        if key not in self._evaluated:
            coefficients = self.parametrisation.coefficients(self.parameters)
            rows = self.rows if self.held_out else None
            found = self.loss(
                coefficients, rows=rows, held_out=self.held_out, drawn=self._drawn, gradient=self._one_step
            )
            self._evaluated[key] = found._replace(gradient=self._pull_back(coefficients, found.gradient))
        return self._evaluated[key]

    def _at_present(self) -> tuple[float, Tensor]:
        """The recorded loss at the present point and its gradient, where an epoch is one step on that loss."""
        found = self._evaluate()
        assert found.gradient is not None  # since `_one_step`
        return found.loss.total, found.gradient

    def _pull_back(self, coefficients: Tensor, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else torch.autograd.grad(coefficients, self.parameters, gradient)[0]

    def record(self, on_epoch: Callable[[Epoch, dict[str, Tensor]], None] | None) -> None:
        """Add the present point to the history."""
        found = self._evaluate()
        self._evaluated = {self.parameters.detach().numpy().tobytes(): found}
        losses = [found.loss.total, math.nan if found.held_out is None else found.held_out.total]
        if not all(math.isfinite(value) for value in losses[: 1 + bool(self.held_out)]):
            rate = f"lower the learning rate, which is {self.settings.learning_rate}"
            raise GradientError(
                f"the loss after epoch {len(self.points)} is {losses[0]} (held out: {losses[1]}): "
                + ("use optimizer adam" if self.settings.optimizer == "lbfgs" else rate)
            )
        self.losses.append(losses[0])
        self.held_out_losses.append(losses[1])
        self.points.append(self.parameters.detach().clone())
        if on_epoch is not None:
            on_epoch(self.epoch(len(self.points) - 1), self.state())

    def advance(self) -> None:
        """Do the steps of one epoch."""
        settings, number = self.settings, len(self.points)
        if self._one_step:
            if settings.optimizer == "lbfgs":
                # The first trial has length 1. torch only shortens a longer one: where gradients are small it would
                # change the loss, which is of float32 logits, by less than rounding does, and the search end there.
                size = self._at_present()[1].abs().sum() if number == 1 else torch.ones(())
                self.optimizer.param_groups[0]["lr"] = max(1.0, float(1.0 / size))
            self.optimizer.step(self._closure)
            return
        order = np.random.default_rng([settings.seed, number]).permutation(self.rows).tolist()
        for step, start in enumerate(range(0, len(order), self._batch) if order else [0]):
            rows = order[start : start + self._batch]
            drawn = None if self.loss.text is None else self.loss.text.draw(settings.seed, number, step)
            coefficients = self.parametrisation.coefficients(self.parameters)
            found = self.loss(coefficients, rows=rows, drawn=drawn)
            self.parameters.grad = self._pull_back(coefficients, found.gradient)
            self.optimizer.step()

    def _closure(self) -> float:
        """The recorded loss at the present point, whose gradient is left where optimisers look for it."""
        total, gradient = self._at_present()
        self.parameters.grad = gradient.clone()  # L-BFGS keeps it
        return total

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
    def _converged(self) -> bool:
        """Whether the latest step of L-BFGS did not move: no later one would, as one of Adam's might."""
        moves = len(self.points) < 2 or not torch.equal(self.points[-1], self.points[-2])
        return self.settings.optimizer == "lbfgs" and not moves

    @property
    def finished(self) -> bool:
        return len(self.points) > self.settings.epochs or self.stopped_early or self._converged

    def epoch(self, number: int) -> Epoch:
        with torch.no_grad():
            point = self.points[number]
            coefficients = self.parametrisation.coefficients(point).numpy()
            is_alphas = self.parametrisation.kind == "alphas"
            alphas = self.parametrisation.alphas(point).numpy() if is_alphas else coefficients_to_alphas(coefficients)
        held_out = self.held_out_losses[number] if self.held_out else None
        return Epoch(number, self.losses[number], held_out, alphas, coefficients)

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the descent depends on."""
        found = {
            "identity": torch.tensor(self._identity, dtype=torch.int64),
            "points": torch.stack(self.points),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "held_out_losses": torch.tensor(self.held_out_losses, dtype=torch.float64),
        }
        for name, value in self.optimizer.state_dict()["state"].get(0, {}).items():
            if name in _HISTORIES:
                found[f"optimizer.{name}"] = torch.stack(value) if value else torch.empty(0)
            elif name != "al" and value is not None:  # scratch space of one step
                # L-BFGS has numbers among its tensors, of which torch would make float32.
                is_tensor = isinstance(value, Tensor)
                found[f"optimizer.{name}"] = value.clone() if is_tensor else torch.tensor(value, dtype=torch.float64)
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
        saved = {n.removeprefix("optimizer."): t.clone() for n, t in state.items() if n.startswith("optimizer.")}
        own = {name: list(tensor) if name in _HISTORIES else tensor for name, tensor in saved.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: own} if own else {}, "param_groups": groups})

    def result(self) -> Descent:
        plan = self.parametrisation.plan(self.points[self.best])
        history = tuple(self.epoch(number) for number in range(len(self.points)))
        early = self.stopped_early or self._converged
        return Descent(plan, self.best, history, tuple(self.held_out), early)
