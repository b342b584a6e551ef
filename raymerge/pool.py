"""Which workers there are, what each does, and what happens to it when one dies or hangs.

A pool is never sure of its workers: nodes come and go, processes die, calls hang. So nothing waits for a particular
worker. One that is lost is out of the pool until its restart is through, wherever that happens, and what it was doing
is free to be done by another; one that comes later than the rest joins in.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from raymerge.actors import (
    GIVEN_UP,
    Host,
    NoRoomError,
    WorkerError,
    WorkerLost,
    answer_of,
    environment,
    not_started,
    reason_of,
    store_is_full,
)
from raymerge.config import WorkersConfig
from raymerge.errors import UserError

_DEFAULTS = WorkersConfig()
_ATTEMPTS = 3  # how often one item is tried before its failure is the pool's
_NODES_LOST = 10  # how often an item's worker may be lost with its node: an item that takes nodes down must end too
_PAUSE_S = 0.3  # before an actor that is restarting is asked again; each such call itself takes 1-2 s to be refused
_POLL_S = 1.0  # between looks at what is restarting, while others work
_GROW_S = 5.0  # between looks at what the cluster has
_ANSWER_S = 5.0  # for a worker that has nothing to do to say that it is there
_PATIENCE_S = 10.0  # how long the first worker waits for the others at the start, if it started faster than that


@dataclass
class _Slot:
    """One place in the pool: its actor, which may be there or awaited, or gone for good."""

    handle: Any = None
    name: str = ""
    node: str = ""  # the id of the node that it is, or last was, on
    ready: Any = None  # the reference that says that an awaited actor is there
    asked: Any = None  # the admission (see `admit`) that `ready` was asked with
    ask_at: float = 0.0  # when to ask again whether it is
    since: float | None = None  # when it came; None: it is awaited
    seconds: float = 0.0  # for which it was there before it was lost
    losses: int = 0  # of this actor, since it last finished something
    proved: bool = False  # it has finished something
    gone: str = ""  # why it will not come back

    @property
    def is_present(self) -> bool:
        return self.since is not None

    @property
    def is_awaited(self) -> bool:
        """Starting, restarting, or waiting for a node to run on."""
        return self.since is None and not self.gone


class WorkerPool:
    """Up to `count` actors, each holding one worker made by worker_class(**kwargs), spread over the nodes.

    A worker needs nothing but its constructor, which Ray runs again when it restarts an actor, on whatever node has
    room; kwargs must be small, since Ray keeps arguments over 100 kB in an object store that a restart may outlive.
    An actor that dies more than `max_restarts` times is replaced by another if it ever finished anything, else gone.

    timeout_s: how long one call may take before the actor counts as hanging. wait_s: how long to wait while there is
    no worker at all, at the start or later. grow: asked from time to time how many workers there should be; a pool
    never gives up workers for it. on_event(kind, worker, detail) hears of every worker that was "lost", came "back" or
    "joined" late, was "replaced", is "gone" for good or "refused" to take part.

    The pool opens when all workers are there, or once it has waited for the others twice as long as for the first, and
    at least 10 s longer. Those join when they come; one that refuses then (its machine has other files, or the hub does
    not answer) is left out. Raises WorkerError where a constructor raises, UserError where it raises one or a machine
    lacks the code, NoRoomError where none starts.
    """

    def __init__(
        self,
        worker_class: type,
        kwargs: Mapping[str, Any],
        *,
        count: int,
        cpus_per_worker: float = 1,
        gpus_per_worker: float = 0,
        timeout_s: float = _DEFAULTS.timeout_s,
        wait_s: float = _DEFAULTS.wait_s,
        max_restarts: int = _DEFAULTS.max_restarts,
        grow: Callable[[], int] | None = None,
        on_event: Callable[[str, str, str], None] | None = None,
    ):
        self.timeout_s, self.wait_s, self.gpus_per_worker = timeout_s, wait_s, gpus_per_worker
        self._grow, self._grown_at, self._on_event = grow, time.monotonic(), on_event
        self._admission: tuple[str | None, Callable[[Any], None]] = (None, lambda _: None)
        self._what = f"{worker_class.__name__} of {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs"
        actor = ray.remote(Host)
        options = {
            "num_cpus": cpus_per_worker,
            "num_gpus": gpus_per_worker,
            "max_restarts": max_restarts,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": environment(cpus_per_worker, gpus_per_worker)},
        }
        here = ray.get_runtime_context()
        # Workers of a cluster that was there already start in another folder than the driver; those of a job that
        # brings its files along in their own copy of them.
        home = {"folder": None if "working_dir" in here.runtime_env else os.getcwd(), "driver": here.get_node_id()}
        self._start = lambda name: actor.options(name=name, **options).remote(worker_class, dict(kwargs), **home)
        self._slots: list[_Slot] = []
        self._open, self._empty_since = False, time.monotonic()
        try:
            self._add(count)
            self._wait_for_starts()
        except BaseException:
            self.close()
            raise

    def _add(self, count: int) -> None:
        for _ in range(count):
            self._slots.append(_Slot())
            self._fill(len(self._slots) - 1)

    def _fill(self, slot: int) -> None:
        """Start a new actor in a slot."""
        name = f"raymerge-{uuid.uuid4().hex[:12]}-{slot}"
        self._slots[slot] = _Slot(self._start(name), name, seconds=self._slots[slot].seconds)
        self._ask(self._slots[slot])

    def _ask(self, slot: _Slot) -> None:
        slot.asked, slot.since = self._admission, None
        slot.ready = slot.handle.ready.remote(self._admission[0])

    def _wait_for_starts(self) -> None:
        began, first = time.monotonic(), None
        while self.awaited:
            waiting = [slot.ready for slot in self._slots if slot.ready is not None]
            if waiting:
                ray.wait(waiting, timeout=_POLL_S)
            else:
                time.sleep(_PAUSE_S)
            if not self.poll():
                self.require()
            now = time.monotonic()
            if self.count and first is None:
                first = now - began
            # The others are awaited as long again; they join later if they take longer.
            if first is not None and now - began > first + max(first, _PATIENCE_S):
                break
        self._open = True

    # -- who is there

    @property
    def present(self) -> list[int]:
        """The slots whose worker is there, at work or free."""
        return [number for number, slot in enumerate(self._slots) if slot.is_present]

    @property
    def count(self) -> int:
        """How many workers are there."""
        return len(self.present)

    @property
    def awaited(self) -> int:
        """How many workers are starting, restarting, or waiting for a node to run on."""
        return sum(slot.is_awaited for slot in self._slots)

    def name_of(self, slot: int) -> str:
        """The name by which another process finds a slot's actor (`find_worker`)."""
        return self._slots[slot].name

    def seconds_present(self) -> dict[int, float]:
        """Seconds that each slot's worker has been there."""
        now = time.monotonic()
        return {
            number: slot.seconds + (0.0 if slot.since is None else now - slot.since)
            for number, slot in enumerate(self._slots)
        }

    def admit(self, method: str, check: Callable[[Any], None]) -> None:
        """From now on, call `method` of every worker that comes and `check` its answer before the worker gets work.

        A worker whose answer makes `check` raise a UserError is left out.
        """
        self._admission = method, check

    def poll(self) -> list[int]:
        """Slots whose worker has come, or come back, since the last call. Never waits; starts more where `grow` wants.

        Before the pool is open, raises UserError where a worker's constructor does, and WorkerError where it raises
        anything else; afterwards raises a worker's refusal only if no other is there or awaited.
        """
        now, came = time.monotonic(), []
        if self._grow is not None and self._open and now - self._grown_at > _GROW_S:
            self._grown_at = now
            self._add(max(0, self._grow() - len(self._slots)))
        for number, slot in enumerate(self._slots):
            if slot.is_awaited and slot.ask_at <= now and self._has_come(number, slot, now):
                came.append(number)
        return came

    def _has_come(self, number: int, slot: _Slot, now: float) -> bool:
        """Whether an awaited slot's worker has answered that it is there, and may take part; it is then present."""
        if slot.ready is None:
            self._ask(slot)
        if not ray.wait([slot.ready], timeout=0)[0]:
            return False
        try:
            node, address, answer = ray.get(slot.ready)
            if slot.asked is not self._admission:  # it was asked before there was this one
                self._ask(slot)
                return False
            self._admission[1](answer)
        except (RayTaskError, UserError) as error:
            self._refuse(number, error)
            return False
        except GIVEN_UP as error:
            self._replace(number, error)
            return False
        except RayError:
            slot.ready, slot.ask_at = None, now + _PAUSE_S
            return False
        slot.ready, slot.since, slot.node = None, now, node
        if self._open and not slot.losses:
            self._tell("joined", number, f"on {address}")
        elif self._open:
            alone = "" if self.count > 1 else f" after {now - self._empty_since:.0f} s"
            self._tell("back", number, f"on {address}{alone}")
        return True

    def lose(self, slot: int, reason: str) -> str:
        """A call to this worker did not end: it is out of the pool until Ray has restarted it. Returns the id of the
        node that it was on, for `gives_up`."""
        lost = self._slots[slot]
        if lost.since is not None:
            lost.seconds += time.monotonic() - lost.since
        lost.losses += 1
        self._tell("lost", slot, reason)
        self._ask(lost)
        if not self.count:
            self._empty_since = time.monotonic()
        return lost.node

    def gives_up(self, losses: Sequence[str]) -> bool:
        """Whether work is to be tried no more after its workers were lost on these nodes: three times on nodes that
        are there still, which is likely to be its own doing, or ten times in all.

        What a call raises does not tell a lost node from a dead process, but the list of nodes does: at once if the
        node says that it ends, but after 13 s if it just vanishes (Ray 2.60), 10 s after its workers' calls failed. So
        a loss may count as the work's own until this is asked again after the next one.
        """
        ended = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
        return len(losses) >= _NODES_LOST or sum(node not in ended for node in losses) >= _ATTEMPTS

    def succeeded(self, slot: int) -> None:
        """A call to this worker ended: what it was lost for before does not count any more."""
        self._slots[slot].losses, self._slots[slot].proved = 0, True

    def answering(self, slots: Sequence[int]) -> list[int]:
        """Of slots that have nothing to do, those whose workers are there still; the others are lost.

        Ask this whenever a worker is lost. Whatever took it, such as the end of its node, may have taken these too, and
        the work that it had would be given to each of them in turn, only to be lost again.
        """
        asked = {slot: self._slots[slot].handle.here.remote() for slot in slots}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
        found = []
        for slot, reference in asked.items():
            try:
                ray.get(reference, timeout=0.0)
            except RayError as error:
                self.lose(slot, f"while it had nothing to do: {reason_of(error)}")
            else:
                found.append(slot)
        return found

    def _replace(self, slot: int, error: RayError) -> None:
        """Ray will not restart a slot's actor: start another if it ever finished anything, else give the slot up."""
        if not self._open:
            raise not_started(self._what, error)
        reason = reason_of(error)
        ray.kill(self._slots[slot].handle)  # whatever is left of it has room that its successor needs
        if self._slots[slot].proved:
            self._fill(slot)
            self._slots[slot].losses = 1  # it comes back, it does not join
            self._tell("replaced", slot, reason)
        else:
            self._slots[slot].gone, self._slots[slot].ready = reason, None
            self._tell("gone", slot, reason)

    def _refuse(self, slot: int, error: Exception) -> None:
        """A worker raised instead of taking part: one that comes late is left out, for the others are at work. Raises
        the error at the start, where it is likely to be everyone's, and where no worker is left."""
        cause = getattr(error, "cause", error)
        raised = cause if isinstance(cause, UserError) else error
        if self._open:
            refusing = self._slots[slot]
            ray.kill(refusing.handle)
            refusing.gone = str(cause) if raised is cause else f"{type(cause).__name__}: {cause}"
            refusing.ready = None
            self._tell("refused", slot, refusing.gone)
            if self.count or self.awaited:
                return
        raise raised from None

    def require(self) -> None:
        """NoRoomError where no worker is there and none will come, or none has for `wait_s`."""
        if self.count:
            return
        has, free = (
            [f"{max(0.0, resources.get(name, 0.0)):g}" for name in ("CPU", "GPU")]
            for resources in (ray.cluster_resources(), ray.available_resources())
        )
        room = f"the cluster has {has[0]} CPUs and {has[1]} GPUs, {free[0]} and {free[1]} of them free"
        if not self.awaited:
            reasons = {f"worker-{number}": slot.gone for number, slot in enumerate(self._slots)}
            raise NoRoomError(
                f"no worker is left, each died more often than workers.max_restarts without finishing anything, or "
                f"refused to take part: {reasons}; {room}. What is finished is stored"
            )
        if time.monotonic() - self._empty_since > self.wait_s:
            raise NoRoomError(
                f"no {self._what} has been there for {self.wait_s:g} s (workers.wait_s); {room}. What is finished is "
                "stored: run the same command again when there is room"
            )

    def _tell(self, kind: str, slot: int, detail: str) -> None:
        if self._on_event is not None:
            self._on_event(kind, f"worker-{slot}", detail)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        for slot in self._slots:
            if slot.handle is not None and not slot.gone:
                ray.kill(slot.handle)
        self._slots = []

    # -- work

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every worker that is there, at once; their results in the slots' order. Arguments are
        serialised once, however many workers there are.

        A worker that is lost during the call is left out; if all are lost, those that come next are asked, three times
        in all.
        """
        try:
            shared = [ray.put(argument) for argument in args]
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise store_is_full(error) from error
        for _ in range(_ATTEMPTS):
            self._wait_for_one()
            calls = {slot: self._slots[slot].handle.call.remote(method, *shared) for slot in self.present}
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=self.timeout_s)
            results = []
            for slot, reference in calls.items():
                try:
                    results.append(answer_of(self._slots[slot].handle, method, reference, 0.0))
                except WorkerLost as error:
                    self.lose(slot, str(error))
                else:
                    self.succeeded(slot)
            if results:
                return results
        raise WorkerError(f"{method} killed every worker that was asked, {_ATTEMPTS} times")

    def _wait_for_one(self) -> None:
        while not self.count:
            self.require()
            if not self.poll():
                time.sleep(_PAUSE_S)

    def map(self, method: str, items: Sequence[Any], on_result: Callable[[int, Any], None] | None = None) -> list[Any]:
        """Call a method once an item, each worker taking the next item when it is free; results in items' order.

        on_result(number, result) is called as results come. An item whose worker was lost is tried again, by
        whichever worker is free, three times in all but for nodes that were lost (`gives_up`). Raises what the worker's
        own code raises, at once, WorkerError where an item failed so often, and NoRoomError where no worker is left.
        """
        results: list[Any] = [None] * len(items)
        waiting = deque(range(len(items)))
        losses: list[list[str]] = [[] for _ in items]
        free = self.present
        running: dict[Any, tuple[int, int, float]] = {}  # reference -> (slot, number of the item, deadline)
        while waiting or running:
            free += self.poll()
            while free and waiting:
                slot, number = free.pop(0), waiting.popleft()
                reference = self._slots[slot].handle.call.remote(method, items[number])
                running[reference] = slot, number, time.monotonic() + self.timeout_s
            if not running:
                self.require()
                time.sleep(_PAUSE_S)
                continue
            done, _ = ray.wait(list(running), timeout=_POLL_S)
            now = time.monotonic()
            overdue = [reference for reference, (_, _, deadline) in running.items() if deadline <= now]
            lost = False
            for reference in {*done, *overdue}:
                slot, number, _ = running.pop(reference)
                try:
                    found = answer_of(self._slots[slot].handle, method, reference, None if reference in done else 0.0)
                except WorkerLost as error:
                    lost = True
                    losses[number].append(self.lose(slot, str(error)))
                    if self.gives_up(losses[number]):
                        raise WorkerError(
                            f"{method} of item {number} ({items[number]!r:.200}) failed {len(losses[number])} times, "
                            f"the last time on worker {slot}: {error}"
                        ) from error
                    waiting.appendleft(number)
                else:
                    free.append(slot)
                    self.succeeded(slot)
                    results[number] = found
                    if on_result is not None:
                        on_result(number, found)
            if lost:
                free = self.answering(free)
        return results
