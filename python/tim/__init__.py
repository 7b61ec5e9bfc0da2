"""Transition Models (TiM, arXiv 2509.04394): training, sampling and the operations underneath."""

from tim import ops

__version__ = "0.1.0"

__all__ = ["__version__", "ops"]
