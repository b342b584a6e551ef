"""What a search's summary says, from tables made by hand."""

import numpy as np
import pytest

from raymerge import findings, summary
from raymerge.comparisons import comparison_rows
from raymerge.objectives import score_answers
from raymerge.statistics import holm
from raymerge.tables import RunDirectory, derive_accuracy

SEARCHED, REPORTED = 40, 100
PLANS = ("base", "drop", "fixed", "found")


def make_run(path, *, objective="micro_accuracy", ceiling=None, perplexity=9.0, seed=0, right=None, search_split="dev"):
    """Four plans on 100 report questions of two subjects; `found` was chosen with a value of 0.9 or 0.2 nats."""
    rng = np.random.default_rng(seed)
    config = {
        "data": {"report_split": "test", "search_split": search_split},
        "search": {"objective": objective, "perplexity_ceiling": ceiling},
    }
    run = RunDirectory.open(path, config, "search")
    run.begin()
    answer = rng.integers(4, size=REPORTED)
    logits, answers = {}, []
    for plan, share in (right or {"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": 0.62}).items():
        logits[plan] = rng.normal(0, 0.5, (REPORTED, 4)).astype(np.float32)
        chosen = np.where(rng.uniform(size=REPORTED) < share, answer, (answer + 1) % 4)
        logits[plan][np.arange(REPORTED), chosen] += 3
        answers += [
            {"plan_id": plan, "split": "test", "language": "en", "subject": "ab"[i % 2], "question_id": f"{i:03}",
             "content_hash": "", "answer": int(answer[i]), "predicted": int(logits[plan][i].argmax()),
             **{f"logit_{c}": logits[plan][i, k] for k, c in enumerate("abcd")}}
            for i in range(REPORTED)
        ]  # fmt: skip
    run.append("answers", answers)
    run.replace("accuracy", derive_accuracy(run.read("answers")))
    kinds = {"base": "base", "drop": "drop", "fixed": "fixed", "found": "found"}
    run.replace("plans", [
        {"plan_id": plan, "name": f"plan_{plan}", "kind": kinds[plan], "selection": "tail", "alignment": "none",
         "norms": "keep", **({} if plan == "base" else {"step": 0, "into": 1, "remove": 2, "alpha": 0.5})}
        for plan in PLANS
    ])  # fmt: skip
    run.replace("perplexity", [
        {"plan_id": plan, "target": "text", "tokens": 9, "nll": nll, "perplexity": float(np.exp(nll))}
        for plan, nll in zip(PLANS, (1.5, 4.0, 2.5, 2.25), strict=True)
    ])  # fmt: skip
    value = 0.2 if "nll" in objective or "kl" in objective else 0.9
    trials = [("controls", 0, "drop", value / 2, 1e6), ("controls", 1, "fixed", value, 12.0),
              ("bayes", 0, "found", value, perplexity), ("bayes", 1, "other", value / 3, 500.0)]  # fmt: skip
    run.append("trials", [
        {"searcher": searcher, "iteration": iteration, "batch": 0, "tune_trial": "", "actor": "", "seed": 0,
         "plan_id": plan, "alphas": [0.5], "objective": objective, "value": v, "accuracy": 0.9, "nll": 0.2,
         "perplexity": p if ceiling or "text" in objective else None, "n_questions": SEARCHED, "seconds": 0.1,
         "cpu_seconds": None if ceiling else 0.08, "status": "ok"}
        for searcher, iteration, plan, v, p in trials
    ])  # fmt: skip
    table = run.read("answers")
    asked = [("found", "base"), ("found", "drop"), ("found", "fixed")]
    others = [("base", "drop"), ("base", "fixed"), ("drop", "fixed")]
    run.replace("comparisons", comparison_rows("test", table, asked) + comparison_rows("test", table, others))
    run.write_manifest(command=["test"], best={"name": "found_bayes", "plan_id": "found", "model": None})
    return run, logits, answer


def test_the_value_on_the_report_is_the_objectives_own(tmp_path):
    run, logits, answer = make_run(tmp_path / "run")
    subjects = ["ab"[i % 2] for i in range(REPORTED)]
    for objective in ("micro_accuracy", "macro_accuracy", "accuracy:b", "answer_nll", "answer_kl+0.5*text_nll"):
        found = findings.objective_value(run, "test", "found", objective)
        expected = score_answers(
            objective, logits["found"], answer, subjects, reference=logits["base"], text_nll=2.25
        ).value
        assert found == pytest.approx(expected, rel=1e-6)
    domains = {"domains": {"all": ["b", "a"], "more": ["a", "c"]}}
    named = RunDirectory.load(tmp_path / "run")
    named.config["data"] |= domains
    for domain, same in (("all", "micro_accuracy"), ("more", "accuracy:a")):
        of_domain = findings.objective_value(named, "test", "found", f"accuracy:{domain}")
        assert of_domain == findings.objective_value(run, "test", "found", same)
    assert findings.objective_value(run, "test", "nobody", "answer_nll") is None
    assert findings.objective_value(run, "test", "found", "accuracy:c") is None
    assert findings.objective_value(run, "validation", "found", "answer_kl") is None


