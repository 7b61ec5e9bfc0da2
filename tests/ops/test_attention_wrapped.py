"""Attention inside what people wrap around a network: DDP, FSDP2, checkpointing, torch.compile."""

from __future__ import annotations

import functools
import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contract import assert_close, skip_unless_tangents_survive
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tim import ops
from tim.parallel import leave

RANKS = 2
HEADS, WIDTH = 2, 32


class Layer(nn.Module):
    """Attention between linear layers."""

    def __init__(self, attention: Callable = ops.attention) -> None:
        super().__init__()
        self.attention = attention
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return x + self.proj(self.attention(q, k, v).flatten(2))


class Network(nn.Module):
    """Two such layers, each recomputed in the backward pass if `checkpointing`."""

    def __init__(self, attention: Callable = ops.attention, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(attention) for _ in range(2))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Inputs and their tangents, others on each rank."""
    generator = torch.Generator().manual_seed(rank)
    x, v = (torch.randn(3, 11, WIDTH, generator=generator) for _ in range(2))
    return x, v


def step(network: nn.Module, x: Tensor, v: Tensor, passes: int = 1) -> tuple[Tensor, Tensor]:
    """Value and tangent, and the gradients of a loss of both, as the objective takes it."""
    if passes == 1:
        out, t_out = torch.func.jvp(network, (x,), (v,))
    else:
        with torch.no_grad():
            _, t_out = torch.func.jvp(network, (x,), (v,))
        out = network(x)
    (out - t_out.detach()).square().mean().backward()
    return out.detach(), t_out.detach()


def gradients(network: nn.Module) -> list[Tensor]:
    """The whole gradients of all parameters."""
    return [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in network.parameters()
    ]


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp": lambda network: (
        [fully_shard(layer) for layer in network.layers] and fully_shard(network)
    ),
}
#: One pass for value and tangent; with checkpointing the tangent has a pass of its own.
MODES = {
    f"{wrapper}{suffix}": (wrap, checkpointing)
    for wrapper, wrap in WRAPPERS.items()
    for suffix, checkpointing in (("", False), (", checkpointing", True))
}


#: Before PyTorch 2.13 FSDP2 asks for the storage of torch.func's wrappers, which have none.
NOT_HERE = {name for name in MODES if name.startswith("fsdp") and torch.__version__ < (2, 13)}


def run_rank(rank: int, folder: str) -> None:
    try:
        torch.set_num_threads(1)
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
        results = {}
        for name, (wrap, checkpointing) in MODES.items():
            if name in NOT_HERE:
                continue
            network = wrap(Network(checkpointing=checkpointing))
            values = step(network, *batch(rank), passes=1 + checkpointing)
            results[name] = (*values, *gradients(network))
        torch.save(results, f"{folder}/{rank}.pt")
        del network
        leave()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, tuple[Tensor, ...]]]:
    """What each of two processes computed in every mode."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(i, str(folder))) for i in range(RANKS)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
    finally:
        for process in processes:
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert not errors and not any(process.exitcode for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def expected(dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Values and tangents of each rank and the mean gradients, by the formula in one process."""
    values, networks = [], []
    for rank in range(RANKS):
        networks.append(Network(ops.attention_reference).to(dtype))
        values.append(step(networks[-1], *(x.to(dtype) for x in batch(rank))))
    pairs = zip(*map(gradients, networks), strict=True)
    return values, [torch.stack(pair).mean(0) for pair in pairs]


@pytest.mark.parametrize("mode", MODES)
def test_value_tangent_and_gradients_over_processes(mode, ranks):
    if mode in NOT_HERE:
        pytest.skip("FSDP2 of this PyTorch cannot run inside torch.func.jvp")
    exact, exact_gradients = expected(torch.float64)
    yardstick, yardstick_gradients = expected(torch.float32)
    for rank, results in enumerate(ranks):
        out, t_out, *grads = results[mode]
        assert t_out.abs().max() > 0.1
        assert_close(out, exact[rank][0], yardstick[rank][0], 2, "value")
        assert_close(t_out, exact[rank][1], yardstick[rank][1], 3, "tangent")
        for i, values in enumerate(zip(grads, exact_gradients, yardstick_gradients, strict=True)):
            assert_close(*values, 3, f"gradient of parameter {i}")


#: (B, N, M, H, D): ordinary, few queries, one key, one query, one wide head, next to nothing.
SHAPES = (
    (2, 40, 40, 2, 24), (2, 3, 70, 2, 24), (2, 33, 1, 2, 24), (2, 1, 90, 2, 24),
    (2, 20, 20, 1, 256), (2, 1, 1, 1, 4),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernels", "backend"), [(True, "auto"), (True, "sdpa"), (False, "auto"), (False, "sdpa")]
)
def test_recomputing_without_tangents_what_was_computed_with_them(kernels, backend, dtype, shape):
    """Activation checkpointing keeps no tangents: the passes have to save the same tensors."""
    *_, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(shape[0], rows, heads, head_dim) for rows in (shape[1], shape[2], shape[2])]
    q, k, v, *moves, g = (
        torch.randn(size, generator=generator).to(dtype) for size in (*sizes, *sizes, sizes[0])
    )
    tangents = [t[1:] for t in moves]
    kept = []
    attention = functools.partial(ops.attention, backend=backend)

    def run(*qkv: Tensor) -> Tensor:
        if kept:
            return attention(*qkv)
        out = attention(*(ops.Pair(x, t) for x, t in zip(qkv, tangents, strict=True)))
        kept.append(out.tangent)
        return out.primal

    def results(function: Callable) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, g)]

    with nullcontext() if kernels else ops.reference_only():
        actual = results(lambda *qkv: checkpoint(run, *qkv, use_reentrant=False))
        for values in zip(actual, results(attention), strict=True):
            torch.testing.assert_close(*values)  # another forward pass may round otherwise
    assert len(kept) == 1 and (kept[0].abs().max() > 0 or shape[2] == 1)


def packed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    return ops.attention(q, k, v, cu_seqlens_q=rows, cu_seqlens_k=rows)


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 12, 2, 8, generator=generator) for _ in range(4)]


ROWS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
FUNCTIONS = {"whole": (ops.attention, ()), "packed": (packed, (ROWS,))}
EACH_FUNCTION = pytest.mark.parametrize(("function", "rest"), FUNCTIONS.values(), ids=FUNCTIONS)


@EACH_FUNCTION
@pytest.mark.parametrize("kernels", [True, False])
def test_compiled_in_one_graph_forward_and_backward(kernels, function, rest):
    *qkv, g = operands()

    def results(function: Callable) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = function(*leaves, *rest)
        return [out, *torch.autograd.grad(out, leaves, g)]

    torch._dynamo.reset()
    with nullcontext() if kernels else ops.reference_only():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(results(compiled), results(function))


@EACH_FUNCTION
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("other", [torch.no_grad, torch.inference_mode])
def test_a_second_use_without_gradient_and_a_third_with(other, compiled, function, rest):
    *qkv, v = operands()

    def dual(q: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda q: function(q, *qkv[1:], *rest), (q,), (v,))

    plain = function
    if compiled:
        torch._dynamo.reset()
        plain, dual = (
            torch.compile(f, fullgraph=True, backend="aot_eager") for f in (function, dual)
        )

    def trained() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = plain(*leaves, *rest)
        return [out.detach(), *torch.autograd.grad(out, leaves, v)]

    skip_unless_tangents_survive(other)
    first, (out, tangent) = trained(), dual(qkv[0])
    assert tangent.abs().max() > 0
    with other():
        torch.testing.assert_close(plain(*qkv, *rest), first[0])
        torch.testing.assert_close(dual(qkv[0]), (out, tangent))
    torch.testing.assert_close(trained(), first)
    torch.testing.assert_close(dual(qkv[0]), (out, tangent))
