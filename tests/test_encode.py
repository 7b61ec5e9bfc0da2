import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tim.cli import run
from tim.data.arrays import arrays


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cats/1.png", "cats/2.png", "dogs/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "dogs" / "broken.png").write_bytes(b"not a picture")
    return tmp_path / "images"


def test_folder_to_latents_the_trainer_reads(autoencoder, images, tmp_path, capsys):
    out = tmp_path / "latents"
    flags = ["--vae", str(autoencoder), "--out", str(out), "--image-size", "16"]
    assert run(["encode", str(images), *flags]) == 0
    assert "skipped dogs/broken.png" in capsys.readouterr().out
    dataset = arrays(out / "latents.npz")
    assert dataset.shape == (4, 8, 8) and dataset.labels.tolist() == [0, 0, 1]
    about = json.loads((out / "latents.json").read_text())
    assert about["classes"] == ["cats", "dogs"] and list(about["skipped"]) == ["dogs/broken.png"]

    import diffusers

    from tim.data.folder import FolderDataset

    vae = diffusers.AutoencoderKL.from_pretrained(autoencoder)
    picture = FolderDataset(images, 16).batch(np.array([1]), np.random.default_rng(0)).x
    with torch.no_grad():
        expected = vae.encode(picture).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(dataset.images[1:2], expected)


def test_missing_extra_is_named(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    out = tmp_path / "latents"
    assert run(["encode", str(images), "--vae", "x", "--out", str(out)]) == 2
    assert "pip install 'transition-models[t2i]'" in capsys.readouterr().err
    assert not out.exists()


def test_no_such_autoencoder(images, tmp_path, capsys):
    pytest.importorskip("diffusers")
    out = tmp_path / "latents"
    assert run(["encode", str(images), "--vae", str(tmp_path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tim encode: vae must be a folder or hub id") and error.count("\n") == 1
    assert not out.exists()


def test_a_file_where_the_folder_should_be(images, tmp_path, capsys):
    out = tmp_path / "latents"
    out.write_text("mine")
    assert run(["encode", str(images), "--vae", "x", "--out", str(out)]) == 2
    assert f"out must be a folder, got the file {out}" in capsys.readouterr().err
    assert out.read_text() == "mine"
