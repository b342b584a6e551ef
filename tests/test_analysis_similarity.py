"""The analysis scripts of similarity runs on synthetic tables: heat maps, correlations, embeddings, sensitivity."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from raymerge.tables import CATEGORY_OF, IMPORTED, RunDirectory, RunError, correlation_ceiling

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))  # the scripts are not part of the package; run as scripts they find each other

import correlations as correlations_script  # noqa: E402
import embeddings as embeddings_script  # noqa: E402
import heatmaps as heatmaps_script  # noqa: E402
import plotting  # noqa: E402
import sensitivity as sensitivity_script  # noqa: E402

SUBSETS = [("medical", "en"), ("legal", "en"), ("math", "en"), ("cs", "en"), ("humanities", "en"),
           ("medical", "es"), ("medical", "fr"), ("medical", "zh")]  # fmt: skip
SUBJECTS = {"medical": "clinical_knowledge professional_medicine", "legal": "professional_law international_law",
            "math": "high_school_mathematics college_mathematics", "cs": "computer_security machine_learning",
            "humanities": "world_religions philosophy"}  # fmt: skip


def make_run(path, *, layers=28, samples=20, subsets=5, measures=(("npib", "diffusion"),), seed=0, one_side=False):
    """A similarity run with plausible numbers: late layers resemble each other, the diagonal of npib exceeds 1."""
    rng = np.random.default_rng(seed)
    run = RunDirectory.open(path, {"model": {"path": "synthetic"}}, "similarity")
    chosen = SUBSETS[:subsets]
    similarity, ranks, influence, points, asked = [], [], [], [], []
    depth = np.arange(layers) / layers
    for subset, language in chosen:
        common = {"subset": subset, "language": language}
        for measure, embedding in measures:
            value = np.exp(-layers * np.abs(depth[:, None] - depth) / 5) * (
                0.25 + 0.75 * np.minimum.outer(depth, depth)
            )
            value += np.abs(rng.normal(0, 0.04, value.shape))
            value = (value + value.T) / 2
            null = np.abs(rng.normal(0.06, 0.01, value.shape))
            if measure == "npib":
                np.fill_diagonal(value, rng.normal(3.7, 0.1, layers))
            else:
                np.fill_diagonal(value, 1.0)
            for i in range(layers):
                for j in range(layers):
                    if one_side and j < i:
                        continue
                    undefined = subset == "legal" and 3 in (i, j)
                    similarity.append({
                        **common, "measure": measure, "embedding": embedding, "layer_i": i, "layer_j": j,
                        "value": None if undefined else value[i, j], "null_mean": null[i, j],
                        "null_p95": null[i, j] + 0.06, "n_samples": samples,
                        "ci_low": None if undefined else value[i, j] - 0.05 - 0.1 * depth[j],
                        "ci_high": None if undefined else value[i, j] + 0.05,
                        "note": "entropies have different signs" if undefined else None,
                    })  # fmt: skip
        for layer in range(layers):
            noise = layer < 2
            ranks.append({**common, "layer": layer, "effective_rank": samples - 0.5 if noise else 4 + 0.1 * layer,
                          "off_diagonal_mass": 0.01 if noise else 0.6})  # fmt: skip
            influence.append({**common, "layer": layer, "value": 0.3 * np.exp(-3 * depth[layer]) + rng.uniform(0, 0.01),
                              "n_samples": samples})  # fmt: skip
        group = np.arange(samples) % len(SUBJECTS[subset].split())
        for sample in range(samples):
            subject = SUBJECTS[subset].split()[group[sample]]
            asked.append({**common, "sample": sample, "subject": subject, "split": "test",
                          "question_id": f"{subject}/test/{sample}", "content_hash": f"{sample:x}"})  # fmt: skip
        for layer in range(layers):
            xy = rng.normal(0, 1, (samples, 2)) + depth[layer] * 3 * group[:, None]
            points += [
                {**common, "embedding": "diffusion", "layer": layer, "sample": i, "coordinate": c, "value": xy[i, c]}
                for i in range(samples)
                for c in range(2)
            ]
    correlations = []
    for a in range(len(chosen)):
        for b in range(a + 1, len(chosen)):
            apart = 0.06 * (chosen[a][0] != chosen[b][0]) + 0.12 * (chosen[a][1] != chosen[b][1])
            r = 0.9 - apart - rng.uniform(0, 0.1)
            for measure in dict.fromkeys(measure for measure, _ in measures):
                correlations.append({
                    **{f"{k}_a": v for k, v in zip(("subset", "language"), chosen[a], strict=True)},
                    **{f"{k}_b": v for k, v in zip(("subset", "language"), chosen[b], strict=True)},
                    "measure": measure, "pearson": r + 0.05, "pearson_off_diagonal": r, "ci_low": r - 0.08,
                    "ci_high": r + 0.05, "reliability_a": None if a == 3 else 0.92, "reliability_b": 0.85,
                })  # fmt: skip
    tables = {"similarity": similarity, "degeneracy": ranks, "block_influence": influence, "embeddings": points,
              "samples": asked, "similarity_correlation": correlations}  # fmt: skip
    for name, rows in tables.items():
        run.replace(name, rows)
    run.write_manifest(command=["synthetic"])
    return run


def make_sensitivity(path, *, subsets=3, seed=0):
    """A sensitivity run: every parameter the method has, the reference setting of each in it."""
    rng = np.random.default_rng(seed)
    run = RunDirectory.open(path, {"similarity": {"sigma": "median", "dimensions": 2}}, "sensitivity")
    settings = {"sigma": ["median", "8", "2", "32"], "dimensions": ["2", "1", "5", "10"], "samples": ["57", "20", "40"],
                "neighbors": ["5", "3", "10"], "entropy_neighbors": ["50", "10", "30"],
                "embedding": ["diffusion", "gaussian_diffusion", "pca", "tsne", "umap"],
                "measure": ["npib", "normalised", "gaussian", "cosine", "cka"],
                "threshold": ["0.5", "0.2"]}  # fmt: skip
    rows = []
    for subset, language in SUBSETS[:subsets]:
        rows.append({"subset": subset, "language": language, "parameter": "reference", "setting": "",
                     "reference": True, "pearson": 1.0, "pearson_off_diagonal": 1.0, "plan_overlap": 1.0,
                     "note": "one pair undefined" if subset == "math" else None})  # fmt: skip
        for parameter, values in settings.items():
            for i, setting in enumerate(values):
                same = i == 0 and parameter in ("sigma", "dimensions", "neighbors")
                lost = setting in ("gaussian", "20") and (subset == "legal" or setting == "gaussian")
                r = 1.0 if same else rng.uniform(0.3, 0.95)
                rows.append({
                    "subset": subset, "language": language, "parameter": parameter, "setting": setting,
                    "reference": False, "pearson": None if lost else min(1.0, r + 0.03),
                    "pearson_off_diagonal": None if lost else r,
                    "plan_overlap": None if lost else round(13 * r) / 13,
                    "alpha_max_difference": None if lost or parameter == "threshold" else 0.1 * (1 - r),
                    "note": "a quarter of the pairs undefined" if lost else None,
                })  # fmt: skip
    run.replace("sensitivity", rows)
    return run


def png_size(path: Path) -> tuple[int, int]:
    """(width, height); reading fails for half a file."""
    height, width = matplotlib.image.imread(path).shape[:2]
    return width, height


def table_of(text: str, heading: str, nth: int = 0) -> list[list[str]]:
    """Cells of the nth Markdown table after a heading, without its rule."""
    blocks = [block for block in text[text.index(heading) :].split("\n\n") if block.startswith("|")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in blocks[nth].splitlines()]
    return [rows[0], *rows[2:]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("similarity") / "run", layers=10)


@pytest.fixture(scope="module")
def figures(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    for script in (heatmaps_script, correlations_script, embeddings_script):
        assert script.main([run.path_of(), "--out", str(out)]) == 0
    return out


def test_every_figure_is_whole(figures):
    names = sorted(path.name for path in figures.iterdir())
    assert names == ["block_influence.png", "correlations.md", "correlations.png", "embeddings.png", "heatmaps.md",
                     "heatmaps.png"]  # fmt: skip
    assert all(min(png_size(figures / name)) > 400 for name in names if name.endswith(".png"))


def test_heatmap_table_is_computed_from_the_rows(run, figures):
    header, *lines = table_of((figures / "heatmaps.md").read_text(), "## npib")
    rows = run.read("similarity").to_pylist()
    assert [line[0] for line in lines] == [f"{subset} {language}" for subset, language in SUBSETS[:5]]
    for line in lines:
        cells = dict(zip(header, line, strict=True))
        mine = [row for row in rows if f"{row['subset']} {row['language']}" == line[0]]
        off = [row for row in mine if row["layer_i"] != row["layer_j"]]
        known = [row for row in off if row["value"] is not None]
        assert cells["n"] == "20"
        assert cells["mean off-diagonal"] == f"{np.mean([row['value'] for row in known]):.3f}"
        assert cells["null mean"] == f"{np.mean([row['null_mean'] for row in known]):.3f}"
        sound = [row for row in known if min(row["layer_i"], row["layer_j"]) > 1]  # without the degenerate layers
        assert cells["share above null p95"] == f"{np.mean([row['value'] > row['null_p95'] for row in sound]):.3f}"
        widths = [row["ci_high"] - row["ci_low"] for row in known]
        assert cells["median interval width"] == f"{np.median(widths):.3f}"
        assert cells["undefined cells"] == str(len(off) - len(known)) == ("18" if line[0] == "legal en" else "0")
        assert cells["degenerate layers"] == "0-1"


def test_heatmap_says_that_npib_is_not_bounded_by_one(figures):
    text = (figures / "heatmaps.md").read_text()
    assert "is clipped: it is not bounded by 1" in text and "legal en: entropies have different signs" in text
    influence = table_of(text, "## Block influence")
    assert influence[0] == ["layer", *[f"{subset} {language}" for subset, language in SUBSETS[:5]]]
    assert [row[0] for row in influence[1:]] == [str(i) for i in range(10)]


def test_colours_are_robust_against_the_diagonal(run):
    views = heatmaps_script.views_of(run.read("similarity").to_pylist())
    low, high, low_clips, high_clips = heatmaps_script.colour_range(views)
    off = np.concatenate([view.value[~np.eye(10, dtype=bool)] for view in views])
    assert (low, low_clips, high_clips) == (0.0, False, True)
    assert high == pytest.approx(np.nanpercentile(off, 99)) and high < 2
    narrow = [view._replace(value=0.95 + 0.01 * np.clip(view.value, 0, 1)) for view in views]
    assert heatmaps_script.colour_range(narrow)[0] > 0.9  # a scale from 0 would hide every difference


def test_a_map_of_noise_says_so_rather_than_that_nothing_is_defined(run):
    view = heatmaps_script.views_of(run.read("similarity").to_pylist())[0]
    assert heatmaps_script.null_title(view).endswith("% of pairs above null")
    noise = view._replace(degenerate=view.layers)
    assert heatmaps_script.null_title(noise) == f"noise: degenerate in layers 0-{view.layers[-1]}"
    assert heatmaps_script.null_title(view._replace(value=np.full_like(view.value, np.nan))) == "no defined pair"


def test_block_influence_is_labelled_in_plain_numbers(tmp_path, monkeypatch):
    shown = []

    def look(figure, path):
        figure.draw_without_rendering()
        (axis,) = figure.axes
        low, high = axis.get_ylim()
        ticks = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        shown.append([label.get_text() for at, label in ticks if low <= at <= high])
        return path

    monkeypatch.setattr(heatmaps_script, "save", look)
    for values in ([0.95, 0.16, 0.043], [0.019, 0.033, 0.044], [0.0211, 0.0289]):
        rows = [{"subset": "all", "language": "en", "layer": i, "value": value, "n_samples": 9} for i, value in
                enumerate(values)]  # fmt: skip
        heatmaps_script.draw_influence(rows, tmp_path / "x.png")
    assert shown == [["0.05", "0.1", "0.2", "0.5", "1"], ["0.02", "0.03", "0.04"],
                     ["0.022", "0.024", "0.026", "0.028"]]  # fmt: skip


@pytest.mark.parametrize(("least", "scale"), [(1e-6, "log"), (0.0, "linear"), (-2e-16, "linear")])
def test_the_influence_of_a_layer_that_changes_nothing_is_drawn_too(tmp_path, monkeypatch, least, scale):
    shown = []

    def look(figure, path):
        (axis,) = figure.axes
        shown.append((axis.get_yscale(), axis.lines[0].get_ydata().tolist()))
        return path

    monkeypatch.setattr(heatmaps_script, "save", look)
    rows = [{"subset": "all", "language": "en", "layer": i, "value": value, "n_samples": 9} for i, value in
            enumerate([0.9, least, 0.1])]  # fmt: skip
    heatmaps_script.draw_influence(rows, tmp_path / "x.png")
    assert shown == [(scale, [0.9, least, 0.1])]


def test_the_influence_on_57_subsets_is_their_range_since_a_legend_would_leave_no_room(tmp_path, monkeypatch):
    shown = []

    def look(figure, path):
        figure.draw_without_rendering()
        (axis,) = figure.axes
        handles, labels = axis.get_legend_handles_labels()
        shown.append(
            (labels, axis.get_window_extent().height / figure.bbox.height, axis.lines[-1].get_ydata().tolist())
        )

    monkeypatch.setattr(heatmaps_script, "save", look)
    with plotting.plt.rc_context(plotting.STYLE):
        for count in (12, 57):
            rows = [{"subset": f"high_school_subject_{i}", "language": "en", "layer": layer, "n_samples": 9,
                     "value": 0.01 + 0.001 * i + 0.1 * layer} for i in range(count) for layer in range(3)]  # fmt: skip
            heatmaps_script.draw_influence(rows, tmp_path / "x.png")
    assert [len(labels) for labels, *_ in shown] == [12, 2] and all(share > 0.5 for _, share, _ in shown)
    assert shown[1][0] == ["lowest to highest of 57 subsets", "median"]
    assert shown[1][2] == pytest.approx([0.038, 0.138, 0.238])  # subset 28 of 0 to 56


def test_correlations_of_57_subsets_are_colours_and_their_extreme_pairs(tmp_path, monkeypatch):
    """With numbers in the cells and a line for each of 1,596 pairs the figure took 14 GB."""
    shown = []

    def look(figure, path):
        left, middle, right, *_ = figure.axes
        shown.append((figure.get_size_inches(), len(middle.texts), len(right.get_yticks()), right.get_title()))
        plotting.plt.close(figure)

    monkeypatch.setattr(correlations_script, "save", look)
    for count in (3, 20, 57):
        rows = [{"subset_a": f"a{a}", "language_a": "en", "subset_b": f"a{b}", "language_b": "en", "pearson": 0.9,
                 "pearson_off_diagonal": 0.5 + 0.005 * a, "ci_low": 0.4, "ci_high": 0.9, "reliability_a": 0.9,
                 "reliability_b": 0.9} for a in range(count) for b in range(a)]  # fmt: skip
        correlations_script.draw_correlations(rows, "npib", tmp_path / "x.png")
    assert [each[1:3] for each in shown] == [(9, 3), (400, 60), (0, 60)]
    assert shown[0][3].startswith("Every pair") and "30 lowest\nof 1,596 pairs" in shown[2][3]
    assert max(shown[1][0]) < 25 and max(shown[2][0]) < 40


def test_correlations_near_one_are_told_apart(tmp_path, monkeypatch):
    """Of cosines of a real model every cell was "1.00 [1.00, 1.00] ceiling 1.00", and the pairs' axis went to 1.02."""
    drawn = []
    monkeypatch.setattr(correlations_script, "save", lambda figure, _: drawn.append(figure))
    row = {"subset_a": "a", "language_a": "en", "subset_b": "b", "language_b": "en", "pearson": 0.9971,
           "pearson_off_diagonal": 0.9966, "ci_low": 0.9957, "ci_high": 0.9974, "reliability_a": 0.9999,
           "reliability_b": 0.9999}  # fmt: skip
    correlations_script.draw_correlations([row], "cosine", tmp_path / "x.png")
    left, middle, right = drawn[0].axes
    assert "0.9971" in {text.get_text() for text in left.texts}
    assert "0.9966\n[0.9957, 0.9974]\nceiling 0.9999" in {text.get_text() for text in middle.texts}
    low, high = right.get_xlim()
    assert 1 < high < 1 + 0.2 * (1 - low)
    text = "\n".join(correlations_script.describe([row], "cosine"))
    assert "| 0.9966 | [0.9957, 0.9974] | 0.9999 | 0.9999 | 0.9999 | 0.9967 |" in text
    plotting.plt.close("all")


