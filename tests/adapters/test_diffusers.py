"""What diffusers makes of a LoRA: every layer at its trained strength, from the one file alone.

diffusers takes a LoRA's alpha from the file's header only, so without ours it plays every LoRA at strength 1.
"""

import copy
import json
import logging
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sidestep_plugin.adapters.header import write_header

FACTS = {"title": "A test", "adapter_type": "lora", "model_variant": "base", "shift": 1.0, "num_inference_steps": 50}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "sliding_window": 8,
}
THEIR_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
ATTENTION = list(THEIR_NAMES)
MLP = ["gate_proj", "up_proj", "down_proj"]
KEY = "lora_adapter_metadata"


@pytest.fixture
def transformer(diffusers):
    torch.manual_seed(5)
    return diffusers.AceStepTransformer1DModel(**SIZES).eval()


@pytest.fixture
def play(diffusers, caplog):
    """Load a weights file with diffusers' own loader into a copy of a transformer, and say nothing was left over."""
    from diffusers.loaders.lora_pipeline import AceStepLoraLoaderMixin
    from diffusers.utils import logging as theirs

    class Pipeline(diffusers.DiffusionPipeline, AceStepLoraLoaderMixin):
        def __init__(self, transformer):
            super().__init__()
            self.register_modules(transformer=transformer)

    def load(transformer, folder, file="adapter_model.safetensors"):
        pipeline = Pipeline(copy.deepcopy(transformer))
        theirs.enable_propagation()
        try:
            with caplog.at_level(logging.WARNING):
                pipeline.load_lora_weights(str(folder), weight_name=file)
        finally:
            theirs.disable_propagation()
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert not said, said
        return pipeline.transformer.eval()

    return load


def in_diffusers(layer):
    """A layer's name in diffusers."""
    before, _, last = layer.rpartition(".")
    return f"{before}.{THEIR_NAMES.get(last, last)}"


def ace_step_names(transformer):
    """The layers that adapters reach, under ACE-Step's own names, with the same weights: for PEFT."""
    decoder = nn.Module()
    decoder.layers = nn.ModuleList()
    for block in transformer.layers:
        layer = nn.Module()
        for part, names in (("self_attn", ATTENTION), ("cross_attn", ATTENTION), ("mlp", MLP)):
            setattr(layer, part, nn.Module())
            for name in names:
                module = block.get_submodule(f"{part}.{THEIR_NAMES.get(name, name)}")
                setattr(getattr(layer, part), name, copy.deepcopy(module))
        decoder.layers.append(layer)
    return decoder


def linear_layers(decoder):
    return {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}


def with_weights(transformer, weights):
    """A copy of a transformer with other weights, given by ACE-Step's names of the layers."""
    changed = copy.deepcopy(transformer)
    for layer, weight in weights.items():
        changed.get_submodule(in_diffusers(layer)).weight.data.copy_(weight)
    return changed


def output_of(transformer):
    """What it makes of one fixed input."""
    generator = torch.Generator().manual_seed(6)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    inputs = {"hidden_states": noise(2, 24, 64), "context_latents": noise(2, 24, 128)}
    inputs |= {"encoder_hidden_states": noise(2, 7, 64), "timestep": torch.tensor([0.4, 0.9])}
    with torch.no_grad():
        return transformer(**inputs, timestep_r=inputs["timestep"], return_dict=False)[0]


def strengths(transformer):
    """The scaling of every adapted layer."""
    adapted = {name: module for name, module in transformer.named_modules() if hasattr(module, "lora_A")}
    return {name: scaling for name, module in adapted.items() for scaling in module.scaling.values()}


def check_all_arrived(loaded, tensors):
    """Every tensor of the file is in its layer, and no layer has another one."""
    arrived = {name: value for name, value in loaded.named_parameters() if "lora_" in name}
    assert len(arrived) == len(tensors) > 0
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        (value,) = [
            value
            for name, value in arrived.items()
            if name.startswith(f"{in_diffusers(layer)}.lora_{part.partition('.')[0]}.")
        ]
        assert torch.equal(value, tensor), key


def header_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def save_with(folder, tensors, entries):
    """Save a file that tells diffusers this."""
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt", KEY: json.dumps(entries)})
    return folder


