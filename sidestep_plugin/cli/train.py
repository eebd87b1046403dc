"""``acestep-train train``: one training, from the checks to the finished adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from sidestep_plugin.options import Place

from . import terminal
from .commands import PluginCommand
from .queueing import files_in, queue_option, run_queue
from .training_options import (
    ACESTEP_ROOT,
    CHECKPOINT_DIR,
    DEFAULTS,
    FOLDER,
    GROUPS,
    adapter_and_training_options,
    check_device,
    settings_from,
    usual_defaults,
)


class _TrainCommand(PluginCommand):
    """A training, or a queue of them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        files, words = files_in(args)
        ctx.meta["words"] = words
        return super().parse_args(ctx, [*words, *(f"--queue={file}" for file in files)])


@click.command(cls=_TrainCommand, groups=GROUPS)
@click.option("--model", metavar="NAME|DIR", help="Model to train for: base, sft, turbo, xl-base, ..., or its folder.")
@click.option("--dataset-dir", type=FOLDER, metavar="DIR", help="Folder of preprocessed songs (.pt files).")
@click.option("--output-dir", type=FOLDER, metavar="DIR", help="Folder for checkpoints and the finished adapter.")
@click.option("--yes", is_flag=True, help="Never ask questions: a missing option is an error.")
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option(
    "--device",
    callback=check_device,
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Where to train: auto, cpu, cuda, cuda:N, mps or xpu.",
)
@click.option(
    "--resume-from", type=FOLDER, metavar="DIR|latest", help="Checkpoint to resume from; latest: the newest one."
)
@click.option("--overwrite", is_flag=True, help="Replace the adapters of an earlier training in --output-dir.")
@click.option("--allow-duplicates", is_flag=True, help="Train on songs that are in the dataset more than once.")
@click.option("--config", type=Place(), metavar="FILE.toml", help="Read options from a file. The command line wins.")
@click.option(
    "--settings",
    type=click.Choice(DEFAULTS),
    metavar="FROM",
    help="Settings that are left out: recommended, or upstream, which are ACE-Step's own.",
)
@queue_option
@adapter_and_training_options()
def train(
    model: str | None,
    dataset_dir: Path | None,
    output_dir: Path | None,
    yes: bool,
    acestep_root: Path | None,
    checkpoint_dir: Path | None,
    device: str,
    resume_from: Path | None,
    overwrite: bool,
    allow_duplicates: bool,
    adapter_type: str,
    plugins: tuple[str, ...],
    wins: str | None,
    options: dict[str, Any],
    settings: str | None,
    queue: tuple[str, ...],
    **given: Any,
) -> None:
    """Train a LoRA or LoKr with ACE-Step's own trainer.

    \b
    Example:
        acestep-train --model base --dataset-dir tensors/jazz --output-dir adapters/jazz

    On a terminal, it asks for --model, --dataset-dir and --output-dir if they are missing.

    The plugin sidestep trains each model the way it was trained. Settings that are left out are those that are
    recommended for the number of songs. --plugin none trains exactly as ACE-Step does.

    Before the first step it prints how the model is trained, and why. Ctrl-C stops the training after the current
    step, saves it, and prints the command that resumes it as if it had never stopped.

    Every adapter has a training_options.toml beside it. --config reads such a file, to repeat a training.
    """
    from sidestep_plugin.launch.launch import Request

    from .training import run_training

    context = click.get_current_context()
    if queue:
        context.exit(run_queue(queue, context.meta["words"]))
    needed = {"model": model, "dataset_dir": dataset_dir, "output_dir": output_dir}
    missing = [param for param in context.command.params if param.name in needed and needed[param.name] is None]
    asks = bool(missing) and not yes and terminal.on_a_terminal()
    if missing and not asks:
        raise click.MissingParameter(ctx=context, param=missing[0])
    request = Request(
        model=model or "",
        dataset_dir=dataset_dir or Path(),
        output_dir=output_dir or Path(),
        adapter_type=adapter_type,
        acestep_root=acestep_root,
        checkpoint_dir=checkpoint_dir,
        settings=settings_from(given),
        defaults=settings or usual_defaults(plugins),
        plugins=plugins,
        wins=wins,
        options=options,
        device=device,
        resume_from=resume_from,
        overwrite=overwrite,
        allow_duplicates=allow_duplicates,
    )
    if asks:
        from .guided import ask

        said = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
        if context.get_parameter_source("plugin") is not ParameterSource.DEFAULT:
            said.add("plugin")
        request = ask(request, {*context.params, *given, "variant", "plugin"} - said)
    run_training(request)
