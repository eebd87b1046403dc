"""What an adapter says about itself, gathered from all the places where trainers leave it, for people and as JSON.

Our own facts come first (the header travels with the weights, ``training_config.json`` lies beside them), then
Side-Step's ``training_config.json``, kohya-style headers, upstream's LoKr header, and PEFT's configuration. What none
of them says is listed as missing; what follows from the model's name alone is marked as a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..text import is_control, shown
from ..variants import VARIANTS, Variant, guidance, inference_settings, member_of
from .finding import find_weights
from .header import facts_in_header
from .layers import Adapter, understand
from .origins import configured, facts_beside, kohya, merged, our_name, side_step, upstream
from .plausibility import check_schema, check_strengths, usable
from .weights_file import HASH_KEY, read_weights_file

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
    """What to generate with.

    Attributes:
        shift, num_inference_steps: None when not even a guess is possible.
        cfg: "on", "off", or None.
        guess: whether this follows from the model's variant instead of being written anywhere.
        because: where it comes from, for people.
    """

    shift: float | None
    num_inference_steps: int | None
    cfg: str | None
    guess: bool
    because: str


@dataclass(frozen=True)
class Report:
    """What an adapter says about itself.

    Attributes:
        adapter: the weights file and its layers.
        written_by: the program that wrote it, as far as that shows.
        facts: what is known, under the keys of ``training_config.json``; nothing that is not.
        generate: what to generate with.
        intact: whether the tensors have the hash that the header says; None when it says none.
        missing: what is not known, for people.
        notes: what to know besides.
        problems: what is wrong, although the weights can be read.
    """

    adapter: Adapter
    written_by: str
    facts: Mapping[str, Any]
    generate: Generate
    intact: bool | None
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def inspect_adapter(path: Path) -> Report:
    """Gather what the adapter at a path says about itself: a weights file, or the folder of an adapter or a run.

    Raises:
        Refusal: there is no readable adapter for ACE-Step 1.5.
    """
    adapter = understand(read_weights_file(find_weights(path)))
    metadata = adapter.file.metadata
    notes: list[str] = []
    problems = list(adapter.problems)

    own = facts_in_header(metadata)
    beside = facts_beside(adapter, problems)
    if own is not None or (beside is not None and "schema_version" in beside):
        written_by = our_name(own or beside or {})
        facts = configured(adapter) | merged(own, beside, notes)
        check_schema(facts, notes)
    elif beside is not None:
        written_by, facts = "Side-Step", side_step(beside) | configured(adapter)
    elif any(key.startswith(("ss_", "modelspec.")) for key in metadata):
        written_by, facts = "a trainer with kohya-style metadata", kohya(metadata) | configured(adapter)
    else:
        written_by = "ACE-Step" if "lokr_config" in metadata else "ACE-Step or another PEFT trainer"
        facts = upstream(metadata, notes) | configured(adapter)
    facts = usable(facts, notes)
    facts["adapter_type"] = adapter.kind
    check_strengths(adapter, facts, notes)

    intact = None
    if said := metadata.get(HASH_KEY):
        intact = said.lower() == adapter.file.data_hash()
        if not intact:
            # Other programs change tensors and leave the hash as it was; this one writes both at once.
            place = problems if own is not None else notes
            place.append(
                "The tensors are not those that the header's hash was made of: the file was changed or damaged."
            )
    strange = sorted(
        key for key, text in metadata.items() if any(is_control(c) and c not in "\n\r\t" for c in key + text)
    )
    if strange:
        problems.append(f"Control characters in the header ({shown(', '.join(strange), 100)}); they are shown escaped.")
    if len(adapter.idle) == len(adapter.layers):
        notes.append(
            "This adapter changes nothing: all its layers hold zeros, as before the first optimizer step. Choose a "
            "later checkpoint."
        )
    if adapter.unknown:
        notes.append(f"{len(adapter.unknown)} tensors are no part of an adapter, such as {shown(adapter.unknown[0])}.")
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
            because="nothing says which model it was trained on. Trained on turbo: shift 3.0, 8 steps, CFG off; on "
            "base or sft: shift 1.0, 50 steps, CFG on",
        )
    known: Variant = variant
    name = str(facts.get("model_name", ""))
    own_shift, own_steps = inference_settings(known, name)
    because = f"the file does not say; these are what {member_of(known, name)} models take"
    return Generate(shift or own_shift, steps or own_steps, cfg, guess=True, because=because)
