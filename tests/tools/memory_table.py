"""Writes the table of docs/memory.md: ``python tests/tools/memory_table.py``. Nothing in it is measured."""

from __future__ import annotations

from pathlib import Path

from sidestep_plugin.memory.estimate import Settings
from sidestep_plugin.memory.known import TWO_B, XL
from sidestep_plugin.memory.table import rows_for
from sidestep_plugin.registry import Registry

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"
CARDS = (8, 12, 16, 24)
SETTINGS = Settings(rank=64, frames=180 * 25)


def table() -> str:
    """For each size of model and each setting: what it needs, and on which cards it fits with the margin."""
    options = {str(option.name) for option in Registry.load(("sidestep",)).declared_options()}
    lines = []
    for name, size in (("2B", TWO_B), ("XL", XL)):
        lines += [
            f"| {name}: each line keeps the flags above | needs | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
            "| --- | --- |" + " --- |" * len(CARDS),
        ]
        for row in rows_for(size, SETTINGS, options):
            fits = ("yes" if row.needs.fits(card * 2**30) else "no" for card in CARDS)
            title = row.name if not row.flags else f"`{row.name}`"
            lines.append(f"| {title} | {row.needs.total / 2**30:.1f} GiB | " + " | ".join(fits) + " |")
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The page with the table as it must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
