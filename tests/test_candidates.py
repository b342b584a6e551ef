"""Candidates scored in this process: against transformers' whole models, slopes, and what a search stores."""

import json
import pickle
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import minimize
from transformers import AutoModelForCausalLM

import raymerge
from raymerge import candidates
from raymerge.alpha_files import alpha_file_text, read_alpha_file
from raymerge.candidates import CandidateScorer
from raymerge.checkpoint import Checkpoint, CheckpointError
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.experiments import search
from raymerge.inputs import REPORT, SEARCH, SEARCH_TEXT
from raymerge.plan import PlanError, tail_pairs, tail_plan
from raymerge.tables import RunDirectory
from raymerge.tail_loss import GradientError

FEW = ["data.subjects=colour_mixing,number_words", "data.limit_per_subject=4", "data.report_limit_per_subject=4"]
MERGES = 3
SETTINGS = [*FEW, f"plan.merges={MERGES}", "search.objective=answer_nll", "data.perplexity_tokens=300"]
VECTORS = [[0.3, 0.9, 0.5], [1.0, 1.0, 1.0], [0.0, 0.25, 0.75]]
TEXT = ["search.text=demo", "search.text_tokens=120"]


def scorer(*more):
    return CandidateScorer(load_config(None, [*SETTINGS, *more]))


@pytest.mark.parametrize("method", ["candidate", "score", "answer_logits", "loss", "save"])
def test_arrays_may_be_given_as_the_guide_has_it_by_the_annotations_too(method):
    taken = get_type_hints(getattr(CandidateScorer, method))["vectors" if method == "score" else "alphas"]
    assert np.ndarray in get_args(taken)
    assert method != "score" or any(np.ndarray in get_args(one) for many in get_args(taken) for one in get_args(many))


@pytest.fixture(scope="module")
def opened():
    with scorer() as found:
        yield found


@pytest.fixture(scope="module")
def base():
    """The demo model as it is stored, so that what is merged of it is rounded as a merge is."""
    return AutoModelForCausalLM.from_pretrained(Checkpoint("demo").directory, **tiny.PLAIN, dtype="auto")


