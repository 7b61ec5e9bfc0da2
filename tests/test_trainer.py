"""The training loop: steps, skipped steps, resuming, what a run directory holds."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tim import transports
from tim.checkpoint import latest_checkpoint
from tim.config import DataConfig, GuidanceConfig, ObjectiveConfig, RunConfig
from tim.data import ArrayDataset, Batch
from tim.models import load
from tim.objective import TransitionLoss
from tim.step import VALUES
from tim.trainer import READ_EVERY, Trainer, TrainingStopped, pick_device
from tiny_runs import MODEL, config, same, weights


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_directory(tmp_path) -> None:
    trainer = Trainer(config(sample_every=2, checkpoint_every=2, keep=1), tmp_path / "run")
    trainer.train()
    run = tmp_path / "run"
    names = sorted(path.name for path in run.iterdir())
    assert names == ["checkpoints", "config.yaml", "log.jsonl", "samples"]
    assert RunConfig.load(run / "config.yaml") == trainer.config
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000004"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["00000002.png", "00000004.png"]
    with Image.open(run / "samples" / "00000004.png") as grid:
        assert grid.height > 2 * 48 and grid.width > 3 * 48
    log = records(run)
    assert log[0]["event"] == "start" and log[0]["parameters"] > 1000
    assert [record["step"] for record in log[1:]] == [1, 2, 3, 4]
    for record in log[1:]:
        numbers = ("loss", "denoising", "grad_norm", "lr", "images_per_second", "memory_gb")
        assert all(np.isfinite(record[name]) and record[name] > 0 for name in numbers)
        assert record["skipped_steps"] == 0
    averaged = load(run)
    for a, b in zip(averaged.parameters(), trainer.ema.model.parameters(), strict=True):
        assert a.equal(b)


def test_training_lowers_the_denoising_error(tmp_path) -> None:
    trainer = Trainer(config(steps=80, batch_size=32, log_every=20), tmp_path / "run")
    trainer.train()
    errors = [r["denoising"] for r in records(tmp_path / "run") if "denoising" in r]
    assert errors[-1] < 0.8 * errors[0]


VARIANTS = {
    "plain": (None, {}),
    "bf16 in two parts": (None, {"precision": "bf16", "accumulate": 2}),
    "guided": (ObjectiveConfig(guidance=GuidanceConfig(enabled=True)), {}),
    "dde, cosine rate": (
        ObjectiveConfig(derivative="dde"),
        {"schedule": "cosine", "warmup_steps": 3, "ema_halflife_images": 100},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_continues_bit_for_bit(tmp_path, name) -> None:
    objective, train = VARIANTS[name]
    whole = Trainer(config(objective, steps=6, **train), tmp_path / "whole")
    whole.train()
    first = Trainer(config(objective, steps=6, checkpoint_every=4, **train), tmp_path / "run")
    stop_after(first, 5)
    # A later process starts from other random states.
    torch.manual_seed(1234)
    second = Trainer(config(objective, steps=6, **train), tmp_path / "run", resume=True)
    assert second.step == 4
    second.train()
    assert same(weights(whole), weights(second))
    a, b = (
        [r["denoising"] for r in records(tmp_path / d) if "denoising" in r]
        for d in ("whole", "run")
    )
    assert a == b and len(a) == 6


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_folder_run_resumes_bit_for_bit(tmp_path, cache_gb) -> None:
    """More than one epoch: the unbroken run meets cached images where the resumed one decodes."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02}.png")
    data = DataConfig(kind="folder", path=str(tmp_path / "images"), image_size=8, cache_gb=cache_gb)
    model = dataclasses.replace(MODEL, in_channels=3)
    base = dataclasses.replace(config(steps=6, checkpoint_every=4), data=data, model=model)
    whole = Trainer(base, tmp_path / "whole")
    whole.train()
    stop_after(Trainer(base, tmp_path / "run"), 5)
    resumed = Trainer(base, tmp_path / "run", resume=True)
    assert resumed.step == 4
    resumed.train()
    assert same(weights(whole), weights(resumed))


