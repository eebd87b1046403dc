"""What describing an adapter adds to saving it: time and memory, side by side in one process, as ratios.

    python tests/benchmarks/save_cost.py [--megabytes 200] [--rounds 5]

Saves a LoRA of that size by PEFT as upstream does, and writes the header into it as the plugin does, in turn. Prints
medians. The plugin also waits until the disk has the file, and computes the hash of all tensors.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sidestep_plugin.adapters.header import write_header

FACTS = {"schema_version": 1, "title": "benchmark", "model_name": "acestep-v15-base", "model_variant": "base"}
FACTS |= {"shift": 1.0, "num_inference_steps": 50, "adapter_type": "lora", "rank": 64, "alpha": 128}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(width), Attention(width)


class Decoder(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=dict, _name_or_path="acestep-v15-base")
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))


def adapter_of(megabytes: int) -> Any:
    """A LoRA of rank 64 whose tensors take about that much in fp32, on layers of the full-size model's width."""
    width, rank = 2048, 64
    layers = max(1, round(megabytes * 1e6 / (8 * 2 * rank * width * 4)))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    with torch.device("meta"):
        decoder = Decoder(layers, width)
    model = get_peft_model(decoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    for module in model.modules():
        for name in ("lora_A", "lora_B"):
            weights = getattr(module, name, None)
            if isinstance(weights, nn.ModuleDict):
                weights["default"].weight = nn.Parameter(torch.randn(weights["default"].weight.shape))
    return model


def timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    said = parser.parse_args()
    model = adapter_of(said.megabytes)
    rows: dict[str, list[float]] = {"upstream's save": [], "header added": []}
    with tempfile.TemporaryDirectory() as place:
        for number in range(said.rounds):
            folder = Path(place) / str(number % 2)
            weights = folder / "adapter_model.safetensors"
            rows["upstream's save"].append(timed(lambda: model.save_pretrained(str(folder))))  # noqa: B023
            rows["header added"].append(timed(lambda: write_header(weights, FACTS)))  # noqa: B023
        size = weights.stat().st_size
        tracemalloc.start()
        write_header(weights, FACTS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    medians = {name: statistics.median(values) for name, values in rows.items()}
    save = medians["upstream's save"]
    print(f"adapter of {size / 1e6:.0f} MB, {said.rounds} rounds, torch {torch.__version__}")
    for name, seconds in medians.items():
        print(f"    {name:<20}{seconds:8.3f} s   {seconds / save:5.2f} of upstream's save")
    print(f"    memory for the header: {peak / 1e6:.1f} MB, {peak / size:.3f} of the adapter")


if __name__ == "__main__":
    main()
