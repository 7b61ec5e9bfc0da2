"""The steps of `tim.sampler.sample` for packed batches, images of different sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tim.transports import Transport


def sample_packed(
    model: Callable[..., list[Tensor]],
    y: Tensor,
    noise: Sequence[Tensor],
    times: Tensor,
    steps: Iterable[int],
    *,
    transport: Transport,
    scales: Sequence[float],
    null: Tensor | None,
    guided: Callable[[Tensor, float], bool],
    diffusion: bool,
    stochasticity: float,
    fresh: Callable[[int], Sequence[Tensor]],
    return_trajectory: bool,
) -> list[Tensor]:
    """The last states [C, H_i, W_i] of the images, or their trajectories [steps + 1, C, H_i, W_i].

    Each image has its own `times` [steps + 1, B] and guidance scale. A step is one call of the
    network for all images and, once more, with the null condition, for those that `guided` tells to
    be guided at their time and scale. `fresh(i)` gives the noise of a stochastic step i.
    """
    dtype, device = noise[0].dtype, noise[0].device
    T_max = torch.tensor(transport.T_max, dtype=torch.float64)
    states = [z.double() * transport.interpolant(T_max)[1] for z in noise]
    trajectory = [[x.to(dtype)] for x in states]
    for i in steps:
        t, r = times[i], times[i + 1]
        twice = [image for image, time in enumerate(t) if guided(time, scales[image])]
        inputs = [x.to(dtype) for x in states]
        inputs += [inputs[image] for image in twice]
        everyone = [*range(len(states)), *twice]
        conditions = y if not twice else torch.cat([y, null.to(y)[twice]])
        c_t, c_r = (
            transport.c_noise(time[everyone]).to(device, torch.promote_types(dtype, torch.float32))
            for time in (t, t if diffusion else r)
        )
        F = [prediction.double() for prediction in model(inputs, c_t, c_r, conditions)]
        for F_null, image in zip(F[len(states) :], twice, strict=True):
            F[image] = F_null + scales[image] * (F[image] - F_null)
        noisy = fresh(i) if stochasticity > 0 and 0 < i < len(times) - 2 else None
        for image, x in enumerate(states):
            step = (x, t[image], r[image], F[image])
            if noisy is None:
                states[image] = transport.step(*step)
            else:
                z = noisy[image].double()
                states[image] = transport.stochastic_step(*step, stochasticity, z)
            if return_trajectory:
                trajectory[image].append(states[image].to(dtype))
    if return_trajectory:
        return [torch.stack(rows) for rows in trajectory]
    return [x.to(dtype) for x in states]
