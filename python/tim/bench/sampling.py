"""Latency of sampling by number of steps: kernels, references, torch.compile, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from tim import ops
from tim.bench.machine import name_of, why_no_compile
from tim.bench.measure import Settings
from tim.bench.memory import peak_bytes
from tim.bench.problem import relative_error
from tim.bench.report import Candidate, Row
from tim.bench.step import STEP_SIZES, TRANSPORT, Peers, Setup, StepSize, kernels_of
from tim.bench.timing import compare
from tim.graphs import WARM_UP
from tim.sampler import sample


@dataclass(frozen=True)
class Sampler:
    """A network and how its steps are taken."""

    network: nn.Module
    context: Callable = nullcontext
    cuda_graph: bool = False


def sampling_sizes(kind: str, batches: Sequence[int] | None) -> Iterator[StepSize]:
    """The models of the training step with so many images; by default one, and its batch."""
    for size in STEP_SIZES[kind]:
        for batch in batches or (1, size.batch):
            yield replace(size, name=f"{size.name} x {batch}", batch=batch)


class SamplingBench:
    """All candidates with the same weights, classes and noise, in one dtype."""

    def __init__(
        self,
        size: StepSize,
        dtype: torch.dtype,
        settings: Settings,
        peers: Peers | None = None,
    ) -> None:
        self.size, self.dtype, self.settings = size, dtype, settings
        setup = Setup.random(size, torch.float32, settings.device)
        self.y, self.noise, self.notes = setup.y, setup.z, []
        self.wide = setup.wide_model()
        self.candidates = self._candidates(setup, peers)
        for name, candidate in list(self.candidates.items()):
            try:
                for _ in range(WARM_UP + 2):  # compiled at the first, recorded at the last but one
                    self.take(candidate, 1)
            except Exception as error:
                if name == "tim":
                    raise
                self.notes.append(f"{name} failed: {type(error).__name__}: {error}".split("\n")[0])
                del self.candidates[name]

    def take(self, sampler: Sampler, steps: int, dtype: torch.dtype | None = None) -> Tensor:
        with sampler.context():
            return sample(
                sampler.network, self.y, self.noise.to(dtype or self.dtype), steps,
                transport=TRANSPORT, cuda_graph=sampler.cuda_graph,
            )  # fmt: skip

    def measure(self, steps: int) -> Row:
        """Times of whole calls with so many steps."""
        device = self.settings.device
        exact = self.take(Sampler(self.wide, ops.reference_only), steps, torch.float64)
        functions, errors, peaks = {}, {}, {}
        for name, candidate in self.candidates.items():

            def take(candidate: Sampler = candidate) -> Tensor:
                return self.take(candidate, steps)

            functions[name] = [take]
            errors[name] = relative_error([take()], [exact])
            peaks[name] = peak_bytes(take, device)
        # What a user waits for includes what the host does, so the benchmark records no graphs
        # itself.
        times = compare(functions, device, self.settings.seconds, graphs=False)
        return Row(
            benchmark="sampling",
            size=self.size.name,
            shape={**asdict(self.size.config), "batch": self.size.batch, "steps": steps},
            dtype=name_of(self.dtype),
            direction=f"{steps} step{'s' * (steps > 1)}",
            device=device.type,
            runs_on=kernels_of(device),
            candidates={
                name: Candidate(times[name], peaks[name], errors[name]) for name in functions
            },
            notes=self.notes,
        )

    def _candidates(self, setup: Setup, peers: Peers | None) -> dict[str, Sampler]:
        device, compiled = self.settings.device, self.settings.compile
        if compiled and (reason := why_no_compile(device)) is not None:
            compiled, self.notes = False, [reason]
        networks = {} if peers is None else peers.networks(setup, compiled)
        model = setup.model.to(self.dtype)
        ways = {"tim": model}
        if compiled:
            torch._dynamo.reset()
            ways["tim, compiled"] = torch.compile(model, dynamic=False)
        candidates = {name: Sampler(network) for name, network in ways.items()}
        if device.type == "cuda":
            candidates |= {
                f"{name}, CUDA graph": Sampler(network, cuda_graph=True)
                for name, network in ways.items()
            }
        candidates["tim, references"] = Sampler(model, ops.reference_only)
        others = {name: Sampler(network.to(self.dtype)) for name, network in networks.items()}
        return candidates | others
