"""How numbers are written and drawn on a page."""

import re

import numpy as np
import pytest
from report_runs import (
    as_dicts,
    blocks,
    sensitivity_run,
    similarity_run,
    sweep_run,
)

from raymerge import summary
from raymerge.report import (
    figures,
    searched,
    vega,
    wording,
)
from raymerge.report.build import run_sections
from raymerge.report.content import (
    CONTROL,
    FOUND,
    RANDOM,
    UNMERGED,
    Figure,
    Rows,
    Table,
    role_of,
)
from raymerge.report.reached import Reached


def test_points_at_the_ends_of_an_axis_are_whole(tmp_path, search):
    """Drawings that zoom are cut at their edges: half of each best candidate was, and the control's name above it."""
    for run in (search, sweep_run(tmp_path / "w"), sensitivity_run(tmp_path / "t")):
        for figure in blocks(run_sections(run, heading=None), Figure):
            for layer in (layer for view in figure.views for layer in view.spec["layer"]):
                if not isinstance(layer["mark"], dict) or layer["mark"]["type"] != "point":
                    continue
                for channel in (layer["encoding"][name] for name in "xy"):
                    scale = channel.get("scale", {})
                    free = channel["type"] == "quantitative" and "domain" not in scale
                    assert not free or scale["padding"] >= 6, (figure.title, channel["field"])
    (view,) = blocks([searched.search(Reached(search))], Figure)[0].views
    assert view.spec["layer"][0]["encoding"]["y"]["scale"]["padding"] >= 5 + 11  # a label above the line


def test_ticks_of_accuracies_close_to_each_other_are_told_apart():
    import vl_convert

    rows = [{"plan": name, "accuracy": at, "low": at - 0.007, "high": at + 0.007, "role": "control"}
            for name, at in [("drop", 0.2512), ("base", 0.2455)]]  # fmt: skip
    view = figures.intervals(
        rows, "", name="plan", value="accuracy", axis="accuracy", form=figures.SHARES, tips=[("plan", "plan")]
    )
    drawn = vl_convert.vegalite_to_svg(view.spec | {"width": 600, "datasets": {"rows": rows}})
    ticks = re.findall(r">([\d.]+%)<", drawn)
    assert len(ticks) >= 4 and len(set(ticks)) == len(ticks), ticks


def test_the_numbers_of_64_layers_do_not_run_into_one():
    import vl_convert

    cells = [{"series": "drop", "layer": layer, "weight": 0.0, "kept": 16, "percent": ""} for layer in range(16, 80)]
    view = figures.weight_cells(cells, "")
    drawn = vl_convert.vegalite_to_svg(view.spec | {"width": 650, "datasets": {"rows": cells}})
    numbers = [int(number) for number in re.findall(r"<text[^>]*opacity=\"1\"[^>]*>(\d+)</text>", drawn)]
    assert 10 < len(numbers) < 40, numbers


def test_legends_of_strokes_show_the_whole_pattern():
    """In 8 pixels "aligned, folded" (8 on, 2 off, 2 on, 2 off) was as solid as "plain"."""
    rows = [{"k": k, "value": k, "method": "fixed", "variant": name} for name in ("plain", "folded") for k in (1, 2)]
    axes = {"x": ("k", "layers"), "y": ("value", "accuracy")}
    view = figures.lines(rows, "", **axes, series="method", dash="variant", tips=[])
    legend = view.spec["layer"][0]["encoding"]["strokeDash"]["legend"]
    assert legend["symbolSize"] ** 0.5 >= 2 * max(map(sum, vega.DASHES))


