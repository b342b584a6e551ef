"""What is held where on an accelerator, and how much is computed at once: pure numbers, no torch.

Bytes are estimates of the tensors that the code makes, counted generously: temporaries of separate kernels, which
torch's allocator holds at the same time. What they get wrong is caught where the work is done: an out-of-memory error
makes the work smaller (`ScoringPlan.smaller`) instead of ending the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from raymerge.errors import UserError

#: Where the trunk's states are kept while candidates are scored.
STATES = ("device", "host")
#: How a candidate's keys come about: projected from the states, or summed over those of the sources.
KEYS = ("recompute", "linear")

_USABLE = 0.9  # of the free bytes; the rest is left to fragments, libraries' workspaces and what estimates miss
_MOST_CANDIDATES = 8  # at once: what they share (weights and states read once, fewer launches) is then 1/8 of each
# Candidates at once where keys are summed. One alone would pay for every launch: for all of MMLU it takes about 3,900
# kernels in 9,900 calls of torch, eight together 4,100 in 12,600. That is 0.1 s of CPU time, more than sums save on the
# device.
_FEWEST_SUMMED = 2
#: Tokens of a chunk at most; more gains nothing where a token has 1,024 values of keys, and candidates share the calls.
MOST_TOKENS = 32768
_EFFICIENT_TOKENS, _FEWEST_TOKENS = 8192, 256  # of a chunk; below 8,192 matmuls are too small
#: Rows of the unembedding that are converted to float32 at a time (58 MB at hidden size 896), and questions whose
#: logits over these rows an accelerator computes at a time (0.27 GB).
VOCABULARY_ROWS, VOCABULARY_QUESTIONS = 16384, 4096
_BATCH = (512, 16384)  # padded tokens of a trunk batch, least and most
_MOST_STRIDE = 2**31 - 1  # values between two rows of a matrix, above which cuBLAS takes no product of it


class MemoryPlanError(UserError):
    """Work that does not fit a device whatever is done; the message has the figures and the cure."""


@dataclass(frozen=True)
class LayerSize:
    """One decoder layer: parameters, and the widths (values a token) of what it computes.

    hidden: the states; query, key: all query heads and all key (or value) heads together; mlp: of the experts used
    for one token together, a shared one among them; heads: number of query heads.
    """

    parameters: int
    hidden: int
    query: int
    key: int
    mlp: int
    heads: int


@dataclass(frozen=True)
class ScoringWork:
    """What a tail scorer is for: `tokens` cached ones (prefixes, and questions padded to their buckets), `questions`,
    and `sources` layers that are mixed. Bytes of a value: `stack`, of the sources' stacked weights; `compute`, of the
    states and what is projected from them."""

    tokens: int
    questions: int
    sources: int
    stack: int
    compute: int


@dataclass(frozen=True)
class ScoringPlan:
    """How candidates are scored: where the states lie (STATES), how keys come about (KEYS), how many candidates at
    once, and of how many tokens keys are held at once for each of them."""

    states: str
    keys: str
    candidates: int
    chunk_tokens: int

    def smaller(self, *, host: bool = True) -> ScoringPlan | None:
        """The next plan to try where this one ran out of memory, the cheapest change first; None where none is left.

        host: whether the host has room for the states.
        """
        if self.chunk_tokens > _EFFICIENT_TOKENS:
            return replace(self, chunk_tokens=self.chunk_tokens // 2)
        if self.candidates > (_FEWEST_SUMMED if self.keys == "linear" else 1):
            return replace(self, candidates=self.candidates // 2)
        if self.keys == "linear":
            return replace(self, keys="recompute")
        if self.states == "device" and host:
            return replace(self, states="host")
        if self.chunk_tokens > _FEWEST_TOKENS:
            return replace(self, chunk_tokens=self.chunk_tokens // 2)
        return None


def state_bytes(size: LayerSize, work: ScoringWork) -> int:
    """Bytes of the states of all tokens."""
    return work.tokens * size.hidden * work.compute


def pinned_bytes(size: LayerSize, work: ScoringWork) -> int:
    """What the states take in pinned host memory: torch's allocator of it rounds up to a power of two."""
    return 1 << max(0, state_bytes(size, work) - 1).bit_length()


def fits_host(size: LayerSize, work: ScoringWork, host_free: int) -> bool:
    """Whether the states may be held in pinned memory, where `host_free` bytes of the machine's are free."""
    return pinned_bytes(size, work) <= _USABLE * host_free


def sums_keys(size: LayerSize, work: ScoringWork) -> bool:
    """Whether cuBLAS can sum the sources' keys: a source's keys are one matrix row, whose length it counts in 32 bits.

    All of MMLU on an 8B model makes rows of 1.62 of 2.15 thousand million values, padding included.
    """
    return work.tokens * size.key <= _MOST_STRIDE


def no_room(size: LayerSize, work: ScoringWork, *, device_free: int, host_free: int) -> MemoryPlanError:
    """The error for questions that no plan fits."""
    least = ScoringPlan("host", "recompute", 1, _FEWEST_TOKENS)
    return MemoryPlanError(
        f"scoring {work.questions} questions ({work.tokens} tokens) of {work.sources} merged layers takes "
        f"{_gb(scoring_bytes(size, work, least))} of the device, which has {_gb(device_free)} free, and "
        f"{_gb(pinned_bytes(size, work))} of host memory, which has {_gb(host_free)}: take fewer questions "
        "(data.limit_per_subject), fewer merges, or a larger device"
    )


