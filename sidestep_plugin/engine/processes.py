"""What the processes of one training do together: meet, agree, exchange values, and stop after the same step.

Each of these functions has to be called by all processes, in the same order. Small values go over gloo on the CPU,
also where gradients go over NCCL: nothing here waits for a GPU.
"""

from __future__ import annotations

import platform
import threading
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..errors import Refusal, unusable_answer
from ..ranks import ranks
from ..registry import version_of
from ..run import ProcessPlan
from ..text import counted
from .answers import described
from .meeting import SaidElsewhere as SaidElsewhere
from .meeting import first_line, meet, refusal_of

if TYPE_CHECKING:
    import torch

    from ..registry import Registry

T = TypeVar("T")

STOP: Final = "should_stop"
INTERRUPTED: Final = "interrupted"
"""Entries of upstream's training state: its stop button, and whether a signal pressed it."""

LOST: Final = "The connection to another process was lost"
"""How a failure begins of which this process knows only that another one is gone."""

_LOST: Final = (
    LOST, "gloo", "NCCL", "nccl", "Connection closed by peer", "Connection reset by peer", "ProcessGroup", "TCPStore",
)  # fmt: skip
_groups: Final[dict[str, Any]] = {}
_DECIDE: Final = ("torch", "peft", "lightning", "lycoris-lora", "sidestep-plugin")
"""Distributions whose version decides what is trained, or whether processes understand each other."""


def plan_of(registry: Registry, options: Mapping[str, Any]) -> ProcessPlan:
    """What the plugins plan for this process. Raises Refusal when it is one of several and nobody planned that."""
    here = ranks()
    for plugin, plan in registry.call("engine_plan_processes", options=options, ranks=here):
        if not isinstance(plan, ProcessPlan):
            raise unusable_answer(plugin, "engine_plan_processes", described(plan), "a ProcessPlan")
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


def join(device: str, say: Callable[[str], None]) -> None:
    """Meet the other processes; does nothing when they have met.

    Args:
        device: the type of device that the training computes on. Gradients on CUDA go over NCCL where torch has it.

    Raises:
        Refusal: they cannot meet, or do not fit together.
    """
    import torch.distributed as dist

    here = ranks()
    if not here.several or "cpu" in _groups:
        return
    if not dist.is_initialized():
        nccl = device == "cuda" and dist.is_nccl_available()
        # Without the build: machines may have other GPUs.
        versions = {name: (version_of(name) or "not installed").partition("+")[0] for name in _DECIDE}
        store = meet(here, {"device": device, **versions}, say)
        group = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        _hearing_signals(
            lambda: dist.init_process_group(backend, store=group, rank=here.rank, world_size=here.world_size)
        )
    _groups["cpu"] = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


class LostProcess(Refusal):
    """Another process is gone while this one waits for it."""


def _hearing_signals(act: Callable[[], T]) -> T:
    """Wait for torch in a thread, so that signals are handled meanwhile. Raises LostProcess."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="acestep-processes", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
    try:
        return future.result()
    except NotImplementedError:
        raise
    except RuntimeError as error:
        reason = first_line(error)
        raise LostProcess(f"{LOST} ({reason}). See what it says, and start the training again.") from error


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
            f"{counted(count, 'GPU')}. Start as many as there are (CUDA_VISIBLE_DEVICES chooses among them)."
        )
    torch.cuda.set_device(here.local_rank)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    import torch.distributed as dist

    values = [None] * dist.get_world_size()
    _hearing_signals(lambda: dist.all_gather_object(values, value, group=_groups["cpu"]))
    return values


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of each value over all processes, on the device and in the type of the values."""
    import torch.distributed as dist

    total = values.detach().double().cpu()
    _hearing_signals(lambda: dist.all_reduce(total, group=_groups["cpu"]))
    return (total / dist.get_world_size()).to(values.device, values.dtype)


def wait_for_all() -> None:
    """Return when every process has come here."""
    gather(None)


def in_turns(make: Callable[[], T]) -> T:
    """Let the first process of each machine make something before the others: files are read, or made, once.

    Raises:
        Refusal: it cannot be made, in this process or in another one.
    """
    here = ranks()
    if not here.several:
        return make()
    made: list[T] = []
    for turn in (here.local_rank == 0, here.local_rank > 0):
        in_all(lambda turn=turn: made.append(make()) if turn else None)  # type: ignore[misc]
    return made[0]


