"""The app's dataset builder: labelled songs become tensors. Failures are messages; the manifest is written anyway."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Callable
from typing import Any

import torch

from acestep.training.dataset_builder_modules.models import AudioSample
from acestep.training.dataset_builder_modules.preprocess_context import build_context_latents
from acestep.training.dataset_builder_modules.preprocess_encoder import run_encoder
from acestep.training.dataset_builder_modules.preprocess_lyrics import encode_lyrics
from acestep.training.dataset_builder_modules.preprocess_text import build_text_prompt, encode_text
from acestep.training.dataset_builder_modules.preprocess_vae import tiled_vae_encode
from acestep.training.log import logger


class DatasetBuilder:
    """A list of songs."""

    def __init__(self) -> None:
        self.samples: list[AudioSample] = []

    def preprocess_to_tensors(
        self,
        dit_handler: Any,
        output_dir: str,
        max_duration: float = 240.0,
        preprocess_mode: str = "lora",
        progress_callback: Callable[[str], None] | None = None,
    ) -> tuple[list[str], str]:
        """Write a file for each labelled song | returns their paths and a message."""
        labeled = [sample for sample in self.samples if sample.labeled]
        if not labeled:
            return [], "❌ No labeled samples to preprocess"
        os.makedirs(output_dir, exist_ok=True)
        paths = []
        for sample in labeled:
            try:
                song = _preprocessed(dit_handler, sample, max_duration, preprocess_mode)
                path = os.path.join(output_dir, f"{sample.id}.pt")
                torch.save(song, path)
                paths.append(path)
            except Exception as error:
                logger.error(f"Error preprocessing {sample.filename}: {error}")
        manifest = {"metadata": {"name": "untitled"}, "samples": [os.path.basename(path) for path in paths]}
        with open(os.path.join(output_dir, "manifest.json"), "w", encoding="utf-8") as file:
            json.dump(manifest, file)
        failed = len(labeled) - len(paths)
        told = f"✅ Preprocessed {len(paths)}/{len(labeled)} samples to {output_dir}"
        return paths, told + (f" ({failed} failed)" if failed else "")


def _preprocessed(handler: Any, sample: AudioSample, max_duration: float, mode: str) -> dict[str, Any]:
    device, dtype = handler.device, handler.dtype
    audio = _load(sample.audio_path, max_duration)
    latents = tiled_vae_encode(handler.vae, audio.unsqueeze(0).to(device), dtype)
    parts = (handler.text_encoder, handler.text_tokenizer)
    text, text_mask = encode_text(*parts, build_text_prompt(sample, "prepend", False), device, dtype)
    lyrics, lyric_mask = encode_lyrics(*parts, sample.lyrics or "[Instrumental]", device, dtype)
    own = latents if mode == "lokr" else None
    states, mask = run_encoder(handler.model, text, text_mask, lyrics, lyric_mask, device, dtype, own)
    context = build_context_latents(handler.silence_latent, latents.shape[1], device, dtype, own)
    about = ("audio_path", "filename", "caption", "lyrics", "duration", "bpm", "keyscale", "timesignature", "language")
    return {
        "target_latents": latents[0],
        "attention_mask": torch.ones(latents.shape[1], dtype=dtype),
        "encoder_hidden_states": states[0],
        "encoder_attention_mask": mask[0],
        "context_latents": context[0],
        "metadata": {
            **{name: getattr(sample, name) for name in about},
            "is_instrumental": sample.is_instrumental,
            "preprocess_mode": mode,
        },
    }


def _load(path: str, max_duration: float) -> torch.Tensor:
    """A WAV file of 16 bit and 48 kHz as [2, N]."""
    with wave.open(path, "rb") as file:
        if (file.getframerate(), file.getsampwidth()) != (48000, 2):
            raise ValueError("the miniature reads 16 bit at 48 kHz only")
        frames, channels = file.readframes(int(max_duration * 48000)), file.getnchannels()
    samples = torch.frombuffer(bytearray(frames), dtype=torch.int16).view(-1, channels).T.float() / 2**15
    return samples.repeat(2, 1) if channels == 1 else samples[:2]
