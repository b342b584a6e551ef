"""Several runs on one page: what each found, where on the compression axis it stands, and paired tests between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raymerge.comparisons import comparison_rows, text_comparison_rows
from raymerge.findings import chosen_on
from raymerge.report import figures
from raymerge.report.answer import LINKS, MEASURES, firm
from raymerge.report.asked import command_of, model_name, sources
from raymerge.report.content import ROLES, Block, Figure, Rows, Section, Table, Text
from raymerge.report.plans import VERDICT, compared_cells
from raymerge.report.reached import TEXT_TEST, Reached, removed_share
from raymerge.report.wording import NONE, enumerated, percent, perplexity
from raymerge.schemas import Row
from raymerge.tables import TEXT_TOKENS

_PAIRED = 8  # runs of which all pairs are tested
_SAID = 3  # pairs of which a sentence tells, of more the table alone
_DRAWN = 120  # plans in the figure


def compared(reached: Sequence[Reached], others: Sequence[tuple[str, str, str]]) -> Section:
    """Runs with plans in a table, a figure and paired tests; others: (run, experiment, model) of those without."""
    blocks: list[Block] = []
    judged = _tests(reached) if len(reached) > 1 else []
    blocks += [block for block in judged if isinstance(block, Text)]  # the answer, before what it is about
    if reached:
        blocks.append(_table(reached))
    blocks += [block for block in judged if not isinstance(block, Text)]
    if len(reached) > 1:
        blocks += _figure(reached)
    if others:
        blocks.append(
            Table("Runs without evaluated plans", ("run", "experiment", "model"), tuple(others), words=(0, 1, 2))
        )
    return Section("The runs, side by side", tuple(blocks), level=2)


def _layers(costs: Row, evaluated: bool) -> str:
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
                percent(line["accuracy"], limits=line["interval"]),
                NONE if base is None else percent(base["accuracy"]),
                perplexity(line["perplexity"]),
                NONE if base is None else perplexity(base["perplexity"]),
            )
        )
    told = (
        "The evaluated models"
        if all(one.run.experiment == "evaluate" for one in reached)
        else "The main plan of each run - the one that a search found; for a sweep, the unmerged model; for an "
        "evaluation, the model as it is - next to the unmerged model"
    )
    return _without_empty_columns(
        f"{told}{_caveat(reached)}{_texts(reached)}",
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
        cells,
        words=4,
    )


def _without_empty_columns(
    caption: str, header: tuple[str, ...], cells: Sequence[Sequence[str]], *, words: int
) -> Table:
    """A table without the columns that have no value in any row; words: how many columns, the first, hold words."""
    shown = [i for i in range(len(header)) if i < words or any(row[i] != NONE for row in cells)]
    return Table.of(
        caption, [header[i] for i in shown], [[row[i] for i in shown] for row in cells], words=tuple(range(words))
    )


def _called(one: Reached, line: Row) -> str:
    """A plan's name, marked where the questions that it is reported on are those that chose it."""
    chosen = line is one.best and chosen_on(one.run, one.split)
    return f"{line['label']} (chosen on these questions)" if chosen else line["label"]


def _caveat(reached: Sequence[Reached]) -> str:
    if not any(one.best is not None and chosen_on(one.run, one.split) for one in reached):
        return ""
    return ". A plan chosen on these questions is too good on them: no difference in its favour, or verdict, is a test"


def _texts(reached: Sequence[Reached]) -> str:
    """That perplexities are not to be compared, where they are of different texts, or of other tokens."""
    read = set().union(*(_texts_of(one, "text_hash", "tokens") for one in reached))
    tokens = {one.run.inputs.get(TEXT_TOKENS) for one in reached if _texts_of(one, "text_hash")} - {None}
    apart = len(read) > 1 or len(tokens) > 1
    return ". The perplexities are of different texts, or tokens: do not compare them" if apart else ""


def _texts_of(one: Reached, *columns: str) -> set[tuple[Any, ...]]:
    """What a run's rows of the perplexity of plain text say; those of questions have no text."""
    rows = one.run.read("perplexity", ["target", *columns]).to_pylist()
    return {tuple(row[column] for column in columns) for row in rows if row["target"] == "text"}


def headline(one: Reached) -> Row:
    """The line of the plan that a run is about, of a run that has any."""
    return one.best or one.base or one.lines[0]


