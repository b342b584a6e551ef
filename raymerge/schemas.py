"""The schema of every Arrow table, rows checked against it, and the accuracies that follow from answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raymerge import columns
from raymerge.statistics import accuracy_summary, answer_nll, macro_interval, macro_summary, wilson_interval

#: A row of a table, by column: as it is stored, or put together from such rows.
Row = dict[str, Any]

#: Subjects of `accuracy` that are averages: over questions, and over subjects.
MICRO, MACRO = "_micro", "_macro"

#: Language, measure and embedding of similarity matrices that other programs made.
IMPORTED = "imported"

#: What a row of `sweep` has whose layers are neither aligned, nor folded, nor refitted.
PLAIN = {"alignment": "none", "norms": "keep", "refit": "none"}

#: Of `comparisons` of plain text, which is no split of the questions.
TEXT_SPLIT = "text"

#: Measures of `task_accuracy`, and the columns of `task_answers` that they judge by.
TASK_MEASURES = {"acc": "predicted", "acc_norm": "predicted_norm"}

_TYPES = {
    "str": pa.string(),
    "i8": pa.int8(),
    "i32": pa.int32(),
    "i64": pa.int64(),
    "f32": pa.float32(),
    "f64": pa.float64(),
    "bool": pa.bool_(),
    "list": pa.list_(pa.float64()),
}


def _schema(text: str) -> pa.Schema:
    """Schema from 'name:type name:type? …'; '?' marks nullable; run_id goes first."""
    fields = [pa.field("run_id", pa.string(), nullable=False)]
    for word in text.split():
        name, kind = word.split(":")
        fields.append(pa.field(name, _TYPES[kind.rstrip("?")], nullable=kind.endswith("?")))
    return pa.schema(fields)


# fmt: off
#: Schema of every table; what its columns mean is in columns.py.
SCHEMAS: dict[str, pa.Schema] = {name: _schema(text) for name, text in {
    "similarity": "subset:str language:str measure:str embedding:str layer_i:i32 layer_j:i32 value:f64? null_mean:f64? "
        "null_p95:f64? ci_low:f64? ci_high:f64? n_samples:i32 note:str?",
    "similarity_correlation": "subset_a:str language_a:str subset_b:str language_b:str measure:str pearson:f64 "
        "pearson_off_diagonal:f64 ci_low:f64? ci_high:f64? reliability_a:f64? reliability_b:f64?",
    "embeddings": "subset:str language:str embedding:str layer:i32 sample:i32 coordinate:i32 value:f64",
    "degeneracy": "subset:str language:str layer:i32 effective_rank:f64 off_diagonal_mass:f64",
    "samples": "subset:str language:str sample:i32 subject:str split:str question_id:str content_hash:str",
    "block_influence": "subset:str language:str layer:i32 value:f64 n_samples:i32",
    "blocks": "merges:i32 first:i32 last:i32 measure:str score:f64? chosen:bool tokens:i64?",
    "removals": "step:i32 layer:i32 loss:f64? chosen:bool tokens:i64",
    "sensitivity": "subset:str language:str parameter:str setting:str reference:bool pearson:f64? "
        "pearson_off_diagonal:f64? plan_overlap:f64? alpha_max_difference:f64? note:str?",
    "plans": "plan_id:str name:str kind:str selection:str alignment:str norms:str matrix:str? step:i32? into:i32? "
        "remove:i32? alpha:f64?",
    "coefficients": "plan_id:str matrix:str? kept_layer:i32 source_layer:i32 coefficient:f64",
    "trials": "searcher:str iteration:i32 batch:i32 tune_trial:str actor:str seed:i64 plan_id:str block:i32? "
        "alphas:list objective:str value:f64? accuracy:f64? nll:f64? perplexity:f64? n_questions:i32 seconds:f64 "
        "cpu_seconds:f64? status:str error:str?",
    "answers": "plan_id:str split:str language:str subject:str question_id:str content_hash:str logit_a:f32 "
        "logit_b:f32 logit_c:f32 logit_d:f32 logsumexp_all:f32? top_is_letter:bool? answer:i8 predicted:i8 "
        "prompt_nll:f64? prompt_tokens:i64?",
    "task_answers": "plan_id:str task:str item_id:str content_hash:str log_likelihoods:list lengths:list answer:i8 "
        "predicted:i8 predicted_norm:i8?",
    "task_accuracy": "plan_id:str task:str measure:str n:i32 correct:i32 accuracy:f64 standard_error:f64 ci_low:f64 "
        "ci_high:f64",
    "accuracy": "plan_id:str split:str language:str subject:str n:i32 correct:i32 accuracy:f64 standard_error:f64 "
        "ci_low:f64? ci_high:f64? nll:f64",
    "comparisons": "plan_a:str plan_b:str split:str measure:str difference:f64 ci_low:f64 ci_high:f64 p_value:f64 "
        "p_holm:f64? test:str",
    "subject_comparisons": "plan_a:str plan_b:str split:str subjects:str n:i32 measure:str difference:f64 ci_low:f64 "
        "ci_high:f64 p_value:f64 p_holm:f64? test:str",
    "task_comparisons": "plan_a:str plan_b:str task:str measure:str difference:f64 ci_low:f64 ci_high:f64 p_value:f64 "
        "p_holm:f64? test:str",
    "perplexity": "plan_id:str target:str subject:str? tokens:i64 nll:f64 perplexity:f64 ci_low:f64? ci_high:f64? "
        "text_hash:str?",
    "text_losses": "plan_id:str window:i32 position:i32 tokens:i64 nll:f64",
    "costs": "plan_id:str layers:i32 layers_removed:i32 parameters:i64 parameters_removed:i64 bytes:i64 "
        "tokens_per_second:f64?",
    "sweep": "plan_id:str merges:i32 method:str alignment:str norms:str refit:str?",
    "refits": "plan_id:str method:str layer:i32 part:str tokens:i64 ridge:f64? error:f64? held_out_error:f64? "
        "seconds:f64?",
    "context": "plan_id:str measure:str bucket:i32 n:i64 value:f64 standard_error:f64?",
    "incidents": "time:str kind:str worker:str? detail:str?",
    "receipts": "plan_id:str tensor:str max_abs_change:f64 relative_change:f64",
    "gradient_history": "searcher:str start:i32 epoch:i32 loss:f64 held_out_loss:f64? alphas:list",
}.items()}
# fmt: on


def described(table: str) -> pa.Schema:
    """The schema of a table with what it and each column mean, as metadata under "description"."""
    fields = [field.with_metadata({"description": columns.meaning(table, field.name)}) for field in SCHEMAS[table]]
    return pa.schema(fields, {"description": columns.TABLES[table][0]})


def schema_of(table: str) -> pa.Schema:
    """Return the schema of a table; ValueError names the tables there are."""
    if table not in SCHEMAS:
        raise ValueError(f"there is no table {table!r}; tables are {', '.join(SCHEMAS)}")
    return SCHEMAS[table]


def conform(table: str, rows: Iterable[Mapping[str, Any]] | pa.Table, run_id: str) -> pa.Table:
    """Return rows as an Arrow table of exactly the table's schema.

    Parameters
    ----------
    table : str
        A name in `SCHEMAS`.
    rows : list of dict or pyarrow.Table
        Nullable columns may be missing; so may run_id, which if given must be the run's.
    run_id : str

    Raises
    ------
    ValueError
        For an unknown or missing column, a null where none may be, a value of the wrong type, another
        run's rows; the message names table, column and row.
    """
    schema = schema_of(table)
    if isinstance(rows, pa.Table):
        count, present = rows.num_rows, set(rows.column_names)
    else:
        rows = list(rows)
        count, present = len(rows), set().union(*rows)
    if unknown := sorted(present - set(schema.names)):
        raise ValueError(f"table {table} has no column {', '.join(unknown)}; it has {', '.join(schema.names)}")
    if not count and not isinstance(rows, pa.Table):
        return schema.empty_table()
    if missing := [f.name for f in schema if not f.nullable and f.name not in {*present, "run_id"}]:
        raise ValueError(f"rows for table {table} lack {', '.join(missing)}")
    columns = []
    for field in schema:
        default = run_id if field.name == "run_id" else None
        try:
            if not isinstance(rows, pa.Table):
                values = [row.get(field.name, default) for row in rows]
                # given an integer type, pyarrow would cut 1.5 to 1 in silence; a cast refuses
                column = pa.array(values, type=None if pa.types.is_integer(field.type) else field.type)
                column = column.cast(field.type)
            elif field.name in present:
                column = rows.column(field.name).cast(field.type)
            else:
                column = pa.array([default] * count, type=field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"table {table}, column {field.name} ({field.type}): {error}") from error
        if column.null_count and not field.nullable:
            at = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]
            raise ValueError(
                f"table {table}, column {field.name}: {column.null_count} of {count} rows have no value, "
                f"the first is row {at}; this column is never null"
            )
        if field.name == "run_id" and any(value != run_id for value in column.unique().to_pylist()):
            raise ValueError(f"rows for table {table} carry another run's run_id; drop that column")
        columns.append(column)
    return pa.table(columns, schema=schema)


def letter_logits(answers: pa.Table) -> np.ndarray:
    """Return the logits of the four letters (n, 4) float32 of rows of `answers`."""
    return np.stack([answers[f"logit_{letter}"].to_numpy() for letter in "abcd"], axis=1)


def derive_accuracy(answers: pa.Table) -> list[Row]:
    """Return the rows of table `accuracy` that follow from rows of `answers`.

    For each plan, split and language: `_micro` (all questions), `_macro` (mean over subjects;
    n and correct are totals, nll the mean of the subjects' means), then each subject by name.
    Standard errors as in `raymerge.statistics`; NaN where a subject has one question. Intervals of 95 %:
    `wilson_interval`, for `_macro` `macro_interval`. nll is the
    mean negative log-likelihood (nats) of the correct letter among the four.

    Raises
    ------
    ValueError
        If a question occurs twice for the same plan, split, language and subject.
    """
    if not answers.num_rows:
        return []
    keys, levels = _encoded(answers, ("plan_id", "split", "language", "subject", "question_id"))
    cell = keys["plan_id"]  # one integer per group, plans, splits and languages in order of appearance
    for name in ("split", "language", "subject"):
        cell = cell * len(levels[name]) + keys[name]
    unique, first, counts = np.unique(
        cell * len(levels["question_id"]) + keys["question_id"], return_index=True, return_counts=True
    )
    if unique.size < cell.size:
        row = {name: levels[name][keys[name][first[np.argmax(counts)]]] for name in keys}
        raise ValueError(f"answers hold {cell.size - unique.size} rows twice, for example {row}; each counts once")
    answer = answers.column("answer").to_numpy()
    correct = answers.column("predicted").to_numpy() == answer
    nll = answer_nll(letter_logits(answers), answer)
    order = np.argsort(cell, kind="stable")
    starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
    groups: dict[tuple[str, ...], list[tuple[str, np.ndarray]]] = {}
    for rows in np.split(order, starts[1:]):
        names = [levels[name][keys[name][rows[0]]] for name in ("plan_id", "split", "language", "subject")]
        groups.setdefault(tuple(names[:3]), []).append((names[3], rows))
    result = []
    for group, subjects in groups.items():
        base = dict(zip(("plan_id", "split", "language"), group, strict=True))
        named = [(subject, rows) for subject, rows in sorted(subjects, key=lambda item: item[0])]
        every = np.concatenate([rows for _, rows in named])
        lines = [_accuracy_row(subject, correct[rows], nll[rows]) for subject, rows in [(MICRO, every), *named]]
        accuracy, error = macro_summary(
            [line["accuracy"] for line in lines[1:]], [line["standard_error"] for line in lines[1:]]
        )
        mean_nll = float(np.mean([line["nll"] for line in lines[1:]]))
        low, high = macro_interval([line["correct"] for line in lines[1:]], [line["n"] for line in lines[1:]])
        macro = {**lines[0], "subject": MACRO, "accuracy": accuracy, "standard_error": error, "nll": mean_nll}
        macro |= {"ci_low": low, "ci_high": high}
        result += [{**base, **line} for line in [lines[0], macro, *lines[1:]]]
    return result


def derive_task_accuracy(answers: pa.Table) -> list[Row]:
    """Return the rows of table `task_accuracy` that follow from rows of `task_answers`: plans, tasks and measures in
    order of appearance. Standard errors and intervals as in `derive_accuracy`.

    Raises
    ------
    ValueError
        If an item occurs twice for the same plan and task.
    """
    if not answers.num_rows:
        return []
    keys, levels = _encoded(answers, ("plan_id", "task", "item_id"))
    cell = keys["plan_id"] * len(levels["task"]) + keys["task"]
    _, first, counts = np.unique(cell * len(levels["item_id"]) + keys["item_id"], return_index=True, return_counts=True)
    if len(first) < len(cell):
        plan_id, task, item_id = (levels[name][keys[name][first[np.argmax(counts)]]] for name in keys)
        raise ValueError(f"item {item_id} of task {task} is there twice for plan {plan_id}")
    answer = answers.column("answer").to_numpy()
    order = np.argsort(cell, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(cell[order])) + 1)
    stored = [(measure, answers.column(name)) for measure, name in TASK_MEASURES.items()]
    judged = [(measure, column.is_null().to_numpy(), column.fill_null(-1).to_numpy()) for measure, column in stored]
    result = []
    for rows in sorted(groups, key=lambda rows: rows[0]):
        common = {name: levels[name][keys[name][rows[0]]] for name in ("plan_id", "task")}
        for measure, missing, predicted in judged:
            if missing[rows].any():
                continue
            summary = accuracy_summary(answer[rows] == predicted[rows])
            low, high = wilson_interval(summary.correct, summary.n)
            result.append({**common, "measure": measure, **summary._asdict(), "ci_low": low, "ci_high": high})
    return result


def _encoded(rows: pa.Table, names: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
    """Columns as numbers (n,) int64, in order of appearance, and what each number stands for."""
    keys, levels = {}, {}
    for name in names:
        encoded = rows.column(name).combine_chunks().dictionary_encode()
        keys[name] = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        levels[name] = encoded.dictionary.to_pylist()
    return keys, levels


#: Accuracy of guesses among four letters, or four keys of a retrieval prompt.
CHANCE = 0.25
#: Times the unmerged model's perplexity: beyond, a plan is called ruined as a language model, and figures of curves
#: leave it out so that the others can be told apart.
RUINED = 10.0


def plan_labels(plans: Iterable[Row], trials: Iterable[Row]) -> dict[str, str]:
    """plan_id -> what the plan is called wherever it is shown: its names joined by ' = ' (a found plan can be the base
    plan), plans in order of appearance, no two of them alike: a plan from an alpha file has the file's name, and the
    published base.json is not the unmerged model.

    The control of random coefficients is named by how many it is the best of, since what is found beside it is the best
    of more as a rule. plans, trials: rows of these tables.
    """
    drawn = sum(row["searcher"] == "random" and row["status"] == "ok" for row in trials)
    control = f"best of {drawn} random" if drawn else "best of random"
    names: dict[str, dict[str, None]] = {}
    kinds: dict[str, str] = {}
    for row in plans:
        names.setdefault(row["plan_id"], {})[control if row["kind"] == "random" else row["name"]] = None
        kinds.setdefault(row["plan_id"], row["kind"])
    labels = {plan_id: " = ".join(known) for plan_id, known in names.items()}
    for mark in (lambda plan_id: " (alpha file)" * (kinds[plan_id] == "file"), lambda plan_id: f" ({plan_id})"):
        counts = Counter(labels.values())
        labels = {key: label + mark(key) * (counts[label] > 1) for key, label in labels.items()}
    return labels


def way_of(row: Row) -> str:
    """The method of a row of `sweep`, with how its seams are refitted: each refit is a way of its own."""
    refit = row["refit"] or "none"
    return row["method"] if refit == "none" else f"{row['method']} + {refit}"


def turned(comparison: Row) -> Row:
    """A row of `comparisons`, or of a table like it, as the second plan minus the first."""
    plans = {"plan_a": comparison["plan_b"], "plan_b": comparison["plan_a"]}
    low, high = -comparison["ci_high"], -comparison["ci_low"]
    return comparison | plans | {"difference": -comparison["difference"], "ci_low": low, "ci_high": high}


def correlation_ceiling(row: Row) -> float | None:
    """What noise leaves of a correlation of 1, of a row of `similarity_correlation`; None where it is not known.

    A reliability of 0 or less is a matrix of noise, which has no pattern to correlate: two of them below 0, a third of
    all pairs of such matrices, have no ceiling either, although their product is above it.
    """
    a, b = row["reliability_a"], row["reliability_b"]
    return None if a is None or b is None or min(a, b) <= 0 else math.sqrt(a * b)


def correlation_digits(correlations: Iterable[float]) -> int:
    """Decimals that tell correlations from each other and from 1: of 0.9966 and 0.9999 two decimals are 1.00 both."""
    least = min((r for r in correlations if math.isfinite(r)), default=0.0)
    return 2 if 1 - least >= 0.05 else 3 if 1 - least >= 0.005 else 4


def layer_ranges(layers: Iterable[int]) -> str:
    """Numbers of layers as text: "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _accuracy_row(subject: str, correct: np.ndarray, nll: np.ndarray) -> Row:
    summary = accuracy_summary(correct)
    low, high = wilson_interval(summary.correct, summary.n)
    return {"subject": subject, **summary._asdict(), "ci_low": low, "ci_high": high, "nll": float(nll.mean())}
