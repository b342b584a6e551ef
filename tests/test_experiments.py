"""Whole experiments on the embedded model over a small pool: what a run directory holds, and that it resumes."""

import json
import math
import os
import re
import shutil
import subprocess
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pytest
import task_files
from local_pool import LocalPool

import raymerge.merging
import raymerge.prompts
import raymerge.proof
from raymerge import cli, findings, summary
from raymerge.alpha_files import read_alpha_file
from raymerge.checkpoint import Checkpoint
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.evaluation import text_nll
from raymerge.experiments import alpha_search, evaluate, found_models, search
from raymerge.experiments.common import cache_of, describe_workers, open_pool, read_inputs, settings_of, swept_cache
from raymerge.experiments.found_models import FoundModels
from raymerge.forward import LayerRunner
from raymerge.identity import code_identity
from raymerge.inputs import REPORT, SEARCH, read_text
from raymerge.plan import tail_plan
from raymerge.plan_section import starting_plan
from raymerge.progress import Silent
from raymerge.prompts import encode_text
from raymerge.proof import ProofError
from raymerge.schemas import TEXT_SPLIT
from raymerge.tables import RunDirectory, RunError

SETTINGS = [
    "plan.merges=13",
    "data.subjects=country_capitals,colour_mixing,number_words",
    "data.limit_per_subject=6",
    "data.report_limit_per_subject=6",
    "data.perplexity_tokens=300",
    "search.candidates=9",
    "search.initial=3",
    "search.random_candidates=3",
    "workers.count=1",  # each takes seconds to start
    "output.figures=false",
    "output.verify=false",
]


def config(out, *more):
    return load_config(None, [*SETTINGS, f"output.run={out}", *more])


def logits_on_test(run, plan_id):
    """(4, n) logits of a plan's answers to the test questions."""
    answers = run.read("answers")
    chosen = pc.and_(pc.equal(answers["plan_id"], plan_id), pc.equal(answers["split"], "test"))
    answers = answers.filter(chosen).sort_by("question_id")
    return np.stack([answers[f"logit_{letter}"].to_numpy() for letter in "abcd"])


def tasks(folder, *names):
    """Settings that add tasks, from files in the folder."""
    return [
        setting
        for name in names
        for setting in (f"tasks.{name}.format={name}", f"tasks.{name}.file={task_files.write(folder, name)}")
    ]


@pytest.fixture(scope="module")
def run(ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = [*tasks(folder, "piqa", "boolq"), "output.verify=true", "workers.count=2"]
    settings += ["output.store_candidate_answers=true"]
    return search(config(folder / "search", *settings), command=["test"])


def test_a_search_stores_every_candidate_and_every_control_once(run):
    assert run.complete
    trials = run.read("trials").to_pylist()
    counts = {
        name: sorted(row["iteration"] for row in trials if row["searcher"] == name) for name in ("bayes", "random")
    }
    assert counts == {"bayes": list(range(9)), "random": list(range(3))}
    assert {row["status"] for row in trials} == {"ok"}
    names = pc.unique(run.read("plans")["name"]).to_pylist()
    assert names == ["base", "drop", "before_last", "fixed_0.6225", "random", "found_bayes"]
    accuracy = run.read("accuracy")
    assert len(pc.unique(accuracy.filter(pc.equal(accuracy["split"], "test"))["plan_id"])) == 6
    assert len(run.read("perplexity")) == 6
    assert run.manifest()["rows"]["trials"] == len(trials)


def test_candidates_answers_say_nothing_that_was_not_computed(run):
    answers = {(row["plan_id"], row["split"]): row for row in run.read("answers").to_pylist()}
    trials = {row["plan_id"]: row for row in run.read("trials").to_pylist() if row["searcher"] == "random"}
    judged = [answers[plan_id, "validation"] for plan_id in trials]
    assert len(judged) == 3 and all(math.isfinite(row["logit_a"]) for row in judged)
    assert {(row["logsumexp_all"], row["top_is_letter"]) for row in judged} == {(None, None)}
    reported = [row for (_, split), row in answers.items() if split == "test"]
    assert len(reported) == 6 and all(row["logsumexp_all"] is not None for row in reported)


def test_perplexities_have_intervals_and_are_compared_passage_by_passage(run):
    """From table text_losses alone: its means are the perplexities, and a difference is that of two means."""
    stored = {row["plan_id"]: row for row in run.read("perplexity").to_pylist()}
    passages = {plan: {} for plan in stored}
    for row in run.read("text_losses").to_pylist():
        passages[row["plan_id"]][row["window"], row["position"]] = row["tokens"], row["nll"]
    means = {}
    for plan, row in stored.items():
        # 300 tokens, the first of which is not scored; passages begin at every 64th.
        assert list(passages[plan]) == [(0, start) for start in (1, 64, 128, 192, 256)]
        tokens, nll = np.array([*passages[plan].values()]).T
        assert tokens.tolist() == [63, 64, 64, 64, 44] and row["tokens"] == 299
        means[plan] = nll.sum() / 299
        assert row["nll"] == pytest.approx(means[plan]) and row["perplexity"] == pytest.approx(np.exp(means[plan]))
        assert 1 < row["ci_low"] < row["perplexity"] < row["ci_high"]
    compared = [row for row in run.read("comparisons").to_pylist() if row["split"] == TEXT_SPLIT]
    assert len(compared) == 15 and {row["measure"] for row in compared} == {"text_nll"}
    for row in compared:
        difference = means[row["plan_a"]] - means[row["plan_b"]]
        assert row["difference"] == pytest.approx(difference, abs=1e-9)
        assert row["ci_low"] <= row["difference"] <= row["ci_high"] and row["p_holm"] >= row["p_value"]


def test_a_report_has_every_plan_on_every_task(run, capsys):
    """Merged plans and their controls, compared on the same items; the summary says so."""
    plans = list(dict.fromkeys(run.read("plans")["plan_id"].to_pylist()))
    accuracy = run.read("task_accuracy").to_pylist()
    assert {(row["plan_id"], row["task"], row["measure"], row["n"]) for row in accuracy} == {
        (plan, task, measure, n)
        for plan in plans
        for task, measure, n in (("piqa", "acc", 3), ("piqa", "acc_norm", 3), ("boolq", "acc", 2))
    }
    likelihoods = {}
    for row in run.read("task_answers").to_pylist():
        likelihoods.setdefault(row["plan_id"], []).append(np.round(row["log_likelihoods"], 3).tolist())
    assert len({str(values) for values in likelihoods.values()}) == len(plans)  # no two plans are the same model
    best = run.manifest()["best"]["plan_id"]
    comparisons = run.read("task_comparisons").to_pylist()
    assert len(comparisons) == 3 * len(plans) * (len(plans) - 1) / 2
    found = {(row["plan_a"], row["plan_b"], row["task"], row["measure"]): row for row in comparisons}
    of = {(row["plan_id"], row["task"], row["measure"]): row["accuracy"] for row in accuracy}
    for plan in plans:
        if plan != best:
            row = found[best, plan, "piqa", "acc_norm"]
            difference = of[best, "piqa", "acc_norm"] - of[plan, "piqa", "acc_norm"]
            assert row["difference"] == pytest.approx(difference) and row["p_holm"] >= row["p_value"]
    from raymerge.console import print_search

    print_search(run, "test")
    shown = capsys.readouterr().out
    assert f"raymerge report {run.path_of().rstrip('/')}\n" in shown
    for task, measure, control in (("piqa", "acc_norm", "base"), ("boolq", "acc", "drop")):
        assert re.search(rf"{task} +{measure} +found_bayes +{control} +[+-]", shown)


def test_known_points_come_first_and_the_best_is_the_best(run):
    trials = [row for row in run.read("trials").to_pylist() if row["searcher"] == "bayes"]
    trials.sort(key=lambda row: row["iteration"])
    assert run.manifest()["keep_one"] == {"best": "before_last", "of": 14}
    assert [row["alphas"] for row in trials[:3]] == [[0.6225] * 13, [0.0] * 13, [1.0] * 13]
    best = max(trials, key=lambda row: (row["value"], -row["nll"]))
    assert run.manifest()["best"]["alphas"] == best["alphas"]


def test_the_saved_model_answers_as_the_scorer_said(run, local_pools, tmp_path):
    """Evaluated as any other checkpoint, it gives the logits of the search's report."""
    path = run.path_of("models", "found_bayes")
    assert Checkpoint(path).n_layers == Checkpoint("demo").n_layers - 13
    again = evaluate(config(tmp_path / "again", f"model.path={path}"), command=["test"])
    found = run.manifest()["best"]["plan_id"]
    tables = [
        logits_on_test(source, plan_id)
        for source, plan_id in ((run, found), (again, again.read("plans")["plan_id"][0].as_py()))
    ]
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-4)
    text = [row["perplexity"] for row in again.read("perplexity").to_pylist() if row["target"] == "text"]
    before = [row["perplexity"] for row in run.read("perplexity").to_pylist() if row["plan_id"] == found]
    assert text == pytest.approx(before, rel=1e-4)
    alphas = read_alpha_file(f"{path}/alphas.json", Checkpoint("demo").n_layers).alphas
    assert alphas == run.manifest()["best"]["alphas"]


def test_the_saved_model_is_proved_and_its_card_says_what_it_reaches(run):
    best = run.manifest()["best"]
    assert best["proof"]["passed"] and best["proof"]["predictions_equal"] == best["proof"]["positions"]
    card = (Path(run.path_of("models", "found_bayes")) / "README.md").read_text()
    for line in findings.plan_lines(run, "test"):
        low, high = line["interval"]
        assert f"| {line['label']} | {line['layers']} | {line['accuracy']:.4f} [{low:.3f}, {high:.3f}] |" in card
    assert all(f"| {' | '.join(cells)} |" in card for cells in summary.comparison_table(run, best["plan_id"])[1])
    assert "test questions, none of which the search saw" in card and "```\ntest\n```" in card


