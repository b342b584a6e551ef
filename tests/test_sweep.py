"""compression_sweep.py without workers: which points there are, what each is compared with, what is stored."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from test_heuristics import planted

from raymerge.alpha_files import alpha_file_text
from raymerge.architectures import ArchitectureError
from raymerge.checkpoint import Checkpoint
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.evaluation import check_generates
from raymerge.experiments import common, compression_sweep
from raymerge.experiments.common import Inputs
from raymerge.experiments.compression_sweep import Chosen, _points, _starts, _Sweep, sweep
from raymerge.experiments.reporting import Reporter
from raymerge.inputs import RETRIEVAL
from raymerge.plan import PlanError, Refit, block_plan, pairs_plan, tail_plan
from raymerge.plan_files import plan_file_text
from raymerge.plan_section import Similarity
from raymerge.progress import Silent
from raymerge.tables import RunDirectory

CHECKPOINT = Checkpoint("demo")
N_LAYERS = CHECKPOINT.n_layers
LAST = N_LAYERS - 1
SIMILARITY = Similarity(
    planted(N_LAYERS, {(7, 8): 0.9, (3, 4): 0.8, (LAST - 1, LAST): 0.3, (LAST - 2, LAST - 1): 0.2}),
    np.roll(np.arange(N_LAYERS), 5) / 100,  # least of layers 5 and 6
)
PLAIN = ["sweep.alignments=[none]", "sweep.norms=[keep]"]


def points_of(*settings, similarity=None, **chosen):
    config = load_config(None, ["sweep.merges=[1, 2]", *settings])
    inputs = Inputs(questions={}, checkpoint=CHECKPOINT, calibration=("a text", 100))
    return config, inputs, _points(config, inputs, similarity, Chosen(**{"blocks": {}, **chosen}))


def sweeping(folder, *settings, **options):
    config, inputs, points = points_of(*settings, **options)
    return _Sweep(config, inputs, RunDirectory.open(folder, {}, "sweep"), str(folder), points, Silent(), ["test"])


def said(points):
    return [(point.merges, point.method, point.plan.name) for point in points]


def steps_of(point):
    return [(step.into, step.remove, pytest.approx(step.alpha)) for step in point.plan.steps]


# -- points ----------------------------------------------------------------------------------------------------------


def test_ratios_that_differ_have_points_of_their_own():
    """fixed:0.1234561 and fixed:0.1234562 were one method with two points at every number of layers."""
    _, _, points = points_of('sweep.methods=["fixed:0.1234561", "fixed:0.1234562", "fixed:0.50"]', *PLAIN)
    names = [point.method for point in points if point.merges == 1]
    assert names == ["fixed_0.1234561", "fixed_0.1234562", "fixed_0.5"]
    assert len({point.plan.name for point in points}) == len(points)


def test_a_point_that_cannot_be_averaged_is_named(tmp_path):
    config = load_config(None, ["sweep.merges=[1, 2]", 'sweep.methods=[drop, "fixed:0.5"]', *PLAIN])
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    folder = tiny.make_checkpoint(tmp_path / "gemma2", "gemma2", layer_types=kinds)
    inputs = Inputs(questions={}, checkpoint=Checkpoint(str(folder)))
    with pytest.raises(
        PlanError, match=r"^fixed_0.5 with 1 merged: layers .* Take fixed_0.5 out of sweep.methods, or 1"
    ):
        _points(config, inputs, None, Chosen({}))


@pytest.mark.parametrize(
    ("family", "cure"), [("nemotron", "Take fold out of sweep.norms"), ("mixtral", "Take rows out of sweep.alignments")]
)
def test_an_option_that_the_family_does_not_allow_is_what_is_to_be_taken_out(tmp_path, family, cure):
    """Not the method, behind which the next one would be refused."""
    config = load_config(None, ["sweep.merges=[1]", "sweep.alignments=[none,rows]"])
    inputs = Inputs(questions={}, checkpoint=Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family))))
    with pytest.raises(PlanError, match=f"^fixed_0.4 with 1 merged: .*{cure}$"):
        _points(config, inputs, None, Chosen({}))


METHODS = [
    "drop", "before_last", "drop_block", "block_influence", "fixed:0.60", "similarity", "similarity_ratio",
    "most_similar", "merge_block",
]  # fmt: skip


def test_every_method_merges_what_its_name_says():
    named = ", ".join(f"'{method}'" for method in METHODS)
    settings = [*PLAIN, f"sweep.methods=[{named}]", "plan.ratio=0.7", "plan.biases=merge", "plan.similarity_run=x"]
    _, _, points = points_of(*settings, similarity=SIMILARITY, blocks={1: 9, 2: 4})
    assert said(points) == [(0, "base", "base")] + [
        (merges, method.replace(":0.60", "_0.6"), f"{method.replace(':0.60', '_0.6')}_k{merges}")
        for method in METHODS
        for merges in (1, 2)
    ]
    assert points[0].plan.steps == ()
    found = {point.method: steps_of(point) for point in points if point.merges == 2}
    tail = [(LAST - 1, LAST), (LAST - 2, LAST - 1)]
    assert found == {
        "drop": [(*pair, 1.0) for pair in tail],
        "before_last": [(LAST, LAST - 1, 1.0), (LAST, LAST - 2, 1.0)],
        "drop_block": [(4, 5, 1.0), (3, 4, 1.0)],
        "block_influence": [(4, 5, 1.0), (4, 6, 1.0)],
        "fixed_0.6": [(*pair, 0.6) for pair in tail],
        "similarity": [(*tail[0], 0.3), (*tail[1], 0.2)],
        "similarity_ratio": found["similarity_ratio"],
        "most_similar": [(7, 8, 0.7), (3, 4, 0.7)],  # plan.base is fixed, at plan.ratio
        "merge_block": [(4, 5, 0.7), (3, 4, 0.7)],
    }
    assert [step[:2] for step in found["similarity_ratio"]] == tail
    by_method = {point.method: point.plan for point in points}
    selections = {method: by_method[method].selection for method in ("similarity", "most_similar", "merge_block")}
    assert selections == {"similarity": "tail", "most_similar": "most_similar", "merge_block": "block"}
    kinds = {method: by_method[method].kind for method in ("fixed_0.6", "similarity", "merge_block")}
    assert kinds == {"fixed_0.6": "fixed", "similarity": "file", "merge_block": "file"}
    assert {by_method[method].biases for method in ("fixed_0.6", "similarity", "merge_block")} == {"merge"}


@pytest.mark.parametrize("base, alphas", [("similarity", [0.9, 0.8]), ("file", [0.7, 0.7])])
def test_merges_of_similar_layers_and_blocks_have_the_base_coefficients_of_the_plan(base, alphas, tmp_path):
    """But for a file's, which belong to its own merges."""
    settings = [*PLAIN, "sweep.methods=[most_similar]", "plan.ratio=0.7", f"plan.base={base}", "plan.similarity_run=x"]
    settings += [f"plan.alpha_file={tmp_path / 'a.json'}"] if base == "file" else []
    _, _, points = points_of(*settings, similarity=SIMILARITY)
    assert points[-1].plan.alphas == pytest.approx(alphas)


