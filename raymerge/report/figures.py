"""Vega-Lite specifications of the page's drawings. Each reads the data set "rows", whose columns the caller made.

Colours are CSS variables, which the page's style sheet sets for light, dark and print, so that no drawing is made
twice. Names from tables stand in data alone, never in an expression.
"""

from __future__ import annotations

import math
from typing import Any

from raymerge.report.content import View

Spec = dict[str, Any]

FOUND, RANDOM, CONTROL, UNMERGED = "found by the search", "best at random", "control", "unmerged"
ROLES = (FOUND, RANDOM, CONTROL, UNMERGED)
"""What a plan is on a page, in the order of legends; `role_of` says which."""

_ROLE_COLOURS = ("var(--accent)", "var(--control)", "var(--control)", "var(--ink)")
_ROLE_SHAPES = ("circle", "triangle-up", "circle", "diamond")
SERIES = tuple(f"var(--series-{number})" for number in range(1, 9))
_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
_WITHIN = {"expr": "min(300, width - 24)"}  # how wide a label inside a drawing may be: on a narrow page it left it
_DASHES = ((1, 0), (5, 3), (2, 2), (8, 2, 2, 2))

CONFIG: Spec = {
    "background": None,
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "view": {"stroke": None, "continuousHeight": 260},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "labelFontSize": 12,
        "titlePadding": 8,
        # the longest subject of MMLU, high_school_government_and_politics, is 240 pixels wide
        "labelLimit": {"signal": "containerSize()[0] < 420 ? 130 : containerSize()[0] < 700 ? 210 : 270"},
        "gridColor": "var(--line)",
        "domainColor": "var(--rule)",
        "tickColor": "var(--rule)",
        "labelOverlap": "greedy",
    },
    "axisBand": {"grid": False, "ticks": False, "domain": False, "labelPadding": 8},
    "legend": {
        "orient": "top",
        "labelColor": "var(--ink)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "symbolSize": 70,
        "symbolOpacity": 1,
        "labelLimit": 220,
        "columnPadding": 16,
        "layout": {"top": {"direction": "vertical", "anchor": "start"}},
        "gradientLength": {"signal": "min(240, 0.8 * width)"},
        "gradientThickness": 10,
    },
    "point": {"filled": True, "size": 70},
    "rule": {"color": "var(--soft)"},
    "text": {"color": "var(--ink)", "fontSize": 11},
}
"""What all drawings share."""


def role_of(kind: str) -> str:
    """What a plan of this kind of table `plans` is on the page."""
    return {"found": FOUND, "random": RANDOM, "base": UNMERGED}.get(kind, CONTROL)


def _axis(title: str | None, **more: Any) -> Spec:
    return {"title": title, **more}


def _field(name: str, title: str | None = None, kind: str = "quantitative", **more: Any) -> Spec:
    return {"field": name, "type": kind, "title": title, **more}


def _tip(*fields: tuple[str, str] | tuple[str, str, str]) -> list[Spec]:
    return [
        {
            "field": name,
            "title": title,
            "type": "quantitative" if form else "nominal",
            **({"format": form[0]} if form else {}),
        }
        for name, title, *form in fields
    ]


def _zoom(*channels: str) -> Spec:
    """Dragging moves, the wheel with Ctrl zooms (alone it scrolls the page), a double click resets."""
    wheel = "wheel![event.ctrlKey || event.metaKey]"
    return {
        "name": "zoom",
        "select": {"type": "interval", "encodings": list(channels), "zoom": wheel},
        "bind": "scales",
    }


def _rule(channel: str, value: float, label: str) -> list[Spec]:
    """A dashed line at one value, with its label inside the drawing."""
    one, at = {"data": {"values": [{}]}}, {channel: {"datum": value}}
    text: Spec = {"type": "text", "text": label, "color": "var(--soft)", "aria": False}
    text |= {"align": "right", "x": "width", "dy": -6} if channel == "y" else {"align": "left", "y": 8, "dx": 5}
    line = {"type": "rule", "strokeDash": [4, 3], "aria": False}
    return [one | {"mark": line, "encoding": at}, one | {"mark": text, "encoding": at}]


