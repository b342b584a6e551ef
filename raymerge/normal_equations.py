"""Weighted linear least squares from streamed sums: memory grows with the features, not with the tokens.

What is wanted is the map M (n, d) from features x (n) to residuals r (d) that minimises

    sum_t w_t |r_t - M' x_t|^2  +  ridge * mean(diag G) * |M|^2,     G = sum_t w_t x_t x_t'

The solution depends on nothing but G and C = sum_t w_t x_t r_t', and the error of any map on some tokens on nothing but
their G, C and sum_t w_t |r_t|^2. So parts are summed, and a ridge is chosen on held-out tokens, without a token being
kept. The ridge is relative to the features' mean square, so that one value means the same in every layer. Residuals are
what a layer as it stands leaves over, so that the ridge pulls towards that layer and not towards zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raymerge.errors import UserError

_TILE = 2048  # tokens multiplied at a time before they are added to the float64 sums


def products_for(ridge: float | None, features: int) -> torch.dtype:
    """The dtype that products of features are to be computed in, for a ridge; None: one that is chosen.

    Products in float32 leave noise in the Gram matrix, of norm up to about 2^-23 sqrt(n) times the mean diagonal. That
    is to be less of the ridge than the 2^-9 that storing a fitted weight in bfloat16 rounds off: where the tokens say
    nothing, the noise would decide in the ridge's place. Chosen ridges are above that, and float64 takes twice as long.
    """
    noise = 2.0**-23 * math.sqrt(features)
    return torch.float64 if ridge is not None and noise > 2.0**-9 * ridge else torch.float32


class RefitError(UserError):
    """A refit that cannot be carried out; the message names the layer, the tokens or the option."""


@dataclass
class NormalEquations:
    """The sums: gram (n, n), cross (n, d), power (sum of w |r|^2), weight (sum of w), all float64; tokens counted."""

    gram: Tensor
    cross: Tensor
    power: float = 0.0
    weight: float = 0.0
    tokens: int = 0

    @staticmethod
    def empty(features: int, outputs: int, device: torch.device | str = "cpu") -> NormalEquations:
        """Sums of no token."""
        gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        return NormalEquations(gram, torch.zeros(features, outputs, dtype=torch.float64, device=device))

    @staticmethod
    def total(parts: Iterable[NormalEquations | PackedEquations]) -> NormalEquations:
        """The sums of several parts of one layer; a single part that is not packed is given back as it is.

        8,960 features take 0.64 GB, so that nothing is copied in vain.
        """
        parts = list(parts)
        first = parts[0]
        if len(parts) == 1 and isinstance(first, NormalEquations):
            return first
        features, outputs = first.cross.shape
        device = first.gram.device if isinstance(first, NormalEquations) else "cpu"
        found = NormalEquations.empty(features, outputs, device)
        for part in parts:
            if isinstance(part, PackedEquations):
                part.add_to(found.gram)
                found.cross += torch.tensor(part.cross)
            else:
                found.gram += part.gram
                found.cross += part.cross
            found.power, found.weight = found.power + part.power, found.weight + part.weight
            found.tokens += part.tokens
        return found

    def pack(self) -> PackedEquations:
        """The same to be sent to another process: half the bytes."""
        gram, n = self.gram.cpu().numpy(), len(self.gram)
        triangle = np.empty(n * (n + 1) // 2)
        for row in range(n):
            start = row * (row + 1) // 2
            triangle[start : start + row + 1] = gram[row, : row + 1]
        return PackedEquations(triangle, self.cross.cpu().numpy(), self.power, self.weight, self.tokens)

    def to(self, device: torch.device | str) -> NormalEquations:
        """The same sums on a device."""
        return NormalEquations(self.gram.to(device), self.cross.to(device), self.power, self.weight, self.tokens)

    def add(
        self, features: Tensor, residuals: Tensor, weights: Tensor, *, products: torch.dtype = torch.float32
    ) -> None:
        """Add tokens: features (t, n), residuals (t, d), weights (t,), of any floating dtype.

        Products are computed in `products` (see `products_for`) over tiles of 2,048 tokens, which are summed in
        float64; inputs in float64 stay so.
        """
        for x, r, w in zip(features.split(_TILE), residuals.split(_TILE), weights.split(_TILE), strict=True):
            dtype = torch.float64 if x.dtype == torch.float64 else products
            root = w.to(dtype).sqrt()[:, None]
            x, r = x.to(dtype) * root, r.to(dtype) * root
            if dtype == torch.float64:  # in place: another n by n matrix of float64 is not accounted for
                self.gram.addmm_(x.T, x)
                self.cross.addmm_(x.T, r)
            else:
                self.gram += x.T @ x
                self.cross += x.T @ r
            self.power += float(r.double().square().sum())
            self.weight += float(w.double().sum())
            self.tokens += len(w)

    def solve(self, ridge: float) -> Tensor:
        """The map (n, d) float64 for one ridge > 0. Raises RefitError where there is no token."""
        return self.solutions([ridge])[0]

    def solutions(self, ridges: Sequence[float]) -> list[Tensor]:
        """The maps for several ridges. One Cholesky factorisation each; zeros where every feature is zero."""
        if not self.tokens:
            raise RefitError("there is no calibration token to fit a layer to: raise calibration.tokens")
        scale = float(self.gram.diagonal().mean())
        if not scale > 0.0:
            return [torch.zeros_like(self.cross) for _ in ridges]
        found = []
        for ridge in ridges:
            shifted = self.gram.clone()
            shifted.diagonal().add_(ridge * scale)
            failed = torch.empty((), dtype=torch.int32, device=shifted.device)
            factor, _ = torch.linalg.cholesky_ex(shifted, out=(shifted, failed))
            if failed:
                raise RefitError(
                    f"the calibration's normal equations are singular to float64 at ridge {ridge:g}: raise plan.ridge"
                )
            found.append(torch.cholesky_solve(self.cross, factor))
        return found

    def scale(self, ridge: float) -> Tensor:
        """The best diagonal map (n,) float64, each feature onto the residual of its own number; n must be d."""
        diagonal = self.gram.diagonal()
        return self.cross.diagonal() / (diagonal + ridge * diagonal.mean()).clamp_min(torch.finfo(torch.float64).tiny)

    def error(self, found: Tensor) -> float:
        """Weighted mean squared error of a map (n, d) on the tokens of these sums; not below 0, where the rounded
        difference of sums that it is may come out."""
        fitted = (found * (self.gram @ found)).sum() - 2.0 * (found * self.cross).sum()
        return max((self.power + float(fitted)) / self.weight, 0.0)


@dataclass
class PackedEquations:
    """Sums in transit: the gram's lower triangle row by row (n (n + 1) / 2), cross (n, d); NumPy arrays, since Ray lets
    processes of one machine share those without a copy."""

    triangle: np.ndarray
    cross: np.ndarray
    power: float
    weight: float
    tokens: int

    def add_to(self, gram: Tensor) -> None:
        """Add the Gram matrix to `gram` (n, n) float64, which lies on the CPU, in place."""
        into = gram.numpy()
        for row in range(len(into)):
            start = row * (row + 1) // 2
            own = self.triangle[start : start + row + 1]
            into[row, : row + 1] += own
            into[:row, row] += own[:-1]


def choose_ridge(train: NormalEquations, held_out: NormalEquations, ridges: Sequence[float]) -> tuple[float, float]:
    """(ridge, error): the one of `ridges` whose map, fitted on `train`, has the least error on `held_out`.

    The error is relative to that of the zero map, which leaves the layer as it is: above 1 the refit does harm. Raises
    RefitError where no token that counts is held out.
    """
    if not held_out.weight:
        raise RefitError(
            f"of {train.tokens + held_out.tokens} calibration tokens none is left to choose the ridge on: raise "
            "calibration.tokens, or set plan.ridge"
        )
    nothing = held_out.power / held_out.weight
    errors = [held_out.error(found) / nothing if nothing else 1.0 for found in train.solutions(ridges)]
    best = min(range(len(ridges)), key=errors.__getitem__)
    return ridges[best], errors[best]
