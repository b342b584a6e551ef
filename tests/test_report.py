"""What a report says: numbers of the tables, foreign text escaped, what is missing named; no browser here."""

import errno
import itertools
import json
import math
import os
import re
import shlex
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from report_runs import (
    LAYERS,
    QUESTIONS,
    evaluated,
    imported_run,
    search_run,
    sensitivity_run,
    similarity_run,
    sweep_run,
    text_losses,
)

from raymerge import console, findings, report, rows, statistics, summary
from raymerge.card import search_results
from raymerge.comparisons import comparison_rows
from raymerge.plan import base_plan, block_plan, drop_block_plan, pairs_plan, tail_coefficients
from raymerge.progress import Silent
from raymerge.report import (
    answer,
    asked,
    compared,
    curve,
    figures,
    layers,
    plans,
    receipts,
    render,
    searched,
    seeds,
    subjects,
    vega,
    wording,
)
from raymerge.report.build import GLOSSARY, page_of, run_sections
from raymerge.report.content import (
    CONTROL,
    FOUND,
    RANDOM,
    UNMERGED,
    Facts,
    Figure,
    Notice,
    Page,
    Rows,
    Section,
    Table,
    Text,
    View,
    role_of,
)
from raymerge.report.reached import Reached, chosen_layers, described
from raymerge.statistics import mcnemar, paired_difference, wilson_interval
from raymerge.tables import MICRO, RunDirectory, RunError, derive_accuracy

HOSTILE = '</script><script>alert(1)</script><img src="http://x.example/a.png" onerror=alert(2)>'


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    return search_run(tmp_path_factory.mktemp("runs") / "k3")


@pytest.fixture(scope="module", autouse=True)
def no_library():
    """The pages of these tests do without Vega, which takes seconds to bundle; test_the_library has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "library", lambda: "")
        yield


class Outline(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._inside = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text.append(data)


def blocks(sections, kind):
    return [block for section in sections for block in section.blocks if isinstance(block, kind)]


def as_dicts(rows):
    return [dict(zip(rows.columns, values, strict=True)) for values in rows.values]


# -- a search


def test_a_curve_of_one_number_of_layers_says_it_once(tmp_path):
    run = sweep_run(tmp_path / "sweep")
    every = curve.in_words(Reached(run))
    assert "With 1 layer merged, " in every and ". With 3 layers merged" in every
    points = [row for row in run.read("sweep").drop_columns("run_id").to_pylist() if row["merges"] != 3]
    run.replace("sweep", points)
    assert curve.in_words(Reached(run)).count("is the most accurate") == 1


def test_ways_that_are_level_are_said_to_be(tmp_path):
    """The first that was asked for was called the most accurate, and nothing said that others are as accurate."""
    run = sweep_run(tmp_path / "sweep")
    names = {"half1": "drop1"}  # the points of one layer are one plan now
    points = run.read("sweep").drop_columns("run_id").to_pylist()
    run.replace("sweep", [row | {"plan_id": names.get(row["plan_id"], row["plan_id"])} for row in points])
    every = curve.in_words(Reached(run))
    assert "(perplexity 7.00); 1 other way is as accurate. With 3 layers merged" in every
    best, _ = blocks([curve.answer(Reached(run))], Table)
    assert [row[2] for row in best.cells] == ["drop and 1 more", "fixed_0.5"]


def test_a_curve_in_the_terminal_has_intervals(tmp_path):
    """A point at which every question is right has a standard error of 0, which is not how sure it is."""
    run = sweep_run(tmp_path / "sweep")
    header, cells = summary.sweep_table(run, "test")
    at = header.index("accuracy [95 %]")
    low, high = next(
        (row["ci_low"], row["ci_high"])
        for row in run.read("accuracy").to_pylist()
        if row["plan_id"] == "base" and row["subject"] == MICRO
    )
    assert cells[0][at].endswith(f" [{low:.3f}, {high:.3f}]")


def test_the_answer_has_the_tables_numbers(search):
    reached = Reached(search)
    accuracy = {row["plan_id"]: row for row in search.read("accuracy").to_pylist() if row["subject"] == MICRO}
    (figure,) = blocks([plans.answer(reached)], Figure)
    for row in as_dicts(figure.rows):
        stored = accuracy[{label: plan for plan, label in reached.labels.items()}[row["plan"]]]
        assert (row["accuracy"], row["low"], row["high"]) == (stored["accuracy"], stored["ci_low"], stored["ci_high"])
    verdicts, every = blocks([plans.answer(reached)], Table)
    best = accuracy["found"]
    assert every.cells[every.marked[0]][3] == (
        f"{100 * best['accuracy']:.1f} % [{100 * best['ci_low']:.1f}, {100 * best['ci_high']:.1f}]"
    )
    stored = {row["plan_b"]: row for row in search.read("comparisons").to_pylist() if row["measure"] == "accuracy"}
    told = {row[0]: row for row in verdicts.cells}
    assert set(told) == {"base", "drop", "fixed_0.62"}
    for plan, label in (("base", "base"), ("drop", "drop"), ("fixed", "fixed_0.62")):
        assert told[label][1] == wording.difference(stored[plan])
        assert findings.verdict(stored[plan]) in told[label][2]
    perplexities = {row["plan_id"]: row for row in search.read("perplexity").to_pylist()}
    assert told["drop"][5] == wording.perplexity(
        perplexities["drop"]["perplexity"], (perplexities["drop"]["ci_low"], perplexities["drop"]["ci_high"])
    )
    assert "[" in told["drop"][5] and told["drop"][6].startswith("▲\u00a0better, p\u00a0")
    assert told["base"][6].startswith("▼\u00a0worse, p\u00a0")


def test_the_table_of_comparisons_says_what_its_p_values_allow_for(search):
    caption = blocks([plans.answer(Reached(search))], Table)[0].caption
    assert "corrects for all 3 comparisons, separately for each measure" in caption
    assert "test on text is overconfident" in caption and "14, 9 and 8 % of cases, not 5" in caption


@pytest.mark.parametrize(
    ("alignment", "norms", "said"),
    [
        ("none", "keep", "given coefficients"),
        ("neurons", "fold", "given coefficients, aligned, norms folded"),
        ("activations", "keep", "given coefficients, aligned by activations"),
        ("rows", "keep", "given coefficients, rows aligned"),
    ],
)
def test_a_plan_is_said_to_be_aligned_and_how(alignment, norms, said):
    line = {
        "name": "a",
        "kind": "file",
        "alignment": alignment,
        "norms": norms,
        "refit": None,
        "fate": "",
        "as_is": False,
    }
    assert described(line) == said
    aligned, rows_aligned = (dict(GLOSSARY["search"])[name] for name in ("aligned", "rows aligned"))
    assert "preserves that layer's function" in aligned and "another function" in rows_aligned


def test_a_plan_says_which_layers_it_leaves_out_and_what_refits_it(tmp_path):
    """A search of blocks may find another block than the controls', and alphas of 0, which drop the kept layer."""
    run = RunDirectory.open(tmp_path / "run", {"plan": {"selection": "block", "block": "search"}}, "search")
    pairs = [(2, 3), (1, 2)]  # the block of layers 2 and 3, into layer 1
    plans = {
        "base": base_plan(LAYERS),
        "drop": drop_block_plan(LAYERS, 2, 2),
        "merged": pairs_plan(LAYERS, [(0, 1), (3, 4)], [0.5, 0.5], name="random", kind="random"),
        "found": pairs_plan(LAYERS, pairs, [0.0, 0.0], name="found_bayes", kind="found"),
        "fitted": pairs_plan(LAYERS, pairs, [0.0, 0.0], name="found_bayes_linear", kind="found"),
    }
    evaluated(run, plans, dict.fromkeys(plans, 0.5), subjects=["law"], perplexities=dict.fromkeys(plans, 5.0), pairs=[])
    run.append("refits", [{"plan_id": "fitted", "method": "linear", "layer": 2, "part": "mlp", "tokens": 9}])
    run.append("blocks", [{"merges": 3, "first": 2, "last": 3, "measure": "cosine", "score": 0.1, "chosen": True}])
    run.write_manifest(best={"plan_id": "found", "name": "found_bayes"})
    reached = Reached(run)
    said = {line["plan_id"]: described(line) for line in reached.lines}
    assert said == {
        "base": "unmerged",
        "drop": "block of layers dropped (without 2-3)",
        "merged": "random coefficients (0-1 merged, 3-4 merged)",
        "found": "found by the search (without 1-2)",
        "fitted": "found by the search, seams refitted by linear (without 1-2)",
    }
    (table,) = chosen_layers(run)
    assert table.caption.startswith("Layers that the search starts from, and that the controls merge or drop; ")


def test_the_sentence_says_what_cannot_be_told_apart(search):
    questions, text = answer.in_words(Reached(search))
    assert questions.startswith("The best plan found, found_bayes,")  # a control may be better still
    assert f" % of {QUESTIONS} test questions correctly. By accuracy it is better than drop; ind" in questions
    assert "drop; indistinguishable from fixed_0.62; worse than the unmerged model. By answer NLL" in questions
    assert text.startswith(
        "Its perplexity on plain text is 12.5; the unmerged model's is 5.00. By loss per token it is "
    )
    assert "better than fixed_0.62 and drop;" in text and "worse than the unmerged model" in text
    page = [block.text for block in blocks([plans.answer(Reached(search))], Text)]
    assert page[:2] == [questions, text]


def test_what_a_plan_merges_is_not_what_it_leaves_alone():
    best = {"plan_id": "found", "label": "found"}
    cells = [(1, 1.0, "1"), (2, 0.0, wording.NONE), (3, 0.3, "2"), (4, 0.7, "2")]  # layer 1 goes in another plan
    weights = [{"plan_id": "found", "layer": layer, "weight": weight, "kept": kept} for layer, weight, kept in cells]
    assert searched._heaviest(weights, best) == " Largest coefficients of found: layer 4 (70 %), layer 3 (30 %)."
    assert searched._heaviest(weights[:2], best) == ""


def test_a_plan_chosen_by_the_reports_own_questions_is_said_to_be(tmp_path, search):
    same = search_run(tmp_path / "same", search_split="test")
    for run, expected in ((search, False), (same, True)):
        reached = Reached(run)
        sentence, *_ = (block.text for block in blocks([plans.answer(reached)], Text))
        assert ("chose it on questions of this split" in sentence) == expected
        progress = blocks([searched.search(reached)], Figure)[0].caption
        assert ("of the same split as the report's" in progress) == expected == ("not the report's" not in progress)


def test_a_search_that_asks_questions_but_judges_by_text_chose_by_none_of_them(tmp_path):
    run = search_run(tmp_path / "run", search_split="test", objective="text_nll")
    assert not findings.chosen_on(run, "test")
    reached = Reached(run)
    words = "\n".join(block.text for block in blocks([plans.answer(reached)], Text))
    assert "too good" not in words and "text_nll" in words and "on the text it was chosen on" in words
    assert "questions it was chosen on" not in words and "the difference between the two texts" in words
    progress = blocks([searched.search(reached)], Figure)[0].caption
    assert progress.startswith("Measured on the search text, not the report's (lower is better)")
    assert "120 test questions, by none of which the search chose." in search_results(run, "found", "test")[0]


def test_without_a_manifest_the_best_is_not_the_one_that_the_report_likes(tmp_path):
    run = search_run(tmp_path / "run")
    kinds = {"fixed": "found"}  # as of two searchers; stored before the one that the search chose
    run.replace(
        "plans", [row | {"kind": kinds.get(row["plan_id"], row["kind"])} for row in run.read("plans").to_pylist()]
    )
    run.replace("accuracy", [
        row | ({"accuracy": 0.99} if row["plan_id"] == "fixed" else {}) for row in run.read("accuracy").to_pylist()
    ])  # fmt: skip
    run.begin()  # which takes the manifest away
    assert Reached(run).best["plan_id"] == "found"


def test_without_a_manifest_a_control_that_was_found_again_is_the_best(tmp_path):
    """Its rows stand among the controls and at the end; the last one found elsewhere was taken for the best."""
    run = search_run(tmp_path / "run")
    plans = run.read("plans").drop_columns("run_id").to_pylist()
    again = [row | {"kind": "found", "name": "found_random"} for row in plans if row["plan_id"] == "drop"]
    run.replace("plans", plans + again)
    run.begin()  # which takes the manifest away
    reached = Reached(run)
    assert reached.best["label"] == "drop = found_random" and reached.best["kind"] == "found"


def test_a_search_by_random_candidates_is_said_to_have_no_random_control(tmp_path, search):
    facts = {fact.term: fact for fact in asked.asked(search).blocks[0].facts}
    assert facts["Search"].note == "2 random candidates as a control"
    search.config["search"] |= {"searcher": ["bayes", "random"]}
    facts = {fact.term: fact for fact in asked.asked(search).blocks[0].facts}
    search.config["search"] |= {"searcher": "bayes"}
    assert facts["Search"].note == ""


def test_a_gain_by_an_uncorrected_p_alone_is_no_gain(search):
    row = {"measure": "accuracy", "difference": 0.1, "p_value": 0.03, "p_holm": 0.09}
    assert plans._said(row) == "≈\u00a0indistinguishable (uncorrected: better)"
    assert answer.firm(row) == "indistinguishable"
    assert findings.verdict(row | {"p_holm": 0.04}) == "better"
    assert findings.verdict(row | {"p_holm": 0.04, "measure": "answer_nll"}) == "worse"


@pytest.mark.parametrize(
    ("selection", "difference", "p", "tried"),
    [("tail", 0.4, 0.001, True), ("tail", 0.4, 0.2, False), ("tail", -0.4, 0.001, False), ("block", 0.4, 0.001, False)],
)
def test_other_layers_are_named_where_leaving_them_out_costs_less(monkeypatch, search, selection, difference, p, tried):
    """`drop` stands for before_last here; the plan found minus it in nats a token."""
    reached = Reached(search)
    line = next(line for line in reached.lines if line["plan_id"] == "drop")
    line.update(kind="before_last", name="before_last")
    row = next(row for row in reached.comparisons if (row["measure"], row["plan_b"]) == ("text_nll", "drop"))
    row.update(difference=difference, p_value=p, p_holm=p)
    monkeypatch.setitem(search.config["plan"], "selection", selection)
    told = " ".join(answer.in_words(reached))
    assert ("plan.selection=block searches for other layers" in told) == tried
    assert ("dropping the layers before the last one costs less" in told) == tried
    # Qwen2.5-0.5B, five layers: perplexity 14 by block influence, 260 before the last; only the latter was named.
    other = next(line for line in reached.lines if line["plan_id"] == "fixed")
    other.update(kind="drop", name="block_influence", perplexity=line["perplexity"] / 2)
    row = next(row for row in reached.comparisons if (row["measure"], row["plan_b"]) == ("text_nll", "fixed"))
    row.update(difference=difference, p_value=p, p_holm=p)
    told = " ".join(answer.in_words(reached))
    assert ("dropping the layers of least block influence costs less" in told) == tried


def test_how_much_workers_were_used_is_on_the_page(tmp_path):
    run = search_run(tmp_path / "run")
    assert not any(
        "each worker spent scoring" in table.caption for table in blocks([searched.search(Reached(run))], Table)
    )
    used = {"worker": "worker-1", "candidates": 8, "scoring_seconds": 3.0, "present_seconds": 4.0, "utilisation": 0.75}
    facts = {"batch": 2, "concurrent": 1, "wall_seconds": 4.0, "candidates_this_call": 8, "share_not_scoring": 0.25}
    run.write_manifest(best={"plan_id": "found"}, bayes_search={**facts, "workers": [used]})
    (table,) = blocks([searched.search(Reached(run))], Table)
    pace = "bayes: 8 candidates in 4.0 s (2 per trial, 1 at a time); workers spent 75 % of it scoring"
    assert table.caption.endswith(pace)
    assert table.cells == (("bayes", "worker-1", "8", "3.0", "4.0", "75"),)


def test_what_layers_are_left_sums_to_one(search):
    _, figure = blocks([searched.coefficients(Reached(search))], Figure)
    found = [row for row in as_dicts(figure.rows) if row["series"] == "found_bayes"]
    stored = {
        row["source_layer"]: row["coefficient"]
        for row in search.read("coefficients").to_pylist()
        if row["plan_id"] == "found" and row["kept_layer"] == 2
    }
    assert [row["layer"] for row in found] == [2, 3, 4, 5]
    assert {row["layer"]: row["weight"] for row in found} == stored
    assert sum(row["weight"] for row in found) == pytest.approx(1.0)
    dropped = [row for row in as_dicts(figure.rows) if row["series"] == "drop"]
    assert [row["weight"] for row in dropped] == [1.0, 0.0, 0.0, 0.0]


def test_numbers_stand_out_from_their_cells(search):
    """White on viridis had a contrast of 3 at .6, where small text needs 4.5."""
    figure = blocks([searched.coefficients(Reached(search))], Figure)[1]
    colour = figure.views[0].spec["layer"][1]["encoding"]["color"]
    found = re.fullmatch(r"datum\.weight > ([\d.]+)", colour["condition"]["test"])
    assert (colour["condition"]["value"], colour["value"]) == ("#000", "#fff")
    for weight in np.linspace(0, 1, 101):
        channels = np.array(matplotlib.colormaps["viridis"](weight)[:3])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        light = 0.05 + linear @ (0.2126, 0.7152, 0.0722)
        assert (light / 0.05 if weight > float(found[1]) else 1.05 / light) >= 4.5, weight


def test_a_caption_says_how_many_alphas_it_leaves_out(tmp_path):
    run = search_run(tmp_path / "deep")
    rows = [{k: v for k, v in row.items() if k != "run_id"} for row in run.read("plans").to_pylist()]
    found = next(row for row in rows if row["name"] == "found_bayes" and row["step"] is not None)
    own = [found | {"step": step, "into": 40 - step, "remove": 41 - step, "alpha": 0.25} for step in range(40)]
    run.replace("plans", [row for row in rows if row["plan_id"] != found["plan_id"]] + own)
    figure = blocks([searched.coefficients(Reached(run))], Figure)[0]
    assert figure.caption.endswith(f"found_bayes: {', '.join(['0.25'] * 20)} and 20 more.")


def test_alphas_are_those_of_the_plans(search):
    figure, _ = blocks([searched.coefficients(Reached(search))], Figure)
    found = [row for row in as_dicts(figure.rows) if row["plan"] == "found_bayes"]
    assert [row["alpha"] for row in sorted(found, key=lambda row: row["step"])] == [0.1, 0.8, 0.3]
    assert {row["role"] for row in found} == {FOUND}
    ends = {row["plan"]: row["alpha"] for row in as_dicts(figure.rows) if row["label"]}
    assert ends == {"found_bayes": 0.3, "fixed_0.62": 0.62, "drop": 1.0}


def test_lines_that_end_together_have_one_label_above_them_all():
    ends = {"best of 5 random": 0.95, "drop": 1.0, "fixed": 0.62}
    rows = [{"plan": plan, "matrix": None, "step": 2, "alpha": alpha, "label": ""} for plan, alpha in ends.items()]
    searched._label_ends(rows)
    assert [row["label"] for row in rows] == ["", "best of 5 random, drop", "fixed"]


def test_a_plan_from_an_alpha_file_is_not_taken_for_the_control_of_its_name(tmp_path):
    run = search_run(tmp_path / "run", control="drop")
    run.replace("plans", [row | {"kind": "file"} if row["plan_id"] == "fixed" else row
                          for row in run.read("plans").drop_columns("run_id").to_pylist()])  # fmt: skip
    reached = Reached(run)
    told = {line["label"]: described(line).split(" (")[0] for line in reached.lines}
    assert told["drop"] == "last layers dropped" and told["drop (alpha file)"] == "given coefficients"
    against = {row["against"]: row["difference"] for row in subjects.difference_rows(reached)}
    assert against.keys() == {"base", "drop", "drop (alpha file)"}


def test_the_card_of_a_refitted_plan_names_the_families_of_its_comparisons(tmp_path):
    """Its comparisons are the second family, with all others that are not the best found's, but for one."""
    run = search_run(tmp_path / "run")
    others = comparison_rows("test", run.read("answers"), [("base", "drop"), ("base", "fixed"), ("drop", "fixed")])
    run.append("comparisons", others)
    (note, _) = summary.comparison_notes(run, "found")
    assert "(3 comparisons: " in note and "corrects for all of them, on" in note
    (note, _) = summary.comparison_notes(run, "fixed")
    assert "(3 comparisons: " in note and "corrects for all of those that are not the best found's, and in" in note


def test_a_stroke_in_a_name_ends_no_cell_of_the_card(tmp_path):
    lines = search_results(search_run(tmp_path / "run", control="mine | yours"), "found", "test")
    header, row, _ = [line for line in lines if line.startswith(("| plan", "| mine"))]
    assert row.startswith("| mine \\| yours | 3 |")
    assert row.replace("\\|", "").count("|") == header.count("|")


def test_the_name_of_an_alpha_file_may_have_a_comma(tmp_path):
    """The label of lines that end together was cut at commas to find its line: there was no page of such a run."""
    page = page_of([search_run(tmp_path / "run", control="mine, the second")], "raymerge report", Silent())
    (figure,) = [one for one in blocks(page.sections, Figure) if one.title == "Alpha of every merge step"]
    labels = {row["plan"]: row["label"] for row in as_dicts(figure.rows) if row["label"]}
    assert labels["mine, the second"] == "mine, the second"


def test_the_best_so_far_never_gets_worse(search):
    progress, descents = blocks([searched.search(Reached(search))], Figure)
    rows = as_dicts(progress.rows)
    best = [row["best"] for row in rows if row["kind"] == "candidate"]
    values = [row["value"] for row in search.read("trials").to_pylist() if row["searcher"] == "bayes"]
    np.testing.assert_array_equal(best, np.maximum.accumulate(values))
    assert {row["label"]: row["value"] for row in rows if row["kind"] == "control"} == {
        "drop": 0.45,
        "fixed_0.62": 0.56,
    }
    assert len(descents.rows.values) == 16
    # The objective is micro_accuracy, but losses of 0.5 to 2 are no accuracies.
    drawn = [layer["encoding"]["y"] for layer in descents.views[0].spec["layer"]]
    assert {y["axis"]["title"] for y in drawn} == {"loss (answer_nll)"}


def test_controls_at_nearly_the_same_value_share_a_label():
    """A line of text is 11 of a drawing's 268 pixels: labels of values 4 % apart covered each other."""
    assert searched._together([("a", 0.5), ("b", 0.54), ("c", 0.9), ("d", 0.95)], [0.0, 1.0]) == [
        ("a, b", pytest.approx(0.52)),
        ("c", 0.9),
        ("d", 0.95),
    ]


def test_perplexities_are_drawn_with_the_tables_intervals(search):
    """The caption promised intervals of each plan; the panel of perplexities had none."""
    (figure,) = blocks([plans.answer(Reached(search))], Figure)
    assert figure.title == "Accuracy and perplexity of every plan" and figure.columns == 2
    stored = {row["perplexity"]: row for row in search.read("perplexity").to_pylist()}
    for row in as_dicts(figure.rows):
        found = stored[row["perplexity"]]
        assert (row["perplexity_low"], row["perplexity_high"]) == (found["ci_low"], found["ci_high"])
    bars, points = figure.views[1].spec["layer"]
    assert bars["encoding"]["x"]["field"] == "perplexity_low" and bars["encoding"]["x2"]["field"] == "perplexity_high"
    assert points["mark"]["type"] == "point"


def test_a_caption_names_no_panel_that_is_not_there(tmp_path):
    """Without plain text it spoke of perplexity and two panels beside one of accuracies."""
    run = search_run(tmp_path / "run")
    run.replace("perplexity", [])
    section = plans.answer(Reached(run))
    for table in blocks([section], Table):
        assert "Perplexity" not in table.caption and "perplexity" not in table.header
        assert {len(row) for row in table.cells} == {len(table.header)}
    (figure,) = blocks([section], Figure)
    assert figure.title == "Accuracy of every plan" and len(figure.views) == figure.columns == 1
    assert "panel" not in figure.caption and "95 % intervals" in figure.caption


def test_points_at_the_ends_of_an_axis_are_whole(tmp_path, search):
    """Drawings that zoom are cut at their edges: half of each best candidate was, and the control's name above it."""
    for run in (search, sweep_run(tmp_path / "w"), sensitivity_run(tmp_path / "t")):
        for figure in blocks(run_sections(run, heading=None), Figure):
            for layer in (layer for view in figure.views for layer in view.spec["layer"]):
                if not isinstance(layer["mark"], dict) or layer["mark"]["type"] != "point":
                    continue
                for channel in (layer["encoding"][name] for name in "xy"):
                    scale = channel.get("scale", {})
                    free = channel["type"] == "quantitative" and "domain" not in scale
                    assert not free or scale["padding"] >= 6, (figure.title, channel["field"])
    (view,) = blocks([searched.search(Reached(search))], Figure)[0].views
    assert view.spec["layer"][0]["encoding"]["y"]["scale"]["padding"] >= 5 + 11  # a label above the line


def test_ticks_of_accuracies_close_to_each_other_are_told_apart():
    import vl_convert

    rows = [{"plan": name, "accuracy": at, "low": at - 0.007, "high": at + 0.007, "role": "control"}
            for name, at in [("drop", 0.2512), ("base", 0.2455)]]  # fmt: skip
    view = figures.intervals(
        rows, "", name="plan", value="accuracy", axis="accuracy", form=figures.SHARES, tips=[("plan", "plan")]
    )
    drawn = vl_convert.vegalite_to_svg(view.spec | {"width": 600, "datasets": {"rows": rows}})
    ticks = re.findall(r">([\d.]+%)<", drawn)
    assert len(ticks) >= 4 and len(set(ticks)) == len(ticks), ticks


def test_the_numbers_of_64_layers_do_not_run_into_one():
    import vl_convert

    cells = [{"series": "drop", "layer": layer, "weight": 0.0, "kept": 16, "percent": ""} for layer in range(16, 80)]
    view = figures.weight_cells(cells, "")
    drawn = vl_convert.vegalite_to_svg(view.spec | {"width": 650, "datasets": {"rows": cells}})
    numbers = [int(number) for number in re.findall(r"<text[^>]*opacity=\"1\"[^>]*>(\d+)</text>", drawn)]
    assert 10 < len(numbers) < 40, numbers


def test_names_of_plans_stay_inside_their_drawing(search):
    """Of 300 pixels, on a page of 390 they began left of the axis, cut off."""
    reached = Reached(search)
    found = 0
    for figure in blocks([searched.coefficients(reached), searched.search(reached)], Figure):
        for layer in (layer for view in figure.views for layer in view.spec["layer"]):
            if layer["mark"]["type"] == "text" and layer["encoding"].get("text", {}).get("field") == "label":
                assert "width" in layer["mark"]["limit"]["expr"]
                found += 1
    assert found == 2


def test_legends_of_strokes_show_the_whole_pattern():
    """In 8 pixels "aligned, folded" (8 on, 2 off, 2 on, 2 off) was as solid as "plain"."""
    rows = [{"k": k, "value": k, "method": "fixed", "variant": name} for name in ("plain", "folded") for k in (1, 2)]
    axes = {"x": ("k", "layers"), "y": ("value", "accuracy")}
    view = figures.lines(rows, "", **axes, series="method", dash="variant", tips=[])
    legend = view.spec["layer"][0]["encoding"]["strokeDash"]["legend"]
    assert legend["symbolSize"] ** 0.5 >= 2 * max(map(sum, vega.DASHES))


def test_a_ruined_candidate_leaves_the_axis_to_the_others(tmp_path):
    """Two blocks of a search at 1.8 nats, the others from .41 to .44: these, and all controls, were one line."""
    run = search_run(tmp_path / "run")
    rows = run.read("trials").to_pylist()
    assert blocks([searched.search(Reached(run))], Figure)[0].views[0].spec["layer"][0]["encoding"]["y"]["scale"] == {
        "zero": False, "nice": False, "padding": 16
    }  # fmt: skip
    run.replace("trials", [*rows, rows[0] | {"iteration": 8, "value": 0.01, "plan_id": "ruined"}])
    figure = blocks([searched.search(Reached(run))], Figure)[0]
    assert figure.views[0].spec["layer"][0]["encoding"]["y"]["scale"]["domain"] == [0.4, 0.65]
    assert "1 far worse candidate beyond the axis" in figure.caption
    assert "ruined" in {row["plan_id"] for row in as_dicts(figure.rows)}
    # A control as bad is shown, and the candidate with it: it was said to be beyond the axis.
    control = next(row for row in rows if row["searcher"] == "controls")
    run.replace("trials", [*run.read("trials").to_pylist(), control | {"iteration": 9, "value": 0.01}])
    figure = blocks([searched.search(Reached(run))], Figure)[0]
    assert "beyond the axis" not in figure.caption
    assert "domain" not in figure.views[0].spec["layer"][0]["encoding"]["y"]["scale"]


def test_differences_by_subject_are_paired(search):
    rows = subjects.difference_rows(Reached(search))
    assert [row["against"] for row in rows[:2]] == ["base", "base"]
    answers = search.read("answers").to_pylist()
    right = {(row["plan_id"], row["subject"], row["question_id"]): row["predicted"] == row["answer"] for row in answers}
    for row in rows:
        other = {"base": "base", "drop": "drop", "fixed_0.62": "fixed"}[row["against"]]
        numbers = sorted({key[2] for key in right if key[1] == row["subject"]})
        pair = [[right[plan, row["subject"], n] for n in numbers] for plan in ("found", other)]
        assert row["difference"] == pytest.approx(100 * (np.mean(pair[0]) - np.mean(pair[1])))
        assert row["low"] <= row["difference"] <= row["high"] and row["n"] == QUESTIONS // 2


def test_by_subject_the_best_is_held_against_eight_plans_on_the_report_s_questions_alone(tmp_path):
    """Eleven others, of which the second most accurate has answered another question; answers of another split; a
    category that a plan was not asked of."""
    subjects_ = ("astronomy", "college_physics", "law", "philosophy")
    run = search_run(tmp_path / "run", subjects=subjects_)
    draws = {
        f"r{i}": pairs_plan(LAYERS, [(2, 3), (2, 4), (2, 5)], [i / 10] * 3, name=f"alphas_{i}", kind="file")
        for i in range(8)
    }
    run.append("plans", [row for name, plan in draws.items() for row in rows.plan_rows(plan, name)], part="more")
    stored = run.read("answers").drop_columns("run_id").to_pylist()
    for i, name in enumerate(draws):
        hits = [row | {"plan_id": name, "predicted": (row["answer"] + (k % 10 >= 9 - i)) % 4}
                for k, row in enumerate(row for row in stored if row["plan_id"] == "fixed")]  # fmt: skip
        stored += [row | {"question_id": "x"} if (i, k) == (0, 0) else row for k, row in enumerate(hits)]
    other = [row | {"split": "validation", "predicted": (row["answer"] + 1) % 4} for row in stored[:200]]
    stored = [row for row in stored if not (row["plan_id"] == "drop" and row["subject"] == "philosophy")]
    run.replace("answers", [*stored, *other])
    run.replace("accuracy", derive_accuracy(run.read("answers")))
    reached, right = Reached(run), {}
    for row in stored:
        right.setdefault(row["plan_id"], {})[row["subject"], row["question_id"]] = row["predicted"] == row["answer"]
    names = {plan: f"alphas_{plan[1]}" for plan in draws} | {"base": "base", "fixed": "fixed_0.62"}
    ranked = sorted(
        (plan for plan in right if plan not in ("base", "found")), key=lambda p: -np.mean([*right[p].values()])
    )
    expected = [plan for plan in ["base", *ranked][:8] if plan not in ("r0", "drop")]
    assert "r0" in ranked[:3] and "drop" not in ranked[:7]

    found = subjects.difference_rows(reached)
    assert [*dict.fromkeys(row["against"] for row in found)] == [names[plan] for plan in expected]
    assert len(found) == 4 * len(expected) and {row["clear"] for row in found} == {"yes", "no"}
    for row, (plan, subject) in zip(found, itertools.product(expected, sorted(subjects_)), strict=True):
        pair = [np.array([own for (name, _), own in right[p].items() if name == subject]) for p in ("found", plan)]
        assert row["subject"] == subject and row["difference"] == pytest.approx(100 * np.mean(pair[0] * 1.0 - pair[1]))
        difference = paired_difference(*(side.astype(float) for side in pair), n_resamples=4000)
        assert (row["low"], row["high"]) == pytest.approx((100 * difference.ci_low, 100 * difference.ci_high))
        assert (row["clear"] == "yes") == (row["low"] * row["high"] > 0)

    section = subjects.differences(reached)
    (figure,), (table,) = blocks([section], Figure), blocks([section], Table)
    first = sorted(found[:4], key=lambda row: row["difference"])
    clear = sum(row["clear"] == "yes" for row in first)
    worst, top = (f"{wording.signed(row['difference'], 1)} ({row['subject']})" for row in (first[0], first[-1]))
    top = top.replace(" (", " points (")
    assert figure.caption.startswith(f"Against base: from {top} to {worst}; {clear} of 4 intervals exclude 0.")
    cells = {row[0]: row[1:] for row in table.cells}
    assert table.folded is False and len(cells) == 12 and cells["drop"][1] == "–" and cells["base"][1] != "–"
    known = [ok for (name, _), ok in right["drop"].items() if name in subjects_[:2]]
    assert cells["drop"][0].startswith(f"{100 * np.mean(known):.1f} % [")


def test_receipts_say_what_did_not_change(search):
    (figure,) = blocks([receipts.receipts(Reached(search))], Figure)
    assert "Differences in 2 tensor names under 2 plans, at most 75.0 % of the original's norm" in figure.caption
    assert "No tensor changed under drop" in figure.caption
    assert receipts.tensor_name("model.layers.12.mlp.up_proj.weight") == ("mlp.up_proj", "12")
    assert receipts.tensor_name("lm_head.weight") == ("lm_head.weight", "")


