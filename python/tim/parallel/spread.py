"""How one model lives on the ranks of a world: alone, replicated (DDP) or sharded (FSDP2).

Each rank works on every size-th image of a batch, from its own number on, and a step's result is
that of one process with the whole batch: the same random draws, the mean gradient of all images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tim.models import TiM
from tim.objective import TransitionLoss, TransitionLossOutput
from tim.parallel.collectives import TimedCollectives, Timer
from tim.parallel.world import World

if TYPE_CHECKING:
    from tim.config import RunConfig


class Spread:
    """One process: nothing to share out, nothing to add up."""

    #: Whether every rank has to take part in every pass through the network.
    is_sharded = False

    def __init__(self, world: World):
        self.world = world
        #: Called in a backward pass that has nothing left but to wait for other ranks, where the
        #: way the model is spread lets that be known (DDP).
        self.waiting: Callable[[], None] = lambda: None
        #: Called when a collective begins, where a block waits for its own (FSDP2); what it returns
        #: is called at its end.
        self.collective: Timer = lambda: lambda: None

    def mine(self, values: Tensor) -> Tensor:
        """The rows of one part of a batch that this rank works on."""
        world = self.world
        return values if world.size == 1 else values[world.rank :: world.size].contiguous()

    def rows(self, batch: int, parts: int) -> np.ndarray | None:
        """Numbers of this rank's images in a batch of so many parts; None for all of them."""
        world = self.world
        if world.size == 1:
            return None
        part = batch // parts
        starts = range(0, batch, part)
        return np.concatenate([np.arange(s + world.rank, s + part, world.size) for s in starts])

    def held(self, tensor: Tensor) -> Tensor:
        """What this rank has of a parameter."""
        return tensor.to_local() if self.is_sharded else tensor

    def count(self, first: int) -> int:
        """How many of the `first` rows of a part are this rank's."""
        return len(range(self.world.rank, first, self.world.size))

    def evaluate(
        self, loss: TransitionLoss, model: nn.Module, *arguments: Tensor, **options: object
    ) -> TransitionLossOutput:
        return loss(model, *arguments, **options)

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward pass of one part of a batch: gradients of all ranks are added
        up in the last part only."""
        yield

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks, on all of them."""
        if self.world.size > 1:
            dist.all_reduce(values)
            values /= self.world.size
        return values


class Replicated(Spread):
    """DistributedDataParallel: the whole model on every rank."""

    def __init__(self, world: World, model: nn.Module, loss: TransitionLoss):
        super().__init__(world)
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        # Loss and derivative inside the wrapped module: torch.func.jvp must not run through the
        # wrapper, which sets up its buckets when it is called.
        self.network = nn.parallel.DistributedDataParallel(
            _Objective(model, loss), gradient_as_bucket_view=True
        )

        # What DDP does without a hook. No annotations: DDP compares them with classes, here they
        # are text.
        def mean(group, bucket):
            future = allreduce_hook(group, bucket)
            if bucket.is_last():
                self.waiting()
            return future

        self.network.register_comm_hook(None, mean)

    def evaluate(
        self, loss: TransitionLoss, model: nn.Module, *arguments: Tensor, **options: object
    ) -> TransitionLossOutput:
        return self.network(*arguments, **options)

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.network.no_sync():
                yield


class _Objective(nn.Module):
    def __init__(self, model: nn.Module, loss: TransitionLoss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *arguments: Tensor, **options: object) -> TransitionLossOutput:
        return self.loss(self.model, *arguments, **options)


