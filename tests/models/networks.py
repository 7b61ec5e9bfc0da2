"""Tiny networks in which every parameter matters, and inputs for them."""

import torch
from torch import Tensor

from tim.models import TiM, TiMConfig

LABELS = TiMConfig(
    input_size=8, hidden_size=48, depth=3, num_heads=2, num_classes=10, encoder_depth=2, z_dim=20,
    projector_dim=24, lora_hidden_size=16,
)  # fmt: skip
CAPTIONS = TiMConfig(
    input_size=8, patch_size=1, in_channels=3, hidden_size=32, depth=2, num_heads=2,
    num_classes=None, cap_feat_dim=12, encoder_depth=1, z_dim=20, projector_dim=24,
)  # fmt: skip
KINDS = {"labels": LABELS, "captions": CAPTIONS}


def network(config: TiMConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> TiM:
    """A network with no parameter at 0 or 1, so that no branch of it is silent.

    Weights are drawn in float64 and rounded, the same for every dtype.
    """
    model = TiM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values *= fan_in**-0.5 if parameter.dim() > 1 else 0.1
        if "_norm.weight" in name or name.endswith(".norm.weight"):
            values += 1
        parameter.data = values.to(dtype)
    return model


def arguments(
    config: TiMConfig, dtype: torch.dtype = torch.float32, batch: int = 3, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x on a non-square grid, t, r and the condition; one sample has t = r, one r = 0."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 4 * config.patch_size, 3 * config.patch_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(batch, config.in_channels, height, width)
    t = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)[:batch]
    r = torch.tensor([0.2, 0.6, 0.0], dtype=torch.float64)[:batch]
    wide = torch.promote_types(dtype, torch.float32)
    if config.num_classes is None:
        return x, t.to(wide), r.to(wide), draw(batch, 5, config.cap_feat_dim)
    labels = torch.tensor([1, config.num_classes, 3])[:batch]
    return x, t.to(wide), r.to(wide), labels
