"""Attaches plugins the moment upstream's trainer is imported: in a patched checkout, and under ``acestep-train run``.

Upstream's app, its HTTP server and its scripts import their trainer whenever they like, some of them only when the
first training is started. A patched checkout (see ``patches/``) imports this module first, and so gets the plugins that
``$ACESTEP_PLUGINS`` names.

Nothing in here may keep the app from starting or from generating: until the trainer is imported, the standard library
and two small modules are all that this needs, and whatever goes wrong later is said in upstream's log and stops
trainings, not programs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, cast

from .checkout import TRAINER, attaches_automatically

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

PLUGINS: Final = "ACESTEP_PLUGINS"
WINS: Final = "ACESTEP_WINS"
DEFAULT_PLUGINS: Final = "sidestep"


@dataclass(frozen=True)
class Wanted:
    """What to attach.

    Attributes:
        plugins: names, in the order in which they are asked.
        options: the plugins' options; None for what the environment says (``SIDESTEP_CFG_RATIO=0.1``).
        wins: of two plugins that want what only one can do, the one that does.
    """

    plugins: tuple[str, ...]
    options: Mapping[str, Any] | None = None
    wins: str | None = None

    @classmethod
    def by_environment(cls) -> Wanted:
        """``$ACESTEP_PLUGINS``: names separated by commas or blanks; sidestep when unset, none when empty."""
        names = os.environ.get(PLUGINS, DEFAULT_PLUGINS).replace(",", " ").split()
        return cls(tuple(names), None, os.environ.get(WINS, "").strip() or None)


def attach_on_import(wanted: Wanted) -> None:
    """Attach plugins as soon as upstream's trainer is imported, at once when it is already. The first call counts."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder(wanted)
    sys.meta_path.insert(0, finder)
    if TRAINER in sys.modules:
        finder.attach(sys.modules[TRAINER])


class _Finder:
    """Finds one module as everybody else does, and has plugins attached once its code has run."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRAINER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast("Loader", _Loader(spec.loader, self))
                return spec
        return None

    def attach(self, trainer: ModuleType) -> None:
        if not self.wanted.plugins or not attaches_automatically():
            return
        try:
            from .attachment import attach_automatically
        except Exception as error:  # our own dependencies: nothing of ours can say it in a better way
            _complain(trainer, f"sidestep-plugin cannot be imported: {type(error).__name__}: {error}. Reinstall it.")
            return
        attach_automatically(trainer, self.wanted.plugins, self.wanted.options, self.wanted.wins)


class _Loader:
    """Another loader, and what is to be done when it has run the module."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.attach(module)


def _complain(trainer: ModuleType, message: str) -> None:
    """Make every training end at once with a message, without anything of ours that could fail."""

    def train_from_preprocessed(*_: Any, **__: Any) -> Iterator[tuple[int, float, str]]:
        yield 0, 0.0, f"❌ {message}"

    print(f"ERROR: {message} Training is stopped.", file=sys.stderr)  # noqa: T201 - no logger is known to work
    for name in ("LoRATrainer", "LoKRTrainer"):
        if hasattr(trainer, name):
            getattr(trainer, name).train_from_preprocessed = train_from_preprocessed


def load() -> None:
    """What a patched checkout calls before anything of its training is imported: attach what the environment names."""
    attach_on_import(Wanted.by_environment())
