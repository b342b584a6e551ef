"""role_prompts.py: which tokens each role takes, without a layer being run."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from raymerge import role_prompts
from raymerge.checkpoint import Checkpoint
from raymerge.config_file import load_config
from raymerge.context import retrieval_prompts
from raymerge.inputs import (
    CALIBRATION,
    REPORT,
    RETRIEVAL,
    SEARCH,
    SEARCH_TEXT,
    TEXT,
    Material,
    read_material,
    task_role,
)
from raymerge.objectives import TEXT_WINDOW
from raymerge.prompts import ChoicePrompts, Group, PromptError, Prompts, Shard
from raymerge.role_prompts import RolePrompts


def sequences(shards):
    return [ids.tolist() for shard in shards for group in shard.groups for ids in group.sequences]


def test_every_text_has_its_own_place_and_length(monkeypatch):
    """One text for three uses, which follow one another; each is begun and cut as the options say."""
    settings = ["data.perplexity_tokens=90", "search.objective=text_nll", "search.text=demo", "search.text_tokens=70"]
    settings += ["calibration.text=demo", "calibration.tokens=50"]
    checkpoint = Checkpoint("demo")
    monkeypatch.setattr(checkpoint.config, "max_position_embeddings", 64)
    text = read_material(load_config(None, settings), (SEARCH_TEXT,)).search_text[0]
    ids, bos = checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"], checkpoint.tokenizer.bos_token_id
    for add_bos in (False, True):
        config = load_config(None, [*settings, f"model.add_bos={str(add_bos).lower()}"])
        prompts = RolePrompts(config, read_material(config, (SEARCH_TEXT, CALIBRATION)), checkpoint)
        start = 0
        for role, length in ((TEXT, 90), (SEARCH_TEXT, 70), (CALIBRATION, 50)):
            windows = sequences(prompts.shards(role))
            assert max(map(len, windows)) <= 64 and {window[0] == bos for window in windows} == {add_bos}
            assert sorted(sum((window[add_bos:] for window in windows), [])) == sorted(ids[start : start + length])
            start += length


def test_calibration_takes_shards_of_the_prompts_as_they_are_drawn_while_they_fit(monkeypatch):
    tokens = [50, 40, 30, 20, 10, 60]
    shards = [SimpleNamespace(tokens=count) for count in tokens]

    def chosen(limit, seed):
        config = load_config(None, [f"calibration.tokens={limit}", f"calibration.seed={seed}"])
        prompts = RolePrompts(config, Material(calibration=object()), None)
        monkeypatch.setattr(prompts, "encode", lambda _: SimpleNamespace(shards=shards))
        return [shards.index(shard) for shard in prompts.shards(CALIBRATION)]

    for seed in range(5):
        order, expected, left = np.random.default_rng(seed).permutation(6), [], 100
        for number in order:
            if tokens[number] <= left:
                expected.append(number)
                left -= tokens[number]
        assert chosen(100, seed) == sorted(expected)
        assert chosen(2, seed) == [order[0]]  # one at least
        assert chosen(210, seed) == list(range(6))


def test_the_longest_prompt_decides_and_rows_are_told_shard_by_shard(monkeypatch):
    def group(subject, prefix, lengths, rows):
        return Group(subject, np.zeros(prefix, int), tuple(np.zeros(length, int) for length in lengths), rows)

    shards = (
        Shard((group("easy", 3, (2, 4), (5, 2)), group("hard", 1, (7, 2), (1, 6)))),
        Shard((group("easy", 2, (1, 1), (4, 0)), group("hard", 0, (2,), (3,)))),
    )
    asked = []

    def encode(questions, tokenizer, **options):
        asked.append((questions, options))
        return Prompts(shards, (0, 1, 2, 3), np.zeros(7, np.int8))

    def encode_choices(task, tokenizer, **options):
        asked.append((task.name, options))
        return ChoicePrompts(shards, np.array([0, 2, 3, 5, 7]), np.ones(7, np.int64))

    monkeypatch.setattr(role_prompts, "encode_questions", encode)
    monkeypatch.setattr(role_prompts, "encode_task", encode_choices)

    def prompts(context):
        checkpoint = SimpleNamespace(
            tokenizer=None, config=tiny.config_of("llama", max_position_embeddings=context), directory=Path("m")
        )
        tasks = {"t": SimpleNamespace(name="t")}
        material = Material(questions={SEARCH: "searched", REPORT: "reported"}, tasks=tasks)
        return RolePrompts(load_config(None, ["model.add_bos=true"]), material, checkpoint, shards=3)

    found = prompts(8)
    assert found.shard_rows(REPORT) == [[1, 2, 5, 6], [0, 3, 4]] and found.of(REPORT) is found.of(REPORT)
    assert found.shards(SEARCH) == shards
    assert found.shard_rows(task_role("t")) == [[0, 1, 3], [0, 2]] and found.shards(task_role("t")) == shards
    options = {"add_bos": True, "shards": 3}
    assert asked == [(name, options) for name in ("reported", "searched", "t")]  # once each
    with pytest.raises(PromptError, match=r"a prompt of hard has 8 tokens, but the context of m is 7 .*\(data.shots"):
        prompts(7).of(SEARCH)
    with pytest.raises(PromptError, match=r"a prompt of hard has 8 tokens, but .*\(tasks.t.shots\)"):
        prompts(7).choices(task_role("t"))


def test_prompts_are_no_longer_than_rotary_frequencies_are_fixed(tmp_path):
    """Questions are refused, windows of text cut, and distances left out."""
    settings = ["data.mmlu=demo", "sweep.distances=[16, 32, 128]", "sweep.retrieval_prompts=3"]
    settings += ["data.perplexity_tokens=900", "calibration.text=demo", "calibration.tokens=300"]
    config = load_config(None, settings)
    material = read_material(config, (REPORT, CALIBRATION))
    for name in tiny.BOUNDED:
        checkpoint = Checkpoint(str(tiny.make_checkpoint(tmp_path / name, **tiny.bounded(name, 64))))
        prompts = RolePrompts(config, material, checkpoint)
        for role in (TEXT, CALIBRATION):
            assert max(map(len, sequences(prompts.shards(role)))) == 64
        assert set(prompts.retrieval.distances.tolist()) == {16, 32}
        assert max(map(len, sequences(prompts.shards(RETRIEVAL)))) <= 64
        kind = name.split("_")[1]
        said = rf"a prompt of .* but the context of {name} is 64 \(.*; longer prompts may have other .*, {kind}\): ask"
        with pytest.raises(PromptError, match=said):
            prompts.of(REPORT)


def test_retrieval_is_asked_at_the_distances_that_fit(monkeypatch):
    checkpoint = Checkpoint("demo")
    monkeypatch.setattr(checkpoint.config, "max_position_embeddings", 64)
    settings = ["sweep.distances=[16, 32, 128]", "sweep.retrieval_prompts=3", "data.seed=5", "model.add_bos=true"]
    found = RolePrompts(load_config(None, settings), Material(), checkpoint)
    expected = retrieval_prompts(checkpoint.tokenizer, distances=(16, 32), per_distance=3, seed=5, add_bos=True)
    assert sequences(found.shards(RETRIEVAL)) == sequences(expected.shards)
    assert found.retrieval.distances.tolist() == expected.distances.tolist()


def test_windows_of_a_model_of_long_context_are_no_longer_than_those_of_others_and_without_a_text_there_are_none(
    monkeypatch,
):
    checkpoint = Checkpoint("demo")
    monkeypatch.setattr(checkpoint.config, "max_position_embeddings", 100_000)
    found = RolePrompts(load_config(None, ["data.perplexity_tokens=3000"]), Material(), checkpoint)
    assert max(map(len, sequences(found.shards(TEXT)))) == TEXT_WINDOW < 3000 / 2
    without = RolePrompts(load_config(None, ["data.perplexity_text=null"]), Material(), checkpoint)
    assert without.shards(TEXT) == () == without.shards(SEARCH_TEXT)
