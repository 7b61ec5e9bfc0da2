"""Configurations: the YAML round trip, and errors that name the field."""

import dataclasses

import pytest
import yaml

from tim._flags import comma_separated_ints
from tim.config import (
    DataConfig,
    ObjectiveConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    TransportConfig,
    differences,
    from_dict,
    to_dict,
)
from tim.models import TiMConfig


def config(**sections) -> RunConfig:
    return RunConfig(preset="test", model=TiMConfig(input_size=8, in_channels=1), **sections)


def changed(**fields) -> dict:
    """Plain values of a configuration, with `section__field=value` replaced."""
    values = to_dict(config())
    for name, value in fields.items():
        section, _, field = name.partition("__")
        if field:
            values[section][field] = value
        else:
            values[section] = value
    return values


def test_round_trip(tmp_path) -> None:
    original = config(
        transport=TransportConfig(name="vp", beta_d=10.0),
        objective=ObjectiveConfig(time_weight_map=None, derivative="dde"),
        data=DataConfig(kind="folder", path="some where", flip=0.5),
        train=TrainConfig(lr=1e-5, adam_eps=1e-12, ema_halflife_images=5, seed=2**40),
        sample=SampleConfig(steps=(1, 16), cfg_interval=(0.1, 0.9)),
    )
    original.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == original
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert TiMConfig.from_dict(saved["model"]) == original.model


def test_absent_fields_keep_their_defaults() -> None:
    values = {"preset": "test", "model": {"input_size": 8}, "train": {"steps": 7}}
    assert from_dict(RunConfig, values).train == TrainConfig(steps=7)


def test_numbers_as_yaml_reads_them(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("preset: a\nmodel: {}\ntrain: {lr: 1e-4, clip_norm: 1}\n")
    train = RunConfig.load(tmp_path / "c.yaml").train
    assert train.lr == 1e-4 and train.clip_norm == 1.0 and isinstance(train.clip_norm, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(train__stepz=3), "unknown field train.stepz; known are steps, batch_size"),
        (changed(extra=3), "unknown field extra; known are preset, model"),
        ({"model": {}}, "field preset is missing"),
        (changed(train__steps="many"), "train.steps must be int, got 'many'"),
        (changed(train__steps=1.5), "train.steps must be int, got 1.5"),
        (changed(train__steps=True), "train.steps must be int, got True"),
        (changed(train__lr="fast"), "train.lr must be float, got 'fast'"),
        (changed(train__tensorboard=1), "train.tensorboard must be bool, got 1"),
        (changed(train__ema_halflife_images="x"), "train.ema_halflife_images must be int, got 'x'"),
        (
            changed(train__precision="fp8"),
            "train.precision must be one of float32, bf16, got 'fp8'",
        ),
        (changed(objective__time_weight_map="tan"), "objective.time_weight_map must be one of"),
        (changed(objective__guidance={"w": 1}), "unknown field objective.guidance.w"),
        (changed(objective__guidance=0.5), "objective.guidance must be a mapping, got 0.5"),
        (changed(sample__steps=4), "sample.steps must be a list, got 4"),
        (changed(sample__steps=["a"]), "sample.steps must be int, got 'a'"),
        (changed(sample__cfg_interval=[0.1]), "sample.cfg_interval must have 2 values, got 1"),
        (changed(train__batch_size=0), "train.batch_size must be at least 1, got 0"),
        (changed(train__accumulate=3), "must be a multiple of train.accumulate = 3, got 64"),
        (changed(train__ema_decay=1.0), r"train.ema_decay must be in \[0, 1\), got 1.0"),
        (changed(train__lr=float("nan")), "train.lr must be at least 0, got nan"),
        (changed(sample__steps=[4, 0]), r"sample.steps must be positive, got \(4, 0\)"),
        (changed(data__flip=2.0), r"data.flip must be in \[0, 1\], got 2.0"),
        (changed(model__depth=0), "depth must be at least 1, got 0"),
        ([1, 2], r"the configuration must be a mapping, got \[1, 2\]"),
    ],
)
def test_errors_name_file_field_and_value(tmp_path, values, message) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message) as caught:
        RunConfig.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_yaml(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("a: [1,\nb: }")
    with pytest.raises(ValueError, match="is not a YAML file"):
        RunConfig.load(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError):
        RunConfig.load(tmp_path / "absent.yaml")


def test_differences_are_named() -> None:
    old = config()
    new = dataclasses.replace(
        old,
        model=dataclasses.replace(old.model, depth=3),
        train=dataclasses.replace(old.train, lr=1.0),
    )
    assert differences(old, old) == []
    assert differences(old, new) == [("model.depth", 28, 3), ("train.lr", 1e-4, 1.0)]


def test_comma_separated_ints() -> None:
    assert comma_separated_ints("1,2,32") == (1, 2, 32)
    for text in ("", "1,", "1 2", "a"):
        with pytest.raises(ValueError, match="whole numbers with commas"):
            comma_separated_ints(text)


def test_built_objects_have_the_configured_values() -> None:
    transport = TransportConfig(name="trigflow", P_mean=-0.7).build()
    assert (transport.name, transport.P_mean, transport.P_std) == ("trigflow", -0.7, 1.6)
    objective = ObjectiveConfig(derivative="dde", epsilon=0.01, time_weight="square")
    loss = objective.build(transport)
    assert (loss.derivative, loss.epsilon, loss.time_weight) == ("dde", 0.01, "square")
    assert loss.guidance is None
    guidance = dataclasses.replace(objective.guidance, enabled=True, w_cond=0.5)
    loss = dataclasses.replace(objective, guidance=guidance).build(transport)
    assert loss.guidance.w_cond == 0.5
    with pytest.raises(ValueError, match=r"vp has no P_mean: give --transport\.P-mean None"):
        TransportConfig(name="vp", P_mean=0.0).build()
