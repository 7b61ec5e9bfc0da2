"""`tim encode IMAGES --vae NAME --out DIR`"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from tim.cli import parse

if TYPE_CHECKING:
    from tim.data.shards import Index
    from tim.encode.job import Progress


@dataclass(frozen=True)
class Encode:
    """Encode images with an autoencoder of diffusers, once for all training runs: shards of
    latents, each image as it is and mirrored, with label or captions, for `--data.kind latents`.

    A command that was stopped goes on where it was when it is given again. Images that cannot be
    read are left out and listed at the end, and in skipped.txt."""

    images: tyro.conf.Positional[Path]
    """Folder of images (a class for each sub-folder), or .tar file(s) in the WebDataset layout."""
    vae: str
    """Autoencoder: a folder saved by diffusers, or a hub id such as stabilityai/sd-vae-ft-ema."""
    out: Path
    """Folder for the shards."""
    image_size: int = 256
    """Side that images are cropped and resized to, in pixels."""
    max_aspect: float = 1.0
    """Keep aspect ratios up to this: images go to the nearest of a few sizes of the same area."""
    patch_size: int = 1
    """Latents to a token along a side, of the networks to be trained: sizes are multiples of it."""
    captions: str | None = None
    """Captions in place of labels: txt (a .txt file beside each image, in a tar also .json), or a
    .jsonl file of records with file_name and caption(s)."""
    features: str | None = None
    """Store features for the projection loss: an encoder of transformers (folder or hub id), or
    package.module:attribute."""
    shard_size: int = 1024
    """Images to a shard."""
    batch_size: int = 16
    """Images per pass of the autoencoder."""
    posterior: Literal["mean", "sample"] = "mean"
    """Of a variational autoencoder: its mean, or a draw from it as in the public code."""
    seed: int = 0
    """Of those draws."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the latents and features on disk."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the autoencoder."""
    workers: int = 4
    """Threads that decode images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "shard_size", "batch_size", "workers"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, name)}")


def main(arguments: list[str]) -> int:
    command = parse(Encode, "tim encode", arguments)
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(f"out must be a folder, got the file {command.out}")

    import torch
    from PIL import Image

    from tim.autoencoder import downsampling, enable_tiling, load_autoencoder
    from tim.data.buckets import buckets
    from tim.data.shards import INDEX_FILE, Index, remove, remove_leftovers
    from tim.data.sources import open_source
    from tim.encode.job import Job, digest
    from tim.parallel import pick_device
    from tim.repa import FeatureEncoder

    # Pillow refuses very large pictures as a guard against hostile uploads; these are the user's.
    Image.MAX_IMAGE_PIXELS = None
    source = open_source(command.images, command.captions)
    for name, reason in source.damaged.items():
        # Once it is mended its samples would not be where the shards have them.
        raise ValueError(f"{command.images}: {name} is {reason}: mend it, or take it away")
    device = pick_device(command.device)
    vae = load_autoencoder(command.vae, device=device, dtype=getattr(torch, command.precision))
    factor = downsampling(vae)
    sizes = buckets(command.image_size, factor * command.patch_size, command.max_aspect)
    if max(max(size) for size in sizes) > 1024:
        enable_tiling(vae)
    features = FeatureEncoder.load(command.features, device=device) if command.features else None
    index = Index(
        source=str(command.images),
        samples=len(source),
        digest=digest(source),
        shard_size=command.shard_size,
        vae=command.vae,
        factor=factor,
        channels=vae.config.latent_channels,
        image_size=command.image_size,
        sizes=[[h // factor, w // factor] for h, w in sizes],
        dtype=command.dtype,
        posterior=command.posterior,
        seed=command.seed,
        classes=source.classes,
        captions=command.captions,
        features=command.features,
        feature_patch=command.patch_size if features else None,
    )
    if (command.out / INDEX_FILE).is_file():
        Index.load(command.out).check_restart(index, command.out)
        remove_leftovers(command.out)
    else:
        command.out.mkdir(parents=True, exist_ok=True)
        index.save(command.out)
    job = Job(source, index, vae, features, command.batch_size, command.workers)
    with _reporting(index) as report:
        done = job.run(command.out, report)
    if not done.encoded + done.kept:
        remove(command.out)
        name, reason = next(iter(done.skipped.items()))
        raise ValueError(f"none of the {len(source)} images could be read; {name}: {reason}")
    lines = [f"{name}: {reason}" for name, reason in done.skipped.items()]
    if lines:
        temporary = command.out / f"skipped.txt.tmp-{os.getpid()}"
        temporary.write_text("\n".join(lines) + "\n")
        os.replace(temporary, command.out / "skipped.txt")
    for line in lines:
        print(f"skipped {line}")
    kept = f", {done.kept} were there" if done.kept else ""
    print(
        f"{done.encoded} images encoded{kept}, {len(lines)} skipped; latents of {index.channels} "
        f"channels, {', '.join(f'{h}x{w}' for h, w in index.sizes)}"
    )
    print(command.out)
    return 0


@contextlib.contextmanager
def _reporting(index: Index) -> Iterator[Callable[[Progress, int], None]]:
    """A bar on a terminal, elsewhere a line for each shard; both with images per second."""
    if os.isatty(2):
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(
            "[progress.description]{task.description}",
            *Bar.get_default_columns()[1:],
            "{task.fields[rate]}",
            console=Console(stderr=True),
        ) as bar:
            task = bar.add_task("encoding", total=index.samples, rate="")
            rate = _Rate()

            def advance(progress: Progress, images: int) -> None:
                seen = progress.encoded + progress.kept + len(progress.skipped)
                bar.update(task, completed=seen, rate=rate(progress))

            yield advance
        return
    rate = _Rate()

    def line(progress: Progress, images: int) -> None:
        if images == 0 and progress.shard > rate.shard:
            rate.shard = progress.shard
            images = progress.encoded + progress.kept
            print(
                f"shard {progress.shard}/{index.shards}  {images} images  "
                f"{len(progress.skipped)} skipped  {rate(progress)}",
                file=sys.stderr,
                flush=True,
            )

    yield line


class _Rate:
    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.shard = 0

    def __call__(self, progress: Progress) -> str:
        return f"{progress.encoded / (time.perf_counter() - self.start):.1f} images/s"