def test_a_sweep_s_similarity_ratio_is_with_the_plan_s_beta():
    _, _, points = points_of(
        *PLAIN, "sweep.methods=[similarity_ratio]", "plan.similarity_run=x", "plan.beta=0", similarity=SIMILARITY
    )
    assert points[-1].plan.alphas == pytest.approx([0.5, 0.5])


def test_a_threshold_is_refused_where_the_number_of_layers_is_given():
    settings = ["plan.selection=most_similar", "plan.threshold=0.8", "plan.similarity_run=x"]
    with pytest.raises(ConfigError, match=r"plan.threshold is 0.8, but a sweep merges as many layers as sweep.merges"):
        points_of(*PLAIN, "sweep.methods=[drop]", *settings, similarity=SIMILARITY)


def test_layers_that_go_one_by_one_are_the_first_ones_of_one_order():
    methods = ["sweep.merges=[1, 3]", "sweep.methods=[drop, drop_block, drop_greedy]", "calibration.text=demo"]
    of = points_of(*PLAIN, *methods, blocks={1: 9, 3: 4}, greedy=[7, 0, 12])[2]
    greedy = [point for point in of if point.method == "drop_greedy"]
    assert [sorted({step.remove for step in point.plan.steps}) for point in greedy] == [[7], [0, 7, 12]]
    assert {point.plan.kind for point in greedy} == {"drop"} and {a for p in greedy for a in p.plan.alphas} == {1.0}


