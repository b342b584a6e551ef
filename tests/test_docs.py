"""README and docs: every command parses, every file and key named exists, every Python example runs."""

import re
from pathlib import Path

import pytest
from docs_blocks import PAGES, ROOT, Block, blocks, check, commands, replaced

import raymerge
from raymerge import columns, families
from raymerge.reference import config_reference, tables_reference
from raymerge.schemas import SCHEMAS

LINKED = [*PAGES, "CHANGELOG.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
GUIDE_PYTHON = [block for block in blocks("docs/guide.md") if block.language == "python" and block.reason is None]


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page)], ids=str)
def test_every_block_parses_and_names_what_exists(block):
    check(block)


@pytest.mark.parametrize(
    "text",
    [
        "raymerge serch jobs/configs/demo.yaml",
        "raymerge search jobs/configs/missing.yaml",
        "raymerge search jobs/configs/demo.yaml --set plan.mergs=4",
        "raymerge search jobs/configs/demo.yaml --set plan.merges=none",
        "raymerge merge demo --out merged",
        "python jobs/search_alphas.py jobs/configs/demo.yaml --outt x",
        "ray job submit --working-dir . -- python jobs/search_alphas.py jobs/configs/missing.yaml",
        "python analysis/alphas.py runs/demo --no-such-option",
        "make tea",
        "pip install '.[nothing]'",
        "tests/missing.py",
    ],
)
def test_a_wrong_command_is_found(text):
    with pytest.raises((AssertionError, ValueError, OSError)):
        check(Block("x.md", 1, "bash", text, None))


def test_commands_are_joined_over_lines_and_lose_comments():
    assert commands("a b \\\n  --c 'd e'  # f\n\n# g\nh\n") == [["a", "b", "--c", "d e"], ["h"]]


def test_a_stand_in_stands_only_where_a_name_begins():
    command = "raymerge merge /models/a.gguf --alphas runs/k4/models/found/alphas.json --set data.mmlu=cais/mmlu"
    expected = command.replace("/models/a", "stand-ins/models/a").replace("cais/mmlu", "stand-ins/mmlu")
    assert replaced(command) == expected


@pytest.mark.parametrize("page", sorted(set(LINKED)))
def test_internal_links_and_named_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target
    if page in PAGES:
        for name in re.findall(r"`((?:jobs|analysis|tests|docs|raymerge)/[\w./-]*)`", text):
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_reference_is_up_to_date():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == config_reference(), "run `make docs`"


def test_every_column_of_every_table_is_explained():
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    assert page == tables_reference(), "run `make docs`"
    assert set(columns.TABLES) == set(SCHEMAS)
    for table, (_, own) in columns.TABLES.items():
        assert set(own) <= set(SCHEMAS[table].names) <= {*own, *columns.SHARED}, table
    assert set(columns.SHARED) <= {name for schema in SCHEMAS.values() for name in schema.names}


def test_the_page_of_models_has_every_model_type_and_no_other():
    rows = {}  # by section, each row's cells
    for section in (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        rows[section.partition("\n")[0]] = lines[1:]  # without the head; the line under it begins otherwise
    types = {title: [cell for cell, *_ in own] for title, own in rows.items() if own}
    with_experts = {f"`{name}`" for name, family in families.ARCHITECTURES.items() if family.experts}
    assert {title: sorted(own) for title, own in types.items()} == {
        "Dense models": sorted({f"`{name}`" for name in families.ARCHITECTURES} - with_experts),
        "Models with experts": sorted(with_experts),
        "Multimodal models": sorted(f"`{name}`" for name in families.MULTIMODAL),
    }
    inside = {kind.strip("`"): re.findall(r"`(\w+)`", inner) for kind, _, inner, *_ in rows["Multimodal models"]}
    in_text = {kind: [families._IN_TEXT.get(name, name) for name in own] for kind, own in families.MULTIMODAL.items()}
    assert inside == in_text


def test_the_reference_has_every_key():
    keys = {f"{section}.{key}" for section, values in raymerge.load_config().resolved().items() for key in values}
    assert keys <= set(re.findall(r"^\| `([\w.]+)` \|", config_reference(), flags=re.M))


def test_every_public_name_loads_and_others_are_refused():
    for name in raymerge.__all__:
        assert getattr(raymerge, name) is not None
    with pytest.raises(AttributeError, match="serch"):
        raymerge.serch  # noqa: B018
    assert dir(raymerge) == sorted(raymerge.__all__)


def test_the_python_examples_of_the_guide_run(tmp_path, monkeypatch, local_searches):
    """In order and in one namespace, as in a notebook, over a worker in this process."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    assert len(GUIDE_PYTHON) >= 4
    names = {}
    for block in GUIDE_PYTHON:
        exec(compile(block.text, str(block), "exec"), names)
    assert Path(names["saved"]["folder"]).is_dir()