@pytest.mark.parametrize(("objective", "searched"), [("micro_accuracy", 0.9), ("answer_nll", 0.2)])
def test_optimism_is_how_much_better_the_choosing_questions_were(tmp_path, objective, searched):
    run, logits, answer = make_run(tmp_path / "run", objective=objective)
    first, second = summary.optimism_lines(run, "test")
    reported = {plan: findings.objective_value(run, "test", plan, objective) for plan in PLANS}
    sign = 1 if objective == "micro_accuracy" else -1
    gap = sign * (searched - reported["found"])
    assert gap > 0.1  # positive where the search flatters, whichever way the objective goes
    assert first == (
        f"found_bayes: {objective} {searched:.4f} on the 40 questions it was chosen on, {reported['found']:.4f} on the "
        f"report's: optimism {gap:+.4f}"
    )
    controls = sign * np.mean([searched / 2 - reported["drop"], searched - reported["fixed"]])
    assert second.startswith(f"The 2 controls, not chosen by the search: {controls:+.4f} on average")
    # The best single layer to keep was chosen, by the same questions.
    plans = [row | {"kind": "keep_one"} if row["plan_id"] == "drop" else row for row in run.read("plans").to_pylist()]
    run.replace("plans", [{key: value for key, value in row.items() if key != "run_id"} for row in plans])
    fixed = sign * (searched - reported["fixed"])
    assert summary.optimism_lines(run, "test")[1].startswith(f"The control, not chosen by the search: {fixed:+.4f} on")


def test_no_optimism_is_measured_on_the_questions_that_chose(tmp_path):
    run, *_ = make_run(tmp_path / "run", search_split="test")
    (line,) = summary.optimism_lines(run, "test")
    assert line.startswith("found_bayes: it was chosen on test questions") and "too good" in line


