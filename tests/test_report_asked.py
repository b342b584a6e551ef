"""What a page says that a run was asked."""

import pytest
from report_runs import (
    blocks,
)

from raymerge.report import (
    asked,
)
from raymerge.report.content import (
    Facts,
)
from raymerge.tables import RunDirectory


def test_a_search_by_random_candidates_is_said_to_have_no_random_control(tmp_path, search):
    facts = {fact.term: fact for fact in asked.asked(search).blocks[0].facts}
    assert facts["Search"].note == "2 random candidates as a control"
    search.config["search"] |= {"searcher": ["bayes", "random"]}
    facts = {fact.term: fact for fact in asked.asked(search).blocks[0].facts}
    search.config["search"] |= {"searcher": "bayes"}
    assert facts["Search"].note == ""


def test_what_was_asked_names_refits_and_calibration(tmp_path):
    settings = {"merges": [2], "methods": ["drop_block"], "refits": ["none", "linear", "units"], "refitted_methods": []}
    settings |= {"alpha_files": {"base": "a/alphas.json", "best": "b/alphas.json"}}
    config = {"plan": {"ridge": None, "refit_layers": 1}, "sweep": settings,
              "calibration": {"text": "a.txt", "tokens": 4096}}  # fmt: skip
    run = RunDirectory.open(tmp_path / "run", config, "sweep")
    (facts,) = blocks([asked.asked(run)], Facts)
    told = {fact.term: (fact.value, fact.note) for fact in facts.facts}
    assert told["Refits"] == ("linear, units", "ridge chosen on held-out tokens, 1 layer after each seam too")
    assert told["Calibration"] == ("a.txt", "up to 4096 tokens")
    assert told["Alpha files"][0] == "base: a/alphas.json, best: b/alphas.json"


def facts_of(run, manifest=None):
    """Value and note by term, the manifest being this one."""
    run.manifest = lambda: manifest
    (facts,) = blocks([asked.asked(run)], Facts)
    assert len({fact.term for fact in facts.facts}) == len(facts.facts)
    return {fact.term: (fact.value, fact.note) for fact in facts.facts}


MADE = {
    "command": ["raymerge", "search", "a b.yaml"], "status": "complete", "started": "2026-11-30T01:02:03Z",
    "seconds": 3725.4, "raymerge_version": "0.1.0", "git_commit": "0123456789abcdef", "git_dirty": True,
    "python": "3.11.7", "packages": {"torch": "2.10", "ray": None}, "platform": "Linux",
    "model": {"identity": "m1"}, "seeds": {"data": 3, "search": 7}, "text_hash": "t1",
    "workers": [{"host": host, "device": "cpu", "dtype": "float32"} for host in ("a", "b", "b")],
}  # fmt: skip


def test_everything_that_a_search_was_asked_is_on_its_page(tmp_path):
    """Two searchers, a block, a refit, limits of both splits, three workers on two machines."""
    config = {
        "model": {"path": "org/tiny", "dtype": "bfloat16", "revision": "r1", "quantise": "int8"},
        "data": {"mmlu": "/data", "language": "fr", "subjects": "all", "shots": 5, "report_split": "test",
                 "search_split": "validation", "limit_per_subject": 8, "report_limit_per_subject": 40,
                 "perplexity_text": "demo", "perplexity_tokens": 4096},
        "tasks": {"piqa": {"format": "piqa", "file": "v.jsonl"}, "arc": {"format": "arc", "file": "c.parquet"}},
        "plan": {"merges": 4, "selection": "block", "block": "cosine", "base": "similarity_ratio", "ratio": 0.62,
                 "beta": 2.0, "similarity_run": "runs/s", "alignment": "neurons", "norms": "fold", "biases": "merge",
                 "refit": "units", "ridge": 0.01, "refit_layers": 2},
        "search": {"searcher": ["bayes", "gradient"], "objective": "answer_nll", "candidates": 30,
                   "random_candidates": 1, "perplexity_ceiling": 20.0},
        "gradient": {"starts": 3, "epochs": 50, "optimizer": "adam"},
        "calibration": {"text": None, "tokens": 12288},
    }  # fmt: skip
    run = RunDirectory.open(tmp_path / "k4", config, "search")
    told = facts_of(run, MADE | {"data": {"search": "s", "report": "r"}})
    assert told == {
        "Model": ("org/tiny", "dtype bfloat16, revision r1, quantised to int8, identity m1"),
        "Questions": ("/data, language fr, 5-shot", "subjects: all"),
        "Splits": ("searched on validation, reported on test",
                   "at most 8 per subject for the search; at most 40 per subject for the report"),
        "Plain text": ("demo", "up to 4096 tokens"),
        "Further tasks": ("piqa (piqa, v.jsonl), arc (arc, c.parquet)", ""),
        "Merges (K)": ("4, selection block, block cosine", "alignment neurons, norms fold, biases merge"),
        "Starting coefficients": ("similarity_ratio, beta 2.0", "runs/s"),
        "Search": ("bayes, gradient; 30 candidates; 3 descents of 50 epochs, adam", "1 random candidate as a control"),
        "Objective": ("answer_nll", "perplexity at most 20.0"),
        "Refits": ("units", "ridge 0.01, 2 layers after each seam too"),
        "Calibration": ("prompts of the search questions", "up to 12288 tokens"),
        "Seeds": ("data 3, search 7", ""),
        "Versions": ("raymerge 0.1.0, commit 0123456789 with uncommitted changes", "Python 3.11.7, torch 2.10"),
        "Machine": ("3 workers on 2 hosts, cpu, float32", "Linux"),
        "Time": ("2026-11-30T01:02:03Z", "last call 1 h 2 min"),
        "Run": (str(tmp_path / "k4"), f"run id {run.run_id}"),
    }  # fmt: skip
    assert asked.command_of(run) == "raymerge search 'a b.yaml'"
    run.config |= {"search": run.config["search"] | {"searcher": "gradient", "perplexity_ceiling": None}}
    run.config |= {"plan": run.config["plan"] | {"base": "fixed", "similarity_run": None, "refit": "none"}}
    del run.config["calibration"]
    changed = facts_of(run, MADE | {"text_hash": None, "git_dirty": False, "workers": [], "started": None})
    assert changed["Search"] == ("gradient; 3 descents of 50 epochs, adam", "1 random candidate as a control")
    assert changed["Objective"] == ("answer_nll", "")
    assert changed["Starting coefficients"] == ("constant 0.62", "")
    assert changed["Versions"][0] == "raymerge 0.1.0, commit 0123456789"
    gone = {"Refits", "Calibration", "Plain text", "Splits", "Machine", "Time"}
    assert set(told) - set(changed) == gone and set(changed) <= set(told)


