"""Points on the noising path: x_t and its velocity, or two neighbours of x_t, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from tim.ops import _dispatch as dispatch


def interpolate(x: Tensor, z: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """a = c0 x + c1 z and b = c2 x + c3 z with four numbers per sample.

    Rows (alpha, sigma, alpha', sigma') give x_t and v_t; rows of two times t+e and t-e give x at
    these times.

    Args:
        x, z: [B, ...], clean latents and noise, same shape and dtype.
        coefficients: [B, 4].

    Returns:
        a, b: [B, ...] in the dtype of x, contiguous.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: shapes or devices differ.
        NotImplementedError: an input carries a forward-mode tangent (the operation has no rule).

    Source: TiM (arXiv 2509.04394), sec. 3: x_t = alpha_t x + sigma_t z.
    """
    device = dispatch.plain_device(x, z, coefficients)
    if device is None:
        dispatch.check_tensors(x=x, z=z, coefficients=coefficients)
    if x.dim() < 1:
        raise ValueError("x must have shape [B, ...], got a scalar")
    dispatch.check_shape("z", z, x.shape, "the shape of x")
    dispatch.check_shape("coefficients", coefficients, (x.shape[0], 4), "[B, 4]")
    return _INTERPOLATE(device, *dispatch.promote(x, z), coefficients)


def interpolate_reference(x: Tensor, z: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The specification, in PyTorch operations."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (-1,) + (1,) * (x.dim() - 1)
    c0, c1, c2, c3 = (c.reshape(shape) for c in coefficients.to(wide).unbind(1))
    return (c0 * x + c1 * z).to(x.dtype), (c2 * x + c3 * z).to(x.dtype)


def _forward(x: Tensor, z: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    x, z = x.contiguous(), z.contiguous()
    coefficients = dispatch.float32(coefficients)
    a, b = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        batch = x.shape[0]
        dispatch.launch(
            "interpolate", x, x, z, coefficients, a, b, batch, x.numel() // batch,
            dispatch.DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return a, b


def _fake(x: Tensor, z: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return like, torch.empty_like(like)


_INTERPOLATE = dispatch.Operator(
    "interpolate",
    interpolate_reference,
    plain=dispatch.register(
        "interpolate(Tensor x, Tensor z, Tensor coefficients) -> (Tensor, Tensor)", _forward, _fake
    ),
    outputs=2,
    constant=(0, 1, 2),
)
