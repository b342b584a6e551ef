"""The page's drawings. Each reads the data set "rows", whose columns the caller made.

Names from tables stand in data alone, never in an expression.
"""

from __future__ import annotations

from raymerge.report import vega
from raymerge.report.content import View
from raymerge.report.wording import NONE
from raymerge.schemas import Row

#: An axis of shares in per cent, with the digits that its ticks need: 14,042 questions lie within two points.
SHARES = "~%"


def intervals(
    rows: list[Row],
    description: str,
    *,
    name: str,
    value: str,
    axis: str,
    form: str | None = None,
    tips: list[vega.Tip],
    title: str = "",
    rule: tuple[float, str] | None = None,
    tick: str | None = None,
) -> View:
    """Named values with their intervals (columns low and high), one below the other in the order of the rows, coloured
    by role.

    form: of the axis's numbers; without one they have the decimals that tell its ticks apart. rule: a value to be held
    against, with its label. tick: a column with a limit of each value, drawn as a tick.
    """
    shown = {"format": form} if form else {}
    order = list(dict.fromkeys(row[name] for row in rows))
    y = vega.field(name, None, "nominal", sort=order, axis=vega.axis(None, grid=True))
    x = vega.field(value, axis, scale=vega.room(8), axis=vega.axis(axis, **shown, tickCount=6))
    colour, shape = vega.roles(rows)
    layers: list[vega.Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}, "color": colour},
            "params": [vega.zoom("x")],
        },
        {
            "mark": {"type": "point", "opacity": 1, "size": 90},
            "encoding": {"y": y, "x": x, "color": colour, "shape": shape, "tooltip": vega.tip(*tips)},
        },
    ]
    if tick:
        layers.append(
            {
                "mark": {"type": "tick", "thickness": 2, "size": 16, "color": "var(--ink)", "aria": False},
                "encoding": {"y": y, "x": x | {"field": tick}},
            }
        )
    if rule is not None:
        layers += vega.rule("x", *rule)
    return View(vega.drawing(layers, height=26 * len(order)), description, title, {"x": "zoom_low"})


def named_values(
    rows: list[Row],
    description: str,
    *,
    name: str,
    value: str,
    axis: str,
    tips: list[vega.Tip],
    title: str = "",
    legend: bool = False,
) -> View:
    """Named positive values with their intervals (columns VALUE_low and VALUE_high, which may be null) on a logarithmic
    axis, in the order of the rows, coloured by role; without a legend where one stands in a drawing beside it."""
    order = list(dict.fromkeys(row[name] for row in rows))
    colour, shape = (channel if legend else channel | {"legend": None} for channel in vega.roles(rows))
    low, high = f"{value}_low", f"{value}_high"
    ticks = vega.log_ticks([row[column] for row in rows for column in (value, low, high) if row[column]])
    y = vega.field(name, None, "nominal", sort=order, axis=vega.axis(None, grid=True))
    scale = {"type": "log", "nice": False, "padding": 14}
    x = vega.field(value, axis, scale=scale, axis=vega.axis(axis, format="~s", values=ticks))
    layers: list[vega.Spec] = [
        {
            "transform": [{"filter": f"isValid(datum['{low}']) && isValid(datum['{high}'])"}],
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"y": y, "x": x | {"field": low}, "x2": {"field": high}, "color": colour},
        },
        {
            "mark": {"type": "point", "opacity": 1, "size": 90},
            "encoding": {"y": y, "x": x, "color": colour, "shape": shape, "tooltip": vega.tip(*tips)},
            "params": [vega.zoom("x")],
        },
    ]
    return View(vega.drawing(layers, height=26 * len(order)), description, title, {"x": f"zoom_{value}"})


