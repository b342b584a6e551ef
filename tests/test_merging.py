"""Merge and save: what lands in the folder, and what is refused."""

import json

import pytest
import torch

from raymerge.checkpoint import Checkpoint
from raymerge.merging import merge
from raymerge.plan import PlanError, alpha_file_text, read_alpha_file, tail_plan


@pytest.fixture
def alphas(tmp_path):
    plan = tail_plan(Checkpoint("demo").n_layers, [0.7, 0.2, 0.55], name="three", kind="file")
    path = tmp_path / "three.json"
    path.write_text(alpha_file_text(plan.steps))
    return path


def test_the_record_and_the_alpha_file_say_what_was_done(tmp_path, alphas):
    base = Checkpoint("demo")
    done = merge("demo", alphas, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "merge_plan.json").read_text())
    assert record["layers_before"] - record["layers_after"] == 3
    assert record["base_model_identity"] == base.identity
    again = read_alpha_file(tmp_path / "out" / "alphas.json", base.n_layers)
    assert again.plan_id(base.identity) == record["plan_id"] == done["plan_id"]
    # Seven matrices of one layer changed, and nothing else: read from the files, not from the receipts.
    merged = Checkpoint(str(tmp_path / "out"))
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert sorted(changed) == sorted(row["tensor"] for row in record["receipts"] if row["max_abs_change"] > 0)
    assert len(changed) == record["tensors_changed"] == 7


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path, alphas):
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError, match="exists already"):
        merge("demo", alphas, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_plan_for_another_depth_leaves_nothing_behind(tmp_path):
    deeper = tail_plan(40, [0.5, 0.5], name="deeper", kind="file")
    (tmp_path / "deeper.json").write_text(alpha_file_text(deeper.steps))
    with pytest.raises(PlanError, match="does not exist, the model has 0 to"):
        merge("demo", tmp_path / "deeper.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()
