"""The compression script on synthetic sweeps: curves, stability, paired differences, context."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color

from raymerge.tables import RunDirectory, RunError

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))  # the scripts are not part of the package; run as scripts they find each other

import compression as compression_script  # noqa: E402
import compression_panels  # noqa: E402
import compression_points  # noqa: E402
import context_panels  # noqa: E402
import plotting  # noqa: E402

METHODS = {  # (method, alignment, norms): accuracy lost and log-perplexity gained a layer
    ("drop", "none", "keep"): (0.010, 0.22),
    ("before_last", "none", "keep"): (0.028, 0.55),
    ("block_influence", "none", "keep"): (0.016, 0.18),
    ("fixed_0.62", "none", "keep"): (0.012, 0.25),
    ("fixed_0.62", "neurons", "fold"): (0.011, 0.24),
    ("similarity_ratio", "none", "keep"): (0.012, 0.26),
    ("similarity_ratio", "rows", "keep"): (0.020, 0.45),
    ("most_similar", "none", "keep"): (0.017, 0.20),
}
MERGES = (1, 4, 8, 11, 13, 15)


def make_run(
    path,
    *,
    layers=28,
    merges=MERGES,
    questions=1000,
    languages=("en",),
    context=True,
    text=True,
    seed=0,
    methods=METHODS,
    model="synthetic",
):
    """A sweep as the command writes it, with plausible numbers; most_similar of one merge is block_influence's plan."""
    rng = np.random.default_rng(seed)
    run = RunDirectory.open(path, {"model": {"path": model}, "data": {"report_split": "test"}}, "sweep")
    sweep = [{"plan_id": "base", "merges": 0, "method": "base", "alignment": "none", "norms": "keep"}]
    for k in merges:
        for i, (method, alignment, norms) in enumerate(methods):
            plan = "block_influence2_1" if (method, k) == ("most_similar", 1) else f"{method}{i}_{k}"
            sweep.append({"plan_id": plan, "merges": k, "method": method, "alignment": alignment, "norms": norms})
    accuracy, perplexity, costs, points, comparisons = [], [], [], [], []
    done = set()
    for row in sweep:
        plan, k = row["plan_id"], row["merges"]
        if plan in done:
            continue
        done.add(plan)
        lost, gained = methods.get((row["method"], row["alignment"], row["norms"]), (0, 0))
        cliff = 0.3 if k >= 15 else 0.0
        for language in languages:
            p = max(0.24, 0.66 - lost * k - cliff - 0.1 * (language != "en") + rng.normal(0, 0.01))
            for subject, shift in (("_micro", 0), ("_macro", 0.007), ("anatomy", -0.02)):
                accuracy.append({
                    "plan_id": plan, "split": "test", "language": language, "subject": subject, "n": questions,
                    "correct": round(p * questions), "accuracy": p + shift,
                    "standard_error": math.sqrt(p * (1 - p) / questions), "ci_low": p + shift - 0.03,
                    "ci_high": p + shift + 0.04, "nll": 1.5 - p,
                })  # fmt: skip
        accuracy.append({**accuracy[-3], "split": "validation", "accuracy": 0.99})
        nll = 2.3 + gained * k
        targets = (("text", nll), ("question", nll / 2)) if text else (("question", nll),)
        for target, value in targets:
            perplexity.append({"plan_id": plan, "target": target, "tokens": 4000, "nll": value,
                               "perplexity": math.exp(value)})  # fmt: skip
        costs.append({"plan_id": plan, "layers": layers - k, "layers_removed": k, "bytes": 2,
                      "parameters": 1000 - 25 * k, "parameters_removed": 25 * k})  # fmt: skip
        if row["method"] not in ("base", "drop"):
            sides = plan, f"drop0_{k}"
            for measure, difference in (("accuracy", 0.01 * rng.normal()), ("answer_nll", 5.0)):
                a, b, sign = (*sides, 1) if k != 4 else (*sides[::-1], -1)  # either side may be the drop
                comparisons.append({
                    "plan_a": a, "plan_b": b, "split": "test", "measure": measure, "difference": sign * difference,
                    "ci_low": sign * difference - 0.02, "ci_high": sign * difference + 0.03,
                    "p_value": (p := float(rng.uniform()) ** 8), "p_holm": min(1.0, 3 * p), "test": "mcnemar",
                })  # fmt: skip
        if context and k in (0, 4, 13):
            for bucket in (0, 128, 256, 512, 768, 1024, 1536):
                points.append({"plan_id": plan, "measure": "position_nll", "bucket": bucket, "n": 5000,
                               "value": nll - 0.1 * math.log1p(bucket / 100)})  # fmt: skip
            for bucket in (64, 256, 1024, 4096):
                p = max(1, round(50 * (1 - 0.08 * k - bucket / 9000))) / 50
                points.append({"plan_id": plan, "measure": "retrieval", "bucket": bucket, "n": 50, "value": p,
                               "standard_error": math.sqrt(p * (1 - p) / 49)})  # fmt: skip
    tables = {"sweep": sweep, "accuracy": accuracy, "perplexity": perplexity, "costs": costs, "context": points,
              "comparisons": comparisons}  # fmt: skip
    for name, rows in tables.items():
        run.replace(name, rows)
    run.write_manifest(command=["synthetic"])
    return run


