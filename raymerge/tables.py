"""Run directories: Arrow tables with fixed schemas, atomic writes, and a manifest written last.

    RUN/config.yaml           the resolved config; its first lines name the experiment and the run
    RUN/inputs.json           identities of the files that the config led to
    RUN/tables/NAME/*.parquet parts of table NAME; `all.parquet` is what `replace` and `compact` write
    RUN/models/NAME/          checkpoints
    RUN/manifest.json         written last; no manifest: the run is going on or was killed

One process writes a run, any number read it; on a disk it holds RUN/.lock until the manifest is
written. Every file appears whole: under a temporary name and renamed on disks, by one PUT on object
stores.
"""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import yaml

from raymerge.diffusion import degeneracy
from raymerge.identity import canonical_json, digest, plain, software, without_secrets
from raymerge.objectives import above_ceiling, is_minimised, rank
from raymerge.schemas import (
    MACRO,
    MICRO,
    RUINED,
    SCHEMAS,
    conform,
    derive_accuracy,
    derive_task_accuracy,
    plan_labels,
    schema_of,
    way_of,
)
from raymerge.statistics import paired_difference, wilson_interval, without_far_worse
from raymerge.storage import LOCK, TEMPORARY, Lock, RunError, Storage

__all__ = [
    "FREE_SECTIONS",
    "MACRO",
    "MICRO",
    "RUINED",
    "SCHEMAS",
    "RunDirectory",
    "RunError",
    "above_ceiling",
    "degeneracy",
    "derive_accuracy",
    "derive_task_accuracy",
    "is_minimised",
    "paired_difference",
    "part_name",
    "plan_labels",
    "rank",
    "way_of",
    "wilson_interval",
    "without_far_worse",
]

FREE_SECTIONS = ("workers", "output")
"""Top-level config sections that may differ when a run is resumed: they cannot change a result."""

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_INPUTS = "inputs.json"
_WHOLE = "all"  # the part that replace and compact write
_MANY = 50  # parts of a table, that a run which is taken up again is not to read one by one each time
_PACKED = 65536  # bytes of a part from which it is compressed: unpacking 20 columns of a row takes 1.2 ms of 1.7
_IN_ONE = 1 << 20  # bytes of a part up to which it is read in one request
_CONTENTS = b"raymerge.contents"  # key of its metadata: JSON [[part, rows], …], the parts it stands for


