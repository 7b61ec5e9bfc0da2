"""Arguments that an operation has checked before, recognised in half a microsecond.

Checking shapes and asking PyTorch for dispatch keys, tensor by tensor, takes longer than a kernel
on few elements. The guards of torch.compile compare all of it in one compiled call: class, dispatch
keys of the tensor as the thread changes them, dtype, device, requires_grad, sizes and strides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._dynamo import guards

from tim.ops._opaque import thread_is_free

#: The guards are no public interface. Where they behave in another way, every call is checked.
_Guards = getattr(guards, "TensorGuards", None)


class Seen:
    """What `plain_device` said of the tensors of earlier calls that passed every check."""

    LIMIT = 4  #: kinds of calls that are kept; a failing guard costs 0.2 us

    def __init__(self) -> None:
        self._kinds: tuple[tuple[Callable, str], ...] = ()

    def recall(self, *tensors: object) -> str | None:
        """The device noted for tensors like these; None while something wants to see operations."""
        if thread_is_free():
            for check, device in self._kinds:
                if check(*tensors):
                    return device
        return None

    def note(self, device: str | None, *tensors: Tensor) -> None:
        """Keep what `plain_device` says of tensors like these, which passed every check."""
        if device is None or _Guards is None:
            return
        guard = _Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        if guard.check(*tensors):  # False where one tensor is given twice
            self._kinds = ((guard.check, device), *self._kinds[: self.LIMIT - 1])


def _guards_compare_what_we_need() -> bool:
    """Whether guards tell apart what this module says they do; asked once, when it is imported."""
    x = torch.empty(2, 3)
    try:
        check = _Guards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        others = (
            x.double(),
            x[:1],
            x.new_empty(3, 2).mT,
            torch._neg_view(x),
            x.to("meta"),
            torch.nn.Parameter(x),
            x.clone().requires_grad_(),
            x.to_sparse(),
            None,
        )
        return check(torch.zeros(2, 3)) and not any(map(check, others))
    except (TypeError, RuntimeError):
        return False


if not _guards_compare_what_we_need():
    _Guards = None