def test_of_a_layer_s_experts_the_one_that_changed_most_is_drawn(tmp_path):
    """128 experts of 48 layers are 18,432 tensors of a plan that moves them, in a drawing of 384 rows."""
    run, experts, changes = search_run(tmp_path), range(12), np.random.default_rng(0).uniform(0.8, 1, (3, 12))
    run.append("receipts", [
        {"plan_id": "found", "tensor": f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight",
         "max_abs_change": 0.1, "relative_change": float(changes[layer, expert])}
        for layer in range(3) for matrix in ("up_proj", "down_proj") for expert in experts
    ])  # fmt: skip
    (figure,) = blocks([receipts.receipts(Reached(run))], Figure)
    rows = [row for row in as_dicts(figure.rows) if "experts" in row["matrix"]]
    assert {row["matrix"] for row in rows} == {"mlp.experts.*.up_proj", "mlp.experts.*.down_proj"}
    assert sorted(row["relative"] for row in rows) == sorted(np.repeat(changes.max(1), 2))
    for row in rows:
        assert f".experts.{changes[int(row['layer'])].argmax()}." in row["tensor"]
    assert "Of a layer's experts the one that changed most is shown; the table has all." in figure.caption
    assert "Differences in 74 tensor names under 2 plans" in figure.caption


def test_receipts_count_what_changed_alone_and_draw_what_was_found_last(tmp_path):
    """Norms of a merged layer are among the receipts with a change of 0; a change that is no number is drawn nowhere,
    but is the one that stands for a layer's experts."""
    run = search_run(tmp_path)
    run.replace("receipts", [
        {"plan_id": plan, "tensor": f"model.layers.2.{name}.weight", "max_abs_change": most, "relative_change": change}
        for plan, name, most, change in (
            ("found", "mlp.experts.0.up_proj", 0.2, 0.5), ("found", "mlp.experts.1.up_proj", 9.0, float("nan")),
            ("found", "mlp.experts.2.up_proj", 0.3, 0.6), ("found", "input_layernorm", 0.0, 0.0),
            ("found", "mlp.gate", 0.01, 0.25), ("drop", "mlp.gate", 0.0, 0.0), ("fixed", "mlp.gate", 0.04, 0.125),
        )
    ])  # fmt: skip
    (figure,) = blocks([receipts.receipts(Reached(run))], Figure)
    assert [(row["matrix"], row["plan"], row["relative"], row["largest"]) for row in as_dicts(figure.rows)] == [
        ("input_layernorm", "found_bayes", 0.0, 0.0),
        ("mlp.experts.*.up_proj", "found_bayes", None, 9.0),
        ("mlp.gate", "drop", 0.0, 0.0),
        ("mlp.gate", "fixed_0.62", 0.125, 0.04),
        ("mlp.gate", "found_bayes", 0.25, 0.01),
    ]
    assert "Differences in 3 tensor names under 2 plans, at most 25.0 % of the original's norm" in figure.caption
    assert "No tensor changed" not in figure.caption and "the one that changed most" in figure.caption
    run.replace("receipts", [row for row in run.read("receipts").drop_columns("run_id").to_pylist()
                             if row["plan_id"] == "fixed"])  # fmt: skip
    (figure,) = blocks([receipts.receipts(Reached(run))], Figure)
    assert "No tensor changed under found_bayes, drop: layers are dropped there" in figure.caption
    assert "experts" not in figure.caption


# -- the other experiments


def test_a_curve_holds_every_way_against_dropping(tmp_path):
    run = sweep_run(tmp_path / "curve")
    reached = Reached(run)
    points = curve.curve(reached)
    assert [(p["merges"], p["method"]) for p in points] == [
        (0, "base"), (1, "drop"), (1, "fixed_0.5"), (3, "drop"), (3, "fixed_0.5"),
    ]  # fmt: skip
    assert [p["removed"] for p in points] == pytest.approx([0, 1 / 6, 1 / 6, 0.5, 0.5])
    (sentence, *_) = blocks([curve.answer(reached)], Text)
    assert (
        "With 1 layer merged, fixed_0.5 is the most accurate" in sentence.text
        and "(perplexity 6.50). " in sentence.text
    )
    assert "(perplexity 1,200, the unmerged model's is 5.00; it is ruined as a language model)." in sentence.text
    best, _ = blocks([curve.answer(reached)], Table)
    assert [row[0] for row in best.cells] == ["1", "3"]
    (receipt,) = blocks([curve.receipts(reached)], Figure)
    assert "Under drop nothing is averaged and no tensor changes" in receipt.caption
    assert "are renumbered" in receipt.caption  # dropped blocks stood at 1,400 %, unlike on a search's page unexplained
    (figure,) = blocks([curve.answer(reached)], Figure)
    stored = {row["plan_id"]: row for row in run.read("perplexity").to_pylist()}
    for point in points:
        limits = stored[point["plan_id"]]["ci_low"], stored[point["plan_id"]]["ci_high"]
        assert (point["perplexity_low"], point["perplexity_high"]) == limits
    assert "perplexity_low" in json.dumps(figure.views[1].spec)


def test_the_only_way_was_not_chosen_as_the_best_of_several(tmp_path):
    run = sweep_run(tmp_path / "curve")
    best, _ = blocks([curve.answer(Reached(run))], Table)
    assert "chosen as the best of several on these same questions" in best.caption
    dropped = run.read("sweep").drop_columns("run_id").to_pylist()
    run.replace("sweep", [row for row in dropped if row["method"] != "fixed_0.5"])
    best, _ = blocks([curve.answer(Reached(run))], Table)
    assert best.caption.startswith("The most accurate way at every K, against dropping as many layers. Unmerged:")


def test_another_name_of_dropping_is_held_to_be_dropping(tmp_path):
    run = sweep_run(tmp_path / "curve")
    points = run.read("sweep").drop_columns("run_id").to_pylist()
    points.sort(key=lambda row: row["method"] == "drop")
    again = [{"method": "fixed_1", "plan_id": f"drop{row['merges']}"} if row["method"] == "fixed_0.5" else {}
             for row in points]  # fmt: skip
    run.replace("sweep", [row | other for row, other in zip(points, again, strict=True)])
    best, _ = blocks([curve.answer(Reached(run))], Table)
    assert [(row[2], row[-1]) for row in best.cells] == [("fixed_1 and 1 more", "dropping is best")] * 2


def test_a_block_that_moves_layers_at_some_sizes_is_not_said_to_change_nothing(tmp_path):
    """With one layer it can be the last, with three others: it was said to change no tensor, above its own changes."""
    run = sweep_run(tmp_path / "curve")
    run.append("receipts", [{"plan_id": "drop3", "tensor": "model.layers.1.mlp.up_proj.weight", "max_abs_change": 0.1,
                             "relative_change": 0.7}], part="moved")  # fmt: skip
    (receipt,) = blocks([curve.receipts(Reached(run))], Figure)
    assert "Under drop (K = 1) nothing is averaged and no tensor changes" in receipt.caption


def test_a_model_of_infinite_perplexity_is_ruined_too(tmp_path):
    """Its perplexity was left out of the sentence and a dash in the tables, as if it had not been measured."""
    run = sweep_run(tmp_path / "curve")
    broken = {"perplexity": float("inf"), "ci_low": None, "ci_high": None}
    stored = run.read("perplexity").drop_columns("run_id").to_pylist()
    run.replace("perplexity", [row | (broken if row["plan_id"] == "half3" else {}) for row in stored])
    section = curve.answer(Reached(run))
    told = "(perplexity ∞, the unmerged model's is 5.00; it is ruined as a language model)."
    assert blocks([section], Text)[0].text.endswith(told)
    best, every = blocks([section], Table)
    assert best.cells[1][4] == "∞" and [row[-1] for row in every.cells if row[:2] == ("3", "fixed_0.5")] == ["∞"]
    (figure,) = blocks([section], Figure)
    assert "read" not in figure.rows.columns and "not drawn; the table below has them" in figure.caption


def test_a_curve_leaves_ruined_models_out_of_its_figure_of_perplexities(tmp_path):
    """900 and 1,200 against 5: in the table, but 6.5 and 7 could not be told apart beside them."""
    run = sweep_run(tmp_path / "curve")
    (figure,) = blocks([curve.answer(Reached(run))], Figure)
    spec = figure.views[1].spec
    (kept,) = spec["transform"]
    limit = float(kept["filter"].split("<= ")[1])
    assert kept["filter"].startswith("isNumber(datum['perplexity']) && ") and limit == pytest.approx(50.0)
    assert "transform" not in figure.views[0].spec and "above 10 times" in figure.caption
    _, every = blocks([curve.answer(Reached(run))], Table)
    assert {row[7].split(" [")[0] for row in every.cells} == {"5.00", "7.00", "6.50", "900", "1,200"}


def test_what_was_asked_names_refits_and_calibration(tmp_path):
    settings = {"merges": [2], "methods": ["drop_block"], "refits": ["none", "linear", "units"], "refitted_methods": []}
    settings |= {"alpha_files": {"base": "a/alphas.json", "best": "b/alphas.json"}}
    config = {"plan": {"ridge": None, "refit_layers": 1}, "sweep": settings,
              "calibration": {"text": "a.txt", "tokens": 4096}}  # fmt: skip
    run = RunDirectory.open(tmp_path / "run", config, "sweep")
    (facts,) = blocks([asked.asked(run)], Facts)
    told = {fact.term: (fact.value, fact.note) for fact in facts.facts}
    assert told["Refits"] == ("linear, units", "ridge chosen on held-out tokens, 1 layer after each seam too")
    assert told["Calibration"] == ("a.txt", "up to 4096 tokens")
    assert told["Alpha files"][0] == "base: a/alphas.json, best: b/alphas.json"


def facts_of(run, manifest=None):
    """Value and note by term, the manifest being this one."""
    run.manifest = lambda: manifest
    (facts,) = blocks([asked.asked(run)], Facts)
    assert len({fact.term for fact in facts.facts}) == len(facts.facts)
    return {fact.term: (fact.value, fact.note) for fact in facts.facts}


MADE = {
    "command": ["raymerge", "search", "a b.yaml"], "status": "complete", "started": "2026-11-30T01:02:03Z",
    "seconds": 3725.4, "raymerge_version": "0.1.0", "git_commit": "0123456789abcdef", "git_dirty": True,
    "python": "3.11.7", "packages": {"torch": "2.10", "ray": None}, "platform": "Linux",
    "model": {"identity": "m1"}, "seeds": {"data": 3, "search": 7}, "text_hash": "t1",
    "workers": [{"host": host, "device": "cpu", "dtype": "float32"} for host in ("a", "b", "b")],
}  # fmt: skip


def test_everything_that_a_search_was_asked_is_on_its_page(tmp_path):
    """Two searchers, a block, a refit, limits of both splits, three workers on two machines."""
    config = {
        "model": {"path": "org/tiny", "dtype": "bfloat16", "revision": "r1", "quantise": "int8"},
        "data": {"mmlu": "/data", "language": "fr", "subjects": "all", "shots": 5, "report_split": "test",
                 "search_split": "validation", "limit_per_subject": 8, "report_limit_per_subject": 40,
                 "perplexity_text": "demo", "perplexity_tokens": 4096},
        "tasks": {"piqa": {"format": "piqa", "file": "v.jsonl"}, "arc": {"format": "arc", "file": "c.parquet"}},
        "plan": {"merges": 4, "selection": "block", "block": "cosine", "base": "similarity_ratio", "ratio": 0.62,
                 "beta": 2.0, "similarity_run": "runs/s", "alignment": "neurons", "norms": "fold", "biases": "merge",
                 "refit": "units", "ridge": 0.01, "refit_layers": 2},
        "search": {"searcher": ["bayes", "gradient"], "objective": "answer_nll", "candidates": 30,
                   "random_candidates": 1, "perplexity_ceiling": 20.0},
        "gradient": {"starts": 3, "epochs": 50, "optimizer": "adam"},
        "calibration": {"text": None, "tokens": 12288},
    }  # fmt: skip
    run = RunDirectory.open(tmp_path / "k4", config, "search")
    told = facts_of(run, MADE | {"data": {"search": "s", "report": "r"}})
    assert told == {
        "Model": ("org/tiny", "dtype bfloat16, revision r1, quantised to int8, identity m1"),
        "Questions": ("/data, language fr, 5-shot", "subjects: all"),
        "Splits": ("searched on validation, reported on test",
                   "at most 8 per subject for the search; at most 40 per subject for the report"),
        "Plain text": ("demo", "up to 4096 tokens"),
        "Further tasks": ("piqa (piqa, v.jsonl), arc (arc, c.parquet)", ""),
        "Merges (K)": ("4, selection block, block cosine", "alignment neurons, norms fold, biases merge"),
        "Starting coefficients": ("similarity_ratio, beta 2.0", "runs/s"),
        "Search": ("bayes, gradient; 30 candidates; 3 descents of 50 epochs, adam", "1 random candidate as a control"),
        "Objective": ("answer_nll", "perplexity at most 20.0"),
        "Refits": ("units", "ridge 0.01, 2 layers after each seam too"),
        "Calibration": ("prompts of the search questions", "up to 12288 tokens"),
        "Seeds": ("data 3, search 7", ""),
        "Versions": ("raymerge 0.1.0, commit 0123456789 with uncommitted changes", "Python 3.11.7, torch 2.10"),
        "Machine": ("3 workers on 2 hosts, cpu, float32", "Linux"),
        "Time": ("2026-11-30T01:02:03Z", "last call 1 h 2 min"),
        "Run": (str(tmp_path / "k4"), f"run id {run.run_id}"),
    }  # fmt: skip
    assert asked.command_of(run) == "raymerge search 'a b.yaml'"
    run.config |= {"search": run.config["search"] | {"searcher": "gradient", "perplexity_ceiling": None}}
    run.config |= {"plan": run.config["plan"] | {"base": "fixed", "similarity_run": None, "refit": "none"}}
    del run.config["calibration"]
    changed = facts_of(run, MADE | {"text_hash": None, "git_dirty": False, "workers": [], "started": None})
    assert changed["Search"] == ("gradient; 3 descents of 50 epochs, adam", "1 random candidate as a control")
    assert changed["Objective"] == ("answer_nll", "")
    assert changed["Starting coefficients"] == ("constant 0.62", "")
    assert changed["Versions"][0] == "raymerge 0.1.0, commit 0123456789"
    gone = {"Refits", "Calibration", "Plain text", "Splits", "Machine", "Time"}
    assert set(told) - set(changed) == gone and set(changed) <= set(told)


def test_what_other_runs_were_asked_is_on_their_pages(tmp_path):
    """Of an evaluation: no search, nor the questions that one would have had; of a run under way: no manifest."""
    data = {"mmlu": "/data", "language": "en", "subjects": ["law"], "shots": 0, "report_split": "validation",
            "search_split": "validation", "limit_per_subject": 8, "report_limit_per_subject": 40}  # fmt: skip
    plan = {"merges": 4, "selection": "tail", "base": "fixed", "ratio": 0.62, "refit": "units", "ridge": None}
    model = {"path": "/models/tiny/", "dtype": "auto", "quantise": "none"}
    run = RunDirectory.open(tmp_path / "e", {"model": model, "data": data}, "evaluate")
    told = facts_of(run, {"status": "complete", "data": {"report": "r"}})
    assert set(told) == {"Model", "Questions", "Splits", "Versions", "Run"}
    assert told["Model"] == ("/models/tiny/", "dtype auto") and asked.model_name(run) == "tiny"
    assert told["Questions"] == ("/data, language en, 0-shot", "subjects: law")
    assert told["Splits"] == ("reported on validation", "at most 40 per subject for the report")
    assert set(facts_of(run)) == {"Model", "Questions", "Run"}
    assert asked.command_of(run) == "unknown: the run has no manifest"

    settings = {"merges": [1, 2], "methods": ["drop", "fixed:0.5"], "alignments": ["none", "neurons"],
                "norms": ["keep"], "refits": ["none", "linear"], "refitted_methods": ["drop"]}  # fmt: skip
    config = {"model": model, "data": data | {"mmlu": None}, "plan": plan, "sweep": settings,
              "calibration": {"text": "demo", "tokens": 99}}  # fmt: skip
    told = facts_of(RunDirectory.open(tmp_path / "w", config, "sweep"))
    assert {term: told[term] for term in told.keys() - {"Model", "Run"}} == {
        "Questions": ("none", ""),
        "Merges (K)": ("1, 2", ""),
        "Ways of merging": ("drop, fixed:0.5", "alignment none, neurons; norms keep"),
        "Refits": ("linear of drop", "ridge chosen on held-out tokens"),
        "Calibration": ("demo", "up to 99 tokens"),
    }

    compared = {"samples": 40, "split": "validation", "subsets": ["medical", "law"], "languages": ["es", "fr"],
                "measure": "npib", "embedding": "diffusion", "sigma": 8.0, "dimensions": 2, "pooling": "last",
                "shots": 0}  # fmt: skip
    told = facts_of(RunDirectory.open(tmp_path / "s", {"data": data, "similarity": compared}, "similarity"))
    assert told["Model"] == ("not stored", "") and told["Questions"] == ("/data", "subjects: law")
    assert told["Prompts"] == ("40 per subset of validation: medical, law", "languages: es, fr")
    assert told["Similarity"] == (
        "measure npib, embedding diffusion",
        "bandwidth 8.0, 2 dimensions, pooling last, 0-shot",
    )


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (None, ["This run has no manifest: it is still running or was killed. Here is what it has so far."]),
        ({}, []),
        ({"warnings": ["one thing", "another"]}, ["one thing.", "another."]),
    ],
)
def test_what_is_amiss_stands_before_the_answer(search, monkeypatch, manifest, told):
    monkeypatch.setattr(search, "manifest", lambda: manifest)
    assert [notice.text for notice in asked.unfinished(search)] == told


