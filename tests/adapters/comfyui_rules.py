"""ComfyUI's rules for adapters of ACE-Step 1.5, and what the tests of its copies share.

ComfyUI itself is not needed. What its documentation and its code say is applied here in our own words: under which
names it finds a decoder layer, and what it adds to the layer's weight.
"""

import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from sidestep_plugin.cli import cli

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


# -- ComfyUI's rules -------------------------------------------------------------------------------------------------


def names_in_comfyui(layer):
    """Under which names a file may call a layer of the decoder."""
    flat = layer.replace(".", "_")
    return (
        f"base_model.model.{layer}",
        f"lycoris_{flat}",
        f"lora_unet_decoder_{flat}",
        f"diffusion_model.decoder.{layer}",
    )


def play(tensors, weights):
    """The weights that ComfyUI would generate with at strength 1.0, and the tensors that it would not use."""
    left, played = dict(tensors), {}
    for layer, weight in weights.items():
        played[layer] = weight.detach().clone()
        for name in names_in_comfyui(layer):
            mine = {key.removeprefix(f"{name}."): left.pop(key) for key in list(left) if key.startswith(f"{name}.")}
            if not mine:
                continue
            alpha = mine.pop("alpha", None)
            decomposed = mine.pop("dora_scale", None)
            change, rank = change_of(mine)
            change = change.reshape(weight.shape) * (alpha.item() / rank if alpha is not None and rank else 1.0)
            left.update({f"{name}.{key}": tensor for key, tensor in mine.items()})
            played[layer] = weight + change if decomposed is None else decompose(weight, change, decomposed)
    return {layer: weight.detach() for layer, weight in played.items()}, sorted(left)


def change_of(mine):
    """A LoRA's or LoKr's change of the weight before alpha, and the rank that alpha is divided by; takes them out.

    Whatever the tensors' dtype, it is computed in float32.
    """
    for up, down in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
        if up in mine:
            b, a = mine.pop(up).float(), mine.pop(down).float()
            return b.flatten(1) @ a.flatten(1), a.shape[0]
    rank, factors = None, []
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in mine:
            factors.append(mine.pop(factor).float())
        else:
            a, b = mine.pop(f"{factor}_a").float(), mine.pop(f"{factor}_b").float()
            factors.append(a @ b)
            rank = b.shape[0]
    return torch.kron(*factors), rank


def decompose(weight, change, magnitude):
    """Weight decomposition: by the rows' norms of the weight as it was, by the columns' norms of the changed one."""
    if magnitude.shape[0] == weight.shape[0]:
        norms = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
    else:
        norms = (weight + change).transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.dim() - 2))
    return (weight + change) * (magnitude / (norms + torch.finfo(weight.dtype).eps))


# -- layers and their weights ------------------------------------------------------------------------------------------


def a_decoder():
    """Layers under the names and of the proportions of ACE-Step's own decoder."""
    torch.manual_seed(3)
    decoder = nn.Module()
    decoder.proj_in = nn.Sequential(nn.Identity(), nn.Conv1d(12, 32, 2, stride=2))
    decoder.condition_embedder = nn.Linear(24, 32)
    decoder.time_embed = nn.Module()
    decoder.time_embed.linear_1 = nn.Linear(16, 32)
    decoder.layers = nn.ModuleList()
    for _ in range(2):
        layer = nn.Module()
        for part, sizes in {
            "self_attn": dict(zip(ATTENTION, [(32, 32), (32, 16), (32, 16), (32, 32)], strict=True)),
            "cross_attn": dict(zip(ATTENTION, [(32, 32), (32, 16), (32, 16), (32, 32)], strict=True)),
            "mlp": dict(zip(MLP, [(32, 48), (32, 48), (48, 32)], strict=True)),
        }.items():
            setattr(layer, part, nn.Module())
            for name, size in sizes.items():
                setattr(getattr(layer, part), name, nn.Linear(*size, bias=False))
        decoder.layers.append(layer)
    return decoder


def weights_of(decoder):
    names = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)}
    return {name: decoder.get_submodule(name).weight.detach() for name in names}


def measured(decoder, before):
    """The weights of the linear layers as they act: what comes out for every unit vector."""
    after = {}
    with torch.no_grad():
        for layer, weight in before.items():
            module = decoder.get_submodule(layer)
            after[layer] = (module(torch.eye(weight.shape[1])) - module(torch.zeros(1, weight.shape[1]))).T
    return after


def make_random(parameters):
    """Give an adapter's tensors values that nothing was trained to, the same in every test."""
    torch.manual_seed(9)
    for name, parameter in parameters:
        if "dora_scale" in name or "lora_magnitude" in name:
            parameter.data.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        else:
            parameter.data.normal_(std=0.3)


def check_same(tensors, before, after):
    """ComfyUI uses every tensor, and makes of the weights before what they should be."""
    played, left = play(tensors, before)
    assert left == [], left
    for layer in before:
        torch.testing.assert_close(
            played[layer], after[layer].detach(), rtol=1e-5, atol=1e-6, msg=lambda text, layer=layer: f"{layer}: {text}"
        )


def check_differs(tensors, before, after):
    played, _ = play(tensors, before)
    assert any((played[layer] - after[layer]).abs().max() > 0.01 for layer in before), "no layer differs"


# -- exporting ---------------------------------------------------------------------------------------------------------


def export(adapter, *arguments):
    return CliRunner().invoke(
        cli, ["export", str(adapter), "--to", "comfyui", *map(str, arguments)], catch_exceptions=False
    )


def exported(adapter, *arguments):
    """Export an adapter and return the copy's tensors; nothing else in its folder changes by a byte."""
    folder = adapter if adapter.is_dir() else adapter.parent
    before = contents(folder)
    result = export(adapter, *arguments)
    assert result.exit_code == 0, result.output
    after = contents(folder)
    (copy_,) = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before, "a file that was there has changed"
    return load_file(folder / copy_)


def refused(adapter, *arguments, says):
    folder = adapter if adapter.is_dir() else adapter.parent
    before = contents(folder)
    result = export(adapter, *arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr, result.stderr
    assert contents(folder) == before, "something was written"


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
