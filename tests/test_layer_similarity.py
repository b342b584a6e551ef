"""layer_similarity.py without workers: rows of a matrix, its prompts and maps, correlations, and what is warned of."""

import shutil
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from raymerge.activations import Activations
from raymerge.actors import NoRoomError
from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.demo import MMLU_PATH
from raymerge.diffusion import SimilarityError
from raymerge.embedding import embed_layers
from raymerge.experiments import common, layer_similarity
from raymerge.experiments.layer_similarity import (
    _check_ranges,
    _correlations,
    _low_ceilings,
    _repeated_samples,
    _store,
    correlation_row,
    degenerate_maps,
    sensitivity,
    similarity,
    similarity_rows,
)
from raymerge.inputs import SUBSETS, read_subsets
from raymerge.reliability import Correlation, Study, correlate
from raymerge.sensitivity import recipe_of
from raymerge.similarity import MEASURES, SimilarityMatrix, embedded
from raymerge.tables import RunDirectory
from raymerge.worker import ModelWorker, SubsetSimilarity

LAYERS, SAMPLES = 3, 6
SETTINGS = [
    "data.domains={arithmetic: [elementary_addition, elementary_subtraction]}",
    "similarity.subsets=[arithmetic, country_capitals, number_words]",
    f"similarity.samples={SAMPLES}",
    "similarity.entropy_neighbors=4",
    "similarity.measure=gaussian",
    "similarity.embedding=diffusion_gaussian",
    "similarity.sigma=median",
]


def config(*settings):
    return load_config(None, [*SETTINGS, *settings])


def study(first=0.0, *, halves=0, samples=SAMPLES, undefined=False):
    """Every array of other numbers, and one entry that is not defined."""
    values = np.arange(9, dtype=float).reshape(3, 3) / 100 + first
    values = (values + values.T) / 2
    notes = {}
    if undefined:
        values[0, 2] = values[2, 0] = np.nan
        notes = {(0, 2): "constant", (2, 0): "constant"}
    rng = np.random.default_rng(int(first * 100))
    return Study(
        SimilarityMatrix(values, notes), values - 0.5, values - 0.4, values - 0.1, values + 0.1,
        draws=values + rng.normal(0, 0.01, (5, 3, 3)), draw_size=5,
        halves=values + rng.normal(0, 0.01, (halves, 2, 3, 3)), n_samples=samples,
    )  # fmt: skip


def result(settings, found, activations, distinct=SAMPLES):
    """What a worker gives of one subset."""
    recipe = recipe_of(settings.similarity)
    maps = embedded(recipe, activations.distances) if MEASURES[recipe.measure] == "embeddings" else None
    return SubsetSimilarity(found, activations.block_influence, maps, distinct)


@pytest.fixture(scope="module")
def activations():
    points = np.random.default_rng(0).normal(size=(LAYERS, SAMPLES, 4))
    distances = np.linalg.norm(points[:, :, None] - points[:, None], axis=-1)
    return Activations(distances, None, np.array([0.25, 0.5, 0.125]))


def test_every_entry_of_a_matrix_is_a_row_with_its_own_noise():
    rows = similarity_rows({"subset": "a"}, study(undefined=True))
    assert [(row["layer_i"], row["layer_j"]) for row in rows] == [(i, j) for i in range(3) for j in range(3)]
    for row in rows:
        if {row["layer_i"], row["layer_j"]} == {0, 2}:
            assert row["note"] == "constant" and row["value"] is row["null_mean"] is row["ci_high"] is None
            continue
        assert row["note"] is None and row["n_samples"] == SAMPLES and row["subset"] == "a"
        value = (row["layer_i"] + row["layer_j"]) * 0.02
        found = [row[name] - value for name in ("value", "null_mean", "null_p95", "ci_low", "ci_high")]
        assert found == pytest.approx([0, -0.5, -0.4, -0.1, 0.1])


