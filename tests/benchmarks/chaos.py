"""Interrupts small runs of every experiment at random and resumes them: a JSON line each, exit code 1 after a fault.

    python tests/benchmarks/chaos.py [--minutes 10] [--seed 1] [--cases bayes sweep] [--kinds kill full] [--log FILE]

A log's line: the seed that repeats it (--seeds), what was done when, what the command answered, and the faults.

First each case runs undisturbed. Then, run by run, a case is started in a new folder and disturbed up to seven times -
by signals, Ctrl-C, the end of its terminal, the death of a process of its Ray, a full disk (a tmpfs: needs root),
a second process in the same folder - and started again until it ends well. A fault is whatever then differs from
the undisturbed run (rows of tables but for times, the page's text, models, figures' numbers), a trace shown to a user,
an unexpected exit code, a hang, and files or processes left behind. Every process gets SIGKILL by descent alone.
"""

import argparse
import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
from pathlib import Path

import raymerge.__main__
import raymerge.cli
import raymerge.merging  # noqa: F401 - so that no command that is forked has to import it
from raymerge.config_file import load_config
from raymerge.experiments.common import read_inputs
from raymerge.report import write_report
from raymerge.tables import SCHEMAS, RunDirectory

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.subjects=[colour_mixing,number_words]",
    "data.limit_per_subject=6",
    "data.report_limit_per_subject=6",
    "data.perplexity_tokens=1200",
    "workers.count=1",
]
SEARCH = ["plan.merges=3", "search.candidates=8", "search.initial=3", "search.random_candidates=3"]
CASES = {
    "bayes": ["search", "demo", *SEARCH, "search.candidates=14"],  # most of them proposals
    "random": ["search", "demo", *SEARCH, "search.searcher=random", "search.batch=2"],
    "gradient": [
        "search",
        "gradient-demo",
        "plan.merges=3",
        "gradient.starts=2",
        "gradient.epochs=8",
        "search.text_tokens=128",
        "gradient.parametrisations=[alphas]",
        "search.random_candidates=3",
    ],
    "blocks": ["search", "blocks-demo", *SEARCH, "calibration.tokens=400", "output.figures=false"],
    "sweep": [
        "sweep",
        "sweep-demo",
        "sweep.merges=[1,4]",
        "sweep.methods=[drop,fixed:0.6]",
        "sweep.norms=[keep]",
        "output.figures=false",
    ],
    "similarity": [
        "similarity",
        "similarity-mka-demo",
        "similarity.samples=30",
        "similarity.entropy_neighbors=10",
        "output.figures=false",
    ],
    "sensitivity": [
        "sensitivity",
        "similarity-mka-demo",
        "similarity.subsets=[colour_mixing,number_words]",
        "similarity.samples=16",
        "similarity.entropy_neighbors=10",
        "sensitivity.sigma=[8]",
        "sensitivity.dimensions=[3]",
        "output.figures=false",
    ],
    "evaluate": ["evaluate", "demo", "data.report_limit_per_subject=20"],
    "merge": ["merge", "demo"],
}
#: kind -> how many times as likely as the least likely
KINDS = {
    "int": 2, "ctrl-c": 2, "ctrl-c twice": 2, "term": 2, "hup": 1, "close": 2, "kill": 3, "worker": 4, "raylet": 4,
    "gcs": 4, "child": 4, "full": 5, "two": 1,
}  # fmt: skip
ENDS = {"int": 130, "ctrl-c": 130, "ctrl-c twice": 130, "term": 143, "hup": 129, "close": 129, "kill": -9}
# The last of them says which candidates were one trial: those of a worker that is lost go alone the next time.
_VOLATILE = {"seconds", "cpu_seconds", "tokens_per_second", "actor", "tune_trial", "time", "batch"}
_HANG_S = 300.0
_BUSY_S = 5.0
_LEFT_S = 75.0  # Ray's agents look once in a while whether their raylet is there


def command(case, out):
    name, *rest = CASES[case]
    if name == "merge":
        return [
            "merge",
            "demo",
            "--alphas",
            str(out.parent / "alphas.json"),
            "--out",
            str(out),
            "--alignment",
            "neurons",
        ]
    first, *settings = rest
    what = [first] if name == "evaluate" else [str(ROOT / "jobs" / "configs" / f"{first}.yaml")]
    words = [word for setting in [*SMALL, *settings] for word in ("--set", setting)]
    return [name, *what, *words, "--out", str(out)]


