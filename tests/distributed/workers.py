"""What the ranks of the tests do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tim.config import RunConfig
from tim.data import ArrayDataset, Batch
from tim.trainer import Trainer


def train(config: RunConfig, run: Path, resume: bool = False) -> dict:
    """Train to the end; returns the steps' values and the weights as they are in one process."""
    trainer = Trainer(config, run, resume=resume)
    values = []
    step = trainer.train_step

    def noted(batch) -> Tensor:
        values.append(step(batch))
        return values[-1]

    trainer.train_step = noted
    first = trainer.step
    trainer.train()
    return {"first": first, "values": torch.stack(values), "weights": gathered(trainer)}


def train_all(configs: dict[str, RunConfig], folder: Path) -> dict[str, dict]:
    """Several runs one after the other."""
    return {name: train(config, folder / name) for name, config in configs.items()}


def gathered(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and moments, each whole."""
    kinds = {"model": trainer.model.state_dict(), "ema": trainer.ema.model.state_dict()}
    for name, state in trainer._training.optimizer_state().items():
        kinds[f"optimizer.{name}"] = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
    return {
        f"{kind}.{name}": (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for kind, values in kinds.items()
        for name, value in values.items()
    }


def train_noting_images(config: RunConfig, run: Path) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Go on with a run on numbered images; which images each step saw here, and the weights."""
    dataset = NumberedImages()
    trainer = Trainer(config, run, resume=True, dataset=dataset)
    dataset.seen.clear()  # the trainer has had a look
    trainer.train()
    return dataset.seen, gathered(trainer)


class NumberedImages(ArrayDataset):
    """Noise of as many classes as images: 60, which is no multiple of a batch."""

    def __init__(self) -> None:
        images = np.random.default_rng(0).standard_normal((60, 1, 8, 8)).astype(np.float32)
        super().__init__(images, np.arange(60), num_classes=60, flip=0.5)
        self.seen: list[list[int]] = []

    def batch(self, *arguments) -> Batch:
        batch = super().batch(*arguments)
        self.seen.append(batch.y.tolist())
        return batch
