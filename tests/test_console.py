"""Progress as a log shows it - a line a stage, and one now and then while a long step goes on - and summaries."""

import io
import itertools
import math
import re
import threading
import time
from types import SimpleNamespace

import pytest
from report_runs import LAYERS, evaluated, imported_run, search_run, sensitivity_run, similarity_run, sweep_run

from raymerge import console
from raymerge.plan import base_plan
from raymerge.progress import Silent, step
from raymerge.tables import RunDirectory


def wait_for(lines, count):
    deadline = time.monotonic() + 10
    while len(lines) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(lines) >= count


def test_where_results_lie_is_said_without_the_keys_of_a_uri(capsys):
    where = "s3://AKIA:hunter2@bucket/run"
    run = SimpleNamespace(is_local=False, path_of=lambda *names: "/".join((where, *names)), manifest=lambda: None)
    console._print_place(run)
    for saved in ({"name": "found", "model": "there"}, {"name": "found"}):
        console._print_model(run, saved)
    said = capsys.readouterr().out
    assert said.count("s3://***@bucket/run") == 4 and "hunter" not in said


def test_a_log_gets_one_line_a_stage():
    lines = []
    log = console._Log(lines.append)
    log.stage("trunk states (tokens)", 500)
    log.advance(250)
    log.advance(500, "best 0.5")
    log.stage("figures", 2)
    log.message("kept")
    log.close()
    assert len(lines) == 3
    assert lines[0].startswith("trunk states (tokens): 500/500, best 0.5, ")
    assert lines[1] == "kept"
    assert lines[2].startswith("figures: 0/2, ")


