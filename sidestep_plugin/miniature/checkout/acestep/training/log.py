"""`logger`: loguru's if it is installed, else the standard library's. (ACE-Step requires loguru.)"""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["logger"]


def _find_logger() -> Any:
    try:
        from loguru import logger
    except ImportError:
        return logging.getLogger("acestep")
    return logger


logger = _find_logger()
