"""gradient.py: losses and gradients against backpropagation through whole transformers models, and descents.

The reference builds the whole fused model in float64 with weights that are functions of the coefficients, and runs
every prompt and window alone. Nothing of raymerge's own layers, stacks or losses is in it.
"""

import copy
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import raymerge.forward
import raymerge.tail_loss
from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.evaluation import Answers, answer_shard, text_nll
from raymerge.forward import LayerRunner
from raymerge.gradient import Settings, descend, loss_weights
from raymerge.objectives import LOSSES
from raymerge.parametrisation import PARAMETRISATIONS, Parametrisation
from raymerge.plan import base_plan, before_last_plan, drop_plan, tail_plan
from raymerge.prompts import Group, Shard, encode_questions
from raymerge.scoring import TailScorer
from raymerge.sources import SourceLayers
from raymerge.tail_loss import GradientError, LossWeights, TailLoss, TextWindows
from raymerge.trunk import TrunkCache

torch.set_num_threads(1)

# As in test_scoring: float32 against float64 through layers whose weights are large on purpose; a gradient is a sum
# over thousands of weights, with cancellation.
LIMIT, GRADIENT_LIMIT = 2e-5, 2e-4
N = tiny.N_LAYERS
FIRST = N - 3
# Of the families whose projections are neither fused nor an expert's.
MATRICES = tuple(("mlp." if p in tiny.PROJECTIONS[4:] else "self_attn.") + p for p in tiny.PROJECTIONS)
GAINS = dict.fromkeys(MATRICES[:3], "input_layernorm") | dict.fromkeys(MATRICES[4:6], "post_attention_layernorm")
ANSWERS, TEXT = LossWeights(), LossWeights(answer_nll=0.0, text_nll=1.0)
EVERYTHING = LossWeights(answer_nll=0.5, answer_kl=1.0, text_nll=0.3, text_kl=2.0)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """case(family) -> a checkpoint, questions and text as tokens, and what raymerge makes of them, made once."""
    tokenizer, questions = tiny.demo_tokenizer(), tiny.make_questions({"cats": 3, "roads": 2, "boxes": 1}, shots=1)

    @cache
    def make(family):
        folder = tiny.make_checkpoint(tmp_path_factory.mktemp(family), family)
        runner, cache_folder = LayerRunner(Checkpoint(str(folder))), tmp_path_factory.mktemp("trunk")
        trunk = TrunkCache(runner, FIRST, cache_folder)
        rng = np.random.default_rng(0)
        windows = tuple(rng.integers(5, 800, n) for n in (50, 50, 23, 2))
        none = np.zeros(0, dtype=np.int64)
        shards = (
            Shard((Group("text", none, windows[:2], (0, 1)),)),
            Shard((Group("text", none, windows[2:], (2, 3)),)),
        )
        prompts = encode_questions(questions, tokenizer, shard_tokens=250)
        return SimpleNamespace(
            base=AutoModelForCausalLM.from_pretrained(folder, **tiny.PLAIN),
            matrices=runner.checkpoint.architecture.matrices,
            runner=runner,
            trunk=trunk,
            prompts=prompts,
            whole=tiny.whole_prompts(questions, tokenizer),
            windows=windows,
            shards=shards,
            scorer=TailScorer(trunk, prompts),
            reference=unmerged_logits(runner, prompts, trunk),
            text=TextWindows(trunk, shards, reference=family != "gemma2"),
        )

    return make


def unmerged_logits(runner, prompts, trunk):
    """Answer logits (n, 4) float32 of the unmerged model, in question order: what `answer_kl` measures from."""
    plan = base_plan(runner.checkpoint.n_layers)
    parts = [answer_shard(runner, plan, prompts, shard, trunk=trunk) for shard in prompts.shards]
    return torch.from_numpy(Answers.join(parts).logits)


def template(alphas=(0.6, 0.45), **options):
    return tail_plan(N, alphas, name="template", kind="fixed", **options)


def loss_of(case, weights=ANSWERS, plan=None, **options):
    plan = plan or template()
    scorer = case.scorer
    if plan.norms == "fold":
        scorer = TailScorer(case.trunk, case.prompts, sources=SourceLayers(case.runner, FIRST, norms="fold"))
    return TailLoss(scorer, plan, weights, **({"reference": case.reference, "text": case.text} | options))


