"""The worker without Ray: the same figures by its three ways of answering."""

import numpy as np
import pytest

from raymerge import demo
from raymerge.config import ModelConfig
from raymerge.evaluation import Answers
from raymerge.objectives import score_answers
from raymerge.plan import base_plan, tail_plan
from raymerge.questions import load_questions
from raymerge.worker import TEXT, ModelWorker

MERGES = 5


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    questions = {split: load_questions("demo", split=split, limit_per_subject=2) for split in ("validation", "test")}
    text = demo.TEXT_PATH.read_text(encoding="utf-8")[:6000]
    probe = ModelWorker(model=ModelConfig(), questions=questions)
    return ModelWorker(
        model=ModelConfig(),
        questions=questions,
        text=text,
        text_tokens=1300,
        first=probe.checkpoint.n_layers - 1 - MERGES,
        cache=tmp_path_factory.mktemp("cache"),
        objective="answer_nll",
        return_logits=True,
    )


def test_scores_are_those_of_the_answers_of_the_whole_merged_model(worker):
    alphas = [0.3, 0.9, 0.5, 0.7, 0.4]
    (result,) = worker.score([alphas])
    plan = tail_plan(worker.checkpoint.n_layers, alphas, name="x", kind="found")
    whole = ModelWorker(model=ModelConfig(), questions=worker._questions)
    answers = Answers.join(
        whole.answers((plan, "validation", number, False)) for number in range(len(whole.shards("validation")))
    )
    subjects = [question.subject for question in worker._questions["validation"].questions]
    expected = score_answers("answer_nll", answers.logits, worker.prompts("validation").answers, subjects)
    assert result["value"] == pytest.approx(expected.value, abs=1e-5)
    assert result["n_questions"] == len(subjects)
    np.testing.assert_allclose(result["logits"], answers.logits, atol=2e-4)
    collapsed = worker.answers((plan, "validation", None, False))
    np.testing.assert_allclose(collapsed.logsumexp, answers.logsumexp, atol=2e-4)
    np.testing.assert_array_equal(collapsed.top_is_letter, answers.top_is_letter)


def test_text_and_base_model_do_not_depend_on_the_trunk(worker):
    base = base_plan(worker.checkpoint.n_layers)
    whole = ModelWorker(model=ModelConfig(), questions={}, text=worker._text, text_tokens=1300)
    shards = range(len(worker.shards(TEXT)))
    with_trunk = [worker.text_nll((base, number)) for number in shards]
    without = [whole.text_nll((base, number)) for number in shards]
    np.testing.assert_allclose([nll for nll, _ in with_trunk], [nll for nll, _ in without], rtol=1e-6)
    # 1,300 tokens are windows of 1,024 and 276, whose first tokens are not scored.
    assert sum(tokens for _, tokens in with_trunk) == 1298


def test_trunk_states_are_computed_once(worker):
    worker.compute_trunk(("test", 0))
    path = worker._trunk.path(worker.shards("test")[0])
    written = path.stat().st_mtime_ns
    assert worker.compute_trunk(("test", 0)) == worker.shard_tokens("test")[0]
    assert path.stat().st_mtime_ns == written


def test_a_worker_tells_what_it_holds(worker):
    described = worker.describe()
    assert described["device"] == "cpu" and described["dtype"] == "float32"
    assert described["model_identity"] == worker.checkpoint.identity
