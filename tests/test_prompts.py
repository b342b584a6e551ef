"""prompts.py: token ids equal to those of whole prompts, whatever the tokenizer; shards; windows of plain text."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import raymerge.prompts
from raymerge.prompts import Group, PromptError, Shard, encode_questions, encode_task, encode_text
from raymerge.questions import Question, QuestionSet
from raymerge.tasks import Item, Task


@pytest.fixture(scope="module")
def demo():
    return tiny.demo_tokenizer()


def byte_tokenizer(merges=(), *, bos=False, words=False):
    """A byte-level BPE of single bytes and the given merges; with `words` it splits where GPT-2's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocabulary, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    raw.decoder = decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


SPACE, NEWLINE = "Ġ", "Ċ"  # how a byte-level BPE writes them
LETTER_MERGES = [(SPACE, letter) for letter in "ABCD"]
# "\n\n" and the question's first word melt together across the border between prefix and question.
BORDER_MERGES = [*LETTER_MERGES, (NEWLINE, NEWLINE), (NEWLINE + NEWLINE, "r"), (NEWLINE + NEWLINE + "r", "e")]


def assembled(prompts):
    """{row: whole prompt's ids}; fails where a row occurs twice."""
    found = {}
    for shard in prompts.shards:
        for group in shard.groups:
            assert len(group.sequences) == len(group.rows)
            for ids, row in zip(group.sequences, group.rows, strict=True):
                assert row not in found and len(ids) > 0
                found[row] = np.concatenate([group.prefix, ids]).tolist()
    return found


TOKENIZERS = {
    "bytes": lambda: byte_tokenizer(LETTER_MERGES),
    "border": lambda: byte_tokenizer(BORDER_MERGES),
    "bos": lambda: byte_tokenizer(LETTER_MERGES, bos=True),
    "demo": tiny.demo_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("shots", [0, 2])
def test_prompts_are_those_of_the_whole_text(name, shots):
    tokenizer = TOKENIZERS[name]()
    questions = tiny.make_questions({"roads": 5, "birds": 7, "one": 1}, shots=shots, longest=12)
    prompts = encode_questions(questions, tokenizer)
    bos = tokenizer.bos_token_id if name == "bos" else None
    expected = tiny.whole_prompts(questions, tokenizer, bos=bos)
    assert assembled(prompts) == dict(enumerate(expected))
    assert prompts.answers.tolist() == [question.answer for question in questions.questions]
    # The letters are what " A" … " D" add to a prompt.
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    for letter, token in zip("ABCD", prompts.letters, strict=True):
        without, answered = tokenizer([text, f"{text} {letter}"], add_special_tokens=False)["input_ids"]
        assert answered == [*without, token]


def test_the_border_really_melts():
    """Else the test above would prove nothing: apart, the tokens differ from those of the whole."""
    tokenizer = byte_tokenizer(BORDER_MERGES)
    apart = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("x\n\n", "red")]
    whole = tokenizer("x\n\nred", add_special_tokens=False)["input_ids"]
    assert sum(apart, []) != whole
    # And so a question that starts with "re" takes part of the prefix with it, from all of its group.
    questions = tiny.make_questions({"roads": 6}, longest=3)
    unmelted = [replace(q, text="cat?") for q in questions.questions]
    endings = {}
    for name, asked in {"one": [replace(unmelted[0], text="red?"), *unmelted[1:]], "none": unmelted}.items():
        prompts = encode_questions(replace(questions, questions=tuple(asked)), tokenizer)
        assert assembled(prompts) == dict(enumerate(tiny.whole_prompts(replace(questions, questions=asked), tokenizer)))
        endings[name] = tokenizer.decode(prompts.shards[0].groups[0].prefix)
    assert endings["none"] == endings["one"] + "\n\n" and "Answer:" in endings["one"]


def test_the_shared_prefix_is_as_long_as_it_can_be(demo):
    questions = tiny.make_questions({"roads": 6, "birds": 3})
    prompts = encode_questions(questions, demo)
    whole = tiny.whole_prompts(questions, demo)
    for subject, members in questions.by_subject().items():
        text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        for q in questions.examples[subject]:
            text += q.text + "".join(f"\n{letter}. {o}" for letter, o in zip("ABCD", q.options, strict=True))
            text += f"\nAnswer: {'ABCD'[q.answer]}\n\n"
        prefix = demo(text, add_special_tokens=False)["input_ids"]
        rows = [questions.questions.index(q) for q in members]
        assert all(whole[row][: len(prefix)] == prefix for row in rows)  # here nothing melts
        groups = [g for shard in prompts.shards for g in shard.groups if g.subject == subject]
        assert [g.prefix.tolist() for g in groups] == [prefix] * len(groups)


