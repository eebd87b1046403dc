"""What stands where nothing may be trained: it says why, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

from ...errors import UpstreamMismatch


def refuse_training(message: str) -> Callable[..., Generator[Any, Any, None]]:
    def train_from_preprocessed(*_: Any, **__: Any) -> Generator[Any, Any, None]:
        yield 0, 0.0, f"❌ {message}"

    return train_from_preprocessed


def refuse_steps(misfit: UpstreamMismatch, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def training_step(*_: Any, **__: Any) -> Any:
        raise misfit

    return training_step
