"""Base weights in one byte: close to the model, said how close, the saved adapter usual, and undone at the end."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from sidestep_plugin import hookimpl
from sidestep_plugin.adapters.inspection import inspect_adapter
from sidestep_plugin.memory.quantized_linear import LARGEST, QuantizedLinear, dequantized

# -- one layer -------------------------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    torch.manual_seed(2)
    layer = torch.nn.Linear(96, 64).requires_grad_(False)
    layer.weight[7] = 0.0
    layer.weight[8] *= 1e-6
    return layer


def weight_of(layer, dtype):
    return dequantized(layer.data, layer.scale, dtype)


@pytest.mark.parametrize("kind, error", [("int8", 0.5 / 127)])
def test_every_row_has_a_scale_of_its_own(layer, kind, error):
    made = QuantizedLinear(layer, kind)
    weight, found = layer.weight, weight_of(made, torch.float32)
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert ((found - weight).abs() <= 1.01 * error * largest + 1e-30).all()
    assert (found[7] == 0).all() and made.data.element_size() == 1
    assert made.data.shape == weight.shape and made.scale.shape == (64, 1)


@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_and_gradient_are_those_of_the_dequantized_weight(layer, kind, autocast):
    made = QuantizedLinear(layer, kind)
    dtype = torch.bfloat16 if autocast else torch.float32
    plain = torch.nn.Linear(96, 64).requires_grad_(False)
    plain.weight.data, plain.bias = weight_of(made, dtype), layer.bias
    one, other = (torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = made(one), plain(other)
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=0.2 if autocast else 1e-4)
    assert not any(weight.requires_grad for weight in made.parameters())


@pytest.mark.parametrize("kind", LARGEST)
def test_only_bytes_wait_for_the_backward_pass(layer, kind):
    kept = []
    made = QuantizedLinear(layer, kind)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(torch.randn(2, 96, requires_grad=True))
    assert sorted(tensor.nbytes for tensor in kept) == [4 * 64, 96 * 64]


@pytest.mark.parametrize("kind", LARGEST)
def test_a_cast_of_the_whole_model_leaves_the_bytes_alone(layer, kind):
    made = QuantizedLinear(layer, kind)
    before = weight_of(made, torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        made.to(dtype)
    assert made.data.element_size() == 1 and torch.equal(weight_of(made, torch.float32), before)


def test_as_close_as_torchaos_int8(layer):
    quantization = pytest.importorskip("torchao.quantization", reason="compares with torchao, which is not installed")
    theirs = torch.nn.Sequential(torch.nn.Linear(96, 64).requires_grad_(False)).to(torch.bfloat16)
    theirs[0].weight.data = layer.weight.to(torch.bfloat16)
    ours = weight_of(QuantizedLinear(theirs[0], "int8"), torch.float32)
    weight = theirs[0].weight.float()
    quantization.quantize_(theirs, quantization.Int8WeightOnlyConfig())
    assert (ours - weight).norm() <= 1.05 * (theirs[0].weight.dequantize().float() - weight).norm()


# -- whole trainings -------------------------------------------------------------------------------------------------


class Looking:
    """Notes the decoder's layers in a step."""

    def __init__(self):
        self.kinds = {}

    @hookimpl
    def acestep_step_finished(self, step):
        self.kinds = {name: type(module) for name, module in step.module.model.decoder.named_modules()}
        self.trained = [name for name, weight in step.module.model.decoder.named_parameters() if weight.requires_grad]


@pytest.mark.parametrize("kind", LARGEST)
def test_a_training_with_quantized_weights(train, load, capsys, kind):
    handler, looking = load("base"), Looking()
    before = [weight.clone() for weight in handler.model.parameters()]
    plain = train("base", max_epochs=3)
    capsys.readouterr()
    done = train("base", handler=handler, max_epochs=3, options={"base_weights": kind}, extra_plugins={"z": looking})
    assert done.tensors, done.messages
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Base weights")]
    assert (
        f"Base weights: {kind} instead of float32 in" in line and "not the same result: loss of the base model" in line
    )
    # Close to the unquantized training, and not equal to it.
    assert plain.tensors.keys() == done.tensors.keys() and done.losses != plain.losses
    assert done.losses == pytest.approx(plain.losses, rel=0.02)
    quantized = {name for name, found in looking.kinds.items() if found is QuantizedLinear}
    assert quantized and all(".layers." in f".{name}." for name in quantized)
    assert not [name for name in looking.trained if "lora_" not in name]
    assert {name for name in quantized if "q_proj" in name} == {
        name for name in looking.kinds if name.endswith("q_proj.base_layer")
    }
    # What was done is said by the adapter, and undone in the model.
    report = inspect_adapter(next(done.output.glob("final/**/*.safetensors")))
    facts = report.facts
    assert not report.notes, "every fact is one that inspect knows"
    assert facts["base_weights"] == kind and abs(facts["base_weights_loss_change"]) < 0.05
    assert QuantizedLinear not in {type(module) for module in handler.model.modules()}
    # The names are those of PEFT and Fabric by now; the order is the model's own. Early versions cast it to bf16.
    after = [weight for name, weight in handler.model.named_parameters() if "lora_" not in name]
    assert len(before) == len(after) and all(
        torch.equal(one.to(two.dtype), two) for one, two in zip(before, after, strict=True)
    )
    assert len({weight.dtype for weight in after}) == 1