def alpha_lines(rows: list[Row], description: str) -> View:
    """Alpha by merge step, a line a plan (and a matrix where a plan has some of their own); columns: plan, matrix,
    series, step, merge, alpha, role, label (beside the line's end)."""
    colour, shape = vega.roles(rows)
    steps = sorted({row["step"] for row in rows})
    axis = vega.axis("merge step", values=steps[:60], format="d", grid=False)
    x = vega.field("step", "merge step", scale={"nice": False, "padding": 14}, axis=axis)
    axis = vega.axis("alpha: weight of the kept layer", values=[0, 0.2, 0.4, 0.6, 0.8, 1])
    y = vega.field("alpha", "alpha", scale={"domain": [-0.04, 1.1], "nice": False}, axis=axis)
    strong = {"condition": {"param": "over", "empty": False, "value": 3}, "value": 1.5}
    solid = {"condition": {"test": "datum.matrix != ''", "value": 0.35}, "value": 0.9}
    tips = [("plan", "plan"), ("matrix", "matrix"), ("merge", "layers"), ("alpha", "alpha", ".3f")]
    layers = [
        {
            "mark": {"type": "line", "aria": False},
            "encoding": {
                "x": x,
                "y": y,
                "detail": {"field": "series", "type": "nominal"},
                "color": colour,
                "strokeWidth": strong,
                "opacity": solid,
            },
            "params": [vega.zoom("x", "y")],
        },
        {
            "mark": {"type": "point", "size": 55},
            "encoding": {
                "x": x,
                "y": y,
                "color": colour,
                "shape": shape,
                "opacity": solid,
                "tooltip": vega.tip(*tips),
            },
            "params": [
                {
                    "name": "over",
                    "select": {"type": "point", "fields": ["series"], "on": "pointerover", "nearest": True},
                }
            ],
        },
    ]
    layers.append(
        {
            "transform": [{"filter": "datum.label !== ''"}],
            **vega.label("label", dy=-9),
            "encoding": {"x": x, "y": y, "text": {"field": "label", "type": "nominal"}},
        }
    )
    return View(vega.drawing(layers, height=280), description, zoom={"x": "zoom_step", "y": "zoom_alpha"})


def weight_row(series: str, layer: int, weight: float, kept: int | None, plan_id: str) -> Row:
    """A row of `weight_cells`: an original layer's weight, and the layer that it is in, if any."""
    return {
        "series": series,
        "layer": layer,
        "weight": weight,
        "kept": NONE if kept is None else str(kept),
        "percent": f"{100 * weight:.0f}" if weight >= 0.005 else "",
        "plan_id": plan_id,
    }


def weight_cells(rows: list[Row], description: str) -> View:
    """A cell for each plan and original layer, by rows of `weight_row`."""
    order = list(dict.fromkeys(row["series"] for row in rows))
    layers_there = sorted({row["layer"] for row in rows})
    # the config's labelOverlap is not taken for ordinal axes: the numbers of 64 layers ran into one
    axis = vega.axis("original layer", labelAngle=0, labelOverlap="greedy", labelSeparation=4)
    x = vega.field("layer", "original layer", "ordinal", axis=axis)
    y = vega.field("series", None, "nominal", sort=order, axis=vega.axis(None))
    tips = [("series", "plan"), ("layer", "original layer"), ("kept", "merged into layer"), ("weight", "weight", ".1%")]
    room = {"expr": f"width / {len(layers_there)} > 30 ? 1 : 0"}
    # whichever has the contrast that small text needs (4.5) on viridis
    dark = {"condition": {"test": "datum.weight > 0.44", "value": "#000"}, "value": "#fff"}
    fill = vega.field("weight", "share of the merged weights", scale={"scheme": "viridis", "domain": [0, 1]})
    fill["legend"] = {"title": "share of the merged weights", "format": ".0%", "values": [0, 0.5, 1]}
    cells = [
        {
            "mark": {"type": "rect", "aria": False, "stroke": "var(--paper)", "strokeWidth": 1},
            "encoding": {"x": x, "y": y, "color": fill, "tooltip": vega.tip(*tips)},
        },
        {
            "mark": {"type": "text", "fontSize": 10, "opacity": room, "aria": False},
            "encoding": {"x": x, "y": y, "text": {"field": "percent", "type": "nominal"}, "color": dark},
        },
    ]
    return View(vega.drawing(cells, height=24 * len(order)), description)


