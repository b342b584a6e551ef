"""questions.py: sources, checks, sampling and the exact text of the prompts."""

import csv
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

from raymerge.domains import CATEGORY_OF, DOMAINS, known_domains
from raymerge.questions import (
    DataError,
    Question,
    QuestionSet,
    load_questions,
    prefix_text,
    question_text,
    sample,
)

MMLU = os.environ.get("RAYMERGE_MMLU")
needs_mmlu = pytest.mark.skipif(not MMLU, reason="RAYMERGE_MMLU (a folder of the original CSV files) is not set")

# Cells that readers like to spoil: missing-value words, an empty option, quotes, a newline, spaces at the ends.
TRICKY = [
    ("Which value is missing?", "None", "nan", "", "NA", "A"),
    ('He said "no",\nthen left.', "1", "1.0", " 2", "3 ", "D"),
    ("  ¿Qué?  ", "null", "N/A", "-", "0", "C"),
]


def rows(subject, split, count):
    return [
        (f"{subject} {split} question {i}?", f"a{i}", f"b{i}", f"c{i}", f"d{i}", "ABCD"[i % 4]) for i in range(count)
    ]


DATA = {
    "dev": {"anatomy": rows("anatomy", "dev", 5), "world_religions": rows("world_religions", "dev", 5)},
    "validation": {"anatomy": rows("anatomy", "validation", 4), "world_religions": rows("world_religions", "val", 3)},
    "test": {"anatomy": TRICKY, "world_religions": rows("world_religions", "test", 30)},
}
SHORT = {"dev": "dev", "validation": "val", "test": "test"}


def write_csv(folder, data=DATA):
    for split, subjects in data.items():
        (folder / SHORT[split]).mkdir(parents=True)
        for subject, cells in subjects.items():
            with open(folder / SHORT[split] / f"{subject}_{SHORT[split]}.csv", "w", newline="", encoding="utf-8") as f:
                csv.writer(f).writerows(cells)
    return folder


def hub_columns(subjects):
    """As cais/mmlu: choices in a list, the answer a number."""
    items = [(subject, row) for subject, part in subjects.items() for row in part]
    return {
        "question": [row[0] for _, row in items],
        "subject": [subject for subject, _ in items],
        "choices": [list(row[1:5]) for _, row in items],
        "answer": ["ABCD".index(row[5]) for _, row in items],
    }


def global_columns(subjects, split="test"):
    """As Global-MMLU: one column an option, the answer a letter, a sample id, further columns."""
    items = [(subject, i, row) for subject, part in subjects.items() for i, row in enumerate(part)]
    columns = {
        "sample_id": [f"{subject}/{split}/{i}" for subject, i, _ in items],
        "subject": [subject for subject, _, _ in items],
        "subject_category": ["STEM" for _ in items],
        "question": [row[0] for _, _, row in items],
    }
    for position, letter in enumerate("abcd", start=1):
        columns[f"option_{letter}"] = [row[position] for _, _, row in items]
    return {**columns, "answer": [row[5] for _, _, row in items]}


def write_parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def folder(tmp_path):
    return write_csv(tmp_path / "mmlu")


def edit(path, old, new):
    text = path.read_bytes().decode()
    assert text.count(old) == 1
    path.write_bytes(text.replace(old, new).encode())


def fails(source, *parts, **options):
    """The message of the DataError, which must hold every part."""
    with pytest.raises(DataError) as caught:
        load_questions(source, **options)
    for part in parts:
        assert str(part) in str(caught.value)
    return str(caught.value)


# Prompts


