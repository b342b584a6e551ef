"""The demo tokenizer: whole words of the generator, single characters, and bytes for everything else."""

from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raymerge.demo.generator import LANGUAGES, SUBJECTS, draw_question, header, prompt

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
MAX_LENGTH = 2048

# The fixed marks of the prompt are one token each, so that a 5-shot prompt stays below 140 tokens and the model needs
# no step to recognise them. "\n\n" ends a few-shot prefix and is never joined with what follows: a prefix and a
# question tokenised apart give the tokens of the two together.
_PIECES = r"\n[A-D]\.|\nAnswer:|\n\n|\n|▁?\p{L}+|▁?\p{N}+|▁?[^\s▁\p{L}\p{N}]+|▁"


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False),
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
        ]
    )


def _corpus(seed: int) -> set[str]:
    """Texts with every word of the generator: 400 questions a subject leave none out."""
    rng = Random(f"{seed}/tokenizer")
    texts = {header(subject) for subject in SUBJECTS}
    for subject in SUBJECTS:
        for _ in range(400):
            question = draw_question(rng, subject)
            for language in LANGUAGES:
                statement = question.statement(language)
                # A statement opens a line or follows a space; its first word is a token of its own in either place.
                texts |= {prompt(question, language, with_answer=True), statement, " " + statement}
    return texts


def make_tokenizer(seed: int = 0) -> Tokenizer:
    """A Unigram tokenizer over an explicit vocabulary; about 900 entries, ids stable for a seed."""
    split = _pre_tokenizer().pre_tokenize_str
    pieces = {piece for text in _corpus(seed) for piece, _ in split(text)}
    singles = {"▁", "\n", *map(chr, range(33, 127)), *"".join(pieces)}
    words = sorted(piece for piece in pieces if len(piece) > 1)
    # The scores only rank segmentations: one word (-2) before characters (-12 each) before bytes (-20 each).
    vocabulary = [(token, 0.0) for token in (UNKNOWN, BOS, EOS, PAD)]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(single, -12.0) for single in sorted(singles)]
    vocabulary += [(word, -2.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([UNKNOWN, BOS, EOS, PAD])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary has; KeyError for any other."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; BOS is defined but not added by default."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    ).save_pretrained(folder)
