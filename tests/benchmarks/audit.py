"""Recomputes what a finished run says, by other code, and compares; a JSON line for each thing, exit code 1 if any
disagrees.

    python tests/benchmarks/audit.py RUN… [--questions 12] [--trials 3] [--seed 0]

Nothing is shared with raymerge but files: the run's configuration and tables, read by pyarrow, the base's safetensors,
questions and texts. Models are merged here step by step in float64, written as ordinary checkpoints of fewer layers,
loaded by transformers, and asked whole prompts, assembled and tokenised here. A line: what was compared, how many
values, the largest disagreement and what is allowed; lines with "skipped" say what was not compared, and why.
"""

import argparse
import copy
import csv
import functools
import glob
import html
import itertools
import json
import math
import random
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax, logsumexp
from sklearn.feature_selection import mutual_info_regression
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

DEMO = Path(__file__).resolve().parents[2] / "raymerge" / "demo"
WINDOW = 1024
#: Norms and what reads them, by family; the others' read as Llama's. Gemma stores gains less 1.
READS = {"input_layernorm": ("q_proj", "k_proj", "v_proj", "qkv_proj")}
MLP_READS = ("gate_proj", "up_proj", "gate_up_proj", ".gate", ".w1", ".w3")
AXES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"} | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "units")
GEMMA = ("gemma2", "gemma3_text")
UNMERGED = {"steps": [], "alphas": [], "own": {}, "norms": "keep", "biases": "keep", "alignment": "none"}


# -- merging ---------------------------------------------------------------------------------------------------------


