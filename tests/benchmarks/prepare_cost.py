"""What preparing songs costs: time by pass with tiny models, and memory by pass for the official ones, counted.

    python tests/benchmarks/prepare_cost.py [--songs 8] [--seconds 30]
    python tests/benchmarks/prepare_cost.py --acestep-root CHECKOUT

Times are those of the miniature on this CPU: only their ratios say something, and only about everything that is not a
model (reading, hashing, writing). With a checkout, parameters are counted instead, on torch's meta device, at the sizes
of ACE-Step 1.5's own configuration and of Qwen3-Embedding-0.6B; weights and activations in bf16.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GIB = 2**30
QWEN3 = {
    "vocab_size": 151669,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""config.json of Qwen3-Embedding-0.6B, as far as it makes parameters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--songs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--acestep-root", type=Path)
    given = parser.parse_args()
    lines = times(given.songs, given.seconds) if given.acestep_root is None else memory(given.acestep_root)
    print("\n".join(lines))


def times(songs: int, seconds: float) -> list[str]:
    """Seconds of the CPU for each song and pass, and their shares."""
    import torch

    from sidestep_plugin import miniature
    from sidestep_plugin.preparing import job, planning
    from sidestep_plugin.preparing.request import PrepareRequest

    torch.set_num_threads(1)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            began = time.process_time()
            try:
                return original(*args, **more)
            finally:
                spent[name] += time.process_time() - began

        return call

    for module, attribute, name in (
        (planning, "hash_of", "hash of the audio"),
        (planning, "look_at", "looking at the audio"),
        (job, "read_audio", "reading the audio"),
        (job, "encode_audio", "VAE"),
        (job, "encode", "text and conditions"),
        (job, "write_song", "writing"),
    ):
        setattr(module, attribute, timed(name, getattr(module, attribute)))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        built = miniature.build(place, models=["acestep-v15-base"], encoders=True)
        audio = miniature.write_audio(place / "audio", seconds=seconds)
        for number in range(4, songs):
            (audio / f"more{number}.wav").write_bytes((audio / "harbour.wav").read_bytes())
        request = PrepareRequest(audio, "base", place / "songs", acestep_root=built.root, device="cpu")
        job.prepare(
            PrepareRequest(audio, "base", place / "warm", acestep_root=built.root, device="cpu"), lambda _: None
        )
        spent.clear()
        began = time.process_time()
        job.prepare(request, lambda _: None)
        whole = time.process_time() - began
        began = time.process_time()
        job.prepare(request, lambda _: None)
        again = time.process_time() - began
    lines = [f"{songs} songs of {seconds:g} s, miniature, one core: {1000 * whole / songs:.0f} ms per song"]
    for name, took in spent.items():
        lines.append(f"  {name:24} {1000 * took / songs:8.1f} ms per song, {100 * took / whole:4.0f} %")
    lines.append(f"  run again, nothing to do {1000 * again / songs:8.1f} ms per song, {100 * again / whole:4.0f} %")
    return lines


def memory(root: Path) -> list[str]:
    """GPU memory of each pass at the official sizes: parameters counted, activations estimated from shapes."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    sys.path.insert(0, str(root))
    modeling = importlib.import_module("acestep.models.base.modeling_acestep_v15_base")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = count(Qwen3Model(Qwen3Config(**QWEN3)))
        config = modeling.AceStepConfig()
        config._attn_implementation = "sdpa"
        encoder = count(modeling.AceStepConditionEncoder(config))
        decoder = count(modeling.AceStepDiTModel(config))
    from diffusers import AutoencoderOobleck

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = count(AutoencoderOobleck(downsampling_ratios=[2, 4, 4, 6, 10], sampling_rate=48000))
    window = 15 * 48000 * 128 * 2 * 5  # the widest activations, 128 channels at 48 kHz, about 5 of them at once
    lines = [
        f"parameters in millions: text encoder {text / 1e6:.0f}, condition encoder {encoder / 1e6:.0f}, VAE "
        f"{vae / 1e6:.0f}, decoder {decoder / 1e6:.0f} (never on the GPU)"
    ]
    sizes = {name: 2 * number / GIB for name, number in (("text", text), ("encoder", encoder), ("vae", vae))}
    together = sum(sizes.values())
    for name, weights, more in (
        ("one pass", together, window / GIB),
        ("--low-memory, sound", sizes["vae"], window / GIB),
        ("--low-memory, texts", sizes["text"] + sizes["encoder"], 2048 * 2048 * 16 * 2 / GIB),
        ("--renew", sizes["text"] + sizes["encoder"], 2048 * 2048 * 16 * 2 / GIB),
    ):
        lines.append(
            f"  {name:22} weights {weights:.1f} GiB, activations about {more:.1f}, together {weights + more:.1f}"
        )
    lines.append(f"  main memory while loading: {2 * (encoder + decoder + text) / GIB:.1f} GiB")
    return lines


def count(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


if __name__ == "__main__":
    main()