def test_a_domain_is_not_counted_as_one_subject(tmp_path):
    """ "3 subjects: anatomy, medical, virology" were four."""
    data = {"mmlu": "demo", "subjects": ["anatomy", "medical", "virology"]}
    run = RunDirectory.open(tmp_path / "run", {"data": data}, "evaluate")
    (facts,) = blocks([asked.asked(run)], Facts)
    assert {f.term: f.note for f in facts.facts}["Questions"] == "subjects: anatomy, medical, virology"


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"merges": 13, "selection": "list", "base": "file"}, "as many as the alpha file has, selection list"),
        (
            {"merges": None, "threshold": 0.5, "selection": "most_similar"},
            "until no similarity exceeds 0.5, selection most_similar",
        ),
        (
            {"merges": 3, "threshold": 0.5, "selection": "most_similar"},
            "3, or fewer once no similarity exceeds 0.5, selection most_similar",
        ),
        ({"merges": 3, "selection": "block", "block": "loss"}, "3, selection block, block loss"),
    ],
)
def test_what_was_asked_says_how_many_merges_there_are(tmp_path, plan, told):
    run = RunDirectory.open(tmp_path / "run", {"plan": plan}, "search")
    (facts,) = blocks([asked.asked(run)], Facts)
    assert {fact.term: fact.value for fact in facts.facts}["Merges (K)"] == told


def test_refits_of_one_method_are_ways_of_their_own(tmp_path):
    run = sweep_run(tmp_path / "curve")
    rows = [{k: v for k, v in row.items() if k != "run_id"} for row in run.read("sweep").to_pylist()]
    last = next(row for row in rows if row["plan_id"] == "half3")
    run.replace("sweep", [*rows, last | {"plan_id": "half1", "refit": "linear"}])
    points = curve.curve(Reached(run))
    assert [p["method"] for p in points if p["merges"] == 3] == ["drop", "fixed_0.5", "fixed_0.5 + linear"]


def test_accuracies_are_given_by_category_of_subjects(tmp_path):
    """From the answers: of two subjects of one category all questions count, and one that is no subject of MMLU not."""
    subjects_ = ("astronomy", "college_physics", "philosophy", "cooking")
    run = search_run(tmp_path / "s", subjects=subjects_)
    (table,) = subjects.categories(Reached(run))
    assert table.header == ("plan", "mmlu_stem", "mmlu_humanities")
    answers = run.read("answers").to_pandas()
    answers["right"] = answers["answer"] == answers["predicted"]
    plans_of = {line["label"]: line["plan_id"] for line in Reached(run).lines}
    assert sorted(plans_of) == sorted(cells[0] for cells in table.cells)
    for label, *cells in table.cells:
        for cell, members in zip(cells, (subjects_[:2], subjects_[2:3]), strict=True):
            own = answers[(answers["plan_id"] == plans_of[label]) & answers["subject"].isin(members)]["right"]
            low, high = wilson_interval(int(own.sum()), len(own))
            assert cell == f"{100 * own.mean():.1f} % [{100 * low:.1f}, {100 * high:.1f}]", label
    assert table.caption.endswith(f"Questions: mmlu_stem {QUESTIONS // 2}, mmlu_humanities {QUESTIONS // 4}")
    assert table in subjects.differences(Reached(run)).blocks
    assert subjects.categories(Reached(search_run(tmp_path / "one", subjects=("astronomy", "cooking")))) == []


def test_a_similarity_tells_of_its_own_examples_and_languages(tmp_path):
    def questions(run):
        (facts,) = blocks(run_sections(run, heading=None)[-1:], Facts)
        return {fact.term: fact.value for fact in facts.facts}["Questions"]

    assert questions(similarity_run(tmp_path / "s")) == "/data, language en"
    assert questions(search_run(tmp_path / "r")) == "/data, language en, 5-shot"


def test_similarity_is_held_against_noise(tmp_path):
    run = similarity_run(tmp_path / "s", subsets=("medical", "law", "math"), warnings=["too few samples"])
    (structure, agreement), notices = blocks([layers.answer(run)], Text), run_sections(run, heading=None)[0].blocks
    # 1 / (1 + distance) is above 0.3 up to a distance of 2: 9 of the 14 defined pairs of six layers
    assert structure.text.startswith(f"In {100 * 9 / 14:.0f} % of all pairs of layers, over 3 subsets")
    # intervals reach the ceiling sqrt(0.96 * 0.94) = 0.950 in the first pair alone
    assert "In 1 of 3 pairs" in agreement.text and "medical (en) and math (en)" in agreement.text.split("ceiling: ")[1]
    assert notices[0].text == "too few samples."
    heat, influence = blocks([layers.maps(run)], Figure)
    rows = as_dicts(heat.rows)
    assert len(rows) == 3 * 36 and len(heat.views) == 3
    (undefined,) = [r for r in rows if r["subset"] == "law (en)" and (r["layer_i"], r["layer_j"]) == (0, 5)]
    assert undefined["value"] is None and undefined["above"] == "" and undefined["note"] == "no entropy"
    assert len(influence.rows.values) == 18
    assert "does not mean that dropping the layer costs little" in influence.caption


def test_correlations_near_one_are_told_apart(tmp_path):
    """Cosines of a real model: "at 1.00 to 1.00", "Highest: 1.00. Lowest: 1.00", and five ticks named 1.00."""
    run = similarity_run(tmp_path / "s", subsets=("medical", "law", "math"))
    rows = run.read("similarity_correlation").drop_columns("run_id").to_pylist()
    near = {"ci_low": 0.9, "ci_high": 0.99999, "reliability_a": 1.0, "reliability_b": 1.0}
    near = [row | near | {"pearson_off_diagonal": r} for row, r in zip(rows, (0.9999, 0.9966, 0.998), strict=True)]
    run.replace("similarity_correlation", near)
    _, agreement = blocks([layers.answer(run)], Text)
    assert "correlate at 0.9966 to 0.9999 off" in agreement.text
    (figure,) = blocks([layers.correlations(run)], Figure)
    assert "law, 0.9999. Lowest:" in figure.caption and ", 0.9966." in figure.caption
    for layer in figure.views[0].spec["layer"]:
        assert "format" not in layer["encoding"]["x"]["axis"]  # of two decimals


def test_of_many_subsets_some_are_drawn_and_chance_is_reckoned_with(tmp_path):
    """14 subsets make 91 pairs: two-sided intervals of equal patterns leave some below their ceiling."""
    run = similarity_run(tmp_path / "s", subsets=[f"subject_{i}" for i in range(14)])
    rows = run.read("similarity_correlation").to_pylist()
    for number, row in enumerate(rows):  # the ceiling is sqrt(0.96 * 0.94)
        row |= {"pearson_off_diagonal": 0.5, "ci_low": 0.3, "ci_high": 0.9 - number / 1000 if number < 6 else 0.97}
    run.replace("similarity_correlation", [{k: v for k, v in row.items() if k != "run_id"} for row in rows])
    said = layers.in_words(run)[1]
    assert "In 85 of 91 pairs" in said and "(by chance alone up to 2 pairs would be): " in said
    pair = "{0[subset_a]} (en) and {0[subset_b]} (en)"
    assert f"{pair.format(rows[5])}, {pair.format(rows[4])}" in said and said.endswith(" and 2 more.")
    heat, influence = blocks([layers.maps(run)], Figure)
    first = [f"subject_{i} (en)" for i in range(12)]
    for figure in (heat, influence):
        assert list(dict.fromkeys(row["subset"] for row in as_dicts(figure.rows))) == first
        assert "Only the first 12 of 14 subsets are here" in figure.caption
    assert len(heat.views) == 12
    (pairs,) = blocks([layers.correlations(run)], Figure)
    assert as_dicts(pairs.rows)[0]["pair"].count("en") == 0  # the only language
    assert "Only the 30 highest and the 30 lowest of 91 are drawn" in pairs.caption


def test_degenerate_maps_are_said_to_say_nothing(tmp_path):
    run = similarity_run(tmp_path / "s")  # 40 samples, six layers

    def degenerate(**ranks):
        run.replace("degeneracy", [
            {"subset": subset, "language": "en", "layer": layer, "effective_rank": rank, "off_diagonal_mass": 0.1}
            for subset, mine in ranks.items() for layer, rank in enumerate(mine)
        ])  # fmt: skip
        return layers.answer(run), layers.maps(run).blocks[0]

    section, figure = degenerate(medical=[39.0] * 6, law=[1.0] * 6)
    (structure,) = blocks([section], Text)  # nothing of how the subsets' matrices agree
    assert structure.text.endswith("the maps say nothing about the model.") and "more than noise" not in structure.text
    assert {r["above"] for r in as_dicts(figure.rows)} == {"no", ""}
    assert [row[8:] for row in blocks([section], Table)[0].cells] == [("–", "1", "6")] * 2

    section, figure = degenerate(medical=[20.0] * 6, law=[38.0, 20.0, 20.0, 20.0, 20.0, 36.1])
    structure, _ = blocks([section], Text)
    # of the four layers of law that are left, 5 of 6 pairs are up to 2 apart; of medical's pairs 9 of 14
    assert structure.text.startswith(f"In {100 * 14 / 20:.0f} % of the pairs of layers")
    pairs = [row for row in run.read("similarity").to_pylist() if row["layer_i"] < row["layer_j"]]
    pairs = [row for row in pairs if row["subset"] != "law" or not {0, 5} & {row["layer_i"], row["layer_j"]}]
    sound = [row for row in pairs if row["value"] is not None]
    assert len(sound) == 20
    mean, unrelated = (np.mean([row[name] for row in sound]) for name in ("value", "null_mean"))
    assert f"On average it is {mean:.3f}, that of unrelated layers {unrelated:.3f}." in structure.text
    assert (
        "noise that layers and subsets share, count too: 2 layers of law (en)."
        in layers.correlations(run).blocks[0].caption
    )
    assert "degenerate, so that its similarities are noise, do not count (2 layers of law (en))" in structure.text
    assert [row[8:] for row in blocks([section], Table)[0].cells] == [("64", "1", "0"), ("83", "1", "2")]
    (cell,) = [r for r in as_dicts(figure.rows) if r["subset"] == "law (en)" and (r["layer_i"], r["layer_j"]) == (0, 1)]
    assert (cell["above"], cell["note"]) == ("no", "degenerate: noise")


def test_half_a_matrix_stands_for_both():
    cell = {"subset": "s", "language": "en", "value": 0.5}
    both = layers._both_halves([cell | {"layer_i": 0, "layer_j": 1}, cell | {"layer_i": 1, "layer_j": 1}])
    assert [(row["layer_i"], row["layer_j"]) for row in both] == [(0, 1), (1, 1), (1, 0)]


def test_sensitivity_names_the_setting_that_matters(tmp_path):
    (section,) = [s for s in run_sections(sensitivity_run(tmp_path / "s"), heading=None) if s.title == "The answer"]
    assert "The matrix of sigma = 8.0 agrees least with the reference (r = 0.20)" in blocks([section], Text)[0].text
    (figure,) = blocks([section], Figure)
    assert len(figure.rows.values) == 3 and not figure.title.endswith("?")  # the page puts a full stop after it
    assert "Settings without a mark are undefined" in figure.caption  # their lines were empty, and nothing said why


def test_merges_that_stay_the_same_are_those_of_changed_settings(tmp_path):
    run = sensitivity_run(tmp_path / "s")
    (row, *_) = run.read("sensitivity").to_pylist()
    unchanged = [("seed", "0", 1.0, None), ("threshold", "0.2", 1.0, "79 merges")]  # these would make 55 % a 78 %
    run.append("sensitivity", [
        row | {"parameter": parameter, "setting": setting, "plan_overlap": same, "reference": False, "note": note}
        for parameter, setting, same, note in unchanged
    ])  # fmt: skip
    run.config["similarity"]["seed"] = 0
    (text, *_) = blocks(run_sections(run, heading=None), Text)
    assert text.text.endswith("over all changed settings, 55 % of the merges stay the same.")


def test_notes_of_a_setting_are_those_of_all_subsets(tmp_path):
    run = sensitivity_run(tmp_path / "s")
    (row, *_) = run.read("sensitivity").to_pylist()
    why = "cosine needs pooling last or mean: sequences have no one state per sample"
    found = [("threshold", "0.2", "79 merges"), ("threshold", "0.2", "61 merges"), ("measure", "cosine", why),
             ("dimensions", "5", why), ("dimensions", "5", None)]  # fmt: skip
    run.replace("sensitivity", [
        row | {"parameter": parameter, "setting": setting, "reference": False, "note": note}
        for parameter, setting, note in found
    ])  # fmt: skip
    _, cells = summary.sensitivity_table(run)
    assert [row[-1] for row in cells] == ["61 to 79 merges", why, f"1 of 2 subsets: {why}"]


def test_undefined_settings_are_spoken_of_where_there_are_some(tmp_path):
    run = sensitivity_run(tmp_path / "s")
    rows = [row for row in run.read("sensitivity").to_pylist() if row["pearson_off_diagonal"] is not None]
    run.replace("sensitivity", rows)
    (figure,) = blocks(run_sections(run, heading=None), Figure)
    assert figure.caption.endswith("off the diagonal.")


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
    assert [len(table.header), *map(len, table.cells)] == [8, 8] and "over this table" in table.caption


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


def test_the_best_single_layer_is_called_so_and_the_others_are_not_drawn(tmp_path):
    run = search_run(tmp_path / "run")
    plans = [row | {"kind": "keep_one", "name": "keep_3"} if row["plan_id"] == "drop" else row
             for row in run.read("plans").drop_columns("run_id").to_pylist()]  # fmt: skip
    run.replace("plans", plans)
    trials = run.read("trials").drop_columns("run_id").to_pylist()
    control = next(row for row in trials if row["searcher"] == "controls")
    run.replace("trials", [*trials, control | {"iteration": 7, "plan_id": "not the best to keep", "value": 0.111}])
    reached = Reached(run)
    said = " ".join(answer.in_words(reached))
    assert "the best single layer kept (keep_3)" in said
    (line,) = (line for line in reached.lines if line["plan_id"] == "drop")
    assert described(line).startswith("one of the merged layers kept, the best to keep alone")
    (figure, *_) = blocks([searched.search(reached)], Figure)
    drawn = [row["label"] for row in as_dicts(figure.rows) if row["kind"] == "control"]
    assert any("keep_3" in label for label in drawn) and not any("not the best" in label for label in drawn)


def beside_one_layer(run, best="drop"):
    """What the answer says of the best single layer, of a search whose manifest names it."""
    manifest = run.manifest() | {"keep_one": {"best": best, "of": 4}}
    run.write_text(json.dumps(manifest), "manifest.json")
    reached = Reached(RunDirectory.load(run.path_of()))
    return reached, [each for each in answer.in_words(reached) if "keep one of the merged" in each]


@pytest.mark.parametrize(
    ("right", "text", "said"),
    [
        (0.8, 0, "By accuracy or answer NLL it is better than drop, the best of the plans that keep one of"),
        (0.8, 1, "By accuracy or answer NLL it is better than drop, the best of the plans that keep one of"),
        # It was said to gain nothing that the choice of a layer does not, after it was said to be better on text.
        (0.3, -1, "By loss per token it is better than drop, the best of the plans that keep one of"),
        (0.3, 1, "By accuracy, answer NLL or loss per token it is not better than drop, the best of the plans"),
        (0.3, None, "By accuracy or answer NLL it is not better than drop, the best of the plans that keep one"),
        (0.05, -1, None),
    ],
)
def test_the_answer_says_whether_averaging_gained_anything(tmp_path, right, text, said):
    right = {"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": right}
    run = search_run(tmp_path / "run", right=right)
    rows = run.read("comparisons").drop_columns("run_id").to_pylist()
    changed = [row | {"difference": text or 0.0} if row["measure"] == "text_nll" else row for row in rows]
    run.replace("comparisons", [row for row in changed if text is not None or row["measure"] != "text_nll"])
    assert not any("keep one of the merged" in paragraph for paragraph in answer.in_words(Reached(run)))
    reached, paragraphs = beside_one_layer(run)
    row = reached.against("found")["drop"]
    assert (row["p_holm"] < 0.05 and row["difference"] > 0) == (right["found"] > 0.5)
    assert [paragraph[: len(said)] for paragraph in paragraphs] == [said] if said else paragraphs == []
    # A search over blocks may have found another block than the one whose layers were kept.
    reached.run.config["plan"]["block"] = "search"
    assert [each for each in answer.in_words(reached) if "keep one of the merged" in each] == paragraphs, "of a tail"
    reached.run.config["plan"]["selection"] = "block"
    assert not any("keep one of the merged" in each for each in answer.in_words(reached))
    reached.run.config["plan"]["selection"] = "tail"
    reached.run.config["data"]["search_split"] = "test"  # where nothing is a test
    assert not any("keep one of the merged" in each for each in answer.in_words(reached))


@pytest.mark.parametrize("alphas", [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0)])
def test_what_averages_nothing_is_not_said_to_gain_by_it(tmp_path, alphas):
    """All of the weight on one layer, with another layer's norms: better than drop, but not by averaging."""
    run = search_run(tmp_path / "run", right={"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": 0.8}, alphas=alphas)
    reached, paragraphs = beside_one_layer(run)
    assert findings.verdict(reached.against("found")["drop"]) == "better" and paragraphs == []
    assert "It averages nothing: every layer of it has the weights of a single one." in answer.in_words(reached)


