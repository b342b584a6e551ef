"""What a page says of the compression curve of a sweep."""

import json
import math

import pytest
from report_runs import (
    QUESTIONS,
    blocks,
    change,
    marks,
    pct,
    ppl,
    stored_by,
    sweep_run,
    tips,
)

from raymerge import findings, summary
from raymerge.report import (
    curve,
    receipts,
)
from raymerge.report.content import (
    Figure,
    Table,
    Text,
)
from raymerge.report.reached import Reached
from raymerge.statistics import wilson_interval
from raymerge.tables import MICRO


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


def test_of_equally_accurate_ways_the_one_of_lowest_perplexity_is_named(tmp_path):
    """Dropping, which is asked for first, was named, ruined or not, and a refit that was as accurate was not."""
    reached = Reached(sweep_run(tmp_path / "sweep", half1=1.0, drop1=1.0, half3=1.0, drop3=1.0))
    said = curve.in_words(reached)
    share = pct(1.0, wilson_interval(QUESTIONS, QUESTIONS))
    assert f"With 1 layer merged, fixed_0.5 is the most accurate: {share} (perplexity 6.50); 1 other way" in said
    assert f"With 3 layers merged, drop is the most accurate: {share} (perplexity 900" in said
    best, _ = blocks([curve.answer(reached)], Table)
    assert [row[2] for row in best.cells] == ["fixed_0.5 and 1 more", "drop and 1 more"]
    assert "the one of lowest perplexity is shown" in best.caption


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
    (receipt,) = blocks([receipts.receipts_of_points(reached)], Figure)
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


def test_the_sentence_of_a_curve_has_intervals_and_names_the_way_that_predicts_text_best(tmp_path):
    """Of the demo's 13 layers "drop is the most accurate: 62.5 % (perplexity 21.6)" hid a way of 8.7 and 59.2 %."""
    run = sweep_run(tmp_path / "curve", half1=0.5, drop1=0.9, half3=0.4, drop3=0.9)
    texts = run.read("perplexity").drop_columns("run_id").to_pylist()
    other = {"perplexity": 30.0, "ci_low": 25.0, "ci_high": 35.0}
    run.replace("perplexity", [row | (other if row["plan_id"] == "half3" else {}) for row in texts])
    micro, text = stored_by(run, "accuracy", subject=MICRO), stored_by(run, "perplexity", target="text")
    share = {plan: pct(row["accuracy"], (row["ci_low"], row["ci_high"])) for plan, row in micro.items()}
    assert text["half1"]["perplexity"] < text["drop1"]["perplexity"]  # but their intervals reach each other
    assert curve.in_words(Reached(run)) == (
        f"The unmerged model answers {share['base']} of 120 test questions correctly. With 1 layer merged, drop is the "
        f"most accurate: {share['drop1']} (perplexity 7.00). With 3 layers merged, drop is the most accurate: "
        f"{share['drop3']} (perplexity 900, the unmerged model's is 5.00; it is ruined as a language model); fixed_0.5 "
        f"predicts plain text best: perplexity 30.0 [25.0, 35.0], with {share['half3']} of answers correct."
    )


@pytest.mark.parametrize(
    ("most", "other", "named"),
    [
        ((900.0, 700.0, 1000.0), (30.0, 25.0, 35.0), True),
        # Of the two ruined models one was said to predict text best, as if it were a way out.
        ((20000.0, 15000.0, 25000.0), (900.0, 700.0, 1000.0), False),
        # Beside a perplexity that is infinite, where it matters most, no other way was named.
        ((math.inf, None, None), (30.0, 25.0, 35.0), True),
        ((math.inf, 15000.0, math.inf), (30.0, 25.0, 35.0), True),
        ((math.inf, None, None), (math.inf, None, None), False),
        ((900.0, None, None), (30.0, 25.0, 35.0), False),  # of an earlier version
    ],
)
def test_the_way_that_predicts_text_best_is_named_where_it_is_clear_and_not_ruined_itself(tmp_path, most, other, named):
    run = sweep_run(tmp_path / "curve", half3=0.4, drop3=0.9)
    read = {"drop3": most, "half3": other}
    run.replace("perplexity", [
        row | dict(zip(("perplexity", "ci_low", "ci_high"), read.get(row["plan_id"], (row["perplexity"], row["ci_low"],
                                                                                      row["ci_high"])), strict=True))
        for row in run.read("perplexity").drop_columns("run_id").to_pylist()
    ])  # fmt: skip
    said = curve.in_words(Reached(run))
    assert "ruined as a language model)" in said
    assert ("; fixed_0.5 predicts plain text best: perplexity " in said) == named