@pytest.mark.parametrize("known", [{}, {"ci_low": 0.4, "ci_high": 0.9}, {"reliability_a": 0.9, "reliability_b": 0.9}])
def test_titles_of_correlations_name_what_is_known(tmp_path, monkeypatch, known):
    """Of imported matrices there are no intervals and no ceilings."""
    titles = []
    monkeypatch.setattr(
        correlations_script, "save", lambda figure, _: titles.extend(axis.get_title() for axis in figure.axes[1:3])
    )
    unknown = dict.fromkeys(("ci_low", "ci_high", "reliability_a", "reliability_b"))
    row = {"subset_a": "a", "language_a": "x", "subset_b": "b", "language_b": "x", "pearson": 0.9}
    correlations_script.draw_correlations(
        [row | {"pearson_off_diagonal": 0.7} | unknown | known], "imported", tmp_path / "x.png"
    )
    plotting.plt.close("all")
    assert [("95 %" in titles[0]), ("ceiling" in titles[0]), ("ceiling" in titles[1])] == [
        "ci_low" in known, "reliability_a" in known, "reliability_a" in known,
    ]  # fmt: skip


def test_one_triangle_is_enough(tmp_path):
    whole = make_run(tmp_path / "whole", layers=6, subsets=2)
    half = make_run(tmp_path / "half", layers=6, subsets=2, one_side=True)
    for a, b in zip(*(heatmaps_script.views_of(r.read("similarity").to_pylist()) for r in (whole, half)), strict=True):
        np.testing.assert_array_equal(a.value, b.value)
        np.testing.assert_array_equal(b.null_p95, b.null_p95.T)
        assert np.isnan(b.value).sum() == (11 if b.name == "legal en" else 0)


