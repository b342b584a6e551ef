"""Dense models as GGUF files, as llama.cpp's convert_hf_to_gguf.py writes them."""

import gguf
import numpy as np
import torch

# llama.cpp's architectures by transformers' model type.
KINDS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


def llama_cpp_order(values, heads):
    """Rows of q and k as llama.cpp has them: the two halves of a rotary pair beside one another."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def write_gguf(path, model, quantised, *, tokens=None, merges=("a b",), further=None):
    """A model as a GGUF file, matrices in Q8_0 or float32; its exact values by name.

    tokens, merges: of a byte-level vocabulary, without the two special tokens that end it; by default one that reads
    nothing but a and b. further: called with the writer, adds what a file may hold besides.
    """
    config = model.config
    kind = KINDS[config.model_type]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    writer.add_key_length(width)
    writer.add_rope_dimension_count(width)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
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
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = next((count for matrix, count in heads.items() if matrix in name), None)
        stored = values if heads is None or kind != gguf.MODEL_ARCH.LLAMA else llama_cpp_order(values, heads)
        if "norm" in name and config.model_type.startswith("gemma"):
            stored = values + 1  # a gain as it multiplies
            values = stored - 1
        if values.ndim == 2 and quantised:
            block = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(stored, block)
            writer.add_tensor(stored_name, data, raw_dtype=block)
            values = gguf.quants.dequantize(gguf.quants.quantize(values, block), block)
        else:
            writer.add_tensor(stored_name, np.ascontiguousarray(stored))
        exact[name] = torch.from_numpy(np.array(values))
    if further is not None:
        further(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact
