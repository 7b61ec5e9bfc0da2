"""Checks of what a network is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tim._checks import check_floating, check_tensor
from tim.models.config import TiMConfig
from tim.ops import pairs


def check(
    config: TiMConfig, x: Any, t: Tensor, r: Tensor, y: Tensor, return_features: bool
) -> None:
    """TypeError or ValueError, as `TiM.forward` promises."""
    packed = isinstance(x, (list, tuple))
    images = {f"x[{i}]": image for i, image in enumerate(x)} if packed else {"x": x}
    if not images:
        raise ValueError("x must hold at least one image, got an empty sequence")
    for name, value in (*images.items(), ("t", t), ("r", r), ("y", y)):
        check_tensor(name, value)
    batch, form = len(x), (3, "[") if packed else (4, "[B, ")
    for name, image in images.items():
        if image.dim() != form[0] or image.shape[-3] != config.in_channels:
            raise ValueError(
                f"{name} must have shape {form[1]}{config.in_channels}, H, W], "
                f"got {list(image.shape)}"
            )
        height, width = image.shape[-2:]
        if height % config.patch_size or width % config.patch_size or not height * width:
            raise ValueError(
                f"{name} must have H and W that are multiples of patch_size "
                f"{config.patch_size}, got {height} x {width}"
            )
    for name, time in (("t", t), ("r", r)):
        if time.shape != (batch,):
            raise ValueError(f"{name} must have shape [B] = [{batch}], got {list(time.shape)}")
    floats = {**images, "t": t, "r": r}
    if config.num_classes is None:
        floats["y"] = y
        if y.dim() != 3 or y.shape[0] != batch or y.shape[2] != config.cap_feat_dim:
            raise ValueError(
                f"y must have shape [B, M, K] = [{batch}, M, {config.cap_feat_dim}], "
                f"got {list(y.shape)}"
            )
    elif y.shape != (batch,):
        raise ValueError(f"y must have shape [B] = [{batch}], got {list(y.shape)}")
    elif y.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"y must hold int64 or int32 labels, got {y.dtype}")
    for name, tensor in floats.items():
        check_floating(name, tensor)
    if return_features and config.z_dim is None:
        raise ValueError("return_features needs a projection head, got a config with z_dim None")


def moving_images(x: Sequence[Tensor], t: Tensor, r: Tensor, tangents: tuple | None) -> int:
    """Images of a packed batch that have tangents."""
    if tangents is not None:
        return len(tangents[0])
    dual = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(value).tangent is not None for value in (*x, t, r)
    )
    return len(x) if dual else 0


def checked_tangents(
    x: Tensor | Sequence[Tensor],
    t: Tensor,
    r: Tensor,
    y: Tensor,
    tangents: tuple[Tensor | Sequence[Tensor], Tensor],
) -> tuple[Tensor | list[Tensor], Tensor]:
    v, dt = tangents
    packed = not isinstance(x, Tensor)
    for name, value in (
        *((f"tangents[0][{i}]", image) for i, image in enumerate(v if packed else ())),
        *(() if packed else (("tangents[0]", v),)),
        ("tangents[1]", dt),
    ):
        check_tensor(name, value)
    last = x[len(x) - len(v) :]
    if packed:
        fits = [image.shape for image in v] == [image.shape for image in last]
    else:
        fits = v.shape[1:] == x.shape[1:]
    if not fits or dt.shape != (len(v),) or len(v) > len(x):
        given, rest = (
            ([list(i.shape) for i in images] if packed else list(images.shape)) for images in (v, x)
        )
        raise ValueError(
            f"tangents must have shapes [T, C, H, W] and [T] with T <= B = {len(x)} and "
            f"the rest of x, {rest}, got {given} and {list(dt.shape)}"
        )
    images = (*x, *v) if packed else (x,)
    pairs.refuse_tangents("the network with tangents given", *images, t, r, y)
    v = [image.detach() for image in v] if packed else v.detach()
    return v, dt.detach().to(t.dtype)
