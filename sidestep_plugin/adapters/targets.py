"""Checks names of target modules against the model's layers, by the rules of PEFT and of upstream's LoKr."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import Refusal
from ..text import shown


def check_targets(layers: Iterable[str], targets: Sequence[str], kind: str) -> None:
    """Refuse names of target modules that match no layer.

    PEFT ignores such a name as long as another one matches, and upstream's LoKr trains all layers if none does.

    Args:
        layers: full names of the decoder's layers, such as ``layers.0.self_attn.q_proj``.
        targets: the names that were given.
        kind: "lora" or "lokr".

    Raises:
        Refusal: a name matches no layer.
    """
    known = list(layers)
    matches = _peft_matches if kind == "lora" else _lokr_matches
    wrong = [name for name in targets if not any(matches(layer, name) for layer in known)]
    if wrong:
        named = ", ".join(repr(shown(name, 60)).replace("\\\\", "\\") for name in wrong[:5])
        exist = ", ".join(dict.fromkeys(_short(layer) for layer in known))
        raise Refusal(f"--target-modules: no layer of this model is called {named}. Choose from {shown(exist, 250)}.")


def is_target(layer: str, targets: Sequence[str] | str | None) -> bool:
    """Whether PEFT attaches a LoRA to a layer of this name, by its rules for a list of names and for one expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(_peft_matches(layer, str(name)) for name in targets or ())


def _peft_matches(layer: str, name: str) -> bool:
    """PEFT's rule for a list of names: a layer's full name, or its end after a dot."""
    return layer == name or layer.endswith(f".{name}")


def _lokr_matches(layer: str, name: str) -> bool:
    """Upstream's rule: the end of the layer's name in LyCORIS, or any part of it after an underscore."""
    lycoris, wanted = f"lycoris_{layer.replace('.', '_')}".lower(), name.strip().lower()
    return bool(wanted) and (lycoris.endswith(wanted) or f"_{wanted}" in lycoris)


def _short(layer: str) -> str:
    """The last part of a layer's name, with the part before it if it is a number."""
    before, _, last = layer.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() and before else last
