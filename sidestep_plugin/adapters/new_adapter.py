"""Writes a new adapter: tensors that were computed here, as a folder that ACE-Step loads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import without_nan
from .card import write_card
from .facts import write_training_config
from .header import write_header
from .kinds import Kind, Mean
from .layers import Adapter
from .peft_config import plain_number
from .staging import published, staged

if TYPE_CHECKING:
    import torch


def write_adapter(
    folder: Path, kind: Kind, layers: Mapping[str, Mean], facts: Mapping[str, Any], like: Adapter
) -> Path:
    """Write an adapter into a folder, completely or not at all. Returns the weights file.

    Weights that are in the folder are replaced with all that belongs to them; other files stay. ``rank`` and ``alpha``
    among the facts are filled in from the layers. The adapter shares the settings of another one: its configuration, or
    what ACE-Step wrote into its header. Raises OSError; an older adapter is not changed then.
    """
    from safetensors.torch import save

    told = dict(facts) | {"adapter_type": kind.name}
    if kind.alpha_in_config:
        told |= {"rank": _usual(mean.rank for mean in layers.values()), "alpha": _usual(_alphas(layers))}
    with staged(folder) as stage:
        weights = stage / kind.weight_name
        header = {} if kind.alpha_in_config else _kept(like.file.metadata)
        # save_file() would tell of a full disk by an error of its own, which is no OSError.
        weights.write_bytes(save(_tensors(kind, layers), header | {"format": header.get("format", "pt")}))
        if kind.alpha_in_config:
            config = json.dumps(without_nan(_configuration(layers, told, like)), indent=2, sort_keys=True) + "\n"
            (stage / "adapter_config.json").write_text(config, encoding="utf-8")
        write_training_config(stage, without_nan(told))
        write_card(stage, told)
        write_header(weights, told)
        with published(stage, folder):
            pass
    return folder / kind.weight_name


def _tensors(kind: Kind, layers: Mapping[str, Mean]) -> dict[str, torch.Tensor]:
    import torch

    tensors = {
        kind.saved_name(name, part): tensor.contiguous()
        for name, mean in layers.items()
        for part, tensor in mean.tensors.items()
    }
    if not kind.alpha_in_config:
        tensors |= {kind.saved_name(name, "alpha"): torch.tensor(mean.alpha) for name, mean in layers.items()}
    return tensors


def _configuration(layers: Mapping[str, Mean], facts: Mapping[str, Any], like: Adapter) -> dict[str, Any]:
    """PEFT's configuration. What differs from layer to layer is under the layers' full names, which match only them."""
    alphas = _alphas(layers)
    last = {name: name.rpartition(".")[2] for name in layers}
    known = {key: value for key, value in like.config.items() if not key.endswith("_pattern")}
    return known | {
        "peft_type": "LORA",
        "task_type": known.get("task_type", "FEATURE_EXTRACTION"),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "r": facts["rank"],
        "lora_alpha": facts["alpha"],
        "target_modules": sorted({name if part.isdigit() else part for name, part in last.items()}),
        "rank_pattern": {name: mean.rank for name, mean in layers.items() if mean.rank != facts["rank"]},
        "alpha_pattern": {name: alpha for name, alpha in zip(layers, alphas, strict=True) if alpha != facts["alpha"]},
    }


def _alphas(layers: Mapping[str, Mean]) -> list[float | None]:
    return [plain_number(mean.alpha) for mean in layers.values()]


def _usual(values: Any) -> Any:
    """The most frequent of some values."""
    return Counter(values).most_common(1)[0][0]


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """What ACE-Step needs to load a LoKr, and wrote about itself."""
    return {key: text for key, text in metadata.items() if not key.startswith(("sidestep.", "ss_", "modelspec."))}
