"""context.py: text by position and retrieval against transformers' own forwards, and what the prompts are made of."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from raymerge.checkpoint import Checkpoint
from raymerge.context import ContextError, TextLosses, position_nll, retrieval_prompts, retrieve, usable_distances
from raymerge.evaluation import text_nll
from raymerge.forward import LayerRunner
from raymerge.plan import base_plan, before_last_plan, drop_plan, tail_plan
from raymerge.prompts import Group, PromptError, Shard, encode_text
from raymerge.trunk import TrunkCache

torch.set_num_threads(1)

LIMIT = 2e-5  # as in test_scoring.py: float32's roundoff amplified by the layers, as a part of the largest logit
N = tiny.N_LAYERS
PLANS = [base_plan(N), tail_plan(N, [0.3, 0.8], name="x", kind="found"), before_last_plan(N, 2), drop_plan(N, 4)]
TEXT = " ".join(np.random.default_rng(5).choice(tiny.WORDS, 400))
EDGES = (0, 2, 16, 40, 64)


@pytest.fixture(scope="module", params=["llama", "mistral_window", "qwen2_windows"])
def case(request, tmp_path_factory):
    folder = tiny.make_checkpoint(tmp_path_factory.mktemp("m"), request.param)
    runner = LayerRunner(Checkpoint(str(folder)))
    return SimpleNamespace(
        runner=runner,
        base=AutoModelForCausalLM.from_pretrained(folder),
        trunk=TrunkCache(runner, N - 3, tmp_path_factory.mktemp("trunk")),
    )


# -- plain text by position ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_losses_by_position_are_transformers_losses(case, plan):
    """The last window is shorter than the others, so that the last buckets hold fewer tokens."""
    merged = tiny.merged_model(case.base, tiny.steps_of(plan))
    shards = encode_text(TEXT, tiny.demo_tokenizer(), limit=300, window=64)
    wanted, tokens = np.zeros(4), np.zeros(4, int)
    for ids in (ids for shard in shards for ids in shard.groups[0].sequences):
        losses = F.cross_entropy(tiny.plain_logits(merged, ids)[:-1], torch.from_numpy(ids[1:]), reduction="none")
        for position, loss in enumerate(losses.tolist(), start=1):
            bucket = next(b for b in range(4) if EDGES[b] <= position < EDGES[b + 1])
            wanted[bucket] += loss
            tokens[bucket] += 1
    assert tokens[0] == 5 and tokens[-1] < 5 * 24
    for trunk in (None, case.trunk):
        parts = [position_nll(case.runner, plan, shard, trunk=trunk, edges=EDGES) for shard in shards]
        assert [part.edges for part in parts] == [EDGES] * len(parts)
        found = TextLosses.join(parts[::-1])  # as workers may give them
        assert found.windows.tolist() == list(range(len(found.windows)))
        sums, counts = found.nll.sum(0), found.tokens.sum(0)
        assert counts.tolist() == tokens.tolist()
        assert (abs(sums - wanted) < LIMIT * 50 * tokens).all()  # logits of these models stay below 50
        totals = [text_nll(case.runner, plan, shard, trunk=trunk) for shard in shards]
        assert sum(nll for nll, _ in totals) == pytest.approx(sums.sum(), rel=1e-12)
        assert sum(n for _, n in totals) == counts.sum()


def test_positions_count_the_prefix(case):
    """A text cut in two anywhere has the same losses at the same positions; the cut's own predecessors are run once."""
    ids = np.random.default_rng(1).integers(5, 800, 30)
    edges = range(31)
    whole = Shard((Group("text", ids[:0], (ids,), (0,)),))
    cut = Shard((Group("text", ids[:12], (ids[12:],), (0,)),))
    all_of_it, later = (position_nll(case.runner, PLANS[1], shard, edges=edges) for shard in (whole, cut))
    assert all_of_it.tokens.tolist() == [[0] + 29 * [1]] and later.tokens.tolist() == [12 * [0] + 18 * [1]]
    np.testing.assert_allclose(later.nll[0, 12:], all_of_it.nll[0, 12:], atol=LIMIT * 50)


