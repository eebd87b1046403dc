"""Writes the tables of docs/measured.md: ``python tests/tools/measured_table.py``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sidestep_plugin.measured.reading import Measured, Training, measurements

PAGE = Path(__file__).parents[2] / "docs" / "measured.md"
BEGIN, END = "<!-- begin of the tables -->\n", "<!-- end of the tables -->\n"
NOTHING = "**Not measured yet.** There is no file of any card so far; [add yours](#measure-your-card)."
SIZES = {"2b": "2B", "xl": "XL", "tiny": "tiny"}


def tables(measured: Iterable[Measured]) -> str:
    """A section for each card; one sentence if there are none."""
    return "\n\n".join(map(section, measured)) or NOTHING


def section(one: Measured) -> str:
    versions = one.versions
    lines = [
        f"## {one.card.name}",
        "",
        f"{one.card.memory / 2**30:.0f} GiB, driver {versions.get('driver') or 'not known'}, torch "
        f"{versions['torch']}, sidestep-plugin {versions['sidestep-plugin']} "
        f"({versions.get('commit') or 'no commit'}), ACE-Step "
        f"{versions.get('acestep_commit') or 'of an unknown commit'}; {one.day}.",
        "",
        "| model, songs | adapter | way | s per step | allocated | reserved | estimate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *map(row, one.trainings),
    ]
    if one.others:
        lines += ["", *map(other, one.others)]
    if one.missing:
        lines += ["", "Not measured: " + "; ".join(f"{entry['what']} ({entry['why']})" for entry in one.missing) + "."]
    return "\n".join(lines)


def row(one: Training) -> str:
    estimate = "-" if one.estimate is None else gib(one.estimate)
    memory = f"{gib(one.allocated)} | {gib(one.reserved)} | {estimate}"
    adapter = f"{'LoRA' if one.adapter == 'lora' else 'LoKr'} {one.rank}"
    song = f"{SIZES.get(one.size, one.size)}, {one.song_seconds:.0f} s"
    return f"| {song} | {adapter} | {one.way} | {one.seconds_per_step:.3g} | {memory} |"


def other(entry: dict[str, Any]) -> str:
    if entry["what"] == "hooks":
        return (
            f"- The hooks add {entry['microseconds_added']:.0f} µs to the forward pass of a tiny model "
            f"({entry['microseconds_without']:.0f} µs)."
        )
    song = f"{SIZES.get(entry['size'], entry['size'])}, songs of {entry['song_seconds']:.0f} s"
    if entry["what"] == "previews":
        return (
            f"- {song}: {entry['clips_per_minute']:.1f} clips of {entry['clip_seconds']:.0f} s per minute, as latents, "
            f"peak {gib(entry['peak_allocated_bytes'])}."
        )
    return (
        f"- {song}: a validation of {entry['songs']} songs ({entry['losses']} losses) takes {entry['seconds']:.2f} s, "
        f"as long as {entry['in_steps']:.1f} steps."
    )


def gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


def page() -> str:
    """The page with the tables as they must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(measurements())}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
