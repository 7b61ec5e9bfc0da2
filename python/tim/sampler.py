"""Sampling: from noise to data in any number of transitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tim import images
from tim._checks import check_callable, check_number, check_tensor
from tim._passes import evaluating
from tim.graphs import check_device
from tim.images import Images
from tim.packed_sampling import sample_packed
from tim.sampling_graph import network_step, replayed_step, step_weights
from tim.schedule import resolution_shift, shift_time, shift_within
from tim.transports import FlowMatching, Transport

__all__ = ["resolution_shift", "sample", "shift_time"]

SCHEDULES = ("linear", "shifted")


@torch.no_grad()
def sample(
    model: Callable[..., Images],
    y: Tensor,
    noise: Images,
    steps: int = 4,
    *,
    transport: Transport,
    cfg_scale: float | Sequence[float] = 1.0,
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    null: Tensor | None = None,
    schedule: str | Sequence[float] | Tensor = "linear",
    shift: float | Sequence[float] | None = None,
    diffusion: bool = False,
    stochasticity: float = 0.0,
    generator: torch.Generator | None = None,
    step_noise: Images | None = None,
    return_trajectory: bool = False,
    progress: bool = False,
    cuda_graph: bool = False,
) -> Images:
    """Carry ``noise`` from T_max to T_min: x_r = A(t, r) x_t + B(t, r) F(x_t, t, r) at every step.

    The state is kept in float64 between steps; the model, in evaluation mode and without gradient,
    is given it in the dtype of ``noise`` and the times c_noise(t), c_noise(r) in float32 or wider.

    Args:
        model: model(x, t, r, y) -> F.
        y: labels [B] or caption features [B, M, K].
        noise: [B, C, H, W] from N(0, I); the first state is sigma(T_max) noise, for ot_fm itself.
            Or packed: a list of B [C, H_i, W_i] of any sizes, with which `model` is called as
            `TiM` is; results are then lists.
        steps: number of network calls; ignored where ``schedule`` holds the times.
        cfg_scale: guidance F = F_null + cfg_scale (F_cond - F_null), 1 for none; one for all images
            or one for each. A guided step is one call with twice the batch.
        cfg_interval: (low, high), guided where low < t / T_max < high; so with high = 1 the first
            step is never guided.
        null: null labels or features, shaped like y; needed where cfg_scale > 1.
        schedule: times of the steps. "linear": equal steps; "shifted": equal steps u in [0, 1]
            mapped by `shift_time` and then onto [T_min, T_max]; or steps + 1 descending times.
        shift: the s of a "shifted" schedule, see `resolution_shift`; of packed noise also one for
            each image.
        diffusion: give the model r = t, so that it predicts the instantaneous F, as a diffusion
            model's sampler would. For comparison.
        stochasticity: share of the predicted noise that a step replaces by fresh noise (ot_fm only;
            never in the first and the last step).
        generator: source of that noise, on the device of ``noise``.
        step_noise: that noise itself, [steps - 2, B, C, H, W], one slice for each noisy step;
            packed B of [steps - 2, C, H_i, W_i].
        return_trajectory: return [steps + 1, B, C, H, W] with the first state in row 0; packed a
            list of [steps + 1, C, H_i, W_i].
        progress: show a progress bar.
        cuda_graph: launch a step as one CUDA graph. The first three steps of a shape run as usual,
            the next is recorded; graphs are kept with the model, for later calls too, until its
            weights move.

    Returns:
        The state at the last time, or the trajectory, in the dtype of ``noise``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, or missing.

    Source: arXiv 2509.04394 (transitions and resolution-dependent shift of the times).
    """
    _check(model, y, noise, transport, cfg_scale, cfg_interval, null, stochasticity, generator)
    packed = images.is_packed(noise)
    one_for_each = isinstance(cfg_scale, (list, tuple))
    scales = list(cfg_scale) if one_for_each else [cfg_scale] * len(noise)
    if cuda_graph and packed:
        raise ValueError("cuda_graph needs noise of one size, [B, C, H, W], got a packed batch")
    if cuda_graph:
        check_device(noise.device, "cuda_graph")
    times = _times(transport, steps, schedule, shift, len(noise) if packed else None)
    if packed:
        with evaluating(model):
            return sample_packed(
                model, y, noise, times, _progress(range(len(times) - 1), progress),
                transport=transport, scales=scales, null=null,
                guided=lambda t, scale: is_guided(t, transport, scale, cfg_interval),
                diffusion=diffusion, stochasticity=stochasticity,
                fresh=_packed_noise(noise, len(times) - 3, stochasticity, generator, step_noise),
                return_trajectory=return_trajectory,
            )  # fmt: skip
    # The first and the last step are never noisy.
    noisy = _noise_source(noise, max(len(times) - 3, 0), stochasticity, generator, step_noise)
    T_max = torch.tensor(transport.T_max, dtype=torch.float64)
    x = noise.double() * transport.interpolant(T_max)[1]
    states = [x.to(noise.dtype)]
    strongest = max(scales)
    if one_for_each:
        cfg_scale = torch.tensor(scales, dtype=torch.float64).reshape(-1, 1, 1, 1).to(x.device)
    with evaluating(model):
        # Times stay on the CPU: choosing what to do at a step never waits for the device.
        for i in _progress(range(len(times) - 1), progress):
            t, r = times[i], times[i + 1]
            told = t if diffusion else r
            noisy_step = stochasticity > 0 and 0 < i < len(times) - 2
            fresh = next(noisy).double() if noisy_step else None
            guided = is_guided(t, transport, strongest, cfg_interval)
            if cuda_graph:
                weights = step_weights(transport, t, r, stochasticity if noisy_step else None)
                x = replayed_step(
                    model, x, fresh, y, null if guided else None, cfg_scale, weights,
                    times=tuple(transport.c_noise(time).item() for time in (t, told)),
                    dtype=noise.dtype,
                )  # fmt: skip
            else:
                F = predict(
                    model, x.to(noise.dtype), t, told, y, null if guided else None, cfg_scale,
                    transport=transport,
                )  # fmt: skip
                if noisy_step:
                    x = transport.stochastic_step(x, t, r, F, stochasticity, fresh)
                else:
                    x = transport.step(x, t, r, F)
            if return_trajectory:
                states.append(x.to(noise.dtype))
    return torch.stack(states) if return_trajectory else x.to(noise.dtype)


def predict(
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    r: Tensor,
    y: Tensor,
    null: Tensor | None,
    cfg_scale: float | Tensor,
    *,
    transport: Transport,
    cuda_graph: bool = False,
) -> Tensor:
    """The network's prediction of one step from t to r (scalars), guided where null is given.

    Returns F [B, C, H, W] in float64. Other arguments as for `sample`; cfg_scale a number or
    [B, 1, 1, 1].
    """
    times = tuple(transport.c_noise(time).item() for time in (t, r))
    if cuda_graph:
        # The step of which F alone is the result.
        return replayed_step(
            model, x.double(), None, y, null, cfg_scale, (0.0, 1.0), times=times, dtype=x.dtype
        )
    conditions = y if null is None else torch.cat([y, null.to(y)])
    dtype = torch.promote_types(x.dtype, torch.float32)
    c_t, c_r = (
        torch.full((len(conditions),), time, dtype=dtype, device=x.device) for time in times
    )
    return network_step(model, x, c_t, c_r, conditions, cfg_scale)


def is_guided(
    t: Tensor, transport: Transport, cfg_scale: float, cfg_interval: tuple[float, float]
) -> bool:
    # A step on an edge of the interval is outside it, whatever the rounding of its time.
    low, high = cfg_interval[0] + 1e-9, cfg_interval[1] - 1e-9
    return bool(cfg_scale > 1 and low < t / transport.T_max < high)


def _times(
    transport: Transport,
    steps: int,
    schedule: str | Sequence[float] | Tensor,
    shift: float | Sequence[float] | None,
    packed: int | None = None,
) -> Tensor:
    """[steps + 1] descending times, float64 on the CPU; [steps + 1, B] of `packed` = B images."""
    if packed is None:
        return _times_of_one(transport, steps, schedule, shift)
    if not isinstance(shift, (list, tuple, Tensor)):
        times = _times_of_one(transport, steps, schedule, shift)
        return times[:, None].expand(-1, packed)
    if len(shift) != packed:
        raise ValueError(f"shift must be one for each of the {packed} images, got {len(shift)}")
    columns = [_times_of_one(transport, steps, schedule, float(s)) for s in shift]
    return torch.stack(columns, dim=1)


def _times_of_one(
    transport: Transport, steps: int, schedule: str | Sequence[float] | Tensor, shift: float | None
) -> Tensor:
    if not isinstance(schedule, str):
        if shift is not None:
            raise ValueError("shift needs schedule='shifted', got a schedule of explicit times")
        try:
            times = torch.as_tensor(schedule, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError):
            raise TypeError(f"schedule must be a name or times, got {schedule!r}") from None
        if times.dim() != 1 or len(times) < 2:
            raise ValueError(f"schedule must have shape [steps + 1], got {list(times.shape)}")
        inside = transport.T_min <= times[-1] and times[0] <= transport.T_max
        if not (inside and (times[1:] < times[:-1]).all()):
            raise ValueError(
                f"schedule must descend within [{transport.T_min:g}, {transport.T_max:g}], "
                f"got {times.tolist()}"
            )
        return times
    if schedule not in SCHEDULES:
        known = ", ".join(repr(name) for name in SCHEDULES)
        raise ValueError(f"schedule must be {known} or times, got {schedule!r}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an integer, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if (schedule == "shifted") != (shift is not None):
        raise ValueError(f"shift and schedule='shifted' go together, got {schedule!r}, {shift}")
    if schedule == "linear":
        return torch.linspace(transport.T_max, transport.T_min, steps + 1, dtype=torch.float64)
    check_number("shift", shift)
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    times = torch.linspace(transport.T_max, transport.T_min, steps + 1, dtype=torch.float64)
    return shift_within(transport, times, shift)


def _noise_source(
    noise: Tensor,
    count: int,
    stochasticity: float,
    generator: torch.Generator | None,
    step_noise: Tensor | None,
) -> Iterator[Tensor]:
    """Fresh noise [B, C, H, W] for each of ``count`` noisy steps."""
    shape = (count, *noise.shape)
    if step_noise is None:
        options = {"dtype": noise.dtype, "device": noise.device, "generator": generator}
        return (torch.randn(noise.shape, **options) for _ in range(count))
    if stochasticity == 0:
        raise ValueError("step_noise needs stochasticity > 0, got 0")
    if step_noise.shape != shape:
        raise ValueError(f"step_noise must have shape {list(shape)}, got {list(step_noise.shape)}")
    return iter(step_noise)


def _packed_noise(
    noise: Sequence[Tensor],
    count: int,
    stochasticity: float,
    generator: torch.Generator | None,
    step_noise: Sequence[Tensor] | None,
) -> Callable[[int], list[Tensor]]:
    """Fresh noise of the images for noisy step number 1 to `count`."""
    if step_noise is None:
        return lambda step: [
            torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator) for z in noise
        ]
    if stochasticity == 0:
        raise ValueError("step_noise needs stochasticity > 0, got 0")
    shapes = [[max(count, 0), *z.shape] for z in noise]
    if not images.is_packed(step_noise) or images.shapes(step_noise) != shapes:
        raise ValueError(f"step_noise must be a list of tensors of shapes {shapes}")
    return lambda step: [z[step - 1] for z in step_noise]


def _progress(indices: range, show: bool) -> Iterable[int]:
    if not show:
        return indices
    from rich.progress import track

    return track(indices, description="sampling")


def _check(
    model: Callable,
    y: Tensor,
    noise: Images,
    transport: Transport,
    cfg_scale: float | Sequence[float],
    cfg_interval: tuple[float, float],
    null: Tensor | None,
    stochasticity: float,
    generator: torch.Generator | None,
) -> None:
    check_callable("model", model)
    if not isinstance(transport, Transport):
        raise TypeError(f"transport must be a Transport (tim.transports.get), got {transport!r}")
    check_tensor("y", y)
    images.check("noise", noise)
    if y.dim() == 0 or len(y) != len(noise):
        raise ValueError(f"y must have B = {len(noise)} rows, got shape {list(y.shape)}")
    guided = _check_scale(cfg_scale, len(noise))
    check_number("stochasticity", stochasticity)
    try:
        low, high = cfg_interval
        ascending = low <= high
    except (TypeError, ValueError):
        raise TypeError(f"cfg_interval must be (low, high), got {cfg_interval!r}") from None
    if not ascending:
        raise ValueError(f"cfg_interval must be (low, high) with low <= high, got {cfg_interval}")
    if guided and null is None:
        raise ValueError(f"cfg_scale {cfg_scale} needs null, the null labels or features, got None")
    if null is not None:
        check_tensor("null", null)
        if null.shape != y.shape:
            raise ValueError(
                f"null must have the shape of y, {list(y.shape)}, got {list(null.shape)}"
            )
    if not 0 <= stochasticity <= 1:
        raise ValueError(f"stochasticity must be in [0, 1], got {stochasticity}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if stochasticity > 0 and not isinstance(transport, FlowMatching):
        raise ValueError(f"stochasticity needs transport ot_fm, got {transport.name}")


def _check_scale(cfg_scale: float | Sequence[float], batch: int) -> bool:
    """Whether any image is guided. Raises TypeError or ValueError for what is no scale."""
    scales = [cfg_scale]
    if isinstance(cfg_scale, (list, tuple)):
        if len(cfg_scale) != batch:
            raise ValueError(f"cfg_scale must be one or B = {batch}, got {len(cfg_scale)}")
        scales = list(cfg_scale)
    for scale in scales:
        check_number("cfg_scale", scale)
        if not scale >= 1:
            raise ValueError(f"cfg_scale must be at least 1 (no guidance), got {scale}")
    return max(scales) > 1
