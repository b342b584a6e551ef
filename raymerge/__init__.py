"""raymerge: merge decoder layers of large language models, search the coefficients, measure the cost."""

__version__ = "0.1.0"
