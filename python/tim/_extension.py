"""The compiled extension `tim._C`, or the reason why it is not there.

Nothing but `tim.ops` and `tim.info` imports this module. Importing it never fails.
"""

from __future__ import annotations

import json
from importlib import resources
from types import ModuleType

# torch comes first on purpose: the extension's kernels then resolve to torch's OpenMP runtime, and
# both share one thread pool instead of two that fight for the same cores.
import torch  # noqa: F401

# Not a path beside this file: an editable install keeps sources and build products apart.
_BUILD_INFO = resources.files("tim").joinpath("_build_info.json")

C: ModuleType | None
REASON: str | None
try:
    from tim import _C as C  # type: ignore[no-redef]

    REASON = None
except ImportError as error:
    C = None
    REASON = f"tim._C cannot be imported: {error}"


def build_info() -> dict:
    """What the install recorded of the build: compiler, instruction sets, CUDA, reason, remedy.

    Returns an empty mapping when the package runs from a source tree that was never built.
    """
    if C is not None:
        return dict(C.build_info())
    if _BUILD_INFO.is_file():
        return json.loads(_BUILD_INFO.read_text())
    return {}


def kernels(device_type: str) -> ModuleType | None:
    """The submodule with the kernels for "cpu" or "cuda", or None when it was not built."""
    return None if C is None else getattr(C, device_type, None)
