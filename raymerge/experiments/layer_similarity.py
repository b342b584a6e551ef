"""`similarity`, `import_similarity` and `sensitivity`: how alike a model's layers are, on which prompts, how surely."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from raymerge.config import Config, ConfigError
from raymerge.config_file import check_config
from raymerge.diffusion import SimilarityError, degeneracy
from raymerge.embedding import check_installed
from raymerge.experiments.common import (
    Inputs,
    check_room,
    counted,
    describe_workers,
    draw_figures,
    finish,
    open_pool,
    open_run,
    read_inputs,
    runtime,
    settings_of,
    swept_cache,
)
from raymerge.inputs import SUBSETS, Subset
from raymerge.parts import part_name
from raymerge.pool import WorkerPool
from raymerge.progress import Progress, Silent, step
from raymerge.reliability import RELIABLE_N, Correlation, Study, check_samples, correlate, correlate_matrices
from raymerge.sensitivity import recipe_of
from raymerge.similarity import MEASURES, smallest_sample
from raymerge.tables import IMPORTED, Row, RunDirectory, layer_ranges
from raymerge.worker import SubsetSimilarity


def similarity(
    config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None
) -> RunDirectory:
    """Compare the layers of one model on every subset of prompts: matrices with their noise, and their correlations.

    Leaves in config.output.run: tables similarity, similarity_correlation, embeddings, degeneracy, samples,
    block_influence; figures; the manifest. Subsets are shared out over the workers; what is collected and computed of a
    subset is not collected or computed again. Raises ConfigError, CheckpointError, DataError before anything is
    written, RunError where the run directory cannot be used, SimilarityError and ActivationError where the prompts
    cannot be compared.
    """
    check_config(config)
    progress = progress or Silent()
    settings = settings_of(config, "model", "data", "similarity")
    RunDirectory.check(config.output.run, settings, "similarity")
    with step(progress, "reading model and prompts"):
        inputs = read_inputs(config, (SUBSETS,), text=False)
    check_samples(recipe_of(config.similarity), config.similarity.samples)
    run = open_run(config, "similarity", settings, inputs, progress)
    if run.complete:
        return run
    if MEASURES[config.similarity.measure] == "embeddings":
        check_installed(config.similarity.embedding)
    with _workers(config, inputs, run, progress) as (pool, workers):
        progress.stage("similarity (subsets)", len(inputs.subsets))

        def store(number: int, result: SubsetSimilarity) -> None:
            _store(config, run, inputs.subsets[number], result)

        results = pool.map("similarity", range(len(inputs.subsets)), counted(progress, then=store))
    studies = [found.study for found in results]
    with step(progress, "correlations of the matrices"):
        named = [((of.name, of.language), found) for of, found in zip(inputs.subsets, studies, strict=True)]
        correlations, uncorrelated = _correlations(config.similarity.measure, named, correlate)
        run.replace("similarity_correlation", correlations)
    distinct = [found.distinct for found in results]
    warnings = _repeated_samples(config, inputs.subsets, distinct) + degenerate_maps(run)
    warnings += uncorrelated + _low_ceilings(studies)
    for warning in warnings:
        progress.message(warning)
    scripts = ["heatmaps.py", *(["correlations.py"] if correlations else [])]
    scripts += ["embeddings.py"] if run.has("embeddings") else []
    seeds = {"similarity": config.similarity.seed}
    finish(run, config, inputs, scripts, progress, command=command, seeds=seeds, workers=workers, warnings=warnings)
    return run


@contextmanager
def _workers(
    config: Config, inputs: Inputs, run: RunDirectory, progress: Progress
) -> Iterator[tuple[WorkerPool, list[dict[str, Any]]]]:
    """A pool with a worker for each subset at the most, and what they hold."""
    with (
        runtime(config, progress),
        swept_cache(config, run) as cache,
        open_pool(config, inputs, cache, run=run, most=len(inputs.subsets), progress=progress) as pool,
    ):
        workers = describe_workers(pool, inputs, progress, run)
        machines = len({worker["host"] for worker in workers})  # each subset is cached on one of them
        rooms = [(needed // machines, *there) for needed, *there in pool.broadcast("activations_room")]
        fewer = "fewer similarity.samples, similarity.subsets or similarity.languages, or similarity.pooling=sequence"
        check_room(rooms, "activations of the subsets", fewer, progress)
        yield pool, workers


def _store(config: Config, run: RunDirectory, subset: Subset, found: SubsetSimilarity) -> None:
    """The rows of one subset, as one part of each table."""
    settings = config.similarity
    common = {"subset": subset.name, "language": subset.language}
    part = part_name(subset.name, subset.language)
    run.append("samples", sample_rows(subset), part=part)
    run.append(
        "block_influence",
        [
            common | {"layer": layer, "value": float(value), "n_samples": found.study.n_samples}
            for layer, value in enumerate(found.block_influence)
        ],
        part=part,
    )
    if found.embedded is not None:
        coordinates, rank, mass = found.embedded
        run.append("embeddings", embedding_rows(common, settings.embedding, coordinates), part=part)
        run.append(
            "degeneracy",
            [
                common | {"layer": layer, "effective_rank": float(r), "off_diagonal_mass": float(m)}
                for layer, (r, m) in enumerate(zip(rank, mass, strict=True))
                if np.isfinite(r)
            ],
            part=part,
        )
    embedding = "none" if found.embedded is None else settings.embedding
    names = common | {"measure": settings.measure, "embedding": embedding}
    run.append("similarity", similarity_rows(names, found.study), part=part)


def sample_rows(subset: Subset) -> list[Row]:
    """Which prompts a subset's matrix is made of."""
    return [
        {
            "subset": subset.name,
            "language": subset.language,
            "sample": number,
            "subject": question.subject,
            "split": question.split,
            "question_id": question.question_id,
            "content_hash": question.content_hash,
        }
        for number, question in enumerate(subset.questions.questions)
    ]


