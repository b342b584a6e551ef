"""What every experiment does: read its inputs, open the pool, check the workers, compute the trunk, draw figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import raymerge
from raymerge.actors import NoRoomError
from raymerge.alignment import REORDERED, Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.cluster import Placement, PlacementError, cluster_nodes, plan_workers, start_ray
from raymerge.config import Config, ConfigError
from raymerge.identity import digest
from raymerge.inputs import SEARCH_TEXT, TEXT, Material, check_matchable, read_material, read_text, task_role
from raymerge.plan import MergePlan
from raymerge.plan_section import Similarity
from raymerge.pool import WorkerPool
from raymerge.progress import Progress, Silent, step
from raymerge.prompts import PromptError, encode_text
from raymerge.role_prompts import RolePrompts
from raymerge.storage import LEFT_S, NO_ROOM, Lock, clear_scratch, scratch_folder, size_text, user_cache
from raymerge.tables import TEXT_TOKENS, RunDirectory
from raymerge.texts import text_hash
from raymerge.worker import CODE, ModelWorker
from raymerge.worker_memory import host_bytes

_TOLD_BYTES = 10**10  # size of a cache from which on the user is told of it


@dataclass(frozen=True, kw_only=True)
class Inputs(Material):
    """What an experiment reads before it writes anything. text: the plain text that is reported on."""

    checkpoint: Checkpoint
    text: str | None = None


def read_inputs(config: Config, roles: Sequence[str], *, text: bool = True) -> Inputs:
    """Everything that roles (SEARCH, REPORT, SEARCH_TEXT, SUBSETS, CALIBRATION) need; text: and the plain text
    and the tasks of a report.

    Raises CheckpointError, DataError, ConfigError; the last also for a text of which nothing is left."""
    model = config.model
    checkpoint = Checkpoint(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    material = read_material(config, [*roles, *(map(task_role, config.tasks.root) if text else ())])
    inputs = Inputs(**vars(material), checkpoint=checkpoint, text=read_text(config) if text else None)
    for key, found, limit in (
        ("search", inputs.search_text, config.search.text_tokens),
        ("calibration", inputs.calibration, config.calibration.tokens),
    ):
        if isinstance(found, tuple):
            _check_text(checkpoint, f"{key}.text = {getattr(config, key).text}", *found, limit)
    return inputs


def _check_text(checkpoint: Checkpoint, what: str, text: str, first: int, limit: int) -> None:
    try:
        encode_text(text, checkpoint.tokenizer, limit=limit, start=first)
    except PromptError as error:
        fewer = ", or fewer of its tokens elsewhere (data.perplexity_tokens, search.text_tokens)" if first else ""
        raise ConfigError(f"{what}: {error}; use a longer text{fewer}") from error


def check_without_questions(config: Config, alignments: Mapping[str, Sequence[str]], *, calibrates: bool) -> None:
    """Where data.mmlu is null, refuse what would need questions. alignments: those asked for, by key."""
    if config.data.mmlu is not None:
        return
    if config.data.perplexity_text is None and not config.tasks.root:
        raise ConfigError("nothing to judge plans by: set data.mmlu, data.perplexity_text, or a task in section tasks")
    if calibrates and config.calibration.text is None:
        raise ConfigError(
            "data.mmlu is null, so there are no prompts to choose blocks or fit refits on: set calibration.text to a "
            "file or demo"
        )
    check_matchable(config, alignments)


def settings_of(config: Config, *sections: str) -> dict[str, Any]:
    """The sections of a configuration that an experiment depends on: what its run directory is held to.

    Without tasks their section is left out, as it is in runs from before there was one.
    """
    resolved = config.resolved()
    named = [name for name in sections if name != "tasks" or config.tasks.root]
    return {name: resolved[name] for name in (*named, "workers", "output")}


def cache_of(config: Config, run: RunDirectory) -> str:
    """The folder of states, activations and alignments: output.cache, or RUN/cache where RUN is on a disk, or a folder
    of the user's cache that a resumed run finds again. Each machine has its own unless they share it."""
    if config.output.cache:
        # Absolute: workers of a cluster that is there already start in another folder than the driver.
        return str(Path(config.output.cache).expanduser().absolute())
    if run.is_local:
        return run.path_of("cache")
    return str(user_cache() / run.run_id)