def whole_model(case, coefficients, *, merge_biases=False, fold=False):
    """A function from token ids to (T, V) float64 logits of the model fused with (matrices, sources) coefficients.

    last: of so many positions, where it is not 0."""
    config = copy.deepcopy(case.base.config)
    config.num_hidden_layers = FIRST + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: FIRST + 1]
    model = tiny.empty_model(config)
    kind, state = config.model_type, {name: tensor.double() for name, tensor in case.base.state_dict().items()}
    stored = tiny.of_layers(tiny.stored_layer, kind, state)
    root, merged = tiny.root_of(kind), {}
    prefix = f"{root}{FIRST}."
    for name in (name for name in stored if name.startswith(prefix)):
        relative = name.removeprefix(prefix)
        matrix, _, which = relative.rpartition(".")
        merged[relative] = stored[name]
        if fold and matrix in GAINS.values():
            merged[relative] = torch.ones_like(stored[name])
        if matrix in case.matrices and (which == "weight" or merge_biases):
            sources = []
            for j in range(coefficients.shape[1]):
                layer = f"{root}{FIRST + j}."
                gain = 1.0
                if fold and which == "weight" and matrix in GAINS:
                    gain = stored[f"{layer}{GAINS[matrix]}.weight"]
                sources.append(stored[layer + relative] * gain)
            own = coefficients[case.matrices.index(matrix)]
            merged[relative] = sum(c * w for c, w in zip(own, sources, strict=True))
    merged = {prefix + name: tensor for name, tensor in tiny.loaded_layer(kind, merged).items()}
    weights = {name: merged.get(name, state[name]) for name, _ in model.named_parameters()}  # of tied ones one name

    def logits(ids, last=0):
        options = {"use_cache": False, "logits_to_keep": last}
        return functional_call(model, weights, (torch.tensor(ids)[None],), options).logits[0]

    return logits


def whole_losses(case, coefficients, **options):
    """The means of LossWeights' NLLs, of the answers and of the text, by whole prompts and windows."""
    model, letters = whole_model(case, coefficients, **options), list(case.prompts.letters)
    answers, text = [], []
    for ids, answer in zip(case.whole, case.prompts.answers.tolist(), strict=True):
        answers.append(-torch.log_softmax(model(ids, last=1)[-1, letters], -1)[answer])
    for ids in case.windows:
        log = torch.log_softmax(model(ids)[:-1], -1)
        text.extend(-log[torch.arange(len(ids) - 1), torch.tensor(ids)[1:]])
    return torch.stack(answers).mean(), torch.stack(text).mean()


def whole_divergences(case, coefficients, **options):
    """The means of LossWeights' divergences from the unmerged model, likewise."""
    model, letters = whole_model(case, coefficients, **options), list(case.prompts.letters)
    base = copy.deepcopy(case.base).double()
    answers, text = [], []
    for ids in case.whole:
        log = torch.log_softmax(model(ids, last=1)[-1, letters], -1)
        target = torch.log_softmax(tiny.plain_logits(base, ids, last=1)[-1, letters], -1)
        answers.append((target.exp() * (target - log)).sum())
    for ids in case.windows:
        log = torch.log_softmax(model(ids)[:-1], -1)
        target = torch.log_softmax(tiny.plain_logits(base, ids)[:-1], -1)
        text.extend((target.exp() * (target - log)).sum(-1))
    return torch.stack(answers).mean(), torch.stack(text).mean()


def some_coefficients(seed=0, matrices=MATRICES):
    values = np.random.default_rng(seed).dirichlet([3.0] * 3, len(matrices))
    return torch.tensor(values, dtype=torch.float64)


