"""Gradient checkpointing, chosen by the user: the same losses, adapter and random state with it and without it."""

from __future__ import annotations

import pytest
import torch

from sidestep_plugin import Refusal, hookimpl


class Passes:
    """Counts how often the decoder's first attention is computed in each training step."""

    def __init__(self):
        self.counts, self._calls, self._step = [], 0, None
        self.gradients = []

    @hookimpl
    def acestep_prepare_batch(self, step, batch):
        if self._step is None and step.training:
            decoder = step.module.model.decoder
            layer = next(module for name, module in decoder.named_modules() if name.endswith("layers.0.self_attn"))
            self._step = layer.register_forward_pre_hook(self._count)
            self._trained = [weight for weight in decoder.parameters() if weight.requires_grad]
        elif step.training:
            self._note()

    def _count(self, *_):
        self._calls += 1

    def _note(self):
        self.counts.append(self._calls)
        self.gradients.append(sum(weight.grad is not None for weight in self._trained))
        self._calls = 0

    @hookimpl
    def acestep_run_ended(self):
        self._note()


def how_often(train, model, kind, choice, **settings):
    passes = Passes()
    options = {} if choice is None else {"gradient_checkpointing": choice}
    return train(model, kind, options=options, extra_plugins={"passes": passes}, **settings), passes


@pytest.fixture(params=["always", "never"])
def upstreams(request, trainer, monkeypatch):
    """Upstream's own choice: some versions always turn it on, some never do."""
    if request.param == "never" and hasattr(trainer, "_configure_training_memory_features"):
        monkeypatch.setattr(trainer, "_configure_training_memory_features", lambda *_, **__: (False, False, False))
    return request.param


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_on_and_off_are_the_same_bit_for_bit(train, equal_bits, upstreams, kind):
    """The LoRA with its default dropout of 0.1, whose numbers the second pass must draw again."""
    on, passes_on = how_often(train, "turbo", kind, "on")
    off, passes_off = how_often(train, "turbo", kind, "off")
    plain = train("turbo", kind, plugins=None)
    assert equal_bits(on, off) and equal_bits(plain, on)
    assert set(passes_on.counts) == {2} and set(passes_off.counts) == {1}
