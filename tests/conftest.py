"""Fixtures that many test files share."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """For `pytest -n`: the tests that share Ray stay in one process, and else those of one file, with its fixtures."""
    for item in items:
        group = "ray" if "ray_session" in item.fixturenames else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for all tests, with four logical CPUs however few the machine has."""
    from raymerge.pool import start_ray

    with pytest.MonkeyPatch.context() as patch:
        # The plain worker classes of the tests are pickled by name, so Ray's processes must find their modules.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.delenv("RAY_ADDRESS", raising=False)
        with start_ray(num_cpus=4):
            yield
