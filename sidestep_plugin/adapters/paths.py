"""Removes local paths from the files that trainers write: adapters are shared, and local folders are private."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..files import read_json_object, replacing

_PLACE: Final = re.compile(r"(.*_)?(dir|dirs|path|paths|folder|file|root|location)", re.IGNORECASE)


def forget_folders(folder: Path, model_name: str) -> None:
    """Remove local paths from the files that PEFT writes beside the weights: its configuration and its README.

    PEFT writes the model's folder as ``base_model_name_or_path``. It is not needed to load an adapter. It becomes null,
    not another name: PEFT asks the Hugging Face Hub for any name that is no folder here, whenever it saves a model that
    the adapter is loaded into. Raises OSError; the file is not changed then.
    """
    file = folder / "adapter_config.json"
    try:
        config = read_json_object(file)
    except (OSError, ValueError):
        return
    place = config.get("base_model_name_or_path")
    if not isinstance(place, str):
        return
    name = model_name or "ACE-Step-1.5"
    readme = folder / "README.md"
    # The README comes first: as long as the configuration has the path, an interrupted attempt can be repeated.
    if re.search(r"[/\\]", place) and readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="surrogateescape")
        with replacing(readme) as stream:
            stream.write(text.replace(place, name).encode("utf-8", "surrogateescape"))
    with replacing(file) as stream:
        stream.write((json.dumps(config | {"base_model_name_or_path": None}, indent=2) + "\n").encode("utf-8"))


def without_paths(text: str, facts: Mapping[str, Any]) -> str:
    """A header text without local paths. A path becomes empty. In JSON, entries that hold a path are left out.

    Upstream's record of a LoKr training (``run_metadata``) has turbo's shift and steps for every model. They are
    replaced by those of this adapter, so that a file does not contradict itself.
    """
    if _is_path(text):
        return ""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value = json.loads(text)
        cleaned = _cleaned(value, facts)
    except ValueError:
        return text
    except RecursionError:  # nested too deeply to search it for paths
        return ""
    return text if cleaned == value else json.dumps(cleaned, ensure_ascii=False)


def _cleaned(value: Any, facts: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        return {
            key: facts[key] if key in ("shift", "num_inference_steps") and key in facts else _cleaned(entry, facts)
            for key, entry in value.items()
            if not (isinstance(entry, str) and (_PLACE.fullmatch(key) or _is_path(entry)))
        }
    if isinstance(value, list):
        return [_cleaned(entry, facts) for entry in value if not (isinstance(entry, str) and _is_path(entry))]
    return value


def _is_path(text: str) -> bool:
    return re.match(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:", text) is not None
