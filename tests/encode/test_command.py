import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from latent_data import SIZES, image_folder, tar_file
from small_encoders import autoencoder_kl, saved
from tim.autoencoder import encode
from tim.cli import run
from tim.data.dataset import to_float
from tim.data.folder import load_image
from tim.data.latents import LatentShards
from tim.data.shards import read_about
from tim.encode.job import Job


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vae"), autoencoder_kl())


@pytest.fixture
def images(tmp_path):
    return image_folder(tmp_path / "images", captions=True)


def encoded(images, vae, out, *flags) -> int:
    required = ["--vae", str(vae), "--out", str(out), "--image-size", "16"]
    return run(["encode", str(images), *required, *map(str, flags)])


def expected(vae_folder, file, size=16) -> torch.Tensor:
    """Both latents of one image."""
    x = to_float(torch.from_numpy(load_image(file, size)[None]))
    model = autoencoder_kl()
    return torch.stack([encode(model, x)[0], encode(model, x.flip(-1))[0]])


def test_folder_to_shards(images, vae, tmp_path, capsys):
    out = tmp_path / "latents"
    assert encoded(images, vae, out, "--dtype", "float32", "--shard-size", 3) == 0
    told = capsys.readouterr()
    assert "skipped dogs/broken.png: UnidentifiedImageError" in told.out
    assert "3 images encoded, 1 skipped; latents of 4 channels, 8x8" in told.out
    assert [line.split()[:2] for line in told.err.splitlines() if line.startswith("shard")] == [
        ["shard", "1/2"], ["shard", "2/2"],
    ]  # fmt: skip
    assert "images/s" in told.err
    assert sorted(p.name for p in out.iterdir()) == [
        "00000.safetensors", "00001.safetensors", "encode.json", "skipped.txt",
    ]  # fmt: skip
    assert (out / "skipped.txt").read_text().startswith("dogs/broken.png: Unidentified")
    data = LatentShards(out, flip=0.0)
    assert len(data) == 3 and data.shape == (4, 8, 8) and data.num_classes == 2
    assert data.index.classes == ["cats", "dogs"] and not data.captioned
    rng = np.random.default_rng(0)
    batch = data.batch(np.arange(3), rng)
    mirrored = LatentShards(out, flip=1.0).batch(np.arange(3), rng)
    assert batch.y.tolist() == [0, 0, 1] and batch.features is None
    for i, name in enumerate(SIZES):
        plain, mirror = expected(vae, images / name)
        torch.testing.assert_close(batch.x[i], plain)
        torch.testing.assert_close(mirrored.x[i], mirror)
    half = LatentShards(out, flip=0.5).batch(np.zeros(64, int), np.random.default_rng(1))
    assert {tuple(x.flatten()[:2].tolist()) for x in half.x} == {
        tuple(x.x[0].flatten()[:2].tolist()) for x in (batch, mirrored)
    }


def test_captions_beside_the_images(images, vae, tmp_path):
    (images / "cats" / "2.txt").unlink()
    assert encoded(images, vae, tmp_path / "out", "--captions", "txt") == 0
    data = LatentShards(tmp_path / "out")
    assert data.captioned and data.num_classes == 0
    batch = data.batch(np.arange(2), np.random.default_rng(0))
    assert batch.y == ["a cat", "a dog"] and batch.x.dtype == torch.float32
    skipped = read_about(tmp_path / "out" / "00000.safetensors")["skipped"]
    assert list(skipped) == ["cats/2.png", "dogs/broken.png"]
    assert skipped["cats/2.png"].startswith("FileNotFoundError")


def test_captions_in_a_list(images, vae, tmp_path):
    records = [
        {"file_name": "cats/1.png", "caption": "one"},
        {"image_file": "dogs/1.png", "captions": ["two", "three"]},
        {"file_name": "absent.png", "text": "none"},
    ]
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert encoded(images, vae, tmp_path / "out", "--captions", listing) == 0
    data = LatentShards(tmp_path / "out")
    seen = {tuple(data.batch(np.arange(2), np.random.default_rng(i)).y) for i in range(20)}
    assert seen == {("one", "two"), ("one", "three")}
    assert (tmp_path / "out" / "skipped.txt").read_text().startswith("absent.png: FileNotFound")