class RunDirectory:
    """A run's folder, local or on any file system pyarrow opens. Use `open` to write, `load` to read.

    Attributes
    ----------
    run_id : str
        16 hex digits of SHA-256 over the experiment and the config without `workers` and `output`,
        so a resumed run keeps it.
    experiment : str
    config : dict
        The resolved config.
    is_local : bool
        Whether `path_of` gives paths of this machine's disk.
    """

    def __init__(self, path, filesystem: pafs.FileSystem | None = None):
        """Attach to a folder without reading it; `open` and `load` are the ways in."""
        self._storage = Storage(path, filesystem)
        self.is_local = self._storage.is_local
        self.run_id = self.experiment = ""
        self.config: dict = {}
        self._next: dict[str, int] = {}
        self._gathered: dict[str, dict[str, int]] = {}  # of tables that this process writes: see _contents
        self._lock: Lock | None = None
        self._begun = (datetime.now(UTC), time.monotonic())

    def __repr__(self) -> str:
        return f"RunDirectory({self._storage.name!r}, {self.experiment!r}, run_id={self.run_id!r})"

    @classmethod
    def open(cls, path, config: dict, experiment: str, *, filesystem: pafs.FileSystem | None = None) -> RunDirectory:
        """Create the run, or take up the one that is there if its config allows.

        Parameters
        ----------
        path : str or path
            A local folder, or a URI such as s3://bucket/run or file:///data/run.
        config : dict
            The resolved config; tuples and paths are stored as lists and text, URIs without credentials.
        experiment : str
            The experiment's name, such as "search".
        filesystem : pyarrow.fs.FileSystem, optional
            The file system `path` lies in, where a URI cannot say it.

        Raises
        ------
        RunError
            Where the folder holds something else, another experiment, or a config that differs in
            more than `workers` and `output`; the message names the keys with both values. Where
            another process is writing the run.
        """
        run, config, stored = cls._checked(path, config, experiment, filesystem)
        if not run.complete:
            run._lock = run._storage.lock()
            # while this process waited, another may have begun the run, with another config, and ended
            stored = cls._checked(path, config, experiment, filesystem)[2]
        # the stored config names the run: 1 and 1.0 compare equal but have different digests
        run._adopt(experiment, config, named_by=stored[1] if stored else config)
        run._storage.clear_temporary()
        if stored is None or stored[1] != config:
            head = f"# experiment: {experiment}\n# run_id: {run.run_id}\n"
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
            run._storage.publish("config.yaml", (head + text).encode("utf-8"))
        return run

    @classmethod
    def check(cls, path, config: dict, experiment: str) -> None:
        """Raise RunError where `open` would because of what is there, and touch nothing: before models are read."""
        cls._checked(path, config, experiment, None)

    @classmethod
    def _checked(
        cls, path, config: dict, experiment: str, filesystem: pafs.FileSystem | None
    ) -> tuple[RunDirectory, dict, tuple[str, dict] | None]:
        """The run, not yet adopted, the config as it is stored, and experiment and config of the run that is there."""
        run = cls(path, filesystem)
        config = without_secrets(plain(config))
        if run._storage.is_file():
            raise RunError(f"{run._storage.name} is a file, but a run directory is a folder; choose another --out")
        stored = run._read_config()
        if stored is None:
            others = [name for name in run._storage.names() if not name.startswith(TEMPORARY) and name != LOCK]
            if others:
                found = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
                raise RunError(
                    f"{run._storage.name} holds {found} but no config.yaml, so it is not a run directory; "
                    "choose another --out, or empty the folder"
                )
        else:
            run._refuse_other(stored[0], without_secrets(stored[1]), experiment, config)
        return run, config, stored

    @classmethod
    def load(cls, path, *, filesystem: pafs.FileSystem | None = None) -> RunDirectory:
        """Return an existing run for reading (whatever its state); RunError if there is none."""
        run = cls(path, filesystem)
        stored = run._read_config()
        if stored is None:
            raise RunError(
                f"{run._storage.name} is not a run directory: it has no config.yaml; give a folder a command wrote"
            )
        run._adopt(*stored, named_by=stored[1])
        return run

    # --- tables -------------------------------------------------------------------------------

    def append(self, table: str, rows, part: str | None = None) -> str:
        """Write rows as one part of a table and return the part's name.

        Parameters
        ----------
        table : str
            A name in `SCHEMAS`.
        rows : list of dict or pyarrow.Table
            Without run_id, or with this run's. Nullable columns may be missing.
        part : str, optional
            Letters, digits, '.', '_' and '-'. Writing the same part again replaces it, also after
            `compact`, so a repeated batch leaves no row twice. By default a running number.

        Raises
        ------
        ValueError
            For an unknown or missing column, a null where none may be, a value of the wrong type.
        RunError
            Where the disk is full or the write fails; nothing half-written remains.
        """
        data = conform(table, rows, self.run_id)
        if part is None:
            if table not in self._next:
                names = [*self._part_names(table), *dict(self._contents(table))]
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

    def replace(self, table: str, rows) -> None:
        """Make a table consist of exactly these rows; arguments and errors as for `append`.

        One rename decides: a reader sees the old rows or the new, never both, even if the process
        dies between writing the new file and deleting the old ones.
        """
        data = conform(table, rows, self.run_id)
        superseded = [name for name in self._part_names(table) if name != _WHOLE]
        self._write_part(table, _WHOLE, data, [(name, 0) for name in superseded])
        self._delete_parts(table, superseded)

    def compact(self, table: str) -> None:
        """Gather the parts of a table into one file, in the order `read` gives them; same guarantee as `replace`."""
        contents, parts = self._contents(table), self._part_names(table)
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
        counts = {name: sum(self._visit(name, lambda part, name=name: self._footer(name, part)[0])) for name in names}
        return {name: count for name, count in sorted(counts.items()) if count}

    def has(self, table: str) -> bool:
        """Return whether a table has at least one row."""
        schema_of(table)
        return any(self._visit(table, lambda part: self._footer(table, part)[0]))

    # --- manifest, folders ----------------------------------------------------------------------

    def begin(self) -> None:
        """Start or continue the work: remove the manifest of an earlier end, gather the batches of trials that a killed
        search left one by one, and start the clock. That it continues is an incident."""
        self._lock = self._lock or self._storage.lock()
        self._storage.delete("manifest.json")
        self._begun = (datetime.now(UTC), time.monotonic())
        if len(self._part_names("trials")) > _MANY:
            self.compact("trials")
        rows = {name: count for name, count in self.row_counts().items() if name != "incidents"}
        if rows:
            self.note("resumed", detail=", ".join(f"{count} {name}" for name, count in rows.items()))

    def hold_to(self, inputs: dict[str, str]) -> None:
        """Refuse to continue what was made from other inputs: the same paths may lead to other files by now.

        Parameters
        ----------
        inputs : dict of str to str
            Identities by name. They are stored beside the config; a name that is new is added.

        Raises
        ------
        RunError
            Where rows are stored that were made from others; the message names them with both identities.
        """
        try:
            stored = json.loads(self._storage.read(_INPUTS))
        except FileNotFoundError:
            stored = {}
        except ValueError as error:
            raise RunError(f"{self._storage.show(_INPUTS)} is not JSON ({error}); delete the folder") from error
        known = {name: value for name, value in inputs.items() if name in stored}
        if differing := _differences(stored, stored | known):
            if any(table != "incidents" for table in self.row_counts()):
                lines = "".join(f"\n  {name}: {there} in the run, {now} now" for name, there, now in sorted(differing))
                raise RunError(
                    f"{self._storage.name} holds results made from other inputs, under the same paths:{lines}\n"
                    "choose another --out, or delete the folder to start anew"
                )
        if stored | inputs != stored:
            text = json.dumps(stored | inputs, indent=2, ensure_ascii=False) + "\n"
            self._storage.publish(_INPUTS, text.encode("utf-8"))

    def note(self, kind: str, worker: str | None = None, detail: str = "") -> None:
        """Add a row to table `incidents`."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.append("incidents", [{"time": now, "kind": kind, "worker": worker, "detail": detail[:500]}])

    def write_manifest(self, status: str, *, command: list[str] | None = None, **facts) -> dict:
        """Write manifest.json, the last act of a run, and return its content.

        Parameters
        ----------
        status : {"complete", "failed"}
        command : list of str, optional
            What was run; by default `sys.argv`. Credentials in URIs are left out.
        **facts
            What else is known: seeds, model and data identity, an error. NaN becomes null.
        """
        if status not in ("complete", "failed"):
            raise ValueError(f"status is {status!r}, but should be 'complete' or 'failed'")
        started, clock = self._begun
        counts = self.row_counts()
        if status == "complete":  # a search leaves a part for every batch: readers then open one file a table
            for table in counts:
                self.compact(table)
        content = {
            "status": status,
            "experiment": self.experiment,
            "run_id": self.run_id,
            "command": list(sys.argv if command is None else command),
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
            **software(),
            "rows": counts,
        }
        if clash := sorted(content.keys() & facts.keys()):
            raise ValueError(f"the manifest sets {', '.join(clash)} itself; give these facts other names")
        content = without_secrets(plain({**content, **facts}, nan_as_none=True))
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        self._storage.publish("manifest.json", text.encode("utf-8"))
        self._lock = None
        return content

    def manifest(self) -> dict | None:
        """Return the manifest, or None while the run goes on or if it was killed."""
        try:
            return json.loads(self._storage.read("manifest.json"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(
                f"{self._storage.name}/manifest.json is not JSON ({error}); delete it and run again"
            ) from error

    @property
    def complete(self) -> bool:
        """Whether the run has ended well: its manifest says so."""
        manifest = self.manifest()
        return manifest is not None and manifest.get("status") == "complete"

    def path_of(self, *names: str) -> str:
        """Return the path or URI of something in the run, such as path_of("models", "best"); creates nothing."""
        for name in names:
            if not name or name in (".", "..") or re.search(r"[/\\]", name) or name.startswith(TEMPORARY):
                raise ValueError(f"{name!r} is not the name of one folder or file in a run")
        return self._storage.show("/".join(names))

    def upload(self, source, *names: str, move: bool = False) -> str:
        """Copy a local folder, such as a checkpoint, to `path_of(*names)`; return that.

        On disks it appears whole and replaces what was there; an object store gets file by file. move: the source is
        of no more use, so that on the same disk it is renamed.
        """
        self.path_of(*names)  # refuses names that would leave the run
        self._storage.upload(source, "/".join(names), move=move)
        return self.path_of(*names)

    # --- inside -------------------------------------------------------------------------------

    def _adopt(self, experiment: str, config: dict, *, named_by: dict) -> None:
        self.experiment, self.config = experiment, config
        named_by = {key: value for key, value in named_by.items() if key not in FREE_SECTIONS}
        self.run_id = digest({"experiment": experiment, "config": named_by})

    def _read_config(self) -> tuple[str, dict] | None:
        """(experiment, config) of config.yaml, None if there is none."""
        try:
            text = self._storage.read("config.yaml").decode("utf-8")
        except FileNotFoundError:
            return None
        experiment = re.match(r"# experiment: (\S+)\n", text)
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RunError(f"{self._storage.name}/config.yaml is not YAML: {error}") from error
        if experiment is None or not isinstance(config, dict):
            raise RunError(
                f"{self._storage.name}/config.yaml was not written by a raymerge run (its first line names no "
                "experiment, or it is no mapping); choose another --out, or delete the folder"
            )
        return experiment[1], config

    def _refuse_other(self, stored_experiment: str, stored: dict, experiment: str, config: dict) -> None:
        anew = "choose another --out, or delete the folder to start anew"
        if stored_experiment != experiment:
            raise RunError(f"{self._storage.name} holds a run of {stored_experiment}, not of {experiment}; {anew}")
        differing = [item for item in _differences(stored, config) if item[0].split(".")[0] not in FREE_SECTIONS]
        if differing:
            lines = "".join(f"\n  {key}: {there} in the run, {here} now" for key, there, here in differing)
            raise RunError(
                f"{self._storage.name} holds a run with another config:{lines}\ngo on with the run's values, {anew}"
            )

    def _part_names(self, table: str) -> list[str]:
        """Parts of a table, sorted; temporary and foreign files are no parts."""
        return [n[:-8] for n in self._storage.names(f"tables/{table}") if n.endswith(".parquet") and n[0] not in "._"]

    def _opened(self, table: str, name: str, use):
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

        def use(file):
            text = (file.schema_arrow.metadata or {}).get(_CONTENTS, b"[]")
            return file.metadata.num_rows, [(part, rows) for part, rows in json.loads(text)]

        return self._opened(table, name, use)

    def _contents(self, table: str) -> list[tuple[str, int]]:
        try:
            return self._footer(table, _WHOLE)[1]
        except FileNotFoundError:
            return []

    def _read_part(self, table: str, name: str, columns: list[str] | None = None) -> pa.Table:
        schema = SCHEMAS[table] if columns is None else pa.schema([SCHEMAS[table].field(c) for c in columns])

        def use(file):
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

    def _visit(self, table: str, use) -> list:
        """[use(name) for every part that counts], again from the start if parts vanish or are gathered meanwhile."""
        schema_of(table)
        for attempt in range(10):
            try:
                names = self._part_names(table)
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

    def _write_part(self, table: str, name: str, data: pa.Table, contents=None) -> None:
        if contents is not None:
            self._gathered.pop(table, None)
            data = data.replace_schema_metadata({_CONTENTS: canonical_json(contents)})
        # encoded in memory first: a failure to encode cannot touch the disk, and the size is known for the message
        sink = pa.BufferOutputStream()
        pq.write_table(data, sink, compression="zstd" if data.nbytes >= _PACKED else "none")
        self._storage.publish(_part_path(table, name), sink.getvalue())
        if contents is not None:
            self._gathered[table] = dict(contents)

    def _delete_parts(self, table: str, names) -> None:
        self._storage.each(lambda name: self._storage.delete(_part_path(table, name)), names)


def part_name(*words: str) -> str:
    """A name that `RunDirectory.append` takes for a part, made of words as data has them."""
    name = "-".join(words)
    return name if re.fullmatch(_PART, name) else digest(list(words))


def _part_path(table: str, name: str) -> str:
    return f"tables/{table}/{name}.parquet"


def _differences(there, here, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, value there, value here) wherever two configs differ; lists compare whole."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return [] if there == here else [(prefix, repr(there), repr(here))]
    found = []
    for key in [*there, *(key for key in here if key not in there)]:
        name = f"{prefix}.{key}" if prefix else str(key)
        if key in there and key in here:
            found += _differences(there[key], here[key], name)
        else:
            found.append((name, *(repr(side[key]) if key in side else "absent" for side in (there, here))))
    return found
