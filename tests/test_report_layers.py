"""What a page says of similarities between layers, and of what they depend on."""

import math
from dataclasses import replace

import numpy as np
import pytest
from report_runs import (
    as_dicts,
    blocks,
    imported_run,
    marks,
    search_run,
    sensitivity_run,
    similarity_run,
    tips,
)

from raymerge import summary
from raymerge.report import (
    layers,
)
from raymerge.report.build import run_sections
from raymerge.report.content import (
    Facts,
    Figure,
    Table,
    Text,
)


def test_a_similarity_tells_of_its_own_examples_and_languages(tmp_path):
    def questions(run):
        (facts,) = blocks(run_sections(run, heading=None)[-1:], Facts)
        return {fact.term: fact.value for fact in facts.facts}["Questions"]

    assert questions(similarity_run(tmp_path / "s")) == "/data, language en"
    assert questions(search_run(tmp_path / "r")) == "/data, language en, 5-shot"


def test_similarity_is_held_against_noise(tmp_path):
    run = similarity_run(tmp_path / "s", subsets=("medical", "law", "math"), warnings=["too few samples"])
    (structure, agreement), notices = blocks([layers.answer(run)], Text), run_sections(run, heading=None)[0].blocks
    # 1 / (1 + distance) is above 0.3 up to a distance of 2: 9 of the 14 defined pairs of six layers
    assert structure.text.startswith(f"In {100 * 9 / 14:.0f} % of all pairs of layers, over 3 subsets")
    # intervals reach the ceiling sqrt(0.96 * 0.94) = 0.950 in the first pair alone
    assert "In 1 of 3 pairs" in agreement.text and "medical and math" in agreement.text.split("ceiling: ")[1]
    assert notices[0].text == "too few samples."
    heat, influence = blocks([layers.maps(run)], Figure)
    rows = as_dicts(heat.rows)
    assert len(rows) == 3 * 36 and len(heat.views) == 3
    (undefined,) = [r for r in rows if r["subset"] == "law (en)" and (r["layer_i"], r["layer_j"]) == (0, 5)]
    assert undefined["value"] is None and undefined["above"] == "" and undefined["note"] == "no entropy"
    assert len(influence.rows.values) == 18
    assert "does not mean that dropping the layer costs little" in influence.caption


def test_correlations_near_one_are_told_apart(tmp_path):
    """Cosines of a real model: "at 1.00 to 1.00", "Highest: 1.00. Lowest: 1.00", and five ticks named 1.00."""
    run = similarity_run(tmp_path / "s", subsets=("medical", "law", "math"))
    rows = run.read("similarity_correlation").drop_columns("run_id").to_pylist()
    near = {"ci_low": 0.9, "ci_high": 0.99999, "reliability_a": 1.0, "reliability_b": 1.0}
    near = [row | near | {"pearson_off_diagonal": r} for row, r in zip(rows, (0.9999, 0.9966, 0.998), strict=True)]
    run.replace("similarity_correlation", near)
    _, agreement = blocks([layers.answer(run)], Text)
    assert "correlate at 0.9966 to 0.9999 off" in agreement.text
    (figure,) = blocks([layers.correlations(run)], Figure)
    assert "law, 0.9999. Lowest:" in figure.caption and ", 0.9966." in figure.caption
    for layer in figure.views[0].spec["layer"]:
        assert "format" not in layer["encoding"]["x"]["axis"]  # of two decimals


