"""The experiments as plain functions, each writing one run directory."""

from raymerge.experiments.alpha_search import search
from raymerge.experiments.compression_sweep import sweep
from raymerge.experiments.layer_similarity import import_similarity, sensitivity, similarity
from raymerge.experiments.model_evaluation import evaluate

__all__ = ["evaluate", "import_similarity", "search", "sensitivity", "similarity", "sweep"]
