"""Multiple-choice tasks whose choices are ranked by their log-likelihood after a context: PIQA, HellaSwag, and others.

Files are JSON lines or parquet in the columns that the data sets have on the Hugging Face hub; contexts and choices
are those of lm-evaluation-harness 0.4.13 (`lm_eval/tasks`), so that its figures can be held against ours. What each
format asks, and where that is said, stands in `FORMATS`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raymerge.identity import digest
from raymerge.json_lines import half_character, parsed_lines
from raymerge.questions import DataError, drawn

_LETTERS = "ABCD"


@dataclass(frozen=True, slots=True)
class Item:
    """One question: `context`, the `choices` that may follow it after a space, and the right one's number.

    `item_id` is TASK/ROW with the 0-based row of the file (RACE: that of the article's last question).
    """

    item_id: str
    context: str
    choices: tuple[str, ...]
    answer: int

    @property
    def content_hash(self) -> str:
        """16 hex digits over context and choices."""
        return digest([self.context, self.choices])


@dataclass(frozen=True)
class Task:
    """The items of one file, in its order, and the examples that precede each.

    normalised: the task's convention also reports accuracy by log-likelihood per character of the choice.
    """

    name: str
    normalised: bool
    items: tuple[Item, ...]
    examples: tuple[Item, ...]

    @cached_property
    def identity(self) -> str:
        """16 hex digits over everything that enters prompts and scores, in order."""
        parts = [[[item.context, item.choices, item.answer] for item in each] for each in (self.items, self.examples)]
        return digest([*parts, self.normalised])

    @property
    def prefix(self) -> str:
        """What precedes every item's context: each example with its right choice and an empty line."""
        return "".join(f"{item.context} {item.choices[item.answer]}\n\n" for item in self.examples)


def load_task(
    name: str,
    format: str,
    file: str | Path,
    *,
    shots: int = 0,
    examples: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Task:
    """Read a task.

    Parameters
    ----------
    name : how tables name it.
    format : a name in `FORMATS`.
    file : JSON lines (.jsonl, .json) or parquet (.parquet).
    shots : so many examples before each item: the first of the file `examples`, which is of the same format.
    limit : at most so many items, drawn with `seed`: which depends on the seed, the name and the row alone.

    Raises
    ------
    DataError : no such file, a missing column, a malformed row, an answer that is none of the choices, too few
        examples.
    """
    if format not in FORMATS:
        raise DataError(f"task {name}: unknown format {format!r}; there are {', '.join(FORMATS)}")
    if shots and examples is None:
        raise DataError(f"task {name}: shots={shots} needs examples, a file of the same format such as the train split")
    items = _items(name, format, file)
    shown: tuple[Item, ...] = ()
    if shots and examples is not None:
        shown = _items(name, format, examples)[:shots]
        if len(shown) < shots:
            raise DataError(f"task {name}: shots={shots}, but {examples} has {len(shown)} items")
        asked = {(item.context, item.choices) for item in items}
        if both := [item for item in shown if (item.context, item.choices) in asked]:
            raise DataError(
                f"task {name}: example {both[0].item_id} of {examples} is also asked in {file}; take examples from "
                "another split"
            )
    if limit is not None:
        kept = drawn([[item.item_id] for item in items], limit, seed)
        items = tuple(items[row] for row in kept)
    return Task(name, FORMATS[format].normalised, items, shown)


def _items(name: str, format: str, file: str | Path) -> tuple[Item, ...]:
    rows = _read(Path(file).expanduser())
    found = []
    for row, context, choices, answer in FORMATS[format].items(rows):
        if not 0 <= answer < len(choices):
            raise DataError(
                f"{row.where}: the answer is number {answer}, not one of the {len(choices)} choices (the hub's test "
                "splits of some tasks have no answers: take the validation split)"
            )
        found.append(Item(f"{name}/{row.number}", context, tuple(choices), answer))
    return tuple(found)


# Reading ------------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One row of a file, with what errors call it."""

    file: Path
    number: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file} row {self.number} (from 0)"

    def get(self, column: str) -> Any:
        if column not in self.values:
            raise DataError(f"{self.where}: no {column}; has: {', '.join(self.values)}. Is it another format?")
        return self.values[column]

    def text(self, column: str) -> str:
        return _text(self.get(column), f"{self.where}: {column}")

    def texts(self, column: str) -> list[str]:
        return _texts(self.get(column), f"{self.where}: {column}")

    def label(self, column: str) -> int:
        """A number, also as text or as yes and no; -1, which no choice has, where it is empty."""
        value = self.get(column)
        if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}\s*|", value):
            return int(value) if value.strip() else -1
        if not isinstance(value, int):
            raise DataError(f"{self.where}: {column} is {value!r}, not a number; fix it")
        return int(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {value!r}, not text; fix it")
    if (half := half_character(value)) is not None:
        raise DataError(f"{where} has half a character, {half}: write both of its halves, or take it out")
    return value


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{where} is {value!r}, not a list of at least two texts; fix it")
    return [_text(each, where) for each in value]


def _read(file: Path) -> list[_Row]:
    try:
        if file.suffix == ".parquet":
            values = pq.read_table(file).to_pylist()
        elif file.suffix in (".jsonl", ".json"):
            values = [row for _, row in parsed_lines(file.read_text(encoding="utf-8").split("\n"))]
        else:
            raise DataError(f"{file} is neither .jsonl (or .json, one object a line) nor .parquet; convert it")
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as {file.suffix.removeprefix('.')}: {error}") from error
    if not values or not all(isinstance(row, dict) for row in values):
        raise DataError(f"{file} holds no rows of named columns (JSON lines have one object a line); fetch it again")
    return [_Row(file, number, row) for number, row in enumerate(values)]


# Formats ------------------------------------------------------------------------------------------------------------

#: A row that names the item, its context, its choices, the number of the right one.
_Asked = tuple[_Row, str, Sequence[str], int]


def _piqa(row: _Row) -> _Asked:
    choices = (row.text("sol1"), row.text("sol2"))
    return row, f"Question: {row.text('goal')}\nAnswer:", choices, row.label("label")


def _hellaswag(row: _Row) -> _Asked:
    context = f"{row.text('activity_label')}: {row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    endings = [_without_brackets(ending) for ending in row.texts("endings")]
    return row, _without_brackets(context), endings, row.label("label")


def _without_brackets(text: str) -> str:
    """WikiHow's marks out of a text: its titles begin a new sentence, everything else in brackets goes."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _labelled(row: _Row) -> tuple[list[str], int]:
    """Choices as {"text": [...], "label": [...]} and the number of the one whose label is answerKey."""
    choices = row.get("choices")
    if not isinstance(choices, dict) or not {"text", "label"} <= set(choices):
        raise DataError(f"{row.where}: choices is {choices!r}, not {{'text': […], 'label': […]}}; fix it")
    texts, labels = (_texts(choices[part], f"{row.where}: choices.{part}") for part in ("text", "label"))
    key = row.text("answerKey").strip()
    return texts, labels.index(key) if key in labels else -1


def _arc(row: _Row) -> _Asked:
    return row, f"Question: {row.text('question')}\nAnswer:", *_labelled(row)


def _openbookqa(row: _Row) -> _Asked:
    return row, row.text("question_stem"), *_labelled(row)


def _boolq(row: _Row) -> _Asked:
    # "label" in SuperGLUE's copy, "answer" (true or false) in google/boolq
    answer = row.label("label" if "label" in row.values else "answer")
    return row, f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:", ("no", "yes"), answer


def _race(rows: Sequence[_Row]) -> Iterator[_Asked]:
    """One item an article: its last question, after the others with their answers."""
    articles: dict[tuple[str, int], list[tuple[_Row, str, list[str], int]]] = {}
    for row in rows:
        whole = "problems" in row.values
        problems = articles.setdefault((row.text("article"), row.number if whole else 0), [])
        if whole:  # EleutherAI/race: an article a row, its questions as the text of a Python list
            try:
                own = ast.literal_eval(row.text("problems"))
                found = [(p["question"], p["options"], p["answer"]) for p in own]
            except (SyntaxError, ValueError, TypeError, KeyError) as error:
                raise DataError(f"{row.where}: problems is not a list of questions ({error!r}); fix it") from error
            for question, options, answer in found:
                where = f"{row.where}: problems: a question's"
                asked = _text(question, f"{where} text"), _texts(options, f"{where} options")
                problems.append((row, *asked, _letter(answer)))
        else:  # ehovy/race: a question a row
            problems.append((row, row.text("question"), row.texts("options"), _letter(row.text("answer"))))
    for (article, _), problems in articles.items():
        context = f"Article: {article}\n\n"
        for row, question, options, answer in problems[:-1]:
            if not 0 <= answer < len(options):
                raise DataError(f"{row.where}: an answer is none of A, B, C, D; fix it")
            if question.endswith("  _  ."):
                context += f"{question[:-5]}{options[answer]}\n"
            else:
                context += f"Question: {question}\nAnswer: {options[answer]}\n"
        if problems:
            row, question, options, answer = problems[-1]
            yield row, context + question, options, answer


def _letter(text: str) -> int:
    return _LETTERS.index(text) if text in tuple(_LETTERS) else -1


def _each(ask: Callable[[_Row], _Asked]) -> Callable[[Sequence[_Row]], Iterator[_Asked]]:
    return lambda rows: map(ask, rows)


class Format(NamedTuple):
    """items: rows of a file to what is asked. normalised: see `Task`. source: where lm-eval says so, and the hub's
    data sets that have these columns."""

    items: Callable[[Sequence[_Row]], Iterator[_Asked]]
    normalised: bool
    source: str


FORMATS: dict[str, Format] = {
    "piqa": Format(_each(_piqa), True, "tasks/piqa/piqa.yaml; baber/piqa (goal, sol1, sol2, label)"),
    "hellaswag": Format(
        _each(_hellaswag),
        True,
        "tasks/hellaswag/{hellaswag.yaml,utils.py}; Rowan/hellaswag (activity_label, ctx_a, ctx_b, endings, label)",
    ),
    "arc": Format(_each(_arc), True, "tasks/arc/arc_easy.yaml; allenai/ai2_arc (question, choices, answerKey)"),
    "openbookqa": Format(
        _each(_openbookqa),
        True,
        "tasks/openbookqa/openbookqa.yaml; allenai/openbookqa (question_stem, choices, answerKey)",
    ),
    "boolq": Format(
        _each(_boolq),
        False,
        "tasks/super_glue/boolq/default.yaml; aps/super_glue (passage, question, label), google/boolq (…, answer)",
    ),
    "race": Format(
        _race,
        False,
        "tasks/race/{race.yaml,preprocess_race.py}; EleutherAI/race (article, problems), ehovy/race (article, "
        "question, options, answer)",
    ),
}
