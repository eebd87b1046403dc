"""The kinds of adapter: one file for each, and this list of them. Nothing here imports torch before it is needed."""

from __future__ import annotations

import importlib.util
from typing import Any, Final

from ...errors import Refusal
from .kind import Kind as Kind
from .kind import Mean as Mean
from .lokr import LOKR
from .lora import LORA

KINDS: Final[tuple[Kind, ...]] = (LORA, LOKR)  # all kinds that can be trained, the usual one first

BY_NAME: Final = {kind.name: kind for kind in KINDS}
NAMES: Final = tuple(BY_NAME)
DEFAULT: Final = KINDS[0]

WEIGHT_NAMES: Final = tuple(kind.weight_name for kind in KINDS)
"""File names of the weights that ACE-Step and PEFT write."""


def check_installed(name: str) -> None:
    """Refuse a kind whose package is not installed, unless ACE-Step itself goes on without it. Raises Refusal."""
    kind = BY_NAME[name]
    if kind.network is not None and importlib.util.find_spec(kind.module) is None:
        raise Refusal(f"A {kind.title} needs {kind.library}, which is not installed here: pip install {kind.package}")


def kind_of_config(config: Any) -> Kind:
    """The kind of adapter that one of ACE-Step's configurations is for; the usual one where it fits none."""
    return next((kind for kind in KINDS if hasattr(config, kind.fields["rank"])), DEFAULT)


def network_of(module: Any) -> Any:
    """The network beside the decoder that a training module trains; None if the adapter is in the decoder."""
    networks = (getattr(module, kind.network, None) for kind in KINDS if kind.network is not None)
    return next((network for network in networks if network is not None), None)


def title_of(name: Any) -> str:
    """A kind's name as people write it, also of one that only files have."""
    return BY_NAME[name].title if name in BY_NAME else {"loha": "LoHA", "oft": "OFT"}.get(name, str(name))
