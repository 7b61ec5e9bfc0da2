"""Memory of a training step before it is taken: `tim info --preset NAME --batch B --ranks R`.

Forward pass, derivative and backward pass run on tensors without memory (FakeTensorMode), and all
that they would hold is added up as it comes and goes. Weights, averages and moments are arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections import defaultdict
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tim.config import RunConfig
from tim.models import TiM

Strategy = Literal["ddp", "fsdp", "hybrid"]


class Memory(NamedTuple):
    """Bytes on one rank at the peak of a step."""

    weights: int
    average: int  #: the averaged weights
    moments: int  #: of AdamW
    gradients: int
    gathered: int  #: whole weights and gradients of what sharding has assembled for the moment
    activations: int  #: of forward pass and derivative, kept for the backward pass, and its own

    @property
    def total(self) -> int:
        return sum(self)


def estimate(
    config: RunConfig,
    ranks: int = 1,
    strategy: Strategy = "ddp",
    *,
    shard_size: int | None = None,
    reshard: bool = True,
) -> Memory:
    """Memory that each of `ranks` processes needs to train `config`.

    It leaves out the CUDA context, buffers of cuBLAS and NCCL, what the allocator cannot use, and
    encoders of captions and features.

    Args:
        shard_size: ranks that hold one copy of the model together (hybrid).
        reshard: whether a block's weights are given up between forward and backward pass.

    Raises:
        ValueError: ranks, or the batch, cannot be shared out.
    """
    train = config.train
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if train.batch_size % (ranks * train.accumulate):
        raise ValueError(
            f"the batch must be a multiple of {train.accumulate} parts (train.accumulate) times "
            f"{ranks} ranks, got {train.batch_size}"
        )
    shards = 1
    if ranks > 1 and strategy != "ddp":
        shards = (shard_size or min(8, ranks)) if strategy == "hybrid" else ranks
        if ranks % shards:
            raise ValueError(f"shard_size must divide {ranks} ranks, got {shards}")
    sharded = shards > 1
    half = train.precision == "bf16"
    images = train.batch_size // (ranks * train.accumulate)
    sizes, peaks = _passes(config, images, half, half and sharded)
    every = 4 * sizes.all
    per_shard = -(-every // shards)
    # DDP's gradients live in its buckets for good, and those of several parts add up.
    lasting = (ranks > 1 and not sharded) or train.accumulate > 1
    gradients, activations = max(
        ((per_shard if lasting else -(-held // shards), peak) for held, peak in peaks.items()),
        key=sum,
    )
    # After the backward pass all gradients are there, and nothing else.
    if per_shard > gradients + activations:
        gradients, activations = per_shard, 0
    gathered = _gathered(config, sizes, half, reshard) if sharded else 0
    return Memory(per_shard, per_shard, 2 * per_shard, gradients, gathered, activations)


def table(config: RunConfig, ranks: int = 1) -> list[tuple[str, ...]]:
    """Headings and rows, in GB: a column for each way to spread the model over the ranks, and one,
    marked by a star, for the same with activations recomputed in the backward pass."""
    strategies: tuple[Strategy, ...] = ("ddp",)
    if ranks > 1:
        # A group of hybrid sharding is one machine of eight.
        strategies = ("ddp", "fsdp", "hybrid") if ranks > 8 else ("ddp", "fsdp")
    columns = []
    for strategy in strategies:
        for again in (False, True):
            train = dataclasses.replace(config.train, gradient_checkpointing=again)
            found = estimate(dataclasses.replace(config, train=train), ranks, strategy)
            head = (strategy if ranks > 1 else "one process") + " *" * again
            columns.append((head, *(f"{size / 1e9:.2f}" for size in (*found, found.total))))
    return list(zip(("", *Memory._fields, "in all"), *columns, strict=True))


class _Sizes(NamedTuple):
    """Numbers of parameters."""

    all: int
    blocks: int
    block: int  #: the largest


def _gathered(config: RunConfig, sizes: _Sizes, half: bool, reshard: bool) -> int:
    """Whole weights that FSDP2 holds at once: all outside of the blocks, and, of the blocks, the
    one at work and the next; with the gradients of two blocks on their way to the other ranks."""
    width = 2 if half else 4
    root = 4 * (sizes.all - sizes.blocks)
    pair = 2 * sizes.block
    weights = root + width * (pair if reshard else sizes.blocks)
    if config.objective.guidance.enabled:
        weights += root + width * pair
    return weights + (width + 4 if half else 4) * pair


@functools.lru_cache(maxsize=8)
def _passes(
    config: RunConfig, images: int, half: bool, half_weights: bool
) -> tuple[_Sizes, dict[int, int]]:
    """Sizes of the model, and the most that activations take for each amount of gradients."""
    shape = config.model
    with FakeTensorMode():
        model = TiM(shape)
        if half_weights:
            _halve(model.blocks)
        model.gradient_checkpointing = config.train.gradient_checkpointing
        loss = config.objective.build(config.transport.build())
        x = torch.zeros(images, shape.in_channels, shape.input_size, shape.input_size)
        if shape.num_classes is None:
            y = torch.zeros(images, config.data.max_tokens, shape.cap_feat_dim)
            null = torch.zeros_like(y)
        else:
            y = torch.zeros(images, dtype=torch.long)
            null = model.null_condition(images)
        t, r = loss.draw_times(x)
        with _Meter() as meter, torch.autocast("cpu", torch.bfloat16, enabled=half):
            for constant in model.state_dict(keep_vars=True).values():
                meter.ignore(constant)
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(meter.is_gradient)
            out = loss(
                model,
                x,
                torch.zeros_like(x),
                y,
                t=t,
                r=r,
                null=null,
                y_guidance=y,
                ema_model=model if config.objective.guidance.enabled else None,
            )
            out.loss.backward()
        blocks = [_count(block) for block in model.blocks]
        return _Sizes(_count(model), sum(blocks), max(blocks)), dict(meter.peaks)


def _halve(module: nn.Module) -> None:
    # Not module.to(), which exchanges tensors in place; fake ones cannot be.
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach().to(torch.bfloat16)))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Meter(TorchDispatchMode):
    """Follows all tensors: how many bytes are held, of gradients and of all else."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.activations = self.gradients = 0
        #: Most bytes of activations while gradients took so many.
        self.peaks: defaultdict[int, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._hold(result)
        return results

    def ignore(self, tensor: Tensor) -> None:
        """Not to be counted, nor are views of it."""
        self._storages[tensor.untyped_storage()] = _Entry(0)

    def is_gradient(self, parameter: Tensor) -> None:
        """To be called once the gradient of `parameter` is there."""
        entry = self._storages.get(parameter.grad.untyped_storage())
        if entry is not None and not entry.is_gradient:
            entry.is_gradient = True
            self.activations -= entry.bytes
            # In float32 wherever it comes to rest.
            self.gradients += 4 * parameter.numel()

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        entry = self._storages[storage] = _Entry(storage.nbytes())
        self.activations += entry.bytes
        self.peaks[self.gradients] = max(self.peaks[self.gradients], self.activations)
        weakref.finalize(storage, self._release, entry)

    def _release(self, entry: _Entry) -> None:
        if not entry.is_gradient:
            self.activations -= entry.bytes


@dataclasses.dataclass
class _Entry:
    bytes: int
    is_gradient: bool = False
