"""evaluation.py: losses of prompts and of plain text against transformers' own, and joining shares.

That its answers equal plain forwards for every family is in test_scoring.py, beside the scorer's.
"""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

import raymerge.evaluation
import raymerge.forward
from raymerge.checkpoint import Checkpoint
from raymerge.evaluation import Answers, NotFiniteError, answer_shard, score_choices, text_nll
from raymerge.forward import LayerRunner
from raymerge.plan import PlanError, base_plan, before_last_plan, drop_plan, tail_plan
from raymerge.prompts import Group, Prompts, Shard, encode_questions, encode_task, encode_text
from raymerge.questions import load_questions
from raymerge.rows import task_answer_table
from raymerge.scoring import TailScorer
from raymerge.tasks import Item, Task
from raymerge.trunk import TrunkCache

torch.set_num_threads(1)

LIMIT = 2e-5  # as in test_scoring.py: float32's roundoff amplified by the layers, as a part of the largest logit
N = tiny.N_LAYERS
PLANS = [base_plan(N), tail_plan(N, [0.3, 0.8], name="x", kind="found"), before_last_plan(N, 2), drop_plan(N, 4)]
REAL_MODEL, MMLU = os.environ.get("RAYMERGE_REAL_MODEL"), os.environ.get("RAYMERGE_MMLU")


@pytest.fixture(scope="module", params=["llama_biases", "mistral_window", "qwen2_windows", "qwen3"])
def case(request, tmp_path_factory):
    folder = tiny.make_checkpoint(tmp_path_factory.mktemp("m"), request.param)
    runner = LayerRunner(Checkpoint(str(folder)))
    return SimpleNamespace(
        runner=runner,
        base=AutoModelForCausalLM.from_pretrained(folder),
        trunk=TrunkCache(runner, N - 3, tmp_path_factory.mktemp("trunk")),
    )


@pytest.fixture(scope="module")
def questions():
    return tiny.make_questions({"cats": 3, "roads": 3, "boxes": 1})


def own_loss(model, group, sequence):
    """transformers' loss over the sequence's own tokens: the prefix is masked by labels of -100."""
    ids = torch.from_numpy(np.concatenate([group.prefix, sequence]))[None]
    labels = ids.clone()
    labels[0, : len(group.prefix)] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels, use_cache=False).loss.item()


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_prompt_losses_are_transformers_losses(case, questions, plan):
    prompts = encode_questions(questions, tiny.demo_tokenizer(), shard_tokens=300)
    merged = tiny.merged_model(case.base, tiny.steps_of(plan))
    scale = max(
        tiny.plain_logits(merged, ids).abs().max() for ids in tiny.whole_prompts(questions, tiny.demo_tokenizer())
    )
    for trunk in (None, case.trunk):
        for shard in prompts.shards:
            found = answer_shard(case.runner, plan, prompts, shard, trunk=trunk, prompt_nll=True)
            assert found.prompt_nll.dtype == np.float64
            by_row = dict(
                zip(found.rows.tolist(), zip(found.prompt_nll, found.prompt_tokens, strict=True), strict=True)
            )
            for group in shard.groups:
                for row, ids in zip(group.rows, group.sequences, strict=True):
                    nll, tokens = by_row[row]
                    assert tokens == len(ids)
                    assert abs(nll - own_loss(merged, group, ids)) < LIMIT * scale


def test_losses_that_were_not_asked_for(case, questions):
    prompts = encode_questions(questions, tiny.demo_tokenizer())
    found = answer_shard(case.runner, PLANS[1], prompts, prompts.shards[0])
    assert np.isnan(found.prompt_nll).all() and (found.prompt_tokens > 0).all()


def test_without_a_prefix_the_first_token_has_no_loss(case):
    rng = np.random.default_rng(0)
    group = Group(
        "a",
        np.zeros(0, np.int64),
        (rng.integers(5, 800, 20), rng.integers(5, 800, 2), rng.integers(5, 800, 1)),
        (0, 1, 2),
    )
    shard = Shard((group,))
    prompts = Prompts((shard,), (5, 6, 7, 8), np.zeros(3, np.int8))
    found = answer_shard(case.runner, base_plan(N), prompts, shard, prompt_nll=True)
    model = tiny.merged_model(case.base, [])
    assert np.isnan(found.prompt_nll[2]) and found.prompt_tokens.tolist() == [20, 2, 1]
    for row, ids in enumerate(group.sequences[:2]):
        assert abs(found.prompt_nll[row] - own_loss(model, group, ids)) < LIMIT * 50