@contextmanager
def swept_cache(config: Config, run: RunDirectory) -> Iterator[str]:
    """The run's cache (`cache_of`), without temporary files that killed processes have left: all of them where the
    cache is the run's own, those older than a day where other runs may share it. The cache of a run in an object store,
    which itself cannot be locked, is locked. Raises RunError where another process has the lock."""
    cache = cache_of(config, run)
    # Inside a run on a disk it is locked and swept with the run.
    lock = Lock(cache) if config.output.cache is None and not run.is_local else None
    clear_scratch(cache, older_s=0.0 if lock else LEFT_S)
    yield cache


@contextmanager
def runtime(config: Config, progress: Progress) -> Iterator[None]:
    """The Ray there is, or a local one for as long as this lasts, with a dashboard if the configuration asks for it."""
    with start_ray(dashboard=config.workers.dashboard, progress=progress) as dashboard:
        if dashboard is not None and config.workers.dashboard:
            progress.message(f"Ray's dashboard: {dashboard}")
        yield


def open_pool(
    config: Config,
    inputs: Inputs,
    cache: str,
    *,
    run: RunDirectory | None = None,
    template: MergePlan | None = None,
    plans: Sequence[MergePlan] = (),
    firsts: Sequence[int] = (),
    most: int | None = None,
    shards_each: int | None = None,
    progress: Progress | None = None,
) -> WorkerPool:
    """Start the workers, `most` of them at the most; what befalls them becomes incidents of the run. With workers.count
    auto there are more as nodes join.

    plans: what is scored, from which a worker's memory is estimated. shards_each: cut prompts small enough that every
    worker has so many shards of each role. Give it only where no states are cached: their files are named by the
    shards, which would change with the number of workers.
    """
    workers, progress = config.workers, progress or Silent()
    refits = config.plan.refit != "none" or set(config.sweep.refits) != {"none"}
    held = [question for role in inputs.questions.values() for question in role.questions] if firsts else []
    memory = host_bytes(inputs.checkpoint, plans, questions=held, refits=refits)

    def placed(gpus: float | str) -> Placement:
        return plan_workers(
            workers.count,
            gpus,
            workers.cpus_per_worker,
            cluster_nodes(),
            memory=memory,
            autoscaling=workers.autoscaling,
        )

    def limited(count: int) -> int:
        return count if most is None else max(1, min(most, count))

    placement = placed(workers.gpus_per_worker)
    count = limited(placement.count)
    named = f"{count} worker{'s' if count > 1 else ''}"
    if placement.by_memory and count == placement.count:
        progress.message(
            f"Memory has room for {named} of about {memory / 1e9:.1f} GB, with {placement.cpus:g} CPUs each; "
            "workers.count asks for another number."
        )

    def grown() -> int:
        """How many there should be now, of the same kind: a cluster that has lost its GPUs has room for none."""
        try:
            return limited(placed(placement.gpus).count)
        except PlacementError:
            return 0

    # A worker without a GPU is told so, lest it look for one: Ray (2.60) hides none from it, also in a cluster that was
    # started with --num-gpus=0.
    found = {"gpus_per_worker": placement.gpus, "cpus_per_worker": placement.cpus}
    arguments = {
        "config": config.model_copy(update={"workers": workers.model_copy(update=found)}),
        "roles": inputs.roles,
        "cache": cache,
        "template": template,
        "firsts": tuple(firsts),
        "hashes": inputs.checkpoint.known_hashes,
    }
    with step(progress, f"loading the model in {named}"):
        return WorkerPool(
            ModelWorker,
            arguments | ({} if shards_each is None else {"shards": shards_each * count}),
            count=count,
            cpus_per_worker=placement.cpus,
            gpus_per_worker=placement.gpus,
            timeout_s=workers.timeout_s,
            wait_s=workers.wait_s,
            max_restarts=workers.max_restarts,
            grow=grown if workers.count == "auto" else None,
            on_event=None if run is None else run.note,
        )


