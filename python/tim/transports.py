"""Transports: how noise and data mix, and how a prediction carries a state from time t down to r.

With clean data x, noise z ~ N(0, I) and T_max >= t >= r >= T_min, a transport fixes

    x_t = alpha(t) x + sigma(t) z        v_t = alpha'(t) x + sigma'(t) z        (' is d/dt)
    x_r = A(t, r) x_t + B(t, r) F        F = F(x_t, t, r), the network's prediction

Holding x_r fixed along the path (the state transition identity of arXiv 2509.04394) gives

    A' x_t + A v_t + B' F + B dF = 0     =>     F = -(A' x_t + A v_t + B dF) / B'

with dF = d/dt F(x_t, t, r). As x_t and v_t are linear in x and z, the training target is
``c_x x + c_z z + c_d dF``: three numbers per sample, five with guidance. A(t, t) = 1, B(t, t) = 0
and B' has no zero, so every coefficient is finite at t = r.

Times are float tensors of any shape; results have their shape, dtype and device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from tim._checks import check_number


@dataclass(frozen=True, kw_only=True)
class Transport:
    """Base of all transports; see the module text for the symbols.

    ``T_min``, ``T_max``: range of times. ``sigma_d``: standard deviation assumed of the data, used
    by the time weights of the objective and by EDM's formulas.
    """

    name: ClassVar[str]
    domain: ClassVar[tuple[float, float]]
    # c_noise or the derivatives are infinite at t = 0, so times must stay above it.
    singular_at_zero: ClassVar[bool] = False

    T_min: float
    T_max: float
    sigma_d: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(field.name, getattr(self, field.name))
        low, high = self.domain
        if not low <= self.T_min < self.T_max <= high:
            raise ValueError(
                f"{self.name} needs {low:g} <= T_min < T_max <= {high:g}, "
                f"got T_min={self.T_min:g}, T_max={self.T_max:g}"
            )
        if self.singular_at_zero and self.T_min <= 0:
            raise ValueError(f"{self.name} needs T_min > 0, got {self.T_min:g}")
        if not self.sigma_d > 0:
            raise ValueError(f"sigma_d must be positive, got {self.sigma_d:g}")

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, alpha', sigma' at t."""
        raise NotImplementedError

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """A, B of x_r = A x_t + B F."""
        raise NotImplementedError

    def transition_derivative(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """A', B': derivatives of A and B in t."""
        raise NotImplementedError

    def coefficients(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_x, c_z, c_d of target = c_x x + c_z z + c_d dF; c_d = -B / B'."""
        raise NotImplementedError

    def c_noise(self, t: Tensor) -> Tensor:
        """What the network is given for the time t."""
        raise NotImplementedError

    def c_noise_derivative(self, t: Tensor) -> Tensor:
        """Derivative of c_noise in t."""
        return torch.func.jvp(self.c_noise, (t,), (torch.ones_like(t),))[1]

    def sample_t(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """``batch`` random training times [batch] in [T_min, T_max].

        ``device`` defaults to the generator's, or the CPU without one.
        """
        if device is None:
            device = generator.device if generator is not None else "cpu"
        t = self._draw((batch,), generator=generator, device=device, dtype=dtype)
        return t.clamp(self.T_min, self.T_max)

    def _draw(self, shape: tuple[int], **options) -> Tensor:
        raise NotImplementedError

    def step(self, x_t: Tensor, t: Tensor, r: Tensor, F: Tensor) -> Tensor:
        """x_r = A(t, r) x_t + B(t, r) F; x_t, F [B, ...], t, r [B] or scalars."""
        A, B = self.transition(t, r)
        return rows(A, x_t) * x_t + rows(B, x_t) * F

    def guided_coefficients(
        self, t: Tensor, r: Tensor, w_gt: Tensor, w_cond: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """c_x, c_z, c_d, c_cond, c_null of the target whose velocity is guided.

        Guidance puts F_g = w_gt F_0 + w_cond F_cond + (1 - w_gt - w_cond) F_null in the place of
        the instantaneous target F_0 = c_x(t, t) x + c_z(t, t) z; F_cond and F_null are predictions
        at (x_t, t, t). The velocity of F is -(A'(t, t) x_t + B'(t, t) F), and A(t, r) B'(t, t) =
        B'(t, r) for every transport here, so F_0 enters the target with factor 1 and so does F_g.
        ``w_gt``, ``w_cond`` have the shape of t; w_gt = 1, w_cond = 0 is no guidance.
        """
        c_x, c_z, c_d = self.coefficients(t, r)
        c_x0, c_z0, _ = self.coefficients(t, t)
        return (
            c_x + (w_gt - 1) * c_x0,
            c_z + (w_gt - 1) * c_z0,
            c_d,
            w_cond,
            1 - w_gt - w_cond,
        )

    def velocity(self, x_t: Tensor, t: Tensor, F: Tensor) -> Tensor:
        """dx/dt at x_t that the instantaneous prediction F(x_t, t, t) stands for."""
        A_prime, B_prime = self.transition_derivative(t, t)
        return -(rows(A_prime, x_t) * x_t + rows(B_prime, x_t) * F)


@dataclass(frozen=True, kw_only=True)
class _LogNormal(Transport):
    """Training times whose noise ratio sigma(t) / alpha(t) is log-normal(P_mean, P_std)."""

    P_mean: float = 0.0
    P_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.P_std > 0:
            raise ValueError(f"P_std must be positive, got {self.P_std:g}")

    def _draw(self, shape: tuple[int], **options) -> Tensor:
        ratio = (torch.randn(shape, **options) * self.P_std + self.P_mean).exp()
        return self._time_of_ratio(ratio)

    def _time_of_ratio(self, ratio: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FlowMatching(_LogNormal):
    """Straight paths: x_t = (1 - t) x + t z, x_r = x_t - (t - r) F, F the mean velocity."""

    name: ClassVar[str] = "ot_fm"
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    T_min: float = 0.0
    T_max: float = 1.0

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), r - t

    def transition_derivative(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -torch.ones_like(t)

    def coefficients(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return -one, one, r - t

    def c_noise(self, t: Tensor) -> Tensor:
        return t

    def c_noise_derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _time_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)

    def stochastic_step(
        self, x_t: Tensor, t: Tensor, r: Tensor, F: Tensor, ratio: float, noise: Tensor
    ) -> Tensor:
        """A step that trades part of the predicted noise z = x_t + (1 - t) F for fresh noise:

        x_r = x_t - (t - r) F - ratio (t - r) z + sqrt(2 ratio t (t - r)) noise
        """
        t, r = rows(t, x_t), rows(r, x_t)
        z = x_t + (1 - t) * F
        drift = ratio * (t - r) * z
        return self.step(x_t, t, r, F) - drift + (2 * ratio * t * (t - r)).sqrt() * noise


@dataclass(frozen=True, kw_only=True)
class TrigFlow(_LogNormal):
    """Circular paths: x_t = cos(t) x + sin(t) z, x_r = cos(t - r) x_t - sin(t - r) F."""

    name: ClassVar[str] = "trigflow"
    domain: ClassVar[tuple[float, float]] = (0.0, math.pi / 2)

    T_min: float = 0.0
    T_max: float = 1.57
    sigma_d: float = 0.5
    P_mean: float = -1.0
    P_std: float = 1.6

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = t.cos(), t.sin()
        return cos, sin, -sin, cos

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return (t - r).cos(), (r - t).sin()

    def transition_derivative(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return (r - t).sin(), -(t - r).cos()

    def coefficients(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # v_t - tan(t - r) (x_t + dF), with the sums of angles joined.
        cos = (t - r).cos()
        return -(2 * t - r).sin() / cos, (2 * t - r).cos() / cos, (r - t).tan()

    def c_noise(self, t: Tensor) -> Tensor:
        return t

    def c_noise_derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _time_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio.atan()


@dataclass(frozen=True, kw_only=True)
class EDM(_LogNormal):
    """EDM preconditioning of any sigma_d = s; t is the noise level. With q(t) = sqrt(t^2 + s^2):

        x_t = (x + t z) / q(t)        x_r = ((s^2 + t r) x_t + s (t - r) F) / (q(t) q(r))

    F(x_t, t, t) regresses t / (s q) x - s / q z. (The published code agrees with its own
    interpolant for s = 1 only.)
    """

    name: ClassVar[str] = "edm"
    domain: ClassVar[tuple[float, float]] = (0.0, math.inf)
    singular_at_zero: ClassVar[bool] = True

    T_min: float = 0.01
    T_max: float = 80.0
    sigma_d: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2

    def _q(self, t: Tensor) -> Tensor:
        return (t * t + self.sigma_d**2).sqrt()

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = self._q(t)
        return 1 / q, t / q, -t / q**3, self.sigma_d**2 / q**3

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        s, qq = self.sigma_d, self._q(t) * self._q(r)
        return (s**2 + t * r) / qq, s * (t - r) / qq

    def transition_derivative(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        s, qqqq = self.sigma_d, self._q(t) ** 3 * self._q(r)
        return s**2 * (r - t) / qqqq, s * (s**2 + t * r) / qqqq

    def coefficients(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, q = self.sigma_d, self._q(t)
        m = s**2 + t * r
        c_x = (s**2 * (2 * t - r) + t * t * r) / (s * q * m)
        c_z = s * (t * t - s**2 - 2 * t * r) / (q * m)
        return c_x, c_z, (r - t) * q**2 / m

    def c_noise(self, t: Tensor) -> Tensor:
        return t.log() / 4

    def c_noise_derivative(self, t: Tensor) -> Tensor:
        return 0.25 / t

    def _time_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(Transport):
    """Variance preserving SDE; F estimates z. With u(t) = beta_d t^2 / 2 + beta_min t:

        b(t) = sqrt(exp(u) - 1)       alpha = 1 / sqrt(1 + b^2) = exp(-u / 2)       sigma = b alpha
        x_r = alpha(r) (x_t / alpha(t) + (b(r) - b(t)) F)

    Training times are uniform in [T_min, T_max]; the network is given (num_timesteps - 1) t.
    """

    name: ClassVar[str] = "vp"
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)
    singular_at_zero: ClassVar[bool] = True

    T_min: float = 1e-5
    T_max: float = 1.0
    beta_min: float = 0.1
    beta_d: float = 19.9
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.beta_min > 0 and self.beta_d >= 0):
            raise ValueError(
                "vp needs beta_min > 0 and beta_d >= 0, "
                f"got beta_min={self.beta_min:g}, beta_d={self.beta_d:g}"
            )
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {self.num_timesteps}")

    def _u(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (0.5 * self.beta_d * t + self.beta_min) * t, self.beta_d * t + self.beta_min

    def _b(self, t: Tensor) -> Tensor:
        return self._u(t)[0].expm1().sqrt()

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, u_prime = self._u(t)
        alpha, sigma = (-0.5 * u).exp(), (-(-u).expm1()).sqrt()
        return alpha, sigma, -0.5 * u_prime * alpha, 0.5 * u_prime * alpha**2 / sigma

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        u_t, u_r = self._u(t)[0], self._u(r)[0]
        return (0.5 * (u_t - u_r)).exp(), (-0.5 * u_r).exp() * (self._b(r) - self._b(t))

    def transition_derivative(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        (u_t, u_prime), u_r = self._u(t), self._u(r)[0]
        A_prime = 0.5 * u_prime * (0.5 * (u_t - u_r)).exp()
        return A_prime, -0.5 * u_prime * (u_t - 0.5 * u_r).exp() / self._b(t)

    def coefficients(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, u_prime = self._u(t)
        b = self._b(t)
        c_d = 2 * b * (self._b(r) - b) * (-u).exp() / u_prime
        return torch.zeros_like(t), torch.ones_like(t), c_d

    def c_noise(self, t: Tensor) -> Tensor:
        return (self.num_timesteps - 1) * t

    def c_noise_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.num_timesteps - 1)

    def _draw(self, shape: tuple[int], **options) -> Tensor:
        return self.T_min + (self.T_max - self.T_min) * torch.rand(shape, **options)


@dataclass(frozen=True, kw_only=True)
class VarianceExploding(Transport):
    """Variance exploding SDE: x_t = x + t z, x_r = x_t + (t - r) F, so F estimates -z.

    Training times are log-uniform in [T_min, T_max].
    """

    name: ClassVar[str] = "ve"
    domain: ClassVar[tuple[float, float]] = (0.0, math.inf)
    singular_at_zero: ClassVar[bool] = True

    T_min: float = 0.02
    T_max: float = 100.0

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return one, t, torch.zeros_like(t), one

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t - r

    def transition_derivative(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def coefficients(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(t), -torch.ones_like(t), r - t

    def c_noise(self, t: Tensor) -> Tensor:
        return (0.5 * t).log()

    def c_noise_derivative(self, t: Tensor) -> Tensor:
        return 1 / t

    def _draw(self, shape: tuple[int], **options) -> Tensor:
        return self.T_min * (self.T_max / self.T_min) ** torch.rand(shape, **options)


TRANSPORTS: dict[str, type[Transport]] = {
    transport.name: transport
    for transport in (FlowMatching, TrigFlow, EDM, VariancePreserving, VarianceExploding)
}


def get(name: str, **params) -> Transport:
    """The transport called ``name`` ("ot_fm", "trigflow", "edm", "vp", "ve") with its parameters.

    Raises ValueError for an unknown name or parameter, or a value that is not finite or outside its
    range; TypeError for a value that is no number.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {name!r}")
    known = [field.name for field in fields(TRANSPORTS[name])]
    for key in params:
        if key not in known:
            raise ValueError(f"{name} has no parameter {key!r}, only {', '.join(known)}")
    return TRANSPORTS[name](**params)


def rows(per_sample: Tensor, x: Tensor) -> Tensor:
    """Per-sample values [B] shaped to broadcast over x [B, ...]; scalars pass unchanged."""
    return per_sample.reshape(-1, *[1] * (x.dim() - 1)) if per_sample.dim() == 1 else per_sample
