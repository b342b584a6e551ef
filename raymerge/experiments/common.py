"""What every experiment does: read its inputs, open the pool, check the workers, compute the trunk, draw figures."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import raymerge
from raymerge import rows
from raymerge.alignment import REORDERED, Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.config import Config
from raymerge.inputs import (
    SEARCH,
    SEARCH_TEXT,
    SUBSETS,
    TEXT,
    Subset,
    read_questions,
    read_search_text,
    read_subsets,
    read_tasks,
    read_text,
    task_role,
)
from raymerge.plan import MergePlan
from raymerge.pool import WorkerPool, cluster_resources, plan_workers
from raymerge.progress import Progress
from raymerge.questions import QuestionSet
from raymerge.tables import RunDirectory
from raymerge.tasks import Task
from raymerge.worker import ModelWorker


@dataclass(frozen=True)
class Inputs:
    """What an experiment reads before it writes anything. text: what is reported on; search_text: what candidates are
    judged on, and the number of its first token."""

    checkpoint: Checkpoint
    questions: dict[str, QuestionSet]
    subsets: list[Subset]
    text: str | None
    search_text: tuple[str, int] | None = None
    tasks: dict[str, Task] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, ...]:
        return (*self.questions, *([SUBSETS] if self.subsets else []), *map(task_role, self.tasks))

    @property
    def identities(self) -> dict[str, str]:
        """The identity of every set of prompts, as `ModelWorker.describe` gives them."""
        return (
            {role: questions.identity for role, questions in self.questions.items()}
            | {f"{subset.name}/{subset.language}": subset.questions.identity for subset in self.subsets}
            | {task_role(name): task.identity for name, task in self.tasks.items()}
            | ({} if self.search_text is None else {SEARCH_TEXT: rows.text_hash(self.search_text[0])})
        )


def read_inputs(config: Config, roles: Sequence[str], *, text: bool = True) -> Inputs:
    """Everything that roles (SEARCH, REPORT, SUBSETS) need; text: and the plain text and the tasks of a report. Raises
    CheckpointError, DataError, ConfigError."""
    model = config.model
    checkpoint = Checkpoint(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    questions = {role: read_questions(config, role) for role in roles if role != SUBSETS}
    subsets = read_subsets(config) if SUBSETS in roles else []
    search_text = read_search_text(config) if SEARCH in roles else None
    tasks = read_tasks(config) if text else {}
    return Inputs(checkpoint, questions, subsets, read_text(config) if text else None, search_text, tasks)


def settings_of(config: Config, *sections: str) -> dict[str, Any]:
    """The sections of a configuration that an experiment depends on: what its run directory is held to.

    Without tasks their section is left out, as it is in runs from before there was one.
    """
    resolved = config.resolved()
    named = [name for name in sections if name != "tasks" or config.tasks.root]
    return {name: resolved[name] for name in (*named, "workers", "output")}


def cache_of(config: Config, run: RunDirectory) -> str:
    """The folder of states, activations and alignments: output.cache, or RUN/cache where RUN is on a disk."""
    return config.output.cache or (run.path_of("cache") if run.is_local else tempfile.mkdtemp())


def open_pool(
    config: Config,
    inputs: Inputs,
    cache: str,
    *,
    template: MergePlan | None = None,
    firsts: Sequence[int] = (),
    most: int | None = None,
    shards_each: int | None = None,
) -> WorkerPool:
    """Start the workers, `most` of them at the most; refuses a pool whose machines have other files.

    shards_each: cut prompts small enough that every worker has so many shards of each role. Not for states that are
    cached: the cut names them, and it would change with the number of workers.
    """
    workers = config.workers
    placement = plan_workers(workers.count, workers.gpus_per_worker, workers.cpus_per_worker, cluster_resources())
    count = placement.count if most is None else max(1, min(most, placement.count))
    arguments = {"config": config, "roles": inputs.roles, "cache": cache, "template": template, "firsts": tuple(firsts)}
    return WorkerPool(
        ModelWorker,
        arguments | ({} if shards_each is None else {"shards": shards_each * count}),
        count=count,
        cpus_per_worker=placement.cpus,
        gpus_per_worker=placement.gpus,
        timeout_s=workers.timeout_s,
        max_restarts=workers.max_restarts,
    )


def describe_workers(pool: WorkerPool, inputs: Inputs) -> list[dict[str, Any]]:
    """What every worker holds; refuses a pool whose machines have other files under the same paths."""
    found = pool.broadcast("describe")
    ours = {"model_identity": inputs.checkpoint.identity, "data_identities": inputs.identities}
    for worker in found:
        for key, value in ours.items():
            if worker[key] != value:
                raise ValueError(
                    f"{key} of the worker on {worker['host']} is {worker[key]}, the driver's {value}: the paths in the "
                    "configuration must lead to the same files on every machine"
                )
    return found


def compute_trunk(pool: WorkerPool, inputs: Inputs, progress: Progress, further: Sequence[str] = ()) -> dict[str, int]:
    """States of every shard, computed in parallel, the largest first so that no worker ends up waiting long.

    further: other prompts than the inputs' own (RETRIEVAL). Returns the number of shards of each role, and of the text.
    """
    items, sizes, shards = [], [], {}
    texts = {TEXT: inputs.text, SEARCH_TEXT: inputs.search_text}
    roles = [*inputs.questions, *map(task_role, inputs.tasks)]
    names = [*roles, *(name for name, text in texts.items() if text is not None), *further]
    for of, tokens in zip(names, pool.map("shard_tokens", names), strict=True):
        items += [(of, number) for number in range(len(tokens))]
        sizes += tokens
        shards[of] = len(tokens)
    order = sorted(range(len(items)), key=lambda i: -sizes[i])
    progress.stage("trunk states (tokens)", sum(sizes))
    pool.map("compute_trunk", [items[i] for i in order], counted(progress, lambda _, tokens: tokens))
    return shards


def align(pool: WorkerPool, plans: Sequence[MergePlan], progress: Progress) -> None:
    """Match the neurons of every pair of layers that the plans need, in parallel, before any worker needs them all."""
    items = sorted(
        {(plan.alignment, pair) for plan in plans if plan.alignment in REORDERED for pair in Aligner.pairs(plan)}
    )
    if items:
        progress.stage("aligning neurons (pairs of layers)", len(items))
        pool.map("align", items, counted(progress))


def counted(
    progress: Progress,
    size: Callable[[int, Any], int] = lambda *_: 1,
    then: Callable[[int, Any], None] | None = None,
) -> Callable[[int, Any], None]:
    """An on_result for pool.map that counts size(number, result) units of the current stage as they finish."""
    done = 0

    def finished(number: int, result: Any) -> None:
        nonlocal done
        done += size(number, result)
        progress.advance(done)
        if then is not None:
            then(number, result)

    return finished


def model_facts(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What a manifest says of the model, the prompts and the text."""
    return {
        "model": {
            "path": config.model.path,
            "identity": inputs.checkpoint.identity,
            "revision": config.model.revision,
        },
        "data": inputs.identities,
        "text_hash": None if inputs.text is None else rows.text_hash(inputs.text),
    }


def draw_figures(run: RunDirectory, scripts: Sequence[str], progress: Progress) -> list[str]:
    """Run analysis scripts on a finished run; they stand beside the package in a checkout, not inside it."""
    folder = Path(raymerge.__file__).resolve().parent.parent / "analysis"
    if not folder.is_dir() or not run.is_local:
        progress.message("No figures: the analysis scripts are not beside this installation, or RUN is not local.")
        return []
    out = Path(run.path_of("figures"))
    for script in scripts:
        done = subprocess.run(
            [sys.executable, str(folder / script), str(out.parent), "--out", str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"analysis/{script} failed with exit code {done.returncode}: {done.stderr[-2000:]}")
    return sorted(str(path.relative_to(out.parent)) for path in out.iterdir())
