"""`ray job submit` of jobs/search_alphas.py, end to end, to a head of the test's own with token authentication.

The head listens on 127.0.0.1 alone, under free ports, with a folder and a token of its own. Everything runs in
subprocesses, so that no Ray of this process or of the caller's environment is touched.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from raymerge.tables import RunDirectory

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent  # where `ray` and the python of the jobs stand
SETTINGS = [
    "data.subjects=country_capitals,colour_mixing,number_words",
    "data.limit_per_subject=4",
    "data.report_limit_per_subject=4",
    "data.perplexity_tokens=200",
    "search.candidates=5",
    "search.initial=2",
    "search.random_candidates=2",
    "workers.count=2",
    "output.figures=false",
]
# What .gitignore names, planted in the project that is submitted.
IGNORED = (".venv/lib/planted.py", "runs/demo/tables/planted.parquet", "raymerge/__pycache__/planted.pyc")
VERSION = "0+submitted"  # of the copy that is uploaded: what the machine has installed has another
_START_S, _JOB_S, _END_S = 90, 240, 20


def environment(token_file=None, **variables):
    """The caller's environment without anything of Ray's, and the token where one is given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {
        "PATH": f"{BIN}{os.pathsep}{env.get('PATH', os.defpath)}",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "RAY_AUTH_MODE": "token",
    }
    if token_file is not None:
        env["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    return env | variables


def free_ports(count):
    """Ports that nothing listens on, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def status_without_token(url):
    """The HTTP status of a request that carries no token, or None where nobody listens."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:  # refused, reset or timed out: not up yet
        return None


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The checkout as it would be submitted, with ignored files planted in it and a version of its own."""
    folder = tmp_path_factory.mktemp("submitted") / "project"
    ignored = (".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*ignored))
    for name in IGNORED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("must not be uploaded\n", encoding="utf-8")
    with (folder / "raymerge/__init__.py").open("a", encoding="utf-8") as module:
        module.write(f'__version__ = "{VERSION}"\n')
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory, project):
    """A Ray head; `ray(*args)` runs the command line against it from the project's folder."""
    token_file = tmp_path_factory.mktemp("token") / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32), encoding="utf-8")
    # Ray's sockets lie in this folder, and a socket's path may have 107 characters: pytest's own is too deep.
    folder = Path(tempfile.mkdtemp(prefix="rayjobs"))
    dashboard, client = free_ports(2)
    url, log = f"http://127.0.0.1:{dashboard}", folder / "head.log"
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--port=0", "--num-cpus=3",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0", "--min-worker-port=0",
        "--max-worker-port=0", "--object-store-memory=100000000", f"--temp-dir={folder / 'ray'}",
        "--disable-usage-stats",
    ]  # fmt: skip
    # As cluster._loopback_only says, only this switch keeps all of Ray's ports on the loopback.
    env = environment(token_file, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")

    def ray(*args, token=True, **variables):
        env = environment(token_file if token else None, **variables)
        if not token:
            env["HOME"] = str(folder)  # ~/.ray/auth_token is another cluster's
        return subprocess.run(
            [str(BIN / "ray"), *args], env=env, cwd=project, timeout=_JOB_S, capture_output=True, text=True
        )

    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + _START_S
        while (status := status_without_token(url)) is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.3)
        yield SimpleNamespace(url=url, ray=ray, folder=folder, status=status)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def end(process):
    """Ask the head to end what it started, then end what is left of its group by force."""
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(_END_S)


def submit(head, name, out, *settings, script="search_alphas", words=("jobs/configs/demo.yaml",), wait=True, **options):
    args = ["job", "submit", f"--address={head.url}", f"--submission-id={name}", "--working-dir=.", "--log-color=false"]
    entry = ["--", "python", f"jobs/{script}.py", *words, "--out", str(out)]
    overrides = [word for setting in settings for word in ("--set", setting)]
    return head.ray(*args, *([] if wait else ["--no-wait"]), *entry, *overrides, **options)


@pytest.fixture(scope="module")
def done(head, tmp_path_factory):
    """A search that was submitted: its folder and the finished command."""
    out = tmp_path_factory.mktemp("runs") / "search"
    return SimpleNamespace(out=out, process=submit(head, "search", out, *SETTINGS))


def test_a_submitted_search_is_complete_and_counts_every_trial_once(head, done):
    assert done.process.returncode == 0, done.process.stdout + done.process.stderr
    assert "Job 'search' succeeded" in done.process.stdout
    run = RunDirectory.load(done.out)
    assert run.complete
    trials = run.read("trials").to_pylist()
    counts = {
        name: sorted(row["iteration"] for row in trials if row["searcher"] == name) for name in ("bayes", "random")
    }
    assert counts == {"bayes": list(range(5)), "random": list(range(2))}
    assert {row["status"] for row in trials} == {"ok"}
    manifest = run.manifest()
    assert manifest["rows"]["trials"] == len(trials)
    assert manifest["raymerge_version"] == VERSION
    assert Path(run.path_of("models", "found_bayes"), "model.safetensors").is_file()


