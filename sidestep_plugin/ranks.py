"""Which process of a training this one is, as its launcher says it: torchrun and ``--devices`` set the same variables.

A training on several GPUs is one process for each GPU. Its *rank* counts the processes of all machines from 0, its
*local rank* those of one machine. A program that nobody launched that way is rank 0 of 1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import Refusal


@dataclass(frozen=True)
class Ranks:
    """The place of one process among those of a training.

    Attributes:
        rank: number of this process among all, from 0.
        world_size: number of processes on all machines.
        local_rank: number of this process on its machine, from 0; it is also the number of its GPU.
        local_world_size: number of processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    @property
    def first(self) -> bool:
        """Whether this process speaks and saves for all."""
        return self.rank == 0

    @property
    def machines(self) -> int:
        """Number of machines."""
        return self.world_size // self.local_world_size

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world_size}"


def ranks() -> Ranks:
    """The place of this process, from RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    Raises:
        Refusal: the variables contradict each other, or the machines have different numbers of processes.
    """
    text = os.environ.get("WORLD_SIZE", "").strip()
    if not text.isdigit() or int(text) <= 1:
        return Ranks()
    world = int(text)
    rank = _number("RANK", None)
    there = Ranks(rank, world, _number("LOCAL_RANK", None), _number("LOCAL_WORLD_SIZE", world))
    if not there.rank < world or not there.local_rank < there.local_world_size or world % there.local_world_size:
        raise Refusal(
            f"RANK is {there.rank} of WORLD_SIZE {world} and LOCAL_RANK {there.local_rank} of LOCAL_WORLD_SIZE "
            f"{there.local_world_size}, which does not fit together. Start the same number of processes on each "
            "machine, with torchrun or with --devices."
        )
    return there


def _number(name: str, default: int | None) -> int:
    """A whole number of the environment. Raises Refusal when it is missing or no number."""
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise Refusal(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', '').strip()}, but {name} is {text or 'not set'}, expected a "
            "number. Start the processes with torchrun or with --devices, or unset WORLD_SIZE for a single one."
        )
    return int(text)
