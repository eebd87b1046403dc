"""``--compile``: close to the training without it, names as always, undone at the end, left out where it fails."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from safetensors.torch import load_file
from several_gpus.processes import done

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
    """A compiler that leaves graphs as they are, and notes what it was given: their code and shapes, in order."""

    def __init__(self):
        self.graphs = 0
        self.seen = []

    def __call__(self, graph, inputs):
        self.graphs += 1
        self.seen.append((graph.code, [str(getattr(value, "shape", value)) for value in inputs]))
        return graph.forward


def close(one, other):
    assert one.losses and one.tensors.keys() == other.tensors.keys()
    assert one.losses == pytest.approx(other.losses, rel=1e-3)


def skip_if_dropout_differs(checkpointing):
    """Since version 5, transformers checkpoints inside of what is compiled, and dropout draws other numbers there."""
    version = importlib.metadata.version("transformers")
    if checkpointing == "on" and int(version.partition(".")[0]) >= 5:
        pytest.skip(f"transformers {version}; ACE-Step asks for a version before 4.58")


@pytest.mark.slow
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


@pytest.mark.slow
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


# -- looking changes nothing -----------------------------------------------------------------------------------------

PREVIEWS = {"preview_every": 1, "preview_songs": "1", "preview_seconds": 0.4, "num_inference_steps": 3}
VALIDATION = {"validate": 2, "validate_every": 1}
SMALL = {"max_epochs": 2, "batch_size": 1}
REST = {"num_inference_steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, looking, also",
    [
        ("lora", PREVIEWS, {}),
        ("lokr", VALIDATION | PREVIEWS, {}),
        pytest.param("lora", VALIDATION, {"base_weights": "int8"}, marks=pytest.mark.slow),
        pytest.param("lora", VALIDATION | PREVIEWS, {"gradient_checkpointing": "off"}, marks=pytest.mark.slow),
        pytest.param("lokr", PREVIEWS, {"gradient_checkpointing": "off"}, marks=pytest.mark.slow),
    ],
)
def test_looking_shows_the_compiler_nothing(train, backend, kind, looking, also):
    """What it is given decides how it computes: other lengths, eval mode, a cache of keys and values."""
    given = []
    for options in ({name: value for name, value in looking.items() if name == "validate"} | REST, looking):
        torch._dynamo.reset()
        compiler = Counting()
        backend(compiler)
        # The songs held out are the same, so that the trainings are.
        done = train("base", kind, options=options | also | {"compile": True}, **SMALL)
        assert compiler.graphs, done.messages
        given.append((compiler.seen, done.losses))
    assert given[0] == given[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, also",
    [("lora", {}), ("lokr", {}), ("lora", {"base_weights": "int8"}), ("lora", {"gradient_checkpointing": "off"})],
)
def test_looking_changes_no_bit_with_torchs_own_compiler(train, equal_bits, capsys, kind, also):
    also = also | {"compile": True, "num_inference_steps": 3, "validate": 2}
    plain = train("base", kind, options=also | {"validate_every": 100}, **SMALL)
    if "has no effect" in capsys.readouterr().out:
        pytest.skip("no compiler here")
    torch._dynamo.reset()
    assert equal_bits(plain, train("base", kind, options=also | PREVIEWS | VALIDATION, **SMALL))


def test_what_is_compiled_is_put_back_after_a_look():
    from sidestep_plugin.engine.decoders import undisturbed

    block = torch.nn.Linear(2, 2)
    root = torch.nn.Sequential(block, torch.nn.Dropout())
    called = []
    block._compiled_call_impl = call = lambda *inputs: called.append(inputs) or inputs[0]
    with pytest.raises(ZeroDivisionError), undisturbed(root, torch.device("cpu")):
        assert not root(torch.ones(1, 2)).requires_grad and not called
        raise ZeroDivisionError
    assert block._compiled_call_impl is call and root.training and block.weight.requires_grad
    root(torch.ones(1, 2))
    assert len(called) == 1


@pytest.mark.slow
def test_resuming_says_that_compiling_changed(train, backend, capsys):
    backend(Counting())
    whole = train("base", options={"compile": True}, max_epochs=2, batch_size=6)
    (checkpoint,) = (whole.output / "checkpoints").glob("epoch_1*")
    capsys.readouterr()
    train("base", options={"compile": True}, max_epochs=2, batch_size=6, resume_from=str(checkpoint))
    assert "changed since the checkpoint" not in capsys.readouterr().out
    train("base", max_epochs=2, batch_size=6, resume_from=str(checkpoint))
    assert "changed since the checkpoint: compiled blocks (was True, now False)" in capsys.readouterr().out


@pytest.mark.slow
def test_looking_changes_no_bit_in_two_processes(checkout, tmp_path):
    """Each training in processes of its own: compiled code is kept as long as a process."""
    places = {name: str(getattr(checkout, name)) for name in ("root", "checkpoints", "tensors")}
    options = {"compile": True, "num_inference_steps": 3, "validate": 2}
    found = []
    for name, looking in (("plain", {"validate_every": 100}), ("looked at", PREVIEWS | VALIDATION)):
        job = {**places, "real": checkout.real, "model": "base", "dropout": 0.1, "options": options | looking}
        done(tmp_path / name, [job], 2, seconds=900.0)
        found.append(load_file(next((tmp_path / name / "0" / "output" / "final").rglob("*.safetensors"))))
    assert found[0].keys() == found[1].keys() and (tmp_path / "looked at" / "0" / "output" / "previews").is_dir()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
