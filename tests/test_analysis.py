"""The analysis scripts on synthetic runs: what they write, and what they say when something is missing."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import matplotlib.text
import numpy as np
import pyarrow as pa
import pytest
import report_runs
from sklearn.isotonic import IsotonicRegression

from raymerge.tables import RunDirectory, RunError, derive_accuracy, paired_difference

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))  # the scripts are not part of the package; run as scripts they find each other

import accuracy as accuracy_script  # noqa: E402
import alpha_panels  # noqa: E402
import alphas as alphas_script  # noqa: E402
import plotting  # noqa: E402
import search_panels  # noqa: E402

SUBJECTS = """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
professional_law professional_medicine professional_psychology public_relations security_studies sociology
us_foreign_policy virology world_religions""".split()


RANDOM = "best of 59 random"
"""What the control of random coefficients is called in a made run, of whose 60 such candidates one failed."""


def make_run(
    path, *, layers=16, merges=13, subjects=12, questions=20, candidates=60, languages=("en",),
    objective="micro_accuracy", extra=(), found_is_base=False, seed=0,
):  # fmt: skip
    """A run as the search writes it, with plausible numbers: better plans answer more questions right."""
    rng = np.random.default_rng(seed)
    run = RunDirectory.open(path, {"model": {"path": "synthetic"}, "data": {"report_split": "test"}}, "search")
    run.begin()
    vectors = {
        "base": None,
        "drop": np.ones(merges),
        "before_last": np.zeros(merges),
        "published": np.full(merges, 0.6225),
        "fixed_0.62": np.full(merges, 0.62),
        "random": rng.uniform(0.3, 0.7, merges),
        "found_random": np.clip(rng.normal(0.6, 0.2, merges), 0, 1),
        "found_bayes": np.clip(rng.normal(0.75, 0.15, merges), 0, 1),
        **{name: rng.uniform(0, 1, merges) for name in extra},
    }
    skill = {"base": 0.78, "drop": 0.55, "before_last": 0.27, "random": 0.5, "found_bayes": 0.66}
    perplexity = {"base": 9.3, "drop": 310.0, "before_last": 31010.0}
    ids = {name: f"{i:016x}" for i, name in enumerate(vectors)}
    if found_is_base:
        ids["found_bayes"] = ids["published"]
    plans, coefficients, text, answers = [], [], [], []
    for name, alphas in vectors.items():
        kind = name.split("_0")[0].split("_bayes")[0].split("_random")[0]
        common = {
            "plan_id": ids[name], "name": name, "kind": kind, "selection": "tail", "alignment": "none", "norms": "keep",
        }  # fmt: skip
        ppl = perplexity.get(name, 80.0)
        text.append(
            {"plan_id": ids[name], "target": "text", "tokens": 4000, "nll": float(np.log(ppl)), "perplexity": ppl}
        )
        if alphas is None:
            plans.append(common)
            continue
        rest = 1.0
        kept = layers - 1 - merges
        weight = {}
        for step in range(merges):
            plans.append({**common, "step": step, "into": layers - 2 - step, "remove": layers - 1 - step,
                          "alpha": float(alphas[step])})  # fmt: skip
        for step in reversed(range(merges)):
            weight[layers - 2 - step] = rest * alphas[step]
            rest *= 1 - alphas[step]
        weight[layers - 1] = rest
        coefficients += [
            {"plan_id": ids[name], "kept_layer": kept, "source_layer": layer, "coefficient": float(value)}
            for layer, value in weight.items()
        ]
    hard = dict(zip(SUBJECTS, rng.normal(0, 0.13, len(SUBJECTS)), strict=True))
    for language in languages:
        for subject in SUBJECTS[:subjects]:
            truth, luck = rng.integers(4, size=questions), rng.uniform(size=questions)
            for name in dict.fromkeys(vectors):
                if found_is_base and name == "found_bayes":
                    continue
                p = np.clip(skill.get(name, 0.6) + hard[subject] - 0.1 * (language != "en"), 0.22, 0.97)
                noise = rng.uniform(size=questions)
                right = 0.6 * luck + 0.4 * noise < p
                predicted = np.where(right, truth, np.where(noise < 0.5, 0, (truth + 1) % 4))
                logits = rng.normal(0, 0.5, (questions, 4)).astype(np.float32)
                logits[np.arange(questions), predicted] += 3
                answers += [
                    {"plan_id": ids[name], "split": "test", "language": language, "subject": subject,
                     "question_id": f"{subject}/test/{i}", "content_hash": f"{i:x}", "answer": int(truth[i]),
                     "predicted": int(logits[i].argmax()), "top_is_letter": bool(noise[i] < 0.9),
                     **{f"logit_{c}": logits[i, k] for k, c in enumerate("abcd")}}
                    for i in range(questions)
                ]  # fmt: skip
    lower = objective.endswith("nll")
    for searcher in ("random", "bayes"):
        rows = []
        for i in range(candidates):
            a = rng.uniform(0, 1, merges)
            if searcher == "bayes":
                a = np.clip(0.75 + (a - 0.75) * (0.3 + 0.7 * np.exp(-i / 15)), 0, 1)
            share = round(200 * (0.68 - 0.5 * np.mean((a - 0.75) ** 2)) + rng.normal(0, 2)) / 200
            failed = i == 7
            rows.append({
                "searcher": searcher, "iteration": i, "batch": i // 4, "tune_trial": f"t{i // 4}", "actor": "w0",
                "seed": 0, "plan_id": f"{searcher}{i}", "alphas": a.tolist(), "objective": objective,
                "value": None if failed else (2.4 - 2 * share if lower else share),
                "accuracy": None if failed else share, "nll": None if failed else 2.4 - 2 * share,
                "n_questions": 200, "seconds": 0.1,
                "status": "failed" if failed else "ok", "error": "OutOfMemoryError" if failed else None,
            })  # fmt: skip
        if rows:
            run.append("trials", rows, part=searcher)
    values = {"drop": 0.55, "before_last": 0.3, "published": 0.6, "fixed_0.62": 0.605, "random": 0.52, "base": 0.78}
    if candidates:
        run.append("trials", [
            {"searcher": "controls", "iteration": i, "batch": 0, "tune_trial": "", "actor": "w0", "seed": 0,
             "plan_id": ids[name], "alphas": [], "objective": objective, "value": 2.4 - 2 * v if lower else v,
             "accuracy": v, "nll": 2.4 - 2 * v, "n_questions": 200, "seconds": 0.1, "status": "ok"}
            for i, (name, v) in enumerate(values.items())
        ], part="controls")  # fmt: skip
    run.replace("plans", plans)
    run.replace("coefficients", coefficients)
    run.replace("perplexity", text)
    if answers:
        run.append("answers", answers)
        run.replace("accuracy", derive_accuracy(run.read("answers")))
    run.write_manifest(command=["synthetic"])
    return run


def png_size(path: Path) -> tuple[int, int]:
    """(width, height); reading fails for half a file."""
    height, width = matplotlib.image.imread(path).shape[:2]
    return width, height


def table_of(text: str, heading: str) -> list[list[str]]:
    """Cells of the first Markdown table after a heading, without its rule."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[start:stop]]
    return [rows[0], *rows[2:]]


@pytest.fixture(scope="module")
def k13(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("k13") / "run")


@pytest.fixture(scope="module")
def alphas_text(k13):
    assert alphas_script.main([k13.path_of()]) == 0
    return Path(k13.path_of("figures"), "alphas.md").read_text()


@pytest.fixture(scope="module")
def accuracy_text(k13):
    assert accuracy_script.main([k13.path_of()]) == 0
    return Path(k13.path_of("figures"), "accuracy.md").read_text()


def test_scripts_write_whole_figures_into_the_run(k13, alphas_text, accuracy_text):
    folder = Path(k13.path_of("figures"))
    pictures = sorted(path.name for path in folder.iterdir() if path.suffix == ".png")
    assert pictures == [
        "accuracy.png", "accuracy_by_subject.png", "accuracy_by_subject_2.png", "alpha_distribution.png", "alphas.png",
        "learned_alphas.png", "letters.png", "search_progress.png",
    ]  # fmt: skip
    assert all(min(png_size(folder / name)) > 400 for name in pictures)
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".png") == ["accuracy.md", "alphas.md"]


def test_a_full_disk_leaves_no_half_of_a_text(tmp_path):
    """A real end of a write, beside which the earlier file stays."""
    plotting.save_text(["old"], tmp_path / "x.md")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            plotting.save_text(["new" * 10_000], tmp_path / "x.md")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["x.md"] and (tmp_path / "x.md").read_text() == "old\n"