@pytest.mark.slow
def test_resuming_equals_going_through(train, capsys):
    options = {"base_weights": "int8", "export": "comfyui"}
    whole = train("base", max_epochs=3, options=options)
    checkpoint = sorted((whole.output / "checkpoints").glob("epoch_2*"))[0]
    rest = train("base", max_epochs=3, options=options, resume_from=str(checkpoint))
    assert all(torch.equal(whole.tensors[key], rest.tensors[key]) for key in whole.tensors)
    assert list(whole.output.glob("final/**/*comfyui*"))
    assert "changed since the checkpoint" not in capsys.readouterr().out
    train("base", max_epochs=3, resume_from=str(checkpoint))
    assert "base weights (was int8, now not quantized)" in capsys.readouterr().out


def test_resuming_says_that_quantizing_began(train, capsys):
    whole = train("base", max_epochs=2)
    (checkpoint,) = (whole.output / "checkpoints").glob("epoch_1*")
    capsys.readouterr()
    done = train("base", max_epochs=2, options={"base_weights": "int8"}, resume_from=str(checkpoint))
    assert "base weights (was not quantized, now int8)" in capsys.readouterr().out
    facts = inspect_adapter(next(done.output.glob("final/**/*.safetensors"))).facts
    assert facts["base_weights"] == "int8" and "base_weights_loss_change" in facts


def test_a_mask_hides_nan_from_the_measuring_too(train, checkout, tmp_path, capsys):
    """The first song has NaN in rows that its masks hide. No number becomes NaN, and every save carries its facts."""
    shutil.copytree(checkout.tensors, tmp_path / "songs")
    song = torch.load(tmp_path / "songs" / "song_01.pt", weights_only=True)
    for name, mask in (("encoder_hidden_states", "encoder_attention_mask"), ("target_latents", "attention_mask")):
        song[mask][-2:] = 0
        song[name][-2:] = float("nan")
    torch.save(song, tmp_path / "songs" / "song_01.pt")
    options = {"base_weights": "int8", "mask_nan": True}
    done = train("base", max_epochs=1, options=options, tensors=tmp_path / "songs")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Base weights")]
    assert "loss of the base model on one song" in line and "nan" not in line.lower()
    assert done.losses and all(map(math.isfinite, done.losses))
    folders = [file.parent for file in done.output.rglob("*.safetensors")]
    assert len(folders) >= 2
    for folder in folders:
        facts = json.loads((folder / "training_config.json").read_text(encoding="utf-8"))
        assert facts["base_weights"] == "int8" and math.isfinite(facts["base_weights_loss_change"])


def test_a_fact_that_is_no_number_is_left_out(train):
    """JSON has no NaN; an adapter is saved all the same."""

    class Telling:
        @hookimpl
        def acestep_run_started(self, run):
            run.facts.append(lambda: {"base_weights_loss_change": float("nan"), "compiled": True})

    done = train("base", max_epochs=1, extra_plugins={"telling": Telling()})
    facts = inspect_adapter(next(done.output.glob("final/**/*.safetensors"))).facts
    assert facts["compiled"] is True and "base_weights_loss_change" not in facts


@pytest.mark.slow
def test_measuring_draws_no_random_number(train, monkeypatch):
    """A replacement that computes the same bits, so that only the measuring could make a difference."""
    plain = train("base", max_epochs=1)
    monkeypatch.setattr("sidestep_plugin.memory.quantized_linear.QuantizedLinear", lambda layer, kind: layer)
    measured = train("base", max_epochs=1, options={"base_weights": "int8"})
    assert plain.losses == measured.losses and torch.equal(plain.rng_state, measured.rng_state)


@pytest.mark.parametrize("autocast", [True, False])
def test_with_weights_in_bf16_and_upstreams_cast(trainer, train, load, monkeypatch, capsys, autocast):
    for name in ("_precision", "_select_fabric_precision"):
        if hasattr(trainer, name):
            monkeypatch.setattr(trainer, name, lambda *_: "bf16-mixed" if autocast else "32-true")
    handler, looking = load("base"), Looking()
    handler.model.to(torch.bfloat16)
    done = train("base", handler=handler, max_epochs=1, options={"base_weights": "int8"}, extra_plugins={"z": looking})
    assert done.tensors and QuantizedLinear in looking.kinds.values()
    assert "int8 instead of bfloat16" in capsys.readouterr().out


def test_a_lokr_is_refused(train):
    done = train("base", "lokr", options={"base_weights": "int8"})
    assert "--base-weights int8 works for a LoRA only" in done.messages[-1] and not done.losses


def test_without_lightning_it_is_refused(trainer, train, monkeypatch):
    if not hasattr(trainer, "LIGHTNING_AVAILABLE"):
        pytest.skip("this version of ACE-Step has no such switch")
    monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    done = train("base", options={"base_weights": "int8"})
    assert "--base-weights int8 needs Lightning" in done.messages[-1] and not done.losses
