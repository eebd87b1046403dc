"""``--compile``: close to the training without it, names as always, undone at the end, left out where it fails."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from sidestep_plugin.adapters.inspection import inspect_adapter
from sidestep_plugin.memory import compiling

pytestmark = pytest.mark.filterwarnings("ignore::Warning:torch")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend(monkeypatch):
    """Replace the compiler, which takes minutes, by a function that is given each graph."""

    def use(function):
        monkeypatch.setattr(compiling, "BACKEND", function)

    return use


class Counting:
    """A compiler that leaves graphs as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def close(one, other):
    assert one.losses and one.tensors.keys() == other.tensors.keys()
    assert one.losses == pytest.approx(other.losses, rel=1e-3)


def skip_if_dropout_differs(checkpointing):
    """Since version 5, transformers checkpoints inside of what is compiled, and dropout draws other numbers there."""
    version = importlib.metadata.version("transformers")
    if checkpointing == "on" and int(version.partition(".")[0]) >= 5:
        pytest.skip(f"transformers {version}; ACE-Step asks for a version before 4.58")


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_training_with_compiled_blocks(train, load, backend, capsys, kind, checkpointing):
    skip_if_dropout_differs(checkpointing)
    handler, compiler, chosen = load("base"), Counting(), {"gradient_checkpointing": checkpointing}
    backend(compiler)
    plain = train("base", kind, options=chosen)
    assert not compiler.graphs
    capsys.readouterr()
    done = train("base", kind, handler=handler, options=chosen | {"compile": True})
    assert compiler.graphs, done.messages
    close(plain, done)
    assert capsys.readouterr().out.count("Compile: 2 blocks in the first steps") == 1
    assert torch.equal(plain.rng_state, done.rng_state)
    assert inspect_adapter(next(done.output.glob("final/**/*.safetensors"))).facts["compiled"] is True
    assert all(module._compiled_call_impl is None for module in handler.model.modules()), "undone at the end"
    assert not [name for name, _ in handler.model.named_parameters() if "_orig_mod" in name]


@pytest.mark.slow
def test_with_quantized_weights(train, backend):
    compiler = Counting()
    backend(compiler)
    chosen = {"base_weights": "int8", "gradient_checkpointing": "off"}
    plain = train("base", options=chosen, max_epochs=1)
    close(plain, train("base", options=chosen | {"compile": True}, max_epochs=1))
    assert compiler.graphs


def test_where_compiling_fails_the_training_goes_on_without(train, load, backend, equal_bits, capsys):
    def failing(graph, inputs):
        raise FileNotFoundError("no compiler: cl is not found\nand more")

    handler = load("base")
    backend(failing)
    plain = train("base", max_epochs=1)
    capsys.readouterr()
    done = train("base", handler=handler, max_epochs=1, options={"compile": True})
    assert equal_bits(plain, done)
    out = capsys.readouterr().out
    told = "Warning: --compile has no effect, torch.compile failed (FileNotFoundError: no compiler: cl is not found)."
    assert out.count(told) == 1 and "and more" not in out
    assert "compiled" not in inspect_adapter(next(done.output.glob("final/**/*.safetensors"))).facts
    assert all(module._compiled_call_impl is None for module in handler.model.modules())


def test_without_lightning_it_is_refused(trainer, train, monkeypatch):
    if not hasattr(trainer, "LIGHTNING_AVAILABLE"):
        pytest.skip("this version of ACE-Step has no such switch")
    monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    done = train("base", options={"compile": True})
    assert "--compile needs Lightning" in done.messages[-1] and not done.losses


@pytest.mark.slow
def test_with_torchs_own_compiler(train, capsys):
    chosen = {"gradient_checkpointing": "off"}
    plain = train("base", options=chosen)
    done = train("base", options=chosen | {"compile": True})
    if "has no effect" in capsys.readouterr().out:
        pytest.skip("no compiler here")
    close(plain, done)
    assert torch.equal(plain.rng_state, done.rng_state)
