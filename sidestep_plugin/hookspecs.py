"""The hooks: every point at which a plugin can take part in a training. These docstrings are the reference.

A plugin is a module or object with functions marked by :data:`hookimpl`, found under the entry-point group
``acestep.plugins`` and loaded only when it is named. Plugins are asked in the order in which they were named; a
plugin's own implementations of one hook are asked in pluggy's order (last defined first). An implementation may leave
out arguments that it does not need.

An exception raised in any hook stops the run, and the message names the plugin and the hook. Raise
:class:`sidestep_plugin.Refusal` for what the user can mend: its text is shown as it is.

Plugins return values; they never call upstream. Nothing they return is moved, cast or clipped for them: what does not
fit is an error that says what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    import click
    import torch

    from .run import MemoryPlan, ModelFacts, ResumePoint, Run, SavedAdapter, Step

PROJECT: Final = "acestep"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

SILENT: Final = frozenset({"acestep_model_chosen", "acestep_step_finished"})
"""Hooks whose implementations return nothing: a value would be somebody's misunderstanding."""

EXCLUSIVE: Final = frozenset({"acestep_sample_timesteps", "acestep_resume"})
"""Hooks that only one of the loaded plugins may implement: two answers could not both be right."""


@hookspec
def acestep_options() -> Sequence[click.Option]:  # type: ignore[empty-body]
    """Return the command-line options that the plugin adds to ``acestep-train train``, ``demo`` and ``run``.

    When: after loading. From Python the same options are the keys of ``attach(options={...})``, in a patched checkout
    environment variables such as ``SIDESTEP_CFG_RATIO``, checked by the same types. A default of None should mean
    "decide for me".

    Returns:
        click options whose values arrive in ``run.options`` under the options' names.
    """


@hookspec
def acestep_model_chosen(facts: ModelFacts, options: Mapping[str, Any]) -> None:
    """Refuse a model before it is loaded, when that can be told from its config and the options.

    When: on the command line only, before the model's weights are read; inside the app it is never called, so
    :func:`acestep_run_started` has to refuse the same things.

    Args:
        facts: folder name and config.json.
        options: the plugins' options.

    Raises:
        Refusal: to stop; nothing has been written yet.
    """


@hookspec
def acestep_run_started(run: Run) -> Sequence[str] | None:
    """Decide what this run needs, refuse it if it cannot be had, and say in plain lines what was decided.

    When: once a run, after the model was loaded and before upstream changes anything: before the adapter is injected
    when upstream's trainer starts, before the first step when a training module is used on its own.

    Args:
        run: the run; ``run.state`` keeps what was decided for the other hooks.

    Returns:
        Lines for the user, each a full statement, or None to say nothing.

    Raises:
        Refusal: to stop the run.
    """


@hookspec(firstresult=True)
def acestep_resume(run: Run, folder: Path) -> ResumePoint | None:
    """Read the checkpoint that a run is to go on from, or refuse it.

    When: after :func:`acestep_run_started`, when upstream's trainer was told ``resume_from``, before the adapter is
    injected. What is returned is put in place by the host: weights, optimizer, learning rate and random states. Tensors
    whose names or shapes are not the adapter's stop the run before its first step.

    With a plugin that implements this hook, a training that is stopped or fails is saved as the folder ``interrupted``
    of its output folder, and :func:`acestep_adapter_saved` is told of every checkpoint what resuming it would need.

    Args:
        run: the run, with upstream's configurations.
        folder: the checkpoint's folder, as it was said.

    Returns:
        Where to go on, or None to leave the resuming to upstream.

    Raises:
        Refusal: the folder holds no complete checkpoint, or one of another training.
    """


@hookspec
def acestep_plan_memory(
    run: Run, decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None
) -> MemoryPlan | None:
    """Return what this training need not keep in memory or compute, if the adapter stays the same bit for bit.

    When: once per training with Lightning, after the adapter was injected, before upstream casts the decoder and
    moves it to the device. Never without Lightning.

    Args:
        run: the run.
        decoder: the decoder with the adapter in it. Read only.
        network: the LyCORIS network of a LoKr, None for a LoRA. Read only.
        autocast: the type that autocast computes in, None without autocast.

    Returns:
        A MemoryPlan, or None to leave everything to upstream.

    Raises:
        Refusal: to stop the run before its first step.
    """


