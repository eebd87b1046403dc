"""Draws the validations of a training: the mean by epoch, and the change at each timestep."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from .history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_NAME: Final = "validation.png"


def picture(history: History) -> Figure:
    """The figure. Needs matplotlib, and at least one validated epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.0), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    _by_epoch(left, history)
    _by_t(right, history)
    return figure


def _by_epoch(axes: Axes, history: History) -> None:
    """Change of the mean and of each timestep, from blue (low t) to red (high t)."""
    from matplotlib import colormaps

    epochs = [epoch for epoch in sorted(history.losses) if math.isfinite(history.mean(epoch))]
    changes = [history.changes_by_t(epoch) for epoch in epochs]
    last = max(1, len(history.timesteps) - 1)
    for place, t in enumerate(history.timesteps):
        color = colormaps["coolwarm"](place / last)
        values = [100.0 * change[place] for change in changes]
        label = f"t {t:.2f}" if place in (0, last) else None
        axes.plot(epochs, values, color=color, lw=1.0, alpha=0.9, label=label)
    axes.plot(
        epochs, [100.0 * history.change(epoch) for epoch in epochs], "o-", color="black", lw=2.0, ms=3, label="mean"
    )
    if (best := history.best) is not None:
        axes.axvline(best, color="0.6", lw=1.0, ls="--", label=f"best: epoch {best}")
    axes.axhline(0.0, color="0.8", lw=1.0, zorder=0)
    axes.set(title="validation loss by epoch", xlabel="epoch", ylabel="change to the model without adapter, %")
    axes.legend(frameon=False, fontsize=8)


def _by_t(axes: Axes, history: History) -> None:
    """Change at each timestep, of the best and of the newest epoch, with and without condition."""
    newest = max(history.trained)
    shown = {"best": history.best, "newest": newest}
    for (name, epoch), color in zip(shown.items(), ("tab:blue", "tab:orange"), strict=True):
        if epoch is None or (name == "newest" and epoch == history.best) or not math.isfinite(history.mean(epoch)):
            continue
        for place, condition in enumerate(history.conditions):
            before = history.by_t(0, place)
            values = [100.0 * (now / then - 1.0) for now, then in zip(history.by_t(epoch, place), before, strict=True)]
            label = f"{name}: epoch {epoch}" if condition else f"{name}, without condition"
            axes.plot(history.timesteps, values, "o-" if condition else "o:", color=color, ms=3, label=label)
    axes.axhline(0.0, color="0.8", lw=1.0, zorder=0)
    axes.set(title="by t   (0: the song, 1: pure noise)", xlabel="t", xlim=(0.0, 1.02))
    axes.legend(frameon=False, fontsize=8)
