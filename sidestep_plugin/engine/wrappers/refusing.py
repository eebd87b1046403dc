"""Replacements for what must not train: they say why, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

from ...errors import Refusal, UpstreamMismatch


def refuse_training(message: str) -> Callable[..., Generator[Any, Any, None]]:
    def train_from_preprocessed(*_: Any, **__: Any) -> Generator[Any, Any, None]:
        yield 0, 0.0, f"❌ {message}"

    return train_from_preprocessed


def refuse_steps(misfit: UpstreamMismatch, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def training_step(*_: Any, **__: Any) -> Any:
        raise misfit

    return training_step


def refuse_construction(message: str, original: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` that raises Refusal: for a trainer in which the plugins that were asked for take no part."""

    @wraps(original)
    def __init__(*_: Any, **__: Any) -> None:
        raise Refusal(message)

    return __init__


def announce_construction(
    say: Callable[[str], object], message: str, original: Callable[..., None]
) -> Callable[..., None]:
    """An ``__init__`` that says it and goes on."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        say(message)
        original(self, *args, **kwargs)

    return __init__
