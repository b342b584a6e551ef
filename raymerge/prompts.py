"""Questions and plain text as token ids, grouped so that what prompts share is computed once.

A group is one shared prefix (a subject's few-shot examples; empty for plain text) and the sequences that follow it.
Prompts are always tokenised whole; the shared prefix is what their token ids have in common, so that sharing can
never change a prompt, whatever the tokenizer does where prefix and question meet.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymerge.errors import UserError
from raymerge.identity import digest
from raymerge.objectives import TEXT_WINDOW
from raymerge.questions import LETTERS, QuestionSet, prefix_text, question_text
from raymerge.tasks import Task

SHARD_TOKENS = 8192  # of a shard, about: 25 MB of bfloat16 states at hidden size 1536
_CHARACTERS = 6  # a token, about: how much of a long text is tokenised first
_UNSETTLED = 256  # tokens before a cut that are not taken, since the cut may have changed them
_LEAST_TOKENS = 2048  # of a shard that is made small for many workers
_SHARD_COST = 250  # tokens that converting the weights, once a shard, costs about
_PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the target size, tried so that workers end together


class PromptError(UserError):
    """A tokenizer or a text that prompts cannot be made with; the message names what was found."""


@dataclass(frozen=True)
class Group:
    """Sequences that share a prefix.

    prefix: (P,) int64 token ids, P may be 0; sequences: the ids that follow, each of at least one token; rows: for
    each sequence, the row of the question set (or the number of the text window) that it belongs to.
    """

    subject: str
    prefix: np.ndarray
    sequences: tuple[np.ndarray, ...]
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens to run: the prefix once, and every sequence's own."""
        return len(self.prefix) + sum(len(ids) for ids in self.sequences)


@dataclass(frozen=True)
class Shard:
    """A share of the groups small enough to be run in one piece; the unit of caching and of parallel work."""

    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        return sum(group.tokens for group in self.groups)

    @property
    def identity(self) -> str:
        """16 hex digits over all token ids and how they are grouped."""
        sha = hashlib.sha256()
        for group in self.groups:
            for ids in (group.prefix, *group.sequences):
                sha.update(len(ids).to_bytes(8, "little"))
                sha.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
            sha.update(b"|")
        return sha.hexdigest()[:16]


@dataclass(frozen=True)
class Prompts:
    """A tokenised question set: `letters` are the token ids of " A" … " D"; `answers` (n,) int8 in 0-3."""

    shards: tuple[Shard, ...]
    letters: tuple[int, ...]
    answers: np.ndarray

    @property
    def identity(self) -> str:
        return digest([self.letters, self.answers.tolist(), [shard.identity for shard in self.shards]])


@dataclass(frozen=True)
class ChoicePrompts:
    """A tokenised task. Choices are numbered item by item, `first` (items + 1,) int64 saying where each item's begin;
    rows of the groups are these numbers. scored (choices,) int64: how many of the last tokens of a choice's sequence
    are its own, the others being context. All choices of an item are in one shard.
    """

    shards: tuple[Shard, ...]
    first: np.ndarray
    scored: np.ndarray

    def items(self, shard: Shard) -> np.ndarray:
        """The items (ascending int64) whose choices a shard holds."""
        rows = np.array([row for group in shard.groups for row in group.rows])
        return np.unique(np.searchsorted(self.first, rows, side="right") - 1)


def encode_questions(
    questions: QuestionSet,
    tokenizer: Any,
    *,
    add_bos: bool | None = None,
    shard_tokens: int = SHARD_TOKENS,
    shards: int = 1,
) -> Prompts:
    """Tokenise a question set.

    add_bos: put the beginning-of-sequence token first; None does what the tokenizer does by default.
    shard_tokens: target size of a shard; smaller where there would be fewer than `shards`, but 2,048 at the least.
    """
    bos = bos_token(tokenizer, add_bos)
    groups, letters = [], None
    row_of = {question.question_id: row for row, question in enumerate(questions.questions)}
    for subject, members in questions.by_subject().items():
        prefix = prefix_text(subject, questions.examples[subject])
        texts = [prefix + question_text(question) for question in members]
        encoded = token_ids([prefix, *texts], tokenizer, bos)
        found = _letter_ids(texts[0], encoded[1], tokenizer, bos)
        if letters is not None and found != letters:
            raise PromptError(f"the answer letters' tokens are {found} in {subject} but {letters} before it")
        letters = found
        shared = _common_prefix(encoded[0], encoded[1:])
        groups.append(
            Group(
                subject,
                encoded[0][:shared],
                tuple(ids[shared:] for ids in encoded[1:]),
                tuple(row_of[question.question_id] for question in members),
            )
        )
    if letters is None:
        raise PromptError("the question set is empty")
    answers = np.array([question.answer for question in questions.questions], dtype=np.int8)
    limit = _limit(sum(group.tokens for group in groups), shard_tokens, shards)
    return Prompts(_balanced(groups, limit, shards), letters, answers)


