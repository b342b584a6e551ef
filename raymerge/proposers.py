"""What to try next: coefficient vectors proposed one by one, told their values as they come. No Ray, no files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

Point = list[float]


# Local search: rounds of Gaussian steps of these sizes (shares of the bounds' width) around the best points so far.
_STEPS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
_LOCAL_STARTS = 5
_LOCAL_TRIES = 40  # per start and round
_CHOICE_SCALE = 2.0  # how far the first and the last choice are apart, where coefficients are at most sqrt(2)
_ACQUISITION_POINTS = 1000  # random ones, from the best of which the acquisition function is climbed
_ALWAYS_FITTED = 128  # points; with more of them the GP keeps its kernel until a tenth more are there
_LEARNT = 2048  # points that the GP knows at the most: with 4,096 a proposal would take 3 s and 1 GB, and soon far more
_FAILED_RADIUS = 0.01  # share of the bounds' width: no proposal falls nearer than this to a point that failed


class Proposer(Protocol):
    """What a search needs to know of where its points come from."""

    def ask(self, count: int, pending: Sequence[Point] = ()) -> list[Point]:
        """The next points, at most `count`, while the values of the pending ones are awaited."""
        ...

    def tell(self, point: Point, value: float | None) -> None:
        """Learn a point's value, larger being better; None or a value that is not finite means that it failed."""
        ...


class _Drawn:
    """Points that are decided beforehand - known ones, then random ones - and the bookkeeping of what is done.

    The points follow from the seed alone, so that a restart can leave out those that are done. A point is `dimensions`
    values within `bounds`; where there are choices (numbers that have an order, such as a block's first layer), one of
    them stands before the values.
    """

    def __init__(
        self,
        *,
        dimensions: int,
        bounds: tuple[float, float],
        seed: int,
        known: Sequence[Point] = (),
        choices: Sequence[float] = (),
    ):
        self.dimensions, self.bounds, self.seed = dimensions, bounds, seed
        self.choices = sorted(map(float, choices))
        for point in known:
            choice, values = self._split(point)
            if len(values) != dimensions or not all(bounds[0] <= value <= bounds[1] for value in values):
                raise ValueError(f"known point {point} is not {dimensions} values in {list(bounds)}")
            if choice and choice[0] not in self.choices:
                raise ValueError(f"known point {point} begins with none of {self.choices}")
        self._planned: list[Point] = [list(map(float, point)) for point in known]
        self._done: set[tuple[float, ...]] = set()
        self._random = np.random.default_rng(seed)

    def _split(self, point: Point) -> tuple[Point, Point]:
        """The choice, if there are any, and the values."""
        return point[: bool(self.choices)], point[bool(self.choices) :]

    def _draw(self, random: np.random.Generator) -> Point:
        choice = [self.choices[random.integers(len(self.choices))]] if self.choices else []
        return choice + random.uniform(*self.bounds, size=self.dimensions).tolist()

    def _new(self, random: np.random.Generator) -> Point:
        """A random point that is none of those that are done."""
        while tuple(point := self._draw(random)) in self._done:
            pass
        return point

    def _next_planned(self) -> Point | None:
        while self._planned:
            if tuple(point := self._planned.pop(0)) not in self._done:
                return point
        return None

    def ask(self, count: int, pending: Sequence[Point] = ()) -> list[Point]:
        """The next `count` points, given that `pending` are being evaluated."""
        self._done.update(map(tuple, pending))  # of a restart, which had not asked for them itself
        points: list[Point] = []
        for _ in range(count):
            point = self._next_planned() or self._propose([*pending, *points])
            self._done.add(tuple(point))
            points.append(point)
        return points

    def _propose(self, pending: Sequence[Point]) -> Point:
        """A point after the planned ones."""
        return self._new(self._random)

    def tell(self, point: Point, value: float | None) -> None:
        self._done.add(tuple(point))


