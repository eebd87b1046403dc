"""Reads one song and says what is wrong with it: which tensors it holds, of which types, and whether they agree.

A song is a ``.pt`` file with five tensors, written by upstream's preprocessing. Files are opened with
``weights_only=True`` and memory-mapped, so this reads little more than their headers and masks.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..files import not_a_file, stand_in
from ..text import counted

if TYPE_CHECKING:
    import torch

SONG_TENSORS: Final = {
    "target_latents": 2,
    "attention_mask": 1,
    "encoder_hidden_states": 2,
    "encoder_attention_mask": 1,
    "context_latents": 2,
}
"""Tensors of a song with their number of dimensions: [T,64], [T], [L,D], [L], [T,128]."""

MASK_OF: Final = {
    "target_latents": "attention_mask",
    "context_latents": "attention_mask",
    "encoder_hidden_states": "encoder_attention_mask",
}
"""The mask of each tensor of vectors: one value a row, 0 where the row is padding."""

_WIDTHS: Final = {"target_latents": 64, "context_latents": 128}
_SAME_LENGTH: Final = (
    ("attention_mask", "target_latents"),
    ("context_latents", "target_latents"),
    ("encoder_attention_mask", "encoder_hidden_states"),
)
_FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
_MASKS: Final = _FLOATS | {"bool", "uint8", "int8", "int16", "int32", "int64"}


def load_song(file: Path) -> Any:
    """What a file holds, memory-mapped where the format allows it. Raises what torch raises for a damaged file."""
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # only torch's zip format can be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def metadata_in(song: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a loaded song says about itself under "metadata"; empty where it says nothing."""
    metadata = song.get("metadata")
    return metadata if isinstance(metadata, Mapping) else {}


def frames_in(file: Path) -> int:
    """Number of the last frame that a song's mask shows; 0 for a file that is no song."""
    song, problem = read_song(file)
    return 0 if problem else int(song["attention_mask"].nonzero().max()) + 1


def longest(files: Iterable[Path]) -> tuple[int, int]:
    """The most frames of latents that one of the songs has, and the most tokens of a condition; (0, 0) for none.

    Files that cannot be read are left out: whatever trains on them refuses them.
    """
    frames = tokens = 0
    for file in files:
        try:
            song = load_song(file)
            frames = max(frames, len(song["target_latents"]))
            tokens = max(tokens, len(song["encoder_hidden_states"]))
        except Exception:  # torch raises a dozen types for a damaged file
            continue
    return frames, tokens


def read_song(file: Path) -> tuple[dict[str, Any], str]:
    """A song's tensors, and what is wrong with them: what was found and what was expected, "" when nothing is."""
    if problem := not_a_file(file):
        return {}, problem
    try:
        song = load_song(file)
    except Exception as error:  # torch raises a dozen types for a damaged file
        return {}, f"cannot be read: {_why(file, error)}"
    if not isinstance(song, dict):
        return {}, f"holds a {type(song).__name__}, expected a dictionary of tensors"
    problem = _wrong_tensor(song) or _wrong_together(song)
    return ({}, problem) if problem else (song, "")


def _why(file: Path, error: Exception) -> str:
    """Why a file cannot be loaded, in words that say what it is if that is known."""
    if what := stand_in(file):
        return f"it {what}"
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as unreadable:
        return unreadable.strerror or type(unreadable).__name__
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip format, and the older one
        return "it is not a file of tensors as torch.save writes them"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds Python objects beside tensors, which could run code; expected only tensors"
    return type(error).__name__


def _wrong_tensor(song: dict[str, Any]) -> str:
    """What is wrong with a tensor on its own: it is missing, or has another shape or type."""
    import torch

    for key, dimensions in SONG_TENSORS.items():
        tensor = song.get(key)
        if not isinstance(tensor, torch.Tensor):
            return f"no tensor {key}"
        if tensor.dim() != dimensions:
            return f"{key} has shape {list(tensor.shape)}, expected {counted(dimensions, 'dimension')}"
        if tensor.numel() == 0:
            return f"{key} is empty"
        width = _WIDTHS.get(key, tensor.shape[-1])
        if tensor.shape[-1] != width:
            return f"{key} has shape {list(tensor.shape)}, expected {width} channels"
        found = str(tensor.dtype).removeprefix("torch.")
        is_mask = key not in MASK_OF
        if found not in (_MASKS if is_mask else _FLOATS) or tensor.layout != torch.strided:
            expected = "float, int or bool" if is_mask else "float32, float16 or bfloat16"
            layout = "" if tensor.layout == torch.strided else "sparse "
            return f"{key} is {layout}{found}, expected {expected}"
        if tensor.requires_grad:  # worker processes cannot hand such a tensor over
            return f"{key} requires gradients, expected a tensor saved after detach()"
        if is_mask and (odd := _not_0_or_1(tensor)) is not None:
            return f"{key} has the value {odd:g}, expected only 0 and 1"
    return ""


def _not_0_or_1(mask: torch.Tensor) -> float | None:
    """The first value of a mask that is neither 0 nor 1; NaN and infinity are left to the check of all values."""
    odd = mask[(mask != 0) & (mask != 1) & mask.isfinite()]
    return float(odd[0]) if len(odd) else None


def _wrong_together(song: dict[str, Any]) -> str:
    """What is wrong between tensors: upstream pads the shorter one with zeros, and trains on that."""
    for one, other in _SAME_LENGTH:
        if len(song[one]) != len(song[other]):
            return f"{one} has {counted(len(song[one]), 'row')}, expected {len(song[other])} as in {other}"
    for mask in dict.fromkeys(MASK_OF.values()):
        if not bool((song[mask] != 0).any()):
            return f"{mask} is 0 everywhere, expected 1 where there is something to train on"
    return ""
