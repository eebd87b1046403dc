"""A LoRA on upstream's real decoder, trained by its own trainer with the plugin, sounds the same in diffusers.

    pytest --acestep-root DIR tests/upstream/test_real_adapter.py

Tiny models made of the checkout's own model files; diffusers has a model of its own for the same weights. It needs an
environment that holds both: upstream's training packages and diffusers with ACE-Step 1.5.
"""

import copy
import inspect
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from . import test_real_models

pytestmark = pytest.mark.upstream

RENAMED = [
    (r"\bproj_in\.1\.", "proj_in_conv."),
    (r"\bproj_out\.1\.", "proj_out_conv."),
    (r"\b([qkv])_proj\.", r"to_\1."),
    (r"\bo_proj\.", "to_out.0."),
    (r"\b([qk])_norm\.", r"norm_\1."),
]

real_model = test_real_models.real_model


@pytest.fixture
def in_diffusers(diffusers):
    """diffusers' model with the weights of one of upstream's decoders."""

    def make(model):
        sizes = inspect.signature(diffusers.AceStepTransformer1DModel.__init__).parameters
        given = {name: getattr(model.config, name) for name in sizes if hasattr(model.config, name)}
        transformer = diffusers.AceStepTransformer1DModel(**given)
        weights = {}
        for name, weight in model.decoder.state_dict().items():
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            weights[name] = weight
        transformer.load_state_dict(weights, strict=True)
        return transformer.eval()

    return make


@pytest.fixture
def play(diffusers):
    from diffusers.loaders.lora_pipeline import AceStepLoraLoaderMixin

    class Pipeline(diffusers.DiffusionPipeline, AceStepLoraLoaderMixin):
        def __init__(self, transformer):
            super().__init__()
            self.register_modules(transformer=transformer)

    def load(transformer, file):
        pipeline = Pipeline(copy.deepcopy(transformer))
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        return pipeline.transformer.eval()

    return load


def inputs_for(model, frames=97):
    """Longer than the sliding window, and of an odd length, which both models fill up."""
    generator = torch.Generator().manual_seed(4)
    width = model.null_condition_emb.shape[-1]

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": noise(2, frames, 64),
        "context_latents": noise(2, frames, 128),
        "encoder_hidden_states": noise(2, 9, width),
        "timestep": torch.tensor([0.35, 0.8]),
        "timestep_r": torch.tensor([0.35, 0.8]),
    }


def heard_upstream(decoder, inputs):
    masks = {"attention_mask": torch.ones(2, inputs["hidden_states"].shape[1]), "encoder_attention_mask": None}
    with torch.no_grad():
        return decoder.eval()(**inputs, **masks, use_cache=False)[0]


def heard_in_diffusers(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("family", ["base", "turbo", "xl-base"])
def test_a_lora_sounds_the_same_in_diffusers(family, real_model, train, in_diffusers, play, tmp_path):
    from peft import PeftModel

    from sidestep_plugin.engine.models import Handler

    model, _ = real_model(family)
    inputs = inputs_for(model)
    untrained = copy.deepcopy(model.decoder)
    without = heard_upstream(untrained, inputs)
    transformer = in_diffusers(model)
    torch.testing.assert_close(heard_in_diffusers(transformer, inputs), without, rtol=1e-4, atol=1e-5)

    run = train(family, handler=Handler(model, "cpu", torch.float32), max_epochs=8, save_every_n_epochs=8)
    (file,) = run.output.glob("final/**/adapter_model.safetensors")
    expected = heard_upstream(PeftModel.from_pretrained(untrained, file.parent), inputs)
    effect = (expected - without).abs().max()
    assert effect > 0.01, "the training had an effect"

    (tmp_path / "loras").mkdir()
    moved = shutil.copy(file, tmp_path / "loras" / "jazz.safetensors")
    loaded = play(transformer, moved)
    scalings = [module.scaling for module in loaded.modules() if hasattr(module, "lora_A")]
    assert len(scalings) == 16 and all(set(scaling.values()) == {2.0} for scaling in scalings)
    torch.testing.assert_close(heard_in_diffusers(loaded, inputs), expected, rtol=1e-4, atol=1e-5)

    save_file(load_file(file), tmp_path / "loras" / "bare.safetensors", {"format": "pt"})
    weaker = heard_in_diffusers(play(transformer, tmp_path / "loras" / "bare.safetensors"), inputs)
    assert (weaker - expected).abs().max() > 0.2 * effect, "without our header it is another, weaker effect"
