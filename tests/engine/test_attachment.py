"""attach and detach: checked before anything is touched, all or nothing, idempotent, reversible."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

from sidestep_plugin import DetachError, PluginError, Refusal, UpstreamMismatch, attach, hookimpl
from sidestep_plugin.engine.shapes import MODULE_CLASS, SAVE_FUNCTIONS, TRAINER_CLASS, adapter_types


def names_of(trainer):
    """Every name of upstream's that could be replaced, with what stands there."""
    found = {("trainer", name): value for name, value in vars(trainer).items()}
    for kind in adapter_types(trainer):
        for owner in (MODULE_CLASS[kind], TRAINER_CLASS[kind]):
            found |= {(owner, name): value for name, value in vars(getattr(trainer, owner)).items()}
    package = trainer.__name__.rpartition(".")[0]
    for module in [name for name in sys.modules if name.startswith(package)]:
        found |= {(module, name): value for name, value in vars(sys.modules[module]).items()}
    return found


def same_objects(before, after):
    return before.keys() == after.keys() and all(before[key] is after[key] for key in before)


class Sampler:
    """A plugin that samples what it is told to."""

    def __init__(self, answer):
        self.answer = answer

    @hookimpl
    def acestep_sample_timesteps(self, step, batch_size, device, dtype):
        return self.answer(batch_size, device, dtype)


class Batcher:
    def __init__(self, answer):
        self.answer = answer

    @hookimpl
    def acestep_prepare_batch(self, step, batch):
        return self.answer(batch)


@pytest.fixture
def stepped(trainer, load, module_for, batch_of):
    """Step a module once with one plugin object attached, and return (module, batch, loss)."""

    def run(plugin, name="base", size=3):
        handler = load(name)
        module = module_for(handler)
        batch = batch_of(handler.model, size)
        with attach(trainer, plugins=(), extra_plugins={"tester": plugin}):
            return module, batch, module.training_step(batch)

    return run


# -- putting everything back -----------------------------------------------------------------------------------------


FOR_RESUMING = {"SequentialLR", "train_dataloader", "val_dataloader"}
FOR_MEMORY = {"Fabric", "_count_nonfinite_grads", "__getitem__"}


def test_detach_puts_back_the_very_objects(trainer, tmp_path):
    before = names_of(trainer)
    handle = attach(trainer, allowed_folders=[tmp_path])
    changed = {key for key, value in names_of(trainer).items() if before.get(key) is not value}
    expected = {("trainer", "sample_discrete_timestep")}
    for kind in adapter_types(trainer):
        expected |= {(MODULE_CLASS[kind], "training_step"), (TRAINER_CLASS[kind], "train_from_preprocessed")}
        expected |= {("trainer", name) for name in SAVE_FUNCTIONS[kind] if hasattr(trainer, name)}
    assert expected <= changed
    assert {name for _, name in changed} - {name for _, name in expected} <= FOR_RESUMING | FOR_MEMORY | {
        "safe_path",
        "__init__",
    }
    handle.detach()
    assert same_objects(before, names_of(trainer))
    handle.detach()  # a second time does nothing
    assert same_objects(before, names_of(trainer))


def test_nothing_but_the_used_seams_is_replaced(trainer):
    before = names_of(trainer)
    with attach(trainer, plugins=()):
        assert trainer.sample_discrete_timestep is before["trainer", "sample_discrete_timestep"]
        assert trainer.save_lora_weights is before["trainer", "save_lora_weights"]


def test_attaching_twice_is_attaching_once(trainer):
    before = names_of(trainer)
    with attach(trainer) as handle:
        wrapped = names_of(trainer)
        assert attach(trainer) is handle
        assert same_objects(wrapped, names_of(trainer))
    assert same_objects(before, names_of(trainer))


@pytest.mark.parametrize("other", [{"plugins": ()}, {"options": {"cfg_ratio": 0.5}}])
def test_attaching_something_else_meanwhile_is_refused(trainer, other):
    with attach(trainer):
        wrapped = names_of(trainer)
        with pytest.raises(Refusal, match="Already attached with sidestep"):
            attach(trainer, **other)
        assert same_objects(wrapped, names_of(trainer))


def test_leaving_an_inner_block_leaves_the_outer_one_attached(trainer):
    original = trainer.sample_discrete_timestep
    with attach(trainer):
        with attach(trainer):
            pass
        assert trainer.sample_discrete_timestep is not original
    assert trainer.sample_discrete_timestep is original
    handle = attach(trainer)
    with attach(trainer):
        pass
    assert handle.attached
    handle.detach()