@hookspec
def acestep_prepare_batch(step: Step, batch: Mapping[str, Any]) -> Mapping[str, torch.Tensor] | None:
    """Return the entries of the batch to replace for this step.

    When: before upstream's ``training_step``, in training and in validation (``step.training`` tells), before any
    random number of the step is drawn.

    Args:
        step: the step; ``step.device`` and ``step.dtype`` are where and in what upstream will compute.
        batch: ``target_latents [B,T,64]``, ``attention_mask [B,T]``, ``encoder_hidden_states [B,L,D]``,
            ``encoder_attention_mask [B,L]``, ``context_latents [B,T,128]``, ``metadata`` (list). Tensors may still be
            on the CPU and in another dtype. Read only: never write into the tensors, they belong to the caller.

    Returns:
        Only the replaced entries, existing names with tensors of unchanged shape; the next plugin sees them replaced.
        None to leave the batch as it is.

    Random numbers: what a plugin draws here comes before upstream's noise and timesteps. Draw none when switched off.
    """


@hookspec(firstresult=True)
def acestep_sample_timesteps(
    step: Step, batch_size: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return the timesteps of this step, in place of upstream's own sampler.

    When: in every step, in training and in validation, when upstream calls its sampler (after drawing the noise).
    Only one of the loaded plugins may implement this hook.

    Args:
        step: the step that is running.
        batch_size: B, at least 1.
        device, dtype: what upstream expects of the result.

    Returns:
        t, shape [B], on `device`, in `dtype`, values in [0, 1] with 1 for pure noise (the values are checked in the
        first step of a run, everything else in every step). None lets upstream's own function answer.

    Random numbers: from torch's default generator of `device`, so that the run's seed decides them.
    """


@hookspec
def acestep_step_finished(step: Step) -> None:
    """Look at a step that has just been computed, before its gradients are.

    When: after upstream's ``training_step`` returned, in training and in validation.

    Args:
        step: with ``t`` and ``loss``. Reading their values on a GPU waits for it; most versions of upstream have put
            the newest training loss into ``step.module.training_losses`` as a float.
    """


@hookspec
def acestep_epoch_finished(run: Run, epoch: int, loss: float) -> Mapping[str, float | torch.Tensor] | None:
    """Return numbers and histograms of an epoch for upstream's log, which TensorBoard shows.

    When: after the last training step of an epoch, before its validation and its checkpoint. Here, once an epoch,
    values may be fetched from a GPU. Not for epochs that a resumed run walks over.

    Args:
        run: the run.
        epoch: number of the epoch, from 1.
        loss: mean loss of its training steps.

    Returns:
        By name, such as ``train/loss at t 0.0-0.2``, a number, or a tensor of values whose histogram is logged. None
        for nothing to log.
    """


@hookspec
def acestep_run_ended(run: Run, ending: str, folder: Path) -> Sequence[str] | None:
    """Sum up a run.

    When: once, when upstream's trainer has saved the finished adapter, was stopped, or has failed; only when at least
    one training step was computed.

    Args:
        run: the run.
        ending: ``finished``, ``stopped`` or ``failed``.
        folder: the output folder.

    Returns:
        Lines to announce; None for nothing to say.
    """


@hookspec
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> Sequence[str] | None:
    """Add to an adapter that upstream has just written: a checkpoint, the best one, the final one.

    When: after each of upstream's save functions returned, once per adapter, and before the adapter's folder is moved
    to its place: what a plugin writes beside the weights appears together with them.

    Args:
        run: the run that it comes from.
        saved: its weights file, where that will be, and the epoch and step when upstream said them.

    Returns:
        Lines to announce, such as what could not be written; None for nothing to say.
    """
