"""Free parameters of a descent, and the coefficients and plans that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raymerge.plan import MergePlan, coefficients_to_alphas
from raymerge.tail_loss import GradientError, TailLoss

PARAMETRISATIONS = ("alphas", "simplex", "per_matrix")

_ROUNDING = 1e-12  # the most by which an alpha changes that is made a parameter and an alpha again
_SMALLEST = 1e-4  # coefficient, or distance from a bound as a share of the bounds' width, that a start has at least


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
        own, common = dict(self.template.matrix_alphas), self.template.alphas
        rows = [own.get(name, common) for name in self.matrices] if self.kind == "per_matrix" else [common]
        return _tail_coefficients(torch.tensor(rows, dtype=torch.float64)).clamp_min(_SMALLEST).log().flatten()

    def alphas(self, parameters: Tensor) -> Tensor:
        """(K,) alphas, step by step; for the parametrisation "alphas" only."""
        low, high = self.bounds
        return low + (high - low) * torch.sigmoid(parameters)

    def coefficients(self, parameters: Tensor) -> Tensor:
        """Effective coefficients, (K + 1,) or, per matrix, (matrices, K + 1), differentiable."""
        if self.kind == "alphas":
            return _tail_coefficients(self.alphas(parameters))
        if self.kind == "simplex":
            return torch.softmax(parameters, -1)
        return torch.softmax(parameters.unflatten(0, (len(self.matrices), -1)), -1)

    def plan(self, parameters: Tensor) -> MergePlan:
        """The template's merges with these coefficients; with "per_matrix" the steps' alphas are those of the matrices'
        mean.

        For the start's parameters the template's alphas come back bit by bit: a descent that finds nothing better than
        its start has found the same plan, with the same id, as the control or probe that it started from.
        """
        with torch.no_grad():
            if self.kind == "alphas":
                found = self.template.with_alphas(self.alphas(parameters).tolist(), name="gradient", kind="found")
            else:
                found = self.plan_of(self.coefficients(parameters).numpy())
        own = dict(self.template.matrix_alphas)
        same = self.template.with_alphas(
            self.template.alphas,
            name="gradient",
            kind="found",
            matrix_alphas={name: own.get(name, self.template.alphas) for name, _ in found.matrix_alphas},
        )
        return same if np.allclose(found.flat_alphas, same.flat_alphas, rtol=0, atol=_ROUNDING) else found

    def plan_of(self, coefficients: np.ndarray) -> MergePlan:
        """The plan of effective coefficients (K + 1,) or (matrices, K + 1)."""
        common, own = coefficients_to_alphas(coefficients), None
        if common.ndim == 2:
            own = dict(zip(self.matrices, common.tolist(), strict=True))
            common = coefficients_to_alphas(coefficients.mean(0))
        return self.template.with_alphas(common.tolist(), name="gradient", kind="found", matrix_alphas=own)


def _tail_coefficients(alphas: Tensor) -> Tensor:
    """`plan.tail_coefficients`, differentiable: (..., K) to (..., K + 1)."""
    reverse = alphas.flip(-1)
    ones = torch.ones_like(reverse[..., :1])
    return torch.cat([reverse, ones], -1) * torch.cat([ones, torch.cumprod(1.0 - reverse, -1)], -1)


def loss_by_alphas(loss: TailLoss, alphas: Sequence[float]) -> tuple[float, np.ndarray]:
    """A loss at alphas (K,), step by step, and its gradient by them (K,) float64, for an optimiser of one's own."""
    point = torch.tensor(alphas, dtype=torch.float64, requires_grad=True)
    coefficients = _tail_coefficients(point)
    found = loss(coefficients)
    (gradient,) = torch.autograd.grad(coefficients, point, found.gradient)
    return found.loss.total, gradient.numpy()
