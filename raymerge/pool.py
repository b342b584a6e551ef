"""Plain worker classes as Ray actors: placement, one call at a time, and what to do when one dies or hangs."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from raymerge.errors import UserError
from raymerge.progress import Progress, Silent, step

_ATTEMPTS = 3  # how often one item is tried before its failure is the pool's
_PAUSE_S = 0.3  # before an actor that is restarting is asked again; each such call itself takes 1-2 s to be refused


class WorkerError(RuntimeError):
    """Work that no worker could do; the message names the call, the worker and the cause."""


class WorkerLost(WorkerError):
    """One call did not end: its worker died or hung. `gone` says that the worker did not come back either."""

    def __init__(self, message: str, gone: bool):
        super().__init__(message)
        self.gone = gone


class PlacementError(UserError):
    """More workers asked for than the cluster has room for; the message has the figures."""


@dataclass(frozen=True)
class Placement:
    """How many workers, and what each takes of a machine."""

    count: int
    cpus: float
    gpus: float


def plan_workers(
    count: int | str, gpus_per_worker: float | str, cpus_per_worker: float, resources: Mapping[str, float]
) -> Placement:
    """Choose how many workers fit. "auto" takes one GPU a worker where there are GPUs, else CPUs alone, and as many
    workers as fit; resources are a cluster's totals by Ray's names ("CPU", "GPU").

    Raises PlacementError where more are asked for than fit.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    per_gpu = float(gpus >= 1) if gpus_per_worker == "auto" else float(gpus_per_worker)
    by_cpu = int(cpus // cpus_per_worker)
    fits = min(by_cpu, int(gpus / per_gpu + 1e-9)) if per_gpu else by_cpu
    wanted = max(fits, 1) if count == "auto" else int(count)
    if wanted > fits:
        raise PlacementError(
            f"{wanted} workers of {cpus_per_worker:g} CPUs and {per_gpu:g} GPUs do not fit: the cluster has {cpus:g} "
            f"CPUs and {gpus:g} GPUs, room for {fits}; lower workers.count, workers.cpus_per_worker or "
            "workers.gpus_per_worker"
        )
    return Placement(wanted, cpus_per_worker, per_gpu)


def cluster_resources() -> dict[str, float]:
    """What the cluster has in all."""
    return ray.cluster_resources()


@contextmanager
def start_ray(*, num_cpus: int | None = None, progress: Progress | None = None) -> Iterator[None]:
    """Use the Ray there is - a job's, RAY_ADDRESS's or this process's - else start a local one and end it after.

    The local one listens on 127.0.0.1 only and has `num_cpus` (logical) CPUs, else the machine's.
    """
    if ray.is_initialized():
        yield
        return
    # No dashboard: a search needs none, and it would listen on a port.
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "include_dashboard": False}
    with step(progress or Silent(), "starting Ray"):
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**options)
        else:
            with _loopback_only():
                ray.init(address="local", num_cpus=num_cpus, **options)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray takes the machine's outer address even for `_node_ip_address="127.0.0.1"`, and binds its ports on all of
    them; only its switch for desktops without multi-node clusters keeps it on the loopback (seen with 2.60). Ray's
    processes read the switch from the environment, this one read it when Ray was imported."""
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, os.environ[name] = os.environ.get(name), "0"
    enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Host:
    """The actor: makes the plain worker and calls it."""

    def __init__(self, worker_class: type, kwargs: Mapping[str, Any]):
        self.worker = worker_class(**kwargs)
        self._marks: set[str] = set()

    def mark(self, name: str) -> None:
        self._marks.add(name)

    def marked(self, name: str) -> bool:
        return name in self._marks

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)


def call_worker(handle: Any, method: str, *args: Any, timeout_s: float) -> Any:
    """Call one worker once and wait for the answer, `timeout_s` at most.

    What the worker's own code raises is raised here. A worker that dies or does not answer is restarted and waited
    for, and WorkerLost raised: whether to ask again, and whom, is the caller's choice.
    """
    reference = handle.call.remote(method, *args)
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        ray.kill(handle, no_restart=False)
        cause = f"no answer in {timeout_s:g} s"
    except RayActorError as error:
        cause = _reason(error)
    raise WorkerLost(f"{method}: {cause}", gone=not _wait_until_back(handle, timeout_s))


def _wait_until_back(handle: Any, timeout_s: float) -> bool:
    """Whether a restarting actor is ready within `timeout_s`. Calls to it fail at once until it is."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            ray.get(handle.__ray_ready__.remote(), timeout=left)
            return True
        except (ActorDiedError, GetTimeoutError):
            return False
        except RayActorError:
            time.sleep(_PAUSE_S)
    return False


