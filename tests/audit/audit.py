"""Recomputes what a finished run says, by other code, and compares; a JSON line for each thing, exit code 1 if any
disagrees.

    python tests/audit/audit.py RUN… [--questions 12] [--trials 3] [--seed 0]

Of search, sweep, evaluate and similarity: every reported plan's answers, losses, coefficients, costs and receipts, with
alignments (also that they are symmetries) and refits worked out again; tasks, retrieval from a context; alpha files and
saved models with their cards and mergekit.yaml; candidates drawn from `trials`, what was chosen among them, descents;
accuracies, intervals, differences and p-values; points of a sweep, blocks, similarities with their noise; the page, if
there is one in the run. Not compared: alignment "activations" and "units" where rounded sums decide, prompts of more
than one shard for these and for refits, intervals of correlations between translations, noise of t-SNE, bases from
GGUF or the hub. Retrieval is held against other prompts and noise against other draws: only gross faults of these show.

Nothing is shared with raymerge but files: the run's configuration and tables, read by pyarrow, the base's safetensors,
questions and texts. Models are merged here step by step in float64, written as ordinary checkpoints of fewer layers,
loaded by transformers, and asked whole prompts, assembled and tokenised here. What differs by more than a model's own
arithmetic does is allowed where the merge or the fit is that sensitive: by what comes of the same one, several times
over, with its sums and states off by what they may be rounded by. A line: what was compared, how many values, the
largest disagreement and what is allowed; lines with "skipped" say what was not compared, and why.
"""

import argparse
import functools
import glob
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from audit_layers import Layers
from audit_noise import Noise
from audit_numbers import Numbers
from audit_search import Searches
from audit_tasks import Tasks
from recomputed import UNMERGED, WINDOW, Asker, Base, effective, loaded, mergekit, own_name, weights_of
from recomputed_alignment import reordered
from recomputed_refits import Refits
from safetensors.torch import load_file
from transformers.utils import logging

SHARD = 8192  # tokens that are run in one piece
NUDGED, TIMES = 6, 3  # how often a plan is made again with nudged sums, and how often their largest effect is allowed


