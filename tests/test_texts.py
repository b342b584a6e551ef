"""texts.py: plain text from the demo, from files of three kinds, and from the hub's data sets."""

import gzip
import json

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymerge import demo, texts
from raymerge.config import ConfigError
from raymerge.texts import read_plain_text

ROWS = ["Erste Zeile – naïve.", None, "", "Letzte."]
TEXT = "Erste Zeile – naïve.\n\nLetzte."


@pytest.fixture
def files(tmp_path):
    """The rows as every kind of file."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    pq.write_table(pa.table({"id": range(4), "text": ROWS}), tmp_path / "a.parquet")
    lines = "".join(json.dumps({"text": row, "id": n}) + "\n" for n, row in enumerate(ROWS))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_the_demo_is_its_own_file():
    assert read_plain_text("demo", "k") == demo.TEXT_PATH.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.jsonl", "a.json.gz"])
def test_every_kind_of_file_is_the_same_text(files, name):
    assert read_plain_text(str(files / name), "k") == TEXT


@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.jsonl", "a.json.gz"])
def test_of_a_long_text_the_beginning_is_read(files, monkeypatch, name):
    """A file of C4 has 800 million characters, and every process holds its texts."""
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 24)
    assert read_plain_text(str(files / name), "k") == TEXT[:24]


def test_rows_after_the_beginning_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 10)
    (tmp_path / "a.jsonl").write_text('{"text": "0123456"}\n{"text": "89abc"}\nnot JSON')
    assert read_plain_text(str(tmp_path / "a.jsonl"), "k") == "0123456\n89"


def test_json_lines_may_be_long_and_have_other_columns_of_any_type(tmp_path):
    """A book is a row of more than 1 MB; a year may be a number in one row and words in another."""
    rows = [{"text": "word " * 500_000, "year": 1990}, {"text": "end", "year": "1990s"}, {"year": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_plain_text(str(tmp_path / "a.jsonl"), "k") == f"{rows[0]['text']}\nend"


def test_a_file_that_is_here_is_not_fetched_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name:part.txt").write_text("mine")
    assert read_plain_text("owner/name:part.txt", "k") == "mine"


def test_a_file_of_the_hub_is_asked_for_by_name_and_revision(files, monkeypatch):
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options))
        return str(files / "a.parquet")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_plain_text("Salesforce/wikitext@abc12:raw/test-00000.parquet", "k") == TEXT
    assert read_plain_text("Salesforce/wikitext:raw/test-00000.parquet", "k") == TEXT
    assert asked == [
        ("Salesforce/wikitext", "raw/test-00000.parquet", {"repo_type": "dataset", "revision": revision})
        for revision in ("abc12", None)
    ]


def test_a_file_here_is_not_looked_for_on_the_hub(files, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    (files / "own").mkdir()
    (files / "own" / "set:a.txt").write_text("here", encoding="utf-8")
    monkeypatch.chdir(files)
    assert read_plain_text("own/set:a.txt", "k") == "here"


def test_an_unreachable_hub_is_named_with_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nfurther")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConfigError, match="calibration.text = 'a/b:c.txt'.*'a/b'.*no route. Check.*HF_HUB_OFFLINE"):
        read_plain_text("a/b:c.txt", "calibration.text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        ("missing.txt", None, ": there is no such file; one of the hub is named OWNER/NAME"),
        ("a.parquet", b"PAR1 and not", "cannot be read"),
        ("a.jsonl", b'{"text": "a"\n', "cannot be read"),
        ("a.jsonl", b'{"words": "a"}\n', "has no column 'text', but words"),
        ("a.jsonl", b'{"text": 3}\n', "column 'text' holds int, not strings"),
        ("a.jsonl", b'{"text": "b"}\n\n{"text": "\\ud800"}\n', r"line 3, has half a character, \\ud800: write both"),
        ("a.jsonl", b'{"text": "b"}\n\n{"text": }\n', "cannot be read .*: line 3, character 10"),
        ("a.jsonl", b'"a"\n', "has rows that are no objects"),
        ("a.jsonl", b"", "has no column 'text', but no rows"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "cannot be read"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?s)data.perplexity_text = .*{message}"):
        read_plain_text(str(tmp_path / name), "data.perplexity_text")


def test_a_relative_path_is_looked_for_in_a_folder_that_the_error_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"search.text = 'texts/a.txt': there is no such file in {tmp_path};"):
        read_plain_text("texts/a.txt", "search.text")
