"""A saved adapter on a loaded decoder adds what PEFT and LyCORIS add, also with weight decomposition."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sidestep_plugin import Refusal
from sidestep_plugin.adapters.applied import applied, check_applicable, linear_layers
from sidestep_plugin.adapters.layers import read_adapter


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return self.q_proj(x)


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"self_attn": Attention()})])

    def forward(self, x):
        return self.layers[0]["self_attn"](x)


@pytest.fixture
def decoder():
    torch.manual_seed(4)
    return Decoder().requires_grad_(False)


X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))


def moved(parameters):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in parameters:
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


def ours(folder, decoder, **more):
    adapter = read_adapter(folder)
    layers = linear_layers(decoder)
    check_applicable(adapter, {name: tuple(layer.weight.shape) for name, layer in layers.items()}, "m", **more)
    before = decoder(X)
    with torch.no_grad(), applied(adapter, layers):
        found = decoder(X)
    assert torch.equal(decoder(X), before), "taken off again"
    assert not torch.allclose(found, before, atol=1e-2)
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_adds_what_peft_adds(decoder, tmp_path, dora):
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(decoder, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=dora))
    moved(weight for weight in made.parameters() if weight.requires_grad)
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = made(X)
    torch.testing.assert_close(ours(tmp_path, made.unload()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decomposed", [{}, {"dora_wd": True}, {"dora_wd": True, "wd_on_out": False}])
def test_a_lokr_adds_what_lycoris_adds(decoder, tmp_path, decomposed):
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset({"target_name": [".*proj.*"]})
    network = lycoris.create_lycoris(decoder, 1.0, linear_dim=4, linear_alpha=8, algo="lokr", **decomposed)
    network.apply_to()
    moved(network.parameters())
    with torch.no_grad():
        expected = decoder(X)
    save_file(
        {name: weight.contiguous() for name, weight in network.state_dict().items()},
        tmp_path / "lokr_weights.safetensors",
    )
    for lora in network.loras:
        lora.restore()
    assert read_adapter(tmp_path).is_dora == bool(decomposed)
    found = ours(tmp_path, decoder)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.5, 1.5])
@pytest.mark.parametrize("kind", ["lora", "lokr", "lokr, decomposed factors"])
def test_at_another_strength_it_adds_so_many_times_as_much(decoder, tmp_path, kind, strength):
    if kind == "lora":
        peft = pytest.importorskip("peft")
        made = peft.get_peft_model(decoder, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
        moved(weight for weight in made.parameters() if weight.requires_grad)
        made.save_pretrained(tmp_path)
        decoder = made.unload()
    else:
        lycoris = pytest.importorskip("lycoris")
        lycoris.LycorisNetwork.apply_preset({"target_name": [".*proj.*"]})
        both = {"decompose_both": True} if "factors" in kind else {}
        network = lycoris.create_lycoris(decoder, 1.0, linear_dim=1, linear_alpha=2, algo="lokr", **both)
        network.apply_to()
        moved(network.parameters())
        tensors = {name: weight.contiguous() for name, weight in network.state_dict().items()}
        save_file(tensors, tmp_path / "lokr_weights.safetensors")
        for lora in network.loras:
            lora.restore()
    adapter, layers = read_adapter(tmp_path), linear_layers(decoder)
    (name, *_) = [name for name in layers if name.endswith("q_proj")]
    x = torch.randn(3, layers[name].in_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = layers[name](x)
        with applied(adapter, layers):
            once = layers[name](x)
        with applied(adapter, layers, strength):
            found = layers[name](x)
    assert not torch.allclose(once, before, atol=1e-3)
    torch.testing.assert_close(found - before, strength * (once - before), atol=1e-5, rtol=1e-4)


def test_a_decomposed_adapter_has_one_strength(decoder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(decoder, config).save_pretrained(tmp_path)
    check_applicable(read_adapter(tmp_path), {}, "m")
    with pytest.raises(Refusal, match="has weight decomposition .DoRA., .*Leave --strengths out"):
        check_applicable(read_adapter(tmp_path), {}, "m", strengths=(1.0, 0.8))
