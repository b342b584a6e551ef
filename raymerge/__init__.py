"""raymerge: merge decoder layers of large language models, search the coefficients, measure the cost.

What a notebook needs stands here and is loaded when it is first used, so that `import raymerge` costs nothing:
`load_config` and the functions of `experiments`, which take its Config and return a RunDirectory; `CandidateScorer`,
which scores coefficients in this process; `merge`, which saves a merged checkpoint; `write_report`, which makes the
page of a run.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `_HOMES` names, which a type checker cannot read
    from raymerge import experiments
    from raymerge.candidates import CandidateScorer
    from raymerge.config import Config
    from raymerge.config_file import load_config
    from raymerge.errors import UserError
    from raymerge.merging import merge
    from raymerge.report import write_report
    from raymerge.tables import RunDirectory

__version__ = "0.1.0"

__all__ = [
    "CandidateScorer",
    "Config",
    "RunDirectory",
    "UserError",
    "__version__",
    "experiments",
    "load_config",
    "merge",
    "write_report",
]

_HOMES = {
    "CandidateScorer": "raymerge.candidates",
    "Config": "raymerge.config",
    "RunDirectory": "raymerge.tables",
    "UserError": "raymerge.errors",
    "load_config": "raymerge.config_file",
    "merge": "raymerge.merging",
    "write_report": "raymerge.report",
}


if not TYPE_CHECKING:  # to which any name would then be one of this package

    def __getattr__(name: str) -> Any:
        """Load a public name where it is first asked for (PEP 562)."""
        if name == "experiments":  # search and similarity are modules' names too, so they keep their namespace
            return importlib.import_module("raymerge.experiments")
        if name not in _HOMES:
            raise AttributeError(f"module 'raymerge' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