def test_every_sequence_keeps_a_token_of_its_own():
    """A prompt that is a prefix of the few-shot text would otherwise have no last position to answer from."""
    assert raymerge.prompts._common_prefix(np.arange(9), [np.arange(5), np.arange(12)]) == 4
    assert raymerge.prompts._common_prefix(np.arange(3), [np.arange(5)]) == 3
    assert raymerge.prompts._common_prefix(np.arange(4), [np.array([0, 1, 7, 3, 4]), np.arange(5)]) == 2
    assert raymerge.prompts._common_prefix(np.arange(4), [np.array([9, 1]), np.arange(5)]) == 0


# -- beginning of sequence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by_default", "asked", "there"), [
    (True, None, True), (True, False, False), (True, True, True),
    (False, None, False), (False, True, True), (False, False, False),
])  # fmt: skip
def test_bos_by_option(by_default, asked, there):
    tokenizer = byte_tokenizer(LETTER_MERGES, bos=by_default)
    questions = tiny.make_questions({"roads": 3})
    prompts = encode_questions(questions, tokenizer, add_bos=asked)
    expected = tiny.whole_prompts(questions, tokenizer, bos=0 if there else None)
    assert assembled(prompts) == dict(enumerate(expected))
    for shard in prompts.shards:
        for group in shard.groups:
            assert (group.prefix[0] == 0) is np.bool_(there)
            assert not any((ids == 0).any() for ids in group.sequences)


def test_bos_without_such_a_token():
    tokenizer = byte_tokenizer(LETTER_MERGES)
    tokenizer.bos_token = None
    questions = tiny.make_questions({"roads": 2})
    with pytest.raises(PromptError, match="add_bos is true, but the tokenizer has no beginning-of-sequence token"):
        encode_questions(questions, tokenizer, add_bos=True)
    expected = dict(enumerate(tiny.whole_prompts(questions, tokenizer)))
    assert assembled(encode_questions(questions, tokenizer)) == expected


# -- letters ---------------------------------------------------------------------------------------------------------


def test_letters_of_more_than_one_token_are_refused():
    questions = tiny.make_questions({"roads": 2})
    with pytest.raises(PromptError, match=r"the answer ' A' does not add exactly one token .*it ends in \["):
        encode_questions(questions, byte_tokenizer())
    with pytest.raises(PromptError, match="the answer ' D' does not"):
        encode_questions(questions, byte_tokenizer(LETTER_MERGES[:3]))


def test_letters_that_melt_with_the_prompt_are_refused():
    """A token ": A" takes the place of the prompt's last one, even where there is one token more than before."""
    as_many = [(SPACE, "A"), (":", SPACE + "A"), *LETTER_MERGES[1:]]
    one_more = [*as_many, ("r", ":")]  # "Answe" "r:" becomes "Answe" "r" ": A"
    for merges in (as_many, one_more):
        tokenizer = byte_tokenizer(merges)
        lengths = [len(tokenizer(text)["input_ids"]) for text in ("Answer:", "Answer: A")]
        assert lengths[1] - lengths[0] == (merges is one_more)
        with pytest.raises(PromptError, match="the answer ' A' does not add exactly one token"):
            encode_questions(tiny.make_questions({"roads": 2}), tokenizer)


def test_an_empty_question_set(demo):
    with pytest.raises(PromptError, match="the question set is empty"):
        encode_questions(QuestionSet("x", "en", "test", (), {}), demo)


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 50, 200, 1000, 10**6])
def test_every_question_is_in_exactly_one_shard(demo, shard_tokens):
    questions = tiny.make_questions({"roads": 9, "birds": 4, "cats": 1, "boxes": 6}, longest=60)
    prompts = encode_questions(questions, demo, shard_tokens=shard_tokens)
    assert assembled(prompts) == dict(enumerate(tiny.whole_prompts(questions, demo)))
    longest = max(len(ids) for shard in prompts.shards for group in shard.groups for ids in group.sequences)
    for shard in prompts.shards:
        own = [sum(len(ids) for ids in group.sequences) for group in shard.groups]
        # "About": what is cut is the questions' own tokens, and one question is never cut.
        assert sum(own) <= max(shard_tokens, longest)
    if shard_tokens == 1:
        assert all(len(shard.groups) == 1 and len(shard.groups[0].rows) == 1 for shard in prompts.shards)
    if shard_tokens == 10**6:
        assert len(prompts.shards) == 1 and len(prompts.shards[0].groups) == 4


