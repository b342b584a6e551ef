"""Plain workers for the tests of the pool and the search, whose actors' processes import this module alone.

Each such process is a start of Python: with a test file's own imports (torch, Tune) it would take seconds more.
"""

import contextlib
import math
import os
import resource
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil

from raymerge.errors import UserError

TRIAL = b"ray::_Trial"
RAISES, GIVES_NAN, DIES_ONCE, HANGS_ONCE, NO_SPACE = 0.125, 0.25, 0.375, 0.625, 0.875


def bump(point):
    return math.exp(-2.0 * sum((x - 0.7) ** 2 for x in point))


def is_first(folder, name):
    """Whether this is asked for the first time, by any process."""
    try:
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Plain:
    """Does what an item says. `folder` holds one file for every process that was started and every mishap."""

    def __init__(self, folder, slow_restart_s=0.0):
        self.folder, self.broken = folder, False
        if slow_restart_s and not is_first(folder, "started"):
            time.sleep(slow_restart_s)

    def work(self, item):
        what, number = item
        if what == "die" or (what == "die once" and is_first(self.folder, "died")):
            os._exit(1)
        if what == "hang once" and is_first(self.folder, "hung"):
            time.sleep(600)
        if what == "raise":
            raise KeyError(f"bad item {number}")
        if what == "break once" and is_first(self.folder, "broken"):
            self.broken = True
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return number * number

    def broken_by(self, error):
        from raymerge.device import is_lost

        return is_lost(error)

    def mistaken(self, number):
        raise UserError(f"item {number} is too large: give at most 2")

    def page_faults(self, _):
        """Of allocating and freeing 64 MB ten times, once it has been done before."""
        faults = []
        for _ in range(11):
            np.ones(2**23)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        return faults[-1] - faults[0]

    def kept_bytes(self, _):
        """How resident memory grows by 64 MB being written and freed: within a lean heap, without, within, without."""
        from raymerge.device import lean_heap

        grown = []
        for lean in (True, True, False, True, False):
            before = psutil.Process().memory_info().rss
            with lean_heap() if lean else nullcontext():
                np.ones(2**23)
            grown.append(psutil.Process().memory_info().rss - before)
        return grown[1:]

    def threads(self, _):
        return os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]

    def process(self):
        return os.getpid()

    def fill_disk(self, _):
        raise OSError(28, "No space left on device")


class Refuses:
    def __init__(self, path, kind=ValueError):
        raise kind(f"no model at {path}")


class Scorer:
    """Scores points by `bump`; does mischief to candidates whose first alpha is a marker."""

    def __init__(self, folder):
        self.folder = folder

    def score(self, candidates):
        markers = [point[0] for point in candidates]
        if RAISES in markers:
            raise KeyError("bad candidate")
        if DIES_ONCE in markers and is_first(self.folder, "died"):
            os._exit(1)
        if NO_SPACE in markers:
            raise OSError(28, "No space left on device")
        if HANGS_ONCE in markers and is_first(self.folder, "hung"):
            time.sleep(600)
        return [
            {
                "value": float("nan") if point[0] == GIVES_NAN else bump(point),
                "accuracy": 0.5,
                "nll": 1.0,
                "n_questions": 4,
                "seconds": 0.01,
            }
            for point in candidates
        ]

    def slow(self, candidates):
        with open(os.path.join(self.folder, "starts"), "a", encoding="utf-8") as starts:
            starts.write(f"{time.time()}\n")
        time.sleep(3.0)
        return [{"value": 0.5, "accuracy": 0.5, "nll": 1.0, "n_questions": 4, "seconds": 3.0} for _ in candidates]

    def kill_a_trial(self, candidates):
        """The process of one of Tune's trial actors, of the same raylet; once."""
        for stat in Path("/proc").glob("[0-9]*/stat") if is_first(self.folder, "killed") else ():
            with contextlib.suppress(OSError):
                name = stat.with_name("cmdline").read_bytes()
                if stat.read_text().rpartition(") ")[2].split()[1] == str(os.getppid()) and name.startswith(TRIAL):
                    os.kill(int(stat.parent.name), signal.SIGKILL)
                    break
        return self.score(candidates)

    def where(self):
        return self.folder

    def die(self, candidates):
        os._exit(1)
