"""One worker as a Ray actor: the process that it runs in, a call to it, and what Ray says instead of an answer."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from raymerge.errors import UserError

# What every call to an actor gives that Ray will not start again. The last three are no RayActorErrors: an actor that
# was killed for the node's memory gives OutOfMemoryError once its restarts are used up.
GIVEN_UP = (ActorDiedError, ActorUnschedulableError, OutOfMemoryError, RuntimeEnvSetupError)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PARTICULARS = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:")


class WorkerError(RuntimeError):
    """Work that no worker could do; the message names the call, the worker and the cause."""


class WorkerLost(WorkerError):
    """One call did not end: its worker died or hung, or its node is gone."""


class NoRoomError(UserError):
    """No worker is left, or a disk or Ray's object store is full: no fault of what is computed. The message says what
    to do; what is finished is stored."""


class OtherCodeError(UserError):
    """Workers whose machines lack this package or what it needs, or have another version of it."""


# What Python says on a machine where something cannot be imported, or of another version's classes.
_OTHER_CODE = ("ModuleNotFoundError:", "ImportError:", "AttributeError: Can't get attribute")


# glibc gives back every block beyond 32 MB when it is freed, so that each layer's weights and activations are new pages
# which the kernel clears: converting a layer takes 11 times as long (docs/results.md, 2026-11-24). Keep up to 1 GiB.
_ALLOCATION = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
# Chunks of candidates differ a little in their sizes: in segments of fixed sizes one's block may be too small for the
# next one's, and giving segments back for larger ones waits for the device.
_DEVICE_ALLOCATION = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
_OLDER_NAME = "PYTORCH_CUDA_ALLOC_CONF"  # which torch reads still


def environment(cpus: float, gpus: float) -> dict[str, str]:
    """Variables of the process of a worker with so many CPUs and GPUs."""
    threads = {"OMP_NUM_THREADS": str(max(1, int(cpus))), "OMP_WAIT_POLICY": "passive"}
    return _ALLOCATION | threads | _device_allocation(gpus)


def _device_allocation(gpus: float) -> dict[str, str]:
    """Of a worker with a GPU, unless the user has settings of their own."""
    return {} if not gpus or {*_DEVICE_ALLOCATION, _OLDER_NAME} & set(os.environ) else _DEVICE_ALLOCATION


class Host:
    """The actor: makes the plain worker and calls it.

    A user's mistake that only the constructor can see, such as a model that does not fit, is kept and raised when the
    worker is first asked: Ray gives a constructor's error as text, which would lose its class. Where it is another node
    than the driver's, a user's mistake names its machine: a path may be wrong there alone.

    folder: where relative paths start, which is where the driver was started; None for a job's own folder, of which
    each node has its copy. driver: the driver's node.
    """

    def __init__(
        self, worker_class: type, kwargs: Mapping[str, Any], *, folder: str | None = None, driver: str | None = None
    ):
        if folder is not None:
            with contextlib.suppress(OSError):  # what it is missed for names the file
                os.chdir(folder)
        self._driver = driver
        self._refusal: UserError | None = None
        try:
            self.worker = worker_class(**kwargs)
        except UserError as error:
            self._refusal = self._from_here(error)

    def ready(self, method: str | None) -> tuple[str, str, Any]:
        """This node's id and address, and what the worker answers to `method`, if one is asked for."""
        if self._refusal is not None:
            raise self._refusal
        try:
            answer = None if method is None else getattr(self.worker, method)()
        except UserError as error:
            raise self._from_here(error) from None
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), answer

    def here(self) -> None:
        """Answers where this process is there and has nothing to do."""

    def call(self, method: str, *args: Any) -> Any:
        """What the worker's method returns.

        After an error that the worker is broken by (`broken_by`, where it has one) the process ends: the call is lost
        as by any other death, and tried again elsewhere or here, when Ray has started another process.
        """
        try:
            return getattr(self.worker, method)(*args)
        except UserError as error:
            raise self._from_here(error) from None
        except Exception as error:
            if getattr(self.worker, "broken_by", lambda _: False)(error):
                traceback.print_exc()  # in the worker's log: the caller hears of the death alone
                sys.stderr.flush()
                os._exit(1)
            raise

    def _from_here(self, error: UserError) -> UserError:
        """A user's mistake as the driver is to hear of it."""
        if self._driver is None or self._driver == ray.get_runtime_context().get_node_id():
            return error
        return type(error)(f"on the worker's machine {socket.gethostname()}: {error}")