def test_a_saved_model_that_failed_its_proof_fails_the_search_and_stays(run, local_searches, tmp_path, monkeypatch):
    """Also when the same command is given again, unless the proof was ended before it said anything."""
    again = tmp_path / "again"
    shutil.copytree(run.path_of(), again, ignore=shutil.ignore_patterns("manifest.json", "models"))
    settings = [*tasks(Path(run.path_of()).parent, "piqa", "boolq"), "output.verify=true"]
    unlike = "is not the one that was merged.*RuntimeError"
    for status, words in ((-9, "could not be proved.*signal 9"), (1, unlike), (-9, unlike)):
        done = subprocess.CompletedProcess([], status, "", "RuntimeError: no")
        monkeypatch.setattr(raymerge.proof, "_run_fresh", lambda *_, done=done: done)
        with pytest.raises(ProofError, match=words) as raised:
            search(config(again, *settings), command=["test"])
        assert f"the model saved in {again / 'models' / 'found_bayes'} " in str(raised.value)
        assert not RunDirectory.load(again).complete
        assert Checkpoint(str(again / "models" / "found_bayes")).n_layers == Checkpoint("demo").n_layers - 13


@pytest.fixture
def saver(monkeypatch):
    """What saves a search's models, without anything searched, and a plan to save; of a folder and settings."""
    monkeypatch.setattr(found_models, "search_results", lambda *_: [])  # which are in no table
    return _saver


def _saver(out, *more, run=None, cache=None):
    settings, checkpoint = config(out, *more), Checkpoint("demo")
    run = run or RunDirectory.open(out, settings_of(settings, "model", "data"), "search")
    start = starting_plan(settings.plan, checkpoint.n_layers, None)
    models = FoundModels(settings, checkpoint, run, cache or str(out / "cache"), command=["test"], progress=Silent())
    return models.save, start.with_alphas([0.5] * 13, name="found_bayes", kind="found")


