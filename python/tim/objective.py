"""The training objective of Transition Models (arXiv 2509.04394): one step's loss and its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from tim import ops
from tim._checks import check_callable, check_floating, check_number, check_tensor
from tim._passes import evaluating, without_gradient
from tim.derivative import Network, central_pair, exact_derivative
from tim.schedule import resolution_shift, shift_within
from tim.transports import Transport, rows

TIME_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda delta, sigma_d: torch.ones_like(delta),
    "reciprocal": lambda delta, sigma_d: 1 / (delta + sigma_d),
    "sqrt": lambda delta, sigma_d: (delta + sigma_d).rsqrt(),
    "square": lambda delta, sigma_d: (delta + sigma_d) ** -2,
    "soft-min-snr": lambda delta, sigma_d: 1 / (delta**2 + sigma_d**2),
}
TIME_WEIGHT_MAPS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda t: t,
    "tangent": torch.tan,
    "sigmoid": lambda t: t / (1 - t),
}
#: The times for which each map ascends; beyond them the time weight has no meaning.
_MAP_LIMITS = {"tangent": torch.pi / 2, "sigmoid": 1.0}


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


@dataclass(frozen=True)
class TransitionLossOutput:
    """What one evaluation of `TransitionLoss` yields; only loss and projection are differentiable.

    The value of ``loss`` says nothing (the adaptive weight cancels it): log ``denoising``.
    """

    loss: Tensor  #: scalar, mean of weight * denoising, weight held constant
    denoising: Tensor  #: [B], squared error plus cosine term
    weight: Tensor  #: [B], time weight / (denoising + 1e-5)
    projection: Tensor  #: scalar, mean of 1 - cos(h, features); 0 without features
    target: Tensor  #: [B, C, H, W]
    t: Tensor  #: [B]
    r: Tensor  #: [B]
    tail_derivative: Tensor | None  #: dF of the samples behind the diffusion part, if there are any

    @functools.cached_property
    def derivative(self) -> Tensor:
        """[B, C, H, W], dF; 0 for the diffusion part."""
        derivative = torch.zeros_like(self.target)
        if self.tail_derivative is not None:
            derivative[len(derivative) - len(self.tail_derivative) :] = self.tail_derivative
        return derivative


@dataclass(frozen=True, kw_only=True)
class TransitionLoss:
    """Loss of a transition network against the target of the state transition identity.

        x_t, v_t = interpolant of x and z at t             F = model(x_t, t, r, y)
        target   = c_x x + c_z z + c_d dF [+ c_cond F_cond + c_null F_null]
        dF       = d/dt F(x_t, t, r) along the path, x, z and r held

    t and r are the larger and the smaller of two draws; the first ``diffusion_ratio`` of the batch
    has r = t (and needs no dF), the last ``consistency_ratio`` has r = T_min. The weight of a
    sample is its time weight, 1 in the diffusion part, over its own loss.

    Args:
        transport: from `tim.transports`.
        derivative: "jvp", exact by forward-mode differentiation, or "dde", the central difference
            (F(x_{t+e}, t+e, r) - F(x_{t-e}, t-e, r)) / 2e with e = ``epsilon``, at most t / 2 for
            transports that are singular at t = 0.
        time_weight: function of delta = map(t) - map(r): "constant" 1, "reciprocal"
            1 / (delta + sigma_d), "sqrt" 1 / sqrt(delta + sigma_d), "square"
            1 / (delta + sigma_d)^2, "soft-min-snr" 1 / (delta^2 + sigma_d^2). Case is ignored.
        time_weight_map: None, "tangent" tan(t) (T_max < pi / 2) or "sigmoid" t / (1 - t)
            (T_max <= 1).
        cosine: add the mean over positions of 1 - cos(F, target) over channels.
        guidance: None, a `Guidance` or a mapping of its fields.
        shift_base: height times width of the latents of a 1024 x 1024 image. Times that are drawn
            are then shifted for the resolution of the batch (`tim.schedule`). None: no shift.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    transport: Transport
    derivative: Literal["jvp", "dde"] = "jvp"
    epsilon: float = 0.005
    diffusion_ratio: float = 0.5
    consistency_ratio: float = 0.1
    time_weight: str = "sqrt"
    time_weight_map: Literal["tangent", "sigmoid"] | None = "tangent"
    cosine: bool = True
    guidance: Guidance | Mapping | None = None
    shift_base: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.transport, Transport):
            raise TypeError(
                f"transport must be a Transport (tim.transports.get), got {self.transport!r}"
            )
        if self.derivative not in ("jvp", "dde"):
            raise ValueError(f"derivative must be 'jvp' or 'dde', got {self.derivative!r}")
        for name in ("epsilon", "diffusion_ratio", "consistency_ratio"):
            check_number(name, getattr(self, name))
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon}")
        for name in ("diffusion_ratio", "consistency_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.diffusion_ratio + self.consistency_ratio > 1 + 1e-9:
            raise ValueError(
                "diffusion_ratio + consistency_ratio must be at most 1, "
                f"got {self.diffusion_ratio} + {self.consistency_ratio}"
            )
        object.__setattr__(self, "time_weight", str(self.time_weight).lower())
        _check_choice("time_weight", self.time_weight, TIME_WEIGHTS)
        _check_choice("time_weight_map", self.time_weight_map, TIME_WEIGHT_MAPS)
        limit, T_max = _MAP_LIMITS.get(self.time_weight_map, float("inf")), self.transport.T_max
        if T_max > limit or (T_max == limit and self.time_weight_map == "tangent"):
            raise ValueError(
                f"time_weight_map {self.time_weight_map!r} needs times below {limit:g}, "
                f"got T_max = {T_max:g} of {self.transport.name}: use time_weight_map=None"
            )
        object.__setattr__(self, "guidance", _as_guidance(self.guidance))
        if self.shift_base is not None:
            check_number("shift_base", self.shift_base)
            if self.shift_base < 1:
                raise ValueError(f"shift_base must be at least 1, got {self.shift_base}")

    def __call__(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        z: Tensor,
        y: Tensor,
        t: Tensor | None = None,
        r: Tensor | None = None,
        null: Tensor | None = None,
        y_guidance: Tensor | None = None,
        ema_model: Callable[..., Tensor] | None = None,
        features: Tensor | None = None,
    ) -> TransitionLossOutput:
        """Loss of ``model`` on one batch; nothing here waits for the device.

        Args:
            model: model(x_t, c_noise(t), c_noise(r), y) -> F [B, C, H, W], and with
                return_features=True -> (F, h [B, N, z_dim]).
            x, z: [B, C, H, W], clean latents and noise; no gradient reaches them.
            y: labels [B] or caption features [B, M, K].
            t, r: [B], both or neither; drawn when not given, else used as they are, and the first
                round(diffusion_ratio B) samples, which must have r = t, have no derivative.
            null: null labels or features, shaped like y; needed with guidance.
            y_guidance: condition of the guidance network, y when None (y with labels dropped).
            ema_model: the guidance network; needed with guidance. Run in evaluation mode.
            features: [B, N, z_dim], what the projection head is to predict.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype or shape, or missing.
        """
        self._check(model, x, z, y, t, r, null, y_guidance, ema_model, features)
        x, z, n = x.detach(), z.detach(), round(self.diffusion_ratio * len(x))
        if t is None:
            t, r = self.draw_times(x)
        transport = self.transport
        x_t, v_t = ops.interpolate(x, z, torch.stack(transport.interpolant(t), dim=1))

        predictions = None
        if self.guidance is None:
            zero = torch.zeros_like(t)
            coefficients = [*transport.coefficients(t, r), zero, zero]
        else:
            w_gt, w_cond = self.guidance.weights(t)
            coefficients = [*transport.guided_coefficients(t, r, w_gt, w_cond)]
            condition = y if y_guidance is None else y_guidance
            predictions = self._predict_guidance(ema_model, x_t, t, condition, null)
            if self.guidance.along == "guided":
                v_t = self._guided_velocity(x_t, v_t, t, w_gt, w_cond, predictions)

        network = Network(model, transport, features is not None)
        pair_or_dF = dF = None
        if n == len(x):
            F, h = network(x_t, t, r, y)
        elif self.derivative == "jvp":
            F, h, dF = exact_derivative(network, x_t, t, r, y, v_t[n:], n)
            pair_or_dF = dF
        else:
            F, h = network(x_t, t, r, y)
            e = self._half_width(t[n:])
            states = self._neighbours(x[n:], z[n:], x_t[n:], t[n:], v_t[n:], e)
            pair_or_dF = ahead, behind = central_pair(network, *states, t[n:], r[n:], y[n:], e)
            dF = (ahead.to(e.dtype) - behind.to(e.dtype)) / rows(2 * e, F)
            c_d = coefficients[2]
            coefficients[2] = torch.cat([c_d[:n], c_d[n:] * self.epsilon / e])

        terms = ops.transition_loss(
            F,
            x,
            z,
            torch.stack(coefficients, dim=1),
            pair_or_dF,
            epsilon=self.epsilon,
            guidance=predictions,
            time_weight=self._time_weights(t, r, n),
            cosine=self.cosine,
        )
        return TransitionLossOutput(
            loss=terms.loss.mean(),
            denoising=terms.denoising,
            weight=terms.weight,
            projection=_projection_loss(h, features, terms.loss),
            target=terms.target,
            t=t,
            r=r,
            tail_derivative=dF,
        )

    def draw_times(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Random t and r [B] for a batch x, from the global generator of its device."""
        batch, dtype = len(x), torch.promote_types(x.dtype, torch.float32)
        n = round(self.diffusion_ratio * batch)
        a, b = (self.transport.sample_t(batch, device=x.device, dtype=dtype) for _ in range(2))
        if self.shift_base is not None:
            shift = resolution_shift(x.shape[2] * x.shape[3], self.shift_base)
            a, b = (shift_within(self.transport, t, shift) for t in (a, b))
        t, r = torch.maximum(a, b), torch.minimum(a, b)
        last = min(round(self.consistency_ratio * batch), batch - n)
        consistency = torch.full_like(r[:last], self.transport.T_min)
        return t, torch.cat([t[:n], r[n : batch - last], consistency])

    def _time_weights(self, t: Tensor, r: Tensor, n: int) -> Tensor:
        apply = TIME_WEIGHT_MAPS[self.time_weight_map]
        delta = apply(t) - apply(r)
        if self.time_weight_map == "sigmoid":
            # t = r = 1 is infinity minus infinity.
            delta = torch.where(t > r, delta, 0)
        weights = TIME_WEIGHTS[self.time_weight](delta, self.transport.sigma_d)
        weights[:n] = 1
        return weights

    def _predict_guidance(
        self, ema_model: Callable, x_t: Tensor, t: Tensor, y: Tensor, null: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The whole batch: which samples lie inside the window is known on the device only.
        with evaluating(ema_model), without_gradient(x_t.device):
            network = Network(ema_model, self.transport)
            twice = t.repeat(2)
            F, _ = network(torch.cat([x_t, x_t]), twice, twice, torch.cat([y, null.to(y.dtype)]))
        return tuple(F.chunk(2))

    def _guided_velocity(
        self,
        x_t: Tensor,
        v_t: Tensor,
        t: Tensor,
        w_gt: Tensor,
        w_cond: Tensor,
        predictions: tuple[Tensor, Tensor],
    ) -> Tensor:
        v_cond, v_null = (self.transport.velocity(x_t, t, F) for F in predictions)
        w_null = 1 - w_gt - w_cond
        guided = rows(w_gt, x_t) * v_t + rows(w_cond, x_t) * v_cond + rows(w_null, x_t) * v_null
        return guided.to(x_t.dtype)

    def _half_width(self, t: Tensor) -> Tensor:
        e = torch.full_like(t, self.epsilon)
        return torch.minimum(e, t / 2) if self.transport.singular_at_zero else e

    def _neighbours(
        self, x: Tensor, z: Tensor, x_t: Tensor, t: Tensor, v: Tensor, e: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States at t + e and t - e: along v for guided derivatives, on the data path otherwise."""
        if self.guidance is not None and self.guidance.along == "guided":
            one = torch.ones_like(e)
            return ops.interpolate(x_t, v, torch.stack([one, e, one, -e], dim=1))
        ahead, behind = self.transport.interpolant(t + e)[:2], self.transport.interpolant(t - e)[:2]
        return ops.interpolate(x, z, torch.stack([*ahead, *behind], dim=1))

    def _check(self, model, x, z, y, t, r, null, y_guidance, ema_model, features) -> None:
        check_callable("model", model)
        for name, value in (("x", x), ("z", z), ("y", y)):
            check_tensor(name, value)
        if x.dim() != 4 or len(x) == 0:
            raise ValueError(f"x must have shape [B, C, H, W] with B > 0, got {list(x.shape)}")
        check_floating("x", x)
        if (z.shape, z.dtype, z.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"z must match x, {list(x.shape)} {x.dtype} on {x.device}, "
                f"got {list(z.shape)} {z.dtype} on {z.device}"
            )
        if y.dim() == 0 or len(y) != len(x):
            raise ValueError(f"y must have B = {len(x)} rows, got shape {list(y.shape)}")
        if (t is None) != (r is None):
            raise ValueError("t and r must be given together, got only one of them")
        for name, time in (("t", t), ("r", r)):
            if time is None:
                continue
            check_tensor(name, time)
            check_floating(name, time)
            if time.shape != x.shape[:1]:
                raise ValueError(f"{name} must have shape [B] = [{len(x)}], got {list(time.shape)}")
        if self.guidance is not None:
            if ema_model is None or null is None:
                raise ValueError("guidance needs ema_model and null, got None for one of them")
            check_callable("ema_model", ema_model)
            condition = y if y_guidance is None else y_guidance
            for name, value in (("y_guidance", condition), ("null", null)):
                check_tensor(name, value)
                if value.shape != y.shape:
                    raise ValueError(
                        f"{name} must have the shape of y, {list(y.shape)}, got {list(value.shape)}"
                    )
        if features is None:
            return
        check_tensor("features", features)
        if features.dim() != 3 or len(features) != len(x):
            raise ValueError(
                f"features must have shape [B, N, z_dim] with B = {len(x)}, "
                f"got {list(features.shape)}"
            )


def _projection_loss(h: Tensor | None, features: Tensor | None, like: Tensor) -> Tensor:
    if features is None:
        return like.new_zeros(())
    if h.shape != features.shape:
        raise ValueError(
            f"features must have the shape of the projection head's output, {list(h.shape)}, "
            f"got {list(features.shape)}"
        )
    h, features = h.to(like.dtype), features.to(like.dtype)
    return (1 - torch_f.cosine_similarity(h, features, dim=-1)).mean()


def _check_choice(name: str, value: object, choices: Mapping) -> None:
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def _as_guidance(guidance: Guidance | Mapping | None) -> Guidance | None:
    if guidance is None or isinstance(guidance, Guidance):
        return guidance
    if not isinstance(guidance, Mapping):
        raise TypeError(f"guidance must be a mapping or Guidance, got {type(guidance).__name__}")
    known = [field.name for field in fields(Guidance)]
    for key in guidance:
        if key not in known:
            raise ValueError(f"guidance has no field {key!r}, only {', '.join(known)}")
    return Guidance(**guidance)
