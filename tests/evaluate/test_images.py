import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")

import tim
from scoring_networks import Features
from tim.config import RunConfig
from tim.data.digits import digits
from tim.evaluate import image_quality, job
from tim.evaluate.generator import GeneratorSettings, noise_of
from tim.evaluate.images import METRICS
from tim.evaluate.report import ImageQuality
from tim.evaluate.scores import Statistics, scores
from tim.trainer import Trainer
from tiny_runs import config

FEATURES = "scoring_networks:Features"
SMALL = {"features": FEATURES, "samples": 40, "steps": (1, 2), "batch_size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "run"
    Trainer(config(), folder).train()
    return folder


def as_features(pixels) -> torch.Tensor:
    """Of uint8 [B, H, W, C]."""
    x = torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 255
    return Features()(x.expand(-1, 3, -1, -1))


def test_scores_are_those_of_the_samples_of_the_run(run, tmp_path):
    quality = image_quality(run, **SMALL, out=tmp_path, npz=True)
    assert quality.steps == [1, 2] and quality.metrics == list(METRICS)
    assert quality.reference == "test images of the run" and quality.reference_images == 297

    saved = RunConfig.load(run / "config.yaml")
    labels = digits("train").labels[np.arange(40) * 1500 // 40]
    x = tim.sample(
        tim.load(run), labels, noise_of(0, range(40), (1, 8, 8)), steps=2,
        transport=saved.transport.build(),
    )  # fmt: skip
    pixels = (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    written = np.load(tmp_path / "samples-steps-2.npz")["arr_0"]
    assert written.shape == (40, 8, 8, 3)
    # Batches of 16 and of 40 round differently.
    difference = torch.from_numpy(written[..., 0]).int() - pixels[:, 0].int()
    assert difference.abs().max() <= 1

    held_out = (digits("test").images * 127.5 + 127.5).round().permute(0, 2, 3, 1)
    expected = scores(Statistics(as_features(held_out)), as_features(written), METRICS)
    assert quality.rows[2] == pytest.approx(expected, rel=1e-3)
    assert ImageQuality.read(tmp_path) == quality
    names = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("reference-"))
    assert names == [
        "evaluation.json", "evaluation.png", "samples-steps-1.npz", "samples-steps-2.npz",
    ]  # fmt: skip


def test_what_was_written_can_be_the_reference(run, tmp_path):
    image_quality(run, **SMALL, out=tmp_path / "a", npz=True)
    file = tmp_path / "a" / "samples-steps-1.npz"
    own = image_quality(run, **{**SMALL, "seed": 0}, out=tmp_path / "b", reference=file)
    # Labels are the classes in turn here, so they are not quite the same samples.
    assert own.rows[1]["fid"] < own.rows[2]["fid"]
    assert own.reference_images == 40


def test_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tim.evaluate.store.SHARD", 16)
    monkeypatch.setattr("tim.evaluate.images.Shards", lambda f, n: job.Shards(f, n, 16))
    whole = image_quality(run, **SMALL, out=tmp_path / "whole")
    drawn, limit, real_noise = [], 4, noise_of

    def noise(seed, indices, shape):
        if len(drawn) == limit:
            raise RuntimeError("killed")
        drawn.append(list(indices))
        return real_noise(seed, indices, shape)

    monkeypatch.setattr(job, "noise_of", noise)
    with pytest.raises(RuntimeError, match="killed"):
        image_quality(run, **SMALL, out=tmp_path / "killed")
    partial = json.loads((tmp_path / "killed" / "evaluation.json").read_text())
    assert [row["steps"] for row in partial["rows"]] == [1]
    drawn, limit = [], None
    again = image_quality(run, **SMALL, out=tmp_path / "killed")
    # One part of two steps was there: two are left.
    assert drawn == [list(range(16, 32)), list(range(32, 40))]
    assert again == whole
    assert not (tmp_path / "killed" / "unfinished").exists()
    drawn = []
    assert image_quality(run, **SMALL, out=tmp_path / "killed") == whole and drawn == []
    more = image_quality(run, **{**SMALL, "steps": (4,)}, out=tmp_path / "killed")
    assert more.steps == [1, 2, 4] and more.rows[1] == whole.rows[1]
    other = image_quality(run, **{**SMALL, "seed": 1, "steps": (1,)}, out=tmp_path / "killed")
    assert other.steps == [1] and other.rows[1] != whole.rows[1]


def test_new_weights_are_measured_anew(run, tmp_path):
    first = image_quality(run, **SMALL, out=tmp_path)
    file = next(run.rglob("ema.safetensors"))
    times = file.stat()
    try:
        import os

        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
        assert image_quality(run, **SMALL, out=tmp_path).settings != first.settings
    finally:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_inception_score_alone_needs_no_reference(run, tmp_path):
    options = {**SMALL, "metrics": (), "logits": "scoring_networks:Logits", "out": tmp_path}
    quality = image_quality(run, **options)
    assert quality.metrics == ["inception_score"] and quality.reference is None
    assert all(1 <= row["inception_score"] <= 4 for row in quality.rows.values())


def test_moments_give_fid_alone(run, tmp_path):
    real = as_features((digits("test").images * 127.5 + 127.5).round().permute(0, 2, 3, 1)).double()
    file = tmp_path / "moments.npz"
    np.savez(file, mu=real.mean(0), sigma=real.T.cov())
    given = image_quality(run, **SMALL, out=tmp_path / "a", reference=file)
    assert given.metrics == ["fid"] and given.reference_images is None
    with pytest.raises(ValueError, match="mu and sigma only, which tell nothing of kid"):
        image_quality(run, **SMALL, out=tmp_path, reference=file, metrics=("fid", "kid"))
    np.savez(file, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="mu must have the 6 features of the network, got 5"):
        image_quality(run, **SMALL, out=tmp_path, reference=file)


def test_latents_have_no_images_to_compare_with(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    saved = RunConfig.load(folder / "config.yaml")
    latents = dataclasses.replace(saved.data, kind="latents", path=str(tmp_path))
    dataclasses.replace(saved, data=latents).save(folder / "config.yaml")
    with pytest.raises(ValueError, match=r"reference is missing: .* has no images to compare"):
        image_quality(folder, **SMALL)


def test_noise_is_that_of_the_number_of_a_picture():
    shape = (2, 3, 3)
    noise = noise_of(5, range(6), shape)
    assert noise.dtype == torch.float32 and noise_of(5, [4], shape).equal(noise[4:5])
    assert not noise_of(6, range(6), shape).equal(noise)
    large = noise_of(0, range(2000), (1, 4, 4))
    assert abs(large.mean()) < 0.03 and abs(large.std() - 1) < 0.03


def test_bad_input(run, tmp_path, monkeypatch):
    def told(match, error=ValueError, source=run, **options):
        with pytest.raises(error, match=match):
            image_quality(source, **{**SMALL, "out": tmp_path / "none", **options})
        assert not (tmp_path / "none").exists()

    told("steps must be positive", steps=(0, 1))
    told("samples must be at least 1, got 0", samples=0)
    told("samples must be at least 7 for fid: the covariance of 6 features, got 6", samples=6)
    told("samples must be at least 4 for precision, got 3", samples=3, metrics=("precision",))
    told("reference images must be at least 7 for fid", reference_images=5)
    told("metrics must be of fid, kid, precision, recall, got sfid", metrics=("sfid",))
    told("there is nothing to measure", metrics=())
    told("samples must be at least 10 for the Inc", samples=9, logits="scoring_networks:Logits")
    told("prompts need a text model", prompts=["a cat"])
    told("split is of the run's data", split="train", reference=tmp_path)
    told("reference: .* does not exist", FileNotFoundError, reference=tmp_path / "r.npz")
    told("device must be auto", device="tpu")
    told("out is missing", source="GoodEnough/TiM-C2I", out=None)
    with pytest.raises(ValueError, match="cfg_scale must be at least 1"):
        GeneratorSettings(cfg_scale=0.5)
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics", None)
    told(r"FID and KID need torchmetrics: .*transition-models\[eval\]", ImportError)
