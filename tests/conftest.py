"""Where the tests find ACE-Step: the miniature, or a real checkout with ``pytest --acestep-root=DIR``.

The same tests run against both. Where the two disagree, the miniature is wrong.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Model code that transformers copies on loading belongs to this test run, not to the user's cache.
_modules_cache = tempfile.TemporaryDirectory(prefix="sidestep-tests-", ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = _modules_cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Also for the processes that tests start: their models are tiny, and several tests run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--acestep-root", metavar="DIR", help="run against this ACE-Step 1.5 checkout")
    parser.addoption("--readers", metavar="DIR", help="run the code of other programs, from clones in this folder")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    # Under nohup, and in the background of a script, signals are ignored, and what tests start would ignore them, too.
    for name in ("SIGINT", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    # The models are tiny: more threads only wait for each other.
    torch.set_num_threads(1)
    if config.getoption("--acestep-root"):
        # Warnings of upstream and of what only it imports are not ours to mend; ours stay errors.
        config.addinivalue_line("filterwarnings", "ignore:::(?!sidestep_plugin|tests)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--acestep-root"):
        return
    for item in items:
        if item.get_closest_marker("upstream"):
            item.add_marker(pytest.mark.skip(reason="needs a real checkout: pytest --acestep-root=DIR"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Only a real checkout may be of a version that cannot do something: on the miniature such a skip is a failure."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and not item.config.getoption("--acestep-root"):
        why = report.longrepr[2]
        if "this version" in why:
            report.outcome = "failed"
            report.longrepr = f"skipped on the miniature, which can do it: {why}"
    return report


@dataclass(frozen=True)
class Checkout:
    """An ACE-Step checkout with tiny models and songs.

    Attributes:
        root: the folder that holds ``acestep``.
        checkpoints: the folder of the miniature's models.
        tensors, xl_tensors: songs for the usual models, and for XL models.
        real: whether the trainer is upstream's own.
    """

    root: Path
    checkpoints: Path
    tensors: Path
    xl_tensors: Path
    real: bool


@pytest.fixture(scope="session")
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    from sidestep_plugin import miniature

    base = tmp_path_factory.getbasetemp()
    models = [*miniature.MODELS, "acestep-v15-turbo-shift1", "acestep-v15-xl-base"]
    built = miniature.build(base / "miniature", models=models)
    said = request.config.getoption("--acestep-root")
    if said:
        # Early versions read the manifest's names relative to the current directory.
        for folder in (built.tensors, built.xl_tensors):
            (folder / "manifest.json").unlink()
        if importlib.util.find_spec("torchaudio") is None:
            # Imported by upstream's data module; training on preprocessed songs never calls it.
            stand_in = types.ModuleType("torchaudio")
            stand_in.transforms = types.ModuleType("torchaudio.transforms")
            sys.modules["torchaudio"] = stand_in
    root = Path(said).absolute() if said else built.root
    return Checkout(root, built.checkpoints, built.tensors, built.xl_tensors, bool(said))


@pytest.fixture(scope="session")
def trainer(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module ``acestep.training.trainer`` of the checkout, imported once for the session."""
    from sidestep_plugin.engine.checkout import import_trainer

    before = Path.cwd()
    # Upstream's path guard accepts what lies under the directory that it was imported in.
    os.chdir(tmp_path_factory.getbasetemp())
    try:
        return import_trainer(checkout.root)
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def nothing_stays_attached() -> Iterator[None]:
    """A test that leaves the trainer changed would decide about the tests after it."""
    yield
    from sidestep_plugin import attach as _  # noqa: F401
    from sidestep_plugin.engine.attachment import _attached

    left = list(_attached)
    for attachment in left:
        attachment.detach()
    assert not left, "the test left plugins attached"


@pytest.fixture(autouse=True)
def no_power_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test loses power, and waiting for the disk takes a tenth of the time of a training of a second."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def pages_without_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing would take half of the time of a training of a second. The tests of the report draw."""
    if "report" not in request.path.parts:
        monkeypatch.setattr("sidestep_plugin.report.charts.can_draw", lambda: False)


@pytest.fixture
def kinds(trainer: Any) -> list[str]:
    from sidestep_plugin.engine.shapes import adapter_types

    return list(adapter_types(trainer))


