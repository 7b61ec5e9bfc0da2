"""Layers that the embedders and the blocks share."""

from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tim import ops
from tim.ops import pairs
from tim.ops.pairs import Operand


class Linear(nn.Linear):
    """nn.Linear whose forward-mode tangent keeps no autograd graph (see `tim.ops.linear`)."""

    def forward(self, x: Operand) -> Operand:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension that torch.compile can differentiate forward."""

    def forward(self, x: Operand) -> Operand:
        return pairs.lift(self._norm, x)

    def _norm(self, x: Tensor) -> Tensor:
        # Not layer_norm's own affine form: its forward-mode rule breaks under torch.compile (2.13).
        return F.layer_norm(x, self.normalized_shape, eps=self.eps) * self.weight + self.bias


class SiLU(nn.SiLU):
    """nn.SiLU of a Pair too."""

    def forward(self, x: Operand) -> Operand:
        return ops.silu(x)


class SwiGLU(nn.Module):
    """fc2(silu(fc1_g(x)) * fc1_x(x)): MLP, modulation and caption embedder of the network.

    Source: Shazeer, "GLU variants improve Transformer" (arXiv 2002.05202), eq. 5.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1_g = Linear(in_features, hidden_features)
        self.fc1_x = Linear(in_features, hidden_features)
        self.fc2 = Linear(hidden_features, out_features)

    def forward(self, x: Operand) -> Operand:
        return self.fc2(ops.swiglu(self.fc1_g(x), self.fc1_x(x)))


def grouped_swiglu(x: Operand, layers: Sequence[SwiGLU]) -> Operand:
    """All layers, which are alike, of one vector for each sample x [B, K]: [B, layers, M]."""

    def grouped(x: Operand, *group: Linear) -> Operand:
        return ops.grouped_linear(x, [fc.weight for fc in group], [fc.bias for fc in group])

    both = grouped(x, *(layer.fc1_g for layer in layers), *(layer.fc1_x for layer in layers))
    both = pairs.each(lambda hidden: hidden.unflatten(1, (2, -1)).flatten(2), both)
    inner = ops.swiglu(*pairs.unbind(both, 1))
    inner = pairs.each(lambda hidden: hidden.unflatten(1, (len(layers), -1)), inner)
    return grouped(inner, *(layer.fc2 for layer in layers))
