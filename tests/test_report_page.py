"""A whole page: its sections, foreign text escaped, what is missing named; no browser here."""

import errno
import json
import os
import re
import shlex
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from report_runs import (
    LAYERS,
    as_dicts,
    blocks,
    evaluated,
    pct,
    search_run,
    sensitivity_run,
    similarity_run,
    sweep_run,
    text_losses,
)

from raymerge import console, report, rows, summary
from raymerge.card import search_results
from raymerge.comparisons import comparison_rows
from raymerge.plan import base_plan
from raymerge.progress import Silent
from raymerge.report import (
    render,
    wording,
)
from raymerge.report.build import page_of, run_sections
from raymerge.report.content import (
    Facts,
    Figure,
    Notice,
    Page,
    Rows,
    Section,
    Table,
    Text,
    View,
)
from raymerge.statistics import wilson_interval
from raymerge.tables import RunDirectory, RunError

pytestmark = pytest.mark.usefixtures("no_library")


HOSTILE = '</script><script>alert(1)</script><img src="http://x.example/a.png" onerror=alert(2)>'


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
    assert table.cells[0][:2] == ("the model", "as it is") and table.caption.startswith("The model on plain text, ")
    assert further.title == "Further tasks"
    assert further.blocks[0].cells == (("the model", "piqa", "50", "acc", "0.8000 ± 0.0700 [0.670, 0.888]"),)
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


def test_an_evaluation_on_tasks_alone_has_one_model_and_no_plans(tmp_path):
    """It said "Every plan" above the one model, whose perplexity was a dash."""
    run = RunDirectory.open(tmp_path / "run", {"model": {"path": "/models/mine"}, "data": {"mmlu": None}}, "evaluate")
    run.begin()
    run.append("task_accuracy", [task_accuracy("base", 40)])
    run.append("plans", rows.plan_rows(base_plan(LAYERS), "base"))
    run.write_manifest()
    table, _ = blocks(run_sections(run, heading=None), Table)
    assert table.caption.startswith("The model. No questions were asked, and no plain text was read: the tasks below")
    assert table.header == ("plan", "what it is", "layers") and table.cells == (("the model", "as it is", "–"),)


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
    assert blocks(sections, Table)[0].header == ("plan", "what it is", "layers")  # no column of dashes
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
    # Its figure's axis is micro_accuracy, and a paragraph tells of its optimism.
    assert {"objective", "optimism of the search"} <= set(words(search)) - set(words(sweep_run(tmp_path / "sweep")))


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


def test_the_library_cannot_end_its_own_script():
    assert render.contained("a = '</script>'") == "(function(){a = '<\\/script>'})();"


def test_no_line_of_the_page_ends_between_a_number_and_its_per_cent_sign(search):
    page = render.to_html(page_of([search], "", Silent()))
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    assert re.search("\\d\N{NO-BREAK SPACE}%", text) and not re.search(r"\d\s*[ \n]%", text)


def test_a_cell_breaks_before_its_interval_and_a_command_can_be_copied(tmp_path):
    assert render.with_whole_intervals("+0.190 [+0.154, +0.225]: better") == "+0.190 [+0.154,\xa0+0.225]: better"
    run = search_run(tmp_path / "run")
    run.write_manifest(command=["raymerge", "sweep", "--set", "sweep.merges=[1, 4]"], best=run.manifest()["best"])
    page = unescape(render.to_html(page_of([run], "raymerge report", Silent())))
    (section, *_) = run_sections(run, heading=None)
    cell = blocks([section], Table)[0].cells[0][1]
    assert cell.replace(", ", ",\xa0") in page and cell not in page
    assert "sweep.merges=[1, 4]" in page and "td { white-space: normal; }" in page


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
