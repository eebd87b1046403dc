"""Looks at a folder of preprocessed songs before anything is loaded: what is in it, what is wrong, whether it fits."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import Refusal
from ..files import is_companion, not_a_file, read_json_object
from ..run import ModelFacts
from ..text import counted
from ..variants import VARIANTS, words_of
from .audio import AUDIO
from .making import Making, check_making, making_of, renew_command
from .one_song import read_song
from .values import hash_of

FRAMES_A_SECOND: Final = 25  # frames per second of ACE-Step 1.5's latents


@dataclass(frozen=True)
class Dataset:
    """A folder of preprocessed songs."""

    folder: Path
    songs: int  # number of songs that can be read
    condition_width: int  # D of every song's ``encoder_hidden_states [L,D]``
    channels: int  # channels of latents and context together, the same for every song
    missing: tuple[str, ...]  # entries of manifest.json for which there is no file; upstream leaves them out
    # files, makings: the songs' files, in the order in which they are listed, and how each was made.
    files: tuple[Path, ...] = ()
    frames: int = 0  # length of all songs together, in frames of latents
    links: tuple[Path, ...] = ()  # songs that are links to a file outside of the folder
    makings: tuple[Making, ...] = ()

    @property
    def minutes(self) -> float:
        """Length of all songs together."""
        return self.frames / FRAMES_A_SECOND / 60.0


def inspect_dataset(folder: Path, *, allow_duplicates: bool | None = False) -> Dataset:
    """Read what a dataset folder holds. With `allow_duplicates`, a song may be there more than once.

    None there means that it may not, and that no option allows it. Raises Refusal without a folder, without songs in
    it, or for files with problems: all of them are named.
    """
    files, missing, outside = listed_in(folder)
    problems = [f"{name} (manifest.json names it, and it lies outside of the folder)" for name in outside]
    widths: dict[int, list[str]] = {}
    channels = frames = 0
    makings: dict[Path, Making] = {}
    for file in dict.fromkeys(files):
        song, problem = read_song(file)
        if problem:
            problems.append(f"{file.name} ({problem})")
            continue
        makings[file] = making_of(song)
        frames += song["target_latents"].shape[0] * files.count(file)
        widths.setdefault(song["encoder_hidden_states"].shape[-1], []).append(file.name)
        channels = song["target_latents"].shape[-1] + song["context_latents"].shape[-1]
    usual = max(widths, key=lambda width: len(widths[width]), default=0)
    problems += [
        f"{name} (conditions of width {width}, most have {usual})"
        for width in widths
        if width != usual
        for name in widths[width]
    ]
    duplicates = [] if allow_duplicates else _duplicates(files)
    if problems or duplicates:
        to_do = ["Preprocess them again, or take them out of the folder."] if problems else []
        if duplicates:
            on_purpose = "" if allow_duplicates is None else ", or train on them on purpose: --allow-duplicates"
            to_do.append(f"Take the copies out{on_purpose}.")
        found = ", ".join(problems + duplicates)
        raise Refusal(f"Not songs to train on in {folder}: {found}. {' '.join(to_do)}")
    whole = folder.resolve()
    links = tuple(file for file in files if not file.resolve().is_relative_to(whole))
    made = tuple(makings[file] for file in files)
    return Dataset(folder, len(files), usual, channels, tuple(missing), tuple(files), frames, links, made)


def listed_in(folder: Path) -> tuple[list[Path], list[str], list[str]]:
    """What a training in a folder would read, nothing opened yet.

    Returns the files in their order, also those that are no songs; names in manifest.json that are not there; and names
    there that lie outside of the folder. Raises Refusal without a folder, or songs in it; it says what there is
    instead.
    """
    if folder.is_file():
        raise Refusal(f"No dataset folder {folder}: it is a file. Name the folder of .pt files that it is in.")
    if not folder.is_dir():
        raise Refusal(f"No dataset folder {folder}. Expected a folder of .pt files, which acestep-train prepare makes.")
    files, missing, outside = _song_files(folder)
    if not files and not outside:
        found = _instead_of_songs(folder, missing)
        raise Refusal(f"No songs in {folder}: expected .pt files, which acestep-train prepare makes{found}.")
    return files, missing, outside


def songs_in(folder: Path) -> list[Path]:
    """The files that a training in a folder reads: those of manifest.json, else every .pt file, sorted."""
    try:
        return [file for file in _song_files(folder)[0] if not not_a_file(file)]
    except (Refusal, OSError):
        return []


def made_for(folder: Path) -> str | None:
    """The model for which songs were preprocessed, when a ``preprocess_meta.json`` says so, as Side-Step writes it."""
    try:
        said = read_json_object(folder / "preprocess_meta.json").get("model_variant")
    except (OSError, ValueError):
        return None
    return said if isinstance(said, str) and said else None


def _instead_of_songs(folder: Path, missing: list[str]) -> str:
    """The end of a sentence: what a folder without songs holds instead, and what to do."""
    if missing:
        there = counted(sum(1 for _ in folder.glob("*.pt")), "file")
        names = f"; manifest.json names {len(missing)} that are not there, such as {missing[0]}"
        return f"{names}. The folder has {there}: delete manifest.json to use every .pt file"
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    below = {inner: songs for inner in entries if inner.is_dir() and (songs := _songs_directly_in(inner))}
    if below:
        inner, songs = max(below.items(), key=lambda found: found[1])
        others = f", and {len(below) - 1} more such folders" if len(below) > 1 else ""
        return f", found {songs} in the folder {inner}{others}. Name that folder"
    audio = Counter(file.suffix.lower() for file in entries if file.suffix.lower() in AUDIO)
    if not audio:
        return "" if entries else ", and the folder is empty"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(audio.items()))
    return (
        f", found audio ({kinds}). Prepare it first: acestep-train prepare AUDIO_DIR --model MODEL --output SONGS, and "
        "train on the folder SONGS. Songs that ACE-Step's LoRA training tab has preprocessed work, too"
    )


def _songs_directly_in(folder: Path) -> int:
    try:
        return sum(file.suffix == ".pt" and not is_companion(file.name) for file in folder.iterdir())
    except OSError:
        return 0


def _duplicates(files: list[Path]) -> list[str]:
    """Files that are there more than once, by name in the manifest or byte for byte."""
    found = [
        f"{file.name} (named {count} times in manifest.json)" for file, count in Counter(files).items() if count > 1
    ]
    by_size: dict[int, list[Path]] = {}
    for file in dict.fromkeys(files):
        if not not_a_file(file):
            by_size.setdefault(file.stat().st_size, []).append(file)
    first: dict[str, Path] = {}
    for alike in by_size.values():
        for file in alike if len(alike) > 1 else ():
            original = first.setdefault(hash_of(file), file)
            if original is not file:
                found.append(f"{file.name} (the same bytes as {original.name})")
    return found


def _song_files(folder: Path) -> tuple[list[Path], list[str], list[str]]:
    """What upstream would read, in its order of search: manifest.json's entries if there is one, else every .pt file.

    This includes what is not a file: upstream fails on a folder ``x.pt`` and hangs on a named pipe. It leaves out
    macOS's companion files, which the wrapper of upstream's list of songs leaves out as well. Behind the files are
    entries that are not there, and those that lie outside of the folder.
    """
    manifest = folder / "manifest.json"
    if not manifest.exists():
        songs = (file for file in folder.iterdir() if file.suffix == ".pt" and not is_companion(file.name))
        return sorted(songs), [], []
    if problem := not_a_file(manifest):
        raise Refusal(f"{manifest} {problem}. Delete it to use every .pt file.")
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        samples = content.get("samples", []) if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{manifest} cannot be read as JSON ({error}). Delete it to use every .pt file.") from None
    if not isinstance(samples, list) or not all(isinstance(sample, str) for sample in samples):
        raise Refusal(f'{manifest} has no list of file names under "samples". Delete it to use every .pt file.')
    files, missing, outside = list[Path](), list[str](), list[str]()
    whole = folder.resolve()
    for sample in samples:
        # Newer manifests are relative to their folder, older ones to the directory that upstream was started in.
        file = next((file for file in (folder / sample, Path(sample)) if not not_a_file(file)), None)
        if file is None:
            missing.append(sample)
        elif is_companion(file.name):
            continue
        elif file.resolve().is_relative_to(whole):
            files.append(Path(os.path.normpath(file.absolute())))
        else:
            outside.append(sample)
    return files, missing, outside


def check_songs(dataset: Dataset, facts: ModelFacts) -> None:
    """Refuse songs that do not fit a model, as far as its config shows. Raises Refusal."""
    _check_widths(dataset, facts)
    # What the songs say of themselves comes first: it says more than a file beside them.
    if dataset.makings:
        check_making(dataset.folder, dataset.files, dataset.makings, facts.name)
    _check_made_for(dataset, facts)


def _check_widths(dataset: Dataset, facts: ModelFacts) -> None:
    channels = facts.config.get("in_channels")
    if isinstance(channels, int) and dataset.channels != channels:
        raise Refusal(
            f"The songs in {dataset.folder} have {dataset.channels} channels (latents and context), {facts.name} takes "
            f"{channels}: they were preprocessed for another model. Preprocess them again with this one."
        )
    width = facts.config.get("encoder_hidden_size") or facts.config.get("hidden_size")
    if isinstance(width, int):
        check_width(dataset, facts.name, width)


def check_width(dataset: Dataset, model: str, width: int) -> None:
    if dataset.condition_width != width:
        raise Refusal(
            f"The songs in {dataset.folder} have conditions of width {dataset.condition_width}, {model} "
            f"expects {width}: they were preprocessed for another model. Preprocess them again with this one, or give "
            f"them its conditions, without audio and in seconds: {renew_command(dataset.folder, model)}"
        )


def _check_made_for(dataset: Dataset, facts: ModelFacts) -> None:
    """Refuse songs whose conditions come from the encoder of another family, where a file says so."""
    said = made_for(dataset.folder)
    if said is None:
        return
    turbo = facts.config.get("is_turbo", "turbo" in words_of(facts.name))
    then, now = words_of(said), words_of(facts.name)
    if not set(VARIANTS) & set(then):
        return
    if ("turbo" in then) != turbo or ("xl" in then) != ("xl" in now):
        raise Refusal(
            f"The songs in {dataset.folder} were preprocessed for {said} (preprocess_meta.json), and {facts.name} has "
            "another condition encoder (if the file is wrong, delete it). Preprocess them again with this model, or "
            f"give them its conditions, without audio and in seconds: {renew_command(dataset.folder, facts.name)}"
        )
