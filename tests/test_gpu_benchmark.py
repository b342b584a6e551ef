"""tests/benchmarks/gpu.py runs: a tiny shape on the CPU, every line that it promises."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_device import DEVICE, fake_device

PATH = Path(__file__).parent / "benchmarks" / "gpu.py"


def load():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu():
    return load()


def test_it_needs_no_more_than_it_says():
    """The machines with a GPU that are at hand have torch and transformers, but neither Ray nor pydantic."""
    absent = ["ray", "pydantic", "pydantic_core", "torchao", "gguf", "bayes_opt", "rich", "jinja2", "sklearn", "umap"]
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); runpy.run_path({str(PATH)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=PATH.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_measurement_is_printed(gpu, capsys):
    arguments = "--shape tiny --device cpu --questions 20 8 --longest 20 --reference-questions 4".split()
    assert gpu.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    each = ["trunk", "setup", "candidate", "candidate", "gradient_step", "gradient_step"]
    measures = ["card", "assignment_costs", "activations", *each, *each, "published", "goals"]
    assert [line["measure"] for line in lines] == measures
    assert all(line["seconds"] > 0 for line in lines if "seconds" in line)
    assert [line["questions"] for line in lines if line["measure"] == "trunk"] == [8, 20]
    candidates = [line for line in lines if line["measure"] == "candidate"]
    assert [line["at_once"] for line in candidates] == [1, 8, 1, 8]
    assert max(line["largest_difference"] for line in candidates) < 1e-4
    published = lines[-2]
    assert published["predictions_equal"] == 1.0 and published["largest_difference"] < 1e-4
    assert lines[-1]["equal"] and lines[-1]["ratio"] > 0


def test_keys_are_recomputed_under_a_plan_of_their_own(gpu, monkeypatch, capsys, tmp_path):
    """Not under that of summed keys, whose memory leaves room for few candidates; peaks are each measure's own."""
    peaks = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: peaks.append(name))
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    options = argparse.Namespace(shape="tiny", device="cpu", questions=[8], longest=20)
    with fake_device(monkeypatch):
        bench = gpu.Bench(options)
        bench.device, bench.cuda, bench.rates = DEVICE, True, {"matrix": 1.0, "bandwidth": 1.0}
        bench.scoring(8, tmp_path)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["plan"]["keys"] for line in lines if line["measure"] == "setup"] == ["linear", "recompute"]
    candidates = [(line["keys"], line["at_once"]) for line in lines if line["measure"] == "candidate"]
    assert candidates == [("linear", 1), ("linear", 8), ("recompute", 1), ("recompute", 8)]
    assert max(line["largest_difference"] for line in lines if line["measure"] == "candidate") < 1e-4
    assert peaks.count("reset_peak_memory_stats") == len(lines) == 9


def test_questions_are_of_mmlus_lengths(gpu):
    prompts = gpu.make_prompts(14042, 1000)
    groups = [group for shard in prompts.shards for group in shard.groups]
    prefixes = {group.subject: len(group.prefix) for group in groups}
    lengths = np.array([len(ids) for group in groups for ids in group.sequences])
    assert len(prefixes) == 57 and len(lengths) == 14042 == sum(gpu.SUBJECT_SIZES)
    assert sorted(row for group in groups for row in group.rows) == list(range(14042))
    assert sum(prefixes.values()) == pytest.approx(29_323, rel=0.02)
    assert min(prefixes.values()) >= 212 and max(prefixes.values()) <= 2446
    assert np.mean(lengths) == pytest.approx(106, rel=0.03) and np.median(lengths) == pytest.approx(73, rel=0.05)
    assert np.quantile(lengths, 0.95) == pytest.approx(311, rel=0.05) and lengths.max() <= 996


def test_goals_are_checked(gpu):
    met = {"seconds_a_candidate": 0.05, "ratio": 3000.0, "equal": True}
    assert not list(gpu.failed(met))
    for missed in ({"seconds_a_candidate": 0.2}, {"ratio": 900.0}, {"equal": False}):
        assert len(list(gpu.failed(met | missed))) == 1
