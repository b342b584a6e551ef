"""Every option and its default. YAML in, an immutable Config out; unknown keys are refused.

This module is the only home of defaults: other modules take what they need as arguments and have none of their own
for these.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raymerge.plan import FIXED_RATIO

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1)]
NAMED_OBJECTIVES = ("micro_accuracy", "macro_accuracy", "answer_nll")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Section):
    """The model. path: demo, a folder, or a hub id. dtype: of the computation; auto is float32 on CPUs and the stored
    dtype on GPUs. add_bos: put the BOS token first; null does as the tokenizer does. trust_remote_code: run the
    model repository's own Python."""

    path: str = "demo"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    add_bos: bool | None = None
    trust_remote_code: bool = False


class DataConfig(_Section):
    """Questions and text. mmlu: demo, a folder (CSV or parquet) or a hub id. subjects: all, or a list of subjects and
    domains. Limits are questions a subject, drawn with `seed`. perplexity_text: demo, a text file, or null;
    perplexity_tokens: at most so many of its tokens. question_perplexity: also the loss of the questions' own prompt
    tokens (the whole vocabulary at every token, so it costs far more than the answers do)."""

    mmlu: str = "demo"
    revision: str | None = None
    language: str = "en"
    subjects: Literal["all"] | list[str] = "all"
    domains: dict[str, list[str]] = {}
    shots: Annotated[int, Field(ge=0)] = 5
    search_split: Literal["validation", "test", "dev"] = "validation"
    report_split: Literal["validation", "test"] = "test"
    search_on_test: bool = False
    limit_per_subject: Positive | None = None
    report_limit_per_subject: Positive | None = None
    seed: int = 0
    perplexity_text: str | None = "demo"
    perplexity_tokens: Annotated[int, Field(ge=2)] = 8192
    question_perplexity: bool = False

    @field_validator("subjects", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all":
            return [name.strip() for name in value.split(",") if name.strip()]
        return value


class PlanConfig(_Section):
    """What is merged: the last `merges` layers. base: where the base coefficients come from - fixed (`ratio`
    everywhere), similarity_ratio or similarity (from `similarity_run`), or file (`alpha_file`)."""

    merges: Positive = 13
    selection: Literal["tail"] = "tail"
    base: Literal["fixed", "similarity_ratio", "similarity", "file"] = "fixed"
    ratio: Annotated[float, Field(ge=0, le=1)] = round(FIXED_RATIO, 4)
    similarity_run: str | None = None
    alpha_file: str | None = None
    alignment: Literal["none"] = "none"
    norms: Literal["keep"] = "keep"
    biases: Literal["keep", "merge"] = "keep"

    @model_validator(mode="after")
    def _has_its_source(self) -> PlanConfig:
        if self.base == "file" and not self.alpha_file:
            raise ValueError("base is file, so alpha_file must name one")
        if self.base.startswith("similarity") and not self.similarity_run:
            raise ValueError(f"base is {self.base}, so similarity_run must name the run of `raymerge similarity`")
        return self


class SearchConfig(_Section):
    """The alpha search. objective: micro_accuracy, macro_accuracy, answer_nll, or accuracy:SUBJECT[,SUBJECT…].
    candidates: coefficient vectors tried, known ones included; initial: random ones before the model proposes;
    random_candidates: random vectors scored as a control; batch: candidates a Tune trial carries; probes: further
    alpha files tried first."""

    searcher: Literal["bayes", "random"] = "bayes"
    objective: str = "micro_accuracy"
    candidates: Positive = 60
    initial: Annotated[int, Field(ge=0)] = 10
    random_candidates: Annotated[int, Field(ge=0)] = 10
    probes: list[str] = []
    bounds: tuple[float, float] = (0.0, 1.0)
    batch: Positive | Auto = "auto"
    concurrent: Positive | Auto = "auto"
    seed: int = 0

    @field_validator("bounds")
    @classmethod
    def _inside_unit(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] < value[1] <= 1.0:
            raise ValueError(f"bounds are {list(value)}: they must satisfy 0 <= low < high <= 1")
        return value

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, value: str) -> str:
        if value not in NAMED_OBJECTIVES and not value.removeprefix("accuracy:").strip():
            raise ValueError("accuracy: must be followed by subjects, such as accuracy:anatomy")
        if value not in NAMED_OBJECTIVES and not value.startswith("accuracy:"):
            raise ValueError(f"{value!r} is not one of {', '.join(NAMED_OBJECTIVES)}, accuracy:SUBJECT[,SUBJECT]")
        return value


class WorkersConfig(_Section):
    """Model actors. count and gpus_per_worker: auto means one actor a GPU, or without GPUs one for every
    cpus_per_worker CPUs. timeout_s: seconds after which a silent actor is replaced."""

    count: Positive | Auto = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = "auto"
    cpus_per_worker: Positive = 1
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    max_restarts: Annotated[int, Field(ge=0)] = 3


class OutputConfig(_Section):
    """The run directory and what goes into it. cache: where trunk states are kept; null is RUN/cache."""

    run: str = "runs/demo"
    cache: str | None = None
    store_candidate_answers: bool = False
    save_best: bool = True
    figures: bool = True


class Config(_Section):
    """A whole configuration; `resolved()` is what is written to RUN/config.yaml."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    plan: PlanConfig = PlanConfig()
    search: SearchConfig = SearchConfig()
    workers: WorkersConfig = WorkersConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _does_not_search_on_test(self) -> Config:
        data = self.data
        if data.search_split == "test" and not data.search_on_test:
            raise ValueError(
                "data.search_split is test: coefficients chosen on test questions make every test figure too good; "
                "search on validation, or set data.search_on_test: true to do it all the same"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def describe(config: Config) -> str:
    """The configuration as YAML, each section under its explanation; itself a valid configuration file."""
    lines = []
    for name, field in Config.model_fields.items():
        lines += [f"# {line.strip()}" for line in inspect.getdoc(field.annotation).splitlines()]
        section = {name: getattr(config, name).model_dump(mode="json")}
        lines += [yaml.safe_dump(section, sort_keys=False, allow_unicode=True)]
    return "\n".join(lines)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (all defaults without one) and apply overrides of the form section.key=value (value in YAML).

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest known one) or a bad value.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise ConfigError(f"there is no configuration {path}; jobs/configs/ holds examples") from None
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections such as model: and data:, not {values!r}")
    for override in overrides:
        _apply(values, override)
    return parse_config(values, source=str(path) if path else "the command line")


def parse_config(values: dict[str, Any], *, source: str) -> Config:
    """A Config from plain values; `source` is named in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(error))) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"{override!r} is no override: write section.key=value, such as plan.merges=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {override!r} is no YAML: {error}") from error
    section = values
    for part in parts[:-1]:
        # An empty section in YAML is None.
        section[part] = section.get(part) or {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(f"{override!r}: {part} is not a section")
    section[parts[-1]] = value


def _explain(error: ValidationError) -> list[str]:
    """One line for each wrong key; the alternatives of a key that may be several things are joined by "or"."""
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            found[f"unknown key {'.'.join(where)}"] = [_near(where)]
            continue
        shown = "" if isinstance(problem["input"], dict | BaseModel) else f" = {problem['input']!r}"
        # Beyond section and key, pydantic's location names the alternative that it tried.
        found.setdefault(".".join(where[:2]) + shown, []).append(problem["msg"].removeprefix("Value error, "))
    return [f"{key}: {' or '.join(messages)}".removeprefix(": ") for key, messages in found.items()]


def _near(where: list[str]) -> str:
    section: Any = Config
    for part in where[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    near = difflib.get_close_matches(where[-1], known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
