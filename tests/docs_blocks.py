"""The fenced blocks of README.md and docs/: what stands in them, whether it parses, and running it.

`python tests/docs_blocks.py` (make docs-check) runs the bash blocks of each page in order in a copy of the repository,
and prints what ran and what was only parsed. Models, questions and texts that the pages name and nobody has are the
demo's, or small files of the same form (STAND_INS), in the configurations of the copy too. A block after the comment
`<!-- parsed: REASON -->` is parsed alone: it needs a cluster or an account, or CI runs it. One after
`<!-- fresh copy -->` runs in a copy of its own without this environment. tests/test_docs.py parses all blocks and runs
those of Python.
"""

from __future__ import annotations

import argparse
import ast
import csv
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import gguf_files
import numpy as np
import task_files
import tiny
import yaml
from tokenizers.pre_tokenizers import ByteLevel

from raymerge.arguments import parser
from raymerge.config_file import load_config, parse_config
from raymerge.domains import DOMAINS
from raymerge.questions import LETTERS

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/guide.md")

# What the pages name, and where its stand-in lies in the copy. Longer names first.
STAND_INS = {
    "/models/": "stand-ins/models/",
    "/data/mmlu": "stand-ins/mmlu",
    "Qwen/Qwen2.5-1.5B-Instruct": "stand-ins/models/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-1.5B": "stand-ins/models/Qwen2.5-1.5B-Instruct",
    "cais/mmlu": "stand-ins/mmlu",
}

_BLOCK = re.compile(
    r"(?:<!-- (?:parsed: (?P<reason>[^>]+?)|(?P<fresh>fresh copy)) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
_SHELL = {"cd", "git", "export", "source"}  # nothing of ours to check in what follows
_OURS = ("jobs/", "analysis/", "tests/", "docs/", "raymerge/")


@dataclass(frozen=True)
class Block:
    """reason: why it is only parsed; None where it can run. fresh: it runs in a copy of its own."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    fresh: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page under ROOT, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            1 + text.count("\n", 0, found.start("text")),
            found["language"],
            found["text"],
            found["reason"],
            found["fresh"] is not None,
        )
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
        known = ("job", "up", "down", "dashboard", "start", "stop", "get-auth-token")
        assert arguments[0] in known, f"{where}: {' '.join(words)}"
        if "--" in arguments:
            check_command(arguments[arguments.index("--") + 1 :], where=where)
    elif name == "kubectl":
        pass  # files are checked above
    else:
        assert name in _SHELL, f"{where}: it is not known how to check {name!r}"


def _check_raymerge(arguments: list[str], where: str) -> None:
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:
        assert stop.code == 0, f"{where}: raymerge {shlex.join(arguments)} does not parse"  # 0: --help, --version
        return
    config = getattr(options, "config", None)
    if config is not None and not Path(config).parts[0] == "runs":
        assert config.startswith("jobs/configs/"), f"{where}: {config} is none of jobs/configs/"
        load_config(ROOT / config, options.set)
    else:
        load_config(None, getattr(options, "set", None) or [])


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


def replaced(text: str) -> str:
    """A text with its stand-ins in place of what it names."""
    names = "|".join(map(re.escape, STAND_INS))
    return re.sub(rf"(?<![\w./-])(?:{names})", lambda found: STAND_INS[found[0]], text)


def copy_of_repository(folder: Path, *, environment: bool) -> None:
    """What git tracks here, as it is now, and the stand-ins; with `environment` .venv is this one's."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)  # with its time: make compares it with the environment's
    for path in (folder / "jobs" / "configs").glob("*.yaml"):
        path.write_text(replaced(path.read_text(encoding="utf-8")), encoding="utf-8")
    if environment:
        (folder / ".venv").symlink_to(sys.prefix)
    models = folder / "stand-ins" / "models"
    models.mkdir(parents=True)
    demo = ROOT / "raymerge" / "demo"
    shutil.copytree(demo / "checkpoint", models / "Qwen2.5-1.5B-Instruct")
    _write_mmlu(demo / "mmlu" / "en", folder / "stand-ins" / "mmlu")
    _write_gguf(models / "model-q8_0.gguf")
    text = (demo / "text.txt").read_text(encoding="utf-8")
    for number, name in enumerate(("a.txt", "b.txt", "book.txt")):  # no two share a line
        (folder / name).write_text("\n".join(text.splitlines()[number::3]), encoding="utf-8")
    task_files.write(folder, "validation", task_files.ROWS["piqa"])
    noise = np.random.default_rng(0)
    for name in ("medical.npy", "legal.npy"):
        matrix = noise.uniform(size=(12, 12))
        np.save(folder / name, (matrix + matrix.T) / 2)


def _write_mmlu(demo: Path, folder: Path) -> None:
    """A folder of MMLU with the demo's questions under every subject that the domains and configurations name."""
    configs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "jobs" / "configs").glob("*.yaml")]
    named = [config.get("data", {}).get("subjects", []) for config in configs]
    subjects = sorted(set(itertools.chain(*DOMAINS.values(), *(names for names in named if isinstance(names, list)))))
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True)
        tables = []
        for path in sorted((demo / split).glob("*.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                tables.append(list(csv.reader(file)))
        for subject, rows in zip(subjects, itertools.cycle(tables), strict=False):
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)


def _write_gguf(path: Path) -> None:
    """A tiny random Llama that reads bytes, and every answer as one token."""
    tokens = [*sorted(ByteLevel.alphabet()), *(f"Ġ{letter}" for letter in LETTERS)]
    config = tiny.config_of("llama", vocab_size=len(tokens) + 2, intermediate_size=64, max_position_embeddings=8192)
    merges = [f"Ġ {letter}" for letter in LETTERS]
    gguf_files.write_gguf(path, tiny.random_model(config), True, tokens=tokens, merges=merges)


def run_block(block: Block, folder: Path) -> bool:
    """Run a bash block in a folder; whether every command ended well."""
    path = os.pathsep.join([str(folder / ".venv" / "bin"), os.environ.get("PATH", os.defpath)])
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": path, "RAY_DISABLE_IMPORT_WARNING": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    command = ["bash", "-euo", "pipefail", "-c", replaced(block.text)]
    return subprocess.run(command, cwd=folder, env=environment).returncode == 0


def main() -> int:
    """Run what can run; 1 where a command failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", default=PAGES, help="pages to run (default: all)")
    parsed, ran, failed = [], [], []
    for page in parser.parse_args().pages:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "raymerge"
            copy_of_repository(folder, environment=True)
            for block in blocks(page):
                check(block)
                if block.language != "bash":
                    continue
                if block.reason is not None:
                    parsed.append(block)
                    continue
                print(f"--- {block}\n{block.text}", flush=True)
                start, where = time.monotonic(), folder
                if block.fresh:
                    where = Path(scratch) / f"fresh-{block.line}"
                    copy_of_repository(where, environment=False)
                done = run_block(block, where)
                (ran if done else failed).append((block, time.monotonic() - start))
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
