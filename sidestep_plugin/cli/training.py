"""One training as the terminal sees it: what is loaded, progress, how it ended, and what to type next."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidestep_plugin.ranks import ranks
from sidestep_plugin.text import counted

from . import quiet
from .command_line import resuming_line
from .commands import FAILED, INTERRUPTED
from .interrupts import Stop, interruptible
from .next_commands import next_commands
from .resumed import options_resumed_with, resumed_with, settings_to_resume
from .terminal import say
from .torch_here import require_torch
from .workers import one_voice, start_workers, tell_failure

if TYPE_CHECKING:
    from sidestep_plugin.launch.launch import Launch, Request

    from .progress import Progress


_COMPLETE = "✅ Training complete"
"""How the message begins that ends a finished training: upstream's, and that of one which patience has ended."""


def run_training(request: Request) -> None:
    """Do one training with everything that the terminal sees of it. Raises Refusal; exits on failure."""
    if not ranks().several:
        start_workers(request)  # does not return if there are to be several
        _train(request)
        return
    with one_voice():
        _train(request)


def _train(request: Request) -> None:
    if not click.get_current_context().meta["debug"]:
        quiet.quiet_third_parties()
        quiet.quiet_upstream()
    say_that_torch_is_imported()
    from sidestep_plugin.launch.launch import prepare

    from .options_file import OptionsFile
    from .progress import Progress

    progress = Progress()
    extra: dict[str, object] = {"progress": progress}
    if request.plugins:  # without one, a training leaves the files that ACE-Step leaves, and no others
        extra["options_file"] = OptionsFile(request)
    launch = prepare(request, say=progress.say, extra_plugins=lambda: extra, kept=settings_to_resume)
    if launch.request.resume_from is not None:
        progress.say(resumed_with(request.plugins, launch.request.resume_from))
        declared, kept, took = click.get_current_context().meta["resumed_options"]
        for line in options_resumed_with(declared, kept, took, request.options):
            progress.say(line)
    with interruptible(launch, progress) as stop:
        failure = _run(launch, progress, stop)
        if not ranks().several:
            _say_how_it_ended(launch, progress, failure)
            return
    if failure is not None:
        tell_failure(failure, asked_to_end=stop.asked)
        sys.exit(FAILED)
    if ranks().first:  # it has saved the adapter, or says why not
        _say_how_it_ended(launch, progress, None)


def _run(launch: Launch, progress: Progress, stop: Stop) -> str | None:
    """Train | returns why it failed, None if it was finished | raises Refusal; exits when it was interrupted."""
    failure: str | None = None
    told_otherwise: tuple[str, ...] = ("Epoch", "✅ Epoch", "⏹")  # by the progress display
    if click.get_current_context().info_name == "demo":  # nobody has typed --overwrite there
        told_otherwise += ("Note: --overwrite:", "Note: removed")
    with launch.lock, launch.attachment:
        for line in notes_on_settings(launch):
            progress.say(line)
        progress.begin(launch.steps_per_epoch, launch.epochs, launch.total_steps)
        try:
            for _, _, message in launch.messages():
                stop.complete = stop.complete or message.startswith(_COMPLETE)
                if message.startswith("❌"):
                    failure = f"ACE-Step: {message.removeprefix('❌').strip()}"
                elif not message.startswith(told_otherwise):
                    progress.say(message)
        finally:
            progress.end()
        refusal = launch.attachment.refusal
        if refusal is not None and not progress.began:
            raise refusal
        if refusal is not None:
            failure = str(refusal)
        stopped = stop.asked or bool(launch.state.get("interrupted"))  # by a signal, or by --time-limit
        if failure is None and stopped and not stop.complete and progress.step < launch.total_steps:
            _say_what_was_saved(launch, progress)
            sys.exit(INTERRUPTED)
    return failure


def _say_how_it_ended(launch: Launch, progress: Progress, failure: str | None) -> None:
    """Say where the adapter is and what to do with it. Exits on failure."""
    adapter = launch.final_adapter
    if failure is None and not math.isfinite(progress.newest):
        failure = "The loss is NaN or infinite, so the adapter is useless. Lower --learning-rate."
    if failure is None and adapter is None:
        failure = f"ACE-Step ended without an error and without an adapter in {launch.request.output_dir / 'final'}."
    if failure is not None:
        say(f"Error: {failure}", err=True)
        if launch.attachment.interrupted is not None:
            say(f"To resume:\n  {resuming_line(launch.request)}", err=True)
        sys.exit(FAILED)
    assert adapter is not None
    say(f"Adapter: {adapter}")
    if launch.request.plugins:
        _say_how_to_use(adapter, launch.request)


def say_that_torch_is_imported() -> None:
    """Print what takes the next seconds, unless it is imported already, and import it. Raises Refusal."""
    if "torch" not in sys.modules:
        say("Importing torch ...")
    require_torch(told=True)


def notes_on_settings(launch: Launch) -> list[str]:
    """Lines about settings that are allowed and hardly meant."""
    config = launch.trainer.training_config
    warmup, each = getattr(config, "warmup_steps", 0), max(1, getattr(config, "gradient_accumulation_steps", 1))
    total = launch.epochs * math.ceil(launch.steps_per_epoch / each)
    if warmup <= (most := max(1, total // 10)):  # as every known version of ACE-Step computes it
        return []
    return [
        f"Note: ACE-Step lets warm-up take at most a tenth of the optimizer steps, here {most} of {total}. It shortens "
        f"--warmup-steps {warmup} to that."
    ]


def _say_what_was_saved(launch: Launch, progress: Progress) -> None:
    saved = launch.attachment.interrupted
    resumable = saved is not None
    if not resumable and progress.began and not launch.request.plugins:
        saved = launch.save_interrupted()
    say(f"Interrupted after {progress.step} of {counted(launch.total_steps, 'step')}.")
    say(f"Adapter so far: {saved}" if saved else "No step was finished, so nothing was saved.")
    if resumable:
        say(f"To resume:\n  {resuming_line(launch.request)}")


def _say_how_to_use(adapter: Path, request: Request) -> None:
    """The end of a finished training as a block: the best epoch, how to generate, the page, and what to type next."""
    from sidestep_plugin.adapters.comfyui import FILE_NAMES
    from sidestep_plugin.adapters.facts import read_training_config
    from sidestep_plugin.report.ending import best_line, page_in
    from sidestep_plugin.variants import guidance

    facts = read_training_config(adapter)
    output = Path(os.path.normpath(request.output_dir.absolute()))
    if (best := best_line(output, facts or {})) is not None:
        say(best)
    if (copy := adapter / FILE_NAMES[request.adapter_type]).is_file():
        say(f"For ComfyUI: {copy}")
    if facts is not None:
        say(
            f"Generate with {facts.get('model_name')}: shift {facts.get('shift')}, "
            f"{counted(facts.get('num_inference_steps'), 'step')}, CFG {guidance(facts.get('model_variant'))}."
        )
    if (page := page_in(output)) is not None:
        say(f"Page: {page}")
    say("Next:")
    for purpose, command in next_commands(request, "finished"):
        say(f"  {purpose}\n    {command}")
