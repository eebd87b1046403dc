"""Promise 3 on real model code: tiny models made from the checkout's own model files, trained by its own trainer.

    pytest --acestep-root DIR tests/upstream

Each step's loss equals what the model's own ``forward()`` computes, conditions prepared by its own
``prepare_condition``; and the plugin's timesteps are those of the model file's own ``sample_t_r``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil

import pytest
import torch

from sidestep_plugin import attach
from sidestep_plugin.engine.models import Handler
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.validation.held_out import choose

pytestmark = pytest.mark.upstream

FILES = {
    "base": "acestep.models.base.modeling_acestep_v15_base",
    "sft": "acestep.models.sft.modeling_acestep_v15_base",
    "turbo": "acestep.models.turbo.modeling_acestep_v15_turbo",
    "xl-base": "acestep.models.xl_base.modeling_acestep_v15_xl_base",
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "text_hidden_dim": 32,
    "num_lyric_encoder_hidden_layers": 1,
    "num_timbre_encoder_hidden_layers": 1,
    "num_attention_pooler_hidden_layers": 1,
    "num_audio_decoder_hidden_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
    "timbre_hidden_dim": 64,
    "fsq_dim": 64,
}
# XL's condition encoder is narrower than its decoder.
TINY_XL = TINY | {
    "encoder_hidden_size": 48,
    "encoder_intermediate_size": 96,
    "encoder_num_attention_heads": 3,
    "encoder_num_key_value_heads": 1,
    "fsq_dim": 48,
}


@pytest.fixture
def real_model(trainer):
    """Make a tiny model of one family from the checkout's own files."""
    pytest.importorskip("vector_quantize_pytorch", reason="upstream's models need vector-quantize-pytorch and einops")

    def make(family, seed=0):
        try:
            modeling = importlib.import_module(FILES[family])
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("acestep"):
                raise
            pytest.skip(f"this checkout has no {FILES[family]}")
        config = modeling.AceStepConfig(**(TINY_XL if family.startswith("xl") else TINY))
        config.is_turbo = family == "turbo"
        config._name_or_path = f"acestep-v15-{family}"
        config._attn_implementation = "eager"
        torch.manual_seed(seed)
        model = modeling.AceStepConditionGenerationModel(config)
        return model.eval(), modeling

    return make


def songs_for(model, size, seed, dtype=torch.float32):
    """Everything that forward() takes: text, lyrics, reference audio, latents."""
    generator = torch.Generator().manual_seed(seed)
    config, frames = model.config, 20

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden_states": noise(size, frames, 64),
        "attention_mask": torch.ones(size, frames, dtype=dtype),
        "text_hidden_states": noise(size, 6, config.text_hidden_dim),
        "text_attention_mask": torch.ones(size, 6, dtype=dtype),
        "lyric_hidden_states": noise(size, 5, config.text_hidden_dim),
        "lyric_attention_mask": torch.ones(size, 5, dtype=dtype),
        "refer_audio_acoustic_hidden_states_packed": noise(size, 10, config.timbre_hidden_dim),
        "refer_audio_order_mask": torch.arange(size),
        "src_latents": noise(size, frames, 64),
        "chunk_masks": torch.ones(size, frames, 64, dtype=dtype),
        "is_covers": torch.zeros(size, dtype=torch.long),
        "silence_latent": noise(1, frames, 64),
    }


def preprocessed(model, songs):
    """What upstream's preprocessing saves of the songs: conditions from the model's own prepare_condition."""
    names = inspect.signature(model.prepare_condition).parameters
    given = {name: value for name, value in songs.items() if name in names}
    with torch.no_grad():
        conditions, mask, context = model.prepare_condition(**(given | {"hidden_states": songs["src_latents"]}))
    return {
        "target_latents": songs["hidden_states"],
        "attention_mask": songs["attention_mask"],
        "encoder_hidden_states": conditions,
        "encoder_attention_mask": mask.to(songs["attention_mask"].dtype),
        "context_latents": context,
        "metadata": [{}] * len(songs["hidden_states"]),
    }


