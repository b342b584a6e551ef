"""How experiments tell a user how far they are, without knowing whether anybody watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

#: What a process that ends at once gives a terminal first: a bar may have hidden the cursor, and stands in the line.
SHOW_CURSOR = b"\x1b[?25h\n"


class Progress(Protocol):
    """What an experiment calls. Stages follow one another; `advance` counts within the current stage."""

    def stage(self, name: str, total: int) -> None:
        """A new stage of `total` units begins."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` units of the current stage are finished; `note` is the latest figure worth showing."""

    def message(self, text: str) -> None:
        """A line for the user to keep."""


class Silent:
    """Says nothing; the default of library calls."""

    def stage(self, name: str, total: int) -> None:
        pass

    def advance(self, done: int, note: str = "") -> None:
        pass

    def message(self, text: str) -> None:
        pass


@contextmanager
def step(progress: Progress, name: str) -> Iterator[None]:
    """A stage of work that cannot be counted: one unit, finished at the end of the block."""
    progress.stage(name, 1)
    yield
    progress.advance(1)
