"""The embedded demo: its size, its questions and text, its tokenizer, and a checkpoint that answers."""

import csv
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymerge.demo import MMLU_PATH, MODEL_PATH, TEXT_PATH
from raymerge.demo.batches import question_batches
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
from raymerge.demo.optimizer import orthogonalise
from raymerge.demo.tokenizer import make_tokenizer


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