@pytest.mark.parametrize(
    ("measure", "embedding"), [("gaussian", "diffusion_gaussian"), ("npib", "pca"), ("cka", "none")]
)
def test_a_subset_is_stored_with_its_prompts_and_the_map_that_its_matrix_is_made_on(
    measure, embedding, activations, tmp_path
):
    settings = config(f"similarity.measure={measure}", f"similarity.embedding={embedding.replace('none', 'pca')}")
    subset, *_ = read_subsets(settings)
    run = RunDirectory.open(tmp_path, {}, "similarity")
    _store(settings, run, subset, result(settings, study(), activations))
    samples = run.read("samples").to_pylist()
    asked = subset.questions.questions
    assert [(row["sample"], row["question_id"]) for row in samples] == [(n, q.question_id) for n, q in enumerate(asked)]
    assert {(row["subset"], row["language"]) for row in samples} == {("arithmetic", "en")}
    influence = run.read("block_influence").to_pylist()
    assert [(row["layer"], row["value"], row["n_samples"]) for row in influence] == [
        (0, 0.25, 6), (1, 0.5, 6), (2, 0.125, 6),
    ]  # fmt: skip
    rows = run.read("similarity").to_pylist()
    assert len(rows) == 9 and {(row["measure"], row["embedding"]) for row in rows} == {(measure, embedding)}
    embedded = run.read("embeddings").to_pylist()
    assert len(embedded) == (0 if measure == "cka" else LAYERS * SAMPLES * settings.similarity.dimensions)
    # Principal components have no bandwidth that could be far from the distances.
    degenerate = run.read("degeneracy").to_pylist()
    assert [row["layer"] for row in degenerate] == (list(range(LAYERS)) if measure == "gaussian" else [])
    if measure == "gaussian":
        coordinates, rank, mass = embed_layers(
            activations.distances, method=embedding, dimensions=settings.similarity.dimensions, sigma="median",
            anisotropy=settings.similarity.anisotropy, random_state=settings.similarity.seed,
        )  # fmt: skip
        for row in embedded:
            assert row["value"] == coordinates[row["layer"], row["sample"], row["coordinate"]]
        assert [row["effective_rank"] for row in degenerate] == rank.tolist()
        assert [row["off_diagonal_mass"] for row in degenerate] == mass.tolist()


def test_subsets_whose_names_and_languages_join_alike_are_stored_side_by_side(activations, tmp_path):
    """Domains are named as a user likes, and languages by folders."""
    for language in ("b-c", "c"):
        shutil.copytree(MMLU_PATH / "en", tmp_path / "questions" / language)
    domains = "data.domains={a: [country_capitals], a-b: [country_capitals]}"
    where = [f"data.mmlu={tmp_path / 'questions'}", "data.language=c", "similarity.languages=[b-c, c]"]
    settings = config(domains, *where, "similarity.subsets=[a, a-b]")
    run, subsets = RunDirectory.open(tmp_path / "run", {}, "similarity"), read_subsets(settings)
    for subset in subsets:
        _store(settings, run, subset, result(settings, study(), activations))
    stored = {(row["subset"], row["language"]) for row in run.read("similarity").to_pylist()}
    assert stored == {("a", "b-c"), ("a", "c"), ("a-b", "b-c"), ("a-b", "c")}


def test_a_correlation_is_of_its_two_subsets():
    found = Correlation(0.9, 0.8, 0.7, 0.85, 0.95, 0.65)
    row = correlation_row("npib", ("a", "en"), ("b", "de"), found)
    assert row == {
        "subset_a": "a", "language_a": "en", "subset_b": "b", "language_b": "de", "measure": "npib", "pearson": 0.9,
        "pearson_off_diagonal": 0.8, "ci_low": 0.7, "ci_high": 0.85, "reliability_a": 0.95, "reliability_b": 0.65,
    }  # fmt: skip


# -- warnings --------------------------------------------------------------------------------------------------------


def test_samples_that_are_the_same_are_warned_of_by_subset():
    subsets = [SimpleNamespace(name=name, language="en") for name in ("law", "art", "maths")]
    (said,) = _repeated_samples(config(), subsets, [6, 2, 6])
    assert said.startswith("art (en): only 2 of 6 samples differ in their first ")
    # What helps against prefixes that are cut is no cure where whole prompts are read.
    (said,) = _repeated_samples(config("similarity.pooling=last"), subsets, [6, 2, 6])
    assert said.startswith("art (en): only 2 of 6 samples differ: the source has a question several times")


