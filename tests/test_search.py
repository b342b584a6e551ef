"""The proposers on made-up objectives; the searcher without Tune; the whole search with a plain class as worker."""

import errno
import logging
import math
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from plain_workers import DIES_ONCE, GIVES_NAN, HANGS_ONCE, NO_SPACE, RAISES, Scorer, bump
from ray.exceptions import GetTimeoutError, OutOfMemoryError

from raymerge import proposers
from raymerge.actors import NoRoomError, WorkerError, WorkerLost
from raymerge.config import ConfigError
from raymerge.plan import tail_coefficients
from raymerge.pool import WorkerPool
from raymerge.proposers import BayesProposer, RandomProposer, Starts
from raymerge.search import BatchSearcher, LoggerError, _Trial, check_loggers, choose_batch, run_search
from raymerge.storage import RunError

COLUMNS = {
    "searcher", "iteration", "batch", "tune_trial", "actor", "seed", "plan_id", "alphas", "objective", "value",
    "accuracy", "nll", "perplexity", "n_questions", "seconds", "cpu_seconds", "status", "error",
}  # fmt: skip


def maximise(proposer, objective, count):
    points = []
    for _ in range(count):
        (point,) = proposer.ask(1)
        proposer.tell(point, objective(point))
        points.append(point)
    return points


# -- proposers

PROPOSERS = [BayesProposer, RandomProposer]


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_proposer_is_decided_by_its_seed_and_what_it_was_told(proposer):
    first, again, other = (
        maximise(proposer(dimensions=4, bounds=(0.3, 0.7), seed=seed), bump, 15) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(0.3 <= x <= 0.7 for point in first for x in point)
    assert len({tuple(point) for point in first}) == 15


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_known_points_come_first_and_once(proposer):
    known = [[0.6] * 3, [1.0] * 3, [0.6] * 3]
    points = proposer(dimensions=3, bounds=(0.0, 1.0), seed=0, known=known).ask(4)
    assert points[:2] == known[:2] and known[0] not in points[2:]


def test_known_points_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match=r"known point \[0.5, 1.0\] is not 2 values in \[0.0, 0.9\]"):
        BayesProposer(dimensions=2, bounds=(0.0, 0.9), seed=0, known=[[0.5, 1.0]])


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("done", [0, 3, 11, 14])
def test_a_proposer_told_the_record_goes_on_as_it_would_have(proposer, done):
    whole = maximise(proposer(dimensions=3, bounds=(0, 1), seed=5, known=[[0.5] * 3]), bump, 18)
    resumed = proposer(dimensions=3, bounds=(0, 1), seed=5, known=[[0.5] * 3])
    for point in whole[:done]:
        resumed.tell(point, bump(point))
    assert maximise(resumed, bump, 18 - done) == whole[done:]


def test_a_long_search_fits_its_kernel_at_every_tenth_part_more_and_a_restart_fits_the_same(monkeypatch):
    monkeypatch.setattr(proposers, "_ALWAYS_FITTED", 20)
    new = lambda: BayesProposer(dimensions=3, bounds=(0, 1), seed=5)  # noqa: E731
    proposer, points, kernels = new(), [], []
    for _ in range(28):
        points += maximise(proposer, bump, 1)
        kernels.append(proposer._optimizer._gp.kernel_.theta.tolist() if len(points) > 10 else None)
    changed = [count for count in range(20, 28) if kernels[count] != kernels[count - 1]]
    assert changed == [20, 22, 24, 26]
    for done in (21, 25):
        resumed = new()
        for point in points[:done]:
            resumed.tell(point, bump(point))
        assert maximise(resumed, bump, 28 - done) == points[done:]


def test_a_value_that_is_told_does_not_go_through_all_that_were(monkeypatch):
    """Of 20,000 points each took 0.4 s: more than an hour for all of them, and again for a restart."""
    from bayes_opt.target_space import TargetSpace

    def all_of_them(self):
        raise AssertionError("every point so far was gone through")

    monkeypatch.setattr(TargetSpace, "res", all_of_them)
    proposer = BayesProposer(dimensions=3, bounds=(0, 1), seed=0, initial=2)
    assert len(maximise(proposer, bump, 5)) == 5


def test_of_many_points_the_gp_knows_the_best_and_a_spread_of_the_others(monkeypatch):
    """What a proposal takes grows with the cube of the points it is made from, its memory with the square: with 20,000
    it would be 6 minutes and 25 GB."""
    monkeypatch.setattr(proposers, "_ALWAYS_FITTED", 16)
    monkeypatch.setattr(proposers, "_LEARNT", 24)
    new = lambda: BayesProposer(dimensions=3, bounds=(0, 1), seed=5)  # noqa: E731
    proposer, points = new(), []
    for _ in range(40):
        points += maximise(proposer, bump, 1)
    (proposed,) = proposer.ask(1)
    known, values = proposer._optimizer._gp.X_train_, sorted(map(bump, points))
    assert len(known) == 24 and len(set(map(tuple, known))) == 24
    there = [value for value in values if any(np.allclose(bump(point), value) for point in known)]
    assert there[-12:] == values[-12:], "the best half"
    assert there[0] == values[0] or there[0] < np.median(values), "and some of the others"
    resumed = new()
    for point in points:
        resumed.tell(point, bump(point))
    assert resumed.ask(1) == [proposed], "a restart goes on as the search would have"


def test_failed_points_are_tolerated_and_not_proposed_again():
    proposer = BayesProposer(dimensions=3, bounds=(0, 1), seed=0, initial=4)
    points = maximise(proposer, lambda point: float("nan") if point[0] > 0.6 else bump(point), 25)
    failed = [point for point in points if point[0] > 0.6]
    for i, point in enumerate(failed):
        assert all(max(abs(a - b) for a, b in zip(point, other, strict=True)) > 0.005 for other in failed[:i])
    everything = BayesProposer(dimensions=3, bounds=(0, 1), seed=0, initial=2)
    assert len(maximise(everything, lambda point: None, 8)) == 8


def test_random_points_in_the_place_of_proposals_are_not_drawn_again_after_a_restart():
    """As where too few candidates have a value for a model of them."""
    new = lambda: BayesProposer(dimensions=3, bounds=(0, 1), seed=0, initial=2)  # noqa: E731
    whole = maximise(new(), lambda _: None, 8)
    assert len({tuple(point) for point in whole}) == 8
    for done in (2, 5):
        resumed = new()
        for point in whole[:done]:
            resumed.tell(point, None)
        assert maximise(resumed, lambda _: None, 8 - done) == whole[done:]


