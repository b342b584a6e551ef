"""Layer similarity as a whole on the embedded model: tables, resuming, plans made from it, foreign matrices."""

from types import SimpleNamespace

import numpy as np
import pytest
from local_pool import opened_locally

from raymerge import worker
from raymerge.checkpoint import Checkpoint
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.experiments import import_similarity, planning, search, sensitivity, similarity
from raymerge.experiments.common import settings_of
from raymerge.experiments.layer_similarity import _low_ceilings
from raymerge.experiments.planning import recomputed_plan
from raymerge.inputs import read_similarity, read_subsets
from raymerge.plan_section import similarity_of, similarity_warnings, starting_plan
from raymerge.progress import Silent
from raymerge.schemas import SCHEMAS
from raymerge.tables import RunDirectory, RunError
from raymerge.worker import ModelWorker

N_LAYERS = 21
SETTINGS = [
    "data.domains={arithmetic: [elementary_addition, elementary_subtraction], knowledge: [country_capitals]}",
    "similarity.subsets=[arithmetic, knowledge]",
    "similarity.samples=12",
    "similarity.measure=gaussian",
    "similarity.embedding=diffusion_gaussian",
    "similarity.sigma=median",
    "similarity.pooling=last",
    "similarity.interval_draws=12",
    "similarity.half_draws=4",
    "workers.count=1",  # each takes seconds to start
    "output.figures=false",
]


