"""Plugins that misbehave, a whole training each, which ends with a message that names plugin, hook and finding."""

from __future__ import annotations

import time

import pytest
import torch

from sidestep_plugin import PluginError, hookimpl
from sidestep_plugin.registry import Registry
from sidestep_plugin.run import EpochNews

ONE = torch.zeros


def plugin_with(hook, answer, parameters):
    """A plugin whose only hook returns, or does, what `answer` says."""
    source = f"def {hook}({', '.join(parameters)}):\n    return answer({', '.join(parameters)})\n"
    scope = {"answer": answer}
    exec(source, scope)
    plugin = type("Plugin", (), {})()
    setattr(plugin, hook, hookimpl(scope[hook]))
    return plugin


def raising(*_):
    raise RuntimeError("the plugin's own trouble")


def leaving(*_):
    raise SystemExit(0)


CASES = {
    **{
        f"leaves in {hook}": (hook, [argument], leaving, "SystemExit: 0")
        for hook, argument in (
            ("acestep_run_started", "run"),
            ("acestep_prepare_batch", "batch"),
            ("acestep_sample_timesteps", "step"),
            ("acestep_step_finished", "step"),
        )
    },
    "raises when the run starts": ("acestep_run_started", ["run"], raising, "RuntimeError: the plugin's own trouble"),
    "raises while preparing": ("acestep_prepare_batch", ["batch"], raising, "RuntimeError: the plugin's own trouble"),
    "raises while sampling": ("acestep_sample_timesteps", ["step"], raising, "RuntimeError: the plugin's own trouble"),
    "raises after a step": ("acestep_step_finished", ["step"], raising, "RuntimeError: the plugin's own trouble"),
    "says a number": ("acestep_run_started", ["run"], lambda run: 5, "returned 5"),
    "says numbers": ("acestep_run_started", ["run"], lambda run: [1, 2], "returned [1, 2]"),
    "returns from a hook without result": ("acestep_step_finished", ["step"], lambda step: "x", "returned 'x'"),
    "says a line between epochs": (
        "acestep_between_epochs",
        ["epoch"],
        lambda epoch: "a line" if epoch == 0 else None,
        "expected an EpochNews",
    ),
    "logs a text between epochs": (
        "acestep_between_epochs",
        ["epoch"],
        lambda epoch: EpochNews(logged={"a": "b"}) if epoch == 0 else None,
        "returned 'a' as a str",
    ),
    "holds out every song": ("engine_hold_out", ["songs"], lambda songs: list(songs), "returned all 6 songs"),
    "holds out another song": ("engine_hold_out", ["songs"], lambda songs: [songs[0].with_name("x")], "returned /"),
    "batch is a list": ("acestep_prepare_batch", ["batch"], lambda batch: [1], "returned a list"),
    "new key": ("acestep_prepare_batch", ["batch"], lambda batch: {"new": ONE(1)}, "returned an entry 'new'"),
    "no tensor": (
        "acestep_prepare_batch",
        ["batch"],
        lambda batch: {"target_latents": 1},
        "returned 'target_latents' as an int",
    ),
    "wrong shape": (
        "acestep_prepare_batch",
        ["batch"],
        lambda batch: {"target_latents": batch["target_latents"][:, :1]},
        "expected a tensor of shape",
    ),
    "wrong kind of number": (
        "acestep_prepare_batch",
        ["batch"],
        lambda batch: {"target_latents": batch["target_latents"].long()},
        "expected floating numbers",
    ),
    "elsewhere": (
        "acestep_prepare_batch",
        ["batch"],
        lambda batch: {"target_latents": batch["target_latents"].to("meta")},
        "expected it on cpu",
    ),
    "takes a key away": ("acestep_prepare_batch", ["batch"], lambda batch: batch.pop("metadata"), "has no attribute"),
    "puts a key in": (
        "acestep_prepare_batch",
        ["batch"],
        lambda batch: batch.__setitem__("new", 1),
        "has no attribute",
    ),
    "writes into a tensor": (
        "acestep_prepare_batch",
        ["batch"],
        lambda batch: [batch["target_latents"].zero_()][:0] or None,
        "wrote into the batch's tensors",
    ),
    "t is a number": ("acestep_sample_timesteps", ["batch_size"], lambda size: 0.5, "returned a float"),
    "t of another length": ("acestep_sample_timesteps", ["batch_size"], lambda size: ONE(size + 1), "of shape"),
    "t of another shape": ("acestep_sample_timesteps", ["batch_size"], lambda size: ONE(size, 1), "of shape"),
    "t in another dtype": (
        "acestep_sample_timesteps",
        ["batch_size"],
        lambda size: ONE(size, dtype=torch.float64),
        "torch.float64",
    ),
    "t elsewhere": ("acestep_sample_timesteps", ["batch_size"], lambda size: ONE(size, device="meta"), "on meta"),
    "t above one": (
        "acestep_sample_timesteps",
        ["batch_size", "dtype"],
        lambda size, dtype: ONE(size, dtype=dtype) + 2,
        "outside [0, 1]",
    ),
    "t is not a number": (
        "acestep_sample_timesteps",
        ["batch_size", "dtype"],
        lambda size, dtype: ONE(size, dtype=dtype) / 0,
        "outside [0, 1]",
    ),
}


@pytest.mark.parametrize(("hook", "parameters", "answer", "found"), CASES.values(), ids=CASES.keys())
def test_the_training_ends_before_anything_was_learned(hook, parameters, answer, found, train):
    done = train("base", plugins=(), extra_plugins={"culprit": plugin_with(hook, answer, parameters)})
    (message,) = [text for text in done.messages if text.startswith("❌")]
    assert "'culprit'" in message and hook in message and found in message, message
    assert not done.tensors, "an adapter was saved"


