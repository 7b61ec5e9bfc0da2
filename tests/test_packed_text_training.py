"""Latents of several sizes with captions, packed, through the trainer of a text model."""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image

from mixed_sizes import latents_of_several_sizes
from models.networks import network
from small_encoders import gemma, saved, tokenizer
from tim import ops
from tim.cli import run
from tim.config import RunConfig
from tim.trainer import Trainer

SIZES = {(8, 8), (10, 6), (6, 10)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of tim train on them, and what was told."""
    folder = tmp_path_factory.mktemp("packed-text")
    latents = latents_of_several_sizes(folder, captions=True)
    encoder = saved(folder / "encoder", gemma(), tokenizer())
    sections = {
        "model": {"input-size": 8, "patch-size": 2, "in-channels": 4, "hidden-size": 32, "depth": 2,
                  "num-heads": 2, "encoder-depth": 1, "cap-feat-dim": 16, "z-dim": "None"},
        "data": {"path": latents, "text-encoder": encoder},
        "train": {"steps": 3, "batch-size": 6, "precision": "float32", "device": "cpu"},
        "objective": {"shift-base": 64},
    }  # fmt: skip
    flags = [str(x) for s, v in sections.items() for k, x in v.items() for x in (f"--{s}.{k}", x)]
    flags += ["--data.pack", "--data.token-budget", "80"]
    assert run(["train", "tim-t2i-xl1", "--run", str(folder / "run"), *flags]) == 0
    return folder / "run"


def inputs_of(trained, path, step=0):
    """What a step of the run works on, and its trainer, with weights none of which is silent."""
    config = RunConfig.load(trained / "config.yaml")
    trainer = Trainer(config, path)
    trainer.model.load_state_dict(network(trainer.model.config).state_dict())
    indices = trainer.order.indices(step)
    trainer.training_step.load(trainer.dataset.batch(indices, np.random.default_rng(0)), step)
    return trainer, trainer.training_step.inputs[0]


def test_a_text_preset_trains_and_samples(trained, tmp_path):
    out = tmp_path / "wide.png"
    flags = ["--prompt", "a photo of red", "--size", "20x12", "--steps", "2", "--out", str(out)]
    assert run(["sample", str(trained), *flags]) == 0
    with Image.open(out) as picture:
        assert picture.size == (20, 12)
    config = RunConfig.load(trained / "config.yaml")
    resumed = Trainer(config, trained, resume=True)
    assert resumed.step == 3 and resumed.skipped == 0


def test_captions_meet_their_own_image_only(trained, tmp_path, monkeypatch):
    """Every attention is packed, cross-attention with offsets of images and of captions."""
    trainer, inputs = inputs_of(trained, tmp_path / "run")
    assert set(trainer.dataset.sizes) == SIZES
    assert len({image.shape for image in inputs.x}) > 1
    calls, attention = [], ops.attention

    def look(q, k, v, **options):
        calls.append([options[f"cu_seqlens_{side}"].tolist() for side in "qk"])
        return attention(q, k, v, **options)

    monkeypatch.setattr(ops, "attention", look)
    trainer.training_step.run()
    words = inputs.y.shape[1]
    lengths = [image.shape[1] * image.shape[2] // 4 for image in inputs.x]
    cross = [(q, k) for q, k in calls if q != k]
    assert len(calls) > len(cross) > 0
    for q, k in cross:
        assert k == [i * words for i in range(len(q))]
        assert set(torch.tensor(q).diff().tolist()) <= set(lengths)


def test_a_step_is_the_mean_of_each_image_alone(trained, tmp_path):
    trainer, inputs = inputs_of(trained, tmp_path / "run")
    model, loss = trainer.model.double(), trainer.training_step.loss
    x, z, y, t, r = (
        [v.double() for v in value] if isinstance(value, list) else value.double()
        for value in (inputs.x, inputs.z, inputs.y, inputs.t, inputs.r)
    )
    first = round(loss.diffusion_ratio * len(x))
    assert 0 < first < len(x)
    out = loss(model, x, z, y, t=t, r=r, diffusion=first)
    gradients = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    alone = []
    for i in range(len(x)):
        row = slice(i, i + 1)
        one = loss(
            model, x[i][None], z[i][None], y[row], t=t[row], r=r[row], diffusion=int(i < first)
        )
        torch.testing.assert_close(out.derivative[i], one.derivative[0])
        alone.append(one.loss)
    mean = torch.stack(alone).mean()
    torch.testing.assert_close(out.loss, mean)
    expected = torch.autograd.grad(mean, list(model.parameters()), allow_unused=True)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_the_derivative_is_that_along_the_path(trained, tmp_path):
    trainer, inputs = inputs_of(trained, tmp_path / "run")
    model, loss = trainer.model.double(), trainer.training_step.loss
    x, z = ([v.double() for v in value] for value in (inputs.x, inputs.z))
    y, t, r = (value.double() for value in (inputs.y, inputs.t, inputs.r))
    first = round(loss.diffusion_ratio * len(x))
    out = loss(model, x, z, y, t=t, r=r, diffusion=first)
    step = 1e-5

    @torch.no_grad()
    def at(times):
        alpha, sigma, *_ = loss.transport.interpolant(times)
        return model([a * i + s * n for a, s, i, n in zip(alpha, sigma, x, z, strict=True)],
                     times, r, y)  # fmt: skip

    for i, (more, less) in enumerate(zip(at(t + step), at(t - step), strict=True)):
        if i >= first:
            difference = (more - less) / (2 * step)
            assert difference.abs().max() > 1e-3
            torch.testing.assert_close(out.derivative[i], difference, rtol=1e-5, atol=1e-6)
        else:
            assert out.derivative[i].abs().max() == 0


def test_settings_stay_with_the_run(trained):
    config = RunConfig.load(trained / "config.yaml")
    data = dataclasses.replace(config.data, token_budget=None)
    with pytest.raises(ValueError, match=r"a resumed run cannot change data\.token_budget"):
        Trainer(dataclasses.replace(config, data=data), trained, resume=True)
