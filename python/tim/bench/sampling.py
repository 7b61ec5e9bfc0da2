"""A step of the sampler, network and transition: on kernels, on references, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from tim import ops
from tim.bench.machine import name_of
from tim.bench.measure import Settings
from tim.bench.memory import peak_bytes
from tim.bench.problem import relative_error
from tim.bench.report import Candidate, Row
from tim.bench.step import STEP_SIZES, TRANSPORT, Peers, Setup, StepSize, kernels_of
from tim.bench.timing import compare
from tim.sampler import sample


@dataclass(frozen=True)
class Sampler:
    """A network and how its step is taken."""

    network: nn.Module
    context: Callable = nullcontext
    cuda_graph: bool = False


def sampling_sizes(kind: str) -> Iterator[StepSize]:
    """The models of the training step, one image at a time and a batch of them."""
    for size in STEP_SIZES[kind]:
        for batch in (1, size.batch):
            yield replace(size, name=f"{size.name} x {batch}", batch=batch)


def measure_sampling(
    size: StepSize, dtype: torch.dtype, settings: Settings, peers: Peers | None = None
) -> Row:
    """Times of one step of all candidates, which have their weights and images in `dtype`."""
    device = settings.device
    setup = Setup.random(size, torch.float32, device)
    y, noise = setup.y, setup.z

    def take(sampler: Sampler, dtype: torch.dtype = dtype) -> Tensor:
        with sampler.context():
            return sample(
                sampler.network, y, noise.to(dtype), 1, transport=TRANSPORT,
                cuda_graph=sampler.cuda_graph,
            )  # fmt: skip

    exact = take(Sampler(setup.wide_model(), ops.reference_only), torch.float64)
    candidates = _candidates(setup, dtype, settings, peers)
    errors, peaks = {}, {}
    for name, candidate in candidates.items():
        for _ in range(5):  # a graph is recorded at the fourth call
            image = take(candidate)
        errors[name] = relative_error([image], [exact])
        peaks[name] = peak_bytes(lambda candidate=candidate: take(candidate), device)
    functions = {name: [lambda c=c: take(c)] for name, c in candidates.items()}
    # What a user waits for includes what the host does, so the benchmark records no graphs itself.
    times = compare(functions, device, settings.seconds, graphs=False)
    return Row(
        benchmark="sampling",
        size=size.name,
        shape={**asdict(size.config), "batch": size.batch},
        dtype=name_of(dtype),
        direction="step",
        device=device.type,
        runs_on=kernels_of(device),
        candidates={name: Candidate(times[name], peaks[name], errors[name]) for name in candidates},
    )


def _candidates(
    setup: Setup, dtype: torch.dtype, settings: Settings, peers: Peers | None
) -> dict[str, Sampler]:
    networks = {} if peers is None else peers.networks(setup, settings.compile)
    model = setup.model.to(dtype)
    candidates = {"tim": Sampler(model)}
    if settings.device.type == "cuda":
        candidates["tim, CUDA graph"] = Sampler(model, cuda_graph=True)
    candidates["tim, references"] = Sampler(model, ops.reference_only)
    return candidates | {name: Sampler(network.to(dtype)) for name, network in networks.items()}
