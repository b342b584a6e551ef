"""mergekit.py: its YAML, read as mergekit documents it, gives the tensors that we save.

mergekit itself is no dependency; the same comparison with mergekit 0.1.5 stands in docs/results.md.
"""

from dataclasses import replace

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from raymerge.checkpoint import Checkpoint
from raymerge.mergekit import NotExpressible, mergekit_yaml
from raymerge.merging import save_merged
from raymerge.plan import MergePlan, MergeStep, Refit, base_plan, before_last_plan, drop_plan, tail_plan


def weight_of(setting, name):
    """mergekit's README: a number, or a list of which the first entry holds whose filter is part of the name."""
    if not isinstance(setting, list):
        return setting
    return next(entry["value"] for entry in setting if entry.get("filter", "") in name)


def read_as_mergekit(text, state):
    """Slices stacked, each layer averaged over the slice's sources tensor by tensor; the ends from the first source.

    state: the base model's tensors by transformers' names, which mergekit 0.1.5 reads experts under.
    """
    config = yaml.safe_load(text)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}
    merged, number = {}, 0
    for part in config["slices"]:
        sources = part["sources"]
        # mergekit tells sources apart by their model's text, and takes one layer of each.
        assert len({source["model"] for source in sources}) == len(sources)
        assert all(source["model"].replace("/.", "") == "base-model" for source in sources)
        for step in range(sources[0]["layer_range"][1] - sources[0]["layer_range"][0]):
            for relative in {n.split(".", 3)[3] for n in state if n.startswith("model.layers.0.")}:
                out = f"model.layers.{number}.{relative}"
                inputs = [state[f"model.layers.{source['layer_range'][0] + step}.{relative}"] for source in sources]
                if config["merge_method"] == "passthrough":
                    (merged[out],) = (tensor.to(dtypes[config["dtype"]]) for tensor in inputs)
                    continue
                assert config["parameters"] == {"normalize": False} and config["dtype"] == "float32"
                weights = [weight_of(source["parameters"]["weight"], out) for source in sources]
                total = sum(w * tensor.float() for w, tensor in zip(weights, inputs, strict=True))
                merged[out] = total.to(dtypes[config["out_dtype"]])
            number += 1
    return merged | {name: tensor for name, tensor in state.items() if not name.startswith("model.layers.")}


PLANS = {
    "tail": tail_plan(5, [0.7, 0.2], name="x", kind="found"),
    "tail_of_corners": tail_plan(5, [0.0, 0.4], name="x", kind="found"),
    "biases": tail_plan(5, [0.7, 0.2], name="x", kind="found", biases="merge"),
    "own_matrices": replace(
        tail_plan(5, [0.7, 0.2], name="x", kind="found"), matrix_alphas=(("mlp.up_proj", (0.5, 0.5)),)
    ),
    "two_groups": MergePlan(5, (MergeStep(1, 2, 0.6), MergeStep(4, 3, 0.25)), selection="list"),
    "into_the_deeper": MergePlan(5, (MergeStep(3, 2, 0.6),), selection="list"),  # layer 4 follows that of two sources
    "drop": drop_plan(5, 2),
    "before_last": before_last_plan(5, 2),
    "nothing": base_plan(5),
}


#: Families without layer types that mergekit has no list of.
UNLISTED = ("olmoe", "seed_oss", "ernie4_5", "ministral3", "helium", "glm", "hunyuan_v1_dense", "nemotron", "olmo")

#: What its list of a family's tensors asks for, and there is none of.
ASKED = {
    "cohere": "norms of queries and keys, and this model has none",
    "starcoder2_no_biases": "biases, and this model has none",
    "stablelm_parallel": "a norm before the MLP, and this model has none",
    **dict.fromkeys(("granite4", "granite4_nope"), "experts, and this model has none"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), "masks and frequencies of attention, which old files hold"),
}

#: The family that each plan is tried on, llama3_rope but for these; mergekit has a list of their tensors.
OF = {
    "biases": "granite",
    "tail_of_corners": "apertus",
    "into_the_deeper": "stablelm",
    "before_last": "phi",
    "two_groups": "starcoder2",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "drop": "mixtral",
}