def embedding_rows(common: Row, embedding: str, coordinates: np.ndarray) -> list[Row]:
    """Every sample's coordinates (L, N, d) at every layer."""
    return [
        common | {"embedding": embedding, "layer": layer, "sample": sample, "coordinate": axis, "value": float(value)}
        for (layer, sample, axis), value in np.ndenumerate(coordinates)
    ]


def similarity_rows(names: Row, found: Study) -> list[Row]:
    """Every entry of a matrix with its null and interval; undefined entries are null with a note, never NaN."""
    beside = ("null_mean", "null_p95", "ci_low", "ci_high")
    return [
        names
        | {"layer_i": i, "layer_j": j, "value": _known(value)}
        | {name: _known(getattr(found, name)[i, j]) for name in beside}
        | {"n_samples": found.n_samples, "note": found.matrix.notes.get((i, j))}
        for (i, j), value in np.ndenumerate(found.matrix.values)
    ]


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _correlations(
    measure: str, named: Sequence[tuple[tuple[str, str], Any]], correlate: Callable[[Any, Any], Correlation]
) -> tuple[list[Row], list[str]]:
    """Rows of `similarity_correlation` for every two of `named`, and a warning of pairs that have no correlation:
    matrices with nothing in them have none, and the others are correlated all the same.

    named: ((subset, language), what `correlate` takes) of each matrix.
    """
    rows, without = [], []
    for (a, x), (b, y) in combinations(named, 2):
        try:
            rows.append(correlation_row(measure, a, b, correlate(x, y)))
        except SimilarityError as error:
            without.append(f"{'/'.join(a)} and {'/'.join(b)}: {error}")
    if not without:
        return rows, []
    pairs = "pair of subsets has" if len(without) == 1 else "pairs of subsets have"
    return rows, [f"{len(without)} {pairs} no correlation, such as {without[0]}"]


