"""What a run conditions on, and the encoders it takes: checked before the first step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tim.config import RunConfig
from tim.data import Dataset
from tim.repa import FeatureEncoder
from tim.text import TextEncoder

Encoder = Callable[[Tensor, Tensor], Tensor]


def text_encoder(config: RunConfig, device: torch.device) -> TextEncoder | None:
    """The encoder of captions that `data.text_encoder` names, for a text model."""
    data = config.data
    if config.model.num_classes is not None or data.text_encoder is None:
        return None
    return TextEncoder.load(
        data.text_encoder,
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        max_tokens=data.max_tokens,
        escape=data.escape,
    )


def feature_encoder(config: RunConfig, device: torch.device) -> Encoder | None:
    """The encoder of features that `data.features` names, for images of pixels."""
    if config.data.features is None:
        return None
    if config.data.kind == "latents" or config.data.channels != 3:
        raise ValueError(
            "data.features encodes images of 3 channels, of latents give it to tim encode; "
            f"got data.kind {config.data.kind} with {config.data.channels} channels"
        )
    encoder = FeatureEncoder.load(config.data.features, device=device)
    patch = config.model.patch_size
    return lambda x, y: encoder(x, x.shape[2] // patch, x.shape[3] // patch)


def check(
    config: RunConfig,
    dataset: Dataset,
    text: TextEncoder | None,
    encoder: Encoder | None,
    device: torch.device,
) -> None:
    """ValueError when data, encoders and model do not fit one another (names the setting)."""
    model = config.model
    if model.num_classes is None:
        if not dataset.captioned:
            raise ValueError(
                "a text model needs data with captions: data.captions of a folder, or latents of "
                "tim encode --captions"
            )
        if text is None:
            raise ValueError("data.text_encoder is missing: what encodes the captions?")
        if text.features != model.cap_feat_dim:
            raise ValueError(
                f"model.cap_feat_dim must be {text.features}, the width of the text encoder's "
                f"features, got {model.cap_feat_dim}"
            )
    elif dataset.captioned:
        raise ValueError(
            "the data have captions, which need a text model: model.num_classes None and "
            f"model.cap_feat_dim, got model.num_classes {model.num_classes}"
        )
    batch = dataset.batch(np.zeros(1, int), np.random.default_rng(0))
    features = batch.features
    if features is None and encoder is not None:
        with torch.no_grad():
            features = encoder(batch.x.to(device), batch.y)
    if features is None:
        return
    height, width = batch.x[0].shape[1:]
    tokens = height * width // model.patch_size**2
    expected = (tokens, model.z_dim)
    if tuple(features[0].shape) != expected:
        raise ValueError(
            f"features must have shape [N, model.z_dim] = {list(expected)} for {tokens} tokens, "
            f"got {list(features[0].shape)}"
        )


def shown(config: RunConfig, dataset: Dataset) -> list[int] | list[str]:
    """Classes or prompts of the columns of a sample grid."""
    columns = config.sample.columns
    if config.model.num_classes is not None:
        return [i % config.model.num_classes for i in range(columns)]
    if config.sample.prompts:
        return list(config.sample.prompts)
    one_size = np.arange(len(dataset))
    if len(dataset.sizes) > 1:
        one_size = np.flatnonzero(dataset.size_of == dataset.size_of[0])
    first = np.resize(one_size, columns)
    return list(dataset.batch(first, np.random.default_rng(0)).y)
