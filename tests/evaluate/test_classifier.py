import dataclasses
import json

import pytest

from tim import presets
from tim.cli import run as command
from tim.config import DataConfig, TrainConfig
from tim.evaluate.classifier import Quality, classifier_quality, plot
from tim.models import TiMConfig
from tim.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned nothing yet: the plumbing is what is tested."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    model = TiMConfig(
        input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10
    )
    train = TrainConfig(
        steps=2, batch_size=8, sample_every=0, checkpoint_every=2, device="cpu", tensorboard=False
    )
    Trainer(presets.get("digits", model=model, train=train), folder).train()
    return folder


def test_untrained_run_lies_far_from_real_images(trained, capsys):
    assert command(["evaluate", str(trained), "--steps", "1,3", "--samples", "200"]) == 0
    written = json.loads((trained / "quality.json").read_text())
    assert written["steps"] == [1, 3] and written["samples"] == 200 and written["held_out"] == 297
    assert written["classifier_accuracy"] > 0.95
    assert (
        0 < written["real"] < min(written["distance"]) and written["real"] < written["noise"] / 10
    )
    assert (trained / "quality.png").stat().st_size > 10_000
    assert not list(trained.glob("*.tmp-*"))
    out = capsys.readouterr().out
    assert "floor, real training images" in out and "quality.png" in out


QUALITY = Quality(
    run="r",
    step=5,
    seed=0,
    samples=9,
    held_out=9,
    cfg_scale=1.0,
    classifier_accuracy=1.0,
    real=0.5,
    noise=50.0,
    steps=(1, 2, 4),
    distance=(3.0, 2.0, 2.5),
    agreement=(0.9, 1.0, 1.0),
)


def test_steps_that_did_not_help_are_named():
    assert QUALITY.not_better() == [(2, 4)]
    assert dataclasses.replace(QUALITY, distance=(3.0, 2.0, 1.0)).not_better() == []


def test_plot_shows_every_step_count():
    axes = plot(QUALITY).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    assert list(axes.lines[0].get_ydata()) == [3.0, 2.0, 2.5]


def test_bad_input(trained, tmp_path):
    with pytest.raises(ValueError, match="steps must be positive"):
        classifier_quality(trained, steps=(0,))
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        classifier_quality(trained, samples=1)
    with pytest.raises(FileNotFoundError):
        classifier_quality(tmp_path)
    config = presets.get("digits", train=dataclasses.replace(presets.get("digits").train, steps=1))
    config.save(tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        classifier_quality(tmp_path)
    presets.get("digits", data=DataConfig(kind="folder", path=".")).save(tmp_path / "config.yaml")
    assert command(["evaluate", str(tmp_path)]) == 2
