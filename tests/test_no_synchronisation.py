"""The hooks never make the host wait for a GPU, nor build a tensor on the host in a step.

Shown without a GPU: torch's fake tensors stand on a "cuda" device, know shapes and no values, and raise where a value
would have to be fetched. Copies between host and device are caught by looking at every ATen call.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sidestep_plugin.hooks.timesteps import acestep_sample_timesteps
from sidestep_plugin.hooks.treatment import acestep_run_started
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from whole_plugin import finished, prepared

from sidestep_plugin.averaging.mean import RunningMean
from sidestep_plugin.engine.journal import Journal
from sidestep_plugin.run import Run, Step, note

CUDA = torch.device("cuda", 0)


class Watcher(TorchDispatchMode):
    """Keeps the names of ATen calls, and of those that mix host and device or begin on the host."""

    def __init__(self):
        super().__init__()
        self.calls, self.crossings = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in [*args, *(kwargs or {}).values(), result] if isinstance(value, torch.Tensor)]
        self.calls.append(str(func))
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.crossings.append(str(func))
        return result


@pytest.fixture
def on_gpu():
    """A step on a fake GPU: ``on_gpu("base")`` returns (step, batch), the run's first step already behind it."""
    import types
    import weakref

    kept = []

    def make(variant, null_device=CUDA, **options):
        model = torch.nn.Module()
        model.null_condition_emb = torch.nn.Parameter(torch.randn(1, 1, 16, device=null_device, dtype=torch.bfloat16))
        model.config = types.SimpleNamespace(
            is_turbo=variant.startswith("turbo"),
            timestep_mu=-0.4,
            timestep_sigma=1.0,
            _name_or_path=f"acestep-v15-{variant}",
        )
        kept.append(model)
        defaults = {"variant": "auto", "timestep_mode": "auto", "cfg_ratio": 0.15, "shift": None}
        run = Run("lora", None, None, defaults | {"num_inference_steps": None} | options, None, weakref.ref(model))
        acestep_run_started(run)
        step = Step(run, None, True, CUDA, torch.bfloat16)
        batch = {
            "encoder_hidden_states": torch.randn(4, 7, 16, device=CUDA, dtype=torch.bfloat16),
            "encoder_attention_mask": torch.ones(4, 7, device=CUDA),
        }
        hooks(step, batch)  # what is made once a run is made here
        return step, batch

    return make


def hooks(step, batch):
    prepared(step, batch)
    return acestep_sample_timesteps(step=step, batch_size=4, device=step.device, dtype=step.dtype)


@pytest.mark.parametrize("variant", ["base", "sft", "turbo", "turbo-shift1"])
def test_a_step_stays_on_the_gpu(on_gpu, variant):
    with FakeTensorMode():
        step, batch = on_gpu(variant)
        with Watcher() as watcher:
            t = hooks(step, batch)
    assert watcher.crossings == []
    assert (t is None) == (variant == "turbo")
    assert bool(watcher.calls) == (variant != "turbo"), "turbo adds nothing at all"


@pytest.mark.parametrize("variant", ["base", "turbo"])
def test_masking_nan_stays_on_the_gpu(on_gpu, variant):
    with FakeTensorMode():
        step, batch = on_gpu(variant, mask_nan=True)
        with Watcher() as watcher:
            prepared(step, batch)
    assert watcher.crossings == [] and watcher.calls


@pytest.mark.parametrize("variant", ["base", "turbo"])
def test_cutting_windows_stays_on_the_gpu(on_gpu, variant):
    with FakeTensorMode():
        step, batch = on_gpu(variant)
        batch |= {
            "target_latents": torch.randn(4, 100, 64, device=CUDA),
            "attention_mask": torch.ones(4, 100, device=CUDA),
            "context_latents": torch.randn(4, 100, 128, device=CUDA),
        }
        step.run.options["crop_seconds"] = 2.0
        with Watcher() as watcher:
            answer = prepared(step, batch)
    assert watcher.crossings == [] and answer["target_latents"].shape == (4, 50, 64)


def test_what_is_noted_of_a_step_stays_on_the_gpu(on_gpu):
    """For the report, for resuming, and by the watch over the loss: all is fetched later, or was by upstream."""
    with FakeTensorMode():
        step, _ = on_gpu("base")
        t, loss = torch.rand(4, device=CUDA), torch.rand((), device=CUDA)
        note(step, module=SimpleNamespace(training_losses=[1.0]), t=t, loss=loss)
        journal = Journal(CUDA)
        with Watcher() as watcher:
            for _ in range(3):
                journal.record(step.loss, training=True)
                finished(step)
    assert watcher.crossings == [] and watcher.calls
    assert journal.steps == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_the_adapter_stays_on_the_gpu(on_gpu, dtype):
    with FakeTensorMode():
        on_gpu("base")
        trained, mean = (
            [torch.nn.Parameter(torch.randn(4, 8, device=CUDA, dtype=dtype)) for _ in range(3)],
            RunningMean(),
        )
        with Watcher() as watcher:
            for step in (1, 2, 3):
                mean.add(step, trained)
    assert watcher.crossings == [] and watcher.calls
    assert len([name for name in watcher.calls if "_foreach_lerp_" in name]) == 2, "one call for all tensors"


def test_an_offloaded_null_condition_is_fetched_once_a_run(on_gpu):
    with FakeTensorMode():
        step, batch = on_gpu("base", null_device="cpu")
        with Watcher() as watcher:
            hooks(step, batch)
    assert watcher.crossings == []


def test_this_would_notice_a_synchronisation(on_gpu):
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool((torch.rand(4, device=CUDA) < 0.15).any())


def test_this_would_notice_a_tensor_built_on_the_host(on_gpu):
    with FakeTensorMode(), Watcher() as watcher:
        torch.tensor([1.0, 0.5]).to(CUDA)
    assert watcher.crossings
