"""From the plan section, and a similarity run where it names one, to the merges and their base coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raymerge import findings
from raymerge.alpha_files import read_alpha_file
from raymerge.checkpoint import Checkpoint
from raymerge.config import Config, ConfigError, PlanConfig
from raymerge.config_file import parse_config
from raymerge.experiments.common import Inputs, counted, describe_workers, open_pool, read_inputs
from raymerge.heuristics import (
    best_block,
    block_scores,
    least_influence_plan,
    most_similar_pair,
    most_similar_pairs,
    pair_alphas,
    similar_block_scores,
)
from raymerge.inputs import CALIBRATION, SUBSETS, read_similarity
from raymerge.plan import MergePlan, PlanError, block_pairs, block_starts, drop_block_plan, pairs_plan, tail_pairs
from raymerge.pool import WorkerPool
from raymerge.progress import Progress
from raymerge.tables import RunDirectory

SHUFFLE_SEED = 0  # of the control with shuffled layers; where it makes no plan, the seeds after it are tried
_SHUFFLES = 100


@dataclass(frozen=True)
class Similarity:
    """What a similarity run says of a model's layers: matrix (L, L), block influence (L,) where it was collected."""

    matrix: np.ndarray
    block_influence: np.ndarray | None

    def shuffled(self, seed: int) -> Similarity:
        """The same values for the wrong layers: a control."""
        order = np.random.default_rng(seed).permutation(len(self.matrix))
        return Similarity(self.matrix[np.ix_(order, order)], None)


def similarity_of(config: Config, n_layers: int) -> Similarity | None:
    """The matrix that plan.similarity_run names; None without one. Raises ConfigError, RunError."""
    plan = config.plan
    if plan.similarity_run is None:
        return None
    found = read_similarity(
        plan.similarity_run, n_layers=n_layers, subset=plan.similarity_subset, language=plan.similarity_language
    )
    return Similarity(*found)


def similarity_warnings(config: Config, identity: str) -> list[str]:
    """Warnings about the run that plan.similarity_run names: that its similarities are noise, or that it is of another
    model than the one with this identity. Raises RunError."""
    plan = config.plan
    if plan.similarity_run is None:
        return []
    run = RunDirectory.load(plan.similarity_run)
    model = (run.manifest() or {}).get("model") or {}
    found = []
    if model.get("identity") not in (None, identity):
        found.append(f"{plan.similarity_run} is a similarity run of another model, {model['path']}")
    for (subset, language), layers in findings.degenerate_layers(run).items():
        if layers and plan.similarity_subset in (None, subset) and plan.similarity_language in (None, language):
            found.append(
                f"{plan.similarity_run}: the diffusion map is degenerate in {len(layers)} layers; similarities there "
                "are noise, and so are coefficients derived from them. Try a run with similarity.sigma: median"
            )
    return found


def options_of(plan: PlanConfig) -> dict[str, str]:
    """The options of every merge that averages."""
    return {"alignment": plan.alignment, "norms": plan.norms, "biases": plan.biases}


def starting_plan(
    plan: PlanConfig, n_layers: int, similarity: Similarity | None, first: int | None = None
) -> MergePlan:
    """The merges and base coefficients of the plan section, named after where the coefficients come from.

    first: the block's first layer where plan.selection is block; by default the first one allowed. Raises PlanError.
    plan.recompute is ignored here; see `recomputed_plan`.
    """
    options = options_of(plan)
    if plan.base == "file":
        found = read_alpha_file(plan.alpha_file, n_layers)
        return replace(found, **options)
    matrix = None if similarity is None else similarity.matrix
    if plan.selection == "tail":
        pairs = tail_pairs(n_layers, plan.merges)
    elif plan.selection == "block":
        first = allowed_starts(plan, n_layers, plan.merges)[0] if first is None else first
        pairs = block_pairs(n_layers, first, plan.merges, plan.survivor)
    else:
        pairs = most_similar_pairs(matrix, merges=plan.merges, threshold=plan.threshold)
    alphas = pair_alphas(pairs, plan.base, ratio=plan.ratio, similarity=matrix)
    return _named(plan, n_layers, pairs, alphas)


def _named(plan: PlanConfig, n_layers: int, pairs: list[tuple[int, int]], alphas: list[float]) -> MergePlan:
    fixed = plan.base == "fixed"
    return pairs_plan(
        n_layers,
        pairs,
        alphas,
        name=f"fixed_{plan.ratio:g}" if fixed else plan.base,
        kind="fixed" if fixed else "file",
        selection=plan.selection,
        **options_of(plan),
    )


def shuffled_plan(
    plan: PlanConfig,
    n_layers: int,
    similarity: Similarity,
    merges: int,
    first: int | None = None,
    *,
    check: Callable[[MergePlan], None] = lambda plan: None,
) -> list[MergePlan]:
    """The starting plan as a similarity whose layers are shuffled would have it: does the similarity matter?

    It merges `merges` layers, as many as the start, whatever plan.threshold is; a block (`first`) stays where it is.
    Another shuffle is tried where one leads to entries that are undefined, or to layers that cannot be merged (`check`
    raises PlanError); the list is empty where all do.
    """
    if plan.selection == "most_similar":
        plan = plan.model_copy(update={"merges": merges, "threshold": None})
    for seed in range(SHUFFLE_SEED, SHUFFLE_SEED + _SHUFFLES):
        try:
            found = starting_plan(plan, n_layers, similarity.shuffled(seed), first)
            check(found)
        except PlanError:
            continue
        return [replace(found, name="similarity_shuffled")]
    return []


