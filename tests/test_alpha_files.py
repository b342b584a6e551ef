"""alpha_files.py: the published format read and written to the last bit, and everything that is refused."""

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from raymerge.alpha_files import alpha_file_text, read_alpha_file
from raymerge.plan import MergeStep, PlanError, block_plan, tail_plan

REFERENCE = os.environ.get("RAYMERGE_REFERENCE")
EPS = np.finfo(np.float64).eps


def entry(into, remove, alpha, **more):
    return {"step": 0, "layer_to_merge_into": into, "layer_to_remove": remove, "ratio_i_alpha": alpha} | more


def write(tmp_path, content):
    path = tmp_path / "alphas.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_reads_the_published_format(tmp_path):
    path = write(
        tmp_path,
        [
            entry(4, 5, 0.6257765467409394, step=-18, ratio_j=0.3742234532590606),
            entry(3, 4, 1, step=-17),
            {key: value for key, value in entry(2, 3, 0.25).items() if key != "step"},
        ],
    )
    plan = read_alpha_file(path, 6)
    assert plan.steps == (MergeStep(4, 5, 0.6257765467409394), MergeStep(3, 4, 1.0), MergeStep(2, 3, 0.25))
    assert all(type(step.alpha) is float for step in plan.steps)
    assert (plan.name, plan.kind, plan.selection) == ("alphas", "file", "tail")


def test_the_order_in_the_file_counts_not_the_step_numbers(tmp_path):
    plan = read_alpha_file(write(tmp_path, [entry(4, 5, 0.5, step=7), entry(3, 4, 0.25, step=1)]), 6)
    assert [step.into for step in plan.steps] == [4, 3]


@pytest.mark.parametrize("n_layers", [7, 10])
def test_a_list_that_does_not_start_at_the_end_is_no_tail(tmp_path, n_layers):
    plan = read_alpha_file(write(tmp_path, [entry(4, 5, 0.5), entry(3, 4, 0.25)]), n_layers)
    assert plan.selection == "block" and len(plan.kept) == n_layers - 2


def test_alphas_survive_a_round_trip_to_the_last_bit(tmp_path):
    values = [0.1 + 0.2, math.nextafter(1.0, 0.0), 5e-324, 1 / 3, 0.0, 1.0, 2**-60]
    plan = tail_plan(9, values, name="x", kind="found")
    again = read_alpha_file(write(tmp_path, alpha_file_text(plan.steps)), 9)
    assert again.steps == plan.steps and again.alphas == values
    assert again.plan_id("m") == plan.plan_id("m")
    entries = json.loads(alpha_file_text(plan.steps))
    assert [e["step"] for e in entries] == list(range(7))
    assert set(entries[0]) == {"step", "layer_to_merge_into", "layer_to_remove", "ratio_i_alpha", "ratio_j"}
    assert all(math.isclose(e["ratio_j"], 1 - e["ratio_i_alpha"], abs_tol=EPS) for e in entries)


