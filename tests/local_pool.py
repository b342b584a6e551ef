"""Experiments without Ray: one worker in the tests' own process, for what does not depend on processes.

A worker of a process of its own takes seconds of a core to start, and so does Tune for each searcher.
"""

from contextlib import nullcontext

from raymerge.search import BatchSearcher, SearchOutcome
from raymerge.worker import ModelWorker


class LocalPool(nullcontext):
    """What experiments ask of a WorkerPool; `asked` counts the items of "run"."""

    count, gpus_per_worker, present = 1, 0, (0,)

    def __init__(self, config, inputs, cache, *, template=None, firsts=(), shards_each=None, **_):
        super().__init__(self)
        shards = {} if shards_each is None else {"shards": shards_each}
        self.worker = ModelWorker(
            config, roles=inputs.roles, cache=cache, template=template, firsts=tuple(firsts), **shards
        )
        self.asked = 0

    def map(self, method, items, on_result=None):
        self.asked += len(items) if method == "run" else 0
        results = []
        for number, item in enumerate(items):
            results.append(getattr(self.worker, method)(item))
            if on_result is not None:
                on_result(number, results[-1])
        return results

    def broadcast(self, method, *args):
        return [getattr(self.worker, method)(*args)]

    def admit(self, method, check):
        check(getattr(self.worker, method)())

    # What a searcher asks besides: the worker is there, and stays.

    def name_of(self, slot):
        return f"worker-{slot}"

    def poll(self):
        return []

    def succeeded(self, slot):
        pass


def local_search(batches, *, name, storage_path, loggers, method="score", arguments=()):
    """What `run_search` does, without Tune: the pool's worker scores the batches one by one."""
    trial = 0
    while (asked := batches.suggest(f"trial-{trial}")) != BatchSearcher.FINISHED:
        results = getattr(batches.pool.worker, method)(asked["candidates"], *arguments)
        batches.on_trial_complete(f"trial-{trial}", {"results": results})
        trial += 1
    if batches.failure is not None:
        raise batches.failure
    return SearchOutcome(batches.finished, 1.0, 0.0)
