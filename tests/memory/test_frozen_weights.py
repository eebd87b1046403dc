"""Frozen weights stay in bf16 and idle LoKr layers are bypassed: same losses, adapter and random state, bit for bit."""

from __future__ import annotations

import pytest
import torch

from sidestep_plugin import Refusal, attach, hookimpl
from sidestep_plugin.memory.base_weights import chosen
from sidestep_plugin.registry import Registry

LINEAR = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.ConvTranspose1d)


@pytest.fixture
def bf16(trainer, monkeypatch, load):
    """Train as on a GPU: a model that was loaded in bf16, and bf16 autocast. Returns a loader of such models."""
    for name in ("_precision", "_select_fabric_precision"):
        if hasattr(trainer, name):
            monkeypatch.setattr(trainer, name, lambda *_: "bf16-mixed")

    def load_bf16(name="base"):
        handler = load(name)
        handler.model.to(torch.bfloat16)
        return handler

    return load_bf16


class Types:
    """Notes the types of the decoder's parameters in a step."""

    def __init__(self):
        self.frozen, self.trained = {}, {}

    @hookimpl
    def acestep_step_finished(self, step):
        if self.frozen:
            return
        adapted = {
            id(lora.org_module[0]) for lora in self.loras(step) if any(p.requires_grad for p in lora.parameters())
        }
        for prefix, module in step.module.model.decoder.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                kind = "adapted" if id(module) in adapted else "linear" if isinstance(module, LINEAR) else "other"
                place = self.trained if weight.requires_grad else self.frozen
                place[f"{prefix}.{name}"] = (kind, weight.dtype)
        self.layers = len(self.loras(step))
        self.wrapped = sum(hasattr(lora.org_module[0], "_lycoris_wrappers") for lora in self.loras(step))

    @staticmethod
    def loras(step):
        return getattr(getattr(step.module, "lycoris_net", None), "loras", ())


def needs_cast(messages_or_lines):
    """Versions of upstream that do not cast the decoder to fp32 have nothing to save."""
    if any("nothing to save" in line or "adapter itself in bf16" in line for line in messages_or_lines):
        pytest.skip("this version of ACE-Step does not cast the decoder to fp32")


@pytest.mark.parametrize("model", ["base", "turbo"])
@pytest.mark.parametrize("settings", [{}, {"batch_size": 1, "gradient_accumulation_steps": 4, "max_epochs": 3}])
def test_a_lora_is_the_same_bit_for_bit(train, bf16, equal_bits, capsys, model, settings):
    plain = train(model, handler=bf16(model), options={"base_weights": "fp32"}, **settings)
    types = Types()
    saved = train(model, handler=bf16(model), extra_plugins={"types": types}, **settings)
    needs_cast(capsys.readouterr().out.splitlines())
    assert equal_bits(plain, saved)
    assert {dtype for kind, dtype in types.frozen.values() if kind == "linear"} == {torch.bfloat16}
    assert {dtype for kind, dtype in types.frozen.values() if kind == "other"} == {torch.float32}
    assert {dtype for _, dtype in types.trained.values()} == {torch.float32}


@pytest.mark.parametrize("settings", [{}, {"batch_size": 1, "gradient_accumulation_steps": 4, "max_epochs": 3}])
def test_a_lokr_is_the_same_bit_for_bit(train, bf16, equal_bits, capsys, settings):
    """A turbo model, so that upstream alone trains the same: with every wrapped layer in its forward pass."""
    plain = train("turbo", "lokr", handler=bf16("turbo"), plugins=None, **settings)
    types = Types()
    saved = train("turbo", "lokr", handler=bf16("turbo"), extra_plugins={"types": types}, **settings)
    needs_cast(capsys.readouterr().out.splitlines())
    assert equal_bits(plain, saved)
    assert {dtype for kind, dtype in types.frozen.values() if kind == "adapted"} == {torch.float32}
    assert torch.bfloat16 in {dtype for kind, dtype in types.frozen.values() if kind == "linear"}
    assert 0 < types.wrapped < types.layers


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_on_a_cpu_in_fp32_nothing_is_kept(train, equal_bits, capsys, kind):
    """No autocast: bf16 weights would meet fp32 activations. A LoKr's idle layers are bypassed there, too."""
    plain = train("turbo", kind, plugins=None)
    saved = train("turbo", kind)
    assert "Frozen weights" not in capsys.readouterr().out
    assert equal_bits(plain, saved)


def test_a_checkpoint_in_fp32_is_left_alone(train, bf16, load, capsys):
    """Its weights hold bits that bf16 has not."""
    types = Types()
    train("base", handler=load("base"), extra_plugins={"types": types}, max_epochs=1)
    out = capsys.readouterr().out
    assert "Frozen weights" not in out
    if "keeps the adapter itself in bf16" not in out:
        assert {dtype for _, dtype in types.frozen.values()} == {torch.float32}


