"""Merged models, prompts and objectives, computed by other code than raymerge's, for audit.py.

Models are merged step by step in float64, written as ordinary checkpoints of fewer layers and loaded by transformers;
prompts are assembled and tokenised whole, one by one.
"""

import copy
import csv
import hashlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from recomputed_alignment import Matcher, reordered
from recomputed_refits import places_of
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

DEMO = Path(__file__).resolve().parents[2] / "raymerge" / "demo"
WINDOW = 1024
#: How the names end of what reads the norms before attention and MLP. Gemma stores gains less 1.
READS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
MLP_READS = ("gate_proj", "up_proj", "gate_up_proj", "input_linear", "c_fc", "fc1", "h_to_4h", ".gate", ".w1", ".w3")
MLP_READS += ("shared_expert_gate",)
GEMMA = ("gemma", "gemma2", "gemma3_text", "vaultgemma")
# Language models that AutoModelForCausalLM has no class of, and those that are the same where positions are one number.
IN_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
UNMERGED = {"steps": [], "alphas": [], "own": {}, "norms": "keep", "biases": "keep", "alignment": "none"}


# -- merging ---------------------------------------------------------------------------------------------------------


def own_name(name):
    """The name that a tensor of a language model inside a multimodal one has in that language model alone; layers of
    all families have one root."""
    inside = {"language_model.": "", "model.language_model.": "model.", "model.text_model.": "model."}
    inside["gpt_neox."] = "model."
    start = next((start for start in inside if name.startswith(start)), "")
    return inside.get(start, "") + name.removeprefix(start)


