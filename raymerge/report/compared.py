"""Several runs on one page: what each found, where on the compression axis it stands, and paired tests between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raymerge.findings import chosen_on, verdict
from raymerge.report import figures
from raymerge.report.asked import command_of, model_name, sources
from raymerge.report.content import ROLES, Block, Figure, Rows, Section, Table
from raymerge.report.reached import Reached, removed_share
from raymerge.report.wording import NONE, difference, interval, p_value, percent, perplexity
from raymerge.statistics import holm, mcnemar, paired_difference

_PAIRED = 8  # runs of which all pairs are tested
_DRAWN = 120  # plans in the figure


def compared(reached: Sequence[Reached], others: Sequence[tuple[str, str, str]]) -> Section:
    """Runs with plans in a table, a figure and paired tests; others: (run, experiment, model) of those without."""
    blocks: list[Block] = []
    if reached:
        blocks.append(_table(reached))
    if len(reached) > 1:
        blocks += [*_tests(reached), *_figure(reached)]
    if others:
        blocks.append(
            Table("Runs without evaluated plans", ("run", "experiment", "model"), tuple(others), words=(0, 1, 2))
        )
    return Section("The runs, side by side", tuple(blocks), level=2)


def _layers(costs: dict, evaluated: bool) -> str:
    """The layers that are left, and out of how many where the run knows."""
    if not costs:
        return NONE
    return str(costs["layers"]) + ("" if evaluated else f" of {costs['layers'] + costs['layers_removed']}")


def _table(reached: Sequence[Reached]) -> Table:
    cells = []
    for one in reached:
        # Of what an evaluated model was made, by this or another tool, its run does not know.
        evaluated = one.run.experiment == "evaluate"
        line, base = headline(one), None if evaluated else one.base
        cells.append(
            (
                one.name,
                one.run.experiment,
                model_name(one.run),
                _called(one, line),
                _layers(line["costs"], evaluated),
                NONE if evaluated else percent(removed_share(line["costs"])),
                f"{percent(line['accuracy'])} {interval(*line['interval'])}".strip(),
                NONE if base is None else percent(base["accuracy"]),
                perplexity(line["perplexity"]),
                NONE if base is None else perplexity(base["perplexity"]),
            )
        )
    return Table(
        "The main plan of each run - the one that a search found; for a sweep, the unmerged model; for an evaluation, "
        f"the model as it is - next to the unmerged model{_caveat(reached)}{_texts(reached)}",
        (
            "run",
            "experiment",
            "model",
            "plan",
            "layers",
            "parameters removed",
            "accuracy [95 %]",
            "unmerged",
            "perplexity",
            "unmerged",
        ),
        tuple(cells),
        words=(0, 1, 2, 3),
    )


def _called(one: Reached, line: dict) -> str:
    """A plan's name, marked where the questions that it is reported on are those that chose it."""
    chosen = line is one.best and chosen_on(one.run, one.split)
    return f"{line['label']} (chosen on these questions)" if chosen else line["label"]


def _caveat(reached: Sequence[Reached]) -> str:
    if not any(one.best is not None and chosen_on(one.run, one.split) for one in reached):
        return ""
    return ". A plan chosen on these questions is too good on them: no difference in its favour, or verdict, is a test"


def _texts(reached: Sequence[Reached]) -> str:
    """That perplexities are not to be compared, where they are of different texts, or of more and fewer tokens."""
    texts = {
        (row["text_hash"], row["tokens"])
        for one in reached
        for row in one.run.read("perplexity", ["target", "text_hash", "tokens"]).to_pylist()
        if row["target"] == "text"
    }
    return ". The perplexities are of different texts, or tokens: do not compare them" if len(texts) > 1 else ""


def headline(one: Reached) -> dict:
    """The line of the plan that a run is about, of a run that has any."""
    return one.best or one.base or one.lines[0]


def _tests(reached: Sequence[Reached]) -> list[Block]:
    rows = tests(reached)
    if not rows:
        return []
    many = len(_tested(reached)) > _PAIRED
    first = f" (of the first {_PAIRED} of these runs)" if many else ""
    cells = tuple(
        (
            row["a"],
            row["b"],
            str(row["n"]),
            difference(row),
            p_value(row["p_value"]),
            p_value(row["p_holm"]),
            verdict(row),
        )
        for row in rows
    )
    return [
        Table(
            f"Paired tests between the plans that the searches found and the evaluated models{first}, on the questions "
            "that both answered: difference in accuracy (first minus second, percentage points) with its 95 % "
            f"interval, McNemar's exact p, and Holm's p over this table{_caveat(reached)}",
            ("first", "second", "questions", "difference [95 %]", "p", "p (Holm)", "verdict"),
            cells,
            words=(0, 1, 6),
        )
    ]


