"""What is asked for when songs are prepared, and what has to be there for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..engine.checkout import find_root
from ..engine.models import check_weights, checkpoint_folder, find_model
from ..engine.song_encoding import find_text_encoder
from ..engine.song_files import GENERATED
from ..errors import Refusal
from ..previews.decoding import find_vae, why_not
from ..run import ModelFacts
from ..songs.song_text import Trigger

LONGEST: Final = 240.0
"""Seconds of a song that are encoded, upstream's own limit."""


@dataclass(frozen=True)
class PrepareRequest:
    """What the user asked for.

    Attributes:
        source: the folder of audio, or of finished songs with `renew`.
        model: alias, folder name or path of the model that the songs are for.
        output: the folder for the songs.
        renew: whether finished songs get new conditions, without audio.
        conditions: "generated", or "upstream" for those of upstream's own preprocessing.
        texts: for `renew`, a folder with texts beside the songs' own metadata.
        dataset: a dataset JSON.
        trigger: a trigger word for all songs.
        language: code of what is sung in songs about which nothing else says it.
        as_typed: leave values as they are typed.
        strict: refuse songs with problems.
        low_memory: the VAE first for all songs, then the encoders.
        longest: seconds of a song that are encoded.
        device: auto, cpu, cuda, cuda:N, mps or xpu.
    """

    source: Path
    model: str
    output: Path
    renew: bool = False
    conditions: str = GENERATED
    texts: Path | None = None
    dataset: Path | None = None
    trigger: Trigger | None = None
    language: str | None = None
    as_typed: bool = False
    strict: bool = False
    low_memory: bool = False
    longest: float = LONGEST
    acestep_root: Path | None = None
    checkpoint_dir: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Places:
    """The folders that a request needs.

    Attributes:
        root: the checkout.
        model, text_encoder: folders of weights.
        vae: None where no audio is encoded.
    """

    root: Path
    model: Path
    text_encoder: Path
    vae: Path | None


def find_places(request: PrepareRequest) -> Places:
    """Find the folders, and check the model's files by their headers. Raises Refusal."""
    root = find_root(request.acestep_root)
    checkpoints = checkpoint_folder(request.checkpoint_dir, root)
    model = find_model(request.model, checkpoints)
    check_weights(model, ModelFacts.from_folder(model))
    text_encoder = find_text_encoder(checkpoints if (checkpoints / "vae").is_dir() else model.parent)
    if request.renew:
        return Places(root, model, text_encoder, None)
    vae = find_vae(checkpoints) or find_vae(model.parent)
    if reason := why_not(vae):
        raise Refusal(
            f"Audio is encoded by ACE-Step's VAE, and {reason}. Say where ACE-Step's models are with --checkpoint-dir "
            "DIR, in ACE-Step's own Python environment."
        )
    return Places(root, model, text_encoder, vae)


Say = Callable[[str], None]


def offline() -> None:
    """Keep transformers from asking the network, from greeting, and from drawing bars into a file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()
