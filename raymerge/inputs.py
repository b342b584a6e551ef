"""What a configuration asks to be read: the questions to search on, those to report on, and the plain text.

Driver and workers each read for themselves, by the same functions, and compare identities.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from textwrap import shorten

import numpy as np
import pyarrow.compute as pc

from raymerge.config import Config, ConfigError
from raymerge.domains import known_domains
from raymerge.objectives import parse_objective
from raymerge.questions import DataError, Question, QuestionSet, load_question_sets, sample
from raymerge.tables import RunDirectory
from raymerge.tasks import Task, load_task
from raymerge.texts import read_plain_text, text_hash

# What prompts are for: to search on, to report on, to compare layers on; plain text; key-value prompts.
SEARCH, REPORT, SUBSETS, TEXT, RETRIEVAL = "search", "report", "subsets", "text", "retrieval"
SEARCH_TEXT = "search_text"  # the plain text that candidates are judged on, which is not the one reported on
CALIBRATION = "calibration"  # plain text or prompts that something is chosen or fitted on
ALL = "all"  # the subset of every subject


def check_askable(config: Config) -> None:
    """Refuse an objective that needs answers where no questions are asked. Raises ConfigError."""
    if config.data.mmlu is None and parse_objective(config.search.objective).needs_answers:
        raise ConfigError(
            f"search.objective {config.search.objective} needs answers to questions, but data.mmlu is null: use "
            "text_nll, the loss on the plain text search.text"
        )


def check_matchable(config: Config, alignments: Mapping[str, Sequence[str]]) -> None:
    """Refuse to match by activations where no questions are asked. alignments: those asked for, by key. Raises
    ConfigError."""
    for key, asked in alignments.items():
        if config.data.mmlu is None and "activations" in asked:
            raise ConfigError(
                f"{key} has activations, which are computed on questions, but data.mmlu is null: use neurons"
            )


def task_role(name: str) -> str:
    """What the prompts of a task are for, beside SEARCH and the like."""
    return f"task:{name}"


def read_questions(config: Config, role: str) -> QuestionSet:
    """The questions of role SEARCH, or of role REPORT without those that plan.similarity_run was made of. Raises
    DataError."""
    data = config.data
    split, limit = {
        SEARCH: (data.search_split, data.limit_per_subject),
        REPORT: (data.report_split, data.report_limit_per_subject),
    }[role]
    found = _load(config, split, data.subjects, data.language, data.shots)
    if config.plan.similarity_run is not None and role == REPORT:
        whole = "every question of the report stands in plan.similarity_run: report on other questions"
        found = _without(found, read_samples(config.plan.similarity_run), whole)
    return found if limit is None else found.sampled(limit, data.seed)


def read_tasks(config: Config, roles: Iterable[str]) -> dict[str, Task]:
    """Those tasks of the tasks section that the roles name, by name. Raises DataError."""
    roles = set(roles)
    return {
        name: load_task(name, **dict(task), seed=config.data.seed)
        for name, task in config.tasks.root.items()
        if task_role(name) in roles
    }


def questions_to_match_on(config: Config, material: Material) -> QuestionSet | None:
    """Prompts to match neurons by activations on: the questions of the search, never those of a report; where only
    layers are compared, those of the first subset. None where nothing asks for activations."""
    if SEARCH in material.questions:
        return material.questions[SEARCH]
    if "activations" in (config.plan.alignment, *config.sweep.alignments) and config.data.mmlu is not None:
        return _unreported(read_questions(config, SEARCH), config, material.questions.get(REPORT))
    return material.subsets[0].questions if material.subsets else None


def _load(config: Config, split: str, subjects: str | Iterable[str], language: str, shots: int) -> QuestionSet:
    return _load_sets(config, split, [subjects], language, shots)[0]


def _load_sets(
    config: Config, split: str, subjects: Sequence[str | Iterable[str]], language: str, shots: int
) -> list[QuestionSet]:
    """A set for each choice of subjects, of files that are read once."""
    data = config.data
    if data.mmlu is None:
        raise ConfigError(
            "data.mmlu is null, but layers are compared on questions: only `raymerge evaluate`, `raymerge "
            "sweep` and `raymerge search` work without them"
        )
    return load_question_sets(
        data.mmlu,
        subjects,
        language=language,
        split=split,
        shots=shots,
        revision=data.revision,
        domains=data.domains or None,
    )


def _without(questions: QuestionSet, used: set[tuple[str, str]], whole: str) -> QuestionSet:
    """The set without questions that are used elsewhere, by split and id or by content. Raises DataError, which says
    `whole`, where nothing is left."""
    kept = tuple(
        question
        for question in questions.questions
        if ("id", f"{question.split}/{question.question_id}") not in used
        and ("content", question.content_hash) not in used
    )
    if not kept:
        raise DataError(whole)
    return replace(questions, questions=kept)


def _unreported(questions: QuestionSet, config: Config, reported: QuestionSet | None) -> QuestionSet:
    """The questions of the search without those that are reported on (read here where they are not given), unless the
    splits are the same by the configuration. Raises DataError."""
    if config.data.search_split == config.data.report_split:
        return questions
    # Some 120 of MMLU's 1,531 validation questions stand in its test split as well.
    reported = read_questions(config, REPORT) if reported is None else reported
    used = {("content", question.content_hash) for question in reported.questions}
    whole = "every question of the search is reported on as well: set data.search_split to another split"
    return _without(questions, used, whole)


def _judged_on(questions: QuestionSet, config: Config) -> QuestionSet:
    """The questions that the search's objective takes. Raises ConfigError for a subject that they have none of."""
    objective, known = config.search.objective, questions.subjects
    domains = known_domains(config.data.domains)
    parsed = parse_objective(objective).over(known, domains)
    if missing := sorted(set(parsed.subjects) - set(known)):
        whole = [name for name, members in domains.items() if members and set(members) <= set(known)]
        near = sorted({name for one in missing for name in difflib.get_close_matches(one, [*known, *whole])})
        like = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ConfigError(
            f"search.objective {objective} names {missing}{like}, but the search questions have {len(known)} other "
            f"subjects: {shorten(', '.join(known), 300, placeholder=' …')}"
            + (f"; complete domains among them are {', '.join(whole)}" if whole else "")
            + "; data.subjects and data.domains choose them"
        )
    if not parsed.judged_on:
        return questions
    return replace(questions, questions=tuple(q for q in questions.questions if q.subject in parsed.judged_on))


