"""The answer in words: what the plan that a run is about reached, against every other one; for pages and terminals."""

from __future__ import annotations

from raymerge import findings, summary
from raymerge.report.reached import Reached
from raymerge.report.wording import enumerated, percent, perplexity, plural

_ORDER = {"base": 0, "random": 2}  # "the best of 10 random candidates and drop" would have drop among the 10
_KEEPING = ("drop", "before_last", "keep_one")  # kinds of plans
#: What comparisons say of a plan, and how a sentence goes on with the other ones.
LINKS = {"better": "better than", "indistinguishable": "indistinguishable from", "worse": "worse than"}


def in_words(reached: Reached) -> list[str]:
    """What the best plan found reached, and whether it is better than the others: a paragraph each on questions, on
    plain text, on whether averaging gained anything, and on what the comparison with random candidates means.

    reached.best must be there, and reached.lines.
    """
    best = reached.best
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
    best = reached.best
    questions = plural(best["n"], f"{reached.split} question")
    sentences = [f"The best plan found, {best['label']}, answers {percent(best['accuracy'])} of {questions} correctly."]
    if by_accuracy := told(reached, reached.against(best["plan_id"])):
        sentences.append(f"By accuracy it is {by_accuracy}.")
    if by_nll := told(reached, reached.against(best["plan_id"], "answer_nll")):
        sentences.append(f"By answer NLL (the loss on the right letter, finer than accuracy) it is {by_nll}.")
    if findings.chosen_on(reached.run, reached.split):
        sentences.append("The search chose it on questions of this split, so these figures are too good.")
    return " ".join(sentences)


def _on_text(reached: Reached) -> str:
    best, base = reached.best, reached.base
    subject = "Its perplexity" if reached.asks else f"The perplexity of the best plan found, {best['label']},"
    unmerged = ""
    if base is not None and base["perplexity"] is not None:
        unmerged = f"; the unmerged model's is {perplexity(base['perplexity'])}"
    sentences = [f"{subject} on plain text is {perplexity(best['perplexity'])}{unmerged}."]
    if by_loss := told(reached, reached.against(best["plan_id"], "text_nll")):
        sentences.append(f"By loss per token it is {by_loss}.")
    if others := _layers_that_cost_less(reached):
        sentences.append(
            f"On plain text, dropping {others} costs less: plan.selection=block searches for other layers to remove."
        )
    return " ".join(sentences)


def _beside_one_layer(reached: Reached) -> list[str]:
    """Whether the best plan is better than the best that averages nothing and keeps one of the same layers."""
    best, config = reached.best, reached.run.config
    name = ((reached.run.manifest() or {}).get("keep_one") or {}).get("best")
    kept = next((line for line in reached.lines if line["name"] == name and line["kind"] in _KEEPING), None)
    elsewhere = (config.get("plan") or {}).get("block") == "search"  # where the found block need not be the start's
    if kept is None or kept is best or elsewhere or findings.chosen_on(reached.run, reached.split):
        return []
    measures = ("accuracy", "answer_nll") if reached.asks else ("text_nll",)
    rows = [reached.against(best["plan_id"], measure).get(kept["plan_id"]) for measure in measures]
    said = {firm(row) for row in rows if row is not None}
    what = f"{kept['label']}, the best of the plans that keep one of the merged layers and drop the others"
    by = f"By {'accuracy or answer NLL' if reached.asks else 'loss per token'} it is"
    if "better" in said and "worse" not in said:
        return [f"{by} better than {what}: averaging gained what no choice of one layer does."]
    if said and "better" not in said:
        return [f"{by} not better than {what}: the choice of a layer can explain all that it gains over others."]
    return []


def told(reached: Reached, found: dict[str, dict]) -> str:
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


def _called(line: dict) -> str:
    if line["kind"] == "random":
        return f"the {line['label']} candidate{'' if line['label'] == 'best of 1 random' else 's'}"
    if line["kind"] == "keep_one":
        return f"the best single layer kept ({line['label']})"
    return "the unmerged model" if line["kind"] == "base" else line["label"]


def firm(row: dict) -> str:
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
    by_loss = reached.against(reached.best["plan_id"], "text_nll")
    cheaper = [
        line
        for line in reached.lines
        if (line["kind"], line["name"]) in _OTHERS
        and line["plan_id"] in by_loss
        and firm(by_loss[line["plan_id"]]) == "worse"
    ]
    least = min(cheaper, key=lambda line: line["perplexity"], default=None)
    return "" if least is None else _OTHERS[least["kind"], least["name"]]
