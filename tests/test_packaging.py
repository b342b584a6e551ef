"""What an installation that is no checkout holds."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import raymerge

ROOT = Path(raymerge.__file__).parent.parent


def files_under(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_holds_the_package_its_data_and_the_analysis_scripts(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("raymerge", "analysis"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package, analysis = files_under(tmp_path / "raymerge"), files_under(tmp_path / "analysis")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", tmp_path / "wheels", tmp_path],
        check=True,
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert held == {f"raymerge/{name}" for name in package} | {f"raymerge/_analysis/{name}" for name in analysis}


def test_type_checkers_read_the_public_names_where_they_are_loaded_from():
    """They cannot read a module's __getattr__: every public name, and any other, was Any to them."""
    tree = ast.parse(Path(raymerge.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    found = {alias.name: node.module for block in blocks for node in block.body for alias in node.names}
    assert found == raymerge._HOMES | {"experiments": "raymerge"}
    assert not any(getattr(node, "name", "") == "__getattr__" for node in tree.body)