def near(found, expected, limit):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    scale = expected.abs().max()
    assert (found - expected).abs().max() < limit * scale, f"{found} where {expected} is expected"


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_equal_those_through_the_whole_model(case, family):
    """Per matrix, and shared in a dense family and one with experts, of the answers' NLL and of the text's."""
    case = case(family)
    values = some_coefficients(matrices=case.matrices)
    for shared in (False, True) if family in ("llama", "qwen3_moe") else (False,):
        theirs = (values[0] if shared else values).clone().requires_grad_()
        expected = whole_losses(case, theirs.expand(len(case.matrices), 3))
        for weights, loss in zip((ANSWERS, TEXT), expected, strict=True):
            (gradient,) = torch.autograd.grad(loss, theirs, retain_graph=True)
            found = loss_of(case, weights)(theirs)
            near(found.loss.total, loss.detach(), LIMIT)
            near(found.gradient, gradient, GRADIENT_LIMIT)
            assert gradient.abs().max() > 1e-2
    # And the slope of the answers' own loss: roundings of 1e-6 over a step so small that no routing changes.
    loss, along = loss_of(case), torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [loss(values[0] + sign * 1e-3 * along, gradient=False).loss.total for sign in (1, -1)]
    slope = loss(values[0]).gradient @ along
    assert abs((ends[0] - ends[1]) / 2e-3 - slope) < 5e-3 * (1 + abs(slope))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama_biases", {"biases": "merge"}),
        ("qwen3_biases", {"norms": "fold"}),
        ("mistral_window", {"norms": "fold", "biases": "merge"}),
    ],
)
def test_every_term_with_every_option(case, family, options):
    """All four terms at once, each term's own value, biases averaged and norms folded."""
    case, theirs = case(family), some_coefficients(1).requires_grad_()
    merge_biases, fold = options.get("biases") == "merge", options.get("norms") == "fold"
    nll = whole_losses(case, theirs, merge_biases=merge_biases, fold=fold)
    kl = whole_divergences(case, theirs, merge_biases=merge_biases, fold=fold)
    expected = (nll[0], kl[0], nll[1], kl[1])
    total = sum(w * value for w, value in zip((0.5, 1.0, 0.3, 2.0), expected, strict=True))
    total.backward()
    found = loss_of(case, EVERYTHING, template(**options))(theirs)
    for value, target in zip(found.loss, (total, *expected), strict=True):
        near(value, target.detach(), LIMIT)
    near(found.gradient, theirs.grad, GRADIENT_LIMIT)
    again = loss_of(case, EVERYTHING, template(**options))(theirs, gradient=False)
    near(torch.tensor(again.loss), torch.tensor(found.loss), LIMIT)
    assert again.gradient is None


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_gradients_by_the_parameters_are_slopes(case, kind):
    """Central differences: float32 losses (roundings of 1e-6) over steps of 2e-2, whose square is the error."""
    loss = loss_of(case("qwen2"), EVERYTHING)
    shape = Parametrisation(kind, template(), MATRICES, bounds=(0.2, 0.9))
    parameters = shape.start().requires_grad_()
    coefficients = shape.coefficients(parameters)
    (gradient,) = torch.autograd.grad(coefficients, parameters, loss(coefficients).gradient)
    direction = torch.randn(len(parameters), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for along in (direction, torch.eye(len(parameters), dtype=torch.float64)[1]):
        ends = [
            loss(shape.coefficients(parameters.detach() + sign * 1e-2 * along), gradient=False).loss.total
            for sign in (1, -1)
        ]
        assert abs((ends[0] - ends[1]) / 2e-2 - gradient @ along) < 2e-3 * gradient.norm() * along.norm()


def test_minibatches_add_up_to_the_full_batch(case):
    """Gradients of parts, computed by scorers of some questions, average to that of all; so do drawn positions."""
    case, values = case("mistral_window"), some_coefficients()
    loss = loss_of(case)
    parts = [loss(values, rows=rows) for rows in ([4, 0, 2], [5, 1, 3])]
    whole = loss(values)
    near(sum(part.gradient for part in parts) / 2, whole.gradient, GRADIENT_LIMIT)
    assert sum(part.loss.total for part in parts) / 2 == pytest.approx(whole.loss.total, rel=LIMIT)
    beside = loss(values, rows=[5, 1, 3], held_out=[0, 4, 2])
    near(beside.gradient, parts[1].gradient, GRADIENT_LIMIT)
    assert beside.held_out.total == pytest.approx(parts[0].loss.total, rel=LIMIT)

    loss = loss_of(case, TEXT)
    everything = case.text.everything()
    halves = [[(w, p[start::2]) for w, p in everything if len(p[start::2])] for start in (0, 1)]
    counts = [sum(len(p) for _, p in half) for half in halves]
    parts = [loss(values, drawn=half).gradient * count for half, count in zip(halves, counts, strict=True)]
    near(sum(parts) / sum(counts), loss(values).gradient, GRADIENT_LIMIT)


# -- text ------------------------------------------------------------------------------------------------------------


def test_text_pieces_do_not_change_the_loss(case, monkeypatch):
    case, values = case("qwen2"), some_coefficients()
    expected = loss_of(case, EVERYTHING)(values)
    monkeypatch.setattr(raymerge.tail_loss, "_TEXT_POSITIONS", 3)
    again = loss_of(case, EVERYTHING, text=TextWindows(case.trunk, case.shards, reference=True))(values)
    near(torch.tensor(again.loss), torch.tensor(expected.loss), LIMIT)
    near(again.gradient, expected.gradient, GRADIENT_LIMIT)


def test_the_divergence_of_capped_logits_is_refused(case):
    case = case("gemma2")
    with pytest.raises(GradientError, match=r"the logits of gemma2 are capped at 8.0: set gradient.text_kl to 0"):
        TextWindows(case.trunk, case.shards, reference=True)


def test_the_unmerged_model_is_what_divergence_is_measured_from(case):
    """KL of a model to itself is 0; NLL is evaluation's."""
    case = case("llama3_rope")
    text = TextWindows(case.trunk, case.shards, reference=True)
    plan = base_plan(N)
    nll, count = np.sum([text_nll(case.runner, plan, shard) for shard in case.shards], axis=0)
    assert count == sum(len(positions) for _, positions in text.everything()) == 49 + 49 + 22 + 1
    (mean, entropy) = (torch.cat(values) for values in zip(*text._reference, strict=True))
    assert mean.shape == (count, 32) and (entropy >= 0).all()
    answers = [answer_shard(case.runner, plan, case.prompts, shard) for shard in case.prompts.shards]
    rows = np.concatenate([part.rows for part in answers])
    near(case.reference[rows], np.concatenate([part.logits for part in answers]), LIMIT)


def test_draws_follow_from_the_seed(case):
    case = case("llama")
    text = TextWindows(case.trunk, case.shards, windows=2, positions=20)
    drawn = text.draw(3, 1)
    assert sum(len(positions) for _, positions in drawn) <= 20 and len(drawn) <= 2
    assert all(0 <= positions.min() and positions.max() < len(case.windows[w]) - 1 for w, positions in drawn)
    assert all(len(set(positions.tolist())) == len(positions) for _, positions in drawn)

    def plain(drawn):
        return [(window, positions.tolist()) for window, positions in drawn]

    assert plain(text.draw(3, 1)) == plain(drawn)
    assert len({str(plain(text.draw(seed, epoch))) for seed in range(3) for epoch in range(3)}) == 9
    assert {window for seed in range(30) for window, _ in text.draw(seed)} == {0, 1, 2, 3}
    assert text.sampled and not case.text.sampled
    assert plain(case.text.draw(1)) == plain(case.text.everything())
    for options, message in (({"windows": 5}, "5 windows of text.*1 to 4"), ({"positions": 0}, "0 positions of text")):
        with pytest.raises(GradientError, match=message):
            TextWindows(case.trunk, case.shards, **options)
    with pytest.raises(ValueError, match="share no prefix"):
        TextWindows(case.trunk, case.prompts.shards)


# -- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_parameters_and_plans_are_each_others_inverse(case, kind):
    scorer = case("llama").scorer
    rng = np.random.default_rng(0)
    plan = template(rng.uniform(0.1, 0.9, 2), biases="merge", norms="fold")
    shape = Parametrisation(kind, plan, MATRICES)
    parameters = shape.start()
    found = shape.plan(parameters)
    assert (found.kind, found.name, found.norms, found.biases) == ("found", "gradient", "fold", "merge")
    np.testing.assert_allclose(scorer.coefficients(found)[..., :], shape.coefficients(parameters), atol=1e-12)
    np.testing.assert_allclose(found.alphas, plan.alphas, atol=1e-12)
    moved = parameters + torch.tensor(rng.normal(size=len(parameters)))
    found = shape.plan(moved)
    np.testing.assert_allclose(scorer.coefficients(found), shape.coefficients(moved), atol=1e-12)
    assert [matrix for matrix, _ in found.matrix_alphas] == (sorted(MATRICES) if kind == "per_matrix" else [])
    again = Parametrisation(kind, found, MATRICES)
    np.testing.assert_allclose(again.coefficients(again.start()), shape.coefficients(moved), atol=1e-12)


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_a_start_that_is_not_left_is_the_very_plan(kind):
    """0.6225 came back as 0.6225000000000002: found_gradient_simplex and fixed_0.6225 were two plans with equal
    answers, and their comparisons with the best one counted twice in Holm's correction."""
    plan = template([0.6225, 0.6225])
    shape = Parametrisation(kind, plan, MATRICES)
    found = shape.plan(shape.start())
    assert [found.alphas, *(list(own) for _, own in found.matrix_alphas)] == [plan.alphas] * (
        1 + len(found.matrix_alphas)
    )
    if kind != "per_matrix":
        assert found.plan_id("model") == plan.plan_id("model")
    moved = shape.start() + 1e-6 * torch.arange(len(shape.start()))
    assert shape.plan(moved).alphas != plan.alphas


def test_starts_are_inside(case):
    for alphas in ([0.0, 1.0], [1.0, 0.0], [1.0, 1.0]):
        for kind in PARAMETRISATIONS:
            shape = Parametrisation(kind, template(alphas), MATRICES, bounds=(0.3, 0.7))
            start = shape.start()
            assert torch.isfinite(start).all()
            coefficients = shape.coefficients(start)
            assert (coefficients > 0).all() and torch.allclose(coefficients.sum(-1), torch.ones(()).double())
            if kind == "alphas":
                assert ((shape.alphas(start) > 0.3) & (shape.alphas(start) < 0.7)).all()


def test_a_descent_in_another_dtype_or_by_other_code_is_another_descent(case, monkeypatch):
    """Its state is found by this name in the cache, which several runs may share."""
    loss = loss_of(case("llama"))
    before = loss.identity
    assert loss_of(case("llama")).identity == before
    with monkeypatch.context() as patch:
        patch.setattr(loss.scorer.runner, "dtype", torch.bfloat16)
        assert loss.identity != before
    of_text = loss_of(case("llama"), TEXT)
    for asked, owner, name in ((loss, loss.scorer, "prompts"), (of_text, of_text, "text")):
        own = asked.identity
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, SimpleNamespace(identity="another"))
            assert asked.identity != own
    monkeypatch.setattr(raymerge.forward, "version", lambda package: f"{package} of tomorrow")
    assert loss.identity != before


