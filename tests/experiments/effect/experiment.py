"""Runs the cells of a preset, one JSON file each, so that a stopped run goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sidestep_plugin import Refusal
from sidestep_plugin.files import replacing

from . import base_model, data, runs
from .evaluation import Bench, evaluate
from .judge import judge
from .measures import Scale
from .presets import EXACT, Preset

PACKAGES = ("torch", "transformers", "peft", "lightning", "sidestep-plugin")
Say = Callable[[str], None]


def run(preset: Preset, out: Path, root: Path | None, say: Say) -> None:
    """Train the base model, judge it, and compute all cells that are not there yet.

    Raises:
        Refusal: `out` holds cells of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(preset, root)
    _same_settings(out / "settings.json", settings)
    trainer = _import_trainer(root, out)
    model = base_model.build(preset, root, out)
    domain = data.base_domain(preset.channels, preset.hidden)
    scale = Scale.of(data.draw(domain, max(1024, preset.judged), preset.frames, 1).latents)
    base_model.train(preset, model, out / "base.pt", say, domain)
    if not (out / "judged.json").exists():
        write_json(out / "judged.json", judge(preset, model, scale, domain))
    say(verdict(read_json(out / "judged.json")))
    _run_cells(Bench(preset, model, scale, domain), trainer, out, say)


def _run_cells(bench: Bench, trainer: Any, out: Path, say: Say) -> None:
    todo = runs.cells(bench.preset)
    (out / "cells").mkdir(exist_ok=True)
    files = {cell: out / "cells" / f"{cell.name}.json" for cell in todo}
    left = [cell for cell in todo if not files[cell].exists()]
    say(f"{len(todo)} cells, {len(todo) - len(left)} of them are finished")
    began = time.monotonic()
    for number, cell in enumerate(left):
        write_json(files[cell], run_cell(bench, trainer, cell, out))
        seconds = time.monotonic() - began
        remaining = seconds / (number + 1) * (len(left) - number - 1)
        say(f"{cell.name}: {number + 1} of {len(left)}, {remaining / 60:.0f} min left")


def run_cell(bench: Bench, trainer: Any, cell: runs.Cell, out: Path) -> dict[str, Any]:
    """Train and measure one cell | returns what its file holds."""
    preset = bench.preset
    target = data.target_domain(cell.domain, bench.domain, cell.seed)
    training = runs.training_songs(preset, target, cell)
    found: dict[str, Any] = {
        "domain": cell.domain,
        "songs": cell.songs,
        "seed": cell.seed,
        "arm": cell.arm.name if cell.arm else "untrained",
        "lengths": {},
    }
    began = time.monotonic()
    if cell.arm is None:
        found["lengths"]["0"] = evaluate(bench, cell, target, training, None, last=True)
    else:
        means = runs.Means(preset.means) if preset.means else None
        trained = runs.train(preset, trainer, bench.model, cell, training, out / "work", means=means)
        measured = [(steps, weights, {} if means is None else means.now()) for steps, weights in trained]
        for steps, weights, averaged in measured:
            last = steps == max(preset.lengths) and means is None
            found["lengths"][str(steps)] = evaluate(bench, cell, target, training, weights, last)
            for name, mean in averaged.items():
                of_mean = found.setdefault("means", {}).setdefault(name, {})
                looked = bench if name == EXACT else replace(bench, preset=replace(preset, early=()))
                of_mean[str(steps)] = evaluate(looked, cell, target, training, mean, False)
    found["seconds"] = round(time.monotonic() - began, 1)
    return found


def settings_of(preset: Preset, root: Path | None) -> dict[str, Any]:
    """What the numbers depend on, with versions. Of a checkout only the hash of its trainer, no local path."""
    trainer = root / "acestep" / "training" / "trainer.py" if root else None
    return {
        "preset": preset.described(),
        "trainer": hashlib.sha256(trainer.read_bytes()).hexdigest()[:16] if trainer else "miniature",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": platform.machine(),
    }


def verdict(judged: dict[str, Any]) -> str:
    """How the base model was judged, in a line."""
    line = (
        f"base model: samples are {judged['samples']:.3f} from real songs, {judged['ratio']:.2f} times the noise floor "
        f"{judged['floor']:.3f} (highest {judged['floor_highest']:.3f}); beyond it {100 * judged['beyond']:.1f} % of "
        f"the way to a far domain ({judged['far']:.2f}; noise {judged['noise']:.1f}): "
    )
    return line + ("it can generate" if judged["can_generate"] else "it CANNOT generate: no base for conclusions")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file that is whole or not there; a long one without indentation."""
    with replacing(file) as stream:
        stream.write((json.dumps(content, indent=None if len(str(content)) > 10_000 else 1) + "\n").encode())


def rounded(content: Any) -> Any:
    """The same with six significant digits, which is more than the numbers are worth."""
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    return [rounded(value) for value in content] if isinstance(content, list | tuple) else content


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _same_settings(file: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        write_json(file, settings)
    elif (found := read_json(file)) != settings:
        different = [key for key in settings if found.get(key) != settings[key]]
        raise Refusal(
            f"{file.parent} holds an experiment with other settings ({', '.join(different)}). Numbers of two settings "
            "cannot be mixed: choose another folder with --out, or delete that one."
        )


def _import_trainer(root: Path | None, out: Path) -> Any:
    from sidestep_plugin import miniature
    from sidestep_plugin.engine.checkout import import_trainer

    with contextlib.suppress(ImportError):  # upstream's own log, which the miniature does without
        from loguru import logger

        logger.remove()
    return import_trainer(root or miniature.write_checkout(out / "checkout"))
