"""What only a GPU shows: whole trainings on small models, under bf16 autocast, with CUDA's own kernels.

    python -m pytest -m gpu tests/gpu                        on a GPU: the miniature
    python -m pytest -m gpu tests/gpu --acestep-root=DIR     on a GPU: ACE-Step's trainer and model code

Every test also runs on the CPU, as a dry run, so that it is known to work before somebody has a GPU for ten minutes.
Four of them show little there: on a CPU nothing waits for a device, memory runs out by an error that the test raises,
no memory is pinned, and gloo stands for NCCL.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import sidestep_plugin.hooks
import torch

from sidestep_plugin import attach, hookimpl

GPU, SLOW = pytest.mark.gpu, pytest.mark.slow
UNEVEN = {"batch_size": 1, "gradient_accumulation_steps": 4}  # 6 songs: a rest is left at the end of an epoch


def on_both(name, values):
    """Run a test with each value on a GPU and on the CPU. Quick tests try the first value alone on the CPU."""
    first, *others = values
    cases = [
        pytest.param("cpu", first),
        *(pytest.param("cpu", value, marks=SLOW) for value in others),
        *(pytest.param("cuda", value, marks=GPU) for value in values),
    ]
    return pytest.mark.parametrize(f"device, {name}", cases, indirect=["device"])


def test_each_of_these_tests_has_a_dry_run():
    tests = {name: test for name, test in globals().items() if name.startswith("test_")}
    del tests["test_each_of_these_tests_has_a_dry_run"]
    assert tests and [name for name, test in tests.items() if "device" not in inspect.signature(test).parameters] == []


# -- the same numbers as without us ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@on_both("family", ["base", "sft", "xl-base", "turbo"])
def test_the_loss_is_that_of_the_models_own_forward(
    trainer, load_on, songs_on, module_for, require_kind, autocast, device, family, kind
):
    require_kind(kind)
    handler = load_on(family)
    model = handler.model.to(device)  # with what training does not call, and forward() does
    module = module_for(handler, kind)
    module.dtype = torch.bfloat16
    if hasattr(module, "timesteps_tensor"):
        module.timesteps_tensor = module.timesteps_tensor.bfloat16()
    options = {"timestep_mode": "continuous"} if family == "turbo" else None

    def states():
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    for size in (1, 2, 5):
        with autocast():
            # forward() prepares the conditions itself; here it does so under the same autocast.
            with torch.autocast(device.type, dtype=torch.bfloat16):
                songs = songs_on(model, size, seed=size)
            with attach(trainer, options=options, announce=print):
                torch.manual_seed(size)
                ours, our_states = module.training_step(songs.batch), states()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                torch.manual_seed(size)
                theirs = model(**songs.forward)["diffusion_loss"].float()
        assert ours.device.type == device.type and torch.equal(ours, theirs), f"batch of {size}: {ours} {theirs}"
        assert all(map(torch.equal, our_states, states())), f"batch of {size}"


@on_both("kind", ["lora", "lokr"])
def test_turbo_is_upstream(run, same, deterministic, note, device, kind):
    with deterministic() as kernels:
        plain = run("turbo", kind, plugins=None, **UNEVEN)
        with_plugin = run("turbo", kind, **UNEVEN)
    note(str(kernels))
    assert same(plain, with_plugin), str(kernels)


@on_both("kind", ["lora", "lokr"])
def test_turbo_is_upstream_with_the_usual_kernels_where_they_repeat_themselves(
    run, same, largest_difference, note, device, kind
):
    """Two trainings without the plugin say whether those of this card do."""
    one, other, ours = (run("turbo", kind, plugins=which, max_epochs=1) for which in (None, None, ("sidestep",)))
    repeat, equal = same(one, other), same(one, ours)
    chance, of_ours = (largest_difference(one, two) for two in (other, ours))
    note(f"without the plugin twice: equal {repeat}, difference {chance:.1e}; with it: {equal}, {of_ours:.1e}")
    assert equal if repeat else of_ours <= 10 * chance + 1e-6, f"{chance} {of_ours}"


@pytest.mark.parametrize("family", ["base", "turbo"])
@on_both("kind", ["lora", "lokr"])
def test_savings_change_no_bit(run, same, deterministic, note, device, family, kind):
    dearest = {"frozen_weights": "fp32", "gradient_checkpointing": "on", "song_cache": "off"}
    with deterministic() as kernels:
        dear = run(family, kind, options=dearest)
        cheap = run(family, kind, options={"frozen_weights": "auto", "gradient_checkpointing": "off"})
    note(str(kernels))
    assert same(dear, cheap), str(kernels)


@pytest.mark.slow
@on_both("kind", ["lora", "lokr"])
def test_validation_and_previews_leave_everything_as_it_was(run, same, deterministic, note, device, kind):
    held_out = {"validate": 2, "cfg_ratio": 0.5}
    looked = {"validate_every": 1, "preview_every": 1, "preview_seconds": 0.4, "num_inference_steps": 3}
    with deterministic() as kernels:
        plain = run("base", kind, options=held_out | {"validate_every": 100}, **UNEVEN)
        watched = run("base", kind, options=held_out | looked, **UNEVEN)
    note(str(kernels))
    report = json.loads((watched.output / "training_report.json").read_text(encoding="utf-8"))["validation"]
    assert [entry["epoch"] for entry in report["epochs"]] == [0, 1, 2]
    made = {folder.name for folder in (watched.output / "previews").iterdir() if folder.is_dir()}
    assert made == {"base_model", "epoch_1", "epoch_2"}
    assert same(plain, watched), str(kernels)


@pytest.mark.slow
@on_both("kind", ["lora", "lokr"])
def test_a_resumed_training_comes_close_to_one_that_went_through(
    run, deterministic, largest_difference, note, device, kind
):
    with deterministic() as kernels:
        whole = run("base", kind, max_epochs=4, **UNEVEN)
        checkpoint = next((whole.output / "checkpoints").glob("epoch_2*"))
        resumed = run("base", kind, max_epochs=4, resume_from=str(checkpoint), **UNEVEN)
    difference = largest_difference(whole, resumed)
    note(f"largest difference {difference:.1e}; {kernels}")
    assert difference <= (1e-3 if device.type == "cuda" else 0.0), resumed.messages


def test_crops_are_as_long_as_said_and_the_same_for_the_same_seed(run, same, load_on, deterministic, device):
    lengths = []

    def cropped():
        handler = load_on("base")
        handler.model.decoder.register_forward_pre_hook(
            lambda _, __, given: lengths.append(given["hidden_states"].shape[1]), with_kwargs=True
        )
        return run("base", handler=handler, options={"crop_seconds": 0.4})

    with deterministic() as kernels:
        one, other = cropped(), cropped()
    assert lengths and set(lengths) == {10}
    assert same(one, other), str(kernels)


# -- what costs something ----------------------------------------------------------------------------------------------


def test_int8_changes_the_loss_a_little(run, capsys, note, device):
    plain, quantized = run("base"), run("base", options={"base_weights": "int8"})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Base weights")]
    note(line)
    assert "int8 instead of bfloat16" in line
    assert quantized.losses != plain.losses and quantized.losses == pytest.approx(plain.losses, rel=0.05)


class Waits:
    """Notes, on a GPU, where Python waits for it in a step: from the batch until plugins have seen the loss.

    The first step is left out: its values are checked. What upstream waits for is its own: the loss that it shows.
    Plugins are called in the order in which they are given, so one stands before the product's parts and two behind.
    """

    def __init__(self, device):
        self.mode = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda _: None
        self.steps, self.order, watch = 0, [], self

        class Before:
            @hookimpl
            def acestep_prepare_batch(self, step):
                watch.order.append("before")
                watch.steps += 1
                if watch.steps > 1:
                    watch.mode("warn")

        class Between:
            @hookimpl
            def acestep_prepare_batch(self, step):
                watch.order.append("between")

        class After:
            @hookimpl
            def acestep_step_finished(self, step):
                watch.order.append("after")
                watch.mode("default")

        parts = {f"sidestep.{name}": import_module(place) for name, place in sidestep_plugin.hooks.PLUGINS}
        self.plugins = {"1": Before(), **parts, "2": Between(), "3": After()}


OURS = [Path(sidestep_plugin.__file__).parent, Path(sidestep_plugin.hooks.__file__).parent]


@on_both("family", ["base", "turbo"])
def test_no_step_waits_for_the_gpu_because_of_us(run, device, note, family):
    watch = Waits(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=".*synchroniz.*")
        try:
            done = run(family, plugins=(), extra_plugins=watch.plugins, options={"crop_seconds": 0.5}, **UNEVEN)
        finally:
            watch.mode("default")
    waited = [Path(one.filename) for one in caught if "called a synchronizing" in str(one.message)]
    assert done.tensors and watch.order == 12 * ["before", "between", "after"], done.messages
    names = ", ".join(sorted({place.name for place in waited})) or "nowhere"
    note(f"waited {len(waited)} times in {watch.steps - 1} steps, in: {names}")
    # Upstream shows the loss of every step, so this test can fail.
    assert bool(waited) == (device.type == "cuda")
    assert [place for place in waited if any(place.is_relative_to(folder) for folder in OURS)] == []


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_runs_with_waiting_forbidden(trainer, load_on, songs_on, module_for, autocast, note, device):
    """Forward and backward pass and the optimizer, with upstream's own look at the loss left out."""
    handler = load_on("base")
    handler.model.to(device)
    module = module_for(handler)
    if "record_loss" not in inspect.signature(module.training_step).parameters:
        pytest.skip("this version of ACE-Step looks at the loss in every step")
    module.dtype = torch.bfloat16
    module.timesteps_tensor = module.timesteps_tensor.bfloat16()
    songs = songs_on(handler.model, 2, seed=1)
    optimizer = torch.optim.AdamW([weight for weight in module.parameters() if weight.requires_grad], lr=1e-3)
    forbid = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda _: None

    def step():
        with autocast():
            module.training_step(songs.batch, record_loss=False).backward()
        optimizer.step()
        optimizer.zero_grad()

    def steps(number):
        step()  # the first one is checked, and decides on the model
        forbid("error")
        try:
            for _ in range(number):
                step()
        finally:
            forbid("default")

    try:
        steps(1)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        note(f"not shown: ACE-Step's own step waits ({error})")
        pytest.skip("a step of this version of ACE-Step waits without the plugin, too")
    with attach(trainer, announce=print):
        steps(3)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@on_both("kind", ["lora", "lokr"])
