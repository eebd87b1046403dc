"""How close the estimate of activations is: ``python tests/benchmarks/activation_memory.py --acestep-root DIR``.

For ACE-Step's real decoder class with random weights, in bf16 autocast on a CPU: the bytes that autograd saves in a
forward pass (every storage once, without the parameters), and the peak of all allocations in a training step, each
beside what sidestep_plugin.memory computes. Needs an environment in which the checkout trains.

On a CPU a dropout mask takes 4 bytes an entry and on a GPU 1; the computed figures here are those of a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SMALL = {"width": 256, "feed_forward": 768, "heads": 2, "key_value_heads": 1, "layers": 2}
MIDDLE = {"width": 512, "feed_forward": 1536, "heads": 4, "key_value_heads": 2, "layers": 4}
REAL = {"width": 2048, "feed_forward": 6144, "heads": 16, "key_value_heads": 8, "layers": 2}


def decoder_of(root: Path, sizes: dict[str, int]) -> tuple[Any, Any]:
    """The real decoder in bf16 with random weights, and its size for the estimate."""
    import torch

    from sidestep_plugin.memory.sizes import DecoderSize

    sys.path.insert(0, str(root))
    if importlib.util.find_spec("torchaudio") is None:  # imported by upstream, and not called here
        stand_in: Any = types.ModuleType("torchaudio")
        stand_in.transforms = types.ModuleType("torchaudio.transforms")
        sys.modules["torchaudio"] = stand_in
    modeling = importlib.import_module("acestep.models.base.modeling_acestep_v15_base")
    layers = sizes["layers"]
    config = modeling.AceStepConfig(
        hidden_size=sizes["width"],
        intermediate_size=sizes["feed_forward"],
        num_hidden_layers=layers,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["key_value_heads"],
        head_dim=128,
        layer_types=[("sliding" if layer % 2 == 0 else "full") + "_attention" for layer in range(layers)],
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    size = DecoderSize.from_config(config.to_dict())
    return modeling.AceStepDiTModel(config).to(torch.bfloat16), size


def prepared(decoder: Any, kind: str, rank: int, dropout: float, frozen: str, checkpointing: bool) -> Any:
    """The decoder with an adapter, its weights in the types in which it is trained on a GPU."""
    import torch

    from sidestep_plugin.memory.gradient_checkpointing import switch_checkpointing

    adapted = set()
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        how = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(TARGETS))
        decoder = get_peft_model(decoder, how)
    else:
        from lycoris import create_lycoris

        decoder.requires_grad_(False)
        network = create_lycoris(decoder, 1.0, algo="lokr", linear_dim=rank, linear_alpha=2 * rank, factor=-1)
        network.apply_to()
        decoder._lycoris_net = network
        for lora in network.loras:
            trained = any(name in lora.lora_name for name in TARGETS)
            lora.requires_grad_(trained)
            if trained:
                adapted.add(id(lora.org_module[0]))
            else:
                lora.restore()
    cast = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.ConvTranspose1d)
    for module in decoder.modules():
        for weight in module.parameters(recurse=False):
            stays = frozen == "bf16" and isinstance(module, cast) and id(module) not in adapted
            if weight.requires_grad or not stays:
                weight.data = weight.data.float()
    switch_checkpointing(decoder, checkpointing)
    return decoder.train()


def step(decoder: Any, width: int, frames: int, tokens: int) -> Any:
    """One forward pass | returns the loss."""
    import torch

    def noise(*shape: int) -> Any:
        return torch.randn(shape).bfloat16()

    inputs = {
        "hidden_states": noise(1, frames, 64).requires_grad_(),
        "timestep": torch.rand(1).bfloat16(),
        "timestep_r": torch.rand(1).bfloat16(),
        "attention_mask": torch.ones(1, frames).bfloat16(),
        "encoder_hidden_states": noise(1, tokens, width),
        "encoder_attention_mask": torch.ones(1, tokens).bfloat16(),
        "context_latents": noise(1, frames, 128),
    }
    with torch.autocast("cpu", torch.bfloat16):
        return decoder(**inputs)[0].float().pow(2).mean()


def saved_bytes(decoder: Any, *lengths: int) -> int:
    """What autograd saves in a forward pass, without the parameters."""
    import torch

    own = {weight.untyped_storage().data_ptr() for weight in decoder.parameters()}
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(decoder, *lengths)
    return sum(seen.values())


def peak_bytes(decoder: Any, *lengths: int) -> int:
    """The peak of all allocations in a step, beyond what there was before it; the gradients are there already."""
    from torch.profiler import ProfilerActivity, profile

    step(decoder, *lengths).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(decoder, *lengths).backward()
    events: Any = profiler.profiler
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events.kineto_results.events() if event.name() == "[memory]"
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def main() -> None:
    import torch

    from sidestep_plugin.memory.activations import activation_bytes, working_bytes
    from sidestep_plugin.memory.estimate import Settings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acestep-root", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=1500, help="frames of latents, 25 a second [1500]")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of the condition [300]")
    said = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    print(f"{said.frames} frames, {said.tokens} tokens; MB, and computed / measured")
    ways = [("lora", 0.0, "bf16"), ("lora", 0.1, "bf16"), ("lora", 0.0, "fp32"), ("lokr", 0.0, "bf16")]
    for name, sizes in {"small": SMALL, "middle": MIDDLE, "2B's width": REAL}.items():
        for kind, dropout, frozen in ways:
            for checkpointing in (False, True):
                bare, size = decoder_of(said.acestep_root, sizes)
                decoder = prepared(bare, kind, 64, dropout, frozen, checkpointing)
                lengths = (size.width, said.frames, said.tokens)
                how = Settings(
                    kind, targets=TARGETS, dropout=dropout > 0, frames=said.frames, tokens=said.tokens, frozen=frozen
                ).but(checkpointing=checkpointing)
                waits = activation_bytes(size, how, mask_bytes=4)
                whole = waits + working_bytes(size, how)
                peak = peak_bytes(decoder, *lengths)
                line = f"{name:<11}{kind} dropout {dropout} {frozen} checkpointing {'on ' if checkpointing else 'off'}"
                if not checkpointing:  # with it, what a layer saves exists in the backward pass only
                    saved = saved_bytes(decoder, *lengths)
                    line += f"  saved {saved / 1e6:7.1f} {waits / saved:5.3f}"
                print(f"{line:<74}  peak {peak / 1e6:7.1f} {whole / peak:5.3f}", flush=True)


if __name__ == "__main__":
    main()
