"""Plain worker classes as Ray actors: placement, one call at a time, and what to do when one dies or hangs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError

_ATTEMPTS = 3  # how often one item is tried before its failure is the pool's
_PAUSE_S = 1.0  # before an actor that was restarting is asked again


class WorkerError(RuntimeError):
    """Work that no worker could do; the message names the call, the worker and the cause."""


class PlacementError(ValueError):
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
def start_ray() -> Iterator[None]:
    """Use the Ray there is - a job's, RAY_ADDRESS's or this process's - else start a local one and end it after."""
    if ray.is_initialized():
        yield
        return
    # No dashboard: a search needs none, and it would listen on a port.
    ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False, configure_logging=True)
    try:
        yield
    finally:
        ray.shutdown()


class _Host:
    """The actor: makes the plain worker and calls it."""

    def __init__(self, worker_class: type, kwargs: Mapping[str, Any]):
        self.worker = worker_class(**kwargs)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)


def call_worker(handle: Any, method: str, *args: Any, timeout_s: float, attempts: int = _ATTEMPTS) -> Any:
    """Call one worker and wait; a worker that dies or is silent for `timeout_s` is restarted and asked again.

    What the worker's own code raises is raised here. WorkerError after `attempts`.
    """
    cause = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(_PAUSE_S)
        try:
            return ray.get(handle.call.remote(method, *args), timeout=timeout_s)
        except GetTimeoutError:
            cause = f"no answer in {timeout_s:g} s"
            ray.kill(handle, no_restart=False)
        except RayActorError as error:
            cause = _first_line(error)
    raise WorkerError(f"{method} failed {attempts} times on one worker, the last time: {cause}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


class WorkerPool:
    """`count` actors, each holding one worker made by worker_class(**kwargs).

    A worker needs nothing but its constructor, which Ray runs again when it restarts an actor (at most `max_restarts`
    times); kwargs must be small, since Ray keeps arguments over 100 kB in an object store that a restart may outlive.
    `timeout_s` is how long one call may take before the actor counts as hanging.
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
        """Call a method on every worker at once; results in the workers' order."""
        return ray.get([handle.call.remote(method, *args) for handle in self.handles], timeout=self.timeout_s)

    def map(self, method: str, items: Sequence[Any], on_result: Callable[[int, Any], None] | None = None) -> list[Any]:
        """Call a method once an item, each worker taking the next item when it is free; results in items' order.

        on_result(number, result) is called as results come. An item whose worker died or hung is tried again, three
        times in all, by whichever worker is free. Raises what the worker's own code raises, at once, and WorkerError
        where an item failed three times or no worker is left.
        """
        results: list[Any] = [None] * len(items)
        waiting = deque(range(len(items)))
        attempts = [0] * len(items)
        free = deque(range(self.count))
        running: dict[Any, tuple[int, int, float]] = {}  # reference -> (slot, item, deadline)
        while waiting or running:
            while waiting and free:
                slot, number = free.popleft(), waiting.popleft()
                attempts[number] += 1
                reference = self.handles[slot].call.remote(method, items[number])
                running[reference] = (slot, number, time.monotonic() + self.timeout_s)
            if not running:
                raise WorkerError(f"no worker is left for {method}: all {self.count} died more often than allowed")
            soonest = min(deadline for _, _, deadline in running.values())
            done, _ = ray.wait(list(running), timeout=max(0.0, soonest - time.monotonic()))
            overdue = [ref for ref, (_, _, deadline) in running.items() if deadline <= time.monotonic()]
            for reference in done or overdue:
                slot, number, _ = running.pop(reference)
                try:
                    if not done:
                        ray.kill(self.handles[slot], no_restart=False)
                        raise GetTimeoutError(f"no answer in {self.timeout_s:g} s")
                    results[number] = ray.get(reference)
                except (RayActorError, GetTimeoutError) as error:
                    if attempts[number] >= _ATTEMPTS:
                        raise WorkerError(
                            f"{method} of item {number} ({items[number]!r:.200}) failed {_ATTEMPTS} times, the last "
                            f"time on worker {slot}: {_first_line(error)}"
                        ) from error
                    waiting.appendleft(number)
                    if isinstance(error, ActorDiedError):
                        continue  # It died for good: its slot is never free again.
                    time.sleep(_PAUSE_S)
                else:
                    if on_result is not None:
                        on_result(number, results[number])
                free.append(slot)
        return results
