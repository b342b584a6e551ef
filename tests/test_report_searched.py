"""What a page says of a search's coefficients and candidates."""

import re

import matplotlib
import numpy as np
import pytest
from report_runs import (
    as_dicts,
    blocks,
    marks,
    search_run,
    tips,
)

from raymerge import findings
from raymerge.card import search_results
from raymerge.report import (
    plans,
    receipts,
    searched,
    subjects,
    wording,
)
from raymerge.report.content import (
    FOUND,
    Figure,
    Table,
    Text,
)
from raymerge.report.reached import Reached


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
