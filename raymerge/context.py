"""Does long context survive a merge? Two measures of a merged model that few-shot questions do not give.

`position_nll` splits the loss of plain text by position: a model that no longer uses what is far back stops getting
better along the window. `retrieval_prompts` and `retrieve` ask for what only the context can tell: lines " key: value"
of random words and then a key once more, whose value stood an exact number of tokens back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch

from raymerge.checkpoint import Checkpoint
from raymerge.errors import UserError
from raymerge.evaluation import merged_states, token_losses
from raymerge.forward import LayerRunner
from raymerge.plan import MergePlan
from raymerge.positions import context_limit
from raymerge.prompts import SHARD_TOKENS, Group, Shard, bos_token, token_ids
from raymerge.trunk import TrunkCache

_OPTIONS = 4
_LINE = 4  # tokens of a line " key: value\n"; each further word of a key is one more
_LEAD_LINES = 7  # before the line that is asked for: they show the form
_SHORTEST = 16  # three lines follow the one that is asked for: keys of two words then make up any number of tokens
_WORDS = 1000  # words that prompts are made of, those of the smallest token ids: in BPE the most frequent
# A word with the space before it, as byte-level BPE and SentencePiece write it in their vocabularies.
_WORD = re.compile(r"[Ġ▁]([A-Za-z][a-z]{2,})")


class ContextError(UserError):
    """Positions or distances that cannot be measured; the message names the value and the limit."""


# -- plain text by position ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextLosses:
    """Losses of plain text by window and by the tokens' positions: bucket b holds edges[b] <= position < edges[b + 1].

    windows (W,) int64: their numbers in the text; nll (W, B) float64: summed negative log-likelihood in nats; tokens
    (W, B) int64: how many were scored.
    """

    edges: tuple[int, ...]
    windows: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def join(parts: Sequence[TextLosses]) -> TextLosses:
        """Several shards of one text, in its order."""
        windows = np.concatenate([part.windows for part in parts])
        order = np.argsort(windows)
        nll, tokens = (np.concatenate([getattr(part, name) for part in parts])[order] for name in ("nll", "tokens"))
        return TextLosses(parts[0].edges, windows[order], nll, tokens)

    def coarser(self, edges: Sequence[int]) -> TextLosses:
        """The same by fewer edges, some of these with the first and the last."""
        starts = [self.edges.index(edge) for edge in edges[:-1]]
        if starts[0] or edges[-1] != self.edges[-1]:
            raise ContextError(f"edges {list(edges)} should begin and end as {list(self.edges)} do")
        nll, tokens = np.add.reduceat(self.nll, starts, axis=1), np.add.reduceat(self.tokens, starts, axis=1)
        return TextLosses(tuple(edges), self.windows, nll, tokens)


@torch.inference_mode()
def position_nll(
    runner: LayerRunner, plan: MergePlan, shard: Shard, *, trunk: TrunkCache | None = None, edges: Sequence[int]
) -> TextLosses:
    """Losses of a shard of plain text by window and position.

    The first token of each window has position 0 and is not scored; the others are those of evaluation.text_nll, and
    edges that leave one out are refused. trunk: start from its cached states where the plan leaves it as it is.
    """
    bounds = np.asarray(edges)
    if bounds.ndim != 1 or len(bounds) < 2 or bounds.dtype.kind not in "iu" or (np.diff(bounds) <= 0).any():
        raise ContextError(
            f"edges {list(edges)!r} must be at least two whole numbers, each greater than the one before"
        )
    longest = max(len(group.prefix) + len(ids) for group in shard.groups for ids in group.sequences)
    if bounds[0] > 1 or bounds[-1] < longest:
        raise ContextError(
            f"edges from {bounds[0]} to {bounds[-1]} leave tokens out: the positions scored are 1 to {longest - 1}, so "
            f"the first edge must be at most 1 and the last at least {longest}"
        )
    parts = []
    for state in merged_states(runner, plan, shard, trunk):
        owner, positions, nll = token_losses(runner, state)
        shape = len(state.group.sequences), len(bounds) - 1
        cells = owner * shape[1] + np.searchsorted(bounds, positions, side="right") - 1
        sums = np.bincount(cells, weights=nll, minlength=shape[0] * shape[1]).reshape(shape)
        counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
        parts.append(TextLosses(tuple(edges), np.array(state.group.rows, dtype=np.int64), sums, counts))
    return TextLosses.join(parts)


# -- retrieval -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetrievalSet:
    """n prompts that ask for a value seen before.

    Each ends in a key and its colon; the token to come is one of `options` (n, 4) int64, token ids, namely
    options[i, answers[i]], and stood distances[i] tokens before it. answers (n,) int8; distances (n,) int64. Every
    value of a prompt is one of its four options, each as often as any other (to one), so that chance is 0.25 at any
    distance, and the most frequent value is hardly a better guess. The groups of the shards have no prefix, and their
    rows number the prompts.
    """

    shards: tuple[Shard, ...]
    options: np.ndarray
    answers: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True)
class Retrieved:
    """What a model made of the prompts `rows` (m,) int64: the options' logits (m, 4) float32, and correct (m,) bool:
    the highest of them is the answer's."""

    rows: np.ndarray
    logits: np.ndarray
    correct: np.ndarray