def test_low_ceilings_are_those_of_two_subsets_or_more():
    assert _low_ceilings([study(halves=2)] * 2) and not _low_ceilings([study(halves=2), study()])
    assert not _low_ceilings([study(halves=2, samples=20)] * 2) and _low_ceilings([study(halves=1, samples=19)] * 3)


def test_layers_whose_map_is_noise_are_named_by_subset_and_side(tmp_path):
    run = RunDirectory.open(tmp_path, {}, "similarity")
    for name, count in (("law", 10), ("art", 20)):
        common = {"subset": name, "language": "en"}
        rows = [common | {"sample": n, "subject": "s", "split": "t", "question_id": str(n), "content_hash": "h"}
                for n in range(count)]  # fmt: skip
        run.append("samples", rows, part=name)
        # 9.5 is above 90 % of 10 samples, not of 20; 1 is a kernel all but constant.
        ranks = [9.5, 9.5, 5.0, 9.5, 1.0]
        rows = [common | {"layer": n, "effective_rank": rank, "off_diagonal_mass": 0.5} for n, rank in enumerate(ranks)]
        run.append("degeneracy", rows, part=name)
    found = sorted(degenerate_maps(run))
    assert [said.split(": the bandwidth is far ")[0] for said in found] == [
        "art (en): the diffusion map is degenerate in 1 layers (4)",
        "law (en): the diffusion map is degenerate in 1 layers (4)",
        "law (en): the diffusion map is degenerate in 3 layers (0-1, 3)",
    ]
    assert [("far above" in said, "near 1" in said, "above 90 %" in said) for said in found] == [
        (True, True, False),
        (True, True, False),
        (False, False, True),
    ]


def test_a_sensitivity_study_of_what_is_not_there_is_refused():
    inputs = SimpleNamespace(checkpoint=SimpleNamespace(n_layers=21))
    _check_ranges(config("sensitivity.merges=20", f"sensitivity.samples=[{SAMPLES}, 5]"), inputs)
    with pytest.raises(ConfigError, match="sensitivity.merges is 21, but the model has 21 layers"):
        _check_ranges(config("sensitivity.merges=21", "sensitivity.samples=[]"), inputs)
    with pytest.raises(ConfigError, match=r"sensitivity.samples \[7\] are more than the 6"):
        _check_ranges(config("sensitivity.merges=2", "sensitivity.samples=[7, 6]"), inputs)
    with pytest.raises(
        ConfigError, match="similarity.samples is 6, but measure gaussian of 3 dimensions needs at least 7"
    ):
        more = ["similarity.measure=gaussian", "similarity.dimensions=3", "sensitivity.samples=[]"]
        _check_ranges(config("sensitivity.merges=2", *more), inputs)


def test_what_a_worker_gives_of_a_subset_does_not_grow_with_the_square_of_its_samples(tmp_path):
    """The driver holds it of every subset to the end: distances of 80 layers and 500 samples are 160 MB each."""
    worker = ModelWorker(
        config("similarity.null_draws=20", "similarity.interval_draws=10"), roles=[SUBSETS], cache=tmp_path
    )
    found = worker.similarity(0)
    own = [*found.study.arrays().values(), found.block_influence, *found.embedded]
    layers = worker.checkpoint.n_layers
    assert found.embedded[0].shape[:2] == (layers, SAMPLES) and found.distinct == SAMPLES
    assert {array.shape for array in own if SAMPLES in array.shape} == {found.embedded[0].shape}


