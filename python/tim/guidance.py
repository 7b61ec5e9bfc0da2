"""Guidance in training: the published "enhanced target" (arXiv 2509.04394)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from tim._checks import check_number


@dataclass(frozen=True)
class Guidance:
    """Guidance in training: for w_start <= t <= w_end the target's velocity v_t is replaced by

    w_gt v_t + w_cond v(F_cond) + (1 - w_gt - w_cond) v(F_null)

    with F_cond and F_null the predictions at (x_t, t, t) of the averaged network and v(F) the
    velocity that F stands for. ``along`` names the velocity that the derivative follows: "guided"
    makes the target consistent with the guided path, "data" is the published form.
    """

    w_gt: float = 1.0
    w_cond: float = 0.75
    w_start: float = 0.3
    w_end: float = 0.8
    along: Literal["guided", "data"] = "guided"

    def __post_init__(self) -> None:
        for name in ("w_gt", "w_cond", "w_start", "w_end"):
            check_number(f"guidance {name}", getattr(self, name))
        if not self.w_start <= self.w_end:
            raise ValueError(
                f"guidance needs w_start <= w_end, got w_start={self.w_start}, w_end={self.w_end}"
            )
        if self.along not in ("guided", "data"):
            raise ValueError(f"guidance along must be 'guided' or 'data', got {self.along!r}")

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """w_gt and w_cond per sample: 1 and 0 outside the window."""
        inside = (t >= self.w_start) & (t <= self.w_end)
        one = torch.ones_like(t)
        return torch.where(inside, self.w_gt, one), torch.where(inside, self.w_cond, 0 * one)


def as_guidance(guidance: Guidance | Mapping | None) -> Guidance | None:
    if guidance is None or isinstance(guidance, Guidance):
        return guidance
    if not isinstance(guidance, Mapping):
        raise TypeError(f"guidance must be a mapping or Guidance, got {type(guidance).__name__}")
    known = [field.name for field in fields(Guidance)]
    for key in guidance:
        if key not in known:
            raise ValueError(f"guidance has no field {key!r}, only {', '.join(known)}")
    return Guidance(**guidance)
