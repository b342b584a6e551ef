"""The prompts of everything that a model is asked, in shards: tokenised when they are first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from raymerge.checkpoint import Checkpoint
from raymerge.config import Config
from raymerge.context import RetrievalSet, retrieval_prompts, usable_distances
from raymerge.identity import digest
from raymerge.inputs import (
    CALIBRATION,
    RETRIEVAL,
    SEARCH_TEXT,
    TEXT,
    Material,
    questions_to_match_on,
    read_text,
    task_role,
)
from raymerge.objectives import TEXT_WINDOW
from raymerge.positions import ContextLimit, context_limit
from raymerge.prompts import (
    ChoicePrompts,
    PromptError,
    Prompts,
    Shard,
    encode_questions,
    encode_task,
    encode_text,
)
from raymerge.questions import QuestionSet


def calibration_identity(config: Config, material: Material, checkpoint: Checkpoint) -> str:
    """What names the calibration's tokens in a plan's refit: 16 hex digits."""
    settings, found = config.calibration, material.calibration
    start = found[1] if isinstance(found, tuple) else 0
    tokens = [material.identities[CALIBRATION], start, settings.tokens, settings.seed]
    return digest([*tokens, checkpoint.tokenizer_identity, config.model.add_bos])


class RolePrompts:
    """Prompts by role: SEARCH, REPORT and tasks' (`inputs.task_role`); TEXT, SEARCH_TEXT, CALIBRATION, RETRIEVAL.

    shards: so many shards at least of each role's prompts, where they have the tokens for it. Raises PromptError, also
    for prompts that are longer than the model's context (`positions.context_limit`); windows of plain text are as long
    as that at most.
    """

    def __init__(self, config: Config, material: Material, checkpoint: Checkpoint, *, shards: int = 1):
        self._config, self._material, self._checkpoint = config, material, checkpoint
        self._add_bos, self._shards = config.model.add_bos, shards
        self._tasks = {task_role(name): task for name, task in material.tasks.items()}
        self._questions: dict[str, Prompts] = {}
        self._choices: dict[str, ChoicePrompts] = {}

    def of(self, role: str) -> Prompts:
        """The questions of a role."""
        if role not in self._questions:
            self._questions[role] = self.encode(self._material.questions[role])
        return self._questions[role]

    def choices(self, role: str) -> ChoicePrompts:
        """The items of a task's role, with each of their choices."""
        if role not in self._choices:
            task, tokenizer = self._tasks[role], self._checkpoint.tokenizer
            found = encode_task(task, tokenizer, add_bos=self._add_bos, shards=self._shards)
            self._check_length(found.shards, f"tasks.{task.name}.shots")
            self._choices[role] = found
        return self._choices[role]

    def encode(self, questions: QuestionSet) -> Prompts:
        """Any other questions, as a role's are."""
        tokenizer = self._checkpoint.tokenizer
        found = encode_questions(questions, tokenizer, add_bos=self._add_bos, shards=self._shards)
        self._check_length(found.shards, "data.shots, or similarity.shots")
        return found

    @property
    def _context(self) -> ContextLimit:
        return context_limit(self._checkpoint.config)

    def _check_length(self, shards: Sequence[Shard], key: str) -> None:
        groups = [group for shard in shards for group in shard.groups]
        length, of = max((len(group.prefix) + max(map(len, group.sequences)), group.subject) for group in groups)
        if length > self._context.tokens:
            raise PromptError(
                f"a prompt of {of} has {length} tokens, but the context of {self._checkpoint.directory.name} is "
                f"{self._context}: ask with fewer examples ({key}), or leave out what has longer prompts"
            )

    def _encode_text(self, text: str, start: int, limit: int | None) -> tuple[Shard, ...]:
        window, tokenizer = min(TEXT_WINDOW, self._context.tokens), self._checkpoint.tokenizer
        return encode_text(text, tokenizer, limit=limit, window=window, start=start, add_bos=self._add_bos)

    @cached_property
    def text(self) -> tuple[Shard, ...]:
        """The plain text that is reported on, as windows of tokens; none without a text."""
        text = read_text(self._config)
        return () if text is None else self._encode_text(text, 0, self._config.data.perplexity_tokens)

    @cached_property
    def search_text(self) -> tuple[Shard, ...]:
        """The plain text that candidates are judged on; none where the search asks for none."""
        text = self._material.search_text
        return () if text is None else self._encode_text(*text, self._config.search.text_tokens)

    @cached_property
    def calibration(self) -> tuple[Shard, ...]:
        """What something is chosen or fitted on: the calibration text, or shards of the search questions' prompts."""
        settings, found = self._config.calibration, self._material.calibration
        if isinstance(found, tuple):
            return self._encode_text(*found, settings.tokens)
        assert found is not None  # only what is read is asked for
        shards = self.encode(found).shards
        chosen: list[int] = []
        tokens = 0
        for number in np.random.default_rng(settings.seed).permutation(len(shards)):
            if not chosen or tokens + shards[number].tokens <= settings.tokens:
                chosen.append(int(number))
                tokens += shards[number].tokens
        return tuple(shards[number] for number in sorted(chosen))

    @cached_property
    def matched_on(self) -> QuestionSet | None:
        """`inputs.questions_to_match_on`."""
        return questions_to_match_on(self._config, self._material)

    @cached_property
    def matching_shard(self) -> Shard:
        """The prompts on which neurons are matched by activations: the first shard of `matched_on`."""
        assert self.matched_on is not None  # else nothing is matched
        return self.encode(self.matched_on).shards[0]

    @property
    def matching_identity(self) -> str:
        """What names all that these activations depend on beside the model, since runs may share a cache; empty where
        nothing is matched."""
        if self.matched_on is None:
            return ""
        model = self._config.model
        tokens = [self.matched_on.identity, self._checkpoint.tokenizer_identity, model.add_bos]
        return digest([*tokens, model.dtype, model.quantise])

    @cached_property
    def retrieval(self) -> RetrievalSet:
        """Key-value prompts at the distances of the sweep section that this model can be asked about."""
        settings = self._config.sweep
        return retrieval_prompts(
            self._checkpoint.tokenizer,
            distances=usable_distances(self._checkpoint, settings.distances),
            per_distance=settings.retrieval_prompts,
            seed=self._config.data.seed,
            add_bos=self._add_bos,
        )

    def shards(self, role: str) -> tuple[Shard, ...]:
        """The shards of any role."""
        if role in self._tasks:
            return self.choices(role).shards
        if role == RETRIEVAL:
            return self.retrieval.shards
        texts = {TEXT: "text", SEARCH_TEXT: "search_text", CALIBRATION: "calibration"}
        return getattr(self, texts[role]) if role in texts else self.of(role).shards

    def shard_rows(self, role: str) -> list[list[int]]:
        """The questions of a role (or a task's items) that each of its shards holds, ascending."""
        if role in self._tasks:
            prompts = self.choices(role)
            return [prompts.items(shard).tolist() for shard in prompts.shards]
        return [sorted(row for group in shard.groups for row in group.rows) for shard in self.shards(role)]
