"""One HTML page of one or several runs, made from their tables alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from raymerge.identity import without_secrets
from raymerge.progress import Progress, Silent, step
from raymerge.report.build import page_of
from raymerge.report.render import to_html
from raymerge.storage import Storage
from raymerge.tables import RunDirectory, RunError

__all__ = ["write_report"]


def write_report(
    runs: str | Path | RunDirectory | Sequence[str | Path | RunDirectory],
    out: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Write the page of `runs`, one or several, to `out` (one run: RUN/report.html by default) and return its path.

    The page needs neither network nor the run directories to be opened. Raises RunError for what is no run, where
    `out` must be said - with several runs, or one that is not on this machine - and where it cannot be written.
    """
    listed = [runs] if isinstance(runs, str | Path | RunDirectory) else runs
    paths = [run.path_of() if isinstance(run, RunDirectory) else run for run in listed]
    if not paths:
        raise RunError("name at least one run directory")
    loaded = [RunDirectory.load(path) for path in paths]
    if out is None:
        if len(loaded) > 1 or not loaded[0].is_local:
            raise RunError(
                "say with --out FILE.html where the page should go: it is of several runs, or of a remote one"
            )
        out = loaded[0].path_of("report.html")
    path = Path(out).expanduser()
    if path.is_dir():
        raise RunError(f"{path} is a folder; --out names the page, for example {path / 'report.html'}")
    progress = progress or Silent()
    page = page_of(loaded, shlex.join(["raymerge", "report", *without_secrets(list(map(str, paths)))]), progress)
    with step(progress, "writing the page"):
        html = to_html(page)
    try:
        Storage(path.parent).publish(path.name, html.encode())
    except RunError as error:  # of a run that others have made, or on a disk that is read-only
        raise RunError(f"{error}; --out FILE.html puts the page elsewhere") from error
    return path
