"""experiments/common.py without workers: in what order work is handed out, and what a run is held to."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raymerge import file_hashes, identity
from raymerge.actors import NoRoomError
from raymerge.checkpoint import Checkpoint
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.device import choose_device
from raymerge.experiments import common
from raymerge.experiments.common import (
    Inputs,
    align,
    align_rows,
    cache_of,
    check_without_questions,
    compute_trunk,
    counted,
    describe_workers,
    draw_figures,
    finish,
    open_pool,
    open_run,
    read_inputs,
    settings_of,
    swept_cache,
)
from raymerge.file_hashes import sha256_of
from raymerge.identity import code_identity
from raymerge.inputs import CALIBRATION, REPORT, SEARCH, TEXT, task_role
from raymerge.plan import drop_block_plan, pairs_plan, tail_plan
from raymerge.plan_section import Similarity
from raymerge.progress import Silent
from raymerge.prompts import encode_questions
from raymerge.questions import load_questions
from raymerge.tables import RunDirectory, RunError
from raymerge.texts import text_hash
from raymerge.worker import ModelWorker
from raymerge.worker_memory import host_bytes

CHECKPOINT = Checkpoint("demo")
N_LAYERS = CHECKPOINT.n_layers


class Seen(Silent):
    """Progress that is written down."""

    def __init__(self):
        self.stages, self.done, self.said = [], [], []

    def stage(self, name, total):
        self.stages.append((name, total))

    def advance(self, done, detail=""):
        self.done.append(done)

    def message(self, text):
        self.said.append(text)


class Asked:
    """A pool whose workers answer by the given function."""

    def __init__(self, answer=lambda *_: None, rooms=((0, 1, "cache"),)):
        self.answer, self.items, self.rooms = answer, {}, rooms

    def broadcast(self, method, names):
        assert method == "trunk_room"
        self.named = names
        return list(self.rooms)

    def map(self, method, items, on_result=lambda *_: None):
        self.items[method] = list(items)
        found = [self.answer(item) for item in items]
        for number, result in enumerate(found):
            on_result(number, result)
        return found


def test_work_is_counted_as_it_finishes_and_handed_on():
    seen, handed = Seen(), []
    finished = counted(seen, lambda number, result: number * result, lambda *result: handed.append(result))
    for number, result in ((3, 2), (1, 5)):
        finished(number, result)
    assert seen.done == [6, 11] and handed == [(3, 2), (1, 5)]
    each = counted(seen)
    each(7, None), each(9, None)
    assert seen.done[2:] == [1, 2]


def test_states_of_every_shard_are_computed_once_the_largest_first():
    tokens = {SEARCH: [50, 10], REPORT: [40], task_role("t"): [70], TEXT: [60, 20], "retrieval": [30]}
    inputs = Inputs(questions={SEARCH: 0, REPORT: 0}, tasks={"t": 0}, checkpoint=CHECKPOINT, text="a text")

    def answer(item):
        return tokens[item] if isinstance(item, str) else tokens[item[0]][item[1]]

    pool, seen = Asked(answer), Seen()
    assert compute_trunk(pool, inputs, seen, ("retrieval",)) == {name: len(of) for name, of in tokens.items()}
    assert pool.items["compute_trunk"] == [
        (task_role("t"), 0), (TEXT, 0), (SEARCH, 0), (REPORT, 0), ("retrieval", 0), (TEXT, 1), (SEARCH, 1),
    ]  # fmt: skip
    assert seen.stages == [("trunk states (tokens)", 280)] and seen.done[-1] == 280
    bare = Asked(answer)
    compute_trunk(bare, Inputs(checkpoint=CHECKPOINT, text=None), seen)
    assert bare.items == {"shard_tokens": [], "compute_trunk": []}


def test_states_that_no_disk_has_room_for_are_refused_before_they_are_computed():
    """A sweep of 30 numbers of layers over MMLU's test questions has 370 GB of them with 4,096 features in bfloat16."""
    inputs = Inputs(questions={SEARCH: 0}, checkpoint=CHECKPOINT, text="a text")
    pool, seen = (
        Asked(
            lambda item: [5] if isinstance(item, str) else 5, [(4 * 10**11, 10**12, "/a"), (4 * 10**11, 10**9, "/b")]
        ),
        Seen(),
    )
    with pytest.raises(
        NoRoomError, match=r"take 400\.0 GB of a worker's cache, /b, whose disk has 1\.0 GB free: .*sweep.merges"
    ):
        compute_trunk(pool, inputs, seen)
    assert "compute_trunk" not in pool.items and pool.named == [SEARCH, TEXT]
    pool.rooms = [(4 * 10**11, 10**12, "/a")]
    compute_trunk(pool, inputs, seen)
    assert len(pool.items["compute_trunk"]) == 2 and "takes 400.0 GB; it may be deleted" in seen.said[0]