def test_the_same_job_again_leaves_a_complete_run_as_it_is(head, done):
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*") if path.is_file()}
    again = submit(head, "again", done.out, *SETTINGS)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in done.out.rglob("*") if path.is_file()} == before


def test_the_upload_is_the_project_without_what_git_ignores(head, done, project):
    (uploaded,) = (
        path
        for path in (head.folder / "ray/session_latest/runtime_resources/working_dir_files").glob("_ray_pkg_*")
        if path.is_dir()
    )
    names = {path.relative_to(uploaded).as_posix(): path for path in uploaded.rglob("*") if path.is_file()}
    own = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}
    assert set(IGNORED) <= own and not set(IGNORED) & set(names)
    # Modules may have been compiled there since.
    assert {name for name in names if "__pycache__" not in name} == own - set(IGNORED)
    assert sum(path.stat().st_size for path in names.values()) < 20e6


def test_a_wrong_key_fails_the_job_with_its_message_and_writes_nothing(head, tmp_path):
    out = tmp_path / "run"
    failed = submit(head, "typo", out, "data.subjets=anatomy")
    assert failed.returncode == 1 and "Job 'typo' failed" in failed.stdout
    logs = head.ray("job", "logs", f"--address={head.url}", "typo")
    assert logs.returncode == 0
    assert "unknown key data.subjets: did you mean subjects?" in logs.stdout
    assert "Traceback" not in logs.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_job_leaves_a_run_that_the_same_job_finishes(head, tmp_path):
    out = tmp_path / "run"
    settings = [*SETTINGS, "search.searcher=random", "search.candidates=200", "search.batch=1"]
    assert submit(head, "stopped", out, *settings, wait=False).returncode == 0
    deadline = time.monotonic() + _JOB_S
    while len(list(out.glob("tables/trials/random-*.parquet"))) < 6:
        assert time.monotonic() < deadline, head.ray("job", "logs", f"--address={head.url}", "stopped").stdout
        time.sleep(0.05)
    assert head.ray("job", "stop", f"--address={head.url}", "stopped").returncode == 0
    # Ray kills after three seconds, in which a busy machine may not have said anything.
    assert "Job 'stopped' was stopped" in head.ray("job", "status", f"--address={head.url}", "stopped").stdout
    before = [row for row in RunDirectory.load(out).read("trials").to_pylist() if row["searcher"] == "random"]
    assert 6 <= len(before) < 200 and not (out / "manifest.json").exists()
    again = submit(head, "resumed", out, *settings)
    assert again.returncode == 0 and "1 start with stored results" in again.stdout
    run = RunDirectory.load(out)
    rows = [row for row in run.read("trials").to_pylist() if row["searcher"] == "random"]
    assert sorted(row["iteration"] for row in rows) == list(range(200)) and all(row in rows for row in before)
    assert run.manifest()["random_search"]["candidates_this_call"] == 200 - len(before)


def test_a_model_is_merged_and_evaluated_by_jobs(head, done, tmp_path):
    alphas = str(done.out / "models/found_bayes/alphas.json")
    merged = submit(head, "merge", tmp_path / "merged", script="merge", words=("demo", "--alphas", alphas))
    assert merged.returncode == 0, merged.stdout + merged.stderr
    words = (str(tmp_path / "merged"), "--subjects=country_capitals", "--limit=4", "--no-question-perplexity")
    evaluated = submit(head, "evaluate", tmp_path / "run", "data.perplexity_tokens=200", script="evaluate", words=words)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert RunDirectory.load(tmp_path / "run").complete and "Plain-text perplexity" in evaluated.stdout


def test_a_run_in_the_jobs_own_temporary_folder_is_refused(head):
    failed = submit(head, "relative", "runs/demo")
    assert failed.returncode == 1 and "temporary copy of the project" in failed.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "couldn't find an authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "Invalid authentication token"),
    ],
    ids=["none", "disabled", "wrong"],
)
def test_without_the_token_nothing_can_be_submitted(head, tmp_path, variables, message):
    refused = submit(head, "refused", tmp_path / "run", *SETTINGS, token=False, **variables)
    assert refused.returncode != 0 and message in refused.stderr
    assert not (tmp_path / "run").exists()
    listed = head.ray("job", "list", f"--address={head.url}")
    assert listed.returncode == 0 and "refused" not in listed.stdout


def test_the_server_itself_refuses_requests_without_a_token(head):
    assert head.status == 401
