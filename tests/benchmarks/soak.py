"""A long search whose actors keep being killed; one JSON line, and exit code 1 if a candidate is lost or there twice.

    python tests/benchmarks/soak.py [--candidates 500] [--every 50] [--workers 3] [--batch 2] [--seed 0]

Scoring is a wait of 50 ms. After about every so many candidates (uniform between half and one and a half times that)
the process of a random actor gets SIGKILL. `again` is how many candidates were computed more than once.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import ray

from raymerge.cluster import start_ray
from raymerge.pool import WorkerPool
from raymerge.proposers import RandomProposer
from raymerge.search import BatchSearcher, run_search

BODY_S = 0.05


class Logged:
    """Waits, and leaves a line for every candidate that it was given and for every process that it was."""

    def __init__(self, folder):
        self.folder = folder
        self.log("pids", [str(os.getpid())])

    def log(self, name, lines):
        with open(os.path.join(self.folder, name), "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def score(self, candidates):
        self.log("scored", [f"{point[0]:.12f}" for point in candidates])
        time.sleep(BODY_S * len(candidates))
        found = {"value": 0.5, "accuracy": 0.5, "nll": 1.0, "n_questions": 1, "seconds": BODY_S}
        return [dict(found) for _ in candidates]

    def process(self):
        return os.getpid()


class Killer:
    """The record of a search, which kills a random actor now and then."""

    def __init__(self, pool, every, seed):
        self.pool, self.every, self.random = pool, every, random.Random(seed)
        self.rows, self.parts, self.kills = [], [], 0
        self.next = self.draw()

    def draw(self):
        return self.random.uniform(0.5, 1.5) * self.every

    def __call__(self, part, rows, results):
        self.parts.append(part)
        self.rows += rows
        if len(self.rows) >= self.next and self.pool.count:
            self.next = len(self.rows) + self.draw()
            victim = ray.get_actor(self.pool.name_of(self.random.choice(self.pool.present)))
            try:
                os.kill(ray.get(victim.call.remote("process"), timeout=30), signal.SIGKILL)
                self.kills += 1
            except ray.exceptions.RayError as error:
                print(f"not killed: {type(error).__name__}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--every", type=int, default=50, help="candidates between two kills, on average")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Ray's processes import this file's worker by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    events = Counter()
    with start_ray(num_cpus=options.workers + 1), tempfile.TemporaryDirectory() as folder:
        pool = WorkerPool(
            Logged, {"folder": folder}, count=options.workers, on_event=lambda kind, *_: events.update([kind])
        )
        with pool:
            record = Killer(pool, options.every, options.seed)
            began = time.perf_counter()
            batches = BatchSearcher(
                RandomProposer(dimensions=13, bounds=(0, 1), seed=options.seed),
                candidates=options.candidates,
                batch=options.batch,
                pool=pool,
                describe=lambda _: {"searcher": "random"},
                minimise=False,
                record=record,
            )
            outcome = run_search(batches, name="random", storage_path=folder)
            seconds = time.perf_counter() - began
        scored = Counter(Path(folder, "scored").read_text().split())
        processes = len(Path(folder, "pids").read_text().split())
    numbers = Counter(row["iteration"] for row in record.rows)
    found = {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "candidates": options.candidates,
        "rows": len(record.rows),
        "lost": options.candidates - len(numbers),
        "twice": sum(count > 1 for count in numbers.values()),
        "failed": sum(row["status"] != "ok" for row in record.rows),
        "kills": record.kills,
        "events": dict(events),
        "processes": processes,
        "again": sum(count > 1 for count in scored.values()),
        "again_at_most": record.kills * options.batch,
        "seconds": round(seconds, 1),
        "share_not_scoring": round(outcome.share_not_scoring, 3),
    }
    print(json.dumps(found))
    whole = set(numbers) == set(range(options.candidates)) and len(record.rows) == options.candidates
    sys.exit(0 if whole and not found["failed"] else 1)


if __name__ == "__main__":
    main()
