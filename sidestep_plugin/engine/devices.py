"""Several GPUs, in upstream's own loop: what its engine is told, which songs a process gets, and which random numbers.

Upstream builds its engine for one device, seeds every process alike and plans the learning rate before the songs are
divided. Here each process gets its share of the songs before that, in an order that follows the run's seed, and random
numbers of its own after the adapter was made, so that the adapter starts out equal everywhere.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..ranks import Ranks
from ..run import Run

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_BETWEEN_SEEDS = 1_000_003
"""Distance between the seeds of two processes: a neighbouring --seed should not give another process's numbers."""


def on_all_devices(engine: type, arguments: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Arguments of Fabric for data-parallel training in the processes that are there.

    Buffers of the decoder never change, so they are not broadcast: a process may compute a forward pass alone, such as
    in validation.
    """
    package = engine.__module__.rpartition(".")[0]
    strategies = importlib.import_module(f"{package}.strategies")
    environments = importlib.import_module(f"{package}.plugins.environments")
    given = arguments.get("plugins") or []
    return {
        "devices": ranks.local_world_size,
        "num_nodes": ranks.machines,
        "strategy": strategies.DDPStrategy(broadcast_buffers=False),
        "plugins": [*(given if isinstance(given, list) else [given]), environments.TorchElasticEnvironment()],
    }


def seed_apart(run: Run) -> None:
    """Give every process but the first random numbers of its own; the first keeps those of a training on one GPU."""
    import torch

    if run.ranks.first:
        return
    seed = (int(getattr(run.training_config, "seed", 0)) + _BETWEEN_SEEDS * run.ranks.rank) % 2**32
    torch.manual_seed(seed)  # of every device, too
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def share_of_songs(loader: DataLoader[Any], run: Run) -> tuple[DataLoader[Any], Callable[[int], None]]:
    """A loader of this process's songs in place of one of all songs, and what begins an epoch, counted from 0.

    All processes draw one order for each epoch, from the run's seed, and take turns in it. If the songs cannot be
    divided, the first ones of that order are repeated at its end.
    """
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    settings = {
        name: getattr(loader, name)
        for name in (
            "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn",
            "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers", "pin_memory_device",
        )
    }  # fmt: skip
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset,
        num_replicas=run.ranks.world_size,
        rank=run.ranks.rank,
        shuffle=True,
        seed=int(getattr(run.training_config, "seed", 0)),
    )
    return DataLoader(loader.dataset, sampler=sampler, **settings), sampler.set_epoch
