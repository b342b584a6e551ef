"""Accuracy and perplexity against the number of merged layers: the compression curve of one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from raymerge.findings import verdict
from raymerge.report import figures
from raymerge.report.asked import figure_of
from raymerge.report.content import Block, Figure, Section, Table, Text, View
from raymerge.report.reached import ALIGNED, TEXT_TEST, Reached, chosen_layers, drawn, merit, missing, removed_share
from raymerge.report.subjects import categories
from raymerge.report.wording import difference, percent, perplexity, plural, value
from raymerge.schemas import Row
from raymerge.tables import RUINED, way_of

_DRAWN = ("accuracy", "perplexity")  # tables
#: What variants are, by a word of their names.
_VARIANTS = {
    "aligned": "Aligned: neurons are reordered to match before averaging.",
    "rows aligned": "Rows aligned: the rows of each matrix are reordered on their own before averaging.",
    "folded": "Folded: norm gains are multiplied into the matrices before averaging.",
}
_OF_QUESTIONS = ("accuracy", "low", "high", "macro", "answer_nll")  # of a point, without value where none are asked


def answer(reached: Reached) -> Section:
    """The best way of merging at every K, held against dropping as many layers, and the two curves."""
    points = curve(reached)
    if not points:
        return Section("The answer", (missing(reached.run, "sweep", "accuracy", "answers"),))
    base, lasts = _unmerged(points), merged(points)
    blocks: list[Block] = []
    if lasts:
        blocks.append(Text(_sentence(reached, base, lasts)))
    if any(map(_judged, lasts)):
        blocks.append(_best(reached, base, lasts))
    blocks += [*chosen_layers(reached.run), *_curves(reached, points, base), _everything(points), *categories(reached)]
    return Section("The answer", tuple(blocks))


def in_words(reached: Reached) -> str:
    """The best way at the least and the most layers merged, in a sentence; "" of a run that has merged none."""
    points = curve(reached)
    lasts = merged(points)
    return _sentence(reached, _unmerged(points), lasts) if lasts else ""


def _unmerged(points: list[Row]) -> Row | None:
    return next((point for point in points if point["merges"] == 0), None)


def merged(points: list[Row]) -> list[Row]:
    """Points but those of the unmerged model."""
    return [point for point in points if point["merges"] > 0]


def curve(reached: Reached) -> list[Row]:
    """Every point of the curve, rows of table `sweep` with what their plans reached, by K."""
    lines = {line["plan_id"]: line for line in reached.lines}
    points = []
    for row in reached.run.read("sweep").to_pylist():
        line = lines.get(row["plan_id"])
        if line is None:
            continue
        points.append(
            {
                "method": way_of(row),
                "variant": _variant(row),
                "merges": row["merges"],
                **drawn(line),
                "read": line["perplexity"],  # infinite where a model is so ruined that it has none to be drawn
                "asked": (line["question_perplexity"], line["question_interval"]),
                "macro": line["macro"],
                "answer_nll": line["nll"],
                "removed": removed_share(line["costs"]),
                "tokens_per_second": line["costs"].get("tokens_per_second"),
                "plan": line["label"],
                "plan_id": row["plan_id"],
            }
        )
    return sorted(points, key=lambda point: point["merges"])


def _limits(point: Row) -> tuple[float | None, float | None]:
    return point["perplexity_low"], point["perplexity_high"]


def _columns(points: list[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """The perplexities that points have, as columns: name, and cell of a point."""
    known: list[tuple[str, Callable[[Row], str]]] = []
    if any(point["asked"][0] is not None for point in points):
        known.append(("question perplexity", lambda point: perplexity(*point["asked"])))
    if any(point["read"] is not None for point in points):
        known.append(("perplexity", lambda point: perplexity(point["read"], _limits(point))))
    return known


def _known(point: Row) -> bool:
    return None not in _limits(point)


def _variant(row: Row) -> str:
    alignment: str = row["alignment"]
    words = [] if alignment == "none" else [ALIGNED.get(alignment, alignment)]
    return ", ".join([*words, *(["folded"] if row["norms"] == "fold" else [])]) or "plain"


def _way(point: Row) -> str:
    return point["method"] + ("" if point["variant"] == "plain" else f" ({point['variant']})")


def _at(points: list[Row], merges: int) -> tuple[Row, Row | None]:
    """The best point at a K, of equally accurate ones that of lowest perplexity, and that of dropping."""
    mine = [point for point in points if point["merges"] == merges]
    best = max(mine, key=lambda point: (merit(point), -math.inf if point["read"] is None else -point["read"]))
    return best, next((point for point in mine if point["method"] == "drop"), None)


def _level(points: list[Row], best: Row) -> int:
    """How many other ways reach the same at the same K."""
    return sum(
        point is not best and point["merges"] == best["merges"] and merit(point) == merit(best) for point in points
    )


def _tie(points: list[Row], best: Row, alike: str) -> str:
    """That others are level with the best point, for the sentence; alike: what they then are, of one and of several."""
    level = _level(points, best)
    return f"; {plural(level, 'other way')} {alike.split('/')[level > 1]}" if level else ""


def _judged(point: Row) -> bool:
    """Whether a point has anything to be ranked by: a sweep may report on tasks alone."""
    return point["accuracy"] is not None or point["read"] is not None


def _sentence(reached: Reached, base: Row | None, points: list[Row]) -> str:
    if not any(map(_judged, points)):
        return (
            "No questions were asked, and no plain text was read: the points were evaluated on tasks only, see below."
        )
    merges = [point["merges"] for point in points]
    best = {count: _at(points, count)[0] for count in (min(merges), max(merges))}
    if points[0]["accuracy"] is None:
        read = None if base is None else perplexity(base["read"])
        before = "" if base is None else f"The unmerged model's perplexity on plain text is {read}. "
        told = [
            f"With {plural(count, 'layer')} merged, {_way(point)} has the lowest: "
            f"{perplexity(point['read'], _limits(point))}{_tie(points, point, 'has the same/have the same')}"
            for count, point in best.items()
        ]
        return f"{before}{'. '.join(told)}. No questions were asked."
    asked = plural(reached.lines[0]["n"], f"{reached.split} question")
    before = "" if base is None else f"The unmerged model answers {_share(base)} of {asked} correctly. "
    unmerged = None if base is None else base["perplexity"]
    told = [
        f"With {plural(count, 'layer')} merged, {_way(point)} is the most accurate: {_share(point)}"
        f"{_read(point, unmerged)}{_tie(points, point, 'is as accurate/are as accurate')}"
        f"{_better_read(points, point, unmerged)}"
        for count, point in best.items()
    ]
    return f"{before}{'. '.join(told)}."


def _share(point: Row) -> str:
    return percent(point["accuracy"], limits=(point["low"], point["high"]))


def _better_read(points: list[Row], best: Row, unmerged: float | None) -> str:
    """Which way predicts text best, where that is clearly another than the most accurate one - their intervals are
    apart - and is not ruined too."""
    low = math.inf if best["read"] == math.inf else best["perplexity_low"]
    mine = [point for point in points if point["merges"] == best["merges"] and _known(point)]
    least = min(mine, key=lambda point: point["read"], default=best)
    if low is None or not _known(least) or least["perplexity_high"] >= low or _ruined(least, unmerged):
        return ""
    read = perplexity(least["read"], _limits(least))
    return f"; {_way(least)} predicts plain text best: perplexity {read}, with {_share(least)} of answers correct"


def _read(point: Row, unmerged: float | None) -> str:
    """A point's perplexity for the sentence, and whether the language model is lost whatever the letters say."""
    if point["read"] is None:
        return ""
    lost = _ruined(point, unmerged)
    beside = "" if unmerged is None else f", the unmerged model's is {perplexity(unmerged)}"
    said = "; it is ruined as a language model" if lost else ""
    return f" (perplexity {perplexity(point['read'])}{beside if lost else ''}{said})"


