"""card.py: the numbers of a record and of a run's tables, where a card has them."""

import re
import shlex
from types import SimpleNamespace

import pytest
import yaml
from report_runs import search_run

from raymerge.card import model_card, search_results
from raymerge.tables import MICRO

PROOF = {"passed": True, "error": None, "max_difference": 1.2e-5, "positions": 66, "tolerance": 3e-4,
         "largest_logit": 21.5, "predictions_equal": 65, "generated_tokens": 8}  # fmt: skip
RECORD = {
    "raymerge": "0.1.0", "command": ["raymerge", "merge", "a b"], "plan_id": "p1", "name": "found_bayes",
    "base_model_identity": "m1", "gguf_source": None, "towers": None, "alignment": "neurons", "norms": "fold",
    "biases": "merge", "steps": [[4, 5, 0.25], [3, 4, 0.75]],
    "layers_before": 6, "layers_after": 4, "parameters_removed": 1_234_567_890,
    "parameters": 3_765_432_110, "tensors_changed": 9, "mergekit": None, "proof": PROOF,
}  # fmt: skip


def card_of(tmp_path, hub_id="org/Base-1B", **changes):
    checkpoint = SimpleNamespace(public_name=hub_id or "Base-1B", hub_id=hub_id, directory=tmp_path)
    return model_card(RECORD | changes, checkpoint)


def tables_of(lines):
    """The cells of each table of Markdown, by its header's first cell."""
    found, rows = {}, []
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            assert len({len(row) for row in rows}) == 1 and set("".join(rows[1])) <= set("-:")
            found[rows[0][0]] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
            rows = []
    return found


def test_a_card_has_the_numbers_of_the_record(tmp_path):
    card = card_of(tmp_path)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "base_model": "org/Base-1B",
                                     "base_model_relation": "merge", "tags": ["layer-merging", "raymerge"]}  # fmt: skip
    assert text.startswith("# Base-1B, 2 layers merged away\n")
    assert (
        "6 decoder layers became 4, which removes 1,234.6 million parameters, 24.7 % (plan `p1`, found_bayes; " in text
    )
    assert "norms fold, biases merge, alignment neurons)." in text and "9 tensors differ" in text
    assert shlex.split(text.split("```")[1]) == ["raymerge", "merge", "a b"]
    assert tables_of(text.splitlines()) == {"step": [
        {"step": "0", "into": "4", "removed": "5", "alpha": "0.250000"},
        {"step": "1", "into": "3", "removed": "4", "alpha": "0.750000"},
    ]}  # fmt: skip
    assert "by at most 1.2e-05 at 66 positions (rounding explains 0.0003; the largest logit is 21.5). 65 of 66" in text
    assert "generated 8 tokens" in text and "which makes the same weights" in text and "were then fitted" not in text

    alone = card_of(tmp_path, hub_id=None, layers_after=5, command=None, refit={"method": "units"},
                    mergekit="it has no terms", matrix_alphas={"mlp.up_proj": [0.5]})  # fmt: skip
    assert "base_model" not in alone and "# Base-1B, 1 layer merged away\n" in alone and "```" not in alone
    assert "alignment neurons, refit units)." in alone and "calibration tokens (units), so" in alone
    assert "There is no mergekit.yaml: it has no terms." in alone and "same weights" not in alone
    assert "Some matrices have alphas of their own" in alone and "Some matrices" not in card


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        (None, "None: the saved model was not reloaded"),
        (PROOF | {"passed": False, "error": "logits differ"}, "**Failed**: logits differ. Do not use this model."),
    ],
)
def test_a_card_without_a_proof_says_so(tmp_path, proof, said):
    card = card_of(tmp_path, proof=proof)
    assert said in card and "transformers reloaded" not in card


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [x]\n---\n# It\n",
         {"license": "other", "license_name": "mine", "license_link": "LICENSE"}),
        ("# A card\n---\nlicense: mit\n---\n", {}),
        ("no front matter", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
    ],
)  # fmt: skip
def test_a_card_keeps_the_terms_of_the_model(tmp_path, own, kept):
    (tmp_path / "README.md").write_text(own)
    front = yaml.safe_load(card_of(tmp_path, hub_id=None).split("---\n", 2)[1])
    assert front == {"library_name": "transformers", "tags": ["layer-merging", "raymerge"]} | kept


