"""What hooks receive: the model's facts, the run, the step, a place to resume from, a saved adapter."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from .errors import Refusal
from .files import not_a_file, stand_in
from .ranks import Ranks

if TYPE_CHECKING:
    import torch

AdapterType = Literal["lora", "lokr"]

FRAMES: Final = ("target_latents", "attention_mask", "context_latents")
"""Entries of a batch with one row per frame of latents, [B,T,...]. A plugin may shorten T in all of them at once."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known about a model without running it.

    Attributes:
        name: name of the model's folder, ``""`` if unknown. Never a path.
        config: the values in use. For a loaded model these come from its ``config`` object, which also holds the
            defaults of its class.
        written: the contents of the folder's ``config.json``, or None if there is no such file. ACE-Step's config
            class sets ``model_version`` to "turbo" for every model, so only what is written in the file is evidence.
    """

    name: str
    config: Mapping[str, Any]
    written: Mapping[str, Any] | None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelFacts:
        """Facts about a model that is not loaded. Raises Refusal if config.json is missing or not a JSON object."""
        written = read_config(folder / "config.json")
        # Not resolved: a link named acestep-v15-base says more than the download cache that it points to.
        return cls(name=folder.absolute().name, config=written, written=written)

    @classmethod
    def from_model(cls, model: Any) -> ModelFacts:
        """Facts about a loaded model: its config object, and the file it was loaded from if that still exists.

        Raises Refusal if that file exists and is not a JSON object.
        """
        config = model.config
        live: dict[str, Any] = dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))
        origin = str(getattr(config, "_name_or_path", "") or "")
        file = Path(origin) / "config.json"
        written = read_config(file) if origin and file.is_file() else None
        # The path may come from another operating system, so both separators count.
        parts = [part for part in re.split(r"[\\/]", origin) if part not in ("", ".", "..")]
        return cls(name=parts[-1] if parts else "", config=live, written=written)


def read_config(file: Path) -> dict[str, Any]:
    """Read a model's config.json. Raises Refusal if it is missing, unreadable, or not a JSON object in UTF-8."""
    problem = not_a_file(file)
    if problem and file.exists():  # a named pipe would be waited for
        raise Refusal(f"Cannot read {file}: it {problem}. Copy the model folder again.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"No config.json in {file.parent}. Expected the folder of an ACE-Step 1.5 model.") from None
    except OSError as error:
        raise Refusal(f"Cannot read {file}: {error.strerror or error}. Make it readable, or copy it again.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, far too long or too deeply nested
        if what := stand_in(file):
            raise Refusal(f"{file} is not JSON: it {what}. Complete the model's folder, or copy it again.") from None
        raise Refusal(f"{file} is not JSON ({error}). Copy it again from the model's download page.") from None
    if not isinstance(config, dict):
        raise Refusal(f"{file} holds a {type(config).__name__}, expected a JSON object. Copy it again.")
    return config


def _no_vae() -> Any:
    """The answer where nobody has loaded a VAE."""
    return None


@dataclass(eq=False)
class Run:
    """One training, from its start to the saved adapter.

    Attributes:
        adapter_type: "lora" or "lokr".
        adapter_config: upstream's LoRAConfig or LoKRConfig.
        training_config: upstream's TrainingConfig.
        options: the values of all plugin options by name, as given or at their defaults.
        tensor_dir: the folder of preprocessed songs; None if a step was run without upstream's trainer.
        sampled_by: name of the plugin that samples the timesteps; None if upstream does.
        state: a dictionary in which plugins keep what they need during the run, by convention under their own name.
        steps: training steps started so far, without validation. A resumed run also counts the steps before it.
        resumed_at: training steps that earlier runs had finished; 0 for a run from the start.
        best_epoch: the epoch with the lowest validation loss so far, by the plugin that validates; None without one.
        loaded_vae: call it for the VAE that the app has loaded, None on the command line. Never move that VAE.
        with_lightning: whether upstream trains with Lightning; without it, :func:`acestep_plan_memory` is never called.
        ranks: the place of this process among those of the training; process 0 of 1 on a single GPU.
        together: functions that are called in every process before :func:`acestep_run_ended` is called in the first
            one, which is where a plugin exchanges what its processes have noted since the last epoch.
    """

    adapter_type: AdapterType
    adapter_config: Any
    training_config: Any
    options: Mapping[str, Any]
    tensor_dir: Path | None
    # Weak, so that remembering a run never keeps a model in memory after upstream has dropped it.
    model_ref: weakref.ref[Any]
    module_ref: weakref.ref[Any] | None = None
    sampled_by: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    resumed_at: int = 0
    best_epoch: int | None = None
    with_lightning: bool = True
    epoch_losses: Callable[[], Mapping[int, float]] = dict  # set by the host, for loss_by_epoch
    loaded_vae: Callable[[], Any] = _no_vae
    ranks: Ranks = Ranks()  # noqa: RUF009 - immutable
    together: list[Callable[[], object]] = field(default_factory=list)
    exchange: Callable[[Any], list[Any]] | None = None  # set by the host, for gather

    @property
    def first_step(self) -> bool:
        """Whether this run is still in its first step, in which reading values is worth waiting for the GPU."""
        return self.steps - self.resumed_at <= 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; ``[value]`` on a single GPU.

        Every process has to call it equally often: in ``acestep_epoch_finished`` or from :attr:`together`. Values are
        pickled, so tensors should be on the CPU.
        """
        return [value] if self.exchange is None else self.exchange(value)

    @property
    def loss_by_epoch(self) -> Mapping[int, float]:
        """Mean loss of every complete epoch so far, by number from 1, also those before resuming; {} if unknown."""
        return self.epoch_losses()

    @property
    def model(self) -> Any:
        """The whole model (AceStepConditionGenerationModel), not just its decoder."""
        model = self.model_ref()
        if model is None:
            raise Refusal("The model was freed while this run was still going. Start the run again.")
        return model


@dataclass(eq=False, frozen=True, slots=True)
class Step:
    """One call of upstream's ``training_step``, in training or in validation. Read only.

    Attributes:
        run: the run that the step belongs to.
        module: upstream's PreprocessedLoRAModule or PreprocessedLoKRModule.
        training: False in validation (no gradients, or upstream was told not to record the loss).
        device: the device on which the step computes.
        dtype: the floating-point type in which the step computes.
        t: the timesteps of the step, shape [B], once they are sampled; None if upstream has no sampler.
        sampled_by: name of the plugin that sampled them; None if upstream did.
        loss: a copy of the loss that upstream's step returned, a scalar tensor on `device`; None before that.
        sampler_called: whether upstream has called its sampler in this step.
    """

    run: Run
    module: Any
    training: bool
    device: torch.device
    dtype: torch.dtype
    t: torch.Tensor | None = None
    sampled_by: str | None = None
    loss: torch.Tensor | None = None
    sampler_called: bool = False


def note(step: Step, **values: Any) -> None:
    """Write attributes of a step, which only the host does: for plugins it is read only."""
    for name, value in values.items():
        object.__setattr__(step, name, value)


@dataclass(frozen=True)
class ResumePoint:
    """A place in a training to resume from, with everything that the rest of the training depends on.

    Attributes:
        epochs: complete passes through the songs.
        steps: training steps of the pass that has begun; 0 between two passes.
        steps_per_epoch: training steps in a complete pass; None if they were not recorded.
        losses: the loss of every training step so far, shape [N]; None if they were not recorded.
        validation: the loss of every validation step so far, shape [M]; None if they were not recorded.
        random: states of the random generators at this place; None if they were not recorded.
        epoch_random: their states at the start of the pass that has begun, which decide the order of the songs; None
            between two passes.
        gradients: for each trained tensor, the gradient that waits for the next optimizer step; None if none waits.
        optimizer, scheduler: their ``state_dict()``; None to start with new ones.
        optimizer_class: name of the optimizer's class, "" if unknown.
        weights: the adapter's tensors under the names with which they are saved; empty if they are in a file.
        parameters: the trained tensors themselves, if the saved ones are computed from them (LyCORIS multiplies its
            scalar into them); None if they are the same.
        songs: fingerprint of the songs, "" if unknown.
        held_out: what a plugin keeps of the songs that are validated on and of their losses, as numbers, texts,
            tensors, lists and dictionaries; None without validation.
        save_number: counts the saves in an output folder from 1, so the newest checkpoint has the highest; 0 if it was
            not recorded.
        ranks: of a training in several processes, each one's ``random`` and ``epoch_random``, by rank; empty for one.
        lines: what the user should know before resuming from here.
    """

    epochs: int
    steps: int
    steps_per_epoch: int | None = None
    losses: torch.Tensor | None = None
    validation: torch.Tensor | None = None
    random: Mapping[str, Any] | None = None
    epoch_random: Mapping[str, Any] | None = None
    gradients: list[torch.Tensor | None] | None = None
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    optimizer_class: str = ""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameters: list[torch.Tensor] | None = None
    songs: str = ""
    held_out: Mapping[str, Any] | None = None
    save_number: int = 0
    ranks: Sequence[Mapping[str, Any]] = ()
    lines: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The place in words, such as "after epoch 3"."""
        return f"in epoch {self.epochs + 1}" if self.steps else f"after epoch {self.epochs}"

    @property
    def steps_done(self) -> int | None:
        """Training steps so far; None if the number of steps in an epoch is unknown."""
        if self.losses is not None:
            return len(self.losses)
        return None if self.steps_per_epoch is None else self.epochs * self.steps_per_epoch + self.steps


@dataclass(frozen=True)
class MemoryPlan:
    """What a plugin wants to save while a training runs.

    Attributes:
        kept: names of decoder parameters that keep their type when upstream casts the decoder to fp32.
        bypassed: names of LyCORIS modules that are taken out of the forward pass until the training ends.
        replaced: names of the decoder's modules that are replaced until the training ends, each with a function that
            is given the module and returns another one, which computes the same shapes and has nothing to train.
        after_replacing: called once they are replaced; returns lines to announce.
        checkpointing: whether the decoder's layers are computed again in the backward pass (gradient checkpointing);
            None leaves it to upstream.
        compiled: names of the decoder's modules that are compiled with ``torch.compile`` until the training ends.
        not_compiled: called once with the reason where compiling fails, and the training goes on without; returns lines
            to announce.
        lines: lines to announce now.
        outcome: called once before the first backward pass with the bytes that `kept` saved, or None if upstream
            did not cast the decoder to fp32; returns lines to announce.
    """

    kept: frozenset[str] = frozenset()
    bypassed: frozenset[str] = frozenset()
    replaced: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    after_replacing: Callable[[], Sequence[str]] | None = None
    checkpointing: bool | None = None
    compiled: frozenset[str] = frozenset()
    not_compiled: Callable[[str], Sequence[str]] | None = None
    lines: tuple[str, ...] = ()
    outcome: Callable[[int | None], Sequence[str]] | None = None


@dataclass(frozen=True)
class ValidationPlan:
    """Which songs a plugin wants to be validated on, where and how often.

    Attributes:
        songs: files of preprocessed songs that are not trained on, evaluated one at a time.
        timesteps: the t at which each song is evaluated, each with noise of its own that never changes.
        conditions: whether with the song's condition (True), the model's null condition (False), or both.
        every: epochs from one validation to the next; the last epoch is validated in any case.
        baseline: whether the model without adapter is still to be evaluated, as epoch 0.
        patient: whether a verdict may stop the training.
        best_epoch: the best epoch of the runs before, for a training that is resumed.
        lines: lines to announce now.
    """

    songs: tuple[Path, ...]
    timesteps: tuple[float, ...]
    conditions: tuple[bool, ...] = (True,)
    every: int = 1
    baseline: bool = True
    patient: bool = False
    best_epoch: int | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Validation:
    """What was measured on the songs of a plan.

    Attributes:
        epoch: epochs done; 0 for the model without adapter.
        losses: upstream's loss by song, timestep and condition, shape [songs, timesteps, conditions], float64 on the
            CPU.
        seconds: how long it took.
    """

    epoch: int
    losses: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What a plugin makes of a validation.

    Attributes:
        best: whether this is the best adapter so far, which the host then saves as ``checkpoints/best``.
        stop: whether the training has gone on for long enough. ``final`` is then the best adapter.
        lines: lines for the user.
        log: numbers for upstream's log by name, which TensorBoard shows.
    """

    best: bool = False
    stop: bool = False
    lines: tuple[str, ...] = ()
    log: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Clip:
    """A piece of sound.

    Attributes:
        samples: shape [C,N], fp32 in [-1, 1], on the CPU.
        rate: samples per second.
    """

    samples: torch.Tensor
    rate: int


@dataclass(frozen=True)
class EpochNews:
    """What a plugin tells between two epochs.

    Attributes:
        lines: lines for the user.
        logged: numbers and clips by name, for upstream's log, which TensorBoard shows.
    """

    lines: tuple[str, ...] = ()
    logged: Mapping[str, float | Clip] = field(default_factory=dict)


@dataclass(frozen=True)
class ProcessPlan:
    """In how many processes a training runs, one for each GPU.

    Attributes:
        devices: processes on this machine.
        machines: number of machines.
        machine: number of this machine, from 0.
        rendezvous: ``host:port`` on the first machine, where the processes meet; "" on a single machine.
        own: names of options that may differ between the machines.
        outcome: called in the first process when the songs are divided, with the run, the number of songs and the
            training steps that each process has per epoch; returns lines to announce.
    """

    devices: int = 1
    machines: int = 1
    machine: int = 0
    rendezvous: str = ""
    own: frozenset[str] = frozenset()
    outcome: Callable[[Run, int, int], Sequence[str]] | None = None

    @property
    def processes(self) -> int:
        """Number of processes on all machines."""
        return self.devices * self.machines


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that upstream has just written: a checkpoint, the best one or the finished one.

    Attributes:
        weights: the weights file, in a temporary folder. After all plugins were asked, that folder is moved to its
            place as a whole: whatever a plugin writes beside the weights appears together with them, or not at all.
        destination: the path that the weights file will have then.
        folder: the temporary folder that upstream saved into; the weights are in it or in a folder below it.
        adapter_type: "lora" or "lokr".
        epoch: number of finished epochs, if upstream's save function was told.
        global_step: number of optimizer steps, if upstream's save function was told.
        resume_point: what resuming from here needs; None for a finished adapter, and if it is not available.
    """

    weights: Path
    destination: Path
    folder: Path
    adapter_type: AdapterType
    epoch: int | None
    global_step: int | None
    resume_point: ResumePoint | None = None
