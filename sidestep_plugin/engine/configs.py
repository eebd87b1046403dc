"""Builds upstream's configurations from the user's settings, and refuses settings that this version lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.kinds import BY_NAME, KINDS
from ..errors import Refusal
from ..run import AdapterType

if TYPE_CHECKING:
    import torch

# Names of the options in upstream's configurations.
TRAINING_FIELDS: Final = {
    "epochs": "max_epochs",
    "batch_size": "batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "save_every": "save_every_n_epochs",
    "val_split": "val_split",
    "num_workers": "num_workers",
    "log_every": "log_every_n_steps",
}
ADAPTER_FIELDS: Final[dict[AdapterType, Mapping[str, str]]] = {kind.name: kind.fields for kind in KINDS}


def build_configs(
    module: Any, kind: AdapterType, settings: Mapping[str, Any], output_dir: Path, device: torch.device
) -> tuple[Any, Any]:
    """Upstream's adapter and training configurations, with the fields that this version has.

    Raises:
        Refusal: this version has no field for a setting, or refuses its value.
    """
    fields = ADAPTER_FIELDS[kind]
    for other in KINDS:
        if foreign := [name for name in other.options if settings.get(name) is not None and name not in fields]:
            raise Refusal(
                f"--{foreign[0].replace('_', '-')} is an option of a {other.title}. Leave it out, or train one: "
                f"--adapter-type {other.name}."
            )
    adapter = {fields[name]: settings[name] for name in fields if name in settings}
    training = {known: settings[name] for name, known in TRAINING_FIELDS.items() if name in settings}
    workers = training.get("num_workers", 0)
    precision = {"cuda": "bf16", "xpu": "bf16", "mps": "fp16"}.get(device.type, "fp32")
    ours = {
        "num_workers": 0,  # songs are small; worker processes cost seconds per epoch on Windows
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "mixed_precision": precision,
    }
    training["output_dir"] = str(output_dir.absolute())
    return (
        _build(getattr(module, BY_NAME[kind].config_class), adapter, {}, fields),
        _build(module.TrainingConfig, training, ours, TRAINING_FIELDS),
    )


def _build(cls: Any, given: Mapping[str, Any], ours: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    known = {entry.name for entry in dataclasses.fields(cls)}
    unknown = [f"--{name.replace('_', '-')}" for name, entry in names.items() if entry in given and entry not in known]
    if unknown:
        raise Refusal(f"This ACE-Step's {cls.__name__} has no such setting: {', '.join(unknown)}. Leave it out.")
    try:
        return cls(**{name: value for name, value in ours.items() if name in known} | dict(given))
    except (TypeError, ValueError) as error:
        raise Refusal(f"ACE-Step refuses these settings: {error}") from None
