"""One model copy and what it can be asked to do. Plain Python: the pool makes actors of it, tests do not need to.

A worker is self-sufficient: everything follows from its constructor's arguments, and what it needs for a task it loads
when first asked, so that a restarted worker can take any task at once.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from raymerge.activations import ActivationCache, Activations, distinct_samples, state_distances
from raymerge.alignment import REORDERED, Aligner, Permutations
from raymerge.checkpoint import Checkpoint
from raymerge.config import Config
from raymerge.context import TextLosses, position_nll, retrieve
from raymerge.device import (
    choose_device,
    device_memory,
    device_name,
    is_accelerator,
    is_lost,
    lean_heap,
    release_cached,
)
from raymerge.domains import known_domains
from raymerge.evaluation import Answers, answer_shard, generation_speed, score_choices, text_nll
from raymerge.file_hashes import FileState, learn
from raymerge.forward import LayerRunner
from raymerge.fusion import Receipt, receipts
from raymerge.gradient import Epoch, descend, descent_settings, loss_weights
from raymerge.identity import code_identity, digest
from raymerge.inputs import CALIBRATION, SEARCH, read_material
from raymerge.memory import MemoryPlanError
from raymerge.objectives import is_minimised, parse_objective, score_answers, score_text
from raymerge.parametrisation import loss_by_alphas
from raymerge.plan import MergePlan, base_plan
from raymerge.prompts import Shard
from raymerge.refit import PackedSums, Refitter, Sums
from raymerge.reliability import Study, study
from raymerge.role_prompts import RolePrompts
from raymerge.rows import EDGES
from raymerge.scoring import TailScorer
from raymerge.sensitivity import recipe_of, vary
from raymerge.similarity import MEASURES, compute, embedded
from raymerge.sources import SourceLayers
from raymerge.storage import free_bytes
from raymerge.tail_loss import GradientError, TailLoss, TextWindows
from raymerge.tensorfiles import is_whole, read_tensors, write_tensors
from raymerge.trunk import TrunkCache, compute_trunks, mlp_units
from raymerge.worker_memory import SCORERS_HELD, refuse_oversized

CODE = code_identity()  # of what is imported, which an editor may change on the disk while a run goes on
_STUDIED_WITH = ("numpy", "scipy", "scikit-learn")


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _taken(began: tuple[float, float]) -> dict[str, float]:
    """Seconds since `_now`: by the clock, and of this process's CPU, which other processes' work does not add to."""
    wall, cpu = _now()
    return {"seconds": wall - began[0], "cpu_seconds": cpu - began[1]}


def _keep_descent(path: Path, _: Epoch, state: Mapping[str, torch.Tensor]) -> None:
    write_tensors(path, state, "the descent")


class SubsetSimilarity(NamedTuple):
    """What is stored of one subset of the similarity section.

    block_influence: (L,) float64. embedded: of measures that embed samples what `embedded` gives, coordinates
    (L, N, d), effective rank (L,) and off-diagonal mass (L,); else None. distinct: how many samples differ.
    """

    study: Study
    block_influence: np.ndarray
    embedded: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    distinct: int


class ModelWorker:
    """Holds a model (weights mapped from disk), tokenised prompts by role, and the trunk's states.

    roles: what it is asked about: SEARCH, REPORT, SEARCH_TEXT (SEARCH brings it along where the search needs it),
    SUBSETS, CALIBRATION, and tasks (`inputs.task_role`). template: the plan whose coefficients are searched. firsts:
    layers whose inputs are cached, so that plans which change nothing before them start there. cache: folder of trunk
    states, activations and alignments. shards: how many shards each role's prompts are cut into at least, where they
    have enough tokens. hashes: of files that another process has read (`file_hashes`).
    """

    def __init__(
        self,
        config: Config,
        *,
        roles: Sequence[str],
        cache: str | Path,
        template: MergePlan | None = None,
        firsts: Sequence[int] = (),
        shards: int = 1,
        hashes: Iterable[tuple[FileState, str]] = (),
    ):
        learn(hashes)
        # One thread is the safe default on CPUs: several workers of several threads each have been measured a
        # hundred times slower.
        torch.set_num_threads(config.workers.cpus_per_worker)
        model = config.model
        device = choose_device(config.workers.gpus_per_worker)
        dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
        self.config, self._template, self.cache = config, template, Path(cache)
        self.checkpoint = Checkpoint(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        self.material = read_material(config, roles)
        self.prompts = RolePrompts(config, self.material, self.checkpoint, shards=shards)
        matched_on = self.prompts.matching_identity
        self.aligner = Aligner(self.checkpoint, self.cache, device=device, units=self._units, data=matched_on)
        if is_accelerator(device):
            refuse_oversized(self.checkpoint, dtype or self.checkpoint.dtype, template, device_memory(device).free)
        make = partial(LayerRunner, self.checkpoint, device=device, dtype=dtype, aligner=self.aligner)
        # A refitter needs a runner: it is asked for fits when both are there.
        self.runner = make(refits=lambda plan, position: self.refitter.tensors(plan, position), quantise=model.quantise)
        # Fits are made in the weights' own precision: quantisation comes after, as after merging.
        exact = self.runner if model.quantise == "none" else make()
        calibrates = self.material.calibration is not None
        self.refitter: Refitter = Refitter(
            exact, self.cache, (lambda: self.prompts.calibration) if calibrates else None
        )
        self._trunks = {first: TrunkCache(self.runner, first, self.cache) for first in sorted(firsts)}
        self._scorers: dict[tuple[str, int], TailScorer] = {}
        self._sources: dict[int, SourceLayers] = {}

    @property
    def template(self) -> MergePlan:
        """The plan whose coefficients are searched; a worker without one is not asked for what it is needed for."""
        assert self._template is not None
        return self._template

    def describe(self) -> dict[str, Any]:
        """Where this worker runs and what it holds; the identities let a pool check that all hold the same."""
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "code": CODE,
            "device": device_name(self.runner.device),
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "model_identity": self.checkpoint.identity,
            "tokenizer_identity": self.checkpoint.tokenizer_identity,
            "data_identities": self.material.identities,
        }

    def broken_by(self, error: BaseException) -> bool:
        """Whether this process can do no more work after an error, so that another one has to take its place."""
        return is_lost(error)

    def run(self, task: tuple[str, Any]) -> Any:
        """Do a task (method name, its argument), so that a pool can mix kinds of work in one pass."""
        method, item = task
        return getattr(self, method)(item)

    # -- prompts and the trunk ----------------------------------------------------------------------------------

    def shard_tokens(self, of: str) -> list[int]:
        """Tokens of each shard, so that the largest can be handed out first."""
        return [shard.tokens for shard in self.prompts.shards(of)]

    def shard_rows(self, of: str) -> list[list[int]]:
        """The questions of a role (or a task's items) that each shard holds, ascending."""
        return self.prompts.shard_rows(of)

    def trunk_room(self, names: Sequence[str]) -> tuple[int, int, str]:
        """Bytes of the trunk's states of these prompts (roles, the text) that this machine's disk does not have
        yet, bytes that are free there, and the folder."""
        shards = [shard for of in names for shard in self.prompts.shards(of)]
        missing = [
            shard.tokens for trunk in self._trunks.values() for shard in shards if not trunk.path(shard).exists()
        ]
        needed = sum(missing) * self.checkpoint.config.hidden_size * self.runner.dtype.itemsize
        return needed, free_bytes(self.cache), str(self.cache)

    def compute_trunk(self, item: tuple[str, int]) -> int:
        """Make sure that the trunk's states of one shard (of a role or the text) are on disk; its tokens."""
        of, number = item
        shard = self.prompts.shards(of)[number]
        compute_trunks(list(self._trunks.values()), shard)
        return shard.tokens

    def align(self, item: tuple[str, tuple[int, int]]) -> None:
        """Make sure that an alignment (its name, two neighbouring layers) is on disk."""
        alignment, pair = item
        self.aligner.compute(pair, alignment)

    def match(self, item: tuple[str, tuple[int, int]]) -> Permutations:
        """An alignment (its name, two neighbouring layers), to be used by another process."""
        alignment, pair = item
        return self.aligner.compute(pair, alignment)

    def align_rows(self, plan: MergePlan) -> None:
        """Make sure that the order of rows in which a plan's layers are merged is on disk."""
        self.aligner.row_matches(plan, keep=True)

    def match_rows(self, plan: MergePlan) -> list[dict[str, np.ndarray]]:
        """The order of rows in which a plan's layers are merged, to be used by another process."""
        return self.aligner.row_matches(plan)

    def _units(self, layer: int) -> torch.Tensor:
        """MLP units (tokens, n) of an unmerged layer on the prompts that neurons are matched on."""
        shard = self.prompts.matching_shard
        return mlp_units(TrunkCache(self.runner, layer, self.cache), shard, self._trunks.values())

    def _trunk_of(self, plan: MergePlan) -> TrunkCache | None:
        """The deepest cached states that the plan leaves as they are."""
        usable = [first for first in self._trunks if first <= plan.resumes_at]
        return self._trunks[max(usable)] if usable else None

    def _scorer(self, role: str, plan: MergePlan) -> TailScorer | None:
        """The frozen-trunk scorer of a plan that collapses all after the trunk into one layer; else None."""
        trunk = self._trunk_of(plan)
        if trunk is None or not plan.ends_at_once or trunk.first != plan.resumes_at:
            return None
        key = role, trunk.first
        if key not in self._scorers:
            # Each holds the states of all its tokens; a sweep goes through its first layers one after the other.
            while len(self._scorers) >= SCORERS_HELD:
                del self._scorers[next(iter(self._scorers))]
                held = {first for _, first in self._scorers}
                self._sources = {first: sources for first, sources in self._sources.items() if first in held}
            self._scorers[key] = self._new_scorer(role, trunk)
        return self._scorers[key]

    def _new_scorer(self, role: str, trunk: TrunkCache) -> TailScorer:
        make = partial(TailScorer, trunk, self.prompts.of(role), sources=self._sources_of(trunk.first))
        try:
            return make()
        except MemoryPlanError:
            if not self._scorers:
                raise
        # A device that has no room for two scorers has them one after the other.
        self._scorers.clear()
        release_cached()
        return make()

    def _sources_of(self, first: int) -> SourceLayers:
        """The stacked weights from `first` on, as the template's candidates mix them."""
        if first not in self._sources:
            plan = self._template
            if plan is None:
                self._sources[first] = SourceLayers(self.runner, first)
            else:
                alignment = plan.alignment if plan.alignment in REORDERED else "none"
                self._sources[first] = SourceLayers(self.runner, first, norms=plan.norms, alignment=alignment)
        return self._sources[first]

    # -- judging plans ------------------------------------------------------------------------------------------

    def score(self, candidates: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """Judge coefficient vectors of the template by the run's objective on the search questions.

        candidates: alphas of each, step by step; where blocks are searched, a block's first layer before them. A result
        has value, accuracy, nll, perplexity (of the search text, or None), n_questions, seconds and cpu_seconds; and
        logits (n, 4) float32 if candidates' answers are to be stored.
        """
        template = self.template
        plans = [template.with_flat_alphas(alphas, (), name="candidate", kind="found") for alphas in candidates]
        moved = any(len(alphas) > len(template.steps) for alphas in candidates)
        asked = SEARCH in self.material.questions
        scorer = self._scorer(SEARCH, template) if asked and plans and not moved else None
        found: Iterator[np.ndarray | None]
        if not asked:
            found = (None for _ in plans)
        elif scorer is None:
            found = (self._answers(plan, SEARCH).logits for plan in plans)
        else:
            found = (logits.numpy() for logits in scorer.score_many(plans))
        results, began = [], _now()
        for plan, logits in zip(plans, found, strict=True):
            results.append(self._result(plan, logits, began))
            began = _now()
        return results

    def descend(self, starts: Sequence[Sequence[float]], parametrisation: str) -> list[dict[str, Any]]:
        """Go downhill from each start (alphas, step by step) on the search questions; see GradientConfig.

        A result has what `score` gives for the best epoch's plan, with its flat alphas; and history, an Epoch for every
        one. Each epoch's state is in the cache, from which a descent that was cut short goes on.

        After half of workers.timeout_s a descent stops, so that a long one is told from a worker that hangs: the result
        then has `unfinished`, seconds and cpu_seconds alone, and the same call again goes on.
        """
        results, deadline = [], time.monotonic() + self.config.workers.timeout_s / 2
        for start in starts:
            began = _now()
            loss = self._loss_of(self.template.with_alphas(start, name="start", kind="found"), self._drawn_text)
            settings = descent_settings(self.config, parametrisation)
            path = self.cache / f"descent-{digest([loss.identity, asdict(settings), list(start)])}.safetensors"
            found = descend(
                loss,
                settings,
                state=read_tensors(path, "the descent") if is_whole(path, "the descent") else None,
                on_epoch=partial(_keep_descent, path),
                stops=lambda: time.monotonic() > deadline,
            )
            if found is None:
                return [{"unfinished": True, **_taken(began)}]
            logits = None
            if loss.scorer is not None:
                logits = next(loss.scorer.score_many([found.plan])).numpy()
            result = self._result(found.plan, logits, began)
            results.append(result | {"alphas": found.plan.flat_alphas, "history": found.history})
        return results

    def _result(self, plan: MergePlan, logits: np.ndarray | None, began: tuple[float, float]) -> dict[str, Any]:
        keep = logits is not None and self.config.output.store_candidate_answers
        return {**self._judged(plan, logits), **_taken(began), **({"logits": logits} if keep else {})}

    def _loss_of(self, start: MergePlan, text: TextWindows | None) -> TailLoss:
        weights = loss_weights(self.config)
        asked = SEARCH in self.material.questions
        return TailLoss(
            self._scorer(SEARCH, self.template) if asked else None,
            start,
            weights,
            sources=None if asked else self._sources_of(self.template.resumes_at),
            reference=torch.from_numpy(self.reference) if weights.answer_kl else None,
            text=text,
        )

    def loss(self, alphas: Sequence[float]) -> tuple[float, np.ndarray]:
        """What `descend` minimises, at alphas of the template, with its gradient by them (K,) float64, on all of the
        text. Raises GradientError."""
        return loss_by_alphas(self._loss, alphas)

    @cached_property
    def _loss(self) -> TailLoss:
        weights, quantise = loss_weights(self.config), self.config.model.quantise
        if not self.template.ends_at_once:
            raise GradientError(f"only a tail merge has a gradient, but plan.selection is {self.template.selection}")
        if quantise != "none":
            raise GradientError(f"model.quantise {quantise} has no gradient: set it to none")
        if weights.of_text and self.material.search_text is None:
            raise GradientError("gradient.text_kl needs a plain text: set search.searcher to gradient, and search.text")
        objective = self.config.search.objective
        if is_minimised(objective) and not parse_objective(objective).of_one_set:
            raise GradientError(
                f"the terms of search.objective {objective} have different subjects, but a loss with a gradient is "
                "over one set of questions: name the same subjects in each"
            )
        return self._loss_of(self.template, self._windows_of_text())

    @cached_property
    def _drawn_text(self) -> TextWindows | None:
        """The search text as a descent's steps draw it."""
        settings = self.config.gradient
        return self._windows_of_text(windows=settings.text_windows, positions=settings.text_positions)

    def _windows_of_text(self, **drawn: int | None) -> TextWindows | None:
        """The search text as it enters the merged layer, and how much of it a step draws; None where the loss has no
        term of text."""
        if not loss_weights(self.config).of_text:
            return None
        trunk, reference = self._trunks[self.template.resumes_at], self.config.gradient.text_kl > 0
        return TextWindows(trunk, self.prompts.search_text, reference=reference, **drawn)

    def judge(self, plan: MergePlan) -> tuple[dict[str, Any], Answers | None]:
        """Judge any plan as `score` does a candidate; its result without seconds, and its answers where questions are
        asked and the logits are finite."""
        if SEARCH not in self.material.questions:
            return self._judged(plan, None), None
        answers = self._answers(plan, SEARCH)
        return self._judged(plan, answers.logits), answers if np.isfinite(answers.logits).all() else None

    def _judged(self, plan: MergePlan, logits: np.ndarray | None) -> dict[str, Any]:
        settings = self.config.search
        if logits is None:
            found = score_text(settings.objective, self.search_text_nll(plan), ceiling=settings.perplexity_ceiling)
            return {**found._asdict(), "n_questions": 0}
        questions = self.material.questions[SEARCH].questions
        score = score_answers(
            settings.objective,
            logits,
            self.prompts.of(SEARCH).answers,
            [question.subject for question in questions],
            reference=self.reference if parse_objective(settings.objective).needs_reference else None,
            text_nll=None if self.material.search_text is None else self.search_text_nll(plan),
            ceiling=settings.perplexity_ceiling,
            domains=known_domains(self.config.data.domains),
        )
        return {**score._asdict(), "n_questions": len(questions)}

    @cached_property
    def reference(self) -> np.ndarray:
        """The unmerged model's answer logits (n, 4) float32 to the search questions."""
        return self.answers((base_plan(self.checkpoint.n_layers), SEARCH, None, False)).logits

    def search_text_nll(self, plan: MergePlan) -> float:
        """Mean NLL (nats) of the search text's tokens under a merged model, from the trunk's states."""
        trunk = self._trunk_of(plan)
        parts = [text_nll(self.runner, plan, shard, trunk=trunk) for shard in self.prompts.search_text]
        return sum(nll for nll, _ in parts) / sum(tokens for _, tokens in parts)

    def answers(self, item: tuple[MergePlan, str, int | None, bool]) -> Answers:
        """Answers of a merged model to a role's questions: (plan, role, shard or None for all, prompt_nll).

        Without a shard number, and where the plan collapses all after the trunk into one layer, the scorer answers.
        Raises NotFiniteError.
        """
        found = self._answers(*item)
        found.check_finite(self.runner, item[0])
        return found

    def _answers(self, plan: MergePlan, role: str, number: int | None = None, prompt_nll: bool = False) -> Answers:
        prompts = self.prompts.of(role)
        if number is not None:
            shard = prompts.shards[number]
            return answer_shard(self.runner, plan, prompts, shard, trunk=self._trunk_of(plan), prompt_nll=prompt_nll)
        scorer = None if prompt_nll else self._scorer(role, plan)
        if scorer is None:
            return Answers.join(self._answers(plan, role, i, prompt_nll) for i in range(len(prompts.shards)))
        logits, logsumexp, top = (values.numpy() for values in scorer.score(plan))
        n = len(logits)
        is_letter = np.isin(top, prompts.letters)
        return Answers(np.arange(n), logits, logsumexp, is_letter, np.full(n, np.nan), np.zeros(n, dtype=np.int64))

    def score_choices(self, item: tuple[MergePlan, str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The items (n,) in one shard of a task, and the log-likelihoods (nats) under a merged model of all their
        choices, one item after the other: (plan, the task's role, shard)."""
        plan, role, number = item
        prompts = self.prompts.choices(role)
        shard = prompts.shards[number]
        _, found = score_choices(self.runner, plan, prompts, shard, trunk=self._trunk_of(plan))
        return prompts.items(shard), found

    def text_nll(self, item: tuple[MergePlan, int]) -> TextLosses:
        """Losses of one shard of the plain text under a merged model."""
        plan, number = item
        trunk = self._trunk_of(plan)
        return position_nll(self.runner, plan, self.prompts.text[number], trunk=trunk, edges=EDGES)

    def receipts(self, plan: MergePlan) -> list[Receipt]:
        """What a plan changes, tensor by tensor."""
        return receipts(
            self.checkpoint, self.checkpoint.architecture, plan, aligner=self.aligner, refits=self.refitter.tensors
        )

    def retrieval(self, plan: MergePlan) -> tuple[np.ndarray, np.ndarray]:
        """(distances (n,), whether the merged model found the value (n,) bool) of every key-value prompt."""
        prompts, trunk = self.prompts.retrieval, self._trunk_of(plan)
        parts = [retrieve(self.runner, plan, prompts, shard, trunk=trunk) for shard in prompts.shards]
        rows = np.concatenate([part.rows for part in parts])
        return prompts.distances[rows], np.concatenate([part.correct for part in parts])

    def generation_speed(self, layers: int) -> float:
        """Tokens per second of greedy generation, one sequence, by transformers with this many layers.

        The speed depends on how many layers there are, not on what they hold, so the first ones are taken.
        """
        return generation_speed(
            self.checkpoint,
            layers,
            tokens=self.config.sweep.speed_tokens,
            dtype=self.runner.dtype,
            device=self.runner.device,
        )

    # -- calibration --------------------------------------------------------------------------------------------

    def state_distances(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Distances between the states of every two depths, summed over one shard of the calibration."""
        return state_distances(self.runner, self.prompts.shards(CALIBRATION)[number])

    def calibration_nll(self, item: tuple[MergePlan, int]) -> tuple[float, int]:
        """Summed NLL (nats) and scored tokens of one shard of the calibration text under a merged model."""
        plan, number = item
        return text_nll(self.runner, plan, self.prompts.shards(CALIBRATION)[number], trunk=self._trunk_of(plan))

    def refit_prepare(self, item: tuple[MergePlan, int]) -> int:
        """Make sure that the states which a plan is fitted to are on disk for one calibration shard; its tokens."""
        return self.refitter.prepare(*item)

    def refit_done(self, plan: MergePlan) -> int:
        """How many of a plan's fits are on this machine's disk."""
        return self.refitter.done(plan)

    @lean_heap()
    def refit_sums(self, item: tuple[MergePlan, int, tuple[int, int]]) -> PackedSums:
        """Sums of one fit of a plan over a share of the calibration, packed; see `Refitter.sums`."""
        return self.refitter.sums(*item).pack()

    @lean_heap()
    def refit_solve(self, item: tuple[MergePlan, int, Sequence[PackedSums]]) -> dict[str, torch.Tensor]:
        """The fitted tensors from all shares' sums."""
        plan, number, parts = item
        return self.refitter.solve(plan, number, Sums.total(parts))

    def refit_store(self, plan: MergePlan, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a fit on this machine's disk."""
        if self.refitter.done(plan) <= number:
            self.refitter.store(plan, number, tensors)

    def refit_tensors(self, plan: MergePlan) -> dict[int, dict[str, torch.Tensor]]:
        """A plan's fitted tensors by relative name, by position in the merged model."""
        return {position: self.refitter.tensors(plan, position) for position in plan.refit_targets}

    def refit_records(self, plan: MergePlan) -> list[dict[str, float | int | str]]:
        """How the fits of a plan went."""
        return self.refitter.records(plan)

    # -- similarity ---------------------------------------------------------------------------------------------

    def activations_room(self) -> tuple[int, int, str]:
        """Roughly how many bytes the subsets' activations and studies take that this machine's disk does not have yet,
        how many are free there, and the folder."""
        settings, layers = self.config.similarity, self.checkpoint.n_layers
        pooled = 0 if settings.pooling == "sequence" else 4 * self.checkpoint.config.hidden_size
        one = layers * settings.samples * (8 * settings.samples + pooled)
        one += 8 * layers**2 * (settings.interval_draws + 2 * settings.half_draws)
        there = len(list(self.cache.glob("activations-*.safetensors")))  # other runs' too, where they share the cache
        return one * max(0, len(self.material.subsets) - there), free_bytes(self.cache), str(self.cache)

    def activations(self, number: int, plan: MergePlan | None = None) -> Activations:
        """Activations of subset `number` of the similarity section, collected or read from the cache."""
        return self._activation_cache.get(self._subset_shards(number), plan)

    @property
    def _activation_cache(self) -> ActivationCache:
        settings = self.config.similarity
        return ActivationCache(self.cache, self.runner, pooling=settings.pooling, max_tokens=settings.max_tokens)

    def _subset_shards(self, number: int) -> Sequence[Shard]:
        return self.prompts.encode(self.material.subsets[number].questions).shards

    def similarity(self, number: int) -> SubsetSimilarity:
        """One subset's similarity matrix with its noise, and what else its tables hold.

        The study, which takes minutes where layers are many, is in the cache when it is made: a run that was cut short
        needs all of them for its correlations. Distances stay here: of 80 layers and 500 samples they are 160 MB.
        """
        settings, shards = self.config.similarity, self._subset_shards(number)
        found, collected = self._activation_cache.get(shards), self._activation_cache.path(shards)
        recipe, draws = recipe_of(settings), ("null_draws", "interval_draws", "half_draws")
        options = {name: getattr(settings, name) for name in draws} | {"random_state": settings.seed}
        versions = [importlib.metadata.version(package) for package in _STUDIED_WITH]
        path = self.cache / f"study-{digest([collected.name, asdict(recipe), options, versions])}.safetensors"
        if is_whole(path, "the study"):
            arrays = {name: tensor.numpy() for name, tensor in read_tensors(path, "the study").items()}
            result = Study.from_arrays(arrays)
        else:
            result = study(recipe, found.distances, found.states, **options)
            tensors = {name: torch.from_numpy(array) for name, array in result.arrays().items()}
            write_tensors(path, tensors, "the study")
        kept = settings.max_tokens if settings.pooling == "sequence" else None
        distinct = distinct_samples(shards, max_tokens=kept)
        maps = embedded(recipe, found.distances) if MEASURES[recipe.measure] == "embeddings" else None
        return SubsetSimilarity(result, found.block_influence, maps, distinct)

    def similarity_after(self, item: tuple[int, MergePlan]) -> np.ndarray:
        """The (L', L') similarity of the layers that a plan keeps, collected from the merged model on a subset."""
        number, plan = item
        found = self.activations(number, plan)
        return compute(recipe_of(self.config.similarity), found.distances, found.states).values

    def sensitivity(self, number: int) -> list[dict[str, Any]]:
        """How one subset's matrix, and the plans that it chooses, depend on each setting: rows of `sensitivity`."""
        subset, found = self.material.subsets[number], self.activations(number)
        settings, first = self.config, self.checkpoint.deepstack_layers
        rows = vary(settings.similarity, settings.sensitivity, found.distances, found.states, first=first)
        return [{"subset": subset.name, "language": subset.language, **row} for row in rows]
