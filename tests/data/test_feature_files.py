"""Features computed beforehand, a file for each image, read by the trainer."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latent_data import image_folder, public_latents, tar_file
from tim import presets
from tim.config import DataConfig, TrainConfig
from tim.data import build_dataset
from tim.data.feature_files import FeatureFiles
from tim.models import TiMConfig
from tim.trainer import Trainer


def write(folder, names, sides=2, tokens=4):
    """[sides, tokens, 3] for each name, all different; returns them by name."""
    made = {}
    for i, name in enumerate(names):
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        made[name] = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(i))
        save_file({"features": (made[name] if sides == 2 else made[name][0]).half()}, file)
    return made


@pytest.fixture
def images(tmp_path):
    folder = image_folder(tmp_path / "images")
    (folder / "dogs" / "broken.png").unlink()
    return folder


NAMES = ["cats/1", "cats/2", "dogs/1"]


def test_of_a_folder_of_images(images, tmp_path):
    made = write(tmp_path / "features", NAMES)
    data = {"kind": "folder", "path": str(images), "image_size": 8}
    plain = build_dataset(DataConfig(**data, flip=0.5))
    config = DataConfig(**data, flip=0.5, feature_files=str(tmp_path / "features"))
    dataset = build_dataset(config)
    assert dataset.has_features and (dataset.num_classes, len(dataset)) == (2, 3)
    chosen = np.arange(12) % 3
    batch = dataset.batch(chosen, np.random.default_rng(0))
    expected = plain.batch(chosen, np.random.default_rng(0))
    assert torch.equal(batch.x, expected.x) and torch.equal(batch.y, expected.y)
    unflipped = build_dataset(DataConfig(**data)).batch(chosen, np.random.default_rng(0)).x
    mirrored = [not torch.equal(a, b) for a, b in zip(batch.x, unflipped, strict=True)]
    assert 0 < sum(mirrored) < 12
    for i, side in enumerate(mirrored):
        assert torch.equal(batch.features[i], made[NAMES[chosen[i]]][int(side)].half().float())
    part = dataset.batch(chosen, np.random.default_rng(0), np.array([7, 2]))
    assert torch.equal(part.features, batch.features[[7, 2]])


def test_of_latents_in_the_public_layout(tmp_path):
    path = public_latents(tmp_path / "data", shape=(4, 4, 4))
    plain = build_dataset(DataConfig(kind="latents", path=str(path), flip=1.0))
    made = write(tmp_path / "features", [name.removesuffix(".safetensors") for name in plain.files])
    config = DataConfig(
        kind="latents", path=str(path), flip=1.0, feature_files=str(tmp_path / "features")
    )
    batch = build_dataset(config).batch(np.array([5, 0]), np.random.default_rng(0))
    expected = plain.batch(np.array([5, 0]), np.random.default_rng(0))
    assert torch.equal(batch.x, expected.x) and torch.equal(batch.y, expected.y)
    values = list(made.values())
    assert torch.equal(batch.features, torch.stack([values[5][1], values[0][1]]).half().float())


def test_of_tar_files(tmp_path):
    tar_file(tmp_path / "0.tar", 0, 2)
    made = write(tmp_path / "features", ["0.tar/0000", "0.tar/0001"], sides=1)
    config = DataConfig(
        kind="folder", path=str(tmp_path / "0.tar"), image_size=8,
        feature_files=str(tmp_path / "features"),
    )  # fmt: skip
    batch = build_dataset(config).batch(np.array([1]), np.random.default_rng(0))
    assert torch.equal(batch.features[0], made["0.tar/0001"][0].half().float())


def test_the_trainer_takes_them(images, tmp_path):
    write(tmp_path / "features", NAMES)
    model = TiMConfig(
        input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2,
        encoder_depth=1, num_classes=2, z_dim=3, projector_dim=8,
    )  # fmt: skip
    config = presets.get(
        "images-64",
        model=model,
        data=DataConfig(
            kind="folder", path=str(images), image_size=8, flip=0.5,
            feature_files=str(tmp_path / "features"),
        ),
        train=TrainConfig(steps=2, batch_size=4, sample_every=0, tensorboard=False, device="cpu"),
    )  # fmt: skip
    trainer = Trainer(config, tmp_path / "run")
    batch = trainer.dataset.batch(np.array([0, 1, 2, 0]), np.random.default_rng(0))
    projection = trainer.train_step(batch)[2]
    assert 0 < projection < 2
    assert torch.equal(trainer.training_step.inputs[0].features, batch.features)
    wide = dataclasses.replace(config, model=dataclasses.replace(model, z_dim=5))
    with pytest.raises(ValueError, match=r"features must have shape .* = \[4, 5\] .* got \[4, 3\]"):
        Trainer(wide, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_images_without_good_features_are_skipped_and_told(images, tmp_path):
    folder = tmp_path / "features"
    write(folder, NAMES)
    (folder / "cats" / "2.safetensors").write_bytes(b"cut")
    write(folder, ["dogs/1"], tokens=9)
    data = build_dataset(
        DataConfig(kind="folder", path=str(images), image_size=8, feature_files=str(folder))
    )
    batch = data.batch(np.array([0, 1, 2]), np.random.default_rng(0))
    assert torch.equal(batch.features[1], batch.features[0])
    assert list(data.skipped) == ["cats/2.png", "dogs/1.png"]
    assert "features must have shape [2, 4, 3], got [2, 9, 3]" in data.skipped["dogs/1.png"]
    write(folder, NAMES, sides=1)
    with pytest.raises(ValueError, match=r"shape \[2, N, K\], or \[N, K\] with data\.flip 0, got"):
        build_dataset(
            DataConfig(
                kind="folder", path=str(images), image_size=8, flip=0.5, feature_files=str(folder)
            )
        )


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.feature_files: .*none is not a folder"):
        FeatureFiles(tmp_path / "none")
    with pytest.raises(ValueError, match=r"give one of data\.features and data"):
        DataConfig(kind="folder", features="a:b", feature_files="f")
    with pytest.raises(ValueError, match=r"needs data\.kind folder or latents, got d"):
        DataConfig(feature_files="f")
    (tmp_path / "encode.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.feature_files must be None for shards of tim enc"):
        build_dataset(DataConfig(kind="latents", path=str(tmp_path), feature_files=str(tmp_path)))
