"""The embedded demo: its size, its questions and text, its tokenizer, and a checkpoint that answers."""

import calendar
import csv
from collections import Counter
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymerge.demo import MMLU_PATH, MODEL_PATH, TEXT_PATH, build, train
from raymerge.demo.batches import question_batches, statement_windows
from raymerge.demo.generator import (
    LANGUAGES,
    SPLIT_SIZES,
    SUBJECTS,
    draw_question,
    draw_splits,
    header,
    held_out,
    held_out_text,
    prompt,
    write_questions,
)
from raymerge.demo.model import Shape, StackedLlama, split_layers, to_transformers
from raymerge.demo.optimizer import Muon, orthogonalise
from raymerge.demo.tokenizer import make_tokenizer
from raymerge.demo.train import Phase, Trainer, first_model


@pytest.fixture(scope="module")
def splits():
    return draw_splits()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def built():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_rows(language, split, subject):
    path = MMLU_PATH / language / split / f"{subject}_{split}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_demo_takes_at_most_8_megabytes():
    files = [TEXT_PATH, *MODEL_PATH.rglob("*"), *MMLU_PATH.rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 8_000_000
    assert {path.name for path in MODEL_PATH.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("split", SPLIT_SIZES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_csv_rows_have_the_original_layout_and_are_parallel(subject, split):
    tables = [read_rows(language, split, subject) for language in LANGUAGES]
    for rows in tables:
        assert len(rows) == SPLIT_SIZES[split]
        for row in rows:
            assert len(row) == 6 and all(row) and row[5] in "ABCD"
            assert len(set(row[1:5])) == 4
    assert len({tuple(row[5] for row in rows) for rows in tables}) == 1


@pytest.mark.parametrize("subject", SUBJECTS)
def test_splits_share_no_question_with_the_same_options(splits, subject):
    contents = [question.content for rows in splits[subject].values() for question in rows]
    assert len(set(contents)) == len(contents) == sum(SPLIT_SIZES.values())
    for language in LANGUAGES:
        written = [row for split in SPLIT_SIZES for row in read_rows(language, split, subject)]
        assert len({(row[0], frozenset(row[1:5])) for row in written}) == len(written)


def test_training_sequences_leave_out_the_held_questions(splits, built):
    held = held_out(splits)
    subject = "days_of_the_week"  # 70 contents of 24 orders: the held-out questions come up often.
    forbidden = {prompt(question, language, with_answer=True) for question in held for language in LANGUAGES}
    assert any(draw_question(rng, subject) in held for rng in [Random(1)] for _ in range(200))
    batches = question_batches(built, Random(1), held, {subject: 1.0}, size=100, length=136)
    for row in next(batches).tokens.tolist():
        blocks = built.decode(row, skip_special_tokens=True).split("\n\n")
        assert not any(block + "\n\n" in forbidden for block in blocks)


def test_generator_regenerates_the_shipped_files(splits, tmp_path):
    write_questions(tmp_path, splits)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.csv")}
    shipped = {path.relative_to(MMLU_PATH): path.read_bytes() for path in MMLU_PATH.rglob("*.csv")}
    assert made == shipped and len(made) == len(SUBJECTS) * len(LANGUAGES) * len(SPLIT_SIZES)
    assert TEXT_PATH.read_text(encoding="utf-8") == held_out_text()
    assert draw_splits(1) != splits and held_out_text(1) != held_out_text()


def test_right_option_is_right(splits):
    for question in splits["elementary_addition"]["test"]:
        assert sum(int(words[0]) for words in question.arguments) == int(question.options[question.answer][0])
    example = Random(3)
    assert draw_question(example, "country_capitals") == draw_question(Random(3), "country_capitals")
    with pytest.raises(ValueError, match="unknown subject 'astrology'"):
        draw_question(example, "astrology")


NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS, MONTHS = list(calendar.day_name), list(calendar.month_name)[1:]


@pytest.mark.parametrize(
    ("subject", "is_right"),
    [
        ("elementary_addition", lambda asked, option: int(option) == int(asked[2]) + int(asked[4])),
        ("elementary_subtraction", lambda asked, option: int(option) == int(asked[2]) - int(asked[4])),
        ("number_words", lambda asked, option: NUMBERS[int(option)] == asked[3]),
        ("alphabetical_order", lambda asked, option: ord(option) == ord(asked[4]) + 1),
        ("days_of_the_week", lambda asked, option: DAYS.index(option) == (DAYS.index(asked[4]) + 1) % 7),
        ("months_of_the_year", lambda asked, option: MONTHS.index(option) == (MONTHS.index(asked[4]) + 1) % 12),
        ("letter_membership", lambda asked, option: option in asked[4:]),
    ],
)
def test_one_option_alone_is_right_and_it_is_the_one_that_is_named(subject, is_right):
    """By what is known of numbers, letters and the calendar; the letters of the answers are drawn evenly."""
    named = Counter()
    for split in SPLIT_SIZES:
        for stem, *options, letter in read_rows("en", split, subject):
            asked = stem.removesuffix("?").split()
            assert "".join("ABCD"[i] for i, option in enumerate(options) if is_right(asked, option)) == letter, stem
            named[letter] += 1
    assert set(named) == set("ABCD") and max(named.values()) <= 30  # of 65


def test_numbers_are_compared_and_words_have_one_partner_each():
    for stem, *options, letter in (row for split in SPLIT_SIZES for row in read_rows("en", split, "number_comparison")):
        most = (max if "largest" in stem else min)(options, key=NUMBERS.index)
        assert options["ABCD".index(letter)] == most
    pairs = {}
    for subject, asked in (("word_opposites", 5), ("country_capitals", 5)):
        for stem, *options, letter in (row for split in SPLIT_SIZES for row in read_rows("en", split, subject)):
            word, right = stem.removesuffix("?").split()[asked], options["ABCD".index(letter)]
            assert pairs.setdefault((subject, word), right) == right
    opposites = {word: right for (subject, word), right in pairs.items() if subject == "word_opposites"}
    assert all(opposites.get(right, word) == word for word, right in opposites.items()) and len(pairs) > 30


def test_prompt_is_the_published_format(splits):
    question = splits["days_of_the_week"]["test"][0]
    stem, options = question.render("es")
    expected = f"{stem}\nA. {options[0]}\nB. {options[1]}\nC. {options[2]}\nD. {options[3]}\nAnswer:"
    assert prompt(question, "es", with_answer=False) == expected
    assert prompt(question, "es", with_answer=True) == expected + f" {'ABCD'[question.answer]}\n\n"
    assert header("days_of_the_week") == (
        "The following are multiple choice questions (with answers) about days of the week.\n\n"
    )


@pytest.mark.parametrize(
    "text",
    ["The opposite of hot is cold.", "héllo wörld 日本\t\r\n  🎉 a\u0301", "", " A", "x\u00a0y  z ", "12345 + 6,7"],
)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_tokenizer_has_special_tokens_and_adds_none(tokenizer):
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [
        0,
        1,
        2,
        3,
    ]
    assert not set(tokenizer("Answer: A").input_ids) & {0, 1, 2, 3}
    assert tokenizer.is_fast


def test_tokenizer_of_the_checkpoint_is_the_built_one(tokenizer, built):
    assert tokenizer.get_vocab() == built.get_vocab()


def test_letter_is_one_token_and_prefix_and_question_tokenise_apart(tokenizer, splits):
    for subject in SUBJECTS:
        for language in LANGUAGES:
            examples = "".join(prompt(q, language, with_answer=True) for q in splits[subject]["dev"])
            prefix, question = (
                header(subject) + examples,
                prompt(splits[subject]["test"][0], language, with_answer=False),
            )
            whole = tokenizer(prefix + question).input_ids
            assert whole == tokenizer(prefix).input_ids + tokenizer(question).input_ids
            assert len(whole) < 140
            letters = [tokenizer(f"{prefix}{question} {letter}").input_ids for letter in "ABCD"]
            assert all(ids[:-1] == whole for ids in letters)
            assert len({ids[-1] for ids in letters}) == 4


def test_checkpoint_is_deep_enough_for_thirteen_merges(model, tokenizer):
    config = model.config
    assert config.model_type == "llama" and config.num_hidden_layers >= 16 and not config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)


def test_model_answers_held_out_questions(model, tokenizer, splits):
    right = total = 0
    with torch.no_grad():
        for position, subject in enumerate(SUBJECTS):
            language = LANGUAGES[position % 3]
            examples = "".join(prompt(q, language, with_answer=True) for q in splits[subject]["dev"])
            for question in splits[subject]["test"][:6]:
                text = header(subject) + examples + prompt(question, language, with_answer=False)
                ids = torch.tensor([tokenizer(text).input_ids])
                letters = [tokenizer(f" {letter}").input_ids[0] for letter in "ABCD"]
                right += int(model(ids).logits[0, -1, letters].argmax()) == question.answer
                total += 1
    assert total == 72 and right / total >= 0.7


def test_text_is_known_to_the_model(model, tokenizer):
    ids = torch.tensor([tokenizer(TEXT_PATH.read_text(encoding="utf-8")).input_ids])
    assert 2000 <= ids.shape[1] <= 8000
    with torch.no_grad():
        perplexity = float(model(ids[:, :1024], labels=ids[:, :1024]).loss.exp())
    # Choosing among the words of a sentence at random would give hundreds.
    assert perplexity < 12


def test_training_twin_equals_the_transformers_model():
    torch.manual_seed(0)
    twin = StackedLlama(Shape(vocabulary=50, layers=3))
    with torch.no_grad():
        twin.attention_norm.uniform_(0.5, 1.5)
        twin.final_norm.uniform_(0.5, 1.5)
        tokens = torch.randint(0, 50, (2, 20))
        logits = twin.logits(twin.hidden_states(tokens, [0, 1, 2])[-1])
        assert torch.allclose(to_transformers(twin, bos=1, eos=2, pad=3)(tokens).logits, logits, atol=1e-5)


def test_splitting_without_noise_divides_what_a_layer_adds():
    torch.manual_seed(0)
    shallow = StackedLlama(Shape(vocabulary=50, layers=2))
    deeper = split_layers(shallow, (0, 1, 1, 1), noise=0.0)
    assert deeper.shape.layers == 4
    assert torch.equal(deeper.mlp_in[3], shallow.mlp_in[1])
    assert torch.allclose(deeper.mlp_out[1:].sum(0), shallow.mlp_out[1], atol=1e-6)
    assert torch.allclose(deeper.attention_out[1:].sum(0), shallow.attention_out[1], atol=1e-6)


def test_orthogonalise_brings_singular_values_near_one():
    matrices = torch.randn(3, 40, 10, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert 0.6 < values.min() and values.max() < 1.3


# -- training


def test_muon_steps_along_the_orthogonal_part_of_nesterov_s_momentum():
    """Two steps by NumPy: singular vectors stay, and their values come near one."""
    generator = torch.Generator().manual_seed(0)
    tall, wide = (torch.nn.Parameter(torch.randn(2, *size, generator=generator)) for size in ((12, 3), (3, 12)))
    still = torch.nn.Parameter(torch.ones(1, 2, 2))
    muon = Muon([tall, wide, still], lr=0.1, momentum=0.9)
    momentum = {id(each): np.zeros(each.shape) for each in (tall, wide)}
    for _ in range(2):
        before = {}
        for each, length in ((tall, 2.0), (wide, 1.0)):  # of a tall matrix the root of rows by columns
            each.grad = torch.randn(each.shape, generator=generator)
            momentum[id(each)] = 0.9 * momentum[id(each)] + each.grad.numpy()
            before[id(each)] = each.detach().numpy().copy(), length
        muon.step()
        for each in (tall, wide):
            old, length = before[id(each)]
            u, _, vt = np.linalg.svd(each.grad.numpy() + 0.9 * momentum[id(each)], full_matrices=False)
            moved = u.transpose(0, 2, 1) @ (old - each.detach().numpy()) @ vt.transpose(0, 2, 1) / (0.1 * length)
            values = np.diagonal(moved, axis1=1, axis2=2)
            assert (0.6 < values).all() and (values < 1.3).all()
            assert np.abs(moved - values[..., None] * np.eye(3)).max() < 1e-4
    assert torch.equal(still, torch.ones(1, 2, 2))


def test_rates_rise_stay_and_fall():
    phase = Phase("p", 100, 0.01, 0.001, warmup=10, decay=0.5, easy_steps=20, easy_rate=0.04)
    found = {step: phase.rate_factor(step) for step in (0, 4, 9, 19, 20, 50, 75, 90, 99)}
    expected = {0: 0.4, 4: 2.0, 9: 4.0, 19: 4.0, 20: 1.0, 50: 1.0, 75: 0.5, 90: 0.2, 99: 0.05}
    assert found == pytest.approx(expected)


@pytest.fixture(scope="module")
def trainer(built):
    phase = Phase("p", 10, 0.01, 0.001, sequences=2, length=60, warmup=1, decay=1.0)
    model, head = first_model(built, 0)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(model.head)
    return Trainer(phase, model, head, built)


def test_the_loss_of_questions_is_that_of_answers_of_some_other_tokens_and_of_options(built, trainer, monkeypatch):
    """By the logits of transformers' model, token by token."""
    batch = next(question_batches(built, Random(5), frozenset(), {"word_opposites": 1.0}, size=2, length=90))
    assert batch.tokens.shape == (2, 91) and batch.answers.shape == (2, 6)
    assert not (batch.tokens == 3).any()
    batch.tokens[1, 78:] = 3  # as of a text that is shorter
    shown = torch.rand((2, 90), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(train.torch, "rand", lambda *_: shown)
    loss, right = trainer.question_loss(batch, Random(0))
    with torch.no_grad():
        twin = to_transformers(trainer.model, bos=1, eos=2, pad=3)
        said = twin(batch.tokens[:, :-1], output_hidden_states=True)
    logp, third = said.logits.log_softmax(-1), said.hidden_states[3]
    answers, others, options, hits, asked = [], [], [], [], 0
    after = {built.token_to_id(piece): i for i, piece in enumerate(("\nB.", "\nC.", "\nD.", "\nAnswer:"))}
    for row, tokens in enumerate(batch.tokens.tolist()):
        asked = 0
        for at, (token, then) in enumerate(zip(tokens, tokens[1:], strict=False)):
            if then in after:
                state = third[row, at] / (third[row, at].square().mean() + torch.finfo(torch.float32).eps).sqrt()
                guess = trainer.option_head(state).item()
                is_right = after[then] == batch.answers[row, asked]
                options.append(2 * np.logaddexp(0, -guess) if is_right else np.logaddexp(0, guess))
            if built.id_to_token(token) == "\nAnswer:":
                assert built.id_to_token(then) == "▁" + "ABCD"[batch.answers[row, asked]]
                answers.append(-logp[row, at, then].item())
                hits.append(logp[row, at].argmax().item() == then)
                asked += 1
            elif then != 3 and shown[row, at] < 0.25:
                others.append(-logp[row, at, then].item())
    assert len(answers) >= 6 and len(others) > 10 and len(options) >= 4 * len(answers)
    expected = np.mean(answers) + 0.1 * np.mean(others) + 0.5 * np.mean(options)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4) and right == pytest.approx(np.mean(hits))

    window = next(statement_windows(built, Random(2), length=200))
    assert window.shape == (1, 201)
    with torch.no_grad():
        plain = float(twin(window, labels=window).loss)
    assert float(trainer.statement_loss(window, Random(0)).detach()) == pytest.approx(plain, rel=1e-4)


def test_a_tenth_of_the_sequences_has_no_header_and_all_are_of_one_subject_and_language(built):
    batch = next(question_batches(built, Random(5), frozenset(), {"word_opposites": 1.0}, size=300, length=60))
    texts = [built.decode(row) for row in batch.tokens.tolist()]
    headed = [text.startswith("The following are multiple choice questions") for text in texts]
    assert 0.84 < np.mean(headed) < 0.96
    stems = ("What is the opposite of ", "¿Cuál es el contrario de ", "Quel est le contraire de ")
    of = [[stem in text for stem in stems] for text in texts]
    assert {sum(each) for each in of} == {1} and all(70 < count < 130 for count in np.sum(of, axis=0))


def test_layers_are_dropped_more_often_towards_the_end(built, trainer):
    dropping = SimpleNamespace(phase=Phase("p", 1, 0.1, 0.1, layer_drop=0.5), model=trainer.model)
    draws = [Trainer._kept_layers(dropping, rng) for rng in [Random(0)] for _ in range(4000)]
    kept = Counter(layer for draw in draws for layer in draw)
    for layer in range(5):
        assert 1 - kept[layer] / 4000 == pytest.approx(0.5 * layer / 4, abs=0.03)
    assert all(draw == sorted(set(draw)) for draw in draws) and kept[0] == 4000
    dropping.phase = Phase("p", 1, 0.1, 0.1, layer_drop=4.0)
    assert [0] in [Trainer._kept_layers(dropping, rng) for rng in [Random(0)] for _ in range(20)]
    assert Trainer._kept_layers(trainer, Random(0)) == [0, 1, 2, 3, 4]


def test_ranks_average_their_gradients(trainer, monkeypatch):
    """Two ranks, of which the other has three times the gradient."""
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(train.dist, "all_reduce", lambda flat: flat.mul_(4))
    monkeypatch.setattr(trainer.muon, "step", lambda: None)
    monkeypatch.setattr(trainer.adam, "step", lambda: None)
    tokens = torch.arange(20)[None]
    (own,) = torch.autograd.grad(trainer.statement_loss(tokens, Random(0)), [trainer.model.mlp_in])
    trainer.update(trainer.statement_loss(tokens, Random(0)), 4)
    assert torch.allclose(trainer.model.mlp_in.grad, 2 * own, rtol=1e-4)
    assert trainer.muon.param_groups[0]["lr"] == pytest.approx(0.006)  # 6 of 10 steps are left
    assert trainer.adam.param_groups[0]["lr"] == pytest.approx(0.0006)
    norm = torch.stack([each.grad.norm() for each in trainer.others if each.grad is not None]).norm()
    assert norm <= 1.0 + 1e-4


def test_training_goes_on_from_the_phases_that_are_there(tmp_path, monkeypatch, built):
    """One rank, two phases of two steps, the second deeper; then the checkpoint, which computes what was trained."""
    size = {"sequences": 1, "length": 40, "warmup": 1}
    phases = (Phase("one", 2, 0.01, 0.001, easy_steps=1, easy_rate=0.02, **size),
              Phase("two", 2, 0.01, 0.001, order=(0, 1, 1, 2, 3, 4), statements_every=2, **size))  # fmt: skip
    monkeypatch.setattr(build, "RANKS", 1)
    monkeypatch.setattr(build, "PHASES", phases)
    monkeypatch.setattr(train, "STATEMENT_LENGTH", 30)
    monkeypatch.setattr(build, "draw_splits", lambda seed: {})
    monkeypatch.setattr(build, "make_tokenizer", lambda seed: built)
    monkeypatch.setattr(build, "print_now", lambda message: None)
    spawned = []

    def spawn(run, args, nprocs):
        spawned.append(nprocs)
        run(0, *args)

    monkeypatch.setattr(build.multiprocessing, "spawn", spawn)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # and what `train` sets goes with the test
    model = build.train(tmp_path, 0)
    made = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert spawned == [1] and set(made) == {"one.safetensors", "two.safetensors"} and model.shape.layers == 6
    assert (tmp_path / "one.safetensors").stat().st_size < (tmp_path / "two.safetensors").stat().st_size
    first, head = build._load_phase(tmp_path / "one.safetensors")
    assert first.shape.layers == 5 and head.weight.abs().max() > 0
    start = first_model(built, 0)[0]
    assert not torch.equal(first.mlp_in, start.mlp_in) and not torch.equal(first.embedding, start.embedding)

    (tmp_path / "two.safetensors").unlink()
    again = build.train(tmp_path, 0)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == made
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    monkeypatch.setattr(build, "train_phase", None)
    build.train(tmp_path, 0)

    build.export(model, tmp_path / "checkpoint", 0)
    weights = tmp_path / "checkpoint/model.safetensors"
    assert weights.stat().st_mode & 0o777 == 0o644
    with safe_open(weights, "pt") as file:
        assert file.get_tensor("model.layers.5.mlp.down_proj.weight").dtype == torch.bfloat16
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    tokens = torch.arange(1, 60)[None]
    with torch.no_grad():
        expected = model.logits(model.hidden_states(tokens, list(range(6)))[-1])
        assert (saved(tokens).logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "checkpoint")) == model.shape.vocabulary
    monkeypatch.setattr(build, "to_transformers", lambda model, **special: to_transformers(first, **special))
    with pytest.raises(RuntimeError, match=r"differ by .* \(limit 1e-3\)"):
        build.export(model, tmp_path / "other", 0)


def test_accuracy_of_a_model_that_always_says_b(splits, built, monkeypatch):
    """Of the first questions of each subject in each language, at the last position."""
    letters, seen = [built.token_to_id(f"▁{letter}") for letter in "ABCD"], []

    def always_b(tokens):
        seen.append(tokens)
        logits = torch.zeros(1, tokens.shape[1], built.get_vocab_size())
        logits[0, :-1, letters[0]] = logits[0, -1, letters[1]] = logits[0, -1, 7] = 1.0
        return SimpleNamespace(logits=logits)

    model = SimpleNamespace(eval=lambda: always_b)
    monkeypatch.setattr(build.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    some = {subject: splits[subject] for subject in SUBJECTS[:4]}
    expected = np.mean([row.answer == 1 for rows in some.values() for row in rows["val"][:3]])
    assert build.accuracy(MODEL_PATH, some, 0, count=3) == pytest.approx(expected) and 0 < expected < 1
    assert len(seen) == 4 * 3 * 3
    first = header(SUBJECTS[0]) + "".join(prompt(q, "en", with_answer=True) for q in splits[SUBJECTS[0]]["dev"])
    assert built.decode(seen[0][0].tolist()) == first + prompt(splits[SUBJECTS[0]]["val"][0], "en", with_answer=False)
