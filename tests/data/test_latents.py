import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_data import public_latents
from tim.config import DataConfig
from tim.data import build_dataset
from tim.data.latents import LatentFiles, LatentShards, open_latents
from tim.data.shards import Index, write_shard


def index(samples: int = 4, **changes) -> Index:
    values = {
        "source": "x", "samples": samples, "digest": "0", "shard_size": 2, "vae": "v", "factor": 8,
        "channels": 3, "image_size": 64, "sizes": [[2, 2]], "dtype": "float32",
        "posterior": "mean", "seed": 0, "classes": [], "captions": None, "features": None,
        "feature_patch": None,
    }  # fmt: skip
    return Index(**{**values, **changes})


def shards(folder, **changes):
    folder.mkdir()
    made = index(**changes)
    made.save(folder)
    for number in range(2):
        latents = torch.arange(2 * 2 * 12.0).reshape(2, 2, 3, 2, 2) + 100 * number
        labels = torch.tensor([number, 4])
        about = {"groups": {"2x2": {"names": ["a", "b"]}}, "skipped": {}}
        tensors = {"2x2.latents": latents, "2x2.labels": labels}
        write_shard(folder / f"{number:05d}.safetensors", tensors, about)
    return folder


def test_shards(tmp_path):
    data = open_latents(shards(tmp_path / "data", vae=str(tmp_path)), flip=0.0)
    assert isinstance(data, LatentShards)
    assert (len(data), data.shape, data.num_classes) == (4, (3, 2, 2), 5)
    batch = data.batch(np.array([3, 0, 2]), np.random.default_rng(0))
    assert batch.x[:, 0, 0, 0].tolist() == [124, 0, 100] and batch.y.tolist() == [4, 0, 1]
    with pytest.raises(ValueError, match=r"vae must be a folder or hub id|pip install"):
        data.decode(batch.x)


def test_rows_of_a_batch_are_those_of_the_whole(tmp_path):
    data = open_latents(shards(tmp_path / "data"), flip=0.5)
    indices = np.array([0, 1, 2, 3, 0, 1])
    whole = data.batch(indices, np.random.default_rng(3))
    for rows in (slice(2, 5), np.array([5, 0])):
        part = data.batch(indices, np.random.default_rng(3), rows)
        assert torch.equal(part.x, whole.x[rows]) and torch.equal(part.y, whole.y[rows])


def test_damaged_shards_are_named(tmp_path):
    folder = shards(tmp_path / "data")
    file = folder / "00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"00001.safetensors is damaged: "):
        LatentShards(folder)
    file.write_bytes(data)
    (folder / "encode.json").write_text("{}")
    with pytest.raises(ValueError, match=r"encode.json is damaged: KeyError"):
        LatentShards(folder)


def test_layout_of_the_public_code(tmp_path):
    path = public_latents(tmp_path / "data")
    data = build_dataset(DataConfig(kind="latents", path=str(path), flip=0.0))
    assert isinstance(data, LatentFiles)
    assert (len(data), data.shape, data.num_classes) == (6, (4, 8, 8), 2)
    batch = data.batch(np.array([4, 1]), np.random.default_rng(0))
    assert batch.y.tolist() == [1, 0] and batch.y.dtype == torch.int64
    first = load_file(path / data.files[4])["latent"]
    assert torch.equal(batch.x[0], first[0])
    mirrored = LatentFiles(path, flip=1.0).batch(np.array([4]), np.random.default_rng(0))
    assert torch.equal(mirrored.x[0], first[1])


def test_public_files_that_cannot_be_read(tmp_path):
    path = public_latents(tmp_path / "data")
    files = sorted(path.rglob("*.safetensors"))
    files[1].write_bytes(b"junk")
    save_file({"latent": torch.zeros(2, 4, 8, 9), "label": torch.tensor(0.0)}, files[2])
    data = LatentFiles(path, flip=0.0)
    batch = data.batch(np.array([0, 1, 2]), np.random.default_rng(0))
    assert batch.y.tolist() == [0, 1, 1]
    assert torch.equal(batch.x[1], batch.x[2])
    reasons = list(data.skipped.values())
    assert len(reasons) == 2
    assert "latent must have shape [2, 4, 8, 8], got [2, 4, 8, 9]" in reasons[1]
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 6 files in .* can be read; n0000"):
        LatentFiles(path)


def test_public_files_without_folders(tmp_path):
    for i, label in enumerate((3, 0)):
        state = {"latent": torch.ones(2, 4, 8, 8), "label": torch.tensor(float(label))}
        save_file(state, tmp_path / f"{i}.safetensors")
    assert LatentFiles(tmp_path).num_classes == 4


def test_folders_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.path: .*absent is not a folder"):
        open_latents(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"must hold shards of tim encode .* or folders of"):
        open_latents(tmp_path)
    with pytest.raises(ValueError, match=r"data.kind latents has no test split"):
        build_dataset(DataConfig(kind="latents", path=str(tmp_path)), "test")
