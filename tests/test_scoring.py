"""scoring.py and evaluation.py's answers: the frozen trunk against whole prompts through plain transformers models.

The reference (tiny.py) merges step by step in float64, builds an ordinary model, and runs each prompt alone.
"""

import copy
import errno
import gc
import random
import resource
from contextlib import suppress
from dataclasses import replace
from functools import cache
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

import raymerge.forward
import raymerge.scoring
import raymerge.tail_layer
import raymerge.tensorfiles
from raymerge.checkpoint import Checkpoint
from raymerge.evaluation import Answers, answer_shard
from raymerge.forward import LayerRunner
from raymerge.fusion import check_mergeable
from raymerge.memory import ScoringPlan
from raymerge.plan import MergePlan, MergeStep, PlanError, base_plan, before_last_plan, drop_plan, tail_plan
from raymerge.prompts import Group, Prompts, Shard, encode_questions
from raymerge.saved_config import trimmed_config
from raymerge.scoring import TailScorer
from raymerge.sources import SourceLayers
from raymerge.trunk import TrunkCache, compute_trunks

torch.set_num_threads(1)

# Float32 against float64: unit roundoff 6e-8, amplified by up to five layers whose weights are large on purpose.
# Measured at most 4e-6 of the largest logit over all cases; what a wrong mask, position, bias or norm does is
# some 1e-1 of it.
LIMIT = 2e-5
N = tiny.N_LAYERS


def others_last(layer_types):
    """As many layers of which only the last is not of the kind that the last one is now."""
    other = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}[layer_types[-1]]
    return layer_types[-1:] * (len(layer_types) - 1) + [other]


FAMILIES = {name: {} for name in tiny.FAMILIES} | {
    # The window reaches into the prefix for short questions, and not even over the whole of long ones.
    "mistral_window_60": {"family": "mistral_window", "sliding_window": 60},
    # Only the last layer slides, so that what `before_last` keeps has another window than what it stands in for.
    "qwen2_last_window": {"family": "qwen2_windows", "max_window_layers": 4, "sliding_window": 50},
    # The same the other way round, in some families with another rotary embedding too.
    **{
        f"{name}_last_other": {"family": name, "layer_types": others_last(options["layer_types"])}
        for name, options in tiny.FAMILIES.items()
        if "sliding_attention" in options.get("layer_types", ())
    },
    # And without any.
    "smollm3_last_none": {"family": "smollm3", "no_rope_layers": [1, 1, 1, 1, 0], "use_sliding_window": False},
    "smollm3_mixed": {"family": "smollm3", "no_rope_layers": [1, 0, 1, 0, 1], "use_sliding_window": False},
    "gemma3_mixed": {
        "family": "gemma3",
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    },
}
ONE_KIND = [name for name in FAMILIES if not name.endswith(("_last_window", "_last_other", "_last_none", "_mixed"))]


def close(found, expected):
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    error, scale = np.abs(found - expected).max(), np.abs(expected).max()
    assert error < LIMIT * scale, f"off by {error} where values reach {scale}"


def same_answers(found, expected):
    """Logits (n, 4) close, and the same letter wherever rounding cannot decide it."""
    found = np.asarray(found)
    close(found, expected)
    first, second = np.sort(expected, -1)[:, :-3:-1].T
    clear = first - second > 2 * LIMIT * np.abs(expected).max()
    assert (~clear).sum() <= 1
    assert (np.argmax(found, -1) == expected.argmax(-1))[clear].all()


@pytest.fixture(scope="module")
def questions():
    return tiny.make_questions({"cats": 3, "roads": 2, "boxes": 1})


@pytest.fixture(scope="module")
def case(tmp_path_factory, questions):
    """case(family) -> a checkpoint with everything that is asked of it, made once."""
    tokenizer = tiny.demo_tokenizer()

    @cache
    def make(name):
        options = dict(FAMILIES[name])
        folder = tiny.make_checkpoint(tmp_path_factory.mktemp(name), options.pop("family", name), **options)
        runner, cache_folder = LayerRunner(Checkpoint(str(folder))), tmp_path_factory.mktemp("trunk")
        return SimpleNamespace(
            folder=folder,
            base=AutoModelForCausalLM.from_pretrained(folder, **tiny.PLAIN),
            runner=runner,
            prompts=encode_questions(questions, tokenizer, shard_tokens=250),
            whole=tiny.whole_prompts(questions, tokenizer),
            trunk=lambda first: TrunkCache(runner, first, cache_folder),
            known={},
        )

    return make


def answers(case, plan, trunk=None, prompts=None):
    prompts = prompts or case.prompts
    return Answers.join(answer_shard(case.runner, plan, prompts, shard, trunk=trunk) for shard in prompts.shards)


def reference(case, plan, whole=None):
    """Of the case's own prompts each plan's once."""
    if whole is None and plan in case.known:
        return case.known[plan]
    merged = tiny.merged_model(case.base, tiny.steps_of(plan), biases=plan.biases)
    expected = tiny.plain_answers(merged, whole or case.whole, case.prompts.letters)
    if whole is None:
        case.known[plan] = expected
    return expected


def found(*alphas, biases="keep"):
    return tail_plan(N, alphas, name="x", kind="found", biases=biases)


