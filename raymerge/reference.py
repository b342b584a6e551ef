"""The references as Markdown pages, made from what they describe: docs/config.md and docs/tables.md."""

from __future__ import annotations

import inspect
import json
from typing import Any

from raymerge import columns
from raymerge.config import Config
from raymerge.schemas import SCHEMAS

_HEAD = """# The configuration

<!-- Made by `make docs` from raymerge/config.py: edit that. tests/test_docs.py compares. -->

A configuration is a YAML file of sections. Every key has a default, except in `tasks`; unknown keys are refused. On the
command line `--set SECTION.KEY=VALUE` overrides a key, with VALUE in YAML. `raymerge config [FILE]` prints a
configuration in full.
"""

_TABLES_HEAD = """# The tables

<!-- Made by `make docs` from raymerge/columns.py and raymerge/schemas.py: edit these. tests/test_docs.py compares. -->

A run's results are Arrow tables in Parquet files, `RUN/tables/NAME/*.parquet`; which of them a run has depends on the
experiment. A complete run has one file per table, which also contains the meaning of every column
(`pyarrow.parquet.read_schema(FILE).field(COLUMN).metadata[b"description"]`). While a run is going on, or if it was
killed, several files may contain the same rows: read these with `raymerge.RunDirectory.load(RUN).read(NAME)`, which
returns each row once. Layers are numbered from 0, as in the unmerged model. Losses are in nats, times in seconds,
shares in [0, 1], and intervals are 95 %. The types are Arrow's; a question mark means that the column may be null.

`plan_id` joins all tables about plans, `question_id` (with `split`, `language` and `subject`) those about questions.
`plans` has one row per merge step, so select distinct names:

```sql
select name, accuracy, ci_low, ci_high, perplexity
from 'RUN/tables/accuracy/*.parquet' a
join (select distinct plan_id, name from 'RUN/tables/plans/*.parquet') using (plan_id)
join (select plan_id, perplexity from 'RUN/tables/perplexity/*.parquet' where target = 'text') using (plan_id)
where subject = '_micro' and split = 'test'
```
"""


def tables_reference() -> str:
    """The page of the tables: of each what its rows are, and its columns with their types and meanings."""
    lines = [_TABLES_HEAD]
    for table, (rows, _) in columns.TABLES.items():
        lines += [f"## {table}\n", rows, "", "| column | type | meaning |", "|---|---|---|"]
        for field in SCHEMAS[table]:
            kind = str(field.type).replace("list<item: double>", "list of double") + ("?" if field.nullable else "")
            lines.append(f"| `{field.name}` | {kind} | {columns.meaning(table, field.name)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def config_reference() -> str:
    """The page: of each section what its docstring says, and a table of key, allowed values and default."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    lines = [_HEAD]
    for name, field in Config.model_fields.items():
        section = _resolved(schema["properties"][name], definitions)
        explanation = inspect.getdoc(field.annotation)
        assert explanation is not None
        lines += [f"## {name}\n", explanation.replace("<", "\\<"), "", "| key | value | default |", "|---|---|---|"]
        keys, prefix = section.get("properties"), f"{name}."
        if keys is None:  # a mapping of names of the user's own to sections of one kind
            (kind,) = (section.get("patternProperties") or {"": section["additionalProperties"]}).values()
            keys, prefix = _resolved(kind, definitions)["properties"], f"{name}.NAME."
        for key, values in keys.items():
            default = f"`{_yaml(values['default'])}`" if "default" in values else "must be given"
            lines.append(f"| `{prefix}{key}` | {_allowed(values, definitions)} | {default} |")
        lines.append("")
    return "\n".join(lines)


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref") or next((part["$ref"] for part in schema.get("allOf", ()) if "$ref" in part), None)
    return schema if reference is None else definitions[reference.rpartition("/")[2]]


def _yaml(value: Any) -> str:
    """A value on one line, as it may stand in YAML: JSON, but strings bare."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _allowed(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a key takes, in words."""
    schema = _resolved(schema, definitions)
    if "anyOf" in schema:
        return " or ".join(_allowed(part, definitions) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "array" and "prefixItems" in schema:
        return "list of " + ", ".join(_allowed(part, definitions) for part in schema["prefixItems"])
    if kind == "array":
        return f"list of {_allowed(schema['items'], definitions)}"
    if kind == "object":
        (values,) = schema.get("patternProperties", {"": schema.get("additionalProperties")}).values()
        return f"mapping of names to {_allowed(values, definitions)}"
    words = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false", "null": "null"}[kind]
    return " ".join([words, ", ".join(f"{sign} {schema[key]}" for key, sign in _BOUNDS if key in schema)]).strip()