def test_whether_the_most_probable_token_is_one_of_the_letters(case, questions):
    """Random models never prefer real letters, so other tokens play them: the top token of one prompt among others."""
    tokenizer = tiny.demo_tokenizer()
    prompts = encode_questions(questions, tokenizer, shard_tokens=10**6)
    merged = tiny.merged_model(case.base, [])
    *_, top = tiny.plain_answers(merged, tiny.whole_prompts(questions, tokenizer), prompts.letters)
    unused = [token for token in range(5, 50) if token not in top][:3]
    for place in range(4):
        letters = (*unused[:place], int(top[place]), *unused[place:])
        played = Prompts(prompts.shards, letters, prompts.answers)
        found = answer_shard(case.runner, base_plan(N), played, played.shards[0])
        assert found.top_is_letter.tolist() == (top == top[place]).tolist()


# -- plain text ------------------------------------------------------------------------------------------------------

TEXT = " ".join(np.random.default_rng(5).choice(tiny.WORDS, 400))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize(("window", "limit"), [(64, 300), (1024, None)])
def test_text_losses_are_transformers_losses_window_by_window(case, plan, window, limit, monkeypatch):
    """Windows of text are longer than the models' attention windows of 11 and 40."""
    tokenizer = tiny.demo_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:limit]
    merged = tiny.merged_model(case.base, tiny.steps_of(plan))
    total = scored = 0
    for start in range(0, len(ids), window):
        part = torch.tensor(ids[start : start + window])[None]
        if part.shape[1] > 1:
            with torch.no_grad():
                loss = merged(input_ids=part, labels=part, use_cache=False).loss.item()
            scored += part.shape[1] - 1
            total += loss * (part.shape[1] - 1)
    shards = encode_text(TEXT, tokenizer, limit=limit, window=window)
    for trunk, piece in ((None, 512), (case.trunk, 7)):
        monkeypatch.setattr(raymerge.evaluation, "_TEXT_TOKENS", piece)
        found = [text_nll(case.runner, plan, shard, trunk=trunk) for shard in shards]
        assert sum(tokens for _, tokens in found) == scored
        # Each token's loss is as exact as a logit; logits of these models stay below 50.
        assert abs(sum(nll for nll, _ in found) - total) < LIMIT * 50 * scored


def test_plans_that_do_not_fit_are_refused(case, questions):
    prompts = encode_questions(questions, tiny.demo_tokenizer())
    with pytest.raises(PlanError, match="the plan is for 6 layers"):
        answer_shard(case.runner, drop_plan(6, 2), prompts, prompts.shards[0])
    with pytest.raises(PlanError, match="the plan is for 6 layers"):
        text_nll(case.runner, drop_plan(6, 2), encode_text("the red cat", tiny.demo_tokenizer())[0])


# -- choices of tasks ------------------------------------------------------------------------------------------------


def make_task(shots):
    """Five items of 2 to 4 choices; one choice begins as another does, and one is a single token."""
    rng = np.random.default_rng(3)

    def words(n):
        return " ".join(rng.choice(tiny.WORDS, n))

    items = [Item(f"t/{i}", words(int(rng.integers(3, 50))), (words(1), words(9), words(4)), 1) for i in range(4)]
    start = words(3)
    items.append(Item("t/4", words(20), (start, f"{start} and", "cat", words(6)), 2))
    return Task("t", True, tuple(items), tuple(Item(f"t/e{i}", words(30), ("box", "road"), 1) for i in range(shots)))


def likelihoods(case, plan, prompts, trunk=None):
    parts = [score_choices(case.runner, plan, prompts, shard, trunk=trunk) for shard in prompts.shards]
    assert all((np.diff(rows) > 0).all() for rows, _ in parts)
    found = dict(pair for part in parts for pair in zip(*part, strict=True))
    return np.array([found[row] for row in range(len(prompts.scored))])