def test_prompt_is_exactly_the_published_one():
    example = Question(
        "x", "high_school_physics", "dev", "en", " What falls? \n", ("a stone", "None", " c", "d "), answer=1
    )
    question = replace(example, text="What\nrises?", options=("smoke", "a", "b", "c"), answer=0)
    assert prefix_text("high_school_physics", [example, question]) + question_text(question) == (
        "The following are multiple choice questions (with answers) about high school physics.\n"
        "\n"
        "What falls?\n"
        "A. a stone\n"
        "B. None\n"
        "C.  c\n"
        "D. d \n"
        "Answer: B\n"
        "\n"
        "What\nrises?\n"
        "A. smoke\n"
        "B. a\n"
        "C. b\n"
        "D. c\n"
        "Answer: A\n"
        "\n"
        "What\nrises?\n"
        "A. smoke\n"
        "B. a\n"
        "C. b\n"
        "D. c\n"
        "Answer:"
    )
    assert prefix_text("anatomy", []) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
    )


# CSV


def test_csv_cells_stay_text(folder):
    loaded = load_questions(folder, subjects="anatomy")
    assert loaded.source == str(folder) and loaded.language == "en" and loaded.split == "test"
    assert [(q.text, *q.options, "ABCD"[q.answer]) for q in loaded.questions] == TRICKY
    assert [q.question_id for q in loaded.questions] == ["anatomy/test/0", "anatomy/test/1", "anatomy/test/2"]
    assert loaded.questions[0] == Question(
        "anatomy/test/0", "anatomy", "test", "en", "Which value is missing?", ("None", "nan", "", "NA"), 0
    )