def influence_plan(similarity: Similarity | None, merges: int) -> list[MergePlan]:
    """ShortGPT's dropping of the layers of least block influence, where a similarity run has measured it."""
    if similarity is None or similarity.block_influence is None:
        return []
    return [least_influence_plan(similarity.block_influence, merges)]


def allowed_starts(plan: PlanConfig, n_layers: int, merges: int, checkpoint: Checkpoint | None = None) -> list[int]:
    """The first layers that a block of `merges` layers may have: the given one, or those of plan.starts that fit.

    With plan.block similarity, 0 is left out unless plan.starts has it: layers' outputs are compared, and no layer's
    output enters layer 0. checkpoint: given where blocks are averaged; unless plan.block or plan.starts names layers,
    only blocks are left whose layers have the same attention as the layer that takes them in. Raises PlanError where
    none is left.
    """
    fitting = block_starts(n_layers, merges, plan.survivor)
    any_first = [first for first in fitting if first > 0 or plan.block != "similarity"]
    wanted = [plan.block] if isinstance(plan.block, int) else any_first if plan.starts is None else plan.starts
    if not (found := [first for first in fitting if first in wanted]):
        raise PlanError(
            f"a block of {merges} layers with plan.survivor {plan.survivor} must begin with one of layers {fitting[0]} "
            f"to {fitting[-1]} of this model's {n_layers}, but plan.block and plan.starts allow {list(wanted)}"
        )
    if checkpoint is None or wanted is not any_first:
        return found
    kinds, before = list(zip(checkpoint.windows, checkpoint.rotary_types, strict=True)), plan.survivor == "before"
    if not (alike := [first for first in found if len(set(kinds[first - before :][: merges + 1])) == 1]):
        raise PlanError(
            f"no {merges + 1} layers in a row of this model have the same attention, so that {merges} could be "
            "averaged with the one that takes them in: merge fewer, or drop them (method drop_block of a sweep)"
        )
    return alike


def choose_blocks(
    config: Config,
    n_layers: int,
    merges: Sequence[int],
    run: RunDirectory,
    cache: str,
    similarity: Similarity | None,
    progress: Progress,
    *,
    roles: Sequence[str] = (CALIBRATION,),
    checkpoint: Checkpoint | None = None,
) -> dict[int, int]:
    """The first layer of the block of each number of layers, as plan.block says; the scores of all that are allowed go
    into table `blocks`.

    roles: what is read; on questions, the calibration depends on whether SEARCH and REPORT are read too.
    checkpoint: see `allowed_starts`.
    What is in the table is not measured again. Needs Ray where states or losses are measured, and then the calibration
    section's text or prompts. Raises PlanError, ConfigError.
    """
    plan = config.plan
    found = {row["merges"]: row["first"] for row in run.read("blocks").to_pylist() if row["chosen"]}
    if set(merges) <= set(found):
        return {count: found[count] for count in merges}
    starts = {count: allowed_starts(plan, n_layers, count, checkpoint) for count in merges}
    # A search over blocks begins with what the cosine chooses.
    chosen_by = "cosine" if plan.block == "search" else "given" if isinstance(plan.block, int) else plan.block
    tokens = None
    if chosen_by == "given":
        scores = {("given", count): {first: None for first in starts[count]} for count in merges}
    elif chosen_by == "similarity":
        scores = {(chosen_by, count): similar_block_scores(similarity.matrix, count) for count in merges}
    else:
        inputs = read_inputs(config, roles, text=False)
        measure = _block_losses if chosen_by == "loss" else _block_distances
        scores, tokens = measure(config, inputs, starts, run, cache, progress)
    table, chosen = [], {}
    for (name, count), values in scores.items():
        if name == chosen_by:
            chosen[count] = starts[count][0] if name == "given" else best_block(values, starts[count])
            last = chosen[count] + count - 1
            which = f"layer {last}" if count == 1 else f"layers {chosen[count]} to {last}"
            progress.message(f"Block of {count} to remove, chosen by {name}: {which}")
        table += [
            {
                "merges": count,
                "first": first,
                "last": first + count - 1,
                "measure": name,
                "score": score,
                "chosen": name == chosen_by and first == chosen[count],
                "tokens": tokens,
            }
            for first, score in values.items()
            if first in starts[count]  # distances are there between any two depths
        ]
    run.replace("blocks", table)
    return chosen


_Scores = dict[tuple[str, int], dict[int, float]]  # (measure, number of layers) -> first layer -> score


