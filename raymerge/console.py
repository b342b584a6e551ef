"""What a user sees in a terminal: progress while an experiment runs, its summary when it has ended."""

from __future__ import annotations

import shlex
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymerge.identity import without_secrets
from raymerge.progress import Progress
from raymerge.tables import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_LOG_EVERY_S = 30.0  # without a terminal, a progress line this often
_NARROW = 120  # columns of a terminal in which bars and rates have no room
_TEXT = 110  # columns of sentences; tables are as wide as they are
_PAIRS = 30  # correlations of subsets; the table of 57 subjects has 1,596
_LOG_FROM_S = 10.0  # a step that cannot be counted and is over sooner leaves no line in a log


@contextmanager
def progress() -> Iterator[Progress]:
    """Live bars on a terminal; without one, as in a log or a Ray job, a plain line per stage and every 30 seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    shown = _Live(console) if console.is_terminal else _Log(lambda text: print(text, file=sys.stderr, flush=True))
    try:
        yield shown
    finally:
        shown.close()


def rate(done: int, seconds: float) -> str:
    """Units a second as text, or seconds a unit where those are more telling; "" before anything can be said."""
    if done <= 0 or seconds <= 0:
        return ""
    speed = done / seconds
    return f"{seconds / done:.1f} s each" if speed < 0.5 else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


class _Live:
    """A bar a stage, with rate and time left; a spinner shows that a step which cannot be counted is alive."""

    def __init__(self, console: Console):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        # rich would take the width that lacks from every column, and cut counts and times: the bar and the rate go
        # first, then the end of a name.
        narrow = console.width < _NARROW
        name = Column(no_wrap=True, overflow="ellipsis", max_width=console.width - 47 if narrow else None)
        self._bars = Progress(
            SpinnerColumn(finished_text="\u2713"),
            TextColumn("{task.description}", markup=False, table_column=name),
            *([] if narrow else [BarColumn(bar_width=24)]),
            MofNCompleteColumn(),
            *([] if narrow else [TextColumn("{task.fields[rate]}", markup=False)]),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
        )
        self._bars.start()
        self._task: TaskID | None = None
        self._total, self._began = 0, 0.0

    def stage(self, name: str, total: int) -> None:
        self._task = self._bars.add_task(name, total=total, note="", rate="")
        self._total, self._began = total, time.monotonic()

    def advance(self, done: int, note: str = "") -> None:
        speed = rate(done, time.monotonic() - self._began) if self._total > 1 else ""
        assert self._task is not None  # a stage has begun
        self._bars.update(self._task, completed=done, note=note, rate=speed)

    def message(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bars.stop()


class _Log:
    """Lines of plain text: one at the end of a stage (not of a short step), and one every `every` seconds while it
    lasts, whether or not anything has advanced, so that a log shows a long step to be alive."""

    def __init__(self, write: Callable[[str], None], every: float = _LOG_EVERY_S):
        self._write, self._every = write, every
        self._name, self._total, self._done, self._note = "", 0, 0, ""
        self._began = self._last = 0.0  # when the stage began, and when its last line was written
        self._lock, self._over = threading.Lock(), threading.Event()
        self._clock = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._clock.start()

    def stage(self, name: str, total: int) -> None:
        with self._lock:
            self._finish()
            self._name, self._total, self._done, self._note = name, total, 0, ""
            self._began = self._last = time.monotonic()

    def advance(self, done: int, note: str = "") -> None:
        with self._lock:
            self._done, self._note = done, note

    def message(self, text: str) -> None:
        with self._lock:
            self._write(text)

    def close(self) -> None:
        self._over.set()
        self._clock.join()
        with self._lock:
            self._finish()

    def _tick(self) -> None:
        while not self._over.wait(min(1.0, self._every)):
            with self._lock:
                now = time.monotonic()
                if self._name and self._done < self._total and now - self._last >= self._every:
                    self._last = now
                    self._line(now - self._began, going_on=True)

    def _finish(self) -> None:
        seconds = time.monotonic() - self._began
        if self._name and (self._total != 1 or (self._done and seconds >= _LOG_FROM_S)):
            self._line(seconds, going_on=False)
        self._name = ""

    def _line(self, seconds: float, *, going_on: bool) -> None:
        counted = self._total != 1
        head = f"{self._name}: {self._done}/{self._total}" if counted else f"{self._name}:"
        speed = rate(self._done, seconds) if counted else ""
        timing = f"{seconds:.1f} s"
        if going_on:
            left = seconds * (self._total - self._done) / max(self._done, 1)
            timing = f"about {left:.0f} s left" if self._done else f"{seconds:.0f} s so far"
        parts = [part for part in (self._note, speed, timing) if part]
        self._write(f"{head}{', ' if counted else ' '}{', '.join(parts)}")


def _print_table(header: list[str], cells: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *cells]:
        cells_of_row = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells_of_row[1:]]))


def _print_incidents(run: RunDirectory) -> None:
    """What befell the run, if anything did; nothing is lost by it."""
    from raymerge import summary

    title = "Incidents (table incidents); no finished work was lost"
    _print_lines(title, summary.incident_lines(run))


def _print_warnings(run: RunDirectory) -> None:
    for warning in (run.manifest() or {}).get("warnings", []):
        print(f"\nWarning: {warning}.")


def _print_place(run: RunDirectory) -> None:
    """Where a run's results lie, and the command that makes a page of them."""
    drawn = (run.manifest() or {}).get("figures")
    what = "Tables, figures and manifest" if drawn else "Tables and manifest"
    place = without_secrets(run.path_of().rstrip("/"))
    print(f"\n{what}: {place}\nHTML page: raymerge report {shlex.quote(place)}")