def test_one_figure_a_measure(tmp_path):
    run = make_run(tmp_path / "run", layers=4, subsets=2, measures=(("npib", "diffusion"), ("cka", "none")))
    for script in (heatmaps_script, correlations_script):
        assert script.main([run.path_of()]) == 0
    pictures = {path.name for path in Path(run.path_of("figures")).iterdir() if path.suffix == ".png"}
    assert pictures == {"heatmaps-npib-diffusion.png", "heatmaps-cka-none.png", "block_influence.png",
                        "correlations-npib.png", "correlations-cka.png"}  # fmt: skip


def test_more_than_five_subsets_need_a_second_band(tmp_path):
    run = make_run(tmp_path / "run", layers=4, subsets=6)
    views = heatmaps_script.views_of(run.read("similarity").to_pylist())
    with plotting.plt.rc_context(plotting.STYLE):
        path = heatmaps_script.draw_matrices(views, "npib", "diffusion", tmp_path / "bands.png")
    assert png_size(path)[1] > 1200


def test_long_names_of_subsets_do_not_run_into_the_next_panels(tmp_path, monkeypatch):
    boxes = []

    def look(figure, path):
        figure.draw_without_rendering()
        boxes.extend(axis._left_title.get_window_extent() for axis in figure.axes if axis.get_title("left"))
        return path

    monkeypatch.setattr(heatmaps_script, "save", look)
    names = {"language": "imported", "measure": "m", "embedding": "m", "n_samples": 0, "null_mean": None}
    rows = [
        names | {"subset": f"high_school_government_and_politics{k}", "layer_i": i, "layer_j": j, "value": 0.1 * i + j,
                 "null_p95": None, "ci_low": None, "ci_high": None, "note": None}
        for k in range(6) for i in range(3) for j in range(3)
    ]  # fmt: skip
    with plotting.plt.rc_context(plotting.STYLE):
        heatmaps_script.draw_matrices(heatmaps_script.views_of(rows), "m", "m", tmp_path / "x.png")
    assert len(boxes) == 6 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_foreign_matrices_have_no_null(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, "import-similarity")
    values = np.random.default_rng(0).uniform(0, 1, (2, 5, 5))
    names = {"language": "imported", "measure": "imported", "embedding": "imported", "n_samples": 0}
    run.replace("similarity", [
        {**names, "subset": f"s{k}", "layer_i": i, "layer_j": j, "value": value}
        for (k, i, j), value in np.ndenumerate(values)
    ])  # fmt: skip
    assert heatmaps_script.main([run.path_of()]) == 0
    text = Path(run.path_of("figures"), "heatmaps.md").read_text()
    off = values[1][~np.eye(5, dtype=bool)].mean()
    row = table_of(text, "## imported")[2]
    assert row[:5] == ["s1", "–", f"{off:.3f}", "–", "–"]
    width, height = png_size(Path(run.path_of("figures"), "heatmaps.png"))
    assert height < width  # one row of panels


