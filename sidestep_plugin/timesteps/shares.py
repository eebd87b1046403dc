"""How training timesteps are distributed over t: in ACE-Step's trainer, in the model's own law, and with plugins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..variants import TURBO_SHIFT, TURBO_STEPS
from .schedule import inference_timesteps, max_of_two_logit_normal_cdf, max_of_two_logit_normal_quantile

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_WIDTH: Final = 14  # of a bar
_FEW: Final = 50  # distinct values of what is not continuous


@dataclass(frozen=True)
class Distribution:
    """One distribution of t."""

    name: str  # what draws it
    shares: tuple[float, ...]  # of the training steps in each band, from data (t = 0) to noise (t = 1); they sum to 1
    low: float  # its 5 % quantile
    median: float
    high: float  # its 95 % quantile
    values: int | None = None  # number of distinct values when there are few; None for a continuous distribution


def of_values(name: str, values: Sequence[float], bands: int) -> Distribution:
    """The distribution of a sample, or of equally likely values | values in [0, 1]."""
    ordered = sorted(values)
    shares = [0.0] * bands
    for t in ordered:
        shares[band_of(t, bands)] += 1.0 / len(ordered)

    def quantile(part: float) -> float:
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)]

    distinct = len(set(ordered))
    few = distinct if distinct <= _FEW else None
    return Distribution(name, tuple(shares), quantile(0.05), quantile(0.5), quantile(0.95), few)


def of_the_law(name: str, mu: float, sigma: float, bands: int) -> Distribution:
    """The maximum of two logit-normal draws, computed from its distribution function."""
    edges = [max_of_two_logit_normal_cdf(number / bands, mu, sigma) for number in range(bands + 1)]
    low, median, high = (max_of_two_logit_normal_quantile(part, mu, sigma) for part in (0.05, 0.5, 0.95))
    return Distribution(name, tuple(upper - lower for lower, upper in pairwise(edges)), low, median, high)


def of_the_trainer(name: str, bands: int) -> Distribution:
    """What ACE-Step's own trainer draws for every model: turbo's 8 inference steps, equally likely."""
    return of_values(name, inference_timesteps(TURBO_SHIFT, TURBO_STEPS), bands)


def band_of(t: float, bands: int) -> int:
    """Number of the band of width 1/bands that holds t; t = 1 is in the last one."""
    # In fp32 0.9 is a little less than 0.9, and belongs to the same band all the same.
    return min(int(t * bands + 1e-6), bands - 1)


def as_text(distributions: Sequence[Distribution], *, block: str = "#") -> list[str]:
    """Bars side by side, one line per band | block: the character of the bars, ASCII for a console without others."""
    bands = len(distributions[0].shares)
    longest = max(share for distribution in distributions for share in distribution.shares)
    head = "".join(f"{distribution.name:<{_WIDTH + 8}}" for distribution in distributions)
    lines = [f"{'t':<11} {head.rstrip()}"]
    for band in range(bands):
        cells = []
        for distribution in distributions:
            share = distribution.shares[band]
            bar = block * round(_WIDTH * share / longest)
            cells.append(f"{bar:<{_WIDTH}} {100 * share:4.1f} % " if share > 0 else " " * (_WIDTH + 8))
        lines.append(f"{band / bands:.2f}-{(band + 1) / bands:.2f}   {''.join(cells)}".rstrip())
    cells = [
        f"{distribution.values} values"
        if distribution.values
        else f"{distribution.median:.2f} ({distribution.low:.2f}-{distribution.high:.2f})"
        for distribution in distributions
    ]
    return [*lines, f"{'median':<11} {''.join(f'{cell:<{_WIDTH + 8}}' for cell in cells)}".rstrip()]


def draw(
    title: str, schedule: Sequence[float], law: tuple[float, float] | None, drawn: torch.Tensor, drawn_by: str
) -> Figure:
    """A plot of the same | law: mu and sigma, drawn: a sample of t. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    values = drawn.tolist()
    distinct = sorted(set(values))
    top = 2.0
    if len(distinct) <= _FEW:
        for number, t in enumerate(distinct):
            label = f"{drawn_by}: {len(distinct)} values, equally likely" if number == 0 else None
            height = top * values.count(t) * len(distinct) / len(values)
            axes.plot([t, t], [0.0, height], color="tab:blue", lw=8, alpha=0.4, label=label, solid_capstyle="butt")
    else:
        bins = 100
        heights = [share * bins for share in of_values("", values, bins).shares]
        edges = [number / bins for number in range(bins + 1)]
        label = f"{drawn_by}: {len(values):,} draws"
        axes.stairs(heights, edges, fill=True, color="tab:blue", alpha=0.35, label=label)
        top = max(heights)
    for number, t in enumerate(schedule):
        label = "ACE-Step's trainer, for every model: 8 values, equally likely" if number == 0 else None
        axes.plot([t, t], [0.0, 0.75 * top], color="tab:red", lw=1.5, label=label, solid_capstyle="butt")
    if law is not None:
        fine = 400
        points = [number / fine for number in range(fine + 1)]
        cdf = [max_of_two_logit_normal_cdf(t, *law) for t in points]
        density = [(upper - lower) * fine for lower, upper in pairwise(cdf)]
        middles = [(lower + upper) / 2.0 for lower, upper in pairwise(points)]
        axes.plot(middles, density, color="black", lw=1.8, label="the model's own law, from its sample_t_r")
        top = max(top, *density)
    axes.set(xlim=(0.0, 1.02), ylim=(0.0, 1.4 * top), yticks=[], title=title)
    axes.set(xlabel="t   (0: the song, 1: pure noise)", ylabel="how often")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def save_picture(figure: Figure, file: Path) -> None:
    """Write a plot in the format of its file extension, whole or not at all. Raises OSError."""
    from ..files import replacing

    kind = file.suffix.lstrip(".").lower()
    with replacing(file) as stream:
        # Without the program's version, so that equal plots give equal files.
        figure.savefig(stream, format=kind, metadata={"Software": None} if kind == "png" else None)
