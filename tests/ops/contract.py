"""The tests every operation must pass, on every path that can run on this machine.

modes.py has those of the ways in which PyTorch may run an operation.

A test file of an operation subclasses `OpContract` and describes its inputs; pytest collects the
inherited tests once per size, dtype and path. The yardstick is never a hand-tuned constant: an
error against float64 may be twice (gradients, tangents: three times) that of the reference formula
in the tested dtype, plus a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tim import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
PATHS = ("reference", *KERNELS)


def as_tuple(value: Tensor | tuple) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_close(
    actual: Tensor, exact: Tensor, yardstick: Tensor, factor: float, what: str
) -> None:
    """Largest error of `actual` at most `factor` times that of `yardstick`, both from `exact`."""
    assert actual.shape == exact.shape, f"{what}: {actual.shape} against {exact.shape}"
    if not exact.numel():
        return
    exact = exact.double().cpu()
    error = (actual.double().cpu() - exact).abs().max().item()
    allowed = (yardstick.double().cpu() - exact).abs().max().item()
    ulp = torch.finfo(yardstick.dtype).eps * exact.abs().max().item()
    assert error <= factor * allowed + 4 * ulp, (
        f"{what}: error {error:.3g}, of the reference {allowed:.3g}, ulp {ulp:.3g}"
    )


def skip_unless_tangents_survive(mode: Callable) -> None:
    """PyTorch 2.11 loses the tangents of its own functions in inference mode, too."""
    with mode():
        x = torch.ones(1)
        if not torch.func.jvp(torch.sin, (x,), (x,))[1].any():
            pytest.skip("this PyTorch loses all tangents in inference mode")


class OpContract:
    """Describe the operation in a subclass; `inputs` decides everything else."""

    name: str  # as in tim.ops.available()
    op: Callable
    reference: Callable
    sizes: tuple  # each is handed to `inputs`
    differentiable: tuple[int, ...]  # positions of inputs that receive gradients
    with_tangent: tuple[int, ...] = ()  # positions of inputs that carry tangents; () = no rule

    def inputs(self, size: tuple, generator: torch.Generator) -> list:
        """Float64 inputs, in the order of the function's positional arguments."""
        raise NotImplementedError

    # What the contract needs, derived.

    def prepare(self, size, dtype, device=None, seed=0) -> tuple[list, list]:
        """Inputs and tangents, rounded to `dtype` once so that all paths see the same numbers."""
        generator = torch.Generator().manual_seed(seed)
        device = device or torch.get_default_device()
        with torch.device("cpu"):
            tensors = self.inputs(size, generator)
            tangents = [
                torch.randn(t.shape, generator=generator, dtype=torch.float64)
                if i in self.with_tangent
                else None
                for i, t in enumerate(tensors)
            ]

        def convert(t):
            return t.to(dtype).to(device) if isinstance(t, Tensor) else t

        return [convert(t) for t in tensors], [convert(t) for t in tangents]

    def run(self, function: Callable, inputs: list, wide: bool = False) -> tuple[Tensor, ...]:
        inputs = [t.double() if wide and isinstance(t, Tensor) else t for t in inputs]
        return as_tuple(function(*inputs))

    def jvp(self, function: Callable, inputs: list, tangents: list) -> tuple[tuple, tuple]:
        def of_moving(*moving: Tensor):
            arguments = list(inputs)
            for position, tensor in zip(self.with_tangent, moving, strict=True):
                arguments[position] = tensor
            return function(*arguments)

        primals, moves = (
            tuple(values[i] for i in self.with_tangent) for values in (inputs, tangents)
        )
        out, t_out = torch.func.jvp(of_moving, primals, moves)
        return as_tuple(out), as_tuple(t_out)

    def gradients(self, function: Callable, inputs: list) -> tuple[Tensor, ...]:
        inputs = list(inputs)
        for i in self.differentiable:
            inputs[i] = inputs[i].detach().clone().requires_grad_()
        outputs = [out for out in as_tuple(function(*inputs)) if out.requires_grad]
        cotangents = []
        for i, out in enumerate(outputs):
            generator = torch.Generator().manual_seed(17 + i)
            c = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            cotangents.append(c.to(torch.bfloat16).to(out.dtype).to(out.device))
        return torch.autograd.grad(outputs, [inputs[i] for i in self.differentiable], cotangents)

    def skip_unless(self, path: str, dtype: torch.dtype) -> str:
        """Device for a path, or skip the test where the path cannot exist."""
        if path == "reference":
            return "cpu"
        if path == "cpu" and dtype == torch.float16:
            pytest.skip("CPU kernels take float32 and bfloat16; float16 runs the reference")
        if path == "cuda" and not torch.cuda.is_available():
            pytest.skip("no GPU")
        if not self.has_kernel(path):
            pytest.skip(f"no {path} kernel of {self.name} in this build")
        return path

    def has_kernel(self, device: str) -> bool:
        return device in ops.available()[self.name]

    @staticmethod
    def on(path: str):
        return ops.reference_only() if path == "reference" else nullcontext()


