"""``acestep-train train``: one training, from the checks to the finished adapter."""

from __future__ import annotations

import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import FiniteFloat

from .commands import FAILED, INTERRUPTED, Place, PluginCommand

if TYPE_CHECKING:
    from sidestep_plugin.trainer.launch import Launch, Request

    from .progress import Progress


FOLDER = Place(path_type=Path)

PLUGIN = click.option(
    "--plugin",
    multiple=True,
    metavar="NAME",
    help="Plugin to train with, may be given several times. Without one: exactly as ACE-Step trains.",
)
WINS = click.option(
    "--wins",
    metavar="NAME",
    help="Of two plugins that both want to sample the timesteps, the one that does.",
)


def check_device(_: click.Context, __: click.Parameter, value: str) -> str:
    """auto, cpu, cuda, cuda:N, mps or xpu. Raises click.BadParameter."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu", value) is None:
        raise click.BadParameter(f"{value!r} is not a device. Expected auto, cpu, cuda, cuda:0, mps or xpu.")
    return value


def adapter_and_training_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a training that have nothing to do with where things are: shared by train and demo."""
    positive = click.IntRange(min=1)
    for option in reversed(
        [
            PLUGIN,
            WINS,
            click.option(
                "--adapter-type",
                type=click.Choice(["lora", "lokr"]),
                default="lora",
                show_default=True,
                help="Kind of adapter.",
            ),
            click.option("--rank", type=positive, help="Rank of the adapter. [ACE-Step's default: LoRA 8, LoKr 64]"),
            click.option(
                "--alpha",
                type=positive,
                help="Strength is alpha divided by rank. [ACE-Step's default: LoRA 16, LoKr 128]",
            ),
            click.option(
                "--dropout", type=FiniteFloat(0.0, 1.0, max_open=True), help="LoRA dropout. [ACE-Step's default: 0.1]"
            ),
            click.option(
                "--target-modules",
                metavar="NAMES",
                help="Layers to adapt, separated by commas. [ACE-Step's default: q_proj,k_proj,v_proj,o_proj]",
            ),
            click.option("--epochs", type=positive, help="Times that every song is seen. [ACE-Step's default: 100]"),
            click.option("--batch-size", type=positive, help="Songs a step. [ACE-Step's default: 1]"),
            click.option(
                "--gradient-accumulation", type=positive, help="Steps an optimizer step. [ACE-Step's default: 4]"
            ),
            click.option(
                "--learning-rate",
                type=FiniteFloat(0.0, min_open=True),
                help="Size of the steps. [ACE-Step's default: 0.0001]",
            ),
            click.option(
                "--warmup-steps",
                type=click.IntRange(min=0),
                help="Optimizer steps until the full rate. [ACE-Step's default: 100]",
            ),
            click.option(
                "--weight-decay", type=FiniteFloat(0.0), help="Pull of the weights to zero. [ACE-Step's default: 0.01]"
            ),
            click.option(
                "--max-grad-norm",
                type=FiniteFloat(0.0, min_open=True),
                help="Longest gradient. [ACE-Step's default: 1.0]",
            ),
            click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Random seed. [ACE-Step's default: 42]"),
            click.option("--save-every", type=positive, help="Epochs between checkpoints. [ACE-Step's default: 10]"),
            click.option(
                "--val-split",
                type=FiniteFloat(0.0, 1.0, max_open=True),
                help="Part of the songs to validate on. [ACE-Step's default: 0]",
            ),
            click.option("--num-workers", type=click.IntRange(min=0), help="Processes that load songs. [default: 0]"),
            click.option(
                "--log-every", type=positive, help="Optimizer steps between log entries. [ACE-Step's default: 10]"
            ),
            click.option("--debug", is_flag=True, help="Show ACE-Step's own log, and where an error came from."),
        ]
    ):
        function = option(function)
    return function


def settings_from(arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given. Raises Refusal for an empty list of target modules."""
    settings = {name: value for name, value in arguments.items() if value is not None}
    if "target_modules" in settings:
        settings["target_modules"] = [name.strip() for name in settings["target_modules"].split(",") if name.strip()]
        if not settings["target_modules"]:
            raise Refusal("--target-modules is empty. Expected names such as q_proj,k_proj,v_proj,o_proj.")
    return settings


@click.command(cls=PluginCommand)
@click.option(
    "--model",
    metavar="NAME|DIR",
    help="Model to train for: base, sft, turbo, xl-base, ..., a folder's name under the checkpoint folder, or a path.",
)
@click.option("--dataset-dir", type=FOLDER, help="Folder of preprocessed songs (.pt files).")
@click.option("--output-dir", type=FOLDER, help="Folder for checkpoints and the finished adapter.")
@click.option("--yes", is_flag=True, help="Never ask: what is missing is an error.")
@click.option(
    "--acestep-root",
    type=FOLDER,
    help="Your ACE-Step 1.5 checkout. [default: the importable acestep, else the current directory]",
)
@click.option(
    "--checkpoint-dir",
    type=FOLDER,
    help="Folder of models. [default: $ACESTEP_CHECKPOINTS_DIR, else checkpoints in the checkout]",
)
@click.option(
    "--device",
    callback=check_device,
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N|mps|xpu",
    help="Where to train.",
)
@click.option(
    "--resume-from",
    type=FOLDER,
    metavar="DIR|latest",
    help="Checkpoint to go on from: its folder, or latest for the newest one below --output-dir.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Let this training replace the adapters of an earlier one in --output-dir.",
)
@click.option("--allow-duplicates", is_flag=True, help="Train on songs that are in the dataset more than once.")
@adapter_and_training_options
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
    **settings: Any,
) -> None:
    """Train a LoRA or LoKr with ACE-Step's own trainer.

    \b
    Example:
        acestep-train --plugin sidestep --model base --dataset-dir tensors/jazz --output-dir adapters/jazz

    Before the first step it prints what was decided for the model and from what evidence. Ctrl-C ends the training
    after the step that is running and saves the adapter as it is; the same command with --resume-from latest goes on
    from there as if it had never stopped.

    On a terminal, what is missing of --model, --dataset-dir and --output-dir is asked for.
    """
    from sidestep_plugin.trainer.launch import Request

    context = click.get_current_context()
    needed = {"model": model, "dataset_dir": dataset_dir, "output_dir": output_dir}
    missing = [param for param in context.command.params if param.name in needed and needed[param.name] is None]
    asks = bool(missing) and not yes and on_a_terminal()
    if missing and not asks:
        raise click.MissingParameter(ctx=context, param=missing[0])
    request = Request(
        model=model or "",
        dataset_dir=dataset_dir or Path(),
        output_dir=output_dir or Path(),
        adapter_type="lokr" if adapter_type == "lokr" else "lora",
        acestep_root=acestep_root,
        checkpoint_dir=checkpoint_dir,
        settings=settings_from(settings),
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
        request = ask(request, {*context.params, *settings, "variant"} - said)
    run_training(request)


def on_a_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def run_training(request: Request) -> None:
    """Do one training with everything that the terminal sees of it. Raises Refusal; exits on failure."""
    from sidestep_plugin.trainer.launch import prepare

    from .progress import Progress, echo

    debug = click.get_current_context().meta["debug"]
    if not debug:
        quiet_third_parties()
        quiet_upstream()
    progress = Progress()
    with terminated_like_ctrl_c():
        launch = prepare(request, say=progress.say, extra_plugins=lambda: {"progress": progress})
    failure: str | None = None
    with launch.lock, launch.attachment, interruptible(launch, progress) as interrupted:
        progress.begin(launch.steps_per_epoch, launch.epochs)
        try:
            for _, _, message in launch.messages():
                if message.startswith("❌"):
                    failure = f"ACE-Step: {message.removeprefix('❌').strip()}"
                elif not message.startswith(("Epoch", "✅ Epoch", "⏹")):  # the progress display tells that
                    progress.say(message)
        finally:
            progress.end()
        refusal = launch.attachment.refusal
        if refusal is not None and not progress.began:
            raise refusal
        if refusal is not None:
            failure = str(refusal)
        if failure is None and interrupted() and progress.step < launch.total_steps:
            saved = launch.attachment.interrupted
            resumable = saved is not None
            if not resumable and progress.began and not request.plugins:
                saved = launch.save_interrupted()
            echo(f"Interrupted after {progress.step} of {launch.total_steps} steps.")
            echo(f"Adapter as it was then: {saved}" if saved else "No step was finished, nothing was saved.")
            if resumable:
                echo("Go on with the same command and --resume-from latest.")
            sys.exit(INTERRUPTED)
    adapter = launch.final_adapter
    if failure is None and not math.isfinite(progress.newest):
        failure = "The loss is not a finite number any more, the adapter is of no use. Lower --learning-rate."
    if failure is None and adapter is None:
        failure = f"ACE-Step ended without an error and without an adapter in {launch.request.output_dir / 'final'}."
    if failure is not None:
        echo(f"Error: {failure}", err=True)
        if launch.attachment.interrupted is not None:
            echo("Go on with the same command and --resume-from latest.", err=True)
        sys.exit(FAILED)
    assert adapter is not None
    echo(f"Adapter: {adapter}")
    if request.plugins:
        _say_how_to_use(adapter, request.adapter_type)


def _say_how_to_use(adapter: Path, adapter_type: str) -> None:
    from sidestep_plugin.adapters.comfyui import FILE_NAMES
    from sidestep_plugin.adapters.facts import read_training_config
    from sidestep_plugin.variants import guidance

    from .progress import echo

    if (copy := adapter / FILE_NAMES[adapter_type]).is_file():
        echo(f"For ComfyUI: {copy}")
    facts = read_training_config(adapter)
    if facts is not None:
        echo(
            f"Generate with {facts.get('model_name')}: shift {facts.get('shift')}, "
            f"{facts.get('num_inference_steps')} steps, CFG {guidance(facts.get('model_variant'))}."
        )


@contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the program like Ctrl-C, with a word and its exit code, before there is anything to save."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interruptible(launch: Launch, progress: Progress) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM end the training after the running step; a second one ends it at once."""
    stopped = False

    def stop(signum: int, _: Any) -> None:
        nonlocal stopped
        if stopped:
            for number in previous:
                signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        stopped = True
        launch.state["should_stop"] = True
        progress.say("Stopping after this step and saving. Once more to stop at once.")

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError):  # only the main thread may set handlers
            previous[number] = signal.signal(number, stop)
    try:
        yield lambda: stopped
    except KeyboardInterrupt:
        from .progress import echo

        echo("Stopped at once. Checkpoints saved before are complete.", err=True)
        sys.exit(INTERRUPTED)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def quiet_third_parties() -> None:
    """Keep Lightning's greetings, and what libraries tell each other's authors, off the screen."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|lightning|torch)\b")
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def quiet_upstream() -> None:
    """Show upstream's warnings as single lines. Its errors arrive as messages, and its news are the progress bar's."""
    try:
        from loguru import logger
    except ImportError:
        return
    logger.remove()
    # A function instead of a format string keeps loguru from adding tracebacks.
    logger.add(
        lambda line: click.echo(line, nl=False, err=True),
        level="WARNING",
        filter=lambda record: record["level"].name == "WARNING",
        format=lambda _: "ACE-Step: {message}\n",
    )
