"""The worker without Ray: the same figures by its three ways of answering."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.evaluation import Answers, NotFiniteError, text_nll
from raymerge.experiments.common import read_inputs
from raymerge.experiments.refitting import refit_of
from raymerge.inputs import CALIBRATION, REPORT, SEARCH, SEARCH_TEXT, TEXT
from raymerge.objectives import answer_kl, score_answers, trial_outcome
from raymerge.plan import Refit, base_plan, block_plan, drop_block_plan, tail_plan
from raymerge.prompts import PromptError
from raymerge.worker import ModelWorker
from raymerge.worker_memory import TooLargeError, refuse_oversized, weight_bytes

SETTINGS = [
    "data.limit_per_subject=2",
    "data.report_limit_per_subject=2",
    "data.perplexity_tokens=1300",
    "search.objective=answer_nll",
    "output.store_candidate_answers=true",
]
CONFIG = load_config(None, SETTINGS)
MERGES = 5
ROLES = (SEARCH, REPORT)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    n_layers = Checkpoint("demo").n_layers
    template = tail_plan(n_layers, [0.5] * MERGES, name="candidate", kind="found")
    cache = tmp_path_factory.mktemp("cache")
    return ModelWorker(CONFIG, roles=ROLES, cache=cache, template=template, firsts=[template.resumes_at])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A worker without a trunk: it runs whole models."""
    return ModelWorker(CONFIG, roles=ROLES, cache=tmp_path_factory.mktemp("whole"))


def whole_answers(whole, plan):
    return Answers.join(whole.answers((plan, SEARCH, n, False)) for n in range(len(whole.prompts.shards(SEARCH))))


def test_scores_are_those_of_the_answers_of_the_whole_merged_model(worker, whole):
    alphas = [0.3, 0.9, 0.5, 0.7, 0.4]
    (result,) = worker.score([alphas])
    plan = tail_plan(worker.checkpoint.n_layers, alphas, name="x", kind="found")
    answers = whole_answers(whole, plan)
    subjects = [question.subject for question in worker.material.questions[SEARCH].questions]
    expected = score_answers("answer_nll", answers.logits, worker.prompts.of(SEARCH).answers, subjects)
    assert result["value"] == pytest.approx(expected.value, abs=1e-5)
    assert result["n_questions"] == len(subjects)
    np.testing.assert_allclose(result["logits"], answers.logits, atol=2e-4)
    collapsed = worker.run(("answers", (plan, SEARCH, None, False)))
    np.testing.assert_allclose(collapsed.logsumexp, answers.logsumexp, atol=2e-4)
    np.testing.assert_array_equal(collapsed.top_is_letter, answers.top_is_letter)


def test_answers_of_candidates_are_given_where_they_are_asked_for_alone(worker, monkeypatch):
    output = worker.config.output.model_copy(update={"store_candidate_answers": False})
    (asked,) = worker.score([[0.5] * MERGES])
    monkeypatch.setattr(worker, "config", worker.config.model_copy(update={"output": output}))
    (found,) = worker.score([[0.5] * MERGES])
    assert asked.keys() - found.keys() == {"logits"}


def test_candidates_are_judged_on_letters_text_and_ceiling(whole, tmp_path):
    """Against figures of a worker without a trunk: the unmerged model's letters, and the reported text's method."""
    settings = ["data.limit_per_subject=2", "data.perplexity_tokens=1300", "search.text=demo", "search.text_tokens=200"]
    objective, alphas = "answer_kl+0.1*text_nll", [0.3, 0.9, 0.5, 0.7, 0.4]
    n_layers = Checkpoint("demo").n_layers
    plan = tail_plan(n_layers, alphas, name="x", kind="found")

    def judged(folder, *more):
        config = load_config(None, [*settings, f"search.objective={objective}", *more])
        worker = ModelWorker(config, roles=(SEARCH,), cache=folder, template=plan, firsts=[plan.resumes_at])
        return worker, *worker.score([alphas])

    worker, result = judged(tmp_path)
    groups = [group for shard in whole.prompts.shards(TEXT) for group in shard.groups]
    ids = np.concatenate([ids for group in groups for ids in group.sequences])
    (shard,) = worker.prompts.shards(SEARCH_TEXT)
    (searched,) = shard.groups[0].sequences
    text = whole.checkpoint.tokenizer(worker.material.search_text[0], add_special_tokens=False)["input_ids"]
    # The tokens that follow the 1,300 reported on.
    assert searched.tolist() == text[1300:1500] and sorted(ids.tolist()) == sorted(text[:1300])
    loss, tokens = text_nll(whole.runner, plan, shard)
    merged, base = (whole_answers(whole, each) for each in (plan, base_plan(n_layers)))
    kl = answer_kl(base.logits, merged.logits).mean()
    assert kl > 1e-3 and result["value"] == pytest.approx(kl + 0.1 * loss / tokens, abs=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-5)
    # A control is judged as a candidate is, and a ceiling below this perplexity changes the value alone.
    control, answers = worker.judge(plan)
    assert control["value"] == pytest.approx(result["value"], abs=1e-6) and len(answers.rows) == result["n_questions"]
    _, penalised = judged(tmp_path, f"search.perplexity_ceiling={0.9 * result['perplexity']}")
    assert penalised["value"] > 5 and penalised["nll"] == pytest.approx(result["nll"], abs=1e-6)
    assert SEARCH_TEXT in worker.describe()["data_identities"] and not whole.prompts.shards(SEARCH_TEXT)


