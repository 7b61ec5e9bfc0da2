"""What the paper's authors released: files, and the networks that turn pixels and words to tensors.

Names and numbers are those of the public repository (github.com/WZDTHU/TiM) and its hub pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tim.models.config import TiMConfig
from tim.models.sizes import ARCHITECTURES

SD_VAE = "stabilityai/sd-vae-ft-ema"
DC_AE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
GEMMA = "google/gemma-3-1b-it"


@dataclass(frozen=True)
class Release:
    """One released weight file and what it was trained with."""

    preset: str
    """Name of its architecture and training recipe here."""
    repository: str
    """Hub repository."""
    file: str
    """Weight file in it."""
    image_size: int
    """Side of the training images in pixels (of the text model: of a square one)."""
    autoencoder: str
    """Hub id of the autoencoder whose latents it models."""
    text_encoder: str | None = None
    """Hub id of the encoder of its captions."""

    @property
    def config(self) -> TiMConfig:
        """The architecture, with the released enumeration of token positions."""
        return released_config(self.preset)


RELEASES = (
    Release("tim-xl2-256", "GoodEnough/TiM-C2I", "c2i_model_256.safetensors", 256, SD_VAE),
    Release("tim-xl1-512", "GoodEnough/TiM-C2I", "c2i_model_512.safetensors", 512, DC_AE),
    Release("tim-t2i-xl1", "GoodEnough/TiM-T2I", "t2i_model.bin", 1024, DC_AE, GEMMA),
)


def released_config(preset: str) -> TiMConfig:
    """Architecture of that name as the released weights need it.

    Raises ValueError for an unknown name.
    """
    if preset not in ARCHITECTURES:
        raise ValueError(f"preset must be one of {', '.join(ARCHITECTURES)}, got {preset!r}")
    return replace(ARCHITECTURES[preset], rope_grid="released")


def release_of(
    *, preset: str | None = None, repository: str | None = None, file: str | None = None
) -> Release | None:
    """The one release with all that is given; None when none has it.

    Raises ValueError when several have: the presets to choose from are listed.
    """
    asked = {"preset": preset, "repository": repository, "file": file}
    asked = {name: value for name, value in asked.items() if value is not None}
    found = [r for r in RELEASES if all(getattr(r, k) == v for k, v in asked.items())]
    if len(found) > 1:
        names = " or ".join(repr(release.preset) for release in found)
        raise ValueError(f"{repository} holds several models: pass preset={names}")
    return found[0] if found else None
