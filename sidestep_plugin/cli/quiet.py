"""Keeps what other libraries print about themselves off the screen and out of log files. ``--debug`` shows it."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any

from .terminal import say

_SETUP_TALK = ("bitsandbytes not installed",)
"""Warnings of ACE-Step's about optional packages: nobody asked for them, and nothing can go wrong without them."""


def quiet_third_parties() -> None:
    """Silence Lightning's greetings, LyCORIS's log of every layer, and warnings meant for other libraries' authors."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|lightning|torch)\b")
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # LyCORIS sets its level when it is imported, which would undo one that is set here; a filter stays.
    logger = logging.getLogger("LyCORIS")
    if _only_errors not in logger.filters:
        logger.addFilter(_only_errors)
    threading.excepthook = _quiet_log_writer


def _only_warnings(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _quiet_log_writer(args: threading.ExceptHookArgs) -> None:
    """Leave out the traceback of TensorBoard's writing thread: its failure is announced as one line."""
    if not type(args.thread).__module__.startswith("tensorboard"):
        _default_hook(args)


_default_hook = threading.excepthook


def quiet_upstream() -> None:
    """Show ACE-Step's warnings as single lines. Its errors arrive as messages, and its news are the progress bar's."""
    try:
        from loguru import logger
    except ImportError:  # only the miniature does without it
        logging.getLogger("acestep").addFilter(_only_warnings)
        return
    logger.remove()
    # A function instead of a format string keeps loguru from adding tracebacks.
    logger.add(
        lambda line: say(line.removesuffix("\n"), err=True),
        level="WARNING",
        filter=_worth_a_line,
        format=lambda _: "ACE-Step: {message}\n",
    )


def _worth_a_line(record: Any) -> bool:
    return record["level"].name == "WARNING" and not record["message"].startswith(_SETUP_TALK)
