"""The fenced blocks of README.md and docs/: what stands in them, whether it parses, and running it.

`python tests/docs_blocks.py` (make docs-check) runs every bash block in order in a temporary directory, and prints what
ran and what was only parsed. A block after the comment `<!-- parsed: REASON -->` is parsed alone: it needs a cluster, a
GPU, a hub, files of the reader's own or minutes. tests/test_docs.py parses all of them and runs those of Python.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import yaml

from raymerge import cli
from raymerge.config import load_config, parse_config

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/guide.md")

_BLOCK = re.compile(r"(?:<!-- parsed: (?P<reason>[^>]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_SHELL = {"cd", "git", "export", "source"}  # nothing of ours to check in what follows
_OURS = ("jobs/", "analysis/", "tests/", "docs/", "raymerge/")


@dataclass(frozen=True)
class Block:
    """reason: why it is only parsed; None where it can run."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page under ROOT, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, 1 + text.count("\n", 0, found.start("text")), found["language"], found["text"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


def commands(text: str) -> list[list[str]]:
    """The words of every command of a bash block; comments go, lines that end in a backslash are joined."""
    lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def check(block: Block) -> None:
    """AssertionError, or the parser's own error, where a block does not parse or names what is not there."""
    assert block.language in ("bash", "python", "yaml", "text"), (
        f"{block}: a block of {block.language or 'no language'}"
    )
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "yaml":
        parse_config(yaml.safe_load(block.text), source=str(block))
    elif block.language == "bash":
        for words in commands(block.text):
            check_command(words, where=str(block))


def check_command(words: list[str], *, where: str) -> None:
    """What `check` does with one command."""
    while _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    name, arguments = words[0], words[1:]
    for word in words:
        if word.startswith(_OURS) or word in ("cluster.yaml", "README.md"):
            assert (ROOT / word).exists(), f"{where}: there is no {word}"
    if name == "raymerge":
        _check_raymerge(arguments, where)
    elif name in ("python", "python3"):
        _check_python(arguments, where)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        assert set(arguments) <= set(targets), f"{where}: the Makefile has no {' '.join(arguments)}"
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
            assert set(extra.split(",")) <= set(extras["optional-dependencies"]), f"{where}: no extra {extra}"
    elif name == "ray":
        assert arguments[0] in ("job", "up", "down", "dashboard", "start", "stop"), f"{where}: {' '.join(words)}"
        if "--" in arguments:
            check_command(arguments[arguments.index("--") + 1 :], where=where)
    elif name == "kubectl":
        pass  # files are checked above
    else:
        assert name in _SHELL, f"{where}: it is not known how to check {name!r}"


def _check_raymerge(arguments: list[str], where: str) -> None:
    try:
        options = cli._parser().parse_args(arguments)
    except SystemExit as stop:
        assert stop.code == 0, f"{where}: raymerge {shlex.join(arguments)} does not parse"  # 0: --help, --version
        return
    config = getattr(options, "config", None)
    if config is not None and not Path(config).parts[0] == "runs":
        assert config.startswith("jobs/configs/"), f"{where}: {config} is none of jobs/configs/"
        load_config(ROOT / config, options.set)
    else:
        load_config(None, getattr(options, "set", []))


def _check_python(arguments: list[str], where: str) -> None:
    if arguments[0] == "-m":
        assert arguments[1] in ("venv", "pytest", "ruff"), f"{where}: python -m {arguments[1]}"
        return
    script = (ROOT / arguments[0]).read_text(encoding="utf-8")
    if arguments[0].startswith("jobs/"):
        (command,) = re.findall(r'^ +run\("([\w-]+)"\)', script, flags=re.M)
        _check_raymerge([command, *arguments[1:]], where)
        return
    # A script's own options, and those that the scripts of analysis/ share.
    known = script + (ROOT / "analysis" / "plotting.py").read_text(encoding="utf-8")
    for word in arguments[1:]:
        assert not word.startswith("--") or f'"{word}"' in known, f"{where}: {arguments[0]} has no {word}"


def main() -> int:
    """Run what can run; 1 where a command failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", default=PAGES, help="pages to run (default: all)")
    pages = parser.parse_args().pages
    bin_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = os.environ | {"PATH": bin_path, "PYTHONPATH": str(ROOT), "RAY_DISABLE_IMPORT_WARNING": "1"}
    parsed, ran, failed = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("jobs", "analysis", "tests", "docs"):
            (Path(folder) / name).symlink_to(ROOT / name)
        for block in (block for page in pages for block in blocks(page)):
            check(block)
            if block.language != "bash":
                continue
            if block.reason is not None:
                parsed.append(block)
                continue
            print(f"--- {block}\n{block.text}", flush=True)
            start = time.monotonic()
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            done = subprocess.run(command, cwd=folder, env=environment)
            (failed if done.returncode else ran).append((block, time.monotonic() - start))
    for title, found in (("ran", ran), ("FAILED", failed)):
        for block, seconds in found:
            print(f"{title:>7}  {seconds:5.0f} s  {block}: {block.text.splitlines()[0]}")
    for block in parsed:
        print(f" parsed           {block}: {block.text.splitlines()[0]} ({block.reason})")
    print("The blocks of Python are run by tests/test_docs.py.")
    print(f"{len(ran)} blocks ran, {len(failed)} failed, {len(parsed)} were only parsed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
