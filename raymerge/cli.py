"""The command line: `raymerge COMMAND …`. Parses arguments, shows progress, prints summaries and readable errors."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import raymerge
from raymerge.config import ConfigError, describe, load_config
from raymerge.plan import PlanError
from raymerge.questions import DataError
from raymerge.tables import RunDirectory, RunError

if TYPE_CHECKING:
    from rich.console import Console

_LOG_EVERY_S = 30.0  # without a terminal, a progress line at most this often


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 2 for a wrong input, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(argv)
    _quiet_libraries()
    try:
        return options.run(options)
    except (ConfigError, PlanError, DataError, RunError) as error:
        return _refuse(error)
    except ValueError as error:
        # CheckpointError, ArchitectureError and PromptError live in modules that import torch, which --help should
        # not wait for. Other ValueErrors are bugs and keep their traceback.
        if type(error).__name__ in ("CheckpointError", "ArchitectureError", "PromptError", "PlacementError"):
            return _refuse(error)
        raise
    except KeyboardInterrupt:
        print("raymerge: interrupted; the same command again goes on from what is stored", file=sys.stderr)
        return 130


def _refuse(error: Exception) -> int:
    print(f"raymerge: {error}", file=sys.stderr)
    return 2


def _quiet_libraries() -> None:
    # Before transformers and Ray are imported: their bars and banners would break the progress line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="raymerge",
        description="Merge decoder layers of large language models, search the merge coefficients, measure the cost.",
        epilog="Start with `raymerge search jobs/configs/demo.yaml`: it needs no network and no GPU.",
    )
    parser.add_argument("--version", action="version", version=f"raymerge {raymerge.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    search = commands.add_parser(
        "search",
        formatter_class=raw,
        help="search the merge coefficients of the last K layers",
        description="Search the coefficients with which the last K layers are merged, and report the best beside\n"
        "every control (unmerged, dropped, fixed, random). Searches on validation questions, reports on test.\n"
        "The same command again resumes where it stopped.",
        epilog="examples:\n"
        "  raymerge search jobs/configs/demo.yaml\n"
        "  raymerge search jobs/configs/demo.yaml --out runs/k4 --set plan.merges=4 --set search.objective=answer_nll\n"
        "  raymerge search jobs/configs/llama3-8b.yaml --set model.path=/models/Llama-3-8B\n\n"
        "Every key, what it means and its default: raymerge config.",
    )
    search.add_argument("config", nargs="?", help="YAML file; without it every default, which is the embedded demo")
    search.add_argument("--out", metavar="RUN", help="run directory (output.run)")
    search.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override, as in plan.merges=4")
    search.set_defaults(run=_search)

    evaluate = commands.add_parser(
        "evaluate",
        formatter_class=raw,
        help="5-shot MMLU by subject and perplexity of one model",
        description="Evaluate a model as it is: MMLU accuracy by subject with standard errors, answer NLL, perplexity\n"
        "of the questions' own tokens and of plain text.",
        epilog="examples:\n"
        "  raymerge evaluate demo --out runs/base\n"
        "  raymerge evaluate runs/demo/models/found_bayes --mmlu demo --out runs/best\n"
        "  raymerge evaluate Qwen/Qwen2.5-1.5B --mmlu cais/mmlu --subjects medical,law --limit 50 --out runs/qwen",
    )
    evaluate.add_argument("model", help="demo, a checkpoint folder, or a hub id")
    evaluate.add_argument("--mmlu", default="demo", metavar="DIR", help="demo, a folder, or a hub id (default: demo)")
    evaluate.add_argument("--language", default="en", help="language of the questions (default: en)")
    evaluate.add_argument("--subjects", default="all", help="subjects and domains, comma separated (default: all)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="at most N questions a subject")
    evaluate.add_argument("--split", default="test", choices=["test", "validation"])
    evaluate.add_argument("--shots", type=int, default=5, help="few-shot examples (default: 5)")
    evaluate.add_argument("--text", default="demo", metavar="FILE", help="plain text for perplexity, demo or none")
    evaluate.add_argument("--no-question-perplexity", action="store_true", help="skip the prompts' own tokens: faster")
    evaluate.add_argument("--out", required=True, metavar="RUN", help="run directory")
    evaluate.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="any further option")
    evaluate.set_defaults(run=_evaluate)

    merge = commands.add_parser(
        "merge",
        formatter_class=raw,
        help="merge a model by an alpha file and save it",
        description="Merge a model's layers by an alpha file - a JSON list of {step, layer_to_merge_into,\n"
        "layer_to_remove, ratio_i_alpha} - and save an ordinary Hugging Face checkpoint with the plan and a receipt\n"
        "of every changed tensor.",
        epilog="example:\n  raymerge merge demo --alphas runs/demo/models/found_bayes/alphas.json --out merged",
    )
    merge.add_argument("model", help="demo, a checkpoint folder, or a hub id")
    merge.add_argument("--alphas", required=True, metavar="FILE", help="alpha file")
    merge.add_argument("--out", required=True, metavar="DIR", help="folder of the merged checkpoint; must not exist")
    merge.add_argument("--revision", help="hub revision of the model")
    merge.set_defaults(run=_merge)

    show = commands.add_parser(
        "config",
        help="print every option, explained, with its default or a file's value",
        description="Print a configuration in full: every key, explained, with its default or the file's value.",
    )
    show.add_argument("config", nargs="?", help="YAML file; without it the defaults")
    show.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override")
    show.set_defaults(run=_show_config)
    return parser


def _command_line() -> list[str]:
    return ["raymerge", *sys.argv[1:]]


def _search(options: argparse.Namespace) -> int:
    overrides = options.set + ([f"output.run={options.out}"] if options.out else [])
    config = load_config(options.config, overrides)
    from raymerge.experiments import search

    with console_progress() as progress:
        run = search(config, command=_command_line(), progress=progress)
    print_search(run, config.data.report_split)
    return 0


def _show_config(options: argparse.Namespace) -> int:
    print(describe(load_config(options.config, options.set)), end="")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    text = "null" if options.text == "none" else options.text
    overrides = [
        f"model.path={options.model}",
        f"data.mmlu={options.mmlu}",
        f"data.language={options.language}",
        f"data.subjects={options.subjects}",
        f"data.shots={options.shots}",
        f"data.report_split={options.split}",
        f"data.perplexity_text={text}",
        f"data.question_perplexity={str(not options.no_question_perplexity).lower()}",
        f"output.run={options.out}",
    ]
    if options.limit is not None:
        overrides.append(f"data.report_limit_per_subject={options.limit}")
    config = load_config(None, overrides + options.set)
    from raymerge.experiments import evaluate

    with console_progress() as progress:
        run = evaluate(config, command=_command_line(), progress=progress)
    print_evaluation(run, config.data.report_split)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from raymerge.merging import merge

    done = merge(options.model, options.alphas, options.out, revision=options.revision)
    print(
        f"{done['layers_before']} layers became {done['layers_after']}; "
        f"{done['parameters_removed'] / 1e6:.2f} M parameters removed; {done['tensors_changed']} tensors changed, "
        f"by at most {100 * done['largest_relative_change']:.1f} % of their norm.\n"
        f"Saved {done['bytes'] / 1e6:.1f} MB in {done['folder']} (plan {done['plan_id']}, merge_plan.json)."
    )
    return 0


# -- what a user sees -----------------------------------------------------------------------------------------------


@contextmanager
def console_progress():
    """A live line on a terminal; without one, a plain line per stage and every 30 seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    progress = _Live(console) if console.is_terminal else _Log(lambda text: print(text, file=sys.stderr, flush=True))
    try:
        yield progress
    finally:
        progress.close()


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
    print("\nAccuracy on the report questions, 95 % intervals of the paired difference:")
    for line in summary.comparison_lines(run):
        print(f"  {line}")
    for key, facts in manifest.items():
        if key.endswith("_search") and facts["share_not_scoring"] is not None:
            print(
                f"\n{key.removesuffix('_search')} search: {facts['candidates_this_call']} candidates in "
                f"{facts['wall_seconds']:.1f} s, {100 * facts['share_not_scoring']:.0f} % of it not scoring "
                f"({facts['batch']} a trial, {facts['concurrent']} at a time)",
                end="",
            )
    print(f"\n\nTables, figures and manifest: {run.path_of('tables').removesuffix('/tables')}")
    if manifest["best"]["model"]:
        print(f"Merged model: {manifest['best']['model']}")


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
                f"{row['accuracy']:.4f} ± {row['standard_error']:.4f}",
                f"{row['nll']:.4f}",
                summary.number(questions.get(key)),
            ]
        )
    _print_table(["subject", "n", "accuracy ± se", "answer NLL", "question ppl"], cells[2:] + cells[:2])
    (line,) = summary.plan_lines(run, split)
    print(f"\nAlways answering A: {summary.always_a_share(run, split):.4f}", end="; ")
    print(f"plain-text perplexity: {summary.number(line['perplexity'])}")
    print(f"Tables and manifest: {run.path_of('tables').removesuffix('/tables')}")


if __name__ == "__main__":
    sys.exit(main())