def _block_distances(
    config: Config, inputs: Inputs, starts: dict[int, list[int]], run: RunDirectory, cache: str, progress: Progress
) -> tuple[_Scores, int]:
    """Distances between the states entering and leaving every block, and the number of tokens they are means over."""
    with open_pool(config, inputs, cache, run=run, progress=progress) as pool:
        shards = _calibration_shards(pool, inputs, progress, run)
        progress.stage("distances between layers (tokens)", sum(shards))
        finished = counted(progress, lambda number, _: shards[number])
        parts = pool.map("state_distances", list(range(len(shards))), finished)
    cosine, angular, tokens = (sum(values) for values in zip(*parts, strict=True))
    distances = {"cosine": cosine / tokens, "angular": angular / tokens}
    scores = {(name, count): block_scores(values, count) for name, values in distances.items() for count in starts}
    return scores, tokens


def _block_losses(
    config: Config, inputs: Inputs, starts: dict[int, list[int]], run: RunDirectory, cache: str, progress: Progress
) -> tuple[_Scores, int]:
    """Mean NLL of the calibration text with each block dropped, from the states that enter it; tokens scored."""
    n_layers = inputs.checkpoint.n_layers
    plans = {(count, first): drop_block_plan(n_layers, first, count) for count in starts for first in starts[count]}
    firsts = sorted({plan.resumes_at for plan in plans.values()})
    with open_pool(config, inputs, cache, run=run, firsts=firsts, progress=progress) as pool:
        shards = _calibration_shards(pool, inputs, progress, run)
        progress.stage("states entering the blocks (tokens)", sum(shards))
        numbers = range(len(shards))
        pool.map("compute_trunk", [(CALIBRATION, n) for n in numbers], counted(progress, lambda _, tokens: tokens))
        tasks = [(key, number) for key in plans for number in numbers]
        progress.stage("loss without each block", len(tasks))
        found = pool.map("calibration_nll", [(plans[key], number) for key, number in tasks], counted(progress))
    scores: _Scores = {("loss", count): {} for count in starts}
    for count, first in plans:
        parts = [part for (key, _), part in zip(tasks, found, strict=True) if key == (count, first)]
        nll, tokens = (sum(values) for values in zip(*parts, strict=True))
        scores["loss", count][first] = nll / tokens
    return scores, tokens


def _calibration_shards(pool: WorkerPool, inputs: Inputs, progress: Progress, run: RunDirectory) -> list[int]:
    """Tokens of each shard of the calibration, once all workers are known to hold the same (`describe_workers`)."""
    describe_workers(pool, inputs, progress, run)
    (shards,) = pool.map("shard_tokens", [CALIBRATION])
    return shards


def recomputed_plan(config: Config, n_layers: int, cache: str, progress: Progress) -> MergePlan:
    """Merge the most similar neighbours and collect the similarities anew after each merge (plan.recompute).

    The similarity section, prompts and subset are those of plan.similarity_run. What is collected is cached, so that
    a second call is quick. Needs Ray; one worker does it, since each merge waits for the one before it.
    """
    plan = config.plan
    stored = RunDirectory.load(plan.similarity_run)
    source = parse_config(stored.config, source=f"{plan.similarity_run}/config.yaml")
    if source.model != config.model:
        theirs, ours = source.model.model_dump(), config.model.model_dump()
        differing = [f"model.{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
        raise ConfigError(
            f"{plan.similarity_run} was made with {', '.join(differing)}: plan.recompute continues with that "
            "run's similarity section and model, so repeat the similarity run with this model"
        )
    source = source.model_copy(update={"workers": config.workers})  # it may have been made on another cluster
    inputs = read_inputs(source, (SUBSETS,), text=False)
    wanted = [
        number
        for number, subset in enumerate(inputs.subsets)
        if plan.similarity_subset in (None, subset.name) and plan.similarity_language in (None, subset.language)
    ]
    if len(wanted) != 1:
        raise ConfigError(
            f"{plan.similarity_run} has {len(wanted)} subsets for plan.similarity_subset = {plan.similarity_subset} "
            f"and plan.similarity_language = {plan.similarity_language}: recompute needs exactly one"
        )
    pairs: list[tuple[int, int]] = []
    alphas: list[float] = []
    most = plan.merges or n_layers - 1
    with open_pool(source, inputs, cache, most=1, progress=progress) as pool:
        describe_workers(pool, inputs, progress)
        progress.stage("merging with recomputed similarity", most)
        while len(pairs) < most:
            so_far = pairs_plan(n_layers, pairs, alphas, name="so far", kind="file", **options_of(plan))
            (values,) = pool.map("similarity_after", [(wanted[0], so_far)])
            # Rows of `values` are the kept layers, in order.
            pair = most_similar_pair(values, threshold=plan.threshold)
            if pair is None:
                break
            alphas += pair_alphas([pair], plan.base, ratio=plan.ratio, similarity=values)
            kept = [layer.index for layer in so_far.kept]
            pairs.append((kept[pair[0]], kept[pair[1]]))
            progress.advance(len(pairs), f"layer {pairs[-1][1]} into {pairs[-1][0]}")
    if not pairs:
        raise PlanError(f"no neighbouring layers are more similar than plan.threshold = {plan.threshold}: lower it")
    return _named(plan, n_layers, pairs, alphas)
