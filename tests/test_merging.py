"""Merge and save: what lands in the folder, and what is refused."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import transformers.dynamic_module_utils
import yaml
from told import Told
from transformers import AutoModelForCausalLM

import raymerge.alignment
import raymerge.hub
import raymerge.merging
import raymerge.plan_source
from raymerge import cli
from raymerge.alpha_files import alpha_file_text, read_alpha_file
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.config_file import load_config
from raymerge.errors import UserError
from raymerge.heuristics import pair_alphas
from raymerge.merging import merge, save_merged
from raymerge.plan import MergePlan, MergeStep, PlanError, Refit, tail_plan
from raymerge.plan_files import plan_file_text
from raymerge.progress import Silent
from raymerge.prompts import encode_text
from raymerge.refit import RefitError
from raymerge.rows import coefficient_rows, plan_rows
from raymerge.tables import RunDirectory, conform


@pytest.fixture
def alphas(tmp_path):
    plan = tail_plan(Checkpoint("demo").n_layers, [0.7, 0.2, 0.55], name="three", kind="file")
    path = tmp_path / "three.json"
    path.write_text(alpha_file_text(plan.steps))
    return path


def test_an_alpha_file_that_lies_beside_the_record_of_another_model_is_said_to(tmp_path, alphas):
    told = Told()
    beside = tmp_path / "merge_plan.json"
    identity = Checkpoint("demo").identity
    for number, text in enumerate(("[]", json.dumps({"base_model": "demo", "base_model_identity": identity}))):
        beside.write_text(text)
        merge("demo", alphas, tmp_path / str(number), verify=False, progress=told)
    assert told.messages == []
    beside.write_text(json.dumps({"base_model": "/models/a", "base_model_identity": "0"}))
    merge("demo", alphas, tmp_path / "out", verify=False, progress=told)
    assert told.messages == [f"Warning: {alphas} was made for another model, /models/a."]


def test_the_alphas_of_a_saved_model_without_its_other_options_are_said_to_make_another(tmp_path):
    base = tiny.make_checkpoint(tmp_path / "base", "qwen2")
    checkpoint, options = Checkpoint(base), {"norms": "fold", "biases": "merge"}
    plan = tail_plan(checkpoint.n_layers, [0.7, 0.2], name="three", kind="found", **options)
    own = plan.with_alphas(plan.alphas, name="own", kind="found", matrix_alphas={"mlp.up_proj": [0.5, 0.5]})
    dropped = plan.with_alphas([1.0, 1.0], name="dropped", kind="drop")
    found = {}
    for saved in (plan, own, dropped):
        save_merged(checkpoint, saved, tmp_path / saved.name, verify=False)
        for number in range(3):
            told = Told()
            given = dict(list(options.items())[:number])
            out = tmp_path / f"{saved.name}-{number}"
            merge(base, tmp_path / saved.name / "alphas.json", out, verify=False, progress=told, **given)
            found.setdefault(saved.name, []).append([text.partition("alphas.json ")[2] for text in told.messages])

    def other(name, keys):
        beside = tmp_path / name / "merge_plan.json"
        said = f"has the steps of {beside}, a merge with other {keys}: this is another model"
        return f"{said}; --plan {beside} makes that one again."

    assert found == {
        "three": [[other("three", "norms, biases")], [other("three", "biases")], []],
        "own": [[other("own", f"{keys}matrix_alphas")] for keys in ("norms, biases, ", "biases, ", "")],
        "dropped": [[], [], []],
    }


@pytest.mark.parametrize("family", ["qwen2", "olmoe"])
def test_a_saved_model_is_made_again_from_its_record_and_a_plan_from_its_file(tmp_path, family):
    """With norms, biases, alignment and alphas of single matrices: of an alpha file it was another model."""
    base = tiny.make_checkpoint(tmp_path / "base", family)
    checkpoint = Checkpoint(base)
    options = {"norms": "fold", "biases": "merge", "alignment": "neurons"}
    plan = tail_plan(checkpoint.n_layers, [0.7, 0.2], name="one", kind="found", **options)
    plan = plan.with_alphas(plan.alphas, name="own", kind="found", matrix_alphas={"self_attn.q_proj": [0.5, 0.1]})
    first = save_merged(checkpoint, plan, tmp_path / "first", verify=False)
    (tmp_path / "own.json").write_text(plan_file_text(plan, checkpoint.public_name, checkpoint.identity))
    for number, file in enumerate([tmp_path / "first" / "merge_plan.json", tmp_path / "own.json"]):
        again = merge(base, file, tmp_path / str(number), verify=False)
        assert again["plan_id"] == first["plan_id"] and again["name"] == "own"
        ours, theirs = (Checkpoint(str(tmp_path / name)) for name in (str(number), "first"))
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert json.loads((tmp_path / str(number) / "merge_plan.json").read_text())["layers"] == json.loads(
            json.dumps(first["layers"])
        )


def test_options_beside_a_plan_file_are_those_that_it_leaves_open(tmp_path, alphas):
    checkpoint = Checkpoint("demo")
    plan = read_alpha_file(alphas, checkpoint.n_layers)

    def file(plan, name="p.json"):
        (tmp_path / name).write_text(plan_file_text(plan, "demo", checkpoint.identity))
        return tmp_path / name

    for option, other in (("norms", "fold"), ("biases", "merge"), ("alignment", "neurons")):
        with pytest.raises(PlanError, match=f"has a plan with its own {option}, .*: leave out --{option}"):
            merge("demo", file(plan), tmp_path / "out", **{option: other})
    (tmp_path / "a.txt").write_text("a text to fit on, " * 40)
    fit = {"refit": Refit("linear", ridge=0.1), "calibration": tmp_path / "a.txt"}
    with pytest.raises(PlanError, match="--calibration is of a refit, or of a block .*, but neither is asked for"):
        merge("demo", file(plan), tmp_path / "out", calibration=tmp_path / "a.txt")
    fitted = merge("demo", file(plan), tmp_path / "fitted", verify=False, **fit)
    record = tmp_path / "fitted" / "merge_plan.json"
    with pytest.raises(PlanError, match="its own refit, .*: leave out --refit"):
        merge("demo", record, tmp_path / "out", **fit)
    with pytest.raises(PlanError, match="a refit, .*, needs a plain text: give --calibration"):
        merge("demo", record, tmp_path / "out")

    told = Told()
    again = merge("demo", record, tmp_path / "again", verify=False, calibration=tmp_path / "a.txt", progress=told)
    assert again["plan_id"] == fitted["plan_id"] and not told.messages
    (tmp_path / "b.txt").write_text("another text to fit on, " * 40)
    other = merge("demo", record, tmp_path / "other", verify=False, calibration=tmp_path / "b.txt", progress=told)
    assert other["plan_id"] != fitted["plan_id"]
    assert told.messages == [f"Warning: {record} has a refit on other tokens than these of {tmp_path / 'b.txt'}."]
    assert not (tmp_path / "out").exists()


SECTIONS = {
    # fixed coefficients, by the published recurrence; dropping; a block that is given
    "tail": (["merges=3", "ratio=0.25", "norms=fold"], tail_plan(21, [0.25] * 3, name="f", kind="fixed", norms="fold")),
    "drop": (["merges=2", "ratio=1"], tail_plan(21, [1.0, 1.0], name="d", kind="fixed")),
    "block": (
        ["merges=2", "selection=block", "block=5", "survivor=after"],
        MergePlan(21, (MergeStep(6, 5, 0.6225), MergeStep(7, 6, 0.6225)), name="b", kind="fixed", selection="block"),
    ),
}


def section(*settings, text="demo"):
    return load_config(None, [*(f"plan.{setting}" for setting in settings), f"calibration.text={text}"]).plan


@pytest.mark.parametrize("name", SECTIONS)
def test_a_plan_section_is_merged_as_it_says(tmp_path, name):
    settings, plan = SECTIONS[name]
    found = merge("demo", section(*settings), tmp_path / "out", verify=False)
    assert found["plan_id"] == plan.plan_id(Checkpoint("demo").identity)


def test_options_come_before_those_of_a_section_whose_refit_has_its_ridge_and_layers(tmp_path):
    (tmp_path / "a.txt").write_text("a text to fit on, " * 40)
    given = section(
        "merges=2", "refit=outputs", "ridge=0.5", "refit_layers=1", "norms=fold", "selection=block", "block=4"
    )
    text = {"calibration": tmp_path / "a.txt", "verify": False}
    found = merge("demo", given, tmp_path / "own", **text)
    assert {**found["refit"], "calibration": ""} == {"method": "outputs", "ridge": 0.5, "layers": 1, "calibration": ""}
    assert found["norms"] == "fold"
    found = merge("demo", given, tmp_path / "other", norms="keep", refit=Refit("linear", ridge=0.1), **text)
    assert (found["norms"], found["refit"]["method"], found["refit"]["layers"]) == ("keep", "linear", 0)
    with pytest.raises(PlanError, match="needs a plain text: give --calibration"):
        merge("demo", given, tmp_path / "none")


@pytest.mark.parametrize("measure", ["cosine", "angular"])
def test_a_block_is_chosen_by_the_distances_of_states_on_the_calibration_text(tmp_path, measure):
    """Of whole transformers models, of layers before the last, whose outputs transformers normalises."""
    folder = tiny.make_checkpoint(tmp_path / "base", "llama", num_hidden_layers=8)
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 30)
    checkpoint, starts = Checkpoint(folder), [0, 1, 2, 3, 4]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = torch.zeros(len(starts), dtype=torch.float64)
    for shard in encode_text((tmp_path / "a.txt").read_text(), checkpoint.tokenizer):
        for group in shard.groups:
            for ids in group.sequences:
                with torch.no_grad():
                    states = model(torch.tensor(ids)[None], output_hidden_states=True).hidden_states
                for number, first in enumerate(starts):
                    cosine = torch.cosine_similarity(states[first].double(), states[first + 2].double(), dim=-1)
                    total[number] += (1 - cosine if measure == "cosine" else cosine.clamp(-1, 1).acos()).sum()
    told = Told()
    settings = ["merges=2", "ratio=1", "selection=block", f"block={measure}", f"starts={starts}"]
    found = merge(
        folder, section(*settings), tmp_path / "out", calibration=tmp_path / "a.txt", verify=False, progress=told
    )
    first = starts[int(total.argmin())]
    assert sorted(step[1] for step in found["steps"]) == [first, first + 1]
    assert told.messages == [f"Block to remove, chosen by {measure}: layers {first} to {first + 1}"]


def test_cosines_and_angles_of_all_shards_choose_each_their_own_block(tmp_path, monkeypatch):
    """Angles are the square roots of small cosines, so that one large step counts for less: they may disagree."""

    def distances(_, shard):
        cosine, angular = np.full((22, 22), 9.0), np.full((22, 22), 9.0)
        cosine[4, 6], angular[11, 13] = 2.0, 1.0
        cosine[6, 8] = 9.0 if seen else 1.0  # the best by the first shard alone
        seen.append(shard)
        return cosine, angular, 10

    (tmp_path / "a.txt").write_text("a text of more tokens than a shard has, " * 1500)
    found, text = {}, {"calibration": tmp_path / "a.txt", "verify": False}
    monkeypatch.setattr(raymerge.plan_source, "state_distances", distances)
    for measure in ("cosine", "angular"):
        seen = []
        settings = ["merges=2", "ratio=1", "selection=block", f"block={measure}"]
        record = merge("demo", section(*settings), tmp_path / measure, **text)
        found[measure] = sorted(step[1] for step in record["steps"])
        assert len(seen) == 3
    assert found == {"cosine": [4, 5], "angular": [11, 12]}


def test_calibration_windows_are_those_of_a_run_no_longer_than_the_model_s_context(tmp_path, monkeypatch):
    """Else a block could be another than a sweep chooses on the same text, by states that no model was trained for."""
    folder = tiny.make_checkpoint(tmp_path / "base", "llama", max_position_embeddings=64)
    seen, run_layers = [], raymerge.plan_source.state_distances

    def distances(runner, shard):
        seen.extend(len(group.prefix) + len(ids) for group in shard.groups for ids in group.sequences)
        return run_layers(runner, shard)

    monkeypatch.setattr(raymerge.plan_source, "state_distances", distances)
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 100)
    settings = ["merges=1", "ratio=1", "selection=block"]
    merge(folder, section(*settings), tmp_path / "out", calibration=tmp_path / "a.txt", verify=False)
    assert max(seen) == 64


def test_an_alpha_file_is_warned_of_whether_it_is_named_by_a_section_or_alone(tmp_path):
    base = tiny.make_checkpoint(tmp_path / "base", "llama")
    plan = tail_plan(5, [0.7, 0.2], name="folded", kind="found", norms="fold")
    save_merged(Checkpoint(base), plan, tmp_path / "saved", verify=False)
    file, by_section, alone = tmp_path / "saved" / "alphas.json", Told(), Told()
    given = section("merges=2", "base=file", f"alpha_file={file}")
    merge(base, given, tmp_path / "section", verify=False, progress=by_section)
    merge(base, file, tmp_path / "alone", verify=False, progress=alone)
    assert by_section.messages == alone.messages and "a merge with other norms" in alone.messages[0]
    same = section("merges=2", "base=file", f"alpha_file={file}", "norms=fold")
    merge(base, same, tmp_path / "same", verify=False, progress=(told := Told()))
    assert not told.messages


def test_a_similarity_run_gives_coefficients_and_blocks_and_is_warned_of(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, "similarity")
    values = np.full((21, 21), 0.5)
    np.fill_diagonal(values, 2.0)
    values[18, 20] = values[20, 18] = 1.5
    values[10, 12] = values[12, 10] = 1.9
    names = {"subset": "a", "language": "en", "n_samples": 3, "measure": "npib", "embedding": "pca"}
    pairs = [{"layer_i": i, "layer_j": j, "value": values[i, j]} for i in range(21) for j in range(21)]
    run.append("similarity", [names | pair for pair in pairs])
    run.write_manifest(model={"path": "theirs", "identity": "0"})
    told, by = Told(), [f"similarity_run={tmp_path / 'run'}"]
    settings = ["merges=2", "selection=block", "block=similarity", "ratio=1", *by]
    found = merge("demo", section(*settings), tmp_path / "block", verify=False, progress=told)
    assert sorted(step[1] for step in found["steps"]) == [11, 12]  # between what leaves layers 10 and 12
    assert told.messages == [
        f"Warning: {tmp_path / 'run'} is a similarity run of another model, theirs.",
        "Block to remove, chosen by similarity: layers 11 to 12",
    ]
    found = merge("demo", section("merges=1", "base=similarity", *by), tmp_path / "base", verify=False)
    expected = pair_alphas([(19, 20)], "similarity", ratio=None, similarity=values)
    assert [step[2] for step in found["steps"]] == expected


def test_layers_of_other_attention_are_left_out_of_blocks_that_are_averaged(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "base", "gemma2")
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 30)
    text = {"calibration": tmp_path / "a.txt", "verify": False}
    with pytest.raises(PlanError, match="in a row of this model have the same attention"):
        merge(folder, section("merges=3", "selection=block"), tmp_path / "averaged", **text)
    two = merge(folder, section("merges=2", "selection=block"), tmp_path / "two", **text)
    assert sorted(step[1] for step in two["steps"]) == [3, 4]
    assert merge(folder, section("merges=3", "ratio=1", "selection=block"), tmp_path / "dropped", **text)


@pytest.mark.parametrize(
    "settings, text, said",
    [
        (["merges=4", "selection=block"], None, "choice of the block by distances, needs a plain text: give --calib"),
        (
            ["merges=4", "selection=block", "block=loss"],
            "demo",
            "plan.block is loss, which only a run's workers can do",
        ),
        (
            ["merges=4", "selection=block", "block=search"],
            "demo",
            "set plan.block to a layer's number, similarity, cos",
        ),
        (["merges=4"], "demo", "--calibration is of a refit, or of a block chosen by .*, but neither is asked for"),
        (["merges=21"], None, "cannot merge 21 layers of a model that has 21"),
        (
            ["merges=4", "base=file", "alpha_file={}"],
            None,
            "three has 3 steps and is not a tail merge of plan.merges = 4",
        ),
        (["merges=4", "selection=block", "alignment=rows"], "demo", "alignment rows"),
        (["merges=4", "selection=block", "alignment=activations"], "demo", "activations needs the prompts of a run"),
        (["merges=4", "refit=outputs", "alignment=activations"], "demo", "or use alignment neurons"),
        (["merges=4", "refit=linear", "refit_layers=2"], "demo", "linear is of a seam alone, but 2 layers after it"),
    ],
)
def test_sections_that_a_merge_cannot_carry_out_are_refused_before_anything_is_measured(
    tmp_path, alphas, monkeypatch, settings, text, said
):
    monkeypatch.setattr(raymerge.plan_source, "state_distances", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(raymerge.merging.Refitter, "fit", lambda *_: pytest.fail("fitted"))
    base = "demo" if "alignment=rows" not in settings else tiny.make_checkpoint(tmp_path / "base", "mixtral")
    settings = [setting.format(alphas) for setting in settings]
    with pytest.raises(UserError, match=said):
        merge(base, section(*settings), tmp_path / "out", calibration=text)
    assert not (tmp_path / "out").exists()


def test_a_plan_file_of_another_base_is_said_to_be_so(tmp_path, alphas):
    told, plan = Told(), read_alpha_file(alphas, Checkpoint("demo").n_layers)
    (tmp_path / "p.json").write_text(plan_file_text(plan, "theirs", "0123456789abcdef"))
    merge("demo", tmp_path / "p.json", tmp_path / "out", verify=False, progress=told)
    assert told.messages == [f"Warning: {tmp_path / 'p.json'} was made for another model, theirs."]


def test_a_refit_of_other_layers_or_another_ridge_is_said_to_be_another_merge(tmp_path, alphas):
    class Told(Silent):
        def message(self, text):
            told.append(" a merge with other refit: " in text)

    (tmp_path / "a.txt").write_text("a text to fit on, " * 40)
    refit, found = Refit("outputs", ridge=0.1, layers=1), []
    text = {"calibration": tmp_path / "a.txt", "verify": False}
    merge("demo", alphas, tmp_path / "saved", refit=refit, **text)
    for number, other in enumerate((refit, replace(refit, layers=0), replace(refit, ridge=None), Refit("linear"))):
        told = []
        merge("demo", tmp_path / "saved/alphas.json", tmp_path / str(number), refit=other, progress=Told(), **text)
        found.append(told)
    told = []
    merge("demo", tmp_path / "saved/alphas.json", tmp_path / "none", verify=False, progress=Told())
    assert [*found, told] == [[], *4 * [[True]]]


def test_a_refit_has_a_stage_of_its_own(tmp_path, alphas):
    """It runs the calibration text through the model: the longest part, that was told as receipts before."""

    class Told(Silent):
        stages = []

        def stage(self, name, total):
            self.stages.append(name)

    (tmp_path / "a.txt").write_text("a text to fit on, " * 40)
    options = {"refit": Refit("linear", ridge=0.1), "calibration": tmp_path / "a.txt"}
    merge("demo", alphas, tmp_path / "out", verify=False, progress=Told(), **options)
    assert Told.stages[:2] == ["refit (linear) on the calibration tokens", "receipts of the merge"]
    card = (tmp_path / "out" / "README.md").read_text()  # it gave the coefficients alone
    assert ", refit linear)." in card and "fitted to the unmerged model on calibration tokens (linear)" in card


def test_only_a_refit_needs_a_temporary_folder_and_says_so(tmp_path, alphas, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    (tmp_path / "a.txt").write_text("a text to fit on, " * 40)
    options = {"refit": Refit("linear", ridge=0.1), "calibration": tmp_path / "a.txt"}
    with pytest.raises(UserError, match="no temporary folder can be made: .*set TMPDIR"):
        merge("demo", alphas, tmp_path / "out", verify=False, **options)
    assert merge("demo", alphas, tmp_path / "out", verify=False)["layers_after"] < 21
    assert merge("demo", alphas, tmp_path / "fit", verify=False, cache_folder=tmp_path / "cache", **options)


def test_the_record_and_the_alpha_file_say_what_was_done(tmp_path, alphas):
    base = Checkpoint("demo")
    done = merge("demo", alphas, tmp_path / "out", verify=False, command=["raymerge", "merge", "demo", "--out", "a b"])
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
    assert record["command"] == ["raymerge", "merge", "demo", "--out", "a b"] and record["proof"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "```\nraymerge merge demo --out 'a b'\n```" in card and "# demo, 3 layers merged away" in card
    assert "| 1 | 18 | 19 | 0.200000 |" in card
    assert "was not measured here" in card and "was not reloaded" in card and "refit" not in card


@pytest.mark.parametrize(
    ("card", "terms"),
    [
        ("---\nlicense: other\nlicense_name: x-1\nlicense_link: LICENSE\nlanguage: [en]\n---\n# x\n---\n", "other"),
        ("---\r\nlicense: other\r\nlicense_name: x-1\r\nlicense_link: LICENSE\r\n---\r\n", "other"),
        ("# no front matter\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nmit\n---\n", None),
        (None, None),
    ],
)
def test_the_card_names_the_base_and_keeps_its_licence(tmp_path, monkeypatch, card, terms):
    folder = tiny.make_checkpoint(tmp_path / "base")
    if card is not None:
        (folder / "README.md").write_bytes(card.encode())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    expected = {"library_name": "transformers", "tags": ["layer-merging", "raymerge"]}
    if terms is not None:
        expected |= {"license": terms, "license_name": "x-1", "license_link": "LICENSE"}
    base = {"base_model": "owner/name", "base_model_relation": "merge"}
    for model, further in ((str(folder), {}), ("owner/name", base)):
        out = tmp_path / f"merged-{len(further)}"
        save_merged(Checkpoint(model), tail_plan(5, [0.4], name="x", kind="found"), out, verify=False)
        _, front, text = (out / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front) == expected | further
        assert text.startswith(f"# {model.rpartition('/')[2]}, 1 layer merged away")


def test_no_file_of_a_saved_model_says_where_on_this_machine_anything_lay(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "secret" / "mine")
    for name, further in (
        ("config.json", {"_name_or_path": f"{folder}"}),
        (
            "tokenizer_config.json",
            {
                "name_or_path": f"{folder}",
                "special_tokens_map_file": f"{folder}/x.json",
                "tokenizer_file": f"{folder}/tokenizer.json",
            },
        ),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | further))
    given = tmp_path / "secret" / "alphas.json"
    given.write_text(alpha_file_text(tail_plan(5, [0.4], name="x", kind="file").steps))
    command = ["raymerge", "merge", str(folder), "--alphas", str(given), "--set", f"a.b=[{given}, {folder}]"]
    done = merge(str(folder), given, tmp_path / "out", verify=False, command=command)
    assert done["folder"] == str(tmp_path / "out")  # what the caller is told is whole
    for file in (tmp_path / "out").rglob("*"):
        assert b"secret" not in file.read_bytes() and str(tmp_path).encode() not in file.read_bytes(), file
    record = json.loads((tmp_path / "out" / "merge_plan.json").read_text())
    assert record["base_model"] == "mine" and record["base_model_revision"] is None
    assert record["command"] == [*command[:2], "mine", "--alphas", "alphas.json", "--set", "a.b=[alphas.json, mine]"]


def test_a_folder_of_the_hub_s_cache_is_the_hub_s_model(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tiny.make_checkpoint(tmp_path / "models--owner--name" / "snapshots" / commit)
    (tmp_path / "link").symlink_to(folder)
    for number, model in enumerate((folder, tmp_path / "link")):
        out = tmp_path / f"merged-{number}"
        save_merged(Checkpoint(str(model)), tail_plan(5, [0.4], name="x", kind="found"), out, verify=False)
        _, front, text = (out / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front)["base_model"] == "owner/name" and text.startswith("# name, 1 layer merged away")
        record = json.loads((out / "merge_plan.json").read_text())
        assert (record["base_model"], record["base_model_revision"]) == ("owner/name", commit)
        assert f"hf download owner/name --revision {commit}" in (out / "mergekit.yaml").read_text()
    tiny.make_checkpoint(tmp_path / "models--owner--name" / "mine")  # not a snapshot of it
    assert Checkpoint(str(tmp_path / "models--owner--name" / "mine")).hub_id is None


@pytest.mark.parametrize(("alignment", "norms"), [("neurons", "fold"), ("rows", "keep"), ("none", "fold")])
def test_a_plan_s_alignment_and_norms_are_what_is_saved(tmp_path, alphas, monkeypatch, alignment, norms):
    base = Checkpoint("demo")
    calls = []
    for name in ("align_pair", "match_rows"):
        original = getattr(raymerge.alignment, name)
        monkeypatch.setattr(raymerge.alignment, name, lambda *a, f=original, **k: calls.append(1) or f(*a, **k))
    done = merge(
        "demo",
        alphas,
        tmp_path / "out",
        alignment=alignment,
        norms=norms,
        biases="merge",
        cache_folder=tmp_path / "c",
        verify=False,
    )
    # Receipts and weights are two passes, but nothing is matched twice.
    assert len(calls) == {"neurons": 3, "rows": 3 * 7, "none": 0}[alignment]
    assert (tmp_path / "c").exists() == (alignment == "neurons")
    plan = read_alpha_file(alphas, base.n_layers)
    plan = replace(plan, alignment=alignment, norms=norms, biases="merge")
    assert done["plan_id"] == plan.plan_id(base.identity) and done["norms"] == norms and done["alignment"] == alignment
    assert f"norms {norms}, biases merge, alignment {alignment}" in (tmp_path / "out" / "README.md").read_text()
    merged, expected = Checkpoint(str(tmp_path / "out")), tiny.fuse_state_dict(base, base.architecture, plan)
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    changed = [row["tensor"] for row in done["receipts"] if row["max_abs_change"] > 0]
    assert len(changed) == (9 if norms == "fold" else 7)
    calls.clear()
    save_merged(base, plan, tmp_path / "again", verify=False)
    assert len(calls) == {"neurons": 3, "rows": 3 * 7, "none": 0}[alignment]


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    pass
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_repository_s_own_code_runs_only_where_it_is_trusted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, marker = tiny.make_checkpoint(tmp_path / "base"), tmp_path / "marker"
    values = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": own}))
    (folder / "own_code.py").write_text(OWN_CODE.format(marker=str(marker)))
    (tmp_path / "a.json").write_text(alpha_file_text(tail_plan(5, [0.4], name="x", kind="file").steps))
    merge(str(folder), tmp_path / "a.json", tmp_path / "by_default", verify=False)
    assert not marker.exists()
    command = ["merge", str(folder), "--alphas", str(tmp_path / "a.json"), "--no-verify", "--out"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0 and not marker.exists()
    assert cli.main([*command, str(tmp_path / "trusted"), "--trust-remote-code"]) == 0 and marker.exists()
    capsys.readouterr()


def test_by_default_a_model_is_proved_and_pushed_private(tmp_path, alphas, monkeypatch):
    done, figures = [], dict.fromkeys(("max_difference", "tolerance", "largest_logit"), 0.0)
    counts = dict.fromkeys(("positions", "predictions_equal", "generated_tokens"), 1)
    proof = {"passed": True, "finished": True, "error": None} | figures | counts
    monkeypatch.setattr(raymerge.merging, "prove", lambda *_, **__: done.append("proved") or proof)
    monkeypatch.setattr(raymerge.hub, "check_push", lambda *_, private: done.append(f"asked, private: {private}"))
    monkeypatch.setattr(raymerge.hub, "push", lambda *_, private: done.append(f"pushed, private: {private}"))
    assert merge("demo", alphas, tmp_path / "out", push="me/x")["proof"] == proof
    assert done == ["asked, private: True", "proved", "pushed, private: True"]


def test_a_refit_of_a_family_for_which_it_does_not_hold_leaves_nothing_behind(tmp_path):
    folder, text = tiny.make_checkpoint(tmp_path / "base", "gemma2"), tmp_path / "text"
    (tmp_path / "a.json").write_text(alpha_file_text(tail_plan(5, [0.4], name="x", kind="file").steps))
    text.write_text("The cat sat on the mat. " * 20)
    with pytest.raises(RefitError, match="refit linear needs layers in which .* write straight into the residual"):
        merge(str(folder), tmp_path / "a.json", tmp_path / "out", refit=Refit("linear"), calibration=text)
    assert not (tmp_path / "out").exists()


def test_what_is_no_plan_is_refused_with_what_is_one(tmp_path):
    for source, said in (
        (load_config(), "not by a Config: .*, such as config.plan"),
        ([0.5], "not by a list: give one"),
    ):
        with pytest.raises(PlanError, match=said):
            merge("demo", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_alignment_is_refused(tmp_path, alphas):
    with pytest.raises(PlanError, match="alignment is 'columns'"):
        merge("demo", alphas, tmp_path / "out", alignment="columns")
    assert not (tmp_path / "out").exists()


def test_where_a_merge_cannot_be_written_is_told_before_the_model_is_read(tmp_path, monkeypatch):
    """Digests and receipts of a large model take minutes."""
    monkeypatch.setattr(raymerge.merging, "Checkpoint", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write .*file/merged"):
        merge("demo", tmp_path / "a.json", tmp_path / "file" / "merged")


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path, alphas):
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError, match="exists already"):
        merge("demo", alphas, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_saved_is_refused_before_what_takes_minutes(tmp_path, alphas, monkeypatch):
    text = {"calibration": "demo", "refit": Refit("linear", ridge=0.1)}
    fit = raymerge.merging.Refitter.fit

    def late(*_, **__):
        pytest.fail("fitted, or compared")

    def ended(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(raymerge.merging.Refitter, "fit", late)
    monkeypatch.setattr(raymerge.merging, "receipts", late)
    with monkeypatch.context() as full:
        full.setattr(raymerge.saving, "free_bytes", lambda folder: 3_000_000)
        for given in (text, {}):
            with pytest.raises(CheckpointError, match="could not write .*out: No space left on device. Its weights"):
                merge("demo", alphas, tmp_path / "out", **given)
        (left := tmp_path / "_tmp.out").mkdir()  # of a killed call, which has room when it is gone
        (left / "model.safetensors").write_bytes(bytes(4_000_000))
        with pytest.raises(pytest.fail.Exception, match="fitted, or compared"):
            merge("demo", alphas, tmp_path / "out")
        assert list(left.iterdir())  # or of another process, which may be done by then
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as cut:
        cut.setattr(raymerge.merging.Refitter, "fit", fit)
        cut.setattr(raymerge.merging, "receipts", lambda *_, **__: [])
        cut.setattr(raymerge.merging, "prove", ended)
        with pytest.raises(KeyboardInterrupt):
            merge("demo", alphas, tmp_path / "out", **text)
    with pytest.raises(PlanError, match="exists already, of another merge"):
        merge("demo", alphas, tmp_path / "out", **text | {"refit": Refit("linear", ridge=0.2)})


def test_a_merge_that_was_ended_during_its_proof_goes_on_with_it(tmp_path, alphas, monkeypatch):
    """Saving a large model takes minutes; a model that failed its proof, or another plan's, is still refused."""

    def ended(*_, **__):
        raise KeyboardInterrupt

    out, prove = tmp_path / "out", raymerge.merging.prove
    monkeypatch.setattr(raymerge.merging, "prove", ended)
    with pytest.raises(KeyboardInterrupt):
        merge("demo", alphas, out)
    saved = (out / "model.safetensors").stat()
    (out / "_tmp.0.README.md").write_text("killed while the proof was written down")
    monkeypatch.setattr(raymerge.merging, "prove", prove)
    monkeypatch.setattr(raymerge.merging, "save_checkpoint", lambda *_, **__: pytest.fail("saved again"))
    with pytest.raises(PlanError, match="exists already, of another merge"):
        merge("demo", alphas, out, alignment="neurons")
    done = merge("demo", alphas, out)
    assert done["proof"]["passed"] and done["bytes"] == saved.st_size and done["folder"] == str(out)
    assert json.loads((out / "merge_plan.json").read_text())["proof"]["passed"]
    assert (out / "model.safetensors").stat().st_mtime_ns == saved.st_mtime_ns
    assert not list(out.glob("_tmp.*"))
    with pytest.raises(PlanError, match="exists already: give another"):
        merge("demo", alphas, out)


