"""Transition Models (TiM, arXiv 2509.04394): image generators for any number of sampling steps.

model = tim.TiM(tim.TiMConfig(...))            the network, F(x_t, t, r, y)
tp = tim.transports.get("ot_fm")               how noise and data mix
loss = tim.TransitionLoss(transport=tp)        the objective, with the exact time derivative
images = tim.sample(model, y, noise, steps=4, transport=tp)
model = tim.load("run directory | file.safetensors | hub/name")
"""

from tim import ops, transports
from tim.models import TiM, TiMConfig, load
from tim.objective import TransitionLoss
from tim.sampler import sample

__version__ = "0.1.0"

__all__ = [
    "TiM",
    "TiMConfig",
    "TransitionLoss",
    "__version__",
    "load",
    "ops",
    "sample",
    "transports",
]
