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
def test_on_and_off_are_the_same_bit_for_bit(train, equal_bits, capsys, upstreams, kind):
    """The LoRA with its default dropout of 0.1, whose numbers the second pass must draw again."""
    on, passes_on = how_often(train, "turbo", kind, "on")
    off, passes_off = how_often(train, "turbo", kind, "off")
    plain = train("turbo", kind, plugins=None)
    if not equal_bits(on, off) and "the last bits may differ" in capsys.readouterr().out:
        pytest.skip("this version of ACE-Step does not keep the adapter in fp32, and the log says what follows")
    assert equal_bits(on, off) and equal_bits(plain, on)
    assert set(passes_on.counts) == {2} and set(passes_off.counts) == {1}


def test_auto_turns_it_off_only_where_an_estimate_says_that_it_fits(train, equal_bits, monkeypatch, capsys):
    """A gibibyte is plenty for this model, a kibibyte too little, and on a CPU nothing is known."""

    def auto(free):
        monkeypatch.setattr("sidestep_plugin.memory.of_training.free_memory", lambda decoder: free)
        done, passes = how_often(train, "turbo", "lora", None, max_epochs=1)
        said = capsys.readouterr().out
        assert said.count("Memory: about ") == 1
        assert ("Warning: this may not fit." in said) is (free == 2**10)
        return done, set(passes.counts), "Gradient checkpointing: off, because about" in said

    theirs, unknown, said = auto(None)
    assert not said
    if unknown == {1}:
        pytest.skip("this version of ACE-Step leaves it off")
    assert auto(2**10)[1:] == ({2}, False)
    done, plenty, said = auto(2**30)
    assert plenty == {1} and said
    assert equal_bits(theirs, done)


def test_auto_turns_it_on_where_an_estimate_says_that_nothing_else_fits(trainer, train, monkeypatch, capsys):
    if hasattr(trainer, "_configure_training_memory_features"):
        monkeypatch.setattr(trainer, "_configure_training_memory_features", lambda *_, **__: (False, False, False))
    monkeypatch.setattr("sidestep_plugin.memory.of_training.free_memory", lambda decoder: 2**10)
    _, passes = how_often(train, "turbo", "lora", None, max_epochs=1)
    assert "Gradient checkpointing: on, because about" in capsys.readouterr().out
    assert set(passes.counts) == {2}


@pytest.mark.parametrize("choice", ["on", "off"])
def test_a_choice_without_effect_is_refused(trainer, train, monkeypatch, choice):
    monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    result = train("base", options={"gradient_checkpointing": choice})
    assert f"--gradient-checkpointing {choice} needs ACE-Step's trainer with Lightning" in result.messages[-1]


def test_afterwards_the_model_is_as_upstream_left_it(trainer, train, load):
    def left(**ways):
        handler = load("base")
        train("base", handler=handler, max_epochs=1, **ways)
        return [getattr(module, "gradient_checkpointing", None) for module in handler.model.decoder.modules()]

    theirs = left(plugins=None)
    assert True in theirs or False in theirs
    for choice in ("on", "off"):
        assert left(options={"gradient_checkpointing": choice}) == theirs


def test_a_model_without_it_refuses_on():
    from sidestep_plugin.memory.gradient_checkpointing import switch_checkpointing

    switch_checkpointing(torch.nn.Linear(1, 1), False)()
    with pytest.raises(Refusal, match="have no gradient checkpointing. Leave --gradient-checkpointing on out"):
        switch_checkpointing(torch.nn.Linear(1, 1), True)
