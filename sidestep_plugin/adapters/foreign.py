"""Adapters that a model already carries before it is trained, and what they leave in a checkpoint.

ACE-Step's app loads a LoRA into the very model that it trains, and its "unload" leaves the layers in place. PEFT then
saves every adapter that it finds, or, if the loaded one is called "default" like the trained one, mixes the two. A LoKr
that is still applied becomes part of what the new adapter is trained on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..run import AdapterType
from ..text import shown
from .kinds import title_of
from .kinds.lokr import LOKR
from .kinds.lora import LORA
from .targets import is_target, own_name
from .weights_file import read_weights_file

TRAINED: Final = "default"  # PEFT's name of the adapter that upstream trains


@dataclass(frozen=True)
class Foreign:
    """An adapter in a model that the coming training does not train."""

    name: str  # PEFT's name of it; "" for a LoKr, which has none
    kind: str  # "LoRA" or "LoKr", or what PEFT calls another kind
    layers: int  # number of layers that have it


def foreign_adapters(model: Any, kind: AdapterType, targets: Sequence[str] | str | None) -> list[Foreign]:
    """The adapters in a model that the coming training does not train. Nothing is changed.

    The model is as it is before upstream attaches the adapter; `kind` and `targets` are those of the coming training. A
    LoRA that an earlier training left in the same layers is not among them: PEFT starts it anew.
    """
    found: dict[tuple[str, str], int] = {}
    for layer, module in model.decoder.named_modules():
        for name in _in_peft(module):
            if not (kind == LORA.name and name == TRAINED and is_target(own_name(layer), targets)):
                key = (name, _kind(module))
                found[key] = found.get(key, 0) + 1
        if _is_wrapped_by_lycoris(module):
            found["", LOKR.title] = found.get(("", LOKR.title), 0) + 1
    return [Foreign(name, named, layers) for (name, named), layers in sorted(found.items())]


def check_no_foreign_adapters(model: Any, kind: AdapterType, adapter_config: Any) -> None:
    """Refuse to train a model that carries an adapter already, before upstream attaches its own. Raises Refusal."""
    if foreign := foreign_adapters(model, kind, getattr(adapter_config, "target_modules", None)):
        one = foreign[0]
        named = f"the {one.kind} {shown(one.name, 60)!r}" if one.name else f"a {one.kind}"
        stays = "Unloading it in the app does not take it out of the model. " if one.name else ""
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise Refusal(
            f"The model carries {named} already (in {one.layers} layers){more}: it was loaded in the app, or trained "
            f"before. It would change what is trained, or be saved with it. {stays}Initialize the model again. "
            "Start the training without loading an adapter."
        )


def drop_foreign_adapters(folder: Path) -> list[str]:
    """Remove what PEFT saved of other adapters: each is in a folder of its name beside the files of the trained one.

    Returns the names of those adapters. Raises OSError.
    """
    others = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
    for other in others:
        shutil.rmtree(other)
    return [other.name for other in others]


def check_holds_tensors(folder: Path) -> None:
    """Refuse weights files without a tensor: versions of February 2026 save them when a model is trained twice.

    They wrap a LoRA around the one of the first training, and PEFT then finds neither. Raises Refusal and OSError.
    """
    for file in sorted(folder.rglob("*.safetensors")):
        if not read_weights_file(file).tensors:
            raise Refusal(
                f"ACE-Step saved an adapter without a single tensor ({file.name}). This version does so when a model "
                "is trained a second time. Initialize the model again. Start the training then."
            )


def _in_peft(module: Any) -> Iterable[str]:
    """Names of the adapters in one of PEFT's layers."""
    held = [getattr(module, attribute, None) for attribute in getattr(module, "adapter_layer_names", None) or ()]
    return dict.fromkeys(name for each in held if each is not None and hasattr(each, "keys") for name in each)


def _kind(module: Any) -> str:
    prefix = str(module.adapter_layer_names[0]).partition("_")[0]
    return title_of({"hada": "loha"}.get(prefix, prefix))


def _is_wrapped_by_lycoris(module: Any) -> bool:
    """Whether LyCORIS stands in for a module's forward. Its ``restore`` puts the module's own function back."""
    owner = getattr(vars(module).get("forward"), "__self__", None)
    return type(owner).__module__.partition(".")[0] == "lycoris"