def test_correlation_table_and_ceilings(run, figures):
    text = (figures / "correlations.md").read_text()
    header, *lines = table_of(text, "## npib")
    stored = {
        f"{row['subset_a']} {row['language_a']} – {row['subset_b']} {row['language_b']}": row
        for row in run.read("similarity_correlation").to_pylist()
    }
    assert {line[0] for line in lines} == set(stored) and len(lines) == 10
    values = [float(line[3]) for line in lines]
    assert values == sorted(values, reverse=True)
    for line in lines:
        cells, row = dict(zip(header, line, strict=True)), stored[line[0]]
        assert cells["Pearson"] == f"{row['pearson']:.4f}"
        assert cells["95 % interval"] == f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
        if row["reliability_a"] is None:
            assert line[0].startswith("cs en") and cells["ceiling"] == cells["off-diagonal / ceiling"] == "–"
        else:
            ceiling = math.sqrt(row["reliability_a"] * row["reliability_b"])
            assert cells["ceiling"] == f"{ceiling:.4f}"
            assert cells["off-diagonal / ceiling"] == f"{row['pearson_off_diagonal'] / ceiling:.4f}"
    means = table_of(text, "## npib", nth=1)
    mean = np.mean([row["pearson_off_diagonal"] for row in stored.values()])
    assert means[1][:2] == ["subsets in one language", "10"] and means[1][3] == f"{mean:.4f}"