def test_of_many_subsets_some_are_drawn_and_chance_is_reckoned_with(tmp_path):
    """14 subsets make 91 pairs: two-sided intervals of equal patterns leave some below their ceiling."""
    run = similarity_run(tmp_path / "s", subsets=[f"subject_{i}" for i in range(14)])
    rows = run.read("similarity_correlation").to_pylist()
    for number, row in enumerate(rows):  # the ceiling is sqrt(0.96 * 0.94)
        row |= {"pearson_off_diagonal": 0.5, "ci_low": 0.3, "ci_high": 0.9 - number / 1000 if number < 6 else 0.97}
    run.replace("similarity_correlation", [{k: v for k, v in row.items() if k != "run_id"} for row in rows])
    said = layers.in_words(run)[1]
    assert "In 85 of 91 pairs" in said and "(by chance alone up to 2 pairs would be): " in said
    pair = "{0[subset_a]} and {0[subset_b]}"
    assert f"{pair.format(rows[5])}, {pair.format(rows[4])}" in said and said.endswith(" and 2 more.")
    heat, influence = blocks([layers.maps(run)], Figure)
    first = [f"subject_{i} (en)" for i in range(12)]
    for figure in (heat, influence):
        assert list(dict.fromkeys(row["subset"] for row in as_dicts(figure.rows))) == first
        assert "Only the first 12 of 14 subsets are here" in figure.caption
    assert len(heat.views) == 12
    (pairs,) = blocks([layers.correlations(run)], Figure)
    assert as_dicts(pairs.rows)[0]["pair"].count("en") == 0  # the only language
    assert "Only the 30 highest and the 30 lowest of 91 are drawn" in pairs.caption


def test_degenerate_maps_are_said_to_say_nothing(tmp_path):
    run = similarity_run(tmp_path / "s")  # 40 samples, six layers

    def degenerate(**ranks):
        run.replace("degeneracy", [
            {"subset": subset, "language": "en", "layer": layer, "effective_rank": rank, "off_diagonal_mass": 0.1}
            for subset, mine in ranks.items() for layer, rank in enumerate(mine)
        ])  # fmt: skip
        return layers.answer(run), layers.maps(run).blocks[0]

    section, figure = degenerate(medical=[39.0] * 6, law=[1.0] * 6)
    (structure,) = blocks([section], Text)  # nothing of how the subsets' matrices agree
    assert structure.text.endswith("the maps say nothing about the model.") and "more than noise" not in structure.text
    assert {r["above"] for r in as_dicts(figure.rows)} == {"no", ""}
    assert [row[5:] for row in blocks([section], Table)[0].cells] == [("–", "1", "6")] * 2

    section, figure = degenerate(medical=[20.0] * 6, law=[38.0, 20.0, 20.0, 20.0, 20.0, 36.1])
    structure, _ = blocks([section], Text)
    # of the four layers of law that are left, 5 of 6 pairs are up to 2 apart; of medical's pairs 9 of 14
    assert structure.text.startswith(f"In {100 * 14 / 20:.0f} % of the pairs of layers")
    pairs = [row for row in run.read("similarity").to_pylist() if row["layer_i"] < row["layer_j"]]
    pairs = [row for row in pairs if row["subset"] != "law" or not {0, 5} & {row["layer_i"], row["layer_j"]}]
    sound = [row for row in pairs if row["value"] is not None]
    assert len(sound) == 20
    mean, unrelated = (np.mean([row[name] for row in sound]) for name in ("value", "null_mean"))
    assert f"On average it is {mean:.3f}, that of unrelated layers {unrelated:.3f}." in structure.text
    assert (
        "noise that layers and subsets share, count too: 2 layers of law (en)."
        in layers.correlations(run).blocks[0].caption
    )
    assert "degenerate, so that its similarities are noise, do not count (2 layers of law (en))" in structure.text
    assert [row[5:] for row in blocks([section], Table)[0].cells] == [("64", "1", "0"), ("83", "1", "2")]
    (cell,) = [r for r in as_dicts(figure.rows) if r["subset"] == "law (en)" and (r["layer_i"], r["layer_j"]) == (0, 1)]
    assert (cell["above"], cell["note"]) == ("no", "degenerate: noise")


def test_what_subsets_do_not_share_stays_in_their_rows(tmp_path):
    run = similarity_run(tmp_path / "s")
    rows = run.read("similarity").drop_columns("run_id").to_pylist()
    run.replace("similarity", [row | ({"measure": "cka", "language": "es"} if row["subset"] == "law" else {})
                               for row in rows])  # fmt: skip
    table, _ = blocks([layers.answer(run)], Table)
    assert table.header[:4] == ("subset", "language", "measure", "prompts") and table.words == (0, 1, 2)
    assert [row[:4] for row in table.cells] == [("medical", "en", "gaussian", "40"), ("law", "es", "cka", "40")]
    assert "(embedding diffusion). gaussian: " in table.caption and ". cka: how alike" in table.caption


