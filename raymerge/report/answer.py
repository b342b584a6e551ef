"""The answer in words: what the plan that a run is about reached, against every other one; for pages and terminals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raymerge import findings, summary
from raymerge.report.reached import Reached
from raymerge.report.wording import enumerated, percent, perplexity, plural
from raymerge.schemas import CHANCE, RUINED, Row

_ORDER = {"base": 0, "random": 2}  # "the best of 10 random candidates and drop" would have drop among the 10
_KEEPING = ("drop", "before_last", "keep_one")  # kinds of plans
#: What a plan is compared by, as sentences and tables have it.
MEASURES = {"accuracy": "accuracy", "answer_nll": "answer NLL", "text_nll": "loss per token"}
#: What comparisons say of a plan, and how a sentence goes on with the other ones.
LINKS = {"better": "better than", "indistinguishable": "indistinguishable from", "worse": "worse than"}


def in_words(reached: Reached) -> list[str]:
    """What the best plan found reached, and whether it is better than the others: a paragraph each on questions, on
    plain text, on whether averaging gained anything, and on what the comparison with random candidates means.

    reached.best must be there, and reached.lines.
    """
    best = reached.the_best
    if not reached.asks and best["perplexity"] is None:
        return [f"The best plan found, {best['label']}, was evaluated on tasks only: see below."]
    paragraphs = [_on_questions(reached)] if reached.asks else []
    if best["perplexity"] is not None:
        paragraphs.append(_on_text(reached))
    paragraphs += _beside_one_layer(reached)
    if reached.asks or reached.against(best["plan_id"], "text_nll"):
        paragraphs += [f"{line}." for line in summary.budget_lines(reached.run)]
    return paragraphs


def _on_questions(reached: Reached) -> str:
    best = reached.the_best
    questions = plural(best["n"], f"{reached.split} question")
    sentences = [f"The best plan found, {best['label']}, answers {percent(best['accuracy'])} of {questions} correctly."]
    sentences += _beside_guessing(best, reached.base)
    if by_accuracy := told(reached, reached.against(best["plan_id"])):
        sentences.append(f"By accuracy it is {by_accuracy}.")
    if by_nll := told(reached, reached.against(best["plan_id"], "answer_nll")):
        sentences.append(f"By answer NLL (the loss on the right letter, finer than accuracy) it is {by_nll}.")
    if findings.chosen_on(reached.run, reached.split):
        sentences.append("The search chose it on questions of this split, so these figures are too good.")
    return " ".join(sentences)


def _beside_guessing(best: Row, base: Row | None) -> list[str]:
    """That an accuracy is not told from one of guesses, which a difference between such plans says nothing of."""
    lows = [None if line is None else line["interval"][0] for line in (best, base)]
    guessing, unmerged = (low is not None and low <= CHANCE for low in lows)
    if not guessing:
        return []
    whose = "Neither this nor the unmerged model's accuracy is" if unmerged else "This is not"
    return [f"{whose} shown to be better than guessing ({percent(CHANCE, 0)})."]


def _on_text(reached: Reached) -> str:
    best, base = reached.the_best, reached.base
    subject = "Its perplexity" if reached.asks else f"The perplexity of the best plan found, {best['label']},"
    unmerged = None if base is None else base["perplexity"]
    beside = "" if unmerged is None else f"; the unmerged model's is {perplexity(unmerged)}"
    sentences = [f"{subject} on plain text is {perplexity(best['perplexity'])}{beside}."]
    if unmerged is not None and best["perplexity"] > RUINED * unmerged:
        sentences.append("The merged model is ruined as a language model.")
    if by_loss := told(reached, reached.against(best["plan_id"], "text_nll")):
        sentences.append(f"By loss per token it is {by_loss}.")
    if others := _layers_that_cost_less(reached):
        sentences.append(
            f"On plain text, dropping {others} costs less: plan.selection=block searches for other layers to remove."
        )
    return " ".join(sentences)


def _beside_one_layer(reached: Reached) -> list[str]:
    """Whether the best plan averages anything, and is better than the best that keeps one of the same layers alone.

    That averaging gained something is said where no plan that keeps one of them is as good: the best was chosen by the
    search's objective alone, and by another measure dropping, which keeps the first, can be better."""
    best, plan = reached.the_best, reached.run.config.get("plan") or {}
    every = findings.sources_of(reached.run)
    sources = every.get(best["plan_id"])
    if sources is None:
        return []
    if not any(own.averaged for own in sources.values()):
        kept_own = ["norms"] * (best["norms"] == "keep") + ["biases"] * (plan.get("biases") != "merge")
        keeping = f" and keeps its own {' and '.join(kept_own)}" if kept_own else ""
        others = findings.replaced(sources).items()
        whose = [f"; layer {kept} has those of {_layers(layers)}{keeping}" for kept, layers in others]
        return [f"It averages nothing: each of its matrices is a single layer's{''.join(whose)}."]
    name = ((reached.run.manifest() or {}).get("keep_one") or {}).get("best")
    # Of the rows: a search may have found what is also a control, whose line then has the found plan's name.
    ids = {row["plan_id"] for row in reached.plans if row["name"] == name and row["kind"] in _KEEPING}
    kept = next((line for line in reached.lines if line["plan_id"] in ids), None)
    # Where the found block need not be the start's.
    elsewhere = (plan.get("selection"), plan.get("block")) == ("block", "search")
    if kept is None or elsewhere or findings.chosen_on(reached.run, reached.split):
        return []
    rows = {measure: reached.against(best["plan_id"], measure).get(kept["plan_id"]) for measure in MEASURES}
    said = {measure: firm(row) for measure, row in rows.items() if row is not None}
    what = f"{kept['label']}, the best of the plans that keep one of the merged layers and drop the others"
    beside = _beside_each(reached, every)
    better = [MEASURES[measure] for measure, verdicts in beside.items() if verdicts == {"better"}]
    if better and "worse" not in beside["accuracy"] | beside["answer_nll"]:
        gained = "averaging gained what choosing one layer did not"
        but = "; by loss per token it is worse" if said.get("text_nll") == "worse" else ""
        return [f"By {enumerated(better)} it is better than {what}: {gained}{but}."]
    if said and "better" not in said.values():
        gained = "the choice of a layer can explain all that it gains over others"
        return [f"By {_either(said)} it is not better than {what}: {gained}."]
    return []