def test_noise_does_not_depend_on_the_strides_of_the_images(tmp_path) -> None:
    trainer = Trainer(
        dataclasses.replace(config(), model=dataclasses.replace(MODEL, in_channels=3)),
        tmp_path / "run",
        dataset=ArrayDataset(np.zeros((8, 3, 8, 8), np.float32), np.zeros(8), num_classes=1),
    )
    seen = []

    def spy(model, x, z, y, **others):
        seen.append(z)
        return squared_error(model, x, z, y)

    trainer.training_step.loss = replaced_loss(spy)
    batch = trainer.dataset.batch(np.arange(8), np.random.default_rng(0))
    for x in (batch.x, batch.x.to(memory_format=torch.channels_last)):
        trainer.step = 0
        trainer.train_step(batch._replace(x=x))
    assert seen[0].equal(seen[1])


def stop_after(trainer: Trainer, steps: int) -> None:
    """Train until a step is interrupted, as by Ctrl-C."""
    step = trainer.train_step

    def interrupted(batch: Batch) -> torch.Tensor:
        if trainer.step == steps:
            raise KeyboardInterrupt
        return step(batch)

    trainer.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_run_can_be_made_longer(tmp_path) -> None:
    Trainer(config(steps=2), tmp_path / "run").train()
    longer = Trainer(config(steps=4), tmp_path / "run", resume=True)
    longer.train()
    whole = Trainer(config(steps=4), tmp_path / "whole")
    whole.train()
    assert same(weights(longer), weights(whole))
    assert RunConfig.load(tmp_path / "run" / "config.yaml").train.steps == 4


def test_resuming_without_a_checkpoint_starts_anew(tmp_path) -> None:
    Trainer(config(), tmp_path / "run")
    trainer = Trainer(config(), tmp_path / "run", resume=True)
    assert trainer.step == 0
    assert Trainer(config(), tmp_path / "new", resume=True).step == 0


