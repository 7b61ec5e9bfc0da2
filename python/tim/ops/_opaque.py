"""Opaque operations of torch.library, and the short way past PyTorch's dispatcher to their kernels.

The way through the dispatcher costs tens of microseconds in Python, more under torch.func.jvp. It
is needed when something wants to see the operation: a compiler, a tracer, a mode, a profiler, a
transform, a tensor subclass. Where nothing does, which the dispatch keys of the thread and of the
arguments tell, the implementation is called at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._C import _functorch as functorch
from torch._C._dynamo import eval_frame
from torch._library import autograd as autograd_rules
from torch.autograd import forward_ad

library = torch.library.Library("tim", "DEF")
_keys = torch._C._dispatch_keys
_keys_in_force = torch._C._dispatch_tls_local_include_set
#: What compiles the next Python frame: inside of torch.compile, and after a graph break too.
_compiler_of_frames = getattr(eval_frame, "get_eval_frame_callback", lambda: None)


def _key_set(*keys: str) -> int:
    result = DispatchKeySet(getattr(DispatchKey, keys[0]))
    for key in keys[1:]:
        result = result | DispatchKeySet(getattr(DispatchKey, key))
    return result.raw_repr()


#: Keys in force of a thread in which nothing is: outside and inside of inference mode.
_IDLE = frozenset({_key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")})
#: Keys of ordinary dense tensors, made outside and inside of inference mode. Everything else, say a
#: subclass, a wrapper of a transform or a lazily negated view, has other keys.
_DENSE = {
    device.lower(): frozenset(
        {
            _key_set(device, f"Autograd{device}", "ADInplaceOrView", f"Autocast{device}"),
            _key_set(device, f"Autocast{device}"),
        }
    )
    for device in ("CPU", "CUDA")
}
_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def plain_device(*tensors: object) -> str | None:
    """Device type of ordinary dense floating-point tensors while nothing wants to see operations on
    them: no compiler, transform, mode, profiler or forward-mode derivative. None in other cases.
    """
    if not thread_is_free():
        return None
    try:
        if not _FLOATS.issuperset([tensor.dtype for tensor in tensors]):
            return None
        found = {_keys(tensor).raw_repr() for tensor in tensors}
    except (AttributeError, TypeError):  # no tensor
        return None
    if _DENSE["cpu"].issuperset(found):
        return "cpu"
    if _DENSE["cuda"].issuperset(found) and len({tensor.device for tensor in tensors}) == 1:
        return "cuda"
    return None


def thread_is_free() -> bool:
    """Nothing would see to operations but autograd."""
    return forward_ad._current_level < 0 and _thread_is_idle()


def _thread_is_idle() -> bool:
    """Nothing would see to operations but autograd and, if a level is open, forward mode."""
    return (
        not torch.compiler.is_compiling()
        and _keys_in_force().raw_repr() in _IDLE
        and _compiler_of_frames() is None
        and not torch.autograd._profiler_enabled()
    )


def is_mapped(*arguments: object) -> bool:
    """Whether torch.func.vmap maps over one of the arguments: no operation of ours takes those."""
    # A generator would be no frame that dynamo can take over.
    for argument in arguments:
        if isinstance(argument, Tensor) and functorch.is_batchedtensor(argument):
            return True
    return False


def refuse_tangents(what: str, *arguments: object) -> None:
    """Raise NotImplementedError when a tensor carries a tangent that `what` would silently drop."""
    if forward_ad._current_level < 0:
        return
    for argument in arguments:
        if not isinstance(argument, Tensor) or is_mapped(argument):
            continue
        if forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"{what} has no forward-mode rule: tim.ops have first derivatives only"
            )


class Opaque:
    """An operation of torch.library. To be called with tensors whose tangents were taken off."""

    def __init__(
        self,
        bare: Callable,
        implementation: Callable,
        backward: Callable,
        setup: Callable | None,
        takes_lists: bool,
    ) -> None:
        self.bare = bare  #: the operation itself: the long way, which refuses tangents
        self.takes_lists = takes_lists  #: autograd.Function does not see tensors in lists
        self.implementation = implementation

        class Recorded(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                results = implementation(*arguments)
                if setup is not None:
                    setup(ctx, arguments, results)
                return results

        Recorded.backward = staticmethod(backward)
        self._apply = Recorded.apply

    def __call__(self, *arguments: object):
        if self.takes_lists or torch.compiler.is_compiling():
            return self.bare(*arguments)
        if _thread_is_idle():
            if _dense(arguments):
                return self.direct(*arguments)
        elif (level := _level_of_single_jvp()) is not None:
            results = self._below(level, arguments)
            if results is not None:
                return results
        return self.bare(*arguments)

    def direct(self, *arguments: object):
        """The short way, recorded for autograd where that is due."""
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self._apply(*arguments)
        return self.implementation(*arguments)

    def _below(self, level: int, arguments: tuple):
        """What PyTorch does for an autograd.Function under torch.func.jvp: run it one level below.

        None where the short way is closed there too. Of the wrappers that torch.func.jvp puts round
        tensors only values are read here; their tangents are among the arguments.
        """
        inner = tuple(
            functorch._unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in arguments
        )
        saved = functorch.pop_dynamic_layer_stack()
        try:
            if not (_thread_is_idle() and _dense(inner)):
                return None
            results = self.direct(*inner)
        finally:
            functorch.push_dynamic_layer_stack(saved)
        if isinstance(results, Tensor):
            return functorch._wrap_for_grad(results, level)
        return tuple(functorch._wrap_for_grad(result, level) for result in results)


def _dense(arguments: tuple) -> bool:
    found = {_keys(a).raw_repr() for a in arguments if isinstance(a, Tensor)}
    return any(keys.issuperset(found) for keys in _DENSE.values())


def _level_of_single_jvp() -> int | None:
    """The level of torch.func.jvp where it is the only transform in force."""
    stack = functorch.get_interpreter_stack()
    if stack is None or len(stack) != 1 or stack[0].key() != functorch.TransformType.Jvp:
        return None
    return stack[0].level()


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Opaque:
    """Define the opaque operation `schema` (private) and return it as a callable.

    Without `backward`, differentiating the operation raises: no rule must not look like zero.
    """
    name = schema.split("(", 1)[0]
    library.define(schema)
    # Kernels run below the compiler: without this, dynamo traces the body of an opaque operation.
    hidden = torch._disable_dynamo(implementation)
    library.impl(name, hidden, "CPU")
    library.impl(name, hidden, "CUDA")
    torch.library.register_fake(f"tim::{name}", fake, lib=library)

    def no_rule(ctx: object, *gradients: object) -> None:
        raise NotImplementedError(f"tim::{name} is not differentiable")

    bare = getattr(torch.ops.tim, name).default
    # What torch.library.register_autograd does, with one check in front: its own kernel lets
    # tangents pass and vanish, wherever they come from (a function compiled elsewhere, say).
    rules = autograd_rules.Info(backward or no_rule, setup_context)
    differentiable = autograd_rules.make_autograd_impl(bare, rules)

    def without_tangents(keyset: object, *arguments: object) -> object:
        refuse_tangents(f"torch.ops.tim.{name}", *arguments)
        return differentiable(keyset, *arguments)

    library.impl(name, without_tangents, "Autograd", with_keyset=True)
    takes_lists = "Tensor[]" in schema
    return Opaque(bare, implementation, backward or no_rule, setup_context, takes_lists)
