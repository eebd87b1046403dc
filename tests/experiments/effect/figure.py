"""Draws the figure: loss by t, distance by guidance, and the plugin's difference with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sidestep_plugin.timesteps.shares import save_picture

from .experiment import read_json
from .intervals import CONTRASTS, Difference
from .measures import band_centres
from .report import PRIMARY, compared, groups, load, means

COLOURS = {
    "untrained": "#999999",
    "eight": "#d55e00",
    "eight+drop": "#e6a532",
    "law": "#56a0d3",
    "law+drop": "#0050a0",
    "law+drop+high": "#009e73",
    "law+drop+padded": "#cc79a7",
}
LABELS = {
    "untrained": "base model, no adapter",
    "eight": "8 steps (ACE-Step)",
    "eight+drop": "8 steps, 15 % dropout",
    "law": "the model's law",
    "law+drop": "the model's law, 15 % dropout (plugin)",
    "law+drop+high": "the same, 30 % of t from 0.9 to 1",
    "law+drop+padded": "the same, conditions padded and without opening",
}
ARMS = tuple(LABELS)


def draw(out: Path, file: Path) -> None:
    """Draw the longest training's results into a PNG, SVG or PDF. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows, preset = load(out), read_json(out / "settings.json")["preset"]
    length = max(row["length"] for row in rows)
    figure = Figure(figsize=(11.0, 7.4), layout="constrained")
    axes = figure.subplots(2, 2)
    shown = {row["songs"] for row in rows}
    cells = [cell for file in sorted((out / "cells").glob("*.json")) if (cell := read_json(file))["songs"] in shown]
    _losses(axes[0][0], cells, length, "conditioned", "Held-out loss with the condition")
    _losses(axes[0][1], cells, length, "free", "Held-out loss without the condition")
    _distances(axes[1][0], rows, preset["guidances"], length)
    _differences(axes[1][1], rows)
    figure.suptitle(
        f"A toy of {preset['layers']} layers and synthetic songs, not ACE-Step's weights: "
        f"{len(preset['seeds'])} seeds, {length} steps, mean over domains and numbers of songs",
        fontsize=11,
    )
    axes[0][0].legend(fontsize=8, frameon=False)
    save_picture(figure, file)


def _losses(axis: Any, cells: Sequence[Mapping[str, Any]], length: int, kind: str, title: str) -> None:
    """The curves of the arms over t, as a ratio to the base model without an adapter."""
    curves = {arm: _curve(cells, arm, length, kind) for arm in ARMS}
    base = curves["untrained"]
    for arm, curve in curves.items():
        if curve and base:
            ratio = [value / before for value, before in zip(curve, base, strict=True)]
            axis.plot(band_centres(len(curve)), ratio, color=COLOURS[arm], label=LABELS[arm], marker=".", lw=1.5)
    axis.set(title=title, xlabel="t (1 is pure noise)", ylabel="ratio to the base model")
    _plain(axis)


def _curve(cells: Sequence[Mapping[str, Any]], arm: str, length: int, kind: str) -> list[float]:
    key = "0" if arm == "untrained" else str(length)
    found = [cell["lengths"][key]["loss"]["curves"][kind] for cell in cells if cell["arm"] == arm]
    return [fmean(values) for values in zip(*found, strict=True)] if found else []


def _distances(axis: Any, rows: Sequence[Mapping[str, Any]], guidances: Sequence[float], length: int) -> None:
    for arm in ARMS:
        where = {"length": 0 if arm == "untrained" else length}
        values = [means(rows, f"guidance {guidance:g}/energy", arm, **where) for guidance in guidances]
        if None in values:
            continue
        axis.plot(range(len(values)), values, color=COLOURS[arm], label=LABELS[arm], marker="o", lw=1.5)
    axis.set_xticks(range(len(guidances)), [f"{guidance:g}" for guidance in guidances])
    axis.set(title="Distance of generated songs to held-out ones", xlabel="guidance", ylabel="energy distance")
    axis.set_ylim(bottom=0)
    _plain(axis)


def _differences(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plugin against ACE-Step, in per cent of ACE-Step's value, at every length."""
    found: list[tuple[str, Difference, float]] = []
    for group, where in [entry for entry in groups(rows) if entry[0].startswith("all")]:
        for label, measure in PRIMARY.items():
            scale = means(rows, measure, "eight", **where)
            if scale:
                steps = group.removeprefix("all, ")
                found.append((f"{label}, {steps}", compared(rows, measure, _PLUGIN, **where), abs(scale) / 100))
    for place, (_, one, scale) in enumerate(found):
        colour = "#0050a0" if one.shown else "#999999"
        axis.plot([one.low / scale, one.high / scale], [place, place], color=colour, lw=2)
        axis.plot(one.mean / scale, place, "o", color=colour)
    axis.axvline(0.0, color="black", lw=0.8)
    axis.set_yticks(range(len(found)), [label for label, _, _ in found], fontsize=8)
    axis.invert_yaxis()
    axis.set(title="Plugin against ACE-Step (left is better)", xlabel="difference in % (grey: may be chance)")
    _plain(axis)


_PLUGIN = CONTRASTS["plugin − ACE-Step"]


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
