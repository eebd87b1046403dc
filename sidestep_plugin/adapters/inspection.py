"""What an adapter says about itself, gathered from all the places where trainers leave it, for people and as JSON.

Our own facts come first (the header travels with the weights, ``training_config.json`` lies beside them), then
Side-Step's ``training_config.json``, kohya-style headers, upstream's LoKr header, and PEFT's configuration. What none
of them says is listed as missing; what follows from the model's name alone is marked as a guess.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..files import read_json_object
from ..text import is_control, shown
from ..variants import VARIANTS, Variant, guidance, inference_settings, words_of
from .facts import FACTS, FILE_NAME, SCHEMA_VERSION, TEXT_FACTS
from .header import facts_in_header
from .layers import Adapter, check_inside, find_weights, has_neighbours_of_its_own, some, understand
from .weights_file import HASH_KEY, read_weights_file

# What Side-Step 1.x calls its file, beside a checkpoint or in the folder above the final adapter.
_CONFIG_NAMES: Final = (FILE_NAME, "sidestep_training_config.json")
_ABOVE: Final = frozenset({"final", "best", "adapter"})

_WANTED: Final = {
    "model_name": "the model",
    "model_variant": "its variant",
    "shift": "shift",
    "num_inference_steps": "number of steps",
    "alpha": "alpha",
    "songs": "number of songs",
    "training_steps": "training steps",
}


_HUGE: Final = 1e15
_WHOLE: Final = frozenset({"num_inference_steps", "songs", "epoch", "global_step", "training_steps"})
_RANGES: Final = {
    "shift": (1e-6, _HUGE),
    "num_inference_steps": (1, _HUGE),
    "cfg_ratio": (0.0, 1.0),
    "timestep_sigma": (0.0, _HUGE),
    "rank": (1, _HUGE),
    "alpha": (1e-9, _HUGE),
    "dropout": (0.0, 1.0),
    **dict.fromkeys(("songs", "epoch", "global_step", "training_steps"), (0, _HUGE)),
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
    beside = _facts_beside(adapter, problems)
    if own is not None or (beside is not None and "schema_version" in beside):
        written_by = _our_name(own or beside or {})
        facts = _configured(adapter) | _merged(own, beside, notes)
        _check_schema(facts, notes)
    elif beside is not None:
        written_by, facts = "Side-Step", _side_step(beside) | _configured(adapter)
    elif any(key.startswith(("ss_", "modelspec.")) for key in metadata):
        written_by, facts = "a trainer with kohya-style metadata", _kohya(metadata) | _configured(adapter)
    else:
        written_by = "ACE-Step" if "lokr_config" in metadata else "ACE-Step or another PEFT trainer"
        facts = _upstream(metadata, notes) | _configured(adapter)
    facts = _usable(facts, notes)
    facts["adapter_type"] = adapter.kind
    _check_strengths(adapter, facts, notes)

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


def as_json(report: Report) -> dict[str, Any]:
    """A report as plain values, the same for a file as for the folder that it came from, but for its place."""
    adapter = report.adapter
    return {
        "file": str(adapter.file.path),
        "written_by": report.written_by,
        "adapter_type": adapter.kind,
        "dora": adapter.is_dora,
        "generate": {
            "shift": report.generate.shift,
            "num_inference_steps": report.generate.num_inference_steps,
            "cfg": report.generate.cfg,
            "guess": report.generate.guess,
            "because": report.generate.because,
        },
        "layers": len(adapter.layers),
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
    """Number of tensors by dtype; single numbers are not counted."""
    return Counter(tensor.dtype for tensor in adapter.file.tensors.values() if tensor.shape)


def tensor_bytes(adapter: Adapter) -> int:
    """Size of all tensors in bytes."""
    return sum(tensor.end - tensor.start for tensor in adapter.file.tensors.values())


def as_text(report: Report) -> list[str]:
    """A report as lines for people. Nothing from the file reaches a terminal unescaped."""
    adapter, facts, generate = report.adapter, report.facts, report.generate
    kind = {"lora": "DoRA" if adapter.is_dora else "LoRA", "lokr": "LoKr", "loha": "LoHA", "oft": "OFT"}[adapter.kind]
    size = "XL " if facts.get("model_size") == "XL" else ""
    name = f" ({shown(facts['model_name'])})" if "model_name" in facts else ""
    lines = [
        shown(adapter.file.path, 1000),
        f"{kind} for ACE-Step 1.5 {size}{shown(facts.get('model_variant', 'of unknown variant'))}{name}, written by "
        f"{report.written_by}",
    ]

    def add(label: str, text: object) -> None:
        lines.append(f"  {label + ':':<11}{text}")

    for key in ("title", "author", "trigger", "license", "created"):
        if key in facts:
            add(key.capitalize(), shown(facts[key], 1000))
    if generate.shift is None or generate.num_inference_steps is None:
        add("Generate", f"not known: {generate.because}")
    else:
        guess = f" (a guess: {generate.because})" if generate.guess else ""
        guidance = f", CFG {generate.cfg}" if generate.cfg else ""
        add("Generate", f"shift {shown(generate.shift)}, {shown(generate.num_inference_steps)} steps{guidance}{guess}")
    add("Strength", _strength(report))
    layers = f"{len(adapter.layers)} layers ({some(adapter.targets, 6)})"
    whole = ", as they were saved" if report.intact else ""
    add("Weights", f"{layers}, {', '.join(sorted(dtypes(adapter)))}, {_size(tensor_bytes(adapter))}{whole}")
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
    if adapter.kind != "lora" and "rank" in facts:
        return f"dimension {shown(facts['rank'])}, alpha {shown(facts.get('alpha', 'not known'))}"
    rank = _span(ranks, "rank ", "ranks ") or "rank not known"
    if not strengths:
        return f"{rank}, alpha not known: programs that find none play it at strength 1"
    alphas = {layer.alpha for layer in adapter.layers.values() if layer.alpha is not None}
    return f"{_span(strengths, '', '')} ({rank}, {_span(alphas, 'alpha ', 'alphas ')})"


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
        parts.append(f"on {shown(facts['songs'])} songs")
    if "training_steps" in facts:
        parts.append(f"{shown(facts['training_steps'])} steps")
    if "timestep_law" in facts or "timestep_mode" in facts:
        parts.append(f"timesteps: {shown(facts.get('timestep_law', facts.get('timestep_mode')))}")
    if isinstance(facts.get("cfg_ratio"), int | float):
        parts.append(f"condition dropout {100 * facts['cfg_ratio']:.4g} %")
    return ", ".join(parts)


# -- where facts come from -------------------------------------------------------------------------------------------


def _facts_beside(adapter: Adapter, problems: list[str]) -> dict[str, Any] | None:
    """The training_config.json that belongs to a weights file, ours or Side-Step's."""
    folder = adapter.file.path.absolute().parent
    if not has_neighbours_of_its_own(adapter.file.path):
        return None
    for place in (folder, folder.parent) if folder.name in _ABOVE else (folder,):
        for name in _CONFIG_NAMES:
            file = place / name
            if not file.is_file() and not file.is_symlink():
                continue
            try:
                check_inside(file, place)
                return read_json_object(file)
            except Refusal as refusal:
                problems.append(str(refusal))
            except (OSError, ValueError) as error:
                problems.append(f"{file} cannot be read: {shown(error)}.")
    return None