def _log_ticks(values: list[float]) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with 2 and 5 between them where they span less than two decades, and
    round steps where values are too near to each other for these."""
    least, most = min(values), max(values)
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    within = (1, 2, 5) if math.log10(most / least) < 2 else (1,)
    ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in within]
    if sum(least <= tick <= most for tick in ticks) > 1:
        return ticks
    if least == most:
        return [least]
    step = 10.0 ** math.floor(math.log10((most - least) / 2))
    step *= max(digit for digit in (1, 2, 5) if digit * step <= (most - least) / 2)
    return [round(step * number, 12) for number in range(math.ceil(least / step), math.floor(most / step) + 1)]


def _roles(rows: list[dict]) -> tuple[Spec, Spec]:
    """Colour and shape by role, with one legend of the roles that occur."""
    there = [role for role in ROLES if any(row["role"] == role for row in rows)]
    at = [ROLES.index(role) for role in there]
    legend = {"title": None} if len(there) > 1 else None
    colour = {"domain": there, "range": [_ROLE_COLOURS[i] for i in at]}
    shape = {"domain": there, "range": [_ROLE_SHAPES[i] for i in at]}
    return (
        _field("role", None, "nominal", scale=colour, legend=legend),
        _field("role", None, "nominal", scale=shape, legend=legend),
    )


def _room(pixels: int) -> Spec:
    """A scale that leaves pixels on both sides of its data: drawings that zoom are cut at their edges, and so would be
    a point, or a label above a line, that stands there."""
    return {"zero": False, "nice": False, "padding": pixels}


def _dash_legend() -> Spec:
    """A legend whose strokes are long enough for the longest pattern of `_DASHES`."""
    return {"title": None, "symbolSize": 900}


def _drawing(layers: list[Spec], *, height: Any = None, **top: Any) -> Spec:
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"name": "rows"},
        "width": "container",
        **top,
        "layer": layers,
    }
    return spec if height is None else spec | {"height": height}


def intervals(
    rows: list[dict],
    description: str,
    *,
    name: str,
    value: str,
    axis: str,
    form: str,
    tips: list[tuple],
    title: str = "",
    rule: tuple[float, str] | None = None,
    tick: str | None = None,
) -> View:
    """Named values with their intervals (columns low and high), one below the other in the order of the rows, coloured
    by role.

    rule: a value to be held against, with its label. tick: a column with a limit of each value, drawn as a tick.
    """
    order = list(dict.fromkeys(row[name] for row in rows))
    y = _field(name, None, "nominal", sort=order, axis=_axis(None, grid=True))
    x = _field(value, axis, scale=_room(8), axis=_axis(axis, format=form, tickCount=6))
    colour, shape = _roles(rows)
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}, "color": colour},
            "params": [_zoom("x")],
        },
        {
            "mark": {"type": "point", "opacity": 1, "size": 90},
            "encoding": {"y": y, "x": x, "color": colour, "shape": shape, "tooltip": _tip(*tips)},
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
        layers += _rule("x", *rule)
    return View(_drawing(layers, height=26 * len(order)), description, title, {"x": "zoom_low"})


def named_values(
    rows: list[dict],
    description: str,
    *,
    name: str,
    value: str,
    axis: str,
    tips: list[tuple],
    title: str = "",
    legend: bool = False,
) -> View:
    """Named positive values with their intervals (columns VALUE_low and VALUE_high, which may be null) on a logarithmic
    axis, in the order of the rows, coloured by role; without a legend where one stands in a drawing beside it."""
    order = list(dict.fromkeys(row[name] for row in rows))
    colour, shape = (channel if legend else channel | {"legend": None} for channel in _roles(rows))
    low, high = f"{value}_low", f"{value}_high"
    ticks = _log_ticks([row[column] for row in rows for column in (value, low, high) if row[column]])
    y = _field(name, None, "nominal", sort=order, axis=_axis(None, grid=True))
    scale = {"type": "log", "nice": False, "padding": 14}
    x = _field(value, axis, scale=scale, axis=_axis(axis, format="~s", values=ticks))
    layers = [
        {
            "transform": [{"filter": f"isValid(datum['{low}']) && isValid(datum['{high}'])"}],
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"y": y, "x": x | {"field": low}, "x2": {"field": high}, "color": colour},
        },
        {
            "mark": {"type": "point", "opacity": 1, "size": 90},
            "encoding": {"y": y, "x": x, "color": colour, "shape": shape, "tooltip": _tip(*tips)},
            "params": [_zoom("x")],
        },
    ]
    return View(_drawing(layers, height=26 * len(order)), description, title, {"x": f"zoom_{value}"})


def alpha_lines(rows: list[dict], description: str) -> View:
    """Alpha by merge step, a line a plan (and a matrix where a plan has some of their own); columns: plan, matrix,
    series, step, merge, alpha, role, label (beside the line's end)."""
    colour, shape = _roles(rows)
    steps = sorted({row["step"] for row in rows})
    x = _field("step", "merge step", scale={"nice": False, "padding": 14}, axis=_axis("merge step", values=steps[:60]))
    x["axis"] |= {"format": "d", "grid": False}
    y = _field("alpha", "alpha", scale={"domain": [-0.04, 1.1], "nice": False})
    y["axis"] = _axis("alpha: weight of the kept layer", values=[0, 0.2, 0.4, 0.6, 0.8, 1])
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
            "params": [_zoom("x", "y")],
        },
        {
            "mark": {"type": "point", "size": 55},
            "encoding": {
                "x": x,
                "y": y,
                "color": colour,
                "shape": shape,
                "opacity": solid,
                "tooltip": _tip(*tips),
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
            "mark": {
                "type": "text",
                "align": "right",
                "dy": -9,
                "color": "var(--soft)",
                "limit": _WITHIN,
                "aria": False,
            },
            "encoding": {"x": x, "y": y, "text": {"field": "label", "type": "nominal"}},
        }
    )
    return View(_drawing(layers, height=280), description, zoom={"x": "zoom_step", "y": "zoom_alpha"})


