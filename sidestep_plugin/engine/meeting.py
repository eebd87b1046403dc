"""How the processes of a training find each other: at an address, with words about who is missing.

torch's own meeting waits for half an hour without a word, does not hear Ctrl-C meanwhile, and ends in a traceback. Here
all waiting is done in Python, and torch is called when everybody is there.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, TypeAlias

from ..errors import Refusal
from ..ranks import Ranks

Store: TypeAlias = Any
"""torch.distributed.Store, whose module says nothing of its types."""

_LONGEST: Final = 30 * 60.0  # seconds, as torch would wait
_SILENT: Final = 10.0  # seconds before the first word about who is missing, and then between two
_BETWEEN: Final = 60.0
_LOOK: Final = 0.1
_KNOWN: Final = 5.0  # seconds in which a name has to be found that the network does not know for the moment
_ANSWER: Final = 2.0  # seconds for a connection

_REFUSED: Final = "refused"


class SaidElsewhere(Refusal):
    """A refusal that another process on this machine tells."""


def refusal_of(here: Ranks, text: str) -> Refusal:
    """A refusal of all processes, as one of them raises it: the first one of each machine tells it."""
    return SaidElsewhere(text) if here.local_rank else Refusal(text)


def meet(here: Ranks, about: Mapping[str, str], say: Callable[[str], None]) -> Store:
    """Wait until all processes of the training are there, at MASTER_ADDR and MASTER_PORT.

    Args:
        about: what has to be the same in all processes before they can talk to each other, by name.
        say: takes a line about who is missing, in the first process of each machine.

    Returns:
        A store that all of them share.

    Raises:
        Refusal: the address is of no use, somebody did not come, two processes have the same number, or they differ.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _port()
    waiting = _Waiting(here, f"{host}:{port}", say)
    # torchrun's agents have met before, and keep the store.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    if here.first and not by_agent:
        if here.machines > 1 and _answers(host, port):
            raise Refusal(
                f"Somebody listens at {host}:{port} already: another machine that is numbered 0, or another program. "
                "Give each machine a --node-rank of its own, or choose another port."
            )
        store = _store("127.0.0.1", port, listens=True)
        if here.machines > 1 and not _answers(host, port):
            raise Refusal(
                f"This machine is number 0 and listens on port {port}, but nothing answers at {host}:{port}: {host} is "
                "another machine, or a firewall is between. Start --node-rank 0 on the machine that --rendezvous names."
            )
    else:
        while not _answers(host, port):
            waiting.for_("process 0 (machine 0)")
        store = _store(host, port, listens=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return _settled(PrefixStore(f"acestep/{attempt}", store), here, about, waiting)


class _Waiting:
    """Waits a little, and says for whom when it has taken a while."""

    def __init__(self, here: Ranks, where: str, say: Callable[[str], None]) -> None:
        self._here, self._where, self._say = here, where, say
        self._began = time.monotonic()
        self._speak_at = self._began + _SILENT

    def for_(self, whom: str) -> None:
        """Raises Refusal when it has taken too long."""
        now = time.monotonic()
        if now - self._began > _LONGEST:
            raise Refusal(
                f"{whom[0].upper()}{whom[1:]} did not come to {self._where} in {_LONGEST / 60:.0f} minutes. Start the "
                "command on every machine, and let no firewall block that port."
            )
        if now >= self._speak_at:
            self._speak_at = now + _BETWEEN
            line = f"Waiting for {whom} at {self._where}. Ctrl-C ends it."
            if self._here.first:
                self._say(line)
            elif self._here.local_rank == 0:  # its standard output goes nowhere
                with suppress(OSError):
                    sys.stderr.write(f"{line}\n")
                    sys.stderr.flush()
        time.sleep(_LOOK)


def _settled(store: Store, here: Ranks, about: Mapping[str, str], waiting: _Waiting) -> Store:
    """Return when all are there and fit together. Raises Refusal."""
    mine = {"host": platform.node(), "pid": os.getpid(), "processes": here.world_size, **about}
    mine["processes on each machine"] = here.local_world_size
    try:
        if store.add(f"number/{here.rank}", 1) > 1:
            other = _said(store, here.rank)
            who = f"one on {other['host']} (process id {other['pid']})" if other else "another one"
            raise _refusal(
                store,
                here,
                f"Two processes are number {here.rank}: this one on {mine['host']} (process id {os.getpid()}), and "
                f"{who}. Give each machine a --node-rank of its own, from 0 to {here.machines - 1}.",
            )
        store.set(f"hello/{here.rank}", json.dumps(mine))
        while (first := _said(store, 0)) is None:
            _check_refused(store, here)
            waiting.for_("process 0 (machine 0)")
        for name, value in mine.items():
            if name not in ("host", "pid") and first.get(name) != value:
                raise _refusal(
                    store,
                    here,
                    f"Process {here.rank} on {mine['host']} has another number or version: {name} is {value}, and "
                    f"{first.get(name)} in process 0 on {first['host']}. Start the same program with the same options "
                    "on every machine.",
                )
        store.set(f"fits/{here.rank}", "1")
        missing = list(range(here.world_size))
        while missing := [rank for rank in missing if not store.check([f"fits/{rank}"])]:
            _check_refused(store, here)
            waiting.for_(_names(missing, here))
    except RuntimeError as error:  # torch's, when the process is gone that keeps the store
        raise Refusal(f"Process 0 has ended while the others came: {first_line(error)}. Start all again.") from None
    return store


def _said(store: Store, rank: int) -> dict[str, Any] | None:
    """What a process has said of itself; None as long as it has not."""
    if not store.check([f"hello/{rank}"]):
        return None
    said: dict[str, Any] = json.loads(store.get(f"hello/{rank}"))
    return said


def _refusal(store: Store, here: Ranks, text: str) -> Refusal:
    """Tell all processes."""
    store.set(_REFUSED, text)
    return refusal_of(here, text)


def _check_refused(store: Store, here: Ranks) -> None:
    if store.check([_REFUSED]):
        raise refusal_of(here, store.get(_REFUSED).decode("utf-8"))


def _names(missing: Sequence[int], here: Ranks) -> str:
    """The processes that are missing, as "process 1" or "processes 2 and 3 (machine 1)"."""
    shown = [str(rank) for rank in missing[:8]]
    listed = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    numbers = sorted({rank // here.local_world_size for rank in missing})
    machines = "" if here.machines == 1 else f" (machine {', '.join(map(str, numbers[:8]))})"
    return f"process{'es' if len(missing) > 1 else ''} {listed}{more}{machines}"


# -- the address -----------------------------------------------------------------------------------------------------


def _port() -> int:
    text = os.environ.get("MASTER_PORT", "").strip()
    if not text.isdigit() or not 0 < int(text) < 2**16:
        raise Refusal(
            f"MASTER_PORT is {text or 'not set'}, expected a port number. Start the processes with torchrun or with "
            "--devices."
        )
    return int(text)


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there. Raises Refusal for a name that nobody knows."""
    until = time.monotonic() + _KNOWN
    while True:
        try:
            socket.create_connection((host, port), timeout=_ANSWER).close()
            return True
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN and time.monotonic() < until:
                time.sleep(_LOOK)
                continue
            raise Refusal(
                f"No machine {host} is known here ({error.strerror}). Correct --rendezvous HOST:PORT: expected the "
                "name or the IP address of machine 0."
            ) from None
        except OSError:
            return False


def _store(host: str, port: int, *, listens: bool) -> Store:
    """torch's store. Raises Refusal."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            host,
            port,
            is_master=listens,
            timeout=timedelta(seconds=_LONGEST),
            wait_for_workers=False,
            use_libuv=os.name != "nt",  # torch for Windows is built without it
        )
    except RuntimeError as error:
        if listens:
            raise Refusal(
                f"Port {port} of this machine cannot be used: {first_line(error)}. Another training may use it, or "
                "another machine that is numbered 0. Choose another port, and give each machine its own --node-rank."
            ) from None
        raise Refusal(
            f"Process 0 at {host}:{port} cannot be reached: {first_line(error)}. Correct --rendezvous."
        ) from None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
