"""`sweep`: accuracy and perplexity against the number of merged layers, under every way of merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raymerge.checkpoint import Checkpoint
from raymerge.config import SIMILARITY_METHODS, Config, ConfigError, PlanConfig
from raymerge.config_file import check_config
from raymerge.context import usable_distances
from raymerge.evaluation import check_generates
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
from raymerge.experiments.planning import choose_blocks, choose_one_by_one, recomputed_plan
from raymerge.experiments.refitting import fit, refit_of
from raymerge.experiments.reporting import Reporter
from raymerge.fusion import check_mergeable
from raymerge.heuristics import most_similar_pairs, pair_alphas
from raymerge.inputs import CALIBRATION, REPORT, RETRIEVAL
from raymerge.plan import (
    MergePlan,
    PlanError,
    base_plan,
    before_last_plan,
    block_pairs,
    check_merges,
    drop_block_plan,
    drop_layers_plan,
    drop_plan,
    pairs_plan,
    tail_pairs,
)
from raymerge.plan_files import made_for_another, read_plan
from raymerge.plan_section import (
    Similarity,
    allowed_starts,
    influence_plan,
    options_of,
    similarity_of,
    similarity_warnings,
)
from raymerge.pool import WorkerPool
from raymerge.progress import Progress, Silent, step
from raymerge.refit import check_refittable
from raymerge.schemas import PLAIN
from raymerge.statistics import accuracy_summary
from raymerge.tables import RunDirectory

_FILE = "file_"  # what the methods of alpha files begin with, and no others


@dataclass(frozen=True)
class Point:
    """One point of the compression curve: `merges` layers gone by `method`."""

    merges: int
    method: str
    plan: MergePlan


@dataclass(frozen=True)
class Chosen:
    """Which layers go, where workers measure it. blocks: the first layer of the block, by number of layers. greedy: the
    layers of drop_greedy in order. most_similar: that method's merges in order, where they are not those of the
    similarity run (plan.recompute)."""

    blocks: Mapping[int, int]
    greedy: Sequence[int] = ()
    most_similar: MergePlan | None = None


def sweep(config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> RunDirectory:
    """Evaluate every method at every K of the sweep section on data.report_split and on plain text.

    One pass of the trunk serves every K: the states entering each first merged layer are kept. Leaves tables sweep,
    plans, coefficients, answers, accuracy, comparisons (each point against dropping as many layers, and each aligned or
    folded one against the plain one; each refitted one against the unrefitted one and the linear replacement of the
    dropped block), perplexity, text_losses, context, refits, costs, receipts; figures; the manifest. The same call
    again resumes.
    Where blocks are asked for, table blocks says how they were chosen; removals, what drop_greedy measured. Without
    data.mmlu no questions are asked, and plain text and tasks are what the points are judged by. Errors as `search`.
    """
    check_config(config)
    progress = progress or Silent()
    calibrates = config.needs_calibration(sweep=True)
    check_without_questions(config, {"sweep.alignments": config.sweep.alignments}, calibrates=calibrates)
    roles = [] if config.data.mmlu is None else [REPORT]
    sections = ["tasks", "plan", "sweep", *(["calibration"] if calibrates else [])]
    if calibrates and config.needs_search_text:  # the calibration's tokens may lie behind those of search.text
        sections += ["search", "gradient"]
    settings = settings_of(config, "model", "data", *sections)
    RunDirectory.check(config.output.run, settings, "sweep")
    with step(progress, "reading model and questions"):
        inputs = read_inputs(config, (*roles, *([CALIBRATION] if calibrates else [])))
    if config.sweep.context:
        usable_distances(inputs.checkpoint, config.sweep.distances)
    if config.sweep.speed_tokens:
        check_generates(inputs.checkpoint)
    similarity = similarity_of(config.plan, inputs.checkpoint)
    # The blocks may be chosen by the model; the first ones allowed show what can be refused.
    n_layers, most = inputs.checkpoint.n_layers, max(config.sweep.merges)
    blocks = {merges: starts[0] for merges, starts in _starts(config, inputs).items()}
    shown = chosen = Chosen(blocks, greedy=range(n_layers - 1, n_layers - 1 - most, -1))
    points = _points(config, inputs, similarity, shown)
    plans = [point.plan for point in points]
    run = open_run(config, "sweep", settings, inputs, progress, plans=plans, similarity=similarity)
    if run.complete:
        return run
    for warning in (warnings := _warnings(config, inputs.checkpoint)):
        progress.message(f"Warning: {warning}.")
    with runtime(config, progress), swept_cache(config, run) as cache:
        if blocks:
            averaged = _averages(config)
            found = choose_blocks(
                config, inputs.checkpoint, list(blocks), run, cache, similarity, progress, averaged=averaged
            )
            chosen = replace(chosen, blocks=found)
        # Each layer follows from those before it: those of a smaller K are the first ones of the largest.
        if "drop_greedy" in config.sweep.methods:
            chosen = replace(chosen, greedy=choose_one_by_one(config, n_layers, most, run, cache, progress))
        if config.plan.recompute and "most_similar" in config.sweep.methods:
            plan = config.plan.model_copy(update={"merges": most})
            merged = recomputed_plan(config.model_copy(update={"plan": plan}), n_layers, cache, progress)
            chosen = replace(chosen, most_similar=merged)
        if chosen is not shown:
            points = _points(config, inputs, similarity, chosen)
        return _Sweep(config, inputs, run, cache, points, progress, command, warnings).execute()


def _warnings(config: Config, checkpoint: Checkpoint) -> list[str]:
    """What speaks against the similarity run and the plan files that points come from."""
    found = similarity_warnings(config.plan, checkpoint.identity)
    for path in config.sweep.alpha_files.values():
        _, about = read_plan(path, checkpoint.n_layers)
        if about is not None and (other := made_for_another(about, checkpoint.identity)) is not None:
            found.append(f"{path} {other}")
    return found


def _starts(config: Config, inputs: Inputs) -> dict[int, list[int]]:
    """By number of layers, the first layers of the blocks to choose from; nothing where no method asks for blocks."""
    if not config.sweep.takes_blocks:
        return {}
    if config.plan.block == "search":
        raise ConfigError("plan.block is search, but a sweep searches nothing: choose blocks by cosine or loss")
    checkpoint = inputs.checkpoint
    return {
        n: allowed_starts(config.plan, checkpoint.n_layers, n, checkpoint, averaged=_averages(config))
        for n in dict.fromkeys(config.sweep.merges)
    }


def _averages(config: Config) -> bool:
    """Whether blocks are averaged, not only dropped."""
    drops = (config.plan.base, config.plan.ratio) == ("fixed", 1.0)
    return "merge_block" in config.sweep.methods and not drops


def _points(config: Config, inputs: Inputs, similarity: Similarity | None, chosen: Chosen) -> list[Point]:
    """Every point, the unmerged model first; the same weights under two names are two points of one plan.

    Raises ConfigError for a method without its source, PlanError for a K that the model does not have.
    """
    settings, n_layers = config.sweep, inputs.checkpoint.n_layers
    for merges in settings.merges:
        check_merges(n_layers, merges)
    _check_sources(config, similarity)
    points = [Point(0, "base", base_plan(n_layers))]
    files = settings.alpha_files.items() if "file" in settings.methods else ()
    of_files = [point for name, path in files for point in _points_of_file(config, f"{_FILE}{name}", path, n_layers)]
    for method in settings.methods:
        if method == "file":
            points += of_files
            continue
        # Files are compared with dropping as many layers, whatever numbers they merge.
        further = {point.merges for point in of_files} - set(settings.merges) if method == "drop" else ()
        for merges in (*settings.merges, *sorted(further)):
            points += _points_of(config, n_layers, method, merges, similarity, chosen)
    # Each once, however often, and however spelt (fixed:0.5, fixed:0.50), it was asked for.
    points = list(dict.fromkeys(variant for point in points for variant in _refitted(config, inputs, point)))
    for point in points:
        try:
            check_mergeable(inputs.checkpoint, point.plan)
        except PlanError as error:  # the curve that is asked for, or none: a gap would be taken for a choice
            method, merges = point.method, point.merges
            cure = f"{method} out of sweep.methods, or {merges} out of sweep.merges"
            if method.startswith(_FILE):
                cure = f"{method.removeprefix(_FILE)} out of sweep.alpha_files"
            elif option := _refused_option(inputs.checkpoint, point.plan):
                cure = option
            raise PlanError(f"{method} with {merges} merged: {error}. Take {cure}") from error
        check_refittable(inputs.checkpoint, point.plan)
    return points


def _refused_option(checkpoint: Checkpoint, plan: MergePlan) -> str | None:
    """The value of the sweep section without which a plan that cannot be merged can be; None where there is none."""
    without = {
        f"{plan.norms} out of sweep.norms": replace(plan, norms="keep"),
        f"{plan.alignment} out of sweep.alignments": replace(plan, alignment="none"),
    }
    for option, other in without.items():
        with suppress(PlanError):
            check_mergeable(checkpoint, other)
            return option
    return None


def _points_of_file(config: Config, method: str, path: str, n_layers: int) -> list[Point]:
    """The points of an alpha file, or the single one of a plan file, which has its own options. Raises PlanError."""
    plan, about = read_plan(path, n_layers)
    merges = len(plan.steps)
    if about is None:
        return _variants(config, merges, method, plan)
    # What such a plan is depends on tokens that the file does not hold.
    if plan.refit is not None or plan.alignment == "activations":
        option = "alignment activations" if plan.refit is None else f"refit {plan.refit.method}"
        raise PlanError(
            f"{path} has a plan with {option}, by prompts or text of its own run: take it out of sweep.alpha_files, or "
            f"give its alpha file with {'sweep.alignments' if plan.refit is None else 'sweep.refits'}"
        )
    return [Point(merges, method, replace(plan, name=f"{method}_k{merges}"))]


def _check_sources(config: Config, similarity: Similarity | None) -> None:
    """Refuse methods and blocks that need a similarity run, or block influence, that is not there, and a threshold,
    since K is given. Raises ConfigError."""
    if config.plan.threshold is not None:
        raise ConfigError(
            f"plan.threshold is {config.plan.threshold:g}, but a sweep merges as many layers as sweep.merges says: set "
            "it to null, or merge by the threshold (`raymerge merge`) and compare the plan files (sweep.alpha_files)"
        )
    methods, run = config.sweep.methods, config.plan.similarity_run
    if similarity is None and (needing := [method for method in methods if method in SIMILARITY_METHODS]):
        raise ConfigError(f"sweep.methods {needing} need plan.similarity_run: the run of `raymerge similarity`")
    if similarity is None and config.sweep.takes_blocks and config.plan.block == "similarity":
        raise ConfigError(
            "plan.block is similarity, which needs plan.similarity_run, the run of `raymerge similarity`: name it, or "
            "choose blocks by cosine, angular or loss"
        )
    if "block_influence" in methods and (similarity is None or similarity.block_influence is None):
        raise ConfigError(f"{run} has no block influence, which sweep.methods asks for")


def _points_of(
    config: Config, n_layers: int, method: str, merges: int, similarity: Similarity | None, chosen: Chosen
) -> list[Point]:
    """The points of a method that merges `merges` layers."""
    if method == "drop":
        plan = drop_plan(n_layers, merges)
    elif method == "drop_block":
        plan = drop_block_plan(n_layers, chosen.blocks[merges], merges)
    elif method == "drop_greedy":
        plan = drop_layers_plan(n_layers, chosen.greedy[:merges], name=method)
    elif method == "before_last":
        plan = before_last_plan(n_layers, merges)
    elif method == "block_influence":
        (plan,) = influence_plan(similarity, merges)
    else:
        if method == "most_similar" and chosen.most_similar is not None:
            plan = replace(chosen.most_similar, steps=chosen.most_similar.steps[:merges], name=method, kind="file")
        else:
            plan = _averaged(config.plan, n_layers, method, merges, similarity, chosen.blocks)
        return _variants(config, merges, plan.name, plan)
    return [Point(merges, method, replace(plan, name=f"{method}_k{merges}"))]


def _averaged(
    section: PlanConfig,
    n_layers: int,
    method: str,
    merges: int,
    similarity: Similarity | None,
    blocks: Mapping[int, int],
) -> MergePlan:
    """The plan of a method that averages layers, under the method's name; blocks: as of `Chosen`."""
    matrix = None if similarity is None else similarity.matrix
    pairs, selection, kind = tail_pairs(n_layers, merges), "tail", "file"
    base, ratio = method, section.ratio
    if method.startswith("fixed:"):
        kind, base, ratio = "fixed", "fixed", float(method.removeprefix("fixed:"))
    elif method in ("most_similar", "merge_block"):
        # A file's coefficients belong to its own merges.
        base = "fixed" if section.base == "file" else section.base
        if method == "most_similar":
            assert similarity is not None  # as `_check_sources` has seen to
            pairs = most_similar_pairs(similarity.matrix, merges=merges, first=similarity.first)
            selection = "most_similar"
        else:
            pairs, selection = block_pairs(n_layers, blocks[merges], merges, section.survivor), "block"
    return pairs_plan(
        n_layers,
        pairs,
        pair_alphas(pairs, base, ratio=ratio, similarity=matrix, beta=section.beta),
        name=_method_name(method),
        kind=kind,
        selection=selection,
    )


