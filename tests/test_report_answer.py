"""What a page answers, and what it calls the plans that it reached."""

import json
from dataclasses import replace

import pytest
from report_runs import (
    LAYERS,
    MERGES,
    QUESTIONS,
    as_dicts,
    blocks,
    evaluated,
    search_run,
)

from raymerge import findings, rows, summary
from raymerge.card import search_results
from raymerge.plan import base_plan, drop_block_plan, drop_plan, keep_one_plans, pairs_plan, tail_pairs
from raymerge.report import (
    answer,
    plans,
    searched,
    subjects,
    wording,
)
from raymerge.report.build import GLOSSARY
from raymerge.report.content import (
    Figure,
    Table,
    Text,
)
from raymerge.report.reached import Reached, chosen_layers, described
from raymerge.tables import MICRO, RunDirectory


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
        "found": "found by the search (matrices of 3 in 1, without 1-2)",
        "fitted": "found by the search, seams refitted by linear (matrices of 3 in 1, without 1-2)",
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


@pytest.mark.parametrize(
    ("base", "found", "said"),
    [
        (0.9, 0.5, None),
        (0.9, 0.2, "This is not shown to be better than guessing (25 %). "),
        (0.2, 0.2, "Neither this nor the unmerged model's accuracy is shown to be better than guessing (25 %)."),
    ],
)
def test_guesses_and_ruined_models_are_called_so(tmp_path, base, found, said):
    """A merge of a real model with a perplexity of 19,980, which guessed, was "better" and no more was said of it."""
    run = search_run(tmp_path / "run", right={"base": base, "drop": 0.3, "fixed": 0.3, "found": found})
    questions, text = answer.in_words(Reached(run))[:2]
    assert ("guessing" in questions) == (said is not None) and (said or "") in questions
    assert "ruined" not in text
    rows = run.read("perplexity").drop_columns("run_id").to_pylist()
    run.replace("perplexity", [row | ({"perplexity": 51.0} if row["plan_id"] == "found" else {}) for row in rows])
    text = answer.in_words(Reached(run))[1]
    assert "is 51.0; the unmerged model's is 5.00. The merged model is ruined as a language model. By loss" in text


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


def test_a_plan_from_an_alpha_file_is_not_taken_for_the_control_of_its_name(tmp_path):
    run = search_run(tmp_path / "run", control="drop")
    run.replace("plans", [row | {"kind": "file"} if row["plan_id"] == "fixed" else row
                          for row in run.read("plans").drop_columns("run_id").to_pylist()])  # fmt: skip
    reached = Reached(run)
    told = {line["label"]: described(line).split(" (")[0] for line in reached.lines}
    assert told["drop"] == "last layers dropped" and told["drop (alpha file)"] == "given coefficients"
    against = {row["against"]: row["difference"] for row in subjects.difference_rows(reached)}
    assert against.keys() == {"base", "drop", "drop (alpha file)"}


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
    # "controls: 3 candidates", it said, above two lines.
    assert "Dashed lines: controls (of the plans that keep one layer, the best alone). " in figure.caption


def beside_one_layer(run, best="drop"):
    """What the answer says of the best single layer, of a search whose manifest names it."""
    manifest = run.manifest() | {"keep_one": {"best": best, "of": 4}}
    run.write_text(json.dumps(manifest), "manifest.json")
    reached = Reached(RunDirectory.load(run.path_of()))
    return reached, [each for each in answer.in_words(reached) if "keep one of the merged" in each]


