"""What the programs that read a LoRA for ACE-Step 1.5 add to a layer's weight, by their own rules.

None of them is needed here. Each function says in our own words what the code of a program does, named with the version
that it was read from. All take a weights file, or the folder that it lies in, and return what is added by layer.
"""

import json
from pathlib import Path

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
    return path / "adapter_model.safetensors" if path.is_dir() else path


def demon(path, before):
    """daydreamlive/DEMON 3e82f3f, acestep/engine/lora.py ``_compute_deltas``: lora_B @ lora_A, whatever alpha is."""
    pairs, _ = pairs_in(weights_in(path))
    return {layer: pair["B"] @ pair["A"] for layer, pair in pairs.items()}


def wan2gp(path, before):
    """Wan2GP by mmgp 3.8.2, offload.py: alpha / rank from the tensor beside the layer, 1 without it."""
    pairs, alphas = pairs_in(weights_in(path))
    return {
        layer: pair["B"] @ pair["A"] * (alphas[layer] / len(pair["A"]) if layer in alphas else 1.0)
        for layer, pair in pairs.items()
    }


def acestep_cpp(path, before):
    """ServeurpersoCom/acestep.cpp fa33775, src/adapter-merge.h, and HOT-Step, which has it from there.

    Alpha is the tensor's, else the whole number after "lora_alpha" in the adapter_config.json of the file's folder,
    else the rank. Patterns and rsLoRA are not read. A, B and their product are rounded to bf16.
    """
    config = (path if path.is_dir() else path.parent) / "adapter_config.json"
    said = int(float(json.loads(config.read_text(encoding="utf-8")).get("lora_alpha", 0))) if config.is_file() else 0
    pairs, alphas = pairs_in(weights_in(path), ("base_model.model.", "diffusion_model.", "decoder."))
    found = {}
    for layer, pair in pairs.items():
        rank = len(pair["A"])
        alpha = alphas.get(layer) or said or rank
        found[layer] = (pair["B"].bfloat16().float() @ pair["A"].bfloat16().float() * (alpha / rank)).bfloat16().float()
    return found


def comfyui(path, before):
    """ComfyUI, by the rules of ``comfyui_rules.py``."""
    played, left = play(load_file(weights_in(path)), before)
    assert left == [], left
    return {layer: played[layer] - before[layer] for layer in before if not (played[layer] == before[layer]).all()}


def hot_step_trigger(path):
    """Trigger and position by scragnog/HOT-Step-CPP, server/src/services/adapters/stMetadata.ts, readAdapterTrigger."""
    from safetensors import safe_open

    with safe_open(weights_in(Path(path)), framework="pt") as opened:
        header = opened.metadata()
    trigger = (header.get("hot_step_trigger") or header.get("modelspec.trigger_phrase") or "").strip()
    position = "append" if header.get("hot_step_trigger_position", "").strip() == "append" else "prepend"
    return (trigger, position) if trigger else ("", "")


READERS = {"ComfyUI": comfyui, "acestep.cpp and HOT-Step": acestep_cpp, "Wan2GP": wan2gp, "DEMON": demon}