def test_directories_that_are_taken(tmp_path) -> None:
    Trainer(config(), tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds a run: resume it, or take another"):
        Trainer(config(), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="not empty and holds no run"):
            Trainer(config(), tmp_path / "other", resume=resume)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_resumed_run_cannot_change_what_matters(tmp_path) -> None:
    Trainer(config(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"cannot change train.seed: it is 0, got 5"):
        Trainer(config(seed=5), tmp_path / "run", resume=True)
    other = ObjectiveConfig(derivative="dde")
    with pytest.raises(ValueError, match=r"cannot change objective.derivative: it is jvp, got dde"):
        Trainer(config(other), tmp_path / "run", resume=True)
    harmless = config(steps=9, checkpoint_every=3, keep=7, log_every=2, sample_every=5)
    Trainer(harmless, tmp_path / "run", resume=True)


def test_other_data_than_the_runs_are_refused(tmp_path) -> None:
    Trainer(config(steps=1), tmp_path / "run").train()
    with pytest.raises(ValueError, match=r"data now hold 20 images, those of .* were 1500"):
        Trainer(config(steps=2), tmp_path / "run", resume=True, dataset=noise(20))


def test_data_must_fit_the_model(tmp_path) -> None:
    images = np.zeros((4, 3, 8, 8), np.float32)
    dataset = ArrayDataset(images, np.zeros(4), num_classes=1)
    with pytest.raises(ValueError, match=r"model.input_size\] = \[1, 8, 8\], got \[3, 8, 8\]"):
        Trainer(config(), tmp_path / "run", dataset=dataset)
    assert not (tmp_path / "run").exists()


def test_the_model_has_room_for_all_classes(tmp_path) -> None:
    trainer = Trainer(config(), tmp_path / "run", dataset=noise(20, classes=12))
    assert trainer.model.config.num_classes == 12
    assert RunConfig.load(tmp_path / "run" / "config.yaml").model.num_classes == 12
    Trainer(config(), tmp_path / "run", dataset=noise(20, classes=12), resume=True)


def test_text_models_need_captions(tmp_path) -> None:
    text = dataclasses.replace(MODEL, num_classes=None, cap_feat_dim=8)
    with pytest.raises(ValueError, match="a text model needs data with captions"):
        Trainer(dataclasses.replace(config(), model=text), tmp_path / "run")


def noise(count: int, classes: int = 10, bad: tuple[int, ...] = ()) -> ArrayDataset:
    """Images of noise; those numbered in `bad` are not finite."""
    images = np.random.default_rng(0).standard_normal((count, 1, 8, 8)).astype(np.float32)
    images[list(bad)] = np.nan
    return ArrayDataset(images, np.arange(count) % classes, num_classes=classes)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path) -> None:
    trainer = Trainer(config(steps=6), tmp_path / "run", dataset=noise(24, bad=(5,)))
    bad_steps = [s for s in range(6) if 5 in trainer.order.indices(s)]
    assert len(bad_steps) == 2
    changed = []
    step = trainer.train_step

    def watched(batch: Batch) -> torch.Tensor:
        before = weights(trainer)
        values = step(batch)
        changed.append(not same(before, weights(trainer)))
        return values

    trainer.train_step = watched
    trainer.train()
    assert changed == [s not in bad_steps for s in range(6)]
    assert trainer.skipped == 2
    assert all(torch.isfinite(p).all() for p in weights(trainer))
    log = [record for record in records(tmp_path / "run") if "denoising" in record]
    assert [r["denoising"] is None for r in log] == [s in bad_steps for s in range(6)]
    assert log[-1]["skipped_steps"] == 2
    assert Trainer(config(steps=6), tmp_path / "run", dataset=noise(24), resume=True).skipped == 2


def test_a_gradient_that_is_not_finite_skips_the_step_too(tmp_path) -> None:
    trainer = Trainer(config(steps=1), tmp_path / "run")
    handle = trainer.parameters[0].register_hook(lambda g: torch.full_like(g, torch.inf))
    before = weights(trainer)
    trainer.train()
    handle.remove()
    assert trainer.skipped == 1
    assert same(before, weights(trainer)[: len(before)])


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path) -> None:
    dataset = noise(24, bad=tuple(range(24)))
    trainer = Trainer(config(steps=50, max_bad_steps=3), tmp_path / "run", dataset=dataset)
    with pytest.raises(
        TrainingStopped, match=r"stopped at step 3: .* not finite in 3 steps in a row"
    ):
        trainer.train()
    assert records(tmp_path / "run")[-1]["event"] == "stopped"
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_between_reads_the_limit_is_checked_late_but_not_forgotten(tmp_path) -> None:
    """Good steps after the streak do not hide it."""
    run = config(steps=200, log_every=1000, checkpoint_every=1000, max_bad_steps=3)
    trainer = Trainer(run, tmp_path / "run")
    step = trainer.train_step

    def some_are_bad(batch: Batch) -> torch.Tensor:
        scale = torch.nan if trainer.step in (5, 6, 7, 30) else 1.0
        return step(batch._replace(x=scale * batch.x))

    trainer.train_step = some_are_bad
    with pytest.raises(TrainingStopped, match=r"not finite in 3 steps in a row"):
        trainer.train()
    assert trainer.step == READ_EVERY
    assert records(tmp_path / "run")[-1]["event"] == "stopped"


