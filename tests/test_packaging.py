"""What an installation that is no checkout holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import raymerge
from raymerge.experiments import common
from raymerge.progress import Silent
from raymerge.tables import RunDirectory

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


@pytest.mark.parametrize("place", ["site/raymerge/_analysis", "site/analysis"])
def test_figures_are_drawn_by_the_scripts_of_an_installation_or_of_a_checkout(tmp_path, monkeypatch, place):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "some.py").write_text(
        "import pathlib, sys; _, run, _, out = sys.argv\n"
        "pathlib.Path(out).mkdir(exist_ok=True); (pathlib.Path(out) / 'some.png').write_text(run)"
    )
    monkeypatch.setattr(raymerge, "__file__", str(tmp_path / "site" / "raymerge" / "__init__.py"))
    run = RunDirectory.open(tmp_path / "run", {}, "search")
    assert common.draw_figures(run, ["some.py"], Silent()) == ["figures/some.png"]
    assert (tmp_path / "run/figures/some.png").read_text().rstrip("/") == str(tmp_path / "run")
    (tmp_path / place / "wrong.py").write_text("raise SystemExit('no such column')")
    with pytest.raises(RuntimeError, match=r"analysis/wrong.py failed with exit code 1: no such column"):
        common.draw_figures(run, ["some.py", "wrong.py"], Silent())