def png_size(path: Path) -> tuple[int, int]:
    """(width, height); reading fails for half a file."""
    height, width = matplotlib.image.imread(path).shape[:2]
    return width, height


def table_of(text: str, heading: str) -> list[list[str]]:
    """Cells of the first Markdown table after a heading, without its rule."""
    block = next(block for block in text[text.index(heading) :].split("\n\n") if block.startswith("|"))
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
    return [rows[0], *rows[2:]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("sweep") / "run")


@pytest.fixture(scope="module")
def folder(run):
    assert compression_script.main([run.path_of()]) == 0
    return Path(run.path_of("figures"))


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "compression.md").read_text()


def test_figures_are_whole(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["compression.md", "compression.png", "context.png"]
    assert min(png_size(folder / "compression.png")) > 700 and min(png_size(folder / "context.png")) > 600


def test_runs_on_several_texts_stand_side_by_side(run, tmp_path, capsys):
    assert compression_script.main([run.path_of(), "--out", str(tmp_path), "--beside", run.path_of()]) == 0
    assert str(tmp_path / "perplexity.png") in capsys.readouterr().out
    wide, high = png_size(tmp_path / "perplexity.png")
    assert wide > 1.5 * high > 600
    assert compression_script.main([run.path_of(), "--out", str(tmp_path), "--beside", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_every_point_is_in_the_table(run, text):
    header, *lines = table_of(text, "## test split")
    sweep = run.read("sweep").to_pylist()
    assert len(lines) == len(sweep) == 1 + len(METHODS) * len(MERGES)
    plans = {(row["method"], row["alignment"], row["norms"], str(row["merges"])): row["plan_id"] for row in sweep}
    accuracy = {
        (row["plan_id"], row["subject"]): row for row in run.read("accuracy").to_pylist() if row["split"] == "test"
    }
    texts = {row["plan_id"]: row["nll"] for row in run.read("perplexity").to_pylist() if row["target"] == "text"}
    costs = {row["plan_id"]: row for row in run.read("costs").to_pylist()}
    for line in lines:
        cells, plan = dict(zip(header, line, strict=True)), plans[tuple(line[:4])]
        for name in ("micro", "macro"):
            row = accuracy[plan, f"_{name}"]
            limits = f"[{row['ci_low']:.4f}, {row['ci_high']:.4f}]"
            assert cells[f"{name} accuracy"] == f"{row['accuracy']:.4f} {limits}"
        assert cells["answer NLL"] == f"{accuracy[plan, '_micro']['nll']:.3f}"
        assert float(cells["text perplexity"].replace(",", "")) == pytest.approx(math.exp(texts[plan]), rel=5e-4)
        assert cells["layers removed %"] == f"{100 * int(line[3]) / 28:.2f}"
        assert cells["parameters removed %"] == f"{costs[plan]['parameters_removed'] / 10:.2f}"


def test_differences_to_drop_have_the_sign_of_the_method(run, text):
    header, *lines = table_of(text, "## test split")
    stored = {
        tuple(sorted((row["plan_a"], row["plan_b"]))): row
        for row in run.read("comparisons").to_pylist()
        if row["measure"] == "accuracy"
    }
    plans = {
        (row["method"], row["alignment"], row["norms"], str(row["merges"])): row["plan_id"]
        for row in run.read("sweep").to_pylist()
    }
    for line in lines:
        cells, plan = dict(zip(header, line, strict=True)), plans[tuple(line[:4])]
        if line[0] in ("base", "drop"):
            assert cells["difference to drop"] == cells["p"] == cells["p (Holm)"] == "–"
            continue
        row = stored[tuple(sorted((plan, f"drop0_{line[3]}")))]
        assert (row["plan_a"] == plan) == (line[3] != "4")
        sign = 1 if row["plan_a"] == plan else -1
        low, high = sorted((sign * row["ci_low"], sign * row["ci_high"]))
        assert cells["difference to drop"] == f"{sign * row['difference']:+.4f} [{low:.4f}, {high:.4f}]"
        assert float(cells["p"]) == pytest.approx(row["p_value"], abs=5e-4)
        assert float(cells["p (Holm)"]) == pytest.approx(row["p_holm"], abs=5e-4)


def figure_of(monkeypatch, run, *options) -> object:
    """The figure compression.png of a run, before it is saved."""
    drawn = {}

    def keep(figure, path):
        drawn[path.name] = figure
        compression_panels.plt.close(figure)
        return path

    monkeypatch.setattr(compression_panels, "save", keep)
    assert compression_script.main([run.path_of(), *options]) == 0
    return drawn["compression.png"]


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("model", "layers", "options", "shown"),
    [
        ("synthetic", 28, (), False),
        ("synthetic", 28, ("--published",), True),
        ("meta-llama/Meta-Llama-3-8B", 32, (), True),
        ("/hub/models--NousResearch--Meta-Llama-3-8B/snapshots/315b20096dc7", 32, (), True),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 32, (), False),
        ("meta-llama/Llama-3.1-8B", 32, (), False),
        ("/models/Meta-Llama-3-8B/merged", 21, (), False),
    ],
)
def test_published_points_stand_beside_their_own_model_alone(tmp_path, monkeypatch, model, layers, options, shown):
    """They stood beside any model's points, as if these should reach them."""
    run = make_run(tmp_path / "run", layers=layers, merges=(1, 4), context=False, model=model)
    figure = figure_of(monkeypatch, run, *options)
    assert len(figure.axes) == (9 if shown else 6)  # a row for each of three treatments
    assert ("published MKA, Meta-Llama-3-8B" in legend_of(figure)) == shown
    assert ("published points" in figure.legends[0].get_title().get_text()) == shown
    assert any("Meta-Llama-3-8B" in axis.get_title("left") for axis in figure.axes) == shown
    text = Path(run.path_of("figures"), "compression.md").read_text()
    assert ("### Published points" in text) == shown == ("MKA (arXiv" in text)


def test_bars_are_the_intervals_of_the_tables(run, monkeypatch):
    """They were standard errors, a third as long as those of every other figure of accuracies."""
    figure = figure_of(monkeypatch, run)
    axis = figure.axes[0]
    rows = {row["plan_id"]: row for row in run.read("accuracy").to_pylist()
            if (row["split"], row["subject"]) == ("test", "_micro")}  # fmt: skip
    drawn = {tuple(np.round(bar[:, 1], 6)) for line in axis.collections for bar in line.get_segments()}
    wanted = {(round(row["ci_low"], 6), round(row["ci_high"], 6)) for plan, row in rows.items() if "drop0" in plan}
    assert wanted <= drawn
    assert "95 % intervals" in figure.legends[0].get_title().get_text()
    words = [figure.legends[0].get_title().get_text(), *(axis.get_title("left") for axis in figure.axes)]
    assert not any("standard error" in word for word in words)


def test_methods_have_the_names_of_tables_terminal_and_page(run, monkeypatch):
    """before_last was "before last" in figures alone, and the unmerged model had another name in each."""
    names = legend_of(figure_of(monkeypatch, run))
    assert names[:3] == ["drop", "before_last", "block_influence"] and names[-2:] == ["base (unmerged)", "chance"]


@pytest.fixture(scope="module")
def published_text(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("sweep") / "run", layers=32, model="meta-llama/Meta-Llama-3-8B")
    assert compression_script.main([run.path_of()]) == 0
    return run, Path(run.path_of("figures"), "compression.md").read_text()


def test_published_points_and_their_stability(published_text):
    text = published_text[1]
    with (ANALYSIS / "published" / "compression.csv").open() as file:
        published = list(csv.DictReader(file))
    assert all(row["source"] and row["model"] == "Meta-Llama-3-8B" for row in published)
    for row in published:  # the sources round, and call 11 layers both 34.38 and 34.375
        assert float(row["compression_percent"]) == pytest.approx(100 * int(row["layers"]) / 32, abs=0.006)
    by_layers: dict[tuple[str, str], set[str]] = {}
    for row in published:
        by_layers.setdefault((row["method"], row["layers"]), set()).add(row["accuracy"])
    assert all(len(values) == 1 for values in by_layers.values())  # tables that repeat a point agree
    lines = {line[0]: line[1:] for line in table_of(text, "### Stability")[1:]}
    aligned = lines["aligned (Beyond Naive Merging, Table 8)"]
    mka = lines["MKA (arXiv 2406.16330, as in Table 8 of Beyond Naive Merging)"]
    assert aligned == ["1, 4, 11, 13, 15", "0.1485", "0.3761", "13 → 15"]
    assert mka == ["1, 4, 11, 13, 15", "0.1353", "0.3342", "13 → 15"]


def test_stability_of_our_methods(published_text):
    run, text = published_text
    lines = {line[0]: line[1:] for line in table_of(text, "### Stability")[1:]}
    accuracy = {
        row["plan_id"]: row["accuracy"]
        for row in run.read("accuracy").to_pylist()
        if (row["split"], row["subject"]) == ("test", "_micro")
    }
    for name, merges in (("drop", (1, 4, 11, 13, 15)), ("drop (all points)", MERGES)):
        values = np.array([accuracy[f"drop0_{k}"] for k in merges])
        largest = -np.diff(values).min()
        assert lines[name][:3] == [", ".join(map(str, merges)), f"{values.std():.4f}", f"{largest:.4f}"]
    assert {"fixed_0.62", "fixed_0.62, neurons aligned, norms fold", "most_similar"} <= set(lines)


def test_stability_without_published_points_is_of_all_points(text):
    lines = {line[0]: line[1:] for line in table_of(text, "### Stability")[1:]}
    assert lines["drop"][0] == ", ".join(map(str, MERGES)) and not any("all points" in name for name in lines)


def test_stability_from_closed_forms():
    assert compression_script.stability([0.6, 0.6, 0.6]) == (pytest.approx(0), 0)
    assert compression_script.stability([0.5, 0.7, 0.4, 0.8]) == (pytest.approx(math.sqrt(0.025)), pytest.approx(0.3))
    assert compression_script.stability([0.4, 0.5]) == (pytest.approx(0.05), pytest.approx(-0.1))
    assert compression_script.stability([0.4]) == (0.0, None)


def test_context(run, text):
    rows = run.read("context").to_pylist()
    header, *lines = table_of(text, "### position_nll")
    assert header[1:] == ["0", "128", "256", "512", "768", "1024", "1536"]
    base = {row["bucket"]: row for row in rows if (row["plan_id"], row["measure"]) == ("base", "position_nll")}
    assert lines[0] == ["base", *[f"{base[int(b)]['value']:.3f}" for b in header[1:]]]
    assert len(lines) == 1 + 2 * len(METHODS)
    _, *lines = table_of(text, "### retrieval")
    assert (
        lines[0][0] == "base" and lines[0][1] == "1.000 [0.929, 1.000]"
    )  # Wilson's of 50 of 50: 50 / (50 + 1.96 ** 2)
    assert "Accuracy on synthetic key-value prompts" in text
    shown = context_panels.few_plans(rows, run.read("sweep").to_pylist())
    assert shown[0] == "base" and len(shown) == 9 and all(plan.endswith("_13") for plan in shown[1:])
    many = [{**row, "plan_id": f"{row['plan_id']}+", "alignment": "rows"} for row in run.read("sweep").to_pylist()]
    more = [{**row, "plan_id": f"{row['plan_id']}+"} for row in rows]
    plain = context_panels.few_plans(rows + more, run.read("sweep").to_pylist() + many)
    assert plain[0] == "base" and len(plain) == 7 and not any(plan.endswith("+") for plan in plain)


def test_losses_by_position_have_no_bars_in_the_legend_either(run, tmp_path, monkeypatch):
    monkeypatch.setattr(context_panels, "save", lambda figure, path: figure.axes)
    losses, retrieval = context_panels.draw_context(
        run.read("context").to_pylist(), {}, run.read("sweep").to_pylist(), tmp_path / "x.png"
    )
    bars = [{series.has_yerr for series in axis.containers} for axis in (losses, retrieval)]
    assert bars == [{False}, {True}] and list(losses.lines[0].get_xdata()) == list(range(7))


def test_a_plan_under_several_methods_has_all_its_names(run):
    sweep = run.read("sweep").to_pylist()
    names = compression_points.plan_names(sweep)
    assert names["block_influence2_1"] == "block_influence, K = 1 = most_similar, K = 1" and names["base"] == "base"


def test_styles_of_methods_differ():
    styles = [tuple(plotting.curve_style(i).values()) for i in range(28)]
    assert len(set(styles)) == 28 and not any(colour == "#000000" for colour, _, _ in styles)


def test_several_languages_without_context_or_text(tmp_path):
    run = make_run(tmp_path / "run", merges=(2, 3), languages=("en", "es"), context=False, text=False)
    run.replace("comparisons", [])
    assert compression_script.main([run.path_of()]) == 0
    folder = Path(run.path_of("figures"))
    names = ["compression-en.png", "compression-es.png", "compression.md"]
    assert sorted(path.name for path in folder.iterdir()) == names
    text = (folder / "compression.md").read_text()
    assert "language en" in text and "language es" in text and "Context" not in text
    assert {line[9] for line in table_of(text, "## test split, language es")[1:]} == {"–"}


def test_missing_tables_are_named_with_the_command(tmp_path, capsys):
    run = RunDirectory.open(tmp_path / "run", {}, "sweep")
    for table, why in (("sweep", "the compression curve"), ("accuracy", "the accuracy of the sweep's plans")):
        assert compression_script.main([run.path_of()]) == 2
        assert f"no rows in table {table}, needed for {why}; raymerge sweep CONFIG" in capsys.readouterr().err
        if table == "sweep":
            run.replace(
                "sweep", [{"plan_id": "p", "merges": 1, "method": "drop", "alignment": "none", "norms": "keep"}]
            )
    assert not (tmp_path / "run" / "figures").exists()


def test_an_unfinished_sweep_says_which_costs_are_missing(tmp_path):
    run = make_run(tmp_path / "run", merges=(1,))
    run.replace("costs", [row for row in run.read("costs").to_pylist() if row["plan_id"] != "drop0_1"])
    with pytest.raises(RunError, match="lacks plan drop0_1 and 0 more"):
        compression_script.draw(run, tmp_path)
    whole = make_run(tmp_path / "whole", merges=(1,))
    with pytest.raises(RunError, match="lacks plan drop0_1 and 0 more"):
        compression_script.draw(whole, tmp_path, [run.path_of()])


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (9.3, "9.300"),
        (12.345, "12.35"),
        (31010.4, "31,010"),
        (987654321.0, "987,654,321"),
        (3.2e11, "3.200e+11"),
        (math.inf, "∞"),
        (math.nan, None),
        (None, None),
    ],
)
def test_perplexities_are_written_out(value, written):
    assert plotting.perplexity(value) == written


if __name__ == "__main__":  # python tests/test_analysis_compression.py DIR: runs to look at
    folder = Path(sys.argv[1])
    make_run(folder / "sweep")
    make_run(folder / "small", merges=(2, 5), text=False, layers=8)
    plain = {name: loss for name, loss in METHODS.items() if name[1:] == ("none", "keep")}
    make_run(folder / "plain", methods=plain)
    ratios = {("drop", "none", "keep"): (0.01, 0.22), ("before_last", "none", "keep"): (0.028, 0.55)} | {
        (f"fixed_{ratio}", alignment, norms): (
            0.01 + 0.01 * (0.7 - ratio),
            0.3 - 0.1 * ratio - 0.05 * (norms == "fold"),
        )
        for ratio in (0.4, 0.5, 0.6, 0.62, 0.7)
        for alignment in ("none", "neurons")
        for norms in ("keep", "fold")
    }
    make_run(folder / "default", methods=ratios)
    for name in ("sweep", "small", "plain", "default"):
        compression_script.main([str(folder / name)])


def test_a_ruined_model_leaves_the_figure_so_that_the_others_can_be_told_apart():
    def point(removed, ppl):
        text = None if ppl is None else {"perplexity": ppl, "ci_low": None, "ci_high": None}
        return compression_points.Point("p", "drop", "none", "keep", removed, removed, 8, 0.1, None, None, text, None)

    figure, axis = compression_panels.plt.subplots()
    base, near = point(0, 5.0), point(1, 20.0)
    before = axis.get_ylim()
    assert (
        compression_panels.limit_perplexity(axis, base, [base, near, point(2, None)]) == ""
        and axis.get_ylim() == before
    )
    assert compression_panels.limit_perplexity(axis, None, [near, point(2, 9e4)]) == "" and axis.get_ylim() == before
    assert compression_panels.limit_perplexity(axis, base, [base, near, point(2, 9e4)]) == ", up to 10 × unmerged"
    assert axis.get_ylim() == (4.0, 50.0)
    wide = base._replace(
        text=base.text | {"ci_low": 3.0, "ci_high": 9.0}
    )  # its bar was cut off at 4, as if it ended there
    compression_panels.limit_perplexity(axis, base, [wide, near, point(2, 9e4)])
    assert axis.get_ylim() == (pytest.approx(2.4), 50.0)
    compression_panels.plt.close(figure)


