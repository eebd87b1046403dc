"""How a song's tensors were made: as it says itself, else as its tensors show. No model is needed.

A song that ``acestep-train prepare`` made says it under ``metadata["prepared"]``, in plain types. Of these keys are
read here: ``form`` ("generated" or "upstream"), ``model`` (name of the model's folder) and ``encoders`` (hash of what
made the conditions). Other songs are told by what upstream's preprocessing does (measured, all versions until
2026-05-01): prompt and lyrics padded to 256 and 512 rows, which makes 769 with the row for the reference audio; and in
the tab's mode "LoKr" the song's own latents as what the decoder is given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ..errors import Refusal
from ..text import counted, listed, shown
from .one_song import metadata_in

if TYPE_CHECKING:
    import torch

PADDED_ROWS: Final = 256 + 512 + 1  # rows of conditions that upstream's preprocessing makes of every song

Form = Literal["generated", "upstream", "own audio", "unknown"]

FORMS: Final[Mapping[Form, str]] = {
    "generated": "as generated",
    "upstream": "ACE-Step's way",
    "own audio": "LoKr mode",
    "unknown": "not known",
}
"""The forms of conditions, each with its word in tables."""


@dataclass(frozen=True)
class Making:
    """How the tensors of one song were made."""

    # "generated": conditions as the app generates with; "upstream": those of ACE-Step's preprocessing; "own audio": the
    # song's own latents are in the decoder's input; "unknown": none of these can be shown.
    form: Form
    recorded: bool = False  # whether the song says so itself
    # model, encoders: folder name of the model whose encoder made the conditions, and what tells that encoder from
    # another of the same name; "" where the song does not say.
    model: str = ""
    encoders: str = ""
    # rows, hidden: rows of the conditions, and how many of them their mask hides.
    rows: int = 0
    hidden: int = 0


def making_of(song: Mapping[str, Any]) -> Making:
    """How a song was made, from what its ``.pt`` file holds (five tensors and "metadata")."""
    mask = song["encoder_attention_mask"]
    rows, hidden = len(mask), int((mask == 0).sum())
    metadata = metadata_in(song)
    record = metadata.get("prepared")
    said = record if isinstance(record, Mapping) else {}
    model, encoders = (str(said.get(key) or "") for key in ("model", "encoders"))
    form: Form
    if holds_itself(song) or (not said and str(metadata.get("preprocess_mode") or "").lower() == "lokr"):
        form = "own audio"
    elif said.get("form") in ("generated", "upstream"):
        return Making(said["form"], True, model, encoders, rows, hidden)
    else:
        form = "upstream" if rows == PADDED_ROWS else "unknown"
    return Making(form, False, model, encoders, rows, hidden)


def holds_itself(song: Mapping[str, Any]) -> bool:
    """Whether the decoder is given what it is to predict: the context's first 64 channels are the song's latents."""
    target: torch.Tensor = song["target_latents"]
    context: torch.Tensor = song["context_latents"]
    if not bool((context[0, :64] == target[0]).all()):
        return False  # the usual case, and nothing else of the file is read
    return bool((context[:, :64] == target).all()) and bool((target != 0).any())


def check_making(folder: Path, files: Sequence[Path], makings: Sequence[Making], model: str) -> None:
    """Refuse songs of a folder that must not be trained on, or not together, or not with a model of this name.

    Raises Refusal for songs that hold their own audio in the decoder's input, for several forms or encoders in one
    folder, and for songs of another model. All are named, and the command that mends it.
    """
    made = dict(zip(files, makings, strict=True))
    renew = renew_command(folder, model)
    if own := [file for file, making in made.items() if making.form == "own audio"]:
        raise Refusal(
            f"{_these(own)} in {folder} {'was' if len(own) == 1 else 'were'} preprocessed in ACE-Step's LoKr mode: "
            "the decoder is given the very audio that it is to predict, so it learns to copy, and validation means "
            f"nothing. Give them new conditions, without audio and in seconds: {renew}"
        )
    prepared = [file for file, making in made.items() if making.form == "generated"]
    if prepared and len(prepared) < len(made):
        others = [file for file in made if file not in set(prepared)]
        raise Refusal(
            f"Songs of two kinds in {folder}: conditions as generated in {_these(prepared, 3)}, and others in "
            f"{_these(others, 3)}. The model would be told the same thing in two ways. Give all of them the same "
            f"conditions: {renew}"
        )
    models: dict[tuple[str, str], list[Path]] = {}
    for file, making in made.items():
        if making.recorded and making.model:
            models.setdefault((making.model, making.encoders), []).append(file)
    if len(models) > 1:
        told = ", ".join(f"{name} ({_these(songs, 3)})" for (name, _), songs in models.items())
        if len({name for name, _ in models}) == 1:
            told = f"two versions of {next(iter(models))[0]}: " + " and ".join(_these(s, 3) for s in models.values())
        raise Refusal(
            f"The songs in {folder} were prepared with different models: {told}. Give all of them the conditions of "
            f"one: {renew}"
        )
    if models and (said := next(iter(models))[0]) != model and model:
        raise Refusal(
            f"The songs in {folder} were prepared with {shown(said)}, and {model} has another condition encoder. Give "
            f"them its conditions, without audio and in seconds: {renew}"
        )


def upstream_notice(folder: Path, makings: Sequence[Making], model: str) -> str | None:
    """One line for a training on songs that were encoded as ACE-Step's preprocessing does it; None for others."""
    songs = sum(making.form == "upstream" for making in makings)
    if not songs:
        return None
    return (
        f"{counted(songs, 'song')} encoded ACE-Step's way: padded, and without the lyrics header that the app uses "
        f"when it generates. For conditions as generated, in seconds and without audio: {renew_command(folder, model)}"
    )


def renew_command(folder: Path, model: str) -> str:
    """The command that gives songs the conditions of a model, as generated."""
    words = ["acestep-train", "prepare", "--renew", str(folder), "--model", model or "MODEL"]
    return " ".join(map(_word, [*words, "--output", f"{folder}-renewed"]))


def _word(text: str) -> str:
    plain = all(sign.isalnum() or sign in "-_./:,+=@%" or (sign == "\\" and os.name == "nt") for sign in text)
    if plain and text:
        return text
    return f'"{text}"' if os.name == "nt" else "'" + text.replace("'", "'\"'\"'") + "'"


def _these(files: Sequence[Path], longest: int = 5) -> str:
    return listed([file.name for file in files], longest)
