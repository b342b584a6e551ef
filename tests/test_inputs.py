"""inputs.py: which prompts a matrix is made of, what reports leave out, and how a similarity run is read."""

import csv
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import task_files

from raymerge.config import ConfigError
from raymerge.config_file import load_config
from raymerge.inputs import (
    CALIBRATION,
    REPORT,
    SEARCH,
    SEARCH_TEXT,
    SUBSETS,
    Material,
    questions_to_match_on,
    read_calibration_text,
    read_material,
    read_questions,
    read_search_text,
    read_similarity,
    read_subsets,
    read_tasks,
    read_text,
    task_role,
)
from raymerge.questions import DataError, sample
from raymerge.tables import RunDirectory, RunError
from raymerge.texts import text_hash


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory):
    """Three subjects of 3, 9 and 9 questions in two parallel languages."""
    root = tmp_path_factory.mktemp("mmlu")
    for language in ("en", "es"):
        for split, counts in (("dev", (5, 5, 5)), ("val", (3, 9, 9)), ("test", (3, 9, 9))):
            (root / language / split).mkdir(parents=True)
            for subject, count in zip(("anatomy", "botany", "chess"), counts, strict=True):
                path = root / language / split / f"{subject}_{split}.csv"
                rows = [[f"{subject} {split} {row} {language}?", "a", "b", "c", "d", "A"] for row in range(count)]
                with path.open("w", newline="") as file:
                    csv.writer(file).writerows(rows)
    return root


def config(mmlu, *more):
    settings = [f"data.mmlu={mmlu}", "similarity.measure=cka", "similarity.samples=6"]
    return load_config(None, [*settings, *more])


def counts(subset):
    return {subject: len(part) for subject, part in subset.questions.by_subject().items()}


def test_samples_are_spread_evenly_and_what_one_subject_lacks_the_others_give(mmlu):
    (subset,) = read_subsets(config(mmlu))
    assert (subset.name, subset.language, counts(subset)) == ("all", "en", {"anatomy": 2, "botany": 2, "chess": 2})
    (subset,) = read_subsets(config(mmlu, "similarity.samples=15"))
    assert counts(subset) == {"anatomy": 3, "botany": 6, "chess": 6}
    domain = ["data.domains.life=[anatomy, botany]", "similarity.subsets=[life, chess]"]
    life, chess = read_subsets(config(mmlu, *domain))
    assert counts(life) == {"anatomy": 3, "botany": 3} and counts(chess) == {"chess": 6}


def test_samples_follow_from_the_seed_and_a_smaller_set_lies_in_a_larger(mmlu):
    def ids(*more):
        (subset,) = read_subsets(config(mmlu, "similarity.subsets=[chess]", *more))
        return [question.question_id for question in subset.questions.questions]

    assert ids() == ids() and ids() != ids("similarity.seed=1")
    assert set(ids("similarity.samples=4")) < set(ids())


def test_all_follows_data_subjects(mmlu):
    (subset,) = read_subsets(config(mmlu, "data.subjects=botany,chess"))
    assert set(counts(subset)) == {"botany", "chess"}


def test_languages_get_the_same_questions(mmlu):
    found = read_subsets(config(mmlu, "similarity.languages=[en, es]", "similarity.subsets=[chess, botany]"))
    assert [(s.name, s.language) for s in found] == [
        ("chess", "en"),
        ("chess", "es"),
        ("botany", "en"),
        ("botany", "es"),
    ]
    for english, spanish in (found[:2], found[2:]):
        assert [q.question_id for q in english.questions.questions] == [
            q.question_id for q in spanish.questions.questions
        ]
        assert all(q.text.endswith("es?") for q in spanish.questions.questions)


def test_only_questions_that_every_language_has_are_taken(mmlu, tmp_path):
    from shutil import copytree

    root = copytree(mmlu, tmp_path / "short")
    path = root / "es" / "val" / "chess_val.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    short = ["similarity.languages=[en, es]", "similarity.subsets=[chess]"]
    english, spanish = read_subsets(config(root, *short, "similarity.samples=4"))
    assert [q.question_id for q in english.questions.questions] == [f"chess/validation/{row}" for row in range(4)]
    with pytest.raises(DataError, match="subset chess has 4 prompts in split validation of every language, but .* 6"):
        read_subsets(config(root, *short))


def test_samples_of_one_number_are_translations_whatever_the_order_of_each_languages_file(tmp_path):
    """The jackknife of a correlation between languages draws the same numbers from both."""
    for language, order in (("en", range(9)), ("es", [4, 8, 0, 3, 7, 1, 6, 2, 5])):
        rows = [
            {"sample_id": f"chess/{n}", "subject": "chess", "question": f"{n} {language}?", "answer": "A"}
            | dict.fromkeys(("option_a", "option_b", "option_c", "option_d"), "x")
            for n in order
        ]
        (tmp_path / language).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / language / "test.parquet")
    options = ["similarity.languages=[es, en]", "similarity.split=test", "similarity.shots=0"]
    spanish, english = read_subsets(config(tmp_path, *options))
    assert [q.text.split()[0] for q in english.questions.questions] == [
        q.text.split()[0] for q in spanish.questions.questions
    ]


def test_a_languages_file_is_not_read_again_for_every_subset(tmp_path, monkeypatch):
    """Global-MMLU has all subjects of a language in one file: of 42 languages 4,788 were read, in every process."""
    names = ["anatomy", "botany", "chess"]
    cells = {"question": "?", "answer": "A"} | dict.fromkeys(("option_a", "option_b", "option_c", "option_d"), "x")
    rows = [{"sample_id": f"{name}/{n}", "subject": name, **cells} for name in names for n in range(8)]
    for language in ("en", "es"):
        (tmp_path / language).mkdir()
        for split in ("dev", "test"):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / language / f"{split}.parquet")
    read, reader = [], pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path, **options: read.append(path) or reader(path, **options))
    asked = ["similarity.split=test", "similarity.shots=2", f"similarity.subsets={names}"]
    found = read_subsets(config(tmp_path, *asked))
    assert [counts(subset) for subset in found] == [{name: 6} for name in names]
    assert len(read) == 2, "examples and questions"
    found = read_subsets(config(tmp_path, *asked, "similarity.languages=[es, en]"))
    assert [(of.name, of.language) for of in found] == [(name, of) for name in names for of in ("es", "en")]
    assert len(read) == 2 + 2 * 4, "once to see what every language has, once to choose"


def test_subsets_that_cannot_be_made_are_refused(mmlu):
    with pytest.raises(
        DataError, match="subset anatomy has 3 prompts in split validation, but similarity.samples asks"
    ):
        read_subsets(config(mmlu, "similarity.subsets=[anatomy]"))
    with pytest.raises(DataError, match="unknown subject 'botani'; did you mean botany"):
        read_subsets(config(mmlu, "similarity.subsets=[botani]"))
    with pytest.raises(ConfigError, match="name one of them twice"):
        read_subsets(config(mmlu, "similarity.subsets=[chess, chess]"))
    with pytest.raises(DataError, match="language 'zh' is not in"):
        read_subsets(config(mmlu, "similarity.languages=[en, zh]"))


# -- texts -----------------------------------------------------------------------------------------------------------


def test_the_search_text_is_read_where_asked_for_and_begins_after_the_tokens_reported_on(tmp_path):
    one, same, other, part = (tmp_path / name for name in ("one.txt", "same.txt", "other.txt", "part.txt"))
    one.write_text("The first text.\nIt has two lines.\n")
    same.write_text(one.read_text() + "\n")  # the same but for the white space at its end
    other.write_text("Another one.")
    part.write_text("It has two lines.")

    def found(text, *more, objective="answer_nll+text_nll", reported=one):
        settings = [f"search.text={text}", f"search.objective={objective}", f"data.perplexity_text={reported}"]
        return read_search_text(load_config(None, [*settings, "data.perplexity_tokens=7", *more]))

    assert found(one, objective="answer_nll") is None
    assert found(one, "search.perplexity_ceiling=9", objective="micro_accuracy") == (one.read_text(), 7)
    assert found(one) == (one.read_text(), 7) and found(same) == (same.read_text(), 7)
    assert found(other) == ("Another one.", 0) and found(one, reported="null") == (one.read_text(), 0)
    for pair in ((part, one), (one, part)):
        with pytest.raises(ConfigError, match="search.text = .* and data.perplexity_text = .* overlap"):
            found(pair[0], reported=pair[1])
    with pytest.raises(ConfigError, match="search.text = .*none.txt': there is no such file"):
        found(tmp_path / "none.txt")
    assert read_text(load_config(None, [f"data.perplexity_text={other}"])) == "Another one."


def test_calibration_begins_after_what_is_reported_and_searched_on(tmp_path):
    one, other, part = (tmp_path / name for name in ("one.txt", "other.txt", "part.txt"))
    one.write_text("The first text.\nIt has two lines.\n")
    other.write_text("Another one.")
    part.write_text("It has two lines.")
    searched = ["search.objective=text_nll", f"search.text={one}", "search.text_tokens=5"]

    def found(text, *more):
        settings = [f"calibration.text={text}", f"data.perplexity_text={one}", "data.perplexity_tokens=7"]
        return read_calibration_text(load_config(None, [*settings, *more]))

    assert found("null") is None and found(other) == ("Another one.", 0)
    assert found(one) == (one.read_text(), 7)
    # The search takes tokens 7 to 11; without the report 0 to 4.
    assert found(one, *searched)[1] == 12 and found(one, *searched, "data.perplexity_text=null")[1] == 5
    assert found(one, *searched[1:])[1] == 7, "a search text that nothing asks for uses no tokens"
    assert found(one, *searched, f"search.text={other}")[1] == 7
    assert found(other, *searched, f"search.text={other}")[1] == 5
    with pytest.raises(ConfigError, match="calibration.text = .* and data.perplexity_text = .* overlap"):
        found(part)
    with pytest.raises(ConfigError, match="calibration.text = .* and search.text = .* overlap"):
        found(part, *searched, "data.perplexity_text=null")


# -- similarity runs -------------------------------------------------------------------------------------------------


def similarity_run(path, subsets, *, n_layers=4, samples=(), influence=True):
    run = RunDirectory.open(path, {}, "similarity")
    for number, (subset, language) in enumerate(subsets):
        matrix = np.arange(n_layers**2, dtype=float).reshape(n_layers, n_layers) + 100 * number
        run.append(
            "similarity",
            [
                {
                    "subset": subset,
                    "language": language,
                    "measure": "npib",
                    "embedding": "diffusion",
                    "layer_i": i,
                    "layer_j": j,
                    "value": None if (i, j) == (1, 2) else float(value),
                    "n_samples": 57,
                }
                for (i, j), value in np.ndenumerate(matrix)
            ],
        )
        if influence:
            rows = [{"layer": layer, "value": layer / 10 + number, "n_samples": 57} for layer in range(n_layers)]
            run.append("block_influence", [{"subset": subset, "language": language, **row} for row in rows])
    run.append("samples", list(samples))
    return str(path)


def test_a_matrix_is_read_back_with_missing_values_and_block_influence(tmp_path):
    run = similarity_run(tmp_path / "run", [("all", "en")])
    matrix, influence = read_similarity(run, n_layers=4)
    expected = np.arange(16.0).reshape(4, 4)
    expected[1, 2] = np.nan
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_allclose(influence, [0, 0.1, 0.2, 0.3])
    other = similarity_run(tmp_path / "without", [("all", "en")], influence=False)
    assert read_similarity(other, n_layers=4)[1] is None


def test_one_matrix_of_several_must_be_named(tmp_path):
    run = similarity_run(tmp_path / "run", [("law", "en"), ("law", "es"), ("math", "en")])
    matrix, influence = read_similarity(run, n_layers=4, subset="law", language="es")
    assert matrix[0, 0] == 100 and influence[0] == 1.0
    assert read_similarity(run, n_layers=4, subset="math")[0][0, 0] == 200
    for choice, count in (({}, 3), ({"subset": "law"}, 2), ({"subset": "cs"}, 0)):
        with pytest.raises(ConfigError, match=f"holds {count} similarity matrices.*plan.similarity_subset"):
            read_similarity(run, n_layers=4, **choice)
    with pytest.raises(ConfigError, match="is for a model of 4 layers, this one has 28"):
        read_similarity(run, n_layers=28, subset="math")
    with pytest.raises(RunError, match="is not a run directory"):
        read_similarity(str(tmp_path / "nothing"), n_layers=4)


