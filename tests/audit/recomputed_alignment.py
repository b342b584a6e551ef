"""Reorderings of a layer's units, heads and experts that leave what it computes as it is, for audit.py: of
docs/design.md and the docstring of `alignment`.

An order has for each axis (q, k, v, o, units) which old slice stands at each new place; with experts "experts" has the
old expert at each place and "units" a list, the order inside each; "shared" has the order inside an expert for all.
"""

import functools
import itertools

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

#: Which axes the rows (of o and down the columns) of a matrix have, one after another.
ROWS = {"q_proj": ["q"], "k_proj": ["k"], "v_proj": ["v"], "qkv_proj": ["q", "k", "v"], "o_proj": ["o"]}
ROWS |= {"dense": ["o"], "query_key_value": ["q", "k", "v"]}
#: Whose name says less than gate_proj, up_proj and down_proj.
SHORT = {"w1": "gate", "w3": "up", "w2": "down", "output_linear": "down", "c_fc": "up", "c_proj": "down"}
SHORT |= {"fc1": "up", "fc2": "down", "dense_h_to_4h": "up", "dense_4h_to_h": "down"}
UNITS = {"gate_proj": 1, "up_proj": 1, "down_proj": 1, "gate_up_proj": 2, "w1": 1, "w3": 1, "w2": 1}
UNITS |= {"input_linear": 2, "output_linear": 1, "c_fc": 1, "c_proj": 1, "fc1": 1, "fc2": 1}
UNITS |= {"dense_h_to_4h": 1, "dense_4h_to_h": 1}
COLUMNS = ("o_proj", "dense", "down_proj", "w2", "output_linear", "c_proj", "fc2", "dense_4h_to_h")
#: An expert that every token goes through.
SHARED = ".shared_expert."
#: Norms over all of a projection, whose gains stand in the order of its rows.
NORMS = {"q_norm": ["q"], "k_norm": ["k"]}


def expert_of(name):
    """(name with {} for the expert's number, its number) or None."""
    before, _, after = name.partition(".experts.")
    number, _, rest = after.partition(".")
    return (f"{before}.experts.{{}}.{rest}", int(number)) if after else None


def reordered(layer, order):
    """A layer's tensors by relative name, in the order of its units."""
    found = {}
    for name, tensor in layer.items():
        module, kind = name.split(".")[-2:]
        units = order["units"]
        if expert := expert_of(name):
            tensor, units = layer[expert[0].format(order["experts"][expert[1]])], units[expert[1]]
        if SHARED in name:
            units = order["shared"]
        axes = [order[axis] for axis in (ROWS | NORMS).get(module, [])] or [units] * UNITS.get(module, 0)
        if module == "gate" and "experts" in order:
            axes = [order["experts"]]
        columns = module in COLUMNS
        if axes and not (columns and kind == "bias") and tensor.shape[int(columns)] == sum(map(len, axes)):
            starts = np.cumsum([0, *map(len, axes)])
            whole = np.concatenate([start + axis for start, axis in zip(starts, axes, strict=False)])
            if module == "query_key_value":  # of each head its queries, keys and values
                place = np.arange(len(whole)).reshape(-1, 3, order["d"]).swapaxes(0, 1).ravel()
                whole = place[whole][np.argsort(place)]
            tensor = tensor.index_select(int(columns), torch.tensor(whole))
        found[name] = tensor
    return found


def then(order, following):
    """One order that does what two do in turn."""
    axes = [*"qkvo", *({"shared"} & order.keys())]
    found = {axis: order[axis][following[axis]] for axis in axes} | {"d": order["d"]}
    if "experts" not in order:
        return found | {"units": order["units"][following["units"]]}
    places = following["experts"]
    units = [order["units"][place][own] for place, own in zip(places, following["units"], strict=True)]
    return found | {"experts": order["experts"][places], "units": units}


def undone(order):
    axes = [*"qkvo", *({"shared"} & order.keys())]
    found = {axis: np.argsort(order[axis]) for axis in axes} | {"d": order["d"]}
    if "experts" not in order:
        return found | {"units": np.argsort(order["units"])}
    places = np.argsort(order["experts"])
    return found | {"experts": places, "units": [np.argsort(order["units"][place]) for place in places]}


