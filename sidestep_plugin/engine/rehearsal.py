"""Asks plugins what they would decide for a model, and which timesteps they would draw, without loading it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..adapters.kinds import DEFAULT
from ..registry import Registry
from ..run import AdapterType, ModelFacts, Run, Step

if TYPE_CHECKING:
    import torch


class _Unloaded:
    """Stands in for a model whose config.json has been read and whose weights have not."""

    def __init__(self, folder: Path, facts: ModelFacts) -> None:
        self.config = SimpleNamespace(**{**facts.config, "_name_or_path": str(folder)})
        self.null_condition_emb = True  # whether the weights have one is checked when they are loaded


@dataclass(frozen=True)
class Rehearsal:
    """What the plugins decided."""

    run: Run  # the run as plugins see it; its model is not loaded
    lines: tuple[str, ...]  # what they announced
    _registry: Registry
    _model: _Unloaded  # a run holds its model only weakly

    def timesteps(self, count: int) -> torch.Tensor | None:
        """Training timesteps as the plugins draw them, shape [count], fp32 on the CPU; None if ACE-Step draws them.

        Random numbers: drawn by the plugin from torch's default generator.
        """
        import torch

        step = Step(self.run, module=None, training=True, device=torch.device("cpu"), dtype=torch.float32)
        asked = {"step": step, "batch_size": count, "device": step.device, "dtype": step.dtype}
        answers = self._registry.call("acestep_sample_timesteps", **asked)
        return answers[0][1] if answers else None


def rehearse(
    registry: Registry, folder: Path, options: dict[str, Any], adapter_type: AdapterType = DEFAULT.name
) -> Rehearsal:
    """Let plugins decide on a model folder. Raises Refusal where they would refuse a training."""
    facts = ModelFacts.from_folder(folder)
    registry.call("acestep_model_chosen", facts=facts, options=options)
    model = _Unloaded(folder, facts)
    run = Run(
        adapter_type=adapter_type,
        adapter_config=None,
        training_config=None,
        options=options,
        tensor_dir=None,
        model_ref=weakref.ref(model),
        sampled_by=registry.asked("acestep_sample_timesteps"),
    )
    lines = [line for _, told in registry.call("acestep_run_started", run=run) for line in told]
    return Rehearsal(run, tuple(lines), registry, model)
