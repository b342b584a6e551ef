"""What the tables of a run say, as numbers: what each plan reached, and by which questions it was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raymerge.diffusion import degeneracy
from raymerge.domains import known_domains
from raymerge.objectives import parse_objective, score_answers, score_text
from raymerge.schemas import Row, letter_logits
from raymerge.tables import MACRO, MICRO, RunDirectory, layer_ranges, plan_labels, turned


def always_a_share(run: RunDirectory, split: str) -> float:
    """Share of a split's questions whose right answer is A: what a model that always says A would get."""
    answers = run.read("answers", ["plan_id", "split", "answer"])
    answers = answers.filter(pc.equal(answers["split"], split))
    one_plan = answers.filter(pc.equal(answers["plan_id"], answers["plan_id"][0]))
    return pc.mean(pc.equal(one_plan["answer"], 0)).as_py()


def asks_questions(run: RunDirectory) -> bool:
    """Whether a run asks questions; one with data.mmlu null has plain text and tasks alone."""
    return run.config.get("data", {}).get("mmlu", "") is not None


def labels_of(run: RunDirectory) -> dict[str, str]:
    """plan_id -> what the plan is called (`schemas.plan_labels`); of a model that was evaluated as it is, and may have
    been merged before, "the model"."""
    plans = run.read("plans", ["plan_id", "name", "kind"]).to_pylist()
    if run.experiment == "evaluate":
        return {row["plan_id"]: "the model" for row in plans}
    return plan_labels(plans, run.read("trials", ["searcher", "status"]).to_pylist())


@dataclass
class Sources:
    """The original layers whose matrices a kept layer has, by effective coefficients; averaged: whether any matrix is
    of several of them. Where none is, several can still have a matrix each."""

    layers: set[int] = field(default_factory=set)
    averaged: bool = False


def sources_of(run: RunDirectory) -> dict[str, dict[int, Sources]]:
    """plan_id -> kept layer, ascending -> where its matrices come from."""
    kept: dict[str, dict[int, Sources]] = {}
    for row in sorted(run.read("coefficients").to_pylist(), key=lambda row: row["kept_layer"]):
        sources = kept.setdefault(row["plan_id"], {}).setdefault(row["kept_layer"], Sources())
        if row["coefficient"] > 0.0:
            sources.layers.add(row["source_layer"])
        sources.averaged |= 0.0 < row["coefficient"] < 1.0
    return kept


def replaced(sources: Mapping[int, Sources]) -> dict[int, set[int]]:
    """Kept layer -> the layers that have a matrix of it whole, of one that averages none and has some of another
    layer; it keeps what is not averaged."""
    return {kept: own.layers for kept, own in sources.items() if not own.averaged and own.layers != {kept}}


def fates_of(run: RunDirectory) -> dict[str, str]:
    """plan_id -> which of the original layers are averaged into one, have whole matrices in another layer, and are in
    no layer of the merged model: '9-13 merged', 'without 9-12', 'matrices of 11 in 7, without 7-10', or '' if all stay.

    Not by the steps: one whose alpha is 0 removes the layer that it merges into, which keeps what is not averaged
    ('matrices of 10-11 merged in 7, without 7-9').
    """
    costs = {row["plan_id"]: row["layers"] + row["layers_removed"] for row in run.read("costs").to_pylist()}
    fates = {}
    for plan_id, groups in sources_of(run).items():
        words = [
            f"{layer_ranges(own.layers)} merged"
            if kept in own.layers
            else f"matrices of {layer_ranges(own.layers)} merged in {kept}"
            for kept, own in groups.items()
            if own.averaged
        ]
        words += [
            f"matrices of {layer_ranges(layers).replace(', ', ' and ')} in {kept}"
            for kept, layers in replaced(groups).items()
        ]
        gone = set(range(costs.get(plan_id, 0))).difference(*(own.layers for own in groups.values()))
        fates[plan_id] = ", ".join(words + ([f"without {layer_ranges(gone)}"] if gone else []))
    return fates


def plan_lines(run: RunDirectory, split: str) -> list[Row]:
    """For each plan, in the order in which they were stored, its name and what it reached on `split`.

    Keys: plan_id, name, label (`labels_of`), kind, layers, n (questions), accuracy, interval (low, high; 95 %), macro,
    macro_interval, nll, perplexity (plain text), perplexity_interval, question_perplexity (the questions' own tokens),
    question_interval, picked (share of each letter, A to D) and top_is_letter (share); None where a table has nothing.
    In a run that asks no questions (data.mmlu null) all that is about questions is None, and n is 0.
    """
    plans = {row["plan_id"]: row for row in run.read("plans").to_pylist()}
    accuracy = {
        (row["plan_id"], row["subject"]): row for row in run.read("accuracy").to_pylist() if row["split"] == split
    }
    texts = {row["plan_id"]: row for row in run.read("perplexity").to_pylist() if row["target"] == "text"}
    asked = question_perplexities(run)
    costs = {row["plan_id"]: row for row in run.read("costs").to_pylist()}
    answers = run.read("answers", ["plan_id", "split", "predicted", "top_is_letter"])
    answers = answers.filter(pc.equal(answers["split"], split))
    lines, labels = [], labels_of(run)
    for plan_id, plan in plans.items():
        if asks_questions(run) and (plan_id, MICRO) not in accuracy:
            continue
        micro, macro = (accuracy.get((plan_id, subject), _UNASKED) for subject in (MICRO, MACRO))
        own = answers.filter(pc.equal(answers["plan_id"], plan_id))
        picked = [pc.mean(pc.equal(own["predicted"], letter)).as_py() for letter in range(4)]
        lines.append(
            {
                "plan_id": plan_id,
                "name": plan["name"],
                "label": labels[plan_id],
                "kind": plan["kind"],
                "layers": costs.get(plan_id, {}).get("layers"),
                "n": micro["n"],
                "accuracy": micro["accuracy"],
                "interval": (micro["ci_low"], micro["ci_high"]),
                "macro": macro["accuracy"],
                "macro_interval": (macro["ci_low"], macro["ci_high"]),
                "nll": micro["nll"],
                **_read("perplexity", "perplexity_interval", texts.get(plan_id)),
                **_read("question_perplexity", "question_interval", asked.get((plan_id, None))),
                "picked": picked,
                "top_is_letter": pc.mean(own["top_is_letter"]).as_py(),
            }
        )
    return lines


