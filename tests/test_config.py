"""config.py and config_file.py: defaults, overrides, and errors that name the key, the value and the cure."""

import re
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic import ValidationError

from raymerge import columns, config, parametrisation
from raymerge.config import Config, ConfigError, TaskConfig
from raymerge.config_file import describe, load_config, parse_config
from raymerge.embedding import EMBEDDINGS
from raymerge.fusion import ALIGNMENTS
from raymerge.plan import REFITS, SURVIVORS
from raymerge.similarity import MEASURES
from raymerge.tasks import FORMATS

# The shape that design.md documents; a default that changes is a change that users see.
DEFAULTS = {
    "model": {
        "path": "demo",
        "dtype": "auto",
        "revision": None,
        "add_bos": None,
        "quantise": "none",
        "trust_remote_code": False,
    },
    "data": {
        "mmlu": "demo",
        "revision": None,
        "language": "en",
        "subjects": "all",
        "domains": {},
        "shots": 5,
        "search_split": "validation",
        "report_split": "test",
        "search_on_test": False,
        "limit_per_subject": None,
        "report_limit_per_subject": None,
        "seed": 0,
        "perplexity_text": "demo",
        "perplexity_tokens": 8192,
        "question_perplexity": False,
    },
    "tasks": {},
    "plan": {
        "merges": 13,
        "selection": "tail",
        "block": "cosine",
        "starts": None,
        "survivor": "before",
        "threshold": None,
        "recompute": False,
        "base": "fixed",
        "ratio": 0.6225,
        "beta": 1.0,
        "similarity_run": None,
        "similarity_subset": None,
        "similarity_language": None,
        "alpha_file": None,
        "alignment": "none",
        "norms": "keep",
        "biases": "keep",
        "refit": "none",
        "ridge": None,
        "refit_layers": 0,
    },
    "search": {
        "searcher": "bayes",
        "objective": "micro_accuracy",
        "perplexity_ceiling": None,
        "text": None,
        "text_tokens": 1024,
        "candidates": 60,
        "initial": 10,
        "random_candidates": 10,
        "probes": [],
        "bounds": [0.0, 1.0],
        "batch": "auto",
        "concurrent": "auto",
        "seed": 0,
    },
    "gradient": {
        "parametrisations": ["simplex"],
        "starts": 4,
        "optimizer": "adam",
        "learning_rate": 0.1,
        "epochs": 60,
        "batch_size": None,
        "held_out": 0.2,
        "patience": 10,
        "text_kl": 0.0,
        "text_windows": None,
        "text_positions": 256,
    },
    "calibration": {"text": None, "tokens": 12288, "seed": 0},
    "similarity": {
        "subsets": ["all"],
        "languages": None,
        "samples": 57,
        "split": "validation",
        "shots": 0,
        "pooling": "sequence",
        "max_tokens": 512,
        "embedding": "diffusion",
        "sigma": 8.0,
        "anisotropy": 0.5,
        "dimensions": 2,
        "measure": "npib",
        "neighbors": 5,
        "entropy_neighbors": 50,
        "null_draws": 20,
        "interval_draws": 40,
        "half_draws": 20,
        "seed": 0,
    },
    "sensitivity": {
        "sigma": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, "median"],
        "dimensions": [1, 2, 3, 5],
        "samples": [],
        "neighbors": [3, 5, 8],
        "entropy_neighbors": [],
        "thresholds": [0.2, 0.4, 0.6, 0.8],
        "embedding": ["diffusion", "diffusion_gaussian", "pca", "tsne"],
        "measure": ["npib", "gaussian", "cka"],
        "merges": 4,
    },
    "sweep": {
        "merges": [1, 4, 11, 13, 15],
        "methods": ["drop", "before_last", "fixed:0.4", "fixed:0.5", "fixed:0.6", "fixed:0.62", "fixed:0.7"],
        "alpha_files": {},
        "alignments": ["none", "neurons"],
        "norms": ["keep", "fold"],
        "refits": ["none"],
        "refitted_methods": [],
        "context": True,
        "distances": [32, 64, 128, 256, 512, 1024],
        "retrieval_prompts": 20,
        "speed_tokens": 32,
    },
    "workers": {
        "count": "auto",
        "gpus_per_worker": "auto",
        "cpus_per_worker": 1,
        "autoscaling": False,
        "timeout_s": 1800.0,
        "wait_s": 900.0,
        "max_restarts": 3,
        "dashboard": False,
    },
    "output": {
        "run": "runs/demo",
        "cache": None,
        "store_candidate_answers": False,
        "save_best": True,
        "verify": True,
        "figures": True,
        "loggers": [],
    },
}


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults():
    assert load_config().resolved() == DEFAULTS
    assert parse_config({}, source="x") == Config() == load_config(None, [])