def test_what_other_runs_were_asked_is_on_their_pages(tmp_path):
    """Of an evaluation: no search, nor the questions that one would have had; of a run under way: no manifest."""
    data = {"mmlu": "/data", "language": "en", "subjects": ["law"], "shots": 0, "report_split": "validation",
            "search_split": "validation", "limit_per_subject": 8, "report_limit_per_subject": 40}  # fmt: skip
    plan = {"merges": 4, "selection": "tail", "base": "fixed", "ratio": 0.62, "refit": "units", "ridge": None}
    model = {"path": "/models/tiny/", "dtype": "auto", "quantise": "none"}
    run = RunDirectory.open(tmp_path / "e", {"model": model, "data": data}, "evaluate")
    told = facts_of(run, {"status": "complete", "data": {"report": "r"}})
    assert set(told) == {"Model", "Questions", "Splits", "Versions", "Run"}
    assert told["Model"] == ("/models/tiny/", "dtype auto") and asked.model_name(run) == "tiny"
    assert told["Questions"] == ("/data, language en, 0-shot", "subjects: law")
    assert told["Splits"] == ("reported on validation", "at most 40 per subject for the report")
    assert set(facts_of(run)) == {"Model", "Questions", "Run"}
    assert asked.command_of(run) == "unknown: the run has no manifest"

    settings = {"merges": [1, 2], "methods": ["drop", "fixed:0.5"], "alignments": ["none", "neurons"],
                "norms": ["keep"], "refits": ["none", "linear"], "refitted_methods": ["drop"]}  # fmt: skip
    config = {"model": model, "data": data | {"mmlu": None}, "plan": plan, "sweep": settings,
              "calibration": {"text": "demo", "tokens": 99}}  # fmt: skip
    told = facts_of(RunDirectory.open(tmp_path / "w", config, "sweep"))
    assert {term: told[term] for term in told.keys() - {"Model", "Run"}} == {
        "Questions": ("none", ""),
        "Merges (K)": ("1, 2", ""),
        "Ways of merging": ("drop, fixed:0.5", "alignment none, neurons; norms keep"),
        "Refits": ("linear of drop", "ridge chosen on held-out tokens"),
        "Calibration": ("demo", "up to 99 tokens"),
    }

    compared = {"samples": 40, "split": "validation", "subsets": ["medical", "law"], "languages": ["es", "fr"],
                "measure": "npib", "embedding": "diffusion", "sigma": 8.0, "dimensions": 2, "pooling": "last",
                "shots": 0}  # fmt: skip
    told = facts_of(RunDirectory.open(tmp_path / "s", {"data": data, "similarity": compared}, "similarity"))
    assert told["Model"] == ("not stored", "") and told["Questions"] == ("/data", "subjects: law")
    assert told["Prompts"] == ("40 per subset of validation: medical, law", "languages: es, fr")
    assert told["Similarity"] == (
        "measure npib, embedding diffusion",
        "bandwidth 8.0, 2 dimensions, pooling last, 0-shot",
    )


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (None, ["This run has no manifest: it is still running or was killed. Here is what it has so far."]),
        ({}, []),
        ({"warnings": ["one thing", "another"]}, ["one thing.", "another."]),
    ],
)
def test_what_is_amiss_stands_before_the_answer(search, monkeypatch, manifest, told):
    monkeypatch.setattr(search, "manifest", lambda: manifest)
    assert [notice.text for notice in asked.unfinished(search)] == told


def test_a_domain_is_not_counted_as_one_subject(tmp_path):
    """ "3 subjects: anatomy, medical, virology" were four."""
    data = {"mmlu": "demo", "subjects": ["anatomy", "medical", "virology"]}
    run = RunDirectory.open(tmp_path / "run", {"data": data}, "evaluate")
    (facts,) = blocks([asked.asked(run)], Facts)
    assert {f.term: f.note for f in facts.facts}["Questions"] == "subjects: anatomy, medical, virology"


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"merges": 13, "selection": "list", "base": "file"}, "as many as the alpha file has, selection list"),
        (
            {"merges": None, "threshold": 0.5, "selection": "most_similar"},
            "until no similarity exceeds 0.5, selection most_similar",
        ),
        (
            {"merges": 3, "threshold": 0.5, "selection": "most_similar"},
            "3, or fewer once no similarity exceeds 0.5, selection most_similar",
        ),
        ({"merges": 3, "selection": "block", "block": "loss"}, "3, selection block, block loss"),
    ],
)
def test_what_was_asked_says_how_many_merges_there_are(tmp_path, plan, told):
    run = RunDirectory.open(tmp_path / "run", {"plan": plan}, "search")
    (facts,) = blocks([asked.asked(run)], Facts)
    assert {fact.term: fact.value for fact in facts.facts}["Merges (K)"] == told