def weight_cells(rows: list[dict], description: str) -> View:
    """A cell for each plan and original layer; columns: series, layer, weight, kept, percent."""
    order = list(dict.fromkeys(row["series"] for row in rows))
    layers_there = sorted({row["layer"] for row in rows})
    x = _field("layer", "original layer", "ordinal", axis=_axis("original layer", labelAngle=0))
    y = _field("series", None, "nominal", sort=order, axis=_axis(None))
    tips = [("series", "plan"), ("layer", "original layer"), ("kept", "merged into layer"), ("weight", "weight", ".1%")]
    room = {"expr": f"width / {len(layers_there)} > 30 ? 1 : 0"}
    # whichever has the contrast that small text needs (4.5) on viridis
    dark = {"condition": {"test": "datum.weight > 0.44", "value": "#000"}, "value": "#fff"}
    fill = _field("weight", "share of the merged weights", scale={"scheme": "viridis", "domain": [0, 1]})
    fill["legend"] = {"title": "share of the merged weights", "format": ".0%", "values": [0, 0.5, 1]}
    cells = [
        {
            "mark": {"type": "rect", "aria": False, "stroke": "var(--paper)", "strokeWidth": 1},
            "encoding": {"x": x, "y": y, "color": fill, "tooltip": _tip(*tips)},
        },
        {
            "mark": {"type": "text", "fontSize": 10, "opacity": room, "aria": False},
            "encoding": {"x": x, "y": y, "text": {"field": "percent", "type": "nominal"}, "color": dark},
        },
    ]
    return View(_drawing(cells, height=24 * len(order)), description)