# -- as trained ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(train, load, transformer):
    """A LoRA of rank 4 and alpha 8 trained on base: its folder, and the transformer with base's own weights."""
    adapter = train("base").output / "final" / "adapter"
    own = linear_layers(load("base").model.decoder)
    weights = {name: module.weight for name, module in own.items() if name.rpartition(".")[2] in ATTENTION}
    assert len(weights) == 16
    return adapter, with_weights(transformer, weights), weights


def by_hand(weights, tensors, strength):
    merged = {}
    for layer, weight in weights.items():
        a, b = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        merged[layer] = weight.detach() + strength * (b.float() @ a.float())
    return merged


def test_a_trained_lora_plays_at_its_strength(trained, play, load):
    from peft import PeftModel

    adapter, transformer, weights = trained
    tensors = load_file(adapter / "adapter_model.safetensors")
    loaded = play(transformer, adapter)
    check_all_arrived(loaded, tensors)
    assert strengths(loaded) == {in_diffusers(layer): 2.0 for layer in weights}
    heard = output_of(loaded)
    torch.testing.assert_close(heard, output_of(with_weights(transformer, by_hand(weights, tensors, 2.0))))
    pefts = linear_layers(PeftModel.from_pretrained(load("base").model.decoder, adapter).merge_and_unload())
    merged = {layer: pefts[layer].weight for layer in weights}
    torch.testing.assert_close(heard, output_of(with_weights(transformer, merged)))
    # The effect that is compared is far larger than what "close" allows.
    assert (heard - output_of(transformer)).abs().max() > 1e-3


def test_the_file_alone_is_enough(trained, play, tmp_path):
    adapter, transformer, weights = trained
    alone = tmp_path / "loras"
    alone.mkdir()
    shutil.copy(adapter / "adapter_model.safetensors", alone / "jazz.safetensors")
    loaded = play(transformer, alone, "jazz.safetensors")
    assert set(strengths(loaded).values()) == {2.0}
    merged = by_hand(weights, load_file(alone / "jazz.safetensors"), 2.0)
    torch.testing.assert_close(output_of(loaded), output_of(with_weights(transformer, merged)))


def test_without_our_header_it_would_play_at_half_of_it(trained, play, tmp_path):
    adapter, transformer, weights = trained
    tensors = load_file(adapter / "adapter_model.safetensors")
    shutil.copytree(adapter, tmp_path / "bare")
    save_file(tensors, tmp_path / "bare" / "adapter_model.safetensors", {"format": "pt"})
    loaded = play(transformer, tmp_path / "bare")
    assert set(strengths(loaded).values()) == {1.0}
    heard = output_of(loaded)
    torch.testing.assert_close(heard, output_of(with_weights(transformer, by_hand(weights, tensors, 1.0))))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(heard, output_of(with_weights(transformer, by_hand(weights, tensors, 2.0))))


def test_every_saved_file_says_it(train, play, transformer):
    output = train("base").output
    files = sorted(output.rglob("adapter_model.safetensors"))
    assert len(files) == 3, "two checkpoints and the final adapter"
    for file in files:
        assert json.loads(header_of(file)[KEY]) == {
            "transformer.r": 4,
            "transformer.lora_alpha": 8,
            "transformer.target_modules": sorted(THEIR_NAMES.values()),
            "transformer.rank_pattern": {},
            "transformer.alpha_pattern": {},
            "transformer.use_dora": False,
        }
        assert set(strengths(play(transformer, file.parent)).values()) == {2.0}


def test_what_stands_in_the_header_decides(trained, play, tmp_path):
    adapter, transformer, _ = trained
    tensors = load_file(adapter / "adapter_model.safetensors")
    ours = json.loads(header_of(adapter / "adapter_model.safetensors")[KEY])
    other = save_with(tmp_path / "another alpha", tensors, ours | {"transformer.lora_alpha": 20})
    assert set(strengths(play(transformer, other)).values()) == {5.0}
    bare = {key.removeprefix("transformer."): value for key, value in ours.items()}
    with pytest.raises(KeyError):
        play(transformer, save_with(tmp_path / "no prefix", tensors, bare))
    with pytest.raises(TypeError):
        play(transformer, save_with(tmp_path / "unknown entry", tensors, ours | {"transformer.shift": 1.0}))


# -- ranks and alphas that differ from layer to layer ----------------------------------------------------------------


