"""Prompts of one's own: a TOML file or a few options become songs to hear, encoded as the app encodes them.

    [[prompt]]
    caption = "a slow piano piece"
    lyrics = "[Instrumental]"        # or lyrics_file = "words.txt", beside this file
    language = "en"
    bpm = 72
    key = "A minor"
    seconds = 30

Names are optional (``name = "piano"``). Values are brought into the model's words, as when songs are prepared. The text
encoder is loaded for that moment and given up.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..engine import song_encoding
from ..engine.song_files import GENERATED, Encoders, Machine, record_of, song_of, words_of, write_song
from ..errors import Refusal
from ..songs.dataset import FRAMES_A_SECOND
from ..songs.song_text import SongText, text_of_song
from ..songs.vocabulary import INSTRUMENTAL
from ..text import shown
from .conditions import LATENT_CHANNELS, read_silence

SECONDS: Final = 30.0  # length of a prompt's clip where none is said

_LONGEST: Final = 600.0
_FIELDS: Final[Mapping[str, Any]] = {
    "name": str,
    "caption": str,
    "lyrics": str,
    "lyrics_file": str,
    "language": str,
    "bpm": (int, float, str),
    "key": str,
    "time_signature": (str, int),
    "seconds": (int, float),
}


@dataclass(frozen=True)
class Prompt:
    """What to generate a clip of some seconds from: its name, and what the model is told."""

    name: str
    text: SongText
    seconds: float = SECONDS

    @property
    def key(self) -> str:
        """Eight signs that tell one prompt from another."""
        return hashlib.sha256(repr((words_of(self.text, 1), self.seconds)).encode()).hexdigest()[:8]

    @property
    def problems(self) -> tuple[str, ...]:
        """What the model does not know of it, or is told in place of what is missing.

        Advice about files beside a song is left out: a prompt has none.
        """
        return tuple(re.sub(r"\. (Write|Name it in) .*", "", problem) for problem in self.text.problems)


def prompt_of(values: Mapping[str, Any], where: str) -> Prompt:
    """A prompt from its fields, as in the file; `where` says whose they are, for messages. Raises Refusal."""
    for field, value in values.items():
        if field not in _FIELDS:
            raise Refusal(f"{where} has {shown(field, 40)}, expected {', '.join(_FIELDS)}.")
        if not isinstance(value, _FIELDS[field]) or isinstance(value, bool):
            raise Refusal(f"{where} has {field} = {shown(value, 60)}, expected {_kinds(_FIELDS[field])}.")
    if not str(values.get("caption", "")).strip():
        raise Refusal(f'{where} has no caption. Say what it is to sound like: caption = "..."')
    seconds = float(values.get("seconds", SECONDS))
    if not 0.04 <= seconds <= _LONGEST:
        raise Refusal(f"{where} has seconds = {seconds:g}, expected 0.04 to {_LONGEST:g}.")
    first_words = "-".join(str(values["caption"]).split()[:5]).lower()
    name = str(values.get("name") or "").strip() or plain_name(first_words)
    told = {
        "caption": values["caption"],
        # Whoever types a prompt and no lyrics wants nobody to sing; a song without lyrics may have lost them.
        "lyrics": str(values.get("lyrics", "")).strip() or INSTRUMENTAL,
        "language": values.get("language", ""),
        "bpm": values.get("bpm"),
        "keyscale": values.get("key", ""),
        "timesignature": values.get("time_signature", ""),
    }
    text = text_of_song(told, name)
    said = f"{where[0].lower()}{where[1:]}"
    changes = tuple(line.replace(f"({name} itself)", f"({said})") for line in text.changes)
    return Prompt(name, replace(text, changes=changes), seconds)


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a TOML file. Raises Refusal."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refusal(f"The prompts {file} cannot be read ({error.strerror or error}). Name a file that can.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{file} is not TOML in UTF-8 ({error}). Correct it.") from None
    entries = content.get("prompt")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise Refusal(f'{file} has no prompts. Write each under a line [[prompt]], with caption = "..."')
    if unknown := sorted(content.keys() - {"prompt"}):
        raise Refusal(f"{file} has {shown(unknown[0], 40)} outside of a [[prompt]]. Expected nothing else there.")
    prompts: list[Prompt] = []
    for number, entry in enumerate(entries, 1):
        where = f"{file.name}, prompt {number},"
        values = dict(entry)
        if (other := values.pop("lyrics_file", None)) is not None:
            if "lyrics" in values:
                raise Refusal(f"{where} has both lyrics and lyrics_file. Keep one.")
            values["lyrics"] = read_lyrics(file.parent / str(other))
        prompt = prompt_of(values, where)
        taken = {one.name for one in prompts}
        name = next(n for n in (prompt.name, *(f"{prompt.name}-{k}" for k in range(2, 1000))) if n not in taken)
        prompts.append(Prompt(name, prompt.text, prompt.seconds))
    return prompts


def read_lyrics(file: Path) -> str:
    """A text file with lyrics. Raises Refusal."""
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise Refusal(f"The lyrics {file} cannot be read ({error.strerror or error}). Name a file that can.") from None
    except UnicodeDecodeError:
        raise Refusal(f"The lyrics {file} are not UTF-8. Save them as UTF-8 in your editor.") from None


def encode_prompts(
    prompts: Sequence[Prompt], model: Any, model_folder: Path, folder: Path, root: Path | None = None
) -> list[Path]:
    """Write a song for each prompt, with the conditions of a generation and latents of zeros. Returns the files.

    The model has its condition encoder, its folder the latents of silence. The text encoder is loaded where the
    condition encoder is, and given up afterwards. The random states of torch are afterwards as they were. ACE-Step is
    imported from `root`, if that is given. Raises Refusal if there is no text encoder, or this ACE-Step cannot encode.
    """
    import torch

    place = song_encoding.find_text_encoder(model_folder.parent)
    weight = next(model.encoder.parameters())
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        handler = song_encoding.make_handler(
            song_encoding.import_handler(root),
            device=str(weight.device),
            dtype=weight.dtype,
            model=model,
            tokenizer=song_encoding.load_tokenizer(place),
            text_encoder=song_encoding.load_text_encoder(place, weight.device, weight.dtype),
            silence=read_silence(model_folder),
        )
        files = []
        folder.mkdir(parents=True, exist_ok=True)
        machine = Machine.of(weight.device.type, weight.dtype, "", root)
        encoders = Encoders(model_folder.name, "", "", "", "")
        for prompt in prompts:
            latents = torch.zeros(max(1, round(prompt.seconds * FRAMES_A_SECOND)), LATENT_CHANNELS)
            words = words_of(prompt.text, len(latents))
            encoded = song_encoding.encode(handler, words, len(latents))
            record = record_of(GENERATED, encoders, encoded, words, prompt.text, latents, machine, {})
            file = folder / f"{plain_name(prompt.name)}.pt"
            write_song(file, song_of(latents, encoded, prompt.text, "", record))
            files.append(file)
    return files


def plain_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.]+", "-", name).strip("-._")[:60] or "prompt"


def _kinds(kinds: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number"}
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(names[kind] for kind in several)
