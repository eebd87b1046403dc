"""Finds plugins by entry point, loads the ones that were named, checks them, calls them and lists them.

A plugin of others runs only because somebody named it; ``sidestep``, which is what the commands are for, is named by
them. Whatever is wrong with a named plugin is an error that says its name: a training must never go on with a feature
silently missing.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import click
import pluggy

from . import engine_hookspecs, hookspecs
from .errors import PluginError, Refusal, unusable_answer
from .options import resolve_options

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "acestep.plugins"
"""Entry-point group under which distributions offer plugins."""

TRACE: Final = "ACESTEP_TRACE_HOOKS"
"""Environment variable that writes every hook call to standard error."""

_EXCLUSIVE: Final = hookspecs.EXCLUSIVE | engine_hookspecs.EXCLUSIVE


@dataclass(frozen=True)
class Installed:
    """A plugin of some installed distribution. Nothing of it has been imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint
    requires: tuple[str, ...] = ()


def installed_plugins() -> list[Installed]:
    """Every installed plugin, sorted by name and distribution."""
    import importlib.metadata  # slow to import, and not needed by every command

    found = {
        (point.name, distribution.metadata["Name"]): Installed(
            point.name,
            distribution.metadata["Name"],
            distribution.version,
            point,
            tuple(distribution.requires or ()),
        )
        for distribution in importlib.metadata.distributions()
        for point in distribution.entry_points
        if point.group == GROUP
    }
    return [found[key] for key in sorted(found)]


class Registry:
    """The plugins of one attachment. Each attachment has its own; none is global.

    A plugin may consist of parts: a module with ``PLUGINS``, a sequence of (name, module), brings each of them, named
    ``PLUGIN.NAME``. Plugins are called in the order in which they were registered, parts in the order of their list.
    Within one module or object, functions with the same ``specname`` are called in pluggy's order.
    """

    def __init__(self, wins: str | None = None) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._manager.add_hookspecs(engine_hookspecs)
        self._callers: dict[str, tuple[tuple[str, pluggy.HookCaller], ...]] = {}
        self._trace = os.environ.get(TRACE, "").strip() not in ("", "0")
        self._parts: list[str] = []
        self.names: list[str] = []  # of the plugins, without their parts
        self.wins = wins

    @classmethod
    def load(cls, names: Iterable[str], wins: str | None = None, *, later: Iterable[str] = ()) -> Registry:
        """Load plugins by name, in that order; a name given twice counts once.

        Args:
            wins: the plugin to ask when two implement an exclusive hook.
            later: names under which plugin objects will be registered as well.

        Raises:
            PluginError: a name is not installed or offered twice, its code cannot be imported, it misspells a hook or
                its arguments, it implements nothing, or it shares an exclusive hook with another. Nothing stays
                registered then.
        """
        registry = cls(wins)
        names = list(dict.fromkeys(names))
        if wins is not None and wins not in (*names, *later):
            raise PluginError(
                f"--wins {wins}: no plugin of that name takes part ({', '.join(names) or 'none does'}). "
                "Name it with --plugin as well, or leave --wins out."
            )
        for name in names:
            plugin = _find(name)
            _check_version(plugin)
            try:
                loaded = plugin.entry_point.load()
                parts = [(part, import_module(module)) for part, module in getattr(loaded, "PLUGINS", ())]
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"Plugin {name!r} ({plugin.distribution} {plugin.version}) could not be imported: "
                    f"{type(error).__name__}: {error}. Leave the plugin out, or reinstall {plugin.distribution}."
                ) from error
            for part, module in parts:
                registry.register(module, f"{name}.{part}")
            if not parts:
                registry.register(loaded, name)
        return registry

    def register(self, plugin: object, name: str) -> None:
        """Add one plugin object, or a part of one, under a name. Raises PluginError; it is not registered then."""
        unmarked = [
            attribute
            for attribute in dir(plugin)
            if attribute.startswith(("acestep_", "engine_"))
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
            if self._manager.has_plugin(name) and name not in self._parts:
                self._manager.unregister(name=name)
            reason = " ".join(str(error).split())
            raise PluginError(f"Plugin {name!r} does not fit the hooks: {reason}. Known hooks: {_known()}.") from error
        hooks, owner = self._hooks_of_part(name), owner_of(name)
        for hook in hooks:
            rivals = {owner_of(impl.plugin_name) for impl in self._hook(hook).get_hookimpls()} - {owner}
            if hook in _EXCLUSIVE and rivals and self.wins not in (owner, *rivals):
                self._manager.unregister(name=name)
                rival = rivals.pop()
                raise PluginError(
                    f"Plugins {rival!r} and {owner!r} both implement {hook}, which only one plugin can. Name only one "
                    f"of them, or choose one: --wins {rival} or --wins {owner}."
                )
        if not hooks:
            self._manager.unregister(name=name)
            raise PluginError(f"Plugin {name!r} implements no hook. Known hooks: {_known()}.")
        self._parts.append(name)
        if owner not in self.names:
            self.names.append(owner)
        self._callers.clear()

    def hooks_of(self, name: str) -> list[str]:
        """Names of the public hooks that a registered plugin implements, with all its parts, sorted."""
        parts = [part for part in self._parts if owner_of(part) == name]
        return sorted({hook for part in parts for hook in self._hooks_of_part(part) if hook.startswith("acestep_")})

    def _hooks_of_part(self, name: str) -> list[str]:
        callers = self._manager.get_hookcallers(self._manager.get_plugin(name)) or []
        return sorted({caller.name for caller in callers})

    def callers(self, hook: str) -> tuple[tuple[str, pluggy.HookCaller], ...]:
        """Each part's name and its caller for one hook, in the order in which the parts were registered."""
        if hook not in self._callers:
            plugins = {name: self._manager.get_plugin(name) for name in self._parts}
            implementing = [name for name in self._parts if hook in self._hooks_of_part(name)]
            if hook in _EXCLUSIVE and len({owner_of(name) for name in implementing}) > 1:
                implementing = [name for name in implementing if owner_of(name) == self.wins]
            self._callers[hook] = tuple(
                (name, self._manager.subset_hook_caller(hook, [plugins[other] for other in plugins if other != name]))
                for name in implementing
            )
        return self._callers[hook]

    def asked(self, hook: str) -> str | None:
        """Name of the plugin that answers an exclusive hook; None if none does."""
        return next((owner_of(name) for name, _ in self.callers(hook)), None)

    def implements(self, hook: str) -> bool:
        """Whether any registered plugin implements a hook."""
        return bool(self._hook(hook).get_hookimpls())

    def call(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Call a hook of every plugin in turn and return the answers with the plugins' names. None is left out.

        Raises:
            Refusal: a plugin raised it.
            PluginError: a plugin raised anything else, or called sys.exit(); names the plugin and the hook.
        """
        answers: list[tuple[str, Any]] = []
        for name, caller in self.callers(hook):
            answers += [(name, answer) for answer in self.ask(name, caller, hook, arguments)]
            if answers and hook in hookspecs.SILENT:
                raise unusable_answer(name, hook, described(answers[-1][1]), "nothing")
        return answers

    def ask(self, name: str, caller: Callable[..., Any], hook: str, arguments: Mapping[str, Any]) -> list[Any]:
        """Call a hook of one part of a plugin; see :meth:`call`."""
        try:
            answer = caller(**arguments)
        except Refusal:
            raise
        except (Exception, SystemExit) as error:  # sys.exit() would end the training as if it had gone well
            raise PluginError(f"Plugin {name!r} failed in {hook}: {type(error).__name__}: {error}") from error
        if self._trace:
            asked = ", ".join(f"{key}={described(value)}" for key, value in arguments.items())
            print(f"{name}.{hook}({asked}) -> {described(answer)}", file=sys.stderr, flush=True)  # noqa: T201
        if answer is None:
            return []
        # pluggy returns the one answer of an exclusive hook, and a list of all answers of any other.
        return [answer] if hook in _EXCLUSIVE else list(answer)

    def declared_options(self) -> list[click.Option]:
        """The options of all plugins. Raises PluginError when two declare the same name."""
        owners: dict[str, str] = {}
        options: list[click.Option] = []
        for plugin, declared in self.call("acestep_options"):
            if not isinstance(declared, Sequence) or not all(isinstance(option, click.Option) for option in declared):
                raise unusable_answer(plugin, "acestep_options", repr(declared), "click options")
            for option in declared:
                owner = owners.setdefault(str(option.name), plugin)
                if owner != plugin:
                    raise PluginError(
                        f"Plugins {owner!r} and {plugin!r} both declare the option {option.name!r}. "
                        "Name only one of them."
                    )
                options.append(option)
        return options

    def resolve_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values of all plugins' options, checked and with defaults. Raises Refusal."""
        return resolve_options(self.declared_options(), given)

    def options_in(self, environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """Options set by environment variables, ``PLUGIN_OPTION`` in capitals, such as ``SIDESTEP_CFG_RATIO=0.1``.

        Returns:
            values by option name, as texts; and the names of variables that look like options but are not.

        Raises:
            Refusal: a variable is almost an option's: a misspelled setting would be ignored.
        """
        names = {
            f"{owner_of(plugin)}_{option.name}".replace("-", "_").upper(): str(option.name)
            for plugin, declared in self.call("acestep_options")
            for option in declared
        }
        prefixes = tuple(f"{plugin}_".replace("-", "_").upper() for plugin in self.names)
        values = {names[key]: text for key, text in environment.items() if key in names and text.strip()}
        unknown = sorted(key for key in environment if prefixes and key.startswith(prefixes) and key not in names)
        for key in unknown:
            if near := difflib.get_close_matches(key, names, n=1, cutoff=0.85):
                raise Refusal(f"The environment has {key}, which is not an option. Did you mean {near[0]}?")
        return values, unknown

    def _hook(self, hook: str) -> pluggy.HookCaller:
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller


@dataclass(frozen=True)
class Listing:
    """One line of ``acestep-train plugins``."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    error: str | None = None


def list_plugins() -> list[Listing]:
    """Load every installed plugin on its own and list what it implements, or why it failed."""
    listings = []
    for plugin in installed_plugins():
        about = (plugin.name, plugin.distribution, plugin.version)
        try:
            registry = Registry.load([plugin.name])
            options = tuple(option.opts[0] for option in registry.declared_options())
            listings.append(Listing(*about, tuple(registry.hooks_of(plugin.name)), options))
        except Refusal as refusal:
            listings.append(Listing(*about, error=str(refusal)))
    return listings


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def owner_of(part: str) -> str:
    """The plugin that a part belongs to: sidestep for sidestep.timesteps."""
    return part.partition(".")[0]


def _find(name: str) -> Installed:
    plugins = installed_plugins()
    matching = [plugin for plugin in plugins if plugin.name == name]
    if not matching:
        known = ", ".join(plugin.name for plugin in plugins) or "none"
        near = difflib.get_close_matches(name.lower(), [plugin.name for plugin in plugins], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise PluginError(f"No plugin {name!r} is installed.{hint} Installed: {known}.")
    if len(matching) > 1:
        offering = " and ".join(plugin.distribution for plugin in matching)
        raise PluginError(f"Plugin {name!r} is offered by {offering}. Uninstall one of them.")
    return matching[0]


def described(value: Any) -> str:
    """Describe a value without its contents: reading a tensor on a GPU would wait for it."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    shape = getattr(value, "shape", None)
    if shape is not None:
        dtype = str(getattr(value, "dtype", "?")).removeprefix("torch.")
        return f"tensor {list(shape)} {dtype} on {getattr(value, 'device', '?')}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(described(entry) for entry in value[:8]) + (", ...]" if len(value) > 8 else "]")
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    name = type(value).__name__
    return str(value) if name in ("device", "dtype") else name


def _check_version(plugin: Installed) -> None:
    """Raise PluginError when a plugin's distribution requires another version of this package."""
    import importlib.metadata

    try:
        from packaging.requirements import InvalidRequirement, Requirement
        from packaging.utils import canonicalize_name
    except ImportError:  # every environment in which ACE-Step trains has it; without it pip has checked at install
        return
    ours = importlib.metadata.version("sidestep-plugin")
    for text in plugin.requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        wanted = canonicalize_name(requirement.name) == "sidestep-plugin" and requirement.marker is None
        if wanted and not requirement.specifier.contains(ours, prereleases=True):
            raise PluginError(
                f"Plugin {plugin.name!r} ({plugin.distribution} {plugin.version}) needs sidestep-plugin "
                f"{requirement.specifier}, {ours} is installed. Install matching versions."
            )


def _known() -> str:
    return ", ".join(sorted(name for name in vars(hookspecs) if name.startswith("acestep_")))