def contract_parameters(metafunc: pytest.Metafunc) -> None:
    """Parametrise `size`, `dtype`, `path` and `kernel` of a contract's tests from its class."""
    cls = metafunc.cls
    if cls is None or not issubclass(cls, OpContract):
        return
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", cls.sizes, ids=str)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", PATHS)
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", KERNELS)


class ForwardBackward(OpContract):
    def test_forward(self, size, dtype, path) -> None:
        device = self.skip_unless(path, dtype)
        inputs, _ = self.prepare(size, dtype, device)
        with ops.reference_only():
            exact = self.run(self.reference, inputs, wide=True)
            yardstick = self.run(self.reference, inputs)
        with self.on(path):
            actual = self.run(self.op, inputs)
        for i, (a, e, y) in enumerate(zip(actual, exact, yardstick, strict=True)):
            assert a.dtype == y.dtype and a.is_contiguous()
            assert_close(a, e, y, 2, f"output {i}")

    def test_backward(self, size, dtype, path) -> None:
        device = self.skip_unless(path, dtype)
        inputs, _ = self.prepare(size, dtype, device)
        with ops.reference_only():
            exact = self.gradients(
                self.reference, [t.double() if isinstance(t, Tensor) else t for t in inputs]
            )
            yardstick = self.gradients(self.reference, inputs)
        with self.on(path):
            actual = self.gradients(self.op, inputs)
        for i, a, e, y in zip(self.differentiable, actual, exact, yardstick, strict=True):
            assert_close(a, e, y, 3, f"gradient of input {i}")

    def test_gradcheck_of_the_reference(self) -> None:
        inputs, _ = self.prepare(self.sizes[0], torch.float64)

        def function(*moving: Tensor):
            arguments = list(inputs)
            for i, tensor in zip(self.differentiable, moving, strict=True):
                arguments[i] = tensor
            return tuple(o for o in as_tuple(self.op(*arguments)) if o.requires_grad)

        moving = [inputs[i].clone().requires_grad_() for i in self.differentiable]
        with ops.reference_only():
            assert torch.autograd.gradcheck(function, moving, atol=1e-6)

    def test_second_derivatives_raise_instead_of_being_dropped(self, kernel) -> None:
        device = self.skip_unless(kernel, torch.float32)
        inputs, _ = self.prepare(self.sizes[0], torch.float32, device)
        i = self.differentiable[0]
        inputs[i].requires_grad_()
        out = self.run(self.op, inputs)[0]
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs[i], create_graph=True)
        with pytest.raises(NotImplementedError, match="not differentiable"):
            gradient.square().sum().backward()


