"""A merged model as a whole on MMLU questions and on plain text, from embedding to unembedding.

Few-shot prefixes are run once a subject and questions are batched by length; or, given the trunk's cached states, the
run starts where the plan first changes anything. Answers are those of a plain forward of each prompt, to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raymerge.architectures import ArchitectureError
from raymerge.checkpoint import Checkpoint
from raymerge.errors import UserError
from raymerge.forward import GroupStates, LayerRunner, version
from raymerge.fusion import check_mergeable
from raymerge.plan import MergePlan
from raymerge.prompts import ChoicePrompts, Prompts, Shard
from raymerge.saved_config import trimmed_config
from raymerge.skeleton import skeleton_of
from raymerge.trunk import TrunkCache

_TEXT_TOKENS = 512  # positions whose whole-vocabulary logits are computed at once


class NotFiniteError(UserError):
    """A model whose logits are not finite: whatever is the largest of them answers nothing."""


@dataclass(frozen=True)
class Answers:
    """What a model answered, for the questions `rows` (n,) of a question set.

    logits (n, 4) float32 of " A" … " D"; logsumexp (n,) float32 over the whole vocabulary, NaN where that was not
    computed; top_is_letter (n,) bool: the most probable token is one of the four, False where logsumexp is NaN;
    prompt_nll (n,) float64: mean negative log-likelihood in nats of the question's own prompt tokens (few-shot prefix
    masked), NaN where it was not asked for; prompt_tokens (n,) int64.
    """

    rows: np.ndarray
    logits: np.ndarray
    logsumexp: np.ndarray
    top_is_letter: np.ndarray
    prompt_nll: np.ndarray
    prompt_tokens: np.ndarray

    def check_finite(self, runner: LayerRunner, plan: MergePlan) -> None:
        """Raise NotFiniteError where logits are not; the largest of four NaN would be taken for an A."""
        if bad := int((~np.isfinite(self.logits).all(1)).sum()):
            raise NotFiniteError(
                runner.overflow(f"logits of plan {plan.name} on {bad} of {len(self.rows)} questions are")
            )

    @staticmethod
    def of_letters(logits: np.ndarray) -> Answers:
        """Answers to all questions of a set of which nothing but the letters' logits (n, 4) was computed."""
        n = len(logits)
        unknown = np.full(n, np.nan)
        return Answers(np.arange(n), logits, unknown, np.zeros(n, dtype=bool), unknown, np.zeros(n, dtype=np.int64))

    @staticmethod
    def join(parts: Iterable[Answers]) -> Answers:
        """Several shares of one question set, in the order of its rows."""
        parts = list(parts)
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in Answers.__dataclass_fields__
        }
        order = np.argsort(columns["rows"], kind="stable")
        return Answers(**{name: values[order] for name, values in columns.items()})


@torch.inference_mode()
def answer_shard(
    runner: LayerRunner,
    plan: MergePlan,
    prompts: Prompts,
    shard: Shard,
    *,
    trunk: TrunkCache | None = None,
    prompt_nll: bool = False,
) -> Answers:
    """Answers of the merged model to one shard's questions.

    trunk: start from its cached states where the plan leaves the trunk as it is. prompt_nll: also compute the loss of
    the prompts' own tokens, which costs the whole vocabulary at every one of them.
    """
    states = merged_states(runner, plan, shard, trunk)
    rows, lasts, tokens, losses = [], [], [], []
    for state in states:
        members, last = state.last()
        rows += members
        lasts.append(last)
        order = [i for batch in state.batches for i in batch.members]
        lengths = np.array([len(state.group.sequences[i]) for i in order])
        tokens.append(lengths)
        if prompt_nll:
            scored = lengths - (state.prefix.shape[1] == 0)
            losses.append(_sequence_nll(runner, state)[order] / np.where(scored > 0, scored, np.nan))
        else:
            losses.append(np.full(len(lengths), np.nan))
    # The groups together: converting the vocabulary costs the same for a question as for a hundred.
    vocabulary = runner.vocabulary
    hidden = vocabulary.normalise(torch.cat(lasts))
    logits = vocabulary.capped(hidden @ vocabulary.unembedding_rows(list(prompts.letters)).T)
    logsumexp, top = vocabulary.logsumexp_and_top(hidden)
    is_letter = torch.isin(top.cpu(), torch.tensor(prompts.letters)).numpy()
    columns = logits.cpu().numpy(), logsumexp.cpu().numpy(), is_letter
    return Answers.join([Answers(np.array(rows), *columns, np.concatenate(losses), np.concatenate(tokens))])


