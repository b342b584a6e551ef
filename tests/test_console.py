"""Progress as a log shows it - a line a stage, and one now and then while a long step goes on - and summaries."""

import io
import math
import threading
import time

import pytest
from report_runs import imported_run, search_run, similarity_run, sweep_run

from raymerge import console
from raymerge.progress import Silent, step
from raymerge.tables import RunDirectory


def wait_for(lines, count):
    deadline = time.monotonic() + 10
    while len(lines) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(lines) >= count


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
    assert "of the questions correctly. With 1 layer merged, fixed_0.5 is the most accurate" in " ".join(shown.split())
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


def test_a_merged_model_is_where_the_run_is_now(tmp_path, capsys):
    """A copied run's model is in the copy; one that was deleted, or never saved, is not said to be there."""
    run = search_run(tmp_path / "run")
    best = run.manifest()["best"]

    def said(model):
        run.write_manifest("complete", best=best | {"model": model})
        console.print_search(run, "test")
        return [line for line in capsys.readouterr().out.splitlines() if "found_bayes" in line][-1]

    again = f"To have it, delete {tmp_path}/run/manifest.json and give the same command"
    assert said(None) == f"found_bayes was not saved. {again} with output.save_best=true."
    gone = f"found_bayes is no longer in {tmp_path}/run/models/found_bayes. {again}."
    assert said("/another/machine/run/models/found_bayes") == gone
    (tmp_path / "run/models/found_bayes").mkdir(parents=True)
    assert said("/another/machine/run/models/found_bayes") == f"Merged model: {tmp_path}/run/models/found_bayes"
