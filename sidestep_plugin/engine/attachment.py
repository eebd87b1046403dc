"""Puts the wrappers in place and takes them out again: the only file that sets names of upstream's.

What is replaced stands in the table of :mod:`.seams`, and, only if the user allowed folders by name, the path guard.
Everything is checked before anything is changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from ..errors import DetachError, Refusal, UpstreamMismatch
from ..registry import Registry
from ..run import AdapterType
from .checkout import import_trainer
from .host import Host, log_of
from .seams import EVALUATE, FOLDERS, in_use, require
from .shapes import MODULE_CLASS, TRAINER_CLASS, adapter_types
from .wrappers.path_guard import guarded_modules, wrap_path_guard
from .wrappers.refusing import before_construction, refuse_steps, refuse_training

_attached: list[Attachment] = []
_lock: Final = threading.RLock()

_INHERITED: Final = object()
"""Means "not in this class's own namespace": undone by deleting, not by setting."""


def attach(
    trainer: Any = None,
    *,
    plugins: Iterable[str] = ("sidestep",),
    options: Mapping[str, Any] | None = None,
    extra_plugins: Mapping[str, object] | None = None,
    allowed_folders: Iterable[Path] = (),
    announce: Callable[[str], None] | None = None,
    wins: str | None = None,
) -> Attachment:
    """Attach plugins to upstream's trainer until the returned handle is detached.

    Plugins that a patched checkout attached by itself are detached until then.

    Args:
        trainer: the module ``acestep.training.trainer``. None: it is imported.
        plugins: names of installed plugins, in the order in which they are called.
        options: values of the plugins' options by name (``cfg_ratio``); the others keep their defaults.
        extra_plugins: plugin objects that are not installed, by name; called after the installed ones.
        allowed_folders: folders that upstream's path guard accepts in addition to its own root.
        announce: called with each line that the plugins announce. None: upstream's log.
        wins: if two plugins implement an exclusive hook (sampling timesteps), the one that is called.

    Returns:
        A handle with ``detach()``, also a context manager. A second call with the same plugins and options returns
        the same handle and changes nothing. Leaving its ``with`` block leaves the first one attached.

    Raises:
        UpstreamMismatch: no trainer, or one that is not compatible. Nothing was changed.
        PluginError: a plugin is missing or broken. Nothing was changed.
        Refusal: an option is unknown or unusable, or other plugins are attached already. Nothing was changed.
    """
    trainer = import_trainer() if trainer is None else trainer
    registry = Registry.load([plugins] if isinstance(plugins, str) else plugins, wins, later=extra_plugins or ())
    for name, plugin in (extra_plugins or {}).items():
        registry.register(plugin, name)
    return attach_registry(trainer, registry, registry.resolve_options(options or {}), allowed_folders, announce)


def attach_registry(
    trainer: Any,
    registry: Registry,
    options: Mapping[str, Any],
    allowed_folders: Iterable[Path] = (),
    announce: Callable[[str], None] | None = None,
) -> Attachment:
    """The same with plugins that are loaded and options that are resolved already; see :func:`attach`."""
    resolved = dict(options)
    allowed = tuple(Path(folder).resolve() for folder in allowed_folders)
    with _lock:
        automatic = None
        for attached in [attached for attached in _attached if attached.trainer is trainer]:
            if attached.automatic:
                automatic = attached
                continue
            theirs = (attached.registry.names, attached.registry.wins, attached.options, attached.allowed_folders)
            if theirs != (registry.names, registry.wins, resolved, allowed):
                raise Refusal(
                    f"Already attached with {_listed(attached.registry.names)} and other options or folders. "
                    "Call detach() on that handle first."
                )
            attached._calls += 1
            return attached
        if automatic is not None:
            automatic.detach()
        attachment = Attachment(trainer, registry, resolved, allowed, announce)
        try:
            attachment._apply()
        except BaseException:
            if automatic is not None:
                automatic._apply()
            raise
        attachment._making_room = automatic
        return attachment


def attach_automatically(
    trainer: Any, plugins: Iterable[str], options: Mapping[str, Any] | None = None, wins: str | None = None
) -> None:
    """Attach the plugins of a patched checkout or of ``acestep-train run`` right after the trainer was imported.

    Never raises, so that the app always starts and generates. An error goes to upstream's log, and every training ends
    at once with the same message.

    Args:
        options: the plugins' options. None: from the environment (``SIDESTEP_CFG_RATIO=0.1``).
    """
    for stale in [attached for attached in _attached if attached.trainer is trainer]:
        _attached.remove(stale)  # the module was reloaded, so its names are new objects
        stale._replacements.clear()
    log, names = log_of(trainer), list(plugins)
    try:
        registry = Registry.load(names, wins)
        values = dict(options or {})
        if options is None:
            values, unknown = registry.options_in(os.environ)
            for name in unknown:
                log.warning(f"{name} is set, but no loaded plugin has such an option. It is ignored.")
        Attachment(trainer, registry, registry.resolve_options(values), automatic=True)._apply()
    except Exception as error:
        told = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        message = f"Plugins {_listed(names)} could not be attached, so trainings are refused: {told}"
        log.error(message)
        attachment = Attachment(trainer, Registry(), {}, automatic=True)
        attachment._message = message
        attachment._apply()
        return
    log.info(f"Plugins attached to the trainer: {_listed(registry.names)}")


def attached_to_evaluate(trainer: Any) -> Attachment:
    """Attach no plugin, only what :func:`.evaluation.evaluate` needs. Detach the handle afterwards."""
    return Attachment(trainer, Registry(), {}, announce=lambda _: None, evaluates=True)._apply()


def leave_alone(module: Any, plugins: Iterable[str], *, refuse: bool) -> None:
    """Say that plugins take no part in ``acestep.training_v2``, upstream's other trainer, when it starts a training.

    Args:
        module: ``acestep.training_v2.trainer_fixed``.
        refuse: whether such a training is refused because the user asked for plugins.
    """
    trainer_class = getattr(module, "FixedLoRATrainer", None)
    if trainer_class is None:
        return
    message = (
        f"acestep.training_v2 has its own training step, in which plugins ({_listed(list(plugins))}) take no part. "
        "It uses continuous timesteps and condition dropout for every model, turbo too."
    )

    def tell() -> None:
        if not refuse:
            log_of(module).warning(message)
            return
        raise Refusal(
            f"{message} Refused, because plugins were asked for. Train with acestep-train --plugin, or start the "
            "program without acestep-train run."
        )

    trainer_class.__init__ = before_construction(tell, trainer_class.__init__)


@dataclass(frozen=True)
class _Replacement:
    """One of upstream's names, with its original value and our wrapper."""

    owner: Any
    name: str
    original: Any
    ours: Any

    @property
    def label(self) -> str:
        return f"{getattr(self.owner, '__qualname__', None) or getattr(self.owner, '__name__', self.owner)}.{self.name}"

    def put(self) -> None:
        setattr(self.owner, self.name, self.ours)

    def still_there(self) -> bool:
        return vars(self.owner).get(self.name) is self.ours

    def undo(self) -> None:
        if self.original is _INHERITED:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


