"""`evaluate`: one model as it is, on questions, on further tasks and on plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymerge import rows
from raymerge.config import Config, ConfigError
from raymerge.config_file import check_config
from raymerge.context import TextLosses
from raymerge.experiments.common import (
    Inputs,
    counted,
    describe_workers,
    finish,
    open_pool,
    open_run,
    read_inputs,
    runtime,
    settings_of,
    swept_cache,
)
from raymerge.experiments.reporting import task_table
from raymerge.identity import digest
from raymerge.inputs import REPORT, TEXT, task_role
from raymerge.plan import MergePlan, base_plan
from raymerge.pool import WorkerPool
from raymerge.progress import Progress, Silent, step
from raymerge.tables import RunDirectory, derive_accuracy, derive_task_accuracy

_SHARDS_EACH = 2  # of a worker, so that none waits long for the others at the end


def evaluate(config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> RunDirectory:
    """Evaluate one model as it is on data.report_split, on the tasks and on plain text, over the pool.

    Leaves tables answers, accuracy, task_answers, task_accuracy, perplexity, text_losses, context, plans and costs; a
    figure of the accuracies by subject; the manifest.
    Answers are stored shard by shard, 8,192 tokens each or fewer: the same call again goes on after the last one.
    Errors as `search`.
    """
    check_config(config)
    progress = progress or Silent()
    settings = settings_of(config, "model", "data", "tasks")
    RunDirectory.check(config.output.run, settings, "evaluate")
    with step(progress, "reading model and questions"):
        inputs = read_inputs(config, () if config.data.mmlu is None else (REPORT,))
    if not (inputs.questions or inputs.tasks or inputs.text is not None):
        raise ConfigError("nothing to evaluate on: set data.mmlu, data.perplexity_text, or a task in the tasks section")
    run = open_run(config, "evaluate", settings, inputs, progress)
    if run.complete:
        return run
    plan = base_plan(inputs.checkpoint.n_layers)
    with (
        runtime(config, progress),
        swept_cache(config, run) as cache,
        open_pool(config, inputs, cache, run=run, shards_each=_SHARDS_EACH, progress=progress) as pool,
    ):
        workers = describe_workers(pool, inputs, progress, run)
        _Evaluation(config, inputs, run, plan, plan.plan_id(inputs.checkpoint.identity)).answer(pool, progress)
    if inputs.questions:
        run.replace("accuracy", derive_accuracy(run.read("answers")))
    if inputs.tasks:
        run.replace("task_accuracy", derive_task_accuracy(run.read("task_answers")))
    plan_id = plan.plan_id(inputs.checkpoint.identity)
    run.replace("plans", rows.plan_rows(plan, plan_id))
    run.replace("costs", [rows.cost_row(plan, plan_id, inputs.checkpoint, config.model.quantise)])
    figures = ["accuracy.py"] if inputs.questions else []
    finish(run, config, inputs, figures, progress, command=command, workers=workers)
    return run


class _Share(NamedTuple):
    """One shard of the evaluation: what `ModelWorker.run` is called with, its tokens, and where the result goes."""

    call: tuple[str, Any]
    tokens: int
    store: Callable[[Any], None]


class _Evaluation:
    """What is to be asked of one plan, and where each share of it is stored as soon as it is there."""

    def __init__(self, config: Config, inputs: Inputs, run: RunDirectory, plan: MergePlan, plan_id: str):
        self.config, self.inputs, self.run, self.plan, self.plan_id = config, inputs, run, plan, plan_id
        self.tasks = {task_role(name): task for name, task in inputs.tasks.items()}

    def answer(self, pool: WorkerPool, progress: Progress) -> None:
        """Ask all that no part of the tables holds yet, shard by shard, and put the tables in order."""
        roles = [*self.inputs.questions, *self.tasks]
        rows_of = dict(zip(roles, pool.map("shard_rows", roles), strict=True))
        names = [*roles, *([TEXT] if self.inputs.text is not None else [])]
        tokens_of = dict(zip(names, pool.map("shard_tokens", names), strict=True))
        shares = [share for role in roles for share in self._missing(role, rows_of[role], tokens_of[role])]
        losses: list[TextLosses] = []
        if TEXT not in self.run.read("perplexity", ["target"])["target"].to_pylist():
            for number, tokens in enumerate(tokens_of.get(TEXT, [])):
                shares.append(_Share(("text_nll", (self.plan, number)), tokens, losses.append))
        shares.sort(key=lambda share: -share.tokens)  # the largest first, so that no worker ends up waiting long
        progress.stage("evaluation (tokens)", sum(share.tokens for share in shares))
        pool.map(
            "run",
            [share.call for share in shares],
            counted(progress, lambda n, _: shares[n].tokens, lambda n, result: shares[n].store(result)),
        )
        self._gather(losses)

    def _missing(self, role: str, shards: list[list[int]], tokens: list[int]) -> Iterator[_Share]:
        """The shards of a role of which some rows are not stored yet; shards: the rows of each."""
        done = set(self._numbers(role, self._stored(role)))
        for number, members in enumerate(shards):
            if done.issuperset(members):
                continue
            item = self.plan, role, number
            call: tuple[str, Any] = "score_choices", item
            if role == REPORT:
                call = "answers", (*item, self.config.data.question_perplexity)
            # Named by content, so that the same shard again replaces its part.
            part = f"{role.removeprefix(task_role(''))}-{digest(members)}"
            yield _Share(call, tokens[number], partial(self._store, role, part))

    def _numbers(self, role: str, stored: pa.Table) -> list[int]:
        """For each row of `answers`, the number of its question in the role; of `task_answers`, of its task's item."""
        if role == REPORT:
            asked = {(q.subject, q.question_id): i for i, q in enumerate(self.inputs.questions[REPORT].questions)}
            keys = zip(stored["subject"].to_pylist(), stored["question_id"].to_pylist(), strict=True)
            return [asked[key] for key in keys]
        items = {item.item_id: i for i, item in enumerate(self.tasks[role].items)}
        return [items[key] for key in stored["item_id"].to_pylist()]

    def _stored(self, role: str) -> pa.Table:
        """The rows that there are of a role."""
        if role == REPORT:
            return self.run.read("answers")
        stored = self.run.read("task_answers")
        return stored.filter(pc.equal(stored["task"], self.tasks[role].name))

    def _store(self, role: str, part: str, result: Any) -> None:
        """One shard's answers as one part of their table."""
        if role == REPORT:
            table = rows.answer_table(self.plan_id, self.inputs.questions[REPORT], result, partial=True)
            self.run.append("answers", table, part=part)
            return
        self.run.append("task_answers", task_table(self.plan_id, self.tasks[role], [result]), part=part)

    def _gather(self, losses: Sequence[TextLosses]) -> None:
        """Write each table whole, in the order of what was asked; losses: of the text, where it was run."""
        if losses:
            assert self.inputs.text is not None  # which they are of
            joined = TextLosses.join(losses)
            self.run.replace("context", rows.position_rows(self.plan_id, joined))
            self.run.replace("text_losses", rows.text_loss_rows(self.plan_id, joined))
            self.run.append(
                "perplexity", [rows.text_perplexity_row(self.plan_id, joined, self.inputs.text)], part="text"
            )
        ordered = {}
        for role in (*self.inputs.questions, *self.tasks):
            stored = self._stored(role)
            # Each question once: with another number of workers shards are cut elsewhere, and may hold answered ones.
            ordered[role] = stored.take(np.unique(self._numbers(role, stored), return_index=True)[1])
        if self.inputs.questions:
            self.run.replace("answers", ordered[REPORT])
            if self.config.data.question_perplexity:
                text = [row for row in self.run.read("perplexity").to_pylist() if row["target"] == "text"]
                self.run.replace("perplexity", [*rows.question_perplexity_rows(ordered[REPORT]), *text])
        if self.tasks:
            self.run.replace("task_answers", pa.concat_tables([ordered[role] for role in self.tasks]))
