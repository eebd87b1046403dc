"""Attaches plugins the moment upstream's trainer is imported: in a patched checkout, and under ``acestep-train run``.

Upstream's app, its HTTP server and its scripts import the trainer at different times, some of them only when the first
training starts. A patched checkout (see ``patches/``) imports this module first and gets the plugins that
``$ACESTEP_PLUGINS`` names. Under ``acestep-train run`` the plugins also reach the Python processes that the program
starts, by the environment.

Nothing in here may keep the app from starting or from generating. Until the trainer is imported, this needs the
standard library and two small modules. If something goes wrong later, upstream's log says so and trainings stop, not
programs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, cast

from .checkout import TRAINER, attaches_automatically

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

PLUGINS: Final = "ACESTEP_PLUGINS"
WINS: Final = "ACESTEP_WINS"
DEFAULT_PLUGINS: Final = "sidestep"
CARRIED_OVER: Final = "ACESTEP_RUN"
"""What ``acestep-train run`` was asked for, as JSON, for the Python processes that its program starts."""

TRAINING_V2: Final = "acestep.training_v2.trainer_fixed"
"""Upstream's other trainer, in which no plugin takes part."""


@dataclass(frozen=True)
class Wanted:
    """What to attach."""

    plugins: tuple[str, ...]  # names, in the order in which they are asked
    options: Mapping[str, Any] | None = None  # None for what the environment says (``SIDESTEP_CFG_RATIO=0.1``)
    wins: str | None = None  # of two plugins that implement an exclusive hook, the one that is asked
    on_request: bool = False  # whether the user asked for plugins in this program; not so in a patched checkout

    @classmethod
    def by_environment(cls) -> Wanted:
        """``$ACESTEP_PLUGINS``: names separated by commas or spaces; sidestep when unset, none when empty."""
        names = os.environ.get(PLUGINS, DEFAULT_PLUGINS).replace(",", " ").split()
        return cls(tuple(names), None, os.environ.get(WINS, "").strip() or None)


def attach_on_import(wanted: Wanted) -> None:
    """Attach plugins as soon as upstream's trainer is imported, at once when it is already. The first call counts."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder(wanted)
    sys.meta_path.insert(0, finder)
    for name in _WATCHED:
        if name in sys.modules:
            finder.imported(sys.modules[name])


def carry_over(wanted: Wanted) -> None:
    """Let the Python processes that this one starts attach the same plugins (spawned workers, a server's children).

    Options travel as JSON, so their values have to be plain; those of click options are.
    """
    content = {"plugins": wanted.plugins, "options": wanted.options, "wins": wanted.wins}
    os.environ[CARRIED_OVER] = json.dumps(content)
    folder = str(Path(__file__).parent / "in_children")
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place != folder]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *places])


def load_carried_over() -> None:
    """Attach what a parent process was asked for. Does nothing when none was, or when it cannot be read."""
    try:
        content = json.loads(os.environ.get(CARRIED_OVER, "null"))
        wanted = Wanted(tuple(content["plugins"]), content["options"], content["wins"], on_request=True)
    except (ValueError, TypeError, KeyError):
        return
    attach_on_import(wanted)


_WATCHED: Final = (TRAINER, TRAINING_V2)


class _Finder:
    """Finds upstream's trainers like any other module, and has plugins attached once their code has run."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast("Loader", _Loader(spec.loader, self))
                return spec
        return None

    def imported(self, module: ModuleType) -> None:
        """Attach plugins to the trainer, or say that they take no part in the other one."""
        if not self.wanted.plugins or not attaches_automatically():
            return
        try:
            from .attachment import attach_automatically, leave_alone
        except Exception as error:  # our own dependencies: nothing of ours can say it in a better way
            _complain(module, f"sidestep-plugin cannot be imported: {type(error).__name__}: {error}. Reinstall it.")
            return
        if module.__name__ == TRAINING_V2:
            leave_alone(module, self.wanted.plugins, refuse=self.wanted.on_request)
        else:
            attach_automatically(module, self.wanted.plugins, self.wanted.options, self.wanted.wins)


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
        self._finder.imported(module)


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