def test_activations_that_no_disk_has_room_for_are_refused(local_pools, tmp_path, monkeypatch):
    """Pooled states of 80 layers, 100 samples and 8,192 features are 262 MB a subset, 75 GB of 285."""
    vectors = ["similarity.pooling=last", "similarity.measure=cosine", "similarity.samples=8"]  # enough for halves
    asked = config(f"output.run={tmp_path / 'run'}", *vectors, "output.figures=false")
    monkeypatch.setattr("raymerge.worker.free_bytes", lambda folder: 1000)
    with pytest.raises(
        NoRoomError, match=r"subsets take \d+\.\d MB of .*/cache, .* has 1\.0 kB free: .*pooling=sequence"
    ):
        similarity(asked)
    (pool,) = local_pools
    (needed, _, cache), *_ = pool.broadcast("activations_room")
    monkeypatch.setattr("raymerge.worker.free_bytes", lambda folder: needed)
    similarity(asked)
    files = [*pool.worker.cache.glob("activations-*"), *pool.worker.cache.glob("study-*")]
    assert sum(path.stat().st_size for path in files) == pytest.approx(needed, rel=0.2)
    assert pool.broadcast("activations_room") == [(0, needed, cache)]


# -- a whole run over a stand-in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["gaussian", "cka"])
def test_each_subset_is_stored_as_it_comes_and_all_pairs_are_correlated(measure, activations, tmp_path, monkeypatch):
    studies, drawn = [study(n / 10, halves=2) for n in range(3)], []

    class Pool:
        def map(self, method, numbers, on_result):
            assert method == "similarity"
            found = [result(asked, studies[number], activations, SAMPLES - number) for number in numbers]
            for number in reversed(numbers):
                on_result(number, found[number])
            return found

    @contextmanager
    def workers(*_):
        yield Pool(), ["its worker"]

    monkeypatch.setattr(layer_similarity, "_workers", workers)
    monkeypatch.setattr(common, "draw_figures", lambda _, scripts, __: drawn.append(scripts) or ["a.png"])
    asked = config(f"output.run={tmp_path / 'run'}", f"similarity.measure={measure}", "similarity.seed=4")
    run = similarity(asked, command=["test"])
    names = ["arithmetic", "country_capitals", "number_words"]
    found = {
        (row["subset"], row["layer_i"], row["layer_j"]): row["value"] for row in run.read("similarity").to_pylist()
    }
    assert [found[name, 1, 2] for name in names] == pytest.approx([0.06, 0.16, 0.26])
    pairs = [(row["subset_a"], row["subset_b"]) for row in run.read("similarity_correlation").to_pylist()]
    assert pairs == [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    embeds = measure == "gaussian"
    assert drawn == [["heatmaps.py", "correlations.py", *(["embeddings.py"] if embeds else [])]]
    manifest = run.manifest()
    said = [warning.split(":")[0] for warning in manifest["warnings"]]
    assert said[:2] == ["country_capitals (en)", "number_words (en)"] and "ceilings" in manifest["warnings"][-1]
    assert (manifest["seeds"], manifest["workers"], manifest["figures"]) == (
        {"similarity": 4},
        ["its worker"],
        ["a.png"],
    )
    similarity(asked, command=["again"])
    assert len(drawn) == 1 and run.manifest() == manifest


def test_a_matrix_with_nothing_in_it_does_not_take_the_other_pairs_along():
    named = [((name, "en"), study(n / 10)) for n, name in enumerate("abc")]
    named[1][1].matrix.values[:] = np.nan
    rows, (warning,) = _correlations("npib", named, correlate)
    assert [(row["subset_a"], row["subset_b"]) for row in rows] == [("a", "c")]
    assert warning.startswith("2 pairs of subsets have no correlation, such as a/en and b/en: only 0 entries are")
    assert _correlations("npib", named[::2], correlate) == (rows, [])


def test_a_package_that_an_embedding_lacks_is_missed_before_any_states_are_computed(tmp_path, monkeypatch):
    """It was missed once all prompts had been through the model."""
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr(layer_similarity, "open_pool", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(layer_similarity, "runtime", lambda *_: nullcontext())

    def asked(name, *settings):
        return config("output.figures=false", f"output.run={tmp_path / name}", *settings)

    missing = r"pip install 'raymerge\[umap\]'"
    with pytest.raises(SimilarityError, match=missing):
        similarity(asked("a", "similarity.embedding=umap"))
    for varied in ("similarity.embedding=umap", "sensitivity.embedding=[pca, umap]"):
        with pytest.raises(SimilarityError, match=missing):
            sensitivity(asked(varied[:15], varied))
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):  # a measure without an embedding
        similarity(asked("b", "similarity.embedding=umap", "similarity.measure=cka"))
