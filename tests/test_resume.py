"""A run that is taken up again: by the files it was begun with, wherever their paths lead by now."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raymerge.checkpoint import Checkpoint
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.demo import MODEL_PATH
from raymerge.experiments import alpha_search, compression_sweep, layer_similarity, model_evaluation
from raymerge.storage import Storage
from raymerge.tables import RunDirectory, RunError

CUT = "cut before anything is computed"

MODULES = {
    "search": alpha_search,
    "sweep": compression_sweep,
    "similarity": layer_similarity,
    "sensitivity": layer_similarity,
    "evaluate": model_evaluation,
}


class Cut(Exception):
    pass


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL_PATH, tmp_path / "model")


def call(monkeypatch, experiment, model, out, *more, cut_at="runtime"):
    """An experiment up to its first need of Ray (or of a pool), with a row stored as of work that was done before."""
    settings = ["data.subjects=country_capitals", "data.limit_per_subject=4", "data.report_limit_per_subject=4"]
    settings += ["similarity.samples=6", "similarity.entropy_neighbors=4", "similarity.neighbors=2", *more]
    settings += ["similarity.subsets=[country_capitals]", f"model.path={model}", f"output.run={out}"]

    def cut(*_, **__):
        run = RunDirectory.load(out)
        run.append("receipts", [{"plan_id": "p", "tensor": "t", "max_abs_change": 0.0, "relative_change": 0.0}], "p")
        raise Cut(CUT)

    monkeypatch.setattr(MODULES[experiment], "runtime", lambda *_: nullcontext())
    monkeypatch.setattr(MODULES[experiment], cut_at, cut)
    getattr(MODULES[experiment], experiment)(load_config(None, settings))


def change_weights(model):
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    save_file(tensors | {name: tensors[name] * 0.5}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("experiment", MODULES)
def test_a_path_in_place_of_a_configuration_is_refused_with_what_to_give(experiment):
    experiment = getattr(MODULES[experiment], experiment)
    for path, words in (("a.yaml", "str 'a.yaml'"), (Path("a.yaml"), r"PosixPath PosixPath\('a.yaml'\)")):
        with pytest.raises(ConfigError, match=rf"takes a Config, not the {words}: .* raymerge.load_config\('a.yaml'\)"):
            experiment(path)
    with pytest.raises(ConfigError, match=r"not the dict \{\}: give it raymerge.load_config\(FILE\)"):
        experiment({})


@pytest.mark.parametrize("experiment", MODULES)
def test_a_folder_that_is_not_the_run_s_is_refused_before_anything_is_read(experiment, tmp_path, monkeypatch):
    """Reading model and questions may take a minute, and the model that is missing here is not looked for."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds notes.txt but no config.yaml"):
        call(monkeypatch, experiment, tmp_path / "missing", tmp_path / "run")
    other = RunDirectory.open(tmp_path / "other", {"model": {"path": "x"}}, "import-similarity")
    other.append("receipts", [{"plan_id": "p", "tensor": "t", "max_abs_change": 0.0, "relative_change": 0.0}])
    with pytest.raises(RunError, match="import-similarity"):
        call(monkeypatch, experiment, tmp_path / "missing", tmp_path / "other")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("experiment", MODULES)
def test_a_run_is_not_continued_with_another_model_under_the_same_path(experiment, model, tmp_path, monkeypatch):
    for _ in range(2):
        with pytest.raises(Cut):
            call(monkeypatch, experiment, model, tmp_path / "run")
    change_weights(model)
    with pytest.raises(
        RunError, match=r"made from other files.*\n  model: '[0-9a-f]{16}' in the run, '[0-9a-f]{16}' now"
    ):
        call(monkeypatch, experiment, model, tmp_path / "run")
    with pytest.raises(Cut):
        call(monkeypatch, experiment, model, tmp_path / "another run")


@pytest.mark.parametrize("experiment", MODULES)
def test_a_run_goes_on_where_the_model_lies_elsewhere_and_not_with_another(experiment, model, tmp_path, monkeypatch):
    """As on another machine, where the folder of the run was copied to; a complete run is held to its model too."""
    with pytest.raises(Cut):
        call(monkeypatch, experiment, model, tmp_path / "run")
    copy, other = (shutil.copytree(model, tmp_path / name) for name in ("copy", "other"))
    change_weights(other)
    with pytest.raises(Cut):
        call(monkeypatch, experiment, copy, tmp_path / "run")
    assert RunDirectory.load(tmp_path / "run").config["model"]["path"] == str(copy)
    for _ in range(2):
        with pytest.raises(RunError, match=r"made from other files.*\n  model: "):
            call(monkeypatch, experiment, other, tmp_path / "run")
        RunDirectory.load(tmp_path / "run").write_manifest()
    call(monkeypatch, experiment, model, tmp_path / "run")  # nothing is left to do
    assert RunDirectory.load(tmp_path / "run").config["model"]["path"] == str(copy)


def test_nor_with_other_coefficients_texts_or_tokens_in_the_same_files(model, tmp_path, monkeypatch):
    alphas, text = tmp_path / "alphas.json", tmp_path / "text.txt"
    step = '[{"step": 0, "layer_to_merge_into": %d, "layer_to_remove": %d, "ratio_i_alpha": %s}]'
    last = Checkpoint(str(model)).n_layers - 1
    alphas.write_text(step % (last - 1, last, 0.5))
    text.write_text("A text of a few words, " * 40)
    more = ["plan.selection=list", "plan.base=file", f"plan.alpha_file={alphas}", f"data.perplexity_text={text}"]
    go_on = lambda: call(monkeypatch, "search", model, tmp_path / "run", *more)  # noqa: E731
    with pytest.raises(Cut):
        go_on()
    alphas.write_text(step % (last - 2, last - 1, 0.5))
    text.write_text("Another text of a few words, " * 40)
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + "\n")
    with pytest.raises(RunError, match=r"\n  plan: .*\n  text: .*\n  text tokens: .*\n  tokenizer: "):
        go_on()


