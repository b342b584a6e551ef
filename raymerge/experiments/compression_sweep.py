"""`sweep`: accuracy and perplexity against the number of merged layers, under every way of merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raymerge.config import Config, ConfigError
from raymerge.experiments.common import (
    Inputs,
    align,
    cache_of,
    compute_trunk,
    counted,
    describe_workers,
    draw_figures,
    model_facts,
    open_pool,
    read_inputs,
    settings_of,
)
from raymerge.experiments.planning import Similarity, influence_plan, similarity_of
from raymerge.experiments.reporting import Reporter
from raymerge.fusion import check_mergeable
from raymerge.heuristics import most_similar_pairs, pair_alphas
from raymerge.inputs import REPORT, RETRIEVAL
from raymerge.plan import (
    MergePlan,
    base_plan,
    before_last_plan,
    check_merges,
    drop_plan,
    pairs_plan,
    read_alpha_file,
    tail_pairs,
)
from raymerge.pool import WorkerPool, start_ray
from raymerge.progress import Progress, Silent
from raymerge.statistics import accuracy_summary
from raymerge.tables import RunDirectory

PLAIN = {"alignment": "none", "norms": "keep"}
_NEEDS_SIMILARITY = ("block_influence", "similarity_ratio", "similarity", "most_similar")


@dataclass(frozen=True)
class Point:
    """One point of the compression curve: `merges` layers gone by `method`."""

    merges: int
    method: str
    plan: MergePlan


def sweep(config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> RunDirectory:
    """Evaluate every method at every K of the sweep section on data.report_split and on plain text.

    One pass of the trunk serves every K: the states entering each first merged layer are kept. Leaves tables sweep,
    plans, coefficients, answers, accuracy, comparisons (each point against dropping as many layers, and each aligned or
    folded one against the plain one), perplexity, context, costs, receipts; figures; the manifest. The same call again
    resumes. Errors as `search`.
    """
    progress = progress or Silent()
    inputs = read_inputs(config, (REPORT,))
    similarity = similarity_of(config, inputs.checkpoint.n_layers)
    points = _points(config, inputs, similarity)
    run = RunDirectory.open(config.output.run, settings_of(config, "model", "data", "tasks", "plan", "sweep"), "sweep")
    if run.complete:
        progress.message("This run is complete; nothing is left to do.")
        return run
    run.begin()
    with start_ray():
        return _Sweep(config, inputs, run, points, progress, command).execute()


def _points(config: Config, inputs: Inputs, similarity: Similarity | None) -> list[Point]:
    """Every point, the unmerged model first; the same weights under two names are two points of one plan.

    Raises ConfigError for a method without its source, PlanError for a K that the model does not have.
    """
    settings, plan, n_layers = config.sweep, config.plan, inputs.checkpoint.n_layers
    for merges in settings.merges:
        check_merges(n_layers, merges)
    if similarity is None and (needing := [method for method in settings.methods if method in _NEEDS_SIMILARITY]):
        raise ConfigError(f"sweep.methods {needing} need plan.similarity_run: the run of `raymerge similarity`")
    if "block_influence" in settings.methods and similarity.block_influence is None:
        raise ConfigError(f"{plan.similarity_run} has no block influence, which sweep.methods asks for")
    matrix = None if similarity is None else similarity.matrix
    points = [Point(0, "base", base_plan(n_layers))]
    for method in settings.methods:
        if method == "file":
            if plan.alpha_file is None:
                raise ConfigError("sweep.methods has file, so plan.alpha_file must name one")
            found = read_alpha_file(plan.alpha_file, n_layers)
            points += _variants(config, len(found.steps), "file", replace(found, biases=plan.biases))
            continue
        for merges in settings.merges:
            if method == "drop":
                points.append(_dropped(merges, method, drop_plan(n_layers, merges)))
            elif method == "before_last":
                points.append(_dropped(merges, method, before_last_plan(n_layers, merges)))
            elif method == "block_influence":
                points += [_dropped(merges, method, found) for found in influence_plan(similarity, merges)]
            else:
                pairs, base, ratio = tail_pairs(n_layers, merges), method, plan.ratio
                if method == "most_similar":
                    # A file's coefficients belong to its own merges.
                    base = "fixed" if plan.base == "file" else plan.base
                    pairs = most_similar_pairs(matrix, merges=merges)
                elif method.startswith("fixed:"):
                    base, ratio = "fixed", float(method.removeprefix("fixed:"))
                name = f"fixed_{ratio:g}" if method.startswith("fixed:") else method
                averaged = pairs_plan(
                    n_layers,
                    pairs,
                    pair_alphas(pairs, base, ratio=ratio, similarity=matrix),
                    name=name,
                    kind="fixed" if method.startswith("fixed:") else "file",
                    selection="most_similar" if method == "most_similar" else "tail",
                    biases=plan.biases,
                )
                points += _variants(config, merges, name, averaged)
    for point in points:
        check_mergeable(inputs.checkpoint, point.plan)
    return points


def _dropped(merges: int, method: str, plan: MergePlan) -> Point:
    return Point(merges, method, replace(plan, name=f"{method}_k{merges}"))


def _variants(config: Config, merges: int, method: str, plan: MergePlan) -> list[Point]:
    """An averaging plan under every alignment and treatment of norms, named so that they can be told apart."""
    points = []
    for alignment in config.sweep.alignments:
        for norms in config.sweep.norms:
            suffix = "".join(f"_{word}" for word in (alignment, norms) if word not in PLAIN.values())
            variant = replace(plan, name=f"{method}{suffix}_k{merges}", alignment=alignment, norms=norms)
            points.append(Point(merges, method, variant))
    return points


class _Sweep:
    """One sweep: its points, where results go, and what is measured while the pool is open."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        run: RunDirectory,
        points: list[Point],
        progress: Progress,
        command: Sequence[str] | None,
    ):
        self.config, self.inputs, self.run, self.points = config, inputs, run, points
        self.progress, self.command = progress, command
        self.identity = inputs.checkpoint.identity
        self.plans = list({point.plan.plan_id(self.identity): point.plan for point in points}.values())
        # The last K layers' plans start at the deepest states; so does the unmerged model.
        self.firsts = sorted({plan.resumes_at for plan in self.plans if plan.ends_at_once})

    def execute(self) -> RunDirectory:
        cache = cache_of(self.config, self.run)
        reporter = Reporter(self.config, self.inputs, self.run)
        with open_pool(self.config, self.inputs, cache, firsts=self.firsts) as pool:
            workers = describe_workers(pool, self.inputs)
            further = (RETRIEVAL,) if self.config.sweep.context else ()
            shards = compute_trunk(pool, self.inputs, self.progress, further)
            align(pool, self.plans, self.progress)  # after the trunk, whose states matching by activations needs
            reporter.report(pool, self.plans, shards, self.firsts, self.progress)
            if self.config.sweep.context:
                self._retrieve(pool)
            speeds = self._time_generation(pool)
        self.run.replace("sweep", [self._row(point) for point in self.points])
        reporter.derive([point.plan for point in self.points], self._compared(), speeds=speeds)
        figures = draw_figures(self.run, ["compression.py"], self.progress) if self.config.output.figures else []
        self.run.write_manifest(
            "complete",
            command=self.command,
            seeds={"data": self.config.data.seed},
            workers=workers,
            figures=figures,
            **model_facts(self.config, self.inputs),
        )
        return self.run

    def _row(self, point: Point) -> dict[str, Any]:
        return {
            "plan_id": point.plan.plan_id(self.identity),
            "merges": point.merges,
            "method": point.method,
            "alignment": point.plan.alignment,
            "norms": point.plan.norms,
        }

    def _compared(self) -> list[tuple[MergePlan, MergePlan]]:
        """Each point against dropping as many layers, and each aligned or folded one against its plain self."""
        plain = {
            (point.merges, point.method): point.plan
            for point in self.points
            if (point.plan.alignment, point.plan.norms) == tuple(PLAIN.values())
        }
        pairs = []
        for point in self.points:
            for method in ("drop", point.method):
                other = plain.get((point.merges, method))
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
