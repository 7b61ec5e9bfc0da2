"""Precision and recall of a set of samples, from the nearest neighbours of their features.

Source: Kynkaanniemi et al. (arXiv 1904.06991), eq. 1 and 2. Distances are computed in blocks: the
matrices of 50 000 images do not fit into memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
#: Rows of distances computed at a time.
BLOCK = 1024


def precision_recall(
    real: Tensor, samples: Tensor, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of samples that lie among the real images, and of real images among the samples.

    A point lies among a set when it is no farther from one of its members than that member's
    k-th neighbour in the set.

    Args:
        real, samples: features [N, D], [M, D].
        neighbours: k.

    Raises:
        ValueError: shapes do not fit, or a set has no more than k members.
    """
    for name, features in (("real", real), ("samples", samples)):
        if features.dim() != 2 or features.shape[1] != real.shape[-1]:
            raise ValueError(
                f"{name} must have shape [N, {real.shape[-1]}], got {list(features.shape)}"
            )
        if len(features) <= neighbours:
            raise ValueError(
                f"{name} must have more rows than neighbours, {neighbours}, got {len(features)}"
            )
    # Distances come from products of the rows, which lose digits where all rows are far from zero.
    centre = real.mean(0)
    real, samples = real - centre, samples - centre
    precision = _share_among(samples, real, _radii(real, neighbours))
    recall = _share_among(real, samples, _radii(samples, neighbours))
    return precision, recall


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance [N] of each point to its k-th neighbour."""
    radii = []
    for start in range(0, len(points), BLOCK):
        distance = torch.cdist(points[start : start + BLOCK], points)
        rows = torch.arange(len(distance), device=points.device)
        distance[rows, start + rows] = torch.inf  # not its own neighbour
        radii.append(distance.kthvalue(neighbours, 1).values)
    return torch.cat(radii)


def _share_among(queries: Tensor, points: Tensor, radii: Tensor) -> float:
    within = [(torch.cdist(block, points) <= radii).any(1) for block in queries.split(BLOCK)]
    return torch.cat(within).double().mean().item()
