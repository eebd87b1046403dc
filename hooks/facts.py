"""Gathers the facts about an adapter, under the keys of :data:`sidestep_plugin.adapters.facts.FACTS`."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sidestep_plugin.adapters.facts import SCHEMA_VERSION, TEXT_SETTINGS
from sidestep_plugin.adapters.kinds import BY_NAME
from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.adapters.targets import trained_shapes
from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import without_nan
from sidestep_plugin.registry import version_of
from sidestep_plugin.run import Run, SavedAdapter
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.timesteps.treatment import Treatment
from sidestep_plugin.variants import words_of

_SONGS: Final = "sidestep.number_of_songs"
_VERSIONS: Final = ("sidestep-plugin", "torch", "peft", "lycoris-lora", "safetensors")

# Upstream's TrainingConfig has turbo's shift and steps for every model, and local folders.
_NOT_A_SETTING: Final = frozenset({"shift", "num_inference_steps", "output_dir", "pin_memory_device"})


def describe_adapter(
    run: Run, saved: SavedAdapter, treatment: Treatment, other_sampler: str | None = None
) -> dict[str, Any]:
    """The facts about a saved adapter, ready for JSON, in reading order.

    Args:
        other_sampler: name of another plugin that sampled the timesteps in place of the treatment's law.
    """
    return describe_run(run, treatment, other_sampler) | {
        "trained_layers": _trained_layers(saved.weights),
        "epoch": saved.epoch,
        "global_step": saved.global_step,
    }


def describe_run(run: Run, treatment: Treatment, other_sampler: str | None = None) -> dict[str, Any]:
    """The same facts about a run without a saved adapter: epoch, optimizer steps and trained layers are None."""
    adapter, options = run.adapter_config, run.options
    # A folder's name may contain bytes that are not UTF-8.
    model_name = treatment.model_name.encode("utf-8", "replace").decode("utf-8")
    kind, targets = BY_NAME[run.adapter_type], getattr(adapter, "target_modules", None)
    told: dict[str, Any] = {}
    for tell in run.facts:
        # JSON has neither NaN nor infinity, and a number that is none says nothing: it is left out.
        told |= {name: value for name, value in tell().items() if not isinstance(value, float) or math.isfinite(value)}
    facts = {
        "schema_version": SCHEMA_VERSION,
        "title": options.get("title") or f"{kind.title} for {model_name or 'ACE-Step 1.5'}",
        "author": options.get("author"),
        "trigger": options.get("trigger"),
        "license": options.get("license"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_name": model_name,
        "model_variant": treatment.variant,
        "model_size": "XL" if _is_xl(run, model_name) else "standard",
        "shift": treatment.shift,
        "num_inference_steps": treatment.num_inference_steps,
        **_timesteps(treatment, other_sampler),
        "cfg_ratio": treatment.cfg_ratio,
        **told,
        "adapter_type": run.adapter_type,
        "rank": getattr(adapter, kind.fields["rank"], None),
        "alpha": kind.effective_alpha(adapter, trained_shapes(run.model, kind.name, adapter)),
        "dropout": getattr(adapter, "dropout", getattr(adapter, "lora_dropout", None)),
        "target_modules": targets if isinstance(targets, str | None) else [str(name) for name in targets],
        "trained_layers": None,
        "songs": songs_of(run),
        "epoch": None,
        "global_step": None,
        "training_steps": run.steps,
    }
    versions = {f"{name.replace('-', '_')}_version": found for name in _VERSIONS if (found := version_of(name))}
    # Facts win: a future setting of upstream's may have the same name.
    return (
        dict(without_nan(facts))
        | {name: value for name, value in _training_settings(run.training_config).items() if name not in facts}
        | versions
    )


def _timesteps(treatment: Treatment, other_sampler: str | None) -> dict[str, Any]:
    if other_sampler is not None:
        told: dict[str, Any] = {"timestep_mode": None, "timestep_law": f"sampled by the plugin {other_sampler}"}
        return told | dict.fromkeys(("timestep_mu", "timestep_sigma", "timestep_schedule"))
    continuous = treatment.timestep_mode == "continuous"
    return {
        "timestep_mode": treatment.timestep_mode,
        "timestep_law": "maximum of two logit-normal draws" if continuous else "uniform over a schedule",
        "timestep_mu": treatment.mu,
        "timestep_sigma": treatment.sigma,
        "timestep_schedule": list(treatment.schedule) or None,
    }


def _is_xl(run: Run, model_name: str) -> bool:
    """Whether the model is XL: its decoder is wider than its condition encoder, or its name has the word ``xl``."""
    config = getattr(run.model, "config", None)
    width = getattr(config, "encoder_hidden_size", None)
    return "xl" in words_of(model_name) or (width is not None and width != getattr(config, "hidden_size", None))


def _trained_layers(weights: Path) -> int | None:
    """Number of trained layers in a weights file. None if unknown, for example of a pickle."""
    try:
        adapter = read_adapter(weights)
        return len(adapter.layers) - len(adapter.untrained)
    except (Refusal, OSError):
        return None


def songs_of(run: Run) -> int | None:
    """The number of songs in the dataset folder when this was first asked: the folder may change while it trains."""
    if _SONGS not in run.state:
        folder = run.tensor_dir
        run.state[_SONGS] = None if folder is None or not folder.is_dir() else len(songs_in(folder)) or None
    songs: int | None = run.state[_SONGS]
    return songs


def _training_settings(config: Any) -> dict[str, Any]:
    """Upstream's training settings that are numbers, booleans or known words."""
    if not dataclasses.is_dataclass(config):
        return {}
    settings = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}
    return {
        # JSON has no infinity and no NaN, so these are written as words.
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
        if name not in _NOT_A_SETTING and (isinstance(value, bool | int | float) or name in TEXT_SETTINGS)
    }
