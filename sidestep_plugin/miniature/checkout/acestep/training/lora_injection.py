"""Puts a PEFT adapter into a model's decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from acestep.training.configs import LoRAConfig
from acestep.training.log import logger


def unwrap_fabric(module: Any) -> Any:
    """Take off the wrapper that an earlier run with Lightning Fabric left around a module."""
    while isinstance(getattr(module, "_forward_module", None), nn.Module):
        module = module._forward_module
    return module


def inject_lora_into_dit(model: Any, lora_config: LoRAConfig) -> tuple[Any, dict[str, Any]]:
    """Wrap `model.decoder` so that only its new LoRA weights train; return the model and figures about it."""
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    decoder = unwrap_fabric(model.decoder)
    if isinstance(decoder, PeftModel):
        decoder = decoder.get_base_model()
    # An earlier run left it on, and PEFT would ask for token embeddings then, which a decoder of audio has not.
    for module in decoder.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    settings = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **lora_config.to_dict())
    model.decoder = get_peft_model(decoder, settings)
    trainable = total = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    logger.info(f"LoRA of rank {lora_config.r} in the decoder: {trainable:,} of {total:,} parameters train")
    return model, {"trainable_params": trainable, "total_params": total, "trainable_ratio": trainable / total}
