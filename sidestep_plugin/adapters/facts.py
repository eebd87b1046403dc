"""What an adapter says about itself: the keys and their meaning, and the file beside the weights that holds them.

Beside the weights they are flat keys in ``training_config.json``. In the safetensors header they are texts under the
prefix ``sidestep.``, and under the keys that other people's tools show: ModelSpec's ``modelspec.*``, kohya's ``ss_*``
and diffusers' ``lora_adapter_metadata``. ``schema_version`` tells how to read them. Nothing in them is a path: an
adapter is shared, and the folders of whoever trained it are nobody's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..files import read_json_object, replacing

FILE_NAME: Final = "training_config.json"
SCHEMA_VERSION: Final = 1

FACTS: Final = {
    "schema_version": "version of these keys, a whole number; a newer one is read as far as it is known",
    "title": "name of the adapter, for people (--title)",
    "author": "who made it (--author)",
    "trigger": "words to put into the prompt (--trigger)",
    "license": "under which terms it may be used (--license)",
    "created": "when it was saved, ISO 8601 in UTC",
    "model_name": "folder name of the model that it was trained on, never a path",
    "model_variant": "turbo, base or sft",
    "model_size": "XL, or standard",
    "shift": "shift to generate with; no training value depends on it",
    "num_inference_steps": "steps to generate with; no training value depends on it",
    "timestep_mode": "discrete or continuous",
    "timestep_law": "how training timesteps were drawn, in words",
    "timestep_mu": "mean of the normal draws behind the logit-normal law, null when discrete",
    "timestep_sigma": "their standard deviation, null when discrete",
    "timestep_schedule": "the discrete training timesteps, noisiest first, null when continuous",
    "cfg_ratio": "probability in [0, 1] with which a row was trained without its condition",
    "adapter_type": "lora or lokr",
    "rank": "rank, of a LoKr the dimension",
    "alpha": "alpha; the strength is alpha / rank",
    "dropout": "dropout in the adapter's layers",
    "target_modules": "names of the adapted layers",
    "trained_layers": "number of layers that were trained; any others in the file hold zeros and change nothing",
    "songs": "number of preprocessed songs in the dataset folder",
    "epoch": "epochs done when it was saved, null when ACE-Step did not say",
    "global_step": "optimizer steps done when it was saved, null when ACE-Step did not say",
    "training_steps": "training steps begun when it was saved",
}
"""The keys of ``training_config.json`` and what they mean. Below them follow ACE-Step's training settings that are
numbers, switches or known words, under ACE-Step's names, and the versions of the programs, as ``*_version``."""

TEXT_FACTS: Final = frozenset(
    {"title", "author", "trigger", "license", "created", "model_name", "model_variant", "model_size", "timestep_mode"}
    | {"timestep_law", "adapter_type"}
)
"""Those of them that are texts."""

# Of upstream's settings those texts that are known to be no paths; unknown ones are left out.
TEXT_SETTINGS: Final = frozenset({"mixed_precision", "optimizer", "optimizer_type", "scheduler", "scheduler_type"})


def write_training_config(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write the facts into a folder, whole or not at all | returns the file | raises OSError."""
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(folder / FILE_NAME) as stream:
        stream.write(text.encode("utf-8"))
    return folder / FILE_NAME


def read_training_config(folder: Path) -> dict[str, Any] | None:
    """The facts in a folder; None when it has none that can be read."""
    try:
        return read_json_object(folder / FILE_NAME)
    except (OSError, ValueError):  # not there, not UTF-8, not JSON, absurdly nested
        return None
