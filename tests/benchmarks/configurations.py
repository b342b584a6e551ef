"""Runs experiments of random legal configurations, in one process without Ray; a JSON line each, exit code 1 after a
trace or a disagreement.

    python tests/benchmarks/configurations.py [--minutes 10] [--seed 1] [--experiments search …] [--prove] [--audit]
        [--families NAME …] [--always KEY …] [--wild N] [--log FILE]

A line: the seed that repeats it, how it ended (well, refused with a UserError, or a trace), the settings, and words of
the page and the terminal that no user should read, such as None or nan. Models are the demo's and random ones of every
family, of five layers; every run is summarised, made a page of, and asked for again once it is complete. --prove has
what searches save reloaded by transformers alone and compared. --audit has every run recomputed by tests/audit: one of
which something disagrees ends as "differs", with the first of these as its message. --wild sets up to N keys more, of
any section, to whatever their types allow, and leaves out files and runs that others may need: most are refused, and
none may end with a trace. --families: random models of these alone (names of FAMILIES in tests/tiny.py, or one of its
MULTIMODAL and " inside").
"""

import argparse
import contextlib
import html
import io
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "audit"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import task_files
from audit import audited
from local_pool import opened_locally, searched_locally
from tiny import FAMILIES, MULTIMODAL, N_LAYERS, make_checkpoint, make_multimodal
from transformers.utils import logging as transformers_logging

from raymerge import console, experiments
from raymerge.checkpoint import Checkpoint
from raymerge.config import Alignment, Config, Embedding, Measure, RefitMethod
from raymerge.config_file import load_config
from raymerge.errors import UserError
from raymerge.report import write_report

SUBJECTS = ["colour_mixing", "number_words", "word_opposites", "elementary_addition", "days_of_the_week"]
ODD_WORDS = re.compile(r"\b(nan|None|Infinity|True|False)\b")
ALIGNMENTS, REFITS, MEASURES = ([*get_args(kind)] for kind in (Alignment, RefitMethod, Measure))
EMBEDDINGS = [name for name in get_args(Embedding) if name != "umap"]  # which needs an extra

