"""A toy network with the shape of an ACE-Step 1.5 model and the same training objective.

Convention: t = 1 is pure noise, `x_t = t * noise + (1 - t) * data`, and the decoder predicts `noise - data`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_acestep_v15 import AceStepConfig

_MASKED = -1e4  # added to an attention score; finite, and small enough for half precision


def sample_t_r(
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    data_proportion: float = 0.0,
    timestep_mu: float = -0.4,
    timestep_sigma: float = 1.0,
    use_meanflow: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw two logit-normal times per row: t is the larger and r the smaller.

    The first `data_proportion` of the rows get r = t, and without mean flow all of them do.
    """

    def logit_normal() -> Tensor:
        normal = torch.randn((batch_size,), device=device, dtype=dtype)
        return torch.sigmoid(normal * timestep_sigma + timestep_mu)

    first, second = logit_normal(), logit_normal()
    t = torch.maximum(first, second)
    equal_rows = int(batch_size * data_proportion) if use_meanflow else batch_size
    is_equal = torch.arange(batch_size, device=device) < equal_rows
    return t, torch.where(is_equal, t, torch.minimum(first, second))


def _score_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] with 1 for what counts -> [B, 1, 1, L] to add to the scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask <= 0, _MASKED)[:, None, None, :]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Attend from [B, T, width] to [B, L, width]; the mask is added to the scores."""

        def split(y: Tensor) -> Tensor:
            return y.reshape(*y.shape[:-1], self.heads, -1).transpose(1, 2)

        q = split(self.q_proj(hidden_states))
        k, v = split(self.k_proj(encoder_hidden_states)), split(self.v_proj(encoder_hidden_states))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask.to(q.dtype))
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class _TimeEmbedding(nn.Module):
    """[B] -> [B, 3, width]: shift, scale and gate."""

    def __init__(self, width: int, waves: int = 16) -> None:
        super().__init__()
        self.waves = waves
        self.hidden = nn.Linear(2 * waves, width)
        self.out = nn.Linear(width, 3 * width)

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self.waves, device=t.device, dtype=torch.float32) / self.waves
        angles = 1000.0 * t.float()[:, None] * 10_000.0**-steps
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(t.dtype)
        out: Tensor = self.out(F.silu(self.hidden(waves)))
        return out.reshape(len(t), 3, -1)


class _Layer(GradientCheckpointingLayer):
    def __init__(self, config: AceStepConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.zeros(1, 3, width))
        self.self_attn = _Attention(width, heads)
        self.cross_attn = _Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.intermediate_size), nn.SiLU(), nn.Linear(config.intermediate_size, width)
        )

    def forward(self, x: Tensor, time: Tensor, bias: Tensor, condition: Tensor, condition_bias: Tensor) -> Tensor:
        shift, scale, gate = (self.modulation + time).unsqueeze(2).unbind(1)
        modulated = self.norm(x) * (1.0 + scale) + shift
        x = x + gate * self.self_attn(modulated, modulated, bias)
        x = x + self.cross_attn(
            hidden_states=self.norm(x), encoder_hidden_states=condition, attention_mask=condition_bias
        )
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class AceStepDiTModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The decoder: noisy latents, context and condition in, velocity out."""

    config_class = AceStepConfig
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: AceStepConfig) -> None:
        super().__init__(config)
        width, audio = config.hidden_size, config.audio_acoustic_hidden_dim
        self.proj_in = nn.Linear(3 * audio, width)
        self.condition_embedder = nn.Linear(_condition_width(config), width)
        self.time_embed = _TimeEmbedding(width)
        self.time_embed_r = _TimeEmbedding(width)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.proj_out = nn.Linear(width, audio)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        timestep_r: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        context_latents: Tensor,
        **unused: Any,
    ) -> tuple[Tensor]:
        """Return `(velocity,)`, shaped like `hidden_states` [B, T, 64]. `unused`: PEFT adds arguments."""
        x = self.proj_in(torch.cat([hidden_states, context_latents], dim=-1))
        condition = self.condition_embedder(encoder_hidden_states)
        time = self.time_embed(timestep) + self.time_embed_r(timestep - timestep_r)
        bias = _score_bias(attention_mask, x.dtype)
        # As in ACE-Step, the mask of the conditions is ignored: rows that are padding are attended to.
        condition_bias = torch.zeros_like(encoder_attention_mask, dtype=x.dtype)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, time, bias, condition, condition_bias)
        return (self.proj_out(self.norm_out(x)),)