def _tests(reached: Sequence[Reached]) -> list[Block]:
    rows = tests(reached)
    if not rows:
        return []
    named = [
        one.name if one.run.experiment == "evaluate" else f"{one.name}: {_called(one, headline(one))}"
        for one in _tested(reached)
    ]
    found = {(row["plan_a"], row["plan_b"], row["measure"]): row for row in rows}
    measures = [name for name in MEASURES if any(row["measure"] == name for row in rows)]
    cells = []
    pairs = list(dict.fromkeys((row["plan_a"], row["plan_b"]) for row in rows))
    for pair in pairs:
        judged = (compared_cells(found.get((*pair, measure))) for measure in measures)
        cells.append((*(named[int(number)] for number in pair), *itertools.chain(*judged)))
    kinds = {one.run.experiment == "evaluate" for one in _tested(reached)}
    tested = {False: "the plans that the searches found", True: "the evaluated models"}
    whose = enumerated([name for kind, name in tested.items() if kind in kinds])
    many = f" (of the first {_PAIRED} of these runs)" if len(named) > _PAIRED else ""
    on_text = f". {TEXT_TEST}" if "text_nll" in measures else ""
    spoken = [
        one.name if one.run.experiment == "evaluate" else f"{_called(one, headline(one))} of {one.name}"
        for one in _tested(reached)
    ]
    said = [_said(spoken[int(a)], spoken[int(b)], (a, b), found) for a, b in pairs] if len(pairs) <= _SAID else []
    return [
        *map(Text, said),
        Table(
            f"Paired tests between {whose}{many}, first minus second, where both were asked the same questions or read "
            "the same text, with 95 % intervals. Accuracy: percentage points, p of McNemar's exact "
            "test. Losses: nats (lower is better), p of a sign-flip test. "
            f"Holm's p, in brackets, is over this table, separately for each measure{on_text}{_caveat(reached)}",
            ("first", "second", *itertools.chain(*((MEASURES[name], VERDICT) for name in measures))),
            tuple(cells),
            words=(0, 1, *range(3, 3 + 2 * len(measures), 2)),
        ),
    ]


def _said(first: str, second: str, pair: tuple[str, str], found: dict[tuple[str, str, str], Row]) -> str:
    """What the tests of a pair say, in a sentence."""
    judged = {MEASURES[name]: firm(found[*pair, name]) for name in MEASURES if (*pair, name) in found}
    parts = [
        (enumerated([measure for measure, said in judged.items() if said == verdict]), link)
        for verdict, link in LINKS.items()
        if verdict in judged.values()
    ]
    (measures, link), *further = parts
    others = [f"; by {measures} it is {link} it" for measures, link in further]
    return f"By {measures}, {first} is {link} {second}{''.join(others)}."


def tests(reached: Sequence[Reached]) -> list[Row]:
    """Rows as those of table `comparisons`, of the best plans of searches and of evaluated models, pair by pair; plans
    are named by their places among these. On questions where both answered the same ones, on plain text where both read
    the same tokens of it."""
    found = _tested(reached)[:_PAIRED]
    if len(found) < 2:  # as of sweeps
        return []
    rows: list[Row] = []
    for part, compare in ((_answers, partial(comparison_rows, "")), (_losses, text_comparison_rows)):
        keys, tables = zip(*(part(one, str(number)) for number, one in enumerate(found)), strict=True)
        pairs = [
            (str(a), str(b))
            for a, b in itertools.combinations(range(len(found)), 2)
            if keys[a] is not None and keys[a] == keys[b]
        ]
        rows += compare(pa.concat_tables(tables), pairs) if pairs else []
    return rows


def _tested(reached: Sequence[Reached]) -> list[Reached]:
    return [one for one in reached if one.best is not None or one.run.experiment == "evaluate"]


def _answers(one: Reached, name: str) -> tuple[object, pa.Table]:
    """What a run's main plan was asked, None where nothing was, and its answers under another plan's name."""
    logits = [f"logit_{letter}" for letter in "abcd"]
    columns = ["plan_id", "split", "subject", "question_id", "content_hash", "answer", "predicted", *logits]
    table = one.run.read("answers", columns)
    table = _named(table.filter(pc.equal(table["split"], one.split)), one, name)
    asked = table.select(["question_id", "subject", "content_hash"]).sort_by("question_id").to_pylist()
    return asked or None, table


def _losses(one: Reached, name: str) -> tuple[object, pa.Table]:
    """Which tokens of which text a run's main plan read, None where it read none, and its losses on them under another
    plan's name."""
    order = [("window", "ascending"), ("position", "ascending")]
    table = _named(one.run.read("text_losses", ["plan_id", "window", "position", "tokens", "nll"]), one, name)
    read = table.select(["window", "position", "tokens"]).sort_by(order).to_pylist()
    # Two tokenizers make as many tokens of a text whose first so many are read.
    return (_texts_of(one, "text_hash"), one.run.inputs.get(TEXT_TOKENS), read) if read else None, table


def _named(table: pa.Table, one: Reached, name: str) -> pa.Table:
    """The rows of a run's main plan, whose name becomes another."""
    mine = table.filter(pc.equal(table["plan_id"], headline(one)["plan_id"]))
    at = mine.schema.get_field_index("plan_id")
    return mine.set_column(at, mine.schema.field(at), pa.array([name] * len(mine), pa.string()))


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
    everything = len(rows) == sum(len(one.lines) for one in reached)
    which = "Every plan of every run" if everything else "Every plan that was asked questions"
    which = which if len(rows) <= _DRAWN else f"{_DRAWN} of {len(rows)} plans, found plans first"
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
