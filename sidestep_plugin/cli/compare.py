"""``acestep-train compare``: the loss of saved adapters on the same songs, by timestep, as text, picture and JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin.adapters.kinds.lora import LORA
from sidestep_plugin.options import Place, SongsOrShare
from sidestep_plugin.text import counted, shown
from sidestep_plugin.variants import VARIANTS

from . import quiet
from .command_line import quoted
from .commands import RefusingCommand, check_plugins, echo_json
from .plotting import check_plot
from .terminal import echo, program, say
from .torch_here import require_torch
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR, FOLDER, STRENGTHS, check_device, plugin_option

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from sidestep_plugin.validation.comparing import Comparison, Measured

_LONGEST = 40  # characters of an adapter's name in the table
_NO_DIFFERENCE = 5e-5  # of the loss: less than is shown


@click.command(cls=RefusingCommand)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=Place(path_type=Path))
@click.option("--model", metavar="NAME|DIR", help="Model.  [default: the one that the adapters are for]")
@click.option("--dataset-dir", required=True, type=FOLDER, metavar="DIR", help="Folder of preprocessed songs.")
@click.option(
    "--validate",
    type=SongsOrShare(),
    default="0",
    metavar="N",
    help="Only the songs that a training with --validate N holds out.",
)
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option(
    "--variant", type=click.Choice(["auto", *VARIANTS]), default="auto", metavar="KIND", help="turbo, base or sft."
)
@click.option(
    "--device", callback=check_device, default="auto", show_default=True, metavar="NAME", help="Where to compute."
)
@plugin_option()
@STRENGTHS
@click.option("--plot", type=Place(path_type=Path), metavar="FILE.png", help="Also draw a picture; needs matplotlib.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def compare(
    adapters: tuple[Path, ...],
    model: str | None,
    dataset_dir: Path,
    validate: float,
    acestep_root: Path | None,
    checkpoint_dir: Path | None,
    variant: Any,
    device: str,
    plugin: tuple[str, ...],
    strengths: tuple[float, ...],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare adapters by their loss on the same songs, at the same timesteps and with the same noise.

    ADAPTER is a .safetensors file, or the folder of an adapter, a checkpoint or a training. It can be a LoRA or LoKr
    from this plugin, ACE-Step or Side-Step. Take songs that none of them was trained on: on its own songs every adapter
    is better than the model.

    --strengths evaluates each of them at several strengths, where 1 is the one that it was trained with.

    \b
    Examples:
        acestep-train compare mine/final theirs/final --dataset-dir tensors/held-out --plot compare.png
        acestep-train compare mine/final --strengths 0.6,0.8,1,1.2 --dataset-dir tensors/held-out
    """
    check_plugins(plugin, "losses are always compared at the timesteps that the model was trained at")
    if plot is not None:
        check_plot(plot)
    require_torch()
    if not click.get_current_context().meta["debug"]:
        quiet.quiet_third_parties()
        quiet.quiet_upstream()
    from sidestep_plugin.validation.comparing import compare as measure

    done = measure(
        adapters,
        model=model,
        dataset_dir=dataset_dir,
        acestep_root=acestep_root,
        checkpoint_dir=checkpoint_dir,
        device=device,
        variant=None if variant == "auto" else variant,
        held_out=validate,
        strengths=strengths,
        say=lambda line: say(line, err=as_json),
        progress=_Progress(err=as_json),
    )
    names = [_name(one.path, one.strength, several=len(strengths) > 1, longest=200) for one in done.after]
    if plot is not None:
        from sidestep_plugin.timesteps.shares import save_picture

        save_picture(_picture(done, names) if len(strengths) == 1 else _picture_of_strengths(done), plot)
    if as_json:
        echo_json(_as_json(done, names))
        return
    for line in _as_text(done, names, several=len(strengths) > 1):
        echo(line)
    if plot is not None:
        echo(f"\nPicture: {plot}")
    if line := _copy_command(done) if len(strengths) > 1 else "":
        echo(f"\n{line}")


