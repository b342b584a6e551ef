"""Placement by arithmetic; the pool on a plain class whose instances die, hang and raise on request."""

import errno
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from fake_ray import FakeRay, Waits
from plain_workers import Plain, Refuses
from ray._private.runtime_env.packaging import get_uri_for_directory
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from raymerge import cluster
from raymerge.actors import (
    Host,
    NoRoomError,
    WorkerError,
    WorkerLost,
    _device_allocation,
    call_worker,
    environment,
    reason_of,
)
from raymerge.cluster import ClusterError, PlacementError, cluster_nodes, driver_node, plan_workers, start_ray
from raymerge.errors import UserError
from raymerge.pool import WorkerPool


@pytest.fixture(scope="module")
def pool(ray_session, tmp_path_factory):
    with WorkerPool(Plain, {"folder": str(tmp_path_factory.mktemp("plain"))}, count=2, timeout_s=60) as pool:
        yield pool


@pytest.mark.parametrize(
    "count, gpus, cpus_each, cluster, expected",
    [
        ("auto", "auto", 1, {"CPU": 4}, (4, 1, 0)),
        ("auto", "auto", 2, {"CPU": 5}, (2, 2, 0)),
        (3, "auto", 1, {"CPU": 4}, (3, 1, 0)),
        ("auto", "auto", 1, {"CPU": 16, "GPU": 4}, (4, 1, 1)),
        ("auto", 0.5, 1, {"CPU": 16, "GPU": 4}, (8, 1, 0.5)),
        ("auto", 0.3, 1, {"CPU": 16, "GPU": 1}, (3, 1, 0.3)),
        ("auto", "auto", 1, {"CPU": 2, "GPU": 4}, (2, 1, 1)),
        ("auto", 0, 1, {"CPU": 2, "GPU": 4}, (2, 1, 0)),
        ("auto", 0.4, 0.1, {"CPU": 1, "GPU": 2}, (4, 0.1, 0.4)),  # no share is half on one GPU, half on another
        ("auto", 2, 1, {"CPU": 8, "GPU": 5}, (2, 1, 2)),
    ],
)
def test_as_many_workers_are_planned_as_fit(count, gpus, cpus_each, cluster, expected):
    placement = plan_workers(count, gpus, cpus_each, [cluster])
    assert (placement.count, placement.cpus, placement.gpus) == expected


def test_a_worker_fits_on_one_node_or_not_at_all():
    nodes = [{"CPU": 16}, {"CPU": 1, "GPU": 4}, {"CPU": 3, "GPU": 1}, {"node:10.0.0.1": 1.0}]
    assert plan_workers("auto", "auto", 1, nodes).count == 2
    assert plan_workers("auto", 0, 2, nodes).count == 8 + 1
    with pytest.raises(
        PlacementError, match="3 workers of 1 CPUs and 1 GPUs .*20 CPUs and 5 GPUs, and its nodes have room for 2"
    ):
        plan_workers(3, 1, 1, nodes)


@pytest.mark.parametrize(
    ("nodes", "memory", "expected"),
    [
        ([{"CPU": 16, "memory": 40e9}], 2e9, (16, 1, False)),
        ([{"CPU": 16, "memory": 40e9}], 16e9, (2, 8, True)),
        ([{"CPU": 16, "memory": 40e9}], 13e9, (3, 5, True)),
        ([{"CPU": 16, "memory": 40e9}], 50e9, (1, 16, True)),  # tried all the same
        ([{"CPU": 16, "memory": 40e9}, {"CPU": 8, "memory": 99e9}, {"CPU": 0, "memory": 5e9}], 10e9, (12, 1, True)),
        ([{"CPU": 4, "memory": 1e9}, {"CPU": 8, "memory": 9e9}, {"CPU": 0, "memory": 99e9}], 10e9, (1, 8, True)),
        ([{"CPU": 4}], 10e9, (4, 1, False)),  # Ray does not know
    ],
)
def test_an_automatic_number_of_workers_on_cpus_is_held_to_memory(nodes, memory, expected):
    """Sixteen workers of an 8B model, one for each CPU, would ask for 300 GB."""
    found = plan_workers("auto", "auto", 1, nodes, memory=memory)
    assert (found.count, found.cpus, found.by_memory) == expected
    asked = plan_workers(2, "auto", 2, nodes, memory=memory)
    assert (asked.count, asked.cpus, asked.by_memory) == (2, 2, False)
    on_gpus = plan_workers("auto", "auto", 1, [node | {"GPU": 1} for node in nodes], memory=memory)
    assert not on_gpus.by_memory and on_gpus.gpus == 1


@pytest.mark.parametrize("count, cluster", [(5, {"CPU": 4}), (3, {"CPU": 8, "GPU": 2}), ("auto", {})])
def test_more_workers_than_fit_are_refused_with_the_figures(count, cluster):
    with pytest.raises(PlacementError, match=rf"cluster has {cluster.get('CPU', 0)} CPUs and {cluster.get('GPU', 0)}"):
        plan_workers(count, "auto", 1, [cluster])


