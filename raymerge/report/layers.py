"""How alike layers are: heat maps beside their null, correlations beside their ceiling, influence, sensitivity."""

from __future__ import annotations

import math

import numpy as np

from raymerge import findings, summary
from raymerge.report import figures
from raymerge.report.asked import figure_of
from raymerge.report.content import FOUND, Block, Figure, Section, Table, Text, View
from raymerge.report.reached import missing
from raymerge.report.wording import NONE, count, listed, percent, plural, value
from raymerge.schemas import Row
from raymerge.tables import IMPORTED, RunDirectory, colour_scale, correlation_ceiling, correlation_digits

_MAPS = 12  # subsets that are drawn; the rows of 57 matrices of 80 layers made a page of 40 MB
_PAIRS = 60  # correlations that are drawn with their intervals


#: What a similarity of 1 means, and whether there is more than 1.
_MEASURES = {
    "npib": "npib: the mean mutual information of a coordinate of one layer's map and one of the other's, over the "
    "geometric mean of the layers' entropies; it has no upper bound",
    "gaussian": "gaussian: the mutual information that two layers' maps would have as normal variables, over the "
    "geometric mean of the layers' entropies; it has no upper bound, and a layer's with itself is set to 1",
    "cosine": "cosine: the mean cosine between the states of a prompt at the two layers; 1 is the same direction",
    "cka": "cka: how alike the two layers place the prompts to each other, from 0 to 1 (linear centred kernel "
    "alignment)",
}


def subset_name(row: Row, suffix: str = "") -> str:
    """How the page calls a row's subset."""
    subset, language = row[f"subset{suffix}"], row[f"language{suffix}"]
    return subset if language == IMPORTED else f"{subset} ({language})"


def answer(run: RunDirectory) -> Section:
    """Is there structure above noise, and do subsets differ by more than noise?"""
    if not run.has("similarity"):
        return Section("The answer", (missing(run, "similarity"),))
    blocks: list[Block] = [Text(sentence) for sentence in in_words(run)]
    header, cells = summary.similarity_table(run)
    # What all subsets share stands above the table, as in the terminal.
    shared = [i for i in range(1, 4) if len({row[i] for row in cells}) == 1]
    common = ", ".join(f"{header[i]} {cells[0][i]}" for i in shared if cells[0][i] != IMPORTED)
    known = {row[header.index("null")] for row in cells} != {NONE}  # of imported matrices no noise is
    kept = [i for i in range(len(header)) if i not in shared and (known or {row[i] for row in cells} != {NONE})]
    measures = dict.fromkeys(row[header.index("measure")] for row in cells)
    meant = "".join(f". {_MEASURES[measure]}" for measure in measures if measure in _MEASURES)
    noise = (
        ". Unrelated layers: the mean after the prompts of one layer are shuffled against the other's. By chance 5 % "
        "of pairs lie above noise; that share does not count pairs with a degenerate layer"
        if known
        else ""
    )
    words = {
        "n": "prompts",
        "null": "unrelated layers",
        "above null %": "pairs above noise, %",
        "neighbours": "neighbouring layers",
        "degenerate": "degenerate layers",
    }
    blocks.append(
        Table.of(
            f"Mean similarity off the diagonal, by subset of prompts{f' ({common})' if common else ''}{meant}{noise}",
            [words.get(header[i], header[i]) for i in kept],
            [[row[i] for i in kept] for row in cells],
            words=tuple(range(4 - len(shared))),
        )
    )
    if run.has("similarity_correlation"):
        _, cells = summary.correlation_table(run)
        blocks.append(
            Table.of(
                "Correlations between the subsets' matrices. Ceiling: the correlation that two equal patterns would "
                "show, given the noise",
                ("subsets", "diagonal included", "off the diagonal", "95 % interval", "ceiling"),
                cells,
                folded=len(cells) > 6,
            )
        )
    return Section("The answer", tuple(blocks))


def in_words(run: RunDirectory) -> list[str]:
    """Whether the matrices have structure above noise, and whether subsets differ, in a few sentences each."""
    return [sentence for sentence in (_structure(run), _agreement(run)) if sentence]