#: Of each key how often it is set, and to what.
DATA = {
    "model.dtype": (0.2, ["float32", "bfloat16", "float16"]),
    "model.quantise": (0.15, ["int8", "int4"]),
    "model.add_bos": (0.15, [True, False]),
    "data.limit_per_subject": (1, [1, 2, 4, 6]),
    "data.report_limit_per_subject": (1, [1, 2, 5]),
    "data.perplexity_tokens": (1, [2, 60, 700, 1300]),
    "data.perplexity_text": (0.1, [None]),
    "data.mmlu": (0.05, [None]),
    "data.shots": (0.15, [0, 1, 3]),
    "data.search_split": (0.1, ["validation", "dev", "test"]),
    "data.search_on_test": (0.05, [True]),
    "data.report_split": (0.1, ["validation"]),
    "data.question_perplexity": (0.2, [True]),
    "data.seed": (0.2, [3]),
    "output.figures": (1, [True, False, False]),
}
PLAN = {
    "plan.selection": (1, ["tail", "tail", "block", "block", "list", "most_similar"]),
    "plan.block": (0.3, ["cosine", "angular", "loss", "search", "similarity", 1, 2]),
    "plan.starts": (0.1, [[0], [1, 2], [2, 3, 4]]),
    "plan.survivor": (0.3, ["after"]),
    "plan.base": (1, ["fixed", "fixed", "similarity_ratio", "similarity", "file"]),
    "plan.recompute": (0.1, [True]),
    "plan.threshold": (0.1, [0.1, 0.5]),
    "plan.ratio": (0.3, [0, 0.5, 1]),
    "plan.alignment": (0.3, ALIGNMENTS),
    "plan.norms": (0.3, ["fold"]),
    "plan.biases": (0.3, ["merge"]),
    "plan.refit": (0.3, REFITS),
    "plan.refit_layers": (0.3, [0, 1, 3]),
    "plan.ridge": (0.3, [1e-6, 0.1, 10]),
    "calibration.tokens": (0.3, [2, 50, 800]),
    "calibration.text": (0.3, ["demo"]),
}
SEARCH = PLAN | {
    "search.searcher": (1, ["bayes", "random", "gradient", ["bayes", "gradient"], ["gradient", "random", "bayes"]]),
    "search.objective": (1, ["micro_accuracy", "macro_accuracy", "answer_nll", "answer_kl", "text_nll",
                             "answer_nll+0.1*text_nll", "2*answer_kl+answer_nll", f"accuracy:{SUBJECTS[0]}"]),
    "search.text": (0.8, ["demo"]),
    "search.text_tokens": (1, [2, 100, 1100]),
    "search.candidates": (1, [1, 2, 5, 9]),
    "search.initial": (1, [0, 1, 3]),
    "search.random_candidates": (1, [0, 1, 3]),
    "search.perplexity_ceiling": (0.2, [1.5, 50, 1e6]),
    "search.bounds": (0.3, [[0, 0.5], [0.5, 1], [0.3, 0.30001]]),
    "search.batch": (0.4, [1, 2, 20]),
    "gradient.epochs": (1, [1, 3]),
    "gradient.starts": (1, [1, 2, 5]),
    "gradient.parametrisations": (0.5, [["alphas"], ["per_matrix"], ["simplex", "alphas"]]),
    "gradient.batch_size": (0.3, [1, 4, 100]),
    "gradient.held_out": (0.4, [0, 0.5]),
    "gradient.text_kl": (0.3, [0.5]),
    "gradient.text_windows": (0.3, [1]),
    "gradient.patience": (0.2, [1, None]),
    "output.store_candidate_answers": (0.1, [True]),
    "output.save_best": (0.2, [False]),
}  # fmt: skip
SWEEP = PLAN | {
    "sweep.merges": (1, [[1], [2, 4], [1, 2, 3]]),
    "sweep.methods": (1, [["drop"], ["before_last", "fixed:0"], ["fixed:0.62", "similarity"], ["drop_block", "file"],
                          ["merge_block", "block_influence"], ["most_similar", "similarity_ratio"],
                          ["drop_greedy", "drop"]]),
    "sweep.alignments": (1, [["none"], ["none", "rows"], ["neurons", "activations"]]),
    "sweep.norms": (1, [["keep"], ["fold"], ["keep", "fold"]]),
    "sweep.refits": (0.5, [["none", "linear"], ["outputs"], ["units", "scale"]]),
    "sweep.context": (1, [True, False]),
    "sweep.distances": (1, [[32], [16, 64]]),
    "sweep.retrieval_prompts": (1, [1, 3]),
    "sweep.speed_tokens": (1, [0, 1, 4]),
}  # fmt: skip
SIMILARITY = {
    "similarity.subsets": (0.5, [["all"]]),
    "similarity.samples": (1, [4, 6, 12, 20]),
    "similarity.shots": (0.3, [0, 1]),
    "similarity.split": (1, ["validation", "test", "dev"]),
    "similarity.pooling": (1, ["sequence", "last", "mean"]),
    "similarity.max_tokens": (1, [1, 30, 512]),
    "similarity.embedding": (1, EMBEDDINGS),
    "similarity.sigma": (1, [8, "median", 1e-3, 1e6]),
    "similarity.anisotropy": (0.5, [0, 1, -1]),
    "similarity.dimensions": (1, [1, 2, 5]),
    "similarity.measure": (1, MEASURES),
    "similarity.neighbors": (1, [1, 3, 5]),
    "similarity.entropy_neighbors": (1, [1, 4, 50]),
    "similarity.interval_draws": (1, [10]),
    "similarity.half_draws": (1, [2]),
}
SENSITIVITY = SIMILARITY | {
    "sensitivity.sigma": (1, [[8.0, "median"], [1e-5, 1.0]]),
    "sensitivity.dimensions": (1, [[1], [2, 5]]),
    "sensitivity.samples": (0.5, [[4], [5, 6]]),
    "sensitivity.neighbors": (1, [[3]]),
    "sensitivity.entropy_neighbors": (0.5, [[2]]),
    "sensitivity.embedding": (1, [[name] for name in EMBEDDINGS]),
    "sensitivity.measure": (1, [MEASURES]),
    "sensitivity.merges": (1, [1, 4]),
    "sensitivity.thresholds": (0.5, [[], [-1, 2]]),
}
TAMED = {"model.path", "model.trust_remote_code", "data.language", "data.subjects", "sweep.distances"}  # never wild
LEFT_OUT = ["plan.similarity_run", "plan.alpha_file", "sweep.alpha_files", "search.text", "calibration.text"]
#: Random models: of every family, and language models inside multimodal ones.
MODELS = [*FAMILIES, *(f"{kind} inside" for kind in MULTIMODAL)]
EXPERIMENTS = {"search": SEARCH, "sweep": SWEEP, "similarity": SIMILARITY, "sensitivity": SENSITIVITY, "evaluate": {}}


