"""The prompt, padded to 256 tokens."""

from __future__ import annotations

from typing import Any

import torch

from acestep.constants import DEFAULT_DIT_INSTRUCTION, PROMPT
from acestep.training.dataset_builder_modules.models import AudioSample


def build_text_prompt(sample: AudioSample, tag_position: str, use_genre: bool) -> str:
    told = (
        f"- bpm: {sample.bpm or 'N/A'}\n- timesignature: {sample.timesignature or 'N/A'}\n"
        f"- keyscale: {sample.keyscale or 'N/A'}\n- duration: {sample.duration} seconds\n"
    )
    return PROMPT.format(DEFAULT_DIT_INSTRUCTION, sample.caption, told)


def encode_text(
    text_encoder: Any, text_tokenizer: Any, text_prompt: str, device: Any, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    found = text_tokenizer(text_prompt, padding="max_length", max_length=256, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = text_encoder(found.input_ids.to(device)).last_hidden_state.to(dtype)
    return states, found.attention_mask.to(device, dtype)
