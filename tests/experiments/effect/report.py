"""Tables and result.json from the finished cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .experiment import read_json, rounded, verdict
from .intervals import CONTRASTS, Contrast, Difference, contrast, difference
from .measures import band_centres

PRIMARY = {
    "loss, with condition": "loss/conditioned, law",
    "loss, without condition": "loss/free, law",
    "distance, guidance 1": "guidance 1/energy",
    "distance, guidance 3": "guidance 3/energy",
    "old domain, loss": "old loss/conditioned, law",
    "old domain, distance": "old domain/energy",
}
"""The measures that the predictions speak about. Smaller is better in all of them."""

SECONDARY = {
    "loss, with condition, all t alike": "loss/conditioned",
    "loss, without condition, all t alike": "loss/free",
    "distance, best guidance": "best guidance/energy",
    "distance, guidance 2": "guidance 2/energy",
    "distance, guidance 5": "guidance 5/energy",
    "distance, guidance 7": "guidance 7/energy",
    "distance, guidance 3, adapter off on null": "guidance 3, adapter off on null/energy",
    "MMD, guidance 1": "guidance 1/mmd",
    "MMD, guidance 3": "guidance 3/mmd",
    "density, guidance 1": "guidance 1/density",
    "coverage, guidance 1": "guidance 1/coverage",
    "coverage, guidance 3": "guidance 3/coverage",
    "nearest training song, guidance 1": "guidance 1/copying",
}

Group = tuple[str, Mapping[str, Any]]


def load(out: Path) -> list[dict[str, Any]]:
    """The finished cells, one row for each length: domain, songs, seed, arm, length, values.

    A number of songs of which some cells are missing is left out, unless none is whole: means over different cells
    cannot be compared.
    """
    rows = []
    for file in sorted((out / "cells").glob("*.json")):
        cell = read_json(file)
        where = {key: cell[key] for key in ("domain", "songs", "seed", "arm")}
        for name, lengths in ({"": cell["lengths"]} | cell.get("means", {})).items():
            arm = {"arm": f"mean of a {name}"} if name else {}
            rows += [where | arm | {"length": int(at), "values": flat(found)} for at, found in lengths.items()]
    whole = finished(out)
    return [row for row in rows if row["songs"] in whole] if whole else rows


def finished(out: Path) -> list[int]:
    """The numbers of songs of which every cell is finished."""
    preset = read_json(out / "settings.json")["preset"]
    arms = ["untrained", *(arm["name"] for arm in preset["arms"])]
    names = {file.stem for file in (out / "cells").glob("*.json")}
    return [
        songs
        for songs in preset["songs"]
        if names.issuperset(
            f"{domain}-{songs}-seed{seed}-{arm}"
            for domain in preset["domains"]
            for seed in preset["seeds"]
            for arm in arms
        )
    ]


def flat(measured: Mapping[str, Any]) -> dict[str, float]:
    """``{"guidance 1": {"energy": 1.0}}`` -> ``{"guidance 1/energy": 1.0}``, the losses by t, the best guidance."""
    values = {
        f"{group}/{name}": value
        for group, found in measured.items()
        for name, value in found.items()
        if isinstance(value, float)
    }
    for kind, curve in measured["loss"]["curves"].items():
        values |= {f"loss/{kind} at {t:g}": loss for t, loss in zip(band_centres(len(curve)), curve, strict=True)}
    own = [value for name, value in values.items() if name.startswith("guidance") and name.endswith("/energy")]
    if own:
        values["best guidance/energy"] = min(own)
    return values


def compared(rows: Iterable[Mapping[str, Any]], measure: str, weights: Contrast, **where: Any) -> Difference:
    """A contrast of a measure over the rows that fit ``where`` (domain, songs, length)."""
    return contrast(values_of(rows, measure, **where), weights)


def values_of(rows: Iterable[Mapping[str, Any]], measure: str, **where: Any) -> dict[tuple[int, str], list[float]]:
    """For each (seed, arm) the values of the rows that fit, in one order."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["domain"], row["songs"], row["length"])):
        if all(row[key] == value for key, value in where.items()) and measure in row["values"]:
            found.setdefault((row["seed"], row["arm"]), []).append(row["values"][measure])
    return found


def means(rows: Iterable[Mapping[str, Any]], measure: str, arm: str, **where: Any) -> float | None:
    found = [
        value for (_, name), values in values_of(rows, measure, **where).items() if name == arm for value in values
    ]
    return fmean(found) if found else None


def groups(rows: Sequence[Mapping[str, Any]]) -> list[Group]:
    """All cells together, then each domain and number of songs, by length."""
    lengths = sorted({row["length"] for row in rows if row["arm"] != "untrained"}, reverse=True)
    kinds = sorted({(row["domain"], row["songs"]) for row in rows}, key=lambda kind: (kind[0] != "near", kind[1]))
    found: list[Group] = []
    for length in lengths:
        found.append((f"all, {length} steps", {"length": length}))
        if len(kinds) > 1:
            found += [
                (f"{domain}, {songs} songs, {length} steps", {"domain": domain, "songs": songs, "length": length})
                for domain, songs in kinds
            ]
    return found


