"""Tables as Parquet files: parts that one process writes, replaces and gathers while any number read them.

    tables/NAME/PART.parquet  rows written together
    tables/NAME/all.parquet   what `replace` and `compact` write; its metadata names the parts that it stands for

A part that `all` stands for counts no more, so that one rename decides, and files that a process died before deleting
are no rows.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raymerge.identity import canonical_json, digest
from raymerge.schemas import SCHEMAS, described, schema_of
from raymerge.storage import RunError, Storage

_T = TypeVar("_T")

_WORD = r"[A-Za-z0-9][A-Za-z0-9._]*"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_WHOLE = "all"  # the part that replace and compact write
_PACKED = 65536  # bytes of a part from which it is compressed: unpacking 20 columns of a row takes 1.2 ms of 1.7
_IN_ONE = 1 << 20  # bytes of a part up to which it is read in one request
_CONTENTS = b"raymerge.contents"  # key of its metadata: JSON [[part, rows], …], the parts it stands for


def part_name(*words: str) -> str:
    """A name that `Tables.append` takes for a part, made of words as data has them: no others have the same."""
    plain = len(words) > 1 and all(re.fullmatch(_WORD, word) for word in words)  # no digest then, which has no "-"
    return "-".join(words) if plain else digest(list(words))


class Tables:
    """The tables of one storage, by their names in `SCHEMAS`; rows are Arrow tables that have these schemas."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._next: dict[str, int] = {}
        self._gathered: dict[str, dict[str, int]] = {}  # of tables that this process writes: see _contents

    def append(self, table: str, data: pa.Table, part: str | None = None) -> str:
        """Write `data` as one part of a table and return the part's name, by default a running number.

        A part of the same name is replaced, also one that `compact` has gathered.
        """
        if part is None:
            if table not in self._next:
                names = [*self.part_names(table), *dict(self._contents(table))]
                self._next[table] = 1 + max((int(name[:6]) for name in names if re.match(r"\d{6}-", name)), default=-1)
            part = f"{self._next[table]:06d}-{uuid.uuid4().hex[:8]}"
            self._next[table] += 1
        elif not re.fullmatch(_PART, part) or part == _WHOLE:
            raise ValueError(f"part is {part!r}, but should be letters, digits, '.', '_', '-' and not {_WHOLE!r}")
        if table not in self._gathered:  # reading it for every batch takes 10 ms where it names 10,000
            self._gathered[table] = dict(self._contents(table))
        contents = list(self._gathered[table].items())
        if part in self._gathered[table]:  # compacted: its rows lie inside all.parquet, so rewrite that in one go
            whole, kept, start = self._read_part(table, _WHOLE), [], 0
            for name, count in contents:
                kept += [] if name == part else [whole.slice(start, count)]
                start += count
            contents = [item for item in contents if item[0] != part]
            placed = pa.concat_tables([*kept, data, whole.slice(start)])
            self._write_part(table, _WHOLE, placed, [*contents, (part, data.num_rows)])
        else:
            self._write_part(table, part, data)
        return part

    def replace(self, table: str, data: pa.Table) -> None:
        """Make a table consist of `data`.

        One rename decides: a reader sees the old rows or the new, never both, even if the process
        dies between writing the new file and deleting the old ones.
        """
        superseded = [name for name in self.part_names(table) if name != _WHOLE]
        self._write_part(table, _WHOLE, data, [(name, 0) for name in superseded])
        self._delete_parts(table, superseded)

    def compact(self, table: str) -> None:
        """Gather the parts of a table into one file, in the order `read` gives them; same guarantee as `replace`."""
        contents, parts = self._contents(table), self.part_names(table)
        loose = [name for name in parts if name != _WHOLE and name not in dict(contents)]
        if loose:
            whole = [self._read_part(table, _WHOLE)] if _WHOLE in parts else []
            # rows without a part of their own (from `replace`) get a name, so that the slices stay contiguous
            unnamed = sum(piece.num_rows for piece in whole) - sum(count for _, count in contents)
            contents += [(f"-{uuid.uuid4().hex[:8]}", unnamed)] if unnamed else []
            tables = self._storage.each(lambda name: self._read_part(table, name), loose)
            contents += [(name, piece.num_rows) for name, piece in zip(loose, tables, strict=True)]
            self._write_part(table, _WHOLE, pa.concat_tables([*whole, *tables]), contents)
        self._delete_parts(table, [name for name in parts if name != _WHOLE])

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """Return all rows of a table, parts in name order, with exactly its schema (empty if never written)."""
        schema = schema_of(table)
        wanted = schema.names if columns is None else list(columns)
        if unknown := [name for name in wanted if name not in schema.names]:
            raise ValueError(f"table {table} has no column {', '.join(unknown)}; it has {', '.join(schema.names)}")
        schema = pa.schema([schema.field(name) for name in wanted])
        pieces = self._visit(table, lambda name: self._read_part(table, name, wanted))
        return pa.concat_tables([schema.empty_table(), *pieces]).combine_chunks()

    def row_counts(self) -> dict[str, int]:
        """Return the number of rows of every table that has any, from the files' footers."""
        names = (name for name in self._storage.names("tables") if name in SCHEMAS)
        counts = {name: sum(self._part_rows(name)) for name in names}
        return {name: count for name, count in sorted(counts.items()) if count}

    def has(self, table: str) -> bool:
        """Return whether a table has at least one row."""
        schema_of(table)
        return any(self._part_rows(table))

    # --- inside -------------------------------------------------------------------------------

    def part_names(self, table: str) -> list[str]:
        """Parts of a table, sorted; temporary and foreign files are no parts."""
        return [n[:-8] for n in self._storage.names(f"tables/{table}") if n.endswith(".parquet") and n[0] not in "._"]

    def _opened(self, table: str, name: str, use: Callable[[pq.ParquetFile], _T]) -> _T:
        """use(ParquetFile) for one part."""
        path = _part_path(table, name)
        try:
            with self._storage.open(path) as source:
                # column by column a store would be asked for each, 20 times a part of `trials`
                whole = pa.BufferReader(source.read()) if source.size() <= _IN_ONE else source
                with pq.ParquetFile(whole, pre_buffer=True) as file:
                    return use(file)
        except FileNotFoundError:
            raise
        except (pa.ArrowInvalid, OSError) as error:  # the latter of damaged pages, and of a store that is gone
            cure = "if it is damaged, delete it; then run the same command again"
            raise RunError(
                f"{self._storage.show(path)} is not a readable part of table {table} ({error}); {cure}"
            ) from error

    def _footer(self, table: str, name: str) -> tuple[int, list[tuple[str, int]]]:
        """(rows, contents) of a part; contents lists the parts a whole file stands for, with their rows."""

        def use(file: pq.ParquetFile) -> tuple[int, list[tuple[str, int]]]:
            text = (file.schema_arrow.metadata or {}).get(_CONTENTS, b"[]")
            return file.metadata.num_rows, [(part, rows) for part, rows in json.loads(text)]

        return self._opened(table, name, use)

    def _part_rows(self, table: str) -> list[int]:
        return self._visit(table, lambda part: self._footer(table, part)[0])

    def _contents(self, table: str) -> list[tuple[str, int]]:
        try:
            return self._footer(table, _WHOLE)[1]
        except FileNotFoundError:
            return []

    def _read_part(self, table: str, name: str, columns: list[str] | None = None) -> pa.Table:
        schema = SCHEMAS[table] if columns is None else pa.schema([SCHEMAS[table].field(c) for c in columns])

        def use(file: pq.ParquetFile) -> pa.Table:
            present = set(file.schema_arrow.names)
            if missing := [f.name for f in schema if f.name not in present and not f.nullable]:
                raise RunError(
                    f"{self._storage.show(_part_path(table, name))} lacks {', '.join(missing)}: another version of "
                    "raymerge wrote it; read it with that version"
                )
            data = file.read([c for c in schema.names if c in present], use_threads=file.metadata.num_rows > 1000)
            if data.schema.equals(schema):
                return data.replace_schema_metadata()
            rows = file.metadata.num_rows
            columns = [data.column(f.name) if f.name in present else pa.nulls(rows, f.type) for f in schema]
            return pa.table(columns, schema=schema)

        return self._opened(table, name, use)

    def _visit(self, table: str, use: Callable[[str], _T]) -> list[_T]:
        """[use(name) for every part that counts], again from the start if parts vanish or are gathered meanwhile."""
        schema_of(table)
        for attempt in range(10):
            try:
                names = self.part_names(table)
                gathered = self._footer(table, _WHOLE)[1] if _WHOLE in names else []
                gone = dict(gathered)
                # the whole file first: its rows came before the parts written since
                names.sort(key=lambda name: (name != _WHOLE, name))
                found = self._storage.each(use, [name for name in names if name not in gone])
                if self._contents(table) == gathered:
                    return found
            except FileNotFoundError:
                pass
            time.sleep(0.02 * attempt)  # the writer gathered or replaced the parts after we listed them
        raise RunError(
            f"{self._storage.name}: the parts of table {table} keep vanishing while they are read; try again"
        )

    def _write_part(self, table: str, name: str, data: pa.Table, contents: list[tuple[str, int]] | None = None) -> None:
        if contents is not None:
            self._gathered.pop(table, None)
            schema = described(table)
            metadata = {**schema.metadata, _CONTENTS: canonical_json(contents)}
            data = pa.Table.from_arrays(data.columns, schema=schema.with_metadata(metadata))
        # encoded in memory first: a failure to encode cannot touch the disk, and the size is known for the message
        sink = pa.BufferOutputStream()
        pq.write_table(data, sink, compression="zstd" if data.nbytes >= _PACKED else "none")
        self._storage.publish(_part_path(table, name), sink.getvalue())
        if contents is not None:
            self._gathered[table] = dict(contents)

    def _delete_parts(self, table: str, names: Iterable[str]) -> None:
        self._storage.each(lambda name: self._storage.delete(_part_path(table, name)), names)


def _part_path(table: str, name: str) -> str:
    return f"tables/{table}/{name}.parquet"
