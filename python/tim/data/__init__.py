"""Training data: the embedded digits, folders of images, array files.

Every data set is a `Dataset`; which images a step sees is `BatchOrder`'s business alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tim.data.dataset import ArrayDataset, Batch, Dataset, to_float, to_uint8
from tim.data.order import BatchOrder, WindowOrder, make_order
from tim.data.reading import DataWorkerDied, batches
from tim.data.token_order import TokenOrder

if TYPE_CHECKING:
    from tim.config import DataConfig, RunConfig
    from tim.data.bucket_order import BucketOrder

__all__ = [
    "ArrayDataset",
    "Batch",
    "BatchOrder",
    "DataWorkerDied",
    "Dataset",
    "WindowOrder",
    "batches",
    "build_dataset",
    "build_order",
    "make_order",
    "to_float",
    "to_uint8",
]


def build_dataset(config: DataConfig, split: str = "train") -> Dataset:
    """The data set of a configuration; `split` is "train" or "test" (digits and arrays only).

    Raises ValueError for a missing `data.path` or a split that is not there, FileNotFoundError for
    a path that does not exist.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    if config.kind == "digits":
        from tim.data.digits import digits

        return digits(split, config.flip)
    if config.path is None:
        raise ValueError(
            f"data.path is missing: where are the images? (data.kind is {config.kind})"
        )
    if config.kind == "arrays":
        from tim.data.arrays import arrays

        return arrays(config.path, split, config.flip)
    if split == "test":
        raise ValueError(f"{config.path}: data.kind {config.kind} has no test split")
    features = None
    if config.feature_files is not None:
        from tim.data.feature_files import FeatureFiles

        features = FeatureFiles(config.feature_files, config.flip)
    if config.kind == "latents":
        from tim.data.latents import open_latents

        return open_latents(config.path, config.flip, config.pack, features)
    if (
        config.captions
        or features
        or any(Path(config.path).glob("*.tar"))
        or config.path.endswith(".tar")
    ):
        from tim.data.images import ImageDataset

        return ImageDataset(
            config.path,
            config.image_size,
            config.channels,
            config.flip,
            config.workers,
            config.captions,
            features,
        )
    from tim.data.folder import GIGABYTE, FolderDataset

    return FolderDataset(
        config.path,
        config.image_size,
        config.channels,
        config.flip,
        config.workers,
        # Worker processes would not share it.
        0 if config.processes else round(config.cache_gb * GIGABYTE),
    )


def build_order(config: RunConfig, dataset: Dataset) -> BatchOrder | BucketOrder | TokenOrder:
    """Which images each step of a run uses; raises ValueError as the orders do."""
    data, train = config.data, config.train
    if data.token_budget is None:
        return make_order(dataset, train.batch_size, train.seed, data.window)
    sizes = dataset.sizes or [dataset.shape[1:]]
    return TokenOrder(
        np.zeros(len(dataset), np.int64) if dataset.size_of is None else dataset.size_of,
        [height * width // config.model.patch_size**2 for height, width in sizes],
        data.token_budget,
        train.batch_size,
        train.seed,
        data.budget_multiple,
        train.accumulate,
    )
