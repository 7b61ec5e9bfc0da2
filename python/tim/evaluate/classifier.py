"""Quality of a run's samples against the number of steps: quality.json and quality.png."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tim.config import RunConfig
from tim.data import Dataset, build_dataset
from tim.evaluate.report import not_better
from tim.evaluate.store import write_whole
from tim.frechet import Classifier, frechet_distance, train_classifier

#: Images a classifier is trained on and samples are compared with, at most.
MAX_IMAGES = 10_000


@dataclass(frozen=True)
class Quality:
    """Frechet distances to held-out real images, and what to read them against."""

    run: str
    step: int
    seed: int
    samples: int
    held_out: int
    cfg_scale: float
    classifier_accuracy: float
    """Of the classifier whose features are used, on held-out real images."""
    real: float
    """Distance of real training images to the held-out ones: the floor."""
    noise: float
    """Distance of Gaussian noise to them: the ceiling."""
    steps: tuple[int, ...]
    distance: tuple[float, ...]
    """Distance of the samples, for each number of steps."""
    agreement: tuple[float, ...]
    """Share of samples that the classifier takes for the class that was asked for."""

    def not_better(self) -> list[tuple[int, int]]:
        """Pairs of neighbouring step counts at which more steps did not lower the distance."""
        return not_better(self.steps, self.distance)


def classifier_quality(
    run: str | os.PathLike,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    samples: int | None = None,
    seed: int = 0,
    cfg_scale: float | None = None,
    device: str = "auto",
) -> Quality:
    """Sample a run's averaged model at several step counts and measure each set of samples.

    A small classifier is trained on the run's real training images; its penultimate layer gives the
    features (`tim.frechet`). Samples have the labels of training images and share their noise over
    all step counts. Writes quality.json and quality.png into the run directory.

    Args:
        run: run directory of `tim train`.
        steps: step counts.
        samples: images per step count; as many as there are training images when None.
        seed: of the noise, the classifier and the choice of images.
        cfg_scale: guidance; the run's own setting when None.
        device: for the sampler: auto, cpu, cuda or cuda:N.

    Raises:
        FileNotFoundError: no such run, or it has no checkpoint yet.
        ValueError: steps or samples are not positive, or the data have a single class or no
            held-out part.
    """
    import tim
    from tim.checkpoint import latest_checkpoint
    from tim.parallel import pick_device

    run = Path(run)
    steps = tuple(steps)
    if not steps or min(steps) < 1:
        raise ValueError(f"steps must be positive, got {list(steps)}")
    if samples is not None and samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    config = RunConfig.load(run / "config.yaml")
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet")
    train, held_out = (build_dataset(config.data, split) for split in ("train", "test"))
    if train.num_classes < 2:
        raise ValueError(f"{run}: the data have one class; the classifier needs at least two")
    device = pick_device(device)
    model = tim.load(run, device=device)
    x, y = everything(train, seed)
    x_held_out, y_held_out = everything(held_out, seed)

    classifier = train_classifier(x, y, train.num_classes, seed=seed)
    reference = classifier.features(x_held_out)
    count = len(x) if samples is None else samples
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *train.shape, generator=generator)
    labels = y[torch.arange(count) % len(y)]
    scale = config.sample.cfg_scale if cfg_scale is None else cfg_scale

    distances, agreements = [], []
    for number in steps:
        images = sample_all(model, config, labels, noise, number, scale)
        # The features see what a person sees: pixels that were rounded and clipped.
        images = train.decode(images).movedim(-1, 1).float() / 127.5 - 1
        distances.append(frechet_distance(classifier.features(images), reference))
        agreements.append(classifier.accuracy(images, labels))
    quality = Quality(
        run=str(run),
        step=int(checkpoint.name),
        seed=seed,
        samples=count,
        held_out=len(x_held_out),
        cfg_scale=scale,
        classifier_accuracy=classifier.accuracy(x_held_out, y_held_out),
        real=frechet_distance(classifier.features(x), reference),
        noise=noise_distance(classifier, noise, reference),
        steps=steps,
        distance=tuple(distances),
        agreement=tuple(agreements),
    )
    write(quality, run)
    return quality


def noise_distance(classifier: Classifier, noise: Tensor, reference: Tensor) -> float:
    return frechet_distance(classifier.features(noise.clamp(-1, 1)), reference)


def everything(dataset: Dataset, seed: int) -> tuple[Tensor, Tensor]:
    """All images and labels of a data set, or MAX_IMAGES of them chosen at random."""
    rng = np.random.default_rng(seed)
    indices = np.arange(len(dataset))
    if len(indices) > MAX_IMAGES:
        indices = np.sort(rng.choice(indices, MAX_IMAGES, replace=False))
    batch = dataset.batch(indices, rng)
    return batch.x, batch.y


def sample_all(
    model: torch.nn.Module,
    config: RunConfig,
    labels: Tensor,
    noise: Tensor,
    steps: int,
    cfg_scale: float,
    batch_size: int = 512,
) -> Tensor:
    """Samples [N, C, H, W] on the CPU for labels [N] and noise [N, C, H, W]."""
    import tim

    device = next(model.parameters()).device
    transport = config.transport.build()
    parts = []
    for y, z in zip(labels.split(batch_size), noise.split(batch_size), strict=True):
        null = model.null_condition(len(y)) if cfg_scale > 1 else None
        part = tim.sample(
            model,
            y.to(device),
            z.to(device),
            steps=steps,
            transport=transport,
            cfg_scale=cfg_scale,
            cfg_interval=config.sample.cfg_interval,
            null=null,
            **config.objective.schedule(*z.shape[2:]),
        )
        parts.append(part.cpu())
    return torch.cat(parts)


def write(quality: Quality, folder: Path) -> None:
    """quality.json and quality.png in `folder`, each whole or not at all."""
    text = json.dumps(asdict(quality), indent=1) + "\n"
    write_whole(folder / "quality.json", lambda path: path.write_text(text))
    picture = plot(quality)
    write_whole(folder / "quality.png", lambda path: picture.savefig(path, dpi=120, format="png"))


def plot(quality: Quality):
    """Figure of distance against steps between floor and ceiling, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.loglog(quality.steps, quality.distance, "o-", color="#1f6feb", label="samples")
    for level, label, color in (
        (quality.noise, "noise", "#b62324"),
        (quality.real, "real training images", "#1a7f37"),
    ):
        axes.axhline(level, linestyle="--", color=color, label=label)
    for steps, distance in zip(quality.steps, quality.distance, strict=True):
        axes.annotate(
            f"{distance:.2f}", (steps, distance), (0, 7), textcoords="offset points", ha="center"
        )
    axes.set_xticks(quality.steps, [str(steps) for steps in quality.steps])
    axes.minorticks_off()
    axes.set_xlabel("sampling steps (network calls)")
    axes.set_ylabel("Fréchet distance to held-out real images")
    axes.set_title(f"{quality.samples} samples, model of step {quality.step}")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
