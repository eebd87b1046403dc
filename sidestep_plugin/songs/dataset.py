"""Looks at a folder of preprocessed songs before anything is loaded: what is in it, and whether it fits.

A song is a ``.pt`` file with five tensors, written by upstream's preprocessing. Files are opened with
``weights_only=True`` and mapped, so that looking at hundreds of songs reads little more than their headers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..files import read_json_object

SONG_TENSORS: Final = {
    "target_latents": 2,
    "attention_mask": 1,
    "encoder_hidden_states": 2,
    "encoder_attention_mask": 1,
    "context_latents": 2,
}
"""Tensors of a song with their number of dimensions: [T,64], [T], [L,D], [L], [T,128]."""

FRAMES_A_SECOND: Final = 25
"""Frames of ACE-Step 1.5's latents in a second of music."""


@dataclass(frozen=True)
class Dataset:
    """A folder of preprocessed songs.

    Attributes:
        folder: the folder.
        songs: number of songs that can be read.
        condition_width: D of every song's ``encoder_hidden_states [L,D]``.
        channels: channels of latents and context together, the same for every song.
        missing: entries of manifest.json for which there is no file; upstream leaves them out.
        frames: length of all songs together, in frames of latents.
    """

    folder: Path
    songs: int
    condition_width: int
    channels: int
    missing: tuple[str, ...]
    frames: int = 0

    @property
    def minutes(self) -> float:
        """Length of all songs together."""
        return self.frames / FRAMES_A_SECOND / 60.0


def inspect_dataset(folder: Path, *, allow_duplicates: bool = False) -> Dataset:
    """Read what a dataset folder holds.

    Args:
        folder: the folder.
        allow_duplicates: whether the same song may be there more than once.

    Raises:
        Refusal: no such folder, no songs in it, or files with problems: all of them are named.
    """
    if not folder.is_dir():
        raise Refusal(f"No dataset folder {folder}. Expected a folder of .pt files from upstream's preprocessing.")
    missing: list[str] = []
    outside: list[str] = []
    files = list(_song_files(folder, missing, outside))
    if not files and not outside:
        hint = f"; manifest.json names {len(missing)} that are not there" if missing else ""
        raise Refusal(f"No songs in {folder}: expected .pt files from upstream's preprocessing{hint}.")
    problems = [f"{name} (manifest.json names it, and it lies outside of the folder)" for name in outside]
    widths: dict[int, list[str]] = {}
    channels: dict[int, list[str]] = {}
    frames = 0
    for file in dict.fromkeys(files):
        song, problem = _read_song(file)
        if problem:
            problems.append(f"{file.name} ({problem})")
        else:
            frames += song["target_latents"].shape[0] * files.count(file)
            widths.setdefault(song["encoder_hidden_states"].shape[-1], []).append(file.name)
            both = song["target_latents"].shape[-1] + song["context_latents"].shape[-1]
            channels.setdefault(both, []).append(file.name)
    for what, values in (("conditions of width", widths), ("channels:", channels)):
        usual = max(values, key=lambda value: len(values[value]), default=0)
        problems += [
            f"{name} ({what} {value}, most have {usual})"
            for value in values
            if value != usual
            for name in values[value]
        ]
    duplicates = [] if allow_duplicates else _duplicates(files)
    if problems or duplicates:
        what_to_do = [
            "Preprocess them again, or take them out of the folder." if problems else "",
            "Take the copies out, or train on them on purpose: --allow-duplicates." if duplicates else "",
        ]
        found = ", ".join(problems + duplicates)
        raise Refusal(f"Not songs to train on in {folder}: {found}. {' '.join(filter(None, what_to_do))}")
    return Dataset(folder, len(files), next(iter(widths)), next(iter(channels)), tuple(missing), frames)


def fingerprint(folder: Path | None) -> str:
    """A text that tells one folder of songs from another by the names and sizes of its songs; "" without a folder."""
    if folder is None or not folder.is_dir():
        return ""
    songs = [(file.name, file.stat().st_size) for file in songs_in(folder)]
    return hashlib.sha256(repr(songs).encode()).hexdigest()


def songs_in(folder: Path) -> list[Path]:
    """The files that a training in a folder reads: those of manifest.json, else every .pt file, sorted."""
    try:
        return list(_song_files(folder, [], []))
    except (Refusal, OSError):
        return []


def made_for(folder: Path) -> str | None:
    """The model for which songs were preprocessed, when a ``preprocess_meta.json`` says so, as Side-Step writes it."""
    try:
        said = read_json_object(folder / "preprocess_meta.json").get("model_variant")
    except (OSError, ValueError):
        return None
    return said if isinstance(said, str) and said else None


def _duplicates(files: list[Path]) -> list[str]:
    """Files that are there more than once, by name in the manifest or byte for byte."""
    found = [
        f"{file.name} (named {count} times in manifest.json)" for file, count in Counter(files).items() if count > 1
    ]
    by_size: dict[int, list[Path]] = {}
    for file in dict.fromkeys(files):
        by_size.setdefault(file.stat().st_size, []).append(file)
    first: dict[bytes, Path] = {}
    for alike in by_size.values():
        for file in alike if len(alike) > 1 else ():
            with file.open("rb") as stream:
                original = first.setdefault(hashlib.file_digest(stream, "sha256").digest(), file)
            if original is not file:
                found.append(f"{file.name} (the same bytes as {original.name})")
    return found


def _song_files(folder: Path, missing: list[str], outside: list[str]) -> Iterator[Path]:
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
    whole = folder.resolve()
    for sample in samples:
        # Newer manifests are relative to their folder, older ones to the directory that upstream was started in.
        file = next((file for file in (folder / sample, Path(sample)) if _is_file(file)), None)
        if file is None:
            missing.append(sample)
        elif file.resolve().is_relative_to(whole):
            yield Path(os.path.normpath(file.absolute()))
        else:
            outside.append(sample)


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