def find_worker(name: str) -> Any:
    """The actor of that name, from any process of the job. WorkerLost if it is gone for good."""
    try:
        return ray.get_actor(name)
    except ValueError as error:
        raise WorkerLost(f"there is no actor {name} any more") from error


def call_worker(handle: Any, method: str, *args: Any, timeout_s: float) -> Any:
    """Call one worker once and wait for the answer, `timeout_s` at most.

    What the worker's own code raises is raised here, a full disk as NoRoomError. A worker that does not answer is
    killed, to be restarted; for it, for one that died and for whatever else Ray says instead of an answer WorkerLost is
    raised, at once: whether to ask again, and whom, is the caller's choice, and the restart is the pool's to wait for
    (`WorkerPool.lose`).
    """
    reference = handle.call.remote(method, *args)
    return answer_of(handle, method, reference, timeout_s)


def answer_of(handle: Any, method: str, reference: Any, timeout_s: float | None) -> Any:
    """The result of a call that was made; errors as `call_worker`."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        ray.kill(handle, no_restart=False)
        raise WorkerLost(f"{method}: no answer within workers.timeout_s, the worker hangs or is slower") from error
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise store_is_full(error) from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):  # reads as well as one that the driver sees
            raise cause from None
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise NoRoomError(
                f"{method}: {cause} on a worker's machine; free space (or set output.cache to another disk), then run "
                "the same command again: what is finished is stored"
            ) from error
        if isinstance(cause, RayError):  # such as an argument whose node is gone
            raise WorkerLost(f"{method}: {reason_of(error)}") from error
        raise
    except RayError as error:
        raise WorkerLost(f"{method}: {reason_of(error)}") from error


def not_started(what: str, error: RayError) -> Exception:
    """What to raise for workers that Ray could not start: their processes' deaths are the machine's doing."""
    reason = reason_of(error)
    if isinstance(error, ActorDiedError | OutOfMemoryError) and not _is_raised(error):
        return NoRoomError(
            f"{what} did not start: {reason} Make room in the machine's memory and in Ray's temporary folder, or lower "
            "workers.count, and run the same command again"
        )
    if not any(words in reason for words in _OTHER_CODE):
        return WorkerError(f"{what} did not start: {reason}")
    return OtherCodeError(
        f"{what} did not start: {reason}. Every machine needs this raymerge and its dependencies: install the same "
        "versions there, or submit a job, which brings its own raymerge along (ray job submit --working-dir)"
    )


def store_is_full(error: Exception) -> NoRoomError:
    """What to raise for an object store that has no room, and whose disk has none."""
    return NoRoomError(
        f"Ray's object store is full, and so is the disk behind it ({str(error).splitlines()[0]}): free space in "
        "Ray's temporary folder, then run the same command again: what is finished is stored"
    )


def _is_raised(error: Exception) -> bool:
    """Whether an actor's death is an error that its constructor raised."""
    return "creation task" in str(error).lstrip().partition("\n")[0]


def reason_of(error: Exception) -> str:
    """An actor's death in a line: what its constructor raised stands at the end of Ray's text; of another death first
    what Ray calls it, then, after the actor's particulars, why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if _is_raised(error):
        return f"{type(error).__name__}: {lines[-1]}"
    why = next((line for line in lines[1:] if not line.startswith(_PARTICULARS)), "")
    return f"{type(error).__name__}: {lines[0]} {why}".strip()
