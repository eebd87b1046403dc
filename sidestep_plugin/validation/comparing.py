"""Compares saved adapters: each is evaluated on the same songs, at the same timesteps, with the same noise.

The model is loaded once, and upstream's own training step computes every loss.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.applied import applied, check_applicable, linear_layers
from ..adapters.inspection import Report, inspect_adapter
from ..adapters.kinds.lora import LORA
from ..engine import models, shapes
from ..engine.attachment import attached_to_evaluate
from ..engine.checkout import find_root, import_trainer
from ..engine.decoders import without_adapter
from ..engine.evaluation import evaluate
from ..errors import Refusal
from ..run import ModelFacts
from ..songs.dataset import check_songs, check_width, inspect_dataset
from ..songs.fingerprint import trained_on
from ..songs.values import check_values
from ..timesteps.treatment import Treatment, decide_treatment, validation_grid
from ..variants import Variant
from .held_out import choose, number_of
from .history import losses_by_t, mean_loss

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Measured:
    """What was measured of an adapter."""

    path: Path  # as the user named it
    report: Report
    strength: float  # what it was multiplied by, beside its own strength
    losses: torch.Tensor  # shape [songs, timesteps, conditions], float64
    known: int = 0  # how many of the songs it was trained on, as far as that is known


@dataclass(frozen=True)
class Comparison:
    """What was measured."""

    # model, songs: name of the model's folder, and those of the songs.
    model: str
    # How the model is trained; it decides the timesteps and the weight of losses without condition.
    treatment: Treatment
    songs: tuple[str, ...]
    timesteps: tuple[float, ...]
    # The last axis of the losses: with the condition (True), with the null condition (False).
    conditions: tuple[bool, ...]
    before: torch.Tensor  # losses of the model without adapter, shape [songs, timesteps, conditions], float64
    after: tuple[Measured, ...]  # what was measured of each adapter, at each strength

    def mean(self, losses: torch.Tensor) -> float:
        """The loss that a training minimizes."""
        return mean_loss(losses, self.treatment.cfg_ratio)

    def by_t(self, losses: torch.Tensor, condition: int) -> list[float]:
        """Mean loss of the songs at each timestep."""
        return losses_by_t(losses, condition)


def compare(
    adapters: Sequence[Path],
    *,
    model: str | None,
    dataset_dir: Path,
    acestep_root: Path | None = None,
    checkpoint_dir: Path | None = None,
    device: str = "auto",
    variant: Variant | None = None,
    held_out: float = 0.0,
    strengths: Sequence[float] = (1.0,),
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Comparison:
    """Evaluate adapters, and the model without one. All is checked before the model is loaded. Raises Refusal.

    Args:
        adapters: weights files, or folders of adapters, checkpoints or trainings.
        model: alias, folder name or path; None: the one that the adapters were trained for.
        dataset_dir: preprocessed songs.
        held_out: evaluate only the songs that ``--validate`` holds out with this value; 0: all songs.
        strengths: what each adapter is multiplied by in turn, beside its own strength.
        say: takes a line before everything that takes long.
        progress: called with the name of what is evaluated, the number of songs done and their total.
    """
    root = find_root(acestep_root)
    folder = models.find_model(model or _model_of(adapters), models.checkpoint_folder(checkpoint_dir, root))
    facts = ModelFacts.from_folder(folder)
    models.check_weights(folder, facts)
    treatment = decide_treatment(facts, variant=variant)
    known_shapes = models.decoder_shapes(folder)
    reports = []
    for path in adapters:
        reports.append(_inspected(path))
        check_applicable(reports[-1].adapter, known_shapes, facts.name, strengths=strengths)
    models.restrict_gpus(device)
    where = models.pick_device(device)
    dataset = inspect_dataset(dataset_dir.absolute(), allow_duplicates=None)
    check_songs(dataset, facts)
    songs = choose(dataset.files, number_of(held_out, dataset.songs)) if held_out else dataset.files
    check_values(songs, mask_nan=False, say=say)
    say(f"Importing ACE-Step's trainer from {root} ...")
    trainer = import_trainer(root)
    say(f"Loading {folder.name} on {where} ...")
    handler = models.load_model(folder, where)
    null = getattr(handler.model, "null_condition_emb", None)
    if null is not None:
        check_width(dataset, facts.name, int(null.shape[-1]))
    layers = linear_layers(handler.model.decoder)
    for report in reports:
        loaded = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        check_applicable(report.adapter, loaded, facts.name, strengths=strengths)
    conditions = (True,) if null is None else (True, False)
    grid = validation_grid(treatment)
    with attached_to_evaluate(trainer):
        module = _module(trainer, handler)
        after: list[Measured] = []
        with without_adapter(module):

            def measure(name: str) -> torch.Tensor:
                def done(number: int) -> None:
                    progress(name, number, len(songs))

                done(0)
                with as_in_a_training(trainer, module):
                    return evaluate(module, songs, grid, conditions, done=done)

            before = measure("the model without adapter")
            for path, report in zip(adapters, reports, strict=True):
                known = trained_on(report.adapter.file.path, songs)
                for strength in strengths:
                    with applied(report.adapter, layers, strength):
                        told = str(path) if len(strengths) == 1 else f"{path} at strength {strength:g}"
                        after.append(Measured(path, report, strength, measure(told), known))
    _check_finite(before, songs)
    names = tuple(song.name for song in songs)
    return Comparison(facts.name, treatment, names, grid, conditions, before, tuple(after))


def _model_of(adapters: Sequence[Path]) -> str:
    """The model that all adapters say they were trained for. Raises Refusal."""
    names = {path: _inspected(path).facts.get("model_name") for path in adapters}
    silent = [path for path, name in names.items() if not isinstance(name, str)]
    if silent:
        raise Refusal(f"{silent[0]} does not say for which model it was trained. Name the model: --model NAME.")
    if len(set(names.values())) > 1:
        told = ", ".join(f"{path}: {name}" for path, name in names.items())
        raise Refusal(f"The adapters were trained for different models ({told}). Name one: --model NAME.")
    return str(next(iter(names.values())))


def _inspected(path: Path) -> Report:
    try:
        return inspect_adapter(path)
    except OSError as error:
        raise Refusal(f"Cannot read {path}: {error.strerror or error}. Make it readable, or leave it out.") from None


def _module(trainer: Any, handler: models.Handler) -> Any:
    """Upstream's training module around a model. The LoRA that it injects is disabled by the caller."""
    import torch

    if shapes.sampler_style(trainer.sample_discrete_timestep) == "device and dtype":
        handler.model.to(torch.bfloat16)  # these versions compute in bf16 on every device
        handler = dataclasses.replace(handler, dtype=torch.bfloat16)
    elif handler.dtype is torch.bfloat16:
        # As in a training: what autocast does not cast is computed in fp32.
        for layer in handler.model.decoder.modules():
            if not isinstance(layer, torch.nn.Linear | torch.nn.Conv1d | torch.nn.ConvTranspose1d):
                for weight in layer.parameters(recurse=False):
                    weight.data = weight.data.float()
    names = inspect.signature(trainer.LoRAConfig).parameters
    settings = {"r": 1, "alpha": 1, "dropout": 0.0}
    config = trainer.LoRAConfig(**{name: value for name, value in settings.items() if name in names})
    module_class = getattr(trainer, LORA.module_class)
    return module_class(handler.model, config, trainer.TrainingConfig(), handler.device, handler.dtype)


def as_in_a_training(trainer: Any, module: Any) -> AbstractContextManager[Any]:
    """A block in which a module that no training has set up computes as it does in one.

    Versions that compute in bf16 on every device cast by themselves on CUDA only: elsewhere it is Fabric that does.
    """
    import torch

    kind = torch.device(module.device).type
    if kind == "cuda" or shapes.sampler_style(trainer.sample_discrete_timestep) != "device and dtype":
        return nullcontext()
    return torch.autocast(kind, torch.bfloat16)


def _check_finite(losses: torch.Tensor, songs: Sequence[Path]) -> None:
    for song, of_song in zip(songs, losses, strict=True):
        if not bool(of_song.isfinite().all()):
            raise Refusal(
                f"The loss of {song.name} is NaN or infinite even without an adapter. Preprocess it again, or take it "
                "out of the folder."
            )