def _structure(run: RunDirectory) -> str:
    rows = [row for row in run.read("similarity").to_pylist() if row["layer_i"] < row["layer_j"]]
    known = [row for row in rows if row["value"] is not None and row["null_p95"] is not None]
    if not known:
        return "The matrices come without their prompts, so nothing here says how much of them is noise."
    degenerate = findings.degenerate_layers(run)
    known = [row for row in known if not _is_noise(row, degenerate)]
    if not known:
        return (
            "The diffusion maps of all layers are degenerate: their bandwidth is far from the distances between "
            "prompts, so they show only noise. Layers share that noise, so their similarity can still be far above "
            "that of unrelated layers: the maps say nothing about the model."
        )
    share, noise = sum(row["value"] > row["null_p95"] for row in known) / len(known), _named(degenerate)
    left_out = (
        " Pairs with a layer whose diffusion map is degenerate, so that its similarities are noise, do not count "
        f"({noise}); the correlations between subsets include them."
    )
    subsets = len({(row["subset"], row["language"]) for row in rows})
    ours, theirs = (value(sum(row[name] for row in known) / len(known)) for name in ("value", "null_mean"))
    verdict = (
        "the layers are related, and the maps show more than noise"
        if share > 0.5
        else "much of what the maps show is noise"
        if share > 0.1
        else "the maps cannot be told from noise"
    )
    return (
        f"In {percent(share, 0)} of {'the' if noise else 'all'} pairs of layers, over {plural(subsets, 'subset')} of "
        f"prompts, similarity is above the 95th percentile of unrelated layers: {verdict}. On average it is {ours}, "
        f"that of unrelated layers {theirs}.{left_out if noise else ''}"
    )


def _is_noise(row: Row, degenerate: dict[tuple[str, str], set[int]]) -> bool:
    """Whether a pair of layers has one whose map is degenerate."""
    return not degenerate[row["subset"], row["language"]].isdisjoint((row["layer_i"], row["layer_j"]))


def _named(degenerate: dict[tuple[str, str], set[int]]) -> str:
    """How many layers of which subsets are degenerate; "" where none are."""
    return listed(
        [
            f"{plural(len(layers), 'layer')} of {subset_name({'subset': subset, 'language': language})}"
            for (subset, language), layers in degenerate.items()
            if layers
        ]
    )


def _agreement(run: RunDirectory) -> str:
    rows = [row for row in run.read("similarity_correlation").to_pylist() if row["ci_low"] is not None]
    n_layers = len({row["layer_i"] for row in run.read("similarity", ["layer_i"]).to_pylist()})
    noise = {key for key, layers in findings.degenerate_layers(run).items() if len(layers) > n_layers - 2}
    rows = [row for row in rows if not any((row[f"subset_{s}"], row[f"language_{s}"]) in noise for s in "ab")]
    bounded = [(row, bound) for row in rows if (bound := correlation_ceiling(row)) is not None]
    if not bounded:
        return ""
    reach = [row for row, bound in bounded if row["ci_high"] >= bound]
    languages = {row[f"language_{side}"] for row, _ in bounded for side in "ab"}
    named = subset_name if len(languages) > 1 else lambda row, side: row[f"subset{side}"]
    gaps = sorted((row["ci_high"] - bound, named(row, "_a"), named(row, "_b")) for row, bound in bounded)
    below = [f"{a} and {b}" for gap, a, b in gaps if gap < 0]
    r = [row["pearson_off_diagonal"] for row, _ in bounded]
    digits = correlation_digits(r)
    text = (
        f"The subsets' matrices correlate at {min(r):.{digits}f} to {max(r):.{digits}f} off the diagonal. In "
        f"{count(len(reach))} of {plural(len(bounded), 'pair')} the 95 % interval reaches the ceiling set by noise: "
        "these prompts cannot tell such subsets apart."
    )
    if not below:
        return text
    # Intervals are two-sided: of 1,596 pairs that do not differ, some 40 lie below.
    chance = f" (by chance alone up to {count(len(bounded) // 40)} pairs would be)" if len(bounded) >= 80 else ""
    return f"{text} Below their ceiling{chance}: {listed(below, 4 if chance else 8)}."


