"""What a page of several runs, or of one search with several seeds, says of them beside each other."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from report_runs import (
    LAYERS,
    as_dicts,
    blocks,
    change,
    evaluated,
    judged,
    marks,
    pct,
    ppl,
    search_run,
    stored_by,
    sweep_run,
    tips,
)

from raymerge import findings, rows, statistics
from raymerge.plan import base_plan, block_plan, tail_coefficients
from raymerge.progress import Silent
from raymerge.report import (
    asked,
    compared,
    seeds,
)
from raymerge.report.build import page_of, run_sections
from raymerge.report.content import (
    FOUND,
    Figure,
    Table,
    Text,
)
from raymerge.report.reached import Reached
from raymerge.statistics import mcnemar, paired_difference
from raymerge.tables import MICRO, RunDirectory


def test_several_runs_are_compared_on_the_same_questions(tmp_path, search):
    other = search_run(tmp_path / "other", right={"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": 0.85}, seed=1)
    reached = [Reached(search), Reached(other)]
    rows = {row["measure"]: row for row in compared.tests(reached)}
    answers = [run.read("answers").to_pandas().query("plan_id == 'found'") for run in (search, other)]
    own = [frame.sort_values("question_id") for frame in answers]
    logits = [frame[[f"logit_{letter}" for letter in "abcd"]].to_numpy(np.float64) for frame in own]
    answer = own[0]["answer"].to_numpy()
    assert (own[1]["answer"] == answer).all()
    pair = [(each.argmax(1) == answer) for each in logits]
    accuracy = rows.pop("accuracy")
    assert accuracy["p_value"] == accuracy["p_holm"] == mcnemar(*pair).p_value
    assert accuracy["difference"] == pytest.approx(pair[0].mean() - pair[1].mean())
    nll = [np.log(np.exp(each).sum(1)) - each[np.arange(len(answer)), answer] for each in logits]
    assert rows.pop("answer_nll")["difference"] == pytest.approx(nll[0].mean() - nll[1].mean(), rel=1e-5)
    losses = [run.read("text_losses").to_pandas().query("plan_id == 'found'") for run in (search, other)]
    per_token = [frame["nll"].sum() / frame["tokens"].sum() for frame in losses]
    assert rows.pop("text_nll")["difference"] == pytest.approx(per_token[0] - per_token[1]) and not rows
    page = page_of([search, other], "raymerge report", Silent())
    assert page.several and [s.title for s in page.sections if s.level == 2][1].startswith("k3: ")
    assert compared.tests([reached[0], Reached(sweep_run(tmp_path / "sweep"))]) == []
    assert not any("chosen on these" in str(block) for block in page.sections[0].blocks)
    (table,) = (block for block in blocks(page.sections, Table) if block.caption.startswith("Paired tests between"))
    said = page.sections[0].blocks[0].text
    assert "found_bayes of k3 is " in said and " found_bayes of other" in said
    assert [len(table.header), *map(len, table.cells)] == [8, 8] and "over this table" in table.caption


def test_sweeps_stand_beside_each_other_without_a_plan_to_test(tmp_path):
    """Of two sweeps, none of which has a plan of its own to be tested, there was no page but an exception."""
    runs = [sweep_run(tmp_path / name) for name in ("a", "b")]
    table, *others = blocks([page_of(runs, "raymerge report", Silent()).sections[0]], Table)
    assert [row[:4] for row in table.cells] == [(name, "sweep", "tiny", "base") for name in ("a", "b")]
    assert others == []


def test_a_figure_without_the_runs_that_asked_nothing_does_not_say_that_all_are_there(tmp_path, search):
    """It said "Every plan of every run" without those of a run of text alone."""
    other = search_run(tmp_path / "other", objective="text_nll")
    other.config["data"] |= {"mmlu": None}
    for table in ("answers", "accuracy"):
        other.replace(table, [])
    (figure,) = blocks([compared.compared([Reached(search), Reached(other)], [])], Figure)
    assert figure.caption.startswith("Every plan that was asked questions, with 95 % intervals.")
    assert {row["run"] for row in as_dicts(figure.rows)} == {"k3"}


def test_tests_name_no_evaluated_models_where_there_are_none(tmp_path, search):
    other = search_run(tmp_path / "other", seed=1)
    _, tests = blocks([compared.compared([Reached(search), Reached(other)], [])], Table)
    assert tests.caption.startswith("Paired tests between the plans that the searches found, first minus second, ")


def test_runs_on_other_questions_or_another_text_are_compared_on_the_rest(tmp_path, search):
    other = search_run(tmp_path / "other")
    for name, changed in (("answers", {"content_hash": "another"}), ("perplexity", {"text_hash": "another"})):
        before = other.read(name).drop_columns("run_id").to_pylist()
        measures = {row["measure"] for row in compared.tests([Reached(search), Reached(other)])}
        other.replace(name, [row | changed for row in before])
        found = {row["measure"] for row in compared.tests([Reached(search), Reached(other)])}
        assert found == measures - ({"accuracy", "answer_nll"} if name == "answers" else {"text_nll"}) != measures
    assert not found


def test_losses_on_a_text_are_tested_where_its_tokens_are_the_same_whatever_else_was_measured(tmp_path, search):
    """Perplexities of the questions, which `raymerge evaluate` has and a search has not, took the test away; and two
    tokenizers' first so many tokens of one text were taken for the same."""
    other = search_run(tmp_path / "other")
    other.append("perplexity", [{"plan_id": "found", "target": "question", "tokens": 9, "nll": 1.0, "perplexity": 2.7}])
    reached = [Reached(search), Reached(other)]
    assert "text_nll" in {row["measure"] for row in compared.tests(reached)}
    (beside, *_) = blocks([compared.compared(reached, [])], Table)
    assert "do not compare them" not in beside.caption
    for run, tokens in ((search_run(tmp_path / "a"), "one"), (search_run(tmp_path / "b"), "another")):
        run.hold_to({"text tokens": tokens})
        reached.append(Reached(run))
    assert "text_nll" not in {row["measure"] for row in compared.tests(reached[2:])}
    (beside, *_) = blocks([compared.compared(reached[2:], [])], Table)
    assert "do not compare them" in beside.caption


def random_trials(run, vectors):
    """Random candidates of a search made by hand."""
    (trial, *_) = run.read("trials").to_pylist()
    given = {key: value for key, value in trial.items() if key != "run_id"}
    rows = [given | {"searcher": "random", "iteration": i, "alphas": own} for i, own in enumerate(vectors)]
    run.append("trials", rows)


def test_one_search_with_several_seeds_is_told_with_how_far_its_coefficients_differ(tmp_path):
    found = {1: (0.1, 0.8, 0.3), 2: (0.9, 0.8, 0.3), 5: (0.5, 0.0, 1.0)}
    drawn = {1: [[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]], 2: [[0.3, 0.3, 0.3], [0.0, 0.0, 0.0]], 5: [[0.5, 0.5, 0.5]]}
    right = {seed: {"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": 0.5 + seed / 10} for seed in found}
    runs = [search_run(tmp_path / f"s{s}", seed=s, alphas=alphas, right=right[s]) for s, alphas in found.items()]
    for run, vectors in zip(runs, drawn.values(), strict=True):
        random_trials(run, vectors)
    reached = [Reached(run) for run in runs]
    (section,) = seeds.seeds(reached)
    assert section.title == "One search, 3 seeds: s1, s2, s5"
    table, text, figure = section.blocks
    lines = dict(zip([row[0] for row in table.cells], [row[1:] for row in table.cells], strict=True))
    accuracies = [one.best["accuracy"] for one in reached]
    assert len(set(accuracies)) == 3
    for seed, accuracy in zip(found, accuracies, strict=True):
        assert lines[f"seed {seed} (s{seed})"][:2] == ("0.6500", f"{100 * accuracy:.1f} %")
    assert lines["mean"][1] == f"{100 * np.mean(accuracies):.1f} %"
    assert lines["standard deviation"][1] == f"{100 * np.std(accuracies, ddof=1):.1f} %"
    assert lines["for comparison: drop"][0] == "0.4500" and lines["for comparison: base"][0] == "–"

    def apart(vectors):
        weights = [tail_coefficients(vector) for vector in vectors]
        return [np.abs(a - b).sum() / 2 for i, a in enumerate(weights) for b in weights[:i]]

    within = [distance for vectors in drawn.values() for distance in apart(vectors)]
    assert f"two seeds differ in {100 * np.mean(apart(found.values())):.0f} % of" in text.text
    assert f"two random candidates in {100 * np.mean(within):.0f} %" in text.text and len(within) == 2
    # A kept layer and the three merged into it, of six; what each seed leaves of them.
    cells = as_dicts(figure.rows)
    assert [row["layer"] for row in cells] == [2, 3, 4, 5] * 3
    np.testing.assert_allclose([row["weight"] for row in cells], np.ravel([*map(tail_coefficients, found.values())]))
    page = page_of(runs, "raymerge report", Silent())
    assert [s.title for s in page.sections[:2]] == ["The runs, side by side", section.title]


