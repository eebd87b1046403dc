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
    torch.testing.assert_close(ours(tmp_path, made.unload(), decomposed=dora), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decomposed", [{}, {"weight_decompose": True}, {"weight_decompose": True, "wd_on_out": False}])
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
    found = ours(tmp_path, decoder, decomposed=bool(decomposed))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_decomposed_adapter_is_refused_where_it_was_not_asked_for(decoder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(decoder, config).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="is a DoRA. Expected a LoRA or LoKr without weight decomposition"):
        check_applicable(read_adapter(tmp_path), {}, "m")
