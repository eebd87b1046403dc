"""Plugins: found by entry point, loaded only when named, checked, asked in order, listed."""

import inspect
import sys
import types
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

import click
import pytest

from sidestep_plugin import PluginError, Refusal, engine_hookspecs, hookimpl, hookspecs, registry
from sidestep_plugin.registry import Installed, Registry, installed_plugins, list_plugins

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("acestep_"))


@dataclass
class Offered:
    """Stands for an entry point: loads an object, or raises."""

    plugin: Any = None
    error: Exception | None = None
    loaded: list[int] = field(default_factory=list)

    def load(self):
        self.loaded.append(1)
        if self.error:
            raise self.error
        return self.plugin


@pytest.fixture
def offer(monkeypatch):
    """Install plugins for one test: ``offer(name=plugin or exception)``."""

    def install(**plugins):
        points = {
            name: Offered(error=what) if isinstance(what, Exception) else Offered(what)
            for name, what in plugins.items()
        }
        installed = [Installed(name, f"dist-{name}", "1.2", point) for name, point in points.items()]
        monkeypatch.setattr(registry, "installed_plugins", lambda: installed)
        return points

    return install


def a_plugin(name="demo", **functions):
    """A module with hooks; each function's name is its hook's."""
    module = types.ModuleType(name)
    for hook, function in functions.items():
        function.__name__ = hook
        setattr(module, hook, hookimpl(function))
    return module


def saying(line, log=None):
    def acestep_run_started(run):
        if log is not None:
            log.append(line)
        return [line]

    return a_plugin(acestep_run_started=acestep_run_started)


def a_sampler():
    return a_plugin(acestep_sample_timesteps=lambda step, batch_size: None)


def with_options(*names, default=1):
    return a_plugin(acestep_options=lambda: [click.Option([name], default=default) for name in names])


def is_empty(loaded):
    return loaded.names == [] and not any(loaded.implements(hook) or loaded.callers(hook) for hook in HOOKS)


# -- the hooks themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_a_spec_and_says_when_it_is_called(hook):
    spec = getattr(hookspecs, hook)
    assert hasattr(spec, f"{hookspecs.PROJECT}_spec")
    text = inspect.getdoc(spec)
    assert "When: " in text
    assert all(parameter in text for parameter in inspect.signature(spec).parameters)


def test_the_exclusive_hooks_are_hooks():
    assert set(HOOKS) >= hookspecs.EXCLUSIVE


# -- finding and loading ---------------------------------------------------------------------------------------------


def test_the_plugin_sidestep_is_installed_and_loads():
    loaded = Registry.load(["sidestep"])
    assert loaded.names == ["sidestep"]
    assert loaded.hooks_of("sidestep") == HOOKS, "a public hook that nothing of ours uses does not belong there"
    assert loaded.resolve_options({})["cfg_ratio"] == 0.15


def test_without_a_name_nothing_is_loaded(offer):
    points = offer(a=saying("a"))
    assert is_empty(Registry.load([]))
    assert not points["a"].loaded


def test_only_the_named_plugin_is_imported(offer):
    points = offer(a=saying("a"), b=ImportError("never asked for"))
    assert Registry.load(["a"]).names == ["a"]
    assert points["a"].loaded
    assert not points["b"].loaded


def test_an_unknown_name_lists_what_is_installed(offer):
    offer(beta=saying("b"), alpha=saying("a"))
    with pytest.raises(PluginError, match=r"No plugin 'sidestpe' is installed\. Installed: beta, alpha\."):
        Registry.load(["sidestpe"])
    offer()
    with pytest.raises(PluginError, match=r"Installed: none\."):
        Registry.load(["sidestep"])


@pytest.mark.parametrize(
    "error", [ImportError("no module named xyz"), SyntaxError("bad line"), RuntimeError("boom"), AttributeError("gone")]
)
def test_a_plugin_that_cannot_be_imported_is_named_with_the_reason(error, offer):
    offer(bad=error)
    with pytest.raises(PluginError, match=f"'bad'.*dist-bad 1.2.*{type(error).__name__}: {error}.*reinstall") as raised:
        Registry.load(["bad"])
    assert raised.value.__cause__ is error


def test_a_real_entry_point_to_nothing_is_named(monkeypatch):
    point = EntryPoint("ghost", "no_such_module_anywhere", registry.GROUP)
    monkeypatch.setattr(registry, "installed_plugins", lambda: [Installed("ghost", "ghost-dist", "3", point)])
    with pytest.raises(PluginError, match=r"'ghost'.*ModuleNotFoundError.*no_such_module_anywhere"):
        Registry.load(["ghost"])


def test_a_name_that_two_distributions_offer_is_refused_by_both(monkeypatch):
    twice = [Installed("a", dist, "1", Offered(saying("a"))) for dist in ("first-dist", "second-dist")]
    monkeypatch.setattr(registry, "installed_plugins", lambda: twice)
    with pytest.raises(PluginError, match=r"'a' is offered by first-dist and second-dist"):
        Registry.load(["a"])


def test_an_installed_distribution_is_found_and_not_imported_until_named(tmp_path, monkeypatch):
    info = tmp_path / "found_by_entry_point-4.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: found-by-entry-point\nVersion: 4.5\n")
    (info / "entry_points.txt").write_text("[acestep.plugins]\nfound = found_by_entry_point\n[other]\nnot = os\n")
    (tmp_path / "found_by_entry_point.py").write_text(
        "from sidestep_plugin import hookimpl\n\n\n@hookimpl\ndef acestep_run_started(run):\n    return ['hello']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    offered = {plugin.name: (plugin.distribution, plugin.version) for plugin in installed_plugins()}
    assert offered["found"] == ("found-by-entry-point", "4.5")
    assert {"not", "found_by_entry_point"}.isdisjoint(offered)
    assert "found_by_entry_point" not in sys.modules
    try:
        assert Registry.load(["found"]).call("acestep_run_started", run=None) == [("found", ["hello"])]
    finally:
        sys.modules.pop("found_by_entry_point", None)


# -- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]])
def test_plugins_are_asked_in_the_order_in_which_they_were_named(names, offer):
    log = []
    offer(a=saying("a", log), b=saying("b", log), c=saying("c", log))
    loaded = Registry.load(names)
    assert loaded.call("acestep_run_started", run=None) == [(name, [name]) for name in names]
    assert log == names == loaded.names
    assert [name for name, _ in loaded.callers("acestep_run_started")] == names


def test_a_plugin_named_twice_counts_once(offer):
    log = []
    offer(a=saying("a", log), b=saying("b", log))
    loaded = Registry.load(["a", "b", "a"])
    loaded.call("acestep_run_started", run=None)
    assert loaded.names == log == ["a", "b"]


def test_a_plugin_that_comes_later_is_asked_too():
    loaded = Registry()
    loaded.register(saying("a"), "a")
    assert loaded.call("acestep_run_started", run=None) == [("a", ["a"])]
    loaded.register(saying("b"), "b")
    assert loaded.call("acestep_run_started", run=None) == [("a", ["a"]), ("b", ["b"])]


def test_two_registries_know_nothing_of_each_other():
    one, other = Registry(), Registry()
    one.register(saying("a"), "a")
    assert is_empty(other)


def test_a_class_instance_can_be_a_plugin():
    class Plugin:
        @hookimpl
        def acestep_run_started(self, run):
            return [f"run {run}"]

    loaded = Registry()
    loaded.register(Plugin(), "p")
    assert loaded.call("acestep_run_started", run=7) == [("p", ["run 7"])]


# -- the parts of a plugin -------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch, offer):
    """Offer a plugin of parts: ``parts(("first", module), ...)``, each importable under its own name."""

    def make(*named):
        for name, module in named:
            monkeypatch.setitem(sys.modules, f"parts_of_a_test_{name}", module)
        whole = types.ModuleType("whole")
        whole.PLUGINS = tuple((name, f"parts_of_a_test_{name}") for name, _ in named)
        offer(whole=whole)
        return Registry.load(["whole"])

    return make


def called(function, answer):
    """A module whose hook is a function of that name."""
    module = types.ModuleType("part")
    exec(f"def {function}(run): return {[answer]!r}", vars(module))
    setattr(module, function, hookimpl(specname="acestep_run_started")(vars(module)[function]))
    return module


@pytest.mark.parametrize("names", [("a", "b", "c"), ("z", "m", "a"), ("acestep_run_started",) * 3])
def test_parts_are_asked_in_the_order_of_their_list_whatever_their_functions_are_called(names, parts):
    loaded = parts(*((part, called(name, part)) for part, name in zip(("one", "two", "three"), names, strict=True)))
    assert loaded.call("acestep_run_started", run=None) == [
        (f"whole.{part}", [part]) for part in ("one", "two", "three")
    ]
    assert loaded.names == ["whole"]


def test_the_parts_of_sidestep_are_asked_as_they_are_listed():
    from sidestep_plugin.hooks import PLUGINS

    loaded, listed = Registry.load(["sidestep"]), [f"sidestep.{name}" for name, _ in PLUGINS]
    for hook in [*HOOKS, *(name for name in vars(engine_hookspecs) if name.startswith("engine_"))]:
        asked = [name for name, _ in loaded.callers(hook)]
        assert asked == [name for name in listed if name in asked], hook


def test_two_parts_of_one_plugin_may_not_declare_an_option_twice_for_another(parts, offer):
    one, other = with_options("--colour"), with_options("--colour")
    with pytest.raises(PluginError, match=r"'whole\.one' and 'whole\.two' both declare the option 'colour'"):
        parts(("one", one), ("two", other)).declared_options()


def test_an_environment_variable_is_named_after_the_plugin_and_not_after_its_part(parts):
    loaded = parts(("one", with_options("--colour")))
    assert loaded.options_in({"WHOLE_COLOUR": "7"}) == ({"colour": "7"}, [])


# -- what does not fit -----------------------------------------------------------------------------------------------


def a_misspelled_hook():
    return a_plugin(acestep_adapter_saved=lambda run: None, acestep_run_strated=lambda run: None)


def a_wrong_argument():
    return a_plugin(acestep_adapter_saved=lambda run: None, acestep_run_started=lambda run, colour: None)


def a_forgotten_mark():
    plugin = a_plugin(acestep_adapter_saved=lambda run: None)
    plugin.acestep_run_started = lambda run: None
    return plugin


def a_second_sampler():
    return a_plugin(acestep_adapter_saved=lambda run: None, acestep_sample_timesteps=lambda step: None)


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (a_misspelled_hook, "'bad'.*acestep_run_strated.*Known hooks: .*acestep_run_started"),
        (a_wrong_argument, "'bad'.*acestep_run_started.*colour"),
        (a_forgotten_mark, "'bad': acestep_run_started looks like a hook but lacks @hookimpl"),
        (lambda: types.ModuleType("empty"), "'bad' implements no hook. Known hooks: .*acestep_run_started"),
    ],
    ids=["misspelled hook", "wrong argument", "forgotten mark", "no hook"],
)
def test_a_plugin_that_does_not_fit_is_refused_with_the_reason_and_leaves_nothing(plugin, reason, offer):
    loaded = Registry()
    with pytest.raises(PluginError, match=reason):
        loaded.register(plugin(), "bad")
    assert is_empty(loaded)
    loaded.register(saying("good"), "bad")
    assert loaded.call("acestep_run_started", run=None) == [("bad", ["good"])]

    offer(bad=plugin())
    with pytest.raises(PluginError, match=reason):
        Registry.load(["bad"])


@pytest.mark.parametrize("plugin", [a_misspelled_hook, a_wrong_argument, a_forgotten_mark, a_second_sampler])
def test_a_plugin_that_fails_half_way_is_never_called_and_disturbs_no_other(plugin):
    called, bad, good = [], plugin(), a_sampler()
    for mine, name in ((bad, "bad"), (good, "good")):
        mine.acestep_adapter_saved = hookimpl(lambda run, name=name: called.append(name))
    loaded = Registry()
    loaded.register(good, "good")
    loaded.call("acestep_adapter_saved", run=None, saved=None)
    with pytest.raises(PluginError):
        loaded.register(bad, "bad")
    loaded.call("acestep_adapter_saved", run=None, saved=None)
    assert called == ["good", "good"]
    assert loaded.names == ["good"]


def test_two_samplers_are_refused_by_both_names(offer):
    offer(mine=a_sampler(), yours=a_sampler())
    with pytest.raises(PluginError, match=r"'mine' and 'yours' both implement acestep_sample_timesteps"):
        Registry.load(["mine", "yours"])


def test_one_plugin_under_two_names_is_refused():
    loaded, plugin = Registry(), saying("a")
    loaded.register(plugin, "a")
    with pytest.raises(PluginError, match=r"'again'"):
        loaded.register(plugin, "again")
    assert loaded.call("acestep_run_started", run=None) == [("a", ["a"])]


def test_two_plugins_under_one_name_are_refused_and_the_first_stays():
    loaded = Registry()
    loaded.register(saying("first"), "a")
    with pytest.raises(PluginError, match=r"'a'"):
        loaded.register(saying("second"), "a")
    assert loaded.call("acestep_run_started", run=None) == [("a", ["first"])]


# -- asking ----------------------------------------------------------------------------------------------------------


def raising(error):
    def fail(run):
        raise error

    return a_plugin(acestep_run_started=fail)


def test_an_exception_in_a_hook_names_the_plugin_and_the_hook():
    error, loaded = KeyError("mu"), Registry()
    loaded.register(saying("fine"), "fine")
    loaded.register(raising(error), "broken")
    with pytest.raises(PluginError, match=r"'broken' failed in acestep_run_started: KeyError: 'mu'") as raised:
        loaded.call("acestep_run_started", run=None)
    assert raised.value.__cause__ is error


def test_a_refusal_passes_through_as_it_is():
    refusal, loaded = Refusal("Take another model."), Registry()
    loaded.register(raising(refusal), "strict")
    with pytest.raises(Refusal) as raised:
        loaded.call("acestep_run_started", run=None)
    assert raised.value is refusal


def test_an_interruption_passes_through():
    loaded = Registry()
    loaded.register(raising(KeyboardInterrupt()), "p")
    with pytest.raises(KeyboardInterrupt):
        loaded.call("acestep_run_started", run=None)


def test_a_plugin_that_exits_is_named():
    """Passed on, it would end the training with exit code 0 and without an adapter."""
    loaded = Registry()
    loaded.register(raising(SystemExit(0)), "p")
    with pytest.raises(PluginError, match="'p' failed in acestep_run_started: SystemExit: 0"):
        loaded.call("acestep_run_started", run=None)


def test_a_plugin_that_says_nothing_has_no_answer():
    loaded = Registry()
    loaded.register(a_plugin(acestep_run_started=lambda run: None), "quiet")
    loaded.register(saying("a"), "a")
    assert loaded.call("acestep_run_started", run=None) == [("a", ["a"])]
    assert loaded.implements("acestep_run_started")
    assert not loaded.implements("acestep_step_finished")


@pytest.mark.parametrize("answer", [[], [0.5, 0.5], (0.5,), 0.5])
def test_the_answer_of_a_sampler_is_one_answer_of_whatever_kind(answer):
    loaded = Registry()
    loaded.register(a_plugin(acestep_sample_timesteps=lambda step: answer), "p")
    asked = {"step": None, "batch_size": 2, "device": None, "dtype": None}
    assert loaded.call("acestep_sample_timesteps", **asked) == [("p", answer)]


# -- options ---------------------------------------------------------------------------------------------------------


def test_options_of_all_plugins_are_put_together():
    loaded = Registry()
    loaded.register(with_options("--mine"), "a")
    loaded.register(with_options("--yours", "--other"), "b")
    assert [option.name for option in loaded.declared_options()] == ["mine", "yours", "other"]
    assert loaded.resolve_options({"yours": 5}) == {"mine": 1, "yours": 5, "other": 1}


def test_an_option_that_two_plugins_declare_is_refused_by_both_names():
    loaded = Registry()
    loaded.register(with_options("--mine", "--same"), "a")
    loaded.register(with_options("--same"), "b")
    with pytest.raises(PluginError, match=r"'a' and 'b' both declare the option 'same'"):
        loaded.declared_options()


@pytest.mark.parametrize("wrong", [["--mine"], [None], 5], ids=["text", "None", "number"])
def test_an_option_that_is_no_click_option_is_an_error_of_its_plugin(wrong):
    loaded = Registry()
    loaded.register(a_plugin(acestep_options=lambda: wrong), "p")
    with pytest.raises(PluginError, match=r"'p'"):
        loaded.declared_options()


# -- listing ---------------------------------------------------------------------------------------------------------


def test_the_list_tells_of_each_plugin_what_it_implements_or_why_it_failed(offer):
    offer(
        fine=with_options("--mine"),
        broken=ImportError("no module named xyz"),
        misspelled=a_misspelled_hook(),
        empty=types.ModuleType("empty"),
        failing=a_plugin(acestep_options=lambda: 1 / 0),
    )
    listed = {listing.name: listing for listing in list_plugins()}
    assert list(listed) == ["fine", "broken", "misspelled", "empty", "failing"]
    fine = listed.pop("fine")
    assert (fine.distribution, fine.version, fine.error) == ("dist-fine", "1.2", None)
    assert (fine.hooks, fine.options) == (("acestep_options",), ("--mine",))
    reasons = ["no module named xyz", "acestep_run_strated", "implements no hook", "ZeroDivisionError"]
    assert [reason in listing.error for reason, listing in zip(reasons, listed.values(), strict=True)] == [True] * 4


def test_the_list_holds_two_samplers_since_each_is_loaded_on_its_own(offer):
    offer(mine=a_sampler(), yours=a_sampler())
    assert [listing.error for listing in list_plugins()] == [None, None]


def test_the_list_survives_a_plugin_whose_options_are_none(offer):
    offer(odd=a_plugin(acestep_options=lambda: ["--mine"]), fine=saying("a"))
    odd, fine = list_plugins()
    assert "odd" in odd.error
    assert fine.error is None


def test_the_list_holds_sidestep_as_it_is_installed():
    (sidestep,) = [listing for listing in list_plugins() if listing.name == "sidestep"]
    assert sidestep.error is None
    assert sidestep.distribution == "sidestep-plugin"
    assert "acestep_sample_timesteps" in sidestep.hooks
    assert "--cfg-ratio" in sidestep.options
