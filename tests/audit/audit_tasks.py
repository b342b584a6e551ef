"""Multiple-choice tasks, asked as lm-evaluation-harness's task files say, and key-value retrieval, for audit.py."""

import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from audit_numbers import holm, paired, wilson
from recomputed import base_ids, hashed

#: Formats with accuracy by log-likelihood per character; prompts of one's own drawing at each distance.
PER_CHARACTER, PROMPTS = ("piqa", "hellaswag", "arc", "openbookqa"), 40


def asked(row, format):
    """(context, choices, number of the right one) of a row, by lm_eval/tasks of 0.4.13."""
    if format == "piqa":
        return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"])
    if format == "hellaswag":

        def clean(text):
            return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

        text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return clean(text), [clean(own) for own in row["endings"]], int(row["label"])
    if format in ("arc", "openbookqa"):
        context = f"Question: {row['question']}\nAnswer:" if format == "arc" else row["question_stem"]
        choices = row["choices"]
        return context, list(choices["text"]), list(choices["label"]).index(row["answerKey"].strip())
    if format == "boolq":
        return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(row["label"])
    *before, last = json.loads(row["problems"]) if isinstance(row["problems"], str) else row["problems"]
    context = f"Article: {row['article']}\n\n"
    for problem in before:
        answer = problem["options"]["ABCD".index(problem["answer"])]
        if problem["question"].endswith("  _  ."):
            context += f"{problem['question'][:-5]}{answer}\n"
        else:
            context += f"Question: {problem['question']}\nAnswer: {answer}\n"
    return context + last["question"], list(last["options"]), "ABCD".index(last["answer"])