def _method_name(method: str) -> str:
    """A method as points and plans are named: two fixed:RATIO have one name only if the ratios are equal."""
    if not method.startswith("fixed:"):
        return method
    ratio = float(method.removeprefix("fixed:"))
    return f"fixed_{ratio:g}" if float(f"{ratio:g}") == ratio else f"fixed_{ratio!r}"


def _refitted(config: Config, inputs: Inputs, point: Point) -> list[Point]:
    """A point under every refit, or as it is where its method is not to be refitted; the unmerged model never is."""
    found = []
    settings = config.sweep
    methods = map(_method_name, settings.refitted_methods or settings.methods)
    refitted = point.plan.steps and ("file" if point.method.startswith(_FILE) else point.method) in methods
    for method in settings.refits if refitted else ["none"]:
        name = point.plan.name if method == "none" else f"{point.plan.name}_{method}"
        found.append(replace(point, plan=replace(point.plan, name=name, refit=refit_of(config, inputs, method))))
    return found


def _variants(config: Config, merges: int, method: str, plan: MergePlan) -> list[Point]:
    """An averaging plan with the plan section's options, but under every alignment and treatment of norms of the sweep,
    named so that they can be told apart."""
    plan = replace(plan, **options_of(config.plan))
    points = []
    for alignment in config.sweep.alignments:
        for norms in config.sweep.norms:
            suffix = "".join(f"_{word}" for word in (alignment, norms) if word not in PLAIN.values())
            variant = replace(plan, name=f"{method}{suffix}_k{merges}", alignment=alignment, norms=norms)
            points.append(Point(merges, method, variant))
    return points