def test_seeds_whose_matrices_have_coefficients_of_their_own_are_compared_matrix_by_matrix(tmp_path):
    """By the mean over the matrices two plans that share no matrix's coefficients were the same."""
    runs = [search_run(tmp_path / f"s{seed}", seed=seed, alphas=(0.5, 0.5, 0.5)) for seed in range(2)]
    matrices = ("mlp.up_proj", "self_attn.q_proj")
    for run, weights in zip(runs, ([0.25, 0.75], [0.75, 0.35]), strict=True):
        rows = run.read("coefficients").drop_columns("run_id").to_pylist()
        best = Reached(run).best["plan_id"]
        merged = [row for row in rows if row["plan_id"] == best and row["kept_layer"] == 2]
        own = [
            row | {"matrix": matrix, "coefficient": {2: first, 3: 1 - first}.get(row["source_layer"], 0.0)}
            for matrix, first in zip(matrices, weights, strict=True)
            for row in merged
        ]
        run.replace("coefficients", rows + own)
    (section,) = seeds.seeds([*map(Reached, runs)])
    assert section.blocks[1].text.startswith("On average the coefficients of two seeds differ in 45 % of")
    assert "the mean over matrices" in section.blocks[1].text
    assert section.blocks[2].caption.endswith("Where matrices have coefficients of their own, their mean is drawn.")


def test_searches_that_differ_in_more_than_the_seed_are_not_one(tmp_path, search):
    def sections(*others):
        return seeds.seeds([Reached(search), *map(Reached, others)])

    again = search_run(tmp_path / "again")  # the same seed
    other = search_run(tmp_path / "other", seed=1, objective="answer_nll")
    assert sections() == sections(again) == sections(other) == sections(sweep_run(tmp_path / "sweep")) == []
    third = search_run(tmp_path / "third", seed=1)
    (section,) = sections(other, again, third)
    assert section.title == "One search, 2 seeds: k3, third", "a repeated seed would count twice"
    assert section.blocks[1].text.startswith("On average the coefficients of two seeds differ in 0 % of")
    assert "random" not in section.blocks[1].text
    # Another model under the same path.
    manifest = json.loads((tmp_path / "third" / "manifest.json").read_text())
    (tmp_path / "third" / "manifest.json").write_text(json.dumps(manifest | {"model": {"identity": "other"}}))
    assert sections(RunDirectory.load(tmp_path / "third")) == []


def test_no_seed_counts_twice_in_what_is_said_of_seeds(tmp_path):
    """A run given twice moved the mean towards itself, and lowered the standard deviation and the distances."""
    runs = [
        search_run(
            tmp_path / f"s{seed}",
            seed=seed,
            alphas=alphas,
            right=dict.fromkeys(("base", "drop", "fixed", "found"), right),
        )
        for seed, alphas, right in ((0, (0.1, 0.8, 0.3), 0.4), (1, (1.0, 1.0, 1.0), 0.9))
    ]
    once, twice = (seeds.seeds([*map(Reached, given)]) for given in (runs, [runs[0], *runs]))
    assert [section.blocks[:2] for section in once] == [section.blocks[:2] for section in twice]