@pytest.mark.parametrize("case", [*PLANS, "mixtral", "qwen3_moe"])
def test_the_yaml_gives_the_tensors_that_we_save(tmp_path, case):
    plan, family = PLANS.get(case, PLANS["own_matrices"]), OF.get(case, "llama3_rope")
    if case in ("mixtral", "qwen3_moe"):
        plan = replace(plan, matrix_alphas=(("self_attn.o_proj", (0.5, 0.5)),))
    options = {"attention_bias": True} if case == "biases" else {}
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16, **options)))
    kind = checkpoint.config.model_type
    ours, base = (
        tiny.of_layers(tiny.loaded_layer, kind, state)
        for state in (tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan), dict(checkpoint))
    )
    text = mergekit_yaml(checkpoint, plan)
    theirs = read_as_mergekit(text, base)
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        # The same float32 sum in another order: it may round to the neighbouring bfloat16, or, where terms of size 1
        # cancel, be off by float32's own rounding.
        torch.testing.assert_close(theirs[name].float(), tensor.float(), rtol=2**-7, atol=2**-22)
        assert (theirs[name] == tensor).float().mean() > 0.99, name
    averaged = case not in ("drop", "before_last", "nothing")
    assert yaml.safe_load(text)["merge_method"] == ("linear" if averaged else "passthrough")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norms": "fold"}, "norms"),
        ({"alignment": "neurons"}, "alignment neurons"),
        ({"alignment": "rows"}, "alignment rows"),
        ({"refit": Refit("scale")}, "refit scale"),
    ],
)
def test_what_mergekit_cannot_do_is_said_in_one_line(tmp_path, change, reason):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m")))
    with pytest.raises(NotExpressible, match=reason) as caught:
        mergekit_yaml(checkpoint, replace(PLANS["tail"], **change))
    assert "\n" not in str(caught.value)


def test_a_merge_into_the_first_layer_is_not_expressed(tmp_path):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m")))
    with pytest.raises(NotExpressible, match="first layer"):
        mergekit_yaml(checkpoint, MergePlan(5, (MergeStep(0, 1, 0.5),), selection="list"))


def test_no_path_of_this_machine_is_in_it(tmp_path, monkeypatch):
    """mergekit reads OWNER/NAME@REVISION as the hub's (its common.py), but only one such text for each model."""
    folder = tiny.make_checkpoint(tmp_path / "m")
    local = Checkpoint(str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.chdir(tmp_path)
    tagged, latest = Checkpoint("owner/name", revision="v2"), Checkpoint("owner/name")
    odd = Checkpoint("owner/name", revision="v+2")  # mergekit splits a model's text there
    for checkpoint, model, where in (
        (local, "base-model", f"# Here base-model is a folder with, .* (identity {local.identity})"),
        (tagged, "owner/name@v2", "hf download owner/name --revision v2 --local-dir base-model\n"),
        (odd, "base-model", "hf download owner/name --revision v+2 --local-dir base-model\n"),
        (latest, "owner/name", "hf download owner/name --local-dir base-model\n"),
    ):
        averaged, dropped = mergekit_yaml(checkpoint, PLANS["tail"]), mergekit_yaml(checkpoint, PLANS["drop"])
        assert where.replace(".*", "or a link to, the model that was merged") in averaged
        assert [source["model"] for part in yaml.safe_load(dropped)["slices"] for source in part["sources"]] == [model]
        assert str(tmp_path) not in averaged + dropped


def test_a_layers_experts_are_one_tensor(tmp_path):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "mixtral")))
    plan = replace(PLANS["tail"], matrix_alphas=(("block_sparse_moe.experts.1.w2", (0.5, 0.5)),))
    with pytest.raises(NotExpressible, match="experts as one tensor, and their alphas differ"):
        mergekit_yaml(checkpoint, plan)