def test_results_of_a_search_are_those_of_its_tables(tmp_path):
    run = search_run(tmp_path / "run", objective="micro_accuracy")
    lines = search_results(run, "found", "test")
    assert lines[0] == "On 120 test questions, none of which the search saw."
    assert lines[1].startswith("The search objective was micro_accuracy.")
    tables = tables_of(lines)
    assert list(tables) == ["plan", "against"]
    micro = {row["plan_id"]: row for row in run.read("accuracy").to_pylist() if row["subject"] == MICRO}
    names = {"base": "base", "drop": "drop", "fixed_0.62": "fixed", "found_bayes": "found"}
    assert [row["plan"] for row in tables["plan"]] == list(names)
    for row in tables["plan"]:
        assert row["accuracy [95 %]"].startswith(f"{micro[names[row['plan']]]['accuracy']:.4f} [")
    for row in tables["against"]:
        difference = micro["found"]["accuracy"] - micro[names[row["against"]]]["accuracy"]
        assert row["difference"] == f"{difference:+.4f}"
    answers = [row["answer"] for row in run.read("answers").to_pylist() if row["plan_id"] == "base"]
    (always,) = [line for line in lines if "Always answering A" in line]
    assert always.endswith(f"would score {answers.count(0) / len(answers):.4f}.")

    run.config["data"]["search_split"] = "test"
    assert search_results(run, "found", "test")[0].startswith("On 120 test questions, **on which the search chose**")
    run.append("subject_comparisons", [
        {"plan_a": "found", "plan_b": "base", "split": "test", "subjects": "law", "n": 40, "measure": "accuracy",
         "difference": -0.2, "ci_low": -0.3, "ci_high": -0.1, "p_value": 0.01, "p_holm": 0.02, "test": "mcnemar_exact"}
    ])  # fmt: skip
    (own,) = tables_of(search_results(run, "found", "test"))["measure"]
    assert (own["against"], own["difference"], own["verdict"]) == ("base", "-0.2000", "worse")


def test_a_card_does_not_call_the_questions_own_perplexity_that_of_a_text(tmp_path):
    run = search_run(tmp_path / "run")
    run.replace("perplexity", [
        {"plan_id": plan, "target": "question", "tokens": 9, "nll": 0.1, "perplexity": 2.0}
        for plan in ("base", "drop", "fixed", "found")
    ])  # fmt: skip
    lines = search_results(run, "found", "test")
    assert "question ppl [95 %]" in tables_of(lines)["plan"][0]
    assert lines[1].endswith(" Intervals are 95 % intervals; question ppl is perplexity on the questions' own tokens.")
    lines = search_results(search_run(tmp_path / "other"), "found", "test")
    assert lines[1].endswith(" Intervals are 95 % intervals; text ppl is perplexity on plain text.")


def test_results_of_a_search_without_questions_are_of_text_or_of_tasks(tmp_path):
    run = search_run(tmp_path / "run")
    run.config["data"]["mmlu"] = None
    run.append("task_accuracy", [
        {"plan_id": "found", "task": "piqa", "measure": "acc", "n": 50, "correct": 20, "accuracy": 0.4,
         "standard_error": 0.07, "ci_low": 0.3, "ci_high": 0.5}
    ])  # fmt: skip
    for table in ("answers", "accuracy"):
        run.replace(table, [])
    lines = search_results(run, "found", "test")
    assert lines[0].startswith("On plain text, ") and not any("Always answering A" in line for line in lines)
    assert all("task" not in row for table in tables_of(lines).values() for row in table)
    for table in ("perplexity", "text_losses", "comparisons"):
        run.replace(table, [])
    lines = search_results(run, "found", "test")
    assert lines[0].startswith("On the tasks below, ")
    assert ["piqa"] == [row["task"] for table in tables_of(lines).values() for row in table if "task" in row]
