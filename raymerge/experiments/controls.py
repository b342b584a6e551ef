"""The plans that a search's result is held against.

Only one of them is chosen by what it reaches on the search questions: the best of those that keep a single layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from raymerge.checkpoint import Checkpoint
from raymerge.config import PlanConfig
from raymerge.fusion import check_mergeable
from raymerge.objectives import rank
from raymerge.plan import MergePlan, base_plan, before_last_plan, drop_block_plan, drop_plan, keep_one_plans
from raymerge.plan_section import Similarity, influence_plan, shuffled_plan
from raymerge.progress import Progress

FIXED_CONTROL = PlanConfig().ratio  # the constant that published coefficients amount to


def controls_of(
    section: PlanConfig, checkpoint: Checkpoint, start: MergePlan, similarity: Similarity | None, progress: Progress
) -> list[MergePlan]:
    """The unmerged model, both ways of dropping, the constant, what a similarity run offers, and the start."""
    n_layers, merges = checkpoint.n_layers, len(start.steps)
    controls = [
        base_plan(n_layers),
        drop_plan(n_layers, merges),
        before_last_plan(n_layers, merges),
        *([drop_block_plan(n_layers, start.first_removed, merges)] if start.selection == "block" else []),
        *influence_plan(similarity, merges),
        start.with_alphas([FIXED_CONTROL] * merges, name=f"fixed_{FIXED_CONTROL:g}", kind="fixed"),
    ]
    if similarity is not None and (section.base.startswith("similarity") or section.selection == "most_similar"):
        first = start.first_removed if start.selection == "block" else None
        check = partial(check_mergeable, checkpoint)
        shuffled = shuffled_plan(section, n_layers, similarity, merges, first, check=check)
        if not shuffled:
            progress.message("Warning: no shuffle of the similarity makes a plan that can be a control.")
        controls += shuffled
    if (start.alignment, start.norms) != ("none", "keep"):
        controls.append(replace(start, name=f"{start.name}_plain", alignment="none", norms="keep"))
    same = [control for control in controls if control.plan_id("") == start.plan_id("")]
    return controls if same else [*controls, start]


def keeping_one(start: MergePlan, controls: Sequence[MergePlan]) -> dict[int, MergePlan]:
    """For each layer that the start merges, the plan that keeps it and drops the others; a control, where one does so
    already. What merging adds to the choice of a single layer shows only beside the best of these."""
    dropping = [control for control in controls if set(control.alphas) == {1.0}]
    there = {_layers(control): control for control in reversed(dropping)}
    return {layer: there.get(_layers(plan), plan) for layer, plan in keep_one_plans(start).items()}


def _layers(plan: MergePlan) -> tuple[int, ...]:
    return tuple(layer.index for layer in plan.kept)


def best_kept(keeping: Mapping[int, MergePlan], trials: Iterable[Mapping[str, Any]], identity: str) -> int | None:
    """The layer of the best of these plans by the rows of `trials`; None where none of them could be judged."""
    judged = {row["plan_id"]: row for row in trials if row["searcher"] == "controls" and row["status"] == "ok"}
    ranks = {
        layer: rank(judged[plan_id]) for layer, plan in keeping.items() if (plan_id := plan.plan_id(identity)) in judged
    }
    return max(ranks, key=ranks.__getitem__, default=None)
