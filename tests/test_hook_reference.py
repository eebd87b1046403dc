"""Every hook has a section in docs/hooks.md, a runnable example there, and a test of that example here."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import hook_reference
import pytest
import torch

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.ranks import Ranks
from sidestep_plugin.run import ModelFacts

HOOKS = hook_reference.HOOKS


def example(hook):
    spec = importlib.util.spec_from_file_location(f"example_{hook}", hook_reference.EXAMPLES / f"{hook}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes():
    written = hook_reference.PAGE.read_text(encoding="utf-8")
    assert written == hook_reference.reference(), "run: python tests/hook_reference.py"


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


def test_acestep_plan_memory(train, trainer, load, capsys, monkeypatch):
    """As on a GPU: a model in bf16, and bf16 autocast. Early versions of upstream do not cast to fp32."""
    for name in ("_precision", "_select_fabric_precision"):
        if hasattr(trainer, name):
            monkeypatch.setattr(trainer, name, lambda *_: "bf16-mixed")
    handler = load("base")
    handler.model.to(torch.bfloat16)
    done, said = trained_with(train, "engine_plan_memory", capsys, handler=handler)
    casts = hasattr(trainer, "_precision") or hasattr(trainer, "_ensure_trainable_params_fp32")
    assert done.tensors and ("Feed-forward weights in bf16" in said) == casts
    monkeypatch.undo()
    _, said = trained_with(train, "engine_plan_memory", capsys)
    assert "Feed-forward" not in said


def test_acestep_song_cache(train, trainer, capsys, monkeypatch):
    data_module = sys.modules[trainer.PreprocessedDataModule.__module__]
    read = []
    original = data_module.torch.load
    monkeypatch.setattr(data_module.torch, "load", lambda *args, **more: read.append(args) or original(*args, **more))
    train("base", plugins=())
    without = len(read)
    read.clear()
    trained_with(train, "engine_song_cache", capsys)
    assert 0 < len(read) < without


def test_acestep_plan_processes(train, capsys):
    plan = example("engine_plan_processes").engine_plan_processes(Ranks(3, 4, 1, 2))
    assert plan.processes == 4 and plan.outcome(None, 8, 2) == ["8 songs in 4 processes: 2 steps an epoch"]
    done, _ = trained_with(train, "engine_plan_processes", capsys)
    assert done.tensors


def test_acestep_hold_out(train, checkout, capsys):
    hold_out = example("engine_hold_out").engine_hold_out
    assert hold_out([Path("a.pt"), Path("test_b.pt")]) == [Path("test_b.pt")]
    done, _ = trained_with(train, "engine_hold_out", capsys, max_epochs=1)
    assert done.tensors, "no song has such a name, so all are trained on"


def with_a_folder_for_validation(checkout, tmp_path):
    """Copies of the songs, one of them in a folder of its own."""
    songs = tmp_path / "songs"
    shutil.copytree(checkout.tensors, songs, ignore=shutil.ignore_patterns("manifest.json"))
    (tmp_path / "validation").mkdir()
    shutil.move(songs / "song_01.pt", tmp_path / "validation")
    return songs


def test_acestep_plan_validation(train, checkout, capsys, tmp_path):
    songs = with_a_folder_for_validation(checkout, tmp_path)
    measured = []

    class Watching:
        @hookimpl
        def engine_validated(self, validation):
            measured.append((validation.epoch, tuple(validation.losses.shape)))

    plugins = {"example": example("engine_plan_validation"), "watching": Watching()}
    train("base", plugins=(), extra_plugins=plugins, tensors=songs, max_epochs=3)
    assert measured == [(0, (1, 3, 1)), (2, (1, 3, 1)), (3, (1, 3, 1))]


def test_acestep_validated(train, checkout, capsys, tmp_path):
    plugins = {hook: example(hook) for hook in ("engine_plan_validation", "engine_validated")}
    songs = with_a_folder_for_validation(checkout, tmp_path)
    done = train("base", plugins=(), extra_plugins=plugins, tensors=songs)
    said = capsys.readouterr().out
    assert "Epoch 0: " in said and "Epoch 2: " in said
    assert [*(done.output / "checkpoints" / "best").rglob("*.safetensors")]


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


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_acestep_resume(train, trainer, load, kind, tmp_path):
    done = train("base", kind)
    (checkpoint,) = [place for place in (done.output / "checkpoints").iterdir() if "epoch_2" in place.name]
    warm = train(
        "base",
        kind,
        plugins=(),
        extra_plugins={"example": example("engine_resume")},
        resume_from=str(checkpoint),
        learning_rate=1e-30,  # changes nothing, so that what it began with can be seen
    )
    assert len(warm.losses) == len(done.losses)
    assert all(torch.equal(warm.tensors[key], done.tensors[key]) for key in done.tensors)


def test_acestep_adapter_saved(train, capsys):
    done, said = trained_with(train, "acestep_adapter_saved", capsys)
    (note,) = done.output.glob("final/**/NOTE.txt")
    assert re.fullmatch(r"Trained on \S+ for \d+ steps.\n", note.read_text(encoding="utf-8"))
    assert "A note lies beside adapter_model.safetensors." in said