def test_a_batch_and_pending_points_spread():
    proposer = BayesProposer(dimensions=2, bounds=(0, 1), seed=0, initial=5)
    maximise(proposer, bump, 8)
    pending = proposer.ask(3)
    points = pending + proposer.ask(3, pending)
    gaps = [np.abs(np.subtract(a, b)).max() for i, a in enumerate(points) for b in points[:i]]
    assert min(gaps) > 1e-3


def test_bayes_beats_random_on_a_smooth_bump_in_13_dimensions():
    def broad(point):
        return math.exp(-8.0 * np.mean((np.array(point) - 0.7) ** 2))

    best = {
        proposer: np.mean(
            [
                max(map(broad, maximise(proposer(dimensions=13, bounds=(0, 1), seed=seed), broad, 40)))
                for seed in range(3)
            ]
        )
        for proposer in (BayesProposer, RandomProposer)
    }
    # Six seeds: bayes .75-.93, mean .86; random .63-.73, mean .68.
    assert best[BayesProposer] > best[RandomProposer] + 0.08


def test_a_warp_finds_what_depends_on_effective_coefficients_alone():
    target = tail_coefficients([0.3, 0.5, 0.9, 0.2, 0.7, 0.4, 0.6, 0.5, 0.3, 0.8, 0.2, 0.4, 0.3])

    def near(point):
        return -float(((tail_coefficients(point) - target) ** 2).sum())

    common = {"dimensions": 13, "bounds": (0, 1), "known": [[0.6225] * 13]}
    warped, plain = (
        np.mean([max(map(near, maximise(BayesProposer(seed=seed, warp=warp, **common), near, 35))) for seed in (0, 1)])
        for warp in (tail_coefficients, None)
    )
    assert warped > 0.5 * plain, "squared distances: half of the plain search's or less"


@pytest.mark.parametrize(
    "seconds, candidates, concurrent, expected",
    [(10.0, 60, 2, 1), (0.02, 200, 2, 10), (0.02, 60, 2, 3), (0.0, 30, 4, 1), (1e-3, 1000, 1, 100)],
)
def test_batches_are_as_large_as_overhead_asks_and_learning_allows(seconds, candidates, concurrent, expected):
    assert choose_batch(seconds, candidates, concurrent) == expected


CHOICES = (2, 3, 5, 8, 9)


def planted(point):
    """Best at choice 5 with values at .7; choices differ by more than values do."""
    first, *values = point
    assert first in CHOICES
    return bump(values) - 0.3 * abs(CHOICES.index(first) - CHOICES.index(5))


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_points_with_a_choice_are_decided_by_the_seed_and_go_on_from_the_record(proposer):
    common = {"dimensions": 2, "bounds": (0.2, 0.9), "choices": CHOICES, "known": [[3.0, 0.5, 0.5]]}
    whole = maximise(proposer(seed=4, **common), planted, 20)
    assert whole[0] == [3.0, 0.5, 0.5] and all(0.2 <= x <= 0.9 for point in whole for x in point[1:])
    for done in (6, 15):
        resumed = proposer(seed=4, **common)
        for point in whole[:done]:
            resumed.tell(point, planted(point))
        assert maximise(resumed, planted, 20 - done) == whole[done:]


def test_the_first_random_points_go_through_all_choices():
    points = BayesProposer(dimensions=3, bounds=(0, 1), seed=1, initial=12, choices=CHOICES).ask(12)
    for part in (points[:5], points[5:10]):
        assert sorted(point[0] for point in part) == list(CHOICES)


def test_choice_and_values_are_found_together():
    found = [
        maximise(BayesProposer(dimensions=3, bounds=(0, 1), seed=seed, initial=10, choices=CHOICES), planted, 30)
        for seed in range(3)
    ]
    best = [max(points, key=planted) for points in found]
    assert all(point[0] == 5 and planted(point) > 0.9 for point in best)
    # Half of what is proposed stays with the best choice, where a random search has a fifth.
    assert np.mean([point[0] == 5 for points in found for point in points[10:]]) > 0.5


def test_choices_are_evenly_spaced_in_their_order():
    """Whatever order they are given in; the first and the last are 2 apart for the Gaussian process."""
    proposer = BayesProposer(dimensions=2, bounds=(0, 1), seed=0, choices=[7, 3, 5])
    points = [[choice, 0.25, 0.75] for choice in (3.0, 5.0, 7.0)]
    encoded = np.array([proposer._encode(point) for point in points])
    assert [proposer._decode(row) for row in encoded] == points
    assert proposer._measured(encoded).tolist() == [[place, 0.25, 0.75] for place in (0, 1, 2)]
    two = BayesProposer(dimensions=1, bounds=(0, 1), seed=0, choices=[7, 3])
    assert two._measured(np.array([two._encode([choice, 0.5]) for choice in (3.0, 7.0)])).tolist() == [
        [0, 0.5],
        [2, 0.5],
    ]
    assert two._optimizer.space.bounds[0].tolist() == [0.0, 1.0], "an equal share for every choice"


def test_no_proposal_is_as_near_to_a_failed_point_as_a_hundredth_of_the_bounds_in_every_value():
    for found, taken in (([0.103, 0.203], False), ([0.103, 0.4], True), ([0.106, 0.203], True)):
        proposer = BayesProposer(dimensions=2, bounds=(0.0, 0.5), seed=0, initial=0)
        for point, value in (([0.3, 0.3], 0.5), ([0.4, 0.1], 0.25), ([0.1, 0.2], None)):
            proposer.tell(point, value)
        proposer._liar.suggest = lambda found=found, **_: np.array(found)
        assert (proposer.ask(1) == [found]) == taken


def test_choices_that_are_not_offered_are_refused():
    with pytest.raises(ValueError, match=r"known point \[4.0, 0.5\] begins with none of \[2.0, 3.0"):
        RandomProposer(dimensions=1, bounds=(0, 1), seed=0, choices=CHOICES, known=[[4.0, 0.5]])
    with pytest.raises(ValueError, match="is not 2 values"):
        BayesProposer(dimensions=2, bounds=(0, 1), seed=0, choices=CHOICES, known=[[2.0, 0.5]])