def test_labels_of_cut_perplexities_fit_beside_their_panels(tmp_path, monkeypatch):
    """Of two rows they covered each other, and the upper one left the figure."""
    run = make_run(
        tmp_path / "run",
        methods={("drop", "none", "keep"): (0.01, 0.4)}
        | {("fixed_0.5", a, "keep"): (0.01, 0.4) for a in ("none", "neurons")},
    )
    drawn = []
    monkeypatch.setattr(compression_panels, "save", lambda figure, path: drawn.append(figure) or path)
    with compression_panels.plt.rc_context(plotting.STYLE):
        compression_script.draw(run, tmp_path)
        figure = drawn[0]
        figure.draw_without_rendering()
        labels = [axis.yaxis.label for axis in figure.axes if axis.get_ylabel().startswith("perplexity")]
        assert len(labels) == 2 and all("unmerged" in label.get_text() for label in labels)
        extents = [label.get_window_extent() for label in labels]
    assert extents[0].y1 <= figure.bbox.y1 and extents[0].y0 > extents[1].y1
    compression_panels.plt.close(figure)


def test_a_single_panel_of_perplexities_has_its_whole_legend_and_plain_numbers(run, tmp_path, monkeypatch):
    """Four columns of labels did not fit below one panel, and within a decade the axis said 6 × 10^0."""
    drawn = []
    monkeypatch.setattr(compression_panels, "save", lambda figure, path: drawn.append(figure) or path)
    with compression_panels.plt.rc_context(plotting.STYLE):
        compression_panels.draw_texts([run], tmp_path / "one.png")
        (figure,) = drawn
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        (axis,) = figure.axes
        axis.set_ylim(3.0, 8.0)
        compression_panels.scale_perplexities(axis, None, [])
        figure.draw_without_rendering()
        labels = {label.get_text() for label in axis.get_yticklabels(which="both")} - {""}
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width
        assert labels and all(label.isdigit() for label in labels)
    compression_panels.plt.close(figure)


