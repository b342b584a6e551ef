"""What a merge needs of prompts and texts: what seams are fitted on, blocks are chosen on, and neurons are matched on.

The plan of a run is of the run's own, which its configuration leads to, so that the model is the one that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path

import torch

from raymerge.alignment import Aligner
from raymerge.checkpoint import Checkpoint
from raymerge.config import CalibrationConfig, Config
from raymerge.config_file import parse_config
from raymerge.errors import UserError
from raymerge.forward import LayerRunner
from raymerge.inputs import CALIBRATION, REPORT, SEARCH, Material, read_material
from raymerge.plan import MergePlan, PlanError
from raymerge.plan_files import RECORD_FILE
from raymerge.prompts import Shard
from raymerge.role_prompts import RolePrompts, calibration_identity
from raymerge.storage import folder_of, located
from raymerge.tables import RunDirectory
from raymerge.texts import read_plain_text
from raymerge.trunk import TrunkCache, mlp_units

# Experiments that write plan files, and the prompts whose choice depends on each other in them.
_ROLES = {"search": (SEARCH, REPORT), "sweep": (REPORT,)}


def run_of(source: object) -> Path | str | None:
    """The search or sweep (its directory or URI) that a plan file lies in, as RUN/plans/NAME.json or
    RUN/models/NAME/merge_plan.json; None for any other source of a plan."""
    if not isinstance(source, str | PathLike):
        return None
    folder, file = folder_of(located(source))
    above, name = folder_of(folder)
    if name != "plans":
        above, models = folder_of(above)
        if models != "models" or file != RECORD_FILE:
            return None
    return above if RunDirectory.experiment_at(above) in _ROLES else None


class PlanPrompts:
    """The prompts and texts that a merge's plan refers to; read when they are first asked for.

    source: what the merge is by (`plan_source.plan_to_merge`). calibration: a plain text, on whose first tokens seams
    are fitted and blocks chosen, in place of what the run has that the source is of.
    """

    def __init__(self, checkpoint: Checkpoint, source: object, calibration: CalibrationConfig | None):
        self.checkpoint, self._source = checkpoint, source
        self._calibration = calibration or CalibrationConfig()
        self._text = self._calibration.text

    @cached_property
    def run(self) -> Path | str | None:
        """The run that the plan is of, if it is of one."""
        return run_of(self._source)

    @property
    def calibration_name(self) -> str:
        """What the calibration's tokens are of, for a message."""
        return self._text if self._text is not None else f"the run {self.run}"

    @cached_property
    def _calibrated(self) -> tuple[Config, Material]:
        if self._text is not None:
            text = read_plain_text(self._text, "calibration")
            return Config(calibration=self._calibration), Material(calibration=(text, 0))
        # A run that fitted nothing has no calibration, whatever the file said that it was made from.
        if self.run is None or "calibration" not in self._loaded.config:
            raise PlanError("a refit, or a choice of the block by distances, needs a plain text: give --calibration")
        return self._read_run(matched=False)

    @cached_property
    def calibration(self) -> Sequence[Shard]:
        """What seams are fitted on, or a block is chosen on. Raises PlanError where there is none."""
        return RolePrompts(*self._calibrated, self.checkpoint).calibration

    @property
    def calibration_identity(self) -> str:
        """What names these tokens in a refit."""
        return calibration_identity(*self._calibrated, self.checkpoint)

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """What the run computed in, where its tokens are used."""
        return None if self._text is not None or self.run is None else self._run_dtype

    @property
    def _run_dtype(self) -> torch.dtype | None:
        """What the run computed in; None where neither inputs.json, which a copy may lack, nor its configuration says
        it."""
        named = self._loaded.inputs.get("dtype", self._config.model.dtype)
        return None if named == "auto" else getattr(torch, named)

    def aligner(self, plan: MergePlan, folder: str | Path | None) -> Aligner:
        """An aligner for the plan, which matches by activations as the run did. folder: of what it has matched; it must
        be there for activations."""
        if plan.alignment != "activations" or all(kept.unchanged for kept in plan.kept) or self.run is None:
            return Aligner(self.checkpoint, folder)
        config, material = self._read_run(matched=True)
        prompts = RolePrompts(config, material, self.checkpoint)
        if prompts.matched_on is None:
            raise PlanError(
                f"{self._source} has a plan with alignment activations, but {self.run} has matched no neurons by them, "
                "so it is of another run: merge by the file that lies there"
            )
        assert folder is not None
        states = Path(folder)
        runner = LayerRunner(self.checkpoint, dtype=self._run_dtype, quantise=config.model.quantise)
        return Aligner(
            self.checkpoint,
            folder,
            units=lambda layer: mlp_units(TrunkCache(runner, layer, states), prompts.matching_shard),
            data=prompts.matching_identity,
        )

    @cached_property
    def _loaded(self) -> RunDirectory:
        assert self.run is not None  # what a plan has of a run is asked for where there is one
        return RunDirectory.load(self.run)

    @cached_property
    def _config(self) -> Config:
        return parse_config(self._loaded.config, source=f"{self.run}/config.yaml")

    def _read_run(self, *, matched: bool) -> tuple[Config, Material]:
        """What the run's configuration leads to: of its calibration, and matched: of what neurons are matched on.

        Raises PlanError where it cannot be read, or is not what the run was made of.
        """
        config = self._config
        # A text stands for itself; prompts depend on what else the experiment asks.
        roles = _ROLES[self._loaded.experiment]
        if config.data.mmlu is None or (config.calibration.text is not None and not matched):
            roles = ()
        other = "" if matched else ", or give a text as --calibration"
        try:
            material = read_material(config, roles if matched else (*roles, CALIBRATION))
        except UserError as error:
            raise PlanError(
                f"{self._source} is made with what the configuration of its run, {self.run}, leads to, but {error}; "
                f"relative paths start here, so call from where the run was made{other}"
            ) from error
        held = self._loaded.inputs
        for role, identity in material.identities.items():
            if (there := held.get(f"data {role}", identity)) != identity:
                raise PlanError(
                    f"the configuration of {self.run} leads to other files now than the run was made of: its {role} "
                    f"was {there} and is {identity}; restore them{other}"
                )
        return config, material
