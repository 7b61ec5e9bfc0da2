"""A step of the sampler, network and transition, as a CUDA graph that is kept for later steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from tim.graphs import Replayed
from tim.transports import Transport

#: Graphs kept for a model: one for each shape, with and without guidance and fresh noise.
MOST_GRAPHS = 8


def network_step(
    model: Callable[..., Tensor],
    x: Tensor,
    c_t: Tensor,
    c_r: Tensor,
    conditions: Tensor,
    cfg_scale: float | Tensor,
) -> Tensor:
    """F [B, C, H, W] in float64; guided where conditions are 2 B, the null ones behind.

    cfg_scale: a number, or [B, 1, 1, 1].
    """
    guided = len(conditions) > len(x)
    F = model(torch.cat([x, x]) if guided else x, c_t, c_r, conditions).double()
    if not guided:
        return F
    F_cond, F_null = F.chunk(2)
    return F_null + cfg_scale * (F_cond - F_null)


def step_weights(
    transport: Transport, t: Tensor, r: Tensor, stochasticity: float | None
) -> list[float]:
    """What state, F and, given a stochasticity, fresh noise count in the next state."""
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    if stochasticity is None:
        return [transport.step(x, t, r, F).item() for x, F in ((one, zero), (zero, one))]
    return [
        transport.stochastic_step(x, t, r, F, stochasticity, z).item()
        for x, F, z in ((one, zero, zero), (zero, one, zero), (zero, zero, one))
    ]


def replayed_step(
    model: Callable[..., Tensor],
    x: Tensor,
    fresh: Tensor | None,
    y: Tensor,
    null: Tensor | None,
    cfg_scale: float | Tensor,
    weights: Sequence[float],
    *,
    times: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    """The state after a step of x [B, C, H, W] in float64, guided where `null` is given.

    `times` are c_noise(t) and c_noise(r), `weights` those of `step_weights`, and the network sees
    the state in `dtype`.
    """
    conditions = y if null is None else torch.cat([y, null.to(y)])
    key = (
        x.shape, x.device, dtype, conditions.shape, conditions.dtype, null is None, fresh is None,
        torch.is_inference_mode_enabled(), _autocast(x.device),
        *(weight.data_ptr() for weight in _weights_of(model)),
    )  # fmt: skip
    graphs = _graphs.setdefault(model, OrderedDict())
    if key not in graphs:
        graphs[key] = StaticStep(model, x, fresh, conditions, dtype)
        while len(graphs) > MOST_GRAPHS:
            graphs.popitem(last=False)
    graphs.move_to_end(key)
    step = graphs[key]
    step.load(x, fresh, conditions, cfg_scale, weights, times)
    return step.replayed()


class StaticStep:
    """A step whose numbers are all in tensors that stay where they are."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        fresh: Tensor | None,
        conditions: Tensor,
        dtype: torch.dtype,
    ):
        # No reference that would keep the model: its graphs live as long as it does.
        self._model = ref(model)
        self.dtype, device = dtype, x.device
        self.x, self.conditions = torch.empty_like(x), torch.empty_like(conditions)
        self.fresh = None if fresh is None else torch.empty_like(fresh)
        time_dtype = torch.promote_types(dtype, torch.float32)
        self.times = torch.empty(2, len(conditions), dtype=time_dtype, device=device)
        self.weights = torch.empty(3, dtype=torch.float64, device=device)
        self.cfg_scale = torch.empty(len(x), 1, 1, 1, dtype=torch.float64, device=device)
        self.replayed = Replayed(self.run, device, "cuda_graph")

    def load(
        self,
        x: Tensor,
        fresh: Tensor | None,
        conditions: Tensor,
        cfg_scale: float | Tensor,
        weights: Sequence[float],
        times: tuple[float, float],
    ) -> None:
        self.x.copy_(x)
        self.conditions.copy_(conditions)
        if fresh is not None:
            self.fresh.copy_(fresh)
        # Filled and not copied: a copy from the host would wait for the device.
        if isinstance(cfg_scale, Tensor):
            self.cfg_scale.copy_(cfg_scale)
        else:
            self.cfg_scale.fill_(cfg_scale)
        for place, value in zip(self.times, times, strict=True):
            place.fill_(value)
        for place, value in zip(self.weights, weights, strict=False):
            place.fill_(value)

    def run(self) -> Tensor:
        x = self.x.to(self.dtype)
        with _without_cast_cache(x.device):
            F = network_step(self._model(), x, *self.times, self.conditions, self.cfg_scale)
        a, b, c = self.weights
        x = a * self.x + b * F
        return x if self.fresh is None else x + c * self.fresh


_graphs: WeakKeyDictionary[Callable, OrderedDict[tuple, StaticStep]] = WeakKeyDictionary()


def _weights_of(model: object) -> Iterator[Tensor]:
    if isinstance(model, nn.Module):
        yield from model.parameters()
        yield from model.buffers()


def _autocast(device: torch.device) -> torch.dtype | None:
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _without_cast_cache(device: torch.device) -> AbstractContextManager:
    """Autocast as it is, but weights cast in the graph: casts that autocast keeps do not last."""
    dtype = _autocast(device)
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
