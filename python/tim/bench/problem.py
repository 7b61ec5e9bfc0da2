"""One operation at one size: its inputs, the call that is timed, bytes moved and errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch._functorch.config
from torch import Tensor
from torch.autograd import forward_ad

from tim import ops
from tim.bench.cases import Operation, Size


@dataclass(frozen=True)
class Problem:
    """Inputs and tangents of an operation, and the direction that is measured."""

    operation: Operation
    direction: str
    inputs: list[Tensor]
    tangents: list[Tensor]

    @classmethod
    def random(
        cls,
        operation: Operation,
        size: Size,
        dtype: torch.dtype,
        direction: str,
        device: torch.device,
        seed: int = 0,
    ) -> Problem:
        """Normal numbers: on zeros and constants a machine can be faster than it ever will be."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, wide: bool = False) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=device)
            return tensor if wide else tensor.to(dtype)

        inputs = operation.inputs(size, draw)
        moving = [inputs[i] for i in operation.with_tangent]
        return cls(operation, direction, inputs, [draw(*t.shape).to(t.dtype) for t in moving])

    def call(self, function: Callable, *, compiled: bool = False) -> Callable[[], Sequence[Tensor]]:
        """What is timed. It returns outputs, or gradients, or outputs and their tangents.

        Of a backward pass the graph is built here and used again by every call. `compiled` says
        that `function` comes from `compile_reference`.
        """
        if self.direction == "forward":
            return lambda: as_tuple(function(*self.inputs))
        if self.direction == "backward":
            # A compiled backward pass would else write over what it reads.
            with torch._functorch.config.patch(donated_buffer=False):
                return self._backward(function)
        if compiled:
            return lambda: function(self.inputs, self.tangents)
        if function is self.operation.op:
            return self._tangent_of_pairs
        return lambda: self._tangent(function)

    def _backward(self, function: Callable) -> Callable[[], Sequence[Tensor]]:
        inputs = list(self.inputs)
        for i in self.operation.differentiable:
            inputs[i] = inputs[i].detach().requires_grad_()
        leaves = [inputs[i] for i in self.operation.differentiable]
        with torch.enable_grad():
            outputs = [out for out in as_tuple(function(*inputs)) if out.requires_grad]
        generator = torch.Generator(outputs[0].device).manual_seed(17)
        gradients = [
            torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
            for out in outputs
        ]
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    def _tangent_of_pairs(self) -> Sequence[Tensor]:
        """As our network calls its operations: with tangents beside values."""
        inputs: list[ops.Operand] = list(self.inputs)
        for i, tangent in zip(self.operation.with_tangent, self.tangents, strict=True):
            inputs[i] = ops.Pair(inputs[i], tangent)
        outputs = self.operation.op(*inputs)
        results = [outputs] if isinstance(outputs, ops.Pair) else outputs
        return (*(pair.primal for pair in results), *(pair.tangent for pair in results))

    def _tangent(self, function: Callable) -> Sequence[Tensor]:
        # Dual numbers and not func.jvp: a network enters that once for all of its operations.
        with forward_ad.dual_level():
            inputs = list(self.inputs)
            for i, tangent in zip(self.operation.with_tangent, self.tangents, strict=True):
                inputs[i] = forward_ad.make_dual(inputs[i], tangent)
            duals = [forward_ad.unpack_dual(out) for out in as_tuple(function(*inputs))]
        return (*(d.primal for d in duals), *(d.tangent for d in duals))

    def compile_reference(self) -> Callable:
        """torch.compile of the reference, or of its forward-mode derivative."""
        if self.direction != "tangent":
            return torch.compile(self.operation.reference, dynamic=False)

        def derivative(inputs: list[Tensor], tangents: list[Tensor]) -> tuple:
            positions = self.operation.with_tangent

            def of_moving(*moving: Tensor):
                arguments = list(inputs)
                for i, tensor in zip(positions, moving, strict=True):
                    arguments[i] = tensor
                return self.operation.reference(*arguments)

            moving = tuple(inputs[i] for i in positions)
            outputs, t_outputs = torch.func.jvp(of_moving, moving, tuple(tangents))
            return (*as_tuple(outputs), *as_tuple(t_outputs))

        return torch.compile(derivative, dynamic=False)

    def traffic_bytes(self) -> int:
        """Fewest bytes the direction moves: each operand read once, each result written once."""
        with torch.no_grad():
            outputs = as_tuple(self.operation.op(*self.inputs))
        if self.direction == "forward":
            return size_in_bytes(self.inputs) + size_in_bytes(outputs)
        if self.direction == "tangent":
            # Every output has a tangent of its size.
            moved = size_in_bytes(self.inputs) + size_in_bytes(self.tangents)
            return moved + 2 * size_in_bytes(outputs)
        saved = self.operation.saved(self.inputs, outputs)
        gradients = [self.inputs[i] for i in self.operation.differentiable]
        incoming = outputs[: self.operation.differentiable_outputs]
        return size_in_bytes(saved) + size_in_bytes(incoming) + size_in_bytes(gradients)

    def exact(self) -> Sequence[Tensor]:
        """Results of the reference in float64 for the same inputs."""
        wide = replace(
            self,
            inputs=[tensor.double() for tensor in self.inputs],
            tangents=[tensor.double() for tensor in self.tangents],
        )
        with torch.set_grad_enabled(self.direction == "backward"), ops.reference_only():
            return wide.call(self.operation.exact or self.operation.reference)()


def relative_error(actual: Sequence[Tensor | None], exact: Sequence[Tensor]) -> float:
    """Largest ||a - e|| / ||e|| of all results; infinite where one is missing or NaN."""
    errors = [0.0]
    for a, e in zip(actual, exact, strict=True):
        if a is None:
            return math.inf
        difference, scale = (a.double() - e).norm().item(), e.norm().item()
        if math.isnan(difference) or (scale == 0 and difference > 0):
            return math.inf
        errors.append(difference / scale if scale else 0.0)
    return max(errors)


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def as_tuple(value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (value,) if isinstance(value, Tensor) else value