def _ruined(point: Row, unmerged: float | None) -> bool:
    return unmerged is not None and point["read"] > RUINED * unmerged


def _best(reached: Reached, base: Row | None, points: list[Row]) -> Table:
    asks, measure = reached.asks, "accuracy" if reached.asks else "text_nll"
    known = {(row["plan_a"], row["plan_b"]): row for row in reached.comparisons if row["measure"] == measure}
    cells, tied, read = [], False, _columns(points)
    held = any(point["method"] == "drop" for point in points)
    for merges in sorted({point["merges"] for point in points}):
        best, drop = _at(points, merges)
        level = _level(points, best)
        tied |= asks and best["read"] is not None and level > 0
        dropping = "–" if drop is None else percent(drop["accuracy"]) if asks else perplexity(drop["read"])
        cells.append(
            (
                str(merges),
                percent(best["removed"]),
                _way(best) + (f" and {level} more" if level else ""),
                *([_share(best)] if asks else []),
                *(cell(best) for _, cell in read),
                *((dropping, _against_dropping(points, best, drop, known)) if held else ()),
            )
        )
    ranked = "most accurate way" if asks else "way of lowest perplexity"
    header = ("merged", "parameters removed", ranked, *(["accuracy [95 %]"] if asks else []),
              *(name for name, _ in read), *(("dropping", "against dropping") if held else ()))  # fmt: skip
    several = len({(point["method"], point["variant"]) for point in points}) > 1
    caption = _caption_of_best(asks, base, ranked, several=several, tied=tied, held=held)
    return Table(caption, header, tuple(cells), words=(2, len(header) - 1) if held else (2,))


