"""What a run was asked: model, data, merges, search, seeds, versions and the command, from its config and manifest."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from raymerge.identity import without_secrets
from raymerge.report.content import Block, Fact, Facts, Figure, Listing, Notice, Rows, Section, View
from raymerge.report.wording import duration, listed, plural
from raymerge.schemas import Row
from raymerge.tables import RunDirectory


def command_of(run: RunDirectory) -> str:
    """The command that made a run, as its manifest has it."""
    command = (run.manifest() or {}).get("command")
    return shlex.join(str(word) for word in command) if command else "unknown: the run has no manifest"


def sources(run: RunDirectory, *tables: str) -> tuple[tuple[str, str], ...]:
    """(table, path of its parquet files) of tables, as `Rows` takes them."""
    folder = run.path_of("tables").rstrip("/")
    return tuple((table, f"{folder}/{table}/*.parquet") for table in tables)


def figure_of(
    run: RunDirectory, title: str, caption: str, views: Iterable[View], rows: list[Row], *tables: str, columns: int = 1
) -> Figure:
    """Drawings of rows, with where these lie (the tables that they come from) and the command that made them."""
    return Figure(title, caption, tuple(views), Rows.of(rows, sources(run, *tables)), command_of(run), columns)


def model_name(run: RunDirectory) -> str:
    """A model's name in a heading: the last part of its path."""
    path = str(run.config.get("model", {}).get("path") or "")
    return path.rstrip("/").rsplit("/", 1)[-1] or "unknown model"


def run_name(run: RunDirectory) -> str:
    """A run's name: the last part of its path."""
    return _parts(run)[-1]


def run_names(runs: Sequence[RunDirectory]) -> list[str]:
    """The names of runs that stand on one page: of those alike, as many last parts of their paths as tell them apart
    (a/eval and b/eval)."""
    every = [_parts(run) for run in runs]

    def name(parts: list[str]) -> str:
        others = [other for other in every if other != parts]
        needed = (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others))
        return "/".join(parts[-next(needed, len(parts)) :])

    return [name(parts) for parts in every]


def _parts(run: RunDirectory) -> list[str]:
    return without_secrets(run.path_of().rstrip("/")).split("/")


def unfinished(run: RunDirectory) -> list[Block]:
    """Notices of a run that has not ended well, and its own warnings."""
    manifest = run.manifest()
    if manifest is None:
        return [Notice("This run has no manifest: it is still running or was killed. Here is what it has so far.")]
    return [Notice(f"{warning}.") for warning in manifest.get("warnings", [])]


def asked(run: RunDirectory) -> Section:
    """Everything that the results depend on, and the command that repeats them."""
    config, manifest = run.config, run.manifest() or {}
    known = [
        _model(config.get("model", {}), manifest),
        *_data(config.get("data", {}), manifest, config.get("similarity", {})),
        *_tasks(config.get("tasks") or {}),
        *_plan(config.get("plan", {}), run.experiment),
        *_search(config, run.experiment),
        *(_calibration(config) if run.experiment in ("search", "sweep") else []),
        *_similarity(config.get("similarity", {})),
        *_seeds(manifest),
        *_versions(manifest),
        *_machine(manifest),
        Fact("Run", without_secrets(run.path_of().rstrip("/")), f"run id {run.run_id}"),
    ]
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)
    return Section(
        "Configuration",
        (
            Facts(tuple(known)),
            Listing(command_of(run)),
            Listing(text, "Every option of this run (config.yaml)"),
        ),
    )


def _model(model: Mapping[str, Any], manifest: Mapping[str, Any]) -> Fact:
    identity = (manifest.get("model") or {}).get("identity")
    parts = [
        f"dtype {model['dtype']}" if model.get("dtype") else "",
        f"revision {model['revision']}" if model.get("revision") else "",
        f"quantised to {model['quantise']}" if model.get("quantise") not in (None, "none") else "",
        f"identity {identity}" if identity else "",
    ]
    return Fact("Model", str(model.get("path") or "not stored"), ", ".join(part for part in parts if part))


