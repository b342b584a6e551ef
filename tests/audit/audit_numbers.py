"""Numbers that follow from a run's tables, and the texts that tell them, for audit.py: formulas of docs/design.md."""

import html
import math
import re

import numpy as np
from recomputed import answer_nll
from scipy import stats


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


class Numbers:
    """Of an Audit: accuracies, intervals, perplexities, differences, p-values; the page and the model card."""

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
            own["_macro"] = [
                *own["_micro"][:2],
                table[:, 2].mean(),
                errors,
                *macro_wilson(table[:, 1], table[:, 0]),
                table[:, 6].mean(),
            ]
            keys += [(*key, name) for name in own]
            wanted += own.values()
        self.equal("accuracy: rows", "all", sorted(found), sorted(keys))
        columns = ("n", "correct", "accuracy", "standard_error", "ci_low", "ci_high", "nll")
        self.same(
            "accuracy",
            "all",
            [[found[k][c] for c in columns] for k in keys if k in found],
            [w for k, w in zip(keys, wanted, strict=True) if k in found],
            1e-6,
        )
        losses = {}
        for row in self.table("text_losses"):
            losses.setdefault(row["plan_id"], []).append(row)
        for row in self.table("perplexity"):
            if row["target"] == "text":
                tokens, nll = items_of(losses[row["plan_id"]])
                mean, low, high = ratio(nll, tokens)
            else:
                own = [
                    r
                    for key, rows in answers.items()
                    if key[0] == row["plan_id"] and key[1] == self.config["data"]["report_split"]
                    for r in rows
                    if row["subject"] in (None, r["subject"])
                ]
                mean, low, high = ratio([r["prompt_nll"] for r in own], np.ones(len(own)))
            values = [
                row["nll"],
                *(math.nan if row[k] is None else row[k] for k in ("perplexity", "ci_low", "ci_high")),
            ]
            with np.errstate(over="ignore"):
                limits = [mean, *np.exp([mean, low, high])]
            self.same(
                f"perplexity: {row['target']}",
                row["plan_id"],
                values,
                limits,
                1e-6 * np.maximum(1, np.abs(np.nan_to_num(limits))),
            )
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
            self.same(
                f"difference: {row['measure']}", name, row["difference"], difference, 1e-9 * max(1, abs(difference))
            )
            width = max(high - low, 1e-9)
            self.same(
                f"interval: {row['measure']}",
                name,
                [row["ci_low"], row["ci_high"]],
                [low, high],
                1e-9 if exact else 0.12 * width,
            )
            self.same(
                f"p: {row['measure']}",
                name,
                row["p_value"],
                p,
                1e-9 if exact else 6 * math.sqrt(p * (1 - p) / 10_000) + 1e-3,
            )
        best = self.manifest.get("best", {}).get("plan_id")
        asked_about, points = [], self.table("sweep")
        plain = {
            (r["merges"], r["method"], r["refit"] or "none"): r["plan_id"]
            for r in points
            if (r["alignment"], r["norms"]) == ("none", "keep")
        }
        for row in points:
            others = [("drop", "none"), (row["method"], "none")] + [("drop_block", "none")] * (
                row["method"] in ("merge_block", "drop_greedy")
            )
            others += [("drop_block", "linear")] * (row["refit"] not in (None, "none"))
            asked_about += [
                {row["plan_id"], plain[key]} for other in others if (key := (row["merges"], *other)) in plain
            ]
        for table in ("comparisons", "subject_comparisons"):
            families = {}
            for row in self.table(table):
                pair = {row["plan_a"], row["plan_b"]}
                key = row["measure"], pair in asked_about if best is None else best in pair
                families.setdefault(key, []).append(row)
            plans = {row["plan_id"] for row in self.table("plans")}
            for (measure, asked), own in families.items():
                self.same(
                    f"p (Holm): {measure}",
                    f"{table}, {'best' if asked else 'others'}",
                    [r["p_holm"] for r in own],
                    holm([r["p_value"] for r in own]),
                )
                others = len(plans) - 1
                if best is not None and measure == "accuracy":
                    self.equal("pairs", f"{table} {asked}", len(own), others if asked else others * (others - 1) // 2)

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
            key = next(
                (
                    k
                    for k, own in names.items()
                    if label and set(label.split(" = ")) <= {*own, "base"} and label.split(" = ")[-1] in own
                ),
                None,
            )
            if key is None or not header or len(row) != len(header) or row is header:
                continue
            told = {
                name.partition(" [")[0].replace("text ppl", "perplexity"): cell
                for name, cell in zip(header, row, strict=True)
            }
            micro, macro = accuracy.get((key, "_micro")), accuracy.get((key, "_macro"))
            wanted = (
                {
                    "accuracy": [scale * micro[c] for c in ("accuracy", "ci_low", "ci_high")],
                    "mean over subjects": [scale * macro[c] for c in ("accuracy", "ci_low", "ci_high")],
                    "macro": [macro["accuracy"]],
                    "answer NLL": [micro["nll"]],
                }
                if micro
                else {}
            )
            wanted["layers"] = [costs[key]["layers"]]
            if key in text:
                wanted["perplexity"] = [text[key][c] for c in ("perplexity", "ci_low", "ci_high")]
            for column, values in wanted.items():
                if column in told:
                    self.equal(
                        f"{what}: {column}", label, (told[column], says(told[column], values)), (told[column], True)
                    )

    def page(self, html_text):
        """That the page's rows of a plan have its numbers, and that its answer is about the best found."""
        _, names = self.plans()
        body = re.sub(r"<(script|style|svg)\b.*?</\1>", "", html_text, flags=re.S)
        rows = [
            [
                html.unescape(re.sub(r"<[^>]+>", " ", cell)).strip()
                for cell in re.findall(r"<t[dh]\b.*?</t[dh]>", row, re.S)
            ]
            for row in re.findall(r"<tr\b.*?</tr>", body, re.S)
        ]
        self.told("page", rows, 100, names)
        if self.experiment == "search":
            best = self.manifest["best"]
            words = html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))
            self.equal("page: its answer is about the best", best["name"], "The best plan found, " in words, True)
            told = re.search(r"The best plan found, (.*?), (?:answers|has|reaches|whose|is)", words)
            self.equal(
                "page: the best's name",
                best["name"],
                told and told[1].split(" = "),
                names[best["plan_id"]] if told else None,
            )
