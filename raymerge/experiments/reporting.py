"""What plans reach on the report questions and on plain text, and the tables that follow from it."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymerge import rows
from raymerge.alpha_files import alpha_file_text
from raymerge.comparisons import (
    comparison_rows,
    subject_comparison_rows,
    task_comparison_rows,
    text_comparison_rows,
)
from raymerge.config import Config
from raymerge.context import TextLosses
from raymerge.evaluation import Answers
from raymerge.experiments.common import Inputs, counted
from raymerge.fusion import Receipt
from raymerge.inputs import REPORT, SEARCH, TEXT, task_role
from raymerge.plan import MergePlan
from raymerge.plan_files import plan_file_text
from raymerge.pool import WorkerPool
from raymerge.progress import Progress
from raymerge.tables import RunDirectory, derive_accuracy, derive_task_accuracy
from raymerge.tasks import Task

_FILE_NAME = re.compile(r"[^./\\_][^/\\]{0,49}")  # an alpha file's own name may be a temporary one, or too long
_PAIRS_OF = 12  # plans, at the most, of which all pairs (66) are compared


@dataclass
class _Job:
    """What a method of the workers is asked of one plan, item by item. `store`: called with the results of all."""

    plan: MergePlan
    method: str
    items: list[Any]
    store: Callable[[list[Any]], None]
    results: list[Any] = field(default_factory=list)

    def take(self, result: Any) -> None:
        """Take the result of one item."""
        self.results.append(result)
        if len(self.results) == len(self.items):
            self.store(self.results)
            self.results = []


class Reporter:
    """Stores what plans answer, once each: a plan whose rows are there is not asked again."""

    def __init__(self, config: Config, inputs: Inputs, run: RunDirectory):
        self.config, self.inputs, self.run = config, inputs, run
        self.identity = inputs.checkpoint.identity

    def store_answers(self, plan: MergePlan, role: str, answers: Answers) -> None:
        """One part of `answers`."""
        data = self.config.data
        if role == SEARCH and data.search_split == data.report_split:
            return  # The report answers the same split; rows are told apart by split.
        plan_id = plan.plan_id(self.identity)
        table = rows.answer_table(plan_id, self.inputs.questions[role], answers)
        self.run.append("answers", table, part=f"{role}-{plan_id}")

    def report(
        self,
        pool: WorkerPool,
        plans: Sequence[MergePlan],
        shards: dict[str, int],
        firsts: Sequence[int],
        progress: Progress,
    ) -> None:
        """Answers on the report questions, log-likelihoods of the tasks' choices, plain-text perplexity and receipts of
        every plan, in one parallel pass.

        shards: the number of shards by role (tasks' and TEXT too); firsts: layers whose inputs the workers have cached.
        """
        jobs = self._jobs(plans, shards, firsts)
        # Plans that start at the same layer one after the other: workers then load its states once.
        jobs.sort(key=lambda job: (job.plan.resumes_at, job.method))
        shares = [(job, item) for job in jobs for item in job.items]
        on = self.config.data.report_split if self.inputs.questions else "text and tasks"
        progress.stage(f"report on {on}", len(shares))
        calls = [(job.method, item) for job, item in shares]
        pool.map("run", calls, counted(progress, then=lambda number, result: shares[number][0].take(result)))

    def _jobs(self, plans: Sequence[MergePlan], shards: Mapping[str, int], firsts: Sequence[int]) -> list[_Job]:
        """What no table holds yet of these plans, each plan once however many names it has."""
        data = self.config.data
        answered = {plan for plan, of in self.run.distinct("answers", ["plan_id", "split"]) if of == data.report_split}
        measured = {plan for plan, of in self.run.distinct("perplexity", ["plan_id", "target"]) if of == "text"}
        receipted = {plan for (plan,) in self.run.distinct("receipts", ["plan_id"])}
        scored = self.run.distinct("task_answers", ["plan_id", "task"])
        jobs = []
        for plan_id, plan in {plan.plan_id(self.identity): plan for plan in plans}.items():
            if REPORT in self.inputs.questions and plan_id not in answered:
                # One layer at the last positions goes in one piece; whole layers, and prompt tokens, shard by shard.
                at_once = plan.ends_at_once and plan.resumes_at in firsts and not data.question_perplexity
                items: list[Any] = [
                    (plan, REPORT, number, data.question_perplexity)
                    for number in ([None] if at_once else range(shards[REPORT]))
                ]
                jobs.append(_Job(plan, "answers", items, partial(self._store_report, plan)))
            if shards.get(TEXT) and plan_id not in measured:
                items = [(plan, number) for number in range(shards[TEXT])]
                jobs.append(_Job(plan, "text_nll", items, partial(self._store_text, plan)))
            for name in self.inputs.tasks:
                if (plan_id, name) not in scored:
                    items = [(plan, task_role(name), number) for number in range(shards[task_role(name)])]
                    jobs.append(_Job(plan, "score_choices", items, partial(self._store_task, plan, name)))
            if plan_id not in receipted:
                jobs.append(_Job(plan, "receipts", [plan], partial(self._store_receipts, plan)))
        return jobs

    def _store_report(self, plan: MergePlan, results: Sequence[Answers]) -> None:
        answers, plan_id = Answers.join(results), plan.plan_id(self.identity)
        if self.config.data.question_perplexity:
            found = rows.question_perplexity_rows(rows.answer_table(plan_id, self.inputs.questions[REPORT], answers))
            self.run.append("perplexity", found, part=f"question-{plan_id}")
        # Last: a plan whose answers are stored is not asked again.
        self.store_answers(plan, REPORT, answers)

    def _store_text(self, plan: MergePlan, results: Sequence[TextLosses]) -> None:
        assert self.inputs.text is not None  # or there are no losses of it
        losses, plan_id = TextLosses.join(results), plan.plan_id(self.identity)
        part = f"text-{plan_id}"
        self.run.append("context", rows.position_rows(plan_id, losses), part=part)
        self.run.append("text_losses", rows.text_loss_rows(plan_id, losses), part=part)
        # Last: a plan whose perplexity is stored is not asked again.
        self.run.append("perplexity", [rows.text_perplexity_row(plan_id, losses, self.inputs.text)], part=part)

    def _store_task(self, plan: MergePlan, task: str, results: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        plan_id = plan.plan_id(self.identity)
        table = task_table(plan_id, self.inputs.tasks[task], results)
        self.run.append("task_answers", table, part=f"{task}-{plan_id}")

    def _store_receipts(self, plan: MergePlan, results: Sequence[list[Receipt]]) -> None:
        plan_id = plan.plan_id(self.identity)
        self.run.append("receipts", rows.receipt_rows(plan_id, results[0]), part=plan_id)

    def derive(
        self,
        plans: Sequence[MergePlan],
        compared: Iterable[tuple[MergePlan, MergePlan]],
        *,
        subjects: Sequence[str] = (),
    ) -> None:
        """The tables that follow from others or from the plans: written whole, so that nothing is there twice.

        compared: the pairs that are asked about, one family of tests (`p_holm`). With at most 12 plans all other pairs
        follow as a second family, so that they do not make the p-values of what is asked for any larger. subjects:
        those that plans were chosen by, on which they are also compared separately.
        """
        named = {plan: plan.plan_id(self.identity) for plan in plans}
        self.run.replace("plans", [row for plan, key in named.items() for row in rows.plan_rows(plan, key)])
        once = {key: plan for plan, key in named.items()}
        self.run.replace(
            "coefficients", [row for key, plan in once.items() for row in rows.coefficient_rows(plan, key)]
        )
        self.store_costs(plans)
        answers = self.run.read("answers")
        self.run.replace("accuracy", derive_accuracy(answers))
        split = self.config.data.report_split
        answers = answers.filter(pc.equal(answers["split"], split))
        pairs = dict.fromkeys((named[a], named[b]) for a, b in compared if named[a] != named[b])
        seen = {frozenset(pair) for pair in pairs}
        others = [pair for pair in itertools.combinations(once, 2) if frozenset(pair) not in seen]
        families = [list(pairs), others if len(once) <= _PAIRS_OF else []]
        losses = self.run.read("text_losses")
        asked = [partial(comparison_rows, split, answers)] if self.inputs.questions else []
        compare = [*asked, partial(text_comparison_rows, losses)]
        self.run.replace("comparisons", [row for each in families for rows_of in compare for row in rows_of(each)])
        if subjects:
            found = [row for each in families for row in subject_comparison_rows(split, answers, subjects, each)]
            self.run.replace("subject_comparisons", found)
        if self.inputs.tasks:
            answers = self.run.read("task_answers")
            self.run.replace("task_accuracy", derive_task_accuracy(answers))
            found = [row for each in families for row in task_comparison_rows(answers, each)]
            self.run.replace("task_comparisons", found)

    def write_plans(self, plans: Sequence[MergePlan], *, alpha_files: bool = False) -> None:
        """A plan file of every merge, plans/NAME.json, and, if asked for, an alpha file, alphas/NAME.json, of every one
        that can be one: the format has no alphas of single matrices.

        They are named after the plan, with its id where two have one name; after its kind and id where no file of a run
        may have the plan's name.
        """
        checkpoint = self.inputs.checkpoint
        named = {(plan.name, plan.plan_id(self.identity)): plan for plan in plans if plan.steps}
        names = Counter(name for name, _ in named)  # an alpha file's own name may be a control's
        for (name, plan_id), plan in named.items():
            name = name if names[name] == 1 else f"{name}-{plan_id}"
            if not _FILE_NAME.fullmatch(name):
                name = f"{plan.kind}-{plan_id}"
            text = plan_file_text(plan, checkpoint.public_name, self.identity)
            self.run.write_text(text, "plans", f"{name}.json")
            if alpha_files and not plan.matrix_alphas:
                self.run.write_text(alpha_file_text(plan.steps), "alphas", f"{name}.json")

    def store_costs(self, plans: Sequence[MergePlan], speeds: Mapping[int, float] | None = None) -> None:
        """Table `costs`. speeds: tokens per second of generation, by number of layers."""
        once = {plan.plan_id(self.identity): plan for plan in plans}
        checkpoint, quantise = self.inputs.checkpoint, self.config.model.quantise
        costs = [rows.cost_row(plan, key, checkpoint, quantise) for key, plan in once.items()]
        self.run.replace("costs", [row | {"tokens_per_second": (speeds or {}).get(row["layers"])} for row in costs])


def task_table(plan_id: str, task: Task, results: Sequence[tuple[np.ndarray, np.ndarray]]) -> pa.Table:
    """Rows of `task_answers` from what a worker's score_choices gave for some shards, in the file's order."""
    parts = [rows.task_answer_table(plan_id, task, *result) for result in results]
    order = np.argsort(np.concatenate([items for items, _ in results]), kind="stable")
    return pa.concat_tables(parts).take(order)
