"""The TiM network, its configuration, and loading of trained ones."""

from tim.models.config import TiMConfig
from tim.models.loading import load, load_weights
from tim.models.sizes import ARCHITECTURES
from tim.models.tim import TiM

__all__ = ["ARCHITECTURES", "TiM", "TiMConfig", "load", "load_weights"]