def progress(rows: list[dict], description: str, *, objective: str, limits: tuple[float, float] | None = None) -> View:
    """Value by candidate with the best so far; columns: kind ("candidate" or "control"), searcher, number, value,
    best, label. limits: of the axis as it opens, where values far from the others would leave these no room."""
    searchers = list(dict.fromkeys(row["searcher"] for row in rows if row["kind"] == "candidate"))
    own = {name: SERIES[i % len(SERIES)] for i, name in enumerate(name for name in searchers if name != "random")}
    scale = {"domain": searchers, "range": [own.get(name, "var(--control)") for name in searchers]}
    colour = _field("searcher", None, "nominal", scale=scale, legend={"title": None})
    x = _field("number", "candidate", scale={"nice": False, "padding": 10}, axis=_axis("candidate", tickMinStep=1))
    room = _room(16) | ({"domain": list(limits)} if limits else {})
    y = _field("value", objective, scale=room, axis=_axis(objective))
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
            "encoding": {"x": x, "y": y, "color": colour, "tooltip": _tip(*tips)},
            "params": [_zoom("x", "y")],
        },
        {
            "transform": [candidate],
            "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2, "aria": False},
            "encoding": {"x": x, "y": y | {"field": "best"}, "color": colour},
        },
        {
            "transform": [control],
            "mark": {"type": "rule", "strokeDash": [4, 3], "aria": False},
            "encoding": {"y": y, "tooltip": _tip(("label", "controls"), ("value", objective, ".4f"))},
        },
        {
            "transform": [control],
            "mark": {
                "type": "text",
                "align": "right",
                "dy": -5,
                "x": "width",
                "color": "var(--soft)",
                "limit": _WITHIN,
            },
            "encoding": {"y": y, "text": {"field": "label", "type": "nominal"}},
        },
    ]
    return View(_drawing(layers, height=300), description, zoom={"x": "zoom_number", "y": "zoom_value"})


def descents(rows: list[dict], description: str, *, objective: str) -> View:
    """Loss by epoch, a line a start; columns: searcher, start, series, epoch, loss, of."""
    searchers = list(dict.fromkeys(row["searcher"] for row in rows))
    scale = {"domain": searchers, "range": ["var(--accent)", *SERIES[1:]][: max(1, len(searchers))]}
    colour = _field("searcher", None, "nominal", scale=scale, legend={"title": None})
    dash = _field("of", None, "nominal", scale={"range": [[1, 0], [4, 3]]}, legend=_dash_legend())
    x = _field("epoch", "epoch", scale=_room(6), axis=_axis("epoch", tickMinStep=1))
    y = _field("loss", f"loss ({objective})", scale=_room(6), axis=_axis(f"loss ({objective})"))
    tips = [("searcher", "descent"), ("start", "start"), ("epoch", "epoch"), ("of", "of"), ("loss", "loss", ".4f")]
    layers = [
        {
            "mark": {"type": "line", "strokeWidth": 1.75, "aria": False},
            "encoding": {"x": x, "y": y, "color": colour, "strokeDash": dash, "detail": {"field": "series"}},
            "params": [_zoom("x", "y")],
        },
        {
            "mark": {"type": "point", "size": 60, "opacity": 0, "aria": False},
            "encoding": {"x": x, "y": y, "tooltip": _tip(*tips)},
        },
    ]
    return View(_drawing(layers, height=280), description, zoom={"x": "zoom_epoch", "y": "zoom_loss"})