def test_an_empty_file_and_empty_sections_are_all_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(write(tmp_path, "# nothing\n")) == Config()


def test_a_file_changes_what_it_names(tmp_path):
    path = write(
        tmp_path, "model: {path: /models/x, dtype: bfloat16}\nplan: {merges: 4}\nsearch:\n  bounds: [0.3, 0.7]\n"
    )
    expected = {section: dict(values) for section, values in DEFAULTS.items()}
    expected["model"] |= {"path": "/models/x", "dtype": "bfloat16"}
    expected["plan"] |= {"merges": 4}
    expected["search"] |= {"bounds": [0.3, 0.7]}
    assert load_config(path).resolved() == expected


def test_what_is_written_to_a_run_reads_back_as_the_same_configuration():
    config = parse_config(
        {
            "model": {"path": "über/x", "add_bos": True, "revision": "1e5"},
            "data": {"subjects": ["anatomy", "law"], "domains": {"mine": ["a", "b"]}, "limit_per_subject": 3},
            "plan": {"merges": 2, "ratio": 1 / 3, "base": "file", "alpha_file": "a.json", "biases": "merge"},
            "search": {"objective": "accuracy:anatomy,law", "bounds": [0.1, 0.9], "batch": 4, "probes": ["p.json"]},
            "workers": {"count": 2, "gpus_per_worker": 0.5},
            "output": {"run": "s3://bucket/x", "cache": "/tmp/c"},
        },
        source="x",
    )
    text = yaml.safe_dump(config.resolved(), allow_unicode=True)
    again = parse_config(yaml.safe_load(text), source="x")
    assert again == config and again.resolved() == config.resolved()
    assert again.plan.ratio == 1 / 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plan": {"mergs": 4}}, "here: unknown key plan.mergs: did you mean merges?"),
        ({"modle": {}}, "here: unknown key modle: did you mean model?"),
        ({"model": {"zzz": 1}}, "unknown key model.zzz: known are path, dtype, revision"),
        ({"search": {"bound": [0, 1], "sed": 1}}, "unknown key search.sed: did you mean seed?"),
        ({"model": 3}, "model = 3"),
        ({"model": None}, "model = None"),
        ({"plan": {"merges": 0}}, "plan.merges = 0"),
        ({"plan": {"merges": "many"}}, "plan.merges = 'many'"),
        ({"plan": {"merges": 2.5}}, "plan.merges = 2.5"),
        ({"plan": {"ratio": 1.1}}, "plan.ratio = 1.1"),
        ({"plan": {"ratio": float("nan")}}, "plan.ratio = nan"),
        (
            {"plan": {"selection": "head"}},
            "plan.selection = 'head': Input should be 'tail', 'block'",
        ),
        ({"plan": {"selection": "most_similar"}}, "selection is most_similar, so similarity_run must name a run"),
        (
            {"plan": {"selection": "most_similar", "similarity_run": "r", "merges": None}},
            "selection is most_similar, so merges or threshold must say where to stop",
        ),
        ({"plan": {"threshold": 0.5}}, "selection is tail, but threshold and recompute belong to most_similar"),
        ({"plan": {"recompute": True}}, "selection is tail, but threshold and recompute belong to most_similar"),
        ({"plan": {"merges": None}}, "selection is tail, which needs merges"),
        ({"plan": {"selection": "block", "merges": None}}, "selection is block, which needs merges"),
        ({"plan": {"block": "middle"}}, "plan.block = 'middle'"),
        ({"plan": {"block": -1}}, "plan.block = -1"),
        ({"plan": {"selection": "block", "block": "similarity"}}, "block is similarity, so similarity_run must name"),
        (
            {"plan": {"selection": "block", "base": "file", "alpha_file": "a.json"}},
            "selection is block, but an alpha file names its own layers: set selection to list",
        ),
        (
            {"plan": {"selection": "most_similar", "base": "file", "alpha_file": "a.json", "similarity_run": "r"}},
            "selection is most_similar, but an alpha file names its own layers: set selection to list",
        ),
        (
            {"plan": {"selection": "block", "block": "loss"}},
            "plan.block is loss, measured on plain text: set calibration",
        ),
        (
            {"plan": {"block": "loss"}, "sweep": {"methods": ["drop_block"]}},
            "plan.block is loss, measured on plain text: set calibration.text",
        ),
        ({"plan": {"refit": "quadratic"}}, "plan.refit = 'quadratic'"),
        ({"plan": {"ridge": 0}}, "plan.ridge = 0"),
        ({"sweep": {"refits": ["nothing"]}}, "sweep.refits"),
        ({"sweep": {"refits": []}}, "sweep.refits = []: List should have at least 1 item"),
        ({"sweep": {"merges": []}}, "sweep.merges = []: List should have at least 1 item"),
        ({"similarity": {"subsets": []}}, "similarity.subsets = []: List should have at least 1 item"),
        ({"gradient": {"parametrisations": []}}, "gradient.parametrisations = []: List should have at least 1 item"),
        ({"search": {"seed": -1}}, "search.seed = -1: Input should be greater than or equal to 0"),
        ({"similarity": {"seed": 2**32}}, "similarity.seed = 4294967296: Input should be less than 4294967296"),
        ({"sweep": {"methods": ["drop"], "refitted_methods": ["drop_block"]}}, "refitted_methods has drop_block"),
        ({"calibration": {"tokens": 1}}, "calibration.tokens = 1"),
        ({"plan": {"selection": "list"}}, "selection is list, so base must be file"),
        ({"similarity": {"measure": "cosine"}}, "measure is cosine, which compares vectors: set pooling"),
        (
            {"similarity": {"samples": 40}},
            "entropy_neighbors is 50 for 40 samples: the k-th neighbour needs more than k",
        ),
        ({"similarity": {"samples": 3}}, "similarity.samples = 3"),
        ({"similarity": {"sigma": 0}}, "similarity.sigma = 0"),
        ({"similarity": {"sigma": "mean"}}, "similarity.sigma = 'mean'"),
        ({"similarity": {"null_draws": 5}}, "similarity.null_draws = 5"),
        ({"gradient": {"held_out": 1}}, "gradient.held_out = 1"),
        ({"gradient": {"optimizer": "lion"}}, "gradient.optimizer = 'lion'"),
        ({"gradient": {"learning_rate": 0}}, "gradient.learning_rate = 0"),
        ({"gradient": {"learning_rate": float("inf")}}, "gradient.learning_rate = inf"),
        ({"gradient": {"batch_size": 0}}, "gradient.batch_size = 0"),
        ({"gradient": {"patience": 0}}, "gradient.patience = 0"),
        ({"gradient": {"epochs": 0}}, "gradient.epochs = 0"),
        ({"gradient": {"parametrisations": ["softmax"]}}, "gradient.parametrisations"),
        (
            {"plan": {"selection": "block", "block": "search"}, "search": {"searcher": ["bayes", "gradient"]}},
            "search.searcher gradient needs a tail merge, but plan.selection is block: use searcher bayes",
        ),
        (
            {"plan": {"alignment": "rows"}, "search": {"searcher": "gradient"}},
            "plan.alignment rows with model.quantise none has no gradient",
        ),
        (
            {"model": {"quantise": "int8"}, "search": {"searcher": "gradient"}},
            "plan.alignment none with model.quantise int8 has no gradient",
        ),
        (
            {"gradient": {"text_kl": 0.1}, "search": {"searcher": "gradient"}},
            "gradient.text_kl needs a plain text to descend on: set search.text",
        ),
        (
            {"sweep": {"methods": ["drop_greedy"]}},
            "drop_greedy goes by the loss on plain text: set calibration.text to",
        ),
        ({"sweep": {"methods": ["drpo"]}}, "'drpo' is not one of drop, before_last"),
        ({"sweep": {"methods": ["fixed:1.5"]}}, "'fixed:1.5' is not one of"),
        ({"sweep": {"methods": ["fixed:"]}}, "'fixed:' is not one of"),
        ({"sweep": {"merges": [0]}}, "sweep.merges"),
        ({"sweep": {"methods": ["file"]}}, "methods has file, so alpha_files must name one, such as {best: alphas"),
        ({"sweep": {"alpha_files": {"a": "a.json"}}}, "alpha_files are given, but methods lacks file"),
        ({"sweep": {"methods": ["file"], "alpha_files": {"a b": "a.json"}}}, "sweep.alpha_files = 'a b'"),
        (
            {"gradient": {"optimizer": "lbfgs", "batch_size": 4}},
            "gradient: batch_size is 4, but lbfgs takes every step on all questions",
        ),
        ({"plan": {"base": "file"}}, "base is file, so alpha_file must name one"),
        ({"plan": {"base": "similarity"}}, "base is similarity, so similarity_run must name"),
        ({"plan": {"base": "similarity_ratio"}}, "base is similarity_ratio, so similarity_run must name"),
        ({"search": {"bounds": [0.7, 0.3]}}, "bounds are [0.7, 0.3]: they must satisfy 0 <= low < high <= 1"),
        ({"search": {"bounds": [0.5, 0.5]}}, "bounds are [0.5, 0.5]"),
        ({"search": {"bounds": [-0.1, 0.5]}}, "bounds are [-0.1, 0.5]"),
        ({"search": {"bounds": [0.5, 1.1]}}, "bounds are [0.5, 1.1]"),
        ({"search": {"bounds": [0.5, float("nan")]}}, "search.bounds = nan: Input should be a finite number"),
        ({"search": {"bounds": [0.5]}}, "search.bounds"),
        ({"search": {"objective": "accurcy"}}, "'accurcy' is not one of micro_accuracy, macro_accuracy, answer_nll"),
        ({"search": {"objective": "accuracy: "}}, "must be followed by subjects"),
        ({"search": {"objective": "answer_nll+micro_accuracy"}}, "adds accuracies, of which more is better, to losses"),
        (
            {"search": {"objective": "answer_nll:a+answer_kl", "searcher": ["bayes", "gradient"]}},
            "descends on one set of questions, but the terms of objective answer_nll:a+answer_kl have different",
        ),
        ({"search": {"objective": "text_nll"}}, "objective text_nll needs a plain text"),
        ({"search": {"perplexity_ceiling": 30}}, "perplexity_ceiling needs a plain text"),
        ({"search": {"perplexity_ceiling": 1, "text": "demo"}}, "search.perplexity_ceiling = 1"),
        ({"search": {"batch": 0}}, "search.batch = 0"),
        ({"search": {"batch": "most"}}, "search.batch = 'most'"),
        ({"search": {"candidates": 0}}, "search.candidates = 0"),
        ({"workers": {"gpus_per_worker": -1}}, "workers.gpus_per_worker = -1"),
        (
            {"workers": {"gpus_per_worker": 1.5}},
            "gpus_per_worker is 1.5: a worker takes a fraction of one GPU (0.5) or whole",
        ),
        ({"workers": {"timeout_s": 0}}, "workers.timeout_s = 0"),
        ({"workers": {"wait_s": float("inf")}}, "workers.wait_s = inf: Input should be a finite number"),
        ({"similarity": {"anisotropy": float("nan")}}, "similarity.anisotropy = nan: Input should be a finite number"),
        ({"workers": {"autoscaling": True, "count": 8}}, "count is 8 and gpus_per_worker auto: a cluster that grows"),
        ({"output": {"loggers": ["comet"]}}, "output.loggers"),
        ({"data": {"shots": -1}}, "data.shots = -1"),
        ({"data": {"limit_per_subject": 0}}, "data.limit_per_subject = 0"),
        ({"data": {"search_split": "tests"}}, "data.search_split = 'tests'"),
        ({"data": {"perplexity_tokens": 1}}, "data.perplexity_tokens = 1"),
        ({"model": {"dtype": "int8"}}, "model.dtype = 'int8'"),
    ],
)
def test_refused_values_name_the_key_the_value_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(values, source="here")


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config({"plan": {"mergs": 4}, "search": {"batch": 0}}, source="x.yaml")
    text = str(caught.value)
    assert text.startswith("x.yaml: ") and "plan.mergs" in text and "search.batch = 0" in text and "\n" not in text