def test_norms_of_another_dtype_are_not_expressed(tmp_path):
    """mergekit converts every tensor to one dtype (its GatherTensors and SaveTensor)."""
    folder = tiny.make_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.float() if "norm" in name else tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for plan in (PLANS["tail"], PLANS["drop"]):
        with pytest.raises(NotExpressible, match="stores all tensors in one dtype"):
            mergekit_yaml(Checkpoint(str(folder)), plan)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_what_mergekit_does_not_know_of_a_family_is_not_expressed(tmp_path, family):
    """mergekit 0.1.5 drops biases that its list of a family's tensors lacks, and where it has no list it infers one,
    and leaves num_hidden_layers; see docs/results.md."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family)))
    name = checkpoint.architecture.name
    if family in ASKED:
        with pytest.raises(NotExpressible, match=f"list of the tensors of {name} asks for {ASKED[family]}"):
            mergekit_yaml(checkpoint, PLANS["nothing"])
    elif family == "phi3_longrope":
        with pytest.raises(NotExpressible, match="finds no unembedding"):  # it is tied
            mergekit_yaml(checkpoint, PLANS["nothing"])
    elif family in ("llama_biases", "olmo2", "gemma", "gemma3", "qwen3_biases"):
        with pytest.raises(NotExpressible, match=f"leaves out the biases of {name}"):
            mergekit_yaml(checkpoint, PLANS["nothing"])
    else:
        assert mergekit_yaml(checkpoint, PLANS["nothing"])
    if family in UNLISTED:
        with pytest.raises(NotExpressible, match=f"no list of the tensors of {family}, and leaves num_hidden_layers"):
            mergekit_yaml(checkpoint, PLANS["drop"])


def test_an_activation_without_the_numbers_that_its_list_asks_for(tmp_path):
    """apertus.json of mergekit 0.1.5 has those of xIELU, none of them optional."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", "apertus", hidden_act="silu")))
    with pytest.raises(NotExpressible, match="apertus asks for the numbers of its usual activation, and this model"):
        mergekit_yaml(checkpoint, PLANS["tail"])


@pytest.mark.parametrize(("family", "tied"), [("gemma", False), ("phi3", True), ("phi", True), ("stablelm", True)])
def test_an_unembedding_that_its_list_has_otherwise(tmp_path, family, tied):
    """Gemma's lists none, and Phi's, Phi-3's and StableLM's are not optional (mergekit 0.1.5, gemma.json, phi2.json,
    phi3.json and stablelm2.json)."""
    options = {"tie_word_embeddings": tied, "attention_bias": False}
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family, **options)))
    with pytest.raises(NotExpressible, match="mergekit (leaves out|finds no).* unembedding"):
        mergekit_yaml(checkpoint, PLANS["tail"])
    other = tiny.make_checkpoint(tmp_path / "other", family, **options | {"tie_word_embeddings": not tied})
    assert mergekit_yaml(Checkpoint(str(other)), PLANS["tail"])


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES.keys() - {"phi3_longrope"}))  # whose embedding is tied
def test_layers_of_a_family_with_layer_types_do_not_go(tmp_path, family):
    """mergekit 0.1.5 changes num_hidden_layers alone; what it would write is a config that transformers refuses."""
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m", family)))
    values = checkpoint.config.to_dict() | {"num_hidden_layers": 3}
    try:
        type(checkpoint.config).from_dict(values)
        readable = True
    except (ValueError, StrictDataclassError) as error:
        readable = False
        assert "must be equal to the number of" in str(error)
    assert readable == (not getattr(checkpoint.config, "layer_types", None))
    for plan in (PLANS["tail"], PLANS["drop"]):
        if not readable:
            with pytest.raises(NotExpressible, match="changes num_hidden_layers alone, and .* layer_types"):
                mergekit_yaml(checkpoint, plan)
        elif family not in ("llama_biases", "olmo2", "gemma", *ASKED, *UNLISTED):
            assert mergekit_yaml(checkpoint, plan)


def test_it_lies_beside_the_checkpoint_or_its_absence_is_explained(tmp_path):
    checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / "m")))
    done = save_merged(checkpoint, PLANS["tail"], tmp_path / "a", verify=False)
    assert done["mergekit"] is None
    assert (tmp_path / "a" / "mergekit.yaml").read_text() == mergekit_yaml(checkpoint, PLANS["tail"])
    done = save_merged(checkpoint, replace(PLANS["tail"], norms="fold"), tmp_path / "b", verify=False)
    assert "norms" in done["mergekit"] and not (tmp_path / "b" / "mergekit.yaml").exists()
    assert f"no mergekit.yaml: {done['mergekit']}" in (tmp_path / "b" / "README.md").read_text()
