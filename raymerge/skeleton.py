"""transformers' model of a config, without values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def skeleton_of(kind: Any, config: Any, **options: Any) -> Any:
    """The model that an auto class (AutoModelForCausalLM, ...) makes of a config: every module and every tensor's name
    and shape, on torch's meta device.

    options: of its `from_config`. config stays as it is. Raises whatever transformers raises over the config.
    """
    with torch.device("meta"), _NoDraws():
        return kind.from_config(copy.deepcopy(config), **options)  # which writes into it


class _NoDraws(TorchFunctionMode):
    """Within, modules do not initialise their weights: on the meta device too, where nothing holds what is drawn, that
    takes nearly half of the time."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