def test_paths_may_begin_at_the_home_folder(tmp_path, alphas, monkeypatch):
    """`--out=~/merged` comes from a shell as it was typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["merge", "demo", f"--alphas=~/{alphas.name}", "--out=~/merged", "--no-verify"]) == 0
    assert (tmp_path / "merged" / "config.json").exists() and not (tmp_path / "~").exists()


def test_a_plan_for_another_depth_leaves_nothing_behind(tmp_path):
    deeper = tail_plan(40, [0.5, 0.5], name="deeper", kind="file")
    (tmp_path / "deeper.json").write_text(alpha_file_text(deeper.steps))
    with pytest.raises(PlanError, match="does not exist, the model has 0 to"):
        merge("demo", tmp_path / "deeper.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_alphas_of_single_matrices_are_recorded(tmp_path):
    base = Checkpoint("demo")
    plan = tail_plan(base.n_layers, [0.7, 0.2], name="own", kind="found")
    plan = replace(plan, matrix_alphas=(("mlp.up_proj", (0.5, 0.5)),))
    save_merged(base, plan, tmp_path / "out", verify=False, results=["It reaches 3."])
    record = json.loads((tmp_path / "out" / "merge_plan.json").read_text())
    assert record["plan_id"] == plan.plan_id(base.identity)
    assert record["matrix_alphas"] == {"mlp.up_proj": [0.5, 0.5]}
    merged = record["layers"][-1]
    assert list(merged["matrices"]["mlp.up_proj"].values()) == [0.5, 0.25, 0.25]
    np.testing.assert_allclose(list(merged["coefficients"].values()), [0.2, 0.56, 0.24])
    assert all("matrices" not in layer for layer in record["layers"][:-1])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`alphas.json` cannot hold them" in card
    assert "## Results\n\nIt reaches 3.\n" in card and "was not measured" not in card
    saved, expected = Checkpoint(str(tmp_path / "out")), tiny.fuse_state_dict(base, base.architecture, plan)
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())

    stored = conform("plans", plan_rows(plan, "p"), "run").to_pylist()
    assert [(row["matrix"], row["step"], row["alpha"]) for row in stored] == [
        (None, 0, 0.7),
        (None, 1, 0.2),
        ("mlp.up_proj", 0, 0.5),
        ("mlp.up_proj", 1, 0.5),
    ]
    stored = conform("coefficients", coefficient_rows(plan, "p"), "run").to_pylist()
    own = [row for row in stored if row["matrix"] == "mlp.up_proj"]
    assert [(row["source_layer"], row["coefficient"]) for row in own] == [
        (base.n_layers - 3, 0.5),
        (base.n_layers - 2, 0.25),
        (base.n_layers - 1, 0.25),
    ]
    assert {row["kept_layer"] for row in own} == {base.n_layers - 3}
    assert len(stored) == len(own) + base.n_layers - 3 + 3


# -- round trip ------------------------------------------------------------------------------------------------------

RELOAD = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    # transformers before 5.22 loads Gemma 2 with SDPA, which leaves its softcap out; later ones with eager attention.
    attention = {"attn_implementation": "eager"} if "gemma2" in folder or "vault" in folder else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **attention).eval()
    ids = torch.from_numpy(np.load(folder + "/ids.npy"))[None]
    with torch.no_grad():
        found[folder] = model(input_ids=ids).logits[0].numpy()
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1)
    found[folder + "/tokens"] = out[0, ids.shape[1]:].numpy()
np.savez(sys.argv[1], **found)
"""


