"""Runs small enough for a test, and what to compare of them."""

import torch

from tim import presets
from tim.config import ObjectiveConfig, RunConfig, SampleConfig, TrainConfig
from tim.models import TiMConfig
from tim.trainer import Trainer

MODEL = TiMConfig(
    input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, encoder_depth=1,
    num_classes=10, projector_dim=8,
)  # fmt: skip


def config(objective: ObjectiveConfig | None = None, **train) -> RunConfig:
    values = {
        "steps": 4, "batch_size": 8, "lr": 1e-2, "log_every": 1, "sample_every": 0,
        "checkpoint_every": 100, "tensorboard": False, "device": "cpu",
    }  # fmt: skip
    return presets.get(
        "digits",
        model=MODEL,
        objective=objective or ObjectiveConfig(),
        train=TrainConfig(**{**values, **train}),
        sample=SampleConfig(steps=(1, 2), columns=3),
    )


def weights(trainer: Trainer) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    moments = [value for key in state for _, value in sorted(state[key].items())]
    models = [*trainer.model.parameters(), *trainer.ema.model.parameters()]
    return [tensor.detach().clone() for tensor in [*models, *moments]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))
