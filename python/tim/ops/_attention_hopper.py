"""Which of attention's kernels run in their versions for Hopper (compute capability 9.0).

Those versions (wgmma, TMA) call the kernels for all GPUs by themselves where they cannot run: on
other devices, for packed sequences, for addresses and strides that are no multiples of 16 bytes.

TIM_HOPPER is one of

    auto   those that were measured to be faster (the default)
    on     all there are
    off    none
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tim.ops._table import has_kernel

#: The versions for Hopper by the names of the kernels for all GPUs.
VERSIONS = {
    "attention": "attention_hopper",
    "attention_tangent": "attention_tangent_hopper",
    "attention_dual": "attention_dual_hopper",
}
#: Head dimensions for which the version of attention_dual has registers enough. For others it calls
#: the kernel for all GPUs, and the forward pass and the tangent one after the other may be better.
DUAL_WIDTHS = (64, 72)
#: Kernels whose version for Hopper was measured to be faster. No GPU has run them yet.
FASTER: tuple[str, ...] = ()
CHOICES = ("auto", "on", "off")


def parse(text: str) -> dict[str, str]:
    """The versions in force, by a value of TIM_HOPPER. Raises ValueError."""
    if text not in CHOICES:
        raise ValueError(f"TIM_HOPPER must be one of {', '.join(CHOICES)}, got {text!r}")
    chosen = VERSIONS if text == "on" else FASTER if text == "auto" else ()
    return {name: VERSIONS[name] for name in chosen}


_versions = parse(os.environ.get("TIM_HOPPER") or "auto")


@contextmanager
def hopper(text: str) -> Iterator[None]:
    """Choose inside this context as the value `text` of TIM_HOPPER does."""
    global _versions
    before = _versions
    _versions = parse(text)
    try:
        yield
    finally:
        _versions = before


def version_of(name: str, device_type: str) -> str:
    """The name of the kernel to launch for kernel `name`."""
    version = _versions.get(name)
    return name if version is None or not has_kernel(version, device_type) else version
