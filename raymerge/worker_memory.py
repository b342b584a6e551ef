"""How much memory a worker takes: of a machine, by which workers on CPUs are counted, and of an accelerator."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from raymerge.checkpoint import Checkpoint
from raymerge.errors import UserError
from raymerge.plan import MergePlan
from raymerge.questions import Question, question_text

SCORERS_HELD = 2  # a search has two: of the questions it searches on and of those it reports on
_LIBRARIES = 450_000_000  # bytes that a process holds for itself with torch, transformers and Ray loaded


class TooLargeError(UserError):
    """A model that does not fit into the accelerator memory of one worker; the message has the bytes."""


def host_bytes(
    checkpoint: Checkpoint, plans: Iterable[MergePlan], *, questions: Iterable[Question] = (), refits: bool = False
) -> int:
    """About the memory that a worker on CPUs holds for itself, to choose how many there are by: libraries, eight layers
    in float32 (what is converted to run, and candidates that are scored at once), the layers that scorers of these
    plans mix (`SourceLayers`, of as many stacks as are held), the float32 states of these questions' own tokens, of
    some four bytes of text each (`TailStates`), for refits six squares of the MLP's width in float64
    (`normal_equations`). Not the mapped checkpoint, which workers share.

    Measured on a 1.5B model (docs/results.md, 2026-11-29): a search 2.4 GB for K = 4, here 2.9, and 4.2 GB for K = 13,
    here 4.6; a sweep 1.9 GB, here 2.0, and with refits 4.9 GB, here 5.8.
    """
    stacks = sorted({checkpoint.n_layers - plan.resumes_at for plan in plans if plan.ends_at_once})
    mixed = sum(stacks[-SCORERS_HELD:])
    layer = max(_layer_sizes(checkpoint))
    states = checkpoint.config.hidden_size * sum(len(question_text(question).encode()) // 4 for question in questions)
    squares = 6 * refits * checkpoint.architecture.sizes["units"] ** 2
    floats, doubles = (8 + mixed) * layer + states, squares
    return _LIBRARIES + floats * torch.float32.itemsize + doubles * torch.float64.itemsize


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype, template: MergePlan | None) -> int:
    """Bytes of the weights that a worker holds on an accelerator: every layer in the compute dtype, and for a search
    the layers that are mixed once more, as `SourceLayers` stacks them."""
    sizes = _layer_sizes(checkpoint)
    mixed = 0 if template is None else sum(sizes[template.resumes_at :])
    stacked = checkpoint.dtype if template is None or template.norms == "keep" else torch.float32
    return sum(sizes) * dtype.itemsize + stacked.itemsize * mixed


def refuse_oversized(checkpoint: Checkpoint, dtype: torch.dtype, template: MergePlan | None, free: int) -> None:
    """Raise TooLargeError where a worker's weights alone are more than `free` bytes."""
    needed = weight_bytes(checkpoint, dtype, template)
    if needed > free:
        raise TooLargeError(
            f"{checkpoint.directory.name} in {str(dtype).removeprefix('torch.')} needs {needed / 1e9:.2f} GB for "
            f"weights alone, but this worker's share of the GPU has {free / 1e9:.2f} GB free: give a worker a whole, "
            "larger GPU (workers.gpus_per_worker: 1), a smaller model.dtype, fewer merges, or CPUs "
            "(workers.gpus_per_worker: 0). A model is not split over GPUs: every layer is run on one"
        )


def _layer_sizes(checkpoint: Checkpoint) -> list[int]:
    """Parameters of each decoder layer, from the files' headers."""
    name = checkpoint.architecture.layer_name
    return [
        sum(math.prod(checkpoint.stored(name(layer, tensor))[1]) for tensor in checkpoint.layer_tensors(layer))
        for layer in range(checkpoint.n_layers)
    ]