def test_controls_beside_seeds_are_the_controls(tmp_path):
    runs = [search_run(tmp_path / f"s{seed}", seed=seed, control="drop") for seed in range(2)]

    def dropped():
        (section,) = seeds.seeds([*map(Reached, runs)])
        (cells,) = (row[1:] for row in section.blocks[0].cells if row[0] == "for comparison: drop")
        return cells

    expected = "0.4500", *dropped()[1:]
    assert dropped() == expected, "not those of an alpha file of that name, which reaches more"
    # The first seed found what the control is, so that both are one line.
    plans = runs[0].read("plans").drop_columns("run_id").to_pylist()
    again = [row | {"name": "found_random", "kind": "found"} for row in plans if row["plan_id"] == "drop"]
    runs[0].replace("plans", [*plans, *again])
    assert dropped() == expected
    # What its value is above a ceiling is no value of the objective.
    for run in runs:
        trials = run.read("trials").drop_columns("run_id").to_pylist()
        run.replace("trials", [row | {"perplexity": 90.0 if row["plan_id"] == "drop" else 12.5} for row in trials])
        run.config["search"]["perplexity_ceiling"] = 50.0
    assert dropped() == ("–", *expected[1:])


def test_blocks_of_several_seeds_differ_wholly_where_they_share_no_layer():
    here, there = (
        {(1, 1): 0.4, (1, 2): 0.6, (3, 3): 1.0, (4, 4): 1.0},
        {(1, 1): 1.0, (2, 2): 1.0, (3, 3): 0.5, (3, 4): 0.5},
    )
    assert seeds._distance(here, here) == 0.0
    assert seeds._distance(here, there) == pytest.approx((0.6 + 0.5) / 2)
    into_the_next = {(2, 2): 0.4, (2, 1): 0.6, (3, 3): 1.0, (4, 4): 1.0}  # layer 1 goes, 2 stays
    assert seeds._distance(here, into_the_next) == 1.0


def test_evaluated_models_are_tested_against_each_other_and_drawn_below_each_other(tmp_path):
    """They stood in a scatter over parameters removed, all at 0 %, one above the other and without names."""
    runs = []
    for name, right in (("a", 0.9), ("b", 0.4)):
        run = RunDirectory.open(tmp_path / name, {"model": {"path": f"/models/{name}"}}, "evaluate")
        run.begin()
        plan = {"base": base_plan(8)}
        evaluated(run, plan, {"base": right}, subjects=("law", "anatomy"), perplexities={}, pairs=[])
        run.write_manifest(command=["raymerge", "evaluate"])
        runs.append(run)
    page = page_of(runs, "raymerge report", Silent())
    tables = {table.caption.split()[0]: table for table in page.sections[0].blocks if isinstance(table, Table)}
    ((first, second, _, verdict, _, finer),) = tables["Paired"].cells
    assert (first, second) == ("a", "b") and verdict.startswith("▲") and finer.startswith("▲")
    (figure,) = blocks([page.sections[0]], Figure)
    assert figure.title == "Accuracy, all runs"
    assert figure.views[0].spec["layer"][1]["encoding"]["y"]["sort"] == ["a", "b"]
    (table, _) = [
        table for table in blocks(page.sections, Table) if table.caption.startswith("The model on 120 test q")
    ]
    assert "In brackets" not in table.caption  # nothing is merged or dropped
    assert "first" not in table.caption and table.cells[0][:2] == ("the model", "as it is")  # one model is no ranking
    # What the page is for is said first, and there are no columns of dashes; both were called "base".
    assert page.sections[0].blocks[0] == Text("By accuracy and answer NLL, a is better than b.")
    assert tables["The"].caption == "The evaluated models"
    assert tables["Paired"].caption.startswith("Paired tests between the evaluated models, first minus second")
    assert tables["The"].header == ("run", "experiment", "model", "plan", "layers", "accuracy [95 %]")
    assert [row[3] for row in tables["The"].cells] == ["the model", "the model"]


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ((0.0, 0.0, 0.0), "By accuracy, answer NLL and loss per token, a is indistinguishable from b."),
        ((0.0, 0.1, -0.1), "By loss per token, a is better than b; by accuracy it is indistinguishable from it; by "
                           "answer NLL it is worse than it."),
    ],
)  # fmt: skip
def test_what_tests_of_a_pair_say_is_a_sentence(differences, said):
    found = {("0", "1", measure): {"measure": measure, "difference": difference, "p_value": 0.01 if difference else 1.0,
                                   "p_holm": None}
             for measure, difference in zip(compared.MEASURES, differences, strict=True)}  # fmt: skip
    assert compared._said("a", "b", ("0", "1"), found) == said


