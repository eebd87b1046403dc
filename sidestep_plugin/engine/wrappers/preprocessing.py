"""The app's own preprocessing: if asked for, its songs get the conditions that the app generates with.

Upstream's ``DatasetBuilder.preprocess_to_tensors`` does its whole job first. Then each song that it has written gets
new conditions from its own metadata, by the handler that the app has loaded, and is written again as a whole. Without
``SIDESTEP_CONDITIONS=generated`` upstream's files stay as they are, byte for byte, and a line in the log names the
variable. What upstream hides is told: songs that failed, and a list of songs that is empty now.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, Final

from ...errors import Refusal
from ...songs.one_song import frames_in, load_song
from ...songs.song_text import text_of_song
from ...text import counted
from ..checkout import beside
from ..host import Host, log_of
from ..song_encoding import TEXT_ENCODER, encode
from ..song_files import GENERATED, Encoders, Machine, record_of, song_of, words_of, write_song

CONDITIONS: Final = "SIDESTEP_CONDITIONS"
"""Environment variable: ``generated`` for conditions as generated; anything else leaves upstream's."""


def builder_of(trainer: Any) -> Any:
    """Upstream's class ``DatasetBuilder``, which its training package has imported; None in a version without it."""
    return getattr(beside(trainer, "dataset_builder"), "DatasetBuilder", None)


def wrap_preprocessing(host: Host, original: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream's ``preprocess_to_tensors(self, dit_handler, output_dir, ...)``, which returns (paths, message)."""
    log = log_of(host.trainer)

    @wraps(original)
    def preprocess_to_tensors(self: Any, dit_handler: Any, output_dir: str, *args: Any, **kwargs: Any) -> Any:
        said = os.environ.get(CONDITIONS, "").strip().lower()
        if said not in ("", GENERATED, "upstream"):
            log.warning(f"{CONDITIONS}={said} is not known, expected generated. ACE-Step's own conditions are kept.")
        wanted = len([sample for sample in getattr(self, "samples", ()) if getattr(sample, "labeled", False)])
        answer = original(self, dit_handler, output_dir, *args, **kwargs)
        try:
            paths, message = answer
        except (TypeError, ValueError):  # a version that answers in another way
            return answer
        failed = wanted - len(paths)
        if failed > 0:
            emptied = "" if paths else f" {Path(output_dir) / 'manifest.json'} lists no songs now."
            log.error(
                f"{counted(failed, 'song')} of {wanted} could not be preprocessed; see the errors above.{emptied}"
            )
        if said != GENERATED:
            if paths:
                log.info(
                    f"These songs are encoded in another way than the app generates. Set {CONDITIONS}=generated before "
                    "starting the app, or give them the conditions of a generation now: acestep-train prepare --renew "
                    f"{output_dir} --model MODEL --output DIR"
                )
            return answer
        refused = _renew(dit_handler, paths, log)
        if refused:
            return paths, f"❌ {counted(len(refused), 'song')} kept ACE-Step's own conditions: {'; '.join(refused)}"
        if failed > 0:
            message = f"❌ {counted(failed, 'song')} of {wanted} could not be preprocessed. {message}"
        return paths, f"{message}, with conditions as generated" if paths else message

    return preprocess_to_tensors


def _renew(handler: Any, paths: Sequence[str], log: Any) -> list[str]:
    """Give songs the conditions of a generation | returns those that kept their own, with the reason."""
    refused = []
    for path in paths:
        file = Path(path)
        try:
            _renew_one(handler, file)
        except Exception as error:  # a song that keeps upstream's conditions is told, not lost
            reason = " ".join(str(error).split()) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
            refused.append(f"{file.name} ({reason})")
            log.error(f"{file.name} keeps ACE-Step's own conditions: {reason}")
    return refused


def _renew_one(handler: Any, file: Path) -> None:
    import torch

    old = load_song(file)
    metadata = old.get("metadata") or {}
    latents = old["target_latents"][: frames_in(file)].clone()
    text = text_of_song(metadata, file.name, as_typed=True)
    words = words_of(text, len(latents))
    encoded = encode(handler, words, len(latents))
    if not bool(encoded.encoder_hidden_states.isfinite().all()):
        raise Refusal("its conditions hold NaN or infinity")
    attention = getattr(getattr(handler.model, "config", None), "_attn_implementation", None)
    machine = Machine.of(torch.device(str(handler.device)).type, handler.dtype, str(attention or ""))
    record = record_of(GENERATED, _encoders_of(handler), encoded, words, text, latents, machine, {})
    song = song_of(latents, encoded, text, "", record)
    song["metadata"] = {**metadata, "preprocess_mode": "lora", "prepared": record}
    del old
    write_song(file, song)


def _encoders_of(handler: Any) -> Encoders:
    """What the app has loaded, by its files; hashes are empty where their folder is not known."""
    return _encoders_in(Path(str(getattr(getattr(handler.model, "config", None), "_name_or_path", "") or "")))


@cache
def _encoders_in(folder: Path) -> Encoders:
    text_encoder = folder.parent / TEXT_ENCODER
    if folder.is_dir() and text_encoder.is_dir():
        return Encoders.of(folder, text_encoder)
    return Encoders(folder.name, "", "", "", "")
