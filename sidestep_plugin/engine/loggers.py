"""The engine's loggers (TensorBoard), as an output that may fail: the training is worth more than its log.

A full disk, a file where the log's folder belongs, or a broken writer would end the training at the next number. Here
the first failure is told, and what would have been logged after it goes nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..run import Clip
from ..text import sentence

if TYPE_CHECKING:
    from .current import Training
    from .host import Host


class Secondary:
    """Stands in for a logger and never fails. Everything but logging is the logger's own."""

    def __init__(self, logger: Any, announce: Callable[[str], None]) -> None:
        self._logger, self._announce = logger, announce
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers by name."""
        self._attempt(lambda: self._logger.log_metrics(metrics, step))

    def add(self, kind: str, name: str, value: Any, step: int, **more: Any) -> None:
        """Log something that only some loggers can, by the method of that name, such as ``add_histogram``."""

        def write() -> None:
            writer = self._logger.experiment
            if hasattr(writer, kind):
                getattr(writer, kind)(name, value, step, **more)

        self._attempt(write)

    def _attempt(self, write: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            write()
        except Exception as error:  # whatever its writer raises; nothing of the training depends on it
            self._failed = True
            cause = error.__cause__ or error  # Lightning hides a full disk behind "you tried to log 5.22"
            log = "TensorBoard" if "TensorBoard" in type(self._logger).__name__ else type(self._logger).__name__
            reason = f"{cause.strerror or cause}" if isinstance(cause, OSError) else f"{type(cause).__name__}: {cause}"
            self._announce(f"Warning: the {log} log ends here: {sentence(reason)} The training goes on without it.")


def tolerate_failures(host: Host, engine: Any) -> list[Secondary]:
    """Let the loggers of an engine fail without ending the training; does nothing the second time.

    Args:
        engine: Lightning's Fabric, or None for a training without it.

    Returns:
        The loggers. None of them raises.
    """
    loggers = getattr(engine, "loggers", None)
    if not isinstance(loggers, list):
        return []
    loggers[:] = [each if isinstance(each, Secondary) else Secondary(each, host.announce) for each in loggers]
    return loggers


def log_entries(host: Host, training: Training, entries: Mapping[str, Any], epoch: int) -> None:
    """Write numbers, clips and tensors (as histograms) to upstream's log, in the first process. Never fails.

    Without Lightning there is no log.
    """
    engine = getattr(training.trainer, "fabric", None) if training.run.ranks.first else None
    for logger in tolerate_failures(host, engine):
        for name, value in entries.items():
            if isinstance(value, int | float):
                logger.log_metrics({name: value}, epoch)
            elif isinstance(value, Clip):  # TensorBoard plays one channel
                sound = value.samples.mean(dim=0, keepdim=True)
                logger.add("add_audio", name, sound, epoch, sample_rate=value.rate)
            else:
                logger.add("add_histogram", name, value, epoch)