def test_an_evaluated_model_is_not_said_to_be_unmerged(tmp_path, search):
    """A merge of another tool was "19 of 19 layers, 0.0 % removed, unmerged 28.3 %" below the merges of a search."""
    run = RunDirectory.open(tmp_path / "mine", {"model": {"path": "/models/mine"}}, "evaluate")
    run.begin()
    evaluated(run, {"base": base_plan(8)}, {"base": 0.5}, subjects=("law",), perplexities={}, pairs=[])
    run.write_manifest(command=["raymerge", "evaluate"])
    section = page_of([search, run], "raymerge report", Silent()).sections[0]
    table = next(block for block in section.blocks if isinstance(block, Table))
    found, mine = ((row[4], row[5], row[7], row[9]) for row in table.cells)  # layers, removed, unmerged twice
    assert mine == ("8", "–", "–", "–") and "the model as it is" in table.caption
    assert " of " in found[0] and found[1].endswith(" %") and found[2].endswith(" %") and found[3] != "–"
    (figure,) = blocks([section], Figure)
    assert figure.caption.endswith("An evaluated model stands at 0 %, also one that was merged before.")
    # Nor on its own page, which called it unmerged.
    (own,) = [table for table in blocks(run_sections(run, heading=None), Table) if table.header[1] == "what it is"]
    assert own.cells[0][:3] == ("the model", "as it is", "8")


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """Models A and B, each evaluated into a folder eval, stood on one line of the figure, both called eval."""
    runs = []
    for name in ("a/eval", "b/eval", "b/own"):
        run = RunDirectory.open(tmp_path / name, {"model": {"path": f"/models/{name[0]}"}}, "evaluate")
        run.begin()
        evaluated(
            run, {"base": base_plan(8)}, {"base": 0.5}, subjects=("law",), perplexities={}, pairs=[], seed=len(runs)
        )
        run.write_manifest(command=["raymerge", "evaluate"])
        runs.append(run)
    names = ["a/eval", "b/eval", "own"]
    assert asked.run_names(runs) == names and asked.run_names([runs[0], runs[2], runs[0]]) == ["eval", "own", "eval"]
    inside = [SimpleNamespace(path_of=lambda path=path: path) for path in ("/b/eval", "/a/b/eval/")]
    assert asked.run_names(inside) == ["/b/eval", "a/b/eval"]
    page = page_of(runs, "raymerge report", Silent())
    assert [section.short for section in page.sections if section.short] == names
    assert page.lead == "evaluate: a/eval, b/eval, own."
    (figure,) = blocks([page.sections[0]], Figure)
    assert {row["run"] for row in as_dicts(figure.rows)} == {*names}
    table, tests = blocks([page.sections[0]], Table)
    assert [row[0] for row in table.cells] == names
    assert tests.cells[0][:2] == ("a/eval", "b/eval") and "of the first" not in tests.caption
    monkeypatch.setattr(compared, "_PAIRED", 2)
    tests = blocks([page_of(runs, "raymerge report", Silent()).sections[0]], Table)[1]
    assert len(tests.cells) == 1 and "evaluated models (of the first 2 of these runs), first" in tests.caption


def test_perplexities_of_different_texts_are_not_to_be_compared(tmp_path, search):
    other = search_run(tmp_path / "other")
    reached = [Reached(search), Reached(other)]
    assert "different texts" not in blocks([compared.compared(reached, [])], Table)[0].caption
    texts = other.read("perplexity").drop_columns("run_id").to_pylist()
    other.replace("perplexity", [row | {"text_hash": "of another"} for row in texts])
    assert "The perplexities are of different texts" in blocks([compared.compared(reached, [])], Table)[0].caption


