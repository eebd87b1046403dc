"""Where upstream is: finds an ACE-Step checkout, imports its trainer, and tells where the trainer saves files."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from ..errors import UpstreamMismatch
from ..text import sentence

TRAINER: Final = "acestep.training.trainer"
"""The module that plugins are attached to."""

_automatic = True


def find_root(said: Path | None) -> Path:
    """The folder that contains the package ``acestep``: the given one, else the importable one, else the current one.

    Raises:
        UpstreamMismatch: none of them contains ``acestep/training/trainer.py``.
    """
    looked: list[str] = []
    for candidate, origin in _candidates(said):
        if _is_checkout(candidate):
            return candidate.absolute()
        looked.append(f"{candidate} ({origin})")
    if said is not None and (near := _checkout_near(said)) is not None:
        raise UpstreamMismatch(
            f"No ACE-Step 1.5 in {said}: no acestep/training/trainer.py. Did you mean --acestep-root {near}?"
        )
    raise UpstreamMismatch(
        f"No ACE-Step 1.5 found: no acestep/training/trainer.py in {', '.join(looked)}. "
        "Give your checkout's folder with --acestep-root DIR."
    )


def _is_checkout(folder: Path) -> bool:
    return (folder / "acestep" / "training" / "trainer.py").is_file()


def _checkout_near(said: Path) -> Path | None:
    """A checkout that a folder belongs to, or one level below it."""
    try:
        places = [*said.absolute().parents[:3], *(place for place in said.iterdir() if place.is_dir())]
    except OSError:
        return None
    return next((place for place in places if _is_checkout(place)), None)


def _candidates(said: Path | None) -> Iterator[tuple[Path, str]]:
    if said is not None:
        yield said, "--acestep-root"
        return
    spec = importlib.util.find_spec("acestep")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(location).parent, "the importable acestep"
    yield Path.cwd(), "the current directory"


def import_trainer(root: Path | None = None) -> ModuleType:
    """Import ``acestep.training.trainer``, from a checkout when one is given.

    Args:
        root: the folder that holds the package ``acestep``; it is put first on ``sys.path``. None: as importable.

    Raises:
        UpstreamMismatch: upstream's code cannot be imported (its own error is shown), or another checkout's
            ``acestep`` has already been imported in this process.
    """
    trainer = import_module_of(TRAINER, root, "The same import fails without any plugin.")
    found = Path(str(trainer.__file__)).resolve()
    # The package folder may be a symbolic link.
    if root is not None and not found.is_relative_to((root / "acestep").resolve()):
        raise UpstreamMismatch(
            f"acestep was imported from {found.parents[2]}, not from {root}. Start a new process for another checkout."
        )
    return trainer


def import_module_of(name: str, root: Path | None, elsewhere: str) -> ModuleType:
    """Import one of upstream's modules, from a checkout when one is given.

    Args:
        root: as for :func:`import_trainer`.
        elsewhere: a sentence for the message about an error in upstream's own code: where it comes up, too.

    Raises:
        UpstreamMismatch: upstream's code cannot be imported; its own error is shown.
    """
    if root is not None and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        # The caller decides about plugins, even in a patched checkout, which loads some by itself.
        with not_automatic():
            return importlib.import_module(name)
    except Exception as error:  # upstream's code may raise anything at import
        missing = isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("acestep")
        what_to_do = (
            "Use the Python environment in which ACE-Step runs, or install its requirements there."
            if missing
            else f"{elsewhere} Try another version of ACE-Step."
        )
        reason = sentence(f"{type(error).__name__}: {error}")
        raise UpstreamMismatch(f"{name} cannot be imported. ACE-Step's own error: {reason} {what_to_do}") from error


def beside(trainer: Any, name: str) -> ModuleType | None:
    """A module of the trainer's package; None if it has not been imported, or does not exist."""
    package = str(getattr(trainer, "__name__", "")).rpartition(".")[0]
    return sys.modules.get(f"{package}.{name}")


def project_of(root: Path | None) -> dict[str, Any]:
    """The table ``project`` of a checkout's pyproject.toml; {} where there is none."""
    try:
        content = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")) if root else {}
    except (OSError, ValueError):
        return {}
    return project if isinstance(project := content.get("project"), dict) else {}


def place_of(trainer: Any, said: str) -> Path:
    """Where upstream saves to when it is given a path: relative to its path guard's root, if it has one."""
    root = getattr(beside(trainer, "path_safety"), "_SAFE_ROOT", None)
    return (Path(root) / said if isinstance(root, str) else Path(said)).resolve()


@contextmanager
def not_automatic() -> Iterator[None]:
    """Import the trainer without attaching anything: the caller decides about plugins."""
    global _automatic
    before, _automatic = _automatic, False
    try:
        yield
    finally:
        _automatic = before


def attaches_automatically() -> bool:
    """Whether importing the trainer now attaches the plugins of a patched checkout."""
    return _automatic
