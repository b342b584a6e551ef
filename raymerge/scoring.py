"""The frozen trunk: score thousands of merges for the price of one.

All candidates of a search share the layers before the first merged one. Their states are computed once, kept on disk
by content, and for each candidate only what follows is run. After a tail merge that is one layer, of which only the
last position of each question matters: keys and values of all cached tokens, query, attention, output and MLP at the
last position, the final norm and the unembedding of the four answer letters. The result equals a full forward pass of
the merged model to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from raymerge.alignment import REORDERED, layer_tensors
from raymerge.architectures import module_layer, source_tensor
from raymerge.forward import LayerRunner, visible
from raymerge.fusion import check_mergeable, fused_layer
from raymerge.plan import MergePlan
from raymerge.prompts import Prompts
from raymerge.trunk import TrunkCache

_MIXED_TOGETHER = 4  # candidates whose weights are mixed in one pass and held at once (60 MB each at 0.5B)
_BUCKET_TOKENS = 16384  # padded tokens of the questions whose own attention is computed in one call


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


class SourceLayers:
    """The weights of the layers from `first` on, stacked so that mixing them is a single matrix product.

    stack: (sources, parameters of one layer) float32, matrices and then biases; made when first asked for. Mixing
    several candidates at once reads it once: a candidate's mix is otherwise bound by memory (9 merges of a 0.5B model
    read 600 MB).
    norms: as plans have it; with "fold" the gains are in the stacked matrices. alignment: as plans have it, but not
    "rows"; units are laid on those of layer `first`. Which layer of the group they are laid on does not matter: the mix
    is then the same units in another order.
    """

    def __init__(
        self,
        runner: LayerRunner,
        first: int,
        *,
        norms: str = "keep",
        alignment: str = "none",
    ):
        checkpoint, arch = runner.checkpoint, runner.checkpoint.architecture
        self.norms = norms
        self.alignment = alignment
        self.count = checkpoint.n_layers - first
        self._runner = runner
        self._first = first
        present = set(checkpoint.layer_tensors(first))
        matrices = [f"{matrix}.weight" for matrix in arch.matrices]
        self._biases = [f"{matrix}.bias" for matrix in arch.matrices if f"{matrix}.bias" in present]
        self._names = matrices + self._biases
        self._matrix_of = [arch.matrices.index(name.rpartition(".")[0]) for name in self._names]
        self._shapes = [checkpoint[arch.layer_name(first, name)].shape for name in self._names]
        self._sizes = [shape.numel() for shape in self._shapes]

    # Made in normal mode, wherever they are first asked for: gradients are taken through them as well.

    @cached_property
    @torch.inference_mode(False)
    def stack(self) -> Tensor:
        checkpoint, arch = self._runner.checkpoint, self._runner.checkpoint.architecture
        stack = torch.empty(self.count, sum(self._sizes), dtype=torch.float32, device=self._runner.device)
        permutations = {}
        if self.alignment in REORDERED:
            layers = range(self._first, checkpoint.n_layers)
            permutations = self._runner.aligner.towards(self._first, layers, self.alignment)
        for j, row in enumerate(stack):
            layer = self._first + j
            tensors = layer_tensors(checkpoint, arch, layer)
            for part, name in zip(row.split(self._sizes), self._names, strict=True):
                order = permutations.get(layer)
                part.copy_(source_tensor(arch, tensors, name, norms=self.norms, permutations=order).reshape(-1))
        return stack

    @cached_property
    @torch.inference_mode(False)
    def _others(self) -> list[dict[str, Tensor]]:
        """What is not averaged of each source layer; folded norms are ones."""
        checkpoint, arch = self._runner.checkpoint, self._runner.checkpoint.architecture
        others = []
        for layer in range(self._first, checkpoint.n_layers):
            tensors = layer_tensors(checkpoint, arch, layer)
            others.append(
                {
                    name: source_tensor(arch, tensors, name, norms=self.norms).to(self._runner.device)
                    for name in tensors
                    if name not in self._names
                }
            )
        return others

    def mix(self, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """(candidates, sources) coefficients to (candidates, parameters) float32, rounded to `dtype`.

        Coefficients may also be (candidates, matrices, sources), one row for each of the family's matrices.
        """
        coefficients = coefficients.to(self.stack.device, torch.float32)
        if coefficients.ndim == 2:
            mixed = coefficients @ self.stack
        else:
            parts = zip(self._matrix_of, self.stack.split(self._sizes, dim=1), strict=True)
            mixed = torch.cat([coefficients[:, matrix] @ part for matrix, part in parts], dim=1)
        return mixed if dtype == torch.float32 else mixed.to(dtype).float()

    def averaged(self, merge_biases: bool) -> list[str]:
        """Names of the tensors that are averaged, as `weights` gives them."""
        return self._names if merge_biases else self._names[: len(self._names) - len(self._biases)]

    def pull_back(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients of a loss by averaged tensors to those by coefficients: (matrices, sources) float64, <W_j, dW>.

        Their sum over the matrices is the gradient by coefficients that all matrices share.
        """
        count = len(self._runner.checkpoint.architecture.matrices)
        found = torch.zeros(count, self.count, dtype=torch.float64)
        parts = zip(self._names, self._matrix_of, self.stack.split(self._sizes, dim=1), strict=True)
        for name, matrix, part in parts:
            if (gradient := gradients.get(name)) is not None:
                found[matrix] += (part @ gradient.reshape(-1)).double().cpu()
        return found

    def weights(self, mixed: Tensor, rest: int, merge_biases: bool) -> dict[str, Tensor]:
        """One candidate's layer: its mixed matrices, with norms and, unless they are merged, biases of `rest`."""
        parts = zip(self._names, mixed.split(self._sizes), self._shapes, strict=True)
        weights = {name: part.view(shape) for name, part, shape in parts}
        if not merge_biases:
            own = self.stack[rest].split(self._sizes)[-len(self._biases) :] if self._biases else ()
            weights.update(zip(self._biases, own, strict=True))
        return weights | self._others[rest]


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
    """

    def __init__(
        self,
        trunk: TrunkCache,
        prompts: Prompts,
        *,
        fused_dtype: torch.dtype | None = None,
        sources: SourceLayers | None = None,
    ):
        self.runner = trunk.runner
        self.first = trunk.first
        self.prompts = prompts
        self.fused_dtype = fused_dtype or self.runner.checkpoint.dtype
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
        self._arrange(trunk)
        self._letters = self.runner.unembedding_rows(list(prompts.letters))

    # -- setting up ---------------------------------------------------------------------------------------------

    def _arrange(self, trunk: TrunkCache) -> None:
        prefixes, lengths, rows, positions, owners, owned = [], [], [], [], [], []
        for shard in self.prompts.shards:
            for group, (prefix, own) in zip(shard.groups, trunk.load(shard), strict=True):
                sizes = [len(ids) for ids in group.sequences]
                owned.extend(own.split(sizes))
                lengths += sizes
                rows += group.rows
                positions += [len(group.prefix)] * len(sizes)
                owners += [len(prefixes)] * len(sizes)
                prefixes.append(prefix)
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        device, dtype = self.runner.device, torch.float32
        self.rows = torch.tensor([rows[i] for i in order])
        self._lengths = torch.tensor([lengths[i] for i in order], device=device)
        owner = torch.tensor([owners[i] for i in order])
        offset = torch.tensor([positions[i] for i in order])

        self._prefixes, start = [], 0
        for number, prefix in enumerate(prefixes):
            stop = start + len(prefix)
            questions = torch.nonzero(owner == number).flatten().to(device)
            self._prefixes.append(_Prefix(start, stop, questions))
            start = stop
        self._prefix_order = torch.argsort(torch.cat([prefix.questions for prefix in self._prefixes]))

        self._buckets, blocks, token_positions = _buckets_of([lengths[i] for i in order]), [], []
        for bucket in self._buckets:
            span = slice(bucket.first, bucket.first + bucket.count)
            block = torch.zeros(bucket.count, bucket.width, owned[0].shape[-1], dtype=dtype, device=device)
            for row, i in enumerate(order[span]):
                block[row, : lengths[i]] = owned[i].to(device, dtype)
            blocks.append(block.flatten(0, 1))
            token_positions.append((offset[span, None] + torch.arange(bucket.width)[None]).flatten())
        own = torch.cat(blocks)
        starts = torch.cat([torch.arange(b.count, device=device) * b.width + b.start for b in self._buckets])
        self._last = own[starts + self._lengths - 1]
        prefix_states = torch.cat([prefix.to(device, dtype) for prefix in prefixes])
        self._tokens = self._entering(torch.cat([prefix_states, own]))
        self._last_normalised = self._entering(self._last)
        self._n_prefix = len(prefix_states)
        self._starts = starts + self._n_prefix
        all_positions = torch.cat([torch.arange(len(prefix)) for prefix in prefixes] + token_positions)
        self._last_positions = (offset.to(device) + self._lengths) - 1
        self._rotary = self._cos_sin(all_positions)
        self._last_rotary = self._cos_sin(self._last_positions)

    def _entering(self, x: Tensor) -> Tensor:
        return _rms(x, self._epsilon) if self._normalises else x

    def _cos_sin(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        # (N, 1, rotated dimensions) each, by rotary type; the middle axis broadcasts over heads.
        found = {}
        for layer in range(self.first, self.runner.checkpoint.n_layers):
            if (kind := self.runner.checkpoint.rotary_types[layer]) not in found:
                cos, sin = self.runner.rotary(positions, layer)
                found[kind] = cos[0].float()[:, None], sin[0].float()[:, None]
        return found

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
        for name in ("_lengths", "_last", "_last_normalised", "_last_positions"):
            setattr(part, name, getattr(self, name)[at])
        part._last_rotary = {kind: (cos[at], sin[at]) for kind, (cos, sin) in self._last_rotary.items()}

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
        part._prefix_order = torch.argsort(torch.cat([prefix.questions for prefix in part._prefixes]))
        part._n_prefix = start
        part._buckets, starts = _buckets_of(part._lengths.tolist()), []
        for bucket in part._buckets:
            members = slice(bucket.first, bucket.first + bucket.count)
            # Beyond a question's end its last token is repeated: attention does not see it.
            offset = torch.arange(bucket.width, device=device)[None].minimum(part._lengths[members, None] - 1)
            indices.append((self._starts[at][members, None] + offset).flatten())
            starts.append(torch.arange(bucket.count, device=device) * bucket.width + bucket.start + start)
        part._starts = torch.cat(starts)
        index = torch.cat(indices)
        part._tokens = self._tokens[index]
        part._rotary = {kind: (cos[index], sin[index]) for kind, (cos, sin) in self._rotary.items()}
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
        found = (self._answers(hidden), *self.runner.vocabulary(hidden))
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
        for start in range(0, len(plans), _MIXED_TOGETHER):
            together = plans[start : start + _MIXED_TOGETHER]
            stacked = [self.coefficients(plan) for plan in together if self.is_stacked(plan)]
            # Those that have coefficients for each matrix are mixed apart: all other products stay what they are.
            mixed = {}
            for axes in {values.ndim for values in stacked}:
                alike = torch.stack([values for values in stacked if values.ndim == axes])
                mixed[axes] = iter(self.sources.mix(alike, self.fused_dtype))
            for plan in together:
                rest = plan.kept[self.first].index - self.first
                if self.is_stacked(plan):
                    own = next(mixed[self.coefficients(plan).ndim])
                    weights = self.sources.weights(own, rest, plan.biases == "merge")
                else:
                    weights = self._fused(plan)
                yield self.hidden(self.runner.deployed(weights), rest)

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
        checkpoint = self.runner.checkpoint
        layer = fused_layer(
            checkpoint,
            checkpoint.architecture,
            plan,
            self.first,
            aligner=self.runner.aligner,
            dtype=self.fused_dtype,
        )
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
        return values[torch.argsort(self.rows).to(values.device)]

    def hidden(self, weights: dict[str, Tensor], rest: int) -> Tensor:
        """States (n, d) float32 after the final norm at each question's last position, in bucket order.

        weights: the merged layer's tensors by relative name, float32; rest: the source layer whose window it has.
        """
        checkpoint = self.runner.checkpoint
        window, rotary = (each[self.first + rest] for each in (checkpoint.windows, checkpoint.rotary_types))
        query = self._heads(self._last_normalised, "q", weights, self._last_rotary[rotary])
        keys = self._heads(self._tokens, "k", weights, self._rotary[rotary])
        values = self._project(self._tokens, "v", weights).unflatten(-1, (self._kv_heads, self._head_dim))
        query = query.unflatten(1, (self._kv_heads, self._groups))
        attended = self._attend(query, keys, values, window).flatten(1)
        out = F.linear(attended, weights["self_attn.o_proj.weight"], weights.get("self_attn.o_proj.bias"))
        x = self._last + self._leaving("self_attn", out, weights)
        return self.runner.normalise(x + self._leaving("mlp", self._mlp(x, weights), weights))

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
        return self._module("mlp", inner, module_layer(arch, weights))

    def _project(self, states: Tensor, which: str, weights: Mapping[str, Tensor]) -> Tensor:
        matrix, rows = self._architecture.rows_of(which)
        weight, bias = weights[f"{matrix}.weight"][rows], weights.get(f"{matrix}.bias")
        # The gain moves from every token's state to the matrix's columns.
        if gain := self._architecture.gain_of(matrix):
            weight = weight * (weights[gain] + self._architecture.gain_offset)
        return F.linear(states, weight, None if bias is None else bias[rows])

    def _heads(
        self, states: Tensor, which: str, weights: Mapping[str, Tensor], rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Queries or keys (N, heads, head_dim), normalised where the family does so, and rotated."""
        norm, heads = f"self_attn.{which}_norm", self._project(states, which, weights)
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

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Attention of each last position, (n, kv, group, head_dim), over its prefix and its own tokens.

        The two parts are computed apart - the prefix once a subject, the questions bucket by bucket across all
        subjects - and joined by their log-sum-exps.
        """
        prefix_parts = []
        for prefix in self._prefixes:
            q = query[prefix.questions]
            k, v = (t[prefix.start : prefix.stop].permute(1, 2, 0) for t in (keys, values))  # (kv, head_dim, P)
            scores = self._scores(torch.einsum("nkgd,kdp->nkgp", q, k))
            if window is not None:
                seen = visible(
                    self._last_positions[prefix.questions],
                    torch.arange(prefix.stop - prefix.start, device=scores.device),
                    window,
                )
                scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
            prefix_parts.append(_partial_softmax(scores, lambda p, v=v: torch.einsum("nkgp,kdp->nkgd", p, v)))
        own_parts = []
        for bucket in self._buckets:
            rows = slice(bucket.first, bucket.first + bucket.count)
            start = self._n_prefix + bucket.start
            span = slice(start, start + bucket.count * bucket.width)
            k, v = (t[span].unflatten(0, (bucket.count, bucket.width)) for t in (keys, values))
            scores = self._scores(torch.einsum("nkgd,ntkd->nkgt", query[rows], k))
            behind = self._lengths[rows, None] - 1 - torch.arange(bucket.width, device=scores.device)
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
            own_parts.append(_partial_softmax(scores, lambda p, v=v: torch.einsum("nkgt,ntkd->nkgd", p, v)))
        prefix_log, prefix_out = (torch.cat(part)[self._prefix_order] for part in zip(*prefix_parts, strict=True))
        own_log, own_out = (torch.cat(part) for part in zip(*own_parts, strict=True))
        share = torch.sigmoid(prefix_log - own_log)[..., None]  # exp(a) / (exp(a) + exp(b))
        return share * prefix_out + (1.0 - share) * own_out


def _buckets_of(lengths: Sequence[int]) -> list[_Bucket]:
    """Questions, sorted by length, cut into buckets that are each padded to their longest."""
    buckets, start, begin = [], 0, 0
    while begin < len(lengths):
        # Extend while the whole bucket, padded to its longest question, stays in the limit and little is wasted.
        end = begin + 1
        while end < len(lengths):
            width = lengths[end]
            if width * (end + 1 - begin) > _BUCKET_TOKENS or width > 1.15 * lengths[begin] + 8:
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
