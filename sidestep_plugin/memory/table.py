"""Estimates for one setting after the other, as a table."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .estimate import PARTS, Needs, Settings, needs
from .savings import savings_for, with_flag
from .sizes import DecoderSize


@dataclass(frozen=True)
class Row:
    """One line."""

    name: str  # what it adds to the lines above, as it is printed
    flags: tuple[str, ...]  # all flags up to here; empty for ACE-Step alone
    needs: Needs  # what such a training needs


def rows_for(size: DecoderSize, settings: Settings, options: Collection[str]) -> list[Row]:
    """ACE-Step alone as its newest version trains, the plugin, and then one saving more in each line.

    Args:
        options: names of the plugin's options; without any, ACE-Step alone.
    """
    alone = settings.but(frozen="fp32", checkpointing=True)
    rows = [Row("ACE-Step alone (fp32, checkpointing on)", (), needs(size, alone))]
    if not options:
        return rows
    first = "--gradient-checkpointing off"
    now = settings.but(frozen="bf16", checkpointing=False)
    rows.append(Row(f"with sidestep, {first}", (first,), needs(size, now)))
    flags: list[str] = []
    for saving, then in savings_for(now, options):
        need = needs(size, then)
        if need.total < rows[-1].needs.total:  # a LoKr may be the same for a lower rank
            flags = with_flag(flags, saving.flag(then))
            rows.append(Row(flags[-1], tuple(flags), need))
    return rows


def as_text(rows: Iterable[Row], free: int | None = None) -> list[str]:
    """The rows in columns, in GiB, and whether each fits if it is known how much is free."""
    listed = list(rows)
    wide = max(len(row.name) for row in listed) + 2
    fits = "" if free is None else "   fits"
    lines = [" " * wide + "".join(f"{part:>13}" for part in (*PARTS, "total")) + fits]
    for row in listed:
        numbers = [getattr(row.needs, part) for part in PARTS] + [row.needs.total]
        verdict = "" if free is None else f"   {'yes' if row.needs.fits(free) else 'no'}"
        lines.append(f"{row.name:<{wide}}" + "".join(f"{number / 2**30:>13.2f}" for number in numbers) + verdict)
    return lines
