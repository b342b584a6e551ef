"""The compression curve as a whole on the embedded model: every point once, the same figures by other ways."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import tiny
from local_pool import opened_locally

from raymerge import experiments, plan_section, summary
from raymerge.alpha_files import alpha_file_text
from raymerge.checkpoint import Checkpoint
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.context import ContextError
from raymerge.experiments import evaluate, import_similarity, planning, sweep
from raymerge.merging import merge
from raymerge.plan import PlanError, block_plan, drop_block_plan, tail_plan
from raymerge.plan_files import plan_file_text, read_plan
from raymerge.progress import Silent
from raymerge.report.build import run_sections
from raymerge.tables import RunDirectory

SETTINGS = [
    "data.subjects=country_capitals,colour_mixing",
    "data.report_limit_per_subject=6",
    "data.perplexity_tokens=300",
    "sweep.merges=[1, 6]",
    "sweep.methods=[drop, before_last, 'fixed:0.62']",
    "sweep.alignments=[none, neurons]",
    "sweep.norms=[keep, fold]",
    "sweep.distances=[16, 32]",
    "sweep.retrieval_prompts=2",
    "sweep.speed_tokens=2",
    "workers.count=1",  # each takes seconds to start
    "output.figures=false",
]
N_LAYERS = Checkpoint("demo").n_layers


def config(out, *more):
    return load_config(None, [*SETTINGS, f"output.run={out}", *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with opened_locally():
        return sweep(config(tmp_path_factory.mktemp("runs") / "sweep", "workers.count=2"), command=["test"])


def test_every_method_stands_at_every_number_of_merges(run):
    assert run.complete
    points = [(row["merges"], row["method"], row["alignment"], row["norms"]) for row in run.read("sweep").to_pylist()]
    expected = [(0, "base", "none", "keep")]
    for merges in (1, 6):
        expected += [(merges, method, "none", "keep") for method in ("drop", "before_last")]
        expected += [(merges, "fixed_0.62", a, n) for a in ("none", "neurons") for n in ("keep", "fold")]
    assert sorted(points) == sorted(expected)
    ids = run.read("sweep")["plan_id"].to_pylist()
    for table in ("accuracy", "perplexity", "costs", "context"):
        assert set(run.read(table)["plan_id"].to_pylist()) == set(ids), table
    costs = {row["plan_id"]: row for row in run.read("costs").to_pylist()}
    for row in run.read("sweep").to_pylist():
        assert costs[row["plan_id"]]["layers_removed"] == row["merges"]
        assert costs[row["plan_id"]]["tokens_per_second"] > 0
    header, cells = summary.sweep_table(run, "test")
    assert header[2:4] == ["alignment", "norms"] and "refit" not in header
    assert len(cells) == len(points) and len(cells[0]) == len(header)


def test_each_point_is_compared_with_dropping_and_with_itself_unaligned(run):
    points = {row["plan_id"]: row for row in run.read("sweep").to_pylist()}
    found = {
        (points[row["plan_a"]]["merges"], describe(points[row["plan_a"]]), describe(points[row["plan_b"]]))
        for row in run.read("comparisons").to_pylist()
    }
    for merges in (1, 6):
        assert (merges, "before_last", "drop") in found
        for variant in ("neurons keep", "neurons fold", "none fold"):
            assert (merges, f"fixed_0.62 {variant}", "drop") in found
            assert (merges, f"fixed_0.62 {variant}", "fixed_0.62 none keep") in found
    assert all(points[row["plan_a"]]["merges"] == points[row["plan_b"]]["merges"] for row in
               run.read("comparisons").to_pylist())  # fmt: skip


def describe(point):
    averages = point["method"].startswith("fixed")
    return f"{point['method']} {point['alignment']} {point['norms']}" if averages else point["method"]


@pytest.mark.parametrize("alignment, norms", [("none", "keep"), ("neurons", "fold")])
def test_a_point_is_what_the_saved_merge_evaluates_to(run, local_pools, tmp_path, alignment, norms):
    """Merged by the command line, saved, opened as any checkpoint and evaluated: the same logits and perplexity."""
    plan = tail_plan(N_LAYERS, [0.62] * 6, name="x", kind="fixed")
    (tmp_path / "alphas.json").write_text(alpha_file_text(plan.steps))
    options = {"alignment": alignment, "norms": norms, "verify": False}
    done = merge("demo", tmp_path / "alphas.json", tmp_path / "merged", **options)
    files = [read_plan(path, N_LAYERS) for path in sorted(Path(run.path_of("plans")).iterdir())]
    rows = run.read("sweep").to_pylist()
    assert sorted(about["plan_id"] for _, about in files) == sorted(row["plan_id"] for row in rows if row["merges"])
    (own,) = (plan for plan, about in files if about["plan_id"] == done["plan_id"])
    assert (own.alphas, own.alignment, own.norms) == (plan.alphas, alignment, norms)
    again = evaluate(config(tmp_path / "again", f"model.path={tmp_path / 'merged'}"), command=["test"])
    letters = [f"logit_{letter}" for letter in "abcd"]
    tables = []
    for source, plan_id in ((run, done["plan_id"]), (again, again.read("plans")["plan_id"][0].as_py())):
        answers = source.read("answers")
        answers = answers.filter(pc.equal(answers["plan_id"], plan_id)).sort_by("question_id")
        tables.append(np.stack([answers[name].to_numpy() for name in letters]))
    assert tables[0].shape == (4, 12)
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-4)
    perplexity = [
        next(row["perplexity"] for row in source.read("perplexity").to_pylist() if row["plan_id"] == plan_id)
        for source, plan_id in ((run, done["plan_id"]), (again, again.read("plans")["plan_id"][0].as_py()))
    ]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)


def test_a_plan_with_alphas_of_single_matrices_stands_in_a_sweep_as_it_is_merged(local_pools, tmp_path):
    own = {"norms": "fold", "matrix_alphas": (("mlp.up_proj", (0.1, 0.6)), ("self_attn.q_proj", (0.9, 0.2)))}
    plan = tail_plan(N_LAYERS, [0.7, 0.4], name="own", kind="found", **own)
    file = tmp_path / "own.json"
    file.write_text(plan_file_text(plan, "demo", Checkpoint("demo").identity))
    settings = [
        "sweep.methods=[drop, file]",
        "sweep.merges=[2]",
        f"sweep.alpha_files.own={file}",
        "sweep.context=false",
    ]
    run = sweep(config(tmp_path / "sweep", *settings, "sweep.speed_tokens=0"), command=["test"])
    done = merge("demo", file, tmp_path / "merged", verify=False)
    again = evaluate(config(tmp_path / "again", f"model.path={tmp_path / 'merged'}"), command=["test"])
    rows = {row["method"]: row for row in run.read("sweep").to_pylist()}
    assert rows["file_own"]["plan_id"] == done["plan_id"] and rows["file_own"]["norms"] == "fold"
    found = [
        np.sort(source.read("answers").filter(pc.equal(source.read("answers")["plan_id"], key))["logit_a"].to_numpy())
        for source, key in ((run, done["plan_id"]), (again, again.read("plans")["plan_id"][0].as_py()))
    ]
    np.testing.assert_allclose(*found, atol=1e-4)
    compared = [(row["plan_a"], row["plan_b"]) for row in run.read("comparisons").to_pylist()]
    assert (done["plan_id"], rows["drop"]["plan_id"]) in compared


def test_retrieval_that_no_prompt_has_room_for_is_refused_before_the_run_is_made(tmp_path):
    base = tiny.make_checkpoint(tmp_path / "base", "llama", max_position_embeddings=40)
    settings = [f"model.path={base}", "data.mmlu=null", "sweep.methods=[drop]", "sweep.merges=[1]"]
    with pytest.raises(ContextError, match="set sweep.context: false"):
        sweep(config(tmp_path / "sweep", *settings))
    assert not (tmp_path / "sweep").exists()


def test_plan_files_of_another_base_are_said_to_be_so_at_the_start_and_in_the_manifest(local_pools, tmp_path):
    """The files may be gone when the manifest is written, hours later."""

    class Told(Silent):
        def message(self, text):
            told.append(text)
            (tmp_path / "other.json").unlink(missing_ok=True)

    told, plan = [], tail_plan(N_LAYERS, [0.7], name="other", kind="found")
    (tmp_path / "other.json").write_text(plan_file_text(plan, "theirs", "0123456789abcdef"))
    (tmp_path / "own.json").write_text(plan_file_text(plan, "demo", Checkpoint("demo").identity))
    files = [f"sweep.alpha_files.{name}={tmp_path / name}.json" for name in ("other", "own")]
    settings = ["sweep.methods=[file]", "sweep.merges=[1]", *files, "sweep.context=false", "sweep.speed_tokens=0"]
    run = sweep(config(tmp_path / "sweep", *settings), command=["test"], progress=Told())
    warning = f"{tmp_path / 'other.json'} was made for another model, theirs"
    assert f"Warning: {warning}." in told
    assert run.manifest()["warnings"] == [warning]


def test_an_interrupted_sweep_goes_on_where_it_stopped(run, local_pools, tmp_path, monkeypatch):
    settings = config(tmp_path / "cut", "sweep.alignments=[none]", "sweep.norms=[keep]", "sweep.context=false")
    job = experiments.reporting._Job

    class Cut(Exception):
        pass

    original, stored = job.take, []

    def taken(self, result):
        if len(self.results) == len(self.items) - 1:
            stored.append((self.method, self.plan.name))
        original(self, result)

    def cut(self, result):
        if len(stored) == 5:
            raise Cut
        taken(self, result)

    monkeypatch.setattr(job, "take", cut)
    with pytest.raises(Cut):
        sweep(settings, command=["test"])
    before, stored[:] = list(stored), []
    monkeypatch.setattr(job, "take", taken)
    whole = sweep(settings, command=["test"])
    assert whole.complete and not {item for item in before if item[0] != "receipts"} & set(stored)
    rows = whole.read("answers", ["plan_id", "question_id"]).to_pylist()
    assert len(rows) == len({tuple(row.values()) for row in rows}) == 7 * 12


BLOCKS = [
    "sweep.methods=[drop, drop_block, merge_block]",
    "sweep.merges=[1, 6]",
    "sweep.alignments=[none]",
    "sweep.norms=[keep]",
    "sweep.context=false",
    "sweep.speed_tokens=0",
    "calibration.text=demo",
    "calibration.tokens=150",
    "data.subjects=country_capitals",
    "data.report_limit_per_subject=2",
    "data.perplexity_tokens=100",
]


def test_blocks_are_chosen_once_for_every_number_of_layers_and_stand_beside_the_tail(local_pools, tmp_path):
    """By loss, of few starts: the chosen one has the least, which is that of the calibration text without the block."""
    settings = config(tmp_path / "blocks", *BLOCKS, "plan.block=loss", "plan.survivor=after", "plan.starts=[3, 4, 9]")
    run = sweep(settings, command=["test"])
    rows, chosen = run.read("blocks").to_pylist(), {}
    for merges in (1, 6):
        scores = {row["first"]: row["score"] for row in rows if row["merges"] == merges}
        assert sorted(scores) == [3, 4, 9] and {row["measure"] for row in rows} == {"loss"}
        (chosen[merges],) = (row["first"] for row in rows if row["merges"] == merges and row["chosen"])
        assert scores[chosen[merges]] == min(scores.values())
    assert all(row["tokens"] == 149 and row["last"] == row["first"] + row["merges"] - 1 for row in rows)
    # The reported text is the 100 tokens before those, of one kind: the order of dropped blocks is the same.
    names = {row["plan_id"]: row["name"] for row in run.read("plans").to_pylist()}
    perplexity = {names[row["plan_id"]]: row["perplexity"] for row in run.read("perplexity").to_pylist()}
    identity = Checkpoint("demo").identity
    for merges, first in chosen.items():
        drop = drop_block_plan(N_LAYERS, first, merges)
        assert names[drop.plan_id(identity)] == f"drop_block_k{merges}"
        merged = block_plan(N_LAYERS, first, [0.6225] * merges, name="x", kind="file", survivor="after")
        assert names[merged.plan_id(identity)] == f"merge_block_k{merges}"
    assert perplexity["drop_block_k6"] < perplexity["drop_k6"]
    compared = {(names[row["plan_a"]], names[row["plan_b"]]) for row in run.read("comparisons").to_pylist()}
    assert {
        ("merge_block_k6", "drop_block_k6"),
        ("merge_block_k6", "drop_k6"),
        ("drop_block_k1", "drop_k1"),
    } <= compared
    caption, header, cells = summary.block_table(run)
    assert "nats per token of the calibration text" in caption and "distance" not in caption and len(cells) == 2
    shown = dict(zip(header, cells[1], strict=True))
    scores = {row["first"]: row["score"] for row in rows if row["merges"] == 6}
    second = min((first for first in scores if first != chosen[6]), key=scores.get)
    deepest = 9
    assert (
        shown["layers"] == "6" and shown["removed"] == f"{chosen[6]}-{chosen[6] + 5}" and shown["chosen by"] == "loss"
    )
    assert shown["next best"].startswith(f"{second}-{second + 5} ({scores[second]:.4g})")
    assert shown["deepest"] == f"{deepest}-{deepest + 5} ({scores[deepest]:.4g})"

    # What is in the table is not measured again, as when a run that was cut short goes on.
    again = planning.choose_blocks(settings, Checkpoint("demo"), [1, 6], run, str(tmp_path), None, Silent())
    assert again == chosen


def test_a_block_that_is_given_or_similar_needs_no_model(tmp_path):
    depths = np.arange(N_LAYERS, dtype=float)
    depths[8:] -= 1.9
    depths[10:] -= 0.1  # between the outputs of layers 7 and 10 least happens: the block of layers 8 to 10
    matrix = np.exp(-np.abs(depths[:, None] - depths[None]))
    for more, measure, first in (
        (["plan.block=5"], "given", 5),
        (["plan.block=similarity", "plan.similarity_run=x"], "similarity", 8),
        (["plan.block=similarity", "plan.similarity_run=x", "plan.starts=[2, 9, 12]"], "similarity", 9),
    ):
        run = RunDirectory.open(tmp_path / f"{first}", {}, "search")
        settings = config(tmp_path, *more)
        similar = plan_section.Similarity(matrix, None)
        assert planning.choose_blocks(settings, Checkpoint("demo"), [3], run, "", similar, Silent()) == {3: first}
        (row,) = (row for row in run.read("blocks").to_pylist() if row["chosen"])
        assert (row["measure"], row["first"], row["last"]) == (measure, first, first + 2)
        caption, _, (shown,) = summary.block_table(run)
        assert shown[2] == measure and (shown[3] == "–") == ("distance" not in caption) == (measure == "given")
    with pytest.raises(PlanError, match=r"must begin with one of layers 1 to 18 .* plan.starts allow \[19\]"):
        plan_section.allowed_starts(config(tmp_path, "plan.block=19").plan, N_LAYERS, 3)
    # Into the layer after it a block may begin with layer 0, of which a similarity run has no input.
    after, alike = ["plan.survivor=after"], ["plan.block=similarity", "plan.similarity_run=x"]
    assert plan_section.allowed_starts(config(tmp_path, *after).plan, N_LAYERS, 3)[:2] == [0, 1]
    assert plan_section.allowed_starts(config(tmp_path, *after, *alike).plan, N_LAYERS, 3)[:2] == [1, 2]
    settings, other = (
        config(tmp_path, *after, *alike, "plan.starts=[0, 2]"),
        RunDirectory.open(tmp_path / "other", {}, "search"),
    )
    with pytest.raises(PlanError, match=r"layers \[0\] on have no finite score: set plan.starts"):
        planning.choose_blocks(settings, Checkpoint("demo"), [3], other, "", similar, Silent())


def test_plain_text_alone_judges_every_point_where_no_questions_are_asked(run, local_pools, tmp_path):
    """The same perplexities as beside questions, comparisons of passages, and a summary and a page without accuracy."""
    more = ["data.mmlu=null", "sweep.alignments=[none]", "sweep.norms=[keep]", "sweep.context=false"]
    found = sweep(config(tmp_path / "text", *more, "output.figures=true"), command=["test"])
    assert found.complete
    for table in ("answers", "accuracy"):
        assert not found.has(table)
    beside = {row["plan_id"]: row["perplexity"] for row in run.read("perplexity").to_pylist()}
    alone = {row["plan_id"]: row["perplexity"] for row in found.read("perplexity").to_pylist()}
    assert len(alone) == 7 and alone == pytest.approx({plan: beside[plan] for plan in alone}, rel=1e-5)
    compared = found.read("comparisons").to_pylist()
    assert {row["measure"] for row in compared} == {"text_nll"} and len(compared) == 21

    header, cells = summary.sweep_table(found, "test")
    assert header == ["merged", "method", "text ppl [95 %]"] and len(cells) == 7  # nothing else differs
    (section,) = (each for each in run_sections(found, heading=None) if each.title == "The answer")
    by_kind = {block.kind: block for block in section.blocks}
    assert by_kind["text"].text.startswith("The unmerged model's perplexity on plain text is 3.")
    assert "accura" not in str(section.blocks).lower()
    best = next(block for block in section.blocks if block.kind == "table")
    assert best.header[2] == "way of lowest perplexity" and [row[0] for row in best.cells] == ["1", "6"]
    names = {row["plan_id"]: row["name"] for row in found.read("plans").to_pylist()}
    for row, merges in zip(best.cells, (1, 6), strict=True):
        least = min((name for name in names if names[name].endswith(f"_k{merges}")), key=alone.get)
        assert names[least] == f"{row[2]}_k{merges}"
    assert [view.title for view in by_kind["figure"].views] == ["Perplexity, lower is better"]
    text = (tmp_path / "text" / "figures" / "compression.md").read_text()
    assert "No questions were asked" in text and "accuracy" not in text
    assert (tmp_path / "text" / "figures" / "compression.png").stat().st_size > 10_000


def test_what_needs_questions_is_refused_where_none_are_asked(tmp_path):
    out = tmp_path / "run"
    for more, said in (
        (["data.perplexity_text=null"], "nothing to judge plans by: set data.mmlu, data.perplexity_text, or a task"),
        (["sweep.methods=[drop_block]"], "no prompts to choose blocks or fit refits on: set calibration.text"),
        (["sweep.refits=[linear]"], "no prompts to choose blocks or fit refits on: set calibration.text"),
        (["sweep.alignments=[activations]"], "sweep.alignments has activations, which are computed on questions"),
    ):
        with pytest.raises(ConfigError, match=said):
            sweep(config(out, "data.mmlu=null", *more))
    assert not out.exists()


def test_what_a_sweep_needs_is_asked_for_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"sweep.methods \['similarity'\] need plan.similarity_run"):
        sweep(config(out, "sweep.methods=[similarity]"))
    with pytest.raises(PlanError, match="cannot merge 21 layers of a model that has 21"):
        sweep(config(out, "sweep.merges=[1, 21]"))
    np.save(tmp_path / "law.npy", np.eye(N_LAYERS) + 0.1)
    imported = import_similarity([tmp_path / "law.npy"], str(tmp_path / "imported"))
    with pytest.raises(ConfigError, match="has no block influence"):
        sweep(config(out, "sweep.methods=[block_influence]", f"plan.similarity_run={imported.path_of()}"))
    with pytest.raises(ConfigError, match="plan.block is search, but a sweep searches nothing"):
        sweep(config(out, *BLOCKS, "plan.block=search"))
    with pytest.raises(ConfigError, match="calibration.text = demo: .*after the first 100000.* use a longer text"):
        sweep(config(out, *BLOCKS, "data.perplexity_tokens=100000"))
    with pytest.raises(PlanError, match="plan.starts allow .20."):
        sweep(config(out, *BLOCKS, "plan.starts=[20]"))
    assert not out.exists()