def subject_differences(rows: list[dict], description: str, *, against: list[str]) -> View:
    """Differences by subject with their intervals, sorted; one control at a time is chosen from a list. Columns:
    subject, against, difference, low, high, clear ("yes" where the interval leaves out 0), n."""
    subjects = len({row["subject"] for row in rows})
    y = _field(
        "subject", None, "nominal", sort={"field": "difference", "order": "descending"}, axis=_axis(None, grid=True)
    )
    title = "difference in accuracy (percentage points)"
    x = _field("difference", title, scale=_room(8), axis=_axis(title, tickCount=6))
    scale = {"domain": ["yes", "no"], "range": ["var(--accent)", "var(--control)"]}
    colour = _field("clear", None, "nominal", scale=scale, legend={"title": "interval leaves out 0"})
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
            "params": [_zoom("x")],
        },
        {
            "mark": {"type": "point", "opacity": 1},
            "encoding": {"y": y, "x": x, "color": colour, "tooltip": _tip(*tips)},
        },
        {"mark": {"type": "rule", "color": "var(--ink)", "aria": False}, "encoding": {"x": {"datum": 0}}},
    ]
    top = {"params": [chosen], "transform": [{"filter": "datum.against === against"}]}
    return View(
        _drawing(layers, height=(22 if subjects <= 30 else 18) * subjects, **top), description, zoom={"x": "zoom_low"}
    )


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
    axis = _axis("layer", grid=False, tickMinStep=1, format="d", tickCount=6)
    scale = {"domain": [-0.5, layers - 0.5], "nice": False, "zero": False}
    x = _field("left", "layer", scale=scale, axis=axis)
    y = _field("bottom", "layer", scale=scale | {"reverse": True}, axis=axis)
    fill = _field("value", "similarity", scale={"scheme": "viridis", "domain": list(domain), "clamp": True})
    fill["legend"] = {"title": "similarity", "tickCount": 4} if legend else None
    tips = [
        ("layer_i", "layer"),
        ("layer_j", "and layer"),
        ("value", "similarity", ".3f"),
        ("ci_low", "95 % from", ".3f"),
        ("ci_high", "to", ".3f"),
        ("null_p95", "unrelated layers stay below", ".3f"),
        ("note", "note"),
    ]
    box = {"x": x, "x2": {"field": "right"}, "y": y, "y2": {"field": "top"}}
    centre = {"x": x | {"field": "layer_j"}, "y": y | {"field": "layer_i"}}
    dots = where + [{"filter": {"field": "above", "equal": "no"}}]
    cells = [
        {
            "transform": where,
            "mark": {"type": "rect", "fill": "var(--line)", "aria": False, "clip": True},
            "encoding": box,
            "params": [_zoom("x", "y")],
        },
        {
            "transform": where + [{"filter": "isValid(datum.value)"}],
            "mark": {"type": "rect", "aria": False, "clip": True},
            "encoding": box | {"color": fill, "tooltip": _tip(*tips)},
        },
        {
            "transform": dots,
            "mark": {"type": "point", "shape": "circle", "size": 5, "opacity": 0.9, "fill": "#fff", "stroke": None,
                     "aria": False, "clip": True, "tooltip": False},
            "encoding": centre,
        },
    ]  # fmt: skip
    spec = _drawing(cells, height=height)
    return View(spec, description, title, {"x": "zoom_left", "y": "zoom_bottom"})


