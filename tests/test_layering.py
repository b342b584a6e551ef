"""The house's layers, as docs/design.md draws them: who may import whom, and that importing does nothing."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "raymerge"

# A new module gets a line here and in docs/design.md.
LAYERS = {
    0: (
        "errors", "domains", "identity", "file_hashes", "statistics", "objectives", "plan", "heuristics", "diffusion",
        "embedding", "similarity", "reliability", "assignment", "memory",
    ),
    1: (
        "config", "config_file", "columns", "schemas", "comparisons", "storage", "alpha_files", "plan_files", "parts",
        "tables", "questions", "tasks", "findings", "summary", "progress", "inputs", "sensitivity", "report",
        "reference", "texts", "json_lines", "hub",
    ),
    2: (
        "tensorfiles", "architectures", "families", "checkpoint", "fusion", "prompts", "forward", "sources",
        "tail_states", "tail_layer", "scoring", "evaluation", "rows", "merging", "activations", "alignment", "context",
        "quantisation", "gradient", "parametrisation", "tail_loss", "trunk", "gguf_input", "mergekit", "proof",
        "reload", "card", "device", "plan_section", "normal_equations", "refit", "role_prompts", "saved_config",
        "saving", "vocabulary", "plan_source", "plan_prompts", "towers", "positions", "skeleton",
    ),
    3: ("worker", "worker_memory", "candidates"),
    4: ("cluster", "actors", "pool", "search", "proposers", "experiments"),
    5: ("cli", "arguments", "console", "__main__"),
}  # fmt: skip
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}


def layer_of(module):
    """The layer of a module; those of a package have the package's."""
    return LAYER_OF.get(module.split(".")[0])


# Third parties from the layer on in which they may first appear.
THIRD_PARTY = {
    "numpy": 0, "scipy": 0, "sklearn": 0, "umap": 0,
    "pydantic": 1, "yaml": 1, "pyarrow": 1, "huggingface_hub": 1, "jinja2": 1, "markupsafe": 1, "vl_convert": 1,
    "torch": 2, "transformers": 2, "safetensors": 2, "torchao": 2, "gguf": 2,
    "ray": 4, "bayes_opt": 4, "threadpoolctl": 4,
    "rich": 5,
}  # fmt: skip
RAY = {"cluster", "actors", "pool", "search"}  # and nowhere else

PATHS = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
for package in ("experiments", "report"):
    PATHS |= {f"{package}.{path.stem}": path for path in (PACKAGE / package).glob("*.py")}
    PATHS[package] = PATHS.pop(f"{package}.__init__")
MODULES = sorted(PATHS)
DEMO = sorted(path.stem for path in (PACKAGE / "demo").glob("*.py") if path.stem != "__init__")


def imports(path):
    """Every module that a file imports, anywhere in it: full names, of raymerge's own down to the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                inside = ROOT / Path(*whole.split("."))
                found.add(whole if inside.is_dir() or inside.with_suffix(".py").is_file() else node.module)
    return found


def own(path):
    return {name.removeprefix("raymerge.") for name in imports(path) if name.startswith("raymerge.")}


def third_party(path):
    tops = {name.split(".")[0] for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"raymerge", "__future__"}


def test_the_parser_sees_imports_of_every_kind(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import ray.tune as t\nfrom raymerge import demo, plan, __version__\nfrom raymerge.demo.build import x\n"
        "def f():\n    from torch.nn import functional\n    if True:\n        import scipy.stats\n"
    )
    assert imports(path) == {
        "ray.tune", "raymerge.demo", "raymerge.plan", "raymerge", "raymerge.demo.build", "torch.nn", "scipy.stats",
    }  # fmt: skip
    assert own(path) == {"demo", "plan", "demo.build"}
    assert third_party(path) == {"ray", "torch", "scipy"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_layer_or_below(module):
    layer, path = layer_of(module), PATHS[module]
    assert layer is not None, f"{module} has no layer: add it to LAYERS here and to a table in docs/design.md"
    for other in own(path) - {"demo"}:  # raymerge.demo is paths alone
        there = layer_of(other)
        assert there is not None, f"{module} imports raymerge.{other}, which is no module of a layer"
        assert there <= layer, f"{module} (layer {layer}) imports {other} (layer {there})"
    for name in third_party(path):
        assert name in THIRD_PARTY, f"{module} imports {name}: give it a layer in THIRD_PARTY"
        assert THIRD_PARTY[name] <= layer, f"{module} (layer {layer}) imports {name}"
        assert name != "ray" or module in RAY, f"{module} imports Ray, which only {sorted(RAY)} may"


def test_no_module_imports_itself_around_a_corner():
    graph = {module: own(PATHS[module]) - {"demo"} for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(MODULES)


def test_the_demo_stands_alone():
    assert imports(PACKAGE / "demo" / "__init__.py") == {"pathlib"}
    for module in DEMO:
        path = PACKAGE / "demo" / f"{module}.py"
        assert all(name.split(".")[0] == "demo" for name in own(path)), module
        assert third_party(path) <= {"numpy", "torch", "transformers", "tokenizers", "safetensors"}, module


def test_the_edges_import_only_what_they_may():
    for path in (ROOT / "analysis").glob("*.py"):
        assert own(path) <= {"tables"}, path.name
        assert not third_party(path) & {"ray", "torch", "transformers"}, path.name
    for path in (ROOT / "jobs").glob("*.py"):
        assert not third_party(path) & {"ray", "torch", "transformers"}, path.name


def test_the_design_page_draws_the_same_layers():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tables = re.findall(r"^### (\d) .*\n\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    cells = [(int(layer), cell) for layer, table in tables for cell in re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)]
    drawn = {name: layer for layer, cell in cells for name in re.findall(r"`([\w.]+)`", cell)}
    assert drawn == {module: layer_of(module) for module in MODULES}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def importing(modules, unwanted):
    code = f"""
import json, logging, os, sys, threading
before = dict(os.environ), list(logging.getLogger().handlers), threading.active_count(), os.getcwd()
import {", ".join(modules)}
after = dict(os.environ), list(logging.getLogger().handlers), threading.active_count(), os.getcwd()
changed = [name for name, a, b in zip(("environ", "handlers", "threads", "cwd"), before, after) if a != b]
print(json.dumps([sorted(set({sorted(unwanted)!r}) & set(sys.modules)), changed]))
"""
    done = run(code)
    assert not done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def of_layers(*layers):
    return [f"raymerge.{module}" for module in MODULES if LAYER_OF.get(module) in layers]


def test_importing_mathematics_and_contracts_loads_nothing_heavy():
    heavy = {"torch", "transformers", "ray", "safetensors", "matplotlib", "rich", "bayes_opt"}
    assert importing(["raymerge", "raymerge.demo", *of_layers(0, 1)], heavy) == [[], []]


def test_importing_the_package_loads_nothing_at_all():
    assert importing(["raymerge", "raymerge.demo"], {"numpy", "yaml", "pydantic", "pyarrow", "torch"}) == [[], []]


def test_importing_model_and_worker_loads_nothing_that_takes_long_and_is_not_always_needed():
    """transformers costs seconds; it is imported where a model is opened. scipy.stats costs half a second."""
    slow = {"ray", "transformers", "matplotlib", "rich", "sklearn", "scipy.stats", "scipy.optimize"}
    loaded, changed = importing(of_layers(2, 3), slow)
    assert loaded == []
    assert set(changed) <= {"environ"}  # torch sets a variable of its own