def test_identities(demo):
    questions = tiny.make_questions({"roads": 5, "birds": 4})
    one = encode_questions(questions, demo)
    assert one.identity == encode_questions(questions, demo).identity
    assert len(one.identity) == len(one.shards[0].identity) == 16
    assert encode_questions(questions, demo, shard_tokens=100).identity != one.identity
    other_answer = QuestionSet(
        "x", "en", "test",
        tuple(Question(q.question_id, q.subject, q.split, "en", q.text, q.options, (q.answer + 1) % 4)
              for q in questions.questions),
        questions.examples,
    )  # fmt: skip
    changed = encode_questions(other_answer, demo)
    assert changed.identity != one.identity
    assert changed.shards[0].identity == one.shards[0].identity  # the states do not depend on the answers


def test_a_shard_s_identity_is_of_its_tokens_and_grouping():
    a, b, c = (np.array(x) for x in ([1, 2], [3], [4, 5]))
    shards = [
        Shard((Group("s", a, (b, c), (0, 1)),)),
        Shard((Group("s", a, (c, b), (0, 1)),)),
        Shard((Group("s", b, (a, c), (0, 1)),)),
        Shard((Group("s", a, (np.array([3, 4, 5]),), (0,)),)),
        Shard((Group("s", a, (b,), (0,)), Group("s", c, (), ()))),
        Shard((Group("s", a, (b, np.array([4, 6])), (0, 1)),)),
        Shard((Group("s", np.array([1, 2, 3]), (c,), (0,)),)),
    ]
    assert len({shard.identity for shard in shards}) == len(shards)
    same = Shard((Group("other name", a.astype(np.int32), (b, c), (7, 8)),))
    assert same.identity == shards[0].identity
    assert shards[0].tokens == 5 and shards[4].tokens == 5


# -- plain text ------------------------------------------------------------------------------------------------------


def letters_tokenizer():
    """One token a character, its code point: token counts are lengths."""

    def tokenizer(text, **_):
        return {"input_ids": [ord(character) for character in text]}

    tokenizer.bos_token_id = None
    return tokenizer


def windows_of(shards):
    rows = {}
    for shard in shards:
        for group in shard.groups:
            assert group.prefix.shape == (0,) and group.subject == "text"
            rows |= dict(zip(group.rows, group.sequences, strict=True))
    return [rows[row].tolist() for row in sorted(rows)]


@pytest.mark.parametrize(
    ("length", "limit", "lengths"),
    [
        (10, None, [4, 4, 2]),
        (9, None, [4, 4]),  # a last window of one token has nothing to score
        (8, None, [4, 4]),
        (2, None, [2]),
        (100, 11, [4, 4, 3]),
        (100, 5, [4]),
        (100, 2, [2]),
        (3, 100, [3]),
        (50, None, [4] * 12 + [2]),
    ],
)
def test_windows_do_not_overlap(length, limit, lengths):
    text = "".join(chr(97 + i % 26) for i in range(length))
    found = windows_of(encode_text(text, letters_tokenizer(), limit=limit, window=4))
    assert [len(window) for window in found] == lengths
    ids = [ord(character) for character in text]
    assert sum(found, []) == ids[: sum(lengths)]


def test_the_window_is_1024_tokens():
    found = windows_of(encode_text("x" * 5000, letters_tokenizer()))
    assert [len(window) for window in found] == [1024] * 4 + [5000 - 4096]


@pytest.mark.parametrize(("text", "limit"), [("", None), ("x", None), ("xyz", 1)])
def test_too_little_text(text, limit):
    with pytest.raises(PromptError, match=r"the text for perplexity has [01] tokens: it needs at least 2"):
        encode_text(text, letters_tokenizer(), limit=limit)


def test_a_text_can_begin_later():
    text = "".join(chr(97 + i % 26) for i in range(50))
    found = windows_of(encode_text(text, letters_tokenizer(), start=40, limit=7, window=4))
    assert sum(found, []) == [ord(character) for character in text[40:47]]
    with pytest.raises(PromptError, match="has 1 tokens of 50 after the first 49: it needs at least 2"):
        encode_text(text, letters_tokenizer(), start=49)


