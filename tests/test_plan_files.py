"""Plan files: everything of a plan is read back, and what is not a plan is refused."""

import json

import numpy as np
import pytest

from raymerge.alpha_files import alpha_file_text, read_alpha_file
from raymerge.plan import (
    MergePlan,
    MergeStep,
    PlanError,
    Refit,
    before_last_plan,
    block_plan,
    drop_layers_plan,
    tail_plan,
)
from raymerge.plan_files import plan_file_text, read_plan

N = 12


def plans():
    """Of every selection, with every option, alphas with all their digits."""
    rng = np.random.default_rng(0)
    found = [before_last_plan(N, 3), drop_layers_plan(N, [2, 3, 7], name="list")]
    for options in (
        {},
        {"alignment": "rows"},
        {"alignment": "activations", "norms": "fold", "biases": "merge"},
        {"refit": Refit("units", layers=2, calibration="abc")},
        {"refit": Refit("linear", ridge=0.3)},
        {"matrix_alphas": (("mlp.up_proj", tuple(rng.uniform(size=4))), ("a.b", tuple(rng.uniform(size=4))))},
    ):
        found.append(tail_plan(N, rng.uniform(size=4).tolist(), name="tail", kind="found", **options))
        found.append(
            block_plan(N, 2, rng.uniform(size=4).tolist(), name="ünd/block", kind="found", survivor="after", **options)
        )
    found.append(MergePlan(N, (MergeStep(4, 5, 0.25), MergeStep(3, 2, 1.0)), name="two", selection="most_similar"))
    return found


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
def test_everything_of_a_plan_is_read_back(tmp_path, plan):
    path = tmp_path / "p.json"
    path.write_text(plan_file_text(plan, "its base", "identity"), encoding="utf-8")
    found, about = read_plan(path, N)
    assert found.plan_id("x") == plan.plan_id("x") and found.kept == plan.kept and found.name == plan.name
    assert (found.steps, found.matrix_alphas, found.refit) == (plan.steps, plan.matrix_alphas, plan.refit)
    assert about["plan_id"] == plan.plan_id("identity") and about["base_model"] == "its base"


def test_an_alpha_file_is_read_as_ever_and_says_nothing_beside_its_steps(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(alpha_file_text(tail_plan(N, [0.3, 0.7], name="x", kind="fixed").steps))
    assert read_plan(path, N) == (read_alpha_file(path, N), None)


def test_a_plan_written_by_hand_has_the_published_options_where_it_gives_none(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"steps": [[10, 11, 1], [9, 10, 0.5]]}')
    found, about = read_plan(path, N)
    assert found == tail_plan(N, [1.0, 0.5], name="mine", kind="file") and list(about) == ["steps"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "fold"}, "unknown keys norm; a plan has name, selection, alignment"),
        ({"layers_before": 28}, "of a model of 28 layers, this one has 12: give its own base"),
        ({"norms": None}, "norms is None, but must be a text"),
        ({"name": 3}, "name is 3, but must be a text"),
        ({"steps": []}, "steps is .., but must be a list of .into, remove, alpha., and at least one"),
        ({"steps": [[1, 2]]}, "steps is ..1, 2.., but must be a list"),
        ({"steps": None}, "steps is None"),
        ({"steps": [[1.0, 2, 0.5]]}, "a step names layer 1.0, but must name whole numbers"),
        ({"steps": [[True, 2, 0.5]]}, "a step names layer True"),
        ({"steps": [[10, 11, "1"]]}, "an alpha is '1', but must be a number in .0, 1."),
        ({"steps": [[10, 11, True]]}, "an alpha is True"),
        ({"steps": [[10, 11, 10**400]]}, "an alpha is 1000.*, but must be"),
        ({"steps": [[10, 11, float("nan")]]}, "an alpha is nan"),
        ({"steps": [[10, 11, -0.1]]}, "an alpha is -0.1"),
        ({"steps": [[11, 12, 0.5]]}, "layer 12 .remove. does not exist, the model has 0 to 11"),
        ({"matrix_alphas": [1]}, "matrix_alphas is .1., but must have a list of alphas for each matrix"),
        ({"matrix_alphas": {"a": 1}}, "matrix_alphas is .*, but must have a list"),
        ({"matrix_alphas": {"a": [2]}}, "an alpha is 2"),
        ({"matrix_alphas": {"a": [1, 1, 1]}}, "3 alphas are given for a in a plan of 2 steps"),
        ({"refit": "linear"}, "refit is 'linear', but must have method, ridge, layers and calibration"),
        ({"refit": {"method": "linear", "rigde": 1}}, "refit is .*rigde.*, but must have method"),
        ({"refit": {"method": "other"}}, "refit is 'other', but must be one of linear"),
        ({"refit": {"method": "linear", "ridge": "x"}}, "refit is .*'x'.*, but must have"),
        ({"alignment": "neurons"}, "the plan is not that of its plan_id, .*: it was changed since; delete plan_id"),
        ({"steps": [[10, 11, 0.5], [9, 10, 0.25]]}, "the plan is not that of its plan_id"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, change, message):
    path = tmp_path / "p.json"
    fields = json.loads(plan_file_text(tail_plan(N, [0.5, 0.5], name="x", kind="fixed"), "base", "identity"))
    path.write_text(json.dumps(fields | change))
    with pytest.raises(PlanError, match=message) as caught:
        read_plan(path, N)
    assert str(caught.value).startswith(f"{path}") and len(str(caught.value)) < 500
    if "plan_id" in message:
        path.write_text(json.dumps({key: value for key, value in (fields | change).items() if key != "plan_id"}))
        assert read_plan(path, N)[0].plan_id("identity") != fields["plan_id"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "must hold a JSON list"),
        ("{", "is not a JSON plan or alpha file"),
        (None, "there is no plan or alpha file"),
    ],
)
def test_what_is_no_file_of_a_plan_is_refused(tmp_path, text, message):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_plan(path, N)
