"""From latents, times, labels and captions to tokens and conditioning vectors."""

import math

import torch
import torch.nn as nn
from torch import Tensor

from tim import ops
from tim.models.layers import LayerNorm, Linear, SwiGLU
from tim.models.tables import cached

FREQUENCIES = 128
MAX_PERIOD = 10000.0


class PatchEmbedder(nn.Module):
    """Latents [B, C, H, W] to tokens [B, (H / p) (W / p), hidden], row-major.

    The released weights are those of a convolution with kernel and stride p. Since the patches do
    not overlap it is a matrix product, and as one it has a tangent without graph.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        batch, channels, height, width = x.shape
        rows, columns = height // p, width // p
        patches = x.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, rows * columns, channels * p * p)
        return ops.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """Times [B] to vectors [B, hidden]: 128 cosines, 128 sines, two linear layers.

    The frequencies are 10000^(-k / 128), k = 0..127, and the times enter as they are. Features are
    formed in at least float32 and, under autocast, embedded in the dtype of the parameters: that
    costs a vector per sample, and the time derivative passes through here.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(2 * FREQUENCIES, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        features = time_features(t).to(self.mlp[0].weight.dtype)
        if not torch.amp.is_autocast_available(t.device.type):
            return self.mlp(features)
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(features)


def time_features(t: Tensor) -> Tensor:
    """Cosines, then sines of the times t [B]: [B, 256], float64 for float64 times, else float32."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    angles = t.to(dtype)[:, None] * cached(_frequencies, t.device, dtype)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _frequencies(device: torch.device, dtype: torch.dtype) -> Tensor:
    steps = torch.arange(FREQUENCIES, dtype=torch.float64, device=device)
    return torch.exp(steps * (-math.log(MAX_PERIOD) / FREQUENCIES)).to(dtype)


class LabelEmbedder(nn.Module):
    """Class labels [B] to vectors [B, hidden]; the last row of the table is the null label's."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.embedding_table(y)
        try:
            return self.embedding_table(y)
        except IndexError:  # on a CPU; a GPU reports it later, on its own terms
            raise ValueError(
                f"y must hold labels from 0 to {self.embedding_table.num_embeddings - 1} (the null "
                f"label), got labels from {y.min()} to {y.max()}"
            ) from None


class CaptionEmbedder(nn.Module):
    """Caption features [B, M, K] of a text encoder to text tokens [B, M, hidden]."""

    def __init__(self, cap_feat_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = LayerNorm(cap_feat_dim)
        self.mlp = SwiGLU(cap_feat_dim, 4 * hidden_size, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.mlp(self.norm(y.to(self.norm.weight.dtype)))