@torch.inference_mode()
def score_choices(
    runner: LayerRunner,
    plan: MergePlan,
    prompts: ChoicePrompts,
    shard: Shard,
    *,
    trunk: TrunkCache | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods under the merged model of the choices in one shard of a task, each after its context.

    Returns the choices' numbers (n,) int64, ascending, and the sums over their tokens (n,) float64 in nats. trunk: as
    for `answer_shard`. Raises NotFiniteError.
    """
    owners, befores, targets = [], [], []
    for state in merged_states(runner, plan, shard, trunk):
        rows = np.array(state.group.rows)
        own = np.array([len(ids) for ids in state.group.sequences])
        owner, _, before, target = _scored(state, own - prompts.scored[rows])
        owners.append(rows[owner])
        befores.append(before)
        targets.append(target)
    # The groups together, as below: one context's choices are too few tokens for a window of the vocabulary.
    rows, of = np.unique(np.concatenate(owners), return_inverse=True)
    nll = _token_nll(runner, torch.cat(befores), torch.from_numpy(np.concatenate(targets)))
    if not np.isfinite(nll).all():
        raise NotFiniteError(runner.overflow(f"log-likelihoods of choices under plan {plan.name} are"))
    return rows, -np.bincount(of, weights=nll)


@torch.inference_mode()
def text_nll(
    runner: LayerRunner, plan: MergePlan, shard: Shard, *, trunk: TrunkCache | None = None
) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) and number of scored tokens of a shard of plain text.

    The first token of each window is not scored.
    """
    states = merged_states(runner, plan, shard, trunk)
    total = sum(float(_sequence_nll(runner, state).sum()) for state in states)
    return total, sum(len(ids) - 1 for group in shard.groups for ids in group.sequences)


def merged_states(runner: LayerRunner, plan: MergePlan, shard: Shard, trunk: TrunkCache | None) -> list[GroupStates]:
    """The states that leave the merged model's last layer, from the trunk's where the plan leaves it as it is."""
    check_mergeable(runner.checkpoint, plan)
    if trunk is not None and plan.first_changed >= trunk.first:
        return runner.run(trunk.states(shard), runner.plan_layers(plan, trunk.first))
    return runner.run(runner.embed(shard), runner.plan_layers(plan))


def _sequence_nll(runner: LayerRunner, state: GroupStates) -> np.ndarray:
    """(sequences,) float64 nats summed over each sequence's own tokens."""
    owner, _, nll = token_losses(runner, state)
    return np.bincount(owner, weights=nll, minlength=len(state.group.sequences))


def token_losses(runner: LayerRunner, state: GroupStates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every scored token of a group's sequences: which sequence it is of (N,), its position (N,) counted from the
    prefix's first token on, and its negative log-likelihood (N,) float64 in nats.

    With a prefix its last position predicts the first own token; without one the first token is not scored.
    """
    owner, positions, before, targets = _scored(state, np.zeros(len(state.group.sequences), dtype=np.int64))
    # All sequences together: one window of the vocabulary is converted for many tokens, not for a question's 70.
    return owner, positions, _token_nll(runner, before, torch.from_numpy(targets))


def _scored(state: GroupStates, skip: np.ndarray) -> tuple[np.ndarray, np.ndarray, Tensor, np.ndarray]:
    """A group's tokens without the first skip[i] of each sequence i: sequence (N,), position (N,), the state before the
    token (N, d), the token (N,)."""
    n_prefix = state.prefix.shape[1]
    before, targets, owner, positions = [], [], [], []
    for members, lengths, x in state.batches:
        for row, i in enumerate(members):
            ids = state.group.sequences[i]
            start = max(int(skip[i]), 0 if n_prefix else 1)
            if start == 0:
                before.append(state.prefix[0, -1:])
            before.append(x[row, max(start - 1, 0) : lengths[row] - 1])
            targets.append(ids[start:])
            owner += [i] * len(targets[-1])
            positions.append(np.arange(n_prefix + start, n_prefix + len(ids)))
    return np.array(owner, dtype=np.int64), np.concatenate(positions), torch.cat(before), np.concatenate(targets)


def _token_nll(runner: LayerRunner, states: Tensor, targets: Tensor) -> np.ndarray:
    """(N,) float64 negative log-likelihood in nats of each target given the state before it."""
    vocabulary, parts = runner.vocabulary, []
    for start in range(0, len(targets), _TEXT_TOKENS):
        hidden = vocabulary.normalise(states[start : start + _TEXT_TOKENS])
        rows = vocabulary.unembedding_rows(targets[start : start + _TEXT_TOKENS])
        logsumexp, _ = vocabulary.logsumexp_and_top(hidden)
        parts.append((logsumexp.double() - vocabulary.capped((hidden * rows).sum(-1)).double()).cpu().numpy())
    return np.concatenate(parts)


def check_generates(checkpoint: Checkpoint) -> None:
    """Raise ArchitectureError where the installed transformers runs the model, but does not generate by it."""
    family, installed = checkpoint.architecture, version("transformers")
    if tuple(map(int, installed.split(".")[:2])) < family.generates_since:
        raise ArchitectureError(
            f"transformers {installed} generates nothing by {family.name}, so that its speed cannot be measured: "
            f"install {'.'.join(map(str, family.generates_since))} or later, or set sweep.speed_tokens to 0"
        )


@torch.inference_mode()
def generation_speed(
    checkpoint: Checkpoint, layers: int, *, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> float:
    """Tokens per second of greedy generation by transformers, one sequence, with the first `layers` decoder layers.

    Timed from the first token, which pays for the prompt, to the last, after a short generation to warm up. The whole
    language model is loaded, converted to `dtype`.
    """
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        """Stops nothing; notes when each token was there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
            input_ids[:, -1].tolist()  # on an accelerator the token is there when it has been copied
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    name = checkpoint.architecture.layer_name
    gone = tuple(name(layer, "") for layer in range(layers, checkpoint.n_layers))
    config = type(checkpoint.config).from_dict(trimmed_config(checkpoint.config.to_dict(), list(range(layers))))
    skeleton = skeleton_of(AutoModelForCausalLM, config, trust_remote_code=checkpoint.trust_remote_code)
    kind, names = type(skeleton), set(skeleton.state_dict())
    # Tensor by tensor, as a saved model is loaded: random weights first, and all converted ones beside them, take twice
    # the memory and most of the time.
    arch = checkpoint.architecture
    held = (stored for stored in checkpoint if arch.has_tensor(stored) and not stored.startswith(gone))
    # A release of transformers may call an unembedding as files do, or otherwise.
    state = {stored if stored in names else arch.loaded_name(stored): checkpoint[stored] for stored in held}
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype).to(device).eval()
    prompt = torch.arange(1, 9, device=device)[None]
    model.generation_config.eos_token_id = None  # nothing ends a text before its length
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    for count in (2, 1 + tokens):
        clock = Clock()
        criteria = StoppingCriteriaList([clock])
        model.generate(prompt, max_new_tokens=count, stopping_criteria=criteria, **options)
    return tokens / (clock.times[-1] - clock.times[0])
