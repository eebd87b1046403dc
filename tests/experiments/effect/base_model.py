"""The base model: a small decoder of the real architecture (or of the miniature), trained on its own objective.

The objective is that of the model's own ``forward()``: flow matching, timesteps from the maximum of two logit-normal
draws, and 15 % of the conditions replaced by the null condition. The weights that are used are a moving average.
"""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sidestep_plugin import miniature
from sidestep_plugin.files import replacing
from sidestep_plugin.timesteps.schedule import logit_normal

from . import data
from .presets import Preset

NAME = "acestep-v15-base"
MU, SIGMA, DROPOUT = -0.4, 1.0, 0.15
AVERAGE = 0.998
SAVE_EVERY = 250


def build(preset: Preset, root: Path | None, out: Path) -> Any:
    """An untrained model: of the real checkout's own model files, or the miniature's without one."""
    if root is None:
        return _build_miniature(preset, out)
    modeling = importlib.import_module("acestep.models.base.modeling_acestep_v15_base")
    config = modeling.AceStepConfig(
        hidden_size=preset.hidden,
        intermediate_size=2 * preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.hidden // preset.heads,
        audio_acoustic_hidden_dim=preset.channels,
        in_channels=3 * preset.channels,
        text_hidden_dim=32,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        num_attention_pooler_hidden_layers=1,
        num_audio_decoder_hidden_layers=1,
        layer_types=(["sliding_attention", "full_attention"] * preset.layers)[: preset.layers],
        sliding_window=preset.frames,
        timbre_hidden_dim=preset.channels,
        fsq_dim=preset.hidden,
    )
    config.is_turbo = False
    config._name_or_path = NAME
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return modeling.AceStepConditionGenerationModel(config).to(preset.device).eval()


def _build_miniature(preset: Preset, out: Path) -> Any:
    from sidestep_plugin.engine.models import load_model

    sizes = {"hidden_size": preset.hidden, "intermediate_size": 2 * preset.hidden, "num_hidden_layers": preset.layers}
    more = {"num_attention_heads": preset.heads, "audio_acoustic_hidden_dim": preset.channels}
    folder = miniature.write_model(out / "checkpoints", NAME, seed=1, **sizes, **more)
    return load_model(folder, torch.device(preset.device)).model


def velocity(model: Any, x: Tensor, t: Tensor, conditions: Tensor, decoder: Any = None) -> Tensor:
    """What the decoder predicts, noise minus data: x [B,T,C], t [B], conditions [B,L,D] -> [B,T,C]."""
    rows, frames, channels = x.shape
    predicted: Tensor = (decoder or model.decoder)(
        hidden_states=x,
        timestep=t,
        timestep_r=t,
        attention_mask=torch.ones(rows, frames, device=x.device),
        encoder_hidden_states=conditions,
        encoder_attention_mask=torch.ones(conditions.shape[:2], device=x.device),
        context_latents=data.context(rows, frames, channels, str(x.device)),
        use_cache=False,
    )[0]
    return predicted


def train(
    preset: Preset, model: Any, file: Path, say: Callable[[str], None], domain: data.Domain | None = None
) -> None:
    """Train the model, or load what an earlier run of the same preset trained. A run that was stopped goes on.

    Random numbers: each step's come from its own seed, so that a stop changes nothing.
    """
    domain = domain or data.base_domain(preset.channels, preset.hidden)
    trained = [*model.decoder.parameters(), model.null_condition_emb]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    average = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=preset.base_rate, betas=(0.9, 0.98), weight_decay=0.01)
    done, steps = 0, preset.base_steps + preset.base_refined
    if file.exists():
        state = torch.load(file, map_location=preset.device, weights_only=True)
        done, average = state["step"], state["average"]
        if done < steps:
            with torch.no_grad():
                for parameter, value in zip(trained, state["trained"], strict=True):
                    parameter.copy_(value)
            optimizer.load_state_dict(state["optimizer"])
    model.decoder.train()
    began, recent = time.monotonic(), []
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = preset.base_rate * _rate(step, preset)
        loss = _loss(preset, model, domain, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        kept = min(AVERAGE, (1 + step) / (10 + step))
        for value, parameter in zip(average, trained, strict=True):
            value.lerp_(parameter.detach(), 1.0 - kept)
        recent.append(float(loss.detach()))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {"step": step + 1, "trained": trained, "average": average, "optimizer": optimizer.state_dict()}
            with replacing(file) as stream:
                torch.save(state, stream)
            left = (time.monotonic() - began) / (step + 1 - done) * (steps - step - 1)
            mean = sum(recent[-SAVE_EVERY:]) / len(recent[-SAVE_EVERY:])
            say(f"base model: step {step + 1} of {steps}, loss {mean:.4f}, {left / 60:.0f} min left")
    with torch.no_grad():
        for parameter, value in zip(trained, average, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
    model.eval()


def _rate(step: int, preset: Preset) -> float:
    """A cosine to almost zero, and a second, lower one to refine; a short warm-up before the first."""
    if step < preset.base_steps:
        return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * _cosine(step / preset.base_steps))
    return 0.02 + 0.28 * _cosine((step - preset.base_steps) / preset.base_refined)


def _cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))


def _loss(preset: Preset, model: Any, domain: data.Domain, step: int) -> Tensor:
    songs = data.draw(domain, preset.base_batch, preset.frames, 10_000_000 + step).to(preset.device)
    torch.manual_seed(20_000_000 + step)
    rows, device = len(songs), songs.latents.device
    dropped = torch.rand(rows, device=device) < DROPOUT
    conditions = torch.where(dropped[:, None, None], model.null_condition_emb, songs.conditions)
    noise = torch.randn_like(songs.latents)
    t = torch.maximum(*(logit_normal(torch.randn(rows, device=device), MU, SIGMA) for _ in range(2)))
    mixed = t[:, None, None] * noise + (1 - t[:, None, None]) * songs.latents
    return F.mse_loss(velocity(model, mixed, t, conditions), noise - songs.latents)


def with_adapter(model: Any, weights: dict[str, Tensor], scale: float) -> Any:
    """A copy of the base model's decoder with the adapter's weights added: ``W + scale * B @ A``."""
    decoder = copy.deepcopy(model.decoder)
    layers = dict(decoder.named_modules())
    with torch.no_grad():
        for name, a in weights.items():
            if name.endswith(".lora_A"):
                layer = layers[name.removesuffix(".lora_A")]
                layer.weight += scale * weights[name.removesuffix("A") + "B"].to(a) @ a
    return decoder.eval()
