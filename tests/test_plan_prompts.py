"""Merges by the plan files of a run against what the run itself measured and saved, by prompts and by texts."""

import re
import shutil
from pathlib import Path

import pyarrow.fs
import pytest
from safetensors.torch import load_file
from told import Told

from raymerge.config import CalibrationConfig
from raymerge.config_file import load_config
from raymerge.console import print_search
from raymerge.experiments import search, sweep
from raymerge.fusion import fused_tensors
from raymerge.merging import merge
from raymerge.plan import PlanError, Refit
from raymerge.plan_prompts import run_of
from raymerge.tables import RunDirectory, RunError

SMALL = ["data.subjects=colour_mixing,number_words", "data.report_limit_per_subject=2", "data.limit_per_subject=2",
         "data.perplexity_tokens=300", "plan.merges=2", "output.figures=false", "output.verify=false"]  # fmt: skip
SEARCH = ["search.searcher=random", "search.candidates=2", "search.random_candidates=2"]


def weights(folder):
    return Path(folder, "model.safetensors").read_bytes()


@pytest.fixture
def searched(local_searches, tmp_path, monkeypatch):
    def run(*settings):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        return search(load_config(None, [*SMALL, *SEARCH, f"output.run={tmp_path / 'run'}", *settings]))

    return run


@pytest.mark.parametrize(
    "settings, name",
    [
        (["plan.refit=outputs"], "found_random_outputs"),
        (["plan.refit=linear", "calibration.text=demo", "calibration.tokens=200"], "found_random_linear"),
        (
            ["plan.refit=linear", "model.dtype=bfloat16", "calibration.text=demo", "calibration.tokens=200"],
            "found_random_linear",
        ),
        (["plan.alignment=activations"], "found_random"),
        (
            ["plan.alignment=activations", "plan.refit=scale", "calibration.text=demo", "calibration.tokens=200"],
            "found_random_scale",
        ),
    ],
    ids=["prompts", "text", "bfloat16", "activations", "both"],
)
def test_the_plan_of_a_search_makes_the_model_that_it_saved(searched, tmp_path, settings, name):
    """Fitted on the run's own tokens, which lie behind those that it reports on, and matched on its own questions."""
    run = searched(*settings)
    told = Told()
    plans = {path.stem: path for path in Path(run.path_of("plans")).iterdir()}
    done = merge("demo", plans[name], tmp_path / "again", verify=False, progress=told)
    assert not told.messages
    assert done["plan_id"] in run.read("plans", ["plan_id"])["plan_id"].to_pylist()
    assert weights(tmp_path / "again") == weights(run.path_of("models", name))
    beside = Path(run.path_of("models", name), "merge_plan.json")
    merge("demo", beside, tmp_path / "third", verify=False, progress=told)
    assert not told.messages and weights(tmp_path / "third") == weights(tmp_path / "again")


# With the section of a search that follows, which reads the same text as well.
@pytest.mark.parametrize("text", ["null", "demo", "demo, search.objective=text_nll, search.text=demo"])
def test_the_plans_of_a_sweep_make_the_models_that_it_measured(local_pools, tmp_path, text):
    text, *shared = text.split(", ")
    options = ["sweep.merges=[2]", "sweep.methods=[drop]", "sweep.refits=[none, linear]", "sweep.context=false"]
    options += ["sweep.alignments=[none]", "sweep.norms=[keep]", f"calibration.text={text}", "sweep.speed_tokens=0"]
    run = sweep(load_config(None, [*SMALL, *options, *shared, f"output.run={tmp_path / 'run'}"]))
    (path,) = Path(run.path_of("plans")).glob("*linear.json")
    done = merge("demo", path, tmp_path / "again", verify=False, progress=(told := Told()))
    assert not told.messages
    (measured,) = {row["plan_id"] for row in run.read("refits").to_pylist()}
    assert done["plan_id"] == measured
    worker = local_pools[-1].worker
    (plan,) = [plan for plan in sweep_plans(run, worker) if plan.plan_id(worker.checkpoint.identity) == measured]
    expected = dict(
        fused_tensors(worker.checkpoint, worker.checkpoint.architecture, plan, refits=worker.refitter.tensors)
    )
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys() and all(found[name].equal(tensor) for name, tensor in expected.items())


