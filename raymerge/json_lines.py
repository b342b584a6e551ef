"""JSON lines as users write them: values with their lines' numbers, and half characters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


def parsed_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """The values of JSON lines, each with its line's number, from 1; ValueError, which names the line, where one cannot
    be read. Empty lines are left out."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:  # its own place is always in line 1
                raise ValueError(f"line {number}, character {error.pos + 1}: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error


def half_character(text: str) -> str | None:
    """The first half of a character in a text, as JSON escapes it; None where all are whole.

    JSON can escape either half of a character beyond U+FFFF alone, and no tokenizer and no file takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
