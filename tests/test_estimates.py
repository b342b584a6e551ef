"""memory.py's estimates against the tensors that scoring makes, at the sizes of an 8B model: every large tensor is a
fake one (torch's FakeTensorMode: a shape and a dtype without values), whose bytes are counted while it lives."""

import math

import numpy as np
import pytest
import torch
from test_gpu_benchmark import load
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raymerge.forward import LayerRunner, _SharedPrefix
from raymerge.memory import ScoringPlan, ScoringWork, plan_batches, plan_gradient, scoring_bytes
from raymerge.plan import tail_plan
from raymerge.prompts import Group, Prompts, Shard
from raymerge.scoring import TailScorer
from raymerge.sources import SourceLayers

WIDTH, LAYERS, MERGES = 4096, 32, 13
FIRST = LAYERS - 1 - MERGES
LARGE = 200_000  # values from which on a tensor is a fake one

torch.set_num_threads(1)


class LargeAreFake(TorchFunctionMode):
    """Within, large tensors that are made from nothing are fake ones; what follows from those is too."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros):
            shape = args[0] if isinstance(args[0], tuple | list) else [n for n in args if isinstance(n, int)]
            if math.prod(shape) > LARGE:
                with self.fake:
                    return func(*args, **kwargs)
        return func(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors which were made or read within, and those that are held, had at one time."""

    def __init__(self, held):
        super().__init__()
        storages = [tensor.untyped_storage() for tensor in held]
        self._storages = {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in storages}
        self.held = self.most = sum(nbytes for _, nbytes in self._storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        known = len(self._storages)
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages or self._storages[storage._cdata][0].expired():
                    known = -1
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if known < 0:
            self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
            self.most = max(self.most, sum(nbytes for _, nbytes in self._storages.values()))
        return found


class Trunk:
    """Of a trunk what a scorer asks for: states without values."""

    def __init__(self, runner, fake):
        self.runner, self.first, self._fake = runner, FIRST, fake

    def load(self, shard):
        with self._fake:
            return [
                tuple(torch.empty(n, WIDTH, dtype=torch.bfloat16) for n in sizes) for sizes in map(_sizes, shard.groups)
            ]


def _sizes(group):
    return len(group.prefix), sum(map(len, group.sequences))


def prompts_of(questions, length):
    groups = tuple(
        Group(
            f"s{n}",
            np.full(600, n),
            tuple(np.zeros(length, dtype=np.int64) for _ in range(questions // 2)),
            tuple(range(n * (questions // 2), (n + 1) * (questions // 2))),
        )
        for n in range(2)
    )
    return Prompts((Shard(groups),), (362, 426, 356, 423), np.zeros(questions, dtype=np.int8))


@pytest.fixture(scope="module")
def made():
    """A runner of an 8B model on what is told to be an accelerator, and the mode that its tensors are of."""
    fake, gpu = FakeTensorMode(allow_non_fake_inputs=True), load()

    class Checkpoint(gpu.RandomCheckpoint):
        def __getitem__(self, name):
            with fake:
                return torch.empty(self._where[name], dtype=self._stored)

    runner = LayerRunner(Checkpoint("8b", torch.device("cpu"), torch.bfloat16), dtype=torch.bfloat16)
    runner.accelerated = True
    return runner, fake


@pytest.mark.parametrize(
    ("how", "norms", "questions", "length"),
    [
        (ScoringPlan("device", "recompute", 8, 32768), "keep", 1024, 128),
        (ScoringPlan("device", "recompute", 8, 8192), "keep", 128, 128),
        (ScoringPlan("device", "recompute", 8, 8192), "fold", 128, 128),
        (ScoringPlan("device", "recompute", 1, 32768), "keep", 2048, 128),
        (ScoringPlan("device", "linear", 8, 32768), "keep", 1024, 128),
        (ScoringPlan("device", "linear", 8, 4096), "keep", 4096, 8),  # questions take more than their tokens' chunks
    ],
)
def test_scoring_takes_no_more_than_the_planner_counts_on(made, how, norms, questions, length):
    runner, fake = made
    with LargeAreFake(fake):
        sources = SourceLayers(runner, FIRST, norms=norms)
        scorer = TailScorer(Trunk(runner, fake), prompts_of(questions, length), sources=sources, plan=how)
        plans = [tail_plan(LAYERS, [0.5] * MERGES, name="x", kind="found", norms=norms) for _ in range(how.candidates)]
        layer = scorer.layer
        work = ScoringWork(layer.states.layout.tokens, questions, MERGES + 1, sources.stack_dtype.itemsize, compute=2)
        if how.keys == "linear":
            layer.hold_keys([sources.weights(own, 0, False) for own in sources.stack])
        held = [sources.stack, layer.states.tokens, layer._source_keys]
        with torch.inference_mode(), LiveBytes([tensor for tensor in held if tensor is not None]) as live:
            found = list(scorer._hidden_together(plans))
    assert [tuple(hidden.shape) for hidden in found] == [(questions, WIDTH)] * how.candidates
    planned = scoring_bytes(runner.layer_size, work, how)
    assert 0.5 * planned < live.most <= planned


@pytest.mark.parametrize("gigabytes", [8, 24])
def test_gradients_take_no_more_than_what_is_free(made, gigabytes):
    """Of as many questions as the planner allows, with the merged layer's weights and their gradients, float32."""
    runner, fake = made
    tokens = plan_gradient(runner.layer_size, compute=2, device_free=gigabytes * 10**9)
    with LargeAreFake(fake):
        sources = SourceLayers(runner, FIRST)
        how = ScoringPlan("device", "recompute", 1, 32768)
        scorer = TailScorer(Trunk(runner, fake), prompts_of(2 * (tokens // 256), 128), sources=sources, plan=how)
        with LiveBytes([sources.stack, scorer.layer.states.tokens]) as live:
            (mixed,) = sources.mix(torch.full((1, MERGES + 1), 1.0 / (MERGES + 1)), torch.float32)
            layer = sources.weights(mixed, 0, False)
            leaves = {name: layer[name].detach().requires_grad_() for name in sources.averaged(False)}
            logits = scorer.answer_logits(layer | leaves, 0)
            torch.autograd.grad(logits.square().sum(), list(leaves.values()))
    assert live.most - live.held <= 0.9 * gigabytes * 10**9


@pytest.mark.parametrize("gigabytes", [8, 24, 80])
@pytest.mark.parametrize(("prefix", "length"), [(600, 73), (2400, 73), (0, 1024)])
def test_a_batch_of_the_trunk_takes_no_more_than_its_share(made, gigabytes, prefix, length):
    runner, fake = made
    most, attended = plan_batches(runner.layer_size, compute=2, device_free=gigabytes * 10**9)
    count = max(1, min(most // length, attended // (prefix + length)))
    shared = None
    with torch.inference_mode(), fake:
        weights = runner.checkpoint.layer(0, dtype=torch.bfloat16)
        if prefix:
            shared = _SharedPrefix()
            runner._call(0, weights, torch.empty(1, prefix, WIDTH, dtype=torch.bfloat16), 0, shared)
        x = torch.empty(count, length, WIDTH, dtype=torch.bfloat16)
        with LiveBytes([*weights.values(), x]) as live:
            runner._call(0, weights, x, prefix, shared)
    assert 0 < live.most - live.held <= 0.2 * 0.9 * gigabytes * 10**9