def sweep_plans(run, worker):
    from raymerge.plan_files import read_plan

    return [read_plan(path, worker.checkpoint.n_layers)[0] for path in Path(run.path_of("plans")).iterdir()]


def test_other_files_than_the_run_s_are_refused_and_a_text_that_is_given_is_taken_with_a_warning(searched, tmp_path):
    shutil.copytree("raymerge/demo/mmlu", tmp_path / "mmlu")
    run = searched("plan.refit=linear", f"data.mmlu={tmp_path / 'mmlu'}", "output.save_best=false")
    path = Path(run.path_of("plans"), "found_random_linear.json")
    for file in tmp_path.glob("mmlu/**/*.csv"):
        file.write_text(file.read_text().replace("a", "b"))
    with pytest.raises(PlanError, match="the configuration of .* leads to other files now than the run was made of: "):
        merge("demo", path, tmp_path / "out", verify=False)
    (tmp_path / "mmlu").rename(tmp_path / "moved")
    with pytest.raises(PlanError, match="found_random_linear.json is made with what the .*/run, leads to, but .*/mmlu"):
        merge("demo", path, tmp_path / "out", verify=False)
    told = Told()
    merge("demo", path, tmp_path / "out", verify=False, calibration="demo", progress=told)
    assert told.messages == [f"Warning: {path} has a refit on other tokens than these of demo."]
    # Without the run, as where the file was copied to another machine.
    copied = shutil.copy(path, tmp_path)
    with pytest.raises(PlanError, match="needs a plain text: give --calibration"):
        merge("demo", copied, tmp_path / "third", verify=False)
    assert not (tmp_path / "third").exists()


def test_a_run_that_fitted_nothing_has_nothing_to_fit_on(searched, tmp_path):
    """Whose calibration section is not stored: the text that it names was taken for prompts of the search."""
    path = Path(searched("calibration.text=demo", "output.save_best=false").path_of("plans"), "found_random.json")
    with pytest.raises(PlanError, match="a refit, .*, needs a plain text: give --calibration"):
        merge("demo", path, tmp_path / "out", verify=False, refit=Refit("outputs"))
    merge("demo", path, tmp_path / "out", verify=False, refit=Refit("outputs"), calibration="demo")


def test_how_much_of_a_text_is_said_by_a_section_which_has_the_plan_of_a_run_with_the_same(searched, tmp_path):
    (tmp_path / "a.txt").write_text("one text to fit on, and on nothing else; " * 80)
    section = CalibrationConfig(text=str(tmp_path / "a.txt"), tokens=100)
    run = searched("plan.refit=linear", f"calibration.text={section.text}", "calibration.tokens=100")
    plan = Path(run.path_of("plans"), "found_random_linear.json")
    copied = shutil.copy(plan, tmp_path)
    told = Told()
    merge("demo", copied, tmp_path / "same", verify=False, calibration=section, progress=told)
    assert not told.messages and weights(tmp_path / "same") == weights(run.path_of("models", plan.stem))
    merge("demo", copied, tmp_path / "more", verify=False, calibration=section.text, progress=told)
    assert told.messages == [f"Warning: {copied} has a refit on other tokens than these of {section.text}."]
    merge("demo", plan, tmp_path / "own", verify=False, calibration=CalibrationConfig(), progress=told)
    assert len(told.messages) == 1, "a section that names no text says nothing"


