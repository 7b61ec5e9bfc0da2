"""Text to image on several ranks, each of which encodes the captions of its own images."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from PIL import Image
from ranks import run_ranks
from workers import train

from small_encoders import gemma, saved, tokenizer
from tim import presets
from tim.config import DataConfig, ParallelConfig, RunConfig, SampleConfig, TrainConfig
from tim.models import TiMConfig

pytestmark = pytest.mark.slow

#: Of different lengths: as padding is not masked, it matters to what length a rank pads its own.
CAPTIONS = ["red", "a photo of a dog", "three blue cat on grass", "green", "a dog on red grass"]
#: The same for all keys, it changes no attention: its gradient is rounding and nothing else.
WITHOUT_EFFECT = "cross_attn.k_norm.bias"
MODEL = TiMConfig(
    input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2,
    encoder_depth=1, num_classes=None, cap_feat_dim=16, lora_hidden_size=16,
    class_dropout_prob=0.3,
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> RunConfig:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (50 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    encoder = saved(tmp_path / "gemma", gemma(), tokenizer())
    return dataclasses.replace(
        presets.get("tim-t2i-xl1"),
        model=MODEL,
        data=DataConfig(
            kind="folder", path=str(folder), image_size=8, captions="txt", flip=0.5,
            text_encoder=str(encoder),
        ),
        train=TrainConfig(
            steps=4, batch_size=8, accumulate=2, lr=1e-3, precision="float32", device="cpu",
            tensorboard=False, sample_every=2, checkpoint_every=2,
        ),
        sample=SampleConfig(steps=(1,), columns=2),
    )  # fmt: skip


def test_text_to_image(base: RunConfig, tmp_path: Path) -> None:
    """Two steps on two ranks with whole models and two with sharded ones: as on one rank."""
    expected = train(base, tmp_path / "alone")
    halfway = dataclasses.replace(base.train, steps=2)
    legs = [
        dataclasses.replace(base, train=halfway, parallel=ParallelConfig(strategy="ddp")),
        dataclasses.replace(base, parallel=ParallelConfig(strategy="fsdp")),
    ]
    values = []
    for number, leg in enumerate(legs):
        logs = tmp_path / f"logs-{number}"
        results = run_ranks(2, logs, train, leg, tmp_path / "run", number > 0)
        assert [result["first"] for result in results] == [2 * number] * 2
        values += results[0]["values"]
    for step, (found, alone) in enumerate(zip(values, expected["values"], strict=True)):
        assert (found - alone).norm() < 1e-4 * alone.norm(), (step, found, alone)
    compared = [name for name in expected["weights"] if WITHOUT_EFFECT not in name]
    assert len(compared) == len(expected["weights"]) - 4 * MODEL.depth
    for result in results:
        for name in compared:
            value = expected["weights"][name]
            error = (result["weights"][name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error < 1e-4, f"{name}: {error}"
    assert (tmp_path / "run" / "samples" / "00000004.png").is_file()
