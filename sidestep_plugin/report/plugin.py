"""Summarizes a training: loss by epoch and by band of t, sampled timesteps, rows without prompt, time per step.

TensorBoard gets the same once per epoch, and so does ``index.html`` in the output folder, the page of the training. At
the end it is written to ``training_report.json``. Steps are only noted: values are fetched from the device once per
epoch. A step has one loss, so with a batch of several songs it counts for the band of each of its rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..files import replacing
from ..hookspecs import hookimpl
from ..run import ROWS_WITHOUT_CONDITION, Run, Step
from ..songs.fingerprint import ENTRY as TRAINED_SONGS
from ..songs.fingerprint import hashes_of
from ..text import counted
from ..timesteps.shares import band_of
from ..timesteps.treatment import treatment_of
from .live_page import LivePage
from .page import FILE_NAME as PAGE

if TYPE_CHECKING:
    import torch

FILE_NAME: Final = "training_report.json"
SCHEMA_VERSION: Final = 1
BANDS: Final = 10

_KEY: Final = "sidestep.report"
_PAGE: Final = "sidestep.page"

_KEPT: Final = "report"
"""Name under which a checkpoint keeps what was counted, so that a resumed training reports on all of it."""


@dataclass
class _Notes:
    """What was noted of a training: rows, losses and dropped are about all its runs, the others about this one."""

    steps: list[tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=list)  # of the current epoch
    rows: list[int] = field(default_factory=lambda: [0] * BANDS)
    losses: list[float] = field(default_factory=lambda: [0.0] * BANDS)
    dropped: int = 0
    count: int = 0


@hookimpl
def engine_planned(run: Run) -> None:
    notes = run.state[_KEY] = _noted_before(run.kept.get(_KEPT))
    run.before_run_ended.append(partial(_count, run, notes))
    run.keeps[_KEPT] = partial(_to_keep, run, notes)
    if run.ranks.first:
        page = run.state[_PAGE] = LivePage(run, partial(_report, run, notes))
        run.engine.at_end(page.close)


@hookimpl
def engine_training_began(run: Run) -> list[str]:
    page: LivePage | None = run.state.get(_PAGE)
    return [] if page is None else page.begin()


@hookimpl
def acestep_between_epochs(run: Run, epoch: int) -> None:
    """Write the page anew: the last part that is asked between two epochs, behind validation and previews."""
    page: LivePage | None = run.state.get(_PAGE)
    if page is not None:
        page.epoch_over(epoch)


def _noted_before(kept: Any) -> _Notes:
    """What a checkpoint has kept; nothing where it is of an earlier version, or unusable."""
    try:
        rows, losses = [int(count) for count in kept["rows"]], [float(loss) for loss in kept["losses"]]
        if len(rows) == len(losses) == BANDS:
            return _Notes(rows=rows, losses=losses, dropped=int(kept["dropped"]))
    except (TypeError, LookupError, ValueError):
        pass
    return _Notes()


def _to_keep(run: Run, notes: _Notes) -> dict[str, Any]:
    if notes.steps and not run.ranks.several:  # several have counted together: when the epoch ended, or the run
        _count(run, notes)
    return {"rows": list(notes.rows), "losses": list(notes.losses), "dropped": notes.dropped}


@hookimpl
def acestep_step_finished(step: Step) -> None:
    if not step.training or step.loss is None:
        return
    if _KEY not in step.run.state:  # without upstream's trainer
        step.run.state[_KEY] = _Notes()
    notes: _Notes = step.run.state[_KEY]
    notes.count += 1
    t, loss = step.t, step.loss
    notes.steps.append((t.detach() if t is not None and t.requires_grad else t, loss))


@hookimpl
def acestep_epoch_finished(run: Run) -> Mapping[str, float | torch.Tensor] | None:
    notes: _Notes | None = run.state.get(_KEY)
    if notes is None:
        return None
    before = list(zip(notes.rows, notes.losses, strict=True))
    times = _count(run, notes)
    logged: dict[str, float | torch.Tensor] = {} if times is None else {"train/t": times}
    for band, (rows, losses) in enumerate(before):
        if new := notes.rows[band] - rows:
            logged[f"train/loss at t {band / BANDS:.1f}-{(band + 1) / BANDS:.1f}"] = (notes.losses[band] - losses) / new
    return logged


@hookimpl
def acestep_run_ended(run: Run, ending: str, folder: Path) -> list[str] | None:
    notes: _Notes | None = run.state.get(_KEY)
    if notes is None:
        return None
    _count(run, notes)
    page: LivePage | None = run.state.get(_PAGE)
    if page is not None:
        page.ended(ending)
    report = _report(run, notes, ending)
    lines = _lines(report)
    try:
        with replacing(folder / FILE_NAME) as stream:
            stream.write((json.dumps(report, indent=2, allow_nan=False) + "\n").encode("utf-8"))
        beside = f" (page: {PAGE})" if page is not None and page.written else ""
        lines.append(f"Report: {folder / FILE_NAME}{beside}")
    except OSError as error:
        with suppress(OSError):  # an older one would pass for that of this training
            (folder / FILE_NAME).unlink(missing_ok=True)
        lines.append(f"Warning: no report could be written to {folder}: {error.strerror or error}.")
    return [line for line in lines if line] if ending == "finished" else None


def _count(run: Run, notes: _Notes) -> torch.Tensor | None:
    """Add the steps since the last call to the bands | returns their timesteps on the CPU. Waits for the device."""
    import torch

    if not notes.steps:
        return None
    dropped = run.state.pop(ROWS_WITHOUT_CONDITION, None)
    steps = [(t, loss) for t, loss in notes.steps if t is not None]
    notes.steps.clear()
    own = (int(torch.cat(dropped).sum()) if dropped else 0, _rows(steps))
    everybodys = run.gather(own)
    notes.dropped += sum(count for count, _ in everybodys)
    rows = [rows for _, rows in everybodys if rows is not None]
    if not rows:
        return None
    times, of_rows = (torch.cat(parts) for parts in zip(*rows, strict=True))
    for t, loss in zip(times.tolist(), of_rows.tolist(), strict=True):
        if math.isfinite(loss) and math.isfinite(t):
            band = band_of(min(max(t, 0.0), 1.0), BANDS)
            notes.rows[band] += 1
            notes.losses[band] += loss
    return times


def _rows(steps: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The timestep of each row and the loss of its step, two tensors [N] on the CPU; None without steps."""
    import torch

    if not steps:
        return None
    sizes = [t.numel() for t, _ in steps]
    times = torch.cat([t.reshape(-1).float() for t, _ in steps]).cpu()
    losses = torch.stack([loss.reshape(()).float() for _, loss in steps]).cpu()
    return times, losses.repeat_interleave(torch.tensor(sizes))