def averaged(pairs, alignment="neurons", alpha=0.5, **options):
    return pairs_plan(N_LAYERS, pairs, [alpha] * len(pairs), name="x", kind="fixed", alignment=alignment, **options)


def test_each_pair_of_layers_is_aligned_once_for_all_plans():
    pool = Asked()
    plans = [averaged([(5, 6), (4, 5)]), averaged([(5, 6)], alpha=0.2), averaged([(8, 9)], "none")]
    align(pool, [*plans, averaged([(2, 3)], "activations"), averaged([(7, 8)], "rows")], Silent())
    assert pool.items == {"align": [("activations", (2, 3)), ("neurons", (4, 5)), ("neurons", (5, 6))]}
    nothing = Asked()
    align(nothing, plans[2:], Silent())
    assert nothing.items == {}


def test_rows_are_matched_for_every_plan_that_asks_for_it_the_longest_first():
    one, two = averaged([(5, 6)], "rows"), averaged([(5, 6), (4, 5)], "rows")
    other, folded = averaged([(5, 6)], "rows", 0.2), averaged([(5, 6)], "rows", norms="fold")
    pool = Asked()
    align_rows(pool, [one, two, averaged([(2, 3)]), other, folded, one], Silent())
    assert pool.items == {"align_rows": [two, one, other, folded]}
    nothing = Asked()
    align_rows(nothing, [averaged([(2, 3)])], Silent())
    assert nothing.items == {}


def test_a_text_of_which_nothing_is_left_is_refused_with_what_takes_it():
    """The calibration has the tokens after those that are reported on."""
    few = ["data.subjects=number_words", "data.limit_per_subject=1", "calibration.text=demo", "calibration.tokens=50"]
    inputs = read_inputs(load_config(None, [*few, "data.perplexity_tokens=300"]), (CALIBRATION,))
    assert inputs.calibration[1] == 300 and inputs.text is not None
    config = load_config(None, [*few, "data.perplexity_tokens=100000"])
    with pytest.raises(ConfigError, match=r"^calibration.text = demo: .*; use a longer text, or fewer of its tokens"):
        read_inputs(config, (CALIBRATION,))
    assert read_inputs(load_config(None, few[:2]), (SEARCH,), text=False).text is None


@pytest.mark.parametrize("shared", [False, True])
def test_what_killed_processes_left_in_a_cache_is_deleted_when_it_is_a_day_old(shared, tmp_path):
    config = load_config(None, [f"output.cache={tmp_path / 'shared'}"] if shared else [])
    run = RunDirectory.open(tmp_path / "run", {}, "search")
    for name, age in (("_tmp.old", 2 * 86400.0), ("_tmp.new", 60.0), ("states", 2 * 86400.0)):
        path = Path(cache_of(config, run)) / name
        path.mkdir(parents=True)
        os.utime(path, (time.time() - age,) * 2)
    with swept_cache(config, run) as cache:
        assert Path(cache) == (tmp_path / "shared" if shared else tmp_path / "run" / "cache")
        assert sorted(path.name for path in Path(cache).iterdir()) == ["_tmp.new", "states"]


# -- what a run is held to -------------------------------------------------------------------------------------------


def test_a_run_is_held_to_the_sections_that_its_experiment_depends_on():
    config = load_config(None, [])
    assert list(settings_of(config, "model", "tasks", "plan")) == ["model", "plan", "workers", "output"]
    task = load_config(None, ["tasks.t.format=piqa", "tasks.t.file=x"])
    assert list(settings_of(task, "model", "tasks")) == ["model", "tasks", "workers", "output"]


