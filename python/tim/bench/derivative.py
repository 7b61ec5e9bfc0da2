"""The exact derivative against the finite difference: the paper's comparison (its Table 1) again.

Two rows for each size, on the same weights, images, noise and times: the operator alone, dF of the
samples that have one, without gradient; and the whole training step that it is part of. In ours the
tangents ride along with the forward pass that the gradient needs; "two passes" is the same with a
pass of its own for the tangents, as everybody else has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from tim import ops
from tim.bench.machine import name_of
from tim.bench.measure import Settings
from tim.bench.memory import peak_bytes
from tim.bench.problem import relative_error
from tim.bench.report import Candidate, Row
from tim.bench.step import (
    STEP_SIZES,
    TRANSPORT,
    Peers,
    Setup,
    StepCandidate,
    StepSize,
    kernels_of,
    measure_candidates,
)
from tim.bench.timing import compare
from tim.derivative import Network, central_pair
from tim.models import ARCHITECTURES, TiMConfig

EPSILON = 0.005
#: B/4 with two of its blocks, and a small network on 4096 tokens, where N x N is what counts.
DERIVATIVE_SIZES: dict[str, tuple[StepSize, ...]] = {
    "cpu": (
        STEP_SIZES["cpu"][0],
        StepSize(
            "b4-256-depth2",
            replace(ARCHITECTURES["tim-b4-256"], depth=2, z_dim=None),
            8,
        ),
        StepSize(
            "tokens-4096",
            TiMConfig(input_size=128, hidden_size=128, depth=1, num_heads=2, num_classes=10),
            2,
        ),
    ),
    "cuda": (
        StepSize("b4-256", replace(ARCHITECTURES["tim-b4-256"], z_dim=None), 256),
        StepSize(
            "tokens-4096",
            TiMConfig(input_size=128, hidden_size=768, depth=12, num_heads=12),
            4,  # float64, which stores N x N scores, has to fit as well
        ),
    ),
}  # fmt: skip


class TwoPasses(nn.Module):
    """A network that takes no tangents as an argument.

    The objective then gives them a pass of their own, as for a network of other people whose
    activations are recomputed.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.gradient_checkpointing = True  # what makes the objective keep the two apart

    def forward(self, *arguments: Tensor, **options: object) -> Tensor | tuple[Tensor, ...]:
        return self.network(*arguments, **options)


def measure_operator(
    size: StepSize, dtype: torch.dtype, settings: Settings, peers: Peers | None = None
) -> Row:
    """Time, memory and error of dF alone."""
    setup = Setup.random(size, dtype, settings.device)
    operators = own_operators(setup)
    if peers is not None:
        operators |= peers.operators(setup)
    exact = setup.exact_derivative()[len(setup.x) // 2 :]
    errors, peaks, notes = {}, {}, []
    for name, operator in list(operators.items()):
        try:
            errors[name] = relative_error([operator()], [exact])
            peaks[name] = peak_bytes(operator, settings.device)
        except torch.OutOfMemoryError as error:
            notes.append(f"{name}: {str(error).splitlines()[0]}")
            del operators[name]
    functions = {name: [operator] for name, operator in operators.items()}
    times = compare(functions, settings.device, settings.seconds, graphs=False)
    return Row(
        benchmark="derivative operator",
        size=size.name,
        shape={**asdict(size.config), "batch": len(setup.x) - len(setup.x) // 2},
        dtype=name_of(dtype) + ("" if dtype == torch.float32 else " autocast"),
        direction="step",
        device=settings.device.type,
        runs_on=kernels_of(settings.device),
        candidates={name: Candidate(times[name], peaks[name], errors[name]) for name in functions},
        notes=notes,
    )


def measure_whole_step(
    size: StepSize, dtype: torch.dtype, settings: Settings, peers: Peers | None = None
) -> Row:
    """Time, memory and error of dF in a whole training step."""
    setup = Setup.random(size, dtype, settings.device)
    candidates = own_steps(setup)
    if peers is not None:
        candidates |= peers.steps(setup, settings.compile)
    return measure_candidates("derivative step", size, setup, candidates, settings)


def own_operators(setup: Setup, epsilon: float = EPSILON) -> dict[str, Callable[[], Tensor]]:
    """dF of the second half of the batch, without gradient."""
    n = len(setup.x) // 2
    x, z, y, t, r = (value[n:] for value in setup.batch)
    network = Network(setup.model, TRANSPORT)

    def jvp() -> Tensor:
        with torch.no_grad(), setup.autocast():
            x_t, v_t = ops.interpolate(x, z, torch.stack(TRANSPORT.interpolant(t), dim=1))
            return network.derivative(x_t, t, r, y, v_t)[2]

    def dde() -> Tensor:
        e = torch.full_like(t, epsilon)
        with torch.no_grad(), setup.autocast():
            around = [TRANSPORT.interpolant(time)[:2] for time in (t + e, t - e)]
            states = ops.interpolate(x, z, torch.stack([*around[0], *around[1]], dim=1))
            ahead, behind = central_pair(network, *states, t, r, y, e)
            return (ahead.float() - behind.float()) / (2 * epsilon)

    return {"jvp": jvp, "dde": dde}


def own_steps(setup: Setup) -> dict[str, StepCandidate]:
    step = setup.training_step()

    def candidate(derivative: str, wrap: Callable[[nn.Module], nn.Module]) -> StepCandidate:
        loss = setup.loss(derivative)

        def objective() -> tuple[Tensor, Tensor]:
            with setup.autocast():
                out = loss(wrap(setup.model), *setup.batch)
            return out.loss, out.derivative

        def take() -> Tensor:
            step.loss = lambda model, *rest, **options: loss(wrap(model), *rest, **options)
            return step.run()

        return StepCandidate(objective, take)

    return {
        "jvp": candidate("jvp", lambda model: model),
        "jvp, two passes": candidate("jvp", TwoPasses),
        "dde": candidate("dde", lambda model: model),
    }