@pytest.mark.parametrize("alignment", ["neurons", "activations"])
def test_aligned_plans_are_answered_alike_with_and_without_a_trunk(worker, whole, alignment):
    """Activations come from the same prompts whatever the worker has cached, so the same units are matched."""
    alphas = [0.3, 0.9, 0.5, 0.7, 0.4]
    plan = tail_plan(worker.checkpoint.n_layers, alphas, name="x", kind="found", alignment=alignment, norms="fold")
    found, expected = (each.answers((plan, SEARCH, None, False)).logits for each in (worker, whole))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    plain = worker.answers((replace(plan, alignment="none"), SEARCH, None, False)).logits
    assert np.abs(found - plain).max() > 1e-2


def test_a_cache_that_is_shared_gives_no_match_that_was_made_on_other_activations(tmp_path):
    def matched(cache, *settings):
        config = load_config(None, ["data.subjects=colour_mixing", "data.limit_per_subject=2", *settings])
        return ModelWorker(config, roles=(SEARCH,), cache=cache).match(("activations", (19, 20)))["units"].tolist()

    cases = ["model.add_bos=true"], ["model.add_bos=false"], ["model.add_bos=true", "model.quantise=int4"]
    found = [matched(tmp_path / str(number), *case) for number, case in enumerate(cases)]
    assert found[0] != found[1] and found[0] != found[2]
    assert [matched(tmp_path / "0", *case) for case in cases] == found


