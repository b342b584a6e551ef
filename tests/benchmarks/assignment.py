"""`assign` against scipy's dense solver, in one process and one run; prints one JSON line a case.

With --model the costs are those of its layers' neighbouring MLP units, deepest pair first; without, those of random
units of the given sizes, half of each unit's direction shared with its match. Times are of the assignment alone.

    python tests/benchmarks/assignment.py --model DIR --pairs 2
    python tests/benchmarks/assignment.py --sizes 896 4864 14336
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from raymerge.alignment import layer_tensors, unit_likeness
from raymerge.assignment import assign
from raymerge.checkpoint import Checkpoint


def model_costs(path: str, pairs: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, costs) of neighbouring layers, from the deepest pair on."""
    checkpoint = Checkpoint(path)
    for deeper in range(checkpoint.n_layers - 1, checkpoint.n_layers - 1 - pairs, -1):
        layers = [layer_tensors(checkpoint, checkpoint.architecture, n) for n in (deeper - 1, deeper)]
        yield f"layers {deeper - 1} and {deeper}", -unit_likeness(*layers, checkpoint.architecture).numpy()


def random_costs(sizes: list[int], width: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, costs) of random units."""
    generator = torch.Generator().manual_seed(0)
    for n in sizes:
        one = torch.randn(n, width, generator=generator)
        two = one[torch.randperm(n, generator=generator)] + torch.randn(n, width, generator=generator)
        # Noise in every direction but a few: real units of two layers are hardly alike.
        two = 0.05 * two + torch.randn(n, width, generator=generator)
        one, two = (torch.nn.functional.normalize(x, dim=1) for x in (one, two))
        yield f"random units of {width} numbers", -(one @ two.T).numpy()


def timed(solve: Callable, cost: np.ndarray) -> tuple[Any, float, float]:
    """(result, wall seconds, CPU seconds); on a busy machine the latter are the ones to compare."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = solve(cost)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint whose neighbouring layers' MLP units are matched")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of layers of the model")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="numbers of random units")
    parser.add_argument("--width", type=int, default=2048, help="numbers that a random unit has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    cases = list(model_costs(options.model, options.pairs)) if options.model else []
    for name, cost in (*cases, *random_costs(options.sizes, options.width)):
        found, seconds, cpu = timed(assign, cost)
        (rows, columns), scipy_seconds, scipy_cpu = timed(linear_sum_assignment, cost)
        total, scipy_total = (float(cost[rows, order].astype(np.float64).sum()) for order in (found, columns))
        print(
            json.dumps(
                {
                    "case": name,
                    "n": len(cost),
                    "seconds": round(seconds, 3),
                    "scipy_seconds": round(scipy_seconds, 3),
                    "cpu_seconds": round(cpu, 3),
                    "scipy_cpu_seconds": round(scipy_cpu, 3),
                    "cpu_ratio": round(scipy_cpu / cpu, 2),
                    "total": total,
                    "total_minus_scipy": total - scipy_total,
                    "same_permutation": bool((found == columns).all()),
                    "threads": options.threads,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
