"""A configuration as YAML: reading one with overrides, and writing one out with its explanations."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raymerge.config import Config, ConfigError, TaskConfig


def load_config(path: str | Path | None = None, overrides: str | Sequence[str] = ()) -> Config:
    """Read a YAML file (all defaults without one) and apply overrides, one or several, of the form section.key=value
    (value in YAML).

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest known one) or a bad value.
    """
    values: Any = {}
    if path is not None:
        try:
            values = _yaml(Path(path).read_text(encoding="utf-8"), str(path)) or {}
        except FileNotFoundError:
            raise ConfigError(f"there is no configuration {path}; jobs/configs/ holds examples") from None
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections such as model: and data:, not {values!r}")
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _apply(values, override)
    sources = [str(path)] * (path is not None) + ["the command line"] * (bool(overrides) or path is None)
    return parse_config(values, source=" and ".join(sources))


def check_config(config: object) -> None:
    """Refuse what is not a configuration, such as the path of one. Raises ConfigError."""
    if not isinstance(config, Config):
        source = repr(str(config)) if isinstance(config, str | PathLike) else "FILE"
        raise ConfigError(
            f"an experiment takes a Config, not the {type(config).__name__} {config!r}: give it "
            f"raymerge.load_config({source})"
        )


def parse_config(values: dict[str, Any], *, source: str) -> Config:
    """A Config from plain values; `source` is named in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(error))) from None


def describe(config: Config) -> str:
    """The configuration as YAML, each section under its explanation; itself a valid configuration file."""
    lines = []
    for name, field in Config.model_fields.items():
        lines += [f"# {line}".rstrip() for line in (inspect.getdoc(field.annotation) or "").splitlines()]
        section = {name: getattr(config, name).model_dump(mode="json")}
        lines += [yaml.safe_dump(section, sort_keys=False, allow_unicode=True)]
    return "\n".join(lines)


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: PyYAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    said = f"{key.value!r} is given twice: keep one"
                    raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml(text: str, name: str) -> Any:
    """The value of a YAML text; `name` is what errors call it. Raises yaml.YAMLError."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except ValueError as error:  # PyYAML's own of what looks like a date or a number and is none, such as 2024-13-01
        raise yaml.YAMLError(f"{error}; put quotes around what is a text") from error
    finally:
        loader.dispose()


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"{override!r} is not an override: write section.key=value, such as plan.merges=4")
    try:
        value = _yaml(text, "--set")
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {override!r} is not YAML: {error}") from error
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
        # Beyond section and key, pydantic's location names the alternative that it tried. A task's key has its name.
        key = ".".join(where[: 3 if where[:1] == ["tasks"] else 2])
        found.setdefault(key + shown, []).append(problem["msg"].removeprefix("Value error, "))
    return [f"{key}: {' or '.join(messages)}".removeprefix(": ") for key, messages in found.items()]


def _near(where: list[str]) -> str:
    section: Any = Config
    for part in where[:-1]:
        field = section.model_fields.get(part)
        section = TaskConfig if field is None else field.annotation  # the name of a task is nobody's field
    known = list(section.model_fields)
    near = difflib.get_close_matches(where[-1], known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
