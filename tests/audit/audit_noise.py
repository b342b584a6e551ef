"""Null models, intervals and reliabilities of similarities, for audit.py: of the docstring of `reliability`.

What follows from draws is compared with other draws: means by their standard errors, variances by F's quantiles. Which
samples a run drew is not asked.
"""

import math

import numpy as np
from recomputed_similarity import embedded, linear, similarity
from scipy import stats

#: Draws of each kind, and of how many layers.
DRAWS, LAYERS = 60, 6
Z = stats.norm.ppf(0.975)


class Draws:
    """Matrices over subsets and shuffles of one subset's samples. layers: (L, N, T d) pooled states."""

    def __init__(self, layers, distances, stored, c):
        self.layers, self.distances, self.stored, self.c, self.n = layers, distances, stored, c, layers.shape[1]

    def matrix(self, rows=None, shuffle=None):
        """(L, L) over some rows, as if there were no others, or with each layer's samples in another order than the
        shallower layers'; None where such an embedding is not computed here."""
        c, rows = self.c, np.arange(self.n) if rows is None else rows
        scaled = c | {"entropy_neighbors": round(c["entropy_neighbors"] * len(rows) / self.n)}
        if c["measure"] not in ("cosine", "cka"):
            own = self.stored if len(rows) == self.n else embedded(self.distances[:, rows][:, :, rows], c)
            return None if own is None else similarity(own, scaled, shuffle)
        own = self.layers[:, rows]
        others = own if shuffle is None else np.stack([x[order] for x, order in zip(own, shuffle, strict=True)])
        return linear(own, others, c["measure"], shuffle is not None)


class Noise:
    """Of an Audit: what similarity runs say of their uncertainty."""

    def uncertain(self, key, layers, distances, stored):
        """A matrix's null model and intervals, of some layers; returns what correlations need, of all or None."""
        c, n = self.config["similarity"], layers.shape[1]
        pick = sorted(self.random.sample(range(len(layers)), min(len(layers), LAYERS)))
        shape = (len(layers),) * 2

        def column(name):
            found = np.full(shape, math.nan)
            for r in self.table("similarity", subset=key[0], language=key[1]):
                found[r["layer_i"], r["layer_j"]] = math.nan if r[name] is None else r[name]
            return found[np.ix_(pick, pick)]

        value, low, high = column("value"), column("ci_low"), column("ci_high")
        draws = Draws(layers[pick], distances[pick], None if stored is None else stored[pick], c)
        m, rng, some = n - n // 5, np.random.default_rng(11), np.isfinite(value) & np.isfinite(low)
        self.same(
            "noise: intervals' middle", key, (low + high)[some] / 2, value[some], 1e-9 * (1 + np.abs(value[some]))
        )
        shuffles = [np.array([rng.permutation(n) for _ in pick]) for _ in range(DRAWS)]
        self.null(
            key, value, column("null_mean"), column("null_p95"), np.array([draws.matrix(shuffle=x) for x in shuffles])
        )
        subsets = [np.sort(rng.permutation(n)[:m]) for _ in range(DRAWS)]
        orders = [rng.permutation(n) for _ in range(DRAWS)]
        if draws.matrix(subsets[0]) is None:
            self.line("noise", key, skipped=f"subsets embedded by {c['embedding']}")
            return None
        subsets = np.array([draws.matrix(x) for x in subsets])
        with np.errstate(invalid="ignore", divide="ignore"):
            wanted = m / (n - m) * subsets.var(0, ddof=1)
            ratio = np.log(((high - low) / 2 / Z) ** 2 / wanted)
        above = np.triu(some) & (wanted > 1e-12)
        spread = math.sqrt(2 / (c["interval_draws"] - 1) + 2 / (DRAWS - 1))
        if above.any():
            self.same("noise: intervals' width", key, np.median(ratio[above]), 0.0, 4 * spread)
        if len(pick) < len(layers):
            return None
        halves = [[draws.matrix(np.sort(x[at : at + n // 2])) for at in (0, n // 2)] for x in orders]
        return {"value": value, "subsets": subsets, "halves": halves, "n": n, "m": m}

    def null(self, key, value, mean, most, nulls):
        """Means by their standard errors; of the 95th percentile how often further draws exceed it."""
        count = self.config["similarity"]["null_draws"]
        defined = np.isfinite(mean) & np.isfinite(nulls).all(0)
        if not defined.any():
            return
        error = nulls.std(0, ddof=1) * math.sqrt(1 / count + 1 / len(nulls))
        self.same("noise: null mean", key, mean[defined], nulls.mean(0)[defined], (6 * error + 1e-6)[defined])
        over = (nulls > most)[:, defined].mean()
        # The share that lies above a quantile of so few draws has a Beta distribution; pairs of layers go together.
        self.same("noise: null 95 %", key, over, 0.05, 4 * math.sqrt(0.05 * 0.95 / (count + 2)))
        # A shuffle of few samples may leave an entry undefined, and with it the null of that entry.
        expected = np.isfinite(value) & np.isfinite(nulls).all(0)
        self.equal("noise: null where defined", key, bool(np.isfinite(mean[expected]).all()), True)

    def related(self, row, a, b):
        """Interval and reliabilities of a correlation, by draws of `uncertain`."""
        above, of = np.triu_indices(self.base.n_layers, 1), f"{row['subset_a']} {row['subset_b']}"

        def correlation(x, y):
            x, y = x[above], y[above]
            both = np.isfinite(x) & np.isfinite(y)
            return np.corrcoef(x[both], y[both])[0, 1] if both.sum() > 2 else math.nan

        count = self.config["similarity"]["half_draws"]
        for side, own in (("a", a), ("b", b)):
            told, r = row[f"reliability_{side}"], np.array([correlation(*pair) for pair in own["halves"]])
            if told is None or not np.isfinite(r).all():
                continue
            mean, error = r.mean(), r.std(ddof=1) * math.sqrt(1 / len(r) + 1 / count) + 1e-9
            wanted, low, high = (2 * x / (1 + x) for x in (mean, max(mean - 5 * error, -0.9), min(mean + 5 * error, 1)))
            self.same("noise: reliability", f"{of} {side}", told, wanted, max(wanted - low, high - wanted))
        if row["ci_low"] is None or abs(row["pearson_off_diagonal"]) > 0.9999:
            return
        with np.errstate(invalid="ignore", divide="ignore"):
            low, high = np.arctanh([row["ci_low"], row["ci_high"]])
        self.same("noise: correlation's middle", of, (low + high) / 2, math.atanh(row["pearson_off_diagonal"]), 1e-6)
        if row["language_a"] != row["language_b"]:
            return  # translations are drawn together
        z = [[math.atanh(correlation(x, q["value"])) for x in p["subsets"]] for p, q in ((a, b), (b, a))]
        variance = sum(p["m"] / (p["n"] - p["m"]) * np.var(x, ddof=1) for p, x in zip((a, b), z, strict=True))
        spread = math.sqrt(2 / (self.config["similarity"]["interval_draws"] - 1) + 2 / (DRAWS - 1))
        ratio = np.log(((high - low) / 2 / Z) ** 2 / variance)
        self.same("noise: correlation's width", of, ratio, 0.0, 5 * spread)
