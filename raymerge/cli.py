"""The command line: `raymerge COMMAND …`. Runs what the arguments ask for, prints summaries and readable errors."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from raymerge import console
from raymerge.arguments import parser
from raymerge.config import CalibrationConfig, Config, ConfigError, PlanConfig
from raymerge.config_file import describe, load_config
from raymerge.errors import UserError
from raymerge.identity import without_secrets
from raymerge.progress import SHOW_CURSOR
from raymerge.reference import config_reference
from raymerge.tables import RunDirectory

_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entry point of a job
_OUTPUT = 1  # the file descriptor of standard output
_BARRED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # what even looking whether a path is there may raise
_SHARED = "that the cluster's machines share, or a URI such as s3://bucket/run"
_STOPS = (signal.SIGTERM, signal.SIGHUP)
_STOPPED = "the same command again goes on from what is stored"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 2 for a wrong input or where there is no room, 129 when its terminal was
    closed, 130 when interrupted, 141 when whoever read the output has ended, 143 when stopped."""
    words = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(words)
    _quiet_libraries()
    before = {number: signal.getsignal(number) for number in _STOPS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup has SIGHUP ignored, so that the command outlives its terminal
            signal.signal(number, _stop)
    try:
        _check_words(words)
        _check_here()
        code = _run(options)
        sys.stdout.flush()  # here, not at Python's end, where a reader that is gone can only be complained of
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    except UserError as error:  # other errors are bugs and keep their traceback
        # What a URI holds of a key is nobody's who reads a job's log.
        print(f"raymerge: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and _is_output_full():
            cure = "free space there or send it elsewhere, and run the same command again: what is finished is stored"
            print(f"raymerge: what the command says cannot be written: {error.strerror}; {cure}", file=sys.stderr)
            return 2
        if error.errno not in _BARRED or error.filename is None:
            raise
        cure = "check the path, and your permissions on it and on the folders above it"
        print(f"raymerge: {error.filename} cannot be opened: {error.strerror}; {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"raymerge: interrupted; {_STOPPED}", file=sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_words(words: Sequence[str]) -> None:
    """Refuse names that are not UTF-8, which neither the stored config nor Arrow or a tokenizer can hold."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{word!r} is not UTF-8: rename what it names, or link to it by another name") from error


def _check_here() -> None:
    """Refuse a working folder that was deleted: torch and Ray's processes do not start in it (MKL aborts), and no
    relative path means anything. So a user without a home, as one of a container may be: Ray's import asks for it."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the folder that the command was called in is not there any more: cd to another") from error
    try:
        Path.home()
    except RuntimeError as error:  # no HOME, and a number that no name belongs to
        raise ConfigError(f"user {os.getuid()} has no home folder: set HOME to a folder that can be written") from error


def _stop(number: int, _: object) -> NoReturn:
    """End at once at a SIGTERM, as `ray job stop` sends it, or a SIGHUP, as a terminal that is closed does: what is
    finished is stored, a local Ray ends with its driver, and an exception would not get through Tune from wherever it
    is."""
    with contextlib.suppress(OSError):  # whoever read what we say may have ended first
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
        os.write(2, f"raymerge: stopped; {_STOPPED}\n".encode())
    os._exit(128 + number)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has ended, as in `raymerge config | head`; it is nowhere then, so
    that Python can flush what is left."""
    output = select.poll()
    output.register(_OUTPUT, 0)  # an error is told without being asked for
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _OUTPUT)
    return True


def _is_output_full() -> bool:
    """Whether standard output takes no line, as a log on a full disk; it is nowhere then, as above."""
    try:
        os.write(_OUTPUT, b"\n")  # not a flush: what could not be written may not be in Python's buffer any more
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _OUTPUT)
        return True
    return False


def _quiet_libraries() -> None:
    # Before transformers and Ray are imported: their bars and banners would break the progress line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # transformers imports torchao where it is installed, which warns of kernels that this machine has no use for.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _run(options: argparse.Namespace) -> int:
    commands = {
        "search": _search,
        "similarity": _similarity,
        "sensitivity": _sensitivity,
        "sweep": _sweep,
        "import-similarity": _import_similarity,
        "evaluate": _evaluate,
        "report": _report,
        "merge": _merge,
        "config": _show_config,
    }
    return commands[options.command](options)


def _command_line() -> list[str]:
    return ["raymerge", *sys.argv[1:]]


def _override(key: str, value: str | int | None) -> str:
    """An override whose value is this as it is, whatever YAML would make of a # or a number in a text."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _check_lasts(folder: str, key: str = "--out (output.run)", kind: str = _SHARED) -> None:
    """Refuse a folder inside a job's own copy of the project, which a job that is submitted again lacks."""
    if os.environ.get(_IN_A_JOB) and "://" not in folder and not os.path.isabs(os.path.expanduser(folder)):
        raise ConfigError(
            f"{key} is {folder!r}, a folder in Ray's temporary copy of the project: give a job an absolute path {kind}"
        )


def _check_places(config: Config) -> None:
    """`_check_lasts` of what an experiment writes."""
    _check_lasts(config.output.run)
    if config.output.cache is not None:
        _check_lasts(config.output.cache, "output.cache", "on each machine's own disk, or on one that they share")


def _run_experiment(options: argparse.Namespace, name: str, show: Callable[[RunDirectory, Config], None]) -> int:
    overrides = options.set + ([] if options.out is None else [_override("output.run", options.out)])
    config = load_config(options.config, overrides)
    _check_places(config)
    from raymerge import experiments

    with console.progress() as progress:
        run = getattr(experiments, name)(config, command=_command_line(), progress=progress)
    show(run, config)
    return 0


def _search(options: argparse.Namespace) -> int:
    return _run_experiment(options, "search", lambda run, config: console.print_search(run, config.data.report_split))


def _similarity(options: argparse.Namespace) -> int:
    return _run_experiment(options, "similarity", lambda run, _: console.print_similarity(run))


def _sensitivity(options: argparse.Namespace) -> int:
    return _run_experiment(options, "sensitivity", lambda run, _: console.print_sensitivity(run))


def _sweep(options: argparse.Namespace) -> int:
    return _run_experiment(options, "sweep", lambda run, config: console.print_sweep(run, config.data.report_split))


def _import_similarity(options: argparse.Namespace) -> int:
    from raymerge.experiments import import_similarity

    with console.progress() as progress:
        run = import_similarity(options.files, options.out, command=_command_line(), progress=progress)
    console.print_similarity(run)
    return 0


def _show_config(options: argparse.Namespace) -> int:
    if options.markdown:
        if options.config or options.set:
            raise UserError("--markdown prints the reference of all keys: leave out the file and --set")
        print(config_reference(), end="")
        return 0
    print(describe(load_config(options.config, options.set)), end="")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    given = {
        "language": options.language,
        "subjects": options.subjects,
        "shots": options.shots,
        "report_split": options.split,
        "report_limit_per_subject": options.limit,
        "question_perplexity": options.question_perplexity,
    }
    # What is too dear for a search's many plans is not for one model.
    overrides = [_override("data.question_perplexity", True)] if options.config is None else []
    overrides += options.set  # as everywhere, an option of its own comes before the key that it sets
    overrides += [_override(f"data.{key}", value) for key, value in given.items() if value is not None]
    for key, source in (("mmlu", options.mmlu), ("perplexity_text", options.text)):
        if source is not None:
            overrides.append(_override(f"data.{key}", None if source in ("none", "null") else source))
    overrides += [_override("model.path", options.model), _override("output.run", options.out)]
    config = load_config(options.config, overrides)
    _check_places(config)
    from raymerge.experiments import evaluate

    with console.progress() as progress:
        run = evaluate(config, command=_command_line(), progress=progress)
    console.print_evaluation(run, config.data.report_split)
    return 0


def _report(options: argparse.Namespace) -> int:
    from raymerge.report import write_report

    with console.progress() as progress:
        path = write_report(options.runs, options.out, progress=progress)
    print(f"Report: {path} ({path.stat().st_size / 1e6:.1f} MB, opens without a network)")
    return 0


def _plan_section(options: argparse.Namespace, given: dict[str, Any]) -> PlanConfig:
    """The plan section that a merge's --set describe; given: its keys that have options of their own, which come before
    them."""
    if others := [text for text in options.set if not text.strip().startswith("plan.")]:
        raise ConfigError(f"--set {others[0]}: a merge has the keys of the plan section alone, such as plan.merges=4")
    overrides = [*options.set, *(_override(f"plan.{key}", value) for key, value in given.items())]
    # A configuration whose plan is chosen on a text must name one; that a merge was given none says `merge`.
    section = load_config(None, [*overrides, _override("calibration.text", options.calibration or "demo")]).plan
    from raymerge.plan_source import keys_without_effect

    if idle := keys_without_effect(section):
        key, of = idle[0]
        raise ConfigError(f"plan.{key} is of {of}, not asked for: the model would be the same without it")
    return section


def _calibration(options: argparse.Namespace) -> CalibrationConfig | None:
    """The text that a merge is given, and how much of it."""
    tokens = options.calibration_tokens
    if options.calibration is None:
        if tokens is not None:
            raise UserError("--calibration-tokens is of --calibration, which is not given")
        return None
    given = [_override("calibration.text", options.calibration)]
    given += [] if tokens is None else [_override("calibration.tokens", tokens)]
    return load_config(None, given).calibration


def _merge(options: argparse.Namespace) -> int:
    _check_lasts(options.out)
    from raymerge.merging import merge
    from raymerge.plan import Refit
    from raymerge.summary import proof_line

    if options.public and options.push is None:
        raise UserError("--public says how --push uploads, but --push OWNER/NAME is not given")
    keys = ("alignment", "norms", "biases", "refit", "refit_layers")
    given: dict[str, Any] = {key: value for key in keys if (value := getattr(options, key)) is not None}
    if options.set is not None:
        source, given = _plan_section(options, given), {}
    else:
        source = options.alphas if options.plan is None else options.plan
        method, layers = given.pop("refit", "none"), given.pop("refit_layers", 0)
        if method != "none":
            given["refit"] = Refit(method, layers=layers)
        elif layers:
            raise UserError(
                "--refit-layers is of --refit, which is not given: the merged layers would stay as they are"
            )
    with console.progress() as progress:
        done = merge(
            options.model,
            source,
            options.out,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            **given,
            calibration=_calibration(options),
            verify=not options.no_verify,
            push=options.push,
            private=not options.public,
            command=_command_line(),
            progress=progress,
        )
    removed = done["parameters_removed"]
    print(
        f"{done['layers_before']} layers became {done['layers_after']}; "
        f"{removed / 1e6:.2f} M parameters removed, {100 * removed / (removed + done['parameters']):.1f} %; "
        f"{done['tensors_changed']} tensors differ from the base's of the same name, "
        f"by at most {100 * done['largest_relative_change']:.1f} % of their norm.\n"
        f"Saved {done['bytes'] / 1e6:.1f} MB in {done['folder']} (plan {done['plan_id']}, merge_plan.json)."
    )
    if proof := done["proof"]:
        print(proof_line(proof))
    if done["mergekit"] is not None:
        print(f"No mergekit.yaml: {done['mergekit']}.")
    if done["pushed"]:
        print(f"Pushed to {done['pushed']}.")
    return 0
