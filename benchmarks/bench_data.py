"""How fast training data are read, beside how fast a training step uses them.

    python benchmarks/bench_data.py [--device cpu|cuda] [--model MODEL] [--batch 32] [--json FILE]

Images per second of batches as the trainer reads them (`tim.data.batches`), in one process:

    folder          JPEG files, a class for each sub-folder, decoded by threads
    tar             the same files in .tar shards (WebDataset)
    tar, window     in the order of data.window
    tar, processes  decoded by worker processes
    latents         float16 shards as tim encode writes them, random and in windows

and of whole training steps of the model on latents. The files are made first, so they are read from
memory that the system caches, not from a disk: what is measured is the work of the reading process.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tim.bench.machine import describe
from tim.bench.parser import result_file
from tim.bench.report import SCHEMA, save
from tim.bench.timing import Times
from tim.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from tim.data import Batch, batches, build_dataset, make_order
from tim.data.shards import Index, shard_path, write_shard
from tim.ema import EMA
from tim.models import ARCHITECTURES, TiM
from tim.parallel import pick_device
from tim.step import TrainingStep

CLASSES = 10
#: More than any measurement takes.
STEPS = 1_000_000


def pictures(count: int, side: int) -> Iterator[tuple[int, bytes]]:
    """JPEG files of smooth noise, about as large as photographs of that side."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(image, np.int16) + rng.integers(-12, 13, (side, side, 3))
        stream = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=90)
        yield i, stream.getvalue()


def make_images(root: Path, count: int, side: int, shard: int) -> int:
    """Fill root/folder and root/tar; returns the bytes of an image, on average."""
    (root / "tar").mkdir()
    total = 0
    images = pictures(count, side)
    for number in range(-(-count // shard)):
        with tarfile.open(root / "tar" / f"{number:05d}.tar", "w") as archive:
            for i, data in islice(images, shard):
                total += len(data)
                folder = root / "folder" / f"{i % CLASSES}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i:06d}.jpg").write_bytes(data)
                for ending, content in (("jpg", data), ("cls", str(i % CLASSES).encode())):
                    info = tarfile.TarInfo(f"{i:06d}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return total // count


def make_latents(folder: Path, count: int, shape: tuple[int, int, int], shard: int) -> None:
    folder.mkdir()
    channels, height, width = shape
    index = Index(
        source="bench", samples=count, digest="", shard_size=shard, vae="none", factor=8,
        channels=channels, image_size=8 * height, sizes=[[height, width]], dtype="float16",
        posterior="mean", seed=0, classes=[str(i) for i in range(CLASSES)], captions=None,
        features=None, feature_patch=None,
    )  # fmt: skip
    index.save(folder)
    generator = torch.Generator().manual_seed(0)
    for number in range(index.shards):
        n = min(shard, count - number * shard)
        name = f"{height}x{width}"
        tensors = {
            f"{name}.latents": torch.randn(n, 2, *shape, generator=generator).half(),
            f"{name}.labels": torch.randint(0, CLASSES, (n,), generator=generator),
        }
        about = {"groups": {name: {"names": [str(i) for i in range(n)]}}, "skipped": {}}
        write_shard(shard_path(folder, number), tensors, about)


def read(config: DataConfig, batch: int, seconds: float) -> tuple[Times, float]:
    """Seconds for a batch of those that come after the first ones, and until the first one."""
    began = time.perf_counter()
    dataset = build_dataset(config)
    order = make_order(dataset, batch, 0, config.window)
    stream = batches(dataset, order, 0, STEPS, processes=config.processes)
    next(stream)
    first = time.perf_counter() - began
    for _ in range(2 + 2 * config.processes):  # what was read ahead meanwhile
        next(stream)
    # Worker processes hand over several batches at once, and then none for a while.
    together = 1 + 2 * config.processes
    taken = samples(lambda: [next(stream) for _ in range(together)], seconds)
    stream.close()
    return Times.of([spent / together for spent in taken], together, "loop"), first


def take_steps(model: str, batch: int, device: torch.device, seconds: float) -> Times:
    """Seconds for a whole training step, on the same batch again and again."""
    architecture = replace(ARCHITECTURES[model], z_dim=None, num_classes=CLASSES)
    precision = "bf16" if device.type == "cuda" else "float32"
    train = TrainConfig(batch_size=batch, precision=precision, device=device.type)
    config = RunConfig(preset=model, model=architecture, objective=ObjectiveConfig(), train=train)
    net = TiM(architecture).to(device)
    loss = config.objective.build(config.transport.build())
    step = TrainingStep(net, EMA(net), loss, config)
    size = (batch, architecture.in_channels, *[architecture.input_size] * 2)
    images = Batch(torch.randn(size), torch.arange(batch) % CLASSES)

    def take() -> None:
        step.load(images, 0)
        step.run().tolist()

    take()
    return Times.of(samples(take, seconds), 1, "loop")


def samples(call: Callable[[], object], seconds: float) -> list[float]:
    """Times of calls for so many seconds, of three at least."""
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="tim-b4-256", choices=sorted(ARCHITECTURES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode")
    parser.add_argument("--processes", type=int, default=2, help="that decode in place of threads")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each rate")
    parser.add_argument("--json", type=result_file, help="result file to write")
    options = parser.parse_args()
    device = pick_device(options.device)
    architecture = ARCHITECTURES[options.model]
    shape = (architecture.in_channels, *[architecture.input_size] * 2)
    shard = max(1, options.images // 16)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        size = make_images(root, options.images, options.side, shard)
        make_latents(root / "latents", options.images, shape, shard)
        pixels = {"kind": "folder", "image_size": options.side, "workers": options.workers,
                  "cache_gb": 0.0}  # fmt: skip
        tar = {**pixels, "path": str(root / "tar")}
        latents = {"kind": "latents", "path": str(root / "latents"), "flip": 0.5}
        configs = {
            "folder": {**pixels, "path": str(root / "folder")},
            "tar": tar,
            "tar, window 4": {**tar, "window": 4},
            f"tar, {options.processes} processes": {**tar, "processes": options.processes},
            "latents": latents,
            "latents, window 4": {**latents, "window": 4},
        }
        print(f"{options.images} images of {options.side} pixels, {size / 1000:.0f} kB each")
        read_in = {
            name: read(DataConfig(**values), options.batch, options.seconds)
            for name, values in configs.items()
        }
    step = take_steps(options.model, options.batch, device, options.seconds)
    used = options.batch / step.median
    print(f"{'step of ' + options.model:20} {used:10.1f} images/s on {device.type}")
    rows = []
    for name, (times, first) in read_in.items():
        rate = options.batch / times.median
        print(f"{name:20} {rate:10.1f} images/s, {rate / used:8.2f} times what the step uses")
        rows.append(
            {
                "run": 0, "benchmark": "data", "size": name, "direction": "read",
                "shape": {"batch": options.batch, "latents": shape, "side": options.side,
                          "image_bytes": size, "model": options.model},
                "device": device.type,
                "candidates": {"read": {"times": asdict(times)},
                               "training step": {"times": asdict(step)}},
                "speedups": {"training step": step.median / times.median},
                "images_per_second": rate, "seconds_to_first_batch": first,
            }
        )  # fmt: skip
    if options.json:
        run = {
            "command": " ".join(["python benchmarks/bench_data.py", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": options.seconds,
        }
        result = {"schema": SCHEMA, "machine": describe(device), "runs": [run], "rows": rows}
        save(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
