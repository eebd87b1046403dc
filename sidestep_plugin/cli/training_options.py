"""The options of a training: what they are called, which values they take, and where they stand in the help."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from sidestep_plugin.adapters.kinds import DEFAULT, KINDS, NAMES
from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import FiniteFloat, Place, Strengths, WholeNumber
from sidestep_plugin.recommended import SETTINGS

from .commands import NONE, OURS

FOLDER: Final = Place(path_type=Path)

UPSTREAMS_DEFAULTS: Final = {
    "rank": "LoRA 8, LoKr 64",
    "alpha": "LoRA 16, LoKr 128",
    "dropout": "0.1",
    "target_modules": "q_proj,k_proj,v_proj,o_proj",
    "epochs": "100",
    "batch_size": "1",
    "gradient_accumulation": "4",
    "learning_rate": "0.0001",
    "warmup_steps": "100",
    "weight_decay": "0.01",
    "max_grad_norm": "1.0",
    "seed": "42",
    "save_every": "10",
    "val_split": "0",
    "log_every": "10",
}
"""What ACE-Step takes for an option that is left out."""

DEFAULTS: Final = ("recommended", "upstream")
"""Whose settings can be taken for those that are left out."""

GROUPS: Final = {
    "Needed": ("model", "dataset_dir", "output_dir"),
    "Usual": (
        "adapter_type",
        "epochs",
        "rank",
        "alpha",
        "learning_rate",
        "batch_size",
        "gradient_accumulation",
        "save_every",
        "resume_from",
        "overwrite",
        "config",
        "settings",
        "queue",
        "acestep_root",
        "checkpoint_dir",
        "directory",
        "plugin",
    ),
    "Expert": (
        "device",
        "seed",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "dropout",
        "target_modules",
        *(name for kind in KINDS for name in kind.options),
        "val_split",
        "num_workers",
        "log_every",
        "allow_duplicates",
        "wins",
        "yes",
        "debug",
    ),
}
"""The options of train and demo as their help shows them."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

ACESTEP_ROOT: Final[Decorator] = click.option(
    "--acestep-root",
    type=FOLDER,
    metavar="DIR",
    help="Your ACE-Step checkout.  [default: the installed one, else this folder]",
)
CHECKPOINT_DIR: Final[Decorator] = click.option(
    "--checkpoint-dir",
    type=FOLDER,
    metavar="DIR",
    help="Folder of models.  [default: $ACESTEP_CHECKPOINTS_DIR, else checkpoints/]",
)
STRENGTHS: Final[Decorator] = click.option(
    "--strengths",
    type=Strengths(),
    default="1",
    metavar="S,S,...",
    help="Strengths of the adapter, such as 0.6,0.8,1,1.2.  [default: 1, as trained]",
)
WINS: Final[Decorator] = click.option(
    "--wins", metavar="NAME", help="Which plugin samples the timesteps, if two of them want to."
)


def plugin_option(default: str | None = OURS) -> Decorator:
    """``--plugin NAME``, for a command in which a plugin takes part unless somebody says otherwise, or none."""
    text = "Plugin to use; may be given several times."
    if default is not None:
        text = f"Plugin beside {default}; {NONE}: without {default}, as ACE-Step trains."
    return click.option("--plugin", multiple=True, metavar="NAME|none" if default else "NAME", help=text)


def usual_defaults(plugins: Sequence[str]) -> str:
    """Whose settings are taken for those that are left out, when nobody says it: one of :data:`DEFAULTS`."""
    return DEFAULTS[0] if OURS in plugins else DEFAULTS[1]


def check_device(_: click.Context, __: click.Parameter, value: str) -> str:
    """auto, cpu, cuda, cuda:N, mps or xpu. Raises click.BadParameter."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu", value) is None:
        raise click.BadParameter(f"{value!r} is not a device. Expected auto, cpu, cuda, cuda:0, mps or xpu.")
    return value


def adapter_and_training_options(
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of a training that have nothing to do with where things are: shared by train and demo.

    Args:
        defaults: settings of the command in place of ACE-Step's own, for its help.
    """
    own = defaults or {}

    def setting(flag: str, kind: click.ParamType[Any] | None, metavar: str, text: str) -> Decorator:
        name = flag.removeprefix("--").replace("-", "_")
        told = f"ACE-Step's default: {UPSTREAMS_DEFAULTS[name]}"
        if name in own:
            told = f"default: {own[name]}"
        elif name in SETTINGS:
            told = f"default: recommended; ACE-Step's: {UPSTREAMS_DEFAULTS[name]}"
        return click.option(flag, type=kind, metavar=metavar, help=f"{text}  [{told}]")

    positive = WholeNumber(1, 10**9)
    options: tuple[Decorator, ...] = (
        plugin_option(),
        WINS,
        click.option(
            "--adapter-type",
            type=click.Choice(NAMES),
            default=DEFAULT.name,
            show_default=True,
            help="Kind of adapter.",
        ),
        setting("--rank", WholeNumber(min=1), "N", "Size of the adapter."),
        setting("--alpha", positive, "N", "Strength: alpha / rank."),
        setting("--dropout", FiniteFloat(0.0, 1.0, max_open=True), "X", "LoRA dropout, from 0 to below 1."),
        setting("--target-modules", None, "NAMES", "Layers to adapt."),
        *(own_option(name, metavar, text) for kind in KINDS for name, (metavar, text) in kind.options.items()),
        setting("--epochs", positive, "N", "Passes over all songs."),
        setting("--batch-size", positive, "N", "Songs per batch."),
        setting("--gradient-accumulation", positive, "N", "Batches per optimizer step."),
        setting("--learning-rate", FiniteFloat(0.0, min_open=True), "X", "Learning rate after warm-up."),
        setting("--warmup-steps", WholeNumber(min=0), "N", "Optimizer steps of warm-up."),
        setting("--weight-decay", FiniteFloat(0.0), "X", "Weight decay."),
        setting("--max-grad-norm", FiniteFloat(0.0, min_open=True), "X", "Clip gradients to this norm."),
        setting("--seed", WholeNumber(0, 2**32 - 1), "N", "Random seed."),
        setting("--save-every", positive, "N", "Epochs between checkpoints."),
        setting("--val-split", FiniteFloat(0.0, 1.0, max_open=True), "X", "Share of the songs to validate on."),
        click.option(
            "--num-workers", type=WholeNumber(0, 256), metavar="N", help="Processes that load songs.  [default: 0]"
        ),
        setting("--log-every", positive, "N", "Optimizer steps between log entries."),
        click.option("--debug", is_flag=True, help="Show all logs, and where an error came from."),
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def own_option(name: str, metavar: str | None, text: str) -> Decorator:
    """An option of one kind of adapter, given by its name, metavar and help: a switch without a metavar."""
    flag = f"--{name.replace('_', '-')}"
    if metavar is None:
        return click.option(flag, is_flag=True, default=None, help=text)
    return click.option(flag, type=WholeNumber(-1, 10**9), metavar=metavar, help=text)


def settings_from(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given. Raises Refusal for an empty list of target modules."""
    settings = {name: value for name, value in arguments.items() if value is not None}
    if "target_modules" in settings:
        settings["target_modules"] = [name.strip() for name in settings["target_modules"].split(",") if name.strip()]
        if not settings["target_modules"]:
            raise Refusal("--target-modules is empty. Expected names such as q_proj,k_proj,v_proj,o_proj.")
    return settings