def test_a_log_shows_that_a_step_without_advances_is_alive():
    lines = []
    log = console._Log(lines.append, every=0.02)
    log.stage("loading the model", 1)
    wait_for(lines, 2)
    assert lines[0].startswith("loading the model: ") and lines[0].endswith(" s so far")
    log.stage("report on test", 10)
    log.advance(5)
    before = len(lines)
    wait_for(lines, before + 1)
    assert lines[-1].startswith("report on test: 5/10, ") and lines[-1].endswith(" s left")
    log.advance(10)  # finished: quiet until the next stage
    log.close()
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_without_a_terminal_progress_goes_to_standard_error(capsys):
    with console.progress() as shown:
        with step(shown, "starting Ray"):
            pass
        shown.stage("report on test", 2)
        shown.advance(2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("report on test: 2/2, ") and err.endswith(" s\n")


def test_a_log_leaves_out_short_steps_and_those_that_failed(monkeypatch):
    lines = []
    log = console._Log(lines.append)
    with step(log, "short"):
        pass
    log.stage("failed", 1)
    monkeypatch.setattr(console, "_LOG_FROM_S", 0.0)
    log.stage("next", 1)
    log.advance(1)
    log.close()
    assert len(lines) == 1 and lines[0].startswith("next: ")


def test_a_terminal_gets_bars_whose_names_are_no_markup():
    from rich.console import Console

    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    live = console._Live(terminal)
    live.stage("search [bold]x[/bold]", 40)
    live.advance(20, "best [red]")
    live.message("a [note]")
    live.close()
    shown = terminal.file.getvalue()
    assert "search [bold]x[/bold]" in shown and "best [red]" in shown and "a [note]" in shown
    assert "20/40" in shown and "/s" in shown


@pytest.mark.parametrize("width", [80, 100, 140])
def test_counts_and_times_have_room_in_a_terminal(width):
    from rich.console import Console

    shown = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    bars = console._Live(shown)
    for name, total, note in (
        ("proof: the saved model, loaded in a fresh process", 1, ""),
        ("trunk states (tokens)", 148_512, ""),
        ("controls on the search questions", 40, "best 0.9250"),
    ):
        bars.stage(name, total)
        bars.advance(total, note)
    bars.close()
    text = shown.file.getvalue()
    assert "148512/148512" in text and "best 0.9250" in text and "40/40" in text
    times = [line.split()[-2:] for line in text.splitlines() if "tokens" in line]
    assert times[-1] == ["0:00:00", "0:00:00"]


def test_rates():
    assert console.rate(0, 1.0) == "" and console.rate(5, 0.0) == ""
    assert console.rate(3000, 2.0) == "1,500/s"
    assert console.rate(3, 2.0) == "1.5/s"
    assert console.rate(2, 60.0) == "30.0 s each"


def test_a_step_that_fails_is_not_called_finished():
    class Seen(Silent):
        done = 0

        def advance(self, done, note=""):
            self.done = done

    seen = Seen()
    with step(seen, "x"):
        pass
    assert seen.done == 1
    seen = Seen()
    with pytest.raises(ValueError), step(seen, "x"):
        raise ValueError
    assert seen.done == 0


def test_the_answer_stands_in_words_under_the_tables(tmp_path, capsys):
    console.print_sweep(sweep_run(tmp_path / "sweep"), "test")
    shown = capsys.readouterr().out
    told = "of 120 test questions correctly. With 1 layer merged, fixed_0.5 is the most accurate"
    assert told in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 120

    console.print_similarity(similarity_run(tmp_path / "similarity"))
    shown = capsys.readouterr().out
    assert "of all pairs of layers, over 2 subsets of prompts, similarity is above" in " ".join(shown.split())
    assert shown.startswith("language en, measure gaussian, embedding diffusion, n 40\n") and "more pairs" not in shown

    # 10 subsets make 45 pairs, whose correlations fall in order under one ceiling.
    names = [f"high_school_government_and_politics_{i}" for i in range(10)]
    console.print_similarity(similarity_run(tmp_path / "many", subsets=names))
    shown = capsys.readouterr().out
    pairs = [line for line in shown.splitlines() if "/en – " in line]
    assert len(pairs) == 30 and pairs[0].startswith(f"{names[8]}/en – {names[9]}/en ")
    assert "(Those furthest below their ceilings; table similarity_correlation has 15 more pairs.)" in shown
    table = shown.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 120

    # Imported matrices have no ceilings, and nobody has looked at their diffusion maps.
    console.print_similarity(imported_run(tmp_path / "imported", [f"s{i}" for i in range(10)]))
    shown = capsys.readouterr().out
    assert "(The lowest; table similarity_correlation has 15 more pairs.)" in shown and "Ceiling" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("s0 ")]
    assert line.split()[-2:] == ["0", "–"]  # none undefined, degenerate unknown

    # A constant matrix has no correlation, which is neither large nor small.
    many = RunDirectory.load(tmp_path / "many")
    rows = many.read("similarity_correlation").to_pylist()
    undefined = [row | {"pearson_off_diagonal": math.nan} for row in rows[:9]]
    many.replace("similarity_correlation", [*undefined, *rows[9:]])
    console.print_similarity(many)
    pairs = [line for line in capsys.readouterr().out.splitlines() if "/en – " in line]
    assert len(pairs) == 30 and not any("nan" in line for line in pairs)

    run = search_run(tmp_path / "search")
    console.print_search(run, "test")
    shown = capsys.readouterr().out
    assert "The best plan found, found_bayes, answers" in shown and "worse than the unmerged model" in shown
    assert "\nOriginal layers in found_bayes, counted from 0: 2-5 merged.\n" in shown
    assert "found_bayes minus the others" in shown and "bayes: 8 candidates" in shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 120
    assert shown.startswith("\n120 test questions:\n") and shown.count(f"raymerge report {tmp_path}/search\n") == 1


def test_a_merged_model_is_where_the_run_is_now(tmp_path, capsys):
    """A copied run's model is in the copy; one that was deleted, or never saved, is not said to be there."""
    run = search_run(tmp_path / "run")
    best = run.manifest()["best"]

    def said(model):
        run.write_manifest(best=best | {"model": model})
        console.print_search(run, "test")
        return [line for line in capsys.readouterr().out.splitlines() if "found_bayes" in line][-1]

    again = f"To have it, delete {tmp_path}/run/manifest.json and give the same command"
    assert said(None) == f"found_bayes was not saved. {again} with output.save_best=true."
    gone = f"found_bayes is no longer in {tmp_path}/run/models/found_bayes. {again}."
    assert said("/another/machine/run/models/found_bayes") == gone
    run.write_text("{}", "plans", "found_bayes.json")
    cure = f"To have it: raymerge merge MODEL --plan {tmp_path}/run/plans/found_bayes.json --out DIR"
    assert said(None) == f"found_bayes was not saved. {cure}"
    assert said("/another/machine/run/models/found_bayes") == gone.replace(f"{again}.", cure)
    (tmp_path / "run/models/found_bayes").mkdir(parents=True)
    assert said("/another/machine/run/models/found_bayes") == f"Merged model: {tmp_path}/run/models/found_bayes"


def cells_of(shown, first):
    """The cells, cut where two blanks or more are, of the table in the terminal whose header begins with a word."""
    lines = shown.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(first))
    header, _, *cells = ([cell.strip() for cell in re.split(r" {2,}", line)] for line in lines[at:])
    rows = itertools.takewhile(lambda row: len(row) == len(header), cells)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_tasks_in_the_terminal_have_the_numbers_of_their_tables(tmp_path, capsys):
    """Of a search the best plan's comparisons, as that plan minus the other; of a sweep all; by acc_norm where a task
    has it."""
    names = {"found": "found_bayes", "fixed": "fixed_0.62", "half3": "fixed_0.5_k3", "drop3": "drop (drop3)"}

    def compared(a, b, task, measure, difference, p, holm):
        return {"plan_a": a, "plan_b": b, "task": task, "measure": measure, "difference": difference, "p_holm": holm,
                "ci_low": difference - 0.02, "ci_high": difference + 0.01, "p_value": p,
                "test": "mcnemar_exact"}  # fmt: skip

    def shown(plans, others):
        first, second = plans
        run.append("task_accuracy", [
            {"plan_id": plan, "task": task, "measure": measure, "n": 50, "correct": 20, "accuracy": accuracy,
             "standard_error": 0.07, "ci_low": accuracy - 0.2, "ci_high": accuracy + 0.1}
            for plan, more in ((first, 0.0), (second, 0.02))
            for task, measure, accuracy in (("piqa", "acc_norm", 0.5), ("piqa", "acc", 0.4), ("boolq", "acc", 0.3))
            for accuracy in (accuracy + more,)
        ])  # fmt: skip
        run.append("task_comparisons", [
            compared(first, second, "piqa", "acc", 0.9, 0.001, 0.001),
            compared(first, second, "piqa", "acc_norm", -0.02, 0.3, None),
            compared(second, first, "boolq", "acc", -0.1, 0.01, 0.02),
            *others,
        ])  # fmt: skip
        (console.print_search if run.experiment == "search" else console.print_sweep)(run, "test")
        text = capsys.readouterr().out
        accuracies = text[text.index("\nTasks (acc: ") :]
        assert [list(row.values()) for row in cells_of(accuracies, "plan ")] == [
            [names[plan], task, "50", measure, f"{value:.4f} ± 0.0700 [{value - 0.2:.3f}, {value + 0.1:.3f}]"]
            for task, measure, least in (("boolq", "acc", 0.3), ("piqa", "acc", 0.4), ("piqa", "acc_norm", 0.5))
            for plan, value in ((first, least), (second, least + 0.02))
        ]
        found = cells_of(text[text.index("\nTasks, 95 %") :], "task ")
        assert list(found[0]) == [
            "task", "measure", "plan", "against", "difference", "95 % interval", "p", "p (Holm)", "verdict",
        ]  # fmt: skip
        return [list(row.values()) for row in found]

    run = search_run(tmp_path / "search")
    assert shown(("found", "fixed"), [compared("fixed", "drop", "piqa", "acc_norm", 0.5, 0.001, 0.001)]) == [
        ["piqa", "acc_norm", "found_bayes", "fixed_0.62", "-0.0200", "[-0.0400, -0.0100]", "0.3", "–",
         "indistinguishable"],
        ["boolq", "acc", "found_bayes", "fixed_0.62", "+0.1000", "[+0.0900, +0.1200]", "0.01", "0.02", "better"],
    ]  # fmt: skip
    run = sweep_run(tmp_path / "sweep")
    run.write_manifest(command=["x"])
    found = shown(("half3", "drop3"), [compared("half1", "drop1", "piqa", "acc_norm", 0.5, 0.001, 0.001)])
    assert [row[:2] + row[4:5] + row[-1:] for row in found] == [
        ["piqa", "acc_norm", "-0.0200", "indistinguishable"], ["piqa", "acc_norm", "+0.5000", "better"],
        ["boolq", "acc", "-0.1000", "worse"],
    ]  # fmt: skip


