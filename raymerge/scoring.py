"""The frozen trunk: score thousands of merges for the price of one.

All candidates of a search share the layers before the first merged one. Their states are computed once, kept on disk
by content, and for each candidate only what follows is run. After a tail merge that is one layer, of which only the
last position of each question matters: keys of all cached tokens, query, attention, output and MLP at the last
position, the final norm and the unembedding of the four answer letters. Values are not projected token by token:
attention weighs the states, and the value matrix is multiplied with what comes out. The result equals a full forward
pass of the merged model to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from raymerge.architectures import module_layer
from raymerge.device import attempt, device_memory, host_buffer, host_free, moved, release_cached, streamed
from raymerge.forward import visible
from raymerge.fusion import check_mergeable
from raymerge.memory import MemoryPlanError, ScoringPlan, ScoringWork, plan_scoring
from raymerge.plan import MergePlan
from raymerge.prompts import Prompts
from raymerge.sources import SourceLayers
from raymerge.trunk import TrunkCache

_MIXED_TOGETHER = 4  # candidates whose weights are mixed in one pass on a CPU and held at once (60 MB each at 0.5B)
_BUCKET_TOKENS = 16384  # padded tokens of the questions whose own attention a CPU computes in one call
_VOCABULARY_QUESTIONS = 4096  # whose whole-vocabulary logits an accelerator computes at once (0.27 GB)
_PAIRS = 16  # of a question and a key of its prefix, as much memory as a token's key and weighted states
_ROW = 8  # tokens' keys and weighted states, as much memory as one question's MLP


@dataclass(frozen=True)
class _Prefix:
    """One subject's shared prefix: rows [start, stop) of the prefix tokens, and its questions in global order."""

    start: int
    stop: int
    questions: Tensor


@dataclass(frozen=True)
class _Bucket:
    """Questions of similar length: `count` of them from `first` on, padded to `width` tokens from row `start` on."""

    first: int
    count: int
    start: int
    width: int