def test_a_model_whose_proof_was_interrupted_is_not_taken_for_a_proved_one(saver, tmp_path, monkeypatch):
    save, plan = saver(tmp_path / "run", "output.verify=true")
    where, prove = tmp_path / "run" / "models" / "found_bayes", raymerge.merging.prove
    beside = []

    def interrupted(checkpoint, plan, folder, **_):
        beside.extend(path.name for path in (tmp_path / "run").iterdir() if folder.is_relative_to(path))
        raise KeyboardInterrupt

    monkeypatch.setattr(raymerge.merging, "prove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(plan)
    assert [name.startswith("_tmp.") for name in beside] == [True], "what a killed process leaves is deleted"
    assert not where.exists()
    monkeypatch.setattr(raymerge.merging, "prove", prove)
    assert save(plan)[1]["passed"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_that_was_being_saved_to_an_object_store_is_deleted_at_the_next_start(
    saver, tmp_path, monkeypatch, shared
):
    """It lies in the run's cache meanwhile; of a cache that other runs may use, only what is old is deleted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    more = [f"output.cache={tmp_path / 'shared'}"] if shared else []
    settings = config(f"fsspec+memory://bucket/{tmp_path.name}", *more)
    run = RunDirectory.open(settings.output.run, settings_of(settings, "model", "data"), "search")
    with swept_cache(settings, run) as cache:
        (save, plan), beside = saver(tmp_path / "run", run=run, cache=cache), []

        def interrupted(checkpoint, plan, folder, **_):
            beside.append(folder.parent)
            (folder.parent.parent / "_tmp.of a killed process").mkdir()
            raise KeyboardInterrupt

        monkeypatch.setattr(found_models, "save_merged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(plan)
    assert beside[0].parent == Path(cache) and beside[0].name.startswith("_tmp.")
    for age in (0.0, 2 * 86400.0):
        os.utime(Path(cache) / "_tmp.of a killed process", (time.time() - age,) * 2)
        with swept_cache(settings, run):
            left = [path.name for path in Path(cache).glob("_tmp.*")]
        if not shared:
            break
        assert bool(left) == (age == 0.0)
    assert left == []


def test_a_saved_model_is_kept_only_for_its_plan_and_with_the_proof_that_is_asked_for(saver, tmp_path):
    save, plan = saver(tmp_path / "run")
    where, proof = save(plan)
    assert proof is None
    written = Path(where, "model.safetensors").stat().st_mtime_ns
    assert save(plan) == (where, None) and Path(where, "model.safetensors").stat().st_mtime_ns == written
    proof = saver(tmp_path / "run", "output.verify=true")[0](plan)[1]
    assert proof["passed"], "output is free to differ from call to call"
    other = plan.with_alphas([0.25] * 13, name=plan.name, kind=plan.kind)
    assert save(other) == (where, None)
    assert read_alpha_file(Path(where, "alphas.json"), other.n_layers).alphas == other.alphas


def test_what_workers_matched_on_other_machines_is_what_is_saved(saver, tmp_path):
    """The driver has no prompts to match by, and on a cluster's head no worker has left a match in its cache."""
    more = ["plan.alignment=activations", "data.limit_per_subject=1"]
    save, plan = saver(tmp_path / "run", *more)
    settings = config(tmp_path / "run", *more)
    pool = LocalPool(settings, read_inputs(settings, (SEARCH, REPORT)), tmp_path / "another machine's cache")
    save.__self__.take_matches(pool, [plan])
    record = json.loads(Path(save(plan)[0], "merge_plan.json").read_text())
    assert record["alignment"] == "activations" and record["tensors_changed"] > 0


@pytest.mark.parametrize("folder, expected", [("~/states", "home/states"), ("states", "here/states")])
def test_the_cache_is_one_folder_for_driver_and_workers(tmp_path, monkeypatch, folder, expected):
    """Whatever their working directories are."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    settings = config(tmp_path / "run", f"output.cache={folder}")
    assert cache_of(settings, RunDirectory.open(tmp_path / "run", {}, "search")) == str(tmp_path / expected)


def test_a_cache_in_an_object_store_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"output.cache = 's3://bucket/states': must be a folder"):
        config(tmp_path, "output.cache=s3://bucket/states")


def test_an_evaluation_without_a_text_says_nothing_of_its_perplexity(local_pools, tmp_path, capsys):
    from raymerge.console import print_evaluation

    few = ["data.perplexity_text=null", "data.subjects=number_words", "data.report_limit_per_subject=2"]
    print_evaluation(evaluate(config(tmp_path / "run", *few)), "test")
    told = capsys.readouterr().out
    assert "number_words" in told and "perplexity" not in told


def test_workers_with_other_files_are_the_users_to_mend(tmp_path):
    settings = config(tmp_path / "run", "data.perplexity_text=null")
    inputs = read_inputs(settings, (REPORT,))
    pool = LocalPool(settings, inputs, tmp_path)
    object.__setattr__(inputs, "questions", {})  # as if the driver's were others
    with pytest.raises(ConfigError, match="must lead to the same files on every machine"):
        describe_workers(pool, inputs, Silent())


def described(**differs):
    held = {"model_identity": "m", "tokenizer_identity": "t", "data_identities": {}}
    return {"host": "b", "code": code_identity(), "device": "cpu", "dtype": "float32"} | held | differs


@pytest.mark.parametrize(
    "gpus, differs, message",
    [
        (0, {"dtype": "bfloat16"}, "worker on b computes with dtype bfloat16, the one on a with float32: .*dtype"),
        (0, {"device": "NVIDIA A10G"}, "worker on b computes with device GPU, the one on a with cpu"),
        (
            1,
            {},
            r"the worker on b 1 GPUs, but torch sees no CUDA .*torch.cuda.is_available.*gpus_per_worker: 0",
        ),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_workers_that_would_compute_differently_are_the_users_to_mend(gpus, differs, message, late):
    """One whose torch sees no GPU would silently compute on the CPU, in float32 beside the others' bfloat16."""
    inputs = SimpleNamespace(checkpoint=SimpleNamespace(identity="m", tokenizer_identity="t"), identities={})
    good, bad = described(host="a", device="NVIDIA H100" if gpus else "cpu"), described(**differs)
    found, admitted = [good] if late else [good, bad], []
    pool = SimpleNamespace(
        gpus_per_worker=gpus, admit=lambda _, check: admitted.append(check), broadcast=lambda _: found
    )
    with pytest.raises(ConfigError, match=message):
        describe_workers(pool, inputs, Silent())
        admitted[0](bad)
    if gpus:
        admitted[0](described(device="NVIDIA A10G"))  # another make of the same kind


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_cluster_that_loses_its_last_node_is_waited_for(monkeypatch, gpus):
    """Where workers.count is auto the pool asks how many there should be; GPU workers do not become CPU workers."""
    opened, nodes = [], [{"CPU": 2.0, "GPU": float(gpus)}]
    monkeypatch.setattr("raymerge.experiments.common.WorkerPool", lambda *_, **options: opened.append(options))
    monkeypatch.setattr("raymerge.experiments.common.cluster_nodes", lambda: nodes)
    open_pool(load_config(None, []), SimpleNamespace(roles=(), checkpoint=Checkpoint("demo"), questions={}), "cache")
    (options,) = opened
    assert (options["gpus_per_worker"], options["grow"]()) == (gpus, 1 if gpus else 2)
    nodes[:] = [{"CPU": 64.0}] if gpus else []
    assert options["grow"]() == 0
    nodes[:] = [{"CPU": 4.0, "GPU": 3.0}] * 2
    assert options["grow"]() == (6 if gpus else 8)


def test_receipts_say_that_dropping_changes_nothing_and_merging_seven_matrices(run):
    names = {row["plan_id"]: row["name"] for row in run.read("plans").to_pylist()}
    changed = {}
    for row in run.read("receipts").to_pylist():
        changed.setdefault(names[row["plan_id"]], []).append(row["max_abs_change"] > 0)
    assert not any(changed.get("drop", []))
    assert sum(changed["fixed_0.6225"]) == 7


def test_an_interrupted_search_goes_on_and_a_complete_one_is_left_alone(run, local_searches, tmp_path, monkeypatch):
    settings = config(tmp_path / "cut")

    class Cut(Exception):
        pass

    stored = []

    def cut(self, part, trials, results):
        if len(stored) == 2:
            raise Cut
        stored.append(part)
        return original(self, part, trials, results)

    original = alpha_search._Search._record
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(alpha_search._Search, "_record", cut)
        search(settings, command=["test"])
    half = RunDirectory.load(tmp_path / "cut")
    assert not half.complete
    before = {row["plan_id"] for row in half.read("trials").to_pylist()}
    with monkeypatch.context() as patch:  # what controls reached on the search questions is stored
        patch.delattr(raymerge.worker.ModelWorker, "judge")
        whole = search(settings, command=["test"])
    trials = whole.read("trials").to_pylist()
    assert before <= {row["plan_id"] for row in trials}
    assert sorted(row["iteration"] for row in trials if row["searcher"] == "bayes") == list(range(9))
    manifest = whole.manifest()
    assert search(settings, command=["again"]).manifest() == manifest
    # Random candidates follow from the seed alone, interrupted or not.
    drawn = [
        sorted(row["alphas"] for row in r.read("trials").to_pylist() if row["searcher"] == "random")
        for r in (run, whole)
    ]
    assert drawn[0] == drawn[1]


def test_a_search_gathers_its_batches_as_it_goes(local_searches, tmp_path, monkeypatch):
    monkeypatch.setattr(alpha_search, "_LOOSE", 2)
    parts, append = [], RunDirectory.append

    def counted(self, table, rows, part=None):
        written = append(self, table, rows, part)
        parts.extend([len(self._tables.part_names(table))] if table == "trials" else [])
        return written

    monkeypatch.setattr(RunDirectory, "append", counted)
    trials = search(config(tmp_path), command=["test"]).read("trials").to_pylist()
    assert max(parts) == 3 and len(parts) > 6  # one of gathered ones, and two of batches
    assert sorted(row["iteration"] for row in trials if row["searcher"] == "bayes") == list(range(9))


def test_a_search_that_keeps_the_language_model(local_searches, tmp_path):
    """Values, perplexities and the choice follow from the tables; what is chosen keeps to the ceiling. Questions are
    those of two of three subjects in the search, of all in the report, with comparisons on the two beside it."""
    subjects = ("colour_mixing", "number_words")
    settings = [
        "data.perplexity_tokens=300",
        "data.domains={pictures: [colour_mixing]}",
        "search.objective=answer_nll:number_words,pictures+0.1*text_nll",
        "search.text=demo",
        "search.text_tokens=120",
        "search.candidates=6",
        "search.random_candidates=0",
        "plan.merges=4",
        "output.save_best=false",
    ]
    ceiling = 6.5  # 6.43 at alpha = 1, 6.55 at the published constant
    run = search(config(tmp_path / "kl", *settings, f"search.perplexity_ceiling={ceiling}"), command=["test"])
    trials = run.read("trials").to_pylist()
    assert all(row["status"] == "ok" and row["perplexity"] > 1 for row in trials)
    for row in trials:
        if row["perplexity"] <= ceiling:
            assert row["value"] == pytest.approx(row["nll"] + 0.1 * np.log(row["perplexity"]))
        else:
            assert row["value"] > 5
    assert {row["perplexity"] <= ceiling for row in trials} == {True, False}
    best = min((row for row in trials if row["searcher"] == "bayes"), key=lambda row: (row["value"], row["nll"]))
    assert best["perplexity"] <= ceiling and run.manifest()["best"]["plan_id"] == best["plan_id"]
    comparisons = run.read("comparisons").to_pylist()
    n_plans = len(pc.unique(run.read("plans")["plan_id"]))
    assert len(comparisons) == 3 * n_plans * (n_plans - 1) / 2  # all pairs, three measures
    assert all(row["plan_a"] == best["plan_id"] for row in comparisons[: 3 * (n_plans - 1)])
    assert len(summary.optimism_lines(run, "test")) == 2

    assert {row["n_questions"] for row in trials} == {12}
    answers = run.read("answers")
    searched = answers.filter(pc.equal(answers["split"], "validation"))
    assert set(searched["subject"].to_pylist()) == set(subjects)
    reported = answers.filter(pc.equal(answers["split"], "test")).to_pylist()
    right: dict[str, list[bool]] = {}
    for row in reported:
        if row["subject"] in subjects:
            right.setdefault(row["plan_id"], []).append(row["predicted"] == row["answer"])
    assert len(reported) == 18 * n_plans
    compared = run.read("subject_comparisons").to_pylist()
    assert len(compared) == 2 * n_plans * (n_plans - 1) / 2
    assert {(row["subjects"], row["n"]) for row in compared} == {(",".join(subjects), 12)}
    for row in compared:
        if row["measure"] == "accuracy":
            means = [np.mean(right[row[f"plan_{side}"]]) for side in "ab"]
            assert row["difference"] == pytest.approx(means[0] - means[1])
    caption, _, cells = summary.subject_table(run, best["plan_id"])
    assert caption.startswith("Subjects of the search, number_words, pictures: paired differences on 12 of the")
    assert len(cells) == 2 * (n_plans - 1)
    with pytest.raises(ConfigError, match="search.text = demo: .* after the first 100000.*data.perplexity_tokens"):
        search(config(tmp_path / "none", *settings, "data.perplexity_tokens=100000"))
    assert not (tmp_path / "none").exists()


def test_block_and_coefficients_are_searched_together(local_searches, tmp_path):
    """Every trial has its block; what is reported and saved is the best one's."""
    settings = [
        "plan.selection=block",
        "plan.block=search",
        "plan.merges=4",
        "plan.starts=[3, 8, 17]",
        "search.objective=answer_nll",
        "search.candidates=8",
        "search.random_candidates=0",
        "calibration.tokens=600",
        "data.subjects=country_capitals",
        "data.perplexity_tokens=100",
    ]
    run = search(config(tmp_path / "blocks", *settings), command=["test"])
    trials = [row for row in run.read("trials").to_pylist() if row["status"] == "ok"]
    searched = sorted((row for row in trials if row["searcher"] == "bayes"), key=lambda row: row["iteration"])
    assert len(searched) == 8 and all(len(row["alphas"]) == 4 for row in trials)
    assert {row["block"] for row in searched} == {3, 8, 17}
    assert {row["block"] for row in trials if row["searcher"] == "controls"} == {None}
    blocks = run.read("blocks").to_pylist()
    (first,) = (row["first"] for row in blocks if row["chosen"])
    # The search begins with what the cosine chooses: base coefficients, the best single layer, the block dropped.
    known = [(first, [0.6225] * 4), (first, [0.0] * 4), (first, [1.0] * 4)]
    assert [(row["block"], row["alphas"]) for row in searched[:3]] == known
    assert run.manifest()["keep_one"] == {"best": f"keep_{first + 3}", "of": 5}
    assert {(row["measure"], row["first"]) for row in blocks} == {
        (measure, start) for measure in ("cosine", "angular") for start in (3, 8, 17)
    }
    names = {row["plan_id"]: row["name"] for row in run.read("plans").to_pylist()}
    assert {"drop", "before_last", "drop_block", "found_bayes"} <= set(names.values())
    best = min(searched, key=lambda row: (row["value"], row["nll"]))
    assert names[best["plan_id"]] == "found_bayes" and run.manifest()["best"]["alphas"] == best["alphas"]
    kept = [row["into"] for row in run.read("plans").to_pylist() if row["name"] == "found_bayes"]
    assert min(kept) == best["block"] - 1
    # The saved alpha file names the same plan.
    demo = Checkpoint("demo")
    saved = read_alpha_file(f"{run.path_of('models', 'found_bayes')}/alphas.json", demo.n_layers)
    assert saved.plan_id(demo.identity) == best["plan_id"] == run.manifest()["best"]["plan_id"]


def test_another_configuration_is_refused_by_name(run):
    with pytest.raises(RunError, match="plan.merges"):
        search(config(run.path_of("tables").removesuffix("/tables"), "plan.merges=4"))


def test_the_summary_is_made_from_tables(run, capsys):
    from raymerge.console import print_search

    lines = findings.plan_lines(run, "test")
    assert [line["name"] for line in lines][0] == "base" and all(line["n"] == 18 for line in lines)
    accuracy = {row["plan_id"]: row for row in run.read("accuracy").to_pylist() if row["subject"] == "_micro"}
    assert lines[0]["accuracy"] == accuracy[lines[0]["plan_id"]]["accuracy"]
    print_search(run, "test")
    shown = capsys.readouterr().out
    for words in (
        "Always answering A",
        "p (Holm)",
        "The best plan found,",
        "; workers spent",
        "Merged model",
        "Reloaded in a fresh process",
    ):
        assert words in shown


def test_an_interrupted_evaluation_goes_on_by_shard(local_pools, tmp_path, monkeypatch, capsys):
    from raymerge.console import print_evaluation
    from raymerge.experiments import model_evaluation

    monkeypatch.setattr(raymerge.prompts, "_LEAST_TOKENS", 300)
    settings = ["data.question_perplexity=true", "data.report_limit_per_subject=30", *tasks(tmp_path, "arc", "race")]
    run = evaluate(config(tmp_path / "whole", *settings), command=["test"])
    subjects = run.read("accuracy")["subject"].to_pylist()
    assert subjects == ["_micro", "_macro", "colour_mixing", "country_capitals", "number_words"]
    assert [row["target"] for row in run.read("perplexity").to_pylist()] == ["question"] * 4 + ["text"]
    print_evaluation(run, "test")
    told = capsys.readouterr().out
    assert "Plain-text perplexity" in told and f"raymerge report {run.path_of().rstrip('/')}\n" in told
    shown = {words[0]: words for line in told.splitlines() if (words := line.split())}
    micro = next(
        row for row in run.read("perplexity").to_pylist() if row["target"] == "question" and not row["subject"]
    )
    assert list(map(shown.__contains__, subjects)) == [True] * 5 and "Always" in shown
    assert summary.number(micro["perplexity"]) in shown["_micro"]
    assert run.complete and json.loads(json.dumps(run.manifest()))

    class Cut(Exception):
        pass

    stored, store = [], model_evaluation._Evaluation._store

    def cut(self, role, part, result):
        if len(stored) == 2:
            raise Cut
        store(self, role, part, result)
        stored.append(part)

    monkeypatch.setattr(model_evaluation._Evaluation, "_store", cut)
    with pytest.raises(Cut):
        evaluate(config(tmp_path / "cut", *settings), command=["test"])
    half = RunDirectory.load(tmp_path / "cut")
    assert not half.complete and 0 < len(half.read("answers")) < 90
    monkeypatch.setattr(model_evaluation._Evaluation, "_store", store)
    again = evaluate(config(tmp_path / "cut", *settings), command=["test"])
    whole, before, left = (pool.asked for pool in local_pools)
    assert whole == before >= 6 and left == before - 2  # three shards of questions or more, two tasks, text
    for table in ("answers", "accuracy", "task_answers", "task_accuracy", "perplexity", "context"):
        one, other = (each.read(table).drop_columns("run_id").to_pylist() for each in (run, again))
        assert one and one == other


def test_tasks_alone_are_an_evaluation(local_pools, tmp_path, capsys):
    out = ["--text", "none", "--out", str(tmp_path / "run"), "--set", "workers.count=1"]
    sets = [word for setting in tasks(tmp_path, "hellaswag") for word in ("--set", setting)]
    assert cli.main(["evaluate", "demo", "--mmlu", "none", *out, *sets]) == 0
    run = RunDirectory.load(tmp_path / "run")
    assert sorted(run.row_counts()) == ["costs", "plans", "task_accuracy", "task_answers"]
    assert "hellaswag  2  acc_norm" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Further tasks" in page and "acc_norm" in page and "Left out" not in page
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        evaluate(config(tmp_path / "none", "data.mmlu=null", "data.perplexity_text=null"))
    with pytest.raises(ConfigError, match="data.mmlu is null"):
        search(config(tmp_path / "none", "data.mmlu=null"))
    assert not (tmp_path / "none").exists()


TEXT_ALONE = [
    "data.mmlu=null",
    "data.perplexity_tokens=400",
    "plan.merges=4",
    "search.objective=text_nll",
    "search.text=demo",
    "search.text_tokens=200",
    "search.searcher=[bayes, gradient]",
    "search.candidates=5",
    "search.initial=1",
    "gradient.starts=1",
    "gradient.epochs=2",
]


def test_plain_text_alone_is_searched_on_where_no_questions_are_asked(local_searches, tmp_path, capsys):
    """The loss of every candidate is that of its whole model on the text after the one that is reported on."""
    from raymerge.console import print_search

    run = search(config(tmp_path / "run", *TEXT_ALONE), command=["test"])
    assert run.complete and not {"answers", "accuracy"} & set(run.row_counts())
    trials = run.read("trials").to_pylist()
    assert {row["searcher"] for row in trials} == {"controls", "random", "bayes", "gradient_simplex"}
    assert {row["status"] for row in trials} == {"ok"} and {row["n_questions"] for row in trials} == {0}
    assert all(row["accuracy"] is row["nll"] is None for row in trials)
    demo, text = Checkpoint("demo"), read_text(config(tmp_path / "run"))
    (shard,) = encode_text(text, demo.tokenizer, limit=200, start=400)
    for row in trials:
        assert row["perplexity"] == pytest.approx(math.exp(row["value"]))
        if row["searcher"] != "controls":
            plan = tail_plan(demo.n_layers, row["alphas"], name="x", kind="found")
            nll, tokens = text_nll(LayerRunner(demo), plan, shard)
            assert row["value"] == pytest.approx(nll / tokens, rel=1e-4)
    losses = [row["loss"] for row in run.read("gradient_history").to_pylist()]
    assert min(losses[1:]) < losses[0]
    best = min((row for row in trials if row["searcher"] in ("bayes", "gradient_simplex")), key=lambda r: r["value"])
    assert run.manifest()["best"]["plan_id"] == best["plan_id"]
    compared = run.read("comparisons").to_pylist()
    assert {row["measure"] for row in compared} == {"text_nll"}

    print_search(run, "test")
    shown = capsys.readouterr().out
    for words in ("On plain text:", "On the search text:", "on the text it was chosen on", "Loss (nats per token)"):
        assert words in shown
    assert "questions" not in shown and "nan" not in shown
    assert cli.main(["report", run.path_of()]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "loss per token" in page and "Perplexity of every plan" in page
    for words in ("Accuracy and perplexity", "Subject by subject", "Left out", "of 0 test questions"):
        assert words not in page
    card = (Path(run.manifest()["best"]["model"]) / "README.md").read_text(encoding="utf-8")
    assert "On plain text, none of which the search saw." in card and "Always answering A" not in card


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "search.objective micro_accuracy needs answers to questions, but data.mmlu is null"),
        (["search.objective=text_nll+0.1*answer_nll", "search.text=demo"], "needs answers to questions"),
        (
            [*TEXT_ALONE, "plan.alignment=activations"],
            "plan.alignment has activations, which are computed on questions",
        ),
        ([*TEXT_ALONE, "plan.refit=linear"], "set calibration.text to a file or demo"),
        ([*TEXT_ALONE, "data.perplexity_text=null"], "nothing to judge plans by"),
    ],
)
def test_what_needs_questions_is_refused_where_a_search_asks_none(tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        search(config(tmp_path / "none", "data.mmlu=null", *more))
    assert not (tmp_path / "none").exists()


GRADIENT = [
    "search.searcher=[bayes, gradient]",
    "search.objective=answer_nll+0.1*text_nll",
    "search.text=demo",
    "search.text_tokens=100",
    "data.perplexity_tokens=200",
    "plan.merges=4",
    "plan.norms=fold",
    "plan.biases=merge",
    "gradient.parametrisations=[simplex, per_matrix]",
    "gradient.starts=2",
    "gradient.epochs=3",
    "gradient.text_kl=0.05",
    "gradient.text_positions=20",
]


def test_a_search_by_gradient_keeps_every_epoch_and_goes_on_where_it_was_cut(local_searches, tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    stored, original = [], alpha_search._Search._record

    def cut(self, part, trials, results):
        if len([name for name in stored if name.startswith("gradient")]) == 3:
            raise Cut
        stored.append(part)
        return original(self, part, trials, results)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(alpha_search._Search, "_record", cut)
        search(config(tmp_path / "cut", *GRADIENT), command=["test"])
    run = search(config(tmp_path / "cut", *GRADIENT), command=["test"])

    trials = [row for row in run.read("trials").to_pylist() if row["searcher"].startswith("gradient")]
    assert sorted((row["searcher"], row["iteration"]) for row in trials) == [
        (f"gradient_{kind}", start) for kind in ("per_matrix", "simplex") for start in (0, 1)
    ]
    assert {row["status"] for row in trials} == {"ok"} and all(row["perplexity"] > 1 for row in trials)
    history = run.read("gradient_history").to_pylist()
    assert sorted((row["searcher"], row["start"], row["epoch"]) for row in history) == [
        (f"gradient_{kind}", start, epoch)
        for kind in ("per_matrix", "simplex")
        for start in (0, 1)
        for epoch in range(4)
    ]
    # The first start is the base point; seven sets of alphas where each matrix has its own.
    first = {row["searcher"]: row["alphas"] for row in history if row["start"] == row["epoch"] == 0}
    np.testing.assert_allclose(first["gradient_simplex"], [0.6225] * 4, atol=1e-9)
    np.testing.assert_allclose(first["gradient_per_matrix"], [0.6225] * 28, atol=1e-9)
    for row in trials:
        losses = [each["loss"] for each in history if (each["searcher"], each["start"]) == (row["searcher"], 0)]
        assert min(losses[1:]) < losses[0]

    # Both searchers in one run: each has its best reported, all pairs are compared, and the best of all is last.
    bayes = [row for row in run.read("trials").to_pylist() if row["searcher"] == "bayes"]
    assert len(bayes) == 9 and [row["alphas"] for row in sorted(bayes, key=lambda row: row["iteration"])[:3]] == [
        [0.6225] * 4,
        [0.0] * 4,  # the last layer alone, the better of the two
        [1.0] * 4,
    ]
    assert run.manifest()["keep_one"]["best"] == "before_last"
    names = {row["plan_id"]: row["name"] for row in run.read("plans").to_pylist()}
    found = [name for name in names.values() if name.startswith("found_")]
    assert sorted(found) == ["found_bayes", "found_gradient_per_matrix", "found_gradient_simplex"]
    pairs = {frozenset((names[row["plan_a"]], names[row["plan_b"]])) for row in run.read("comparisons").to_pylist()}
    assert {frozenset(pair) for pair in combinations(found, 2)} <= pairs
    best_value = min([*bayes, *trials], key=lambda row: (row["value"], row["nll"]))
    assert run.manifest()["best"]["name"] == f"found_{best_value['searcher']}"

    # Coefficients survive table, plan, checkpoint and reload; one set for each matrix is in the tables.
    plans = {row["name"]: row["plan_id"] for row in run.read("plans").to_pylist()}
    matrices = {row["matrix"] for row in run.read("plans").to_pylist() if row["name"] == "found_gradient_per_matrix"}
    assert len(matrices - {None}) == 7
    best = run.manifest()["best"]
    again = evaluate(config(tmp_path / "again", f"model.path={best['model']}"), command=["test"])
    (answered,) = set(again.read("plans")["plan_id"].to_pylist())
    np.testing.assert_allclose(logits_on_test(run, plans[best["name"]]), logits_on_test(again, answered), atol=1e-4)


def test_an_evaluation_draws_its_accuracies_by_subject(local_pools, tmp_path):
    run = evaluate(config(tmp_path / "run", "output.figures=true"), command=["test"])
    drawn = ["accuracy.md", "accuracy.png", "accuracy_by_subject.png", "letters.png"]
    assert run.manifest()["figures"] == [f"figures/{name}" for name in drawn]
    assert all(Path(run.path_of(), name).stat().st_size > 500 for name in run.manifest()["figures"])
    assert "| the model |" in Path(run.path_of("figures", "accuracy.md")).read_text(), "it may have been merged before"


def test_a_run_may_lie_in_an_object_store_with_its_cache_on_the_disk(local_pools, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    where = f"fsspec+memory://bucket/{tmp_path.name}"
    done = evaluate(config(where), command=["test"])
    assert not done.is_local and RunDirectory.load(where).complete
    assert done.read("accuracy").num_rows == 5 and done.manifest()["rows"]["perplexity"] == 1
    assert evaluate(config(where), command=["again"]).manifest()["command"] == ["test"], "it is complete"
    with pytest.raises(RunError, match="holds a run with another config"):
        evaluate(config(where, "data.shots=2"), command=["test"])


def test_a_run_says_which_tokens_of_its_text_it_reports_on(local_pools, tmp_path):
    alone = ["data.mmlu=null", "data.perplexity_tokens=100", "output.figures=false"]
    runs = [
        evaluate(load_config(None, [*alone, f"output.run={tmp_path / str(number)}", *more]))
        for number, more in enumerate(([], [], ["model.add_bos=true"], ["data.perplexity_tokens=90"]))
    ]
    found = [run.inputs["text tokens"] for run in runs]
    assert found[0] == found[1] and len(set(found)) == 3
