"""The alpha search on Ray Tune: trials that carry batches of candidates, and a record that outlives everything.

A candidate on a frozen trunk can cost less than Tune's own work for a trial (5-140 ms while trial actors are reused,
200-330 ms where that fails), so a trial carries several. The caller's record of a batch is written before the proposer
hears of it; a restart tells the proposer what the record holds and goes on. Tune's own snapshots are not needed.

A worker that is lost takes nothing along: its batch is queued again, for whichever worker is free, and Tune's trial
actors stay on the driver's node, so that the loss of another one is the loss of workers only.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from raymerge.actors import NoRoomError, WorkerError, WorkerLost, call_worker, find_worker
from raymerge.cluster import driver_node
from raymerge.errors import UserError
from raymerge.objectives import trial_outcome
from raymerge.pool import WorkerPool
from raymerge.proposers import Point, Proposer
from raymerge.schemas import Row
from raymerge.storage import NO_ROOM

#: record(part name, rows of table `trials`, the workers' results): stores one finished batch for good.
Record = Callable[[str, list[Row], list[dict[str, Any]]], None]

# Tune's own time for a trial on reused actors: 5-11 ms while CPUs are idle, 0.14 s where workers keep all of them busy.
# With proposals made ahead, candidates that take a second each were fastest with one a trial.
_OVERHEAD_S = 0.1
_SHARE = 0.1  # of a trial's time that may be overhead
_ROUNDS = 10  # proposals must be able to learn at least so often
_START_S = 30.0  # for the trial actors of the first round to start
_PIN = 0.001  # of the driver's node that a trial actor takes, so that up to a thousand find room there
_TIE_BREAK = 1e-3  # weight of the NLL (nats) beside an accuracy: below one question in 200 for differences under 5


def choose_batch(seconds_per_candidate: float, candidates: int, concurrent: int) -> int:
    """Candidates a trial should carry: enough that Tune's 0.1 s a trial is a tenth of its time, but so few that the
    proposer learns at least ten times, and at least one."""
    wanted = math.ceil(_OVERHEAD_S / _SHARE / max(seconds_per_candidate, 1e-6))
    return max(1, min(wanted, candidates // (_ROUNDS * concurrent)))


# Package, and what Tune's callback for it is called.
_LOGGERS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


class LoggerError(UserError):
    """A logger whose package is not installed; the message has the command that installs it."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers (tensorboard, mlflow, wandb) whose packages are missing, all at once. Raises LoggerError."""
    missing = [_LOGGERS[name] for name in names if importlib.util.find_spec(_LOGGERS[name]) is None]
    if missing:
        raise LoggerError(
            f"output.loggers names {', '.join(names)}, but {', '.join(missing)} cannot be imported: "
            f"pip install {' '.join(missing)} where this command runs, or name fewer"
        )


