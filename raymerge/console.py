"""What a user sees in a terminal: progress while an experiment runs, its summary when it has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING

from raymerge.tables import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console

_LOG_EVERY_S = 30.0  # without a terminal, a progress line at most this often


@contextmanager
def progress():
    """A live line on a terminal; without one, a plain line per stage and every 30 seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    shown = _Live(console) if console.is_terminal else _Log(lambda text: print(text, file=sys.stderr, flush=True))
    try:
        yield shown
    finally:
        shown.close()


class _Live:
    def __init__(self, console: Console):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._bars.start()
        self._task = None

    def stage(self, name: str, total: int) -> None:
        self._task = self._bars.add_task(name, total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        self._bars.update(self._task, completed=done, note=note)

    def message(self, text: str) -> None:
        self._bars.console.print(text)

    def close(self) -> None:
        self._bars.stop()


class _Log:
    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._name, self._total, self._began, self._last, self._done, self._note = "", 0, 0.0, 0.0, 0, ""

    def stage(self, name: str, total: int) -> None:
        self.close()
        self._name, self._total, self._done, self._note = name, total, 0, ""
        self._began = self._last = time.monotonic()

    def advance(self, done: int, note: str = "") -> None:
        self._done, self._note = done, note
        now = time.monotonic()
        if now - self._last >= _LOG_EVERY_S:
            self._last = now
            left = (now - self._began) * (self._total - done) / max(done, 1)
            self._line(f"about {left:.0f} s left")

    def message(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        if self._name:
            self._line(f"{time.monotonic() - self._began:.1f} s")
            self._name = ""

    def _line(self, timing: str) -> None:
        parts = [f"{self._name}: {self._done}/{self._total}", self._note, timing]
        self._write(", ".join(part for part in parts if part))


def _print_table(header: list[str], cells: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *cells]:
        cells_of_row = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells_of_row[1:]]))


def print_search(run: RunDirectory, split: str) -> None:
    """The closing summary of a search: plans with standard errors, what was found, where things lie."""
    from raymerge import summary

    lines = summary.plan_lines(run, split)
    manifest = run.manifest()
    print(f"\n{lines[0]['n']} {split} questions:")
    _print_table(*summary.plan_table(lines))
    print(f"Always answering A: {summary.always_a_share(run, split):.4f}")
    print("\nOn the search questions:")
    for line in summary.search_lines(run):
        print(f"  {line}")
    for line in summary.optimism_lines(run, split):
        print(f"  {line}")
    print("\nAccuracy on the report questions, 95 % intervals of the paired difference:")
    for line in summary.comparison_lines(run, manifest["best"]["plan_id"]):
        print(f"  {line}")
    _print_tasks(run, manifest["best"]["plan_id"])
    for key, facts in manifest.items():
        if key.endswith("_search") and facts["share_not_scoring"] is not None:
            print(
                f"\n{key.removesuffix('_search')} search: {facts['candidates_this_call']} candidates in "
                f"{facts['wall_seconds']:.1f} s, {100 * facts['share_not_scoring']:.0f} % of it not scoring "
                f"({facts['batch']} a trial, {facts['concurrent']} at a time)",
                end="",
            )
    print(f"\n\nTables, figures and manifest: {run.path_of().rstrip('/')}")
    if manifest["best"]["model"]:
        print(f"Merged model: {manifest['best']['model']}")


def _print_tasks(run: RunDirectory, plan_id: str | None = None) -> None:
    """The further tasks, where there are any, with a plan's comparisons."""
    from raymerge import summary

    header, cells = summary.task_table(run)
    if not cells:
        return
    print("\nTasks (acc: log-likelihood, acc_norm: log-likelihood per character):")
    _print_table(header, cells)
    for line in summary.task_comparison_lines(run, plan_id) if plan_id else []:
        print(f"  {line}")


def print_evaluation(run: RunDirectory, split: str) -> None:
    """Accuracy by subject, averages and perplexities of an evaluation."""
    from raymerge import summary

    questions = {
        row["subject"]: row["perplexity"] for row in run.read("perplexity").to_pylist() if row["target"] == "question"
    }
    cells = []
    for row in run.read("accuracy").to_pylist():
        key = None if row["subject"] == summary.MICRO else row["subject"]
        cells.append(
            [
                row["subject"],
                str(row["n"]),
                summary.share(row["accuracy"], row["standard_error"], (row["ci_low"], row["ci_high"])),
                f"{row['nll']:.4f}",
                summary.number(questions.get(key)),
            ]
        )
    if cells:
        _print_table(["subject", "n", "accuracy ± se [95 %]", "answer NLL", "question ppl"], cells[2:] + cells[:2])
        print(f"\nAlways answering A: {summary.always_a_share(run, split):.4f}")
    _print_tasks(run)
    text = [row["perplexity"] for row in run.read("perplexity").to_pylist() if row["target"] == "text"]
    print(f"Plain-text perplexity: {summary.number(text[0] if text else None)}")
    print(f"Tables and manifest: {run.path_of().rstrip('/')}")


def print_similarity(run: RunDirectory) -> None:
    """Each subset's matrix in figures, the correlations with their ceilings, and warnings."""
    from raymerge import summary

    _print_table(*summary.similarity_table(run))
    header, cells = summary.correlation_table(run)
    if cells:
        print(
            "\nCorrelations of the matrices, off the diagonal with 95 % intervals. Ceiling: what noise leaves of a\n"
            "correlation of 1; pairs on the same questions (translations) share their noise and may exceed it."
        )
        _print_table(header, cells)
    for warning in (run.manifest() or {}).get("warnings", []):
        print(f"\nWarning: {warning}.")
    print(f"\nTables, figures and manifest: {run.path_of().rstrip('/')}")


def print_sensitivity(run: RunDirectory) -> None:
    """Agreement with the reference for each setting, averaged over subsets."""
    from raymerge import summary

    _print_table(*summary.sensitivity_table(run))
    print(f"\nTables, figures and manifest: {run.path_of().rstrip('/')}")


def print_sweep(run: RunDirectory, split: str) -> None:
    """Every point of the compression curve."""
    from raymerge import summary

    _print_table(*summary.sweep_table(run, split))
    _print_tasks(run)
    print(f"\nTables, figures and manifest: {run.path_of().rstrip('/')}")
