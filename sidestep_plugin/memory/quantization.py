"""Quantized base weights: one byte per value of the frozen linear layers while a LoRA is trained.

The adapter is another one than without: what the quantization does to the loss is measured on one song before the first
step, announced, and saved with the adapter. Only linear layers inside the decoder's blocks are quantized, never norms,
embeddings or the adapter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

from ..engine.decoders import undisturbed
from ..errors import Refusal
from ..run import Run
from ..songs.dataset import FRAMES_A_SECOND
from ..songs.one_song import MASK_OF, read_song

if TYPE_CHECKING:
    import torch

BYTES: Final = {"int8": 1}
"""Types that weights can be quantized to, and the bytes of a value; :mod:`.quantized_linear` computes with them."""

_MEASURED_AT: Final = (0.25, 0.5, 0.75)
_SECONDS: Final = 30


def quantize(run: Run, decoder: torch.nn.Module, autocast: torch.dtype | None, kind: str) -> tuple[str, float | None]:
    """Quantize the frozen linear layers of the decoder's blocks until the training ends.

    Args:
        decoder: its decoder, with the adapter in it.
        autocast: the type that autocast computes in, None without autocast.
        kind: one of :data:`BYTES`.

    Returns:
        A line to announce, and by how much the base model's loss on one song changed, as a fraction; None if that
        cannot be measured.

    Raises:
        Refusal: the decoder has no such layers.
    """
    from .quantized_linear import QuantizedLinear

    layers = dict(_layers(decoder))
    if not layers:
        raise Refusal(f"--base-weights {kind}: this decoder has no frozen linear layers in blocks. Leave it out.")
    before, size = _loss(run, decoder, autocast), _size(decoder)
    types = sorted({str(layer.weight.dtype).removeprefix("torch.") for layer in layers.values()})
    for name, layer in layers.items():  # one by one, so that little more than one layer is there twice
        _replace(run, decoder, name, QuantizedLinear(layer, kind))
    after = _loss(run, decoder, autocast)
    line = f"Base weights: {kind} instead of {' and '.join(types)} in {len(layers)} layers, "
    line += f"{(size - _size(decoder)) / 2**20:,.0f} MiB less (not the same result"
    if before is None or after is None or before <= 0.0 or not math.isfinite(after / before):
        return f"{line})", None
    change = after / before - 1.0
    return f"{line}: loss of the base model on one song {before:.4f}, now {after:.4f}, {100 * change:+.2f} %)", change


def _layers(decoder: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Frozen linear layers inside the decoder's blocks, by name; those of the adapter itself are trained."""
    import torch

    for name, module in decoder.named_modules():
        inside = any(part.isdigit() for part in name.split("."))
        trained = any(weight.requires_grad for weight in module.parameters(recurse=False))
        if inside and type(module) is torch.nn.Linear and not trained:
            yield name, module


def _size(decoder: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*decoder.parameters(), *decoder.buffers()))


def _loss(run: Run, decoder: torch.nn.Module, autocast: torch.dtype | None) -> float | None:
    """Loss of the decoder on the beginning of one song at three timesteps; None without a song.

    The noise has its own generator, and nothing is dropped: the run's random states stay as they are. Values that are
    not finite in rows that the song's masks hide are zero, as in a training with ``--mask-nan``.
    """
    import torch

    song = _song(run)
    if song is None:
        return None
    weight = next(parameter for parameter in decoder.parameters() if parameter.is_floating_point())
    frames = _SECONDS * FRAMES_A_SECOND
    there = {
        name: (tensor if name.startswith("encoder") else tensor[:frames]).unsqueeze(0).to(weight.device, weight.dtype)
        for name, tensor in song.items()
    }
    data = there.pop("target_latents")
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0)).to(data)
    mixed = torch.autocast(weight.device.type, dtype=autocast) if autocast else contextlib.nullcontext()
    losses = []
    with undisturbed(decoder, weight.device), mixed:
        for t in _MEASURED_AT:
            times = torch.full((1,), t, device=data.device, dtype=data.dtype)
            answer = decoder(hidden_states=t * noise + (1.0 - t) * data, timestep=times, timestep_r=times, **there)
            losses.append(torch.nn.functional.mse_loss(answer[0].float(), (noise - data).float()).item())
    return sum(losses) / len(losses)


def _song(run: Run) -> dict[str, torch.Tensor] | None:
    """The tensors of the first song that can be read, finite in hidden rows."""
    import torch

    for file in run.engine.songs:
        song, problem = read_song(file)
        if problem:
            continue
        tensors = {name: tensor for name, tensor in song.items() if isinstance(tensor, torch.Tensor)}
        for name in MASK_OF.keys() & tensors.keys():
            hidden = (tensors[MASK_OF[name]] == 0).unsqueeze(-1) & ~tensors[name].isfinite()
            tensors[name] = tensors[name].masked_fill(hidden, 0.0)
        return tensors
    return None


def _replace(run: Run, decoder: torch.nn.Module, name: str, made: torch.nn.Module) -> None:
    """Put another module in place of one, which comes back when the training ends, and waits in RAM until then.

    After a training from the command line the program ends, so there the original is freed.
    """
    original = decoder.get_submodule(name)
    made.train(original.training)
    decoder.set_submodule(name, made)
    if not run.engine.ends_the_program:
        device = next(original.parameters()).device
        run.engine.at_end(partial(_put_back, decoder, name, original, device))
        original.to("cpu")


def _put_back(decoder: torch.nn.Module, name: str, original: torch.nn.Module, device: torch.device) -> None:
    frozen = [weight for weight in decoder.parameters() if weight.is_floating_point() and not weight.requires_grad]
    # Early versions of upstream cast the whole model to bf16, which the original has missed.
    smallest = min((weight.dtype for weight in frozen), key=lambda dtype: dtype.itemsize, default=None)
    for weight in original.parameters():
        if smallest is not None and weight.dtype.itemsize > smallest.itemsize:
            original.to(smallest)
            break
    decoder.set_submodule(name, original.to(device))
