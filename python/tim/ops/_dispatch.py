"""What all operations share: tangents, the choice between kernel and reference, launches, checks.

Two rules keep this package's worst bug, a silent zero tangent, out:

* Bare `torch.ops.tim.*` operations are private, and raise when they meet a forward-mode tangent,
  which PyTorch would drop without an error. An `Operator` looks for tangents first and calls the
  pair operation when it finds any.
* A backward formula that meets a tangent (forward-over-reverse) raises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from tim import _extension
from tim._checks import check_number
from tim.ops import _table
from tim.ops._opaque import Opaque, is_mapped, plain_device, refuse_tangents, register
from tim.ops._table import (
    KERNEL_DTYPES,
    KERNEL_OPS,
    all_off,
    backends,
    has_kernel,
    kernels,
    reference_only,
)

__all__ = [
    "DTYPE_CODES",
    "KERNEL_DTYPES",
    "KERNEL_OPS",
    "OPERATORS",
    "WITH_SCRATCH",
    "Opaque",
    "Operator",
    "all_off",
    "backends",
    "check_shape",
    "check_tensors",
    "direction_of",
    "drop_tangent_graph",
    "empty_like",
    "float32",
    "guard_backward",
    "has_kernel",
    "has_transform",
    "is_mapped",
    "kernels",
    "launch",
    "layer_norm",
    "make_dual",
    "plain_device",
    "pointer",
    "product_dtype",
    "promote",
    "reference_only",
    "refuse_tangents",
    "register",
    "split_tangents",
    "why_not",
]

_unpack_dual, _make_dual = torch._VF._unpack_dual, torch._VF._make_dual

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: By name; of two forms of one operation the first.
OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Operator:
    """One operation: what runs for which call.

    Called with the arguments of the reference, tensors checked and of one dtype where the kernels
    demand it. The kernels of a call are `plain`, or `pair` where an input carries a tangent.
    """

    name: str
    reference: Callable
    plain: Opaque
    pair: Opaque | None = None  #: None: tangents raise
    outputs: int = 1  #: the first results of `plain`; the others only serve its backward
    moving: int = 0  #: so many leading inputs have tangents in `pair`; others run the reference
    constant: tuple[int, ...] = ()  #: inputs for which there is no gradient but the reference's
    #: Results of `plain` where nothing is recorded, without those that serve the backward.
    alone: Callable | None = None
    #: Reason why no kernel takes these arguments, beyond the table; None when one does.
    refuses: Callable[..., str | None] | None = None

    def __post_init__(self) -> None:
        OPERATORS.setdefault(self.name, self)

    def __call__(self, device: str | None, *arguments: object):
        """`device` is what `plain_device` says of the tensors among the arguments."""
        if device is not None and (results := self._straight(device, arguments)) is not None:
            return results
        inputs = tuple(a if isinstance(a, Tensor) else None for a in arguments)
        if self.pair is None:
            refuse_tangents(self.name, *inputs)
        primals, tangents = split_tangents(*inputs)
        direction = "tangent" if tangents else direction_of(inputs)
        if self._why_not(direction, arguments, tangents) is not None:
            return drop_tangent_graph(self.reference(*arguments))
        if tangents is None:
            return self._first(self.plain(*arguments))
        count = self.moving
        results = self.pair(*primals[:count], *tangents[:count], *arguments[count:])
        duals = tuple(map(make_dual, results[: self.outputs], results[self.outputs :]))
        return self._first(duals)

    def _straight(self, device: str, arguments: tuple):
        """Results of the kernel called at once; None where no kernel takes the arguments."""
        first = arguments[0]
        records = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        direction = "backward" if records else "forward"
        if _table.recall(self.name, direction, device, first.dtype).why_not(first) is not None:
            return None
        if self.refuses is not None and self.refuses(*arguments) is not None:
            return None
        if records:
            if _wants_gradient([arguments[i] for i in self.constant]):
                return None
            return self._first(self.plain.direct(*arguments))
        if self.alone is not None:
            return self.alone(*arguments)
        return self._first(self.plain.implementation(*arguments))

    def beside(self, primals: tuple, tangents: tuple, *others: object) -> tuple | None:
        """Results of `pair` for values with tangents beside them; None where no kernel runs."""
        arguments = (*primals, *tangents, *others)
        device = plain_device(*[a for a in arguments if isinstance(a, Tensor)])
        if device is None:
            if why_not(self.name, *primals, direction="tangent") is not None:
                return None
            return self.pair(*arguments)
        if _table.recall(self.name, "tangent", device, primals[0].dtype).why_not(primals[0]):
            return None
        return self.pair.direct(*arguments)

    def _first(self, results):
        if not isinstance(results, tuple):
            return results
        return results[0] if self.outputs == 1 else results[: self.outputs]

    def _why_not(self, direction: str, arguments: tuple, tangents: tuple | None) -> str | None:
        inputs = [a for a in arguments if isinstance(a, Tensor)]
        reason = why_not(self.name, *inputs, direction=direction)
        if reason is None and self.refuses is not None:
            reason = self.refuses(*arguments)
        constants = [arguments[i] for i in self.constant]
        if reason is None and torch.is_grad_enabled() and _wants_gradient(constants):
            reason = f"the kernel of {self.name} has no gradient for one of the inputs"
        if reason is None and tangents and any(t is not None for t in tangents[self.moving :]):
            reason = f"the kernel of {self.name} has no tangent for one of the inputs"
        return reason


def _wants_gradient(tensors: Sequence[object]) -> bool:
    # A generator would be no frame that dynamo can take over.
    for tensor in tensors:  # noqa: SIM110
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            return True
    return False


def direction_of(inputs: Sequence[Tensor | None]) -> str:
    """Of a call without tangents, as the rules of the table name it."""
    records = torch.is_grad_enabled() and _wants_gradient(inputs)
    return "backward" if records else "forward"


def why_not(name: str, *tensors: Tensor, direction: str = "forward") -> str | None:
    """Reason why no kernel of `name` takes these tensors; None when one does.

    They agree in device, and in dtype where the kernel demands it: callers promote before they ask.
    """
    transforms = _transforms()
    for transform in (TransformType.Vmap, TransformType.Grad):
        if transform in transforms:
            return f"torch.func.{transform.name.lower()} has no rule for the kernel"
    if is_mapped(*tensors):
        return "torch.func.vmap has no rule for the kernel"
    first = tensors[0]
    choose = _table.choose if torch.compiler.is_compiling() else _table.recall
    return choose(name, direction, first.device.type, first.dtype).why_not(first)


def _transforms() -> tuple[TransformType, ...]:
    """The torch.func transforms in force, outermost first; () inside a graph being compiled."""
    if torch.compiler.is_compiling():
        return ()
    return tuple([level.key() for level in torch._C._functorch.get_interpreter_stack() or ()])


def has_transform(*kinds: TransformType) -> bool:
    return any(kind in kinds for kind in _transforms())


def _refuse_second_tangent() -> None:
    # Tangents are detached, which would take an outer jvp's tangent away without a word.
    if _transforms().count(TransformType.Jvp) > 1:
        raise NotImplementedError(
            "the tangents of tim.ops are not differentiable: nested torch.func.jvp (second "
            "derivatives) is not supported"
        )


def guard_backward(what: str, output: Tensor) -> Tensor:
    """Make the backward pass of a dual number raise when it meets tangents (forward-over-reverse).

    For outputs whose gradient is PyTorch's own. Under torch.func the transforms see to it.
    """
    if output.requires_grad and torch._C._functorch.peek_interpreter_stack() is None:
        output.register_hook(lambda gradient: refuse_tangents(f"the backward of {what}", gradient))
    return output


@functools.cache
def _kernel(name: str, device_type: str) -> Callable:
    return getattr(_extension.kernels(device_type), name)


def launch(name: str, anchor: Tensor, *arguments: object) -> None:
    """Call kernel `name` on the device of `anchor`: torch's threads, or its current stream."""
    if anchor.is_cpu:
        _kernel(name, "cpu")(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(anchor.device):
            _kernel(name, "cuda")(*arguments, torch.cuda.current_stream().cuda_stream)


#: Devices whose kernels are given memory for what they keep between two launches; elsewhere they
#: find their own.
WITH_SCRATCH = {"cuda"}


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised and contiguous, whatever the strides of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def pointer(tensor: Tensor | None) -> int:
    """Address for the extension, 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def float32(tensor: Tensor) -> Tensor:
    """Contiguous and in float32, for tables and weights that the kernels read in this form."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def split_tangents(
    *tensors: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...] | None]:
    """Primals and tangents of `tensors`; (tensors, None) when none carries a tangent.

    Of tensors that torch.func.vmap maps over, PyTorch does not tell: references run on them, and
    their tangents are those of its own operations.
    """
    level = forward_ad._current_level
    if level < 0 or is_mapped(*tensors):
        return tensors, None
    unpack = _unpack_traced if torch.compiler.is_compiling() else _unpack
    primals, tangents = unpack(tensors, level)
    for tangent in tangents:
        if tangent is not None:
            _refuse_second_tangent()
            return tuple(primals), tuple(tangents)
    return tensors, None