def test_without_memory_the_training_is_saved_and_advised(run, load_on, device, kind):
    handler, steps = load_on("base"), []

    def too_much(*_):
        steps.append(1)
        if len(steps) == 8:
            if device.type == "cpu":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
            torch.empty(2 * torch.cuda.get_device_properties(device).total_memory, dtype=torch.uint8, device=device)

    hook = handler.model.decoder.register_forward_pre_hook(too_much)
    done = run("base", kind, handler=handler, **UNEVEN)
    hook.remove()
    said = "\n".join(done.messages)
    assert "out of memory" in said and "The device ran out of memory. " in said and "--rank" in said
    assert "Saved as it was after 7 training steps" in said
    assert list((done.output / "interrupted").rglob("resume_state.pt")) and not (done.output / "final").exists()
    # The device is still good, and the rest can be trained.
    rest = run("base", kind, resume_from=str(done.output / "interrupted"), **UNEVEN)
    assert rest.tensors, rest.messages


# torch 2.13 says so of how Lightning's strategy is made for several GPUs.
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
def test_nccl_with_one_process_gives_the_same_gradients(
    trainer, load_on, songs_on, module_for, autocast, deterministic, device, monkeypatch
):
    """The strategy of several GPUs with one of them. What the other GPUs would add is tested with gloo."""
    from several_gpus.processes import free_port, variables

    from sidestep_plugin.engine.devices import on_all_devices
    from sidestep_plugin.ranks import Ranks

    if not hasattr(trainer, "Fabric"):
        pytest.skip("this version of ACE-Step trains without Fabric")
    handler = load_on("base")
    handler.model.to(device)
    module = module_for(handler)
    module.dtype = torch.bfloat16
    if hasattr(module, "timesteps_tensor"):
        module.timesteps_tensor = module.timesteps_tensor.bfloat16()
    songs = songs_on(handler.model, 2, seed=3)
    # As upstream has it while it trains: fp32, with bf16 by autocast.
    module.model.decoder.to(torch.float32)
    trained = [weight for weight in module.parameters() if weight.requires_grad]

    def gradients(backward):
        for weight in trained:
            weight.grad = None
        torch.manual_seed(4)
        with autocast():
            loss = module.training_step(songs.batch)
        backward(loss)
        return [weight.grad.clone() for weight in trained if weight.grad is not None]

    for name, value in variables(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    with attach(trainer, announce=print), deterministic():
        plain = gradients(torch.autograd.backward)
    fabric = trainer.Fabric(
        accelerator=device.type, precision="bf16-mixed", **on_all_devices(trainer.Fabric, {}, Ranks())
    )
    try:
        fabric.launch()
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        module.model.decoder, _ = fabric.setup(module.model.decoder, optimizer)
        backend = torch.distributed.get_backend()
        assert backend == ("nccl" if device.type == "cuda" else "gloo")
        assert torch.nn.parallel.DistributedDataParallel in {type(part) for part in module.model.decoder.modules()}
        with attach(trainer, announce=print), deterministic():
            shared = gradients(fabric.backward)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert plain and len(plain) == len(shared) and all(map(torch.equal, plain, shared))


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=SLOW), pytest.param("cuda", marks=GPU)], indirect=["device"]
)
def test_spawned_workers_with_pinned_memory_change_nothing(run, same, deterministic, device):
    """As on Windows, where worker processes are started anew; batches are copied from pinned memory."""
    workers = {"num_workers": 1, "pin_memory": device.type == "cuda", "prefetch_factor": 2, "max_epochs": 1}
    with deterministic() as kernels:
        alone = run("base", max_epochs=1)
        before = multiprocessing.get_start_method(allow_none=True)
        multiprocessing.set_start_method("spawn", force=True)
        try:
            helped = run("base", **workers)
        finally:
            multiprocessing.set_start_method(before, force=True)
    assert same(alone, helped), f"{helped.messages} {kernels}"
