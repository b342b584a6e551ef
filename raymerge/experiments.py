"""The experiments as plain functions, each writing one run directory.

Everything that can be refused is refused before anything is written. What is finished is in the tables, and the same
call again goes on from there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

import raymerge
from raymerge import rows
from raymerge.checkpoint import Checkpoint
from raymerge.config import Config, ConfigError
from raymerge.evaluation import Answers
from raymerge.fusion import check_mergeable, receipts
from raymerge.inputs import REPORT, SEARCH, TEXT, read_questions, read_text
from raymerge.merging import save_merged
from raymerge.objectives import is_minimised, objective_subjects, score_answers
from raymerge.plan import (
    MergePlan,
    PlanError,
    base_alphas,
    base_plan,
    before_last_plan,
    check_merges,
    drop_plan,
    read_alpha_file,
    tail_coefficients,
    tail_plan,
)
from raymerge.pool import Placement, WorkerPool, cluster_resources, plan_workers, start_ray
from raymerge.progress import Progress, Silent
from raymerge.proposers import BayesProposer, RandomProposer
from raymerge.questions import QuestionSet
from raymerge.search import choose_batch, run_search
from raymerge.tables import RunDirectory, derive_accuracy
from raymerge.worker import ModelWorker

FIXED_CONTROL = 0.62  # the constant that published coefficients amount to; see method, similarity_ratio


@dataclass(frozen=True)
class _Inputs:
    """What an experiment reads before it writes anything."""

    checkpoint: Checkpoint
    questions: dict[str, QuestionSet]
    text: str | None


def _read_inputs(config: Config, roles: Sequence[str]) -> _Inputs:
    model = config.model
    checkpoint = Checkpoint(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return _Inputs(checkpoint, {role: read_questions(config, role) for role in roles}, read_text(config))


def _place(config: Config) -> Placement:
    workers = config.workers
    return plan_workers(workers.count, workers.gpus_per_worker, workers.cpus_per_worker, cluster_resources())


def _open_pool(config: Config, inputs: _Inputs, placement: Placement, cache: str, first: int | None) -> WorkerPool:
    return WorkerPool(
        ModelWorker,
        {"config": config, "roles": tuple(inputs.questions), "first": first, "cache": cache},
        count=placement.count,
        cpus_per_worker=placement.cpus,
        gpus_per_worker=placement.gpus,
        timeout_s=config.workers.timeout_s,
        max_restarts=config.workers.max_restarts,
    )


def _describe_workers(pool: WorkerPool, inputs: _Inputs) -> list[dict[str, Any]]:
    """What every worker holds; refuses a pool whose machines have other files under the same paths."""
    found = pool.broadcast("describe")
    ours = {
        "model_identity": inputs.checkpoint.identity,
        "data_identities": {role: questions.identity for role, questions in inputs.questions.items()},
    }
    for worker in found:
        for key, value in ours.items():
            if worker[key] != value:
                raise ValueError(
                    f"{key} of the worker on {worker['host']} is {worker[key]}, the driver's {value}: the paths in the "
                    "configuration must lead to the same files on every machine"
                )
    return found


# -- search -----------------------------------------------------------------------------------------------------


def search(config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> RunDirectory:
    """Search the coefficients of a tail merge, and report the best beside every control.

    Leaves in config.output.run: tables trials, plans, coefficients, answers, accuracy, comparisons, perplexity,
    costs, receipts; models/BEST; figures; and the manifest. Searches on data.search_split, reports on
    data.report_split. The same call again resumes; a complete run is returned as it is.

    Raises ConfigError, PlanError, CheckpointError, DataError before anything is written, RunError where the run
    directory cannot be used.
    """
    progress = progress or Silent()
    merges = config.plan.merges
    inputs = _read_inputs(config, (SEARCH, REPORT))
    checkpoint = inputs.checkpoint
    check_merges(checkpoint.n_layers, merges)
    start = _starting_plan(config, checkpoint.n_layers)
    probes = [read_alpha_file(path, checkpoint.n_layers) for path in config.search.probes]
    for plan in (start, *probes):
        check_mergeable(checkpoint, plan)
        if len(plan.steps) != merges or plan.selection != "tail":
            raise PlanError(f"plan {plan.name} has {len(plan.steps)} steps, not a tail merge of plan.merges = {merges}")
    known_subjects = inputs.questions[SEARCH].subjects
    if missing := sorted(set(objective_subjects(config.search.objective) or ()) - set(known_subjects)):
        raise ConfigError(f"search.objective names {missing}, which are not among the {len(known_subjects)} subjects")

    run = RunDirectory.open(config.output.run, config.resolved(), "search")
    if run.complete:
        progress.message("This run is complete; nothing is left to do.")
        return run
    run.begin()
    with start_ray():
        return _Search(config, inputs, run, progress, command).execute(start, probes)


def _starting_plan(config: Config, n_layers: int) -> MergePlan:
    """The base coefficients, named after where they come from."""
    plan = config.plan
    if plan.base == "file":
        found = read_alpha_file(plan.alpha_file, n_layers)
        return tail_plan(n_layers, found.alphas, name=found.name, kind="file", biases=plan.biases)
    similarity = None if plan.base == "fixed" else read_similarity(plan.similarity_run)
    alphas = base_alphas(n_layers, plan.merges, plan.base, ratio=plan.ratio, similarity=similarity)
    name = f"fixed_{plan.ratio:g}" if plan.base == "fixed" else plan.base
    return tail_plan(n_layers, alphas, name=name, kind="fixed" if plan.base == "fixed" else "file", biases=plan.biases)


def read_similarity(run: str) -> np.ndarray:
    """The (L, L) float64 matrix of a similarity run; with several subsets, measures or languages their choice would
    be arbitrary, so exactly one is required. Missing values are NaN."""
    table = RunDirectory.load(run).read("similarity")
    keys = ("subset", "language", "measure", "embedding")
    found = sorted({tuple(row[key] for key in keys) for row in table.select(keys).to_pylist()})
    if len(found) != 1:
        raise ConfigError(f"{run} holds {len(found)} similarity matrices {found[:4]}: coefficients need exactly one")
    n_layers = 1 + pc.max(table["layer_i"]).as_py()
    matrix = np.full((n_layers, n_layers), np.nan)
    values = table["value"].to_numpy()
    matrix[table["layer_i"].to_numpy(), table["layer_j"].to_numpy()] = values
    return matrix


class _Search:
    """One run of the alpha search: its inputs, where results go, and the pool while it is open."""

    def __init__(self, config: Config, inputs: _Inputs, run: RunDirectory, progress: Progress, command: Any):
        self.config, self.inputs, self.run, self.progress, self.command = config, inputs, run, progress, command
        self.n_layers = inputs.checkpoint.n_layers
        self.first = self.n_layers - 1 - config.plan.merges
        self.identity = inputs.checkpoint.identity
        self.cache = config.output.cache or (run.path_of("cache") if run.is_local else tempfile.mkdtemp())
        self.facts: dict[str, Any] = {}

    def execute(self, start: MergePlan, probes: list[MergePlan]) -> RunDirectory:
        placement = _place(self.config)
        began = time.monotonic()
        with _open_pool(self.config, self.inputs, placement, self.cache, self.first) as pool:
            self.pool = pool
            self.facts["workers"] = _describe_workers(pool, self.inputs)
            self._compute_trunk()
            trunk_seconds = time.monotonic() - began
            controls = self._controls(start)
            seconds_per_candidate = self._try_controls(controls)
            self._search_coefficients("random", self.config.search.random_candidates, [], seconds_per_candidate)
            known = [plan.alphas for plan in (start, *probes)] + [[1.0] * self.config.plan.merges]
            low, high = self.config.search.bounds
            known = [alphas for alphas in known if all(low <= alpha <= high for alpha in alphas)]
            name = self.config.search.searcher
            self._search_coefficients(name, self.config.search.candidates, known, seconds_per_candidate)
            plans = self._reported(start, controls)
            self._report(plans)
        best = plans[-1]
        model = self._save_best(best) if self.config.output.save_best else None
        self._derive(plans)
        figures = draw_figures(self.run, self.progress) if self.config.output.figures else []
        self.run.write_manifest(
            "complete",
            command=self.command,
            seeds={"data": self.config.data.seed, "search": self.config.search.seed},
            model={"path": self.config.model.path, "identity": self.identity, "revision": self.config.model.revision},
            data={role: questions.identity for role, questions in self.inputs.questions.items()},
            text_hash=None if self.inputs.text is None else rows.text_hash(self.inputs.text),
            best={"name": best.name, "plan_id": best.plan_id(self.identity), "alphas": best.alphas, "model": model},
            figures=figures,
            trunk_seconds=round(trunk_seconds, 3),
            **self.facts,
        )
        return self.run

    # -- the trunk and the controls

    def _compute_trunk(self) -> None:
        """States of every shard, computed in parallel, the largest first so that no worker ends up waiting long."""
        items, sizes = [], []
        names = [*self.inputs.questions] + ([TEXT] if self.inputs.text is not None else [])
        for of, tokens in zip(names, self.pool.map("shard_tokens", names), strict=True):
            items += [(of, number) for number in range(len(tokens))]
            sizes += tokens
        self.n_text_shards = sum(of == TEXT for of, _ in items)
        self.n_report_shards = sum(of == REPORT for of, _ in items)
        order = sorted(range(len(items)), key=lambda i: -sizes[i])
        self.progress.stage("trunk states (tokens)", sum(sizes))
        done = 0

        def finished(_: int, tokens: int) -> None:
            nonlocal done
            done += tokens
            self.progress.advance(done)

        self.pool.map("compute_trunk", [items[i] for i in order], finished)

    def _controls(self, start: MergePlan) -> list[MergePlan]:
        merges = self.config.plan.merges
        controls = [
            base_plan(self.n_layers),
            drop_plan(self.n_layers, merges),
            before_last_plan(self.n_layers, merges),
            tail_plan(
                self.n_layers,
                [FIXED_CONTROL] * merges,
                name=f"fixed_{FIXED_CONTROL}",
                kind="fixed",
                biases=self.config.plan.biases,
            ),
        ]
        return controls + ([start] if start.alphas != controls[-1].alphas else [])

    def _try_controls(self, controls: list[MergePlan]) -> float:
        """Judge the controls on the search questions, as rows of `trials`; seconds that a candidate takes."""
        questions = self.inputs.questions[SEARCH]
        answers = np.array([question.answer for question in questions.questions])
        subjects = [question.subject for question in questions.questions]
        tail = [plan for plan in controls if plan.steps]
        self.progress.stage("controls on the search questions", len(tail))
        found = self.pool.map(
            "answers",
            [(plan, SEARCH, None, False) for plan in tail],
            lambda number, _: self.progress.advance(number + 1),
        )
        objective, trials = self.config.search.objective, []
        for iteration, (plan, result) in enumerate(zip(tail, found, strict=True)):
            score = score_answers(objective, result.logits, answers, subjects)
            trials.append(
                {
                    "searcher": "controls",
                    "iteration": iteration,
                    "batch": 0,
                    "tune_trial": "",
                    "actor": "",
                    "seed": self.config.search.seed,
                    "plan_id": plan.plan_id(self.identity),
                    "alphas": plan.alphas,
                    "objective": objective,
                    **score._asdict(),
                    "n_questions": len(subjects),
                    "seconds": 0.0,
                    "status": "ok",
                }
            )
            self._write_answers(plan, SEARCH, result)
        self.run.append("trials", trials, part="controls")
        # The second call is warm: the first has set up the scorer.
        start = controls[-1].alphas
        timed = self.pool.broadcast("score", [start])
        return max(results[0]["seconds"] for results in timed)

    def _write_answers(self, plan: MergePlan, role: str, answers: Answers) -> None:
        data = self.config.data
        if role == SEARCH and data.search_split == data.report_split:
            return  # The report answers the same split; rows are told apart by split.
        plan_id = plan.plan_id(self.identity)
        table = rows.answer_table(plan_id, self.inputs.questions[role], answers)
        self.run.append("answers", table, part=f"{role}-{plan_id}")

    # -- the search

    def _plan(self, alphas: Sequence[float], name: str, kind: str) -> MergePlan:
        return tail_plan(self.n_layers, alphas, name=name, kind=kind, biases=self.config.plan.biases)

    def _search_coefficients(
        self, searcher: str, candidates: int, known: list[list[float]], seconds_per_candidate: float
    ) -> None:
        """Try candidates until `candidates` rows of `trials` have this searcher's name."""
        settings = self.config.search
        if searcher == "random" and settings.searcher == "random" and candidates != settings.candidates:
            return  # The search itself is random: a smaller random control beside it would say nothing more.
        done = [row for row in self.run.read("trials").to_pylist() if row["searcher"] == searcher]
        concurrent = self.pool.count if settings.concurrent == "auto" else min(settings.concurrent, self.pool.count)
        batch = settings.batch
        if batch == "auto":
            batch = choose_batch(seconds_per_candidate, candidates, concurrent)
        common = {"dimensions": self.config.plan.merges, "bounds": settings.bounds, "seed": settings.seed}
        if searcher == "bayes":
            proposer = BayesProposer(**common, initial=settings.initial, known=known, warp=tail_coefficients)
        else:
            proposer = RandomProposer(**common, known=known)
        self.progress.stage(f"{searcher} search, {settings.objective}", candidates)
        outcome = run_search(
            self.pool,
            proposer,
            searcher=searcher,
            objective=settings.objective,
            minimise=is_minimised(settings.objective),
            candidates=candidates,
            batch=batch,
            concurrent=concurrent,
            seed=settings.seed,
            record=self._record,
            replayed=done,
            plan_id_of=lambda alphas: self._plan(alphas, "candidate", "found").plan_id(self.identity),
            on_progress=lambda n, best: self.progress.advance(n, "" if best is None else f"best {best:.4f}"),
            storage_path=str(Path(self.cache).absolute() / "tune"),
        )
        self.facts[f"{searcher}_search"] = {
            "batch": batch,
            "concurrent": concurrent,
            "seconds_per_candidate": round(seconds_per_candidate, 5),
            "wall_seconds": round(outcome.wall_seconds, 3),
            "share_not_scoring": outcome.share_not_scoring,
            "candidates_this_call": outcome.finished,
        }

    def _record(self, part: str, trials: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
        """Store one finished batch; the searcher is told only after this returns."""
        if self.config.output.store_candidate_answers:
            for trial, result in zip(trials, results, strict=True):
                if trial["status"] == "ok":
                    logits = result["logits"]
                    n = len(logits)
                    empty = np.full(n, np.nan)
                    self._write_answers(
                        self._plan(trial["alphas"], "candidate", "found"),
                        SEARCH,
                        Answers(np.arange(n), logits, empty, empty, empty, empty),
                    )
        self.run.append("trials", trials, part=part)

    def _best(self, searcher: str, name: str, kind: str) -> MergePlan | None:
        """The best finished candidate of a searcher; ties go to the lower NLL, then to the earlier."""
        trials = self.run.read("trials").to_pylist()
        trials = [row for row in trials if row["searcher"] == searcher and row["status"] == "ok"]
        if not trials:
            return None
        sign = -1.0 if is_minimised(self.config.search.objective) else 1.0
        best = max(trials, key=lambda row: (sign * row["value"], -row["nll"], -row["iteration"]))
        return self._plan(best["alphas"], name, kind)

    # -- the report

    def _reported(self, start: MergePlan, controls: list[MergePlan]) -> list[MergePlan]:
        """Every plan that is evaluated on the report questions; the best found is the last."""
        searcher = self.config.search.searcher
        found = self._best(searcher, f"found_{searcher}", "found")
        if found is None:
            raise RuntimeError("every candidate of the search failed: the errors stand in table trials")
        random = self._best("random", "random", "random") if searcher != "random" else None
        return controls + ([random] if random else []) + [found]

    def _report(self, plans: list[MergePlan]) -> None:
        """Answers on the report questions and plain-text perplexity of every plan, all in one parallel pass."""
        data = self.config.data
        answered = self.run.read("answers", ["plan_id", "split"]).to_pylist()
        answered = {row["plan_id"] for row in answered if row["split"] == data.report_split}
        texts = self.run.read("perplexity", ["plan_id", "target"]).to_pylist()
        measured = {row["plan_id"] for row in texts if row["target"] == "text"}
        jobs: dict[tuple[str, MergePlan], list] = {}
        for plan in plans:
            plan_id = plan.plan_id(self.identity)
            if plan_id not in answered:
                # The unmerged model does not collapse into one layer, and prompt tokens need every position.
                whole = not plan.steps or data.question_perplexity
                numbers = range(self.n_report_shards) if whole else [None]
                jobs["answers", plan] = [(plan, REPORT, number, data.question_perplexity) for number in numbers]
            if self.n_text_shards and plan_id not in measured:
                jobs["text_nll", plan] = [(plan, number) for number in range(self.n_text_shards)]
        tasks = [(key, key[0], item) for key, items in jobs.items() for item in items]
        self.progress.stage(f"report on {data.report_split}", len(tasks))
        results: dict[tuple[str, MergePlan], list] = {key: [] for key in jobs}
        done = 0

        def finished(number: int, result: Any) -> None:
            nonlocal done
            done += 1
            self.progress.advance(done)
            key = tasks[number][0]
            results[key].append(result)
            if len(results[key]) == len(jobs[key]):
                self._store_report(*key, results.pop(key))

        self.pool.map("run", [(method, item) for _, method, item in tasks], finished)

    def _store_report(self, method: str, plan: MergePlan, results: list) -> None:
        """Store what one plan answered, or its perplexity of the text, as one part."""
        plan_id = plan.plan_id(self.identity)
        if method == "text_nll":
            nll, tokens = (sum(values) for values in zip(*results, strict=True))
            hashed = rows.text_hash(self.inputs.text)
            row = rows.perplexity_row(plan_id, "text", nll / tokens, tokens, text_hash=hashed)
            self.run.append("perplexity", [row], part=f"text-{plan_id}")
            return
        answers = Answers.join(results)
        if self.config.data.question_perplexity:
            found = rows.question_perplexity_rows(plan_id, self.inputs.questions[REPORT], answers)
            self.run.append("perplexity", found, part=f"question-{plan_id}")
        # Last: a plan whose answers are stored is not asked again.
        self._write_answers(plan, REPORT, answers)

    def _save_best(self, best: MergePlan) -> str:
        """The merged checkpoint in models/, with plan, alphas and receipts beside the weights."""
        where = self.run.path_of("models", best.name)
        if self.run.is_local and Path(where).exists():
            return where
        self.progress.stage("saving the merged model", 1)
        with tempfile.TemporaryDirectory(dir=Path(where).parent.parent if self.run.is_local else None) as scratch:
            folder = Path(scratch) / best.name
            save_merged(self.inputs.checkpoint, best, folder)
            uploaded = self.run.upload(folder, "models", best.name)
        self.progress.advance(1)
        return uploaded

    def _derive(self, plans: list[MergePlan]) -> None:
        """The tables that follow from others or from the plans: written whole, so that nothing is there twice."""
        checkpoint = self.inputs.checkpoint
        named = [(plan, plan.plan_id(self.identity)) for plan in plans]
        self.run.replace("plans", [row for plan, key in named for row in rows.plan_rows(plan, key)])
        self.run.replace("coefficients", [row for plan, key in named for row in rows.coefficient_rows(plan, key)])
        self.run.replace("costs", [rows.cost_row(plan, key, checkpoint) for plan, key in named])
        found = [
            row
            for plan, key in named
            for row in rows.receipt_rows(key, receipts(checkpoint, checkpoint.architecture, plan))
        ]
        self.run.replace("receipts", found)
        answers = self.run.read("answers")
        self.run.replace("accuracy", derive_accuracy(answers))
        split = self.config.data.report_split
        answers = answers.filter(pc.equal(answers["split"], split))
        best, best_id = named[-1]
        compared = {key for _, key in named if key != best_id}
        self.run.replace(
            "comparisons",
            [row for key in sorted(compared) for row in rows.comparison_rows(split, answers, best_id, key)],
        )


# -- evaluate ---------------------------------------------------------------------------------------------------


def evaluate(config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> RunDirectory:
    """Evaluate one model as it is on data.report_split and on plain text, over the pool.

    Leaves tables answers, accuracy, perplexity, plans and costs. Errors as `search`.
    """
    progress = progress or Silent()
    data = config.data
    inputs = _read_inputs(config, (REPORT,))
    checkpoint, questions = inputs.checkpoint, inputs.questions[REPORT]
    settings = {key: value for key, value in config.resolved().items() if key not in ("plan", "search")}
    run = RunDirectory.open(config.output.run, settings, "evaluate")
    if run.complete:
        progress.message("This run is complete; nothing is left to do.")
        return run
    run.begin()
    plan = base_plan(checkpoint.n_layers)
    plan_id = plan.plan_id(checkpoint.identity)
    with start_ray(), _open_pool(config, inputs, _place(config), run.path_of("cache"), None) as pool:
        workers = _describe_workers(pool, inputs)
        names = [REPORT] + ([TEXT] if inputs.text is not None else [])
        sizes = dict(zip(names, pool.map("shard_tokens", names), strict=True))
        progress.stage("evaluation (tokens)", sum(map(sum, sizes.values())))
        done = 0

        def counted(tokens: list[int]) -> Callable[[int, Any], None]:
            def finished(number: int, _: Any) -> None:
                nonlocal done
                done += tokens[number]
                progress.advance(done)

            return finished

        tokens = sizes[REPORT]
        items = [(plan, REPORT, number, data.question_perplexity) for number in range(len(tokens))]
        answers = Answers.join(pool.map("answers", items, counted(tokens)))
        perplexities = []
        if data.question_perplexity:
            perplexities += rows.question_perplexity_rows(plan_id, questions, answers)
        if inputs.text is not None:
            items = [(plan, number) for number in range(len(sizes[TEXT]))]
            found = pool.map("text_nll", items, counted(sizes[TEXT]))
            nll, scored = (sum(values) for values in zip(*found, strict=True))
            hashed = rows.text_hash(inputs.text)
            perplexities.append(rows.perplexity_row(plan_id, "text", nll / scored, scored, text_hash=hashed))
    table = rows.answer_table(plan_id, questions, answers)
    run.replace("answers", table)
    run.replace("accuracy", derive_accuracy(run.read("answers")))
    run.replace("perplexity", perplexities)
    run.replace("plans", rows.plan_rows(plan, plan_id))
    run.replace("costs", [rows.cost_row(plan, plan_id, checkpoint)])
    run.write_manifest(
        "complete",
        command=command,
        model={"path": config.model.path, "identity": checkpoint.identity, "revision": config.model.revision},
        data={REPORT: questions.identity},
        text_hash=None if inputs.text is None else rows.text_hash(inputs.text),
        workers=workers,
    )
    return run


def draw_figures(run: RunDirectory, progress: Progress) -> list[str]:
    """Run the analysis scripts on a finished search; they stand beside the package in a checkout, not inside it."""
    folder = Path(raymerge.__file__).resolve().parent.parent / "analysis"
    if not folder.is_dir() or not run.is_local:
        progress.message("No figures: the analysis scripts are not beside this installation, or RUN is not local.")
        return []
    out = Path(run.path_of("figures"))
    for script in ("alphas.py", "accuracy.py"):
        done = subprocess.run(
            [sys.executable, str(folder / script), run.path_of("tables").removesuffix("tables"), "--out", str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"analysis/{script} failed with exit code {done.returncode}: {done.stderr[-2000:]}")
    return sorted(str(path.relative_to(out.parent)) for path in out.iterdir())
