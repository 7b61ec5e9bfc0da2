"""Pictures of the prompts of GenEval, DPG-Bench and MJHQ-30K, as their own scorers read them.

Sources of the layouts: github.com/djghosh13/geneval (README, evaluation/evaluate_images.py),
github.com/TencentQQGYLab/ELLA (dpg_bench/compute_dpg_bench.py) and the card of the hub data set
playgroundai/MJHQ-30K.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tim.evaluate.generator import Generator, GeneratorSettings, noise_of, open_generator
from tim.evaluate.job import progress_bar
from tim.evaluate.prompts import read_text, records
from tim.evaluate.store import remove_leftovers, write_whole

GRID = 2  # of DPG-Bench, pictures along a side
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Item:
    """A prompt, and the files that its pictures go into."""

    prompt: str
    files: tuple[str, ...]
    """Relative to the folder of a number of steps."""
    metadata: str | None = None


class Benchmark:
    """A file of prompts and a folder layout. Each prompt has `images` pictures."""

    name: str
    images: int
    square = False

    def read(self, path: Path, images: int) -> list[Item]:
        """The items in the file or folder of prompts, `images` pictures each."""
        raise NotImplementedError

    def save(self, folder: Path, item: Item, pictures: list[np.ndarray]) -> None:
        """Write the pictures, uint8 [H, W, C], of an item."""
        for file, pixels in zip(item.files, pictures, strict=True):
            _save(folder / file, pixels)


class GenEval(Benchmark):
    """evaluation_metadata.jsonl to NNNNN/metadata.jsonl and NNNNN/samples/NNNN.png."""

    name, images = "geneval", 4

    def read(self, path: Path, images: int) -> list[Item]:
        found = []
        for number, (where, record) in enumerate(_records(path, ".jsonl")):
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise ValueError(f"{where} must have a prompt, got {json.dumps(record):.60}")
            files = tuple(f"{number:05d}/samples/{i:04d}.png" for i in range(images))
            found.append(Item(record["prompt"], files, json.dumps(record)))
        return found

    def save(self, folder: Path, item: Item, pictures: list[np.ndarray]) -> None:
        super().save(folder, item, pictures)
        about = (folder / item.files[0]).parents[1] / "metadata.jsonl"
        write_whole(about, lambda path: path.write_text(f"{item.metadata}\n"))


class DPGBench(Benchmark):
    """A folder of prompts, NAME.txt, to NAME.png: four square pictures in a grid."""

    name, images, square = "dpg-bench", GRID * GRID, True

    def read(self, path: Path, images: int) -> list[Item]:
        if not path.is_dir():
            raise FileNotFoundError(
                f"prompts must be the folder dpg_bench/prompts of .txt files, got {path}"
            )
        if not 1 <= images <= self.images:
            raise ValueError(f"images must be from 1 to {self.images} for {self.name}")
        files = sorted(path.glob("*.txt"))
        return [Item(read_text(file).strip(), (f"{file.stem}.png",)) for file in files]

    def save(self, folder: Path, item: Item, pictures: list[np.ndarray]) -> None:
        height, width, channels = pictures[0].shape
        # Row by row, as the scorer cuts them out; fewer pictures than places leave black ones.
        grid = np.zeros((GRID * height, GRID * width, channels), np.uint8)
        for i, pixels in enumerate(pictures):
            top, left = i // GRID * height, i % GRID * width
            grid[top : top + height, left : left + width] = pixels
        _save(folder / item.files[0], grid)


class MJHQ(Benchmark):
    """meta_data.json to CATEGORY/NAME.jpg."""

    name, images = "mjhq", 1

    def read(self, path: Path, images: int) -> list[Item]:
        if images != 1:
            raise ValueError(f"images must be 1 for {self.name}, got {images}")
        found = []
        for where, record in _records(path, ".json"):
            name = where.removeprefix(f"{path}: ")
            category, prompt = (
                record.get(key) if isinstance(record, dict) else None
                for key in ("category", "prompt")
            )
            if not isinstance(category, str) or not isinstance(prompt, str):
                raise ValueError(
                    f"{where} must have a category and a prompt, got {json.dumps(record):.60}"
                )
            if {"/", "\\"} & set(category + name) or ".." in (category, name):
                raise ValueError(f"{where}: category and name must be names of files")
            found.append(Item(prompt, (f"{category}/{name}.jpg",)))
        return found


BENCHMARKS = {cls.name: cls() for cls in (GenEval, DPGBench, MJHQ)}


def sample_benchmark(
    source: str | Path,
    benchmark: str,
    prompts: str | Path,
    out: str | Path,
    *,
    steps: Sequence[int] = (4,),
    images: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    settings: GeneratorSettings | None = None,
    device: str = "auto",
    progress: bool = False,
) -> list[Path]:
    """Sample the prompts of a benchmark into out/steps-N, a folder for its scorer.

    Pictures that are there already are left alone, so that a killed call goes on when repeated.

    Args:
        source: of a text model: anything that a pipeline reads.
        benchmark: geneval, dpg-bench or mjhq.
        prompts: its file (or folder, of dpg-bench) of prompts.
        images: for each prompt; as the benchmark has it when None.
        seed: of the noise.
        batch_size: pictures sampled at a time.

    Returns:
        The folders, in the order of `steps`.

    Raises:
        FileNotFoundError, ValueError: an argument does not fit, or `out` holds pictures of another
            model or other settings.
    """
    from tim.parallel import pick_device

    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {benchmark!r}")
    if not steps or min(steps) < 1:
        raise ValueError(f"steps must be positive, got {list(steps)}")
    for name, value in (("images", images), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    kind, out = BENCHMARKS[benchmark], Path(out)
    count = kind.images if images is None else images
    items = kind.read(Path(prompts), count)
    if not items:
        raise ValueError(f"{prompts} holds no prompts")
    where = pick_device(device)
    generator = open_generator(source, settings or GeneratorSettings(), where)
    if generator.num_classes is not None:
        raise ValueError(f"{benchmark} needs a text model, {source} takes class labels")
    if kind.square and generator.size[0] != generator.size[1]:
        height, width = generator.size
        raise ValueError(f"{benchmark} needs square pictures, got size {width}x{height}")
    _claim(
        out,
        {
            "benchmark": benchmark,
            "prompts": hashlib.sha256(repr(items).encode()).hexdigest()[:16],
            "images": count,
            "seed": seed,
            "model": generator.identity,
        },
    )
    folders = [out / f"steps-{number}" for number in steps]
    for number, folder in zip(steps, folders, strict=True):
        remove_leftovers(folder)
        todo = [i for i, item in enumerate(items) if not _is_done(folder, item)]
        with progress_bar(f"{number} steps", len(items), progress) as advance:
            advance(len(items) - len(todo))
            for chosen in _groups(todo, max(1, batch_size // count)):
                drawn = _draw(generator, items, chosen, number, count, seed, batch_size)
                for i, pictures in zip(chosen, drawn, strict=True):
                    kind.save(folder, items[i], pictures)
                advance(len(chosen))
    return folders


def _draw(
    generator: Generator,
    items: list[Item],
    chosen: list[int],
    steps: int,
    count: int,
    seed: int,
    batch_size: int,
) -> list[list[np.ndarray]]:
    """`count` pictures for each of the items, uint8 [H, W, C]."""
    places = [(i, k) for i in chosen for k in range(count)]
    parts: list[Tensor] = []
    for batch in _groups(places, batch_size):
        noise = noise_of(seed, [i * count + k for i, k in batch], generator.noise_shape)
        parts.append(generator([items[i].prompt for i, _ in batch], noise, steps).cpu())
    pixels = torch.cat(parts).permute(0, 2, 3, 1).numpy()
    return [list(pixels[i * count : (i + 1) * count]) for i in range(len(chosen))]


def _groups(values: list, size: int) -> Iterator[list]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _is_done(folder: Path, item: Item) -> bool:
    files = [folder / file for file in item.files]
    if item.metadata is not None:
        files.append(files[0].parents[1] / "metadata.jsonl")
    return all(file.is_file() for file in files)


def _claim(out: Path, about: dict[str, object]) -> None:
    """Note in `out` what it is for. ValueError when it is for something else."""
    file, about = out / SETTINGS, json.loads(json.dumps(about, default=str))
    if file.is_file():
        before = json.loads(file.read_text())
        if other := [name for name in about if before.get(name) != about[name]]:
            raise ValueError(
                f"{out} holds pictures of another {' and '.join(other)}: give another folder"
            )
        return
    write_whole(file, lambda path: path.write_text(json.dumps(about, indent=1) + "\n"))


def _records(path: Path, suffix: str) -> list[tuple[str, object]]:
    if not path.is_file() or path.suffix != suffix:
        raise FileNotFoundError(f"prompts must be a {suffix} file, got {path}")
    return records(path, read_text(path))


def _save(path: Path, pixels: np.ndarray) -> None:
    """Save a picture under its name, whole or not at all; a JPEG with as little loss as can be."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    options = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    kind = "JPEG" if path.suffix == ".jpg" else "PNG"
    write_whole(path, lambda temporary: picture.save(temporary, kind, **options))
