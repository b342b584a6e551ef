"""positions.py: windows, rotary embeddings and lengths that a config gives, against transformers' models."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import LlamaConfig

from raymerge.architectures import ArchitectureError
from raymerge.families import ARCHITECTURES
from raymerge.positions import NO_ROTARY, ContextLimit, attention_windows, context_limit, fixed_limit, rotary_types

torch.set_num_threads(1)


_FACTORS = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_windows_are_those_of_transformers(family, window):
    """Read off the model: with window w, the gradient of position t reaches back to t - w + 1 in one layer. A config
    may have a window that the family's masks do not."""
    length = 64
    config = tiny.config_of(family)
    if window is not None:
        config.sliding_window = window
        if not getattr(config, "layer_types", None) and ARCHITECTURES[config.model_type].windows != "none":
            # a list that the family does not read
            config.layer_types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    for number, window in enumerate(attention_windows(config)):
        single = copy.deepcopy(config)
        single.num_hidden_layers = 1
        if getattr(single, "layer_types", None):
            single.layer_types = [config.layer_types[number]]
        model = tiny.random_model(single)
        embedded = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, -1, :9].sum().backward()
        reached = int((embedded.grad[0].abs().sum(-1) > 0).sum())
        assert reached == min(length, window or length)


def test_windows_by_layer():
    llama = tiny.config_of("llama")
    assert attention_windows(llama) == [None] * 5
    llama.layer_types = None  # as some configs have it
    assert attention_windows(llama) == [None] * 5
    assert attention_windows(tiny.config_of("qwen2")) == [None] * 5
    assert attention_windows(tiny.config_of("mistral")) == [None] * 5
    assert attention_windows(tiny.config_of("mistral", sliding_window=7)) == [7] * 5
    assert attention_windows(tiny.config_of("mistral", sliding_window=1)) == [1] * 5
    assert attention_windows(tiny.config_of("qwen2_windows")) == [None, None, 40, 40, 40]
    # Qwen2's configs carry a window that `use_sliding_window: false` turns off.
    off = tiny.config_of("qwen2", use_sliding_window=False, sliding_window=7, max_window_layers=2)
    assert attention_windows(off) == [None] * 5


def test_a_sliding_layer_without_a_window_is_refused():
    """transformers loads such a model, and cannot run it."""
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 2
    config = tiny.config_of("qwen2", use_sliding_window=False, sliding_window=40, layer_types=kinds)
    with pytest.raises(ValueError, match="sliding_window"):
        tiny.random_model(config)(torch.arange(3)[None], use_cache=False)
    with pytest.raises(
        ArchitectureError, match="sliding_attention for layer 3, but the config gives no sliding_window"
    ):
        attention_windows(config)


def test_a_window_that_is_turned_off_is_not_called_too_small():
    """Of one that is off Qwen2-MoE's code makes 0: another number in the file would change nothing."""
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 2
    config = tiny.config_of("qwen2_moe", use_sliding_window=False, sliding_window=40, layer_types=kinds)
    with pytest.raises(ArchitectureError, match="for layer 3, .* use_sliding_window is false"):
        attention_windows(config)


