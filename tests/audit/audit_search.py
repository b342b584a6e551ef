"""Candidates of a search scored again, and what was chosen among them, for audit.py."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from audit_layers import base_alpha, least_influence, most_similar, similarity_of
from recomputed import UNMERGED, answer_nll, effective, is_accuracy, objective_value, same_text, terms_of


class Searches:
    """Of an Audit: the rows of `trials`, descents, and the plans that are reported as the best."""

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
            return [
                (s["layer_to_merge_into"], s["layer_to_remove"])
                for s in json.loads(Path(plan["alpha_file"]).read_text())
            ]
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

    def searched(self):
        """Rows of `trials` of every searcher, worked out again; what is chosen among them."""
        data, search = self.config["data"], self.config["search"]
        trials, (plans, names) = self.table("trials"), self.plans()
        objective, ceiling = search["objective"], search["perplexity_ceiling"]
        asks = data["mmlu"] is not None and any(m != "text_nll" for _, m, _ in terms_of(objective))
        answers = self.table("answers", split=data["search_split"]) if asks else []
        asked = sorted({(r["subject"], r["split"], r["question_id"]) for r in answers})
        if asked and data["search_split"] != data["report_split"]:
            self.equal("search: its questions", "all", asked, sorted(self.asker.searched_on()))
        elif asked:  # of one split the answers are the report's
            asked = sorted(self.asker.searched_on())
        windows = []
        if search["text"] is not None and ("text_nll" in objective or ceiling is not None):
            windows = self.asker.windows(search["text"], self.search_start(), search["text_tokens"])

        def judged(plan):
            model, logits, right, text = self.model(plan), None, None, None
            if windows:
                text = float(np.concatenate(self.asker.losses(model, windows)).mean())
            if not asks:
                none = np.zeros((0, 4))  # of no measure that the objective has
                return objective_value(objective, none, none, np.zeros(0, int), [], text, ceiling), None, None, text
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
                self.same(
                    "trial: accuracy",
                    of,
                    row["accuracy"],
                    accuracy,
                    1.01 / len(asked) if self.rounding > 1e-3 else 1e-9,
                )
            if text is not None:
                self.same("trial: perplexity", of, math.log(row["perplexity"]), text, 20 * self.rounding * max(1, text))

        good = [row for row in trials if row["status"] == "ok"]
        for searcher in dict.fromkeys(row["searcher"] for row in good):
            own = [r for r in good if r["searcher"] == searcher and (searcher != "controls" or r["plan_id"] in plans)]
            for row in self.random.sample(own, min(self.trials, len(own))):
                plan = plans[row["plan_id"]] if searcher == "controls" else self.candidate(row)
                if why := self.can_merge(plan):
                    self.line("trial", f"{searcher} {row['iteration']}", skipped=why)
                    continue
                compare(row, plan)
        self.controls(plans, names)
        self.descended(good)
        self.chosen(good, plans, names, judged, objective)

    def controls(self, plans, names):
        """That controls and the base coefficients are what their names say."""
        own = {name: plans[key] for key, every in names.items() if key in plans for name in every}
        section, n, k = self.config["plan"], self.base.n_layers, len(self.start())
        matrix, influence = similarity_of(section)
        stays = {"base": range(n), "drop": range(n - k), "before_last": [*range(n - 1 - k), n - 1]}
        if influence is not None:
            gone = least_influence(influence, k, self.base.first)
            stays["block_influence"] = [layer for layer in range(n) if layer not in gone]
        for name, kept in stays.items():
            if name in own:
                found = effective(n, own[name])
                self.equal("control: its layers", name, found, {layer: {layer} for layer in kept})
        if section["selection"] == "most_similar" and section["threshold"] is None and not section["recompute"]:
            self.equal("start: its merges", "most_similar", self.start(), most_similar(matrix, k, self.base.first))
        alphas = {"fixed_0.6225": [0.6225] * k}
        if section["base"] != "file" and not section["recompute"]:
            name = f"fixed_{section['ratio']:g}" if section["base"] == "fixed" else section["base"]
            alphas[name] = [base_alpha(section["base"], section, matrix, *step) for step in self.start()]
        for name, wanted in alphas.items():
            if name in own:
                self.equal("start: its merges", name, own[name]["steps"], self.start())
                self.same("start: its alphas", name, own[name]["alphas"], wanted)

    def descended(self, good):
        """That a descent's row has the coefficients of its best epoch, by the loss on held-out questions if any."""
        history = {}
        for row in self.table("gradient_history"):
            history.setdefault((row["searcher"], row["start"]), []).append(row)
        order = [
            ("q_proj", "k_proj", "v_proj", "qkv_proj"),
            ("o_proj", "dense"),
            ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1"),
            ("down_proj", "c_proj", "fc2"),
        ]
        order = [
            f"{part}.{name}"
            for part, names in zip(("self_attn", "self_attn", "mlp", "mlp"), order, strict=True)
            for name in names
        ]
        order += ["shared_mlp.input_linear", "shared_mlp.output_linear"]
        order += ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
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
                shares = np.array(
                    [
                        [
                            np.prod([1 - a for a in alphas[::-1][:j]]) * (alphas[::-1][j] if j < k else 1.0)
                            for j in range(k + 1)
                        ]
                        for alphas in own.values()
                    ]
                ).mean(0)
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
            name = (
                "random"
                if row["searcher"] == "random" and "found_random" not in sum(names.values(), [])
                else f"found_{row['searcher']}"
            )
            if row["searcher"] != "controls" and (name not in best or order(row) > order(best[name])):
                best[name] = row
        for name, row in best.items():
            key = next((k for k, own in names.items() if name in own), None)
            self.equal("chosen: plan of the best trial", name, key, row["plan_id"])
            if (plan := plans.get(key)) is not None:
                wanted = self.candidate(row)
                self.equal(
                    "chosen: its merges",
                    name,
                    [plan[k] for k in ("steps", "alphas", "own", "norms", "alignment")],
                    [wanted[k] for k in ("steps", "alphas", "own", "norms", "alignment")],
                )
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

    @property
    def needs_search_text(self):
        search = self.config.get("search") or {}
        return search.get("text") is not None and (
            "text_nll" in search["objective"]
            or search["perplexity_ceiling"] is not None
            or bool((self.config.get("gradient") or {}).get("text_kl"))
        )

    def search_start(self):
        search, data = self.config["search"], self.config["data"]
        return data["perplexity_tokens"] if same_text(search["text"], data["perplexity_text"]) else 0

    def calibration_start(self):
        """The first token of the calibration's text that is neither reported nor searched on."""
        source, data, search = self.config["calibration"]["text"], self.config["data"], self.config.get("search") or {}
        start = data["perplexity_tokens"] if same_text(source, data["perplexity_text"]) else 0
        if self.needs_search_text and same_text(source, search["text"]):
            start = max(start, self.search_start() + search["text_tokens"])
        return start
