"""sensitivity.py: the reference agrees with itself, what should matter does, what cannot be computed says why."""

import numpy as np
import pytest

from raymerge.config import SensitivityConfig, SimilarityConfig
from raymerge.schemas import conform
from raymerge.sensitivity import recipe_of, vary
from raymerge.similarity import compute

SETTINGS = SimilarityConfig(measure="gaussian", embedding="pca", dimensions=2, samples=40)
NOTHING = {key: [] for key in SensitivityConfig.model_fields if key != "merges"}


def ranges(**lists):
    return SensitivityConfig(merges=3, **(NOTHING | lists))


@pytest.fixture(scope="module")
def activations():
    """Distances (8, 40, 40) of a random walk through layers: neighbours are alike, more so at the end."""
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(40, 6))]
    for layer in range(7):
        states.append(states[-1] + (1.2 - 0.15 * layer) * rng.normal(size=(40, 6)))
    states = np.stack(states)
    return np.linalg.norm(states[:, :, None] - states[:, None], axis=-1), states.astype(np.float32)


def test_the_reference_comes_first_and_agrees_with_itself(activations):
    rows = vary(SETTINGS, ranges(), *activations)
    assert [row["reference"] for row in rows] == [True]
    assert rows[0]["pearson"] == pytest.approx(1.0) and rows[0]["pearson_off_diagonal"] == pytest.approx(1.0)
    assert (rows[0]["plan_overlap"], rows[0]["alpha_max_difference"]) == (1.0, 0.0)


def test_each_setting_is_compared_with_the_reference(activations):
    found = vary(SETTINGS, ranges(dimensions=[2, 4], measure=["cka", "cosine"], samples=[20, 40]), *activations)
    rows = {(row["parameter"], row["setting"]): row for row in found}
    assert list(rows)[1:] == [
        ("dimensions", "2"),
        ("dimensions", "4"),
        ("measure", "cka"),
        ("measure", "cosine"),
        ("samples", "20"),
        ("samples", "40"),
    ]
    for same in (("dimensions", "2"), ("samples", "40")):
        assert rows[same]["pearson_off_diagonal"] == pytest.approx(1.0) and rows[same]["plan_overlap"] == 1.0
    for other in (("dimensions", "4"), ("measure", "cka"), ("samples", "20")):
        assert 0.3 < rows[other]["pearson_off_diagonal"] < 0.9999
        assert 0.0 < rows[other]["alpha_max_difference"] < 0.2
    distances, states = activations
    base = recipe_of(SETTINGS)
    reference, cka = (
        compute(recipe, distances, states).values[np.triu_indices(8, 1)]
        for recipe in (base, recipe_of(SETTINGS.model_copy(update={"measure": "cka"})))
    )
    assert rows["measure", "cka"]["pearson_off_diagonal"] == pytest.approx(np.corrcoef(reference, cka)[0, 1])


def test_thresholds_say_how_many_merges_they_make(activations):
    found = vary(SETTINGS, ranges(thresholds=[-1.0, 50.0]), *activations)[1:]
    assert [row["setting"] for row in found] == ["-1", "50"]
    assert found[0]["note"] == "7 merges" and found[0]["plan_overlap"] == 1.0
    assert "lower it" in found[1]["note"] and found[1]["plan_overlap"] is None
    assert vary(SETTINGS, ranges(thresholds=[-1.0]), *activations, first=3)[1]["note"] == "4 merges"


def test_what_cannot_be_computed_has_a_note_instead_of_figures(activations):
    distances, _ = activations
    found = vary(SETTINGS, ranges(measure=["cosine"], dimensions=[39]), distances, None)[1:]
    assert all(row["note"] and "pearson" not in row for row in found)
    assert "pooling last or mean" in next(row["note"] for row in found if row["parameter"] == "measure")


def test_rows_are_rows_of_the_table(activations):
    found = vary(SETTINGS, SensitivityConfig(merges=3, embedding=["pca"], sigma=[8.0, "median"]), *activations)
    table = conform("sensitivity", [{"subset": "all", "language": "en", **row} for row in found], "run")
    assert table.num_rows == len(found)
