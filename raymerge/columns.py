"""The meaning of every table and column of a run: stored in the tables' files, and a page of the documentation."""

from __future__ import annotations

#: Meanings of the columns that several tables share; a table's own meaning takes precedence.
SHARED = {
    "run_id": "the run; the same in all of its tables, so that tables of several runs can be concatenated",
    "plan_id": "the plan, a way of merging this model; joins all tables that have it, and `plans` has its name",
    "plan_a": "plan_id of the first plan",
    "plan_b": "plan_id of the plan that it is compared with",
    "split": "split of the questions: validation, test or dev",
    "language": "language of the questions or prompts",
    "subject": "subject of the questions",
    "subset": "which prompts: a subject, a domain, or `all`",
    "measure": "what was measured",
    "embedding": "how states are turned into coordinates (similarity.embedding)",
    "layer": "number of the decoder layer in the unmerged model, from 0",
    "sample": "number of the prompt in its subset and language, as in `samples`",
    "question_id": "the source's own id, or SUBJECT/SPLIT/ROW if it has none",
    "content_hash": "digest of the content: equal if the same is asked",
    "task": "the task's name in the configuration",
    "n": "number of questions or items",
    "correct": "number of correct answers",
    "accuracy": "share in [0, 1]",
    "standard_error": "standard error of the mean; NaN if there is only one value",
    "ci_low": "lower end of the 95 % interval",
    "ci_high": "upper end of the 95 % interval",
    "nll": "mean negative log-likelihood, nats",
    "perplexity": "exp of nll",
    "n_samples": "number of prompts",
    "note": "why a value is missing, or a caveat",
    "searcher": "controls, random, bayes, or gradient with its parametrisation",
    "alphas": "one per merge step, in the order of the steps (for per_matrix of the matrices' mean coefficients), "
    "followed by those of each matrix that has its own, the matrices in alphabetical order",
    "difference": "plan_a minus plan_b; for losses lower is better, for accuracies higher",
    "p_value": "p-value of the paired test, uncorrected",
    "p_holm": "p-value corrected by Holm for all comparisons of the same measure in the same family, which is those of "
    "the best plan found (in a sweep, those that it is about) or all others; null if not corrected",
    "test": "mcnemar_exact (on correct and wrong answers) or paired_sign_flip (on losses)",
    "matrix": "projection matrix that the row is about; null: all matrices without rows of their own",
    "alignment": "none, rows, neurons or activations (plan.alignment)",
    "norms": "keep or fold (plan.norms)",
    "merges": "number of layers removed",
}

