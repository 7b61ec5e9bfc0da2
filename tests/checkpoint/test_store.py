"""The checkpoints of a run: whole or not at all, and checked before they are trusted."""

import json
import os
import resource
import threading

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tim.checkpoint import CheckpointStore, SaveFailed, Training, checkpoints, directory, whole
from tim.checkpoint.directory import latest_checkpoint, remove_leftovers
from tim.config import RunConfig
from tim.models import TiM, TiMConfig, load
from tim.parallel import World

CONFIG = TiMConfig(
    input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, encoder_depth=1,
    num_classes=3,
)  # fmt: skip
FILES = ("model.safetensors", "ema.safetensors", "state.pt")
ALONE = World(torch.device("cpu"))


def training(seed: int, config: TiMConfig = CONFIG) -> Training:
    """A network, an average and moments of random numbers."""
    torch.manual_seed(seed)
    pair = TiM(config), TiM(config)
    for model in pair:
        for p in model.parameters():
            p.data = torch.randn_like(p)
    optimizer = torch.optim.AdamW(pair[0].parameters(), fused=True)
    for p in pair[0].parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return Training(*pair, optimizer)


@pytest.fixture
def one() -> Training:
    return training(0)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and v.equal(w) for (m, v), (n, w) in pairs)


def same(a: Training, b: Training) -> bool:
    moments, others = a.optimizer_state(), b.optimizer_state()
    return (
        same_weights(a.model, b.model)
        and same_weights(a.average, b.average)
        and moments.keys() == others.keys()
        and all(v.equal(others[n][k]) for n, state in moments.items() for k, v in state.items())
    )


def saved(folder, one: Training, *steps: int, keep: int = 9, **state) -> CheckpointStore:
    store = CheckpointStore(folder, keep, ALONE)
    for step in steps:
        store.save(step, one, {"step": step, **state})
        store.wait()
    return store


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path, one) -> None:
    store = saved(tmp_path, one, 7, numbers=[torch.ones(3)])
    assert names(tmp_path) == ["00000007"]
    assert names(tmp_path / "00000007") == sorted((*FILES, "SHA256SUMS"))
    other = training(1)
    assert not same(one, other)
    found = store.restore(other)
    assert found.path.name == "00000007" and found.damaged == []
    assert found.state["step"] == 7 and found.state["numbers"][0].equal(torch.ones(3))
    assert same(one, other)


def test_writing_beside_the_training(tmp_path, one, monkeypatch) -> None:
    """What is written is the state at the time of the call, however the training goes on."""
    begun, go_on = threading.Event(), threading.Event()
    write = whole.write

    def slow(*arguments) -> None:
        begun.set()
        assert go_on.wait(10)
        write(*arguments)

    monkeypatch.setattr(whole, "write", slow)
    store = CheckpointStore(tmp_path, 2, ALONE)
    store.save(1, one, {"step": 1})
    assert begun.wait(10) and latest_checkpoint(tmp_path) is None
    for p in one.model.parameters():
        p.data.zero_()
        one.optimizer.state[p]["exp_avg"].zero_()
    go_on.set()
    store.wait()
    other = training(1)
    store.restore(other)
    assert same(other, training(0))


def test_weight_files_carry_their_configuration(tmp_path, one) -> None:
    saved(tmp_path, one, 1)
    path = tmp_path / "00000001" / "ema.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["config"]) == CONFIG.to_dict()
    loaded = load(path)
    assert loaded.config == CONFIG and same_weights(loaded, one.average)


def test_equal_states_are_equal_files(tmp_path, one) -> None:
    for folder in "abcdefgh":
        saved(tmp_path / folder, one, 1)
    for name in (*FILES, "SHA256SUMS"):
        paths = tmp_path.glob(f"*/00000001/{name}")
        assert len({path.read_bytes() for path in paths}) == 1, name


def test_newest_are_kept(tmp_path, one) -> None:
    saved(tmp_path, one, 5, 20, 100, 3000, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["00000100", "00003000"]
    assert names(tmp_path) == ["00000100", "00003000"]


def test_nothing_there(tmp_path, one) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        assert latest_checkpoint(folder) is None
        assert CheckpointStore(folder, 1, ALONE).restore(one) is None
        assert remove_leftovers(folder) == []


@pytest.mark.parametrize(
    "module, name", [(whole, "digest"), (directory, "_flush"), (os, "replace")]
)
def test_a_process_that_dies_while_writing(tmp_path, one, monkeypatch, module, name) -> None:
    """The clean-up of a failed save does not happen either: the process is gone."""
    saved(tmp_path, one, 1)
    other = training(1)

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, crash)
        temporary = directory.begin(tmp_path, 2)
        with pytest.raises(KeyboardInterrupt):
            whole.write(temporary, whole.stage(other, {"step": 2}))
            directory.commit(temporary, 1)
    assert latest_checkpoint(tmp_path).name == "00000001"
    assert [p.name for p in remove_leftovers(tmp_path)] == [f"00000002.tmp-{os.getpid()}"]
    assert names(tmp_path) == ["00000001"]
    saved(tmp_path, one, 2)
    assert latest_checkpoint(tmp_path).name == "00000002"


