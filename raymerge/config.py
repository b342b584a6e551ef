"""Every option and its default, as immutable sections; unknown keys are refused.

This module is the only home of defaults: other modules take what they need as arguments and have none of their own
for these.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator, model_validator

from raymerge.errors import UserError
from raymerge.objectives import parse_objective
from raymerge.plan import FIXED_RATIO

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # of the user's choice
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy and scikit-learn take
_AT_LEAST_ONE = Field(min_length=1)  # entries of a list: with none a run would quietly measure nothing


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key, its value and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """The model.
    - `path`: demo, a folder, a hub id, or a .gguf file, which is dequantised once into ~/.cache/raymerge (needs the
      extra gguf).
    - `dtype`: dtype of the computation; auto is float32 on CPUs and the stored dtype on GPUs.
    - `revision`: branch, tag or commit of a hub id; null is main.
    - `add_bos`: whether to put the BOS token before prompts and windows of text; null does as the tokenizer does.
    - `quantise`: evaluate models with the matrices of every decoder layer rounded to int8 or int4 after merging (needs
      the extra quant); saved checkpoints are not quantised.
    - `trust_remote_code`: run the model repository's own Python.
    """

    path: str = "demo"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    add_bos: bool | None = None
    quantise: Literal["none", "int8", "int4"] = "none"
    trust_remote_code: bool = False


class DataConfig(_Section):
    """Questions and text.
    - `mmlu`: demo, a folder (CSV or parquet) or a hub id; null asks no questions (similarity needs some).
    - `revision`: revision of the hub id.
    - `language`: which of the source's languages to use.
    - `subjects`: all, or a list of subjects and domains.
    - `domains`: additional domains as lists of subjects; a known name is replaced.
    - `shots`: examples from split dev before each question.
    - `search_split`: the split that a search chooses by. It can be test only with `search_on_test`: true, and the
      report then says so.
    - `report_split`: the split that is reported.
    - `limit_per_subject`, `report_limit_per_subject`: maximum number of questions per subject, to search on and to
      report on, drawn with `seed`.
    - `perplexity_text`: demo, a file (UTF-8, or parquet or JSON lines with a column text), a file of a hub data set as
      OWNER/NAME[@REVISION]:FILE, or null. At most the first 32 million characters of a file are read.
    - `perplexity_tokens`: maximum number of its tokens to use.
    - `question_perplexity`: also measure the loss of the questions' own prompt tokens. This takes the whole vocabulary
      at every token, so it costs far more than the answers do.
    """

    mmlu: str | None = "demo"
    revision: str | None = None
    language: str = "en"
    subjects: Literal["all"] | list[str] = "all"
    domains: dict[str, list[str]] = {}
    shots: Annotated[int, Field(ge=0)] = 5
    search_split: Literal["validation", "test", "dev"] = "validation"
    report_split: Literal["validation", "test"] = "test"
    search_on_test: bool = False
    limit_per_subject: Positive | None = None
    report_limit_per_subject: Positive | None = None
    seed: Seed = 0
    perplexity_text: str | None = "demo"
    perplexity_tokens: Annotated[int, Field(ge=2)] = 8192
    question_perplexity: bool = False

    @field_validator("subjects", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all":
            return [name.strip() for name in value.split(",") if name.strip()]
        return value


Alignment = Literal["none", "rows", "neurons", "activations"]
RefitMethod = Literal["none", "linear", "scale", "outputs", "units"]
BlockMeasure = Literal["cosine", "angular", "similarity", "loss", "search"]
TaskFormat = Literal["piqa", "hellaswag", "arc", "openbookqa", "boolq", "race"]


class TaskConfig(_Section):
    """One task of the tasks section."""

    format: TaskFormat
    file: str
    limit: Positive | None = None
    shots: Annotated[int, Field(ge=0)] = 0
    examples: str | None = None

    @model_validator(mode="after")
    def _has_its_examples(self) -> TaskConfig:
        if self.shots and self.examples is None:
            raise ValueError(f"shots is {self.shots}, so examples must name a file of the same format, such as train")
        return self


class TasksConfig(RootModel[dict[Name, TaskConfig]]):
    """Other multiple-choice tasks that evaluate, search and sweep report on, under names of your choice, such as {piqa:
    {format: piqa, file: validation.jsonl}}. They are asked as lm-eval asks them, and choices are ranked by
    log-likelihood.
    - `format`: piqa, hellaswag, arc, openbookqa, boolq or race.
    - `file`: JSON lines or parquet with the columns of the hub's data set.
    - `limit`: maximum number of items, drawn with data.seed.
    - `shots`: number of examples before each item: the first ones of the file `examples`.
    """

    model_config = ConfigDict(frozen=True)


class PlanConfig(_Section):
    """What is merged, and the base coefficients.
    - `selection`: which layers are merged. tail: the last `merges` layers. block: a contiguous block of `merges`
      layers. most_similar: repeatedly the most similar neighbours, until there are `merges` merges (null for any
      number) or none exceeds `threshold`. list: the steps of `alpha_file`.
    - `recompute`: with most_similar, collect the similarities anew after each merge (in a search or sweep).
    - `block`: the first layer of the block, or how it is chosen. cosine, angular: the smallest distance between the
      states that enter the block and those that leave it, on calibration.text. similarity: by `similarity_run`, with
      any measure. loss: the smallest loss on calibration.text with the block dropped. search: first layer and
      coefficients together, beginning with the choice by cosine.
    - `starts`: the first layers to choose from. null means all; if blocks are averaged and layers differ in attention
      (Gemma 2 and 3), all whose block can be averaged.
    - `survivor`: whether the block is merged into the layer before it or the layer after it.
    - `base`: the base coefficients: fixed (`ratio` everywhere), similarity_ratio or similarity (from `similarity_run`),
      or file (from `alpha_file`).
    - `beta`: the weight of the similarities in similarity_ratio (published 1): alpha = sigmoid(beta · r), where r is
      the share of the remaining layer in the mean similarities of both.
    - `similarity_run`: a run of `raymerge similarity`. Its prompts are left out of every report. `similarity_subset`
      and `similarity_language` choose among its matrices.
    - `refit`: none, or how the layers at the seams are fitted to the unmerged model on the calibration, in closed form:
      linear (ReplaceMe), scale (the part of LinearPatch that needs no matrix), outputs, or units (outputs, after
      choosing MLP units among those of all merged layers). A search fits only the plans that it found.
    - `ridge`: how strongly fitted weights are held to their values before the fit; null chooses it on held-out tokens.
    - `refit_layers`: how many layers after each seam are fitted too (outputs, units).
    - `alignment`: none, rows (published), neurons or activations. The last two reorder the layers' neurons without
      changing what the layers compute, matched by weights or by activations on prompts of the first questions.
    - `norms`: keep those of the remaining layer (published), or fold each layer's gains into its matrices, and the
      biases of its norms into the biases of its matrices.
    - `biases`: keep those of the remaining layer (published), or merge them like the matrices.
    """

    merges: Positive | None = 13
    selection: Literal["tail", "block", "most_similar", "list"] = "tail"
    block: Annotated[int, Field(ge=0)] | BlockMeasure = "cosine"
    starts: list[Annotated[int, Field(ge=0)]] | None = None
    survivor: Literal["before", "after"] = "before"
    threshold: float | None = None
    recompute: bool = False
    base: Literal["fixed", "similarity_ratio", "similarity", "file"] = "fixed"
    ratio: Annotated[float, Field(ge=0, le=1)] = round(FIXED_RATIO, 4)
    beta: float = 1.0
    similarity_run: str | None = None
    similarity_subset: str | None = None
    similarity_language: str | None = None
    alpha_file: str | None = None
    alignment: Alignment = "none"
    norms: Literal["keep", "fold"] = "keep"
    biases: Literal["keep", "merge"] = "keep"
    refit: RefitMethod = "none"
    ridge: Annotated[float, Field(gt=0)] | None = None
    refit_layers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _has_its_source(self) -> PlanConfig:
        if self.base == "file" and not self.alpha_file:
            raise ValueError("base is file, so alpha_file must name one")
        if self.base.startswith("similarity") and not self.similarity_run:
            raise ValueError(f"base is {self.base}, so similarity_run must name the run of `raymerge similarity`")
        if self.selection == "most_similar":
            if not self.similarity_run:
                raise ValueError(
                    "selection is most_similar, so similarity_run must name a run of `raymerge similarity`"
                )
            if self.merges is None and self.threshold is None:
                raise ValueError("selection is most_similar, so merges or threshold must say where to stop")
        elif self.threshold is not None or self.recompute:
            raise ValueError(f"selection is {self.selection}, but threshold and recompute belong to most_similar")
        elif self.selection == "list" and self.base != "file":
            raise ValueError("selection is list, so base must be file and alpha_file name one")
        elif self.selection in ("tail", "block") and self.merges is None:
            raise ValueError(f"selection is {self.selection}, which needs merges")
        if self.selection in ("block", "most_similar") and self.base == "file":
            raise ValueError(
                f"selection is {self.selection}, but an alpha file names its own layers: set selection to list"
            )
        if self.selection == "block" and self.block == "similarity" and not self.similarity_run:
            raise ValueError("block is similarity, so similarity_run must name a run of `raymerge similarity`")
        return self


SearcherName = Literal["bayes", "random", "gradient"]


class SearchConfig(_Section):
    """The search for coefficients.
    - `searcher`: bayes, random or gradient, or a list of them: one search after another on the same questions, whose
      plans are all reported.
    - `objective`: micro_accuracy, macro_accuracy, answer_nll, answer_kl (keeps the unmerged model's letters), text_nll
      (needs no questions), or a weighted sum such as answer_nll+0.1*text_nll. With accuracy:NAME[,NAME…], answer_nll:…
      and answer_kl:… the search asks only the subjects or domains that are named.
    - `perplexity_ceiling`: no candidate with a higher perplexity on plain text is chosen.
    - `text`, `text_tokens`: the plain text that text_nll and the ceiling are measured on, and the number of its tokens.
      If it is data.perplexity_text itself, the search takes the tokens after the data.perplexity_tokens that are
      reported on.
    - `candidates`: number of coefficient vectors to try. They include known ones within the bounds: the base
      coefficients, the probes, those that keep the best single layer, every alpha 1 and every alpha 0.
    - `initial`: number of random vectors before the model proposes.
    - `random_candidates`: number of random vectors scored as a control.
    - `probes`: additional alpha files to try first.
    - `bounds`: bounds of every alpha.
    - `batch`: candidates per Tune trial.
    - `concurrent`: Tune trials at a time; auto is one per worker.
    - `seed`: seed of everything that is drawn.
    """

    searcher: SearcherName | list[SearcherName] = "bayes"
    objective: str = "micro_accuracy"
    perplexity_ceiling: Annotated[float, Field(gt=1)] | None = None
    text: str | None = None
    text_tokens: Annotated[int, Field(ge=2)] = 1024
    candidates: Positive = 60
    initial: Annotated[int, Field(ge=0)] = 10
    random_candidates: Annotated[int, Field(ge=0)] = 10
    probes: list[str] = []
    bounds: tuple[float, float] = (0.0, 1.0)
    batch: Positive | Auto = "auto"
    concurrent: Positive | Auto = "auto"
    seed: Seed = 0

    @field_validator("bounds")
    @classmethod
    def _inside_unit(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] < value[1] <= 1.0:
            raise ValueError(f"bounds are {list(value)}: they must satisfy 0 <= low < high <= 1")
        return value

    @field_validator("searcher")
    @classmethod
    def _distinct(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and (not value or len(set(value)) < len(value)):
            raise ValueError(f"searcher is {value}: name at least one searcher, each once")
        return value

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, value: str) -> str:
        parse_objective(value)
        return value

    @property
    def searchers(self) -> list[str]:
        """The searchers by name, also where there is one."""
        return [self.searcher] if isinstance(self.searcher, str) else list(self.searcher)

    @property
    def needs_text(self) -> bool:
        """Whether candidates are measured on plain text."""
        return self.perplexity_ceiling is not None or parse_objective(self.objective).needs_text

    @model_validator(mode="after")
    def _has_its_text(self) -> SearchConfig:
        if self.needs_text and self.text is None:
            asks = "perplexity_ceiling" if self.perplexity_ceiling is not None else f"objective {self.objective}"
            raise ValueError(f"{asks} needs a plain text to measure candidates on: set search.text to a file or demo")
        return self

    @model_validator(mode="after")
    def _one_set_of_questions(self) -> SearchConfig:
        objective = parse_objective(self.objective)
        if "gradient" in self.searchers and objective.minimised and not objective.of_one_set:
            raise ValueError(
                f"searcher gradient descends on one set of questions, but the terms of objective {self.objective} "
                "have different subjects: name the same subjects in each, or use searcher bayes"
            )
        return self


class GradientConfig(_Section):
    """Coefficients by gradient descent, if search.searcher names gradient. The descent minimises search.objective, or
    answer_nll if that is an accuracy, plus `text_kl` times the KL of next tokens to the unmerged model on search.text.
    The published settings are alphas, adam, 1e-3, batches of 4, 500 epochs, nothing held out.
    - `parametrisations`: one search each: alphas (within search.bounds), simplex (the effective coefficients) or
      per_matrix (a simplex per projection matrix: many times the coefficients, which alpha files cannot hold).
    - `starts`: number of descents of each. They start from the base coefficients, from the probes, near the corners
      that keep one of the merged layers alone (the best one, the first, the last), and from random points.
    - `optimizer`, `learning_rate`: adam or sgd, and its step size; or lbfgs, which finds the step size by a line search
      on all questions and one draw of the text.
    - `epochs`: maximum number of epochs; with lbfgs, of steps.
    - `batch_size`: questions per step; null for all.
    - `held_out`: share of the search questions that no step sees. If the loss is of answers, the best epoch is
      chosen by them.
    - `patience`: epochs without improvement after which a descent stops.
    - `text_windows`, `text_positions`: how much of search.text each step draws; null for all.
    """

    parametrisations: Annotated[list[Literal["alphas", "simplex", "per_matrix"]], _AT_LEAST_ONE] = ["simplex"]
    starts: Positive = 4
    optimizer: Literal["adam", "lbfgs", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    epochs: Positive = 60
    batch_size: Positive | None = None
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
    patience: Positive | None = 10
    text_kl: Annotated[float, Field(ge=0)] = 0.0
    text_windows: Positive | None = None
    text_positions: Positive | None = 256

    @model_validator(mode="after")
    def _takes_all_questions(self) -> GradientConfig:
        if self.optimizer == "lbfgs" and self.batch_size is not None:
            raise ValueError(
                f"batch_size is {self.batch_size}, but lbfgs takes every step on all questions: set batch_size to "
                "null, or optimizer to adam or sgd"
            )
        return self


class CalibrationConfig(_Section):
    """The tokens on which blocks are chosen and refits are fitted. They never include a report's questions and text,
    unless data.search_split is data.report_split.
    - `text`: plain text, named like data.perplexity_text; null takes the prompts of the search questions, in shards
      drawn with `seed`. If the text is also reported or searched on, the calibration takes the tokens after those.
    - `tokens`: maximum number of tokens. Of prompts, at least one shard (some 8,192 tokens) is taken.
    """

    text: str | None = None
    tokens: Annotated[int, Field(ge=2)] = 12288
    seed: Seed = 0


Measure = Literal["npib", "gaussian", "cosine", "cka"]
Embedding = Literal["diffusion", "diffusion_gaussian", "pca", "tsne", "umap"]


class SimilarityConfig(_Section):
    """Layer similarity.
    - `subsets`: subjects, domains, or all (every subject of data.subjects); each makes one matrix.
    - `languages`: null is data.language.
    - `samples`: prompts per subset from `split`, spread evenly over its subjects and drawn with `seed`, like everything
      that is drawn here.
    - `shots`: few-shot examples before each prompt.
    - `pooling`: sequence (states of the first `max_tokens` tokens), last or mean.
    - `embedding`: diffusion, diffusion_gaussian, pca, tsne or umap, with `sigma` (a number or median), `anisotropy` and
      `dimensions`.
    - `measure`: npib (`neighbors` for information, `entropy_neighbors` for entropy), gaussian, cosine or cka.
    - `null_draws`: shuffled null matrices.
    - `interval_draws`: subsamples for intervals.
    - `half_draws`: half splits for reliability.
    """

    subsets: Annotated[list[str], _AT_LEAST_ONE] = ["all"]
    languages: list[str] | None = None
    samples: Annotated[int, Field(ge=4)] = 57
    split: Literal["validation", "test", "dev"] = "validation"
    shots: Annotated[int, Field(ge=0)] = 0
    pooling: Literal["sequence", "last", "mean"] = "sequence"
    max_tokens: Positive = 512
    embedding: Embedding = "diffusion"
    sigma: Annotated[float, Field(gt=0)] | Literal["median"] = 8.0
    anisotropy: float = 0.5
    dimensions: Positive = 2
    measure: Measure = "npib"
    neighbors: Positive = 5
    entropy_neighbors: Positive = 50
    null_draws: Annotated[int, Field(ge=20)] = 20
    interval_draws: Annotated[int, Field(ge=10)] = 40
    half_draws: Annotated[int, Field(ge=2)] = 20
    seed: Seed = 0

    @model_validator(mode="after")
    def _has_states(self) -> SimilarityConfig:
        if self.measure == "cosine" and self.pooling == "sequence":
            raise ValueError("measure is cosine, which compares vectors: set pooling to last or mean")
        if self.measure == "gaussian" and self.embedding == "diffusion":
            raise ValueError(
                "measure is gaussian on embedding diffusion, whose columns have variance 1 and so entropies of 0 to "
                "divide by: set embedding to diffusion_gaussian or pca"
            )
        if self.measure == "npib" and self.entropy_neighbors >= self.samples:
            raise ValueError(
                f"entropy_neighbors is {self.entropy_neighbors} for {self.samples} samples: the k-th neighbour needs "
                "more than k samples; take more samples or set similarity.entropy_neighbors"
            )
        return self


class SensitivityConfig(_Section):
    """What `raymerge sensitivity` varies, one key at a time, around the similarity section.
    - `sigma`, `dimensions`, `neighbors`, `entropy_neighbors`, `embedding`, `measure`: settings of the keys of that
      section.
    - `samples`: numbers of prompts, below similarity.samples.
    - `thresholds`: where most_similar stops.
    - `merges`: K of the plans that are compared.
    """

    sigma: list[Annotated[float, Field(gt=0)] | Literal["median"]] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, "median"]
    dimensions: list[Positive] = [1, 2, 3, 5]
    samples: list[Annotated[int, Field(ge=4)]] = []
    neighbors: list[Positive] = [3, 5, 8]
    entropy_neighbors: list[Positive] = []
    thresholds: list[float] = [0.2, 0.4, 0.6, 0.8]
    embedding: list[Embedding] = ["diffusion", "diffusion_gaussian", "pca", "tsne"]
    measure: list[Measure] = ["npib", "gaussian", "cka"]
    merges: Positive = 4


BLOCK_METHODS = ("drop_block", "merge_block")
SIMILARITY_METHODS = ("block_influence", "similarity_ratio", "similarity", "most_similar")  # with plan.similarity_run
SWEEP_METHODS = ("drop", "before_last", "drop_greedy", *BLOCK_METHODS, *SIMILARITY_METHODS, "file")


class SweepConfig(_Section):
    """The compression curve: every method at every number of layers.
    - `merges`: numbers of merged layers.
    - `methods`: drop, before_last and fixed:RATIO. drop_greedy drops layers one after another, each the one without
      which the loss on calibration.text is smallest. drop_block and merge_block take the block that plan.block chooses.
      block_influence, similarity_ratio, similarity and most_similar need plan.similarity_run. plan.base gives the base
      coefficients of most_similar and merge_block. file takes each of `alpha_files` at its own K, and drop is then
      tried there too.
    - `alpha_files`: files of coefficients by name, such as {best: runs/a/plans/found_bayes.json}; their points are
      file_best and so on. A run's plan file is taken as it is, an alpha file with the following keys and the plan
      section.
    - `alignments`, `norms`: methods that average are tried with every combination of these.
    - `refits`: every point is made with each of these (with plan.ridge and plan.refit_layers).
    - `refitted_methods`: if any are named, only these methods are refitted.
    - `context`: also measure NLL by position, and key-value retrieval at `distances` (tokens), with `retrieval_prompts`
      at each.
    - `speed_tokens`: tokens generated to time each number of layers; 0 skips this.
    """

    merges: Annotated[list[Positive], _AT_LEAST_ONE] = [1, 4, 11, 13, 15]
    methods: Annotated[list[str], _AT_LEAST_ONE] = [
        *("drop", "before_last"),
        *("fixed:0.4", "fixed:0.5", "fixed:0.6", "fixed:0.62", "fixed:0.7"),
    ]
    alpha_files: dict[Name, str] = {}
    alignments: Annotated[list[Alignment], _AT_LEAST_ONE] = ["none", "neurons"]
    norms: Annotated[list[Literal["keep", "fold"]], _AT_LEAST_ONE] = ["keep", "fold"]
    refits: Annotated[list[RefitMethod], _AT_LEAST_ONE] = ["none"]
    refitted_methods: list[str] = []
    context: bool = True
    distances: list[Positive] = [32, 64, 128, 256, 512, 1024]
    retrieval_prompts: Positive = 20
    speed_tokens: Annotated[int, Field(ge=0)] = 32

    @property
    def takes_blocks(self) -> bool:
        """Whether a method asks for a block of layers."""
        return not set(BLOCK_METHODS).isdisjoint(self.methods)

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, value: list[str]) -> list[str]:
        for method in value:
            kind, _, ratio = method.partition(":")
            try:
                known = method in SWEEP_METHODS or (kind == "fixed" and 0.0 <= float(ratio) <= 1.0)
            except ValueError:
                known = False
            if not known:
                raise ValueError(
                    f"{method!r} is not one of {', '.join(SWEEP_METHODS)}, fixed:RATIO with 0 <= RATIO <= 1"
                )
        return value

    @model_validator(mode="after")
    def _has_files_for_file(self) -> SweepConfig:
        if "file" in self.methods and not self.alpha_files:
            raise ValueError("methods has file, so alpha_files must name one, such as {best: alphas.json}")
        if self.alpha_files and "file" not in self.methods:
            raise ValueError("alpha_files are given, but methods lacks file, which takes them")
        return self

    @model_validator(mode="after")
    def _refits_what_is_there(self) -> SweepConfig:
        if unknown := set(self.refitted_methods) - set(self.methods):
            raise ValueError(
                f"refitted_methods has {', '.join(sorted(unknown))}, which is not among methods: "
                f"{', '.join(self.methods)}"
            )
        return self


class WorkersConfig(_Section):
    """The workers: Ray actors with one copy of the model each.
    - `count`, `gpus_per_worker`: auto means one worker per GPU or, without GPUs, one per `cpus_per_worker` CPUs, and
      more as nodes join. If, without GPUs, the memory has room for fewer workers, each of them gets more CPUs.
    - `autoscaling`: the cluster grows on demand, so `count` may be more than it has room for now; `count` and
      `gpus_per_worker` must then be numbers.
    - `timeout_s`: seconds after which a silent worker is replaced. In a descent it is the limit of each epoch.
    - `wait_s`: seconds to wait for a worker when there is none.
    - `max_restarts`: consecutive restarts of a worker that finishes nothing.
    - `dashboard`: start Ray's dashboard with a local Ray, on 127.0.0.1.
    """

    count: Positive | Auto = "auto"
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = "auto"
    cpus_per_worker: Positive = 1
    autoscaling: bool = False
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    wait_s: Annotated[float, Field(gt=0)] = 900.0
    max_restarts: Annotated[int, Field(ge=0)] = 3
    dashboard: bool = False

    @model_validator(mode="after")
    def _says_what_to_ask_for(self) -> WorkersConfig:
        if self.autoscaling and "auto" in (self.count, self.gpus_per_worker):
            raise ValueError(
                f"autoscaling is true, but count is {self.count} and gpus_per_worker {self.gpus_per_worker}: a cluster "
                "that grows on demand needs numbers for both, such as 8 workers of 1 GPU"
            )
        if self.gpus_per_worker != "auto" and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g}: a worker takes a fraction of one GPU (0.5) or whole ones"
            )
        return self


class OutputConfig(_Section):
    """The run directory, and what is written to it.
    - `run`: the run directory: a folder, or a URI such as s3://bucket/run.
    - `cache`: the local folder of trunk states. null is RUN/cache, or for a URI a folder of the user's cache.
    - `store_candidate_answers`: also store the logits of every candidate, in table answers.
    - `figures`: draw figures.
    - `save_best`: save the merged model.
    - `verify`: check the saved model: reload it in a fresh process, compare its logits with those of the scored plan,
      and let it generate (takes seconds, and memory for the stored model).
    - `loggers`: tensorboard, mlflow or wandb: where else to show a search's trials, by Ray Tune's callbacks. Needs
      their packages.
    """

    run: str = "runs/demo"
    cache: str | None = None
    store_candidate_answers: bool = False
    save_best: bool = True
    verify: bool = True
    figures: bool = True
    loggers: list[Literal["tensorboard", "mlflow", "wandb"]] = []

    @field_validator("run")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("it is empty, as when a script's variable is not set: name a folder or a URI")
        return value

    @field_validator("cache")
    @classmethod
    def _on_a_disk(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("must be a folder on each machine's own disk, or on one that they share")
        return value


class Config(_Section):
    """A whole configuration; `resolved()` is what is written to RUN/config.yaml."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tasks: TasksConfig = TasksConfig({})
    plan: PlanConfig = PlanConfig()
    search: SearchConfig = SearchConfig()
    gradient: GradientConfig = GradientConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    sweep: SweepConfig = SweepConfig()
    workers: WorkersConfig = WorkersConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _does_not_search_on_test(self) -> Config:
        data = self.data
        if data.search_split == "test" and not data.search_on_test:
            raise ValueError(
                "data.search_split is test: coefficients chosen on test questions make every test figure too good; "
                "search on validation, or set data.search_on_test: true to search on test anyway"
            )
        return self

    @property
    def chooses_blocks(self) -> bool:
        """Whether a block of layers is chosen by the states or the loss on the calibration text or prompts."""
        asks = self.plan.selection == "block" or self.sweep.takes_blocks
        return asks and self.plan.block in ("cosine", "angular", "loss", "search")

    def needs_calibration(self, *, sweep: bool = False) -> bool:
        """Whether a search, or a sweep, chooses or fits anything on the calibration text or prompts."""
        blocks = self.sweep.takes_blocks if sweep else self.plan.selection == "block"
        greedy = sweep and "drop_greedy" in self.sweep.methods
        refits = set(self.sweep.refits) if sweep else {self.plan.refit}
        return (blocks and self.chooses_blocks) or greedy or refits != {"none"}

    @model_validator(mode="after")
    def _has_its_calibration(self) -> Config:
        if self.chooses_blocks and self.plan.block == "loss" and self.calibration.text is None:
            raise ValueError("plan.block is loss, measured on plain text: set calibration.text to a file or demo")
        if "drop_greedy" in self.sweep.methods and self.calibration.text is None:
            raise ValueError("drop_greedy goes by the loss on plain text: set calibration.text to a file or demo")
        return self

    @property
    def needs_search_text(self) -> bool:
        """Whether candidates are measured, or descended, on plain text."""
        return self.search.needs_text or ("gradient" in self.search.searchers and self.gradient.text_kl > 0)

    @model_validator(mode="after")
    def _has_its_search_text(self) -> Config:
        if self.needs_search_text and self.search.text is None:
            raise ValueError("gradient.text_kl needs a plain text to descend on: set search.text to a file or demo")
        return self

    @model_validator(mode="after")
    def _can_be_descended(self) -> Config:
        plan, quantise = self.plan, self.model.quantise
        if "gradient" not in self.search.searchers:
            return self
        if plan.selection in ("block", "most_similar"):  # the steps of a list may be those of a tail
            raise ValueError(
                f"search.searcher gradient needs a tail merge, but plan.selection is {plan.selection}: use searcher "
                "bayes"
            )
        if plan.alignment == "rows" or quantise != "none":
            raise ValueError(
                f"plan.alignment {plan.alignment} with model.quantise {quantise} has no gradient: use alignment "
                "neurons and quantise none, or search.searcher bayes"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