def test_specifications_compile(tmp_path, search):
    """Vega-Lite itself takes every specification, without a warning for a word that it does not know."""
    import vl_convert

    runs = [search, sweep_run(tmp_path / "w"), similarity_run(tmp_path / "s"), sensitivity_run(tmp_path / "t")]
    seen = 0
    for run in runs:
        for figure in blocks(run_sections(run, heading=None), Figure):
            for view in figure.views:
                compiled = vl_convert.vegalite_to_vega(view.spec | {"datasets": {"rows": as_dicts(figure.rows)}})
                names = {signal["name"] for signal in _signals(compiled)}
                assert set(view.zoom.values()) <= names, (figure.title, names)
                seen += 1
    assert seen >= 12


def _signals(vega):
    return vega.get("signals", []) + [s for mark in vega.get("marks", []) for s in _signals(mark)]


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (wording.percent(0.5583), "55.8 %"),
        (wording.percent(None), "–"),
        (wording.percent(float("nan")), "–"),
        (wording.points(-0.0167), "−1.7"),
        (wording.points(0.00004), "0.0"),
        (wording.signed(0.25, 1), "+0.2"),
        (wording.signed(float("-inf"), 3), "−∞"),
        (wording.p_value(0.0002), "< 0.001"),
        (wording.p_value(0.0431), "0.043"),
        (wording.p_value(0.5234), "0.52"),
        (wording.perplexity(5.1514), "5.15"),
        (wording.perplexity(26.306), "26.3"),
        (wording.perplexity(31010.2), "31,010"),
        (wording.perplexity(4997328.0), "5.0e+06"),
        (wording.perplexity(float("inf")), "∞"),
        (wording.perplexity(None), "–"),
        (wording.value(-0.5, 2), "−0.50"),
        (wording.duration(290.1), "4 min 50 s"),
        (wording.duration(4000), "1 h 6 min"),
        (wording.duration(2.04), "2.0 s"),
        (wording.plural(1, "pair"), "1 pair"),
        (wording.plural(1200, "pair"), "1,200 pairs"),
        (wording.value(None), "–"),
        (wording.value(float("nan"), 1), "–"),
        (wording.millions(1777088000), "1.78 billion"),
        (wording.millions(187191296), "187 million"),
        (wording.millions(2345678), "2.35 million"),
        (wording.listed(list("abcdefghij"), 3), "a, b, c and 7 more"),
    ],
)  # fmt: skip
def test_numbers_as_text(made, text):
    assert made == text


def test_a_p_below_the_limit_is_not_rounded_to_it():
    """Beside "better" stood p 0.050, of which the glossary says that it tells nothing apart."""
    assert [wording.p_value(p) for p in (0.0494, 0.0496, 0.05, 0.0504)] == ["0.049", "< 0.05", "0.050", "0.050"]
    assert [summary._p(p) for p in (0.0496, 0.04998, 0.05)] == ["0.0496", "<0.05", "0.05"]


@pytest.mark.parametrize("values", [(3.65, 4.12), (3.65, 3.66), (9, 11), (9, 21), (0.02, 0.03), (8.9, 287), (1, 5000)])
def test_a_logarithmic_axis_has_ticks_where_values_are_near_to_each_other(values):
    inside = [tick for tick in vega.log_ticks(list(values)) if min(values) <= tick <= max(values)]
    assert 2 <= len(inside) <= 12
    assert vega.log_ticks([5.0, 5.0]) == [5.0]


def test_ticks_of_a_logarithmic_axis_are_round_and_neither_few_nor_many():
    assert vega.log_ticks([90.0, 7.0, 2.0]) == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert vega.log_ticks([3.0, 2000.0]) == [1, 10, 100, 1000, 10000]
    assert vega.log_ticks([12.5, 10.5]) == [11, 12]
    assert vega.log_ticks([0.033, 0.019]) == [0.02, 0.025, 0.03]
    assert vega.log_ticks([20.0, 24.0, 30.0]) == [20, 25, 30]
    rng = np.random.default_rng(0)
    for low, factor in zip(10 ** rng.uniform(-6, 6, 300), 10 ** rng.uniform(0.01, 6, 300), strict=True):
        ticks = vega.log_ticks([low * factor, low])
        within = [tick for tick in ticks if low <= tick <= low * factor]
        assert 2 <= len(within) <= 9 and ticks == sorted(ticks), (low, factor)
        steps = {float(f"{tick:.3e}".split("e")[0]) for tick in within}
        assert factor < 10 or steps <= {1.0, 2.0, 5.0}


