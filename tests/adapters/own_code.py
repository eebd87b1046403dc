"""Runs what programs that read an adapter do with it: their own code, out of clones of their repositories.

``programs_in(folder, scratch)`` finds the clones by name; see ``test_own_code.py`` for how to get them. Each program is
called as its rules in ``readers.py`` are: with a weights file or its folder, and the decoder's weights by layer. It
returns what is added by layer.
"""

import ast
import importlib
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .comfyui_rules import names_in_comfyui
from .readers import weights_in

HERE = Path(__file__).parent


def programs_in(folder, scratch):
    """The programs whose code is there, by name, and what is missing for the others."""
    makers = {
        "ComfyUI": (("ComfyUI/comfy/lora.py",), comfyui),
        "acestep.cpp": (("acestep.cpp/src/adapter-merge.h", "ggml/build/src/libggml-cpu.a"), acestep_cpp),
        "HOT-Step": (("HOT-Step-CPP/engine/src/adapter-merge.h", "ggml/build/src/libggml-cpu.a"), hot_step),
        "Wan2GP": (("Wan2GP/models/TTS/ace_step15/models/ace_step15_hf.py",), wan2gp),
        "DEMON": (("DEMON/acestep/engine/lora.py",), demon),
    }
    found, missing = {}, {}
    for name, (files, make) in makers.items():
        lost = [file for file in files if not (folder / file).is_file()]
        if lost:
            missing[name] = f"{folder} has no {', no '.join(lost)}"
        else:
            found[name] = make(folder, scratch)
    return found, missing


def changes(before, after):
    """What was added by layer; layers that stayed as they were are left out."""
    return {layer: after[layer] - weight for layer, weight in before.items() if not after[layer].equal(weight)}


def comfyui(folder, scratch):
    """comfy/lora.py and comfy/weight_adapter; what only moves tensors between devices is replaced."""
    package = types.ModuleType("comfy")
    package.__path__ = [str(folder / "ComfyUI" / "comfy")]
    sys.modules["comfy"] = package
    for name in ("model_management", "utils", "model_base", "float", "ops"):
        module = types.ModuleType(f"comfy.{name}")
        sys.modules[f"comfy.{name}"] = module
        setattr(package, name, module)
    package.model_management.cast_to_device = lambda tensor, device, dtype, copy=False: tensor.to(device, dtype)
    lora = importlib.import_module("comfy.lora")

    def read(path, before):
        names = {name: layer for layer in before for name in names_in_comfyui(layer)}
        after = dict(before)
        for layer, patch in lora.load_lora(load_file(weights_in(path)), names).items():
            after[layer] = patch.calculate_weight(before[layer].clone(), layer, 1.0, 1.0, None, lambda weight: weight)
        return changes(before, after)

    return read


def _merged(folder, scratch, sources, *flags):
    """Builds own_code_merge.cpp against a program's sources. Returns its reader."""
    program = scratch / f"merge-{sources.parts[0]}"
    ggml = folder / "ggml"
    libraries = [str(ggml / "build" / "src" / f"lib{name}.a") for name in ("ggml", "ggml-cpu", "ggml-base")]
    vendor = folder / sources.parent / "vendor" / "yyjson"
    compiled = scratch / f"yyjson-{sources.parts[0]}.o"
    subprocess.run(["gcc", "-O1", "-c", str(vendor / "yyjson.c"), "-o", str(compiled)], check=True)
    line = ["g++", "-std=c++17", "-O1", "-w", *flags, str(HERE / "own_code_merge.cpp"), str(compiled)]
    line += [f"-I{place}" for place in (folder / sources, vendor, ggml / "include")]
    subprocess.run(
        [*line, "-Wl,--start-group", *libraries, "-Wl,--end-group", "-lpthread", "-o", str(program)], check=True
    )

    def read(path, before):
        model, output = scratch / "model.gguf", scratch / "merged.bin"
        _write_gguf(model, before)
        done = subprocess.run([program, model, weights_in(path), output], capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        assert "mapping failed" not in done.stderr
        values, after = torch.frombuffer(bytearray(output.read_bytes()), dtype=torch.float32), {}
        for layer, weight in before.items():
            after[layer] = values[: weight.numel()].reshape(weight.shape)
            values = values[weight.numel() :]
        return changes(before, after)

    return read


def _write_gguf(file, before):
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(file, "acestep")
    for layer, weight in before.items():
        writer.add_tensor(f"decoder.{layer}.weight", weight.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def acestep_cpp(folder, scratch):
    """src/adapter-merge.h, on ggml's CPU backend."""
    return _merged(folder, scratch, Path("acestep.cpp", "src"))


def hot_step(folder, scratch):
    """engine/src/adapter-merge.h, on ggml's CPU backend."""
    return _merged(folder, scratch, Path("HOT-Step-CPP", "engine", "src"), "-DHOT_STEP")


def wan2gp(folder, scratch):
    """The method that translates names, out of its file, and mmgp from PyPI: its loader and its forward pass."""
    offload = importlib.import_module("mmgp.offload")
    file = folder / "Wan2GP" / "models" / "TTS" / "ace_step15" / "models" / "ace_step15_hf.py"
    (cls,) = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    kept = [node for node in cls.body if getattr(node, "name", "") in ("_split_lora_key", "preprocess_loras")]
    translator = ast.ClassDef("Model", [ast.parse("nn.Module", mode="eval").body], [], kept, [])
    names = {"nn": nn}
    exec(compile(ast.fix_missing_locations(ast.Module([translator], [])), str(file), "exec"), names)

    def read(path, before):
        model = names["Model"]()
        layers = {}
        for layer, weight in before.items():
            parent = model
            *folders, last = f"decoder.{layer}".split(".")
            for part in folders:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            layers[layer] = nn.Linear(*reversed(weight.shape), bias=False) if weight.dim() == 2 else nn.Conv1d(1, 1, 1)
            layers[layer].weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            parent.add_module(last, layers[layer])
        model._loras_model_data = {module: {} for module in layers.values()}
        model._loras_model_shortcuts = {name: model._loras_model_data.get(m, {}) for name, m in model.named_modules()}
        offload.load_loras_into_model(model, str(weights_in(path)), preprocess_sd=partial(model.preprocess_loras, ""))
        forward = partial(
            offload.offload._lora_linear_forward, types.SimpleNamespace(_get_lora_scaling=_scaling), model
        )
        after = dict(before)
        for layer, module in layers.items():
            data = model._loras_model_data[module]
            if data:
                data |= {f"{name}_GPU": found for name, found in data.items()}
                after[layer] = forward(module, data, torch.eye(module.weight.shape[1])).T.detach()
        return changes(before, after)

    return read


def _scaling(scaling, model, adapter):
    return float(scaling[adapter])


def demon(folder, scratch):
    """acestep/engine/lora.py, LoRAManagerBase."""
    sys.modules.setdefault("loguru", types.SimpleNamespace(logger=types.SimpleNamespace(debug=print, warning=print)))
    place = folder / "DEMON" / "acestep" / "engine" / "lora.py"
    spec = importlib.util.spec_from_file_location("demon_lora", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demon_lora"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    cls = type("Manager", (module.LoRAManagerBase,), {"_apply_to_engine": lambda self, names: None})

    def read(path, before):
        manager = cls()
        manager._param_dtype = {f"{layer}.weight": torch.float32 for layer in before}
        manager._param_numel = {f"{layer}.weight": weight.numel() for layer, weight in before.items()}
        found, _ = manager._compute_deltas(str(weights_in(path)))
        return {name.removesuffix(".weight"): change for name, change in found.items()}

    return read
