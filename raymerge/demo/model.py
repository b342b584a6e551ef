"""A Llama decoder whose layers are stacked tensors: the training twin of `transformers.LlamaForCausalLM`.

Stacking turns the optimiser's work on all layers into a few batched matrix products, and makes splitting a layer into
copies an index.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from raymerge.demo.tokenizer import MAX_LENGTH

LAYER_MATRICES = ("attention_in", "attention_out", "mlp_in", "mlp_out")
LAYER_NORMS = ("attention_norm", "mlp_norm")


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder; a head has hidden / heads = 24 dimensions."""

    vocabulary: int
    layers: int
    hidden: int = 96
    heads: int = 4
    key_heads: int = 2
    mlp: int = 192
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        return self.hidden // self.heads


class StackedLlama(nn.Module):
    """Llama (RoPE, grouped-query attention, SwiGLU, RMSNorm, untied head); axis 0 of a layer tensor is the layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        layers, hidden, mlp = shape.layers, shape.hidden, shape.mlp
        # Both residual branches of every layer add up; scaled down so that the sum starts with unit variance.
        branch = 1 / math.sqrt(2 * layers)

        def normal(*size: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size) * scale)

        rows = (shape.heads + 2 * shape.key_heads) * shape.head
        self.attention_in = normal(layers, rows, hidden, scale=hidden**-0.5)
        self.attention_out = normal(layers, hidden, hidden, scale=hidden**-0.5 * branch)
        self.mlp_in = normal(layers, 2 * mlp, hidden, scale=hidden**-0.5)
        self.mlp_out = normal(layers, hidden, mlp, scale=mlp**-0.5 * branch)
        self.attention_norm = nn.Parameter(torch.ones(layers, hidden))
        self.mlp_norm = nn.Parameter(torch.ones(layers, hidden))
        self.embedding = normal(shape.vocabulary, hidden, scale=0.3)
        self.final_norm = nn.Parameter(torch.ones(hidden))
        self.head = normal(shape.vocabulary, hidden, scale=hidden**-0.5 / 2)

    def matrices(self) -> list[nn.Parameter]:
        """The layers' projection matrices, (layers, out, in) each."""
        return [getattr(self, name) for name in LAYER_MATRICES]

    def vectors_and_tables(self) -> list[nn.Parameter]:
        """Everything else: norms, embedding and head."""
        return [self.attention_norm, self.mlp_norm, self.embedding, self.final_norm, self.head]

    def normalise(self, states: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(states, (self.shape.hidden,), weight, self.shape.epsilon)

    def hidden_states(self, tokens: Tensor, layers: list[int]) -> list[Tensor]:
        """States after each of the given layers, run in that order: (batch, length, hidden) each."""
        cos, sin = _rotations(tokens.shape[1], self.shape)
        stacks = [getattr(self, name).unbind(0) for name in LAYER_MATRICES + LAYER_NORMS]
        states, after = self.embedding[tokens], []
        for layer in layers:
            states = self._layer(states, [stack[layer] for stack in stacks], cos, sin)
            after.append(states)
        return after

    def logits(self, states: Tensor) -> Tensor:
        """(..., hidden) to (..., vocabulary)."""
        return F.linear(self.normalise(states, self.final_norm), self.head)

    def _layer(self, states: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
        attention_in, attention_out, mlp_in, mlp_out, attention_norm, mlp_norm = weights
        batch, length, _ = states.shape
        heads, key_heads = self.shape.heads, self.shape.key_heads
        projected = F.linear(self.normalise(states, attention_norm), attention_in)
        projected = projected.view(batch, length, heads + 2 * key_heads, self.shape.head).transpose(1, 2)
        rotated, values = projected.split([heads + key_heads, key_heads], 1)
        lower, upper = rotated.chunk(2, -1)
        rotated = rotated * cos + torch.cat([-upper, lower], -1) * sin
        queries, keys = rotated.split([heads, key_heads], 1)
        group = heads // key_heads
        mixed = F.scaled_dot_product_attention(
            queries, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1), is_causal=True
        )
        states = states + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), attention_out)
        gate, up = F.linear(self.normalise(states, mlp_norm), mlp_in).chunk(2, -1)
        return states + F.linear(F.silu(gate) * up, mlp_out)


def _rotations(length: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, (length, head dimensions) each."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head, 2) / shape.head)
    angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def split_layers(model: StackedLlama, order: tuple[int, ...], noise: float) -> StackedLlama:
    """A deeper model: new layer i is a copy of layer `order[i]` that adds its share of what the source added.

    A source with n copies has each of them add 1/n. `noise` is the standard deviation of the Gaussian noise on the
    copies' matrices, in units of each matrix's own: it lets the copies grow apart in later training.
    """
    source = list(order)
    share = torch.tensor([1 / order.count(layer) for layer in order])[:, None, None]
    deeper = StackedLlama(Shape(**{**asdict(model.shape), "layers": len(order)}))
    weights = dict(model.state_dict())
    for name in LAYER_MATRICES + LAYER_NORMS:
        weights[name] = weights[name][source]
    for name in ("attention_out", "mlp_out"):
        weights[name] = weights[name] * share
    for name in LAYER_MATRICES:
        deviation = weights[name].std(dim=(1, 2), keepdim=True)
        weights[name] = weights[name] + noise * deviation * torch.randn_like(weights[name])
    deeper.load_state_dict(weights)
    return deeper


def to_transformers(model: StackedLlama, *, bos: int, eos: int, pad: int) -> LlamaForCausalLM:
    """The same function as a float32 `LlamaForCausalLM`."""
    shape = model.shape
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    weights = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.final_norm,
        "lm_head.weight": model.head,
    }
    key_rows = shape.key_heads * shape.head
    for layer in range(shape.layers):
        query, key, value = model.attention_in[layer].split([shape.hidden, key_rows, key_rows])
        gate, up = model.mlp_in[layer].chunk(2)
        parts = {
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": model.attention_out[layer],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": model.mlp_out[layer],
            "input_layernorm": model.attention_norm[layer],
            "post_attention_layernorm": model.mlp_norm[layer],
        }
        weights |= {f"model.layers.{layer}.{part}.weight": weight for part, weight in parts.items()}
    exported = LlamaForCausalLM(config).eval()
    exported.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()}, strict=True)
    return exported