def correlation(a, b, **values):
    row = dict(zip(("subset_a", "language_a", "subset_b", "language_b"), (*a, *b), strict=True))
    given = {"pearson_off_diagonal": 0.5, "reliability_a": 0.9, "reliability_b": 0.4}
    return {**row, **given, **values}


def test_pairs_count_once_and_have_a_kind():
    a, b, c = ("x", "en"), ("y", "en"), ("x", "es")
    rows = [correlation(a, c), correlation(a, a), correlation(a, b, pearson_off_diagonal=0.7), correlation(b, a),
            correlation(b, c, reliability_a=-0.1)]  # fmt: skip
    pairs = correlations_script.pairs_of(rows)
    kinds = ["subsets in one language", "languages of one subset", "both differ"]
    assert [correlations_script.kind_of(row) for row in pairs] == kinds
    assert [correlation_ceiling(row) for row in pairs] == [pytest.approx(0.6), pytest.approx(0.6), None]
    assert correlations_script.names_of(rows) == ["x en", "y en", "x es"]
    imported = dict.fromkeys(("language_a", "language_b"), IMPORTED)
    assert correlations_script.kind_of(rows[0] | imported) == "imported matrices"


def test_layers_of_the_maps():
    assert embeddings_script.chosen_layers(list(range(28)), None) == [0, 5, 11, 16, 22, 27]
    assert embeddings_script.chosen_layers([0, 1, 2], None) == [0, 1, 2]
    assert embeddings_script.chosen_layers(list(range(28)), "27,3,3") == [27, 3]
    with pytest.raises(RunError, match="no embeddings of layer 30; there are 0 to 27"):
        embeddings_script.chosen_layers(list(range(28)), "3,30")
    with pytest.raises(RunError, match="is 'a', but should be whole numbers"):
        embeddings_script.chosen_layers([0], "a")


def test_maps_of_asked_layers_without_samples(tmp_path, capsys):
    run = make_run(tmp_path / "run", layers=4, subsets=2)
    run.replace("samples", [])
    run.replace("degeneracy", [])
    assert embeddings_script.main([run.path_of(), "--layers", "0,3"]) == 0
    assert embeddings_script.main([run.path_of(), "--layers", "4"]) == 2
    assert "no embeddings of layer 4" in capsys.readouterr().err
    points = embeddings_script.points_of(run.read("embeddings").to_pylist())
    stored = {
        (row["layer"], row["sample"], row["coordinate"]): row["value"]
        for row in run.read("embeddings").to_pylist()
        if row["subset"] == "legal"
    }
    samples, xy = points["legal en", 3]
    np.testing.assert_array_equal(xy[:, 1], [stored[3, sample, 1] for sample in samples])