@pytest.fixture
def require_kind(kinds: list[str]) -> Callable[[str], None]:
    def require(kind: str) -> None:
        if kind not in kinds:
            pytest.skip(f"this checkout's trainer has no {kind}")
        if kind == "lokr":
            pytest.importorskip("lycoris", reason="LoKr needs lycoris-lora: pip install 'sidestep-plugin[upstream]'")

    return require


@pytest.fixture
def load(checkout: Checkout) -> Callable[..., Any]:
    """Load one of the miniature's models: ``load("base")`` returns a handler with model, device and dtype."""
    import torch

    from sidestep_plugin.engine.models import find_model, load_model

    def load(name: str) -> Any:
        return load_model(find_model(name, checkout.checkpoints), torch.device("cpu"))

    return load


@pytest.fixture
def batch_of() -> Callable[..., dict[str, Any]]:
    """Make a random batch in the model's dtype: ``batch_of(model, size, seed)``. Draws from its own generator."""
    import torch

    def make(model: Any, size: int, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        dtype = model.null_condition_emb.dtype

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        width = model.null_condition_emb.shape[-1]
        return {
            "target_latents": noise(size, 24, 64),
            "attention_mask": torch.ones(size, 24, dtype=dtype),
            "encoder_hidden_states": noise(size, 7, width),
            "encoder_attention_mask": torch.ones(size, 7, dtype=dtype),
            "context_latents": noise(size, 24, 128),
            "metadata": [{}] * size,
        }

    return make


@pytest.fixture
def module_for(trainer: Any) -> Callable[..., Any]:
    """Upstream's training module around a handler: ``module_for(handler, "lora")``, without LoRA dropout."""
    import torch

    from sidestep_plugin.engine import shapes

    def make(handler: Any, kind: str = "lora", **training: Any) -> Any:
        config_class = getattr(trainer, shapes.CONFIG_CLASS[kind])
        config = (
            config_class(r=4, alpha=8, dropout=0.0) if kind == "lora" else config_class(linear_dim=4, linear_alpha=8)
        )
        training_config = known_fields(trainer.TrainingConfig, training)
        module_class = getattr(trainer, shapes.MODULE_CLASS[kind])
        if shapes.sampler_style(trainer.sample_discrete_timestep) == "device and dtype":
            # These versions step in bf16 on every device, and leave it to Fabric to make that possible.
            handler.model.to(torch.bfloat16)
            handler.dtype = torch.bfloat16
        return module_class(handler.model, config, training_config, handler.device, handler.dtype)

    return make


def known_fields(config_class: Any, values: Mapping[str, Any]) -> Any:
    """An upstream configuration with those of the values that this version has a field for."""
    known = inspect.signature(config_class).parameters
    return config_class(**{name: value for name, value in values.items() if name in known})


SETTINGS = {
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_epochs": 2,
    "save_every_n_epochs": 1,
    "learning_rate": 1e-2,
    "num_workers": 0,
    "pin_memory": False,
    "persistent_workers": False,
    "seed": 7,
    "log_every_n_steps": 1,
}
"""Upstream's training settings for a training of seconds."""

COMMAND = [sys.executable, "-c", "from sidestep_plugin.cli import main; main()"]
"""``acestep-train`` in a process of its own, without the script that pip installs."""


def without_training_packages(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a new process that attaches plugins and trains nothing.

    PEFT, Lightning and LyCORIS cannot be imported there, which saves most of the process's time. Upstream's trainer
    can be imported without them.
    """
    folder = str(Path(__file__).parent / "stand_ins" / "no_training")
    path = os.pathsep.join(filter(None, [folder, environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}


@contextmanager
def running(line: Sequence[object], *, seconds: float = 120.0, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that a test talks to, with its output as text. It never outlives the ``with`` block.

    Raises AssertionError when the process had to be killed because `seconds` had passed.
    """
    pipes = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    late = threading.Event()
    with subprocess.Popen([*map(str, line)], **(pipes | more)) as process:

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()  # does nothing to a process that has ended
            assert not late.is_set(), f"still running after {seconds:.0f} s, and killed: {process.args}"


@dataclass
class Trained:
    """What a whole training left behind."""

    losses: list[float]
    tensors: dict[str, Any]
    rng_state: Any
    messages: list[str]
    output: Path
    timesteps: list[Any]
    conditions: list[Any]
    config: Any


@pytest.fixture
def train(
    checkout: Checkout, trainer: Any, load: Callable[..., Any], tmp_path: Path, require_kind: Callable[[str], None]
) -> Callable[..., Trained]:
    """Run upstream's own trainer from start to saved adapter.

    ``train("base", "lora", plugins=("sidestep",), options={...}, max_epochs=2, ...)``; ``plugins=None`` leaves the
    trainer as it is. What the decoder really received is recorded by a forward hook on the decoder.
    """
    import torch
    from safetensors.torch import load_file

    from sidestep_plugin import attach
    from sidestep_plugin.engine import shapes

    counter = iter(range(1000))

    def run(
        model: str,
        kind: str = "lora",
        *,
        plugins: tuple[str, ...] | None = ("sidestep",),
        options: Mapping[str, Any] | None = None,
        extra_plugins: Mapping[str, object] | None = None,
        handler: Any = None,
        resume_from: str | None = None,
        tensors: Path | None = None,
        **settings: Any,
    ) -> Trained:
        require_kind(kind)
        output = tmp_path / f"run-{next(counter)}"
        handler = handler or load(model)
        received: dict[str, list[Any]] = {"timestep": [], "encoder_hidden_states": []}

        def record(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            for name, values in received.items():
                values.append(kwargs[name].detach().clone())

        # The class's forward is the same object before and after PEFT and Fabric have wrapped the decoder.
        hook = handler.model.decoder.register_forward_pre_hook(record, with_kwargs=True)
        config_class = getattr(trainer, shapes.CONFIG_CLASS[kind])
        adapter = config_class(r=4, alpha=8) if kind == "lora" else config_class(linear_dim=4, linear_alpha=8)
        training = SETTINGS | {"output_dir": str(output)} | settings
        attached = (
            nullcontext()
            if plugins is None
            else attach(trainer, plugins=plugins, options=options, extra_plugins=extra_plugins, announce=print)
        )
        tensors = tensors or (checkout.xl_tensors if "xl" in model else checkout.tensors)
        with attached:
            torch.manual_seed(7)  # the first versions of upstream do not seed
            made = getattr(trainer, shapes.TRAINER_CLASS[kind])(
                handler, adapter, known_fields(trainer.TrainingConfig, training)
            )
            more = {} if resume_from is None else {"resume_from": resume_from}
            state = {"should_stop": False}
            messages = [text for _, _, text in made.train_from_preprocessed(str(tensors), state, **more)]
        hook.remove()
        rng_state = torch.get_rng_state()
        weights = [file for file in output.glob("final/**/*.safetensors") if file.parent.name != "average"]
        return Trained(
            losses=list(made.module.training_losses) if made.module is not None else [],
            tensors=load_file(weights[0]) if weights else {},
            rng_state=rng_state,
            messages=messages,
            output=output,
            timesteps=received["timestep"],
            conditions=received["encoder_hidden_states"],
            config=made.training_config,
        )

    return run


@pytest.fixture(scope="session")
def diffusers() -> Any:
    """diffusers, when it knows ACE-Step 1.5 and can be imported beside this transformers."""
    how = (
        "needs diffusers with ACE-Step 1.5: pip install 'diffusers>=0.41' (it asks for its own version of transformers)"
    )
    module = pytest.importorskip("diffusers", reason=how)
    try:
        from diffusers.loaders.lora_pipeline import AceStepLoraLoaderMixin  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip(f"diffusers {module.__version__} cannot load it; {how}")
    return module


@pytest.fixture
def equal_bits() -> Callable[[Trained, Trained], bool]:
    """Whether two trainings are the same: every loss, every adapter tensor, the random state afterwards."""
    import torch

    def equal(one: Trained, other: Trained) -> bool:
        assert one.losses and one.tensors, f"nothing was trained: {one.messages}"
        return (
            one.losses == other.losses
            and one.tensors.keys() == other.tensors.keys()
            and all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
            and torch.equal(one.rng_state, other.rng_state)
        )

    return equal
