"""The memory that merging and saving a model takes beyond what is mapped from its files; one JSON line a plan.

RssAnon of /proc/self/status, sampled every 2 ms, against its value when the model is open and its identity known: pages
of the process's own, without those of mapped files, which the system drops when it needs their place. In units of one
decoder layer and the embeddings as stored. Plans: tail, one merged layer; pairs, every second layer merged into its
neighbour, norms folded, so that every layer written is a new one.

    python tests/benchmarks/memory.py --model DIR
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from raymerge.checkpoint import Checkpoint
from raymerge.merging import save_merged
from raymerge.plan import MergePlan, MergeStep, tail_plan


def own_bytes() -> int:
    """RssAnon in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The largest RssAnon between `start` and `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._done = own_bytes(), threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, own_bytes())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--merges", type=int, default=4)
    parser.add_argument("--scratch", help="where the merged models are written for a moment")
    options = parser.parse_args()
    checkpoint = Checkpoint(options.model)
    n = checkpoint.n_layers
    pairs = tuple(MergeStep(layer, layer + 1, 0.6) for layer in range(1, n - 1, 2))
    plans = {
        "tail": tail_plan(n, [0.6] * options.merges, name="tail", kind="fixed"),
        "pairs": replace(MergePlan(n, pairs, selection="list"), norms="fold"),
    }
    assert checkpoint.identity
    parameters, stored = checkpoint.size()
    _, ends = checkpoint.size([])
    layer = (stored - ends) / n
    for name, plan in plans.items():
        before, began, peak = own_bytes(), time.monotonic(), Peak()
        peak.start()
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            done = save_merged(checkpoint, plan, Path(scratch) / "merged", verify=False)
        added = peak.stop() - before
        print(
            json.dumps(
                {
                    "model": Path(options.model).name,
                    "plan": name,
                    "layers": [n, len(plan.kept)],
                    "written_mb": round(done["bytes"] / 1e6, 1),
                    "layer_mb": round(layer / 1e6, 1),
                    "ends_mb": round(ends / 1e6, 1),
                    "before_mb": round(before / 1e6, 1),
                    "peak_added_mb": round(added / 1e6, 1),
                    "in_layers": round(added / layer, 2),
                    "in_layers_and_ends": round(added / (layer + ends), 3),
                    "share_of_model": round(added / stored, 3),
                    "seconds": round(time.monotonic() - began, 1),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
