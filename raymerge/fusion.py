"""(base weights, plan) -> the merged model's weights: a state dict in, a state dict out.

A model is then built from the result with strict loading; no live module is ever edited, so a merge cannot silently
change nothing, as assigning into a module's `state_dict()` does in published code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raymerge.alignment import REORDERED, Aligner, fuse_rows, layer_tensors
from raymerge.architectures import Architecture, Permutations, source_tensor
from raymerge.checkpoint import Checkpoint
from raymerge.plan import KeptLayer, MergePlan, PlanError
from raymerge.positions import NO_ROTARY

ALIGNMENTS = ("none", "rows", *REORDERED)
NORMS = ("keep", "fold")

#: (plan, position in the merged model) to the refitted tensors, by relative name, which replace the merged ones.
Refits = Callable[[MergePlan, int], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Receipt:
    """How far one tensor of the merged model is from the base model's tensor of the same name.

    max_abs_change: largest absolute difference; relative_change: Frobenius norm of the difference over that of the
    base tensor. `tensor` is the name in the merged checkpoint. Where the base has no such tensor, zeros stand for it.
    """

    tensor: str
    max_abs_change: float
    relative_change: float


def fused_layer(
    base: Mapping[str, Tensor],
    architecture: Architecture,
    plan: MergePlan,
    position: int,
    *,
    aligner: Aligner | None = None,
    refits: Refits | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The merged model's decoder layer `position`, tensors by relative name, in the stored dtype.

    The matrices (and with biases="merge" their biases) are sum_j c_j W_j with the coefficients that the plan has for
    the matrix, summed in float32 and rounded once to the stored dtype, or to `dtype`; everything else is layer
    `plan.kept[position].index`'s own. With norms="fold" each W_j has its layer's input-norm gains multiplied in, each
    bias has what W_j makes of the input norm's bias added, and the merged layer's input norms only normalise. With
    alignment "neurons" or "activations" the units of every W_j are laid on the kept layer's; with "rows" the steps are
    done in turn, and each matrix's rows matched at every step. A layer that nothing is averaged into stays as it is.
    Refitted tensors, from `refits`, replace the merged ones.
    aligner: where permutations are taken from; made for this call where it is needed and not given.
    Raises PlanError where shapes differ between layers, or for matrix_alphas that cannot be carried out.
    """
    kept = plan.kept[position]
    if plan.matrix_alphas:
        _check_matrices(architecture, plan)
    stored = {source: layer_tensors(base, architecture, source) for source in kept.sources}
    before = stored.get(kept.index) or layer_tensors(base, architecture, kept.index)
    if kept.unchanged:
        return before
    own = dict(before)
    averaged = _averaged(architecture, plan, own)
    for source, tensors in stored.items():
        for name in averaged:
            if name not in tensors or tensors[name].shape != own[name].shape:
                raise PlanError(
                    f"{architecture.layer_name(source, name)} is missing or not {tuple(own[name].shape)} as "
                    f"{architecture.layer_name(kept.index, name)}: they cannot be merged"
                )
    if plan.alignment == "rows":
        sums = _fused_rows(base, architecture, plan, kept, aligner)
    else:
        permutations: Mapping[int, Permutations] = {}
        if plan.alignment in REORDERED:
            permutations = (aligner or _own_aligner(base)).towards(kept.index, stored, plan.alignment)
        sums = _weighted_sums(architecture, plan.norms, kept, stored, averaged, permutations)
    for name, total in sums:
        own[name] = total.to(dtype or own[name].dtype)
    if plan.norms == "fold":
        folded = {f"{norm}.{part}" for norm in architecture.norm_inputs for part in ("weight", "bias")}
        folded |= {f"{matrix}.bias" for readers in architecture.norm_inputs.values() for matrix in readers}
        for name in folded & (before.keys() - set(averaged)):
            own[name] = source_tensor(architecture, before, name, norms="fold").to(before[name].dtype)
    if kept.refitted:
        if refits is None:
            raise PlanError(f"plan {plan.name} is refitted on calibration tokens, which have not been given")
        own |= {name: tensor.to(dtype or own[name].dtype) for name, tensor in refits(plan, position).items()}
    return own


def _averaged(architecture: Architecture, plan: MergePlan, layer: Iterable[str]) -> list[str]:
    """Names of those of a layer's tensors that the plan averages."""
    names = {f"{matrix}.weight" for matrix in architecture.matrices}
    if plan.biases == "merge":
        names |= {f"{matrix}.bias" for matrix in architecture.matrices}
    return [name for name in layer if name in names]