def _against_dropping(points: list[Row], best: Row, drop: Row | None, known: dict[tuple[str, str], Row]) -> str:
    """What the paired test says of the best point, or of the next best where it is dropping, and dropping as many
    layers."""
    if drop is None:
        return "–"
    if best["plan_id"] == drop["plan_id"]:  # which other ways can come to, such as fixed:1
        others = [point for point in points if point["plan_id"] != drop["plan_id"] and _judged(point)]
        if all(point["merges"] != best["merges"] for point in others):
            return "dropping is best"
        following, _ = _at(others, best["merges"])
        row = known.get((following["plan_id"], drop["plan_id"]))
        said = "" if row is None else f": {difference(row)}, {verdict(row)}"
        alike = "no way is better" if merit(following) == merit(drop) else "dropping is best"
        return f"{alike}; next {_way(following)}{said}"
    row = known.get((best["plan_id"], drop["plan_id"]))
    return "not compared" if row is None else f"{difference(row)}: {verdict(row)}"


def _caption_of_best(asks: bool, base: Row | None, ranked: str, *, several: bool, tied: bool, held: bool) -> str:
    """held: whether the ways are held against dropping, which a sweep need not have."""
    judged, flattered = ("these same questions", "accuracy") if asks else ("this same text", "perplexity")
    caption = f"The {ranked} at every K{', against dropping as many layers' if held else ''}."
    if tied:
        caption += " Of ways that are equally accurate, the one of lowest perplexity is shown."
    if several:
        caption += (
            f" It was chosen as the best of several on {judged}, so its {flattered} "
            f"{'and its difference are' if held else 'is'} too good."
        )
    if several and held:
        unit = (
            "percentage points with the 95 % interval of the paired difference."
            if asks
            else f"nats per token with 95 % intervals, over passages of the text. {TEXT_TEST}."
        )
        caption += (
            " The verdicts use Holm's p, which corrects for all comparisons that the sweep is about, including ways "
            f"that are not the best at their K. Against dropping: {unit}"
        )
    if base is None:
        return caption
    unmerged = [percent(base["accuracy"])] if asks else []
    unmerged += [] if base["read"] is None else [f"perplexity {perplexity(base['read'])}"]
    return f"{caption} Unmerged: {', '.join(unmerged)}"


