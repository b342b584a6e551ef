"""What lies before and after the decoder layers: token ids to states, and states to logits.

Logits of a whole vocabulary are larger than everything else at a position, so they are never held: what is wanted of
them is summed over the unembedding a part at a time.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from raymerge.checkpoint import Checkpoint
from raymerge.device import is_accelerator
from raymerge.memory import VOCABULARY_QUESTIONS, VOCABULARY_ROWS

_STATES_ON_CPU = 256  # whose logits over a part of the unembedding are held at once: 17 MB, which caches hold


class Vocabulary:
    """A checkpoint's embedding, final norm and unembedding.

    norm: transformers' module of the final norm, whose weights are not used. dtype: of the embedded states; everything
    after the layers is float32. On an accelerator both matrices stay in its memory, once where they are tied.
    """

    def __init__(self, checkpoint: Checkpoint, norm: nn.Module, *, device: torch.device, dtype: torch.dtype):
        self._checkpoint, self._norm, self._device, self._dtype = checkpoint, norm, device, dtype
        self._architecture = arch = checkpoint.architecture
        self._accelerated = is_accelerator(device)
        self._tables: dict[str, Tensor] = {}
        config = checkpoint.config
        self._embedding_scale: float | Tensor | None = None
        if arch.scaled_embedding:  # transformers rounds the root to the compute dtype first
            self._embedding_scale = torch.tensor(config.hidden_size**0.5).to(dtype)
        elif arch.embedding_multiplier:
            self._embedding_scale = getattr(config, arch.embedding_multiplier)
        #: What a family caps its logits at; None where it does not.
        self.logit_softcap: float | None = getattr(config, arch.logit_softcap) if arch.logit_softcap else None
        self._logit_divisor: float = getattr(config, arch.logit_divisor) if arch.logit_divisor else 1.0
        self._logit_divisor /= getattr(config, arch.logit_multiplier) if arch.logit_multiplier else 1.0

    def embedded(self, ids: np.ndarray) -> Tensor:
        """The states (n, d) that enter layer 0, of token ids (n,)."""
        table = self._table(self._architecture.embedding)
        rows = table[torch.from_numpy(np.ascontiguousarray(ids)).to(table.device)].to(self._device, self._dtype)
        return rows if self._embedding_scale is None else rows * self._embedding_scale

    def normalise(self, x: Tensor) -> Tensor:
        """The final norm, in float32: (…, d) to (…, d) float32, divided by what the family divides its logits by, and
        (…, d + 1) with a 1 for the unembedding's bias, if it has one. Logits are then products with the unembedding's
        rows, which `unembedding_rows` gives, in every family."""
        normalised = functional_call(self._norm, self._final_tensors, (x.float(),))
        normalised = normalised if self._logit_divisor == 1.0 else normalised / self._logit_divisor
        return normalised if self._bias is None else F.pad(normalised, (0, 1), value=1.0)

    @cached_property
    @torch.inference_mode(False)
    def _final_tensors(self) -> dict[str, Tensor]:
        names = (name for name in self._architecture.ends[:2] if name in self._checkpoint)
        return {name.rpartition(".")[2]: self._checkpoint[name].to(self._device, torch.float32) for name in names}

    @cached_property
    @torch.inference_mode(False)
    def _bias(self) -> Tensor | None:
        """The unembedding's bias (vocabulary, 1) float32."""
        name = self._architecture.ends[2]
        return self._checkpoint[name].to(self._device, torch.float32)[:, None] if name in self._checkpoint else None

    def _rows(self, which: slice | Tensor) -> Tensor:
        """Rows of the unembedding float32, each with its bias behind it if there are any."""
        rows = self._table(self._architecture.unembedding)[which]
        if self._bias is None:
            return rows.to(self._device, torch.float32)
        # Converted into their place: joining them would hold them twice.
        found = torch.empty(len(rows), rows.shape[1] + 1, dtype=torch.float32, device=self._device)
        found[:, :-1], found[:, -1:] = rows, self._bias[which]
        return found

    def capped(self, logits: Tensor) -> Tensor:
        """Logits as the model gives them, of products of states and the unembedding's rows."""
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembedding_rows(self, ids: Tensor | list[int]) -> Tensor:
        """Rows float32 of the unembedding matrix, (n, d) or, where it has a bias, (n, d + 1)."""
        return self._rows(torch.as_tensor(ids).to(self._table(self._architecture.unembedding).device))

    def logsumexp_and_top(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """logsumexp (n,) float32 and the most probable token (n,) over the whole vocabulary.

        In float32, converting a part of the unembedding at a time: bfloat16 logits tie (3 of 48 in a prototype).
        """
        table = self._table(self._architecture.unembedding)
        at_once = VOCABULARY_QUESTIONS if self._accelerated else _STATES_ON_CPU
        # Filled in place: small results that are made between large blocks keep a heap from using those again.
        total, best = (normalised.new_full((len(normalised),), -torch.inf) for _ in range(2))
        top = torch.zeros(len(normalised), dtype=torch.int64, device=normalised.device)
        for start in range(0, table.shape[0], VOCABULARY_ROWS):
            rows = self._rows(slice(start, start + VOCABULARY_ROWS))
            for first in range(0, len(normalised), at_once):
                part = slice(first, first + at_once)
                logits = self.capped(normalised[part] @ rows.T)
                value, token = logits.max(-1)
                total[part] = torch.logaddexp(total[part], torch.logsumexp(logits, -1))
                top[part] = torch.where(value > best[part], token + start, top[part])
                best[part] = torch.maximum(best[part], value)
        return total, top

    def logsumexp_and_mean(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """logsumexp (n,) float32 over the whole vocabulary, and the unembedding's mean row under its softmax, float32
        and as wide as `normalised`: the gradient of the first by it. Where logits are capped, each row counts by the
        cap's slope.

        One pass over the unembedding; what is summed so far is scaled by the largest logit so far.
        """
        table = self._table(self._architecture.unembedding)
        top = normalised.new_full((len(normalised), 1), -torch.inf)
        total, weighted = torch.zeros_like(top), torch.zeros_like(normalised)
        for start in range(0, table.shape[0], VOCABULARY_ROWS):
            rows = self._rows(slice(start, start + VOCABULARY_ROWS))
            logits = self.capped(normalised @ rows.T)
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            slope = None if self.logit_softcap is None else 1.0 - (logits / self.logit_softcap).square()
            scale, exponentials = torch.exp(top - higher), logits.sub_(higher).exp_()
            total = total * scale + exponentials.sum(-1, keepdim=True)
            exponentials = exponentials if slope is None else exponentials.mul_(slope)
            weighted = (weighted * scale).addmm_(exponentials, rows)
            top = higher
        return (total.log() + top)[:, 0], weighted / total

    def _table(self, name: str) -> Tensor:
        """A matrix (vocabulary, d) in the stored dtype: on an accelerator a copy that stays, else mapped from disk."""
        if not self._accelerated:
            return self._checkpoint[name]
        if name == self._architecture.unembedding and name not in set(iter(self._checkpoint)):
            name = self._architecture.embedding  # tied, and held once
        if name not in self._tables:
            with torch.inference_mode(False):  # gradients are taken through it as well
                self._tables[name] = self._checkpoint[name].to(self._device)
        return self._tables[name]