def _weighted_sums(
    architecture: Architecture,
    norms: str,
    kept: KeptLayer,
    stored: Mapping[int, Mapping[str, Tensor]],
    averaged: Iterable[str],
    permutations: Mapping[int, Permutations],
) -> Iterator[tuple[str, Tensor]]:
    """(name, sum over the sources, float32), one tensor at a time."""
    for name in averaged:
        total = None
        for source, coefficient in kept.coefficients_of(name.rpartition(".")[0]):
            order = permutations.get(source)
            tensor = source_tensor(architecture, stored[source], name, norms=norms, permutations=order)
            total = torch.zeros_like(tensor) if total is None else total
            total.add_(tensor, alpha=coefficient)
        assert total is not None  # no layer is made of nothing
        yield name, total


def _fused_rows(
    base: Mapping[str, Tensor],
    architecture: Architecture,
    plan: MergePlan,
    kept: KeptLayer,
    aligner: Aligner | None,
) -> Iterable[tuple[str, Tensor]]:
    """(name, float32 merged tensor), from the steps that end up in the kept layer, with rows matched at each step."""
    group = plan.groups.get(kept.index, ())
    numbers = [number for number, step in enumerate(plan.steps) if step.into in group]
    matches = None if aligner is None else aligner.row_matches(plan)

    def load(layer: int) -> dict[str, Tensor]:
        tensors = layer_tensors(base, architecture, layer)
        averaged = _averaged(architecture, plan, tensors)
        return {name: source_tensor(architecture, tensors, name, norms=plan.norms) for name in averaged}

    if not numbers:  # nothing is merged into a layer that is only refitted, but its gains are folded all the same
        return load(kept.index).items()
    last: dict[str, Tensor] = {}
    steps = [plan.steps[number] for number in numbers]
    own = None if matches is None else [matches[number] for number in numbers]
    for fused, _ in fuse_rows(load, architecture.matrices, steps, own, blocks=architecture.fused_rows):
        last = fused
    return last.items()


def _own_aligner(base: Mapping[str, Tensor]) -> Aligner:
    if not isinstance(base, Checkpoint):
        raise PlanError('alignment "neurons" of weights that are no opened checkpoint needs an aligner')
    return Aligner(base)


