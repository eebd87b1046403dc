"""Inspects an adapter: gathers what is known about it from all the places where trainers write it.

Our own facts come first: those in the header, then those in ``training_config.json``. After them come Side-Step's
``training_config.json``, kohya-style headers, upstream's LoKr header and PEFT's configuration. Impossible values are
left out, with a note, and facts that none of them has are listed as missing. What follows only from the model's name is
marked as a guess.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..text import is_control, shown
from ..variants import VARIANTS, Variant, guidance, inference_settings, member_of
from .facts import FACTS, SCHEMA_VERSION, SWITCHES, TEXT_FACTS
from .header import facts_in_header
from .kinds import BY_NAME
from .layers import Adapter, read_adapter
from .origins import configured, facts_beside, kohya, merged, our_name, side_step, upstream
from .peft_config import unread_pattern
from .weights_file import HASH_KEY

_HUGE: Final = 1e15
_COUNTS: Final = ("trained_layers", "songs", "epoch", "global_step", "training_steps")
_WHOLE: Final = frozenset({"num_inference_steps", *_COUNTS})
_RANGES: Final = {
    "shift": (1e-6, _HUGE),
    "num_inference_steps": (1, _HUGE),
    "cfg_ratio": (0.0, 1.0),
    "timestep_sigma": (0.0, _HUGE),
    "rank": (1, _HUGE),
    "alpha": (1e-9, _HUGE),
    "dropout": (0.0, 1.0),
    "crop_seconds": (1e-6, _HUGE),
    "average_energy": (0.0, 1.0),
    "copy_strength": (-100.0, 100.0),
    **dict.fromkeys(_COUNTS, (0, _HUGE)),
}

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
    """Inspect an adapter: a weights file, or the folder of an adapter or a training. Raises Refusal and OSError."""
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


def usable(facts: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The facts in their usual order, without impossible values. Adds a note for each of these."""
    usable = {}
    for key in dict.fromkeys((*FACTS, *facts)):
        value = facts.get(key)
        if value is None or value == "":
            continue
        if _can_be(key, value):
            usable[key] = value
        else:
            notes.append(f"{shown(key, 60)} = {shown(value, 60)} is not a possible value and is ignored.")
    return usable


def _can_be(key: str, value: Any) -> bool:
    """Whether a value is possible for a key. Unknown keys may have numbers, booleans, strings, and lists of these."""
    if isinstance(value, str):
        known = key not in FACTS or key in TEXT_FACTS or key == "target_modules"
        return known and len(value) <= 5000 and not any(unicodedata.category(c) == "Cs" for c in value)
    if key in TEXT_FACTS:
        return False
    if key == "timestep_schedule":
        times = value if isinstance(value, list) else []
        return len(times) > 1 and all(_is_number(t) and 0 < t <= 1 for t in times) and times[1] < 1
    if isinstance(value, list):
        listable = key not in FACTS or (key == "target_modules" and all(isinstance(name, str) for name in value))
        return listable and len(value) <= 1000 and all(not isinstance(one, list) and _can_be("", one) for one in value)
    if key == "target_modules":
        return False
    if isinstance(value, bool):
        return key not in FACTS or key in SWITCHES
    if key in SWITCHES:
        return False
    low, high = _RANGES.get(key, (-_HUGE, _HUGE))
    return _is_number(value) and low <= value <= high and (key not in _WHOLE or isinstance(value, int))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_HUGE <= value <= _HUGE  # false for NaN as well


def check_schema(facts: Mapping[str, Any], notes: list[str]) -> None:
    """Add a note if the facts are of an unknown or newer schema version."""
    version = facts.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or abs(version) > _HUGE:
        notes.append(f"Its schema_version is {shown(version)}, expected a number. The keys that are known are used.")
    elif version > SCHEMA_VERSION:
        notes.append(
            f"Its facts were written by a newer version of this program (schema {version}, this one knows "
            f"{SCHEMA_VERSION}). The keys that are known are used."
        )


def check_strengths(adapter: Adapter, facts: Mapping[str, Any], notes: list[str]) -> None:
    """Add a note if the files beside the weights give another strength than the header."""
    rank, alpha = facts.get("rank"), facts.get("alpha")
    plain = adapter.kind in BY_NAME and len(adapter.strengths) == 1
    if not plain or not isinstance(rank, int | float) or not isinstance(alpha, int | float) or not rank:
        return
    (strength,) = adapter.strengths
    if abs(alpha / rank - strength) > 1e-6 * strength and not adapter.config.get("use_rslora"):
        notes.append(
            f"It was saved with strength {alpha / rank:.4g}, but {adapter.config_source or 'its tensors'} would give "
            f"it strength {strength:.4g}."
        )