class Drawer:
    """Configurations by seed, and what they read: models, similarity runs and alpha files in one folder."""

    def __init__(self, folder: Path, prove: bool, always=(), wild=0, families=()):
        self.folder, self.prove, self.always, self.most_wild = folder, prove, always, wild
        self.families, self.demo_too = list(families or MODELS), not families

    def settings(self, experiment, seed):
        """The first configuration of a seed that can be parsed."""
        r = random.Random(seed)
        while True:
            model, n_layers = self._model(r)
            table = DATA | EXPERIMENTS[experiment]
            found = {
                key: r.choice(values)
                for key, (chance, values) in table.items()
                if r.random() < chance or key in self.always
            }
            found |= {"model.path": model, "data.subjects": r.sample(SUBJECTS, r.randint(1, 3)), "workers.count": 1}
            found |= {"output.verify": self.prove}
            if "plan.selection" in found:
                found["plan.merges"] = r.choice([1, 2, 3, n_layers - 1, r.randint(1, n_layers - 1)])
                if found["plan.selection"] == "list":
                    found["plan.base"] = "file"
                found |= {"plan.alpha_file": self._alphas(r, n_layers), "plan.similarity_run": self._similarity(model)}
            if experiment in ("search", "sweep", "evaluate") and (r.random() < 0.25 or "tasks" in self.always):
                found |= self._tasks(r)
            if "file" in found.get("sweep.methods", []):
                found["sweep.alpha_files"] = {"one": self._alphas(r, n_layers), "another": self._alphas(r, n_layers)}
            if self.most_wild:
                return found | self._wild(r, found)
            with contextlib.suppress(UserError):
                load_config(None, overrides(found))
                return found

    def _wild(self, r, found):
        """Keys of any section with values that their types allow, and some of `found` with their defaults."""
        values = wild_values()
        drawn = {key: r.choice(values[key]) for key in r.sample(sorted(values), r.randint(1, self.most_wild))}
        defaults = Config().model_dump()
        for key in LEFT_OUT:
            if key in found and r.random() < 0.25:
                section, _, name = key.partition(".")
                drawn[key] = defaults[section][name]
        return drawn

    def _model(self, r):
        if r.random() < 0.4 and self.demo_too:
            return "demo", Checkpoint("demo").n_layers
        path = self.folder / r.choice(self.families)
        if not path.exists():
            kind, inside, _ = path.name.partition(" inside")
            (make_multimodal if inside else make_checkpoint)(path, kind)
        return str(path), N_LAYERS

    def _alphas(self, r, n_layers):
        there, steps = list(range(n_layers)), []
        for layer in sorted(r.sample(range(1, n_layers), r.randint(1, n_layers - 1)), reverse=True):
            there.remove(layer)
            into = max(one for one in there if one < layer)
            steps.append({"layer_to_merge_into": into, "layer_to_remove": layer, "ratio_i_alpha": round(r.random(), 2)})
        path = self.folder / f"alphas-{r.randrange(10**9)}.json"
        path.write_text(json.dumps(steps))
        return str(path)

    def _tasks(self, r):
        found = {}
        for name in r.sample(sorted(task_files.ROWS), r.randint(1, 3)):
            rows, shots = task_files.ROWS[name], int(r.random() < 0.4)
            task_files.write(self.folder, f"{name}-{shots}", rows[shots:])
            task_files.write(self.folder, f"{name}-examples", rows[:1])
            found[f"tasks.{name}"] = {
                "format": name,
                "file": str(self.folder / f"{name}-{shots}.jsonl"),
                "limit": r.choice([None, 1, 2]),
                "shots": shots,
                "examples": str(self.folder / f"{name}-examples.jsonl") if shots else None,
            }
        return found

    def _similarity(self, model):
        run = self.folder / f"similarity-{Path(model).name}"
        if not run.exists():
            few = {"similarity.samples": 20, "similarity.entropy_neighbors": 4, "data.limit_per_subject": 6}
            few |= {"model.path": model, "output.run": str(run), "output.figures": False}
            experiments.similarity(load_config(None, overrides(few)))
        return str(run)


def wild_values():
    """For every key whose type says which values it has, some of them, the smallest and largest among them."""
    schema, found = Config.model_json_schema(), {}
    for section, about in schema["properties"].items():
        keys = schema["$defs"].get(about.get("$ref", "").rpartition("/")[2], {}).get("properties", {})
        for name, key in keys.items():
            if section not in ("workers", "output") and f"{section}.{name}" not in TAMED and (values := allowed(key)):
                found[f"{section}.{name}"] = values
    return found


