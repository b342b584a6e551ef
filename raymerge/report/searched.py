"""What a search found and how: the coefficients of its plans, its candidates in order, its descents."""

from __future__ import annotations

from raymerge import findings, summary
from raymerge.objectives import above_ceiling, descended, is_minimised
from raymerge.report import figures
from raymerge.report.asked import figure_of
from raymerge.report.content import ROLES, Block, Figure, Section, Table, role_of
from raymerge.report.reached import Reached, missing
from raymerge.report.wording import listed, percent, plural
from raymerge.schemas import Row
from raymerge.statistics import without_far_worse
from raymerge.tables import RunDirectory

_SHOWN = 16  # plans of which the coefficients are drawn


def coefficients(reached: Reached) -> Section:
    """Alpha by step, and the share that every original layer has in the merged one."""
    run, title = reached.run, "The merge coefficients"
    steps = [row for row in reached.plans if row["step"] is not None]
    if not steps or not run.has("coefficients"):
        return Section(title, (missing(run, "plans", "coefficients"),))
    shown = list(dict.fromkeys(row["plan_id"] for row in steps))[-_SHOWN:]
    alphas = [
        {
            "plan": reached.labels[row["plan_id"]],
            "matrix": row["matrix"] or "",
            "series": f"{row['plan_id']} {row['matrix'] or ''}",
            "step": row["step"],
            "merge": f"{row['remove']} into {row['into']}",
            "alpha": row["alpha"],
            "role": role_of(reached.kinds[row["plan_id"]]),
            "label": "",
        }
        for row in _once(steps)
        if row["plan_id"] in shown
    ]
    _label_ends(alphas)
    alphas.sort(key=lambda row: -ROLES.index(row["role"]))  # what was found is drawn last, on top
    blocks: list[Block] = [_alphas(reached, alphas, steps, len(shown))]
    weights = _weights(reached, shown)
    if weights:
        heavy = _heaviest(weights, reached.best)
        blocks.append(
            figure_of(
                run,
                "How much of each original layer is left in the merged layer",
                "The coefficients of successive steps multiply. After all steps every original layer has one effective "
                "coefficient in the layer that it was merged into; these sum to 1. Layers that no plan merges are not "
                "shown." + heavy,
                [figures.weight_cells(weights, f"Effective coefficients of original layers, a row per plan.{heavy}")],
                weights,
                "coefficients",
            )
        )
    return Section(title, tuple(blocks))


def _alphas(reached: Reached, rows: list[Row], steps: list[Row], plans: int) -> Figure:
    """Alpha by step of so many plans; rows: what is drawn, steps: rows of `plans`."""
    best, told = reached.best, ""
    if best is not None:
        own = [row["alpha"] for row in _once(steps) if row["plan_id"] == best["plan_id"] and row["matrix"] is None]
        told = f" {best['label']}: {listed([f'{alpha:.2f}' for alpha in own], 20)}." if own else ""
    return figure_of(
        reached.run,
        "Alpha of every merge step",
        "A step merges one layer into another: alpha times the kept layer's weights plus (1 - alpha) times the "
        "removed layer's. Alpha 1 drops the removed layer; alpha 0 drops the kept layer's weights."
        + (" Fainter lines are coefficients of single matrices." if any(row["matrix"] for row in steps) else "")
        + told,
        [figures.alpha_lines(rows, f"Alpha by merge step for {plans} plans.{told}")],
        rows,
        "plans",
    )


def _label_ends(alphas: list[Row]) -> None:
    """Write the plans' names beside the last step of their lines, those of lines that end together in one label."""
    last = max(row["step"] for row in alphas)
    ends = [row for row in alphas if row["step"] == last and not row["matrix"]]
    for group in _near([(row["plan"], row["alpha"]) for row in ends], [0.0, 1.6]):
        top, _ = group[-1]  # above all their lines
        next(row for row in ends if row["plan"] == top)["label"] = _names(group)


def _once(steps: list[Row]) -> list[Row]:
    """Rows of `plans` without those that stand there again under another name of the same plan."""
    return list({(row["plan_id"], row["matrix"], row["step"]): row for row in steps}.values())


