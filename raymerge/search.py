"""The alpha search on Ray Tune: trials that carry batches of candidates, and a record that outlives everything.

A candidate on a frozen trunk can cost less than Tune's own work for a trial (5-140 ms while trial actors are reused,
200-330 ms where that fails), so a trial carries several. The caller's record of a batch is written before the proposer
hears of it; a restart tells the proposer what the record holds and goes on. Tune's own snapshots are not needed.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayActorError
from ray.tune.search import Searcher

from raymerge.pool import WorkerError, WorkerLost, WorkerPool, call_worker
from raymerge.proposers import Point, Proposer

Row = dict[str, Any]
#: record(part name, rows of table `trials`, the workers' results): stores one finished batch for good.
Record = Callable[[str, list[Row], list[Row]], None]

# Of Tune for one trial on reused actors: 5-11 ms while CPUs are idle, 0.14 s where the workers keep all of them busy.
# With proposals made ahead, candidates of a second were fastest one a trial.
_OVERHEAD_S = 0.1
_SHARE = 0.1  # of a trial's time that may be overhead
_ROUNDS = 10  # proposals must be able to learn at least so often
_START_S = 30.0  # for the trial actors of the first round to start
_LOSSES = 3  # workers that may die or hang over a candidate before it counts as failed
_TIE_BREAK = 1e-3  # weight of the NLL (nats) beside an accuracy: below one question in 200 for differences under 5


def choose_batch(seconds_per_candidate: float, candidates: int, concurrent: int) -> int:
    """Candidates a trial should carry: enough that Tune's 0.1 s a trial is a tenth of its time, but so few that the
    proposer learns at least ten times, and at least one."""
    wanted = math.ceil(_OVERHEAD_S / _SHARE / max(seconds_per_candidate, 1e-6))
    return max(1, min(wanted, candidates // (_ROUNDS * concurrent)))


@dataclass(frozen=True)
class SearchOutcome:
    """finished: candidates that ended in this call, failed ones too; wall_seconds: from start to end; and the share
    of the workers' time in that span in which they did not score (None where nothing was left to do)."""

    finished: int
    wall_seconds: float
    share_not_scoring: float | None


class _Trial(tune.Trainable):
    """Hands a batch to a pool worker and waits. Takes no CPU itself, and is reused from trial to trial."""

    def setup(
        self,
        config: Row,
        handles: Sequence[Any] = (),
        timeout_s: float = 600.0,
        method: str = "score",
        arguments: Sequence[Any] = (),
    ) -> None:
        self._handles, self._timeout_s, self._method, self._arguments = handles, timeout_s, method, arguments

    def reset_config(self, new_config: Row) -> bool:
        return True

    def step(self) -> Row:
        handle = self._handles[self.config["slot"]]
        self._wait_for_others()
        try:
            found: Row = {"results": self._score(handle, self.config["candidates"])}
        except WorkerLost as error:
            found = {"lost": str(error), "gone": error.gone}
        return {**found, "value": 0.0, "done": True}

    def _wait_for_others(self) -> None:
        """Let no trial of the first round end before all have started. Tune gives the actor of a trial that ended to
        one whose own actor is still starting, and drops the latter: with trials shorter than a start (1-3 s), all of
        them run on one actor, one process a trial is started in vain, and Tune waits ten seconds for those at the end.
        """
        others = [self._handles[slot] for slot in self.config["first_round"]]
        deadline = time.monotonic() + _START_S
        try:
            ray.get(self._handles[self.config["slot"]].mark.remote(self.config["search"]), timeout=_START_S)
            while others and time.monotonic() < deadline:
                found = ray.get([other.marked.remote(self.config["search"]) for other in others], timeout=_START_S)
                others = [other for other, marked in zip(others, found, strict=True) if not marked]
                time.sleep(0.02 if others else 0.0)
        except (RayActorError, GetTimeoutError):
            return  # Slower, no worse; what is wrong with the worker shows when it is asked to score.

    def _score(self, handle: Any, candidates: list[Point]) -> list[Row]:
        try:
            return call_worker(handle, self._method, candidates, *self._arguments, timeout_s=self._timeout_s)
        except WorkerLost:
            raise
        except Exception as error:  # whatever the worker's own code raises ends as the candidate's error
            if len(candidates) == 1:
                return [{"error": f"{type(error).__name__}: {error}"[:2000]}]
        # One bad candidate must not take its batch along: each is tried alone.
        return [result for candidate in candidates for result in self._score(handle, [candidate])]


@dataclass(frozen=True)
class _Batch:
    """Candidates that go to a worker together; `losses`: how often one died or hung over them."""

    number: int
    iterations: list[int]
    points: list[Point]
    losses: int = 0


