"""One cell of the design: an adapter trained by upstream's own trainer with the plugin attached.

What is compared is paired: cells with one seed start from the same adapter, see the same songs in the same order and
the same noise, and drop the conditions of the same rows if they drop any. Only what the arm changes differs.
"""

from __future__ import annotations

import copy
import inspect
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestep_plugin import attach, hookimpl
from sidestep_plugin.engine.models import Handler
from sidestep_plugin.timesteps.schedule import logit_normal

from . import data
from .base_model import MU, SIGMA
from .presets import EXACT, MEANS, Arm, Preset

SCALE = 2.0
"""alpha / rank: ACE-Step's own default, 128 / 64."""


@dataclass(frozen=True)
class Cell:
    """What one training is: a domain, a number of songs, a seed, an arm. arm None: the base model without adapter."""

    domain: str
    songs: int
    seed: int
    arm: Arm | None

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.songs}-seed{self.seed}-{self.arm.name if self.arm else 'untrained'}"


def cells(preset: Preset) -> list[Cell]:
    """All cells: first all of the fewest songs, seed by seed, so that an unfinished experiment has whole pairs."""
    return [
        Cell(domain, songs, seed, arm)
        for songs in preset.songs
        for seed in preset.seeds
        for domain in preset.domains
        for arm in (None, *preset.arms)
    ]


def training_songs(preset: Preset, domain: data.Domain, cell: Cell) -> data.Songs:
    """The few songs are the first of the many."""
    all_songs = data.draw(domain, max(preset.songs), preset.frames, 2000 + cell.seed)
    return data.Songs(all_songs.latents[: cell.songs], all_songs.conditions[: cell.songs])


