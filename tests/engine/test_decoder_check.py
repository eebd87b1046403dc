"""Conditions are dropped once: forks that drop them inside the step are refused, by their code and by what they do."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from conftest import COMMAND, without_training_packages

from sidestep_plugin import UpstreamMismatch, attach, hookimpl, miniature
from sidestep_plugin.errors import PluginError

IN_THE_STEP = (
    '            noise = torch.randn_like(inputs["target_latents"])\n',
    "            inputs = self._without_some(inputs)\n",
)


@pytest.fixture
def fork(trainer, monkeypatch):
    """Make the trainer drop conditions by itself, as a public fork does in its discrete mode."""
    if not hasattr(trainer.PreprocessedLoRAModule, "_on_device"):
        pytest.skip("made of the stand-in's code")
    original = trainer.PreprocessedLoRAModule._on_device

    def dropped(inputs, ratio, null):
        conditions = inputs["encoder_hidden_states"]
        rows = torch.rand(len(conditions)) < ratio
        return inputs | {"encoder_hidden_states": torch.where(rows.view(-1, 1, 1), null.to(conditions), conditions)}

    def named(self, batch):
        return dropped(original(self, batch), 0.15, self.model.null_condition_emb)

    def hidden(self, batch):
        null = next(tensor for name, tensor in self.model.named_parameters() if name.startswith("null_"))
        return dropped(original(self, batch), 1.0, null)

    def make(drop):
        drop.__module__ = trainer.__name__  # as if it stood in the trainer's own file
        for name in ("PreprocessedLoRAModule", "PreprocessedLoKRModule"):
            monkeypatch.setattr(getattr(trainer, name), "_on_device", drop)

    make.named, make.hidden = named, hidden
    return make


def test_a_fork_that_drops_conditions_itself_is_refused_by_its_code(trainer, fork):
    fork(fork.named)
    with pytest.raises(UpstreamMismatch, match=r"drops conditions by itself \(null_condition_emb\).*dropped twice"):
        attach(trainer)


def test_a_fork_whose_code_does_not_show_it_is_refused_in_the_first_step(trainer, fork, load, module_for, batch_of):
    fork(fork.hidden)
    handler = load("turbo")
    module = module_for(handler)
    wanted = pytest.raises(UpstreamMismatch, match="changes encoder_hidden_states on its way to the decoder")
    with attach(trainer, announce=print), wanted:
        module.training_step(batch_of(handler.model, 2))


@pytest.mark.parametrize("entry", ["encoder_hidden_states", "context_latents", "encoder_attention_mask"])
def test_whatever_is_changed_behind_a_hook_is_seen(trainer, load, module_for, batch_of, entry):
    handler = load("base")
    module = module_for(handler)

    def meddle(_, __, kwargs):
        return (), kwargs | {entry: torch.zeros_like(kwargs[entry])}

    with attach(trainer, announce=print):
        hook = handler.model.decoder.register_forward_pre_hook(meddle, with_kwargs=True)
        with pytest.raises(UpstreamMismatch, match=f"changes {entry} on its way to the decoder"):
            module.training_step(batch_of(handler.model, 3))
        hook.remove()


@pytest.mark.parametrize("model", ["base", "turbo"])
def test_rounding_to_bf16_is_no_change(trainer, load, module_for, batch_of, model):
    handler = load(model)
    module = module_for(handler)

    def rounded(_, __, kwargs):
        return (), {name: value.bfloat16().to(value) for name, value in kwargs.items()}

    with attach(trainer, announce=print):
        hook = handler.model.decoder.register_forward_pre_hook(rounded, with_kwargs=True)
        module.training_step(batch_of(handler.model, 3))
        hook.remove()


@pytest.mark.slow
def test_a_checkout_like_that_is_told_by_check(tmp_path):
    """The same in a checkout of its own, whose file really says so."""
    root = miniature.write_checkout(tmp_path / "checkout")
    file = root / "acestep" / "training" / "trainer.py"
    text = file.read_text(encoding="utf-8")
    assert IN_THE_STEP[0] in text
    text = text.replace(IN_THE_STEP[0], IN_THE_STEP[1] + IN_THE_STEP[0])
    text += (
        "\n\ndef _without_some(self, inputs):\n    return apply_cfg_dropout(inputs, self.model)\n\n"
        "def apply_cfg_dropout(inputs, model):\n    return inputs\n\n"
        "_FlowModule = PreprocessedLoRAModule.__mro__[1]\n_FlowModule._without_some = _without_some\n"
    )
    file.write_text(text, encoding="utf-8")
    line = [*COMMAND, "check", "--acestep-root", str(root)]
    done = subprocess.run(
        line,
        env=without_training_packages(os.environ),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "drops conditions by itself (apply_cfg_dropout)" in done.stdout.splitlines()[-1]


# -- who only looks --------------------------------------------------------------------------------------------------


class Zeroing:
    """A watcher that tries to change the loss: by assignment, or in place."""

    def __init__(self, how):
        self.how = how

    @hookimpl
    def acestep_step_finished(self, step):
        if self.how == "assigned":
            step.loss = step.loss * 0
        else:
            step.loss.zero_()


def test_a_watcher_cannot_assign_the_loss(train):
    result = train("base", plugins=(), extra_plugins={"watcher": Zeroing("assigned")}, max_epochs=1)
    assert "Plugin 'watcher' failed in acestep_step_finished" in result.messages[-1] and not result.tensors


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_what_a_watcher_does_to_its_copy_of_the_loss_changes_nothing(train, equal_bits, kind):
    plain = train("base", kind, plugins=())
    watched = train("base", kind, plugins=(), extra_plugins={"watcher": Zeroing("in place")})
    assert equal_bits(plain, watched)


def test_the_error_names_plugin_and_hook(trainer, load, module_for, batch_of):
    handler = load("base")
    module = module_for(handler)
    wanted = pytest.raises(PluginError, match="'watcher' failed in acestep_step_finished: FrozenInstanceError")
    with attach(trainer, plugins=(), extra_plugins={"watcher": Zeroing("assigned")}), wanted:
        module.training_step(batch_of(handler.model, 2))
