"""LoKr adapters, through LyCORIS if it is installed."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from acestep.training.configs import LoKRConfig
from acestep.training.log import logger
from acestep.training.path_safety import safe_path

try:
    from lycoris import LycorisNetwork, create_lycoris

    LYCORIS_AVAILABLE = True
except ImportError:
    LYCORIS_AVAILABLE = False


def check_lycoris_available() -> bool:
    """Whether LoKr can be trained here."""
    return LYCORIS_AVAILABLE


def inject_lokr_into_dit(
    model: Any, lokr_config: LoKRConfig, multiplier: float = 1.0
) -> tuple[Any, Any, dict[str, Any]]:
    """Attach LoKr modules to the decoder, of which those of the target modules train.

    Returns: the model, the LyCORIS network and figures about it.
    """
    if not LYCORIS_AVAILABLE:
        raise ImportError("LoKr needs LyCORIS: pip install lycoris-lora")
    model.requires_grad_(False)
    settings = lokr_config.to_dict()
    targets = settings.pop("target_modules")
    LycorisNetwork.apply_preset(dict.fromkeys(("unet_target_name", "target_name"), targets))
    if settings.pop("weight_decompose"):
        settings["dora_wd"] = True
    network = create_lycoris(model.decoder, multiplier, algo="lokr", **settings)
    network.apply_to()
    model.decoder._lycoris_net = network  # registers its weights as the decoder's
    for module in network.loras:
        module.requires_grad_(any(target in module.lora_name for target in targets))
    trainable = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    logger.info(f"LoKr in the decoder: {trainable:,} of {total:,} parameters train")
    return model, network, {"trainable_params": trainable, "total_params": total, "algo": "lokr"}


def save_lokr_weights(
    lycoris_net: Any, output_dir: str, dtype: torch.dtype | None = None, metadata: dict[str, Any] | None = None
) -> str:
    """Write `output_dir/lokr_weights.safetensors`; what is not a string goes into its header as JSON."""
    folder: str = safe_path(output_dir)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "lokr_weights.safetensors")
    header = {"algo": "lokr", "format": "lycoris"}
    for key, value in (metadata or {}).items():
        if value is not None:
            header[key] = value if isinstance(value, str) else json.dumps(value)
    lycoris_net.save_weights(path, dtype=dtype, metadata=header)
    return path


def load_lokr_weights(lycoris_net: Any, weights_path: str) -> Any:
    """Read saved weights into an attached network."""
    return lycoris_net.load_weights(safe_path(weights_path))


def save_lokr_training_checkpoint(
    lycoris_net: Any,
    optimizer: Any,
    scheduler: Any,
    epoch: int,
    global_step: int,
    output_dir: str,
    lokr_config: LoKRConfig | None = None,
    run_metadata: dict[str, Any] | None = None,
) -> str:
    """Write the weights and training_state.pt; return the folder.

    Traps, kept from ACE-Step: `run_metadata` brings the user's local paths into the header, and nothing reads
    the state again.
    """
    folder: str = safe_path(output_dir)
    about: dict[str, Any] = {"run_metadata": run_metadata}
    about["lokr_config"] = lokr_config.to_dict() if lokr_config is not None else None
    about = {key: value for key, value in about.items() if value is not None}
    save_lokr_weights(lycoris_net, folder, metadata=about)
    state = dict(epoch=epoch, global_step=global_step, **about)
    state |= dict(optimizer_state_dict=optimizer.state_dict(), scheduler_state_dict=scheduler.state_dict())
    torch.save(state, os.path.join(folder, "training_state.pt"))
    return folder
