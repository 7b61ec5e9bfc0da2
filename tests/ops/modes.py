"""The ways in which PyTorch may run an operation: each has to give what a plain call gives.

Compiled whole, under autocast, inside a checkpoint, mapped over a batch, with tangents of the last
samples, and on a GPU inside a CUDA graph, on another stream and on another device.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract import OpContract, as_tuple, assert_close
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.func import jvp, vmap
from torch.utils.checkpoint import checkpoint

from tim import ops


def assert_same(actual: tuple, expected: tuple) -> None:
    """Equal but for the order of sums: the same code, or that of two kernels with one formula."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        ulps = 8 * torch.finfo(e.dtype).eps
        scale = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a, e, rtol=ulps, atol=ulps * max(1.0, scale))


def compiled_whole(function: Callable) -> tuple[Callable, set[str]]:
    """`function` as one graph, and the names of the operations of ours that the graphs call."""
    found: set[str] = set()

    def note(graph: torch.fx.GraphModule, example_inputs: list):
        names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        found.update(name.split(".")[1] for name in names if name.startswith("tim."))
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    return torch.compile(function, fullgraph=True, backend=backend), found


class Modes(OpContract):
    #: Operations that a graph holds: of a forward pass, and of one that autograd records.
    in_graph: tuple[str, ...] = ()
    in_recorded_graph: tuple[str, ...] | None = None  #: None: also NAME_backward of each

    def stacked(self, device: str, seeds=(0, 1)) -> tuple[list, list[list]]:
        """Arguments with tensors [len(seeds), ...], and those of each seed."""
        singles = [self.prepare(self.sizes[0], torch.float32, device, seed)[0] for seed in seeds]
        both = [
            torch.stack(values) if isinstance(values[0], Tensor) else values[0]
            for values in zip(*singles, strict=True)
        ]
        return both, singles

    # Compiled.

    def expected_in_graph(self, path: str, recorded: bool) -> set[str] | None:
        if path == "reference":
            return set()
        if not recorded:
            return set(self.in_graph)
        if self.in_recorded_graph is not None:
            return set(self.in_recorded_graph)
        return {*self.in_graph, *(f"{name}_backward" for name in self.in_graph)}

    def check_graph(self, found: set[str], path: str, recorded: bool) -> None:
        expected = self.expected_in_graph(path, recorded)
        assert expected is None or found == expected

    def test_compiled_as_one_graph(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, _ = self.prepare(self.sizes[0], torch.float32, device)
        function, found = compiled_whole(self.op)
        with self.on(path):
            assert_same(self.run(function, inputs), self.run(self.op, inputs))
        self.check_graph(found, path, recorded=False)

    def test_compiled_with_its_gradient(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, _ = self.prepare(self.sizes[0], torch.float32, device)
        function, found = compiled_whole(self.op)
        with self.on(path):
            assert_same(self.gradients(function, inputs), self.gradients(self.op, inputs))
        self.check_graph(found, path, recorded=True)

    # Under autocast.

    def mixed(self, inputs: list) -> list:
        """What linear layers and a residual stream give under autocast: two dtypes."""
        return [
            t.bfloat16() if isinstance(t, Tensor) and i % 2 else t for i, t in enumerate(inputs)
        ]

    @pytest.mark.parametrize("kind", ["float32", "mixed", "float64"])
    def test_autocast(self, kind, path) -> None:
        """Dtype and accuracy are those of the reference's operations under autocast."""
        device = self.skip_unless(path, torch.float32)
        dtype = torch.float64 if kind == "float64" else torch.float32
        inputs, tangents = self.prepare(self.sizes[0], dtype, device)
        if kind == "mixed":
            inputs = self.mixed(inputs)
            tangents = [t if t is None else t.to(x.dtype) for x, t in zip(inputs, tangents)]  # noqa: B905
        wide = [
            [t.double() if isinstance(t, Tensor) else t for t in values]
            for values in (inputs, tangents)
        ]

        def results(function: Callable, inputs: list, tangents: list) -> list[tuple]:
            with torch.autocast(device, torch.bfloat16, enabled=inputs is not wide[0]):
                found = [self.run(function, inputs), self.gradients(function, inputs)]
                return found + ([self.jvp(function, inputs, tangents)[1]] if tangents_of else [])

        tangents_of = self.with_tangent
        with ops.reference_only():
            exact = results(self.reference, *wide)
            yardstick = results(self.reference, inputs, tangents)
        with self.on(path):
            actual = results(self.op, inputs, tangents)
        for what, factor, *values in zip(
            ("output", "gradient", "tangent"), (2, 3, 3), actual, exact, yardstick, strict=False
        ):
            for a, e, y in zip(*values, strict=True):
                assert a.dtype == y.dtype, f"{what} of {a.dtype}, of the reference {y.dtype}"
                assert_close(a, e, y, factor, what)

    # Checkpointed.

    def test_checkpointed(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, _ = self.prepare(self.sizes[0], torch.float32, device)
        calls = []

        def op(*arguments):
            calls.append(torch.is_grad_enabled())
            return self.op(*arguments)

        with self.on(path):
            actual = self.gradients(lambda *a: checkpoint(op, *a, use_reentrant=False), inputs)
            expected = self.gradients(self.op, inputs)
        assert len(calls) == 2, "the operation ran once more for the backward pass"
        assert all(map(torch.equal, actual, expected))

    # Mapped.

    def test_vmap_over_every_input(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        both, singles = self.stacked(device)
        tensors = [i for i, value in enumerate(both) if isinstance(value, Tensor)]

        def op(*values: Tensor) -> tuple:
            arguments = list(both)
            for i, value in zip(tensors, values, strict=True):
                arguments[i] = value
            return as_tuple(self.op(*arguments))

        with self.on(path):
            actual = vmap(op)(*(both[i] for i in tensors))
            expected = [self.run(self.op, single) for single in singles]
        assert_same(actual, tuple(map(torch.stack, zip(*expected, strict=True))))

    def test_gradients_of_each_sample(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        both, singles = self.stacked(device)
        i = self.differentiable[0]

        def gradient(value: Tensor, inputs: list) -> Tensor:
            def loss(value: Tensor) -> Tensor:
                return self.run(self.op, [*inputs[:i], value, *inputs[i + 1 :]])[0].square().sum()

            return torch.func.grad(loss)(value)

        with self.on(path):
            actual = vmap(lambda value: gradient(value, singles[0]))(both[i])
            expected = [gradient(value, singles[0]) for value in both[i]]
        assert_same((actual,), (torch.stack(expected),))

    # On a GPU.

    def everything(self, inputs: list, tangents: list) -> tuple[Tensor, ...]:
        """Outputs, gradients of half their squares, and tangents."""
        leaves = list(inputs)
        for i in self.differentiable:
            leaves[i] = inputs[i].detach().requires_grad_()
        outputs = self.run(self.op, leaves)
        recorded = [out for out in outputs if out.requires_grad]
        cotangents = [out.detach() for out in recorded]
        wanted = [leaves[i] for i in self.differentiable]
        gradients = torch.autograd.grad(recorded, wanted, cotangents)
        t_outputs = self.jvp(self.op, inputs, tangents)[1] if self.with_tangent else ()
        return tuple(out.detach() for out in outputs) + gradients + t_outputs

    @pytest.mark.gpu
    def test_in_a_cuda_graph(self, dtype) -> None:
        device = self.skip_unless("cuda", dtype)
        buffers, moves = self.prepare(self.sizes[0], dtype, device)
        fresh = self.prepare(self.sizes[0], dtype, device, seed=1)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.everything(buffers, moves)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.everything(buffers, moves)
        for own, new in zip((*buffers, *moves), (*fresh[0], *fresh[1]), strict=True):
            if isinstance(own, Tensor):
                own.copy_(new)
        for _ in range(2):
            graph.replay()
        assert_same(captured, self.everything(*fresh))

    @pytest.mark.gpu
    def test_on_another_stream(self) -> None:
        """What comes late on a stream is there when the operation on that stream reads it."""
        device = self.skip_unless("cuda", torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)
        expected = self.everything(inputs, tangents)

        def empty(values: list) -> list:
            return [torch.full_like(t, torch.nan) if isinstance(t, Tensor) else t for t in values]

        buffers, moves = empty(inputs), empty(tangents)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            for own, new in zip((*buffers, *moves), (*inputs, *tangents), strict=True):
                if isinstance(own, Tensor):
                    own.copy_(new)
            actual = self.everything(buffers, moves)
        stream.synchronize()
        assert_same(actual, expected)

    @pytest.mark.gpu
    def test_on_other_devices_than_the_current_one(self) -> None:
        device = self.skip_unless("cuda", torch.float32)
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        expected = self.everything(*self.prepare(self.sizes[0], torch.float32, device))
        for index in range(1, torch.cuda.device_count()):
            other = torch.device("cuda", index)
            actual = self.everything(*self.prepare(self.sizes[0], torch.float32, other))
            assert all(result.device == other for result in actual)
            assert_same(tuple(result.to(device) for result in actual), expected)
        assert torch.cuda.current_device() == 0


class PairModes(Modes):
    """With tangents of the last samples, in a Pair."""

    def of_pairs(self, inputs: list, tangents: list, size: int) -> Callable:
        """The operation as a function of all its tensors, then of tangents of `size` samples."""
        moving = self.with_tangent

        def function(*values: Tensor) -> tuple:
            arguments = list(values[: len(inputs)])
            for i, tangent in zip(moving, values[len(inputs) :], strict=True):
                arguments[i] = ops.Pair(arguments[i], tangent)
            result = self.op(*arguments)
            results = (result,) if isinstance(result, ops.Pair) else result
            return tuple(pair.primal for pair in results) + tuple(p.tangent for p in results)

        last = [tangents[i][len(tangents[i]) - size :] for i in moving]
        return lambda *values: function(*values, *last)

    def sizes_of_tangents(self, inputs: list) -> list[int]:
        batch = len(inputs[self.with_tangent[0]])
        return sorted({1, batch}) if batch else [0]

    def test_pairs(self, size, dtype, path) -> None:
        device = self.skip_unless(path, dtype)
        inputs, tangents = self.prepare(size, dtype, device)
        with self.on(path):
            plain = self.run(self.op, inputs)
            _, everywhere = self.jvp(self.op, inputs, tangents)
            for size in self.sizes_of_tangents(inputs):
                results = self.of_pairs(inputs, tangents, size)(*inputs)
                values, moves = results[: len(plain)], results[len(plain) :]
                assert not any(move.requires_grad for move in moves)
                last = tuple(move[len(move) - size :] for move in everywhere)
                assert_same((*values, *moves), (*plain, *last))

    def test_checkpointed_with_tangents(self, path) -> None:
        """As the network does it: tangents are arguments of the checkpointed function."""
        device = self.skip_unless(path, torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)
        size = self.sizes_of_tangents(inputs)[0]
        with self.on(path):
            op = self.of_pairs(inputs, tangents, size)
            expected = self.gradients(self.op, inputs)
            actual = self.gradients(lambda *a: checkpoint(op, *a, use_reentrant=False), inputs)
            assert_same(checkpoint(op, *inputs, use_reentrant=False), op(*inputs))
        assert_same(actual, expected)

    def test_vmap_and_jvp_in_either_order(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        both, _ = self.stacked(device)
        moving = self.with_tangent
        primals = tuple(both[i] for i in moving)
        moves = tuple(torch.randn_like(p) for p in primals)
        rest = self.prepare(self.sizes[0], torch.float32, device)[0]

        def op(*values: Tensor) -> tuple:
            arguments = list(rest)
            for i, value in zip(moving, values, strict=True):
                arguments[i] = value
            return as_tuple(self.op(*arguments))

        with self.on(path):
            inside = vmap(lambda p, m: jvp(op, p, m)[1])(primals, moves)
            outside = jvp(vmap(op), primals, moves)[1]
            expected = [
                jvp(op, tuple(p[i] for p in primals), tuple(m[i] for m in moves))[1]
                for i in range(2)
            ]
        expected = tuple(map(torch.stack, zip(*expected, strict=True)))
        assert_same(inside, expected)
        assert_same(outside, expected)