def _report(run: Run, notes: _Notes, ending: str) -> dict[str, Any]:
    treatment = treatment_of(run)
    by_epoch = run.loss_by_epoch
    a_step = run.clock.seconds_per_step
    rows = sum(notes.rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "ending": ending,
        "model_name": treatment.model_name,
        "model_variant": treatment.variant,
        "adapter_type": run.adapter_type,
        "training_steps": run.steps,
        "steps_of_this_run": notes.count,
        "seconds_per_step": None if a_step is None else round(a_step, 6),
        "loss_by_epoch": [{"epoch": epoch, "loss": _finite(by_epoch[epoch])} for epoch in sorted(by_epoch)],
        "loss_by_t": [
            {
                "from": band / BANDS,
                "to": (band + 1) / BANDS,
                "rows": notes.rows[band],
                "loss": _finite(notes.losses[band] / notes.rows[band]) if notes.rows[band] else None,
            }
            for band in range(BANDS)
        ],
        "rows": rows,
        "rows_without_condition": notes.dropped,
        "cfg_ratio": treatment.cfg_ratio,
        # While it trains, nobody compares its adapters on the page.
        **({} if run.engine is None or ending == "training" else {TRAINED_SONGS: hashes_of(run.engine.songs)}),
        **{name: entry for tell in run.reports for name, entry in tell().items()},
    }


def _finite(number: float) -> float | None:
    """A number for JSON, which has no NaN and no infinity."""
    return round(number, 6) if math.isfinite(number) else None


def _lines(report: Mapping[str, Any]) -> list[str]:
    parts = []
    losses = [entry["loss"] for entry in report["loss_by_epoch"] if entry["loss"] is not None]
    if losses:
        first, last = (report["loss_by_epoch"][place]["epoch"] for place in (0, -1))
        later = f", mean of epoch {last} {losses[-1]:.4f}" if last != first else ""
        parts.append(f"Loss: mean of epoch {first} {losses[0]:.4f}{later}")
    if report["cfg_ratio"] > 0.0 and report["rows"]:
        share = 100 * report["rows_without_condition"] / report["rows"]
        parts.append(f"{share:.1f} % of {counted(report['rows'], 'row')} without their prompt")
    if report["seconds_per_step"] is not None:
        parts.append(f"{report['seconds_per_step']:.3g} s per step")
    bands = [
        f"{band['from']:.1f}-{band['to']:.1f} {band['loss']:.3f}"
        for band in report["loss_by_t"]
        if band["loss"] is not None
    ]
    return ["; ".join(parts), *([f"Loss by t: mean at {', '.join(bands)}"] if bands else [])]
