"""The processes that torchrun starts, as their environment has them; nothing imports torch."""

import os
from dataclasses import dataclass

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    """This process among the `world` ones of torchrun, `local_world` of them on this machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def launched() -> Launched | None:
    """Return this process's place among those of torchrun; None if it is the only one."""
    found = [os.environ.get(name, "") for name in _VARIABLES]
    if not all(found) or not all(text.isdigit() for text in found[:4]):
        return None
    rank, local_rank, world, local_world = map(int, found[:4])
    return Launched(rank, world, local_rank, local_world) if world > 1 else None
