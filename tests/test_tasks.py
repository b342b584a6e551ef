"""tasks.py: each format's contexts and choices as lm-evaluation-harness 0.4.13 renders them, and what is refused.

The expected texts were written by hand from lm-eval's task files; tests/benchmarks/harness_parity.py --formats compares
the same rows with lm-eval itself.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import task_files

from raymerge.questions import DataError
from raymerge.tasks import FORMATS, load_task

ASKED = {
    "piqa": [
        ("Question: How to carry water in a hand\nAnswer:", ("Make a cup of both hands.", "Use a net."), 0),
        ("Question: To open a stuck jar,\nAnswer:", ("warm the lid", "warm the lid and then pull"), 1),
        ("Question: Séchez une chemise \nAnswer:", (" hang it in the sun", "hang it in the sea — naïvely"), 0),
    ],
    "hellaswag": [
        (
            "Making bread: How to bake. Mix flour and water. Stir it. Then she",
            ("puts it in the oven.", " reads a book.", "puts it away.", "sings. Songs"),
            0,
        ),
        (
            "Walking a dog: A man walks along a road with a dog.",
            ("The dog", "The dog runs after a cat.", "The dog runs after a car.", "It rains."),
            2,
        ),
    ],
    "arc": [
        (
            "Question: Which of these is a liquid at room temperature?\nAnswer:",
            ("iron", "water", "stone", "wood"),
            1,
        ),
        ("Question: What do plants need?\nAnswer:", ("light", "a light that is not too strong", "noise"), 0),
    ],
    "openbookqa": [
        ("The sun gives the earth", ("light", "rain", "stones", "its name"), 0),
        ("A cat has", ("four legs", "two legs", "no legs at all", "wheels"), 3),
    ],
    "boolq": [
        ("Water is wet -- it is a liquid.\nQuestion: is water a liquid?\nAnswer:", ("no", "yes"), 1),
        ("The old road was closed in 1990.\nQuestion: is the old road open?\nAnswer:", ("no", "yes"), 0),
    ],
    "race": [
        (
            "Article: Ann has a red cat. It sleeps in a box near the door.\n\nAnn has a cat\n"
            "Question: Where does it sleep?\nAnswer: box\nThe cat is  _  .",
            ("blue", "old", "green", "red"),
            3,
        ),
        (
            "Article: It rained by night.\nThe road was wet.\n\nWhy was it wet?",
            ("sun", "wind", "the rain", "a river"),
            2,
        ),
    ],
}


def asked(task):
    return [(item.context, item.choices, item.answer) for item in task.items]


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_asked_and_how(format, tmp_path):
    task = load_task("t", format, task_files.write(tmp_path, format))
    assert asked(task) == ASKED[format]
    assert [item.item_id for item in task.items] == [f"t/{row}" for row in range(len(task.items))]
    assert task.normalised == (format not in ("boolq", "race")) and task.prefix == ""
    table = pa.Table.from_pylist(task_files.ROWS[format])
    pq.write_table(table, tmp_path / "same.parquet")
    same = load_task("t", format, tmp_path / "same.parquet")
    assert same.items == task.items and same.identity == task.identity


def test_examples_come_before_each_context(tmp_path):
    examples = task_files.write(tmp_path, "boolq")
    other = {"passage": "P.", "question": "q", "label": 0}
    file = tmp_path / "other.jsonl"
    file.write_text(json.dumps(other))
    plain, task = (load_task("t", "boolq", file, shots=shots, examples=examples) for shots in (0, 2))
    (first, _, _), (second, _, _) = ASKED["boolq"]
    assert task.prefix == f"{first} yes\n\n{second} no\n\n"
    assert task.items == plain.items and task.identity != plain.identity


def test_other_copies_of_the_same_data(tmp_path):
    """RACE with a question a row, its articles apart; BoolQ with a truth for an answer."""
    rows = []
    for number, row in enumerate(task_files.ROWS["race"]):
        rows += [
            {"example_id": f"high{number}.txt", "article": row["article"], **problem}
            for problem in json.loads(row["problems"])
        ]
    task = load_task("t", "race", task_files.write(tmp_path, "race", rows))
    assert asked(task) == ASKED["race"]
    assert [item.item_id for item in task.items] == ["t/2", "t/3"]  # the rows of the last questions
    rows = [{**row, "answer": bool(row["label"])} for row in task_files.ROWS["boolq"]]
    rows = [{name: value for name, value in row.items() if name != "label"} for row in rows]
    assert asked(load_task("t", "boolq", task_files.write(tmp_path, "boolq", rows))) == ASKED["boolq"]


def test_a_limit_draws_nested_samples(tmp_path):
    rows = [{"goal": f"goal\u2028{i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(40)]
    # A line separator inside a text is not the end of a line of JSON.
    path = tmp_path / "piqa.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    few, more = (load_task("t", "piqa", path, limit=n, seed=1).items for n in (5, 12))
    assert len(few) == 5 and len(more) == 12 and set(few) < set(more)
    assert [item.item_id for item in more] == sorted((i.item_id for i in more), key=lambda name: int(name[2:]))
    assert load_task("t", "piqa", path, limit=5, seed=2).items != few
    assert len(load_task("t", "piqa", path, limit=100).items) == 40


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("winogrande", {}, "unknown format 'winogrande'; there are piqa"),
        ("arc", {}, r"row 0 \(from 0\): no question; has: goal, sol1, sol2, label. Is it another format?"),
        ("piqa", {"label": -1}, "the answer is number -1, not one of the 2 choices .*take the validation split"),
        ("piqa", {"label": ""}, "the answer is number -1"),
        ("piqa", {"label": 2}, "the answer is number 2"),
        ("piqa", {"label": 0.5}, "label is 0.5, not a number"),
        ("piqa", {"sol2": None}, "sol2 is None, not text"),
        ("piqa", {"label": "9" * 5000}, "label is '9+', not a number"),
        ("piqa", {"goal": "why? \ud83d"}, r"jsonl row 0 \(from 0\): goal has half a character, \\ud83d: write both"),
    ],
)
def test_what_is_refused(format, change, words, tmp_path):
    path = task_files.write(tmp_path, "piqa", [{**task_files.ROWS["piqa"][0], **change}])
    with pytest.raises(DataError, match=words):
        load_task("t", format, path)


def test_answers_and_lists_that_are_none(tmp_path):
    for format, change, words in (
        ("arc", {"answerKey": "E"}, "the answer is number -1, not one of the 4"),
        ("arc", {"choices": ["a", "b"]}, "choices is .*, not {'text'"),
        ("arc", {"choices": {"text": ["a"], "label": ["A"]}}, "choices.text is .*at least two"),
        ("hellaswag", {"endings": "one"}, "endings is 'one', not a list"),
        ("race", {"problems": "[1, "}, "problems is not a list of questions"),
        ("race", {"problems": "[{'question': 'q', 'options': ['a', 'b'], 'answer': ''}]"}, "the answer is number -1"),
        ("race", {"problems": "[{'question': 3, 'options': ['a', 'b'], 'answer': 'A'}]"}, "question's text is 3"),
        ("race", {"problems": "[{'question': 'q', 'options': 3, 'answer': 'A'}]"}, "question's options is 3"),
        ("race", {"problems": r"[{'question': '\ud83d', 'options': ['a', 'b'], 'answer': 'A'}]"}, "half a character"),
    ):
        path = task_files.write(tmp_path, format, [{**task_files.ROWS[format][0], **change}])
        with pytest.raises(DataError, match=words):
            load_task("t", format, path)


def test_files_and_examples_that_do_not_do(tmp_path):
    path = task_files.write(tmp_path, "piqa")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "mixed.jsonl").write_text('{"goal": "a"}\n[1]\n')
    (tmp_path / "bad.jsonl").write_text('{"goal": "a"}\n\n{"goal": }\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    refused = {"no": "cannot be read", "list": "no rows", "mixed": "no rows", "deep": "cannot be read as jsonl: line 1"}
    refused["bad"] = "cannot be read as jsonl: line 3, character 10"
    for file, words in refused.items():
        with pytest.raises(DataError, match=words):
            load_task("t", "piqa", tmp_path / f"{file}.jsonl")
    with pytest.raises(DataError, match="neither .jsonl"):
        load_task("t", "piqa", tmp_path / "piqa.csv")
    with pytest.raises(DataError, match="shots=1 needs examples"):
        load_task("t", "piqa", path, shots=1)
    with pytest.raises(DataError, match="shots=9, but .* has 3 items"):
        load_task("t", "piqa", path, shots=9, examples=path)
    with pytest.raises(DataError, match="example t/0 of .* is also asked"):
        load_task("t", "piqa", path, shots=1, examples=path)