def _unpack_traced(tensors: Sequence[Tensor | None], level: int) -> tuple[list, list]:
    duals = [
        (None, None) if tensor is None else forward_ad.unpack_dual(tensor, level=level)
        for tensor in tensors
    ]
    return [primal for primal, _ in duals], [tangent for _, tangent in duals]


def _unpack(tensors: Sequence[Tensor | None], level: int) -> tuple[list, list]:
    functorch = torch._C._functorch
    transformed = functorch.peek_interpreter_stack() is not None
    primals, tangents = [], []
    for tensor in tensors:
        # torch.func.jvp wraps all tensors to which it gives tangents.
        if tensor is None or (transformed and not functorch.is_gradtrackingtensor(tensor)):
            primal, tangent = tensor, None
        else:
            primal, tangent = _unpack_dual(tensor, level=level)
        primals.append(primal)
        tangents.append(tangent)
    return primals, tangents


def drop_tangent_graph(outputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Outputs of a reference with the autograd graph of their tangents cut off.

    Kernels keep no graph for tangents, so neither do references: the objective never differentiates
    a tangent, and the graph would double the memory of the forward pass.
    """
    if forward_ad._current_level < 0:
        return outputs
    if isinstance(outputs, tuple):
        return tuple(drop_tangent_graph(output) for output in outputs)  # type: ignore[misc]
    if is_mapped(outputs):
        return outputs
    primal, tangent = forward_ad.unpack_dual(outputs)
    if tangent is None:
        return outputs
    _refuse_second_tangent()
    return forward_ad.make_dual(guard_backward("a reference", primal), tangent.detach())


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return forward_ad.make_dual(primal, tangent)
    return _make_dual(primal, tangent, level=forward_ad._current_level)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in their common dtype: under autocast the residual stream is wider than updates."""
    dtype = tensors[0].dtype
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which PyTorch's matrix products take `tensor`: autocast's, where it is on."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or tensor.is_meta or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def check_tensors(**tensors: Tensor) -> None:
    """TypeError unless every argument is a floating-point tensor, ValueError if devices differ."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
        if tensor.dtype.itemsize == 1:
            raise TypeError(f"{name} must have at least 16 bits per number, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
        if device is not None and tensor.device != device:
            raise ValueError(
                f"{name} must be on {device} like the other inputs, got {tensor.device}"
            )
        device = tensor.device


def check_eps(eps: float) -> None:
    """TypeError unless it is a number, ValueError unless it is finite and at least 0."""
    if type(eps) is float and 0 <= eps < math.inf:
        return
    check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """ValueError unless `tensor` has shape `expected`; `meaning` spells the shape in symbols."""
    if tensor.shape != expected:
        raise ValueError(
            f"{name} must have shape {meaning} = {list(expected)}, got {list(tensor.shape)}"
        )


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension without parameters, for references."""
    if x.dtype != torch.float16:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    # The cube of 1 / std in PyTorch's forward-mode rule overflows float16 for small rows.
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