def test_what_candidates_took_is_summed(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    assert summary.search_lines(run)[1].endswith("; 0.2 s of worker time, 0.2 s of CPU time")
    run, *_ = make_run(tmp_path / "old", ceiling=1e9)  # as written before CPU time was measured
    assert summary.search_lines(run)[1].endswith("; 0.2 s of worker time")


def test_one_candidate_is_one(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    run.replace("trials", run.read("trials").slice(0, 1).drop_columns("run_id"))
    assert summary.search_lines(run)[0].split(": ")[1].startswith("1 candidate; ")


def test_values_above_a_ceiling_are_no_values(tmp_path):
    run, *_ = make_run(tmp_path / "run", ceiling=20.0)
    controls, bayes = summary.search_lines(run)
    assert "1 above the perplexity ceiling of 20; micro_accuracy best 0.9000, mean 0.9000" in bayes
    assert "best 0.9000" in controls and "worst 0.9000" in controls
    assert summary.optimism_lines(run, "test")[1].startswith("The control, not chosen by the search")
    run, *_ = make_run(tmp_path / "none", ceiling=8.0)
    assert summary.search_lines(run)[1] == "bayes: 2 candidates, 2 above the perplexity ceiling of 8"
    assert "above the ceiling of 8, as is every candidate's" in summary.optimism_lines(run, "test")[0]


def test_comparisons_of_a_plan_with_adjusted_p(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    rows = [row for row in run.read("comparisons").to_pylist() if row["measure"] == "accuracy"]
    for family in (rows[:3], rows[3:]):
        np.testing.assert_allclose([r["p_holm"] for r in family], holm([r["p_value"] for r in family]))
    _, cells = summary.comparison_table(run, "found")
    assert [line[0] for line in cells] == [f"plan_{p}" for p in PLANS[:3]]
    assert [line[-1] for line in cells] == ["worse", "better", "indistinguishable"]
    assert cells[0][3:5] == [f"{rows[0]['p_value']:.3g}", f"{rows[0]['p_holm']:.3g}"]
    notes = summary.comparison_notes(run, "found")
    assert notes[0].startswith("(3 comparisons: p and intervals are uncorrected; Holm's p corrects for all of them")
    assert notes[1] == "(Table comparisons has 3 further pairs of plans.)"
    # Of a plan that stands second in the table's rows, its own side is told.
    _, turned = summary.comparison_table(run, PLANS[0])
    low, high = rows[0]["ci_low"], rows[0]["ci_high"]
    assert turned[0][:3] == ["plan_found", f"{-rows[0]['difference']:+.4f}", f"[{-high:+.4f}, {-low:+.4f}]"]
    assert turned[0][-1] == "better"


def test_a_gain_that_only_an_uncorrected_p_calls_one_is_said_to_be_so(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    rows = run.read("comparisons").to_pylist()
    rows = [row | {"p_value": 0.03, "p_holm": 0.09, "difference": 0.1} for row in rows]
    run.replace("comparisons", [{key: value for key, value in row.items() if key != "run_id"} for row in rows])
    assert summary.comparison_table(run, "found")[1][0][-1] == "better, but not after correction"


def test_the_table_of_plans_has_intervals(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    (line, *_) = findings.plan_lines(run, "test")
    header, cells = summary.plan_table([line | {"picked": [0.25] * 4, "top_is_letter": None}])
    stored = run.read("accuracy").to_pylist()[0]
    interval = f"[{stored['ci_low']:.3f}, {stored['ci_high']:.3f}]"
    assert cells[0][header.index("accuracy [95 %]")] == f"{stored['accuracy']:.4f} {interval}"
    assert summary.share(0.5, 0.1, (None, None)) == "0.5000 ± 0.1000"


def test_what_befell_a_run_is_counted_and_nothing_said_where_nothing_did(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    assert summary.incident_lines(run) == []
    run.note("lost", "worker-0", "score: no answer in time, the worker hangs")
    run.note("back", "worker-0", "on 10.0.0.2")
    run.note("lost", "worker-1", "score: ActorDiedError: killed " + 400 * "x")
    run.begin()
    resumed, lost, back = summary.incident_lines(run)
    assert resumed.startswith("1 start with stored results: 16 accuracy, 400 answers,")
    assert resumed.endswith(", 4 trials")
    assert lost.startswith("2 workers lost, the last: score: ActorDiedError: killed") and len(lost) < 240
    assert back == "1 worker came back: on 10.0.0.2"


def test_how_much_each_worker_was_used(tmp_path):
    run, *_ = make_run(tmp_path / "run")
    assert summary.worker_table(run)[1] == []
    used = {"worker": "worker-1", "candidates": 7, "scoring_seconds": 3.04, "present_seconds": 4.0, "utilisation": 0.76}
    run.write_manifest(command=["test"], bayes_search={"batch": 1, "workers": [used]})
    header, cells = summary.worker_table(run)
    assert dict(zip(header, cells[0], strict=True)) == {
        "search": "bayes", "worker": "worker-1", "candidates": "7", "scoring s": "3.0", "present s": "4.0",
        "used %": "76",
    }  # fmt: skip


def test_always_answering_a_gets_the_share_of_right_answers_that_are_a(tmp_path):
    run, _, answer = make_run(tmp_path / "run")
    assert findings.always_a_share(run, "test") == np.mean(answer == 0)


def test_plans_of_a_run_without_questions_have_their_perplexity_alone(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"data": {"mmlu": None, "report_split": "test"}}, "search")
    run.begin()
    run.replace("plans", [{"plan_id": "p", "name": "base", "kind": "base", "selection": "tail", "alignment": "none",
                           "norms": "keep"}])  # fmt: skip
    run.replace("perplexity", [{"plan_id": "p", "target": "text", "tokens": 9, "nll": 1.5, "perplexity": 4.5}])
    (line,) = findings.plan_lines(run, "test")
    assert (line["name"], line["n"], line["accuracy"], line["perplexity"]) == ("base", 0, None, 4.5)


def test_a_share_without_a_standard_error_has_its_interval():
    assert summary.share(0.75, float("nan"), (0.3, 0.95)) == "0.7500 [0.300, 0.950]"
    assert summary.share(0.75, 0.1, (None, None)) == "0.7500 ± 0.1000"
    assert summary.share(0.75, None, (0.3, 0.95)) == "0.7500 [0.300, 0.950]"


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.04, "4.040"), (15.0, "15.00"), (416.66, "416.7"), (1493.4, "1,493"), (230123.0, "230,123"),
     (10712635.0, "1.1e+07"), (float("inf"), "inf"), (float("nan"), "–"), (None, "–")],
)  # fmt: skip
def test_perplexities_have_the_digits_that_say_something(value, text):
    assert summary.number(value) == text
    assert summary.number(2.5, (2.0, 1e7)) == "2.500 [2.000, 1.0e+07]"
