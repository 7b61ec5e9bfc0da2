"""Features of an image encoder for the projection loss (REPA, arXiv 2410.06940), one per token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from tim._imports import network_at

EXTRA = "transition-models[t2i]"
PATCH = 16


class FeatureEncoder:
    """Features [B, rows * columns, K] of images, for the tokens of a network on their latents.

    Images are resized so that the encoder sees one of its patches for each token. States in front
    of the patches' (class and register tokens) are dropped; an encoder that answers with a map
    [B, K, h, w] has it resized.

    Args:
        module: called with images [B, 3, H, W]; answers with a tensor, a tuple whose last entry is
            one, or an output of transformers.
        patch_size: side of a patch of the encoder, in pixels.
        mean, std: of its input, by channel, for images in [0, 1].
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        patch_size: int = PATCH,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"the encoder must be an nn.Module, got {type(module).__name__}")
        self.module, self.patch_size = module.eval().requires_grad_(False), patch_size
        self.mean = torch.tensor(mean).reshape(1, -1, 1, 1)
        self.std = torch.tensor(std).reshape(1, -1, 1, 1)
        accepted = inspect.signature(module.forward).parameters
        # Vision transformers of transformers are tied to one size unless told.
        name = "interpolate_pos_encoding"
        self.options = {name: True} if name in accepted else {}

    @classmethod
    def load(
        cls, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> FeatureEncoder:
        """The encoder called `name`: "package.module:attribute" for code of your own, else a folder
        or hub id of transformers, such as facebook/dinov2-base.

        The attribute is a module, or a function or class that makes one without arguments. It gets
        images in [0, 1] and may carry a `patch_size` (16 by default).

        Raises:
            ImportError: the module path cannot be imported, or transformers is missing.
            ValueError: there is no such encoder.
            TypeError: the attribute makes no nn.Module.
        """
        if ":" in name:
            module = network_at(name, "features")
            encoder = FeatureEncoder(module, patch_size=getattr(module, "patch_size", PATCH))
        else:
            encoder = _from_transformers(name)
        encoder.module.to(device=device, dtype=dtype)
        return encoder

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """Features float32 of images [B, 3, H, W] in [-1, 1], for a grid of tokens.

        Raises:
            ValueError: the encoder answers with fewer states than there are patches.
        """
        parameter = next(self.module.parameters(), images)
        size = (rows * self.patch_size, columns * self.patch_size)
        pixels = images.float() / 2 + 0.5
        if pixels.shape[2:] != size:
            pixels = torch_f.interpolate(pixels, size, mode="bicubic", antialias=True)
        pixels = (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)
        states = _states(self.module(pixels.to(parameter), **self.options)).float()
        if states.dim() == 4:
            states = torch_f.interpolate(states, (rows, columns), mode="bilinear")
            return states.flatten(2).transpose(1, 2).contiguous()
        extra = states.shape[1] - rows * columns
        if extra < 0:
            raise ValueError(
                f"the feature encoder must answer with at least {rows * columns} states for "
                f"{rows} x {columns} patches of {self.patch_size} pixels, got {states.shape[1]}"
            )
        return states[:, extra:]


def _states(output: Any) -> Tensor:
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    if isinstance(output, (tuple, list)):
        output = output[-1]
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the feature encoder must answer with a tensor [B, N, K] or [B, K, h, w], got {shape}"
        )
    return output


def _from_transformers(name: str) -> FeatureEncoder:
    try:
        import transformers
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError:
        raise ImportError(f"feature encoders need transformers: pip install '{EXTRA}'") from None
    from safetensors import SafetensorError

    try:
        model = transformers.AutoModel.from_pretrained(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"features must be a folder or hub id of transformers, or package.module:attribute, "
            f"got {name}: {reason}"
        ) from None
    try:
        # The dictionary alone: image processors themselves may ask for further packages.
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        settings = {}
    model = getattr(model, "vision_model", model)  # of CLIP and the like
    patch = getattr(model.config, "patch_size", PATCH)
    half = (0.5, 0.5, 0.5)
    return FeatureEncoder(
        model,
        patch_size=patch if isinstance(patch, int) else patch[0],
        mean=tuple(settings.get("image_mean") or half),
        std=tuple(settings.get("image_std") or half),
    )