@pytest.mark.parametrize("kind", ["demo", "words", "no words"])
def test_no_more_of_a_long_text_is_tokenised_than_it_takes(kind):
    """20 MB at once took 3 GB and 20 s in every process, for the first few thousand tokens."""
    draw = random.Random(0)
    rows = ["the red cat", "=" * 100, "\n" * 9, " " * 70, "aab" * 30, "0123456789", "日本語のとても長い文", "x", "."]
    text = "".join(draw.choice(rows) + draw.choice(["", " ", "\n", "a"]) for _ in range(20_000))
    merges = [("a", "a"), ("aa", "a"), ("aa", "b"), ("=", "="), ("==", "=="), (SPACE, SPACE), ("t", "h"), ("th", "e")]
    tokenizer = tiny.demo_tokenizer() if kind == "demo" else byte_tokenizer(merges, words=kind == "words")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    asked = []

    def tokenised(part, **options):
        asked.append(len(part))
        return tokenizer(part, **options)

    for start, limit in [(0, 2), (0, 700), (31, 1000), (5000, 9000)]:
        spy = type("Spy", (), {"bos_token_id": None, "__call__": staticmethod(tokenised)})()
        found = windows_of(encode_text(text, spy, start=start, limit=limit, add_bos=False))
        assert sum(found, []) == ids[start : start + limit]
        assert max(asked) < 0.5 * len(text)
        asked.clear()
    assert sum(windows_of(encode_text(text, tokenizer, limit=len(ids), window=10**6)), []) == ids


