"""What decides a training, in a form that processes on several machines can compare: by contents, never by path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..registry import installed_plugins
from ..run import AdapterType, ModelFacts
from ..songs.dataset import songs_in
from ..songs.values import hash_of
from ..timesteps.treatment import decide_treatment

if TYPE_CHECKING:
    from ..registry import Registry

_PIECES: Final = 64  # of a file of weights that are read, evenly spread over it
_PIECE: Final = 4096  # bytes


def of_the_training(
    module: Any,
    registry: Registry,
    options: Mapping[str, Any],
    own: Set[str],
    kind: AdapterType,
    adapter_config: Any,
    training_config: Any,
    songs: Path | None,
) -> dict[str, Any]:
    """Everything but the model; `own` are names of options that may be others on each machine."""
    code = getattr(module, "__file__", None)
    versions = {plugin.name: plugin.version for plugin in installed_plugins()}
    settings = dict(vars(training_config)) if hasattr(training_config, "__dict__") else {}
    settings.pop("output_dir", None)  # may be mounted elsewhere on another machine
    return {
        "version of ACE-Step": None if code is None else _code(Path(code).parent),
        "adapter type": kind,
        "list of plugins": [f"{name} {versions.get(name, '')}".rstrip() for name in registry.names],
        **{f"--{name.replace('_', '-')}": repr(value) for name, value in options.items() if name not in own},
        "adapter's settings": repr(adapter_config),
        **{f"the setting {name}": repr(value) for name, value in settings.items()},
        "songs": {} if songs is None else {song.name: hash_of(song)[:12] for song in songs_in(songs)},
    }


def of_the_model(folder: Path) -> dict[str, Any]:
    """A model's folder. Of its weights, names, sizes, and a part of the contents."""
    return {
        "variant": _variant(ModelFacts.from_folder(folder)),
        "config.json of the model": _texts([folder / "config.json"]),
        "code of the model": _code(folder),
        "weights of the model": {file.name: _parts(file) for file in sorted(folder.glob("*.safetensors"))},
    }


def of_the_loaded_model(model: Any) -> dict[str, Any]:
    """The same of a model that is loaded; what its configuration says where its folder is not known."""
    folder = Path(str(getattr(model.config, "_name_or_path", "") or ""))
    if folder.name and (folder / "config.json").is_file():
        return of_the_model(folder)
    facts = ModelFacts.from_model(model)
    config = {name: value for name, value in facts.config.items() if not name.startswith("_")}
    return {"variant": _variant(facts), "configuration of the model": _short(repr(sorted(config.items())).encode())}


def _variant(facts: ModelFacts) -> str:
    """The variant that a model is without anybody saying so; it may hang on the name of its folder."""
    try:
        return decide_treatment(facts).variant
    except Refusal:
        return "not known"


def _code(folder: Path) -> str:
    return _texts(sorted(folder.glob("*.py")))


def _texts(files: Iterable[Path]) -> str:
    """A hash of text files and their names. The ends of lines do not count: git may change them."""
    return _short(b"\0".join(file.name.encode() + file.read_bytes().replace(b"\r\n", b"\n") for file in files))


def _parts(file: Path) -> str:
    """A file's size, and a hash of its beginning and of parts of the rest: reading all would take minutes."""
    size = file.stat().st_size
    read = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        read.update(stream.read(8 * _PIECE))
        for piece in range(_PIECES):
            stream.seek(max(0, (size - _PIECE) * piece // (_PIECES - 1)))
            read.update(stream.read(_PIECE))
    return read.hexdigest()[:12]


def _short(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:12]