PLANS = {
    "random": found(0.35, 0.8),
    "drop": drop_plan(N, 2),
    "before_last": before_last_plan(N, 2),
    "merged_biases": found(0.2, 0.6, biases="merge"),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "asked", "sets"), [(90, 4, 4), (90, 1, 1), (90, 2, 1), (90, 40, 1), (3, 4, 4)])
def test_values_are_weighted_alike_before_and_after_their_projection(case, tokens, asked, sets, biased):
    """For questions with tokens of their own and for a prefix that they share, one candidate and several, with the
    gradient; whether the states are weighed depends on the sizes alone, which are on both sides of it here."""
    layer = TailScorer(case("llama").trunk(N - 3), case("llama").prompts).layer
    heads, group, width = layer._kv_heads, layer._groups, layer._head_dim
    torch.manual_seed(0)
    states = torch.randn(sets, tokens, 32)
    shares = torch.rand(5, asked, heads, group, tokens).softmax(-1)
    matrix = torch.randn(heads * width, 32, requires_grad=True)
    bias = torch.randn(heads * width) if biased else None

    def weigh(shares):
        return layer._weighing(states, (matrix, bias), asked if sets == 1 else 1)(shares)

    values = torch.nn.functional.linear(states, matrix, bias).unflatten(-1, (heads, width)).expand(asked, -1, -1, -1)
    expected = torch.einsum("cnkgt,ntkd->cnkgd", shares, values)
    (gradient,) = torch.autograd.grad(expected.square().sum(), matrix)
    for chunk in (layer.plan.chunk_tokens, 2 * group * 32 // width):  # the second for two questions at a time
        layer.plan = replace(layer.plan, chunk_tokens=chunk)
        one_by_one = torch.stack([weigh(own) for own in shares])
        close(one_by_one.detach(), expected.detach())
        close(torch.autograd.grad(one_by_one.square().sum(), matrix)[0], gradient)
        close(torch.func.vmap(weigh)(shares).detach(), expected.detach())


def test_which_values_are_weighted_before_their_projection(case, monkeypatch):
    """Few questions on one prefix and all on their own tokens; not many questions on one prefix."""
    layer, weighed = TailScorer(case("llama").trunk(N - 3), case("llama").prompts).layer, []
    monkeypatch.setattr(
        raymerge.tail_layer._WeightedStates, "apply", lambda shares, states: weighed.append(states) or shares @ states
    )
    shape, states = (layer._kv_heads, layer._groups, 200), torch.randn(40, 200, 32)
    value = (torch.randn(layer._kv_heads * layer._head_dim, 32), None)
    for sets, questions, expected in ((states, 1, True), (states[:1], 1, True), (states[:1], 40, False)):
        weighed.clear()
        layer._weighing(sets, value, questions)(torch.rand(max(len(sets), questions), *shape))
        assert bool(weighed) == expected


def names_of_plans(family):
    """All of them where families differ in biases and windows; of the others one that averages all that is averaged,
    and one that keeps another layer."""
    if family not in ONE_KIND:
        return "drop", "before_last"  # averaging layers with different windows is refused (below)
    thorough = ("llama", "llama_biases", "mistral_window_60", "phi", "gpt_neox", "qwen2", "gemma3", "qwen3_moe")
    return PLANS if family in thorough else ("merged_biases", "before_last")


@pytest.mark.parametrize(("family", "name"), [(f, name) for f in FAMILIES for name in names_of_plans(f)])
def test_scorer_and_evaluation_equal_plain_forwards(case, family, name):
    case, plan = case(family), PLANS[name]
    assert len(case.prompts.shards) > 2
    expected, logsumexp, top = reference(case, plan)
    trunk = case.trunk(N - 3)
    logits, scored_sum, scored_top = TailScorer(trunk, case.prompts).score(plan)
    same_answers(logits, expected)
    close(scored_sum, logsumexp)
    assert (scored_top.numpy() == top).mean() > 0.9
    for evaluated in (answers(case, plan, trunk), answers(case, plan)):
        same_answers(evaluated.logits, expected)
        close(evaluated.logsumexp, logsumexp)
        is_letter = np.isin(top, case.prompts.letters)
        assert (evaluated.top_is_letter == is_letter).mean() > 0.9
        assert evaluated.rows.tolist() == list(range(6))


def test_the_windows_are_what_the_cases_are_about(case):
    """Else the test above would prove less than it says."""
    prompts = case("mistral_window").prompts
    own = [len(ids) for shard in prompts.shards for group in shard.groups for ids in group.sequences]
    prefixes = [len(group.prefix) for shard in prompts.shards for group in shard.groups]
    assert min(own) > 11 == case("mistral_window").runner.checkpoint.windows[0]  # no prefix key is visible
    assert min(own) < 50 and max(own) > 60 and min(prefixes) > 60  # part of the prefix, or of the question, is
    assert case("qwen2_windows").runner.checkpoint.windows == [None, None, 40, 40, 40]
    assert case("qwen2_last_window").runner.checkpoint.windows == [None] * 4 + [50]


@pytest.mark.parametrize("family", ["llama", "mistral_window_60"])
@pytest.mark.parametrize("plan", [found(0.4), found(0.1, 0.9, 0.5, 0.3), before_last_plan(N, N - 1), drop_plan(N, 1)])
def test_one_merge_and_all_merges(case, family, plan):
    case, first = case(family), N - 1 - len(plan.steps)
    expected, *_ = reference(case, plan)
    trunk = case.trunk(first)
    same_answers(TailScorer(trunk, case.prompts).score(plan)[0], expected)
    same_answers(answers(case, plan, trunk).logits, expected)


def test_plans_that_change_less_than_the_trunk_allows(case):
    """The base model and merges of fewer layers run on from the trunk; a merge of more starts from the embedding."""
    case = case("llama")
    trunk = case.trunk(N - 3)
    for plan in (base_plan(N), found(0.4), drop_plan(N, 4), found(0.3, 0.8, 0.2)):
        same_answers(answers(case, plan, trunk).logits, reference(case, plan)[0])


def test_queries_are_scaled_as_transformers_scales_them_at_every_position(case):
    """Prompts that end where the scale steps up are few."""
    runner = case("ministral3").runner
    layer = SimpleNamespace(runner=runner, _architecture=runner.checkpoint.architecture)
    positions = torch.arange(100)
    found = raymerge.tail_layer.TailLayer._scaled(layer, torch.full((100, 2, 3), 2.0), positions)
    expected = 2 * get_llama_4_attn_scale(positions[None], 0.3, 32)[0, 0]
    assert torch.equal(found, expected[:, :, None].expand(-1, 2, 3)) and len(found.unique()) == 4


@pytest.mark.parametrize("family", ["qwen2", "mistral_window_60"])
def test_a_prefix_without_examples(case, family):
    case, questions = case(family), tiny.make_questions({"cats": 3, "roads": 2}, shots=0)
    prompts = encode_questions(questions, tiny.demo_tokenizer())
    assert all(len(group.prefix) < 25 for shard in prompts.shards for group in shard.groups)
    expected, *_ = reference(case, PLANS["random"], tiny.whole_prompts(questions, tiny.demo_tokenizer()))
    trunk = case.trunk(N - 3)
    same_answers(TailScorer(trunk, prompts).score(PLANS["random"])[0], expected)
    same_answers(answers(case, PLANS["random"], trunk, prompts).logits, expected)


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen3_biases"])
def test_any_grouping_of_tokens(case, family):
    """Empty prefixes, prefixes and sequences of one token, very long beside very short ones, rows in any order."""
    case = case(family)
    rng = np.random.default_rng(1)

    def ids(n):
        return rng.integers(5, 800, n)

    groups = (
        Group("a", ids(0), (ids(7), ids(1), ids(150)), (4, 0, 7)),
        Group("b", ids(1), (ids(1), ids(30)), (2, 6)),
        Group("c", ids(200), (ids(3),), (5,)),
        Group("d", ids(0), (ids(2),), (1,)),
        Group("e", ids(9), (ids(90),), (3,)),
    )
    shards = (Shard(groups[:2]), Shard(groups[2:3]), Shard(groups[3:]))
    prompts = Prompts(shards, case.prompts.letters, np.zeros(8, np.int8))
    rows = {r: np.concatenate([g.prefix, s]) for g in groups for r, s in zip(g.rows, g.sequences, strict=True)}
    expected, *_ = reference(case, PLANS["random"], [rows[r] for r in range(8)])
    trunk = case.trunk(N - 3)
    close(TailScorer(trunk, prompts).score(PLANS["random"])[0], expected)
    close(answers(case, PLANS["random"], trunk, prompts).logits, expected)
    close(answers(case, PLANS["random"], None, prompts).logits, expected)


def test_a_window_beyond_every_position_hides_nothing_and_costs_nothing(case, monkeypatch):
    """Phi-3.5's and Phi-4's are of 262,144 tokens; the scores of all prefixes were masked for every candidate."""
    case = case("phi3_longrope")
    assert case.runner.checkpoint.windows == [262_144] * N
    monkeypatch.setattr(raymerge.tail_layer, "visible", None)
    same_answers(
        TailScorer(case.trunk(N - 3), case.prompts).score(PLANS["random"])[0], reference(case, PLANS["random"])[0]
    )


def test_a_window_of_all_positions_but_one_hides_that(tmp_path, questions):
    prompts = encode_questions(questions, tiny.demo_tokenizer(), shard_tokens=250)
    whole = tiny.whole_prompts(questions, tiny.demo_tokenizer())
    folder = tiny.make_checkpoint(tmp_path / "m", "mistral_window", sliding_window=max(map(len, whole)) - 1)
    runner, plan = LayerRunner(Checkpoint(str(folder))), PLANS["drop"]
    scorer = TailScorer(TrunkCache(runner, N - 3, tmp_path), prompts)
    assert runner.checkpoint.windows[-1] == scorer.layer.states.layout.positions - 1
    merged = tiny.merged_model(AutoModelForCausalLM.from_pretrained(folder, **tiny.PLAIN), tiny.steps_of(plan))
    same_answers(scorer.score(plan)[0], tiny.plain_answers(merged, whole, prompts.letters)[0])


@pytest.mark.parametrize("family", tiny.BOUNDED)
def test_padding_changes_no_rotary_frequencies(tmp_path, case, family):
    """A bucket has the question of the short prefix beside that of the long one: its rotary positions reach beyond the
    length up to which frequencies are fixed, and no prompt does."""
    folder = tiny.make_checkpoint(tmp_path / "m", **tiny.bounded(family, 100))
    runner = LayerRunner(Checkpoint(str(folder)))
    letters, ids = case("llama").prompts.letters, np.random.default_rng(1).integers(5, 800, (4, 100))
    groups = (
        Group("a", ids[0, :70], (ids[0, 70:], ids[1, 70:]), (0, 1)),
        Group("b", ids[2, :60], (ids[2, 60:], ids[3, 60:]), (2, 3)),
    )
    prompts = Prompts((Shard(groups),), letters, np.zeros(4, np.int8))
    case = SimpleNamespace(
        base=AutoModelForCausalLM.from_pretrained(folder, **tiny.PLAIN), runner=runner, prompts=prompts
    )
    whole = [np.concatenate([g.prefix, own]) for g in groups for own in g.sequences]
    for plan in PLANS.values():
        expected, *_ = reference(case, plan, whole)
        scorer = TailScorer(TrunkCache(runner, N - 3, tmp_path), prompts)
        assert scorer.layer.states.layout.positions > 100
        close(scorer.score(plan)[0], expected)
        close(answers(case, plan).logits, expected)


@pytest.mark.parametrize("family", ["llama", "mistral_window_60"])
def test_batches_buckets_and_shards_do_not_change_answers(case, family, questions, tmp_path, monkeypatch):
    case, plan = case(family), PLANS["random"]
    expected, *_ = reference(case, plan)
    buckets = set()
    for size, shard_tokens in ((1, 100), (200, 400), (10**6, 10**6)):
        monkeypatch.setattr(raymerge.scoring, "_BUCKET_TOKENS", size)
        monkeypatch.setattr(raymerge.forward, "_BATCH_TOKENS", size)
        prompts = encode_questions(questions, tiny.demo_tokenizer(), shard_tokens=shard_tokens)
        trunk = TrunkCache(case.runner, N - 3, tmp_path / str(size))
        scorer = TailScorer(trunk, prompts)
        buckets.add(len(scorer.layer.states.layout.buckets))
        same_answers(scorer.score(plan)[0], expected)
        same_answers(answers(case, plan, trunk, prompts).logits, expected)
    assert len(buckets) == 3


def test_the_same_scorer_scores_any_candidate(case):
    """Nothing of one candidate is left for the next, and the same one gives the same answers."""
    case = case("qwen2")
    scorer = TailScorer(case.trunk(N - 3), case.prompts)
    first = [scorer.score(plan)[0] for plan in PLANS.values()]
    again = [scorer.score(plan)[0] for plan in reversed(PLANS.values())][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(logits.flatten().tolist()) for logits in first}) == len(PLANS)


