"""MMLU and Global-MMLU: questions, few-shot examples, subjects, domains, splits and the text of the prompts.

Sources: the original CSV files (Hendrycks et al. 2020, https://github.com/hendrycks/test), the data sets
`cais/mmlu` and `CohereLabs/Global-MMLU` of the Hugging Face hub, and folders in either layout. The prompt is the one
of the original code and of lm-evaluation-harness (`tasks/mmlu/default`).
"""

import csv
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raymerge.domains import known_domains
from raymerge.errors import UserError
from raymerge.hub import fetch
from raymerge.identity import digest

LETTERS = "ABCD"

# The names a split's files go by: "val" in the original folders, "validation" on the hub.
_SPLITS = {"dev": ("dev",), "validation": ("validation", "val"), "test": ("test",)}

# What the two known data sets hold, so that a wrong choice fails before anything is downloaded.
_GLOBAL_MMLU_LANGUAGES = (
    "am ar bn cs de el en es fa fil fr ha he hi id ig it ja ko ky lt mg ms ne nl ny pl pt ro ru si sn so sr sv sw te "
    "tr uk vi yo zh"
).split()
_HUB = {
    "cais/mmlu": (["en"], ["dev", "validation", "test"]),
    "CohereLabs/Global-MMLU": (_GLOBAL_MMLU_LANGUAGES, ["dev", "test"]),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_LAYOUTS = (
    "the original {dev,val,test}/SUBJECT_{dev,val,test}.csv, or {dev,validation,test}.parquet (also as "
    "SPLIT-00000-of-00001.parquet), directly in the folder, in 'all', or in one folder a language"
)


class DataError(UserError):
    """Questions that are missing, malformed or not what was asked for; the message says where, and what to do."""


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question.

    `question_id` is the source's own sample id, else `SUBJECT/SPLIT/ROW` with the 0-based row among the subject's
    rows of that split, so CSV and parquet copies of the same data agree. `text` and `options` are as in the source,
    only with newlines written "\\n"; `answer` is 0-3.
    """

    question_id: str
    subject: str
    split: str
    language: str
    text: str
    options: tuple[str, str, str, str]
    answer: int

    @property
    def content_hash(self) -> str:
        """16 hex digits over text and options, stripped: equal for the same question in another source, subject,
        split, or with a corrected answer."""
        return digest([self.text.strip(), [option.strip() for option in self.options]])


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one split and language, sorted by subject and in the source's order within it, with each
    subject's few-shot examples."""

    source: str
    language: str
    split: str
    questions: tuple[Question, ...]
    examples: dict[str, tuple[Question, ...]]

    @cached_property
    def identity(self) -> str:
        """16 hex digits over everything that enters prompts and scores, in order: subjects, texts, options, answers
        and examples. Ids, source, split and language do not enter."""

        def content(question: Question) -> list[Any]:
            return [question.subject, question.text.strip(), question.options, question.answer]

        examples = {subject: [content(question) for question in part] for subject, part in self.examples.items()}
        return digest({"questions": [content(question) for question in self.questions], "examples": examples})

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subjects in the order of their first question."""
        return tuple(self.by_subject())

    def by_subject(self) -> dict[str, tuple[Question, ...]]:
        """Questions of each subject, in order."""
        parts: dict[str, list[Question]] = {}
        for question in self.questions:
            parts.setdefault(question.subject, []).append(question)
        return {subject: tuple(part) for subject, part in parts.items()}

    def sampled(self, per_subject: int, seed: int) -> "QuestionSet":
        """At most so many questions of each subject, drawn by `sample`."""
        parts = (sample(part, per_subject, seed) for part in self.by_subject().values())
        return replace(self, questions=tuple(question for part in parts for question in part))


def load_questions(
    source: str | os.PathLike[str],
    *,
    language: str = "en",
    split: str = "test",
    subjects: str | Iterable[str] = "all",
    shots: int = 5,
    revision: str | None = None,
    domains: Mapping[str, Sequence[str]] | None = None,
) -> QuestionSet:
    """Read questions and few-shot examples.

    Parameters
    ----------
    source : "demo" (the embedded questions), an existing folder, or else a hub data set id such as "cais/mmlu".
        A folder holds header-less CSV files or parquet, directly or in one folder a language. Cells are text:
        "None" and "nan" are answers like any other, and an option may be empty.
    language : a folder (or hub configuration) of that name is read. A folder without language folders is taken as
        English unless its own name is the language.
    split : "dev", "validation" (or "val") or "test".
    subjects : "all", or names of subjects and domains, as a list or separated by commas.
    shots : examples a subject: the first `shots` rows of its dev split.
    revision : branch, tag or commit of a hub data set.
    domains : further domains (name -> subjects); a name of `DOMAINS` or `CATEGORIES` is replaced.

    Raises
    ------
    DataError : nothing there, a malformed row, an unknown subject or language, too few dev questions, or an
        unreachable hub.
    """
    (found,) = load_question_sets(
        source, [subjects], language=language, split=split, shots=shots, revision=revision, domains=domains
    )
    return found


def load_question_sets(
    source: str | os.PathLike[str],
    subjects: Sequence[str | Iterable[str]],
    *,
    language: str = "en",
    split: str = "test",
    shots: int = 5,
    revision: str | None = None,
    domains: Mapping[str, Sequence[str]] | None = None,
) -> list[QuestionSet]:
    """`load_questions` for each choice of subjects, of files that are read once: Global-MMLU has all 57 subjects of a
    language in one."""
    split = _split_name(split)
    _check_count("shots", shots, 0)
    if split == "dev" and shots:
        raise DataError(f"split 'dev' with shots={shots}: the dev questions are the examples; set shots=0 to load them")
    folder = _find_folder(source, language, [split, "dev"] if shots else [split], revision)
    rows = _read_split(folder, split)
    dev = _read_split(folder, "dev") if shots else {}
    found = []
    for chosen in [_choose_subjects(asked, list(rows), domains, split) for asked in subjects]:
        examples: dict[str, tuple[Question, ...]] = {subject: () for subject in chosen}
        if shots:
            examples = {
                subject: _questions(dev[subject](), subject, "dev", language)[:shots] if subject in dev else ()
                for subject in chosen
            }
            short = {subject: len(part) for subject, part in examples.items() if len(part) < shots}
            if short:
                counts = ", ".join(f"{subject} has {count}" for subject, count in short.items())
                raise DataError(
                    f"{folder}: shots={shots} needs {shots} dev questions in every subject, but {counts}; "
                    f"set shots={min(short.values())}, or leave out what is short"
                )
        questions = [q for subject in chosen for q in _questions(rows[subject](), subject, split, language)]
        found.append(QuestionSet(os.fspath(source), language, split, tuple(questions), examples))
    return found


def sample(questions: Iterable[Question], n: int, seed: int) -> tuple[Question, ...]:
    """At most n of the questions, without replacement, in their order.

    A question's rank depends on the seed, its subject and its id alone, so a sample of 10 lies within one of 20, does
    not change with the other subjects, and picks the same rows of parallel translations.
    """
    questions = tuple(questions)
    kept = drawn([[question.subject, question.question_id] for question in questions], n, seed)
    return tuple(questions[index] for index in kept)


def drawn(keys: Sequence[Sequence[str]], n: int, seed: int) -> list[int]:
    """Numbers of at most n of the keys, ascending: those whose hash with the seed is lowest."""
    _check_count("n", n, 1)

    def rank(index: int) -> str:
        return digest([seed, *keys[index]], length=64)

    return sorted(sorted(range(len(keys)), key=rank)[:n])


def prefix_text(subject: str, examples: Iterable[Question]) -> str:
    """The few-shot prefix: the header, then each example with its answer and an empty line."""
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return header + "".join(f"{question_text(example)} {LETTERS[example.answer]}\n\n" for example in examples)


def question_text(question: Question) -> str:
    """The question as it follows the prefix, up to "Answer:". The text is stripped, the options are not."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True))
    return f"{question.text.strip()}\n{options}\nAnswer:"


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def _split_name(split: str) -> str:
    for name, aliases in _SPLITS.items():
        if split in aliases:
            return name
    raise DataError(f"unknown split {split!r}; there are dev, validation (or val) and test")


# Where the files are ------------------------------------------------------------------------------------------------


def _find_folder(source: str | os.PathLike[str], language: str, splits: list[str], revision: str | None) -> Path:
    """The folder that holds the splits of one language."""
    if not re.fullmatch(r"\w[\w-]*", language):
        raise DataError(f"language is {language!r}; it must be a plain name such as 'en'")
    if not os.fspath(source):
        raise DataError("the source is empty; give a folder, 'demo', or a hub data set such as 'cais/mmlu'")
    if source == "demo":
        from raymerge.demo import MMLU_PATH

        root = Path(MMLU_PATH)
    else:
        root = Path(source).expanduser()
    local = root.exists()
    if local and revision is not None:
        raise DataError(f"revision {revision!r} is for hub data sets, and {source!s} is local; leave it out")
    if not local:
        if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
            raise DataError(
                f"no folder {str(source)!r}; give an existing folder, 'demo', or a hub data set such as 'cais/mmlu'"
            )
        root = _download(source, language, splits, revision)
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the folder that holds {_LAYOUTS}")
    if _split_files(root / language):
        return root / language
    flat = next((folder for folder in (root / "all", root) if _split_files(folder)), None)
    if flat and language in ("en", root.name):
        return flat
    there = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "all" and _split_files(path))
    if flat:
        others = f", and has folders for {', '.join(there)}" if there else ""
        raise DataError(
            f"language {language!r} is not in {root}: it holds one unnamed language, taken as English ('en'){others}; "
            f"if it is {language!r}, put the data into a folder of that name"
        )
    if there:
        raise DataError(
            f"language {language!r} is not in {root}; there are {', '.join(there)}, whose folders' names are taken as "
            "languages: set data.language to one, or, where such a folder is the data set, data.mmlu to it"
        )
    raise DataError(f"no MMLU files in {root}; expected {_LAYOUTS}")


