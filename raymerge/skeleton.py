"""transformers' model of a config, without values."""

from __future__ import annotations

import copy
from typing import Any

import torch


def skeleton_of(kind: Any, config: Any, **options: Any) -> Any:
    """The model that an auto class (AutoModelForCausalLM, ...) makes of a config: every module and every tensor's name
    and shape, on torch's meta device.

    options: of its `from_config`. config stays as it is. Raises whatever transformers raises over the config.
    """
    with torch.device("meta"):
        return kind.from_config(copy.deepcopy(config), **options)  # which writes into it