def test_many_candidates_at_once_are_scored_as_one_at_a_time(case, monkeypatch):
    """More than are mixed together, with norms of different layers, biases merged and not."""
    case = case("llama_biases")
    plans = [*PLANS.values(), found(0.9, 0.1), found(0.0, 0.0, biases="merge"), before_last_plan(N, 2)]
    scorer = TailScorer(case.trunk(N - 3), case.prompts)
    expected = [reference(case, plan)[0] for plan in plans]
    for together in (1, 3, 100):
        monkeypatch.setattr(raymerge.scoring, "_MIXED_TOGETHER", together)
        logits = list(scorer.score_many(plans))
        assert len(logits) == len(plans)
        for plan, target, many in zip(plans, expected, logits, strict=True):
            same_answers(many, target)
            close(many, scorer.score(plan)[0])
    assert list(scorer.score_many([])) == []
    with pytest.raises(ValueError, match="does not collapse"):
        next(scorer.score_many([plans[0], found(0.5)]))


def test_scorers_share_the_stacked_weights(case):
    case = case("qwen2")
    trunk = case.trunk(N - 3)
    sources = SourceLayers(case.runner, N - 3)
    one, two = (TailScorer(trunk, case.prompts, sources=sources) for _ in range(2))
    assert one.sources is two.sources is sources
    plain = TailScorer(trunk, case.prompts)
    for plan in PLANS.values():
        assert torch.equal(one.score(plan)[0], plain.score(plan)[0])


