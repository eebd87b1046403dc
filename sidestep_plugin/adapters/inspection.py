"""Inspects an adapter: gathers what is known about it from all the places where trainers write it.

Our own facts come first: those in the header, then those in ``training_config.json``. After them come Side-Step's
``training_config.json``, kohya-style headers, upstream's LoKr header and PEFT's configuration. Facts that none of them
has are listed as missing. What follows only from the model's name is marked as a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..text import is_control, shown
from ..variants import VARIANTS, Variant, guidance, inference_settings, member_of
from .header import facts_in_header
from .layers import Adapter, read_adapter
from .origins import configured, facts_beside, kohya, merged, our_name, side_step, upstream
from .peft_config import unread_pattern
from .plausibility import check_schema, check_strengths, usable
from .weights_file import HASH_KEY

_WANTED: Final = {
    "model_name": "the model",
    "model_variant": "its variant",
    "shift": "shift",
    "num_inference_steps": "number of steps",
    "alpha": "alpha",
    "songs": "number of songs",
    "training_steps": "training steps",
}


@dataclass(frozen=True)
class Generate:
    """What to generate with."""

    # shift, num_inference_steps: None if they are unknown and cannot be guessed.
    shift: float | None
    num_inference_steps: int | None
    cfg: str | None  # "on", "off", or None if unknown
    guess: bool  # whether they are not written in any file, but follow from the model's variant
    because: str  # where they come from, for people


@dataclass(frozen=True)
class Report:
    """The result of an inspection; `missing`, `notes` and `problems` are for people."""

    adapter: Adapter
    written_by: str  # the program that wrote it, as far as can be told
    facts: Mapping[str, Any]  # the known facts, under the keys of ``training_config.json``
    generate: Generate
    intact: bool | None  # whether the tensors match the hash in the header. None if there is no hash.
    missing: tuple[str, ...]  # names of unknown facts
    notes: tuple[str, ...]
    problems: tuple[str, ...]  # what is wrong although the weights can be read


def inspect_adapter(path: Path) -> Report:
    """Inspect the adapter at a path, which is a weights file or the folder of an adapter or a training.

    Raises:
        OSError: the weights cannot be read.
        Refusal: there is no readable adapter for ACE-Step 1.5.
    """
    adapter = read_adapter(path)
    notes: list[str] = []
    problems = list(adapter.problems)
    written_by, gathered = _gather(adapter, notes, problems)
    facts = usable(gathered, notes)
    facts["adapter_type"] = adapter.kind
    check_strengths(adapter, facts, notes)
    intact = _check_header(adapter, notes, problems)
    _check_layers(adapter, notes)
    return Report(
        adapter=adapter,
        written_by=written_by,
        facts=facts,
        generate=_generate(facts),
        intact=intact,
        missing=tuple(text for key, text in _WANTED.items() if facts.get(key) is None),
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _gather(adapter: Adapter, notes: list[str], problems: list[str]) -> tuple[str, dict[str, Any]]:
    """The program that wrote an adapter, and the facts that its files hold, not checked yet."""
    metadata = adapter.file.metadata
    own = facts_in_header(metadata)
    beside = facts_beside(adapter, problems)
    if own is not None or (beside is not None and "schema_version" in beside):
        facts = configured(adapter) | merged(own, beside, notes)
        check_schema(facts, notes)
        return our_name(own or beside or {}), facts
    if beside is not None:
        return "Side-Step", side_step(beside) | configured(adapter)
    if any(key.startswith(("ss_", "modelspec.")) for key in metadata):
        return "a trainer with kohya-style metadata", kohya(metadata) | configured(adapter)
    written_by = "ACE-Step" if "lokr_config" in metadata else "ACE-Step or another PEFT trainer"
    return written_by, upstream(metadata, notes) | configured(adapter)


def _check_header(adapter: Adapter, notes: list[str], problems: list[str]) -> bool | None:
    """Check the header's texts and its hash. Returns whether the tensors match the hash, None if there is none."""
    metadata = adapter.file.metadata
    intact = None
    if said := metadata.get(HASH_KEY):
        intact = said.lower() == adapter.file.data_hash()
        if not intact:
            # Other programs may change tensors and keep the old hash. This one always writes both.
            place = problems if facts_in_header(metadata) is not None else notes
            place.append("The tensors do not match the hash in the header: the file was changed or damaged.")
    strange = sorted(
        key for key, text in metadata.items() if any(is_control(c) and c not in "\n\r\t" for c in key + text)
    )
    if strange:
        problems.append(
            f"The header has control characters ({shown(', '.join(strange), 100)}). They are shown escaped."
        )
    return intact


def _check_layers(adapter: Adapter, notes: list[str]) -> None:
    if len(adapter.untrained) == len(adapter.layers):
        notes.append(
            "This adapter changes nothing: all its layers hold zeros, as before the first optimizer step. Choose a "
            "later checkpoint."
        )
    if adapter.unknown:
        some_tensors = f"{len(adapter.unknown)} tensors do" if len(adapter.unknown) > 1 else "1 tensor does"
        notes.append(f"{some_tensors} not belong to an adapter, such as {shown(adapter.unknown[0])}.")
    pattern = unread_pattern(adapter.config)
    if pattern is not None and any(layer.alpha is None for layer in adapter.layers.values()):
        notes.append(f"The alphas are unknown: alpha_pattern has the regular expression '{shown(pattern, 100)}'.")


def _generate(facts: Mapping[str, Any]) -> Generate:
    shift, steps, variant = facts.get("shift"), facts.get("num_inference_steps"), facts.get("model_variant")
    cfg = None if variant is None else guidance(variant)
    if shift is not None and steps is not None:
        return Generate(shift, steps, cfg, guess=False, because="saved with the adapter")
    if variant not in VARIANTS:
        return Generate(
            shift,
            steps,
            None,
            guess=True,
            because="the files do not say which model it was trained on. For turbo: shift 3.0, 8 steps, CFG off. For "
            "base or sft: shift 1.0, 50 steps, CFG on",
        )
    known: Variant = variant
    name = str(facts.get("model_name", ""))
    own_shift, own_steps = inference_settings(known, name)
    because = f"not in the file; these are the usual settings for {member_of(known, name)} models"
    return Generate(shift or own_shift, steps or own_steps, cfg, guess=True, because=because)
