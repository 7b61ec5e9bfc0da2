"""The tensors that a checkpoint holds of a training run, whole or sharded over several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, or is not what was written."""


@dataclass(frozen=True)
class Training:
    """The network, its average, and the optimizer of the network's parameters."""

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """State tensors of the optimizer by name of the parameter, for those that have one."""
        state = self.optimizer.state
        return {name: dict(state[p]) for name, p in self.model.named_parameters() if p in state}


def system_error(error: BaseException) -> BaseException:
    """The error of the system behind an error, such as a full disk: torch.save hides it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found
        found = found.__cause__ or found.__context__
    return error


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """`tensor`, which every rank has whole, as `target` has it: sharded or not, on its device."""
    tensor = tensor.to(device=target.device, dtype=target.dtype)
    if not dist.is_initialized():
        return tensor
    # Half a second that one process alone does not have to spend.
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor) or tensor.shape != target.shape:
        return tensor
    # Every rank cuts out its own part: no communication.
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def set_optimizer_state(training: Training, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Replace the optimizer's state by whole tensors, keyed as in `Training.optimizer_state`."""
    training.optimizer.state.clear()
    for name, parameter in training.model.named_parameters():
        if name in state:
            training.optimizer.state[parameter] = {
                # Counters of steps are scalars beside parameters of any shape.
                key: like(value, parameter)
                if value.shape == parameter.shape
                else value.to(parameter.device)
                for key, value in state[name].items()
            }