def test_a_plan_is_of_the_run_that_could_have_written_it(searched, local_pools, tmp_path):
    """In the folder of a similarity run, or of a sweep that matches nothing, a plan ended the merge with a trace."""
    source = Path(searched("plan.alignment=activations").path_of("plans"), "found_random.json")
    options = ["sweep.merges=[2]", "sweep.methods=[drop]", "sweep.context=false", "sweep.speed_tokens=0"]
    options += ["sweep.alignments=[none]", f"output.run={tmp_path / 'sweep'}"]
    sweep(load_config(None, [*SMALL, *options]))
    RunDirectory.open(tmp_path / "layers", {"model": {"path": "demo"}}, "similarity")
    (tmp_path / "layers" / "plans").mkdir()
    for run, said in (("sweep", "run.*of another run: merge by the file"), ("layers", "activations needs the prompts")):
        copied = shutil.copy(source, tmp_path / run / "plans")
        with pytest.raises(PlanError, match=said):
            merge("demo", copied, tmp_path / "out", verify=False)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_copy_of_a_run_without_its_inputs_has_the_plans_of_the_run(searched, tmp_path, dtype):
    run = searched("plan.alignment=activations", "plan.refit=scale", f"model.dtype={dtype}")
    for name in ("config.yaml", "plans"):
        (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
        (Path(run.path_of()) / name).rename(tmp_path / "copy" / name)
    for name in ("found_random", "found_random_scale"):
        merge("demo", tmp_path / "copy" / "plans" / f"{name}.json", tmp_path / name, verify=False)
        assert weights(tmp_path / name) == weights(run.path_of("models", name))


def test_plan_files_in_runs_are_known_by_where_they_lie(tmp_path, monkeypatch):
    run = tmp_path / "run"
    RunDirectory.open(run, {"model": {"path": "demo"}}, "search")
    monkeypatch.chdir(run)
    for path in (run / "plans" / "a.json", "plans/a.json", run / "models" / "a" / "merge_plan.json"):
        assert run_of(path) == run
    for path in ("models/a/merge_plan.json", f"file://{run}/plans/a.json", f"fsspec+file://{run}/plans/a.json"):
        assert str(run_of(path)).removeprefix("fsspec+").removeprefix("file://") == str(run)
    elsewhere = [run / "a.json", tmp_path / "plans" / "a.json", run / "models" / "a" / "alphas.json", None]
    for path in (*elsewhere, "file:///plans/a.json", "file:///a.json"):
        assert run_of(path) is None


def test_plan_files_and_alpha_files_of_runs_in_an_object_store_are_read_there(searched, tmp_path, capsys):
    where = f"fsspec+memory://bucket/{tmp_path.name}"
    run = searched("plan.refit=linear", f"output.run={where}")
    print_search(run, "test")
    (said,) = re.findall("merge MODEL --plan ([^ ]+) --out DIR", capsys.readouterr().out)
    told, plan = Told(), said.replace("NAME", "found_random_linear")
    assert plan == f"{where}/plans/found_random_linear.json"
    merge("demo", plan, tmp_path / "again", verify=False, progress=told)
    (tmp_path / "saved").mkdir()
    pyarrow.fs.copy_files(f"{where}/models/found_random_linear", str(tmp_path / "saved"))
    assert not told.messages and weights(tmp_path / "again") == weights(tmp_path / "saved")
    merge("demo", f"{where}/models/found_random_linear/merge_plan.json", tmp_path / "third", verify=False)
    assert weights(tmp_path / "third") == weights(tmp_path / "saved")

    alphas = f"{where}/alphas/found_random.json"
    record = merge("demo", alphas, tmp_path / "alphas", verify=False, progress=told)
    assert record["name"] == "found_random" and not told.messages
    beside = f"{where}/models/found_random_linear/alphas.json"
    merge("demo", beside, tmp_path / "plain", verify=False, progress=told)
    (warning,) = told.messages
    assert f"alphas.json has the steps of {where}/models/found_random_linear/merge_plan.json, a merge with" in warning
    section = load_config(None, ["plan.selection=list", "plan.base=file", f"plan.alpha_file={alphas}"]).plan
    assert merge("demo", section, tmp_path / "section", verify=False)["plan_id"] == record["plan_id"]
    for missing in (f"{where}/plans/nothing.json", f"{where}/nowhere/nothing.json"):
        with pytest.raises(PlanError, match=f"there is no plan or alpha file {re.escape(missing)}"):
            merge("demo", missing, tmp_path / "out")
    with pytest.raises(RunError, match="nosuch://bucket/plans cannot be opened"):
        merge("demo", "nosuch://bucket/plans/a.json", tmp_path / "out")