class Attachment:
    """The handle that :func:`attach` returns: one set of plugins on one trainer.

    Attributes:
        trainer: the trainer's module.
        registry: the loaded plugins.
        options: the plugins' options.
        allowed_folders: folders that the path guard accepts in addition to its own root.
        evaluates: whether songs can be evaluated: upstream's sampler is then replaced without a plugin that samples.
        automatic: whether a patched checkout attached it by itself; any other attachment replaces it.
        refusal: the refusal that stopped the newest run, or None. Upstream reports every failure as a message; this
            lets callers tell a refused run from a failed one.
        interrupted: where the newest run was saved if it was stopped or failed, else None.
    """

    def __init__(
        self,
        trainer: Any,
        registry: Registry,
        options: Mapping[str, Any],
        allowed_folders: tuple[Path, ...] = (),
        announce: Callable[[str], None] | None = None,
        *,
        evaluates: bool = False,
        automatic: bool = False,
    ) -> None:
        self.evaluates = evaluates or registry.implements("engine_epoch_ended")
        self.trainer = trainer
        self.registry = registry
        self.options = dict(options)
        self.allowed_folders = allowed_folders
        self._host = Host(trainer, registry, options, announce)
        self._replacements: list[_Replacement] = []
        self._calls = 1  # of attach() that were given this handle
        self._blocks = 0  # with blocks that are open
        self._held_outside = False
        self.automatic = automatic
        self._making_room: Attachment | None = None
        self._message: str | None = None  # with which every training ends at once

    def __enter__(self) -> Attachment:
        if self._blocks == 0:  # attached earlier without a block: stays attached after this one
            self._held_outside = self._calls > 1
        self._blocks += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks -= 1
        if self._blocks == 0 and not self._held_outside:
            self.detach()

    @property
    def attached(self) -> bool:
        return bool(self._replacements)

    @property
    def refusal(self) -> Refusal | None:
        return self._host.refusal

    @property
    def interrupted(self) -> Path | None:
        return self._host.interrupted

    def detach(self) -> None:
        """Restore every name, newest first. Does nothing when already detached.

        Raises:
            DetachError: another wrapper replaced one of the names; nothing was restored.
        """
        foreign = [replacement.label for replacement in self._replacements if not replacement.still_there()]
        if foreign:
            raise DetachError(
                f"{', '.join(foreign)} was replaced by another program after the plugins were attached. "
                "Undo that first, because detaching now would remove that wrapper. Nothing was changed."
            )
        while self._replacements:
            self._replacements.pop().undo()
        self._host.attached = False
        if self in _attached:
            _attached.remove(self)
        made_room, self._making_room = self._making_room, None
        if made_room is not None:
            made_room._apply()

    # -- attaching ---------------------------------------------------------------------------------------------------

    def _apply(self) -> Attachment:
        planned = [  # every wrapper is made before one is put in place
            _Replacement(owner, name, vars(owner).get(name, _INHERITED), make(getattr(owner, name)))
            for owner, name, make in self._wanted()
        ]
        try:
            for replacement in planned:
                replacement.put()
                self._replacements.append(replacement)
        except BaseException:
            while self._replacements:
                self._replacements.pop().undo()
            raise
        self._host.attached = True
        _attached.append(self)
        return self

    def _wanted(self) -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
        """Yield each name to replace: its owner, the name, and what makes the wrapper. Raises UpstreamMismatch."""
        trainer, host = self.trainer, self._host
        if self._message is not None:
            for owner in (getattr(trainer, name, None) for name in TRAINER_CLASS.values()):
                if hasattr(owner, "train_from_preprocessed"):
                    yield owner, "train_from_preprocessed", partial(refuse_training, self._message)
            return
        misfits: dict[AdapterType, UpstreamMismatch] = {}
        kinds = adapter_types(trainer)
        for kind in kinds:
            try:
                require(trainer, kind, self._uses)
            except UpstreamMismatch as misfit:
                misfits[kind] = misfit
        if len(misfits) == len(kinds):
            raise next(
                iter(misfits.values()),
                UpstreamMismatch(
                    f"{getattr(trainer, '__name__', trainer)} has neither {' nor '.join(MODULE_CLASS.values())}: this "
                    "is not ACE-Step 1.5's trainer. Give your checkout's folder with --acestep-root DIR."
                ),
            )
        for kind in misfits:  # the other kind is compatible and may train; this one must fail before its first step
            yield getattr(trainer, MODULE_CLASS[kind]), "training_step", partial(refuse_steps, misfits[kind])
        fitting = [kind for kind in kinds if kind not in misfits]
        for owner, seam in in_use(trainer, fitting, self._uses):
            yield owner, seam.attribute, partial(seam.wrap, host)
        for module in guarded_modules(trainer) if self.allowed_folders else ():
            yield module, "safe_path", partial(wrap_path_guard, self.allowed_folders)

    def _uses(self, hook: str) -> bool:
        if hook == FOLDERS:
            return bool(self.allowed_folders)
        return self.evaluates if hook == EVALUATE else self.registry.implements(hook)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no plugins"