def lines(
    rows: list[dict],
    description: str,
    *,
    x: tuple[str, str],
    y: tuple[str, str],
    series: str,
    tips: list[tuple],
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
    names = list(dict.fromkeys(row[series] for row in rows))
    at = [order.index(name) if order else i for i, name in enumerate(names)]
    scale = {"domain": names, "range": [SERIES[i % len(SERIES)] for i in at]}
    # The ninth has the first one's colour again, but not its shape.
    shapes = {"domain": names, "range": [_SHAPES[(i + i // len(SERIES)) % len(_SHAPES)] for i in at]}
    horizontal = _field(
        *x, scale={"zero": False, "padding": 12, "nice": False}, axis=_axis(x[1], tickMinStep=1, grid=False)
    )
    there = sorted({row[x[0]] for row in rows})
    if len(there) <= 12:
        horizontal["axis"] |= {"values": there}
    ticks = {"values": _log_ticks([row[y[0]] for row in rows])} if log else {}
    scaled = {"type": "log", "nice": False, "padding": 10} if log else _room(10)
    vertical = _field(*y, scale=scaled, axis=_axis(y[1], **({"format": form} if form else {}), **ticks))
    seen = {"condition": {"param": "picked", "value": 1}, "value": 0.12}
    common = {
        "x": horizontal,
        "color": _field(series, None, "nominal", scale=scale, legend={"title": None}),
        "opacity": seen,
    }
    detail: Spec = {}
    if dash is not None:
        kinds = list(dict.fromkeys(row[dash] for row in rows))
        if len(kinds) > 1:
            dashes = {"domain": kinds, "range": [list(_DASHES[i % len(_DASHES)]) for i in range(len(kinds))]}
            detail = {"strokeDash": _field(dash, None, "nominal", scale=dashes, legend=_dash_legend())}
    picked = {"name": "picked", "select": {"type": "point", "fields": [series]}, "bind": "legend"}
    layers = [
        {
            "mark": {"type": "line", "strokeWidth": 1.75, "aria": False},
            "encoding": common | {"y": vertical} | detail,
            "params": [_zoom("x", "y"), picked],
        }
    ]
    if interval is not None:
        low, high = interval
        bar = {"type": "rule", "strokeWidth": 1, "aria": False}
        faint = {"condition": {"param": "picked", "value": 0.4}, "value": 0.05}
        layers.append(
            {
                "mark": bar,
                "encoding": common | {"y": vertical | {"field": low}, "y2": {"field": high}, "opacity": faint},
            }
        )
    shape = _field(series, None, "nominal", scale=shapes, legend={"title": None})
    layers.append(
        {
            "mark": {"type": "point", "size": 50},
            "encoding": common | {"y": vertical, "shape": shape, "tooltip": _tip(*tips)},
        }
    )
    if rule is not None:
        layers += _rule("y", *rule)
    left_out: Spec = {}
    if most is not None:
        left_out = {"transform": [{"filter": f"isNumber(datum['{y[0]}']) && datum['{y[0]}'] <= {most!r}"}]}
    drawing = _drawing(layers, height=height, **left_out)
    return View(drawing, description, title, {"x": f"zoom_{x[0]}", "y": f"zoom_{y[0]}"})


def scatter(
    rows: list[dict],
    description: str,
    *,
    x: tuple[str, str, str],
    y: tuple[str, str, str],
    interval: tuple[str, str],
    tips: list[tuple],
) -> View:
    """Points with an interval of y, coloured by role; x, y: (column, title, format)."""
    colour, shape = _roles(rows)
    axis = _axis(x[1], format=x[2], grid=False, tickCount=8)
    horizontal = _field(*x[:2], scale={"padding": 12, "nice": False}, axis=axis)
    vertical = _field(*y[:2], scale=_room(10), axis=_axis(y[1], format=y[2]))
    low, high = interval
    layers = [
        {
            "mark": {"type": "rule", "opacity": 0.4, "aria": False},
            "encoding": {"x": horizontal, "y": vertical | {"field": low}, "y2": {"field": high}, "color": colour},
            "params": [_zoom("x", "y")],
        },
        {
            "mark": {"type": "point", "size": 70, "opacity": 0.9},
            "encoding": {"x": horizontal, "y": vertical, "color": colour, "shape": shape, "tooltip": _tip(*tips)},
        },
    ]
    return View(_drawing(layers, height=320), description, zoom={"x": f"zoom_{x[0]}", "y": f"zoom_{low}"})


def changes(rows: list[dict], description: str) -> View:
    """Relative change of every tensor, a row for each matrix; columns: matrix, layer, plan, role, relative, largest."""
    colour, shape = _roles(rows)
    title = "change, as a share of the tensor's norm"
    tips = [("plan", "plan"), ("layer", "layer"), ("matrix", "tensor"), ("relative", "change", ".1%"),
            ("largest", "largest entry's", ".4f")]  # fmt: skip
    over = {"name": "over", "select": {"type": "point", "fields": ["plan"], "on": "pointerover"}}
    seen = {"condition": {"param": "over", "value": 0.9}, "value": 0.15}
    matrices = len({row["matrix"] for row in rows})
    layers = [
        {
            "mark": {"type": "point", "size": 60},
            "encoding": {
                "y": _field("matrix", None, "nominal", sort=None, axis=_axis(None, grid=True)),
                "x": _field("relative", title, scale=_room(8), axis=_axis(title, format=".0%", tickCount=6)),
                "color": colour,
                "shape": shape,
                "opacity": seen,
                "tooltip": _tip(*tips),
            },
            "params": [_zoom("x"), over],
        }
    ]
    return View(_drawing(layers, height=24 * matrices), description, zoom={"x": "zoom_relative"})