def test_a_worker_s_gpu_memory_is_in_segments_that_grow(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert _device_allocation(0.25) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert _device_allocation(0) == {}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert _device_allocation(1) == {}  # the user's own


def test_nodes_are_those_that_are_alive_and_the_driver_s_is_named_by_what_it_alone_has(monkeypatch):
    head = {"CPU": 4.0, "node:10.0.0.1": 1.0, "node:__internal_head__": 1.0}
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": head},
        {"NodeID": "b", "Alive": True, "Resources": {"CPU": 8.0, "node:10.0.0.2": 1.0}},
        {"NodeID": "c", "Alive": False, "Resources": {"CPU": 16.0, "node:10.0.0.3": 1.0}},
    ]
    here = SimpleNamespace(get_node_id=lambda: "b")
    monkeypatch.setattr("raymerge.cluster.ray.nodes", lambda: nodes)
    monkeypatch.setattr("raymerge.cluster.ray.get_runtime_context", lambda: here)
    assert [node["CPU"] for node in cluster_nodes()] == [4.0, 8.0]
    assert driver_node() == "node:10.0.0.2"
    here.get_node_id = lambda: "a"
    assert driver_node() == "node:__internal_head__"


def test_a_cluster_that_grows_may_be_asked_for_more_than_it_has():
    assert plan_workers(8, 1, 1, [{"CPU": 4}], autoscaling=True).count == 8


def test_results_come_in_the_items_order_and_once_each(pool):
    seen = {}
    items = [("work", number) for number in range(20)]
    assert pool.map("work", items, seen.__setitem__) == [n * n for n in range(20)]
    assert seen == {n: n * n for n in range(20)}
    assert pool.map("work", []) == []


def test_the_local_ray_listens_on_the_loopback_only(ray_session):
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


def test_broadcast_reaches_every_worker_once(pool):
    assert len(set(pool.broadcast("process"))) == pool.count == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_a_worker_keeps_the_pages_of_large_arrays(pool):
    (faults,) = pool.map("page_faults", [None])
    assert faults < 1000  # several thousand where they are given back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_a_lean_heap_gives_large_blocks_back(pool):
    """At once within, and what was kept before; afterwards pages are kept again."""
    ((lean, usual, given_back, again),) = pool.map("kept_bytes", [None])
    assert abs(lean) < 5e6 and usual > 60e6 and given_back < -60e6 and again > 60e6


def test_a_worker_computes_with_as_many_threads_as_it_has_cpus(pool):
    assert pool.map("threads", [None]) == [("1", "passive")]


def test_what_the_workers_code_raises_is_raised_at_once(pool):
    with pytest.raises(KeyError, match="bad item 3"):
        pool.map("work", [("raise" if number == 3 else "work", number) for number in range(6)])
    assert pool.map("work", [("work", 5)]) == [25], "the workers live on"


def test_a_death_and_a_slow_restart_lose_nothing(ray_session, tmp_path):
    """Ray refuses calls to an actor that restarts: those must not use up the item's attempts. A model takes longer
    than these six seconds to load."""
    kwargs = {"folder": str(tmp_path), "slow_restart_s": 6.0}
    with WorkerPool(Plain, kwargs, count=1, timeout_s=60) as pool:
        assert pool.map("work", [("die once", 1), ("work", 2), ("work", 3)]) == [1, 4, 9]


@pytest.mark.cluster
def test_a_worker_that_an_error_has_broken_is_started_again_and_fails_no_other_work(ray_session, tmp_path):
    """After most CUDA errors a process can use its device no more: a search went on to fail every candidate there."""
    with WorkerPool(Plain, {"folder": str(tmp_path)}, count=1, timeout_s=60) as pool:
        items = [("break once", 0), *(("work", number) for number in range(1, 8))]
        assert pool.map("work", items) == [number * number for number in range(8)]


@pytest.mark.cluster
def test_a_worker_that_hangs_is_restarted_and_its_item_done_again(ray_session, tmp_path):
    with WorkerPool(Plain, {"folder": str(tmp_path)}, count=1, timeout_s=30) as pool:
        pool.timeout_s = 3.0
        pool.broadcast("process")
        began = time.monotonic()
        assert pool.map("work", [("hang once", 1), ("work", 2)]) == [1, 4]
        assert 3.0 <= time.monotonic() - began < 40


@pytest.mark.cluster
def test_an_item_that_kills_every_worker_is_named(ray_session, tmp_path):
    with WorkerPool(Plain, {"folder": str(tmp_path)}, count=1, timeout_s=60, max_restarts=5) as pool:
        with pytest.raises(WorkerError, match=r"work of item 1 .*die.* failed 3 times"):
            pool.map("work", [("work", 0), ("die", 1)])


@pytest.mark.cluster
def test_workers_that_died_while_they_had_nothing_to_do_fail_no_item(ray_session, tmp_path):
    """As when a node is lost with all its workers, of which one or none was at work."""
    events = []
    options = {"count": 4, "max_restarts": 0, "on_event": lambda *event: events.append(event)}
    with WorkerPool(Plain, {"folder": str(tmp_path)}, **options) as pool:
        killed = [f"worker-{slot}" for slot in pool.present[:-1]]  # three, where all have started in time
        for pid in pool.broadcast("process")[:-1]:
            os.kill(pid, signal.SIGKILL)
        assert pool.map("work", [("work", 7)]) == [49]
    assert {worker for kind, worker, _ in events if kind == "lost"} == set(killed)


@pytest.mark.cluster
def test_a_pool_whose_workers_are_used_up_says_so(ray_session, tmp_path):
    with WorkerPool(Plain, {"folder": str(tmp_path)}, count=1, timeout_s=60, max_restarts=0) as pool:
        with pytest.raises(NoRoomError, match="no worker is left, each died .*the cluster has 4 CPUs and 0 GPUs"):
            pool.map("work", [("die", 0)])


@pytest.mark.parametrize("raised", [ConnectionError("no GCS"), ValueError("Invalid Ray address: 'http://x:8265'")])
def test_a_cluster_that_cannot_be_reached_is_the_users_to_mend(monkeypatch, raised):
    """Such as after exporting the address that `ray job submit` takes."""

    def init(**_):
        raise raised

    monkeypatch.setattr("raymerge.cluster.ray.init", init)
    monkeypatch.setattr("raymerge.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://x:8265")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with (
        pytest.raises(ClusterError, match="RAY_ADDRESS is 'http://x:8265', but .*host:6379.*AUTH_MODE=token"),
        start_ray(),
    ):
        pass


def test_a_cluster_of_another_version_is_not_said_to_be_missing(monkeypatch):
    said = "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\nThis process with:\n    Ray: 2.60.0\n"

    def init(**_):
        raise RuntimeError(said)

    monkeypatch.setattr("raymerge.cluster.ray.init", init)
    monkeypatch.setattr("raymerge.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("raymerge.cluster._reach", lambda _: None)
    with pytest.raises(
        ClusterError, match="'auto', a cluster of other versions: .*2.59.0 This .*the cluster's versions"
    ):
        with start_ray():
            pass


def test_what_python_compiled_is_not_sent_to_a_cluster(monkeypatch, tmp_path):
    """It may be another user's who alone can read it, which Ray would raise an error of its own for."""
    compiled, asked = tmp_path / "raymerge/__pycache__/a.pyc", {}

    def init(**options):
        asked.update(options)
        raise ConnectionError

    monkeypatch.setattr("raymerge.cluster.ray.init", init)
    monkeypatch.setattr("raymerge.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setattr("raymerge.cluster._reach", lambda _: None)
    monkeypatch.setattr("raymerge.cluster.__file__", str(tmp_path / "raymerge/cluster.py"))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ClusterError), start_ray():
        pass
    ((folder,), excludes) = (asked["runtime_env"].get(key) for key in ("py_modules", "excludes"))
    assert folder == str(tmp_path / "raymerge")
    compiled.parent.mkdir(parents=True)
    found = set()
    for text in ("one", "two"):
        compiled.write_text(text)
        found.add(get_uri_for_directory(folder, include_gitignore=True, excludes=excludes))
    assert len(found) == 1
    (tmp_path / "raymerge/a.py").write_text("three")
    assert get_uri_for_directory(folder, include_gitignore=True, excludes=excludes) not in found


def test_an_address_where_nobody_listens_is_said_at_once(monkeypatch):
    """Ray itself tries for a quarter of an hour."""
    with socket.create_server(("", 0)) as server:  # of 127.0.0.1 Ray makes an outer address
        port = server.getsockname()[1]
        cluster._reach(f"127.0.0.1:{port}")
    monkeypatch.setattr("raymerge.cluster._REACH_S", 0.1)
    monkeypatch.setattr("raymerge.cluster.ray.init", lambda **_: pytest.fail("asked Ray"))
    monkeypatch.setattr("raymerge.cluster.ray.is_initialized", lambda: False)
    for address, why in ((f"127.0.0.1:{port}", "Connection refused"), ("no.host.invalid:6379", "")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=f"RAY_ADDRESS is '{address}', but no cluster .*{why}"), start_ray():
            pass


def test_a_stop_while_ray_starts_is_ours_to_answer(monkeypatch):
    """Ray's own answer, which it installs first of all, ends the process with its code 15."""

    class Stopped(BaseException):
        pass

    def ours(number, _):
        raise Stopped(number)

    def starts(*_, **__):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        signal.raise_signal(signal.SIGTERM)

    ended = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", starts)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(Stopped, match=str(int(signal.SIGTERM))), start_ray(num_cpus=1):
            pass
        assert ended and signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.cluster
def test_a_local_ray_whose_process_is_killed_ends_the_command_with_a_message():
    """Without its GCS Ray ends the driver after 60 s with code 1 and no word of the run; calls wait as long."""
    code = (
        "import subprocess, sys, threading, time; from raymerge import cluster\n"
        "raylet, up, over = subprocess.Popen(['sleep', '60']), threading.Event(), threading.Event()\n"
        "cluster._LOOK_S, cluster._vital_processes = 0.1, lambda: {'raylet': raylet}\n"
        "watch = threading.Thread(target=cluster._end_without_ray, args=(up, over), daemon=True)\n"
        "watch.start(); time.sleep(0.3); print('at work', flush=True)\n"
        "{'over': over, 'up': up}.get(sys.argv[1], threading.Event()).set()\n"
        "raylet.kill(); watch.join(2); print('over')"
    )
    for end in ("over", "up"):  # by us, and by a ray.shutdown() of somebody else's
        done = subprocess.run([sys.executable, "-c", code, end], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "at work\nover\n", "")
    done = subprocess.run([sys.executable, "-c", code, "killed"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "at work\n")
    assert done.stderr.startswith("raymerge: Ray's raylet was ended by signal 9") and "goes on" in done.stderr


def test_a_local_ray_that_does_not_start_is_no_bug(monkeypatch):
    """Ray 2.60 raises a bare Exception where the raylet, or the time of a busy machine, ends while it starts."""

    def starts(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("raymerge.cluster.ray.init", starts)
    monkeypatch.setattr("raymerge.cluster.ray.is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="no local Ray .*timed out during startup.*same command again"), start_ray():
        pass


def test_a_home_that_ray_cannot_write_into_is_named_with_the_cure(monkeypatch):
    """As that of a container's user of no name: `docker run --user 1234` gives HOME=/."""

    def starts(**_):
        raise PermissionError(errno.EACCES, "Permission denied", "/.ray")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr("raymerge.cluster.ray.init", starts)
    monkeypatch.setattr("raymerge.cluster.ray.is_initialized", lambda: False)
    with pytest.raises(ClusterError, match=r"'/\.ray'\)\. It writes into its user's home, /, .*set HOME, or TMPDIR"):
        with start_ray():
            pass


@pytest.mark.parametrize("address", [None, "local"])
def test_a_local_ray_is_kept_on_the_loopback_also_where_it_is_asked_for_by_its_name(monkeypatch, address):
    def starts(**options):
        assert options["address"] == "local" and options["dashboard_host"] == "127.0.0.1"
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        raise Exception("it would have started")

    monkeypatch.setattr("raymerge.cluster.ray.init", starts)
    monkeypatch.setattr("raymerge.cluster.ray.is_initialized", lambda: False)
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match="it would have started"), start_ray():
        pass


def test_rays_client_mode_is_refused_with_the_cure(monkeypatch):
    """Tune would pickle the searcher into the cluster, which keeps nothing of itself."""
    monkeypatch.setattr("raymerge.cluster.ray.init", lambda **_: pytest.fail("connected"))
    monkeypatch.setattr("raymerge.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ClusterError, match="RAY_ADDRESS is ray://head:10001, .*ray job submit.*HEAD:6379"), start_ray():
        pass


def test_a_constructor_that_raises_is_reported_with_its_words(ray_session):
    with pytest.raises(WorkerError, match="no model at /nowhere"):
        WorkerPool(Refuses, {"path": "/nowhere"}, count=2, timeout_s=60)
    with pytest.raises(UserError) as caught:
        WorkerPool(Refuses, {"path": "/nowhere", "kind": UserError}, count=2, timeout_s=60)
    assert str(caught.value) == "no model at /nowhere", "without Ray's traceback"


def test_workers_without_room_join_when_there_is(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("raymerge.pool._PATIENCE_S", 1.0)
    kwargs, events = {"folder": str(tmp_path)}, []
    # `pool` has two of the four CPUs.
    with WorkerPool(Plain, kwargs, count=1) as first:
        with WorkerPool(Plain, kwargs, count=2, wait_s=60, on_event=lambda *event: events.append(event)) as second:
            assert (second.count, second.awaited) == (1, 1)
            first.close()
            deadline = time.monotonic() + 90
            while not second.poll() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert second.present == [0, 1]
            assert second.map("work", [("work", 3)] * 4) == [9] * 4
    assert [kind for kind, _, _ in events] == ["joined"]


def test_a_pool_without_room_for_any_says_what_there_is(ray_session, tmp_path):
    with pytest.raises(NoRoomError, match=r"no Plain of 9 CPUs and 0 GPUs has been there for 2 s .*has 4 CPUs"):
        WorkerPool(Plain, {"folder": str(tmp_path)}, count=1, cpus_per_worker=9, wait_s=2)


@pytest.mark.cluster
def test_a_worker_that_has_worked_is_replaced_when_ray_gives_it_up(ray_session, tmp_path):
    events = []
    options = {"count": 1, "max_restarts": 0, "on_event": lambda *event: events.append(event)}
    with WorkerPool(Plain, {"folder": str(tmp_path)}, **options) as pool:
        before = pool.broadcast("process")
        assert pool.map("work", [("work", 2), ("die once", 3)]) == [4, 9]
        assert pool.broadcast("process") != before
        assert 0.0 < pool.seconds_present()[0]
    assert [(kind, worker) for kind, worker, _ in events] == [
        (kind, "worker-0") for kind in ("lost", "replaced", "back")
    ]


@pytest.mark.cluster
def test_items_do_not_wait_for_a_worker_that_is_not_back(ray_session, tmp_path, monkeypatch):
    """As when its node is lost and no other has room: nobody is ever told that it has died."""
    with WorkerPool(Plain, {"folder": str(tmp_path)}, count=2) as pool:
        monkeypatch.setattr(pool, "poll", lambda: [])
        assert pool.map("work", [("die once", 1), *[("work", n) for n in range(6)]]) == [1, *(n * n for n in range(6))]
        assert pool.count == pool.awaited == 1


@pytest.mark.parametrize(
    "raised, expected, message",
    [
        (OutOfDiskError("Local disk is full"), NoRoomError, "object store is full.*run the same command again"),
        (ObjectStoreFullError("Failed to put"), NoRoomError, "object store is full"),
        (ObjectLostError("00" * 28, "", ""), WorkerLost, "work: ObjectLostError"),
    ],
)
def test_a_full_store_is_nobodys_fault_and_a_lost_result_is_a_lost_worker(pool, monkeypatch, raised, expected, message):
    """The latter where a node goes between its worker's answer and the fetching of it."""
    handle = ray.get_actor(pool.name_of(0))

    def get(*_, **__):
        raise raised

    monkeypatch.setattr("raymerge.pool.ray.get", get)
    with pytest.raises(expected, match=message):
        call_worker(handle, "work", ("work", 1), timeout_s=1.0)


def test_a_full_disk_is_told_from_a_bug(pool):
    with pytest.raises(NoRoomError, match="No space left on device.*output.cache"):
        pool.map("fill_disk", [None])


def test_what_comes_later_is_checked_before_it_gets_work(ray_session, tmp_path):
    seen = []
    with WorkerPool(Plain, {"folder": str(tmp_path)}, count=1) as pool:
        pool.admit("process", seen.append)
        first = pool.broadcast("process")
        assert pool.map("work", [("die once", 3)]) == [9]
        assert seen and seen != first


def test_a_users_mistake_that_only_a_worker_sees_is_raised_without_rays_traceback(pool):
    with pytest.raises(UserError) as caught:
        pool.map("mistaken", [3])
    assert str(caught.value) == "item 3 is too large: give at most 2"
    assert type(caught.value) is UserError


# -- what befalls workers, on a Ray without processes

HERE = {"ready": lambda method: ("first", "10.0.0.1", None if method is None else {"files": "ours"})}
LATE = {"ready": Waits}


@pytest.fixture
def open_fake(monkeypatch):
    """Opens a pool over actors that answer as told; gives it, the fake Ray, and the events."""

    def opened(*answers, patience_s=0.0, **options):
        fake, events = FakeRay(*answers), []
        monkeypatch.setattr("raymerge.pool.ray", fake)
        monkeypatch.setattr("raymerge.actors.ray", fake)
        monkeypatch.setattr("raymerge.pool._PATIENCE_S", patience_s)
        monkeypatch.setattr("raymerge.pool._PAUSE_S", 0.0)
        pool = WorkerPool(Plain, {}, count=len(answers), on_event=lambda *event: events.append(event), **options)
        return pool, fake, events

    return opened


def raised_by_a_worker(error):
    return RayTaskError("ready", "its traceback", error)


def test_a_worker_that_was_asked_before_there_was_an_admission_is_asked_again(open_fake):
    """It starts to be awaited with the pool, whose admission comes when the first workers are there."""
    pool, fake, events = open_fake(HERE, LATE)
    seen = []
    pool.admit("describe", seen.append)
    fake.actors[1].answers["ready"] = lambda method: (
        "second",
        "10.0.0.2",
        None if method is None else {"files": "its own"},
    )
    assert pool.poll() == [] and pool.poll() == [1]
    assert seen == [{"files": "its own"}] and [kind for kind, _, _ in events] == ["joined"]
    assert [args for _, args in fake.actors[1].calls] == [(None,), ("describe",)]


@pytest.mark.parametrize("where", ["its constructor", "the check"])
def test_a_late_worker_that_refuses_is_left_out_and_the_others_work_on(open_fake, where):
    pool, fake, events = open_fake(HERE, LATE, LATE)

    def check(answer):
        if answer["files"] != "ours":
            raise UserError("other files")

    pool.admit("describe", check)
    late = fake.actors[1]
    if where == "the check":
        late.answers["ready"] = lambda _: ("second", "10.0.0.2", {"files": "its own"})
    else:
        late.answers["ready"] = raised_by_a_worker(UserError("other files"))
    assert pool.poll() == [] and pool.poll() == []
    assert (pool.present, pool.awaited, late.killed) == ([0], 1, True)
    assert events == [("refused", "worker-1", "other files")]
    fake.actors[2].answers["ready"] = raised_by_a_worker(UserError("other files"))
    assert pool.poll() == [] and (pool.present, pool.awaited) == ([0], 0)


def test_the_last_worker_that_refuses_ends_the_run_with_its_words(open_fake):
    pool, fake, events = open_fake(HERE, LATE)
    fake.actors[0].answers["ready"] = Waits
    pool.lose(0, "died")
    fake.actors[1].answers["ready"] = raised_by_a_worker(UserError("hub: HTTP 503"))
    assert pool.poll() == [], "the first may come back"
    fake.actors[0].answers["ready"] = ActorDiedError()
    pool.poll()
    with pytest.raises(NoRoomError, match=r"died more often .* or refused to take part: .*hub: HTTP 503"):
        pool.require()
    pool, fake, events = open_fake(HERE)
    pool.lose(0, "died")
    fake.actors[0].answers["ready"] = raised_by_a_worker(UserError("hub: HTTP 503"))
    with pytest.raises(UserError) as caught:
        pool.poll()
    assert str(caught.value) == "hub: HTTP 503" and [kind for kind, _, _ in events] == ["lost", "refused"]


GIVEN_UP = [OutOfMemoryError("killed for memory"), RuntimeEnvSetupError("no pip"), ActorUnschedulableError("no node")]


@pytest.mark.parametrize("error", GIVEN_UP, ids=lambda error: type(error).__name__)
def test_a_worker_that_ray_gives_up_for_whatever_reason_is_lost_and_replaced(open_fake, error):
    """Ray gives these on every later call too, and they are no RayActorErrors."""
    pool, fake, events = open_fake({**HERE, "call": lambda _, number: number})
    assert pool.map("work", [1]) == [1]
    fake.actors[0].answers |= {"call": error, "ready": error}
    fake.prepared[0] = {**HERE, "call": lambda _, number: number}
    assert pool.map("work", [2, 3]) == [2, 3]
    assert [kind for kind, _, _ in events] == ["lost", "replaced", "back"] and type(error).__name__ in events[0][2]
    with pytest.raises(WorkerLost, match=type(error).__name__):
        call_worker(fake.actors[0], "work", 2, timeout_s=1.0)


def test_what_ray_gives_up_while_a_worker_has_nothing_to_do_is_lost_too(open_fake):
    pool, fake, events = open_fake(HERE, {**HERE, "here": OutOfMemoryError("killed for memory")})
    assert pool.answering([0, 1]) == [0]
    assert [(kind, worker) for kind, worker, _ in events] == [("lost", "worker-1")]


def test_what_is_broadcast_is_serialised_once(open_fake):
    """A fit's tensors are hundreds of megabytes, for each of many workers."""
    pool, fake, _ = open_fake(*[{**HERE, "call": lambda _, tensors: tensors}] * 3)
    tensors = np.zeros(3)
    found = pool.broadcast("keep", tensors)
    assert len(fake.puts) == 1 and fake.puts[0] is tensors
    assert len(found) == 3 and all(reference is found[0] for reference in found)


def test_a_full_store_is_nobodys_fault_for_what_is_broadcast_either(open_fake, monkeypatch):
    pool, fake, _ = open_fake(HERE)

    def put(_):
        raise OutOfDiskError("Local disk is full")

    monkeypatch.setattr(fake, "put", put)
    with pytest.raises(NoRoomError, match="object store is full.*run the same command again"):
        pool.broadcast("keep", np.zeros(3))


@pytest.mark.parametrize("node_ends", [True, False])
def test_a_lost_node_says_nothing_of_the_item_that_its_worker_had(open_fake, node_ends):
    """Preempted nodes would use up an item's three attempts: it fails only where nodes stay, or after many."""
    pool, fake, _ = open_fake(HERE)
    (actor,) = fake.actors

    def tries():
        return [args[1] for method, args in actor.calls if method == "call"]

    def ready(method):  # by when it is back, wherever, it is known that the node before is gone
        if node_ends:
            fake.dead_nodes |= {f"node-{number}" for number in range(len(tries()))}
        return f"node-{len(tries())}", "10.0.0.1", None

    def call(_, item):
        return ActorDiedError() if len(tries()) <= 5 or item == "takes nodes down" else item

    actor.answers = {"ready": ready, "call": call}
    pool.lose(0, "so that it is asked where it is")
    if not node_ends:
        with pytest.raises(WorkerError, match=r"work of item 0 \('x'\) failed 3 times, the last time on worker 0"):
            pool.map("work", ["x"])
        return
    assert pool.map("work", ["x"]) == ["x"] and len(tries()) == 6
    with pytest.raises(WorkerError, match="failed 10 times"):
        pool.map("work", ["takes nodes down"])


def test_an_actor_has_what_its_worker_is_to_have(open_fake):
    _, fake, _ = open_fake(HERE, cpus_per_worker=2, gpus_per_worker=0.5, max_restarts=7)
    _, plain, _ = open_fake(HERE)
    ((options, made_of),) = fake.started
    assert (options["num_cpus"], options["num_gpus"], options["max_restarts"]) == (2, 0.5, 7)
    assert options["runtime_env"] == {"env_vars": environment(2, 0.5)} and made_of == (Plain, {})
    assert plain.started[0][0]["num_gpus"] == 0
    assert [environment(cpus, 0)["OMP_NUM_THREADS"] for cpus in (0.5, 1, 3)] == ["1", "1", "3"]


def test_the_actors_end_with_the_pool(open_fake):
    pool, fake, _ = open_fake(HERE, HERE)
    with pool:
        assert not any(actor.killed for actor in fake.actors)
    assert all(actor.killed for actor in fake.actors)


@pytest.fixture
def clock(monkeypatch):
    """The time of the pool, in seconds from 0, that stands still but for what a test adds."""
    now = SimpleNamespace(seconds=0.0)
    time_of = SimpleNamespace(monotonic=lambda: now.seconds, sleep=lambda seconds: None)
    monkeypatch.setattr("raymerge.pool.time", time_of)
    return now


def test_seconds_present_are_those_that_a_worker_was_there(open_fake, clock):
    pool, fake, _ = open_fake(HERE, HERE)
    clock.seconds = 10.0
    fake.actors[0].answers["ready"] = Waits
    pool.lose(0, "died")
    clock.seconds = 15.0
    assert pool.seconds_present() == {0: 10.0, 1: 15.0}
    fake.actors[0].answers = HERE
    assert pool.poll() == [0]
    clock.seconds = 18.0
    assert pool.seconds_present() == {0: 13.0, 1: 18.0}


def test_a_pool_waits_as_long_as_it_may_from_when_its_last_worker_was_lost(open_fake, clock):
    pool, fake, _ = open_fake(HERE, HERE, wait_s=10.0)
    clock.seconds = 100.0
    pool.require()
    for slot in (0, 1):
        fake.actors[slot].answers["ready"] = Waits
        pool.lose(slot, "died")
        clock.seconds += 6.0
    pool.require()
    clock.seconds += 5.0
    with pytest.raises(
        NoRoomError,
        match=r"no Plain of 1 CPUs and 0 GPUs has been there for 10 s .*has 4 CPUs and 0 GPUs, 0.5 and 0 of them free",
    ):
        pool.require()


@pytest.mark.parametrize(
    ("first", "second", "opened", "present"),
    [(1.0, 9.0, 9.0, [0, 1]), (1.0, 30.0, 12.0, [0]), (20.0, 35.0, 35.0, [0, 1]), (20.0, 50.0, 41.0, [0])],
)
def test_the_first_worker_waits_for_the_others_for_as_long_as_it_took_and_ten_seconds_at_least(
    open_fake, clock, monkeypatch, first, second, opened, present
):
    def from_when(seconds):
        return {"ready": lambda method: Waits if clock.seconds < seconds else ("node", "10.0.0.1", None)}

    def wait(self, references, num_returns=1, timeout=None):
        clock.seconds += timeout
        done = [each for each in references if each.actor.answer(each) is not Waits]
        return done, []

    monkeypatch.setattr(FakeRay, "wait", wait)
    pool, _, events = open_fake(from_when(first), from_when(second), patience_s=10.0)
    assert (clock.seconds, pool.present, events) == (opened, present, [])


def test_a_pool_that_has_no_worker_at_the_start_does_not_wait_for_ever(open_fake):
    with pytest.raises(NoRoomError, match="has been there for 0 s"):
        open_fake(LATE, wait_s=0.0)


def test_a_pool_grows_when_it_is_open_and_never_shrinks(open_fake, clock):
    wanted, asked = [3], []
    pool, fake, _ = open_fake(HERE, HERE, grow=lambda: asked.append(clock.seconds) or wanted[0])
    clock.seconds = 5.0
    assert pool.poll() == [] and len(fake.actors) == 2, "it was asked for a moment ago"
    clock.seconds = 5.5
    assert pool.poll() == [2] and pool.present == [0, 1, 2]
    wanted[0] = 1
    clock.seconds = 6.0
    assert pool.poll() == []
    clock.seconds = 20.0
    assert pool.poll() == [] and pool.present == [0, 1, 2] and len(fake.actors) == 3
    assert asked == [5.5, 20.0]


def test_a_call_that_is_not_answered_in_time_is_made_of_another_worker(open_fake):
    pool, fake, events = open_fake({**HERE, "call": Waits}, {**HERE, "call": lambda _, item: item})
    pool.timeout_s = 0.0
    assert pool.map("work", ["x"]) == ["x"]
    assert events[0][:2] == ("lost", "worker-0") and "no answer within workers.timeout_s" in events[0][2]
    assert fake.actors[0].killed is False and ("call", ("work", "x")) in fake.actors[1].calls


def test_a_worker_that_takes_long_is_left_to_work_until_its_time_is_over(open_fake, clock):
    looks = []
    pool, fake, events = open_fake(
        {**HERE, "call": lambda _, item: looks.append(item) or (len(looks) < 6 and Waits) or item}
    )
    assert pool.map("work", ["x"]) == ["x"]
    assert events == [] and not fake.actors[0].killed and len(fake.actors[0].calls) == 2


def test_a_worker_that_never_finished_anything_is_gone_when_ray_gives_it_up(open_fake):
    pool, fake, events = open_fake(HERE, HERE)
    pool.lose(0, "died")
    fake.actors[0].answers["ready"] = ActorDiedError()
    assert pool.poll() == [] and (pool.present, pool.awaited) == ([1], 0) and fake.actors[0].killed
    assert [(kind, worker) for kind, worker, _ in events] == [("lost", "worker-0"), ("gone", "worker-0")]
    pool.close()
    assert fake.actors[1].killed


def test_an_item_goes_to_no_worker_that_died_while_it_had_nothing_to_do(open_fake):
    """As when a node is lost with all its workers: the item would be lost over each of them."""
    dead = {**HERE, "call": ActorDiedError(), "here": ActorDiedError()}
    pool, fake, events = open_fake(dead, dead, dead, dead, {**HERE, "call": lambda _, item: item})
    for actor in fake.actors[:4]:  # they do not come back
        actor.answers["ready"] = Waits
    assert pool.map("work", ["x"]) == ["x"]
    assert [sum(method == "call" for method, _ in actor.calls) for actor in fake.actors] == [1, 0, 0, 0, 1]
    assert sorted(worker for kind, worker, _ in events if kind == "lost") == [f"worker-{n}" for n in range(4)]


def test_a_broadcast_leaves_out_who_is_lost_over_it_and_asks_three_times(open_fake):
    pool, fake, events = open_fake({**HERE, "call": ActorDiedError()}, {**HERE, "call": lambda _: "here"})
    assert pool.broadcast("describe") == ["here"]
    assert [(kind, worker) for kind, worker, _ in events] == [("lost", "worker-0")]
    fake.actors[1].answers["call"] = ActorDiedError()
    with pytest.raises(WorkerError, match="describe killed every worker that was asked, 3 times"):
        pool.broadcast("describe")
    assert sum(method == "call" for method, _ in fake.actors[1].calls) == 4


# -- one worker in its process


def answering(monkeypatch, answer):
    """A worker that gives this answer to what it is called for."""
    fake = FakeRay({"call": answer})
    monkeypatch.setattr("raymerge.actors.ray", fake)
    return fake._start({})


def test_a_call_that_is_not_answered_in_time_kills_its_worker_to_be_restarted(monkeypatch):
    worker = answering(monkeypatch, Waits)
    worker.killed = None
    with pytest.raises(WorkerLost, match="work: no answer within workers.timeout_s"):
        call_worker(worker, "work", 3, timeout_s=0.1)
    assert worker.killed is False and worker.calls == [("call", ("work", 3))]


@pytest.mark.parametrize(
    ("cause", "raised", "message"),
    [
        (OSError(28, "No space left on device"), NoRoomError, "work: .*No space left.*output.cache"),
        (OSError(122, "Disk quota exceeded"), NoRoomError, "work: .*quota exceeded.*output.cache"),
        (OSError(13, "Permission denied"), RayTaskError, "its traceback"),
        (UserError("give at most 2"), UserError, "^give at most 2$"),
        (ObjectLostError("00" * 28, "", ""), WorkerLost, "work: .*"),
        (KeyError("a bug"), RayTaskError, "its traceback"),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_what_a_worker_s_own_code_raises_is_told_from_what_befalls_it(monkeypatch, cause, raised, message):
    worker = answering(monkeypatch, RayTaskError("work", "its traceback", cause))
    with pytest.raises(raised, match=message) as caught:
        call_worker(worker, "work", 3, timeout_s=1.0)
    assert type(caught.value) is raised


def test_an_actor_s_death_is_told_in_a_line():
    text = "The actor died unexpectedly.\n  class_name: Host\n\tactor_id: 1f\n\tpid: 7\nIts node was preempted.\nMore."
    assert reason_of(WorkerLost(text)) == "WorkerLost: The actor died unexpectedly. Its node was preempted."
    assert reason_of(WorkerLost("killed for memory")) == "WorkerLost: killed for memory"
    created = "The actor died because of an error raised in its creation task, ray::Host\nTraceback\nKeyError: 'x'\n"
    assert reason_of(WorkerLost(created)) == "WorkerLost: KeyError: 'x'"
    assert reason_of(WorkerError("")) == "WorkerError:"


@pytest.mark.parametrize(
    ("said", "raised", "message"),
    [
        ("ModuleNotFoundError: No module named 'raymerge'", UserError, "named 'raymerge'. Every machine needs .* job"),
        (
            "AttributeError: Can't get attribute 'Host.new' on <module 'raymerge.actors'>",
            UserError,
            "the same versions",
        ),
        ("KeyError: 'x'", WorkerError, "did not start: RuntimeEnvSetupError: KeyError: 'x'"),
    ],
)
def test_a_cluster_without_this_code_is_the_users_to_mend(open_fake, said, raised, message):
    created = f"The actor died because of an error raised in its creation task, ray::Host\nTraceback\n{said}\n"
    died = type("RuntimeEnvSetupError", (RuntimeEnvSetupError,), {"__str__": lambda _: created})()
    with pytest.raises(raised, match=message):
        open_fake({"ready": died})


def test_workers_whose_processes_are_ended_before_they_are_there_have_no_room(open_fake):
    """As by the kernel on a machine short of memory, or where Ray's folder is full."""
    said = "The actor died unexpectedly before finishing this task.\n\tpid: 7\nIts worker process has died."
    died = type("ActorDiedError", (ActorDiedError,), {"__str__": lambda _: said})()
    with pytest.raises(NoRoomError, match=r"did not start: .*process has died\. Make room in the machine's memory"):
        open_fake({"ready": died})


def test_a_host_keeps_a_users_mistake_for_who_asks_first_and_raises_anything_else(monkeypatch):
    refused = Host(Refuses, {"path": "/nowhere", "kind": UserError})
    with pytest.raises(UserError, match="no model at /nowhere"):
        refused.ready(None)
    with pytest.raises(ValueError, match="no model at /nowhere"):
        Host(Refuses, {"path": "/nowhere"})


def test_a_host_on_another_node_than_the_driver_names_its_machine_in_a_users_mistake(monkeypatch, tmp_path):
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr("raymerge.actors.ray.get_runtime_context", lambda: context)
    here = f"^on the worker's machine {re.escape(socket.gethostname())}: "
    refused = Host(Refuses, {"path": "/nowhere", "kind": PlacementError}, driver="head")
    with pytest.raises(PlacementError, match=f"{here}no model at /nowhere"):
        refused.ready(None)
    for driver, start in (("head", here), ("node", "^"), (None, "^")):
        host = Host(Mistaken, {}, driver=driver)
        for ask in (lambda host=host: host.ready("work"), lambda host=host: host.call("work")):
            with pytest.raises(UserError, match=f"{start}no such file"):
                ask()


class Mistaken:
    def work(self):
        raise UserError("no such file")


def test_a_host_starts_relative_paths_where_the_driver_does(monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    Host(Plain, {"folder": str(tmp_path)}, folder=str(tmp_path / "missing"))
    assert os.getcwd() == "/"
    Host(Plain, {"folder": "."}, folder=str(tmp_path))
    assert os.getcwd() == str(tmp_path.resolve())


@pytest.mark.parametrize("job", [False, True])
def test_workers_start_in_the_drivers_folder_but_in_a_jobs_own_copy(monkeypatch, job):
    fake = FakeRay({"ready": ("node", "10.0.0.1", None)})
    context = SimpleNamespace(runtime_env={"working_dir": "gcs://x.zip"} if job else {}, get_node_id=lambda: "head")
    fake.get_runtime_context = lambda: context
    monkeypatch.setattr("raymerge.pool.ray", fake)
    with WorkerPool(Plain, {"folder": "/"}, count=1):
        pass
    assert fake.homes == [{"folder": None if job else os.getcwd(), "driver": "head"}]


def test_a_host_answers_for_its_worker(monkeypatch, tmp_path):
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr("raymerge.actors.ray.get_runtime_context", lambda: context)
    monkeypatch.setattr("raymerge.actors.ray.util.get_node_ip_address", lambda: "10.0.0.1")
    host = Host(Plain, {"folder": str(tmp_path)})
    assert host.ready(None) == ("node", "10.0.0.1", None)
    assert host.ready("process") == ("node", "10.0.0.1", os.getpid())
    assert host.call("work", ("work", 3)) == 9 and host.here() is None


def test_a_local_worker_runs_the_raymerge_that_was_called_not_one_that_lies_in_its_folder(tmp_path, monkeypatch):
    """As where an installed one is called in a checkout of another version, for its jobs/configs."""
    (tmp_path / "raymerge").mkdir()
    (tmp_path / "raymerge/__init__.py").touch()
    package = Path(cluster.__file__).parent
    code = (
        "from raymerge import pool, cluster, identity\n"
        "class Says:\n"
        "    def where(self):\n"
        "        import raymerge\n"
        "        return raymerge.__file__\n"
        "with cluster.start_ray(num_cpus=1), pool.WorkerPool(Says, {}, count=1) as workers:\n"
        "    print(workers.broadcast('where'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([str(package / "__init__.py")]), done.stderr