class _Progress:
    """Says which adapter is evaluated, and on a terminal how many songs are done."""

    def __init__(self, *, err: bool) -> None:
        self._err = err
        stream = sys.stderr if err else sys.stdout
        self._lively = stream is not None and stream.isatty()

    def __call__(self, name: str, done: int, songs: int) -> None:
        if self._lively and 0 < done < songs:
            click.echo(f"\r  {done} of {songs} songs", nl=False, err=self._err)
        elif self._lively and done == songs:
            click.echo(f"\r{' ' * 30}\r", nl=False, err=self._err)
        elif done == 0:
            say(f"Evaluating {shown(name, 200)} on {counted(songs, 'song')} ...", err=self._err)


def _name(path: Path, strength: float, *, several: bool, longest: int) -> str:
    """What a row is called: the end of the adapter's path, and its strength if there are several."""
    name = shown(path, 200)
    name = name if len(name) <= longest else f"...{name[3 - longest :]}"
    return f"{name} x {strength:g}" if several else name


def _changes(done: Comparison, condition: int) -> list[list[float]]:
    """The change of each adapter at each timestep."""
    before = done.by_t(done.before, condition)
    return [
        [now / then - 1.0 for now, then in zip(done.by_t(one.losses, condition), before, strict=True)]
        for one in done.after
    ]


def _best(done: Comparison) -> Measured | None:
    """What has the lowest loss; None if none is a number."""
    finite = [one for one in done.after if _finite(done, one.losses)]
    return min(finite, key=lambda one: done.mean(one.losses), default=None)


def _copy_command(done: Comparison) -> str:
    """How to write the best strength into a copy; "" where it is the trained one."""
    best = _best(done)
    if best is None or best.strength == 1.0 or done.mean(best.losses) >= done.mean(done.before):
        return ""
    copy = "universal" if best.report.adapter.kind == LORA.name else "comfyui"
    line = quoted([program(), "export", str(best.path), "--to", copy, "--strength", f"{best.strength:g}"])
    return f"To make a copy that plays at this strength by itself: {line}"


def _as_text(done: Comparison, names: Sequence[str], *, several: bool = False) -> list[str]:
    songs = counted(len(done.songs), "song")
    lines = [
        f"Loss on {songs} relative to {done.model} without adapter, by t (1 is pure noise). Lower is better.",
        *_notes(done, names),
    ]
    before = done.mean(done.before)
    short = [_name(one.path, one.strength, several=several, longest=_LONGEST) for one in done.after]
    width = max(map(len, (*short, "without condition")))
    for place, condition in enumerate(done.conditions):
        title = "with condition" if condition else "without condition"
        lines.append("")
        lines.append(f"{title:<{width}}  {'all t':>8}  " + " ".join(f"{t:>7.2f}" for t in done.timesteps))
        then = sum(done.by_t(done.before, place)) / len(done.timesteps)
        for name, one, changes in zip(short, done.after, _changes(done, place), strict=True):
            mean = sum(done.by_t(one.losses, place)) / len(done.timesteps) / then - 1.0
            cells = " ".join(_percent(change, 6) for change in changes)
            lines.append(f"{name:<{width}}  {_percent(mean, 7)}  {cells}")
    lines.append("")
    found = _best(done)
    if found is None:
        return [
            *lines,
            "No adapter gives a loss that is a number, so none is better than the model without adapter.",
        ]
    best = _name(found.path, found.strength, several=several, longest=_LONGEST)
    change = done.mean(found.losses) / before - 1.0
    alike = [
        name
        for name, one in zip(short, done.after, strict=True)
        if _finite(done, one.losses) and abs(done.mean(one.losses) / before - 1.0 - change) < _NO_DIFFERENCE
    ]
    weights = ""
    if len(done.conditions) > 1 and done.treatment.cfg_ratio:
        weights = f", with {100 * done.treatment.cfg_ratio:.4g} % of it without condition, as in training"
    if abs(change) < _NO_DIFFERENCE:
        lines.append(
            f"None is better than the model without adapter: no difference between it and {best}, "
            f"{100 * change:+.2f} %{weights}."
        )
    elif len(alike) > 1:
        lines.append(f"No difference between {' and '.join(alike)}, {100 * change:+.2f} %{weights}.")
    elif change < 0.0:
        lines.append(f"Lowest loss: {best}, {100 * change:+.2f} %{weights}.")
    else:
        lines.append(
            f"None is better than the model without adapter; {best} is nearest, {100 * change:+.2f} %{weights}."
        )
    return lines