# -- what is scored is what is saved ---------------------------------------------------------------------------------


def test_bfloat16_candidates_are_rounded_as_saving_does(tmp_path, questions):
    """Alphas of 1/2 and 1/4 make every float32 sum of bfloat16 weights exact, so that rounding is the only change."""
    folder = tiny.make_checkpoint(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    checkpoint = Checkpoint(str(folder))
    runner = LayerRunner(checkpoint)
    prompts = encode_questions(questions, tiny.demo_tokenizer())
    whole = tiny.whole_prompts(questions, tiny.demo_tokenizer())
    trunk = TrunkCache(runner, N - 3, tmp_path / "cache")
    for plan in (found(0.5, 0.25), found(0.75, 0.5, biases="merge"), before_last_plan(N, 2)):
        destination = tmp_path / plan.plan_id("x")
        tiny.save_merge(checkpoint, plan, destination)
        saved = AutoModelForCausalLM.from_pretrained(destination, dtype=torch.float64, **tiny.PLAIN)
        expected, *_ = tiny.plain_answers(saved, whole, prompts.letters)
        same_answers(TailScorer(trunk, prompts).score(plan)[0], expected)
        same_answers(answers(SimpleNamespace(runner=runner), plan, trunk, prompts).logits, expected)
    unrounded = TailScorer(trunk, prompts, fused_dtype=torch.float32).score(found(0.5, 0.25))[0]
    rounded = TailScorer(trunk, prompts).score(found(0.5, 0.25))[0]
    # Rounding to 8 bits moves logits by some 3e-4 of their size: far more than the limit that both are held to.
    assert (unrounded - rounded).abs().max() > 10 * LIMIT * rounded.abs().max()


# -- gradients -------------------------------------------------------------------------------------------------------


def whole_model_logits(case, first, coefficients, rest, merge_biases):
    """Answer logits as a float64 function of the coefficients, through a whole transformers model."""
    config = copy.deepcopy(case.base.config)
    config.num_hidden_layers = first + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:first] + [config.layer_types[first + rest]]
    model = tiny.empty_model(config)
    state = {name: tensor.double() for name, tensor in case.base.state_dict().items()}
    weights = {}
    for name in model.state_dict():
        if not name.startswith(f"model.layers.{first}."):
            weights[name] = state[name]
            continue
        sources = [state[name.replace(f"layers.{first}.", f"layers.{first + j}.")] for j in range(len(coefficients))]
        averaged = "_proj.weight" in name or (merge_biases and "_proj.bias" in name)
        weights[name] = sum(c * w for c, w in zip(coefficients, sources, strict=True)) if averaged else sources[rest]
    ids = [torch.tensor(prompt)[None] for prompt in case.whole]
    last = [functional_call(model, weights, (i,), {"use_cache": False}).logits[0, -1] for i in ids]
    return torch.stack(last)[:, list(case.prompts.letters)]


@pytest.mark.parametrize(
    ("family", "rest", "merge_biases"),
    [
        ("llama_biases", 0, False),
        ("llama_biases", 2, True),
        ("mistral_window", 0, False),  # no prefix key is visible: nothing of it may turn into NaN
        ("mistral_window_60", 1, False),
        ("qwen3", 0, False),
    ],
)
def test_gradients_equal_those_through_the_whole_model(case, family, rest, merge_biases):
    case, first = case(family), N - 3
    weigh = torch.randn(len(case.whole), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [0.45, 0.35, 0.2]

    theirs = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    expected = whole_model_logits(case, first, theirs, rest, merge_biases)
    (expected * weigh).sum().backward()

    ours = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    scorer = TailScorer(case.trunk(first), case.prompts)
    logits = scorer.logits(ours, survivor=rest, merge_biases=merge_biases)
    (logits.double() * weigh).sum().backward()

    close(logits.detach(), expected.detach())
    scale = theirs.grad.abs().max()
    # A gradient is a sum over thousands of float32 weights, with cancellation.
    assert (ours.grad - theirs.grad).abs().max() < 10 * LIMIT * scale

    # And the reference's own gradient is the slope of its values: central differences. Transformers computes norms
    # in float32 whatever the dtype: roundings of some 1e-5 over the step, and the step's square, are the limit.
    step = 2e-3
    for j in range(len(values)):
        ends = []
        for sign in (1, -1):
            moved = torch.tensor(values, dtype=torch.float64)
            moved[j] += sign * step
            with torch.no_grad():
                ends.append((whole_model_logits(case, first, moved, rest, merge_biases) * weigh).sum())
        assert abs((ends[0] - ends[1]) / (2 * step) - theirs.grad[j]) < 1e-3 * scale


def test_gradients_with_an_empty_prefix(case):
    case = case("llama")
    rng = np.random.default_rng(0)
    group = Group("a", np.zeros(0, np.int64), (rng.integers(5, 800, 9), rng.integers(5, 800, 4)), (0, 1))
    prompts = Prompts((Shard((group,)),), case.prompts.letters, np.zeros(2, np.int8))
    coefficients = torch.full((3,), 1 / 3, requires_grad=True)
    TailScorer(case.trunk(N - 3), prompts).logits(coefficients).sum().backward()
    assert torch.isfinite(coefficients.grad).all() and (coefficients.grad != 0).all()


def test_gradients_after_scoring(case):
    """The stack is made when first asked for, which may be while scoring, where autograd is off."""
    scorer = TailScorer(case("llama").trunk(N - 3), case("llama").prompts)
    expected = scorer.score(PLANS["random"])[0]
    coefficients = scorer.coefficients(PLANS["random"]).requires_grad_()
    logits = scorer.logits(coefficients)
    close(logits.detach(), expected)
    logits.sum().backward()
    assert torch.isfinite(coefficients.grad).all() and (coefficients.grad != 0).all()


# -- norms and alignment ---------------------------------------------------------------------------------------------

OPTIONS = [(alignment, norms) for alignment in ("none", "rows", "neurons") for norms in ("keep", "fold")]
OPTION_PLANS = {
    "random": PLANS["random"],
    "merged_biases": PLANS["merged_biases"],
    "drop": PLANS["drop"],
    "before_last": PLANS["before_last"],
    "always_last": found(0.0, 0.0, biases="merge"),
    # Into the last and into the middle layer: norms, biases and the order of units are not those of the first.
    "last": MergePlan(N, (MergeStep(N - 1, N - 2, 0.7), MergeStep(N - 1, N - 3, 0.4)), kind="found"),
    "middle": MergePlan(N, (MergeStep(N - 2, N - 1, 0.6), MergeStep(N - 2, N - 3, 0.5)), kind="found"),
}


def fused_reference(case, plan):
    """Answers of the fused state dict in an ordinary float64 model; that it is the right one is in test_fusion."""
    checkpoint = case.runner.checkpoint
    state = tiny.fuse_state_dict(checkpoint, checkpoint.architecture, plan, aligner=case.runner.aligner)
    state = tiny.of_layers(tiny.loaded_layer, case.base.config.model_type, state)
    values = trimmed_config(case.base.config.to_dict(), [kept.index for kept in plan.kept])
    weights = sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).digest()
    if weights not in case.known:  # many options change nothing of many plans
        model = tiny.empty_model(type(case.base.config).from_dict(values))
        model.load_state_dict(state, strict=True)
        case.known[weights] = tiny.plain_answers(model, case.whole, case.prompts.letters)[0]
    return case.known[weights]