def processes():
    """pid -> (parent, start time, name) of every process there is."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                head, _, fields = (folder / "stat").read_text().rpartition(")")
                fields = fields.split()
                if fields[0] != "Z":
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    found[int(folder.name)] = int(fields[1]), fields[19], words.strip() or head.partition("(")[2]
            except OSError:
                continue
    return found


class Forked:
    """A child that runs a function, as a Popen: importing torch and Ray takes most of a short command's time."""

    def __init__(self, function):
        self.returncode, self._lock = None, threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = function()
                sys.stdout.flush()
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    atexit._run_exitfuncs()
                os._exit(code if isinstance(code, int) else 1)

    def poll(self):
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=3600.0):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("raymerge", timeout)
            time.sleep(0.02)
        return self.returncode


def run_command(arguments, env, terminal, output):
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for source, target in ((terminal, 0), (output, 1), (terminal, 2)):
        os.dup2(source, target)
    os.closerange(3, 256)  # among them the other end of the terminal
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and nohup, have them ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    tempfile.tempdir = None
    sys.argv = ["raymerge", *arguments]
    return raymerge.__main__.main(arguments)


class Process:
    """One start of the command, with a terminal of its own, and all that descends from it."""

    def __init__(self, arguments, temporary, fresh=False):
        self.began, self.said, self.stage, self.stages = time.monotonic(), b"", "", []
        self._master, slave = pty.openpty()
        self._out = tempfile.TemporaryFile()
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "TERM": "xterm", "COLUMNS": "160"}
        env |= {"RAY_prestart_worker_first_driver": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        if fresh:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _LEADER, sys.executable, "-m", "raymerge", *arguments],
                env=env, stdin=slave, stdout=self._out, stderr=slave, start_new_session=True,
            )  # fmt: skip
        else:
            self.process = Forked(lambda: run_command(arguments, env, slave, self._out.fileno()))
        os.close(slave)
        self.known, self.closed = {}, False
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _read(self):
        while True:
            try:
                if self.closed:
                    os.close(self._master)
                    return
                if not select.select([self._master], [], [], 0.05)[0]:  # a read that waits would keep it open
                    continue
                data = os.read(self._master, 65536)
            except OSError:
                return
            if not data:
                return
            self.said += data
            for name in re.findall(_STAGE, _plain(self.said[-4000:])):
                if name not in [stage for stage, _ in self.stages]:
                    self.stages.append((name, time.monotonic() - self.began))
                    self.stage = name

    def _watch(self):
        while self.process.poll() is None:
            self.family()
            time.sleep(0.2)

    def family(self):
        """pid -> (start time, name) of the processes that descend from this one and live."""
        there, mine = processes(), {self.process.pid}
        mine |= {pid for pid, (start, _) in self.known.items() if pid in there and there[pid][1] == start}
        for _ in range(8):
            mine |= {pid for pid, (parent, _, _) in there.items() if parent in mine}
        found = {pid: there[pid][1:] for pid in mine if pid in there}
        self.known |= found
        return found

    def kill_one(self, pattern, chance):
        """SIGKILL to one of the family whose command line has the pattern; its name."""
        fits = sorted(pid for pid, (_, name) in self.family().items() if re.search(pattern, name))
        fits = [pid for pid in fits if pid != self.process.pid]
        if not fits:
            return ""
        pid = chance.choice(fits)
        name = self.known[pid][1]
        os.kill(pid, signal.SIGKILL)
        return name[:60]

    def kill_busy(self, seconds):
        """SIGKILL to a worker in the middle of a call, as soon as there is one; its name, "" if there was none so long.

        A call of the demo takes milliseconds, so that a random moment meets it in its longest stages alone.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            for pid in [pid for pid, (_, name) in list(self.known.items()) if name.startswith("ray::")]:
                with contextlib.suppress(OSError):
                    name = (Path("/proc") / str(pid) / "cmdline").read_bytes().rstrip(b"\0 ").decode()
                    if re.match(r"ray::\S*Host\.call", name):
                        os.kill(pid, signal.SIGKILL)
                        return name
            time.sleep(0.001)
        return ""

    def send(self, kind):
        pid = self.process.pid
        if kind in ("int", "term", "hup", "kill"):
            os.kill(pid, getattr(signal, f"SIG{kind.upper()}"))
        elif kind == "close":
            self.closed = True
        else:
            os.write(self._master, b"\x03")
            if kind == "ctrl-c twice":
                time.sleep(0.25)
                os.write(self._master, b"\x03")

    def end(self):
        """Exit code, None where it hangs; its last output."""
        try:
            code = self.process.wait(_HANG_S)
        except subprocess.TimeoutExpired:
            code = None
            for pid in self.family():
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
        time.sleep(0.2)
        self._out.seek(0)
        self.out = self._out.read().decode("utf-8", "replace")
        return code

    @property
    def text(self):
        return _plain(self.said)

    def last_line(self):
        lines = [line.strip() for line in self.text.splitlines()]
        lines = [line for line in lines if line and not re.match(r"[\u2800-\u28ff\u2713] ", line)]
        return lines[-1] if lines else ""


# The leader of a session makes its standard input its terminal.
_LEADER = (
    "import fcntl, os, signal, sys, termios; signal.signal(2, signal.SIG_DFL); signal.signal(1, signal.SIG_DFL)\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
# A line of a bar: its spinner or tick, the stage, and then a bar or a count.
_STAGE = r"[\u2800-\u28ff\u2713] ([a-z][^\u2500-\u259f]*?)\s+(?:[\u2500-\u259f]|\d+/)"


def _plain(data):
    text = data.decode("utf-8", "replace")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def page_text(out, temporary):
    page = write_report([out], temporary / "page.html").read_text(encoding="utf-8")
    text = re.sub(r"(?s)<(script|style|svg)\b.*?</\1>", "", page)
    text = re.sub(r"<[^>]+>", "\n", text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def facts(case, out, temporary):
    """What a finished run's folder says, without times."""
    found = {}
    models = out / "models" if case != "merge" else out.parent
    if case != "merge":
        run = RunDirectory.load(out)
        for table in SCHEMAS:
            if table != "incidents" and run.has(table):
                rows = [{k: v for k, v in row.items() if k not in _VOLATILE} for row in run.read(table).to_pylist()]
                found[f"table {table}"] = sorted(json.dumps(row, sort_keys=True) for row in rows)
        found["page"] = page_text(out, temporary)
        for figure in sorted((out / "figures").glob("*")) if (out / "figures").is_dir() else ():
            found[f"figure {figure.name}"] = figure.read_text().splitlines() if figure.suffix == ".md" else []
    for model in sorted(models.glob("*")) if models.is_dir() else ():
        for file in sorted(model.glob("*")):
            if not model.is_dir() or (case == "merge" and model != out) or file.is_dir():
                continue
            if file.name == "merge_plan.json":
                record = json.loads(file.read_text())
                record.pop("command")
                for key in ("peak_bytes", "seconds"):
                    (record["proof"] or {}).pop(key, None)
                found[f"model {file.name}"] = json.dumps(record, indent=1, sort_keys=True).splitlines()
            elif file.name != "README.md":
                found[f"model {file.name}"] = [hashlib.sha256(file.read_bytes()).hexdigest()]
    return found


