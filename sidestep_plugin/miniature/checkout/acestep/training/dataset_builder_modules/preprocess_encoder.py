"""The condition encoder, with one frame of zeros for reference audio unless there is some."""

from __future__ import annotations

from typing import Any

import torch


def run_encoder(
    model: Any,
    text_hidden_states: torch.Tensor,
    text_attention_mask: torch.Tensor,
    lyric_hidden_states: torch.Tensor,
    lyric_attention_mask: torch.Tensor,
    device: Any,
    dtype: torch.dtype,
    reference: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    heard = torch.zeros(1, 1, 64, device=device, dtype=dtype) if reference is None else reference
    with torch.no_grad():
        found: tuple[torch.Tensor, torch.Tensor] = model.encoder(
            text_hidden_states=text_hidden_states,
            text_attention_mask=text_attention_mask,
            lyric_hidden_states=lyric_hidden_states,
            lyric_attention_mask=lyric_attention_mask,
            refer_audio_acoustic_hidden_states_packed=heard,
            refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device),
        )
    return found
