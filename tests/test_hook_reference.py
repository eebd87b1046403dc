"""Every hook has a section in docs/hooks.md, a runnable example there, and a test of that example here."""

from __future__ import annotations

import importlib.util
import re
import shutil

import hook_reference
import pytest

from sidestep_plugin import Refusal
from sidestep_plugin.run import ModelFacts

HOOKS = hook_reference.HOOKS


def example(hook):
    spec = importlib.util.spec_from_file_location(f"example_{hook}", hook_reference.EXAMPLES / f"{hook}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes():
    written = hook_reference.PAGE.read_text(encoding="utf-8")
    assert written == hook_reference.reference(), "run: python tests/tools/hook_reference.py"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_section_an_example_and_a_test_of_it(hook):
    page = hook_reference.PAGE.read_text(encoding="utf-8")
    section = page.partition(f"\n## {hook}\n")[2].partition("\n## ")[0]
    assert section, f"{hook} has no section"
    assert (hook_reference.EXAMPLES / f"{hook}.py").read_text(encoding="utf-8") in section
    assert "**When:**" in section
    assert f"test_{hook}" in globals(), f"the example of {hook} has no test"


def test_an_example_implements_its_hook_and_nobody_else_is_there():
    files = {file.stem for file in hook_reference.EXAMPLES.glob("*.py")}
    assert files == set(HOOKS)
    assert all(hasattr(getattr(example(hook), hook), "acestep_impl") for hook in HOOKS)


def trained_with(train, hook, capsys, **more):
    done = train("base", "lora", plugins=(), extra_plugins={"example": example(hook)}, **more)
    return done, capsys.readouterr().out


def test_acestep_options(train, capsys):
    _, said = trained_with(train, "acestep_options", capsys, options={"noise": 0.25})
    assert "Noise on the conditions: 0.25" in said
    with pytest.raises(Refusal, match="Option noise: 2"):
        train("base", "lora", plugins=(), extra_plugins={"example": example("acestep_options")}, options={"noise": 2})


def with_a_folder_for_validation(checkout, tmp_path):
    """Copies of the songs, one of them in a folder of its own."""
    songs = tmp_path / "songs"
    shutil.copytree(checkout.tensors, songs, ignore=shutil.ignore_patterns("manifest.json"))
    (tmp_path / "validation").mkdir()
    shutil.move(songs / "song_01.pt", tmp_path / "validation")
    return songs


def test_acestep_model_chosen():
    chosen = example("acestep_model_chosen").acestep_model_chosen
    assert chosen(ModelFacts("acestep-v15-base", {}, {})) is None
    with pytest.raises(Refusal, match="Choose a standard model"):
        chosen(ModelFacts("acestep-v15-xl-base", {}, {}))


def test_acestep_run_started(train, capsys):
    _, said = trained_with(train, "acestep_run_started", capsys)
    assert re.search(r"lora of rank \d+, \d+ epochs", said)
    done, _ = trained_with(train, "acestep_run_started", capsys, max_epochs=1001)
    assert "--epochs 1000" in done.messages[-1] and not done.losses


def test_acestep_prepare_batch(train, capsys):
    done, _ = trained_with(train, "acestep_prepare_batch", capsys)
    assert done.conditions
    assert all((batch == batch[:1, :1]).all() for batch in done.conditions), "a condition that is not the null one"


def test_acestep_sample_timesteps(train, capsys):
    done, _ = trained_with(train, "acestep_sample_timesteps", capsys)
    assert done.timesteps
    assert all((t >= 0.5).all() for t in done.timesteps)


def test_acestep_step_finished(train, capsys, monkeypatch):
    module = example("acestep_step_finished")
    kept = {}
    original = module.acestep_step_finished

    class Watching:
        def __init__(self):
            self.acestep_step_finished = original

    def remember(step):
        original(step)
        kept["timesteps"] = step.run.state["timesteps"]

    remember.acestep_impl = original.acestep_impl
    watching = Watching()
    watching.acestep_step_finished = remember
    # Without any plugin that samples: upstream's own timesteps are told just the same.
    done = train("base", "lora", plugins=(), extra_plugins={"example": watching})
    assert len(kept["timesteps"]) == len(done.losses) > 0
    assert all(t.equal(seen) for t, seen in zip(kept["timesteps"], done.timesteps, strict=True))


def test_acestep_epoch_finished(train, trainer, capsys, monkeypatch):
    logged = []
    if getattr(trainer, "LIGHTNING_AVAILABLE", False):
        from lightning.fabric.loggers import TensorBoardLogger

        def log_metrics(_, metrics, step=None):
            logged.append((metrics, step))

        monkeypatch.setattr(TensorBoardLogger, "log_metrics", log_metrics)
    done, _ = trained_with(train, "acestep_epoch_finished", capsys)
    assert len(done.losses) == 6
    ours = [(values, step) for values, step in logged if "songs seen" in values]
    assert ours == ([({"songs seen": 6.0}, 1), ({"songs seen": 12.0}, 2)] if logged else [])


def test_acestep_between_epochs(train, trainer, capsys, monkeypatch):
    logged = []
    if getattr(trainer, "LIGHTNING_AVAILABLE", False):
        from lightning.fabric.loggers import TensorBoardLogger

        def log_metrics(_, metrics, step=None):
            logged.append((metrics, step))

        monkeypatch.setattr(TensorBoardLogger, "log_metrics", log_metrics)
    done, said = trained_with(train, "acestep_between_epochs", capsys)
    norms = re.findall(r"After epoch (\d): norm of the adapter (\d+\.\d{4})", said)
    assert [epoch for epoch, _ in norms] == ["0", "1", "2"] and len({norm for _, norm in norms}) == 3
    ours = [(f"{values['adapter norm']:.4f}", step) for values, step in logged if "adapter norm" in values]
    assert ours == ([(norm, int(epoch)) for epoch, norm in norms] if logged else []) and done.tensors


def test_acestep_run_ended(train, capsys):
    done, _ = trained_with(train, "acestep_run_ended", capsys)
    assert f"{done.output.name}: finished after 6 steps" in done.messages


def test_acestep_adapter_saved(train, capsys):
    done, said = trained_with(train, "acestep_adapter_saved", capsys)
    (note,) = done.output.glob("final/**/NOTE.txt")
    assert re.fullmatch(r"Trained on \S+ for \d+ steps.\n", note.read_text(encoding="utf-8"))
    assert "A note lies beside adapter_model.safetensors." in said


def test_the_hooks_stand_in_the_order_in_which_they_are_called(train, monkeypatch, capsys):
    monkeypatch.setenv("ACESTEP_TRACE_HOOKS", "1")
    parts = {hook: example(hook) for hook in HOOKS if hook not in ("acestep_model_chosen", "acestep_between_epochs")}
    train("base", "lora", plugins=(), extra_plugins=parts)
    called = re.findall(r"\.(acestep_\w+)\(", capsys.readouterr().err)
    assert list(dict.fromkeys(called)) == [hook for hook in HOOKS if hook in parts]