def read_samples(similarity_run: str) -> set[tuple[str, str]]:
    """What names the prompts of a similarity run: ("id", split/question id) and ("content", hash). Raises RunError."""
    rows = RunDirectory.load(similarity_run).read("samples", ["split", "question_id", "content_hash"]).to_pylist()
    return {("id", f"{row['split']}/{row['question_id']}") for row in rows} | {
        ("content", row["content_hash"]) for row in rows
    }


@dataclass(frozen=True)
class Subset:
    """The prompts of one similarity matrix: `name` of a subject, a domain or ALL."""

    name: str
    language: str
    questions: QuestionSet


def read_subsets(config: Config) -> list[Subset]:
    """The subsets of the similarity section, languages within subsets.

    A subset's samples are spread evenly over its subjects, drawn by the section's seed; what a subject lacks the
    others give. Several languages get the same questions: those that stand in all of them. Raises DataError where a
    subset has too few prompts, or none.
    """
    settings = config.similarity
    languages = settings.languages or [config.data.language]
    if len(set(settings.subsets)) < len(settings.subsets) or len(set(languages)) < len(languages):
        raise ConfigError(f"similarity.subsets {settings.subsets} or languages {languages} name one of them twice")
    subjects = [config.data.subjects if name == ALL else [name] for name in settings.subsets]
    load = partial(_load_sets, config, settings.split, subjects, shots=settings.shots)
    shared = _shared_ids(map(load, languages)) if len(languages) > 1 else None
    places: list[dict[tuple[str, str], int]] = [{} for _ in settings.subsets]
    found: dict[tuple[str, str], Subset] = {}
    for language in languages:
        # One language's questions at a time: all 42 of Global-MMLU are 590,000, of which samples are a small part.
        for number, (name, questions) in enumerate(zip(settings.subsets, load(language), strict=True)):
            usable = questions.questions
            if shared is not None:
                usable = tuple(q for q in usable if (q.subject, q.question_id) in shared[number])
            chosen = _spread(replace(questions, questions=usable), settings.samples, settings.seed)
            if len(chosen) < settings.samples:
                where = f"split {questions.split}" + (" of every language" if len(languages) > 1 else "")
                raise DataError(
                    f"subset {name} has {len(usable)} prompts in {where}, but similarity.samples asks for "
                    f"{settings.samples}: take fewer, or set similarity.split to test (reports leave those prompts out)"
                )
            # Of whatever order a language's file has them in, samples of one number are translations of one another.
            own = places[number] = places[number] or {(q.subject, q.question_id): at for at, q in enumerate(chosen)}
            order = [own[q.subject, q.question_id] for q in chosen]
            chosen = tuple(q for _, q in sorted(zip(order, chosen, strict=True), key=itemgetter(0)))
            found[name, language] = Subset(name, language, replace(questions, questions=chosen))
    return [found[name, language] for name in settings.subsets for language in languages]


