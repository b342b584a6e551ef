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
    """What a similarity run says of a model's layers: matrix (L, L) and, where it was collected, block influence (L,).
    first: the first layer that may be chosen by it; those before it stay."""

    matrix: np.ndarray
    block_influence: np.ndarray | None
    first: int = 0

    def shuffled(self, seed: int) -> Similarity:
        """The same values for the wrong layers: a control."""
        order = np.random.default_rng(seed).permutation(len(self.matrix))
        return Similarity(self.matrix[np.ix_(order, order)], None, self.first)


def similarity_of(section: PlanConfig, checkpoint: Checkpoint) -> Similarity | None:
    """The matrix that plan.similarity_run names; None without one. Raises ConfigError, RunError."""
    if section.similarity_run is None:
        return None
    found = read_similarity(
        section.similarity_run,
        n_layers=checkpoint.n_layers,
        subset=section.similarity_subset,
        language=section.similarity_language,
    )
    return Similarity(*found, checkpoint.deepstack_layers)


def block_name(first: int, merges: int) -> str:
    """How messages name the block of `merges` layers from `first` on."""
    return f"layer {first}" if merges == 1 else f"layers {first} to {first + merges - 1}"


def similarity_warnings(section: PlanConfig, identity: str) -> list[str]:
    """Warnings about the run that plan.similarity_run names: that its similarities are noise, or that it is of another
    model than the one with this identity. Raises RunError."""
    if section.similarity_run is None:
        return []
    run = RunDirectory.load(section.similarity_run)
    model = (run.manifest() or {}).get("model") or {}
    found = []
    if model.get("identity") not in (None, identity):
        found.append(f"{section.similarity_run} is a similarity run of another model, {model['path']}")
    for (subset, language), layers in findings.degenerate_layers(run).items():
        if layers and section.similarity_subset in (None, subset) and section.similarity_language in (None, language):
            found.append(
                f"{section.similarity_run}: the diffusion map is degenerate in {len(layers)} layers; similarities "
                "there are noise, and so are coefficients derived from them. Try a run with similarity.sigma: median"
            )
    return found


def options_of(section: PlanConfig) -> Averaging:
    """The options of every merge that averages."""
    return {"alignment": section.alignment, "norms": section.norms, "biases": section.biases}


def alpha_file_of(section: PlanConfig) -> str | None:
    """The file that steps and coefficients come from; None where they do not come from one."""
    return section.alpha_file if section.base == "file" else None


def merges_of(section: PlanConfig) -> int:
    """How many layers of a tail or a block are merged."""
    assert section.merges is not None  # PlanConfig asks for it
    return section.merges


def starting_plan(
    section: PlanConfig, n_layers: int, similarity: Similarity | None, first: int | None = None
) -> MergePlan:
    """The merges and base coefficients of the plan section, named after where the coefficients come from.

    first: the block's first layer where plan.selection is block; by default the first one allowed. Raises PlanError.
    plan.recompute is ignored here; see `planning.recomputed_plan`.
    """
    if (file := alpha_file_of(section)) is not None:
        return replace(read_alpha_file(file, n_layers), **options_of(section))
    matrix = None if similarity is None else similarity.matrix
    if section.selection == "tail":
        pairs = tail_pairs(n_layers, merges_of(section))
    elif section.selection == "block":
        first = allowed_starts(section, n_layers, merges_of(section))[0] if first is None else first
        pairs = block_pairs(n_layers, first, merges_of(section), section.survivor)
    else:
        assert similarity is not None  # PlanConfig asks for a similarity run
        pairs = most_similar_pairs(
            similarity.matrix, merges=section.merges, threshold=section.threshold, first=similarity.first
        )
    alphas = pair_alphas(pairs, section.base, ratio=section.ratio, similarity=matrix, beta=section.beta)
    return named_plan(section, n_layers, pairs, alphas)


def check_selected(section: PlanConfig, start: MergePlan) -> None:
    """Refuse an alpha file whose steps are not the tail merge that plan.selection and plan.merges name. Raises
    PlanError."""
    if section.selection == "tail" and (start.selection != "tail" or len(start.steps) != section.merges):
        raise PlanError(
            f"plan {start.name} has {len(start.steps)} steps and is not a tail merge of plan.merges = {section.merges} "
            "layers; to use the file's own steps, set plan.selection: list"
        )


def named_plan(section: PlanConfig, n_layers: int, pairs: list[tuple[int, int]], alphas: list[float]) -> MergePlan:
    """Averages of these pairs, named after where the coefficients come from."""
    fixed = section.base == "fixed"
    return pairs_plan(
        n_layers,
        pairs,
        alphas,
        name=f"fixed_{section.ratio:g}" if fixed else section.base,
        kind="fixed" if fixed else "file",
        selection=section.selection,
        **options_of(section),
    )


def shuffled_plan(
    section: PlanConfig,
    n_layers: int,
    similarity: Similarity,
    merges: int,
    first: int | None = None,
    *,
    check: Callable[[MergePlan], None] = lambda plan: None,
) -> list[MergePlan]:
    """The starting plan by a similarity whose layers are shuffled, a control: does the similarity matter? One plan, or
    none where no shuffle makes one.

    It merges `merges` layers, as many as the start, whatever plan.threshold is; a block (`first`) stays where it is.
    Where a shuffle leads to entries that are undefined, or to layers that cannot be merged (`check` raises PlanError),
    another one is tried.
    """
    if section.selection == "most_similar":
        section = section.model_copy(update={"merges": merges, "threshold": None})
    for seed in range(SHUFFLE_SEED, SHUFFLE_SEED + _SHUFFLES):
        try:
            found = starting_plan(section, n_layers, similarity.shuffled(seed), first)
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
    section: PlanConfig, n_layers: int, merges: int, checkpoint: Checkpoint | None = None, *, averaged: bool = True
) -> list[int]:
    """The first layers that a block of `merges` layers may have: the given one, or those of plan.starts that fit.

    With plan.block similarity, 0 is left out unless plan.starts has it: layers' outputs are compared, and no layer's
    output enters layer 0. checkpoint: where it is given, and neither plan.block nor plan.starts names layers, blocks
    with layers to which features of images are added are left out; so are, where blocks are `averaged` and not only
    dropped, those whose layers differ in attention from each other or from the layer that takes them in. Raises
    PlanError where none is left.
    """
    fitting = block_starts(n_layers, merges, section.survivor)
    any_first = [first for first in fitting if first > 0 or section.block != "similarity"]
    wanted = any_first if section.starts is None else section.starts
    if isinstance(section.block, int):
        wanted = [section.block]
    if not (found := [first for first in fitting if first in wanted]):
        raise PlanError(
            f"a block of {merges} layers with plan.survivor {section.survivor} must begin with one of layers "
            f"{fitting[0]} to {fitting[-1]} of this model's {n_layers}, but plan.block and plan.starts allow "
            f"{list(wanted)}"
        )
    if checkpoint is None or wanted is not any_first:
        return found
    kinds, before = list(zip(checkpoint.windows, checkpoint.rotary_types, strict=True)), section.survivor == "before"
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
