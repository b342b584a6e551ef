"""One layer on top of the frozen trunk: what a merged layer makes of the states at each question's last position.

Keys are computed for all cached tokens; query, attention, output, MLP and the final norm at the last position alone.
Values are not projected token by token: attention weighs the states, and the value matrix multiplies their sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from raymerge.architectures import module_layer
from raymerge.families import TRAINED_LENGTH
from raymerge.forward import LayerRunner, visible
from raymerge.memory import ScoringPlan
from raymerge.tail_states import Chunks, TailStates

_PAIRS = 16  # pairs of a question and a prefix key that take as much memory as one token's key and weighted states
_ROW = 8  # tokens whose keys and weighted states take as much memory as one question's MLP


class TailLayer:
    """The layer at `first`, with the weights that each call gives, on the states that enter it.

    Attention at the last position is written out here; norms and the MLP, or its experts, are transformers' own
    modules. Products with the weights are in the states' dtype; attention, the residual stream and the final norm are
    float32 in any case, since in bfloat16 answer letters tie.
    plan: how much is done at once; it may be replaced between calls.
    """

    def __init__(self, runner: LayerRunner, first: int, states: TailStates, plan: ScoringPlan):
        self.runner, self.first, self.states, self.plan = runner, first, states, plan
        self.compute_dtype = states.tokens.dtype
        self._block = runner.modules[first]
        arch = runner.checkpoint.architecture
        self._architecture = arch
        self._head_dim, self._kv_heads, self._groups = (
            arch.sizes[name] for name in ("rotary", "kv_heads", "query_heads")
        )
        self._scaling = self._block.get_submodule(arch.attention).scaling
        # Rotated keys, (sources, tokens, kv * head_dim); a piece's rows hold (questions, kv, tokens of each, head_dim).
        self._source_keys: Tensor | None = None
        self._rotary = self._cos_sin(torch.arange(states.layout.positions, device=runner.device))
        self._turns: dict[tuple[str | None, int], list[tuple[Tensor, Tensor]]] = {}
        # The order of a head's dimensions in queries and keys; scores do not depend on it, since both have the same.
        self._dimensions: Tensor | None = None
        if arch.rotary_neighbours:
            (cos, _), *_ = self._rotary.values()
            dimensions = torch.arange(self._head_dim, device=runner.device)
            turned, still = dimensions.tensor_split([cos.shape[-1]])
            self._dimensions = torch.cat([turned[0::2], turned[1::2], still])

    def select(self, rows: Sequence[int]) -> TailLayer:
        """The same layer on the states of these questions alone; see TailStates.select."""
        part = copy.copy(self)
        part.states = self.states.select(rows)
        # What the plan says of the states of all questions does not hold for these few.
        part.plan, part._source_keys, part._turns = replace(self.plan, states="device", keys="recompute"), None, {}
        return part

    def _cos_sin(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        # (N, 1, rotated dimensions) each, by rotary type; the middle axis broadcasts over heads.
        found = {}
        for layer in range(self.first, self.runner.checkpoint.n_layers):
            if (kind := self.runner.checkpoint.rotary_types[layer]) not in found:
                cos, sin = (angles[0].float()[:, None] for angles in self.runner.rotary(positions, layer))
                if self._architecture.rotary_interleaved:
                    cos, sin = (torch.cat([angles[..., 0::2], angles[..., 1::2]], -1) for angles in (cos, sin))
                found[kind] = cos, sin
        return found

    def _rotary_at(self, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary[kind]
        return cos[positions], sin[positions]

    def hidden(self, weights: Mapping[str, Tensor], survivor: int, key_coefficients: Tensor | None = None) -> Tensor:
        """States (n, d) float32 after the final norm at each question's last position, by place.

        weights: the merged layer's tensors by relative name. survivor: the layer has the window and rotary type of
        original layer first + survivor. key_coefficients: (sources,), with which keys are summed from those that
        `hold_keys` holds; None projects them from the states.
        """
        checkpoint = self.runner.checkpoint
        window, rotary = checkpoint.windows[self.first + survivor], checkpoint.rotary_types[self.first + survivor]
        states, layout = self.states, self.states.layout
        # A window that reaches over every position hides nothing.
        window = None if window is not None and window >= layout.positions else window
        last = layout.offsets + layout.lengths - 1
        query = self._product(states.last_normalised, *self._projection("q", weights), narrow=True)
        query = self._scaled(self._heads(query, "q", weights, self._rotary_at(last, rotary)), last)
        query = query.unflatten(1, (self._kv_heads, self._groups))
        attended = self._attend(query, weights, window, rotary, key_coefficients).flatten(1)
        rows = max(1, self.plan.chunk_tokens // _ROW)
        parts = zip(states.last.split(rows), attended.split(rows), strict=True)
        return torch.cat([self._finish(x, part, weights) for x, part in parts])

    def _finish(self, last: Tensor, attended: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What follows attention, to the final norm, for some of the questions."""
        o = self._architecture.holder_of("o")
        out = self._product(attended, weights[f"{o}.weight"], weights.get(f"{o}.bias"))
        x = last + self._leaving("self_attn", out, weights)
        read = last if self._architecture.parallel else x
        return self.runner.vocabulary.normalise(x + self._leaving("mlp", self._mlp(read, weights), weights))

    def _product(self, x: Tensor, matrix: Tensor, bias: Tensor | None, *, narrow: bool = False) -> Tensor:
        """A linear map in the compute dtype, its bias added in float32; float32.

        narrow: on an accelerator a product without a bias stays in the compute dtype, for `_Rotated` to widen.
        """
        dtype = self.compute_dtype
        if dtype == torch.float32:
            return F.linear(x, matrix.float(), bias)
        product = F.linear(x.to(dtype), matrix.to(dtype))
        if bias is None:
            return product if narrow and self.runner.accelerated else product.float()
        return product.float() + bias

    def _module(self, name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """One of the layer's modules, transformers' own, on (n, …) states with the weights under its name."""
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        return functional_call(self._block.get_submodule(name), own, (x[None],))[0]

    def _leaving(self, block: str, out: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What a block adds to the residual stream: its output, normalised or scaled where the family does so."""
        norm, scale = self._architecture.output_norms.get(block), self.runner.residual_multiplier
        out = out if norm is None else self._module(norm, out, weights)
        return out if scale == 1.0 else out * scale

    def _mlp(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        arch = self._architecture
        inner = x if arch.norm_before_mlp is None else self._module(arch.norm_before_mlp, x, weights)
        tensors = module_layer(arch, weights).items()
        own = {name: tensor.to(self.compute_dtype) for name, tensor in tensors if name.startswith(f"{arch.mlp}.")}
        return self._module(arch.mlp, inner.to(self.compute_dtype), own).float()

    def _projection(self, which: str, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Matrix, in the compute dtype, and bias that make queries, keys or values of the entering states."""
        matrix, part_of = self._architecture.holder_of(which), self._architecture.part_of
        weight, bias = part_of(which, weights[f"{matrix}.weight"]), weights.get(f"{matrix}.bias")
        bias = None if bias is None else part_of(which, bias)
        # The gain moves from every token's state to the matrix's columns, the norm's bias to the matrix's.
        norm = self._architecture.norm_before(matrix)
        gain, shift = (weights.get(f"{norm}.{part}") for part in ("weight", "bias"))
        if shift is not None:
            moved = weight.float() @ shift.float()
            bias = moved if bias is None else bias + moved
        if gain is not None:
            weight = weight.float() * (gain.float() + self._architecture.gain_offset)
        if self._dimensions is not None and which in ("q", "k"):
            weight, bias = self._reordered(weight), None if bias is None else self._reordered(bias)
        return weight.to(self.compute_dtype), bias

    def _reordered(self, rows: Tensor) -> Tensor:
        """Rows of a query or key projection, so ordered that rotating halves does what rotating neighbours would."""
        return rows.unflatten(0, (-1, self._head_dim))[:, self._dimensions].flatten(0, 1)

    def _heads(
        self,
        heads: Tensor,
        which: str,
        weights: Mapping[str, Tensor],
        rotary: tuple[Tensor, Tensor],
        shape: tuple[int, int] | None = None,
    ) -> Tensor:
        """Queries or keys (N, heads * head_dim) as projected, normalised where the family does so, and rotated:
        (N, heads, head_dim) float32.

        shape: (questions, tokens of each), if these N tokens are a piece's; then (questions, heads, tokens, head_dim).
        """
        arch = self._architecture
        if norm := arch.projection_norm_of(which):
            heads = self._module(norm, heads.float(), weights)
        heads, norm = heads.unflatten(-1, (-1, self._head_dim)), arch.head_norm_of(which)
        if norm and not arch.rotated_head_norms:
            heads = self._module(norm, heads.float(), weights)
        turned = self._rotated(heads, *rotary, shape)
        return self._module(norm, turned, weights) if norm and arch.rotated_head_norms else turned

    def _rotated(self, heads: Tensor, cos: Tensor, sin: Tensor, shape: tuple[int, int] | None) -> Tensor:
        """`_heads` of those that are (N, heads, head_dim), without norms."""
        if self.runner.accelerated:
            questions, tokens = shape or (len(heads), 1)
            turned = _Rotated.apply(heads, cos, sin, questions, tokens)
            return turned if shape else turned[:, :, 0]
        heads, still = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
        first, second = heads.chunk(2, -1)
        turned = heads * cos + torch.cat([-second, first], -1) * sin
        turned = torch.cat([turned, still], -1) if still.shape[-1] else turned
        return turned.unflatten(0, shape).transpose(1, 2) if shape else turned

    def _scaled(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Queries (n, heads, head_dim) at positions (n,), multiplied by what the family multiplies them by there."""
        if (key := self._architecture.query_scaling) is None:
            return queries
        rope = self.runner.checkpoint.config.rope_parameters
        scale = 1.0 + rope[key] * torch.log(1.0 + torch.floor(positions / rope[TRAINED_LENGTH]))
        return queries * scale[:, None, None]

    def _chunks(self) -> Chunks:
        return self.states.layout.chunks(self.plan.chunk_tokens, together=self.runner.accelerated)

    def _scores(self, products: Tensor) -> Tensor:
        """Attention scores of products of queries and keys."""
        scores, cap = products * self._scaling, self.runner.attention_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    @torch.inference_mode(False)
    def _rotations(self, chunks: Chunks, kind: str | None) -> Iterable[tuple[Tensor, Tensor]]:
        """cos and sin of the tokens of each chunk; kept on a CPU, where looking them up takes a tenth of a candidate's
        time."""
        if self.runner.accelerated:
            return (self._rotary_at(positions, kind) for positions in chunks.positions())
        key = kind, self.plan.chunk_tokens
        if key not in self._turns:
            self._turns = {key: [self._rotary_at(positions, kind) for positions in chunks.positions()]}
        return self._turns[key]

    def _keys(
        self, chunks: Chunks, weights: Mapping[str, Tensor], rotary: str | None, key_coefficients: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rotated keys float32 of each chunk, and its tokens' states (tokens, d).

        Keys are (tokens, kv, head_dim) of prefixes and (questions, kv, tokens, head_dim) of pieces of buckets: products
        of queries and keys would copy those that have heads behind tokens.
        """
        spans = zip(chunks.spans, chunks.shapes, self.states.of(chunks.spans), strict=True)
        if key_coefficients is not None:
            held = self._source_keys
            assert held is not None  # by `hold_keys`
            for (start, stop), shape, tokens in spans:
                keys = _sum(key_coefficients, held[:, start:stop])
                if shape is None:
                    yield keys.unflatten(-1, (self._kv_heads, self._head_dim)), tokens
                else:
                    yield keys.view(shape[0], self._kv_heads, shape[1], self._head_dim), tokens
            return
        projection = self._projection("k", weights)
        for (_, shape, tokens), turn in zip(spans, self._rotations(chunks, rotary), strict=True):
            keys = self._product(tokens, *projection, narrow=True)
            yield self._heads(keys, "k", weights, turn, shape), tokens

    def _attend(
        self,
        query: Tensor,
        weights: Mapping[str, Tensor],
        window: int | None,
        rotary: str | None,
        key_coefficients: Tensor | None,
    ) -> Tensor:
        """Attention of each last position, (n, kv, group, head_dim), over its prefix and its own tokens.

        The two parts are computed apart - the prefix once a subject, the questions bucket by bucket across all
        subjects - and joined by their log-sum-exps.
        """
        chunks, layout = self._chunks(), self.states.layout
        keys = self._keys(chunks, weights, rotary, key_coefficients)
        value = self._projection("v", weights)
        prefix_parts = list(self._prefix_parts(query, chunks, keys, value, window))
        own_parts = []
        for piece in chunks.pieces:
            k, states = next(keys)
            states = states.unflatten(0, (piece.count, piece.width))
            scores = self._scores(torch.einsum("nkgd,nktd->nkgt", query[piece.places], k))
            behind = layout.lengths[piece.places, None] - 1 - torch.arange(piece.width, device=query.device)
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
            own_parts.append(_partial_softmax(scores, self._weighing(states, value, 1)))
        prefix_log, prefix_out = (torch.cat(part)[layout.prefix_order] for part in zip(*prefix_parts, strict=True))
        own_log, own_out = (torch.cat(part) for part in zip(*own_parts, strict=True))
        share = torch.sigmoid(prefix_log - own_log)[..., None]  # exp(a) / (exp(a) + exp(b))
        return share * prefix_out + (1.0 - share) * own_out

    def _prefix_parts(
        self,
        query: Tensor,
        chunks: Chunks,
        keys: Iterator[tuple[Tensor, Tensor]],
        value: tuple[Tensor, Tensor | None],
        window: int | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`_partial_softmax` of questions' attention to their prefix: prefix by prefix, some questions at a time."""
        layout = self.states.layout
        for group in chunks.groups:
            of_group = next(keys)
            for prefix in group:
                own = slice(prefix.start - group[0].start, prefix.stop - group[0].start)
                k, states = (t[own] for t in of_group)
                k = k.permute(1, 2, 0)  # (kv, head_dim, P)
                weigh = self._weighing(states[None], value, len(prefix.questions))
                together = max(1, _PAIRS * self.plan.chunk_tokens // max(1, prefix.length))
                for questions in prefix.questions.split(together):
                    scores = self._scores(torch.einsum("nkgd,kdp->nkgp", query[questions], k))
                    if window is not None:
                        last = layout.offsets[questions] + layout.lengths[questions] - 1
                        seen = visible(last, torch.arange(prefix.length, device=query.device), window)
                        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
                    yield _partial_softmax(scores, weigh)

    def _weighing(
        self, states: Tensor, value: tuple[Tensor, Tensor | None], questions: int
    ) -> Callable[[Tensor], Tensor]:
        """A function from attention weights (n, kv, group, t) to values weighted by them, (n, kv, group, head_dim).

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
                out = torch.einsum("nkgd,khd->nkgh", weighted, matrix).float()
                parts.append(out if bias is None else out + bias.unflatten(0, (self._kv_heads, 1, self._head_dim)))
            return torch.cat(parts)

        return weigh

    # -- keys as sums ---------------------------------------------------------------------------------------------

    @property
    def holds_keys(self) -> bool:
        return self._source_keys is not None

    def hold_keys(self, sources: Sequence[Mapping[str, Tensor]]) -> None:
        """Hold the rotated keys of all tokens by each source's own weights, for `hidden` to sum them."""
        shape = (len(sources), self.states.layout.tokens, self._kv_heads * self._head_dim)
        found = torch.empty(shape, dtype=self.compute_dtype, device=self.runner.device)
        chunks, rotary = self._chunks(), self.runner.checkpoint.rotary_types[self.first]
        for own, weights in zip(found, sources, strict=True):
            for (start, stop), (keys, _) in zip(chunks.spans, self._keys(chunks, weights, rotary), strict=True):
                own[start:stop].view(keys.shape).copy_(keys)
        self._source_keys = found

    def drop_keys(self) -> None:
        self._source_keys = None


class _Rotated(torch.autograd.Function):
    """(n, heads, t, head_dim) float32 of heads (n * t, heads, head_dim) of any dtype, rotated by cos and sin
    (n * t, 1, rotated) float32; head dimensions behind the rotated ones stay as they are.

    An autograd function for an accelerator, where time goes by the bytes read and written: 16 for each entry of
    bfloat16 keys. Products and a `cat` would take 46, and a matrix product another 8 to copy heads before tokens.
    """

    @staticmethod
    def forward(heads: Tensor, cos: Tensor, sin: Tensor, questions: int, tokens: int) -> Tensor:
        heads, cos, sin = (x.unflatten(-3, (questions, tokens)).transpose(-3, -2) for x in (heads, cos, sin))
        out = heads.new_empty(heads.shape, dtype=cos.dtype)
        rotated, half = cos.shape[-1], cos.shape[-1] // 2
        torch.mul(heads[..., :rotated], cos, out=out[..., :rotated])
        out[..., :half].addcmul_(heads[..., half:rotated], sin[..., :half], value=-1)
        out[..., half:rotated].addcmul_(heads[..., :half], sin[..., half:])
        if rotated < heads.shape[-1]:
            out[..., rotated:] = heads[..., rotated:]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, int], output: Tensor) -> None:
        heads, cos, sin, _, _ = inputs
        ctx.dtype = heads.dtype
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        gradient = gradient.transpose(-3, -2).flatten(-4, -3)
        rotated, half = cos.shape[-1], cos.shape[-1] // 2
        first, second, still = gradient[..., :half], gradient[..., half:rotated], gradient[..., rotated:]
        turned = gradient[..., :rotated] * cos + torch.cat([second * sin[..., half:], -first * sin[..., :half]], -1)
        return torch.cat([turned, still], -1).to(ctx.dtype), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], heads: Tensor, *others: Any) -> tuple[Tensor, int]:
        candidates, *tokens = in_dims
        assert candidates is not None and all(dim is None for dim in tokens), "tokens are the same for all candidates"
        return _Rotated.apply(heads.movedim(candidates, 0), *others), 0


class _WeightedStates(torch.autograd.Function):
    """(n, queries, d): states (n, t, d) weighted by (n, queries, t) float32, without a gradient of the states.

    An autograd function because `vmap` would copy the states for each candidate; here the queries of all candidates
    are one batch.
    """

    @staticmethod
    def forward(shares: Tensor, states: Tensor) -> Tensor:
        if states.dtype == torch.float32:
            return torch.bmm(shares, states)
        # A narrow dtype would round the shares, so each is the sum of two of its numbers, multiplied in one product.
        high = shares.to(states.dtype)
        both = torch.cat([high, (shares - high.float()).to(states.dtype)], 1)
        return torch.bmm(both, states).unflatten(1, (2, -1)).sum(1)  # in float32, rounded once

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (states,) = ctx.saved_tensors
        return torch.bmm(gradient.to(states.dtype), states.transpose(1, 2)).float(), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], shares: Tensor, states: Tensor) -> tuple[Tensor, int]:
        assert in_dims[0] is not None and in_dims[1] is None, "states are the same for all candidates"
        shares = shares.movedim(in_dims[0], 1)
        return _WeightedStates.apply(shares.flatten(1, 2), states).unflatten(1, shares.shape[1:3]), 1


def _sum(coefficients: Tensor, summands: Tensor) -> Tensor:
    """(sources,) float32 by (sources, tokens, width) to (tokens, width) float32.

    A narrow dtype would round the coefficients, so each is the sum of two of its numbers, multiplied in one product.
    """
    high = coefficients.to(summands.dtype)
    if summands.dtype == torch.float32:
        return (high @ summands.flatten(1)).unflatten(0, summands.shape[1:])
    both = torch.stack([high, (coefficients - high.float()).to(summands.dtype)])
    return (both @ summands.flatten(1)).sum(0, dtype=torch.float32).unflatten(0, summands.shape[1:])


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