@pytest.mark.parametrize("window", [None, 8])
def test_a_sliding_layer_of_a_family_without_windows_is_refused(window):
    """transformers' masks of it see everything, and its cache is that of a sliding layer: with a window generation
    forgets, without one it fails, and only the proof said so, after all the work."""
    config = tiny.config_of("llama", layer_types=["full_attention"] * 4 + ["sliding_attention"])
    config.sliding_window = window
    with pytest.raises(ArchitectureError, match="sliding_attention for layer 4, but layers of llama have no attention"):
        attention_windows(config)
    model, ids = tiny.random_model(config).eval(), torch.arange(1, 41)[None]
    if window is None:
        with pytest.raises((AttributeError, TypeError)):
            model.generate(ids, max_new_tokens=2, do_sample=False)
        return
    model.generation_config.eos_token_id = None
    told = model.generate(ids, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.inference_mode():
        whole = model(told.sequences[:, :-1], use_cache=False).logits[0, -2:]
    assert torch.allclose(told.logits[0][0], whole[0], atol=1e-4)
    assert not torch.allclose(told.logits[1][0], whole[1], atol=1e-4)


@pytest.mark.parametrize("window", [0, -1])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_window_of_no_position_is_refused(family, window):
    with pytest.raises(ArchitectureError, match=f"sliding_window is {window}, but a window holds at least"):
        attention_windows(tiny.config_of(family, sliding_window=window))
    unread = tiny.config_of("llama")
    unread.sliding_window = window
    assert attention_windows(unread) == [None] * 5


@pytest.mark.parametrize(
    ("kind", "said"), [("linear_attention", ": those are .*"), ("conv", ": those are .*"), ("chunked_attention", "")]
)
def test_unknown_layer_types_are_refused(kind, said):
    config = SimpleNamespace(layer_types=["full_attention", kind], num_hidden_layers=2)
    with pytest.raises(
        ArchitectureError, match=rf"^layer types \['{kind}'\] are not supported{said}; supported are full_attention"
    ):
        attention_windows(config)


def test_prompts_are_as_long_as_positions_and_rotary_frequencies_allow():
    def limits(family, **options):
        config = tiny.config_of(family, **options)
        return str(context_limit(config)), str(fixed_limit(config))

    assert limits("llama") == ("2048 (max_position_embeddings)", "None")
    # A query's scale depends on its own position alone, as yarn's frequencies on none.
    assert limits("ministral3") == ("2048 (max_position_embeddings)", "None")
    dynamic = "512 (max_position_embeddings; longer prompts may have other rotary frequencies, dynamic)"
    assert limits("llama_dynamic") == (dynamic, dynamic)
    longrope = "512 (original_max_position_embeddings; longer prompts may have other rotary frequencies, longrope)"
    assert limits("phi3_longrope") == (longrope, longrope)
    assert limits("phi3_longrope", max_position_embeddings=512) == (longrope, longrope)
    assert limits("phi3_longrope", max_position_embeddings=511) == ("511 (max_position_embeddings)", longrope)
    for name in tiny.BOUNDED:
        config = tiny.config_of(**tiny.bounded(name, 40))
        assert context_limit(config).tokens == fixed_limit(config).tokens == 40
    both = {"full_attention": {"rope_type": "longrope", **_FACTORS, "original_max_position_embeddings": 30}}
    config = tiny.config_of(
        "gemma3", rope_parameters=both | {"sliding_attention": {"rope_type": "dynamic", "factor": 2.0}}
    )
    assert fixed_limit(config) == ContextLimit(30, "original_max_position_embeddings", "longrope")
    config.max_position_embeddings = 20
    assert fixed_limit(config) == ContextLimit(20, "max_position_embeddings", "dynamic")


def test_rotary_types_by_layer():
    assert rotary_types(tiny.config_of("gemma2")) == [None] * 5
    full, sliding = "full_attention", "sliding_attention"
    assert rotary_types(tiny.config_of("gemma3")) == [sliding, full, sliding, sliding, sliding]
    assert rotary_types(tiny.config_of("olmo3")) == [sliding, full, sliding, sliding, sliding]
    config = tiny.config_of("smollm3")
    assert rotary_types(config) == [NO_ROTARY, None, NO_ROTARY, NO_ROTARY, NO_ROTARY]
    assert rotary_types(tiny.config_of("granite4")) == [None] * 5
    assert rotary_types(tiny.config_of("granite4_nope")) == [NO_ROTARY] * 5
    assert rotary_types(tiny.config_of("exaone4")) == [None, NO_ROTARY, None, None, None]
    assert rotary_types(tiny.config_of("exaone4_full")) == [None] * 5
    # A config with a window has none in layers of full attention, also if no layer slides.
    assert rotary_types(tiny.config_of("exaone4", layer_types=5 * ["full_attention"])) == [NO_ROTARY] * 5
    assert rotary_types(tiny.config_of("cohere2")) == [None, NO_ROTARY, None, None, None]
    # Unlike EXAONE 4's, Cohere's layers without a window have none either where the config gives no window.
    full = tiny.config_of("cohere2", layer_types=5 * ["full_attention"], sliding_window=None)
    assert rotary_types(full) == [NO_ROTARY] * 5
    config.no_rope_layers = [1, 0, 1, 0, 0, 1, 1]  # of a deeper model
    assert rotary_types(config) == [None, NO_ROTARY, None, NO_ROTARY, NO_ROTARY]
    config.no_rope_layers = [1, 0, 1]
    with pytest.raises(ArchitectureError, match="no_rope_layers has 3 entries for 5 layers: it needs one for each"):
        rotary_types(config)


def test_old_configs_name_their_rotary_type_too():
    """Written by transformers 4: rope_scaling instead of rope_parameters, "type" instead of "rope_type"."""
    for scaling in ({"rope_type": "dynamic", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}):
        config = LlamaConfig.from_dict({"model_type": "llama", "rope_scaling": scaling})
        assert fixed_limit(config) == ContextLimit(2048, "max_position_embeddings", "dynamic")


def test_a_sliding_layer_that_cannot_be_is_refused_also_where_it_is_the_first():
    no_window = "but the config gives no sliding_window"
    for family, message in (("qwen2", no_window), ("mistral", no_window), ("llama", "but layers of llama have")):
        config = tiny.config_of(family, layer_types=["sliding_attention"] + ["full_attention"] * 4)
        config.sliding_window = None
        with pytest.raises(ArchitectureError, match=f"sliding_attention for layer 0, {message}"):
            attention_windows(config)