@pytest.mark.parametrize(("alignment", "norms"), OPTIONS)
@pytest.mark.parametrize("family", ["llama_biases", "qwen3_biases", "mistral_window_60", "starcoder2", "phi"])
def test_every_alignment_with_every_norm(case, family, alignment, norms):
    """A stack of the run's own combination, the published one and any other give the fused model's answers."""
    case = case(family)
    plans = [replace(plan, alignment=alignment, norms=norms) for plan in OPTION_PLANS.values()]
    trunk = case.trunk(N - 3)
    expected = [fused_reference(case, plan) for plan in plans]
    stacks = [
        SourceLayers(case.runner, N - 3),
        SourceLayers(case.runner, N - 3, norms="fold", alignment="neurons"),
        SourceLayers(case.runner, N - 3, norms=norms, alignment="neurons" if alignment == "neurons" else "none"),
    ]
    for sources in stacks:
        scorer = TailScorer(trunk, case.prompts, sources=sources)
        for target, logits in zip(expected, scorer.score_many(plans), strict=True):
            same_answers(logits, target)
    assert [scorer.is_stacked(plan) for plan in plans if not plan.kept[-1].unchanged] == [alignment != "rows"] * 5
    for plan, target in zip(plans, expected, strict=True):
        same_answers(scorer.score(plan)[0], target)
        same_answers(answers(case, plan, trunk).logits, target)


def any_merge(draw, checkpoint, first):
    """Neighbours merged in any order and into either side until one of the layers from `first` on is left, with any
    options; drawn until the family allows it."""
    while True:
        there, steps = list(range(first, N)), []
        while len(there) > 1:
            at = draw.randrange(len(there) - 1)
            into, remove = draw.sample(there[at : at + 2], 2)
            steps.append(MergeStep(into, remove, draw.choice([0.0, 1.0, 1.0, 0.5, draw.random()])))
            there.remove(remove)
        options = {"alignment": draw.choice(["none", "neurons", "rows"]), "norms": draw.choice(["keep", "fold"])}
        plan = MergePlan(N, tuple(steps), kind="found", biases=draw.choice(["keep", "merge"]), **options)
        with suppress(PlanError):
            check_mergeable(checkpoint, plan)
            return plan


@pytest.mark.parametrize("family", FAMILIES)
def test_any_merge_with_any_options(case, family):
    """On any stack, alone or several together, with keys computed anew or summed."""
    draw, case = random.Random(family), case(family)
    for _ in range(3):
        first = draw.randrange(N - 1)
        plans = [any_merge(draw, case.runner.checkpoint, first) for _ in range(draw.choice([1, 2]))]
        same = {"norms": plans[0].norms, "alignment": "neurons" if plans[0].alignment == "neurons" else "none"}
        sources = SourceLayers(case.runner, first, **draw.choice([same, same, {}]))
        scorer = TailScorer(case.trunk(first), case.prompts, sources=sources)
        if draw.random() < 0.5:
            how = ScoringPlan("device", "linear" if scorer._is_linear else "recompute", 1, draw.choice([256, 4096]))
            scorer = TailScorer(case.trunk(first), case.prompts, sources=sources, fused_dtype=torch.float32, plan=how)
        for plan, logits in zip(plans, scorer.score_many(plans), strict=True):
            close(logits, fused_reference(case, plan))


@pytest.mark.parametrize("family", ["olmo2", "olmoe"])
def test_gains_of_single_units_move_with_them(case, family):
    """OLMo norms whole projections: what the kept layer's gains lie on is in another layer's order in the stack."""
    case = case(family)
    plans = [replace(OPTION_PLANS[name], alignment="neurons") for name in ("last", "middle", "random")]
    scorer = TailScorer(case.trunk(N - 3), case.prompts, sources=SourceLayers(case.runner, N - 3, alignment="neurons"))
    assert all(map(scorer.is_stacked, plans))
    for plan, logits in zip(plans, scorer.score_many(plans), strict=True):
        same_answers(logits, answers(case, plan).logits)