class Sharded(Spread):
    """fully_shard: each block's weights, gradients, averages and moments cut up over the ranks.

    With `shard_size` less than the number of ranks, each group of so many neighbours holds one copy
    (hybrid sharding): weights are gathered inside the group, gradients also added up across groups.
    """

    is_sharded = True

    def __init__(
        self,
        world: World,
        model: TiM,
        average: TiM,
        *,
        shard_size: int | None = None,
        reshard: bool = True,
        bf16: bool = False,
    ):
        super().__init__(world)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Nothing here works on a block's output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        size = shard_size or world.size
        kind = world.device.type
        if size == world.size:
            mesh = init_device_mesh(kind, (size,))
        else:
            shape = (world.size // size, size)
            mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        # The blocks' matrices are needed in bf16 only, and are sent as such; inputs, embedders and
        # the sum of gradients keep float32, as under autocast in one process.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # No backward pass follows the average's forward pass, after which it would be cut up again.
        timed = TimedCollectives(lambda: self.collective(), size < world.size)
        for network, again in ((model, reshard), (average, True)):
            for block in network.blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
                timed.watch(block)
            fully_shard(network, mesh=mesh, reshard_after_forward=network is average)
            timed.watch(network)
        self.network = model

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        self.network.set_requires_gradient_sync(last)
        yield

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        return super().total_norm(gradients).full_tensor()


def build_spread(
    config: RunConfig,
    world: World,
    model: TiM,
    average: TiM,
    loss: TransitionLoss,
    features: bool,
) -> Spread:
    """The spread that `config.parallel` asks for; shards `model` and `average` in place.

    Without `features` the projection head gets no gradient.

    Raises ValueError as `check_spread`.
    """
    check_spread(config, world)
    if world.size == 1:
        return Spread(world)
    parallel = config.parallel
    if parallel.strategy == "ddp":
        if config.model.z_dim is not None and not features:
            # DDP waits for the gradient of every parameter that wants one.
            model.projector.requires_grad_(False)
        return Replicated(world, model, loss)
    return Sharded(
        world,
        model,
        average,
        shard_size=shard_size(config, world),
        reshard=parallel.reshard,
        bf16=config.train.precision == "bf16",
    )


def shard_size(config: RunConfig, world: World) -> int:
    """Ranks that hold one copy of the model together."""
    parallel = config.parallel
    if parallel.strategy != "hybrid":
        return world.size
    size = parallel.shard_size or world.local_size
    if world.size % size:
        raise ValueError(
            f"parallel.shard_size must divide the number of ranks, {world.size}, got {size}"
        )
    return size


def check_spread(config: RunConfig, world: World) -> None:
    """ValueError unless model and step can be spread over the ranks: every rank must get as many
    images of each part, and, where the passes of the ranks must match, of each kind of sample."""
    train, ranks = config.train, world.size
    if train.batch_size % (train.accumulate * ranks):
        raise ValueError(
            f"train.batch_size must be a multiple of train.accumulate = {train.accumulate} times "
            f"{ranks} ranks, got {train.batch_size}"
        )
    name, smallest, data = "train.batch_size", train.batch_size, config.data
    if data.token_budget is not None:
        name, smallest = "data.budget_multiple", data.budget_multiple
        if smallest % (train.accumulate * ranks) or train.batch_size % smallest:
            raise ValueError(
                f"{name} must be a multiple of train.accumulate = "
                f"{train.accumulate} times {ranks} ranks, and divide train.batch_size = "
                f"{train.batch_size}, got {smallest}"
            )
    if ranks == 1:
        return
    if train.cuda_graph:
        raise ValueError(f"train.cuda_graph needs one process, got {ranks} ranks")
    if config.parallel.strategy == "ddp":
        return
    shard_size(config, world)
    part = smallest // train.accumulate
    own = part // ranks
    first = round(config.objective.diffusion_ratio * part)
    counts = [len(range(rank, first, ranks)) for rank in (0, ranks - 1)]
    if len({(count > 0, count < own) for count in counts}) > 1:
        raise ValueError(
            f"{name} = {smallest} is too small for {ranks} ranks with "
            f"train.accumulate = {train.accumulate} and objective.diffusion_ratio = "
            f"{config.objective.diffusion_ratio}: some ranks would have samples with r < t and "
            "others not, which parallel.strategy fsdp and hybrid cannot do"
        )
