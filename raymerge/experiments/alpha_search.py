"""`search`: the merge coefficients of a plan, by Bayesian optimisation, gradient descent or at random, and controls.

Everything that can be refused is refused before anything is written. What is finished is in the tables, and the same
call again goes on from there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from raymerge import rows
from raymerge.alpha_files import read_alpha_file
from raymerge.checkpoint import Checkpoint
from raymerge.config import Config, ConfigError
from raymerge.config_file import check_config
from raymerge.errors import UserError
from raymerge.evaluation import Answers
from raymerge.experiments.common import (
    Inputs,
    align,
    align_rows,
    check_without_questions,
    compute_trunk,
    counted,
    describe_workers,
    finish,
    open_pool,
    open_run,
    read_inputs,
    runtime,
    settings_of,
    swept_cache,
)
from raymerge.experiments.controls import best_kept, controls_of, keeping_one
from raymerge.experiments.found_models import FoundModels
from raymerge.experiments.planning import choose_blocks, recomputed_plan
from raymerge.experiments.refitting import fit, refit_of
from raymerge.experiments.reporting import Reporter
from raymerge.fusion import check_mergeable
from raymerge.inputs import CALIBRATION, REPORT, SEARCH, SEARCH_TEXT, check_askable
from raymerge.objectives import is_minimised, parse_objective, rank, trial_outcome
from raymerge.plan import (
    MergePlan,
    PlanError,
    alphas_that_keep,
    drop_plan,
    tail_coefficients,
)
from raymerge.plan_section import (
    Similarity,
    allowed_starts,
    check_selected,
    similarity_of,
    similarity_warnings,
    starting_plan,
)
from raymerge.pool import WorkerPool
from raymerge.progress import Progress, Silent, step
from raymerge.proposers import BayesProposer, Proposer, RandomProposer, Starts
from raymerge.refit import check_refittable
from raymerge.search import BatchSearcher, check_loggers, choose_batch, run_search
from raymerge.tables import RunDirectory

_LOOSE = 200  # batches whose parts of `trials` become one file: reading each takes 1 ms, in an object store 50
_INSIDE = 0.05  # an alpha's distance from its corner where a descent starts near one


class NothingFoundError(UserError):
    """A search all of whose candidates failed; the message has the error that most of them have."""


def search(config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> RunDirectory:
    """Search the coefficients of a merge, and report the best beside every control.

    command: what the manifest says that made the run; by default sys.argv. progress: is told how far the search is;
    without one nothing is shown, and raymerge.console.progress() is a context that gives the command line's.

    Leaves in config.output.run: tables trials, plans, coefficients, answers, accuracy, comparisons, perplexity,
    text_losses, context, costs, receipts, and `blocks` for plan.selection block, `refits` for plan.refit; every
    reported plan, plans/NAME.json, and its alpha file, alphas/NAME.json; the models of what was found; figures; and the
    manifest. Searches on data.search_split, reports on data.report_split; without data.mmlu no questions are asked: it
    searches by the loss on search.text, and reports on data.perplexity_text and tasks. The same call again resumes; a
    complete run is returned as it is.

    Raises ConfigError, PlanError, RefitError, CheckpointError, DataError before anything is written, RunError where the
    run directory cannot be used, NothingFoundError where every candidate failed.
    """
    check_config(config)
    progress = progress or Silent()
    check_loggers(config.output.loggers)
    calibrates = config.needs_calibration()
    check_without_questions(config, {"plan.alignment": [config.plan.alignment]}, calibrates=calibrates)
    check_askable(config)
    asked = [SEARCH_TEXT] if config.data.mmlu is None else [SEARCH, REPORT]
    sections = ["tasks", "plan", "search", *(["gradient"] if "gradient" in config.search.searchers else [])]
    settings = settings_of(config, "model", "data", *sections, *(["calibration"] if calibrates else []))
    RunDirectory.check(config.output.run, settings, "search")
    with step(progress, "reading model and questions"):
        inputs = read_inputs(config, (*asked, *([CALIBRATION] if calibrates else [])))
    n_layers = inputs.checkpoint.n_layers
    similarity = similarity_of(config.plan, inputs.checkpoint)
    # With plan.recompute and plan.block the merges may come from the model; these show what can be refused.
    block_size = config.plan.merges if config.plan.selection == "block" else None
    first = None if block_size is None else allowed_starts(config.plan, n_layers, block_size, inputs.checkpoint)[0]
    start = starting_plan(config.plan, n_layers, similarity, first)
    probes = [read_alpha_file(path, n_layers) for path in config.search.probes]
    _check(config, inputs, start, probes if block_size is None else [])
    run = open_run(config, "search", settings, inputs, progress, plans=[start, *probes], similarity=similarity)
    if run.complete:
        return run
    for warning in (warnings := similarity_warnings(config.plan, inputs.checkpoint.identity)):
        progress.message(f"Warning: {warning}.")
    with runtime(config, progress), swept_cache(config, run) as cache:
        if config.plan.recompute:
            start = recomputed_plan(config, n_layers, cache, progress)
            _check(config, inputs, start, probes)
        if block_size is not None:
            roles = (*asked, CALIBRATION)
            found = choose_blocks(
                config, inputs.checkpoint, [block_size], run, cache, similarity, progress, roles=roles
            )
            start = starting_plan(config.plan, n_layers, similarity, found[block_size])
            _check(config, inputs, start, probes)
        return _Search(config, inputs, run, cache, start, similarity, progress, command, warnings).execute(probes)


def _check(config: Config, inputs: Inputs, start: MergePlan, probes: Sequence[MergePlan]) -> None:
    """Refuse plans that cannot be merged, or refitted as what is found will be, and probes of other merges."""
    shape = [(step.into, step.remove) for step in start.steps]
    check_selected(config.plan, start)
    blocks = _searched_starts(config, start, inputs.checkpoint)
    for first in blocks:
        check_mergeable(inputs.checkpoint, start.moved_to(first))
    for plan in (start, *probes):
        check_mergeable(inputs.checkpoint, plan)
        if (own := [(step.into, step.remove) for step in plan.steps]) != shape:
            raise PlanError(
                f"probe {plan.name} merges other layers than {start.name}, {_first_difference(own, shape)}: a probe "
                "needs the steps of the search, in their order; plan.selection and plan.merges choose these"
            )
    candidate = start.with_alphas([0.5] * len(shape), name="candidate", kind="found")
    for plan in map(candidate.moved_to, blocks) if blocks else [candidate]:
        try:
            check_mergeable(inputs.checkpoint, plan)
        except PlanError as error:
            said = "but a search moves every alpha, also one that is 1: leave such layers out of its steps"
            raise PlanError(f"{error}; {said}") from error
    check_refittable(inputs.checkpoint, replace(candidate, refit=refit_of(config, inputs, config.plan.refit)))
    if "gradient" in config.search.searchers and start.selection != "tail":
        raise ConfigError(
            f"search.searcher gradient needs a tail merge, but plan.selection is {start.selection}: use searcher bayes"
        )


def _first_difference(own: list[tuple[int, int]], other: list[tuple[int, int]]) -> str:
    """Where two lists of (into, remove) begin to differ."""
    pairs = zip_longest(own, other)
    step, both = next((step, pair) for step, pair in enumerate(pairs) if pair[0] != pair[1])
    its, others = ("nothing" if pair is None else f"layer {pair[1]} into {pair[0]}" for pair in both)
    return f"in step {step} {its} instead of {others}"


def _searched_starts(config: Config, start: MergePlan, checkpoint: Checkpoint) -> list[int]:
    """The first layers of the blocks that are searched beside the coefficients; none where the block is fixed."""
    section = config.plan
    if (section.selection, section.block) != ("block", "search"):
        return []
    return allowed_starts(section, start.n_layers, len(start.steps), checkpoint)


@dataclass(eq=False)
class _Search:
    """One run of the alpha search: its inputs, where results go, and the pool while it is open."""

    config: Config
    inputs: Inputs
    run: RunDirectory
    cache: str
    start: MergePlan
    similarity: Similarity | None
    progress: Progress
    command: Sequence[str] | None
    warnings: Sequence[str] = ()
    pool: WorkerPool = field(init=False)

    def __post_init__(self) -> None:
        checkpoint, start = self.inputs.checkpoint, self.start
        self.identity = checkpoint.identity
        self.reporter = Reporter(self.config, self.inputs, self.run)
        # Whatever its coefficients turn out to be, a candidate changes nothing before its first merged layer.
        self.template = self._candidate([0.5] * len(start.steps))
        self.blocks = _searched_starts(self.config, start, checkpoint)
        self.templates = [self.template.moved_to(first) for first in self.blocks] or [self.template]
        if start.selection == "block":
            # Its states are kept too: dropping the last layers, and the unmerged model, start from them.
            self.templates.append(drop_plan(start.n_layers, len(start.steps)))
        self.firsts = tuple(sorted({template.resumes_at for template in self.templates}))
        # The first, or the last, of the merged layers alone.
        self.corners = [[1.0] * len(start.steps), [0.0] * len(start.steps)]
        self.facts: dict[str, Any] = {}
        self.loose = 0  # batches of trials since they were last gathered in one file
        self.models = FoundModels(
            self.config, checkpoint, self.run, self.cache, command=self.command, progress=self.progress
        )

    def _candidate(self, alphas: Sequence[float], name: str = "candidate", kind: str = "found") -> MergePlan:
        matrices = self.inputs.checkpoint.architecture.matrices
        return self.start.with_flat_alphas(alphas, matrices, name=name, kind=kind)

    def execute(self, probes: list[MergePlan]) -> RunDirectory:
        began = time.monotonic()
        with open_pool(
            self.config,
            self.inputs,
            self.cache,
            run=self.run,
            template=self.template,
            plans=self.templates,
            firsts=self.firsts,
            progress=self.progress,
        ) as pool:
            self.pool = pool
            self.facts["workers"] = describe_workers(pool, self.inputs, self.progress, self.run)
            shards = compute_trunk(pool, self.inputs, self.progress)
            align(pool, [self.template], self.progress)  # after the trunk, whose states matching by activations needs
            self.facts["trunk_seconds"] = round(time.monotonic() - began, 3)
            checkpoint, start = self.inputs.checkpoint, self.start
            controls = controls_of(self.config.plan, checkpoint, start, self.similarity, self.progress)
            keeping = keeping_one(start, controls)
            left = [plan for plan in keeping.values() if plan not in controls]
            seconds_per_candidate = self._try_controls([*controls, *left])
            controls += self._take_kept(keeping, controls)
            self._search_all(probes, seconds_per_candidate)
            *others, best = self._reported(controls)
            refitted = self._refitted(best)
            align_rows(pool, [*others, best, *refitted], self.progress)
            fit(pool, refitted, self.inputs, self.run, self.progress)
            fitted = pool.map("refit_tensors", refitted[-1:])
            # The best found is the last: what was searched are coefficients without a refit.
            plans = [*others, *refitted, best]
            self.reporter.report(pool, plans, shards, self.firsts, self.progress)
            self.models.take_matches(pool, [best])
        self.reporter.write_plans(plans, alpha_files=True)
        self._derive(best, plans)
        model, proof = None, None
        if self.config.output.save_best:
            model, proof = self.models.save(best)
            if refitted:  # of which the last is the best found
                plan, (tensors,) = refitted[-1], fitted
                saved, proved = self.models.save(plan, tensors)
                found = {"name": plan.name, "plan_id": plan.plan_id(self.identity), "model": saved, "proof": proved}
                self.facts["refitted"] = found
        self._conclude(best, model, proof)
        return self.run

    def _derive(self, best: MergePlan, plans: Sequence[MergePlan]) -> None:
        """Tables that follow from what the plans reached; the best found, the last, is compared with every other."""
        with step(self.progress, "accuracies and comparisons"):
            judged_on = parse_objective(self.config.search.objective).judged_on
            # Where the objective names subjects, these are all that the search has questions of.
            subjects = self.inputs.questions[SEARCH].subjects if judged_on else ()
            self.reporter.derive(plans, [(best, plan) for plan in plans[:-1]], subjects=subjects)

    def _conclude(self, best: MergePlan, model: str | None, proof: dict[str, Any] | None) -> None:
        """Draw the figures and write the manifest, last of all. model, proof: of the best plan, where it is saved."""
        finish(
            self.run,
            self.config,
            self.inputs,
            ["alphas.py", *(["accuracy.py"] if self.inputs.questions else [])],
            self.progress,
            command=self.command,
            seeds={"data": self.config.data.seed, "search": self.config.search.seed},
            best={
                "name": best.name,
                "plan_id": best.plan_id(self.identity),
                "alphas": best.alphas,
                "model": model,
                "proof": proof,
            },
            warnings=self.warnings,
            **self.facts,
        )

    # -- the trunk and the controls

    def _try_controls(self, controls: list[MergePlan]) -> float:
        """Judge the controls on the search questions, as rows of `trials`, but for those that an earlier call has
        judged; return the seconds that a candidate takes."""
        merging = dict(enumerate(plan for plan in controls if plan.steps))
        trials = {
            row["iteration"]: row
            for row in self.run.read("trials").to_pylist()
            if row["searcher"] == "controls" and row["status"] == "ok" and row["iteration"] in merging
            if row["plan_id"] == merging[row["iteration"]].plan_id(self.identity)
        }
        left = [iteration for iteration in merging if iteration not in trials]

        def store(number: int, found: tuple[dict[str, Any], Answers | None]) -> None:
            iteration, (result, answers) = left[number], found
            plan = merging[iteration]
            if answers is not None and plan.kind != "keep_one":  # of these only the best is reported on
                self.reporter.store_answers(plan, SEARCH, answers)
            trials[iteration] = {
                "searcher": "controls",
                "iteration": iteration,
                "batch": 0,
                "tune_trial": "",
                "actor": "",
                "seed": self.config.search.seed,
                "plan_id": plan.plan_id(self.identity),
                "alphas": plan.alphas,
                "objective": self.config.search.objective,
                **trial_outcome(result),
                "seconds": 0.0,
            }
            self.run.append("trials", [row for _, row in sorted(trials.items())], part="controls")

        if left:
            on = "questions" if self.inputs.questions else "text"
            self.progress.stage(f"controls on the search {on}", len(left))
            self.pool.map("judge", [merging[iteration] for iteration in left], counted(self.progress, then=store))
        if len(left) < self.pool.count:
            self.pool.broadcast("score", [self.start.alphas])
        # By now the call is warm: an earlier one has set up the scorer.
        timed = self.pool.broadcast("score", [self.start.alphas])
        return max(results[0]["seconds"] for results in timed)

    def _take_kept(self, keeping: Mapping[int, MergePlan], controls: Sequence[MergePlan]) -> list[MergePlan]:
        """Let searches begin at the best layer to keep alone; a control that keeps it, where there is none yet."""
        layer = best_kept(keeping, self.run.read("trials").to_pylist(), self.identity)
        if layer is None:
            return []
        self.facts["keep_one"] = {"best": keeping[layer].name, "of": len(keeping)}
        # Also where a control keeps it: that may be neither the first nor the last, as with dropping by influence.
        best = alphas_that_keep(self.start, layer)
        self.corners = [best, *(corner for corner in self.corners if corner != best)]
        if keeping[layer] in controls:
            return []
        ((_, answers),) = self.pool.map("judge", [keeping[layer]])
        if answers is not None:
            self.reporter.store_answers(keeping[layer], SEARCH, answers)
        return [keeping[layer]]

    # -- the search

    def _search_all(self, probes: list[MergePlan], seconds_per_candidate: float) -> None:
        """The random control, then every searcher that is asked for."""
        settings = self.config.search
        if "random" not in settings.searchers:  # beside which a smaller control would say nothing more
            self._search_coefficients("random", settings.random_candidates, [], seconds_per_candidate)
        known = [plan.alphas for plan in (self.start, *probes)]
        for searcher in settings.searchers:
            if searcher == "gradient":
                self._descend_all(known)
            else:
                starts = [*known, *self.corners]
                self._search_coefficients(searcher, settings.candidates, starts, seconds_per_candidate)

    def _search_coefficients(
        self, searcher: str, candidates: int, known: list[list[float]], seconds_per_candidate: float
    ) -> None:
        """Try candidates until `candidates` rows of `trials` have this searcher's name; first the known ones that lie
        within the bounds."""
        settings = self.config.search
        low, high = settings.bounds
        known = [self._point(alphas) for alphas in known if all(low <= alpha <= high for alpha in alphas)]
        batch = settings.batch
        if batch == "auto":
            batch = choose_batch(seconds_per_candidate, candidates, self._concurrent)
        common = {"dimensions": len(self.start.steps), "bounds": settings.bounds, "seed": settings.seed}
        warp = tail_coefficients if self.start.selection in ("tail", "block") else None
        proposers: dict[str, Callable[..., Proposer]] = {
            "random": RandomProposer,
            "bayes": partial(BayesProposer, initial=settings.initial, warp=warp),
        }
        proposer = proposers[searcher](**common, known=known, choices=self.blocks)
        self.progress.stage(f"{searcher} search, {settings.objective}", candidates)
        self._run(searcher, proposer, candidates, batch, self._done(searcher))
        self.facts[f"{searcher}_search"]["seconds_per_candidate"] = round(seconds_per_candidate, 5)

    @property
    def _concurrent(self) -> int:
        """Trials at a time with the workers that are there: one where none is, since the last one is restarting."""
        asked, count = self.config.search.concurrent, max(1, self.pool.count)
        return count if asked == "auto" else min(asked, count)

    def _done(self, searcher: str) -> list[dict[str, Any]]:
        """The rows of `trials` that a searcher has, with points as it knows them for alphas."""
        rows = [row for row in self.run.read("trials").to_pylist() if row["searcher"] == searcher]
        return [row | {"alphas": self._point(row["alphas"], row["block"])} for row in rows]

    def _point(self, alphas: list[float], block: int | None = None) -> list[float]:
        """A searcher's point: alphas, after the block's first layer (None: the start's) where blocks are searched."""
        return [float(self.start.first_removed if block is None else block), *alphas] if self.blocks else alphas

    def _descend_all(self, known: list[list[float]]) -> None:
        """Descend in every parametrisation, from the same starts: known ones, near the corners, then random ones."""
        # At a corner itself the simplex has no slope: from 1e-4 inside, 20 epochs at 0.1 moved 2 % of the weight where
        # a search found that 20 % should move. The corners themselves are controls.
        count, (low, high) = self.config.gradient.starts, self.config.search.bounds
        drawn = np.random.default_rng(self.config.search.seed).uniform(size=(count, len(self.start.steps)))
        new = np.array([*np.clip(self.corners, _INSIDE, 1.0 - _INSIDE), *drawn])
        for parametrisation in self.config.gradient.parametrisations:
            # Alphas keep to the bounds, at whose edges they have no slope either.
            own = low + (high - low) * new if parametrisation == "alphas" else new
            self._descend(parametrisation, [*known, *own.tolist()][:count])

    def _descend(self, parametrisation: str, starts: list[list[float]]) -> None:
        """Descend from every start, one a trial; a trial's iteration is its start's number."""
        searcher = f"gradient_{parametrisation}"
        done = self._done(searcher)
        finished = {row["iteration"] for row in done}
        left = Starts([start for number, start in enumerate(starts) if number not in finished])
        self.progress.stage(f"{searcher} descents, {self.config.search.objective}", len(starts))
        self._run(searcher, left, len(starts), 1, done, method="descend", arguments=(parametrisation,))

    def _run(
        self,
        searcher: str,
        proposer: Proposer,
        candidates: int,
        batch: int,
        done: list[dict[str, Any]],
        **options: Any,
    ) -> None:
        """Try what a proposer gives until `candidates` rows of `trials`, `done` among them, have this name."""
        settings, concurrent = self.config.search, self._concurrent
        common = {"searcher": searcher, "seed": settings.seed, "objective": settings.objective}
        batches = BatchSearcher(
            proposer,
            candidates=candidates,
            batch=batch,
            pool=self.pool,
            concurrent=None if settings.concurrent == "auto" else settings.concurrent,  # more workers may join
            describe=lambda point: {**common, "plan_id": self._candidate(point).plan_id(self.identity)},
            minimise=is_minimised(settings.objective),
            record=self._record,
            replayed=done,
            on_progress=lambda n, best: self.progress.advance(n, "" if best is None else f"best {best:.4f}"),
        )
        storage, loggers = str(Path(self.cache).absolute() / "tune"), self.config.output.loggers
        outcome = run_search(batches, name=searcher, storage_path=storage, loggers=loggers, **options)
        self.facts[f"{searcher}_search"] = {
            "batch": batch,
            "concurrent": concurrent,
            "wall_seconds": round(outcome.wall_seconds, 3),
            "share_not_scoring": outcome.share_not_scoring,
            "workers": list(outcome.workers),
            "candidates_this_call": outcome.finished,
        }

    def _record(self, part: str, trials: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
        """Store one finished batch; the searcher is told only after this returns."""
        for trial, result in zip(trials, results, strict=True):
            if trial["status"] == "ok" and "logits" in result:  # which output.store_candidate_answers asks for
                answers = Answers.of_letters(result["logits"])
                self.reporter.store_answers(self._candidate(trial["alphas"]), SEARCH, answers)
            if trial["status"] == "ok" and "history" in result:
                history = rows.history_rows(trial["searcher"], trial["iteration"], result["history"])
                self.run.append("gradient_history", history, part=f"{trial['searcher']}-{trial['iteration']:06d}")
        if self.blocks:
            trials = [row | {"block": int(row["alphas"][0]), "alphas": row["alphas"][1:]} for row in trials]
        self.run.append("trials", trials, part=part)
        self.loose += 1
        if self.loose == _LOOSE:
            self.run.compact("trials")
            self.loose = 0

    def _best(self, searcher: str, name: str, kind: str) -> tuple[tuple[float, float], MergePlan] | None:
        """The first two numbers of `objectives.rank` and the plan, of a searcher's best finished candidate."""
        trials = self.run.read("trials").to_pylist()
        trials = [row for row in trials if row["searcher"] == searcher and row["status"] == "ok"]
        if not trials:
            return None
        best = max(trials, key=rank)
        return rank(best)[:2], self._candidate(self._point(best["alphas"], best["block"]), name, kind)

    # -- the report

    def _reported(self, controls: list[MergePlan]) -> list[MergePlan]:
        """Every plan that is evaluated on the report questions; the best found is the last."""
        searchers = []
        for own in self.config.search.searchers:
            kinds = self.config.gradient.parametrisations
            searchers += [f"gradient_{kind}" for kind in kinds] if own == "gradient" else [own]
        found = [best for name in searchers if (best := self._best(name, f"found_{name}", "found"))]
        if not found:
            trials = self.run.read("trials", ["searcher", "error"]).to_pylist()
            ((why, count),) = Counter(row["error"] for row in trials if row["searcher"] in searchers).most_common(1)
            raise NothingFoundError(
                f"every candidate of the search failed, {count} of them by this: {why:.500}. All errors are in table "
                "trials. When that is mended, choose another --out or delete the folder: what has failed is not tried "
                "again"
            )
        random = None if "random" in searchers else self._best("random", "random", "random")
        # By the search questions, which is all that a search may choose by.
        found.sort(key=lambda best: best[0])
        return controls + ([random[1]] if random else []) + [plan for _, plan in found]

    def _refitted(self, best: MergePlan) -> list[MergePlan]:
        """Where plan.refit asks for it: the layers of `best` dropped, the start, and `best`, each refitted; before them
        the linear replacement of the dropped layers."""
        method = self.config.plan.refit
        if method == "none":
            return []
        merges = len(self.start.steps)
        dropped = best.with_alphas([1.0] * merges, name="dropped", kind="drop")
        plans = [(dropped, "linear"), (dropped, method), (self.start, method), (best, method)]
        found = [
            replace(plan, name=f"{plan.name}_{how}", refit=refit_of(self.config, self.inputs, how))
            for plan, how in plans
        ]
        # Plans of different names are not equal: where the best found drops its layers, it still is the last.
        return list(dict.fromkeys(found))