def test_skipped_steps_are_all_counted_between_reads(tmp_path) -> None:
    trainer = Trainer(config(steps=8, log_every=8), tmp_path / "run")
    step = trainer.train_step

    def some_are_bad(batch: Batch) -> torch.Tensor:
        scale = torch.nan if trainer.step in (0, 3, 4) else 1.0
        return step(batch._replace(x=scale * batch.x))

    trainer.train_step = some_are_bad
    trainer.train()
    log = records(tmp_path / "run")[-1]
    assert log["skipped_steps"] == trainer.skipped == 3 and log["denoising"] > 0
    again = Trainer(config(steps=8, log_every=8), tmp_path / "run", resume=True)
    assert again.skipped == 3 and same(weights(again), weights(trainer))


def test_resuming_after_a_skipped_step_continues_bit_for_bit(tmp_path) -> None:
    dataset, values = noise(24, bad=(5,)), {"steps": 8, "schedule": "cosine"}
    whole = Trainer(config(**values), tmp_path / "whole", dataset=dataset)
    whole.train()
    bad = [s for s in range(8) if 5 in whole.order.indices(s)]
    assert whole.skipped == len(bad) == 3
    stopped = Trainer(config(checkpoint_every=1, **values), tmp_path / "run", dataset=dataset)
    stop_after(stopped, bad[1] + 2)
    resumed = Trainer(config(**values), tmp_path / "run", dataset=dataset, resume=True)
    assert resumed.step == bad[1] + 2 and resumed.skipped == 2
    resumed.train()
    assert same(weights(whole), weights(resumed)) and resumed.skipped == 3


def test_a_streak_of_bad_steps_leaves_the_good_checkpoints(tmp_path) -> None:
    run = tmp_path / "run"
    base = config(steps=3, checkpoint_every=1, keep=2, max_bad_steps=5)
    Trainer(base, run, dataset=noise(24)).train()
    longer = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=20))
    bad = noise(24, bad=tuple(range(24)))
    # The second time: the streak does not go on where the first process gave up.
    for _ in range(2):
        trainer = Trainer(longer, run, dataset=bad, resume=True)
        with pytest.raises(TrainingStopped, match=r"stopped at step 8: .* 5 steps in a row"):
            trainer.train()
        assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["00000002", "00000003"]


def test_the_step_after_a_bad_one_is_saved_instead(tmp_path) -> None:
    trainer = Trainer(config(steps=5, checkpoint_every=2, keep=9), tmp_path / "run")
    step = trainer.train_step

    def some_are_bad(batch: Batch) -> torch.Tensor:
        scale = torch.nan if trainer.step in (1, 4) else 1.0
        return step(batch._replace(x=scale * batch.x))

    trainer.train_step = some_are_bad
    trainer.train()
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["00000003", "00000004", "00000005"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path) -> None:
    trainer = Trainer(config(steps=5, checkpoint_every=1), tmp_path / "run")
    step = trainer.train_step

    def overflow(batch: Batch) -> torch.Tensor:
        values = step(batch)
        if trainer.step == 3:
            trainer.parameters[0].data.view(-1)[0] = torch.inf
        return values

    trainer.train_step = overflow
    with pytest.raises(TrainingStopped, match="stopped at step 3: the weights are not finite"):
        trainer.train()
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "00000002"


def squared_error(model, x, z, y, **others):
    """A loss without random times, so that parts of a batch can be compared with the whole."""
    t = torch.full((len(x),), 0.5)
    error = (model(x, t, t, torch.zeros_like(y)) - x).square().flatten(1).mean(1)
    return SimpleNamespace(loss=error.mean(), denoising=error, projection=torch.zeros(()))


def replaced_loss(function):
    """The function in the place of a TransitionLoss, with its times."""
    times = TransitionLoss(transport=transports.get("ot_fm")).draw_times
    return type(
        "Loss", (), {"draw_times": staticmethod(times), "__call__": staticmethod(function)}
    )()


