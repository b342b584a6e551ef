"""From run directories to a page: which sections a run gets, in which order, and the words around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from raymerge.identity import software
from raymerge.progress import Progress
from raymerge.report import compared, curve, layers, plans, receipts, searched, seeds, subjects
from raymerge.report.asked import asked, command_of, model_name, run_names, unfinished
from raymerge.report.content import Block, Notice, Page, Section, Table, Text
from raymerge.report.plans import plan_table
from raymerge.report.reached import Reached, missing
from raymerge.report.wording import percent, perplexity, plural
from raymerge.tables import RunDirectory

_QUESTIONS = {
    "search": "To make a language model smaller, several of its decoder layers were merged into one, a weighted "
    "average of them. A search chose the coefficients of the average. Do they preserve more of the model than dropping "
    "the layers, fixed coefficients or random coefficients?",
    "sweep": "More and more decoder layers of a language model were merged or dropped, in several ways. How much of "
    "the model is lost at each size, and does averaging lose less than dropping?",
    "similarity": "How alike are the decoder layers of a language model, judged by their states on sets of prompts? "
    "Does that depend on the task or the language of the prompts, or only on which prompts were drawn?",
    "import-similarity": "Similarity matrices of layers, made elsewhere, compared with each other.",
    "sensitivity": "The similarity of layers depends on settings that have no single right value. Each was changed on "
    "its own: do the matrices, and the merges that they suggest, stay the same?",
    "evaluate": "One model as it is: multiple-choice accuracy by subject, and perplexity.",
}

_TITLES = {
    "search": "Merging layers of {}: searched coefficients",
    "sweep": "Merging layers of {}: the compression curve",
    "similarity": "Layer similarity of {}",
    "import-similarity": "Imported layer similarity",
    "sensitivity": "Layer similarity of {}: sensitivity to settings",
    "evaluate": "Evaluation of {}",
}

_SCORES = (
    ("accuracy", "share of multiple-choice questions for which the right one of the four letters is the most probable; "
     "25 % is chance"),
    ("mean over subjects", "mean of the subjects' accuracies, every subject with the same weight"),
    ("95 % interval", "Wilson's for an accuracy; for a difference on the same questions, Bonett and Price's (accuracy) "
     "or a paired bootstrap (losses; Student's t for fewer than eight)"),
    ("answer NLL", "mean negative log-probability of the right letter among the four, in nats; lower is better, 1.386 "
     "is guessing"),
    ("perplexity", "exp of the mean loss per token on plain text: the number of tokens that the model is undecided "
     "between. Lower is better. It exposes a ruined language model that accuracy does not"),
    ("question perplexity", "exp of the mean over questions of the loss per token of a question's own text, choices "
     "included, without the examples before it. Searches and sweeps measure it with data.question_perplexity=true"),
    ("picks A/B/C/D", "share of each letter among a plan's answers: a ruined model often gives one letter only"),
)  # fmt: skip
_TESTS = (
    ("indistinguishable", "the paired test on the questions that both plans answered (McNemar's exact test for "
     "accuracies) gives p, or p (Holm), of at least 0.05: the data cannot tell the plans apart, which does not show "
     "that they are equal"),
    ("p (Holm)", "p corrected for the number of comparisons made together, separately for accuracy, answer NLL and "
     "text"),
)  # fmt: skip
_MERGES = (
    ("alpha", "weight of the kept layer in one merge step; the removed layer has 1 - alpha"),
    ("effective coefficient", "share of an original layer in the merged layer after all steps"),
    ("drop, before_last, drop_block, drop_greedy", "controls without averaging: drop removes the last K layers, "
     "before_last the K layers before the last one, drop_block a block of K layers, drop_greedy K layers one by one"),
    ("keep_N", "control without averaging: of the K + 1 plans that keep one of the merged layers and drop the others, "
     "the best on the search questions (or text). There is none where another control does the same"),
    ("seams refitted", "the layers where others were removed are fitted to the unmerged model's states on the "
     "calibration text or prompts, in closed form, by the method named"),
    ("aligned", "the neurons of one layer are reordered to match the other's before averaging, by their weights or by "
     "their activations; this preserves that layer's function"),
    ("rows aligned", "the rows of each matrix of a layer are reordered on their own, as published; the layer then "
     "computes another function"),
    ("folded, norms folded", "the gains of a layer's norms are multiplied into its matrices before averaging; what "
     "these make of the norms' biases, where there are any, is added to their own"),
)  # fmt: skip
_SEARCHED = (
    ("objective", "what the search optimised on its own questions: micro_accuracy is the accuracy over all of them, "
     "macro_accuracy the mean over subjects, answer_nll the answer NLL, answer_kl how far the answers' probabilities "
     "are from the unmerged model's (Kullback-Leibler divergence, nats), text_nll the loss per token of a text, nats"),
    ("optimism of the search", "how much better a plan did on the questions (or the text) that chose it than on the "
     "report's. The controls, which nothing chose, show how much of it is only that one of the two is easier: what the "
     "found plan has beyond theirs is due to the choice, noise aside"),
)  # fmt: skip
_ALIKE = (
    ("null, unrelated layers", "similarity after the prompts of one layer are shuffled against the other's: what noise "
     "scores"),
    ("ceiling", "the correlation that two equal patterns would show, given the noise of both matrices"),
    ("interval of a similarity", "95 %, from the matrices of random parts of the prompts (a delete-d jackknife)"),
)  # fmt: skip
#: What the words of a page mean, by the experiments that use them.
GLOSSARY = {
    "search": (*_SCORES, *_TESTS, *_SEARCHED, *_MERGES),
    "sweep": (*_SCORES, *_TESTS, *_MERGES),
    "evaluate": _SCORES,
    "similarity": _ALIKE,
    "import-similarity": _ALIKE,
}


def page_of(runs: Sequence[RunDirectory], command: str, progress: Progress) -> Page:
    """The page of one run or of several; `command` is what made it."""
    progress.stage("reading runs", len(runs))
    sections: list[Section] = []
    names = run_names(runs)
    if len(runs) > 1:
        reached = [Reached(run, name) for run, name in zip(runs, names, strict=True)]
        with_plans = [one for one in reached if one.lines]
        others = [(o.name, o.run.experiment, model_name(o.run)) for o in reached if not o.lines]
        sections += [compared.compared(with_plans, others), *seeds.seeds(with_plans)]
    for number, (run, name) in enumerate(zip(runs, names, strict=True), 1):
        sections += run_sections(run, heading=name if len(runs) > 1 else None)
        progress.advance(number)
    if words := tuple(dict.fromkeys(word for run in runs for word in GLOSSARY.get(run.experiment, ()))):
        table = Table("Terms on this page", ("term", "meaning"), words, words=(0, 1))
        sections.append(Section("Glossary", (table,), level=2 if len(runs) > 1 else 3))
    first = runs[0]
    title = title_of(first) if len(runs) == 1 else f"{len(runs)} runs of raymerge"
    lead = question_of(first) if len(runs) == 1 else _lead(runs, names)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Page(
        title,
        lead,
        tuple(sections),
        f"Made by raymerge {software()['raymerge_version']} on {now}: {command}",
        several=len(runs) > 1,
    )


def title_of(run: RunDirectory) -> str:
    """A run's heading."""
    return _TITLES.get(run.experiment, "{}").format(model_name(run))