def test_byte_order_mark_line_ends_and_blank_lines_change_nothing(folder):
    before = load_questions(folder)
    for path in folder.rglob("*.csv"):
        unix = path.read_bytes().replace(b"\r\n", b"\n")
        path.write_bytes(b"\xef\xbb\xbf" + unix.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert b",\r\nthen" in (folder / "test/anatomy_test.csv").read_bytes()  # also the newline within a cell
    after = load_questions(folder)
    assert after.questions == before.questions and after.examples == before.examples


def test_examples_are_the_first_dev_rows(folder):
    loaded = load_questions(folder, split="val", shots=3)
    assert loaded.split == "validation" and loaded.subjects == ("anatomy", "world_religions")
    assert [q.text for q in loaded.examples["anatomy"]] == [f"anatomy dev question {i}?" for i in range(3)]
    assert {q.split for part in loaded.examples.values() for q in part} == {"dev"}
    assert [len(part) for part in loaded.by_subject().values()] == [4, 3]
    assert load_questions(folder, shots=0).examples == {"anatomy": (), "world_religions": ()}
    assert [q.question_id for q in load_questions(folder, split="dev", shots=0, subjects="anatomy").questions] == [
        f"anatomy/dev/{i}" for i in range(5)
    ]


def test_language_folders_of_csv(tmp_path):
    write_csv(tmp_path / "es")
    write_csv(tmp_path / "fr", {**DATA, "test": {"anatomy": TRICKY[:1]}})
    assert len(load_questions(tmp_path, language="es").questions) == 33
    french = load_questions(tmp_path, language="fr")
    assert [q.language for q in french.questions] == ["fr"] and french.examples["anatomy"][0].language == "fr"
    assert len(load_questions(tmp_path / "fr", language="fr").questions) == 1  # the folder itself bears the name
    fails(tmp_path, "language 'en' is not in", "there are es, fr", "or, where such a folder is the data set")
    fails(tmp_path / "fr", "language 'es' is not in", "taken as English", language="es")
    fails(tmp_path, "language is '../es'", language="../es")


def test_demo_source_is_the_embedded_folder(folder, monkeypatch):
    module = type(sys)("raymerge.demo")
    module.MMLU_PATH = folder
    monkeypatch.setitem(sys.modules, "raymerge.demo", module)
    loaded = load_questions("demo", shots=1)
    assert loaded.source == "demo" and len(loaded.questions) == 33


# Parquet


def test_parquet_and_csv_of_the_same_data_agree(folder, tmp_path):
    for split, subjects in DATA.items():
        mixed = hub_columns(dict(reversed(subjects.items())))  # subjects in another order, and spread over the rows
        order = sorted(range(len(mixed["answer"])), key=lambda i, c=mixed: (c["question"][i][-4:], i))
        if split != "test":
            mixed = {name: [values[i] for i in order] for name, values in mixed.items()}
        write_parquet(tmp_path / "hub/all" / f"{split}-00000-of-00001.parquet", mixed)
        write_parquet(tmp_path / "flat" / f"{SHORT[split]}.parquet", hub_columns(subjects))
        write_parquet(tmp_path / "global/en" / f"{SHORT[split]}.parquet", global_columns(subjects, split))
    for split in ("validation", "test"):
        want = load_questions(folder, split=split)
        for source in ("hub", "flat", "global"):
            got = load_questions(tmp_path / source, split=split)
            assert got.questions == want.questions and got.examples == want.examples
            assert [q.content_hash for q in got.questions] == [q.content_hash for q in want.questions]
            assert got.identity == want.identity


def test_shards_are_read_in_order(tmp_path):
    items = rows("anatomy", "test", 6)
    for shard in (0, 1):
        part = hub_columns({"anatomy": items[3 * shard : 3 * shard + 3]})
        write_parquet(tmp_path / "all" / f"test-0000{shard}-of-00002.parquet", part)
    loaded = load_questions(tmp_path, shots=0)
    assert [q.text for q in loaded.questions] == [row[0] for row in items]
    assert loaded.questions[4].question_id == "anatomy/test/4"
    (tmp_path / "all/test-00000-of-00002.parquet").unlink()
    fails(tmp_path, "1 shards of test-00001-of-00002.parquet", shots=0)


def test_own_sample_ids_are_kept(tmp_path):
    columns = global_columns({"anatomy": TRICKY})
    columns["sample_id"] = ["q7", "q3", "q9"]
    write_parquet(tmp_path / "zh/test.parquet", columns)
    loaded = load_questions(tmp_path, language="zh", shots=0)
    assert [q.question_id for q in loaded.questions] == ["q7", "q3", "q9"]
    columns["sample_id"][2] = "q7"
    write_parquet(tmp_path / "zh/test.parquet", columns)
    fails(tmp_path, "test.parquet row 2 (from 0)", "'q7' occurs twice", language="zh", shots=0)


# Subjects, domains, sampling


def test_subjects_and_domains(tmp_path):
    data = {"test": {name: rows(name, "test", 2) for name in ("virology", "anatomy", *DOMAINS["medical"], "marketing")}}
    write_csv(tmp_path / "m", data)

    def subjects(names, **options):
        return load_questions(tmp_path / "m", subjects=names, shots=0, **options).subjects

    assert subjects("all") == tuple(sorted(data["test"]))
    assert subjects("virology, anatomy") == subjects(["anatomy", "virology"]) == ("anatomy", "virology")
    assert subjects(["medical"]) == ("clinical_knowledge", "professional_medicine")
    assert subjects("medical,clinical_knowledge,anatomy") == ("anatomy", *DOMAINS["medical"])
    assert subjects("body", domains={"body": ["virology", "anatomy"]}) == ("anatomy", "virology")
    assert subjects("medical", domains={"medical": ["virology"]}) == ("virology",)


def test_sampling_is_nested_seeded_and_independent_of_other_subjects(folder):
    def drawn(limit, seed=0, subjects="world_religions"):
        loaded = load_questions(folder, subjects=subjects)
        loaded = loaded if limit is None else loaded.sampled(limit, seed)
        return [q.question_id for q in loaded.by_subject()["world_religions"]]

    whole = drawn(None)
    samples = [drawn(limit) for limit in (1, 5, 10, 20, 30, 99)]
    assert [len(part) for part in samples] == [1, 5, 10, 20, 30, 30]
    for smaller, larger in zip(samples, samples[1:], strict=False):
        assert set(smaller) <= set(larger)
    for part in samples:
        assert part == [question_id for question_id in whole if question_id in part]
    assert samples[2] not in (whole[:10], whole[-10:])
    assert drawn(10, subjects="all") == samples[2]
    assert drawn(10, seed=1) != samples[2]
    # golden, from SHA-256 of '[0,"world_religions",ID]': the same in every version and on every platform
    assert samples[1] == [f"world_religions/test/{i}" for i in (4, 10, 15, 21, 26)]


def test_sample_favours_no_row():
    questions = [Question(str(i), "s", "test", "en", "t", ("a", "b", "c", "d"), 0) for i in range(10)]
    counts = dict.fromkeys(map(str, range(10)), 0)
    for seed in range(1000):
        for question in sample(questions, 3, seed):
            counts[question.question_id] += 1
    assert sum(counts.values()) == 3000
    assert all(abs(count - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5 for count in counts.values())  # 5 standard deviations


# Hashes


BASE = Question("id", "anatomy", "test", "en", "Text?", ("a", "b", "c", "d"), 2)


def test_content_hash_is_of_the_content():
    assert len(BASE.content_hash) == 16 and int(BASE.content_hash, 16)
    for change in ({"question_id": "x"}, {"subject": "x"}, {"split": "dev"}, {"language": "fr"}, {"answer": 1}):
        assert replace(BASE, **change).content_hash == BASE.content_hash
    assert replace(BASE, text=" Text?\n", options=("a ", "b", " c", "d")).content_hash == BASE.content_hash
    others = [
        replace(BASE, text="text?"),
        replace(BASE, options=("b", "a", "c", "d")),
        replace(BASE, options=("a", "b", "c", "")),
    ]
    assert len({q.content_hash for q in [BASE, *others]}) == 4


def test_identity_changes_with_any_content():
    second = replace(BASE, question_id="id2", text="Other?")
    whole = QuestionSet("a", "en", "test", (BASE, second), {"anatomy": (BASE, second)})
    for same in (
        replace(whole, source="b", language="fr", split="dev"),
        replace(whole, questions=(replace(BASE, question_id="x", language="fr", text=" Text? "), second)),
    ):
        assert same.identity == whole.identity
    changed = [replace(whole, questions=(second, BASE)), replace(whole, questions=(BASE,))]
    changed += [replace(whole, examples={"anatomy": part}) for part in ((second, BASE), (BASE,), ())]
    for change in ({"subject": "x"}, {"text": "T"}, {"options": ("a", "b", "c", "d ")}, {"answer": 3}):
        changed.append(replace(whole, questions=(replace(BASE, **change), second)))
        changed.append(replace(whole, examples={"anatomy": (replace(BASE, **change), second)}))
    identities = [questions.identity for questions in (whole, *changed)]
    assert len(set(identities)) == len(identities) == 14
    assert all(len(identity) == 16 for identity in identities)


def test_identity_is_the_same_in_another_process(folder):
    code = f"from raymerge.questions import load_questions; print(load_questions({str(folder)!r}).identity)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == load_questions(folder).identity


def test_questions_travel_to_workers(folder):
    loaded = load_questions(folder)
    assert pickle.loads(pickle.dumps(loaded)) == loaded


# Errors: options


def test_bad_options(folder):
    fails(folder, "unknown split 'train'", "dev, validation (or val) and test", split="train")
    fails(folder, "shots is -1", "at least 0", shots=-1)
    fails(folder, "shots is 2.0", shots=2.0)
    fails(folder, "shots=5", "the dev questions are the examples", "shots=0", split="dev")
    fails(folder, "revision 'v1'", "is local", revision="v1")
    with pytest.raises(DataError, match="n is 0; it must be a whole number of at least 1"):
        sample([BASE], 0, 0)
    with pytest.raises(DataError, match="n is True; it must be a whole number of at least 1"):
        load_questions(folder).sampled(True, 0)


def test_bad_subjects(folder):
    message = fails(folder, "unknown subject 'anatmy'", "did you mean anatomy?", "2 subjects", subjects="anatmy")
    assert "domains" not in message  # none has all its subjects here
    domains = {"both": ["anatomy", "world_religions"], "half": ["anatomy", "law"]}
    told = (
        "unknown subject 'zzz'; there are 2 subjects in split test (anatomy, world_religions, ...) and the domains both"
    )
    message = fails(folder, told, subjects=["zzz"], domains=domains)
    assert "did you mean" not in message
    fails(folder, "unknown subject 'clinical_knowledge' of domain 'medical'", subjects="medical")
    fails(folder, "subjects is empty", subjects=" , ")
    fails(folder, "subjects is empty", subjects=[])
    fails(folder, "'anatomy' is asked for twice", subjects="anatomy,world_religions,anatomy")
    fails(folder, "domain 'none' has no subjects", subjects="none", domains={"none": []})
    fails(folder, "domain 'anatomy' has the name of a subject", domains={"anatomy": ["world_religions"]})


def test_too_few_dev_questions(folder):
    fails(folder, "shots=6 needs 6 dev questions", "anatomy has 5, world_religions has 5", "set shots=5", shots=6)
    (folder / "dev/anatomy_dev.csv").unlink()
    message = fails(folder, "anatomy has 0", "set shots=0, or leave out")
    assert "world_religions" not in message
    assert load_questions(folder, subjects="world_religions").subjects == ("world_religions",)
    (folder / "dev/world_religions_dev.csv").unlink()
    fails(folder, f"{folder} has no dev split, only validation, test")
    assert len(load_questions(folder, shots=0).questions) == 33


# Errors: files


def test_missing_and_empty_folders(folder, tmp_path):
    (tmp_path / "empty/test").mkdir(parents=True)
    fails(tmp_path / "nowhere", f"no folder '{tmp_path / 'nowhere'}'", "'demo'", "cais/mmlu")
    fails("s3://bucket/mmlu", "no folder 's3://bucket/mmlu'")
    fails("", "the source is empty")
    fails(tmp_path / "empty", f"no MMLU files in {tmp_path / 'empty'}", "SUBJECT_{dev,val,test}.csv")
    fails(folder / "test/anatomy_test.csv", "is no folder")
    for path in (folder / "val").iterdir():
        path.unlink()
    fails(folder, f"{folder} has no validation split, only dev, test", "data.search_split", split="val")


def test_malformed_csv(folder):
    path = folder / "test/world_religions_test.csv"
    whole = path.read_bytes()
    line = "world_religions test question 1?,a1,b1,c1,d1,B"
    for wrong, parts in [
        ("world_religions test question 1?,a1,b1,c1,B", ["line 2: 5 columns, not 6"]),
        (line + ",more", ["line 2: 7 columns, not 6"]),
        (line[:-1] + "E", ["line 2: the answer is 'E', not one of A, B, C, D; fix it"]),
        (line[:-1] + "b", ["line 2: the answer is 'b'"]),
        (line[:-1] + "AB", ["line 2: the answer is 'AB'"]),
        (line[:-1], ["line 2: the answer is ''"]),
        ('" ",a1,b1,c1,d1,B', ["line 2: the question is empty"]),
        ('"world', ["not readable as CSV from line 2 on", "fix the quotes"]),
    ]:
        edit(path, line, wrong)
        fails(folder, path, *parts)
        assert load_questions(folder, subjects="anatomy").subjects == ("anatomy",)  # another subject is not disturbed
        path.write_bytes(whole)
    path.write_bytes(whole + b"caf\xe9,a,b,c,d,A\n")
    fails(folder, path, "not UTF-8")
    path.write_bytes(b"question,A,B,C,D,answer\n" + whole)
    fails(folder, path, "line 1: the answer is 'answer'", "is line 1 a header?")
    path.write_bytes(b"\n")
    fails(folder, path, "holds no questions")


def test_line_numbers_count_lines_not_rows(folder):
    edit(folder / "test/anatomy_test.csv", "  ¿Qué?  ,null", "  ¿Qué?  ")  # the third row, after one over two lines
    fails(folder, "anatomy_test.csv line 4: 5 columns")


def test_superfluous_files(folder):
    odd = folder / "test/summary.csv"
    odd.write_text("x")
    fails(folder, f"{odd} is not named SUBJECT_test.csv")
    odd.rename(folder / "test/._anatomy_test.csv")  # what macOS leaves
    assert len(load_questions(folder).questions) == 33
    (folder / "val/anatomy_validation.csv").write_bytes((folder / "val/anatomy_val.csv").read_bytes())
    fails(folder, "two files of subject 'anatomy'", split="val")
    write_parquet(folder / "test.parquet", hub_columns(DATA["test"]))
    fails(folder, "has the test split more than once", "keep one")


def test_malformed_parquet(tmp_path):
    path = tmp_path / "test.parquet"

    def broken(columns, *parts):
        write_parquet(path, columns)
        fails(tmp_path, path, *parts, shots=0)

    good, letters = hub_columns({"anatomy": TRICKY}), global_columns({"anatomy": TRICKY})
    broken({k: v for k, v in good.items() if k != "subject"}, "no column subject; has: question, choices, answer")
    broken({k: v for k, v in letters.items() if k != "option_c"}, "no column option_c")
    broken({**good, "answer": [0, 4, 1]}, "row 1 (from 0): the answer is 4")
    broken({**good, "answer": [0, -1, 1]}, "row 1 (from 0): the answer is -1")
    broken({**good, "answer": [0.0, 1.0, 2.0]}, "the answer is 0.0")
    broken({**good, "answer": [True, True, True]}, "the answer is True")
    broken({**letters, "answer": ["A", "B", None]}, "row 2 (from 0): the answer is None")
    broken({**letters, "option_b": ["x", None, "y"]}, "row 1 (from 0): option B is None, not text")
    broken({**letters, "option_d": [1, 2, 3]}, "row 0 (from 0): option D is 1, not text")
    broken({**good, "choices": [["a"] * 4, ["a"] * 3, ["a"] * 4]}, "row 1 (from 0): 3 choices instead of 4")
    broken({**good, "choices": [["a"] * 4, None, ["a"] * 4]}, "row 1 (from 0): 0 choices instead of 4")
    broken({**good, "subject": ["anatomy", "", "x"]}, "row 1 (from 0): subject is ''")
    broken({**good, "question": ["q", "\n", "x"]}, "row 1 (from 0): the question is empty")
    broken({k: pa.array([], pa.string()) for k in letters}, "holds no questions")
    latin = pa.array([b"caf\xe9", b"b", b"c"]).view(pa.string())
    broken({**letters, "question": latin}, "not readable as parquet: 'utf-8' codec can't decode byte 0xe9")
    path.write_bytes(b"PAR1 this is not parquet")
    fails(tmp_path, path, "not readable as parquet", shots=0)


# Hub


def hub_snapshot(root):
    """A snapshot folder as huggingface_hub leaves it, and a stand-in for snapshot_download that records its calls."""
    calls = []
    for split, subjects in DATA.items():
        write_parquet(root / "abc123/all" / f"{split}-00000-of-00001.parquet", hub_columns(subjects))
        if split != "validation":
            columns = global_columns(subjects, split)
            write_parquet(root / "abc123/es" / f"{split}-00000-of-00001.parquet", columns)

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(root / "abc123")

    return calls, snapshot_download


def test_hub_data_sets(tmp_path, folder, monkeypatch):
    calls, download = hub_snapshot(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    english = load_questions("cais/mmlu", split="validation", revision="v2")
    assert english.source == "cais/mmlu"
    assert english.questions == load_questions(folder, split="validation").questions
    (repo_id, options), *rest = calls
    assert not rest and repo_id == "cais/mmlu"
    assert options["repo_type"] == "dataset" and options["revision"] == "v2"
    assert {"all/validation-*.parquet", "all/dev-*.parquet"} <= set(options["allow_patterns"])
    assert not any("test" in pattern or "auxiliary" in pattern for pattern in options["allow_patterns"])
    spanish = load_questions("CohereLabs/Global-MMLU", language="es", shots=0)
    assert [q.language for q in spanish.questions] == ["es"] * 33
    assert calls[1][1]["allow_patterns"] == ["es/test.parquet", "es/test-*.parquet"]
    fails("someone/mmlu", "language 'de' is not in", "has folders for es", language="de")


def test_an_existing_folder_is_never_the_hub(tmp_path, monkeypatch):
    write_csv(tmp_path / "cais/mmlu", {**DATA, "test": {"anatomy": TRICKY[:1]}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    assert len(load_questions("cais/mmlu").questions) == 1


def test_hub_choices_are_checked_before_any_download(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    fails("cais/mmlu", "language 'es' is not in the hub data set cais/mmlu; has: en", language="es")
    fails("CohereLabs/Global-MMLU", "language 'xx'", "am, ar, bn", language="xx")
    fails("CohereLabs/Global-MMLU", "has no validation split; has: dev, test", split="val")


RESPONSE = SimpleNamespace(headers={}, request=SimpleNamespace(headers={}), status_code=404)


class ReadTimeout(Exception):
    """As the hub's HTTP client raises: httpx or httpx2 by version, and an OSError in neither."""


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nlonger explanation"),
        OfflineModeIsEnabled("offline mode is enabled"),
        RepositoryNotFoundError("404 Client Error", response=RESPONSE),
        ReadTimeout("timed out"),
        ConnectionError("connection refused"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unreachable_hub(monkeypatch, error):
    def snapshot_download(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    cause = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    message = fails("cais/mmlu", "'cais/mmlu' (revision main)", cause, "local path", "HF_HOME", "HF_HUB_OFFLINE")
    assert "longer explanation" not in message
    fails("cais/mmlu", "(revision abc)", revision="abc")


def test_unreachable_hub_for_real(tmp_path):
    """huggingface_hub itself, offline with an empty cache, in a process of its own as it reads both on import."""
    code = "from raymerge.questions import *\ntry: load_questions('cais/mmlu')\nexcept DataError as error: print(error)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'cais/mmlu' (revision main) could not be read from the hub: LocalEntryNotFoundError: " in done.stdout


# Real data


@pytest.mark.real_model
@needs_mmlu
def test_real_mmlu():
    test, validation = load_questions(MMLU), load_questions(MMLU, split="val")
    assert (len(test.questions), len(test.subjects)) == (14042, 57)
    assert sum(map(len, test.examples.values())) == 285
    assert len(validation.subjects) == 57 and len(validation.questions) in (1412, 1531)  # 1,531 as published
    assert any("None" in q.options for q in test.questions)
    for names in known_domains().values():
        assert load_questions(MMLU, subjects=names).subjects == tuple(sorted(names))
    assert set(CATEGORY_OF) == set(test.subjects)


@pytest.mark.real_model
@needs_mmlu
def test_real_translated_mmlu():
    source = Path(MMLU).parent / "translated_mmlu"
    if not source.is_dir():
        pytest.skip(f"no {source}")
    loaded = {x: load_questions(source, language=x, split="val", shots=2) for x in ("en", "es", "fr", "zh")}
    assert {x: len(loaded[x].questions) for x in loaded} == {"en": 1449, "es": 1465, "fr": 1417, "zh": 1421}
    ids = [{q.question_id for q in part.questions} for part in loaded.values()]
    assert 1300 < len(set.intersection(*ids)) < 1400
    english = {q.content_hash for q in loaded["en"].questions}
    original = {q.content_hash for q in load_questions(MMLU, split="val").questions}
    assert len(english & original) > 1400  # found again in another source
    fails(source, "moral_scenarios has 3", split="val")
