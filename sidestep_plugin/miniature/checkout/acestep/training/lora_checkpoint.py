"""Writes and reads LoRA adapters and checkpoints."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from acestep.training.configs import LoRAConfig
from acestep.training.log import logger
from acestep.training.path_safety import safe_path


def save_lora_weights(model: Any, output_dir: str, save_full_model: bool = False) -> str:
    """Write the decoder's adapter to `output_dir/adapter`, or a whole model without one; return the path."""
    folder: str = safe_path(output_dir)
    os.makedirs(folder, exist_ok=True)
    if hasattr(model.decoder, "save_pretrained"):
        path = os.path.join(folder, "adapter")
        model.decoder.save_pretrained(path)
    elif save_full_model:
        path = os.path.join(folder, "model.pt")
        torch.save(model.state_dict(), path)
    else:
        logger.warning("there is no LoRA to save")
        return ""
    return path


def load_lora_weights(model: Any, lora_path: str, _lora_config: LoRAConfig | None = None) -> Any:
    """Put a saved adapter around the decoder."""
    from peft import PeftModel

    path = safe_path(lora_path)
    if not os.path.isdir(path):
        raise FileNotFoundError(f"there is no adapter folder {path}")
    model.decoder = PeftModel.from_pretrained(model.decoder, path)
    return model


def save_training_checkpoint(
    model: Any, optimizer: Any, scheduler: Any, epoch: int, global_step: int, output_dir: str
) -> str:
    """Write the adapter and, in training_state.pt, what continues the run; return the folder."""
    folder: str = safe_path(output_dir)
    os.makedirs(folder, exist_ok=True)
    save_lora_weights(model, folder)
    state = dict(epoch=epoch, global_step=global_step)
    state |= dict(optimizer_state_dict=optimizer.state_dict(), scheduler_state_dict=scheduler.state_dict())
    torch.save(state, os.path.join(folder, "training_state.pt"))
    return folder


def load_training_checkpoint(
    checkpoint_dir: str, optimizer: Any = None, scheduler: Any = None, device: torch.device | None = None
) -> dict[str, Any]:
    """Say where a checkpoint stands; load optimizer and scheduler, but leave the weights to the caller."""
    found: dict[str, Any] = {"epoch": 0, "global_step": 0, "adapter_path": None}
    found |= {"loaded_optimizer": False, "loaded_scheduler": False}
    try:
        folder = safe_path(checkpoint_dir)
    except ValueError as error:
        logger.warning(f"checkpoint refused: {error}")
        return found

    adapter = os.path.join(folder, "adapter")
    found["adapter_path"] = next((path for path in (adapter, folder) if os.path.isdir(path)), None)
    state_file = os.path.join(folder, "training_state.pt")
    if not os.path.isfile(state_file):
        if numbered := re.search(r"epoch_(\d+)", folder):
            found["epoch"] = int(numbered[1])
        return found
    state = torch.load(state_file, map_location=device, weights_only=True)
    found["epoch"], found["global_step"] = int(state.get("epoch", 0)), int(state.get("global_step", 0))
    for name, part in (("optimizer", optimizer), ("scheduler", scheduler)):
        saved = state.get(f"{name}_state_dict")
        if part is None or saved is None:
            continue
        try:
            part.load_state_dict(saved)
            found[f"loaded_{name}"] = True
        except (KeyError, RuntimeError, ValueError) as error:
            logger.warning(f"the checkpoint's {name} does not fit: {error}")
    return found
