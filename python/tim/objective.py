"""The training objective of Transition Models (arXiv 2509.04394): one step's loss and its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from tim import images, ops
from tim._checks import check_callable, check_floating, check_number, check_tensor
from tim._passes import evaluating, without_gradient
from tim.derivative import Network, central_pair, exact_derivative
from tim.guidance import Guidance, as_guidance
from tim.images import Images
from tim.schedule import resolution_shifts, shift_within
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
class TransitionLossOutput:
    """What one evaluation of `TransitionLoss` yields; only loss and projection are differentiable.

    Of a packed batch target, tail_derivative and derivative are lists of [C, H_i, W_i].

    The value of ``loss`` says nothing (the adaptive weight cancels it): log ``denoising``.
    """

    loss: Tensor  #: scalar, mean of weight * denoising, weight held constant
    denoising: Tensor  #: [B], squared error plus cosine term
    weight: Tensor  #: [B], time weight / (denoising + 1e-5)
    projection: Tensor  #: scalar, mean of 1 - cos(h, features); 0 without features
    target: Images  #: [B, C, H, W]
    t: Tensor  #: [B]
    r: Tensor  #: [B]
    tail_derivative: Images | None  #: dF of the samples behind the diffusion part, if there are any

    @functools.cached_property
    def derivative(self) -> Images:
        """[B, C, H, W], dF; 0 for the diffusion part."""
        if images.is_packed(self.target):
            tail = self.tail_derivative or []
            resting = self.target[: len(self.target) - len(tail)]
            return [*map(torch.zeros_like, resting), *tail]
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
        object.__setattr__(self, "guidance", as_guidance(self.guidance))
        if self.shift_base is not None:
            check_number("shift_base", self.shift_base)
            if self.shift_base < 1:
                raise ValueError(f"shift_base must be at least 1, got {self.shift_base}")

    def __call__(
        self,
        model: Callable[..., Any],
        x: Images,
        z: Images,
        y: Tensor,
        t: Tensor | None = None,
        r: Tensor | None = None,
        null: Tensor | None = None,
        y_guidance: Tensor | None = None,
        ema_model: Callable[..., Tensor] | None = None,
        features: Images | None = None,
        diffusion: int | None = None,
    ) -> TransitionLossOutput:
        """Loss of ``model`` on one batch; nothing here waits for the device.

        Args:
            model: model(x_t, c_noise(t), c_noise(r), y) -> F [B, C, H, W], and with
                return_features=True -> (F, h [B, N, z_dim]). Of lists it returns lists.
            x, z: [B, C, H, W], clean latents and noise; no gradient reaches them. Or packed: lists
                of B images [C, H_i, W_i] of any sizes, for which `model` is called as `TiM` is.
                Each image counts the same in the loss, whatever its size.
            y: labels [B] or caption features [B, M, K].
            t, r: [B], both or neither; drawn when not given, else used as they are, and the first
                round(diffusion_ratio B) samples, which must have r = t, have no derivative.
            null: null labels or features, shaped like y; needed with guidance.
            y_guidance: condition of the guidance network, y when None (y with labels dropped).
            ema_model: the guidance network; needed with guidance. Run in evaluation mode.
            features: [B, N, z_dim], what the projection head is to predict; packed B of
                [N_i, z_dim].
            diffusion: how many samples, the first ones, have no derivative, where it is not
                round(diffusion_ratio B): when the batch is a part of a larger one.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype or shape, or missing.
        """
        self._check(model, x, z, y, t, r, null, y_guidance, ema_model, features)
        x, z = (images.each(Tensor.detach, batch) for batch in (x, z))
        n = round(self.diffusion_ratio * len(x)) if diffusion is None else diffusion
        if t is None:
            t, r = self.draw_times(x)
        transport = self.transport
        path = torch.stack(transport.interpolant(t), dim=1)
        x_t, v_t = images.each(ops.interpolate, x, z, path)

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
            pair_or_dF = central_pair(network, *states, t[n:], r[n:], y[n:], e)
            dF = images.each(_quotient, *pair_or_dF, e)
            c_d = coefficients[2]
            coefficients[2] = torch.cat([c_d[:n], c_d[n:] * self.epsilon / e])

        coefficients = torch.stack(coefficients, dim=1)
        time_weights = self._time_weights(t, r, n)
        arguments = (F, x, z, coefficients, pair_or_dF, predictions, time_weights)
        terms_of = self._terms_of_each if images.is_packed(x) else self._terms
        terms = terms_of(*arguments)
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

    def _terms(self, F, x, z, coefficients, pair_or_dF, predictions, time_weights):
        return ops.transition_loss(
            F,
            x,
            z,
            coefficients,
            pair_or_dF,
            epsilon=self.epsilon,
            guidance=predictions,
            time_weight=time_weights,
            cosine=self.cosine,
        )

    def _terms_of_each(self, F, x, z, coefficients, pair_or_dF, predictions, time_weights):
        """`_terms` of a packed batch."""
        pair = isinstance(pair_or_dF, tuple)
        ahead, behind = pair_or_dF if pair else (pair_or_dF, None)
        n = len(x) - (0 if ahead is None else len(ahead))

        def one(batch: Images | None, i: int) -> Tensor | None:
            return None if batch is None or i < 0 else batch[i][None]

        found = [
            self._terms(
                one(F, i), one(x, i), one(z, i), coefficients[i : i + 1],
                (one(ahead, i - n), one(behind, i - n)) if pair and i >= n else one(ahead, i - n),
                predictions and tuple(one(p, i) for p in predictions),
                time_weights[i : i + 1],
            )
            for i in range(len(x))
        ]  # fmt: skip
        *scalars, targets = zip(*found, strict=True)
        return ops.TransitionLossTerms(*map(torch.cat, scalars), [t[0] for t in targets])

    def draw_times(self, x: Images) -> tuple[Tensor, Tensor]:
        """Random t and r [B] for a batch x, from the global generator of its device.

        With `shift_base` they are shifted for the resolution, of a packed batch for that of each
        image.
        """
        like = images.first(x)
        return self.shift_times(x, *self.draw_unshifted(len(x), like.dtype, like.device))

    def shift_times(self, x: Images, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Times of `draw_unshifted` for the sizes of x; as they are without `shift_base`."""
        if self.shift_base is None:
            return t, r
        shift = resolution_shifts(x, self.shift_base, t.dtype)
        return shift_within(self.transport, t, shift), shift_within(self.transport, r, shift)

    def draw_unshifted(
        self, batch: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """`draw_times` before the shift for the resolution, which keeps their order."""
        dtype = torch.promote_types(dtype, torch.float32)
        n = round(self.diffusion_ratio * batch)
        a, b = (self.transport.sample_t(batch, device=device, dtype=dtype) for _ in range(2))
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
        self, ema_model: Callable, x_t: Images, t: Tensor, y: Tensor, null: Tensor
    ) -> tuple[Images, Images]:
        # The whole batch: which samples lie inside the window is known on the device only.
        with evaluating(ema_model), without_gradient(t.device):
            network = Network(ema_model, self.transport)
            twice = t.repeat(2)
            both = torch.cat([y, null.to(y.dtype)])
            F, _ = network(images.joined(x_t, x_t), twice, twice, both)
        return images.halves(F)

    def _guided_velocity(
        self,
        x_t: Images,
        v_t: Images,
        t: Tensor,
        w_gt: Tensor,
        w_cond: Tensor,
        predictions: tuple[Images, Images],
    ) -> Images:
        def guided(x_t, v_t, t, w_gt, w_cond, *predictions) -> Tensor:
            v_cond, v_null = (self.transport.velocity(x_t, t, F) for F in predictions)
            w_null = 1 - w_gt - w_cond
            parts = ((w_gt, v_t), (w_cond, v_cond), (w_null, v_null))
            return sum(rows(w, x_t) * v for w, v in parts).to(x_t.dtype)

        return images.each(guided, x_t, v_t, t, w_gt, w_cond, *predictions)

    def _half_width(self, t: Tensor) -> Tensor:
        e = torch.full_like(t, self.epsilon)
        return torch.minimum(e, t / 2) if self.transport.singular_at_zero else e

    def _neighbours(
        self, x: Images, z: Images, x_t: Images, t: Tensor, v: Images, e: Tensor
    ) -> tuple[Images, Images]:
        """States at t + e and t - e: along v for guided derivatives, on the data path otherwise."""
        if self.guidance is not None and self.guidance.along == "guided":
            one = torch.ones_like(e)
            line = torch.stack([one, e, one, -e], dim=1)
            return images.each(ops.interpolate, x_t, v, line)
        ahead, behind = self.transport.interpolant(t + e)[:2], self.transport.interpolant(t - e)[:2]
        return images.each(ops.interpolate, x, z, torch.stack([*ahead, *behind], dim=1))

    def _check(self, model, x, z, y, t, r, null, y_guidance, ema_model, features) -> None:
        check_callable("model", model)
        images.check("x", x)
        images.check("z", z)
        check_tensor("y", y)
        mine, like = images.first(z), images.first(x)
        if (images.shapes(z), mine.dtype, mine.device) != (
            images.shapes(x),
            like.dtype,
            like.device,
        ):
            raise ValueError(
                f"z must match x, {images.shapes(x)} {like.dtype} on {like.device}, "
                f"got {images.shapes(z)} {mine.dtype} on {mine.device}"
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
            if time.shape != (len(x),):
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
        if images.is_packed(x):
            if not images.is_packed(features) or len(features) != len(x):
                raise ValueError(
                    f"features must be a list of B = {len(x)} tensors [N_i, z_dim] like x, "
                    f"got {_described(features)}"
                )
            for i, rows_ in enumerate(features):
                check_tensor(f"features[{i}]", rows_)
            return
        check_tensor("features", features)
        if features.dim() != 3 or len(features) != len(x):
            raise ValueError(
                f"features must have shape [B, N, z_dim] with B = {len(x)}, "
                f"got {list(features.shape)}"
            )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"{len(value)} tensors" if images.is_packed(value) else type(value).__name__


def _quotient(ahead: Tensor, behind: Tensor, e: Tensor) -> Tensor:
    return (ahead.to(e.dtype) - behind.to(e.dtype)) / rows(2 * e, ahead)


def _projection_loss(h: Images | None, features: Images | None, like: Tensor) -> Tensor:
    if features is None:
        return like.new_zeros(())
    if images.shapes(h) != images.shapes(features):
        raise ValueError(
            f"features must have the shape of the projection head's output, {images.shapes(h)}, "
            f"got {images.shapes(features)}"
        )

    def distance(h: Tensor, features: Tensor) -> Tensor:
        h, features = h.to(like.dtype), features.to(like.dtype)
        return 1 - torch_f.cosine_similarity(h, features, dim=-1)

    if images.is_packed(h):  # each image counts the same
        return torch.stack([row.mean() for row in images.each(distance, h, features)]).mean()
    return distance(h, features).mean()


def _check_choice(name: str, value: object, choices: Mapping) -> None:
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {known}, got {value!r}")