def test_losses_by_fewer_edges_are_sums():
    losses = TextLosses(
        (1, 4, 8, 16), np.arange(2), np.array([[1.0, 2, 4], [8, 16, 32]]), np.array([[3, 4, 8], [3, 4, 2]])
    )
    found = losses.coarser((1, 8, 16))
    assert found.edges == (1, 8, 16) and found.nll.tolist() == [[3, 4], [24, 32]]
    assert found.tokens.tolist() == [[7, 8], [7, 2]] and found.windows.tolist() == [0, 1]
    with pytest.raises(ContextError, match=r"edges \[1, 8\] should begin and end as \[1, 4, 8, 16\]"):
        losses.coarser((1, 8))
    with pytest.raises(ContextError, match=r"edges \[4, 16\] should begin"):
        losses.coarser((4, 16))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ((0,), r"\[0\] must be at least two"),
        ((0, 10, 10, 64), "greater than the one before"),
        ((0, 1.5, 64), "whole numbers"),
        ((2, 64), "from 2 to 64 leave tokens out: the positions scored are 1 to 63"),
        ((1, 63), "the last at least 64"),
    ],
)
def test_edges_that_leave_tokens_out_are_refused(case, edges, message):
    (shard, *_) = encode_text(TEXT, tiny.demo_tokenizer(), limit=300, window=64)
    with pytest.raises(ContextError, match=message):
        position_nll(case.runner, PLANS[0], shard, edges=edges)
    position_nll(case.runner, PLANS[0], shard, edges=(1, 64))
    beyond = position_nll(case.runner, PLANS[0], shard, edges=(0, 64, 128, 4096))  # no window is as long
    assert not beyond.tokens[:, 1:].any() and not beyond.nll[:, 1:].any() and beyond.tokens[:, 0].all()


# -- what the retrieval prompts are made of --------------------------------------------------------------------------

DISTANCES = (16, 17, 30, 32, 63, 256)


@pytest.fixture(scope="module")
def prompts():
    return retrieval_prompts(tiny.demo_tokenizer(), distances=DISTANCES, per_distance=9, seed=3)


def sequences_of(prompts):
    """{row: ids}."""
    groups = [group for shard in prompts.shards for group in shard.groups]
    assert not any(len(group.prefix) for group in groups)
    return {row: ids for group in groups for row, ids in zip(group.rows, group.sequences, strict=True)}


def test_a_prompt_asks_for_a_value_exactly_its_distance_back(prompts):
    """Read as text, line by line, without what the generator knows."""
    tokenizer = tiny.demo_tokenizer()
    sequences = sequences_of(prompts)
    assert sorted(sequences) == list(range(len(DISTANCES) * 9)) and prompts.answers.dtype == np.int8
    assert prompts.distances.tolist() == [distance for distance in DISTANCES for _ in range(9)]
    for row, ids in sequences.items():
        *lines, query = tokenizer.decode(ids).split("\n")
        pairs = [line.strip().split(": ") for line in lines]
        assert query.endswith(":")
        (value,) = (value for key, value in pairs if key == query.strip()[:-1])
        words = [word for key, _ in pairs for word in key.split()]
        assert len(set(words)) == len(words)  # no word in two keys: each names one line
        options = [tokenizer.decode([token]).strip() for token in prompts.options[row]]
        assert len(set(options)) == 4 and options[prompts.answers[row]] == value
        assert {other for _, other in pairs} <= set(options) and not set(options) & set(words)
        # The next token would stand at len(ids).
        place = len(ids) - prompts.distances[row]
        assert ids[place] == prompts.options[row][prompts.answers[row]]
        assert ids[place - 2 : place].tolist() == ids[-2:].tolist()
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids.tolist()
    lengths = np.array([len(sequences[row]) for row in range(len(sequences))])
    assert (lengths == prompts.distances + 30).all()


def test_answers_and_values_are_drawn_evenly():
    found = retrieval_prompts(tiny.demo_tokenizer(), distances=(16,), per_distance=400, seed=0)
    assert (abs(np.bincount(found.answers, minlength=4) - 100) < 35).all()  # 4 standard deviations
    # Neither the first nor the last of 11 values is the answer more often than any other but the one that is asked for.
    sequences = sequences_of(found)
    for place in (2, -4):
        hits = sum(ids[place] == found.options[row][found.answers[row]] for row, ids in sequences.items())
        assert abs(hits - 400 * 20 / 110) < 35


def test_the_most_frequent_value_is_no_better_guess_than_another(prompts):
    """A model that has lost the keys but not the values must not seem to retrieve: one line in so many is the answer's,
    so that of values drawn one by one the most frequent is right in 42 % of prompts of 16 tokens."""
    for row, ids in sequences_of(prompts).items():
        counts = np.array([np.count_nonzero(ids == option) for option in prompts.options[row]])
        assert counts.max() - counts.min() <= 1


