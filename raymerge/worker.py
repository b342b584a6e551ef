"""One model copy and what it can be asked to do. Plain Python: the pool makes actors of it, tests do not need to.

A worker is self-sufficient: everything follows from its constructor's arguments, and what it needs for a task it loads
when first asked, so that a restarted worker can take any task at once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raymerge.checkpoint import Checkpoint
from raymerge.config import Config
from raymerge.evaluation import Answers, answer_shard, text_nll
from raymerge.forward import LayerRunner
from raymerge.inputs import REPORT, SEARCH, TEXT, read_questions, read_text
from raymerge.objectives import score_answers
from raymerge.plan import MergePlan, tail_plan
from raymerge.prompts import Prompts, Shard, encode_questions, encode_text
from raymerge.scoring import SourceLayers, TailScorer, TrunkCache


class ModelWorker:
    """Holds a model (weights mapped from disk), tokenised questions by role, and the trunk's states.

    roles: which questions it is asked about, SEARCH and REPORT. first: the layer whose inputs are cached (the first
    that any plan of this run changes); None runs whole models. cache: folder of the trunk's states.
    """

    def __init__(
        self,
        config: Config,
        *,
        roles: Sequence[str] = (SEARCH, REPORT),
        first: int | None = None,
        cache: str | Path | None = None,
    ):
        # One thread is the safe default on CPUs: several workers of several threads each have been measured a
        # hundred times slower.
        torch.set_num_threads(config.workers.cpus_per_worker)
        model = config.model
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
        self.config = config
        self.checkpoint = Checkpoint(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        self.runner = LayerRunner(self.checkpoint, device=device, dtype=dtype)
        self.questions = {role: read_questions(config, role) for role in roles}
        self._trunk = None if first is None or cache is None else TrunkCache(self.runner, first, Path(cache))
        self._prompts: dict[str, Prompts] = {}
        self._scorers: dict[str, TailScorer] = {}

    def describe(self) -> dict[str, Any]:
        """Where this worker runs and what it holds; the identity lets a pool check that all hold the same model."""
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": torch.cuda.get_device_name() if self.runner.device.type == "cuda" else "cpu",
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "model_identity": self.checkpoint.identity,
            "data_identities": {role: questions.identity for role, questions in self.questions.items()},
        }

    def prompts(self, role: str) -> Prompts:
        """The tokenised questions of a role."""
        if role not in self._prompts:
            self._prompts[role] = encode_questions(
                self.questions[role], self.checkpoint.tokenizer, add_bos=self.config.model.add_bos
            )
        return self._prompts[role]

    @cached_property
    def text_shards(self) -> tuple[Shard, ...]:
        """The plain text as windows of tokens; none without a text."""
        text = read_text(self.config)
        if text is None:
            return ()
        return encode_text(text, self.checkpoint.tokenizer, limit=self.config.data.perplexity_tokens)

    def shards(self, of: str) -> tuple[Shard, ...]:
        """The shards of a role's questions, or of the plain text (TEXT)."""
        return self.text_shards if of == TEXT else self.prompts(of).shards

    def shard_tokens(self, of: str) -> list[int]:
        """Tokens of each shard, so that the largest can be handed out first."""
        return [shard.tokens for shard in self.shards(of)]

    def compute_trunk(self, item: tuple[str, int]) -> int:
        """Make sure that the trunk's states of one shard (of a role or the text) are on disk; its tokens."""
        of, number = item
        shard = self.shards(of)[number]
        self._trunk.compute(shard)
        return shard.tokens

    def scorer(self, role: str) -> TailScorer:
        """The frozen-trunk scorer of a role's questions; made when first asked for."""
        if role not in self._scorers:
            self._scorers[role] = TailScorer(self._trunk, self.prompts(role), sources=self._sources)
        return self._scorers[role]

    @cached_property
    def _sources(self) -> SourceLayers:
        return SourceLayers(self.runner, self._trunk.first)

    def score(self, candidates: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """Judge tail merges by the run's objective on the search questions.

        candidates: alphas of each, step by step. A result has value, accuracy, nll, n_questions and seconds; and
        logits (n, 4) float32 if candidates' answers are to be stored.
        """
        scorer, answers = self.scorer(SEARCH), self.prompts(SEARCH).answers
        subjects = [question.subject for question in self.questions[SEARCH].questions]
        biases = self.config.plan.biases
        plans = [
            tail_plan(self.checkpoint.n_layers, alphas, name="candidate", kind="found", biases=biases)
            for alphas in candidates
        ]
        results, began = [], time.perf_counter()
        for logits in scorer.score_many(plans):
            values = score_answers(self.config.search.objective, logits.numpy(), answers, subjects)
            result = {**values._asdict(), "n_questions": len(subjects), "seconds": time.perf_counter() - began}
            results.append(result | ({"logits": logits.numpy()} if self.config.output.store_candidate_answers else {}))
            began = time.perf_counter()
        return results

    def run(self, task: tuple[str, Any]) -> Any:
        """Do a task (method name, its argument), so that a pool can mix kinds of work in one pass."""
        method, item = task
        return getattr(self, method)(item)

    def answers(self, item: tuple[MergePlan, str, int | None, bool]) -> Answers:
        """Answers of a merged model to a role's questions: (plan, role, shard or None for all, prompt_nll).

        Without a shard number, and where the plan collapses all after the trunk into one layer, the scorer answers.
        """
        plan, role, number, prompt_nll = item
        prompts = self.prompts(role)
        if number is not None:
            shard = prompts.shards[number]
            return answer_shard(self.runner, plan, prompts, shard, trunk=self._trunk, prompt_nll=prompt_nll)
        logits, logsumexp, top = (values.numpy() for values in self.scorer(role).score(plan))
        n = len(logits)
        is_letter = np.isin(top, prompts.letters)
        return Answers(np.arange(n), logits, logsumexp, is_letter, np.full(n, np.nan), np.zeros(n, dtype=np.int64))

    def text_nll(self, item: tuple[MergePlan, int]) -> tuple[float, int]:
        """Summed NLL (nats) and scored tokens of one shard of the plain text under a merged model."""
        plan, number = item
        return text_nll(self.runner, plan, self.text_shards[number], trunk=self._trunk)