def encode_task(
    task: Task, tokenizer: Any, *, add_bos: bool | None = None, shard_tokens: int = SHARD_TOKENS, shards: int = 1
) -> ChoicePrompts:
    """Tokenise a task: every choice after its context, and what can be shared as the prefix of a group. Shards as
    `encode_questions`.

    As lm-evaluation-harness does (`TemplateLM._encode_pair`): white space at the context's end belongs to the choices,
    and a choice's tokens are those that context and choice together have beyond the number that the context has alone.
    Either an item's choices share its context, or all items the examples: whichever leaves fewer tokens to run.
    """
    bos = bos_token(tokenizer, add_bos)
    first = np.concatenate([[0], np.cumsum([len(item.choices) for item in task.items])])
    texts = [task.prefix + item.context for item in task.items]
    contexts = token_ids([text.rstrip() for text in texts], tokenizer, bos)
    wholes = token_ids(
        [f"{text} {choice}" for text, item in zip(texts, task.items, strict=True) for choice in item.choices],
        tokenizer,
        bos,
    )
    sequences, scored = [], []
    for number, (item, context) in enumerate(zip(task.items, contexts, strict=True)):
        for whole in wholes[first[number] : first[number + 1]]:
            own = whole[len(context) :]
            if not len(own) or not len(context):
                what = "a choice" if len(context) else "the context"
                raise PromptError(f"task {task.name}: {what} of {item.item_id} has no tokens; fix the file")
            sequences.append(np.concatenate([context, own]))
            scored.append(len(own))
    apart = [
        _group(task.name, contexts[number], sequences, range(first[number], first[number + 1]))
        for number in range(len(task.items))
    ]
    together = _group(task.name, min(contexts, key=len), sequences, range(len(sequences)))
    tokens = sum(group.tokens for group in apart)
    limit = _limit(min(tokens, together.tokens), shard_tokens, shards)
    groups = apart if tokens < together.tokens else _cut(together, first, limit)
    return ChoicePrompts(_pack(groups, limit), first, np.array(scored, dtype=np.int64))


def _group(name: str, context: np.ndarray, sequences: Sequence[np.ndarray], rows: Sequence[int]) -> Group:
    """The sequences `rows`, with what they and a context share as their prefix, so that it has no token to score."""
    shared = _common_prefix(context, [sequences[row] for row in rows])
    return Group(name, context[:shared], tuple(sequences[row][shared:] for row in rows), tuple(rows))


def _cut(group: Group, first: np.ndarray, limit: int) -> list[Group]:
    """A group of many items as groups of whole items of about `limit` tokens of their own, the longest first."""
    own = np.array([len(ids) for ids in group.sequences])
    sizes = np.add.reduceat(own, first[:-1])
    pieces: list[list[int]] = [[]]
    held = 0
    for number in np.argsort(-sizes, kind="stable"):
        if pieces[-1] and held + sizes[number] > limit:
            pieces.append([])
            held = 0
        pieces[-1] += range(first[number], first[number + 1])
        held += sizes[number]
    return [
        Group(group.subject, group.prefix, tuple(group.sequences[row] for row in rows), tuple(rows)) for rows in pieces
    ]


def encode_text(
    text: str,
    tokenizer: Any,
    *,
    limit: int | None = None,
    window: int = TEXT_WINDOW,
    start: int = 0,
    add_bos: bool | None = None,
) -> tuple[Shard, ...]:
    """Plain text as windows of `window` tokens that do not overlap, at most `limit` tokens from number `start` on.

    add_bos: begin each window with the beginning-of-sequence token, one of its `window`; None does what the tokenizer
    does by default. Models that were trained with it are far off without (lm-evaluation-harness puts it there too).
    The first token of each window is not scored: without that token it is one of the text's, and a last window of one
    token is left out.
    """
    bos = bos_token(tokenizer, add_bos)
    first = [] if bos is None else [bos]
    ids = _first_ids(text, tokenizer, None if limit is None else start + limit)
    read, ids = len(ids), ids[start:][:limit]
    step = window - len(first)
    windows = [np.array([*first, *ids[at : at + step]], dtype=np.int64) for at in range(0, len(ids), step)]
    windows = [part for part in windows if len(part) > 1]
    if not windows:
        after = f" of {read} after the first {start}" if start else ""
        raise PromptError(f"the text for perplexity has {len(ids)} tokens{after}: it needs at least 2")
    empty = np.zeros(0, dtype=np.int64)
    return _shards([Group("text", empty, tuple(windows), tuple(range(len(windows))))], 4 * window)


