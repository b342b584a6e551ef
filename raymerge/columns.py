"""What every table and column of a run means: stored in the tables' files, and a page of the documentation."""

from __future__ import annotations

#: What columns mean that several tables share; a table's own words go before these.
SHARED = {
    "run_id": "the run; the same in every table of it, so that those of several runs can be put together",
    "plan_id": "the plan, a way of merging this model: joins every table that has it; `plans` has its name",
    "plan_a": "plan_id of the plan that the difference is of",
    "plan_b": "plan_id of the plan that it is held against",
    "split": "which questions: validation, test or dev",
    "language": "of the questions or prompts",
    "subject": "of the questions",
    "subset": "subjects, domain or `all`: which prompts",
    "measure": "what was measured",
    "embedding": "how states became coordinates (similarity.embedding)",
    "layer": "original number of the decoder layer, from 0",
    "sample": "number of the prompt in its subset and language, as in `samples`",
    "question_id": "the source's own id, else SUBJECT/SPLIT/ROW",
    "content_hash": "digest of the content: equal where the same is asked",
    "task": "the task's name in the configuration",
    "n": "how many questions or items",
    "correct": "how many of them were answered rightly",
    "accuracy": "share in [0, 1]",
    "standard_error": "of the mean; NaN of a single one",
    "ci_low": "lower end of the 95 % interval",
    "ci_high": "upper end of the 95 % interval",
    "nll": "mean negative log-likelihood, nats",
    "perplexity": "exp of nll",
    "n_samples": "how many prompts",
    "note": "why a value is missing, or what to know of it",
    "searcher": "controls, random, bayes, or gradient with its parametrisation",
    "alphas": "one a merge step, in the order of the steps; then those of each matrix that has its own",
    "difference": "plan_a minus plan_b; less is better of losses, more of accuracies",
    "p_value": "of the paired test, uncorrected",
    "p_holm": "corrected for the comparisons by the same measure in the same family: those of the best plan found (of "
    "a sweep those that it asks about), or all others; null where not corrected",
    "test": "mcnemar_exact of right and wrong answers, paired_sign_flip of losses",
    "matrix": "null for all matrices that have no rows of their own, else the projection matrix that these are of",
    "alignment": "none, rows, neurons or activations (plan.alignment)",
    "norms": "keep or fold (plan.norms)",
    "merges": "how many layers go",
}

#: Of every table what its rows are, and what its columns mean that are not as in `SHARED`.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "plans": (
        "One row a merge step of every reported plan; a plan without steps has one row. A plan may stand under several "
        "names: what was found can be what a control is.",
        {
            "name": "what the plan is called; its refit, if it has one, is in table refits",
            "kind": "base (unmerged), drop, before_last, fixed, random, file or found",
            "selection": "which layers: none, tail, before_last, block, most_similar or list",
            "step": "number of the step, from 0; null without steps",
            "into": "original number of the layer that is merged into, and whose place the result has",
            "remove": "original number of the layer that is merged into it",
            "alpha": "weight of `into`; `remove` has 1 - alpha: 1 drops `remove`, 0 drops `into`",
        },
    ),
    "coefficients": (
        "What a plan's steps come to: the weight of every original layer in every layer that the merged model has.",
        {
            "kept_layer": "original number of the layer whose place it has",
            "source_layer": "original number of a layer that has a weight in it",
            "coefficient": "its weight; those of one kept_layer and matrix add up to 1",
        },
    ),
    "trials": (
        "One row a candidate of a search; `plans` has those that are reported on.",
        {
            "iteration": "number of the candidate of its searcher, from 0; of gradient that of the start",
            "batch": "number of the Tune trial's batch",
            "tune_trial": "id of the Tune trial; empty for controls",
            "actor": "the worker that scored it",
            "seed": "search.seed",
            "block": "first layer of its block, where that is searched too",
            "objective": "search.objective",
            "value": "the objective on the search questions and text, or how far above search.perplexity_ceiling it is"
            "; losses are minimised, accuracies maximised; null of a failed one",
            "accuracy": "share of the search questions; null without questions",
            "nll": "mean answer NLL on the search questions, nats; null without questions",
            "perplexity": "of the search text; null where none is measured",
            "n_questions": "how many search questions",
            "seconds": "of the worker; 0 of controls, which are not timed",
            "cpu_seconds": "of the worker",
            "status": "ok or failed",
            "error": "why it failed",
        },
    ),
    "answers": (
        "One row a question and plan: of the reported plans on the report's questions, of a search's controls (with "
        "output.store_candidate_answers its candidates too) on those that it chooses by.",
        {
            "logit_a": "logit of letter A at the prompt's end",
            "logit_b": "logit of letter B",
            "logit_c": "logit of letter C",
            "logit_d": "logit of letter D",
            "logsumexp_all": "log of the sum of exp over the whole vocabulary's logits: minus it, a logit is a log "
            "probability; null where not computed",
            "top_is_letter": "whether the most probable token of all is one of the four letters; null where not "
            "computed",
            "answer": "the right choice, 0 to 3 for A to D",
            "predicted": "the letter of the largest logit, 0 to 3 for A to D",
            "prompt_nll": "mean NLL of the question's own prompt_tokens, nats; null where not asked for",
            "prompt_tokens": "how many tokens that is the mean of",
        },
    ),
    "accuracy": (
        "By subject, from `answers`; subject _micro is all questions alike, _macro the mean over subjects.",
        {
            "subject": "of the questions, or _micro or _macro, of which n and correct are totals",
            "standard_error": "of the accuracy; NaN of a single question",
            "ci_low": "lower end of the 95 % interval (Wilson's; of _macro with the effective number of questions)",
            "ci_high": "upper end of it",
            "nll": "mean negative log-likelihood of the right letter among the four, nats",
        },
    ),
    "comparisons": (
        "Paired differences of two plans on the same questions, or passages of plain text.",
        {
            "split": "of the questions, or text",
            "measure": "accuracy, answer_nll (nats) or text_nll (nats a token of plain text)",
        },
    ),
    "subject_comparisons": (
        "The same on the subjects alone that search.objective names, where it names some.",
        {
            "subjects": "joined by commas",
            "measure": "accuracy or answer_nll (nats)",
        },
    ),
    "task_comparisons": (
        "The same by task: each task and measure is a family of its own.",
        {"measure": "acc or acc_norm, as in `task_accuracy`"},
    ),
    "perplexity": (
        "Of plain text, and of the questions' own tokens where asked for.",
        {
            "target": "text, or question",
            "subject": "of the questions; null for all, and for text",
            "tokens": "how many were predicted",
            "nll": "mean loss, nats: of a token of text, or the mean over questions of prompt_nll",
            "ci_low": "lower end of the perplexity's 95 % interval, over passages or questions",
            "ci_high": "upper end of it",
            "text_hash": "digest of the text",
        },
    ),
    "text_losses": (
        "Plain text by passages of some 64 tokens; exp of sum(nll) / sum(tokens) of a plan is its perplexity.",
        {
            "window": "number of the window of text, from 0",
            "position": "of the passage's first predicted token in its window",
            "tokens": "how many were predicted",
            "nll": "their summed loss, nats",
        },
    ),
    "task_answers": (
        "One row an item of a further task and plan.",
        {
            "item_id": "of the item",
            "log_likelihoods": "of each choice, nats",
            "lengths": "characters of each choice",
            "answer": "number of the right choice, from 0",
            "predicted": "number of the likeliest choice",
            "predicted_norm": "of the likeliest a character; null where the task's convention has no acc_norm",
        },
    ),
    "task_accuracy": (
        "By task and measure, from `task_answers`; 95 % intervals are Wilson's.",
        {"measure": "acc, by predicted; acc_norm, by predicted_norm"},
    ),
    "costs": (
        "What a plan's model costs.",
        {
            "layers": "decoder layers that it has",
            "layers_removed": "decoder layers fewer than the unmerged model has",
            "parameters": "that it has, tensors of all kinds",
            "parameters_removed": "fewer than the unmerged model has",
            "bytes": "of its weights as stored, or with quantised matrices where model.quantise is set",
            "tokens_per_second": "generated, measured by sweeps alone",
        },
    ),
    "receipts": (
        "One row a tensor of the layers that a plan merges or moves, against the unmerged model's of the same name.",
        {
            "tensor": "its name in the merged model",
            "max_abs_change": "largest absolute difference",
            "relative_change": "Frobenius norm of the difference over that of the unmerged model's tensor",
        },
    ),
    "refits": (
        "One row a fit of a refitted plan, in order.",
        {
            "method": "linear, scale, outputs or units (plan.refit)",
            "part": "units, attention or mlp",
            "tokens": "fitted on, those included that the ridge was chosen on",
            "ridge": "that was used; null without one",
            "error": "left on these tokens, relative to that of the layer as it stood",
            "held_out_error": "the same on held-out tokens, before they were included; null where the ridge was given",
            "seconds": "of all fits of the plan; null where an earlier call has made some",
        },
    ),
    "blocks": (
        "The blocks of layers that one was chosen from; of a search of blocks the chosen one is where it begins.",
        {
            "first": "original number of the block's first layer",
            "last": "of its last one",
            "measure": "given, cosine, angular, similarity or loss (plan.block)",
            "score": "the least is best. By cosine, angular or similarity a distance between the states that enter the "
            "block and those that leave it, by loss the mean NLL (nats) of the calibration text without it; null for a "
            "given one",
            "chosen": "whether it was",
            "tokens": "that the score was measured on; null without a model",
        },
    ),
    "sweep": (
        "One row a point of the compression curve; a plan may stand under several methods.",
        {"method": "as in sweep.methods", "refit": "as in sweep.refits; null in old runs, as none"},
    ),
    "context": (
        "Losses by position in a window of plain text, and retrieval from a context.",
        {
            "measure": "position_nll, or retrieval",
            "bucket": "of position_nll the first position, up to the next bucket's; of retrieval the distance, tokens",
            "n": "tokens, or prompts",
            "value": "mean loss (nats) of position_nll, accuracy of retrieval",
            "standard_error": "of the value; null of position_nll",
        },
    ),
    "similarity": (
        "Similarity of two layers on a subset of prompts.",
        {
            "measure": "npib, gaussian, cosine or cka (similarity.measure)",
            "layer_i": "original number of a layer, from 0",
            "layer_j": "of the other",
            "value": "null where entropies degenerate",
            "null_mean": "mean of the shuffled null matrices: what unrelated layers score",
            "null_p95": "their 95th percentile",
            "note": "why value is null",
        },
    ),
    "similarity_correlation": (
        "How alike the similarity matrices of two subsets or languages are.",
        {
            "subset_a": "subset of the one matrix",
            "language_a": "its language",
            "subset_b": "subset of the other",
            "language_b": "its language",
            "measure": "npib, gaussian, cosine or cka (similarity.measure)",
            "pearson": "correlation of all entries, the diagonal included, as published",
            "pearson_off_diagonal": "of each pair of layers once",
            "ci_low": "lower end of its 95 % interval",
            "ci_high": "upper end of it",
            "reliability_a": "of the one matrix: Spearman and Brown's of random halves of its prompts",
            "reliability_b": "of the other",
        },
    ),
    "embeddings": (
        "The states of a layer on the prompts of a subset, as coordinates.",
        {"coordinate": "number of the coordinate, from 0", "value": "the coordinate"},
    ),
    "degeneracy": (
        "Whether a layer's diffusion map means anything.",
        {
            "effective_rank": "exp of the entropy of the kernel's normalised eigenvalues, 1 to the number of prompts; "
            "near either end the map is noise",
            "off_diagonal_mass": "share of the diffusion matrix's mass off its diagonal",
        },
    ),
    "samples": (
        "The prompts that a subset's matrix was made of.",
        {"split": "validation, test or dev"},
    ),
    "block_influence": (
        "ShortGPT's block influence of a layer.",
        {"value": "1 minus the mean cosine of the states that enter the layer and those that leave it"},
    ),
    "sensitivity": (
        "A similarity under one changed setting, against the reference setting.",
        {
            "parameter": "the setting that differs, or reference",
            "setting": "its value",
            "reference": "whether the row is the reference itself",
            "pearson": "correlation with the reference's matrix, the diagonal included",
            "pearson_off_diagonal": "of each pair of layers once",
            "plan_overlap": "share of the reference's most similar pairs that are chosen again",
            "alpha_max_difference": "by how much an alpha of base similarity_ratio moves at the most",
        },
    ),
    "gradient_history": (
        "One row an epoch of a descent.",
        {
            "start": "number of the descent, from 0",
            "epoch": "0 is the start",
            "loss": "on the questions and text that steps are made on",
            "held_out_loss": "on the questions that no step sees; null without these",
            "alphas": "one a merge step; of per_matrix one matrix after the other",
        },
    ),
    "incidents": (
        "What befell the run.",
        {
            "time": "UTC, ISO 8601",
            "kind": "resumed; or of a worker lost, back, joined, replaced, gone or refused",
            "worker": "which worker",
            "detail": "what is known of it",
        },
    ),
}


def meaning(table: str, column: str) -> str:
    """What a column of a table means."""
    own = TABLES[table][1]
    return own[column] if column in own else SHARED[column]