def test_a_curve_without_dropping_is_held_against_nothing(tmp_path):
    """Two columns of dashes stood there, and a caption of what they would say."""
    run = sweep_run(tmp_path / "curve")
    points = run.read("sweep").drop_columns("run_id").to_pylist()
    names = {"drop": "before_last"}
    run.replace("sweep", [row | {"method": names.get(row["method"], row["method"])} for row in points])
    best, _ = blocks([curve.answer(Reached(run))], Table)
    assert best.header == ("merged", "parameters removed", "most accurate way", "accuracy [95 %]", "perplexity")
    assert {len(row) for row in best.cells} == {5} and best.words == (2,)
    assert best.caption.startswith(
        "The most accurate way at every K. It was chosen as the best of several on these same questions, so its "
        "accuracy is too good. Unmerged: "
    )


def test_what_was_chosen_as_the_best_is_the_way_and_not_the_difference(tmp_path):
    """A sentence on the difference stood between the way and "It was chosen as the best of several"."""
    best, _ = blocks([curve.answer(Reached(sweep_run(tmp_path / "curve")))], Table)
    first, second, third, *_ = best.caption.split(". ")
    assert first == "The most accurate way at every K, against dropping as many layers"
    assert second.startswith("It was chosen as the best of several")
    assert third.startswith("The verdicts use Holm's p")


def test_where_dropping_is_best_the_next_way_is_held_against_it(tmp_path):
    """By one question or by a hundred, "dropping is best" stood alone: whether averaging loses more was not said."""
    run = sweep_run(tmp_path / "curve", half1=0.85, drop1=0.86, half3=0.3, drop3=0.9)
    best, _ = blocks([curve.answer(Reached(run))], Table)
    pairs = {row["plan_a"]: row for row in run.read("comparisons").to_pylist() if row["measure"] == "accuracy"}
    for merges, said, cells in zip("13", ("indistinguishable", "worse"), best.cells, strict=True):
        told = f"{change(pairs[f'half{merges}'], 100, 1)}, {said}"
        assert cells[-1] == f"dropping is best; next fixed_0.5: {told}"
    assert "Against dropping: percentage points with the 95 % interval" in best.caption
    level, _ = blocks([curve.answer(Reached(sweep_run(tmp_path / "level", half3=1.0, drop3=1.0)))], Table)
    assert level.cells[1][2] == "drop and 1 more" and level.cells[1][-1].startswith(
        "no way is better; next fixed_0.5: "
    )