def with_another_tokenizer(folder):
    """The demo model's folder with a tokenizer that cuts every text as if each "e" was an "a"."""
    shutil.copytree(Checkpoint("demo").directory, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert Checkpoint(str(folder)).identity == Checkpoint("demo").identity
    return str(folder)


def test_a_cache_that_is_shared_gives_no_match_that_was_made_on_another_tokenizers_tokens(tmp_path):
    def matched(cache, model):
        settings = ["data.subjects=colour_mixing", "data.limit_per_subject=2", f"model.path={model}"]
        worker = ModelWorker(load_config(None, settings), roles=(SEARCH,), cache=cache)
        return worker.match(("activations", (19, 20)))["units"].tolist()

    other = with_another_tokenizer(tmp_path / "model")
    expected = matched(tmp_path / "own", other)
    assert matched(tmp_path / "shared", "demo") != expected
    assert matched(tmp_path / "shared", other) == expected


def test_a_cache_that_is_shared_gives_no_fit_that_was_made_on_another_tokenizers_tokens(tmp_path):
    def fitted(cache, model):
        settings = [
            "data.limit_per_subject=1",
            "calibration.text=demo",
            "calibration.tokens=200",
            f"model.path={model}",
        ]
        config = load_config(None, [*settings, "data.perplexity_text=null"])
        worker, inputs = ModelWorker(config, roles=(CALIBRATION,), cache=cache), read_inputs(config, (CALIBRATION,))
        plan = tail_plan(worker.checkpoint.n_layers, [0.5], name="x", kind="found")
        (found,) = worker.refit_tensors(replace(plan, refit=refit_of(config, inputs, "scale"))).values()
        return found["mlp.down_proj.weight"].tolist()

    other = with_another_tokenizer(tmp_path / "model")
    expected = fitted(tmp_path / "own", other)
    assert fitted(tmp_path / "shared", "demo") != expected
    assert fitted(tmp_path / "shared", other) == expected


def test_a_cache_that_is_shared_gives_no_fit_of_units_that_were_matched_otherwise(tmp_path):
    def fitted(cache, questions):
        settings = ["data.perplexity_tokens=500", "calibration.text=demo", "calibration.tokens=200"]
        config = load_config(None, ["data.subjects=colour_mixing", f"data.limit_per_subject={questions}", *settings])
        worker = ModelWorker(config, roles=(SEARCH, CALIBRATION), cache=cache)
        plan = tail_plan(worker.checkpoint.n_layers, [0.5], name="x", kind="found", alignment="activations")
        (found,) = worker.refit_tensors(replace(plan, refit=Refit("linear", ridge=1.0))).values()
        return found["mlp.down_proj.weight"].tolist()

    few, more = fitted(tmp_path / "few", 1), fitted(tmp_path / "more", 2)
    assert few != more and fitted(tmp_path / "few", 2) == more


def test_text_and_base_model_do_not_depend_on_the_trunk(worker, whole):
    base = base_plan(worker.checkpoint.n_layers)
    shards = range(len(worker.prompts.shards(TEXT)))
    with_trunk = [worker.text_nll((base, number)) for number in shards]
    without = [whole.text_nll((base, number)) for number in shards]
    np.testing.assert_allclose([part.nll for part in with_trunk], [part.nll for part in without], rtol=1e-6)
    # 1,300 tokens are windows of 1,024 and 276, whose first tokens are not scored.
    assert sum(part.tokens.sum() for part in with_trunk) == 1298


def test_prompts_longer_than_the_model_s_context_are_refused_and_windows_of_text_shortened(tmp_path, monkeypatch):
    """Rotary positions go on beyond what a model was trained on, and nothing would tell."""
    settings = ["data.limit_per_subject=1", "data.perplexity_tokens=300"]
    worker = ModelWorker(load_config(None, settings), roles=(SEARCH,), cache=tmp_path)
    (shard,) = worker.prompts.shards(TEXT)
    assert [len(ids) for ids in shard.groups[0].sequences] == [300]
    worker = ModelWorker(load_config(None, settings), roles=(SEARCH,), cache=tmp_path)
    monkeypatch.setattr(worker.checkpoint.config, "max_position_embeddings", 64)
    with pytest.raises(PromptError, match=r"a prompt of \w+ has \d+ tokens, but the context of .* is 64 .*data.shots"):
        worker.prompts.of(SEARCH)
    groups = [group for shard in worker.prompts.shards(TEXT) for group in shard.groups]
    assert sorted(len(ids) for group in groups for ids in group.sequences) == [44, 64, 64, 64, 64]


def test_logits_that_are_not_finite_answer_nothing(tmp_path, monkeypatch):
    """The largest of four NaN is the first: an A, with an accuracy and a p-value."""
    settings = ["data.limit_per_subject=1", "data.subjects=number_words", "search.objective=micro_accuracy"]
    worker = ModelWorker(load_config(None, settings), roles=(SEARCH,), cache=tmp_path)
    plan = base_plan(worker.checkpoint.n_layers)
    monkeypatch.setattr(worker.runner.vocabulary, "normalise", lambda x: torch.full_like(x, torch.nan))
    with pytest.raises(NotFiniteError, match=r"plan base on 1 of 1 questions .* not finite in float32: .*model.dtype"):
        worker.answers((plan, SEARCH, None, False))
    result, answers = worker.judge(plan)
    assert answers is None and trial_outcome(result)["status"] == "failed"
    assert trial_outcome(result)["value"] is None and "not finite" in trial_outcome(result)["error"]


def test_answers_of_which_some_are_not_finite_are_none(worker, monkeypatch):
    """Stored, the largest of four NaN would be an A."""
    plan = tail_plan(worker.checkpoint.n_layers, [0.5] * MERGES, name="x", kind="found")
    answers = worker.answers((plan, SEARCH, None, False))
    assert worker.judge(plan)[1] is not None
    bad = replace(answers, logits=np.where(np.arange(answers.logits.size).reshape(-1, 4) == 6, np.nan, answers.logits))
    monkeypatch.setattr(worker, "_answers", lambda *_: bad)
    result, stored = worker.judge(plan)
    assert stored is None and trial_outcome(result)["status"] == "failed"


def test_the_best_of_a_descent_is_judged_as_a_candidate_is_and_what_is_on_the_disk_is_not_repeated(worker, monkeypatch):
    monkeypatch.setattr(worker, "config", load_config(None, [*SETTINGS, "gradient.epochs=2"]))
    starts = [[0.5] * MERGES, [0.3, 0.9, 0.5, 0.7, 0.4]]
    results = worker.descend(starts, "simplex")
    for start, result in zip(starts, results, strict=True):
        assert [epoch.epoch for epoch in result["history"]] == [0, 1, 2]
        np.testing.assert_allclose(result["history"][0].alphas, start, atol=1e-6)
        (again,) = worker.score([result["alphas"]])
        assert again["value"] == pytest.approx(result["value"], abs=1e-5) and result["seconds"] > 0
        np.testing.assert_allclose(again["logits"], result["logits"], atol=2e-4)
    taken = []

    def descend(loss, settings, *, state, on_epoch, stops):
        taken.append((loss.identity, settings.parametrisation, state is not None))
        raise KeyboardInterrupt

    monkeypatch.setattr("raymerge.worker.descend", descend)
    other = [0.5, 0.5, 0.5, 0.5, 0.25]
    for start, kind in ((starts[1], "simplex"), (other, "simplex"), (starts[1], "per_matrix")):
        with pytest.raises(KeyboardInterrupt):
            worker.descend([start], kind)
    assert [entry[1:] for entry in taken] == [("simplex", True), ("simplex", False), ("per_matrix", False)]


def test_a_descent_of_many_times_a_call_s_limit_is_done_in_as_many_calls(worker, monkeypatch, tmp_path):
    """A call longer than workers.timeout_s counts as a worker that hangs, and a third one as a failure."""
    monkeypatch.setattr(worker, "config", load_config(None, [*SETTINGS, "gradient.epochs=3"]))
    start = [0.5, 0.5, 0.25, 0.5, 0.5]
    monkeypatch.setattr(worker, "cache", tmp_path / "whole")
    (whole,) = worker.descend([start], "simplex")
    short = load_config(None, [*SETTINGS, "gradient.epochs=3", "workers.timeout_s=1e-6"])
    monkeypatch.setattr(worker, "config", short)
    monkeypatch.setattr(worker, "cache", tmp_path / "cut")
    for _ in range(2):
        (result,) = worker.descend([start], "simplex")
        assert result["unfinished"] and result["seconds"] > 0
    (result,) = worker.descend([start], "simplex")
    assert "unfinished" not in result and result["alphas"] == whole["alphas"]
    assert [epoch.loss for epoch in result["history"]] == [epoch.loss for epoch in whole["history"]]


@pytest.mark.parametrize(
    ("objective", "of_reference", "of_text"),
    [("answer_nll", False, False), ("answer_kl", True, False), ("answer_nll+0.1*text_nll", False, True)],
)
def test_a_descent_is_given_what_its_objective_takes(objective, of_reference, of_text, tmp_path, monkeypatch):
    settings = [*SETTINGS[:1], "data.perplexity_tokens=300", "search.text=demo", "search.text_tokens=100"]
    template = tail_plan(Checkpoint("demo").n_layers, [0.5] * 2, name="candidate", kind="found")
    config = load_config(None, [*settings, "data.subjects=number_words", f"search.objective={objective}"])
    worker = ModelWorker(config, roles=(SEARCH,), cache=tmp_path, template=template, firsts=[template.resumes_at])
    given = []
    monkeypatch.setattr("raymerge.worker.TailLoss", lambda *args, **options: given.append((args, options)))
    worker._loss_of(template, worker._drawn_text)
    (((scorer, start, _), options),) = given
    assert scorer is worker._scorer(SEARCH, template) and start is template and options["sources"] is None
    assert (options["reference"] is not None, options["text"] is not None) == (of_reference, of_text)
    if of_reference:
        np.testing.assert_array_equal(options["reference"], worker.reference)


def test_a_candidate_that_is_asked_no_questions_has_no_answers(tmp_path):
    settings = ["data.mmlu=null", "search.objective=text_nll", "search.text=demo", "search.text_tokens=100"]
    settings += ["data.perplexity_tokens=300", "output.store_candidate_answers=true", "gradient.epochs=1"]
    template = tail_plan(Checkpoint("demo").n_layers, [0.5] * 2, name="candidate", kind="found")
    config = load_config(None, settings)
    worker = ModelWorker(config, roles=(SEARCH_TEXT,), cache=tmp_path, template=template, firsts=[template.resumes_at])
    (found,) = worker.score([[0.25, 0.75]])
    (descended,) = worker.descend([[0.25, 0.75]], "simplex")
    for result in (found, descended):
        assert "logits" not in result and result["n_questions"] == 0 and result["nll"] is None
    plan = template.with_alphas([0.25, 0.75], name="x", kind="found")
    assert found["value"] == pytest.approx(worker.search_text_nll(plan)) == pytest.approx(np.log(found["perplexity"]))
    assert worker.judge(plan) == ({key: found[key] for key in worker.judge(plan)[0]}, None)


def test_no_more_than_two_scorers_are_held_and_sources_only_of_these(whole, tmp_path):
    n_layers = whole.checkpoint.n_layers
    few = load_config(None, [*SETTINGS, "data.subjects=number_words"])
    worker = ModelWorker(few, roles=ROLES, cache=tmp_path, firsts=[n_layers - 3, n_layers - 2])
    two, one = (tail_plan(n_layers, [0.5] * merges, name="x", kind="found") for merges in (2, 1))
    first = worker._scorer(SEARCH, two)
    assert worker._scorer(SEARCH, two) is first
    worker._scorer(REPORT, two)
    assert list(worker._scorers) == [(SEARCH, n_layers - 3), (REPORT, n_layers - 3)]
    worker._scorer(SEARCH, one)
    assert list(worker._scorers) == [(REPORT, n_layers - 3), (SEARCH, n_layers - 2)]
    worker._scorer(REPORT, one)
    assert list(worker._sources) == [n_layers - 2]
    # Without states of its own first layer a plan has no scorer; it is run from the deepest that there are before it.
    three = tail_plan(n_layers, [0.5] * 3, name="x", kind="found")
    assert worker._scorer(SEARCH, three) is None is worker._trunk_of(three)
    dropped = drop_block_plan(n_layers, n_layers - 3, 1)
    assert (
        worker._trunk_of(dropped).first == n_layers - 3 and worker._trunk_of(base_plan(n_layers)).first == n_layers - 2
    )
    assert worker._scorer(SEARCH, dropped) is None


def test_rows_that_were_matched_are_kept_for_every_worker_of_the_machine(worker, monkeypatch):
    plan = tail_plan(worker.checkpoint.n_layers, [0.5], name="x", kind="found", alignment="rows")
    before = set(worker.cache.rglob("*"))
    worker.align_rows(plan)
    assert set(worker.cache.rglob("*")) > before


def test_trunk_states_are_computed_once(worker):
    worker.compute_trunk((REPORT, 0))
    (trunk,) = worker._trunks.values()
    path = trunk.path(worker.prompts.shards(REPORT)[0])
    written = path.stat().st_mtime_ns
    assert worker.compute_trunk((REPORT, 0)) == worker.shard_tokens(REPORT)[0]
    assert path.stat().st_mtime_ns == written


def test_the_room_that_states_take_is_known_before_they_are_computed(tmp_path):
    template = tail_plan(Checkpoint("demo").n_layers, [0.5] * MERGES, name="candidate", kind="found")
    firsts = (template.resumes_at - 2, template.resumes_at)
    new = ModelWorker(
        load_config(None, SETTINGS), roles=(SEARCH,), cache=tmp_path / "new", template=template, firsts=firsts
    )
    needed, free, folder = new.trunk_room([SEARCH])
    assert folder == str(tmp_path / "new")
    assert 0 < free <= shutil.disk_usage(tmp_path).total and not (tmp_path / "new").exists()
    for number in range(len(new.shard_tokens(SEARCH))):
        new.compute_trunk((SEARCH, number))
    files = sorted((tmp_path / "new").glob("trunk-*"))
    assert sum(path.stat().st_size for path in files) == pytest.approx(needed, abs=4096 * len(files))  # and headers
    assert new.trunk_room([SEARCH])[0] == 0
    for path in files[::2]:
        path.unlink()
    assert new.trunk_room([SEARCH])[0] == needed / 2


def test_a_worker_tells_what_it_holds(worker):
    described = worker.describe()
    assert described["device"] == "cpu" and described["dtype"] == "float32"
    assert described["model_identity"] == worker.checkpoint.identity
    assert described["tokenizer_identity"] == worker.checkpoint.tokenizer_identity
    assert described["data_identities"][SEARCH] == worker.material.questions[SEARCH].identity


def test_a_block_s_first_layer_moves_a_candidate_and_each_starts_at_its_own_states(whole, tmp_path):
    n_layers, alphas = whole.checkpoint.n_layers, [0.3, 0.9, 0.5]
    options = {"kind": "found", "survivor": "after"}
    template = block_plan(n_layers, 2, [0.5] * 3, name="candidate", **options)
    worker = ModelWorker(CONFIG, roles=(SEARCH,), cache=tmp_path, template=template, firsts=[2, 9])
    results = worker.score([[2.0, *alphas], [9.0, *alphas], alphas])
    for result, first in zip(results, (2, 9, 2), strict=True):
        plan = block_plan(n_layers, first, alphas, name="x", **options)
        assert worker._trunk_of(plan).first == first
        answers = whole_answers(whole, plan)
        np.testing.assert_allclose(result["logits"], answers.logits, atol=2e-4)
    assert results[0]["value"] == pytest.approx(results[2]["value"], abs=1e-6)
    assert abs(results[0]["value"] - results[1]["value"]) > 1e-3


def test_calibration_is_on_tokens_of_its_own_and_its_loss_does_not_depend_on_the_trunk(whole, tmp_path):
    settings = ["data.perplexity_tokens=1300", "calibration.text=demo", "calibration.tokens=200"]
    worker = ModelWorker(load_config(None, settings), roles=(CALIBRATION,), cache=tmp_path, firsts=[4])
    (shard,) = worker.prompts.shards(CALIBRATION)
    text = whole.checkpoint.tokenizer(worker.material.calibration[0], add_special_tokens=False)["input_ids"]
    assert shard.groups[0].sequences[0].tolist() == text[1300:1500]
    plan = drop_block_plan(whole.checkpoint.n_layers, 4, 3)
    assert worker.calibration_nll((plan, 0)) == pytest.approx(text_nll(whole.runner, plan, shard), rel=1e-6)
    assert worker.state_distances(0)[2] == 200 == worker.shard_tokens(CALIBRATION)[0]
    assert CALIBRATION in worker.describe()["data_identities"]


def test_without_a_text_calibration_takes_prompts_of_the_search(whole, tmp_path):
    found = {}
    for tokens in (10, 4000, 10**6):
        config = CONFIG.model_copy(update={"calibration": CONFIG.calibration.model_copy(update={"tokens": tokens})})
        worker = ModelWorker(config, roles=(CALIBRATION,), cache=tmp_path)
        found[tokens] = worker.prompts.shards(CALIBRATION)
        assert CALIBRATION in worker.describe()["data_identities"] and not worker.material.questions
    every = {shard.identity for shard in whole.prompts.shards(SEARCH)}
    assert len(found[10]) == 1 and {shard.identity for shard in found[10**6]} == every
    assert all(shard.identity in every for shard in found[4000])
    assert sum(shard.tokens for shard in found[4000]) <= max(4000, found[10][0].tokens)


def test_a_model_too_large_for_its_share_of_a_gpu_is_refused_with_the_bytes(monkeypatch):
    checkpoint = Checkpoint("demo")
    layer = sum(checkpoint[name].numel() for name in checkpoint if name.startswith("model.layers.0."))
    stored = checkpoint.dtype.itemsize
    read, get = [], Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    every = checkpoint.n_layers * layer
    template = tail_plan(checkpoint.n_layers, [0.5] * MERGES, name="candidate", kind="found")
    assert weight_bytes(checkpoint, torch.bfloat16, None) == 2 * every
    needed = weight_bytes(checkpoint, torch.float16, template)
    assert needed == 2 * every + stored * (MERGES + 1) * layer
    folded = weight_bytes(checkpoint, torch.float16, replace(template, norms="fold"))
    assert folded == 2 * every + 4 * (MERGES + 1) * layer
    refuse_oversized(checkpoint, torch.float16, template, needed)
    assert not read, "a model is not read to be refused"
    with pytest.raises(TooLargeError, match=rf"float16 needs {needed / 1e9:.2f} GB .*has 0.00 GB free.*_worker: 1"):
        refuse_oversized(checkpoint, torch.float16, template, 1000)
    with pytest.raises(TooLargeError):
        refuse_oversized(checkpoint, torch.float16, template, needed - 1)