def progress(rows: list[Row], description: str, *, objective: str, limits: tuple[float, float] | None = None) -> View:
    """Value by candidate with the best so far; columns: kind ("candidate" or "control"), searcher, number, value,
    best, label. limits: of the axis as it opens, where values far from the others would leave these no room."""
    searchers = list(dict.fromkeys(row["searcher"] for row in rows if row["kind"] == "candidate"))
    methods = [name for name in searchers if name != "random"]
    own = {name: vega.SERIES[i % len(vega.SERIES)] for i, name in enumerate(methods)}
    colours = [own.get(name, "var(--control)") for name in searchers]
    colour = vega.category("searcher", searchers, colours, {"title": None})
    axis = vega.axis("candidate", tickMinStep=1)
    x = vega.field("number", "candidate", scale={"nice": False, "padding": 10}, axis=axis)
    room = vega.room(16) | ({"domain": list(limits)} if limits else {})
    y = vega.field("value", objective, scale=room, axis=vega.axis(objective))
    candidate = {"filter": {"field": "kind", "equal": "candidate"}}
    control = {"filter": {"field": "kind", "equal": "control"}}
    tips = [
        ("searcher", "searcher"),
        ("number", "candidate"),
        ("value", objective, ".4f"),
        ("best", "best so far", ".4f"),
    ]
    layers = [
        {
            "transform": [candidate],
            "mark": {"type": "point", "opacity": 0.75, "size": 45},
            "encoding": {"x": x, "y": y, "color": colour, "tooltip": vega.tip(*tips)},
            "params": [vega.zoom("x", "y")],
        },
        {
            "transform": [candidate],
            "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2, "aria": False},
            "encoding": {"x": x, "y": y | {"field": "best"}, "color": colour},
        },
        {
            "transform": [control],
            "mark": {"type": "rule", "strokeDash": [4, 3], "aria": False},
            "encoding": {"y": y, "tooltip": vega.tip(("label", "controls"), ("value", objective, ".4f"))},
        },
        {
            "transform": [control],
            **vega.label("label", dy=-8, x="width"),
            "encoding": {"y": y, "text": {"field": "label", "type": "nominal"}},
        },
    ]
    return View(vega.drawing(layers, height=300), description, zoom={"x": "zoom_number", "y": "zoom_value"})


def descents(rows: list[Row], description: str, *, of_what: str) -> View:
    """Loss (`of_what`) by epoch, a line a start; columns: searcher, start, series, epoch, loss, of."""
    searchers = list(dict.fromkeys(row["searcher"] for row in rows))
    colours = ["var(--accent)", *vega.SERIES[1:]][: max(1, len(searchers))]
    colour = vega.category("searcher", searchers, colours, {"title": None})
    dash = vega.field("of", None, "nominal", scale={"range": [[1, 0], [4, 3]]}, legend=vega.dash_legend())
    x = vega.field("epoch", "epoch", scale=vega.room(6), axis=vega.axis("epoch", tickMinStep=1))
    y = vega.field("loss", f"loss ({of_what})", scale=vega.room(6), axis=vega.axis(f"loss ({of_what})"))
    tips = [("searcher", "descent"), ("start", "start"), ("epoch", "epoch"), ("of", "loss on"), ("loss", "loss", ".4f")]
    layers = [
        {
            "mark": {"type": "line", "strokeWidth": 1.75, "aria": False},
            "encoding": {"x": x, "y": y, "color": colour, "strokeDash": dash, "detail": {"field": "series"}},
            "params": [vega.zoom("x", "y")],
        },
        {
            "mark": {"type": "point", "size": 60, "opacity": 0, "aria": False},
            "encoding": {"x": x, "y": y, "tooltip": vega.tip(*tips)},
        },
    ]
    return View(vega.drawing(layers, height=280), description, zoom={"x": "zoom_epoch", "y": "zoom_loss"})


def subject_differences(rows: list[Row], description: str, *, against: list[str]) -> View:
    """Differences by subject with their intervals, sorted; one control at a time is chosen from a list. Columns:
    subject, against, difference, low, high, clear ("yes" where the interval leaves out 0), n."""
    subjects = len({row["subject"] for row in rows})
    y = vega.field(
        "subject", None, "nominal", sort={"field": "difference", "order": "descending"}, axis=vega.axis(None, grid=True)
    )
    title = "difference in accuracy (percentage points)"
    x = vega.field("difference", title, scale=vega.room(8), axis=vega.axis(title, tickCount=6))
    legend = {"title": "interval excludes 0"}
    colour = vega.category("clear", ["yes", "no"], ["var(--accent)", "var(--control)"], legend)
    tips = [
        ("subject", "subject"),
        ("against", "against"),
        ("difference", "difference", "+.1f"),
        ("low", "from", "+.1f"),
        ("high", "to", "+.1f"),
        ("n", "questions", "d"),
    ]
    chosen = {
        "name": "against",
        "value": against[0],
        "bind": {"input": "select", "options": against, "name": "against "},
    }
    layers = [
        {
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}, "color": colour},
            "params": [vega.zoom("x")],
        },
        {
            "mark": {"type": "point", "opacity": 1},
            "encoding": {"y": y, "x": x, "color": colour, "tooltip": vega.tip(*tips)},
        },
        {"mark": {"type": "rule", "color": "var(--ink)", "aria": False}, "encoding": {"x": {"datum": 0}}},
    ]
    top = {"params": [chosen], "transform": [{"filter": "datum.against === against"}]}
    height = (22 if subjects <= 30 else 18) * subjects
    return View(vega.drawing(layers, height=height, **top), description, zoom={"x": "zoom_low"})