def _data(data: Mapping[str, Any], manifest: Mapping[str, Any], similarity: Mapping[str, Any]) -> list[Fact]:
    """What the questions are. A similarity has languages and examples of its own: `_similarity` tells of those."""
    if not data:
        return []
    subjects = data.get("subjects") or "all"
    named = f"subjects: {subjects}"
    if not isinstance(subjects, str):
        named = f"subjects: {listed(subjects)}"  # without their number: some may be domains
    if "mmlu" in data and data["mmlu"] is None:
        return [Fact("Questions", "none"), *_text(data, manifest)]
    asked = [str(data.get("mmlu"))]
    asked += [] if similarity.get("languages") else [f"language {data.get('language')}"]
    asked += [] if similarity else [f"{data.get('shots') or 0}-shot"]
    facts = [Fact("Questions", ", ".join(asked), named)]
    if (manifest.get("data") or {}).keys() & {"search", "report"}:
        limits = [
            f"at most {data[key]} per subject for the {what}"
            for key, what in (("limit_per_subject", "search"), ("report_limit_per_subject", "report"))
            if what in manifest["data"] and data.get(key) is not None
        ]
        split = f"searched on {data.get('search_split')}, " if "search" in manifest["data"] else ""
        facts.append(Fact("Splits", f"{split}reported on {data.get('report_split')}", "; ".join(limits)))
    return [*facts, *_text(data, manifest)]


def _text(data: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Fact]:
    if not manifest.get("text_hash"):
        return []
    return [Fact("Plain text", str(data.get("perplexity_text")), f"up to {data.get('perplexity_tokens')} tokens")]


def _tasks(tasks: Mapping[str, Any]) -> list[Fact]:
    """The further tasks, by name, with the file of each."""
    named = [f"{name} ({task.get('format')}, {task.get('file')})" for name, task in tasks.items()]
    return [Fact("Further tasks", listed(named))] if named else []


def _plan(plan: Mapping[str, Any], experiment: str) -> list[Fact]:
    if not plan or experiment != "search":
        return []
    options = f"alignment {plan.get('alignment')}, norms {plan.get('norms')}, biases {plan.get('biases')}"
    base = plan.get("base") if plan.get("base") != "fixed" else f"constant {plan.get('ratio')}"
    base = f"{base}, beta {plan.get('beta')}" if base == "similarity_ratio" else base
    chosen = f", block {plan.get('block')}" if plan.get("selection") == "block" else ""
    return [
        Fact("Merges (K)", f"{_how_many(plan)}, selection {plan.get('selection')}{chosen}", options),
        Fact("Starting coefficients", str(base), str(plan.get("similarity_run") or plan.get("alpha_file") or "")),
    ]


def _how_many(plan: Mapping[str, Any]) -> str:
    merges, threshold = plan.get("merges"), plan.get("threshold")
    if plan.get("selection") == "list":
        return "as many as the alpha file has"
    if merges is None:
        return f"until no similarity exceeds {threshold}"
    return str(merges) if threshold is None else f"{merges}, or fewer once no similarity exceeds {threshold}"


def _search(config: Mapping[str, Any], experiment: str) -> list[Fact]:
    if experiment == "sweep":
        sweep = config.get("sweep", {})
        files = [f"{name}: {path}" for name, path in (sweep.get("alpha_files") or {}).items()]
        return [
            Fact("Merges (K)", listed([str(k) for k in sweep.get("merges", [])], 20)),
            Fact(
                "Ways of merging",
                listed([str(method) for method in sweep.get("methods", [])], 20),
                f"alignment {listed(sweep.get('alignments', []))}; norms {listed(sweep.get('norms', []))}",
            ),
            *([Fact("Alpha files", listed(files, 20))] if files else []),
            *_refits(config.get("plan", {}), sweep.get("refits", []), sweep.get("refitted_methods")),
        ]
    search = config.get("search") if experiment == "search" else None
    if not search:
        return []
    named = search.get("searcher")
    searchers = [str(named)] if isinstance(named, str) else [str(name) for name in named or []]
    gradient = config.get("gradient") or {}
    how = [plural(search.get("candidates") or 0, "candidate")] if searchers != ["gradient"] else []
    if "gradient" in searchers:
        starts = plural(gradient.get("starts") or 0, "descent")
        how.append(f"{starts} of {gradient.get('epochs')} epochs, {gradient.get('optimizer')}")
    ceiling = search.get("perplexity_ceiling")
    return [
        Fact(
            "Search",
            "; ".join([listed(searchers), *how]),
            # A search by random candidates has no other ones as a control.
            ""
            if "random" in searchers
            else f"{plural(search.get('random_candidates') or 0, 'random candidate')} as a control",
        ),
        Fact("Objective", str(search.get("objective")), "" if ceiling is None else f"perplexity at most {ceiling}"),
        *_refits(config.get("plan", {}), [config.get("plan", {}).get("refit")]),
    ]


