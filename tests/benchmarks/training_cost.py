"""What a training costs with and without the plugin's savings: ``python tests/benchmarks/training_cost.py``.

Whole trainings by upstream's own loop on the stand-in, whose model is made as wide as asked, with bf16 autocast as on
a GPU. Each way of training runs in a process of its own, in turn, and is compared with upstream alone: time per step
(median), bytes of the decoder's parameters, and peak memory of the process beyond what it had before the training.

On a CPU the ratios of time say little about a GPU: there, casting weights costs memory traffic, not arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, Any] | None] = {
    "upstream alone": None,
    "plugin, fp32 weights": {"base_weights": "fp32"},
    "--base-weights auto": {"base_weights": "auto"},
    "--gradient-checkpointing off": {"base_weights": "fp32", "gradient_checkpointing": "off"},
    "both (the same bits)": {"base_weights": "auto", "gradient_checkpointing": "off"},
    "--base-weights int8": {"base_weights": "int8"},
    "--compile": {"compile": True},
}
"""The ways and their options. The stand-in turns checkpointing on, as the newest versions of ACE-Step do. Every way
with the plugin bypasses the LoKr layers that are not trained."""


def measure(kind: str, way: str, width: int, layers: int, seconds: int, steps: int) -> dict[str, float]:
    """Train once in this process | returns seconds per step, bytes of parameters, bytes of peak memory added."""
    import torch

    from sidestep_plugin import attach, miniature
    from sidestep_plugin.engine import shapes
    from sidestep_plugin.engine.checkout import import_trainer
    from sidestep_plugin.engine.models import load_model

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        root = miniature.write_checkout(folder / "checkout")
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        model = miniature.write_model(folder, "acestep-v15-turbo", seed=1, num_attention_heads=width // 64, **sizes)
        songs = folder / "songs"
        songs.mkdir()
        frames, tokens = 25 * seconds, 64
        for number in range(steps):
            song = {
                "target_latents": torch.randn(frames, 64),
                "attention_mask": torch.ones(frames),
                "encoder_hidden_states": torch.randn(tokens, width),
                "encoder_attention_mask": torch.ones(tokens),
                "context_latents": torch.randn(frames, 128),
                "metadata": {},
            }
            torch.save(song, songs / f"song_{number}.pt")
        os.chdir(folder)  # upstream's path guard accepts what lies below the directory that it is imported in
        trainer = import_trainer(root)
        trainer._precision = lambda _: "bf16-mixed"
        handler = load_model(model, torch.device("cpu"))
        handler.model.to(torch.bfloat16)
        starts: list[float] = []
        sizes_seen: list[int] = []

        def note(decoder: Any, _: Any) -> None:
            starts.append(time.perf_counter())
            sizes_seen.append(
                sum(
                    tensor.numel() * tensor.element_size()
                    for tensor in (*handler.model.decoder.parameters(), *handler.model.decoder.buffers())
                )
            )

        handler.model.decoder.register_forward_pre_hook(note)
        adapter = getattr(trainer, shapes.CONFIG_CLASS[kind])(**({"r": 16, "alpha": 32} if kind == "lora" else {}))
        settings = {"batch_size": 1, "gradient_accumulation_steps": 1, "max_epochs": 1, "num_workers": 0}
        config = trainer.TrainingConfig(output_dir=str(folder / "out"), save_every_n_epochs=9, **settings)
        options = WAYS[way]
        handle = None if options is None else attach(trainer, options=options, announce=lambda _: None)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = getattr(trainer, shapes.TRAINER_CLASS[kind])(handler, adapter, config)
        messages = [text for _, _, text in made.train_from_preprocessed(str(songs), {"should_stop": False})]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if handle is not None:
            handle.detach()
        if len(starts) < steps:
            raise SystemExit(f"only {len(starts)} of {steps} steps: {messages[-1]}")
    times = [later - earlier for earlier, later in pairwise(starts)]
    return {"seconds": statistics.median(times), "weights": sizes_seen[-1], "peak": (after - before) * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="hidden size [1024; the 2B model has 2048]")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers [4; the 2B model has 24]")
    parser.add_argument("--seconds", type=int, default=20, help="length of a song [20]")
    parser.add_argument("--steps", type=int, default=6, help="steps of a training [6]")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind [3]")
    parser.add_argument("--only", choices=WAYS, action="append", help="measure this way, beside upstream alone")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "WAY"), help=argparse.SUPPRESS)
    said = parser.parse_args()
    sizes = (said.width, said.layers, said.seconds, said.steps)
    if said.one:
        print(json.dumps(measure(*said.one, *sizes)))
        return
    print(
        f"width {said.width}, {said.layers} layers, songs of {said.seconds} s, {said.steps} steps, {said.rounds} rounds"
    )
    print(f"{'':<36}{'time a step':>14}{'parameters':>14}{'peak memory':>14}   (ratios to upstream alone)")
    words = [f"--{name}={value}" for name, value in zip(("width", "layers", "seconds", "steps"), sizes, strict=True)]
    for kind in ("lora", "lokr"):
        ways = [way for way in WAYS if not said.only or way in ("upstream alone", *said.only)]
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        if kind == "lokr":
            found.pop("--base-weights int8", None)  # for a LoRA only
        for _ in range(said.rounds):
            for way in found:
                line = [sys.executable, "-W", "ignore", __file__, *words, "--one", kind, way]
                done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8")
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
        base = {
            name: statistics.median(run[name] for run in found["upstream alone"]) for name in found["upstream alone"][0]
        }
        for way, runs in found.items():
            ratios = [
                statistics.median(run[name] for run in runs) / base[name] for name in ("seconds", "weights", "peak")
            ]
            print(f"{kind + ', ' + way:<36}" + "".join(f"{ratio:>14.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
