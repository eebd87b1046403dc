"""Finds plugins by entry point, loads the ones that were named, checks them, calls them and lists them.

A plugin runs only because somebody named it. Whatever is wrong with a named plugin is an error that says its name:
a training must never go on with a feature silently missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import pluggy

from . import hookspecs
from .errors import PluginError, Refusal
from .options import resolve_options

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "acestep.plugins"
"""Entry-point group under which distributions offer plugins."""


@dataclass(frozen=True)
class Installed:
    """A plugin that some installed distribution offers. Nothing of it has been imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint


def installed_plugins() -> list[Installed]:
    """Every plugin on offer, sorted by name and distribution."""
    import importlib.metadata  # slow to import, and not needed by every command

    found = {
        (point.name, distribution.metadata["Name"]): Installed(
            point.name, distribution.metadata["Name"], distribution.version, point
        )
        for distribution in importlib.metadata.distributions()
        for point in distribution.entry_points
        if point.group == GROUP
    }
    return [found[key] for key in sorted(found)]


class Registry:
    """The plugins of one attachment. Each attachment has its own; none is global."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._callers: dict[str, tuple[tuple[str, Callable[..., Any]], ...]] = {}
        self.names: list[str] = []

    @classmethod
    def load(cls, names: Iterable[str]) -> Registry:
        """Load plugins by name, in that order; a name given twice counts once.

        Raises:
            PluginError: a name is not installed or offered twice, its code cannot be imported, it misspells a hook or
                its arguments, it implements nothing, or it shares an exclusive hook with another. Nothing stays
                registered then.
        """
        registry = cls()
        for name in dict.fromkeys(names):
            plugin = _find(name)
            try:
                loaded = plugin.entry_point.load()
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"Plugin {name!r} ({plugin.distribution} {plugin.version}) could not be imported: "
                    f"{type(error).__name__}: {error}. Mend or reinstall {plugin.distribution}."
                ) from error
            registry.register(loaded, name)
        return registry

    def register(self, plugin: object, name: str) -> None:
        """Add one plugin object under a name. Raises PluginError; the plugin is not registered then."""
        unmarked = [
            attribute
            for attribute in dir(plugin)
            if attribute.startswith("acestep_")
            and callable(getattr(plugin, attribute))
            and not hasattr(getattr(plugin, attribute), f"{hookspecs.PROJECT}_impl")
        ]
        if unmarked:
            raise PluginError(
                f"Plugin {name!r}: {', '.join(unmarked)} looks like a hook but lacks @hookimpl. Mark it with "
                "`from sidestep_plugin import hookimpl`, or rename it."
            )
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            # pluggy leaves a plugin that failed half-way registered, with its earlier hooks live.
            if self._manager.has_plugin(name) and name not in self.names:
                self._manager.unregister(name=name)
            reason = " ".join(str(error).split())
            raise PluginError(f"Plugin {name!r} does not fit the hooks: {reason}. Known hooks: {_known()}.") from error
        hooks = self.hooks_of(name)
        for hook in hooks:
            rivals = {impl.plugin_name for impl in self._hook(hook).get_hookimpls()} - {name}
            if hook in hookspecs.EXCLUSIVE and rivals:
                self._manager.unregister(name=name)
                raise PluginError(
                    f"Plugins {rivals.pop()!r} and {name!r} both implement {hook}. Name only one of them."
                )
        if not hooks:
            self._manager.unregister(name=name)
            raise PluginError(f"Plugin {name!r} implements no hook. Known hooks: {_known()}.")
        self.names.append(name)
        self._callers.clear()

    def hooks_of(self, name: str) -> list[str]:
        """Names of the hooks that a registered plugin implements, sorted."""
        callers = self._manager.get_hookcallers(self._manager.get_plugin(name)) or []
        return sorted({caller.name for caller in callers})

    def callers(self, hook: str) -> tuple[tuple[str, Callable[..., Any]], ...]:
        """Plugin names with a caller each for one hook, in the order in which the plugins were named."""
        if hook not in self._callers:
            plugins = [(name, self._manager.get_plugin(name)) for name, _ in self._manager.list_name_plugin()]
            implementing = [
                (name, plugin)
                for name, plugin in plugins
                if plugin is not None and any(impl.plugin is plugin for impl in self._hook(hook).get_hookimpls())
            ]
            self._callers[hook] = tuple(
                (name, self._manager.subset_hook_caller(hook, [other for _, other in plugins if other is not plugin]))
                for name, plugin in implementing
            )
        return self._callers[hook]

    def implements(self, hook: str) -> bool:
        """Whether any registered plugin implements a hook."""
        return bool(self._hook(hook).get_hookimpls())

    def call(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Ask every plugin in turn and return what each said, with its name. None is left out.

        Raises:
            Refusal: as a plugin raised it.
            PluginError: any other exception of a plugin, with the plugin's and the hook's name.
        """
        answers: list[tuple[str, Any]] = []
        for name, caller in self.callers(hook):
            answers += [(name, answer) for answer in self.ask(name, caller, hook, arguments)]
        return answers

    @staticmethod
    def ask(name: str, caller: Callable[..., Any], hook: str, arguments: Mapping[str, Any]) -> list[Any]:
        """Ask one plugin; see :meth:`call`."""
        try:
            answer = caller(**arguments)
        except Refusal:
            raise
        except Exception as error:
            raise PluginError(f"Plugin {name!r} failed in {hook}: {type(error).__name__}: {error}") from error
        if answer is None:
            return []
        # pluggy returns the one answer of an exclusive hook, and a list of all answers of any other.
        return [answer] if hook in hookspecs.EXCLUSIVE else list(answer)

    def declared_options(self) -> list[click.Option]:
        """The options of all plugins. Raises PluginError when two declare the same name."""
        owners: dict[str, str] = {}
        options: list[click.Option] = []
        for plugin, declared in self.call("acestep_options"):
            if not isinstance(declared, Sequence) or not all(isinstance(option, click.Option) for option in declared):
                raise PluginError(
                    f"Plugin {plugin!r} returned {declared!r} from acestep_options, expected click options."
                )
            for option in declared:
                owner = owners.setdefault(str(option.name), plugin)
                if owner != plugin:
                    raise PluginError(f"Plugins {owner!r} and {plugin!r} both declare the option {option.name!r}.")
                options.append(option)
        return options

    def resolve_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of all plugins' options, checked and with defaults. Raises Refusal."""
        return resolve_options(self.declared_options(), given)

    def _hook(self, hook: str) -> pluggy.HookCaller:
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller


@dataclass(frozen=True)
class Listing:
    """One line of ``acestep-train plugins``."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    options: tuple[str, ...]
    error: str | None


def list_plugins() -> list[Listing]:
    """Load every installed plugin on its own and tell what it implements, or why it failed."""
    listings = []
    for plugin in installed_plugins():
        hooks: Sequence[str] = ()
        options: Sequence[str] = ()
        error = None
        try:
            registry = Registry.load([plugin.name])
            hooks = registry.hooks_of(plugin.name)
            options = [option.opts[0] for option in registry.declared_options()]
        except Refusal as refusal:
            error = str(refusal)
        listings.append(Listing(plugin.name, plugin.distribution, plugin.version, tuple(hooks), tuple(options), error))
    return listings


def _find(name: str) -> Installed:
    plugins = installed_plugins()
    matching = [plugin for plugin in plugins if plugin.name == name]
    if not matching:
        known = ", ".join(plugin.name for plugin in plugins) or "none"
        raise PluginError(f"No plugin {name!r} is installed. Installed: {known}.")
    if len(matching) > 1:
        offering = " and ".join(plugin.distribution for plugin in matching)
        raise PluginError(f"Plugin {name!r} is offered by {offering}. Uninstall one of them.")
    return matching[0]


def _known() -> str:
    return ", ".join(sorted(name for name in vars(hookspecs) if name.startswith("acestep_")))