def test_the_best_single_layer_is_known_also_where_another_searcher_found_it(tmp_path):
    run = search_run(tmp_path / "run", right={"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": 0.8})
    plans = run.read("plans").drop_columns("run_id").to_pylist()
    again = [row | {"name": "found_random", "kind": "found"} for row in plans if row["plan_id"] == "drop"]
    run.replace("plans", [*(row for row in plans if row["plan_id"] != "found"), *again,
                          *(row for row in plans if row["plan_id"] == "found")])  # fmt: skip
    reached, (paragraph,) = beside_one_layer(run)
    (name,) = (line["name"] for line in reached.lines if line["plan_id"] == "drop")
    assert name == "found_random" and "averaging gained" in paragraph


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
    (table,) = [table for table in blocks(page.sections, Table) if table.caption.startswith("Every plan")][:1]
    assert "In brackets" not in table.caption  # nothing is merged or dropped


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
    assert own.cells[0][:3] == ("base", "the model as it is", "8")


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


def test_the_random_control_is_called_the_best_of_as_many_as_were_tried(tmp_path):
    run = search_run(tmp_path / "run")
    rows = run.read("plans").drop_columns("run_id").to_pylist()
    run.replace("plans", [row | {"kind": "random", "name": "random"} if row["plan_id"] == "fixed" else row
                          for row in rows])  # fmt: skip
    reached = Reached(run)
    assert reached.labels["fixed"] == "best of random"  # no trial of it stands in the table
    assert summary.budget_lines(run) == []
    (trial,) = [row for row in run.read("trials").drop_columns("run_id").to_pylist() if row["plan_id"] == "found"]
    drawn = [trial | {"searcher": "random", "iteration": i, "plan_id": f"drawn{i}"} for i in range(3)]
    run.append("trials", drawn[:1], part="random")
    assert "indistinguishable from the best of 1 random candidate;" in answer.in_words(Reached(run))[0]
    run.append("trials", [*drawn, drawn[0] | {"iteration": 3, "status": "failed", "value": None}], part="random")
    reached = Reached(run)
    assert reached.labels["fixed"] == "best of 3 random"
    section = plans.answer(reached)
    questions, _, budget = answer.in_words(reached)
    assert "indistinguishable from the best of 3 random candidates" in questions
    assert budget.startswith("The found plan is the best of 8 candidates, the random control the best of 3. ")
    assert "best of 3 random" in [row[0] for row in blocks([section], Table)[0].cells]
    lines = findings.plan_lines(run, "test")
    assert "best of 3 random" in [row[0] for row in summary.plan_table(lines)[1]]
    assert "best of 3 random" in [row[0] for row in summary.comparison_table(run, "found")[1]]
    assert summary.budget_lines(run)[0].startswith("The found plan is the best of 8 candidates")
    assert "(The found plan is the best of 8 candidates" in "\n".join(search_results(run, "found", "test"))
    assert any("best of 3 random" in line for line in search_results(run, "found", "test"))
    run.append("trials", [trial | {"searcher": "gradient_alphas"}], part="descended")
    assert "best of 8 candidates and 1 descent, the" in summary.budget_lines(run)[0]


def test_captions_of_imported_matrices_speak_of_no_noise_that_is_not_known(tmp_path):
    runs = {"imported": imported_run(tmp_path / "run", ["a", "b", "c"]), "own": similarity_run(tmp_path / "own")}
    captions = {
        name: " ".join(figure.caption for figure in blocks(run_sections(run, heading=None), Figure))
        for name, run in runs.items()
    }
    for words in ("White dot", "ceiling", "95 %"):
        assert words in captions["own"] and words not in captions["imported"]


def test_what_is_missing_is_said(tmp_path):
    config = {"model": {"path": "m"}, "data": {"report_split": "test"}}
    for experiment in ("search", "sweep", "similarity", "sensitivity", "evaluate", "import-similarity"):
        run = RunDirectory.open(tmp_path / experiment, config, experiment)
        text = unescape(render.to_html(page_of([run], "", Silent())))
        assert "no manifest: it is still running or was killed" in text and "the run has no rows in table" in text
    run = RunDirectory.open(tmp_path / "other", config, "another")
    assert "has no report for runs of another" in render.to_html(page_of([run], "", Silent()))


def test_a_search_that_has_not_got_to_its_report_yet(tmp_path):
    config = {"data": {"report_split": "test"}, "search": {"objective": "answer_nll"}}
    run = RunDirectory.open(tmp_path / "run", config, "search")
    assert "no manifest: it is still running or was killed" in render.to_html(page_of([run], "", Silent()))


TASKS = {"piqa": {"format": "piqa", "file": "piqa.jsonl"}}


def task_accuracy(plan_id, correct):
    low, high = wilson_interval(correct, 50)
    return {"plan_id": plan_id, "task": "piqa", "measure": "acc", "n": 50, "correct": correct, "accuracy": correct / 50,
            "standard_error": 0.07, "ci_low": low, "ci_high": high}  # fmt: skip


def test_an_evaluation_without_questions_has_its_perplexity_and_its_tasks(tmp_path):
    """It said that rows were left out, and that the same command again would go on."""
    data = {"mmlu": None, "language": "en", "subjects": "all", "shots": 5, "report_split": "test"}
    data |= {"perplexity_text": "book.txt", "perplexity_tokens": 600}
    run = RunDirectory.open(tmp_path / "run", {"model": {"path": "m"}, "data": data, "tasks": TASKS}, "evaluate")
    run.begin()
    run.append("perplexity", [rows.text_perplexity_row("base", text_losses(7.5, np.random.default_rng(0)), "a text")])
    run.append("task_accuracy", [task_accuracy("base", 40)])
    run.append("plans", rows.plan_rows(base_plan(LAYERS), "base"))
    run.write_manifest(text_hash="x")
    answer, further, asked_of = run_sections(run, heading=None)
    assert "Its perplexity on plain text is 7.50 [" in blocks([answer], Text)[0].text
    (table,) = blocks([answer], Table)
    assert table.header == ("plan", "what it is", "layers", "perplexity")
    assert table.cells[0][:2] == ("base", "the model as it is")
    assert further.title == "Further tasks"
    assert further.blocks[0].cells == (("base", "piqa", "50", "acc", "0.8000 ± 0.0700 [0.670, 0.888]"),)
    (facts,) = blocks([asked_of], Facts)
    known = {fact.term: fact.value for fact in facts.facts}
    assert known["Questions"] == "none" and known["Further tasks"] == "piqa (piqa, piqa.jsonl)"
    assert "Not shown" not in unescape(render.to_html(page_of([run], "", Silent())))
    # Beside a run that asked questions it has no place in the figure of accuracies, but stands in the table.
    page = page_of([run, search_run(tmp_path / "search")], "", Silent())
    (table, *_) = blocks(page.sections[:1], Table)
    assert table.cells[0][0] == "run" and table.cells[0][6:] == ("–", "–", "7.50", "–")
    (figure, *_) = blocks(page.sections[:1], Figure)
    assert {row["run"] for row in as_dicts(figure.rows)} == {"search"}
    assert blocks(page_of([run, run], "", Silent()).sections[:1], Figure) == []


def test_a_search_that_reports_on_tasks_alone_speaks_of_no_plain_text(tmp_path, capsys):
    run = search_run(tmp_path / "run", objective="text_nll")
    run.config["data"] |= {"mmlu": None}
    run._store_config()
    for table in ("answers", "accuracy", "perplexity", "text_losses", "comparisons"):
        run.replace(table, [])
    run.append("task_accuracy", [task_accuracy("base", 40), task_accuracy("found", 30)])
    run = RunDirectory.load(run.path_of())
    card = search_results(run, "found", "test")
    assert card[0] == "On the tasks below, none of which the search saw."
    assert any(line.startswith("| found_bayes | piqa | 50 | acc |") for line in card)
    assert not any(line.startswith("| against") for line in card)
    sections = run_sections(run, heading=None)
    captions = [table.caption for table in blocks(sections, Table)]
    assert captions[0].startswith("Every plan. No questions were asked, and no plain text was read")
    console.print_search(run, "test")
    assert "On plain text:" not in capsys.readouterr().out


def test_a_sweep_on_tasks_alone_names_no_best_way(tmp_path, capsys):
    """It named the first method as the one of lowest perplexity, a dash."""
    run = sweep_run(tmp_path / "run")
    run.config["data"] |= {"mmlu": None}
    run._store_config()
    for table in ("answers", "accuracy", "perplexity", "text_losses", "comparisons"):
        run.replace(table, [])
    run.append("task_accuracy", [task_accuracy("base", 40), task_accuracy("half1", 30)])
    run = RunDirectory.load(run.path_of())
    section, further, *_ = run_sections(run, heading=None)
    told = "No questions were asked, and no plain text was read: the points were evaluated on tasks only, see below."
    assert [text.text for text in blocks([section], Text)] == [told] and further.title == "Further tasks"
    assert [table.caption for table in blocks([section], Table)] == ["All 5 points"]
    assert not blocks([section], Figure)
    console.print_sweep(run, "test")
    assert "has the lowest" not in capsys.readouterr().out


def test_tasks_stand_on_the_page_of_a_search_with_the_comparisons_of_the_best(tmp_path):
    run = search_run(tmp_path / "run")
    run.append("task_accuracy", [task_accuracy("base", 40), task_accuracy("found", 30)])
    run.append("task_comparisons", [
        {"plan_a": "found", "plan_b": other, "task": "piqa", "measure": "acc", "difference": -0.2, "ci_low": -0.3,
         "ci_high": -0.1, "p_value": 0.01, "p_holm": 0.02, "test": "mcnemar_exact"}
        for other in ("base", "drop")
    ])  # fmt: skip
    (section,) = (each for each in run_sections(run, heading=None) if each.title == "Further tasks")
    accuracies, differences = section.blocks
    assert [row[0] for row in accuracies.cells] == ["base", "found_bayes"]
    assert [row[2:5] for row in differences.cells] == [
        ("found_bayes", "base", "-0.2000"),
        ("found_bayes", "drop", "-0.2000"),
    ]
    assert all(row[-1] == "worse" for row in differences.cells)


@pytest.mark.parametrize(("least", "log"), [(1e-6, True), (0.0, False), (-2e-16, False)])
def test_block_influence_is_drawn_and_named_on_a_logarithmic_axis_where_all_of_it_is_positive(tmp_path, least, log):
    """0 is a layer that changes nothing, and rounding can leave less."""
    run = similarity_run(tmp_path / "run")
    stored = run.read("block_influence").to_pylist()
    run.replace("block_influence", [row | ({"value": least} if row["layer"] == 2 else {}) for row in stored])
    _, influence = blocks([layers.maps(run)], Figure)
    axis = influence.views[0].spec["layer"][0]["encoding"]["y"]
    assert (axis["scale"].get("type") == "log") == ("(log scale)" in axis["axis"]["title"]) == log
    assert log or axis["scale"]["zero"] is False  # values near each other are told apart
    assert f"Least: layer 2 on medical (en), {least:.3g}." in influence.caption


def test_a_search_for_one_subject_is_answered_on_that_subject(tmp_path):
    everything = search_run(tmp_path / "everything")
    assert "The search asked only" not in "".join(
        block.text for block in blocks([plans.answer(Reached(everything))], Text)
    )
    run = search_run(tmp_path / "run", objective="accuracy:exams, anatomy")  # a domain and a subject, as they are named
    run.append("subject_comparisons", [
        {"plan_a": "found", "plan_b": other, "split": "test", "subjects": "a,b,anatomy", "n": 40, "measure": measure,
         "difference": difference, "ci_low": difference - 0.1, "ci_high": difference + 0.1, "p_value": p, "p_holm": p,
         "test": "mcnemar_exact"}
        for other, difference, p in (("base", -0.2, 0.01), ("fixed", 0.2, 0.3))
        for measure in ("accuracy", "answer_nll")
    ])  # fmt: skip
    answer = plans.answer(Reached(run))
    assert [block.text for block in blocks([answer], Text) if block.text.startswith("The search asked only")] == [
        "The search asked only questions of exams, anatomy. By accuracy on the 40 test questions of exams, anatomy, "
        "found_bayes is indistinguishable from fixed_0.62; worse than the unmerged model. By answer NLL it is better "
        "than the unmerged model; indistinguishable from fixed_0.62."
    ]
    table = blocks([answer], Table)[1]
    assert "corrects for all 2 comparisons" in table.caption
    assert table.header == ("against", "accuracy", "verdict, p (Holm)", "answer NLL", "verdict, p (Holm)")
    assert {row[0]: row[1:] for row in table.cells} == {  # broken, if at all, between the verdict and its p
        "base": ("−20.0 [−30.0, −10.0]", "▼\u00a0worse, p\u00a00.010\u00a0(0.010)",
                 "−0.200 [−0.300, −0.100]", "▲\u00a0better, p\u00a00.010\u00a0(0.010)"),
        "fixed_0.62": ("+20.0 [+10.0, +30.0]", "≈\u00a0indistinguishable, p\u00a00.30\u00a0(0.30)",
                       "+0.200 [+0.100, +0.300]", "≈\u00a0indistinguishable, p\u00a00.30\u00a0(0.30)"),
    }  # fmt: skip


# -- the page


def test_a_page_of_one_run_and_one_of_several(tmp_path):
    """Of one the question leads and what is amiss stands in the answer; of several both stand below each run's name."""
    searches = [search_run(tmp_path / name) for name in ("k3", "k4")]
    alike, curve_ = similarity_run(tmp_path / "alike"), sweep_run(tmp_path / "curve")
    searches[1].begin()  # its manifest is gone: it goes on

    def outline(page):
        return [(section.level, section.title, section.short) for section in page.sections]

    own = ["The answer", "The merge coefficients", "The search", "Subject by subject", "Receipts: what was changed"]
    titles = {
        "k3": ("Merging layers of tiny: searched coefficients", own),
        "alike": ("Layer similarity of tiny", ["The answer", "Similarity of layers", "Do subsets differ?"]),
        "k4": ("Merging layers of tiny: searched coefficients", own),
        "curve": ("Merging layers of tiny: the compression curve", ["The answer", "Receipts: what was changed"]),
    }
    page = page_of(searches[1:], "raymerge report k4", Silent())
    assert (page.title, page.several) == (titles["k4"][0], False) and page.lead.startswith("To make a language model")
    assert page.made.endswith(" UTC: raymerge report k4")
    assert outline(page) == [(3, title, "") for title in [*own, "Configuration", "Glossary"]]
    assert page.sections[0].blocks[0].text.startswith("This run has no manifest")

    two = page_of([alike, searches[0]], "raymerge report", Silent())
    assert (two.title, two.lead, two.several) == ("2 runs of raymerge", "similarity: alike; search: k3.", True)

    page = page_of([searches[0], alike, searches[1], curve_], "raymerge report", Silent())
    assert (page.title, page.several) == ("4 runs of raymerge", True)
    assert page.lead == "search: k3, k4; similarity: alike; sweep: curve."
    assert outline(page) == [
        (2, "The runs, side by side", ""),
        *(
            line
            for name, (title, inside) in titles.items()
            for line in [(2, f"{name}: {title}", name), *((3, each, "") for each in [*inside, "Configuration"])]
        ),
        (2, "Glossary", ""),
    ]
    *others, last = blocks(page.sections[:1], Table)
    assert (last.caption, [row[0] for row in last.cells]) == ("Runs without evaluated plans", ["alike"])
    assert not any("alike" in row for table in others for row in table.cells)
    amiss = [
        section for section in page.sections if "no manifest" in "".join(b.text for b in blocks([section], Notice))
    ]
    assert [section.short for section in amiss] == ["k4"]
    leads = [section.blocks[0].text[:8] for section in page.sections[1:] if section.short]
    assert leads == ["To make ", "How alik", "To make ", "More and"]


def test_sections_of_what_a_run_does_not_have_are_left_out(tmp_path):
    def titles(run):
        return [section.title for section in run_sections(run, heading=None)]

    def without(run, *tables):
        for table in tables:
            run.replace(table, [])
        return titles(run)

    search, alike = search_run(tmp_path / "search"), similarity_run(tmp_path / "alike")
    assert without(alike, "similarity_correlation") == ["The answer", "Similarity of layers", "Configuration"]
    assert without(alike, "similarity") == ["The answer", "Configuration"]
    search.config["data"]["mmlu"] = None
    asked_nothing = without(search, "answers", "accuracy", "comparisons")
    assert "Subject by subject" not in asked_nothing and "The search" in asked_nothing
    assert without(search, "plans", "perplexity", "text_losses") == ["The answer", "Configuration"]
    assert without(sweep_run(tmp_path / "curve"), "sweep") == ["The answer", "Configuration"]