class Tangent(OpContract):
    def assert_tangents(self, actual: tuple, inputs: list, tangents: list) -> None:
        with ops.reference_only():
            wide = [
                [t.double() if isinstance(t, Tensor) else t for t in v] for v in (inputs, tangents)
            ]
            _, exact = self.jvp(self.reference, *wide)
            _, yardstick = self.jvp(self.reference, inputs, tangents)
        for i, (a, e, y) in enumerate(zip(actual, exact, yardstick, strict=True)):
            assert a is not None, f"output {i} has lost its tangent"
            assert not e.numel() or a.abs().max() > 0, f"output {i} has a zero tangent"
            assert_close(a, e, y, 3, f"tangent of output {i}")

    def test_tangent(self, size, dtype, path) -> None:
        device = self.skip_unless(path, dtype)
        inputs, tangents = self.prepare(size, dtype, device)
        with self.on(path):
            out, t_out = self.jvp(self.op, inputs, tangents)
            plain = self.run(self.op, inputs)
        self.assert_tangents(t_out, inputs, tangents)
        for with_tangent, without in zip(out, plain, strict=True):
            ulps = 4 * torch.finfo(without.dtype).eps
            torch.testing.assert_close(with_tangent, without, rtol=ulps, atol=ulps)

    def test_tangent_of_each_input_alone(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)
        for i in self.with_tangent:
            only = type(self)()
            only.with_tangent = (i,)
            with self.on(path):
                _, t_out = only.jvp(self.op, inputs, tangents)
            with ops.reference_only():
                _, expected = only.jvp(self.reference, inputs, tangents)
            for a, e in zip(t_out, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "mode", ["no_grad", "inference_mode", "dual", "with_graph", "compile", "of_compile"]
    )
    def test_no_silent_zero_tangent(self, mode, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)
        with self.on(path):
            self.assert_tangents(self.in_mode(mode, inputs, tangents), inputs, tangents)

    def in_mode(self, mode: str, inputs: list, tangents: list) -> tuple:
        if mode == "no_grad":
            with torch.no_grad():
                return self.jvp(self.op, inputs, tangents)[1]
        if mode == "inference_mode":
            skip_unless_tangents_survive(torch.inference_mode)
            with torch.inference_mode():
                return self.jvp(self.op, inputs, tangents)[1]
        if mode == "with_graph":
            for i in self.differentiable:
                inputs[i].requires_grad_()
            return self.jvp(self.op, inputs, tangents)[1]
        if mode == "dual":
            with forward_ad.dual_level():
                arguments = [
                    t if d is None else forward_ad.make_dual(t, d)
                    for t, d in zip(inputs, tangents, strict=True)
                ]
                outputs = as_tuple(self.op(*arguments))
                return tuple(forward_ad.unpack_dual(out).tangent for out in outputs)
        torch._dynamo.reset()
        if mode == "compile":

            @torch.compile(fullgraph=True, backend="aot_eager")
            def compiled(inputs: list, tangents: list):
                return self.jvp(self.op, inputs, tangents)[1]

            return compiled(inputs, tangents)
        inner = torch.compile(self.op, backend="aot_eager")  # dynamo hands over to eager here
        return self.jvp(inner, inputs, tangents)[1]

    def test_the_bare_operation_raises_when_it_meets_a_tangent(self, kernel, monkeypatch) -> None:
        device = self.skip_unless(kernel, torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)
        monkeypatch.setattr(ops._dispatch, "split_tangents", lambda *tensors: (tensors, None))
        monkeypatch.setattr(ops._dispatch.Opaque, "__call__", lambda self, *a: self.bare(*a))
        with pytest.raises(
            NotImplementedError, match=r"has no forward-mode rule|does not support it"
        ):
            self.jvp(self.op, inputs, tangents)

    @pytest.mark.xfail(
        strict=True,
        reason="torch drops the tangent of a dual number passed into a compiled function",
    )
    def test_dual_number_into_a_compiled_function(self, kernel) -> None:
        device = self.skip_unless(kernel, torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)
        torch._dynamo.reset()
        compiled = torch.compile(self.op, backend="aot_eager")
        with forward_ad.dual_level():
            arguments = [
                t if d is None else forward_ad.make_dual(t, d)
                for t, d in zip(inputs, tangents, strict=True)
            ]
            for out in as_tuple(compiled(*arguments)):
                assert forward_ad.unpack_dual(out).tangent is not None

    def test_gradient_of_the_primal_beside_a_tangent(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)

        def primal_of_jvp(*arguments):
            outputs, t_outputs = self.jvp(self.op, list(arguments), tangents)
            assert not any(t.requires_grad for t in t_outputs), "the tangent keeps a graph"
            return outputs

        with self.on(path):
            expected = self.gradients(self.op, inputs)
            actual = self.gradients(primal_of_jvp, inputs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)

    def test_forward_over_reverse_raises(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)
        i = self.with_tangent[0]
        inputs[i].requires_grad_()
        with self.on(path), forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[i], tangents[i])
            out = self.run(self.op, [*inputs[:i], dual, *inputs[i + 1 :]])[0]
            with pytest.raises(NotImplementedError, match="has no forward-mode rule"):
                torch.autograd.grad(out.square().sum(), dual)

    def test_nested_jvp_raises(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, tangents = self.prepare(self.sizes[0], torch.float32, device)
        i = self.with_tangent[0]

        def tangent_at(tensor: Tensor) -> Tensor:
            only = type(self)()
            only.with_tangent = (i,)
            arguments = [*inputs[:i], tensor, *inputs[i + 1 :]]
            return only.jvp(self.op, arguments, tangents)[1][0]

        with self.on(path), pytest.raises(NotImplementedError, match=r"nested torch\.func\.jvp"):
            torch.func.jvp(tangent_at, (inputs[i],), (tangents[i],))

    def test_gradient_by_torch_func(self, path) -> None:
        device = self.skip_unless(path, torch.float32)
        inputs, _ = self.prepare(self.sizes[0], torch.float32, device)
        i = self.differentiable[0]

        def loss(tensor: Tensor) -> Tensor:
            return self.run(self.op, [*inputs[:i], tensor, *inputs[i + 1 :]])[0].square().sum()

        with self.on(path):
            actual = torch.func.grad(loss)(inputs[i])
            inputs[i].requires_grad_()
            (expected,) = torch.autograd.grad(loss(inputs[i]), inputs[i])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