class Audit(Numbers, Layers, Searches, Tasks, Noise):
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
        # What sums in another order, rounded to the dtype, may differ by, relative to the largest logit.
        self.arithmetic = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[self.dtype]
        # The same of candidates, and of quantised layers, that are made otherwise than plans that are reported.
        self.rounding = self.arithmetic
        if any(tensor.dtype != torch.float32 for tensor in self.base.tensors.values()):
            self.rounding = max(self.rounding, 1e-3)
        if self.config["model"]["quantise"] != "none":  # a sum's last bit decides to which level it is rounded
            self.rounding = max(self.rounding, 5e-3)
        self.models, self.states = {}, {}
        # Of a real model each takes gigabytes.
        self.most_held = 4 if sum(tensor.nbytes for tensor in self.base.tensors.values()) < 10**8 else 1
        self.twins, self.twin_models = (None, []), (None, [])

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

    def near(self, what, of, found, measure, own, twins, allowed, each=False):
        """Compare numbers with those that `measure` makes of `own`. Where more than allowed is between them, it is
        allowed some times what it makes of twins differs by; each: of each number, not the largest of all."""
        found, wanted = np.asarray(found, np.float64), np.asarray(measure(own), np.float64)
        if found.shape == wanted.shape and not np.isclose(found, wanted, 0, allowed, equal_nan=True).all():
            with np.errstate(invalid="ignore"):
                spread = [np.nan_to_num(np.abs(np.asarray(measure(twin)) - wanted)) for twin in twins()]
            if spread:
                allowed = allowed + TIMES * (np.max(spread, axis=0) if each else np.max(spread, initial=0.0))
        self.same(what, of, found, wanted, allowed)

    def equal(self, what, of, found, wanted):
        """Compare what must be alike."""
        self.failed += found != wanted
        self.line(what, of, ok=found == wanted, **({} if found == wanted else {"found": found, "wanted": wanted}))

    # plans

    def plans(self):
        """plan_id -> plan, of the reported plans; names by plan_id beside it."""
        refits = {row["plan_id"]: self.refit(row["method"]) for row in self.table("refits")}
        found, names = {}, {}
        for row in self.table("plans"):
            key = row["plan_id"]
            names.setdefault(key, [])
            if row["name"] not in names[key]:
                names[key].append(row["name"])
            if names[key][0] != row["name"]:
                continue
            plan = found.setdefault(
                key,
                {"steps": [], "alphas": [], "own": {}, "biases": self.biases, "refit": refits.get(key)}
                | {k: row[k] for k in ("name", "kind", "selection", "alignment", "norms")},
            )
            if row["step"] is None:
                continue
            if row["matrix"] is None:
                plan["steps"].append((row["into"], row["remove"]))
                plan["alphas"].append(row["alpha"])
            else:
                plan["own"].setdefault(row["matrix"], []).append(row["alpha"])
        return found, names

    def refit(self, method):
        plan, layers = self.config["plan"], method in ("outputs", "units")
        return {"method": method, "ridge": plan["ridge"], "layers": plan["refit_layers"] if layers else 0}

    @property
    def biases(self):
        return self.config["plan"]["biases"] if "plan" in self.config else "keep"

    def averages(self, plan):
        return any(of != {kept} for kept, of in effective(self.base.n_layers, plan).items())

    def can_merge(self, plan):
        """Why a plan cannot be recomputed; None where it can."""
        if plan["alignment"] == "activations" and self.averages(plan):
            if self.dtype != torch.float32 or self.config["model"]["quantise"] != "none":
                return "alignment by activations of sums that are not float32: their last bits decide"
            if not self.matchable(plan):
                return "alignment by activations of more than one shard"
        if plan.get("refit") and self.fits is None:
            return "refitted on shards that were drawn"
        if plan.get("refit") and plan["refit"]["method"] == "units" and self.dtype != torch.float32:
            if len(self.fits.held) < 100:
                return "units chosen on few tokens of rounded states: their last bits decide"
        return None

    def matchable(self, plan):
        """Whether the prompts of the search questions are one shard; the matcher then has the MLP units' values on them
        of the layers that a plan merges, and of those between them."""
        sequences = self.prompts
        if sum(len(ids) - start for ids, _, start in sequences) > SHARD:
            return False
        values = self.base.matcher.values
        spans = [range(min(step), max(step) + 1) for step in plan["steps"]]
        if missing := {number for span in spans for number in span} - values.keys():
            model, seen = self.model(UNMERGED), {number: [] for number in sorted(missing)}
            hooks = []
            for number, own in seen.items():
                for name, module in model.base_model.layers[number].named_modules():
                    if name.endswith(f"mlp.{self.base.down}"):
                        hook = module.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0][0]))
                        hooks.append(hook)
            with torch.no_grad():
                for ids, *_ in sequences:
                    model(input_ids=torch.tensor([ids]), use_cache=False)
            for hook in hooks:
                hook.remove()
            for number, parts in seen.items():
                own = [part[start:] for part, (*_, start) in zip(parts, sequences, strict=True)]
                values[number] = torch.cat(own).float().numpy()
        return True

    @functools.cached_property
    def prompts(self):
        return self.asker.sequences(self.asker.searched_on())

    @functools.cached_property
    def fits(self):
        """What refits are made by; None where their tokens are shards that were drawn."""
        c = self.config["calibration"]
        if c["text"] is not None:
            sequences = [(ids, 0, 0) for ids in self.asker.windows(c["text"], self.calibration_start(), c["tokens"])]
        else:
            sequences = self.prompts
            if sum(len(ids) - start for ids, _, start in sequences) > SHARD:
                return None
        return Refits(self.base, sequences, lambda *state: self.base.built(*state, self.dtype))

    def state(self, plan):
        """(state dict, kept layers, figures of fits) of a plan."""
        key = self.key(plan)
        if key not in self.states:
            if len(self.states) >= self.most_held:
                self.states.pop(next(iter(self.states)))
            self.states[key] = self.made(plan)
        return self.states[key]

    def made(self, plan, nudges=None):
        state, kept = self.base.merged(plan, nudges)
        state, figures = self.fits.fitted(state, kept, plan, nudges) if plan.get("refit") else (state, [])
        return state, kept, figures

    def nudged(self, plan):
        """What `state` gives, several times over, as it is where sums and states are rounded otherwise; none of plans
        that nothing is computed for."""
        key = self.key(plan)
        if self.twins[0] != key:
            computes = plan.get("refit") or self.averages(plan)
            seeds = range(NUDGED) if computes else []
            self.twins = key, [self.made(plan, np.random.default_rng(seed)) for seed in seeds]
        return self.twins[1]

    def nudged_models(self, plan):
        """Models of what `nudged` gives, made one by one: of a real model each takes gigabytes, and is forgotten."""
        key, quantise = self.key(plan), self.config["model"]["quantise"]
        held = self.twin_models[1] if self.twin_models[0] == key else []
        if self.most_held > 1:
            self.twin_models = key, held
        for number, (state, kept, _) in enumerate(self.nudged(plan)):
            model = held[number] if number < len(held) else self.base.built(state, kept, self.dtype, quantise)
            if self.most_held > 1 and number == len(held):
                held.append(model)
            yield model

    @staticmethod
    def key(plan):
        return json.dumps([plan.get(k) for k in ("steps", "alphas", "own", "norms", "biases", "alignment", "refit")])

    def model(self, plan):
        key = self.key(plan)
        if key not in self.models:
            if len(self.models) >= self.most_held:
                self.models.pop(next(iter(self.models)))
            self.models[key] = self.base.built(*self.state(plan)[:2], self.dtype, self.config["model"]["quantise"])
        return self.models[key]

    def compared_model(self, what, plan_id, model, plan, saved=False):
        """A model's answers and losses against what the tables have of a plan. saved: its weights are the product's."""
        data, rounding = self.config["data"], self.arithmetic

        def near(name, found, measure, allowed, of=plan_id):
            twins = (lambda: ()) if saved else (lambda: self.nudged_models(plan))
            self.near(f"{what}: {name}", of, found, measure, model, twins, allowed)

        rows = [r for r in self.table("answers", plan_id=plan_id) if r["split"] == data["report_split"]]
        rows = self.random.sample(rows, min(self.limit, len(rows)))
        if rows:
            asked = [(r["subject"], r["split"], r["question_id"]) for r in rows]
            answers = functools.lru_cache(1)(lambda model: self.asker.answers(model, asked))
            found = np.array([[r[f"logit_{x}"] for x in "abcd"] for r in rows])
            # A letter's logit is rounded like larger ones, of which the logsumexp is about the largest.
            largest = [abs(r["logsumexp_all"] or 0.0) for r in rows]
            allowed = rounding * max(1.0, np.abs(found).max(), *largest)
            near("logits", found, lambda model: answers(model)[0], allowed)
            self.equal(f"{what}: predicted", plan_id, [r["predicted"] for r in rows], found.argmax(1).tolist())
            right = [self.asker.prompt(*a)[2] for a in asked]
            self.equal(f"{what}: right answers", plan_id, [r["answer"] for r in rows], right)
            if rows[0]["logsumexp_all"] is not None:
                near("logsumexp", [r["logsumexp_all"] for r in rows], lambda model: answers(model)[1], allowed)
            if rows[0]["prompt_nll"] is not None:
                near("prompt NLL", [r["prompt_nll"] for r in rows], lambda model: answers(model)[3], rounding * 10)
        self.compared_tasks(what, plan_id, near)
        if what.startswith("model"):
            self.retrieval(what, plan_id, model)
        texts = self.table("perplexity", plan_id=plan_id, target="text")
        if texts:
            windows = self.asker.windows(data["perplexity_text"], 0, data["perplexity_tokens"])
            losses = functools.lru_cache(1)(lambda model: self.asker.losses(model, windows))
            total = np.concatenate(losses(model))
            self.equal(f"{what}: text tokens", plan_id, texts[0]["tokens"], len(total))
            mean, usual = texts[0]["nll"], rounding * max(1.0, total.mean())
            near("text NLL", mean, lambda model: np.concatenate(losses(model)).mean(), usual)
            places = self.table("context", plan_id=plan_id, measure="position_nll")
            ends = {1: 16, 16: 64, 64: 256, 256: 512, 512: WINDOW}

            def by_position(model):
                return [
                    np.concatenate([own[r["bucket"] - 1 : ends[r["bucket"]] - 1] for own in losses(model)])
                    for r in places
                ]

            lengths = [len(own) for own in by_position(model)]
            self.equal(f"{what}: tokens by position", plan_id, [r["n"] for r in places], lengths)
            found = [r["value"] for r in places]
            near("NLL by position", found, lambda model: [own.mean() for own in by_position(model)], 10 * usual)
            parts = self.table("text_losses", plan_id=plan_id)
            found = np.array([r["nll"] for r in parts])
            near(
                "passages",
                found,
                lambda model: [losses(model)[r["window"]][r["position"] - 1 :][: r["tokens"]].sum() for r in parts],
                10 * rounding * np.maximum(1, np.abs(found)),
            )

    def reported(self):
        plans, names = self.plans()
        for key, plan in plans.items():
            if why := self.can_merge(plan):
                self.line("model", names[key], skipped=why)
                continue
            self.compared_model(f"model {names[key][0]}", key, self.model(plan), plan)
            if plan["alignment"] in ("neurons", "activations") and self.averages(plan):
                self.symmetric(plan)
            self.described(key, plan)
        for file in sorted((self.run / "alphas").glob("*.json")):
            steps = json.loads(file.read_text())
            key = next((k for k, own in names.items() if file.stem in own or file.stem.endswith(f"-{k}")), None)
            plan = plans.get(key)
            if plan is None:
                self.line("alpha file", file.name, skipped="no plan of this name")
                continue
            self.equal(
                "alpha file: steps",
                file.name,
                [(s["layer_to_merge_into"], s["layer_to_remove"]) for s in steps],
                plan["steps"],
            )
            self.same("alpha file: alphas", file.name, [s["ratio_i_alpha"] for s in steps], plan["alphas"], 0)
            self.equal("alpha file: no matrices", file.name, plan["own"], {})
        files = {file: json.loads(file.read_text()) for file in sorted((self.run / "plans").glob("*.json"))}
        for file, record in files.items():
            self.equal("plan file: its name", file.name, record["name"] in names.get(record["plan_id"], []), True)
            if record["plan_id"] in plans:
                self.recorded("plan file", file.name, record, plans[record["plan_id"]])
        if self.experiment in ("search", "sweep"):
            found = {record["plan_id"] for record in files.values()} & plans.keys()
            wanted = sorted(key for key, plan in plans.items() if plan["steps"])
            self.equal("plan files: of every merge", "", sorted(found), wanted)
        for folder in sorted((self.run / "models").glob("*")):
            self.saved(folder, plans, names)

    def recorded(self, what, of, record, plan):
        """What a plan file, or a saved model's record, says of a plan."""
        told = {"steps": [tuple(s[:2]) for s in record["steps"]], "alphas": [s[2] for s in record["steps"]]}
        told |= {"own": record.get("matrix_alphas", {}), **{k: record[k] for k in ("norms", "alignment")}}
        if self.averages(plan):  # else biases are the kept layers' whatever is asked for
            told["biases"] = record["biases"]
        self.equal(what, of, told, {k: plan[k] for k in told})

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
        state, kept, figures = self.state(plan)
        count, size = (sum(f(t) for t in state.values()) for f in (torch.numel, lambda t: t.numel() * t.element_size()))
        whole = sum(t.numel() for t in self.base.tensors.values())
        cost = self.table("costs", plan_id=key)[0]
        if self.config["model"]["quantise"] != "none":
            size = cost["bytes"]
        wanted = [len(kept), n - len(kept), count, whole - count, size]
        self.equal(
            "costs",
            key,
            [cost[k] for k in ("layers", "layers_removed", "parameters", "parameters_removed", "bytes")],
            wanted,
        )
        self.refitted(key, plan, figures)
        rows = [row | {"tensor": own_name(row["tensor"])} for row in self.table("receipts", plan_id=key)]

        def changes(made):
            found = []
            for name in (row["tensor"] for row in rows):
                before, change = (
                    self.base.tensors[name].double(),
                    made[0][name].double() - self.base.tensors[name].double(),
                )
                relative = float(change.norm() / before.norm()) if before.norm() else float(bool(change.any()))
                found.append((float(change.abs().max()), relative))
            return np.array(found).reshape(-1, 2)

        # A sum in another order may round an entry to its neighbour, by more where a fit made weights far larger.
        allowed = []
        for row in rows:
            times = max(1.0, row["relative_change"])
            digit, size = torch.finfo(state[row["tensor"]].dtype).eps, float(state[row["tensor"]].abs().max())
            allowed.append([digit * size + 1e-6, times * (digit / 64 + 1e-6)])
        found = np.array([[r["max_abs_change"], r["relative_change"]] for r in rows]).reshape(-1, 2)
        own, allowed = (state, kept, figures), np.array(allowed).reshape(-1, 2)
        self.near("receipts", key, found, changes, own, lambda: self.nudged(plan), allowed, each=True)
        missing = {n for n, t in state.items() if not torch.equal(t, self.base.tensors[n])} - {
            r["tensor"] for r in rows
        }
        self.equal("receipts: all that changed", key, sorted(missing), [])

    def symmetric(self, plan):
        """That the layers of the unmerged model compute, reordered as an alignment has them, what they did."""
        orders, state = self.base.matcher.towards(plan["steps"], plan["alignment"]), dict(self.base.tensors)
        for number, order in orders.items():
            layer = reordered(self.base.layer(number), order)
            state |= {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
        ids = torch.tensor([self.asker.ids("What these layers computed, they compute in another order:")])

        @torch.no_grad()
        def logits(state):
            return self.base.built(state, [*range(self.base.n_layers)], torch.float64)(input_ids=ids).logits[0]

        found, wanted = logits(state), logits(self.base.tensors)
        self.same("alignment: a symmetry", plan["name"], found, wanted, 1e-6 * float(wanted.abs().max()))

    def refitted(self, key, plan, figures):
        """What table `refits` has of a plan."""
        rows = self.table("refits", plan_id=key)
        found, wanted = (
            [[own.get(k) for k in ("layer", "part", "tokens", "ridge")] for own in x] for x in (rows, figures)
        )
        self.equal("refit: its fits", key, found, wanted)
        for name in ("error", "held_out_error"):

            def told(rows, name=name):
                return np.array([math.nan if r.get(name) is None else r[name] for r in rows])

            allowed = 1e-3 * np.abs(np.nan_to_num(told(figures))) + 1e-6
            twins = lambda: [made[2] for made in self.nudged(plan)]  # noqa: E731
            self.near(f"refit: {name}", key, told(rows), told, figures, twins, allowed, each=True)

    def saved(self, folder, plans, names):
        """A saved model: its answers are its plan's, its weights those merged here, its record true."""
        record = json.loads((folder / "merge_plan.json").read_text())
        key = record["plan_id"]
        self.equal("saved: its name", folder.name, folder.name in names.get(key, []), True)
        plan = plans[key]
        if self.config["model"]["quantise"] == "none":
            self.compared_model(f"saved {folder.name}", key, loaded(folder, self.dtype), plan, saved=True)
        self.recorded("saved: its record", folder.name, record, plan)
        alphas = json.loads((folder / "alphas.json").read_text())
        self.equal(
            "saved: alphas.json",
            folder.name,
            [(a["layer_to_merge_into"], a["layer_to_remove"], a["ratio_i_alpha"]) for a in alphas],
            [(*s, a) for s, a in zip(plan["steps"], plan["alphas"], strict=True)],
        )
        rows = [
            [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in (folder / "README.md").read_text().splitlines()
            if line.startswith("| ")
        ]
        steps = [(int(a), int(b), float(c)) for _, a, b, c in (r for r in rows if len(r) == 4 and r[0].isdigit())]
        self.equal(
            "card: steps",
            folder.name,
            steps,
            [(*s, round(a, 6)) for s, a in zip(plan["steps"], plan["alphas"], strict=True)],
        )
        self.told("card", rows, 1, names)
        if self.can_merge(plan):
            return
        state, _, _ = self.state(plan)
        stored = {}
        for file in folder.glob("*.safetensors"):
            stored |= {own_name(name): tensor for name, tensor in load_file(file).items()}
        self.weights("saved: weights", folder.name, stored, state, lambda: [made[0] for made in self.nudged(plan)])
        if (folder / "mergekit.yaml").exists():
            self.weights("mergekit.yaml: weights", folder.name, mergekit(self.base, folder / "mergekit.yaml"), state)

    def weights(self, what, of, found, wanted, twins=tuple):
        self.equal(f"{what}' names", of, sorted(found), sorted(wanted))
        eps = max(torch.finfo(t.dtype).eps for t in wanted.values())

        def worst(state):
            pairs = [(state[n].double(), t.double()) for n, t in wanted.items() if n in state]
            return max(float(((a - b).abs() / (b.abs() + b.abs().max() * 1e-2 + 1e-30)).max()) for a, b in pairs)

        self.near(what, of, worst(found), worst, wanted, twins, 2 * eps + 1e-5)


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
        audit.derived_tasks()
    if audit.experiment in ("search", "sweep"):
        audit.blocks()
        audit.removals()
    if audit.experiment == "search":
        audit.searched()
    if audit.experiment == "sweep":
        audit.swept()
    if audit.experiment == "similarity":
        audit.compared_layers()
    if (page := Path(run) / "report.html").exists():
        audit.page(page.read_text(encoding="utf-8"))
    return audit.failed


if __name__ == "__main__":
    sys.exit(main())