def _reason(error: Exception) -> str:
    """An actor's death in a line. What its constructor raised stands at the end of Ray's text, other causes first."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1 if 'creation task' in lines[0] else 0].strip()}"


class WorkerPool:
    """`count` actors, each holding one worker made by worker_class(**kwargs).

    A worker needs nothing but its constructor, which Ray runs again when it restarts an actor (at most `max_restarts`
    times); kwargs must be small, since Ray keeps arguments over 100 kB in an object store that a restart may outlive.
    `timeout_s` is how long one call, or a start, may take before the actor counts as hanging. The pool waits for its
    workers; those for which there is no room by then are left out. WorkerError where one's constructor raises or none
    starts.
    """

    def __init__(
        self,
        worker_class: type,
        kwargs: Mapping[str, Any],
        *,
        count: int,
        cpus_per_worker: float = 1,
        gpus_per_worker: float = 0,
        timeout_s: float = 600.0,
        max_restarts: int = 3,
    ):
        self.timeout_s = timeout_s
        threads = str(max(1, int(cpus_per_worker)))
        actor = ray.remote(_Host).options(
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker,
            max_restarts=max_restarts,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}},
        )
        self.handles = [actor.remote(worker_class, dict(kwargs)) for _ in range(count)]
        try:
            self._wait_for_starts(f"{worker_class.__name__} of {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs")
        except BaseException:
            self.close()
            raise

    def _wait_for_starts(self, what: str) -> None:
        started = {handle.__ray_ready__.remote(): handle for handle in self.handles}
        ready, late = ray.wait(list(started), num_returns=len(started), timeout=self.timeout_s)
        for reference in ready:
            try:
                ray.get(reference)
            except RayActorError as error:
                raise WorkerError(f"{what} did not start: {_reason(error)}") from error
        for reference in late:
            ray.kill(started[reference])
        self.handles = [started[reference] for reference in started if reference not in late]
        if not self.handles:
            raise WorkerError(f"no {what} started in {self.timeout_s:g} s; the cluster has {ray.cluster_resources()}")

    @property
    def count(self) -> int:
        return len(self.handles)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        for handle in self.handles:
            ray.kill(handle)
        self.handles = []

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every worker at once; results in the workers' order. A call that a death or a hang ended
        is repeated on the same worker as in `map`."""
        calls = [(method, args, slot) for slot in range(self.count)]
        return self._run(calls, None)

    def map(self, method: str, items: Sequence[Any], on_result: Callable[[int, Any], None] | None = None) -> list[Any]:
        """Call a method once an item, each worker taking the next item when it is free; results in items' order.

        on_result(number, result) is called as results come. An item whose worker died or hung is tried again, three
        times in all, by whichever worker is free; the worker gets work again when its restart is through. Raises what
        the worker's own code raises, at once, and WorkerError where an item failed three times or no worker is left.
        """
        return self._run([(method, (item,), None) for item in items], on_result)

    def _run(
        self, calls: Sequence[tuple[str, tuple, int | None]], on_result: Callable[[int, Any], None] | None
    ) -> list[Any]:
        """Make calls (method, arguments, slot or None for any), one at a time on each worker."""
        results: list[Any] = [None] * len(calls)
        waiting, attempts = deque(range(len(calls))), [0] * len(calls)
        free = list(range(self.count))
        # reference -> (slot, number of the call, deadline); number None: the slot is restarting.
        running: dict[Any, tuple[int, int | None, float]] = {}
        causes: dict[int, Exception] = {}

        def start(slot: int, number: int | None) -> None:
            if number is None:
                reference = self.handles[slot].__ray_ready__.remote()
            else:
                method, args, _ = calls[number]
                attempts[number] += 1
                reference = self.handles[slot].call.remote(method, *args)
            running[reference] = (slot, number, time.monotonic() + self.timeout_s)

        while waiting or running:
            for slot in list(free):
                number = next((n for n in waiting if calls[n][2] in (None, slot)), None)
                if number is not None:
                    free.remove(slot)
                    waiting.remove(number)
                    start(slot, number)
            if not running:
                raise WorkerError(f"no worker is left for {calls[waiting[0]][0]}: {causes}")
            soonest = min(deadline for _, _, deadline in running.values())
            done, _ = ray.wait(list(running), timeout=max(0.0, soonest - time.monotonic()))
            overdue = [] if done else [ref for ref, (_, _, deadline) in running.items() if deadline <= time.monotonic()]
            for reference in done or overdue:
                slot, number, _ = running.pop(reference)
                try:
                    if overdue:
                        ray.kill(self.handles[slot], no_restart=number is None)
                        raise GetTimeoutError(f"no answer in {self.timeout_s:g} s")
                    result = ray.get(reference)
                except RayTaskError as error:
                    # A user's mistake that only a worker can see reads as well as one that the driver sees.
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
                except (RayActorError, GetTimeoutError) as error:
                    causes[slot] = error
                    died = isinstance(error, ActorDiedError)  # Its restarts are used up: its slot is never free again.
                    if number is not None:
                        attempts[number] -= died  # A worker lost in earlier work is none of this item's doing.
                        if attempts[number] >= _ATTEMPTS:
                            raise self._failed(calls[number], number, slot, error) from error
                        waiting.appendleft(number)
                    if died or (number is None and overdue):
                        continue
                    time.sleep(_PAUSE_S)
                    start(slot, None)
                else:
                    free.append(slot)
                    if number is not None:
                        results[number] = result
                        if on_result is not None:
                            on_result(number, result)
        return results

    def _failed(self, call: tuple[str, tuple, int | None], number: int, slot: int, error: Exception) -> WorkerError:
        method, args, _ = call
        return WorkerError(
            f"{method} of item {number} ({args!r:.200}) failed {_ATTEMPTS} times, the last time on worker {slot}: "
            f"{_reason(error)}"
        )