def in_all(look: Callable[[], T]) -> T:
    """Do something in every process. If it is refused in one, all of them end, and each machine is told why.

    Raises:
        Refusal: it was refused in this process or in another one; a :class:`SaidElsewhere` if another process of this
            machine tells it.
    """
    here = ranks()
    if not here.several:
        return look()
    result: list[T] = []
    own: Refusal | None = None
    try:
        result.append(look())
    except Refusal as refusal:
        own = refusal
    for rank, (said, host) in enumerate(gather((None if own is None else str(own), platform.node()))):
        if said is not None:
            raise _told(rank, host, said) if own is None or here.local_rank else own
    return result[0]


def _told(rank: int, host: str, text: str) -> Refusal:
    """A refusal of another process, as this one raises it: the first process of each machine tells it."""
    return SaidElsewhere(text) if ranks().local_rank else Refusal(f"Process {rank} on {host}: {text}")


def told_by_first(decide: Callable[[], Any]) -> Any:
    """What the first process decides; in the others, what it decided.

    Raises:
        Refusal: the first process refused. In the others it is a :class:`SaidElsewhere`, which need not be shown.
    """
    decided = in_all(lambda: decide() if ranks().first else None)
    return gather(decided)[0] if ranks().several else decided


def check_agreement(said: Mapping[str, Any]) -> None:
    """Refuse to train what differs between the processes.

    Args:
        said: what decides the training, by what it is called. A mapping is compared entry by entry.

    Raises:
        Refusal: names what differs, in which process and on which machine.
    """
    gathered = gather((platform.node(), dict(said)))
    (_, first), *others = gathered
    for rank, (host, other) in enumerate(others, start=1):
        for name, value in first.items():
            if (its := other.get(name)) != value:
                text = (
                    f"Process {rank} on {host} differs from process 0 on {gathered[0][0]} in {name}: "
                    f"{_difference(its, value)}. Give every machine the same songs, model, checkpoints, programs and "
                    "options."
                )
                raise refusal_of(ranks(), text)


def _difference(its: Any, value: Any) -> str:
    """What one process has and not the first one; of mappings only the first entries that differ."""
    if not isinstance(its, Mapping) or not isinstance(value, Mapping):
        return f"{its} and not {value}"
    kinds = {
        "other contents in": [name for name in value if name in its and its[name] != value[name]],
        "it lacks": [name for name in value if name not in its],
        "it also has": [name for name in its if name not in value],
    }

    def some(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    return "; ".join(f"{kind} {some(sorted(names))}" for kind, names in kinds.items() if names)


def lost_connection(text: str) -> bool:
    """Whether a failure's text says that another process is gone: it has its own message."""
    return any(word in text for word in _LOST)


# -- stopping --------------------------------------------------------------------------------------------------------


class SharedState(UserDict[str, Any]):
    """Upstream's training state, whose stop button stops all processes after the same step.

    Upstream asks for it once before every step. If one process was told to stop, the answer is yes in all of them.

    Args:
        own: the state of this process, which is told, too.

    Attributes:
        agreed: whether all processes stop. A signal may come after they last agreed: that is the state's own entry.
    """

    def __init__(self, own: MutableMapping[str, Any], announce: Callable[[str], None]) -> None:
        self.data: Any = own  # the very object, not a copy
        self._announce = announce
        own.setdefault(STOP, False)
        self.agreed = False

    def __getitem__(self, key: str) -> Any:
        if key == STOP:
            self._agree()
            return self.agreed
        return self.data[key]

    @property
    def pressed(self) -> bool:
        """Whether this process was told to stop, without asking the others."""
        return bool(self.data.get(STOP))

    def _agree(self) -> None:
        import torch
        import torch.distributed as dist

        wishes = torch.tensor([bool(self.data.get(key)) for key in (STOP, INTERRUPTED)], dtype=torch.uint8)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=_groups["cpu"])
        stop, interrupted = map(bool, wishes.tolist())
        if stop:
            self.agreed = self.data[STOP] = True
            self.data[INTERRUPTED] = interrupted
            if interrupted:
                self._announce("Stopping after this step, and saving.")