def test_keys_are_not_summed_where_the_kept_layer_turns_them_otherwise(tmp_path, questions):
    """A layer that is left out between two of the kept layer's kind may be the first of the stack, with a rotation."""
    folder = tiny.make_checkpoint(tmp_path / "m", "smollm3", no_rope_layers=[1, 1, 1, 0, 0], use_sliding_window=False)
    case = SimpleNamespace(
        runner=LayerRunner(Checkpoint(str(folder))), prompts=encode_questions(questions, tiny.demo_tokenizer())
    )
    plan = MergePlan(N, (MergeStep(N - 1, N - 2, 0.6), MergeStep(N - 1, N - 3, 1.0)), kind="found", norms="fold")
    sources = SourceLayers(case.runner, N - 3, norms="fold")
    how = {"fused_dtype": torch.float32, "plan": ScoringPlan("device", "linear", 1, 4096)}
    scorer = TailScorer(TrunkCache(case.runner, N - 3, tmp_path), case.prompts, sources=sources, **how)
    assert scorer.is_stacked(plan)
    same_answers(scorer.score(plan)[0], answers(case, plan).logits)


def test_the_stack_is_made_only_where_it_is_mixed(case):
    case = case("qwen2")
    sources = SourceLayers(case.runner, N - 3)
    scorer = TailScorer(case.trunk(N - 3), case.prompts, sources=sources)
    for alignment, norms in OPTIONS[1:]:
        scorer.score(replace(PLANS["random"], alignment=alignment, norms=norms))
    assert "stack" not in vars(sources)
    scorer.score(PLANS["random"])
    assert "stack" in vars(sources)


@pytest.mark.parametrize(("family", "biases"), [("qwen2", "keep"), ("phi", "keep"), ("phi", "merge")])
def test_aligned_and_folded_candidates_mix_as_they_are_saved(tmp_path, questions, family, biases):
    """In bfloat16: rounded once, after the sum, so the stack and the fused layer differ by no rounding to 8 bits. Kept
    biases that take up a norm's are rounded too."""
    folder = tiny.make_checkpoint(tmp_path / "base", family, dtype=torch.bfloat16)
    runner = LayerRunner(Checkpoint(str(folder)))
    prompts = encode_questions(questions, tiny.demo_tokenizer())
    trunk = TrunkCache(runner, N - 3, tmp_path / "cache")
    plan = replace(found(0.5, 0.25, biases=biases), alignment="neurons", norms="fold")
    sources = SourceLayers(runner, N - 3, norms="fold", alignment="neurons")
    for dtype in (None, torch.float32):
        stacked = TailScorer(trunk, prompts, sources=sources, fused_dtype=dtype)
        explicit = TailScorer(trunk, prompts, fused_dtype=dtype)
        assert stacked.is_stacked(plan) and not explicit.is_stacked(plan)
        close(stacked.score(plan)[0], explicit.score(plan)[0])
        # Layers that nothing is averaged into are saved with their gains apart, not rounded into the matrices.
        for control in (drop_plan(N, 2), before_last_plan(N, 2)):
            for corner in (control, replace(control, alignment="neurons", norms="fold")):
                close(stacked.score(corner)[0], explicit.score(control)[0])


# -- which plans -----------------------------------------------------------------------------------------------------


def test_coefficients_are_laid_out_by_source(case):
    scorer = TailScorer(case("llama").trunk(N - 3), case("llama").prompts)
    assert scorer.sources.count == 3
    assert scorer.coefficients(found(0.25, 0.5)).tolist() == [0.5, 0.125, 0.375]
    assert scorer.coefficients(drop_plan(N, 2)).tolist() == [1.0, 0.0, 0.0]
    assert scorer.coefficients(before_last_plan(N, 2)).tolist() == [0.0, 0.0, 1.0]
    assert scorer.coefficients(found(0.25, 0.5)).dtype == torch.float64


def test_plans_that_leave_more_than_one_layer_are_refused(case):
    scorer = TailScorer(case("llama").trunk(N - 3), case("llama").prompts)
    for plan in PLANS.values():
        assert scorer.accepts(plan)
    for plan in (base_plan(N), found(0.5), found(0.5, 0.5, 0.5), before_last_plan(N, 1), drop_plan(N, 3)):
        assert not scorer.accepts(plan)
        with pytest.raises(ValueError, match="does not collapse the layers from 2 on into one"):
            scorer.score(plan)
    for plan in (drop_plan(6, 2), drop_plan(6, 3)):
        assert not scorer.accepts(plan)
        with pytest.raises(PlanError, match="the plan is for 6 layers"):
            scorer.score(plan)


def test_mixed_windows_are_refused_not_computed(case):
    case = case("qwen2_last_window")
    scorer = TailScorer(case.trunk(N - 3), case.prompts)
    with pytest.raises(PlanError, match="attention windows differ"):
        scorer.score(found(0.5, 0.5))
    with pytest.raises(PlanError, match="attention windows differ"):
        answers(case, found(0.5, 0.5))


# -- the trunk's cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How many layer calls were made so far."""
    calls = []
    original = LayerRunner._call
    monkeypatch.setattr(LayerRunner, "_call", lambda self, *a, **k: calls.append(a[0]) or original(self, *a, **k))
    return calls


def test_states_are_computed_once(case, tmp_path, counted):
    case = case("llama")
    TailScorer(TrunkCache(case.runner, 2, tmp_path), case.prompts)
    assert set(counted) == {0, 1}
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(case.prompts.shards) and all(f.name.startswith("trunk-") for f in files)
    counted.clear()
    again = TrunkCache(LayerRunner(Checkpoint(str(case.folder))), 2, tmp_path)  # as another worker would
    scorer = TailScorer(again, case.prompts)
    same_answers(scorer.score(PLANS["random"])[0], reference(case, PLANS["random"])[0])
    assert not counted
    answers(case, PLANS["random"], again)
    assert set(counted) == {2}
    assert sorted(tmp_path.iterdir()) == files


