"""Looks at a folder of preprocessed songs before anything is loaded: what is in it, and whether it fits.

A song is a ``.pt`` file with five tensors, written by upstream's preprocessing. Files are opened with
``weights_only=True`` and mapped, so that looking at hundreds of songs reads little more than their headers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import Refusal

SONG_TENSORS: Final = {
    "target_latents": 2,
    "attention_mask": 1,
    "encoder_hidden_states": 2,
    "encoder_attention_mask": 1,
    "context_latents": 2,
}
"""Tensors of a song with their number of dimensions: [T,64], [T], [L,D], [L], [T,128]."""

_NAMED = 5  # how many files a message names before it only counts


@dataclass(frozen=True)
class Dataset:
    """A folder of preprocessed songs.

    Attributes:
        folder: the folder.
        songs: number of songs that can be read.
        condition_width: D of every song's ``encoder_hidden_states [L,D]``.
        channels: channels of latents and context together, the same for every song.
        missing: entries of manifest.json for which there is no file; upstream leaves them out.
    """

    folder: Path
    songs: int
    condition_width: int
    channels: int
    missing: tuple[str, ...]


def inspect_dataset(folder: Path) -> Dataset:
    """Read what a dataset folder holds.

    Raises:
        Refusal: no such folder, no songs in it, a file that is no song, or songs of different condition widths.
    """
    if not folder.is_dir():
        raise Refusal(f"No dataset folder {folder}. Expected a folder of .pt files from upstream's preprocessing.")
    missing: list[str] = []
    files = list(_song_files(folder, missing))
    if not files:
        hint = f"; manifest.json names {len(missing)} that are not there" if missing else ""
        raise Refusal(f"No songs in {folder}: expected .pt files from upstream's preprocessing{hint}.")
    bad: list[str] = []
    widths: dict[int, str] = {}
    channels: dict[int, str] = {}
    for file in files:
        song, problem = _read_song(file)
        if problem:
            bad.append(f"{file.name} ({problem})")
        else:
            widths.setdefault(song["encoder_hidden_states"].shape[-1], file.name)
            both = song["target_latents"].shape[-1] + song["context_latents"].shape[-1]
            channels.setdefault(both, file.name)
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise Refusal(
            f"Not preprocessed songs in {folder}: {', '.join(bad[:_NAMED])}{more}. Preprocess them again, or take them "
            "out of the folder."
        )
    for what, values in (("conditions of different widths", widths), ("different numbers of channels", channels)):
        if len(values) > 1:
            found = ", ".join(f"{value} ({name})" for value, name in sorted(values.items()))
            raise Refusal(f"The songs in {folder} have {what}: {found}. Train them apart.")
    return Dataset(folder, len(files), next(iter(widths)), next(iter(channels)), tuple(missing))


def _song_files(folder: Path, missing: list[str]) -> Iterator[Path]:
    """Files in upstream's order of search: manifest.json's entries if there is one, else every .pt file."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        yield from sorted(file for file in folder.iterdir() if file.suffix == ".pt" and file.is_file())
        return
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        samples = content.get("samples", []) if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{manifest} cannot be read as JSON ({error}). Delete it to use every .pt file.") from None
    if not isinstance(samples, list) or not all(isinstance(sample, str) for sample in samples):
        raise Refusal(f'{manifest} has no list of file names under "samples". Delete it to use every .pt file.')
    for sample in samples:
        # Newer manifests are relative to their folder, older ones to the directory that upstream was started in.
        file = next((file for file in (folder / sample, Path(sample)) if _is_file(file)), None)
        if file is None:
            missing.append(sample)
        else:
            yield file


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_song(file: Path) -> tuple[dict[str, Any], str]:
    """A song's tensors, mapped, and what is wrong with it ("" when nothing is)."""
    import torch

    try:
        try:
            song: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # only the zip format of today can be mapped
            song = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        return {}, f"cannot be read: {type(error).__name__}"
    if not isinstance(song, dict):
        return {}, f"holds a {type(song).__name__}, expected a dictionary of tensors"
    for key, dimensions in SONG_TENSORS.items():
        tensor = song.get(key)
        if not isinstance(tensor, torch.Tensor):
            return {}, f"no tensor {key}"
        if tensor.dim() != dimensions:
            return {}, f"{key} has shape {list(tensor.shape)}, expected {dimensions} dimensions"
        if tensor.numel() == 0:
            return {}, f"{key} is empty"
    return song, ""