def _shared_ids(languages: Iterable[Sequence[QuestionSet]]) -> list[set[tuple[str, str]]]:
    """The (subject, question id) that every language has, of each subset; languages: the subsets' sets of each."""
    shared: list[set[tuple[str, str]]] = []
    for sets in languages:
        ids = [{(q.subject, q.question_id) for q in of.questions} for of in sets]
        shared = [both & own for both, own in zip(shared, ids, strict=True)] if shared else ids
    return shared


def _spread(questions: QuestionSet, count: int, seed: int) -> tuple[Question, ...]:
    """At most `count` questions, as evenly over the subjects as they have them, in the set's order."""
    parts = list(questions.by_subject().values())
    shares, left = [0] * len(parts), count
    while left and any(share < len(part) for share, part in zip(shares, parts, strict=True)):
        for number, part in enumerate(parts):
            if left and shares[number] < len(part):
                shares[number] += 1
                left -= 1
    picked = [sample(part, share, seed) for part, share in zip(parts, shares, strict=True) if share]
    return tuple(question for part in picked for question in part)


def read_similarity(
    run: str, *, n_layers: int, subset: str | None = None, language: str | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The (L, L) float64 matrix of a similarity run, and block influence (L,) float64 where the run has it.

    subset and language choose where there are several matrices. Missing values are NaN. Raises ConfigError where the
    choice is not unique or the run is of another number of layers, RunError where there is no such run.
    """
    loaded = RunDirectory.load(run)
    stored = loaded.read("similarity")
    for column, chosen in (("subset", subset), ("language", language)):
        stored = stored if chosen is None else stored.filter(pc.equal(stored[column], chosen))
    keys = ["subset", "language", "measure", "embedding"]
    found = stored.group_by(keys).aggregate([]).to_pylist()
    if len(found) != 1:
        names = sorted(f"{key['subset']} in {key['language']}" for key in found)
        named = ", ".join(names if len(names) < 6 else [*names[:4], f"{len(names) - 4} more"])
        raise ConfigError(
            f"{run} holds {len(found)} similarity matrices{f' ({named})' if found else ''} for subset "
            f"{subset or 'any'} and language {language or 'any'}, but coefficients need exactly one: set "
            "plan.similarity_subset and plan.similarity_language"
        )
    (key,), rows = found, stored.to_pylist()  # of one matrix: 285 subsets of 80 layers have 1.8 million rows
    size = 1 + max(row["layer_i"] for row in rows)
    if size != n_layers:
        raise ConfigError(f"{run} is for a model of {size} layers, this one has {n_layers}: give a run of this model")
    matrix = np.full((size, size), np.nan)
    for row in rows:
        if row["value"] is not None:
            matrix[row["layer_i"], row["layer_j"]] = row["value"]
    influence = np.full(size, np.nan)
    for row in loaded.read("block_influence").to_pylist():
        if (row["subset"], row["language"]) == (key["subset"], key["language"]):
            influence[row["layer"]] = row["value"]
    return matrix, None if np.isnan(influence).any() else influence


def read_text(config: Config) -> str | None:
    """The plain text for perplexity, or None. Raises ConfigError."""
    source = config.data.perplexity_text
    return None if source is None else read_plain_text(source, "data.perplexity_text")


def read_search_text(config: Config) -> tuple[str, int] | None:
    """The plain text that candidates are judged on and the number of its first token; None where none is asked for.

    Where it is the text reported on, by content, it begins after the tokens that are: candidates are chosen on other
    tokens than those they are reported on. Two texts of which one holds the other are refused; texts that share less
    than that are not noticed. Raises ConfigError.
    """
    source = config.search.text
    if source is None or not config.needs_search_text:  # Config refuses to need what it lacks
        return None
    text = read_plain_text(source, "search.text")
    return text, _first_token(text, "search.text", source, [_reported(config)])


def read_calibration_text(config: Config) -> tuple[str, int] | None:
    """The plain text of the calibration section and the number of its first token; None where it names none.

    It begins after what is reported on and after what candidates are judged on, as `read_search_text`'s does after the
    former. Raises ConfigError.
    """
    source = config.calibration.text
    if source is None:
        return None
    text, settings = read_plain_text(source, "calibration.text"), config.search
    used = [_reported(config)]
    if (search := read_search_text(config)) is not None and settings.text is not None:
        used.append((search[0], "search.text", settings.text, search[1] + settings.text_tokens))
    return text, _first_token(text, "calibration.text", source, used)


_Used = tuple[str, str, str, int]  # a text, its key and its name, and the first of its tokens that is not used


def _reported(config: Config) -> _Used | None:
    text, source = read_text(config), config.data.perplexity_text
    if text is None or source is None:
        return None
    return text, "data.perplexity_text", source, config.data.perplexity_tokens


def _first_token(text: str, key: str, source: str, used: Sequence[_Used | None]) -> int:
    """The first token of a text that no other use of the same text takes."""
    first = 0
    for other, other_key, other_source, end in filter(None, used):
        if text.strip() == other.strip():
            first = max(first, end)
        elif text.strip() in other or other.strip() in text:
            raise ConfigError(
                f"{key} = {source!r} and {other_key} = {other_source!r} overlap: one contains the other. Name the same "
                "file twice (each then takes tokens after the other's) or two different texts"
            )
    return first


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a model is asked, and what something is chosen or fitted on.

    questions: those of SEARCH and REPORT, by role. search_text: what candidates are judged on, and the number of its
    first token. calibration: what something is chosen or fitted on, such a text or prompts.
    """

    questions: dict[str, QuestionSet] = field(default_factory=dict)
    subsets: list[Subset] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)
    search_text: tuple[str, int] | None = None
    calibration: tuple[str, int] | QuestionSet | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        more = [SUBSETS] if self.subsets else []
        more += [] if self.search_text is None else [SEARCH_TEXT]
        more += [] if self.calibration is None else [CALIBRATION]
        return (*self.questions, *more, *map(task_role, self.tasks))

    @property
    def identities(self) -> dict[str, str]:
        """The identity of every set of prompts and of every text; the driver's and the workers' must be the same."""
        sets = {
            **self.questions,
            **{f"{subset.name}/{subset.language}": subset.questions for subset in self.subsets},
            **{task_role(name): task for name, task in self.tasks.items()},
            SEARCH_TEXT: self.search_text,
            CALIBRATION: self.calibration,
        }
        return {
            name: text_hash(of[0]) if isinstance(of, tuple) else of.identity
            for name, of in sets.items()
            if of is not None
        }