def opened(folder, *, plans=(), matrix=None, text="a text"):
    inputs = Inputs(checkpoint=CHECKPOINT, text=text)
    config = load_config(None, [f"output.run={folder}"])
    similarity = None if matrix is None else Similarity(matrix, None)
    return open_run(config, "search", {}, inputs, Silent(), plans=plans, similarity=similarity)


@pytest.mark.parametrize(
    "other",
    [
        {"plans": [tail_plan(N_LAYERS, [0.25], name="x", kind="file")]},
        {"matrix": np.eye(3) + 1e-6},
        {"text": "another text"},
    ],
)
def test_a_run_that_holds_results_goes_on_with_the_same_merges_matrix_and_text_alone(other, tmp_path):
    begun = {"plans": [tail_plan(N_LAYERS, [0.5], name="x", kind="file")], "matrix": np.eye(3)}
    run = opened(tmp_path / "run", **begun)
    row = {"merges": 1, "first": 2, "last": 2, "measure": "given", "score": None, "chosen": True, "tokens": None}
    run.append("blocks", [row], part="a")
    with pytest.raises(RunError):
        opened(tmp_path / "run", **begun | other)
    opened(tmp_path / "run", **begun | {"matrix": np.eye(3) + 1e-14})  # a last bit of another machine


def test_a_complete_run_stays_as_it_is(tmp_path):
    opened(tmp_path / "run").write_manifest(command=["test"])
    written = (tmp_path / "run" / "manifest.json").read_bytes()
    again = opened(tmp_path / "run", text="another text")
    assert again.complete and (tmp_path / "run" / "manifest.json").read_bytes() == written


def test_a_manifest_names_model_prompts_and_text(tmp_path):
    config = load_config(None, ["model.path=demo"])

    def manifest(name, **text):
        run = opened(tmp_path / name)
        finish(run, config, Inputs(checkpoint=CHECKPOINT, **text), [], Silent(), command=["test"], seeds={"data": 3})
        return run.manifest()

    of_text = manifest("text", text="a text")
    assert of_text["model"] == {
        "path": config.model.path,
        "identity": CHECKPOINT.identity,
        "revision": None,
        "gguf": None,
    }
    assert of_text["text_hash"] == text_hash("a text") and of_text["data"] == {} and of_text["seeds"] == {"data": 3}
    assert manifest("questions")["text_hash"] is None and of_text["figures"] == []


@pytest.mark.parametrize("place", ["analysis", "raymerge/_analysis"])
def test_figures_are_drawn_by_the_scripts_of_the_checkout_or_wheel_and_one_that_fails_says_why(
    tmp_path, monkeypatch, place
):
    run, seen = RunDirectory.open(tmp_path / "run", {}, "search"), Seen()
    monkeypatch.setattr("raymerge.__file__", str(tmp_path / "raymerge" / "__init__.py"))
    scripts = tmp_path / place
    scripts.mkdir(parents=True)
    script = "import pathlib, sys; _, run, _, out = sys.argv; out = pathlib.Path(out); out.mkdir(exist_ok=True);"
    for name in "ba":
        (scripts / f"{name}.py").write_text(f"{script} (out / '{name}.png').write_text(run)")
    (scripts / "bad.py").write_text("import sys; print('no rows', file=sys.stderr); sys.exit(3)")
    assert draw_figures(run, ["b.py", "a.py"], seen) == ["figures/a.png", "figures/b.png"]
    assert (tmp_path / "run" / "figures" / "a.png").read_text() == run.path_of()
    assert seen.stages == [("figures", 2)] and seen.done == [1, 2]
    with pytest.raises(RuntimeError, match=r"analysis/bad.py failed with exit code 3: no rows"):
        draw_figures(run, ["a.py", "bad.py"], seen)


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ("os.kill(os.getpid(), 9)", "it was ended by signal 9 (9: most often out of memory)"),
        ("raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", "OSError: [Errno 28] No space left on device"),
    ],
)
def test_figures_for_which_there_is_no_room_are_no_bug(tmp_path, monkeypatch, ends, why):
    """The memory's and the disk's end are the user's to mend, without a trace of ours."""
    run = RunDirectory.open(tmp_path / "run", {}, "search")
    monkeypatch.setattr("raymerge.__file__", str(tmp_path / "raymerge" / "__init__.py"))
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "a.py").write_text(f"import errno, os; {ends}")
    with pytest.raises(
        NoRoomError, match=f"analysis/a.py could not draw its figures into {tmp_path}/run/figures: "
    ) as raised:
        draw_figures(run, ["a.py"], Silent())
    assert f": {why}. Make room and run the same command again" in str(raised.value)


