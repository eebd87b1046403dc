"""Songs as files: upstream's five tensors, and in ``metadata["prepared"]`` how they were made.

What is written depends on nothing but its content: no time, no local path and no random name, so the same song is the
same bytes in every run.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..files import is_companion, replacing
from ..registry import version_of
from ..songs.dataset import FRAMES_A_SECOND
from ..songs.song_text import POSITIONS, SongText
from ..songs.values import hash_of
from .checkout import project_of
from .song_encoding import Encoded, Words

if TYPE_CHECKING:
    import torch

RECORD: Final = "prepared"
"""Key in a song's metadata for what it says about how it was made."""
SCHEMA: Final = 1

GENERATED: Final = "generated"
UPSTREAM: Final = "upstream"

_TOKENIZER: Final = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def words_of(text: SongText, frames: int) -> Words:
    """What the app would be asked for to generate a song: its text, and its length to the frame."""
    return Words(
        caption=text.prompt,
        lyrics=text.lyrics,
        language=text.language,
        bpm=text.bpm,
        keyscale=text.keyscale,
        timesignature=text.timesignature,
        seconds=frames / FRAMES_A_SECOND,
    )


@dataclass(frozen=True)
class Encoders:
    """What makes the conditions, by hashes of its files (SHA-256; "" for what cannot be read)."""

    model: str  # name of its folder
    condition_encoder: str  # the tensors ``encoder.*`` of the model
    silence: str
    text_encoder: str
    tokenizer: str

    @classmethod
    def of(cls, model: Path, text_encoder: Path) -> Encoders:
        """Read the files of a model and of the text encoder: about 2.5 GB for the official ones."""
        return cls(
            model.name,
            hash_of_weights(model, "encoder."),
            _hash_of_files(model, ("silence_latent.pt",)),
            hash_of_weights(text_encoder),
            _hash_of_files(text_encoder, _TOKENIZER),
        )

    @property
    def hash(self) -> str:
        """One hash for all; the same for two folders that hold the same."""
        parts = (self.condition_encoder, self.silence, self.text_encoder, self.tokenizer)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Sound:
    """Where a song's latents come from."""

    audio: str  # SHA-256 of the audio file
    vae: str  # its hash
    seconds: float  # length of the audio that was encoded
    longest: float  # seconds to which the audio was cut if it was longer
    reader: str  # how the file was read

    @property
    def seed(self) -> int:
        """The seed of the VAE's draw: from the audio, so that it is the same in every run."""
        return int(self.audio[:15], 16)


@dataclass(frozen=True)
class Machine:
    """On what a song was encoded. Another device, dtype or way of attention gives other bits."""

    device: str
    dtype: str
    attention: str
    torch_version: str
    upstream: str
    plugin: str

    @classmethod
    def of(cls, device: str, dtype: torch.dtype, attention: str, root: Path | None = None) -> Machine:
        """With the versions of torch, of this project, and of upstream where its checkout is known."""
        import torch

        plugin = version_of("sidestep-plugin") or ""
        name = str(dtype).removeprefix("torch.")
        upstream = str(project_of(root).get("version", ""))
        return cls(device, name, attention, str(torch.__version__), upstream, plugin)


def record_of(
    form: str,
    encoders: Encoders,
    encoded: Encoded,
    words: Words,
    text: SongText,
    latents: torch.Tensor,
    machine: Machine,
    sound: Mapping[str, Any],
) -> dict[str, Any]:
    """What a song says about how it was made, in plain types.

    Args:
        form: "generated" or "upstream".
        latents: shape [T,64].
        sound: where the latents come from: ``asdict(Sound)``, or what the song has said before; may be empty.
    """
    told = encoded.told
    return {
        "schema": SCHEMA,
        "form": form,
        "model": encoders.model,
        "encoders": encoders.hash,
        **{name: value for name, value in asdict(encoders).items() if name != "model"},
        "words": asdict(words),
        "prompt": told.prompt,
        "lyrics": told.lyrics,
        "prompt_tokens": told.prompt_tokens,
        "lyric_tokens": told.lyric_tokens,
        "caption_cut": told.prompt_lost,
        "lyrics_cut": told.lyrics_lost,
        "trigger": text.trigger,
        "trigger_position": text.position if text.trigger else "",
        "frames": len(latents),
        "seconds": len(latents) / FRAMES_A_SECOND,
        "latents": hash_of_tensor(latents),
        "sound": dict(sound),
        "machine": asdict(machine),
    }


