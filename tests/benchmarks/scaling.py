"""Candidates per second by number of actors, where scoring is a wait; one JSON line.

    python tests/benchmarks/scaling.py [--seconds 8] [--actors 1 2 4 8]

This measures the runtime - Tune, Ray, the searcher - and not scoring: a wait takes no CPU, so more actors than cores
are no contradiction. Batches as `raymerge search` chooses them. `steady` is the rate of the second half of the batches,
when all of Tune's trial actors run (each takes seconds of a core to start, so that many actors on few cores need a long
search); `whole` is from the call to its end; ideal is actors / body.
"""

import argparse
import json
import os
import sys
import tempfile
import time

from raymerge.cluster import start_ray
from raymerge.pool import WorkerPool
from raymerge.proposers import RandomProposer
from raymerge.search import BatchSearcher, choose_batch, run_search

BODIES_S = (0.02, 0.2)


class Sleeper:
    def __init__(self, body):
        self.body = body

    def score(self, candidates):
        time.sleep(self.body * len(candidates))
        found = {"value": 0.5, "accuracy": 0.5, "nll": 1.0, "n_questions": 1, "seconds": self.body}
        return [dict(found) for _ in candidates]


def measure(body, actors, seconds):
    """One search that would take `seconds` without overhead."""
    candidates = max(10 * actors, int(seconds * actors / body))
    batch = choose_batch(body, candidates, actors)
    records = []
    with tempfile.TemporaryDirectory() as folder, WorkerPool(Sleeper, {"body": body}, count=actors) as pool:
        began = time.perf_counter()
        batches = BatchSearcher(
            RandomProposer(dimensions=13, bounds=(0, 1), seed=0),
            candidates=candidates,
            batch=batch,
            pool=pool,
            describe=lambda _: {"searcher": "random"},
            minimise=False,
            record=lambda part, rows, results: records.append((time.perf_counter(), len(rows))),
        )
        outcome = run_search(batches, name="random", storage_path=folder)
        whole = time.perf_counter() - began
    half = records[len(records) // 2 - 1 :]
    steady = sum(count for _, count in half[1:]) / (half[-1][0] - half[0][0])
    return {
        "candidates": candidates,
        "batch": batch,
        "ideal": round(actors / body, 1),
        "steady": round(steady, 1),
        "whole": round(candidates / whole, 1),
        "share_of_ideal": round(steady * body / actors, 3),
        "share_not_scoring": round(outcome.share_not_scoring, 3),
        "load": round(os.getloadavg()[0], 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each search, without overhead")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    # Ray's processes import this file's worker by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    found = {"cores": os.cpu_count()}
    with start_ray(num_cpus=max(options.actors) + 1):
        for body in BODIES_S:
            for actors in options.actors:
                key = f"{1000 * body:.0f}ms_{actors}"
                found[key] = measure(body, actors, options.seconds)
                print(key, found[key], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
