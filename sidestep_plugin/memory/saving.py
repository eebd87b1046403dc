"""What a way to need less memory says of itself, for the estimate and for every advice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .estimate import Settings


@dataclass(frozen=True)
class Saving:
    """One way to need less memory.

    Attributes:
        option: name of the plugin's option that it needs; "" for a setting that every training has.
        apply: the settings with it; None if it would change nothing.
        flag: what to type, for the settings with it.
        advice: the same as a lower-case phrase, for the settings without and with it.
        cost: what it costs, in a few words.
    """

    option: str
    apply: Callable[[Settings], Settings | None]
    flag: Callable[[Settings], str]
    advice: Callable[[Settings, Settings], str]
    cost: str