def test_an_adapter_that_is_trained_in_bf16_is_warned_about_once(trainer, train, bf16, capsys, monkeypatch):
    """The first versions do so: small updates of the adapter are rounded away."""
    for name in ("_precision", "_select_fabric_precision"):
        if hasattr(trainer, name):
            monkeypatch.setattr(trainer, name, lambda *_: "bf16-true")
    types = Types()
    result = train("turbo", handler=bf16("turbo"), extra_plugins={"types": types}, max_epochs=1)
    in_bf16 = torch.bfloat16 in {dtype for _, dtype in types.trained.values()}
    assert types.trained, result.messages
    assert capsys.readouterr().out.count("keeps the adapter itself in bf16") == int(in_bf16)
    assert in_bf16 or hasattr(trainer, "_ensure_trainable_params_fp32")


def _noting(hosts):
    from sidestep_plugin.engine.host import Host

    start = Host.start

    def noted(host, run):
        hosts.append(host)
        start(host, run)

    return noted


def test_said_what_cannot_be_had_stops_the_run(trainer, train, monkeypatch):
    handles = []
    monkeypatch.setattr("sidestep_plugin.engine.host.Host.start", _noting(handles))
    result = train("base", options={"base_weights": "bf16"})
    assert isinstance(handles[0].refusal, Refusal), "a refusal, and not a training that failed"
    assert "--base-weights bf16: no frozen weight can stay in bf16" in result.messages[-1] and not result.tensors


def test_afterwards_the_network_is_as_upstream_left_it(trainer, train, load, require_kind):
    """In the app the model goes on living: the next inference goes through every wrapped layer, as without us."""
    handler = load("base")
    train("base", "lokr", handler=handler, max_epochs=1)
    network = handler.model.decoder._lycoris_net
    assert all(lora.org_module[0].forward == lora.forward for lora in network.loras)
    assert "to" not in vars(handler.model.decoder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_resuming_equals_going_through(train, bf16, equal_bits, kind):
    whole = train("base", kind, handler=bf16(), max_epochs=4)
    checkpoint = sorted((whole.output / "checkpoints").glob("epoch_2*"))[0]
    rest = train("base", kind, handler=bf16(), max_epochs=4, resume_from=str(checkpoint))
    assert whole.tensors.keys() == rest.tensors.keys()
    assert all(torch.equal(whole.tensors[key], rest.tensors[key]) for key in whole.tensors)


# -- the option and its old name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "auto"),
        ({"base_weights": "off"}, "auto"),
        ({"frozen_weights": "fp32"}, "fp32"),
        ({"base_weights": "off", "frozen_weights": "bf16"}, "bf16"),
        ({"base_weights": "int8", "frozen_weights": "auto"}, "int8"),
        ({"base_weights": "int8", "frozen_weights": "fp32"}, "int8"),
        ({"base_weights": "bf16", "frozen_weights": "bf16"}, "bf16"),
    ],
)
def test_options_of_earlier_versions_are_understood(given, expected):
    assert chosen(Registry.load(("sidestep",)).resolve_options(given)) == expected


def test_two_types_for_the_same_weights_are_refused(train):
    done = train("base", options={"base_weights": "bf16", "frozen_weights": "fp32"})
    assert "--base-weights bf16 and --frozen-weights fp32 are two types" in done.messages[-1] and not done.losses


def test_what_was_cut_is_refused_with_what_to_use(trainer):
    with pytest.raises(Refusal, match="fp8 is no longer offered.*Use int8"):
        attach(trainer, options={"base_weights": "fp8"})


@pytest.mark.parametrize("options", [{"base_weights": "bf16"}, {"base_weights": "fp32"}, {"frozen_weights": "bf16"}])
def test_a_type_without_effect_is_refused(trainer, train, monkeypatch, options):
    if not hasattr(trainer, "LIGHTNING_AVAILABLE"):
        pytest.skip("this version of ACE-Step has no such switch")
    monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    done = train("base", options=options)
    assert f"--base-weights {next(iter(options.values()))} needs Lightning" in done.messages[-1] and not done.losses


# -- gradients that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [[1.0, 2.0], [3.0]],
        [[1.0, float("nan")], [3.0]],
        [[1.0], [float("inf"), -1.0], [float("-inf")]],
        [[float("nan"), float("inf")]],
        [[1.0], None, []],
        [None],
        [[3.0e38, 3.0e38], [3.0e38]],
        [],
    ],
)
def test_gradients_are_counted_as_upstream_counts_them(trainer, values):
    if not hasattr(trainer, "_count_nonfinite_grads"):
        pytest.skip("needs a real checkout that counts them: pytest --acestep-root=DIR")
    parameters = []
    for value in values:
        weight = torch.nn.Parameter(torch.zeros(1 if value is None else len(value)))
        weight.grad = None if value is None else torch.tensor(value)
        parameters.append(weight)
    expected = trainer._count_nonfinite_grads(parameters)
    with attach(trainer, announce=print):
        assert trainer._count_nonfinite_grads.__wrapped__ is not None
        assert trainer._count_nonfinite_grads(parameters) == expected
