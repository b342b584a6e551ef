"""What a page consists of: sections of text, facts, tables and figures, as plain data that nothing has rendered yet.

Everything here may hold foreign text (a model's path, a subject's name): `render` escapes all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from raymerge.schemas import Row

FOUND, RANDOM, CONTROL, UNMERGED = "found by the search", "best random plan", "control", "unmerged"
#: What a plan is on a page, in the order of legends; `role_of` says which.
ROLES = (FOUND, RANDOM, CONTROL, UNMERGED)


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Notice:
    """Something to be seen before the figures: a warning, or what is missing."""

    kind: ClassVar[str] = "notice"
    text: str


@dataclass(frozen=True)
class Fact:
    """A term with its value; note: a second line in smaller type."""

    term: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """Terms and values: `large` as figures to be read from afar, otherwise as a list."""

    kind: ClassVar[str] = "facts"
    facts: tuple[Fact, ...]
    large: bool = False


@dataclass(frozen=True)
class Listing:
    """Text as it is, such as a command or a configuration; folded away under `title` where it has one."""

    kind: ClassVar[str] = "listing"
    text: str
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text. words: the numbers of columns that hold words and are aligned to the left; the others hold
    numbers. marked: the numbers of rows to stand out. folded: closed until it is asked for."""

    kind: ClassVar[str] = "table"
    caption: str
    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    marked: tuple[int, ...] = ()
    folded: bool = False

    @classmethod
    def of(cls, caption: str, header: Sequence[str], cells: Iterable[Sequence[str]], **options: Any) -> Table:
        """The same from lists, as `summary` has them."""
        return cls(caption, tuple(header), tuple(map(tuple, cells)), **options)


@dataclass(frozen=True)
class Rows:
    """The rows that figures are drawn from: values are text, numbers, truths or None.

    sources: (table, path of its parquet files) of the tables that they come from.
    """

    columns: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    sources: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, rows: list[Row], sources: tuple[tuple[str, str], ...]) -> Rows:
        columns = tuple(rows[0]) if rows else ()
        return cls(columns, tuple(tuple(row[name] for name in columns) for row in rows), sources)


@dataclass(frozen=True)
class View:
    """One drawing: a Vega-Lite specification on the data set "rows". zoom: the specification's signal by channel."""

    spec: dict[str, Any]
    description: str
    title: str = ""
    zoom: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """Drawings of the same rows beside each other, with what they show in words. command: what made the rows."""

    kind: ClassVar[str] = "figure"
    title: str
    caption: str
    views: tuple[View, ...]
    rows: Rows
    command: str
    columns: int = 1


Block = Text | Notice | Facts | Listing | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it. level: 2 for a run, 3 within one. short: its name in lists."""

    title: str
    blocks: tuple[Block, ...]
    level: int = 3
    short: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on a page. lead: the question in a paragraph; made: what made the page, and when; several: whether it
    is of several runs."""

    title: str
    lead: str
    sections: tuple[Section, ...]
    made: str
    several: bool = False


def role_of(kind: str) -> str:
    """What a plan of this kind of table `plans` is on the page."""
    return {"found": FOUND, "random": RANDOM, "base": UNMERGED}.get(kind, CONTROL)