def test_the_survivor_of_a_block_is_the_plan_s():
    _, _, points = points_of(*PLAIN, "sweep.methods=[merge_block]", "plan.survivor=after", blocks={1: 9, 2: 4})
    assert [step[:2] for step in steps_of(points[-1])] == [(5, 4), (6, 5)]


def test_each_file_is_one_point_at_its_own_number_of_merges(tmp_path):
    for name, alphas in (("a", [0.3, 0.8, 0.4]), ("b", [0.1])):
        steps = tail_plan(N_LAYERS, alphas, name="x", kind="file").steps
        (tmp_path / f"{name}.json").write_text(alpha_file_text(steps))
    files = [f"sweep.alpha_files={{base: {tmp_path / 'a.json'}, best: {tmp_path / 'b.json'}}}", "plan.biases=merge"]
    _, _, points = points_of(*PLAIN, "sweep.methods=[file]", *files)
    assert said(points) == [(0, "base", "base"), (3, "file_base", "file_base_k3"), (1, "file_best", "file_best_k1")]
    assert [point.plan.alphas for point in points[1:]] == [[0.3, 0.8, 0.4], [0.1]]
    assert {point.plan.biases for point in points[1:]} == {"merge"}
    _, _, points = points_of("sweep.merges=[2, 3]", "sweep.methods=[file, drop]", *files, "sweep.norms=[keep]")
    assert sorted(point.merges for point in points if point.method == "drop") == [1, 2, 3]
    _, _, points = points_of(
        *PLAIN, "sweep.methods=[drop, file]", *files, "sweep.refits=[none, scale]", "sweep.refitted_methods=[file]"
    )
    refitted = {point.method for point in points if point.plan.refit is not None}
    assert refitted == {"file_base", "file_best"}


def test_a_plan_file_is_one_point_with_its_own_options(tmp_path):
    own = {"norms": "fold", "biases": "merge", "alignment": "rows"}
    plans = [
        block_plan(N_LAYERS, 3, [0.3, 0.8], name="x", kind="found", **own),
        tail_plan(N_LAYERS, [0.5], name="y", kind="found", matrix_alphas=(("mlp.up_proj", (0.1,)),)),
    ]
    for number, plan in enumerate(plans):
        (tmp_path / f"{number}.json").write_text(plan_file_text(plan, "demo", "identity"))
    files = f"sweep.alpha_files={{a: {tmp_path / '0.json'}, b: {tmp_path / '1.json'}}}"
    settings = ["sweep.merges=[1]", "sweep.methods=[file]", "sweep.alignments=[none, neurons]", "plan.norms=fold"]
    _, _, points = points_of(*settings, files)
    assert said(points) == [(0, "base", "base"), (2, "file_a", "file_a_k2"), (1, "file_b", "file_b_k1")]
    assert [point.plan.plan_id("x") for point in points[1:]] == [plan.plan_id("x") for plan in plans]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"alignment": "activations"},
            "a plan with alignment activations, by prompts .*give its alpha file with sweep.align",
        ),
        (
            {"refit": Refit("linear", calibration="x")},
            "a plan with refit linear, by .*give its alpha file with sweep.refits",
        ),
    ],
)
def test_a_plan_file_that_follows_from_other_tokens_is_refused(tmp_path, options, message):
    plan = tail_plan(N_LAYERS, [0.5], name="x", kind="found", **options)
    (tmp_path / "0.json").write_text(plan_file_text(plan, "demo", "identity"))
    with pytest.raises(PlanError, match=message):
        points_of(*PLAIN, "sweep.methods=[file]", f"sweep.alpha_files={{a: {tmp_path / '0.json'}}}")