class SameNoise:
    """A plugin that gives every arm the same dropped rows, order and noise, from the number of the step.

    Without it, one arm's extra random draws would shift everything that comes after them. It is called after the
    plugin `sidestep`, so when it prepares the batch, the rows have been dropped and the noise has not been drawn.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._step = seed, 0

    @hookimpl
    def acestep_prepare_batch(self) -> None:
        torch.manual_seed(1_000_000 * self._seed + 2 * self._step)

    @hookimpl
    def acestep_step_finished(self) -> None:
        torch.manual_seed(1_000_000 * self._seed + 2 * self._step + 1)
        self._step += 1


class HighT:
    """A plugin that draws a share of the timesteps uniformly from 0.9 to 1, and the rest from the model's law."""

    def __init__(self, share: float) -> None:
        self._share = share

    @hookimpl
    def acestep_sample_timesteps(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        draws = [logit_normal(torch.randn(batch_size, device=device, dtype=dtype), MU, SIGMA) for _ in range(2)]
        high = 0.9 + 0.1 * torch.rand(batch_size, device=device, dtype=dtype)
        return torch.where(torch.rand(batch_size, device=device) < self._share, high, torch.maximum(*draws))


class Means:
    """Means of an adapter's matrices over its optimizer steps, in float64.

    Args:
        names: which of ``MEANS``.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names, self._steps = names, 0
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._products: dict[str, Tensor] = {}

    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Add the weights after another step."""
        self._steps += 1
        for name in self._names:
            share = _share(self._steps, MEANS[name])
            nothing = {key: torch.zeros_like(value).double() for key, value in weights.items()}
            mean = self._sums.setdefault(name, nothing)
            for key, value in weights.items():
                mean[key].lerp_(value.double(), share)
        if EXACT in self._names:
            share = _share(self._steps, MEANS[EXACT])
            for layer, product in _products(weights).items():
                self._products.setdefault(layer, torch.zeros_like(product)).lerp_(product, share)

    def now(self) -> dict[str, dict[str, Tensor]]:
        """The means by name, each as :func:`adapter_weights` has them; the exact one is called "third, exact"."""
        found = {name: {key: value.float() for key, value in mean.items()} for name, mean in self._sums.items()}
        if self._products:
            ranks = {key: len(value) for key, value in self._sums[EXACT].items() if key.endswith("A")}
            found[f"{EXACT}, exact"] = exact = {}
            for layer, product in self._products.items():
                left, values, right = torch.linalg.svd(product, full_matrices=False)
                rank, root = ranks[f"{layer}.lora_A"], values.sqrt()
                exact[f"{layer}.lora_B"] = (left * root)[:, :rank].float()
                exact[f"{layer}.lora_A"] = (root[:, None] * right)[:rank].float()
        return found


def _share(steps: int, power: int) -> float:
    """The share of the newest of so many steps, where step k counts as k to a power."""
    return float(steps**power / sum(k**power for k in range(1, steps + 1)))


def _products(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removesuffix(".lora_A"): weights[f"{name[:-1]}B"].double() @ value.double()
        for name, value in weights.items()
        if name.endswith(".lora_A")
    }


def train(
    preset: Preset,
    trainer: Any,
    model: Any,
    cell: Cell,
    songs: data.Songs,
    work: Path,
    watchers: Mapping[str, object] | None = None,
    means: Means | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train one adapter | yields (steps, its weights) at each of the preset's lengths, shortest first.

    Args:
        trainer: the module ``acestep.training.trainer``.
        model: the base model; it is not changed.
        work: a folder for songs and what upstream writes; it is removed.
        watchers: more plugins, by name, which must only look.
        means: takes the weights after every step.

    Raises:
        RuntimeError: the training ended before the last length; the message holds upstream's own.
    """
    assert cell.arm is not None
    shutil.rmtree(work, ignore_errors=True)
    told = data.as_preprocessed(songs.conditions) if cell.arm.padded else songs.conditions
    data.write_songs(work / "songs", data.Songs(songs.latents, told))
    seed = 100 * cell.seed + cell.arm.stream
    per_epoch = math.ceil(len(songs) / preset.batch)
    settings = {
        "batch_size": preset.batch,
        "gradient_accumulation_steps": 1,
        "max_epochs": math.ceil(max(preset.lengths) / per_epoch),
        "save_every_n_epochs": 10**6,
        "learning_rate": preset.rate * cell.arm.lr_factor,
        "warmup_steps": max(preset.lengths) // 20,
        "num_workers": 0,
        "pin_memory": False,
        "persistent_workers": False,
        "seed": 100 * cell.seed,
        "log_every_n_steps": math.gcd(*preset.lengths) if means is None else 1,
        "output_dir": str(work / "output"),
    }
    adapter = trainer.LoRAConfig(r=preset.rank, alpha=int(SCALE * preset.rank), dropout=0.0)
    handler = Handler(copy.deepcopy(model), preset.device, torch.float32)
    options = {"timestep_mode": cell.arm.timestep_mode, "cfg_ratio": cell.arm.cfg_ratio}
    plugins: dict[str, object] = {"same-noise": SameNoise(seed), **(watchers or {})}
    if cell.arm.high_share:
        plugins["high-t"] = HighT(cell.arm.high_share)
    said: list[str] = []
    reached: set[int] = set()
    newest = 0
    with attach(
        trainer,
        options=options,
        extra_plugins=plugins,
        wins="high-t" if cell.arm.high_share else None,
        allowed_folders=(work,),
        announce=said.append,
    ):
        made = trainer.LoRATrainer(handler, adapter, _known(trainer.TrainingConfig, settings))
        for step, _, message in made.train_from_preprocessed(str(work / "songs"), {"should_stop": False}):
            said.append(message)
            if means is not None and step > newest:
                newest = step
                means.add(adapter_weights(handler.model.decoder))
            if step in preset.lengths and step not in reached:
                reached.add(step)
                yield step, adapter_weights(handler.model.decoder)
    shutil.rmtree(work, ignore_errors=True)
    if reached != set(preset.lengths):
        raise RuntimeError(f"{cell.name} reached only {sorted(reached)} steps: {said[-3:]}")


def adapter_weights(decoder: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of a LoRA's matrices, as ``layers.0.self_attn.q_proj.lora_A``."""
    found = {}
    for name, value in decoder.named_parameters():
        if ".lora_" in name:
            layer, _, matrix = name.partition(".lora_")
            start = layer.index("layers.")
            found[f"{layer[start:]}.lora_{matrix[0]}"] = value.detach().clone()
    return found


def _known(config_class: Any, values: dict[str, Any]) -> Any:
    """Versions of upstream have different settings: those that this one knows."""
    known = inspect.signature(config_class).parameters
    return config_class(**{name: value for name, value in values.items() if name in known})