#: For every table, what its rows are, and the meanings of its columns that are not in `SHARED` or differ from it.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "plans": (
        "One row per merge step of every reported plan; a plan without steps has one row. A plan may occur under "
        "several names: a search can find what is also a control.",
        {
            "name": "name of the plan; how it was refitted, if it was, is in table `refits`",
            "kind": "base (unmerged), drop, before_last, keep_one, fixed, random, file or found",
            "selection": "which layers: none, tail, before_last, block, most_similar or list",
            "step": "number of the step, from 0; null without steps",
            "into": "original number of the layer that is merged into; the result takes its place",
            "remove": "original number of the layer that is merged into `into`",
            "alpha": "weight of `into`; `remove` has 1 - alpha: 1 drops `remove`, 0 drops `into`",
        },
    ),
    "coefficients": (
        "The result of a plan's steps: the weight of every original layer in every layer of the merged model.",
        {
            "kept_layer": "the layer of the merged model, by the original number of the layer whose place it takes",
            "source_layer": "original number of a layer that has a weight in it",
            "coefficient": "its weight; the weights of one kept_layer and matrix add up to 1",
        },
    ),
    "trials": (
        "One row per candidate of a search. The reported ones are also in `plans`.",
        {
            "iteration": "number of the candidate among its searcher's, from 0; for gradient, number of the start",
            "batch": "number of the batch that was one Tune trial",
            "tune_trial": "id of the Tune trial; empty for controls",
            "actor": "the worker that scored it",
            "seed": "search.seed",
            "block": "first layer of the candidate's block, if blocks are searched too",
            "objective": "search.objective",
            "value": "the objective on the search questions and text, or how far the candidate is above "
            "search.perplexity_ceiling; losses are minimised, accuracies maximised; null if the candidate failed",
            "accuracy": "share of the search questions answered correctly; null without questions",
            "nll": "mean answer NLL on the search questions, nats; null without questions",
            "perplexity": "perplexity of the search text; null if it is not measured",
            "n_questions": "number of search questions",
            "seconds": "worker time; 0 for controls, which are not timed",
            "cpu_seconds": "CPU time of the worker",
            "status": "ok or failed",
            "error": "why it failed",
        },
    ),
    "answers": (
        "One row per question and plan: reported plans on the report's questions, and the controls of a search (with "
        "output.store_candidate_answers also its candidates) on the search questions.",
        {
            "logit_a": "logit of letter A at the prompt's end",
            "logit_b": "logit of letter B",
            "logit_c": "logit of letter C",
            "logit_d": "logit of letter D",
            "logsumexp_all": "log-sum-exp of the logits of the whole vocabulary: a logit minus this is a "
            "log-probability; null if not computed",
            "top_is_letter": "whether the most probable token of the vocabulary is one of the four letters; null if "
            "not computed",
            "answer": "the correct choice, 0 to 3 for A to D",
            "predicted": "the letter with the largest logit, 0 to 3 for A to D",
            "prompt_nll": "mean NLL of the question's own prompt tokens, nats; null if not asked for",
            "prompt_tokens": "number of these tokens",
        },
    ),
    "accuracy": (
        "One row per plan and subject, from `answers`. Subject _micro is all questions together, _macro the mean over "
        "subjects.",
        {
            "subject": "subject of the questions, _micro or _macro; n and correct of the last two are totals",
            "standard_error": "standard error of the accuracy; NaN for a single question",
            "ci_low": "lower end of the 95 % interval (Wilson's; for _macro with the effective number of questions)",
            "ci_high": "upper end of the interval",
            "nll": "mean negative log-likelihood of the correct letter among the four, nats",
        },
    ),
    "comparisons": (
        "Paired differences between two plans on the same questions, or on the same passages of plain text.",
        {
            "split": "split of the questions, or `text`",
            "measure": "accuracy, answer_nll (nats) or text_nll (nats per token of plain text)",
        },
    ),
    "subject_comparisons": (
        "The same on only the subjects that search.objective names, if it names any.",
        {
            "subjects": "their names, joined by commas",
            "measure": "accuracy or answer_nll (nats)",
        },
    ),
    "task_comparisons": (
        "The same for each task. Each task and measure is a family of its own.",
        {"measure": "acc or acc_norm, as in `task_accuracy`"},
    ),
    "perplexity": (
        "Perplexity of plain text, and of the questions' own tokens if asked for.",
        {
            "target": "text or question",
            "subject": "subject of the questions; null for all of them, and for text",
            "tokens": "number of predicted tokens",
            "nll": "mean loss, nats: per token of text, or the mean of prompt_nll over questions",
            "ci_low": "lower end of the perplexity's 95 % interval, over passages or questions",
            "ci_high": "upper end of the interval",
            "text_hash": "digest of the text",
        },
    ),
    "text_losses": (
        "One row per plan and passage of about 64 tokens of plain text; exp(sum(nll) / sum(tokens)) is the plan's "
        "perplexity.",
        {
            "window": "number of the window of text, from 0",
            "position": "position of the passage's first predicted token in its window",
            "tokens": "number of predicted tokens",
            "nll": "sum of their losses, nats",
        },
    ),
    "task_answers": (
        "One row per plan and item of another task.",
        {
            "item_id": "id of the item",
            "log_likelihoods": "log-likelihood of each choice, nats",
            "lengths": "number of characters of each choice",
            "answer": "number of the correct choice, from 0",
            "predicted": "number of the choice with the largest log-likelihood",
            "predicted_norm": "number of the choice with the largest log-likelihood per character; null if the task "
            "has no acc_norm by convention",
        },
    ),
    "task_accuracy": (
        "One row per plan, task and measure, from `task_answers`; the 95 % intervals are Wilson's.",
        {"measure": "acc (by predicted) or acc_norm (by predicted_norm)"},
    ),
    "costs": (
        "The size of a plan's model, and its speed.",
        {
            "layers": "number of decoder layers",
            "layers_removed": "number of decoder layers fewer than in the unmerged model",
            "parameters": "number of parameters, in all tensors",
            "parameters_removed": "number of parameters fewer than in the unmerged model",
            "bytes": "bytes of its weights as stored, or with quantised matrices if model.quantise is set",
            "tokens_per_second": "tokens generated per second; only sweeps measure it",
        },
    ),
    "receipts": (
        "One row per tensor of the layers that a plan merges or moves, compared with the unmerged model's tensor of "
        "the same name, or with zeros if it has none.",
        {
            "tensor": "its name in the merged model",
            "max_abs_change": "largest absolute difference",
            "relative_change": "Frobenius norm of the difference over that of the unmerged model's tensor",
        },
    ),
    "refits": (
        "One row per fit of a refitted plan, in order.",
        {
            "method": "linear, scale, outputs or units (plan.refit)",
            "part": "units, attention or mlp",
            "tokens": "number of tokens fitted on, including those that the ridge was chosen on; 0 for units, "
            "which are chosen, not fitted",
            "ridge": "ridge that was used; null without one",
            "error": "remaining error on these tokens, relative to that of the layer before the fit",
            "held_out_error": "the same on held-out tokens, before these were included; null if the ridge was given",
            "seconds": "time of all fits of the plan; null if an earlier call made some of them",
        },
    ),
    "blocks": (
        "The blocks of layers among which one was chosen. A search of blocks starts from the chosen one.",
        {
            "first": "original number of the block's first layer",
            "last": "original number of its last layer",
            "measure": "given, cosine, angular, similarity or loss (plan.block)",
            "score": "lowest is best. For cosine, angular and similarity, a distance between the states that enter the "
            "block and those that leave it; for loss, the mean NLL (nats) of the calibration text without the block; "
            "null for a given block",
            "chosen": "whether this block was chosen",
            "tokens": "number of tokens that the score was measured on; null if it needed no model",
        },
    ),
    "removals": (
        "What a sweep's method drop_greedy measured: one row per layer that was there at each step.",
        {
            "step": "number of the step, from 0: so many layers were gone before",
            "layer": "original number of the layer",
            "loss": "mean NLL (nats) of the calibration text without those and this one; null if it is not finite",
            "chosen": "whether this layer was dropped: it has the lowest loss",
            "tokens": "number of tokens scored",
        },
    ),
    "sweep": (
        "One row per point of the compression curve; a plan may occur under several methods.",
        {
            "method": "as in sweep.methods; file_NAME for each of sweep.alpha_files",
            "refit": "as in sweep.refits; null, in old runs, means none",
        },
    ),
    "context": (
        "Losses by position in a window of plain text, and key-value retrieval from a context.",
        {
            "measure": "position_nll or retrieval",
            "bucket": "for position_nll the first position of the bucket, for retrieval the distance in tokens",
            "n": "number of tokens or prompts",
            "value": "mean loss in nats (position_nll), or accuracy (retrieval)",
            "standard_error": "standard error of the value; null for position_nll",
        },
    ),
    "similarity": (
        "One row per pair of layers and subset of prompts.",
        {
            "measure": "npib, gaussian, cosine or cka (similarity.measure)",
            "layer_i": "original number of the first layer, from 0",
            "layer_j": "original number of the second layer",
            "value": "similarity of the two layers; null if the entropies are degenerate",
            "null_mean": "mean over null matrices from shuffled prompts: what unrelated layers score",
            "null_p95": "95th percentile of the null matrices",
            "note": "why the value is null",
        },
    ),
    "similarity_correlation": (
        "Correlations between the similarity matrices of two subsets or languages.",
        {
            "subset_a": "subset of the first matrix",
            "language_a": "its language",
            "subset_b": "subset of the second matrix",
            "language_b": "its language",
            "measure": "npib, gaussian, cosine or cka (similarity.measure)",
            "pearson": "correlation of all entries, including the diagonal, as published",
            "pearson_off_diagonal": "the same over each pair of different layers once",
            "ci_low": "lower end of the 95 % interval of pearson_off_diagonal",
            "ci_high": "upper end of the interval",
            "reliability_a": "reliability of the first matrix: Spearman-Brown, from random halves of its prompts",
            "reliability_b": "reliability of the second matrix",
        },
    ),
    "embeddings": (
        "The states of a layer on the prompts of a subset, as coordinates.",
        {"coordinate": "number of the coordinate, from 0", "value": "the coordinate"},
    ),
    "degeneracy": (
        "Whether a layer's diffusion map is degenerate.",
        {
            "effective_rank": "exp of the entropy of the kernel's normalised eigenvalues, from 1 to the number of "
            "prompts; near either end the map is noise",
            "off_diagonal_mass": "share of the diffusion matrix's mass that is off its diagonal",
        },
    ),
    "samples": (
        "The prompts from which a subset's matrix was made.",
        {"split": "validation, test or dev"},
    ),
    "block_influence": (
        "Block influence of a layer (ShortGPT).",
        {"value": "1 minus the mean cosine of the states that enter the layer and those that leave it"},
    ),
    "sensitivity": (
        "The similarity under one changed setting, compared with the reference settings.",
        {
            "parameter": "the setting that differs, or `reference`",
            "setting": "its value",
            "reference": "whether the row is the reference itself",
            "pearson": "correlation with the reference's matrix, including the diagonal",
            "pearson_off_diagonal": "the same over each pair of different layers once",
            "plan_overlap": "share of the reference's most similar pairs of layers that are chosen again",
            "alpha_max_difference": "largest change of an alpha of plan.base similarity_ratio",
        },
    ),
    "gradient_history": (
        "One row per epoch of a gradient descent.",
        {
            "start": "number of the descent, from 0",
            "epoch": "number of the epoch; 0 is the starting point",
            "loss": "loss on the questions and text that the descent uses",
            "held_out_loss": "the same with questions held out from the descent for the others; null without these",
            "alphas": "one per merge step; for per_matrix, one matrix after the other, in the order of a layer "
            "(q, k, v, o, gate, up, down), not that of `trials`",
        },
    ),
    "incidents": (
        "Events of the run: resumptions, and workers that were lost or joined.",
        {
            "time": "UTC, ISO 8601",
            "kind": "resumed, or what happened to a worker: lost, back, joined, replaced, gone or refused",
            "worker": "the worker",
            "detail": "details",
        },
    ),
}


def meaning(table: str, column: str) -> str:
    """The meaning of a column of a table."""
    own = TABLES[table][1]
    return own[column] if column in own else SHARED[column]