def allowed(key):
    """Values of a JSON schema; none where any text will do."""
    if "anyOf" in key:
        return [value for kind in key["anyOf"] for value in allowed(kind)]
    if "enum" in key or "const" in key:
        return key.get("enum") or [key["const"]]
    kind = key.get("type")
    if kind in ("integer", "number"):
        low, high = key.get("minimum", key.get("exclusiveMinimum", -1)), key.get("maximum", 7)
        return sorted({low, high, low + 1, 3, *([(low + high) / 2, low + 1e-9] if kind == "number" else [])})
    if kind == "array":
        some = allowed(key.get("items", {}))
        return [[], some[:1], some[-2:], some[:1] * 2] if some else []
    return {"boolean": [True, False], "null": [None]}.get(kind, [])


def overrides(settings):
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def words_of(run, experiment, split, folder):
    """What a user reads of a run: the terminal's words and the page's."""
    shown, page = io.StringIO(), folder / "page.html"
    show = {"similarity": console.print_similarity, "sensitivity": console.print_sensitivity}.get(experiment)
    with contextlib.redirect_stdout(shown):
        if show is not None:
            show(run)
        else:
            named = {"search": "print_search", "sweep": "print_sweep", "evaluate": "print_evaluation"}[experiment]
            getattr(console, named)(run, split)
    write_report([run], page)
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page.read_text(), flags=re.S)
    return shown.getvalue() + html.unescape(re.sub(r"<[^>]+>", " ", body))


def tried(experiment, settings, folder, audits=False, compared=None):
    """How a configuration ended, the message or trace, and odd words; what was audited is counted in `compared`."""
    try:
        config = load_config(None, [*overrides(settings), f"output.run={folder / 'run'}"])
        run = getattr(experiments, experiment)(config)
        words = words_of(run, experiment, config.data.report_split, folder)
        getattr(experiments, experiment)(config)
        found, counts = audit_of(folder / "run") if audits else ("", {})
        compared.update(counts)
        if found:
            return "differs", found, []
    except UserError as error:
        return "refused", f"{type(error).__name__}: {error}", []
    except Exception:  # any, since a trace is what is looked for
        return "trace", traceback.format_exc(), []
    return "well", "", sorted({words[max(0, m.start() - 50) : m.end() + 30] for m in ODD_WORDS.finditer(words)})


def audit_of(run):
    """The first line of audit.py about a run that says that something disagrees, empty where nothing does, and how many
    lines said what."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        audited(run, questions=6, trials=2)
    lines = said.getvalue().splitlines()
    told = [json.loads(line) for line in lines]
    counts = Counter(line["what"].rpartition(": ")[2] for line in told if "ok" in line)
    counts["skipped"] = sum("skipped" in line for line in told)
    return next((line for line in lines if '"ok": false' in line), ""), counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the first configuration; then one more each")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--prove", action="store_true", help="reload what searches save")
    parser.add_argument("--audit", action="store_true", help="recompute every run by other code")
    parser.add_argument("--families", nargs="+", choices=MODELS, default=[], metavar="NAME", help="of models")
    parser.add_argument("--always", nargs="+", default=[], metavar="KEY", help="keys that every configuration sets")
    parser.add_argument("--wild", type=int, default=0, metavar="N", help="set up to so many keys to anything")
    parser.add_argument("--log", type=argparse.FileType("a"), default="-")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    ends, failed = time.monotonic() + 60 * options.minutes, 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        drawer = Drawer(folder, options.prove, options.always, options.wild, options.families)
        stack.enter_context(opened_locally())
        stack.enter_context(searched_locally())
        for seed in range(options.seed, sys.maxsize):
            if time.monotonic() > ends:
                break
            experiment, began = random.Random(seed).choice(options.experiments), time.monotonic()
            settings = drawer.settings(experiment, seed)
            with tempfile.TemporaryDirectory() as folder:
                compared = Counter()
                ended, message, odd = tried(experiment, settings, Path(folder), options.audit, compared)
            failed += ended in ("trace", "differs")
            line = {"seed": seed, "experiment": experiment, "ended": ended, "message": message, "odd": odd}
            line |= {"compared": compared} if options.audit else {}
            line |= {"seconds": round(time.monotonic() - began, 1), "settings": settings}
            print(json.dumps(line), file=options.log, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