def compare_with_forward(trainer, module, model, songs, seed, options=None):
    batch = preprocessed(model, songs)
    with attach(trainer, options=options, announce=print):
        torch.manual_seed(seed)
        ours, our_state = module.training_step(batch), torch.get_rng_state()
    torch.manual_seed(seed)
    theirs = model(**songs)["diffusion_loss"]
    assert torch.equal(ours, theirs.float())
    assert torch.equal(our_state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("family", list(FILES))
def test_the_loss_is_that_of_the_real_models_forward(
    trainer, real_model, module_for, require_kind, kind, family, dtype
):
    from sidestep_plugin.engine.models import Handler
    from sidestep_plugin.engine.shapes import sampler_style

    require_kind(kind)
    if sampler_style(trainer.sample_discrete_timestep) == "device and dtype" and dtype != torch.bfloat16:
        pytest.skip("this version steps in bf16 on every device")
    model, _ = real_model(family)
    module = module_for(Handler(model, "cpu", dtype), kind)
    model.to(dtype)
    module.dtype = dtype
    if hasattr(module, "timesteps_tensor"):
        module.timesteps_tensor = module.timesteps_tensor.to(dtype)
    options = {"timestep_mode": "continuous"} if family == "turbo" else None
    # On a GPU upstream steps under autocast, on a CPU in fp32 without.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for size in range(1, 10):
            compare_with_forward(trainer, module, model, songs_for(model, size, size, dtype), size, options)


@pytest.mark.parametrize("family", list(FILES))
def test_the_timesteps_are_those_of_the_real_sample_t_r(trainer, real_model, module_for, family):
    from sidestep_plugin.engine.models import Handler

    class Recorder:
        from sidestep_plugin import hookimpl

        @hookimpl
        def acestep_step_finished(self, step):
            seen.append(step.t)

    model, modeling = real_model(family)
    module = module_for(Handler(model, "cpu", torch.float32))
    dtype = module.dtype
    model.to(dtype)
    for size in (1, 2, 5, 9):
        seen = []
        batch = preprocessed(model, songs_for(model, size, seed=size, dtype=dtype))
        options = {"timestep_mode": "continuous", "cfg_ratio": 0.0}
        with attach(trainer, options=options, extra_plugins={"recorder": Recorder()}, announce=print):
            torch.manual_seed(size)
            module.training_step(batch)
        torch.manual_seed(size)
        torch.randn_like(batch["target_latents"])
        config = model.config
        t, r = modeling.sample_t_r(
            size,
            torch.device("cpu"),
            seen[0].dtype,
            config.data_proportion,
            config.timestep_mu,
            config.timestep_sigma,
            use_meanflow=False,
        )
        assert torch.equal(seen[0], t) and torch.equal(t, r)


# -- validation --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_of_songs(real_model, tmp_path):
    """Songs that the model's own condition encoder has prepared."""
    model, _ = real_model("base")
    folder = tmp_path / "songs"
    folder.mkdir()
    batch = preprocessed(model, songs_for(model, 6, seed=3))
    for number in range(6):
        song = {name: tensor[number].clone() for name, tensor in batch.items() if name != "metadata"}
        torch.save(song | {"metadata": {}}, folder / f"song_{number}.pt")
    return folder


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("family", ["base", "turbo"])
def test_validation_changes_no_bit_of_the_training(
    train, trainer, real_model, folder_of_songs, equal_bits, monkeypatch, tmp_path, family, kind
):
    """The reference has only the songs that are left, in the same order."""

    def trained(tensors, **options):
        model, _ = real_model(family)
        handler = Handler(model, "cpu", torch.float32)
        settings = {"batch_size": 1, "gradient_accumulation_steps": 3, "max_epochs": 3, "tensors": tensors}
        return train(family, kind, handler=handler, options=options, **settings)

    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *args: sorted(listed(*args)))
    songs = songs_in(folder_of_songs)
    held_out = choose(songs, 2)
    left = tmp_path / "left"
    left.mkdir()
    for song in songs:
        if song not in held_out:
            shutil.copy(song, left)
    assert len(list(left.iterdir())) == 4
    validated = trained(folder_of_songs, validate=2, validate_every=1)
    plain = trained(left)
    assert equal_bits(plain, validated), validated.messages
    report = json.loads((validated.output / "training_report.json").read_text(encoding="utf-8"))["validation"]
    losses = [entry["loss"] for entry in report["epochs"]]
    assert len(losses) == 4 and len(set(losses)) == 4 and len(report["timesteps"]) == 8
    assert "validation" not in json.loads((plain.output / "training_report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("family", ["base", "xl-base"])
def test_gradient_checkpointing_changes_no_bit(train, real_model, equal_bits, kind, family):
    from sidestep_plugin.engine.models import Handler

    def trained(choice):
        model, _ = real_model(family)
        handler = Handler(model, "cpu", torch.float32)
        return train(family, kind, handler=handler, options={"gradient_checkpointing": choice})

    assert equal_bits(trained("on"), trained("off"))


@pytest.mark.parametrize("family", list(FILES))
def test_parameters_are_counted_as_in_the_real_decoder(trainer, family):
    """At full size on torch's meta device, where weights take no memory. XL's sizes are partly guessed."""
    from sidestep_plugin.memory.known import known_size
    from sidestep_plugin.memory.sizes import DecoderSize

    pytest.importorskip("vector_quantize_pytorch", reason="upstream's models need vector-quantize-pytorch and einops")
    try:
        modeling = importlib.import_module(FILES[family])
    except ModuleNotFoundError as error:
        pytest.skip(f"this checkout has no {FILES[family]} ({error.name})")
    size = known_size(family)
    config = modeling.AceStepConfig(
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim,
        layer_types=["full_attention"] * size.layers,
        **({"encoder_hidden_size": size.condition_width} if family.startswith("xl") else {}),
    )
    with torch.device("meta"):
        decoder = modeling.AceStepDiTModel(config)
    assert DecoderSize.from_config(config.to_dict()) == size
    assert sum(weight.numel() for weight in decoder.parameters()) == size.parameters
    linear = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.ConvTranspose1d)
    cast = [weight for module in decoder.modules() if isinstance(module, linear) for weight in module.parameters()]
    assert sum(weight.numel() for weight in cast) == size.cast_parameters
