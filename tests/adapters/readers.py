"""What the programs that read a LoRA for ACE-Step 1.5 add to a layer's weight, by their own rules.

None of them is needed here. Each function says in our own words what the code of a program does, named with the version
that it was read from. All take a weights file, or the folder that it lies in, and return what is added by layer.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .comfyui_rules import play

PARTS = {".lora_A.weight": "A", ".lora_down.weight": "A", ".lora_B.weight": "B", ".lora_up.weight": "B"}


def pairs_in(file, prefixes=("base_model.model.",)):
    """lora_A and lora_B by layer, and the alphas among the tensors."""
    pairs, alphas = {}, {}
    for key, tensor in load_file(file).items():
        for prefix in prefixes:
            key = key.removeprefix(prefix)
        for name, part in PARTS.items():
            if key.endswith(name):
                pairs.setdefault(key.removesuffix(name), {})[part] = tensor.float()
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = tensor.item()
    return pairs, alphas


def weights_in(path):
    """The file of a folder, or the file itself."""
    if path.is_file():
        return path
    lokr = path / "lokr_weights.safetensors"
    return lokr if lokr.is_file() else path / "adapter_model.safetensors"


def lokr_in(path):
    return any(".lokr_w" in key for key in load_file(weights_in(path)))


def _lokr_by_acestep_cpp(path, before):
    with safe_open(weights_in(path), framework="pt") as opened:
        config = json.loads((opened.metadata() or {}).get("lokr_config", "{}"))
    modules, found = {}, {}
    for key, tensor in load_file(weights_in(path)).items():
        name, _, part = key.rpartition(".")
        modules.setdefault(name, {})[part] = tensor.float()
    for layer, weight in before.items():
        mine = modules.get(f"lycoris_{layer.replace('.', '_')}", {})
        whole = "lokr_w2" in mine
        if (
            weight.dim() != 2
            or "lokr_w1" not in mine
            or "alpha" not in mine
            or (whole and not config.get("linear_dim"))
        ):
            continue
        second = mine["lokr_w2"] if whole else mine["lokr_w2_a"] @ mine["lokr_w2_b"]
        rank = config["linear_dim"] if whole else len(mine["lokr_w2_b"])
        change = (torch.kron(mine["lokr_w1"], second) * (mine["alpha"] / rank)).bfloat16().float()
        if (scale := mine.get("dora_scale")) is not None:
            changed = weight + change
            norms = changed.norm(dim=1, keepdim=True) + torch.finfo(torch.bfloat16).eps
            change = changed * (scale.reshape(-1, 1) / norms) - weight
        found[layer] = change
    return found


def demon(path, before):
    """daydreamlive/DEMON 3e82f3f, acestep/engine/lora.py ``_compute_deltas``: lora_B @ lora_A, whatever alpha is."""
    pairs, _ = pairs_in(weights_in(path))
    return {layer: pair["B"] @ pair["A"] for layer, pair in pairs.items()}


def wan2gp(path, before):
    """Wan2GP by mmgp 3.8.2, offload.py: alpha / rank from the tensor beside the layer, 1 without it.

    It plays whole factors of a LoKr under a layer's own name, whatever alpha is. Names as LyCORIS writes them mean no
    layer, and a file with a name that means none is refused. That Wan2GP itself translates no names but
    "base_model.model." was read at 8681e9f7.
    """
    if lokr_in(path):
        return {}
    pairs, alphas = pairs_in(weights_in(path))
    return {
        layer: pair["B"] @ pair["A"] * (alphas[layer] / len(pair["A"]) if layer in alphas else 1.0)
        for layer, pair in pairs.items()
    }


def acestep_cpp(path, before):
    """ServeurpersoCom/acestep.cpp fa33775, src/adapter-merge.h.

    Alpha is the tensor's, else the whole number after "lora_alpha" in the adapter_config.json of the file's folder,
    else the rank. Patterns and rsLoRA are not read. A, B and their product are rounded to bf16.

    Of a LoKr, whole first factors are read, and its alpha is divided by the second factor's rank or, if that is whole,
    by linear_dim of the header's lokr_config; the change is rounded to bf16. Weight decomposition is LyCORIS' own
    for bf16: by the norms of the changed weight plus bf16's epsilon.
    It takes a LoKr as a file, and of folders PEFT's alone.
    """
    return _merged(path, before, {})


def hot_step(path, before):
    """scragnog/HOT-Step-CPP 4b5492c, engine/src/adapter-merge.h: acestep.cpp's, and it reads more.

    An alpha in "alpha_pattern" is that of the layer whose whole name stands there, and a
    folder may be a LoKr's.
    """
    config = _config_beside(path)
    return _merged(path, before, dict(config.get("alpha_pattern") or {}))


def _config_beside(path):
    config = (path if path.is_dir() else path.parent) / "adapter_config.json"
    return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}


def _merged(path, before, alpha_by_layer):
    if lokr_in(path):
        return _lokr_by_acestep_cpp(path, before)
    said = int(float(_config_beside(path).get("lora_alpha", 0)))
    pairs, alphas = pairs_in(weights_in(path), ("base_model.model.", "diffusion_model.", "decoder."))
    found = {}
    for layer, pair in pairs.items():
        rank = len(pair["A"])
        alpha = alphas.get(layer) or alpha_by_layer.get(layer) or said or rank
        found[layer] = (pair["B"].bfloat16().float() @ pair["A"].bfloat16().float() * (alpha / rank)).bfloat16().float()
    return found


def comfyui(path, before):
    """ComfyUI, by the rules of ``comfyui_rules.py``."""
    played, left = play(load_file(weights_in(path)), before)
    assert left == [], left
    return {layer: played[layer] - before[layer] for layer in before if not (played[layer] == before[layer]).all()}


def hot_step_trigger(path):
    """Trigger and position by scragnog/HOT-Step-CPP, server/src/services/adapters/stMetadata.ts, readAdapterTrigger."""
    with safe_open(weights_in(Path(path)), framework="pt") as opened:
        header = opened.metadata()
    trigger = (header.get("hot_step_trigger") or header.get("modelspec.trigger_phrase") or "").strip()
    position = "append" if header.get("hot_step_trigger_position", "").strip() == "append" else "prepend"
    return (trigger, position) if trigger else ("", "")


READERS = {
    "ComfyUI": comfyui,
    "acestep.cpp": acestep_cpp,
    "HOT-Step": hot_step,
    "Wan2GP": wan2gp,
    "DEMON": demon,
}