def test_webdataset(vae, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    tar_file(tars / "0.tar", 0, 3)
    tar_file(tars / "1.tar", 3, 2)
    assert encoded(tars, vae, tmp_path / "labels", "--shard-size", 2) == 0
    data = LatentShards(tmp_path / "labels")
    assert data.batch(np.arange(5), np.random.default_rng(0)).y.tolist() == [0, 1, 0, 1, 0]
    assert data.num_classes == 2
    assert encoded(tars / "1.tar", vae, tmp_path / "texts", "--captions", "txt") == 0
    texts = LatentShards(tmp_path / "texts").batch(np.arange(2), np.random.default_rng(0)).y
    assert all(text in (f"picture {i}", f"number {i}") for i, text in enumerate(texts, start=3))


class Means(nn.Module):
    patch_size = 2

    def forward(self, x):
        return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def test_features_and_sizes(images, vae, tmp_path):
    flags = ["--max-aspect", 2, "--patch-size", 2, "--features", f"{__name__}:Means"]
    assert encoded(images, vae, tmp_path / "out", *flags) == 0
    data = LatentShards(tmp_path / "out", flip=0.0)
    assert sorted(data.sizes) == [(8, 8), (10, 6)]  # of pictures of 20x24 and 16x16, and of 30x18
    with pytest.raises(ValueError, match="holds latents of several sizes: "):
        _ = data.shape
    index = int(np.flatnonzero([data.sizes[s] == (10, 6) for s in data.size_of])[0])
    batch = data.batch(np.array([index]), np.random.default_rng(0))
    assert batch.x.shape == (1, 4, 10, 6) and batch.features.shape == (1, 15, 12)
    picture = load_image(images / "dogs" / "1.png", (20, 12))
    pixels = nn.functional.interpolate(
        torch.from_numpy(picture[None]).float() / 255, (10, 6), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(
        batch.features,
        Means()(pixels),
        rtol=0,
        atol=2e-3,  # float16 on disk
    )
    mirrored = LatentShards(tmp_path / "out", flip=1.0).batch(
        np.array([index]), np.random.default_rng(0)
    )
    torch.testing.assert_close(mirrored.features, Means()(pixels.flip(-1)), rtol=0, atol=2e-3)


def test_goes_on_after_a_kill(images, vae, tmp_path, monkeypatch):
    """The shards are the same bytes as those of a command that was not killed."""
    flags = ["--shard-size", 1, "--posterior", "sample", "--batch-size", 1]
    assert encoded(images, vae, tmp_path / "whole", *flags) == 0
    out, written = tmp_path / "out", []
    original = Job._shard

    def killed(self, number, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return original(self, number, *rest)

    monkeypatch.setattr(Job, "_shard", killed)
    assert encoded(images, vae, out, *flags) == 130
    assert written == [0, 1] and not (out / "skipped.txt").exists()
    with pytest.raises(ValueError, match=r"00002.safetensors is missing: .* is not whole"):
        LatentShards(out)
    (out / "00002.safetensors.tmp-1").write_bytes(b"half")
    before = (out / "00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(Job, "_shard", original)
    assert encoded(images, vae, out, *flags) == 0
    assert (out / "00000.safetensors").stat().st_mtime_ns == before
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        if name.endswith("safetensors"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_survives_a_real_kill(vae, tmp_path):
    """SIGKILL at any moment leaves whole shards and, at most, a temporary file."""
    tar_file(tmp_path / "many.tar", 0, 40)
    out = tmp_path / "out"
    flags = ["--vae", str(vae), "--out", str(out), "--image-size", "16", "--shard-size", "1"]
    script = "import sys; from tim.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "encode", str(tmp_path / "many.tar"), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("shard 3/40"):
            process.kill()
            break
    process.communicate()
    done = sorted(out.glob("*.safetensors"))
    assert 3 <= len(done) < 40
    for path in done:
        assert load_file(path)["8x8.latents"].shape == (1, 2, 4, 8, 8)
    assert run(command[3:]) == 0
    assert len(LatentShards(out)) == 40 and not list(out.glob("*.tmp-*"))


def test_other_settings_or_images_are_refused(images, vae, tmp_path, capsys):
    out = tmp_path / "out"
    assert encoded(images, vae, out) == 0
    capsys.readouterr()
    assert encoded(images, vae, out, "--dtype", "float32") == 2
    assert "was begun with dtype float16, got float32: choose another" in capsys.readouterr().err
    (images / "cats" / "1.png").rename(images / "cats" / "3.png")
    assert encoded(images, vae, out) == 2
    assert "holds latents of 4 images" in capsys.readouterr().err


def test_mistakes_leave_nothing(images, vae, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def told(*flags, folder=images) -> str:
        assert encoded(folder, vae, out, *flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("tim encode: ") and error.count("\n") == 1
        assert not out.exists()
        return error

    assert "side must be a multiple of 2, got 15" in told("--image-size", 15)
    assert "batch-size must be at least 1, got 0" in told("--batch-size", 0)
    assert "captions must be 'txt' or a .jsonl file, got x" in told("--captions", "x")
    (tmp_path / "empty").mkdir()
    assert "empty holds no images" in told(folder=tmp_path / "empty")
    (tmp_path / "a.tar").write_bytes(b"no tar file, but long enough to be read as one" * 20)
    assert "is no uncompressed tar file" in told(folder=tmp_path / "a.tar")
    assert "no absent" in told("--features", f"{__name__}:absent")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'transition-models[t2i]'" in told()


def test_no_readable_image(vae, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    assert encoded(tmp_path / "broken", vae, tmp_path / "out") == 2
    assert "none of the 1 images could be read; a.png: Unidentified" in capsys.readouterr().err
    # Mended, they are read by the same command: nothing is left that says otherwise.
    assert not (tmp_path / "out").exists()
    Image.new("RGB", (16, 16)).save(tmp_path / "broken" / "a.png")
    assert encoded(tmp_path / "broken", vae, tmp_path / "out") == 0


def test_no_such_autoencoder(images, tmp_path, capsys):
    assert encoded(images, tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("tim encode: vae must be a folder or hub id") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