def question_of(run: RunDirectory) -> str:
    """What a run asks, for a reader who knows nothing of it."""
    return _QUESTIONS.get(run.experiment, f"A run of {run.experiment}.")


def _lead(runs: Sequence[RunDirectory], names: Sequence[str]) -> str:
    kinds: dict[str, list[str]] = {}
    for run, name in zip(runs, names, strict=True):
        kinds.setdefault(run.experiment, []).append(name)
    return "; ".join(f"{experiment}: {', '.join(own)}" for experiment, own in kinds.items()) + "."


def run_sections(run: RunDirectory, *, heading: str | None) -> list[Section]:
    """Everything about one run: what is amiss, the answer, what was asked, the figures. heading: the run's name where
    it has a section of its own, as beside others."""
    begin: list[Block] = [Text(question_of(run))] if heading else []
    begin += unfinished(run)
    found = [Section(f"{heading}: {title_of(run)}", tuple(begin), level=2, short=heading)] if heading else []
    answer, *rest = _EXPERIMENTS.get(run.experiment, _unknown)(run)
    if not heading and begin:
        answer = Section(answer.title, (*begin, *answer.blocks))
    return [*found, answer, *rest, asked(run)]


def _search(run: RunDirectory) -> list[Section]:
    reached = Reached(run)
    if not reached.lines:
        return [plans.answer(reached)]
    return [
        plans.answer(reached),
        searched.coefficients(reached),
        searched.search(reached),
        *([subjects.differences(reached)] if reached.asks else []),
        *plans.tasks(reached),
        receipts.receipts(reached),
    ]


