"""Memory of 1, 2 and 4 actors that hold the same model and score candidates; one JSON line.

    python tests/benchmarks/actor_memory.py --model DIR [--mmlu DIR] [--merges 4] [--dtype bfloat16] [--actors 1 2 4]

Proportional set size (/proc/PID/smaps_rollup): a page that several processes map counts for each by its share, so the
sum over actors is what they take together. After every actor has scored four candidates.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from raymerge.checkpoint import Checkpoint
from raymerge.cluster import start_ray
from raymerge.config_file import load_config
from raymerge.inputs import SEARCH
from raymerge.plan import tail_plan
from raymerge.pool import WorkerPool
from raymerge.worker import ModelWorker


def read_memory(pid):
    """Megabytes of a process: proportional, resident, private."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return [round(value / 1024) for value in (kilobytes["Pss"], kilobytes["Rss"], private)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--mmlu", default="demo")
    parser.add_argument("--subjects", default="all")
    parser.add_argument("--merges", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    config = load_config(
        None,
        [
            f"model.path={options.model}",
            f"model.dtype={options.dtype}",
            f"data.mmlu={options.mmlu}",
            f"data.subjects={options.subjects}",
            "data.limit_per_subject=2",
            "data.shots=1",
            "data.perplexity_text=null",
        ],
    )
    n_layers = Checkpoint(options.model).n_layers
    template = tail_plan(n_layers, [0.5] * options.merges, name="candidate", kind="found")
    found = {"cores": os.cpu_count(), "model": options.model, "dtype": options.dtype, "merges": options.merges}
    with start_ray(num_cpus=max(options.actors)), tempfile.TemporaryDirectory() as cache:
        for actors in options.actors:
            kwargs = {
                "config": config,
                "roles": (SEARCH,),
                "cache": cache,
                "template": template,
                "firsts": (template.resumes_at,),
            }
            with WorkerPool(ModelWorker, kwargs, count=actors) as pool:
                while pool.awaited:
                    pool.poll()
                    time.sleep(0.2)
                (tokens,) = pool.map("shard_tokens", [SEARCH])
                pool.map("compute_trunk", [(SEARCH, number) for number in range(len(tokens))])
                pool.broadcast("score", [[0.1 * n] * options.merges for n in range(4)])
                memory = [read_memory(worker["pid"]) for worker in pool.broadcast("describe")]
            pss, rss, private = zip(*memory, strict=True)
            found[f"actors_{actors}"] = {
                "pss_mb": pss,
                "rss_mb": rss,
                "private_mb": private,
                "pss_together_mb": sum(pss),
                "rss_together_mb": sum(rss),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