def _refits(plan: Mapping[str, Any], refits: Sequence[str | None], methods: list[str] | None = None) -> list[Fact]:
    """How seams are refitted; nothing where none is."""
    used = [str(refit) for refit in refits if refit not in (None, "none")]
    if not used:
        return []
    ridge = plan.get("ridge")
    how = f"ridge {'chosen on held-out tokens' if ridge is None else ridge}"
    further = plan.get("refit_layers")
    how += f", {plural(further, 'layer')} after each seam too" if further else ""
    return [Fact("Refits", listed(used) + (f" of {listed(methods)}" if methods else ""), how)]


def _calibration(config: Mapping[str, Any]) -> list[Fact]:
    """What blocks are chosen and refits made on: a run that does neither stores no such section."""
    settings = config.get("calibration")
    if not settings:
        return []
    text = settings.get("text")
    where = "prompts of the search questions" if text is None else str(text)
    return [Fact("Calibration", where, f"up to {settings.get('tokens')} tokens")]


def _similarity(settings: Mapping[str, Any]) -> list[Fact]:
    if not settings:
        return []
    languages = settings.get("languages")
    return [
        Fact(
            "Prompts",
            f"{settings.get('samples')} per subset of {settings.get('split')}: {listed(settings.get('subsets') or [])}",
            "" if not languages else f"languages: {listed(languages)}",
        ),
        Fact(
            "Similarity",
            f"measure {settings.get('measure')}, embedding {settings.get('embedding')}",
            f"bandwidth {settings.get('sigma')}, {settings.get('dimensions')} dimensions, pooling "
            f"{settings.get('pooling')}, {settings.get('shots')}-shot",
        ),
    ]


def _seeds(manifest: Mapping[str, Any]) -> list[Fact]:
    seeds = manifest.get("seeds") or {}
    return [Fact("Seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items()))] if seeds else []


def _versions(manifest: Mapping[str, Any]) -> list[Fact]:
    if not manifest:
        return []
    commit = str(manifest.get("git_commit") or "")[:10]
    dirty = " with uncommitted changes" if manifest.get("git_dirty") else ""
    packages = [f"{name} {version}" for name, version in (manifest.get("packages") or {}).items() if version]
    return [
        Fact(
            "Versions",
            f"raymerge {manifest.get('raymerge_version')}{f', commit {commit}{dirty}' if commit else ''}",
            ", ".join([f"Python {manifest.get('python')}", *packages]),
        )
    ]


def _machine(manifest: Mapping[str, Any]) -> list[Fact]:
    workers = [worker for worker in manifest.get("workers") or [] if isinstance(worker, dict)]
    facts = []
    if workers:
        hosts, devices = {str(w.get("host")) for w in workers}, sorted({str(w.get("device")) for w in workers})
        kinds = sorted({str(worker.get("dtype")) for worker in workers})
        facts.append(
            Fact(
                "Machine",
                f"{plural(len(workers), 'worker')} on {plural(len(hosts), 'host')}, {listed(devices)}, {listed(kinds)}",
                str(manifest.get("platform") or ""),
            )
        )
    if manifest.get("started"):
        facts.append(Fact("Time", f"{manifest['started']}", f"last call {duration(manifest.get('seconds') or 0.0)}"))
    return facts