def test_half_a_matrix_stands_for_both():
    cell = {"subset": "s", "language": "en", "value": 0.5}
    both = layers._both_halves([cell | {"layer_i": 0, "layer_j": 1}, cell | {"layer_i": 1, "layer_j": 1}])
    assert [(row["layer_i"], row["layer_j"]) for row in both] == [(0, 1), (1, 1), (1, 0)]


def test_sensitivity_names_the_setting_that_matters(tmp_path):
    (section,) = [s for s in run_sections(sensitivity_run(tmp_path / "s"), heading=None) if s.title == "The answer"]
    assert "The matrix of sigma = 8.0 agrees least with the reference (r = 0.20)" in blocks([section], Text)[0].text
    (figure,) = blocks([section], Figure)
    assert len(figure.rows.values) == 3 and not figure.title.endswith("?")  # the page puts a full stop after it
    assert "Settings without a mark are undefined" in figure.caption  # their lines were empty, and nothing said why


def test_merges_that_stay_the_same_are_those_of_changed_settings(tmp_path):
    run = sensitivity_run(tmp_path / "s")
    (row, *_) = run.read("sensitivity").to_pylist()
    unchanged = [("seed", "0", 1.0, None), ("threshold", "0.2", 1.0, "79 merges")]  # these would make 55 % a 78 %
    run.append("sensitivity", [
        row | {"parameter": parameter, "setting": setting, "plan_overlap": same, "reference": False, "note": note}
        for parameter, setting, same, note in unchanged
    ])  # fmt: skip
    run.config["similarity"]["seed"] = 0
    (text, *_) = blocks(run_sections(run, heading=None), Text)
    assert text.text.endswith("over all changed settings, 55 % of the merges stay the same.")


def test_notes_of_a_setting_are_those_of_all_subsets(tmp_path):
    run = sensitivity_run(tmp_path / "s")
    (row, *_) = run.read("sensitivity").to_pylist()
    why = "cosine needs pooling last or mean: sequences have no one state per sample"
    found = [("threshold", "0.2", "79 merges"), ("threshold", "0.2", "61 merges"), ("measure", "cosine", why),
             ("dimensions", "5", why), ("dimensions", "5", None)]  # fmt: skip
    run.replace("sensitivity", [
        row | {"parameter": parameter, "setting": setting, "reference": False, "note": note}
        for parameter, setting, note in found
    ])  # fmt: skip
    _, cells = summary.sensitivity_table(run)
    assert [row[-1] for row in cells] == ["61 to 79 merges", why, f"1 of 2 subsets: {why}"]


def test_undefined_settings_are_spoken_of_where_there_are_some(tmp_path):
    run = sensitivity_run(tmp_path / "s")
    rows = [row for row in run.read("sensitivity").to_pylist() if row["pearson_off_diagonal"] is not None]
    run.replace("sensitivity", rows)
    (figure,) = blocks(run_sections(run, heading=None), Figure)
    assert figure.caption.endswith("off the diagonal.")


def test_captions_of_imported_matrices_speak_of_no_noise_that_is_not_known(tmp_path):
    runs = {"imported": imported_run(tmp_path / "run", ["a", "b", "c"]), "own": similarity_run(tmp_path / "own")}
    captions = {
        name: " ".join(figure.caption for figure in blocks(run_sections(run, heading=None), Figure))
        for name, run in runs.items()
    }
    for words in ("White dot", "ceiling", "95 %"):
        assert words in captions["own"] and words not in captions["imported"]