def whole_logits(base, questions, pairs, alphas):
    """Letter logits (n, 4) of a whole merged model, and the right answers (n,)."""
    checkpoint = Checkpoint("demo")
    model = tiny.merged_model(base, [(into, remove, a) for (into, remove), a in zip(pairs, alphas, strict=True)])
    letters = [checkpoint.tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
    found, _, _ = tiny.plain_answers(model, tiny.whole_prompts(questions, checkpoint.tokenizer), letters)
    return found, [question.answer for question in questions.questions]


def test_candidates_reach_what_whole_models_in_transformers_do(opened, base):
    questions = opened._worker.material.questions["search"]
    assert len(opened.questions) == 8 and opened.plan.alphas == [0.6225] * MERGES
    pairs = tail_pairs(base.config.num_hidden_layers, MERGES)
    for alphas, score in zip(VECTORS, opened.score(VECTORS), strict=True):
        logits, answers = whole_logits(base, questions, pairs, alphas)
        log = torch.log_softmax(torch.from_numpy(logits), -1)[range(len(answers)), answers]
        assert score.nll == score.value == pytest.approx(-float(log.mean()), abs=1e-5)
        assert score.accuracy == np.mean(logits.argmax(-1) == answers) and score.perplexity is None
        np.testing.assert_allclose(opened.answer_logits(alphas), logits, atol=1e-4)
    assert len({score.nll for score in opened.score(VECTORS)}) == len(VECTORS)


def test_a_block_in_the_middle_is_scored_too(base):
    block = ["plan.selection=block", "plan.block=5", "plan.merges=2"]
    with scorer(*block) as middle:
        (score,) = middle.score([[0.75, 0.5]])
        logits, answers = whole_logits(base, middle._worker.material.questions["search"], [(5, 6), (4, 5)], [0.75, 0.5])
        with pytest.raises(PlanError, match="3 alphas are given for a plan of 2 steps"):
            middle.score([[9.0, 0.75, 0.5]])  # which to a search over blocks would be another block
        with pytest.raises(GradientError, match=r"only a tail merge has a gradient, but plan\.selection is block"):
            middle.loss([0.75, 0.5])
    log = torch.log_softmax(torch.from_numpy(logits), -1)[range(len(answers)), answers]
    assert score.nll == pytest.approx(-float(log.mean()), abs=1e-5)


def test_scores_are_those_that_a_search_stores(local_searches, tmp_path):
    settings = [*SETTINGS, *TEXT, "search.objective=answer_nll+0.1*text_nll"]
    own = ["search.candidates=4", "search.initial=2", "search.random_candidates=2", "output.save_best=false"]
    run = search(load_config(None, [*settings, *own, "output.figures=false", f"output.run={tmp_path / 'run'}"]))
    trials = run.read("trials").to_pylist()
    assert len(trials) > 8
    with CandidateScorer(load_config(None, settings)) as again:
        tail = [trial for trial in trials if trial["searcher"] in ("bayes", "random")]
        for trial, score in zip(tail, again.score([trial["alphas"] for trial in tail]), strict=True):
            for key, value in score._asdict().items():
                assert value == pytest.approx(trial[key], abs=1e-5), key


def test_the_loss_is_that_of_the_candidates_and_its_gradient_a_slope():
    # A step of 1e-3 of a float32 loss, whose roundings are 1e-7: slopes are right to 1e-4.
    with scorer(*TEXT, "search.objective=answer_nll+0.5*text_nll") as both:
        for alphas in VECTORS[:1], [0.6, 0.2, 0.8]:
            alphas = np.ravel(alphas)
            loss, gradient = both.loss(alphas)
            assert loss == pytest.approx(both.score([alphas])[0].value, abs=2e-3)  # whose weights are rounded
            steps = 1e-3 * np.eye(MERGES)
            slopes = [(both.loss(alphas + step)[0] - both.loss(alphas - step)[0]) / 2e-3 for step in steps]
            np.testing.assert_allclose(gradient, slopes, atol=5e-4)
            assert np.abs(gradient).max() > 5e-3
        start = both.plan.alphas
        found = minimize(
            both.loss, start, jac=True, bounds=[(0, 1)] * MERGES, method="L-BFGS-B", options={"maxiter": 4}
        )
        assert both.score([found.x])[0].value < both.score([start])[0].value


def test_states_are_deleted_unless_the_cache_is_the_users(tmp_path):
    with scorer() as own:
        cache = own._worker.cache
        assert any(cache.iterdir())
    assert not cache.exists()
    with pytest.raises(ValueError, match="this CandidateScorer has been closed"):
        own.score(VECTORS)
    kept = scorer(f"output.cache={tmp_path}")
    files = sorted(tmp_path.rglob("*"))
    kept.close()
    assert files and sorted(tmp_path.rglob("*")) == files
    # A notebook forgets to close: what nobody refers to any more leaves no folder.
    forgotten = scorer()
    cache = forgotten._worker.cache
    del forgotten
    assert not cache.exists()


def test_a_candidate_is_saved_with_its_alphas(opened, tmp_path):
    record = opened.save(VECTORS[0], tmp_path / "merged", verify=False)
    n_layers = Checkpoint("demo").n_layers
    assert record["layers_after"] == n_layers - MERGES == Checkpoint(str(tmp_path / "merged")).n_layers
    assert read_alpha_file(tmp_path / "merged" / "alphas.json", n_layers).alphas == VECTORS[0]
    assert json.loads((tmp_path / "merged" / "merge_plan.json").read_text())["name"] == "merged"
    with pytest.raises(CheckpointError, match="merged exists already: give another folder"):
        opened.save(VECTORS[0], tmp_path / "merged")


def test_text_alone_can_be_what_candidates_are_scored_on():
    with scorer("data.mmlu=null", "search.objective=text_nll", *TEXT) as text:
        (score,) = text.score(VECTORS[:1])
        assert score.value == pytest.approx(np.log(score.perplexity)) and score.accuracy is None is score.nll
        assert text.questions == () and text.loss(VECTORS[0])[0] == pytest.approx(score.value, abs=2e-3)
        with pytest.raises(ConfigError, match=r"data\.mmlu is null, so that no questions are asked"):
            text.answer_logits(VECTORS[0])


def test_the_loss_takes_the_text_whole_however_much_of_it_a_step_of_a_descent_would_draw():
    text = ["data.mmlu=null", "search.objective=text_nll", *TEXT]
    with scorer(*text) as whole, scorer(*text, "gradient.text_windows=9", "gradient.text_positions=5") as drawn:
        loss, gradient = whole.loss(VECTORS[0])
        assert drawn.loss(VECTORS[0])[0] == loss == pytest.approx(whole.score(VECTORS[:1])[0].value, abs=2e-3)
        np.testing.assert_array_equal(drawn.loss(VECTORS[0])[1], gradient)


def test_the_loss_of_subjects_is_the_objective_or_refused():
    """Of terms with different subjects it was their weights' sum times the mean over all questions: 1.15, not 0.89."""
    with scorer("search.objective=answer_nll:colour_mixing+2*answer_nll:colour_mixing") as one:
        assert one.loss(VECTORS[0])[0] == pytest.approx(one.score(VECTORS[:1])[0].value, abs=5e-3)
    for objective in ("3*answer_nll:colour_mixing+answer_nll:number_words", "answer_nll+answer_nll:number_words"):
        with scorer(f"search.objective={objective}") as several:
            several.score(VECTORS[:1])
            with pytest.raises(GradientError, match="have different subjects"):
                several.loss(VECTORS[0])
    with scorer("search.objective=accuracy:colour_mixing+accuracy:number_words") as shares:
        assert shares.loss(VECTORS[0])[0] == pytest.approx(shares.score(VECTORS[:1])[0].nll, abs=2e-3)


def test_what_has_no_gradient_is_refused_where_it_is_asked_for():
    with scorer("gradient.text_kl=0.1") as without, pytest.raises(GradientError, match=r"text_kl needs a plain text"):
        without.loss(VECTORS[0])
    with scorer("plan.alignment=rows", "plan.merges=1") as rows, pytest.raises(GradientError, match="has no gradient"):
        rows.loss([0.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["plan.selection=block"],
            r"plan\.block is cosine: a search chooses the layers .* set plan\.block to a number",
        ),
        (
            ["plan.selection=most_similar", "plan.similarity_run=x", "plan.recompute=true"],
            r"plan\.recompute is true: a search chooses the layers .* set plan\.recompute to false",
        ),
        (["plan.merges=21"], "cannot merge 21 layers of a model that has 21"),
        (["data.mmlu=null"], r"search\.objective answer_nll needs answers to questions, but data\.mmlu is null"),
        (["data.subjects=botany"], "botany"),
        (
            ["data.mmlu=null", "search.objective=text_nll", *TEXT, "plan.alignment=activations"],
            r"plan\.alignment has activations, which are computed on questions, but data\.mmlu is null",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(settings, message):
    with pytest.raises(raymerge.UserError, match=message):
        scorer(*settings)


def test_an_alpha_file_of_other_merges_is_refused_as_a_search_refuses_it(tmp_path):
    steps = tail_plan(Checkpoint("demo").n_layers, [0.5, 0.25], name="x", kind="file").steps
    (tmp_path / "two.json").write_text(alpha_file_text(steps))
    own = ["plan.base=file", f"plan.alpha_file={tmp_path / 'two.json'}"]
    with pytest.raises(PlanError, match=r"plan two has 2 steps and is not a tail merge of plan\.merges = 3 layers"):
        scorer(*own)
    with scorer(*own, "plan.selection=list") as listed:
        assert listed.plan.alphas == [0.5, 0.25] and listed.loss([0.5, 0.25])[1].shape == (2,)


def test_wrong_vectors_are_refused(opened):
    for vectors, message in (
        ([0.5, 0.5, 0.5], r"alphas have the shape \(\), but those of a candidate have \(3,\)"),
        ([[0.5, 0.5]], "2 alphas are given for a plan of 3 steps"),
        ([[0.5, 0.5, 1.5]], r"alpha is 1.5, but it must lie in \[0, 1\]"),
        ([[0.5, 0.5, float("nan")]], "alpha is nan"),
        ([[0.5, [0.5, 0.5], 0.5]], r"alphas are \[0\.5, \[0\.5, 0\.5\], 0\.5\], but those of a candidate are numbers"),
        (["half"], "alphas are 'half'"),
        ([[0.5, None, {}]], "alphas are .*None"),
    ):
        with pytest.raises(PlanError, match=message):
            opened.score(vectors)
    assert opened.score([]) == []
    with pytest.raises(TypeError, match="make one in each process"):
        pickle.dumps(opened)
    with pytest.raises(ConfigError, match="not the str 'demo.yaml'"):
        CandidateScorer("demo.yaml")


def test_a_candidate_is_saved_with_the_worker_s_matches_and_proved_unless_that_is_not_asked_for(
    opened, tmp_path, monkeypatch
):
    saved = []
    monkeypatch.setattr(candidates, "save_merged", lambda *of, **how: saved.append((*of, how)) or {"proof": None})
    for how in ({}, {"verify": False}):
        opened.save(VECTORS[0], tmp_path / "new", **how)
        *of, options = saved.pop()
        assert of == [opened._worker.checkpoint, opened.candidate(VECTORS[0], "new"), tmp_path / "new"]
        assert options == {"aligner": opened._worker.aligner, "verify": how.get("verify", True)}

    def refuse(folder):
        raise CheckpointError(f"{folder} cannot be written")

    monkeypatch.setattr(candidates, "check_writable", refuse)
    with pytest.raises(CheckpointError, match="new cannot be written"):
        opened.save(VECTORS[0], tmp_path / "new")
    assert saved == []


def test_a_model_s_revision_and_its_own_code_are_those_of_the_configuration(monkeypatch):
    class Opened(Exception):
        pass

    def checkpoint(*of, **how):
        raise Opened(of, how)

    monkeypatch.setattr(candidates, "Checkpoint", checkpoint)
    with pytest.raises(Opened) as found:
        scorer("model.path=owner/name", "model.revision=v1", "model.trust_remote_code=true")
    assert found.value.args == (("owner/name",), {"revision": "v1", "trust_remote_code": True})


def test_the_worker_has_what_a_search_would_have(tmp_path, monkeypatch):
    """The similarity's coefficients, all threads, and the questions reported on, which are left out of its own."""
    monkeypatch.setattr(candidates, "ModelWorker", lambda config, **options: SimpleNamespace(config=config, **options))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    run = RunDirectory.open(tmp_path / "run", {}, "similarity")
    n_layers = Checkpoint("demo").n_layers
    named = {"subset": "a", "language": "en", "measure": "npib", "embedding": "pca", "n_samples": 3}
    run.append("similarity", [named | {"layer_i": i, "layer_j": j, "value": 0.5 ** abs(i - j)}
                              for i in range(n_layers) for j in range(n_layers)])  # fmt: skip
    run.write_manifest()
    similar = [f"plan.similarity_run={tmp_path / 'run'}", "plan.base=similarity"]
    for more, roles in (
        ([], (SEARCH, REPORT)),
        (["data.mmlu=null", "search.objective=text_nll", *TEXT], (SEARCH_TEXT,)),
    ):
        plan, worker = candidates._opened(load_config(None, [*SETTINGS, *similar, *more]), tmp_path)
        assert plan.alphas == [0.5] * MERGES and worker.roles == roles
        assert worker.config.workers.cpus_per_worker == 3
        assert worker.firsts == (n_layers - 1 - MERGES,) and worker.template.alphas == [0.5] * MERGES


def test_layers_that_cannot_be_averaged_are_refused_before_anything_is_computed(tmp_path, monkeypatch):
    folder = tiny.make_checkpoint(tmp_path / "base", "gemma2")
    monkeypatch.setattr(candidates, "ModelWorker", lambda *_, **__: pytest.fail("a worker was made"))
    with pytest.raises(PlanError, match="attention windows differ"):
        scorer(f"model.path={folder}", "plan.ratio=1")
