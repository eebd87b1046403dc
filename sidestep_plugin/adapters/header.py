"""Writes the facts about an adapter into the header of its safetensors file.

The keys are our own (``sidestep.*``) and those that other tools show: ModelSpec's ``modelspec.*``, kohya's ``ss_*`` and
diffusers' ``lora_adapter_metadata``. All values in a header are strings.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..files import without_nan
from ..text import counted
from ..variants import guidance, member_of
from .facts import TEXT_FACTS, TEXT_SETTINGS
from .kinds import BY_NAME, title_of
from .kinds.lora import LORA
from .layer_names import in_diffusers, target_in_diffusers
from .layers import Adapter, understand
from .paths import without_paths
from .peft_config import DIFFUSERS_KEY, plain_number
from .weights_file import HASH_KEY, WeightsFile, read_weights_file, write_metadata

PREFIX: Final = "sidestep."  # prefix of our own keys in a header


def write_header(weights: Path, facts: Mapping[str, Any]) -> None:
    """Add the facts to a safetensors file's header. The tensors' bytes do not change. Raises Refusal and OSError."""
    file = read_weights_file(weights)
    write_metadata(file, header_of(file, facts))


def header_of(file: WeightsFile, facts: Mapping[str, Any]) -> dict[str, str]:
    """The header of an adapter: upstream's own entries without local paths, and the facts under everybody's keys."""
    header = {key: text for key, text in file.metadata.items() if not key.startswith(PREFIX)}
    for key, text in header.items():
        header[key] = without_paths(text, facts)
    # Strings as they are, everything else as JSON.
    ours = {
        PREFIX + key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in without_nan(facts).items()
        if value is not None
    }
    for_diffusers: dict[str, str] = {}
    with contextlib.suppress(Refusal):  # unknown layers: diffusers does not know them either
        if (config := _for_diffusers(understand(file))) is not None:
            for_diffusers = {DIFFUSERS_KEY: json.dumps(config)}
    return header | for_diffusers | _modelspec(facts) | _kohya(facts) | _hot_step(facts) | ours


def facts_in_header(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The facts in a header under our prefix. None if there are none."""
    facts = {
        key.removeprefix(PREFIX): _value(key.removeprefix(PREFIX), text)
        for key, text in metadata.items()
        if key.startswith(PREFIX)
    }
    return facts or None


def usage_hint(facts: Mapping[str, Any]) -> str:
    """How to generate, in one line: "ACE-Step 1.5 base: shift 1.0, 50 steps, CFG on"."""
    trigger = f"; trigger: {facts['trigger']}" if facts.get("trigger") else ""
    steps = counted(facts.get("num_inference_steps"), "step")
    cfg = guidance(facts.get("model_variant"))
    return f"{model_in_words(facts)}: shift {facts.get('shift')}, {steps}, CFG {cfg}{trigger}"


def model_in_words(facts: Mapping[str, Any]) -> str:
    """The model that an adapter is for, such as "ACE-Step 1.5 XL base"."""
    size = "XL " if facts.get("model_size") == "XL" else ""
    return f"ACE-Step 1.5 {size}{member_of(str(facts.get('model_variant')), str(facts.get('model_name') or ''))}"