def _sweep(run: RunDirectory) -> list[Section]:
    reached = Reached(run)
    answer = curve.answer(reached)
    if not curve.curve(reached):
        return [answer]
    return [answer, *plans.tasks(reached), receipts.receipts_of_points(reached)]


def _similarity(run: RunDirectory) -> list[Section]:
    sections = [layers.answer(run)]
    if run.has("similarity"):
        sections.append(layers.maps(run))
    if run.has("similarity_correlation"):
        sections.append(layers.correlations(run))
    return sections


def _sensitivity(run: RunDirectory) -> list[Section]:
    return [layers.sensitivity(run)]


def _evaluate(run: RunDirectory) -> list[Section]:
    reached = Reached(run)
    if not reached.lines:
        return [Section("The answer", (missing(run, "accuracy", "answers", "plans"),))]
    (line, *_) = reached.lines
    if not reached.asks:
        read = perplexity(line["perplexity"], line["perplexity_interval"])
        read = "" if line["perplexity"] is None else f" Its perplexity on plain text is {read}."
        text = f"{model_name(run)} was asked no MMLU-style questions.{read}"
        return [Section("The answer", (Text(text), plan_table(reached))), *plans.tasks(reached)]
    each = subjects.stored_subjects(reached, line["plan_id"])
    text = (
        f"{model_name(run)} answers {percent(line['accuracy'], limits=line['interval'])} of "
        f"{plural(line['n'], f'{reached.split} question')} in {plural(len(each), 'subject')}, "
        f"{percent(line['macro'])} as a mean over subjects."
    )
    if line["perplexity"] is not None:
        text += f" Its perplexity on plain text is {perplexity(line['perplexity'])}."
    blocks: tuple[Block, ...] = (
        Text(text),
        plan_table(reached),
        *subjects.categories(reached),
        *subjects.accuracies(run, each),
        *subjects.every_subject(reached, [line]),
    )
    return [Section("The answer", blocks), *plans.tasks(reached)]


def _unknown(run: RunDirectory) -> list[Section]:
    """A run of an experiment that this version does not know: its tables are named."""
    counts = tuple((name, str(count)) for name, count in run.row_counts().items())
    notice = Notice(f"This version of raymerge has no report for runs of {run.experiment}, made by: {command_of(run)}")
    return [Section("The answer", (notice, Table("Its tables", ("table", "rows"), counts)))]


_EXPERIMENTS: dict[str, Callable[[RunDirectory], list[Section]]] = {
    "search": _search,
    "sweep": _sweep,
    "similarity": _similarity,
    "import-similarity": _similarity,
    "sensitivity": _sensitivity,
    "evaluate": _evaluate,
}
