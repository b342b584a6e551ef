"""Runs made by hand for the tests of reports: small tables whose numbers are known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from raymerge import rows
from raymerge.comparisons import comparison_rows, text_comparison_rows
from raymerge.context import TextLosses
from raymerge.plan import base_plan, drop_plan, pairs_plan, tail_pairs
from raymerge.tables import RunDirectory, derive_accuracy

LAYERS, MERGES, QUESTIONS, SEARCHED = 6, 3, 120, 40
MANIFEST = {"command": ["raymerge", "search", "made.yaml"], "seeds": {"data": 0, "search": 7}}
PARAMETERS = 1000


FOUND = (0.1, 0.8, 0.3)  # alphas


def plans_of(found="found_bayes", control="fixed_0.62", alphas=FOUND):
    """Plans by a short name: unmerged, dropped, one fixed coefficient, what the search found."""
    pairs = tail_pairs(LAYERS, MERGES)
    return {
        "base": base_plan(LAYERS),
        "drop": drop_plan(LAYERS, MERGES),
        "fixed": pairs_plan(LAYERS, pairs, [0.62] * MERGES, name=control, kind="fixed"),
        "found": pairs_plan(LAYERS, pairs, list(alphas), name=found, kind="found"),
    }


def answer_rows(plan_id, right, answer, rng, *, subjects, split="test"):
    """Rows of `answers` of one plan that gets a share of the questions right."""
    logits = rng.normal(0, 0.5, (len(answer), 4))
    chosen = np.where(rng.uniform(size=len(answer)) < right, answer, (answer + 1) % 4)
    logits[np.arange(len(answer)), chosen] += 3
    return [
        {"plan_id": plan_id, "split": split, "language": "en", "subject": subjects[i % len(subjects)],
         "question_id": f"{i:03}", "content_hash": str(i), "answer": int(answer[i]),
         "predicted": int(logits[i].argmax()),
         **{f"logit_{letter}": float(logits[i, k]) for k, letter in enumerate("abcd")}}
        for i in range(len(answer))
    ]  # fmt: skip


def text_losses(ppl, rng):
    """Two windows of a text with a given perplexity."""
    tokens = np.tile(np.diff(rows.EDGES), (2, 1))
    nll = tokens * np.log(ppl) * rng.uniform(0.8, 1.2, tokens.shape)
    return TextLosses(rows.EDGES, np.arange(2), nll * np.log(ppl) * tokens.sum() / nll.sum(), tokens)


def evaluated(run, plans, right, *, subjects, perplexities, pairs, seed=0):
    """Tables answers, accuracy, plans, coefficients, perplexity, costs and comparisons of plans (by id)."""
    rng = np.random.default_rng(seed)
    answer = np.random.default_rng(99).integers(4, size=QUESTIONS)
    for plan_id in plans:
        run.append("answers", answer_rows(plan_id, right[plan_id], answer, rng, subjects=subjects))
    table = run.read("answers")
    run.replace("accuracy", derive_accuracy(table))
    run.replace("plans", [row for plan_id, plan in plans.items() for row in rows.plan_rows(plan, plan_id)])
    run.replace(
        "coefficients", [row for plan_id, plan in plans.items() for row in rows.coefficient_rows(plan, plan_id)]
    )
    for plan_id, ppl in perplexities.items():
        losses = text_losses(ppl, rng)
        run.append("perplexity", [rows.text_perplexity_row(plan_id, losses, "a text")], part=plan_id)
        run.append("text_losses", rows.text_loss_rows(plan_id, losses), part=plan_id)
    run.replace("costs", [
        {"plan_id": plan_id, "layers": len(plan.kept), "layers_removed": LAYERS - len(plan.kept),
         "parameters": PARAMETERS * len(plan.kept), "parameters_removed": PARAMETERS * (LAYERS - len(plan.kept)),
         "bytes": 2 * PARAMETERS * len(plan.kept)}
        for plan_id, plan in plans.items()
    ])  # fmt: skip
    compared = comparison_rows("test", table, pairs) + text_comparison_rows(run.read("text_losses"), pairs)
    run.replace("comparisons", compared)


def search_run(
    path,
    *,
    found="found_bayes",
    control="fixed_0.62",
    subjects=("algebra", "law"),
    right=None,
    seed=0,
    search_split="validation",
    objective="micro_accuracy",
    alphas=FOUND,
    **options,
):
    """A complete search of three merges: four plans on 120 questions, 8 candidates, 2 descents. options: of plans."""
    config = {
        "model": {"path": "/models/tiny", "dtype": "float32"},
        "data": {"mmlu": "/data", "language": "en", "subjects": list(subjects), "shots": 5, "report_split": "test",
                 "search_split": search_split, "limit_per_subject": 8},
        "plan": {"merges": MERGES, "selection": "tail", "base": "fixed", "ratio": 0.62, "alignment": "none",
                 "norms": "keep", "biases": "keep", **options},
        "search": {"searcher": "bayes", "objective": objective, "candidates": 8, "random_candidates": 2,
                   "perplexity_ceiling": None, "seed": seed},
        "output": {"run": str(path)},
    }  # fmt: skip
    run = RunDirectory.open(path, config, "search")
    run.begin()
    plans = {plan_id: replace(plan, **options) for plan_id, plan in plans_of(found, control, alphas).items()}
    right = right or {"base": 0.9, "drop": 0.3, "fixed": 0.6, "found": 0.62}
    perplexities = {"base": 5.0, "drop": 90.0, "fixed": 40.0, "found": 12.5}
    pairs = [("found", other) for other in ("base", "drop", "fixed")]
    evaluated(run, plans, right, subjects=subjects, perplexities=perplexities, pairs=pairs, seed=seed)
    values = [0.4, 0.55, 0.5, 0.6, 0.58, 0.65, 0.61, 0.64]
    trials = [("bayes", i, "found" if v == max(values) else f"tried{i}", v) for i, v in enumerate(values)]
    trials += [("controls", 0, "drop", 0.45), ("controls", 1, "fixed", 0.56)]
    run.append("trials", [
        {"searcher": searcher, "iteration": i, "batch": 0, "tune_trial": "", "actor": "", "seed": 0, "plan_id": plan,
         "alphas": [0.1, 0.8, 0.3], "objective": objective, "value": value, "accuracy": value, "nll": 1.0,
         "n_questions": SEARCHED, "seconds": 0.1, "status": "ok"}
        for searcher, i, plan, value in trials
    ])  # fmt: skip
    run.append("gradient_history", [
        {"searcher": "gradient_simplex", "start": start, "epoch": epoch, "loss": 2.0 / (1 + epoch + start),
         "held_out_loss": 2.1 / (1 + epoch), "alphas": [0.5] * MERGES}
        for start in range(2) for epoch in range(4)
    ])  # fmt: skip
    run.append("receipts", [
        {"plan_id": plan, "tensor": f"model.layers.2.{matrix}.weight", "max_abs_change": 0.1, "relative_change": change}
        for plan, change in (("fixed", 0.25), ("found", 0.75)) for matrix in ("mlp.up_proj", "self_attn.v_proj")
    ])  # fmt: skip
    run.write_manifest(best={"name": found, "plan_id": "found", "alphas": list(alphas)}, **MANIFEST)
    return run


def sweep_run(path, **right):
    """A compression curve of two methods at one and three merges. right: other accuracies, by plan."""
    settings = {"merges": [1, 3], "methods": ["drop", "fixed:0.5"], "alignments": ["none"], "norms": ["keep"]}
    config = {
        "model": {"path": "/models/tiny"},
        "data": {"report_split": "test", "subjects": "all"},
        "sweep": settings,
    }
    run = RunDirectory.open(path, config, "sweep")
    run.begin()
    plans = {"base": base_plan(LAYERS)}
    points = [{"plan_id": "base", "merges": 0, "method": "base"}]
    for merges in (1, 3):
        plans[f"drop{merges}"] = drop_plan(LAYERS, merges)
        pairs = tail_pairs(LAYERS, merges)
        plans[f"half{merges}"] = pairs_plan(LAYERS, pairs, [0.5] * merges, name=f"fixed_0.5_k{merges}", kind="fixed")
        points += [{"plan_id": f"{plan}{merges}", "merges": merges, "method": method}
                   for plan, method in (("drop", "drop"), ("half", "fixed_0.5"))]  # fmt: skip
    right = {"base": 0.9, "drop1": 0.8, "half1": 0.85, "drop3": 0.4, "half3": 0.42} | right
    ppl = {"base": 5.0, "drop1": 7.0, "half1": 6.5, "drop3": 900.0, "half3": 1200.0}
    pairs = [("half1", "drop1"), ("half3", "drop3")]
    evaluated(run, plans, right, subjects=("a", "b"), perplexities=ppl, pairs=pairs)
    run.replace("sweep", [point | {"alignment": "none", "norms": "keep"} for point in points])
    run.append("receipts", [{"plan_id": plan, "tensor": "model.layers.4.mlp.up_proj.weight", "max_abs_change": 0.1,
                             "relative_change": 0.5} for plan in ("half1", "half3")])  # fmt: skip
    run.write_manifest(command=["raymerge", "sweep"], seeds={"data": 0})
    return run


def similarity_run(path, *, subsets=("medical", "law"), warnings=()):
    """Matrices that fall off with distance between layers, their upper halves above the null, one entry undefined."""
    config = {"model": {"path": "/models/tiny"}, "data": {"mmlu": "/data", "language": "en", "subjects": "all"},
              "similarity": {"subsets": list(subsets), "samples": 40, "split": "test", "measure": "gaussian",
                             "embedding": "diffusion", "sigma": "median", "dimensions": 2, "pooling": "last",
                             "shots": 0, "languages": None}}  # fmt: skip
    run = RunDirectory.open(path, config, "similarity")
    run.begin()
    for number, subset in enumerate(subsets):
        names = {"subset": subset, "language": "en", "measure": "gaussian", "embedding": "diffusion", "n_samples": 40}
        values = {(i, j): 1.0 / (1 + abs(i - j)) + 0.01 * number for i in range(LAYERS) for j in range(LAYERS)}
        undefined = (0, LAYERS - 1)
        run.append("similarity", [
            names | {"layer_i": i, "layer_j": j} | (
                {"note": "no entropy"} if (i, j) == undefined
                else {"value": value, "null_mean": 0.1, "null_p95": 0.3, "ci_low": value - 0.1, "ci_high": value + 0.1}
            )
            for (i, j), value in values.items()
        ])  # fmt: skip
        run.append("block_influence", [{"subset": subset, "language": "en", "layer": i, "value": 0.5 / (1 + i),
                                        "n_samples": 40} for i in range(LAYERS)])  # fmt: skip
    pairs = [(a, b) for i, a in enumerate(subsets) for b in subsets[i + 1 :]]
    run.append("similarity_correlation", [
        {"subset_a": a, "language_a": "en", "subset_b": b, "language_b": "en", "measure": "gaussian", "pearson": 0.95,
         "pearson_off_diagonal": 0.9 - 0.1 * number, "ci_low": 0.7 - 0.1 * number, "ci_high": 0.97 - 0.1 * number,
         "reliability_a": 0.96, "reliability_b": 0.94}
        for number, (a, b) in enumerate(pairs)
    ])  # fmt: skip
    run.write_manifest(command=["raymerge", "similarity"], warnings=list(warnings))
    return run


def imported_run(path, subsets):
    """Matrices of three layers whose samples are not at hand, and the correlations of all pairs, falling."""
    run = RunDirectory.open(path, {"files": []}, "import-similarity")
    run.begin()
    names = {"language": "imported", "measure": "imported", "embedding": "imported", "n_samples": 0}
    run.append("similarity", [
        names | {"subset": subset, "layer_i": i, "layer_j": j, "value": 1.0 - 0.3 * abs(i - j)}
        for subset in subsets for i in range(3) for j in range(3)
    ])  # fmt: skip
    run.append("similarity_correlation", [
        {"subset_a": a, "subset_b": b, "language_a": "imported", "language_b": "imported", "measure": "imported",
         "pearson": 0.99 - 0.01 * n, "pearson_off_diagonal": 0.98 - 0.01 * n}
        for n, (a, b) in enumerate(itertools.combinations(subsets, 2))
    ])  # fmt: skip
    run.write_manifest(command=["raymerge", "import-similarity"])
    return run


def sensitivity_run(path):
    """Three settings of two parameters against the reference."""
    run = RunDirectory.open(
        path, {"model": {"path": "/models/tiny"}, "similarity": {"subsets": ["all"]}}, "sensitivity"
    )
    run.begin()
    common = {"subset": "all", "language": "en"}
    settings = [("reference", "", True, 1.0), ("sigma", "8.0", False, 0.2), ("sigma", "32.0", False, 0.9)]
    run.append("sensitivity", [
        common | {"parameter": parameter, "setting": setting, "reference": reference, "pearson": r,
                  "pearson_off_diagonal": r, "plan_overlap": r, "alpha_max_difference": 0.01}
        for parameter, setting, reference, r in settings
    ] + [common | {"parameter": "samples", "setting": "3", "reference": False, "note": "too few samples"}])  # fmt: skip
    run.write_manifest(command=["raymerge", "sensitivity"])
    return run


def blocks(sections, kind):
    return [block for section in sections for block in section.blocks if isinstance(block, kind)]


def as_dicts(rows):
    return [dict(zip(rows.columns, values, strict=True)) for values in rows.values]


def pct(share, limits=None):
    """A share as the page has it, with its interval."""
    text = f"{100 * share:.1f} %"
    return text if limits is None else f"{text} [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]"


def ppl(row):
    """A perplexity as the page has it, with its interval, from a row of `perplexity`."""
    values = (row["perplexity"], row["ci_low"], row["ci_high"])
    value, low, high = (f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}" for x in values)
    return f"{value} [{low}, {high}]"


def change(row, scale=1, digits=3):
    """A difference with its interval, from a row of `comparisons`."""
    texts = [f"{scale * row[key]:+.{digits}f}".replace("-", "−") for key in ("difference", "ci_low", "ci_high")]
    return "{} [{}, {}]".format(*(text[1:] if not float(text[1:]) else text for text in texts))


def judged(row):
    """What a row of `comparisons` says, with its p."""
    said = "better" if (row["difference"] > 0) == (row["measure"] == "accuracy") else "worse"
    sign = {"better": "▲", "worse": "▼"}[said]
    if row["p_value"] >= 0.05:
        sign, said = "≈", "indistinguishable"
    elif row["p_holm"] >= 0.05:
        sign, said = "≈", f"indistinguishable (uncorrected: {said})"
    ps = (
        "<\u00a00.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}" for p in (row["p_value"], row["p_holm"])
    )
    return "{}\u00a0{}, p\u00a0{}\u00a0({})".format(sign, said, *ps)


def stored_by(run, table, key="plan_id", **where):
    """Key -> row of a table, of the rows with these values."""
    rows = run.read(table).to_pylist()
    return {row[key]: row for row in rows if all(row[name] == value for name, value in where.items())}


def marks(view):
    """(mark, column by channel) of every layer that draws rows."""
    found = []
    for layer in view.spec["layer"]:
        encoding = {channel: value["field"] for channel, value in layer["encoding"].items()
                    if isinstance(value, dict) and "field" in value}  # fmt: skip
        if encoding and "data" not in layer:
            found.append((layer["mark"]["type"], encoding))
    return found


def tips(view):
    """(title, column) of what is said below the pointer."""
    found, *_ = (layer["encoding"]["tooltip"] for layer in view.spec["layer"] if "tooltip" in layer["encoding"])
    return [(tip["title"], tip["field"]) for tip in found]
