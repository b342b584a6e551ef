"""Layers at the seams of a merge fitted again, by least squares in float64 on states that transformers gives, for
audit.py: of docs/design.md ("Refits") and the docstrings of `refit` and `normal_equations`."""

import numpy as np
import torch
from recomputed_alignment import UNITS
from scipy.linalg import solve

RIDGES = (0.01, 0.1, 1.0, 10.0)
MASSIVE = 50
DIGITS = 8  # in the last place, that a state may be off after as many sums in another order


def places_of(n_layers, plan):
    """(groups: each kept layer's own, seams, positions that are fitted) of a plan; these are none without a refit."""
    groups = {number: [number] for number in range(n_layers)}
    for into, remove in plan["steps"]:
        groups[into] += groups.pop(remove)
    seams = {place for place, number in enumerate(sorted(groups)) if len(groups[number]) > 1}
    after = plan["refit"]["layers"] if plan.get("refit") else -1
    fitted = {place + n for place in seams for n in range(after + 1)}
    return groups, seams, sorted(place for place in fitted if place < len(groups))


class Refits:
    """Fits of one base on sequences [(token ids, how many of them are others' too, how many were counted with others)].

    built: a function of a state dict and its layers that gives transformers' model, its layers not quantised.
    """

    def __init__(self, base, sequences, built):
        self.base, self.sequences, self.built = base, sequences, built
        self.factor = base.config.get("residual_multiplier", 1.0)  # of what a block adds to the residual stream
        held = []
        for number, (ids, shared, start) in enumerate(sequences):
            own, at = len(ids) - shared, np.arange(len(ids))
            last = own if number % 5 == 4 else 0
            held.append((at >= len(ids) - (last if len(sequences) >= 5 else own // 5))[start:])
        self.held = np.concatenate(held)
        unmerged = built({n: t for n, t in base.tensors.items()}, [*range(base.n_layers)])
        self.unmerged = self.run(unmerged, range(base.n_layers), names=("middle", "leaving"))

    @torch.no_grad()
    def run(self, model, places, nudges=None, names=None):
        """By layer, of every token: what o_proj and down_proj (or what it is called) read, the state between attention
        and MLP ("middle") and the one that leaves the layer ("leaving"), float64. nudges: a random generator; states
        are then off by some of the last digits of the model's dtype. names: of these alone."""
        found, hooks = {}, []

        def keep(place, name):
            own = found.setdefault(place, {}).setdefault(name, [])

            def hook(_, args, out=None):
                state = args[0] if out is None else out
                own.append((state if torch.is_tensor(state) else state[0])[0])

            return hook

        for place in places:
            layer = model.base_model.layers[place]
            modules = {self.base.out.split(".")[1]: layer.get_submodule(self.base.out)}
            modules[self.base.down] = layer.mlp.get_submodule(self.base.down)
            for name, module in (modules | {"middle": getattr(layer, self.base.before_mlp)}).items():
                if names is None or name in names:
                    hooks.append(module.register_forward_pre_hook(keep(place, name)))
            hooks.append(layer.register_forward_hook(keep(place, "leaving")))
        for ids, *_ in self.sequences:
            model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()

        def joined(parts):
            starts = [start for *_, start in self.sequences]
            states = torch.cat([own[start:] for own, start in zip(parts, starts, strict=True)])
            digits, states = DIGITS * torch.finfo(states.dtype).eps, states.double().numpy()
            if nudges is None:
                return states
            size = np.sqrt((states**2).mean(1, keepdims=True))
            return states + digits * size * nudges.uniform(-1, 1, states.shape)

        return {place: {name: joined(parts) for name, parts in own.items()} for place, own in found.items()}

    def fitted(self, state, kept, plan, nudges=None):
        """(state dict, figures) of a merged one. plan: has steps, and refit {method, ridge, layers}. nudges: of states,
        see `run`."""
        method, ridge = plan["refit"]["method"], plan["refit"]["ridge"]
        state, figures = dict(state), []
        groups, seams, places = places_of(self.base.n_layers, plan)
        for place in places:
            members = sorted(groups[kept[place]])
            target = self.unmerged[members[-1]]
            power = (target["leaving"] ** 2).mean(1)
            weights = np.where(
                power > MASSIVE * np.quantile(power, 0.5, method="lower"), 0.0, 1 / np.maximum(power, 1e-300)
            )
            if method in ("linear", "scale"):
                weights = np.ones_like(power)
            if method == "units" and place in seams:
                state = self.units(state, kept, place, members, weights, nudges)
                figures.append({"layer": kept[place], "part": "units", "tokens": 0})
            for part, matrix in (("attention", self.base.out), ("mlp", f"mlp.{self.base.down}")):
                if part == "attention" and method in ("linear", "scale"):
                    continue
                name = f"model.layers.{place}.{matrix}.weight"
                own = self.run(self.built(state, kept), [place], nudges)[place]
                at = "middle" if part == "attention" and place not in seams else "leaving"
                left = target[at] - own[at]
                features = self.factor * own[matrix.split(".")[1]]
                if method in ("linear", "scale"):
                    features = features @ state[name].double().numpy().T
                found, told = self.solved(features, left, weights, ridge, method, nudges is not None)
                weight = state[name].double()
                change = found.T @ weight.numpy() if method in ("linear", "scale") else found.T
                state[name] = (weight + torch.tensor(change)).to(state[name].dtype)
                figures.append({"layer": kept[place], "part": part, "tokens": len(power)} | told)
        return state, figures

    def solved(self, features, left, weights, ridge, method, rounds=False):
        """The map (n, d), and the ridge and errors that tables tell of it. rounds: by products in float32, unless a
        given ridge is so weak that their noise is more than bfloat16's last digit of it."""
        rounds = rounds and not (ridge is not None and 2.0**-23 * features.shape[1] ** 0.5 > 2.0**-9 * ridge)
        exact = np.float32 if rounds else np.float64

        def fit(chosen, ridge):
            x, r, w = features[chosen], left[chosen], weights[chosen, None]
            x, r = ((np.sqrt(w) * own).astype(exact) for own in (x, r))
            gram, cross = (x.T @ x).astype(np.float64), (x.T @ r).astype(np.float64)
            penalty = ridge * np.trace(gram) / len(gram)
            if method == "scale":
                return np.diag(np.diag(cross) / (np.diag(gram) + penalty))
            return solve(gram + penalty * np.eye(len(gram)), cross, assume_a="pos")

        def error(chosen, found):
            x, r, w = features[chosen], left[chosen], weights[chosen, None]
            return (w * (r - x @ found) ** 2).sum() / (w * r**2).sum()

        every, told = slice(None), None
        if method == "scale":
            ridge = 0.01 if ridge is None else ridge
        elif ridge is None:
            told, ridge = min((error(self.held, fit(~self.held, own)), own) for own in RIDGES)
        found = fit(every, ridge)
        return found, {"ridge": ridge, "error": error(every, found), "held_out_error": told}

    def units(self, state, kept, place, members, weights, nudges):
        """The state with a seam's MLP made of the units, of all its layers, that contribute most."""
        model = self.built(state, kept)
        mlp = model.model.layers[place].mlp
        act = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
        middle = torch.tensor(self.run(model, [place], nudges)[place]["middle"])
        if self.base.kind == "olmo":
            normal = torch.nn.functional.layer_norm(middle, middle.shape[1:], eps=1e-5)
        else:
            eps = self.base.config["rms_norm_eps"]
            normal = middle / (middle.pow(2).mean(1, keepdim=True) + eps).sqrt()
        found = []
        for number in members:
            layer = self.base.layer(number)
            gain = layer.get(f"{self.base.before_mlp}.weight", torch.ones(1)).double() + self.base.offset
            read = {n: t.double() for n, t in layer.items() if n.startswith("mlp.")}
            read |= {n: t * gain for n, t in read.items() if n.endswith("weight") and "down_proj" not in n}
            values = [
                normal @ read[f"mlp.{n}.weight"].T + read.get(f"mlp.{n}.bias", 0)
                for n in UNITS
                if f"mlp.{n}.weight" in read and n != "down_proj"
            ]
            if "mlp.gate_up_proj.weight" in read:
                values = values[0].chunk(2, dim=1)
            values = act(values[0]) * values[1] if len(values) == 2 else act(values[0])
            squares = (torch.tensor(weights)[:, None] * values**2).sum(0)
            score = squares * read["mlp.down_proj.weight"].pow(2).sum(0)
            found += [(-float(own), number, unit, read) for unit, own in enumerate(score)]
        best = sorted(found, key=lambda own: own[0])[: len(found) // len(members)]
        best.sort(key=lambda own: own[1:3])
        state, start = dict(state), f"model.layers.{place}."
        for name, tensor in state.items():
            relative = name.removeprefix(start)
            module = relative.split(".")[-2] if relative.startswith("mlp.") and name.startswith(start) else ""
            if module not in UNITS or (module == "down_proj" and name.endswith("bias")):
                continue
            columns = module == "down_proj"
            n, new = len(best), []
            for half in range(UNITS[module]):
                parts = [read[relative].select(int(columns), half * n + unit) for *_, unit, read in best]
                new.append(torch.stack(parts, int(columns)))
            state[name] = torch.cat(new).float().to(tensor.dtype)
        norm = f"{start}{self.base.before_mlp}.weight"
        return state | {own: torch.full_like(state[own], 1.0 - self.base.offset) for own in {norm} & state.keys()}
