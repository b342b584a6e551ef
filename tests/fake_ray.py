"""Ray for a WorkerPool without processes: actors whose answers a test sets, so that what is rare comes when asked."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray.exceptions import GetTimeoutError


class Waits(Exception):
    """The answer of an actor that gives none yet."""


@dataclass(eq=False)  # a key, as Ray's references are
class Reference:
    actor: Any
    method: str
    args: tuple


class FakeActor:
    """Answers what `answers` has by the called method: a value, an exception, a function of the arguments, or Waits."""

    def __init__(self, answers):
        self.answers, self.killed, self.calls = dict(answers), False, []

    def __getattr__(self, method):
        if method.startswith("__"):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *args: self.called(method, args))

    def called(self, method, args):
        self.calls.append((method, args))
        return Reference(self, method, args)

    def answer(self, reference):
        found = self.answers.get(reference.method)
        return found(*reference.args) if callable(found) and not isinstance(found, type) else found


class FakeRay:
    """In place of the module, as `raymerge.pool.ray` and `raymerge.actors.ray`: FakeRay(answers of the first, the
    second, …).

    A call is answered when its result is looked at. Actors beyond those given answer as the last one does.
    """

    def __init__(self, *answers):
        self.prepared, self.actors, self.puts, self.dead_nodes = list(answers), [], [], set()
        self.started = []  # of each actor its options and what it was made of
        self.homes = []  # of each where it is told that the driver is

    def remote(self, _):
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=partial(self._start, options)))

    def get_runtime_context(self):
        return SimpleNamespace(runtime_env={}, get_node_id=lambda: "head")

    def _start(self, options, *args, **home):
        self.homes.append(home)
        self.started.append((options, args))
        self.actors.append(FakeActor(self.prepared[min(len(self.actors), len(self.prepared) - 1)]))
        return self.actors[-1]

    def wait(self, references, num_returns=1, timeout=None):
        done = [each for each in references if each.actor.answer(each) is not Waits]
        return done, [each for each in references if each not in done]

    def get(self, reference, timeout=None):
        found = reference.actor.answer(reference)
        if found is Waits:
            assert timeout is not None, "this would wait for ever"
            raise GetTimeoutError("no answer")
        if isinstance(found, Exception):
            raise found
        return found

    def put(self, value):
        self.puts.append(value)
        return SimpleNamespace(put=len(self.puts) - 1)

    def kill(self, actor, no_restart=True):
        actor.killed = no_restart

    def nodes(self):
        return [{"NodeID": node, "Alive": False} for node in self.dead_nodes]

    def cluster_resources(self):
        return {"CPU": 4.0}

    def available_resources(self):
        return {"CPU": 0.5}
