"""tests/audit/audit.py agrees with a small search, and does not once what the search says is altered."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import task_files
import torch
from tiny import make_checkpoint

from raymerge import experiments
from raymerge.architectures import Architecture
from raymerge.config_file import load_config
from raymerge.quantisation import quantise_layer
from raymerge.report import write_report

SETTINGS = {
    "data.subjects": "colour_mixing,number_words",
    "data.limit_per_subject": 1,
    "data.report_limit_per_subject": 2,
    "data.shots": 1,
    "data.perplexity_tokens": 60,
    "plan.merges": 2,
    "plan.biases": "merge",
    "search.searcher": "gradient",
    "search.objective": "answer_nll",
    "search.random_candidates": 2,
    "gradient.parametrisations": "[per_matrix]",
    "gradient.starts": 1,
    "gradient.epochs": 4,
    "gradient.held_out": 0,
    "gradient.learning_rate": 0.5,
    "output.figures": "false",
    "output.verify": "false",
}


def test_it_agrees_with_a_search_and_tells_what_was_altered(tmp_path, monkeypatch, local_searches, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent / "audit")])
    from audit import Audit, audited

    base = make_checkpoint(tmp_path / "base", "qwen2")
    run = tmp_path / "run"
    settings = SETTINGS | {"model.path": base, "output.run": run}
    experiments.search(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
    write_report([run], run / "report.html")
    assert audited(run, questions=2, trials=1) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    compared = {line["what"].partition(":")[0] for line in lines if line.get("ok")}
    assert compared >= {"trial", "chosen", "descent", "keep_N", "accuracy", "saved", "card", "page", "alpha file"}

    # What a run once did: coefficients of one matrix reported, and saved, as another's.
    path = run / "tables" / "plans" / "all.parquet"
    plans = pq.read_table(path)
    swapped = {"self_attn.q_proj": "self_attn.k_proj", "self_attn.k_proj": "self_attn.q_proj"}
    matrices = [swapped.get(name, name) for name in plans["matrix"].to_pylist()]
    place = plans.column_names.index("matrix")
    pq.write_table(plans.set_column(place, plans.field(place), pa.array(matrices, pa.string())), path)
    altered = Audit(run, questions=2, trials=0, seed=0)
    altered.searched()
    altered.saved(run / "models" / "found_gradient_per_matrix", *altered.plans())
    assert altered.failed >= 3
    wrong = [json.loads(line)["what"] for line in capsys.readouterr().out.splitlines() if '"ok": false' in line]
    assert {"chosen: its merges", "saved: its record", "saved: weights"} <= set(wrong)


def test_it_agrees_with_alignments_refits_and_tasks(tmp_path, monkeypatch, local_pools, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent / "audit")])
    from audit import Audit, audited

    kept = {key: value for key, value in SETTINGS.items() if key.startswith(("data.", "output."))}
    task = {"format": "race", "file": str(task_files.write(tmp_path, "race"))}
    settings = kept | {
        "model.path": make_checkpoint(tmp_path / "base", "llama"),
        "output.run": tmp_path / "run",
        "tasks.reading": json.dumps(task),
        "sweep.merges": [2],
        "sweep.methods": ["fixed:0.6", "drop_greedy"],
        "sweep.refitted_methods": ["fixed:0.6"],
        "sweep.alignments": ["activations"],
        "sweep.norms": ["fold"],
        "sweep.refits": ["units"],
        "sweep.context": "false",
        "sweep.speed_tokens": 0,
        "calibration.text": "demo",
        "calibration.tokens": 200,
    }
    run = settings["output.run"]
    experiments.sweep(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
    assert audited(run, questions=2) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    compared = {line["what"].rpartition(": ")[2] for line in lines if line.get("ok")}
    assert compared >= {"a symmetry", "its fits", "held_out_error", "log-likelihoods", "receipts"}
    assert compared >= {"loss", "layers", "the chosen", "drop_greedy"}

    # A fit on half of the tokens that it is said to be on is another model.
    altered = Audit(run, questions=2, trials=0, seed=0)
    altered.config["calibration"]["tokens"] = 100
    altered.reported()
    assert altered.failed >= 3


def test_its_allowance_for_weak_ridges_and_quantised_layers_hides_no_fault(tmp_path, monkeypatch, local_pools, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent / "audit")])
    from audit import Audit, audited
    from recomputed_refits import Refits

    kept = {key: value for key, value in SETTINGS.items() if key.startswith(("data.", "output."))}
    settings = kept | {
        "model.path": make_checkpoint(tmp_path / "base", "llama", intermediate_size=64),
        "model.quantise": "int4",
        "plan.ridge": 1e-6,
        "sweep.merges": [1],
        "sweep.methods": ["fixed:0.35"],
        "sweep.refits": ["outputs"],
        "sweep.context": "false",
        "sweep.speed_tokens": 0,
        "calibration.text": "demo",
        "calibration.tokens": 60,
    }

    def swept(name):
        run = tmp_path / name
        experiments.sweep(
            load_config(None, [f"{key}={value}" for key, value in settings.items()] + [f"output.run={run}"])
        )
        return run

    def wrong(of):
        of.reported()
        return {
            line["what"] for line in map(json.loads, capsys.readouterr().out.splitlines()) if line.get("ok") is False
        }

    run = swept("run")
    assert audited(run, questions=2) == 0
    # What the audit once did, with an allowance that hid it: fits on the states of quantised layers.
    other = Audit(run, questions=2, trials=0, seed=0)
    other.fits = Refits(other.base, other.fits.sequences, lambda *of: other.base.built(*of, other.dtype, "int4"))
    assert {"refit: error", "receipts"} <= wrong(other)
    # What runs once did: products in float32, whose rounding decided in the place of a weak ridge.
    monkeypatch.setattr("raymerge.refit.products_for", lambda *_: torch.float32)
    assert "receipts" in wrong(Audit(swept("rounded"), questions=2, trials=0, seed=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("size", [0.05, 0.0005])
def test_it_rounds_to_the_levels_of_torchao(monkeypatch, scheme, dtype, size):
    """It rounded int8 in half precision, to other levels, and no scale was below the last digit of the dtype."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent / "audit")])
    from recomputed import quantised

    torch.manual_seed(0)
    name = "mlp.up_proj.weight"
    weight = (size * torch.randn(64, 96)).to(dtype)
    rounded = quantise_layer(Architecture("llama"), {name: weight}, scheme)[name]
    assert not torch.equal(rounded, weight)
    assert torch.equal(quantised(weight, scheme), rounded)
