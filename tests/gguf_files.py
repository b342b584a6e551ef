"""Llama models as GGUF files, as llama.cpp writes them."""

import gguf
import numpy as np
import torch

# What llama.cpp's convert_hf_to_gguf.py names a Llama's tensors.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name):
    if name in ENDS:
        return ENDS[name]
    number, relative = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{NAMES[relative.removesuffix('.weight')]}.weight"


def llama_cpp_order(values, heads):
    """Rows of q and k as llama.cpp has them: the two halves of a rotary pair beside one another."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def write_gguf(path, model, quantised, *, tokens=None, merges=("a b",)):
    """A Llama as a GGUF file, matrices in Q8_0 or float32; its exact values by name.

    tokens, merges: of a byte-level vocabulary, without the two special tokens that end it; by default one that reads
    nothing but a and b.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokens is None:
        tokens = ["a", "b", *(chr(0x100 + i) for i in range(2, config.vocab_size - 3)), "ab"]
    tokens = [*tokens, "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(config.vocab_size - 2)
    writer.add_eos_token_id(config.vocab_size - 1)
    exact = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = next((count for matrix, count in heads.items() if matrix in name), None)
        stored = values if heads is None else llama_cpp_order(values, heads)
        if values.ndim == 2 and quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(stored, kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(stored))
        exact[name] = torch.from_numpy(np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact
