"""Run directories: round trips, resuming, replacing and compacting without a torn read, manifests."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import yaml

from raymerge.parts import Tables
from raymerge.storage import Storage
from raymerge.tables import SCHEMAS, RunDirectory, RunError

CONFIG = {
    "model": {"path": "demo", "revision": None},
    "search": {"bounds": [0.0, 1.0], "candidates": 60},
    "workers": {"count": 2},
    "output": {"run": "runs/demo"},
}


def receipt(i: int, plan: str = "p") -> dict:
    return {"plan_id": plan, "tensor": f"t{i}", "max_abs_change": i / 2, "relative_change": 0.0}


def tensors(run: RunDirectory) -> list[str]:
    return run.read("receipts").column("tensor").to_pylist()


@pytest.fixture
def run(tmp_path):
    return RunDirectory.open(tmp_path / "run", CONFIG, "search")


@pytest.fixture(params=["path", "file_uri", "mock", "subtree"])
def place(request, tmp_path):
    """Keyword arguments of `open` and `load` for each kind of place."""
    if request.param == "path":
        return {"path": tmp_path / "run"}
    if request.param == "file_uri":
        return {"path": (tmp_path / "run").as_uri()}
    if request.param == "mock":
        return {"path": "run", "filesystem": pafs._MockFileSystem()}
    return {"path": "run", "filesystem": pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())}


def value_for(field: pa.Field):
    if pa.types.is_list(field.type):
        return [0.25, 1 / 3]
    if pa.types.is_floating(field.type):
        return 0.125
    return True if pa.types.is_boolean(field.type) else "größe" if pa.types.is_string(field.type) else 3


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", SCHEMAS)
def test_every_table_comes_back_with_its_schema(table, place):
    run = RunDirectory.open(config=CONFIG, experiment="search", **place)
    full = {field.name: value_for(field) for field in SCHEMAS[table] if field.name != "run_id"}
    bare = {name: value for name, value in full.items() if not SCHEMAS[table].field(name).nullable}
    assert run.read(table).schema.equals(SCHEMAS[table], check_metadata=True)
    run.append(table, [full])
    run.append(table, pa.Table.from_pylist([bare]))
    back = RunDirectory.load(**place).read(table)
    assert back.schema.equals(SCHEMAS[table], check_metadata=True)
    empty = {name: None for name in full if name not in bare}
    assert back.to_pylist() == [{"run_id": run.run_id, **full}, {"run_id": run.run_id, **bare, **empty}]
    run.compact(table)
    run.replace(table, back)
    assert run.read(table).equals(back) and run.row_counts() == {table: 2}


def test_columns_can_be_chosen(run):
    run.append("receipts", [receipt(0)])
    assert run.read("receipts", ["tensor", "plan_id"]).to_pylist() == [{"tensor": "t0", "plan_id": "p"}]
    with pytest.raises(ValueError, match="no column alpha"):
        run.read("receipts", ["alpha"])


def test_parts_keep_their_order_across_processes(run, tmp_path):
    run.append("receipts", [receipt(0)])
    again = RunDirectory.open(tmp_path / "run", CONFIG, "search")
    again.append("receipts", [receipt(1)])
    again.compact("receipts")
    third = RunDirectory.open(tmp_path / "run", CONFIG, "search")
    assert third.append("receipts", [receipt(2)]).startswith("000002-")
    assert tensors(run) == ["t0", "t1", "t2"]


def test_the_values_that_columns_have_together_are_given_once(run):
    assert run.distinct("incidents", ["kind", "worker"]) == set()
    for kind, worker in (("lost", "a"), ("lost", "b"), ("lost", "a"), ("resumed", None)):
        run.note(kind, worker)
    assert run.distinct("incidents", ["kind", "worker"]) == {("lost", "a"), ("lost", "b"), ("resumed", None)}
    assert run.distinct("incidents", ["kind"]) == {("lost",), ("resumed",)}


def test_a_gathered_table_says_what_its_columns_mean(run):
    """Whatever reads the file, and whether its parts were written by a version that did not know."""
    run.append("receipts", [{"plan_id": "p", "tensor": "t", "max_abs_change": 0.5, "relative_change": 0.25}], part="a")
    run.compact("receipts")
    run.append("receipts", [{"plan_id": "q", "tensor": "t", "max_abs_change": 0.5, "relative_change": 0.25}], part="b")
    run.compact("receipts")
    schema = pq.read_schema(run.path_of("tables") + "/receipts/all.parquet")
    assert schema.field("max_abs_change").metadata[b"description"] == b"largest absolute difference"
    assert schema.metadata[b"description"].startswith(b"One row per tensor")
    assert run.read("receipts")["plan_id"].to_pylist() == ["p", "q"]


def test_the_same_part_again_replaces_it_also_after_compact(run):
    for i in range(3):
        run.append("receipts", [receipt(i), receipt(10 * i)], part=f"batch_{i}")
    run.append("receipts", [receipt(7)], part="batch_1")
    assert tensors(run) == ["t0", "t0", "t7", "t2", "t20"]
    run.compact("receipts")
    assert tensors(run) == ["t0", "t0", "t7", "t2", "t20"]
    run.append("receipts", [receipt(8), receipt(9)], part="batch_1")
    assert sorted(tensors(run)) == ["t0", "t0", "t2", "t20", "t8", "t9"]
    run.append("receipts", [receipt(6)], part="batch_3")
    run.compact("receipts")
    run.append("receipts", [], part="batch_0")
    run.append("receipts", [receipt(5)], part="batch_3")
    assert sorted(tensors(run)) == ["t2", "t20", "t5", "t8", "t9"]
    assert run.row_counts() == {"receipts": 5}


def test_replaced_rows_survive_compacting_and_repeated_parts(run):
    run.append("receipts", [receipt(0)], part="a")
    run.replace("receipts", [receipt(1), receipt(2)])
    run.append("receipts", [receipt(3)], part="b")
    run.compact("receipts")
    run.append("receipts", [receipt(4)], part="b")
    run.append("receipts", [receipt(5)], part="a")
    assert sorted(tensors(run)) == ["t1", "t2", "t4", "t5"]
    run.replace("receipts", [])
    assert tensors(run) == [] and not run.has("receipts") and run.row_counts() == {}


def test_has_and_row_counts(run):
    assert not run.has("receipts") and run.row_counts() == {}
    run.append("receipts", [receipt(i) for i in range(3)])
    run.append("receipts", [receipt(3)])
    run.append("degeneracy", [], part="nothing")
    assert run.has("receipts") and not run.has("degeneracy")
    assert run.row_counts() == {"receipts": 4}


@pytest.mark.parametrize("call", ["append", "replace", "read", "has"])
def test_unknown_tables_are_named(run, call):
    with pytest.raises(ValueError, match="no table 'answer'"):
        getattr(run, call)("answer", *([[]] if call in ("append", "replace") else []))


@pytest.mark.parametrize("part", ["", "all", "../x", "_tmp.x", ".x", "a/b"])
def test_part_names_cannot_leave_the_table(run, part):
    with pytest.raises(ValueError, match="part is"):
        run.append("receipts", [receipt(0)], part=part)


def test_readers_ignore_temporary_and_foreign_files(run, tmp_path):
    run.append("receipts", [receipt(0)])
    folder = tmp_path / "run" / "tables" / "receipts"
    for name in ("_tmp.1.x.parquet", ".hidden.parquet", "notes.txt"):
        (folder / name).write_bytes(b"half")
    assert tensors(run) == ["t0"] and run.row_counts() == {"receipts": 1}
    RunDirectory.open(tmp_path / "run", CONFIG, "search")
    assert not (folder / "_tmp.1.x.parquet").exists()  # opening to write clears the leftovers
    assert (folder / "notes.txt").exists()


def test_a_damaged_part_is_named(run, tmp_path):
    part = run.append("receipts", [receipt(0)])
    path = tmp_path / "run" / "tables" / "receipts" / f"{part}.parquet"
    whole = path.read_bytes()
    flipped = bytes(byte ^ 0xFF for byte in whole[20:60])
    path.write_bytes(whole[:20] + flipped + whole[60:])  # as a disk does it, footer and all still there
    with pytest.raises(RunError, match=f"{part}.parquet is not a readable part of table receipts"):
        run.read("receipts")
    path.write_bytes(whole[:-20])
    with pytest.raises(RunError, match=f"{part}.parquet is not a readable part of table receipts"):
        run.read("receipts")


def test_parts_of_another_version(run, tmp_path):
    folder = tmp_path / "run" / "tables" / "perplexity"
    folder.mkdir(parents=True)
    old = {"run_id": "r", "plan_id": "p", "target": "text", "tokens": 5, "nll": 1.0, "perplexity": 2.7}
    pq.write_table(pa.Table.from_pylist([old]), folder / "old.parquet")  # before these existed
    added = dict.fromkeys(("subject", "ci_low", "ci_high", "text_hash"))
    assert run.read("perplexity").to_pylist() == [{**old, **added}]
    pq.write_table(pa.Table.from_pylist([{"run_id": "r", "plan_id": "p"}]), folder / "old.parquet")
    with pytest.raises(RunError, match="old.parquet lacks target, tokens, nll, perplexity"):
        run.read("perplexity")


# --- failures -------------------------------------------------------------------------------------


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("act", ["append", "replace", "compact", "rewrite"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_table_as_it_was(run, tmp_path, monkeypatch, act, step):
    run.append("receipts", [receipt(0)], part="a")
    if act == "rewrite":
        run.compact("receipts")
    run.append("receipts", [receipt(1)], part="b")
    before = sorted(os.listdir(tmp_path / "run" / "tables" / "receipts"))
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(RunError, match=r"disk full: .*receipts/.*needs about .* free.*what is finished is stored"):
        if act == "compact":
            run.compact("receipts")
        elif act == "replace":
            run.replace("receipts", [receipt(2)])
        else:
            run.append("receipts", [receipt(2)], part="a")
    monkeypatch.undo()
    assert sorted(tensors(run)) == ["t0", "t1"]
    assert sorted(os.listdir(tmp_path / "run" / "tables" / "receipts")) == before
    run.append("receipts", [receipt(2)])  # and the run goes on once there is space
    assert sorted(tensors(run)) == ["t0", "t1", "t2"]


def test_rows_that_cannot_be_encoded_touch_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pyarrow.parquet.write_table", full_disk)
    with pytest.raises(OSError):
        run.append("receipts", [receipt(0)])
    assert not (tmp_path / "run" / "tables").exists()


@pytest.mark.parametrize("act", ["compact", "replace"])
def test_dying_between_the_new_file_and_the_deletions_counts_nothing_twice(run, tmp_path, monkeypatch, act):
    run.append("receipts", [receipt(0)], part="a")
    run.append("receipts", [receipt(1)], part="b")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tables, "_delete_parts", die)
    with pytest.raises(KeyboardInterrupt):
        run.compact("receipts") if act == "compact" else run.replace("receipts", [receipt(5)])
    monkeypatch.undo()
    assert len(os.listdir(tmp_path / "run" / "tables" / "receipts")) == 3  # the old parts still lie there
    expected = ["t0", "t1"] if act == "compact" else ["t5"]
    again = RunDirectory.open(tmp_path / "run", CONFIG, "search")
    assert tensors(again) == expected and again.row_counts() == {"receipts": len(expected)}
    again.append("receipts", [receipt(9)], part="b")  # a batch repeated after the crash
    assert tensors(again) == (["t0", "t9"] if act == "compact" else ["t9", "t5"])
    again.compact("receipts")
    assert len(tensors(again)) == 2
    assert os.listdir(tmp_path / "run" / "tables" / "receipts") == ["all.parquet"]


def test_a_reader_beside_a_writer_never_sees_a_torn_table(run, tmp_path):
    """Every state the reader may see is a run of batches 0…n, each whole and once."""
    stop, faults, seen = threading.Event(), [], set()

    def look():
        reader = RunDirectory.load(tmp_path / "run")
        while not stop.is_set():
            try:
                got = tensors(reader)
                seen.add(len(got))
                if got != [f"t{i // 2}" for i in range(len(got))] or len(got) % 2:
                    faults.append(got)
            except Exception as error:  # noqa: BLE001 - any error is what the test looks for
                faults.append(error)
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for i in range(40):
            run.append("receipts", [receipt(i), receipt(i)], part=f"batch_{i:03d}")
            if i % 5 == 4:
                run.compact("receipts")
    finally:
        stop.set()
        thread.join()
    assert not faults and len(seen) > 1


def test_a_reader_sees_no_part_twice_while_it_is_gathered(run, tmp_path, monkeypatch):
    """The whole file may be replaced between the reading of what it stands for and of its rows."""
    run.append("receipts", [receipt(0)], part="a")
    run.compact("receipts")
    run.append("receipts", [receipt(1)], part="b")
    reader = RunDirectory.load(tmp_path / "run")
    footer = reader._tables._footer

    def gathered_meanwhile(table, name):
        monkeypatch.undo()
        found = footer(table, name)
        with monkeypatch.context() as patch:
            patch.setattr(run._tables, "_delete_parts", lambda *_: None)  # not yet
            run.compact(table)
        return found

    monkeypatch.setattr(reader._tables, "_footer", gathered_meanwhile)
    assert tensors(reader) == ["t0", "t1"]


# --- thousands of parts -----------------------------------------------------------------------------


def test_a_run_that_is_taken_up_again_gathers_its_batches(run, tmp_path, monkeypatch):
    one = {field.name: value_for(field) for field in SCHEMAS["trials"] if field.name != "run_id"}
    for number in range(60):
        run.append("trials", [one | {"iteration": number}], part=f"bayes-{number:06d}")
    again = RunDirectory.open(tmp_path / "run", CONFIG, "search")
    with monkeypatch.context() as patch:
        patch.setattr(Tables, "_delete_parts", lambda *_: None)  # as where it is killed before they go
        again.begin()
    again.begin()
    assert os.listdir(tmp_path / "run" / "tables" / "trials") == ["all.parquet"]
    assert again.read("trials").column("iteration").to_pylist() == list(range(60))
    monkeypatch.setattr(again._tables, "_footer", lambda *_: pytest.fail("what is gathered was read for a new batch"))
    for number in (60, 61, 7):  # the last was there
        again.append("trials", [one | {"iteration": number}], part=f"bayes-{number:06d}")
    assert sorted(run.read("trials").column("iteration").to_pylist()) == list(range(62))


def test_parts_of_a_store_are_read_many_at_a_time_and_in_order(tmp_path):
    store = pafs._MockFileSystem()
    run = RunDirectory.open("run", CONFIG, "search", filesystem=store)
    for number in range(40):
        run.append("receipts", [receipt(number)], part=f"{number:02d}")
    together, opened, read = threading.Barrier(8, timeout=10), itertools.count(), run._storage.open

    def at_once(inside):
        if next(opened) < 8:
            together.wait()  # until as many requests are under way
        return read(inside)

    run._storage.open = at_once
    assert tensors(run) == [f"t{number}" for number in range(40)]
    run.compact("receipts")
    assert tensors(run) == [f"t{number}" for number in range(40)]


def test_a_small_part_is_not_compressed_and_a_large_one_is(run, tmp_path):
    def compression(name):
        metadata = pq.read_metadata(tmp_path / "run" / "tables" / "receipts" / f"{name}.parquet")
        return metadata.row_group(0).column(0).compression

    run.append("receipts", [receipt(0)], part="small")
    run.append("receipts", [receipt(number) for number in range(3000)], part="large")
    assert (compression("small"), compression("large")) == ("UNCOMPRESSED", "ZSTD")


# --- resuming -------------------------------------------------------------------------------------


def test_config_is_stored_and_read_back(place):
    run = RunDirectory.open(config=CONFIG, experiment="search", **place)
    back = RunDirectory.load(**place)
    assert (back.config, back.experiment, back.run_id) == (CONFIG, "search", run.run_id)
    assert len(run.run_id) == 16


def test_stored_config_is_a_config_file(run, tmp_path):
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == CONFIG


def test_run_id_depends_on_experiment_and_config_but_not_on_workers(tmp_path):
    def run_id(name, experiment="search", **change):
        return RunDirectory.open(tmp_path / name, {**CONFIG, **change}, experiment).run_id

    first = run_id("a")
    assert run_id("b", workers={"count": 9}, output={}) == first
    assert run_id("c", experiment="sweep") != first
    assert run_id("d", model={"path": "other"}) != first


def test_resuming_with_other_workers_keeps_the_run_and_updates_the_config(run, tmp_path):
    other = {**CONFIG, "workers": {"count": 7}, "output": {"figures": False}}
    again = RunDirectory.open(tmp_path / "run", other, "search")
    assert again.run_id == run.run_id and not again.moved
    again.begin()
    assert RunDirectory.load(tmp_path / "run").config == other
    again.write_manifest()
    RunDirectory.open(tmp_path / "run", CONFIG, "search")  # what is complete stays as it is
    assert RunDirectory.load(tmp_path / "run").config == other


def test_equal_numbers_of_other_types_keep_the_run_id(run, tmp_path):
    again = RunDirectory.open(tmp_path / "run", {**CONFIG, "search": {"bounds": (0, 1), "candidates": 60}}, "search")
    again.begin()
    assert again.run_id == run.run_id
    assert RunDirectory.load(tmp_path / "run").run_id == RunDirectory.open(tmp_path / "run", CONFIG, "search").run_id


def test_another_config_is_refused_naming_every_key(run, tmp_path):
    run.append("receipts", [receipt(0)])
    other = {**CONFIG, "search": {"bounds": [0.3, 0.7], "candidates": 60, "seed": 1}, "model": {"path": "demo"}}
    with pytest.raises(RunError) as caught:
        RunDirectory.open(tmp_path / "run", other, "search")
    message = str(caught.value)
    assert "search.bounds: [0.0, 1.0] in the run, [0.3, 0.7] now" in message
    assert "search.seed: absent in the run, 1 now" in message
    assert "model.revision: None in the run, absent now" in message
    assert "candidates" not in message
    assert message.endswith("continue with the run's values, choose another --out, or delete the folder to start over")
    assert RunDirectory.load(tmp_path / "run").config == CONFIG


def test_a_run_that_has_stored_nothing_is_begun_anew(run, tmp_path):
    """As one whose prompts were refused: the next command, with the cure, needs no other folder."""
    run.begin()
    run.hold_to({"model": "one"})
    run.note("resumed", detail="of the first")
    other = {**CONFIG, "model": {"path": "shorter", "revision": None}}
    RunDirectory.check(tmp_path / "run", other, "evaluate")
    again = RunDirectory.open(tmp_path / "run", other, "evaluate")
    assert again.run_id != run.run_id and RunDirectory.load(tmp_path / "run").run_id == again.run_id
    again.hold_to({"model": "two"})
    assert json.loads((tmp_path / "run/inputs.json").read_text()) == {"model": "two"}
    assert not again.has("incidents") and again.config["model"]["path"] == "shorter"
    again.append("receipts", [receipt(0)])
    with pytest.raises(RunError, match="holds a run of evaluate, not of search"):
        RunDirectory.check(tmp_path / "run", CONFIG, "search")


def test_a_run_that_has_stored_nothing_in_an_object_store_may_be_anothers(tmp_path):
    store = pafs._MockFileSystem()
    RunDirectory.open("run", CONFIG, "search", filesystem=store)
    with pytest.raises(RunError, match="model.revision"):
        RunDirectory.open("run", {**CONFIG, "model": {"path": "demo", "revision": "v2"}}, "search", filesystem=store)


PLACED = {
    "model": {"path": "/a/model"},
    "data": {"mmlu": "/a/mmlu", "perplexity_text": "/a/text"},
    "search": {"text": "/a/other", "probes": ["/a/probe.json"]},
    "calibration": {"text": "/a/third"},
    "plan": {"alpha_file": "/a/alphas.json", "similarity_run": "/a/similarity"},
    "sweep": {"alpha_files": {"best": "/a/best.json"}},
    "tasks": {"arc": {"file": "/a/arc", "examples": "/a/train"}},
}


def test_a_run_may_be_continued_where_its_files_lie_elsewhere(tmp_path):
    """On another machine. What they hold is compared, not where they are."""
    run = RunDirectory.open(tmp_path / "run", PLACED, "search")
    run.hold_to({"model": "one"})
    run.append("receipts", [receipt(0)])
    elsewhere = json.loads(json.dumps(PLACED).replace("/a/", "/b/"))
    again = RunDirectory.open(tmp_path / "run", elsewhere, "search")
    assert again.moved and again.run_id == run.run_id
    with pytest.raises(RunError, match=r"other files than .*\n  model: 'one' in the run, 'two' now"):
        again.hold_to({"model": "two"})
    assert RunDirectory.load(tmp_path / "run").config == PLACED
    again.hold_to({"model": "one"})
    again.begin()
    loaded = RunDirectory.load(tmp_path / "run")
    assert (loaded.config, loaded.run_id) == (elsewhere, run.run_id)
    assert set(loaded.read("receipts")["run_id"].to_pylist()) == {run.run_id}
    assert not RunDirectory.open(tmp_path / "run", elsewhere, "search").moved


@pytest.mark.parametrize("key", ["data.mmlu", "data.perplexity_text", "calibration.text", "plan.alpha_file"])
def test_a_run_without_a_file_is_not_one_with_it(tmp_path, key):
    section, name = key.split(".")
    run = RunDirectory.open(tmp_path / "run", PLACED, "search")
    run.append("receipts", [receipt(0)])
    with pytest.raises(RunError, match=f"{key}: '/a/.*' in the run, None now"):
        RunDirectory.open(tmp_path / "run", {**PLACED, section: {**PLACED[section], name: None}}, "search")


def test_another_experiment_is_refused(run, tmp_path):
    run.append("receipts", [receipt(0)])
    with pytest.raises(RunError, match="holds a run of search, not of evaluate"):
        RunDirectory.open(tmp_path / "run", CONFIG, "evaluate")


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="holds thesis.tex but no config.yaml"):
        RunDirectory.open(tmp_path, CONFIG, "search")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        RunDirectory.open(tmp_path / "thesis.tex", CONFIG, "search")
    with pytest.raises(RunError, match="not a run directory"):
        RunDirectory.load(tmp_path)
    with pytest.raises(RunError, match="not a run directory"):
        RunDirectory.load(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_start_that_was_killed_can_be_repeated(tmp_path):
    (tmp_path / "_tmp.0.config.yaml").write_text("half")
    RunDirectory.open(tmp_path, CONFIG, "search")
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.yaml"]


def test_what_another_process_has_begun_while_this_one_waited_is_not_overwritten(tmp_path, monkeypatch):
    lock = Storage.lock

    def after_another(storage):
        monkeypatch.undo()
        other = RunDirectory.open(tmp_path / "run", CONFIG | {"model": {"path": "demo", "revision": "v2"}}, "search")
        other.append("receipts", [receipt(0)])
        return lock(storage)

    monkeypatch.setattr(Storage, "lock", after_another)
    with pytest.raises(RunError, match="model.revision"):
        RunDirectory.open(tmp_path / "run", CONFIG, "search")
    assert RunDirectory.load(tmp_path / "run").config["model"]["revision"] == "v2"


@pytest.mark.parametrize(
    "text",
    ["model: demo\n", "# experiment: search\n- 1\n", "# experiment: search\n{\n", "caf\xe9: 1\n", "day: 2024-13-01\n"],
)
def test_a_foreign_config_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match="config.yaml"):
        RunDirectory.open(tmp_path, CONFIG, "search")


# --- manifest, folders ----------------------------------------------------------------------------


def test_manifest(run, tmp_path, place):
    run = RunDirectory.open(config=CONFIG, experiment="sweep", **{**place, "path": f"{place['path']}2"})
    run.begin()
    assert run.manifest() is None and not run.complete
    run.append("receipts", [receipt(0), receipt(1)])
    written = run.write_manifest(command=["raymerge", "search"], seed=3, model={"sha": "x"}, loss=float("nan"))
    assert run.manifest() == written and run.complete
    assert written["rows"] == {"receipts": 2} and written["run_id"] == run.run_id
    assert (written["experiment"], written["command"], written["seed"]) == ("sweep", ["raymerge", "search"], 3)
    assert written["loss"] is None and written["model"] == {"sha": "x"}
    assert written["packages"]["pyarrow"] == pa.__version__
    assert written["started"].endswith("+00:00") and written["started"] <= written["finished"]
    assert 0 <= written["seconds"] < 60
    run.begin()  # continuing: what is there is no longer complete
    assert run.manifest() is None
    assert not run.complete
    assert run.write_manifest()["command"] == sys.argv


def test_a_complete_run_has_one_file_for_each_table(run, tmp_path):
    folder = tmp_path / "run" / "tables" / "receipts"
    for number in range(3):
        run.append("receipts", [receipt(number)], part=f"batch-{number}")
    assert len(list(folder.iterdir())) == 3
    run.write_manifest()
    assert len(list(folder.iterdir())) == 1 and tensors(run) == ["t0", "t1", "t2"]
    run.append("receipts", [receipt(7)], part="batch-1")  # parts keep their names
    assert tensors(run) == ["t0", "t2", "t7"]


def test_manifest_is_strict_json(run, tmp_path):
    run.write_manifest(value=float("inf"))
    json.loads((tmp_path / "run" / "manifest.json").read_text(), parse_constant=pytest.fail)


def test_manifest_refuses(run):
    with pytest.raises(ValueError, match="rows, run_id itself"):
        run.write_manifest(run_id="x", rows={})
    assert run.manifest() is None


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_damaged_manifest_is_named(run, tmp_path, text):
    (tmp_path / "run" / "manifest.json").write_text(text)
    with pytest.raises(RunError, match="manifest.json is not JSON"):
        _ = run.complete
    (tmp_path / "run" / "inputs.json").write_text(text)
    with pytest.raises(RunError, match="inputs.json is not JSON"):
        run.hold_to({"model": "a"})


def test_folders_and_uploads(place, tmp_path):
    run = RunDirectory.open(config=CONFIG, experiment="search", **place)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    where = run.upload(tmp_path / "checkpoint", "models", "best")
    assert where == run.path_of("models", "best") and where.endswith("run/models/best")
    if run.is_local:
        assert os.listdir(where) == ["config.json"]
    run.write_text("é", "alphas", "drop.json")
    if run.is_local:
        with open(run.path_of("alphas", "drop.json"), encoding="utf-8") as file:
            assert file.read() == "é"
    for bad in ("..", "a/b", "a\\b", "", "_tmp.x"):
        with pytest.raises(ValueError, match="not the name"):
            run.path_of("models", bad)
        with pytest.raises(ValueError, match="not the name"):
            run.write_text("", "alphas", bad)


def test_neither_config_nor_manifest_tells_credentials(tmp_path):
    secret = "s3://bucket/mmlu?access_key=KEY&secret_key=WORD&region=eu"
    config = {**CONFIG, "data": {"mmlu": secret}}
    run = RunDirectory.open(tmp_path / "run", config, "search")
    run.begin()
    run.append("receipts", [receipt(0)])
    RunDirectory.open(tmp_path / "run", config, "search")  # which is no other config
    run.write_manifest(command=["raymerge", secret], data={"mmlu": secret})
    for name in ("config.yaml", "manifest.json"):
        text = (tmp_path / "run" / name).read_text()
        assert "region=eu" in text and "KEY" not in text and "WORD" not in text


def test_what_an_earlier_start_was_made_from_is_not_said_of_the_run_that_took_its_place(tmp_path):
    RunDirectory.open(tmp_path / "run", CONFIG, "search").hold_to({"model": "a", "text": "t"})
    run = RunDirectory.open(tmp_path / "run", {**CONFIG, "model": {"path": "other"}}, "search")
    run.hold_to({"model": "b"})
    assert json.loads((tmp_path / "run" / "inputs.json").read_text()) == {"model": "b"}


def test_a_run_that_goes_on_notes_the_rows_that_it_has_and_a_run_without_rows_does_not(tmp_path):
    run = RunDirectory.open(tmp_path / "run", CONFIG, "search")
    run.note("lost", worker="worker-1", detail="x" * 600)
    run.begin()
    (row,) = run.read("incidents").to_pylist()
    assert (row["kind"], row["worker"], row["detail"]) == ("lost", "worker-1", "x" * 500)
    run.append("receipts", [receipt(0), receipt(1)])
    run.begin()
    assert [(row["kind"], row["detail"]) for row in run.read("incidents").to_pylist()][1:] == [
        ("resumed", "2 receipts")
    ]


def test_of_a_folder_s_other_things_three_are_named(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text("")
    with pytest.raises(RunError, match="holds a, b, c but no config.yaml"):
        RunDirectory.open(tmp_path, CONFIG, "search")
    (tmp_path / "d").write_text("")
    with pytest.raises(RunError, match="holds a, b, c … but no config.yaml"):
        RunDirectory.open(tmp_path, CONFIG, "search")


def test_no_torch_and_no_ray():
    code = "import sys, raymerge.tables; assert not {'torch', 'ray', 'pandas', 'sklearn'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