def test_the_figure_of_a_curve_explains_the_variants_that_it_has(tmp_path):
    def caption(**other):
        run = sweep_run(tmp_path / "-".join(other.values()))
        rows = run.read("sweep").drop_columns("run_id").to_pylist()
        run.replace("sweep", [row | (other if row["method"] == "fixed_0.5" else {}) for row in rows])
        (figure,) = blocks([curve.answer(Reached(run))], Figure)
        return figure.caption

    assert "Aligned" not in (plain := caption(alignment="none")) and "Folded" not in plain
    assert "Aligned: " in (aligned := caption(alignment="activations")) and "Folded" not in aligned
    assert "Rows aligned: " in (rows := caption(alignment="rows", norms="fold")) and "Folded: " in rows
    assert "Aligned: neurons" not in rows


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["drop", "merge_block", "drop_block"], "Layers that drop_block and merge_block remove; "),
        (["drop", "merge_block"], "Layers that merge_block removes; "),
    ],
)
def test_whose_layers_were_chosen_in_a_curve_is_said(tmp_path, methods, said):
    run = sweep_run(tmp_path / "curve")
    run.config["sweep"]["methods"] = methods
    run.append("blocks", [{"merges": 3, "first": 2, "last": 4, "measure": "cosine", "score": 0.1, "chosen": True}])
    assert summary.block_table(run)[0].startswith(said)


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
    (receipt,) = blocks([receipts.receipts_of_points(Reached(run))], Figure)
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


def test_refits_of_one_method_are_ways_of_their_own(tmp_path):
    run = sweep_run(tmp_path / "curve")
    rows = [{k: v for k, v in row.items() if k != "run_id"} for row in run.read("sweep").to_pylist()]
    last = next(row for row in rows if row["plan_id"] == "half3")
    run.replace("sweep", [*rows, last | {"plan_id": "half1", "refit": "linear"}])
    points = curve.curve(Reached(run))
    assert [p["method"] for p in points if p["merges"] == 3] == ["drop", "fixed_0.5", "fixed_0.5 + linear"]


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


def test_a_curve_shows_the_questions_own_perplexity_and_no_columns_of_what_was_not_measured(tmp_path):
    """The published comparison of alpha files reads no text, but its questions: of that its page had a column of dashes
    and "Unmerged: 90.0 %, perplexity –", and not the perplexities that were asked for."""
    run = sweep_run(tmp_path / "run")
    every = blocks([curve.answer(Reached(run))], Table)
    assert not any("question perplexity" in table.header for table in every)
    assert "question ppl [95 %]" not in summary.sweep_table(run, "test")[0]
    points = ["base", "drop1", "half1", "drop3", "half3"]
    run.replace("perplexity", [
        {"plan_id": plan, "target": "question", "subject": subject, "tokens": 9, "nll": 0.1,
         "perplexity": 2.0 + number, "ci_low": 1.5, "ci_high": 12.5}
        for number, plan in enumerate(points) for subject in (None, "a")
    ])  # fmt: skip
    section = curve.answer(Reached(run))
    best, every = blocks([section], Table)
    assert "perplexity" not in {*best.header, *every.header} and "perplexity" not in best.caption
    found = [row[every.header.index("question perplexity")] for row in every.cells]
    assert found == [f"{2 + number}.00 [1.50, 12.5]" for number in range(5)]
    shown = dict(zip(points, found, strict=True))
    assert [row[best.header.index("question perplexity")] for row in best.cells] == [shown["half1"], shown["half3"]]
    (figure,) = blocks([section], Figure)
    assert "asked" not in figure.rows.columns
    assert figure.title == "Accuracy against compression"
    assert [source for source, _ in figure.rows.sources] == ["sweep", "accuracy", "costs"]
    header, cells = summary.sweep_table(run, "test")
    assert cells[0][header.index("question ppl [95 %]")] == "2.000 [1.500, 12.50]"
    assert "text ppl [95 %]" not in header and "text ppl [95 %]" not in summary.plan_table(Reached(run).lines)[0]


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
    read = {row["plan_a"]: row for row in run.read("comparisons").to_pylist() if row["measure"] == "text_nll"}
    pair, worse = read["half1"], read["half3"]
    assert [cells[2:] for cells in best.cells] == [
        ("fixed_0.5", ppl(texts["half1"]), "7.00", f"{change(pair)}: {findings.verdict(pair)}"),
        ("drop", ppl(texts["drop3"]), "900", f"dropping is best; next fixed_0.5: {change(worse)}, indistinguishable"),
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
