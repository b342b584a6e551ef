"""What a config says of positions: how far each layer's queries see, which rotary embedding it has, and how long a
prompt may be. Layers that differ in the first two are never averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raymerge.architectures import ArchitectureError
from raymerge.families import ARCHITECTURES, BOUNDED_ROPE_TYPES, STATE_SPACE, TRAINED_LENGTH, rotary_parameters


@dataclass(frozen=True)
class ContextLimit:
    """How many tokens a sequence may have, and the config key that says so. rope_type: the rotary embedding whose
    frequencies are others beyond; None where beyond there is only what the model was not trained on."""

    tokens: int
    key: str
    rope_type: str | None = None

    def __str__(self) -> str:
        if self.rope_type is None:
            return f"{self.tokens} ({self.key})"
        return f"{self.tokens} ({self.key}; longer prompts may have other rotary frequencies, {self.rope_type})"


def fixed_limit(config: Any) -> ContextLimit | None:
    """How long a sequence may be before its rotary frequencies depend on its length; None where they never do."""
    found = []
    for rope in rotary_parameters(config).values():
        if (rope_type := rope.get("rope_type")) in BOUNDED_ROPE_TYPES:
            trained = rope_type == "longrope"
            key = TRAINED_LENGTH if trained else "max_position_embeddings"
            found.append(ContextLimit(rope[key] if trained else getattr(config, key), key, rope_type))
    return min(found, key=lambda limit: limit.tokens, default=None)


def context_limit(config: Any) -> ContextLimit:
    """How long a prompt may be: what the model's positions reach to, or `fixed_limit` where that is shorter."""
    fixed = fixed_limit(config)
    if fixed is not None and fixed.tokens <= config.max_position_embeddings:
        return fixed
    return ContextLimit(config.max_position_embeddings, "max_position_embeddings")


#: What `rotary_types` says of a layer without a rotary embedding.
NO_ROTARY = "none"


def rotary_types(config: Any) -> list[str | None]:
    """For each decoder layer, the layer type whose rotary embedding it has; None where all layers that have one have
    the same, and NO_ROTARY of a layer that has none."""
    count = config.num_hidden_layers
    types = [None] * count if None in rotary_parameters(config) else list(config.layer_types)
    family = ARCHITECTURES[config.model_type]
    if any(getattr(config, option) != value for option, value in family.rotary_if.items()):
        return [NO_ROTARY] * count
    gives = config.sliding_window is not None if family.rotary_windows == "gives" else family.rotary_windows == "always"
    if gives:
        kinds = zip(types, config.layer_types, strict=True)
        return [kind if windowed == "sliding_attention" else NO_ROTARY for kind, windowed in kinds]
    key = family.rotary_layers
    if key is None:
        return types
    rotary = getattr(config, key)
    if len(rotary) < count:
        raise ArchitectureError(f"{key} has {len(rotary)} entries for {count} layers: it needs one for each")
    return [kind if has else NO_ROTARY for kind, has in zip(types, rotary, strict=False)]


def attention_windows(config: Any) -> list[int | None]:
    """For each decoder layer, how many positions back a query sees, itself included; None where all of them.

    As transformers builds the family's masks: without any window, with `sliding_window` in every layer, or in those
    that `layer_types` names.
    """
    types = getattr(config, "layer_types", None) or []
    known = {"full_attention", "sliding_attention"}
    if unknown := sorted(set(types) - known):
        found = f": those are {STATE_SPACE}" if {"linear_attention", "conv"} & set(unknown) else ""
        raise ArchitectureError(
            f"layer types {unknown} are not supported{found}; supported are {', '.join(sorted(known))}"
        )
    window, windows = getattr(config, "sliding_window", None), ARCHITECTURES[config.model_type].windows
    sliding = types.index("sliding_attention") if "sliding_attention" in types else None
    # transformers' cache follows layer_types in every family: it would forget what these masks see.
    if sliding is not None and windows == "none":
        raise ArchitectureError(
            f"layer_types has sliding_attention for layer {sliding}, but layers of {config.model_type} have no "
            "attention windows: make those layers full_attention"
        )
    # Of a window that is turned off transformers makes None, in some families 0; in others it stays.
    off = window is None or (window == 0 and getattr(config, "use_sliding_window", None) is False)
    if sliding is not None and off:  # which transformers can load, but not run
        raise ArchitectureError(
            f"layer_types has sliding_attention for layer {sliding}, but the config gives no sliding_window (or "
            "use_sliding_window is false): set it, or make those layers full_attention"
        )
    if window is not None and window < 1 and (windows == "all" or sliding is not None):
        raise ArchitectureError(
            f"sliding_window is {window}, but a window holds at least the position itself: set it to 1 or more, or to "
            "null for full attention"
        )
    if windows == "layer_types":
        return [window if kind == "sliding_attention" else None for kind in types]
    return [window if windows == "all" else None] * config.num_hidden_layers