def test_many_subjects_are_coloured_by_category():
    common = {"subset": "all", "language": "en"}
    samples = [{**common, "sample": i, "subject": subject} for i, subject in enumerate(CATEGORY_OF)]
    groups = embeddings_script.groups_of(samples)["all en"]
    assert Counter(groups.values()) == {"stem": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert set(embeddings_script.groups_of(samples[:8])["all en"].values()) == {
        sample["subject"].replace("_", " ") for sample in samples[:8]
    }


def test_sensitivity(tmp_path):
    run = make_sensitivity(tmp_path / "run")
    assert sensitivity_script.main([run.path_of()]) == 0
    folder = Path(run.path_of("figures"))
    assert min(png_size(folder / "sensitivity.png")) > 400
    rows = run.read("sensitivity").to_pylist()
    header, *lines = table_of((folder / "sensitivity.md").read_text(), "# Sensitivity")
    for line in lines:
        cells = dict(zip(header, line, strict=True))
        mine = [row for row in rows if [row["parameter"], row["setting"]] == line[:2]]
        known = [row for row in mine if row["pearson_off_diagonal"] is not None]
        assert cells["undefined"] == str(len(mine) - len(known))
        if known:
            assert cells["off-diagonal"] == f"{np.mean([row['pearson_off_diagonal'] for row in known]):.3f}"
            assert cells["plan overlap"] == f"{np.mean([row['plan_overlap'] for row in known]):.3f}"
            alphas = [row["alpha_max_difference"] for row in known if row["alpha_max_difference"] is not None]
            assert cells["largest α difference"] == (f"{max(alphas):.3f}" if alphas else "–")
            assert bool(alphas) == (line[0] != "threshold")
        else:
            assert cells["off-diagonal"] == "–"
        assert (cells[""] == "reference") == (line[:2] in (["sigma", "median"], ["dimensions", "2"]))
    assert [line[1] for line in lines if line[0] == "sigma"] == ["2", "8", "32", "median"]
    header, *every = table_of((folder / "sensitivity.md").read_text(), "## Every subset")
    assert header[:3] == ["subset", "parameter", "setting"] and len(every) == len(rows) - 3
    for line, row in zip(every, [row for row in rows if row["parameter"] != "reference"], strict=True):
        assert line[:3] == [f"{row['subset']} {row['language']}", row["parameter"], row["setting"]]
        found = [row[key] for key in ("pearson", "pearson_off_diagonal", "plan_overlap", "alpha_max_difference")]
        assert line[3:7] == ["–" if value is None else f"{value:.3f}" for value in found]
    assert "- math en: one pair undefined" in (folder / "sensitivity.md").read_text()


def test_sensitivity_of_57_subsets_has_a_legend_that_fits(tmp_path, monkeypatch):
    shown = []

    def look(figure, path):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        texts = [text.get_text() for text in legend.get_texts()]
        shown.append((texts, box.x0 >= 0 and box.x1 <= figure.bbox.width))

    monkeypatch.setattr(sensitivity_script, "save", look)
    with plotting.plt.rc_context(plotting.STYLE):
        for count in (12, 57):
            rows = [{"subset": f"high_school_subject_{i}", "language": "en", "parameter": "sigma", "setting": setting,
                     "reference": False, "pearson_off_diagonal": 0.01 * i, "plan_overlap": 0.5,
                     "alpha_max_difference": None} for i in range(count) for setting in ("1.0", "2.0")]  # fmt: skip
            sensitivity_script.draw_settings(rows, tmp_path / "x.png")
    assert [fits for _, fits in shown] == [True, True] and len(shown[0][0]) == 12
    assert shown[1][0] == ["one of 57 subsets", "median"]


@pytest.mark.parametrize(
    ("script", "message"),
    [(heatmaps_script, "table similarity, needed for the heat maps; raymerge similarity CONFIG"),
     (correlations_script, "(a run of one subset has none); raymerge similarity CONFIG"),
     (embeddings_script, "table embeddings, needed for maps of the samples; raymerge similarity CONFIG"),
     (sensitivity_script, "table sensitivity, needed for the dependence on settings; raymerge sensitivity CONFIG")],
)  # fmt: skip
def test_missing_tables_are_named_with_the_command(tmp_path, capsys, script, message):
    RunDirectory.open(tmp_path / "run", {}, "similarity")
    assert script.main([str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "figures").exists()


def test_ticks_of_layers_stay_few():
    figure, axis = plotting.plt.subplots()
    for count in (1, 6, 28, 36, 200):
        plotting.show_layers(axis, list(range(count)))
        assert 1 <= len(axis.get_xticks()) <= 8 and axis.get_xticks()[0] == 0
    plotting.plt.close(figure)


def keep_figures(monkeypatch, script) -> dict:
    """Name -> figure of all that `script` saves from now on."""
    drawn = {}

    def keep(figure, path):
        drawn[path.name] = figure
        plotting.plt.close(figure)
        return path

    monkeypatch.setattr(script, "save", keep)
    return drawn


def test_maps_show_the_matrices_of_their_subsets(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", layers=5, subsets=3)
    rows = [row | {"value": row["value"] and row["value"] + 0.01 * row["layer_j"]}  # no longer symmetric
            for row in run.read("similarity").to_pylist()]  # fmt: skip
    drawn = keep_figures(monkeypatch, heatmaps_script)
    views = heatmaps_script.views_of(rows, run.read("degeneracy").to_pylist())
    heatmaps_script.draw_matrices(views, "npib", "diffusion", tmp_path / "x.png")
    heatmaps_script.draw_influence(run.read("block_influence").to_pylist(), tmp_path / "i.png")
    axes = [axis for axis in drawn["x.png"].axes if axis.images and axis.get_label() != "<colorbar>"]
    values, nulls = axes[:3], axes[3:]
    assert [axis.get_title("left") or axis.get_title() for axis in values] == ["medical en", "legal en", "math en"]
    for above, below, (subset, _) in zip(values, nulls, SUBSETS, strict=False):
        mine = [row for row in rows if row["subset"] == subset]
        (image,), (grey, colours) = above.images, below.images
        sound = []
        for row in mine:
            at = row["layer_i"], row["layer_j"]
            if row["value"] is None:
                assert all(np.ma.getmaskarray(each.get_array())[at] for each in (image, colours, grey))
                continue
            assert image.get_array()[at] == pytest.approx(row["value"])
            gap = row["value"] - row["null_p95"]
            assert not grey.get_array().filled(1)[at] == (gap <= 0)
            assert colours.get_array().filled(0)[at] == pytest.approx(max(gap, 0))
            if at[0] != at[1] and min(at) > 1:
                sound.append(gap > 0)
        title = below.get_title("left") or below.get_title()
        assert title == f"{100 * np.mean(sound):.0f} % of pairs above null"
        assert image.get_clim() == values[0].images[0].get_clim() and colours.get_clim()[0] == 0
        assert len({axis.images[-1].get_clim() for axis in nulls}) == 1
    many = [view._replace(notes=[f"note {n}" for n in range(8)]) for view in views[:1]]
    told = heatmaps_script.describe(many, "npib", "diffusion")[-1].splitlines()
    assert told[2:] == [*(f"- medical en: note {n}" for n in range(5)), "- medical en: 3 more"]
    (axis,) = drawn["i.png"].axes
    stored = run.read("block_influence").to_pylist()
    for line, (subset, language) in zip(axis.lines, SUBSETS, strict=False):
        assert line.get_label() == f"{subset} {language} (n = 20)"
        mine = [row for row in stored if row["subset"] == subset]
        assert list(line.get_ydata()) == [row["value"] for row in mine] and list(line.get_xdata()) == list(range(5))


def test_correlations_are_drawn_at_their_pairs(tmp_path, monkeypatch):
    """An undefined one, of a constant matrix, left all pairs in an order that was none."""
    a, b, c, d = SUBSETS[:4]
    known = {"ci_low": 0.3, "ci_high": 0.8}
    rows = [correlation(a, b, pearson=0.95, pearson_off_diagonal=0.5, **known),
            correlation(a, d, pearson=math.nan, pearson_off_diagonal=math.nan, ci_low=None, ci_high=None),
            correlation(c, b, pearson=0.85, pearson_off_diagonal=0.9, ci_low=0.7, ci_high=0.99),
            correlation(a, c, pearson=0.9, pearson_off_diagonal=0.2, ci_low=None, ci_high=None,
                        reliability_a=None)]  # fmt: skip
    drawn = keep_figures(monkeypatch, correlations_script)
    correlations_script.draw_correlations(rows, "npib", tmp_path / "x.png")
    published, off, pairs, *_ = drawn["x.png"].axes
    names = [label.get_text() for label in published.get_yticklabels()]
    assert names == [label.get_text() for label in published.get_xticklabels()]
    for axis, column, digits in ((published, "pearson", 3), (off, "pearson_off_diagonal", 2)):
        (image,) = axis.images
        texts = {text.get_position(): text.get_text().split("\n") for text in axis.texts}
        for row in rows:
            i, j = (names.index(f"{row[f'subset_{side}']} en") for side in "ab")
            for at in ((i, j), (j, i)):
                if math.isnan(row[column]):
                    assert image.get_array().mask[at] and at[::-1] not in texts
                    continue
                assert image.get_array()[at] == row[column]
                first, *rest = texts[at[::-1]]
                assert first == f"{row[column]:.{digits}f}"
                told = [f"[{row['ci_low']:.2f}, {row['ci_high']:.2f}]"] if row["ci_low"] else []
                told += ["ceiling 0.60"] if row["reliability_a"] else []
                assert rest == (told if axis is off else [])
    labels = [label.get_text() for label in pairs.get_yticklabels()]
    assert labels == ["math en – legal en", "medical en – legal en", "medical en – math en"]
    dots = [line.get_data() for line in pairs.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [(x[0], y[0]) for x, y in dots] == [(0.9, 0), (0.5, 1), (0.2, 2)]
    bars = [segment.tolist() for line in pairs.collections for segment in line.get_segments()]
    assert bars == [[[0.7, 0.0], [0.99, 0.0]], [[0.3, 1.0], [0.8, 1.0]]]
    ceilings = [line.get_data() for line in pairs.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert [(pytest.approx(x[0]), y[0]) for x, y in ceilings] == [(0.6, 0), (0.6, 1)]
    table, means = (table_of("\n\n".join(correlations_script.describe(rows, "npib")), "## npib", nth) for nth in (0, 1))
    assert [row[3] for row in table[1:]] == ["0.9000", "0.5000", "0.2000", "–"]
    assert table[1][4:] == ["[0.7000, 0.9900]", "0.9000", "0.4000", "0.6000", "1.5000"]
    ratio = np.mean([0.9 / 0.6, 0.5 / 0.6])
    assert means[1:] == [["subsets in one language", "3", "0.9000", f"{1.6 / 3:.4f}", f"{ratio:.4f}"]]


def test_samples_are_drawn_where_their_layers_embed_them(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", layers=3, subsets=2, samples=6)
    drawn = keep_figures(monkeypatch, embeddings_script)
    embeddings_script.draw(run, tmp_path, "0,2")
    axes = drawn["embeddings.png"].axes
    stored = {(row["subset"], row["layer"], row["sample"], row["coordinate"]): row["value"]
              for row in run.read("embeddings").to_pylist()}  # fmt: skip
    subjects = {(row["subset"], row["sample"]): row["subject"] for row in run.read("samples").to_pylist()}
    for axis, (subset, layer) in zip(axes, [("medical", 0), ("medical", 2), ("legal", 0), ("legal", 2)], strict=True):
        assert axis.get_title() + axis.get_title("left") == f"layer {layer}"
        rank = 5.5 if layer < 2 else 4.2
        assert axis.get_xlabel() == f"effective rank {rank:.1f} of 6"
        assert len(axis.lines) == 2
        for line in axis.lines:
            mine = [n for n in range(6) if subjects[subset, n].replace("_", " ") == line.get_label()]
            assert len(mine) == 3
            for coordinate, found in enumerate(line.get_data()):
                assert list(found) == [stored[subset, layer, n, coordinate] for n in mine]
    assert [axis.get_ylabel() for axis in axes] == ["medical en", "", "legal en", ""]


def test_settings_are_drawn_in_their_lines(tmp_path, monkeypatch):
    run = make_sensitivity(tmp_path / "run", subsets=3)
    drawn = keep_figures(monkeypatch, sensitivity_script)
    sensitivity_script.draw(run, tmp_path)
    rows = [row for row in run.read("sensitivity").to_pylist() if row["parameter"] != "reference"]
    axes = drawn["sensitivity.png"].axes
    columns = ["pearson_off_diagonal", "plan_overlap", "alpha_max_difference"]
    ticks = {round(at, 6): label.get_text() for at, label in zip(axes[0].get_yticks(), axes[0].get_yticklabels(),
                                                                 strict=True)}  # fmt: skip
    assert axes[0].yaxis_inverted() and [text for text in ticks.values() if "reference" in text] == [
        "median  (reference)", "2  (reference)",
    ]  # fmt: skip
    heads = {text.get_text().replace(" ", "_"): text.xy[1] for text in axes[0].texts if text.get_text() != "undefined"
             and "undefined" not in text.get_text()}  # fmt: skip
    parameters = list(dict.fromkeys(row["parameter"] for row in rows))
    assert list(heads) == parameters and list(heads.values()) == sorted(heads.values())
    place = {}  # (parameter, setting) -> height
    for at, text in ticks.items():
        parameter = max((name for name in heads if heads[name] < at), key=heads.get)
        place[parameter, text.removesuffix("  (reference)")] = at
    assert len(place) == len({(row["parameter"], row["setting"]) for row in rows})
    for axis, column in zip(axes, columns, strict=True):
        marks = {line.get_label(): line for line in axis.lines if len(line.get_xdata()) > 2}
        for subset, language in SUBSETS[:3]:
            mine = [row for row in rows if row["subset"] == subset and row[column] is not None]
            x, y = marks[f"{subset} {language}"].get_data()
            assert list(x) == [row[column] for row in mine]
            np.testing.assert_allclose(y, [place[row["parameter"], row["setting"]] for row in mine], atol=0.26)
        notes = [text for text in axis.texts if "undefined" in text.get_text()]
        said = {round(text.get_position()[1], 6): text.get_text() for text in notes}
        some, every = (round(place[key], 6) for key in (("samples", "20"), ("measure", "gaussian")))
        assert said == {some: "1 of 3\nundefined", every: "undefined"}


if __name__ == "__main__":  # python tests/test_analysis_similarity.py DIR: runs to look at
    folder = Path(sys.argv[1])
    make_run(folder / "tasks")
    SUBJECTS["medical"] += " anatomy virology nutrition college_medicine medical_genetics human_aging sociology"
    make_run(folder / "all", subsets=8, samples=57, layers=36, measures=(("npib", "diffusion"), ("cka", "none")))
    make_run(folder / "pair", subsets=2, layers=16)
    make_sensitivity(folder / "sensitivity")
    for name in ("tasks", "all", "pair"):
        for script in (heatmaps_script, correlations_script, embeddings_script):
            script.main([str(folder / name)])
    sensitivity_script.main([str(folder / "sensitivity")])