def test_a_file_of_another_kind_of_layers_is_named_with_the_cure(tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "m", "gemma3")
    steps = tail_plan(tiny.N_LAYERS, [0.5] * (tiny.N_LAYERS - 1), name="x", kind="file").steps
    (tmp_path / "a.json").write_text(alpha_file_text(steps))
    file = f"sweep.alpha_files={{odd: {tmp_path / 'a.json'}}}"
    config = load_config(None, [*PLAIN, "sweep.merges=[1]", "sweep.methods=[file]", file])
    inputs = Inputs(questions={}, checkpoint=Checkpoint(str(folder)))
    with pytest.raises(PlanError, match="file_odd with 4 merged: .*Take odd out of sweep.alpha_files"):
        _points(config, inputs, None, Chosen({}))


def test_methods_that_average_stand_under_every_alignment_and_treatment_of_norms():
    settings = ["sweep.merges=[2]", "sweep.alignments=[none, neurons]", "sweep.norms=[keep, fold]"]
    _, _, points = points_of(*settings, "sweep.methods=[drop, 'fixed:0.5']")
    assert [(point.plan.name, point.plan.alignment, point.plan.norms) for point in points[1:]] == [
        ("drop_k2", "none", "keep"),
        ("fixed_0.5_k2", "none", "keep"),
        ("fixed_0.5_fold_k2", "none", "fold"),
        ("fixed_0.5_neurons_k2", "neurons", "keep"),
        ("fixed_0.5_neurons_fold_k2", "neurons", "fold"),
    ]


def test_a_point_that_is_asked_for_several_times_is_one():
    settings = ["sweep.merges=[2, 1, 2]", "sweep.refits=[none, none]", *PLAIN]
    _, _, points = points_of(*settings, "sweep.methods=[drop, 'fixed:0.5', 'fixed:0.50']")
    assert [point.plan.name for point in points] == ["base", "drop_k2", "drop_k1", "fixed_0.5_k2", "fixed_0.5_k1"]


HOW = ["", "_linear", "_outputs"]
REFITS = [*PLAIN, "sweep.refits=[none, linear, outputs]", "plan.refit_layers=2", "plan.ridge=0.5"]


def test_points_stand_under_every_refit_but_for_methods_that_are_not_to_be_refitted():
    methods = ["sweep.methods=[drop, 'fixed:0.50', drop_block]", "sweep.merges=[2]"]
    _, inputs, points = points_of(*REFITS, *methods, blocks={2: 4})
    expected = ["base", *(f"{name}_k2{how}" for name in ("drop", "fixed_0.5", "drop_block") for how in HOW)]
    assert [point.plan.name for point in points] == expected
    refits = [point.plan.refit for point in points[1:4]]
    assert refits[0] is None and [(refit.method, refit.ridge, refit.layers) for refit in refits[1:]] == [
        ("linear", 0.5, 0),
        ("outputs", 0.5, 2),
    ]
    few = ["sweep.refitted_methods=['fixed:0.50', drop_block]"]
    _, _, points = points_of(*REFITS, *methods, *few, blocks={2: 4})
    assert [point.plan.name for point in points] == ["base", "drop_k2", *expected[4:]]


