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

LONGEST: Final = 240.0  # seconds of a song that are encoded, upstream's own limit


@dataclass(frozen=True)
class PrepareRequest:
    """What the user asked for."""

    # source, output: the folder of audio, or of finished songs with `renew`, and that for the songs.
    source: Path
    model: str  # alias, folder name or path of the model that the songs are for
    output: Path
    renew: bool = False  # whether finished songs get new conditions, without audio
    conditions: str = GENERATED  # "generated", or "upstream" for those of upstream's own preprocessing
    texts: Path | None = None  # for `renew`, a folder with texts beside the songs' own metadata
    dataset: Path | None = None  # a dataset JSON
    trigger: Trigger | None = None  # a trigger word for all songs
    language: str | None = None  # code of what is sung in songs about which nothing else says it
    as_typed: bool = False  # leave values as they are typed
    strict: bool = False  # refuse songs with problems
    low_memory: bool = False  # the VAE first for all songs, then the encoders
    longest: float = LONGEST  # seconds of a song that are encoded
    acestep_root: Path | None = None
    checkpoint_dir: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Places:
    """The folders that a request needs: the checkout, and those of weights. No VAE where no audio is encoded."""

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