def config(out, *more):
    return load_config(None, [*SETTINGS, f"output.run={out}", *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with opened_locally():
        return similarity(config(tmp_path_factory.mktemp("runs") / "similarity", "workers.count=2"), command=["test"])


def test_ceilings_of_few_samples_are_warned_of(run):
    (warning,) = (said for said in run.manifest()["warnings"] if "ceilings" in said)
    assert warning.startswith("with 12 samples per subset the ceilings of correlations are too low, since halves of 6 ")
    found = SimpleNamespace(n_samples=12, halves=[1])
    assert _low_ceilings([found, found]) == [warning] and _low_ceilings([found]) == []
    assert _low_ceilings([SimpleNamespace(n_samples=20, halves=[1])] * 2) == []
    assert _low_ceilings([SimpleNamespace(n_samples=4, halves=[])] * 2) == []  # there are no ceilings


def test_a_run_has_every_entry_of_every_matrix_with_its_noise(run):
    assert run.complete
    rows = run.read("similarity").to_pylist()
    assert len(rows) == 2 * N_LAYERS**2 and {row["n_samples"] for row in rows} == {12}
    for row in rows:
        assert row["value"] is None or (
            np.isfinite(row["value"])
            and row["ci_low"] <= row["value"] <= row["ci_high"]
            and row["null_p95"] is not None
        )
        assert (row["value"] is None) == (row["note"] is not None)
    matrix, influence = read_similarity(run.path_of(), n_layers=N_LAYERS, subset="arithmetic")
    np.testing.assert_array_equal(matrix, matrix.T)
    assert np.all((influence > 0) & (influence < 1))
    (row,) = run.read("similarity_correlation").to_pylist()
    assert (row["subset_a"], row["subset_b"]) == ("arithmetic", "knowledge") and -1 <= row["pearson"] <= 1
    assert row["ci_low"] < row["pearson_off_diagonal"] < row["ci_high"]


def test_the_prompts_that_were_used_are_recorded(run):
    subsets = read_subsets(config("unused"))
    expected = [
        (subset.name, number, question.question_id)
        for subset in subsets
        for number, question in enumerate(subset.questions.questions)
    ]
    rows = run.read("samples").to_pylist()
    assert sorted((row["subset"], row["sample"], row["question_id"]) for row in rows) == sorted(expected)
    assert len(run.read("embeddings")) == 2 * N_LAYERS * 12 * 2 and len(run.read("degeneracy")) == 2 * N_LAYERS


def test_the_same_command_again_repeats_nothing_and_another_is_refused(run):
    manifest = run.manifest()
    assert similarity(config(run.path_of()), command=["again"]).manifest() == manifest
    with pytest.raises(RunError, match="similarity.sigma"):
        similarity(config(run.path_of(), "similarity.sigma=2"))


def test_a_search_takes_base_coefficients_and_controls_from_a_similarity_run(run, local_searches, tmp_path):
    found = search(
        load_config(
            None,
            [
                f"plan.similarity_run={run.path_of()}",
                "plan.similarity_subset=arithmetic",
                "plan.base=similarity",
                "plan.merges=4",
                "data.subjects=country_capitals,colour_mixing",
                "data.limit_per_subject=4",
                "data.report_limit_per_subject=4",
                "data.perplexity_tokens=200",
                "search.candidates=4",
                "search.initial=1",
                "search.random_candidates=1",
                "workers.count=1",
                "output.save_best=false",
                "output.figures=false",
                f"output.run={tmp_path / 'search'}",
            ],
        ),
        command=["test"],
    )
    plans = {row["name"]: row for row in found.read("plans").to_pylist()}
    assert {"block_influence", "similarity_shuffled", "similarity"} <= set(plans)
    matrix, influence = read_similarity(run.path_of(), n_layers=N_LAYERS, subset="arithmetic")
    alphas = {row["step"]: row["alpha"] for row in found.read("plans").to_pylist() if row["name"] == "similarity"}
    for step, (into, remove) in enumerate([(19, 20), (18, 19), (17, 18), (16, 17)]):
        expected = matrix[into, remove] / np.sqrt(matrix[into, into] * matrix[remove, remove])
        assert alphas[step] == pytest.approx(np.clip(expected, 0, 1))
    dropped = {row["remove"] for row in found.read("plans").to_pylist() if row["name"] == "block_influence"}
    assert dropped == set(np.argsort(influence, kind="stable")[:4].tolist())


def test_the_most_similar_layers_are_merged_with_similarity_collected_anew(run, local_searches, tmp_path):
    """A merge amid the model, where no trunk ends just before a last layer; recompute runs merged models."""
    settings = load_config(
        None,
        [
            f"plan.similarity_run={run.path_of()}",
            "plan.similarity_subset=knowledge",
            "plan.selection=most_similar",
            "plan.merges=2",
            "plan.recompute=true",
            "data.subjects=colour_mixing",
            "data.limit_per_subject=3",
            "data.report_limit_per_subject=3",
            "data.perplexity_text=null",
            "search.searcher=random",
            "search.candidates=3",
            "workers.count=1",
            "output.save_best=false",
            "output.figures=false",
            f"output.run={tmp_path / 'run'}",
        ],
    )
    found = search(settings, command=["test"])
    rows = [row for row in found.read("plans").to_pylist() if row["name"] == "found_random"]
    steps = [(row["into"], row["remove"]) for row in sorted(rows, key=lambda row: row["step"])]
    assert {row["selection"] for row in rows} == {"most_similar"} and len(steps) == 2
    matrix, _ = read_similarity(run.path_of(), n_layers=N_LAYERS, subset="knowledge")
    normalised = matrix / np.sqrt(np.outer(np.diag(matrix), np.diag(matrix)))
    first = int(np.nanargmax(np.diag(normalised, 1)))
    assert steps[0] == (first, first + 1)
    once = starting_plan(settings.plan, N_LAYERS, similarity_of(settings.plan, Checkpoint("demo")))
    assert (once.steps[0].into, once.steps[0].remove) == steps[0]


def test_subsets_may_have_any_name(local_pools, tmp_path):
    """As subjects in other scripts do; tables are in parts named after them."""
    names = ["médecine & droit", "../高中数学"]
    domains = f"data.domains={{{names[0]}: [elementary_addition], {names[1]}: [country_capitals]}}"
    found = similarity(config(tmp_path / "run", domains, f"similarity.subsets={names}"), command=["test"])
    assert set(found.read("similarity")["subset"].to_pylist()) == set(names)
    assert {path.parent.name for path in tmp_path.rglob("*.parquet")} <= set(SCHEMAS)


def test_similarity_is_collected_anew_by_the_workers_of_the_search(tmp_path, monkeypatch):
    """The similarity run may have been made on another cluster."""
    source = config(tmp_path / "similarity", "workers.count=64", "workers.gpus_per_worker=1", "workers.timeout_s=7")
    RunDirectory.open(tmp_path / "similarity", settings_of(source, "model", "data", "similarity"), "similarity")
    plan = ["plan.selection=most_similar", "plan.recompute=true", "plan.similarity_subset=knowledge"]
    ours = load_config(None, [*plan, f"plan.similarity_run={tmp_path / 'similarity'}", "workers.count=2"])

    class Opened(Exception):
        pass

    def opened(config, inputs, cache, **_):
        raise Opened(config.workers, config.similarity)

    monkeypatch.setattr(planning, "open_pool", opened)
    with pytest.raises(Opened) as caught:
        recomputed_plan(ours, N_LAYERS, str(tmp_path / "cache"), Silent())
    assert caught.value.args == (ours.workers, source.similarity)


def test_sensitivity_says_how_far_each_setting_matters(local_pools, tmp_path):
    ranges = [
        "sensitivity.sigma=[median, 5]",
        "sensitivity.dimensions=[2, 3]",
        "sensitivity.samples=[8]",
        "sensitivity.neighbors=[]",
        "sensitivity.embedding=[pca]",
        "sensitivity.measure=[cka, cosine]",
        "sensitivity.thresholds=[0.5]",
    ]
    found = sensitivity(config(tmp_path / "run", *ranges), command=["test"])
    rows = found.read("sensitivity").to_pylist()
    assert len(rows) == 2 * (1 + 2 + 2 + 1 + 1 + 2 + 1) and found.complete
    same = [row for row in rows if (row["parameter"], row["setting"]) == ("sigma", "median")]
    assert [row["pearson_off_diagonal"] for row in same] == pytest.approx([1.0, 1.0])
    with pytest.raises(ConfigError, match=r"sensitivity.samples \[40\] are more than the 12"):
        sensitivity(config(tmp_path / "more", "sensitivity.samples=[40]"))
    with pytest.raises(ConfigError, match="sensitivity.merges is 21, but the model has 21 layers"):
        sensitivity(config(tmp_path / "deep", "sensitivity.merges=21"))


def test_a_similarity_that_was_cut_short_computes_no_matrix_again(local_pools, monkeypatch, tmp_path):
    """A matrix's null model, intervals and halves are a hundred matrices more."""
    npib = ["similarity.measure=npib", "similarity.entropy_neighbors=3"]
    settings = config(tmp_path / "run", *npib)
    studied, study = [], worker.study

    def cut(recipe, distances, states, **options):
        studied.append(len(distances))
        if len(studied) == 2:
            raise InterruptedError("cut")
        return study(recipe, distances, states, **options)

    monkeypatch.setattr(worker, "study", cut)
    with pytest.raises(InterruptedError):
        similarity(settings, command=["test"])
    found = similarity(settings, command=["test"])
    assert studied == [N_LAYERS] * 3
    monkeypatch.setattr(worker, "study", study)
    whole = similarity(config(tmp_path / "whole", *npib), command=["test"])
    for table in ("similarity", "similarity_correlation"):
        run_id = {"run_id": found.run_id}
        assert found.read(table).to_pylist() == [row | run_id for row in whole.read(table).to_pylist()]


def test_a_sensitivity_that_was_cut_short_goes_on_with_the_subsets_that_are_left(local_pools, monkeypatch, tmp_path):
    ranges = [f"sensitivity.{key}=[]" for key in ("dimensions", "neighbors", "embedding", "measure", "thresholds")]
    whole = sensitivity(config(tmp_path / "whole", "sensitivity.sigma=[5]", *ranges), command=["test"])
    asked, vary = [], ModelWorker.sensitivity

    def cut(self, number):
        asked.append(number)
        if asked == [0, 1]:
            raise InterruptedError("cut")
        return vary(self, number)

    monkeypatch.setattr(ModelWorker, "sensitivity", cut)
    again = config(tmp_path / "run", "sensitivity.sigma=[5]", *ranges)
    with pytest.raises(InterruptedError):
        sensitivity(again, command=["test"])
    found = sensitivity(again, command=["test"])
    assert asked == [0, 1, 1]
    run_id = {"run_id": found.run_id}
    assert found.read("sensitivity").to_pylist() == [row | run_id for row in whole.read("sensitivity").to_pylist()]


# -- matrices from elsewhere -----------------------------------------------------------------------------------------


def save(folder, name, matrix):
    np.save(folder / f"{name}.npy", matrix)
    return folder / f"{name}.npy"


def test_foreign_matrices_are_named_after_their_files_and_correlated(tmp_path):
    rng = np.random.default_rng(0)
    matrices = {name: rng.random((5, 5)) for name in ("law", "math")}
    matrices["law"][0, 3] = np.nan
    files = [save(tmp_path, f"{name}_40s", matrix.astype(np.float32)) for name, matrix in matrices.items()]
    found = import_similarity(files, str(tmp_path / "run"), command=["test"])
    matrix, influence = read_similarity(found.path_of(), n_layers=5, subset="law")
    np.testing.assert_array_equal(matrix, matrices["law"].astype(np.float32))
    assert influence is None and found.complete
    (row,) = found.read("similarity_correlation").to_pylist()
    known = np.isfinite(matrices["law"])
    assert row["pearson"] == pytest.approx(np.corrcoef(matrices["law"][known], matrices["math"][known])[0, 1], abs=1e-6)
    assert row["ci_low"] is None and row["reliability_a"] is None


def test_a_foreign_matrix_that_is_constant_has_no_correlation(tmp_path):
    files = [save(tmp_path, "law", np.ones((5, 5))), save(tmp_path, "math", np.random.default_rng(0).random((5, 5)))]
    found = import_similarity(files, str(tmp_path / "run"), command=["test"])
    assert found.complete and not found.has("similarity_correlation")
    (warning,) = found.manifest()["warnings"]
    assert warning.startswith("1 pair of subsets has no correlation, such as law/imported and math/imported: a matrix")


def test_foreign_files_that_are_no_matrices_are_refused(tmp_path):
    def refuse(match, *files):
        with pytest.raises(ConfigError, match=match):
            import_similarity(files, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    square = save(tmp_path, "square", np.ones((4, 4)))
    refuse("have different numbers of layers", square, save(tmp_path, "other", np.ones((5, 5))))
    refuse(r"holds \(4, 5\), but must hold an \(L, L\) matrix", save(tmp_path, "wide", np.ones((4, 5))))
    refuse("must hold real numbers", save(tmp_path, "words", np.full((4, 4), "x")))
    refuse("2 files give 1 subset names", square, save(tmp_path, "square_40s", np.ones((4, 4))))
    refuse("cannot be read as a NumPy array", tmp_path / "absent.npy")
    for content in (b"", b"PK\x03\x04 and no more"):
        (tmp_path / "broken.npy").write_bytes(content)
        refuse("cannot be read as a NumPy array", tmp_path / "broken.npy")
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([[{}, {}], [{}, {}]]), allow_pickle=True)
    refuse("cannot be read as a NumPy array: Object arrays cannot be loaded", pickled)


def test_runs_of_another_model_are_refused(tmp_path):
    file = save(tmp_path, "law", np.ones((32, 32)))
    found = import_similarity([file], str(tmp_path / "run"))
    options = [f"plan.similarity_run={found.path_of()}", "plan.base=similarity", f"output.run={tmp_path / 'search'}"]
    with pytest.raises(ConfigError, match="is for a model of 32 layers, this one has 21"):
        search(load_config(None, options))
    assert RunDirectory(tmp_path / "search").manifest() is None


def test_a_similarity_that_is_noise_or_of_another_model_is_said_to_be(tmp_path):
    path = str(tmp_path / "run")
    run = RunDirectory.open(path, {}, "similarity")
    pairs = [{"measure": "npib", "embedding": "diffusion", "layer_i": i, "layer_j": j, "value": 1.0, "n_samples": 20}
             for i in range(2) for j in range(2)]  # fmt: skip
    names = [{"subset": subset, "language": "en"} for subset in ("noise", "fine")]
    run.append("similarity", [name | pair for name in names for pair in pairs])
    for name, rank in zip(names, (19.9, 5.0), strict=True):
        whole = name | {"effective_rank": rank, "off_diagonal_mass": 0.5}
        run.append("degeneracy", [whole | {"layer": layer} for layer in range(2)])
    run.write_manifest(model={"path": "/models/a", "identity": "a"})

    def warnings(subset, identity, *more):
        options = [f"plan.similarity_run={path}", f"plan.similarity_subset={subset}", *more]
        return similarity_warnings(load_config(None, options).plan, identity)

    assert warnings("fine", "a") == []
    (said,) = warnings("noise", "a")
    assert (
        "degenerate in 2 layers" in said and "so are coefficients derived from them" in said and "sigma: median" in said
    )
    assert warnings("noise", "a", "plan.similarity_language=de") == []  # coefficients are of another language's matrix
    assert warnings("fine", "b") == [f"{path} is a similarity run of another model, /models/a"]
    imported = RunDirectory.open(tmp_path / "imported", {}, "similarity")  # of which no model is known
    imported.write_manifest()
    assert warnings("fine", "b", f"plan.similarity_run={tmp_path / 'imported'}") == []
    assert similarity_warnings(load_config().plan, "a") == []