def test_reports_leave_out_what_the_similarity_has_seen(mmlu, tmp_path):
    plain = config(mmlu)
    before = read_questions(plain, REPORT).questions
    seen = [before[4], before[7]]
    samples = [
        {"subset": "all", "language": "es", "sample": i, "subject": q.subject, "split": "test"}
        | {"question_id": q.question_id, "content_hash": "of the Spanish text"}
        for i, q in enumerate(seen)
    ]
    samples += [{**samples[0], "sample": 2, "split": "dev", "question_id": "x", "content_hash": before[9].content_hash}]
    run = similarity_run(tmp_path / "run", [("all", "en")], samples=samples)
    with_run = config(mmlu, f"plan.similarity_run={run}")
    left = read_questions(with_run, REPORT).questions
    assert left == tuple(q for q in before if q not in (*seen, before[9]))
    assert read_questions(with_run, SEARCH) == read_questions(plain, SEARCH)
    limited = read_questions(config(mmlu, f"plan.similarity_run={run}", "data.report_limit_per_subject=2"), REPORT)
    botany = [q for q in left if q.subject == "botany"]
    assert limited.by_subject()["botany"] == sample(botany, 2, 0)


def test_a_search_sees_no_question_that_is_reported_on(mmlu, tmp_path):
    """Some 120 of MMLU's 1,531 validation questions stand in its test split as well."""
    root = tmp_path / "mmlu"
    shutil.copytree(mmlu / "en", root)

    def chess(*texts):
        (root / "val" / "chess_val.csv").write_text("\n".join(f'"{text}","a","b","c","d ","B"' for text in texts))
        return read_material(config(root, "data.subjects=chess"), (SEARCH, REPORT)).questions

    found = chess(" chess test 1 en?", "another?", "chess test 2 en?")
    assert [question.text for question in found[SEARCH].questions] == ["another?"]
    assert len(found[REPORT].questions) == 9
    with pytest.raises(DataError, match="every question of the search is reported on as well: set data.search_split"):
        chess("chess test 1 en?")
    # Nor does what blocks are chosen on, refits are fitted on or neurons are matched on, where nothing is searched.
    chess(" chess test 1 en?", "another?", "chess test 2 en?")
    asked = config(root, "data.subjects=chess", "sweep.alignments=[activations]")
    for roles in ((CALIBRATION,), (REPORT, CALIBRATION), (SEARCH, REPORT, CALIBRATION)):
        material = read_material(asked, roles)
        for used in (material.calibration, questions_to_match_on(asked, material)):
            assert [question.text for question in used.questions] == ["another?"]
    on_test = config(root, "data.subjects=chess", "data.search_split=test", "data.search_on_test=true")
    assert len(read_material(on_test, (SEARCH, REPORT)).questions[SEARCH].questions) == 9


def test_a_search_asks_the_subjects_that_its_objective_names(mmlu):
    """It asked all of them at every candidate, called them what the candidate was chosen on, and descended on all."""

    def found(objective, *more):
        settings = config(mmlu, f"search.objective={objective}", "search.text=demo", "search.searcher=bayes", *more)
        questions = read_material(settings, (SEARCH, REPORT)).questions
        assert questions[REPORT].subjects == ("anatomy", "botany", "chess")
        return questions[SEARCH].subjects

    assert found("accuracy:chess") == ("chess",)
    assert found("answer_nll:chess,anatomy+0.1*text_nll") == ("anatomy", "chess")
    assert found("accuracy:chess+micro_accuracy") == found("answer_kl") == ("anatomy", "botany", "chess")
    with pytest.raises(ConfigError, match=r"names \['ches'\] \(did you mean chess\?\), but .* 3 other subjects: anat"):
        found("accuracy:ches")
    domains = "data.domains={games: [chess], life: [anatomy, botany], law: [contracts, chess]}"
    assert found("accuracy:life", domains) == ("anatomy", "botany")
    assert found("accuracy:games", domains) == ("chess",)
    with pytest.raises(
        ConfigError, match=r"law names \['contracts'\], .*; complete domains among them are games, life; "
    ):
        found("accuracy:law", domains)
    with pytest.raises(ConfigError, match=r"\(did you mean games\?\)"):
        found("accuracy:game", domains)


