"""Conversions between pixels and model input, and the choice of a data set."""

import numpy as np
import pytest
import torch

from tim.config import DataConfig
from tim.data import ArrayDataset, build_dataset, to_float, to_uint8


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = to_float(pixels)
    assert x.min() == -1 and x.max() == 1
    assert to_uint8(x).equal(pixels.permute(0, 2, 3, 1))


def test_pictures_are_clipped_and_channels_last() -> None:
    x = torch.tensor([-7.0, 0.0, 7.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    pictures = to_uint8(x)
    assert pictures.shape == (2, 4, 5, 3) and pictures.dtype == torch.uint8
    assert pictures[0, 0, 0].tolist() == [0, 128, 255]


def test_latents_are_no_pictures() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \[B, 1 or 3, H, W\].* got \[2, 4, 8"):
        to_uint8(torch.zeros(2, 4, 8, 8))


def test_flips_mirror_whole_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 5, 6), dtype=np.uint8)
    dataset = ArrayDataset(images, np.zeros(64), num_classes=1, flip=0.5)
    x = dataset.batch(np.arange(64), np.random.default_rng(1)).x
    plain = to_float(torch.from_numpy(images))
    same = (x == plain).flatten(1).all(1)
    mirrored = (x == plain.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 16 < same.sum() < 48


def test_build_dataset_names_what_is_wrong(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"data.path is missing"):
        build_dataset(DataConfig(kind="folder"))
    with pytest.raises(ValueError, match='split must be "train" or "test"'):
        build_dataset(DataConfig(), "valid")
    with pytest.raises(ValueError, match="no test split"):
        build_dataset(DataConfig(kind="folder", path=str(tmp_path)), "test")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build_dataset(DataConfig(kind="arrays", path=str(tmp_path / "absent.npz")))