@pytest.fixture
def saved_by_peft(transformer, tmp_path):
    """Make a LoRA with PEFT on the layers of ACE-Step, every tensor of it random; save it, and give it our header."""
    from peft import LoraConfig, get_peft_model

    def make(header=True, **settings):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings
        model = get_peft_model(ace_step_names(transformer), LoraConfig(**settings))
        torch.manual_seed(9)
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.data.mul_(1.0 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.data.normal_(std=0.2)
        folder = tmp_path / "by PEFT"
        model.save_pretrained(folder)
        if header:
            write_header(folder / "adapter_model.safetensors", FACTS)
        (folder / "adapter_config.json").rename(tmp_path / "adapter_config.json")  # diffusers has the file alone
        scalings = {
            in_diffusers(name.removeprefix("base_model.model.")): module.scaling["default"]
            for name, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        merged = {name: module.weight for name, module in linear_layers(model.merge_and_unload()).items()}
        return folder, scalings, merged

    return make


SETTINGS = {
    "plain": ({}, {2.0}),
    "ranks": ({"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}}, {2.0, 4.0, 8 / 6}),
    "alphas": ({"alpha_pattern": {"cross_attn.k_proj": 3, "o_proj": 1.5}}, {2.0, 0.75, 0.375}),
    "ranks and alphas": (
        {"rank_pattern": {"layers.0.*q_proj": 2, "v_proj": 8}, "alpha_pattern": {"^layers.0.self_attn.q_proj": 3}},
        {2.0, 4.0, 1.5, 1.0},
    ),
    "one layer's rank everywhere but there": ({"rank_pattern": {r"layers\.[01]\..*[qkv]_proj": 3}}, {8 / 3, 2.0}),
    "rsLoRA": ({"use_rslora": True}, {4.0}),
    "rsLoRA, ranks": ({"use_rslora": True, "rank_pattern": {"q_proj": 9}}, {4.0, 8 / 3}),
    "rsLoRA, ranks, alphas": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 6, "v_proj": 5}},
        {4.0, 2.0, 2.5},
    ),
    "mlp": ({"target_modules": [*ATTENTION, *MLP], "alpha_pattern": {"down_proj": 5}}, {2.0, 1.25}),
    "one layer only": ({"layers_to_transform": [1], "layers_pattern": "layers"}, {2.0}),
    "alpha below one": ({"lora_alpha": 0.3}, {0.3 / 4}),
    "DoRA": ({"use_dora": True}, {2.0}),
    "DoRA, rsLoRA, ranks, mlp": (
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 9}, "target_modules": ["q_proj", *MLP]},
        {4.0, 8 / 3},
    ),
}


# diffusers looks for the layers by the last parts of their names, and says so when not all of those have a LoRA.
PARTLY = pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency:RuntimeWarning")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [pytest.param(*case, id=name, marks=PARTLY if "only" in name else ()) for name, case in SETTINGS.items()],
)
def test_each_layer_gets_its_own_strength(saved_by_peft, play, transformer, settings, expected):
    folder, scalings, merged = saved_by_peft(**settings)
    assert sorted(set(scalings.values())) == pytest.approx(sorted(expected)), "what PEFT itself says"
    loaded = play(transformer, folder)
    check_all_arrived(loaded, load_file(folder / "adapter_model.safetensors"))
    assert strengths(loaded) == pytest.approx(scalings, rel=1e-6)
    heard = output_of(loaded)
    torch.testing.assert_close(heard, output_of(with_weights(transformer, merged)), rtol=1e-4, atol=1e-5)
    assert (heard - output_of(transformer)).abs().max() > 1e-2


def test_without_the_header_ranks_and_alphas_would_be_lost(saved_by_peft, play, transformer):
    settings, _ = SETTINGS["rsLoRA, ranks, alphas"]
    folder, scalings, merged = saved_by_peft(header=False, **settings)
    loaded = play(transformer, folder)
    assert set(strengths(loaded).values()) == {1.0} != set(scalings.values())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(output_of(loaded), output_of(with_weights(transformer, merged)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("targets", [MLP, ["v_proj", "o_proj"]], ids=["mlp only", "values and outputs only"])
def test_diffusers_itself_leaves_out_a_lora_without_queries_and_keys(saved_by_peft, play, transformer, targets):
    """A limit of diffusers: it knows ACE-Step's names by q_proj or k_proj. Our header neither mends nor breaks that."""
    for header in (False, True):
        folder, _, _ = saved_by_peft(header=header, target_modules=targets)
        with pytest.raises(AssertionError, match="No LoRA keys associated to AceStepTransformer1DModel"):
            play(transformer, folder)