def _print_plans(run: RunDirectory) -> None:
    """How any plan of the run becomes a model."""
    if run.is_local and not Path(run.path_of("plans")).is_dir():
        return
    file = shlex.quote(without_secrets(run.path_of("plans", "NAME.json")))
    print(f"Any plan as a model: raymerge merge MODEL --plan {file} --out DIR")


def print_search(run: RunDirectory, split: str) -> None:
    """The closing summary of a search: plans with intervals, the answer in words, what it rests on, where it lies."""
    from raymerge import findings, summary
    from raymerge.report.answer import in_words
    from raymerge.report.reached import Reached

    lines = findings.plan_lines(run, split)
    manifest = run.manifest()
    assert manifest is not None  # the run has ended
    best = manifest["best"]
    asked = findings.asks_questions(run)
    read = any(line["perplexity"] is not None for line in lines)
    print(f"\n{lines[0]['n']} {split} questions:" if asked else "\nOn plain text:" if read else "\nPlans:")
    _print_table(*summary.plan_table(lines))
    if asked:
        print(f"{summary.PICKS}\nAlways answering A would score {findings.always_a_share(run, split):.4f}")
    for paragraph in in_words(Reached(run)):
        print(f"\n{textwrap.fill(paragraph, _TEXT)}")
    if fate := findings.fates_of(run).get(best["plan_id"]):
        print(f"\nOriginal layers in {best['name']}, counted from 0: {fate}.")
    header, cells = summary.comparison_table(run, best["plan_id"])
    if cells:  # none where tasks alone are reported on
        compared = "Accuracy on the report questions" if asked else "Loss (nats per token) on the report's text"
        print(f"\n{compared}, {best['name']} minus the others, 95 % intervals of the paired difference:")
        _print_table(header, cells)
    for line in summary.comparison_notes(run, best["plan_id"]):
        print(textwrap.fill(line, _TEXT))
    caption, header, cells = summary.subject_table(run, best["plan_id"])
    if cells:
        print(f"\n{caption}:")
        _print_table(header, cells)
    _print_tasks(run, best["plan_id"])
    on = "questions" if findings.judges_answers(run) else "text"
    _print_lines(f"On the search {on}", summary.search_lines(run))
    _print_lines("Optimism of the search", summary.optimism_lines(run, split))
    _print_blocks(run)
    _print_lines("Speed of this call", summary.pace_lines(run))
    _print_warnings(run)
    _print_incidents(run)
    _print_place(run)
    _print_plans(run)
    for saved in (best, manifest.get("refitted")):
        if saved:
            _print_model(run, saved)


def _print_model(run: RunDirectory, saved: Mapping[str, Any]) -> None:
    """Where a model lies that a search has saved, whatever the run was called then; how to have it where it is not."""
    from raymerge import summary

    folder, known = run.path_of("models", saved["name"]), saved.get("model") is not None
    where = without_secrets(folder)
    if known and not (run.is_local and not Path(folder).exists()):
        print(f"Merged model: {where}")
        if saved.get("proof"):
            print(summary.proof_line(saved["proof"]))
        return
    missing = f"{saved['name']} is no longer in {where}" if known else f"{saved['name']} was not saved"
    plan = run.path_of("plans", f"{saved['name']}.json")
    if run.is_local and Path(plan).is_file():
        print(f"{missing}. To have it: raymerge merge MODEL --plan {shlex.quote(plan)} --out DIR")
        return
    same = "the same command" if known else "the same command with output.save_best=true"
    print(f"{missing}. To have it, delete {without_secrets(run.path_of('manifest.json'))} and give {same}.")


def _print_lines(title: str, lines: list[str]) -> None:
    """Lines under a title, broken where they are long; nothing of none."""
    if lines:
        print(f"\n{title}:")
        for line in lines:
            print(textwrap.fill(line, _TEXT, initial_indent="  ", subsequent_indent="    "))


def _print_blocks(run: RunDirectory) -> None:
    """How the blocks of layers, and layers that went one by one, were chosen, where any were."""
    from raymerge import summary

    for caption, header, cells in (summary.block_table(run), summary.removal_table(run)):
        if cells:
            print(f"\n{textwrap.fill(caption, _TEXT)}:")
            _print_table(header, cells)