class RandomProposer(_Drawn):
    """Uniform random points: the control of every search, so they are none of those that a BayesProposer of the same
    seed starts with."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._random = np.random.default_rng([self.seed, 1])


class Starts:
    """Given points in their order, for searches that move from each on their own; nothing is learnt from them."""

    def __init__(self, points: Sequence[Point]):
        self._points = [list(map(float, point)) for point in points]

    def ask(self, count: int, pending: Sequence[Point] = ()) -> list[Point]:
        """The next `count` points."""
        taken, self._points = self._points[:count], self._points[count:]
        return taken

    def tell(self, point: Point, value: float | None) -> None:
        """Nothing is learnt."""


class BayesProposer(_Drawn):
    """Gaussian-process proposals by bayesian-optimization 3: Matern 5/2 with a noise term, expected improvement.

    Known points first, then `initial` random ones, then proposals. Points that are being evaluated count with the
    mean of the values so far (a constant liar), so that a batch spreads. The noise term is for objectives that are
    shares of few questions; a search then does not chase single questions. `warp` maps values (n, dimensions) to what
    the GP measures distances in; plan.tail_coefficients for merges of layers in a row (tests/benchmarks/search.py has
    the figures). Choices are one more coordinate there, in their order and evenly spaced, since neighbouring blocks
    are alike; the initial random points go through the choices in a random order before any comes again.
    The GP is fitted with one BLAS thread (29 ms of CPU a candidate against 225 with all). Its kernel is fitted to every
    point up to the 128th, later at every tenth part more: fits to 600 points take most of a second, and change little.
    Of more than 2,048 points it knows the best 1,024 and as many of the others, evenly spread over their order, and its
    kernel stays as it is: what it computes grows with the cube of what it knows, and its memory with the square.
    """

    def __init__(self, *, initial: int = 10, warp: Callable[[np.ndarray], np.ndarray] | None = None, **options: Any):
        super().__init__(**options)
        from bayes_opt import BayesianOptimization, acquisition
        from bayes_opt.parameter import wrap_kernel
        from sklearn.gaussian_process.kernels import Matern, WhiteKernel

        drawn = [self._draw(self._random) for _ in range(initial)]
        if self.choices:
            order = [self._random.permutation(self.choices) for _ in range(0, initial, len(self.choices))]
            drawn = [[float(choice), *point[1:]] for choice, point in zip(np.ravel(order), drawn, strict=False)]
        self._planned += drawn
        self._failed: list[Point] = []
        improvement = acquisition.ExpectedImprovement(xi=1e-3)
        # Its own local search differentiates numerically, 14 predictions of one point a step: 0.3-1.7 s a proposal
        # where predictions in bulk take 0.01-0.1 s and end as well.
        improvement._smart_minimize = _search_locally  # type: ignore[method-assign]  # on purpose
        self._liar = acquisition.ConstantLiar(improvement, strategy="mean")
        self._optimizer = BayesianOptimization(
            None,
            ({"choice": (0.0, 1.0)} if self.choices else {})
            | {f"value_{i:03d}": self.bounds for i in range(self.dimensions)},
            acquisition_function=self._liar,
            random_state=self.seed,
            verbose=0,
            allow_duplicate_points=True,
        )
        # Coordinates lie in [0, 1]. With sklearn's bounds of 1e-5 and 1e5 the fit to ten points may end at 1e-5, where
        # every point is news: of six made-up searches one never left its start (true accuracy .594 for .837).
        kernel = Matern(nu=2.5, length_scale_bounds=(0.05, 10.0)) + WhiteKernel(1e-2, (1e-6, 0.3))
        self._warp = warp or np.asarray
        self._kernel = wrap_kernel(kernel, transform=self._measured)
        self._optimizer._gp.set_params(kernel=self._kernel, n_restarts_optimizer=0)
        self._fitted_to, self._optimise = 0, self._optimizer._gp.optimizer

    def _measured(self, encoded: np.ndarray) -> np.ndarray:
        """What the GP measures distances in, of encoded points (n, coordinates)."""
        if not self.choices:
            return self._warp(encoded)
        places = _CHOICE_SCALE * self._numbers(encoded[..., :1]) / max(len(self.choices) - 1, 1)
        return np.concatenate([places, self._warp(encoded[..., 1:])], axis=-1)

    def _numbers(self, coordinates: ArrayLike) -> np.ndarray:
        """Which choice a coordinate in [0, 1] stands for: every one for an equal share of it."""
        count = len(self.choices)
        return np.clip(np.floor(np.asarray(coordinates) * count), 0, count - 1)

    def _encode(self, point: Point) -> np.ndarray:
        choice, values = self._split(point)
        return np.array([*((self.choices.index(value) + 0.5) / len(self.choices) for value in choice), *values])

    def _decode(self, encoded: np.ndarray) -> Point:
        choice, values = self._split([float(value) for value in encoded])
        return [*(self.choices[int(self._numbers(value))] for value in choice), *values]

    def _propose(self, pending: Sequence[Point]) -> Point:
        space = self._optimizer.space
        # By the number of points so far, not a stream: a restart told the record goes on as the search would have.
        so_far = [self.seed, len(self._done)]
        if len(space) < 2:
            return self._new(np.random.default_rng(so_far))
        # The liar would keep a failed point for ever: it is told anew what is pending.
        self._liar.dummies = [self._encode(point) for point in pending]
        with threadpool_limits(1), warnings.catch_warnings():
            # A kernel parameter at its bound (a noiseless or a flat objective) is no news to a user.
            warnings.simplefilter("ignore")
            if len(space) > _ALWAYS_FITTED:
                self._fix_kernel(space)
            if len(space) > _LEARNT:
                space = self._thinned(space)
            found = self._liar.suggest(
                gp=self._optimizer._gp,
                target_space=space,
                n_random=_ACQUISITION_POINTS,
                n_smart=_LOCAL_STARTS,
                random_state=np.random.RandomState(so_far),
            )
        point = self._decode(found)
        near = _FAILED_RADIUS * (self.bounds[1] - self.bounds[0])  # choices are further apart than any such
        if tuple(point) in self._done or any(np.abs(np.subtract(point, bad)).max() < near for bad in self._failed):
            return self._new(np.random.default_rng(so_far))
        return point

    def _fix_kernel(self, space: Any) -> None:
        """The kernel fitted to the first points, as many as follow from how many there are: a restart has the same."""
        gp, count = self._optimizer._gp, _ALWAYS_FITTED
        while (more := count + count // 10) <= min(len(space), _LEARNT):
            count = more
        if count != self._fitted_to:
            gp.set_params(kernel=self._kernel, optimizer=self._optimise)
            gp.fit(space.params[:count], space.target[:count])
            gp.set_params(kernel=gp.kernel_, optimizer=None)
            self._fitted_to = count

    def _thinned(self, space: Any) -> Any:
        """The best of many points, and as many of the others, which show where it is not worth trying."""
        order, best = np.argsort(-space.target, kind="stable"), _LEARNT // 2
        others = np.sort(order[best:])
        others = others[np.linspace(0, len(others) - 1, _LEARNT - best).astype(int)]
        chosen = np.sort(np.concatenate([order[:best], others]))
        thinned = self._liar._copy_target_space(space)
        thinned._params, thinned._target = space.params[chosen], space.target[chosen]
        return thinned

    def tell(self, point: Point, value: float | None) -> None:
        super().tell(point, value)
        if value is not None and math.isfinite(value):
            # The optimizer's own method makes a dict of every point so far, for a log that is off.
            self._optimizer.space.register(self._encode(point), float(value))
        else:
            # The GP never hears of it, so it would be proposed, or all but, again and again.
            self._failed.append(list(point))


def _search_locally(
    acq: Callable[[np.ndarray], np.ndarray], space: Any, x_seeds: np.ndarray, random_state: np.random.RandomState
) -> tuple[np.ndarray, float]:
    """The point of least `acq` near the best random ones: random steps in all, half or a few coordinates."""
    low, high = space.bounds[:, 0], space.bounds[:, 1]
    points, values = np.array(x_seeds), acq(np.array(x_seeds))
    for size in _STEPS:
        tries = np.repeat(points, _LOCAL_TRIES, axis=0)
        moved = random_state.uniform(size=tries.shape) < random_state.choice([0.15, 0.5, 1.0], size=(len(tries), 1))
        tries = np.clip(tries + moved * random_state.normal(size=tries.shape) * size * (high - low), low, high)
        points, values = np.vstack([points, tries]), np.concatenate([values, acq(tries)])
        best = np.argsort(values)[:_LOCAL_STARTS]
        points, values = points[best], values[best]
    return points[0], float(values[0])