def items_of(file, format):
    path = Path(file)
    rows = (
        pq.read_table(path).to_pylist()
        if path.suffix == ".parquet"
        else [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    )
    return [asked(row, format) for row in rows]


class Tasks:
    """Of an Audit: answers to tasks, what follows from them, and retrieval from a context."""

    def compared_tasks(self, what, plan_id, near):
        """A model's log-likelihoods against those of a plan; near: see `Audit.compared_model`."""
        for name, c in (self.config.get("tasks") or {}).items():
            rows = self.table("task_answers", plan_id=plan_id, task=name)
            items = items_of(c["file"], c["format"])
            shots = items_of(c["examples"], c["format"])[: c["shots"]] if c["shots"] else []
            prefix = "".join(f"{context} {choices[right]}\n\n" for context, choices, right in shots)
            ids = [f"{name}/{number}" for number in range(len(items))]
            drawn = sorted(ids, key=lambda own: hashed([self.config["data"]["seed"], own]))[: c["limit"]]
            self.equal(f"{what}: items", name, sorted(r["item_id"] for r in rows), sorted(drawn))
            for row in self.random.sample(rows, min(self.limit, len(rows))):
                context, choices, right = items[int(row["item_id"].rpartition("/")[2])]
                self.equal(f"{what}: right choice", row["item_id"], row["answer"], right)
                self.equal(f"{what}: lengths", row["item_id"], row["lengths"], [float(len(own)) for own in choices])
                before = len(self.asker.ids((prefix + context).rstrip()))
                whole = [self.asker.ids(f"{prefix}{context} {choice}") for choice in choices]
                measure = functools.partial(self.likelihoods, before=before, sequences=whole)
                allowed = 10 * self.arithmetic * np.maximum(1, np.abs(row["log_likelihoods"]))
                near("log-likelihoods", row["log_likelihoods"], measure, allowed, of=row["item_id"])

    @torch.no_grad()
    def likelihoods(self, model, before, sequences):
        """Log-likelihoods of sequences of tokens after those of the context."""
        found = []
        for ids in sequences:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
            own = torch.log_softmax(logits, 1)[:-1].gather(1, torch.tensor(ids)[1:, None])[before - 1 :, 0]
            found.append(float(own.sum()))
        return found

    def derived_tasks(self):
        """Predictions, accuracies, intervals, differences and p-values of tasks from the log-likelihoods."""
        right = {}
        for name, c in (self.config.get("tasks") or {}).items():
            for row in sorted(self.table("task_answers", task=name), key=lambda r: r["item_id"]):
                scores = np.array(row["log_likelihoods"])
                found = {"acc": (row["predicted"], scores.argmax())}
                if c["format"] in PER_CHARACTER:
                    found["acc_norm"] = row["predicted_norm"], (scores / row["lengths"]).argmax()
                else:
                    self.equal("task: no acc_norm", row["item_id"], row["predicted_norm"], None)
                for measure, (told, wanted) in found.items():
                    if told != wanted:
                        self.equal(f"task: {measure}", row["item_id"], told, int(wanted))
                    right.setdefault((row["plan_id"], name, measure), []).append(told == row["answer"])
        right = {key: np.array(own) for key, own in right.items()}
        rows = {(r["plan_id"], r["task"], r["measure"]): r for r in self.table("task_accuracy")}
        self.equal("task accuracy: rows", "all", sorted(rows), sorted(right))
        columns = ("n", "correct", "accuracy", "standard_error", "ci_low", "ci_high")
        found, wanted = [[rows[key][c] for c in columns] for key in right if key in rows], []
        for key, own in right.items():
            n, share = len(own), own.mean()
            error = own.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
            wanted += [[n, own.sum(), share, error, *wilson(share, n)]] if key in rows else []
        self.same("task accuracy", "all", found, wanted, 1e-9)
        families = {}
        for row in self.table("task_comparisons"):
            a, b = (right[row[side], row["task"], row["measure"]] for side in ("plan_a", "plan_b"))
            told = [row[c] for c in ("difference", "ci_low", "ci_high", "p_value")]
            self.same("task difference", f"{row['task']} {row['measure']}", told, paired(a, b), 1e-9)
            families.setdefault((row["task"], row["measure"]), []).append(row)
        for key, own in families.items():
            self.same("task p (Holm)", key, [r["p_holm"] for r in own], holm([r["p_value"] for r in own]))

    # retrieval

    def retrieval(self, what, plan_id, model):
        """Accuracies of retrieval, and whether they are like those of prompts drawn here."""
        rows = self.table("context", plan_id=plan_id, measure="retrieval")
        if not rows:
            return
        distances, n = self.config["sweep"]["distances"], self.config["sweep"]["retrieval_prompts"]
        fit = [d for d in sorted(distances) if d in {r["bucket"] for r in rows}]
        self.equal(f"{what}: distances", plan_id, sorted(r["bucket"] for r in rows), fit)
        self.equal(f"{what}: prompts", plan_id, {r["n"] for r in rows}, {n})
        errors = [math.sqrt(r["value"] * (1 - r["value"]) / (n - 1)) if n > 1 else math.nan for r in rows]
        told = [math.nan if r["standard_error"] is None else r["standard_error"] for r in rows]
        self.same(f"{what}: error of retrieval", plan_id, told, errors, 1e-9)
        rng, off, variance = np.random.default_rng(7), 0.0, 0.0
        for row in rows:
            own = [self.finds(model, row["bucket"], rng) for _ in range(PROMPTS)]
            if None in own:
                self.line(f"{what}: retrieval", row["bucket"], skipped="no prompt of whole lines has this distance")
                continue
            p = (row["value"] * n + sum(own) + 1) / (n + PROMPTS + 2)
            off += n * (row["value"] - np.mean(own))
            variance += p * (1 - p) * (n + n * n / PROMPTS)
        self.same(f"{what}: retrieval", plan_id, off, 0.0, 4.5 * math.sqrt(variance))

    @functools.cached_property
    def words(self):
        """Words that are one token, with its id."""
        tokenizer = self.base.tokenizer
        texts = {number: tokenizer.decode([number]) for number in range(len(tokenizer))}
        one = {t[1:]: n for n, t in texts.items() if re.fullmatch(" [A-Za-z]{2,}", t)}
        return {word: n for word, n in one.items() if base_ids(tokenizer, f" {word}: {word}\n")[0::2] == [n, n]}

    @torch.no_grad()
    def finds(self, model, distance, rng):
        """Whether a model finds a value that stood so many tokens back, among the four of a prompt drawn here: seven
        lines, the one that is asked for, and others, some with keys of two words; None where these do not come out."""
        after, longer = divmod(distance - 4, 4)
        if after < longer:
            return None
        names = [str(word) for word in rng.permutation(sorted(self.words))]
        options, names = names[:4], iter(names[4:])
        count, answer = 8 + after, int(rng.integers(4))
        values = rng.permutation(np.arange(count) % 4)
        at = int(np.flatnonzero(values == answer)[0])
        values[[at, 7]] = values[[7, at]]
        keys = [next(names) + (f" {next(names)}" if 7 < i <= 7 + longer else "") for i in range(count)]
        lines = [f" {key}: {options[value]}\n" for key, value in zip(keys, values, strict=True)]
        ids = self.asker.ids(f"{''.join(lines)} {keys[7]}:")
        if ids[-distance] != self.words[options[answer]]:
            return None
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        return int(logits[[self.words[own] for own in options]].argmax()) == answer
