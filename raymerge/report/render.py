"""A page as one HTML file that needs nothing else: template, styles, scripts and rows inside it.

The drawings are Vega-Lite's, whose code vl-convert brings along (about 0.9 MB). Whatever comes from tables or
configurations is escaped: text by Jinja, data by `json_for_script`. A content security policy forbids the page to load
anything, so that a mistake here could not reach the network either.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from raymerge.report.content import Figure, Page
from raymerge.report.vega import CONFIG

_DIGITS = 7  # significant ones of a number in the page's rows; the parquet has all


def to_html(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_with_unit,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"script_json": json_for_script, "slug": slug, "whole": with_whole_intervals}
    folder = files("raymerge.report") / "assets"
    numbered = {id(block): n for n, block in enumerate(_figures(page), 1)}
    return environment.from_string((folder / "page.html").read_text(encoding="utf-8")).render(
        page=page,
        number_of=lambda block: numbered[id(block)],
        data_of=figure_data,
        config=CONFIG,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup((folder / "page.js").read_text(encoding="utf-8")),
        library=Markup(library()),
    )


def _with_unit(value: Any) -> Any:
    """Text in which no line ends between a number and its per cent sign."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", value)
    return value


def with_whole_intervals(text: str) -> str:
    """A sentence, or a table's cell, in which no line ends inside an interval: it breaks before one."""
    return re.sub(r"(\[[^][\s]+,) (?=[^][\s]+\])", "\\1\N{NO-BREAK SPACE}", text)


def _figures(page: Page) -> list[Figure]:
    return [block for section in page.sections for block in section.blocks if isinstance(block, Figure)]


def figure_data(figure: Figure) -> dict[str, Any]:
    """What the page's script needs of a figure: specifications, zoom signals, rows by column."""
    views = [{"spec": view.spec | {"description": view.description}, "zoom": view.zoom} for view in figure.views]
    rows = [[_short(value) for value in row] for row in figure.rows.values]
    return {"views": views, "columns": figure.rows.columns, "rows": rows}


def _short(value: Any) -> Any:
    """JSON's own kinds: a float to 7 digits, null for what is no number."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def json_for_script(value: Any) -> Markup:
    """JSON that nothing in it can end the script element of, or open another."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def slug(text: str) -> str:
    """An anchor of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which sets window.vegaEmbed."""
    import vl_convert

    return contained(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub has no default snippet


def contained(code: str) -> str:
    """A script in a function of its own, so that its names stay inside, in which no text ends the script element."""
    return "(function(){" + code.replace("</script", "<\\/script") + "})();"
