"""Inputs of the attention kernels, their exact results, and calls of the kernels themselves.

The kernels are called through their bindings, below the choice between back ends in tim.ops, on the
emulator or, in tests marked so, on a GPU.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from contract import assert_close
from emulated import extent, module
from torch import Tensor

from tim import _extension
from tim.ops._dispatch import DTYPE_CODES
from tim.ops.attention import attention_reference

HEAD_DIMS = (64, 72, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)
#: Kernels of one signature: for all GPUs, and for those of compute capability 9.0.
FORWARDS = ("attention", "attention_hopper")
TANGENTS = ("attention_tangent", "attention_tangent_hopper")
#: Small, whose blocks have as many rows as the warps hold; large, where tokens are shared out among
#: them; one with little shared memory.
DEVICES = {
    "small": {"multiprocessors": 1},
    "large": {"multiprocessors": 132},
    "little memory": {"multiprocessors": 1, "shared_bytes": 99 * 1024},
}
#: Which of q, k and v have a tangent.
SUBSETS = tuple(s for s in itertools.product((True, False), repeat=3) if any(s))
Offsets = tuple[tuple[int, ...], tuple[int, ...]]


def packed_qkv(x: Tensor) -> Tensor:
    """The same values inside of [B, N, 3, H, D], as a projection leaves them."""
    batch, tokens, heads, head_dim = x.shape
    memory = x.new_full((batch, tokens, 3, heads, head_dim), torch.nan)
    memory[:, :, 1] = x
    return memory[:, :, 1]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def offset(x: Tensor) -> Tensor:
    """One element behind an address of which 16 is a divisor."""
    memory = x.new_empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


def odd_strides(x: Tensor) -> Tensor:
    """Tokens an odd number of elements apart."""
    batch, tokens, heads, head_dim = x.shape
    memory = x.new_full((batch, tokens, heads * head_dim + 1), torch.nan)
    memory[..., :-1] = x.flatten(2)
    return memory[..., :-1].unflatten(2, (heads, head_dim))


def repeated(x: Tensor) -> Tensor:
    """The first sample's values for all, with a stride of zero."""
    return x[:1].expand(x.shape)


LAYOUTS = {
    "qkv": packed_qkv,
    "heads first": heads_first,
    "offset": offset,
    "odd strides": odd_strides,
    "repeated": repeated,
}


