"""The hooks: every point at which a plugin can take part in a training. These docstrings are the reference.

A plugin is a module or object with functions marked by :data:`hookimpl`. It is found under the entry-point group
``acestep.plugins`` and loaded only if the user names it; ``acestep-train`` names ``sidestep`` by itself, before the
others. Plugins are called in the order in which they were named.

A plugin of several files lists them: a module with ``PLUGINS = (("part", "package.module"), ...)`` brings each module
as a part of the plugin, and the parts are called in that order. Give a hook one implementation in each module: several
in one module (by ``specname``) are called in pluggy's order, which follows the functions' names backwards and not their
place in the file. An implementation may leave out arguments that it does not need.

An exception raised in a hook stops the run, with a message that names the plugin and the hook. Raise
:class:`sidestep_plugin.Refusal` for something that the user can fix: its text is shown without any addition.

Plugins return values; they never call upstream. The host does not move, cast or clip what they return: a value that
does not fit is an error that says what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    import click
    import torch

    from .run import EpochNews, ModelFacts, Run, SavedAdapter, Step

PROJECT: Final = "acestep"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

SILENT: Final = frozenset({"acestep_model_chosen", "acestep_step_finished"})
"""Hooks whose implementations return nothing: returning a value would be a misunderstanding."""

EXCLUSIVE: Final = frozenset({"acestep_sample_timesteps"})
"""Hooks that only one of the loaded plugins may implement, because two answers cannot both be used."""


@hookspec
def acestep_options() -> Sequence[click.Option]:  # type: ignore[empty-body]
    """Return the command-line options that the plugin adds to ``acestep-train train``, ``demo`` and ``run``.

    When: after the plugin is loaded. From Python, the same options are the keys of ``attach(options={...})``. In a
    patched checkout they are environment variables such as ``SIDESTEP_CFG_RATIO``. Their types are checked in all
    three cases. A default of None should mean "decide for me".

    Returns:
        click options. Their values arrive in ``run.options`` under the options' names.
    """


@hookspec
def acestep_model_chosen(facts: ModelFacts, options: Mapping[str, Any]) -> None:
    """Refuse a model, if its config and the options are reason enough.

    When: on the command line before the model's weights are read. In the app, where the model is loaded already, right
    before :func:`acestep_run_started`.

    Args:
        facts: the model's folder name and config.json.
        options: the values of all plugin options.

    Raises:
        Refusal: to stop. Nothing has been written yet.
    """


@hookspec
def acestep_run_started(run: Run) -> Sequence[str] | None:
    """Decide what this run needs, refuse it if that is impossible, and say in plain lines what was decided.

    When: once per run, after the model is loaded and before upstream changes anything. With upstream's trainer that is
    before the adapter is injected; if a training module is used on its own, it is before the first step.

    Args:
        run: the run. Keep what you decide in ``run.state`` for your other hooks.

    Returns:
        Lines for the user, each a complete statement. None to say nothing.

    Raises:
        Refusal: to stop the run.
    """


@hookspec
def acestep_prepare_batch(step: Step, batch: Mapping[str, Any]) -> Mapping[str, torch.Tensor] | None:
    """Return the entries of the batch to replace for this step.

    When: before upstream's ``training_step`` and before the step draws any random number, in training and in
    validation (see ``step.training``).

    Args:
        step: the step. Upstream will compute on ``step.device`` in ``step.dtype``.
        batch: ``target_latents [B,T,64]``, ``attention_mask [B,T]``, ``encoder_hidden_states [B,L,D]``,
            ``encoder_attention_mask [B,L]``, ``context_latents [B,T,128]``, ``metadata`` (list). Tensors may still be
            on the CPU and in another dtype. Never write into these tensors: they belong to the caller.

    Returns:
        Only the entries to replace, under their existing names and with tensors of the same shape. A song may be
        shortened: then ``target_latents``, ``attention_mask`` and ``context_latents`` are all returned with the same
        smaller T. The next plugin receives the batch with these entries replaced. None to leave the batch unchanged.

    Random numbers: what a plugin draws here comes before upstream's noise and timesteps. Draw none if your feature is
    switched off.
    """


@hookspec(firstresult=True)
def acestep_sample_timesteps(
    step: Step, batch_size: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return the timesteps of this step, in place of upstream's own sampler.

    When: in every step, in training and in validation, when upstream calls its sampler (after drawing the noise).

    Args:
        step: the running step.
        batch_size: B, at least 1.
        device, dtype: the device and dtype that the result must have.

    Returns:
        t, shape [B], on `device`, in `dtype`, with values in [0, 1], where 1 is pure noise. The values are checked in
        the first step of a run, everything else in every step. None to use upstream's own sampler.

    Random numbers: draw them from torch's default generator of `device`, so that they follow the run's seed.
    """


@hookspec
def acestep_step_finished(step: Step) -> None:
    """Look at a step whose loss has just been computed, before its gradients are.

    When: after upstream's ``training_step`` returned, in training and in validation.

    Args:
        step: the step, with ``t`` and ``loss``. Reading their values waits for the GPU. Most versions of upstream have
            already stored the newest training loss as a float in ``step.module.training_losses``.
    """


@hookspec
def acestep_epoch_finished(run: Run, epoch: int, loss: float) -> Mapping[str, float | torch.Tensor] | None:
    """Return numbers and histograms of an epoch for upstream's log, which TensorBoard shows.

    When: behind the last optimizer step of an epoch, before its validation and its checkpoint. Reading values from a
    GPU is fine here, once per epoch. Not called for epochs that a resumed run skips.

    Args:
        run: the run.
        epoch: number of the epoch, from 1.
        loss: mean loss of the epoch's training steps.

    Returns:
        A mapping from names such as ``train/loss at t 0.0-0.2`` to a number, or to a tensor of values whose histogram
        is logged. None to log nothing.
    """


@hookspec
def acestep_between_epochs(run: Run, epoch: int, loss: float | None, folder: Path) -> EpochNews | None:
    """Look at the adapter as an epoch left it, and tell what was found.

    When: with `epoch` 0 before the first training step of a run from the start, and right after
    :func:`acestep_epoch_finished` of every epoch that is computed, so the weights are those that a checkpoint saves.
    The first versions of upstream carry the rest of an epoch that gradient accumulation does not divide over to the
    next one, so its gradients are still waiting.

    Nothing may be changed: random states, the decoder's modes and gradients must be what they were. Computing here
    takes the training's time.

    Args:
        run: the run.
        epoch: number of finished epochs.
        loss: mean loss of the epoch's training steps, None before the first one.
        folder: the output folder.

    Returns:
        Lines for the user, and numbers and clips for upstream's log. None to say nothing.
    """


@hookspec
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> Sequence[str] | None:
    """Add to an adapter that upstream has just written: a checkpoint, the best one, or the finished one.

    When: once per adapter, after upstream's save function returned and before the adapter's folder is moved to its
    place. Files that a plugin writes beside the weights appear together with them.

    Args:
        run: the run that the adapter comes from.
        saved: where its weights are now, where they will be, and the epoch and step if upstream said them.

    Returns:
        Lines for the user, such as what could not be written. None to say nothing.
    """


@hookspec
def acestep_run_ended(run: Run, ending: str, folder: Path) -> Sequence[str] | None:
    """Sum up a run.

    When: once, after upstream's trainer has saved the finished adapter, was stopped, or has failed. Only if at least
    one training step was computed, by this run or, where a resumed run had none left, by those before it.

    Args:
        run: the run.
        ending: ``finished``, ``stopped`` or ``failed``.
        folder: the output folder.

    Returns:
        Lines for the user. None to say nothing.
    """