def _beside_each(reached: Reached, sources: Mapping[str, Mapping[int, findings.Sources]]) -> dict[str, set[str]]:
    """Measure -> what the tests say of the best plan beside each that keeps one of the layers that it merges and drops
    the others, refitted ones aside; sources: of `findings.sources_of`."""
    best = reached.the_best["plan_id"]
    untouched = {layer for layer, own in sources[best].items() if not own.averaged}
    fitted = {line["plan_id"] for line in reached.lines if line["refit"]}
    dropping = {row["plan_id"] for row in reached.plans if row["kind"] in _KEEPING} - fitted
    choices = {plan_id for plan_id in dropping if untouched <= sources.get(plan_id, {}).keys()}
    return {
        measure: {firm(row) for other, row in reached.against(best, measure).items() if other in choices}
        for measure in MEASURES
    }


def _either(measures: Iterable[str]) -> str:
    *first, last = map(MEASURES.__getitem__, measures)
    return f"{', '.join(first)} or {last}" if first else last


def _layers(numbers: Iterable[int]) -> str:
    """Layers in a sentence: "layer 11", "layers 7, 9 and 11"."""
    named = [str(number) for number in sorted(numbers)]
    return f"layer{'s' if len(named) > 1 else ''} {enumerated(named)}"


def told(reached: Reached, found: dict[str, Row]) -> str:
    """Comparisons of the best plan as half a sentence: better than ..., indistinguishable from ..., worse than ...

    found: those of `Reached.against`. What an uncorrected p alone tells apart counts as indistinguishable.
    """
    parts = []
    for said, link in LINKS.items():
        names = [
            _called(line)
            for line in sorted(reached.lines, key=lambda line: _ORDER.get(line["kind"], 1))
            if line["plan_id"] in found and firm(found[line["plan_id"]]) == said
        ]
        if names:
            parts.append(f"{link} {enumerated(names)}")
    return "; ".join(parts)


def _called(line: Row) -> str:
    if line["kind"] == "random":
        return f"the {line['label']} candidate{'' if line['label'] == 'best of 1 random' else 's'}"
    if line["kind"] == "keep_one":
        return f"the best single layer kept ({line['label']})"
    return "the unmerged model" if line["kind"] == "base" else line["label"]


def firm(row: Row) -> str:
    """What a comparison says when Holm's p is asked: a key of `LINKS`."""
    said = findings.verdict(row)
    return said if said in LINKS else "indistinguishable"


#: Controls that drop other layers than the last, by kind and name.
_OTHERS = {
    ("before_last", "before_last"): "the layers before the last one",
    ("drop", "block_influence"): "the layers of least block influence",
}


def _layers_that_cost_less(reached: Reached) -> str:
    """Which other layers cost plain text less, and least, when they are dropped, where the last layers were merged;
    "" where none do."""
    if (reached.run.config.get("plan") or {}).get("selection") != "tail":
        return ""
    by_loss = reached.against(reached.the_best["plan_id"], "text_nll")
    cheaper = [
        line
        for line in reached.lines
        if (line["kind"], line["name"]) in _OTHERS
        and line["plan_id"] in by_loss
        and firm(by_loss[line["plan_id"]]) == "worse"
    ]
    least = min(cheaper, key=lambda line: line["perplexity"], default=None)
    return "" if least is None else _OTHERS[least["kind"], least["name"]]
