"""What every experiment does: read its inputs, open the pool, check the workers, compute the trunk, draw figures."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raymerge
from raymerge import rows
from raymerge.alignment import REORDERED, Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.config import Config, ConfigError
from raymerge.inputs import (
    CALIBRATION,
    SEARCH,
    SEARCH_TEXT,
    SUBSETS,
    TEXT,
    Subset,
    calibration_questions,
    read_calibration_text,
    read_questions,
    read_search_text,
    read_subsets,
    read_text,
)
from raymerge.plan import MergePlan
from raymerge.pool import WorkerPool, cluster_resources, plan_workers
from raymerge.progress import Progress
from raymerge.prompts import PromptError, encode_text
from raymerge.questions import QuestionSet
from raymerge.tables import RunDirectory
from raymerge.worker import ModelWorker


@dataclass(frozen=True)
class Inputs:
    """What an experiment reads before it writes anything. text: what is reported on; search_text: what candidates are
    judged on, and the number of its first token; calibration: what is chosen or fitted on, such a text or prompts."""

    checkpoint: Checkpoint
    questions: dict[str, QuestionSet]
    subsets: list[Subset]
    text: str | None
    search_text: tuple[str, int] | None = None
    calibration: tuple[str, int] | QuestionSet | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        more = [SUBSETS] if self.subsets else []
        return (*self.questions, *more, *([] if self.calibration is None else [CALIBRATION]))

    @property
    def identities(self) -> dict[str, str]:
        """The identity of every set of prompts, as `ModelWorker.describe` gives them."""
        return (
            {role: questions.identity for role, questions in self.questions.items()}
            | {f"{subset.name}/{subset.language}": subset.questions.identity for subset in self.subsets}
            | ({} if self.search_text is None else {SEARCH_TEXT: rows.text_hash(self.search_text[0])})
            | ({} if self.calibration is None else {CALIBRATION: self._calibration_identity})
        )

    @property
    def _calibration_identity(self) -> str:
        found = self.calibration
        return found.identity if isinstance(found, QuestionSet) else rows.text_hash(found[0])


def read_inputs(config: Config, roles: Sequence[str], *, text: bool = True) -> Inputs:
    """Everything that roles (SEARCH, REPORT, SUBSETS, CALIBRATION) need.

    Raises CheckpointError, DataError, ConfigError; the last also for a text of which nothing is left."""
    model = config.model
    checkpoint = Checkpoint(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    questions = {role: read_questions(config, role) for role in roles if role not in (SUBSETS, CALIBRATION)}
    subsets = read_subsets(config) if SUBSETS in roles else []
    search_text = read_search_text(config) if SEARCH in roles else None
    calibration = None
    if CALIBRATION in roles:
        calibration = read_calibration_text(config) or calibration_questions(config, questions, wanted=True)
    inputs = Inputs(checkpoint, questions, subsets, read_text(config) if text else None, search_text, calibration)
    for key, found, limit in (
        ("search", search_text, config.search.text_tokens),
        ("calibration", calibration, config.calibration.tokens),
    ):
        if isinstance(found, tuple):
            _check_text(checkpoint, f"{key}.text = {getattr(config, key).text}", *found, limit)
    return inputs


def _check_text(checkpoint: Checkpoint, what: str, text: str, first: int, limit: int) -> None:
    try:
        encode_text(text, checkpoint.tokenizer, limit=limit, start=first)
    except PromptError as error:
        fewer = ", or use fewer tokens of this one before (data.perplexity_tokens, search.text_tokens)" if first else ""
        raise ConfigError(f"{what}: {error}; name a longer text{fewer}") from error


def settings_of(config: Config, *sections: str) -> dict[str, Any]:
    """The sections of a configuration that an experiment depends on: what its run directory is held to."""
    resolved = config.resolved()
    return {name: resolved[name] for name in (*sections, "workers", "output")}


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
) -> WorkerPool:
    """Start the workers, `most` of them at the most; refuses a pool whose machines have other files."""
    workers = config.workers
    placement = plan_workers(workers.count, workers.gpus_per_worker, workers.cpus_per_worker, cluster_resources())
    return WorkerPool(
        ModelWorker,
        {"config": config, "roles": inputs.roles, "cache": cache, "template": template, "firsts": tuple(firsts)},
        count=placement.count if most is None else max(1, min(most, placement.count)),
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
    names = [*inputs.questions, *(name for name, text in texts.items() if text is not None), *further]
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
            "gguf": inputs.checkpoint.source,
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
