"""Every family's layers, scoring and descents on CUDA tensors without values: no operation mixes devices or dtypes.

    PYTHONPATH=. python tests/benchmarks/fake_cuda.py [FAMILY…]

No card is needed, but a torch that is built for CUDA (one built for CPUs cannot index such tensors). Shapes, dtypes and
devices are those of torch's own FakeTensorMode; the models are the tests' tiny random ones in bfloat16. Run are: the
layers of a merged model on whole prompts, MLP units' values, candidates one by one and two at a time with keys summed
and recomputed, norms kept and folded, and the logits that a descent differentiates (the backward pass asks for a real
card). Anything that waited for a value of the device would be an error too. A JSON line for each family; exit code 1 if
any failed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from raymerge.alignment import AlignmentError
from raymerge.checkpoint import Checkpoint
from raymerge.forward import LayerRunner
from raymerge.fusion import check_mergeable
from raymerge.memory import ScoringPlan
from raymerge.plan import MergePlan, PlanError, drop_plan, tail_plan
from raymerge.prompts import Prompts, Shard, encode_questions
from raymerge.scoring import TailScorer
from raymerge.sources import SourceLayers

DEVICE = torch.device("cuda", 0)
N, FIRST = tiny.N_LAYERS, tiny.N_LAYERS - 3


class CudaIsFake(TorchFunctionMode):
    """Within, tensors on a CUDA device are fake ones; those on the CPU have values."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def _lifted(self, value: Any) -> Any:
        is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if is_real else value

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is torch.tensor:  # of numbers: made on the CPU and moved, as torch does
            made = func(*args, **{key: value for key, value in kwargs.items() if key != "device"})
            func, args, kwargs = Tensor.to, (made, DEVICE), {}
        with torch._C.DisableTorchFunction():
            args, kwargs = tree_map(self._lifted, args), tree_map(self._lifted, kwargs)
        with self.fake:
            return func(*args, **kwargs)


class HeldCheckpoint(Checkpoint):
    """A checkpoint that is read before there are fake tensors, which safetensors does not know."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._held = {name: super(HeldCheckpoint, self).__getitem__(name).clone() for name in self}

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name]


class Trunk:
    """Of a trunk what a scorer asks for: states without values."""

    def __init__(self, runner: LayerRunner, fake: FakeTensorMode) -> None:
        self.runner, self.first, self._fake = runner, FIRST, fake

    def load(self, shard: Shard) -> list[tuple[Tensor, ...]]:
        width = self.runner.checkpoint.config.hidden_size
        sizes = [(len(group.prefix), sum(map(len, group.sequences))) for group in shard.groups]
        with self.fake_tensors():
            return [tuple(torch.empty(n, width, dtype=self.runner.dtype) for n in own) for own in sizes]

    def fake_tensors(self) -> FakeTensorMode:
        return self._fake


def checked(checkpoint: Checkpoint, prompts: Prompts) -> Iterator[str]:
    """What was run, one after another."""
    mode = CudaIsFake()
    with mode:
        runner = LayerRunner(checkpoint, device=DEVICE, dtype=torch.bfloat16)
        merge = tail_plan(N, [0.5, 0.3], name="x", kind="found")
        with torch.inference_mode():
            for plan in (drop_plan(N, 2), merge):
                with suppress(PlanError):  # of layers that differ in attention
                    check_mergeable(checkpoint, plan)
                    states = runner.run(runner.embed(prompts.shards[0]), runner.plan_layers(plan))
                    _, last = states[0].last()
                    placed(runner.vocabulary.normalise(last), torch.float32, torch.bfloat16)
                    yield f"layers of {plan.kind}"
            with suppress(AlignmentError):  # of experts
                placed(runner.mlp_units(runner.embed(prompts.shards[0]), 1), torch.bfloat16, torch.float32)
                yield "units"
        for norms in ("keep", "fold"):
            found = tail_plan(N, [0.5, 0.3], name="x", kind="found", norms=norms)
            with suppress(PlanError):
                check_mergeable(checkpoint, found)
                yield from scored(runner, prompts, found, mode.fake)


def scored(runner: LayerRunner, prompts: Prompts, plan: MergePlan, fake: FakeTensorMode) -> Iterator[str]:
    sources, trunk = SourceLayers(runner, FIRST, norms=plan.norms), Trunk(runner, fake)
    for keys, together in (("recompute", 1), ("recompute", 2), ("linear", 2)):
        how = ScoringPlan("device", keys, together, 4096)
        scorer = TailScorer(trunk, prompts, sources=sources, plan=how)
        if keys == "linear" and not scorer._is_linear:
            continue
        with torch.inference_mode():
            for hidden in scorer._hidden_together([plan] * together):
                placed(hidden, torch.float32)
        yield f"{together} with keys {keys}, norms {plan.norms}"
    placed(scorer.logits(scorer.coefficients(plan).requires_grad_()), torch.float32)
    yield f"descent, norms {plan.norms}"


def placed(tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.device.type != "cuda" or tensor.dtype not in dtypes:
        raise AssertionError(f"a tensor on {tensor.device} in {tensor.dtype}")


def card() -> None:
    """Answer what torch asks a driver for: an idle H100."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.mem_get_info = lambda *_: (80 * 10**9, 80 * 10**9)
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda *_: 0
    torch.cuda.get_per_process_memory_fraction = lambda *_: 1.0


def main() -> int:
    if torch.version.cuda is None:
        sys.exit("this torch is built for CPUs: install one that is built for CUDA (no card is needed)")
    card()
    prompts = encode_questions(tiny.make_questions({"cats": 3, "roads": 2}), tiny.demo_tokenizer())
    failed = 0
    for kind in sys.argv[1:] or [*tiny.FAMILIES, *tiny.MULTIMODAL]:
        make = tiny.make_multimodal if kind in tiny.MULTIMODAL and kind not in tiny.FAMILIES else tiny.make_checkpoint
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = HeldCheckpoint(str(make(Path(folder) / "model", kind, dtype=torch.bfloat16)))
            ran: list[str] = []
            try:
                ran.extend(checked(checkpoint, prompts))
                print(json.dumps({"kind": kind, "ran": ran}), flush=True)
            except Exception as error:
                traceback.print_exc()
                print(json.dumps({"kind": kind, "failed": f"{type(error).__name__}: {error}"}), flush=True)
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