@dataclass
class Case:
    """Tensors [B, N, H, D] in one half precision, and packed sequences if there are offsets."""

    q: Tensor
    k: Tensor
    v: Tensor
    t_q: Tensor | None
    t_k: Tensor | None
    t_v: Tensor | None
    scale: float
    offsets: Offsets | None = None
    #: Upper bounds of the lengths of packed sequences, for queries and keys; None: not known.
    longest: tuple[int, int] | None = None
    dout: Tensor | None = None
    results: dict[str, Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def tangents(self) -> tuple[Tensor | None, ...]:
        return self.t_q, self.t_k, self.t_v

    def spans(self) -> Iterator[tuple[slice, slice]]:
        if self.offsets is None:
            yield slice(None), slice(None)
            return
        pairs = zip(*map(itertools.pairwise, self.offsets), strict=True)
        for (a, b), (c, d) in pairs:
            yield slice(a, b), slice(c, d)


def make_case(
    head_dim: int,
    dtype: torch.dtype,
    n: int,
    m: int | None = None,
    *,
    batch: int = 1,
    heads: int = 1,
    subset: tuple[bool, bool, bool] = (True, True, True),
    size: float = 1.0,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    offsets: Offsets | None = None,
    longest: tuple[int, int] | None = None,
    seed: int = 0,
) -> Case:
    """Random tensors; `size` multiplies q and so the scores."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int, factor: float = 1.0) -> Tensor:
        x = torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=torch.float64)
        return layout((x * factor).to(dtype))

    m = n if m is None else m
    inputs = draw(n, size), draw(m), draw(m)
    tangents = [
        draw(tokens) if there else None for tokens, there in zip((n, m, m), subset, strict=True)
    ]
    dout = draw(n).contiguous()
    scale = 1 / math.sqrt(head_dim)
    return Case(*inputs, *tangents, scale, offsets, longest, dout)


def exact(case: Case) -> dict[str, Tensor]:
    """out, lse and their tangents, and the gradients for dout, all in float64."""
    q, k, v, dout = (x.double() for x in (*case.inputs, case.dout))
    t_q, t_k, t_v = (
        torch.zeros_like(x) if t is None else t.double()
        for x, t in zip((q, k, v), case.tangents, strict=True)
    )
    results = {
        name: torch.zeros_like(x) for name, x in zip(("dq", "dk", "dv"), (q, k, v), strict=True)
    }
    results |= {name: torch.zeros_like(q) for name in ("out", "t_out")}
    results["t_lse"] = q.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    results["lse"] = torch.full_like(results["t_lse"], -math.inf)
    for rows, columns in case.spans():
        part = [x[:, rows] for x in (q, t_q, dout)] + [x[:, columns] for x in (k, v, t_k, t_v)]
        q_, t_q_, dout_, k_, v_, t_k_, t_v_ = (x.transpose(1, 2) for x in part)
        if not k_.shape[2]:
            continue
        scores = q_ @ k_.mT * case.scale
        p = scores.softmax(-1)
        g = p * (t_q_ @ k_.mT + q_ @ t_k_.mT) * case.scale
        out = p @ v_
        dp = dout_ @ v_.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * case.scale
        columnwise = {"dk": ds.mT @ q_, "dv": p.mT @ dout_}
        rowwise = {"out": out, "t_out": g @ v_ - g.sum(-1, keepdim=True) * out + p @ t_v_}
        for name, value in (rowwise | {"dq": ds @ k_}).items():
            results[name][:, rows] = value.transpose(1, 2)
        for name, value in columnwise.items():
            results[name][:, columns] = value.transpose(1, 2)
        results["lse"][..., rows] = scores.logsumexp(-1)
        results["t_lse"][..., rows] = g.sum(-1)
    return results


def yardstick(case: Case, direction: str) -> dict[str, Tensor]:
    """The same by the reference in the dtype of the inputs, for one direction."""
    results = {name: value.to(case.q.dtype) for name, value in exact(case).items()}
    for rows, columns in case.spans():
        q, k, v = case.q[:, rows], case.k[:, columns], case.v[:, columns]
        if not q.numel() or not k.numel():
            continue

        def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * case.scale
            return attention_reference(q, k, v, case.scale), scores.logsumexp(-1)

        if direction == "backward":
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            gradients = torch.autograd.grad(reference(*leaves)[0], leaves, case.dout[:, rows])
            for name, part, value in zip(
                ("dq", "dk", "dv"), (rows, columns, columns), gradients, strict=True
            ):
                results[name][:, part] = value
            continue
        spans = (rows, columns, columns)
        tangents = tuple(
            torch.zeros_like(x) if t is None else t[:, part]
            for x, t, part in zip((q, k, v), case.tangents, spans, strict=True)
        )
        (out, lse), (t_out, t_lse) = torch.func.jvp(reference, (q, k, v), tangents)
        results["out"][:, rows], results["t_out"][:, rows] = out, t_out
        results["lse"][..., rows], results["t_lse"][..., rows] = lse, t_lse
    return results


class Emulator:
    """Calls kernels with tensors of the CPU; they may touch nothing but these.

    The properties of the device decide how many rows a block has, and how much shared memory.
    """

    device = "cpu"

    def __init__(self, **properties: int) -> None:
        self.properties = properties

    def call(self, name: str, *arguments: object) -> None:
        emulator = module()
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        emulator.set_device(**self.properties)
        emulator.set_memory([(t.data_ptr(), extent(t)) for t in tensors])
        try:
            getattr(emulator, name)(*map(plain, arguments), 0)
        finally:
            emulator.set_device()
            emulator.set_memory([])


class Gpu:
    device = "cuda"

    def call(self, name: str, *arguments: object) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        getattr(_extension.C.cuda, name)(*map(plain, arguments), stream)
        torch.cuda.synchronize()


def plain(argument: object) -> object:
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def run(machine: Emulator | Gpu, name: str, case: Case) -> dict[str, Tensor]:
    """What a kernel writes. The tangent and the backward get out and lse rounded from float64."""
    batch, n, heads, head_dim = case.q.shape
    m = case.k.shape[1]

    def there(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        to = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=machine.device)
        return x if machine.device == "cpu" else to.copy_(x)

    q, k, v, t_q, t_k, t_v, dout = map(there, (*case.inputs, *case.tangents, case.dout))

    def poisoned(*shape: int, dtype: torch.dtype = case.q.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=machine.device)

    def strides(*tensors: Tensor | None) -> list[tuple[int, ...]]:
        return [(0, 0, 0) if x is None else x.stride()[:3] for x in tensors]

    offsets = [None, None]
    sequences, longest = 0, (n, m)
    if case.offsets is not None:
        offsets = [there(torch.tensor(o, dtype=torch.int32)) for o in case.offsets]
        sequences, longest = len(case.offsets[0]) - 1, case.longest or (n, m)
    sizes = (
        batch, n, m, heads, head_dim, sequences, *longest, case.scale, DTYPE_CODES[case.q.dtype]
    )  # fmt: skip
    results = {"out": poisoned(*q.shape), "lse": poisoned(batch, heads, n, dtype=torch.float32)}
    if name in (*TANGENTS, "attention_backward"):
        truth = exact(case)
        given = there(truth["out"].to(q.dtype).contiguous()), there(truth["lse"].float())
    if name in FORWARDS:
        machine.call(
            name, q, k, v, *offsets, results["out"], results["lse"], *strides(q, k, v), *sizes
        )
        return results
    if name == "attention_backward":
        gradients = {key: poisoned(*x.shape) for key, x in (("dq", q), ("dk", k), ("dv", v))}
        delta = poisoned(batch, heads, n, dtype=torch.float32)
        machine.call(
            name, dout, q, k, v, *given, *offsets, delta, *gradients.values(),
            *strides(q, k, v), *sizes,
        )  # fmt: skip
        return gradients
    tangents = {"t_out": poisoned(*q.shape), "t_lse": torch.empty_like(results["lse"])}
    tangents["t_lse"].fill_(torch.nan)
    if name in TANGENTS:
        machine.call(
            name, q, k, v, *given, t_q, t_k, t_v, *offsets, *tangents.values(),
            *strides(q, k, v, t_q, t_k, t_v), *sizes,
        )  # fmt: skip
        return tangents
    machine.call(
        name, q, k, v, t_q, t_k, t_v, *offsets, *results.values(), *tangents.values(),
        *strides(q, k, v, t_q, t_k, t_v), *sizes,
    )  # fmt: skip
    return results | tangents


def check(machine: Emulator | Gpu, name: str, case: Case) -> dict[str, Tensor]:
    """Run a kernel and compare all that it writes; returns that."""
    truth = exact(case)
    references = yardstick(case, "backward" if name == "attention_backward" else "forward")
    results = run(machine, name, case)
    for key, value in results.items():
        factor = 2 if key in ("out", "lse") else 3
        expected, reference = truth[key], references[key]
        if key == "lse":
            keyless = expected == -math.inf
            assert torch.equal(value.cpu() == -math.inf, keyless)
            value, expected, reference = (x.cpu()[~keyless] for x in (value, expected, reference))
        assert_close(value, expected, reference, factor, f"{name}: {key}")
    return results


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int  #: of a block
    shared_bytes: int


def launches(
    name: str,
    head_dim: int,
    n: int,
    m: int | None = None,
    *,
    batch: int = 1,
    heads: int = 16,
    lengths: int | None = None,
    **properties: int,
) -> list[Launch]:
    """What a kernel would launch on a device of these properties, at any size: nothing runs.

    `lengths` is the number of packed sequences.
    """
    emulator = module()
    m = n if m is None else m
    sizes = {
        "batch": batch, "n": n, "m": m, "heads": heads, "head_dim": head_dim,
        "sequences": lengths or 0, "max_n": n, "max_m": m, "scale": 1.0,
        "dtype": DTYPE_CODES[torch.bfloat16], "where": 0,
    }  # fmt: skip
    arguments: dict[str, object] = {}
    for parameter in re.findall(r"(\w+): ", getattr(emulator, name).__doc__.split("->")[0]):
        if parameter in sizes:
            arguments[parameter] = sizes[parameter]
        elif parameter.endswith("_strides"):
            arguments[parameter] = (n * heads * head_dim, heads * head_dim, head_dim)
        else:
            there = lengths is not None or not parameter.startswith("cu_seqlens")
            arguments[parameter] = 4096 if there else 0
    emulator.set_device(runs=False, **properties)
    try:
        getattr(emulator, name)(**arguments)
        return [Launch(*launch) for launch in emulator.launches()]
    finally:
        emulator.set_device()
