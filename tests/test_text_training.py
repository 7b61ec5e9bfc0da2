"""Text to image through the trainer, from captioned pictures or latents to prompts."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image

from latent_data import image_folder, tar_file
from small_encoders import autoencoder_kl, gemma, saved, tokenizer
from tim import conditions, presets
from tim.cli import run
from tim.config import DataConfig, RunConfig, SampleConfig, TrainConfig
from tim.data import build_dataset
from tim.data.images import ImageDataset
from tim.models import TiMConfig
from tim.text import TextEncoder
from tim.trainer import Trainer
from tiny_runs import same, weights

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
MODEL = TiMConfig(
    input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2,
    encoder_depth=1, num_classes=None, cap_feat_dim=16, lora_hidden_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("gemma"), gemma(), tokenizer())


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "colours"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photo of {name}")
    return folder


def config(pictures, encoder, **train) -> RunConfig:
    values = {
        "steps": 3, "batch_size": 6, "lr": 3e-3, "log_every": 50, "sample_every": 0,
        "checkpoint_every": 1000, "tensorboard": False, "device": "cpu", "beta2": 0.99,
        "ema_halflife_images": 600,
    }  # fmt: skip
    return dataclasses.replace(
        presets.get("tim-t2i-xl1"),
        model=MODEL,
        data=DataConfig(
            kind="folder", path=str(pictures), image_size=8, captions="txt",
            text_encoder=str(encoder),
        ),
        train=TrainConfig(**{**values, **train}),
        sample=SampleConfig(steps=(1, 4), columns=3),
    )  # fmt: skip


def test_prompts_are_obeyed(pictures, encoder, tmp_path, capsys):
    trainer = Trainer(config(pictures, encoder, steps=250, sample_every=250), tmp_path / "run")
    trainer.train()
    prompts = [f"a photo of {name}" for name in COLOURS]
    out = tmp_path / "out.png"
    flags = ["--prompt", *prompts, "--steps", "4", "--cfg-scale", "1", "--out", str(out)]
    assert run(["sample", str(tmp_path / "run"), *flags]) == 0
    with Image.open(out) as grid:
        pixels = np.asarray(grid.convert("RGB"))
    left = grid.width - 3 * 50
    for i, colour in enumerate(COLOURS.values()):
        middle = pixels[26, left + 50 * i + 24]
        assert np.abs(middle.astype(int) - colour).max() < 100, (i, middle)
    # The sample grid of the run shows captions of the data, and its defaults are the command's.
    assert (tmp_path / "run" / "samples" / "00000250.png").is_file()
    assert run(["sample", str(tmp_path / "run"), "--classes", "1"]) == 2
    assert "give --prompt and no --classes" in capsys.readouterr().err


def test_resumes_bit_for_bit(pictures, encoder, tmp_path):
    settings = config(pictures, encoder, steps=4, checkpoint_every=2)
    whole = Trainer(settings, tmp_path / "whole")
    whole.train()
    half = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=2))
    Trainer(half, tmp_path / "run").train()
    again = Trainer(settings, tmp_path / "run", resume=True)
    again.train()
    assert same(weights(again), weights(whole))


def test_dropped_captions_are_empty_ones(pictures, encoder, tmp_path):
    settings = config(pictures, encoder, batch_size=64, accumulate=2)
    model = dataclasses.replace(settings.model, class_dropout_prob=0.5)
    trainer = Trainer(dataclasses.replace(settings, model=model), tmp_path / "run")
    batch = trainer.dataset.batch(np.arange(64) % 3, np.random.default_rng(0))
    trainer.training_step.load(batch, 0)
    assert len(trainer.training_step.inputs) == 2
    for part, inputs in enumerate(trainer.training_step.inputs):
        captions = batch.y[32 * part : 32 * (part + 1)]
        full = trainer.text(captions)
        torch.testing.assert_close(inputs.y_guidance, full)
        torch.testing.assert_close(inputs.null, trainer.text.null(32, full.shape[1]))
        dropped = (inputs.y == inputs.null).flatten(1).all(1)
        assert 5 < dropped.sum() < 27
        torch.testing.assert_close(inputs.y[~dropped], full[~dropped])


def test_each_caption_is_encoded_once(encoder):
    text = TextEncoder.load(str(encoder))
    sizes = []
    text.model.register_forward_pre_hook(
        lambda m, a, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True
    )
    y, null = text.with_null(["a cat", "dog", "a cat", "a cat"])
    assert sizes == [3]
    assert torch.equal(y[0], y[3]) and not torch.equal(y[0], y[1])
    torch.testing.assert_close(y[:2], text(["a cat", "dog"]))
    torch.testing.assert_close(null, text.null(4, y.shape[1]))


def test_guidance_in_training_takes_captions(pictures, encoder, tmp_path):
    settings = config(pictures, encoder)
    guidance = dataclasses.replace(settings.objective.guidance, enabled=True)
    objective = dataclasses.replace(settings.objective, guidance=guidance)
    trainer = Trainer(dataclasses.replace(settings, objective=objective), tmp_path / "run")
    trainer.train()
    assert trainer.step == 3 and trainer.skipped == 0


def test_captioned_latents(encoder, tmp_path, capsys):
    vae = saved(tmp_path / "vae", autoencoder_kl())
    images = image_folder(tmp_path / "images", captions=True)
    latents = tmp_path / "latents"
    flags = ["--vae", vae, "--out", latents, "--image-size", "16", "--captions", "txt"]
    assert run(["encode", str(images), *map(str, flags)]) == 0
    settings = config(images, encoder, sample_every=3)
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(MODEL, in_channels=4),
        data=DataConfig(kind="latents", path=str(latents), flip=0.5, text_encoder=str(encoder)),
    )
    trainer = Trainer(settings, tmp_path / "run")
    trainer.train()
    assert RunConfig.load(tmp_path / "run" / "config.yaml").data.vae == str(vae)
    with Image.open(tmp_path / "run" / "samples" / "00000003.png") as grid:
        assert grid.height == 2 + 2 * 50  # decoded: 16 pixels enlarged to 48
    out = tmp_path / "out.png"
    flags = ["--prompt", "a cat", "--size", "32x16", "--steps", "2", "--out", str(out)]
    assert run(["sample", str(tmp_path / "run"), *flags]) == 0
    with Image.open(out) as picture:
        assert picture.size == (32, 16)


def test_from_the_command_line(pictures, encoder, tmp_path):
    model = {
        "input-size": 8, "patch-size": 4, "in-channels": 3, "hidden-size": 32, "depth": 1,
        "num-heads": 2, "encoder-depth": 1, "cap-feat-dim": 16, "z-dim": "None",
    }  # fmt: skip
    data = {"kind": "folder", "path": pictures, "image-size": 8, "captions": "txt",
            "text-encoder": encoder}  # fmt: skip
    train = {"steps": 2, "batch-size": 4, "precision": "float32", "device": "cpu"}
    sections = {"model": model, "data": data, "train": train}
    flags = [str(x) for s, v in sections.items() for k, x in v.items() for x in (f"--{s}.{k}", x)]
    assert run(["train", "tim-t2i-xl1", "--run", str(tmp_path / "run"), *flags]) == 0
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert any("denoising" in json.loads(line) for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"cap_feat_dim": 20}}, "model.cap_feat_dim must be 16, .*, got 20"),
        ({"data": {"text_encoder": None}}, "data.text_encoder is missing"),
        ({"data": {"captions": None}}, "a text model needs data with captions"),
        (
            {"model": {"num_classes": 3, "cap_feat_dim": None}},
            "the data have captions, which need a text model",
        ),
        ({"model": {"z_dim": 5}, "data": {"features": "test_text_training:Averages"}},
         r"features must have shape \[N, model.z_dim\] = \[4, 5\] for 4 tokens, got \[4, 3\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_the_run(changes, message, pictures, encoder, tmp_path):
    settings = config(pictures, encoder)
    for section, values in changes.items():
        part = dataclasses.replace(getattr(settings, section), **values)
        settings = dataclasses.replace(settings, **{section: part})
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(settings, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


class Averages(torch.nn.Module):
    patch_size = 4

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 4)


def test_features_on_the_fly(pictures, encoder, tmp_path):
    settings = config(pictures, encoder)
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(MODEL, z_dim=3, projector_dim=8),
        data=dataclasses.replace(settings.data, features=f"{__name__}:Averages"),
    )
    trainer = Trainer(settings, tmp_path / "run")
    values = trainer.train_step(trainer.dataset.batch(np.arange(6) % 3, np.random.default_rng(0)))
    assert 0 < values[2] < 2  # the projection loss
    (inputs,) = trainer.training_step.inputs
    expected = torch.nn.functional.avg_pool2d(inputs.x / 2 + 0.5, 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(inputs.features, expected)
    latents = dataclasses.replace(settings.data, kind="latents")
    with pytest.raises(ValueError, match=r"of latents give it to tim encode"):
        conditions.feature_encoder(dataclasses.replace(settings, data=latents), torch.device("cpu"))


def test_tar_files_and_unreadable_samples(tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    tar_file(tars / "0.tar", 0, 3)
    labels = build_dataset(DataConfig(kind="folder", path=str(tars), image_size=8))
    assert isinstance(labels, ImageDataset) and labels.num_classes == 2
    batch = labels.batch(np.arange(3), np.random.default_rng(0))
    assert batch.x.shape == (3, 3, 8, 8) and batch.y.tolist() == [0, 1, 0]
    texts = build_dataset(
        DataConfig(kind="folder", path=str(tars / "0.tar"), image_size=8, captions="txt", flip=0.5)
    )
    whole = texts.batch(np.array([0, 1, 2, 1]), np.random.default_rng(5))
    part = texts.batch(np.array([0, 1, 2, 1]), np.random.default_rng(5), slice(1, 3))
    assert torch.equal(part.x, whole.x[1:3]) and part.y == whole.y[1:3]
    folder = image_folder(tmp_path / "images", captions=True)
    (folder / "cats" / "1.txt").write_text("\n")
    data = ImageDataset(folder, 8, captions="txt")
    batch = data.batch(np.arange(4), np.random.default_rng(0))
    assert batch.y == ["a cat", "a cat", "a dog", "a cat"]
    assert {name: why.split(":")[0] for name, why in data.skipped.items()} == {
        "cats/1.png": "ValueError", "dogs/broken.png": "UnidentifiedImageError",
    }  # fmt: skip
    for text in folder.rglob("*.txt"):
        text.unlink()
    with pytest.raises(ValueError, match=r"none of the 4 images in .* can be read; cats/1.png: "):
        ImageDataset(folder, 8, captions="txt")


def test_long_captions_are_cut_counted_and_told_once(pictures, encoder, tmp_path, capfd):
    (pictures / "red.txt").write_text("a photo of red " * 5)
    settings = config(pictures, encoder, steps=4, log_every=2)
    data = dataclasses.replace(settings.data, max_tokens=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = Trainer(dataclasses.replace(settings, data=data), tmp_path / "run")
        trainer.train()
    told = capfd.readouterr()
    text = told.out + told.err
    assert text.count("captions have more than 6 tokens and are cut, the first being 'a ph") == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    # Every step has each picture twice, and different captions are encoded once.
    assert [r["cut_captions"] for r in records if "denoising" in r] == [2, 4]
    assert trainer.cut_captions == 4