def _curves(reached: Reached, points: list[Row], base: Row | None) -> list[Figure]:
    """Accuracy where questions were asked, and perplexity where there is any."""
    points = [{key: value for key, value in point.items() if key not in ("read", "asked")} for point in points]
    drawn = [point for point in points if point["merges"] > 0] or points
    tips = [("plan", "plan"), ("method", "method"), ("variant", "variant"), ("merges", "layers merged"),
            ("accuracy", "accuracy", ".1%"), ("low", "95 % from", ".1%"), ("high", "to", ".1%"),
            ("perplexity", "perplexity", ",.4~g"), ("perplexity_low", "95 % from", ",.4~g"),
            ("perplexity_high", "to", ",.4~g"), ("removed", "parameters removed", ".1%"),
            ("answer_nll", "answer NLL", ".3f")]  # fmt: skip
    tables = ["sweep", "accuracy", "perplexity", "costs"]
    if not reached.asks:
        tables.remove("accuracy")
        tips = [tip for tip in tips if tip[0] not in _OF_QUESTIONS]
        points, drawn = (
            [{key: value for key, value in point.items() if key not in _OF_QUESTIONS} for point in shown]
            for shown in (points, drawn)
        )
    methods, variants = ({point[key] for point in drawn} for key in ("method", "variant"))
    common = {"x": ("merges", "layers merged (K)"), "series": "method", "dash": "variant", "tips": tips}
    merges = drawn[-1]["merges"]
    told = f"{plural(len(methods), 'method')} and {plural(len(variants), 'variant')} at up to {merges} merges."
    views = [_accuracies(drawn, base, told, common)] if reached.asks else []
    cut = False
    if any(point["perplexity"] for point in drawn):
        view, cut = _perplexities(drawn, base, told, common)
        views.append(view)
    else:
        tables.remove("perplexity")
    if not views:
        return []
    title = f"{' and '.join(table for table in tables if table in _DRAWN).capitalize()} against compression"
    caption = "Click a method in the legend to highlight it. Thin bars are 95 % intervals." + "".join(
        f" {meaning}"
        for word, meaning in _VARIANTS.items()
        if any(part.startswith(word) for variant in variants for part in variant.split(", "))
    )
    if cut:
        caption += f" Perplexities above {RUINED:g} times the unmerged model's are not drawn; the table below has them."
    return [figure_of(reached.run, title, caption, views, points, *tables, columns=len(views))]


def _accuracies(drawn: list[Row], base: Row | None, told: str, common: dict[str, Any]) -> View:
    return figures.lines(
        drawn,
        f"Accuracy against the number of merged layers: {told}",
        y=("accuracy", "accuracy"),
        form=figures.SHARES,
        interval=("low", "high"),
        rule=None if base is None else (base["accuracy"], "unmerged"),
        title="Accuracy",
        **common,
    )


def _perplexities(drawn: list[Row], base: Row | None, told: str, common: dict[str, Any]) -> tuple[View, bool]:
    """Their drawing, and whether those of ruined models are left out of it so that the others can be told apart."""
    known = [point for point in drawn if point["perplexity"]]
    unmerged = None if base is None else base["perplexity"]
    limit = RUINED * unmerged if unmerged else None
    within = [point for point in known if limit and point["perplexity"] <= limit]
    shown, cut = within or known, 0 < len(within) < len(drawn)
    view = figures.lines(
        shown,
        f"Perplexity on plain text against the number of merged layers: {told}",
        y=("perplexity", "perplexity on plain text (log scale)"),
        form="~s",
        log=True,
        interval=("perplexity_low", "perplexity_high") if all(map(_known, shown)) else None,
        rule=(unmerged, "unmerged") if unmerged else None,
        most=limit if cut else None,
        title="Perplexity, lower is better",
        order=[*dict.fromkeys(point["method"] for point in drawn)],
        **common,
    )
    return view, cut


def _everything(points: list[Row]) -> Table:
    speed = any(point["tokens_per_second"] for point in points)
    asks = any(point["accuracy"] is not None for point in points)
    header = ["merged", "method", "variant", "parameters removed"]
    read = _columns(points)
    header += [*(["accuracy [95 %]", "mean over subjects", "answer NLL"] if asks else []), *(name for name, _ in read)]
    cells = tuple(
        (
            str(point["merges"]),
            point["method"],
            point["variant"],
            percent(point["removed"]),
            *([_share(point)] if asks else []),
            *([percent(point["macro"]), value(point["answer_nll"])] if asks else []),
            *(cell(point) for _, cell in read),
            *([value(point["tokens_per_second"], 1)] if speed else []),
        )
        for point in points
    )
    return Table(
        f"All {plural(len(points), 'point')}",
        tuple(header + (["tokens/s"] if speed else [])),
        cells,
        words=(1, 2),
        folded=True,
    )