class _ConditionEncoder(nn.Linear):
    """Lyrics, one row for the reference audio, and the prompt, in this order, in the width of the conditions."""

    def forward(  # type: ignore[override]
        self,
        text_hidden_states: Tensor,
        text_attention_mask: Tensor,
        lyric_hidden_states: Tensor,
        lyric_attention_mask: Tensor,
        refer_audio_acoustic_hidden_states_packed: Tensor | None = None,
        refer_audio_order_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the conditions [B, L, D] and their mask [B, L]."""
        states, masks = [super().forward(lyric_hidden_states)], [lyric_attention_mask]
        if refer_audio_acoustic_hidden_states_packed is not None:
            mean = refer_audio_acoustic_hidden_states_packed.mean(1, keepdim=True)
            states.append(super().forward(mean[..., : self.in_features]))
            masks.append(torch.ones_like(lyric_attention_mask[:, :1]))
        states.append(super().forward(text_hidden_states))
        return torch.cat(states, dim=1), torch.cat([*masks, text_attention_mask], dim=1)


class AceStepConditionGenerationModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The whole model: condition encoder, decoder, and the learned condition that means "none"."""

    config_class = AceStepConfig
    _supports_sdpa = True

    def __init__(self, config: AceStepConfig) -> None:
        super().__init__(config)
        condition_width = _condition_width(config)
        self.decoder = AceStepDiTModel(config)
        self.encoder = _ConditionEncoder(config.text_hidden_dim, condition_width)
        self.null_condition_emb = nn.Parameter(torch.ones(1, 1, condition_width))
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def prepare_condition(
        self,
        text_hidden_states: Any,
        text_attention_mask: Any,
        lyric_hidden_states: Any,
        lyric_attention_mask: Any,
        src_latents: Any,
        chunk_masks: Any,
        refer_audio_acoustic_hidden_states_packed: Any = None,
        refer_audio_order_mask: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return encoder_hidden_states, encoder_attention_mask and context_latents."""
        states, mask = self.encoder(
            text_hidden_states=text_hidden_states,
            text_attention_mask=text_attention_mask,
            lyric_hidden_states=lyric_hidden_states,
            lyric_attention_mask=lyric_attention_mask,
            refer_audio_acoustic_hidden_states_packed=refer_audio_acoustic_hidden_states_packed,
            refer_audio_order_mask=refer_audio_order_mask,
        )
        return states, mask, torch.cat([src_latents, chunk_masks.to(src_latents.dtype)], dim=-1)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        *,
        src_latents: Tensor | None = None,
        cfg_ratio: float = 0.15,
        **conditions: Any,
    ) -> dict[str, Tensor]:
        """The model's own training loss. It draws, in this order: dropped conditions, noise, times.

        `conditions` are the other arguments of `prepare_condition`.
        """
        condition, condition_mask, context = self.prepare_condition(
            hidden_states=src_latents, src_latents=src_latents, attention_mask=attention_mask, **conditions
        )
        x0 = hidden_states
        rows, device, dtype = x0.shape[0], x0.device, x0.dtype
        dropped = torch.rand((rows,), device=device, dtype=dtype) < cfg_ratio
        null = self.null_condition_emb.expand_as(condition)
        condition = torch.where(dropped[:, None, None], null, condition)
        x1 = torch.randn_like(x0)
        law = (self.config.data_proportion, self.config.timestep_mu, self.config.timestep_sigma)
        t, _ = sample_t_r(rows, device, dtype, *law, use_meanflow=False)
        t_ = t[:, None, None]
        velocity = self.decoder(
            hidden_states=t_ * x1 + (1.0 - t_) * x0,
            timestep=t,
            timestep_r=t,
            attention_mask=attention_mask,
            encoder_hidden_states=condition,
            encoder_attention_mask=condition_mask,
            context_latents=context,
        )[0]
        return {"diffusion_loss": F.mse_loss(velocity, x1 - x0)}


def _condition_width(config: AceStepConfig) -> int:
    """The width of the condition encoder, which XL models have apart from the decoder's."""
    return getattr(config, "encoder_hidden_size", None) or config.hidden_size
