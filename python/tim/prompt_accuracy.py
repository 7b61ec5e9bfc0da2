"""Whether prompts are obeyed: the share of samples that a classifier takes for what they asked for.

The classifier (`tim.frechet`) is trained on the real pictures of the run, whose listing of captions
has a label for each; prompts are captions of that listing, and of another one in other words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tim import conditions
from tim.config import RunConfig
from tim.data import to_float
from tim.data.captioned_sets import HELD_OUT
from tim.data.dataset import to_uint8
from tim.data.sources import Source, open_source
from tim.evaluate.store import write_whole
from tim.frechet import Classifier, train_classifier
from tim.models import load
from tim.sampler import sample
from tim.text import TextEncoder

RESULT = "prompt-accuracy.json"


@dataclass(frozen=True)
class PromptAccuracy:
    """Shares of samples that are taken for what the prompt asked for, for each number of steps."""

    run: str
    step: int
    seed: int
    samples: int
    cfg_scale: float
    classifier_accuracy: float
    """Of the classifier, on held-out real pictures."""
    chance: float
    """Share that the commonest label would give."""
    steps: tuple[int, ...]
    trained: tuple[float, ...]
    """From captions that were trained on."""
    held_out: tuple[float, ...]
    """From those of the held-out pictures, whose words may be others."""


def prompt_accuracy(
    run: str | os.PathLike,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32),
    samples: int = 1000,
    seed: int = 0,
    cfg_scale: float | None = None,
    held_out: str = HELD_OUT,
    device: str = "auto",
) -> PromptAccuracy:
    """Sample a run's averaged model from prompts and let a classifier say what the samples show.

    Writes prompt-accuracy.json into the run directory.

    Args:
        run: run directory of a text model on pixels, from a listing of captions with labels.
        steps: step counts.
        samples: pictures for each step count and set of prompts, all from the same noise.
        seed: of noise, classifier and choice of prompts.
        cfg_scale: guidance; the run's own setting when None.
        held_out: listing of held-out pictures with labels, by its path or in the data's folder.
        device: for the sampler: auto, cpu, cuda or cuda:N.

    Raises:
        FileNotFoundError: no such run, no checkpoint in it, no such listing.
        ValueError: steps or samples are not positive; the run is of another kind; there are fewer
            than two labels.
    """
    from tim.checkpoint import latest_checkpoint
    from tim.parallel import pick_device

    run, steps = Path(run), tuple(steps)
    if not steps or min(steps) < 1:
        raise ValueError(f"steps must be positive, got {list(steps)}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    config = RunConfig.load(run / "config.yaml")
    data = config.data
    if config.model.num_classes is not None or data.kind != "folder" or data.path is None:
        raise ValueError(
            f"{run} must be of a text model on a folder of pictures, got data.kind {data.kind} "
            f"and model.num_classes {config.model.num_classes}"
        )
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet")
    source, other = (open_source(data.path, listing) for listing in (data.captions, held_out))
    x, y = _pictures(source, config)
    if (labels := len(y.unique())) < 2:
        raise ValueError(
            f"{data.path}: the pictures of {data.captions} have {labels} label, the classifier "
            "needs at least two"
        )
    x_held_out, y_held_out = _pictures(other, config)
    device = pick_device(device)
    text = conditions.text_encoder(config, device)
    model = load(run, device=device)

    classifier = train_classifier(x, y, int(max(y.max(), y_held_out.max())) + 1, seed=seed)
    scale = config.sample.cfg_scale if cfg_scale is None else cfg_scale
    shape = (samples, config.model.in_channels, *[config.model.input_size] * 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    shares = []
    for prompts, wanted in (_prompts(listing, samples, seed) for listing in (source, other)):
        pictures = [_sampled(model, config, text, prompts, noise, n, scale) for n in steps]
        shares.append(tuple(_accuracy(classifier, found, wanted) for found in pictures))
    result = PromptAccuracy(
        run=str(run),
        step=int(checkpoint.name),
        seed=seed,
        samples=samples,
        cfg_scale=scale,
        classifier_accuracy=classifier.accuracy(x_held_out, y_held_out),
        chance=(torch.bincount(y).max() / len(y)).item(),
        steps=steps,
        trained=shares[0],
        held_out=shares[1],
    )
    text_of = json.dumps(asdict(result), indent=1) + "\n"
    write_whole(run / RESULT, lambda path: path.write_text(text_of))
    return result


def _pictures(source: Source, config: RunConfig) -> tuple[Tensor, Tensor]:
    """All pictures [N, C, H, W] in [-1, 1] of a listing, and their labels [N]."""
    size, channels = config.model.input_size, config.model.in_channels
    pixels = np.stack([one.pixels(size, channels) for one in source.samples])
    return to_float(torch.from_numpy(pixels)), torch.tensor(
        [one.class_number() for one in source.samples]
    )


def _prompts(source: Source, count: int, seed: int) -> tuple[list[str], Tensor]:
    """Captions drawn from a listing, and their labels [count]."""
    rng = np.random.default_rng([seed, len(source)])
    chosen = [source.samples[i] for i in rng.integers(len(source), size=count)]
    prompts = [str(rng.choice(one.texts())) for one in chosen]
    return prompts, torch.tensor([one.class_number() for one in chosen])


@torch.no_grad()
def _sampled(
    model: torch.nn.Module,
    config: RunConfig,
    text: TextEncoder,
    prompts: Sequence[str],
    noise: Tensor,
    steps: int,
    cfg_scale: float,
    batch_size: int = 250,
) -> Tensor:
    """Pictures [N, C, H, W] in [-1, 1], rounded and clipped, on the CPU."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(prompts), batch_size):
        y, null = text.with_null(prompts[start : start + batch_size])
        x = sample(
            model,
            y,
            noise[start : start + batch_size].to(device),
            steps=steps,
            transport=config.transport.build(),
            cfg_scale=cfg_scale,
            cfg_interval=config.sample.cfg_interval,
            null=null,
            **config.objective.schedule(*noise.shape[2:]),
        )
        parts.append(to_float(to_uint8(x)).movedim(-1, 1))
    return torch.cat(parts)


def _accuracy(classifier: Classifier, pictures: Tensor, wanted: Tensor) -> float:
    return classifier.accuracy(pictures, wanted)
