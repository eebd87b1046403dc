"""Previews on real model code: our Euler loop is the model's own sampler, the context is that of its inference.

pytest --acestep-root DIR tests/upstream/test_real_previews.py
"""

from __future__ import annotations

import importlib
import json
import wave
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from preview_parts import HOP, moved_a_little, write_tiny_vae
from upstream.test_real_models import FILES, TINY, TINY_XL

from sidestep_plugin.engine.decoders import plain_decoder, without_adapter
from sidestep_plugin.previews.conditions import (
    Conditions,
    PreviewSettings,
    look_at,
    read_conditions,
    read_silence,
    silent_context,
)
from sidestep_plugin.previews.generation import euler, generate, noise_for, own_arguments

pytestmark = pytest.mark.upstream

SETTINGS = {
    "base": PreviewSettings(shift=1.0, steps=12, guidance=7.0, seed=5, seconds=20.0),
    "sft": PreviewSettings(shift=2.0, steps=9, guidance=4.0, seed=5, seconds=20.0),
    "turbo": PreviewSettings(shift=3.0, steps=8, guidance=1.0, seed=5, seconds=20.0),
    "xl-base": PreviewSettings(shift=1.0, steps=6, guidance=7.0, seed=5, seconds=20.0),
}


@pytest.fixture
def real(trainer, tmp_path):
    """Make a tiny model of one family from the checkout's own files, in a folder with silence and a VAE beside it."""
    pytest.importorskip("vector_quantize_pytorch", reason="upstream's models need vector-quantize-pytorch and einops")

    def make(family):
        try:
            modeling = importlib.import_module(FILES[family])
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("acestep"):
                raise
            pytest.skip(f"this checkout has no {FILES[family]}")
        config = modeling.AceStepConfig(**(TINY_XL if family.startswith("xl") else TINY))
        config.is_turbo = family == "turbo"
        config._attn_implementation = "eager"
        folder = tmp_path / "checkpoints" / f"acestep-v15-{family}"
        folder.mkdir(parents=True)
        written = {"is_turbo": family == "turbo", "timestep_mu": -0.4, "timestep_sigma": 1.0}
        (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
        config._name_or_path = str(folder)
        torch.manual_seed(0)
        model = modeling.AceStepConditionGenerationModel(config).eval()
        torch.save(0.3 * torch.randn(1, 64, 21), folder / "silence_latent.pt")
        return model

    return make


def conditions_for(model, frames=23):
    generator = torch.Generator().manual_seed(2)
    width = model.null_condition_emb.shape[-1]
    silence = 0.3 * torch.randn(1, 10, 64, generator=generator)
    return Conditions(
        encoder_hidden_states=torch.randn(1, 7, width, generator=generator),
        encoder_attention_mask=torch.ones(1, 7),
        context_latents=silent_context(silence, frames),
        attention_mask=torch.ones(1, frames),
    )


@pytest.mark.parametrize("family", FILES)
def test_the_euler_loop_is_the_models_own_sampler(real, family, monkeypatch):
    """Same noise, same conditions; without the corrections that newer versions add behind each step."""
    from sidestep_plugin.previews import generation

    model, settings = real(family), SETTINGS[family]
    own = own_arguments(model, settings)
    assert own is not None, "its own code can be asked"
    if "dcw_enabled" in type(model).generate_audio.__code__.co_varnames:
        monkeypatch.setattr(generation, "own_arguments", lambda *_: own | {"dcw_enabled": False})
    conditions = conditions_for(model)
    noise = noise_for(settings.seed, 23, torch.device("cpu"), torch.float32)
    theirs = generate(model, model.decoder, conditions, settings, noise)
    with torch.no_grad():
        ours = euler(model.decoder, conditions, settings, noise, model.null_condition_emb)
    assert theirs.shape == ours.shape == (1, 23, 64)
    difference = float((theirs - ours).norm() / theirs.norm())
    print(f"\n{family}: relative difference {difference:.2e}, largest {float((theirs - ours).abs().max()):.2e}")
    assert difference < 1e-4
    other = PreviewSettings(settings.shift + 1.0, settings.steps, settings.guidance, 5, 20.0)
    with torch.no_grad():
        far = euler(model.decoder, conditions, other, noise, model.null_condition_emb)
    assert float((theirs - far).norm() / theirs.norm()) > 1e-3, "the comparison can fail"


def test_the_context_is_that_of_upstreams_own_inference(real, trainer):
    """Its prepare_condition makes of silence and a full mask what we hand over ready."""
    model = real("base")
    silence, frames, text = 0.3 * torch.randn(1, 40, 64), 30, model.config.text_hidden_dim
    ours = silent_context(silence, frames)
    theirs = model.prepare_condition(
        text_hidden_states=torch.randn(1, 6, text),
        text_attention_mask=torch.ones(1, 6),
        lyric_hidden_states=torch.randn(1, 5, text),
        lyric_attention_mask=torch.ones(1, 5),
        refer_audio_acoustic_hidden_states_packed=torch.randn(1, 10, model.config.timbre_hidden_dim),
        refer_audio_order_mask=torch.arange(1),
        hidden_states=silence[:, :frames],
        attention_mask=torch.ones(1, frames),
        silence_latent=silence,
        src_latents=silence[:, :frames],
        chunk_masks=torch.ones(1, frames, 64),
        is_covers=torch.zeros(1, dtype=torch.long),
    )[2]
    assert torch.equal(ours, theirs)
    try:
        context = importlib.import_module("acestep.training.dataset_builder_modules.preprocess_context")
    except ModuleNotFoundError:
        return
    built = context.build_context_latents(silence, frames, torch.device("cpu"), torch.float32)
    assert torch.equal(ours, built)


def test_silence_is_read_as_upstream_reads_it(real, checkout):
    model = real("base")
    silence = read_silence(Path(model.config._name_or_path))
    assert silence.shape == (1, 21, 64)
    song = look_at(sorted(checkout.tensors.glob("*.pt"))[2], 20.0)
    made = read_conditions(song, silence, torch.device("cpu"), torch.float32)
    assert made.context_latents.shape == (1, song.frames, 128) and song.frames == 24
    assert torch.equal(made.context_latents[:, 21:, :64], silence[:, :3]), "repeated where it is too short"
    assert bool((made.context_latents[..., 64:] == 1).all())


def handler_of(model):
    return SimpleNamespace(model=model, device="cpu", dtype=torch.float32, quantization=None)


@pytest.mark.parametrize("family, kind", [("base", "lora"), ("base", "lokr"), ("turbo", "lora")])
def test_a_training_with_previews_is_the_same(real, train, trainer, equal_bits, family, kind, tmp_path, capsys):
    """Real model, real trainer, tiny random VAE: bits, clips, rate, and twins."""
    from sidestep_plugin.previews import making

    steps = {"num_inference_steps": 4 if family == "base" else 8}
    uneven = {"batch_size": 1, "gradient_accumulation_steps": 4, "max_epochs": 2}
    model = real(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    without = train(family, kind, options=steps, handler=handler_of(model), **uneven)
    write_tiny_vae(tmp_path / "checkpoints" / "vae")
    again = type(model)(model.config).eval()
    again.load_state_dict(state)
    asked = {"n": 0}
    original = making.generate

    def counted(given, *rest):
        asked["n"] += own_arguments(given, rest[2]) is not None
        return original(given, *rest)

    making.generate = counted
    try:
        heard = train(family, kind, options=steps | {"preview_every": 1}, handler=handler_of(again), **uneven)
    finally:
        making.generate = original
    out = capsys.readouterr().out
    assert equal_bits(without, heard), out
    assert "Warning: no preview" not in out and "Previews: 2 clips" in out
    table = json.loads((heard.output / "previews" / "previews.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in table["rows"]] == ["base model", "epoch 1", "epoch 2"]
    assert asked["n"] == 6, "the model's own code generated them"
    for row in table["rows"]:
        for name, song in zip(row["clips"], table["songs"], strict=True):
            with wave.open(str(heard.output / "previews" / name)) as clip:
                assert (clip.getframerate(), clip.getnchannels()) == (48000, 2)
                assert clip.getnframes() == round(song["seconds"] * 25) * HOP


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_twins_are_equal_when_the_adapter_is_zero(real, train, require_kind, kind, tmp_path):
    """The base row is made with the adapter off; with one that is exactly zero the clip is the same, bit for bit."""
    model = real("base")
    done = train("base", kind, plugins=("sidestep",), handler=handler_of(model), learning_rate=1e-45, max_epochs=1)
    assert done.tensors, done.messages
    decoder = plain_decoder(model)
    module = SimpleNamespace(model=model, lycoris_net=getattr(decoder, "_lycoris_net", None))
    decoder.eval()
    conditions, settings = conditions_for(model), SETTINGS["base"]
    noise = noise_for(5, 23, torch.device("cpu"), torch.float32)
    zero = generate(model, decoder, conditions, settings, noise)
    with without_adapter(module):
        off = generate(model, decoder, conditions, settings, noise)
    assert torch.equal(zero, off)
    assert moved_a_little(decoder) or any(weight.requires_grad for weight in decoder.parameters())
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.requires_grad:
                weight.mul_(1.5).add_(0.05)
    louder = generate(model, decoder, conditions, settings, noise)
    with without_adapter(module):
        still_off = generate(model, decoder, conditions, settings, noise)
    assert not torch.equal(louder, zero)
    assert torch.equal(still_off, off)
    assert torch.equal(generate(model, decoder, conditions, settings, noise), louder), "on again as before"