def test_an_evaluation_gives_every_subject_its_own_numbers(tmp_path):
    """80 questions of one and 40 of the other: the two averages differ."""
    data = {"mmlu": "/data", "subjects": "all", "report_split": "test"}
    run = RunDirectory.open(tmp_path / "e", {"model": {"path": "org/tiny"}, "data": data}, "evaluate")
    evaluated(run, {"base": base_plan(LAYERS)}, {"base": 0.5}, subjects=("law", "law", "maths"),
              perplexities={"base": 12.5}, pairs=[], seed=4)  # fmt: skip
    run.append("perplexity", [
        {"plan_id": "base", "target": "question", "subject": subject, "tokens": 9, "nll": 0.1, "perplexity": read}
        for subject, read in (("law", 2.5), ("maths", 3.5))
    ], part="q")  # fmt: skip
    right = {}
    for row in run.read("answers").to_pylist():
        right.setdefault(row["subject"], []).append(row["predicted"] == row["answer"])
    stored = run.read("accuracy").drop_columns("run_id").to_pylist()
    run.append("accuracy", [row | {"split": "validation"} for row in stored], part="other")
    run.write_manifest(command=["x"])
    (answer_, *_) = run_sections(run, heading=None)
    shares = {name: np.mean(own) for name, own in right.items()}
    both = np.mean(sum(right.values(), []))
    low, high = wilson_interval(sum(map(sum, right.values())), 120)
    assert shares["law"] != shares["maths"] and answer_.blocks[0].text == (
        f"tiny answers {100 * both:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of 120 test questions in 2 subjects, "
        f"{100 * np.mean([*shares.values()]):.1f} % as a mean over subjects. Its perplexity on plain text is 12.5."
    )
    cells = answer_.blocks[-1].cells
    assert [row[0] for row in cells] == sorted(right, key=shares.get, reverse=True)
    for name, n, accuracy, _, read in cells:
        limits = wilson_interval(sum(right[name]), len(right[name]))
        assert n == str(len(right[name])) and read == {"law": "2.50", "maths": "3.50"}[name]
        assert accuracy == f"{100 * shares[name]:.1f} % [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]"
    (figure,) = blocks([answer_], Figure)
    drawn = [(row["subject"], row["accuracy"], row["n"]) for row in as_dicts(figure.rows)]
    assert drawn == [(row[0], pytest.approx(shares[row[0]]), int(row[1])) for row in cells]
    assert all(row["low"] < row["accuracy"] < row["high"] for row in as_dicts(figure.rows))
    (chance,) = [
        layer for layer in figure.views[0].spec["layer"] if layer["mark"]["type"] == "rule" and "data" in layer
    ]
    assert chance["encoding"]["x"]["datum"] == 0.25


def test_a_page_explains_the_words_that_it_uses_and_no_others(tmp_path):
    def words(*runs):
        *_, last = page_of(runs, "raymerge report", Silent()).sections
        return [term for term, _ in last.blocks[0].cells] if last.title == "Glossary" else []

    search, alike = search_run(tmp_path / "search"), similarity_run(tmp_path / "alike")
    evaluation = RunDirectory.open(tmp_path / "evaluation", {"model": {"path": "m"}}, "evaluate")
    assert "accuracy" in words(evaluation) and not {"alpha", "p (Holm)", "ceiling"} & set(words(evaluation))
    assert "ceiling" in words(alike) and not {"accuracy", "alpha"} & set(words(alike))
    assert words(search, alike) == words(search) + words(alike)
    assert words(sensitivity_run(tmp_path / "sensitivity")) == []


def test_hostile_names_do_nothing(tmp_path):
    run = search_run(tmp_path / "run", found=HOSTILE, control=f"'{HOSTILE}", subjects=(HOSTILE, "${alert(3)}"))
    alike = similarity_run(tmp_path / "alike", subsets=(HOSTILE, "b"), warnings=[HOSTILE])
    html = render.to_html(page_of([run, alike], HOSTILE, Silent()))
    outline = Outline(html)
    counts = {tag: sum(name == tag for name, _ in outline.tags) for tag in ("img", "script", "iframe", "object")}
    figure_count = sum("data-figure" in attrs for _, attrs in outline.tags)
    assert counts == {"img": 0, "script": figure_count + 3, "iframe": 0, "object": 0}
    assert not [attrs for _, attrs in outline.tags if any(name.startswith("on") for name in attrs)]
    assert HOSTILE in "".join(outline.text)  # shown as what it is
    datas = re.findall(r'<script type="application/json">(.*?)</script>', html, flags=re.DOTALL)
    assert len(datas) == figure_count and HOSTILE in {v for d in datas for row in json.loads(d)["rows"] for v in row}


def test_no_specification_holds_foreign_text_as_an_expression(tmp_path):
    """Names stand in data, or where Vega-Lite takes plain strings: lists of values, options, titles."""
    run = search_run(tmp_path / "run", found=HOSTILE, subjects=(HOSTILE, "b"))

    def expressions(spec):
        if isinstance(spec, dict):
            for key, value in spec.items():
                if key in ("expr", "signal", "test", "calculate") or (key == "filter" and isinstance(value, str)):
                    yield value
                yield from expressions(value)
        elif isinstance(spec, list):
            for value in spec:
                yield from expressions(value)

    for figure in blocks(run_sections(run, heading=None), Figure):
        for view in figure.views:
            assert not any("alert" in text for text in expressions(view.spec))


def test_the_page_needs_nothing_else(search):
    outline = Outline(render.to_html(page_of([search], "raymerge report k3", Silent())))
    for tag, attrs in outline.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:,")), (tag, attrs)
    style = (render.files("raymerge.report") / "assets" / "page.css").read_text(encoding="utf-8")
    assert "@import" not in style and "url(" not in style
    policy = [a["content"] for t, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0].startswith("default-src 'none'; ")


def test_every_figure_says_where_its_rows_lie_and_what_made_them(search):
    sections = run_sections(search, heading=None)
    text = unescape(render.to_html(page_of([search], "", Silent())))
    for figure in blocks(sections, Figure):
        assert figure.rows.values and figure.command == "raymerge search made.yaml"
        for table, path in figure.rows.sources:
            assert path == search.path_of("tables") + f"/{table}/*.parquet" and path in text
        for view in figure.views:
            assert len(view.description) > 20 and view.description in text
    assert shlex.join(["raymerge", "search", "made.yaml"]) in text


def test_anchors_and_labels_are_there(search):
    outline = Outline(render.to_html(page_of([search], "", Silent())))
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in outline.tags:
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
    assert ("html", {"lang": "en"}) in outline.tags
    assert [tag for tag, _ in outline.tags if tag in ("h1", "h2", "h3")].count("h1") == 1


def test_specifications_compile(tmp_path, search):
    """Vega-Lite itself takes every specification, without a warning for a word that it does not know."""
    import vl_convert

    runs = [search, sweep_run(tmp_path / "w"), similarity_run(tmp_path / "s"), sensitivity_run(tmp_path / "t")]
    seen = 0
    for run in runs:
        for figure in blocks(run_sections(run, heading=None), Figure):
            for view in figure.views:
                compiled = vl_convert.vegalite_to_vega(view.spec | {"datasets": {"rows": as_dicts(figure.rows)}})
                names = {signal["name"] for signal in _signals(compiled)}
                assert set(view.zoom.values()) <= names, (figure.title, names)
                seen += 1
    assert seen >= 12


def _signals(vega):
    return vega.get("signals", []) + [s for mark in vega.get("marks", []) for s in _signals(mark)]


def test_the_library_cannot_end_its_own_script():
    assert render.contained("a = '</script>'") == "(function(){a = '<\\/script>'})();"


def test_no_line_of_the_page_ends_between_a_number_and_its_per_cent_sign(search):
    page = render.to_html(page_of([search], "", Silent()))
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    assert re.search("\\d\N{NO-BREAK SPACE}%", text) and not re.search(r"\d\s*[ \n]%", text)


def test_json_in_a_script_element_ends_nothing():
    text = str(render.json_for_script({"a": "</script><!--&", "b": "\u2028", "c": None}))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--&", "b": "\u2028", "c": None}


def test_rows_on_the_page_are_numbers_json_knows():
    rows = Rows.of([{"a": float("inf"), "b": 1 / 3, "c": float("nan"), "d": 2, "e": "x", "f": None}], ())
    figure = Figure("t", "c", (View({}, "d"),), rows, "command")
    assert render.figure_data(figure)["rows"] == [[None, 0.3333333, None, 2, "x", None]]
    page = Page("t", "l", (Section("s", (figure,)),), "made")
    assert '"rows":[[null,0.3333333,null,2,"x",null]]' in render.to_html(page)


def test_write_report_says_where_it_cannot_write(tmp_path, search, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    path = report.write_report([search.path_of()], tmp_path / "deep" / "page.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    assert report.write_report([search.path_of()]).name == "report.html"
    for one in (search.path_of(), search):  # as in a notebook: a run, or where it is
        assert report.write_report(one, tmp_path / "one.html").read_text(encoding="utf-8").count("found_bayes") > 1
    with pytest.raises(RunError, match="--out FILE.html"):
        report.write_report([search.path_of()] * 2)
    with pytest.raises(RunError, match="is a folder"):
        report.write_report([search.path_of()], tmp_path)
    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(RunError, match="could not write .*report.html: .*Read-only.*--out FILE.html puts the page"):
        report.write_report([search.path_of()])
    with pytest.raises(RunError, match="is not a run directory"):
        report.write_report([tmp_path / "nothing"])
    with pytest.raises(RunError, match="at least one"):
        report.write_report([])


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (wording.percent(0.5583), "55.8 %"),
        (wording.percent(None), "–"),
        (wording.percent(float("nan")), "–"),
        (wording.points(-0.0167), "−1.7"),
        (wording.points(0.00004), "0.0"),
        (wording.signed(0.25, 1), "+0.2"),
        (wording.signed(float("-inf"), 3), "−∞"),
        (wording.p_value(0.0002), "< 0.001"),
        (wording.p_value(0.0431), "0.043"),
        (wording.p_value(0.5234), "0.52"),
        (wording.perplexity(5.1514), "5.15"),
        (wording.perplexity(26.306), "26.3"),
        (wording.perplexity(31010.2), "31,010"),
        (wording.perplexity(4997328.0), "5.0e+06"),
        (wording.perplexity(float("inf")), "∞"),
        (wording.perplexity(None), "–"),
        (wording.value(-0.5, 2), "−0.50"),
        (wording.duration(290.1), "4 min 50 s"),
        (wording.duration(4000), "1 h 6 min"),
        (wording.duration(2.04), "2.0 s"),
        (wording.plural(1, "pair"), "1 pair"),
        (wording.plural(1200, "pair"), "1,200 pairs"),
        (wording.value(None), "–"),
        (wording.value(float("nan"), 1), "–"),
        (wording.millions(1777088000), "1.78 billion"),
        (wording.millions(187191296), "187 million"),
        (wording.millions(2345678), "2.35 million"),
        (wording.listed(list("abcdefghij"), 3), "a, b, c and 7 more"),
    ],
)  # fmt: skip
def test_numbers_as_text(made, text):
    assert made == text


def test_a_p_below_the_limit_is_not_rounded_to_it():
    """Beside "better" stood p 0.050, of which the glossary says that it tells nothing apart."""
    assert [wording.p_value(p) for p in (0.0494, 0.0496, 0.05, 0.0504)] == ["0.049", "< 0.05", "0.050", "0.050"]
    assert [summary._p(p) for p in (0.0496, 0.04998, 0.05)] == ["0.0496", "<0.05", "0.05"]


@pytest.mark.parametrize("values", [(3.65, 4.12), (3.65, 3.66), (9, 11), (9, 21), (0.02, 0.03), (8.9, 287), (1, 5000)])
def test_a_logarithmic_axis_has_ticks_where_values_are_near_to_each_other(values):
    inside = [tick for tick in vega.log_ticks(list(values)) if min(values) <= tick <= max(values)]
    assert 2 <= len(inside) <= 12
    assert vega.log_ticks([5.0, 5.0]) == [5.0]


def test_ticks_of_a_logarithmic_axis_are_round_and_neither_few_nor_many():
    assert vega.log_ticks([90.0, 7.0, 2.0]) == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert vega.log_ticks([3.0, 2000.0]) == [1, 10, 100, 1000, 10000]
    assert vega.log_ticks([12.5, 10.5]) == [11, 12]
    assert vega.log_ticks([0.033, 0.019]) == [0.02, 0.025, 0.03]
    assert vega.log_ticks([20.0, 24.0, 30.0]) == [20, 25, 30]
    rng = np.random.default_rng(0)
    for low, factor in zip(10 ** rng.uniform(-6, 6, 300), 10 ** rng.uniform(0.01, 6, 300), strict=True):
        ticks = vega.log_ticks([low * factor, low])
        within = [tick for tick in ticks if low <= tick <= low * factor]
        assert 2 <= len(within) <= 9 and ticks == sorted(ticks), (low, factor)
        steps = {float(f"{tick:.3e}".split("e")[0]) for tick in within}
        assert factor < 10 or steps <= {1.0, 2.0, 5.0}


def test_a_ninth_series_differs_from_the_first_by_its_shape_and_roles_keep_their_looks():
    names = [f"s{i}" for i in range(10)]
    (colours, shapes) = (channel["scale"] for channel in vega.series([{"n": name} for name in names], "n", None))
    assert colours["domain"] == shapes["domain"] == names
    assert colours["range"][8] == colours["range"][0] and len(set(colours["range"])) == 8
    assert len(set(zip(colours["range"], shapes["range"], strict=True))) == 10
    some = [channel["scale"] for channel in vega.series([{"n": "s7"}, {"n": "s3"}], "n", names)]
    assert [scale["domain"] for scale in some] == [["s7", "s3"]] * 2
    assert [scale["range"] for scale in some] == [[every["range"][i] for i in (7, 3)] for every in (colours, shapes)]
    every = [
        channel["scale"] for channel in vega.roles([{"role": role} for role in (UNMERGED, CONTROL, RANDOM, FOUND)])
    ]
    assert [dict(zip(scale["domain"], scale["range"], strict=True)) for scale in every] == [
        dict(
            zip(
                (FOUND, RANDOM, CONTROL, UNMERGED),
                ("var(--accent)", "var(--control)", "var(--control)", "var(--ink)"),
                strict=True,
            )
        ),
        dict(zip((FOUND, RANDOM, CONTROL, UNMERGED), ("circle", "triangle-up", "circle", "diamond"), strict=True)),
    ]
    (colour, shape) = vega.roles([{"role": UNMERGED}, {"role": FOUND}])
    assert colour["scale"] == {"domain": [FOUND, UNMERGED], "range": ["var(--accent)", "var(--ink)"]}
    assert shape["scale"]["range"] == ["circle", "diamond"] and colour["legend"] == {"title": None}
    assert vega.roles([{"role": FOUND}])[0]["legend"] is None
    assert [role_of(kind) for kind in ("found", "random", "drop", "fixed", "file", "base")] == [
        FOUND, RANDOM, CONTROL, CONTROL, CONTROL, UNMERGED,
    ]  # fmt: skip


def test_rows_and_tables_are_what_they_are_made_of():
    """Keys in another order in a later row; options of a table."""
    rows = Rows.of([{"a": 1, "b": 2}, {"b": 4, "a": 3}], (("plans", "p/*.parquet"),))
    assert (rows.columns, rows.values) == (("a", "b"), ((1, 2), (3, 4)))
    table = Table.of("c", ["a", "b"], [["x", "1"]], words=(0, 1), marked=(0,), folded=True)
    assert (table.words, table.marked, table.folded, table.cells) == ((0, 1), (0,), True, (("x", "1"),))


def test_a_number_below_the_pointer_has_its_format_and_a_line_its_place():
    assert vega.tip(("plan", "plan"), ("share", "accuracy", ".1%")) == [
        {"field": "plan", "title": "plan", "type": "nominal"},
        {"field": "share", "title": "accuracy", "type": "quantitative", "format": ".1%"},
    ]
    assert vega.zoom("x", "y")["select"]["encodings"] == ["x", "y"]
    across, words = vega.rule("y", 0.25, "chance")
    assert across["encoding"] == words["encoding"] == {"y": {"datum": 0.25}} and words["mark"]["text"] == "chance"
    assert (words["mark"]["x"], words["mark"]["align"]) == ("width", "right")
    upright, words = vega.rule("x", 0.0, "no difference")
    assert upright["encoding"] == {"x": {"datum": 0.0}} and words["mark"]["align"] == "left"


# -- what stands in tables and drawings, held against the rows of the run's tables


def pct(share, limits=None):
    """A share as the page has it, with its interval."""
    text = f"{100 * share:.1f} %"
    return text if limits is None else f"{text} [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]"


def ppl(row):
    """A perplexity as the page has it, with its interval, from a row of `perplexity`."""
    values = (row["perplexity"], row["ci_low"], row["ci_high"])
    value, low, high = (f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}" for x in values)
    return f"{value} [{low}, {high}]"


def change(row, scale=1, digits=3):
    """A difference with its interval, from a row of `comparisons`."""
    texts = [f"{scale * row[key]:+.{digits}f}".replace("-", "−") for key in ("difference", "ci_low", "ci_high")]
    return "{} [{}, {}]".format(*(text[1:] if not float(text[1:]) else text for text in texts))


def judged(row):
    """What a row of `comparisons` says, with its p."""
    said = "better" if (row["difference"] > 0) == (row["measure"] == "accuracy") else "worse"
    sign = {"better": "▲", "worse": "▼"}[said]
    if row["p_value"] >= 0.05:
        sign, said = "≈", "indistinguishable"
    elif row["p_holm"] >= 0.05:
        sign, said = "≈", f"indistinguishable (uncorrected: {said})"
    ps = (
        "<\u00a00.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}" for p in (row["p_value"], row["p_holm"])
    )
    return "{}\u00a0{}, p\u00a0{}\u00a0({})".format(sign, said, *ps)


def stored_by(run, table, key="plan_id", **where):
    """Key -> row of a table, of the rows with these values."""
    rows = run.read(table).to_pylist()
    return {row[key]: row for row in rows if all(row[name] == value for name, value in where.items())}