def usable_distances(checkpoint: Checkpoint, distances: Sequence[int]) -> tuple[int, ...]:
    """Those of the distances that the model can be asked about.

    Left out are prompts longer than the context (`positions.context_limit`) and, where every layer has an attention
    window, distances beyond the widest one: only by way of other tokens could they be bridged. Raises ContextError
    where none is left.
    """
    # Two: what a prompt begins with.
    limit = context_limit(checkpoint.config).tokens - (_LINE * _LEAD_LINES + 2) - 2
    limit = min(limit, max(limit if window is None else window for window in checkpoint.windows))
    usable = tuple(distance for distance in distances if distance <= limit)
    if not usable:
        shorter = f"give shorter ones (from {_SHORTEST} on), or " if limit >= _SHORTEST else ""
        raise ContextError(
            f"sweep.distances {list(distances)} are all too long for this model, whose prompts of key-value retrieval "
            f"could reach {max(0, limit)} tokens back: {shorter}set sweep.context: false"
        )
    return usable


def retrieval_prompts(
    tokenizer: Any, *, distances: Sequence[int], per_distance: int, seed: int, add_bos: bool | None = None
) -> RetrievalSet:
    """Draw `per_distance` prompts for each distance, in this order; equal arguments give equal prompts, and a
    distance's prompts do not depend on the others.

    A prompt is seven lines " key: value", the line that is asked for, as many others as make up the distance, and the
    key again. Keys and values are words of one token; no word is in two keys, and two-word keys fill up what whole
    lines leave. Prompts of one distance are equally long. add_bos: put the beginning-of-sequence token first; None
    does what the tokenizer does by default.

    Raises ContextError for distances that are too short, or too long for the tokenizer's words; PromptError where
    add_bos asks for a token that there is none of.
    """
    if per_distance < 1:
        raise ContextError(f"per_distance is {per_distance}: at least one prompt is needed")
    if not distances or len(set(distances)) < len(distances) or min(distances) < _SHORTEST:
        raise ContextError(f"distances {list(distances)} must be different, at least one, and none below {_SHORTEST}")
    bos = bos_token(tokenizer, add_bos)
    words = _words(tokenizer)
    dearest = max(distances, key=_words_needed)  # 355 needs more words than 356, which is whole lines
    if (needed := _words_needed(dearest)) > len(words):
        room = next(distance for distance in count(_SHORTEST) if _words_needed(distance) > len(words)) - 1
        raise ContextError(
            f"a distance of {dearest} tokens needs {needed} different words of one token, but this tokenizer has "
            f"{len(words)}: ask for distances of at most {room}"
            if room >= _SHORTEST
            else f"this tokenizer has {len(words)} words of one token that stand alone: too few for retrieval prompts; "
            "set sweep.context: false"
        )
    shards, options = [], []
    answers: list[int] = []
    for distance in distances:
        drawn = [_draw(distance, words, np.random.default_rng([seed, distance, i])) for i in range(per_distance)]
        sequences = token_ids([text for text, _, _ in drawn], tokenizer, bos)
        for ids, (_, ids_of_options, answer) in zip(sequences, drawn, strict=True):
            if ids[-distance] != ids_of_options[answer] or not np.array_equal(ids[-2:], ids[-distance - 2 : -distance]):
                raise ContextError(
                    f"this tokenizer cuts words differently inside a prompt: the value, token "
                    f"{ids_of_options[answer]}, is not {distance} tokens back, where token {ids[-distance]} stands"
                )
        together = max(1, SHARD_TOKENS // len(sequences[0]))
        for start in range(0, per_distance, together):
            part = tuple(sequences[start : start + together])
            rows = tuple(range(len(answers) + start, len(answers) + start + len(part)))
            shards.append(Shard((Group(f"retrieval_{distance}", np.zeros(0, np.int64), part, rows),)))
        options += [ids for _, ids, _ in drawn]
        answers += [answer for _, _, answer in drawn]
    return RetrievalSet(
        tuple(shards),
        np.array(options, dtype=np.int64),
        np.array(answers, dtype=np.int8),
        np.repeat(np.array(distances, dtype=np.int64), per_distance),
    )


@torch.inference_mode()
def retrieve(
    runner: LayerRunner, plan: MergePlan, prompts: RetrievalSet, shard: Shard, *, trunk: TrunkCache | None = None
) -> Retrieved:
    """What the merged model answers to one shard of the prompts.

    trunk: start from its cached states where the plan leaves it as it is.
    """
    vocabulary, rows, logits = runner.vocabulary, [], []
    for state in merged_states(runner, plan, shard, trunk):
        of_group, last = state.last()
        hidden = vocabulary.normalise(last)
        ids = torch.from_numpy(prompts.options[of_group])
        table = vocabulary.unembedding_rows(ids.flatten()).unflatten(0, ids.shape)
        rows += of_group
        logits.append(vocabulary.capped(torch.einsum("nd,nod->no", hidden, table)).cpu().numpy())
    found = np.concatenate(logits)
    return Retrieved(np.array(rows, dtype=np.int64), found, found.argmax(1) == prompts.answers[rows])


def _words(tokenizer: Any) -> list[tuple[str, int]]:
    """Words, and their token ids, that are one token between a space and a space, a colon or a line's end."""
    pieces = sorted((token, piece) for piece, token in tokenizer.get_vocab().items())
    found = [(match[1], token) for token, piece in pieces if (match := _WORD.fullmatch(piece))][: 2 * _WORDS]
    if not found:
        return []
    encoded = token_ids([f"x\n {word}: {word}\n {word} {word}:" for word, _ in found], tokenizer, None)
    kept = []
    for (word, token), ids in zip(found, encoded, strict=True):
        newline, colon = ids[-4], ids[-1]
        if ids[-8:].tolist() == [newline, token, colon, token, newline, token, token, colon]:
            kept.append((word, token))
    return kept[:_WORDS]


def _words_needed(distance: int) -> int:
    lines, more = divmod(distance - _LINE, _LINE)
    return _OPTIONS + _LEAD_LINES + 1 + lines + more


def _draw(distance: int, words: list[tuple[str, int]], rng: np.random.Generator) -> tuple[str, list[int], int]:
    """A prompt's text, the token ids of its four options, and which of them is the answer."""
    drawn = [words[i] for i in rng.permutation(len(words))[: _words_needed(distance)]]
    options, keys = drawn[:_OPTIONS], [word for word, _ in drawn[_OPTIONS:]]
    lines, more = divmod(distance - _LINE, _LINE)
    lead, (asked, *rest) = keys[:_LEAD_LINES], keys[_LEAD_LINES:]
    after, second = rest[:lines], rest[lines:]
    after[:more] = [f"{key} {other}" for key, other in zip(after, second, strict=False)]
    keys = [*lead, asked, *(after[i] for i in rng.permutation(lines))]
    # Equally often, to one: a model that copies the most frequent value must not seem to have found the key.
    values = rng.permutation(np.resize(rng.permutation(_OPTIONS), len(keys)))
    text = "".join(f" {key}: {options[value][0]}\n" for key, value in zip(keys, values, strict=True))
    return f"{text} {asked}:", [token for _, token in options], int(values[_LEAD_LINES])
