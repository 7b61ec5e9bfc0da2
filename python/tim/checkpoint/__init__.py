"""Checkpoints of a training run.

directory     directories that are there as a whole or not at all
whole         the format of one process: safetensors files and a state
sharded       the format of many: torch.distributed.checkpoint
export        weights as one file
store         the checkpoints of a run: written beside the training, checked when read
random_state  the global random generators
"""

from tim.checkpoint.directory import latest_checkpoint, remove_leftovers
from tim.checkpoint.export import export_weights
from tim.checkpoint.random_state import random_states, seed_everything, set_random_states
from tim.checkpoint.store import CheckpointStore, Restored, SaveFailed
from tim.checkpoint.training import DamagedCheckpoint, Training
from tim.models.loading import checkpoints

__all__ = [
    "CheckpointStore",
    "DamagedCheckpoint",
    "Restored",
    "SaveFailed",
    "Training",
    "checkpoints",
    "export_weights",
    "latest_checkpoint",
    "random_states",
    "remove_leftovers",
    "seed_everything",
    "set_random_states",
]
