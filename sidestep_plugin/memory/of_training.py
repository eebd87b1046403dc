"""Estimates what a training needs in memory, from its model, its songs and its settings, before the first step."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapters.kinds import kind_of_config
from ..run import ModelFacts, Run
from ..songs.one_song import longest
from .base_weights import chosen
from .estimate import FRAMES_A_SECOND, PARTS, Needs, Settings, needs, shown
from .quantization import BYTES
from .sizes import DecoderSize

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Estimate:
    """What one training needs."""

    size: DecoderSize  # of the decoder
    settings: Settings  # of the training, with gradient checkpointing as upstream left it
    weights: int  # bytes of the frozen weights, counted
    trained: int  # number of trained parameters, counted
    free: int | None  # bytes that the device has for the training, weights included; None if that is not known
    options: Set[str]  # names of the options of the plugins

    def needs(self, *, checkpointing: bool) -> Needs:
        """What it needs with gradient checkpointing on or off."""
        settings = self.settings.but(checkpointing=checkpointing)
        return needs(self.size, settings, weights=self.weights, trained=self.trained)

    def lines(self, *, checkpointing: bool) -> list[str]:
        """The estimate in one line, and a warning if it does not fit."""
        need, settings = self.needs(checkpointing=checkpointing), self.settings
        of_free = "" if self.free is None else f" of {shown(self.free)}"
        seconds = settings.trained_frames / FRAMES_A_SECOND
        told = ", ".join(f"{name} {shown(getattr(need, name))}" for name in PARTS[:-1])
        line = f"Memory: about {shown(need.total)}{of_free} ({told}, activations {shown(need.activations)} for "
        line += f"{settings.batch_size} x {seconds:.0f} s)"
        if self.free is None or need.total <= self.free:
            return [line]
        return [line, f"Warning: this may not fit. {self._advice(checkpointing)}"]

    def _advice(self, checkpointing: bool) -> str:
        """The cheapest flags with which it would fit, all together."""
        from .savings import enough  # which lists gradient checkpointing, and that estimates

        now, free = self.settings.but(checkpointing=checkpointing), self.free
        assert free is not None
        found = enough(now, self.options, lambda then: needs(self.size, then).fits(free))
        if found is None:
            return "None of the plugin's flags makes it fit. Use shorter songs, a smaller model or another device."
        return f"It should fit with {' '.join(found[0])}"


def estimate(run: Run, decoder: torch.nn.Module, kept: Set[str], autocast: torch.dtype | None) -> Estimate | None:
    """Estimate a training whose adapter was injected and whose decoder upstream has not cast yet.

    Args:
        kept: names of the decoder's parameters that stay in bf16.
        autocast: the type that autocast computes in, None without autocast.

    Returns:
        None if the model's config or the songs do not say enough.
    """
    import torch

    size = DecoderSize.from_config(ModelFacts.from_model(run.model).config)
    frames, tokens = longest(run.engine.songs)
    targets = getattr(run.adapter_config, "target_modules", None)
    if size is None or not frames or not isinstance(targets, (list, tuple)):
        return None
    device = next(decoder.parameters()).device
    weights = trained = 0
    for name, weight in decoder.named_parameters():
        if weight.requires_grad:
            trained += weight.numel()
        else:
            weights += weight.numel() * (weight.element_size() if name in kept or autocast is None else 4)
    weights += sum(buffer.numel() * buffer.element_size() for buffer in decoder.buffers())
    settings = settings_of(run.training_config, run.adapter_config, run.options, mixed=autocast is torch.bfloat16).but(
        targets=tuple(targets),
        dropout=bool(getattr(run.adapter_config, "dropout", 0.0)),
        frames=frames,
        tokens=tokens,
        optimizer_bytes=2 if device.type == "cuda" and importlib.util.find_spec("bitsandbytes") else 8,
    )
    if settings.frozen not in BYTES:
        settings = settings.but(frozen="bf16" if kept else "fp32")
    return Estimate(size, settings, weights, trained, free_memory(decoder), run.options.keys())


def free_memory(decoder: torch.nn.Module) -> int | None:
    """Bytes of the decoder's GPU that a training can have, the decoder itself included; None if it is not on one."""
    import torch

    device = next(decoder.parameters()).device
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    tensors = (*decoder.parameters(), *decoder.buffers())  # quantized weights are buffers
    return free + own + sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device == device)


def settings_of(training_config: Any, adapter_config: Any, options: Mapping[str, Any], *, mixed: bool) -> Settings:
    """The settings of a training that its memory depends on, as far as configurations and options say them.

    Args:
        options: the values of the plugins' options.
        mixed: whether autocast computes in bf16.
    """
    kind, adapter = chosen(options), kind_of_config(adapter_config)
    return Settings(
        kind=adapter.name,
        rank=_number(adapter_config, adapter.fields["rank"]),
        batch_size=_number(training_config, "batch_size"),
        accumulation=_number(training_config, "gradient_accumulation_steps"),
        mixed=mixed,
        frozen=kind if kind in BYTES or kind == "fp32" else "bf16",
        crop_seconds=options.get("crop_seconds"),
        averaged=bool(options.get("average")),
    )


def _number(config: Any, name: str) -> int:
    """One of a config's attributes; 1 if it is no positive number."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else 1