def test_a_crash_while_deleting_leaves_no_half_checkpoint(tmp_path, one, monkeypatch) -> None:
    store = saved(tmp_path, one, 1, keep=1)

    def crash(path, **options: object) -> None:
        (path / "model.safetensors").unlink(missing_ok=True)
        raise OSError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(directory.shutil, "rmtree", crash)
        store.keep = 1
        store.save(2, one, {})
        with pytest.raises(SaveFailed, match="crash"):
            store.wait()
    assert [p.name for p in checkpoints(tmp_path)] == ["00000002"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["00000002"]


def test_a_folder_without_all_files_is_no_checkpoint(tmp_path, one) -> None:
    saved(tmp_path, one, 1, 2)
    (tmp_path / "00000002" / "state.pt").unlink()
    assert latest_checkpoint(tmp_path).name == "00000001"
    saved(tmp_path, one, 2)
    assert latest_checkpoint(tmp_path).name == "00000002"


@pytest.mark.parametrize("first", ["model.safetensors", "state.pt"])
def test_a_full_disk(tmp_path, one, first) -> None:
    """The system refuses to let files grow: an error, no half checkpoint, the old ones whole."""
    store = saved(tmp_path, one, 1)
    # The first file that does not fit: moments are twice the size of weights.
    limit = (tmp_path / "00000001" / first).stat().st_size - 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        store.save(2, training(1), {"step": 2})
        with pytest.raises(SaveFailed, match=r"^checkpoint 2 could not be written: .*too large"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["00000001"]
    saved(tmp_path, one, 3)
    assert names(tmp_path) == ["00000001", "00000003"]


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_bit(data: bytes) -> bytes:
    """Near the end: in the numbers, where no parser would notice."""
    place = len(data) - len(data) // 4
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path, one, name, damage) -> None:
    store = saved(tmp_path, one, 1, 2)
    path = tmp_path / "00000002" / name
    path.write_bytes(damage(path.read_bytes()))
    other = training(1)
    found = store.restore(other)
    assert found.path.name == "00000001" and found.state["step"] == 1 and same(one, other)
    (reason,) = found.damaged
    assert reason == f"{path} is damaged: its checksum is not the one in SHA256SUMS"
    # It is kept for whoever wants to look, under a name that nobody reads.
    assert names(tmp_path) == ["00000001", "00000002.damaged-0"]
    path = tmp_path / "00000001" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path} is damaged: .*; no older checkpoint .* whole"):
        store.restore(other)
    assert names(tmp_path) == ["00000001", "00000002.damaged-0"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_checkpoints_of_earlier_versions_have_no_sums(tmp_path, one, name, share) -> None:
    store = saved(tmp_path, one, 1, 2, moments=torch.ones(1000))
    for step in (1, 2):
        (tmp_path / f"0000000{step}" / "SHA256SUMS").unlink()
    other = training(1)
    assert store.restore(other).state["step"] == 2 and same(one, other)
    path = tmp_path / "00000002" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    found = store.restore(other)
    assert found.state["step"] == 1 and found.damaged[0].startswith(f"{path} is damaged: ")


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"junk\n"])
def test_damaged_sums(tmp_path, one, damage) -> None:
    store = saved(tmp_path, one, 1, 2)
    (tmp_path / "00000002" / "SHA256SUMS").write_bytes(damage)
    found = store.restore(one)
    assert found.state["step"] == 1 and "SHA256SUMS is damaged" in found.damaged[0]


def test_a_network_loaded_from_a_run_is_checked_too(tmp_path, one) -> None:
    run = tmp_path / "run"
    saved(run / "checkpoints", one, 1, 2)
    RunConfig(preset="digits", model=CONFIG).save(run / "config.yaml")
    assert same_weights(load(run), one.average)
    path = run / "checkpoints" / "00000002" / "ema.safetensors"
    path.write_bytes(flip_a_bit(path.read_bytes()))
    with pytest.raises(ValueError, match=r"ema.safetensors is damaged: .*go on from 00000001"):
        load(run)
    # The other files do not matter to it.
    path = run / "checkpoints" / "00000001" / "state.pt"
    path.write_bytes(flip_a_bit(path.read_bytes()))
    directory.set_aside(run / "checkpoints" / "00000002")
    assert same_weights(load(run), one.average)


def test_weights_of_another_model_are_refused(tmp_path, one) -> None:
    store = saved(tmp_path, one, 1)
    other = training(0, TiMConfig(**{**CONFIG.to_dict(), "num_classes": 5}))
    with pytest.raises(
        ValueError, match=r"model.safetensors does not fit the model: .*size mismatch"
    ):
        store.restore(other)
    assert names(tmp_path) == ["00000001"]
