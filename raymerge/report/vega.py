"""What the page's drawings are made of: Vega-Lite's channels, scales, legends and marks, as plain data.

Colours are CSS variables, which the page's style sheet sets for light, dark and print, so that no drawing is made
twice.
"""

from __future__ import annotations

import math
from typing import Any

from raymerge.report.content import ROLES
from raymerge.schemas import Row

Spec = dict[str, Any]
Tip = tuple[str, ...]  # column, title and, of numbers, their format

#: Colours of series that are no roles.
SERIES = tuple(f"var(--series-{number})" for number in range(1, 9))

DASHES = ((1, 0), (5, 3), (2, 2), (8, 2, 2, 2))
#: How wide a label inside a drawing may be, so that it stays inside on a narrow page too.
WITHIN = {"expr": "min(300, width - 24)"}

_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
_ROLE_COLOURS = ("var(--accent)", "var(--control)", "var(--control)", "var(--ink)")  # as ROLES
_ROLE_SHAPES = ("circle", "triangle-up", "circle", "diamond")

#: What all drawings share.
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
        # the longest subject of MMLU, high_school_government_and_politics, is 240 pixels wide; two, a pair, are 420
        "labelLimit": {
            "signal": "containerSize()[0] < 420 ? 130 : containerSize()[0] < 700 ? 210 : "
            "containerSize()[0] < 1000 ? 270 : 440"
        },
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


def axis(title: str | None, **more: Any) -> Spec:
    """A channel's axis; more: what Vega-Lite's `Axis` takes."""
    return {"title": title, **more}


def field(name: str, title: str | None = None, kind: str = "quantitative", **more: Any) -> Spec:
    """A channel that shows a column; more: its scale, axis, legend, sort."""
    return {"field": name, "type": kind, "title": title, **more}


def category(name: str, values: list[str], shown: list[Any], legend: Spec | None) -> Spec:
    """A channel (colour, shape, dash) that shows each of a column's values as what stands at its place in `shown`."""
    return field(name, None, "nominal", scale={"domain": values, "range": shown}, legend=legend)


def tip(*fields: Tip) -> list[Spec]:
    """What is said of the mark below the pointer."""
    return [
        {
            "field": name,
            "title": title,
            "type": "quantitative" if form else "nominal",
            **({"format": form[0]} if form else {}),
        }
        for name, title, *form in fields
    ]


def zoom(*channels: str) -> Spec:
    """Dragging moves, the wheel with Ctrl zooms (alone it scrolls the page), a double click resets."""
    wheel = "wheel![event.ctrlKey || event.metaKey]"
    return {
        "name": "zoom",
        "select": {"type": "interval", "encodings": list(channels), "zoom": wheel},
        "bind": "scales",
    }


def label(name: str, **more: Any) -> Spec:
    """A layer of words inside a drawing, that end where their mark is; lines do not strike through them (page.css, by
    `name`, which is one layer's in a drawing). more: what Vega-Lite's text mark takes."""
    mark = {"type": "text", "align": "right", "color": "var(--soft)", "limit": WITHIN, "aria": False}
    return {"name": f"words_{name}", "mark": mark | more}


def rule(channel: str, value: float, words: str) -> list[Spec]:
    """A dashed line at one value, with its label inside the drawing."""
    one: Spec = {"data": {"values": [{}]}}
    at = {channel: {"datum": value}}
    place = {"x": "width", "dy": -6} if channel == "y" else {"align": "left", "y": 8, "dx": 5}
    line = {"type": "rule", "strokeDash": [4, 3], "aria": False}
    return [one | {"mark": line, "encoding": at}, one | label(f"at_{channel}", text=words, **place) | {"encoding": at}]


def log_ticks(values: list[float]) -> list[float]:
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


def roles(rows: list[Row]) -> tuple[Spec, Spec]:
    """Colour and shape by role, with one legend of the roles that occur."""
    there = [role for role in ROLES if any(row["role"] == role for row in rows)]
    at = [ROLES.index(role) for role in there]
    legend = {"title": None} if len(there) > 1 else None
    colours, shapes = ([kinds[i] for i in at] for kinds in (_ROLE_COLOURS, _ROLE_SHAPES))
    return category("role", there, colours, legend), category("role", there, shapes, legend)


def series(rows: list[Row], name: str, order: list[str] | None) -> tuple[Spec, Spec]:
    """Colour and shape by a column's values, in the order of the rows, or of all that `order` has."""
    names = list(dict.fromkeys(row[name] for row in rows))
    at = [order.index(each) if order else i for i, each in enumerate(names)]
    colours = [SERIES[i % len(SERIES)] for i in at]
    # The ninth has the first one's colour again, but not its shape.
    shapes = [_SHAPES[(i + i // len(SERIES)) % len(_SHAPES)] for i in at]
    return category(name, names, colours, {"title": None}), category(name, names, shapes, {"title": None})


def room(pixels: int) -> Spec:
    """A scale that leaves pixels on both sides of its data: drawings that zoom are cut at their edges, and so would be
    a point, or a label above a line, that stands there."""
    return {"zero": False, "nice": False, "padding": pixels}


def dash_legend() -> Spec:
    """A legend whose strokes are long enough for the longest pattern of `DASHES`."""
    return {"title": None, "symbolSize": 900}


def drawing(layers: list[Spec], *, height: int, **top: Any) -> Spec:
    """A whole specification: layers on top of each other, as wide as the page; top: what else it has at its top."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"name": "rows"},
        "width": "container",
        **top,
        "layer": layers,
        "height": height,
    }
