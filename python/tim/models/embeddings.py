"""From latents, times, labels and captions to tokens and conditioning vectors."""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from tim import ops
from tim.models.layers import LayerNorm, Linear, SiLU, SwiGLU
from tim.models.tables import cached
from tim.ops import pairs
from tim.ops.pairs import Operand, Pair

FREQUENCIES = 128
MAX_PERIOD = 10000.0


class PatchEmbedder(nn.Module):
    """Patches [..., C p p] of latents to tokens [..., hidden].

    The released weights are those of a convolution with kernel and stride p. Since the patches do
    not overlap it is a matrix product, and as one it has a tangent without graph.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, patches: Operand) -> Operand:
        return ops.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def patches(self, x: Tensor) -> Tensor:
        """Latents [B, C, H, W] as patches [B, (H / p) (W / p), C p p], row-major."""
        p = self.patch_size
        batch, channels, height, width = x.shape
        rows, columns = height // p, width // p
        patches = x.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(batch, rows * columns, channels * p * p)


class TimeEmbedder(nn.Module):
    """Times [B] to vectors [B, hidden]: 128 cosines, 128 sines, two linear layers.

    The frequencies are 10000^(-k / 128), k = 0..127, and the times enter as they are. Features are
    formed in at least float32 and, under autocast, embedded in the dtype of the parameters: that
    costs a vector per sample, and the time derivative passes through here.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(2 * FREQUENCIES, hidden_size), SiLU(), Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Operand) -> Operand:
        dtype, device = self.mlp[0].weight.dtype, self.mlp[0].weight.device.type
        features = pairs.each(lambda values: values.to(dtype), time_features(t))
        # Asked only where it can be "no": older compilers stop at the question.
        if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
            return self.mlp(features)
        with torch.autocast(device, enabled=False):
            return self.mlp(features)


def time_features(t: Operand) -> Operand:
    """Cosines, then sines of the times t [B]: [B, 256], float64 for float64 times, else float32."""
    if not isinstance(t, Pair):
        angles = _angles(t, _frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=1)
    angles = _angles(t.primal, _frequencies)
    cosines, sines = angles.cos(), angles.sin()
    with torch.no_grad():
        first = len(angles) - len(t.tangent)
        turning = _angles(t.tangent.to(angles.dtype), _turning)
        tangent = torch.cat((sines[first:], cosines[first:]), dim=1) * turning
    return Pair(torch.cat((cosines, sines), dim=1), tangent)


def _angles(t: Tensor, frequencies: Callable[[torch.device, torch.dtype], Tensor]) -> Tensor:
    dtype = torch.promote_types(t.dtype, torch.float32)
    return t.to(dtype)[:, None] * cached(frequencies, t.device, dtype)


def _frequencies(device: torch.device, dtype: torch.dtype) -> Tensor:
    steps = torch.arange(FREQUENCIES, dtype=torch.float64, device=device)
    return torch.exp(steps * (-math.log(MAX_PERIOD) / FREQUENCIES)).to(dtype)


def _turning(device: torch.device, dtype: torch.dtype) -> Tensor:
    """How fast cosines follow the sines and sines the cosines."""
    frequencies = _frequencies(device, dtype)
    return torch.cat((-frequencies, frequencies))


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

    def forward(self, y: Operand) -> Operand:
        y = pairs.each(lambda captions: captions.to(self.norm.weight.dtype), y)
        return self.mlp(self.norm(y))
