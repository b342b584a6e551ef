"""Refits over the pool: each fit's sums by shares of the calibration, one worker a share, solved by one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from raymerge.config import Config
from raymerge.experiments.common import Inputs
from raymerge.inputs import CALIBRATION
from raymerge.plan import REFITS_BEYOND, MergePlan, Refit
from raymerge.pool import WorkerPool
from raymerge.progress import Progress
from raymerge.refit import check_refittable, steps_of
from raymerge.role_prompts import calibration_identity
from raymerge.tables import RunDirectory


def refit_of(config: Config, inputs: Inputs, method: str) -> Refit | None:
    """The refit that the configuration asks for by a method; None for none."""
    if method == "none":
        return None
    return Refit(
        method=method,
        ridge=config.plan.ridge,
        layers=config.plan.refit_layers if method in REFITS_BEYOND else 0,
        calibration=calibration_identity(config, inputs, inputs.checkpoint),
    )


def fit(pool: WorkerPool, plans: Sequence[MergePlan], inputs: Inputs, run: RunDirectory, progress: Progress) -> None:
    """Make the fits of every refitted plan, one plan after the other, and store how they went in table `refits`.

    Layers are fitted in order, each on what those before it give, so that the calibration's shards are what is worked
    on in parallel. What is in the cache is not fitted again. Raises RefitError.
    """
    refits = [(plan, plan.refit) for plan in plans if plan.refit is not None]
    if not refits:
        return
    for plan, _ in refits:
        check_refittable(inputs.checkpoint, plan)
    identity = inputs.checkpoint.identity
    stored = set(run.read("refits", ["plan_id"])["plan_id"].to_pylist())
    (shards,) = pool.map("shard_tokens", [CALIBRATION])
    numbers = range(len(shards))
    progress.stage("fits", sum(len(steps_of(plan)) for plan, _ in refits))
    made = 0
    for plan, refit in refits:
        steps, began = len(steps_of(plan)), time.monotonic()
        done = min(pool.broadcast("refit_done", plan))
        progress.advance(made + done, plan.name)
        if done < steps:
            pool.map("refit_prepare", [(plan, number) for number in numbers])
        shares = min(pool.count, len(shards))
        for number in range(done, steps):
            parts = pool.map("refit_sums", [(plan, number, (share, shares)) for share in range(shares)])
            (tensors,) = pool.map("refit_solve", [(plan, number, parts)])
            del parts  # 0.4 GB each where 8,960 features are fitted
            pool.broadcast("refit_store", plan, number, tensors)
            progress.advance(made + number + 1, plan.name)
        made += steps
        plan_id = plan.plan_id(identity)
        if plan_id not in stored:
            (records,) = pool.map("refit_records", [plan])
            seconds = time.monotonic() - began if done == 0 else None
            run.append("refits", [_row(plan_id, refit, record, seconds) for record in records], part=plan_id)
            stored.add(plan_id)


def _row(plan_id: str, refit: Refit, record: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """A row of `refits`; what a fit does not have is null."""
    figures = {
        name: value if isinstance(value, str) or math.isfinite(value) else None for name, value in record.items()
    }
    return figures | {
        "plan_id": plan_id,
        "method": refit.method,
        "layer": int(record["layer"]),
        "tokens": int(record["tokens"]),
        "seconds": seconds,
    }
