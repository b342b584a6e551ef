"""What a page says of plans: accuracies, comparisons, subjects, and what a merge has changed."""

import itertools

import numpy as np
import pytest
from report_runs import (
    LAYERS,
    QUESTIONS,
    as_dicts,
    blocks,
    change,
    judged,
    marks,
    pct,
    ppl,
    search_run,
    stored_by,
    tips,
)

from raymerge import findings, rows
from raymerge.plan import pairs_plan
from raymerge.report import (
    plans,
    receipts,
    subjects,
    wording,
)
from raymerge.report.content import (
    Facts,
    Figure,
    Table,
    Text,
)
from raymerge.report.reached import Reached
from raymerge.statistics import paired_difference, wilson_interval
from raymerge.tables import derive_accuracy


def test_the_table_of_comparisons_says_what_its_p_values_allow_for(search):
    caption = blocks([plans.answer(Reached(search))], Table)[0].caption
    assert "corrects for all 3 comparisons, separately for each measure" in caption
    assert "test on text is overconfident" in caption and "14, 9 and 8 % of cases, not 5" in caption


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


def test_a_run_without_intervals_promises_none_beside_its_accuracies(tmp_path):
    """Of a run of an earlier version "95 % interval" stood below the accuracies, and nothing behind it."""
    run = search_run(tmp_path / "run")
    stored = run.read("accuracy").drop_columns("run_id").to_pylist()
    run.replace("accuracy", [row | {"ci_low": None, "ci_high": None} for row in stored])
    (tiles,) = (block.facts for block in blocks([plans.answer(Reached(run))], Facts))
    assert [(fact.term, fact.note) for fact in tiles[:2]] == [("Accuracy", ""), ("Unmerged", "")]


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
    (figure,), (_, table) = blocks([section], Figure), blocks([section], Table)
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


def test_the_tables_of_a_search_have_the_numbers_of_their_plans(tmp_path):
    run = search_run(tmp_path / "run", seed=3)
    # Of text no p but the drop's is corrected to another, so that either can be told.
    compared_rows = [row | {"p_value": 0.01 * (i + 1), "p_holm": 0.02 * (i + 1)} for i, row in
                     enumerate(run.read("comparisons").drop_columns("run_id").to_pylist())]  # fmt: skip
    run.replace("comparisons", compared_rows)
    run.append("perplexity", [
        {"plan_id": plan, "target": "question", "subject": subject, "tokens": 9, "nll": 0.1, "perplexity": read,
         "ci_low": 1.0, "ci_high": 9.0}
        for plan in ("base", "drop", "fixed", "found") for subject, read in ((None, 1.1), ("law", 1.3))
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
            "question perplexity": "1.10 [1.00, 9.00]",
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


def test_every_subject_of_the_best_plan_stands_beside_the_unmerged_model_s(tmp_path):
    """5-shot accuracy by subject, with perplexity: a page of a search had differences alone."""
    run = search_run(tmp_path / "run", subjects=("law", "algebra", "law"))
    rows = run.read("accuracy").drop_columns("run_id").to_pylist()
    run.append("accuracy", [row | {"split": "validation", "accuracy": 0.01} for row in rows], part="v")
    stored = {(row["plan_id"], row["subject"]): row for row in rows}
    order = sorted(("law", "algebra"), key=lambda subject: -stored["base", subject]["accuracy"])

    def table():
        (every,) = blocks([subjects.differences(Reached(run))], Table)
        assert every.folded and every.caption.startswith("Every subject, the most accurate of base first, with 95 %")
        return every

    names = ("base", "found_bayes")
    header = ("subject", "questions", *(f"{of}, {name}" for of in ("accuracy [95 %]", "answer NLL") for name in names))
    assert table().header == header
    run.append("perplexity", [
        {"plan_id": plan, "target": "question", "subject": subject, "tokens": 9, "nll": 0.1, "perplexity": read}
        for plan, subject, read in (("base", "law", 2.0), ("found", "law", 3.0), ("found", None, 7.0),
                                    ("found", "algebra", 4.0), ("drop", "law", 5.0))
    ], part="questions")  # fmt: skip
    every = table()
    assert every.header == (*header, *(f"question perplexity, {name}" for name in names))
    read = {("base", "law"): "2.00", ("found", "law"): "3.00", ("found", "algebra"): "4.00"}
    assert every.cells == tuple(
        (
            subject,
            str(stored["base", subject]["n"]),
            *(pct(row["accuracy"], (row["ci_low"], row["ci_high"])) for row in (base, found)),
            *(f"{row['nll']:.3f}" for row in (base, found)),
            *(read.get((plan, subject), wording.NONE) for plan in ("base", "found")),
        )
        for subject in order
        for base, found in [(stored["base", subject], stored["found", subject])]
    )


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