def _weights(reached: Reached, shown: list[str]) -> list[Row]:
    rows = [row for row in reached.run.read("coefficients").to_pylist() if row["plan_id"] in shown]
    n_layers = max((row["source_layer"] for row in rows), default=-1) + 1
    touched = {
        row["source_layer"] for row in rows if row["coefficient"] < 1 or row["kept_layer"] != row["source_layer"]
    }
    for plan_id in shown:  # a dropped layer has no row
        mine = {row["source_layer"] for row in rows if row["plan_id"] == plan_id}
        touched |= {layer for layer in range(n_layers) if layer not in mine}
    # beside the layers that a plan merges, those into which it merges them
    touched |= {row["kept_layer"] for row in rows if row["source_layer"] in touched}
    own = {(row["plan_id"], row["source_layer"], row["matrix"]): row for row in rows}
    series = dict.fromkeys((row["plan_id"], row["matrix"]) for row in rows)
    split_up = {plan_id for plan_id, matrix in series if matrix is not None}
    cells = []
    for plan_id, matrix in sorted(series, key=lambda key: (shown.index(key[0]), key[1] or "")):
        name = reached.labels[plan_id]
        if matrix is not None or plan_id in split_up:
            name = f"{matrix.rsplit('.', 1)[-1] if matrix else 'others'}, {name}"
        for layer in sorted(touched):
            row = own.get((plan_id, layer, matrix))
            if row is None and matrix is not None and (plan_id, layer, None) in own:
                row = own[plan_id, layer, None]
            kept, weight = (None, 0.0) if row is None else (row["kept_layer"], row["coefficient"])
            cells.append(figures.weight_row(name, layer, weight, kept, plan_id))
    return cells


def _heaviest(weights: list[Row], best: Row | None) -> str:
    if best is None:
        return ""
    mine = [row for row in weights if row["plan_id"] == best["plan_id"]]
    # Layers that the plan leaves alone are shown where other plans merge them; they are all of themselves.
    merged = {row["kept"] for row in mine if row["weight"] >= 0.005 and row["kept"] != str(row["layer"])}
    own: dict[int, float] = {}
    for row in mine:
        if row["kept"] in merged:
            own.setdefault(row["layer"], row["weight"])
    top = [(k, v) for k, v in sorted(own.items(), key=lambda item: -item[1])[:3] if v >= 0.005]
    told = ", ".join(f"layer {k} ({percent(v, 0)})" for k, v in top)
    return f" Largest coefficients of {best['label']}: {told}." if told else ""


def search(reached: Reached) -> Section:
    """Every candidate in order, the best so far, the controls; and the descents, where there are some."""
    run, title = reached.run, "The search"
    trials = run.read("trials").to_pylist()
    ceiling = run.config.get("search", {}).get("perplexity_ceiling")
    judged = [
        row for row in trials if row["status"] == "ok" and row["value"] is not None and not above_ceiling(row, ceiling)
    ]
    if not any(row["searcher"] != "controls" for row in judged):
        return Section(title, (missing(run, "trials"),))
    objective = judged[0]["objective"]
    blocks: list[Block] = [_progress(reached, judged, objective)]
    history = run.read("gradient_history").to_pylist()
    if history:
        text_kl = run.config.get("gradient", {}).get("text_kl", 0.0)
        blocks.append(_descents(run, history, descended(objective, text_kl)))
    header, cells = summary.worker_table(run)
    if cells:
        pace = ". ".join(summary.pace_lines(run))
        caption = f"Share of the last call's time that each worker spent scoring. {pace}"
        blocks.append(Table.of(caption, header, cells, words=(0, 1), folded=True))
    return Section(title, tuple(blocks))


