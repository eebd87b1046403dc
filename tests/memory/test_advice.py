"""What is advised when a training fails: in the words of torch, of the system and of upstream."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sidestep_plugin.memory.advice import advice

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


OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"
ALL = {"base_weights": "fp32", "gradient_checkpointing": "auto", "crop_seconds": None}
FLAGS = [
    "--base-weights bf16",
    "--gradient-checkpointing on",
    "--batch-size (now 4) to 1",
    "--crop-seconds 120",
    "--rank (now 64) to 32",
    "--base-weights int8",
    "close other programs",
]


def named(tmp_path, adapter=SimpleNamespace(r=64), training=TRAINING, options=ALL, **known):  # noqa: B008
    known = {"frames": 6000, "on_gpu": True} | known
    text = advice(OOM, training, adapter, tmp_path, options=options, **known)
    places = [text.index(flag) for flag in FLAGS if flag in text]
    assert places == sorted(places), text
    return [flag for flag in FLAGS if flag in text]


def test_without_memory_the_flags_are_named_in_the_order_of_what_they_cost(tmp_path):
    assert named(tmp_path) == FLAGS


@pytest.mark.parametrize(
    ("left_out", "known"),
    [
        ([0], {"options": ALL | {"base_weights": "auto"}}),
        ([0, 5], {"on_gpu": False}),
        ([1], {"checkpointed": True}),
        ([3], {"frames": 59 * 25}),
        ([3], {"options": ALL | {"crop_seconds": 30.0}}),
        ([2], {"training": SimpleNamespace(batch_size=1, gradient_accumulation_steps=8)}),
        ([4], {"adapter": SimpleNamespace(r=1)}),
        ([5], {"adapter": SimpleNamespace(linear_dim=64)}),
        ([0, 5], {"options": ALL | {"base_weights": "int8"}}),
        ([0, 1, 3, 5], {"options": {}}),
    ],
)
def test_a_flag_that_would_change_nothing_is_not_named(tmp_path, left_out, known):
    """Or one that the loaded plugins do not have."""
    assert named(tmp_path, **known) == [flag for place, flag in enumerate(FLAGS) if place not in left_out]


def test_the_accumulation_keeps_the_songs_of_an_optimizer_step(tmp_path):
    assert "raise --gradient-accumulation (now 2) to 8" in advice(OOM, TRAINING, SimpleNamespace(r=8), tmp_path)
