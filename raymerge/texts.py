"""Plain texts: the embedded one, files, and files of the hub's data sets."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raymerge import demo
from raymerge.config import ConfigError
from raymerge.hub import fetch
from raymerge.json_lines import half_character, parsed_lines

MOST_CHARACTERS = 2**25  # some 8 million tokens; a file of C4 has 800 million, which every process would hold
_COLUMN = "text"  # of tables, as most of the hub's data sets of plain text name it
_HUB_FILE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?:(?P<file>[^:]+)")
_JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def read_plain_text(source: str, key: str) -> str:
    """A plain text: "demo", a file, or a file of a data set of the hub as OWNER/NAME[@REVISION]:FILE.

    Files are UTF-8 text; or parquet or JSON lines (also .gz) whose rows have a column `text`, which are joined by
    newlines. Of a longer text the first `MOST_CHARACTERS` characters are read. key: how errors name the source. Raises
    ConfigError.
    """
    if source == "demo":
        return demo.TEXT_PATH.read_text(encoding="utf-8")
    path, on_hub = Path(source).expanduser(), _HUB_FILE.fullmatch(source)
    if on_hub and not path.exists():
        path = _downloaded(on_hub["id"], on_hub["revision"], on_hub["file"], source, key)
    try:
        if path.name.endswith(".parquet"):
            return _joined(_of_parquet(path, source, key))
        if path.name.endswith(_JSON_LINES):
            return _joined(_of_json_lines(path, source, key))
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_CHARACTERS)
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(
            f"{key} = {source!r}: there is no such file{where}; one of the hub is named OWNER/NAME[@REVISION]:FILE"
        ) from None
    except ConfigError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{key} = {source!r} cannot be read as UTF-8 text, parquet or JSON lines: {error}") from error


def text_hash(text: str) -> str:
    """16 hex digits of SHA-256 over a text's UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _joined(rows: Iterator[str]) -> str:
    """Rows with newlines between them, as many as are read."""
    texts, characters = [], 0
    for row in rows:
        texts.append(row)
        characters += len(row) + 1
        if characters > MOST_CHARACTERS:
            break
    return "\n".join(texts)[:MOST_CHARACTERS]


def _of_parquet(path: Path, source: str, key: str) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if _COLUMN not in schema.names:
            raise ConfigError(f"{key} = {source!r} has no column {_COLUMN!r}, but {', '.join(schema.names)}")
        kind = schema.field(_COLUMN).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(f"{key} = {source!r}: column {_COLUMN!r} holds {kind}, not strings")
        for batch in file.iter_batches(columns=[_COLUMN]):
            yield from (row for row in batch.column(0).to_pylist() if row is not None)


def _of_json_lines(path: Path, source: str, key: str) -> Iterator[str]:
    """Line by line: pyarrow's reader takes no row above 1 MB, as a book is, and no other column of several types."""
    columns: dict[str, None] = {}
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for number, row in parsed_lines(file):
            if not isinstance(row, dict):
                raise ConfigError(f"{key} = {source!r} has rows that are no objects with a column {_COLUMN!r}")
            columns |= dict.fromkeys(row)
            if (text := row.get(_COLUMN)) is None:
                continue
            if not isinstance(text, str):
                raise ConfigError(f"{key} = {source!r}: column {_COLUMN!r} holds {type(text).__name__}, not strings")
            if (half := half_character(text)) is not None:
                raise ConfigError(
                    f"{key} = {source!r}, line {number}, has half a character, {half}: write both of its halves, or "
                    "take it out"
                )
            yield text
    if _COLUMN not in columns:
        raise ConfigError(f"{key} = {source!r} has no column {_COLUMN!r}, but {', '.join(columns) or 'no rows'}")


def _downloaded(name: str, revision: str | None, file: str, source: str, key: str) -> Path:
    """A data set's file, from the hub's cache where it is there already."""
    from huggingface_hub import hf_hub_download

    what = (
        f"{key} = {source!r}: no such file here, and {file!r} of the data set {name!r} (revision {revision or 'main'})"
    )
    return fetch(what, lambda: hf_hub_download(name, file, repo_type="dataset", revision=revision), ConfigError)
