"""A plan in mergekit's terms, where it has them: a YAML file that `mergekit-yaml` turns into the same tensors.

Where layers go it has none for a family whose config lists layer types (Qwen2, Qwen2-MoE, Qwen3, Gemma 2 and 3,
VaultGemma, Ministral, SmolLM3, OLMo 3, EXAONE 4, CWM, Cohere 2): of a config mergekit changes nothing but the number of
layers. Nor for one that it has no list of tensors of: it then leaves the number of layers as well. Of the others it
drops, without a word, each tensor that is not in its list, as most families' biases; of Granite 4 it asks for experts,
of Cohere for norms of heads, and of GPT-NeoX for masks, none of which a merge has.
Experts it reads as transformers does, stacked.

mergekit's `linear` averages tensor by tensor, with weights that may depend on the tensor's name; an output slice takes
one layer from each source. Source: mergekit's README, "Merge Configuration", and its parameter filters (substrings of
the tensor's name, the first that fits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from raymerge.checkpoint import Checkpoint
from raymerge.errors import UserError
from raymerge.plan import KeptLayer, MergePlan

#: The base model's folder, where a file names it: the merged model goes to others, and a path of this machine with it.
_FOLDER = "base-model"
# Of mergekit 0.1.5 (mergekit/_data/architectures): families whose tensors it lists, and those of them with all biases
# that they can have. Those of others it infers from the files, without knowing which key counts the layers.
_LISTED = frozenset(
    ("apertus", "arcee", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "mixtral")
    + ("olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm", "starcoder2")
)
_BIASES_LISTED = frozenset({"glm4", "granite", "phi", "qwen2", "stablelm", "starcoder2"})
# Families whose members that raymerge supports, or merges of them, lack what the list asks for.
_ASKED = {
    "cohere": "norms of queries and keys, and this model has none",
    "gpt_neox": "masks and frequencies of attention, which old files hold and merges do not",
    "granitemoehybrid": "experts, and this model has none",
}
_TYPES = {"torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}


class NotExpressible(UserError):
    """A plan that mergekit has no terms for; the message says in one line why."""


def mergekit_yaml(checkpoint: Checkpoint, plan: MergePlan) -> str:
    """The plan as a mergekit configuration (tried with mergekit 0.1.5); NotExpressible where there is none.

    Sums are float32 and rounded once to the stored dtype, as ours are.
    """
    if plan.norms != "keep":
        raise NotExpressible("mergekit cannot multiply norms into matrices (norms fold)")
    if plan.alignment != "none":
        raise NotExpressible(f"mergekit cannot reorder a layer's units before it averages (alignment {plan.alignment})")
    if plan.refit is not None:
        raise NotExpressible(f"mergekit fits nothing to a calibration text (refit {plan.refit.method})")
    if checkpoint.multimodal:
        raise NotExpressible(
            "mergekit takes a multimodal model apart into modules, where it lists its tensors at all, and raymerge "
            "writes plans of language models alone"
        )
    if checkpoint.source is not None:
        raise NotExpressible("mergekit reads no GGUF files")
    if len(plan.kept) < plan.n_layers and getattr(checkpoint.config, "layer_types", None):
        # Its output is refused when it is written or read: 5 layer_types for 3 layers (transformers 5).
        raise NotExpressible(
            "mergekit changes num_hidden_layers alone, and the config has an entry of layer_types for each layer that "
            "there was"
        )
    family = checkpoint.architecture.name
    if family in _ASKED:
        raise NotExpressible(f"mergekit's list of the tensors of {family} asks for {_ASKED[family]}")
    if len(plan.kept) < plan.n_layers and family not in _LISTED:
        raise NotExpressible(f"mergekit has no list of the tensors of {family}, and leaves num_hidden_layers as it was")
    biased = any(f"{matrix}.bias" in checkpoint.layer_tensors(0) for matrix in checkpoint.architecture.matrices)
    if family in _LISTED - _BIASES_LISTED and biased:
        raise NotExpressible(f"mergekit leaves out the biases of {family}")
    if family == "starcoder2" and not biased:
        raise NotExpressible(f"mergekit's list of the tensors of {family} asks for biases, and this model has none")
    if family == "stablelm" and checkpoint.architecture.parallel:
        raise NotExpressible(
            f"mergekit's list of the tensors of {family} asks for a norm before the MLP, and this model has none"
        )
    if not set(checkpoint.architecture.scalars) <= set(checkpoint.layer_tensors(0)):  # with another hidden_act
        raise NotExpressible(
            f"mergekit's list of the tensors of {family} asks for the numbers of its usual activation, and this model "
            "has another"
        )
    if family == "gemma" and not checkpoint.tied:
        raise NotExpressible(f"mergekit leaves out the unembedding of {family}, which is the embedding in its list")
    if family in ("phi", "phi3", "stablelm") and checkpoint.tied:
        raise NotExpressible(f"mergekit finds no unembedding, which in its list of {family}'s tensors is never tied")
    if len(checkpoint.stored_dtypes) > 1:
        raise NotExpressible("mergekit stores all tensors in one dtype, and these are stored in several")
    if not plan.kept[0].unchanged and len(plan.kept[0].sources) > 1:
        raise NotExpressible("mergekit would average the embedding too where the first layer is merged")
    merged = any(not kept.unchanged for kept in plan.kept)
    slices: list[dict[str, Any]] = []
    for kept in plan.kept:
        last = slices[-1]["sources"] if slices else []
        if not kept.unchanged:
            slices.append({"sources": _sources(checkpoint, plan, kept)})
        elif len(last) == 1 and last[0]["layer_range"][1] == kept.index:
            last[0]["layer_range"][1] += 1
        else:
            source: dict[str, Any] = {"model": _model(checkpoint, merged), "layer_range": [kept.index, kept.index + 1]}
            slices.append({"sources": [source | ({"parameters": {"weight": 1.0}} if merged else {})]})
    stored = _TYPES.get(str(checkpoint.dtype))
    if stored is None:
        raise NotExpressible(f"mergekit has no dtype {checkpoint.dtype}")
    config: dict[str, Any] = {"merge_method": "linear" if merged else "passthrough", "slices": slices}
    if merged:
        config |= {"parameters": {"normalize": False}, "dtype": "float32", "out_dtype": stored}
    else:
        config |= {"dtype": stored}
    lines = ["# The same weights by mergekit (tried with 0.1.5): mergekit-yaml mergekit.yaml OUT"]
    if _model(checkpoint, merged) == _FOLDER:
        lines += [f"# Here {_FOLDER} is {_where(checkpoint)}"]
    if merged:
        lines += [
            "# mergekit tells the sources of a slice apart by their model alone, so that the same folder is written in",
            "# a different way for each layer that is averaged.",
        ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _model(checkpoint: Checkpoint, merged: bool) -> str:
    """What mergekit finds the model by: a hub id, which has one spelling, is of no use where layers are averaged."""
    revision = checkpoint.revision or ""
    if merged or checkpoint.hub_id is None or set("@+") & set(revision):  # mergekit splits a model's text at both
        return _FOLDER
    return f"{checkpoint.hub_id}@{revision}" if revision else checkpoint.hub_id


def _where(checkpoint: Checkpoint) -> str:
    if checkpoint.hub_id is None:
        return f"a folder with, or a link to, the model that was merged (identity {checkpoint.identity})."
    revision = f" --revision {checkpoint.revision}" if checkpoint.revision else ""
    return f"what this fetches: hf download {checkpoint.hub_id}{revision} --local-dir {_FOLDER}"


def _sources(checkpoint: Checkpoint, plan: MergePlan, kept: KeptLayer) -> list[dict[str, Any]]:
    """The sources of one averaged layer, the kept one first: mergekit takes the final norm from it alone."""
    order = [kept.index, *(source for source in kept.sources if source != kept.index)]
    return [
        {
            "model": _FOLDER + "/." * place,  # another text for the same place
            "layer_range": [source, source + 1],
            "parameters": {"weight": _weights(checkpoint, plan, kept, source)},
        }
        for place, source in enumerate(order)
    ]


def _weights(checkpoint: Checkpoint, plan: MergePlan, kept: KeptLayer, source: int) -> list[Mapping[str, Any]]:
    """A source's weight by tensor: its coefficient in the matrices, 1 or 0 in what the kept layer's own stays."""
    architecture = checkpoint.architecture
    kinds = ("weight", "bias") if plan.biases == "merge" else ("weight",)
    filters = {
        f"{matrix}.{kind}": matrix
        for matrix in architecture.matrices
        if matrix not in architecture.expert_matrices
        for kind in kinds
    }
    if architecture.router is not None:
        # Parts of the names that a router and experts have in files and in transformers, which stacks all experts.
        filters = {name: matrix for name, matrix in filters.items() if matrix != architecture.router}
        filters |= {".gate.weight": architecture.router, "experts.": next(iter(architecture.expert_matrices))}
        if len({kept.coefficients_of(matrix) for matrix in architecture.expert_matrices}) > 1:
            raise NotExpressible("mergekit reads a layer's experts as one tensor, and their alphas differ")
    weights = [
        {"filter": name, "value": float(dict(kept.coefficients_of(matrix)).get(source, 0.0))}
        for name, matrix in filters.items()
    ]
    return [*weights, {"value": 1.0 if source == kept.index else 0.0}]
