"""Experiments without Ray: workers in the tests' own process, for what does not depend on processes.

A worker of a process of its own takes seconds of a core to start, and so does Tune for each searcher.
"""

import pickle
from contextlib import contextmanager, nullcontext
from itertools import cycle

import pytest

from raymerge.search import BatchSearcher, SearchOutcome
from raymerge.worker import ModelWorker


class LocalPool(nullcontext):
    """What experiments ask of a WorkerPool: workers.count workers (auto: one) take the items in turn, and what they are
    given and what they return is pickled, as between processes. `asked` counts the items of "run"."""

    gpus_per_worker = 0

    def __init__(self, config, inputs, cache, *, template=None, firsts=(), shards_each=None, **_):
        super().__init__(self)
        self.count = 1 if config.workers.count == "auto" else config.workers.count
        shards = {} if shards_each is None else {"shards": shards_each * self.count}
        options = {"roles": inputs.roles, "cache": cache, "template": template, "firsts": tuple(firsts), **shards}
        self.workers = [ModelWorker(config, **options) for _ in range(self.count)]
        self.present = tuple(range(self.count))
        self.asked = 0

    @property
    def worker(self):
        return self.workers[0]

    def map(self, method, items, on_result=None):
        self.asked += len(items) if method == "run" else 0
        results = []
        for number, (worker, item) in enumerate(zip(cycle(self.workers), items)):
            results.append(_sent(getattr(worker, method)(_sent(item))))
            if on_result is not None:
                on_result(number, results[-1])
        return results

    def broadcast(self, method, *args):
        return [_sent(getattr(worker, method)(*_sent(args))) for worker in self.workers]

    def admit(self, method, check):
        for worker in self.workers:
            check(_sent(getattr(worker, method)()))

    # What a searcher asks besides: the worker is there, and stays.

    def name_of(self, slot):
        return f"worker-{slot}"

    def poll(self):
        return []

    def succeeded(self, slot):
        pass


@contextmanager
def opened_locally():
    """All experiments but the search use LocalPools, and no Ray, as long as this lasts; the list of those opened."""
    pools = []

    def opened(*args, **options):
        pools.append(LocalPool(*args, **options))
        return pools[-1]

    with pytest.MonkeyPatch.context() as patch:
        _open_in(patch, opened, "compression_sweep", "layer_similarity", "model_evaluation")
        patch.setattr("raymerge.experiments.planning.open_pool", opened)
        yield pools


@contextmanager
def searched_locally():
    """Searches use a LocalPool, and no Tune, as long as this lasts."""
    with pytest.MonkeyPatch.context() as patch:
        _open_in(patch, LocalPool, "alpha_search")
        patch.setattr("raymerge.experiments.alpha_search.run_search", local_search)
        yield


def _open_in(patch, pool, *experiments):
    for name in experiments:
        patch.setattr(f"raymerge.experiments.{name}.open_pool", pool)
        patch.setattr(f"raymerge.experiments.{name}.runtime", lambda *_: nullcontext())


def _sent(value):
    """What another process gets: a copy, into whose arrays nobody can write, as into those that Ray gives."""
    buffers = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[buffer.raw().tobytes() for buffer in buffers])


def local_search(batches, *, name, storage_path, loggers, method="score", arguments=()):
    """What `run_search` does, without Tune: the pool's worker scores the batches one by one."""
    trial = 0
    while (asked := batches.suggest(f"trial-{trial}")) != BatchSearcher.FINISHED:
        results = _sent(getattr(batches.pool.worker, method)(asked["candidates"], *arguments))
        batches.on_trial_complete(f"trial-{trial}", {"results": results})
        trial += 1
    if batches.failure is not None:
        raise batches.failure
    return SearchOutcome(batches.finished, 1.0, 0.0)