def correlation_row(measure: str, a: tuple[str, str], b: tuple[str, str], found: Correlation) -> Row:
    """One row of `similarity_correlation`; a and b are (subset, language)."""
    return {
        "subset_a": a[0],
        "language_a": a[1],
        "subset_b": b[0],
        "language_b": b[1],
        "measure": measure,
        **asdict(found),
    }


def _repeated_samples(config: Config, subsets: Sequence[Subset], distinct: Sequence[int]) -> list[str]:
    """Warnings of samples that are the same: those of one subject share their few-shot prefix, which may fill
    max_tokens (those of the two legal subjects have 532 and 1,392 tokens, so that of 40 samples only 2 differ within
    512). Where whole prompts are read, the source asks a question twice (MMLU's test questions of college_physics)."""
    settings = config.similarity
    why = " in their first {0} tokens: set similarity.shots to 0, pooling to last, or raise max_tokens"
    if settings.pooling != "sequence":
        why = ": the source has a question several times, which counts as several samples"
    return [
        f"{subset.name} ({subset.language}): only {count} of {settings.samples} samples differ"
        + why.format(settings.max_tokens)
        for subset, count in zip(subsets, distinct, strict=True)
        if count < settings.samples
    ]


def _low_ceilings(studies: Sequence[Study]) -> list[str]:
    """A warning of correlations whose ceilings are too low to be read against, where there are any."""
    n = studies[0].n_samples
    if n >= RELIABLE_N or sum(len(found.halves) > 0 for found in studies) < 2:
        return []
    return [
        f"with {n} samples per subset the ceilings of correlations are too low, since halves of {n // 2} are noisier "
        f"than assumed: set similarity.samples to {RELIABLE_N} or more"
    ]


def degenerate_maps(run: RunDirectory) -> list[str]:
    """Warnings of diffusion maps that are noise: kernels that are all but the identity, or all but constant."""
    sizes = Counter((row["subset"], row["language"]) for row in run.read("samples").to_pylist())
    bad: dict[tuple[str, str, str], list[int]] = {}
    for row in run.read("degeneracy").to_pylist():
        key = row["subset"], row["language"]
        if side := degeneracy(row["effective_rank"], sizes[key]):
            bad.setdefault((*key, side), []).append(row["layer"])
    return [
        f"{subset} ({language}): the diffusion map is degenerate in {len(layers)} layers ({layer_ranges(layers)}): the "
        f"bandwidth is far {side} the distances ("
        + ("effective rank above 90 % of the samples" if side == "below" else "effective rank near 1")
        + "); similarities there are noise. Try similarity.sigma: median"
        for (subset, language, side), layers in bad.items()
    ]


# -- matrices from elsewhere ----------------------------------------------------------------------------------------


def import_similarity(
    files: Sequence[str | Path], out: str, *, command: Sequence[str] | None = None, progress: Progress | None = None
) -> RunDirectory:
    """Bring foreign (L, L) matrices in .npy files into a run: subset = file stem without a trailing `_40s`.

    Leaves tables similarity (without noise: the samples are not at hand) and similarity_correlation. Raises ConfigError
    for a file that is no square matrix, files of different sizes or two of one name.
    """
    progress = progress or Silent()
    paths = [Path(file) for file in files]
    matrices = {path.stem.removesuffix("_40s"): _read_matrix(path) for path in paths}
    if len(matrices) < len(paths):
        raise ConfigError(f"{len(paths)} files give {len(matrices)} subset names ({', '.join(matrices)}): rename some")
    sizes = {name: len(matrix) for name, matrix in matrices.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"the matrices have different numbers of layers, {sizes}: they cannot be compared")
    run = RunDirectory.open(out, {"files": [str(path.resolve()) for path in paths]}, "import-similarity")
    run.begin()
    rows = []
    for name, matrix in matrices.items():
        names = {"subset": name, "language": IMPORTED, "measure": IMPORTED, "embedding": IMPORTED, "n_samples": 0}
        rows += [
            names | {"layer_i": i, "layer_j": j, "value": _known(value)} for (i, j), value in np.ndenumerate(matrix)
        ]
    run.replace("similarity", rows)
    named = [((name, IMPORTED), matrix) for name, matrix in matrices.items()]
    found, warnings = _correlations(IMPORTED, named, correlate_matrices)
    run.replace("similarity_correlation", found)
    scripts = ["heatmaps.py", *(["correlations.py"] if found else [])]
    run.write_manifest(command=command, figures=draw_figures(run, scripts, progress), warnings=warnings)
    return run