def _refit_name(plan: MergePlan) -> str:
    return "none" if plan.refit is None else plan.refit.method


@dataclass(eq=False)
class _Sweep:
    """One sweep: its points, where results go, and what is measured while the pool is open."""

    config: Config
    inputs: Inputs
    run: RunDirectory
    cache: str
    points: list[Point]
    progress: Progress
    command: Sequence[str] | None
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.identity = self.inputs.checkpoint.identity
        self.plans = list({point.plan.plan_id(self.identity): point.plan for point in self.points}.values())
        # The last K layers' plans start at the deepest states; so does the unmerged model. Blocks start at their own.
        starting = [plan for plan in self.plans if plan.ends_at_once or plan.selection == "block" or plan.refit]
        self.firsts = sorted({plan.resumes_at for plan in starting})

    def execute(self) -> RunDirectory:
        reporter = Reporter(self.config, self.inputs, self.run)
        with open_pool(
            self.config,
            self.inputs,
            self.cache,
            run=self.run,
            plans=self.plans,
            firsts=self.firsts,
            progress=self.progress,
        ) as pool:
            workers = describe_workers(pool, self.inputs, self.progress, self.run)
            further = (RETRIEVAL,) if self.config.sweep.context else ()
            shards = compute_trunk(pool, self.inputs, self.progress, further)
            align(pool, self.plans, self.progress)  # after the trunk, whose states matching by activations needs
            align_rows(pool, self.plans, self.progress)
            fit(pool, self.plans, self.inputs, self.run, self.progress)  # after aligning, since merged layers are run
            reporter.report(pool, self.plans, shards, self.firsts, self.progress)
            if self.config.sweep.context:
                self._retrieve(pool)
            self.run.replace("sweep", [self._row(point) for point in self.points])
            plans = [point.plan for point in self.points]
            with step(self.progress, "accuracies and comparisons"):
                reporter.derive(plans, self._compared())
            reporter.write_plans(plans)
            # Last, since it can take as long as all else: what is above can be looked at meanwhile.
            reporter.store_costs(plans, self._time_generation(pool))
        finish(
            self.run,
            self.config,
            self.inputs,
            ["compression.py"],
            self.progress,
            command=self.command,
            seeds={"data": self.config.data.seed},
            workers=workers,
            warnings=self.warnings,
        )
        return self.run

    def _row(self, point: Point) -> dict[str, Any]:
        return {
            "plan_id": point.plan.plan_id(self.identity),
            "merges": point.merges,
            "method": point.method,
            "alignment": point.plan.alignment,
            "norms": point.plan.norms,
            "refit": _refit_name(point.plan),
        }

    def _compared(self) -> list[tuple[MergePlan, MergePlan]]:
        """Each point against dropping as many layers, a merged block also against that block dropped, layers dropped
        one by one against a dropped block, each aligned, folded or refitted one against its plain self, and each
        refitted one against the linear replacement of the dropped block."""
        plans = {
            (point.merges, point.method, _refit_name(point.plan)): point.plan
            for point in self.points
            if (point.plan.alignment, point.plan.norms) == (PLAIN["alignment"], PLAIN["norms"])
        }
        pairs = []
        for point in self.points:
            others = [("drop", "none"), (point.method, "none")]
            others += [("drop_block", "none")] if point.method in ("merge_block", "drop_greedy") else []
            others += [("drop_block", "linear")] if point.plan.refit is not None else []
            for method, refit in others:
                other = plans.get((point.merges, method, refit))
                if other is not None and other is not point.plan:
                    pairs.append((point.plan, other))
        return pairs

    def _retrieve(self, pool: WorkerPool) -> None:
        """Accuracy on key-value prompts by distance, one task a plan; rows of `context`."""
        done = self.run.read("context", ["plan_id", "measure"]).to_pylist()
        done = {row["plan_id"] for row in done if row["measure"] == "retrieval"}
        plans = [plan for plan in self.plans if plan.plan_id(self.identity) not in done]
        self.progress.stage("retrieval by distance", len(plans))

        def store(number: int, result: tuple[np.ndarray, np.ndarray]) -> None:
            distances, correct = result
            plan_id = plans[number].plan_id(self.identity)
            rows = []
            for distance in np.unique(distances):
                found = accuracy_summary(correct[distances == distance])
                rows.append(
                    {
                        "plan_id": plan_id,
                        "measure": "retrieval",
                        "bucket": int(distance),
                        "n": found.n,
                        "value": found.accuracy,
                        "standard_error": found.standard_error if found.n > 1 else None,
                    }
                )
            self.run.append("context", rows, part=f"retrieval-{plan_id}")

        pool.map("retrieval", plans, counted(self.progress, then=store))

    def _time_generation(self, pool: WorkerPool) -> dict[int, float]:
        """Tokens per second by number of layers, one after the other so that nothing else is running."""
        if not self.config.sweep.speed_tokens:
            return {}
        counts = sorted({len(plan.kept) for plan in self.plans})
        self.progress.stage("generation speed", len(counts))
        speeds = {}
        for done, layers in enumerate(counts, 1):
            (speeds[layers],) = pool.map("generation_speed", [layers])
            self.progress.advance(done, f"{layers} layers: {speeds[layers]:.1f} tokens/s")
        return speeds
