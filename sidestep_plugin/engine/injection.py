"""Whether PEFT and LyCORIS can put an adapter into a model here, found out by putting one into a single small layer.

That they are installed says little: PEFT refuses every LoRA where a package beside it, such as torchao, has a version
that it does not like, and ACE-Step takes a PEFT that cannot be imported for one that is not there.
"""

from __future__ import annotations

import re
from typing import Final

from ..adapters.kinds import BY_NAME
from ..run import AdapterType
from ..text import sentence

_WIDTH: Final = 8

_TOO_OLD: Final = re.compile(r"incompatible version of (\w+).*?only versions above (\d[\w.]*\w)", re.DOTALL)
"""PEFT's words for a package that is installed beside it and too old."""


def injection_problem(kind: AdapterType) -> str:
    """What keeps an adapter of this kind out of a model, and what to do; "" if nothing does.

    Nothing is changed, and no random number is used up.
    """
    import torch

    with torch.random.fork_rng(devices=()):
        layer = torch.nn.Sequential()
        layer.add_module("q_proj", torch.nn.Linear(_WIDTH, _WIDTH))
        try:
            BY_NAME[kind].try_on(layer)
        except (Exception, SystemExit) as error:  # whatever an import may raise
            return f"{sentence(f'{type(error).__name__}: {error}')} {_way_out(kind, str(error))}"
    return ""


def _way_out(kind: AdapterType, reason: str) -> str:
    if found := _TOO_OLD.search(reason):
        name, oldest = found.groups()
        return f'Install a newer one: pip install --upgrade "{name}>={oldest}"; or remove it: pip uninstall {name}'
    return f"Install it again: pip install --upgrade {BY_NAME[kind].package}"
