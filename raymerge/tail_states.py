"""The states that enter a merged layer, laid out for the scoring of many candidates.

Each subject's shared prefix lies there once; the questions' own tokens are sorted by length, in buckets that are each
padded to their longest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from raymerge.device import host_buffer, is_accelerator, moved, streamed
from raymerge.prompts import Group, Prompts
from raymerge.trunk import TrunkCache

# On an accelerator: a bucket's width is a multiple of this many tokens, since products of bfloat16 are fast where rows
# begin at multiples of 16 bytes; and this many tokens of padding cost about as much as the calls of one more bucket.
_ALIGNED, _CALL_TOKENS = 8, 512


@dataclass(frozen=True)
class Prefix:
    """One subject's shared prefix: the rows [start, stop) of its tokens, and the places (k,) of its questions."""

    start: int
    stop: int
    questions: Tensor

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Bucket:
    """Questions of similar length: `count` of them from place `first` on, padded to `width` tokens, from row `start`
    on."""

    first: int
    count: int
    start: int
    width: int

    @property
    def places(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def stop(self) -> int:
        return self.start + self.count * self.width


class Layout:
    """Where each token lies among the rows of the states: those of the prefixes, then the questions' own.

    A question's place is its rank by length. rows, owners (n,) int64, on the CPU: for the question at each place, its
    row in the question set and the number of its prefix. lengths, offsets, starts (n,) int64, on the device: how many
    tokens of its own it has, how many its prefix has, and the row of its first own token. tokens, positions: how many
    rows and how many rotary positions there are, padding included. prefix_order, question_order (n,) int64: indexing
    with them turns values listed prefix by prefix into values by place, and these into the question set's order.
    """

    def __init__(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        owners: Sequence[int],
        prefixes: Sequence[int],
        *,
        bucket_tokens: int,
        device: torch.device,
    ):
        """rows, lengths, owners: of each question, by ascending length, its row, its own tokens and the number of its
        prefix. prefixes: the tokens of each. A bucket has at most `bucket_tokens`, or one question."""
        self.bucket_tokens = bucket_tokens
        self.rows, self.owners = torch.tensor(rows), torch.tensor(owners)
        self.prefixes: list[Prefix] = []
        start = 0
        for number, length in enumerate(prefixes):
            questions = torch.nonzero(self.owners == number).flatten().to(device)
            self.prefixes.append(Prefix(start, start + length, questions))
            start += length
        self.buckets = _buckets(lengths, start, bucket_tokens, aligned=is_accelerator(device))
        self.tokens = self.buckets[-1].stop
        offsets = [prefixes[owner] for owner in owners]
        self.positions = max(*prefixes, *(bucket.width + max(offsets[bucket.places]) for bucket in self.buckets))
        starts = [bucket.start + number * bucket.width for bucket in self.buckets for number in range(bucket.count)]
        self.lengths, self.offsets, self.starts = (
            torch.tensor(values, device=device) for values in (lengths, offsets, starts)
        )
        self.prefix_order = torch.argsort(torch.cat([prefix.questions for prefix in self.prefixes]))
        self.question_order = torch.argsort(self.rows).to(device)

    @classmethod
    def of(cls, prompts: Prompts, *, bucket_tokens: int, device: torch.device) -> Layout:
        """The layout of all questions of a question set."""
        numbers: dict[bytes, int] = {}
        prefixes: list[int] = []
        questions: list[tuple[int, int, int]] = []
        for shard in prompts.shards:
            for group in shard.groups:
                number = numbers.setdefault(_key(group), len(numbers))
                if number == len(prefixes):
                    prefixes.append(len(group.prefix))
                questions += [(len(ids), row, number) for ids, row in zip(group.sequences, group.rows, strict=True)]
        lengths, rows, owners = zip(*sorted(questions, key=lambda each: each[0]), strict=True)
        return cls(rows, lengths, owners, prefixes, bucket_tokens=bucket_tokens, device=device)

    def chunks(self, most: int, *, together: bool) -> Chunks:
        """The rows cut up for computing keys: at most `most` tokens at a time, or one question or one prefix.

        together: several prefixes at a time. MMLU's 57 are too short to be worth an accelerator's call each.
        """
        groups: list[list[Prefix]] = []
        for prefix in self.prefixes:
            if together and groups and prefix.stop - groups[-1][0].start <= most:
                groups[-1].append(prefix)
            else:
                groups.append([prefix])
        pieces = []
        for bucket in self.buckets:
            rows = max(1, most // bucket.width)
            for first in range(0, bucket.count, rows):
                count = min(rows, bucket.count - first)
                pieces.append(Bucket(bucket.first + first, count, bucket.start + first * bucket.width, bucket.width))
        return Chunks(self, groups, pieces)


@dataclass(frozen=True)
class Chunks:
    """The rows of a layout cut up: groups of prefixes, then pieces of buckets."""

    layout: Layout
    groups: list[list[Prefix]]
    pieces: list[Bucket]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Rows [start, stop) of each chunk."""
        of_groups = [(group[0].start, group[-1].stop) for group in self.groups]
        return of_groups + [(piece.start, piece.stop) for piece in self.pieces]

    @property
    def shapes(self) -> list[tuple[int, int] | None]:
        """For each chunk: (questions, padded tokens of each) if it is a piece of a bucket, None if prefixes."""
        return [None] * len(self.groups) + [(piece.count, piece.width) for piece in self.pieces]

    def positions(self) -> Iterator[Tensor]:
        """For each chunk, its tokens' positions in their prompts, (tokens,) int64, on the device."""
        offsets = self.layout.offsets
        for group in self.groups:
            yield torch.cat([torch.arange(prefix.length, device=offsets.device) for prefix in group])
        for piece in self.pieces:
            own = torch.arange(piece.width, device=offsets.device)
            yield (offsets[piece.places, None] + own).flatten()


class TailStates:
    """What entered the merged layer, for every token of a question set.

    tokens (layout.tokens, d): normalised without the norm's gain and bias (which go into the matrices, so that any
    layer's norm can be used), or, in a family without an input norm, raw. last (n, d) float32: raw, at each
    question's last token, by place; last_normalised (n, d): the same as in tokens. `tokens` lies on the device or, in
    pinned memory, on its host; the rest on the device.
    """

    def __init__(self, trunk: TrunkCache, prompts: Prompts, layout: Layout, *, dtype: torch.dtype, on_host: bool):
        self.layout, self.device, self._on_host = layout, trunk.runner.device, on_host
        checkpoint = trunk.runner.checkpoint
        architecture = checkpoint.architecture
        norm = architecture.norm_before(architecture.holder_of("q"))
        module = None if norm is None else trunk.runner.modules[0].get_submodule(norm)
        plain = {
            name: architecture.plain(name, torch.empty(parameter.shape, device=self.device))
            for name, parameter in (() if module is None else module.named_parameters())
        }

        def entering(x: Tensor) -> Tensor:
            return (x if module is None else functional_call(module, plain, (x,))).to(dtype)

        prefixes: dict[bytes, Tensor] = {}
        own: dict[int, Tensor] = {}
        for shard in prompts.shards:
            for group, (prefix, packed) in zip(shard.groups, trunk.load(shard), strict=True):
                prefixes.setdefault(_key(group), prefix)
                own |= zip(group.rows, packed.split([len(ids) for ids in group.sequences]), strict=True)
        some = next(iter(own.values()))
        shape = layout.tokens, some.shape[-1]
        self.tokens = (
            host_buffer(shape, dtype, self.device) if on_host else torch.empty(shape, dtype=dtype, device=self.device)
        )
        for prefix, place in zip(prefixes.values(), layout.prefixes, strict=True):
            self.tokens[place.start : place.stop] = entering(moved(prefix, self.device, torch.float32))
        last = []
        for bucket in layout.buckets:
            block = torch.zeros(bucket.count, bucket.width, shape[1], dtype=some.dtype)
            for row, place in zip(layout.rows[bucket.places].tolist(), block, strict=True):
                place[: len(own[row])] = own[row]
            states = moved(block, self.device, torch.float32)
            numbers = torch.arange(bucket.count, device=self.device)
            last.append(states[numbers, layout.lengths[bucket.places] - 1])
            self.tokens[bucket.start : bucket.stop] = entering(states.flatten(0, 1))
        self.last = torch.cat(last)
        self.last_normalised = entering(self.last)

    def to_host(self) -> None:
        """Move the tokens' states to pinned host memory."""
        self.tokens = host_buffer(self.tokens.shape, self.tokens.dtype, self.device).copy_(self.tokens)
        self._on_host = True

    def of(self, spans: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """The tokens' states of each span of rows, on the device."""
        if not self._on_host:
            return (self.tokens[start:stop] for start, stop in spans)
        if torch.is_grad_enabled():  # the backward pass needs them, and `streamed` overwrites its buffers
            return (self.tokens[start:stop].to(self.device, non_blocking=True) for start, stop in spans)
        return streamed(self.tokens, spans, self.device)

    def select(self, rows: Sequence[int]) -> TailStates:
        """A copy, on the device, of these questions' states and their prefixes'; a question's row is then its number
        in `rows`. Raises ValueError for a row that is not there or occurs twice, or for none."""
        whole = self.layout
        number = {row: place for place, row in enumerate(rows)}
        places = [place for place, row in enumerate(whole.rows.tolist()) if row in number]
        if len(number) < len(rows) or len(places) < len(number) or not number:
            raise ValueError(
                f"{len(rows)} rows are asked for, which name {len(places)} of {len(whole.rows)} questions: name "
                "at least one, each once"
            )
        owners = whole.owners[places].tolist()
        used = sorted(set(owners))
        at = torch.tensor(places, device=self.device)
        layout = Layout(
            [number[row] for row in whole.rows[places].tolist()],
            whole.lengths[at].tolist(),
            [used.index(owner) for owner in owners],
            [whole.prefixes[owner].length for owner in used],
            bucket_tokens=whole.bucket_tokens,
            device=self.device,
        )
        prefixes = [whole.prefixes[owner] for owner in used]
        indices = [torch.arange(prefix.start, prefix.stop, device=self.device) for prefix in prefixes]
        for bucket in layout.buckets:
            # Beyond a question's end its last token is repeated: attention does not see it.
            own = torch.arange(bucket.width, device=self.device)[None]
            own = own.minimum(layout.lengths[bucket.places, None] - 1)
            indices.append((whole.starts[at][bucket.places, None] + own).flatten())
        part = copy.copy(self)
        part.layout, part._on_host = layout, False
        part.tokens = self.tokens[torch.cat(indices).to(self.tokens.device)].to(self.device)
        part.last, part.last_normalised = self.last[at], self.last_normalised[at]
        return part


def _key(group: Group) -> bytes:
    """What identifies a group's prefix: its token ids. A large subject has the same prefix in many shards."""
    return group.prefix.astype("<i8").tobytes()


def _buckets(lengths: Sequence[int], start: int, most: int, *, aligned: bool) -> list[Bucket]:
    """Questions, sorted by length, from row `start` on, cut into buckets of at most `most` tokens, or one question.

    A bucket ends where padding it to the next question's length would waste too much. aligned: by widths that are
    multiples of `_ALIGNED`, for an accelerator. There padding adds 3.7 % to MMLU's 1,495,476 tokens, in 67 buckets of
    at most 32,768; a CPU's buckets would add 3.2 %, in 50 of which a twelfth are aligned.
    """
    widths = [-(-length // _ALIGNED) * _ALIGNED for length in lengths] if aligned else lengths
    buckets, begin = [], 0
    while begin < len(widths):
        end, own = begin + 1, widths[begin]
        while end < len(widths):
            width = widths[end]
            padded = width * (end + 1 - begin)
            wasteful = padded - own - width > _CALL_TOKENS if aligned else width > 1.15 * widths[begin] + 8
            if padded > most or wasteful:
                break
            own += width
            end += 1
        buckets.append(Bucket(begin, end - begin, start, widths[end - 1]))
        start, begin = buckets[-1].stop, end
    return buckets