def result(out: Path) -> Any:
    """Everything: settings, how the base model was judged, every cell's numbers, every comparison."""
    rows = load(out)
    comparisons = [
        {
            "group": group,
            "measure": label,
            "primary": label in PRIMARY,
            "comparison": name,
            "mean": found.mean,
            "low": None if math.isnan(found.low) else found.low,
            "high": None if math.isnan(found.high) else found.high,
            "by_seed": list(found.seeds),
            "shown": found.shown,
        }
        for group, where in groups(rows)
        for label, measure in (PRIMARY | SECONDARY).items()
        for name, weights in CONTRASTS.items()
        if (found := compared(rows, measure, weights, **where)).seeds
    ]
    cells = [read_json(file) for file in sorted((out / "cells").glob("*.json"))]
    judged = read_json(out / "judged.json")
    settings = read_json(out / "settings.json")
    return rounded({"settings": settings, "judged": judged, "comparisons": comparisons, "cells": cells})


def tables(out: Path) -> str:
    """The tables as Markdown."""
    rows, judged = load(out), read_json(out / "judged.json")
    preset = read_json(out / "settings.json")["preset"]
    lines = [verdict(judged), f"finished: {finished(out)} of {preset['songs']} songs", ""]
    for group, where in groups(rows):
        lines += [f"### {group[0].upper()}{group[1:]}", "", *_table(rows, where), ""]
    length = max(row["length"] for row in rows)
    lines += ["### Other questions of the predictions", "", *_others(rows, {"length": length}), ""]
    return "\n".join(lines)


def _others(rows: Sequence[Mapping[str, Any]], where: dict[str, Any]) -> list[str]:
    """The difference by t, between few and many songs, and what the adapter does on the null pass."""
    plugin, arms = CONTRASTS["plugin − ACE-Step"], {row["arm"] for row in rows}
    lines = []
    for name in [
        name
        for name in ("plugin − ACE-Step", "30 % high t − plugin", "padded − as generated", "third − newest")
        if set(CONTRASTS[name]) <= arms
    ]:
        lines += [f"| {name}, loss at t | with condition | without condition |", "| --- | ---: | ---: |"]
        for centre, measures in sorted(_curves(rows).items()):
            found = [compared(rows, measure, CONTRASTS[name], **where) for measure in measures]
            lines.append(f"| {centre:.2f} | {' | '.join(map(_shown, found))} |")
        lines.append("")
    lines += ["| question | difference |", "| --- | ---: |"]
    many = sorted({row["songs"] for row in rows})
    if len(many) > 1:
        few = _by_seed(rows, PRIMARY["loss, with condition"], plugin, where | {"songs": many[0]})
        more = _by_seed(rows, PRIMARY["loss, with condition"], plugin, where | {"songs": many[-1]})
        question = f"plugin − ACE-Step, loss with condition: {many[0]} songs − {many[-1]} songs"
        lines.append(f"| {question} | {_shown(_paired(few, more))} |")
    off, own = "guidance 3, adapter off on null/energy", "guidance 3/energy"
    for arm in sorted({row["arm"] for row in rows} - {"untrained"}):
        both = [_by_seed(rows, measure, {arm: 1.0}, where) for measure in (off, own)]
        if not all(both):
            continue
        lines.append(f"| {arm}, distance, guidance 3: adapter off − on for the null pass | {_shown(_paired(*both))} |")
    return lines


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[float, tuple[str, str]]:
    """The names of the losses at each t, with and without the condition."""
    names = {name for row in rows for name in row["values"] if name.startswith("loss/conditioned at ")}
    return {float(name.rpartition(" ")[2]): (name, name.replace("conditioned", "free")) for name in names}


def _by_seed(
    rows: Sequence[Mapping[str, Any]], measure: str, weights: Contrast, where: Mapping[str, Any]
) -> tuple[float, ...]:
    return compared(rows, measure, weights, **where).seeds


def _paired(one: Sequence[float], other: Sequence[float]) -> Difference:
    return difference([a - b for a, b in zip(one, other, strict=True)])


def _table(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> list[str]:
    arms = ["untrained", *sorted({row["arm"] for row in rows} - {"untrained"})]
    names = [name for name, weights in CONTRASTS.items() if set(weights) <= set(arms) and name != "interaction"]
    lines = [f"| measure | {' | '.join([*arms, *names])} |", f"| --- |{' ---: |' * (len(arms) + len(names))}"]
    for label, measure in (PRIMARY | SECONDARY).items():
        before = {key: value for key, value in where.items() if key != "length"}
        values = [means(rows, measure, arm, **(before if arm == "untrained" else where)) for arm in arms]
        if values[-1] is None:
            continue
        found = [compared(rows, measure, CONTRASTS[name], **where) for name in names]
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {label} | {' | '.join([*numbers, *map(_shown, found)])} |")
    return lines


def _shown(found: Difference) -> str:
    text = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    return f"**{text}**" if found.shown else text