def test_accumulation_is_the_mean_over_the_whole_batch(tmp_path) -> None:
    gradients, values = [], []
    for accumulate in (1, 4):
        trainer = Trainer(config(accumulate=accumulate, clip_norm=0.0), tmp_path / str(accumulate))
        trainer.training_step.loss = replaced_loss(squared_error)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in trainer.parameters:
                p.add_(0.1 * torch.randn_like(p))
        batch = trainer.dataset.batch(np.arange(8), np.random.default_rng(0))
        values.append(trainer.train_step(batch).tolist())
        gradients.append([p.grad for p in trainer.parameters if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0][VALUES.index("grad_norm")] > 0


def test_clipping(tmp_path) -> None:
    norms = {}
    for clip in (0.0, 1e-3):
        trainer = Trainer(config(clip_norm=clip), tmp_path / str(clip))
        trainer.training_step.loss = replaced_loss(squared_error)
        batch = trainer.dataset.batch(np.arange(8), np.random.default_rng(0))
        reported = trainer.train_step(batch)[VALUES.index("grad_norm")].item()
        gradients = [p.grad for p in trainer.parameters if p.grad is not None]
        norms[clip] = reported, torch.nn.utils.get_total_norm(gradients).item()
    assert norms[0.0][0] == norms[0.0][1] == pytest.approx(norms[1e-3][0]) and norms[0.0][0] > 0.1
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


def test_labels_are_dropped_at_the_configured_rate(tmp_path) -> None:
    model = dataclasses.replace(MODEL, class_dropout_prob=0.25)
    base = config(batch_size=400)
    trainer = Trainer(dataclasses.replace(base, model=model), tmp_path / "run")
    seen = []

    def spy(model, x, z, y, *, null, y_guidance, **others):
        seen.append((y, y_guidance, null))
        return squared_error(model, x, z, y)

    trainer.training_step.loss = replaced_loss(spy)
    batch = trainer.dataset.batch(np.arange(400), np.random.default_rng(0))
    trainer.train_step(batch)
    trainer.train_step(batch)
    for y, y_guidance, null in seen:
        assert (null == 10).all() and y_guidance.equal(batch.y)
        dropped = y == 10
        assert 0.17 < dropped.float().mean() < 0.33
        assert y[~dropped].equal(batch.y[~dropped])
    assert not seen[0][0].equal(seen[1][0])


def test_features_from_an_encoder_add_the_projection_loss(tmp_path) -> None:
    model = dataclasses.replace(MODEL, z_dim=6)
    base = config(objective=ObjectiveConfig(projection_weight=0.5))
    trainer = Trainer(
        dataclasses.replace(base, model=model),
        tmp_path / "run",
        encoder=lambda x, y: torch.ones(len(x), 16, 6),
    )
    trainer.train()
    log = [record for record in records(tmp_path / "run") if "projection" in record]
    assert log[-1]["projection"] < log[0]["projection"]
    assert trainer.model.projector[0].weight.grad.abs().sum() > 0


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'tpuu'"):
        pick_device("tpuu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            pick_device("cuda")


def test_unreadable_images_are_reported_once(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("images")
    folder.mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i:02}.png")
    for name in ("03.png", "08.png"):
        (folder / name).write_bytes(b"no image")
    data = dataclasses.replace(
        config().data, kind="folder", path=str(folder), image_size=8, channels=1, flip=0.5
    )
    base = dataclasses.replace(config(steps=4), data=data)
    Trainer(base, tmp_path / "run").train()
    lines = (tmp_path / "run" / "skipped_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["03.png", "08.png"]
    assert all("UnidentifiedImageError" in line for line in lines)
    events = [r for r in records(tmp_path / "run") if r.get("event") == "skipped_files"]
    assert sorted(name for event in events for name in event["files"]) == ["03.png", "08.png"]
    assert events[-1]["count"] == 2
    # The saved path does not depend on where the run was started.
    assert RunConfig.load(tmp_path / "run" / "config.yaml").data.path == str(tmp_path / "images")
    longer = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=6))
    Trainer(longer, tmp_path / "run", resume=True).train()
    again = [r for r in records(tmp_path / "run") if r.get("event") == "skipped_files"]
    assert again == events