def open_run(
    config: Config,
    experiment: str,
    settings: dict[str, Any],
    inputs: Inputs,
    progress: Progress,
    *,
    plans: Sequence[MergePlan] = (),
    similarity: Similarity | None = None,
) -> RunDirectory:
    """The run directory, begun; one that is complete stays as it is, and says so.

    It is held to what its configuration led to: model, tokenizer, prompts and texts, and the merges and matrices that
    files or other runs give. So is a complete run where these lie elsewhere now. Raises RunError where a run that holds
    results was begun with others.
    """
    run = RunDirectory.open(config.output.run, settings, experiment)
    if run.complete and not run.moved:
        return _as_it_is(run, progress)
    with step(progress, "hashing the model's files"):
        held = {"model": inputs.checkpoint.identity, "tokenizer": inputs.checkpoint.tokenizer_identity}
    held |= {f"data {role}": identity for role, identity in inputs.identities.items()}
    # tables join on the source's ids, which another source of the same questions may not have
    held |= {f"ids {role}": digest([q.question_id for q in of.questions]) for role, of in inputs.questions.items()}
    if inputs.text is not None:
        read = RolePrompts(config, inputs, inputs.checkpoint).text
        held |= {"text": text_hash(inputs.text), TEXT_TOKENS: digest([shard.identity for shard in read])}
    held |= {"plan": digest([plan.plan_id("") for plan in plans])} if plans else {}
    if similarity is not None:
        matrices = [matrix for matrix in (similarity.matrix, similarity.block_influence) if matrix is not None]
        held["similarity"] = digest([np.round(matrix, 12).tobytes().hex() for matrix in matrices])
    run.hold_to(held)
    if run.complete:
        return _as_it_is(run, progress)
    run.begin()
    return run


def _as_it_is(run: RunDirectory, progress: Progress) -> RunDirectory:
    progress.message("This run is complete; nothing is left to do.")
    return run


def describe_workers(
    pool: WorkerPool, inputs: Inputs, progress: Progress, run: RunDirectory | None = None
) -> list[dict[str, Any]]:
    """What every worker holds (`ModelWorker.describe`).

    Refuses workers, now or when they come later, whose machines run another version of this package, have other files
    under the same paths, compute on different kinds of devices or in different dtypes, or have a GPU that torch does
    not see. Refuses also to continue a run in another dtype: where model.dtype is auto it is the device's, and
    `workers` may differ from call to call.
    """
    ours = {
        "model_identity": inputs.checkpoint.identity,
        "tokenizer_identity": inputs.checkpoint.tokenizer_identity,
        "data_identities": inputs.identities,
    }
    first: dict[str, Any] = {}

    def check(worker: dict[str, Any]) -> None:
        if worker["code"] != CODE:
            raise ConfigError(
                f"the worker on {worker['host']} runs another raymerge than this process, or one that was changed "
                "since this began: install the same version on every machine, or submit a job, which brings its own "
                "along (ray job submit --working-dir)"
            )
        for key, value in ours.items():
            if worker[key] != value:
                raise ConfigError(
                    f"{key} of the worker on {worker['host']} is {worker[key]}, the driver's {value}: the paths in the "
                    "configuration must lead to the same files on every machine"
                )
        if pool.gpus_per_worker and worker["device"] == "cpu":
            raise ConfigError(
                f"Ray gives the worker on {worker['host']} {pool.gpus_per_worker:g} GPUs, but torch sees no CUDA "
                "device there and would compute on the CPU: install a torch with CUDA and a driver that it can use "
                "(python -c 'import torch; print(torch.cuda.is_available())' on that machine), start its Ray with "
                "--num-gpus=0, or set workers.gpus_per_worker: 0"
            )
        for key, kind in _computes(worker).items() if first else ():
            if kind != _computes(first)[key]:
                raise ConfigError(
                    f"the worker on {worker['host']} computes with {key} {kind}, the one on {first['host']} with "
                    f"{_computes(first)[key]}: set model.dtype to one that both have, and workers.gpus_per_worker to a "
                    "number, so that all workers give the same results"
                )

    pool.admit("describe", check)
    with step(progress, "comparing the workers' files"):  # where the driver does not run, all are read
        found = pool.broadcast("describe")
    first |= found[0]
    for worker in found:
        check(worker)
    if run is not None:
        run.hold_to({"dtype": first["dtype"]})
    return found