def test_a_run_that_searched_on_the_reports_questions_is_marked_beside_others(tmp_path, search):
    reached = [Reached(search), Reached(search_run(tmp_path / "seen", search_split="test", seed=1))]
    table, tests = blocks([compared.compared(reached, [])], Table)
    assert [row[3] for row in table.cells] == ["found_bayes", "found_bayes (chosen on these questions)"]
    assert [row[:2] for row in tests.cells] == [("k3: found_bayes", "seen: found_bayes (chosen on these questions)")]
    assert all("is too good on them: no difference in its favour" in one.caption for one in (table, tests))


def test_of_many_runs_not_every_plan_is_drawn_and_the_figure_says_so(search, monkeypatch):
    reached = [Reached(search)] * 2
    (figure,) = blocks([compared.compared(reached, [])], Figure)
    assert figure.caption.startswith("Every plan of every run, ") and len(figure.rows.values) == 8
    monkeypatch.setattr(compared, "_DRAWN", 3)
    (figure,) = blocks([compared.compared(reached, [])], Figure)
    assert figure.caption.startswith("3 of 8 plans, found plans first, ") and len(figure.rows.values) == 3


def test_runs_beside_each_other_have_their_own_numbers(tmp_path):
    ours = search_run(tmp_path / "k3", seed=5)
    theirs = search_run(tmp_path / "other", right={"base": 0.8, "drop": 0.4, "fixed": 0.5, "found": 0.7}, seed=6)
    evaluation = RunDirectory.open(tmp_path / "eval", {"model": {"path": "/models/x"}}, "evaluate")
    evaluation.begin()
    evaluated(evaluation, {"base": base_plan(LAYERS)}, {"base": 0.75}, subjects=("algebra", "law"),
              perplexities={"base": 7.0}, pairs=[])  # fmt: skip
    evaluation.write_manifest(command=["raymerge", "evaluate"])
    runs = {"k3": ours, "other": theirs, "eval": evaluation}
    reached = [Reached(run, name) for name, run in runs.items()]
    section = compared.compared(reached, [("s", "similarity", "tiny")])
    table, tests, without = blocks([section], Table)
    plan = {"k3": "found", "other": "found", "eval": "base"}
    micro = {name: stored_by(run, "accuracy", subject="_micro") for name, run in runs.items()}
    for (name, run), cells in zip(runs.items(), table.cells, strict=True):
        row, base = micro[name][plan[name]], micro[name]["base"]
        texts = stored_by(run, "perplexity", target="text")
        assert cells[:2] == (name, run.experiment)
        assert cells[2:4] == (("x", "the model") if name == "eval" else ("tiny", "found_bayes"))
        assert cells[4:6] == (("6", "–") if name == "eval" else ("3 of 6", "50.0 %"))
        known = name != "eval"  # of what an evaluated model was made its run does not say
        assert cells[6] == pct(row["accuracy"], (row["ci_low"], row["ci_high"]))
        assert cells[8] == ppl(texts[plan[name]]).split(" [")[0]
        assert cells[7::2] == ((pct(base["accuracy"]), ppl(texts["base"]).split(" [")[0]) if known else ("–", "–"))
    assert without.cells == (("s", "similarity", "tiny"),) and "different texts" not in table.caption
    right = {
        name: {row["question_id"]: row["predicted"] == row["answer"] for row in run.read("answers").to_pylist()
               if row["plan_id"] == plan[name]}
        for name, run in runs.items()
    }  # fmt: skip
    pairs = [("k3", "other"), ("k3", "eval"), ("other", "eval")]
    called = {name: name if name == "eval" else f"{name}: found_bayes" for name in runs}
    differences = []
    for a, b in pairs:
        x, y = (np.array([right[name][key] for key in sorted(right[name])]) for name in (a, b))
        row = paired_difference(x.astype(float), y.astype(float))._asdict()
        assert row["difference"] == pytest.approx(x.mean() - y.mean())
        differences.append(row | {"p_value": mcnemar(x, y).p_value, "measure": "accuracy"})
    holm = statistics.holm([row["p_value"] for row in differences])
    assert tests.header == ("first", "second", *(c for m in ("accuracy", "answer NLL", "loss per token")
                                                 for c in (m, "verdict, p (Holm)")))  # fmt: skip
    for (a, b), row, adjusted, cells in zip(pairs, differences, holm, tests.cells, strict=True):
        assert cells[:3] == (called[a], called[b], change(row, 100, 1)) and cells[3] == judged(
            row | {"p_holm": adjusted}
        )
    (figure,) = blocks([section], Figure)
    drawn = as_dicts(figure.rows)
    assert len(drawn) == 9 and {row["role"] for row in drawn[-2:]} == {FOUND}  # on top
    for row in drawn:
        labels = {label: plan_id for plan_id, label in findings.labels_of(runs[row["run"]]).items()}
        of = micro[row["run"]][labels[row["plan"]]]
        assert (row["accuracy"], row["low"], row["high"]) == (of["accuracy"], of["ci_low"], of["ci_high"])
        cost = stored_by(runs[row["run"]], "costs")[labels[row["plan"]]]
        assert row["removed"] == cost["parameters_removed"] / (cost["parameters"] + cost["parameters_removed"])
    assert marks(figure.views[0]) == [
        ("rule", {"x": "removed", "y": "low", "y2": "high", "color": "role"}),
        ("point", {"x": "removed", "y": "accuracy", "color": "role", "shape": "role"}),
    ]
    points = figure.views[0].spec["layer"][1]["encoding"]
    assert points["x"]["type"] == points["y"]["type"] == "quantitative"
    assert [points[channel]["axis"]["title"] for channel in "xy"] == ["parameters removed", "accuracy"]
    assert figure.views[0].zoom == {"x": "zoom_removed", "y": "zoom_low"}
    assert tips(figure.views[0]) == [
        ("run", "run"), ("model", "model"), ("plan", "plan"), ("parameters removed", "removed"),
        ("accuracy", "accuracy"), ("95 % from", "low"), ("to", "high"), ("perplexity", "perplexity"),
        ("questions", "questions"),
    ]  # fmt: skip