def test_every_family_comes_back_in_a_new_process(tmp_path):
    """Merge, save, from_pretrained, logits and generate, with prompts longer than any window; and the config.

    The reference merges and computes by itself, in float64 (tiny.py).
    """
    first = {tiny.FAMILIES[name]["model_type"]: name for name in reversed(tiny.FAMILIES)}
    families = dict(zip(first.values(), first.values(), strict=True))
    # Layers that take turns: 1 and 3 are averaged and 2, which lies between them, is dropped.
    turns = ["sliding_attention", "full_attention"]
    options = {"turns": {"layer_types": 2 * turns + turns[:1]}} | {name: {} for name in families}
    families["turns"] = "gemma3"
    folders, expected = [], {}
    for name, family in families.items():
        base = tiny.make_checkpoint(tmp_path / name, family, **options[name])
        steps = [(1, 2, 1.0), (1, 3, 0.3)] if name == "turns" else [(3, 4, 0.3), (2, 3, 0.8)]
        records = [
            {"step": n, "layer_to_merge_into": i, "layer_to_remove": r, "ratio_i_alpha": a}
            for n, (i, r, a) in enumerate(steps)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        out = tmp_path / f"{name}-merged"
        merge(str(base), tmp_path / f"{name}.json", out, verify=False)  # by RELOAD, and for each family in test_proof
        model = tiny.merged_model(AutoModelForCausalLM.from_pretrained(base, **tiny.PLAIN), steps)
        ids = np.random.default_rng(0).integers(5, 800, 90)
        np.save(out / "ids.npy", ids)
        tokens = ids.tolist()
        for _ in range(4):
            logits = tiny.plain_logits(model, tokens)
            tokens.append(int(logits[-1].argmax()))
        expected[str(out)] = logits[:90].numpy(), tokens[90:]
        folders.append(str(out))
        config, kept = Checkpoint(str(out)).config, [0, 1, 4] if name == "turns" else [0, 1, 2]
        before = Checkpoint(str(base))
        assert config.num_hidden_layers == 3 and Checkpoint(str(out)).windows == [before.windows[n] for n in kept]
        assert Checkpoint(str(out)).rotary_types == [before.rotary_types[n] for n in kept]
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "found.npz"), *folders], check=True)
    with np.load(tmp_path / "found.npz") as found:
        for folder, (logits, tokens) in expected.items():
            # Float32 against float64, as in test_scoring.
            assert np.abs(found[folder] - logits).max() < 2e-5 * np.abs(logits).max(), folder
            assert found[f"{folder}/tokens"].tolist() == tokens, folder


def test_a_refit_that_cannot_be_kept_names_the_folder_that_a_merge_has(tmp_path, alphas, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("raymerge.tensorfiles.save_file", full)
    (tmp_path / "a.txt").write_text("a text to fit on, " * 40)
    with pytest.raises(UserError, match="cannot be written: no space left; free space .*merge .*TMPDIR"):
        merge("demo", alphas, tmp_path / "out", refit=Refit("linear", ridge=0.1), calibration=tmp_path / "a.txt")
