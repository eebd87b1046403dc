"""Small models on a GPU, or the same on the CPU, and what both need: bf16 autocast, random states, exact kernels."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch

# cuBLAS reads it when it is first used, and is not deterministic without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HOW = (
    "needs a CUDA GPU. There: python -m pytest -m gpu tests/gpu, and the same with --acestep-root=DIR for ACE-Step's "
    "own trainer and model code"
)
_NOTES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items):
    there = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu"):
            # Which warnings CUDA gives is not known, and a GPU is there for minutes: they are shown, and fail nothing.
            item.add_marker(pytest.mark.filterwarnings("default") if there else pytest.mark.skip(reason=HOW))


def pytest_terminal_summary(terminalreporter, config):
    if notes := config.stash.get(_NOTES, []):
        terminalreporter.section("seen on the GPU")
        for note in notes:
            terminalreporter.write_line(note)


@pytest.fixture
def note(request, device):
    """Keep a line for the end of the report: ``note("largest difference 1e-7")``. A dry run keeps none."""

    def keep(text):
        if device.type == "cuda":
            request.config.stash.setdefault(_NOTES, []).append(f"{request.node.name}: {text}")

    return keep


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The GPU; and the CPU, for a dry run of the same test."""
    return torch.device(request.param)


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass
class Songs:
    """Preprocessed songs, and what the model's own ``forward()`` takes for the same songs."""

    batch: dict[str, Any]
    forward: dict[str, Any]


@pytest.fixture
def as_on_a_gpu(trainer, device, monkeypatch):
    """On the CPU: let upstream train under bf16 autocast, as it does on a GPU."""
    if device.type == "cpu":
        for name in ("_precision", "_select_fabric_precision"):
            if hasattr(trainer, name):
                monkeypatch.setattr(trainer, name, lambda *_: "bf16-mixed")


@pytest.fixture(scope="session")
def own_models(checkout):
    """Whether the checkout has model code of its own. Early versions have a trainer alone."""
    return checkout.real and (checkout.root / "acestep" / "models" / "base").is_dir()


@pytest.fixture
def load_on(checkout, trainer, own_models, device, as_on_a_gpu, tmp_path):
    """Load a model in bf16: ``load_on("base")``. A tiny one of the checkout's own code, or the miniature's."""
    from sidestep_plugin.engine.models import Handler, find_model, load_model

    def miniature(family):
        handler = load_model(find_model(family, checkout.checkpoints), device)
        handler.model.to(torch.bfloat16)
        return handler

    def real(family):
        pytest.importorskip("vector_quantize_pytorch", reason="upstream's models need vector-quantize-pytorch, einops")
        from upstream.test_real_models import FILES, TINY, TINY_XL

        try:
            modeling = importlib.import_module(FILES[family])
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("acestep"):
                raise
            pytest.skip(f"this checkout has no {FILES[family]}")
        config = modeling.AceStepConfig(**(TINY_XL if family.startswith("xl") else TINY))
        config.is_turbo = family == "turbo"
        config._attn_implementation = "sdpa"
        folder = tmp_path / "checkpoints" / f"acestep-v15-{family}"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            written = {"is_turbo": family == "turbo", "timestep_mu": -0.4, "timestep_sigma": 1.0}
            (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
            torch.save(torch.full((1, 64, 21), 0.1), folder / "silence_latent.pt")
        config._name_or_path = str(folder)
        torch.manual_seed(0)
        model = modeling.AceStepConditionGenerationModel(config).eval().to(torch.bfloat16)
        model.decoder.to(device)  # as load_model: training calls nothing else
        return Handler(model, str(device), torch.bfloat16)

    return real if own_models else miniature


@pytest.fixture
def songs_on(own_models, device, batch_of):
    """Random songs on the device, in bf16: ``songs_on(model, size, seed)``. The whole model has to be there, too."""

    def moved(values):
        return {
            name: value.to(device, torch.bfloat16 if value.is_floating_point() else value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in values.items()
        }

    def miniature(model, size, seed):
        batch = moved(batch_of(model, size, seed))
        conditions = tuple(batch[key] for key in ("encoder_hidden_states", "encoder_attention_mask", "context_latents"))
        # The songs were preprocessed: what prepare_condition would compute is what stands in the batch.
        model.prepare_condition = lambda *_, **__: conditions
        return Songs(batch, {"hidden_states": batch["target_latents"], "attention_mask": batch["attention_mask"]})

    def real(model, size, seed):
        from upstream.test_real_models import preprocessed, songs_for

        songs = moved(songs_for(model, size, seed, torch.bfloat16))
        return Songs(preprocessed(model, songs), songs)

    return real if own_models else miniature


# -- trainings ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(train, load_on, device):
    """A whole training: ``run("base", "lora", options={...}, ...)``, with the GPU's random state after it."""

    def whole(family, kind="lora", **more):
        handler = more.pop("handler", None) or load_on(family)
        trained = train(family, kind, handler=handler, **more)
        trained.device_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else trained.rng_state
        return trained

    return whole


@pytest.fixture
def same(equal_bits):
    """Whether two trainings are the same, bit for bit: losses, adapter, and both random states."""
    return lambda one, other: equal_bits(one, other) and torch.equal(one.device_rng, other.device_rng)


@pytest.fixture
def largest_difference():
    """The largest difference of two trainings' adapters, relative to the largest number in the same tensor."""

    def difference(one, other):
        assert one.tensors and one.tensors.keys() == other.tensors.keys(), one.messages + other.messages
        pairs = ((one.tensors[name].float(), other.tensors[name].float()) for name in one.tensors)
        return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)

    return difference


class Deterministic:
    """While torch is asked for deterministic kernels: names of those that have no such form."""

    def __init__(self):
        self.without = set()

    def __str__(self):
        return f"no deterministic kernel: {', '.join(sorted(self.without)) or 'none'}"


@pytest.fixture
def deterministic():
    """Ask for deterministic kernels for a block, and note those that have no such form."""

    @contextmanager
    def block():
        found, before = Deterministic(), torch.are_deterministic_algorithms_enabled()
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=".*deterministic.*")
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                yield found
            finally:
                torch.use_deterministic_algorithms(before)
                found.without |= {str(one.message).split(" ")[0] for one in caught if "determinis" in str(one.message)}

    return block


@pytest.fixture
def autocast(device):
    """bf16 autocast, where upstream's step does not enter it itself: on the CPU."""
    return lambda: torch.autocast("cpu", dtype=torch.bfloat16) if device.type == "cpu" else nullcontext()