def test_a_search_of_one_seed_that_was_run_twice_counts_once_among_the_seeds(tmp_path, search):
    """It made the average distance of three pairs of which one had none, and the deviation that of two draws."""
    again = search_run(tmp_path / "again")
    other = search_run(tmp_path / "other", seed=1, alphas=(0.9, 0.8, 0.3))
    (section,) = seeds.seeds([Reached(run) for run in (search, again, other)])
    table, text, _ = section.blocks
    assert [row[0] for row in table.cells][:3] == ["seed 0 (k3)", "seed 1 (other)", "mean"]
    apart = np.abs(tail_coefficients((0.1, 0.8, 0.3)) - tail_coefficients((0.9, 0.8, 0.3))).sum() / 2
    assert f"two seeds differ in {100 * apart:.0f} % of" in text.text


@pytest.mark.parametrize(
    "changed",
    [{"data": {"mmlu": "other"}}, {"text_hash": "other"}, {"model": {"identity": "other"}}, None],
)
def test_searches_with_other_files_or_without_an_end_are_not_seeds_of_one(tmp_path, search, changed):
    other = search_run(tmp_path / "other", seed=1)
    assert len(seeds.seeds([Reached(search), Reached(other)])) == 1
    path = tmp_path / "other" / "manifest.json"
    if changed is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert seeds.seeds([Reached(search), Reached(RunDirectory.load(tmp_path / "other"))]) == []


