"""Choices that workers measure: which block a merge removes, and merges whose similarity is collected anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raymerge.checkpoint import Checkpoint
from raymerge.config import Config, ConfigError
from raymerge.config_file import parse_config
from raymerge.experiments.common import Inputs, check_room, counted, describe_workers, open_pool, read_inputs
from raymerge.heuristics import best_block, block_scores, most_similar_pair, pair_alphas, similar_block_scores
from raymerge.inputs import CALIBRATION, SUBSETS
from raymerge.plan import MergePlan, PlanError, drop_block_plan, drop_layers_plan, pairs_plan
from raymerge.plan_section import Similarity, allowed_starts, block_name, named_plan, options_of
from raymerge.pool import WorkerPool
from raymerge.progress import Progress
from raymerge.tables import RunDirectory


def choose_blocks(
    config: Config,
    checkpoint: Checkpoint,
    merges: Sequence[int],
    run: RunDirectory,
    cache: str,
    similarity: Similarity | None,
    progress: Progress,
    *,
    roles: Sequence[str] = (CALIBRATION,),
    averaged: bool = True,
) -> dict[int, int]:
    """The first layer of the block of each number of layers, as plan.block says; the scores of all that are allowed go
    into table `blocks`.

    roles: what is read. A calibration on questions is another one where SEARCH or REPORT are read with it.
    averaged: whether blocks are averaged, not only dropped (`allowed_starts`).

    What is in the table is not measured again. Needs Ray where states or losses are measured, and then the calibration
    section's text or prompts. Raises PlanError, ConfigError.
    """
    section = config.plan
    found = {row["merges"]: row["first"] for row in run.read("blocks").to_pylist() if row["chosen"]}
    if set(merges) <= set(found):
        return {count: found[count] for count in merges}
    n_layers = checkpoint.n_layers
    starts = {count: allowed_starts(section, n_layers, count, checkpoint, averaged=averaged) for count in merges}
    chosen_by: str = "given" if isinstance(section.block, int) else section.block
    if chosen_by == "search":  # which begins with what the cosine chooses
        chosen_by = "cosine"
    tokens = None
    if chosen_by == "given":
        scores: _Scores = {("given", count): dict.fromkeys(starts[count], math.nan) for count in merges}
    elif chosen_by == "similarity":
        assert similarity is not None  # without one the configuration is refused
        scores = {(chosen_by, count): similar_block_scores(similarity.matrix, count) for count in merges}
    else:
        inputs = read_inputs(config, roles, text=False)
        measure = _block_losses if chosen_by == "loss" else _block_distances
        scores, tokens = measure(config, inputs, starts, run, cache, progress)
    table, chosen = [], {}
    for (name, count), values in scores.items():
        if name == chosen_by:
            chosen[count] = starts[count][0] if name == "given" else best_block(values, starts[count])
            which = block_name(chosen[count], count)
            progress.message(f"Block of {count} to remove, chosen by {name}: {which}")
        table += [
            {
                "merges": count,
                "first": first,
                "last": first + count - 1,
                "measure": name,
                "score": None if name == "given" else score,
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
        numbers = range(_calibration_states(pool, inputs, progress, run))
        tasks = [(key, number) for key in plans for number in numbers]
        progress.stage("loss without each block", len(tasks))
        found = pool.map("calibration_nll", [(plans[key], number) for key, number in tasks], counted(progress))
    scores: _Scores = {("loss", count): {} for count in starts}
    for count, first in plans:
        parts = [part for (key, _), part in zip(tasks, found, strict=True) if key == (count, first)]
        nll, tokens = (sum(values) for values in zip(*parts, strict=True))
        scores["loss", count][first] = nll / tokens
    return scores, tokens


def choose_one_by_one(
    config: Config, n_layers: int, most: int, run: RunDirectory, cache: str, progress: Progress
) -> list[int]:
    """Layers to drop, `most` of them in order: each the one without which the mean NLL of the calibration text is
    smallest, those before it being gone (SLEB, Song et al. 2024, arXiv 2402.09025). The first K are the choice for K.
    Layers to which features of images are added stay.

    What each step measured goes into table `removals`, from which the next call goes on. Needs Ray, and the calibration
    section's text. Raises PlanError where no loss is finite.
    """
    stored = run.read("removals", ["step", "layer", "chosen"]).sort_by("step").to_pylist()
    gone = [row["layer"] for row in stored if row["chosen"]]
    if len(gone) >= most:
        return gone[:most]
    inputs = read_inputs(config, (CALIBRATION,), text=False)
    free = range(inputs.checkpoint.deepstack_layers, n_layers)
    following = [drop_layers_plan(n_layers, [*gone, layer], name="next") for layer in free if layer not in gone]
    firsts = sorted({plan.resumes_at for plan in following} - {0})  # no later step goes on from another depth
    with open_pool(config, inputs, cache, run=run, firsts=firsts, progress=progress) as pool:
        numbers = range(_calibration_states(pool, inputs, progress, run))
        candidates = sum(len(free) - step for step in range(len(gone), most))
        progress.stage("loss without each layer", candidates * len(numbers))
        done = 0
        while len(gone) < most:
            stays = [layer for layer in free if layer not in gone]
            plans = {layer: drop_layers_plan(n_layers, [*gone, layer], name="so far") for layer in stays}
            tasks = [(layer, number) for layer in stays for number in numbers]
            counts = counted(progress, before=done)
            found = pool.map("calibration_nll", [(plans[layer], number) for layer, number in tasks], counts)
            done += len(tasks)
            sums = {layer: np.zeros(2) for layer in stays}  # loss and tokens
            for (layer, _), part in zip(tasks, found, strict=True):
                sums[layer] += part
            losses = {layer: float(nll / tokens) for layer, (nll, tokens) in sums.items()}
            finite = [layer for layer in stays if math.isfinite(losses[layer])]
            if not finite:
                raise PlanError(f"without layers {gone} and any further one the model's loss is not finite")
            chosen = best_block(losses, finite)
            rows = [
                {
                    "step": len(gone),
                    "layer": layer,
                    "loss": losses[layer] if layer in finite else None,
                    "chosen": layer == chosen,
                    "tokens": int(sums[layer][1]),
                }
                for layer in stays
            ]
            run.append("removals", rows, part=f"step-{len(gone)}")
            gone.append(chosen)
    progress.message(f"Layers to remove, one by one by the loss without them: {', '.join(map(str, gone))}")
    return gone


def _calibration_shards(pool: WorkerPool, inputs: Inputs, progress: Progress, run: RunDirectory) -> list[int]:
    """Tokens of each shard of the calibration, once all workers are known to hold the same (`describe_workers`)."""
    describe_workers(pool, inputs, progress, run)
    (shards,) = pool.map("shard_tokens", [CALIBRATION])
    return shards


def _calibration_states(pool: WorkerPool, inputs: Inputs, progress: Progress, run: RunDirectory) -> int:
    """Make sure that the calibration's states at every depth that the pool goes on from are on disk; its shards.

    Raises NoRoomError, before any are written, where a worker's disk has no room for them.
    """
    shards = _calibration_shards(pool, inputs, progress, run)
    check_room(
        pool.broadcast("trunk_room", [CALIBRATION]),
        "states of the calibration, at every layer that may be the first to go,",
        "fewer calibration.tokens",
        progress,
    )
    progress.stage("states of the calibration (tokens)", sum(shards))
    items = [(CALIBRATION, number) for number in range(len(shards))]
    pool.map("compute_trunk", items, counted(progress, lambda _, tokens: tokens))
    return len(shards)


def recomputed_plan(config: Config, n_layers: int, cache: str, progress: Progress) -> MergePlan:
    """Merge the most similar neighbours and collect the similarities anew after each merge (plan.recompute).

    The similarity section, prompts and subset are those of plan.similarity_run. What is collected is cached, so that
    a second call is quick. Needs Ray; one worker does it, since each merge waits for the one before it.
    """
    section = config.plan
    assert section.similarity_run is not None  # which plan.recompute goes with
    stored = RunDirectory.load(section.similarity_run)
    source = parse_config(stored.config, source=f"{section.similarity_run}/config.yaml")
    if source.model != config.model:
        theirs, ours = source.model.model_dump(), config.model.model_dump()
        differing = [f"model.{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
        raise ConfigError(
            f"{section.similarity_run} was made with {', '.join(differing)}: plan.recompute continues with that "
            "run's similarity section and model, so repeat the similarity run with this model"
        )
    source = source.model_copy(update={"workers": config.workers})  # it may have been made on another cluster
    inputs = read_inputs(source, (SUBSETS,), text=False)
    wanted = [
        number
        for number, subset in enumerate(inputs.subsets)
        if section.similarity_subset in (None, subset.name) and section.similarity_language in (None, subset.language)
    ]
    if len(wanted) != 1:
        raise ConfigError(
            f"{section.similarity_run} has {len(wanted)} subsets for plan.similarity_subset = "
            f"{section.similarity_subset} and plan.similarity_language = {section.similarity_language}: recompute "
            "needs exactly one"
        )
    pairs: list[tuple[int, int]] = []
    alphas: list[float] = []
    first = inputs.checkpoint.deepstack_layers
    most = section.merges or n_layers - first - 1
    with open_pool(source, inputs, cache, most=1, progress=progress) as pool:
        describe_workers(pool, inputs, progress)
        progress.stage("merging with recomputed similarity", most)
        while len(pairs) < most:
            so_far = pairs_plan(n_layers, pairs, alphas, name="so far", kind="file", **options_of(section))
            (values,) = pool.map("similarity_after", [(wanted[0], so_far)])
            # Rows of `values` are the kept layers, in order.
            pair = most_similar_pair(values, range(first, len(values)), threshold=section.threshold)
            if pair is None:
                break
            alphas += pair_alphas([pair], section.base, ratio=section.ratio, similarity=values, beta=section.beta)
            kept = [layer.index for layer in so_far.kept]
            pairs.append((kept[pair[0]], kept[pair[1]]))
            progress.advance(len(pairs), f"layer {pairs[-1][1]} into {pairs[-1][0]}")
    if not pairs:
        raise PlanError(f"no neighbouring layers are more similar than plan.threshold = {section.threshold}: lower it")
    return named_plan(section, n_layers, pairs, alphas)