def test_prompts_follow_from_the_seed_alone(prompts):
    tokenizer = tiny.demo_tokenizer()
    again, other = (retrieval_prompts(tokenizer, distances=DISTANCES, per_distance=9, seed=seed) for seed in (3, 4))
    assert [shard.identity for shard in again.shards] == [shard.identity for shard in prompts.shards]
    assert [shard.identity for shard in other.shards] != [shard.identity for shard in prompts.shards]
    assert np.array_equal(again.options, prompts.options) and np.array_equal(again.answers, prompts.answers)
    # One distance alone, or fewer prompts, are the same prompts.
    alone = sequences_of(retrieval_prompts(tokenizer, distances=(63,), per_distance=4, seed=3))
    whole = sequences_of(prompts)
    start = DISTANCES.index(63) * 9
    assert all(np.array_equal(alone[i], whole[start + i]) for i in range(4))


def test_the_beginning_of_sequence_token_moves_nothing(prompts):
    tokenizer = tiny.demo_tokenizer()
    with_bos = retrieval_prompts(tokenizer, distances=DISTANCES, per_distance=9, seed=3, add_bos=True)
    plain, begun = sequences_of(prompts), sequences_of(with_bos)
    assert all(begun[row].tolist() == [tokenizer.bos_token_id, *plain[row].tolist()] for row in plain)
    tokenizer.bos_token = None
    with pytest.raises(PromptError, match="no beginning-of-sequence token"):
        retrieval_prompts(tokenizer, distances=(16,), per_distance=1, seed=0, add_bos=True)