def test_the_table_of_imported_matrices_has_no_columns_of_what_is_not_known(tmp_path):
    """Above it stood "(language imported, measure imported, embedding imported)", in it four columns of dashes, and
    noise was explained that nothing is known of."""
    table, *_ = blocks([layers.answer(imported_run(tmp_path / "run", ["a", "b", "c"]))], Table)
    assert table.caption == "Mean similarity off the diagonal, by subset of prompts"
    assert table.header == ("subset", "mean", "neighbouring layers", "undefined") and table.words == (0,)
    assert [row[0] for row in table.cells] == ["a", "b", "c"] and "–" not in table.cells[0]
    run = similarity_run(tmp_path / "own")
    own, *_ = blocks([layers.answer(run)], Table)
    assert "prompts (language en, measure gaussian, embedding diffusion). gaussian: " in own.caption
    assert "By chance 5 % of pairs lie above noise" in own.caption and "unrelated layers" in own.header
    rows = run.read("similarity").drop_columns("run_id").to_pylist()
    run.replace("similarity", [row | {"measure": "npib"} for row in rows])
    # It was called the mutual information of the maps, which gaussian is: it is of their coordinates, two by two.
    own, *_ = blocks([layers.answer(run)], Table)
    assert ". npib: the mean mutual information of a coordinate of one layer's map and one of the other" in own.caption


@pytest.mark.parametrize(("least", "log"), [(1e-6, True), (0.0, False), (-2e-16, False)])
def test_block_influence_is_drawn_and_named_on_a_logarithmic_axis_where_all_of_it_is_positive(tmp_path, least, log):
    """0 is a layer that changes nothing, and rounding can leave less."""
    run = similarity_run(tmp_path / "run")
    stored = run.read("block_influence").to_pylist()
    run.replace("block_influence", [row | ({"value": least} if row["layer"] == 2 else {}) for row in stored])
    _, influence = blocks([layers.maps(run)], Figure)
    axis = influence.views[0].spec["layer"][0]["encoding"]["y"]
    assert (axis["scale"].get("type") == "log") == ("(log scale)" in axis["axis"]["title"]) == log
    assert log or axis["scale"]["zero"] is False  # values near each other are told apart
    assert f"Least: layer 2 on medical (en), {least:.3g}." in influence.caption


