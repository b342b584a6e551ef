"""The models of what a search has found, saved into its run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raymerge.alignment import REORDERED, Aligner
from raymerge.card import search_results
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.config import Config
from raymerge.merging import save_merged, saved_proof, saved_record
from raymerge.plan import MergePlan
from raymerge.pool import WorkerPool
from raymerge.progress import Progress
from raymerge.proof import ProofError
from raymerge.storage import TEMPORARY
from raymerge.tables import RunDirectory, RunError


class FoundModels:
    """Saves plans of a run as merged checkpoints in its models/, with what the workers have matched for them.

    command: what a model's card says that made it.
    """

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        run: RunDirectory,
        cache: str,
        *,
        command: Sequence[str] | None,
        progress: Progress,
    ):
        self._config, self._checkpoint, self._run, self._cache = config, checkpoint, run, cache
        self._command, self._progress = command, progress
        self._aligner = Aligner(checkpoint)

    def take_matches(self, pool: WorkerPool, plans: Sequence[MergePlan]) -> None:
        """Fetch the alignments of plans that are to be saved: the workers' caches may be on other machines."""
        items = [(p.alignment, pair) for p in plans if p.alignment in REORDERED for pair in Aligner.pairs(p)]
        for (alignment, pair), found in zip(items, pool.map("match", items), strict=True):
            self._aligner.take(pair, alignment, found)
        plans = [plan for plan in plans if plan.alignment == "rows"]
        for plan, found in zip(plans, pool.map("match_rows", plans), strict=True):
            self._aligner.take_rows(plan, found)

    def save(
        self, plan: MergePlan, fitted: Mapping[int, Mapping[str, Any]] | None = None
    ) -> tuple[str, dict[str, Any] | None]:
        """The merged checkpoint in models/, with plan, alphas and receipts beside the weights, and its proof.

        fitted: the tensors of a refitted plan by position. A checkpoint that fails its proof is kept there all the
        same, and raises ProofError; one whose proof did not end is not kept. What an earlier call has saved stays.
        """
        where, plan_id = self._run.path_of("models", plan.name), plan.plan_id(self._checkpoint.identity)
        if self._run.is_local and Path(where).exists():
            same = saved_record(Path(where))["plan_id"] == plan_id
            if same and ((proof := saved_proof(Path(where))) or not self._config.output.verify):
                return where, proof
        # In the run, or else in its cache, so that a killed process's is deleted at the next start.
        beside = Path(where).parent.parent if self._run.is_local else Path(self._cache)
        with _folder_in(beside) as scratch:
            folder = scratch / plan.name
            try:
                record = save_merged(
                    self._checkpoint,
                    plan,
                    folder,
                    aligner=self._aligner,
                    refits=None if fitted is None else lambda _, position: fitted[position],
                    verify=self._config.output.verify,
                    progress=self._progress,
                    command=self._command,
                    results=search_results(self._run, plan_id, self._config.data.report_split),
                )
            except ProofError as error:
                kept = self._run.upload(folder, "models", plan.name, move=True)
                raise ProofError(str(error).replace(str(folder), kept)) from error  # the folder that it named is gone
            except (CheckpointError, RunError) as error:  # as here
                raise type(error)(str(error).replace(str(folder), where)) from error
            return self._run.upload(folder, "models", plan.name, move=True), record["proof"]


@contextmanager
def _folder_in(parent: Path) -> Iterator[Path]:
    """A temporary folder in another one for as long as the context lasts. Raises RunError where none can be made."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
    except OSError as error:
        raise RunError(
            f"no folder for the merged model can be made in {parent}: {error}; free space there and run the same "
            "command again: finished candidates are kept"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