class Base:
    """A checkpoint's tensors and config, and its layers' matrices, merged here."""

    def __init__(self, path):
        self.folder = DEMO / "checkpoint" if path == "demo" else Path(path)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.tensors = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self.tensors |= load_file(file)
        self.n_layers, self.kind = self.config["num_hidden_layers"], self.config["model_type"]

    def layer(self, number):
        start = f"model.layers.{number}."
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}

    def gains(self, layer):
        """By matrix, the gain (d,) of the norm that it reads."""
        second = "pre_feedforward_layernorm" if self.kind in GEMMA else "post_attention_layernorm"
        readers = {} if "olmo" in self.kind and self.kind != "olmoe" else READS | {second: MLP_READS}
        return {
            name: layer[f"{norm}.weight"].double() + (self.kind in GEMMA)
            for norm, ends in readers.items()
            for name in layer
            if name.endswith(tuple(f"{end}.weight" for end in ends))
        }, [f"{norm}.weight" for norm in readers]

    def merged(self, plan):
        """(tensors, kept layers) of a plan {steps: [(into, remove)], alphas, own: {matrix: alphas}, norms, biases,
        alignment}."""
        coefficients = effective(self.n_layers, plan)
        layers = {number: self.layer(number) for number in range(self.n_layers)}
        kept = sorted(coefficients)
        averaged = {
            name
            for name, tensor in layers[0].items()
            if tensor.ndim == 2 or (name.endswith(".bias") and plan["biases"] == "merge")
        }
        work = {}
        for number, layer in layers.items():
            own = {name: layer[name].double() for name in averaged if name in layer}
            if plan["norms"] == "fold":
                for name, gain in self.gains(layer)[0].items():
                    own[name] = own[name] * gain
            work[number] = own
        if plan["alignment"] == "neurons":
            self.reorder(work, plan["steps"])
        for number, (into, remove) in enumerate(plan["steps"]):
            gone = work.pop(remove)
            for name in averaged:
                matrix = name.rpartition(".")[0]
                alpha = plan["own"].get(matrix, plan["alphas"])[number]
                other = gone[name]
                if plan["alignment"] == "rows":
                    order = self.row_order(work[into][f"{matrix}.weight"], gone[f"{matrix}.weight"], matrix)
                    other = other[order]
                work[into] = work[into] | {f"new {name}": alpha * work[into][name] + (1 - alpha) * other}
            work[into] = {name: work[into][f"new {name}"] for name in averaged}
        state = {name: t for name, t in self.tensors.items() if not name.startswith("model.layers.")}
        for position, number in enumerate(kept):
            layer = layers[number]
            if coefficients[number] != {number}:
                changed = {name: work[number][name].float().to(layer[name].dtype) for name in averaged}
                layer = layer | changed
                if plan["norms"] == "fold":
                    unit = 0.0 if self.kind in GEMMA else 1.0
                    layer |= {norm: torch.full_like(layer[norm], unit) for norm in self.gains(layer)[1]}
            state |= {f"model.layers.{position}.{name}": tensor for name, tensor in layer.items()}
        return state, kept

    def reorder(self, work, steps):
        """Lay the units of every layer that is merged on those of the layer that it is merged into, in place."""
        groups = {number: [number] for number in work}
        for into, remove in steps:
            groups[into] += groups.pop(remove)
        for kept, members in groups.items():
            for number in members:
                order, step = None, 1 if number > kept else -1
                for layer in range(number, kept, -step):
                    match = self.match(min(layer, layer - step))
                    if step < 0:
                        match = {axis: np.argsort(own) for axis, own in match.items()}
                    order = match if order is None else {axis: order[axis][match[axis]] for axis in match}
                for name in work[number] if order else ():
                    axes = [axis for end, axis in AXES.items() if f".{end}." in name]
                    columns = name.endswith(("o_proj.weight", "down_proj.weight"))
                    if axes and (columns or not name.endswith(("o_proj.bias", "down_proj.bias"))):
                        work[number][name] = work[number][name].index_select(int(columns), torch.tensor(order[axes[0]]))

    @functools.cache  # noqa: B019 - a handful of layers
    def match(self, first):
        """By axis, in which order the units of layer first + 1 match those of layer `first`."""
        c, sides = self.config, []
        for number in (first, first + 1):
            layer = self.layer(number)
            gains, own = self.gains(layer)[0], {}
            for name, tensor in layer.items():
                if tensor.ndim == 2:
                    folded = tensor.double() * gains.get(name, torch.ones(1, dtype=torch.float64))
                    folded = folded.T if name.endswith(("o_proj.weight", "down_proj.weight")) else folded
                    own[name.split(".")[-2]] = torch.nn.functional.normalize(folded, dim=1).numpy()
            sides.append(own)
        kv, d = c["num_key_value_heads"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        g, (one, two) = c["num_attention_heads"] // kv, sides
        units = linear_sum_assignment(-sum(one[k] @ two[k].T for k in ("gate_proj", "up_proj", "down_proj") if k in one))[1]
        q, k, v, o = ({n: own[f"{x}_proj"].reshape(kv, *shape, -1) for n, own in enumerate(sides)}
                      for x, shape in (("q", (g, d)), ("k", (d,)), ("v", (d,)), ("o", (g, d))))
        best = {}
        for a, b in itertools.product(range(kv), repeat=2):
            for heads in itertools.permutations(range(g)):
                heads = list(heads)
                likeness = v[0][a] @ v[1][b].T + sum(o[0][a, x] @ o[1][b, y].T for x, y in enumerate(heads))
                channels = linear_sum_assignment(-likeness)[1]
                score = np.sum(k[0][a] * k[1][b]) + np.sum(q[0][a] * q[1][b, heads]) + likeness[np.arange(d), channels].sum()
                best[a, b] = max(best.get((a, b), (-np.inf, 0, 0)), (score, heads, channels.tolist()))
        order = linear_sum_assignment([[-best[a, b][0] for b in range(kv)] for a in range(kv)])[1]
        heads = [b * g + x for a, b in enumerate(order) for x in best[a, b][1]]
        channels = [(a, b, best[a, b]) for a, b in enumerate(order)]
        return {
            "units": units,
            "q": np.array([h * d + x for h in heads for x in range(d)]),
            "k": np.array([b * d + x for b in order for x in range(d)]),
            "v": np.array([b * d + x for _, b, found in channels for x in found[2]]),
            "o": np.array([(b * g + h) * d + x for _, b, found in channels for h in found[1] for x in found[2]]),
        }

    def row_order(self, own, other, matrix):
        """Which row of `other` is laid on each row of `own`, in each part of a matrix that holds several."""
        c = self.config
        heads = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        q, kv = c["num_attention_heads"] * heads, c["num_key_value_heads"] * heads
        parts = {"qkv_proj": [q, kv, kv], "gate_up_proj": [len(own) // 2] * 2}.get(matrix.split(".")[-1], [len(own)])
        order, start = [], 0
        for size in parts:
            a, b = (torch.nn.functional.normalize(m[start : start + size], dim=1) for m in (own, other))
            order += (start + linear_sum_assignment(torch.cdist(a, b).numpy())[1]).tolist()
            start += size
        return order

    def load(self, plan, dtype, quantise="none"):
        """The merged model by transformers."""
        state, kept = self.merged(plan)
        if quantise != "none":
            matrices = [n for n, t in state.items() if n.startswith("model.layers.") and t.ndim == 2 and not n.endswith(".gate.weight")]
            state |= {name: quantised(state[name].to(dtype), quantise) for name in matrices}
        config = copy.deepcopy(self.config)
        for key in ("layer_types", "no_rope_layers"):
            if config.get(key):
                config[key] = [config[key][number] for number in kept]
        config["num_hidden_layers"] = len(kept)
        with tempfile.TemporaryDirectory() as folder:
            save_file({n: t.contiguous() for n, t in state.items()}, f"{folder}/model.safetensors", {"format": "pt"})
            Path(folder, "config.json").write_text(json.dumps(config))
            return loaded(folder, dtype)


def quantised(weight, scheme):
    """int8: a scale for each row; int4: for each 32 columns of a row."""
    parts = weight if scheme == "int8" else weight.reshape(-1, 32)
    top, low, high = (127.5, -128, 127) if scheme == "int8" else (7.5, -8, 7)
    scale = (parts.abs().amax(1, keepdim=True) / top).clamp_min(torch.finfo(weight.dtype).eps)
    return (torch.clamp(torch.round(parts * (1.0 / scale)), low, high) * scale).reshape(weight.shape)


def loaded(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


def effective(n_layers, plan):
    """{kept layer: its sources}, the kept layer alone where nothing is averaged into it in any matrix."""
    found = {}
    for alphas in [plan["alphas"], *plan["own"].values()]:
        weights = {number: {number: 1.0} for number in range(n_layers)}
        for (into, remove), alpha in zip(plan["steps"], alphas, strict=True):
            gone, own = weights.pop(remove), weights[into]
            keys = {*gone, *own}
            weights[into] = {k: alpha * own.get(k, 0.0) + (1 - alpha) * gone.get(k, 0.0) for k in keys}
        for layer, of in weights.items():
            found.setdefault(layer, set()).update(source for source, weight in of.items() if weight)
    return found


def weights_of(n_layers, steps, alphas):
    """{(kept, source): coefficient}"""
    plan = {"steps": steps, "alphas": alphas, "own": {}}
    eye = np.eye(n_layers)
    for (into, remove), alpha in zip(plan["steps"], alphas, strict=True):
        eye[into] = alpha * eye[into] + (1 - alpha) * eye[remove]
        eye[remove] = 0
    gone = {remove for _, remove in steps}
    return {(k, s): eye[k, s] for k in range(n_layers) if k not in gone for s in range(n_layers) if eye[k, s]}


# -- asking ----------------------------------------------------------------------------------------------------------


class Asker:
    """Prompts of questions and windows of text, built here from files."""

    def __init__(self, base, config):
        self.base, self.data, self.config = base, config["data"], config
        add = config["model"]["add_bos"]
        token = base.tokenizer.bos_token_id
        default = base.tokenizer("x")["input_ids"][0] == token
        self.bos = [token] if (default if add is None else add) and token is not None else []
        self.files = {}

    def ids(self, text):
        return self.bos + base_ids(self.base.tokenizer, text)

    def rows(self, subject, split):
        if (subject, split) not in self.files:
            root = DEMO / "mmlu" if self.data["mmlu"] == "demo" else Path(self.data["mmlu"])
            folder = next(f for f in (root / self.data["language"], root) if f.is_dir())
            short = {"validation": "val"}.get(split, split)
            with open(folder / short / f"{subject}_{short}.csv", newline="", encoding="utf-8-sig") as file:
                self.files[subject, split] = list(csv.reader(file))
        return self.files[subject, split]

    def prompt(self, subject, split, question_id):
        """(ids of the prompt, how many of them are the prefix's, right letter)"""

        def text(row):
            options = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", row[1:5], strict=True))
            return f"{row[0].strip()}{options}\nAnswer:"

        row = self.rows(subject, split)[int(question_id.rpartition("/")[2])]
        prefix = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        if self.data["shots"]:
            shots = self.rows(subject, "dev")[: self.data["shots"]]
            prefix += "".join(f"{text(shot)} {shot[5]}\n\n" for shot in shots)
        return self.ids(prefix + text(row)), len(self.ids(prefix)), "ABCD".index(row[5].strip())

    @torch.no_grad()
    def answers(self, model, asked):
        """(n, 4) logits, (n,) logsumexp, (n,) top is letter, (n,) mean NLL of the question's own tokens."""
        letters = [base_ids(self.base.tokenizer, f"Answer: {letter}")[-1] for letter in "ABCD"]
        found = []
        for subject, split, question_id in asked:
            ids, prefix, _ = self.prompt(subject, split, question_id)
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
            own = torch.log_softmax(logits[prefix - 1 : -1], -1)
            nll = -own.gather(1, torch.tensor(ids[prefix:])[:, None]).mean()
            last = logits[-1]
            found.append((last[letters].numpy(), last.logsumexp(0).item(), int(last.argmax()) in letters, nll.item()))
        return tuple(np.array(column) for column in zip(*found, strict=True))

    def windows(self, source, start, count):
        text = (DEMO / "text.txt" if source == "demo" else Path(source)).read_text(encoding="utf-8")
        ids = base_ids(self.base.tokenizer, text)[start : start + count]
        size = min(WINDOW, self.base.config["max_position_embeddings"]) - len(self.bos)
        found = [self.bos + ids[at : at + size] for at in range(0, len(ids), size)]
        return [window for window in found if len(window) > 1]

    @torch.no_grad()
    def losses(self, model, windows):
        """Of each window the losses of its tokens but the first."""
        found = []
        for ids in windows:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
            found.append(-torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
        return found


def same_text(one, other):
    texts = [(DEMO / "text.txt" if x == "demo" else Path(x)).read_text().strip() for x in (one, other) if x]
    return len(texts) == 2 and texts[0] == texts[1]


def base_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# -- objectives and statistics, from docs/design.md ------------------------------------------------------------------


def answer_nll(logits, right):
    return -log_softmax(np.asarray(logits, np.float64), axis=1)[np.arange(len(right)), right]


def terms_of(objective):
    """[(weight, measure, subjects)]"""
    found = []
    for part in objective.split("+"):
        weight, _, measure = part.rpartition("*")
        measure, _, subjects = measure.partition(":")
        found.append((float(weight or 1), measure, [name for name in subjects.split(",") if name]))
    return found


def objective_value(objective, logits, base, right, subjects, text_nll, ceiling):
    """The objective of a candidate, or its penalty above a ceiling."""
    nll, correct, subjects = answer_nll(logits, right), logits.argmax(1) == right, np.array(subjects)
    p, q = log_softmax(base, axis=1), log_softmax(logits, axis=1)
    kl, value, weights, worst = (np.exp(p) * (p - q)).sum(1), 0.0, 0.0, 0.0
    for weight, measure, named in terms_of(objective):
        own = np.isin(subjects, named) if named else np.ones(len(subjects), bool)
        value += weight * {
            "micro_accuracy": lambda own: correct[own].mean(),
            "accuracy": lambda own: correct[own].mean(),
            "macro_accuracy": lambda own: np.mean([correct[subjects == name].mean() for name in set(subjects)]),
            "answer_nll": lambda own: nll[own].mean(),
            "answer_kl": lambda own: kl[own].mean(),
            "text_nll": lambda own: text_nll,
        }[measure](own)
        weights += weight
        worst += weight * (5.0 if measure != "text_nll" else math.log(ceiling or 1))
    over = 0.0 if ceiling is None else text_nll - math.log(ceiling)
    if over > 0:
        penalty = weights * over / (1 + over)
        return -penalty if is_accuracy(objective) else worst + penalty
    return value if ceiling is None or is_accuracy(objective) else min(value, worst)


def is_accuracy(objective):
    return "accuracy" in objective


def wilson(share, n):
    z = stats.norm.ppf(0.975)
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def macro_wilson(correct, n):
    """Wilson's with an effective number of questions."""
    correct, n = np.array(correct), np.array(n)
    m, s = np.mean(correct / n), len(n)
    if m in (0, 1):
        return wilson(m, s * s / np.sum(1 / n))
    drawn = (correct + m) / (n + 1)
    variance = np.sum(drawn * (1 - drawn) / (1 - (1 - 1 / s) * n / (n + 1) ** 2) / n) / s**2
    return wilson(m, m * (1 - m) / variance)


def ratio(sums, counts):
    """Mean and interval of clustered values."""
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    n, mean = len(sums), np.sum(sums) / np.sum(counts)
    if n < 2:
        return mean, math.nan, math.nan
    error = math.sqrt(n / (n - 1) * np.sum((sums - mean * counts) ** 2)) / np.sum(counts)
    half = stats.t.ppf(0.975, n - 1) * error
    return mean, mean - half, mean + half


def items_of(rows):
    """Tokens and losses of a plan's rows of `text_losses`, as long as there are at least 16 of them, up to a window."""
    for size in (1024, 512, 256, 128, 64):
        pooled = {}
        for row in sorted(rows, key=lambda row: (row["window"], row["position"])):
            old = pooled.get((row["window"], row["position"] // size), (0, 0.0))
            pooled[row["window"], row["position"] // size] = old[0] + row["tokens"], old[1] + row["nll"]
        if len(pooled) >= 16 or size == 64:
            return np.array(list(pooled.values())).T


def paired(a, b, counts=None, draws=20_000):
    """Difference, interval and p of a - b: Bonett and Price's and McNemar's of right and wrong, else resampled."""
    if a.dtype == bool:
        only_a, only_b, n = int(np.sum(a & ~b)), int(np.sum(b & ~a)), len(a)
        x, y = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
        half = stats.norm.ppf(0.975) * math.sqrt((x + y - (x - y) ** 2) / (n + 2))
        p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        return (only_a - only_b) / n, max(-1.0, x - y - half), min(1.0, x - y + half), p
    rng, d = np.random.default_rng(99), np.asarray(a - b, float)
    counts = np.ones(len(d)) if counts is None else counts
    mean, n = d.sum() / counts.sum(), len(d)
    flips = np.abs((rng.choice([-1.0, 1.0], (draws, n)) @ d) / counts.sum())
    p = (1 + np.sum(flips >= abs(mean) - 1e-12)) / (1 + draws)
    residuals = (d - mean * counts) / counts.mean() + mean
    if n == 1:
        return mean, -math.inf, math.inf, p
    if n < 8:
        return (*ratio(residuals, np.ones(n)), p)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    means = residuals[rng.integers(n, size=(draws, n))].mean(1)
    return (mean, *np.quantile(means, [tail, 1 - tail]), p)


def holm(p):
    order, found, highest = np.argsort(p, kind="stable"), np.empty(len(p)), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, p[at] * (len(p) - rank)))
        found[at] = highest
    return found


def mergekit(base, file):
    """What mergekit makes of its configuration: slices in turn, of each tensor the sum with the first weight whose
    filter is in its name (its last, without a filter, else)."""
    config = yaml.safe_load(file.read_text())
    state, position = {n: t for n, t in base.tensors.items() if not n.startswith("model.layers.")}, 0
    for part in config["slices"]:
        ranges = [range(*source["layer_range"]) for source in part["sources"]]
        for layers in zip(*ranges, strict=True):
            own = {}
            for layer, source in zip(layers, part["sources"], strict=True):
                weights = source.get("parameters", {}).get("weight", 1.0)
                weights = weights if isinstance(weights, list) else [{"value": weights}]
                for name, tensor in base.layer(layer).items():
                    full = f"model.layers.{layer}.{name}"
                    weight = next(w["value"] for w in weights if w.get("filter", "") in full)
                    own[name] = own.get(name, 0) + weight * tensor.double()
            for name, tensor in own.items():
                state[f"model.layers.{position}.{name}"] = tensor.float().to(base.layer(0)[name].dtype)
            position += 1
    return state


# -- similarities ----------------------------------------------------------------------------------------------------


def similarity(embedding, c):
    """npib or gaussian of (L, N, d) coordinates, NaN where the entropies leave it undefined."""
    n_layers, n, d = embedding.shape
    entropy, information = np.zeros(n_layers), np.zeros((n_layers, n_layers))
    if c["measure"] == "npib":
        ranks = stats.rankdata(embedding, axis=1) / n
        for i, own in enumerate(ranks):
            k, distances = c["entropy_neighbors"], np.linalg.norm(own[:, None] - own, axis=-1)
            with np.errstate(divide="ignore"):
                entropy[i] = -np.mean(np.log(k / (n * np.sort(distances, axis=1)[:, k] ** d)))
            for j, other in enumerate(ranks):
                parts = [mutual_info_regression(own, y, n_neighbors=c["neighbors"], random_state=c["seed"]) for y in other.T]
                information[i, j] = np.mean(parts)
        information = (information + information.T) / 2
    else:
        for i, j in itertools.product(range(n_layers), repeat=2):
            own, both = np.cov(embedding[i].T, ddof=1), np.cov(np.hstack([embedding[i], embedding[j]]).T, ddof=1)
            other = np.cov(embedding[j].T, ddof=1)
            volumes = [np.linalg.slogdet(np.atleast_2d(m))[1] for m in (own, other, both)]
            entropy[i], information[i, j] = volumes[0] / 2, (volumes[0] + volumes[1] - volumes[2]) / 2
    product = np.outer(entropy, entropy)
    small = ~(np.abs(entropy) >= 0.05) | ~np.isfinite(entropy)
    values = information / np.sqrt(np.where((product > 0) & ~small & ~small[:, None], product, np.nan))
    if c["measure"] == "gaussian":
        np.fill_diagonal(values, np.where(small, np.nan, 1.0))
    return values


def similarity_of(plan):
    """The (L, L) matrix and block influence of the similarity run that a plan section names."""
    if plan["similarity_run"] is None:
        return None, None
    tables = Path(plan["similarity_run"]) / "tables"
    rows, own = (pq.read_table(tables / name).to_pylist() for name in ("similarity", "block_influence"))
    for column in ("subset", "language"):
        if wanted := plan[f"similarity_{column}"]:
            rows, own = ([r for r in part if r[column] == wanted] for part in (rows, own))
    matrix = np.full((1 + max(r["layer_i"] for r in rows),) * 2, np.nan)
    for r in rows:
        matrix[r["layer_i"], r["layer_j"]] = math.nan if r["value"] is None else r["value"]
    return matrix, np.array([r["value"] for r in sorted(own, key=lambda r: r["layer"])])


def base_alpha(base, ratio, matrix, into, remove):
    """A starting coefficient, as docs/config.md has plan.base and sweep.methods."""
    if base.startswith("fixed"):
        return float(base.partition(":")[2] or ratio)
    if base == "similarity":
        return float(np.clip(matrix[into, remove] / math.sqrt(matrix[into, into] * matrix[remove, remove]), 0, 1))
    own, other = matrix[into].mean(), matrix[remove].mean()
    return math.exp(own / (own + other)) / (1 + math.exp(own / (own + other)))


def most_similar(matrix, k):
    """Repeatedly the most similar neighbours."""
    alive, found = list(range(len(matrix))), []
    while len(found) < k:
        near = [(matrix[a, b] / math.sqrt(matrix[a, a] * matrix[b, b]), a, b) for a, b in itertools.pairwise(alive)]
        _, into, remove = max(near)
        found.append((into, remove))
        alive.remove(remove)
    return found


# -- the run ---------------------------------------------------------------------------------------------------------


class Audit:
    """One run and what was compared so far."""

    def __init__(self, run, questions, trials, seed):
        self.run, self.limit, self.trials, self.random = Path(run), questions, trials, random.Random(seed)
        self.config = yaml.safe_load((self.run / "config.yaml").read_text())
        self.manifest = json.loads((self.run / "manifest.json").read_text())
        self.experiment, self.failed = self.manifest["experiment"], 0
        self.base = Base(self.config["model"]["path"])
        self.asker = Asker(self.base, self.config)
        stored = self.config["model"]["dtype"]
        self.dtype = torch.float32 if stored == "auto" else getattr(torch, stored)
        half = any(t.dtype != torch.float32 for t in self.base.tensors.values())
        quantised = self.config["model"]["quantise"] != "none"  # a sum's last bit decides what it is rounded to
        self.rounding = 5e-3 if quantised else 3e-4 if half and self.dtype == torch.float32 else {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[self.dtype]
        self.models = {}

    def table(self, table, /, **where):
        files = sorted(glob.glob(str(self.run / "tables" / table / "*.parquet")))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        return [row for row in rows if all(row[key] == value for key, value in where.items())]

    def line(self, what, of, **facts):
        print(json.dumps({"run": str(self.run), "what": what, "of": of, **facts}), flush=True)

    def same(self, what, of, found, wanted, allowed=1e-9):
        """Compare numbers: found in the run, wanted by this script."""
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        if found.shape != wanted.shape:
            return self.equal(what, of, list(found.shape), list(wanted.shape))
        with np.errstate(invalid="ignore"):
            off = np.where((found == wanted) | (np.isnan(found) & np.isnan(wanted)), 0.0, np.abs(found - wanted))
        off = np.nan_to_num(off, nan=np.inf)
        worst = float(off.max(initial=0.0))
        ok = bool((off <= allowed).all())
        facts = {"n": off.size, "largest": worst, "allowed": float(np.max(allowed, initial=0.0)), "ok": ok}
        if not ok:
            at = np.argwhere(off > allowed)[0].tolist()
            facts |= {"at": at, "found": float(found[tuple(at)]), "wanted": float(wanted[tuple(at)])}
        self.failed += not ok
        self.line(what, of, **facts)

    def equal(self, what, of, found, wanted):
        """Compare what must be alike."""
        self.failed += found != wanted
        self.line(what, of, ok=found == wanted, **({} if found == wanted else {"found": found, "wanted": wanted}))

    # plans

    def plans(self):
        """plan_id -> plan, of the reported plans that are not refitted; names by plan_id beside it."""
        refitted = {row["plan_id"] for row in self.table("refits")}
        refitted |= {row["plan_id"] for row in self.table("sweep") if row["refit"] not in (None, "none")}
        found, names = {}, {}
        for row in self.table("plans"):
            key = row["plan_id"]
            names.setdefault(key, [])
            if row["name"] not in names[key]:
                names[key].append(row["name"])
            if key in refitted or names[key][0] != row["name"]:
                continue
            plan = found.setdefault(key, {"steps": [], "alphas": [], "own": {}, "biases": self.biases} | {
                k: row[k] for k in ("name", "kind", "selection", "alignment", "norms")})
            if row["step"] is None:
                continue
            if row["matrix"] is None:
                plan["steps"].append((row["into"], row["remove"]))
                plan["alphas"].append(row["alpha"])
            else:
                plan["own"].setdefault(row["matrix"], []).append(row["alpha"])
        return found, names

    @property
    def biases(self):
        return self.config["plan"]["biases"] if "plan" in self.config else "keep"

    def can_merge(self, plan):
        averages = any(of != {kept} for kept, of in effective(self.base.n_layers, plan).items())
        split = {"self_attn.q_proj.weight", "mlp.up_proj.weight"} <= set(self.base.layer(0))
        if averages and (plan["alignment"] == "activations" or (plan["alignment"] == "neurons" and not split)):
            return f"alignment {plan['alignment']}"
        return None

    def model(self, plan):
        key = json.dumps([plan[k] for k in ("steps", "alphas", "own", "norms", "biases", "alignment")])
        if key not in self.models:
            if len(self.models) > 3:
                self.models.pop(next(iter(self.models)))
            self.models[key] = self.base.load(plan, self.dtype, self.config["model"]["quantise"])
        return self.models[key]

    def compared_model(self, what, plan_id, model):
        """A model's answers and losses against what the tables have of a plan."""
        data = self.config["data"]
        rows = [r for r in self.table("answers", plan_id=plan_id) if r["split"] == data["report_split"]]
        rows = self.random.sample(rows, min(self.limit, len(rows)))
        if rows:
            asked = [(r["subject"], r["split"], r["question_id"]) for r in rows]
            logits, sums, top, nll = self.asker.answers(model, asked)
            found = np.array([[r[f"logit_{x}"] for x in "abcd"] for r in rows])
            allowed = self.rounding * max(1.0, np.abs(logits).max())
            self.same(f"{what}: logits", plan_id, found, logits, allowed)
            self.equal(f"{what}: predicted", plan_id, [r["predicted"] for r in rows], found.argmax(1).tolist())
            right = [self.asker.prompt(*a)[2] for a in asked]
            self.equal(f"{what}: right answers", plan_id, [r["answer"] for r in rows], right)
            if rows[0]["logsumexp_all"] is not None:
                self.same(f"{what}: logsumexp", plan_id, [r["logsumexp_all"] for r in rows], sums, allowed)
            if rows[0]["prompt_nll"] is not None:
                self.same(f"{what}: prompt NLL", plan_id, [r["prompt_nll"] for r in rows], nll, self.rounding * 10)
        texts = self.table("perplexity", plan_id=plan_id, target="text")
        if texts:
            windows = self.asker.windows(data["perplexity_text"], 0, data["perplexity_tokens"])
            losses = self.asker.losses(model, windows)
            total = np.concatenate(losses)
            self.equal(f"{what}: text tokens", plan_id, texts[0]["tokens"], len(total))
            self.same(f"{what}: text NLL", plan_id, texts[0]["nll"], total.mean(), self.rounding * total.mean())
            rows = self.table("context", plan_id=plan_id, measure="position_nll")
            ends = {1: 16, 16: 64, 64: 256, 256: 512, 512: WINDOW}
            wanted = [np.concatenate([own[r["bucket"] - 1 : ends[r["bucket"]] - 1] for own in losses]) for r in rows]
            self.equal(f"{what}: tokens by position", plan_id, [r["n"] for r in rows], [len(own) for own in wanted])
            self.same(f"{what}: NLL by position", plan_id, [r["value"] for r in rows], [own.mean() for own in wanted], 10 * self.rounding * total.mean())
            rows = self.table("text_losses", plan_id=plan_id)
            wanted = [losses[r["window"]][r["position"] - 1 :][: r["tokens"]].sum() for r in rows]
            self.same(f"{what}: passages", plan_id, [r["nll"] for r in rows], wanted,
                      10 * self.rounding * np.maximum(1, np.abs(wanted)))

    def reported(self):
        plans, names = self.plans()
        for key, plan in plans.items():
            if why := self.can_merge(plan):
                self.line("model", names[key], skipped=why)
                continue
            self.compared_model(f"model {names[key][0]}", key, self.model(plan))
            self.described(key, plan)
        for file in sorted((self.run / "alphas").glob("*.json")):
            steps = json.loads(file.read_text())
            key = next((k for k, own in names.items() if file.stem in own or file.stem.endswith(f"-{k}")), None)
            plan = plans.get(key)
            if plan is None:
                self.line("alpha file", file.name, skipped="refitted, or no plan of this name")
                continue
            self.equal("alpha file: steps", file.name, [(s["layer_to_merge_into"], s["layer_to_remove"]) for s in steps], plan["steps"])
            self.same("alpha file: alphas", file.name, [s["ratio_i_alpha"] for s in steps], plan["alphas"], 0)
            self.equal("alpha file: no matrices", file.name, plan["own"], {})
        for folder in sorted((self.run / "models").glob("*")):
            self.saved(folder, plans, names)

    def described(self, key, plan):
        """Coefficients, costs and receipts of a plan."""
        n = self.base.n_layers
        found = {}
        for row in self.table("coefficients", plan_id=key):
            found.setdefault(row["matrix"], {})[row["kept_layer"], row["source_layer"]] = row["coefficient"]
        for matrix, own in found.items():
            wanted = weights_of(n, plan["steps"], plan["own"].get(matrix, plan["alphas"]))
            if matrix is not None:  # a layer without rows of this matrix has those of all matrices
                wanted = {k: w for k, w in wanted.items() if k[0] in {layer for layer, _ in own}}
            keys = sorted({*own, *wanted})
            self.same(f"coefficients {matrix}", key, [own.get(k, 0) for k in keys], [wanted.get(k, 0) for k in keys])
        state, kept = self.base.merged(plan)
        count, size = (sum(f(t) for t in state.values()) for f in (torch.numel, lambda t: t.numel() * t.element_size()))
        whole = sum(t.numel() for t in self.base.tensors.values())
        cost = self.table("costs", plan_id=key)[0]
        if self.config["model"]["quantise"] != "none":
            size = cost["bytes"]
        wanted = [len(kept), n - len(kept), count, whole - count, size]
        self.equal("costs", key, [cost[k] for k in ("layers", "layers_removed", "parameters", "parameters_removed", "bytes")], wanted)
        rows = self.table("receipts", plan_id=key)
        changes = {}
        for name, tensor in state.items():
            change = tensor.double() - self.base.tensors[name].double()
            norm = self.base.tensors[name].double().norm()
            relative = float(change.norm() / norm) if norm else float(bool(change.any()))
            changes[name] = float(change.abs().max()), relative
        self.same("receipts", key, np.array([[r["max_abs_change"], r["relative_change"]] for r in rows]).reshape(-1, 2),
                  np.array([changes[r["tensor"]] for r in rows]).reshape(-1, 2), 5e-3)
        missing = {name for name, change in changes.items() if change[0]} - {r["tensor"] for r in rows}
        self.equal("receipts: all that changed", key, sorted(missing), [])

    def saved(self, folder, plans, names):
        """A saved model: its answers are its plan's, its weights those merged here, its record true."""
        record = json.loads((folder / "merge_plan.json").read_text())
        key = record["plan_id"]
        self.equal("saved: its name", folder.name, folder.name in names.get(key, []), True)
        if self.config["model"]["quantise"] == "none":
            self.compared_model(f"saved {folder.name}", key, loaded(folder, self.dtype))
        plan = plans.get(key)
        if plan is None:
            return
        told = {"steps": [tuple(s[:2]) for s in record["steps"]], "alphas": [s[2] for s in record["steps"]]}
        told |= {"own": record.get("matrix_alphas", {}), **{k: record[k] for k in ("norms", "biases", "alignment")}}
        self.equal("saved: its record", folder.name, told, {k: plan[k] for k in told})
        alphas = json.loads((folder / "alphas.json").read_text())
        self.equal("saved: alphas.json", folder.name, [(a["layer_to_merge_into"], a["layer_to_remove"], a["ratio_i_alpha"]) for a in alphas],
                   [(*s, a) for s, a in zip(plan["steps"], plan["alphas"], strict=True)])
        rows = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (folder / "README.md").read_text().splitlines() if line.startswith("| ")]
        steps = [(int(a), int(b), float(c)) for _, a, b, c in (r for r in rows if len(r) == 4 and r[0].isdigit())]
        self.equal("card: steps", folder.name, steps, [(*s, round(a, 6)) for s, a in zip(plan["steps"], plan["alphas"], strict=True)])
        self.told("card", rows, 1, names)
        if self.can_merge(plan):
            return
        state, _ = self.base.merged(plan)
        stored = {}
        for file in folder.glob("*.safetensors"):
            stored |= load_file(file)
        self.weights("saved: weights", folder.name, stored, state)
        if (folder / "mergekit.yaml").exists():
            self.weights("mergekit.yaml: weights", folder.name, mergekit(self.base, folder / "mergekit.yaml"), state)

    def weights(self, what, of, found, wanted):
        self.equal(f"{what}' names", of, sorted(found), sorted(wanted))
        eps = max(torch.finfo(t.dtype).eps for t in wanted.values())
        pairs = [(found[n].double(), t.double()) for n, t in wanted.items() if n in found]
        worst = max(float(((a - b).abs() / (b.abs() + b.abs().max() * 1e-2 + 1e-30)).max()) for a, b in pairs)
        self.same(what, of, worst, 0.0, 2 * eps + 1e-5)


    # candidates

    def start(self, block=None):
        """The (into, remove) of the search's candidates, worked out from the configuration."""
        plan, n = self.config["plan"], self.base.n_layers
        k = plan["merges"]
        if plan["selection"] == "tail":
            return [(n - 2 - s, n - 1 - s) for s in range(k)]
        if plan["selection"] == "block":
            first = self.table("blocks", chosen=True)[0]["first"] if block is None else block
            if plan["survivor"] == "before":
                return [(first + k - 2 - s, first + k - 1 - s) for s in range(k)]
            return [(first + 1 + s, first + s) for s in range(k)]
        if plan["selection"] == "list":
            return [(s["layer_to_merge_into"], s["layer_to_remove"]) for s in json.loads(Path(plan["alpha_file"]).read_text())]
        found = [(r["into"], r["remove"]) for r in self.table("plans", name=self.manifest["best"]["name"], matrix=None)]
        return found

    def candidate(self, row):
        """The plan of a row of `trials` that is no control's."""
        steps = self.start(row["block"])
        options = {k: self.config["plan"][k] for k in ("alignment", "norms", "biases")}
        k = len(steps)
        alphas, own = row["alphas"][:k], {}
        if len(row["alphas"]) > k:
            names = sorted(n.removesuffix(".weight") for n, t in self.base.layer(0).items() if t.ndim == 2)
            own = {n: row["alphas"][k * (i + 1) : k * (i + 2)] for i, n in enumerate(names)}
            assert k * (1 + len(names)) == len(row["alphas"]), "numbers of alphas"
        return {"steps": steps, "alphas": alphas, "own": own, "selection": "", **options}

    def searched(self, searches):
        """Rows of `trials` of every searcher, worked out again; what is chosen among them."""
        data, search = self.config["data"], self.config["search"]
        trials, (plans, names) = self.table("trials"), self.plans()
        objective, ceiling = search["objective"], search["perplexity_ceiling"]
        asks = data["mmlu"] is not None and any(m != "text_nll" for _, m, _ in terms_of(objective))
        answers = self.table("answers", split=data["search_split"]) if asks else []
        asked = sorted({(r["subject"], r["split"], r["question_id"]) for r in answers})
        windows = []
        if search["text"] is not None and ("text_nll" in objective or ceiling is not None):
            windows = self.asker.windows(search["text"], self.search_start(), search["text_tokens"])

        def judged(plan):
            model, logits, right, text = self.model(plan), None, None, None
            if windows:
                text = float(np.concatenate(self.asker.losses(model, windows)).mean())
            if not asks:
                return sum(w for w, _, _ in terms_of(objective)) * text, None, None, text
            logits = self.asker.answers(model, asked)[0]
            right = np.array([self.asker.prompt(*a)[2] for a in asked])
            unmerged = self.asker.answers(self.model(UNMERGED), asked)[0] if "answer_kl" in objective else logits
            value = objective_value(objective, logits, unmerged, right, [a[0] for a in asked], text, ceiling)
            return value, (logits.argmax(1) == right).mean(), answer_nll(logits, right).mean(), text

        def compare(row, plan):
            of = f"{row['searcher']} {row['iteration']}"
            value, accuracy, nll, text = judged(plan)
            allowed = 20 * self.rounding * max(1, abs(value))
            allowed += 1.01 / max(1, len(asked)) if is_accuracy(objective) and self.dtype != torch.float32 else 0
            self.same("trial: value", of, row["value"], value, allowed)
            if asks:
                self.equal("trial: questions", of, row["n_questions"], len(asked))
                self.same("trial: NLL", of, row["nll"], nll, 20 * self.rounding * max(1, nll))
                self.same("trial: accuracy", of, row["accuracy"], accuracy, 1.01 / len(asked) if self.rounding > 1e-3 else 1e-9)
            if text is not None:
                self.same("trial: perplexity", of, math.log(row["perplexity"]), text, 20 * self.rounding * max(1, text))

        good = [row for row in trials if row["status"] == "ok"]
        if asks and asked and good and good[0]["n_questions"] != len(asked):
            self.line("trials", "all", skipped="questions of the search are not told apart from the report's")
        else:
            for searcher in dict.fromkeys(row["searcher"] for row in good):
                own = [r for r in good if r["searcher"] == searcher and (searcher != "controls" or r["plan_id"] in plans)]
                for row in self.random.sample(own, min(self.trials, len(own))):
                    plan = plans[row["plan_id"]] if searcher == "controls" else self.candidate(row)
                    if why := self.can_merge(plan):
                        self.line("trial", f"{searcher} {row['iteration']}", skipped=why)
                        continue
                    compare(row, plan)
        self.descended(good)
        self.chosen(good, plans, names, judged, objective)

    def descended(self, good):
        """That a descent's row has the coefficients of its best epoch, by the loss on held-out questions if any."""
        history = {}
        for row in self.table("gradient_history"):
            history.setdefault((row["searcher"], row["start"]), []).append(row)
        order = [("q_proj", "k_proj", "v_proj", "qkv_proj"), ("o_proj",), ("gate_proj", "up_proj", "gate_up_proj"), ("down_proj",)]
        order = [f"{part}.{name}" for part, names in zip(("self_attn", "self_attn", "mlp", "mlp"), order, strict=True) for name in names]
        there = [n for n in order if f"{n}.weight" in self.base.layer(0)]
        for row in good:
            epochs = history.get((row["searcher"], row["iteration"]))
            if epochs is None or any("expert" in name for name in self.base.layer(0)):
                continue
            held = epochs[0]["held_out_loss"] is not None
            best = min(epochs, key=lambda e: (e["held_out_loss"] if held else e["loss"], e["epoch"]))
            wanted, k = best["alphas"], len(self.start())
            if row["searcher"].endswith("per_matrix"):
                own = {name: best["alphas"][k * i : k * (i + 1)] for i, name in enumerate(there)}
                # effective coefficients, the deepest layer's last; their mean, as alphas
                shares = np.array([[np.prod([1 - a for a in alphas[::-1][:j]]) * (alphas[::-1][j] if j < k else 1.0) for j in range(k + 1)] for alphas in own.values()]).mean(0)
                left = np.cumsum(shares[::-1])[::-1]
                mean = [shares[j] / left[j] if left[j] > 0 else 1.0 for j in range(k)][::-1]
                wanted = [*mean, *(a for name in sorted(own) for a in own[name])]
            self.same("descent: its best epoch", f"{row['searcher']} {row['iteration']}", row["alphas"], wanted, 1e-6)

    def chosen(self, good, plans, names, judged, objective):
        """That the reported plans are the best of their searchers, and the best of these the last."""
        sign = 1 if is_accuracy(objective) else -1

        def order(row):
            return sign * row["value"], -(row["nll"] or 0.0), -row["iteration"]

        best = {}
        for row in good:
            name = "random" if row["searcher"] == "random" and "found_random" not in sum(names.values(), []) else f"found_{row['searcher']}"
            if row["searcher"] != "controls" and (name not in best or order(row) > order(best[name])):
                best[name] = row
        for name, row in best.items():
            key = next((k for k, own in names.items() if name in own), None)
            self.equal("chosen: plan of the best trial", name, key, row["plan_id"])
            if (plan := plans.get(key)) is not None:
                wanted = self.candidate(row)
                self.equal("chosen: its merges", name, [plan[k] for k in ("steps", "alphas", "own", "norms", "alignment")],
                           [wanted[k] for k in ("steps", "alphas", "own", "norms", "alignment")])
        found = {name: row for name, row in best.items() if name.startswith("found_")}
        first = max(found, key=lambda name: order(found[name])[:2])
        told = self.manifest["best"]
        self.equal("chosen: the best", "manifest", order(found[told["name"]])[:2], order(found[first])[:2])
        self.equal("chosen: its id", "manifest", told["plan_id"], found[told["name"]]["plan_id"])
        if kept := self.manifest.get("keep_one"):
            steps = self.start()
            group = sorted({layer for step in steps for layer in step})
            values = {}
            for layer in group:
                stays = [n for n in range(self.base.n_layers) if n not in group or n == layer]
                gone = [x for x in group if x > layer][::-1], [x for x in group if x < layer]
                chain = []  # each into the one that stays
                for x in sorted(gone[1], reverse=True):
                    chain.append((layer, x))
                for x in sorted(gone[0]):
                    chain.append((layer, x))
                assert len(stays) + len(chain) == self.base.n_layers
                values[layer] = sign * judged(UNMERGED | {"steps": chain, "alphas": [1.0] * len(chain)})[0]
            plan = next((p for k, p in plans.items() if kept["best"] in names[k]), None)
            layer = set(group) & set(effective(self.base.n_layers, plan))
            self.equal("keep_N: of", kept["best"], [len(layer), kept["of"]], [1, len(group)])
            self.same("keep_N: the best", kept["best"], values[min(layer)], max(values.values()), 20 * self.rounding)

    # what follows from the tables

    def derived(self):
        """Accuracies, intervals, perplexities, differences and their p, from the rows that they follow from."""
        answers = {}
        for row in self.table("answers"):
            answers.setdefault((row["plan_id"], row["split"], row["language"]), []).append(row)
        found = {}
        for row in self.table("accuracy"):
            found[row["plan_id"], row["split"], row["language"], row["subject"]] = row
        keys, wanted = [], []
        for key, rows in answers.items():
            right = np.array([r["predicted"] == r["answer"] for r in rows])
            nll = answer_nll([[r[f"logit_{x}"] for x in "abcd"] for r in rows], [r["answer"] for r in rows])
            subject = np.array([r["subject"] for r in rows])
            lines = {name: subject == name for name in sorted(set(subject))} | {"_micro": subject == subject}
            own = {}
            for name, mask in lines.items():
                n, correct = mask.sum(), right[mask].sum()
                error = np.std(right[mask], ddof=1) / math.sqrt(n) if n > 1 else math.nan
                own[name] = [n, correct, correct / n, error, *wilson(correct / n, n), nll[mask].mean()]
            table = np.array([own[name] for name in own if name != "_micro"])
            errors = math.sqrt(np.sum(table[:, 3] ** 2)) / len(table)
            own["_macro"] = [*own["_micro"][:2], table[:, 2].mean(), errors, *macro_wilson(table[:, 1], table[:, 0]), table[:, 6].mean()]
            keys += [(*key, name) for name in own]
            wanted += own.values()
        self.equal("accuracy: rows", "all", sorted(found), sorted(keys))
        columns = ("n", "correct", "accuracy", "standard_error", "ci_low", "ci_high", "nll")
        self.same("accuracy", "all", [[found[k][c] for c in columns] for k in keys if k in found],
                  [w for k, w in zip(keys, wanted, strict=True) if k in found], 1e-6)
        losses = {}
        for row in self.table("text_losses"):
            losses.setdefault(row["plan_id"], []).append(row)
        for row in self.table("perplexity"):
            if row["target"] == "text":
                tokens, nll = items_of(losses[row["plan_id"]])
                mean, low, high = ratio(nll, tokens)
            else:
                own = [r for key, rows in answers.items() if key[0] == row["plan_id"] and key[1] == self.config["data"]["report_split"]
                       for r in rows if row["subject"] in (None, r["subject"])]
                mean, low, high = ratio([r["prompt_nll"] for r in own], np.ones(len(own)))
            values = [row["nll"], *(math.nan if row[k] is None else row[k] for k in ("perplexity", "ci_low", "ci_high"))]
            with np.errstate(over="ignore"):
                limits = [mean, *np.exp([mean, low, high])]
            self.same(f"perplexity: {row['target']}", row["plan_id"], values, limits, 1e-6 * np.maximum(1, np.abs(np.nan_to_num(limits))))
        self.compared(answers, losses)

    def compared(self, answers, losses):
        split, rows = self.config["data"].get("report_split"), self.table("comparisons")
        of = {key[0]: sorted(own, key=lambda r: r["question_id"]) for key, own in answers.items() if key[1] == split}
        rows += self.table("subject_comparisons")

        def side(row, plan_id):
            if row["measure"] == "text_nll":
                tokens, nll = items_of(losses[plan_id])
                return nll, tokens
            named = row["subjects"].split(",") if "subjects" in row else None
            own = [r for r in of[plan_id] if named is None or r["subject"] in named]
            if row["measure"] == "accuracy":
                return np.array([r["predicted"] == r["answer"] for r in own]), None
            return answer_nll([[r[f"logit_{x}"] for x in "abcd"] for r in own], [r["answer"] for r in own]), None

        for row in rows:
            (a, counts), (b, _) = side(row, row["plan_a"]), side(row, row["plan_b"])
            difference, low, high, p = paired(a, b, counts)
            name = f"{row['plan_a']} - {row['plan_b']}"
            exact = row["measure"] == "accuracy"
            self.same(f"difference: {row['measure']}", name, row["difference"], difference, 1e-9 * max(1, abs(difference)))
            width = max(high - low, 1e-9)
            self.same(f"interval: {row['measure']}", name, [row["ci_low"], row["ci_high"]], [low, high], 1e-9 if exact else 0.12 * width)
            self.same(f"p: {row['measure']}", name, row["p_value"], p, 1e-9 if exact else 6 * math.sqrt(p * (1 - p) / 10_000) + 1e-3)
        best = self.manifest.get("best", {}).get("plan_id")
        asked_about, points = [], self.table("sweep")
        plain = {(r["merges"], r["method"], r["refit"] or "none"): r["plan_id"] for r in points if (r["alignment"], r["norms"]) == ("none", "keep")}
        for row in points:
            others = [("drop", "none"), (row["method"], "none")] + [("drop_block", "none")] * (row["method"] == "merge_block")
            others += [("drop_block", "linear")] * (row["refit"] not in (None, "none"))
            asked_about += [{row["plan_id"], plain[key]} for other in others if (key := (row["merges"], *other)) in plain]
        for table in ("comparisons", "subject_comparisons"):
            families = {}
            for row in self.table(table):
                pair = {row["plan_a"], row["plan_b"]}
                key = row["measure"], pair in asked_about if best is None else best in pair
                families.setdefault(key, []).append(row)
            plans = {row["plan_id"] for row in self.table("plans")}
            for (measure, asked), own in families.items():
                self.same(f"p (Holm): {measure}", f"{table}, {'best' if asked else 'others'}",
                          [r["p_holm"] for r in own], holm([r["p_value"] for r in own]))
                others = len(plans) - 1
                if best is not None and measure == "accuracy":
                    self.equal("pairs", f"{table} {asked}", len(own), others if asked else others * (others - 1) // 2)

    # sweeps

    def swept(self):
        """That each point of a sweep is the plan that its method says."""
        n, (plans, _) = self.base.n_layers, self.plans()
        steps_of = {row["plan_id"]: [] for row in self.table("plans")}
        for row in self.table("plans", matrix=None):
            if row["step"] is not None and (row["step"], row["into"], row["remove"], row["alpha"]) not in steps_of[row["plan_id"]]:
                steps_of[row["plan_id"]].append((row["step"], row["into"], row["remove"], row["alpha"]))
        config = self.config
        matrix, influence = similarity_of(config["plan"])
        for row in self.table("sweep"):
            k, method, plan_id = row["merges"], row["method"], row["plan_id"]
            rows = sorted(steps_of[plan_id])
            steps, alphas = [(r[1], r[2]) for r in rows], [r[3] for r in rows]
            stays = sorted(effective(n, {"steps": steps, "alphas": alphas, "own": {}}))
            of = f"{method} k={k}"
            self.equal("sweep: layers removed", of, n - len(stays), k)
            tail = [(n - 2 - s, n - 1 - s) for s in range(k)]
            if method == "before_last":
                self.equal("sweep: before_last", of, (stays, set(alphas)), ([*range(n - 1 - k), n - 1], {1.0}))
            elif method == "block_influence":
                least = set(np.argsort(influence, kind="stable")[:k].tolist())
                self.equal("sweep: block_influence", of, (stays, set(alphas)), ([x for x in range(n) if x not in least], {1.0}))
            elif method == "drop_block":
                self.equal("sweep: drop_block", of, set(alphas), {1.0})
                self.equal("sweep: block", of, stays, self.without_block(k))
            elif method.startswith("file_"):
                told = json.loads(Path(config["sweep"]["alpha_files"][method.removeprefix("file_")]).read_text())
                self.equal("sweep: file", of, (steps, alphas), ([(s["layer_to_merge_into"], s["layer_to_remove"]) for s in told], [s["ratio_i_alpha"] for s in told]))
            elif method != "base":
                base = {"most_similar": config["plan"]["base"], "merge_block": config["plan"]["base"]}.get(method, method)
                base = {"file": "fixed", "drop": "fixed:1"}.get(base, base.replace("fixed_", "fixed:"))
                wanted = tail
                if method == "most_similar":
                    wanted = most_similar(matrix, k)
                if method == "merge_block":
                    self.equal("sweep: block", of, len(set(range(n)) - set(self.without_block(k)) - {r for _, r in steps}), 0)
                    wanted = steps
                self.equal("sweep: merges", of, steps, wanted)
                self.same("sweep: alphas", of, alphas, [base_alpha(base, config["plan"]["ratio"], matrix, *step) for step in steps])

    def blocks(self):
        """The scores of the blocks among which one was chosen, and the choice."""
        rows, config = self.table("blocks"), self.config
        data, search = config["data"], config.get("search") or {}
        source = (config.get("calibration") or {}).get("text")
        measured = {}
        if rows and source is not None and {r["measure"] for r in rows} & {"cosine", "angular", "loss"}:
            start = data["perplexity_tokens"] if same_text(source, data["perplexity_text"]) else 0
            if self.needs_search_text and same_text(source, search["text"]):
                start = max(start, self.search_start() + search["text_tokens"])
            windows = self.asker.windows(source, start, config["calibration"]["tokens"])
            for k in {r["merges"] for r in rows}:
                measured |= self.block_scores(windows, k, {r["first"] for r in rows if r["merges"] == k}, {r["measure"] for r in rows})
        matrix, _ = similarity_of(config["plan"]) if rows else (None, None)
        for r in rows:
            if r["measure"] == "similarity":
                i, j = r["first"] - 1, r["last"]
                measured["similarity", r["merges"], r["first"]] = 1 - matrix[i, j] / math.sqrt(matrix[i, i] * matrix[j, j])
        known = [r for r in rows if (r["measure"], r["merges"], r["first"]) in measured]
        wanted = np.array([measured[r["measure"], r["merges"], r["first"]] for r in known])
        self.same("blocks: scores", "all", [r["score"] for r in known], wanted, 20 * self.rounding * np.maximum(1, np.abs(wanted)))
        for k in {r["merges"] for r in rows}:
            chosen = next(r for r in rows if r["merges"] == k and r["chosen"])
            if chosen["score"] is not None:
                own = [r for r in rows if r["merges"] == k and r["measure"] == chosen["measure"]]
                best = min(own, key=lambda r: (r["score"], -r["first"]))
                self.equal("blocks: the chosen", k, chosen["first"], best["first"])

    @torch.no_grad()
    def block_scores(self, windows, k, firsts, measures):
        found, n = {}, self.base.n_layers
        model = self.model(UNMERGED)
        states = [model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states for ids in windows]
        if "loss" in measures:
            for first in firsts:
                chain = [(first - 1, x) for x in range(first, first + k)] if first else [(k, x) for x in range(k - 1, -1, -1)]
                plan = UNMERGED | {"steps": chain, "alphas": [1.0] * k}
                found["loss", k, first] = np.concatenate(self.asker.losses(self.model(plan), windows)).mean()
        for first in firsts if measures & {"cosine", "angular"} else ():
            if first + k == n:  # the last of transformers' states is behind the final norm
                kept = []
                hook = model.model.layers[-1].register_forward_hook(lambda m, a, out: kept.append(out if torch.is_tensor(out) else out[0]))
                for ids in windows:
                    model(input_ids=torch.tensor([ids]), use_cache=False)
                hook.remove()
            else:
                kept = [own[first + k] for own in states]
            cos = torch.cat([torch.cosine_similarity(own[first][0].double(), out[0].double(), dim=-1) for own, out in zip(states, kept, strict=True)])
            found["cosine", k, first] = float((1 - cos).mean())
            found["angular", k, first] = float(cos.clamp(-1, 1).acos().mean() / math.pi)
        return found

    @property
    def needs_search_text(self):
        search = self.config.get("search") or {}
        return search.get("text") is not None and (
            "text_nll" in search["objective"] or search["perplexity_ceiling"] is not None or bool((self.config.get("gradient") or {}).get("text_kl")))

    def search_start(self):
        search, data = self.config["search"], self.config["data"]
        return data["perplexity_tokens"] if same_text(search["text"], data["perplexity_text"]) else 0

    def without_block(self, k):
        first = self.table("blocks", chosen=True, merges=k)[0]["first"]
        return [x for x in range(self.base.n_layers) if not first <= x < first + k]

    # similarities

    def compared_layers(self):
        """Distances between the states of the run's own prompts, their embeddings, similarities, and correlations."""
        c, model = self.config["similarity"], self.base.load(UNMERGED, self.dtype)
        states, inputs = [], []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda m, a, out: states.append((out if torch.is_tensor(out) else out[0])[0].double()))
            layer.register_forward_pre_hook(lambda m, a, k: inputs.append((a[0] if a else k["hidden_states"])[0].double()), with_kwargs=True)
        groups, found = {}, {}
        for row in self.table("samples"):
            groups.setdefault((row["subset"], row["language"]), []).append(row)
        matrices = {}
        for row in self.table("similarity"):
            key = row["subset"], row["language"]
            value = math.nan if row["value"] is None else row["value"]
            matrices.setdefault(key, np.full((self.base.n_layers,) * 2, np.nan))[row["layer_i"], row["layer_j"]] = value
        asker = Asker(self.base, self.config | {"data": self.config["data"] | {"shots": c["shots"]}})
        for key, rows in groups.items():
            pooled, cosines = [], []
            asker.data["language"], asker.files = key[1], {}
            for row in sorted(rows, key=lambda r: r["sample"]):
                states.clear(), inputs.clear()
                ids = asker.prompt(row["subject"], row["split"], row["question_id"])[0]
                ids = ids[: c["max_tokens"]] if c["pooling"] == "sequence" else ids
                with torch.no_grad():
                    model(input_ids=torch.tensor([ids]), use_cache=False)
                cosines.append([torch.cosine_similarity(a, b, dim=1) for a, b in zip(inputs, states, strict=True)])
                pool = {"sequence": lambda s: s, "last": lambda s: s[-1:], "mean": lambda s: s.mean(0, keepdim=True)}
                pooled.append([pool[c["pooling"]](s) for s in states])
            longest = max(len(sample[0]) for sample in pooled)
            padded = [[torch.nn.functional.pad(s, (0, 0, 0, longest - len(s))).flatten() for s in own] for own in pooled]
            layers = torch.stack([torch.stack(own) for own in padded]).transpose(0, 1).numpy()  # (L, N, T d)
            distances = np.stack([np.linalg.norm(own[:, None] - own, axis=-1) for own in layers])
            wanted = [1 - torch.cat([own[layer] for own in cosines]).mean().item() for layer in range(self.base.n_layers)]
            influence = [r["value"] for r in sorted(self.table("block_influence", subset=key[0], language=key[1]), key=lambda r: r["layer"])]
            self.same("block influence", key, influence, wanted, 20 * self.rounding)
            stored = self.embedded(key, distances, c)
            if c["measure"] == "cosine":
                unit = layers / np.linalg.norm(layers, axis=-1, keepdims=True)
                values = np.einsum("ind,jnd->ij", unit, unit) / len(rows)
            elif c["measure"] == "cka":
                centre = np.eye(len(rows)) - 1 / len(rows)
                grams = np.stack([centre @ own @ own.T @ centre for own in layers])
                grams /= np.linalg.norm(grams, axis=(1, 2), keepdims=True)
                values = np.einsum("iab,jab->ij", grams, grams)
            else:
                values = similarity(stored, c)
            self.same(f"similarity: {c['measure']}", key, matrices[key], values, max(2e-4, self.rounding / 10) if c["measure"] in ("cosine", "cka") else 1e-6 * np.maximum(1, np.abs(np.nan_to_num(values))))
        above = np.triu_indices(self.base.n_layers, 1)
        for row in self.table("similarity_correlation"):
            a, b = (matrices[row[f"subset_{x}"], row[f"language_{x}"]] for x in "ab")
            for column, pick in (("pearson", slice(None)), ("pearson_off_diagonal", above)):
                x, y = a[pick].ravel(), b[pick].ravel()
                both = np.isfinite(x) & np.isfinite(y)
                self.same(f"correlation: {column}", f"{row['subset_a']} {row['subset_b']}", row[column], np.corrcoef(x[both], y[both])[0, 1], 1e-6)

    def embedded(self, key, distances, c):
        """The stored embeddings (L, N, d), compared with the diffusion maps of distances."""
        rows = self.table("embeddings", subset=key[0], language=key[1])
        if not rows:
            return None
        shape = [1 + max(r[k] for r in rows) for k in ("layer", "sample", "coordinate")]
        stored = np.full(shape, np.nan)
        for r in rows:
            stored[r["layer"], r["sample"], r["coordinate"]] = r["value"]
        if not c["embedding"].startswith("diffusion"):
            return stored
        ranks = {r["layer"]: r for r in self.table("degeneracy", subset=key[0], language=key[1])}
        for layer, d in enumerate(distances):
            sigma = np.median(d[np.triu_indices(len(d), 1)]) if c["sigma"] == "median" else c["sigma"]
            if c["embedding"] == "diffusion":
                k = np.exp(-np.sqrt(d / sigma))
                p = k.sum(1)
                k = k / np.outer(p, p) ** c["anisotropy"]
                v = np.sqrt(k.sum(1))
                u, s, _ = np.linalg.svd(k / np.outer(v, v))
                values, total = u[:, 1 : shape[2] + 1] / u[:, :1], k / np.outer(v, v)
            else:
                k = np.exp(-(d**2) / (2 * sigma**2))
                total = k / k.sum(1, keepdims=True)
                s, right = np.linalg.eig(total)
                order = np.argsort(-np.abs(s))
                s, right = np.abs(s[order].real), right[:, order].real
                values = right[:, 1 : shape[2] + 1] / np.linalg.norm(right[:, 1 : shape[2] + 1], axis=0) * s[1 : shape[2] + 1] ** c["anisotropy"]
            share = s / s.sum()
            rank = np.exp(-np.sum(share[share > 1e-300] * np.log(share[share > 1e-300])))
            mass = 1 - np.trace(total) / total.sum()
            self.same("degeneracy", f"{key} {layer}", [ranks[layer]["effective_rank"], ranks[layer]["off_diagonal_mass"]], [rank, mass], [0.01 * rank + 1e-3, 1e-3])
            gaps = np.abs(np.diff(s[: shape[2] + 2]))
            if gaps.min() < 1e-3 or not 1.05 < rank < 0.9 * len(d):
                self.line("embedding", f"{key} {layer}", skipped="degenerate: the map is noise, or a rotation is free")
                continue
            signs = np.sign(np.sum(values * stored[layer], axis=0))
            self.same("embedding", f"{key} {layer}", stored[layer], values * signs, 3e-3 / gaps.min() * max(self.rounding * 10, 1e-4) * 100 * np.abs(values).max())
        return stored

    # the page

    def told(self, what, rows, scale, names):
        """That the numbers of rows of cells are those of the plan that they begin with; scale: of shares."""
        split = self.config["data"].get("report_split")
        accuracy = {(r["plan_id"], r["subject"]): r for r in self.table("accuracy", split=split)}
        text = {r["plan_id"]: r for r in self.table("perplexity", target="text")}
        costs = {r["plan_id"]: r for r in self.table("costs")}
        header = []
        for row in rows:
            if "answer NLL" in row and "plan" in row:
                header = row
            label = row[0] if row else ""
            key = next((k for k, own in names.items() if label and set(label.split(" = ")) <= {*own, "base"} and label.split(" = ")[-1] in own), None)
            if key is None or not header or len(row) != len(header) or row is header:
                continue
            told = {name.partition(" [")[0].replace("text ppl", "perplexity"): cell for name, cell in zip(header, row, strict=True)}
            micro, macro = accuracy.get((key, "_micro")), accuracy.get((key, "_macro"))
            wanted = {"accuracy": [scale * micro[c] for c in ("accuracy", "ci_low", "ci_high")],
                      "mean over subjects": [scale * macro[c] for c in ("accuracy", "ci_low", "ci_high")],
                      "macro": [macro["accuracy"]], "answer NLL": [micro["nll"]]} if micro else {}
            wanted["layers"] = [costs[key]["layers"]]
            if key in text:
                wanted["perplexity"] = [text[key][c] for c in ("perplexity", "ci_low", "ci_high")]
            for column, values in wanted.items():
                if column in told:
                    self.equal(f"{what}: {column}", label, (told[column], says(told[column], values)), (told[column], True))

    def page(self, html_text):
        """That the page's rows of a plan have its numbers, and that its answer is about the best found."""
        _, names = self.plans()
        body = re.sub(r"<(script|style|svg)\b.*?</\1>", "", html_text, flags=re.S)
        rows = [[html.unescape(re.sub(r"<[^>]+>", " ", cell)).strip() for cell in re.findall(r"<t[dh]\b.*?</t[dh]>", row, re.S)]
                for row in re.findall(r"<tr\b.*?</tr>", body, re.S)]
        self.told("page", rows, 100, names)
        if self.experiment == "search":
            best = self.manifest["best"]
            words = html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))
            self.equal("page: its answer is about the best", best["name"], "The best plan found, " in words, True)
            told = re.search(r"The best plan found, (.*?), (?:answers|has|reaches|whose|is)", words)
            self.equal("page: the best's name", best["name"], told and told[1].split(" = "), names[best["plan_id"]] if told else None)


def says(text, values):
    """Whether the numbers in a text are these, rounded as the text rounds."""
    numbers = re.findall(r"[-−+]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", text)
    if len(numbers) < len(values):
        values = [v for v in values if v is not None and math.isfinite(v)]
    for number, value in zip(numbers, values, strict=False):
        number = number.replace("−", "-").replace(",", "")
        digits = len(number.partition("e")[0].partition(".")[2])
        step = 10.0 ** (int(number.partition("e")[2] or 0) - digits)
        if abs(float(number) - value) > 0.5001 * step + (1e-9 * abs(value)):
            return len(number.strip("-")) >= 3 and digits == 0 and abs(float(number) - value) < 0.006 * abs(value)
    return bool(numbers)

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--questions", type=int, default=12, help="of each plan, drawn")
    parser.add_argument("--trials", type=int, default=3, help="of each searcher, drawn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    return 1 if sum(audited(run, options.questions, options.trials, options.seed) for run in options.runs) else 0


def audited(run, questions=12, trials=3, seed=0):
    """How many things of a run disagree."""
    audit = Audit(run, questions, trials, seed)
    if audit.experiment in ("search", "sweep", "evaluate"):
        audit.reported()
        audit.derived()
    if audit.experiment in ("search", "sweep"):
        audit.blocks()
    if audit.experiment == "search":
        audit.searched(trials)
    if audit.experiment == "sweep":
        audit.swept()
    if audit.experiment == "similarity":
        audit.compared_layers()
    return audit.failed


if __name__ == "__main__":
    sys.exit(main())