def song_of(
    latents: torch.Tensor, encoded: Encoded, text: SongText, audio: str, record: Mapping[str, Any]
) -> dict[str, Any]:
    """A song as upstream's preprocessing saves it, with a record of how it was made.

    Args:
        latents: shape [T,64].
        audio: the audio's path from the folder that it was found in, with slashes.
    """
    import torch

    seconds = len(latents) / FRAMES_A_SECOND
    return {
        "target_latents": latents.contiguous(),
        "attention_mask": torch.ones(len(latents), dtype=latents.dtype),
        "encoder_hidden_states": encoded.encoder_hidden_states.contiguous(),
        "encoder_attention_mask": encoded.encoder_attention_mask.contiguous(),
        "context_latents": encoded.context_latents.contiguous(),
        "metadata": {
            "audio_path": audio,
            "filename": audio.rpartition("/")[2],
            "caption": text.prompt,
            "lyrics": text.lyrics,
            "duration": int(seconds),
            "bpm": text.bpm,
            "keyscale": text.keyscale,
            "timesignature": text.timesignature,
            "language": text.language,
            "is_instrumental": text.instrumental,
            "genre": text.genre,
            "custom_tag": text.trigger,
            "preprocess_mode": "lora",
            RECORD: dict(record),
        },
    }


def bytes_of(song: Mapping[str, Any]) -> bytes:
    """A song as the bytes of a ``.pt`` file; the same for the same content."""
    import torch

    # A pickle also tells which of its texts are one object. Read from JSON, that depends on the content alone.
    plain = {
        name: value if isinstance(value, torch.Tensor) else json.loads(json.dumps(value))
        for name, value in song.items()
    }
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return buffer.getvalue()


def write_song(file: Path, song: Mapping[str, Any]) -> None:
    """Write a song whole or not at all. Raises OSError."""
    content = bytes_of(song)
    with replacing(file) as stream:
        stream.write(content)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all; a file that holds the same is left alone. Raises OSError."""
    new = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    if not file.is_file() or file.read_bytes() != new:
        with replacing(file) as stream:
            stream.write(new)


def manifest_of(names: list[str], text: SongText | None) -> dict[str, Any]:
    """A manifest.json as upstream writes it, without the time of writing.

    Args:
        names: file names of the songs.
        text: one whose trigger word all songs share, or None.
    """
    position = next((theirs for theirs, ours in POSITIONS.items() if text is not None and ours == text.position), "")
    about = {
        "name": "prepared by acestep-train prepare",
        "custom_tag": text.trigger if text is not None else "",
        "tag_position": position or "prepend",
        "num_samples": len(names),
    }
    return {"metadata": about, "samples": names, "num_samples": len(names)}


def record_in(metadata: Any) -> Mapping[str, Any] | None:
    """What a song says about how it was made, from its metadata; None for one that nobody prepared here."""
    found = metadata.get(RECORD) if isinstance(metadata, Mapping) else None
    return found if isinstance(found, Mapping) and found.get("schema") == SCHEMA else None


# -- hashes ------------------------------------------------------------------------------------------------------------


def hash_of_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    plain = tensor.detach().cpu().contiguous()
    size = plain.numel() * plain.element_size()
    # numpy, which could hand over the bytes, knows no bf16 and need not be installed.
    return hashlib.sha256((ctypes.c_char * size).from_address(plain.data_ptr()) if size else b"").hexdigest()


def hash_of_weights(folder: Path, prefix: str = "") -> str:
    """SHA-256 of the tensors in a folder's safetensors files whose names begin with `prefix`, in the order of names.

    Other kinds of weights are hashed as whole files. "" for a folder without weights. Raises Refusal.
    """
    files = [file for file in sorted(folder.glob("*.safetensors")) if not is_companion(file.name)]
    if not files:
        return _hash_of_files(folder, tuple(file.name for file in sorted(folder.glob("*.bin"))))
    found: dict[str, tuple[Path, int, int, str]] = {}
    for file in files:
        try:
            for name, (start, end, kind) in _tensors_in(file).items():
                if name.startswith(prefix):
                    found[name] = file, start, end, kind
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise Refusal(f"{file} cannot be read ({error}). Download it again.") from None
    digest = hashlib.sha256()
    for name in sorted(found):
        file, start, end, kind = found[name]
        digest.update(f"{name}\0{kind}\0".encode())
        with file.open("rb") as stream:
            stream.seek(start)
            while start < end:
                piece = stream.read(min(2**22, end - start))
                if not piece:
                    raise Refusal(f"{file} ends before its last tensor. Download it again.")
                digest.update(piece)
                start += len(piece)
    return digest.hexdigest() if found else ""


def _tensors_in(file: Path) -> dict[str, tuple[int, int, str]]:
    """Where each tensor of a safetensors file begins and ends, and its dtype and shape as text."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > 2**27:
            raise ValueError("its header is too long")
        header = json.loads(stream.read(length))
    first = 8 + length
    return {
        name: (first + about["data_offsets"][0], first + about["data_offsets"][1], f"{about['dtype']}{about['shape']}")
        for name, about in header.items()
        if name != "__metadata__"
    }


def _hash_of_files(folder: Path, names: tuple[str, ...]) -> str:
    there = [(name, hash_of(folder / name)) for name in names if (folder / name).is_file()]
    return hashlib.sha256(repr(there).encode()).hexdigest() if there else ""