@pytest.mark.parametrize("plan", PLANS[:2], ids=lambda plan: plan.name)
@pytest.mark.parametrize("shots", [0, 2])
def test_log_likelihoods_are_transformers_losses_of_the_choice(case, plan, shots):
    """Labels of -100 mask the context, as in the test of prompts."""
    tokenizer, task = tiny.demo_tokenizer(), make_task(shots)
    merged = tiny.merged_model(case.base, tiny.steps_of(plan))
    expected, scale = [], 0.0
    for item in task.items:
        for choice in item.choices:
            before = tokenizer(task.prefix + item.context, add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{task.prefix}{item.context} {choice}", add_special_tokens=False)["input_ids"]
            assert whole[: len(before)] == before
            ids = torch.tensor(whole)[None]
            labels = ids.clone()
            labels[0, : len(before)] = -100
            with torch.no_grad():
                out = merged(input_ids=ids, labels=labels, use_cache=False)
            expected.append(-out.loss.item() * (len(whole) - len(before)))
            scale = max(scale, out.logits.abs().max().item() * (len(whole) - len(before)))
    for trunk in (None, case.trunk):
        found = likelihoods(case, plan, encode_task(task, tokenizer, shard_tokens=150), trunk)
        assert found.dtype == np.float64 and np.abs(found - expected).max() < LIMIT * scale


def test_log_likelihoods_that_are_no_numbers_are_refused(case, monkeypatch):
    monkeypatch.setattr(raymerge.evaluation, "_token_nll", lambda runner, states, ids: np.full(len(ids), np.nan))
    task = encode_task(make_task(0), tiny.demo_tokenizer())
    with pytest.raises(NotFiniteError, match="log-likelihoods of choices under plan base are not finite"):
        score_choices(case.runner, base_plan(N), task, task.shards[0])


def test_answers_of_letters_alone_say_nothing_of_the_vocabulary():
    found = Answers.of_letters(np.zeros((3, 4), dtype=np.float32))
    assert found.rows.tolist() == [0, 1, 2] and found.prompt_tokens.tolist() == [0, 0, 0]
    assert not found.top_is_letter.any() and np.isnan([found.logsumexp, found.prompt_nll]).all()


def test_batches_and_padding_never_change_an_answer(case, questions, monkeypatch):
    """One sequence at a time, a few, and all of them padded to the longest; in many shards and in one."""
    tokenizer, plan = tiny.demo_tokenizer(), PLANS[1]
    answers, choices = [], []
    for batch, shard_tokens in ((1, 60), (150, 400), (10**6, 10**6)):
        monkeypatch.setattr(raymerge.forward, "_BATCH_TOKENS", batch)
        prompts = encode_questions(questions, tokenizer, shard_tokens=shard_tokens)
        answers.append(Answers.join(answer_shard(case.runner, plan, prompts, shard) for shard in prompts.shards))
        for shots in (0, 2):
            choices.append(likelihoods(case, plan, encode_task(make_task(shots), tokenizer, shard_tokens=shard_tokens)))
    scale = np.abs(answers[0].logits).max()
    for other in answers[1:]:
        assert (other.logits.argmax(-1) == answers[0].logits.argmax(-1)).all()
        assert np.abs(other.logits - answers[0].logits).max() < LIMIT * scale
    for number, other in enumerate(choices[2:]):
        # Sums over up to nine tokens.
        np.testing.assert_allclose(other, choices[number % 2], atol=9 * LIMIT * scale)
        table = [task_answer_table("p", make_task(0), np.arange(5), each) for each in (other, choices[number % 2])]
        for column in ("predicted", "predicted_norm"):
            assert table[0][column].equals(table[1][column])


def test_what_is_predicted_of_log_likelihoods():
    """By hand: the likeliest, per character, ties to the first, and an empty choice never per character."""
    items = [
        Item("t/0", "c", ("abcd", "ab", "a"), 0),  # per character -1, -1.5, -5
        Item("t/1", "c", ("ab", "cd"), 1),  # a tie
        Item("t/2", "c", ("", "é"), 1),  # one character, two bytes
    ]
    values = np.array([-4.0, -3.0, -5.0, -2.0, -2.0, -0.5, -6.0])
    rows = task_answer_table("p", Task("t", True, tuple(items), ()), np.arange(3), values).to_pylist()
    assert [(row["predicted"], row["predicted_norm"]) for row in rows] == [(1, 0), (0, 0), (0, 1)]
    assert rows[2]["lengths"] == [0.0, 1.0] and rows[0]["log_likelihoods"] == [-4.0, -3.0, -5.0]
    (row,) = task_answer_table("p", Task("t", False, tuple(items), ()), np.array([1]), values[3:5]).to_pylist()
    assert row["item_id"] == "t/1" and row["predicted_norm"] is None
    with pytest.raises(ValueError, match="3 log-likelihoods for 1 items with 2 choices"):
        task_answer_table("p", Task("t", False, tuple(items), ()), np.array([1]), values[:3])


# -- joining ---------------------------------------------------------------------------------------------------------


def part(rows):
    rows = np.array(rows)
    return Answers(rows, np.repeat(rows[:, None], 4, 1) + 0.5, rows * 2.0, rows % 2 == 0, rows * 3.0, rows * 4)


def test_joined_shares_are_in_row_order():
    joined = Answers.join([part([5, 2]), part([0]), part([4, 1, 3])])
    expected = part(range(6))
    for name in Answers.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(joined, name), getattr(expected, name))
    assert joined.logits.shape == (6, 4)
    again = Answers.join(iter([joined]))
    np.testing.assert_array_equal(again.rows, np.arange(6))


