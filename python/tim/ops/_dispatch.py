"""What all operations share: tangents, the choice between kernel and reference, registration.

Two rules keep this package's worst bug, a silent zero tangent, out:

* Bare `torch.ops.tim.*` operations are private, and raise when they meet a forward-mode tangent,
  which PyTorch would drop without an error. The public function looks for tangents first and calls
  the pair operation when it finds any.
* A backward formula that meets a tangent (forward-over-reverse) raises.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch._library import autograd as autograd_rules
from torch.autograd import forward_ad

from tim import _extension

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
#: Longest rows, the last dimension of the first tensor, that kernels hold in registers on a GPU.
CUDA_WIDTHS = {"adaln": 8192, "qk_norm_rope": 256}
#: Operations with kernels, in the order in which a transformer block and the objective meet them.
KERNEL_OPS = ("interpolate", "adaln", "qk_norm_rope", "swiglu", "transition_loss")

library = torch.library.Library("tim", "DEF")
_kernels_enabled = os.environ.get("TIM_KERNELS", "auto").lower() != "off"


@functools.cache
def has_kernel(name: str, device_type: str) -> bool:
    return hasattr(_extension.kernels(device_type), name)


@contextmanager
def reference_only() -> Iterator[None]:
    """Run every operation's PyTorch reference inside this context, as `TIM_KERNELS=off` does."""
    global _kernels_enabled
    before, _kernels_enabled = _kernels_enabled, False
    try:
        yield
    finally:
        _kernels_enabled = before


def backends(name: str) -> tuple[str, ...]:
    """Device types for which the extension holds kernels of operation `name`."""
    return tuple(device for device in ("cpu", "cuda") if has_kernel(name, device))


def why_not(name: str, *tensors: Tensor) -> str | None:
    """Reason why no kernel of `name` can take these tensors; None when one can.

    The tensors must agree in dtype and device; callers promote before they ask.
    """
    if not _kernels_enabled:
        return "TIM_KERNELS=off (or reference_only) is in force"
    for transform in (TransformType.Vmap, TransformType.Grad):
        if transform in _transforms():
            return f"torch.func.{transform.name.lower()} has no rule for the kernel"
    first = tensors[0]
    device = first.device.type
    dtype = first.dtype
    if not has_kernel(name, device):
        return _extension.REASON or f"the extension has no {device} kernel for {name}"
    if dtype not in KERNEL_DTYPES[device]:
        return f"{device} kernels take {_names(KERNEL_DTYPES[device])}, got {dtype}"
    if device == "cuda" and first.shape[-1] > CUDA_WIDTHS.get(name, math.inf):
        return (
            f"the cuda kernel of {name} takes rows up to {CUDA_WIDTHS[name]}, got {first.shape[-1]}"
        )
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device != first.device:
            return f"inputs differ in dtype or device: {dtype} and {tensor.dtype}"
        if torch._C._functorch.is_batchedtensor(tensor):
            return "torch.func.vmap has no rule for the kernel"
    return None


def _transforms() -> tuple[TransformType, ...]:
    """The torch.func transforms in force, outermost first; () inside a graph being compiled."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return ()
    return tuple(level.key() for level in torch._C._functorch.get_interpreter_stack())


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


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@functools.cache
def _kernel(name: str, device_type: str) -> Callable:
    return getattr(_extension.kernels(device_type), name)


def launch(name: str, anchor: Tensor, *arguments: object) -> None:
    """Call kernel `name` on the device of `anchor`: torch's threads, or its current stream."""
    device = anchor.device
    kernel = _kernel(name, device.type)
    if device.type == "cpu":
        kernel(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            kernel(*arguments, torch.cuda.current_stream().cuda_stream)


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised and contiguous, whatever the strides of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def pointer(tensor: Tensor | None) -> int:
    """Address for the extension, 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def split_tangents(
    *tensors: Tensor,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...] | None]:
    """Primals and tangents of `tensors`; (tensors, None) when none carries a tangent."""
    if forward_ad._current_level < 0:
        return tensors, None
    duals = [forward_ad.unpack_dual(tensor) for tensor in tensors]
    if all(dual.tangent is None for dual in duals):
        return tensors, None
    _refuse_second_tangent()
    return tuple(d.primal for d in duals), tuple(d.tangent for d in duals)


def refuse_tangents(what: str, *arguments: object) -> None:
    """Raise NotImplementedError when a tensor carries a tangent that `what` would silently drop."""
    if forward_ad._current_level < 0:
        return
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"{what} has no forward-mode rule: tim.ops have first derivatives only"
            )


def drop_tangent_graph(outputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Outputs of a reference with the autograd graph of their tangents cut off.

    Kernels keep no graph for tangents, so neither do references: the objective never differentiates
    a tangent, and the graph would double the memory of the forward pass.
    """
    if forward_ad._current_level < 0:
        return outputs
    if isinstance(outputs, tuple):
        return tuple(drop_tangent_graph(output) for output in outputs)  # type: ignore[misc]
    primal, tangent = forward_ad.unpack_dual(outputs)
    if tangent is None:
        return outputs
    _refuse_second_tangent()
    return forward_ad.make_dual(guard_backward("a reference", primal), tangent.detach())


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(primal, tangent)


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """Define the opaque operation `schema` (private) and return it as a callable.

    Without `backward`, differentiating the operation raises: no rule must not look like zero.
    """
    name = schema.split("(", 1)[0]
    library.define(schema)
    # Kernels run below the compiler: without this, dynamo traces the body of an opaque operation.
    implementation = torch._disable_dynamo(implementation)
    library.impl(name, implementation, "CPU")
    library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"tim::{name}", fake, lib=library)

    def no_rule(ctx: object, *gradients: object) -> None:
        raise NotImplementedError(f"tim::{name} is not differentiable")

    operation = getattr(torch.ops.tim, name).default
    # What torch.library.register_autograd does, with one check in front: its own kernel lets
    # tangents pass and vanish, wherever they come from (a function compiled elsewhere, say).
    rules = autograd_rules.Info(backward or no_rule, setup_context)
    differentiable = autograd_rules.make_autograd_impl(operation, rules)

    def without_tangents(keyset: object, *arguments: object) -> object:
        refuse_tangents(f"torch.ops.tim.{name}", *arguments)
        return differentiable(keyset, *arguments)

    library.impl(name, without_tangents, "Autograd", with_keyset=True)
    return operation


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in their common dtype: under autocast the residual stream is wider than updates."""
    dtype = tensors[0].dtype
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def check_tensors(**tensors: Tensor) -> None:
    """TypeError unless every argument is a floating-point tensor, ValueError if devices differ."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
        if device is not None and tensor.device != device:
            raise ValueError(
                f"{name} must be on {device} like the other inputs, got {tensor.device}"
            )
        device = tensor.device


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """ValueError unless `tensor` has shape `expected`; `meaning` spells the shape in symbols."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have shape {meaning} = {list(expected)}, got {list(tensor.shape)}"
        )


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension without parameters, for references."""
    if x.dtype != torch.float16:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    # The cube of 1 / std in PyTorch's forward-mode rule overflows float16 for small rows.
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