def test_what_is_said_of_similarity_is_computed_from_the_rows(tmp_path):
    run = similarity_run(tmp_path / "run", subsets=("medical", "law", "math"))
    rng = np.random.default_rng(0)
    stored = [row if row["value"] is None else row | {"null_mean": row["value"] - 0.2, "null_p95": rng.uniform(0, 0.6)}
              for row in run.read("similarity").drop_columns("run_id").to_pylist()]  # fmt: skip
    run.replace("similarity", stored)
    found = [row | {"pearson": 0.97 - 0.01 * i, "reliability_a": 0.9 - 0.1 * i} for i, row in
             enumerate(run.read("similarity_correlation").drop_columns("run_id").to_pylist())]  # fmt: skip
    found.append(found[0] | {"subset_b": "law", "language_b": "es", "ci_low": None, "ci_high": None,
                             "reliability_b": None, "pearson_off_diagonal": 0.1})  # fmt: skip
    constant = found[0] | {"subset_b": "math", "language_b": "es", "pearson_off_diagonal": math.nan,
                           "ci_low": None, "ci_high": None}  # fmt: skip
    run.replace("similarity_correlation", [*found[:2], constant, *found[2:]])
    every, pairs = blocks([layers.answer(run)], Table)
    assert every.caption.startswith(
        "Mean similarity off the diagonal, by subset of prompts (language en, measure gaussian, embedding diffusion). "
        "gaussian: the mutual information that"
    )
    assert pairs.cells[2][2] == "nan"
    pairs = replace(pairs, cells=pairs.cells[:2] + pairs.cells[3:])
    for name, cells in zip(("medical", "law", "math"), every.cells, strict=True):
        mine = [row for row in stored if row["subset"] == name and row["layer_i"] < row["layer_j"]]
        known = [row for row in mine if row["value"] is not None]
        assert dict(zip(every.header, cells, strict=True)) == {
            "subset": name, "prompts": "40",
            "mean": f"{np.mean([row['value'] for row in known]):.3f}",
            "neighbouring layers": f"{np.mean([r['value'] for r in known if r['layer_j'] - r['layer_i'] == 1]):.3f}",
            "unrelated layers": f"{np.mean([row['null_mean'] for row in known]):.3f}",
            "pairs above noise, %": f"{100 * np.mean([row['value'] > row['null_p95'] for row in known]):.0f}",
            "undefined": "1", "degenerate layers": "–",
        }  # fmt: skip
    for row, cells in zip(found, pairs.cells, strict=True):
        ceiling = None if row["reliability_b"] is None else (row["reliability_a"] * row["reliability_b"]) ** 0.5
        assert cells == (
            f"{row['subset_a']}/en – {row['subset_b']}/{row['language_b']}", f"{row['pearson']:.4f}",
            f"{row['pearson_off_diagonal']:.4f}",
            "–" if row["ci_low"] is None else f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]",
            "–" if ceiling is None else f"{ceiling:.4f}",
        )  # fmt: skip
    heat, influence = blocks([layers.maps(run)], Figure)
    values = {(row["subset"], row["layer_i"], row["layer_j"]): row for row in stored}
    for row in as_dicts(heat.rows):
        name = row["subset"].removesuffix(" (en)")
        cell = values[name, row["layer_i"], row["layer_j"]]
        assert all(row[key] == cell[key] for key in ("value", "null_p95", "ci_low", "ci_high"))
        assert row["above"] == ("" if cell["value"] is None else "yes" if cell["value"] > cell["null_p95"] else "no")
        edges = row["layer_j"] - 0.5, row["layer_i"] - 0.5
        assert (row["left"], row["bottom"]) == edges and row["right"] > row["left"] and row["top"] > row["bottom"]
    for view, name in zip(heat.views, ("medical", "law", "math"), strict=True):
        boxes = {"x": "left", "x2": "right", "y": "bottom", "y2": "top"}
        assert marks(view) == [
            ("rect", boxes),
            ("rect", boxes | {"color": "value"}),
            ("point", {"x": "layer_j", "y": "layer_i"}),
        ]
        filters = [[each["filter"] for each in layer["transform"]] for layer in view.spec["layer"]]
        own = {"field": "subset", "equal": f"{name} (en)"}
        assert filters == [[own], [own, "isValid(datum.value)"], [own, {"field": "above", "equal": "no"}]]
        across, down = (view.spec["layer"][0]["encoding"][channel]["scale"] for channel in "xy")
        assert (
            across["domain"] == down["domain"] == [-0.5, 5.5]
            and view.spec["layer"][1]["encoding"]["color"]["scale"]["clamp"]
        )
        assert tips(view) == [
            ("layer", "layer_i"), ("and layer", "layer_j"), ("similarity", "value"), ("95 % from", "ci_low"),
            ("to", "ci_high"), ("95th percentile of unrelated layers", "null_p95"), ("note", "note"),
        ]  # fmt: skip
        assert view.spec["layer"][0]["encoding"]["y"]["scale"]["reverse"] and view.title == f"{name} (en)"
        off = [row["value"] for row in stored if row["subset"] == name and row["layer_i"] != row["layer_j"]
               and row["value"] is not None]  # fmt: skip
        near = [row["value"] for row in stored if row["subset"] == name and abs(row["layer_i"] - row["layer_j"]) == 1]
        noise = sum(row["value"] <= row["null_p95"] for row in stored if row["subset"] == name
                    and row["layer_i"] != row["layer_j"] and row["value"] is not None)  # fmt: skip
        assert (
            f"mean {np.mean(off):.2f} off the diagonal, {np.mean(near):.2f} between neighbours; {noise // 2} pair"
            in (view.description)
        )
        assert view.spec["layer"][1]["encoding"]["color"]["scale"]["domain"] == [0, pytest.approx(0.52, abs=0.011)]
    assert "subset" in tips(influence.views[0])[0] and marks(influence.views[0]) == [
        ("line", {"x": "layer", "y": "value", "color": "subset"}),
        ("point", {"x": "layer", "y": "value", "color": "subset", "shape": "subset"}),
    ]
    assert influence.views[0].spec["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"
    assert f"Least: layer 5 on medical (en), {0.5 / 6:.3g}." in influence.caption
    (figure,) = blocks([layers.correlations(run)], Figure)
    wanted = sorted(found, key=lambda row: -row["pearson_off_diagonal"])
    drawn = as_dicts(figure.rows)
    assert [row["r"] for row in drawn] == [row["pearson_off_diagonal"] for row in wanted]
    for row, of in zip(drawn, wanted, strict=True):
        assert row["pair"] == f"{of['subset_a']} (en) – {of['subset_b']} ({of['language_b']})"
        assert (row["low"], row["high"], row["pearson"]) == (of["ci_low"], of["ci_high"], of["pearson"])
        ceiling = None if of["reliability_b"] is None else (of["reliability_a"] * of["reliability_b"]) ** 0.5
        assert row["ceiling"] == (None if ceiling is None else pytest.approx(ceiling))
    first, last = drawn[0], drawn[-1]
    assert f"Highest: {first['pair']}, {first['r']:.2f}. Lowest: {last['pair']}, {last['r']:.2f}." in figure.caption
    assert marks(figure.views[0]) == [
        ("rule", {"y": "pair", "x": "low", "x2": "high", "color": "role"}),
        ("point", {"y": "pair", "x": "r", "color": "role", "shape": "role"}),
        ("tick", {"y": "pair", "x": "ceiling"}),
    ]


def test_a_scale_of_colours_has_the_ends_of_what_is_off_the_diagonal():
    cells = [{"layer_i": i, "layer_j": j, "value": value, "null_p95": 9.0} for i, j, value in
             ((0, 0, 3.7), (1, 1, 3.5), (0, 1, 0.9), (1, 0, 0.8))]  # fmt: skip
    low, high = layers.colour_domain(cells)
    assert 0.8 <= low < high <= 0.9 or (low == 0 and 0.85 < high <= 0.9)
    assert layers.colour_domain(cells[:2])[1] == pytest.approx(3.7, abs=0.01)
    assert layers.colour_domain([cell | {"value": None} for cell in cells]) == (0, 1)
    assert layers.subset_name({"subset": "s", "language": "imported"}) == "s"


def test_settings_are_drawn_with_their_agreement(tmp_path):
    run = sensitivity_run(tmp_path / "run")
    stored = [row | {"plan_overlap": row["plan_overlap"] and 0.5 * row["plan_overlap"],
                     "pearson": row["pearson"] and 0.3 + 0.5 * row["pearson"]}
              for row in run.read("sensitivity").drop_columns("run_id").to_pylist()]  # fmt: skip
    run.replace("sensitivity", stored)
    section = layers.sensitivity(run)
    (figure,), (every,) = blocks([section], Figure), blocks([section], Table)
    changed = [row for row in stored if not row["reference"]]
    for row, of, cells in zip(as_dicts(figure.rows), changed, every.cells, strict=True):
        r, same, moves = (of[key] for key in ("pearson_off_diagonal", "plan_overlap", "alpha_max_difference"))
        assert row["setting"] == f"{of['parameter']} = {of['setting']}" and row["subset"] == "all (en)"
        assert (row["r"], row["low"], row["high"], row["same"], row["moves"]) == (r, r, r, same, moves)
        if r is not None:
            assert cells == (of["parameter"], of["setting"], f"{r:.3f}", f"{100 * same:.0f}", f"{moves:.3f}", "")
    assert tips(figure.views[0]) == [
        ("setting", "setting"), ("subset", "subset"), ("r off the diagonal", "r"), ("same merges", "same"),
        ("largest alpha change", "moves"), ("note", "note"),
    ]  # fmt: skip
    run.replace("sensitivity", [row for row in stored if row["pearson_off_diagonal"] is None])
    assert not blocks([layers.sensitivity(run)], Figure)
