"""vocabulary.py: the final norm and sums over the unembedding against transformers and autograd in float64."""

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import raymerge.vocabulary
from raymerge.checkpoint import Checkpoint
from raymerge.forward import LayerRunner

torch.set_num_threads(1)


def test_the_final_norm_and_the_most_probable_tokens(tmp_path, monkeypatch):
    """Whatever the size of the pieces in which the unembedding is converted, and of the parts of the states."""
    folder = tiny.make_checkpoint(tmp_path / "m", "qwen2", dtype=torch.bfloat16)  # tied
    runner = LayerRunner(Checkpoint(str(folder)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 5
    with torch.no_grad():
        expected = model.model.norm(x.double())
        logits = expected @ model.lm_head.weight.T
    hidden = runner.vocabulary.normalise(x)
    # RMSNorm computes in float32 in transformers too: a few roundings of values below 10.
    assert (hidden - expected).abs().max() < 1e-5
    for chunk, states in [(7, 256), (500, 16), (10**6, 7)]:
        monkeypatch.setattr(raymerge.vocabulary, "VOCABULARY_ROWS", chunk)
        monkeypatch.setattr(raymerge.vocabulary, "_STATES_ON_CPU", states)
        logsumexp, top = runner.vocabulary.logsumexp_and_top(hidden)
        assert torch.equal(top, logits.argmax(-1))
        assert (logsumexp - torch.logsumexp(logits, -1)).abs().max() < 1e-6 * 32 * logits.abs().max()
    rows = runner.vocabulary.unembedding_rows([3, 700])
    assert torch.equal(rows, model.lm_head.weight[[3, 700]].float()) and rows.dtype == torch.float32


@pytest.mark.parametrize("family", ["nemotron", "starcoder2", "olmo"])
def test_a_final_norm_with_a_bias_or_without_tensors(tmp_path, family):
    folder = tiny.make_checkpoint(tmp_path / "m", family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 5 + 2
    with torch.no_grad():
        expected = model.model.norm(x.double())
    assert (LayerRunner(Checkpoint(str(folder))).vocabulary.normalise(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "granite", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_before_the_first_layer_are_transformers_in_every_dtype(tmp_path, family, dtype):
    """Gemma's root of the width is rounded to the dtype before it is multiplied with."""
    folder = tiny.make_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = np.arange(40)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[0][0]
    found = LayerRunner(Checkpoint(str(folder)), dtype=dtype).vocabulary.embedded(ids)
    assert found.dtype == expected.dtype == dtype and torch.equal(found, expected)


def test_an_unembedding_with_a_bias(tmp_path, monkeypatch):
    folder = tiny.make_checkpoint(tmp_path / "m", "phi", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 5
    with torch.no_grad():
        logits = model.lm_head(model.model.final_layernorm(x.double()))
    assert model.lm_head.bias.abs().min() > 0
    monkeypatch.setattr(raymerge.vocabulary, "VOCABULARY_ROWS", 100)
    vocabulary = LayerRunner(Checkpoint(str(folder))).vocabulary
    hidden = vocabulary.normalise(x)
    assert (
        hidden @ vocabulary.unembedding_rows([3, 700]).T - logits[:, [3, 700]]
    ).abs().max() < 1e-5 * logits.abs().max()
    logsumexp, top = vocabulary.logsumexp_and_top(hidden)
    assert torch.equal(top, logits.argmax(-1)) and (logsumexp - torch.logsumexp(logits, -1)).abs().max() < 1e-4
    logsumexp, mean = vocabulary.logsumexp_and_mean(hidden)
    expected = torch.softmax(logits, -1) @ model.lm_head.weight.detach()
    assert (logsumexp - torch.logsumexp(logits, -1)).abs().max() < 1e-4
    assert (mean[:, :32] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "cap"), [("llama", None), ("gemma2", 8.0)])
@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_the_mean_row_is_the_gradient_of_the_logsumexp(tmp_path, monkeypatch, family, cap, chunk):
    """Whatever the size of the pieces, also where logits are capped."""
    folder = tiny.make_checkpoint(tmp_path / "m", family)
    vocabulary = LayerRunner(Checkpoint(str(folder))).vocabulary
    assert vocabulary.logit_softcap == cap
    table = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).lm_head.weight.detach()
    hidden = 3 * torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(raymerge.vocabulary, "VOCABULARY_ROWS", chunk)
    logsumexp, mean = vocabulary.logsumexp_and_mean(hidden)

    states = hidden.double().requires_grad_()
    logits = states @ table.T
    expected = torch.logsumexp(logits if cap is None else cap * torch.tanh(logits / cap), -1)
    (gradient,) = torch.autograd.grad(expected.sum(), states)
    assert (logsumexp - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (mean - gradient).abs().max() < 1e-5 * gradient.abs().max()
