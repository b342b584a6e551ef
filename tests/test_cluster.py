"""Several Ray nodes on one machine, with made-up GPUs: nodes, actors and drivers are lost in mid-search.

Each test has a cluster of its own: a head without CPUs, on which the driver and Tune's trial actors are, and nodes of
one CPU and one GPU. What is asserted everywhere: every candidate is in the record once, none is lost, and only what was
running was done again.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import ray
from pyarrow.fs import FileSelector, FileSystem
from ray.cluster_utils import Cluster

import raymerge
from raymerge import experiments
from raymerge.actors import NoRoomError
from raymerge.cluster import cluster_nodes, plan_workers, start_ray
from raymerge.config_file import load_config
from raymerge.demo import MMLU_PATH, MODEL_PATH
from raymerge.pool import WorkerPool
from raymerge.proposers import RandomProposer
from raymerge.search import BatchSearcher, run_search
from raymerge.tables import RunDirectory

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[1]
CANDIDATES = 24
_WAIT_S = 240.0  # for what takes seconds on an idle machine


class Slow:
    """Scores after 0.3 s and leaves a line for every candidate that it was given; hangs on request, once."""

    def __init__(self, folder):
        self.folder = folder

    def score(self, candidates):
        with open(os.path.join(self.folder, "scored"), "a", encoding="utf-8") as log:
            log.write("".join(f"{os.getpid()} {point[0]:.9f}\n" for point in candidates))
        time.sleep(0.3 * len(candidates))
        if candidates[0][0] == HANGS and not os.path.exists(os.path.join(self.folder, "hung")):
            open(os.path.join(self.folder, "hung"), "w").close()
            time.sleep(3600)
        return [
            {"value": point[0], "accuracy": 0.5, "nll": 1.0, "n_questions": 4, "seconds": 0.3} for point in candidates
        ]

    def where(self):
        return ray.get_runtime_context().get_node_id(), os.getpid()


HANGS = 0.625


@pytest.fixture
def cluster(monkeypatch):
    """Makes a cluster of so many nodes and connects to it; `cluster.add_node(**NODE)` adds one."""
    folder = tempfile.mkdtemp(prefix="rayc")  # short: sockets lie in it
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT)]), prepend=os.pathsep)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    opened = []

    def make(nodes):
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **ADDRESS})
        opened.append(made)
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        made.nodes = [made.add_node(**NODE) for _ in range(nodes)]
        context = start_ray()
        context.__enter__()
        opened.append(context)
        return made

    yield make
    for each in reversed(opened):
        if isinstance(each, Cluster):
            each.shutdown()
        else:
            each.__exit__(None, None, None)
    shutil.rmtree(folder, ignore_errors=True)


ADDRESS = {"include_dashboard": False}
NODE = {"num_cpus": 1, "num_gpus": 1, **ADDRESS}


class Record:
    """The rows of a search; `at` is called once, when so many are there."""

    def __init__(self, count=None, at=None):
        self.rows, self.parts, self.count, self.at = [], [], count, at

    def __call__(self, part, rows, results):
        assert part not in self.parts
        self.parts.append(part)
        self.rows += rows
        if self.at is not None and len(self.rows) >= self.count:
            act, self.at = self.at, None
            act()


class Installed:
    def where(self):
        return raymerge.__file__


def test_workers_of_a_cluster_run_the_drivers_code_and_find_its_relative_paths(cluster, tmp_path, monkeypatch):
    (tmp_path / "elsewhere/raymerge").mkdir(parents=True)
    (tmp_path / "elsewhere/raymerge/__init__.py").touch()  # another version's checkout, where the driver is started
    monkeypatch.chdir(tmp_path / "elsewhere")
    made = cluster(0)
    made.add_node(num_cpus=1, **ADDRESS)
    monkeypatch.chdir(tmp_path)
    with WorkerPool(Installed, {}, count=1, wait_s=_WAIT_S) as pool:
        (where,) = pool.broadcast("where")
    assert "/py_modules_files/" in where, "its own folder, whatever is installed or lies there"
    shutil.copytree(MODEL_PATH, "model")
    shutil.copytree(MMLU_PATH, "mmlu")
    settings = ["model.path=./model", "data.mmlu=mmlu", "output.run=run", "workers.count=1"]
    assert experiments.evaluate(load_config(None, [*EVALUATED, *settings]), command=["test"]).complete


def make_pool(tmp_path, count, events=None, **options):
    options = {"gpus_per_worker": 1, "wait_s": _WAIT_S, "max_restarts": 10, **options}
    told = None if events is None else lambda *event: events.append(event)
    return WorkerPool(Slow, {"folder": str(tmp_path)}, count=count, on_event=told, **options)


def search(pool, tmp_path, record, *, candidates=CANDIDATES, known=(), batch=1):
    batches = BatchSearcher(
        RandomProposer(dimensions=2, bounds=(0, 1), seed=0, known=known),
        candidates=candidates,
        batch=batch,
        pool=pool,
        describe=lambda point: {"searcher": "random", "plan_id": f"{point[0]:.9f}"},
        minimise=False,
        record=record,
        replayed=list(record.rows),
    )
    return run_search(batches, name="random", storage_path=str(tmp_path / "tune"))


def check(record, tmp_path, *, again, candidates=CANDIDATES):
    """Every candidate once, and at most `again` of them scored more than once."""
    assert sorted(row["iteration"] for row in record.rows) == list(range(candidates))
    assert len({row["plan_id"] for row in record.rows}) == candidates
    assert {row["status"] for row in record.rows} == {"ok"}
    scored = Counter(line.split()[1] for line in (tmp_path / "scored").read_text().splitlines())
    assert set(scored) == {row["plan_id"] for row in record.rows}
    assert sum(scored.values()) - candidates <= again


def kill_process(pool, slot):
    """SIGKILL to the process of one actor."""
    _, pid = ray.get(pool._slots[slot].handle.call.remote("where"))
    os.kill(pid, signal.SIGKILL)


def test_a_search_uses_every_node(cluster, tmp_path):
    nodes = 4
    cluster(nodes)
    placement = plan_workers("auto", "auto", 1, cluster_nodes())
    assert (placement.count, placement.gpus) == (nodes, 1.0)
    with make_pool(tmp_path, placement.count) as pool:
        deadline = time.monotonic() + _WAIT_S
        while pool.awaited and time.monotonic() < deadline:
            pool.poll()
            time.sleep(0.2)
        assert len({node for node, _ in pool.broadcast("where")}) == nodes
        record = Record()
        outcome = search(pool, tmp_path, record)
    check(record, tmp_path, again=0)
    assert {row["actor"] for row in record.rows} == {f"worker-{slot}" for slot in range(nodes)}
    assert sum(row["candidates"] for row in outcome.workers) == CANDIDATES


def test_fractions_of_gpus_are_spread_over_the_nodes(cluster, tmp_path):
    made = cluster(0)
    for _ in range(2):
        made.add_node(**{**NODE, "num_cpus": 4})
    with make_pool(tmp_path, 4, gpus_per_worker=0.5) as pool:
        deadline = time.monotonic() + _WAIT_S
        while pool.awaited and time.monotonic() < deadline:
            pool.poll()
            time.sleep(0.2)
        assert Counter(Counter(node for node, _ in pool.broadcast("where")).values()) == {2: 2}


def test_a_node_removed_in_mid_search_loses_nothing_and_does_not_hold_it_up(cluster, tmp_path):
    made, events = cluster(2), []
    with make_pool(tmp_path, 2, events) as pool:
        record = Record(8, lambda: made.remove_node(made.nodes[0], allow_graceful=False))
        search(pool, tmp_path, record)
        assert (pool.count, pool.awaited) == (1, 1)
    check(record, tmp_path, again=1)
    assert [kind for kind, _, _ in events] == ["lost"]


def test_a_node_that_replaces_the_last_one_takes_over_and_one_more_joins(cluster, tmp_path):
    made, events = cluster(1), []

    def replace():
        made.remove_node(made.nodes[0], allow_graceful=False)
        made.add_node(**NODE)
        made.add_node(**NODE)

    count = [1]
    with make_pool(tmp_path, 1, events, grow=lambda: count[0]) as pool:
        record = Record(6, lambda: (replace(), count.__setitem__(0, 2)))
        search(pool, tmp_path, record, candidates=40)
        deadline = time.monotonic() + 60.0
        while pool.count < 2 and time.monotonic() < deadline:  # a slow machine starts it after the search has ended
            pool.poll()
            time.sleep(0.2)
        assert pool.count == 2
    check(record, tmp_path, again=1, candidates=40)
    kinds = Counter(kind for kind, _, _ in events)
    assert kinds["joined"] == 1 and kinds["lost"] == 1 and kinds["back"] + kinds["replaced"] >= 1


def test_a_cluster_that_is_lost_ends_the_search_at_its_deadline_and_a_new_start_goes_on(cluster, tmp_path):
    made = cluster(1)
    record = Record(6, lambda: made.remove_node(made.nodes[0], allow_graceful=False))
    with make_pool(tmp_path, 1, wait_s=30.0) as pool:
        with pytest.raises(NoRoomError, match=r"has been there for 30 s .*0 GPUs.*run the same command again"):
            search(pool, tmp_path, record)
    assert 6 <= len(record.rows) < CANDIDATES
    made.add_node(**NODE)
    with make_pool(tmp_path, 1) as pool:
        search(pool, tmp_path, record)
    check(record, tmp_path, again=1)


def test_killed_actors_lose_nothing(cluster, tmp_path):
    cluster(2)
    events = []
    with make_pool(tmp_path, 2, events) as pool:
        record = Record(6, lambda: kill_process(pool, pool.present[0]))
        search(pool, tmp_path, record, batch=2)
    check(record, tmp_path, again=2)
    assert "lost" in [kind for kind, _, _ in events]


def test_a_scorer_that_hangs_is_replaced_and_holds_nobody_up(cluster, tmp_path):
    cluster(2)
    events = []
    with make_pool(tmp_path, 2, events, timeout_s=20.0) as pool:
        record = Record()
        search(pool, tmp_path, record, known=[[HANGS, 0.5]])
    check(record, tmp_path, again=1)
    assert [(kind, "hangs" in detail) for kind, _, detail in events][0] == ("lost", True)
    assert record.rows[-1]["plan_id"] == f"{HANGS:.9f}" or record.rows[-1]["iteration"] == CANDIDATES - 1


@pytest.fixture
def local(monkeypatch):
    """A local Ray with a dashboard, as `workers.dashboard: true` starts it; the dashboard's address."""
    folder = tempfile.mkdtemp(prefix="rayd")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with start_ray(num_cpus=2, dashboard=True) as address:
        yield address
    shutil.rmtree(folder, ignore_errors=True)


def listening():
    """Addresses (hexadecimal, as /proc has them) on which this process's Ray listens."""
    session = ray._private.worker._global_node.get_session_dir_path()
    processes = [
        path.parent
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if session.encode() in path.read_bytes() or "ray::" in path.read_text(errors="replace")
    ]
    sockets = set()
    for process in processes:
        try:
            sockets |= {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue  # it has ended meanwhile
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local_address, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.add(local_address.partition(":")[0])
    return found


def test_a_dashboard_listens_on_the_loopback_alone(local):
    assert local.startswith("http://127.0.0.1:")
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            with urllib.request.urlopen(f"{local}/api/version", timeout=10) as answer:
                assert ray.__version__.encode() in answer.read()
            break
        except urllib.error.HTTPError as error:
            assert error.code == 401, "token authentication"
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert listening() <= {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_a_search_into_an_object_store_goes_on_from_what_is_stored_there(local, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    where = "fsspec+memory://bucket/search"
    settings = load_config(None, [*SETTINGS, f"output.run={where}", "output.save_best=true"])
    run = experiments.search(settings, command=["test"])
    assert run.complete and any(tmp_path.rglob("trunk-*.safetensors"))
    files, base = FileSystem.from_uri(where)
    files.delete_file(f"{base}/manifest.json")
    # Of a complete run the parts are in one file.
    kept = [row for row in run.read("trials").to_pylist() if (row["searcher"], row["iteration"]) not in GONE]
    run.replace("trials", kept)
    run = experiments.search(settings, command=["again"])
    rows = [row for row in run.read("trials").to_pylist() if row["searcher"] == "random"]
    assert sorted(row["iteration"] for row in rows) == list(range(30))
    assert run.manifest()["random_search"]["candidates_this_call"] == 2
    on_disk = experiments.evaluate(
        load_config(None, [*EVALUATED, f"output.run=file://{tmp_path}/evaluated"]), command=["test"]
    )
    assert on_disk.is_local and (tmp_path / "evaluated" / "manifest.json").is_file()
    model = Path(run.manifest()["best"]["model"].removeprefix("fsspec+memory://")).name
    assert f"{base}/models/{model}/model.safetensors" in {
        info.path for info in files.get_file_info(FileSelector(f"{base}/models", recursive=True))
    }


GONE = (("random", 5), ("random", 11))
EVALUATED = ["data.subjects=country_capitals", "data.report_limit_per_subject=4", "data.perplexity_tokens=200"]
SETTINGS = [
    "data.subjects=country_capitals,colour_mixing,number_words",
    "data.limit_per_subject=4",
    "data.report_limit_per_subject=4",
    "data.perplexity_tokens=200",
    "search.searcher=random",
    "search.candidates=30",
    "search.batch=1",
    "workers.count=2",
    "output.figures=false",
    "output.save_best=false",
]


def command_line(out, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "raymerge", "search", "--out", str(out), *words],
        env=env | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def searched(out):
    folder = out / "tables" / "trials"
    return len(list(folder.glob("random-*.parquet"))) if folder.is_dir() else 0


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_driver_that_is_killed_or_stopped_resumes_with_the_same_command(tmp_path, sent):
    """A whole search on the embedded model over a local Ray; SIGTERM is what `ray job stop` sends."""
    out = tmp_path / "run"
    first, deadline = command_line(out), time.monotonic() + _WAIT_S
    while searched(out) < 8:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(sent)
    said, _ = first.communicate(timeout=_WAIT_S)
    assert first.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 128 + signal.SIGTERM), said
    run = RunDirectory.load(out)
    before = {row["iteration"]: row for row in run.read("trials").to_pylist() if row["searcher"] == "random"}
    assert 8 <= len(before) < 30 and run.manifest() is None
    again = command_line(out)
    said, _ = again.communicate(timeout=_WAIT_S)
    assert again.returncode == 0, said
    rows = [row for row in run.read("trials").to_pylist() if row["searcher"] == "random"]
    assert sorted(row["iteration"] for row in rows) == list(range(30))
    assert {row["iteration"]: row for row in rows}.items() >= before.items()
    assert run.manifest()["random_search"]["candidates_this_call"] == 30 - len(before)
    (incident,) = run.read("incidents").to_pylist()
    assert incident["kind"] == "resumed" and " trials" in incident["detail"]
    assert "1 start with stored results" in said
