"""Training of the demo model, in the phases of `PHASES`, on gloo ranks of one thread each.

What made a model this small learn within minutes, each found necessary: the answer letter of every question of a
sequence is a target; the first steps show easy subjects only; and a training-only head on an early layer says of each
option whether it is the right one. Without the last two it stayed at chance.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from raymerge.demo.batches import Batch, question_batches, statement_windows
from raymerge.demo.generator import Question
from raymerge.demo.model import Shape, StackedLlama, split_layers
from raymerge.demo.optimizer import Muon
from raymerge.demo.tokenizer import PAD, token_id

ANSWER = "\nAnswer:"
# The piece that follows the last token of options A-D.
AFTER_OPTION = ("\nB.", "\nC.", "\nD.", ANSWER)
STATEMENT_LENGTH = 1024
# Share of the tokens other than answers that are language-model targets, and the weight of their loss.
MODELLED_SHARE, MODELLED_WEIGHT = 0.25, 0.1
# Seen alone at first: one fact or one comparison each, no arithmetic.
EASY = {
    "number_comparison": 0.3, "number_words": 1.0, "alphabetical_order": 0.7, "days_of_the_week": 1.0,
    "months_of_the_year": 0.7, "word_opposites": 2.0, "word_categories": 0.7, "letter_membership": 1.5,
    "country_capitals": 2.0, "colour_mixing": 1.0,
}  # fmt: skip
# Then slow learners more often: arithmetic, sequences.
ALL = {
    "elementary_addition": 1.5, "elementary_subtraction": 1.4, "number_comparison": 1.0, "number_words": 1.0,
    "alphabetical_order": 1.2, "days_of_the_week": 1.0, "months_of_the_year": 1.2, "word_opposites": 1.0,
    "word_categories": 0.9, "letter_membership": 0.8, "country_capitals": 0.6, "colour_mixing": 0.8,
}  # fmt: skip
# Last, once capitals are at 100 % and the alphabet at 52 %, more so.
SLOW = {
    "elementary_addition": 1.7, "elementary_subtraction": 1.2, "number_comparison": 0.8, "number_words": 0.8,
    "alphabetical_order": 1.6, "days_of_the_week": 1.1, "months_of_the_year": 1.5, "word_opposites": 1.3,
    "word_categories": 0.7, "letter_membership": 1.0, "country_capitals": 0.4, "colour_mixing": 0.6,
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """One stretch of training. Rates are peaks; rates fall linearly over the last `decay` of the steps."""

    name: str
    steps: int
    matrix_rate: float
    other_rate: float
    sequences: int = 10
    length: int = 120
    warmup: int = 10
    decay: float = 0.6
    weights: dict[str, float] = field(default_factory=lambda: ALL)
    easy_steps: int = 0
    easy_rate: float = 0.0
    option_weight: float = 0.5
    statements_every: int = 0
    order: tuple[int, ...] = ()
    noise: float = 0.0
    layer_drop: float = 0.0

    def rate_factor(self, step: int) -> float:
        """Multiplier of both peak rates at a step."""
        factor = min(1.0, (step + 1) / self.warmup)
        factor *= max(0.05, min(1.0, (self.steps - step) / (self.decay * self.steps)))
        return factor * (self.easy_rate / self.matrix_rate if step < self.easy_steps else 1.0)


START_LAYERS = 5
PHASES = (
    # The format and the easy subjects at a high rate, then every subject: the high rate (0.02) unlearns at that point.
    Phase("start", 800, 0.007, 1.4e-3, warmup=40, easy_steps=260, easy_rate=0.02),
    Phase("settle", 900, 0.008, 3e-3, weights=SLOW, statements_every=10),
    # The copies interleave, those of the last source (which reads the answer out) from position 8 on: so skill is lost
    # a little with every layer that goes, and it matters to a merge which of its neighbours it keeps more of.
    Phase(
        "grow", 260, 0.01, 2.4e-3, sequences=8, length=136, decay=0.7, weights=SLOW, option_weight=0.0,
        statements_every=8, order=(0, 1, 1, 1, 2, 1, 2, 1, 4, 2, 3, 4, 3, 2, 4, 3, 2, 4, 3, 3, 4), noise=0.1,
        layer_drop=0.15,
    ),
)  # fmt: skip


class Trainer:
    """One rank's model, data and optimisers for one phase; the ranks average their gradients."""

    def __init__(self, phase: Phase, model: StackedLlama, option_head: nn.Linear, tokenizer: Tokenizer) -> None:
        self.phase, self.model, self.option_head = phase, model, option_head
        self.answer, self.pad = token_id(tokenizer, ANSWER), token_id(tokenizer, PAD)
        self.letters = torch.tensor([token_id(tokenizer, f"▁{letter}") for letter in "ABCD"])
        self.option_of_next = torch.full((tokenizer.get_vocab_size(),), -1)
        for option, piece in enumerate(AFTER_OPTION):
            self.option_of_next[token_id(tokenizer, piece)] = option
        self.others = [*model.vectors_and_tables(), *option_head.parameters()]
        self.muon = Muon(model.matrices(), lr=phase.matrix_rate)
        self.adam = torch.optim.AdamW(self.others, lr=phase.other_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def question_loss(self, batch: Batch, rng: Random) -> tuple[Tensor, float]:
        """Loss of a question batch and the share of its answers that were right."""
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
        layers = self._kept_layers(rng)
        after = self.model.hidden_states(inputs, layers)
        is_answer = inputs == self.answer
        modelled = ~is_answer & (targets != self.pad) & (torch.rand(inputs.shape) < MODELLED_SHARE)
        answer_logits = self.model.logits(after[-1][is_answer])
        loss = F.cross_entropy(answer_logits, targets[is_answer])
        loss = loss + MODELLED_WEIGHT * F.cross_entropy(self.model.logits(after[-1][modelled]), targets[modelled])
        if self.phase.option_weight:
            loss = loss + self.phase.option_weight * self._option_loss(batch, is_answer, after[2])
        right = (answer_logits.argmax(-1) == targets[is_answer]).float().mean()
        return loss, float(right)

    def statement_loss(self, tokens: Tensor, rng: Random) -> Tensor:
        """Language-model loss of a (1, length + 1) window of statements."""
        states = self.model.hidden_states(tokens[:, :-1], self._kept_layers(rng))[-1]
        return F.cross_entropy(self.model.logits(states[0]), tokens[0, 1:])

    def _option_loss(self, batch: Batch, is_answer: Tensor, states: Tensor) -> Tensor:
        """Is this option the right one? Asked of the third layer, at the last token of every option."""
        option = self.option_of_next[batch.tokens[:, 1:]]
        question = (is_answer.long().cumsum(1) - is_answer.long()).clamp(max=batch.answers.shape[1] - 1)
        ends = option >= 0
        right = (option == batch.answers.gather(1, question))[ends].float()
        guess = self.option_head(F.rms_norm(states[ends], states.shape[-1:])).squeeze(-1)
        # One option in four is right; twice the weight on those keeps the head from calling all of them wrong.
        return F.binary_cross_entropy_with_logits(guess, right, pos_weight=torch.tensor(2.0))

    def _kept_layers(self, rng: Random) -> list[int]:
        """All layers, or without a few: dropped with a probability that rises linearly from 0 to `layer_drop`."""
        last = self.model.shape.layers - 1
        return [layer for layer in range(last + 1) if rng.random() >= self.phase.layer_drop * layer / last]

    def update(self, loss: Tensor, step: int) -> None:
        """One optimiser step on the gradient averaged over the ranks."""
        factor = self.phase.rate_factor(step)
        for optimizer, rate in ((self.muon, self.phase.matrix_rate), (self.adam, self.phase.other_rate)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in [*self.model.matrices(), *self.others] if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, average in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(average.view_as(gradient))
        nn.utils.clip_grad_norm_(self.others, 1.0)
        self.muon.step()
        self.adam.step()


def first_model(tokenizer: Tokenizer, seed: int) -> tuple[StackedLlama, nn.Linear]:
    """The shallow model and the training-only option head, before any training."""
    torch.manual_seed(seed)
    model = StackedLlama(Shape(vocabulary=tokenizer.get_vocab_size(), layers=START_LAYERS))
    head = nn.Linear(model.shape.hidden, 1)
    nn.init.zeros_(head.weight)
    return model, head


def train_phase(
    phase: Phase,
    model: StackedLlama,
    option_head: nn.Linear,
    tokenizer: Tokenizer,
    held: frozenset[Question],
    *,
    seed: int,
    report: Callable[[str], None],
) -> StackedLlama:
    """Train one phase on this rank; every rank returns the same model. Needs an initialised process group."""
    torch.manual_seed(seed)
    if phase.order:
        model = split_layers(model, phase.order, phase.noise)
    trainer = Trainer(phase, model, option_head, tokenizer)
    # Layers are dropped alike on all ranks; the sequences differ.
    shared, own = Random(f"{seed}/{phase.name}"), Random(f"{seed}/{phase.name}/{dist.get_rank()}")
    size = {"size": phase.sequences, "length": phase.length}
    easy = question_batches(tokenizer, own, held, EASY, **size)
    every = question_batches(tokenizer, own, held, phase.weights, **size)
    windows = statement_windows(tokenizer, own, length=STATEMENT_LENGTH)
    started, right, losses, statements = time.monotonic(), [], [], float("nan")
    for step in range(phase.steps):
        if phase.statements_every and step % phase.statements_every == phase.statements_every - 1:
            loss = trainer.statement_loss(next(windows), shared)
            statements = float(loss.detach())
        else:
            loss, share = trainer.question_loss(next(easy if step < phase.easy_steps else every), shared)
            losses.append(float(loss.detach()))
            right.append(share)
        trainer.update(loss, step)
        if (step + 1) % 25 == 0 or step + 1 == phase.steps:
            rate = (step + 1) / (time.monotonic() - started)
            report(
                f"{phase.name:7} {step + 1:4}/{phase.steps}  answers right {sum(right) / len(right):.2f}  "
                f"loss {sum(losses) / len(losses):.3f}  statements {statements:.2f}  "
                f"{rate:.1f} steps/s, {(phase.steps - step - 1) / rate:.0f} s left"
            )
            right, losses = [], []
    return model
