"""The layers that candidates are made of, side by side in memory: mixing them is a matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from raymerge.alignment import REORDERED, layer_tensors
from raymerge.architectures import Permutations, source_tensor
from raymerge.forward import LayerRunner


class SourceLayers:
    """The weights of the layers from `first` on, stacked so that mixing them is a single matrix product.

    stack: (sources, parameters of one layer), matrices and then biases; made when first asked for. float32, on an
    accelerator the stored dtype where that loses nothing (folded gains would be rounded twice). Mixing several
    candidates at once reads it once: a candidate's mix is otherwise bound by memory (9 merges of a 0.5B model read
    600 MB).
    norms: as plans have it; with "fold" the norms' gains are in the stacked matrices, and their biases in the stacked
    biases. alignment: as plans have it, but not "rows"; units are laid on those of layer `first`. Which layer of the
    group they are laid on does not matter: the mix is then the same units in another order.
    """

    def __init__(
        self,
        runner: LayerRunner,
        first: int,
        *,
        norms: str = "keep",
        alignment: str = "none",
    ):
        checkpoint, arch = runner.checkpoint, runner.checkpoint.architecture
        self.norms = norms
        self.alignment = alignment
        self.count = checkpoint.n_layers - first
        self.runner = runner
        self.first = first
        present = set(checkpoint.layer_tensors(first))
        matrices = [f"{matrix}.weight" for matrix in arch.matrices]
        self._biases = [f"{matrix}.bias" for matrix in arch.matrices if f"{matrix}.bias" in present]
        self._names = matrices + self._biases
        self._matrix_of = [arch.matrices.index(name.rpartition(".")[0]) for name in self._names]
        self._shapes = [checkpoint[arch.layer_name(first, name)].shape for name in self._names]
        self._sizes = [shape.numel() for shape in self._shapes]
        narrow = runner.accelerated and norms == "keep"
        self.stack_dtype = checkpoint.dtype if narrow else torch.float32
        # An accelerator mixes some columns at a time, so that widened weights and unrounded sums take less room.
        self._columns = -(-sum(self._sizes) // 8) if runner.accelerated else sum(self._sizes)

    # Made outside inference mode, even if first asked for inside it: gradients are taken through them as well.

    @cached_property
    @torch.inference_mode(False)
    def stack(self) -> Tensor:
        checkpoint, arch = self.runner.checkpoint, self.runner.checkpoint.architecture
        stack = torch.empty(self.count, sum(self._sizes), dtype=self.stack_dtype, device=self.runner.device)
        for j, row in enumerate(stack):
            layer = self.first + j
            stored = layer_tensors(checkpoint, arch, layer)
            tensors = {name: tensor.to(self.runner.device) for name, tensor in stored.items()}
            for part, name in zip(row.split(self._sizes), self._names, strict=True):
                order = self._orders.get(layer)
                part.copy_(source_tensor(arch, tensors, name, norms=self.norms, permutations=order).reshape(-1))
        return stack

    @cached_property
    def _orders(self) -> dict[int, Permutations]:
        """By layer, how its units are laid on those of layer `first`."""
        if self.alignment not in REORDERED:
            return {}
        layers = range(self.first, self.runner.checkpoint.n_layers)
        return self.runner.aligner.towards(self.first, layers, self.alignment)

    @cached_property
    @torch.inference_mode(False)
    def _others(self) -> list[dict[str, Tensor]]:
        """The tensors of each source layer that are not averaged, by relative name. Folded norms only normalise;
        gains of single units (OLMo's of queries and keys) are permuted with the units."""
        checkpoint, arch = self.runner.checkpoint, self.runner.checkpoint.architecture
        others = []
        for layer in range(self.first, checkpoint.n_layers):
            tensors, order = layer_tensors(checkpoint, arch, layer), self._orders.get(layer)
            others.append(
                {
                    name: source_tensor(arch, tensors, name, norms=self.norms, permutations=order).to(
                        self.runner.device
                    )
                    for name in tensors
                    if name not in self._names
                }
            )
        return others

    def mix(self, coefficients: Tensor, dtype: torch.dtype, out_dtype: torch.dtype = torch.float32) -> Tensor:
        """(candidates, sources) coefficients to (candidates, parameters), summed in float32, rounded to `dtype` and
        given in `out_dtype`.

        Coefficients may also be (candidates, matrices, sources), one row for each of the family's matrices.
        """
        coefficients = coefficients.to(self.stack.device, torch.float32)
        if coefficients.ndim == 2:
            parts = [(coefficients, part) for part in self.stack.split(self._columns, 1)]
        else:
            matrices = zip(self._matrix_of, self.stack.split(self._sizes, dim=1), strict=True)
            parts = [(coefficients[:, matrix], part) for matrix, part in matrices]
        mixed = ((own @ part.float()).to(dtype).to(out_dtype) for own, part in parts)
        if len(parts) == 1:
            return next(mixed)
        if coefficients.requires_grad:
            return torch.cat(list(mixed), dim=1)
        # Into their place: joining them would hold every candidate's weights twice.
        found = torch.empty(len(coefficients), self.stack.shape[1], dtype=out_dtype, device=self.stack.device)
        for place, own in zip(found.split([part.shape[1] for _, part in parts], 1), mixed, strict=True):
            place.copy_(own)
        return found

    def averaged(self, merge_biases: bool) -> list[str]:
        """Names of the tensors that are averaged, as `weights` gives them."""
        return self._names if merge_biases else self._names[: len(self._names) - len(self._biases)]

    def pull_back(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients with respect to averaged tensors (by name) to those with respect to coefficients: (matrices,
        sources) float64, <W_j, dW>.

        Their sum over the matrices is the gradient with respect to coefficients that all matrices share.
        """
        count = len(self.runner.checkpoint.architecture.matrices)
        found = torch.zeros(count, self.count, dtype=torch.float64)
        parts = zip(self._names, self._matrix_of, self.stack.split(self._sizes, dim=1), strict=True)
        for name, matrix, part in parts:
            if (gradient := gradients.get(name)) is not None:
                pieces = zip(part.split(self._columns, 1), gradient.reshape(-1).split(self._columns), strict=True)
                for piece, own in pieces:
                    found[matrix] += (piece.float() @ own.float()).double().cpu()
        return found

    def weights(self, mixed: Tensor, survivor: int, merge_biases: bool) -> dict[str, Tensor]:
        """One candidate's layer: its mixed matrices, with the norms and, unless they are merged, the biases of source
        layer `survivor`, counted from 0.

        mixed may be (candidates, parameters) of several that have the survivor in common: what is `averaged` then has
        this axis too.
        """
        parts = zip(self._names, mixed.split(self._sizes, -1), self._shapes, strict=True)
        weights = {name: part.unflatten(-1, shape) for name, part, shape in parts}
        if not merge_biases:
            own = self.stack[survivor].split(self._sizes)[-len(self._biases) :] if self._biases else ()
            # As saved: what folding adds to a bias is rounded with it.
            kept, stored = zip(self._biases, own, strict=True), self.runner.checkpoint.dtype
            weights.update((name, bias.to(stored).float()) for name, bias in kept)
        return weights | self._others[survivor]
