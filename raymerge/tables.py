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
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import yaml

from raymerge.diffusion import degeneracy
from raymerge.domains import CATEGORY_OF
from raymerge.identity import digest, plain, software, without_secrets
from raymerge.objectives import above_ceiling, descended, is_minimised, rank
from raymerge.parts import Tables
from raymerge.schemas import (
    CHANCE,
    IMPORTED,
    MACRO,
    MICRO,
    RUINED,
    SCHEMAS,
    Row,
    conform,
    correlation_ceiling,
    correlation_digits,
    derive_accuracy,
    derive_task_accuracy,
    layer_ranges,
    plan_labels,
    turned,
    way_of,
)
from raymerge.statistics import colour_scale, paired_difference, wilson_interval, without_far_worse
from raymerge.storage import LEFT_S, LOCK, TEMPORARY, Lock, RunError, Storage

__all__ = [
    "CATEGORY_OF",
    "CHANCE",
    "FREE_SECTIONS",
    "IMPORTED",
    "MACRO",
    "MICRO",
    "RUINED",
    "SCHEMAS",
    "Row",
    "RunDirectory",
    "RunError",
    "above_ceiling",
    "colour_scale",
    "correlation_ceiling",
    "correlation_digits",
    "degeneracy",
    "derive_accuracy",
    "derive_task_accuracy",
    "descended",
    "is_minimised",
    "layer_ranges",
    "paired_difference",
    "plan_labels",
    "rank",
    "turned",
    "way_of",
    "wilson_interval",
    "without_far_worse",
]

#: Top-level config sections that may differ when a run is resumed: they cannot change a result.
FREE_SECTIONS = ("workers", "output")

# Keys that say where something lies. A run is held to its content (`hold_to`), so it may be continued on a machine
# where that lies elsewhere.
_PLACES = re.compile(
    r"model\.path|data\.(mmlu|perplexity_text)|(search|calibration)\.text|tasks\.[^.]+\.(file|examples)"
    r"|plan\.(alpha_file|similarity_run)|search\.probes|sweep\.alpha_files\.[^.]+"
)

_INPUTS = "inputs.json"
TEXT_TOKENS = "text tokens"  # what the tokens of the text that is reported on are called in it
_MANY = 50  # parts of a table, that a run which is taken up again is not to read one by one each time


