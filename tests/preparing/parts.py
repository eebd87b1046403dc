"""What tests of preparing ask of generations and of files."""

from __future__ import annotations

import hashlib

import torch


class Left(Exception):
    """Raised to leave a generation as soon as the decoder was called."""


def handed_to_the_decoder(handler, words, seconds=None):
    """What the app's generate_music hands to the decoder first | conditions [L,D] and context [T,128] of one song."""
    seen = []

    def leave(_, __, kwargs):
        seen.append({name: kwargs[name].clone() for name in ("encoder_hidden_states", "context_latents")})
        raise Left

    hook = handler.model.decoder.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        answer = handler.generate_music(
            captions=words["caption"],
            lyrics=words["lyrics"],
            bpm=words["bpm"],
            key_scale=words["keyscale"],
            time_signature=words["timesignature"],
            vocal_language=words["language"],
            audio_duration=words["seconds"] if seconds is None else seconds,
            batch_size=1,
            seed=3,
            use_random_seed=False,
        )
    finally:
        hook.remove()
    assert seen, f"the decoder was never called: {answer}"
    return seen[0]["encoder_hidden_states"][0], seen[0]["context_latents"][0]


def songs_of(folder):
    return {file.stem: torch.load(file, weights_only=True) for file in sorted(folder.glob("*.pt"))}


def digests(folder):
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
