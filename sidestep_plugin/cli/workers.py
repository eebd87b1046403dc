"""The processes of a training on several GPUs: started, watched and ended together, with one voice.

They are started with the variables that torchrun sets, so it makes no difference to them who started them. Each runs
the same command; the first one speaks.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from sidestep_plugin import signals
from sidestep_plugin.errors import Refusal
from sidestep_plugin.ranks import ranks

from .commands import FAILED, INTERRUPTED, UNUSABLE
from .interrupts import AT_ONCE
from .terminal import let_go, say, unread

if TYPE_CHECKING:
    from sidestep_plugin.launch.launch import Request
    from sidestep_plugin.run import ProcessPlan

_LAST_WORDS: Final = 15.0  # seconds that the other processes have to end by themselves once one has ended
_TURN: Final = 5.0  # seconds after which another process than the first one tells its own failure
_BLAME: Final = 25.0  # seconds after which a process that lost another one says so
_GRACE: Final = 60.0  # seconds in which a process whose launcher is gone has to stop and save
_LOOK: Final = 0.1


# -- the process that starts the others ------------------------------------------------------------------------------


def start_workers(request: Request) -> None:
    """Start the processes that the plugins plan, wait for them, and exit with their exit code.

    Returns when a single process is enough. Raises Refusal.
    """
    from sidestep_plugin.engine.processes import plan_of
    from sidestep_plugin.registry import Registry

    registry = Registry.load(request.plugins, request.wins)
    plan = plan_of(registry, registry.resolve_options(request.options))
    if plan.processes == 1:
        return
    from .command_line import words_of

    context = click.get_current_context()
    if context.info_name == "demo":
        raise Refusal("The demo trains in one process. Leave --devices and --nodes out.")
    words = [*words_of(request, whole=True), "--yes", *(["--debug"] if context.meta["debug"] else [])]
    code = Workers(plan, [sys.executable, "-m", "sidestep_plugin", "train", *words]).run()
    if code == FAILED:
        _say_how_to_resume(request)
    sys.exit(code)


def _say_how_to_resume(request: Request) -> None:
    from sidestep_plugin.resuming.checkpoints import checkpoints_in

    from .command_line import resuming_line

    if any(checkpoints_in(request.output_dir)):
        say(f"To resume from the newest checkpoint:\n  {resuming_line(request)}", err=True)


class Workers:
    """The processes on this machine.

    Args:
        plan: how many there are, here and on other machines.
        command: what each of them runs.
    """

    def __init__(self, plan: ProcessPlan, command: Sequence[str]) -> None:
        self._plan, self._command = plan, list(command)
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._asked_for = self._at_once = False
        self._stop_at: float | None = None
        self._asked: set[int] = set()

    def run(self) -> int:
        """Start them and wait until all have ended | returns the exit code: that of the first one that failed."""
        with signals.taken_over(self._on_signal):
            try:
                self._start()
                return self._wait()
            finally:
                for process in self._running.values():
                    process.kill()
                    process.wait()

    def _start(self) -> None:
        plan = self._plan
        host, _, port = plan.rendezvous.rpartition(":")
        host, port = (host, port) if host else ("127.0.0.1", str(_free_port()))
        for local in range(plan.devices):
            variables = {
                "RANK": plan.machine * plan.devices + local,
                "LOCAL_RANK": local,
                "WORLD_SIZE": plan.processes,
                "LOCAL_WORLD_SIZE": plan.devices,
                "GROUP_RANK": plan.machine,
                "MASTER_ADDR": host,
                "MASTER_PORT": port,
                # As torchrun does: each process's threads would wait for those of the others.
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            }
            self._running[local] = subprocess.Popen(
                self._command,
                env=os.environ | {name: str(value) for name, value in variables.items()},
                stdin=subprocess.PIPE,  # closed when this process ends, however it ends
                start_new_session=os.name != "nt",  # a terminal's Ctrl-C comes here, and is passed on once
            )

    def _wait(self) -> int:
        first_code = 0
        while self._running:
            for local, process in list(self._running.items()):
                if (code := process.poll()) is None:
                    continue
                del self._running[local]
                if process.stdin is not None:
                    process.stdin.close()
                if code and not first_code:
                    first_code = self._understood(local, process.pid, code)
                if code and self._stop_at is None:
                    # All stop together; one that has failed has nothing to wait for.
                    self._stop_at = time.monotonic() + (_LAST_WORDS if first_code == INTERRUPTED else 0.0)
            self._end_the_rest()
            time.sleep(_LOOK)
        return first_code

    def _understood(self, local: int, pid: int, code: int) -> int:
        """The exit code of the training for that of a process."""
        if code in (FAILED, UNUSABLE, INTERRUPTED):
            return code
        if self._at_once or (self._asked_for and -code in signals.ENDING):  # that had not begun to listen
            return INTERRUPTED
        with suppress(ValueError):
            how = f"was killed ({signal.Signals(-code).name})"
            rank = self._plan.machine * self._plan.devices + local
            say(
                f"Error: process {rank} of {self._plan.processes} (pid {pid}) {how}, so the training was ended. If "
                "nobody killed it, the machine ran out of memory: each process loads the whole model.",
                err=True,
            )
        return FAILED

    def _end_the_rest(self) -> None:
        """Ask those that are left to end when it is time, and end those that do not."""
        if self._stop_at is None or not self._running:
            return
        late = time.monotonic() - self._stop_at
        for local, process in self._running.items():
            if late > _LAST_WORDS:
                process.kill()
            elif late >= 0.0 and local not in self._asked:
                self._asked.add(local)
                process.terminate()

    def _on_signal(self, number: int, _: Any) -> None:
        let_go()
        if self._asked_for and number in signals.TYPED:
            self._at_once = True
            say(AT_ONCE, err=True)
            for process in self._running.values():
                process.kill()
        elif not self._asked_for:
            self._asked_for = True
            if os.name != "nt":  # there, Ctrl-C reaches every process of the console
                for process in self._running.values():
                    process.send_signal(number)  # this one is not ignored, so it is not ignored there


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# -- one of the processes --------------------------------------------------------------------------------------------


@contextmanager
def one_voice() -> Iterator[None]:
    """Train as one of several processes: only the first one is heard, unless it is another one that fails."""
    here = ranks()
    watch_launcher()
    if not here.first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - until the program ends
    try:
        yield
    except Refusal as refusal:
        from sidestep_plugin.engine.processes import LostProcess, SaidElsewhere

        if isinstance(refusal, LostProcess):
            tell_failure(str(refusal))
            _leave(FAILED)
        if here.first:
            raise
        tell_failure(str(refusal), elsewhere=isinstance(refusal, SaidElsewhere))
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:
        if here.local_rank == 0:
            say("Interrupted before the training began; nothing was saved.", err=True)
        _leave(INTERRUPTED)
    from sidestep_plugin.engine.processes import leave

    leave()


def _leave(code: int) -> NoReturn:
    """End without waiting for a thread that waits for another process."""
    for stream in (sys.stdout, sys.stderr):
        with unread(stream):
            stream.flush()
    os._exit(code)


def tell_failure(text: str, *, asked_to_end: bool = False, elsewhere: bool = False) -> None:
    """Tell why this process ends. If all fail alike, or because one is gone, one of them tells it.

    Args:
        text: the reason.
        asked_to_end: whether this process was asked to end: somebody else knows why.
        elsewhere: whether the first process tells it.
    """
    from sidestep_plugin.engine.processes import LOST, lost_connection

    here, lost = ranks(), lost_connection(text)
    if lost and asked_to_end:
        return
    with suppress(KeyboardInterrupt):
        if elsewhere or lost:
            time.sleep(_BLAME)  # whoever failed first is heard meanwhile, and all others are ended
        elif not here.first:
            time.sleep(_TURN)
        if lost and LOST not in text:
            text = f"{LOST}, and nothing is known of it: {text}"
        if not elsewhere:
            named = here.first or text.startswith(("Process ", "Two processes "))
            say(f"Error: {text}" if named else f"Error in {here} on {socket.gethostname()}: {text}", err=True)


def watch_launcher() -> None:
    """Stop and save when the process that started this one is gone, and end this one if that takes too long."""
    threading.Thread(target=_watch, name="acestep-launcher-watch", daemon=True).start()


def _watch() -> None:
    import _thread

    if os.name == "nt":
        if sys.stdin is not None:
            sys.stdin.read()
    else:
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.5)
    for number in signals.ENDING:  # the first one that is not ignored
        if callable(signal.getsignal(number)):
            _thread.interrupt_main(number)
            break
    time.sleep(_GRACE)
    os._exit(FAILED)
