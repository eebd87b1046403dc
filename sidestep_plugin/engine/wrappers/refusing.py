"""Replacements for what must not train, or not without a word: they say why, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

from ...errors import UpstreamMismatch


def refuse_training(message: str, original: Callable[..., Any]) -> Callable[..., Generator[Any, Any, None]]:
    @wraps(original)
    def train_from_preprocessed(*_: Any, **__: Any) -> Generator[Any, Any, None]:
        yield 0, 0.0, f"❌ {message}"

    return train_from_preprocessed


def refuse_steps(misfit: UpstreamMismatch, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def training_step(*_: Any, **__: Any) -> Any:
        raise misfit

    return training_step


def before_construction(act: Callable[[], object], original: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` before which something is done, such as raising Refusal."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        act()
        original(self, *args, **kwargs)

    return __init__