def test_a_search_in_the_terminal_has_the_numbers_of_its_tables(tmp_path, capsys):
    run = search_run(tmp_path / "run", seed=3)
    run.append("perplexity", [{"plan_id": "found", "target": "question", "subject": None, "tokens": 9, "nll": 0.1,
                               "perplexity": 1.1}], part="q")  # fmt: skip
    run.append("blocks", [
        {"merges": 3, "first": first, "last": first + 2, "measure": "loss", "score": score, "chosen": first == 2}
        for first, score in ((0, 9.0), (1, 2.5), (2, 1.25), (3, 2.0))
    ] + [{"merges": 2, "first": 4, "last": 4, "measure": "given", "score": None, "chosen": True}])  # fmt: skip
    used = {"candidates_this_call": 7, "wall_seconds": 12.5, "batch": 2, "concurrent": 3, "share_not_scoring": 0.25}
    manifest = run.manifest()
    run.write_manifest(best=manifest["best"], command=["x"], bayes_search=used, warnings=["few questions"])
    console.print_search(run, "test")
    shown = capsys.readouterr().out
    names = {"base": "base", "drop": "drop", "fixed": "fixed_0.62", "found": "found_bayes"}
    accuracy = {(row["plan_id"], row["subject"]): row for row in run.read("accuracy").to_pylist()}
    texts = {row["plan_id"]: row for row in run.read("perplexity").to_pylist() if row["target"] == "text"}
    costs = {row["plan_id"]: row["layers"] for row in run.read("costs").to_pylist()}
    answers = run.read("answers").to_pylist()
    plans = {row["plan"]: row for row in cells_of(shown, "plan ")}
    assert list(plans) == list(names.values())
    for plan, name in names.items():
        micro, macro, text = accuracy[plan, "_micro"], accuracy[plan, "_macro"], texts[plan]
        picked = [row["predicted"] for row in answers if row["plan_id"] == plan]
        read = [text[key] for key in ("perplexity", "ci_low", "ci_high")]
        value, low, high = (f"{x:.{sum(x < limit for limit in (10, 100, 1000))}f}" for x in read)
        assert plans[name] == {
            "plan": name, "layers": str(costs[plan]),
            "accuracy [95 %]": f"{micro['accuracy']:.4f} [{micro['ci_low']:.3f}, {micro['ci_high']:.3f}]",
            "macro": f"{macro['accuracy']:.4f}", "answer NLL": f"{micro['nll']:.4f}",
            "question ppl [95 %]": "1.100" if plan == "found" else "–",
            "text ppl [95 %]": f"{value} [{low}, {high}]",
            "picks A-D %": "/".join(f"{100 * picked.count(k) / 120:.0f}" for k in range(4)), "letter %": "–",
        }  # fmt: skip
    share = sum(row["answer"] == 0 for row in answers if row["plan_id"] == "base") / 120
    assert f"\nAlways answering A would score {share:.4f}\n" in shown
    pairs = {row["plan_b"]: row for row in run.read("comparisons").to_pylist() if row["measure"] == "accuracy"}
    found = {row["against"]: row for row in cells_of(shown, "against ")}
    for plan in ("base", "drop", "fixed"):
        row, cells = pairs[plan], found[names[plan]]
        assert cells["difference"] == f"{row['difference']:+.4f}"
        assert cells["95 % interval"] == f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        assert (cells["p"], cells["p (Holm)"]) == (f"{row['p_value']:.3g}", f"{row['p_holm']:.3g}")
    assert [found[name]["verdict"] for name in ("base", "drop")] == ["worse", "better"]
    assert "lowest score is best: loss is in nats per token" in shown and "distances" not in shown
    chosen = cells_of(shown, "layers  removed")
    assert chosen[0] == {"layers": "3", "removed": "2-4", "chosen by": "loss", "score": "1.25",
                         "next best": "3-5 (2), 1-3 (2.5)", "deepest": "3-5 (2)"}  # fmt: skip
    assert list(chosen[1].values()) == ["2", "4", "given", "–", "–", "–"]
    assert "bayes: 7 candidates in 12.5 s (2 per trial, 3 at a time); workers spent 75 % of it scoring" in shown
    told = "bayes: 8 candidates; micro_accuracy best 0.6500, mean 0.566"
    assert told in shown and ", worst 0.4000; 0.8 s of worker time" in " ".join(shown.split())
    assert "\nWarning: few questions.\n" in shown


