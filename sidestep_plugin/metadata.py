"""What an adapter says about itself: the facts of a run, written beside the weights and into their header, and read.

Beside the weights they are flat keys in ``training_config.json``. In the safetensors header they are texts under the
prefix ``sidestep.``, and under the keys that other people's tools show: ModelSpec's ``modelspec.*``, kohya's ``ss_*``
and diffusers' ``lora_adapter_metadata``. ``schema_version`` tells how to read them. Nothing in them is a path: an
adapter is shared, and the folders of whoever trained it are nobody's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from .adapter import DIFFUSERS_KEY, diffusers_config, understand
from .dataset import songs_in
from .errors import Refusal
from .files import read_json_object, replacing
from .run import Run, SavedAdapter
from .variant import Treatment, words_of
from .weights_file import HASH_KEY, WeightsFile, read_weights_file, write_metadata

FILE_NAME: Final = "training_config.json"
SCHEMA_VERSION: Final = 1
PREFIX: Final = "sidestep."

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

_VERSIONS: Final = ("sidestep-plugin", "torch", "peft", "lycoris-lora", "safetensors")

# Upstream's TrainingConfig holds its own idea of shift and steps (turbo's, for every model), and folders.
_NOT_A_SETTING: Final = frozenset({"shift", "num_inference_steps", "output_dir", "pin_memory_device"})
# Text settings that are known to be no paths; unknown ones are left out.
_TEXT_SETTINGS: Final = frozenset({"mixed_precision", "optimizer", "optimizer_type", "scheduler", "scheduler_type"})


def describe_adapter(
    run: Run, saved: SavedAdapter, treatment: Treatment, other_sampler: str | None = None
) -> dict[str, Any]:
    """The facts of one saved adapter, JSON-ready, in the order in which people read them.

    Args:
        other_sampler: name of the plugin that sampled the timesteps otherwise than the treatment says.
    """
    return describe_run(run, treatment, other_sampler) | {"epoch": saved.epoch, "global_step": saved.global_step}


def describe_run(run: Run, treatment: Treatment, other_sampler: str | None = None) -> dict[str, Any]:
    """The same facts of a run, of which nothing has been saved: without epoch and optimizer steps."""
    adapter, options = run.adapter_config, run.options
    # A folder's name may be bytes that are no text.
    model_name = treatment.model_name.encode("utf-8", "replace").decode("utf-8")
    kind = "LoRA" if run.adapter_type == "lora" else "LoKr"
    facts = {
        "schema_version": SCHEMA_VERSION,
        "title": options.get("title") or f"{kind} for {model_name or 'ACE-Step 1.5'}",
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
        "adapter_type": run.adapter_type,
        "rank": _first(adapter, "r", "linear_dim"),
        "alpha": _first(adapter, "alpha", "lora_alpha", "linear_alpha"),
        "dropout": _first(adapter, "dropout", "lora_dropout"),
        "target_modules": _names(getattr(adapter, "target_modules", None)),
        "songs": _songs(run.tensor_dir),
        "epoch": None,
        "global_step": None,
        "training_steps": run.steps,
    }
    versions = {f"{name.replace('-', '_')}_version": version for name, version in _versions().items()}
    # Facts win: a future setting of upstream's may bear one of their names.
    return (
        facts
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


def guidance(variant: object) -> str:
    """Whether to generate with classifier-free guidance: turbo is distilled to do without."""
    return "off" if variant == "turbo" else "on"


# -- beside the weights ----------------------------------------------------------------------------------------------


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


def forget_folders(folder: Path, model_name: str) -> None:
    """Take the trainer's local paths out of what PEFT writes beside the weights: its configuration and its README.

    PEFT notes the model's folder as ``base_model_name_or_path``; loading an adapter does not read it.

    Raises:
        OSError: a file cannot be written; it is as it was.
    """
    file = folder / "adapter_config.json"
    try:
        config = read_json_object(file)
    except (OSError, ValueError):
        return
    place = config.get("base_model_name_or_path")
    if not isinstance(place, str) or not _is_path(place):
        return
    name = model_name or "ACE-Step-1.5"
    readme = folder / "README.md"
    # The README first: as long as the configuration knows the path, an interrupted attempt can be made again.
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="surrogateescape")
        with replacing(readme) as stream:
            stream.write(text.replace(place, name).encode("utf-8", "surrogateescape"))
    with replacing(file) as stream:
        stream.write((json.dumps(config | {"base_model_name_or_path": name}, indent=2) + "\n").encode("utf-8"))


# -- in the header ---------------------------------------------------------------------------------------------------


def write_header(weights: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts into a safetensors file's header, beside what stands there; the tensors stay byte for byte.

    Raises:
        OSError: the file cannot be written; it is as it was.
        Refusal: it is no safetensors file.
    """
    file = read_weights_file(weights)
    write_metadata(file, header_of(file, facts))


