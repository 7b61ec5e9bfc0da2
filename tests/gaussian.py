"""Networks that are the exact transition of Gaussian data, for every transport."""

import torch
from torch import Tensor, nn

from tim.transports import Transport, rows

INVERSE_C_NOISE = {
    "ot_fm": lambda c: c,
    "trigflow": lambda c: c,
    "edm": lambda c: (4 * c).exp(),
    "vp": lambda c: c / 999,
    "ve": lambda c: 2 * c.exp(),
}


class GaussianTransition(nn.Module):
    """F of x_r = x_t g(r) / g(t), g = std_c^w std_n^(1 - w), std_i(t)^2 = alpha^2 s_i^2 + sigma^2.

    w = 1: the exact transition of data N(0, s_c^2). Otherwise that of the guided velocity
    w v_c + (1 - w) v_n, v_i the marginal velocity of data N(0, s_i^2).
    """

    def __init__(self, transport: Transport, s_c: float, s_n: float = 1.0, w: float = 1.0) -> None:
        super().__init__()
        self.transport, self.s_c, self.s_n, self.w = transport, s_c, s_n, w

    def std(self, t: Tensor, s: float) -> Tensor:
        alpha, sigma, _, _ = self.transport.interpolant(t)
        return (alpha**2 * s**2 + sigma**2).sqrt()

    def growth(self, t: Tensor) -> Tensor:
        return self.std(t, self.s_c) ** self.w * self.std(t, self.s_n) ** (1 - self.w)

    def instantaneous(self, t: Tensor, s: float) -> Tensor:
        """E[c_x x + c_z z | x_t] / x_t for data N(0, s^2), the limit of F at r = t."""
        alpha, sigma, _, _ = self.transport.interpolant(t)
        c_x, c_z, _ = self.transport.coefficients(t, t)
        return (c_x * alpha * s**2 + c_z * sigma) / self.std(t, s) ** 2

    def factor(self, t: Tensor, r: Tensor) -> Tensor:
        A, B = self.transport.transition(t, r)
        F_c, F_n = self.instantaneous(t, self.s_c), self.instantaneous(t, self.s_n)
        limit = self.w * F_c + (1 - self.w) * F_n
        ratio = (self.growth(r) / self.growth(t) - A) / torch.where(t > r, B, 1)
        return torch.where(t > r, ratio, limit)

    def times(self, *c_noise: Tensor) -> tuple[Tensor, ...]:
        return tuple(INVERSE_C_NOISE[self.transport.name](c) for c in c_noise)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        return rows(self.factor(*self.times(t, r)), x) * x


class GaussianGuide(GaussianTransition):
    """Instantaneous predictions for both kinds of data: label 1 stands for N(0, s_n^2)."""

    def forward(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(t, r)
        (t,) = self.times(t)
        F_c, F_n = self.instantaneous(t, self.s_c), self.instantaneous(t, self.s_n)
        return rows(torch.where(y == 1, F_n, F_c), x) * x
