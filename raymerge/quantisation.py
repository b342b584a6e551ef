"""Weight-only quantisation of a decoder layer's matrices after merging, by torchao (an extra)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raymerge.architectures import Architecture
from raymerge.errors import UserError

GROUP = 32  # columns that share a scale in int4; int8 has one scale a row

_SCALE_BYTES = 2


class QuantisationError(UserError):
    """Weights that cannot be quantised as asked; the message says why."""


def quantise_layer(architecture: Architecture, layer: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """A layer's tensors (relative names) with its matrices rounded to what the quantised model computes with.

    int8: symmetric, one scale a row; int4: symmetric, one scale for every `GROUP` columns of a row. Norms and biases
    stay, and so do routers, as deployed models keep theirs. The result is dequantised, in the dtype that came in:
    accuracy is that of a quantised model, speed is not.
    """
    if scheme == "none":
        return dict(layer)
    matrices = {f"{matrix}.weight" for matrix in architecture.matrices if matrix not in architecture.routers}
    return {name: _rounded(name, tensor, scheme) if name in matrices else tensor for name, tensor in layer.items()}


def _rounded(name: str, weight: Tensor, scheme: str) -> Tensor:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
    except ImportError as error:
        raise QuantisationError("model.quantise needs torchao: pip install 'raymerge[quant]'") from error
    if scheme == "int4" and weight.shape[1] % GROUP:
        raise QuantisationError(f"{name} has {weight.shape[1]} columns, but int4 needs a multiple of {GROUP}: use int8")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    int4 = torch.int4  # type: ignore[attr-defined]  # which torch's stubs lack
    config = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP))
    quantize_(linear, Int8WeightOnlyConfig() if scheme == "int8" else config)
    return linear.weight.dequantize().to(weight.dtype)


def quantised_bytes(rows: int, columns: int, scheme: str) -> int:
    """Bytes of one quantised matrix, scales included."""
    if scheme == "int8":
        return rows * columns + _SCALE_BYTES * rows
    return rows * columns // 2 + _SCALE_BYTES * rows * (columns // GROUP)