def test_windows_of_text_begin_as_the_tokenizer_or_the_option_says():
    """All that a text's tokens lose to the first one is one place of each window."""
    tokenizer = byte_tokenizer(bos=True)
    ids = tokenizer("red cat", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7 and tokenizer("red cat")["input_ids"] == [0, *ids]
    found = windows_of(encode_text("red cat", tokenizer, window=4))
    assert found == windows_of(encode_text("red cat", tokenizer, window=4, add_bos=True))
    assert found == [[0, *ids[:3]], [0, *ids[3:6]], [0, ids[6]]]
    assert windows_of(encode_text("red cat", tokenizer, add_bos=False)) == [ids]
    assert windows_of(encode_text("red cat", tokenizer, start=5, limit=1)) == [[0, ids[5]]]
    with pytest.raises(PromptError, match="has 0 tokens of 7 after the first 7"):
        encode_text("red cat", tokenizer, start=7)
    with pytest.raises(PromptError, match="add_bos is true, but the tokenizer has no"):
        encode_text("red cat", letters_tokenizer(), add_bos=True)


def test_long_texts_do_not_warn(demo, recwarn):
    """Longer than the model's longest input: that is what windows are for."""
    demo.model_max_length = 10
    encode_text("the red cat " * 30, demo, window=16)
    encode_questions(tiny.make_questions({"roads": 1}), demo)
    assert not recwarn.list


def test_letters_must_be_the_same_in_every_subject():
    class Fickle:
        """Encodes " A" as another token when the prompt is about zebras."""

        bos_token_id = None

        def __call__(self, texts, **_):
            if isinstance(texts, str):
                return {"input_ids": [ord(c) for c in texts]}
            return {"input_ids": [[*map(ord, t[:-2]), ord(t[-1]) + 1000 * ("zebras" in t)] if t[-2] == " " else
                                  [*map(ord, t)] for t in texts]}  # fmt: skip

    with pytest.raises(PromptError, match="the answer letters' tokens are .* in zebras but .* before it"):
        encode_questions(tiny.make_questions({"zebras": 1, "roads": 1}), Fickle())
    assert encode_questions(tiny.make_questions({"roads": 1}), Fickle()).letters == tuple(map(ord, "ABCD"))


def test_a_tokenizer_without_bos_attribute_of_its_own():
    assert raymerge.prompts.bos_token(SimpleNamespace(bos_token_id=None), False) is None


# -- tasks: choices after a context ----------------------------------------------------------------------------------

LONG = "the red cat has a small box and two old birds in water near that long road of stone by night "


def make_task(contexts, choices, examples=()):
    items = tuple(Item(f"t/{i}", text, tuple(choices), 0) for i, text in enumerate(contexts))
    return Task("t", True, items, tuple(Item(f"t/e{i}", text, ("yes", "no"), 1) for i, text in enumerate(examples)))


def harness_pair(tokenizer, context, continuation, bos):
    """Context's and continuation's ids as lm-evaluation-harness splits them (api/model.py, TemplateLM._encode_pair)."""

    def encode(text):
        return ([] if bos is None else [bos]) + tokenizer(text, add_special_tokens=False)["input_ids"]

    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, start = encode(context + continuation), encode(context)
    return start, whole[len(start) :]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("examples", [(), (LONG * 4, LONG)])
@pytest.mark.parametrize("shard_tokens", [40, 10**6])
def test_choices_are_those_of_the_harness(name, examples, shard_tokens):
    tokenizer = TOKENIZERS[name]()
    bos = tokenizer.bos_token_id if name == "bos" else None
    texts = [LONG + "Answer:", "Question:\n\nthe", "in water \n", LONG]
    choices = ["red", "red cat", " old", "A", ""]
    task = make_task(texts, choices, examples)
    prompts = encode_task(task, tokenizer, shard_tokens=shard_tokens)
    prefix = "".join(f"{text} no\n\n" for text in examples)
    found = assembled(prompts)
    pairs = [harness_pair(tokenizer, prefix + text, f" {choice}", bos) for text in texts for choice in choices]
    assert [found[row] for row in range(len(pairs))] == [context + own for context, own in pairs]
    assert prompts.scored.tolist() == [len(own) for _, own in pairs]
    # No scored token is in a prefix; an item's choices are in one shard, and every item in one.
    assert all(
        len(ids) >= prompts.scored[row]
        for shard in prompts.shards
        for group in shard.groups
        for row, ids in zip(group.rows, group.sequences, strict=True)
    )
    items = [prompts.items(shard).tolist() for shard in prompts.shards]
    assert sorted(sum(items, [])) == list(range(4))
    assert len(items) == (1 if shard_tokens > 40 else 4)


def test_what_costs_fewer_tokens_is_shared(demo):
    """Long contexts once each; long examples once for all, where contexts are short."""
    apart = encode_task(make_task([LONG * 3, "old " + LONG * 3], ["cat", "box"]), demo)
    assert [len(group.sequences) for group in apart.shards[0].groups] == [2, 2]
    texts = ["red", "small", "two"]
    together = encode_task(make_task(texts, ["cat", "box"], [LONG * 3]), demo)
    (group,) = together.shards[0].groups
    assert len(group.sequences) == 6 and len(group.prefix) > 3 * len(LONG.split())


def test_contexts_without_tokens_are_refused(demo):
    with pytest.raises(PromptError, match="task t: the context of t/1 has no tokens"):
        encode_task(make_task(["red", " "], ["cat", "box"]), demo)


def test_shards_for_many_workers(demo):
    """Smaller shards where there would be too few, but none below 2,048 tokens for the sake of it."""
    questions = tiny.make_questions({name: 30 for name in ("boxes", "cats", "roads")})
    few, many, more = (encode_questions(questions, demo, shards=shards) for shards in (1, 3, 1000))
    assert len(few.shards) < len(many.shards) <= len(more.shards)
    assert all(shard.tokens > 300 for shard in more.shards)
    assert assembled(few) == assembled(many) == assembled(more)
    task = make_task([f"{i} {LONG * 4}" for i in range(90)], ["cat", "box"])
    assert len(encode_task(task, demo).shards) < len(encode_task(task, demo, shards=4).shards)


def test_shards_are_of_the_size_at_which_workers_are_done_soonest(monkeypatch):
    monkeypatch.setattr(raymerge.prompts, "_LEAST_TOKENS", 1)
    ids = np.arange(5)
    groups = [Group(str(n), ids[:0], (ids,) * 20, tuple(range(20 * n, 20 * n + 20))) for n in range(6)]

    def sizes(workers, limit=450):
        return [shard.tokens for shard in raymerge.prompts._balanced(groups, limit, workers)]

    assert sizes(1) == [400, 200]
    assert sizes(3) == [200, 200, 200]  # of [400, 200], which leaves one worker without work
    assert sizes(2, 350) == [300, 300]
    assert sizes(2, 650) == [300, 300]
    monkeypatch.setattr(raymerge.prompts, "_LEAST_TOKENS", 10**6)  # no shard is made small for its own sake
    assert sizes(3) == [400, 200]
