"""Fixtures that many test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def local_pools():
    """All experiments but the search, whose trials Ray runs, use a LocalPool; the list of those that were opened."""
    from local_pool import opened_locally

    with opened_locally() as pools:
        yield pools


@pytest.fixture
def local_searches(local_pools):
    """Searches too use a LocalPool, and no Tune: for what depends on neither."""
    from local_pool import searched_locally

    with searched_locally():
        yield


@pytest.fixture
def put_on_disk(monkeypatch):
    """Inodes of the files that a disk was waited for; a folder that gets its name must have no other."""
    done, fsync, replace = set(), os.fsync, os.replace

    def synced(file):
        done.add(os.fstat(file).st_ino)
        fsync(file)

    def replaced(source, target):
        assert {path.stat().st_ino for path in Path(source).rglob("*") if path.is_file()} <= done
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return done


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for all tests, with four logical CPUs however few the machine has."""
    from raymerge.cluster import start_ray

    with pytest.MonkeyPatch.context() as patch:
        # The plain worker classes of the tests are pickled by name, so Ray's processes must find their modules.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.delenv("RAY_ADDRESS", raising=False)
        with start_ray(num_cpus=4):
            yield


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A finished search, made by hand, for the tests of reports."""
    from report_runs import search_run

    return search_run(tmp_path_factory.mktemp("runs") / "k3")


@pytest.fixture(scope="module")
def no_library():
    """Pages do without Vega, which takes seconds to bundle."""
    from raymerge.report import render

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "library", lambda: "")
        yield