_UNASKED = dict.fromkeys(("accuracy", "ci_low", "ci_high", "nll")) | {"n": 0}


def _read(name: str, limits: str, row: Row | None) -> dict[str, Any]:
    """A perplexity and its interval under these names, from a row of `perplexity` or none."""
    row = row or {}
    return {name: row.get("perplexity"), limits: (row.get("ci_low"), row.get("ci_high"))}


def question_perplexities(run: RunDirectory) -> dict[tuple[str, str | None], Row]:
    """(plan_id, subject, or None for all questions) -> row of `perplexity` of the questions' own tokens, where
    data.question_perplexity asked for them."""
    rows = run.read("perplexity").to_pylist()
    return {(row["plan_id"], row["subject"]): row for row in rows if row["target"] == "question"}


_MORE_IS_BETTER = ("accuracy", "acc", "acc_norm")


def verdict(row: Row) -> str:
    """What a row of `comparisons` says of its first plan: more accuracy is better, less answer NLL."""
    if row["p_value"] >= 0.05:
        return "indistinguishable"
    found = "better" if (row["difference"] > 0) == (row["measure"] in _MORE_IS_BETTER) else "worse"
    alone = row["p_holm"] is not None and row["p_holm"] >= 0.05
    return f"{found}, but not after correction" if alone else found


def of_plan(rows: Iterable[Row], plan_id: str) -> list[Row]:
    """Those rows of `comparisons`, or of a table like it, that a plan is in, each as the plan minus the other one."""
    return [
        row if row["plan_a"] == plan_id else turned(row) for row in rows if plan_id in (row["plan_a"], row["plan_b"])
    ]


def comparison_rows(run: RunDirectory) -> list[Row]:
    """Comparisons of accuracies, or of losses on plain text where no questions are asked."""
    measure = "accuracy" if asks_questions(run) else "text_nll"
    return [row for row in run.read("comparisons").to_pylist() if row["measure"] == measure]


def objective_value(run: RunDirectory, split: str, plan_id: str, objective: str) -> float | None:
    """An objective's value on a split's stored answers and the text reported on, without a ceiling; None where the
    run lacks what it takes: the plan's answers to the subjects, the unmerged model's for answer_kl, the loss on a
    text."""
    answers = run.read("answers")
    answers = answers.filter(pc.equal(answers["split"], split))
    own = answers.filter(pc.equal(answers["plan_id"], plan_id)).sort_by("question_id")
    present, domains = set(own["subject"].to_pylist()), known_domains(run.config.get("data", {}).get("domains"))
    parsed = parse_objective(objective).over(present, domains)
    reference = text = None
    if parsed.needs_reference:
        base = [row["plan_id"] for row in run.read("plans").to_pylist() if row["kind"] == "base"]
        unmerged = answers.filter(pc.is_in(answers["plan_id"], pa.array(base, pa.string()))).sort_by("question_id")
        if not base or unmerged["question_id"].to_pylist() != own["question_id"].to_pylist():
            return None
        reference = letter_logits(unmerged)
    if parsed.needs_text:
        texts = run.read("perplexity").to_pylist()
        text = next((row["nll"] for row in texts if (row["plan_id"], row["target"]) == (plan_id, "text")), None)
        if text is None:
            return None
        if not parsed.needs_answers:
            return score_text(objective, text).value
    if not present or any(term.subjects and present.isdisjoint(term.subjects) for term in parsed.terms):
        return None
    return score_answers(
        objective,
        letter_logits(own),
        own["answer"].to_numpy(),
        own["subject"].to_pylist(),
        reference=reference,
        text_nll=text,
        domains=domains,
    ).value


def searched_names(run: RunDirectory) -> list[str]:
    """The subjects and domains that a search was for, as its objective names them; none where it was for all."""
    return parse_objective(run.config["search"]["objective"]).judged_on


def judges_answers(run: RunDirectory) -> bool:
    """Whether a search chose by questions: one for text_nll alone chooses by the text, also where it asks some."""
    return asks_questions(run) and parse_objective(run.config["search"]["objective"]).needs_answers


def chosen_on(run: RunDirectory, split: str) -> bool:
    """Whether a run's search chose by the questions of this split, so that figures on it are no test."""
    same = run.experiment == "search" and run.config.get("data", {}).get("search_split") == split
    return same and judges_answers(run)


def degenerate_layers(run: RunDirectory) -> dict[tuple[str, str], set[int]]:
    """(subset, language) -> the layers whose diffusion map is degenerate (`diffusion.degeneracy`): whatever their
    similarities are, also far above those of shuffled samples, they are noise that layers share."""
    rows = run.read("similarity", ["subset", "language", "n_samples"]).to_pylist()
    sizes = {(row["subset"], row["language"]): row["n_samples"] for row in rows}
    found: dict[tuple[str, str], set[int]] = {key: set() for key in sizes}
    for row in run.read("degeneracy").to_pylist():
        key = row["subset"], row["language"]
        if key in sizes and degeneracy(row["effective_rank"], sizes[key]):
            found[key].add(row["layer"])
    return found