def _read_matrix(file: Path) -> np.ndarray:
    try:
        with open(file, "rb") as opened:  # here, since NumPy leaves a broken .npz open
            matrix = np.load(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:  # the last two of an empty file and of a broken .npz
        raise ConfigError(f"{file} cannot be read as a NumPy array: {error}") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        shape = getattr(matrix, "shape", type(matrix).__name__)
        raise ConfigError(f"{file} holds {shape}, but must hold an (L, L) matrix of at least two layers")
    if not np.issubdtype(matrix.dtype, np.number) or np.iscomplexobj(matrix):
        raise ConfigError(f"{file} holds {matrix.dtype}, but must hold real numbers")
    return matrix.astype(np.float64)


# -- sensitivity ----------------------------------------------------------------------------------------------------


def sensitivity(
    config: Config, *, command: Sequence[str] | None = None, progress: Progress | None = None
) -> RunDirectory:
    """Vary every setting of the similarity section, one at a time: does it change the matrices, or the plans?

    Leaves table sensitivity, one figure, the manifest. The rows of a subset are stored as soon as they are there: the
    same call again goes on with the others. Errors as `similarity`.
    """
    check_config(config)
    progress = progress or Silent()
    settings = settings_of(config, "model", "data", "similarity", "sensitivity")
    RunDirectory.check(config.output.run, settings, "sensitivity")
    with step(progress, "reading model and prompts"):
        inputs = read_inputs(config, (SUBSETS,), text=False)
    _check_ranges(config, inputs)
    run = open_run(config, "sensitivity", settings, inputs, progress)
    if run.complete:
        return run
    for method in (config.similarity.embedding, *config.sensitivity.embedding):
        check_installed(method)
    stored = {(row["subset"], row["language"]) for row in run.read("sensitivity", ["subset", "language"]).to_pylist()}
    left = [number for number, of in enumerate(inputs.subsets) if (of.name, of.language) not in stored]

    def store(number: int, found: list[Row]) -> None:
        of = inputs.subsets[left[number]]
        run.append("sensitivity", found, part=part_name(of.name, of.language))

    with _workers(config, inputs, run, progress) as (pool, workers):
        progress.stage("sensitivity (subsets)", len(left))
        pool.map("sensitivity", left, counted(progress, then=store))
    order = {(of.name, of.language): number for number, of in enumerate(inputs.subsets)}
    found = run.read("sensitivity").to_pylist()
    run.replace("sensitivity", sorted(found, key=lambda row: order[row["subset"], row["language"]]))
    finish(run, config, inputs, ["sensitivity.py"], progress, command=command, workers=workers)
    return run


def _check_ranges(config: Config, inputs: Inputs) -> None:
    merges, n_layers = config.sensitivity.merges, inputs.checkpoint.n_layers
    if merges >= n_layers:
        raise ConfigError(f"sensitivity.merges is {merges}, but the model has {n_layers} layers: lower it")
    if too_many := [count for count in config.sensitivity.samples if count > config.similarity.samples]:
        raise ConfigError(
            f"sensitivity.samples {too_many} are more than the {config.similarity.samples} of similarity.samples"
        )
    if config.similarity.samples < (least := smallest_sample(recipe_of(config.similarity))):
        raise ConfigError(
            f"similarity.samples is {config.similarity.samples}, but measure {config.similarity.measure} of "
            f"{config.similarity.dimensions} dimensions needs at least {least}"
        )