class TailScorer:
    """Answer logits of models whose layers from `first` on are collapsed into one.

    The state held in memory is what entered the merged layer, RMS-normalised without the norm's gain (gains are
    multiplied into the matrices, so that any layer's norm can be used; raw in a family without an input norm), for
    every token; and the raw states at the last positions. Attention at the last position is written out here; norms
    and the MLP, or its experts, are transformers' own modules. Questions are kept sorted by length, in buckets padded
    to their longest.

    fused_dtype: the dtype to which merged matrices are rounded before scoring. By default the checkpoint's stored
    dtype, so that what is scored is exactly what would be saved; torch.float32 leaves them unrounded.
    sources: the stacked weights, where several scorers share them; plans with their norms and alignment are scored
    fastest (`is_stacked`), and all others are fused one by one.
    compute_dtype: of the states and of what is multiplied with the merged matrices; float32 on a CPU, on an accelerator
    the runner's. Attention, the residual stream, the final norm and the logits are float32 in any case: letters tie in
    bfloat16.
    plan: where the states lie and how much is done at once; on an accelerator chosen by its free memory. Whatever runs
    out of memory there is done again with the plan's next smaller one.
    """

    def __init__(
        self,
        trunk: TrunkCache,
        prompts: Prompts,
        *,
        fused_dtype: torch.dtype | None = None,
        sources: SourceLayers | None = None,
        compute_dtype: torch.dtype | None = None,
        plan: ScoringPlan | None = None,
    ):
        self.runner = trunk.runner
        self.first = trunk.first
        self.prompts = prompts
        self.fused_dtype = fused_dtype or self.runner.checkpoint.dtype
        self.compute_dtype = compute_dtype or (self.runner.dtype if self.runner.accelerated else torch.float32)
        self.sources = sources or SourceLayers(self.runner, self.first)
        self._block = self.runner.modules[self.first]
        arch = self.runner.checkpoint.architecture
        self._architecture = arch
        self._head_dim, self._kv_heads, self._groups = (
            arch.sizes[name] for name in ("rotary", "kv_heads", "query_heads")
        )
        self._scaling = self._block.self_attn.scaling
        # Of families without an input norm the states are read as they are.
        self._normalises = arch.gain_of(arch.rows_of("q")[0]) is not None
        self._epsilon = self.runner.checkpoint.config.rms_norm_eps
        self._source_keys: Tensor | None = None  # rotated, of all tokens: (sources, tokens, kv * head_dim)
        fits, _ = attempt(lambda: self._arrange(trunk, plan))
        if not fits:  # less than the plan counted on: others may have taken memory since
            self._arrange(trunk, replace(self.plan, states="host", keys="recompute"))
        self._letters = self.runner.unembedding_rows(list(prompts.letters))

    # -- setting up ---------------------------------------------------------------------------------------------

    def _arrange(self, trunk: TrunkCache, plan: ScoringPlan | None) -> None:
        prefixes: list[Tensor] = []
        known: dict[bytes, int] = {}  # a subject's prefix, by its token ids: large subjects have it in many shards
        lengths, rows, owners, owned = [], [], [], []
        for shard in self.prompts.shards:
            for group, (prefix, own) in zip(shard.groups, trunk.load(shard), strict=True):
                sizes = [len(ids) for ids in group.sequences]
                owned.extend(own.split(sizes))
                lengths += sizes
                rows += group.rows
                number = known.setdefault(group.prefix.astype("<i8").tobytes(), len(prefixes))
                if number == len(prefixes):
                    prefixes.append(prefix)
                owners += [number] * len(sizes)
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        lengths = [lengths[i] for i in order]
        device = self.runner.device
        n_prefix = sum(len(prefix) for prefix in prefixes)
        self.plan = plan or self._planned(n_prefix, lengths)
        self._buckets = _buckets_of(lengths, self.plan.chunk_tokens)
        padded = sum(bucket.count * bucket.width for bucket in self._buckets)

        self.rows = torch.tensor([rows[i] for i in order])
        self._lengths = torch.tensor(lengths, device=device)
        owner = torch.tensor([owners[i] for i in order])
        self._prefixes, start = [], 0
        for number, prefix in enumerate(prefixes):
            questions = torch.nonzero(owner == number).flatten().to(device)
            self._prefixes.append(_Prefix(start, start + len(prefix), questions))
            start += len(prefix)
        self._n_prefix = n_prefix
        self._offsets = torch.tensor([len(prefixes[owners[i]]) for i in order], device=device)

        width = (owned or prefixes)[0].shape[-1]
        self._tokens = self._empty_states(n_prefix + padded, width)
        for prefix, place in zip(prefixes, self._prefixes, strict=True):
            self._tokens[place.start : place.stop] = self._entering(moved(prefix, device, torch.float32))
        last, starts = [], []
        for bucket in self._buckets:
            block = torch.zeros(bucket.count, bucket.width, width, dtype=owned[0].dtype)
            for row, i in enumerate(order[bucket.first : bucket.first + bucket.count]):
                block[row, : len(owned[i])] = owned[i]
            states = moved(block, device, torch.float32)
            numbers = torch.arange(bucket.count, device=device)
            last.append(states[numbers, self._lengths[bucket.first : bucket.first + bucket.count] - 1])
            begin = n_prefix + bucket.start
            starts.append(numbers * bucket.width + begin)
            self._tokens[begin : begin + len(states) * bucket.width] = self._entering(states.flatten(0, 1))
        self._last, self._starts = torch.cat(last), torch.cat(starts)
        self._last_normalised = self._entering(self._last)
        self._rotary = self._cos_sin(torch.arange(max(self._positions_needed()), device=device))
        self._index()

    def _positions_needed(self) -> Iterator[int]:
        """For each bucket and prefix, one more than the last position in it, padding included."""
        for bucket in self._buckets:
            yield int(self._offsets[bucket.first : bucket.first + bucket.count].max()) + bucket.width
        for prefix in self._prefixes:
            yield prefix.stop - prefix.start

    def _index(self) -> None:
        """What follows from how questions and prefixes lie."""
        device = self._lengths.device
        self._turns: dict[tuple[str | None, int], list[tuple[Tensor, Tensor]]] = {}
        self._prefix_order = torch.argsort(torch.cat([prefix.questions for prefix in self._prefixes]))
        self._question_order = torch.argsort(self.rows).to(device)

    def _planned(self, n_prefix: int, lengths: Sequence[int]) -> ScoringPlan:
        """The plan for these questions, in what is free; layers that the runner keeps make room if that helps."""
        if not self.runner.accelerated:
            return ScoringPlan("device", "recompute", 1, _BUCKET_TOKENS)
        buckets = _buckets_of(lengths, _BUCKET_TOKENS)
        work = ScoringWork(
            tokens=n_prefix + sum(bucket.count * bucket.width for bucket in buckets),
            questions=len(lengths),
            sources=self.sources.count,
            stack=self.sources.stack_dtype.itemsize,
            compute=self.compute_dtype.itemsize,
        )
        options = {"host_free": host_free(), "linear": self._is_linear, "batched": self._is_batched}
        free, kept = device_memory(self.runner.device).free, self.runner.kept_bytes
        if "stack" in vars(self.sources):  # another scorer made it: it is no longer among the free bytes
            free += self.sources.stack.nbytes
        with_room = plan_scoring(self.runner.layer_size, work, device_free=free + kept, **options)
        try:
            if plan_scoring(self.runner.layer_size, work, device_free=free, **options) == with_room:
                return with_room
        except MemoryPlanError:
            pass
        self.runner.release()
        release_cached()
        return with_room

    def _empty_states(self, tokens: int, width: int) -> Tensor:
        """Where normalised states (tokens, d) will lie."""
        if self.plan.states == "host":
            return host_buffer((tokens, width), self.compute_dtype, self.runner.device)
        return torch.empty(tokens, width, dtype=self.compute_dtype, device=self.runner.device)

    @property
    def tokens_a_question(self) -> float:
        """Cached tokens, those of prefixes and padding included, for each question."""
        return len(self._tokens) / len(self.rows)

    def _entering(self, x: Tensor) -> Tensor:
        return (_rms(x, self._epsilon) if self._normalises else x).to(self.compute_dtype)

    def _cos_sin(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        # (N, 1, rotated dimensions) each, by rotary type; the middle axis broadcasts over heads.
        found = {}
        for layer in range(self.first, self.runner.checkpoint.n_layers):
            if (kind := self.runner.checkpoint.rotary_types[layer]) not in found:
                cos, sin = self.runner.rotary(positions, layer)
                found[kind] = cos[0].float()[:, None], sin[0].float()[:, None]
        return found

    def _rotary_at(self, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary[kind]
        return cos[positions], sin[positions]

    def select(self, rows: Sequence[int]) -> TailScorer:
        """A scorer of these questions alone, which it answers in the order given; no row may occur twice.

        Their states are copied out of this one's, with the prefixes that they need: for a few questions it costs a few
        megabytes and no forward pass. Everything else is shared; `prompts` stays that of all questions.
        """
        place = {row: number for number, row in enumerate(rows)}
        chosen = torch.tensor([i for i, row in enumerate(self.rows.tolist()) if row in place], dtype=torch.int64)
        if len(place) < len(rows) or len(chosen) < len(place) or not len(place):
            raise ValueError(
                f"{len(rows)} rows are asked for, which name {len(chosen)} of {len(self.rows)} questions: name "
                "at least one, each once"
            )
        part = copy.copy(self)
        device = self._lengths.device
        part.rows = torch.tensor([place[row] for row in self.rows[chosen].tolist()])
        at = chosen.to(device)
        for name in ("_lengths", "_offsets", "_last", "_last_normalised"):
            setattr(part, name, getattr(self, name)[at])

        new_place = torch.full((len(self.rows),), -1, device=device)
        new_place[at] = torch.arange(len(at), device=device)
        part._prefixes, indices, start = [], [], 0
        for prefix in self._prefixes:
            questions = new_place[prefix.questions]
            questions = questions[questions >= 0]
            if len(questions):
                length = prefix.stop - prefix.start
                part._prefixes.append(_Prefix(start, start + length, questions))
                indices.append(torch.arange(prefix.start, prefix.stop, device=device))
                start += length
        part._n_prefix = start
        part._buckets, starts = _buckets_of(part._lengths.tolist(), self.plan.chunk_tokens), []
        for bucket in part._buckets:
            members = slice(bucket.first, bucket.first + bucket.count)
            # Beyond a question's end its last token is repeated: attention does not see it.
            offset = torch.arange(bucket.width, device=device)[None].minimum(part._lengths[members, None] - 1)
            indices.append((self._starts[at][members, None] + offset).flatten())
            starts.append(torch.arange(bucket.count, device=device) * bucket.width + bucket.start + start)
        part._starts = torch.cat(starts)
        part._tokens = self._tokens[torch.cat(indices).to(self._tokens.device)].to(device)
        # Whatever of the plan is about the states of all questions is not about these.
        part.plan, part._source_keys = replace(self.plan, states="device", keys="recompute"), None
        part._index()
        return part

    # -- scoring ------------------------------------------------------------------------------------------------

    def accepts(self, plan: MergePlan) -> bool:
        """Whether the plan leaves the trunk as it is and collapses all that follows into one layer."""
        return (
            plan.n_layers == self.runner.checkpoint.n_layers
            and len(plan.kept) == self.first + 1
            and plan.first_changed >= self.first
        )

    def coefficients(self, plan: MergePlan) -> Tensor:
        """The merged layer's coefficients as (sources,) float64; column j belongs to original layer first + j.

        Where the plan gives matrices coefficients of their own it is (matrices, sources).
        """
        kept = plan.kept[self.first]
        matrices = self.runner.checkpoint.architecture.matrices
        values = torch.zeros(len(matrices), self.sources.count, dtype=torch.float64)
        for row, matrix in zip(values, matrices, strict=True):
            for source, weight in kept.coefficients_of(matrix):
                row[source - self.first] = weight
        return values if kept.matrices else values[0]

    @torch.inference_mode()
    def score(self, plan: MergePlan) -> tuple[Tensor, Tensor, Tensor]:
        """What the merged model answers, in question order.

        Answer logits (n, 4) float32, and over the whole vocabulary logsumexp (n,) and the most probable token (n,).
        """
        (hidden,) = self._hidden_of([plan])
        # A CPU converts the unembedding for every part.
        parts = hidden.split(_VOCABULARY_QUESTIONS) if self.runner.accelerated else (hidden,)
        logsumexp, top = (torch.cat(values) for values in zip(*map(self.runner.vocabulary, parts), strict=True))
        found = (self._answers(hidden), logsumexp, top)
        logits, logsumexp, top = (self._unsort(values).cpu() for values in found)
        return logits, logsumexp, top

    @torch.inference_mode()
    def score_many(self, plans: Sequence[MergePlan]) -> Iterator[Tensor]:
        """Answer logits (n, 4) float32 of each plan in turn, in question order."""
        for hidden in self._hidden_of(plans):
            yield self._unsort(self._answers(hidden)).cpu()

    def _hidden_of(self, plans: Sequence[MergePlan]) -> Iterator[Tensor]:
        for plan in plans:
            check_mergeable(self.runner.checkpoint, plan)
            if not self.accepts(plan):
                raise ValueError(f"plan {plan.name!r} does not collapse the layers from {self.first} on into one")
        start = 0
        while start < len(plans):
            if not self.runner.accelerated:
                together = plans[start : start + max(_MIXED_TOGETHER, self.plan.candidates)]
                yield from self._hidden_together(together)
            else:
                together = plans[start : start + self.plan.candidates]
                fits, found = attempt(lambda together=together: list(self._hidden_together(together)))
                if not fits:
                    self._shrink()
                    continue
                yield from found
            start += len(together)

    def _shrink(self) -> None:
        """Go on with the next smaller plan, after the device ran out of memory."""
        smaller = self.plan.smaller()
        if smaller is None:
            raise MemoryPlanError(
                f"scoring one candidate on {len(self.rows)} questions runs out of the memory of {self.runner.device}, "
                f"{self.plan.chunk_tokens} tokens at a time and with the states in host memory: take fewer questions "
                "(data.limit_per_subject) or fewer merges"
            )
        if smaller.keys == "recompute":
            self._source_keys = None
        if smaller.states == "host" and self.plan.states == "device":
            held = host_buffer(self._tokens.shape, self._tokens.dtype, self.runner.device)
            self._tokens = held.copy_(self._tokens)
        self.plan = smaller
        release_cached()

    def _hidden_together(self, plans: Sequence[MergePlan]) -> Iterator[Tensor]:
        """`hidden` of each plan in turn: weights mixed in one pass, then `plan.candidates` scored at once."""
        if self.plan.keys == "linear" and self._source_keys is None:
            fits, self._source_keys = attempt(self._keys_of_sources)
            if not fits:
                self.plan = replace(self.plan, keys="recompute")
        coefficients = [self.coefficients(plan) if self.is_stacked(plan) else None for plan in plans]
        # Those that have coefficients for each matrix are mixed apart: all other products stay what they are.
        alike, mixed, taken = {}, {}, {}
        for axes in {values.ndim for values in coefficients if values is not None}:
            alike[axes] = torch.stack([values for values in coefficients if values is not None and values.ndim == axes])
            mixed[axes] = self.sources.mix(alike[axes], self.fused_dtype, self.compute_dtype)
            taken[axes] = 0
        start = 0
        while start < len(plans):
            plan, values = plans[start], coefficients[start]
            rest = plan.kept[self.first].index - self.first
            if values is None:
                yield self.hidden(self.runner.deployed(self._fused(plan)), rest)
                start += 1
                continue
            # As many as are alike in all but their coefficients.
            count = 1
            while (
                self._is_batched
                and count < min(self.plan.candidates, len(plans) - start)
                and coefficients[start + count] is not None
                and coefficients[start + count].ndim == values.ndim
                and plans[start + count].kept[self.first].index == plan.kept[self.first].index
                and plans[start + count].biases == plan.biases
            ):
                count += 1
            rows = slice(taken[values.ndim], taken[values.ndim] + count)
            taken[values.ndim] += count
            own, summed = mixed[values.ndim][rows], self._key_coefficients(alike[values.ndim][rows], rest)
            if count == 1:
                weights = self.sources.weights(own[0], rest, plan.biases == "merge")
                yield self.hidden(self.runner.deployed(weights), rest, None if summed is None else summed[0])
            else:
                yield from self._hidden_of_several(own, rest, plan.biases == "merge", summed)
            start += count

    def _hidden_of_several(self, mixed: Tensor, rest: int, merge_biases: bool, summed: Tensor | None) -> Tensor:
        """(candidates, n, d): `hidden` of several candidates whose mixed weights are (candidates, parameters).

        States, and what of the weights is not averaged, are read once for all of them.
        """
        weights = self.sources.weights(mixed, rest, merge_biases)
        averaged = {name: weights.pop(name) for name in self.sources.averaged(merge_biases)}
        dimensions = (0, None if summed is None else 0)
        hidden = torch.func.vmap(lambda own, summed: self.hidden(weights | own, rest, summed), dimensions)
        return hidden(averaged, summed)

    @property
    def _is_batched(self) -> bool:
        """Whether several candidates can be scored at once: quantising takes one matrix at a time, and which experts a
        token goes to is not known before."""
        return self.runner.quantise == "none" and not self._architecture.experts

    def is_stacked(self, plan: MergePlan) -> bool:
        """Whether the plan's merged layer is a weighted sum of the stacked sources; else it is fused by itself.

        A layer that nothing is averaged into is saved as it is, whatever the plan's norms and alignment, and rounding
        folded gains would not give it back exactly.
        """
        if plan.kept[self.first].unchanged:
            return self.sources.norms == "keep" and self.sources.alignment == "none"
        return (plan.norms, plan.alignment) == (self.sources.norms, self.sources.alignment)

    def _fused(self, plan: MergePlan) -> dict[str, Tensor]:
        """The merged layer of a plan as `fusion` gives it, float32."""
        layer = self.runner.fused(plan, self.first, dtype=self.fused_dtype)
        return {name: tensor.to(self.runner.device, torch.float32) for name, tensor in layer.items()}

    def logits(self, coefficients: Tensor, *, rest: int = 0, merge_biases: bool = False) -> Tensor:
        """Answer logits (n, 4) in question order, differentiable in `coefficients`, (sources,) or (matrices, sources).

        rest: which source layer gives norms, attention window and, unless they are merged, biases.
        """
        (mixed,) = self.sources.mix(coefficients[None], self.fused_dtype)
        return self.answer_logits(self.sources.weights(mixed, rest, merge_biases), rest)

    def answer_logits(self, weights: dict[str, Tensor], rest: int) -> Tensor:
        """Answer logits (n, 4) in question order of a merged layer, differentiable in its weights; see `hidden`."""
        return self._unsort(self._answers(self.hidden(weights, rest)))

    def _answers(self, hidden: Tensor) -> Tensor:
        return self.runner.capped(hidden @ self._letters.T)

    def _unsort(self, values: Tensor) -> Tensor:
        return values[self._question_order]

    def hidden(self, weights: dict[str, Tensor], rest: int, summed: Tensor | None = None) -> Tensor:
        """States (n, d) float32 after the final norm at each question's last position, in bucket order.

        weights: the merged layer's tensors by relative name; rest: the source layer whose window it has. summed: the
        coefficients (sources,) by which keys are sums of the sources', where these are held.
        """
        checkpoint = self.runner.checkpoint
        window, rotary = (each[self.first + rest] for each in (checkpoint.windows, checkpoint.rotary_types))
        last = self._rotary_at(self._offsets + self._lengths - 1, rotary)
        query = self._product(self._last_normalised, *self._projection("q", weights))
        query = self._heads(query, "q", weights, last)
        query = query.unflatten(1, (self._kv_heads, self._groups))
        attended = self._attend(query, weights, window, rotary, summed).flatten(1)
        rows = max(1, self.plan.chunk_tokens // _ROW)
        parts = zip(self._last.split(rows), attended.split(rows), strict=True)
        return torch.cat([self._finish(x, part, weights) for x, part in parts])

    def _finish(self, last: Tensor, attended: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What follows attention, to the final norm, for some of the questions."""
        out = self._product(attended, weights["self_attn.o_proj.weight"], weights.get("self_attn.o_proj.bias"))
        x = last + self._leaving("self_attn", out, weights)
        return self.runner.normalise(x + self._leaving("mlp", self._mlp(x, weights), weights))

    def _product(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """A linear map in the compute dtype, its bias added in float32; float32."""
        dtype = self.compute_dtype
        if dtype == torch.float32:
            return F.linear(x, matrix.float(), bias)
        product = F.linear(x.to(dtype), matrix.to(dtype)).float()
        return product if bias is None else product + bias

    def _module(self, name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """One of the layer's modules, transformers' own, on (n, …) states with the weights under its name."""
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        return functional_call(self._block.get_submodule(name), own, (x[None],))[0]

    def _leaving(self, block: str, out: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What a block adds: its output, normalised where the family does so."""
        norm = self._architecture.output_norms.get(block)
        return out if norm is None else self._module(norm, out, weights)

    def _mlp(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        arch = self._architecture
        norm = arch.gain_of(arch.router or arch.rows_of("up")[0])
        inner = x if norm is None else self._module(norm.removesuffix(".weight"), x, weights)
        own = module_layer(arch, weights).items()
        own = {name: tensor.to(self.compute_dtype) for name, tensor in own if name.startswith("mlp.")}
        return self._module("mlp", inner.to(self.compute_dtype), own).float()

    def _projection(self, which: str, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Matrix, in the compute dtype, and bias that make queries, keys or values of the entering states."""
        matrix, rows = self._architecture.rows_of(which)
        weight, bias = weights[f"{matrix}.weight"][rows], weights.get(f"{matrix}.bias")
        # The gain moves from every token's state to the matrix's columns.
        if gain := self._architecture.gain_of(matrix):
            weight = weight.float() * (weights[gain].float() + self._architecture.gain_offset)
        return weight.to(self.compute_dtype), None if bias is None else bias[rows]

    def _heads(self, heads: Tensor, which: str, weights: Mapping[str, Tensor], rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Queries or keys (N, heads, head_dim) as projected, normalised where the family does so, and rotated."""
        norm = f"self_attn.{which}_norm"
        if norm in self._architecture.projection_norms:
            heads = self._module(norm, heads, weights)
        heads = heads.unflatten(-1, (-1, self._head_dim))
        if norm in self._architecture.head_norms:
            heads = self._module(norm, heads, weights)
        cos, sin = rotary
        heads, still = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
        first, second = heads.chunk(2, -1)
        turned = heads * cos + torch.cat([-second, first], -1) * sin
        return torch.cat([turned, still], -1) if still.shape[-1] else turned

    def _scores(self, products: Tensor) -> Tensor:
        """Attention scores of products of queries and keys."""
        scores, cap = products * self._scaling, self.runner.attention_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def _pieces(self) -> list[_Bucket]:
        """The buckets, cut so that none has more tokens than the plan allows (but one question's)."""
        pieces = []
        for bucket in self._buckets:
            rows = max(1, self.plan.chunk_tokens // bucket.width)
            for first in range(0, bucket.count, rows):
                count = min(rows, bucket.count - first)
                start = bucket.start + first * bucket.width
                pieces.append(_Bucket(bucket.first + first, count, start, bucket.width))
        return pieces

    def _prefix_groups(self) -> list[list[_Prefix]]:
        """The prefixes, in order, as keys and values are made of them: one by one on a CPU, on an accelerator as many
        as a chunk holds, since MMLU's 57 are too short to be worth a call each."""
        groups: list[list[_Prefix]] = []
        for prefix in self._prefixes:
            fits = groups and prefix.stop - groups[-1][0].start <= self.plan.chunk_tokens
            if fits and self.runner.accelerated:
                groups[-1].append(prefix)
            else:
                groups.append([prefix])
        return groups

    def _spans(self, pieces: Sequence[_Bucket]) -> list[tuple[int, int]]:
        """Rows of the tokens: of every group of prefixes, then of every piece of a bucket."""
        own = [(start, start + b.count * b.width) for b in pieces for start in (self._n_prefix + b.start,)]
        return [(group[0].start, group[-1].stop) for group in self._prefix_groups()] + own

    def _positions(self, pieces: Sequence[_Bucket]) -> Iterator[Tensor]:
        """Of each token in the order of `_spans`."""
        device = self._lengths.device
        for group in self._prefix_groups():
            yield torch.cat([torch.arange(prefix.stop - prefix.start, device=device) for prefix in group])
        for b in pieces:
            offsets = self._offsets[b.first : b.first + b.count]
            yield (offsets[:, None] + torch.arange(b.width, device=device)).flatten()

    @torch.inference_mode(False)
    def _rotations(self, pieces: Sequence[_Bucket], kind: str | None) -> Iterable[tuple[Tensor, Tensor]]:
        """cos and sin of each token in the order of `_spans`; kept on a CPU, where looking them up takes a tenth of a
        candidate's time."""
        if self.runner.accelerated:
            return (self._rotary_at(positions, kind) for positions in self._positions(pieces))
        key = kind, self.plan.chunk_tokens
        if key not in self._turns:
            self._turns = {key: [self._rotary_at(positions, kind) for positions in self._positions(pieces)]}
        return self._turns[key]

    def _states_of(self, spans: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """The normalised states of each span, on the device."""
        device = self.runner.device
        if self.plan.states == "device":
            return (self._tokens[start:stop] for start, stop in spans)
        if torch.is_grad_enabled():  # kept for the backward pass
            return (self._tokens[start:stop].to(device, non_blocking=True) for start, stop in spans)
        return streamed(self._tokens, spans, device)

    def _keys(
        self,
        states: Iterable[Tensor],
        pieces: Sequence[_Bucket],
        weights: Mapping[str, Tensor],
        rotary: str | None,
        summed: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rotated keys (tokens, kv, head_dim) float32 of each group of prefixes, then of each piece, and their tokens'
        states."""
        if summed is not None:
            heads = (self._kv_heads, self._head_dim)
            for (start, stop), tokens in zip(self._spans(pieces), states, strict=True):
                yield _sum(summed, self._source_keys[:, start:stop]).unflatten(-1, heads), tokens
            return
        projection = self._projection("k", weights)
        for tokens, turn in zip(states, self._rotations(pieces, rotary), strict=True):
            yield self._heads(self._product(tokens, *projection), "k", weights, turn), tokens

    def _attend(
        self,
        query: Tensor,
        weights: Mapping[str, Tensor],
        window: int | None,
        rotary: str | None,
        summed: Tensor | None,
    ) -> Tensor:
        """Attention of each last position, (n, kv, group, head_dim), over its prefix and its own tokens.

        The two parts are computed apart - the prefix once a subject, the questions bucket by bucket across all
        subjects - and joined by their log-sum-exps.
        """
        device, pieces = query.device, self._pieces()
        keys = self._keys(self._states_of(self._spans(pieces)), pieces, weights, rotary, summed)
        value = self._projection("v", weights)
        prefix_parts = list(self._prefix_parts(query, keys, value, window))
        own_parts = []
        for piece in pieces:
            rows = slice(piece.first, piece.first + piece.count)
            k, states = (t.unflatten(0, (piece.count, piece.width)) for t in next(keys))
            scores = self._scores(torch.einsum("nkgd,ntkd->nkgt", query[rows], k))
            behind = self._lengths[rows, None] - 1 - torch.arange(piece.width, device=device)
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
            own_parts.append(_partial_softmax(scores, self._weighing(states, value, 1)))
        prefix_log, prefix_out = (torch.cat(part)[self._prefix_order] for part in zip(*prefix_parts, strict=True))
        own_log, own_out = (torch.cat(part) for part in zip(*own_parts, strict=True))
        share = torch.sigmoid(prefix_log - own_log)[..., None]  # exp(a) / (exp(a) + exp(b))
        return share * prefix_out + (1.0 - share) * own_out

    def _prefix_parts(
        self,
        query: Tensor,
        keys: Iterator[tuple[Tensor, Tensor]],
        value: tuple[Tensor, Tensor | None],
        window: int | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each prefix's questions, some at a time, what `_partial_softmax` gives for their attention to it."""
        device = query.device
        for group in self._prefix_groups():
            of_group = next(keys)
            for prefix in group:
                own = slice(prefix.start - group[0].start, prefix.stop - group[0].start)
                k, states = (t[own] for t in of_group)
                k, length = k.permute(1, 2, 0), prefix.stop - prefix.start  # (kv, head_dim, P)
                weigh = self._weighing(states[None], value, len(prefix.questions))
                for questions in prefix.questions.split(max(1, _PAIRS * self.plan.chunk_tokens // max(1, length))):
                    scores = self._scores(torch.einsum("nkgd,kdp->nkgp", query[questions], k))
                    if window is not None:
                        last = self._offsets[questions] + self._lengths[questions] - 1
                        seen = visible(last, torch.arange(length, device=device), window)
                        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
                    yield _partial_softmax(scores, weigh)

    def _weighing(
        self, states: Tensor, value: tuple[Tensor, Tensor | None], questions: int
    ) -> Callable[[Tensor], Tensor]:
        """From what attention gives each token, (n, kv, group, t), to the values weighted by it, (n, kv, group,
        head_dim).

        states: (n, t, d) of each question, or (1, t, d) of a prefix that `questions` of them share.

        The sum of p W x over the tokens is W times the sum of p x. Where fewer queries look at a token than its value
        has entries, it is cheaper to weigh the states and to multiply once with the value matrix.
        """
        matrix, bias = value
        matrix = matrix.unflatten(0, (self._kv_heads, self._head_dim))
        queries, tokens = questions * self._kv_heads * self._groups, states.shape[1]
        if 2 * queries * (tokens + self._head_dim) > tokens * self._kv_heads * self._head_dim:
            values = self._product(states, value[0], bias).unflatten(-1, (self._kv_heads, self._head_dim))
            if len(states) > 1:
                return lambda shares: torch.einsum("nkgt,ntkd->nkgd", shares, values)
            return lambda shares: torch.einsum("nkgt,tkd->nkgd", shares, values[0])
        # As much memory at once as the values of a chunk.
        rows = max(1, self.plan.chunk_tokens * self._head_dim // (self._groups * states.shape[2]))

        def weigh(shares: Tensor) -> Tensor:
            parts = []
            for first in range(0, len(shares), rows):
                part = shares[first : first + rows]
                own = states[first : first + rows] if len(states) > 1 else states.expand(len(part), -1, -1)
                weighted = _WeightedStates.apply(part.flatten(1, 2), own).unflatten(1, part.shape[1:3])
                out = torch.einsum("nkgd,khd->nkgh", weighted.to(self.compute_dtype), matrix).float()
                parts.append(out if bias is None else out + bias.unflatten(0, (self._kv_heads, 1, self._head_dim)))
            return torch.cat(parts)

        return weigh

    # -- keys as sums ---------------------------------------------------------------------------------------------

    @property
    def _is_linear(self) -> bool:
        """Whether keys may be sums of the sources': without a bias (which is kept or merged) and a norm of keys between
        them and the weights, and where rounding the merged matrix is below the compute dtype's own rounding, or is not
        asked for."""
        arch = self._architecture
        names = self.runner.checkpoint.layer_tensors(self.first)
        between = ["self_attn.k_norm.weight", f"{arch.rows_of('k')[0]}.bias"]
        narrow = self.compute_dtype != torch.float32 or self.fused_dtype == torch.float32
        return narrow and self._is_batched and not set(between) & set(names)

    def _keys_of_sources(self) -> Tensor:
        """Rotated keys of all tokens by each source's own matrix, under the gain of the first."""
        shape = (self.sources.count, len(self._tokens), self._kv_heads * self._head_dim)
        found = torch.empty(shape, dtype=self.compute_dtype, device=self.runner.device)
        pieces, rotary = self._pieces(), self.runner.checkpoint.rotary_types[self.first]
        spans = self._spans(pieces)
        for source, own in enumerate(self.sources.stack):
            keys = self._keys(self._states_of(spans), pieces, self.sources.weights(own, 0, False), rotary)
            for (start, stop), (values, _) in zip(spans, keys, strict=True):
                found[source, start:stop] = values.flatten(1)
        return found

    def _key_coefficients(self, coefficients: Tensor, rest: int) -> Tensor | None:
        """Those of keys, (candidates, sources), of (candidates, sources) or (candidates, matrices, sources); None where
        keys are to be computed from the states."""
        if self.plan.keys != "linear" or (rest and self.sources.norms == "keep"):
            return None
        coefficients = coefficients.to(self.runner.device, torch.float32)
        if coefficients.ndim == 2:
            return coefficients
        return coefficients[:, list(self._architecture.matrices).index(self._architecture.rows_of("k")[0])]


class _WeightedStates(torch.autograd.Function):
    """(n, queries, d) float32: states (n, t, d) weighted by (n, queries, t) float32, without a gradient of the states.

    A function of its own for `vmap`, which would copy the states for each candidate: their queries are one batch.
    """

    @staticmethod
    def forward(shares: Tensor, states: Tensor) -> Tensor:
        if states.dtype == torch.float32:
            return torch.bmm(shares, states)
        # A narrow dtype would round the shares: they are given as a sum of two numbers of it, in one product.
        high = shares.to(states.dtype)
        both = torch.cat([high, (shares - high.float()).to(states.dtype)], 1)
        return torch.bmm(both, states).float().unflatten(1, (2, -1)).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (states,) = ctx.saved_tensors
        return torch.bmm(gradient.to(states.dtype), states.transpose(1, 2)).float(), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], shares: Tensor, states: Tensor) -> tuple[Tensor, int]:
        assert in_dims[1] is None, "states are the same for all candidates"
        shares = shares.movedim(in_dims[0], 1)
        return _WeightedStates.apply(shares.flatten(1, 2), states).unflatten(1, shares.shape[1:3]), 1


def _sum(coefficients: Tensor, summands: Tensor) -> Tensor:
    """(sources,) float32 by (sources, tokens, width) to (tokens, width) float32.

    A narrow dtype would round the coefficients: they are given as a sum of two numbers of it, in one product.
    """
    high = coefficients.to(summands.dtype)
    if summands.dtype == torch.float32:
        return (high @ summands.flatten(1)).unflatten(0, summands.shape[1:])
    both = torch.stack([high, (coefficients - high.float()).to(summands.dtype)])
    return (both @ summands.flatten(1)).float().sum(0).unflatten(0, summands.shape[1:])


def _buckets_of(lengths: Sequence[int], most: int) -> list[_Bucket]:
    """Questions, sorted by length, cut into buckets that are each padded to their longest, of `most` tokens at most
    (but one question's)."""
    buckets, start, begin = [], 0, 0
    while begin < len(lengths):
        # Extend while the whole bucket, padded to its longest question, stays in the limit and little is wasted.
        end = begin + 1
        while end < len(lengths):
            width = lengths[end]
            if width * (end + 1 - begin) > most or width > 1.15 * lengths[begin] + 8:
                break
            end += 1
        count, width = end - begin, lengths[end - 1]
        buckets.append(_Bucket(begin, count, start, width))
        start, begin = start + count * width, end
    return buckets


def _rms(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def _partial_softmax(scores: Tensor, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """log-sum-exp of the scores over their last axis, and the values weighted by their softmax.

    Where nothing is visible (or there is no key at all) the log is -inf and the weighted values are 0, not NaN.
    """
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf), weigh(scores)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    exponentials = torch.exp(scores - top)
    total = exponentials.sum(-1, keepdim=True)
    log = (torch.log(total) + top)[..., 0]
    return log, weigh(exponentials / total.clamp_min(torch.finfo(scores.dtype).tiny))