def _finite(done: Comparison, losses: torch.Tensor) -> bool:
    """Whether an adapter's losses can be compared: NaN is neither larger nor smaller than any number."""
    return math.isfinite(done.mean(losses)) and bool(losses.isfinite().all())


def _percent(change: float, width: int) -> str:
    return f"{100 * change:>+{width}.2f}%" if math.isfinite(change) else f"{'NaN':>{width + 1}}"


def _notes(done: Comparison, names: Sequence[str]) -> list[str]:
    """What makes a comparison doubtful."""
    notes = []
    for name, one in zip(names, done.after, strict=True):
        report = one.report
        if not _finite(done, one.losses):
            notes.append(
                f"Note: {name} gives NaN or infinity: its weights hold some, or become too large for the model."
            )
        if any(before.report is report for before in done.after[: done.after.index(one)]):
            continue  # it was noted at another strength
        if one.known:
            notes.append(
                f"Note: {name} was trained on {one.known} of {'this' if len(done.songs) == 1 else 'these'} "
                f"{counted(len(done.songs), 'song')}, which makes it look better than it is."
            )
        trained_for = report.facts.get("model_name")
        if trained_for and trained_for != done.model:
            notes.append(f"Note: {name} was trained for {shown(trained_for, 80)}.")
        if len(report.adapter.idle) == len(report.adapter.layers):
            notes.append(f"Note: {name} holds only zeros, as before the first optimizer step.")
    return notes


def _as_json(done: Comparison, names: Sequence[str]) -> dict[str, Any]:
    before = done.mean(done.before)

    def losses_of(losses: Any) -> Any:
        entries: dict[str, Any] = {"loss": done.mean(losses), "loss_by_t": done.by_t(losses, 0)}
        if len(done.conditions) > 1:
            entries["loss_by_t_without_condition"] = done.by_t(losses, 1)
        return _for_json(entries | {"loss_by_song": losses[:, :, 0].mean(dim=1).tolist()})

    return {
        "model": done.model,
        "variant": done.treatment.variant,
        "songs": list(done.songs),
        "timesteps": list(done.timesteps),
        "weight_without_condition": done.treatment.cfg_ratio if len(done.conditions) > 1 else 0.0,
        "without_adapter": losses_of(done.before),
        "adapters": [
            {
                "name": name,
                "adapter_type": one.report.adapter.kind,
                "written_by": one.report.written_by,
                "strength": one.strength,
                "change": _for_json(done.mean(one.losses) / before - 1.0),
                **losses_of(one.losses),
            }
            for name, one in zip(names, done.after, strict=True)
        ],
    }


def _for_json(value: Any) -> Any:
    """Numbers as JSON has them: null for NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _for_json(entry) for key, entry in value.items()}
    return [_for_json(entry) for entry in value] if isinstance(value, list) else value


def _picture(done: Comparison, names: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(done.conditions), 4.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(done.conditions), sharey=True, squeeze=False)[0]
    for place, (condition, axes) in enumerate(zip(done.conditions, panels, strict=True)):
        for name, changes in zip(names, _changes(done, place), strict=True):
            label = name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
            axes.plot(done.timesteps, [100.0 * change for change in changes], "o-", ms=3, label=label)
        axes.axhline(0.0, color="0.8", lw=1.0, zorder=0)
        title = "with condition" if condition else "without condition"
        axes.set(title=title, xlabel="t   (0: the song, 1: pure noise)", xlim=(0.0, 1.02))
    panels[0].set_ylabel(f"loss vs. {done.model} without adapter, %")
    panels[-1].legend(frameon=False, fontsize=8)
    return figure


def _picture_of_strengths(done: Comparison) -> Figure:
    """The change by strength, a line for each adapter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 4.2), dpi=120, layout="constrained")
    axes, before = figure.subplots(), done.mean(done.before)
    for path in dict.fromkeys(one.path for one in done.after):
        points = sorted((one.strength, done.mean(one.losses) / before - 1.0) for one in done.after if one.path == path)
        label = _name(path, 1.0, several=False, longest=_LONGEST)
        axes.plot([at for at, _ in points], [100.0 * change for _, change in points], "o-", ms=3, label=label)
    axes.axhline(0.0, color="0.8", lw=1.0, zorder=0)
    axes.set(xlabel="strength   (1: as trained)", ylabel=f"loss vs. {done.model} without adapter, %")
    axes.legend(frameon=False, fontsize=8)
    return figure
