"""Which layers a run chose or compared, and why, for audit.py: sweeps, blocks and similarities between layers."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from recomputed import UNMERGED, Asker, effective
from recomputed_similarity import diffusion, linear, similarity


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


def base_alpha(base, plan, matrix, into, remove):
    """A starting coefficient, as docs/config.md has plan.base and sweep.methods."""
    if base.startswith("fixed"):
        return float(base.partition(":")[2] or plan["ratio"])
    if base == "similarity":
        return float(np.clip(matrix[into, remove] / math.sqrt(matrix[into, into] * matrix[remove, remove]), 0, 1))
    own, other = matrix[into].mean(), matrix[remove].mean()
    return 1 / (1 + math.exp(-plan.get("beta", 1.0) * own / (own + other)))


def most_similar(matrix, k, first):
    """Repeatedly the most similar neighbours from layer `first` on."""
    alive, found = list(range(first, len(matrix))), []
    while len(found) < k:
        near = [(matrix[a, b] / math.sqrt(matrix[a, a] * matrix[b, b]), a, b) for a, b in itertools.pairwise(alive)]
        _, into, remove = max(near)
        found.append((into, remove))
        alive.remove(remove)
    return found


def least_influence(influence, k, first):
    """The layers of least block influence from layer `first` on."""
    return set(sorted(range(first, len(influence)), key=lambda layer: influence[layer])[:k])


class Layers:
    """Of an Audit: the points of a sweep, the choice of blocks, and similarity runs."""

    def swept(self):
        """That each point of a sweep is the plan that its method says."""
        n = self.base.n_layers
        steps_of = {row["plan_id"]: [] for row in self.table("plans")}
        for row in self.table("plans", matrix=None):
            if (
                row["step"] is not None
                and (row["step"], row["into"], row["remove"], row["alpha"]) not in steps_of[row["plan_id"]]
            ):
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
                least = least_influence(influence, k, self.base.first)
                self.equal(
                    "sweep: block_influence", of, (stays, set(alphas)), ([x for x in range(n) if x not in least], {1.0})
                )
            elif method == "drop_block":
                self.equal("sweep: drop_block", of, set(alphas), {1.0})
                self.equal("sweep: block", of, stays, self.without_block(k))
            elif method == "drop_greedy":
                gone = {r["layer"] for r in self.table("removals", chosen=True) if r["step"] < k}
                self.equal(
                    "sweep: drop_greedy", of, (stays, set(alphas)), ([x for x in range(n) if x not in gone], {1.0})
                )
            elif method.startswith("file_"):
                told = json.loads(Path(config["sweep"]["alpha_files"][method.removeprefix("file_")]).read_text())
                self.equal(
                    "sweep: file",
                    of,
                    (steps, alphas),
                    (
                        [(s["layer_to_merge_into"], s["layer_to_remove"]) for s in told],
                        [s["ratio_i_alpha"] for s in told],
                    ),
                )
            elif method != "base":
                base = {"most_similar": config["plan"]["base"], "merge_block": config["plan"]["base"]}.get(
                    method, method
                )
                base = {"file": "fixed", "drop": "fixed:1"}.get(base, base.replace("fixed_", "fixed:"))
                wanted = tail
                if method == "most_similar":
                    wanted = most_similar(matrix, k, self.base.first)
                if method == "merge_block":
                    self.equal(
                        "sweep: block", of, len(set(range(n)) - set(self.without_block(k)) - {r for _, r in steps}), 0
                    )
                    wanted = steps
                self.equal("sweep: merges", of, steps, wanted)
                self.same(
                    "sweep: alphas",
                    of,
                    alphas,
                    [base_alpha(base, config["plan"], matrix, *step) for step in steps],
                )

    def blocks(self):
        """The scores of the blocks among which one was chosen, and the choice."""
        rows, config = self.table("blocks"), self.config
        source = (config.get("calibration") or {}).get("text")
        measured = {}
        if rows and source is not None and {r["measure"] for r in rows} & {"cosine", "angular", "loss"}:
            windows = self.asker.windows(source, self.calibration_start(), config["calibration"]["tokens"])
            for k in {r["merges"] for r in rows}:
                measured |= self.block_scores(
                    windows, k, {r["first"] for r in rows if r["merges"] == k}, {r["measure"] for r in rows}
                )
        matrix, _ = similarity_of(config["plan"]) if rows else (None, None)
        for r in rows:
            if r["measure"] == "similarity":
                i, j = r["first"] - 1, r["last"]
                measured["similarity", r["merges"], r["first"]] = 1 - matrix[i, j] / math.sqrt(
                    matrix[i, i] * matrix[j, j]
                )
        known = [r for r in rows if (r["measure"], r["merges"], r["first"]) in measured]
        wanted = np.array([measured[r["measure"], r["merges"], r["first"]] for r in known])
        self.same(
            "blocks: scores",
            "all",
            [r["score"] for r in known],
            wanted,
            20 * self.rounding * np.maximum(1, np.abs(wanted)),
        )
        for k in {r["merges"] for r in rows}:
            chosen = next(r for r in rows if r["merges"] == k and r["chosen"])
            if chosen["score"] is not None:
                own = [r for r in rows if r["merges"] == k and r["measure"] == chosen["measure"]]
                best = min(own, key=lambda r: (r["score"], -r["first"]))
                self.equal("blocks: the chosen", k, chosen["first"], best["first"])

    def removals(self):
        """The losses of a text by models without the layers that went one by one, and the choices."""
        rows, config = self.table("removals"), self.config
        if not rows:
            return
        windows = self.asker.windows(
            config["calibration"]["text"], self.calibration_start(), config["calibration"]["tokens"]
        )
        gone = []
        for step in range(1 + max(r["step"] for r in rows)):
            own = {r["layer"]: r for r in rows if r["step"] == step}
            of = f"step {step}"
            stays = [x for x in range(self.base.first, self.base.n_layers) if x not in gone]
            self.equal("removals: layers", of, sorted(own), stays)
            losses = [self.loss_without(windows, {*gone, x}) for x in stays]
            self.same("removals: loss", of, [own[x]["loss"] for x in stays], losses, 20 * self.rounding * max(losses))
            (chosen,) = (x for x in stays if own[x]["chosen"])
            best = min(stays, key=lambda x, own=own: (own[x]["loss"], -x))
            self.equal("removals: the chosen", of, chosen, best)
            gone.append(chosen)

    def loss_without(self, windows, gone):
        """The mean loss of a token with layers left out, the layers as they are stored."""
        stays = [x for x in range(self.base.n_layers) if x not in gone]
        into = {x: max((y for y in stays if y < x), default=stays[0]) for x in gone}
        chain = [(into[x], x) for x in sorted(gone, key=lambda x: x if x > stays[0] else -x)]
        plan = UNMERGED | {"steps": chain, "alphas": [1.0] * len(chain)}
        return float(np.concatenate(self.asker.losses(self.model(plan), windows)).mean())

    @torch.no_grad()
    def block_scores(self, windows, k, firsts, measures):
        found, n = {}, self.base.n_layers
        model = self.model(UNMERGED)
        states = [
            model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
            for ids in windows
        ]
        if "loss" in measures:
            for first in firsts:
                chain = (
                    [(first - 1, x) for x in range(first, first + k)]
                    if first
                    else [(k, x) for x in range(k - 1, -1, -1)]
                )
                plan = UNMERGED | {"steps": chain, "alphas": [1.0] * k}
                found["loss", k, first] = np.concatenate(self.asker.losses(self.model(plan), windows)).mean()
        for first in firsts if measures & {"cosine", "angular"} else ():
            if first + k == n:  # the last of transformers' states is behind the final norm
                kept = []
                hook = model.base_model.layers[-1].register_forward_hook(
                    lambda _, __, out, own=kept: own.append(out if torch.is_tensor(out) else out[0])
                )
                for ids in windows:
                    model(input_ids=torch.tensor([ids]), use_cache=False)
                hook.remove()
            else:
                kept = [own[first + k] for own in states]
            cos = torch.cat(
                [
                    torch.cosine_similarity(own[first][0].double(), out[0].double(), dim=-1)
                    for own, out in zip(states, kept, strict=True)
                ]
            )
            found["cosine", k, first] = float((1 - cos).mean())
            found["angular", k, first] = float(cos.clamp(-1, 1).acos().mean() / math.pi)
        return found

    def without_block(self, k):
        first = self.table("blocks", chosen=True, merges=k)[0]["first"]
        return [x for x in range(self.base.n_layers) if not first <= x < first + k]

    def compared_layers(self):
        """Distances between the states of the run's own prompts, their embeddings, similarities, and correlations."""
        c, model = self.config["similarity"], self.base.load(UNMERGED, self.dtype, self.config["model"]["quantise"])
        states, inputs = [], []
        for layer in model.base_model.layers:
            layer.register_forward_hook(
                lambda m, a, out: states.append((out if torch.is_tensor(out) else out[0])[0].double())
            )
            layer.register_forward_pre_hook(
                lambda m, a, k: inputs.append((a[0] if a else k["hidden_states"])[0].double()), with_kwargs=True
            )
        groups = {}
        for row in self.table("samples"):
            groups.setdefault((row["subset"], row["language"]), []).append(row)
        matrices, noise = {}, {}
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
            padded = [
                [torch.nn.functional.pad(s, (0, 0, 0, longest - len(s))).flatten() for s in own] for own in pooled
            ]
            layers = torch.stack([torch.stack(own) for own in padded]).transpose(0, 1).numpy()  # (L, N, T d)
            distances = np.stack([np.linalg.norm(own[:, None] - own, axis=-1) for own in layers])
            wanted = [
                1 - torch.cat([own[layer] for own in cosines]).mean().item() for layer in range(self.base.n_layers)
            ]
            influence = [
                r["value"]
                for r in sorted(self.table("block_influence", subset=key[0], language=key[1]), key=lambda r: r["layer"])
            ]
            self.same("block influence", key, influence, wanted, 20 * self.rounding)
            stored = self.embedded(key, distances, c)
            if c["measure"] in ("cosine", "cka"):
                values = linear(layers, layers, c["measure"])
            else:
                values = similarity(stored, c)
            self.same(
                f"similarity: {c['measure']}",
                key,
                matrices[key],
                values,
                max(2e-4, self.rounding / 10)
                if c["measure"] in ("cosine", "cka")
                else 1e-6 * np.maximum(1, np.abs(np.nan_to_num(values))),
            )
            noise[key] = self.uncertain(key, layers, distances, stored)
        above = np.triu_indices(self.base.n_layers, 1)
        for row in self.table("similarity_correlation"):
            sides = [noise[row[f"subset_{x}"], row[f"language_{x}"]] for x in "ab"]
            if None not in sides:
                self.related(row, *sides)
            a, b = (matrices[row[f"subset_{x}"], row[f"language_{x}"]] for x in "ab")
            for column, pick in (("pearson", slice(None)), ("pearson_off_diagonal", above)):
                x, y = a[pick].ravel(), b[pick].ravel()
                both = np.isfinite(x) & np.isfinite(y)
                self.same(
                    f"correlation: {column}",
                    f"{row['subset_a']} {row['subset_b']}",
                    row[column],
                    np.corrcoef(x[both], y[both])[0, 1],
                    1e-6,
                )

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
            values, s, total = diffusion(d, c)
            values = values[:, : shape[2]]
            share = s / s.sum()
            rank = np.exp(-np.sum(share[share > 1e-300] * np.log(share[share > 1e-300])))
            mass = 1 - np.trace(total) / total.sum()
            self.same(
                "degeneracy",
                f"{key} {layer}",
                [ranks[layer]["effective_rank"], ranks[layer]["off_diagonal_mass"]],
                [rank, mass],
                [0.01 * rank + 1e-3, 1e-3],
            )
            gaps = np.abs(np.diff(s[: shape[2] + 2]))
            if gaps.min() < 1e-3 or not 1.05 < rank < 0.9 * len(d):
                self.line("embedding", f"{key} {layer}", skipped="degenerate: the map is noise, or a rotation is free")
                continue
            signs = np.sign(np.sum(values * stored[layer], axis=0))
            self.same(
                "embedding",
                f"{key} {layer}",
                stored[layer],
                values * signs,
                3e-3 / gaps.min() * max(self.rounding * 10, 1e-4) * 100 * np.abs(values).max(),
            )
        return stored
