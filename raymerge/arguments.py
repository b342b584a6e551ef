"""The command line's arguments: every command with its options, their help and examples."""

from __future__ import annotations

import argparse
from typing import TypeAlias

import raymerge
from raymerge.config import CalibrationConfig, Config
from raymerge.plan import REFITS

_RAW = argparse.RawDescriptionHelpFormatter
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it returns is the command's name."""
    top = argparse.ArgumentParser(
        prog="raymerge",
        description="Merge decoder layers of large language models, search for merge coefficients, measure the cost.",
        epilog="Start with `raymerge search jobs/configs/demo.yaml`: it needs no network and no GPU.",
    )
    top.add_argument("--version", action="version", version=f"raymerge {raymerge.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_experiments, _add_import_similarity, _add_evaluate, _add_report, _add_merge, _add_config):
        add(commands)
    return top


def _add_experiments(commands: _Commands) -> None:
    def experiment(name: str, *, help: str, description: str, examples: str) -> None:
        command = commands.add_parser(
            name,
            formatter_class=_RAW,
            help=help,
            description=f"{description}\nIf a run was interrupted, the same command resumes it.",
            epilog=f"examples:\n{examples}\n\n`raymerge config` explains every key and shows its default.",
        )
        command.add_argument(
            "config", nargs="?", help="YAML file (default: the bundled demo, with every option's default)"
        )
        command.add_argument("--out", metavar="RUN", help="run directory (output.run)")
        command.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[], help="override, such as plan.merges=4"
        )

    experiment(
        "search",
        help="search for the best merge coefficients",
        description="Search for the coefficients with which to merge layers, and report the best next to the controls\n"
        "(unmerged, dropped, fixed, random). The search uses validation questions, the report test questions.",
        examples="  raymerge search jobs/configs/demo.yaml\n"
        "  raymerge search jobs/configs/demo.yaml --out runs/k4 --set plan.merges=4 --set search.objective=answer_nll\n"
        "  raymerge search jobs/configs/llama3-8b.yaml --set model.path=/models/Llama-3-8B",
    )
    experiment(
        "similarity",
        help="compare the layers of a model by task and language",
        description="Collect activations on subsets of prompts, compare the layers of the model on each subset, and\n"
        "correlate the matrices, with a null model, intervals, and the reliability that bounds every correlation.",
        examples="  raymerge similarity jobs/configs/similarity-mka-demo.yaml\n"
        "  raymerge similarity jobs/configs/similarity-tasks-llama3-8b.yaml --set model.path=/models/Llama-3-8B\n"
        "  raymerge search jobs/configs/demo.yaml --set plan.base=similarity_ratio \\\n"
        "      --set plan.similarity_run=runs/similarity-mka-demo --out runs/from-similarity",
    )
    experiment(
        "sensitivity",
        help="vary the settings of the layer similarity, one at a time",
        description="Vary bandwidth, dimensions, samples, neighbours, threshold, embedding and measure around the\n"
        "similarity section. Show how far the matrices agree, and how far the plans agree that they choose.",
        examples="  raymerge sensitivity jobs/configs/similarity-mka-demo.yaml --out runs/sensitivity",
    )
    experiment(
        "sweep",
        help="measure accuracy and perplexity against the number of merged layers",
        description="Evaluate every number of merged layers under every way of merging: dropping, and fixed and\n"
        "similarity-derived coefficients, with and without aligned neurons and folded norms.",
        examples="  raymerge sweep jobs/configs/sweep-demo.yaml\n"
        "  raymerge sweep jobs/configs/published.yaml --set model.path=/models/Llama-3-8B",
    )


def _add_import_similarity(commands: _Commands) -> None:
    command = commands.add_parser(
        "import-similarity",
        formatter_class=_RAW,
        help="read similarity matrices (L, L) from .npy files",
        description="Read similarity matrices that were computed elsewhere into a run, with their correlations. Each\n"
        "subset is named after its file, without a trailing _40s. plan.similarity_run can name the run.",
        epilog="example:\n  raymerge import-similarity medical_40s.npy legal_40s.npy --out runs/published",
    )
    command.add_argument("files", nargs="+", metavar="FILE.npy", help="square matrices of the same size")
    command.add_argument("--out", required=True, metavar="RUN", help="run directory")


def _add_evaluate(commands: _Commands) -> None:
    command = commands.add_parser(
        "evaluate",
        formatter_class=_RAW,
        help="evaluate one model: 5-shot MMLU by subject, other tasks, perplexity",
        description="Evaluate a model as it is: MMLU accuracy by subject with standard errors, answer NLL, perplexity\n"
        "of the questions' own tokens and of plain text, and the tasks in the configuration's tasks section, such as\n"
        "PIQA from a file. If a run was interrupted, the same command resumes it.",
        epilog="examples:\n"
        "  raymerge evaluate demo --out runs/base\n"
        "  raymerge evaluate runs/demo/models/found_bayes --mmlu demo --out runs/best\n"
        "  raymerge evaluate Qwen/Qwen2.5-1.5B --mmlu cais/mmlu --subjects medical,legal --limit 50 --out runs/qwen\n"
        "  raymerge evaluate demo --mmlu none --set tasks.piqa.format=piqa --set tasks.piqa.file=validation.jsonl \\\n"
        "      --out runs/piqa",
    )
    command.add_argument("model", help="demo, a checkpoint folder, a hub id, or a .gguf file")
    command.add_argument("--mmlu", metavar="DIR", help=f"demo, a folder, a hub id, or none {_default('mmlu')}")
    command.add_argument("--language", help=f"language of the questions {_default('language')}")
    command.add_argument("--subjects", help=f"comma-separated subjects and domains {_default('subjects')}")
    command.add_argument("--limit", type=int, metavar="N", help="at most N questions per subject")
    command.add_argument(
        "--split", choices=["test", "validation"], help=f"split of the questions {_default('report_split')}"
    )
    command.add_argument("--shots", type=int, metavar="N", help=f"number of few-shot examples {_default('shots')}")
    command.add_argument(
        "--text",
        metavar="FILE",
        help=f"plain text for the perplexity: demo, a file, or none {_default('perplexity_text')}",
    )
    command.add_argument(
        "--question-perplexity",
        action=argparse.BooleanOptionalAction,
        help="also measure the loss of the questions' own tokens, which is slower (default: yes, or as in --config)",
    )
    command.add_argument("--config", metavar="FILE", help="YAML file; options on the command line override it")
    command.add_argument("--out", required=True, metavar="RUN", help="run directory")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override any other key")