def maps(run: RunDirectory) -> Section:
    """A heat map a subset, on one scale of colours; the run has a similarity."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in run.read("similarity").to_pylist():
        kinds.setdefault((row["measure"], row["embedding"]), []).append(row)
    blocks: list[Block] = [_maps(run, *kind, mine) for kind, mine in kinds.items()]
    influence = run.read("block_influence").to_pylist()
    if influence:
        blocks.append(_influence(run, influence))
    return Section("Similarity of layers", tuple(blocks))


def _maps(run: RunDirectory, measure: str, embedding: str, stored: list[Row]) -> Figure:
    degenerate = findings.degenerate_layers(run)
    subsets = list(dict.fromkeys(map(subset_name, stored)))
    shown = [row for row in stored if subset_name(row) in subsets[:_MAPS]]
    rows = [_cell(row, degenerate) for row in _both_halves(shown)]
    layers = 1 + max(row["layer_i"] for row in rows)
    domain = colour_domain(rows)
    named = measure if embedding in ("none", measure) else f"{measure}, {embedding} embedding"
    views: list[View] = []
    for subset in subsets[:_MAPS]:
        mine = [row for row in rows if row["subset"] == subset]
        off = [row["value"] for row in mine if row["value"] is not None and row["layer_i"] != row["layer_j"]]
        near = [row["value"] for row in mine if row["value"] is not None and abs(row["layer_i"] - row["layer_j"]) == 1]
        noise = [row for row in mine if row["above"] == "no" and row["layer_i"] != row["layer_j"]]
        told = (
            f"{subset}: heat map of the similarity of {layers} layers, mean {_mean(off)} off the diagonal, "
            f"{_mean(near)} between neighbours; {plural(len(noise) // 2, 'pair')} not above noise or of a degenerate "
            "layer."
        )
        views.append(
            figures.heat_map(
                told,
                subset=subset,
                domain=domain,
                layers=layers,
                title=subset,
                height=380 if len(subsets) < 3 else 280,
                legend=not views,
            )
        )
    left = _left_out(subsets, "similarity")
    dots = (
        " White dot: not above the 95th percentile of unrelated layers, or a layer whose diffusion map is degenerate."
    )
    dots = dots if any(row["above"] for row in rows) else ""  # of imported matrices nothing is known
    return figure_of(
        run,
        f"Similarity of every pair of layers ({named})",
        f"All maps share one scale, from {value(domain[0], 2)} to {value(domain[1], 2)}; values beyond it, such as a "
        f"layer's with itself, have the colour of its end.{dots} Grey: undefined.{left}",
        views,
        rows,
        "similarity",
        columns=2 if len(views) < 3 else 3,
    )


def _left_out(subsets: list[str], table: str) -> str:
    """That only the first subsets are drawn, where there are more."""
    if len(subsets) <= _MAPS:
        return ""
    return f" Only the first {_MAPS} of {len(subsets)} subsets are here; table {table} has all."


def _mean(values: list[float]) -> str:
    return value(float(np.mean(values)), 2) if values else "undefined"


def _both_halves(rows: list[Row]) -> list[Row]:
    """All cells of the matrices: a pair that is stored in one order only stands for both."""
    stored = {(row["subset"], row["language"], row["layer_i"], row["layer_j"]) for row in rows}
    turned = [
        row | {"layer_i": row["layer_j"], "layer_j": row["layer_i"]}
        for row in rows
        if (row["subset"], row["language"], row["layer_j"], row["layer_i"]) not in stored
    ]
    return rows + turned


def _cell(row: Row, degenerate: dict[tuple[str, str], set[int]]) -> Row:
    known = row["value"] is not None and row["null_p95"] is not None
    noise = _is_noise(row, degenerate)
    notes = [row["note"], "degenerate: noise" if noise else None]
    return {
        "subset": subset_name(row),
        "layer_i": row["layer_i"],
        "layer_j": row["layer_j"],
        "value": row["value"],
        "null_p95": row["null_p95"],
        "ci_low": row["ci_low"],
        "ci_high": row["ci_high"],
        "above": "" if not known else "yes" if row["value"] > row["null_p95"] and not noise else "no",
        "note": "; ".join(note for note in notes if note),
        # a little over the neighbours, so that no seam shines through
        "left": row["layer_j"] - 0.5,
        "right": row["layer_j"] + 0.52,
        "bottom": row["layer_i"] - 0.5,
        "top": row["layer_i"] + 0.52,
    }


def colour_domain(rows: list[Row]) -> tuple[float, float]:
    """Ends of the scale: those of the values off the diagonal, or of all where only the diagonal is defined."""
    values = [row["value"] for row in rows if row["value"] is not None and row["layer_i"] != row["layer_j"]]
    values = values or [row["value"] for row in rows if row["value"] is not None]
    return colour_scale(values) if values else (0.0, 1.0)


def _influence(run: RunDirectory, stored: list[Row]) -> Figure:
    rows = [
        {"subset": subset_name(row), "layer": row["layer"], "value": row["value"], "samples": row["n_samples"]}
        for row in sorted(stored, key=lambda row: row["layer"])
    ]
    least = min(rows, key=lambda row: row["value"])
    subsets = list(dict.fromkeys(row["subset"] for row in rows))
    rows = [row for row in rows if row["subset"] in subsets[:_MAPS]]
    told = f"Least: layer {least['layer']} on {least['subset']}, {least['value']:.3g}."
    log = all(row["value"] > 0 for row in rows)  # it is 0 of a layer that changes nothing, or by rounding below
    view = figures.lines(
        rows,
        f"Block influence by layer, one line per subset. {told}",
        x=("layer", "decoder layer"),
        y=("value", f"1 - mean cosine{' (log scale)' if log else ''}"),
        series="subset",
        tips=[("subset", "subset"), ("layer", "layer"), ("value", "block influence", ".3~g")],
        log=log,
        height=240,
    )
    return figure_of(
        run,
        "Block influence: how much a layer changes the states",
        "One minus the mean cosine between the states that enter and leave a layer: how far the layer turns them. A "
        f"small change does not mean that dropping the layer costs little. {told} Click a subset in the legend to "
        f"highlight it.{_left_out(subsets, 'block_influence')}",
        [view],
        rows,
        "block_influence",
    )


def correlations(run: RunDirectory) -> Section:
    """Every pair of subsets with its interval and its ceiling; the run has such pairs."""
    title, stored = "Do subsets differ?", run.read("similarity_correlation").to_pylist()
    languages = {row[f"language_{side}"] for row in stored for side in "ab"}
    named = subset_name if len(languages) > 1 else lambda row, side: row[f"subset{side}"]
    rows = [
        {
            "pair": f"{named(row, '_a')} – {named(row, '_b')}",
            "role": FOUND,
            "r": row["pearson_off_diagonal"],
            "low": row["ci_low"],
            "high": row["ci_high"],
            "ceiling": correlation_ceiling(row),
            "pearson": row["pearson"],
        }
        for row in stored
        if math.isfinite(row["pearson_off_diagonal"])
    ]
    rows.sort(key=lambda row: -row["r"])
    if not rows:
        return Section(title, (Text("No correlation is defined."),))
    top, last = rows[0], rows[-1]
    digits = correlation_digits(row["r"] for row in rows)
    told = f"Highest: {top['pair']}, {top['r']:.{digits}f}. Lowest: {last['pair']}, {last['r']:.{digits}f}."
    shown = {row["pair"] for row in rows[: _PAIRS // 2] + rows[len(rows) - _PAIRS // 2 :]}
    drawn = [row for row in rows if row["pair"] in shown]
    if noise := _named(findings.degenerate_layers(run)):
        told += f" Degenerate layers, whose similarities are noise that layers and subsets share, count too: {noise}."
    half = _PAIRS // 2
    left = (
        f" Only the {half} highest and the {half} lowest of {count(len(rows))} are drawn."
        if len(drawn) < len(rows)
        else ""
    )
    tips = [("pair", "subsets"), ("r", "r off the diagonal", ".4f"), ("low", "95 % from", ".4f"), ("high", "to", ".4f"),
            ("ceiling", "ceiling", ".4f"), ("pearson", "r, diagonal included", ".4f")]  # fmt: skip
    bounded = any(row["ceiling"] is not None for row in rows)
    view = figures.intervals(
        drawn,
        f"Correlations of {plural(len(drawn), 'pair')} of subsets{' with intervals and ceilings' * bounded}. {told}",
        name="pair",
        value="r",
        axis="Pearson correlation off the diagonal",
        tips=tips,
        tick="ceiling",
    )
    figure = figure_of(
        run,
        "Correlations between the subsets' matrices, with their ceilings"
        if bounded
        else "Correlations between the subsets' matrices",
        "Off the diagonal, with 95 % intervals. The vertical tick is the ceiling: the correlation of two equal "
        "patterns, weakened by the noise of both matrices. If an interval reaches it, these prompts cannot tell the "
        f"two subsets apart. {told}{left} Translations of the same questions share their noise and may exceed the "
        "ceiling."
        if bounded
        else f"Off the diagonal. {told}{left}",
        [view],
        drawn,
        "similarity_correlation",
    )
    return Section(title, (figure,))


def sensitivity(run: RunDirectory) -> Section:
    """Agreement with the reference setting, one setting at a time."""
    if not run.has("sensitivity"):
        return Section("The answer", (missing(run, "sensitivity"),))
    rows = [
        {
            "setting": f"{row['parameter']} = {row['setting']}",
            "role": FOUND,
            "r": row["pearson_off_diagonal"],
            "low": row["pearson_off_diagonal"],
            "high": row["pearson_off_diagonal"],
            "subset": subset_name(row),
            "same": row["plan_overlap"],
            "moves": row["alpha_max_difference"],
            "note": row["note"] or "",
        }
        for row in run.read("sensitivity").to_pylist()
        if not row["reference"]
    ]
    header, cells = summary.sensitivity_table(run)
    every = Table.of("Every setting, averaged over subsets", header, cells, words=(0, 1, 5))
    known = [row for row in rows if row["r"] is not None]
    return Section("The answer", (*(_settings(run, rows, known) if known else ()), every))


def _settings(run: RunDirectory, rows: list[Row], known: list[Row]) -> tuple[Text, Figure]:
    """What changes the matrix most, and the drawing of all settings; known: rows with a correlation.

    The settings of the reference and thresholds, which leave the matrix as it is, would make a mean of the merges that
    stay the same too good.
    """
    own = run.config["similarity"]
    unchanged = {f"{key} = {own[key]}" for key in own}
    low = min(known, key=lambda row: row["r"])
    shares = [row["same"] for row in rows if row["same"] is not None
              and row["setting"] not in unchanged and not row["setting"].startswith("threshold")]  # fmt: skip
    mean = percent(sum(shares) / len(shares), 0) if shares else ""
    same = f"; over all changed settings, {mean} of the merges stay the same" if shares else ""
    told = f"The matrix of {low['setting']} agrees least with the reference (r = {value(low['r'], 2)}){same}."
    tips = [("setting", "setting"), ("subset", "subset"), ("r", "r off the diagonal", ".3f"),
            ("same", "same merges", ".0%"), ("moves", "largest alpha change", ".3f"), ("note", "note")]  # fmt: skip
    view = figures.intervals(
        known,
        f"Correlation with the reference matrix for {plural(len(known), 'setting')}. {told}",
        name="setting",
        value="r",
        axis="correlation off the diagonal",
        tips=tips,
    )
    figure = figure_of(
        run,
        "Agreement of each setting's matrix with the reference",
        "One setting is changed at a time; 1 means the same pattern as the reference matrix, off the diagonal."
        + (" Settings without a mark are undefined; the table says why." if len(known) < len(rows) else ""),
        [view],
        rows,
        "sensitivity",
    )
    return Text(told), figure
