"""`evaluate`: one model as it is, on questions and on plain text."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge import rows
from raymerge.config import Config
from raymerge.evaluation import Answers
from raymerge.experiments.common import (
    cache_of,
    counted,
    describe_workers,
    model_facts,
    open_pool,
    read_inputs,
    runtime,
    settings_of,
)
from raymerge.inputs import REPORT, TEXT
from raymerge.plan import base_plan
from raymerge.progress import Progress, Silent, step
from raymerge.tables import RunDirectory, derive_accuracy


def evaluate(config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> RunDirectory:
    """Evaluate one model as it is on data.report_split and on plain text, over the pool.

    Leaves tables answers, accuracy, perplexity, plans and costs. Errors as `search`.
    """
    progress = progress or Silent()
    data = config.data
    with step(progress, "reading model and questions"):
        inputs = read_inputs(config, (REPORT,))
    checkpoint, questions = inputs.checkpoint, inputs.questions[REPORT]
    run = RunDirectory.open(config.output.run, settings_of(config, "model", "data"), "evaluate")
    if run.complete:
        progress.message("This run is complete; nothing is left to do.")
        return run
    run.begin()
    plan = base_plan(checkpoint.n_layers)
    plan_id = plan.plan_id(checkpoint.identity)
    options = {"run": run, "progress": progress}
    with runtime(config, progress), open_pool(config, inputs, cache_of(config, run), **options) as pool:
        workers = describe_workers(pool, inputs, progress)
        names = [REPORT] + ([TEXT] if inputs.text is not None else [])
        sizes = dict(zip(names, pool.map("shard_tokens", names), strict=True))
        tasks = [("answers", (plan, REPORT, n, data.question_perplexity)) for n in range(len(sizes[REPORT]))]
        tasks += [("text_nll", (plan, number)) for number in range(len(sizes.get(TEXT, ())))]
        tokens = [*sizes[REPORT], *sizes.get(TEXT, ())]
        progress.stage("evaluation (tokens)", sum(tokens))
        found = pool.map("run", tasks, counted(progress, lambda number, _: tokens[number]))
    answers = Answers.join(found[: len(sizes[REPORT])])
    perplexities = rows.question_perplexity_rows(plan_id, questions, answers) if data.question_perplexity else []
    if inputs.text is not None:
        losses, scored = (sum(values) for values in zip(*found[len(sizes[REPORT]) :], strict=True))
        perplexities.append(rows.text_perplexity_row(plan_id, losses, scored, inputs.text))
        run.replace("context", rows.position_rows(plan_id, losses, scored))
    run.replace("answers", rows.answer_table(plan_id, questions, answers))
    run.replace("accuracy", derive_accuracy(run.read("answers")))
    run.replace("perplexity", perplexities)
    run.replace("plans", rows.plan_rows(plan, plan_id))
    run.replace("costs", [rows.cost_row(plan, plan_id, checkpoint, config.model.quantise)])
    run.write_manifest("complete", command=command, workers=workers, **model_facts(config, inputs))
    return run
