"""What a configuration asks to be read: the questions to search on, those to report on, and the plain text.

Driver and workers each read for themselves, by the same functions, and compare identities.
"""

from __future__ import annotations

from pathlib import Path

from raymerge import demo
from raymerge.config import Config, ConfigError
from raymerge.questions import QuestionSet, load_questions

SEARCH, REPORT, TEXT = "search", "report", "text"  # what can be read, by what it is for


def read_questions(config: Config, role: str) -> QuestionSet:
    """The questions of role SEARCH or REPORT. Raises DataError."""
    data = config.data
    split, limit = {
        SEARCH: (data.search_split, data.limit_per_subject),
        REPORT: (data.report_split, data.report_limit_per_subject),
    }[role]
    return load_questions(
        data.mmlu,
        language=data.language,
        split=split,
        subjects=data.subjects,
        shots=data.shots,
        limit_per_subject=limit,
        seed=data.seed,
        revision=data.revision,
        domains=data.domains or None,
    )


def read_text(config: Config) -> str | None:
    """The plain text for perplexity: the embedded one, a UTF-8 file, or None. Raises ConfigError."""
    source = config.data.perplexity_text
    if source is None:
        return None
    path = demo.TEXT_PATH if source == "demo" else Path(source).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.perplexity_text = {source!r} cannot be read as UTF-8 text: {error}") from error
