"""The work of an evaluation: reference images and samples through the networks."""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tim.evaluate import scores as measures
from tim.evaluate.clip import ClipScore
from tim.evaluate.generator import Conditions, Generator, noise_of
from tim.evaluate.networks import rgb
from tim.evaluate.reference import Reference
from tim.evaluate.scores import Statistics
from tim.evaluate.store import Shards, write_whole


@dataclass(frozen=True)
class Networks:
    """What samples go through."""

    features: nn.Module | None
    logits: nn.Module | None
    clip: ClipScore | None


def reference_statistics(
    reference: Reference,
    name: str,
    network: nn.Module,
    metrics: tuple[str, ...],
    folder: Path,
    batch_size: int,
    progress: bool,
) -> Statistics:
    """What the metrics need to know of the reference. Features of its images are kept in `folder`,
    for the next call too."""
    images = reference.images
    if images is None or (reference.mean is not None and metrics == ("fid",)):
        return Statistics(None, reference.mean, reference.covariance)
    key = hashlib.sha256(repr((images.identity, name)).encode()).hexdigest()[:16]
    file = folder / f"reference-{key}.npy"
    if not file.is_file():
        parts = []
        with progress_bar("reference", len(images), progress) as advance:
            for batch in images.batches(batch_size):
                parts.append(_features(network, batch).numpy())
                advance(len(batch))
        features = np.concatenate(parts)
        write_whole(file, lambda path: _save_array(path, features))
    return Statistics(torch.from_numpy(np.load(file)), reference.mean, reference.covariance)


def draw(
    generator: Generator,
    networks: Networks,
    conditions: Conditions,
    steps: int,
    shards: Shards,
    seed: int,
    batch_size: int,
    keep_images: bool,
    progress: bool,
) -> None:
    """Sample, and fill the shards that are missing with what the networks say of the samples."""
    missing = shards.missing()
    with progress_bar(f"{steps} steps", shards.total, progress) as advance:
        advance(shards.total - sum(len(shards.rows(number)) for number in missing))
        for number in missing:
            rows, arrays = shards.rows(number), defaultdict(list)
            for start in range(rows.start, rows.stop, batch_size):
                batch = range(start, min(start + batch_size, rows.stop))
                given = conditions[batch.start : batch.stop]
                noise = noise_of(seed, batch, generator.noise_shape)
                images = generator(given, noise, steps)
                if networks.features is not None:
                    arrays["features"].append(networks.features(images).float().cpu())
                if networks.logits is not None:
                    arrays["logits"].append(networks.logits(images).float().cpu())
                if networks.clip is not None:
                    arrays["clip"].append(networks.clip(images, given).cpu())
                if keep_images:
                    arrays["images"].append(rgb(images).permute(0, 2, 3, 1).cpu())
                advance(len(batch))
            shards.write(number, {n: torch.cat(parts).numpy() for n, parts in arrays.items()})


def score(
    shards: Shards,
    networks: Networks,
    reference: Statistics | None,
    metrics: tuple[str, ...],
    seed: int,
) -> dict[str, float]:
    """Scores of the samples in the shards, by name."""

    def whole(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate(list(shards.read(name))))

    row: dict[str, float] = {}
    if reference is not None:
        device = next(networks.features.parameters(), torch.empty(0)).device
        row |= measures.scores(reference, whole("features"), metrics, seed=seed, device=device)
    if networks.logits is not None:
        row["inception_score"] = measures.inception_score(whole("logits"), seed=seed)
    if networks.clip is not None:
        row["clip_score"] = whole("clip").double().mean().item()
    return row


def _features(network: nn.Module, images: Tensor) -> Tensor:
    device = next(network.parameters(), images).device
    return network(images.to(device)).float().cpu()


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


@contextlib.contextmanager
def progress_bar(name: str, total: int, show: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr; gives a function to advance it with."""
    if not show:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)