def heat_map(
    description: str,
    *,
    subset: str,
    domain: tuple[float, float],
    layers: int,
    title: str,
    height: int,
    legend: bool,
) -> View:
    """Similarity of every pair of layers of one subset; columns: subset, layer_i, layer_j and their edges (left, right,
    bottom, top), value, null_p95, ci_low, ci_high, above ("no" where the value is noise), note."""
    where = [{"filter": {"field": "subset", "equal": subset}}]
    axis = vega.axis("layer", grid=False, tickMinStep=1, format="d", tickCount=6)
    scale = {"domain": [-0.5, layers - 0.5], "nice": False, "zero": False}
    x = vega.field("left", "layer", scale=scale, axis=axis)
    y = vega.field("bottom", "layer", scale=scale | {"reverse": True}, axis=axis)
    fill = vega.field("value", "similarity", scale={"scheme": "viridis", "domain": list(domain), "clamp": True})
    fill["legend"] = {"title": "similarity", "tickCount": 4} if legend else None
    tips = [
        ("layer_i", "layer"),
        ("layer_j", "and layer"),
        ("value", "similarity", ".3f"),
        ("ci_low", "95 % from", ".3f"),
        ("ci_high", "to", ".3f"),
        ("null_p95", "95th percentile of unrelated layers", ".3f"),
        ("note", "note"),
    ]
    box = {"x": x, "x2": {"field": "right"}, "y": y, "y2": {"field": "top"}}
    centre = {"x": x | {"field": "layer_j"}, "y": y | {"field": "layer_i"}}
    dots = where + [{"filter": {"field": "above", "equal": "no"}}]
    cells: list[vega.Spec] = [
        {
            "transform": where,
            "mark": {"type": "rect", "fill": "var(--line)", "aria": False, "clip": True},
            "encoding": box,
            "params": [vega.zoom("x", "y")],
        },
        {
            "transform": where + [{"filter": "isValid(datum.value)"}],
            "mark": {"type": "rect", "aria": False, "clip": True},
            "encoding": box | {"color": fill, "tooltip": vega.tip(*tips)},
        },
        {
            "transform": dots,
            "mark": {"type": "point", "shape": "circle", "size": 5, "opacity": 0.9, "fill": "#fff", "stroke": None,
                     "aria": False, "clip": True, "tooltip": False},
            "encoding": centre,
        },
    ]  # fmt: skip
    spec = vega.drawing(cells, height=height)
    return View(spec, description, title, {"x": "zoom_left", "y": "zoom_bottom"})