def test_a_ninth_series_differs_from_the_first_by_its_shape_and_roles_keep_their_looks():
    names = [f"s{i}" for i in range(10)]
    (colours, shapes) = (channel["scale"] for channel in vega.series([{"n": name} for name in names], "n", None))
    assert colours["domain"] == shapes["domain"] == names
    assert colours["range"][8] == colours["range"][0] and len(set(colours["range"])) == 8
    assert len(set(zip(colours["range"], shapes["range"], strict=True))) == 10
    some = [channel["scale"] for channel in vega.series([{"n": "s7"}, {"n": "s3"}], "n", names)]
    assert [scale["domain"] for scale in some] == [["s7", "s3"]] * 2
    assert [scale["range"] for scale in some] == [[every["range"][i] for i in (7, 3)] for every in (colours, shapes)]
    every = [
        channel["scale"] for channel in vega.roles([{"role": role} for role in (UNMERGED, CONTROL, RANDOM, FOUND)])
    ]
    assert [dict(zip(scale["domain"], scale["range"], strict=True)) for scale in every] == [
        dict(
            zip(
                (FOUND, RANDOM, CONTROL, UNMERGED),
                ("var(--accent)", "var(--control)", "var(--control)", "var(--ink)"),
                strict=True,
            )
        ),
        dict(zip((FOUND, RANDOM, CONTROL, UNMERGED), ("circle", "triangle-up", "circle", "diamond"), strict=True)),
    ]
    (colour, shape) = vega.roles([{"role": UNMERGED}, {"role": FOUND}])
    assert colour["scale"] == {"domain": [FOUND, UNMERGED], "range": ["var(--accent)", "var(--ink)"]}
    assert shape["scale"]["range"] == ["circle", "diamond"] and colour["legend"] == {"title": None}
    assert vega.roles([{"role": FOUND}])[0]["legend"] is None
    assert [role_of(kind) for kind in ("found", "random", "drop", "fixed", "file", "base")] == [
        FOUND, RANDOM, CONTROL, CONTROL, CONTROL, UNMERGED,
    ]  # fmt: skip


def test_rows_and_tables_are_what_they_are_made_of():
    """Keys in another order in a later row; options of a table."""
    rows = Rows.of([{"a": 1, "b": 2}, {"b": 4, "a": 3}], (("plans", "p/*.parquet"),))
    assert (rows.columns, rows.values) == (("a", "b"), ((1, 2), (3, 4)))
    table = Table.of("c", ["a", "b"], [["x", "1"]], words=(0, 1), marked=(0,), folded=True)
    assert (table.words, table.marked, table.folded, table.cells) == ((0, 1), (0,), True, (("x", "1"),))


def test_a_number_below_the_pointer_has_its_format_and_a_line_its_place():
    assert vega.tip(("plan", "plan"), ("share", "accuracy", ".1%")) == [
        {"field": "plan", "title": "plan", "type": "nominal"},
        {"field": "share", "title": "accuracy", "type": "quantitative", "format": ".1%"},
    ]
    assert vega.zoom("x", "y")["select"]["encodings"] == ["x", "y"]
    across, words = vega.rule("y", 0.25, "chance")
    assert across["encoding"] == words["encoding"] == {"y": {"datum": 0.25}} and words["mark"]["text"] == "chance"
    assert (words["mark"]["x"], words["mark"]["align"]) == ("width", "right")
    upright, words = vega.rule("x", 0.0, "no difference")
    assert upright["encoding"] == {"x": {"datum": 0.0}} and words["mark"]["align"] == "left"
