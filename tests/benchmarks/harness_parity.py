"""`raymerge evaluate` against lm-evaluation-harness's MMLU on the same model and questions, in one run; prints JSON.

lm-eval is run by an interpreter of its own (--harness), with its own MMLU template and Hugging Face backend; only the
data set is replaced by local files, made here of the first questions of each subject. Both sides are offline, compute
in float32 and may use --threads threads: ours as so many workers, lm-eval as one process of so many threads. Each is
timed as its user would start it, loading and all, in wall and in CPU seconds (of the process and all its descendants);
CPU seconds are what a busy machine changes little. With --scratch what a side has finished is kept there and not run
again, so that a long comparison can be cut in two (--side).

    python tests/benchmarks/harness_parity.py --model DIR --mmlu DIR --harness VENV/bin/python --questions 20
    python tests/benchmarks/harness_parity.py --model DIR --formats --harness VENV/bin/python
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.compute as pc
import yaml

from raymerge.questions import LETTERS, load_questions, prefix_text, question_text
from raymerge.tables import RunDirectory

# Run by the harness's interpreter: model, folder of task files, threads, batch size, where to write.
HARNESS = """
import json, sys, torch
from pathlib import Path
model, tasks, threads, batch_size, out = sys.argv[1:]
torch.set_num_threads(int(threads))
import lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": model, "dtype": "float32"},
    tasks=sorted(path.stem for path in Path(tasks).glob("*.yaml")),
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    batch_size=int(batch_size),
    device="cpu",
)
samples = {
    task: [
        {
            "doc": sample["doc_id"],
            "context": sample["arguments"][0][0],
            "continuations": [arguments[1] for arguments in sample["arguments"]],
            "log_likelihoods": [float(response[0]) for response in sample["filtered_resps"]],
            "target": sample["target"],
            **{measure: sample[measure] for measure in ("acc", "acc_norm") if measure in sample},
        }
        for sample in sorted(rows, key=lambda row: row["doc_id"])
    ]
    for task, rows in found["samples"].items()
}
json.dump({"version": lm_eval.__version__, "samples": samples}, open(out, "w"))
"""
WHERE = "import lm_eval; print(lm_eval.__path__[0] + '/tasks')"
OF_FORMAT = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "race": "race/race.yaml",
}


def timed(command: list[str], log: Path, **environment: str) -> dict[str, float]:
    """Run a command to its end; wall and CPU seconds of it and all its descendants, sampled every half second."""
    began, cpu, ended = time.perf_counter(), {}, threading.Event()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})

        def watch() -> None:
            root = psutil.Process(process.pid)
            while not ended.wait(0.5):
                try:
                    for each in (root, *root.children(recursive=True)):
                        times = each.cpu_times()
                        cpu[each.pid] = times.user + times.system
                except psutil.NoSuchProcess:
                    continue

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
    if code:
        raise RuntimeError(f"{command[:4]} failed with exit code {code}:\n{log.read_text()[-3000:]}")
    return {"wall": round(time.perf_counter() - began, 1), "cpu": round(sum(cpu.values()), 1)}


def write_data(questions, folder: Path, template: dict) -> None:
    """The questions as header-less CSV files for us, and as JSON lines with a task file a subject for lm-eval."""
    for subject, members in questions.by_subject().items():
        parts = {"dev": questions.examples[subject], "test": members}
        for split, part in parts.items():
            table = folder / "mmlu" / split / f"{subject}_{split}.csv"
            lines = folder / "json" / f"{subject}_{split}.jsonl"
            for path in (table, lines):
                path.parent.mkdir(parents=True, exist_ok=True)
            with table.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([q.text, *q.options, LETTERS[q.answer]] for q in part)
            rows = [{"question": q.text, "choices": q.options, "answer": q.answer, "subject": subject} for q in part]
            lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = template | {
            "task": subject,
            "description": f"The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
            "num_fewshot": len(parts["dev"]),
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {split: str(folder / "json" / f"{subject}_{split}.jsonl") for split in parts}
            },
        }
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{subject}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


class Sides:
    """Both sides' command lines, in a folder of scratch."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "data")}

    def ours(self, *arguments: str) -> dict[str, float]:
        """Evaluate into the run directory "run"."""
        command = [sys.executable, "-m", "raymerge", "evaluate", self.options.model, *arguments, "--text", "none"]
        command += ["--no-question-perplexity", "--out", str(self.folder / "run"), "--set", "model.dtype=float32"]
        command += ["--set", f"workers.count={self.options.threads}"]
        # Ray starts its workers 15 steps nicer than their driver: on a busy machine that is no equal footing.
        return self._once("ours", lambda log: timed(command, log, RAY_worker_niceness="0", **self.offline))

    def theirs(self) -> dict[str, float]:
        """Evaluate the tasks of folder "tasks" into harness.json."""
        options, threads = self.options, str(self.options.threads)
        command = [options.harness, "-c", HARNESS, options.model, str(self.folder / "tasks"), threads]
        command += [str(options.batch_size), str(self.folder / "harness.json")]
        settings = self.offline | {"OMP_NUM_THREADS": threads, "PYTHONPATH": ""}
        return self._once("harness", lambda log: timed(command, log, **settings))

    def _once(self, side: str, run: Callable[[Path], dict[str, float]]) -> dict[str, float]:
        """A side's seconds, from an earlier call where it has finished."""
        path = self.folder / f"{side}_seconds.json"
        if not path.exists():
            path.write_text(json.dumps(run(self.folder / f"{side}.log") | {"load": os.getloadavg()}), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def harness(self) -> dict:
        return json.loads((self.folder / "harness.json").read_text(encoding="utf-8"))


def formats(options: argparse.Namespace, tasks: Path, folder: Path) -> dict:
    """Every format on the rows of tests/task_files.py, without and with an example: lm-eval's own task files, data
    replaced, against ours."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import task_files

    (folder / "tasks").mkdir(parents=True)
    sections = {}
    for format, rows in task_files.ROWS.items():
        examples = task_files.write(folder, f"{format}_dev", rows[:1])
        for shots in (0, 1):
            name, file = f"{format}_{shots}", task_files.write(folder, f"{format}_{shots}", rows[shots:])
            task = {
                "include": str(tasks / OF_FORMAT[format]),
                "task": name,
                "tag": None,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"test": str(file), "dev": str(examples)}},
                "training_split": None,
                "validation_split": None,
                "test_split": "test",
                "fewshot_split": "dev",
                "fewshot_config": {"sampler": "first_n"},
                "num_fewshot": shots,
            }
            (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
            sections[name] = {"format": format, "file": str(file), "shots": shots, "examples": str(examples)}
    (folder / "config.yaml").write_text(yaml.safe_dump({"tasks": sections}), encoding="utf-8")
    sides = Sides(options, folder)
    sides.ours("--mmlu", "none", "--config", str(folder / "config.yaml"))
    sides.theirs()
    run, harness = RunDirectory.load(folder / "run"), sides.harness()
    answers = run.read("task_answers").to_pylist()
    accuracy = {(row["task"], row["measure"]): row["accuracy"] for row in run.read("task_accuracy").to_pylist()}
    found = {}
    for name, samples in harness["samples"].items():
        own = [row for row in answers if row["task"] == name]
        worst = max(
            float(np.abs(np.subtract(row["log_likelihoods"], sample["log_likelihoods"])).max())
            for row, sample in zip(own, samples, strict=True)
        )
        theirs = {m: float(np.mean([s[m] for s in samples])) for m in ("acc", "acc_norm") if m in samples[0]}
        ours = {measure: value for (task, measure), value in accuracy.items() if task == name}
        found[name] = {"items": len(own), "largest_difference_nats": worst, "ours": ours, "harness": theirs}
    return {"lm_eval": harness["version"], "equal": all(e["ours"] == e["harness"] for e in found.values()), **found}


def mmlu(options: argparse.Namespace, tasks: Path, folder: Path) -> dict:
    """MMLU by both, question by question."""
    template = yaml.safe_load((tasks / "mmlu/default/_default_template_yaml").read_text(encoding="utf-8"))
    everything = load_questions(options.mmlu, split="test", subjects=options.subjects, shots=options.shots)
    parts = [part[: options.questions] for part in everything.by_subject().values()]
    questions = replace(everything, questions=tuple(question for part in parts for question in part))

    write_data(questions, folder, template)
    sides, seconds = Sides(options, folder), {}
    if options.side != "harness":
        seconds["ours"] = sides.ours("--mmlu", str(folder / "mmlu"), "--shots", str(options.shots))
    if options.side != "ours":
        seconds["harness"] = sides.theirs()
    if options.side != "both":
        return {"seconds": seconds}
    harness = sides.harness()
    answers = RunDirectory.load(folder / "run").read("answers")

    columns = [f"logit_{letter.lower()}" for letter in LETTERS]
    found, disagreements, worst, prompts_equal = {}, [], 0.0, True
    totals = {"ours": 0, "harness": 0}
    for subject, members in questions.by_subject().items():
        own = answers.filter(pc.equal(answers["subject"], subject)).to_pylist()
        own = {row["question_id"]: row for row in own}
        correct = {"ours": 0, "harness": 0}
        prefix = prefix_text(subject, questions.examples[subject])
        for number, (question, sample) in enumerate(zip(members, harness["samples"][subject], strict=True)):
            row = own[f"{subject}/test/{number}"]
            ours_nll = np.array([row["logsumexp_all"] - row[column] for column in columns])
            theirs_nll = -np.array(sample["log_likelihoods"])
            worst = max(worst, float(np.abs(ours_nll - theirs_nll).max()))
            prompts_equal &= sample["context"] == prefix + question_text(question)
            predicted = {"ours": row["predicted"], "harness": int(theirs_nll.argmin())}
            for side, letter in predicted.items():
                correct[side] += letter == question.answer
            if predicted["ours"] != predicted["harness"]:
                lead = float(np.diff(np.sort(theirs_nll))[0])
                disagreements.append({"question": row["question_id"], **predicted, "harness_lead_nats": lead})
        for side, count in correct.items():
            totals[side] += count
        found[subject] = {side: count / len(members) for side, count in correct.items()}
    n = len(questions.questions)
    return {
        "questions": n,
        "accuracy": {side: count / n for side, count in totals.items()},
        "by_subject": found,
        "prompts_equal": prompts_equal,
        "disagreements": disagreements,
        "largest_log_likelihood_difference": worst,
        "seconds": seconds,
        "times_faster": {k: round(seconds["harness"][k] / seconds["ours"][k], 2) for k in ("wall", "cpu")},
        "lm_eval": harness["version"],
        "batch_size": options.batch_size,
        "threads": options.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--mmlu", help="a folder of MMLU")
    parser.add_argument("--formats", action="store_true", help="the other tasks' formats on a few rows instead of MMLU")
    parser.add_argument("--harness", required=True, metavar="PYTHON", help="an interpreter that has lm_eval")
    # The five in the middle of all 57 by the length of their prompts, which decides how much sharing examples saves.
    names = "college_biology,college_physics,high_school_biology,high_school_chemistry,high_school_psychology"
    parser.add_argument("--subjects", default=names)
    parser.add_argument("--questions", type=int, default=20, help="the first so many questions of each")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1, help="of lm-eval")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="kept folder; by default one that is deleted")
    parser.add_argument("--side", choices=["both", "ours", "harness"], default="both")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    where = subprocess.run([options.harness, "-c", WHERE], capture_output=True, text=True, check=True)
    tasks = Path(where.stdout.split()[-1])
    with tempfile.TemporaryDirectory() as folder:
        compare = formats if options.formats else mmlu
        print(json.dumps(compare(options, tasks, options.scratch or Path(folder)), indent=1))


if __name__ == "__main__":
    main()