@pytest.mark.parametrize("family", tiny.FOLDABLE)
def test_the_corners_of_the_simplex_are_the_controls(case, family):
    case = case(family)
    loss = loss_of(case, EVERYTHING, template(norms="fold", biases="merge"))
    shape = Parametrisation("simplex", loss.template, case.matrices)
    matrices = Parametrisation("per_matrix", loss.template, case.matrices)
    for corner, control in (([1.0, 0.0, 0.0], drop_plan(N, 2)), ([0.0, 0.0, 1.0], before_last_plan(N, 2))):
        expected = case.scorer.score(control)[0]
        plans = [shape.plan_of(np.array(corner)), matrices.plan_of(np.array([corner] * len(case.matrices)))]
        for plan in plans:
            near(loss.scorer.score(plan)[0], expected, LIMIT)
        # And the point on the way there is the same one: what is descended on reaches it.
        found = loss(torch.tensor(corner)).loss
        answers = torch.from_numpy(case.prompts.answers).long()
        nll = torch.nn.functional.cross_entropy(expected, answers).item()
        assert found.answer_nll == pytest.approx(nll, rel=LIMIT)
        log = torch.log_softmax(expected, -1)
        kl = torch.nn.functional.kl_div(log, loss._reference, reduction="batchmean", log_target=True).item()
        assert found.answer_kl == pytest.approx(kl, rel=LIMIT)
        nll = sum(text_nll(case.runner, control, shard)[0] for shard in case.shards) / 121
        assert found.text_nll == pytest.approx(nll, rel=LIMIT)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama_biases", {"biases": "merge"}), ("qwen3_biases", {"norms": "fold"}), ("qwen2", {})],
)
def test_plans_with_alphas_for_each_matrix_are_scored(case, family, options):
    """Stacked or fused by themselves, among plain plans, by the scorer and from the embedding on."""
    case, values = case(family), some_coefficients(2)
    plan = Parametrisation("per_matrix", template(**options), MATRICES).plan_of(values.numpy())
    merge_biases, fold = options.get("biases") == "merge", options.get("norms") == "fold"
    model = whole_model(case, values, merge_biases=merge_biases, fold=fold)
    with torch.no_grad():
        expected = torch.stack([model(ids)[-1] for ids in case.whole])[:, list(case.prompts.letters)]
    for norms in ("keep", "fold"):
        scorer = TailScorer(case.trunk, case.prompts, sources=SourceLayers(case.runner, FIRST, norms=norms))
        near(scorer.score(plan)[0], expected, LIMIT)
        near(list(scorer.score_many([template(**options), plan, drop_plan(N, 2), plan]))[3], expected, LIMIT)
    parts = [answer_shard(case.runner, plan, case.prompts, shard) for shard in case.prompts.shards]
    rows = np.concatenate([part.rows for part in parts])
    near(np.concatenate([part.logits for part in parts]), expected[rows], LIMIT)
    coefficients = values.clone().requires_grad_()
    near(
        loss_of(case, ANSWERS, template(**options)).scorer.logits(coefficients, merge_biases=merge_biases),
        expected,
        LIMIT,
    )