def test_ratio_j_is_checked_to_the_digits_that_published_files_carry(tmp_path):
    read_alpha_file(write(tmp_path, [entry(4, 5, 0.3249944307, ratio_j=0.675006)]), 6)
    with pytest.raises(PlanError, match="ratio_j is 0.67501, but 1 - ratio_i_alpha is 0.675"):
        read_alpha_file(write(tmp_path, [entry(4, 5, 0.3249944307, ratio_j=0.67501)]), 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is not a JSON alpha file"),
        ("", "is not a JSON alpha file"),
        ({"steps": []}, "must hold a JSON list"),
        ([], "at least one"),
        ("null", "must hold a JSON list"),
        ([[4, 5, 0.5]], r"entry 0 is \[4, 5, 0.5\]: each entry must be an object"),
        ([entry(4, 5, 0.5, ratio_i=0.3)], r"entry 0: unknown keys \['ratio_i'\], missing keys \[\]"),
        ([entry(4, 5, 0.5), {"step": 1}], r"entry 1: unknown keys \[\], missing keys \['layer_to_merge_into'"),
        ([entry(4, 5, 1.01)], "alpha is 1.01"),
        ([entry(4, 5, -0.01)], "alpha is -0.01"),
        ('[{"layer_to_merge_into": 4, "layer_to_remove": 5, "ratio_i_alpha": NaN}]', "alpha is nan"),
        ('[{"layer_to_merge_into": 4, "layer_to_remove": 5, "ratio_i_alpha": 1e999}]', "alpha is inf"),
        ([entry(4, 5, 0.5, ratio_j=float("nan"))], "ratio_j is nan"),
        ([entry(4, 5, 0.5), entry(3, 5, 0.5)], r"step 1 \(3 <- 5\): layer 5 \(remove\) was already removed"),
        ([entry(4, 5, 0.5), entry(2, 3, 0.5), entry(1, 4, 0.5)], r"layers \[2\] still stand between"),
        ([entry(5, 6, 0.5)], "layer 6 .remove. does not exist, .*; the file is for a deeper model"),
        ([entry(False, 1, 0.5)], "layer_to_merge_into is False, but must be a whole number"),
        ([entry(30, 31, 0.5)], "layer 30 .into. does not exist, the model has 0 to 5; the file is for a deeper model"),
        ([entry(i, i + 1, 0.5) for i in range(5, -1, -1)], "6 merges need more than 6 layers"),
        ([entry(True, 5, 0.5)], "layer_to_merge_into is True, but must be a whole number"),
        ([entry(4, "5", 0.5)], "layer_to_remove is '5', but must be a whole number"),
        ([entry(4.0, 5, 0.5)], "layer_to_merge_into is 4.0"),
        ([entry(4, None, 0.5)], "layer_to_remove is None"),
        ([entry(4, 5, "0.5")], "ratio_i_alpha is '0.5', but must be a number"),
        ([entry(4, 5, True)], "ratio_i_alpha is True"),
        ([entry(4, 5, None)], "ratio_i_alpha is None"),
        ([entry(4, 5, 0.5, ratio_j="0.5")], "ratio_j is '0.5'"),
        ([entry(4, 5, 0.0, ratio_j=True)], "ratio_j is True"),
        ([entry(4, 5, 10**400)], "ratio_i_alpha is 10{400}, but must lie in"),
        ([entry(4, 5, 0.5, ratio_j=10**400)], "ratio_j is 10{400}, but must lie in"),
        ("[" * 100_000, "is not a JSON alpha file"),
    ],
)
def test_refused_alpha_files(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(PlanError, match=message) as caught:
        read_alpha_file(path, 6)
    assert str(path) in str(caught.value)


def test_missing_unreadable_and_binary_alpha_files(tmp_path):
    with pytest.raises(PlanError, match="there is no alpha file .*absent.json"):
        read_alpha_file(tmp_path / "absent.json", 6)
    with pytest.raises(PlanError, match="not a JSON alpha file"):
        read_alpha_file(tmp_path, 6)
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="file/alphas.json is not a JSON alpha file: .*Not a directory"):
        read_alpha_file(tmp_path / "file" / "alphas.json", 6)
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(PlanError, match="not a JSON alpha file"):
        read_alpha_file(binary, 6)


@pytest.mark.skipif(not REFERENCE, reason="RAYMERGE_REFERENCE (a folder with the published alphas/) is not set")
@pytest.mark.parametrize("name", ["base", "bayesian_anatomy", "bayesian_all", "gradient"])
def test_published_files_are_tail_merges_of_thirteen_layers(name):
    path = Path(REFERENCE) / "alphas" / f"{name}.json"
    plan = read_alpha_file(path, 32)
    assert plan.selection == "tail" and plan.name == name and len(plan.kept) == 19
    assert plan.alphas == [e["ratio_i_alpha"] for e in json.loads(path.read_text())]
    assert all(a.into - 1 == b.into for a, b in pairwise(plan.steps))
    coefficients = dict(plan.kept[18].coefficients)
    product = 1.0
    for layer, alpha in zip(range(18, 31), reversed(plan.alphas), strict=True):
        assert math.isclose(coefficients[layer], product * alpha, rel_tol=64 * EPS)
        product *= 1 - alpha
    assert math.isclose(coefficients[31], product, rel_tol=64 * EPS)


@pytest.mark.parametrize("survivor", ["before", "after"])
def test_an_alpha_file_of_a_block_is_read_as_one(tmp_path, survivor):
    plan = block_plan(9, 2, [0.25, 0.5, 0.75], name="a", kind="file", survivor=survivor)
    path = tmp_path / "a.json"
    path.write_text(alpha_file_text(plan.steps))
    assert read_alpha_file(path, 9) == plan and read_alpha_file(path, 9).plan_id("m") == plan.plan_id("m")
