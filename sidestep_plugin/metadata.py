"""What an adapter says about itself: builds it from a run, and writes it beside the weights.

The facts are flat keys in ``training_config.json``; the file's ``schema_version`` tells how to read it. Nothing in it
is a path: an adapter is shared, and the folders of whoever trained it are nobody's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .run import Run, SavedAdapter
from .variant import Treatment

FILE_NAME: Final = "training_config.json"
SCHEMA_VERSION: Final = 1

_VERSIONS: Final = ("sidestep-plugin", "torch", "peft", "lycoris-lora", "safetensors")

# Upstream's TrainingConfig holds its own idea of shift and steps (turbo's, for every model), and folders.
_NOT_A_SETTING: Final = frozenset({"shift", "num_inference_steps", "output_dir", "pin_memory_device"})
# Text settings that are known to be no paths; unknown ones are left out.
_TEXT_SETTINGS: Final = frozenset({"mixed_precision", "optimizer", "optimizer_type", "scheduler", "scheduler_type"})


def describe_adapter(run: Run, saved: SavedAdapter, treatment: Treatment) -> dict[str, Any]:
    """The facts of one saved adapter, JSON-ready, in the order in which people read them."""
    adapter = run.adapter_config
    law = "maximum of two logit-normal draws" if treatment.timestep_mode == "continuous" else "uniform over a schedule"
    facts = {
        "schema_version": SCHEMA_VERSION,
        "model_name": treatment.model_name,
        "model_variant": treatment.variant,
        "shift": treatment.shift,
        "num_inference_steps": treatment.num_inference_steps,
        "timestep_mode": treatment.timestep_mode,
        "timestep_law": law,
        "timestep_mu": treatment.mu,
        "timestep_sigma": treatment.sigma,
        "timestep_schedule": list(treatment.schedule) or None,
        "cfg_ratio": treatment.cfg_ratio,
        "adapter_type": saved.adapter_type,
        "rank": _first(adapter, "r", "linear_dim"),
        "alpha": _first(adapter, "alpha", "lora_alpha", "linear_alpha"),
        "dropout": _first(adapter, "dropout", "lora_dropout"),
        "target_modules": _names(getattr(adapter, "target_modules", None)),
        "epoch": saved.epoch,
        "global_step": saved.global_step,
        "training_steps": run.steps,
    }
    versions = {f"{name.replace('-', '_')}_version": version for name, version in _versions().items()}
    # Facts win: a future setting of upstream's may bear one of their names.
    return (
        facts
        | {name: value for name, value in _training_settings(run.training_config).items() if name not in facts}
        | versions
    )


def write_training_config(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write the facts into a folder, whole or not at all | returns the file | raises OSError."""
    file = folder / FILE_NAME
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{FILE_NAME}.", suffix=".tmp")
    try:
        # Closed before it is renamed: Windows renames no open file.
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files for their owner alone; an adapter's folder is as open as its weights are.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    return file


def read_training_config(folder: Path) -> dict[str, Any] | None:
    """The facts in a folder; None when it has none that can be read."""
    try:
        facts = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, not UTF-8, not JSON, absurdly nested
        return None
    return facts if isinstance(facts, dict) else None


def _training_settings(config: Any) -> dict[str, Any]:
    """Upstream's training settings that are numbers, switches or known words."""
    if not dataclasses.is_dataclass(config):
        return {}
    settings = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}
    return {
        # JSON has no infinity: a setting of it is written as a word.
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
        if name not in _NOT_A_SETTING and (isinstance(value, bool | int | float) or name in _TEXT_SETTINGS)
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _first(config: Any, *names: str) -> Any:
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def _names(value: Any) -> list[str] | str | None:
    return value if value is None or isinstance(value, str) else [str(name) for name in value]