@pytest.mark.parametrize("text", ["model: [", "a: b: c", "\t- x", "model: {revision: 2024-13-01}", "a: 0x_"])
def test_bad_yaml(tmp_path, text):
    with pytest.raises(ConfigError, match="run.yaml cannot be read as YAML"):
        load_config(write(tmp_path, text))


def test_errors_name_where_a_value_comes_from(tmp_path):
    path = write(tmp_path, "search: {batch: 0}")
    for arguments, source in (
        ((path,), f"{path}"),
        ((path, "plan.merges=4"), f"{path} and the command line"),
        ((None, "search.batch=0"), "the command line"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(*arguments)
        assert str(caught.value).startswith(f"{source}: search.batch = 0: ")


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="must hold sections such as model"):
        load_config(write(tmp_path, "- model\n- data\n"))
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(write(tmp_path, "just words"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "binary.yaml")


def test_a_key_that_stands_twice_is_refused_rather_than_the_first_forgotten(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("plan:\n  merges: 4\n  merges: 5\n")
    with pytest.raises(ConfigError, match=r"(?s)twice.yaml cannot be read as YAML: 'merges' is given twice.*line 3"):
        load_config(path)
    path.write_text("data: &d {shots: 1}\nplan: {merges: 4}\ndata: {shots: 2}\n")
    with pytest.raises(ConfigError, match="'data' is given twice"):
        load_config(path)
    with pytest.raises(ConfigError, match="'a' is given twice"):
        load_config(None, ["data.domains={a: [b], a: [c]}"])


def test_a_wrong_value_is_not_blamed_on_the_file_alone_where_there_are_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("plan: {merges: 4}\n")
    with pytest.raises(ConfigError, match="run.yaml and the command line: plan.base = 'none'"):
        load_config(path, ["plan.base=none"])


def test_overrides_come_last_and_are_yaml(tmp_path):
    path = write(tmp_path, "plan: {merges: 4, ratio: 0.5}\noutput:\n")
    config = load_config(
        path,
        [
            "plan.merges=2",
            "plan.merges=3",
            "search.bounds=[0.3, 0.7]",
            "data.limit_per_subject=null",
            "data.subjects=anatomy, law",
            "output.run=s3://b/x?region=a=b",
            "data.domains.mine=[anatomy]",
            "model.add_bos=false",
        ],
    )
    assert (config.plan.merges, config.plan.ratio) == (3, 0.5)
    assert config.search.bounds == (0.3, 0.7)
    assert config.data.subjects == ["anatomy", "law"] and config.data.domains == {"mine": ["anatomy"]}
    assert config.output.run == "s3://b/x?region=a=b"
    assert config.model.add_bos is False
    assert load_config(None, ["plan.merges=5"]).plan.merges == 5


@pytest.mark.parametrize("override", ["merges", "merges=4", "=4", "plan.=4", ".merges=4", "plan.merges", ""])
def test_overrides_that_are_none(override):
    with pytest.raises(ConfigError, match="is not an override: write section.key=value"):
        load_config(None, [override])


def test_one_override_needs_no_list():
    assert load_config(None, "plan.merges=2").plan.merges == 2


def test_overrides_are_checked_like_files(tmp_path):
    with pytest.raises(ConfigError, match="the command line: unknown key plan.mergs: did you mean merges"):
        load_config(None, ["plan.mergs=4"])
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(None, ["plan.merges=[1"])
    with pytest.raises(ConfigError, match="'model.revision=2024-13-01' is not YAML: month must be .*; put quotes"):
        load_config(None, ["model.revision=2024-13-01"])
    with pytest.raises(ConfigError, match="path is not a section"):
        load_config(write(tmp_path, "model: {path: x}"), ["model.path.deeper=1"])


def test_searching_on_test_questions_needs_its_name_said():
    with pytest.raises(ConfigError, match=r"data.search_split is test: .*data.search_on_test: true"):
        parse_config({"data": {"search_split": "test"}}, source="x")
    allowed = parse_config({"data": {"search_split": "test", "search_on_test": True}}, source="x")
    assert allowed.data.search_split == "test"
    assert load_config(None, ["data.search_split=test", "data.search_on_test=true"]) == allowed


def test_subjects_as_text_or_list():
    for value in ("law, anatomy,", ["law", "anatomy"]):
        assert parse_config({"data": {"subjects": value}}, source="x").data.subjects == ["law", "anatomy"]
    assert parse_config({"data": {"subjects": "all"}}, source="x").data.subjects == "all"


def test_a_search_measures_text_only_where_it_is_asked_to():
    def search(**keys):
        return parse_config({"search": keys}, source="x").search

    assert not search(text="demo").needs_text and not search(objective="answer_kl").needs_text
    assert search(text="demo", objective="answer_nll+0.1*text_nll").needs_text
    assert search(text="demo", perplexity_ceiling=20).needs_text


def test_objectives():
    for objective in (
        "micro_accuracy",
        "macro_accuracy",
        "answer_nll",
        "answer_kl",
        "accuracy:anatomy",
        "accuracy:a,b",
    ):
        assert parse_config({"search": {"objective": objective}}, source="x").search.objective == objective


def test_a_configuration_does_not_change():
    config = Config()
    for change in (
        lambda: setattr(config, "plan", config.plan),
        lambda: setattr(config.plan, "merges", 2),
        lambda: setattr(config.search, "bounds", (0.1, 0.2)),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            change()
    assert config == Config()


def test_parsing_leaves_its_input_alone():
    values = {"data": {"subjects": "law,anatomy"}}
    parse_config(values, source="x")
    assert values == {"data": {"subjects": "law,anatomy"}}


TASK = ["tasks.piqa.format=piqa", "tasks.piqa.file=x.jsonl"]


def test_tasks_have_names_of_their_own(tmp_path):
    config = load_config(None, [*TASK, "tasks.later-one.format=arc", "tasks.later-one.file=y", "tasks.piqa.limit=5"])
    assert list(config.tasks.root) == ["piqa", "later-one"] and config.tasks.root["piqa"].limit == 5
    assert parse_config(yaml.safe_load(describe(config)), source="x") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.piqa.fromat=x", "unknown key tasks.piqa.fromat: did you mean format?"),
        ("tasks.piqa.format=winogrande", "tasks.piqa.format = 'winogrande': Input should be 'piqa'"),
        ("tasks.piqa.limit=0", "tasks.piqa.limit = 0: "),
        ("tasks.piqa.shots=2", "tasks.piqa: shots is 2, so examples must name a file"),
        ("tasks.b.format=arc", "tasks.b.file: Field required"),
    ],
)
def test_tasks_that_do_not_do(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*TASK, override])


def test_a_task_s_name_can_name_a_file():
    with pytest.raises(ConfigError, match="String should match pattern"):
        load_config(None, ["tasks.a b.format=arc", "tasks.a b.file=x"])


def test_every_key_is_explained_in_its_section():
    """The page docs/config.md is made of these docstrings."""
    for name, field in Config.model_fields.items():
        keys = TaskConfig.model_fields if name == "tasks" else field.annotation.model_fields
        unexplained = [key for key in keys if not re.search(rf"\b{key}\b", field.annotation.__doc__)]
        assert not unexplained, f"{name}: {unexplained}"


# -- what an option may be -------------------------------------------------------------------------------------------


def values_of(kind):
    """The values of every Literal in an annotation."""
    return [*get_args(kind)] if get_origin(kind) is Literal else [v for part in get_args(kind) for v in values_of(part)]


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (config.TaskFormat, FORMATS),
        (config.Measure, MEASURES),
        (config.Embedding, EMBEDDINGS),
        (config.Alignment, ALIGNMENTS),
        (config.RefitMethod, ("none", *REFITS)),
        (config.PlanConfig.model_fields["survivor"].annotation, SURVIVORS),
        (config.GradientConfig.model_fields["parametrisations"].annotation, parametrisation.PARAMETRISATIONS),
    ],
)
def test_an_option_has_the_values_that_the_code_knows(kind, known):
    assert values_of(kind) == [*known]


@pytest.mark.parametrize("section", ["tasks", "plan", "search", "gradient", "similarity", "output"])
def test_every_value_of_an_option_is_explained(section):
    explained = Config.model_fields[section].annotation.__doc__
    fields = (TaskConfig if section == "tasks" else Config.model_fields[section].annotation).model_fields
    values = {value for name, field in fields.items() if name != "split" for value in values_of(field.annotation)}
    assert [value for value in sorted(values) if not re.search(rf"\b{value}\b", explained)] == []


@pytest.mark.parametrize(
    ("kind", "meaning"),
    [
        (config.SearcherName, columns.SHARED["searcher"]),
        (config.Alignment, columns.SHARED["alignment"]),
        (config.Measure, columns.TABLES["similarity"][1]["measure"]),
        (config.Measure, columns.TABLES["similarity_correlation"][1]["measure"]),
    ],
)
def test_columns_that_say_what_was_configured_name_every_value(kind, meaning):
    assert [value for value in values_of(kind) if not re.search(rf"\b{value}\b", meaning)] == []