def byte_level_tokenizer(words, vocabulary):
    """As in GPT-2, Llama 3 and Qwen: a space is a letter of its own kind."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([f" {word}" for word in words], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model)


def test_byte_level_tokenizers_will_do():
    """Words that are cut in two are left out."""
    words = ["".join(letters) for letters in itertools.product("bdfgklm", "aeiou", "nrst")]
    tokenizer = byte_level_tokenizer(words[:100] * 2, 1000)
    assert len(tokenizer(" ban")["input_ids"]) == 1 < len(tokenizer(f" {words[-1]}")["input_ids"])
    found = retrieval_prompts(tokenizer, distances=(16, 61), per_distance=3, seed=0)
    for row, ids in sequences_of(found).items():
        value = ids[len(ids) - found.distances[row]]
        assert value == found.options[row][found.answers[row]]
        text = tokenizer.decode(ids)
        assert set(re.findall("[a-z]+", text)) <= set(words[:100])
        query = text.splitlines()[-1]
        assert f"\n{query}{tokenizer.decode([value])}\n" in text
    with pytest.raises(ContextError, match="400 tokens needs 111 .* has 100: ask for distances of at most 350"):
        retrieval_prompts(tokenizer, distances=(16, 400), per_distance=3, seed=0)


def test_a_shorter_distance_may_need_more_words_than_the_longest():
    """Two-word keys fill up what lines of four tokens leave: 355 needs 102 words, 356 only 100. Together they ended in
    an IndexError, and 355 alone was refused with the advice to ask for at most 356."""
    words = ["".join(letters) for letters in itertools.product("bdfgklm", "aeiou", "nrst")][:100]
    tokenizer = byte_level_tokenizer(words * 2, 1000)
    for distances in ((355, 356), (355,), (351,)):
        refused = f"a distance of {distances[0]} tokens .* ask for distances of at most 350"
        with pytest.raises(ContextError, match=refused):
            retrieval_prompts(tokenizer, distances=distances, per_distance=1, seed=0)
    found = retrieval_prompts(tokenizer, distances=(*range(16, 351), 356), per_distance=1, seed=0)
    assert [len(ids) for ids in sequences_of(found).values()] == [30 + d for d in (*range(16, 351), 356)]
    few = byte_level_tokenizer(words[:15] * 2, 1000)
    assert len(retrieval_prompts(few, distances=(16,), per_distance=1, seed=0).answers) == 1
    with pytest.raises(ContextError, match="17 tokens needs 16 .* has 15: ask for distances of at most 16"):
        retrieval_prompts(few, distances=(17,), per_distance=1, seed=0)


def test_lines_of_two_words_stand_anywhere_after_the_one_that_is_asked_for():
    found = sequences_of(retrieval_prompts(tiny.demo_tokenizer(), distances=(31,), per_distance=60, seed=0))
    lines = [tiny.demo_tokenizer().decode(ids).split("\n") for ids in found.values()]  # eight and six, then the key
    places = [[at for at, line in enumerate(of) if len(line.split(":")[0].split()) == 2] for of in lines]
    assert {len(at) for at in places} == {3} and {at for of in places for at in of} == set(range(8, 14))


def test_a_tokenizer_without_words_is_refused():
    with pytest.raises(ContextError, match="has 0 words of one token that stand alone: too few"):
        retrieval_prompts(byte_level_tokenizer([], 300), distances=(16,), per_distance=1, seed=0)


def test_shards_stay_small():
    found = retrieval_prompts(tiny.demo_tokenizer(), distances=(16, 1024), per_distance=20, seed=0)
    assert [len(shard.groups[0].sequences) for shard in found.shards] == [20, 7, 7, 6]
    assert max(shard.tokens for shard in found.shards) <= 8192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distances": (15, 32)}, "none below 16"),
        ({"distances": ()}, "at least one"),
        ({"distances": (32, 32)}, "must be different"),
        ({"per_distance": 0}, "per_distance is 0"),
        ({"distances": (4096,)}, r"needs 1035 different words of one token, but this tokenizer has (\d+)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ContextError, match=message):
        retrieval_prompts(tiny.demo_tokenizer(), **({"distances": (32,), "per_distance": 2, "seed": 0} | options))


def test_the_longest_distance_named_in_the_refusal_can_be_drawn():
    tokenizer = tiny.demo_tokenizer()
    with pytest.raises(ContextError) as refusal:
        retrieval_prompts(tokenizer, distances=(4096,), per_distance=1, seed=0)
    longest = int(str(refusal.value).rsplit(" ", 1)[1])
    assert retrieval_prompts(tokenizer, distances=(longest,), per_distance=1, seed=0).distances.tolist() == [longest]
    with pytest.raises(ContextError):
        retrieval_prompts(tokenizer, distances=(longest + 4,), per_distance=1, seed=0)


def test_distances_that_a_model_cannot_bridge_are_left_out(tmp_path):
    asked = (16, 64, 128, 256)

    def usable(name, family, **options):
        return usable_distances(Checkpoint(str(tiny.make_checkpoint(tmp_path / name, family, **options))), asked)

    assert usable("long", "llama") == asked
    # 128 + 30 tokens and what a prompt may begin with just fit.
    assert usable("fits", "llama", max_position_embeddings=160) == (16, 64, 128)
    assert usable("short", "llama", max_position_embeddings=159) == (16, 64)
    assert usable("window", "mistral_window", sliding_window=64) == (16, 64)
    assert usable("narrow", "mistral_window", sliding_window=63) == (16,)
    assert usable("mixed", "qwen2_windows") == asked  # two of its layers see everything
    said = r"\[16, 64, 128, 256\] are all too long .* could reach 15 tokens back: set sweep.context: false"
    with pytest.raises(ContextError, match=said):
        usable("none", "llama", max_position_embeddings=47)
    with pytest.raises(ContextError, match=r"\[64\] .* 63 tokens back: give shorter ones \(from 16 on\), or set sweep"):
        usable_distances(Checkpoint(str(tmp_path / "narrow")), (64,))


# -- retrieval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_answers_are_those_of_plain_forwards(case, plan):
    prompts = retrieval_prompts(tiny.demo_tokenizer(), distances=(16, 50), per_distance=5, seed=1)
    merged = tiny.merged_model(case.base, tiny.steps_of(plan))
    last = {row: tiny.plain_logits(merged, ids)[-1].numpy() for row, ids in sequences_of(prompts).items()}
    for trunk in (None, case.trunk):
        rows = []
        for shard in prompts.shards:
            found = retrieve(case.runner, plan, prompts, shard, trunk=trunk)
            assert found.correct.dtype == bool and found.logits.dtype == np.float32
            for row, logits, correct in zip(found.rows.tolist(), found.logits, found.correct, strict=True):
                wanted = last[row][prompts.options[row]]
                assert abs(logits - wanted).max() < LIMIT * abs(last[row]).max()
                assert correct == (wanted.argmax() == prompts.answers[row])
            rows += found.rows.tolist()
        assert sorted(rows) == list(range(10))


def test_chance_is_a_quarter(tmp_path):
    """A model that knows nothing of the prompts is right as often as a guess."""
    runner = LayerRunner(Checkpoint(str(tiny.make_checkpoint(tmp_path / "m"))))
    prompts = retrieval_prompts(tiny.demo_tokenizer(), distances=(16,), per_distance=400, seed=2)
    right = sum(int(retrieve(runner, base_plan(N), prompts, shard).correct.sum()) for shard in prompts.shards)
    assert abs(right - 100) < 35
