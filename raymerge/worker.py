"""One model copy and what it can be asked to do. Plain Python: the pool makes actors of it, tests do not need to.

A worker is self-sufficient: everything follows from its constructor's arguments, and what it needs for a task it loads
when first asked, so that a restarted worker can take any task at once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raymerge.checkpoint import Checkpoint
from raymerge.config import ModelConfig
from raymerge.evaluation import Answers, answer_shard, text_nll
from raymerge.forward import LayerRunner
from raymerge.objectives import score_answers
from raymerge.plan import MergePlan, tail_plan
from raymerge.prompts import Prompts, Shard, encode_questions, encode_text
from raymerge.questions import QuestionSet
from raymerge.scoring import SourceLayers, TailScorer, TrunkCache

TEXT = "text"  # the name by which the plain text is asked for, where a split's name could stand


class ModelWorker:
    """Holds a model (weights mapped from disk), tokenised questions by split, and the trunk's states.

    first: the layer whose inputs are cached (the first that any plan of this run changes); None runs whole models.
    cache: folder of the trunk's states. threads: torch threads; one is the safe default on CPUs, where several
    workers with several threads each have been measured a hundred times slower than with one.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        questions: Mapping[str, QuestionSet],
        text: str | None = None,
        text_tokens: int | None = None,
        first: int | None = None,
        cache: str | Path | None = None,
        threads: int = 1,
        search_split: str = "validation",
        objective: str = "micro_accuracy",
        biases: str = "keep",
        return_logits: bool = False,
    ):
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
        self.checkpoint = Checkpoint(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        self.runner = LayerRunner(self.checkpoint, device=device, dtype=dtype)
        self._model = model
        self._questions = dict(questions)
        self._text = text
        self._text_tokens = text_tokens
        self._trunk = None if first is None or cache is None else TrunkCache(self.runner, first, Path(cache))
        self._prompts: dict[str, Prompts] = {}
        self._scorers: dict[str, TailScorer] = {}
        self._search_split = search_split
        self._objective = objective
        self._biases = biases
        self._return_logits = return_logits

    def describe(self) -> dict[str, Any]:
        """Where this worker runs and what it holds; the identity lets a pool check that all hold the same model."""
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": torch.cuda.get_device_name() if self.runner.device.type == "cuda" else "cpu",
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "model_identity": self.checkpoint.identity,
        }

    def prompts(self, split: str) -> Prompts:
        """The tokenised questions of a split."""
        if split not in self._prompts:
            self._prompts[split] = encode_questions(
                self._questions[split], self.checkpoint.tokenizer, add_bos=self._model.add_bos
            )
        return self._prompts[split]

    @cached_property
    def text_shards(self) -> tuple[Shard, ...]:
        """The plain text as windows of tokens; none without a text."""
        if self._text is None:
            return ()
        return encode_text(self._text, self.checkpoint.tokenizer, limit=self._text_tokens)

    def shards(self, of: str) -> tuple[Shard, ...]:
        """The shards of a split's questions, or of the plain text."""
        return self.text_shards if of == TEXT else self.prompts(of).shards

    def shard_tokens(self, of: str) -> list[int]:
        """Tokens of each shard, so that the largest can be handed out first."""
        return [shard.tokens for shard in self.shards(of)]

    def compute_trunk(self, item: tuple[str, int]) -> int:
        """Make sure that the trunk's states of one shard (of a split or the text) are on disk; its tokens."""
        of, number = item
        shard = self.shards(of)[number]
        self._trunk.compute(shard)
        return shard.tokens

    def scorer(self, split: str) -> TailScorer:
        """The frozen-trunk scorer of a split; made when first asked for."""
        if split not in self._scorers:
            self._scorers[split] = TailScorer(self._trunk, self.prompts(split), sources=self._sources)
        return self._scorers[split]

    @cached_property
    def _sources(self) -> SourceLayers:
        return SourceLayers(self.runner, self._trunk.first)

    def score(self, candidates: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """Judge tail merges by the run's objective, on the split that is searched on.

        candidates: alphas of each, step by step. A result has value, accuracy, nll, n_questions and seconds; and
        logits (n, 4) float32 if the worker was told to return them.
        """
        split = self._search_split
        subjects = [question.subject for question in self._questions[split].questions]
        plans = [
            tail_plan(self.checkpoint.n_layers, alphas, name="candidate", kind="found", biases=self._biases)
            for alphas in candidates
        ]
        results, began = [], time.perf_counter()
        for logits in self.scorer(split).score_many(plans):
            values = score_answers(self._objective, logits.numpy(), self.prompts(split).answers, subjects)
            result = {**values._asdict(), "n_questions": len(subjects), "seconds": time.perf_counter() - began}
            results.append(result | ({"logits": logits.numpy()} if self._return_logits else {}))
            began = time.perf_counter()
        return results

    def answers(self, item: tuple[MergePlan, str, int | None, bool]) -> Answers:
        """Answers of a merged model to a split's questions: (plan, split, shard or None for all, prompt_nll).

        Without a shard number, and where the plan collapses all after the trunk into one layer, the scorer answers.
        """
        plan, split, number, prompt_nll = item
        prompts = self.prompts(split)
        if number is not None:
            shard = prompts.shards[number]
            return answer_shard(self.runner, plan, prompts, shard, trunk=self._trunk, prompt_nll=prompt_nll)
        logits, logsumexp, top = (values.numpy() for values in self.scorer(split).score(plan))
        n = len(logits)
        is_letter = np.isin(top, prompts.letters)
        return Answers(np.arange(n), logits, logsumexp, is_letter, np.full(n, np.nan), np.zeros(n, dtype=np.int64))

    def text_nll(self, item: tuple[MergePlan, int]) -> tuple[float, int]:
        """Summed NLL (nats) and scored tokens of one shard of the plain text under a merged model."""
        plan, number = item
        return text_nll(self.runner, plan, self.text_shards[number], trunk=self._trunk)
