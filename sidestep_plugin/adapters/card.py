"""The model card beside an adapter: ``README.md`` in the form of Hugging Face's hub, in place of PEFT's empty template.

Pure: facts in, text out. The front matter has the keys of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..files import replacing
from ..text import counted, is_control
from ..variants import MODEL_ALIASES, guidance
from .header import model_in_words
from .kinds import BY_NAME, title_of
from .kinds.lora import LORA

FILE_NAME: Final = "README.md"

_ORGANISATION: Final = "ACE-Step"
_INSIDE: Final = {"acestep-v15-turbo": "Ace-Step1.5"}  # models that are in a repository of another name on the hub

_LICENSES: Final = frozenset(
    {"apache-2.0", "mit", "openrail", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}
    | {"cc-by-nd-4.0", "cc-by-nc-nd-4.0", "unlicense", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "bsd-3-clause", "wtfpl"}
)
"""Names of licences that the hub knows, those that adapters have."""


def model_card(facts: Mapping[str, Any], *, files: Sequence[tuple[str, str]] = ()) -> str:
    """The card of an adapter, from facts under the keys of ``training_config.json``, which may all be missing.

    For a folder that is shared it lists the names of the files in it with what each is.
    """
    kind = str(facts.get("adapter_type", LORA.name))
    title = _line(facts.get("title") or f"{title_of(kind)} for {facts.get('model_name') or 'ACE-Step 1.5'}")
    parts = [
        _front_matter(facts, kind),
        f"# {title}\n\n{_about(facts, kind)}",
        _section("Generate with it", [*_table(_generating(facts)), "", *_programs(facts, kind, files)]),
        _section("How it was trained", _table(_training(facts, kind))),
    ]
    if files:
        parts.append(_section("Files", _table(files)))
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(folder: Path, facts: Mapping[str, Any], *, files: Sequence[tuple[str, str]] = ()) -> Path:
    """Write the :func:`model_card` into a folder, completely or not at all. Returns the file. Raises OSError."""
    with replacing(folder / FILE_NAME) as stream:
        stream.write(model_card(facts, files=files).encode("utf-8"))
    return folder / FILE_NAME


def base_model_id(name: Any) -> str | None:
    """The hub's name of an official model, from the name of its folder. None for any other model."""
    return f"{_ORGANISATION}/{_INSIDE.get(name, name)}" if name in MODEL_ALIASES.values() else None


def _front_matter(facts: Mapping[str, Any], kind: str) -> str:
    entries: dict[str, Any] = {}
    if license_ := facts.get("license"):
        name = str(license_).strip().lower().replace(" ", "-")
        slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "custom"
        entries |= {"license": name} if name in _LICENSES else {"license": "other", "license_name": slug}
    if (base := base_model_id(facts.get("model_name"))) is not None:
        entries |= {"base_model": base, "base_model_relation": "adapter"}
    if kind == LORA.name:
        entries["library_name"] = "peft"
    entries["pipeline_tag"] = "text-to-audio"
    entries["tags"] = ["ace-step", "ace-step-1.5", kind, "music", "text-to-music"]
    if facts.get("trigger"):
        entries["instance_prompt"] = _line(facts["trigger"])
    lines = [f"{key}: {_yaml(value)}" for key, value in entries.items() if not isinstance(value, list)]
    for key, value in entries.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {_yaml(entry)}" for entry in value)]
    return "\n".join(["---", *lines, "---"])


def _about(facts: Mapping[str, Any], kind: str) -> str:
    name = facts.get("model_name")
    model = model_in_words(facts) if facts.get("model_variant") else "ACE-Step 1.5"
    link = base_model_id(name)
    where = f" ([`{_line(name)}`](https://huggingface.co/{link}))" if link else f" (`{_line(name)}`)" if name else ""
    by = f", by {_line(facts['author'])}" if facts.get("author") else ""
    return f"A {title_of(kind)} for {model}{where}{by}."


def _generating(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for label, key in (("shift", "shift"), ("steps", "num_inference_steps")):
        if facts.get(key) is not None:
            rows.append((label, str(facts[key])))
    if facts.get("model_variant"):
        rows.append(("CFG", guidance(facts["model_variant"])))
    if facts.get("trigger"):
        rows.append(("in the prompt", f"`{_line(facts['trigger'])}`"))
    return [*rows, ("strength", "1.0"), ("Think", "off")]


def _programs(facts: Mapping[str, Any], kind: str, files: Sequence[tuple[str, str]]) -> list[str]:
    known = BY_NAME.get(kind)
    weights = known.weight_name if known is not None else "the weights"
    lines = [f"- **ACE-Step's app**: enter the folder of `{weights}` as *LoRA Path* and press *Load LoRA*."]
    single = next((name for name, _ in files if name.endswith(".safetensors") and "/" not in name), None)
    if kind == LORA.name:
        name = single or weights
        lines.append(f'- **diffusers**: `pipeline.load_lora_weights(FOLDER, weight_name="{name}")`')
        lines.append(
            f"- **ComfyUI, acestep.cpp, HOT-Step, Wan2GP, DEMON**: use `{single}`."
            if single
            else "- **ComfyUI and others**: make a copy first: `acestep-train export FOLDER --to universal`"
        )
    elif single:
        lines.append(f"- **ComfyUI**: use `{single}`.")
    else:
        lines.append("- **ComfyUI**: make a copy first: `acestep-train export FOLDER --to comfyui`")
    return lines


def _training(facts: Mapping[str, Any], kind: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []

    def add(label: str, key: str, write: Any = str) -> None:
        value = facts.get(key)
        if value is not None and value != "":
            rows.append((label, _line(write(value))))

    held_out = facts.get("held_out_songs")
    add("songs", "songs", lambda songs: f"{songs - held_out} of {songs}, {held_out} held out" if held_out else songs)
    add("epochs", "epoch")
    add("optimizer steps", "global_step")
    add("rank", "rank")
    add("alpha", "alpha")
    add("layers", "target_modules", lambda names: ", ".join(names) if isinstance(names, list) else names)
    add("learning rate", "learning_rate")
    add("batch size", "batch_size")
    add("gradient accumulation", "gradient_accumulation_steps")
    add("timesteps", "timestep_law")
    add("condition dropout", "cfg_ratio", lambda share: f"{100 * share:.4g} %")
    add("windows", "crop_seconds", lambda seconds: f"{seconds:g} s")
    add("mean of", "average_of")
    trainer = "ACE-Step 1.5's own trainer, sidestep-plugin"
    add("trained with", "sidestep_plugin_version", lambda version: f"{trainer} {version}")
    change, songs = facts.get("validation_change"), facts.get("validation_songs")
    if isinstance(change, int | float) and isinstance(songs, int):
        on = f"loss on {counted(songs, 'song')} that it was not trained on"
        rows.append(("validation", f"{on}: {100 * change:+.2f} %, against the model without it"))
    return rows


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines) if any(lines) else ""


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {_cell(label)} | {_cell(text)} |" for label, text in rows)] if rows else []


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(value: object) -> str:
    """A text as one line that is no markup of its own."""
    text = " ".join("".join(" " if is_control(sign) else sign for sign in str(value)).split())
    return text.replace("<", "&lt;")


def _yaml(value: object) -> str:
    """A text for YAML: as it is where that is safe, else quoted as in JSON, which is YAML as well."""
    text = str(value)
    words = ("true", "false", "null", "yes", "no", "on", "off")
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in words
    return text if plain else json.dumps(text, ensure_ascii=False)