def fused_tensors(
    base: Mapping[str, Tensor],
    architecture: Architecture,
    plan: MergePlan,
    *,
    aligner: Aligner | None = None,
    refits: Refits | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the merged model, one by one, so that one layer at a time is in memory."""
    layer_root = architecture.layer_prefix.split("{")[0]
    for name in base:
        if not name.startswith(layer_root):
            yield name, base[name]
    for position in range(len(plan.kept)):
        for relative, tensor in fused_layer(base, architecture, plan, position, aligner=aligner, refits=refits).items():
            yield architecture.layer_name(position, relative), tensor


def receipts(
    base: Mapping[str, Tensor],
    architecture: Architecture,
    plan: MergePlan,
    *,
    aligner: Aligner | None = None,
    refits: Refits | None = None,
) -> list[Receipt]:
    """What the merge changed: a Receipt for every tensor of every layer that is not an unchanged layer in its place.

    A layer that stands where it stood and is a copy of itself is left out; all its changes are zero.
    """
    found = []
    for position, kept in enumerate(plan.kept):
        if kept.unchanged and kept.index == position:
            continue
        for relative, tensor in fused_layer(base, architecture, plan, position, aligner=aligner, refits=refits).items():
            name = architecture.layer_name(position, relative)
            # What no family has, as scales of a cache, need not be in every layer.
            before = base[name].float() if name in base else torch.zeros_like(tensor, dtype=torch.float32)
            change = tensor.float() - before
            found.append(Receipt(name, change.abs().max().item(), _relative_size(change, before)))
    return found


def _relative_size(change: Tensor, before: Tensor) -> float:
    """The Frobenius norm of one over that of the other; of what was 0, 1 for any change."""
    # On CPUs torch adds squares of float32 one by one: the norm of 59 million, a matrix of an 8B, is .5 % too small.
    one, other = (torch.linalg.vector_norm(tensor, dtype=torch.float64).item() for tensor in (change, before))
    return one / other if other else float(bool(change.any()))


def check_mergeable(checkpoint: Checkpoint, plan: MergePlan) -> None:
    """Refuse a plan that does not fit the checkpoint or its family, or that averages layers whose attention differs."""
    for option, allowed in (("alignment", ALIGNMENTS), ("norms", NORMS)):
        if getattr(plan, option) not in allowed:
            raise PlanError(f"{option} is {getattr(plan, option)!r}, but must be one of {', '.join(allowed)}")
    if plan.norms == "fold" or plan.alignment != "none":
        _check_family(checkpoint, plan)
    if plan.matrix_alphas:
        _check_matrices(checkpoint.architecture, plan)
    if plan.n_layers != checkpoint.n_layers:
        raise PlanError(f"the plan is for {plan.n_layers} layers, the model has {checkpoint.n_layers}")
    _check_attention(checkpoint, plan)
    _check_images(checkpoint, plan)


def _check_images(checkpoint: Checkpoint, plan: MergePlan) -> None:
    """Refuse to change or move layers that a multimodal model adds features of images to."""
    first = checkpoint.deepstack_layers
    there = [kept.index for kept in plan.kept if kept.sources == [kept.index]]
    if first and (gone := [layer for layer in range(first) if layer not in there]):
        raise PlanError(
            f"layer {gone[0]} would be merged or removed, but the model adds features of images to what its first "
            f"{first} layers give, by their number (DeepStack): merge and remove only layers from {first} on, with "
            f"plan.starts from {first + 1} on where a block is chosen"
        )


def _check_attention(checkpoint: Checkpoint, plan: MergePlan) -> None:
    """Refuse to average layers whose attention windows or rotary embeddings differ."""
    kinds = list(zip(checkpoint.windows, checkpoint.rotary_types, strict=True))
    for kept in plan.kept:
        together = {*kept.sources, kept.index}
        windows = {checkpoint.windows[source] for source in together}
        if len({kinds[source] for source in together}) > 1:
            alike = [layer for layer, kind in enumerate(kinds) if kind == kinds[kept.index]]
            none = [layer for layer in sorted(together) if checkpoint.rotary_types[layer] == NO_ROTARY]
            without = f" (layers {none} have none)" if none else ""
            differ = (
                f"attention windows differ ({', '.join(map(str, windows))} positions; None is full attention)"
                if len(windows) > 1
                else f"rotary embeddings differ{without}"
            )
            raise PlanError(
                f"layers {sorted(together)} would be averaged, but their {differ}: merge into layer {kept.index} "
                f"only layers of its kind, {alike}; in an alpha file, alpha 1 leaves out those between them"
            )


def _check_family(checkpoint: Checkpoint, plan: MergePlan) -> None:
    """Refuse options that mean nothing, or nothing sound, in a family."""
    architecture = checkpoint.architecture
    if plan.norms == "fold" and (reason := _unfoldable(architecture, set(checkpoint.layer_tensors(0)))):
        raise PlanError(
            f"norms fold multiplies input norms' gains into the matrices that read them, but {architecture.name} "
            f"{reason}: use norms keep"
        )
    if plan.alignment in ("rows", "activations") and architecture.experts:
        reason = {
            "rows": "permutes each matrix alone, which would part a router's rows from their experts",
            "activations": "compares MLP units on the same tokens, but a router sends each expert tokens of its own",
        }[plan.alignment]
        raise PlanError(f"alignment {plan.alignment} {reason}: use neurons or none for {architecture.name}")


def _unfoldable(architecture: Architecture, layer: Collection[str]) -> str | None:
    """Why no gain can be folded, or not exactly, in a layer with these tensors; None where all input norms' can."""
    if not architecture.norm_inputs:
        return "normalises outputs, whose gains no matrix can take up"
    if not any(f"{norm}.weight" in layer for norm in architecture.norm_inputs):
        return "has norms without gains"
    for norm, readers in architecture.norm_inputs.items():
        without = [matrix for matrix in readers if f"{matrix}.bias" not in layer]
        if f"{norm}.bias" in layer and without:
            return f"has a bias in {norm} too, for which {without[0]} would need one here"
    return None


def _check_matrices(architecture: Architecture, plan: MergePlan) -> None:
    """Refuse alphas of matrices that the family does not have, or of a plan that cannot have any."""
    unknown = [matrix for matrix, _ in plan.matrix_alphas if matrix not in architecture.matrices]
    if unknown:
        raise PlanError(
            f"matrix_alphas name {', '.join(unknown)}, but the matrices of {architecture.name} are "
            f"{', '.join(architecture.matrices)}"
        )
    if plan.alignment == "rows":
        raise PlanError(
            'alignment "rows" matches each matrix step by step with the steps\' own alphas: it has no matrix_alphas; '
            'use alignment "none" or "neurons"'
        )
