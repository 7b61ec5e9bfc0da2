"""Named configurations."""

import dataclasses

import pytest
import torch

from tim import presets
from tim.config import RunConfig, TrainConfig
from tim.data import build_dataset
from tim.models import ARCHITECTURES, TiM


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_round_trip_and_fit_together(name, tmp_path) -> None:
    config = presets.get(name)
    assert config.preset == name
    config.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == config
    config.objective.build(config.transport.build())
    with torch.device("meta"):
        TiM(config.model)
    assert presets.describe()[name].endswith(".")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_paper_presets_have_the_papers_architectures(name) -> None:
    assert presets.get(name).model == ARCHITECTURES[name]


def test_digits_are_small_and_fit_the_data() -> None:
    config = presets.get("digits")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in TiM(config.model).parameters())
    assert parameters < 1_000_000
    dataset = build_dataset(config.data)
    assert dataset.shape == (config.model.in_channels, *[config.model.input_size] * 2)
    assert dataset.num_classes == config.model.num_classes


def test_images_64_agrees_with_itself() -> None:
    config = presets.get("images-64")
    assert config.data.image_size == config.model.input_size == 64
    assert config.data.channels == config.model.in_channels


def test_get_replaces_sections_and_names_the_presets() -> None:
    train = TrainConfig(steps=3)
    assert presets.get("digits", train=train) == dataclasses.replace(presets.digits(), train=train)
    with pytest.raises(ValueError, match=r"preset must be one of digits, .* got 'mnist'"):
        presets.get("mnist")
