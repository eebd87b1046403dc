"""What the plugin costs a training step: ``python tests/benchmarks/step_cost.py [--device cuda]``.

The hooks are measured around a step that does nothing but move the batch, draw noise and call the sampler, with and
without the plugin, alternating in one process; the difference is the plugin's. Songs and conditions are as large as
those of a long prompt on the full-size model. Beside the times stands what was added: ATen calls, bytes of new
tensors, random numbers. On CUDA the steps also run with synchronisation forbidden.

With ``--acestep-root DIR`` the same step is also run with the two functions of Side-Step's corrected trainer, where
the checkout carries it as ``acestep.training_v2``: drawing timesteps and dropping conditions, called directly.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sidestep_plugin import attach
from sidestep_plugin.timesteps.schedule import inference_timesteps

TOKENS, WIDTH = 512, 2048
ROUNDS, STEPS = 30, 40


class Counter(TorchDispatchMode):
    """Counts ATen calls, bytes of tensors that they make, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = self.random_numbers = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, torch.Tensor):
            if not func.is_view and all(result is not argument for argument in args):
                self.bytes += result.numel() * result.element_size()
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.random_numbers += result.numel()
        return result


def bare_trainer(device: torch.device, dtype: torch.dtype) -> Any:
    """A trainer whose step does what every step does before its decoder, and nothing else."""
    trainer = types.ModuleType("bare_trainer")

    def sample_discrete_timestep(bsz: int, timesteps_tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = timesteps_tensor[torch.randint(0, len(timesteps_tensor), (bsz,), device=timesteps_tensor.device)]
        return t, t

    class PreprocessedLoRAModule:
        training_step: Callable[..., Any]

        def __init__(self, model: Any) -> None:
            self.model, self.device, self.dtype = model, device, dtype
            self.timesteps_tensor = torch.tensor(inference_timesteps(3.0, 8), device=device, dtype=dtype)
            self.training_losses = [0.0]

    # The look at the code wants the sampler called as a global of the step's module.
    namespace = trainer.__dict__
    source = "def training_step(self, batch, record_loss=True):\n    noise(batch)\n    move(self, batch)\n"
    source += "    return sample_discrete_timestep(len(batch['target_latents']), self.timesteps_tensor)[0].sum()\n"
    namespace |= {
        "sample_discrete_timestep": sample_discrete_timestep,
        "noise": lambda batch: torch.randn_like(batch["target_latents"]),
        "move": lambda self, batch: batch["encoder_hidden_states"].to(self.device, dtype=self.dtype),
    }
    exec(source, namespace)
    PreprocessedLoRAModule.training_step = namespace["training_step"]
    namespace["PreprocessedLoRAModule"] = PreprocessedLoRAModule
    exec(
        "def save_lora_weights(model, output_dir): ...\n"
        "class LoRATrainer:\n"
        "    def train_from_preprocessed(self, tensor_dir): save_lora_weights(1, tensor_dir)\n",
        namespace,
    )
    return trainer


def model_of(variant: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    model = torch.nn.Module()
    model.null_condition_emb = torch.nn.Parameter(torch.randn(1, 1, WIDTH, device=device, dtype=dtype))
    model.config = types.SimpleNamespace(
        is_turbo=variant == "turbo", timestep_mu=-0.4, timestep_sigma=1.0, _name_or_path=f"acestep-v15-{variant}"
    )
    return model


@contextlib.contextmanager
def attached(trainer: Any, on: bool) -> Iterator[None]:
    """The plugin on the bare trainer."""
    with attach(trainer, announce=lambda _: None) if on else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def side_step(trainer: Any, on: bool) -> Iterator[None]:
    """Side-Step's two functions in the bare step, called directly."""
    from acestep.training_v2.timestep_sampling import apply_cfg_dropout, sample_timesteps

    def move(module: Any, batch: Any) -> None:
        conditions = batch["encoder_hidden_states"].to(module.device, dtype=module.dtype)
        apply_cfg_dropout(conditions, module.model.null_condition_emb, 0.15)

    def sample(bsz: int, table: torch.Tensor) -> Any:
        return sample_timesteps(bsz, table.device, table.dtype, 0.5, -0.4, 1.0)

    before = trainer.move, trainer.sample_discrete_timestep
    if on:
        trainer.move, trainer.sample_discrete_timestep = move, sample
    try:
        yield
    finally:
        trainer.move, trainer.sample_discrete_timestep = before


def seconds_a_step(step: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


def added_cost(
    added: Callable[[Any, bool], Any],
    variant: str,
    batch_size: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    trainer, model = bare_trainer(device, dtype), model_of(variant, device, dtype)
    module = trainer.PreprocessedLoRAModule(model)
    batch = {
        "target_latents": torch.randn(batch_size, 8, 64, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch_size, tokens, WIDTH, device=device, dtype=dtype),
    }

    def step() -> Any:
        return module.training_step(batch)

    times: dict[bool, list[float]] = {False: [], True: []}
    counts: dict[bool, Counter] = {}
    for on in (False, True):  # once each to warm up, then counted
        with added(trainer, on):
            step()
            if on and device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
                step()
                torch.cuda.set_sync_debug_mode("default")
            with Counter() as counts[on]:
                step()
    for _ in range(ROUNDS):
        for on in (False, True):
            with added(trainer, on):
                step()  # deciding on the model is once a run, not once a step
                times[on].append(seconds_a_step(step, device))
    without, with_plugin = (statistics.median(times[on]) for on in (False, True))
    return {
        "without_us": 1e6 * without,
        "added_us": 1e6 * (with_plugin - without),
        "calls": counts[True].calls - counts[False].calls,
        "kilobytes": (counts[True].bytes - counts[False].bytes) / 1024,
        "random_numbers": counts[True].random_numbers - counts[False].random_numbers,
    }


def help_ratio() -> float:
    """Time of ``acestep-train --help`` relative to a bare click program, the median of alternating runs."""
    bare = "import click\n@click.command()\ndef main(): 'Nothing.'\nmain()"
    ours = "from sidestep_plugin.cli import main; main()"
    times: dict[str, list[float]] = {bare: [], ours: []}
    for _ in range(15):
        for code, taken in times.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True)
            taken.append(time.perf_counter() - began)
    return statistics.median(times[ours]) / statistics.median(times[bare])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--acestep-root", type=Path, help="a checkout that carries Side-Step's corrected trainer")
    arguments = parser.parse_args()
    ways: list[tuple[str, str, Callable[[Any, bool], Any]]] = [
        ("turbo", "this plugin", attached),
        ("base", "this plugin", attached),
    ]
    if arguments.acestep_root:
        sys.path.insert(0, str(arguments.acestep_root))
        ways.append(("base", "Side-Step's functions", side_step))
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {device}, {dtype}, median of {ROUNDS} alternating rounds of {STEPS} steps")
    print("| variant | with | batch | tokens | bare step | added | ATen calls | new tensors | random numbers |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for variant, name, added in ways:
        for batch_size, tokens in ((1, 16), (1, TOKENS), (4, TOKENS)):
            cost = added_cost(added, variant, batch_size, tokens, device, dtype)
            print(
                f"| {variant} | {name} | {batch_size} | {tokens} | {cost['without_us']:.0f} us | "
                f"{cost['added_us']:+.0f} us | {cost['calls']:+.0f} | {cost['kilobytes']:.1f} KiB | "
                f"{cost['random_numbers']:+.0f} |",
                flush=True,
            )
    print(f"acestep-train --help takes {help_ratio():.2f} times a bare click program")


if __name__ == "__main__":
    main()