def test_bars_of_accuracies_are_intervals_also_of_none_and_all_right():
    """A standard error is 0 there: four wrong answers of four looked certain."""
    known = {row["plan_id"]: row for row in derive_accuracy(answers_of({"none": 0, "half": 2, "all": 4}))
             if row["subject"] == "_micro"}  # fmt: skip
    left, right = plotting.interval_bars([known["none"], known["half"], known["all"], {}], scale=100)
    end = 100 * 1.96**2 / (4 + 1.96**2)  # Wilson's, in closed form where none is right
    np.testing.assert_allclose(right[[0, 2, 3]], [end, 0, 0], atol=0.01)
    np.testing.assert_allclose(left[[0, 2, 3]], [0, end, 0], atol=0.01)
    assert left[1] == pytest.approx(right[1]) and 30 < left[1] < 40
    # matplotlib refuses a bar of negative length, which rounding can make of one of none
    rounded = {"accuracy": 0.3, "ci_low": np.nextafter(0.3, 1), "ci_high": np.nextafter(0.3, 0)}
    assert plotting.interval_bars([rounded]).tolist() == [[0], [0]]


def answers_of(right: dict[str, int], n: int = 4):
    """Rows of `answers` of n questions whose answer is A, of which so many are right."""
    rows = [
        {"plan_id": plan, "split": "test", "language": "en", "subject": "law", "question_id": f"law/test/{number}",
         "answer": 0, "predicted": int(number >= count), **{f"logit_{letter}": 0.0 for letter in "abcd"},
         "logsumexp_all": 0.0, "top_is_letter": True, "prompt_nll": None, "prompt_tokens": None}
        for plan, count in right.items()
        for number in range(n)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def test_alphas_by_step_are_the_plans(k13, alphas_text):
    header, *rows = table_of(alphas_text, "## α by merge step")
    names = "drop before_last published fixed_0.62 random found_random found_bayes".split()
    assert header == ["step", "layers", *[RANDOM if name == "random" else name for name in names]]
    assert [row[:2] for row in (rows[0], rows[-1])] == [["0", "15 → 14"], ["12", "3 → 2"]]
    stored = {(row["name"], row["step"]): row["alpha"] for row in k13.read("plans").to_pylist()}
    for step, row in enumerate(rows):
        assert row[2:] == [f"{stored[name, step]:.4f}" for name in names]
    assert "Without merge steps: base." in alphas_text


def test_effective_coefficients_add_up_to_one_per_method(alphas_text):
    _, *rows = table_of(alphas_text, "## Effective coefficients")
    assert [int(row[0]) for row in rows] == list(range(2, 16))
    sums = np.array([row[1:] for row in rows], dtype=float).sum(axis=0)
    np.testing.assert_allclose(sums, 1, atol=0.0015)


def test_layers_without_a_row_weigh_nothing_where_merged_and_one_where_left_alone():
    plans = [
        {"plan_id": "deep", "name": "deep", "matrix": None, "step": 0, "into": 4, "remove": 5, "alpha": 1.0},
        {"plan_id": "deep", "name": "deep", "matrix": None, "step": 1, "into": 3, "remove": 4, "alpha": 1.0},
        {"plan_id": "flat", "name": "flat", "matrix": None, "step": 0, "into": 4, "remove": 5, "alpha": 0.7},
    ]
    plans += [{**plans[-1], "plan_id": "taken", "name": "taken", "alpha": 0.0}]  # layer 5 in the place of layer 4
    rows = [("deep", 3, 3, 1.0), ("flat", 4, 4, 0.7), ("flat", 4, 5, 0.3), ("taken", 4, 5, 1.0)]
    names = ("plan_id", "kept_layer", "source_layer", "coefficient")
    coefficients = [{"matrix": None, **dict(zip(names, row, strict=True))} for row in rows]
    weights, layers = alphas_script.weights_of(plans, coefficients)
    assert layers == [3, 4, 5]
    assert weights == {
        ("deep", None): {3: 1.0, 4: 0.0, 5: 0.0},
        ("flat", None): {3: 1.0, 4: 0.7, 5: 0.3},
        ("taken", None): {3: 1.0, 4: 0.0, 5: 1.0},
    }


def test_search_table_names_the_best_trial(k13, alphas_text):
    header, *rows = table_of(alphas_text, "## Search")
    trials = [row for row in k13.read("trials").to_pylist() if row["status"] == "ok"]
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        best = max(t["value"] for t in trials if t["searcher"] == cells["searcher"])
        assert cells["best value"] == f"{best:.4f}" and cells["failed"] == "1" and cells["candidates"] == "60"
        assert cells["± s.e."] == f"{np.sqrt(best * (1 - best) / 199):.4f}"
        row = max((t for t in trials if t["searcher"] == cells["searcher"]), key=lambda t: (t["value"], -t["nll"]))
        assert cells["found at candidate"] == str(row["iteration"] + 1)
        told = (f"{row['accuracy']:.4f}", f"{row['nll']:.4f}")
        assert cells["questions"] == "200" and (cells["accuracy"], cells["NLL"]) == told
    assert {row[0] for row in rows} == {"bayes", "random"}  # controls are lines, not a search


def trial(iteration, value, nll=None, status="ok", objective="micro_accuracy"):
    return {"iteration": iteration, "value": value, "nll": nll, "status": status, "objective": objective}


def test_best_trial_breaks_ties_by_nll_and_knows_the_direction(tmp_path):
    rows = [trial(0, 0.5, 1.2), trial(1, 0.5, 1.1), trial(2, 0.4, 0.1), trial(3, None, status="failed"),
            trial(4, 0.9, 0.1, status="failed"), trial(5, float("nan"))]  # fmt: skip
    assert search_panels.best_of(rows)["iteration"] == 1
    assert search_panels.best_of([{**row, "objective": "answer_nll"} for row in rows])["iteration"] == 2
    assert search_panels.best_of([trial(0, None, status="failed")]) is None
    loss = trial(0, 0.5, objective="answer_nll") | {"n_questions": 100}  # nats, which have no binomial error
    assert search_panels.standard_error(loss) is None and search_panels.interval_of(loss) is None
    run = RunDirectory.open(tmp_path, {}, "search")
    mixed = [trial(i, 0.1) | {"searcher": "bayes", "batch": -i} for i in (2, 0, 1)]  # batches are stored as they end
    assert [row["iteration"] for row in search_panels.candidates_of(run, mixed)[0]["bayes"]] == [0, 1, 2]


def test_spread_keeps_labels_apart_in_order():
    assert plotting.spread([0.0, 5.0], 1.0) == [0.0, 5.0]
    moved = plotting.spread([1.0, 1.0, 1.1, 1.9, 7.0], 1.0)
    assert np.diff(moved).min() >= 1 - 1e-12 and moved[-1] == 7.0
    assert np.mean(moved[:4]) == pytest.approx(np.mean([1.0, 1.0, 1.1, 1.9]))
    assert plotting.spread([0.0, 0.1, 9.0], 1.0, 0, 9) == [0, 1, 9] and plotting.spread([8.9, 9.0], 1.0, 0, 9) == [8, 9]


def test_spread_labels_are_moved_as_little_as_can_be():
    """The least squares of positions a gap apart are an isotonic regression of what is left without the gaps."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 8, 20):
        values, gap = sorted(rng.uniform(0, 10, count)), 0.7
        steps = gap * np.arange(count)
        best = IsotonicRegression().fit_transform(np.arange(count), np.array(values) - steps) + steps
        assert plotting.spread(values, gap) == pytest.approx(best.tolist())
        within = plotting.spread(values, gap, 2.0, 18.0)
        assert min(within) >= 2 and max(within) <= 18 and np.diff(within).min(initial=gap) >= gap - 1e-9


def test_series_look_different_and_names_of_users_are_in_legends():
    styles = [tuple(plotting.style_of(i).values()) for i in range(56)]
    assert len(set(styles)) == 56 and len({colour for colour, _ in styles[:8]}) == 8
    assert [plotting.entry(name) for name in ("_mine", "mine_")] == [" _mine", "mine_"]


def test_accuracy_table_is_the_stored_one(k13, accuracy_text):
    stored = {(row["plan_id"], row["subject"]): row for row in k13.read("accuracy").to_pylist()}
    ids = {row["name"]: row["plan_id"] for row in k13.read("plans").to_pylist()}
    ids[RANDOM] = ids.pop("random")
    header, *rows = table_of(accuracy_text, "## test split")
    for row in rows[:-1]:
        micro, macro = stored[ids[row[0]], "_micro"], stored[ids[row[0]], "_macro"]
        assert row[1] == "240"
        assert row[2] == f"{micro['accuracy']:.3f} [{micro['ci_low']:.3f}, {micro['ci_high']:.3f}]"
        assert row[3] == f"{macro['accuracy']:.3f} [{macro['ci_low']:.3f}, {macro['ci_high']:.3f}]"
        assert row[5] == f"{micro['nll']:.3f}"
    assert [row[6] for row in rows[:3]] == ["9.300", "310.0", "31,010"]
    subjects = table_of(accuracy_text, "### By subject")
    assert [row[0] for row in subjects[1:3]] == ["micro", "macro"] and len(subjects) == 15
    base = [float(row[2].split()[0]) for row in subjects[3:]]
    assert base == sorted(base, reverse=True)


def test_differences_are_paired(k13, accuracy_text):
    answers = k13.read("answers").to_pylist()
    ids = {row["name"]: row["plan_id"] for row in k13.read("plans").to_pylist()}

    def correct(name):
        mine = [row for row in answers if row["plan_id"] == ids[name]]
        return np.array([row["answer"] == row["predicted"] for row in sorted(mine, key=lambda row: row["question_id"])])

    _, *rows = table_of(accuracy_text, "## test split")
    found = paired_difference(correct("drop"), correct("base"))  # as in table comparisons
    expected = f"{found.difference:+.3f} [{found.ci_low:.3f}, {found.ci_high:.3f}]"
    assert {row[0]: row[4] for row in rows}["drop"] == expected
    assert {row[0]: row[4] for row in rows}["base"] == "–"


def test_letters_and_always_a(k13, accuracy_text):
    answers = k13.read("answers")
    ids = {row["name"]: row["plan_id"] for row in k13.read("plans").to_pylist()}
    mine = [row for row in answers.to_pylist() if row["plan_id"] == ids["before_last"]]
    rows = {row[0]: row[1:] for row in table_of(accuracy_text, "### Letters")[1:]}
    assert rows["before_last"][:4] == [f"{np.mean([r['predicted'] == k for r in mine]):.3f}" for k in range(4)]
    assert rows["before_last"][4] == f"{np.mean([r['top_is_letter'] for r in mine]):.3f}"
    truth = [f"{np.mean([r['answer'] == k for r in mine]):.3f}" for k in range(4)]
    assert rows["right answers"] == [*truth, "–"]
    overview = {row[0]: row for row in table_of(accuracy_text, "## test split")[1:]}
    assert overview["always A"][2].startswith(truth[0])


def test_many_plans_subjects_and_languages(tmp_path):
    run = make_run(tmp_path / "run", layers=28, merges=4, subjects=57, questions=3, candidates=9, seed=1,
                   objective="answer_nll", languages=("en", "es"), found_is_base=True)  # fmt: skip
    out = tmp_path / "out"
    assert alphas_script.main([run.path_of(), "--out", str(out)]) == 0
    assert accuracy_script.main([run.path_of(), "--out", str(out)]) == 0
    assert not Path(run.path_of("figures")).exists()
    assert {"accuracy_en.png", "accuracy_es.png", "letters_es.png"} <= {path.name for path in out.iterdir()}
    assert png_size(out / "accuracy_by_subject_es.png")[1] > 57 * 25  # a line of text is about 20 pixels
    text = (out / "accuracy.md").read_text()
    assert "language en" in text and "language es" in text and "published = found_bayes" in text


def test_a_run_that_has_not_searched_gets_the_first_figure(tmp_path, capsys):
    run = make_run(tmp_path / "run", merges=2, subjects=1, questions=2, candidates=0)
    assert alphas_script.main([run.path_of()]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "alphas.png",
        "learned_alphas.png",
        "alphas.md",
    ]


def test_one_plan_one_question_without_perplexity(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, "evaluate")
    run.replace("plans", [{"plan_id": "p", "name": "model", "kind": "base", "selection": "tail", "alignment": "none",
                           "norms": "keep"}])  # fmt: skip
    run.replace("answers", [{"plan_id": "p", "split": "validation", "language": "fr", "subject": "s",
                             "content_hash": "", "question_id": "s/0", "answer": 1, "predicted": 1,
                             **{f"logit_{c}": 0.0 for c in "abcd"}}])  # fmt: skip
    assert accuracy_script.main([run.path_of()]) == 0
    text = Path(run.path_of("figures"), "accuracy.md").read_text()
    wilson = "1.000 [0.207, 1.000]"  # of one right answer: from 1 / (1 + 1.96 ** 2) on
    assert f"| the model | 1 | {wilson} | {wilson} | – | 1.386 | – | – |" in text


def test_perplexities_of_the_questions_have_their_published_average(tmp_path):
    run = make_run(tmp_path / "run", merges=2, subjects=2, questions=2, candidates=0)
    accuracy_script.main([run.path_of()])
    figures = Path(run.path_of("figures"))
    assert "questions' own tokens" not in (figures / "accuracy.md").read_text()  # not measured
    plans = {row["plan_id"]: row["name"] for row in run.read("plans").to_pylist()}
    names = sorted({row["subject"] for row in run.read("answers").to_pylist()})
    assert len(names) == 2 and len(plans) > 1
    rows = [
        {"plan_id": plan, "target": "question", "subject": subject, "tokens": 9, "nll": 1.0, "perplexity": at + value}
        for at, plan in enumerate(plans) if at != 1  # the second plan's are not there yet
        for subject, value in {None: 9.0, names[0]: 2.0, names[1]: 30000.0}.items()
    ]  # fmt: skip
    run.append("perplexity", rows, part="q")
    accuracy_script.main([run.path_of()])
    header, *cells = table_of((figures / "accuracy.md").read_text(), "### Perplexity of the questions' own tokens")
    found = {row[0]: row[1 + next(i for i, name in enumerate(header[1:]) if name == plans[next(iter(plans))])]
             for row in cells}  # fmt: skip
    read = {"all questions": "9.000", "mean of subjects": "15,001", names[0]: "2.000", names[1]: "30,000"}
    assert found == read and set(cells[1]) >= {"–", "15,001"}


def test_a_perplexity_that_overflows_is_infinite_not_missing(tmp_path):
    run = make_run(tmp_path / "run", merges=2, subjects=1, questions=2, candidates=0)
    rows = run.read("perplexity").to_pylist()
    run.replace("perplexity", [row | {"nll": 800.0, "perplexity": math.inf, "run_id": run.run_id} for row in rows])
    accuracy_script.main([run.path_of()])
    text = Path(run.path_of("figures"), "accuracy.md").read_text()
    assert "| ∞ | 800.000 |" in text


def figures_of(monkeypatch, script) -> dict:
    """Name -> figure of all that `script` saves from now on."""
    drawn = {}

    def keep(figure, path):
        figure.draw_without_rendering()
        drawn[path.name] = figure
        alphas_script.plt.close(figure)
        return path

    monkeypatch.setattr(script, "save", keep)
    return drawn


def apart(boxes) -> bool:
    """Whether no two boxes (of artists, in pixels) cover each other."""
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def boxes_of(artists) -> list:
    return [artist.get_window_extent() for artist in artists if artist.get_visible() and artist.get_text()]


@pytest.mark.parametrize("spread", [(3.65, 4.18), (9.0, 60.0), (5.0, 150.0)])
def test_ticks_of_perplexities_are_apart_and_written_out(tmp_path, monkeypatch, spread):
    """Within a decade each tick was labelled, as 3.6 × 10^0 and 3.7 × 10^0, over the next."""
    run = make_run(tmp_path / "run", merges=2, subjects=2, questions=4, candidates=0)
    stored = run.read("perplexity").to_pylist()
    rows = [{**row, "perplexity": value, "ci_low": 0.97 * value, "ci_high": 1.04 * value}
            for row, value in zip(stored, np.linspace(*spread, 8), strict=True)]  # fmt: skip
    run.replace("perplexity", rows)
    drawn = figures_of(monkeypatch, accuracy_script)
    accuracy_script.draw(run, tmp_path)
    axis = drawn["accuracy.png"].axes[2]
    low, high = axis.get_xlim()
    labels = [label for label in axis.get_xticklabels(which="both") if low <= label.get_position()[0] <= high]
    assert 3 <= len(boxes_of(labels)) and apart(boxes_of(labels))
    assert not any("10" in label.get_text() and "{" in label.get_text() for label in labels)


def test_differences_and_perplexities_have_the_intervals_of_tables(tmp_path, monkeypatch):
    """Differences had 1.96 standard errors, which of few questions left out 0 where p was 0.5; perplexities none."""
    run = make_run(tmp_path / "run", merges=2, subjects=2, questions=6, candidates=0)
    rows = [row | {"ci_low": 0.9 * row["perplexity"], "ci_high": 1.2 * row["perplexity"]}
            for row in run.read("perplexity").to_pylist()]  # fmt: skip
    run.replace("perplexity", rows)
    (view,) = accuracy_script.views_of(run)
    drawn = figures_of(monkeypatch, accuracy_script)
    accuracy_script.draw(run, tmp_path)
    _, change, text = drawn["accuracy.png"].axes
    others = [plan for plan in view.plans if plan != view.reference]
    bars = [segment[:, 0] for line in change.collections for segment in line.get_segments()]
    wanted = [100 * np.array([view.difference[plan][end] for end in ("ci_low", "ci_high")]) for plan in others]
    np.testing.assert_allclose(bars, wanted, atol=1e-9)
    bars = [segment[:, 0] for line in text.collections for segment in line.get_segments()]
    np.testing.assert_allclose(bars, [[row["ci_low"], row["ci_high"]] for row in rows])


def test_legends_of_the_distribution_cover_nothing(tmp_path, monkeypatch):
    """With three searchers they covered the names of the axes."""
    searchers = {
        name: [trial(i, 0.1 * i) | {"alphas": [0.1, 0.9, 0.5]} for i in range(4)]
        for name in ("bayes", "gradient_simplex", "random")
    }
    drawn = figures_of(monkeypatch, search_panels)
    with alphas_script.plt.rc_context(alphas_script.STYLE):
        search_panels.draw_distribution(searchers, tmp_path / "x.png")
        figure = drawn["x.png"]
        legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
        names = [axis.xaxis.label for axis in figure.axes]
        assert legends and apart([legend.get_window_extent() for legend in legends] + boxes_of(names))


def test_numbers_stand_out_from_their_cells():
    """White on the middle blues, from .55 or .6 of the scale on, had a contrast of 3, where small text needs 4.5."""
    _, axis = alphas_script.plt.subplots()
    image = axis.imshow([[0.0, 1.0]], cmap="Blues", vmin=0, vmax=1)

    def luminance(colour):
        channels = np.array(matplotlib.colors.to_rgb(colour))
        return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ (
            0.2126, 0.7152, 0.0722,
        )  # fmt: skip

    for value in np.linspace(0, 1, 101):
        cell, text = luminance(image.to_rgba(value)[:3]), luminance(plotting.ink(image, value))
        assert (max(cell, text) + 0.05) / (min(cell, text) + 0.05) >= 4.5
    alphas_script.plt.close()


def matrix_plans(names=("found_gradient", "random"), steps=3, matrices=("mlp.down_proj", "self_attn.k_proj")):
    """Rows of `plans`: of the first plan each matrix has its own coefficients."""
    return [
        {"plan_id": name, "name": name, "kind": name.split("_")[0], "matrix": matrix, "step": step, "into": 8 - step,
         "remove": 9 - step, "alpha": 0.1 * step + 0.05 * i + 0.01 * len(matrix or "")}
        for i, name in enumerate(names)
        for matrix in ((None, *matrices) if not i else (None,))
        for step in range(steps)
    ]  # fmt: skip


def test_coefficients_of_single_matrices_come_after_those_of_plans(tmp_path, monkeypatch):
    """Those of one plan's seven matrices filled the eight rows, and other plans found were not drawn; in alphas.png
    each had a colour of its own, which another plan had too."""
    run = RunDirectory.open(tmp_path / "run", {}, "search")
    plans = matrix_plans()
    labels = {name: name for name in ("found_gradient", "random")}
    found = list(alphas_script.learned(run, plans, labels))
    assert found == ["found_gradient", "random", "found_gradient · mlp.down_proj", "found_gradient · self_attn.k_proj"]
    drawn = figures_of(monkeypatch, alphas_script)
    with alphas_script.plt.rc_context(alphas_script.STYLE):
        alphas_script.draw_plans(plans, [], labels, tmp_path / "x.png")
    lines = drawn["x.png"].axes[0].lines
    assert [line.get_color() for line in lines] == [plotting.COLOURS[0]] * 3 + [plotting.COLOURS[1]]
    assert [text.get_text() for text in drawn["x.png"].legends[0].get_texts()] == ["found_gradient", "random"]


def test_long_names_of_methods_do_not_run_into_the_next_title(tmp_path, monkeypatch):
    drawn = figures_of(monkeypatch, alpha_panels)
    rows = matrix_plans()[:3]
    with alphas_script.plt.rc_context(alphas_script.STYLE):
        methods = {"found_gradient_per_matrix · self_attn.down_proj = fixed_0.6225_plain": rows, "b": rows}
        alpha_panels.draw_methods(methods, None, tmp_path / "x.png")
        axes = drawn["x.png"].axes
        titles = [axis._left_title for axis in axes]
        legends = [axis.get_legend() for axis in axes if axis.get_legend()]
        assert apart(boxes_of(titles)) and not legends  # the legend stood on the bars
        assert "mean" in titles[0].get_text()


def test_descents_of_several_searchers_are_told_apart_and_numbers_do_not_cover_each_other(tmp_path, monkeypatch):
    """Twelve starts had seven colours; 91 coefficients were numbered one over the other, "by step"."""
    drawn = figures_of(monkeypatch, alpha_panels)
    history = [
        {"searcher": f"gradient_{name}", "start": start, "epoch": epoch, "loss": 1 / (1 + epoch + start + k),
         "held_out_loss": None, "alphas": np.linspace(0.02, 0.1, n).tolist()}
        for k, (name, n) in enumerate((("alphas", 13), ("per_matrix", 91), ("simplex", 13)))
        for start in range(4) for epoch in range(3)
    ]  # fmt: skip
    with alphas_script.plt.rc_context(alphas_script.STYLE):
        alpha_panels.draw_history(history, tmp_path / "all.png", "answer_nll")
        alpha_panels.draw_history(history[12:24], tmp_path / "matrix.png")
        alpha_panels.draw_history(history[:12], tmp_path / "one.png")
        left, right = drawn["all.png"].axes[:2]
        assert len({line.get_color() for line in left.lines}) == 3 and left.get_ylabel() == "loss (answer_nll)"
        names = [text.get_text() for text in drawn["all.png"].legends[0].get_texts()]
        assert names == ["alphas", "per_matrix", "simplex", "simplex, start 3"]
        numbers = boxes_of(right.texts)  # all within the panel: below it, they were left out
        assert len(numbers) == 13 and apart(numbers) and min(box.y0 for box in numbers) >= right.bbox.y0
        right = drawn["matrix.png"].axes[1]
        assert not right.texts and right.get_title("left") == "The 91 α of start 3"
        assert len({line.get_color() for line in drawn["one.png"].axes[0].lines}) == 4
        many = [row | {"alphas": [0.5] * 40} for row in history[:12]]  # of 40 steps, not of matrices
        alpha_panels.draw_history(many, tmp_path / "many.png")
        bars = [drawn[name].axes[2].get_ylabel() for name in ("matrix.png", "many.png")]
        assert bars == ["coefficient: by matrix, then by step", "step"]
        few = [row | {"alphas": row["alphas"][:21]} for row in history[12:24]]  # of 3 steps and 7 matrices
        alpha_panels.draw_history(few, tmp_path / "few.png")
        assert drawn["few.png"].axes[1].get_title("left") == "α of start 3, numbered by matrix, then by step"
        tried = figures_of(monkeypatch, search_panels)
        trials = {
            name: [trial(i, 0.1 * i) | {"searcher": name, "alphas": [0.5] * n} for i in range(3)]
            for name, n in (("gradient_per_matrix", 24), ("gradient_simplex", 3))
        }
        search_panels.draw_distribution(trials, tmp_path / "tried.png")
        matrices, steps = tried["tried.png"].axes[1:3]
        assert matrices.get_xlabel() == "merge step, then each matrix's own" and steps.get_xlabel() == "merge step"
        titles = [axis.get_title("left") for axis in (matrices, steps)]
        assert titles == ["α tried (gradient_per_matrix)", "α tried at each step (gradient_simplex)"]


def test_coefficients_of_40_steps_fit_on_a_screen(tmp_path, monkeypatch):
    """The figure was 5,365 pixels wide, and its numbers too small to read."""
    drawn = figures_of(monkeypatch, alphas_script)
    names = ["drop", "found_gradient_simplex"]
    with alphas_script.plt.rc_context(alphas_script.STYLE):
        for count in (13, 40):
            plans = [
                {"plan_id": name, "matrix": None, "step": step, "into": 78 - step, "remove": 79 - step, "alpha": 0.5}
                for name in names
                for step in range(count)
            ]
            alphas_script.draw_plans(plans, [], dict(zip(names, names, strict=True)), tmp_path / f"{count}.png")
    assert drawn["40.png"].get_figwidth() < 16 and not drawn["40.png"].axes[1].texts
    assert [tick.get_text() for tick in drawn["40.png"].axes[1].get_xticklabels()][:2] == ["39", "41"]
    assert len(drawn["13.png"].axes[1].texts) == 28 and len(drawn["13.png"].axes[1].get_xticks()) == 14


def test_progress_says_how_surely_the_best_is_known(tmp_path, monkeypatch):
    """Its axis shows steps of one question in 240, a twentieth of the interval of each value."""
    drawn = figures_of(monkeypatch, search_panels)
    rows = {"bayes": [trial(i, 0.8 + i / 240, 1.0) | {"n_questions": 240, "plan_id": "p"} for i in range(4)]}
    search_panels.draw_progress(rows, [], {}, tmp_path / "x.png")
    title = drawn["x.png"].legends[0].get_title().get_text()
    assert title == "of 240 questions 0.812 has a 95 % interval of 0.758 to 0.857"
    lower = {"bayes": [row | {"objective": "answer_nll"} for row in rows["bayes"]]}
    search_panels.draw_progress(lower, [], {}, tmp_path / "y.png")
    assert drawn["y.png"].legends[0].get_title().get_text() in ("", "None")
    far = {"bayes": [*rows["bayes"], rows["bayes"][0] | {"iteration": 4, "value": 0.1}]}  # was all that could be seen
    search_panels.draw_progress(far, [], {}, tmp_path / "f.png")
    (axis,) = drawn["f.png"].axes
    assert axis.get_ylim()[0] > 0.79 and axis.get_title().endswith("dashed: controls; 1 far worse not shown)")
    bad = [far["bayes"][-1] | {"searcher": "controls"}]  # shown as every control is, and the candidate with it
    search_panels.draw_progress(far, bad, {"p": "drop"}, tmp_path / "b.png")
    (axis,) = drawn["b.png"].axes
    assert axis.get_ylim()[0] < 0.1 and axis.get_title().endswith("dashed: controls)")
    one = {"bayes": rows["bayes"], "gradient": rows["bayes"][:1]}
    search_panels.draw_progress(one, [], {}, tmp_path / "z.png")
    names = [text.get_text() for text in drawn["z.png"].legends[0].get_texts()]
    assert names == ["bayes, running best (4 candidates)", "gradient, running best (1 candidate)"]
    summed = {"bayes": [row | {"objective": "micro_accuracy+0.5*macro_accuracy"} for row in rows["bayes"]]}
    search_panels.draw_progress(summed, [], {}, tmp_path / "s.png")  # up to 1.5, which is no share
    labels = [drawn[name].axes[0].get_ylabel() for name in ("x.png", "y.png", "s.png")]
    assert labels == ["micro_accuracy (share of questions), higher is better", "answer_nll (nats), lower is better",
                      "micro_accuracy+0.5*macro_accuracy, higher is better"]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "message"),
    [(alphas_script, "no rows in table plans, needed for the alphas; raymerge search CONFIG"),
     (accuracy_script, "no rows in table plans, needed for the names of the plans; raymerge search CONFIG")],
)  # fmt: skip
def test_missing_tables_are_named_with_the_command(tmp_path, capsys, script, message):
    RunDirectory.open(tmp_path / "run", {}, "search")
    assert script.main([str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "figures").exists()


def test_answers_of_a_split_nobody_asked_for(tmp_path):
    run = make_run(tmp_path / "run", merges=1, subjects=1, questions=2, candidates=0)
    answers = run.read("answers")
    for split in ("dev", "validation"):
        column = [split] * answers.num_rows
        run.append(
            "answers", answers.set_column(answers.schema.get_field_index("split"), "split", [column]), part=split
        )
    assert {view.split for view in accuracy_script.views_of(run)} == {"test"}
    unasked = [row for row in run.read("answers").to_pylist() if row["split"] != "test"]
    run.replace("answers", unasked)
    with pytest.raises(RunError, match="answers for dev, validation"):
        accuracy_script.draw(run, tmp_path)


# -- single methods: the published figure ----------------------------------------------------------------------------


def write_alphas(path, steps, **more):
    keys = ("layer_to_merge_into", "layer_to_remove", "ratio_i_alpha")
    path.write_text(
        json.dumps([{"step": -i, **dict(zip(keys, step, strict=True)), **more} for i, step in enumerate(steps)])
    )
    return path


def similarity_run(path, subsets=("all",), layers=6):
    """S_ij = (i + j) / 10 over the upper triangle; the pair (0, 1) has no value."""
    run = RunDirectory.open(path, {}, "similarity")
    run.replace("similarity", [
        {"subset": subset, "language": "en", "measure": "cka", "embedding": "none", "layer_i": i, "layer_j": j,
         "value": None if (i, j) == (0, 1) else (i + j) / 10, "n_samples": 9}
        for subset in subsets for i in range(layers) for j in range(i, layers)
    ])  # fmt: skip
    return run.path_of()


def test_effective_coefficients_of_alpha_files(tmp_path):
    """A chain is stick-breaking; steps that are no chain and a file of the same name elsewhere are told apart."""
    chain = write_alphas(tmp_path / "a.json", [(4, 5, 0.5), (3, 4, 0.75), (2, 3, 0.6)], ratio_j=0.0)
    (tmp_path / "other").mkdir()
    flat = write_alphas(tmp_path / "other" / "a.json", [(1, 2, 0.7), (4, 5, 0.2)])
    plans, coefficients = alpha_panels.read_alpha_files([chain, flat])
    found = {}
    for row in coefficients:
        found.setdefault(row["plan_id"], {})[row["kept_layer"], row["source_layer"]] = row["coefficient"]
    assert found[str(chain)] == pytest.approx({(2, 2): 0.6, (2, 3): 0.3, (2, 4): 0.05, (2, 5): 0.05})
    assert found[str(flat)] == pytest.approx({(1, 1): 0.7, (1, 2): 0.3, (4, 4): 0.2, (4, 5): 0.8})
    assert [(row["step"], row["alpha"]) for row in plans if row["plan_id"] == str(chain)] == [
        (0, 0.5),
        (1, 0.75),
        (2, 0.6),
    ]


def test_alpha_files_are_drawn_as_the_study_draws_them(tmp_path, capsys):
    alphas = [0.9, 0.4, 0.8, 0.1]
    rising = write_alphas(tmp_path / "rising.json", [(4 - i, 5 - i, a) for i, a in enumerate(alphas)])
    level = write_alphas(tmp_path / "level.json", [(4 - i, 5 - i, 0.62) for i in range(4)])
    out, run = tmp_path / "out", similarity_run(tmp_path / "similarity")
    arguments = ["--files", str(rising), str(level), "--out", str(out), "--similarity", run]
    assert alphas_script.main(arguments) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "alphas.png",
        "learned_alphas.png",
        "alphas.md",
    ]
    text = (out / "alphas.md").read_text()
    header, *rows = table_of(text, "## α of each method")
    r = np.corrcoef([0.9, 0.7, 0.5, 0.3], alphas)[0, 1]
    assert rows[0] == ["rising", "4", "0.550", f"{np.std(alphas):.3f}", "0.100", "0.900", f"{r:.3f}", "4"]
    assert header[-2] == "Pearson's r with similarity" and "r has no interval or p" in text
    assert rows[1][6:] == ["–", "4"]  # equal alphas have no correlation
    assert png_size(out / "learned_alphas.png")[0] > png_size(out / "learned_alphas.png")[1]
    weights = np.array([row[1:] for row in table_of(text, "## Effective coefficients")[1:]], dtype=float)
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=0.0005)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a": 1}', "a.json cannot be read as a JSON list of steps"), ("[1]", "cannot be read as"), ("x", "JSON"),
     ('[{"layer_to_merge_into": 1}]', "KeyError 'layer_to_remove'"),
     (None, "No such file")],
)  # fmt: skip
def test_what_is_no_alpha_file_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert alphas_script.main(["--files", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_options_that_do_not_go_together_are_refused(tmp_path, capsys):
    path = write_alphas(tmp_path / "a.json", [(1, 2, 0.5), (2, 3, 0.5)])
    run = similarity_run(tmp_path / "two", ("law", "math"))
    good = write_alphas(tmp_path / "good.json", [(1, 2, 0.5)])
    cases = {
        (): "name a RUN, or alpha files with --files",
        ("--files", str(good)): "name a RUN, or alpha files",
        (run, "--files", str(good)): "a RUN or --files, not both",
        ("--files", str(path), "--out", str(tmp_path)): "step 1: layer 3 into 2, but one of them is merged before",
        (
            "--files",
            str(good),
            "--out",
            str(tmp_path),
            "--similarity",
            run,
        ): "holds 2 similarity matrices (law/en (cka), math/en (cka)), not one: name it with --subset",
    }
    for arguments, message in cases.items():
        assert alphas_script.main(list(arguments)) == 2
        assert message in capsys.readouterr().err
    found = alpha_panels.read_similarity(run, "law/en")
    assert found == alpha_panels.read_similarity(run, "law") and found[3, 2] == found[2, 3] == 0.5
    assert (0, 1) not in found and (1, 0) not in found
    own = similarity_run(tmp_path / "own", ("law/civil", "law"))  # a domain may be called so
    assert alpha_panels.read_similarity(own, "law/civil") == alpha_panels.read_similarity(own, "law/civil/en") == found


def test_correlations_that_are_undefined():
    assert np.isnan(alpha_panels.correlation([1, 2], [1, 2])) and np.isnan(alpha_panels.correlation([1] * 5, range(5)))
    assert alpha_panels.correlation([1, 2, 3], [1, 2, 2]) == pytest.approx(np.sqrt(3) / 2)


@pytest.mark.parametrize(
    ("experiment", "base", "name", "left_out"),
    [
        ("search", "similarity", "similarity", True),
        ("search", "similarity_ratio", "similarity_ratio_plain", True),
        ("search", "similarity_ratio", "similarity_shuffled", True),
        ("search", "file", "similarity_of_mine", False),
        ("sweep", "fixed", "similarity_k3", True),
        ("sweep", "similarity", "most_similar_neurons_k3", True),
        ("sweep", "file", "file_k3", False),
    ],
)
def test_alphas_that_are_computed_from_a_similarity_are_not_held_against_one(
    tmp_path, experiment, base, name, left_out
):
    run = RunDirectory.open(tmp_path, {"plan": {"base": base}}, experiment)
    steps = [{"step": i, "into": 3 - i, "remove": 4 - i, "alpha": 0.5 + 0.1 * i, "matrix": None} for i in range(3)]
    plans = [
        {"plan_id": plan, "name": called, "kind": kind} | step
        for plan, called, kind in (("a", name, "file"), ("b", "found_bayes", "found"), ("c", "found_bayes", "found"))
        for step in steps
    ] + [{"plan_id": "c", "name": name, "kind": "file"} | step for step in steps]  # found is its own start
    found = alphas_script.learned(run, plans, {"a": "given", "b": "found", "c": "found = given"})
    assert set(found) == ({"found"} if left_out else {"found", "given", "found = given"})


def test_methods_of_a_run_whose_alphas_differ_come_found_first_with_its_own_similarity(tmp_path):
    similarity = similarity_run(tmp_path / "similarity", layers=8)
    made = make_run(tmp_path / "made", layers=8, merges=4, subjects=1, questions=2, candidates=3)
    config = {"plan": {"similarity_run": similarity}, "search": {"objective": "micro_accuracy"}}
    run = RunDirectory.open(tmp_path / "run", config, "search")
    for table in ("plans", "coefficients"):
        run.replace(table, made.read(table).drop_columns("run_id"))
    history = [
        {"searcher": "gradient_simplex", "start": start, "epoch": epoch, "loss": 1 / (1 + epoch + start),
         "held_out_loss": held, "alphas": [0.5, 0.1 * epoch]}
        for start, losses in enumerate(([0.9, 0.4, 0.6], [0.9, 0.5, 0.7])) for epoch, held in enumerate(losses)
    ]  # fmt: skip
    run.replace("gradient_history", history)
    paths = alphas_script.draw(run, tmp_path / "out")
    assert [path.name for path in paths] == ["alphas.png", "learned_alphas.png", "gradient_history.png", "alphas.md"]
    assert alphas_script.loss_of(run) == "answer_nll"  # which the descents of an accuracy have on their axis
    header, *rows = table_of(paths[-1].read_text(), "## α of each method")
    assert [row[0] for row in rows] == ["found_random", "found_bayes", "best of random"]
    assert header[-1] == "pairs" and {row[-1] for row in rows} == {"4"}
    table = table_of(paths[-1].read_text(), "## Gradient descent")
    assert table[1:] == [
        ["start 0", "2", "1.0000", "0.3333", "0.4000", "1"],
        ["start 1", "2", "0.5000", "0.2500", "0.5000", "1"],
    ]
    # By held-out loss, though the other has less loss.
    assert alpha_panels.best_start(alpha_panels.starts_of(history)) == "start 0"
    bare = [row | {"held_out_loss": None} for row in history]
    assert alpha_panels.best_start(alpha_panels.starts_of(bare)) == "start 1"
    both = history + [row | {"searcher": "gradient_alphas", "start": 0} for row in history[:3]]
    assert list(alpha_panels.starts_of(both)) == ["alphas, start 0", "simplex, start 0", "simplex, start 1"]
    alpha_panels.draw_history(bare[:1], tmp_path / "one.png")


def test_what_was_found_is_drawn_also_where_its_alphas_are_all_alike(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, "search")
    plans = [
        {"plan_id": name, "name": name, "kind": kind, "matrix": None, "step": step, "into": 2 - step,
         "remove": 3 - step, "alpha": alpha}
        for name, kind, alphas in (
            ("fixed_0.5", "fixed", (0.5, 0.5)), ("random", "random", (0.1, 0.9)), ("found", "found", (0.0, 0.0))
        )
        for step, alpha in enumerate(alphas)
    ]  # fmt: skip
    labels = {name: name for name in ("fixed_0.5", "random", "found")}
    assert list(alphas_script.learned(run, plans, labels)) == ["found", "random"]
    # A start that nothing beat is stored as the control that it is, and then as what was found.
    again = plans[:4] + [row | {"name": "found", "kind": "found"} for row in plans[:2]]
    assert list(alphas_script.learned(run, again, labels)) == ["fixed_0.5", "random"]


def test_merge_steps_of_plans_that_merge_different_layers_are_ticked_by_whole_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(alphas_script, "save", lambda figure, path: figure.axes[0].get_xticks())
    plans = [
        {"plan_id": name, "matrix": None, "step": step, "into": first - step, "remove": first + 1 - step, "alpha": 0.5}
        for name, first in (("last", 6), ("before", 5))
        for step in range(3)
    ]
    ticks = alphas_script.draw_plans(plans, [], {}, tmp_path / "x.png")
    assert all(float(tick).is_integer() for tick in ticks)


def test_the_progress_of_a_search_is_ticked_by_whole_candidates(tmp_path, monkeypatch):
    monkeypatch.setattr(search_panels, "save", lambda figure, path: figure.axes[0].get_xticks())
    searched = {"bayes": [trial(i, 0.01 * i) | {"n_questions": 10} for i in range(20)]}
    ticks = search_panels.draw_progress(searched, [], {}, tmp_path / "x.png")
    assert all(float(tick).is_integer() for tick in ticks)


def test_the_label_of_the_colours_is_not_cut_off(tmp_path, monkeypatch):
    def beyond(figure, path):
        figure.draw_without_rendering()
        return max(axis.get_tightbbox().x1 for axis in figure.axes) - figure.bbox.width

    monkeypatch.setattr(search_panels, "save", beyond)
    searchers = {
        name: [trial(i, value, objective="answer_nll") | {"alphas": [0.1, 0.9]} for i, value in enumerate(values)]
        for name, values in (("bayes", [1.7683, 3.9094]), ("random", [2.3259, 3.8235]))
    }
    with alphas_script.plt.rc_context(alphas_script.STYLE):
        assert search_panels.draw_distribution(searchers, tmp_path / "x.png") <= 0


def test_trials_above_a_ceiling_are_not_drawn_as_values(tmp_path):
    rows = [
        trial(0, 0.5) | {"perplexity": 3.0},
        trial(1, 0.9) | {"perplexity": 9.0},
        trial(2, 0.1) | {"perplexity": None},
    ]
    run = RunDirectory.open(tmp_path / "run", {"search": {"perplexity_ceiling": 5.0}}, "search")
    held = search_panels.held_to(run, rows)
    assert search_panels.best_of(held)["iteration"] == 0 and len(search_panels.usable(held)) == 2
    free = RunDirectory.open(tmp_path / "free", {}, "search")
    assert search_panels.held_to(free, rows) == rows


def test_of_an_unfinished_run_it_is_said_that_a_table_may_come_yet(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {}, "sweep")
    run.begin()
    with pytest.raises(RunError, match="sweep CONFIG --out RUN writes it; the run is unfinished: repeat its command"):
        plotting.need(run, "sweep", "the curve")
    run.write_manifest()
    with pytest.raises(RunError, match="writes it$"):
        plotting.need(run, "sweep", "the curve")


def test_what_is_no_run_is_an_error_and_help_teaches(tmp_path, capsys):
    assert alphas_script.main([str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, ANALYSIS / "alphas.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "search_progress.png" in done.stdout and "RUN/figures" in done.stdout


if __name__ == "__main__":  # python tests/test_analysis.py DIR: runs to look at
    folder = Path(sys.argv[1])
    make_run(folder / "k13")
    make_run(folder / "wide", layers=28, merges=4, subjects=57, objective="answer_nll", seed=1,
             extra=[f"alphas_{i}" for i in range(8)], languages=("en", "es"), found_is_base=True)  # fmt: skip
    for run in ("k13", "wide"):
        for script in (alphas_script, accuracy_script):
            script.main([str(folder / run)])


def test_a_figure_that_cannot_be_written_leaves_no_part_of_it(tmp_path, monkeypatch):
    figure, _ = plotting.plt.subplots()

    def full(path, format):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        plotting.save(figure, tmp_path / "figures" / "a.png")
    assert not list((tmp_path / "figures").iterdir()) and not plotting.plt.fignum_exists(figure.number)


def test_a_stroke_in_a_name_ends_no_cell():
    table = plotting.markdown(["subset", "n|m"], [["a|b", 3], ["c", None]])
    assert table.splitlines() == ["| subset | n\\|m |", "| :-- | --: |", "| a\\|b | 3 |", "| c | – |"]


def test_dollars_in_names_are_no_formula(tmp_path, monkeypatch):
    """What stood between two of them was read as one: a search ended in a trace after all its work."""
    name = "mine$_$"
    run = report_runs.search_run(tmp_path / "run", control=name, subjects=("a$^$b", "law"))
    scripts = (accuracy_script, alphas_script, search_panels, alpha_panels)
    saved = [figures_of(monkeypatch, script) for script in scripts]
    texts, lost = run.read("perplexity").drop_columns("run_id").to_pylist(), {"perplexity": 9e4, "ci_high": 1e5}
    run.replace("perplexity", [row | (lost if row["plan_id"] == "drop" else {}) for row in texts])
    accuracy_script.draw(run, tmp_path)
    alphas_script.draw(run, tmp_path)
    figures = [figure for drawn in saved for figure in drawn.values()]
    texts = {text.get_text() for figure in figures for text in figure.findobj(matplotlib.text.Text)}
    assert name in texts and "a$^$b" in texts
    assert {text for text in texts if "$" in text and name not in text and "a$^$b" not in text} == set()
    assert {"10", "100", "1,000", "10,000"} <= texts  # of perplexities on an axis of decades


def test_a_name_that_begins_with_an_underscore_stands_in_the_legend(tmp_path, monkeypatch):
    """matplotlib leaves such entries out: the line of an alpha file _mine.json had no name."""
    drawn = figures_of(monkeypatch, alphas_script)
    run = report_runs.search_run(tmp_path / "run", control="_mine")
    plans, weights = run.read("plans").to_pylist(), run.read("coefficients").to_pylist()
    labels = {row["plan_id"]: row["name"] for row in plans}
    alphas_script.draw_plans(plans, weights, labels, tmp_path / "x.png")
    entries = [text.get_text().strip() for text in drawn["x.png"].legends[0].get_texts()]
    assert entries == ["drop", "_mine", "found_bayes"]


def drawn_by(axis) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Label -> x, y and the ends of the horizontal bars of what errorbar has drawn."""
    found = {}
    for series in axis.containers:
        line, _, (bars,) = series.lines
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        found[series.get_label()] = (*(np.array(each, dtype=float) for each in line.get_data()), ends)
    return found


def test_accuracies_and_letters_stand_in_the_lines_of_their_plans(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", merges=2, subjects=3, questions=8, candidates=0)
    drawn = figures_of(monkeypatch, accuracy_script)
    accuracy_script.draw(run, tmp_path)
    stored = {(row["plan_id"], row["subject"]): row for row in run.read("accuracy").to_pylist()}
    names = {row["plan_id"]: row["name"] for row in run.read("plans").to_pylist()}
    plans = list(names)  # as they are stored
    left, change, text = drawn["accuracy.png"].axes
    labels = [label.get_text().replace("best of random", "random") for label in left.get_yticklabels()]
    assert labels == [*names.values(), "always A"] and left.yaxis_inverted()
    series = drawn_by(left)
    for subject, label in (("_micro", "micro (per question)"), ("_macro", "macro (per subject)")):
        x, y, ends = series[label]
        rows = [stored[plan, subject] for plan in plans]
        np.testing.assert_allclose(x, [100 * row["accuracy"] for row in rows])
        np.testing.assert_array_equal(np.round(y), range(len(plans)))
        np.testing.assert_allclose(ends, [[100 * row["ci_low"], 100 * row["ci_high"]] for row in rows])
    answers = run.read("answers").to_pylist()
    lines = {tuple(line.get_data()[0]): list(line.get_data()[1]) for line in left.lines}
    assert lines[25.0, 25.0] == [0, 1]  # chance
    assert lines[(100 * np.mean([row["answer"] == 0 for row in answers]),)] == [len(plans)]
    ((x, y, _),) = drawn_by(change).values()
    base = stored[plans[0], "_micro"]["accuracy"]
    np.testing.assert_allclose(x, [100 * (stored[plan, "_micro"]["accuracy"] - base) for plan in plans[1:]], atol=1e-9)
    assert list(y) == list(range(1, len(plans))) and change.get_title("left") == "Difference to base"
    ((x, y, _),) = drawn_by(text).values()
    perplexities = {row["plan_id"]: row["perplexity"] for row in run.read("perplexity").to_pylist()}
    assert list(x) == [perplexities[plan] for plan in plans] and list(y) == list(range(len(plans)))
    assert text.get_xscale() == "log" and text.texts[0].get_text() == "9.300"
    note = drawn["accuracy.png"].legends[0].get_title().get_text()
    assert note == "bars: 95 % intervals; 24 questions, 3 subjects, language en"
    ids = {row["name"]: row["plan_id"] for row in run.read("plans").to_pylist()}
    ids["best of random"] = ids.pop("random")
    axes = [axis for name in ("accuracy_by_subject.png", "accuracy_by_subject_2.png") for axis in drawn[name].axes]
    titles = [axis.get_title("left") for axis in axes]
    assert set(titles) == ids.keys() - {"base"} and len(titles) == 7
    lines = [label.get_text() for label in axes[0].get_yticklabels()]
    subjects = ["_micro", "_macro", *(name.replace(" ", "_") for name in lines[2:])]
    assert lines[:2] == ["micro average", "macro average"] and set(subjects[2:]) == set(SUBJECTS[:3])
    base = [stored[ids["base"], subject]["accuracy"] for subject in subjects]
    assert base[2:] == sorted(base[2:], reverse=True)
    for axis, plan in zip(axes, titles, strict=True):
        ((x, y, ends),) = drawn_by(axis).values()
        rows = [stored[ids[plan], subject] for subject in subjects]
        np.testing.assert_allclose(x, [100 * row["accuracy"] for row in rows])
        np.testing.assert_allclose(ends, [[100 * row["ci_low"], 100 * row["ci_high"]] for row in rows])
        rings = axis.lines[0]
        np.testing.assert_allclose(rings.get_xdata(), 100 * np.array(base))
        assert list(rings.get_ydata()) == list(y) == list(axes[0].get_yticks()) and axis.yaxis_inverted()
    assert "open circles: base" in drawn["accuracy_by_subject.png"].get_supxlabel()
    (axis,) = drawn["letters.png"].axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    for number, bars in enumerate(axis.containers):
        assert bars.get_label() == "ABCD"[number]
        for label, bar in zip(labels, bars, strict=True):
            mine = [row for row in answers if row["plan_id"] == ids.get(label, ids["base"])]
            given = [row["answer" if label == "right answers" else "predicted"] for row in mine]
            assert bar.get_width() == pytest.approx(100 * given.count(number) / len(given))
            assert bar.get_x() == pytest.approx(100 * sum(letter < number for letter in given) / len(given))


def test_coefficients_are_drawn_at_their_steps_and_layers(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", layers=9, merges=3, subjects=1, questions=2, candidates=0)
    drawn = figures_of(monkeypatch, alphas_script)
    with alphas_script.plt.rc_context(alphas_script.STYLE):
        plans, coefficients = run.read("plans").to_pylist(), run.read("coefficients").to_pylist()
        labels = {row["plan_id"]: row["name"] for row in plans}
        alphas_script.draw_plans(plans, coefficients, labels, tmp_path / "x.png")
    left, right, _ = drawn["x.png"].axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["0: 8→7", "1: 7→6", "2: 6→5"]
    assert {line.get_label() for line in left.lines} == set(labels.values()) - {"base"}
    for line in left.lines:
        rows = [row for row in plans if row["name"] == line.get_label()]
        assert list(line.get_ydata()) == [row["alpha"] for row in rows]
        assert list(np.round(line.get_xdata())) == [row["step"] for row in rows] == [0, 1, 2]
    (image,) = right.images
    ticks = right.get_yticklabels(), right.get_xticklabels()
    names, layers = ([label.get_text() for label in each] for each in ticks)
    assert layers == ["5", "6", "7", "8"] and names == list(labels.values())[1:]
    stored = {(labels[row["plan_id"]], row["source_layer"]): row["coefficient"] for row in coefficients}
    wanted = [[stored[name, int(layer)] for layer in layers] for name in names]
    np.testing.assert_allclose(image.get_array(), wanted)
    assert image.get_clim() == (0, 1)
    texts = {text.get_position(): text.get_text() for text in right.texts}
    for (i, j), value in np.ndenumerate(np.array(wanted)):
        shown = texts[j, i]
        assert float(shown.replace("<.001", "0")) == pytest.approx(value, abs=0.0006)


def test_methods_are_held_against_the_similarity_of_what_they_merge(tmp_path, monkeypatch):
    rows = matrix_plans(("found_a",), steps=4, matrices=())
    similarity = {(8, 9): 0.9, (7, 8): 0.7, (6, 7): 0.75, (9, 8): 0.1, (8, 7): 0.1, (7, 6): 0.1}
    drawn = figures_of(monkeypatch, alpha_panels)
    alpha_panels.draw_methods({"found_a": rows}, similarity, tmp_path / "x.png")
    hist, steps, against = drawn["x.png"].axes
    alphas = [0.0, 0.1, 0.2, 0.3]
    tall = [bar.get_x() + bar.get_width() / 2 for bar in hist.patches if bar.get_height()]
    assert tall == pytest.approx(alphas, abs=0.021)
    assert hist.get_title().endswith("mean 0.150") and list(hist.lines[0].get_xdata()) == pytest.approx([0.15] * 2)
    assert list(steps.lines[0].get_xdata()) == [0, 1, 2, 3]
    assert list(steps.lines[0].get_ydata()) == pytest.approx(alphas)
    assert [label.get_text() for label in steps.get_xticklabels()] == ["9→8", "8→7", "7→6", "6→5"]
    points, fit = against.lines
    assert list(points.get_xdata()) == [0.9, 0.7, 0.75] and list(points.get_ydata()) == pytest.approx(alphas[:3])
    r = np.corrcoef([0.9, 0.7, 0.75], alphas[:3])[0, 1]
    assert against.texts[0].get_text() == f"r = {r:.3f}, n = 3"
    slope = np.cov([0.9, 0.7, 0.75], alphas[:3])[0, 1] / np.var([0.9, 0.7, 0.75], ddof=1)
    ends = [0.1 + slope * (x - np.mean([0.9, 0.7, 0.75])) for x in (0.7, 0.9)]
    assert list(fit.get_xdata()) == [0.7, 0.9] and list(fit.get_ydata()) == pytest.approx(ends)


def test_descents_are_drawn_with_what_was_held_out(tmp_path, monkeypatch):
    """The start of the lowest held-out loss, not of the lowest loss, is the one whose alphas are drawn."""
    held = {0: [1.5, 1.1, 1.3], 1: [1.6, 1.2, 1.15]}
    loss = {0: [1.4, 1.0, 0.9], 1: [1.3, 0.8, 0.7]}
    history = [
        {"searcher": "gradient_alphas", "start": start, "epoch": epoch, "loss": loss[start][epoch],
         "held_out_loss": held[start][epoch], "alphas": [0.1 + 0.1 * epoch + 0.3 * start, 0.9 - 0.05 * epoch]}
        for start in (0, 1) for epoch in range(3)
    ]  # fmt: skip
    drawn = figures_of(monkeypatch, alpha_panels)
    alpha_panels.draw_history(history, tmp_path / "x.png")
    left, right = drawn["x.png"].axes
    lines = [(line.get_linestyle(), line.get_color(), line.get_linewidth(), *map(list, line.get_data()))
             for line in left.lines]  # fmt: skip
    for start in (0, 1):
        own = lines[3 * start : 3 * start + 3]
        (style, colour, width, *solid), (dashed, other, _, *out), (_, ring, _, *least) = own
        assert (style, dashed) == ("-", "--") and colour == other == ring and (width == 2.0) == (start == 0)
        assert solid == [[0, 1, 2], loss[start]] and out == [[0, 1, 2], held[start]]
        assert least == [[1], [1.1]] if start == 0 else least == [[2], [1.15]]
    assert "α of start 0" in right.get_title("left") + right.get_title()
    assert [list(line.get_ydata()) for line in right.lines] == [
        pytest.approx([0.1, 0.2, 0.3]), pytest.approx([0.9, 0.85, 0.8]),
    ]  # fmt: skip
    numbers = {text.get_text(): text.xy for text in right.texts}
    assert numbers["0"] == pytest.approx((2, 0.3)) and numbers["1"] == pytest.approx((2, 0.8))
    assert alpha_panels.history_rows(history) == [
        ["start 0", 2, "1.4000", "0.9000", "1.1000", 1], ["start 1", 2, "1.3000", "0.7000", "1.1500", 2],
    ]  # fmt: skip


@pytest.mark.parametrize("objective", ["micro_accuracy", "answer_nll"])
def test_candidates_are_drawn_at_their_values(tmp_path, monkeypatch, objective):
    lower = objective == "answer_nll"
    values = {"bayes": [0.50, None, 0.55, 0.52, 0.58], "random": [0.40, 0.45, 0.43]}
    searchers = {
        name: [trial(i, value, 1.0) | {"objective": objective, "n_questions": 100, "plan_id": f"{name}{i}",
                                       "status": "failed" if value is None else "ok",
                                       "alphas": [0.1 + 0.1 * i, 0.9 - 0.1 * i + 0.01 * (name == "random")]}
               for i, value in enumerate(mine)]
        for name, mine in values.items()
    }  # fmt: skip
    controls = [
        trial(0, 0.47) | {"objective": objective, "plan_id": "drop"},
        trial(1, 0.53) | {"objective": objective, "plan_id": "fixed"},
        trial(2, 0.60) | {"objective": "another", "plan_id": "odd"},
        trial(3, 0.51) | {"objective": objective, "plan_id": "not the best of those that keep one layer"},
    ]
    labels = {"drop": "dropped", "fixed": "fixed", "odd": "odd"}  # fmt: skip
    drawn = figures_of(monkeypatch, search_panels)
    search_panels.draw_progress(searchers, controls, labels, tmp_path / "p.png")
    search_panels.draw_distribution(searchers, tmp_path / "d.png")
    (axis,) = drawn["p.png"].axes
    best = np.minimum.accumulate if lower else np.maximum.accumulate
    for i, mine in enumerate(values.values()):
        marks, line = axis.lines[2 * i : 2 * i + 2]
        known = [(number, value) for number, value in enumerate(mine, 1) if value is not None]
        assert list(zip(*marks.get_data(), strict=True)) == known and marks.get_color() == line.get_color()
        assert list(line.get_ydata())[:-1] == list(best([value for _, value in known]))
    assert [list(line.get_ydata()) for line in axis.lines[4:]] == [[0.47, 0.47], [0.53, 0.53]]
    assert [text.get_text() for text in axis.texts] == ["dropped  0.470", "fixed  0.530"]
    names = [text.get_text() for text in drawn["p.png"].legends[0].get_texts()]
    assert names == ["bayes, running best (4 candidates, 1 failed)", "random, running best (3 candidates)"]
    spread, *panels, bar = drawn["d.png"].axes
    winner = {"bayes": 0 if lower else 4, "random": 0 if lower else 1}
    ticks = {line.get_label().split(":")[0]: list(line.get_xdata()) for line in spread.lines}
    for axis, (name, rows) in zip(panels, searchers.items(), strict=True):
        ok = [row for row in rows if row["status"] == "ok"]
        (dots,) = axis.collections
        places = np.column_stack([np.round(dots.get_offsets()[:, 0]), dots.get_offsets()[:, 1], dots.get_array()])
        wanted = {(step, round(alpha, 9), row["value"]) for row in ok for step, alpha in enumerate(row["alphas"])}
        assert {(step, round(alpha, 9), value) for step, alpha, value in places} == wanted
        assert list(places[-1]) == pytest.approx([1, rows[winner[name]]["alphas"][1], rows[winner[name]]["value"]])
        rings = axis.lines[0]
        assert list(rings.get_ydata()) == rows[winner[name]]["alphas"] == ticks[name]
        assert list(rings.get_xdata()) == [0, 1]
        assert f"({name})" in axis.get_title() + axis.get_title("left")
    assert bar.get_ylabel() == f"{objective} ({'lower' if lower else 'higher'} is better)"
    shown = {each.get_label().split(":")[0]: each for each in spread.patches}
    for name, rows in searchers.items():
        heights = shown[name].get_xy()[:, 1]
        alphas = [alpha for row in rows if row["status"] == "ok" for alpha in row["alphas"]]
        assert heights.max() == pytest.approx(100 * max(np.histogram(alphas, np.linspace(0, 1, 26))[0]) / len(alphas))
        assert f"all {len(alphas) // 2} tried (mean {np.mean(alphas):.2f})" in shown[name].get_label()