class RunDirectory:
    """A run's folder, local or on any file system pyarrow opens. Use `open` to write, `load` to read.

    Attributes
    ----------
    run_id : str
        16 hex digits of SHA-256 over the experiment and the config that the run was begun with, without `workers`
        and `output`.
    experiment : str
    config : dict
        The resolved config.
    is_local : bool
        Whether `path_of` gives paths of this machine's disk.
    moved : bool
        Whether the config that it was opened with says of a file, a folder or a hub id another one than the stored.
    """

    def __init__(self, path: str | os.PathLike[str], filesystem: pafs.FileSystem | None = None):
        """Attach to a folder without reading it; `open` and `load` are the ways in."""
        self._storage = Storage(path, filesystem)
        self._tables = Tables(self._storage)
        self.is_local = self._storage.is_local
        self.run_id = self.experiment = ""
        self.config: dict[str, Any] = {}
        self.moved = False
        self._lock: Lock | None = None
        self._begun = (datetime.now(UTC), time.monotonic())

    def __repr__(self) -> str:
        return f"RunDirectory({self._storage.name!r}, {self.experiment!r}, run_id={self.run_id!r})"

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: dict[str, Any],
        experiment: str,
        *,
        filesystem: pafs.FileSystem | None = None,
    ) -> RunDirectory:
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
            Where the folder holds something else, or results of another experiment or of a config that
            differs in more than `workers`, `output` and where files lie, which `hold_to` compares; the message
            names the keys with both values. Where another process is writing the run. A run on a disk that has
            no rows yet, as one that was refused for its prompts, is begun anew instead.
        """
        run, config, stored = cls._checked(path, config, experiment, filesystem)
        writes = not run.complete
        if writes:
            run._lock = run._storage.lock()
            # while this process waited, another may have begun the run, with another config, and ended
            stored = cls._checked(path, config, experiment, filesystem)[2]
        run.experiment, run.config = experiment, config
        run._storage.clear_temporary(0.0 if writes else LEFT_S)  # without the lock others may be writing
        if stored is None:  # what one that got no further left is not this run's
            run._storage.delete(_INPUTS)
            if run.has("incidents"):
                run.replace("incidents", [])
            named_by = {key: value for key, value in config.items() if key not in FREE_SECTIONS}
            run.run_id = digest({"experiment": experiment, "config": named_by})
            run._store_config()
        else:
            run.run_id = stored.run_id
            run.moved = bool(_differences(stored.config, config, free=FREE_SECTIONS))
        return run

    @classmethod
    def check(cls, path: str | os.PathLike[str], config: dict[str, Any], experiment: str) -> None:
        """Raise RunError where `open` would because of what is there, and touch nothing: before models are read."""
        cls._checked(path, config, experiment, None)

    @classmethod
    def _checked(
        cls, path: str | os.PathLike[str], config: dict[str, Any], experiment: str, filesystem: pafs.FileSystem | None
    ) -> tuple[RunDirectory, dict[str, Any], _Stored | None]:
        """The run, still without what `open` gives it, the config as it is stored, and what is stored of the run that
        is there and can be taken up; None where there is none."""
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
        elif differing := run._differing(stored, experiment, config):
            # In an object store no lock shows that another process has begun it and will have rows soon.
            if run.is_local and not run._has_results():
                stored = None
            else:
                run._refuse(stored, experiment, differing)
        return run, config, stored

    @classmethod
    def experiment_at(cls, path: str | os.PathLike[str]) -> str | None:
        """The experiment of the run at a path or a URI, None where there is no run; RunError where it cannot be
        looked."""
        stored = cls(path)._read_config()
        return None if stored is None else stored[0]

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, filesystem: pafs.FileSystem | None = None) -> RunDirectory:
        """Return an existing run for reading (whatever its state); RunError if there is none."""
        run = cls(path, filesystem)
        stored = run._read_config()
        if stored is None:
            raise RunError(
                f"{run._storage.name} is not a run directory: it has no config.yaml; give a folder that raymerge wrote"
            )
        run.experiment, run.config, run.run_id = stored
        return run

    # --- tables -------------------------------------------------------------------------------

    def append(self, table: str, rows: Iterable[Mapping[str, Any]] | pa.Table, part: str | None = None) -> str:
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
        return self._tables.append(table, conform(table, rows, self.run_id), part)

    def replace(self, table: str, rows: Iterable[Mapping[str, Any]] | pa.Table) -> None:
        """Make a table consist of exactly these rows; arguments and errors as for `append`. A reader sees the old rows
        or the new, never both."""
        self._tables.replace(table, conform(table, rows, self.run_id))

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """Return all rows of a table, parts in name order, with exactly its schema (empty if never written)."""
        return self._tables.read(table, columns)

    def distinct(self, table: str, columns: list[str]) -> set[tuple[Any, ...]]:
        """Return which values a table's columns have together, such as the (plan_id, split) of millions of answers."""
        found = self.read(table, columns).group_by(columns).aggregate([])
        return set(zip(*(found[name].to_pylist() for name in columns), strict=True))

    def compact(self, table: str) -> None:
        """Gather the parts of a table into one file, in the order `read` gives them; same guarantee as `replace`."""
        self._tables.compact(table)

    def row_counts(self) -> dict[str, int]:
        """Return the number of rows of every table that has any, from the files' footers."""
        return self._tables.row_counts()

    def has(self, table: str) -> bool:
        """Return whether a table has at least one row."""
        return self._tables.has(table)

    # --- manifest, folders ----------------------------------------------------------------------

    def begin(self) -> None:
        """Start or continue the work: remove the manifest of an earlier end, store the config as it is now, gather the
        batches of trials that a killed search left one by one, and start the clock. That it continues is an
        incident."""
        self._lock = self._lock or self._storage.lock()
        self._storage.delete("manifest.json")
        self._store_config()
        self._begun = (datetime.now(UTC), time.monotonic())
        if len(self._tables.part_names("trials")) > _MANY:
            self.compact("trials")
        rows = {name: count for name, count in self.row_counts().items() if name != "incidents"}
        if rows:
            self.note("resumed", detail=", ".join(f"{count} {name}" for name, count in rows.items()))

    @property
    def inputs(self) -> dict[str, str]:
        """What `hold_to` has stored, identities by name; RunError where the file cannot be read."""
        try:
            return _object(self._storage.read(_INPUTS))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunError(f"{self._storage.show(_INPUTS)} is not JSON ({error}); delete the folder") from error

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
        stored = self.inputs
        known = {name: value for name, value in inputs.items() if name in stored}
        if differing := _differences(stored, stored | known):
            if self._has_results():
                lines = "".join(f"\n  {name}: {there} in the run, {now} now" for name, there, now in sorted(differing))
                raise RunError(
                    f"{self._storage.name} holds results made from other files than those that the config names "
                    f"now:{lines}\n"
                    "choose another --out, or delete the folder to start over"
                )
        if stored | inputs != stored:
            text = json.dumps(stored | inputs, indent=2, ensure_ascii=False) + "\n"
            self._storage.publish(_INPUTS, text.encode("utf-8"))

    def note(self, kind: str, worker: str | None = None, detail: str = "") -> None:
        """Add a row to table `incidents`."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.append("incidents", [{"time": now, "kind": kind, "worker": worker, "detail": detail[:500]}])

    def write_manifest(self, *, command: Sequence[str] | None = None, **facts: Any) -> dict[str, Any]:
        """Write manifest.json, the last act of a run that has ended well, and return its content.

        Parameters
        ----------
        command : list of str, optional
            What was run; by default `sys.argv`. Credentials in URIs are left out.
        **facts
            What else is known: seeds, model and data identity. NaN becomes null.
        """
        started, clock = self._begun
        counts = self.row_counts()
        for table in counts:  # a search leaves a part for every batch: readers then open one file a table
            self.compact(table)
        content = {
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

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None while the run goes on or if it was killed."""
        try:
            return _object(self._storage.read("manifest.json"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(
                f"{self._storage.name}/manifest.json is not JSON ({error}); delete it and run again"
            ) from error

    @property
    def complete(self) -> bool:
        """Whether the run has ended well: then it has a manifest."""
        return self.manifest() is not None

    def path_of(self, *names: str) -> str:
        """Return the path or URI of something in the run, such as path_of("models", "best"); creates nothing."""
        for name in names:
            if not name or name in (".", "..") or re.search(r"[/\\]", name) or name.startswith(TEMPORARY):
                raise ValueError(f"{name!r} is not the name of one folder or file in a run")
        return self._storage.show("/".join(names))

    def write_text(self, text: str, *names: str) -> None:
        """Write a file of the run, such as write_text(text, "alphas", "drop.json"): whole, or not at all."""
        self.path_of(*names)  # refuses names that would leave the run
        self._storage.publish("/".join(names), text.encode("utf-8"))

    def upload(self, source: str | os.PathLike[str], *names: str, move: bool = False) -> str:
        """Copy a local folder, such as a checkpoint, to `path_of(*names)`; return that.

        On disks it appears whole and replaces what was there; an object store gets file by file. move: the source is
        of no more use, so that on the same disk it is renamed.
        """
        self.path_of(*names)  # refuses names that would leave the run
        self._storage.upload(source, "/".join(names), move=move)
        return self.path_of(*names)

    # --- inside -------------------------------------------------------------------------------

    def _store_config(self) -> None:
        head = f"# experiment: {self.experiment}\n# run_id: {self.run_id}\n"
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True, width=120)
        self._storage.publish("config.yaml", (head + text).encode("utf-8"))

    def _read_config(self) -> _Stored | None:
        """What config.yaml says, None if there is none."""
        try:
            content = self._storage.read("config.yaml")
        except FileNotFoundError:
            return None
        try:
            text = content.decode("utf-8")
            config = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # the latter of bytes that are no text, and dates that are none
            raise RunError(f"{self._storage.name}/config.yaml is not YAML: {error}") from error
        head = re.match(r"# experiment: (\S+)\n# run_id: ([0-9a-f]{16})\n", text)
        if head is None or not isinstance(config, dict):
            raise RunError(
                f"{self._storage.name}/config.yaml was not written by a raymerge run (its first lines name no "
                "experiment and run_id, or it is no mapping); choose another --out, or delete the folder"
            )
        return _Stored(head[1], config, head[2])

    def _has_results(self) -> bool:
        return any(table != "incidents" for table in self.row_counts())

    def _differing(self, stored: _Stored, experiment: str, config: dict[str, Any]) -> list[_Difference]:
        if stored.experiment != experiment:
            return [("experiment", stored.experiment, experiment)]
        return _differences(without_secrets(stored.config), config, free=FREE_SECTIONS)

    def _refuse(self, stored: _Stored, experiment: str, differing: list[_Difference]) -> None:
        """Raise RunError where the run that is there is not the one that is asked for."""
        anew = "choose another --out, or delete the folder to start over"
        if stored.experiment != experiment:
            raise RunError(f"{self._storage.name} holds a run of {stored.experiment}, not of {experiment}; {anew}")
        # null is no place: with and without a text, two runs differ
        if not all(_PLACES.fullmatch(key) and "None" not in values for key, *values in differing):
            lines = "".join(f"\n  {key}: {there} in the run, {here} now" for key, there, here in differing)
            raise RunError(
                f"{self._storage.name} holds a run with another config:{lines}\ncontinue with the run's values, {anew}"
            )


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object; ValueError for anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {value!r:.50}, and no object")
    return value


_Difference = tuple[str, str, str]  # dotted key, value there, value here


class _Stored(NamedTuple):
    """What config.yaml says of a run."""

    experiment: str
    config: dict[str, Any]
    run_id: str


def _differences(there: Any, here: Any, prefix: str = "", *, free: Sequence[str] = ()) -> list[_Difference]:
    """Wherever two configs differ, but for the sections `free`; lists compare whole."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return [] if there == here else [(prefix, repr(there), repr(here))]
    found: list[_Difference] = []
    for key in [*there, *(key for key in here if key not in there)]:
        if key in free:
            continue
        name = f"{prefix}.{key}" if prefix else str(key)
        if key in there and key in here:
            found += _differences(there[key], here[key], name)
        else:
            values = [repr(side[key]) if key in side else "absent" for side in (there, here)]
            found.append((name, values[0], values[1]))
    return found
