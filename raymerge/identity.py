"""Canonical text and digests of plain values, and what software is running.

A plan, a set of questions or a run is identified by the digest of its canonical JSON, so that two
processes, machines or Python versions give the same value the same name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Distributions whose versions can change a result; a manifest names them.
PACKAGES = (
    "torch",
    "transformers",
    "ray",
    "bayesian-optimization",
    "pyarrow",
    "numpy",
    "scikit-learn",
    "scipy",
)

# A key may hold "/" where it was not encoded, as in a URI that is refused for it; a port's number ends there.
_CREDENTIALS = re.compile(r"://[^/@\s:]*:(?!\d+/)[^@\s]*@")
# Where a text, a value after "=" or an entry of a YAML list starts with a folder of this machine's; not in a URI.
_FOLDERS = re.compile(r"""(^|[=,\[{"'\s])(?:(?:\w+\+)?file:/)?(?:~[^/,\s]*|\.\.)?/(?:[^,\]}"']*/)?""")
_SECRET_KEYS = re.compile(r"([?&](?:access_key|secret_key|session_token|sas_token|account_key|token|password)=)[^&\s]+")


def plain(value: object, *, nan_as_none: bool = False) -> Any:
    """Return `value` made of dict, list, str, int, float, bool and None only.

    Tuples and arrays become lists, NumPy scalars Python numbers, paths strings, -0.0 becomes 0.0.

    Raises
    ------
    TypeError
        For a key that is not a string or a value of another type.
    ValueError
        For NaN or an infinity, which JSON cannot hold, unless `nan_as_none` turns them into None.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            if nan_as_none:
                return None
            raise ValueError(f"{value} has no canonical JSON: only finite numbers do")
        return float(value) + 0.0
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is {type(key).__name__}, but canonical JSON has string keys only")
        return {str(key): plain(item, nan_as_none=nan_as_none) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, nan_as_none=nan_as_none) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, without importing NumPy here
        return plain(value.tolist(), nan_as_none=nan_as_none)
    raise TypeError(f"{value!r} ({type(value).__name__}) has no canonical JSON; give numbers, text, lists or dicts")


def code_identity() -> str:
    """Return the digest of this package's Python files, but for the scripts that draw figures, which workers do not
    run, and for hidden files, which are no modules: an editor's locks, which lead nowhere, or what a Mac packs."""
    package = Path(__file__).parent
    names = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    ours = (name for name in names if not name.startswith("_analysis/") and "/." not in f"/{name}")
    return digest({name: names[name].read_text("utf-8") for name in ours})


def without_secrets(value: Any) -> Any:
    """Return `value` (text, or lists and dicts of it) without the credentials that URIs may hold.

    That is user and password before a host, and the values of keys and tokens in a query.
    """
    if isinstance(value, str):
        return _SECRET_KEYS.sub(r"\1***", _CREDENTIALS.sub("://***@", value))
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def without_folders(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with absolute paths, those from ~ and from .. cut to their last names."""
    return [_FOLDERS.sub(r"\1", argument) for argument in arguments]


def canonical_json(value: object) -> str:
    """Return the one JSON text of `value`: keys sorted, no spaces, floats as the shortest float64 repr.

    1 and 1.0 are different texts: convert to float first where a number is a measure. Non-ASCII
    characters stay as they are; encode as UTF-8. Raises as `plain` does.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: object, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of `value`'s canonical JSON in UTF-8.

    16 digits (64 bits) keep the chance of a clash among a million values near 3e-8.
    """
    if not 1 <= length <= 64:
        raise ValueError(f"length is {length}, but SHA-256 has 1 to 64 hex digits")
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()[:length]


def git_state(folder: str | os.PathLike[str]) -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of the git checkout that tracks `folder`/__init__.py, else (None, None).

    Asking for a tracked file keeps a package installed in a virtual environment inside somebody
    else's repository from claiming that repository's commit. Nothing is written (no index refresh).
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", os.fspath(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".")  # untracked modules count: they can be imported
    return commit, None if commit is None or changes is None else bool(changes)


def software() -> dict[str, Any]:
    """Return what runs: raymerge's version and commit, Python, the platform and `PACKAGES`' versions.

    A package that is not installed has version None; `git_commit` is None outside a checkout.
    """
    from raymerge import __version__

    commit, dirty = git_state(Path(__file__).parent)
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "raymerge_version": __version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }
