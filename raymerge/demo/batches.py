"""Training batches: few-shot question sequences with the answers beside the tokens, and long windows of statements."""

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from raymerge.demo.generator import LANGUAGES, SUBJECTS, Question, draw_question, header, paragraphs, prompt
from raymerge.demo.tokenizer import PAD, token_id

# A question takes 14-17 tokens with its answer; the sequences are cut at their length, so one more does no harm.
TOKENS_A_QUESTION = 17


class Batch(NamedTuple):
    """`tokens` (batch, length + 1) int64; `answers` (batch, questions) int64, the position of each answer, 0-3."""

    tokens: Tensor
    answers: Tensor


def question_batches(
    tokenizer: Tokenizer, rng: Random, held: frozenset[Question], weights: dict[str, float], *, size: int, length: int
) -> Iterator[Batch]:
    """Endless batches; each sequence has one subject and one language, drawn without the held-out questions.

    One sequence in ten goes without the header, so that the subject has to be read from the questions.
    """
    count = length // TOKENS_A_QUESTION + 1
    pad = token_id(tokenizer, PAD)
    while True:
        rows, answers = [], []
        for _ in range(size):
            subject = rng.choices(SUBJECTS, [weights.get(subject, 0.0) for subject in SUBJECTS])[0]
            language = rng.choice(LANGUAGES)
            questions: list[Question] = []
            while len(questions) < count:
                question = draw_question(rng, subject)
                if question not in held:
                    questions.append(question)
            opening = header(subject) if rng.random() < 0.9 else ""
            text = opening + "".join(prompt(question, language, with_answer=True) for question in questions)
            ids = tokenizer.encode(text).ids[: length + 1]
            rows.append(ids + [pad] * (length + 1 - len(ids)))
            answers.append([question.answer for question in questions])
        yield Batch(torch.tensor(rows), torch.tensor(answers))


def statement_windows(tokenizer: Tokenizer, rng: Random, *, length: int) -> Iterator[Tensor]:
    """Endless (1, length + 1) windows of plain statements, long enough for perplexity windows of 1,024 tokens."""
    while True:
        ids: list[int] = []
        while len(ids) <= length:
            ids += tokenizer.encode(paragraphs(rng, 8)).ids
        yield torch.tensor([ids[: length + 1]])
