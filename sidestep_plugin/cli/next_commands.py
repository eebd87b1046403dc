"""What to type next: the commands at the end of a training, on the terminal and on its page."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .command_line import quoted, resuming_line
from .terminal import program

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sidestep_plugin.launch.launch import Request


def next_commands(request: Request, state: str) -> list[tuple[str, str]]:
    """What to type next, and for what.

    Args:
        request: the training.
        state: "training", "finished", "stopped" or "failed".

    Returns:
        Purposes and commands, quoted for this system's shell.
    """
    from sidestep_plugin.report.ending import best_place

    output = request.output_dir
    overview = ("See what was saved, with losses:", _line("list", output))
    if state == "training":
        return [overview]
    if state != "finished":
        saved = (output / "interrupted").is_dir() or any((output / "checkpoints").glob("*"))
        return [("Resume it:", resuming_line(request)), overview] if saved else []
    final, best = output / "final", best_place(output)
    where = [word for flag, place in _places(request) for word in (flag, str(place)) if place is not None]
    model = ["--model", request.model]
    songs = ["--dataset-dir", str(request.dataset_dir)]
    commands = []
    if _can_be_heard(request):
        listen = _line("preview", final, *songs, *(model if re.search(r"[\\/]", request.model) else ()), *where)
        commands.append(("Listen to it, beside the model without it:", listen))
    another = best is not None and _epoch_of(best) not in (None, _epoch_of(final))
    if another and (held_out := _held_out(request, songs)):
        compare = _line("compare", final, best, *model, *held_out, *where)
        commands.append(("Compare it with the best epoch, on songs that it has not seen:", compare))
    elif not commands:
        compare = _line("compare", final, *model, *(_held_out(request, songs) or songs), *where)
        commands.append(("Compare it with the model without it, by its loss:", compare))
    if len(commands) < 2:
        commands.append(overview)
    if request.options.get("export") != "comfyui":
        commands.append(("Make a copy for ComfyUI:", _line("export", final, "--to", "comfyui")))
    else:
        commands.append(("See what it says about itself:", _line("inspect", final)))
    return commands


def _can_be_heard(request: Request) -> bool:
    """Whether clips can be decoded where the models lie; also where that cannot be told."""
    from sidestep_plugin.engine.checkout import find_root
    from sidestep_plugin.engine.models import checkpoint_folder
    from sidestep_plugin.errors import Refusal
    from sidestep_plugin.previews.decoding import find_vae, why_not

    try:
        folder = checkpoint_folder(request.checkpoint_dir, find_root(request.acestep_root))
        return not why_not(find_vae(folder))
    except Refusal:
        return True


def _epoch_of(folder: Path) -> int | None:
    """After how many epochs a saved adapter was, as it says itself; None if it does not."""
    from sidestep_plugin.adapters.facts import read_training_config

    facts = read_training_config(folder / "adapter") or read_training_config(folder) or {}
    epoch = facts.get("epoch")
    return epoch if isinstance(epoch, int) else None


def _places(request: Request) -> Sequence[tuple[str, Path | None]]:
    return ("--acestep-root", request.acestep_root), ("--checkpoint-dir", request.checkpoint_dir)


def _held_out(request: Request, songs: Sequence[str]) -> list[str]:
    """The options that name the songs that were validated on; [] if none were."""
    options = request.options
    if options.get("validation_dir") is not None:
        return ["--dataset-dir", str(options["validation_dir"])]
    return [*songs, "--validate", f"{options['validate']:g}"] if options.get("validate") else []


def _line(*words: object) -> str:
    return quoted([program(), *map(str, words)])
