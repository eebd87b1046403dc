"""The lyrics without a header, cut at 512 tokens and padded to as many."""

from __future__ import annotations

from typing import Any

import torch


def encode_lyrics(
    text_encoder: Any, text_tokenizer: Any, lyrics: str, device: Any, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    found = text_tokenizer(lyrics, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = text_encoder.embed_tokens(found.input_ids.to(device)).to(dtype)
    return states, found.attention_mask.to(device, dtype)