def header_of(file: WeightsFile, facts: Mapping[str, Any]) -> dict[str, str]:
    """The header texts of an adapter: upstream's own without its paths, and the facts under everybody's keys."""
    header = {key: text for key, text in file.metadata.items() if not key.startswith(PREFIX)}
    for key, text in header.items():
        header[key] = _without_paths(text, facts)
    # A list or null in JSON, a plain text as it is.
    ours = {
        PREFIX + key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in facts.items()
        if value is not None
    }
    for_diffusers: dict[str, str] = {}
    with contextlib.suppress(Refusal):  # layers that nobody knows: then diffusers does not know them either
        if (config := diffusers_config(understand(file))) is not None:
            for_diffusers = {DIFFUSERS_KEY: json.dumps(config)}
    return header | for_diffusers | _modelspec(facts) | _kohya(facts) | ours


def facts_in_header(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The facts that a header carries under our prefix; None when there are none."""
    facts = {
        key.removeprefix(PREFIX): _value(key.removeprefix(PREFIX), text)
        for key, text in metadata.items()
        if key.startswith(PREFIX)
    }
    return facts or None


def usage_hint(facts: Mapping[str, Any]) -> str:
    """One sentence that says how to generate: "ACE-Step 1.5 base: shift 1.0, 50 steps, CFG on"."""
    size = "XL " if facts.get("model_size") == "XL" else ""
    variant = facts.get("model_variant")
    trigger = f"; trigger: {facts['trigger']}" if facts.get("trigger") else ""
    return (
        f"ACE-Step 1.5 {size}{variant}: shift {facts.get('shift')}, {facts.get('num_inference_steps')} steps, "
        f"CFG {guidance(variant)}{trigger}"
    )


def _modelspec(facts: Mapping[str, Any]) -> dict[str, str]:
    """ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec): required keys first, then those that tools show."""
    kind = "LoRA" if facts.get("adapter_type") == "lora" else "LoKr"
    songs = f" on {facts['songs']} songs" if facts.get("songs") else ""
    entries = {
        "sai_model_spec": "1.0.1",
        # No id is registered for ACE-Step; XL layers have other widths, so they are another architecture.
        "architecture": f"ace-step-1.5{'-xl' if facts.get('model_size') == 'XL' else ''}/{facts.get('adapter_type')}",
        "implementation": "https://github.com/ace-step/ACE-Step-1.5",
        "title": facts.get("title"),
        "description": f"{kind} for {facts.get('model_name') or 'ACE-Step 1.5'}, rank {facts.get('rank')}, alpha "
        f"{facts.get('alpha')}, trained{songs} for {facts.get('training_steps')} steps; timesteps: "
        f"{facts.get('timestep_law')}; condition dropout: {facts.get('cfg_ratio')}.",
        "author": facts.get("author"),
        "license": facts.get("license"),
        "date": facts.get("created"),
        "usage_hint": usage_hint(facts),
        "trigger_phrase": facts.get("trigger"),
    }
    texts = {f"modelspec.{key}": str(value) for key, value in entries.items() if value is not None}
    return texts | {HASH_KEY: ""}  # computed while the tensors are copied


def _kohya(facts: Mapping[str, Any]) -> dict[str, str]:
    """The ``ss_*`` keys of kohya-ss/sd-scripts that mean the same thing here."""
    lora = facts.get("adapter_type") == "lora"
    entries = {
        "ss_base_model_version": "ace_step_15_xl" if facts.get("model_size") == "XL" else "ace_step_15",
        "ss_sd_model_name": facts.get("model_name") or None,
        "ss_output_name": facts.get("title"),
        "ss_network_module": "peft.tuners.lora" if lora else "lycoris",
        "ss_network_args": None if lora else json.dumps({"algo": "lokr"}),
        "ss_network_dim": facts.get("rank"),
        "ss_network_alpha": facts.get("alpha"),
        "ss_network_dropout": facts.get("dropout"),
        "ss_timestep_sampling": facts.get("timestep_law"),
        # kohya's is the shift of the training timesteps. Only a schedule has one here; a continuous law is not shifted.
        "ss_discrete_flow_shift": _trained_shift(facts),
        "ss_logit_mean": facts.get("timestep_mu"),
        "ss_logit_std": facts.get("timestep_sigma"),
        "ss_epoch": facts.get("epoch"),
        "ss_steps": facts.get("global_step"),
        "ss_num_epochs": facts.get("max_epochs"),
        "ss_learning_rate": facts.get("learning_rate"),
        "ss_batch_size_per_device": facts.get("batch_size"),
        "ss_gradient_accumulation_steps": facts.get("gradient_accumulation_steps"),
        "ss_lr_warmup_steps": facts.get("warmup_steps"),
        "ss_max_grad_norm": facts.get("max_grad_norm"),
        "ss_mixed_precision": facts.get("mixed_precision"),
        "ss_seed": facts.get("seed"),
    }
    return {key: str(value) for key, value in entries.items() if value is not None}


def _trained_shift(facts: Mapping[str, Any]) -> float | None:
    """Shift of the training timesteps: 1 for a continuous law, else what makes the schedule's second value."""
    schedule = facts.get("timestep_schedule")
    if not schedule:
        return 1.0 if facts.get("timestep_mode") == "continuous" else None
    # t' = s·t / (1 + (s−1)·t) at t = 7/8, solved for s.
    second = float(schedule[1])
    return round(second / (7.0 * (1.0 - second)), 6)


