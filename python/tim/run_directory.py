"""Whether a run may use its directory: new, or resumed with nothing changed that matters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from tim.config import RunConfig, differences
from tim.data import Dataset
from tim.data.latents import LatentShards
from tim.run_lock import NAME

CONFIG = "config.yaml"
#: What a resumed run may change: it does not enter the arithmetic of the steps already taken.
CHANGEABLE = (
    "train.steps", "train.checkpoint_every", "train.keep", "train.log_every", "train.sample_every",
    "train.tensorboard", "train.max_bad_steps", "train.device", "train.gradient_checkpointing",
    "train.cuda_graph", "sample.", "parallel.", "data.path", "data.workers", "data.processes",
    "data.cache_gb",
    "data.vae",
)  # fmt: skip


def check_directory(run: Path, resume: bool) -> None:
    """FileExistsError when `run` holds a run that is not to be resumed, or something else."""
    if (run / CONFIG).exists():
        if not resume:
            raise FileExistsError(f"{run} holds a run: resume it, or take another directory")
    elif run.exists() and any(path.name != NAME for path in run.iterdir()):
        raise FileExistsError(f"{run} is not empty and holds no run: take another")


def check_resumable(saved: RunConfig, config: RunConfig) -> None:
    """ValueError naming the first field in which `config` cannot continue the run of `saved`."""
    for name, old, new in differences(saved, config):
        if not name.startswith(CHANGEABLE):
            raise ValueError(f"a resumed run cannot change {name}: it is {old}, got {new}")


def fit_to_data(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration with room for the data set's classes and an absolute path to it.

    Raises ValueError when the shapes of data and model differ.
    """
    model, data = config.model, config.data
    expected = (model.in_channels, model.input_size, model.input_size)
    if dataset.packed and config.train.cuda_graph:
        raise ValueError("train.cuda_graph needs batches of one size, got data.pack")
    if len(dataset.sizes) > 1:
        _check_sizes(config, dataset)
    elif dataset.shape != expected:
        raise ValueError(
            "the data must have shape [C, H, W] = [model.in_channels, model.input_size, "
            f"model.input_size] = {list(expected)}, got {list(dataset.shape)}"
        )
    if data.path is not None:
        data = dataclasses.replace(data, path=str(Path(data.path).absolute()))
    if isinstance(dataset, LatentShards) and data.vae is None:
        data = dataclasses.replace(data, vae=dataset.index.vae)
    if model.num_classes is not None:
        classes = max(model.num_classes, dataset.num_classes)
        model = dataclasses.replace(model, num_classes=classes)
    return dataclasses.replace(config, model=model, data=data)


def _check_sizes(config: RunConfig, dataset: Dataset) -> None:
    """ValueError when the model cannot take the sizes of the data set."""
    patch = config.model.patch_size
    if config.train.cuda_graph:
        raise ValueError("train.cuda_graph needs data of one size, got several sizes")
    for height, width in dataset.sizes:
        if height % patch or width % patch:
            raise ValueError(
                f"the data must have heights and widths that are multiples of model.patch_size "
                f"{patch}, got {height} x {width}: give --patch-size {patch} to tim encode"
            )
    channels = dataset.batch(np.zeros(1, int), np.random.default_rng(0)).x[0].shape[0]
    if channels != config.model.in_channels:
        raise ValueError(
            f"the data must have model.in_channels = {config.model.in_channels} channels, "
            f"got {channels}"
        )
