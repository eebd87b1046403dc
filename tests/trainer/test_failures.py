"""What is advised when a training fails: in the words of torch, of the system and of upstream."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sidestep_plugin.trainer.failures import advice

TRAINING = SimpleNamespace(batch_size=4, gradient_accumulation_steps=2, learning_rate=0.5)


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", r"Lower --batch-size (now 4)"),
        ("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory", "--rank (now 64)"),
        ("[Errno 28] No space left on device: 'x'", "MB free. Free some space"),
        ("PytorchStreamWriter failed writing file data/0: file write failed", "MB free. Free some space"),
        ("Error while serializing: I/O error: No space left on device (os error 28)", "MB free. Free some space"),
        ("Training failed: float division by zero", "gradients were NaN or infinite. Lower --learning-rate (now 0.5)"),
        ("Non-finite gradients (3/4)", "gradients were NaN or infinite. Lower --learning-rate (now 0.5)"),
    ],
)
def test_what_is_known_is_explained(failure, says, tmp_path):
    for adapter in (SimpleNamespace(r=64), SimpleNamespace(linear_dim=64)):
        assert says in advice(failure, TRAINING, adapter, tmp_path / "not" / "made")


def test_what_is_not_known_gets_no_guess(tmp_path):
    assert advice("Training failed: 'decoder'", TRAINING, SimpleNamespace(), tmp_path) == ""
