"""Autoencoders of diffusers, between images in [-1, 1] and latents of unit scale."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

EXTRA = "transition-models[t2i]"


def load_autoencoder(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A diffusers autoencoder (AutoencoderKL, AutoencoderDC, ...), frozen, in evaluation mode.

    Args:
        name: a folder saved by diffusers, or a hub id such as stabilityai/sd-vae-ft-ema.

    Raises:
        ImportError: diffusers is not installed (names the extra).
        ValueError: there is no such autoencoder.
    """
    try:
        from diffusers import AutoModel
    except ImportError:
        raise ImportError(f"autoencoders need diffusers: pip install '{EXTRA}'") from None
    try:
        model = AutoModel.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"vae must be a folder or hub id of diffusers, got {name}: {reason}"
        ) from None
    if not (hasattr(model, "encode") and hasattr(model, "decode")):
        raise ValueError(f"vae must be an autoencoder, got a {type(model).__name__} in {name}")
    if model.dtype != dtype:
        model = model.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def downsampling(vae: nn.Module) -> int:
    """Pixels per latent along a side: 8 of the SD-VAE, 32 of the DC-AE."""
    if ratio := getattr(vae, "spatial_compression_ratio", None):
        return int(ratio)
    for name in ("block_out_channels", "encoder_block_out_channels"):
        if channels := getattr(vae.config, name, None):
            return 2 ** (len(channels) - 1)
    raise ValueError(f"the downsampling factor of a {type(vae).__name__} is not known")


def statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation [1, C, 1, 1] that make latents (z - mean) / std, as its config has them.

    Of the SD-VAE and the DC-AE these are 0 and 1 / scaling_factor, what the released networks of
    TiM were trained with; others bring a shift or values per channel.
    """
    config = vae.config

    def per_channel(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1)

    mean = getattr(config, "latents_mean", None)
    if mean is None:
        mean = getattr(config, "shift_factor", None) or 0.0
    std = getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    return per_channel(mean), per_channel(1.0 if std is None else std) / scale


@torch.no_grad()
def encode(
    vae: nn.Module,
    x: Tensor,
    *,
    posterior: Literal["mean", "sample"] = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents [B, C, H / f, W / f] float32 of images x [B, 3, H, W] in [-1, 1].

    Args:
        posterior: of a variational autoencoder, its mean or a draw from it (by `generator`).

    Raises:
        ValueError: H or W is no multiple of the autoencoder's factor f.
    """
    factor = downsampling(vae)
    if x.dim() != 4 or x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(
            f"x must have shape [B, C, H, W], H and W multiples of {factor} (the autoencoder's "
            f"downsampling), got {list(x.shape)}"
        )
    encoded = vae.encode(x.to(next(vae.parameters()).dtype))
    if hasattr(encoded, "latent_dist"):
        distribution = encoded.latent_dist
        z = distribution.sample(generator) if posterior == "sample" else distribution.mode()
    else:
        z = encoded.latent if hasattr(encoded, "latent") else encoded.latents
    mean, std = (value.to(z.device) for value in statistics(vae))
    return (z.float() - mean) / std


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Images [B, 3, f H, f W] float32, about [-1, 1], of latents [B, C, H, W].

    Raises:
        ValueError: the latents have another number of channels than the autoencoder's.
    """
    channels = vae.config.latent_channels
    if latents.dim() != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"latents must have shape [B, {channels}, H, W] (the autoencoder's channels), "
            f"got {list(latents.shape)}"
        )
    mean, std = (value.to(latents.device) for value in statistics(vae))
    z = latents.float() * std + mean
    return vae.decode(z.to(next(vae.parameters()).dtype)).sample.float()


def enable_tiling(vae: nn.Module, size: int | None = None) -> None:
    """Encode and decode images whose side exceeds `size` pixels in overlapping tiles of that side.

    Memory then grows with the tile, not with the image; smaller images are treated as before.

    Args:
        size: multiple of the downsampling factor. None: 1024, and 2048 where a latent stands for 32
            pixels or more, since a tile must be large in latents for its edges not to matter.

    Raises:
        ValueError: size is no positive multiple of the factor, or the autoencoder has no tiling.
    """
    factor = downsampling(vae)
    if size is None:
        size = 2048 if factor >= 32 else 1024
    if size < 8 * factor or size % (8 * factor):
        raise ValueError(
            f"size must be a multiple of {8 * factor} (8 times the autoencoder's downsampling), "
            f"got {size}"
        )
    if hasattr(vae, "tile_sample_min_height"):
        stride = size // 8 * 7
        vae.enable_tiling(size, size, stride, stride)
    elif hasattr(vae, "tile_sample_min_size"):
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = size, size // factor
    else:
        raise ValueError(f"a {type(vae).__name__} has no tiling")