@pytest.mark.parametrize(
    ("right", "text", "said"),
    [
        (0.8, -1, "By accuracy, answer NLL and loss per token it is better than drop, the best of the plans that keep"),
        (0.8, 1, "By accuracy and answer NLL it is better than drop, the best of the plans that keep one of"),
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
    # It was said to gain, "by accuracy or answer NLL", beside a loss on text of which nothing was said there.
    worse = right["found"] > 0.5 and text == 1
    assert any(paragraph.endswith("; by loss per token it is worse.") for paragraph in paragraphs) == worse
    # A search over blocks may have found another block than the one whose layers were kept.
    reached.run.config["plan"]["block"] = "search"
    assert [each for each in answer.in_words(reached) if "keep one of the merged" in each] == paragraphs, "of a tail"
    reached.run.config["plan"]["selection"] = "block"
    assert not any("keep one of the merged" in each for each in answer.in_words(reached))
    reached.run.config["plan"]["selection"] = "tail"
    reached.run.config["data"]["search_split"] = "test"  # where nothing is a test
    assert not any("keep one of the merged" in each for each in answer.in_words(reached))


@pytest.mark.parametrize(
    ("beside_drop", "said"),
    [
        ({}, "By accuracy, answer NLL and loss per token it is better than keep_5, "),
        # "averaging gained what no choice of one layer does" stood below "indistinguishable from drop", which is one.
        ({"text_nll": 0.0}, "By accuracy and answer NLL it is better than keep_5, "),
        ({"text_nll": 0.0, "accuracy": 0.0, "answer_nll": 0.0}, None),
        ({"accuracy": -0.2}, None),
    ],
)
def test_averaging_gains_where_it_is_better_than_every_choice_of_one_layer(tmp_path, beside_drop, said):
    """keep_5 is the best on the search questions; dropping keeps another of the merged layers."""
    run = search_run(tmp_path / "run", right={"base": 0.9, "drop": 0.3, "fixed": 0.3, "found": 0.9})
    plan = keep_one_plans(drop_plan(LAYERS, MERGES))[5]
    for table, rows_of in (("plans", rows.plan_rows), ("coefficients", rows.coefficient_rows)):
        others = [row for row in run.read(table).drop_columns("run_id").to_pylist() if row["plan_id"] != "fixed"]
        run.replace(table, [*others[:-1], *rows_of(plan, "fixed"), others[-1]])
    stored = run.read("comparisons").drop_columns("run_id").to_pylist()
    p = {measure: 0.001 if difference else 1.0 for measure, difference in beside_drop.items()}
    changed = {"difference": beside_drop, "p_value": p, "p_holm": p}
    run.replace("comparisons", [
        row | {key: by[row["measure"]] for key, by in changed.items()
               if row["plan_b"] == "drop" and row["measure"] in by}
        for row in stored
    ])  # fmt: skip
    _, paragraphs = beside_one_layer(run, best="keep_5")
    assert [paragraph[: len(said)] for paragraph in paragraphs] == [said] if said else paragraphs == []
    assert all(paragraph.endswith(": averaging gained what choosing one layer did not.") for paragraph in paragraphs)


@pytest.mark.parametrize(
    ("alphas", "source"), [((1.0, 0.0, 1.0), None), ((1.0, 1.0, 0.0), LAYERS - 3), ((0.0, 0.0, 0.0), LAYERS - 1)]
)
def test_what_averages_nothing_is_not_said_to_gain_by_it(tmp_path, alphas, source):
    """All of the weight on one layer, whose norms are another's: no keep_N, which it was not to be told from."""
    run = search_run(tmp_path / "run", right={"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": 0.8}, alphas=alphas)
    reached, paragraphs = beside_one_layer(run)
    assert findings.verdict(reached.against("found")["drop"]) == "better" and paragraphs == []
    first = LAYERS - 1 - MERGES
    whose = "" if source is None else f"; layer {first} has those of layer {source} and keeps its own norms and biases"
    assert f"It averages nothing: each of its matrices is a single layer's{whose}." in answer.in_words(reached)


@pytest.mark.parametrize(
    ("alphas", "own", "said", "fate"),
    [
        # One matrix is layer 5's, all others layer 2's: the brackets said "2, 5 merged", beside "averages nothing".
        ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), "layers 2 and 5", "matrices of 2 and 5 in 2, without 3-4"),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 0.0), "layers 3 and 5", "matrices of 3 and 5 in 2, without 2, 4"),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 0.5), None, "2-3 merged, without 4-5"),
        # "4-5 merged, without 2-3" read like a merge of 5 into 4, whose norms are 4's.
        ((0.5, 0.0, 0.0), (0.5, 0.0, 0.0), None, "matrices of 4-5 merged in 2, without 2-3"),
    ],
)
def test_matrices_of_several_layers_none_of_which_is_averaged_are_told_alike_everywhere(
    tmp_path, alphas, own, said, fate
):
    run = search_run(tmp_path / "run")
    plan = pairs_plan(LAYERS, tail_pairs(LAYERS, MERGES), list(alphas), name="found_bayes", kind="found")
    plan = replace(plan, matrix_alphas=(("mlp.up_proj", own),))
    others = [row for row in run.read("coefficients").drop_columns("run_id").to_pylist() if row["plan_id"] != "found"]
    run.replace("coefficients", [*others, *rows.coefficient_rows(plan, "found")])
    reached = Reached(run)
    assert reached.the_best["fate"] == fate
    nothing = [text for text in answer.in_words(reached) if text.startswith("It averages nothing")]
    told = f"layer 2 has those of {said} and keeps its own norms and biases."
    assert nothing == ([f"It averages nothing: each of its matrices is a single layer's; {told}"] if said else [])


@pytest.mark.parametrize(
    ("norms", "biases", "beside"),
    [
        ("keep", "merge", " and keeps its own norms"),
        ("fold", "keep", " and keeps its own biases"),
        ("fold", "merge", ""),
    ],
)
def test_a_layer_with_anothers_matrices_keeps_no_norms_that_are_folded_and_no_biases_that_are_merged(
    tmp_path, norms, biases, beside
):
    options = {"norms": norms, "biases": biases}
    run = search_run(tmp_path / "run", alphas=(0.0, 0.0, 0.0), **options)
    told = f"; layer {LAYERS - 1 - MERGES} has those of layer {LAYERS - 1}{beside}."
    assert any(line.endswith(told) for line in answer.in_words(Reached(run)))


def test_the_best_single_layer_is_known_also_where_another_searcher_found_it(tmp_path):
    run = search_run(tmp_path / "run", right={"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": 0.8})
    plans = run.read("plans").drop_columns("run_id").to_pylist()
    again = [row | {"name": "found_random", "kind": "found"} for row in plans if row["plan_id"] == "drop"]
    run.replace("plans", [*(row for row in plans if row["plan_id"] != "found"), *again,
                          *(row for row in plans if row["plan_id"] == "found")])  # fmt: skip
    reached, (paragraph,) = beside_one_layer(run)
    (name,) = (line["name"] for line in reached.lines if line["plan_id"] == "drop")
    assert name == "found_random" and "averaging gained" in paragraph


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