def tests(reached: Sequence[Reached]) -> list[dict[str, Any]]:
    """Comparisons of the best plans of searches and of evaluated models, pair by pair, where both answered the same
    questions."""
    found = _tested(reached)[:_PAIRED]
    rows = []
    answers = [_right(one) for one in found]
    for (a, right_a), (b, right_b) in itertools.combinations(zip(found, answers, strict=True), 2):
        if not right_a or right_a.keys() != right_b.keys():
            continue
        x, y = (np.array([side[key] for key in right_a], dtype=bool) for side in (right_a, right_b))
        paired = paired_difference(x.astype(np.float64), y.astype(np.float64))
        rows.append(
            {
                "a": f"{a.name}: {_called(a, headline(a))}",
                "b": f"{b.name}: {_called(b, headline(b))}",
                "n": len(right_a),
                "measure": "accuracy",
                **paired._asdict(),
                "p_value": mcnemar(x, y).p_value,
            }
        )
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]) if rows else [], strict=True):
        row["p_holm"] = float(adjusted)
    return rows


def _tested(reached: Sequence[Reached]) -> list[Reached]:
    return [one for one in reached if one.best is not None or one.run.experiment == "evaluate"]


def _right(one: Reached) -> dict[tuple[str, str, str], bool]:
    """Question -> whether the run's main plan got it right; a question is its subject, its number and its content."""
    table = one.run.read(
        "answers", ["plan_id", "split", "subject", "question_id", "content_hash", "answer", "predicted"]
    )
    mine = table.filter(
        pc.and_(pc.equal(table["plan_id"], headline(one)["plan_id"]), pc.equal(table["split"], one.split))
    ).to_pylist()
    return {
        (row["subject"], row["question_id"], row["content_hash"]): row["predicted"] == row["answer"] for row in mine
    }


def _figure(reached: Sequence[Reached]) -> list[Figure]:
    """Every plan that was asked questions; nothing where none was."""
    rows = []
    for one in reached:
        for line in one.lines:
            removed = removed_share(line["costs"])
            if removed is not None and line["accuracy"] is not None:
                rows.append(
                    {
                        "run": one.name,
                        "model": model_name(one.run),
                        "plan": line["label"],
                        "role": line["role"],
                        "removed": removed,
                        "accuracy": line["accuracy"],
                        "low": line["interval"][0],
                        "high": line["interval"][1],
                        "perplexity": line["perplexity"],
                        "questions": line["n"],
                    }
                )
    rows.sort(key=lambda row: -ROLES.index(row["role"]))
    which = "Every plan of every run" if len(rows) <= _DRAWN else f"{_DRAWN} of {len(rows)} plans, found plans first"
    rows = rows[-_DRAWN:]
    if not rows:
        return []
    tips = [("run", "run"), ("model", "model"), ("plan", "plan"), ("removed", "parameters removed", ".1%"),
            ("accuracy", "accuracy", ".1%"), ("low", "95 % from", ".1%"), ("high", "to", ".1%"),
            ("perplexity", "perplexity", ",.4~g"), ("questions", "questions", ",d")]  # fmt: skip
    if all(one.run.experiment == "evaluate" for one in reached):  # one above the other in a scatter, without names
        title, apart = "Accuracy, all runs", "questions"
        order = sorted(rows, key=lambda row: -row["accuracy"])
        told = f"Accuracy of {len(rows)} runs."
        view = figures.intervals(
            order, told, name="run", value="accuracy", axis="accuracy", form=figures.SHARES, tips=tips
        )
    else:
        title, apart = "Accuracy against compression, all runs", "models or different questions"
        view = figures.scatter(
            rows,
            f"Accuracy against the share of parameters removed, {len(rows)} plans of {len(reached)} runs.",
            x=("removed", "parameters removed", figures.SHARES),
            y=("accuracy", "accuracy", figures.SHARES),
            interval=("low", "high"),
            tips=tips,
        )
    evaluated = apart != "questions" and any(one.run.experiment == "evaluate" for one in reached)
    figure = Figure(
        title,
        f"{which}, with 95 % intervals. Runs on different {apart} are not comparable."
        + " An evaluated model stands at 0 %, also one that was merged before." * evaluated,
        (view,),
        Rows.of(rows, tuple(source for one in reached for source in sources(one.run, "accuracy", "costs"))),
        "; ".join(dict.fromkeys(command_of(one.run) for one in reached)),
    )
    return [figure]