def marks(view):
    """(mark, column by channel) of every layer that draws rows."""
    found = []
    for layer in view.spec["layer"]:
        encoding = {channel: value["field"] for channel, value in layer["encoding"].items()
                    if isinstance(value, dict) and "field" in value}  # fmt: skip
        if encoding and "data" not in layer:
            found.append((layer["mark"]["type"], encoding))
    return found


def tips(view):
    """(title, column) of what is said below the pointer."""
    found, *_ = (layer["encoding"]["tooltip"] for layer in view.spec["layer"] if "tooltip" in layer["encoding"])
    return [(tip["title"], tip["field"]) for tip in found]


def test_the_tables_of_a_search_have_the_numbers_of_their_plans(tmp_path):
    run = search_run(tmp_path / "run", seed=3)
    # Of text no p but the drop's is corrected to another, so that either can be told.
    compared_rows = [row | {"p_value": 0.01 * (i + 1), "p_holm": 0.02 * (i + 1)} for i, row in
                     enumerate(run.read("comparisons").drop_columns("run_id").to_pylist())]  # fmt: skip
    run.replace("comparisons", compared_rows)
    run.append("perplexity", [
        {"plan_id": plan, "target": "question", "subject": subject, "tokens": 9, "nll": 0.1, "perplexity": 1.1}
        for plan in ("base", "drop", "fixed", "found") for subject in (None, "law")
    ], part="questions")  # fmt: skip
    micro, macro = (stored_by(run, "accuracy", subject=subject) for subject in ("_micro", "_macro"))
    texts, costs = stored_by(run, "perplexity", target="text"), stored_by(run, "costs")
    answers = run.read("answers").to_pylist()
    labels = {"base": "base", "drop": "drop", "fixed": "fixed_0.62", "found": "found_bayes"}
    order = sorted(labels, key=lambda plan: -micro[plan]["accuracy"])
    verdicts, every = blocks([plans.answer(Reached(run))], Table)
    assert [row[0] for row in every.cells] == [labels[plan] for plan in order]
    assert [row[0] for row in verdicts.cells] == [labels[plan] for plan in order if plan != "found"]
    assert every.marked == (order.index("found"),)
    held = ("accuracy", "verdict, p (Holm)", "answer NLL", "verdict, p (Holm)", "perplexity", "verdict, p (Holm)")
    assert verdicts.header == ("against", *held)
    for plan, cells in zip(order, every.cells, strict=True):
        picked = [row["predicted"] for row in answers if row["plan_id"] == plan]
        assert dict(zip(every.header[2:], cells[2:], strict=True)) == {
            "layers": str(costs[plan]["layers"]),
            "accuracy": pct(micro[plan]["accuracy"], (micro[plan]["ci_low"], micro[plan]["ci_high"])),
            "mean over subjects": pct(macro[plan]["accuracy"], (macro[plan]["ci_low"], macro[plan]["ci_high"])),
            "answer NLL": f"{micro[plan]['nll']:.3f}",
            "perplexity": ppl(texts[plan]),
            "picks A/B/C/D, %": "/".join(f"{100 * np.mean([p == k for p in picked]):.0f}" for k in range(4)),
        }
    answer_is_a = np.mean([row["answer"] == 0 for row in answers if row["plan_id"] == "base"])
    assert f"Always answering A would score {pct(answer_is_a)}" in every.caption
    pairs = {(row["plan_b"], row["measure"]): row for row in compared_rows}
    for plan, cells in zip([plan for plan in order if plan != "found"], verdicts.cells, strict=True):
        accuracy, nll, text = (pairs[plan, measure] for measure in ("accuracy", "answer_nll", "text_nll"))
        assert [cells[1], cells[3], cells[5]] == [change(accuracy, 100, 1), change(nll), ppl(texts[plan])]
        for row, cell in ((accuracy, cells[2]), (nll, cells[4]), (text, cells[6])):
            assert cell == judged(row)
    (tiles,) = (block.facts for block in blocks([plans.answer(Reached(run))], Facts))
    shares = {plan: cells[3].split(" [") for plan, cells in zip(order, every.cells, strict=True)}
    assert [(fact.term, fact.value, fact.note) for fact in tiles] == [
        ("Accuracy", shares["found"][0], f"95 % interval [{shares['found'][1]}"),
        ("Unmerged", shares["base"][0], f"95 % interval [{shares['base'][1]}"),
        ("Perplexity, plain text", "12.5", "unmerged 5.00"),
        ("Layers", "3 of 6", "50.0 % of 0.01 million parameters removed"),
    ]  # fmt: skip
    (figure,) = blocks([plans.answer(Reached(run))], Figure)
    accuracies, perplexities = figure.views
    assert marks(accuracies) == [
        ("rule", {"y": "plan", "x": "low", "x2": "high", "color": "role"}),
        ("point", {"y": "plan", "x": "accuracy", "color": "role", "shape": "role"}),
    ]
    rule = accuracies.spec["layer"][2]
    assert rule["encoding"] == {"x": {"datum": answer_is_a}} and rule["mark"]["type"] == "rule"
    assert marks(perplexities) == [
        ("rule", {"y": "plan", "x": "perplexity_low", "x2": "perplexity_high", "color": "role"}),
        ("point", {"y": "plan", "x": "perplexity", "color": "role", "shape": "role"}),
    ]
    assert tips(accuracies) == tips(perplexities) == [
        ("plan", "plan"), ("accuracy", "accuracy"), ("95 % from", "low"), ("to", "high"), ("perplexity", "perplexity"),
        ("95 % from", "perplexity_low"), ("to", "perplexity_high"), ("answer NLL", "answer_nll"),
    ]  # fmt: skip
    roles = {"base": "unmerged", "drop": "control", "fixed": "control", "found": "found by the search"}
    for plan, row in zip(order, as_dicts(figure.rows), strict=True):
        assert (row["plan"], row["role"]) == (labels[plan], roles[plan])
        assert (row["answer_nll"], row["layers"], row["questions"]) == (micro[plan]["nll"], costs[plan]["layers"], 120)
    for view in figure.views:  # in the order of the table beside it
        assert view.spec["layer"][0]["encoding"]["y"]["sort"] == [labels[plan] for plan in order]
    first, last = order[0], order[-1]
    told = f"from {pct(micro[first]['accuracy'])} ({labels[first]}) to {pct(micro[last]['accuracy'])} ({labels[last]})"
    assert told in accuracies.description and "from 5.00 (base) to 90.0 (drop)" in perplexities.description


