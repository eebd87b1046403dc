"""The report of an inspection, as lines for people and as plain values for JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from ..text import counted, shown
from ..variants import member_of
from .inspection import Report
from .kinds import title_of
from .kinds.lora import LORA
from .layer_names import some
from .layers import Adapter


def as_json(report: Report) -> dict[str, Any]:
    """A report as plain values. A file and the folder that it lies in give the same, except for the path."""
    adapter = report.adapter
    return {
        "file": str(adapter.file.path),
        "written_by": report.written_by,
        "adapter_type": adapter.kind,
        "dora": adapter.is_dora,
        "generate": asdict(report.generate),
        "layers": len(adapter.layers),
        "trained_layers": len(adapter.layers) - len(adapter.untrained),
        "untrained_layers": len(adapter.untrained),
        "targets": adapter.targets,
        "ranks": dict(sorted(adapter.ranks.items())),
        "strengths": dict(sorted(adapter.strengths.items())),
        "dtypes": dict(sorted(dtypes(adapter).items())),
        "tensor_bytes": tensor_bytes(adapter),
        "facts": dict(report.facts),
        "intact": report.intact,
        "missing": list(report.missing),
        "notes": list(report.notes),
        "problems": list(report.problems),
    }


def dtypes(adapter: Adapter) -> Counter[str]:
    """Number of tensors by dtype. Single numbers are not counted."""
    return Counter(tensor.dtype for tensor in adapter.file.tensors.values() if tensor.shape)


def tensor_bytes(adapter: Adapter) -> int:
    """Size of all tensors in bytes."""
    return sum(tensor.end - tensor.start for tensor in adapter.file.tensors.values())


def as_text(report: Report) -> list[str]:
    """A report as lines for people. Everything from the files is escaped for the terminal."""
    adapter, facts, generate = report.adapter, report.facts, report.generate
    kind = "DoRA" if adapter.is_dora and adapter.kind == LORA.name else title_of(adapter.kind)
    size = "XL " if facts.get("model_size") == "XL" else ""
    model = member_of(str(facts.get("model_variant", "of unknown variant")), str(facts.get("model_name", "")))
    name = f" ({shown(facts['model_name'])})" if "model_name" in facts else ""
    lines = [
        shown(adapter.file.path, 1000),
        f"{kind} for ACE-Step 1.5 {size}{shown(model)}{name}, written by {report.written_by}",
    ]

    def add(label: str, text: object) -> None:
        lines.append(f"  {label + ':':<11}{text}")

    for key in ("title", "author", "trigger", "license", "created"):
        if key in facts:
            add(key.capitalize(), shown(facts[key], 1000))
    if "average_of" in facts:
        add("Mean of", shown(facts["average_of"], 1000))
    if generate.shift is None or generate.num_inference_steps is None:
        add("Generate", f"unknown: {generate.because}")
    else:
        guess = f" (a guess: {generate.because})" if generate.guess else ""
        guidance = f", CFG {generate.cfg}" if generate.cfg else ""
        add(
            "Generate",
            f"shift {shown(generate.shift)}, {counted(shown(generate.num_inference_steps), 'step')}{guidance}{guess}",
        )
    add("Strength", _strength(report))
    add("Weights", _weights(report))
    if trained := _trained(facts):
        add("Trained", trained)
    if report.missing:
        add("Missing", ", ".join(report.missing))
    for note in report.notes:
        add("Note", note)
    return [shown(line, 5000) for line in lines]


def _strength(report: Report) -> str:
    adapter, facts = report.adapter, report.facts
    ranks, strengths = adapter.ranks, adapter.strengths
    if adapter.kind != LORA.name and "rank" in facts:
        return _strength_of_lokr(adapter, facts)
    rank = _span(ranks, "rank ", "ranks ") or "rank unknown"
    if not strengths:
        return f"{rank}, alpha unknown: programs without an alpha use strength 1"
    alphas = {layer.alpha for layer in adapter.layers.values() if layer.alpha is not None}
    return f"{_span(strengths, '', '')} ({rank}, {_span(alphas, 'alpha ', 'alphas ')}), inside the adapter"


def _strength_of_lokr(adapter: Adapter, facts: Any) -> str:
    trained = [layer for name, layer in adapter.layers.items() if name not in adapter.untrained]
    whole = sum(layer.rank is None for layer in trained)
    settings = f"dimension {shown(facts['rank'])}, alpha {shown(facts.get('alpha', 'unknown'))}"
    if whole == len(trained) > 0:
        return f"1 ({settings}, without effect: these are full matrices)"
    some_whole = f"; full matrices at strength 1 in {whole} of {len(trained)} layers" if whole else ""
    strength = _span(adapter.strengths, "", "")
    return f"{strength} ({settings}{some_whole})" if strength else settings


def _weights(report: Report) -> str:
    adapter = report.adapter
    idle = len(adapter.untrained)
    trained = len(adapter.layers) - idle or len(adapter.layers)
    left = "were not trained" if len(adapter.idle) < idle else "hold only zeros and change nothing"
    whole = ", unchanged since saving" if report.intact else ""
    rest = f"; {idle} more layers {left}" if 0 < idle < len(adapter.layers) else ""
    return (
        f"{counted(trained, 'layer')} ({some(adapter.targets, 6)}), {', '.join(sorted(dtypes(adapter)))}, "
        f"{_size(tensor_bytes(adapter))}{whole}{rest}"
    )


def _span(values: Any, one: str, several: str) -> str:
    ordered = sorted(values)
    if not ordered:
        return ""
    return f"{one}{ordered[0]:g}" if len(ordered) == 1 else f"{several}{ordered[0]:g} to {ordered[-1]:g}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _trained(facts: Any) -> str:
    parts = []
    if "songs" in facts:
        songs, out = facts["songs"], facts.get("held_out_songs")
        if isinstance(songs, int) and isinstance(out, int) and out:
            parts.append(f"on {songs - out} of {counted(songs, 'song')} ({out} held out)")
        else:
            parts.append(f"on {counted(shown(songs), 'song')}")
    if isinstance(facts.get("validation_change"), int | float):
        parts.append(f"validation loss {100 * facts['validation_change']:+.2f} % vs. no adapter")
    if "training_steps" in facts:
        parts.append(f"{counted(shown(facts['training_steps']), 'step')}")
    if "timestep_law" in facts or "timestep_mode" in facts:
        parts.append(f"timesteps: {shown(facts.get('timestep_law', facts.get('timestep_mode')))}")
    if isinstance(facts.get("cfg_ratio"), int | float):
        parts.append(f"condition dropout {100 * facts['cfg_ratio']:.4g} %")
    if facts.get("base_weights"):
        parts.append(f"base weights in {shown(facts['base_weights'])}")
    if isinstance(facts.get("crop_seconds"), int | float):
        parts.append(f"windows of {facts['crop_seconds']:g} s")
    return ", ".join(parts)