# -- workers ---------------------------------------------------------------------------------------------------------


def pool_of(monkeypatch, *settings, nodes=({"CPU": 8.0},), **options):
    """(arguments of the worker, options of the pool)"""
    made = []
    monkeypatch.setattr(common, "WorkerPool", lambda _, arguments, **pool: made.append((arguments, pool)))
    monkeypatch.setattr(common, "cluster_nodes", lambda: list(nodes))
    inputs = SimpleNamespace(roles=("search",), checkpoint=CHECKPOINT, questions={})
    open_pool(load_config(None, list(settings)), inputs, "cache", **options)
    return made[0]


def test_a_pool_is_as_the_workers_section_says(monkeypatch):
    template = drop_block_plan(N_LAYERS, 4, 2)
    section = ["count=3", "cpus_per_worker=2", "timeout_s=7", "wait_s=8", "max_restarts=9"]
    run = SimpleNamespace(note=lambda *_: None)
    workers, pool = pool_of(
        monkeypatch, *(f"workers.{setting}" for setting in section), template=template, firsts=[4, 5], run=run
    )
    assert (workers["roles"], workers["cache"], workers["template"], workers["firsts"]) == (
        ("search",), "cache", template, (4, 5),
    )  # fmt: skip
    assert "shards" not in workers and pool.pop("on_event") is run.note
    assert pool == {
        "count": 3, "cpus_per_worker": 2, "gpus_per_worker": 0, "timeout_s": 7, "wait_s": 8, "max_restarts": 9,
        "grow": None,
    }  # fmt: skip


def test_workers_are_told_the_hashes_that_the_driver_has_found(monkeypatch, tmp_path):
    monkeypatch.setattr(file_hashes, "_known", {})
    sha256_of(CHECKPOINT.directory / "model.safetensors")
    # Of their own model only: Ray keeps more than 100 kB, some 870 files, where a restart of a worker may not find it.
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", -1)
    (tmp_path / "another.safetensors").write_bytes(b"weights")
    sha256_of(tmp_path / "another.safetensors")
    workers, _ = pool_of(monkeypatch)
    ((state, found),) = workers["hashes"]
    identity = Checkpoint("demo").identity
    for learnt, same in ((found, True), ("0" * 64, False)):
        monkeypatch.setattr(file_hashes, "_known", {})
        worker = ModelWorker(load_config(None, []), roles=(), cache="", hashes=[(state, learnt)])
        assert (worker.describe()["model_identity"] == identity) == same


def test_workers_that_memory_is_too_small_for_are_fewer_and_have_more_cpus(monkeypatch):
    seen = Seen()
    of_search = tail_plan(N_LAYERS, [0.5] * 5, name="k", kind="found")
    each = [host_bytes(CHECKPOINT, plans) for plans in ([], [of_search])]
    layer = sum(tensor.numel() for tensor in CHECKPOINT.layer(0, dtype=torch.float32).values())
    assert each[1] - each[0] == 6 * 4 * layer
    node = {"CPU": 8.0, "memory": 3.5 * each[1]}
    workers, pool = pool_of(monkeypatch, nodes=[node], plans=[of_search], progress=seen)
    assert (pool["count"], pool["cpus_per_worker"], pool["grow"]()) == (3, 2, 3)
    assert workers["config"].workers.cpus_per_worker == 2  # the threads that it computes with
    assert seen.said[0] == (
        "Memory has room for 3 workers of about 0.5 GB, with 2 CPUs each; workers.count asks for another number."
    )
    questions = load_questions("demo").questions
    known = encode_questions(load_questions("demo"), CHECKPOINT.tokenizer)
    own = sum(len(ids) for shard in known.shards for group in shard.groups for ids in group.sequences)
    states = host_bytes(CHECKPOINT, [of_search], questions=questions) - each[1]
    assert 0.5 < states / (4 * own * CHECKPOINT.config.hidden_size) < 2
    of_sweep = [tail_plan(N_LAYERS, [0.5] * k, name="k", kind="fixed") for k in (1, 4, 7, 7)]
    assert host_bytes(CHECKPOINT, of_sweep) - each[0] == (5 + 8) * 4 * layer  # two scorers are held
    assert host_bytes(CHECKPOINT, [drop_block_plan(N_LAYERS, 4, 2)]) == each[0]  # run layer by layer
    width = CHECKPOINT.config.intermediate_size
    assert host_bytes(CHECKPOINT, [of_search], refits=True) - each[1] == 48 * width**2
    assert pool_of(monkeypatch, "workers.count=8", nodes=[node], plans=[of_search])[1]["count"] == 8


