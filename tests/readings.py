"""Whatever would make the host wait for the device, were the tensors on one, made an error."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Ways of Python to look at the value of a tensor; not all of them pass the dispatcher.
READING_METHODS = (
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__",
    "__repr__", "__format__", "__contains__",
)  # fmt: skip
#: Operations whose result, or its shape, the host has to wait for.
READING_OPERATIONS = (
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "equal", "allclose",
    "masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount",
)  # fmt: skip


class ReadBack(AssertionError):
    pass


class _RefuseReading(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.overloadpacket.__name__
        keywords = keywords or {}
        masks = [
            index
            for index in (arguments[1] if name in ("index", "index_put_") else ())
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        ]
        if name in READING_OPERATIONS or masks:
            raise ReadBack(name)
        if (
            name == "_to_copy"
            and keywords.get("device", arguments[0].device) != arguments[0].device
        ):
            raise ReadBack(f"{name} to {keywords['device']}")
        if name == "copy_" and arguments[0].device != arguments[1].device:
            raise ReadBack(f"{name} from {arguments[1].device}")
        return operation(*arguments, **keywords)


@contextmanager
def no_reading() -> Iterator[None]:
    """ReadBack for whatever would make the host wait for the device, were the tensors on one."""

    def refuse(name: str):
        def method(*_: object, **__: object):
            raise ReadBack(name)

        return method

    with ExitStack() as stack:
        for name in READING_METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, refuse(name)))
        stack.enter_context(_RefuseReading())
        yield