def test_first_layers_of_blocks_are_asked_for_where_a_method_has_blocks():
    config = load_config(
        None, ["sweep.merges=[3, 1, 3]", "sweep.methods=[drop, merge_block]", "plan.starts=[2, 18, 20]"]
    )
    inputs = Inputs(questions={}, checkpoint=CHECKPOINT)
    assert _starts(config, inputs) == {3: [2, 18], 1: [2, 18, 20]}
    assert _starts(load_config(None, ["sweep.methods=[drop]", "plan.block=search"]), inputs) == {}
    model = {"n_layers": 4, "windows": [40, None, 40, 40], "rotary_types": ["a"] * 4}
    kinds = SimpleNamespace(checkpoint=SimpleNamespace(**model, deepstack_layers=0))
    for method, ratio, firsts in (
        ("merge_block", 0.5, [3]),
        ("drop_block", 0.5, [1, 2, 3]),
        ("merge_block", 1, [1, 2, 3]),
    ):
        settings = [f"sweep.methods=[{method}]", "sweep.merges=[1]", f"plan.ratio={ratio}"]
        assert _starts(load_config(None, settings), kinds) == {1: firsts}
    # Layers to which features of images are added are not dropped either.
    kinds = SimpleNamespace(checkpoint=SimpleNamespace(**model, deepstack_layers=2))
    assert _starts(load_config(None, ["sweep.methods=[drop_block]", "sweep.merges=[1]"]), kinds) == {1: [2, 3]}
    with pytest.raises(ConfigError, match="a sweep searches nothing"):
        _starts(load_config(None, ["sweep.methods=[drop_block]", "plan.block=search"]), inputs)


# -- what is run, compared, stored -----------------------------------------------------------------------------------


def test_each_weights_are_run_once_and_states_are_kept_where_a_plan_starts(tmp_path):
    named = "[drop, 'fixed:1.0', before_last, drop_block, most_similar]"
    options = {"similarity": SIMILARITY, "blocks": {1: 9, 2: 4}}
    of = sweeping(tmp_path, *PLAIN, f"sweep.methods={named}", "plan.similarity_run=x", **options)
    # A constant of 1 drops the last layers.
    assert len(of.points) == 11 and len(of.plans) == 9
    ids = [row["plan_id"] for row in map(of._row, of.points)]
    assert ids[1] == ids[3] and len(set(ids)) == 9
    # Of tails the last layer that is left, of dropped blocks the layer after them; what else there is goes from these.
    assert of.firsts == [4, 9, LAST - 2, LAST - 1]


def test_a_point_is_compared_with_dropping_as_many_layers_its_plain_self_and_the_linear_replacement(tmp_path):
    settings = [*REFITS[2:], "sweep.alignments=[none, neurons]", "sweep.norms=[keep]", "sweep.merges=[2]"]
    settings += ["sweep.methods=[drop, drop_block, merge_block]", "sweep.refitted_methods=[drop_block, merge_block]"]
    pairs = [(a.name, b.name) for a, b in sweeping(tmp_path, *settings, blocks={2: 4})._compared()]
    base = ("drop_k2", "drop_block_k2", "drop_block_k2_linear", "merge_block_k2")
    drop, block, linear, merged = base
    assert set(pairs) == {
        (block, drop), (linear, drop), (linear, block),
        ("drop_block_k2_outputs", drop), ("drop_block_k2_outputs", block), ("drop_block_k2_outputs", linear),
        (merged, drop), (merged, block),
        *((f"merge_block_k2_{how}", other) for how in ("linear", "outputs") for other in (drop, merged, block, linear)),
        ("merge_block_neurons_k2", drop), ("merge_block_neurons_k2", merged), ("merge_block_neurons_k2", block),
        *((f"merge_block_neurons_k2_{how}", other) for how in ("linear", "outputs")
          for other in (drop, merged, block, linear)),
    }  # fmt: skip
    assert len(pairs) == len(set(pairs))


def test_points_of_different_sizes_are_not_compared(tmp_path):
    of = sweeping(tmp_path, *PLAIN, "sweep.methods=[drop, before_last]")
    assert [(a.name, b.name) for a, b in of._compared()] == [(f"before_last_k{k}", f"drop_k{k}") for k in (1, 2)]
    assert [(row["merges"], row["method"], row["alignment"], row["norms"], row["refit"])
            for row in map(of._row, of.points)] == [
        (0, "base", "none", "keep", "none"),
        *((k, method, "none", "keep", "none") for method in ("drop", "before_last") for k in (1, 2)),
    ]  # fmt: skip