# -- a scorer of some questions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
def test_some_questions_are_scored_as_among_all(case, family):
    scorer, plan = case(family).scorer, template()
    everything = scorer.score(plan)
    for rows in ([0], [5, 0], [3, 1, 4], [5, 4, 3, 2, 1, 0]):
        part = scorer.select(rows)
        for found, expected in zip(part.score(plan)[:2], everything[:2], strict=True):
            near(found, expected[rows], LIMIT)
    near(scorer.select([3, 1, 4]).select([2, 0]).score(plan)[0], everything[0][[4, 3]], LIMIT)
    near(scorer.score(plan)[0], everything[0], 1e-12)
    for rows in ([], [0, 0], [6], [0, 6]):
        with pytest.raises(ValueError, match=f"{len(rows)} rows are asked for"):
            scorer.select(rows)


# -- descending ------------------------------------------------------------------------------------------------------

FAST = Settings(parametrisation="simplex", learning_rate=0.1, epochs=100)


PLANTED = [("simplex", (0.15, 0.6, 0.25)), ("alphas", (0.7, 0.1, 0.2))]


def planted_loss(case, planted, start=(0.6, 0.45)):
    """The divergence from a known merge's own answers, which has its minimum, 0, there."""
    shape = Parametrisation("simplex", template(), MATRICES)
    reference = case.scorer.score(shape.plan_of(np.array(planted)))[0]
    return loss_of(case, LossWeights(answer_nll=0.0, answer_kl=1.0), template(start), reference=reference)


@pytest.mark.parametrize(("kind", "planted"), PLANTED)
def test_a_planted_optimum_is_found(case, kind, planted):
    case = case("qwen2")
    found = descend(planted_loss(case, planted), replace(FAST, parametrisation=kind, epochs=200))
    assert found.history[0].loss > 1e-2 and lowest(found) < 1e-4
    np.testing.assert_allclose(case.scorer.coefficients(found.plan), planted, atol=0.02)


@pytest.mark.parametrize(("kind", "planted"), PLANTED)
def test_lbfgs_finds_a_planted_optimum_and_stops_there(case, kind, planted, monkeypatch):
    case = case("qwen2")
    loss, calls = planted_loss(case, planted), []
    call = TailLoss.__call__
    monkeypatch.setattr(TailLoss, "__call__", lambda *a, **k: calls.append(1) or call(*a, **k))
    found = descend(loss, Settings(kind, optimizer="lbfgs", epochs=200))
    assert lowest(found) < 1e-9 and len(calls) < 60, "at rate 0.1 Adam takes 200 for 1e-4"
    np.testing.assert_allclose(case.scorer.coefficients(found.plan), planted, atol=1e-3)
    *_, before, last = found.history
    assert last.coefficients.tolist() == before.coefficients.tolist() and len(found.history) < 60
    assert found.stopped_early
    assert np.all(np.diff([row.loss for row in found.history]) <= 0), "a line search never ends higher"