def test_a_training_that_outlives_its_attachment_is_stopped(trainer, load, checkout, tmp_path):
    def training(output):
        config = trainer.TrainingConfig(
            output_dir=str(output), num_workers=0, pin_memory=False, log_every_n_steps=1, gradient_accumulation_steps=1
        )
        made = trainer.LoRATrainer(load("base"), trainer.LoRAConfig(r=4, alpha=8), config)
        return made.train_from_preprocessed(str(checkout.tensors), {"should_stop": False})

    with attach(trainer, announce=print):
        never_begun, left_early = training(tmp_path / "one"), training(tmp_path / "two")
        while not next(left_early)[2].startswith("Epoch"):
            pass
    for running in (never_begun, left_early):
        (only,) = [text for _, _, text in running]
        assert only.startswith("❌ The plugins were detached while this training was running")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_somebody_elses_wrapper_is_not_removed(trainer):
    handle = attach(trainer)
    ours = trainer.save_lora_weights
    trainer.save_lora_weights = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
    wrapped = names_of(trainer)
    with pytest.raises(DetachError, match="save_lora_weights"):
        handle.detach()
    assert trainer.save_lora_weights is theirs
    assert same_objects(wrapped, names_of(trainer)), "all or nothing"
    trainer.save_lora_weights = ours
    handle.detach()


def test_a_failure_half_way_puts_everything_back(trainer, monkeypatch):
    before = names_of(trainer)
    from sidestep_plugin.engine.attachment import _Replacement

    put, count = _Replacement.put, iter(range(100))

    def fail_on_the_third(self):
        if next(count) == 2:
            raise RuntimeError("no more")
        put(self)

    monkeypatch.setattr(_Replacement, "put", fail_on_the_third)
    with pytest.raises(RuntimeError, match="no more"):
        attach(trainer)
    assert same_objects(before, names_of(trainer))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"plugins": ("nobody",)}, "No plugin 'nobody' is installed"),
        ({"options": {"cfg_ration": 0.1}}, "Did you mean 'cfg_ratio'"),
        ({"options": {"cfg_ratio": 1.5}}, "cfg_ratio"),
        ({"options": {"shift": float("nan")}}, "shift"),
        (
            {"plugins": ("sidestep",), "extra_plugins": {"other": Sampler(None)}},
            "'sidestep' and 'other' both implement",
        ),
    ],
)
def test_what_cannot_be_attached_changes_nothing(trainer, arguments, error):
    before = names_of(trainer)
    with pytest.raises(Refusal, match=error):
        attach(trainer, **arguments)
    assert same_objects(before, names_of(trainer))


def test_a_module_without_a_trainer_is_refused():
    with pytest.raises(UpstreamMismatch, match="not ACE-Step 1.5's trainer"):
        attach(types.ModuleType("empty"))


# -- steps -----------------------------------------------------------------------------------------------------------


def test_the_sampler_used_outside_a_step_is_upstreams(trainer):
    original = trainer.sample_discrete_timestep
    takes_table = "timesteps_tensor" in inspect.signature(original).parameters
    arguments = (5, torch.arange(8.0)) if takes_table else (5, "cpu", torch.float32)
    torch.manual_seed(3)
    expected, _ = original(*arguments)
    with attach(trainer):
        torch.manual_seed(3)
        t, _ = trainer.sample_discrete_timestep(*arguments)
    assert torch.equal(t, expected)


def test_a_plugins_timesteps_are_used(stepped, load):
    asked = []

    def answer(batch_size, device, dtype):
        asked.append((batch_size, torch.device(device), dtype))
        return torch.full((batch_size,), 0.25, device=device, dtype=dtype)

    stepped(Sampler(answer))
    assert [(size, device.type) for size, device, _ in asked] == [(3, "cpu")]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda size, device, dtype: [0.5] * size, "a list"),
        (lambda size, device, dtype: 0.5, "a float"),
        (lambda size, device, dtype: torch.rand(size + 1, dtype=dtype), r"shape \[4\]"),
        (lambda size, device, dtype: torch.rand(size, 1, dtype=dtype), r"shape \[3, 1\]"),
        (lambda size, device, dtype: torch.rand(size, dtype=torch.float64), "float64"),
        (lambda size, device, dtype: torch.rand(size, device="meta", dtype=dtype), "on meta"),
        (lambda size, device, dtype: torch.rand(size, dtype=dtype) + 1, r"outside \[0, 1\]"),
        (lambda size, device, dtype: torch.full((size,), float("nan"), dtype=dtype), r"outside \[0, 1\]"),
    ],
)
def test_unusable_timesteps_stop_the_step(stepped, answer, found):
    with pytest.raises(PluginError, match=f"'tester' returned .*{found}.* from acestep_sample_timesteps, expected 3"):
        stepped(Sampler(answer))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda batch: {"no_such_key": batch["attention_mask"]}, "an entry 'no_such_key'"),
        (
            lambda batch: {"attention_mask": batch["attention_mask"][:1]},
            r"'attention_mask' as a tensor of shape \[1, 24\]",
        ),
        (lambda batch: {"attention_mask": None}, "'attention_mask' as a NoneType"),
        (lambda batch: 7, "an int, expected a mapping"),
    ],
)
def test_an_unusable_batch_stops_the_step(stepped, answer, found):
    with pytest.raises(PluginError, match=f"'tester' returned {found}.*acestep_prepare_batch"):
        stepped(Batcher(answer))


def test_an_exception_in_a_plugin_names_it(stepped):
    with pytest.raises(PluginError, match="'tester' failed in acestep_prepare_batch: ZeroDivisionError"):
        stepped(Batcher(lambda batch: 1 / 0))


def test_the_callers_batch_is_left_as_it_was(trainer, load, module_for, batch_of):
    handler = load("base")
    module = module_for(handler)
    batch = batch_of(handler.model, 4)
    objects = dict(batch)
    copies = {key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    with attach(trainer, options={"cfg_ratio": 1.0}, announce=print):
        module.training_step(batch)
    assert all(batch[key] is objects[key] for key in objects) and batch.keys() == objects.keys()
    assert all(torch.equal(batch[key], copies[key]) for key in copies)


def test_each_plugin_sees_what_the_one_before_replaced(trainer, load, module_for, batch_of):
    seen = []

    def replace(value):
        def answer(batch):
            seen.append(float(batch["context_latents"].flatten()[0]))
            return {"context_latents": torch.full_like(batch["context_latents"], value)}

        return Batcher(answer)

    handler = load("base")
    module = module_for(handler)
    batch = batch_of(handler.model, 2)
    with attach(trainer, plugins=(), extra_plugins={"first": replace(1.0), "second": replace(2.0)}):
        module.training_step(batch)
    assert seen == [float(batch["context_latents"].flatten()[0]), 1.0]


def test_validation_is_told_apart(trainer, load, module_for, batch_of):
    told = []

    class Recorder:
        @hookimpl
        def acestep_step_finished(self, step):
            told.append(step.training)

    handler = load("base")
    module = module_for(handler)
    with attach(trainer, plugins=(), extra_plugins={"recorder": Recorder()}):
        module.training_step(batch_of(handler.model, 2))
        with torch.no_grad():
            module.training_step(batch_of(handler.model, 2))
        if "record_loss" in module.training_step.__wrapped__.__code__.co_varnames:
            module.training_step(batch_of(handler.model, 2), record_loss=False)
            module.training_step(batch_of(handler.model, 2), False)
            assert told == [True, False, False, False]
        else:
            assert told == [True, False]


def test_a_step_that_never_calls_the_sampler_stops_the_run(trainer, load, module_for, batch_of, monkeypatch):
    """Whatever the code looks like: if the plugin's timesteps were not used, nothing may be learned from the step."""
    handler = load("base")
    module = module_for(handler)
    original = trainer.PreprocessedLoRAModule.training_step

    def goes_around(self, batch, record_loss=True):
        if record_loss is None:  # never: so that the code names the sampler and passes the look at it
            trainer.sample_discrete_timestep(1, 2)
        kept, trainer_global = trainer.sample_discrete_timestep, trainer.__dict__
        trainer_global["sample_discrete_timestep"] = kept.__wrapped__
        try:
            return original(self, batch)
        finally:
            trainer_global["sample_discrete_timestep"] = kept

    monkeypatch.setattr(trainer.PreprocessedLoRAModule, "training_step", goes_around)
    with attach(trainer, announce=print) as handle:
        with pytest.raises(UpstreamMismatch, match="without calling sample_discrete_timestep"):
            module.training_step(batch_of(handler.model, 2))
        assert isinstance(handle.refusal, UpstreamMismatch)


@pytest.mark.parametrize("change", ["ignored", "rounded"])
def test_a_step_that_throws_the_timesteps_away_stops_the_run(trainer, load, module_for, batch_of, change):
    """The sampler is called and its answer is not what the decoder gets: seen at the decoder, in the first step."""
    handler = load("base")
    module = module_for(handler)
    decoder = handler.model.decoder

    def meddle(_, __, kwargs):
        t = kwargs["timestep"]
        return (), kwargs | {"timestep": torch.full_like(t, 0.123) if change == "ignored" else t.bfloat16().to(t)}

    with attach(trainer, announce=print):
        hook = decoder.register_forward_pre_hook(meddle, with_kwargs=True)
        if change == "ignored":
            with pytest.raises(UpstreamMismatch, match="gave its decoder other timesteps"):
                module.training_step(batch_of(handler.model, 3))
        else:
            module.training_step(batch_of(handler.model, 3))
        hook.remove()
    assert not decoder._forward_pre_hooks, "the look at the decoder leaves nothing behind"


def test_one_kind_that_does_not_fit_leaves_the_other(trainer, load, module_for, batch_of, require_kind, monkeypatch):
    require_kind("lokr")
    lokr, lora = load("base"), load("base")
    lokr_module, lora_module = module_for(lokr, "lokr"), module_for(lora)
    monkeypatch.setattr(trainer.PreprocessedLoKRModule, "training_step", lambda self, batch: None)
    with attach(trainer, announce=print):
        lora_module.training_step(batch_of(lora.model, 2))
        with pytest.raises(UpstreamMismatch, match="PreprocessedLoKRModule.training_step never calls it"):
            lokr_module.training_step(batch_of(lokr.model, 2))


def test_two_threads_get_one_handle(trainer):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier = Barrier(8)

    def ask(_):
        barrier.wait(timeout=60)
        return attach(trainer, plugins=("sidestep",))

    with ThreadPoolExecutor(8) as threads:
        handles = list(threads.map(ask, range(8)))
    try:
        assert len({id(handle) for handle in handles}) == 1 and handles[0].attached
    finally:
        handles[0].detach()


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_refused_run_ends_before_upstream_changes_the_model(trainer, train, load):
    handler = load("base")
    handler.model.null_condition_emb = None
    keys = list(handler.model.state_dict())
    result = train("base", handler=handler)
    assert len(result.messages) == 1
    assert result.messages[0].startswith("❌") and "null_condition_emb" in result.messages[0]
    assert list(handler.model.state_dict()) == keys and not result.output.exists()


def test_a_refused_module_is_refused_again(trainer, load, module_for, batch_of):
    handler = load("base")
    handler.model.config._name_or_path = ""
    handler.model.config.is_turbo = None
    module = module_for(handler)
    with attach(trainer, announce=print):
        for _ in range(2):
            with pytest.raises(Refusal, match="Cannot tell the variant"):
                module.training_step(batch_of(handler.model, 2))


@pytest.mark.parametrize("plugins", [("sidestep",), ()])
def test_several_processes_are_refused(train, monkeypatch, plugins):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = train("base", plugins=plugins)
    assert len(result.messages) == 1 and "WORLD_SIZE is 2" in result.messages[0] and not result.output.exists()


@pytest.mark.parametrize("size", ["1", "", "many"])
def test_one_process_of_torchrun_is_one_process(train, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert train("base", max_epochs=1).tensors


@pytest.mark.parametrize("lines", ["one text", [1, 2]])
def test_decisions_are_lines(stepped, lines):
    class Speaker:
        @hookimpl
        def acestep_run_started(self, run):
            return lines

    with pytest.raises(PluginError, match="'tester' returned .* from acestep_run_started, expected a list of lines"):
        stepped(Speaker())


def test_decisions_go_to_upstreams_log_when_nobody_else_takes_them(trainer, load, module_for, batch_of, monkeypatch):
    lines = []
    monkeypatch.setattr(trainer.logger, "info", lines.append)
    handler = load("base")
    module = module_for(handler)
    with attach(trainer):
        module.training_step(batch_of(handler.model, 2))
        module.training_step(batch_of(handler.model, 2))
    assert sum("variant base" in line for line in lines) == 1


def test_a_remembered_run_keeps_no_model_alive(trainer, load, module_for, batch_of):
    import gc
    import weakref

    handler = load("base")
    module = module_for(handler)
    with attach(trainer, announce=print):
        module.training_step(batch_of(handler.model, 2))
        model = weakref.ref(handler.model)
        del handler, module
        gc.collect()
        assert model() is None


# -- folders ---------------------------------------------------------------------------------------------------------


def test_the_path_guard_accepts_named_folders_and_nothing_else(trainer, tmp_path_factory, monkeypatch):
    guards = sys.modules.get(f"{trainer.__name__.rpartition('.')[0]}.path_safety")
    if guards is None:
        pytest.skip("this checkout has no path guard")
    outside = tmp_path_factory.mktemp("outside").resolve()
    monkeypatch.setattr(guards, "_SAFE_ROOT", str(outside / "root"))
    named = outside / "named"
    with attach(trainer, plugins=(), allowed_folders=[named]):
        assert trainer.safe_path(str(named / "sub" / "file")) == str(named / "sub" / "file")
        assert trainer.safe_path(str(named)) == str(named)
        for refused in (outside / "other", outside / "named-not", named / ".." / "other"):
            with pytest.raises(ValueError, match="safe root|escapes|outside"):
                trainer.safe_path(str(refused))
        with pytest.raises(ValueError, match="safe root|escapes|outside"):
            trainer.safe_path(str(named / "x"), base=str(outside / "root"))
    with pytest.raises(ValueError, match="safe root|escapes|outside"):
        trainer.safe_path(str(named))
