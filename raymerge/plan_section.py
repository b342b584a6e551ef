"""From the plan section, and a similarity run where it names one, to the merges and their base coefficients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from raymerge import findings
from raymerge.alpha_files import read_alpha_file
from raymerge.checkpoint import Checkpoint
from raymerge.config import PlanConfig
from raymerge.heuristics import least_influence_plan, most_similar_pairs, pair_alphas
from raymerge.inputs import read_similarity
from raymerge.plan import Averaging, MergePlan, PlanError, block_pairs, block_starts, pairs_plan, tail_pairs
from raymerge.tables import RunDirectory

SHUFFLE_SEED = 0  # of the control with shuffled layers; where it makes no plan, the seeds after it are tried
_SHUFFLES = 100


@dataclass(frozen=True)
class Similarity:
    """What a similarity run says of a model's layers: matrix (L, L), block influence (L,) where it was collected; and
    the first of them that may be chosen by it."""

    matrix: np.ndarray
    block_influence: np.ndarray | None
    first: int = 0

    def shuffled(self, seed: int) -> Similarity:
        """The same values for the wrong layers: a control."""
        order = np.random.default_rng(seed).permutation(len(self.matrix))
        return Similarity(self.matrix[np.ix_(order, order)], None, self.first)


def similarity_of(plan: PlanConfig, checkpoint: Checkpoint) -> Similarity | None:
    """The matrix that plan.similarity_run names; None without one. Raises ConfigError, RunError."""
    if plan.similarity_run is None:
        return None
    found = read_similarity(
        plan.similarity_run,
        n_layers=checkpoint.n_layers,
        subset=plan.similarity_subset,
        language=plan.similarity_language,
    )
    return Similarity(*found, checkpoint.deepstack_layers)


def block_name(first: int, merges: int) -> str:
    """How messages name the block of `merges` layers from `first` on."""
    return f"layer {first}" if merges == 1 else f"layers {first} to {first + merges - 1}"


def similarity_warnings(plan: PlanConfig, identity: str) -> list[str]:
    """Warnings about the run that plan.similarity_run names: that its similarities are noise, or that it is of another
    model than the one with this identity. Raises RunError."""
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


def options_of(plan: PlanConfig) -> Averaging:
    """The options of every merge that averages."""
    return {"alignment": plan.alignment, "norms": plan.norms, "biases": plan.biases}


def alpha_file_of(plan: PlanConfig) -> str | None:
    """The file that steps and coefficients come from; None where they do not come from one."""
    return plan.alpha_file if plan.base == "file" else None


def merges_of(plan: PlanConfig) -> int:
    """How many layers of a tail or a block are merged."""
    assert plan.merges is not None  # PlanConfig asks for it
    return plan.merges


def starting_plan(
    plan: PlanConfig, n_layers: int, similarity: Similarity | None, first: int | None = None
) -> MergePlan:
    """The merges and base coefficients of the plan section, named after where the coefficients come from.

    first: the block's first layer where plan.selection is block; by default the first one allowed. Raises PlanError.
    plan.recompute is ignored here; see `planning.recomputed_plan`.
    """
    if (file := alpha_file_of(plan)) is not None:
        return replace(read_alpha_file(file, n_layers), **options_of(plan))
    matrix = None if similarity is None else similarity.matrix
    if plan.selection == "tail":
        pairs = tail_pairs(n_layers, merges_of(plan))
    elif plan.selection == "block":
        first = allowed_starts(plan, n_layers, merges_of(plan))[0] if first is None else first
        pairs = block_pairs(n_layers, first, merges_of(plan), plan.survivor)
    else:
        assert similarity is not None  # PlanConfig asks for a similarity run
        pairs = most_similar_pairs(
            similarity.matrix, merges=plan.merges, threshold=plan.threshold, first=similarity.first
        )
    alphas = pair_alphas(pairs, plan.base, ratio=plan.ratio, similarity=matrix, beta=plan.beta)
    return named_plan(plan, n_layers, pairs, alphas)


def check_selected(plan: PlanConfig, start: MergePlan) -> None:
    """Refuse an alpha file whose steps are not the tail merge that plan.selection and plan.merges name. Raises
    PlanError."""
    if plan.selection == "tail" and (start.selection != "tail" or len(start.steps) != plan.merges):
        raise PlanError(
            f"plan {start.name} has {len(start.steps)} steps and is not a tail merge of plan.merges = {plan.merges} "
            "layers; to use the file's own steps, set plan.selection: list"
        )


def named_plan(plan: PlanConfig, n_layers: int, pairs: list[tuple[int, int]], alphas: list[float]) -> MergePlan:
    """Averages of these pairs, named after where the coefficients come from."""
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
    return [least_influence_plan(similarity.block_influence, merges, similarity.first)]


def allowed_starts(
    plan: PlanConfig, n_layers: int, merges: int, checkpoint: Checkpoint | None = None, *, averaged: bool = True
) -> list[int]:
    """The first layers that a block of `merges` layers may have: the given one, or those of plan.starts that fit.

    With plan.block similarity, 0 is left out unless plan.starts has it: layers' outputs are compared, and no layer's
    output enters layer 0. checkpoint: where it is given, and neither plan.block nor plan.starts names layers, only
    blocks are left without layers to which features of images are added, and, where they are `averaged`, not only
    dropped, whose layers have the same attention as the layer that takes them in. Raises PlanError where none is left.
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
    deepstack = checkpoint.deepstack_layers
    free = [first for first in found if first - (before and averaged) >= deepstack]
    if not free:
        raise PlanError(
            f"every block of {merges} layers of this model has, or is merged into, one of its first {deepstack}, to "
            "whose outputs it adds features of images: merge fewer"
        )
    if not averaged:
        return free
    if not (alike := [first for first in free if len(set(kinds[first - before :][: merges + 1])) == 1]):
        raise PlanError(
            f"no {merges + 1} layers in a row of this model have the same attention, so that {merges} could be "
            "averaged with the one that takes them in: merge fewer, or drop them (method drop_block of a sweep)"
        )
    return alike
