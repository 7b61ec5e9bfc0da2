"""Latents of pictures of several sizes, and a run small enough for a test that trains on them."""

import dataclasses
from pathlib import Path

from latent_data import picture
from small_encoders import autoencoder_kl, saved
from tim import presets
from tim.cli import run
from tim.config import DataConfig, ObjectiveConfig, RunConfig, SampleConfig, TrainConfig
from tim.models import TiMConfig

MODEL = TiMConfig(
    input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2,
    encoder_depth=1, num_classes=2, lora_hidden_size=8,
)  # fmt: skip

CAPTIONS = ("red", "a green dog", "blue cat")


def latents_of_several_sizes(path: Path, captions: bool = False) -> Path:
    """Latents of square, tall and wide pictures, of two classes or with captions."""
    for i in range(9):
        height, width = ((20, 20), (40, 20), (20, 36))[i % 3]
        file = path / "images" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i, height, width).save(file)
        file.with_suffix(".txt").write_text(f"{'a photo of ' * (i % 2)}{CAPTIONS[i % 3]}")
    vae = saved(path / "vae", autoencoder_kl())
    flags = ["--vae", vae, "--out", path / "latents", "--image-size", 16, "--max-aspect", 2,
             "--patch-size", 2, *(["--captions", "txt"] if captions else [])]  # fmt: skip
    assert run(["encode", str(path / "images"), *map(str, flags)]) == 0
    return path / "latents"


def config(latents: Path, pack: bool = False, **train) -> RunConfig:
    values = {
        "steps": 6, "batch_size": 4, "log_every": 50, "sample_every": 0, "checkpoint_every": 1000,
        "tensorboard": False, "device": "cpu", "precision": "float32", "lr": 1e-3,
    }  # fmt: skip
    return dataclasses.replace(
        presets.get("tim-b4-256"),
        model=MODEL,
        objective=ObjectiveConfig(shift_base=64),
        data=DataConfig(kind="latents", path=str(latents), flip=0.5, pack=pack),
        train=TrainConfig(**{**values, **train}),
        sample=SampleConfig(steps=(1, 2), columns=3),
    )
