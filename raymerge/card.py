"""The model card of a merged checkpoint: what was merged and how, what proves it, and what is known of its quality."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from raymerge import findings, summary
from raymerge.checkpoint import Checkpoint
from raymerge.proof import proof_finished
from raymerge.tables import RunDirectory


def model_card(record: dict[str, Any], checkpoint: Checkpoint, *, results: Sequence[str] = ()) -> str:
    """README.md, from merge_plan.json's record. checkpoint: the base model; results: lines of markdown."""
    removed = record["layers_before"] - record["layers_after"]
    share = 100 * record["parameters_removed"] / (record["parameters"] + record["parameters_removed"])
    title = checkpoint.public_name.rpartition("/")[2]
    base = {"base_model": checkpoint.hub_id, "base_model_relation": "merge"} if checkpoint.hub_id else {}
    facts = {"library_name": "transformers"} | base | _terms(checkpoint.directory)
    lines = [
        "---",
        yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).rstrip(),
        "tags: [layer-merging, raymerge]",
        "---",
        f"# {title}, {removed} layer{'' if removed == 1 else 's'} merged away",
        "",
        f"Made by raymerge {record['raymerge']} from a model with identity `{record['base_model_identity']}`. "
        f"{record['layers_before']} decoder layers became {record['layers_after']}, which removes "
        f"{record['parameters_removed'] / 1e6:,.1f} million parameters, {share:.1f} % (plan `{record['plan_id']}`, "
        f"{record['name']}; norms {record['norms']}, biases {record['biases']}, alignment {record['alignment']}"
        + (f", refit {record['refit']['method']}" if "refit" in record else "")
        + ").",
        "",
    ]
    if towers := record["towers"]:
        lines += [
            f"The base is multimodal. What lies beside its language model, {towers['tensors']} tensors of "
            f"{towers['parameters'] / 1e6:,.1f} million parameters, is carried over unchanged. Plans are scored on "
            "text alone.",
            "",
        ]
    if source := record["gguf_source"]:
        lines += [
            f"The base was the GGUF file `{source['file']}` (SHA-256 `{source['sha256']}`), dequantised to "
            f"{source['stored_as'].removeprefix('torch.')}.",
            "",
        ]
    if record["command"]:
        lines += ["```", shlex.join(record["command"]), "```", ""]
    lines += ["## Plan", "", *_plan_lines(record), "", "## Results", ""]
    lines += results or ["Merging layers costs quality, which was not measured here: use `raymerge evaluate`."]
    lines += ["", "## Proof", "", _proof_line(record["proof"]), ""]
    return "\n".join(lines)


def _terms(folder: Path) -> dict[str, Any]:
    """What the front matter of a model's own card says of its licence, which a merge of it keeps."""
    try:
        start, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):  # a model without a card, or with one that says nothing readable
        return {}
    keys = () if start.strip() or not isinstance(found, dict) else ("license", "license_name", "license_link")
    return {key: found[key] for key in keys if key in found}


def _plan_lines(record: dict[str, Any]) -> list[str]:
    lines = [
        f"{record['tensors_changed']} tensors differ from the base's tensors of the same name. `merge_plan.json` lists "
        "by how much, and the effective coefficient of every original layer.",
        "",
        "| step | into | removed | alpha |",
        "|---:|---:|---:|---:|",
        *(f"| {n} | {into} | {remove} | {alpha:.6f} |" for n, (into, remove, alpha) in enumerate(record["steps"])),
    ]
    if "matrix_alphas" in record:
        lines += [
            "",
            "Some matrices have alphas of their own, which are in `merge_plan.json`: `alphas.json` cannot hold them.",
        ]
    if "refit" in record:
        lines += [
            "",
            "The layers at the seams were then fitted to the unmerged model on calibration tokens "
            f"({record['refit']['method']}), so these coefficients alone do not give the weights.",
        ]
    if record["mergekit"] is None:
        lines += ["", "`mergekit.yaml` is the plan as a mergekit configuration, which makes the same weights."]
    else:
        lines += ["", f"There is no mergekit.yaml: {record['mergekit']}."]
    return lines


def _proof_line(proof: dict[str, Any] | None) -> str:
    if proof is None:
        return "None: the saved model was not reloaded (`output.verify` or `--no-verify`)."
    if not proof_finished(proof):
        return f"**Not finished**: {proof['error']}."
    if not proof["passed"]:
        return f"**Failed**: {proof['error']}. Do not use this model."
    return (
        "transformers reloaded the saved model in a fresh process. Its logits differ from those that raymerge scores "
        f"for the plan by at most {proof['max_difference']:.2g} at {proof['positions']} positions (rounding explains "
        f"{proof['tolerance']:.2g}; the largest logit is {proof['largest_logit']:.3g}). {proof['predictions_equal']} "
        f"of {proof['positions']} next tokens are the same, and it generated {proof['generated_tokens']} tokens."
    )


def search_results(run: RunDirectory, plan_id: str, split: str) -> list[str]:
    """Lines of markdown: the plan found beside every control on the report questions, with intervals of 95 %."""
    lines = findings.plan_lines(run, split)
    header, cells = summary.plan_table(lines)
    objectives = sorted({row["objective"] for row in run.read("trials", ["objective"]).to_pylist()})
    caption, own, found = summary.subject_table(run, plan_id)
    asked = findings.asks_questions(run)
    always_a = findings.always_a_share(run, split) if asked else None
    chosen = "**on which the search chose**, so every figure of the found plan is too good."
    same = asked and run.config.get("data", {}).get("search_split") == split
    read = any(line["perplexity"] is not None for line in lines)
    meant = "".join(f"; {name.partition(' [')[0]} is {of}" for name, of in summary.MEANT.items() if name in header)
    tasks, scored = summary.task_table(run)
    compared, pairs = summary.comparison_table(run, plan_id)
    unseen = "by none of which the search chose." if same else "none of which the search saw."
    return [
        (f"On {lines[0]['n']} {split} questions, " if asked else "On plain text, " if read else "On the tasks below, ")
        + (chosen if findings.chosen_on(run, split) else unseen),
        f"The search objective was {', '.join(objectives)}. Every plan except base, the unmerged model, has the same "
        f"number of layers. Intervals are 95 % intervals{meant}.",
        "",
        *_markdown(header, cells),
        "",
        *([f"{summary.PICKS}. Always answering A would score {always_a:.4f}.", ""] if asked else []),
        *([*_markdown(compared, pairs), ""] if pairs else []),
        *([] if asked or read else [*_markdown(tasks, scored), ""]),
        *summary.comparison_notes(run, plan_id),
        *(f"({line}.)" for line in summary.budget_lines(run)),
        *(["", f"{caption}:", "", *_markdown(own, found)] if found else []),
    ]


def _markdown(header: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    # A stroke in a name, as of an alpha file, would end its cell.
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