def lines(
    rows: list[Row],
    description: str,
    *,
    x: tuple[str, str],
    y: tuple[str, str],
    series: str,
    tips: list[vega.Tip],
    dash: str | None = None,
    form: str | None = None,
    log: bool = False,
    interval: tuple[str, str] | None = None,
    rule: tuple[float, str] | None = None,
    most: float | None = None,
    title: str = "",
    order: list[str] | None = None,
    height: int = 300,
) -> View:
    """Lines by series (colour and shape) and, where there are several, by `dash`; a click on the legend picks one.

    x, y: (column, title). interval: columns of the interval, drawn as thin bars. rule: a value of y to be held against.
    most: rows of a greater y, or of none, are left out. order: all series in the order of their colours, where another
    drawing has more of them.
    """
    colour, shape = vega.series(rows, series, order)
    horizontal = vega.field(
        *x, scale={"zero": False, "padding": 12, "nice": False}, axis=vega.axis(x[1], tickMinStep=1, grid=False)
    )
    there = sorted({row[x[0]] for row in rows})
    if len(there) <= 12:
        horizontal["axis"] |= {"values": there}
    ticks = {"values": vega.log_ticks([row[y[0]] for row in rows])} if log else {}
    scaled = {"type": "log", "nice": False, "padding": 10} if log else vega.room(10)
    vertical = vega.field(*y, scale=scaled, axis=vega.axis(y[1], **({"format": form} if form else {}), **ticks))
    seen = {"condition": {"param": "picked", "value": 1}, "value": 0.12}
    common = {"x": horizontal, "color": colour, "opacity": seen}
    kinds = [] if dash is None else list(dict.fromkeys(row[dash] for row in rows))
    dashes = [list(vega.DASHES[i % len(vega.DASHES)]) for i in range(len(kinds))]
    several = {"strokeDash": vega.category(dash, kinds, dashes, vega.dash_legend())} if dash and len(kinds) > 1 else {}
    picked = {"name": "picked", "select": {"type": "point", "fields": [series]}, "bind": "legend"}
    layers = [
        {
            "mark": {"type": "line", "strokeWidth": 1.75, "aria": False},
            "encoding": common | {"y": vertical} | several,
            "params": [vega.zoom("x", "y"), picked],
        }
    ]
    if interval is not None:
        low, high = interval
        faint = {"condition": {"param": "picked", "value": 0.4}, "value": 0.05}
        layers.append(
            {
                "mark": {"type": "rule", "strokeWidth": 1, "aria": False},
                "encoding": common | {"y": vertical | {"field": low}, "y2": {"field": high}, "opacity": faint},
            }
        )
    layers.append(
        {
            "mark": {"type": "point", "size": 50},
            "encoding": common | {"y": vertical, "shape": shape, "tooltip": vega.tip(*tips)},
        }
    )
    if rule is not None:
        layers += vega.rule("y", *rule)
    shown = {"filter": f"isNumber(datum['{y[0]}']) && datum['{y[0]}'] <= {most!r}"}
    drawing = vega.drawing(layers, height=height, **({} if most is None else {"transform": [shown]}))
    return View(drawing, description, title, {"x": f"zoom_{x[0]}", "y": f"zoom_{y[0]}"})


def scatter(
    rows: list[Row],
    description: str,
    *,
    x: tuple[str, str, str],
    y: tuple[str, str, str],
    interval: tuple[str, str],
    tips: list[vega.Tip],
) -> View:
    """Points with an interval of y, coloured by role; x, y: (column, title, format)."""
    colour, shape = vega.roles(rows)
    axis = vega.axis(x[1], format=x[2], grid=False, tickCount=8)
    horizontal = vega.field(*x[:2], scale={"padding": 12, "nice": False}, axis=axis)
    vertical = vega.field(*y[:2], scale=vega.room(10), axis=vega.axis(y[1], format=y[2]))
    low, high = interval
    layers = [
        {
            "mark": {"type": "rule", "opacity": 0.4, "aria": False},
            "encoding": {"x": horizontal, "y": vertical | {"field": low}, "y2": {"field": high}, "color": colour},
            "params": [vega.zoom("x", "y")],
        },
        {
            "mark": {"type": "point", "size": 70, "opacity": 0.9},
            "encoding": {"x": horizontal, "y": vertical, "color": colour, "shape": shape, "tooltip": vega.tip(*tips)},
        },
    ]
    return View(vega.drawing(layers, height=320), description, zoom={"x": f"zoom_{x[0]}", "y": f"zoom_{low}"})


def changes(rows: list[Row], description: str) -> View:
    """Relative change of every tensor, a row for each matrix; columns: matrix, layer, plan, role, relative, largest."""
    colour, shape = vega.roles(rows)
    title = "change relative to the tensor's norm"
    tips = [("plan", "plan"), ("layer", "layer"), ("matrix", "tensor"), ("relative", "change", ".1%"),
            ("largest", "largest change of an entry", ".4f")]  # fmt: skip
    over = {"name": "over", "select": {"type": "point", "fields": ["plan"], "on": "pointerover"}}
    seen = {"condition": {"param": "over", "value": 0.9}, "value": 0.15}
    matrices = len({row["matrix"] for row in rows})
    axis = vega.axis(title, format=SHARES, tickCount=6)
    layers = [
        {
            "mark": {"type": "point", "size": 60},
            "encoding": {
                "y": vega.field("matrix", None, "nominal", sort=None, axis=vega.axis(None, grid=True)),
                "x": vega.field("relative", title, scale=vega.room(8), axis=axis),
                "color": colour,
                "shape": shape,
                "opacity": seen,
                "tooltip": vega.tip(*tips),
            },
            "params": [vega.zoom("x"), over],
        }
    ]
    return View(vega.drawing(layers, height=24 * matrices), description, zoom={"x": "zoom_relative"})