def _merged(own: dict[str, Any] | None, beside: dict[str, Any] | None, notes: list[str]) -> dict[str, Any]:
    """Our facts from header and folder. The header wins: it travels with the weights that it describes."""
    if own is None or beside is None or "schema_version" not in beside:
        return dict(own or beside or {})
    for key in FACTS:
        if own.get(key) is not None and beside.get(key) is not None and own[key] != beside[key]:
            notes.append(
                f"{FILE_NAME} says {key} = {shown(beside[key])}, the header of the weights {shown(own[key])}, "
                "which is taken."
            )
    return beside | {key: value for key, value in own.items() if value is not None}


def _usable(facts: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The facts in their order, without those whose value cannot be, which is said."""
    usable = {}
    for key in dict.fromkeys((*FACTS, *facts)):
        value = facts.get(key)
        if value is None or value == "":
            continue
        if _can_be(key, value):
            usable[key] = value
        else:
            notes.append(f"{shown(key, 60)} = {shown(value, 60)} cannot be; it is left out.")
    return usable


def _can_be(key: str, value: Any) -> bool:
    """Whether a fact has a value of its kind. Unknown ones may be numbers, switches, texts and lists of them."""
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
        return key not in FACTS
    low, high = _RANGES.get(key, (-_HUGE, _HUGE))
    return _is_number(value) and low <= value <= high and (key not in _WHOLE or isinstance(value, int))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_HUGE <= value <= _HUGE  # false for NaN as well


def _our_name(facts: Mapping[str, Any]) -> str:
    version = facts.get("sidestep_plugin_version")
    return f"sidestep-plugin {shown(version, 40)}" if version else "sidestep-plugin"


def _check_schema(facts: Mapping[str, Any], notes: list[str]) -> None:
    version = facts.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or abs(version) > _HUGE:
        notes.append(f"Its schema_version is {shown(version)}, expected a number; it is read as far as it is known.")
    elif version > SCHEMA_VERSION:
        notes.append(
            f"It was described by a newer version of this program (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); it is read as far as it is known."
        )


def _side_step(config: Mapping[str, Any]) -> dict[str, Any]:
    """Side-Step 1.x: flat keys, many of them called like ours; paths among them are not taken over."""
    words = words_of(str(config.get("model_variant") or ""))
    variant = next((name for name in VARIANTS if name in words), None)
    if variant is None and isinstance(config.get("is_turbo"), bool):
        variant = "turbo" if config["is_turbo"] else None
    taken = ("shift", "num_inference_steps", "timestep_mode", "timestep_mu", "timestep_sigma", "cfg_ratio", "dropout")
    facts = {key: config.get(key) for key in taken}
    return facts | {
        "model_name": _name_of(config.get("base_model") or config.get("model_variant")),
        "model_variant": variant,
        "model_size": "XL" if "xl" in words else None,
        "title": config.get("run_name"),
        "rank": config.get("r") or config.get("rank"),
        "alpha": config.get("alpha"),
        "trigger": config.get("trigger_word") or config.get("custom_tag"),
    }


def _kohya(metadata: Mapping[str, str]) -> dict[str, Any]:
    model = metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version")
    return {
        "title": metadata.get("modelspec.title") or metadata.get("ss_output_name"),
        "author": metadata.get("modelspec.author"),
        "license": metadata.get("modelspec.license"),
        "trigger": metadata.get("modelspec.trigger_phrase"),
        "created": metadata.get("modelspec.date"),
        "model_name": _name_of(model),
        "model_variant": _variant_in(_name_of(model) or ""),
        "rank": _whole(metadata.get("ss_network_dim")),
        "alpha": _number(metadata.get("ss_network_alpha")),
        "songs": _whole(metadata.get("ss_num_train_items") or metadata.get("ss_num_train_images")),
        "epoch": _whole(metadata.get("ss_epoch")),
        "global_step": _whole(metadata.get("ss_steps")),
        "training_steps": _whole(metadata.get("ss_steps")),
        "timestep_law": metadata.get("ss_timestep_sampling"),
    }


def _upstream(metadata: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """Upstream's LoKr header. Its shift and steps are turbo's whatever the model was, so they are not taken."""
    config, record = _object(metadata.get("lokr_config")), _object(metadata.get("run_metadata"))
    if "shift" in _object(record.get("training_config")):
        notes.append(
            "ACE-Step's own header names a shift and a number of steps that do not depend on the model; unused."
        )
    return {
        "rank": config.get("linear_dim"),
        "alpha": config.get("linear_alpha"),
        "songs": record.get("num_samples"),
    }


def _configured(adapter: Adapter) -> dict[str, Any]:
    """What PEFT's configuration and the tensors say."""
    name = _name_of(adapter.config.get("base_model_name_or_path"))
    ranks, alphas = adapter.ranks, {layer.alpha for layer in adapter.layers.values()}
    found: dict[str, Any] = {
        "model_name": name,
        "model_variant": _variant_in(name or ""),
        "rank": next(iter(ranks)) if len(ranks) == 1 and adapter.kind == "lora" else None,
        "alpha": _plain(next(iter(alphas))) if len(alphas) == 1 and adapter.kind == "lora" else None,
        "dropout": adapter.config.get("lora_dropout"),
        "target_modules": adapter.targets,
    }
    return {key: value for key, value in found.items() if value is not None}


def _check_strengths(adapter: Adapter, facts: Mapping[str, Any], notes: list[str]) -> None:
    """Say it when the files beside the weights would make programs play them at another strength than the header."""
    rank, alpha = facts.get("rank"), facts.get("alpha")
    plain = adapter.kind == "lora" and len(adapter.strengths) == 1
    if not plain or not isinstance(rank, int | float) or not isinstance(alpha, int | float) or not rank:
        return
    (strength,) = adapter.strengths
    if abs(alpha / rank - strength) > 1e-6 * strength and adapter.config.get("use_rslora") is not True:
        notes.append(
            f"It was saved at strength {alpha / rank:.4g}, but {adapter.config_source or 'its tensors'} would play it "
            f"at {strength:.4g}."
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
    own_shift, own_steps = inference_settings(known, str(facts.get("model_name", "")))
    because = f"the file does not say; these are what {variant} models take"
    return Generate(shift or own_shift, steps or own_steps, cfg, guess=True, because=because)


# -- small readers ---------------------------------------------------------------------------------------------------


def _name_of(value: Any) -> str | None:
    """The last part of what may be a path of either operating system."""
    parts = [part for part in str(value or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return parts[-1] if parts else None


def _variant_in(name: str) -> Variant | None:
    named = [variant for variant in VARIANTS if variant in words_of(name)]
    return named[0] if len(named) == 1 else None


def _object(value: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _number(text: str | None) -> float | int | None:
    try:
        return None if text is None else _plain(float(text))
    except (ValueError, OverflowError):
        return None


def _whole(text: str | None) -> int | None:
    number = _number(text)
    return number if isinstance(number, int) else None


def _plain(number: float | None) -> float | int | None:
    return int(number) if number is not None and number.is_integer() else number