def errorbars(axis) -> list[tuple[list[float], list[float], list[list[float]], str]]:
    """x, y, ends of the bars and colour of every series that errorbar drew, in order."""
    found = []
    for series in axis.containers:
        line, _, bars = series.lines
        ends = [segment[:, 1].tolist() for each in bars for segment in each.get_segments()]
        x, y = (np.array(each, dtype=float).tolist() for each in line.get_data())
        found.append((x, y, ends, line.get_color()))
    return found


def test_curves_are_drawn_at_the_points_of_their_methods(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", merges=(1, 4, 8), context=False)
    rows = [row | {"ci_low": 0.8 * row["perplexity"], "ci_high": 1.3 * row["perplexity"]}
            for row in run.read("perplexity").to_pylist()]  # fmt: skip
    run.replace("perplexity", rows)
    figure = figure_of(monkeypatch, run, "--published")
    micro = {row["plan_id"]: row for row in run.read("accuracy").to_pylist()
             if (row["split"], row["subject"]) == ("test", "_micro")}  # fmt: skip
    texts = {row["plan_id"]: row for row in rows if row["target"] == "text"}
    sweep = run.read("sweep").to_pylist()
    names = legend_of(figure)
    colours = {
        name: handle.get_color()[0] if isinstance(handle, LineCollection) else handle.get_color()
        for name, handle in zip(names, figure.legends[0].legend_handles, strict=True)
    }
    lines = np.array(figure.axes[:9]).reshape(3, 3)
    shown = {("none", "keep"): 6, ("neurons", "fold"): 5, ("rows", "keep"): 5}  # with four methods of one variant alone
    for (accuracy, perplexity, share), (variant, count) in zip(lines, shown.items(), strict=True):
        assert accuracy.get_title("left") + accuracy.get_title() == f"Alignment {variant[0]}, norms {variant[1]}"
        mine = {}
        for row in sweep:
            single = sum(method == row["method"] for method, *_ in METHODS) == 1
            if row["merges"] and (single or (row["alignment"], row["norms"]) == variant):
                mine.setdefault(row["method"], []).append(row["plan_id"])
        assert len(mine) == count and perplexity.get_yscale() == "log"
        labels = [axis.get_ylabel().split(" (")[0] for axis in (accuracy, perplexity, share)]
        assert labels == ["micro accuracy", "perplexity", "micro accuracy"]
        for axis, table, column in ((accuracy, micro, "accuracy"), (perplexity, texts, "perplexity"),
                                    (share, micro, "accuracy")):  # fmt: skip
            for (method, plans), (x, y, ends, colour) in zip(mine.items(), errorbars(axis), strict=True):
                scale = 100 / 28 if axis is share else 1
                np.testing.assert_allclose(x, scale * np.array([1, 4, 8]), atol=0.16 * scale)
                assert y == [table[plan][column] for plan in plans] and same_color(colour, colours[method])
                np.testing.assert_allclose(ends, [[table[plan]["ci_low"], table[plan]["ci_high"]] for plan in plans])
        for axis, levels in ((accuracy, [0.25, micro["base"]["accuracy"]]), (perplexity, [texts["base"]["perplexity"]]),
                             (share, [0.25, micro["base"]["accuracy"]])):  # fmt: skip
            flat = [line.get_ydata()[0] for line in axis.lines if list(line.get_xdata()) == [0, 1]]
            assert flat == levels
        with (ANALYSIS / "published" / "compression.csv").open(encoding="utf-8", newline="") as file:
            cited = {(float(row["compression_percent"]), float(row["accuracy"])) for row in csv.DictReader(file)}
        curves = [line for line in share.lines if line.get_marker() in "*Px" and line.get_marker() != "None"]
        found = {point for line in curves if line.get_color() in ("#000000", "#6B6B6B", "#9A9A9A")
                 for point in zip(*line.get_data(), strict=True)}  # fmt: skip
        assert found and found <= cited
        assert len({x for x, _ in found}) == len({x for x, _ in cited})
    assert "1,000 questions, test split, language en; model of 28 layers" in figure.legends[0].get_title().get_text()


def test_texts_of_several_runs_keep_the_colours_of_their_methods(tmp_path, monkeypatch):
    """A run beside may have other methods, in another order."""
    first = make_run(tmp_path / "a", merges=(1, 2), context=False)
    other = {key: METHODS[key] for key in reversed(METHODS) if key[0] != "before_last"}
    second = make_run(tmp_path / "b", merges=(2, 3), context=False, methods=other)
    drawn = []
    monkeypatch.setattr(compression_panels, "save", lambda figure, path: drawn.append(figure) or path)
    compression_panels.draw_texts([first, second], tmp_path / "x.png")
    (figure,) = drawn
    compression_panels.plt.close(figure)
    colours = {}
    for axis, run, merges in zip(figure.axes, (first, second), ([1, 2], [2, 3]), strict=True):
        texts = {row["plan_id"]: row["perplexity"] for row in run.read("perplexity").to_pylist()
                 if row["target"] == "text"}  # fmt: skip
        lines = {}
        for row in run.read("sweep").to_pylist():
            if row["merges"]:
                lines.setdefault((row["method"], row["alignment"], row["norms"]), []).append(texts[row["plan_id"]])
        series = {tuple(y): (x, colour) for x, y, _, colour in errorbars(axis)}
        assert series.keys() == set(map(tuple, lines.values()))
        for name, values in lines.items():
            x, colour = series[tuple(values)]
            np.testing.assert_allclose(x, merges, atol=0.16)
            assert colours.setdefault(name, colour) == colour
        assert [list(line.get_ydata()) for line in axis.lines if list(line.get_xdata()) == [0, 1]] == [
            [texts["base"]] * 2
        ]  # fmt: skip


def test_context_is_drawn_by_plan_and_bucket(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(context_panels, "save", lambda figure, path: drawn.append(figure) or path)
    rows, sweep = run.read("context").to_pylist(), run.read("sweep").to_pylist()
    names = {row["plan_id"]: f"name of {row['plan_id']}" for row in sweep}
    context_panels.draw_context(rows[::-1], names, sweep, tmp_path / "x.png")
    (figure,) = drawn
    context_panels.plt.close(figure)
    asked = {"position_nll": [0, 128, 256, 512, 768, 1024, 1536], "retrieval": [64, 256, 1024, 4096]}
    for axis, (measure, buckets) in zip(figure.axes, asked.items(), strict=True):
        assert [label.get_text() for label in axis.get_xticklabels()] == [f"{bucket:,}" for bucket in buckets]
        assert len(axis.containers) == 9
        for series in axis.containers:
            label = series.get_label()
            plan = "base" if label == plotting.BASE else label.removeprefix("name of ")
            mine = {row["bucket"]: row for row in rows if (row["plan_id"], row["measure"]) == (plan, measure)}
            line, _, bars = series.lines
            assert list(line.get_ydata()) == [mine[bucket]["value"] for bucket in buckets]
            np.testing.assert_allclose(list(map(float, line.get_xdata())), range(len(buckets)), atol=0.3)
            assert bool(bars) == (measure == "retrieval")
            for bucket, segment in zip(buckets, bars[0].get_segments() if bars else (), strict=False):
                low, high = segment[:, 1]
                p, n, z = mine[bucket]["value"], 50, 1.959964
                centre, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
                wanted = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
                assert [low, high] == pytest.approx(wanted, abs=1e-6)
    levels = [line.get_ydata()[0] for line in figure.axes[1].lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [0.25] and len(figure.axes[0].lines) == 9
    assert figure.legends[0].get_title().get_text() == "9 of the 17 plans measured; compression.md has all"