class Base:
    """A checkpoint's tensors and config, and its layers' matrices, merged here."""

    def __init__(self, path):
        self.folder = DEMO / "checkpoint" if path == "demo" else Path(path)
        self.config = json.loads((self.folder / "config.json").read_text())
        # Layers from which on one may go: the earlier ones are given features of images.
        self.first = len(self.config.get("vision_config", {}).get("deepstack_visual_indexes", ()))
        if "vision_config" in self.config:
            whole = AutoConfig.from_pretrained(self.folder)
            self.config = whole.text_config.to_dict() | {"tie_word_embeddings": whole.tie_word_embeddings}
            if self.config["model_type"] in IN_TEXT:
                rotary = self.config["rope_parameters"]
                self.config["model_type"] = IN_TEXT[self.config["model_type"]]
                self.config["rope_parameters"] = {k: rotary[k] for k in ("rope_type", "rope_theta")}
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.tensors = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self.tensors |= {own_name(name): tensor for name, tensor in load_file(file).items()}
        self.n_layers, self.kind = self.config["num_hidden_layers"], self.config["model_type"]
        self.matcher = Matcher(self)

    def layer(self, number):
        start = f"model.layers.{number}."
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}

    @property
    def offset(self):
        """What a norm's stored weight lacks to its gain."""
        return 1.0 if self.kind in (*GEMMA, "nemotron") else 0.0

    @property
    def down(self):
        """The name of the matrix that leaves a dense MLP."""
        others = {"starcoder2": "c_proj", "phi": "fc2", "granitemoehybrid": "output_linear"}
        return (others | {"gpt_neox": "dense_4h_to_h"}).get(self.kind, "down_proj")

    @property
    def out(self):
        """The name of the matrix that leaves attention, in families that are refitted."""
        return "attention.dense" if self.kind == "gpt_neox" else "self_attn.o_proj"

    @property
    def kv_heads(self):
        return self.config["num_attention_heads" if self.kind == "gpt_neox" else "num_key_value_heads"]

    @property
    def before_mlp(self):
        if self.kind in ("cohere", "cohere2", "phi") or (
            self.kind == "stablelm" and self.config["use_parallel_residual"]
        ):
            return "input_layernorm"
        if self.kind == "apertus":
            return "feedforward_layernorm"
        return "pre_feedforward_layernorm" if self.kind in GEMMA[1:] else "post_attention_layernorm"

    @property
    def readers(self):
        """By input norm, how the names of what reads it end."""
        first = "attention_layernorm" if self.kind == "apertus" else "input_layernorm"
        if self.before_mlp == first:
            return {first: READS + MLP_READS}
        return {first: READS, self.before_mlp: MLP_READS}

    def gains(self, layer):
        """By matrix, the gain (d,) of the norm that it reads."""
        readers = {} if self.kind in ("olmo", "olmo2", "olmo3", "exaone4") else self.readers
        return {
            name: layer[f"{norm}.weight"].double() + self.offset
            for norm, ends in readers.items()
            for name in layer
            if name.endswith(tuple(f"{end}.weight" for end in ends))
        }

    def folded(self, layer):
        """The layer, float64, with the gains of its input norms in its matrices, and in their biases what the norms'
        come to."""
        found = {name: tensor.double() for name, tensor in layer.items()}
        for norm, ends in self.readers.items():
            if (shift := found.get(f"{norm}.bias")) is not None:
                for name in found:
                    if name.endswith(tuple(f"{end}.bias" for end in ends)):
                        found[name] = found[name] + found[name.replace(".bias", ".weight")] @ shift
                found[f"{norm}.bias"] = torch.zeros_like(shift)
        gains = self.gains(layer)
        found |= {name: found[name] * gain for name, gain in gains.items()}
        if gains:
            found |= {name: torch.full_like(found[name], 1.0 - self.offset)
                      for name in (f"{norm}.weight" for norm in self.readers)}  # fmt: skip
        return found

    def merged(self, plan, nudges=None):
        """(tensors, kept layers) of a plan {steps: [(into, remove)], alphas, own: {matrix: alphas}, norms, biases,
        alignment}. nudges: a random generator; sums are then off by what float32 may round off them."""
        coefficients = effective(self.n_layers, plan)
        layers = {number: self.layer(number) for number in range(self.n_layers)}
        kept = sorted(coefficients)
        averaged = {
            name
            for name, tensor in layers[0].items()
            if tensor.ndim == 2 or (name.endswith(".bias") and "norm" not in name and plan["biases"] == "merge")
        }
        work, averages = {}, any(of != {number} for number, of in coefficients.items())
        changing = {number for step in plan["steps"] for number in step}
        changing |= {kept[place] for place in places_of(self.n_layers, plan)[2]}
        for number in changing:
            whole = self.folded(layers[number]) if plan["norms"] == "fold" else layers[number]
            work[number] = {name: whole[name].double() for name in averaged if name in layers[number]}
        if plan["alignment"] in ("neurons", "activations") and averages:
            orders = self.matcher.towards(plan["steps"], plan["alignment"])
            work |= {number: reordered(work[number], order) for number, order in orders.items()}
        for number, (into, remove) in enumerate(plan["steps"]):
            gone = work.pop(remove)
            for name in averaged:
                matrix = name.rpartition(".")[0]
                alpha = plan["own"].get(matrix, plan["alphas"])[number]
                other = gone[name]
                if plan["alignment"] == "rows":
                    order = self.row_order(work[into][f"{matrix}.weight"], gone[f"{matrix}.weight"], matrix)
                    other = other[order]
                total = alpha * work[into][name] + (1 - alpha) * other
                if nudges is not None:
                    size = abs(alpha) * work[into][name].abs() + abs(1 - alpha) * other.abs()
                    total = total + 2.0**-23 * size * torch.tensor(nudges.uniform(-1, 1, size.shape))
                work[into] = work[into] | {f"new {name}": total}
            work[into] = {name: work[into][f"new {name}"] for name in averaged}
        state = {name: t for name, t in self.tensors.items() if not name.startswith("model.layers.")}
        fitted = places_of(self.n_layers, plan)[2]
        for position, number in enumerate(kept):
            layer = layers[number]
            if coefficients[number] != {number} or position in fitted:
                changed = {name: work[number][name].float().to(layer[name].dtype) for name in averaged}
                if plan["norms"] == "fold":
                    layer = {name: t.to(layer[name].dtype) for name, t in self.folded(layer).items()}
                layer = layer | changed
            state |= {f"model.layers.{position}.{name}": tensor for name, tensor in layer.items()}
        return state, kept

    def row_order(self, own, other, matrix):
        """Which row of `other` is laid on each row of `own`, in each part of a matrix that holds several."""
        c = self.config
        heads = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        q, kv = c["num_attention_heads"] * heads, self.kv_heads * heads
        parts = {"qkv_proj": [q, kv, kv]} | dict.fromkeys(("gate_up_proj", "input_linear"), [len(own) // 2] * 2)
        parts = np.split(np.arange(len(own)), np.cumsum(parts.get(matrix.split(".")[-1], [len(own)]))[:-1])
        if matrix.endswith("query_key_value"):
            parts = [np.arange(len(own)).reshape(-1, 3, heads)[:, part].ravel() for part in range(3)]
        order = np.zeros(len(own), dtype=int)
        for rows in parts:
            a, b = (torch.nn.functional.normalize(m[rows], dim=1) for m in (own, other))
            order[rows] = rows[linear_sum_assignment(torch.cdist(a, b).numpy())[1]]
        return order.tolist()

    def load(self, plan, dtype, quantise="none"):
        """The merged model by transformers."""
        return self.built(*self.merged(plan), dtype, quantise)

    def built(self, state, kept, dtype, quantise="none"):
        """A state dict with these of the layers by transformers."""
        if quantise != "none":
            matrices = [
                n
                for n, t in state.items()
                if n.startswith("model.layers.")
                and t.ndim == 2
                and not n.endswith((".gate.weight", "shared_expert_gate.weight"))
            ]
            state = state | {name: quantised(state[name].to(dtype), quantise) for name in matrices}
        config = copy.deepcopy(self.config)
        for key in ("layer_types", "no_rope_layers"):
            if config.get(key):
                config[key] = [config[key][number] for number in kept]
        config["num_hidden_layers"] = len(kept)
        if self.kind == "gpt_neox":
            state = {n.replace("model.", "gpt_neox.", 1) if n.startswith("model.") else n: t for n, t in state.items()}
        with tempfile.TemporaryDirectory() as folder:
            save_file({n: t.contiguous() for n, t in state.items()}, f"{folder}/model.safetensors", {"format": "pt"})
            Path(folder, "config.json").write_text(json.dumps(config))
            return loaded(folder, dtype)


def quantised(weight, scheme):
    """int8: a scale for each row, by which torchao multiplies in float32; int4: for each 32 columns of a row, in the
    weight's dtype. Scales have that dtype in both."""
    parts = weight if scheme == "int8" else weight.reshape(-1, 32)
    top, low, high = (127.5, -128, 127) if scheme == "int8" else (7.5, -8, 7)
    scale = (parts.abs().amax(1, keepdim=True) / top).clamp_min(torch.finfo(torch.float32).eps)
    if scheme == "int8":
        parts, scale = parts.float(), scale.float()
    levels = torch.clamp(torch.round(parts * (1.0 / scale)), low, high)
    return (levels * scale).to(weight.dtype).reshape(weight.shape)


def loaded(folder, dtype):
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}  # the others know no float64
    multimodal = "vision_config" in json.loads(Path(folder, "config.json").read_text())
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **experts)
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
            short = {"validation": "val"}.get(split, split)
            with open(self.folder / short / f"{subject}_{short}.csv", newline="", encoding="utf-8-sig") as file:
                self.files[subject, split] = list(csv.reader(file))
        return self.files[subject, split]

    @property
    def folder(self):
        root = DEMO / "mmlu" if self.data["mmlu"] == "demo" else Path(self.data["mmlu"])
        return next(f for f in (root / self.data["language"], root) if f.is_dir())

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

    def subjects(self, split):
        if self.data["subjects"] != "all":
            return sorted(self.data["subjects"])
        short = {"validation": "val"}.get(split, split)
        return sorted(file.name.removesuffix(f"_{short}.csv") for file in self.folder.glob(f"{short}/*.csv"))

    def drawn(self, split, limit, without=frozenset()):
        """[(subject, split, question id)] of a split, drawn as docs/design.md says."""
        found = []
        for subject in self.subjects(split):
            asked = [(subject, split, f"{subject}/{split}/{row}") for row in range(len(self.rows(subject, split)))]
            asked = [own for own in asked if self.content(*own) not in without]
            ranked = sorted(asked, key=lambda own: hashed([self.data["seed"], own[0], own[2]]))
            found += sorted(ranked[:limit], key=asked.index)
        return found

    def content(self, subject, split, question_id):
        row = self.rows(subject, split)[int(question_id.rpartition("/")[2])]
        return tuple(cell.strip() for cell in row[:5])

    def searched_on(self):
        """[(subject, split, question id)] of the search's questions."""
        data, run = self.data, self.config["plan"]["similarity_run"]
        samples = pq.read_table(Path(run) / "tables" / "samples").to_pylist() if run else []
        seen = {self.content(r["subject"], r["split"], r["question_id"]) for r in samples}
        reported = self.drawn(data["report_split"], data["report_limit_per_subject"], seen)
        gone = {self.content(*own) for own in reported} if data["search_split"] != data["report_split"] else set()
        found = self.drawn(data["search_split"], data["limit_per_subject"])
        named = (
            [names for _, _, names in terms_of(self.config["search"]["objective"])] if "search" in self.config else []
        )
        named = sum(named, []) if named and all(named) else None
        return [own for own in found if self.content(*own) not in gone and (named is None or own[0] in named)]

    def sequences(self, asked):
        """[(ids, shared, start)] of prompts in the order in which they are run: a subject's longest first. The first
        `shared` ids are the subject's; those before `start` were counted with an earlier prompt."""
        found = []
        for subject in sorted({own[0] for own in asked}):
            prompts = [self.prompt(*own) for own in asked if own[0] == subject]
            ids, prefix = [own[0] for own in prompts], prompts[0][1]
            shared = min(prefix, *(len(own) - 1 for own in ids))
            shared = next((n for n in range(shared) if len({own[n] for own in ids}) > 1), shared)
            ids.sort(key=len, reverse=True)
            found += [(own, shared, shared if number else 0) for number, own in enumerate(ids)]
        return found

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
        size = min(WINDOW, self.context()) - len(self.bos)
        found = [self.bos + ids[at : at + size] for at in range(0, len(ids), size)]
        return [window for window in found if len(window) > 1]

    def context(self):
        """What positions reach to, or longrope's short factors: transformers has other frequencies beyond."""
        config = self.base.config
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        scaling = [of for of in (scaling, *scaling.values()) if isinstance(of, dict)]  # one, or one of each layer type
        long = [of for of in scaling if "longrope" in (of.get("rope_type"), of.get("type"))]
        trained = [
            config.get("original_max_position_embeddings") or of["original_max_position_embeddings"] for of in long
        ]
        return min([config["max_position_embeddings"], *trained])

    @torch.no_grad()
    def losses(self, model, windows):
        """Of each window the losses of its tokens but the first."""
        found = []
        for ids in windows:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
            found.append(-torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
        return found


def hashed(value):
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