def held_bytes(size: LayerSize, work: ScoringWork, plan: ScoringPlan) -> int:
    """What stays on the device between candidates: stacked weights, states, sources' keys."""
    held = work.sources * size.parameters * work.stack
    held += work.questions * size.hidden * (4 + work.compute)  # at the last positions, raw and normalised
    if plan.states == "device":
        held += state_bytes(size, work)
    if plan.keys == "linear":
        held += work.sources * work.tokens * size.key * work.compute
    return held


def scoring_bytes(size: LayerSize, work: ScoringWork, plan: ScoringPlan) -> int:
    """All that scoring takes on the device at its peak."""
    # A mixed layer, and for each question its query, the two parts of its attention and their join, float32.
    candidate = size.parameters * work.compute + work.questions * 4 * (5 * size.query + 3 * size.hidden)
    # float32: keys of this chunk, keys of the chunk before, and as much for what biases and norms make; for each head,
    # scores and their exponentials. In the compute dtype: keys as projected, or later the states weighted by attention,
    # in two parts and joined, which take as much as values would.
    token = size.key * (3 * work.compute + 4 * 3) + size.heads * 4 * 4
    chunk = plan.chunk_tokens * (token * plan.candidates + size.hidden * work.compute)
    if plan.states == "host":
        chunk += 2 * plan.chunk_tokens * size.hidden * work.compute  # one copy arrives while the other is used
    # An eighth of the stack at a time: widened, and its sums before and after rounding.
    mixing = size.parameters * ((4 + work.compute) * plan.candidates + 4 * work.sources) // 8
    vocabulary = VOCABULARY_ROWS * 4 * (2 * min(work.questions, VOCABULARY_QUESTIONS) + size.hidden)
    return held_bytes(size, work, plan) + plan.candidates * candidate + max(chunk, mixing, vocabulary)


def plan_scoring(
    size: LayerSize,
    work: ScoringWork,
    *,
    device_free: int,
    host_free: int,
    linear: bool = False,
    batched: bool = True,
) -> ScoringPlan:
    """The fastest plan that fits `device_free` bytes of the device and `host_free` of the machine's own memory.

    linear: keys may be summed over the sources' (`linear` reads and adds, `recompute` multiplies: on paper 9 against
    18 ms for all of MMLU on an 8B model and an H200). batched: several candidates may be scored at once.
    What is preferred, in this order: states on the device, sums of at least two candidates' keys, many candidates,
    large chunks; from the host, where every pass over the candidates moves all states, many candidates first.
    Raises MemoryPlanError where nothing fits.
    """
    for plan in _plans(linear and sums_keys(size, work), batched):
        if plan.states == "host" and not fits_host(size, work, host_free):
            continue
        if scoring_bytes(size, work, plan) <= _USABLE * device_free:
            return plan
    raise no_room(size, work, device_free=device_free, host_free=host_free)


def _plans(linear: bool, batched: bool) -> Iterator[ScoringPlan]:
    """All plans, the fastest first."""
    at_once = [count for count in (8, 4, 2, 1) if count <= (_MOST_CANDIDATES if batched else 1)]
    efficient: list[int] = []
    small: list[int] = []
    tokens = MOST_TOKENS
    while tokens >= _FEWEST_TOKENS:
        (efficient if tokens >= _EFFICIENT_TOKENS else small).append(tokens)
        tokens //= 2
    for keys in ("linear", "recompute") if linear else ("recompute",):
        for candidates in at_once:
            if keys == "linear" and candidates < _FEWEST_SUMMED:
                continue
            for chunk in efficient:
                yield ScoringPlan("device", keys, candidates, chunk)
    for candidates in at_once:
        for chunk in efficient:
            yield ScoringPlan("host", "recompute", candidates, chunk)
    for states in STATES:
        for candidates in at_once:
            for chunk in small:
                yield ScoringPlan(states, "recompute", candidates, chunk)


def plan_batches(size: LayerSize, *, compute: int, device_free: int) -> tuple[int, int]:
    """(padded tokens of a batch, keys attended to by all its sequences together) for running whole layers.

    compute: bytes of a value. A fifth of the free bytes, one half for what is computed for a token, the other for keys
    and values, which attention repeats for every query head and, with a shared prefix, for every sequence.
    """
    share = 0.1 * _USABLE * device_free
    token = size.hidden * (6 * compute + 8) + 4 * size.mlp * compute
    least, most = _BATCH
    batch = least
    while batch < most and 2 * batch * token <= share:
        batch *= 2
    return batch, max(least, int(share / (4 * size.query * compute)))


def plan_gradient(size: LayerSize, *, compute: int, device_free: int) -> int:
    """Tokens whose questions' loss is differentiated at once: what autograd keeps of them takes half of the free
    bytes."""
    token = size.hidden * compute + size.key * (2 * compute + 4 * 10) + size.heads * 4 * 4
    return max(_FEWEST_TOKENS, int(0.5 * _USABLE * device_free / token))


def keeps_layer(layer_bytes: int, *, device_free: int, device_total: int) -> bool:
    """Whether a converted layer may stay on the device: half of its memory is left to states and to what is computed
    from them, so that a large model is run a layer at a time and a small one is converted once."""
    return device_free - layer_bytes >= 0.5 * device_total


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
