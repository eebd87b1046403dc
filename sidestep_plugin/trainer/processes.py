"""What the processes of one training do together: meet, agree, exchange values, and stop after the same step.

Each of these functions has to be called by all processes, in the same order. Small values go over gloo on the CPU,
also where gradients go over NCCL: nothing here waits for a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from ..errors import PluginError, Refusal
from ..ranks import ranks
from ..run import ProcessPlan
from ..text import counted
from .answers import described

if TYPE_CHECKING:
    import torch

    from ..registry import Registry

STOP: Final = "should_stop"
INTERRUPTED: Final = "interrupted"
"""Entries of upstream's training state: its stop button, and whether a signal pressed it."""

_LOST: Final = (
    "gloo",
    "NCCL",
    "nccl",
    "Connection closed by peer",
    "Connection reset by peer",
    "ProcessGroup",
    "TCPStore",
)
_groups: Final[dict[str, Any]] = {}


def plan_of(registry: Registry, options: Mapping[str, Any]) -> ProcessPlan:
    """What the plugins plan for this process. Raises Refusal when it is one of several and nobody planned that."""
    here = ranks()
    for plugin, plan in registry.call("acestep_plan_processes", options=options, ranks=here):
        if not isinstance(plan, ProcessPlan):
            raise PluginError(
                f"Plugin {plugin!r} returned {described(plan)} from acestep_plan_processes, expected a ProcessPlan."
            )
        return plan
    if here.several:
        raise Refusal(
            f"WORLD_SIZE is {here.world_size}: ACE-Step's trainer uses one GPU, so every process would train the same "
            "adapter and save it to the same folder. Use --plugin sidestep, which trains on several, or start a single "
            "process, without torchrun."
        )
    return ProcessPlan()


def check_started(plan: ProcessPlan) -> None:
    """Refuse a training that was to have several processes in one that was started alone. Raises Refusal."""
    if plan.processes > 1 and not ranks().several:
        raise Refusal(
            f"{plan.processes} processes were asked for, but this one was started alone. Train from the command line "
            "(acestep-train --plugin sidestep --devices N), or start this program with torchrun."
        )


def check_engine(trainer: Any) -> None:
    """Refuse several processes with a trainer that has no engine for them. Raises Refusal."""
    engine = getattr(trainer, "Fabric", None)
    if not isinstance(engine, type) or not getattr(trainer, "LIGHTNING_AVAILABLE", True):
        raise Refusal(
            f"WORLD_SIZE is {ranks().world_size}, and training on several GPUs needs Lightning Fabric, which this "
            "ACE-Step does not use here. Install it (pip install lightning), or start a single process."
        )
    loaders = getattr(trainer, "PreprocessedDataModule", None)
    if not hasattr(loaders, "train_dataloader"):
        raise Refusal(
            f"WORLD_SIZE is {ranks().world_size}, but this version of ACE-Step makes its batches in an unknown way, so "
            "the songs cannot be divided. Use ACE-Step's main version, or start a single process."
        )


# -- meeting ---------------------------------------------------------------------------------------------------------


def join(device: str) -> None:
    """Meet the other processes; does nothing when they have met.

    Args:
        device: the type of device that the training computes on. Gradients on CUDA go over NCCL where torch has it.
    """
    import torch.distributed as dist

    if not ranks().several or "cpu" in _groups:
        return
    if not dist.is_initialized():
        if os.name == "nt":
            os.environ.setdefault("USE_LIBUV", "0")  # torch for Windows is built without it
        nccl = device == "cuda" and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    _groups["cpu"] = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def leave() -> None:
    """Take leave of the other processes at the end of the program."""
    import torch.distributed as dist

    if _groups.pop("cpu", None) is not None and dist.is_initialized():
        dist.destroy_process_group()


