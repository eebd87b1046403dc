"""The adapter's own tensors: reading them, comparing them with a checkpoint's, loading those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..adapters.kinds import BY_NAME
from ..errors import Refusal
from ..run import Run
from ..text import counted
from .decoders import plain_decoder

if TYPE_CHECKING:
    import torch


def live_weights(run: Run) -> dict[str, torch.Tensor]:
    """The adapter's current tensors, under the names that they are saved with. Raises Refusal."""
    module = run.module_ref() if run.module_ref else None
    if module is None:
        raise Refusal("The training module of this run was freed while the run went on. Start it again.")
    return BY_NAME[run.adapter_type].live(module, plain_decoder(module.model))


def check_finite(run: Run) -> None:
    """Raise Refusal when the adapter contains NaN or infinity: saving it would replace one that is usable."""
    for name, tensor in live_weights(run).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            rate = getattr(run.training_config, "learning_rate", None)
            raise Refusal(
                f"The adapter holds numbers that are not finite after {counted(run.steps, 'step')} ({name}). It "
                "was not saved, "
                f"and the training was stopped. Lower --learning-rate (now {rate}) and resume from an earlier "
                "checkpoint."
            )


def put_weights(run: Run, weights: Mapping[str, torch.Tensor]) -> None:
    """Load tensors of a file into the adapter, and check that they are there. Raises Refusal."""
    import torch

    live = check_weights(run, weights)
    module = run.module_ref() if run.module_ref else None
    assert module is not None
    BY_NAME[run.adapter_type].load(module, live, weights)
    for name, tensor in live_weights(run).items():
        if not torch.equal(tensor.cpu(), weights[name].to(tensor.dtype)):
            raise Refusal(
                f"After loading the checkpoint, the adapter's tensor {name} differs from it. "
                "Resume from another checkpoint, or start again without it."
            )


def check_weights(run: Run, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's tensors, if the checkpoint has the same names and shapes. Raises Refusal."""
    live = live_weights(run)
    missing = sorted(live.keys() - weights.keys())
    foreign = sorted(weights.keys() - live.keys())
    shapes = [name for name in live if name in weights and live[name].shape != weights[name].shape]
    if not live or missing or foreign or shapes:
        example = f"{shapes[0]} has shape {list(weights[shapes[0]].shape)} there" if shapes else ""
        example = example or f"{(missing or foreign or ['an adapter without tensors'])[0]} is only on one side"
        raise Refusal(
            f"The checkpoint does not fit this adapter: of {len(live)} tensors {len(missing)} are missing in it and "
            f"{len(shapes)} have another shape, {len(foreign)} more belong to no layer here ({example}). Nothing was "
            "trained. Resume with the model, the rank and the target modules that it was made with."
        )
    return live