def _progress(reached: Reached, judged: list[Row], objective: str) -> Figure:
    """The value of every candidate in order, of the controls, and the best so far; judged: rows of `trials`."""
    run, lower = reached.run, is_minimised(objective)
    candidates = _candidates(judged, lower)
    # Of the plans that keep one layer only the best is a control, and has a label.
    scored = [row for row in judged if row["searcher"] == "controls"]
    controls = [row for row in scored if row["plan_id"] in reached.labels]
    left = " (of the plans that keep one layer, the best alone)" if len(controls) < len(scored) else ""
    limits, far = _limits(candidates, controls, lower)
    empty = dict.fromkeys(candidates[0], None)
    named = [(reached.labels[row["plan_id"]], row["value"]) for row in controls]
    rows = candidates + [
        empty | {"kind": "control", "searcher": "controls", "value": number, "label": label}
        for label, number in _together(named, list(limits or (row["value"] for row in judged)))
    ]
    lines = ". ".join(summary.search_lines(run))
    on = "questions" if findings.judges_answers(run) else "text"
    other = "of the same split as the report's" if findings.chosen_on(run, reached.split) else "not the report's"
    beyond = f"{plural(far, 'far worse candidate')} beyond the axis: zoom out (−) to see. " if far else ""
    view = figures.progress(
        rows,
        f"{objective} of {plural(len(candidates), 'candidate')} in the order in which they were tried. {lines}.",
        objective=objective,
        limits=limits,
    )
    return figure_of(
        run,
        "Objective of every candidate",
        f"Measured on the search {on}, {other} ({'lower' if lower else 'higher'} is better). Solid line: the best so "
        f"far. Dashed lines: controls{left}. {beyond}{lines}.",
        [view],
        rows,
        "trials",
    )


def _candidates(judged: list[Row], lower: bool) -> list[Row]:
    """The searchers' candidates in order, each with the best value so far of its searcher. The searchers proper come
    before random candidates: the accent is theirs."""
    better = min if lower else max
    rows = []
    for searcher in dict.fromkeys(row["searcher"] for row in judged if row["searcher"] != "controls"):
        best = None
        for row in sorted((row for row in judged if row["searcher"] == searcher), key=lambda row: row["iteration"]):
            best = row["value"] if best is None else better(best, row["value"])
            rows.append(
                {
                    "kind": "candidate",
                    "searcher": searcher,
                    "number": row["iteration"] + 1,
                    "value": row["value"],
                    "best": best,
                    "label": "",
                    "plan_id": row["plan_id"],
                    "block": row["block"],
                    "alphas": ", ".join(f"{alpha:.3f}" for alpha in row["alphas"]),
                    "perplexity": row["perplexity"],
                    "seconds": row["seconds"],
                }
            )
    return sorted(rows, key=lambda row: row["searcher"] == "random")


def _limits(candidates: list[Row], controls: list[Row], lower: bool) -> tuple[tuple[float, float] | None, int]:
    """Limits of an axis without the candidates that are far worse than the bulk, and how many are beyond it: none where
    a control is as bad, since every control is shown."""
    values = [row["value"] for row in candidates]
    shown = [*without_far_worse(values, lower=lower), *(row["value"] for row in controls)]
    low, high = min(shown), max(shown)
    far = sum(not low <= value <= high for value in values)
    return ((low, high), far) if far else (None, 0)


def _together(controls: list[tuple[str, float]], every: list[float]) -> list[tuple[str, float]]:
    """Controls whose labels would cover each other under one label, at the mean of their values."""
    return [(_names(group), sum(number for _, number in group) / len(group)) for group in _near(controls, every)]


def _near(named: list[tuple[str, float]], every: list[float]) -> list[list[tuple[str, float]]]:
    """Names with their values, ascending, those apart whose labels would not cover each other."""
    near = 0.045 * (max(every) - min(every))  # a line of text in a drawing of 300 pixels
    groups: list[list[tuple[str, float]]] = []
    for name, number in sorted(named, key=lambda item: item[1]):
        if groups and number - groups[-1][0][1] <= near:
            groups[-1].append((name, number))
        else:
            groups.append([(name, number)])
    return groups


def _names(group: list[tuple[str, float]]) -> str:
    return ", ".join(dict.fromkeys(name for name, _ in group))


def _descents(run: RunDirectory, history: list[Row], of_what: str) -> Figure:
    rows = []
    for row in history:
        for of, loss in (("training", row["loss"]), ("held out", row["held_out_loss"])):
            if loss is not None:
                rows.append(
                    {
                        "searcher": row["searcher"],
                        "start": row["start"],
                        "series": f"{row['searcher']} {row['start']} {of}",
                        "epoch": row["epoch"],
                        "of": of,
                        "loss": loss,
                    }
                )
    count = len({(row["searcher"], row["start"]) for row in history})
    return figure_of(
        run,
        "Loss of the descents",
        "One line per start. A descent keeps the state of the lowest loss"
        + (" on held-out questions." if any(row["of"] == "held out" for row in rows) else "."),
        [figures.descents(rows, f"Loss by epoch of {plural(count, 'descent')}.", of_what=of_what)],
        rows,
        "gradient_history",
    )