def _print_tasks(run: RunDirectory, plan_id: str | None = None) -> None:
    """The further tasks, where there are any, with a plan's comparisons."""
    from raymerge import summary

    header, cells = summary.task_table(run)
    if not cells:
        return
    print("\nTasks (acc: log-likelihood, acc_norm: log-likelihood per character):")
    _print_table(header, cells)
    header, cells = summary.task_comparison_table(run, plan_id)
    if cells:
        print("\nTasks, 95 % intervals of the paired difference; Holm's p corrects within each task:")
        _print_table(header, cells)


def print_evaluation(run: RunDirectory, split: str) -> None:
    """Accuracy by subject, averages and perplexities of an evaluation."""
    from raymerge import findings, summary
    from raymerge.tables import MACRO, MICRO

    questions = {
        row["subject"]: summary.number(row["perplexity"], (row["ci_low"], row["ci_high"]))
        for row in run.read("perplexity").to_pylist()
        if row["target"] == "question"
    }
    # The published evaluation's average perplexity is the mean of the subjects'.
    of_subjects = [
        row["perplexity"]
        for row in run.read("perplexity").to_pylist()
        if row["target"] == "question" and row["subject"] is not None
    ]
    if of_subjects:
        questions[MACRO] = summary.number(sum(of_subjects) / len(of_subjects))
    cells = []
    for row in run.read("accuracy").to_pylist():
        key = None if row["subject"] == MICRO else row["subject"]
        cells.append(
            [
                row["subject"],
                str(row["n"]),
                summary.share(row["accuracy"], row["standard_error"], (row["ci_low"], row["ci_high"])),
                f"{row['nll']:.4f}",
                questions.get(key, "–"),
            ]
        )
    if cells:
        _print_table(
            ["subject", "n", "accuracy ± se [95 %]", "answer NLL", "question ppl [95 %]"], cells[2:] + cells[:2]
        )
        print(f"\nAlways answering A would score {findings.always_a_share(run, split):.4f}")
    _print_tasks(run)
    for row in run.read("perplexity").to_pylist():
        if row["target"] == "text":
            found = summary.number(row["perplexity"], (row["ci_low"], row["ci_high"]))
            print(f"Plain-text perplexity [95 %]: {found}")
    _print_incidents(run)
    _print_place(run)


def print_similarity(run: RunDirectory) -> None:
    """Each subset's matrix in figures, the answer in words, the correlations with their ceilings, and warnings."""
    from raymerge import summary
    from raymerge.report.layers import in_words

    header, cells = summary.similarity_table(run)
    # What all subsets share stands above the table, which would be wider than a terminal.
    shared = [i for i in range(1, 5) if len({row[i] for row in cells}) == 1]
    if shared:
        print(", ".join(f"{header[i]} {cells[0][i]}" for i in shared))
    kept = [i for i in range(len(header)) if i not in shared]
    _print_table([header[i] for i in kept], [[row[i] for i in kept] for row in cells])
    for paragraph in in_words(run):
        print(f"\n{textwrap.fill(paragraph, _TEXT)}")
    header, cells = summary.correlation_table(run, _PAIRS)
    if cells:
        bounded = any(row[-1] != "–" for row in cells)
        print(
            "\nCorrelations between matrices, with 95 % intervals off the diagonal. Ceiling: what noise leaves of a\n"
            "correlation of 1; translations of the same questions share their noise and may exceed it."
            if bounded
            else "\nCorrelations between matrices:"
        )
        _print_table(header, cells)
        further = run.row_counts()["similarity_correlation"] - len(cells)
        if further:
            which = "Those furthest below their ceilings" if bounded else "The lowest"
            print(f"({which}; table similarity_correlation has {further:,} more pairs.)")
    _print_warnings(run)
    _print_incidents(run)
    _print_place(run)


def print_sensitivity(run: RunDirectory) -> None:
    """Agreement with the reference for each setting, averaged over subsets."""
    from raymerge import summary

    header, cells = summary.sensitivity_table(run)
    _print_table(header, [[*row[:-1], textwrap.shorten(row[-1], 60, placeholder=" …")] for row in cells])
    _print_incidents(run)
    _print_place(run)


def print_sweep(run: RunDirectory, split: str) -> None:
    """Every point of the compression curve, and the answer in words."""
    from raymerge import summary
    from raymerge.report.curve import in_words
    from raymerge.report.reached import Reached

    _print_table(*summary.sweep_table(run, split))
    if words := in_words(Reached(run)):
        print(f"\n{textwrap.fill(words, _TEXT)}")
    _print_blocks(run)
    _print_tasks(run)
    _print_warnings(run)
    _print_incidents(run)
    _print_place(run)
    _print_plans(run)
