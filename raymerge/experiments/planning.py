"""From the plan section, and a similarity run where it names one, to the merges and their base coefficients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from raymerge.config import Config, ConfigError, PlanConfig, parse_config
from raymerge.experiments.common import open_pool, read_inputs
from raymerge.heuristics import least_influence_plan, most_similar_pair, most_similar_pairs, pair_alphas
from raymerge.inputs import SUBSETS, read_similarity
from raymerge.plan import MergePlan, PlanError, pairs_plan, read_alpha_file, tail_pairs
from raymerge.progress import Progress
from raymerge.tables import RunDirectory

SHUFFLE_SEED = 0  # of the control whose similarity has its layers shuffled


@dataclass(frozen=True)
class Similarity:
    """What a similarity run says of a model's layers: matrix (L, L), block influence (L,) where it was collected."""

    matrix: np.ndarray
    block_influence: np.ndarray | None

    def shuffled(self) -> Similarity:
        """The same values for the wrong layers: a control."""
        order = np.random.default_rng(SHUFFLE_SEED).permutation(len(self.matrix))
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


def options_of(plan: PlanConfig) -> dict[str, str]:
    """The options of every merge that averages."""
    return {"alignment": plan.alignment, "norms": plan.norms, "biases": plan.biases}


def starting_plan(plan: PlanConfig, n_layers: int, similarity: Similarity | None) -> MergePlan:
    """The merges and base coefficients of the plan section, named after where the coefficients come from.

    Raises PlanError. plan.recompute is `recomputed_plan`'s; here the similarity is collected once.
    """
    options = options_of(plan)
    if plan.base == "file":
        found = read_alpha_file(plan.alpha_file, n_layers)
        return replace(found, **options)
    matrix = None if similarity is None else similarity.matrix
    if plan.selection == "tail":
        pairs = tail_pairs(n_layers, plan.merges)
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


def shuffled_plan(plan: PlanConfig, n_layers: int, similarity: Similarity) -> MergePlan:
    """The starting plan as a similarity whose layers are shuffled would have it: does the similarity matter?"""
    if plan.selection == "most_similar" and plan.merges is None:
        # The threshold would stop it elsewhere; a control merges as many layers.
        merges = len(starting_plan(plan, n_layers, similarity).steps)
        plan = plan.model_copy(update={"merges": merges, "threshold": None})
    return replace(starting_plan(plan, n_layers, similarity.shuffled()), name="similarity_shuffled")


def influence_plan(similarity: Similarity | None, merges: int) -> list[MergePlan]:
    """ShortGPT's dropping of the layers of least block influence, where a similarity run has measured it."""
    if similarity is None or similarity.block_influence is None:
        return []
    return [least_influence_plan(similarity.block_influence, merges)]


def recomputed_plan(config: Config, n_layers: int, cache: str, progress: Progress) -> MergePlan:
    """Merge the most similar neighbours and collect the similarities anew after each merge (plan.recompute).

    The similarity section, prompts and subset are those of plan.similarity_run. What is collected is cached, so that
    a second call is quick. Needs Ray; one worker does it, since each merge waits for the one before it.
    """
    plan = config.plan
    stored = RunDirectory.load(plan.similarity_run)
    source = parse_config(stored.config, source=f"{plan.similarity_run}/config.yaml")
    if source.model != config.model:
        raise ConfigError(f"{plan.similarity_run} is a run of {source.model.path}, not of {config.model.path}")
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