def use_own_gpu(device: torch.device) -> None:
    """Make this process's GPU the current one, before anything is loaded. Raises Refusal when it has none."""
    import torch

    here = ranks()
    if not here.several or device.type == "cpu":
        return
    if device.type != "cuda":
        raise Refusal(f"Several processes cannot share {device}. Use NVIDIA or AMD GPUs, --device cpu, or one process.")
    if here.local_world_size > (count := torch.cuda.device_count()):
        raise Refusal(
            f"{here.local_world_size} processes were started on this machine, and torch sees "
            f"{counted(count, 'GPU')}. Start "
            "as many as there are (CUDA_VISIBLE_DEVICES chooses among them)."
        )
    torch.cuda.set_device(here.local_rank)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    import torch.distributed as dist

    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_groups["cpu"])
    return values


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of each value over all processes, on the device and in the type of the values."""
    import torch.distributed as dist

    total = values.detach().double().cpu()
    dist.all_reduce(total, group=_groups["cpu"])
    return (total / dist.get_world_size()).to(values.device, values.dtype)


def wait_for_all() -> None:
    """Return when every process has come here."""
    gather(None)


@contextmanager
def one_first() -> Iterator[None]:
    """Let the first process of each machine go through the block before the others: files are read, or made, once."""
    here = ranks()
    if not here.several:
        yield
        return
    if here.local_rank > 0:
        wait_for_all()
    try:
        yield
    finally:
        if here.local_rank == 0 and sys.exc_info()[0] is None:
            wait_for_all()


def told_by_first(decide: Callable[[], Any]) -> Any:
    """What the first process decides; in the others, what it decided.

    Raises:
        Refusal: the first process refused. In the others it is a :class:`SaidElsewhere`, which need not be shown.
    """
    here = ranks()
    if not here.several:
        return decide()
    if here.first:
        try:
            decided = decide()
        except Refusal as refusal:
            gather(("refused", str(refusal)))
            raise
        gather(("decided", decided))
        return decided
    verdict, what = gather(None)[0]
    if verdict == "refused":
        raise SaidElsewhere(what)
    return what


class SaidElsewhere(Refusal):
    """A refusal that the first process tells."""


def check_agreement(said: Mapping[str, Any]) -> None:
    """Refuse to train what differs between the processes | given values by what they are | raises Refusal."""
    first, *others = gather(dict(said))
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other.get(name) != value:
                raise Refusal(
                    f"Process {rank} has another {name} than process 0: {other.get(name)} and not {value}. Give every "
                    "machine the same songs, model, checkpoints and options."
                )


def lost_connection(text: str) -> bool:
    """Whether a failure's text says that another process is gone: it has its own message."""
    return any(word in text for word in _LOST)


# -- stopping --------------------------------------------------------------------------------------------------------


class SharedState(MutableMapping[str, Any]):
    """Upstream's training state, whose stop button stops all processes after the same step.

    Upstream asks for it once before every step. If one process was told to stop, the answer is yes in all of them.

    Args:
        own: the state of this process, which is told, too.
        announce: takes a line when the training stops.

    Attributes:
        agreed: whether all processes stop. A signal may come after they last agreed: that is the state's own entry.
    """

    def __init__(self, own: MutableMapping[str, Any], announce: Callable[[str], None]) -> None:
        self._own, self._announce = own, announce
        own.setdefault(STOP, False)
        self.agreed = False

    def __getitem__(self, key: str) -> Any:
        if key == STOP:
            self._agree()
            return self.agreed
        return self._own[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._own[key] = value

    def __delitem__(self, key: str) -> None:
        del self._own[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def _agree(self) -> None:
        import torch
        import torch.distributed as dist

        wishes = torch.tensor([bool(self._own.get(key)) for key in (STOP, INTERRUPTED)], dtype=torch.uint8)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=_groups["cpu"])
        stop, interrupted = map(bool, wishes.tolist())
        if stop:
            self.agreed = self._own[STOP] = True
            self._own[INTERRUPTED] = interrupted
            if interrupted:
                self._announce("Stopping after this step, and saving.")