def _add_report(commands: _Commands) -> None:
    command = commands.add_parser(
        "report",
        formatter_class=_RAW,
        help="make one HTML page from one or several runs",
        description="Make one self-contained HTML page from the tables of one or several runs: what was asked, the\n"
        "answer against base and controls, and interactive figures with their data. It opens without a network.",
        epilog="examples:\n  raymerge report runs/demo\n  raymerge report runs/k4 runs/k8 runs/sweep --out report.html",
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directories (folders or URIs)")
    command.add_argument("--out", metavar="FILE", help="file of the page (default for a single run: RUN/report.html)")


def _add_merge(commands: _Commands) -> None:
    command = commands.add_parser(
        "merge",
        formatter_class=_RAW,
        help="merge a model by options, a run's plan or an alpha file, and save it",
        description="Merge layers of a model by the plan section of a configuration (--set), by a run's plan with all\n"
        "of its options (--plan), or by an alpha file (--alphas), a JSON list of {step, layer_to_merge_into,\n"
        "layer_to_remove, ratio_i_alpha}. The result is an ordinary Hugging Face checkpoint with the plan and a\n"
        "receipt of every changed tensor. It is reloaded in a fresh process and compared with the plan.",
        epilog="examples:\n"
        "  raymerge merge demo --set plan.merges=4 --set plan.ratio=1 --out dropped\n"
        "  raymerge merge demo --set plan.merges=4 --set plan.selection=block --calibration demo --out block\n"
        "  raymerge merge demo --set plan.merges=4 --set plan.base=similarity_ratio \\\n"
        "      --set plan.similarity_run=runs/mka --out mka\n"
        "  raymerge merge demo --plan runs/demo/plans/found_bayes.json --out merged\n"
        "  raymerge merge Qwen/Qwen2.5-1.5B --alphas alphas.json --out merged --push me/Qwen2.5-1.5B-merged",
    )
    command.add_argument("model", help="demo, a checkpoint folder, a hub id, or a .gguf file")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--set",
        metavar="plan.KEY=VALUE",
        action="append",
        help="a key of the plan section, such as plan.merges=4; `raymerge config` explains them all",
    )
    source.add_argument("--plan", metavar="FILE", help="RUN/plans/NAME.json, or merge_plan.json of a saved model")
    source.add_argument("--alphas", metavar="FILE", help="alpha file; the following arguments are its options")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the merged checkpoint; must not exist")
    command.add_argument(
        "--alignment",
        choices=["none", "rows", "neurons"],
        help="before averaging, reorder the rows of each matrix (published) or whole neurons (default: none)",
    )
    command.add_argument(
        "--norms",
        choices=["keep", "fold"],
        help="keep the remaining layer's norms (published) or fold each layer's into its matrices (default: keep)",
    )
    command.add_argument(
        "--biases",
        choices=["keep", "merge"],
        help="keep the remaining layer's biases or average them (default: keep)",
    )
    command.add_argument(
        "--refit",
        choices=["none", *REFITS],
        help="fit the layers at the seams to the unmerged model on --calibration, in closed form (default: none)",
    )
    command.add_argument(
        "--refit-layers",
        type=int,
        metavar="N",
        help="also fit the N layers after each seam (outputs, units; default: 0)",
    )
    command.add_argument(
        "--calibration",
        metavar="TEXT",
        help="plain text; its first tokens are used to fit the refit or to choose the block (default with --plan "
        "RUN/plans/NAME.json: what the run used)",
    )
    command.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"maximum number of its tokens (default: {CalibrationConfig().tokens})",
    )
    command.add_argument("--revision", help="hub revision of the model")
    command.add_argument("--trust-remote-code", action="store_true", help="run the model repository's own Python")
    command.add_argument("--no-verify", action="store_true", help="do not reload and check the saved model")
    command.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the saved model to this hub repository, new or empty, as private"
    )
    command.add_argument("--public", action="store_true", help="with --push: make the repository public")


def _add_config(commands: _Commands) -> None:
    command = commands.add_parser(
        "config",
        help="print and explain every option",
        description="Print a configuration in full: every key, its explanation, and its default or the file's value.",
    )
    command.add_argument("config", nargs="?", help="YAML file (default: all defaults)")
    command.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override, such as plan.merges=4"
    )
    command.add_argument(
        "--markdown", action="store_true", help="print the reference page of all keys (docs/config.md)"
    )


def _default(key: str) -> str:
    """What an option's help says of a key of section data."""
    return f"(default: {getattr(Config().data, key)}, or as in --config)"