class BatchSearcher(Searcher):
    """Gives Tune one batch of candidates a trial, on a worker that is free; stores what comes back, then learns."""

    def __init__(
        self,
        proposer: Proposer,
        *,
        candidates: int,
        batch: int,
        concurrent: int,
        workers: int | None = None,
        describe: Callable[[Point], Row],
        minimise: bool,
        record: Record,
        replayed: Sequence[Row] = (),
        on_progress: Callable[[int, float | None], None] | None = None,
    ):
        super().__init__(metric="value", mode="max")
        self._proposer, self._size, self._describe, self._record = proposer, batch, describe, record
        self._minimise, self._on_progress = minimise, on_progress
        self._concurrent = concurrent
        self._free = list(range(concurrent if workers is None else workers))
        self._running: dict[str, tuple[int, _Batch]] = {}
        self._again: list[_Batch] = []
        self._ready: _Batch | None = None
        self._name = uuid.uuid4().hex
        self.gone: dict[int, str] = {}
        self.best: tuple[float, float] | None = None
        self.done = self.finished = 0
        self.scoring_seconds = 0.0
        self.failure: BaseException | None = None
        for row in sorted(replayed, key=lambda row: row["iteration"]):
            self._learn(row)
        # Numbers that a killed run had given to candidates which did not end are given again.
        finished = {row["iteration"] for row in replayed}
        self._iterations = [number for number in range(candidates) if number not in finished]
        self._batch = 1 + max((row["batch"] for row in replayed), default=-1)
        self._left = candidates - len(replayed)
        self._first_round = self._free[: min(concurrent, -(-self._left // batch))]
        self._handed_out = 0

    def suggest(self, trial_id: str) -> Row | str | None:
        finished = self._left <= 0 and not self._again and self._ready is None
        if self.failure is not None or (finished and not self._running):
            return self.FINISHED
        if not self._free and not self._running:
            self.failure = WorkerError(f"no worker is left, each died more often than allowed: {self.gone}")
            return self.FINISHED
        if finished or not self._free or len(self._running) >= self._concurrent:
            if self._ready is None and self._left > 0:
                # While the workers are busy: a proposal takes 0.1-0.2 s, for which a free one would wait.
                self._ready = self._propose()
            return None
        batch = self._again.pop(0) if self._again else self._ready or self._propose()
        if batch is self._ready:
            self._ready = None
        slot = self._free.pop(0)
        self._running[trial_id] = (slot, batch)
        self._handed_out += 1
        first_round = self._first_round if self._handed_out <= len(self._first_round) else []
        return {"candidates": batch.points, "slot": slot, "search": self._name, "first_round": first_round}

    def _propose(self) -> _Batch:
        count = min(self._size, self._left)
        waiting = [batch for _, batch in self._running.values()] + self._again
        points = self._proposer.ask(count, [point for batch in waiting for point in batch.points])
        iterations, self._iterations = self._iterations[:count], self._iterations[count:]
        self._left -= count
        return _Batch(self._next_number(), iterations, points)

    def _next_number(self) -> int:
        self._batch += 1
        return self._batch - 1

    def on_trial_complete(self, trial_id: str, result: Row | None = None, error: bool = False) -> None:
        if trial_id not in self._running:
            return
        slot, batch = self._running.pop(trial_id)
        result = result or {}
        if result.get("gone"):
            self.gone[slot] = result["lost"]
        else:
            self._free.append(slot)
        results = result.get("results")
        if error or results is None:
            cause = result.get("lost") or "the Tune trial failed; its error stands in Tune's folder of the run"
            if self._repeat(batch):
                return
            results = [{"error": cause}] * len(batch.points)
        elif len(results) != len(batch.points):
            results = [{"error": f"the worker gave {len(results)} results for {len(batch.points)} candidates"}] * len(
                batch.points
            )
        rows = [
            self._row(trial_id, slot, batch.number, iteration, point, found)
            for iteration, point, found in zip(batch.iterations, batch.points, results, strict=True)
        ]
        if self.failure is not None:
            return  # Nothing is stored after a store that failed: the batch is done again at the next start.
        try:
            self._record(f"{rows[0]['searcher']}-{batch.number:06d}", rows, results)
        except Exception as failed:
            # Tune would take an exception here for the trial's; it ends the search and is raised when Tune is done.
            self.failure = failed
            return
        self.finished += len(rows)
        for row in rows:
            self._learn(row)

    def _repeat(self, batch: _Batch) -> bool:
        """Queue a batch whose worker was lost once more. Its candidates then go alone, so that one that kills its
        worker fails by itself, and after _LOSSES losses."""
        losses = batch.losses + 1
        if losses >= _LOSSES:
            return False
        self._again += [
            _Batch(batch.number if len(batch.points) == 1 else self._next_number(), [iteration], [point], losses)
            for iteration, point in zip(batch.iterations, batch.points, strict=True)
        ]
        return True

    def _row(self, trial_id: str, slot: int, batch: int, iteration: int, point: Point, found: Row) -> Row:
        values = {key: found.get(key) for key in ("value", "accuracy", "nll")}
        error = found.get("error")
        if error is None and not all(value is not None and math.isfinite(value) for value in values.values()):
            error = f"the score is not finite: {values}"
        if error is not None:
            values = dict.fromkeys(values)
        point = found.get("alphas", point)  # a descent ends elsewhere than where it started
        return {
            **self._describe(point),
            "iteration": iteration,
            "batch": batch,
            "tune_trial": trial_id,
            "actor": f"worker-{slot}",
            "alphas": point,
            **values,
            "perplexity": found.get("perplexity") if error is None else None,
            "n_questions": found.get("n_questions", 0),
            "seconds": found.get("seconds", 0.0),
            "cpu_seconds": found.get("cpu_seconds"),
            "status": "ok" if error is None else "failed",
            "error": error,
        }

    def _learn(self, row: Row) -> None:
        self.done += 1
        self.scoring_seconds += row["seconds"]
        if row["status"] != "ok":
            self._proposer.tell(row["alphas"], None)
        else:
            score = -row["value"] if self._minimise else row["value"]
            # Accuracy over few questions is a staircase with ties, which the likelihood of the answers breaks.
            self._proposer.tell(row["alphas"], score if self._minimise else score - _TIE_BREAK * row["nll"])
            self.best = max(self.best, (score, -row["nll"])) if self.best else (score, -row["nll"])
        if self._on_progress is not None:
            shown = None if self.best is None else (-self.best[0] if self._minimise else self.best[0])
            self._on_progress(self.done, shown)

    def __getstate__(self) -> Row:
        # Tune pickles its searcher for `Tuner.restore`, which is not used: the caller's record is the state.
        return {"_metric": self._metric, "_mode": self._mode}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the caller's record is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the caller's record is the state."""


def run_search(
    pool: WorkerPool,
    proposer: Proposer,
    *,
    searcher: str,
    objective: str,
    minimise: bool,
    candidates: int,
    batch: int,
    concurrent: int,
    seed: int,
    record: Record,
    plan_id_of: Callable[[Point], str],
    replayed: Sequence[Row] = (),
    on_progress: Callable[[int, float | None], None] | None = None,
    storage_path: str,
    method: str = "score",
    arguments: Sequence[Any] = (),
) -> SearchOutcome:
    """Evaluate candidates until `candidates` rows exist, those in `replayed` included.

    The worker's `method` takes a list of points (and `arguments`) and returns, for each, a dict with value, accuracy,
    nll, n_questions and seconds, and where it ended elsewhere alphas. A candidate whose worker raises, dies three
    times, or scores NaN ends as a failed row with its error. Rows have the columns of table `trials`. Raises what
    `record` raises, after Tune has stopped.
    """
    alphas_done = len(replayed)
    common = {"searcher": searcher, "seed": seed, "objective": objective}
    algorithm = BatchSearcher(
        proposer,
        candidates=candidates,
        batch=batch,
        concurrent=concurrent,
        workers=pool.count,
        describe=lambda point: {**common, "plan_id": plan_id_of(point)},
        minimise=minimise,
        record=record,
        replayed=replayed,
        on_progress=on_progress,
    )
    if alphas_done >= candidates:
        return SearchOutcome(0, 0.0, None)
    _quiet_tune()
    began, replayed_seconds = time.monotonic(), algorithm.scoring_seconds
    trainable = tune.with_parameters(
        _Trial, handles=pool.handles, timeout_s=pool.timeout_s, method=method, arguments=arguments
    )
    tuner = tune.Tuner(
        # The workers have the CPUs; Tune wants a trial to need something, so it gets a byte of memory.
        tune.with_resources(trainable, {"cpu": 0, "memory": 1}),
        tune_config=tune.TuneConfig(search_alg=algorithm, num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"{searcher}-{uuid.uuid4().hex[:8]}",
            storage_path=storage_path,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
            # A trial holds nothing that could be saved.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()
    if algorithm.failure is not None:
        raise algorithm.failure
    if algorithm.done < candidates:
        # Tune ends quietly where it is told to stop; a search that is cut short must not pass for a whole one.
        raise WorkerError(f"Tune stopped after {algorithm.done} of {candidates} candidates; start again to resume")
    wall = time.monotonic() - began
    scoring = algorithm.scoring_seconds - replayed_seconds
    return SearchOutcome(algorithm.finished, wall, 1.0 - scoring / (wall * concurrent))


def _quiet_tune() -> None:
    # Without the default loggers the driver needs a third of the CPU a trial; snapshots are not read.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune would take Ctrl-C for a wish to end early and return as if all were done.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
