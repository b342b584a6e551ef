"""Candidates of one merge scored in this process: for a notebook, and for an optimiser of one's own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.config import Config, ConfigError
from raymerge.config_file import check_config
from raymerge.fusion import check_mergeable
from raymerge.inputs import REPORT, SEARCH, SEARCH_TEXT, check_askable, check_matchable
from raymerge.merging import save_merged
from raymerge.objectives import Score
from raymerge.plan import MergePlan, PlanError
from raymerge.plan_section import check_selected, similarity_of, starting_plan
from raymerge.progress import Progress, Silent, step
from raymerge.questions import Question
from raymerge.saving import check_writable
from raymerge.storage import scratch_folder
from raymerge.worker import ModelWorker

#: Coefficients of one candidate, (K,): optimisers give arrays, which are no Sequence to a type checker.
Alphas = Sequence[float] | np.ndarray


class CandidateScorer:
    """Scores alphas of the plan section's merges as `raymerge search` does, by its objective on its questions and text.

    Needs no Ray: everything is computed in this process, with the number of threads that torch has, on the first GPU
    that it sees (workers.gpus_per_worker=0: on the CPU). The states that enter the merged layers are computed when it
    is made. They are kept in output.cache, where a search finds them too, or else in a temporary folder that `close`,
    or the end of a `with`, deletes.

    plan: the merges with the plan section's own alphas. questions: what is asked, none where data.mmlu is null.

    The layers must be known beforehand: a search chooses them on its workers where plan.recompute is true or plan.block
    is not a number. plan.refit plays no part, since a search scores candidates without it. Raises ConfigError,
    PlanError, CheckpointError, DataError.
    """

    def __init__(self, config: Config, *, progress: Progress | None = None):
        check_config(config)
        check_askable(config)
        check_matchable(config, {"plan.alignment": [config.plan.alignment]})
        progress = progress or Silent()
        with ExitStack() as opened:
            with step(progress, "reading model and questions"):
                cache = config.output.cache or opened.enter_context(scratch_folder())
                self.plan, worker = _opened(config, Path(cache).expanduser())
            asked = worker.material.questions.get(SEARCH)
            self.questions: tuple[Question, ...] = () if asked is None else asked.questions
            # Of what is reported on nothing is computed.
            roles = [role for role in worker.material.roles if role != REPORT]
            shards = [(role, number) for role in roles for number in range(len(worker.prompts.shards(role)))]
            progress.stage("trunk states (shards)", len(shards))
            for done, shard in enumerate(shards, 1):
                worker.compute_trunk(shard)
                progress.advance(done)
            self._worker: ModelWorker | None = worker
            self._delete = weakref.finalize(self, opened.pop_all().close)

    def __enter__(self) -> CandidateScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CandidateScorer holds an opened model and cannot be copied: make one in each process")

    def close(self) -> None:
        """Let go of the model, and delete the states unless they are in output.cache."""
        self._worker = None
        self._delete()

    def candidate(self, alphas: Alphas, name: str = "candidate") -> MergePlan:
        """The merges with alphas (K,) in the order of `plan.steps`. Raises PlanError."""
        try:
            values = np.asarray(alphas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise PlanError(f"alphas are {alphas!r:.200}, but those of a candidate are numbers: {error}") from error
        if values.ndim != 1:
            raise PlanError(
                f"alphas have the shape {values.shape}, but those of a candidate have ({len(self.plan.steps)},)"
            )
        return self.plan.with_alphas(values.tolist(), name=name, kind="found")

    def score(self, vectors: Sequence[Alphas] | np.ndarray) -> list[Score]:
        """What candidates, (n, K) alphas, reach: the objective, micro accuracy, mean answer NLL (nats) and the search
        text's perplexity; None for what is not asked for, NaN where logits are not finite.

        Several at once take fewer passes over the weights than one after the other. Raises PlanError.
        """
        candidates = [self.candidate(alphas).alphas for alphas in vectors]
        return [Score(*(found[key] for key in Score._fields)) for found in self._open().score(candidates)]

    def answer_logits(self, alphas: Alphas) -> np.ndarray:
        """Logits (n, 4) float32 of the answer letters under a candidate, one row for each of `questions`. Raises
        PlanError, ConfigError where nothing is asked, NotFiniteError."""
        if not self.questions:
            raise ConfigError("data.mmlu is null, so that no questions are asked: a candidate has no answers")
        return self._open().answers((self.candidate(alphas), SEARCH, None, False)).logits

    def loss(self, alphas: Alphas) -> tuple[float, np.ndarray]:
        """What searcher gradient minimises for the objective (nats; answer_nll for accuracies), and its gradient by
        alphas, (K,) float64.

        Merged weights are not rounded to the stored dtype, as they are in `score`, so that the loss is smooth, and the
        text is taken whole, whatever gradient.text_windows and gradient.text_positions are. Raises PlanError, and
        GradientError where there is no gradient: for other than tail merges, quantised models, alignment rows, and
        objectives whose terms are of different subjects.
        """
        return self._open().loss(self.candidate(alphas).alphas)

    def save(self, alphas: Alphas, folder: str | Path, *, verify: bool = True) -> dict[str, Any]:
        """Save a candidate as an ordinary checkpoint and prove it: `merging.save_merged`, whose record this returns.
        Raises PlanError, CheckpointError, ProofError."""
        folder, worker = Path(folder).expanduser(), self._open()
        plan = self.candidate(alphas, name=folder.name)
        if folder.exists():
            raise CheckpointError(f"{folder} exists already: give another folder, or delete it")
        check_writable(folder)
        return save_merged(worker.checkpoint, plan, folder, aligner=worker.aligner, verify=verify)

    def _open(self) -> ModelWorker:
        if self._worker is None:
            raise ValueError("this CandidateScorer has been closed: make another one")
        return self._worker


def _opened(config: Config, cache: Path) -> tuple[MergePlan, ModelWorker]:
    """The plan section's plan, and a worker in this process that has its merges as template."""
    plan, model = config.plan, config.model
    if plan.recompute or (plan.selection == "block" and not isinstance(plan.block, int)):
        key, value = ("recompute", "false") if plan.recompute else ("block", "a number")
        raise ConfigError(
            f"plan.{key} is {str(getattr(plan, key)).lower()}: a search chooses the layers on its workers, before it "
            f"scores; set plan.{key} to {value}, or take a finished search's alpha file (plan.selection=list, "
            "plan.base=file, plan.alpha_file)"
        )
    checkpoint = Checkpoint(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    start = starting_plan(plan, checkpoint.n_layers, similarity_of(plan, checkpoint))
    check_selected(plan, start)
    template = start.with_alphas([0.5] * len(start.steps), name="candidate", kind="found")
    check_mergeable(checkpoint, template)
    threads = config.workers.model_copy(update={"cpus_per_worker": torch.get_num_threads()})
    worker = ModelWorker(
        config.model_copy(update={"workers": threads}),
        # What is reported on is read as well: a search leaves these questions out of its own.
        roles=(SEARCH_TEXT,) if config.data.mmlu is None else (SEARCH, REPORT),
        cache=cache,
        template=template,
        firsts=(template.resumes_at,),
    )
    return start, worker
