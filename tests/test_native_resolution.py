"""Images of several sizes: from encoding to training and sampling."""

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers")
from PIL import Image

from mixed_sizes import MODEL, config, latents_of_several_sizes
from small_encoders import autoencoder_kl
from tim.cli import run
from tim.config import DataConfig
from tim.pipeline import TiMPipeline
from tim.trainer import Trainer
from tiny_runs import same, weights

SIZES = {(8, 8), (10, 6), (6, 10)}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return latents_of_several_sizes(tmp_path_factory.mktemp("native"))


def train(settings, path, **options) -> tuple[Trainer, list]:
    """The trainer, and the sizes of the images of each of its steps."""
    trainer = Trainer(settings, path, **options)
    sizes, load = [], trainer.training_step.load

    def look(batch, step):
        assert all(image.shape[0] == 4 for image in batch.x)
        sizes.append([tuple(image.shape[1:]) for image in batch.x])
        load(batch, step)

    trainer.training_step.load = look
    trainer.train()
    assert trainer.skipped == 0
    return trainer, sizes


@pytest.mark.parametrize("pack", [False, True], ids=["buckets", "packed"])
def test_latents_of_several_sizes_train_and_resume(latents, tmp_path, pack):
    trainer, sizes = train(config(latents, pack), tmp_path / "run")
    assert trainer.step == 6 and {len(step) for step in sizes} == {4}
    assert {size for step in sizes for size in step} == SIZES == set(trainer.dataset.sizes)
    mixed = [len(set(step)) > 1 for step in sizes]
    assert any(mixed) if pack else not any(mixed)
    train(config(latents, pack, steps=3, checkpoint_every=3), tmp_path / "half")
    resumed, rest = train(config(latents, pack), tmp_path / "half", resume=True)
    assert rest == sizes[3:]
    assert same(weights(resumed), weights(trainer))


def budgeted(latents, budget, multiple=1, **train):
    settings = config(latents, True, **train)
    data = dataclasses.replace(settings.data, token_budget=budget, budget_multiple=multiple)
    return dataclasses.replace(settings, data=data)


