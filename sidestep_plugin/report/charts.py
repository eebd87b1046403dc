"""The curves of a training as SVG, for the page: in the page's colors and fonts, and equal curves are equal text.

Drawn by matplotlib, which need not be installed. No random number is drawn, and matplotlib's settings are as before.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE: Final = (4.8, 3.0)  # inches of 72 units; the page scales it
_FEW: Final = 40
"""Points up to which each is marked."""

# Colors that stand for those of the page, which depend on whether it is light or dark.
_TEXT, _GRID, _LOSS, _LOW, _HIGH, _BARS = (f"#0a0b0{number}" for number in range(1, 7))
_COLORS: Final = {
    _TEXT: "currentColor",
    _GRID: "var(--line)",
    _LOSS: "var(--one)",
    _LOW: "var(--two)",
    _HIGH: "var(--three)",
    _BARS: "var(--bars)",
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def charts(report: Mapping[str, Any]) -> dict[str, str]:
    """The charts that a training's report has numbers for, by name: "loss", "t", "validation" and "validation_t".

    Args:
        report: the entries of ``training_report.json``.

    Returns:
        ``<svg>`` elements for HTML. Without matplotlib, none.

    Raises:
        Exception: matplotlib cannot be imported or cannot draw.
    """
    if not can_draw():
        return {}
    drawn: dict[str, Callable[[Axes], None]] = {}
    if _known(report["loss_by_epoch"]):
        drawn["loss"] = partial(_loss, report["loss_by_epoch"])
    if _known(report["loss_by_t"]):
        drawn["t"] = partial(_by_t, report["loss_by_t"])
    validation = report.get("validation")
    if validation and len(_known(validation["epochs"])) > 1:
        drawn["validation"] = partial(_validation, validation)
        drawn["validation_t"] = partial(_validation_by_t, validation)
    return {name: _svg(name, draw) for name, draw in drawn.items()}


def _known(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [entry for entry in entries if entry["loss"] is not None]


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"sidestep {name}",  # without it, names in the file are random
        "font.size": 9.5,
        "legend.fontsize": 8.5,
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "axes.edgecolor": _GRID,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _TEXT,
        "ytick.labelcolor": _TEXT,
        "grid.color": _GRID,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
    }
    stream = io.BytesIO()
    with rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=_SIZE, layout=None)
        figure.subplots_adjust(left=0.15, right=0.98, bottom=0.16, top=0.84 if name.startswith("validation") else 0.97)
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _for_html(stream.getvalue().decode("utf-8"), name)


def _for_html(text: str, name: str) -> str:
    """A file of matplotlib's as an element of a page: without what belongs to a file, and in the page's colors."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    text = re.sub(r"<svg[^>]*>", f"<svg {view[0] if view else ''} aria-hidden='true'>", text, count=1)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for stand_in, color in _COLORS.items():
        text = text.replace(stand_in, color)
    return re.sub(r"\n\s*", "\n", text).strip()


def _marker(points: Sequence[Any]) -> str:
    return "o" if len(points) <= _FEW else ""


def _legend(axes: Axes, columns: int) -> None:
    """Above the curves, where it hides none."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def _whole_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _loss(entries: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    known = _known(entries)
    epochs, losses = [entry["epoch"] for entry in known], [entry["loss"] for entry in known]
    axes.plot(epochs, losses, color=_LOSS, lw=1.8, marker=_marker(known), ms=3.5)
    _whole_epochs(axes)


def _by_t(bands: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    """The mean loss of each band of t, above bars that say how often it was sampled."""
    middles = [(band["from"] + band["to"]) / 2.0 for band in bands]
    seen = [(t, band["loss"]) for t, band in zip(middles, bands, strict=True) if band["loss"] is not None]
    rows = [band["rows"] for band in bands]
    often = axes.twinx()
    often.bar(middles, rows, width=0.9 * (bands[0]["to"] - bands[0]["from"]), color=_BARS)
    often.set(yticks=[], ylim=(0.0, 2.4 * max(1, *rows)))
    often.grid(visible=False)
    often.spines["left"].set_visible(False)
    axes.set_zorder(often.get_zorder() + 1)
    axes.plot([t for t, _ in seen], [loss for _, loss in seen], color=_LOSS, lw=1.8, marker="o", ms=3.5)
    axes.set(xlabel="t   (0: the song, 1: pure noise)", xlim=(0.0, 1.0))


def _changes(entry: Mapping[str, Any], first: Mapping[str, Any], key: str = "loss_by_t") -> list[float]:
    """The change at each timestep to the model without adapter, in percent; NaN where it is unknown."""
    pairs = zip(entry[key], first[key], strict=True)
    return [float("nan") if now is None or not before else 100.0 * (now / before - 1.0) for now, before in pairs]


def _validation(validation: Mapping[str, Any], axes: Axes) -> None:
    """The change of the mean, and of each timestep in the color of its half."""
    known, times = _known(validation["epochs"]), validation["timesteps"]
    epochs = [entry["epoch"] for entry in known]
    by_t = [_changes(entry, known[0]) for entry in known]
    for place in range(len(times)):
        low = place < len(times) // 2
        label = {0: "low t", len(times) - 1: "high t"}.get(place)
        values = [changes[place] for changes in by_t]
        axes.plot(epochs, values, color=_LOW if low else _HIGH, lw=1.0, alpha=0.5, label=label)
    means = [float("nan") if entry["change"] is None else 100.0 * entry["change"] for entry in known]
    axes.plot(epochs, means, color=_TEXT, lw=2.0, marker=_marker(known), ms=3.5, label="mean")
    for name in dict.fromkeys(name for entry in known for name in entry.get("variants", {})):
        found = [entry.get("variants", {}).get(name, {}).get("change") for entry in known]
        changes = [float("nan") if change is None else 100.0 * change for change in found]
        axes.plot(epochs, changes, color=_LOSS, lw=2.0, marker=_marker(known), ms=3.5, label=name)
    if validation["best_epoch"] is not None:
        axes.axvline(validation["best_epoch"], color=_LOSS, lw=1.2, ls="--", label=f"best: {validation['best_epoch']}")
    axes.axhline(0.0, color=_TEXT, lw=0.8, alpha=0.5)
    axes.set_ylabel("change, %")
    _legend(axes, 4)
    _whole_epochs(axes)


def _validation_by_t(validation: Mapping[str, Any], axes: Axes) -> None:
    """The change at each timestep, of the best and of the newest epoch, with the condition and without."""
    known = _known(validation["epochs"])
    by_epoch = {entry["epoch"]: entry for entry in known}
    best, newest = validation["best_epoch"], known[-1]["epoch"]
    shown = {"best": best} | ({} if newest == best else {"newest": newest})
    for name, color in zip(shown, (_LOSS, _HIGH), strict=False):
        if (entry := by_epoch.get(shown[name])) is None:
            continue
        for key, dots, words in (("loss_by_t", "o-", ""), ("loss_by_t_without_condition", "o:", ", no condition")):
            if key in entry and key in known[0]:
                changes = _changes(entry, known[0], key)
                label = f"{name}: {entry['epoch']}{words}"
                axes.plot(validation["timesteps"], changes, dots, color=color, lw=1.6, ms=3.5, label=label)
    axes.axhline(0.0, color=_TEXT, lw=0.8, alpha=0.5)
    axes.set(xlabel="t   (0: the song, 1: pure noise)", ylabel="change, %", xlim=(0.0, 1.0))
    _legend(axes, 2)