# Lines of a page that say how fast the last call was, of which one that scored no candidate has no table, and numbers
# alone in a cell: its tables are compared as tables.
_OF_A_CALL = re.compile(
    r"^[\d.,]+$|^Share of the last call"
    r"|^(random|bayes|gradient_\w+|search|worker(-\d+)?|candidates|scoring s|present s|used %)$"
)


def facts_of(*arguments):
    """`facts`, from a process of its own: the threads that it starts would not survive a fork."""
    with tempfile.NamedTemporaryFile("r") as file:

        def tell():
            Path(file.name).write_text(json.dumps(facts(*arguments)))
            return 0

        if Forked(tell).wait():
            raise RuntimeError(f"the tables of {arguments[1]} cannot be compared")
        return json.loads(file.read())


def _steady(line):
    line = re.sub(r"/\S*/(run|base)[\w.-]*", "RUN", line)
    line = re.sub(r"\b\d[\d,.]* (s|min|ms|tokens a second)\b|\d\d:\d\d(:\d\d)?|\d[\d,.]*/s", "TIME", line)
    return re.sub(r"TIME( TIME)+", "TIME", line)


def differences(there, here):
    found = []
    for key in sorted(there.keys() | here.keys()):
        if key not in there or key not in here:
            found.append(f"{key}: only {'undisturbed' if key in there else 'resumed'}")
            continue
        a, b = ([_steady(line) for line in side[key]] for side in (there, here))
        if key == "page":  # its tables' numbers are compared as tables: tokens a second stand alone in a cell
            a, b = ([line for line in side if not _OF_A_CALL.search(line)] for side in (a, b))
        if a != b:
            gone, new = [x for x in a if x not in b], [x for x in b if x not in a]
            found.append(f"{key}: {len(a)} lines and {len(b)}; - {gone[:3]} + {new[:3]}"[:1500])
    return found


def leftovers(out, temporary):
    found = [str(path) for path in out.rglob("_tmp.*")]
    found += [str(path) for path in out.parent.glob("_tmp.*")]
    known = re.compile(r"ray(?!merge)|page\.html|torchinductor_")  # the last torch makes where it looks for a compiler
    return found + [str(path) for path in temporary.iterdir() if not known.match(path.name)]


class Campaign:
    def __init__(self, options):
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.folder))
        self.log = open(options.log, "a", encoding="utf-8")
        self.base, self.left, self.faults, self.number = {}, [], 0, 0

    def write(self, **row):
        self.log.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.log.flush()
        self.faults += len(row.get("faults", ()))
        print({key: value for key, value in row.items() if value not in ("", [], None)}, flush=True)

    def temporary(self):
        self.number += 1
        folder = self.folder / f"t{self.number}"
        folder.mkdir()
        return folder

    def undisturbed(self, case):
        if case in self.base:
            return
        stored = Path(self.options.base or "/nowhere") / f"{case}.json"
        if stored.exists():
            self.base[case] = json.loads(stored.read_text())
            return
        folder = self.folder / f"base-{case}"
        folder.mkdir()
        self.alphas(folder)
        temporary = self.temporary()
        process = Process(command(case, folder / "base"), temporary)
        code = process.end()
        assert code == 0, process.text
        seconds = time.monotonic() - process.began
        stages = [*process.stages, ("end", seconds)]
        print(case, f"{seconds:.1f} s", [(name, round(at, 1)) for name, at in stages], flush=True)
        self.base[case] = facts_of(case, folder / "base", temporary), seconds, stages
        if self.options.base:
            stored.write_text(json.dumps(self.base[case]))
        shutil.rmtree(temporary, ignore_errors=True)

    def alphas(self, folder):
        steps = [{"step": 0, "layer_to_merge_into": 17, "layer_to_remove": 18, "ratio_i_alpha": 0.6}]
        (folder / "alphas.json").write_text(json.dumps(steps))

    def moment(self, case, process, chance):
        """Wait for a random moment: of the whole run, or of one of its stages."""
        _, seconds, stages = self.base[case]
        if len(stages) < 2 or chance.random() < 0.4:
            until = chance.uniform(0.0, seconds)
            while process.process.poll() is None and time.monotonic() - process.began < until:
                time.sleep(0.02)
            return
        number = chance.randrange(len(stages) - 1)
        (stage, begins), (_, ends) = stages[number], stages[number + 1]
        wait = chance.uniform(0.0, ends - begins)
        while process.process.poll() is None and stage not in [name for name, _ in process.stages]:
            time.sleep(0.02)
        until = time.monotonic() + wait
        while process.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)

    def run(self, seed):
        chance = random.Random(seed)
        case = chance.choice(self.options.cases)
        self.undisturbed(case)
        folder, temporary = self.folder / f"{seed}-{case}", self.temporary()
        folder.mkdir()
        self.alphas(folder)
        kinds = [kind for kind in self.options.kinds for _ in range(KINDS[kind])]
        if case in ("merge",):
            kinds = [kind for kind in kinds if kind not in ("worker", "raylet", "gcs", "two")]
        planned = [chance.choice(kinds) for _ in range(chance.choice((3, 4, 5, 6, 7)))]
        tmpfs = "full" in planned
        if tmpfs:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "chaos", str(folder)], check=True)
            self.alphas(folder)
        try:
            if self.disturb(seed, chance, case, planned, folder, temporary):
                self.compare(seed, case, folder, temporary)
        finally:
            if tmpfs:
                subprocess.run(["umount", "-l", str(folder)], check=True)
            if not self.options.keep:
                shutil.rmtree(folder, ignore_errors=True)

    def disturb(self, seed, chance, case, planned, folder, temporary):
        """The disturbances one after another, then to the end; whether it ended well."""
        arguments, process = command(case, folder / "run"), None
        for kind in [*planned, ""]:
            if process is None:
                if kind == "full":
                    used = shutil.disk_usage(folder).used
                    size = used + int(chance.choice((2e4, 3e5, 3e6, 2e7)) * chance.uniform(0.2, 2.0))
                    subprocess.run(["mount", "-o", f"remount,size={max(size, 8192)}", str(folder)], check=True)
                process = Process(arguments, temporary, fresh=chance.random() < 0.15)
            elif kind == "full":
                size = shutil.disk_usage(folder).used + 8192
                subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
            if kind and kind != "full":
                self.moment(case, process, chance)
            row = {"seed": seed, "case": case, "kind": kind, "seconds": round(time.monotonic() - process.began, 1)}
            row |= {"stage": process.stage, "hit": "", "faults": []}
            expected = {0}
            if process.process.poll() is not None:
                row["hit"] = "had ended"
            elif kind in ENDS:
                process.send(kind)
                expected |= {ENDS[kind], 128 - ENDS[kind]}  # before its handlers are there, by the signal itself
            elif kind in ("worker", "raylet", "gcs", "child"):
                pattern = {"worker": "^ray::(?!.*Agent)", "raylet": "/raylet", "gcs": "/gcs_server", "child": "."}[kind]
                busy = kind == "worker" and chance.random() < 0.7
                row["hit"] = (process.kill_busy(_BUSY_S) if busy else "") or process.kill_one(pattern, chance)
                row["hit"] = row["hit"] or "none there"
                if kind == "worker":
                    time.sleep(0.3)
                    if process.process.poll() is None:
                        self.write(**row)  # the run goes on: the next disturbance may meet it
                        continue
                expected |= {0, 1, 2} if kind != "worker" else {2}
            elif kind == "two":
                second = Process(arguments, temporary)
                code = second.end()
                row["hit"] = f"second: {code}, {second.last_line()[-150:]}"
                if code not in (0, 2):
                    row["faults"] += self.judge(second, code, {0, 2})
                self.left.append((time.monotonic(), second, f"seed {seed} second"))
            if kind == "full":
                expected |= {2}
            code = process.end()
            self.left.append((time.monotonic(), process, f"seed {seed} {case} {kind}"))
            row |= {"rc": code, "said": process.last_line()[-300:], "took": round(time.monotonic() - process.began, 1)}
            row["faults"] += self.judge(process, code, expected)
            self.write(**row)
            if kind == "full":
                subprocess.run(["mount", "-o", "remount,size=300m", str(folder)], check=True)
            if code == 0:
                return True
            process = None
        return code == 0

    def judge(self, process, code, expected):
        faults = []
        if code not in expected:
            faults.append(f"exit code {code}, not of {sorted(expected)}")
        if code not in (0, -9, 129, -1) and not process.last_line():
            faults.append("says nothing")
        said = process.out + process.text
        if "Traceback" in said or re.match(r"[\w.]*(Error|Exception)\b", process.last_line()):
            faults.append("trace shown")
        if faults:
            faults.append(said[-3000:])
        return faults

    def compare(self, seed, case, folder, temporary):
        there = self.base[case][0]
        faults = differences(there, facts_of(case, folder / "run", temporary))
        faults += [f"left: {path}" for path in leftovers(folder / "run", temporary)]
        if not self.options.keep:
            shutil.rmtree(temporary, ignore_errors=True)
        self.write(seed=seed, case=case, kind="compared", faults=faults)

    def sweep(self, *, wait=False):
        """Of the processes that ended a while ago, what is left."""
        for ended, process, what in list(self.left):
            if wait:
                time.sleep(max(0.0, ended + _LEFT_S - time.monotonic()))
            if time.monotonic() - ended > _LEFT_S:
                self.left.remove((ended, process, what))
                if names := [name[:120] for name in (name for _, name in process.family().values())]:
                    self.write(kind="left running", case=what, faults=names)

    def main(self):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
        raymerge.cli._quiet_libraries()
        read_inputs(load_config(None, []), ["report", "search"])  # imports what every command does
        until = time.monotonic() + 60 * self.options.minutes
        seeds = self.options.seeds or range(self.options.seed * 1000, 10**9)
        for seed in seeds:
            if time.monotonic() > until:
                break
            self.run(seed)
            self.sweep()
        self.sweep(wait=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        return 1 if self.faults else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1, help="runs have the seeds SEED000, SEED001, ...")
    parser.add_argument("--seeds", type=int, nargs="*", help="these alone")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--log", default="chaos.jsonl")
    parser.add_argument("--folder", default="/tmp", help="where the runs lie")
    parser.add_argument("--base", help="a folder that keeps what the undisturbed runs said for the next campaign")
    parser.add_argument("--keep", action="store_true", help="leave the runs' folders")
    return Campaign(parser.parse_args()).main()


if __name__ == "__main__":
    sys.exit(main())