class Asked:
    """A pool whose workers answer by the given function; `items` holds all that was asked, call by call."""

    def __init__(self, answer):
        self.answer, self.items = answer, []

    def map(self, method, items, on_result=lambda *_: None):
        self.items.append((method, list(items)))
        found = [self.answer(item) for item in items]
        for number, result in reversed(list(enumerate(found))):
            on_result(number, result)
        return found


def test_retrieval_is_stored_by_distance_and_plan_and_not_measured_again(tmp_path):
    of = sweeping(tmp_path, *PLAIN, "sweep.methods=[drop]", "sweep.merges=[1]")
    base, drop = of.plans
    distances = np.array([32, 16, 32, 64, 32])
    right = {base: np.array([1, 1, 1, 0, 0], bool), drop: np.array([0, 0, 1, 1, 0], bool)}
    pool = Asked(lambda plan: (distances, right[plan]))
    # Losses by position are in the same table.
    row = {"plan_id": base.plan_id(of.identity), "measure": "nll", "bucket": 0, "n": 3, "value": 1.0}
    of.run.append("context", [row], part="text")
    of._retrieve(pool)
    rows = [row for row in of.run.read("context").to_pylist() if row["measure"] == "retrieval"]
    error = np.sqrt(2 / 9 / 2)  # of a third and of two thirds of three
    found = {(row["plan_id"], row["bucket"]): (row["n"], row["value"], row["standard_error"]) for row in rows}
    third = (3, pytest.approx(1 / 3), pytest.approx(error))
    ids = [plan.plan_id(of.identity) for plan in (base, drop)]
    assert len(rows) == 6 and found == {
        (ids[0], 16): (1, 1.0, None), (ids[0], 32): (3, pytest.approx(2 / 3), third[2]), (ids[0], 64): (1, 0.0, None),
        (ids[1], 16): (1, 0.0, None), (ids[1], 32): third, (ids[1], 64): (1, 1.0, None),
    }  # fmt: skip
    of._retrieve(pool)
    assert pool.items == [("retrieval", [base, drop]), ("retrieval", [])]


def test_each_number_of_layers_is_timed_once_and_alone(tmp_path):
    of = sweeping(tmp_path, *PLAIN, "sweep.methods=[drop, before_last]")
    pool = Asked(float)
    assert of._time_generation(pool) == {n: float(n) for n in (N_LAYERS - 2, N_LAYERS - 1, N_LAYERS)}
    assert pool.items == [("generation_speed", [n]) for n in (N_LAYERS - 2, N_LAYERS - 1, N_LAYERS)]
    silent = sweeping(tmp_path / "silent", *PLAIN, "sweep.speed_tokens=0")
    assert silent._time_generation(Asked(None)) == {}


# -- a whole sweep over stand-ins ------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch):
    """Workers that answer anything, blocks that are chosen, and a report of nothing: what was done is in the list, in
    its order."""
    done = []

    def named(plans):
        return [plan.name for plan in plans]

    def choose_blocks(config, checkpoint, merges, *_, **__):
        done.append(("blocks", checkpoint.n_layers, merges))
        return {1: 9, 2: 4}

    def open_pool(*_, firsts, **__):
        done.append(("pool", firsts))
        return nullcontext(
            Asked(lambda asked: (np.array([8]), np.array([True])) if not isinstance(asked, int) else 5.0)
        )

    of = compression_sweep
    monkeypatch.setattr(of, "runtime", lambda *_: nullcontext())
    monkeypatch.setattr(of, "choose_blocks", choose_blocks)
    monkeypatch.setattr(of, "open_pool", open_pool)
    monkeypatch.setattr(of, "describe_workers", lambda *_: ["its worker"])
    monkeypatch.setattr(of, "compute_trunk", lambda *args: done.append(("trunk", args[3])) or {"text": 1})
    monkeypatch.setattr(of, "align", lambda _, plans, __: done.append(("align", named(plans))))
    monkeypatch.setattr(of, "align_rows", lambda _, plans, __: done.append(("rows", named(plans))))
    monkeypatch.setattr(of, "fit", lambda _, plans, *__: done.append(("fit", named(plans))))
    monkeypatch.setattr(common, "draw_figures", lambda *_: pytest.fail("none were asked for"))

    class Reporting(Reporter):
        def report(self, pool, plans, shards, firsts, progress):
            done.append(("report", named(plans), shards, firsts))

        def derive(self, plans, compared):
            done.append(("derive", named(plans), [(a.name, b.name) for a, b in compared]))

        def store_costs(self, plans, speeds):
            done.append(("costs", named(plans), speeds))

    monkeypatch.setattr(of, "Reporter", Reporting)
    return done


