"""Transition Models (TiM, arXiv 2509.04394): image generators for any number of sampling steps.

model = tim.TiM(tim.TiMConfig(...))            the network, F(x_t, t, r, y)
tp = tim.transports.get("ot_fm")               how noise and data mix
loss = tim.TransitionLoss(transport=tp)        the objective, with the exact time derivative
images = tim.sample(model, y, noise, steps=4, transport=tp)
model = tim.load("run directory | file.safetensors | hub/name")
sampler = tim.Sampler(model, tp)                requests of mixed conditions, seeds, sizes and steps
pipe = tim.TiMPipeline.from_weights("hub/name")      prompts or labels to pictures, with diffusers
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tim import ops, transports
    from tim.models import TiM, TiMConfig, load
    from tim.objective import TransitionLoss
    from tim.pipeline import TiMPipeline
    from tim.sampler import sample
    from tim.service import Request, Sampler

__version__ = "0.1.0"

__all__ = [
    "Request",
    "Sampler",
    "TiM",
    "TiMConfig",
    "TiMPipeline",
    "TransitionLoss",
    "__version__",
    "load",
    "ops",
    "sample",
    "transports",
]

_MODULES = {
    "Request": "tim.service",
    "Sampler": "tim.service",
    "TiM": "tim.models",
    "TiMConfig": "tim.models",
    "TiMPipeline": "tim.pipeline",
    "TransitionLoss": "tim.objective",
    "load": "tim.models",
    "sample": "tim.sampler",
}


def __getattr__(name: str) -> Any:
    # On first use (PEP 562), so that `tim --help` does not wait for torch.
    if name in ("ops", "transports"):
        return import_module(f"tim.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'tim' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
