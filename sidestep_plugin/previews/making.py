"""Makes the clips of one state of the adapter, and keeps the table and the page of a folder up to date."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Refusal
from ..files import not_a_file, replacing
from ..run import Clip
from ..text import sentence
from .conditions import LATENT_CHANNELS, Song, read_conditions
from .decoding import decode, rate_of
from .generation import computed_in, generate, noise_for
from .page import write_page
from .settings import PreviewSettings
from .table import Row, Table, about, clip_names, read_table, set_aside
from .undisturbed import plain_decoder
from .wav import playable, write_wav

if TYPE_CHECKING:
    import torch


def generated(
    model: Any, songs: Sequence[Song], silence: torch.Tensor, settings: PreviewSettings
) -> Iterator[torch.Tensor]:
    """The latents of each song in turn, shape [1,T,64], fp32 on the CPU.

    The decoder has to be in eval mode. Random numbers come from a generator of their own.

    Raises:
        Refusal: the model generated something that is not a number.
    """
    decoder = plain_decoder(model)
    device, dtype = computed_in(decoder)
    for place, song in enumerate(songs):
        conditions = read_conditions(song, silence, device, dtype)
        noise = noise_for(settings.seed + place, song.frames, device, dtype)
        latents = generate(model, decoder, conditions, settings, noise).float().cpu()
        if not bool(latents.isfinite().all()):
            raise Refusal(
                f"What was generated for {song.name} holds NaN or infinity: the adapter is damaged, or its "
                "training has diverged. Choose an earlier checkpoint."
            )
        yield latents


def heard(vae: Any, latents: Sequence[torch.Tensor]) -> list[Clip]:
    """Decode latents with a VAE, none louder than a WAV file can hold."""
    return [Clip(playable(decode(vae, each)), rate_of(vae)) for each in latents]


def open_table(
    folder: Path, model_name: str, songs: Sequence[Song], settings: PreviewSettings, *, goes_on: bool
) -> tuple[Table, Path | None]:
    """The table of a folder, or a new one | returns it, and where clips of something else were moved to, if any.

    Args:
        goes_on: whether rows of trained adapters may be those of this training; if not, only the base model's are kept.

    Raises:
        Refusal: the folder holds a table that cannot be read.
        OSError: the folder cannot be renamed.
    """
    shared = about(
        model_name, [{"name": song.name, "seconds": song.seconds} for song in songs], _without_length(settings)
    )
    table = read_table(folder)
    if table is None:
        return Table(shared), None
    if table.about == shared and (goes_on or all(row.epoch == 0 for row in table.rows)):
        return table, None
    return Table(shared), set_aside(folder)


def write_row(
    folder: Path,
    table: Table,
    label: str,
    epoch: int | None,
    loss: float | None,
    content: Sequence[Clip | torch.Tensor],
) -> None:
    """Write the clips of a row, sounds or latents, then the table and the page. Raises OSError."""
    sounds = [each for each in content if isinstance(each, Clip)]
    names = clip_names(label, table.songs, ".wav" if sounds else ".safetensors")
    for name, each in zip(names, content, strict=True):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(each, Clip):
            write_wav(file, each.samples, each.rate)
        else:
            _write_latents(file, each)
    table.put(Row(label, epoch, loss, names))
    table.write(folder)
    write_page(folder, table)


def decode_rest(folder: Path, table: Table, vae: Any) -> int:
    """Decode every clip of a table that is latents only.

    Returns:
        How many were decoded.

    Raises:
        Refusal: a clip is missing or damaged. The rows before it are decoded.
        OSError: the folder cannot be written.
    """
    number = 0
    for row in table.undecoded:
        old = list(row.clips)
        sounds = heard(vae, [_read_latents(folder / clip) for clip in old])
        write_row(folder, table, row.label, row.epoch, row.loss, sounds)
        for clip in old:
            (folder / clip).unlink(missing_ok=True)
        number += len(old)
    return number


def _read_latents(file: Path) -> torch.Tensor:
    """The latents of a clip, shape [1,T,64]. Raises Refusal."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        latents = load_file(file)["latents"]
        expected = f"expected finite numbers of shape [1,T,{LATENT_CHANNELS}]"
        problem = "" if _is_clip(latents) else f"it holds {list(latents.shape)}, {expected}"
    except (SafetensorError, OSError, KeyError) as error:
        problem = not_a_file(file) or sentence(str(error)).removesuffix(".")
    if problem:
        raise Refusal(
            f"The clip {file} cannot be decoded: {problem}. Make it again from the checkpoint, with --dataset-dir, or "
            f"delete the folder {file.parent.parent}."
        )
    return latents


def _is_clip(latents: torch.Tensor) -> bool:
    well = latents.dim() == 3 and latents.shape[0] == 1 and latents.shape[1] > 0 and latents.shape[2] == LATENT_CHANNELS
    return well and latents.is_floating_point() and bool(latents.isfinite().all())


def _write_latents(file: Path, latents: torch.Tensor) -> None:
    from safetensors.torch import save

    with replacing(file) as stream:
        stream.write(save({"latents": latents.contiguous()}))


def _without_length(settings: PreviewSettings) -> dict[str, Any]:
    """The settings without the seconds, which every song has of its own."""
    return {name: value for name, value in asdict(settings).items() if name != "seconds"}


def shown_path(file: Path) -> str:
    """A path as short as it can be said."""
    try:
        short = os.path.relpath(file)
    except ValueError:  # another drive
        return str(file)
    return short if not short.startswith("..") else str(file)
