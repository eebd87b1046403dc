"""The facts that are saved with an adapter: their keys, what they mean, and ``training_config.json``, which holds them.

That file lies beside the weights and has flat keys. The safetensors header has the same facts as strings, with the
prefix ``sidestep.`` and under the keys that other tools show (see :mod:`.header`). ``schema_version`` tells how to read
them. No value is a path: adapters are shared, and local folders are private.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..files import read_json_object, replacing

FILE_NAME: Final = "training_config.json"
BEST: Final = "checkpoints/best"
"""Folder in the output folder for the checkpoint with the lowest validation loss, as upstream calls it too."""
SCHEMA_VERSION: Final = 1

FACTS: Final = {
    "schema_version": "version of these keys, a whole number; of a newer version, known keys are read",
    "title": "name of the adapter (--title)",
    "author": "author of the adapter (--author)",
    "trigger": "trigger words for the prompt (--trigger)",
    "trigger_position": "where they go: before, after or instead of the caption; left out if the songs do not say",
    "license": "licence of the adapter (--license)",
    "created": "when it was saved, ISO 8601 in UTC",
    "model_name": "folder name of the base model, never a path",
    "model_variant": "turbo, base or sft",
    "model_size": "XL or standard",
    "shift": "shift for generating; it has no effect on training",
    "num_inference_steps": "steps for generating; it has no effect on training",
    "timestep_mode": "discrete or continuous",
    "timestep_law": "how training timesteps were sampled, in words",
    "timestep_mu": "mean of the logit-normal distribution, null if discrete",
    "timestep_sigma": "standard deviation of the logit-normal distribution, null if discrete",
    "timestep_schedule": "the discrete training timesteps, noisiest first, null if continuous",
    "cfg_ratio": "condition dropout: probability in [0, 1] that a row was trained without its condition",
    "mask_nan": "true if NaN was set to zero in rows that the songs' masks hide (--mask-nan); else left out",
    "crop_seconds": "seconds of the random window of each song (--crop-seconds); left out for whole songs",
    "mask_padding": "true if padding of shorter prompts in a batch was masked (--mask-padding); else left out",
    "frozen_weights": "bf16 if the base model's weights stayed in bf16 for the training; else left out",
    "base_weights": "what the base model was quantized to for the training, as int8 (--base-weights); else left out",
    "base_weights_loss_change": "what that changed the base model's loss on one song by, as a fraction; else left out",
    "processes": "number of GPUs, each with a process of its own; left out for a single one",
    "compiled": "true if the decoder's blocks were compiled for the training (--compile); else left out",
    "init_from": "adapter whose weights it was started from (--init-from): title and hash; else left out",
    "adapter_type": "lora or lokr",
    "rank": "rank; for a LoKr, the dimension",
    "alpha": "alpha; the strength is alpha / rank",
    "dropout": "dropout of the adapter's layers",
    "target_modules": "target modules, as set for the training",
    "trained_layers": "number of trained layers; any other layers in the file hold zeros and change nothing",
    "copy_strength": "what this copy was multiplied by (export --strength); else left out",
    "average_of": "what it is the mean of (--average, acestep-train average); else left out, as are the next",
    "average_steps": "number of optimizer steps that a running mean was made of (--average)",
    "average_best_of": "numbers of last checkpoints that it was chosen among, by the loss on some songs (--best-of)",
    "average_energy": "share of the exact mean's energy that it holds after it was cut back to its rank, from 0 to 1",
    "songs": "number of preprocessed songs in the dataset folder",
    "held_out_songs": "number of those that were not trained on (--validate); left out without",
    "validation_songs": "number of songs that were validated on; left out without validation, as are the next four",
    "validation_epoch": "epoch of the validation that has measured these weights; else left out, as are the next",
    "validation_loss": "mean loss on the held-out songs, at fixed timesteps with fixed noise",
    "validation_change": "that loss relative to the model without adapter: -0.02 is 2 % lower",
    "validation_improved": "share of those timesteps, from 0 to 1, at which it is lower than without adapter",
    "epoch": "epochs that it was trained for, null if unknown",
    "global_step": "optimizer steps done when it was saved, null if ACE-Step did not say",
    "training_steps": "training steps started when it was saved",
}
"""The keys of ``training_config.json`` and what they mean. After them come ACE-Step's training settings under their own
names (numbers, booleans and known words only), and the versions of packages as ``*_version``."""

TEXT_FACTS: Final = frozenset(
    {"title", "author", "trigger", "trigger_position", "license", "created", "model_name", "model_variant"}
    | {"model_size", "timestep_mode", "timestep_law", "adapter_type", "average_of", "average_best_of", "init_from"}
    | {"frozen_weights", "base_weights"}
)
"""Those of them that are strings."""

SWITCHES: Final = frozenset({"mask_nan", "mask_padding", "compiled"})  # those of them that are true or left out

# Upstream's settings that are strings and known not to be paths. Unknown strings are left out.
TEXT_SETTINGS: Final = frozenset({"mixed_precision", "optimizer", "optimizer_type", "scheduler", "scheduler_type"})


def write_training_config(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write the facts into a folder, completely or not at all. Returns the file. Raises OSError."""
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(folder / FILE_NAME) as stream:
        stream.write(text.encode("utf-8"))
    return folder / FILE_NAME


def read_training_config(folder: Path) -> dict[str, Any] | None:
    """The facts in a folder. None if there are none, or if they cannot be read."""
    try:
        return read_json_object(folder / FILE_NAME)
    except (OSError, ValueError):  # missing, not UTF-8, not JSON, nested too deeply
        return None


# -- the best adapter of a training, and its finished one --------------------------------------------------------------


def better_than(weights: Path) -> str | None:
    """:func:`better_than_final` for the weights file of a training's finished adapter; None for any other adapter."""
    folder = weights.absolute().parent
    final = folder.parent if folder.name == "adapter" else folder
    return better_than_final(final.parent) if final.name == "final" else None


def better_than_final(output: Path) -> str | None:
    """A sentence when the best adapter in a training's output folder is better than the finished one.

    It has both validations and where the better one is. None if the finished one is as good, or without a validation of
    both on equally many songs.
    """
    best, final = _facts_in(output / BEST), _facts_in(output / "final")
    one, other = (_plain_float(facts.get("validation_change")) for facts in (best, final))
    if one is None or other is None or one >= other or best.get("validation_songs") != final.get("validation_songs"):
        return None
    return (
        f"best (epoch {best.get('epoch')}, {100 * one:+.2f} % on the held-out songs) is better than final (epoch "
        f"{final.get('epoch')}, {100 * other:+.2f} %): {output / BEST}"
    )


def _facts_in(folder: Path) -> Mapping[str, Any]:
    return read_training_config(folder / "adapter") or read_training_config(folder) or {}


def _plain_float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