@pytest.mark.parametrize("weight", [1.0, 0.01])
@pytest.mark.parametrize(("kind", "planted"), PLANTED)
def test_lbfgs_leaves_a_corner(case, kind, planted, weight):
    """From a plan that drops layers or keeps one alone, where the gradient by the parameters is nearly 0."""
    case = case("qwen2")
    reference = case.scorer.score(Parametrisation("simplex", template(), MATRICES).plan_of(np.array(planted)))[0]
    for start in ((1.0, 1.0), (0.0, 0.0)):
        loss = loss_of(case, LossWeights(answer_nll=0.0, answer_kl=weight), template(start), reference=reference)
        found = descend(loss, Settings(kind, optimizer="lbfgs", epochs=20))
        assert lowest(found) < found.history[0].loss / 10


def test_lbfgs_steps_on_the_text_that_losses_are_compared_on(case, monkeypatch):
    """And on all the questions but the held-out ones, so that the loss of a step and of the history are one."""
    case, seen = case("qwen2"), []
    loss = loss_of(case, EVERYTHING, text=TextWindows(case.trunk, case.shards, reference=True, positions=10))
    call = TailLoss.__call__

    def spy(self, coefficients, *, rows=None, drawn=None, **options):
        seen.append((tuple(rows), str([(window, positions.tolist()) for window, positions in drawn])))
        return call(self, coefficients, rows=rows, drawn=drawn, **options)

    monkeypatch.setattr(TailLoss, "__call__", spy)
    found = descend(loss, Settings("simplex", optimizer="lbfgs", epochs=4, held_out=0.3))
    assert len(set(seen)) == 1 and set(seen[0][0]) == set(range(6)) - set(found.held_out_rows)


def lowest(found):
    return found.history[found.best_epoch].loss


def test_descent_beats_chance(case):
    """All three parametrisations reach a lower loss than the best of 200 random points and than both controls."""
    case = case("llama")
    options = {"norms": "fold", "biases": "merge"}
    loss = loss_of(case, ANSWERS, template(**options))
    rng = np.random.default_rng(0)
    chance = min(loss(torch.from_numpy(point), gradient=False).loss.total for point in rng.dirichlet([1.0] * 3, 200))
    kinds = ("alphas", "simplex", "per_matrix")
    values = {kind: lowest(descend(loss, replace(FAST, parametrisation=kind))) for kind in kinds}
    # Of a grid in two dimensions 200 random points come near to the best; seven simplices reach further.
    assert values["alphas"] < chance + 1e-3 and values["simplex"] < chance + 1e-3
    assert values["per_matrix"] < chance - 0.05


def same(one, two):
    assert one.plan == two.plan and one.best_epoch == two.best_epoch and one.stopped_early == two.stopped_early
    assert one.held_out_rows == two.held_out_rows
    np.testing.assert_equal([list(epoch) for epoch in one.history], [list(epoch) for epoch in two.history])


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (Settings("alphas", optimizer="adam", learning_rate=0.05, epochs=5), ANSWERS),
        (Settings("simplex", optimizer="sgd", learning_rate=0.5, epochs=5, held_out=0.3), ANSWERS),
        (Settings("per_matrix", learning_rate=0.05, epochs=5, batch_size=2, held_out=0.3, seed=4), EVERYTHING),
        (Settings("simplex", learning_rate=0.05, epochs=5, batch_size=2), TEXT),
        (Settings("per_matrix", optimizer="lbfgs", epochs=5, held_out=0.3), EVERYTHING),
        (Settings("alphas", optimizer="lbfgs", epochs=5), TEXT),
    ],
)
def test_going_on_equals_not_stopping(case, tmp_path, settings, weights):
    case = case("qwen2")
    loss = loss_of(case, weights, text=TextWindows(case.trunk, case.shards, reference=True, windows=2, positions=30))
    seen = []
    whole = descend(loss, settings, on_epoch=lambda row, state: seen.append((row, state)))
    assert [row.epoch for row, _ in seen] == list(range(6)) == [row.epoch for row in whole.history]
    np.testing.assert_equal([list(row) for row, _ in seen], [list(row) for row in whole.history])
    for epoch in (0, 3, 5):
        file = tmp_path / f"{epoch}.safetensors"
        save_file(seen[epoch][1], file)
        same(descend(loss, settings, state=load_file(file)), whole)
    same(descend(loss, replace(settings, epochs=2)), descend(loss, replace(settings, epochs=2), state=seen[2][1]))
    for other in (replace(settings, seed=settings.seed + 1), replace(settings, learning_rate=0.01)):
        with pytest.raises(GradientError, match="one of other questions, weights or settings"):
            descend(loss, other, state=seen[2][1])