FEW = [
    *PLAIN,
    "sweep.merges=[1]",
    "data.subjects=number_words",
    "data.report_limit_per_subject=2",
    "data.perplexity_tokens=300",
    "output.figures=false",
]


def test_layers_go_one_by_one_up_to_the_largest_number_and_are_compared_with_a_block(stand_ins, tmp_path, monkeypatch):
    asked = []

    def choose(config, n_layers, most, run, *_):
        asked.append((n_layers, most))
        return [3, 8, 5]

    monkeypatch.setattr(compression_sweep, "choose_one_by_one", choose)
    monkeypatch.setattr(compression_sweep, "choose_blocks", lambda *_, **__: {2: 8, 3: 4})
    more = ["sweep.methods=[drop_greedy, drop_block, drop]", "sweep.merges=[3, 2]", "calibration.text=demo"]
    tokens = ["calibration.tokens=100", "sweep.context=false"]
    run = sweep(load_config(None, [*FEW, *more, *tokens, f"output.run={tmp_path / 'run'}"]))
    assert asked == [(N_LAYERS, 3)]
    (pairs,) = (entry[2] for entry in stand_ins if entry[0] == "derive")
    assert {("drop_greedy_k2", "drop_k2"), ("drop_greedy_k3", "drop_block_k3")} <= set(pairs)
    layers = {row["plan_id"]: row["merges"] for row in run.read("sweep").to_pylist() if row["method"] == "drop_greedy"}
    assert sorted(layers.values()) == [2, 3]


def test_a_sweep_runs_each_plan_and_compares_its_points_in_this_order(stand_ins, tmp_path):
    asked = load_config(None, [*FEW, "sweep.methods=[drop, 'fixed:1']", f"output.run={tmp_path / 'run'}"])
    run = sweep(asked, command=["test"])
    assert run.complete and run.manifest()["workers"] == ["its worker"]
    # A constant of 1 is dropping: one plan, two points. It has the later name, as table `plans` the first.
    plans = ["base", "fixed_1_k1"]
    points = ["base", "drop_k1", "fixed_1_k1"]
    assert stand_ins == [
        ("pool", [LAST - 1]),
        ("trunk", (RETRIEVAL,)),
        ("align", plans),
        ("rows", plans),
        ("fit", plans),
        ("report", plans, {"text": 1}, [LAST - 1]),
        ("derive", points, [("fixed_1_k1", "drop_k1")]),
        ("costs", points, {LAST: 5.0, N_LAYERS: 5.0}),
    ]
    assert [(row["merges"], row["method"]) for row in run.read("sweep").to_pylist()] == [
        (0, "base"), (1, "drop"), (1, "fixed_1"),
    ]  # fmt: skip
    assert len(run.read("context")) == 2
    stand_ins.clear()
    assert sweep(asked).complete and stand_ins == []