def _first_ids(text: str, tokenizer: Any, count: int | None) -> np.ndarray:
    """At least the first `count` ids (n,) int64 of a text, all of them if it has fewer or `count` is None.

    Only about as much of the text is tokenised as that takes: 20 MB at once take 3 GB and 20 s, in every process. Where
    a text is cut changes the tokens just before the cut, hence `_UNSETTLED` more.
    """
    length = len(text) if count is None else _CHARACTERS * (count + _UNSETTLED)
    while True:
        ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if count is None or length >= len(text):
            return np.asarray(ids, dtype=np.int64)
        if len(ids) >= count + _UNSETTLED:
            return np.asarray(ids[:-_UNSETTLED], dtype=np.int64)
        length *= 2


def bos_token(tokenizer: Any, add_bos: bool | None) -> int | None:
    """The id of the token to put first, or None for none; add_bos=None does what the tokenizer does by default."""
    token = tokenizer.bos_token_id
    if add_bos is None:
        by_default = tokenizer("x")["input_ids"]
        return token if token is not None and by_default and by_default[0] == token else None
    if add_bos and token is None:
        raise PromptError("add_bos is true, but the tokenizer has no beginning-of-sequence token")
    return token if add_bos else None


def token_ids(texts: Sequence[str], tokenizer: Any, bos: int | None) -> list[np.ndarray]:
    """The ids (n,) int64 of each text, after the token `bos` where there is one, without the tokenizer's own."""
    start = [] if bos is None else [bos]
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(start + ids, dtype=np.int64) for ids in encoded]


def _letter_ids(prompt: str, ids: np.ndarray, tokenizer: Any, bos: int | None) -> tuple[int, ...]:
    """The token that each answer " A" … " D" adds to a prompt; scored as lm-evaluation-harness does."""
    letters = []
    for letter in LETTERS:
        (longer,) = token_ids([f"{prompt} {letter}"], tokenizer, bos)
        if not np.array_equal(longer[:-1], ids):
            added = longer[len(ids) :].tolist()
            raise PromptError(
                f"the answer ' {letter}' does not add exactly one token to a prompt (it ends in {added}): "
                "this tokenizer cannot be scored by letters"
            )
        letters.append(int(longer[-1]))
    return tuple(letters)


def _common_prefix(prefix: np.ndarray, prompts: Sequence[np.ndarray]) -> int:
    """How many leading tokens of `prefix` all prompts share, leaving each prompt at least one token of its own."""
    shared = len(prefix)
    for ids in prompts:
        length = min(shared, len(ids) - 1)
        different = np.flatnonzero(prefix[:length] != ids[:length])
        shared = int(different[0]) if len(different) else length
    return shared


def _limit(tokens: int, shard_tokens: int, shards: int) -> int:
    """The size at which that many tokens make at least `shards` shards, where that is less than shard_tokens."""
    return min(shard_tokens, max(tokens // shards, _LEAST_TOKENS))


def _balanced(groups: Sequence[Group], limit: int, workers: int) -> tuple[Shard, ...]:
    """Shards of at most about `limit` tokens, of the size at which that many workers are done soonest."""
    if workers == 1:
        return _shards(groups, limit)
    sizes = dict.fromkeys(max(min(_LEAST_TOKENS, limit), int(part * limit)) for part in _PARTS)
    return min((_shards(groups, size) for size in sizes), key=lambda shards: _longest(shards, workers))


def _longest(shards: Sequence[Shard], workers: int) -> int:
    """Tokens of the worker that ends last, where each free worker takes the largest shard left."""
    ends = [0] * workers
    for tokens in sorted((shard.tokens for shard in shards), reverse=True):
        heapq.heapreplace(ends, ends[0] + tokens + _SHARD_COST)
    return max(ends)


def _shards(groups: Sequence[Group], limit: int) -> tuple[Shard, ...]:
    """Cut large groups and pack small ones, longest sequences first, into shards of about `limit` tokens."""
    return _pack([piece for group in groups for piece in _pieces(group, limit)], limit)


def _pack(groups: Sequence[Group], limit: int) -> tuple[Shard, ...]:
    """Groups in their order, as they are, in shards of about `limit` tokens."""
    shards: list[Shard] = []
    pending: list[Group] = []
    for piece in groups:
        if pending and sum(group.tokens for group in pending) + piece.tokens > limit:
            shards.append(Shard(tuple(pending)))
            pending = []
        pending.append(piece)
    if pending:
        shards.append(Shard(tuple(pending)))
    return tuple(shards)


def _pieces(group: Group, limit: int) -> list[Group]:
    order = sorted(range(len(group.sequences)), key=lambda i: (-len(group.sequences[i]), i))
    pieces: list[list[int]] = [[]]
    held = 0
    for i in order:
        length = len(group.sequences[i])
        if pieces[-1] and held + length > limit:
            pieces.append([])
            held = 0
        pieces[-1].append(i)
        held += length
    return [
        Group(group.subject, group.prefix, tuple(group.sequences[i] for i in part), tuple(group.rows[i] for i in part))
        for part in pieces
    ]