# -- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.skipif(
    not (REAL_MODEL and MMLU), reason="RAYMERGE_REAL_MODEL (a checkpoint) and RAYMERGE_MMLU (its CSVs) are not both set"
)
def test_a_real_model_on_real_questions(tmp_path):
    """Scorer and evaluation against transformers' float32 forward of the saved merge, whole prompts one at a time."""
    checkpoint = Checkpoint(REAL_MODEL)
    runner = LayerRunner(checkpoint)
    questions = load_questions(MMLU, subjects="anatomy,astronomy").sampled(2, 0)
    prompts = encode_questions(questions, checkpoint.tokenizer)
    plan = tail_plan(checkpoint.n_layers, [0.6, 0.3, 0.8], name="x", kind="found")
    tiny.save_merge(checkpoint, plan, tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()

    rows = {
        row: torch.from_numpy(np.concatenate([group.prefix, ids]))[None]
        for shard in prompts.shards
        for group in shard.groups
        for row, ids in zip(group.rows, group.sequences, strict=True)
    }
    with torch.no_grad():
        last = torch.stack([saved(input_ids=rows[row], use_cache=False).logits[0, -1] for row in range(4)])
    expected = last[:, list(prompts.letters)].numpy()
    right_tokens = torch.tensor([prompts.letters[answer] for answer in prompts.answers])
    losses = F.cross_entropy(last, right_tokens, reduction="none")

    trunk = TrunkCache(runner, checkpoint.n_layers - 4, Path(tmp_path) / "trunk")
    logits, logsumexp, top = TailScorer(trunk, prompts).score(plan)
    whole = Answers.join(answer_shard(runner, plan, prompts, shard, trunk=trunk) for shard in prompts.shards)
    for found in (logits.numpy(), whole.logits):
        assert np.abs(found - expected).max() < 1e-3
        assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert torch.equal(top, last.argmax(-1))
    right = logits[torch.arange(4), torch.from_numpy(prompts.answers).long()]
    assert (logsumexp - right - losses).abs().max() < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_neox"])
def test_generation_is_timed_with_the_stored_weights(tmp_path, monkeypatch, family):
    """Random weights first, and converted copies of all beside the model, took 14 GB for a 1.5B, and 87 s."""
    folder = tiny.make_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    load, made = PreTrainedModel.from_pretrained.__func__, []

    def loaded(cls, *args, **options):
        made.append((options["state_dict"], *load(cls, *args, **options, output_loading_info=True)))
        return made[-1][1]

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loaded))
    checkpoint = Checkpoint(str(folder))
    assert raymerge.evaluation.generation_speed(checkpoint, 3, tokens=2, dtype=torch.float32) > 0
    ((state, model, report),) = made
    assert not any(report.values()) and model.config.num_hidden_layers == 3
    mapped = {checkpoint[name].data_ptr() for name in checkpoint}
    assert {tensor.data_ptr() for tensor in state.values()} < mapped  # nothing is converted beforehand
    monkeypatch.undo()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **tiny.PLAIN)
    inner = whole.base_model
    inner.layers = inner.layers[:3]
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
        assert (model(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_generation_is_timed_from_token_to_token(monkeypatch, caplog):
    """A first call that takes longer than what is timed made two tokens in 1e-9 s: 2,000,000,000 tokens a second."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ticks = iter([0.0, 8.0, 9.0, 18.0, 20.0, 20.5, 21.0])
    monkeypatch.setattr(raymerge.evaluation, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    speed = raymerge.evaluation.generation_speed(Checkpoint("demo"), 2, tokens=4, dtype=torch.float32)
    assert speed == 4 / (21.0 - 9.0)  # two tokens to warm up, then five, of which the first is not timed
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
    assert not warned  # an end of text of -1, so that none comes, was warned of in every worker's log