def _value(key: str, text: str) -> Any:
    if key in TEXT_FACTS or key in _TEXT_SETTINGS or (key.endswith("_version") and key != "schema_version"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str | dict) else value


# -- paths -----------------------------------------------------------------------------------------------------------

_PLACE: Final = re.compile(r"(.*_)?(dir|dirs|path|paths|folder|file|root|location)", re.IGNORECASE)


def _is_path(text: str) -> bool:
    return re.match(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:", text) is not None


def _without_paths(text: str, facts: Mapping[str, Any]) -> str:
    """A header text without local paths: a path itself becomes empty, in JSON the entries that hold one are left out.

    Upstream's record of a LoKr's run (``run_metadata``) also holds turbo's shift and steps for every model; they
    become those of this adapter, so that a file never says two things.
    """
    if _is_path(text):
        return ""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value = json.loads(text)
        cleaned = _cleaned(value, facts)
    except ValueError:
        return text
    except RecursionError:  # nested as nothing is that somebody wrote: whether there is a path in it is not known
        return ""
    return text if cleaned == value else json.dumps(cleaned, ensure_ascii=False)


def _cleaned(value: Any, facts: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        return {
            key: facts[key] if key in ("shift", "num_inference_steps") and key in facts else _cleaned(entry, facts)
            for key, entry in value.items()
            if not (isinstance(entry, str) and (_PLACE.fullmatch(key) or _is_path(entry)))
        }
    if isinstance(value, list):
        return [_cleaned(entry, facts) for entry in value if not (isinstance(entry, str) and _is_path(entry))]
    return value


# -- gathering -------------------------------------------------------------------------------------------------------


def _is_xl(run: Run, model_name: str) -> bool:
    """XL models have a decoder wider than their condition encoder, and ``xl`` in the official names."""
    config = getattr(run.model, "config", None)
    width = getattr(config, "encoder_hidden_size", None)
    return "xl" in words_of(model_name) or (width is not None and width != getattr(config, "hidden_size", None))


def _songs(folder: Path | None) -> int | None:
    return None if folder is None or not folder.is_dir() else len(songs_in(folder)) or None


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
