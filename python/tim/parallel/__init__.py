"""Several processes that train one model, by torch.distributed.

world      the processes of a run and the messages between them
spread     how the model lives on them: DDP, FSDP2, hybrid sharding
heartbeat  which rank hangs
stop       SIGTERM, agreed on by all
devices    what a process computes on
"""

from tim.parallel.devices import pick_device
from tim.parallel.heartbeat import Heartbeat
from tim.parallel.spread import Spread, build_spread, check_spread
from tim.parallel.stop import StopRequest
from tim.parallel.world import World, join, known_to_all, launched, leave

__all__ = [
    "Heartbeat",
    "Spread",
    "StopRequest",
    "World",
    "build_spread",
    "check_spread",
    "join",
    "known_to_all",
    "launched",
    "leave",
    "pick_device",
]