@pytest.mark.parametrize("start", [(1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize(("kind", "planted"), PLANTED)
def test_lbfgs_goes_on_from_every_epoch(case, tmp_path, kind, planted, start):
    """Its steps' lengths are numbers of Python's at times, not tensors: of these too no bit is lost."""
    loss, seen = planted_loss(case("qwen2"), planted, start), []
    settings = Settings(kind, optimizer="lbfgs", epochs=12)
    whole = descend(loss, settings, on_epoch=lambda _, state: seen.append(state))
    for state in seen:
        save_file(state, tmp_path / "state.safetensors")
        same(descend(loss, settings, state=load_file(tmp_path / "state.safetensors")), whole)


def test_minibatches_follow_from_the_seed(case, monkeypatch):
    """So do the positions of text that each step is over; no two steps are over the same."""
    case = case("qwen2")
    text = TextWindows(case.trunk, case.shards, positions=10)
    loss = loss_of(case, LossWeights(text_nll=1.0), text=text)
    steps = []
    call = TailLoss.__call__

    def spy(self, coefficients, *, rows=None, drawn=None, gradient=True, **options):
        if gradient:
            steps.append((tuple(rows), str([(window, positions.tolist()) for window, positions in drawn])))
        return call(self, coefficients, rows=rows, drawn=drawn, gradient=gradient, **options)

    monkeypatch.setattr(TailLoss, "__call__", spy)

    def run(seed):
        steps.clear()
        found = descend(loss, Settings(learning_rate=0.05, epochs=3, batch_size=4, seed=seed))
        return found, *zip(*steps, strict=True)

    (one, first, texts), (two, second, again), (_, other, others) = run(1), run(1), run(2)
    same(one, two)
    assert first == second != other and texts == again and not set(texts) & set(others)
    assert [len(batch) for batch in first] == [4, 2] * 3
    assert all(sorted(first[i] + first[i + 1]) == list(range(6)) for i in (0, 2, 4))
    assert len({first[0], first[2], first[4]}) == 3 and len(set(texts)) == 6


def test_the_best_point_is_returned_and_patience_ends(case):
    case = case("qwen2")
    loss = loss_of(case)
    settings = Settings("simplex", learning_rate=1.0, epochs=60, held_out=0.34, patience=4, seed=2)
    found = descend(loss, settings)
    held_out = [row.held_out_loss for row in found.history]
    best = int(np.argmin(held_out))
    assert found.stopped_early and len(found.history) == best + 5 < 61
    assert found.best_epoch == best and held_out[-1] > held_out[best]
    np.testing.assert_allclose(case.scorer.coefficients(found.plan), found.history[best].coefficients, atol=1e-12)
    np.testing.assert_allclose(found.history[best].alphas, found.plan.alphas, atol=1e-12)
    assert len(found.held_out_rows) == 2
    logits, answers = case.scorer.score(found.plan)[0].double(), torch.from_numpy(case.prompts.answers).long()
    nll = torch.nn.functional.cross_entropy(logits, answers, reduction="none")
    rows = list(found.held_out_rows)
    others = [row for row in range(6) if row not in rows]
    assert held_out[best] == pytest.approx(nll[rows].mean().item(), rel=LIMIT)
    assert found.history[best].loss == pytest.approx(nll[others].mean().item(), rel=LIMIT)
    # Without held-out questions the training loss decides.
    alone = descend(loss, replace(settings, held_out=0.0, patience=None, epochs=12))
    losses = [row.loss for row in alone.history]
    assert alone.best_epoch == int(np.argmin(losses)) and not alone.stopped_early
    assert all(row.held_out_loss is None for row in alone.history)
    assert (
        len(
            {found.held_out_rows} | {descend(loss, replace(settings, seed=s, epochs=0)).held_out_rows for s in range(4)}
        )
        > 1
    )


def test_what_is_descended_on_is_not_rounded(tmp_path):
    """In bfloat16 the history's loss is not that of the plan as it would be saved, which is how it is judged."""
    folder = tiny.make_checkpoint(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    runner = LayerRunner(Checkpoint(str(folder)))
    questions = tiny.make_questions({"cats": 4, "roads": 3}, shots=1)
    prompts = encode_questions(questions, tiny.demo_tokenizer())
    trunk = TrunkCache(runner, FIRST, tmp_path / "cache")
    shards = (Shard((Group("text", np.zeros(0, np.int64), (np.arange(5, 60),), (0,)),)),)
    weights = LossWeights(text_nll=1.0)
    loss = TailLoss(TailScorer(trunk, prompts), template(), weights, text=TextWindows(trunk, shards))
    found = descend(loss, replace(FAST, epochs=3))
    answers = torch.from_numpy(prompts.answers).long()
    rounded = torch.nn.functional.cross_entropy(TailScorer(trunk, prompts).score(found.plan)[0], answers).item()
    nll, count = text_nll(runner, found.plan, shards[0])
    saved = rounded + nll / count
    assert lowest(found) == pytest.approx(saved, rel=0.05) and abs(lowest(found) - saved) > 2 * LIMIT * saved


def test_text_is_descended_on_without_questions(case):
    """Step by step as beside questions that have no part in the loss; also where each step draws its positions."""
    case = case("llama")
    for text in (case.text, TextWindows(case.trunk, case.shards, positions=9)):
        without = TailLoss(None, template(), TEXT, sources=case.scorer.sources, text=text)
        settings = replace(FAST, epochs=3)
        alone, beside = descend(without, settings), descend(loss_of(case, TEXT, text=text), settings)
        assert [row.loss for row in alone.history] == pytest.approx([row.loss for row in beside.history], rel=LIMIT)
        np.testing.assert_allclose(alone.plan.alphas, beside.plan.alphas, atol=1e-5)
        value = without(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), gradient=False).loss
        assert value.total == value.text_nll and np.isnan(value.answer_nll)
    with pytest.raises(GradientError, match="answer_nll and answer_kl need questions"):
        TailLoss(None, template(), ANSWERS, sources=case.scorer.sources)
    with pytest.raises(GradientError, match="questions can be held out only of a loss that questions have a part in"):
        descend(without, replace(FAST, held_out=0.2))


def test_alphas_stay_in_their_bounds(case):
    found = descend(loss_of(case("llama")), Settings(bounds=(0.3, 0.7), learning_rate=2.0, epochs=20))
    alphas = np.array([row.alphas for row in found.history])
    assert alphas.min() >= 0.3 and alphas.max() <= 0.7 and np.ptp(alphas) > 0.1
    assert found.history[0].alphas.tolist() == pytest.approx([0.6, 0.45])
    np.testing.assert_allclose(found.plan.alphas, alphas[found.best_epoch])


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_descended_on_is_refused(case):
    case = case("llama")
    plain = TextWindows(case.trunk, case.shards)
    refused = [
        ({"plan": before_last_plan(N, 2)}, "descend on a tail plan"),
        ({"plan": template([0.5])}, "descend on a tail plan"),
        ({"plan": template(alignment="rows")}, 'alignment "rows" has no gradient'),
        ({"weights": LossWeights(answer_kl=1.0), "reference": None}, "answer_kl needs the unmerged model's logits"),
        ({"weights": TEXT, "text": None}, "need a text"),
        ({"weights": LossWeights(text_kl=1.0), "text": plain}, "text_kl needs windows of text with a reference"),
    ]
    for options, message in refused:
        with pytest.raises(GradientError, match=message):
            loss_of(case, **options)
    with pytest.raises(GradientError, match="norms fold and alignment none, the stacked sources keep and none"):
        TailLoss(case.scorer, template(norms="fold"))
    for make, message in [
        (lambda: LossWeights(0.0), "not all 0"),
        (lambda: LossWeights(-1.0), "not negative"),
        (lambda: Parametrisation("x", template(), MATRICES), "'x' is not one of alphas, simplex, per_matrix"),
        (lambda: Parametrisation("alphas", template(), MATRICES, bounds=(0.5, 0.5)), "bounds of alpha are 0.5 and 0.5"),
        (lambda: descend(loss_of(case), Settings(held_out=0.95)), "leaves none of 6 questions"),
        (lambda: descend(loss_of(case, TEXT), Settings(held_out=0.5)), "questions can be held out only"),
    ]:
        with pytest.raises(GradientError, match=message):
            make()


def test_a_loss_that_is_not_finite_ends_the_descent(case):
    case = case("llama")
    broken = case.reference.clone()
    broken[2] = torch.nan
    loss = loss_of(case, LossWeights(answer_nll=0.0, answer_kl=1.0), reference=broken)
    with pytest.raises(GradientError, match="the loss after epoch 0 is nan .*lower the learning rate, which is 0.001"):
        descend(loss)
    with pytest.raises(GradientError, match="the loss after epoch 0 is nan .*use optimizer adam"):
        descend(loss, Settings(optimizer="lbfgs"))
    # With questions held out that of either part, whichever the broken question is in.
    said = set()
    for seed in range(6):
        with pytest.raises(GradientError, match="nan") as caught:
            descend(loss, Settings(held_out=0.34, seed=seed))
        said.add("held out: nan" in str(caught.value))
    assert said == {True, False}


def test_every_loss_that_a_search_may_have_can_be_descended_on():
    assert set(LOSSES) <= {field.name for field in fields(LossWeights)}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("accuracy:anatomy", LossWeights(answer_nll=1.0)),
        ("answer_nll:anatomy,law+2*answer_kl:law,anatomy", LossWeights(answer_nll=1.0, answer_kl=2.0)),
        ("answer_nll+0.5*answer_nll", LossWeights(answer_nll=1.5)),
        ("answer_kl+0.1*text_nll", LossWeights(answer_nll=0.0, answer_kl=1.0, text_nll=0.1)),
    ],
)
def test_what_is_descended_on_is_the_objective(objective, expected):
    """Of two terms of one measure the second took the first's place."""
    settings = ["search.searcher=gradient", "search.text=demo", f"search.objective={objective}"]
    assert loss_weights(load_config(None, settings)) == expected