@pytest.mark.parametrize(
    ("answer", "found"),
    [(raising, "RuntimeError: the plugin's own trouble"), (lambda saved: 5, "returned 5")],
    ids=["raises", "says a number"],
)
def test_trouble_after_saving_leaves_what_upstream_saved(answer, found, train):
    plugin = plugin_with("acestep_adapter_saved", answer, ["saved"])
    done = train("base", plugins=(), extra_plugins={"culprit": plugin})
    (message,) = [text for text in done.messages if text.startswith("❌")]
    assert "'culprit'" in message and "acestep_adapter_saved" in message and found in message
    saved = list(done.output.rglob("adapter_model.safetensors"))
    assert len(saved) == 1 and not any(part.startswith(".") for part in saved[0].relative_to(done.output).parts)


def logged(entries):
    return lambda run: {"mine/value": entries}


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (logged("0.5"), "returned 'mine/value' as a str"),
        (logged(None), "returned 'mine/value' as a NoneType"),
        (logged(torch.tensor([0.5, float("nan")])), "with values that are not finite"),
        (logged(torch.tensor([float("inf")])), "with values that are not finite"),
        (logged(torch.zeros(0)), "a tensor of shape [0]"),
        (logged(torch.zeros(2, dtype=torch.complex64)), "torch.complex64"),
        (lambda run: {3: 0.5}, "returned an entry named 3"),
        (lambda run: 0.5, "returned a float"),
        (raising, "RuntimeError: the plugin's own trouble"),
        (leaving, "SystemExit: 0"),
    ],
)
def test_trouble_at_the_end_of_an_epoch_names_the_plugin(answer, found, train):
    plugin = plugin_with("acestep_epoch_finished", answer, ["run"])
    done = train("base", extra_plugins={"culprit": plugin})
    (message,) = [text for text in done.messages if text.startswith("❌")]
    assert "'culprit'" in message and "acestep_epoch_finished" in message and found in message, message
    assert (done.output / "interrupted").is_dir(), "the epoch is lost"


def test_what_can_be_logged_is(train):
    values = {"a": 1, "b": 0.5, "c": True, "d": torch.arange(3), "e": torch.tensor(0.5), "f": float("nan")}
    plugin = plugin_with("acestep_epoch_finished", lambda run: values, ["run"])
    assert train("base", extra_plugins={"friend": plugin}).tensors


def test_a_first_step_that_fails_saves_nothing(train):
    """There was no optimizer step, so there is nothing to resume."""
    done = train("base", extra_plugins={"culprit": plugin_with("acestep_step_finished", raising, ["step"])})
    assert done.messages[-1].startswith("❌") and "'culprit'" in done.messages[-1]
    assert not any("Saved as it was" in text for text in done.messages)
    assert not (done.output / "interrupted").exists()


def test_leaving_in_a_later_step_saves_what_was_learned(train):
    steps = []

    def leave(step):
        steps.append(step)
        if len(steps) == 4:
            raise SystemExit(0)

    done = train("base", extra_plugins={"culprit": plugin_with("acestep_step_finished", leave, ["step"])})
    assert "'culprit' failed in acestep_step_finished: SystemExit: 0" in done.messages[-1]
    assert any("Saved as it was after 4 training steps" in text for text in done.messages)
    assert (done.output / "interrupted").is_dir()


def test_trouble_before_the_model_is_loaded():
    for answer, found in ((raising, "RuntimeError"), (lambda facts: 5, "returned 5 from acestep_model_chosen")):
        registry = Registry()
        registry.register(plugin_with("acestep_model_chosen", answer, ["facts"]), "culprit")
        with pytest.raises(PluginError, match=found):
            registry.call("acestep_model_chosen", facts=None, options={})


def install(folder, name, code, requires="sidestep-plugin"):
    """What pip leaves behind of a plugin."""
    (folder / f"{name}_plugin.py").write_text(code, encoding="utf-8")
    about = folder / f"{name}_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\nRequires-Dist: {requires}\n", encoding="utf-8"
    )
    (about / "entry_points.txt").write_text(f"[acestep.plugins]\n{name} = {name}_plugin\n", encoding="utf-8")


GOOD = "from sidestep_plugin import hookimpl\n\n@hookimpl\ndef acestep_run_started(run):\n    return None\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "requires", ["sidestep-plugin>=99", "Sidestep_Plugin ==0.0.1", "sidestep-plugin[upstream]<0.1"]
)
def test_a_plugin_for_another_version_is_refused_before_it_is_imported(requires, site):
    install(site, "other", "raise SystemExit('imported')", requires)
    with pytest.raises(PluginError, match=r"'other' \(other-plugin 1.0\) needs sidestep-plugin .*0.1.0 is installed"):
        Registry.load(["other"])


@pytest.mark.parametrize(
    "requires", ["sidestep-plugin", "sidestep-plugin>=0.1", "numpy>=99", "sidestep-plugin>=99; extra == 'x'"]
)
def test_a_plugin_for_this_version_is_loaded(requires, site):
    install(site, "fitting", GOOD, requires)
    assert Registry.load(["fitting"]).names == ["fitting"]


def test_a_missing_dependency_is_named(site):
    install(site, "lacking", "import a_library_that_is_not_there\n" + GOOD)
    with pytest.raises(PluginError, match=r"'lacking' .*No module named 'a_library_that_is_not_there'"):
        Registry.load(["lacking"])


def test_a_slow_import_is_waited_for(site):
    install(site, "slow", "import time\n\ntime.sleep(0.3)\nloaded = time.monotonic()\n" + GOOD)
    before = time.monotonic()
    assert Registry.load(["slow"]).names == ["slow"]
    import slow_plugin

    assert slow_plugin.loaded > before