@pytest.mark.parametrize("experiment", MODULES)
def test_every_experiment_deletes_what_killed_processes_left_in_a_cache(experiment, model, tmp_path, monkeypatch):
    """States of gigabytes, in a folder that other runs may use: what is new may be being written."""
    for name, age_s in (("old", 2 * 86400.0), ("new", 0.0)):
        (tmp_path / f"_tmp.{name}.safetensors").touch()
        os.utime(tmp_path / f"_tmp.{name}.safetensors", (time.time() - age_s,) * 2)
    with pytest.raises(Cut):
        call(monkeypatch, experiment, model, tmp_path / "run", f"output.cache={tmp_path}", cut_at="open_pool")
    assert [path.name for path in tmp_path.glob("_tmp.*")] == ["_tmp.new.safetensors"]


def test_what_holds_no_rows_yet_may_be_begun_with_other_files(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"model": {}}, "search")
    run.hold_to({"model": "a"})
    run.note("lost")
    run.hold_to({"model": "b"})
    run.append("receipts", [{"plan_id": "p", "tensor": "t", "max_abs_change": 0.0, "relative_change": 0.0}])
    run.hold_to({"model": "b", "dtype": "float32"})  # what is only known later, or to later versions, is added
    run = RunDirectory.load(tmp_path / "run")
    run.hold_to({"dtype": "float32"})
    with pytest.raises(RunError, match="dtype: 'float32' in the run, 'bfloat16' now"):
        run.hold_to({"model": "b", "dtype": "bfloat16"})
    (tmp_path / "run" / "inputs.json").unlink()  # as in runs of earlier versions
    run.hold_to({"model": "c"})


WRITER = """
import sys
from raymerge.tables import RunDirectory
run = RunDirectory.open(sys.argv[1], {"model": {}}, "search")
run.begin()
print("begun", flush=True)
sys.stdin.readline()
run.write_manifest()
print("ended", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_one_process_at_a_time_writes_a_run(tmp_path, killed):
    """Two that are given the same command would delete what the other is writing, and replace its parts."""
    arguments = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
    other = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == "begun\n"
        (tmp_path / "run" / "_tmp.1.part").write_text("being written")
        with pytest.raises(RunError, match=f"another process is writing {tmp_path / 'run'}.*{other.pid}"):
            RunDirectory.open(tmp_path / "run", {"model": {}}, "search")
        assert (tmp_path / "run" / "_tmp.1.part").exists()
        assert RunDirectory.load(tmp_path / "run").row_counts() == {}, "any number read it"
        if killed:
            other.kill()
            other.wait()
        else:
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "ended\n"
        for _ in range(2):  # as often as one process likes
            run = RunDirectory.open(tmp_path / "run", {"model": {}}, "search")
            run.begin()
        assert not (tmp_path / "run" / "_tmp.1.part").exists()
        other.kill()


@pytest.mark.parametrize("complete", [True, False])
def test_a_page_that_is_being_written_into_a_run_survives_one_who_opens_the_run(complete, tmp_path, monkeypatch):
    """`raymerge report` needs no lock, since it writes none of the run's own files."""
    run = RunDirectory.open(tmp_path / "run", {"model": {}}, "search")
    run.begin()
    if complete:
        run.write_manifest()
    page, fsync = Storage(tmp_path / "run"), os.fsync

    def opened_meanwhile(file):
        monkeypatch.setattr(os, "fsync", fsync)
        RunDirectory.open(tmp_path / "run", {"model": {}}, "search")
        fsync(file)

    monkeypatch.setattr(os, "fsync", opened_meanwhile)
    page.publish("report.html", b"page")
    assert page.read("report.html") == b"page"


def test_one_who_only_opens_a_complete_run_deletes_nothing_that_may_be_being_written(tmp_path):
    """As the other of two processes that make the model anew, after its user has deleted the manifest."""
    RunDirectory.open(tmp_path / "run", {"model": {}}, "search").write_manifest()
    for name, age_s in (("_tmp.model", 0.0), ("_tmp.page", 2 * 86400.0)):
        (tmp_path / "run" / name).write_text("x")
        os.utime(tmp_path / "run" / name, (time.time() - age_s,) * 2)
    RunDirectory.open(tmp_path / "run", {"model": {}}, "search")
    assert [path.name for path in (tmp_path / "run").glob("_tmp.*")] == ["_tmp.model"]


def test_a_start_that_was_killed_before_it_wrote_anything_can_be_repeated(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    RunDirectory.open(tmp_path / "run", {"model": {}}, "search").begin()


def test_the_tokenizer_is_known_by_its_files(model):
    before = Checkpoint(str(model)).tokenizer_identity
    assert before == Checkpoint("demo").tokenizer_identity
    (model / "generation_config.json").write_text("{}")
    assert Checkpoint(str(model)).tokenizer_identity == before
    (model / "special_tokens_map.json").write_text("{}")
    assert Checkpoint(str(model)).tokenizer_identity != before
