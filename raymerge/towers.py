"""A language model inside a multimodal checkpoint: the names that it has there, and what lies beside it.

The language model is merged like any other; the towers for images and what joins them to it (the projector) are carried
over as they are stored. No weight of theirs is ever run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from raymerge.architectures import Architecture
from raymerge.skeleton import skeleton_of


def _spelling(root: str, unembedding: str) -> dict[str, Any]:
    return {
        "layer_prefix": f"{root}layers.{{}}.",
        "embedding": f"{root}embed_tokens.weight",
        "final_norm": f"{root}norm.weight",
        "unembedding": unembedding,
    }


_SPELLINGS: tuple[dict[str, Any], ...] = (
    # As most files are published (transformers 4, and what transformers 5 writes), and as transformers 5 names modules.
    _spelling("language_model.model.", "language_model.lm_head.weight"),
    _spelling("model.language_model.", "lm_head.weight"),
    # Idefics 3 and SmolVLM, in files and modules.
    _spelling("model.text_model.", "lm_head.weight"),
    # Qwen2-VL and Qwen2.5-VL, as published.
    _spelling("model.", "lm_head.weight"),
)


def names_inside(architecture: Architecture, stored: Collection[str]) -> Architecture:
    """A language model's Architecture with the full names that a multimodal checkpoint of these tensors has.

    transformers puts an unembedding of its own behind the language model of every multimodal family here; the config's
    softcap of logits is not read.
    """
    names = next((names for names in _SPELLINGS if names["embedding"] in stored), _SPELLINGS[0])
    return replace(architecture, **names, logit_softcap=None)


@dataclass(frozen=True)
class Whole:
    """What transformers' whole model makes of a multimodal checkpoint's tensors, named as transformers names them.

    missing: those that it would make up. misshapen: (name, stored shape, expected shape). unknown: those that it has no
    place for.
    """

    missing: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unknown: tuple[str, ...]


def whole_model(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Whole:
    """Have transformers load tensors of these names and shapes, of which none takes memory, into the whole model."""
    from transformers import AutoModelForImageTextToText

    kind = type(skeleton_of(AutoModelForImageTextToText, config))
    nothing = torch.zeros((), dtype=torch.float16)
    with _quiet():
        _, report = kind.from_pretrained(
            None,
            config=config,
            state_dict={name: nothing.expand(shape) for name, shape in shapes.items()},
            dtype=torch.float16,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    misshapen = sorted((name, tuple(stored), tuple(own)) for name, stored, own in report["mismatched_keys"])
    return Whole(tuple(sorted(report["missing_keys"])), tuple(misshapen), tuple(sorted(report["unexpected_keys"])))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what it loads, and its progress bar."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
