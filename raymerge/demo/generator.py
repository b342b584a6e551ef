"""Questions in MMLU format and plain statements, in three parallel languages, drawn from a seeded `random.Random`.

A `Question` is language-neutral; `render` puts it into words. Twelve subjects: each asks one small thing that a tiny
model can learn, and all share the form of four options and one letter. Standard library only.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from random import Random

from raymerge.demo.templates import SUBJECTS, TEMPLATES
from raymerge.demo.words import (
    CAPITALS,
    CATEGORIES,
    COLOURS,
    DAYS,
    LANGUAGES,
    LETTERS,
    MIXTURES,
    MONTHS,
    NUMBERS,
    OPPOSITES,
    Words,
    same,
)

SPLIT_SIZES = {"dev": 5, "val": 20, "test": 40}
EXTREMES: tuple[Words, Words] = (("largest", "mayor", "plus grand"), ("smallest", "menor", "plus petit"))


@dataclass(frozen=True)
class Question:
    """One question in all languages: what it asks about, its four options in order, and the position of the answer."""

    subject: str
    arguments: tuple[Words, ...]
    options: tuple[Words, ...]
    answer: int

    def render(self, language: str) -> tuple[str, list[str]]:
        """The question text and its four options in one language."""
        form = LANGUAGES.index(language)
        stem = TEMPLATES[self.subject][0][form].format(*(words[form] for words in self.arguments))
        return stem, [option[form] for option in self.options]

    def statement(self, language: str) -> str:
        """The same fact as a plain sentence."""
        form = LANGUAGES.index(language)
        options = [option[form] for option in self.options]
        return TEMPLATES[self.subject][1][form].format(
            *(words[form] for words in self.arguments),
            answer=options[self.answer],
            **dict(zip("abcd", options, strict=True)),
        )

    @property
    def content(self) -> tuple[str, tuple[Words, ...], frozenset[Words]]:
        """What is asked and which options are offered, whatever their order."""
        return self.subject, self.arguments, frozenset(self.options)


def _neighbours(position: int, length: int, *, reach: int, circular: bool) -> list[int]:
    """Positions at most `reach` steps away from `position`, without itself."""
    steps = [step for step in range(-reach, reach + 1) if step]
    if circular:
        return sorted({(position + step) % length for step in steps})
    return [position + step for step in steps if 0 <= position + step < length]


def _draw_parts(rng: Random, subject: str) -> tuple[tuple[Words, ...], Words, list[Words]]:
    """What is asked about, the right option, and three wrong ones."""
    if subject in ("elementary_addition", "elementary_subtraction"):
        # Addends to 5 only: sums of addends to 9 were not learnt within the build's time.
        first = rng.randint(0, 5) if subject == "elementary_addition" else rng.randint(0, 9)
        second = rng.randint(0, 5) if subject == "elementary_addition" else rng.randint(0, first)
        result = first + second if subject == "elementary_addition" else first - second
        wrong = rng.sample([n for n in range(max(0, result - 4), result + 5) if n != result], 3)
        return (same(str(first)), same(str(second))), same(str(result)), [same(str(n)) for n in wrong]
    if subject == "number_comparison":
        drawn = rng.sample(range(len(NUMBERS)), 4)
        smallest = rng.randrange(2)
        extreme = min(drawn) if smallest else max(drawn)
        return (EXTREMES[smallest],), NUMBERS[extreme], [NUMBERS[n] for n in drawn if n != extreme]
    if subject == "number_words":
        asked, *wrong = rng.sample(range(len(NUMBERS)), 4)
        return (NUMBERS[asked],), same(str(asked)), [same(str(n)) for n in wrong]
    if subject == "alphabetical_order":
        asked = rng.randrange(len(LETTERS) - 1)
        near = [n for n in _neighbours(asked, len(LETTERS), reach=4, circular=False) if n != asked + 1]
        return (same(LETTERS[asked]),), same(LETTERS[asked + 1]), [same(LETTERS[n]) for n in rng.sample(near, 3)]
    if subject in ("days_of_the_week", "months_of_the_year"):
        sequence = DAYS if subject == "days_of_the_week" else MONTHS
        asked = rng.randrange(len(sequence))
        after = (asked + 1) % len(sequence)
        near = [n for n in _neighbours(asked, len(sequence), reach=3, circular=True) if n != after]
        return (sequence[asked],), sequence[after], [sequence[n] for n in rng.sample(near, 3)]
    if subject == "word_opposites":
        pair = rng.choice(OPPOSITES)
        side = rng.randrange(2)
        others = [word for other in OPPOSITES if other != pair for word in other]
        return (pair[side],), pair[1 - side], rng.sample(others, 3)
    if subject == "word_categories":
        kinds = rng.sample(list(CATEGORIES), 4)
        right, *others = (rng.choice(CATEGORIES[kind]) for kind in kinds)
        return (kinds[0],), right, others
    if subject == "letter_membership":
        letters = rng.sample(LETTERS, 6)
        return (same(" ".join(letters[:3])),), same(letters[rng.randrange(3)]), [same(letter) for letter in letters[3:]]
    if subject == "country_capitals":
        country, capital = rng.choice(CAPITALS)
        return (country,), capital, rng.sample([other for _, other in CAPITALS if other != capital], 3)
    if subject == "colour_mixing":
        first, second, mixture = rng.choice(MIXTURES)
        others = [colour for n, colour in enumerate(COLOURS) if n not in (first, second, mixture)]
        parts = [COLOURS[first], COLOURS[second]]
        rng.shuffle(parts)
        return tuple(parts), COLOURS[mixture], rng.sample(others, 3)
    raise ValueError(f"unknown subject {subject!r}; the demo has {', '.join(SUBJECTS)}")


def draw_question(rng: Random, subject: str) -> Question:
    """One random question of a subject, its answer equally likely at each letter."""
    arguments, right, wrong = _draw_parts(rng, subject)
    options = [right, *wrong]
    rng.shuffle(options)
    return Question(subject, arguments, tuple(options), options.index(right))


def draw_splits(seed: int = 0) -> dict[str, dict[str, list[Question]]]:
    """`{subject: {"dev": [...], "val": [...], "test": [...]}}`; no question comes twice with the same options."""
    splits: dict[str, dict[str, list[Question]]] = {}
    for subject in SUBJECTS:
        rng = Random(f"{seed}/questions/{subject}")
        seen: set[tuple[str, tuple[Words, ...], frozenset[Words]]] = set()
        splits[subject] = {}
        for split, size in SPLIT_SIZES.items():
            rows: list[Question] = []
            while len(rows) < size:
                question = draw_question(rng, subject)
                if question.content not in seen:
                    seen.add(question.content)
                    rows.append(question)
            splits[subject][split] = rows
    return splits


def held_out(splits: dict[str, dict[str, list[Question]]]) -> frozenset[Question]:
    """Every question of every split. Training never shows one of them, in any language, with its options in that order.

    It may show the same options in another order: the week has only 70 contents, and the splits take 65 of them.
    """
    return frozenset(question for rows in splits.values() for split in rows.values() for question in split)


def header(subject: str) -> str:
    """The line that opens every prompt, in English for all languages."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def prompt(question: Question, language: str, *, with_answer: bool) -> str:
    """A question in the published MMLU format, with its answer (an example) or ending in `Answer:`."""
    stem, options = question.render(language)
    lines = [stem, *(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)), "Answer:"]
    return "\n".join(lines) + (f" {'ABCD'[question.answer]}\n\n" if with_answer else "")


def paragraphs(rng: Random, count: int) -> str:
    """Plain statements: `count` lines of eight sentences, each line in one language."""
    lines = []
    for _ in range(count):
        language = rng.choice(LANGUAGES)
        lines.append(" ".join(draw_question(rng, rng.choice(SUBJECTS)).statement(language) for _ in range(8)))
    return "".join(line + "\n" for line in lines)


def held_out_text(seed: int = 0, count: int = 48) -> str:
    """The perplexity text: from a seed that no training sequence uses. Its facts are those of the training."""
    return paragraphs(Random(f"{seed}/text"), count)


def write_questions(folder: Path, splits: dict[str, dict[str, list[Question]]]) -> None:
    """Write `folder/LANGUAGE/SPLIT/SUBJECT_SPLIT.csv` in the header-less layout of the original MMLU."""
    for language in LANGUAGES:
        for subject, rows in splits.items():
            for split, questions in rows.items():
                path = folder / language / split / f"{subject}_{split}.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    for question in questions:
                        stem, options = question.render(language)
                        writer.writerow([stem, *options, "ABCD"[question.answer]])