def _computes(worker: Mapping[str, Any]) -> dict[str, str]:
    """What results depend on beside the files: GPUs of several makes are one kind of device."""
    return {"device": "cpu" if worker["device"] == "cpu" else "GPU", "dtype": worker["dtype"]}


def compute_trunk(pool: WorkerPool, inputs: Inputs, progress: Progress, further: Sequence[str] = ()) -> dict[str, int]:
    """States of every shard, computed in parallel, the largest first so that no worker ends up waiting long.

    further: other prompts than the inputs' own (RETRIEVAL). Returns the number of shards of each role, and of the text.
    Raises NoRoomError, before hours of work, where a worker's disk has no room for them.
    """
    items, sizes, shards = [], [], {}
    texts = {TEXT: inputs.text, SEARCH_TEXT: inputs.search_text}
    roles = [*inputs.questions, *map(task_role, inputs.tasks)]
    names = [*roles, *(name for name, text in texts.items() if text is not None), *further]
    for of, tokens in zip(names, pool.map("shard_tokens", names), strict=True):
        items += [(of, number) for number in range(len(tokens))]
        sizes += tokens
        shards[of] = len(tokens)
    check_room(
        pool.broadcast("trunk_room", names),
        "states of the prompts, at every layer that plans begin at,",
        "fewer questions (data.report_limit_per_subject, tasks' limit) or, in a sweep, fewer sweep.merges",
        progress,
    )
    order = sorted(range(len(items)), key=lambda i: -sizes[i])
    progress.stage("trunk states (tokens)", sum(sizes))
    pool.map("compute_trunk", [items[i] for i in order], counted(progress, lambda _, tokens: tokens))
    return shards


def check_room(rooms: Sequence[tuple[int, int, str]], what: str, fewer: str, progress: Progress) -> None:
    """Raise NoRoomError where a worker's cache takes more bytes than its disk has; rooms: (bytes that are still to be
    written, bytes free, the cache's folder) of every worker. Where many bytes are needed and there is room, the user is
    told."""
    needed, free, cache = max(rooms, key=lambda room: room[0] - room[1])
    if needed > free:
        raise NoRoomError(
            f"the {what} take {size_text(needed)} of a worker's cache, {cache}, whose disk has {size_text(free)} free: "
            f"free space, set output.cache to another disk, or ask for {fewer}"
        )
    if needed > _TOLD_BYTES:
        progress.message(f"The cache takes {needed / 1e9:.1f} GB; it may be deleted when the run is complete.")


def align(pool: WorkerPool, plans: Sequence[MergePlan], progress: Progress) -> None:
    """Match the neurons of every pair of layers that the plans need, in parallel, before any worker needs them all."""
    items = sorted(
        {(plan.alignment, pair) for plan in plans if plan.alignment in REORDERED for pair in Aligner.pairs(plan)}
    )
    if items:
        progress.stage("aligning neurons (pairs of layers)", len(items))
        pool.map("align", items, counted(progress))


