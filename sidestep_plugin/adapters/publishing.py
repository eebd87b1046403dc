"""Makes a folder to upload: an adapter in every form that programs read, with a card and without anything private."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..text import shown
from ..variants import guidance
from .base_weights import BaseWeights
from .card import FILE_NAME as CARD
from .card import write_card
from .comfyui import write_comfyui_copy
from .facts import write_training_config
from .kinds import BY_NAME
from .kinds.lora import LORA
from .layers import Adapter
from .staging import published, staged
from .universal import write_universal

OPTIONS: Final = "training_options.toml"

_AUDIO: Final = frozenset({".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a"})
_TEXTS: Final = frozenset({".json", ".toml", ".md", ".txt"})
# Options that name songs or folders of whoever trained it.
_PRIVATE: Final = re.compile(
    r"^(preview[_-]songs|preview[_-]prompts|validation[_-]dir|[\w-]*[_-](dir|root|path|file))\s*=.*\n?", re.MULTILINE
)


def publish(
    adapter: Adapter,
    facts: Mapping[str, Any],
    output: Path,
    name: str,
    *,
    clips: Sequence[Path] = (),
    base: BaseWeights | None = None,
) -> list[tuple[str, str]]:
    """Make the folder, completely or not at all. Returns the files' names with what each is.

    The folder must not exist, or be empty, or hold an older one. `name` is what the files are called: letters, digits,
    ``-`` and ``_``. Clips are taken along as clip-1 and so on. A LoKr with weight decomposition needs its base model.

    Raises:
        Refusal: the adapter cannot be shared, or something private would be in the folder.
        OSError: a file cannot be read or written.
    """
    files: list[tuple[str, str]] = []
    with staged(output) as stage:
        own = stage / name
        own.mkdir()
        files += _as_trained(adapter, facts, own, name)
        files += _copies(adapter, facts, stage, name, base)
        (stage / f"{name}.metadata.json").write_text(
            json.dumps(_for_demon(facts, name), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        files.append((f"{name}.metadata.json", "the same facts for DEMON"))
        options = adapter.file.path.parent / OPTIONS
        if options.is_file():
            text = _PRIVATE.sub("", options.read_text(encoding="utf-8"))
            (stage / OPTIONS).write_text(text, encoding="utf-8")
            files.append((OPTIONS, "the options of the training, to repeat it: `acestep-train --config`"))
        for number, clip in enumerate(clips, 1):
            if clip.suffix.lower() not in _AUDIO or not clip.is_file():
                raise Refusal(f"{clip} is no audio file. Expected one of {', '.join(sorted(_AUDIO))}.")
            shutil.copyfile(clip, stage / f"clip-{number}{clip.suffix.lower()}")
            files.append((f"clip-{number}{clip.suffix.lower()}", "generated with it"))
        write_card(stage, facts, files=files)
        _check_private(stage, adapter)
        with published(stage, output):
            pass
    return [*files, (CARD, "the card")]


def _as_trained(adapter: Adapter, facts: Mapping[str, Any], folder: Path, name: str) -> list[tuple[str, str]]:
    """The adapter in a folder of its own: the app calls it by the folder's name."""
    kind = BY_NAME[adapter.kind]
    shutil.copyfile(adapter.file.path, folder / kind.weight_name)
    config = adapter.file.path.parent / "adapter_config.json"
    if kind.alpha_in_config and config.is_file():
        told = dict(adapter.config) | {"base_model_name_or_path": None}
        (folder / config.name).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_training_config(folder, dict(facts))
    return [(f"{name}/", "as it was trained, for ACE-Step's app" + (" and PEFT" if kind is LORA else ""))]


def _copies(
    adapter: Adapter, facts: Mapping[str, Any], stage: Path, name: str, base: BaseWeights | None
) -> list[tuple[str, str]]:
    target = stage / f"{name}.safetensors"
    if adapter.is_dora and adapter.kind == LORA.name:
        return []
    if adapter.kind == LORA.name:
        write_universal(adapter, target, facts)
        return [(target.name, "for every other program, with the strength in its weights")]
    try:
        write_comfyui_copy(adapter, target, facts, base)
    except Refusal:
        if base is not None:
            raise
        return []
    return [(target.name, "for ComfyUI")]


def _for_demon(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What DEMON reads beside a file (daydreamlive/DEMON 3567c7c, ``acestep/lora_metadata.py``, schema 1)."""
    trigger = facts.get("trigger")
    inference: dict[str, Any] = {"recommended_strength": 1.0}
    if facts.get("shift") is not None:
        inference |= {"recommended_shift": facts["shift"]}
    if facts.get("num_inference_steps") is not None:
        inference |= {"recommended_steps": facts["num_inference_steps"]}
    if facts.get("model_variant"):
        inference |= {"recommended_guidance": 7.0 if guidance(facts["model_variant"]) == "on" else 1.0}
    if trigger:
        inference |= {"primary_trigger_word": trigger, "trigger_words": [trigger]}
    model = {
        "base_model": facts.get("model_name"),
        "base_model_scale": "5B" if facts.get("model_size") == "XL" else "2B",
    }
    return {
        "schema_version": 1,
        "id": name,
        "name": facts.get("title") or name,
        "inference": inference,
        "model": {key: value for key, value in model.items() if value is not None},
    }


def _check_private(stage: Path, adapter: Adapter) -> None:
    """Refuse a folder in which a text or a header names a place or the name of this machine or its user."""
    words = {
        str(place) for place in (Path.home(), adapter.file.path.absolute().parent, Path.cwd()) if len(place.parts) > 1
    }
    names = {name for name in (socket.gethostname(), _user()) if len(name) > 3}
    for file in sorted(file for file in stage.rglob("*") if file.is_file()):
        if file.suffix in _TEXTS:
            text = file.read_text(encoding="utf-8")
        elif file.suffix == ".safetensors":
            with file.open("rb") as stream:
                text = stream.read(int.from_bytes(stream.read(8), "little")).decode("utf-8")
        else:
            continue
        place = next((word for word in words if word in text or json.dumps(word)[1:-1] in text), None)
        found = place or next((name for name in names if re.search(rf"[\\/@]{re.escape(name)}\b", text)), None)
        if found is not None:
            raise Refusal(
                f"{file.relative_to(stage)} would name {shown(found, 200)}, which is of this machine. Remove it from "
                "the adapter's files, or train with this plugin, which writes no such names."
            )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no user of that number, as in some containers
        return ""
