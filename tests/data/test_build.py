"""What a configuration makes of data in shards."""

import pytest

from latent_data import tar_file
from tim.config import DataConfig
from tim.data import WindowOrder, build_dataset, make_order


def test_windows_over_tars(tmp_path):
    for number, count in enumerate((3, 0, 5, 2)):
        tar_file(tmp_path / f"{number}.tar", 10 * number, count)
    config = DataConfig(kind="folder", path=str(tmp_path), image_size=8, window=2)
    dataset = build_dataset(config)
    order = make_order(dataset, 2, 0, config.window)
    assert isinstance(order, WindowOrder) and order.sizes.tolist() == [3, 5, 2]


def test_what_windows_and_processes_are_not_for(tmp_path):
    with pytest.raises(ValueError, match=r"data.window must be None for data.kind digits, got 2"):
        DataConfig(window=2)
    with pytest.raises(ValueError, match=r"data.window must be at least 1, got 0"):
        DataConfig(kind="latents", window=0)
    with pytest.raises(ValueError, match=r"data.processes must be 0 for data.kind latents"):
        DataConfig(kind="latents", processes=2)
    tar_file(tmp_path / "a.tar")
    dataset = build_dataset(DataConfig(kind="folder", path=str(tmp_path), image_size=8))
    dataset.shards = None
    with pytest.raises(ValueError, match=r"data.window is for .tar files and the shards of"):
        make_order(dataset, 2, 0, 2)
    dataset.shards, dataset.sizes = [3], [(8, 8), (4, 16)]
    with pytest.raises(ValueError, match=r"data.window must be None for latents of several sizes"):
        make_order(dataset, 2, 0, 2)
