"""The config of a merged model: the base's own, with only what fewer layers change.

Its spelling stays the base's, so that whatever reads the base reads the merge: transformers 5 writes rope_parameters
and dtype where transformers 4 and llama.cpp's converter look for rope_theta, rope_scaling and torch_dtype, and take
their defaults, silently, where they find none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from raymerge.families import FLAT_CONFIGS, language_config

# transformers fills these in where a config has none, from the number of layers; the first two say what a layer is.
_DERIVED = ("layer_types", "no_rope_layers", "max_window_layers")


def saved_config(
    declared: Mapping[str, Any],
    config: Any,
    kept: list[int],
    dtype: torch.dtype | None,
    *,
    both_spellings: bool = False,
) -> dict[str, Any]:
    """The values of config.json for the model that keeps the layers `kept` (original numbers, in order).

    declared: the base's config.json; config: what transformers makes of it. Per-layer entries are those of the kept
    layers; in a multimodal model's config those of its text_config, or of the top level where its language model's keys
    are there. Where transformers would give fewer layers other layer types than the kept ones have, or a rotary
    embedding where they have none, these are written out.
    A dtype that is written down becomes `dtype`, that of the weights, since readers cast them to it; it stays where
    `dtype` is None: weights are of several, and the base's readers cast them to what the base says. auto_map is left
    out: the code that it names is not copied, and transformers has every supported family; so is _name_or_path, where
    the base was once loaded from. both_spellings: write transformers 4's keys beside those of transformers 5, for a
    base that has no config of its own.
    """
    inside = language_config(config)

    def read(values: Mapping[str, Any]) -> Any:
        return language_config(type(config).from_dict(copy.deepcopy(dict(values))))

    part = declared.get("text_config")
    if inside is config or (part is None and config.model_type in FLAT_CONFIGS):
        saved = _fewer(declared, inside, kept, read)
    else:
        own = _fewer(
            part or config.text_config.to_dict(), inside, kept, lambda own: read({**declared, "text_config": own})
        )
        saved = {**declared, "text_config": own}
        # transformers 4.52 to 4.57 wrote the same keys in both places, of which other programs read the top level.
        if config.model_type in FLAT_CONFIGS and declared.get("num_hidden_layers") == inside.num_hidden_layers:
            saved = trimmed_config(saved, kept)
    saved = _cleaned(saved, dtype)
    return _old_spelling(saved) | saved if both_spellings else saved


def _fewer(
    declared: Mapping[str, Any], config: Any, kept: list[int], read: Callable[[Mapping[str, Any]], Any]
) -> dict[str, Any]:
    """A language model's values with the layers `kept`. declared: those that are written down, of which transformers
    makes `config`; read: what it makes of other such values."""
    values = {**declared, "num_hidden_layers": config.num_hidden_layers}
    filled = {key: getattr(config, key, None) for key in _DERIVED if declared.get(key) is None}
    filled = {key: copy.copy(value) for key, value in filled.items() if value is not None}
    trimmed = trimmed_config(values | filled, kept)
    shorter = {key: values[key] if key in filled else value for key, value in trimmed.items() if key in values}
    # A pattern that the kept layers no longer follow was left out; others than transformers would assume the usual one.
    if filled and set(shorter) == set(values):
        found = read(shorter)
        if all(getattr(found, key, None) == trimmed.get(key) for key in _DERIVED[:2]):
            return shorter
    return trimmed


def _cleaned(values: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A config's values and those of configs inside it, with the dtype that is stored, without where they are from."""
    own = {key: value for key, value in values.items() if key not in ("auto_map", "_name_or_path")}
    stored = str(dtype).removeprefix("torch.")
    for key, value in own.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            own[key] = _cleaned(value, dtype)
        elif dtype is not None and key in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") != stored:
            own[key] = stored
    return own


def trimmed_config(values: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """A config's values for the model that keeps the layers `kept` (original numbers, in order).

    `num_hidden_layers` is set, and every per-layer list (one entry a layer or more, and "layer" in its key, such as
    `layer_types` or `no_rope_layers`) keeps the entries of the kept layers. `max_window_layers`, the number of leading
    layers with full attention, counts the kept ones of them, and a `sliding_window_pattern`, from which other programs
    read which layers are full, is left out where the kept layers do not follow it.
    """
    n_layers = values["num_hidden_layers"]
    trimmed = dict(values, num_hidden_layers=len(kept))
    for key, value in values.items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) >= n_layers:
            trimmed[key] = [value[index] for index in kept]
    if isinstance(leading := values.get("max_window_layers"), int):
        trimmed["max_window_layers"] = sum(index < leading for index in kept)
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        # Every so many-th layer, or a letter for each of so many (EXAONE 4), of which some readers overrule the last.
        if isinstance(pattern := values.get(key), int | str) and pattern:
            full = [kind == "full_attention" for kind in trimmed["layer_types"]]
            every = pattern if isinstance(pattern, str) else "L" * (pattern - 1) + "G"
            follows = full == [every[number % len(every)] == "G" for number in range(len(kept))]
            if not follows or (isinstance(pattern, str) and not full[-1]):
                del trimmed[key]
    return trimmed


def names_absent_code(auto_map: Any, folder: Path) -> bool:
    """Whether an auto_map (class -> "module.Class", or several) names a module that is no file of the folder.

    "OWNER/NAME--module.Class" is in a repository of the hub, wherever the folder is.
    """
    values = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    local = [name for name in names if isinstance(name, str) and "--" not in name]
    return any(not (folder / f"{name.rpartition('.')[0]}.py").is_file() for name in local)


def _old_spelling(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a config of transformers 5 says of rotary embedding, dtype and experts as transformers 4 spells it."""
    rotary = values.get("rope_parameters") or {}
    main = rotary.get("full_attention", rotary)  # Gemma 3 has one for each layer type
    old = {"rope_theta": main.get("rope_theta"), "partial_rotary_factor": main.get("partial_rotary_factor")}
    old |= {"torch_dtype": values.get("dtype"), "num_experts": values.get("num_local_experts")}
    if main.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in main.items() if key not in old}
    if "sliding_attention" in rotary:
        old["rope_local_base_freq"] = rotary["sliding_attention"].get("rope_theta")
    return {key: value for key, value in old.items() if value is not None}
