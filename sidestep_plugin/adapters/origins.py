"""Reads the facts that each trainer writes: this plugin, Side-Step, kohya-style trainers, ACE-Step and PEFT.

All facts come back under our own keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from ..errors import Refusal
from ..files import read_json_object
from ..text import shown
from ..variants import VARIANTS, Variant, words_of
from .facts import FACTS, FILE_NAME
from .finding import check_inside, has_neighbours_of_its_own
from .kinds import BY_NAME
from .kinds.lokr import LOKR
from .kinds.lora import LORA
from .layers import Adapter
from .peft_config import plain_number

# Side-Step 1.x writes its file beside a checkpoint, or into the folder above the final adapter.
_CONFIG_NAMES: Final = (FILE_NAME, "sidestep_training_config.json")
_ABOVE: Final = frozenset({"final", "best", "adapter"})


def facts_beside(adapter: Adapter, problems: list[str]) -> dict[str, Any] | None:
    """The training_config.json that belongs to a weights file, ours or Side-Step's. None if there is none."""
    folder = adapter.file.path.absolute().parent
    if not has_neighbours_of_its_own(adapter.file.path):
        return None
    for place in (folder, folder.parent) if folder.name in _ABOVE else (folder,):
        for name in _CONFIG_NAMES:
            file = place / name
            if not file.is_file() and not file.is_symlink():
                continue
            try:
                check_inside(file, place)
                return read_json_object(file)
            except Refusal as refusal:
                problems.append(str(refusal))
            except (OSError, ValueError) as error:
                problems.append(f"{file} cannot be read: {shown(error)}.")
    return None


def merged(own: dict[str, Any] | None, beside: dict[str, Any] | None, notes: list[str]) -> dict[str, Any]:
    """Our facts from the header and from the folder. The header wins, because it moves with the weights."""
    if own is None or beside is None or "schema_version" not in beside:
        return dict(own or beside or {})
    for key in FACTS:
        if own.get(key) is not None and beside.get(key) is not None and own[key] != beside[key]:
            notes.append(
                f"{FILE_NAME} has {key} = {shown(beside[key])}, but the header of the weights has {shown(own[key])}. "
                "The header is used."
            )
    return beside | {key: value for key, value in own.items() if value is not None}


def our_name(facts: Mapping[str, Any]) -> str:
    """This program's name, with the version that wrote the facts."""
    version = facts.get("sidestep_plugin_version")
    return f"sidestep-plugin {shown(version, 40)}" if version else "sidestep-plugin"


def side_step(config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts from Side-Step 1.x. Its keys are flat, and many have the same names as ours. Paths are left out."""
    words = words_of(str(config.get("model_variant") or ""))
    variant = next((name for name in VARIANTS if name in words), None)
    if variant is None and isinstance(config.get("is_turbo"), bool):
        variant = "turbo" if config["is_turbo"] else None
    taken = ("shift", "num_inference_steps", "timestep_mode", "timestep_mu", "timestep_sigma", "cfg_ratio", "dropout")
    facts = {key: config.get(key) for key in taken}
    return facts | {
        "model_name": _name_of(config.get("base_model") or config.get("model_variant")),
        "model_variant": variant,
        "model_size": "XL" if "xl" in words else None,
        "title": config.get("run_name"),
        "rank": config.get("r") or config.get("rank"),
        "alpha": config.get("alpha"),
        "trigger": config.get("trigger_word") or config.get("custom_tag"),
    }


def kohya(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Facts from a header with ``ss_*`` or ``modelspec.*`` keys."""
    model = metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version")
    return {
        "title": metadata.get("modelspec.title") or metadata.get("ss_output_name"),
        "author": metadata.get("modelspec.author"),
        "license": metadata.get("modelspec.license"),
        "trigger": metadata.get("modelspec.trigger_phrase"),
        "created": metadata.get("modelspec.date"),
        "model_name": _name_of(model),
        "model_variant": _variant_in(_name_of(model) or ""),
        "rank": _whole(metadata.get("ss_network_dim")),
        "alpha": _number(metadata.get("ss_network_alpha")),
        "songs": _whole(metadata.get("ss_num_train_items") or metadata.get("ss_num_train_images")),
        "epoch": _whole(metadata.get("ss_epoch")),
        "global_step": _whole(metadata.get("ss_steps")),
        "training_steps": _whole(metadata.get("ss_steps")),
        "timestep_law": metadata.get("ss_timestep_sampling"),
    }


def upstream(metadata: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """Facts from upstream's LoKr header. Its shift and steps are turbo's for every model, so they are not used."""
    config, record = _object(metadata.get("lokr_config")), _object(metadata.get("run_metadata"))
    if "shift" in _object(record.get("training_config")):
        notes.append(
            "ACE-Step's own header has a shift and a number of steps that are the same for every model. These are "
            "ignored."
        )
    return {
        "rank": config.get(LOKR.fields["rank"]),
        "alpha": config.get(LOKR.fields["alpha"]),
        "songs": record.get("num_samples"),
    }


def configured(adapter: Adapter) -> dict[str, Any]:
    """Facts from PEFT's configuration and from the tensors."""
    name = _name_of(adapter.config.get("base_model_name_or_path"))
    ranks, alphas = adapter.ranks, {layer.alpha for layer in adapter.trained}
    found: dict[str, Any] = {
        "model_name": name,
        "model_variant": _variant_in(name or ""),
        "rank": next(iter(ranks)) if len(ranks) == 1 and adapter.kind == LORA.name else None,
        "alpha": plain_number(next(iter(alphas))) if len(alphas) == 1 and adapter.kind in BY_NAME else None,
        "dropout": adapter.config.get("lora_dropout"),
        "target_modules": adapter.targets,
    }
    return {key: value for key, value in found.items() if value is not None}


# -- small readers ---------------------------------------------------------------------------------------------------


def _name_of(value: Any) -> str | None:
    """The last part of a name that may be a path, in the style of Windows or Unix."""
    parts = [part for part in str(value or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return parts[-1] if parts else None


def _variant_in(name: str) -> Variant | None:
    named = [variant for variant in VARIANTS if variant in words_of(name)]
    return named[0] if len(named) == 1 else None


def _object(value: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _number(text: str | None) -> float | int | None:
    try:
        return None if text is None else plain_number(float(text))
    except (ValueError, OverflowError):
        return None


def _whole(text: str | None) -> int | None:
    number = _number(text)
    return number if isinstance(number, int) else None
