"""Encoding of the images of a source, shard after shard."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tim.autoencoder import encode
from tim.data.buckets import Size, nearest
from tim.data.dataset import to_float
from tim.data.folder import image_size_of
from tim.data.shards import Index, read_about, shard_path, write_shard
from tim.data.sources import Sample, Source
from tim.repa import FeatureEncoder


@dataclass
class Progress:
    """How far an encoding is."""

    shard: int = 0
    encoded: int = 0
    """Images encoded by this command."""
    kept: int = 0
    """Images in shards that were there."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Names of files left out, with the reason."""


@dataclass(frozen=True)
class Job:
    """Encodes `source` into the shards that `index` describes."""

    source: Source
    index: Index
    vae: nn.Module
    features: FeatureEncoder | None = None
    batch_size: int = 16
    workers: int = 4

    def run(self, folder: Path, report: Callable[[Progress, int], None]) -> Progress:
        """Write the shards that are missing in `folder`.

        `report(progress, images)` is called after each batch, and with images = 0 after each shard.
        """
        progress = Progress()
        with ThreadPoolExecutor(self.workers, "tim-decode") as pool:
            for number in range(self.index.shards):
                path = shard_path(folder, number)
                if path.is_file():
                    about = read_about(path)
                    progress.kept += sum(len(group["names"]) for group in about["groups"].values())
                else:
                    tensors, about = self._shard(number, pool, progress, report)
                    write_shard(path, tensors, about)
                progress.shard = number + 1
                progress.skipped |= about["skipped"]
                report(progress, 0)
        return progress

    def _shard(
        self,
        number: int,
        pool: ThreadPoolExecutor,
        progress: Progress,
        report: Callable[[Progress, int], None],
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        first = number * self.index.shard_size
        samples = self.source.samples[first : first + self.index.shard_size]
        parts: dict[Size, dict[str, list]] = defaultdict(lambda: defaultdict(list))
        skipped: dict[str, str] = {}
        waiting: dict[Size, list[tuple[Sample, np.ndarray, Any]]] = defaultdict(list)
        batches = 0

        def flush(size: Size) -> None:
            nonlocal batches
            group = waiting.pop(size)
            part = parts[size]
            part["names"] += [sample.name for sample, _, _ in group]
            part["conditions"] += [condition for _, _, condition in group]
            pixels = torch.from_numpy(np.stack([pixels for _, pixels, _ in group]))
            seed = _seed(self.index.seed, number, batches)
            for name, tensor in self._encode(to_float(pixels), seed).items():
                part[name].append(tensor)
            batches += 1
            progress.encoded += len(group)
            report(progress, len(group))

        for sample, result in self._decoded(samples, pool):
            if isinstance(result, Exception):
                # Pillow names the stream it was given, which differs from call to call.
                reason = re.sub(r"<\S+ object at 0x\w+>", sample.name, str(result))
                skipped[sample.name] = f"{type(result).__name__}: {' '.join(reason.split())}"
                report(progress, 0)
                continue
            pixels, condition = result
            size = pixels.shape[1:]
            waiting[size].append((sample, pixels, condition))
            if len(waiting[size]) == self.batch_size:
                flush(size)
        for size in sorted(waiting):
            flush(size)
        return self._layout(parts, skipped)

    def _decoded(
        self, samples: list[Sample], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Sample, tuple[np.ndarray, Any] | Exception]]:
        """Pixels and condition of each sample, or why there are none; a few batches ahead."""
        ahead = 2 * self.batch_size
        futures = [pool.submit(self._decode, sample) for sample in samples[:ahead]]
        for i, sample in enumerate(samples):
            if i + ahead < len(samples):
                futures.append(pool.submit(self._decode, samples[i + ahead]))
            yield sample, futures[i].result()
            futures[i] = None  # type: ignore[call-overload]

    def _decode(self, sample: Sample) -> tuple[np.ndarray, Any] | Exception:
        # Decoders raise whatever they stumble over in a damaged file; no kind of it may end the
        # command.
        try:
            factor = self.index.factor
            sizes = [(h * factor, w * factor) for h, w in self.index.sizes]
            size = sizes[0]
            if len(sizes) > 1:
                size = nearest(sizes, *image_size_of(sample.image.read()))
            condition = sample.class_number() if self.index.captions is None else sample.texts()
            return sample.pixels(size), condition
        except Exception as error:
            return error

    def _encode(self, x: Tensor, seed: int) -> dict[str, Tensor]:
        """Latents, and features, of images and their mirror images: each [B, 2, ...]."""
        device = next(self.vae.parameters()).device
        x = x.to(device)
        dtype = getattr(torch, self.index.dtype)
        generator = torch.Generator(device).manual_seed(seed)
        found = defaultdict(list)
        for images in (x, x.flip(-1)):
            latents = encode(self.vae, images, posterior=self.index.posterior, generator=generator)
            found["latents"].append(latents)
            if self.features is not None:
                rows, columns = (n // self.index.feature_patch for n in latents.shape[2:])
                found["features"].append(self.features(images, rows, columns))
        return {name: torch.stack(both, 1).to("cpu", dtype) for name, both in found.items()}

    def _layout(
        self, parts: dict[Size, dict[str, list]], skipped: dict[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        groups = {}
        for (height, width), part in sorted(parts.items()):
            name = f"{height // self.index.factor}x{width // self.index.factor}"
            for kind in ("latents", "features"):
                if part[kind]:
                    tensors[f"{name}.{kind}"] = torch.cat(part[kind])
            groups[name] = {"names": part["names"]}
            if self.index.captions is None:
                tensors[f"{name}.labels"] = torch.tensor(part["conditions"])
            else:
                groups[name]["captions"] = part["conditions"]
        return tensors, {"groups": groups, "skipped": skipped}


def digest(source: Source) -> str:
    """Digest of the names of all samples, in their order."""
    names = "\0".join(sample.name for sample in source.samples)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
