"""The plans of a run and what each reached, read once: what every section about plans is made of."""

from __future__ import annotations

import math

from raymerge import findings, summary
from raymerge.report.asked import run_name
from raymerge.report.content import Block, Notice, Table, role_of
from raymerge.report.wording import finite, listed
from raymerge.schemas import TEXT_SPLIT, Row
from raymerge.tables import RunDirectory

_KINDS = {
    "base": "unmerged",
    "found": "found by the search",
    "random": "random coefficients",
    "drop": "layers dropped",
    "keep_one": "one of the merged layers kept, the best to keep alone",
    "fixed": "one coefficient for all steps",
    "file": "given coefficients",
}
# By name and kind: an alpha file may have any name.
_NAMES = {
    ("drop", "drop"): "last layers dropped",
    ("before_last", "before_last"): "layers before the last one dropped",
    ("drop_block", "drop"): "block of layers dropped",
    ("similarity_shuffled", "file"): "coefficients of a shuffled similarity",
}


#: What plans of an alignment are called; the glossary says what it does to a layer.
ALIGNED = {"neurons": "aligned", "activations": "aligned by activations", "rows": "rows aligned"}

#: What is known of the sign-flip test of passages (docs/results.md, 2026-11-28: 13.8, 9.1 and 7.9 %).
TEXT_TEST = (
    "The test on text is overconfident, since a merge affects neighbouring passages alike: in simulations without any "
    "difference, p was below 0.05 in 14, 9 and 8 % of cases, not 5, with 2,048, 8,192 and 16,384 tokens"
)


class Reached:
    """The plans of one run and what each reached on its report split. Reads the tables once.

    lines: those of `findings.plan_lines`, with `role`, `costs` (its row or {}), `refit` (its method or None), `fate`
    (`findings.fates_of`) and `as_is` (whether it is a model that was evaluated, of which nothing is known).
    asks: whether questions were asked; without, plans are judged by plain text. best: the line of the plan that the run
    is about, None where it has none. base: the line of the unmerged model, or None. name: what the run is called on its
    page.
    """

    def __init__(self, run: RunDirectory, name: str | None = None):
        self.run, self.name = run, run_name(run) if name is None else name
        self.split = str(run.config.get("data", {}).get("report_split", "test"))
        self.plans = run.read("plans").to_pylist()
        self.labels = findings.labels_of(run)
        self.kinds = {row["plan_id"]: row["kind"] for row in self.plans}  # the last: found before the control it equals
        costs = {row["plan_id"]: row for row in run.read("costs").to_pylist()}
        options = {row["plan_id"]: {key: row[key] for key in ("alignment", "norms")} for row in self.plans}
        refits = {row["plan_id"]: row["method"] for row in run.read("refits").to_pylist()}
        fates = findings.fates_of(run)
        self.lines = [
            line
            | options[line["plan_id"]]
            | {
                "role": role_of(line["kind"]),
                "costs": costs.get(line["plan_id"], {}),
                "refit": refits.get(line["plan_id"]),
                "fate": fates.get(line["plan_id"], ""),
                "as_is": run.experiment == "evaluate",
            }
            for line in findings.plan_lines(run, self.split)
        ]
        self.asks = any(line["accuracy"] is not None for line in self.lines)
        chosen = ((run.manifest() or {}).get("best") or {}).get("plan_id")
        # Without a manifest that says so it is the last that was found, in the order in which a search stores them,
        # and not the most accurate of them here: that would be chosen by the questions reported on.
        # Of the rows, since a line stands where its plan first did, as a control that was found again.
        found = [row["plan_id"] for row in self.plans if row["kind"] == "found"]
        chosen = chosen or (found[-1] if found else None)
        self.best = next((line for line in self.lines if line["plan_id"] == chosen), None)
        self.lines.sort(key=merit, reverse=True)
        self.base = next((line for line in self.lines if line["kind"] == "base"), None)
        splits = (self.split, TEXT_SPLIT)
        self.comparisons = [row for row in run.read("comparisons").to_pylist() if row["split"] in splits]
        self.searched = run.read("subject_comparisons").to_pylist()

    @property
    def the_best(self) -> Row:
        """`best`, for what is said only of runs that have one."""
        assert self.best is not None
        return self.best

    def against(self, plan_id: str, measure: str = "accuracy", *, searched: bool = False) -> dict[str, Row]:
        """By the other plan, one plan's rows of `comparisons` by a measure, as this plan minus the other.

        searched: those on the subjects alone that the search was for.
        """
        rows = findings.of_plan(self.searched if searched else self.comparisons, plan_id)
        return {row["plan_b"]: row for row in rows if row["measure"] == measure}


def drawn(line: Row) -> dict[str, float | None]:
    """A line's accuracy and perplexity with their intervals, as drawings have them: columns accuracy, low, high,
    perplexity, perplexity_low, perplexity_high; None for what was not measured or is not finite."""
    low, high = line["interval"]
    text_low, text_high = map(finite, line["perplexity_interval"])
    return {
        "accuracy": line["accuracy"],
        "low": low,
        "high": high,
        "perplexity": finite(line["perplexity"]),
        "perplexity_low": text_low,
        "perplexity_high": text_high,
    }


def removed_share(costs: Row) -> float | None:
    """The share of the unmerged model's parameters that a plan removes, by its row of `costs`; None without one."""
    whole = costs.get("parameters", 0) + costs.get("parameters_removed", 0)
    return costs["parameters_removed"] / whole if whole else None


def merit(line: Row) -> float:
    """What lines, or points of a curve, are ranked by: accuracy, or without questions the least perplexity."""
    if line["accuracy"] is not None:
        return line["accuracy"]
    read = finite(line["perplexity"])
    return -math.inf if read is None else -read


def described(line: Row) -> str:
    """What a plan is, in words, and in brackets which layers it merges or leaves out."""
    if line["as_is"]:  # it may have been merged before
        return "as it is"
    kind: str = line["kind"]
    alignment: str = line["alignment"]
    words = [_NAMES.get((line["name"], kind), _KINDS.get(kind, kind))]
    if alignment != "none":
        words.append(ALIGNED.get(alignment, alignment))
    if line["norms"] == "fold":
        words.append("norms folded")
    if line["refit"]:
        words.append(f"seams refitted by {line['refit']}")
    return ", ".join(words) + (f" ({line['fate']})" if line["fate"] else "")


def chosen_layers(run: RunDirectory) -> list[Block]:
    """Which layers go, where a block of them or one after another was chosen, and by what."""
    tables = ((summary.block_table, (2, 4, 5)), (summary.removal_table, (3,)))
    made = ((*table(run), words) for table, words in tables)
    return [Table.of(caption, header, cells, words=words) for caption, header, cells, words in made if cells]


def missing(run: RunDirectory, *tables: str) -> Notice:
    """What stands where tables have no rows."""
    empty = [table for table in tables if not run.has(table)]
    where = f"table{'s' if len(empty) > 1 else ''} {listed(empty)}" if empty else "the tables that it needs"
    return Notice(f"Not shown: the run has no rows in {where}. Repeat its command to continue it.")