def _for_diffusers(adapter: Adapter) -> dict[str, Any] | None:
    """The configuration for the header of a LoRA. None for other adapters, and if an alpha is unknown.

    diffusers passes the entries with the prefix ``transformer.`` to PEFT's ``LoraConfig``, which refuses unknown ones.
    It also renames the layers, so ranks and alphas that differ are listed under the layers' full names in diffusers.
    """
    layers = [layer for layer in adapter.layers.values() if layer.rank]
    if adapter.kind != LORA.name or not layers or any(layer.alpha is None for layer in layers):
        return None
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    alphas = {in_diffusers(layer.name): plain_number(layer.alpha) for layer in layers if layer.alpha != alpha}
    entries = {
        "r": rank,
        "lora_alpha": plain_number(alpha),
        "target_modules": sorted({target_in_diffusers(layer.name) for layer in layers}),
        "rank_pattern": {in_diffusers(layer.name): layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": alphas,
        "use_dora": adapter.is_dora,
    }
    return {f"transformer.{name}": value for name, value in entries.items()}


def _modelspec(facts: Mapping[str, Any]) -> dict[str, str]:
    """ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec): the required keys, then keys that tools show."""
    kind = title_of(facts.get("adapter_type"))
    songs = f" on {counted(facts['songs'], 'song')}" if facts.get("songs") else ""
    entries = {
        "sai_model_spec": "1.0.1",
        # No id is registered for ACE-Step. XL layers have other widths, so XL is a different architecture.
        "architecture": f"ace-step-1.5{'-xl' if facts.get('model_size') == 'XL' else ''}/{facts.get('adapter_type')}",
        "implementation": "https://github.com/ace-step/ACE-Step-1.5",
        "title": facts.get("title"),
        "description": f"{kind} for {facts.get('model_name') or 'ACE-Step 1.5'}, rank {facts.get('rank')}, alpha "
        f"{facts.get('alpha')}, trained{songs} for {counted(facts.get('training_steps'), 'step')}; timesteps: "
        f"{facts.get('timestep_law')}; condition dropout: {facts.get('cfg_ratio')}.",
        "author": facts.get("author"),
        "license": facts.get("license"),
        "date": facts.get("created"),
        "usage_hint": usage_hint(facts) if facts.get("shift") is not None else None,
        "trigger_phrase": facts.get("trigger"),
    }
    texts = {f"modelspec.{key}": str(value) for key, value in entries.items() if value is not None}
    return texts | {HASH_KEY: ""}  # filled in while the tensors are copied


def _kohya(facts: Mapping[str, Any]) -> dict[str, str]:
    """Those ``ss_*`` keys of kohya-ss/sd-scripts that have the same meaning here."""
    kind = BY_NAME.get(str(facts.get("adapter_type")))
    entries = {
        "ss_base_model_version": "ace_step_15_xl" if facts.get("model_size") == "XL" else "ace_step_15",
        "ss_sd_model_name": facts.get("model_name") or None,
        "ss_output_name": facts.get("title"),
        "ss_network_module": None if kind is None else kind.network_module,
        "ss_network_args": json.dumps(dict(kind.network_args)) if kind is not None and kind.network_args else None,
        "ss_network_dim": facts.get("rank"),
        "ss_network_alpha": facts.get("alpha"),
        "ss_network_dropout": facts.get("dropout"),
        "ss_timestep_sampling": facts.get("timestep_law"),
        # In kohya's scripts this is the shift of the training timesteps. Here only a schedule is shifted.
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


def _hot_step(facts: Mapping[str, Any]) -> dict[str, str]:
    """The keys from which HOT-Step puts the trigger into prompts by itself (scragnog/HOT-Step-CPP, stMetadata.ts)."""
    if not facts.get("trigger"):
        return {}
    position = "append" if facts.get("trigger_position") == "after" else "prepend"  # it knows these two
    return {"hot_step_trigger": str(facts["trigger"]), "hot_step_trigger_position": position}


def _trained_shift(facts: Mapping[str, Any]) -> float | None:
    """Shift of the training timesteps: 1 for a continuous law, else computed from the schedule's second value."""
    schedule = facts.get("timestep_schedule")
    if not schedule:
        return 1.0 if facts.get("timestep_mode") == "continuous" else None
    # t' = s·t / (1 + (s−1)·t) at t = 7/8, solved for s.
    second = float(schedule[1])
    return round(second / (7.0 * (1.0 - second)), 6)


def _value(key: str, text: str) -> Any:
    if key in TEXT_FACTS or key in TEXT_SETTINGS or (key.endswith("_version") and key != "schema_version"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str | dict) else value