def test_an_evaluation_in_the_terminal_has_the_numbers_of_its_tables(tmp_path, capsys):
    run = RunDirectory.open(tmp_path / "run", {"data": {"report_split": "test"}}, "evaluate")
    run.begin()
    evaluated(run, {"base": base_plan(LAYERS)}, {"base": 0.7}, subjects=("algebra", "law"), perplexities={"base": 5.0},
              pairs=[])  # fmt: skip
    asked = {"algebra": 3.0, "law": 40.0, None: 900.0}
    run.append("perplexity", [
        {"plan_id": "base", "target": "question", "subject": subject, "tokens": 9, "nll": 1.0, "perplexity": value,
         "ci_low": value - 1, "ci_high": value + 2} for subject, value in asked.items()
    ], part="q")  # fmt: skip
    run.write_manifest(command=["x"])
    console.print_evaluation(run, "test")
    shown = capsys.readouterr().out
    rows = {row["subject"]: row for row in run.read("accuracy").to_pylist()}
    cells = cells_of(shown, "subject")
    assert [row["subject"] for row in cells] == ["algebra", "law", "_micro", "_macro"]
    read = {
        "algebra": "3.000 [2.000, 5.000]",
        "law": "40.00 [39.00, 42.00]",
        "_micro": "900.0 [899.0, 902.0]",
        "_macro": "21.50",
    }  # the published average: the mean of the subjects' perplexities
    for line in cells:
        row = rows[line["subject"]]
        assert list(line.values())[1:] == [
            str(row["n"]),
            f"{row['accuracy']:.4f} ± {row['standard_error']:.4f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]",
            f"{row['nll']:.4f}", read[line["subject"]],
        ]  # fmt: skip
    (text,) = (row for row in run.read("perplexity").to_pylist() if row["target"] == "text")
    assert f"Plain-text perplexity [95 %]: 5.000 [{text['ci_low']:.3f}, {text['ci_high']:.3f}]\n" in shown
    share = sum(row["answer"] == 0 for row in run.read("answers").to_pylist()) / 120
    assert f"Always answering A would score {share:.4f}" in shown and f"raymerge report {tmp_path}/run\n" in shown


def test_curves_and_settings_in_the_terminal_have_the_numbers_of_their_tables(tmp_path, capsys):
    run = sweep_run(tmp_path / "sweep")
    points = run.read("sweep").drop_columns("run_id").to_pylist()
    run.replace("sweep", [row | ({"norms": "fold"} if row["plan_id"] == "half3" else {}) for row in points[::-1]])
    console.print_sweep(run, "test")
    assert "--plan" not in capsys.readouterr().out, "of a run that has no plan files"
    run.write_text("{}", "plans", "drop.json")
    console.print_sweep(run, "test")
    shown = capsys.readouterr().out
    assert shown.endswith(
        f"Any plan as a model: raymerge merge MODEL --plan {tmp_path}/sweep/plans/NAME.json --out DIR\n"
    )
    micro, macro = ({row["plan_id"]: row for row in run.read("accuracy").to_pylist() if row["subject"] == subject}
                    for subject in ("_micro", "_macro"))  # fmt: skip
    order = ["base", "half1", "drop1", "half3", "drop3"]
    for plan, cells in zip(order, cells_of(shown, "merged"), strict=True):
        row = micro[plan]
        assert list(cells)[:3] == ["merged", "method", "norms"]
        assert list(cells.values())[:-1] == [
            plan[4:] or "0", {"half": "fixed_0.5"}.get(plan[:4], plan[:4]), "fold" if plan == "half3" else "keep",
            f"{row['accuracy']:.4f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]", f"{macro[plan]['accuracy']:.4f}",
            f"{row['nll']:.4f}",
        ]  # fmt: skip
    run = sensitivity_run(tmp_path / "sensitivity")
    stored = run.read("sensitivity").drop_columns("run_id").to_pylist()
    law = {"subset": "law", "pearson_off_diagonal": 0.4, "plan_overlap": 0.5, "alpha_max_difference": 0.05}
    more = [row | law for row in stored if row["setting"] == "8.0"]
    run.append("sensitivity", more)
    console.print_sensitivity(run)
    assert [tuple(row.values()) for row in cells_of(capsys.readouterr().out, "parameter")] == [
        ("sigma", "8.0", "0.300", "35", "0.030", ""), ("sigma", "32.0", "0.900", "90", "0.010", ""),
        ("samples", "3", "–", "–", "–", "too few samples"),
    ]  # fmt: skip