def test_the_tables_of_a_curve_have_the_numbers_of_their_points(tmp_path):
    run = sweep_run(tmp_path / "run")
    micro, macro = (stored_by(run, "accuracy", subject=subject) for subject in ("_micro", "_macro"))
    texts, costs = stored_by(run, "perplexity", target="text"), stored_by(run, "costs")
    costs_rows = [row | {"tokens_per_second": 10.0 + i} for i, row in
                  enumerate(run.read("costs").drop_columns("run_id").to_pylist())]  # fmt: skip
    run.replace("costs", costs_rows)
    speed = {row["plan_id"]: row["tokens_per_second"] for row in costs_rows}
    section = curve.answer(Reached(run))
    best, every = blocks([section], Table)
    names = {"base": "base", "drop": "drop", "half": "fixed_0.5"}
    points = ["base", "drop1", "half1", "drop3", "half3"]
    for plan, cells in zip(points, every.cells, strict=True):
        row, cost = micro[plan], costs[plan]
        share = cost["parameters_removed"] / (cost["parameters"] + cost["parameters_removed"])
        assert dict(zip(every.header, cells, strict=True)) == {
            "merged": plan[4:] or "0",
            "method": names[plan[:4]],
            "variant": "plain",
            "parameters removed": pct(share),
            "accuracy [95 %]": pct(row["accuracy"], (row["ci_low"], row["ci_high"])),
            "mean over subjects": pct(macro[plan]["accuracy"]),
            "answer NLL": f"{row['nll']:.3f}",
            "perplexity": ppl(texts[plan]),
            "tokens/s": f"{speed[plan]:.1f}",
        }
    pairs = {row["plan_a"]: row for row in run.read("comparisons").to_pylist() if row["measure"] == "accuracy"}
    assert best.header == ("merged", "parameters removed", "most accurate way", "accuracy [95 %]", "perplexity",
                           "dropping", "against dropping")  # fmt: skip
    for merges, cells in zip("13", best.cells, strict=True):
        won, drop = max((f"half{merges}", f"drop{merges}"), key=lambda plan: micro[plan]["accuracy"]), f"drop{merges}"
        row, told = pairs[f"half{merges}"], "dropping is best"
        if won != drop:
            said = "indistinguishable" if row["p_value"] >= 0.05 else "better"
            told = f"{change(row, 100, 1)}: {said}"
        assert cells == (
            merges, every.cells[points.index(won)][3], names[won[:4]], every.cells[points.index(won)][4],
            ppl(texts[won]), pct(micro[drop]["accuracy"]), told,
        )  # fmt: skip
    assert best.caption.endswith(f"Unmerged: {pct(micro['base']['accuracy'])}, perplexity 5.00")
    (figure,) = blocks([section], Figure)
    for view, column, low, high in zip(
        figure.views, ("accuracy", "perplexity"), ("low", "perplexity_low"), ("high", "perplexity_high"), strict=True
    ):
        assert marks(view) == [
            ("line", {"x": "merges", "y": column, "color": "method"}),
            ("rule", {"x": "merges", "y": low, "y2": high, "color": "method"}),
            ("point", {"x": "merges", "y": column, "color": "method", "shape": "method"}),
        ]
        (level,) = [layer["encoding"]["y"]["datum"] for layer in view.spec["layer"] if layer["mark"]["type"] == "rule"
                    and "datum" in layer["encoding"]["y"]]  # fmt: skip
        assert level == (micro["base"]["accuracy"] if column == "accuracy" else texts["base"]["perplexity"])
        scale = view.spec["layer"][0]["encoding"]["color"]["scale"]
        assert scale["domain"] == ["drop", "fixed_0.5"] and len(set(scale["range"])) == 2  # the unmerged is no line
    assert figure.views[1].spec["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"
    assert "type" not in figure.views[0].spec["layer"][0]["encoding"]["y"]["scale"]
    assert figure.views[0].description.endswith("2 methods and 1 variant at up to 3 merges.")


def test_a_curve_without_questions_has_perplexities_alone(tmp_path):
    run = sweep_run(tmp_path / "run")
    config = run.config | {"data": {"mmlu": None, "report_split": "test"}}
    for table in ("accuracy", "answers"):
        run.replace(table, [])
    run.config.clear()
    run.config.update(config)
    texts = stored_by(run, "perplexity", target="text")
    section = curve.answer(Reached(run))
    (sentence,) = blocks([section], Text)
    assert sentence.text == (
        "The unmerged model's perplexity on plain text is 5.00. With 1 layer merged, fixed_0.5 has the lowest: "
        f"{ppl(texts['half1'])}. With 3 layers merged, drop has the lowest: {ppl(texts['drop3'])}. "
        "No questions were asked."
    )
    best, every = blocks([section], Table)
    pair = {row["plan_a"]: row for row in run.read("comparisons").to_pylist() if row["measure"] == "text_nll"}["half1"]
    assert [cells[2:] for cells in best.cells] == [
        ("fixed_0.5", ppl(texts["half1"]), "7.00", f"{change(pair)}: {findings.verdict(pair)}"),
        ("drop", ppl(texts["drop3"]), "900", "dropping is best"),
    ]
    assert len(best.header) == 6 and best.caption.endswith("Unmerged: perplexity 5.00")
    for plan, cells in zip(["base", "drop1", "half1", "drop3", "half3"], every.cells, strict=True):
        assert len(cells) == len(every.header) == 5 and cells[4] == ppl(texts[plan])
    (figure,) = blocks([section], Figure)
    (view,) = figure.views
    assert tips(view) == [
        ("plan", "plan"), ("method", "method"), ("variant", "variant"), ("layers merged", "merges"),
        ("perplexity", "perplexity"), ("95 % from", "perplexity_low"), ("to", "perplexity_high"),
        ("parameters removed", "removed"),
    ]  # fmt: skip
    assert not {"accuracy", "low", "high", "macro", "answer_nll"} & set(figure.rows.columns)
    assert [source for source, _ in figure.rows.sources] == ["sweep", "perplexity", "costs"]


def test_what_is_said_of_similarity_is_computed_from_the_rows(tmp_path):
    run = similarity_run(tmp_path / "run", subsets=("medical", "law", "math"))
    rng = np.random.default_rng(0)
    stored = [row if row["value"] is None else row | {"null_mean": row["value"] - 0.2, "null_p95": rng.uniform(0, 0.6)}
              for row in run.read("similarity").drop_columns("run_id").to_pylist()]  # fmt: skip
    run.replace("similarity", stored)
    found = [row | {"pearson": 0.97 - 0.01 * i, "reliability_a": 0.9 - 0.1 * i} for i, row in
             enumerate(run.read("similarity_correlation").drop_columns("run_id").to_pylist())]  # fmt: skip
    found.append(found[0] | {"subset_b": "law", "language_b": "es", "ci_low": None, "ci_high": None,
                             "reliability_b": None, "pearson_off_diagonal": 0.1})  # fmt: skip
    constant = found[0] | {"subset_b": "math", "language_b": "es", "pearson_off_diagonal": math.nan,
                           "ci_low": None, "ci_high": None}  # fmt: skip
    run.replace("similarity_correlation", [*found[:2], constant, *found[2:]])
    every, pairs = blocks([layers.answer(run)], Table)
    assert pairs.cells[2][2] == "nan"
    pairs = replace(pairs, cells=pairs.cells[:2] + pairs.cells[3:])
    for name, cells in zip(("medical", "law", "math"), every.cells, strict=True):
        mine = [row for row in stored if row["subset"] == name and row["layer_i"] < row["layer_j"]]
        known = [row for row in mine if row["value"] is not None]
        assert dict(zip(every.header, cells, strict=True)) == {
            "subset": name, "language": "en", "measure": "gaussian", "embedding": "diffusion", "n": "40",
            "mean": f"{np.mean([row['value'] for row in known]):.3f}",
            "neighbouring layers": f"{np.mean([r['value'] for r in known if r['layer_j'] - r['layer_i'] == 1]):.3f}",
            "unrelated layers": f"{np.mean([row['null_mean'] for row in known]):.3f}",
            "pairs above noise, %": f"{100 * np.mean([row['value'] > row['null_p95'] for row in known]):.0f}",
            "undefined": "1", "degenerate layers": "–",
        }  # fmt: skip
    for row, cells in zip(found, pairs.cells, strict=True):
        ceiling = None if row["reliability_b"] is None else (row["reliability_a"] * row["reliability_b"]) ** 0.5
        assert cells == (
            f"{row['subset_a']}/en – {row['subset_b']}/{row['language_b']}", f"{row['pearson']:.4f}",
            f"{row['pearson_off_diagonal']:.4f}",
            "–" if row["ci_low"] is None else f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]",
            "–" if ceiling is None else f"{ceiling:.4f}",
        )  # fmt: skip
    heat, influence = blocks([layers.maps(run)], Figure)
    values = {(row["subset"], row["layer_i"], row["layer_j"]): row for row in stored}
    for row in as_dicts(heat.rows):
        name = row["subset"].removesuffix(" (en)")
        cell = values[name, row["layer_i"], row["layer_j"]]
        assert all(row[key] == cell[key] for key in ("value", "null_p95", "ci_low", "ci_high"))
        assert row["above"] == ("" if cell["value"] is None else "yes" if cell["value"] > cell["null_p95"] else "no")
        edges = row["layer_j"] - 0.5, row["layer_i"] - 0.5
        assert (row["left"], row["bottom"]) == edges and row["right"] > row["left"] and row["top"] > row["bottom"]
    for view, name in zip(heat.views, ("medical", "law", "math"), strict=True):
        boxes = {"x": "left", "x2": "right", "y": "bottom", "y2": "top"}
        assert marks(view) == [
            ("rect", boxes),
            ("rect", boxes | {"color": "value"}),
            ("point", {"x": "layer_j", "y": "layer_i"}),
        ]
        filters = [[each["filter"] for each in layer["transform"]] for layer in view.spec["layer"]]
        own = {"field": "subset", "equal": f"{name} (en)"}
        assert filters == [[own], [own, "isValid(datum.value)"], [own, {"field": "above", "equal": "no"}]]
        across, down = (view.spec["layer"][0]["encoding"][channel]["scale"] for channel in "xy")
        assert (
            across["domain"] == down["domain"] == [-0.5, 5.5]
            and view.spec["layer"][1]["encoding"]["color"]["scale"]["clamp"]
        )
        assert tips(view) == [
            ("layer", "layer_i"), ("and layer", "layer_j"), ("similarity", "value"), ("95 % from", "ci_low"),
            ("to", "ci_high"), ("95th percentile of unrelated layers", "null_p95"), ("note", "note"),
        ]  # fmt: skip
        assert view.spec["layer"][0]["encoding"]["y"]["scale"]["reverse"] and view.title == f"{name} (en)"
        off = [row["value"] for row in stored if row["subset"] == name and row["layer_i"] != row["layer_j"]
               and row["value"] is not None]  # fmt: skip
        near = [row["value"] for row in stored if row["subset"] == name and abs(row["layer_i"] - row["layer_j"]) == 1]
        noise = sum(row["value"] <= row["null_p95"] for row in stored if row["subset"] == name
                    and row["layer_i"] != row["layer_j"] and row["value"] is not None)  # fmt: skip
        assert (
            f"mean {np.mean(off):.2f} off the diagonal, {np.mean(near):.2f} between neighbours; {noise // 2} pair"
            in (view.description)
        )
        assert view.spec["layer"][1]["encoding"]["color"]["scale"]["domain"] == [0, pytest.approx(0.52, abs=0.011)]
    assert "subset" in tips(influence.views[0])[0] and marks(influence.views[0]) == [
        ("line", {"x": "layer", "y": "value", "color": "subset"}),
        ("point", {"x": "layer", "y": "value", "color": "subset", "shape": "subset"}),
    ]
    assert influence.views[0].spec["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"
    assert f"Least: layer 5 on medical (en), {0.5 / 6:.3g}." in influence.caption
    (figure,) = blocks([layers.correlations(run)], Figure)
    wanted = sorted(found, key=lambda row: -row["pearson_off_diagonal"])
    drawn = as_dicts(figure.rows)
    assert [row["r"] for row in drawn] == [row["pearson_off_diagonal"] for row in wanted]
    for row, of in zip(drawn, wanted, strict=True):
        assert row["pair"] == f"{of['subset_a']} (en) – {of['subset_b']} ({of['language_b']})"
        assert (row["low"], row["high"], row["pearson"]) == (of["ci_low"], of["ci_high"], of["pearson"])
        ceiling = None if of["reliability_b"] is None else (of["reliability_a"] * of["reliability_b"]) ** 0.5
        assert row["ceiling"] == (None if ceiling is None else pytest.approx(ceiling))
    first, last = drawn[0], drawn[-1]
    assert f"Highest: {first['pair']}, {first['r']:.2f}. Lowest: {last['pair']}, {last['r']:.2f}." in figure.caption
    assert marks(figure.views[0]) == [
        ("rule", {"y": "pair", "x": "low", "x2": "high", "color": "role"}),
        ("point", {"y": "pair", "x": "r", "color": "role", "shape": "role"}),
        ("tick", {"y": "pair", "x": "ceiling"}),
    ]


def test_a_scale_of_colours_has_the_ends_of_what_is_off_the_diagonal():
    cells = [{"layer_i": i, "layer_j": j, "value": value, "null_p95": 9.0} for i, j, value in
             ((0, 0, 3.7), (1, 1, 3.5), (0, 1, 0.9), (1, 0, 0.8))]  # fmt: skip
    low, high = layers.colour_domain(cells)
    assert 0.8 <= low < high <= 0.9 or (low == 0 and 0.85 < high <= 0.9)
    assert layers.colour_domain(cells[:2])[1] == pytest.approx(3.7, abs=0.01)
    assert layers.colour_domain([cell | {"value": None} for cell in cells]) == (0, 1)
    assert layers.subset_name({"subset": "s", "language": "imported"}) == "s"


def test_settings_are_drawn_with_their_agreement(tmp_path):
    run = sensitivity_run(tmp_path / "run")
    stored = [row | {"plan_overlap": row["plan_overlap"] and 0.5 * row["plan_overlap"],
                     "pearson": row["pearson"] and 0.3 + 0.5 * row["pearson"]}
              for row in run.read("sensitivity").drop_columns("run_id").to_pylist()]  # fmt: skip
    run.replace("sensitivity", stored)
    section = layers.sensitivity(run)
    (figure,), (every,) = blocks([section], Figure), blocks([section], Table)
    changed = [row for row in stored if not row["reference"]]
    for row, of, cells in zip(as_dicts(figure.rows), changed, every.cells, strict=True):
        r, same, moves = (of[key] for key in ("pearson_off_diagonal", "plan_overlap", "alpha_max_difference"))
        assert row["setting"] == f"{of['parameter']} = {of['setting']}" and row["subset"] == "all (en)"
        assert (row["r"], row["low"], row["high"], row["same"], row["moves"]) == (r, r, r, same, moves)
        if r is not None:
            assert cells == (of["parameter"], of["setting"], f"{r:.3f}", f"{100 * same:.0f}", f"{moves:.3f}", "")
    assert tips(figure.views[0]) == [
        ("setting", "setting"), ("subset", "subset"), ("r off the diagonal", "r"), ("same merges", "same"),
        ("largest alpha change", "moves"), ("note", "note"),
    ]  # fmt: skip
    run.replace("sensitivity", [row for row in stored if row["pearson_off_diagonal"] is None])
    assert not blocks([layers.sensitivity(run)], Figure)


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
        assert cells[2:4] == (("x", "base") if name == "eval" else ("tiny", "found_bayes"))
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


def test_coefficients_candidates_and_changes_are_drawn_as_they_are_stored(search):
    alphas, weights = blocks([searched.coefficients(Reached(search))], Figure)
    labels = findings.labels_of(search)
    steps = {(labels[row["plan_id"]], row["step"]): row for row in search.read("plans").to_pylist()
             if row["step"] is not None}  # fmt: skip
    drawn = as_dicts(alphas.rows)
    assert len(drawn) == len(steps) and drawn[-1]["role"] == FOUND
    for row in drawn:
        of = steps[row["plan"], row["step"]]
        assert (row["alpha"], row["merge"]) == (of["alpha"], f"{of['remove']} into {of['into']}")
    assert "found_bayes: 0.10, 0.80, 0.30." in alphas.caption
    assert {row["plan"]: row["label"] for row in drawn if row["step"] == 2} == {  # beside the ends of their lines
        "drop": "drop", "fixed_0.62": "fixed_0.62", "found_bayes": "found_bayes",
    }  # fmt: skip
    assert {row["label"] for row in drawn if row["step"] < 2} == {""}
    lines, points, names = marks(alphas.views[0])
    assert lines == ("line", {"x": "step", "y": "alpha", "detail": "series", "color": "role"})
    assert points == ("point", {"x": "step", "y": "alpha", "color": "role", "shape": "role"})
    assert names[1] == {"x": "step", "y": "alpha", "text": "label"}
    own = {(labels[row["plan_id"]], row["source_layer"]): row for row in search.read("coefficients").to_pylist()}
    for row in as_dicts(weights.rows):
        of = own.get((row["series"], row["layer"]))
        assert row["weight"] == (of["coefficient"] if of else 0) and row["kept"] == (
            str(of["kept_layer"]) if of else "–"
        )
        assert row["percent"] == (f"{100 * row['weight']:.0f}" if row["weight"] else "")
    # alphas .1, .8, .3 of the deepest step first: layer 2 has .3, 3 .7 * .8, 4 .7 * .2 * .1, 5 the rest
    assert "found_bayes: layer 3 (56 %), layer 2 (30 %), layer 5 (13 %)." in weights.caption
    cells, texts = marks(weights.views[0])
    assert cells == ("rect", {"x": "layer", "y": "series", "color": "weight"})
    assert texts == ("text", {"x": "layer", "y": "series", "text": "percent"})
    progress, descents = blocks([searched.search(Reached(search))], Figure)
    trials = [row for row in search.read("trials").to_pylist() if row["searcher"] == "bayes"]
    mine = [row for row in as_dicts(progress.rows) if row["kind"] == "candidate"]
    assert [(row["number"], row["value"]) for row in mine] == [(row["iteration"] + 1, row["value"]) for row in trials]
    assert "(higher is better)" in progress.caption and "not the report's" in progress.caption
    kinds = [layer["transform"][0]["filter"]["equal"] for layer in progress.views[0].spec["layer"]]
    assert kinds == ["candidate", "candidate", "control", "control"]
    dots, best, levels, named = marks(progress.views[0])
    assert dots == ("point", {"x": "number", "y": "value", "color": "searcher"})
    assert best == ("line", {"x": "number", "y": "best", "color": "searcher"})
    assert levels == ("rule", {"y": "value"}) and named == ("text", {"y": "value", "text": "label"})
    history = {(row["start"], row["epoch"], of): row[key] for row in search.read("gradient_history").to_pylist()
               for of, key in (("training", "loss"), ("held out", "held_out_loss"))}  # fmt: skip
    rows = as_dicts(descents.rows)
    assert {(row["start"], row["epoch"], row["of"]): row["loss"] for row in rows} == history
    assert len({row["series"] for row in rows}) == 4 and descents.caption.endswith("on held-out questions.")
    assert marks(descents.views[0]) == [
        ("line", {"x": "epoch", "y": "loss", "color": "searcher", "strokeDash": "of", "detail": "series"}),
        ("point", {"x": "epoch", "y": "loss"}),
    ]
    assert tips(descents.views[0]) == [("descent", "searcher"), ("start", "start"), ("epoch", "epoch"),
                                       ("loss on", "of"), ("loss", "loss")]  # fmt: skip
    (figure,) = blocks([receipts.receipts(Reached(search))], Figure)
    stored = [(row["tensor"], row["plan_id"], row["relative_change"], row["max_abs_change"])
              for row in search.read("receipts").to_pylist()]  # fmt: skip
    drawn = as_dicts(figure.rows)
    ids = {label: plan_id for plan_id, label in labels.items()}
    assert sorted((row["tensor"], ids[row["plan"]], row["relative"], row["largest"]) for row in drawn) == sorted(stored)
    assert all(row["tensor"] == f"model.layers.{row['layer']}.{row['matrix']}.weight" for row in drawn)
    assert marks(figure.views[0]) == [("point", {"y": "matrix", "x": "relative", "color": "role", "shape": "role"})]
    (figure,) = blocks([subjects.differences(Reached(search))], Figure)
    (bars, points), spec = marks(figure.views[0]), figure.views[0].spec
    assert bars == ("rule", {"y": "subject", "x": "low", "x2": "high", "color": "clear"})
    assert points == ("point", {"y": "subject", "x": "difference", "color": "clear"})
    assert spec["transform"] == [{"filter": "datum.against === against"}] and spec["params"][0]["value"] == "base"
    first = [row for row in as_dicts(figure.rows) if row["against"] == "base"]
    assert all((row["clear"] == "yes") == (row["low"] > 0 or row["high"] < 0) for row in as_dicts(figure.rows))
    top, last = (extreme(first, key=lambda row: row["difference"]) for extreme in (max, min))
    said = "Against base: from {:+.1f} points ({}) to {:+.1f} ({}); {} of 2 intervals exclude 0."
    said = said.format(top["difference"], top["subject"], last["difference"], last["subject"],
                       sum(row["clear"] == "yes" for row in first))  # fmt: skip
    assert said.replace("-", "−") in figure.caption


def test_weights_of_single_matrices_are_their_own_where_they_have_some(tmp_path):
    """Layers 1 and 2 are merged for all matrices, 4 and 5 with a weight of its own for one of them."""
    run = search_run(tmp_path / "run")
    own = [(1, 1, 0.7, None), (1, 2, 0.3, None), (3, 3, 1.0, None), (4, 4, 0.6, None), (4, 5, 0.4, None),
           (4, 4, 0.2, "mlp.up_proj"), (4, 5, 0.8, "mlp.up_proj"), (0, 0, 1.0, None)]  # fmt: skip
    run.replace("coefficients", [
        {"plan_id": "found", "kept_layer": kept, "source_layer": source, "coefficient": weight, "matrix": matrix}
        for kept, source, weight, matrix in own
    ])  # fmt: skip
    _, figure = blocks([searched.coefficients(Reached(run))], Figure)
    cells = {(row["series"], row["layer"]): (row["weight"], row["kept"]) for row in as_dicts(figure.rows)}
    others, up = "others, found_bayes", "up_proj, found_bayes"
    # drop and fixed have no rows here, as of plans that leave nothing of these layers
    wanted = {1: (0.7, "1"), 2: (0.3, "1"), 3: (1.0, "3"), 4: (0.6, "4"), 5: (0.4, "4"), 0: (1.0, "0")}
    assert {layer: cell for (series, layer), cell in cells.items() if series == others} == wanted
    assert {layer: cell for (series, layer), cell in cells.items() if series == up} == wanted | {
        4: (0.2, "4"), 5: (0.8, "4"),
    }  # fmt: skip
    trials = [row for row in run.read("trials").drop_columns("run_id").to_pylist() if row["searcher"] != "controls"]
    run.replace("trials", trials)
    assert len(blocks([searched.search(Reached(run))], Figure)) == 2  # candidates are shown without controls too


def test_an_evaluation_s_page_has_each_subject_s_own_numbers(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"model": {"path": "/models/tiny"}, "data": {"report_split": "test"}},
                            "evaluate")  # fmt: skip
    run.begin()
    evaluated(run, {"base": base_plan(LAYERS)}, {"base": 0.7}, subjects=("algebra", "law"), perplexities={"base": 5.0},
              pairs=[])  # fmt: skip
    asked_of = {"algebra": 3.0, "law": 40.0, None: 9.0}
    run.append("perplexity", [{"plan_id": "base", "target": "question", "subject": subject, "tokens": 9, "nll": 1.0,
                               "perplexity": value} for subject, value in asked_of.items()], part="q")  # fmt: skip
    other = run.read("accuracy").drop_columns("run_id").to_pylist()
    run.append("accuracy", [row | {"split": "validation", "accuracy": 0.01} for row in other], part="v")
    run.write_manifest(command=["raymerge", "evaluate"])
    stored = {row["subject"]: row for row in other}
    (section, *_) = run_sections(run, heading=None)
    text, (_, every), (figure,) = (blocks([section], kind) for kind in (Text, Table, Figure))
    micro, macro = stored["_micro"], stored["_macro"]
    share = pct(micro["accuracy"], (micro["ci_low"], micro["ci_high"]))
    assert text[0].text == (
        f"tiny answers {share} of 120 test questions in 2 subjects, {pct(macro['accuracy'])} as a mean over subjects. "
        "Its perplexity on plain text is 5.00."
    )
    order = sorted(("algebra", "law"), key=lambda subject: -stored[subject]["accuracy"])
    for subject, cells, row in zip(order, every.cells, as_dicts(figure.rows), strict=True):
        of = stored[subject]
        share = pct(of["accuracy"], (of["ci_low"], of["ci_high"]))
        assert cells == (subject, "60", share, f"{of['nll']:.3f}", wording.perplexity(asked_of[subject]))
        assert (row["subject"], row["accuracy"], row["low"], row["high"], row["n"]) == (
            subject, of["accuracy"], of["ci_low"], of["ci_high"], 60,
        )  # fmt: skip
    assert figure.views[0].spec["layer"][2]["encoding"] == {"x": {"datum": 0.25}}
    first, last = (f"{pct(stored[subject]['accuracy'])} ({subject})" for subject in order)
    assert f"From {first} to {last}." in figure.caption


def test_a_plan_of_two_names_is_called_by_both(tmp_path):
    run = search_run(tmp_path / "run")
    stored = run.read("plans").drop_columns("run_id").to_pylist()
    again = [row | {"name": "start", "kind": "fixed"} for row in stored if row["plan_id"] == "found"]
    run.replace("plans", again + stored)
    text, *_ = blocks([plans.answer(Reached(run))], Text)
    assert text.text.startswith("The best plan found, start = found_bayes, answers ")


def test_plans_without_questions_are_ranked_by_their_perplexity(tmp_path):
    run = search_run(tmp_path / "run", objective="text_nll")
    run.config["data"] |= {"mmlu": None}
    for table in ("answers", "accuracy"):
        run.replace(table, [])
    verdicts, every = blocks([plans.answer(Reached(run))], Table)
    texts = stored_by(run, "perplexity")
    order = {"base": "base", "found": "found_bayes", "fixed": "fixed_0.62", "drop": "drop"}
    assert [(cells[0], *cells[2:]) for cells in every.cells] == [
        (label, "6" if plan == "base" else "3", ppl(texts[plan])) for plan, label in order.items()
    ]
    pairs = {row["plan_b"]: row for row in run.read("comparisons").to_pylist() if row["measure"] == "text_nll"}
    for plan, cells in zip(("base", "fixed", "drop"), verdicts.cells, strict=True):
        assert (cells[0], cells[1], cells[3]) == (order[plan], change(pairs[plan]), ppl(texts[plan]))
        assert findings.verdict(pairs[plan]).split(",")[0] in cells[2]
    assert verdicts.header == ("against", "loss per token", "verdict, p (Holm)", "perplexity")


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


def test_figures_are_numbered_through_the_page_and_have_all_their_drawings():
    def figure(title):
        views = (View({"mark": title}, f"{title} left"), View({"mark": "bar"}, f"{title} right", zoom={"x": "own"}))
        return Figure(title, "told", views, Rows((), (), ()), "command")

    first, second, third = map(figure, ("one", "two", "three"))
    page = Page("t", "l", (Section("s", (Text("no figure"), first)), Section("u", (second, third))), "made")
    html = Outline(render.to_html(page))
    assert [known["id"] for tag, known in html.tags if tag == "figure"] == ["figure-1", "figure-2", "figure-3"]
    assert [text for text in html.text if text.startswith("Figure ")] == [
        f"Figure {n}. {title}." for n, title in enumerate(("one", "two", "three"), 1)
    ]
    assert render.figure_data(first)["views"] == [
        {"spec": {"mark": "one", "description": "one left"}, "zoom": first.views[0].zoom},
        {"spec": {"mark": "bar", "description": "one right"}, "zoom": {"x": "own"}},
    ]
    assert [render.slug(text) for text in ("Effective Coefficients, by SEED!", "–", "a")] == [
        "effective-coefficients-by-seed", "section", "a",
    ]  # fmt: skip