def _callbacks(names: Sequence[str], searcher: str, folder: str) -> list[tune.Callback]:
    """Tune's own callbacks. Where they write is set as their users do: MLFLOW_TRACKING_URI, WANDB_MODE and the like;
    without it MLflow writes beside Tune's folders, in which TensorBoard's files lie."""
    callbacks: list[tune.Callback] = []
    if "tensorboard" in names:
        from ray.tune.logger import TBXLoggerCallback

        callbacks.append(TBXLoggerCallback())
    if "mlflow" in names:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"
        callbacks.append(MLflowLoggerCallback(tracking_uri=uri, experiment_name=f"raymerge-{searcher}"))
    if "wandb" in names:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks.append(WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", "raymerge"), group=searcher))
    return callbacks


@dataclass(frozen=True)
class SearchOutcome:
    """finished: candidates that ended in this call, failed ones too; wall_seconds: from start to end;
    share_not_scoring: share of the workers' time in that span in which they did not score (None where nothing was left
    to do). workers: for each that was there its name (as `trials` have it), candidates, scoring_seconds,
    present_seconds, utilisation."""

    finished: int
    wall_seconds: float
    share_not_scoring: float | None
    workers: tuple[dict[str, Any], ...] = ()


class _Trial(tune.Trainable):
    """Hands a batch to a pool worker and waits. Takes no CPU itself, and is reused from trial to trial."""

    def setup(  # type: ignore[override]  # what `tune.with_parameters` adds
        self, config: dict[str, Any], timeout_s: float, method: str, arguments: Sequence[Any], started: str
    ) -> None:
        self._timeout_s, self._method, self._arguments = timeout_s, method, arguments
        self._started = Path(started)
        self._handles: dict[str, Any] = {}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        try:
            self._wait_for_others()
            handle = self._handle(self.config["worker"])
            results = self._score(handle, self.config["candidates"])
            found: dict[str, Any] = {"results": results, **_averages(results)}
        except WorkerLost as error:
            found = {"lost": str(error)}
        except UserError as error:  # no fault of the candidate: it would befall every other one
            found = {"refused": error}
        return {"value": float("nan"), **found, "done": True}

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            self._handles[name] = find_worker(name)
        return self._handles[name]

    def _wait_for_others(self) -> None:
        """Let no trial of the first round end before all have started. Tune gives the actor of an ended trial to a
        trial whose own actor is still starting, and drops that one: with trials shorter than a start (1-3 s), all of
        them run on one actor, one process a trial is started in vain, and Tune waits ten seconds for those at the end.

        A trial that has started leaves a file, since all trials are on the driver's node. Workers could not be asked:
        they do not answer while they score, so that the first ones to score would keep the others waiting.
        """
        deadline = time.monotonic() + _START_S
        try:
            self._started.mkdir(parents=True, exist_ok=True)
            (self._started / self.config["worker"]).touch()
            while time.monotonic() < deadline:
                if all((self._started / name).exists() for name in self.config["first_round"]):
                    return
                time.sleep(0.02)
        except OSError:
            return  # Slower, no worse; a disk that is full is the record's to say.

    def _score(self, handle: Any, candidates: list[Point]) -> list[dict[str, Any]]:
        before = {"seconds": 0.0, "cpu_seconds": 0.0}
        try:
            while True:
                results = call_worker(handle, self._method, candidates, *self._arguments, timeout_s=self._timeout_s)
                if not any(result.get("unfinished") for result in results):
                    break
                # A descent may take longer than a call may: it goes on from where it is.
                before = {key: value + results[0][key] for key, value in before.items()}
            if any(before.values()):
                results[0] |= {key: value + results[0][key] for key, value in before.items()}
            return results
        except (WorkerLost, UserError):  # all that Ray says instead of an answer is a lost worker
            raise
        except Exception as error:  # whatever the worker's own code raises ends as the candidate's error
            if len(candidates) == 1:
                return [{"error": f"{type(error).__name__}: {error}"[:2000]}]
        # One bad candidate must not take its batch along: each is tried alone.
        return [result for candidate in candidates for result in self._score(handle, [candidate])]


def _averages(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over a batch's candidates, for loggers: they show numbers."""
    means = {}
    for key in ("value", "accuracy", "nll", "perplexity", "seconds"):
        values = [result[key] for result in results if isinstance(result.get(key), float)]
        if values:
            means[key] = math.fsum(values) / len(values)
    return means


@dataclass(frozen=True)
class _Batch:
    """Candidates that go to a worker together; `losses`: the node of each worker that died or hung over them."""

    number: int
    iterations: list[int]
    points: list[Point]
    losses: tuple[str, ...] = ()


class _Supply:
    """The batches that no worker has yet: those of lost workers, then new proposals, of which one may be made ahead."""

    def __init__(self, proposer: Proposer, *, candidates: int, batch: int, replayed: Sequence[Row]):
        self._proposer, self._size = proposer, batch
        # Numbers that a killed run had given to candidates which did not end are given again.
        finished = {row["iteration"] for row in replayed}
        free = [number for number in range(candidates) if number not in finished]
        self._iterations = free[: candidates - len(replayed)]
        self._numbers = itertools.count(1 + max((row["batch"] for row in replayed), default=-1))
        self._again: list[_Batch] = []
        self._ahead: _Batch | None = None

    @property
    def is_empty(self) -> bool:
        return not self._iterations and not self._again and self._ahead is None

    @property
    def batches_left(self) -> int:
        """How many are to be proposed."""
        return -(-len(self._iterations) // self._size)

    def take(self, running: Sequence[_Batch]) -> _Batch:
        """The next batch; running: those whose candidates the proposer has not been told of. There must be one."""
        if self._again:
            return self._again.pop(0)
        batch, self._ahead = self._ahead or self._propose(running), None
        return batch

    def look_ahead(self, running: Sequence[_Batch]) -> None:
        """Propose the next batch, if that has not been done."""
        if self._ahead is None and self._iterations:
            self._ahead = self._propose(running)

    def repeat(self, batch: _Batch, losses: tuple[str, ...]) -> None:
        """Give the candidates of a batch out once more, each alone, so that one that kills its worker fails by
        itself."""
        alone = len(batch.points) == 1
        self._again += [
            _Batch(batch.number if alone else next(self._numbers), [iteration], [point], losses)
            for iteration, point in zip(batch.iterations, batch.points, strict=True)
        ]

    def _propose(self, running: Sequence[_Batch]) -> _Batch:
        iterations, self._iterations = self._iterations[: self._size], self._iterations[self._size :]
        pending = [point for batch in (*running, *self._again) for point in batch.points]
        return _Batch(next(self._numbers), iterations, self._proposer.ask(len(iterations), pending))


class BatchSearcher(Searcher):
    """Gives Tune one batch of candidates a trial, on a worker that is free; stores what comes back, then learns.

    candidates: how many rows there are to be in the end, including those in `replayed` (what the record of an
    interrupted search holds). batch: candidates a trial. concurrent: batches at a time at the most; None for as many as
    there are workers, however many that comes to be. describe: the columns of table `trials` that follow from a point:
    searcher, seed, objective, plan_id.
    """

    def __init__(
        self,
        proposer: Proposer,
        *,
        candidates: int,
        batch: int,
        pool: WorkerPool,
        concurrent: int | None = None,
        describe: Callable[[Point], Row],
        minimise: bool,
        record: Record,
        replayed: Sequence[Row] = (),
        on_progress: Callable[[int, float | None], None] | None = None,
    ):
        super().__init__(metric="value", mode="max")
        self._proposer, self._describe, self._record = proposer, describe, record
        self._minimise, self._on_progress = minimise, on_progress
        self.pool = pool
        self.candidates, self.concurrent = candidates, math.inf if concurrent is None else concurrent
        self._supply = _Supply(proposer, candidates=candidates, batch=batch, replayed=replayed)
        self._free = list(pool.present)
        self._running: dict[str, tuple[int, _Batch]] = {}
        self.scored: dict[str, list[float]] = {}  # actor -> seconds of each of its candidates in this call
        self.best: float | None = None  # value of the objective
        self.done = self.finished = 0
        self.failure: BaseException | None = None
        self.trial_failed = False  # with an error in Tune's folder
        self._replay(sorted(replayed, key=lambda row: row["iteration"]))
        self._first_round = self._free[: int(min(self.concurrent, self._supply.batches_left))]
        self._handed_out = 0

    def _replay(self, rows: Sequence[Row]) -> None:
        """Learn what the record has, as the search that made it did, so that it goes on as it would have. Where one
        batch is tried at a time, the next one is proposed before the values of the last one are known."""
        ahead = [row for row in rows if row["batch"] == rows[-1]["batch"]] if self._takes_turns else []
        for row in rows[: len(rows) - len(ahead)]:
            self._learn(row)
        if ahead:
            self._supply.look_ahead([_Batch(ahead[0]["batch"], [], [row["alphas"] for row in ahead])])
        for row in rows[len(rows) - len(ahead) :]:
            self._learn(row)

    @property
    def _takes_turns(self) -> bool:
        return min(self.concurrent, len(self._free)) == 1

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray omits FINISHED
        if self.failure is not None or (self._supply.is_empty and not self._running):
            return self.FINISHED
        try:
            self._free += self.pool.poll()
            if not self._free and not self._running:
                self.pool.require()
        except Exception as failed:
            # Tune would go on; it ends the search and is raised when Tune is done.
            self.failure = failed
            return self.FINISHED
        running = [batch for _, batch in self._running.values()]
        if self._supply.is_empty or not self._free or len(running) >= self.concurrent:
            # While the workers are busy: a proposal takes 0.1-0.2 s, for which a free one would wait.
            self._supply.look_ahead(running)
            return None
        batch, slot = self._supply.take(running), self._free.pop(0)
        self._running[trial_id] = (slot, batch)
        self._handed_out += 1
        first_round = self._first_round if self._handed_out <= len(self._first_round) else []
        return {
            "candidates": batch.points,
            "worker": self.pool.name_of(slot),
            "first_round": [self.pool.name_of(other) for other in first_round],
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._running:
            return
        slot, batch = self._running.pop(trial_id)
        self.trial_failed = self.trial_failed or error
        try:
            rows = self._store(trial_id, slot, batch, result or {}, error)
        except Exception as failed:  # of the record, and of what the pool writes down of a loss
            # Tune would take an exception here for the trial's; it ends the search and is raised when Tune is done.
            self.failure = self.failure or failed
            return
        self.finished += len(rows)
        for row in rows:
            self.scored.setdefault(row["actor"], []).append(row["seconds"])
            self._learn(row)

    def _store(self, trial_id: str, slot: int, batch: _Batch, result: dict[str, Any], error: bool) -> list[Row]:
        """Store what a trial has found, also when the search is to end: what other workers have finished by then may be
        the work of hours. Returns the rows; none of a batch that is to be tried again, now or at the next start."""
        node = self._release(slot, result)
        if result.get("refused"):
            self.failure = self.failure or result["refused"]
            return []
        results, count = result.get("results"), len(batch.points)
        if error or results is None:
            if self._repeat(batch, node):
                return []
            cause = result.get("lost") or "the Tune trial failed; its error stands in Tune's folder of the run"
            results = [{"error": cause}] * count
        elif len(results) != count:
            results = [{"error": f"the worker gave {len(results)} results for {count} candidates"}] * count
        rows = [
            self._row(trial_id, slot, batch.number, iteration, point, found)
            for iteration, point, found in zip(batch.iterations, batch.points, results, strict=True)
        ]
        self._record(f"{rows[0]['searcher']}-{batch.number:06d}", rows, results)
        results.clear()  # Tune keeps this list to the end, answers and all: in Ray's store, then copied by the driver
        return rows

    def _release(self, slot: int, result: Mapping[str, Any]) -> str:
        """Take note of what has become of a trial's worker; return the node that it was on if it was lost, else ""."""
        if result.get("lost"):
            node = self.pool.lose(slot, result["lost"])
            self._free = self.pool.answering(self._free)
            return node
        if result.get("results") is not None:
            self._free.append(slot)
            self.pool.succeeded(slot)
        elif not result.get("refused"):  # the trial failed, which says nothing of the worker
            self._free += self.pool.answering([slot])
        return ""

    def _repeat(self, batch: _Batch, node: str) -> bool:
        """Give a batch whose worker was lost out once more; False where the pool gives it up."""
        losses = (*batch.losses, node)
        if self.pool.gives_up(losses):
            return False
        self._supply.repeat(batch, losses)
        return True

    def _row(self, trial_id: str, slot: int, batch: int, iteration: int, point: Point, found: Mapping[str, Any]) -> Row:
        point = found.get("alphas", point)  # a descent ends elsewhere than where it started
        return {
            **self._describe(point),
            "iteration": iteration,
            "batch": batch,
            "tune_trial": trial_id,
            "actor": f"worker-{slot}",
            "alphas": point,
            **trial_outcome(found),
            "seconds": found.get("seconds", 0.0),
            "cpu_seconds": found.get("cpu_seconds"),
        }

    def _learn(self, row: Row) -> None:
        self.done += 1
        score = None
        if row["status"] == "ok":
            value, better = row["value"], min if self._minimise else max
            self.best = value if self.best is None else better(self.best, value)
            # Accuracy over few questions is a staircase with ties, which the likelihood of the answers breaks.
            score = -value if self._minimise else value - _TIE_BREAK * (row["nll"] or 0.0)
        self._proposer.tell(row["alphas"], score)
        if self._on_progress is not None:
            self._on_progress(self.done, self.best)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher for `Tuner.restore`, which is not used: the caller's record is the state.
        return {"_metric": self._metric, "_mode": self._mode}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the caller's record is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the caller's record is the state."""


def run_search(
    batches: BatchSearcher,
    *,
    name: str,
    storage_path: str,
    method: str = "score",
    arguments: Sequence[Any] = (),
    loggers: Sequence[str] = (),
) -> SearchOutcome:
    """Evaluate candidates on the pool's workers until all that `batches` is to try have a row, replayed ones included.

    name: of the searcher, which Tune's folders and loggers show. loggers: which of Tune's own (see `check_loggers`) get
    each trial's averages; they write under `storage_path`.

    The worker's `method` takes a list of points (and `arguments`) and returns, for each, a dict with value, accuracy,
    nll, n_questions and seconds, and where it ended elsewhere alphas. A candidate whose worker raises, is lost too
    often (`WorkerPool.gives_up`), or scores NaN ends as a failed row with its error. Raises what the record raises, a
    UserError that scoring raises, and NoRoomError where no worker is left or a disk is full, after Tune has stopped.
    """
    if batches.done >= batches.candidates:
        return SearchOutcome(0, 0.0, None)
    _quiet_tune()
    pool = batches.pool
    began, before = time.monotonic(), pool.seconds_present()
    folder, run_name = Path(storage_path).absolute(), f"{name}-{uuid.uuid4().hex[:8]}"
    options = {"timeout_s": pool.timeout_s, "method": method, "arguments": arguments}
    trainable = tune.with_parameters(_Trial, **options, started=str(folder / run_name / "started"))
    with _without_false_alarms(), _own_files(batches, folder):
        tuner = tune.Tuner(
            # The workers have the CPUs; a trial takes what only the driver's node has.
            tune.with_resources(trainable, {"cpu": 0, driver_node(): _PIN}),
            tune_config=tune.TuneConfig(search_alg=batches, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name=run_name,
                storage_path=storage_path,
                verbose=0,
                callbacks=_callbacks(loggers, name, str(folder)),
                failure_config=tune.FailureConfig(max_failures=2),
                # A trial holds nothing that could be saved.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    if batches.failure is not None:
        raise batches.failure
    if batches.done < batches.candidates:
        # Tune ends quietly where it is told to stop; a search that is cut short must not pass for a whole one.
        raise WorkerError(
            f"Tune stopped after {batches.done} of {batches.candidates} candidates; start again to resume"
        )
    if not (loggers or batches.trial_failed):
        # A folder for each trial and 17 kB of Tune's state, for a restart, which here goes by the record instead.
        shutil.rmtree(folder / run_name, ignore_errors=True)
    wall = time.monotonic() - began
    present = {slot: seconds - before.get(slot, 0.0) for slot, seconds in pool.seconds_present().items()}
    workers = _utilisation(present, batches.scored)
    capacity = min(sum(row["present_seconds"] for row in workers), wall * batches.concurrent)
    scoring = sum(row["scoring_seconds"] for row in workers)
    return SearchOutcome(batches.finished, wall, 1.0 - scoring / capacity, workers)


def _utilisation(present: Mapping[int, float], scored: Mapping[str, Sequence[float]]) -> tuple[dict[str, Any], ...]:
    """`SearchOutcome.workers`. present: seconds by slot; scored: seconds of each candidate, by actor."""
    rows = []
    for slot, here in present.items():
        seconds = scored.get(f"worker-{slot}", [])
        if here > 0.0:
            rows.append(
                {
                    "worker": f"worker-{slot}",
                    "candidates": len(seconds),
                    "scoring_seconds": round(sum(seconds), 3),
                    "present_seconds": round(here, 3),
                    "utilisation": round(sum(seconds) / here, 4),
                }
            )
    return tuple(rows)


# Tune looks for the metrics files of its default loggers, which are off, and warns that every trial lacks them: seen
# where the user has started Ray, whose loggers then say more than those of a Ray that is started here. At its end it
# says that a trial whose actor died did not complete, though another one has done its batch. Where the disk of its
# folder is full it shows a trace: its own state, which is not used, could not be copied there.
_FALSE_ALARMS = {
    "ray.tune.analysis.experiment_analysis": logging.ERROR,
    "ray.tune.execution.experiment_state": logging.CRITICAL,
    "ray.tune.tune": logging.CRITICAL,
}


@contextmanager
def _own_files(batches: BatchSearcher, folder: Path) -> Iterator[None]:
    """Tune raises where it cannot write its own files (at its end a ValueError: there are none). That is no error if
    the record has all that was to be tried, or if why the search ended is known; otherwise NoRoomError is raised where
    a disk is full."""
    try:
        yield
    except (OSError, ValueError) as error:
        if batches.failure is not None or batches.done >= batches.candidates:
            return
        # Ray's timeouts and a logger's lost connection are OSErrors too.
        if not (isinstance(error, OSError) and any(words in str(error) for words in NO_ROOM)):
            raise
        raise NoRoomError(
            f"Tune cannot write its own files, in {folder} and Ray's temporary folder: {error}; free space there (or "
            "set output.cache to another disk), then run the same command again: what is finished is stored"
        ) from error


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in _FALSE_ALARMS}
    try:
        for name, level in _FALSE_ALARMS.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _quiet_tune() -> None:
    # Without the default loggers the driver needs a third of the CPU a trial; snapshots are not read.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # A trial actor that dies is started again: its trace, in a terminal, would say that the search has failed.
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # Tune would take Ctrl-C for a wish to end early and return as if all were done.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
