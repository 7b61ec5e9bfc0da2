"""Layers that the embedders and the blocks share."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tim import ops


class Linear(nn.Linear):
    """nn.Linear whose forward-mode tangent keeps no autograd graph (see `tim.ops.linear`)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension that torch.compile can differentiate forward."""

    def forward(self, x: Tensor) -> Tensor:
        # Not layer_norm's own affine form: its forward-mode rule breaks under torch.compile (2.13).
        return F.layer_norm(x, self.normalized_shape, eps=self.eps) * self.weight + self.bias


class SwiGLU(nn.Module):
    """fc2(silu(fc1_g(x)) * fc1_x(x)): MLP, modulation and caption embedder of the network.

    Source: Shazeer, "GLU variants improve Transformer" (arXiv 2002.05202), eq. 5.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1_g = Linear(in_features, hidden_features)
        self.fc1_x = Linear(in_features, hidden_features)
        self.fc2 = Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.swiglu(self.fc1_g(x), self.fc1_x(x)))
