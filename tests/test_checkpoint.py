"""Checkpoints: whole or not at all."""

import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import tim.checkpoint as checkpoint
from tim.models import TiM, TiMConfig, load

CONFIG = TiMConfig(
    input_size=8,
    in_channels=1,
    hidden_size=16,
    depth=1,
    num_heads=2,
    encoder_depth=1,
    num_classes=3,
)


@pytest.fixture
def models() -> tuple[TiM, TiM]:
    torch.manual_seed(0)
    pair = TiM(CONFIG), TiM(CONFIG)
    with torch.no_grad():
        for model in pair:
            for p in model.parameters():
                p.copy_(torch.randn_like(p))
    return pair


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and v.equal(w) for (m, v), (n, w) in pairs)


def test_round_trip(tmp_path, models) -> None:
    state = {"step": 7, "optimizer": {"lr": 0.1, "moments": [torch.ones(3)]}}
    path = checkpoint.save_checkpoint(tmp_path, 7, *models, state, keep=2)
    assert path.name == "00000007"
    fresh = TiM(CONFIG), TiM(CONFIG)
    loaded = checkpoint.load_checkpoint(path, *fresh)
    assert same(fresh[0], models[0]) and same(fresh[1], models[1])
    assert loaded["step"] == 7 and loaded["optimizer"]["moments"][0].equal(torch.ones(3))


def test_weight_files_carry_their_configuration(tmp_path, models) -> None:
    path = checkpoint.save_checkpoint(tmp_path, 1, *models, {}, keep=1)
    with safe_open(path / "ema.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == CONFIG.to_dict()
    loaded = load(path / "ema.safetensors")
    assert loaded.config == CONFIG and same(loaded, models[1])


def test_equal_weights_are_equal_files(tmp_path, models) -> None:
    for step in range(1, 9):
        checkpoint.save_checkpoint(tmp_path, step, *models, {"step": 1}, keep=8)
    for name in ("model.safetensors", "ema.safetensors", "state.pt"):
        assert len({(p / name).read_bytes() for p in checkpoint.checkpoints(tmp_path)}) == 1, name


def test_newest_are_kept(tmp_path, models) -> None:
    for step in (5, 20, 100, 3000):
        checkpoint.save_checkpoint(tmp_path, step, *models, {}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["00000100", "00003000"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000100", "00003000"]
    assert checkpoint.latest_checkpoint(tmp_path).name == "00003000"


def test_nothing_there(tmp_path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path / "absent") is None
    assert checkpoint.latest_checkpoint(tmp_path) is None
    assert checkpoint.remove_leftovers(tmp_path / "absent") == []


@pytest.mark.parametrize("moment", ["save_weights", "_flush", "replace"])
def test_a_crash_while_writing_leaves_the_last_checkpoint(
    tmp_path, models, monkeypatch, moment
) -> None:
    checkpoint.save_checkpoint(tmp_path, 1, *models, {"step": 1}, keep=1)

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os if moment == "replace" else checkpoint, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_checkpoint(tmp_path, 2, *models, {"step": 2}, keep=1)
    assert checkpoint.latest_checkpoint(tmp_path).name == "00000001"
    leftovers = checkpoint.remove_leftovers(tmp_path)
    assert [p.name for p in leftovers] == [f"00000002.tmp-{os.getpid()}"]
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
    checkpoint.save_checkpoint(tmp_path, 2, *models, {"step": 2}, keep=1)
    assert checkpoint.latest_checkpoint(tmp_path).name == "00000002"


def test_a_crash_while_deleting_leaves_no_half_checkpoint(tmp_path, models, monkeypatch) -> None:
    checkpoint.save_checkpoint(tmp_path, 1, *models, {}, keep=1)

    def crash(path: object) -> None:
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_checkpoint(tmp_path, 2, *models, {}, keep=1)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["00000002"]
    checkpoint.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["00000002"]


def test_a_folder_without_all_files_is_no_checkpoint(tmp_path, models) -> None:
    checkpoint.save_checkpoint(tmp_path, 1, *models, {}, keep=3)
    broken = checkpoint.save_checkpoint(tmp_path, 2, *models, {}, keep=3)
    (broken / "state.pt").unlink()
    assert checkpoint.latest_checkpoint(tmp_path).name == "00000001"


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path, models) -> None:
    broken = checkpoint.save_checkpoint(tmp_path, 2, *models, {}, keep=3)
    (broken / "state.pt").unlink()
    checkpoint.save_checkpoint(tmp_path, 2, *models, {"step": 2}, keep=3)
    assert [p.name for p in tmp_path.iterdir()] == ["00000002"]
    assert checkpoint.latest_checkpoint(tmp_path) == broken


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_damaged_files_are_named(tmp_path, models, name, share) -> None:
    state = {"moments": torch.ones(1000)}
    for step in (1, 2):
        path = checkpoint.save_checkpoint(tmp_path, step, *models, state, keep=2)
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: int(share * len(whole))])
        remedy = r"; delete .*00000002 to go on from 00000001$" if step == 2 else r"[^;]*$"
        with pytest.raises(ValueError, match=rf"{path / name} is damaged: [^;]+{remedy}"):
            checkpoint.load_checkpoint(path, *models)


def test_weights_of_another_model_are_refused(tmp_path, models) -> None:
    path = checkpoint.save_checkpoint(tmp_path, 1, *models, {}, keep=1)
    other = TiM(TiMConfig(**{**CONFIG.to_dict(), "num_classes": 5}))
    with pytest.raises(
        ValueError, match=r"model.safetensors does not fit the model: .*size mismatch"
    ):
        checkpoint.load_checkpoint(path, other, other)


def test_random_states_continue(tmp_path) -> None:
    def draw() -> tuple:
        return (
            random.random(),
            np.random.rand(),
            random.gauss(0, 1),
            np.random.randn(),
            torch.rand(1),
        )

    cpu = torch.device("cpu")
    draw()
    torch.save(checkpoint.random_states(cpu), tmp_path / "states.pt")
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    checkpoint.set_random_states(torch.load(tmp_path / "states.pt", weights_only=True), cpu)
    assert draw() == expected
