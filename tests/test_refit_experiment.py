"""Refits over the pool on the embedded model: in a sweep, in a search, and saved."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.evaluation import text_nll
from raymerge.experiments import search, sweep
from raymerge.experiments.alpha_search import _Search
from raymerge.experiments.common import read_inputs
from raymerge.experiments.refitting import refit_of
from raymerge.forward import LayerRunner
from raymerge.inputs import CALIBRATION, TEXT
from raymerge.plan import base_plan, drop_block_plan, tail_plan
from raymerge.worker import ModelWorker

SETTINGS = [
    "data.subjects=country_capitals",
    "data.limit_per_subject=4",
    "data.report_limit_per_subject=6",
    "data.perplexity_tokens=300",
    "calibration.text=demo",
    "calibration.tokens=2500",
    "workers.count=1",  # each takes seconds to start
    "output.figures=false",
]


@pytest.fixture(scope="module")
def run(ray_session, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sweep"
    methods = "drop_block,merge_block"
    more = ["sweep.merges=[6]", f"sweep.methods=['fixed:0.6',drop,{methods}]", f"sweep.refitted_methods=[{methods}]"]
    more += ["sweep.refits=[none,linear,outputs]", "sweep.alignments=[none]", "sweep.norms=[keep]"]
    more += ["plan.block=8", "plan.refit_layers=1", "workers.count=2"]
    more += ["sweep.context=false", "sweep.speed_tokens=0", f"output.run={out}"]
    return sweep(load_config(None, [*SETTINGS, *more]), command=["test"])


def test_each_point_stands_under_each_refit(run):
    found = [(row["merges"], row["method"], row["refit"]) for row in run.read("sweep").to_pylist()]
    methods = ("drop_block", "merge_block")
    plain = [(0, "base", "none"), (6, "drop", "none"), (6, "fixed_0.6", "none")]
    assert sorted(found) == sorted([*plain, *((6, m, r) for m in methods for r in ("none", "linear", "outputs"))])
    assert len(set(run.read("sweep")["plan_id"].to_pylist())) == 9
    points = {row["plan_id"]: (row["method"], row["refit"]) for row in run.read("sweep").to_pylist()}
    compared = {(*points[row["plan_a"]], *points[row["plan_b"]]) for row in run.read("comparisons").to_pylist()}
    assert ("merge_block", "outputs", "merge_block", "none") in compared
    assert ("merge_block", "outputs", "drop_block", "linear") in compared


def test_fits_say_what_they_were_made_on(run):
    rows = run.read("refits").to_pylist()
    outputs = [(row["layer"], row["part"]) for row in rows if row["method"] == "outputs"]
    # The seam, 7, and with refit_layers the layer after it, 14, of both methods.
    assert sorted(outputs) == sorted(2 * [(layer, part) for layer in (7, 14) for part in ("attention", "mlp")])
    assert [(row["layer"], row["part"]) for row in rows if row["method"] == "linear"] == 2 * [(7, "mlp")]
    for row in rows:
        assert row["tokens"] == 2500 and 0 < row["error"] < 1 and row["held_out_error"] < 1 and row["seconds"] > 0


def test_fits_of_several_workers_are_those_of_one(run, tmp_path):
    config = load_config(None, SETTINGS)
    worker = ModelWorker(config, roles=(CALIBRATION,), cache=tmp_path)
    plan_ids = {(row["method"], row["refit"]): row["plan_id"] for row in run.read("sweep").to_pylist()}
    reported = {row["plan_id"]: row["perplexity"] for row in run.read("perplexity").to_pylist()}
    refit = refit_of(config, read_inputs(config, (CALIBRATION,)), "linear")
    plan = replace(drop_block_plan(worker.checkpoint.n_layers, 8, 6), refit=refit)
    assert plan.plan_id(worker.checkpoint.identity) == plan_ids["drop_block", "linear"]
    (shard,) = worker.prompts.shards(TEXT)
    nll, tokens = text_nll(worker.runner, plan, shard)
    assert math.exp(nll / tokens) == pytest.approx(reported[plan_ids["drop_block", "linear"]], rel=1e-3)
    # Calibrated on the tokens after those that are reported on.
    text = worker.checkpoint.tokenizer(worker.material.calibration[0], add_special_tokens=False)["input_ids"]
    groups = [group for shard in worker.prompts.shards(CALIBRATION) for group in shard.groups]
    used = np.concatenate([ids for group in groups for ids in group.sequences])
    assert len(used) == 2500 and sorted(used.tolist()) == sorted(text[300:2800])


def test_a_search_fits_what_it_found_and_saves_it(local_searches, tmp_path):
    more = ["plan.merges=3", "plan.refit=outputs", "search.candidates=3", "search.initial=1"]
    more += ["search.random_candidates=1", "output.verify=false", f"output.run={tmp_path / 'run'}"]
    run = search(load_config(None, [*SETTINGS, *more]), command=["test"])
    names = set(run.read("plans")["name"].to_pylist())
    assert {"dropped_linear", "dropped_outputs", "fixed_0.6225_outputs", "found_bayes_outputs"} <= names
    saved = json.loads((Path(run.path_of("manifest.json"))).read_text())["refitted"]
    merged, base = Checkpoint(saved["model"]), Checkpoint("demo")
    record = json.loads((Path(saved["model"]) / "merge_plan.json").read_text())
    assert record["plan_id"] == saved["plan_id"] and record["refit"]["method"] == "outputs"
    best = run.read("perplexity").to_pylist()
    reported = {row["plan_id"]: row["nll"] for row in best if row["target"] == "text"}
    worker = ModelWorker(load_config(None, SETTINGS), roles=(), cache=tmp_path / "other")
    runner = LayerRunner(merged)
    (shard,) = worker.prompts.shards(TEXT)
    nll, tokens = text_nll(runner, base_plan(merged.n_layers), shard)
    assert nll / tokens == pytest.approx(reported[saved["plan_id"]], rel=1e-4)
    assert merged.n_layers == base.n_layers - 3


def test_what_was_found_is_saved_where_it_drops_its_layers():
    """It then has the plan id of the dropped layers refitted, which stand before it."""
    start = tail_plan(16, [0.6, 0.6], name="fixed_0.6", kind="fixed")
    found = start.with_alphas([1.0, 1.0], name="found_bayes", kind="found")
    for method in ("outputs", "linear"):
        config = load_config(None, [f"plan.refit={method}"])
        inputs = SimpleNamespace(
            calibration=("a text", 0), identities={CALIBRATION: "its hash"}, checkpoint=Checkpoint("demo")
        )
        stand_in = SimpleNamespace(config=config, start=start, inputs=inputs, identity="a model")
        names = [plan.name for plan in _Search._refitted(stand_in, found)]
        expected = ["dropped_linear", *(f"{name}_{method}" for name in ("dropped", "fixed_0.6", "found_bayes"))]
        assert names == list(dict.fromkeys(expected))
