"""Muon: gradient descent with orthogonalised momentum, for the stacked layer matrices (Jordan et al., 2024)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix of (..., rows, columns) towards one, by quintic Newton-Schulz steps."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    result = matrices.mT if tall else matrices
    result = result / (result.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = result @ result.mT
        # Muon's published coefficients: steep at zero, so that five steps suffice; they settle within 0.7-1.2.
        result = 3.4445 * result + (-4.7750 * gram + 2.0315 * gram @ gram) @ result
    return result.mT if tall else result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; every parameter is a stack of matrices."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure, which no training of the demo has
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.mul_(group["momentum"]).add_(parameter.grad)
                update = orthogonalise(parameter.grad.add(buffer, alpha=group["momentum"]))
                rows, columns = update.shape[-2:]
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