def test_seeds_have_their_own_numbers_commands_and_plans(tmp_path):
    """Of a measure that one of them has not there is no mean."""
    runs = [
        search_run(
            tmp_path / f"s{seed}",
            seed=seed,
            subjects=("algebra", "law", "algebra"),
            objective="answer_nll",
            alphas=alphas,
            found=f"found_{seed}",
        )
        for seed, alphas in ((3, (1.0, 1.0, 0.996)), (4, (0.5, 1.0, 1.0)))
    ]
    other = [row | {"value": 0.7} for row in runs[1].read("trials").drop_columns("run_id").to_pylist()]
    runs[1].replace("trials", other)
    runs[0].replace("perplexity", [])
    own = [row | {"matrix": "mlp.up_proj", "coefficient": 0.5}
           for row in runs[0].read("coefficients").drop_columns("run_id").to_pylist()]  # fmt: skip
    runs[0].append("coefficients", own)
    # A control that another plan has the name of as its kind.
    stored = [row | {"kind": "drop"} if row["plan_id"] == "fixed" else row
              for row in runs[0].read("plans").drop_columns("run_id").to_pylist()]  # fmt: skip
    runs[0].replace("plans", sorted(stored, key=lambda row: row["plan_id"] != "fixed"))
    (section,) = seeds.seeds([Reached(run) for run in runs])
    table, _, figure = section.blocks
    lines = {row[0]: row[1:] for row in table.cells}
    micro = [next(row for row in run.read("accuracy").to_pylist()
                  if (row["plan_id"], row["subject"]) == ("found", MICRO)) for run in runs]  # fmt: skip
    assert [lines[f"seed {seed} (s{seed})"][:3] for seed in (3, 4)] == [
        (f"{value:.4f}", f"{100 * row['accuracy']:.1f} %", f"{row['nll']:.4f}")
        for value, row in zip((0.65, 0.7), micro, strict=True)
    ]
    assert lines["mean"][0] == "0.6750" and lines["mean"][3] == "–" != lines["seed 4 (s4)"][3]
    assert [row[0] for row in table.cells][-2:] == ["for comparison: drop", "for comparison: base"]
    assert lines["for comparison: drop"][0] == "0.4500"
    cells = as_dicts(figure.rows)
    # A share of 0.4 % is too small to be written; layer 2 is shown, though the other seed leaves it as it is.
    assert [(row["layer"], row["kept"], row["percent"]) for row in cells if row["series"] == "seed 3 (s3)"] == [
        (2, "2", "100"), (3, "2", ""), (4, "–", ""), (5, "–", ""),
    ]  # fmt: skip
    assert figure.command.count("raymerge search") == 2
    assert [Path(path).parent.parent.parent.name for _, path in figure.rows.sources] == ["s3", "s4"]


@pytest.mark.parametrize("survivor", ["before", "after"])
def test_random_candidates_over_blocks_have_the_coefficients_of_their_own_blocks(survivor):
    best = block_plan(8, 3, [0.5, 0.5], name="found", kind="found", survivor=survivor)
    stored = [row | {"block": None} for row in rows.plan_rows(best, "found")]
    drawn = [(4, [0.25, 0.5]), (1, [0.0, 0.75]), (None, [1.0, 0.5])]
    trials = [
        {"searcher": "random", "status": "ok", "plan_id": "p", "block": block, "alphas": alphas}
        for block, alphas in [*drawn, *[(3, [0.5, 0.5])] * 50]
    ]
    trials = [{"searcher": "bayes", "status": "ok", "block": 4, "alphas": [0.1, 0.1]},
              {"searcher": "random", "status": "failed", "block": 4, "alphas": [0.1, 0.1]}, *trials]  # fmt: skip
    run = SimpleNamespace(read=lambda _: SimpleNamespace(to_pylist=lambda: trials))
    costs = {"layers": 6, "layers_removed": 2}
    found = seeds._random(SimpleNamespace(run=run, plans=stored, the_best={"plan_id": "found", "costs": costs}))
    assert len(found) == 40
    for (block, alphas), weights in zip(drawn, found, strict=False):
        first = 3 if block is None else block
        kept, sources = (first - 1, (-1, 0, 1)) if survivor == "before" else (first + 2, (2, 1, 0))
        for source, share in zip(sources, tail_coefficients(alphas), strict=True):
            assert weights.get((kept, first + source), 0.0) == pytest.approx(share)
        assert {key: weight for key, weight in weights.items() if key[0] != kept} == {
            (layer, layer): 1.0 for layer in range(8) if not min(kept, first) <= layer <= max(kept, first + 1)
        }