def test_starts_are_given_in_their_order_and_learn_nothing():
    starts = Starts([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    assert starts.ask(2) == [[0.1, 0.2], [0.3, 0.4]]
    starts.tell([0.9, 0.9], 1.0)
    assert starts.ask(2) == [[0.5, 0.6]]


# -- the searcher, as Tune calls it


class Told(RandomProposer):
    """A proposer that writes down what it is told, into a log shared with `record`."""

    def __init__(self, log, **options):
        super().__init__(dimensions=2, bounds=(0, 1), seed=0, **options)
        self.log = log

    def tell(self, point, value):
        super().tell(point, value)
        self.log.append(("tell", value))


class Crew:
    """A pool's workers without the pool: lost ones come back when a test says so. node: where those that are lost
    were."""

    node = "there still"

    def __init__(self, count):
        self.present, self.back, self.lost, self.dead = list(range(count)), [], [], set()

    def name_of(self, slot):
        return f"actor-{slot}"

    def poll(self):
        came, self.back = self.back, []
        self.present += came
        return came

    def lose(self, slot, reason):
        self.present.remove(slot)
        self.lost.append((slot, reason))
        return self.node

    def gives_up(self, losses):
        return sum(node != "preempted" for node in losses) >= 3

    def answering(self, slots):
        for slot in self.dead.intersection(slots):
            self.lose(slot, "died")
        return [slot for slot in slots if slot not in self.dead]

    def succeeded(self, slot):
        assert slot in self.present

    def require(self):
        if not self.present:
            raise NoRoomError("no worker is left")


def searcher(log, *, record=None, **options):
    options = {"candidates": 5, "batch": 2, "pool": Crew(2), "minimise": False, **options}
    return BatchSearcher(
        Told(log),
        describe=lambda point: {"searcher": "fake"},
        record=record or (lambda part, rows, results: log.append(("record", part, rows))),
        **options,
    )


def scores(*values):
    return {"results": [{"value": v, "accuracy": v, "nll": 1.0, "n_questions": 4, "seconds": 0.1} for v in values]}


def test_the_record_is_written_before_the_proposer_is_told():
    log = []
    tune = searcher(log)
    first, second = tune.suggest("a"), tune.suggest("b")
    assert (first["worker"], second["worker"]) == ("actor-0", "actor-1")
    assert first["first_round"] == ["actor-0", "actor-1"] and len(first["candidates"]) == len(second["candidates"]) == 2
    assert tune.suggest("c") is None, "no worker is free"
    tune.on_trial_complete("b", scores(0.5, 0.25))
    assert [entry[0] for entry in log] == ["record", "tell", "tell"]
    assert [(row["iteration"], row["actor"], row["tune_trial"]) for row in log[0][2]] == [
        (2, "worker-1", "b"),
        (3, "worker-1", "b"),
    ]
    third = tune.suggest("c")
    assert third["worker"] == "actor-1" and len(third["candidates"]) == 1, "the last of five"
    tune.on_trial_complete("a", scores(0.5, 0.5))
    assert tune.suggest("d") is None, "one is running still"
    tune.on_trial_complete("c", scores(1.0))
    assert tune.suggest("d") == BatchSearcher.FINISHED
    assert tune.best == 1.0 and tune.finished == 5


def test_tune_keeps_nothing_of_what_is_recorded():
    """It keeps each trial's last result to the end, and copies them all there: a search's answers, three times."""
    log = []
    tune = searcher(log)
    tune.suggest("a")
    result = scores(0.5, 0.25)
    kept = result["results"]
    tune.on_trial_complete("a", result)
    assert kept == [] and [row["value"] for row in log[0][2]] == [0.5, 0.25]


def test_ties_in_accuracy_are_broken_by_nll():
    log = []
    tune = searcher(log)
    tune.suggest("a")
    results = scores(0.5, 0.5)["results"]
    results[1]["nll"] = 0.8
    tune.on_trial_complete("a", {"results": results})
    (_, first), (_, second) = log[1:]
    assert second > first and abs(second - first) < 1e-2
    assert tune.best == 0.5


def test_an_nll_is_minimised():
    log = []
    tune = searcher(log, minimise=True)
    tune.suggest("a")
    tune.on_trial_complete("a", scores(0.5, 0.25))
    assert log[1:] == [("tell", -0.5), ("tell", -0.25)] and tune.best == 0.25


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_value_that_is_no_number_fails_its_candidate_alone(bad):
    log = []
    tune = searcher(log)
    tune.suggest("a")
    tune.on_trial_complete("a", scores(bad, 0.5))
    failed, fine = log[0][2]
    assert failed["status"] == "failed" and "not finite" in failed["error"] and failed["value"] is None
    assert fine["status"] == "ok" and fine["error"] is None
    assert [entry[1] is None for entry in log[1:]] == [True, False]


def test_a_record_that_cannot_be_written_ends_the_search_and_is_not_told():
    log = []

    def full(part, rows, results):
        raise OSError(28, "No space left on device")

    tune = searcher(log, record=full)
    tune.suggest("a")
    tune.suggest("b")
    tune.on_trial_complete("a", scores(0.5, 0.5))
    assert isinstance(tune.failure, OSError) and log == []
    assert tune.suggest("c") == BatchSearcher.FINISHED


def test_what_the_pool_raises_over_a_lost_batch_ends_the_search():
    log, crew = [], Crew(2)

    def gone(losses):
        raise ConnectionError("the cluster's head is gone")

    crew.gives_up = gone
    tune = searcher(log, pool=crew)
    tune.suggest("a")
    tune.on_trial_complete("a", {"lost": "died"})
    assert isinstance(tune.failure, ConnectionError) and log == []
    assert tune.suggest("b") == BatchSearcher.FINISHED


def test_a_lost_batch_is_done_again_one_by_one_and_fails_after_three_losses():
    log, crew = [], Crew(3)
    tune = searcher(log, candidates=2, concurrent=1, pool=crew)
    points = tune.suggest("a")["candidates"]
    lost = {"lost": "score: no answer in 3 s"}
    tune.on_trial_complete("a", lost)
    assert crew.lost == [(0, "score: no answer in 3 s")]
    again = tune.suggest("b")
    assert again["candidates"] == points[:1] and again["worker"] == "actor-1", "at once, on another worker"
    assert tune.suggest("x") is None, "one at a time"
    tune.on_trial_complete("b", lost)
    assert tune.suggest("c")["candidates"] == points[1:]
    tune.on_trial_complete("c", scores(0.5))
    assert tune.suggest("d")["candidates"] == points[:1]
    tune.on_trial_complete("d", lost)
    assert tune.suggest("e") == BatchSearcher.FINISHED
    rows = [row for entry in log if entry[0] == "record" for row in entry[2]]
    assert [(row["iteration"], row["status"], row["error"]) for row in rows] == [
        (1, "ok", None),
        (0, "failed", "score: no answer in 3 s"),
    ]
    assert len({entry[1] for entry in log if entry[0] == "record"}) == 2, "a part each"


def test_a_candidate_whose_workers_nodes_were_lost_is_tried_until_one_stays():
    log, crew = [], Crew(6)
    tune = searcher(log, candidates=1, batch=1, pool=crew)
    for number, node in enumerate(("preempted", "there still", "preempted", "preempted", "there still")):
        crew.node = node
        points = tune.suggest(f"t{number}")["candidates"]
        tune.on_trial_complete(f"t{number}", {"lost": "died"})
    assert tune.suggest("last")["candidates"] == points
    tune.on_trial_complete("last", scores(0.5))
    assert tune.suggest("end") == BatchSearcher.FINISHED
    assert [row["status"] for entry in log if entry[0] == "record" for row in entry[2]] == ["ok"]


def test_workers_that_died_while_they_had_nothing_to_do_fail_no_candidate():
    """As when a node goes with all its workers while the last candidate is scored on one of them."""
    log, crew = [], Crew(4)
    tune = searcher(log, candidates=1, batch=1, pool=crew)
    points = tune.suggest("a")["candidates"]
    crew.dead = {1, 2}
    tune.on_trial_complete("a", {"lost": "died"})
    assert sorted(slot for slot, _ in crew.lost) == [0, 1, 2]
    again = tune.suggest("b")
    assert (again["worker"], again["candidates"]) == ("actor-3", points)


def test_a_worker_that_is_lost_gets_no_work_before_it_is_back_and_a_new_one_joins():
    log, crew = [], Crew(2)
    tune = searcher(log, candidates=6, batch=1, pool=crew)
    points = [tune.suggest(name)["candidates"] for name in "ab"]
    tune.on_trial_complete("a", {"lost": "died"})
    assert tune.suggest("c") is None
    crew.back = [0, 2]
    again, new = tune.suggest("c"), tune.suggest("d")
    assert (again["worker"], again["candidates"]) == ("actor-0", points[0])
    assert new["worker"] == "actor-2" and new["candidates"] not in points
    for name in "bcd":
        tune.on_trial_complete(name, {"lost": "died"})
    assert tune.suggest("e") == BatchSearcher.FINISHED
    assert isinstance(tune.failure, NoRoomError) and "no worker is left" in str(tune.failure)
    assert log == []


@pytest.mark.parametrize("error", [NoRoomError("disk full: free some"), ConfigError("search.objective: none such")])
def test_what_is_no_fault_of_a_candidate_ends_the_search_and_is_not_stored(monkeypatch, error):
    """It keeps its class, by which a caller tells one from the other."""

    def call_worker(*_, **__):
        raise error

    trial = object.__new__(_Trial)
    trial.setup({}, 60.0, "score", (), "")
    trial.config = {"worker": "actor-0", "candidates": [[0.5]], "first_round": []}
    monkeypatch.setattr("raymerge.search.find_worker", lambda name: name)
    monkeypatch.setattr("raymerge.search.call_worker", call_worker)
    monkeypatch.setattr(trial, "_wait_for_others", lambda: None)
    log = []
    tune = searcher(log)
    tune.suggest("a")
    tune.on_trial_complete("a", pickle.loads(pickle.dumps(trial.step())))
    assert type(tune.failure) is type(error) and str(tune.failure) == str(error) and log == []
    assert tune.suggest("b") == BatchSearcher.FINISHED


def test_what_other_workers_finish_is_stored_though_the_search_is_to_end():
    """The message of a full disk says so, and a descent takes hours; a record that fails then hides nothing."""
    log = []

    def record(part, rows, results):
        if len(log) == 3:
            raise OSError(28, "No space left on device")
        log.append(("record", part, rows))

    tune = searcher(log, pool=Crew(3), candidates=6, record=record)
    for name in "abc":
        tune.suggest(name)
    tune.on_trial_complete("a", {"refused": NoRoomError("disk full: free some")})
    tune.on_trial_complete("b", scores(0.5, 0.25))
    assert [row["iteration"] for row in log[0][2]] == [2, 3]
    tune.on_trial_complete("c", scores(0.5, 0.25))
    assert isinstance(tune.failure, NoRoomError) and len(log) == 3
    assert tune.suggest("d") == BatchSearcher.FINISHED


@pytest.mark.parametrize("alive", [True, False])
def test_a_trial_that_failed_says_nothing_of_its_worker_which_is_asked_before_it_gets_more(alive):
    log, crew = [], Crew(1)
    tune = searcher(log, pool=crew)
    points = tune.suggest("a")["candidates"]
    crew.dead = set() if alive else {0}
    tune.on_trial_complete("a", error=True)
    if alive:
        assert tune.suggest("b")["candidates"] == points[:1] and crew.lost == []
    else:
        assert crew.lost == [(0, "died")]
        assert tune.suggest("b") == BatchSearcher.FINISHED and isinstance(tune.failure, NoRoomError)


def test_a_worker_killed_for_memory_is_lost_and_no_candidate_failed(monkeypatch):
    """Ray gives that error for ever once the restarts are used up: it would fail candidate after candidate."""

    def get(*_, **__):
        raise OutOfMemoryError("killed for memory")

    monkeypatch.setattr("raymerge.pool.ray.get", get)
    trial = object.__new__(_Trial)
    trial.setup({}, 60.0, "score", (), "")
    worker = SimpleNamespace(call=SimpleNamespace(remote=lambda *_: None))
    with pytest.raises(WorkerLost, match="OutOfMemoryError: killed for memory"):
        trial._score(worker, [[0.5], [0.6]])


def test_a_logger_without_its_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    check_loggers(["tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("mlflow", "wandb") else name)
    with pytest.raises(LoggerError, match="pip install mlflow wandb"):
        check_loggers(["tensorboard", "mlflow", "wandb"])


def replayed(iteration, batch, value=0.5, nll=1.0):
    status = "failed" if value is None else "ok"
    return {"iteration": iteration, "batch": batch, "alphas": [0.5, iteration / 10], "status": status, "value": value,
            "nll": nll}  # fmt: skip


def test_a_restarted_search_gives_again_the_numbers_of_what_did_not_end_and_writes_over_no_part():
    log, shown = [], []
    record = [replayed(3, 6, None), replayed(0, 2, 0.25), replayed(2, 4, 0.75)]
    tune = searcher(log, candidates=7, replayed=record, on_progress=lambda *seen: shown.append(seen))
    # In the order in which they were proposed, whatever the order in which they ended.
    assert [value and round(value, 2) for _, value in log] == [0.25, 0.75, None]
    assert shown == [(1, 0.25), (2, 0.75), (3, 0.75)] and tune.best == 0.75
    log.clear()
    tune.suggest("a"), tune.suggest("b")
    for name in "ab":
        tune.on_trial_complete(name, scores(0.5, 0.5))
    stored = [entry for entry in log if entry[0] == "record"]
    assert [[row["iteration"] for row in rows] for _, _, rows in stored] == [[1, 4], [5, 6]]
    assert [(part, {row["batch"] for row in rows}) for _, part, rows in stored] == [
        ("fake-000007", {7}),
        ("fake-000008", {8}),
    ]
    assert tune.suggest("c") == BatchSearcher.FINISHED and (tune.done, tune.finished) == (7, 4)


@pytest.mark.parametrize(("proposer", "options"), [(BayesProposer, {"initial": 3}), (RandomProposer, {})])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ended", range(1, 6))
def test_a_search_that_was_interrupted_goes_on_as_it_would_have(proposer, options, batch, ended):
    """The batch that was not recorded had been proposed while the one before it was tried."""

    def tried(replayed, batches):
        rows = []
        tune = BatchSearcher(
            proposer(dimensions=2, bounds=(0, 1), seed=3, known=[[0.5, 0.5]], **options),
            candidates=12,
            batch=batch,
            pool=Crew(1),
            describe=lambda point: {"searcher": "fake"},
            minimise=False,
            record=lambda part, new, results: rows.extend(new),
            replayed=replayed,
        )
        for number in range(batches):
            points = tune.suggest(f"t{number}")["candidates"]
            assert tune.suggest("ahead") in (None, BatchSearcher.FINISHED)
            tune.on_trial_complete(f"t{number}", scores(*(bump(point) for point in points)))
        return rows

    whole = tried([], 12 // batch)
    begun = tried([], ended)
    resumed = tried(begun, 12 // batch - ended)
    assert [row["alphas"] for row in begun + resumed] == [row["alphas"] for row in whole]


def test_parts_of_a_new_search_begin_at_0():
    log = []
    tune = searcher(log, candidates=2, batch=1)
    for name in "ab":
        tune.suggest(name)
        tune.on_trial_complete(name, scores(0.5))
    assert [entry[1] for entry in log if entry[0] == "record"] == ["fake-000000", "fake-000001"]


@pytest.mark.parametrize("minimise", [False, True])
def test_progress_has_the_best_so_far_in_the_objective_s_own_unit(minimise):
    shown = []
    tune = searcher([], candidates=4, batch=4, minimise=minimise, on_progress=lambda *seen: shown.append(seen))
    tune.suggest("a")
    tune.on_trial_complete("a", scores(float("nan"), 0.5, 0.25, 0.75))
    assert shown == [(1, None), (2, 0.5), (3, 0.25 if minimise else 0.5), (4, 0.25 if minimise else 0.75)]


def test_where_no_questions_are_asked_there_is_no_nll_to_break_ties():
    log = []
    tune = searcher(log, minimise=True)
    tune.suggest("a")
    results = scores(0.5, 0.25)["results"]
    tune.on_trial_complete("a", {"results": [result | {"nll": None} for result in results]})
    assert [value for _, value in log[1:]] == [-0.5, -0.25] and tune.best == 0.25


def test_only_trials_of_the_first_round_wait_for_each_other():
    tune = searcher([], candidates=4, batch=1, pool=Crew(3), concurrent=2)
    rounds = [tune.suggest(name)["first_round"] for name in "ab"]
    tune.on_trial_complete("a", scores(0.5))
    assert rounds == [["actor-0", "actor-1"]] * 2 and tune.suggest("c")["first_round"] == []
    # No more than there is work for.
    assert searcher([], candidates=3, batch=2, pool=Crew(3)).suggest("a")["first_round"] == ["actor-0", "actor-1"]
    assert searcher([], candidates=1, batch=2, pool=Crew(3)).suggest("a")["first_round"] == ["actor-0"]


def test_a_trial_that_ends_twice_is_stored_once():
    log = []
    tune = searcher(log)
    tune.suggest("a")
    for _ in range(2):
        tune.on_trial_complete("a", scores(0.5, 0.5))
    assert [entry[0] for entry in log] == ["record", "tell", "tell"] and tune.finished == 2


def test_results_that_are_not_one_a_candidate_fail_them_all():
    """Nobody knows whose they are."""
    log = []
    tune = searcher(log)
    tune.suggest("a")
    tune.on_trial_complete("a", scores(0.5))
    assert [(row["iteration"], row["status"], row["error"]) for row in log[0][2]] == [
        (iteration, "failed", "the worker gave 1 results for 2 candidates") for iteration in (0, 1)
    ]


def test_the_first_refusal_is_the_one_that_is_raised():
    tune, first = searcher([]), NoRoomError("disk full: free some")
    for name in "ab":
        tune.suggest(name)
    tune.on_trial_complete("a", {"refused": first})
    tune.on_trial_complete("b", {"refused": NoRoomError("object store full")})
    assert tune.failure is first


def test_a_loss_that_cannot_be_written_down_ends_the_search():
    """It is among the run's incidents: where the disk is full for it, it is for all that follows."""

    class Full(Crew):
        def lose(self, slot, reason):
            raise OSError(28, "No space left on device")

    log = []
    tune = searcher(log, pool=Full(2))
    tune.suggest("a")
    tune.on_trial_complete("a", {"lost": "died"})
    assert isinstance(tune.failure, OSError) and log == []
    assert tune.suggest("b") == BatchSearcher.FINISHED


def test_proposals_are_made_while_workers_are_busy_and_know_what_is_pending():
    asked = []

    class Asked(Told):
        def ask(self, count, pending=()):
            points = super().ask(count, pending)
            asked.append((len(points), [list(point) for point in pending]))
            return points

    tune = BatchSearcher(
        Asked([]), candidates=5, batch=2, pool=Crew(1), describe=lambda _: {"searcher": "fake"}, minimise=False,
        record=lambda *_: None,
    )  # fmt: skip
    first = tune.suggest("a")["candidates"]
    assert tune.suggest("b") is None and tune.suggest("b") is None
    assert asked == [(2, []), (2, first)], "one batch ahead"
    tune.on_trial_complete("a", scores(0.5, 0.5))
    tune.suggest("b")
    assert len(asked) == 2


def test_an_error_in_tunes_folder_is_not_forgotten_for_a_trial_that_ends_well():
    tune = searcher([], batch=1)
    tune.suggest("a"), tune.suggest("b")
    assert not tune.trial_failed
    tune.on_trial_complete("a", error=True)
    tune.on_trial_complete("b", scores(0.5))
    assert tune.trial_failed


# -- one trial, and Tune's part of a search


def a_trial(started, first_round):
    trial = object.__new__(_Trial)
    trial.setup({}, 60.0, "score", (), str(started))
    trial.config = {"worker": "actor-0", "candidates": [[0.5]], "first_round": first_round}
    return trial


def test_a_trial_asks_on_until_a_descent_has_ended(monkeypatch):
    cut = {"unfinished": True, "seconds": 2.0, "cpu_seconds": 1.0}
    answers = [[cut], [cut], [{"value": 0.5, "seconds": 0.5, "cpu_seconds": 0.25}]]
    limits = []
    monkeypatch.setattr("raymerge.search.find_worker", lambda name: name)
    monkeypatch.setattr("raymerge.search.call_worker", lambda *_, timeout_s: limits.append(timeout_s) or answers.pop(0))
    (result,) = a_trial("/dev/null", []).step()["results"]
    assert result == {"value": 0.5, "seconds": 4.5, "cpu_seconds": 2.25} and limits == [60.0] * 3


def test_a_trial_of_the_first_round_waits_until_all_have_started_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("raymerge.search._START_S", 0.1)
    started = tmp_path / "tune" / "started"
    for _ in range(2):
        began = time.monotonic()
        a_trial(started, ["actor-0", "actor-1"])._wait_for_others()
        assert time.monotonic() - began >= 0.1 and [path.name for path in started.iterdir()] == ["actor-0"]
    monkeypatch.setattr("raymerge.search._START_S", 60.0)
    (started / "actor-1").touch()
    a_trial(started, ["actor-0", "actor-1"])._wait_for_others()
    (tmp_path / "a file").touch()
    a_trial(tmp_path / "a file", ["actor-1"])._wait_for_others()  # where nothing can be written nobody is waited for
    assert time.monotonic() - began < 30.0


def test_loggers_get_averages_over_a_trial_s_candidates(monkeypatch):
    results = [
        {"value": 0.25, "nll": 1.0, "seconds": 3.0, "perplexity": None},
        {"value": 0.75, "nll": 2.0, "seconds": 1.0, "error": None},
        {"error": "KeyError"},
    ]
    monkeypatch.setattr("raymerge.search.find_worker", lambda name: name)
    monkeypatch.setattr("raymerge.search.call_worker", lambda *_, **__: results)
    found = a_trial("/dev/null", []).step()
    assert found == {"results": results, "value": 0.5, "nll": 1.5, "seconds": 2.0, "done": True}


def test_a_proposal_knows_of_the_candidates_that_lost_their_worker():
    asked = []

    class Asked(Told):
        def ask(self, count, pending=()):
            asked.append([list(point) for point in pending])
            return super().ask(count, pending)

    tune = BatchSearcher(
        Asked([]), candidates=6, batch=2, pool=Crew(2), describe=lambda _: {"searcher": "fake"}, minimise=False,
        record=lambda *_: None,
    )  # fmt: skip
    lost, running = (tune.suggest(name)["candidates"] for name in "ab")
    tune.on_trial_complete("a", {"lost": "died"})
    assert tune.suggest("c") is None, "no worker is free, so that the next batch is made ahead"
    assert asked[2] == [*running, *lost]


def test_a_row_has_the_point_at_which_a_descent_ended():
    log = []
    tune = searcher(log, batch=1)
    start = tune.suggest("a")["candidates"][0]
    tune._describe = lambda point: {"searcher": "fake", "plan_id": str(point)}
    tune.on_trial_complete("a", {"results": [scores(0.5)["results"][0] | {"alphas": [0.25, 0.125]}]})
    (row,) = log[0][2]
    assert start != row["alphas"] == [0.25, 0.125] and row["plan_id"] == "[0.25, 0.125]"


def test_of_a_batch_in_which_one_candidate_fails_each_is_tried_alone(monkeypatch):
    asked = []

    def call_worker(handle, method, candidates, *_, timeout_s):
        asked.append(candidates)
        if [0.75] in candidates:
            raise ValueError("no such alpha")
        return [{"value": candidate[0], "seconds": 0.5} for candidate in candidates]

    monkeypatch.setattr("raymerge.search.find_worker", lambda name: name)
    monkeypatch.setattr("raymerge.search.call_worker", call_worker)
    trial = a_trial("/dev/null", [])
    trial.config["candidates"] = [[0.5], [0.75], [0.25]]
    results = trial.step()["results"]
    assert [result.get("value") for result in results] == [0.5, None, 0.25]
    assert results[1] == {"error": "ValueError: no such alpha"}
    assert asked == [[[0.5], [0.75], [0.25]], [[0.5]], [[0.75]], [[0.25]]]


@pytest.fixture
def tuner(monkeypatch):
    """Tune without processes: it asks the searcher for trials, scores them by `bump`, and stops after `most`; what it
    was asked for is in `options`."""
    found = SimpleNamespace(most=100, options=None)

    class Tuner:
        def __init__(self, trainable, tune_config, run_config):
            found.options, self.algorithm = run_config, tune_config.search_alg

        def fit(self):
            for number in range(found.most):
                if (asked := self.algorithm.suggest(f"t{number}")) == BatchSearcher.FINISHED:
                    return
                self.algorithm.on_trial_complete(f"t{number}", scores(*map(bump, asked["candidates"])))

    monkeypatch.setattr("raymerge.search.tune.Tuner", Tuner)
    monkeypatch.setattr("raymerge.search.tune.with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setattr("raymerge.search.tune.with_resources", lambda trainable, _: trainable)
    monkeypatch.setattr("raymerge.search.driver_node", lambda: "node:here")
    return found


class Timed(Crew):
    """Two workers, one of which joins in the search, and one that was lost before."""

    timeout_s = 60.0

    def __init__(self):
        super().__init__(2)
        self.seconds = iter([{0: 100.0, 2: 50.0}, {0: 102.0, 1: 1.0, 2: 50.0}])

    def seconds_present(self):
        return next(self.seconds)


def test_a_search_says_how_long_each_worker_was_there_and_what_share_it_scored(tuner, tmp_path):
    rows = []
    outcome = search(Timed(), tmp_path, rows, concurrent=None)
    assert outcome.finished == 12 == len(rows)
    counts = {slot: sum(row["actor"] == f"worker-{slot}" for row in rows) for slot in (0, 1)}
    assert min(counts.values()) > 0
    # 0.1 s a candidate; the third was there for no second of it.
    assert outcome.workers == tuple(
        {"worker": f"worker-{slot}", "candidates": counts[slot], "scoring_seconds": pytest.approx(0.1 * counts[slot]),
         "present_seconds": here, "utilisation": pytest.approx(0.1 * counts[slot] / here)}
        for slot, here in ((0, 2.0), (1, 1.0))
    )  # fmt: skip
    assert outcome.share_not_scoring == pytest.approx(1 - 1.2 / 3.0)
    assert os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1", "Ctrl-C is no wish to end as if all were done"
    again = search(Timed(), tmp_path, rows, candidates=12)
    assert (again.finished, again.share_not_scoring, again.workers) == (0, None, ())


@pytest.mark.parametrize("concurrent", [1, 2])
def test_fewer_trials_at_a_time_than_workers_have_the_time_of_so_many(tuner, tmp_path, concurrent):
    outcome = search(Timed(), tmp_path, [], concurrent=concurrent)
    assert 0.0 < outcome.wall_seconds < 1.2  # of which 1.2 s are said to be scored
    assert outcome.share_not_scoring == pytest.approx(1 - 1.2 / (concurrent * outcome.wall_seconds))


def test_a_search_that_tune_cuts_short_does_not_pass_for_a_whole_one(tuner, tmp_path):
    tuner.most = 2
    with pytest.raises(WorkerError, match="Tune stopped after 6 of 12 candidates; start again to resume"):
        search(Timed(), tmp_path, [])


@pytest.mark.parametrize(
    "error",
    [GetTimeoutError("no answer"), ConnectionError("of a logger"), OSError(errno.EMFILE, "files")],
)
def test_what_is_no_disk_s_doing_is_not_said_to_be_one_s(tuner, tmp_path, monkeypatch, error):
    """Python counts what Ray and loggers say of networks among the errors of the operating system."""

    def fit(_):
        raise error

    monkeypatch.setattr("raymerge.search.tune.Tuner.fit", fit)
    with pytest.raises(type(error)) as raised:
        search(Timed(), tmp_path, [])
    assert raised.value is error


@pytest.mark.parametrize(("fails", "loggers"), [(True, []), (False, ["wandb"])])
def test_tunes_folder_stays_where_there_is_something_to_read(fails, loggers, tuner, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.air.integrations.wandb.WandbLoggerCallback", lambda **_: None)
    told = BatchSearcher.on_trial_complete

    def complete(self, trial_id, result=None, error=False):
        (folder / trial_id).mkdir(parents=True, exist_ok=True)
        told(self, trial_id, result, error)
        self.trial_failed |= fails

    folder = tmp_path / "tune" / "random-12345678"
    monkeypatch.setattr("uuid.uuid4", lambda: SimpleNamespace(hex="12345678"))
    monkeypatch.setattr(BatchSearcher, "on_trial_complete", complete)
    search(Timed(), tmp_path, [], loggers=loggers)
    assert len(list(folder.iterdir())) == 4
    fails, loggers = False, []
    search(Timed(), tmp_path, [], loggers=loggers)
    assert not folder.exists()


def test_a_search_s_loggers_are_tune_s_and_write_where_they_are_told_to(tuner, tmp_path, monkeypatch):
    class Logger:
        def __init__(self, **options):
            self.options = options

    for name in ("TRACKING_URI", "PROJECT"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setattr("ray.air.integrations.mlflow.MLflowLoggerCallback", Logger)
    monkeypatch.setattr("ray.air.integrations.wandb.WandbLoggerCallback", Logger)
    search(Timed(), tmp_path, [], loggers=["mlflow", "wandb"])
    assert [logger.options for logger in tuner.options.callbacks] == [
        {"tracking_uri": f"sqlite:///{tmp_path}/tune/mlflow.db", "experiment_name": "raymerge-random"},
        {"project": "raymerge", "group": "random"},
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://its-server")
    monkeypatch.setenv("WANDB_PROJECT", "merges")
    search(Timed(), tmp_path, [], loggers=["mlflow", "wandb"])
    mlflow, wandb = tuner.options.callbacks
    assert mlflow.options["tracking_uri"] == "http://its-server" and wandb.options["project"] == "merges"
    search(Timed(), tmp_path, [])
    assert tuner.options.callbacks == []


# -- with Ray


def search(
    pool, folder, rows, *, candidates=12, batch=3, concurrent=2, record=None, known=(), on_progress=None, **options
):
    def store(part, new, results):
        assert len(new) == len(results)
        assert part not in {row["part"] for row in rows}
        rows.extend({**row, "part": part} for row in new)

    common = {"searcher": "random", "seed": 0, "objective": "micro_accuracy"}
    batches = BatchSearcher(
        RandomProposer(dimensions=3, bounds=(0, 1), seed=0, known=known),
        candidates=candidates,
        batch=batch,
        pool=pool,
        concurrent=concurrent,
        describe=lambda point: {**common, "plan_id": f"{point[0]:.6f}"},
        minimise=False,
        record=record or store,
        replayed=list(rows),
        on_progress=on_progress,
    )
    return run_search(batches, name="random", storage_path=str(folder / "tune"), **options)


@pytest.fixture(scope="module")
def pool(ray_session, tmp_path_factory):
    with WorkerPool(Scorer, {"folder": str(tmp_path_factory.mktemp("scorer"))}, count=2, timeout_s=60) as pool:
        pool.timeout_s = 5.0
        yield pool


def test_tune_does_not_warn_of_files_that_nobody_writes(pool, tmp_path, monkeypatch):
    """In a Ray that the user has started, whose loggers speak up."""
    logger, told = logging.getLogger("ray.tune.analysis.experiment_analysis"), []
    monkeypatch.setattr(logger, "handle", told.append)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        search(pool, tmp_path, [], candidates=2)
        assert not told and logger.level == logging.WARNING
    finally:
        logger.setLevel(before)


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_without_room_for_what_tune_alone_writes_at_its_end_is_no_error(pool, tmp_path, monkeypatch):
    """Its state goes from Ray's folder into the cache, whose disk may be full of the run's own states."""
    told, rows = [], []
    monkeypatch.setattr(logging.getLogger("ray.tune.execution.experiment_state"), "handle", told.append)
    monkeypatch.setattr("ray.train._internal.storage._pyarrow_fs_copy_files", no_room)
    search(pool, tmp_path, rows, candidates=2)
    assert not told and len(rows) == 2
    assert not list(tmp_path.glob("tune/*/experiment_state*"))
    with pytest.raises(RunError, match="the record's own"):  # and does not hide why a search ended
        search(pool, tmp_path, [], candidates=2, record=refuses)


def refuses(*_):
    raise RunError("the record's own words")


def test_a_disk_without_room_for_what_tune_writes_first_is_said(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.tune.impl.tuner_internal.TunerInternal.__getstate__", no_room)
    with pytest.raises(NoRoomError, match=f"Tune cannot write .*{tmp_path}/tune .*: .*No space left.* output.cache"):
        search(pool, tmp_path, [], candidates=2)


def test_every_candidate_ends_as_one_row_whatever_befalls_it(pool, tmp_path):
    known = [[marker, 0.5, 0.5] for marker in (RAISES, GIVES_NAN, DIES_ONCE, HANGS_ONCE)]
    rows, progress = [], []
    outcome = search(pool, tmp_path, rows, known=known, on_progress=lambda *seen: progress.append(seen))
    assert sorted(row["iteration"] for row in rows) == list(range(12)) and outcome.finished == 12
    assert all(set(row) - {"part"} == COLUMNS for row in rows)
    failed = {row["alphas"][0]: row["error"] for row in rows if row["status"] == "failed"}
    assert set(failed) == {RAISES, GIVES_NAN}
    assert "bad candidate" in failed[RAISES] and "not finite" in failed[GIVES_NAN]
    assert [done for done, _ in progress] == list(range(1, 13))
    assert progress[-1][1] == max(row["value"] for row in rows if row["status"] == "ok")
    assert 0.0 < outcome.share_not_scoring < 1.0
    assert sum(row["candidates"] for row in outcome.workers) == 12
    assert {row["worker"] for row in outcome.workers} == {"worker-0", "worker-1"}
    for row in outcome.workers:
        assert row["utilisation"] == pytest.approx(row["scoring_seconds"] / row["present_seconds"], abs=1e-3)


@pytest.mark.cluster
def test_a_trial_actor_that_is_killed_is_started_again_without_a_trace(pool, tmp_path, monkeypatch):
    """Nothing is lost by it, and a trial that fails for good has its error in Tune's folder and in table trials."""
    told, rows = [], []
    for name in ("ray.tune.execution.tune_controller", "ray.tune.tune"):
        monkeypatch.setattr(logging.getLogger(name), "handle", told.append)
    search(pool, tmp_path, rows, method="kill_a_trial")
    assert (Path(ray.get(pool._slots[0].handle.call.remote("where"))) / "killed").exists()
    assert sorted(row["iteration"] for row in rows) == list(range(12)) and {row["status"] for row in rows} == {"ok"}
    assert not [record.getMessage() for record in told if record.levelno >= logging.ERROR]


def test_short_trials_run_on_all_workers_and_end_at_once(pool, tmp_path):
    """Tune's trial actors take seconds to start; trials of 10 ms must not all end up on the first."""
    while pool.awaited:  # a worker that an earlier test killed may not be back yet, and would only join at the end
        pool.poll()
        time.sleep(0.1)
    rows, seen = [], []
    search(pool, tmp_path, rows, candidates=20, batch=1, on_progress=lambda *_: seen.append(time.monotonic()))
    assert time.monotonic() - seen[-1] < 5.0, "ten seconds where Tune waits for actors that were started in vain"
    counts = [sum(row["actor"] == f"worker-{slot}" for row in rows) for slot in (0, 1)]
    assert sum(counts) == 20 and min(counts) >= 5


def test_the_first_candidates_are_scored_at_the_same_time(pool, tmp_path):
    """However long they take: trials that wait for each other must not ask workers that are scoring already."""
    search(pool, tmp_path, [], candidates=2, batch=1, method="slow")
    folder, *_ = pool.broadcast("where")
    first, second = map(float, Path(folder, "starts").read_text().split())
    assert abs(first - second) < 1.5


def test_a_search_resumes_from_its_record(pool, tmp_path):
    whole, rows = [], []
    search(pool, tmp_path, whole, batch=1, concurrent=1, candidates=6)
    search(pool, tmp_path, rows, batch=1, concurrent=1, candidates=3)
    before = [dict(row) for row in rows]
    search(pool, tmp_path, rows, batch=1, concurrent=1, candidates=6)
    assert rows[:3] == before
    assert [(row["iteration"], row["alphas"]) for row in rows] == [(row["iteration"], row["alphas"]) for row in whole]
    assert search(pool, tmp_path, rows, candidates=6).finished == 0 and len(rows) == 6
    assert not list((tmp_path / "tune").iterdir()), "Tune's folders, of 20,000 trials 20,000 and 340 MB, are of no use"


def test_what_the_record_raises_ends_the_search(pool, tmp_path):
    def full(part, rows, results):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        search(pool, tmp_path, [], record=full)


def test_a_full_disk_of_a_worker_ends_the_search_and_fails_no_candidate(pool, tmp_path):
    rows = []
    with pytest.raises(NoRoomError, match="No space left.*output.cache"):
        search(pool, tmp_path, rows, known=[[NO_SPACE, 0.5, 0.5]])
    assert all(row["status"] == "ok" for row in rows)


def test_tensorboard_gets_every_trials_averages(pool, tmp_path):
    rows = []
    search(pool, tmp_path, rows, candidates=4, loggers=["tensorboard"])
    assert len(list((tmp_path / "tune").rglob("events.out.tfevents*"))) == len({row["batch"] for row in rows})


@pytest.mark.cluster
def test_a_search_whose_workers_are_used_up_fails_and_stores_no_false_failures(ray_session, tmp_path):
    rows = []
    with WorkerPool(Scorer, {"folder": str(tmp_path)}, count=1, timeout_s=60, max_restarts=1) as pool:
        with pytest.raises(NoRoomError, match="no worker is left"):
            search(pool, tmp_path, rows, concurrent=1, method="die")
    assert rows == []