class Matcher:
    """Matches of a Base's neighbouring layers. `values`: by layer its MLP units' (tokens, n), for "activations"."""

    def __init__(self, base):
        self.base, self.values = base, {}

    def towards(self, steps, by):
        """For every layer that is merged into another the order that lays its units on that one's."""
        groups = {number: [number] for number in range(self.base.n_layers)}
        for into, remove in steps:
            groups[into] += groups.pop(remove)
        found = {}
        for kept, members in groups.items():
            for number in members:
                step = 1 if number > kept else -1
                for layer in range(number, kept, -step):
                    match = self.match(min(layer, layer - step), by)
                    match = match if step > 0 else undone(match)
                    found[number] = then(found[number], match) if number in found else match
        return found

    def projections(self, number):
        """Of a layer, with the gains of what its matrices read, rows (of o and down columns) of length 1: q, k, v, o,
        router, and (projection, expert), of dense layers (projection, 0), of an expert for all (projection, -1)."""
        layer, found = self.base.layer(number), {}
        gains = self.base.gains(layer)
        heads, kv, d = self.shape
        for name, tensor in layer.items():
            if tensor.ndim != 2:
                continue
            folded = tensor.double() * gains.get(name, torch.ones(1, dtype=torch.float64))
            module = name.split(".")[-2]
            rows = torch.nn.functional.normalize(folded.T if module in COLUMNS else folded, dim=1).numpy()
            expert = -1 if SHARED in name else (expert_of(name) or (0, 0))[1]
            if module == "query_key_value":
                found |= zip("qkv", rows.reshape(heads, 3, d, -1).swapaxes(0, 1).reshape(3, heads * d, -1), strict=True)
            elif module == "qkv_proj":
                found |= dict(zip("qkv", np.split(rows, [heads * d, (heads + kv) * d]), strict=True))
            elif module in ROWS:
                found[ROWS[module][0]] = rows
            elif module == "gate":
                found["router"] = rows
            elif module in ("gate_up_proj", "input_linear"):
                found |= {("gate", 0): rows[: len(rows) // 2], ("up", 0): rows[len(rows) // 2 :]}
            else:
                short = SHORT.get(module, module.removesuffix("_proj"))
                found[short, expert] = rows
        return found

    @property
    def shape(self):
        c = self.base.config
        heads = c["num_attention_heads"]
        return heads, self.base.kv_heads, c.get("head_dim") or c["hidden_size"] // heads

    @functools.cache  # noqa: B019 - a handful of layers
    def match(self, first, by):
        """The order in which layer first + 1 has its units matched to those of layer `first`."""
        one, two = self.projections(first), self.projections(first + 1)
        found = self.heads(one, two)

        def likeness(a, b):
            return sum(one[k, a] @ two[k, b].T for k in ("gate", "up", "down") if (k, a) in one)

        if ("up", -1) in one:
            found["shared"] = linear_sum_assignment(-likeness(-1, -1))[1]
        if "router" in one:
            # A pair of experts counts by bounds of what its units could reach; units are matched in the pairs found.
            n, cosines = len(one["router"]), one["router"] @ two["router"].T
            pairs = [[likeness(a, b) for b in range(n)] for a in range(n)]
            reach = [[(own.max(1).sum() + own.max(0).sum()) / 2 for own in row] for row in pairs]
            experts = linear_sum_assignment(-(cosines + np.array(reach)))[1]
            units = [linear_sum_assignment(-pairs[a][b])[1] for a, b in enumerate(experts)]
            return found | {"experts": experts, "units": units}
        alike = likeness(0, 0)
        if by == "activations":
            sides = [self.values[number].astype(np.float64) for number in (first, first + 1)]
            sides = [side - side.mean(0) for side in sides]
            lengths = [np.linalg.norm(side, axis=0) for side in sides]
            a, b = (side / np.where(n > 0, n, 1) for side, n in zip(sides, lengths, strict=True))
            alike = a.T @ b
        return found | {"units": linear_sum_assignment(-alike)[1]}

    def heads(self, one, two):
        """The best order of key/value heads, of query heads in each, and of value channels in each: every order of the
        query heads is tried."""
        heads, kv, d = self.shape
        g, best = heads // kv, {}
        shapes = {"q": (kv, g, d), "k": (kv, d), "v": (kv, d), "o": (kv, g, d)}
        q, k, v, o = ([side[x].reshape(*shape, -1) for side in (one, two)] for x, shape in shapes.items())
        for a, b in itertools.product(range(kv), repeat=2):
            for order in map(list, itertools.permutations(range(g))):
                alike = v[0][a] @ v[1][b].T + sum(o[0][a, x] @ o[1][b, y].T for x, y in enumerate(order))
                channels = linear_sum_assignment(-alike)[1]
                score = np.sum(k[0][a] * k[1][b]) + np.sum(q[0][a] * q[1][b, order])
                score += alike[np.arange(d), channels].sum()
                best[a, b] = max(best.get((a, b), (-np.inf, 0, 0)), (score, order, channels.tolist()))
        places = linear_sum_assignment([[-best[a, b][0] for b in range(kv)] for a in range(kv)])[1]
        found = [(b, *best[a, b][1:]) for a, b in enumerate(places)]
        return {
            "d": d,
            "q": np.array([(b * g + h) * d + x for b, order, _ in found for h in order for x in range(d)]),
            "k": np.array([b * d + x for b, _, _ in found for x in range(d)]),
            "v": np.array([b * d + x for b, _, channels in found for x in channels]),
            "o": np.array([(b * g + h) * d + x for b, order, channels in found for h in order for x in channels]),
        }