def test_activations_asked_for_without_questions_stop_no_evaluation():
    """A worker refused `evaluate --mmlu none` under a configuration with them: "only evaluate can do without"."""
    for asked in ("plan.alignment=activations", "sweep.alignments=[activations]"):
        assert questions_to_match_on(load_config(None, ["data.mmlu=null", asked]), Material()) is None


def test_fewer_samples_than_subjects_are_one_each_of_the_first():
    (subset,) = read_subsets(load_config(None, ["similarity.measure=cka", "similarity.samples=4"]))
    assert list(counts(subset).values()) == [1] * 4


def test_neurons_are_matched_on_the_searchs_questions_where_activations_are_asked_for(mmlu):
    asked = config(mmlu, "plan.alignment=activations", "data.limit_per_subject=2")
    assert questions_to_match_on(asked, Material()).identity == read_questions(asked, SEARCH).identity
    subsets = read_subsets(config(mmlu, "similarity.subsets=[botany, chess]"))
    assert questions_to_match_on(config(mmlu), Material(subsets=subsets)) is subsets[0].questions
    assert questions_to_match_on(config(mmlu), Material()) is None


def test_tasks_are_read_where_they_are_asked_for(tmp_path):
    named = [(name, "format", name) for name in ("piqa", "boolq")]
    named += [(name, "file", task_files.write(tmp_path, name)) for name in ("piqa", "boolq")]
    settings = load_config(None, [f"tasks.{name}.{key}={value}" for name, key, value in named])
    assert list(read_tasks(settings, [SEARCH, task_role("boolq")])) == ["boolq"]


def test_what_a_model_is_asked_has_a_role_and_an_identity_each(mmlu):
    """By the identities driver and workers find that they read the same."""
    questions, (subset,) = read_questions(config(mmlu), SEARCH), read_subsets(config(mmlu))
    whole = Material(questions={SEARCH: questions}, subsets=[subset], search_text=("a", 7), calibration=questions)
    assert whole.roles == (SEARCH, SUBSETS, SEARCH_TEXT, CALIBRATION)
    assert whole.identities == {
        SEARCH: questions.identity,
        "all/en": subset.questions.identity,
        SEARCH_TEXT: text_hash("a"),
        CALIBRATION: questions.identity,
    }
    assert (Material().roles, Material().identities) == ((), {})


def test_of_a_run_s_matrices_only_the_one_that_is_asked_for_becomes_objects(tmp_path):
    """285 subsets (57 subjects, 5 languages) of 80 layers have 1.8 million rows: as objects 2 GB."""
    subsets, layers = 40, 20
    run = RunDirectory.open(tmp_path, {}, "similarity")
    i, j = (axis.ravel().astype(np.int32) for axis in np.indices((layers, layers)))
    table = pa.concat_tables(
        pa.table(
            {
                "subset": [f"subset_{number}"] * layers**2,
                **{name: [name] * layers**2 for name in ("language", "measure", "embedding")},
                "layer_i": i,
                "layer_j": j,
                "value": np.full(layers**2, number, dtype=float),
                "n_samples": np.full(layers**2, 40, dtype=np.int32),
            }
        )
        for number in range(subsets)
    )
    run.replace("similarity", table)
    tracemalloc.start()
    try:
        matrix, _ = read_similarity(str(tmp_path), n_layers=layers, subset="subset_7")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(matrix, np.full((layers, layers), 7.0))
    assert peak < 100 * table.num_rows, f"{peak / table.num_rows:.0f} bytes a row"
