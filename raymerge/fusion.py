"""(base weights, plan) -> the merged model's weights: a state dict in, a state dict out.

A model is then built from the result with strict loading; no live module is ever edited, so a merge cannot silently
change nothing, as assigning into a module's `state_dict()` does in published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raymerge.architectures import Architecture
from raymerge.checkpoint import Checkpoint
from raymerge.plan import KeptLayer, MergePlan, PlanError


@dataclass(frozen=True, slots=True)
class Receipt:
    """How far one tensor of the merged model is from the base model's tensor of the same name.

    max_abs_change: largest absolute difference; relative_change: Frobenius norm of the difference over that of the
    base tensor. `tensor` is the name in the merged checkpoint.
    """

    tensor: str
    max_abs_change: float
    relative_change: float


def fused_layer(
    base: Mapping[str, Tensor], architecture: Architecture, kept: KeptLayer, *, biases: str = "keep"
) -> dict[str, Tensor]:
    """One merged decoder layer, tensors by relative name, in the stored dtype.

    The matrices (and with biases="merge" their biases) are sum_j c_j W_j, summed in float32 and rounded once to the
    stored dtype; everything else is layer `kept.index`'s own. Raises PlanError where shapes differ between layers.
    """
    prefix = architecture.layer_name(kept.index, "")
    averaged = {f"{matrix}.weight" for matrix in architecture.matrices}
    if biases == "merge":
        averaged |= {f"{matrix}.bias" for matrix in architecture.matrices}
    layer = {}
    for name in base:
        if not name.startswith(prefix):
            continue
        own, relative = base[name], name.removeprefix(prefix)
        if kept.unchanged or relative not in averaged:
            layer[relative] = own
            continue
        total = torch.zeros(own.shape, dtype=torch.float32)
        for source, coefficient in kept.coefficients:
            source_name = architecture.layer_name(source, relative)
            if source_name not in base or base[source_name].shape != own.shape:
                raise PlanError(f"{source_name} is missing or not {tuple(own.shape)} as {name}: they cannot be merged")
            total.add_(base[source_name].float(), alpha=coefficient)
        layer[relative] = total.to(own.dtype)
    return layer


def fused_tensors(base: Mapping[str, Tensor], architecture: Architecture, plan: MergePlan) -> Iterator:
    """(name, tensor) of the merged model, one by one, so that one layer at a time is in memory."""
    layer_root = architecture.layer_prefix.split("{")[0]
    for name in base:
        if not name.startswith(layer_root):
            yield name, base[name]
    for position, kept in enumerate(plan.kept):
        for relative, tensor in fused_layer(base, architecture, kept, biases=plan.biases).items():
            yield architecture.layer_name(position, relative), tensor


def fuse_state_dict(base: Mapping[str, Tensor], architecture: Architecture, plan: MergePlan) -> dict[str, Tensor]:
    """The merged model's whole state dict."""
    return dict(fused_tensors(base, architecture, plan))


def receipts(base: Mapping[str, Tensor], architecture: Architecture, plan: MergePlan) -> list[Receipt]:
    """What the merge changed: a Receipt for every tensor of every layer that is not an unchanged layer in its place.

    A layer that stands where it stood and is a copy of itself is left out; all its changes are zero.
    """
    found = []
    for position, kept in enumerate(plan.kept):
        if kept.unchanged and kept.index == position:
            continue
        for relative, tensor in fused_layer(base, architecture, kept, biases=plan.biases).items():
            name = architecture.layer_name(position, relative)
            before = base[name].float()
            change = tensor.float() - before
            norm = before.norm().item()
            found.append(
                Receipt(
                    name,
                    change.abs().max().item(),
                    change.norm().item() / norm if norm else float(bool(change.any())),
                )
            )
    return found


def check_mergeable(checkpoint: Checkpoint, plan: MergePlan) -> None:
    """Refuse a plan that does not fit the checkpoint, or that averages layers whose attention differs."""
    if plan.n_layers != checkpoint.n_layers:
        raise PlanError(f"the plan is for {plan.n_layers} layers, the model has {checkpoint.n_layers}")
    for kept in plan.kept:
        windows = {checkpoint.windows[source] for source, _ in kept.coefficients} | {checkpoint.windows[kept.index]}
        if len(windows) > 1:
            raise PlanError(
                f"layers {[source for source, _ in kept.coefficients]} would be averaged, but their attention windows "
                f"differ ({', '.join(map(str, windows))} positions; None is full attention)"
            )