def read_material(config: Config, roles: Sequence[str]) -> Material:
    """Everything that roles (SEARCH, REPORT, SEARCH_TEXT, SUBSETS, CALIBRATION, tasks') need; SEARCH has SEARCH_TEXT
    with it where the search asks for one, the questions that search.objective takes, and of these nothing of what is
    reported on, unless the splits are the same by the configuration. Raises DataError, ConfigError."""
    questions = {role: read_questions(config, role) for role in roles if role in (SEARCH, REPORT)}
    if {SEARCH, REPORT} <= set(roles):
        questions[SEARCH] = _unreported(questions[SEARCH], config, questions[REPORT])
    if SEARCH in questions:
        questions[SEARCH] = _judged_on(questions[SEARCH], config)
    subsets = read_subsets(config) if SUBSETS in roles else []
    search_text = read_search_text(config) if {SEARCH, SEARCH_TEXT} & set(roles) else None
    calibration: tuple[str, int] | QuestionSet | None = None
    if CALIBRATION in roles:
        calibration = read_calibration_text(config) or questions.get(SEARCH)
        if calibration is None:  # of a sweep, or of a choice of blocks
            calibration = _unreported(read_questions(config, SEARCH), config, questions.get(REPORT))
    return Material(
        questions=questions,
        subsets=subsets,
        tasks=read_tasks(config, roles),
        search_text=search_text,
        calibration=calibration,
    )