def _download(source: str, language: str, splits: list[str], revision: str | None) -> Path:
    """The needed parquet files of a hub data set, from its cache where they are there already."""
    if source in _HUB:
        languages, has_splits = _HUB[source]
        if language not in languages:
            raise DataError(f"language {language!r} is not in the hub data set {source}; has: {', '.join(languages)}")
        for split in splits:
            if split not in has_splits:
                raise DataError(f"the hub data set {source} has no {split} split; has: {', '.join(has_splits)}")
    from huggingface_hub import snapshot_download

    folders = [language, "all"] if language == "en" else [language]
    names = [alias for split in splits for alias in _SPLITS[split]]
    patterns = [f"{folder}/{name}{end}" for folder in folders for name in names for end in (".parquet", "-*.parquet")]
    what = f"no folder {source!r} here, and the data set {source!r} (revision {revision or 'main'})"

    def download() -> str:
        return snapshot_download(source, repo_type="dataset", revision=revision, allow_patterns=patterns)

    return fetch(what, download, DataError)


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split there is: all CSV, or all parquet."""
    found = {}
    for split, aliases in _SPLITS.items():
        candidates = []
        for name in aliases:
            tables = [path for path in (folder / name).glob("*.csv") if not path.name.startswith(".")]
            shards = list(folder.glob(f"{name}-[0-9]*-of-[0-9]*.parquet"))
            whole = [folder / f"{name}.parquet"] if (folder / f"{name}.parquet").is_file() else []
            candidates += [sorted(files) for files in (tables, shards, whole) if files]
            if shards and len(shards) != int(shards[0].stem.split("-")[-1]):
                raise DataError(f"{folder}: {len(shards)} shards of {shards[0].name}; fetch them all")
        if len(candidates) > 1:
            several = ", ".join(str(files[0]) for files in candidates)
            raise DataError(f"{folder} has the {split} split more than once ({several}); keep one")
        if candidates:
            found[split] = candidates[0]
    return found


# What is in them ----------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """An unchecked row: where it stands, for messages; the sample id, if any; question, four options, answer."""

    where: str
    sample_id: Any
    cells: list[Any]


def _read_split(folder: Path, split: str) -> dict[str, Callable[[], list[_Row]]]:
    """A reader for each subject of the split; CSV files are opened only when theirs is called."""
    files = _split_files(folder)
    if split not in files:
        raise DataError(
            f"{folder} has no {split} split, only {', '.join(files)}: ask for one of these (data.report_split, "
            f"data.search_split, similarity.split; without dev also data.shots=0), or add {_LAYOUTS}"
        )
    if files[split][0].suffix == ".parquet":
        return _read_parquet(files[split])
    readers: dict[str, Callable[[], list[_Row]]] = {}
    for path in files[split]:
        subject = next((path.stem.removesuffix(f"_{a}") for a in _SPLITS[split] if path.stem.endswith(f"_{a}")), "")
        if not subject:
            raise DataError(f"{path} is not named SUBJECT_{_SPLITS[split][-1]}.csv; rename it or move it away")
        if subject in readers:
            raise DataError(f"{path.parent} has two files of subject {subject!r}; keep one")
        readers[subject] = partial(_read_csv, path)
    return readers


def _read_csv(path: Path) -> list[_Row]:
    rows = []
    try:
        # strict: an unclosed quote is an error, where it would otherwise swallow the rest of the file
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            start = 1
            for cells in reader:
                where = f"{path} line {start}"
                start = reader.line_num + 1
                if cells and len(cells) != 6:
                    raise DataError(f"{where}: {len(cells)} columns, not 6 (question, A, B, C, D, answer); fix it")
                if cells:
                    rows.append(_Row(where, None, cells))
    except csv.Error as error:
        raise DataError(f"{path}: not readable as CSV from line {start} on: {error}; fix the quotes") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); convert it") from error
    if not rows:
        raise DataError(f"{path} holds no questions; fill it or remove it")
    return rows


def _read_parquet(files: list[Path]) -> dict[str, Callable[[], list[_Row]]]:
    parts: dict[str, list[_Row]] = {}
    ids: set[Any] = set()
    letters = [f"option_{letter.lower()}" for letter in LETTERS]
    for path in files:
        try:
            has = pq.read_schema(path).names
            options = ["choices"] if "choices" in has else letters
            needed = ["subject", "question", *options, "answer"]
            missing = [name for name in needed if name not in has]
            if missing:
                raise DataError(f"{path}: no column {', '.join(missing)}; has: {', '.join(has)}")
            rows = pq.read_table(path, columns=[*needed, "sample_id"] if "sample_id" in has else needed).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not readable as parquet: {error}; fetch it again") from error
        for index, row in enumerate(rows):
            where = f"{path} row {index} (from 0)"
            subject, sample_id = row["subject"], row.get("sample_id")
            if not isinstance(subject, str) or not subject.strip():
                raise DataError(f"{where}: subject is {subject!r}; fill it")
            if sample_id is not None and sample_id in ids:
                raise DataError(f"{where}: sample_id {sample_id!r} occurs twice; ids must differ")
            ids.add(sample_id)
            choices = row["choices"] or [] if options == ["choices"] else [row[name] for name in letters]
            if len(choices) != 4:
                raise DataError(f"{where}: {len(choices)} choices instead of 4; fix it")
            parts.setdefault(subject, []).append(_Row(where, sample_id, [row["question"], *choices, row["answer"]]))
    if not parts:
        raise DataError(f"{files[0]} holds no questions; fetch it again")
    return {subject: partial(list, rows) for subject, rows in parts.items()}


def _questions(rows: list[_Row], subject: str, split: str, language: str) -> tuple[Question, ...]:
    """The rows of one subject, checked."""
    questions = []
    for index, (where, sample_id, cells) in enumerate(rows):
        for name, cell in zip(("question", *(f"option {letter}" for letter in LETTERS)), cells, strict=False):
            if not isinstance(cell, str):
                raise DataError(
                    f"{where}: {name} is {cell!r}, not text (pandas makes such cells of 'None' or numbers); fix it"
                )
        text, *options = [cell.replace("\r\n", "\n").replace("\r", "\n") for cell in cells[:5]]
        if not text.strip():
            raise DataError(f"{where}: the question is empty; fill it or remove the row")
        question_id = f"{subject}/{split}/{index}" if sample_id is None else str(sample_id)
        answer = _answer(where, cells[5])
        questions.append(Question(question_id, subject, split, language, text, tuple(options), answer))
    return tuple(questions)


def _answer(where: str, value: Any) -> int:
    if isinstance(value, str) and value.strip() in tuple(LETTERS):
        return LETTERS.index(value.strip())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 4:
        return value
    hint = " (is line 1 a header? the original files have none)" if where.endswith(".csv line 1") else ""
    raise DataError(f"{where}: the answer is {value!r}, not one of A, B, C, D{hint}; fix it")


def _choose_subjects(
    subjects: str | Iterable[str], there: list[str], domains: Mapping[str, Sequence[str]] | None, split: str
) -> list[str]:
    """The subjects asked for, by name or domain, each once and sorted."""
    for name in domains or {}:
        if name in there:
            raise DataError(f"domain {name!r} has the name of a subject; rename the domain")
    known = known_domains(domains)
    names = [name.strip() for name in subjects.split(",") if name.strip()] if isinstance(subjects, str) else [*subjects]
    if not names:
        raise DataError("subjects is empty; name subjects or domains, or 'all'")
    if names == ["all"]:
        return sorted(there)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"subject {name!r} is asked for twice; name it once")
    chosen: set[str] = set()
    for name in names:
        members = known[name] if name in known and name not in there else [name]
        if not members:
            raise DataError(f"domain {name!r} has no subjects; name some")
        for subject in members:
            if subject not in there:
                raise _unknown_subject(subject, name, there, known, split)
        chosen.update(members)
    return sorted(chosen)


def _unknown_subject(
    subject: str, name: str, there: list[str], known: Mapping[str, Sequence[str]], split: str
) -> DataError:
    """The error for a subject that is not there; name: what was asked for, the subject or a domain that has it."""
    of = "" if subject == name else f" of domain {name!r}"
    close = difflib.get_close_matches(subject, [*there, *known] if subject == name else there)
    like = f"did you mean {' or '.join(close)}? " if close else ""
    whole = [domain for domain, members in known.items() if set(members) <= set(there)]
    return DataError(
        f"unknown subject {subject!r}{of}; {like}there are {len(there)} subjects in split "
        f"{split} ({', '.join(sorted(there)[:3])}, ...)" + (f" and the domains {', '.join(whole)}" if whole else "")
    )
