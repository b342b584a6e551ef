"""What Ray Tune costs a candidate, and what the proposers find; one JSON line.

    python tests/benchmarks/search.py [--trials 20] [--seeds 4] [--candidates 60]

Overhead: a worker that sleeps 20 ms a candidate, behind Tune with batches of 1, 4 and 10 and behind a plain ray.wait
loop, same pool, same run; two workers; from the first batch's record to the last one's, Tune's start and end apart.
This measures the runtime, not scoring. Proposers: best value among the first 30 and among all candidates, mean over
seeds, on made-up objectives, the first two of 13 dimensions. `bump` is smooth in the alphas.
`staircase` is the share of 200 made-up questions, each right while the effective coefficients are near enough
to a hidden vector on its own scale; `blocks` is a loss, negative, of where a block of 4 of 24 layers begins - a valley
with noise of its own for every start, as dropping blocks of a real model has - and of coefficients whose best ones move
with the start; `true_value` judges the point that looked best by 4,000 such questions. Both are
made up: they rank settings, and say nothing about a model.
"""

import argparse
import json
import os
import sys
import tempfile
import time

import numpy as np

from raymerge.cluster import start_ray
from raymerge.plan import tail_coefficients
from raymerge.pool import WorkerPool
from raymerge.proposers import BayesProposer, RandomProposer
from raymerge.search import BatchSearcher, run_search

BODY_S = 0.02
STEPS = 13
BLOCK, BLOCK_STARTS = 4, range(1, 21)
WORKERS = 2


class Sleeper:
    def score(self, candidates):
        time.sleep(BODY_S * len(candidates))
        found = {"value": 0.5, "accuracy": 0.5, "nll": 1.0, "n_questions": 1, "seconds": BODY_S}
        return [dict(found) for _ in candidates]


def overhead(trials):
    """Wall milliseconds over the ideal, for a trial and for a candidate, by batch size; and candidates per second."""
    found = {}
    with start_ray(num_cpus=4), tempfile.TemporaryDirectory() as folder:
        with WorkerPool(Sleeper, {}, count=WORKERS) as pool:
            for batch in (1, 4, 10):
                items = [[[0.5]] * batch] * trials
                began = time.perf_counter()
                pool.map("score", items)
                direct = time.perf_counter() - began
                records = []
                began = time.perf_counter()
                batches = BatchSearcher(
                    RandomProposer(dimensions=STEPS, bounds=(0, 1), seed=0),
                    candidates=batch * trials,
                    batch=batch,
                    pool=pool,
                    concurrent=WORKERS,
                    describe=lambda _: {"searcher": "random"},
                    minimise=False,
                    record=lambda part, rows, results, times=records: times.append(time.perf_counter()),
                )
                run_search(batches, name="random", storage_path=folder)
                ended = time.perf_counter()
                tune, ideal = (records[-1] - records[0]) / (trials - 1), batch * BODY_S / WORKERS
                found[f"q{batch}"] = {
                    "first_record_after_seconds": round(records[0] - began, 2),
                    "last_record_to_end_seconds": round(ended - records[-1], 2),
                    "overhead_ms_per_trial": round(1e3 * (tune - ideal), 1),
                    "overhead_ms_per_candidate": round(1e3 * (tune - ideal) / batch, 1),
                    "candidates_per_second": round(batch / tune, 1),
                    "direct_candidates_per_second": round(trials * batch / direct, 1),
                }
    return found


def bump(seed):
    target = np.random.default_rng(seed).uniform(0.2, 0.8, STEPS)

    def value(point):
        return float(np.exp(-8.0 * np.mean((np.array(point) - target) ** 2)))

    return value, value


def staircase(seed, seen=200, unseen=4000):
    rng = np.random.default_rng(1000 + seed)
    target = tail_coefficients(rng.uniform(0.1, 0.9, STEPS))
    mixed = rng.normal(size=(STEPS + 1, STEPS + 9)) / np.sqrt(STEPS + 9)
    metric = mixed @ mixed.T + 0.3 * np.eye(STEPS + 1)
    margin, slope = rng.normal(1.2, 1.2, unseen), 2.5 * rng.normal(size=(unseen, STEPS + 1))
    curvature = rng.uniform(6, 16, unseen)

    def share(point, questions):
        away = tail_coefficients(point) - target
        return float((margin - slope @ away - away @ metric @ away * curvature > 0)[:questions].mean())

    return lambda point: share(point, seen), lambda point: share(point, unseen)


def blocks(seed):
    rng = np.random.default_rng(2000 + seed)
    centre, rough = rng.uniform(6, 15), rng.normal(0, 0.15, BLOCK_STARTS[-1] + 1)
    low, high = (tail_coefficients(rng.uniform(0.1, 0.9, BLOCK)) for _ in range(2))

    def value(point):
        first = int(point[0])
        share = (first - BLOCK_STARTS[0]) / (len(BLOCK_STARTS) - 1)
        away = tail_coefficients(point[1:]) - (low + share * (high - low))
        return float(-8.0 * (1.0 - np.exp(-(((first - centre) / 6.0) ** 2))) - rough[first] - 2.0 * away @ away)

    return value, value


def proposers(seeds, candidates):
    settings = {
        "random": lambda **common: RandomProposer(**common),
        "bayes": lambda **common: BayesProposer(**common),
        "bayes_warped": lambda **common: BayesProposer(**common, warp=tail_coefficients),
    }
    found = {}
    for objective in (bump, staircase, blocks):
        known, dimensions, choices = [[0.6225] * STEPS], STEPS, ()
        if objective is blocks:
            known, dimensions, choices = [[10.0] + [0.6225] * BLOCK], BLOCK, BLOCK_STARTS
        for name, make in settings.items():
            rows, began = [], time.perf_counter()
            for seed in range(seeds):
                value, truth = objective(seed)
                proposer = make(dimensions=dimensions, bounds=(0.0, 1.0), seed=seed, known=known, choices=choices)
                points, values = [], []
                for _ in range(candidates):
                    points += proposer.ask(1)
                    values.append(value(points[-1]))
                    proposer.tell(points[-1], values[-1])
                rows.append((max(values[:30]), max(values), truth(points[int(np.argmax(values))])))
            mean = np.mean(rows, axis=0)
            found[f"{objective.__name__}_{name}"] = {
                "best_of_30": round(mean[0], 4),
                f"best_of_{candidates}": round(mean[1], 4),
                "true_value": round(mean[2], 4),
                "standard_error": round(float(np.std(np.array(rows)[:, 2], ddof=1) / np.sqrt(seeds)), 4),
                "ms_per_proposal": round(1e3 * (time.perf_counter() - began) / seeds / candidates, 1),
            }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=20, help="Tune trials for each batch size")
    parser.add_argument("--seeds", type=int, default=4, help="searches a proposer and objective, at least 2")
    parser.add_argument("--candidates", type=int, default=60, help="candidates a search")
    options = parser.parse_args()
    # Ray's processes import this file's worker by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    result = {
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "body_ms": 1e3 * BODY_S,
        "workers": WORKERS,
        "overhead": overhead(options.trials),
        "proposers": proposers(options.seeds, options.candidates),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
