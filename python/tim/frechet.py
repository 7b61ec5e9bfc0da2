"""Frechet distance between sets of images, in the features of a classifier trained on the spot.

For small labelled data sets whose pictures an ImageNet network has never seen (digits, clothes):
the classifier is trained on the real training images of the same run, so the numbers of one data
set compare with each other and with nothing else.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

FEATURES = 64


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features a [N, D], b [M, D].

    Computed in float64. Raises ValueError for sets that are not matrices of one width with at least
    two rows.

    Source: Heusel et al. (arXiv 1706.08500), eq. 6.
    """
    for name, features in (("a", a), ("b", b)):
        if features.dim() != 2 or len(features) < 2 or features.shape[1] != a.shape[-1]:
            raise ValueError(
                f"{name} must have shape [N >= 2, {a.shape[-1]}], got {list(features.shape)}"
            )
    a, b = a.double(), b.double()
    # cov of a single feature is a scalar.
    c_a, c_b = (torch.atleast_2d(features.T.cov()) for features in (a, b))
    # (C_a C_b)^(1/2) has the trace of (R C_b R)^(1/2) with R = C_a^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + c_a.trace() + c_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


class Classifier(nn.Module):
    """A small convolutional classifier; `features` is its penultimate layer, [B, 64]."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits [B, K] of images x [B, C, H, W] in [-1, 1]."""
        return self.head(self.body(x))

    @torch.no_grad()
    def features(self, x: Tensor, batch_size: int = 512) -> Tensor:
        return torch.cat([self.body(part) for part in x.split(batch_size)])

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor, batch_size: int = 512) -> float:
        """Share of images x that are taken for their label y [B]."""
        found = torch.cat([self(part).argmax(1) for part in x.split(batch_size)])
        return (found == y).double().mean().item()


def train_classifier(
    x: Tensor, y: Tensor, num_classes: int, *, seed: int = 0, steps: int = 800, batch_size: int = 64
) -> Classifier:
    """A classifier of images x [N, C, H, W] in [-1, 1] with labels y [N]; same seed, same weights.

    Images are moved by up to one pixel, which is what keeps the features of the training images
    comparable with those of images the classifier has not seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(x.shape[1], num_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(x), (batch_size,))
            shift = torch.randint(-1, 2, (2,)).tolist()
            images = F.pad(x[chosen], (1, 1, 1, 1), value=-1.0)
            images = images.roll(shift, (2, 3))[:, :, 1:-1, 1:-1]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), y[chosen], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