def test_a_budget_of_tokens_trains_and_resumes(latents, tmp_path):
    """Tokens of 2 x 2 latents: 16 of the squares, 15 of the others."""
    settings = budgeted(latents, 63, batch_size=8)
    trainer, sizes = train(settings, tmp_path / "run")
    tokens = [[h * w // 4 for h, w in step] for step in sizes]
    assert max(map(sum, tokens)) <= 63 and max(map(len, tokens)) == 4
    assert trainer.order.images_per_step == 9 / trainer.order.steps_per_epoch == 3
    assert trainer.training_step.images == 3
    half = budgeted(latents, 63, batch_size=8, steps=2, checkpoint_every=2)
    train(half, tmp_path / "half")
    resumed, rest = train(settings, tmp_path / "half", resume=True)
    assert rest == sizes[2:]
    assert same(weights(resumed), weights(trainer))


def test_each_part_has_its_share_of_a_budget(latents, tmp_path):
    parts = []
    trainer = Trainer(budgeted(latents, 64, 2, batch_size=8, accumulate=2), tmp_path / "run")
    backward = trainer.training_step._backward

    def look(inputs):
        parts.append([image.shape[1] * image.shape[2] // 4 for image in inputs.x])
        return backward(inputs)

    trainer.training_step._backward = look
    trainer.train()
    assert len(parts) == 12 and max(map(sum, parts)) <= 32
    assert all(len(a) == len(b) for a, b in zip(parts[::2], parts[1::2], strict=True))


def test_what_a_budget_needs_is_told(latents, tmp_path):
    for settings, message in (
        (
            budgeted(latents, 15),
            r"data\.token_budget must hold the largest image, 16 tokens, got 15",
        ),
        (budgeted(latents, 64, 1, accumulate=2), r"data\.budget_multiple must be .* 2 times 1 r"),
        (
            budgeted(latents, 64, 3),
            r"data\.budget_multiple must .* divide train\.batch_size = 4, g",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"data\.token_budget needs data\.pack, got 64"):
        DataConfig(kind="latents", path="l", token_budget=64)
    with pytest.raises(ValueError, match=r"data\.token_budget must be at least 1, got 0"):
        DataConfig(kind="latents", path="l", token_budget=0, pack=True)
    with pytest.raises(
        ValueError, match=r"data\.window must be None with data\.token_budget, got 2"
    ):
        DataConfig(kind="latents", path="l", token_budget=64, pack=True, window=2)


def test_packed_batches_in_parts_and_recomputed(latents, tmp_path):
    """What memory forces on a run changes its numbers by rounding only."""
    plain, _ = train(config(latents, True, steps=2, batch_size=8), tmp_path / "plain")
    settings = config(latents, True, steps=2, batch_size=8, gradient_checkpointing=True)
    other, _ = train(settings, tmp_path / "recomputed")
    for a, b in zip(weights(plain), weights(other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    parts, _ = train(config(latents, True, steps=1, batch_size=8, accumulate=2), tmp_path / "parts")
    assert parts.step == 1


def test_a_resumed_run_cannot_change_how_images_are_batched(latents, tmp_path):
    train(config(latents, steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"a resumed run cannot change data\.pack"):
        Trainer(config(latents, True), tmp_path / "run", resume=True)


def test_what_cannot_be_trained_is_told(latents, tmp_path):
    settings = config(latents)
    for changes, message in (
        ({"patch_size": 4}, r"multiples of model\.patch_size 4, got .* x .*: give --patch-size 4"),
        ({"in_channels": 3}, r"must have model\.in_channels = 3 channels, got 4"),
    ):
        model = dataclasses.replace(MODEL, **changes)
        with pytest.raises(ValueError, match=message):
            Trainer(dataclasses.replace(settings, model=model), tmp_path / "run")
    for pack in (False, True):
        with pytest.raises(ValueError, match=r"train\.cuda_graph needs .* of one size, got"):
            Trainer(config(latents, pack, cuda_graph=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"data\.pack needs data\.kind latents, got folder"):
        DataConfig(kind="folder", path="images", pack=True)


def test_samples_of_any_size_and_position_scaling(latents, tmp_path):
    Trainer(config(latents, steps=1), tmp_path / "run").train()
    for size in ("16x16", "44x24"):
        out = tmp_path / f"{size}.png"
        flags = ["--classes", "1", "--steps", "2", "--size", size, "--out", str(out)]
        assert run(["sample", str(tmp_path / "run"), *flags]) == 0
        with Image.open(out) as picture:
            assert picture.size == tuple(map(int, size.split("x")))
    flags = [*flags[:-1], str(tmp_path / "y.png"), "--rope", "yarn"]
    assert run(["sample", str(tmp_path / "run"), *flags]) == 0
    with Image.open(tmp_path / "y.png") as scaled, Image.open(out) as plain:
        assert scaled.size == plain.size


def test_position_scaling_of_a_pipeline(tmp_path):
    torch.manual_seed(0)
    from tim import TiM

    network = TiM(MODEL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = TiMPipeline(network, vae=autoencoder_kl())
    pipe.set_progress_bar_config(disable=True)

    def latents(pipe, size):
        generator = torch.Generator().manual_seed(1)
        return pipe(
            class_labels=1, height=size, width=size, num_inference_steps=1, generator=generator,
            output_type="latent",
        ).images  # fmt: skip

    plain = {size: latents(pipe, size) for size in (16, 32)}
    pipe.set_rope("ntk-aware")
    assert torch.equal(latents(pipe, 16), plain[16])
    assert not torch.equal(latents(pipe, 32), plain[32])
    pipe.set_rope("ntk-aware", train_size=8)
    assert torch.equal(latents(pipe, 32), plain[32])
    pipe.set_rope("linear", train_size=4, decouple=True)
    pipe.save_pretrained(tmp_path)
    back = TiMPipeline.from_pretrained(tmp_path).network.config
    assert (back.rope_scaling, back.rope_train_size, back.rope_decouple) == ("linear", 4, True)
    with pytest.raises(ValueError, match=r"rope_scaling must be one of 'none', .*, got 'cubic'"):
        pipe.set_rope("cubic")
