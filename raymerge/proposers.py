"""What to try next: coefficient vectors proposed one by one, told their values as they come. No Ray, no files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits

Point = list[float]


class _Proposer:
    """Points that are decided beforehand - known ones, then random ones - and the bookkeeping of all proposers.

    The points follow from the seed alone, so that a restart can leave out those that are done.
    """

    def __init__(self, *, dimensions: int, bounds: tuple[float, float], seed: int, known: Sequence[Point] = ()):
        self.dimensions, self.bounds, self.seed = dimensions, bounds, seed
        for point in known:
            if len(point) != dimensions or not all(bounds[0] <= value <= bounds[1] for value in point):
                raise ValueError(f"known point {point} is not {dimensions} values in {list(bounds)}")
        self._planned: list[Point] = [list(map(float, point)) for point in known]
        self._done: set[tuple[float, ...]] = set()
        self._random = np.random.default_rng(seed)

    def _draw(self) -> Point:
        return self._random.uniform(*self.bounds, size=self.dimensions).tolist()

    def _next_planned(self) -> Point | None:
        while self._planned:
            point = self._planned.pop(0)
            if tuple(point) not in self._done:
                self._done.add(tuple(point))
                return point
        return None

    def tell(self, point: Point, value: float | None) -> None:
        """Learn a point's value, larger being better; None or a value that is not finite means that it failed."""
        self._done.add(tuple(point))


class RandomProposer(_Proposer):
    """Uniform random points: the control of every search."""

    def ask(self, count: int, pending: Sequence[Point] = ()) -> list[Point]:
        """The next `count` points."""
        return [self._one() for _ in range(count)]

    def _one(self) -> Point:
        if (point := self._next_planned()) is not None:
            return point
        while tuple(point := self._draw()) in self._done:
            pass
        self._done.add(tuple(point))
        return point


class BayesProposer(_Proposer):
    """Gaussian-process proposals by bayesian-optimization 3: Matern 5/2 with a noise term, expected improvement.

    Known points first, then `initial` random ones, then proposals. Points that are being evaluated count with the
    mean of the values so far (a constant liar), so that a batch spreads. The noise term is for objectives that are
    shares of few questions; a search then does not chase single questions. The GP is fitted with one BLAS thread
    (29 ms of CPU a candidate against 225 with all).
    """

    def __init__(
        self,
        *,
        dimensions: int,
        bounds: tuple[float, float],
        seed: int,
        initial: int = 10,
        known: Sequence[Point] = (),
        acquisition_points: int = 1000,
    ):
        super().__init__(dimensions=dimensions, bounds=bounds, seed=seed, known=known)
        from bayes_opt import BayesianOptimization, acquisition
        from bayes_opt.parameter import wrap_kernel
        from sklearn.gaussian_process.kernels import Matern, WhiteKernel

        self._planned += [self._draw() for _ in range(initial)]
        self._acquisition_points = acquisition_points
        self._liar = acquisition.ConstantLiar(acquisition.ExpectedImprovement(xi=1e-3), strategy="mean")
        self._optimizer = BayesianOptimization(
            None,
            {f"alpha_{i:03d}": bounds for i in range(dimensions)},
            acquisition_function=self._liar,
            random_state=seed,
            verbose=0,
            allow_duplicate_points=True,
        )
        kernel = Matern(nu=2.5) + WhiteKernel(1e-2, (1e-6, 1.0))
        self._optimizer.set_gp_params(
            kernel=wrap_kernel(kernel, transform=self._optimizer.space.kernel_transform), n_restarts_optimizer=0
        )

    def ask(self, count: int, pending: Sequence[Point] = ()) -> list[Point]:
        """The next `count` points, given that `pending` are being evaluated."""
        points: list[Point] = []
        for _ in range(count):
            point = self._next_planned() or self._propose([*pending, *points])
            self._done.add(tuple(point))
            points.append(point)
        return points

    def _propose(self, pending: Sequence[Point]) -> Point:
        space = self._optimizer.space
        if len(space) < 2:
            return self._draw()
        # The liar would keep a failed point for ever: it is told anew what is pending.
        self._liar.dummies = [np.asarray(point) for point in pending]
        with threadpool_limits(1), warnings.catch_warnings():
            # A kernel parameter at its bound (a noiseless or a flat objective) is no news to a user.
            warnings.simplefilter("ignore")
            found = self._liar.suggest(
                gp=self._optimizer._gp,
                target_space=space,
                n_random=self._acquisition_points,
                n_smart=2,
                random_state=self._optimizer._random_state,
            )
        point = [float(value) for value in found]
        return self._draw() if tuple(point) in self._done else point

    def tell(self, point: Point, value: float | None) -> None:
        super().tell(point, value)
        if value is not None and math.isfinite(value):
            self._optimizer.register(np.asarray(point), float(value))
