"""`tim evaluate SOURCE`"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from tim._flags import IntList, NameList
from tim.cli import parse
from tim.commands.sample import cut_captions_in_one_line
from tim.commands.sampling_flags import SamplingFlags
from tim.config import RunConfig

if TYPE_CHECKING:
    from rich.table import Table

#: Kinds of data that have labels and a held-out part.
CLASSIFIED = ("digits", "arrays")


@dataclass(frozen=True)
class Evaluate(SamplingFlags):
    """Measure samples at several numbers of steps.

    Of a run on digits or idx files: in the features of a small classifier trained on its real
    images, against held-out ones; writes quality.json and quality.png into the run directory. With
    --features, or a flag that the classifier has no use for: FID, KID, precision and recall of
    Inception features (extra eval), against the run's images or --reference; writes evaluation.json
    and evaluation.png. A command that was stopped goes on when given again."""

    source: tyro.conf.Positional[str]
    """Run directory, or a weight file, hub id or pipeline, as for tim sample."""
    steps: IntList = (1, 2, 4, 8, 16, 32)
    """Numbers of steps."""
    samples: int | None = None
    """Images per number of steps. By default 50000; with the classifier, as many as there are
    training images."""
    seed: int = 0
    """Seed of noise and classifier."""
    cfg_scale: float | None = None
    """Guidance scale; by default that of the run, and 1 (none) of what is no run."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    features: str = "auto"
    """classifier, inception, or package.module:attribute, a network called with images [B, 3, H, W]
    in [0, 1]; auto is the classifier where the data allow it."""
    metrics: NameList | None = None
    """Which of fid,kid,precision,recall; by default all that the reference allows."""
    reference: str | None = None
    """What to compare with: an .npz file with mu and sigma, images arr_0, or both (as the ADM suite
    has them), or a folder of images; by default the run's held-out or training images."""
    split: Literal["train", "test"] | None = None
    """Part of the run's data to compare with."""
    reference_images: int | None = None
    """Compare with so many reference images at most."""
    prompts: Path | None = None
    """Prompts of a text model, one a line (.txt), or records with a prompt or caption (.json,
    .jsonl); by default the captions of the run's data."""
    logits: str | None = None
    """Also the Inception Score, of the classifier package.module:attribute."""
    clip: str | None = None
    """Also the CLIP score, of this model: a folder or hub id of transformers."""
    npz: bool = False
    """Also write the samples, as the ADM suite reads them: samples-steps-N.npz."""
    out: Path | None = None
    """Folder for the results; by default evaluation/ in the run directory."""
    batch_size: int = 64
    """Images sampled at a time."""


#: Flags that the classifier has, too.
SHARED = ("source", "steps", "samples", "seed", "cfg_scale", "device", "features")


def main(arguments: list[str]) -> int:
    command = parse(Evaluate, "tim evaluate", arguments, config=(tyro.conf.DisallowNone,))
    if _by_classifier(command):
        return _classifier(command)
    return _images(command)


def _by_classifier(command: Evaluate) -> bool:
    """Whether the features are to be those of a classifier. ValueError where they cannot be."""
    given = [
        f.name
        for f in dataclasses.fields(command)
        if f.name not in SHARED and getattr(command, f.name) != f.default
    ]
    if command.features == "classifier" and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--features classifier takes no {flags}")
    if command.features != "auto" or given:
        return command.features == "classifier"
    saved = Path(command.source) / "config.yaml"
    if not saved.is_file():
        return False
    config = RunConfig.load(saved)
    return config.data.kind in CLASSIFIED and config.model.in_channels in (1, 3)


def _classifier(command: Evaluate) -> int:
    from rich.console import Console

    from tim.evaluate import classifier_quality

    quality = classifier_quality(
        command.source,
        steps=command.steps,
        samples=command.samples,
        seed=command.seed,
        cfg_scale=command.cfg_scale,
        device=command.device,
    )
    title = f"{quality.samples} samples against {quality.held_out} held-out images"
    table = _table(title, ["steps", "Frechet distance", "taken for the class asked for"])
    for row in zip(quality.steps, quality.distance, quality.agreement, strict=True):
        table.add_row(f"{row[0]}", f"{row[1]:.2f}", f"{row[2]:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"floor, real training images: {quality.real:.2f}; ceiling, noise: {quality.noise:.2f}\n"
        f"classifier's accuracy on held-out images: {quality.classifier_accuracy:.1%}"
    )
    for fewer, more in quality.not_better():
        console.print(f"{more} steps were no better than {fewer}")
    console.print(str(Path(command.source) / "quality.png"), soft_wrap=True)
    return 0


def _images(command: Evaluate) -> int:
    from rich.console import Console

    from tim.evaluate import image_quality
    from tim.evaluate.images import SAMPLES
    from tim.evaluate.prompts import read_prompts
    from tim.evaluate.report import SHOWN

    settings = command.generator_settings(command.cfg_scale)
    out = command.out or Path(command.source) / "evaluation"
    if command.out is None and not (Path(command.source) / "config.yaml").is_file():
        out = Path("evaluation")
    with cut_captions_in_one_line("tim evaluate"):
        quality = image_quality(
            command.source,
            steps=command.steps,
            samples=SAMPLES if command.samples is None else command.samples,
            features="inception" if command.features == "auto" else command.features,
            metrics=command.metrics,
            reference=command.reference,
            split=command.split,
            reference_images=command.reference_images,
            prompts=read_prompts(command.prompts) if command.prompts else None,
            logits=command.logits,
            clip=command.clip,
            npz=command.npz,
            seed=command.seed,
            batch_size=command.batch_size,
            settings=settings,
            out=out,
            device=command.device,
            progress=os.isatty(2),
        )
    title = f"{quality.samples} samples"
    if quality.reference is not None:
        title += f" against {quality.reference_images or 'moments'} of {quality.reference}"
    table = _table(title, ["steps", *(SHOWN[name][0] for name in quality.metrics)])
    for row in quality.cells():
        table.add_row(*row)
    console = Console()
    console.print(table)
    for name, pairs in quality.not_better().items():
        for fewer, more in pairs:
            console.print(f"{SHOWN[name][0]}: {more} steps were no better than {fewer}")
    console.print(str(out / "evaluation.png"), soft_wrap=True)
    return 0


def _table(title: str, headings: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