def test_blocks_are_chosen_before_their_points_are_made(stand_ins, tmp_path):
    more = ["sweep.methods=[drop_block]", "calibration.text=demo", "calibration.tokens=50", "sweep.merges=[2, 1]"]
    run = sweep(load_config(None, [*FEW, *more, "sweep.context=false", f"output.run={tmp_path / 'run'}"]))
    assert stand_ins[:3] == [("blocks", N_LAYERS, [2, 1]), ("pool", [4, 9]), ("trunk", ())]
    assert not run.has("context") and len(run.read("sweep")) == 3
    held = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert "calibration" in str(held), "the run goes on with the same one alone"


def test_a_family_that_transformers_does_not_generate_by_is_refused_before_anything_is_measured(
    stand_ins, tmp_path, monkeypatch
):
    """Granite 4's speed was measured last, and before transformers 5.15 the sweep ended there with a trace."""
    monkeypatch.setattr("raymerge.evaluation.version", {"transformers": "5.14.0"}.get)
    path = tiny.make_checkpoint(tmp_path / "model", "granite4")
    asked = [*FEW, "sweep.methods=[drop]", "sweep.context=false", f"model.path={path}"]
    asked.append(f"output.run={tmp_path / 'run'}")
    with pytest.raises(ArchitectureError, match=r"transformers 5.14.0 generates nothing by granite.*5.15 or later, or"):
        sweep(load_config(None, asked))
    assert not (tmp_path / "run").exists()
    assert sweep(load_config(None, [*asked, "sweep.speed_tokens=0"])).complete
    monkeypatch.setattr("raymerge.evaluation.version", {"transformers": "5.15.0.dev0"}.get)
    check_generates(Checkpoint(str(path)))


def test_a_block_by_similarity_is_refused_where_there_is_no_similarity_run(tmp_path, monkeypatch):
    """plan.selection, by which the plan section refuses it, plays no part in a sweep."""
    monkeypatch.setattr(compression_sweep, "runtime", lambda *_: nullcontext())
    more = ["sweep.methods=[drop_block]", "plan.block=similarity", f"output.run={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="plan.block is similarity, which needs plan.similarity_run"):
        sweep(load_config(None, [*FEW, *more]))
    assert not (tmp_path / "run").exists()


def test_merges_of_similar_layers_are_those_collected_anew_where_they_are(stand_ins, tmp_path, monkeypatch):
    """One after another up to the largest K, whatever plan.merges is."""
    asked, plans = [], []
    anew = pairs_plan(N_LAYERS, [(3, 4), (3, 5), (17, 18)], [0.9, 0.8, 0.7], name="x", kind="fixed",
                      selection="most_similar", norms="fold", biases="merge")  # fmt: skip

    def recomputed(config, n_layers, cache, progress):
        asked.append((config.plan.merges, n_layers))
        return anew

    of = compression_sweep
    monkeypatch.setattr(of, "recomputed_plan", recomputed)
    monkeypatch.setattr(of, "similarity_of", lambda *_: SIMILARITY)
    monkeypatch.setattr(of, "_warnings", lambda *_: [])
    monkeypatch.setattr(of, "align", lambda _, found, __: plans.append({plan.name: plan for plan in found}))
    of_run = RunDirectory.open(tmp_path / "layers", {}, "similarity").path_of()
    more = [f"plan.similarity_run={of_run}", "plan.selection=most_similar", "plan.biases=merge",
            "sweep.methods=[drop, most_similar]", "sweep.merges=[2, 3, 1]", "sweep.context=false"]  # fmt: skip
    for recompute in ("true", "false"):
        sweep(load_config(None, [*FEW, *more, f"plan.recompute={recompute}", f"output.run={tmp_path / recompute}"]))
    assert asked == [(3, N_LAYERS)]
    again, once = plans
    for merges in (1, 2, 3):
        plan = again[f"most_similar_k{merges}"]
        assert plan.steps == anew.steps[:merges] and (plan.norms, plan.biases, plan.kind) == ("keep", "merge", "file")
    assert steps_of(SimpleNamespace(plan=once["most_similar_k1"])) == [(7, 8, pytest.approx(0.6225))]
