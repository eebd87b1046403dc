"""Makes the clips of one state of the adapter, and keeps the table of a folder up to date."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.decoders import plain_decoder
from ..errors import Refusal
from ..run import Clip
from .clip_files import playable, read_latents, suffix_of, write_clip
from .conditions import PreviewSettings, Song, read_conditions
from .decoding import decode, rate_of
from .generation import computed_in, generate, noise_for
from .table import Row, Table, clip_names, read_table, set_aside

if TYPE_CHECKING:
    import torch


def generated(
    model: Any,
    songs: Sequence[Song],
    silence: torch.Tensor,
    settings: PreviewSettings,
    done: Callable[[int], None] = lambda _: None,
) -> Iterator[torch.Tensor]:
    """The latents of each song in turn, shape [1,T,64], fp32 on the CPU.

    The decoder has to be in eval mode. Random numbers come from a generator of their own. `done` is called with the
    number of songs that are done, first with 0. Raises Refusal for latents that are not finite.
    """
    decoder = plain_decoder(model)
    device, dtype = computed_in(decoder)
    for place, song in enumerate(songs):
        done(place)
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
    """The table of a folder, or a new one, and where clips of something else were moved to, if any.

    With `goes_on`, rows of trained adapters may be those of this training; if not, only the base model's are kept.
    Raises Refusal for a table that cannot be read, and OSError.
    """
    described = [{"name": song.name, "seconds": song.seconds, "prompt": song.prompt} for song in songs]
    without_length = {name: value for name, value in asdict(settings).items() if name != "seconds"}
    shared = {"model_name": model_name, "songs": described, "settings": without_length}
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
    """Write the clips of a row, all sounds or all latents, then the table.

    Rows that are in the folder's table and not in `table` are kept, and are in `table` afterwards. Raises Refusal and
    OSError.
    """
    names = clip_names(label, table.songs, suffix_of(content[0]))
    for name, each in zip(names, content, strict=True):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_clip(file, each)
    there = read_table(folder)
    if there is not None and there.about == table.about:
        table.rows[:] = there.rows  # another program may have added rows since the table was read
    table.put(Row(label, epoch, loss, names))
    table.write(folder)


def decode_rest(folder: Path, table: Table, vae: Any) -> int:
    """Decode every clip of a table that is latents only. Returns how many. Raises Refusal and OSError."""
    number = 0
    for row in table.undecoded:
        old = list(row.clips)
        sounds = heard(vae, [read_latents(folder / clip) for clip in old])
        write_row(folder, table, row.label, row.epoch, row.loss, sounds)
        for clip in old:
            (folder / clip).unlink(missing_ok=True)
        number += len(old)
    return number


def freed(device: torch.device) -> None:
    """Give back memory that nothing uses any more."""
    import torch

    gc.collect()
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).empty_cache()
