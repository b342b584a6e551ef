"""The cluster that workers are placed on: how to be connected to one, its nodes, and how many workers fit on them."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.job_config import JobConfig

from raymerge.errors import UserError
from raymerge.progress import SHOW_CURSOR, Progress, Silent, step

_REACH_S = 10.0  # for a head to take a connection
_LOOK_S = 1.0  # between looks at whether Ray's processes are there
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class ClusterError(UserError):
    """An address by which no cluster can be used; the message says which would do."""


class PlacementError(UserError):
    """More workers asked for than the cluster has room for; the message has the figures."""


@dataclass(frozen=True)
class Placement:
    """How many workers, and what each takes of a machine. by_memory: there are fewer than its CPUs have room for."""

    count: int
    cpus: float
    gpus: float
    by_memory: bool = False


def plan_workers(
    count: int | str,
    gpus_per_worker: float | str,
    cpus_per_worker: float,
    nodes: Sequence[Mapping[str, float]],
    *,
    memory: float = 0.0,
    autoscaling: bool = False,
) -> Placement:
    """Choose how many workers fit. "auto" takes one GPU a worker where there are GPUs, else CPUs alone, and as many
    workers as fit; nodes are what each node of a cluster has in all, by Ray's names ("CPU", "GPU", "memory").

    memory: bytes that a worker without a GPU takes, about. An automatic number is held to what nodes have memory for,
    but is at least one, and its workers share the CPUs that are left: sixteen workers of an 8B model, one for each CPU
    of a workstation, would ask for 300 GB.

    A worker is on one node, and a fraction of a GPU on one GPU. Raises PlacementError where more are asked for than
    fit, unless the cluster is an `autoscaling` one.
    """
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    per_gpu = float(gpus >= 1) if gpus_per_worker == "auto" else float(gpus_per_worker)
    fits = sum(_room(node, cpus_per_worker, per_gpu) for node in nodes)
    wanted = max(fits, 1) if count == "auto" else int(count)
    if wanted > fits and not autoscaling:
        raise PlacementError(
            f"{wanted} workers of {cpus_per_worker:g} CPUs and {per_gpu:g} GPUs do not fit: the cluster has {cpus:g} "
            f"CPUs and {gpus:g} GPUs, and its nodes have room for {fits}; lower workers.count, "
            "workers.cpus_per_worker or workers.gpus_per_worker, or set workers.autoscaling if the cluster grows on "
            "demand"
        )
    if count == "auto" and not per_gpu and memory:
        return _held_to_memory(wanted, cpus_per_worker, nodes, memory)
    return Placement(wanted, cpus_per_worker, per_gpu)


def _held_to_memory(wanted: int, cpus_each: float, nodes: Sequence[Mapping[str, float]], memory: float) -> Placement:
    """As many of the wanted workers on CPUs as nodes have memory for, at least one, with the CPUs of the others."""
    rooms = [min(_room(node, cpus_each, 0), int(node.get("memory", 1e18) // memory)) for node in nodes]
    if sum(rooms) >= wanted:
        return Placement(wanted, cpus_each, 0.0)
    if not any(rooms):  # tried all the same, where there is most
        largest = max(nodes, key=lambda node: (_room(node, cpus_each, 0) > 0, node.get("memory", 1e18)))
        return Placement(1, max(cpus_each, math.floor(largest["CPU"])), 0.0, by_memory=True)
    shares = [math.floor(node["CPU"] / room) for node, room in zip(nodes, rooms, strict=True) if room]
    return Placement(sum(rooms), max(cpus_each, min(shares)), 0.0, by_memory=True)


def _room(node: Mapping[str, float], cpus_each: float, gpus_each: float) -> int:
    """How many workers one node has room for."""
    by_cpu, gpus = int(node.get("CPU", 0.0) / cpus_each + 1e-9), int(node.get("GPU", 0.0))
    if not gpus_each:
        return by_cpu
    return min(by_cpu, gpus * int(1 / gpus_each + 1e-9) if gpus_each < 1 else gpus // math.ceil(gpus_each))


def cluster_nodes() -> list[dict[str, float]]:
    """What each node of the cluster that is there has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def driver_node() -> str:
    """The name of a Ray resource that only this process's node has, so that an actor can be kept on it."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    names = [name for name in node["Resources"] if name.startswith("node:")]
    # Nodes that share an address, as in tests, share its resource as well; the head's other one is its own.
    return next((name for name in names if name.endswith("__internal_head__")), names[0])


class _OwnCode(JobConfig):
    """Workers run the driver's raymerge. Ray (2.60) puts the folders where the driver and its script lie first in their
    search path, and with them whatever raymerge is there: on this machine a checkout in which an installed one is
    called, on others, to which the code is sent, an older checkout under the same path."""

    def _serialize(self) -> Any:  # bytes, which Ray (2.60) declares as a str; after Ray has added the folders
        package, sent = Path(__file__).parent, "py_modules" in (self.runtime_env or {})
        # Ray's own, which another version may not have: workers of other code are then refused when they are described.
        there = getattr(self, "_py_driver_sys_path", [])
        self._py_driver_sys_path = [
            folder for folder in there if not sent and _is_or_lacks(Path(folder) / package.name, package)
        ]
        return super()._serialize()


def _is_or_lacks(there: Path, package: Path) -> bool:
    return not there.is_dir() or there.samefile(package)


@contextmanager
def start_ray(
    *, num_cpus: int | None = None, dashboard: bool = False, progress: Progress | None = None
) -> Iterator[str | None]:
    """Use the Ray there is - a job's, RAY_ADDRESS's or this process's - else start a local one and end it after.
    Raises ClusterError for an address where no cluster answers, and for one of Ray's client mode. Workers of a Ray that
    this starts or, outside a job, joins run this process's raymerge; to a cluster it is sent.

    The local one listens on 127.0.0.1 only and has `num_cpus` (logical) CPUs, else the machine's; `dashboard` starts
    Ray's dashboard with it. Gives the dashboard's address, or None where there is none. A local one whose processes
    are killed takes this process with it (`_end_without_ray`).
    """
    if ray.is_initialized():
        yield None
        return
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    address = None if address == "local" else address  # Ray's word for a local one
    up, over = threading.Event(), threading.Event()
    with step(progress or Silent(), "starting Ray"), _stopped_as_before():
        if address:
            if address.startswith("ray://"):
                # Tune would run in a process of the head: the searcher, with all that it holds, would have to move.
                raise ClusterError(
                    f"RAY_ADDRESS is {address}, which is Ray's client mode: the search must run in the cluster. Submit "
                    "a job to it (RAY_ADDRESS=http://HEAD:8265 ray job submit --working-dir . -- python "
                    "jobs/search_alphas.py ...), or run on one of its machines with RAY_ADDRESS=HEAD:6379"
                )
            if RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ:
                # What is installed on the cluster's machines may be another version, or nothing; a job brings its own.
                # Files that Python compiled may be another user's, who alone can read them.
                sent = {"py_modules": [str(Path(__file__).parent)], "excludes": ["__pycache__"]}
                options |= {"runtime_env": sent, "job_config": _OwnCode()}
            try:
                _reach(address)
                context = ray.init(**options)
            except (OSError, ValueError, RuntimeError) as error:
                if "Version mismatch" in str(error):
                    raise ClusterError(
                        f"RAY_ADDRESS is {address!r}, a cluster of other versions: {' '.join(str(error).split())}. Run "
                        "this command with the cluster's versions of Python and Ray, or submit a job to it"
                    ) from error
                # A head that finds a token asks for one from then on; who connects sends theirs only if told to.
                sends = os.environ.get("RAY_AUTH_MODE") == "token"
                token = "" if sends else ", set RAY_AUTH_MODE=token if it asks for one"
                raise ClusterError(
                    f"RAY_ADDRESS is {address!r}, but no cluster answers there: {error}. Give the address of "
                    f"a head, such as host:6379 (http://host:8265 is for `ray job submit` alone){token}, or unset it "
                    "for a local Ray"
                ) from error
        else:
            options |= {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
            threading.Thread(target=_end_without_ray, args=(up, over), name="ray", daemon=True).start()
            try:
                with _loopback_only():
                    context = ray.init(address="local", num_cpus=num_cpus, job_config=_OwnCode(), **options)
            except BaseException as error:
                over.set()
                if not isinstance(error, Exception):
                    raise
                # Ray's own is of no narrower class where its processes do not come.
                cure = (
                    "It gives its processes 30 s: the machine may be busy or short of memory, or its folder for "
                    "temporary files full. Run the same command again when there is room, or with TMPDIR on another "
                    "disk"
                )
                if isinstance(error, OSError) and error.errno in _UNWRITABLE:  # such as HOME=/ in a container
                    cure = (
                        f"It writes into its user's home, {Path.home()}, and into a folder for temporary files: set "
                        "HOME, or TMPDIR, to a folder that can be written"
                    )
                raise ClusterError(
                    f"no local Ray could be started ({type(error).__name__}: {error}). {cure}"
                ) from error
        up.set()
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else None
    finally:
        over.set()
        ray.shutdown()


def _reach(address: str) -> None:
    """OSError where nothing listens at an address: Ray (2.60) would try twenty times, for 40 s each."""
    there = None if "://" in address else services.canonicalize_bootstrap_address(address)
    if there is None:  # no address of a head's, which Ray has its own words for
        return
    host, _, port = there.rpartition(":")
    deadline = time.monotonic() + _REACH_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
            return
        except OSError:  # it may be starting
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _vital_processes() -> dict[str, subprocess.Popen[bytes]]:
    """Those without which the local Ray that this process has started, or is starting, cannot be."""
    node = ray._private.worker._global_node
    names = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
    return {} if node is None else {name: found[0].process for name in names if (found := node.all_processes.get(name))}


def _end_without_ray(up: threading.Event, over: threading.Event) -> None:
    """End this process where one of Ray's has ended, with a message and code 2, until `over` is set: calls that wait
    for Ray would not return, and without its GCS Ray itself ends the process after 60 s, with code 1 and no advice.

    up: Ray has started, so that where it is not there any more somebody else has ended it. What ends all processes, as
    a terminal that is closed does, is this one's own to answer: it has a moment for that.
    """
    while not over.wait(_LOOK_S):
        for name, process in _vital_processes().items():
            if (code := process.poll()) is None or over.wait(_LOOK_S):
                continue
            if ray.is_initialized() or not up.is_set():
                why = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                text = (
                    f"raymerge: Ray's {name} {why} (9: most often out of memory); what is finished is stored, the same "
                    "command again goes on from it\n"
                )
                with contextlib.suppress(OSError):  # whoever read what we say may have ended first
                    os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + text.encode())
                os._exit(2)


@contextmanager
def _stopped_as_before() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, in place of those that Ray installs while it starts: by them the process
    ends with code 15 or 1 at once, or later prints a trace and aborts (SIGABRT) if it takes 3 s to end."""
    if threading.current_thread() is not threading.main_thread():  # where neither Ray nor we could install one
        yield
        return
    on_stop = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # by Ray's answer to a SIGTERM: nothing else here asks for an end
        ray.shutdown()
        signal.signal(signal.SIGTERM, on_stop)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, on_stop)


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
