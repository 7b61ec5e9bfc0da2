"""The network's time derivative dF = d/dt F(x_t, t, r) along a path: exact, or by differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tim import images
from tim._passes import without_gradient
from tim.images import Images
from tim.transports import Transport


@dataclass(frozen=True)
class Network:
    """A model as a function of times t and r [B]: (F, h), h None unless features are wanted."""

    model: Callable
    transport: Transport
    with_features: bool = False

    def __call__(self, x: Images, t: Tensor, r: Tensor, y: Tensor) -> tuple[Images, Images | None]:
        times = self.transport.c_noise(t), self.transport.c_noise(r)
        if self.with_features:
            return self.model(x, *times, y, return_features=True)
        return self.model(x, *times, y), None

    def without_features(self) -> Network:
        return Network(self.model, self.transport)

    def with_tangents(
        self, x: Images, t: Tensor, r: Tensor, y: Tensor, v: Images
    ) -> tuple[Images, Images | None, Images]:
        """F and h, and dF of the last samples, those of v, by a model that takes tangents."""
        times = self.transport.c_noise(t), self.transport.c_noise(r)
        tangents = v, self.transport.c_noise_derivative(t[len(t) - len(v) :])
        F, *h, dF = self.model(x, *times, y, return_features=self.with_features, tangents=tangents)
        return F, h[0] if h else None, dF

    def derivative(
        self, x: Images, t: Tensor, r: Tensor, y: Tensor, v: Images
    ) -> tuple[Images, Images | None, Images]:
        """F, h and dF with tangents (v, 1, 0) of (x, t, r)."""

        def along_path(x: Images, t: Tensor) -> Images | tuple[Images, Images]:
            F, h = self(x, t, r, y)
            return (F, h) if self.with_features else F

        # func.jvp and not forward_ad.dual_level: the latter fails under FSDP2.
        tangents = (v, torch.ones_like(t))
        F, dF, *h = torch.func.jvp(along_path, (x, t), tangents, has_aux=self.with_features)
        return F, h[0] if h else None, images.each(Tensor.detach, dF)


def exact_derivative(
    network: Network, x_t: Images, t: Tensor, r: Tensor, y: Tensor, v: Images, n: int
) -> tuple[Images, Images | None, Images]:
    """F and h of the whole batch, with gradient, and dF along v [B - n, ...] of the samples from n.

    One pass of a model that takes tangents as an argument, `TiM`: they ride along with the forward
    pass that the gradient needs. Of any other network a pass for the samples with derivative and
    one for those without; with activation checkpointing one without gradient and one with, because
    recomputation in the backward pass does not know of tangents.
    """
    if takes_tangents(network.model):
        return network.with_tangents(x_t, t, r, y, v)
    tail = (x_t[n:], t[n:], r[n:], y[n:])
    if recomputes_activations(network.model):
        with without_gradient(t.device):
            _, _, dF = network.without_features().derivative(*tail, v)
        return *network(x_t, t, r, y), dF
    F, h, dF = network.derivative(*tail, v)
    if n == 0:
        return F, h, dF
    F_head, h_head = network(x_t[:n], t[:n], r[:n], y[:n])
    return images.joined(F_head, F), None if h is None else images.joined(h_head, h), dF


def central_pair(
    network: Network, ahead: Images, behind: Images, t: Tensor, r: Tensor, y: Tensor, e: Tensor
) -> tuple[Images, Images]:
    """F at the states ``ahead`` (time t + e) and ``behind`` (t - e): one pass without gradient."""
    with without_gradient(t.device):
        F, _ = network.without_features()(
            images.joined(ahead, behind),
            torch.cat([t + e, t - e]),
            torch.cat([r, r]),
            torch.cat([y, y]),
        )
    return images.halves(F)


def takes_tangents(model: Callable) -> bool:
    """Whether the network, also wrapped by DDP or torch.compile, has an argument `tangents`."""
    while isinstance(model, nn.Module):
        if getattr(model, "takes_tangents", False):
            return True
        children = vars(model).get("_modules", {})
        model = children.get("module", children.get("_orig_mod"))
    return False


def recomputes_activations(model: Callable) -> bool:
    """Whether the network, wrapped or not, has activation checkpointing switched on."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    flags = (vars(module).get("gradient_checkpointing") for module in modules)
    return any(flags)