def align_rows(pool: WorkerPool, plans: Sequence[MergePlan], progress: Progress) -> None:
    """Match the rows of every plan that asks for it, in parallel, before any worker needs them: they depend on alpha,
    so that each plan has its own."""
    items = {(plan.steps, plan.norms): plan for plan in plans if plan.alignment == "rows"}
    if items:
        progress.stage("aligning rows (plans)", len(items))
        longest_first = sorted(items.values(), key=lambda plan: -len(plan.steps))
        pool.map("align_rows", longest_first, counted(progress))


def counted(
    progress: Progress,
    size: Callable[[int, Any], int] = lambda *_: 1,
    then: Callable[[int, Any], None] | None = None,
    *,
    before: int = 0,
) -> Callable[[int, Any], None]:
    """An on_result for pool.map that counts size(number, result) units of the current stage as they finish, after those
    `before` them."""
    done = before

    def finished(number: int, result: Any) -> None:
        nonlocal done
        done += size(number, result)
        progress.advance(done)
        if then is not None:
            then(number, result)

    return finished


def finish(
    run: RunDirectory, config: Config, inputs: Inputs, figures: Sequence[str], progress: Progress, **facts: Any
) -> None:
    """Draw the figures, if they are asked for, and write the manifest, last of all: with it the run is complete.

    figures: the analysis scripts that draw them. facts: what the manifest says beside the model, the prompts and the
    text.
    """
    drawn = draw_figures(run, figures, progress) if figures and config.output.figures else []
    model = {
        "path": config.model.path,
        "identity": inputs.checkpoint.identity,
        "revision": config.model.revision,
        "gguf": inputs.checkpoint.source,
    }
    text = None if inputs.text is None else text_hash(inputs.text)
    run.write_manifest(figures=drawn, model=model, data=inputs.identities, text_hash=text, **facts)


def draw_figures(run: RunDirectory, scripts: Sequence[str], progress: Progress) -> list[str]:
    """Run analysis scripts on a finished run; return the figures' paths in it. The scripts are inside the package where
    it is installed (setup.py), and beside it in a checkout."""
    package = Path(raymerge.__file__).resolve().parent
    inside = package / "_analysis"
    folder = inside if inside.is_dir() else package.parent / "analysis"
    progress.stage("figures", len(scripts))
    # Figures are files; beside a URI they are drawn here and copied there.
    with nullcontext(Path(run.path_of("figures"))) if run.is_local else scratch_folder() as out:

        def draw(script: str) -> tuple[str, subprocess.CompletedProcess[str]]:
            arguments = [sys.executable, str(folder / script), run.path_of(), "--out", str(out)]
            return script, subprocess.run(arguments, capture_output=True, text=True, check=False)

        with ThreadPoolExecutor() as threads:  # each takes seconds, most of them to start
            for number, (script, done) in enumerate(threads.map(draw, scripts), 1):
                if done.returncode:
                    raise _not_drawn(script, out, done)
                progress.advance(number)
        if not run.is_local:
            run.upload(out, "figures")
        return sorted(f"figures/{path.name}" for path in out.iterdir())


def _not_drawn(script: str, out: Path, done: subprocess.CompletedProcess[str]) -> Exception:
    """What to raise for a script that failed: the machine's doing, or the script's."""
    said = done.stderr.strip().rpartition("\n")[2]
    why = said if any(words in said for words in NO_ROOM) else None
    if done.returncode < 0:
        why = f"it was ended by signal {-done.returncode} (9: most often out of memory)"
    if why is None:
        return RuntimeError(f"analysis/{script} failed with exit code {done.returncode}: {done.stderr[-2000:]}")
    return NoRoomError(
        f"analysis/{script} could not draw its figures into {out}: {why}. Make room and run the same command again, "
        "which draws them from what is stored; experiments leave them out with output.figures=false"
    )
