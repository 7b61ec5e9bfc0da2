"""Samples of a network against reference images, in the features of Inception."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tim.config import RunConfig
from tim.data import Dataset, build_dataset
from tim.evaluate.clip import ClipScore
from tim.evaluate.generator import Conditions, Generator, GeneratorSettings, open_generator
from tim.evaluate.job import Networks, draw, reference_statistics, score
from tim.evaluate.networks import Imported, feature_network, feature_width
from tim.evaluate.reference import DatasetImages, Reference, open_reference
from tim.evaluate.report import ImageQuality
from tim.evaluate.scores import (
    INCEPTION_SPLITS,
    METRICS,
    check_counts,
    check_torchmetrics,
)
from tim.evaluate.store import Shards, write_samples

#: Samples where none are asked for; what FID is reported with.
SAMPLES = 50_000
_CHUNK = 256


def image_quality(
    source: str | Path,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    samples: int = SAMPLES,
    features: str = "inception",
    metrics: Sequence[str] | None = None,
    reference: str | Path | None = None,
    split: str | None = None,
    reference_images: int | None = None,
    prompts: Sequence[str] | None = None,
    logits: str | None = None,
    clip: str | None = None,
    npz: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    settings: GeneratorSettings | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    progress: bool = False,
) -> ImageQuality:
    """Sample a network at several step counts and score each set of samples.

    All step counts start from the same noise. Writes evaluation.json and evaluation.png into `out`
    after each of them, and goes on where a killed call with the same arguments stopped.

    Args:
        source: run directory, or anything else that `tim.load` or a pipeline reads.
        steps: step counts.
        samples: pictures per step count.
        features: "inception", or package.module:attribute, a network called with RGB [B, 3, H, W]
            in [0, 1].
        metrics: which of fid, kid, precision, recall. None: all that the reference allows. An empty
            one needs no reference.
        reference: .npz file or folder (`tim.evaluate.reference`). None: the data of the run.
        split: of the run's data, "train" or "test". None: the held-out part, if there is one.
        reference_images: compare with so many of them at most.
        prompts: for a text model, in turn. None: the captions of the run's data.
        logits: package.module:attribute, a classifier called likewise, for the Inception Score.
        clip: model of transformers for the CLIP score of a text model.
        npz: also write samples-steps-N.npz, as other suites read them.
        seed: of the noise and of the subsets of KID.
        batch_size: pictures sampled at a time.
        settings: of the sampler.
        out: folder; `evaluation` in the run directory when None.
        device: auto, cpu, cuda or cuda:N.
        progress: show a bar.

    Raises:
        ImportError: a package is missing (names the extra).
        FileNotFoundError, TypeError, ValueError: an argument does not fit, or there are too few
            images; before anything is sampled.
    """
    from tim.parallel import pick_device

    steps, asked = tuple(sorted(set(steps))), metrics
    metrics = METRICS if asked is None else tuple(metrics)
    _check(steps, samples, metrics, batch_size, logits, clip)
    where = pick_device(device)
    run = Path(source) if (Path(source) / "config.yaml").is_file() else None
    folder = Path(out) if out is not None else (run / "evaluation" if run is not None else None)
    if folder is None:
        raise ValueError("out is missing: where are the results to go? (source is no run)")
    if metrics:
        check_torchmetrics()
    networks = Networks(
        feature_network(features).to(where) if metrics else None,
        Imported(logits, "logits").to(where) if logits else None,
        ClipScore.load(clip, device=where) if clip else None,
    )
    config = RunConfig.load(run / "config.yaml") if run is not None else None
    generator = open_generator(source, settings or GeneratorSettings(), where)
    if (clip or prompts is not None) and generator.num_classes is not None:
        what = "the CLIP score needs prompts" if clip else "prompts need a text model"
        raise ValueError(f"{what}, {source} takes class labels")
    known = None
    if metrics:
        known = _reference(source, config, reference, split, reference_images, generator.size)
        if asked is None and known.images is None:
            metrics = ("fid",)
        _check_reference(known, feature_width(networks.features, generator.size), metrics, samples)
    conditions = _conditions(source, config, generator, samples, prompts, reference)
    generator.check(conditions)
    quality = ImageQuality(
        source=str(source),
        features=features,
        reference=known.name if known else None,
        reference_images=len(known.images) if known and known.images else None,
        samples=samples,
        seed=seed,
        cfg_scale=generator.cfg_scale,
        settings=_digest(
            generator=generator.identity,
            conditions=conditions,
            reference=known.identity if known else None,
            networks=[features, logits, clip],
            metrics=metrics,
            numbers=[samples, seed, batch_size],
        ),
    )
    before = ImageQuality.read(folder)
    if before is not None and before.settings == quality.settings:
        quality.rows, quality.npz = before.rows, before.npz
    statistics = None
    for count in steps:
        file = folder / f"samples-steps-{count}.npz"
        if count in quality.rows and (not npz or (count in quality.npz and file.is_file())):
            continue
        if known is not None and statistics is None:
            statistics = reference_statistics(
                known, features, networks.features, metrics, folder, batch_size, progress
            )
        name = f"{quality.settings}-{count}{'-images' if npz else ''}"
        shards = Shards(folder / "unfinished" / name, samples)
        draw(generator, networks, conditions, count, shards, seed, batch_size, npz, progress)
        if npz:
            shape = (samples, *next(shards.read("images")).shape[1:])
            write_samples(file, shape, shards.read("images"))
            quality.npz = sorted({*quality.npz, count})
        quality.rows[count] = score(shards, networks, statistics, metrics, seed)
        quality.write(folder)
        shards.discard()
    with contextlib.suppress(OSError):
        (folder / "unfinished").rmdir()
    return quality


def _digest(**about: Any) -> str:
    """Changes when any of the values does."""
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(
    steps: tuple[int, ...],
    samples: int,
    metrics: tuple[str, ...],
    batch_size: int,
    logits: str | None,
    clip: str | None,
) -> None:
    if not steps or steps[0] < 1:
        raise ValueError(f"steps must be positive, got {list(steps)}")
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(unknown)}")
    if not (metrics or logits or clip):
        raise ValueError("there is nothing to measure: give metrics, logits or clip")
    if logits:
        check_torchmetrics()
        if samples < INCEPTION_SPLITS:
            raise ValueError(
                f"samples must be at least {INCEPTION_SPLITS} for the Inception Score, "
                f"got {samples}"
            )


def _conditions(
    source: str | Path,
    config: RunConfig | None,
    generator: Generator,
    samples: int,
    prompts: Sequence[str] | None,
    reference: str | Path | None,
) -> Conditions:
    """A label or prompt for each sample: those of the run's data where these are the reference,
    or the prompts or classes in turn."""
    if prompts is not None:
        if not prompts:
            raise ValueError("prompts must not be empty")
        return [prompts[i % len(prompts)] for i in range(samples)]
    if generator.num_classes is None:
        if config is None:
            raise ValueError(f"prompts is missing: {source} is a text model")
    elif config is None or reference is not None:
        return [i % generator.num_classes for i in range(samples)]
    dataset = _data(config, "train")
    count = len(dataset)
    rows = np.arange(samples) % count
    if samples < count:
        rows = np.arange(samples) * count // samples
    if isinstance(labels := getattr(dataset, "labels", None), Tensor):
        return labels[torch.from_numpy(rows)].tolist()
    found: list[Any] = []
    for part in np.array_split(rows, -(-samples // _CHUNK)):
        y = dataset.batch(part, np.random.default_rng(0)).y
        found += y.tolist() if isinstance(y, Tensor) else y
    return found


def _data(config: RunConfig, split: str) -> Dataset:
    return build_dataset(dataclasses.replace(config.data, flip=0.0), split)


def _reference(
    source: str | Path,
    config: RunConfig | None,
    path: str | Path | None,
    split: str | None,
    limit: int | None,
    size: tuple[int, int],
) -> Reference:
    if limit is not None and limit < 1:
        raise ValueError(f"reference_images must be at least 1, got {limit}")
    if path is not None:
        if split is not None:
            raise ValueError("split is of the run's data: give it or reference, not both")
        return open_reference(path, size, limit)
    if config is None or config.data.kind == "latents":
        raise ValueError(
            f"reference is missing: {source} has no images to compare with; give an .npz file or "
            "a folder"
        )
    if split is None:
        split = "test"
        try:
            dataset = _data(config, split)
        except (ValueError, FileNotFoundError):  # there is no held-out part
            split = "train"
            dataset = _data(config, split)
    else:
        dataset = _data(config, split)
    if dataset.shape[1:] != size:
        raise ValueError(
            f"the run's images are of {dataset.shape[1]} x {dataset.shape[2]} pixels and samples "
            f"of {size[0]} x {size[1]}: give a reference of that size"
        )
    images = DatasetImages(dataset, limit, (config.data.kind, config.data.path, split))
    return Reference(f"{split} images of the run", images.identity, images)


def _check_reference(
    reference: Reference, width: int, metrics: tuple[str, ...], samples: int
) -> None:
    """ValueError when metrics of `width` features cannot be computed from reference or samples."""
    if reference.images is None and (lacking := [m for m in metrics if m != "fid"]):
        raise ValueError(
            f"reference {reference.name} holds mu and sigma only, which tell nothing of "
            f"{', '.join(lacking)}: give --metrics fid"
        )
    if reference.mean is not None and len(reference.mean) != width:
        raise ValueError(
            f"reference {reference.name}: mu must have the {width} features of the network, "
            f"got {len(reference.mean)}"
        )
    check_counts(metrics, "samples", samples, width)
    if reference.images is not None:
        of_images = tuple(m for m in metrics if m != "fid" or reference.mean is None)
        check_counts(of_images, "reference images", len(reference.images), width)
