"""A training step whose operations all run on the emulated CUDA kernels."""

import torch
from contract import assert_close
from emulated import emulated, launched
from torch import Tensor

from models.networks import LABELS, arguments, network
from tim import ops, transports
from tim.objective import TransitionLoss


def step(dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """The error of each sample, and the gradients of the loss."""
    model = network(LABELS, dtype)
    x, t, r, y = arguments(LABELS, dtype)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
    order = t.eq(r).argsort(descending=True, stable=True)  # those without a derivative first
    loss = TransitionLoss(transport=transports.get("ot_fm"), diffusion_ratio=1 / 3)
    out = loss(model, x, z, y[order], t=t[order], r=r[order])
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.denoising.detach(), gradients


def test_a_training_step_is_as_exact_as_that_of_the_references() -> None:
    with ops.reference_only():
        exact, exact_gradients = step(torch.float64)
        yardstick, yardstick_gradients = step()
    launched.clear()
    with emulated():
        error, gradients = step()
    kernels = {"adaln", "qk_norm_rope", "swiglu"}
    expected = {name + direction for name in kernels for direction in ("_tangent", "_backward")}
    assert expected | {"transition_loss", "transition_loss_backward"} <= set(launched)
    assert_close(error, exact, yardstick, 2, "error")
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, exact_gradients[name], yardstick_gradients[name], 3, name)
