"""A few self-written items of each task format, as the hub's data sets have them; each has something awkward."""

from __future__ import annotations

import json

ROWS = {
    "piqa": [
        {"goal": "How to carry water in a hand", "sol1": "Make a cup of both hands.", "sol2": "Use a net.", "label": 0},
        {"goal": "To open a stuck jar,", "sol1": "warm the lid", "sol2": "warm the lid and then pull", "label": 1},
        {
            "goal": "Séchez une chemise ",
            "sol1": " hang it in the sun",
            "sol2": "hang it in the sea — naïvely",
            "label": 0,
        },
    ],
    "hellaswag": [
        {
            "ind": 4,
            "activity_label": "Making bread",
            "ctx_a": "[header] How to bake [title] Mix flour and water. [step] Stir  it.",
            "ctx_b": "then she",
            "ctx": "unused",
            "endings": [
                "puts it in the oven.",
                "[substeps] reads a [x] book.",
                "puts it  away.",
                "sings [title] Songs",
            ],
            "label": "0",
        },
        {
            "ind": 9,
            "activity_label": "Walking a dog",
            "ctx_a": "A man walks along a road with a dog.",
            "ctx_b": "",
            "endings": ["The dog", "The dog runs after a cat.", "The dog runs after a car.", "It rains."],
            "label": "2",
        },
    ],
    "arc": [
        {
            "id": "a1",
            "question": "Which of these is a liquid at room temperature?",
            "choices": {"text": ["iron", "water", "stone", "wood"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        {
            "id": "a2",
            "question": "What do plants need?",
            "choices": {"text": ["light", "a light that is not too strong", "noise"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
    ],
    "openbookqa": [
        {
            "id": "o1",
            "question_stem": "The sun gives the earth",
            "choices": {"text": ["light", "rain", "stones", "its name"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
        {
            "id": "o2",
            "question_stem": "A cat has",
            "choices": {"text": ["four legs", "two legs", "no legs at all", "wheels"], "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        },
    ],
    "boolq": [
        {"passage": "Water is wet -- it is a liquid.", "question": "is water a liquid", "idx": 0, "label": 1},
        {"passage": "The old road was closed in 1990.", "question": "is the old road open", "idx": 1, "label": 0},
    ],
    "race": [
        {
            "article": "Ann has a red cat. It sleeps in a box near the door.",
            "problems": json.dumps(
                [
                    {"question": "Ann has a  _  .", "answer": "B", "options": ["dog", "cat", "bird", "cow"]},
                    {"question": "Where does it sleep?", "answer": "A", "options": ["box", "bed", "sea", "car"]},
                    {"question": "The cat is  _  .", "answer": "D", "options": ["blue", "old", "green", "red"]},
                ]
            ),
        },
        {
            "article": "It rained by night.\nThe road was wet.",
            "problems": json.dumps(
                [{"question": "Why was it wet?", "answer": "C", "options": ["sun", "wind", "the rain", "a river"]}]
            ),
        },
    ],
}


def write(folder, name, rows=None):
    """The rows of a format (its own by default) as JSON lines; the file."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[name]), encoding="utf-8")
    return path