@pytest.mark.parametrize(("node", "gpus"), [({"CPU": 8.0}, 0), ({"CPU": 8.0, "GPU": 2.0}, 1)])
def test_a_worker_takes_the_gpus_that_ray_gives_it_and_no_other(node, gpus, monkeypatch):
    """Where Ray has none, as after `ray start --num-gpus=0`, torch may see one all the same: every worker took it."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("a GPU") or False)
    workers, pool = pool_of(monkeypatch, nodes=[node])
    assert pool["gpus_per_worker"] == gpus
    choose_device(workers["config"].workers.gpus_per_worker)
    assert asked == ["a GPU"] * gpus


def test_a_pool_has_no_more_workers_than_there_is_work_for_but_one(monkeypatch):
    for most, count in ((None, 8), (3, 3), (20, 8), (0, 1)):
        workers, pool = pool_of(monkeypatch, most=most, shards_each=2)
        assert (pool["count"], pool["grow"](), workers["shards"]) == (count, count, 2 * count)
        assert pool["on_event"] is None


def test_what_workers_hold_is_said_and_the_dtype_is_what_a_run_goes_on_in(monkeypatch):
    inputs = SimpleNamespace(checkpoint=SimpleNamespace(identity="m", tokenizer_identity="t"), identities={})
    worker = {"host": "a", "device": "cpu", "dtype": "float32", "model_identity": "m", "data_identities": {}}
    worker |= {"tokenizer_identity": "t", "code": code_identity()}
    held, admitted = [], []
    run = SimpleNamespace(hold_to=held.append)
    pool = SimpleNamespace(
        gpus_per_worker=0, admit=lambda *how: admitted.append(how), broadcast=lambda _: [worker, worker]
    )
    assert describe_workers(pool, inputs, Silent(), run) == [worker, worker] and held == [{"dtype": "float32"}]
    ((method, check),) = admitted  # of every worker that comes later
    with pytest.raises(ConfigError, match="model_identity of the worker on a is other"):
        check(worker | {"model_identity": "other"})
    assert method == "describe"
    monkeypatch.setattr(identity, "digest", lambda _: "newer")  # of files that were changed since
    with pytest.raises(ConfigError, match="worker on a runs another raymerge than this process, .*install the same"):
        check(worker | {"code": code_identity()})
    assert describe_workers(pool, inputs, Silent()) == [worker, worker]
    for key in ("model_identity", "tokenizer_identity", "data_identities"):
        pool.broadcast = lambda _, key=key: [worker, worker | {key: "other"}]
        with pytest.raises(ConfigError, match=f"{key} of the worker on a is other"):
            describe_workers(pool, inputs, Silent(), run)


def test_a_run_without_questions_needs_something_to_judge_by():
    check_without_questions(load_config(None, []), {"plan.alignment": ["activations"]}, calibrates=True)
    text = load_config(None, ["data.mmlu=null"])
    check_without_questions(text, {"plan.alignment": ["none", "neurons"]}, calibrates=False)
    task = load_config(None, ["data.mmlu=null", "data.perplexity_text=null", "tasks.t.format=piqa", "tasks.t.file=x"])
    check_without_questions(task, {}, calibrates=False)
    nothing = load_config(None, ["data.mmlu=null", "data.perplexity_text=null"])
    with pytest.raises(ConfigError, match="nothing to judge plans by"):
        check_without_questions(nothing, {}, calibrates=False)
    with pytest.raises(ConfigError, match="set calibration.text"):
        check_without_questions(text, {}, calibrates=True)
    calibrated = load_config(None, ["data.mmlu=null", "calibration.text=demo"])
    check_without_questions(calibrated, {}, calibrates=True)
