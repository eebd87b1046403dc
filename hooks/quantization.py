"""Stores the base model's frozen weights in one byte per value while a LoRA is trained (``--base-weights``).

The adapter is another one than without: what the quantization does to the loss is measured on one song before the first
step, said, and saved with the adapter. Only linear layers inside the decoder's blocks are quantized, never norms,
embeddings or the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.run import MemoryPlan, Run
from sidestep_plugin.songs.dataset import FRAMES_A_SECOND, songs_in
from sidestep_plugin.songs.one_song import read_song
from sidestep_plugin.text import counted

if TYPE_CHECKING:
    import torch

FACTS: Final = "sidestep.base_weights"
"""Where a run keeps the facts about its quantized weights."""

_MEASURED_AT: Final = (0.25, 0.5, 0.75)
_SECONDS: Final = 30


def options() -> list[click.Option]:
    return [
        click.Option(
            ["--base-weights"],
            type=click.Choice(["off", "int8", "fp8"]),
            default="off",
            show_default=True,
            metavar="TYPE",
            help="Quantize the base model for a LoRA (other result): off, int8 or fp8.",
        )
    ]


@hookimpl(specname="acestep_run_started", trylast=True)
def check_base_weights(run: Run) -> None:
    """Refuse what would be without effect, or wrong."""
    kind = run.options["base_weights"]
    if kind == "off":
        return
    if run.adapter_type == "lokr":
        raise Refusal(
            f"--base-weights {kind} works for a LoRA only: LyCORIS computes a LoKr from the base model's own weights. "
            "Leave it out, or train with --adapter-type lora."
        )
    if not run.with_lightning:
        raise Refusal(f"--base-weights {kind} needs Lightning. Install it (pip install lightning), or leave it out.")


@hookimpl(specname="acestep_plan_memory")
def plan_base_weights(run: Run, decoder: torch.nn.Module, autocast: torch.dtype | None) -> MemoryPlan | None:
    kind = run.options["base_weights"]
    if kind == "off":
        return None
    from .quantized_linear import QuantizedLinear

    layers = dict(_layers(decoder))
    if not layers:
        raise Refusal(f"--base-weights {kind}: this decoder has no frozen linear layers in blocks. Leave it out.")
    before, size = _loss(run, decoder, autocast), _size(decoder)
    types = sorted({str(layer.weight.dtype).removeprefix("torch.") for layer in layers.values()})

    def told() -> Sequence[str]:
        after = _loss(run, decoder, autocast)
        run.state[FACTS] = {"base_weights": kind}
        line = f"Base weights: {kind} instead of {' and '.join(types)} in {counted(len(layers), 'layer')}, "
        line += f"{(size - _size(decoder)) / 2**20:,.0f} MiB less (not the same result"
        if before is None or after is None or before <= 0.0:
            return [f"{line})"]
        change = after / before - 1.0
        run.state[FACTS]["base_weights_loss_change"] = round(change, 6)
        return [f"{line}: loss of the base model on one song {before:.4f}, now {after:.4f}, {100 * change:+.2f} %)"]

    replaced = dict.fromkeys(layers, partial(QuantizedLinear, kind=kind))
    return MemoryPlan(replaced=replaced, after_replacing=told)


def _layers(decoder: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Frozen linear layers inside the decoder's blocks, by name; those of the adapter itself are trained."""
    import torch

    for name, module in decoder.named_modules():
        inside = any(part.isdigit() for part in name.split("."))
        if (
            inside
            and type(module) is torch.nn.Linear
            and not any(weight.requires_grad for weight in module.parameters())
        ):
            yield name, module


def _size(decoder: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*decoder.parameters(), *decoder.buffers()))


def _loss(run: Run, decoder: torch.nn.Module, autocast: torch.dtype | None) -> float | None:
    """Loss of the decoder on the beginning of one song at three timesteps; None without a song.

    The noise has its own generator, and nothing is dropped: the run's random states stay as they are.
    """
    import torch

    song = _song(run)
    if song is None:
        return None
    weight = next(parameter for parameter in decoder.parameters() if parameter.is_floating_point())
    there = {
        name: tensor[: _SECONDS * FRAMES_A_SECOND].unsqueeze(0).to(weight.device, weight.dtype)
        if not name.startswith("encoder")
        else tensor.unsqueeze(0).to(weight.device, weight.dtype)
        for name, tensor in song.items()
    }
    data = there.pop("target_latents")
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0)).to(data)
    mixed = torch.autocast(weight.device.type, dtype=autocast) if autocast else contextlib.nullcontext()
    losses = []
    with torch.no_grad(), _evaluating(decoder), mixed:
        for t in _MEASURED_AT:
            times = torch.full((1,), t, device=data.device, dtype=data.dtype)
            answer = decoder(hidden_states=t * noise + (1.0 - t) * data, timestep=times, timestep_r=times, **there)
            losses.append(torch.nn.functional.mse_loss(answer[0].float(), (noise - data).float()).item())
    return sum(losses) / len(losses)


def _song(run: Run) -> dict[str, Any] | None:
    for file in () if run.tensor_dir is None else songs_in(run.tensor_dir):
        song, problem = read_song(file)
        if not problem:
            return {name: tensor for name, tensor in song.items() if hasattr(tensor, "unsqueeze")}
    return None


@contextlib.contextmanager
def _evaluating(decoder: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation, and afterwards as it was."""
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.train(training)  # parents come first, so each module ends as it was