def test_the_stored_states_are_those_that_enter_the_layer(case, tmp_path):
    case = case("mistral_window_60")
    model = tiny.merged_model(case.base, [])
    shard = case.prompts.shards[0]
    loaded = TrunkCache(case.runner, 3, tmp_path).load(shard)
    for group, (prefix, own) in zip(shard.groups, loaded, strict=True):
        start = 0
        for ids, row in zip(group.sequences, group.rows, strict=True):
            entered = []
            hook = model.model.layers[3].register_forward_pre_hook(lambda m, args, e=entered: e.append(args[0][0]))
            tiny.plain_logits(model, case.whole[row])
            hook.remove()
            close(torch.cat([prefix, own[start : start + len(ids)]]), entered[0])
            start += len(ids)


def test_several_layers_states_in_one_pass(case, tmp_path, counted):
    """The same files as one by one; each layer is run once, and only after the deepest state that is there."""
    case = case("mistral_window_60")
    shard = case.prompts.shards[0]
    caches = {first: TrunkCache(case.runner, first, tmp_path / "many") for first in (0, 1, 3, 4)}
    compute_trunks([caches[3], caches[1]], shard)
    assert sorted(set(counted)) == [0, 1, 2]
    per_layer = len(counted) / 3
    counted.clear()
    compute_trunks([*caches.values(), caches[4]], shard)
    assert set(counted) == {3} and len(counted) == per_layer
    assert len(list((tmp_path / "many").iterdir())) == 4
    for first, together in caches.items():
        alone = TrunkCache(case.runner, first, tmp_path / "alone")
        assert alone.compute(shard).read_bytes() == together.path(shard).read_bytes()
    counted.clear()
    compute_trunks(list(caches.values()), shard)
    compute_trunks([], shard)
    assert not counted
    # A gap below what is there is filled from below, and what lies deeper goes on from the deepest.
    caches[2] = TrunkCache(case.runner, 2, tmp_path / "many")
    caches[4].path(shard).unlink()
    compute_trunks(list(caches.values()), shard)
    assert sorted(set(counted)) == [1, 3]
    for first in (2, 4):
        alone = TrunkCache(case.runner, first, tmp_path / "alone")
        assert alone.compute(shard).read_bytes() == caches[first].path(shard).read_bytes()


def test_files_are_named_by_content(case, tmp_path):
    one, other = case("llama"), case("qwen2")
    shards = one.prompts.shards
    path = TrunkCache(one.runner, 2, tmp_path).path(shards[0])
    assert path.parent == tmp_path
    assert path == TrunkCache(LayerRunner(Checkpoint(str(one.folder))), 2, tmp_path).path(shards[0])
    changed_token = copy.deepcopy(shards[0])
    changed_token.groups[0].sequences[0][-1] += 1
    others = [
        TrunkCache(other.runner, 2, tmp_path).path(shards[0]),
        TrunkCache(one.runner, 3, tmp_path).path(shards[0]),
        TrunkCache(one.runner, 2, tmp_path).path(shards[1]),
        TrunkCache(one.runner, 2, tmp_path).path(changed_token),
        TrunkCache(LayerRunner(one.runner.checkpoint, dtype=torch.bfloat16), 2, tmp_path).path(shards[0]),
    ]
    assert len({path, *others}) == 1 + len(others)


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_a_file_cut_short_is_made_anew_and_logged(case, tmp_path, caplog, damage):
    """As a power loss can leave one, which would end every resume."""
    case = case("llama")
    trunk = TrunkCache(case.runner, 2, tmp_path)
    path = trunk.compute(case.prompts.shards[0])
    content = path.read_bytes()
    gc.collect()
    path.write_bytes({"empty": b"", "cut": content[:-1], "noise": b"\xff" * len(content)}[damage])
    trunk.load(case.prompts.shards[0])
    assert path.read_bytes() == content
    assert f"the trunk states {path} cannot be read and is made anew" in caplog.text


def test_a_file_of_something_else_is_named(case, tmp_path):
    case = case("llama")
    trunk = TrunkCache(case.runner, 2, tmp_path)
    path = trunk.compute(case.prompts.shards[0])
    gc.collect()
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"the trunk states {path} cannot be read: .*delete the file"):
        trunk.load(case.prompts.shards[0])


def test_a_full_disk_leaves_no_states(case, tmp_path, monkeypatch):
    """Neither an OSError nor safetensors' own error; what was there stays."""
    case = case("llama")
    trunk = TrunkCache(case.runner, 2, tmp_path)
    first, second = case.prompts.shards[:2]
    kept = trunk.compute(first)
    states = load_file(kept)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ValueError, match=rf"the trunk states {trunk.path(second)} cannot be written: .*too large"):
            trunk.compute(second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [kept]

    def fail(_tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(raymerge.tensorfiles, "save_file", fail)
    with pytest.raises(ValueError, match="No space left"):
        trunk.compute(second)
    assert list(tmp_path.iterdir()) == [kept]
    assert all(torch.equal(states[name], tensor) for name, tensor in load_file(kept).items())
